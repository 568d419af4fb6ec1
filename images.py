"""Reads images, names of frames, intrinsics and LiDAR, and resizes them.

An image and what belongs to it are resized in step: Eq. (1) of the paper, which warps one image
into another, rests on intrinsics and depth that fit the pixels. What cannot be right is refused.
"""

import io
import math
import os
import re
from bisect import bisect_left
from collections import Counter
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from utils import InputError

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg")
VIDEO_EXTENSIONS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
DEPTH_MODES = ("I;16", "I")  # Pillow's names for 16 bits of one channel
EXIF_ORIENTATION = 0x0112
SAME_ASPECT = 0.04  # 1242x375 saved at 1024x320 is off by 0.034, KITTI's usual crop by 0.042
Size = tuple[int, int]  # (height, width)


# ---- reading files -----------------------------------------------------------------------------

def read_bytes(path: str) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not content:
        raise InputError(f"{path}: the file is empty")
    return content


def read_text(path: str) -> str:
    """A text file, with or without a byte-order mark."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file") from None


def read_lines(path: str) -> list[str]:
    """The lines of a text file that are not empty."""
    return [line for line in read_text(path).splitlines() if line.strip()]


def read_image(path: str) -> Tensor:
    """A JPEG or PNG file as RGB, (3, H, W) uint8, turned upright as its EXIF orientation says.

    Grey, palette, CMYK and 16-bit images are converted. Raises InputError where the file is
    damaged, transparent, or beyond Pillow's limit of pixels.
    """
    content = read_bytes(path)
    is_jpeg = content.startswith(b"\xff\xd8")
    if not is_jpeg and not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise InputError(f"{path}: neither a JPEG nor a PNG file; {how_to_convert(path)}")
    if is_jpeg and not has_end(content):
        raise InputError(f"{path}: the image file is truncated or damaged")
    try:
        with Image.open(io.BytesIO(content)) as header:
            header.verify()  # a PNG's checksums, which decoding does not compare
        with Image.open(io.BytesIO(content)) as image:
            ImageOps.exif_transpose(image, in_place=True)
            pixels = to_rgb(image)  # (H, W, 3) or (H, W, 4)
    except Exception as error:  # noqa: BLE001  (damaged files raise every kind)
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise InputError(f"{path}: the image cannot be decoded ({reason})") from None
    if pixels.shape[2] == 4 and pixels[..., 3].min() < 255:
        raise InputError(f"{path}: the image is transparent in places; give it a background first")
    colours = torch.from_numpy(pixels[..., :3])
    return colours.permute(2, 0, 1)


def has_end(jpeg: bytes) -> bool:
    """Whether an end follows the start of the image's data.

    A thumbnail before that, and what a phone appends (a video, a map of depth), have ends of their own.
    """
    place = 2
    while jpeg[place : place + 1] == b"\xff" and jpeg[place + 1 : place + 2] != b"\xda":
        place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")  # one segment
    return jpeg.find(b"\xff\xd9", place) > 0


def to_rgb(image: Image.Image) -> np.ndarray:
    """Pixels (H, W, 3) uint8, or (H, W, 4) where the image has transparency."""
    if image.has_transparency_data:
        return np.array(image.convert("RGBA"))
    if image.mode in DEPTH_MODES:  # 16-bit grey by its upper byte
        grey = np.array(image) >> 8
        grey = grey.clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


def read_ids(path: str, modes: tuple[str, ...] = ("L", "P")) -> np.ndarray:
    """A PNG of one channel as it is stored, (H, W): label ids, or 16 bits with DEPTH_MODES."""
    stored = read_bytes(path)
    if not stored.startswith(b"\x89PNG"):
        raise InputError(f"{path}: not a PNG file")
    content = io.BytesIO(stored)
    try:
        Image.open(content, formats=["PNG"]).verify()
        with Image.open(content) as image:
            mode = image.mode
            values = np.array(image)
    except Exception as error:  # noqa: BLE001
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{path}: a damaged PNG file ({reason})") from None
    if mode not in modes:
        wanted = " or ".join(modes)
        raise InputError(f"{path}: a PNG of mode {wanted} is expected, this one is {mode}")
    return values


def read_scaled_depth(path: str, scale: float) -> np.ndarray:
    """Depth (H, W) in metres of a 16-bit PNG of metres * scale, 0 where it holds 0 or 65535.

    65535 is what sensors write where they measure nothing, or where the value exceeds 16 bits.
    """
    stored = read_ids(path, DEPTH_MODES)
    stored = np.where(stored == 65535, 0, stored)
    return stored.astype(np.float32) / scale


def image_size(path: str) -> Size:
    """(height, width) of an image as it is read, upright; reads the header only."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)
    except Exception:  # noqa: BLE001
        return tuple(read_image(path).shape[1:])  # says what is wrong
    return (width, height) if turned else (height, width)


def pixel_kind(path: str) -> int:
    """0: a picture in colours; 1: a PNG of one channel, which may hold ids; 2: of 16 bits."""
    with suppress(OSError, Image.DecompressionBombError), Image.open(path) as image:
        if image.mode in DEPTH_MODES:
            return 2
        if image.format == "PNG" and image.mode in ("L", "1", "P"):
            return 1
    return 0


def how_to_convert(path: str) -> str:
    """The command that makes images of a file that is not read."""
    name = os.path.basename(path)
    stem, extension = os.path.splitext(name)
    if extension.lower() in IMAGE_EXTENSIONS:
        return "give the folder of the images"
    if extension.lower() in VIDEO_EXTENSIONS:
        return f"make frames of it: ffmpeg -i {name} -qscale:v 2 frames/%06d.jpg"
    return f"convert it: ffmpeg -i {name} {stem}.png"


def list_folder(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def image_names(folder: str) -> list[str]:
    """Names of the images in a folder, without hidden files and NYU's depth."""
    names = []
    for name in list_folder(folder):
        left_out = name.startswith((".", "sync_depth_"))
        if name.lower().endswith(IMAGE_EXTENSIONS) and not left_out:
            names.append(name)
    return names


# ---- what the names of frames say --------------------------------------------------------------

TIMES = r"""
    (?P<date>(?<!\d) [12]\d{3}[-_]?\d\d[-_]?\d\d [-_T\ ] \d\d[-_:.h]?\d\d[-_:.m]?\d\d
             (?:\.\d+|\d{3})? (?!\d)) |  # 2024-05-01_12-30-05.250
"""
NUMBERS = r"""
    (?P<seconds>\d{9,}\.\d+) |  # 1305031102.175304
    \d+
"""
NUMBER = re.compile(NUMBERS, re.VERBOSE)
NUMBER_OR_DATE = re.compile(TIMES + NUMBERS, re.VERBOSE)


def read_number(match: re.Match) -> int:
    """A number in a name; dates and seconds in nanoseconds. Raises ValueError for no date."""
    digits = re.sub(r"\D", "", match[0])
    if match.groupdict().get("date"):
        moment = datetime.strptime(digits[:14] + "+0000", "%Y%m%d%H%M%S%z")
        fraction = digits[14:23].ljust(9, "0")
        return int(moment.timestamp()) * 10 ** 9 + int(fraction)
    if match["seconds"]:
        seconds, fraction = match[0].split(".")
        return int(seconds + fraction[:9].ljust(9, "0"))
    return int(digits)


def read_numbers(matches: list[re.Match]) -> list[int]:
    """The numbers of a sequence's frames.

    Some programs print 0.091 s after a second as "7.91000000", without leading zeros (ROS:
    secs, nsecs). Where lengths differ, the reading counts that gives the more even steps.
    """
    plain = [read_number(match) for match in matches]
    parts = [match[0].split(".") for match in matches if match["seconds"]]
    lengths = {len(fraction) for _, fraction in parts}
    if len(parts) < len(matches) or len(lengths) == 1:
        return plain
    padded = []
    for seconds, fraction in parts:
        fraction = fraction.rjust(max(lengths), "0")
        padded.append(int(seconds + fraction[:9].ljust(9, "0")))
    return min(plain, padded, key=unevenness)


def unevenness(numbers: list[int]) -> float:
    """By how many of the usual steps all steps between numbers are off."""
    numbers = sorted(numbers)
    usual = usual_step(numbers)
    off = [abs(b - a - usual) for a, b in pairwise(numbers)]
    return sum(off) / max(usual, 1)


def choose_pattern(names: list[str]) -> re.Pattern:
    """NUMBER_OR_DATE, unless what looks like a date is none: a day and a frame number."""
    for name in names:
        for match in NUMBER_OR_DATE.finditer(name):
            try:
                read_number(match)
            except ValueError:
                return NUMBER
    return NUMBER_OR_DATE


def counting_place(rows: list[list[str]]) -> int:
    """Which number of similar names counts the frames, from the numbers in each: the last that varies.

    Where that gives nearly every image a sequence of its own, as for INDEX_TIME.jpg, an earlier one.
    """
    columns = enumerate(zip(*rows))
    varying = [place for place, column in columns if len(set(column)) > 1]
    for place in reversed(varying):
        before = {tuple(row[:place]) for row in rows}
        if 2 * len(before) <= len(rows):
            return place
    return varying[0] if varying else -1


def split_sequences(names: list[str]) -> dict[str, list[tuple[int, str]]]:
    """Names by what surrounds the number that counts: "seqA_*" -> [(number, name), ...]."""
    number_pattern = choose_pattern(names)
    alike = {}
    for name in names:
        stem, _ = os.path.splitext(name)
        matches = list(number_pattern.finditer(stem))
        alike.setdefault(number_pattern.sub("*", stem), []).append((matches, name))
    sequences = {}
    for pattern, members in alike.items():
        place = counting_place([[match[0] for match in matches] for matches, _ in members])
        for matches, name in members:
            label = pattern
            counting = None
            if matches:
                counting = matches[place]
                before = counting.string[:counting.start()]
                after = counting.string[counting.end():]
                label = f"{before}*{number_pattern.sub('*', after)}"
            sequences.setdefault(label, []).append((counting, name))
    numbered = {}
    for label, members in sequences.items():
        matches, names = zip(*members)
        numbers = read_numbers(matches) if None not in matches else [0] * len(names)
        numbered[label] = sorted(zip(numbers, names))
    return numbered


def usual_step(numbers: list[int]) -> int:
    """The most common step, or the median one where most differ."""
    steps = sorted(b - a for a, b in pairwise(numbers))
    if not steps:
        return 1
    step, count = Counter(steps).most_common(1)[0]
    return step if 4 * count > len(steps) else steps[len(steps) // 2]


def nearest(numbers: list[int], wanted: int, tolerance: float) -> int | None:
    """The place of the number nearest to `wanted` in ascending numbers, if within a tolerance."""
    after = bisect_left(numbers, wanted)
    places = [place for place in (after - 1, after) if 0 <= place < len(numbers)]
    best = min(places, key=lambda place: abs(numbers[place] - wanted))
    return best if abs(numbers[best] - wanted) <= tolerance else None


def natural_key(name: str) -> list:
    """Sorts frame2 before frame10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if part.isdecimal() else part for part in parts]


def place_key(path: str) -> tuple:
    """A path without its extension, numbers as numbers: a/7 and a/0007.jpg are the same."""
    stem, extension = os.path.splitext(os.path.normpath(path))
    if extension.lower() not in IMAGE_EXTENSIONS:
        stem += extension
    return tuple(natural_key(stem))


# ---- intrinsics --------------------------------------------------------------------------------

def read_calibration(path: str) -> dict[str, np.ndarray]:
    """KITTI's calibration text, `key: numbers`."""
    values = {}
    for line in read_lines(path):
        key, _, numbers = line.partition(":")
        with suppress(ValueError):  # calib_time
            values[key] = np.array([float(x) for x in numbers.split()])
    return values


def read_intrinsics(path: str) -> np.ndarray:
    """K (3, 3) of a text: 3x3 numbers or `fx fy cx cy`, with spaces or commas between them."""
    words = []
    for line in read_lines(path):
        text = line.partition("#")[0]
        words += text.replace(",", " ").split()
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if len(numbers) == 4:
        fx, fy, cx, cy = numbers
        if abs(fx - cx) < 0.01 * fx < abs(fx - fy):  # the third number is like the first
            raise InputError(f"{path}: is {fx:g} {fy:g} {cx:g} {cy:g} in the order fx fy cx cy?")
        numbers = [fx, 0, cx, 0, fy, cy, 0, 0, 1]
    if len(numbers) != 9:
        raise InputError(
            f"{path}: 9 numbers (3x3) or 4 (fx fy cx cy) are expected, not {len(numbers)}")
    K = np.array(numbers).reshape(3, 3)
    skew = abs(K[0, 1]) > 1e-3 * abs(K[0, 0])
    last_row = K[2].tolist()
    if skew or K[1, 0] != 0 or last_row != [0, 0, 1]:
        raise InputError(f"{path}: expected fx 0 cx, 0 fy cy, 0 0 1, not {K.tolist()}")
    return K


def check_intrinsics(K: np.ndarray, size: Size, source: str) -> None:
    """Refuses a K that cannot be in pixels of images of this size."""
    height, width = size
    fx, _, cx = K[0]
    _, fy, cy = K[1]
    x = (cx + 0.5) / width
    y = (cy + 0.5) / height
    centred = 0.2 < x < 0.8 and 0.05 < y < 0.95
    # off by about the same share of width and height: of another resolution
    scaled = abs(x - y) < 0.1 * x and not 0.44 < x < 0.56
    # a field of view between 1 and 169 degrees: in pixels, not in mm
    focal = 0.05 < fx / width < 50 and 0.05 < fy / height < 50
    # nearer to the middle of the picture when that is turned by 90 degrees: of what EXIF turned
    off = abs(cx - width / 2) + abs(cy - height / 2)
    off_if_turned = abs(cx - height / 2) + abs(cy - width / 2)
    turned = off > 0.1 * width and off_if_turned < 0.5 * off
    if not (np.isfinite(K).all() and focal and centred) or scaled or turned:
        raise InputError(
            f"{source}: intrinsics must be in pixels of the images, {size_text(size)} and upright, "
            f"not fx {fx:.4g} fy {fy:.4g} cx {cx:.4g} cy {cy:.4g}: of another resolution?")


def fov_intrinsics(size: Size, fov: float) -> np.ndarray:
    """K (3, 3) of (height, width) images with a horizontal field of view in degrees."""
    height, width = size
    focal = width / 2 / math.tan(math.radians(fov) / 2)
    return np.array([
        [focal, 0, (width - 1) / 2],
        [0, focal, (height - 1) / 2],
        [0, 0, 1],
    ])


def focal_and_centre(K: Tensor | np.ndarray) -> dict[str, float]:
    """fx, fy, cx, cy of K (3, 3)."""
    return {
        "fx": float(K[0, 0]),
        "fy": float(K[1, 1]),
        "cx": float(K[0, 2]),
        "cy": float(K[1, 2]),
    }


def same_aspect(first: tuple, second: tuple, tolerance: float = SAME_ASPECT) -> bool:
    """Whether two (height, width) can be one view at two resolutions."""
    one = first[1] / first[0]
    other = second[1] / second[0]
    return abs(math.log(one / other)) < tolerance


def size_text(size: Size) -> str:
    return f"{size[1]}x{size[0]}"


# ---- LiDAR -------------------------------------------------------------------------------------

def velodyne_depth(points: np.ndarray, pose: np.ndarray, P: np.ndarray, size: Size,
                   forward_distance: bool = False, offset: int = 0) -> np.ndarray:
    """LiDAR points in a camera: depth (h, w) in metres; a pixel's nearest point counts.

    points: (N, 4) x forward, y left, z up, reflectance; pose: (4, 4) into rectified axes; P: (3, 4).
    The published Eigen ground truth has the velodyne's forward distance instead of camera z, and
    an offset of 1 in rounded pixel positions; KITTI's own depth PNGs have neither.
    """
    valid = np.isfinite(points).all(1) & (points[:, 0] >= 0)
    points = points[valid].astype(np.float64)
    homogeneous = np.c_[points[:, :3], np.ones(len(points))]
    u, v, z = P @ pose @ homogeneous.T
    x = np.round(u / z) - offset  # half to even
    y = np.round(v / z) - offset
    inside = (x >= 0) & (y >= 0) & (x < size[1]) & (y < size[0])
    x = x[inside].astype(int)
    y = y[inside].astype(int)
    value = points[:, 0] if forward_distance else z
    value = value[inside]
    order = np.argsort(-value, kind="stable")  # far first, so that the nearest is written last
    depth = np.zeros(size)
    depth[y[order], x[order]] = value[order]
    return depth.clip(min=0)


def read_points(path: str) -> np.ndarray:
    """A velodyne file: (N, 4) float32."""
    content = read_bytes(path)
    if len(content) % 16:
        raise InputError(f"{path}: {len(content)} bytes are not a list of x, y, z, reflectance in "
                         "float32")
    return np.frombuffer(content, np.float32).reshape(-1, 4)


def rigid(rotation: np.ndarray, translation: np.ndarray, file: str) -> np.ndarray:
    """The pose (4, 4) of a calibration file; refuses what is not a rotation."""
    pose = np.eye(4)
    pose[:3, :3] = rotation
    pose[:3, 3] = translation
    determinant = np.linalg.det(pose[:3, :3])
    if not np.isfinite(pose).all() or abs(determinant - 1) > 0.01:
        raise InputError(f"{file}: R is not a rotation, or T is not finite")
    return pose


# ---- resizing ----------------------------------------------------------------------------------

def resize(image: Tensor, size: Size) -> Tensor:
    """Image (3, h, w) uint8 at (height, width), antialiased."""
    resized = F.interpolate(image[None], size, mode="bilinear", antialias=True)
    return resized[0].contiguous()


def resize_label(label: Tensor, size: Size) -> Tensor:
    """Labels (h, w) at (height, width): a pixel takes the id under its centre, none is mixed."""
    resized = F.interpolate(label[None, None], size, mode="nearest-exact")
    return resized[0, 0]


def resize_depth(depth: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sparse depth (h, w) at another size: a measurement moves to the nearest pixel.

    Where several meet, the nearest surface stays.
    """
    h, w = depth.shape
    rows, columns = np.nonzero(depth)
    values = depth[rows, columns]
    order = np.argsort(-values)  # far first, near written last
    rows = np.round((rows[order] + 0.5) * height / h - 0.5)
    columns = np.round((columns[order] + 0.5) * width / w - 0.5)
    rows = rows.astype(int).clip(0, height - 1)
    columns = columns.astype(int).clip(0, width - 1)
    out = np.zeros((height, width), np.float32)
    out[rows, columns] = values[order]
    return out


def resize_intrinsics(K: np.ndarray, old: Size, new: Size) -> np.ndarray:
    """K (3, 3) of an image resized from (height, width) `old` to `new`.

    Pixel centres are integers, so the edges of an image lie at -0.5.
    """
    K = K.copy()
    across = new[1] / old[1]
    down = new[0] / old[0]
    K[0] *= across
    K[1] *= down
    K[0, 2] += 0.5 * across - 0.5
    K[1, 2] += 0.5 * down - 0.5
    return K
