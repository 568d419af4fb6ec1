"""Data: one class a data set, one joint transform for image, K, depth and label, and the synthetic street world.

    python datasets.py render --data_path data/synthetic          # write the embedded default, in KITTI's own layout
    python datasets.py check --data kitti --data_path data/kitti  # what is there, before a run

Clips (pre-training): {"frames": (F, 3, H, W) uint8, target first, "K": (3, 3), "stereo_T"?: (4, 4), "depth"?: (1, H, W) metres,
0 = no measurement, "index"}. Labelled images: {"image": (3, H, W) uint8, "label": (H, W) int64 train ids, 255 = ignore, "index"}.
`to_device` makes floats in [0, 1] of the bytes, after they have crossed to the device.
"""

import argparse
import math
import os
import re
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import resize

from utils import InputError, run_main

IGNORE = 255
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg")
SPLITS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "splits")

CITYSCAPES_CLASSES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
                      "vegetation", "terrain",
                      "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # raw id of each train id
CITYSCAPES_COLOURS = ((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
                      (250, 170, 30),
                      (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0,
                                                                                                                   142), (0, 0, 70),
                      (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32))
CAMVID_CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
                  "bicyclist")
CAMVID_COLOURS = ((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
                  (192, 128, 128),
                  (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192))


# ---------------------------------------------------------------------------------------------- reading files

def read_bytes(path: str) -> torch.Tensor:
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if content.size == 0:
        raise InputError(f"{path}: the file is empty")
    return torch.from_numpy(content)


def read_image(path: str) -> torch.Tensor:
    """An image file as RGB, (3, H, W) uint8."""
    content = read_bytes(path)
    if path.lower().endswith((".jpg", ".jpeg")) and bytes(content[-64:].numpy()).rfind(b"\xff\xd9") < 0:
        raise InputError(f"{path}: the JPEG file is truncated")  # libjpeg would fill the rest with grey
    try:
        return decode_image(content, mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise InputError(f"{path}: not a readable image ({str(error).splitlines()[0][:100]})") from None


def read_ids(path: str) -> np.ndarray:
    """A PNG of one channel as it is stored: label ids (uint8) or 16-bit depth, (H, W)."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "I;16", "I"):
                raise InputError(f"{path}: a single-channel image is expected, this one is {image.mode}")
            return np.array(image)
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path}: not a readable image ({error.strerror if isinstance(error, FileNotFoundError) else error})") from None


def list_folder(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def read_calibration(path: str) -> dict[str, np.ndarray]:
    """KITTI's calibration text, `key: numbers`."""
    values = {}
    try:
        with open(path) as file:
            for line in file:
                key, _, numbers = line.partition(":")
                try:
                    values[key] = np.array([float(x) for x in numbers.split()])
                except ValueError:
                    continue  # calib_time
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    return values


def read_intrinsics(path: str) -> np.ndarray:
    """A 3x3 matrix or `fx fy cx cy`, in pixels of the images beside it."""
    try:
        numbers = np.loadtxt(path).ravel()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    if numbers.size == 4:
        numbers = np.array([numbers[0], 0, numbers[2], 0, numbers[1], numbers[3], 0, 0, 1])
    if numbers.size != 9:
        raise InputError(f"{path}: 9 numbers (3x3) or 4 (fx fy cx cy) are expected, not {numbers.size}")
    return numbers.reshape(3, 3)


def check_intrinsics(K: np.ndarray, width: int, height: int, path: str) -> None:
    if not np.isfinite(K).all() or min(K[0, 0], K[1, 1]) <= 1 or not (0 < K[0, 2] < width and 0 < K[1, 2] < height):
        raise InputError(f"{path}: intrinsics must be in pixels of the {width}x{height} images (fx, fy > 1, principal point inside), not "
                         f"fx {K[0, 0]:.4g} fy {K[1, 1]:.4g} cx {K[0, 2]:.4g} cy {K[1, 2]:.4g}")


def fov_intrinsics(width: int, height: int, fov: float) -> np.ndarray:
    """K of a camera with square pixels, a horizontal field of view in degrees and the principal point in the middle."""
    focal = width / 2 / math.tan(math.radians(fov) / 2)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])


# ---------------------------------------------------------------------------------------------- the joint transform

def resize_depth(depth: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sparse depth (h, w) at another size: every measurement moves to the nearest new pixel, the nearest surface wins."""
    h, w = depth.shape
    rows, columns = np.nonzero(depth)
    values = depth[rows, columns]
    order = np.argsort(-values)  # far first, near written last
    rows = np.round((rows[order] + 0.5) * height / h - 0.5).astype(int).clip(0, height - 1)
    columns = np.round((columns[order] + 0.5) * width / w - 0.5).astype(int).clip(0, width - 1)
    out = np.zeros((height, width), np.float32)
    out[rows, columns] = values[order]
    return out


def resize_intrinsics(K: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """K after resizing an image from (height, width) `old` to `new`; pixel centres are integers, so edges are at -0.5."""
    K = K.copy()
    for axis, scale in ((0, new[1] / old[1]), (1, new[0] / old[0])):
        K[axis] *= scale
        K[axis, 2] += 0.5 * scale - 0.5
    return K


def crop_and_flip(sample: dict, crop: tuple[int, int] | None, rng: np.random.Generator) -> dict:
    """The same random crop (height, width) and horizontal flip for everything in a sample: images, K, stereo pose, depth, label.

    Works on the last two axes of every map. A flip mirrors the world: cx -> W - 1 - cx, and the other camera changes side.
    """
    maps = [key for key in ("frames", "image", "depth", "label") if key in sample]
    height, width = sample[maps[0]].shape[-2:]
    flip, top, left = rng.random() < 0.5, 0, 0
    if crop is not None:
        top, left = int(rng.integers(height - crop[0] + 1)), int(rng.integers(width - crop[1] + 1))
        height, width = crop
    for key in maps:
        cropped = sample[key][..., top:top + height, left:left + width]
        sample[key] = cropped.flip(-1) if flip else cropped
    if "K" in sample:
        sample["K"][0, 2] -= left
        sample["K"][1, 2] -= top
        if flip:
            sample["K"][0, 2] = width - 1 - sample["K"][0, 2]
    if flip and "stereo_T" in sample:
        sample["stereo_T"][0, 3] *= -1
    return sample


# ---------------------------------------------------------------------------------------------- batches on the device

def to_device(batch: dict, device: torch.device) -> dict:
    """Move a batch, then turn image bytes into floats in [0, 1]."""
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    return {key: value.float() / 255 if value.dtype == torch.uint8 else value for key, value in batch.items()}


def shift_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Rotate hue by `shift` turns in HSV space, without leaving RGB. images (..., 3, H, W); shift broadcasts with (..., H, W)."""
    red, green, blue = images.unbind(-3)
    value = images.amax(-3)
    chroma = value - images.amin(-3)
    safe = chroma.clamp(min=1e-8)
    hue = torch.where(value == red, (green - blue) / safe, torch.where(value == green, 2 + (blue - red) / safe,
                                                                       4 + (red - green) / safe))
    hue = hue + 6 * shift  # in sixths of a turn
    channels = [(n + hue) % 6 for n in (5, 3, 1)]
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in channels], -3)


def color_jitter(frames: torch.Tensor, generator: torch.Generator, strength: float = 0.2, hue: float = 0.1,
                 probability: float = 0.5) -> torch.Tensor:
    """Brightness, contrast, saturation (`strength`) and hue of half the samples; one draw a sample, the same for its frames.

    frames: (B, F, 3, H, W) or (B, 3, H, W) in [0, 1]. For the networks only; losses see the unjittered frames.
    """
    B = len(frames)
    draws = torch.rand(B, 5, generator=generator, device=frames.device)
    chosen = (draws[:, 0] < probability).nonzero()[:, 0]
    if len(chosen) == 0:
        return frames
    shape = (-1,) + (1,) * (frames.dim() - 1)
    x, (b, c, s, h) = frames[chosen], (2 * draws[chosen, 1:] - 1).view(-1, 4).unbind(1)
    brightness, contrast, saturation = (1 + strength * d.view(shape) for d in (b, c, s))
    gray_weights = x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    x = (x * brightness).clamp(0, 1)
    mean = (x * gray_weights).sum(-3, keepdim=True).mean((-2, -1), keepdim=True)
    x = (mean + contrast * (x - mean)).clamp(0, 1)
    gray = (x * gray_weights).sum(-3, keepdim=True)
    x = (gray + saturation * (x - gray)).clamp(0, 1)
    x = shift_hue(x, hue * h.view(shape[:-1]))
    out = frames.clone()
    out[chosen] = x
    return out


def remove_patches(images: torch.Tensor, generator: torch.Generator, kind: str = "patches") -> torch.Tensor:
    """Pixels to remove for the reconstruction baseline: (B, 1, H, W) bool.

    "patches": 7x7 squares at random until about 0.1 to 1 % of the pixels are gone (the authors' release);
    "rectangles": one to four rectangles of 10 to 50 % of each side (the paper's "random rectangular regions").
    """
    B, _, H, W = images.shape

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, device=images.device)

    rows = torch.arange(H, device=images.device).view(1, 1, H)
    columns = torch.arange(W, device=images.device).view(1, 1, W)
    if kind == "patches":
        most = max(1, math.ceil(0.01 * H * W / 49))
        counts = ((0.1 + 0.9 * uniform(B, 1)) * 0.01 * H * W / 49).ceil()
        side_y = side_x = torch.full((B, most), 7.0, device=images.device)
    else:
        most = 4
        counts = (uniform(B, 1) * 4).ceil()
        side_y, side_x = (0.1 + 0.4 * uniform(B, most)) * H, (0.1 + 0.4 * uniform(B, most)) * W
    top, left = (uniform(B, most) * (H - side_y)).floor(), (uniform(B, most) * (W - side_x)).floor()
    used = torch.arange(most, device=images.device) < counts  # (B, most)
    in_rows = (rows >= top[..., None]) & (rows < (top + side_y)[..., None]) & used[..., None]  # (B, most, H)
    in_columns = (columns >= left[..., None]) & (columns < (left + side_x)[..., None])  # (B, most, W)
    return torch.einsum("bnh,bnw->bhw", in_rows.float(), in_columns.float())[:, None] > 0


class StepBatches(Sampler):
    """Batches of (index, draw) for steps `start` to `stop`: shuffled epochs end to end, every one a function of seed and step.

    With no state of its own, training that continues at step k sees what it would have seen; the number of workers is irrelevant.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int, stop: int):
        if size < batch_size:
            raise InputError(f"--batch_size {batch_size} is larger than the data ({size} samples)")
        self.size, self.batch_size, self.seed, self.start, self.stop = size, batch_size, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self):
        epoch, order = -1, None
        for step in range(self.start, self.stop):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
                batch.append((int(order[position % self.size]), (self.seed, position)))
            yield batch


def train_loader(dataset: Dataset, args: argparse.Namespace, start: int) -> DataLoader:
    """Batches for steps `start` to args.steps."""
    batches = StepBatches(len(dataset), args.batch_size, args.seed, start, args.steps)
    return DataLoader(dataset, batch_sampler=batches, num_workers=args.num_workers,
                      pin_memory=args.device.startswith("cuda"))


# ---------------------------------------------------------------------------------------------- clips for pre-training

class Clips(Dataset):
    """Targets with their source frames. Subclasses fill `samples` and may override `depth_map`.

    Each of `samples` is a dict: "images" (paths, target first), "K" (3x3 at native size, with "K_from" naming its file),
    "baseline" (metres to the stereo source, with sign; None without), "depth" (whatever `depth_map` understands; None without).
    """

    name = "clips"
    dropped = ""  # what was left out at the start and why, for the log

    def __init__(self, samples: list[dict], height: int, width: int, augment: bool = False, crop: tuple[int,
                                                                                                        int] | None = None,
                 with_depth: bool = False, cache: bool = False, min_motion: float = 0):
        moving = [s for s in samples if motion(s["images"]) >= min_motion] if min_motion > 0 else samples
        if len(moving) < len(samples):
            self.dropped += ", " * bool(self.dropped) + f"{len(samples) - len(moving)} near-static"
        samples = moving
        if not samples:
            raise InputError(f"no usable sample in {self.name}: {self.dropped or 'no frames found'}")
        if crop and (crop[0] > height or crop[1] > width):
            raise InputError(f"--crop {crop[0]} {crop[1]} is larger than the image ({height} x {width})")
        self.samples, self.size, self.augment, self.crop, self.with_depth = samples, (height,
                                                                                      width), augment, crop, with_depth
        self.cached = {} if cache else None

    def __len__(self) -> int:
        return len(self.samples)

    def depth_map(self, depth: object) -> np.ndarray:
        """Native-size depth (h, w) in metres, 0 = no measurement, of a sample's "depth" entry."""
        raise NotImplementedError

    def load(self, path: str) -> tuple[torch.Tensor, tuple[int, int]]:
        """Resized image (3, H, W) uint8 and its native (height, width)."""
        if self.cached is not None and path in self.cached:
            return self.cached[path]
        image = read_image(path)
        entry = resize(image, list(self.size), antialias=True), tuple(image.shape[1:])
        if self.cached is not None:
            self.cached[path] = entry
        return entry

    def load_depth(self, depth: object) -> torch.Tensor:
        key = ("depth", str(depth))
        if self.cached is not None and key in self.cached:
            return self.cached[key]
        resized = torch.from_numpy(resize_depth(self.depth_map(depth), *self.size))[None]
        if self.cached is not None:
            self.cached[key] = resized
        return resized

    def __getitem__(self, item: int | tuple[int, tuple[int, int]]) -> dict:
        index, draw = item if isinstance(item, tuple) else (item, (0, 0))
        record = self.samples[index]
        images, sizes = zip(*[self.load(path) for path in record["images"]])
        if len(set(sizes)) > 1:
            raise InputError(f"{record['images'][0]}: its neighbouring frames have other sizes ({sorted(set(sizes))})")
        check_intrinsics(record["K"], sizes[0][1], sizes[0][0], record["K_from"])
        K = resize_intrinsics(record["K"], sizes[0], self.size)
        sample = {"frames": torch.stack(images), "K": torch.from_numpy(K).float(), "index": index}
        if record["baseline"] is not None:
            sample["stereo_T"] = torch.eye(4)
            sample["stereo_T"][0, 3] = record["baseline"]
        if self.with_depth:
            sample["depth"] = self.load_depth(record["depth"])
        return crop_and_flip(sample, self.crop, np.random.default_rng(draw)) if self.augment else sample


def motion(paths: list[str]) -> float:
    """Least mean absolute difference (0 to 255) between the first image and the others, on 64x48 thumbnails."""
    target, *sources = (resize(read_image(path), [48, 64], antialias=True).float() for path in paths)
    return min((float((source - target).abs().mean()) for source in sources), default=math.inf)


def neighbours(index: int, frames: list[int], frame_ids: list[int]) -> list[int] | None:
    """Positions of the frames `frame_ids` away from position `index`, or None where one is missing."""
    known = {number: position for position, number in enumerate(frames)}
    wanted = [frames[index] + offset for offset in frame_ids]
    return [known[number] for number in wanted] if all(number in known for number in wanted) else None


def velodyne_depth(points: np.ndarray, velodyne_to_camera: np.ndarray, P: np.ndarray, shape: tuple[int, int],
                   forward_distance: bool = False) -> np.ndarray:
    """LiDAR points projected into a camera: (h, w) metres, 0 = no measurement; the nearest point of a pixel counts.

    points: (N, 4) x forward, y left, z up, reflectance; velodyne_to_camera: (4, 4) into rectified camera coordinates; P: (3, 4).
    forward_distance: the point's velodyne x instead of camera z, which is what the published Eigen numbers use.
    """
    points = points[points[:, 0] >= 0].astype(np.float64)
    homogeneous = np.c_[points[:, :3], np.ones(len(points))]
    u, v, z = P @ velodyne_to_camera @ homogeneous.T
    # the published ground truth counts pixels from 1: rounded (half to even), minus 1
    x, y = np.round(u / z) - 1, np.round(v / z) - 1
    inside = (x >= 0) & (y >= 0) & (x < shape[1]) & (y < shape[0])
    x, y, value = x[inside].astype(int), y[inside].astype(int), (points[:, 0] if forward_distance else z)[inside]
    depth = np.zeros(shape)
    order = np.argsort(-value, kind="stable")  # far first, so that the nearest is written last
    depth[y[order], x[order]] = value[order]
    return depth.clip(min=0)


class KittiRaw(Clips):
    """KITTI raw: `<date>/<drive>/image_0{2,3}/data/*.{png,jpg}`, calibration a date, LiDAR as velodyne .bin or depth PNG."""

    name = "kitti"

    def __init__(self, root: str, frame_ids: list[str], split: str | None = "train", drives: list[str] | None = None,
                 frames: tuple[int | None, int | None] = (None,
                                                          None), cameras: str = "lr", with_depth: bool = False,
                                                          **options):
        self.root, self.name, self.calibrations, self.listings = root, f"kitti at {root}", {}, {}
        offsets = [int(f) for f in frame_ids if f != "s"]
        samples, lonely, blind = [], 0, 0
        for folder, number, side in self._targets(split, drives, frames, cameras):
            found = self._listing(folder, side)
            paths = [found.get(number + offset) for offset in offsets]
            if "s" in frame_ids:
                paths.append(self._listing(folder, "lr"["rl".index(side)]).get(number))
            depth = self._depth_source(folder, number, side) if with_depth else None
            if None in paths:
                lonely += 1
            elif with_depth and depth is None:
                blind += 1
            else:
                K, baseline = self._camera(folder, side)
                samples.append({"images": paths, "K": K, "K_from": os.path.join(root, folder[:10],
                                                                                "calib_cam_to_cam.txt"),
                                "baseline": baseline if "s" in frame_ids else None, "depth": depth})
        self.dropped = ", ".join(f"{count} without {what}" for count, what in
                                 ((lonely, "all their source frames"), (blind, "LiDAR")) if count)
        super().__init__(samples, with_depth=with_depth, **options)

    def _targets(self, split, drives, frames, cameras) -> list[tuple[str, int, str]]:
        """(date/drive, frame number, side): from the split where its drives are here, else every drive that is."""
        dates = [d for d in list_folder(self.root) if re.fullmatch(r"\d{4}_\d\d_\d\d", d)]
        present = [f"{date}/{drive}" for date in dates for drive in list_folder(os.path.join(self.root, date))
                   if os.path.isdir(os.path.join(self.root, date, drive, "image_02"))]
        if not present:
            raise InputError(f"{self.root}: no KITTI drive there; expected e.g. 2011_09_26/2011_09_26_drive_0001_sync/image_02/data")
        if drives:
            missing = [d for d in drives if not any(d in p for p in present)]
            if missing:
                raise InputError(f"--drives {missing[0]}: no such drive in {self.root} (there: {', '.join(present[:4])}, ...)")
            present = [p for p in present if any(d in p for d in drives)]
        elif split and frames == (None, None):
            with open(os.path.join(SPLITS, f"eigen_{'test' if split == 'test' else f'zhou_{split}'}.txt")) as file:
                rows = [line.split() for line in file]
            rows = [(folder, int(number), side) for folder, number, side in rows if folder in set(present)]
            if rows:
                return rows
        targets = []
        for folder in present:
            start, stop, _ = slice(*frames).indices(max(self._listing(folder, "l"), default=-1) + 1)
            targets += [(folder, n, side) for side in cameras for n in sorted(self._listing(folder, side))
                        if start <= n < stop]
        return targets

    def _listing(self, folder: str, side: str) -> dict[int, str]:
        """Frame number -> path of one camera of one drive."""
        key = (folder, side)
        if key not in self.listings:
            path = os.path.join(self.root, folder, "image_02" if side == "l" else "image_03", "data")
            names = [n for n in list_folder(path) if n.lower().endswith(IMAGE_EXTENSIONS)]
            self.listings[key] = {int(os.path.splitext(n)[0]): os.path.join(path, n) for n in names}
        return self.listings[key]

    def calibration(self, date: str) -> dict:
        """P_rect of cameras 2 and 3 (3x4), and the velodyne's pose in the rectified camera frame (4x4), of one date."""
        if date not in self.calibrations:
            file = os.path.join(self.root, date, "calib_cam_to_cam.txt")
            values = read_calibration(file)
            try:
                P = {"l": values["P_rect_02"].reshape(3, 4), "r": values["P_rect_03"].reshape(3, 4)}
                shape = tuple(int(s) for s in values["S_rect_02"][::-1])
                rectify = np.eye(4)
                rectify[:3, :3] = values["R_rect_00"].reshape(3, 3)
            except (KeyError, ValueError) as error:
                raise InputError(f"{file}: P_rect_02, P_rect_03, S_rect_02 and R_rect_00 are expected ({error})") from None
            self.calibrations[date] = {"P": P, "shape": shape, "rectify": rectify}
        return self.calibrations[date]

    def _camera(self, folder: str, side: str) -> tuple[np.ndarray, float]:
        """K (3x3, native pixels) and the x translation in metres that takes this camera's points to the other's."""
        P = self.calibration(folder[:10])["P"]
        offset = {s: P[s][0, 3] / P[s][0, 0] for s in "lr"}
        return P[side][:, :3].copy(), float(offset["lr"["rl".index(side)]] - offset[side])

    def _depth_source(self, folder: str, number: int, side: str) -> tuple | None:
        """LiDAR of a frame: a depth PNG (camera z) where there is one, else the raw points."""
        drive, camera = os.path.join(self.root, folder), "image_02" if side == "l" else "image_03"
        for kind in ("groundtruth", "velodyne_raw"):
            png = os.path.join(drive, "proj_depth", kind, camera, f"{number:010d}.png")
            if os.path.isfile(png):
                return ("png", png)
        points = self.velodyne_file(folder, number)
        return ("velodyne", points, folder, side, False) if points else None

    def velodyne_file(self, folder: str, number: int) -> str | None:
        path = os.path.join(self.root, folder, "velodyne_points", "data", f"{number:010d}.bin")
        return path if os.path.isfile(path) else None

    def depth_map(self, depth: tuple) -> np.ndarray:
        if depth[0] == "png":
            return read_ids(depth[1]).astype(np.float32) / 256
        _, path, folder, side, forward_distance = depth
        calibration = self.calibration(folder[:10])
        if "velodyne" not in calibration:
            file = os.path.join(self.root, folder[:10], "calib_velo_to_cam.txt")
            values = read_calibration(file)
            pose = np.eye(4)
            try:
                pose[:3, :3], pose[:3, 3] = values["R"].reshape(3, 3), values["T"]
            except (KeyError, ValueError):
                raise InputError(f"{file}: R and T are expected") from None
            calibration["velodyne"] = calibration["rectify"] @ pose
        content = read_bytes(path).numpy()
        if content.size % 16:
            raise InputError(f"{path}: {content.size} bytes are no list of x, y, z, reflectance in float32")
        points = content.view(np.float32).reshape(-1, 4)
        return velodyne_depth(points, calibration["velodyne"], calibration["P"][side], calibration["shape"],
                              forward_distance)


def natural_key(name: str) -> list:
    """Numeric order: frame2 before frame10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


class Frames(Clips):
    """One's own images: a folder, or a folder of folders, each with `intrinsics.txt` (3x3 or fx fy cx cy) and optionally `depth/`.

    Numeric order; frames are neighbours when their numbers are one usual step apart. Images may also lie in `frames/` or `images/`.
    Without intrinsics.txt, K follows from `fov`, the horizontal field of view in degrees. depth/NAME.png: 16 bits, metres * depth_scale.
    """

    name = "frames"

    def __init__(self, root: str, frame_ids: list[str], drives: list[str] | None = None, frames: tuple = (None, None),
                 fov: float | None = None, depth_scale: float = 1000.0, with_depth: bool = False, **options):
        self.name, self.depth_scale = f"frames at {root}", depth_scale
        if "s" in frame_ids:
            raise InputError("--supervision stereo needs a stereo data set; own frames are monocular")
        if os.path.isfile(root):
            raise InputError(f"{root} is a file; make frames of a video first: ffmpeg -i {os.path.basename(root)} -qscale:v 2 frames/%06d.jpg")
        offsets = [int(f) for f in frame_ids]
        samples, lonely, blind = [], 0, 0
        for folder, paths in self._sequences(root, drives):
            step, numbers = self._numbers(paths)
            K, K_from = self._intrinsics(root, folder, fov, paths[0])
            start, stop, _ = slice(*frames).indices(len(paths))
            for position in range(start, stop):
                places = neighbours(position, numbers, [step * o for o in offsets])
                depth = os.path.join(folder, "depth", os.path.splitext(os.path.basename(paths[position]))[0] + ".png")
                if places is None:
                    lonely += 1
                elif with_depth and not os.path.isfile(depth):
                    blind += 1
                else:
                    samples.append({"images": [paths[p] for p in places], "K": K, "K_from": K_from, "baseline": None,
                                    "depth": depth if with_depth else None})
        self.dropped = ", ".join(f"{count} without {what}" for count, what in
                                 ((lonely, "all their source frames"), (blind, "a depth image")) if count)
        super().__init__(samples, with_depth=with_depth, **options)

    def _sequences(self, root: str, drives: list[str] | None) -> list[tuple[str, list[str]]]:
        """(folder, image paths in numeric order) of every sequence below root."""
        sequences = []
        for folder in [root] + [os.path.join(root, name) for name in list_folder(root)
                                if os.path.isdir(os.path.join(root, name))]:
            if os.path.basename(folder) == "depth" or (drives and os.path.basename(folder) not in drives):
                continue
            names = sorted([n for n in list_folder(folder) if n.lower().endswith(IMAGE_EXTENSIONS)], key=natural_key)
            if names:
                sequences.append((folder, [os.path.join(folder, n) for n in names]))
        if not sequences:
            raise InputError(f"{root}: no {', '.join(IMAGE_EXTENSIONS)} images there or in its folders" + (f" {drives}"
                                                                                                           if drives else ""))
        return sequences

    @staticmethod
    def _numbers(paths: list[str]) -> tuple[int, list[int]]:
        """The usual step between frame numbers, and the numbers: the last digits of the names, or positions if a name has none."""
        found = [re.findall(r"\d+", os.path.splitext(os.path.basename(p))[0]) for p in paths]
        numbers = [int(f[-1]) for f in found] if all(found) else list(range(len(paths)))
        steps = [b - a for a, b in pairwise(numbers) if b > a]
        return (max(set(steps), key=steps.count) if steps else 1), numbers

    @staticmethod
    def _intrinsics(root: str, folder: str, fov: float | None, first: str) -> tuple[np.ndarray, str]:
        for place in (folder, os.path.dirname(folder) if folder != root else root, root):
            path = os.path.join(place, "intrinsics.txt")
            if os.path.isfile(path):
                return read_intrinsics(path), path
        if fov is None:
            raise InputError(f"{folder}: no intrinsics.txt (3x3 or fx fy cx cy); give the horizontal field of view instead: --fov 60")
        height, width = read_image(first).shape[1:]
        return fov_intrinsics(width, height, fov), f"--fov {fov}"

    def depth_map(self, depth: str) -> np.ndarray:
        return read_ids(depth).astype(np.float32) / self.depth_scale


class CamVidClips(Frames):
    """CamVid's consecutive frames (the `val` folder, 15 Hz) as clips; its intrinsics are not published, so `fov` is needed."""

    def __init__(self, root: str, *args, **options):
        super().__init__(os.path.join(root, "val"), *args, **options)


# ---------------------------------------------------------------------------------------------- labelled images

def lookup_table(ids: dict[int, int]) -> np.ndarray:
    """256 entries: raw id -> train id, 255 where the id is known but not evaluated, -1 where it is unknown."""
    table = np.full(256, -1, np.int16)
    for raw, train in ids.items():
        table[raw] = train
    return table


CITYSCAPES_TABLE = lookup_table({**{raw: IGNORE for raw in (*range(34), 255)}, **{raw: i for i,
                                                                                  raw in enumerate(CITYSCAPES_IDS)}})
CAMVID_TABLE = lookup_table({**{i: i for i in range(11)}, 11: IGNORE})


class Labelled(Dataset):
    """Images with label maps, kept decoded in memory: few-shot sets are small and are seen hundreds of times.

    Subclasses set `classes`, `colours`, `table` and fill `pairs`, a list of (image path, label path).
    """

    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    table: np.ndarray

    def __init__(self, pairs: list[tuple[str, str]], height: int, width: int, augment: bool = False):
        self.pairs, self.size, self.augment, self.cached = pairs, (height, width), augment, {}

    def __len__(self) -> int:
        return len(self.pairs)

    def native_label(self, index: int) -> torch.Tensor:
        """(h, w) int64 train ids at the size of the file."""
        path = self.pairs[index][1]
        raw = read_ids(path)
        known = self.table[raw.clip(0, 255)]
        bad = (known < 0) | (raw > 255)
        if bad.any():
            raise InputError(f"{path}: label id {raw[bad][0]} is not one of this data set's")
        return torch.from_numpy(known.astype(np.int64))

    def load(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index not in self.cached:
            image, label = read_image(self.pairs[index][0]), self.native_label(index)
            if image.shape[1:] != label.shape:
                raise InputError(f"{self.pairs[index][1]}: label is {tuple(label.shape)}, its image {tuple(image.shape[1:])}")
            # nearest-exact takes the pixel at the new pixel's centre; any interpolation would invent ids
            label = F.interpolate(label[None, None].to(torch.uint8), self.size, mode="nearest-exact")[0, 0]
            self.cached[index] = resize(image, list(self.size), antialias=True), label
        return self.cached[index]

    def __getitem__(self, item: int | tuple[int, tuple[int, int]]) -> dict:
        index, draw = item if isinstance(item, tuple) else (item, (0, 0))
        image, label = self.load(index)
        sample = {"image": image, "label": label.long(), "index": index}
        return crop_and_flip(sample, None, np.random.default_rng(draw)) if self.augment else sample


def draw_training_set(pool: list, train_size: int | None, split_seed: int) -> list:
    """`train_size` of the pool's items at random; a larger draw of the same seed contains the smaller one."""
    if train_size is not None and train_size > len(pool):
        raise InputError(f"--train_size {train_size} is larger than the {len(pool)} images there are for training")
    order = np.random.default_rng(split_seed).permutation(len(pool))
    return [pool[i] for i in order[:train_size]]


class KittiSemantics(Labelled):
    """KITTI's labelled images, `training/image_2` and `training/semantic`, 19 Cityscapes classes.

    A fixed 36 % (72 of the 200) are for evaluation, whatever the training set; training images are drawn from the others.
    """

    classes, colours, table = CITYSCAPES_CLASSES, CITYSCAPES_COLOURS, CITYSCAPES_TABLE

    def __init__(self, root: str, split: str, train_size: int | None = None, split_seed: int = 0, **options):
        folder = os.path.join(root, "training") if os.path.isdir(os.path.join(root, "training")) else root
        images, labels = os.path.join(folder, "image_2"), os.path.join(folder, "semantic")
        names = [n for n in list_folder(images) if n.lower().endswith(IMAGE_EXTENSIONS)]
        pairs = [(os.path.join(images, n), os.path.join(labels, os.path.splitext(n)[0] + ".png")) for n in names]
        if len(pairs) < 2:
            raise InputError(f"{images}: at least 2 labelled images are needed, {len(pairs)} found")
        shuffled = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
        pool = max(1, int(0.64 * len(pairs)))
        super().__init__(draw_training_set(shuffled[:pool], train_size, split_seed) if split == "train"
                         else shuffled[pool:], **options)


class CamVid(Labelled):
    """CamVid in SegNet's layout, 11 classes: training images drawn from `train`, evaluation on `val`."""

    classes, colours, table = CAMVID_CLASSES, CAMVID_COLOURS, CAMVID_TABLE

    def __init__(self, root: str, split: str, train_size: int | None = None, split_seed: int = 0, **options):
        folder = os.path.join(root, split)
        pairs = [(os.path.join(folder, n), os.path.join(f"{folder}annot", os.path.splitext(n)[0] + ".png"))
                 for n in list_folder(folder) if n.lower().endswith(IMAGE_EXTENSIONS)]
        if not pairs:
            raise InputError(f"{folder}: no images there")
        super().__init__(draw_training_set(pairs, train_size, split_seed) if split == "train" else pairs, **options)


# ---------------------------------------------------------------------------------------------- by name

CLIPS = {"kitti": KittiRaw, "synthetic": KittiRaw, "camvid": CamVidClips, "frames": Frames}
LABELLED = {"kitti": KittiSemantics, "synthetic": KittiSemantics, "camvid": CamVid}


def find_data(name: str, path: str | None, known: dict) -> tuple[type, str]:
    """Class and root folder of a data set; the synthetic one is rendered where it is missing."""
    if name not in known:
        raise InputError(f"--data {name}: unknown here, choose from {', '.join(known)}")
    path = path or os.path.join("data", name)
    if name == "synthetic" and not os.path.exists(path):
        render_synthetic(path)
    if not os.path.exists(path):
        raise InputError(f"{path}: no such folder; give the root of {name} with --data_path (README, \"Data\", shows its layout)")
    return known[name], path


def parse_range(text: str) -> tuple[int | None, int | None]:
    """"A:B" -> (A, B), either may be missing."""
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no range like 0:100")
    return tuple(int(part) if part else None for part in match.groups())
