"""Data: one class a data set, one joint transform for image, K, depth and label, and the synthetic street world.

    python datasets.py render --data_path data/synthetic          # write the embedded default, in KITTI's own layout
    python datasets.py check --data camvid --labels --output contact.png      # walk a data set before a run
    python datasets.py pack --data kitti --frame_ids 0 -1 1 s --output cache   # decode and resize once, for --cache

Clips (pre-training): {"frames": (F, 3, H, W) uint8, target first, "K": (3, 3), "stereo_T"?: (4, 4), "depth"?: (1, H, W)
metres, 0 = no measurement, "mirrored": bool, "camera"?: its number, "index"}. Labelled images: {"image": (3, H, W)
uint8, "label": (H, W) int64 train ids, 255 = ignore, "mirrored", "index"}.
`to_device` makes floats in [0, 1] of the bytes, after they have crossed to the device.
"""

import argparse
import fcntl
import functools
import io
import json
import math
import mmap
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from utils import SIGNALS, InputError, Parser, Run, ranks, run_main, save_json, share, within, write_atomically

IGNORE = 255
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg")
DEPTH_MODES = ("I;16", "I")
SPLITS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "splits")

CITYSCAPES_CLASSES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
                      "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle",
                      "bicycle")
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # raw id of each train id
CITYSCAPES_COLOURS = ((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
                      (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60),
                      (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32))
CAMVID_CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
                  "bicyclist")
CAMVID_COLOURS = ((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
                  (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192))
NYU13_OF_40 = (12, 5, 6, 1, 4, 9, 10, 12, 13, 6, 8, 6, 13, 10, 6, 13, 6, 7, 7, 5,  # the 13-class id of ids 1 to 40
               7, 3, 2, 6, 11, 7, 7, 7, 7, 7, 7, 6, 7, 7, 7, 7, 7, 7, 6, 7)
NYU_CAMERA = np.array([[518.858, 0, 325.582], [0, 519.470, 253.736], [0, 0, 1]])  # of the 640x480 colour images


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
    """A JPEG or PNG file as RGB, (3, H, W) uint8, turned upright as its EXIF orientation says.

    Gray, palette, CMYK and 16-bit images are converted; transparent ones and those beyond Pillow's limit are refused.
    """
    content = read_bytes(path)
    raw = content.numpy().tobytes()
    if not raw.startswith((b"\xff\xd8", b"\x89PNG\r\n\x1a\n")):
        raise InputError(f"{path}: neither a JPEG nor a PNG file")
    if raw.startswith(b"\xff\xd8") and raw.rfind(b"\xff\xd9") <= raw.rfind(b"\xff\xda"):  # no end after the last scan
        raise InputError(f"{path}: the image file is truncated or damaged")
    try:
        with Image.open(io.BytesIO(raw)) as header:  # refuses a size beyond Pillow's limit before anything is decoded
            alpha = header.has_transparency_data
            header.verify()  # a PNG's checksums: torchvision's decoder crashes on a damaged file
        mode = ImageReadMode.RGB_ALPHA if alpha else ImageReadMode.RGB
        image = decode_image(content, mode=mode, apply_exif_orientation=True)
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: the image cannot be decoded ({str(error).splitlines()[0][:100]})") from None
    if image.dtype == torch.uint16:
        image = (image.int() >> 8).to(torch.uint8)
    if alpha and image[3].min() < 255:
        raise InputError(f"{path}: the image is transparent in places; give it a background first")
    return image[:3]


def read_ids(path: str, modes: tuple[str, ...] = ("L", "P")) -> np.ndarray:
    """A PNG of one channel as it is stored, (H, W): label ids (Pillow's modes L, P) or 16-bit depth (I;16, I)."""
    content = io.BytesIO(read_bytes(path).numpy())
    try:
        Image.open(content, formats=["PNG"]).verify()  # its checksums, which reading does not compare
        with Image.open(content) as image:
            if image.mode not in modes:
                raise InputError(f"{path}: a PNG of mode {' or '.join(modes)} is expected, this one is {image.mode}")
            return np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: no PNG file, or a damaged one ({error})") from None


def read_text(path: str) -> str:
    """A text file's content; raises InputError with the path where there is none."""
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', 'no text file')}") from None


def list_folder(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def image_names(folder: str) -> list[str]:
    """Names of the image files in a folder, without hidden ones and NYU's depth."""
    return [name for name in list_folder(folder)
            if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith((".", "sync_depth_"))]


def read_calibration(path: str) -> dict[str, np.ndarray]:
    """KITTI's calibration text, `key: numbers`."""
    values = {}
    for line in read_text(path).splitlines():
        key, _, numbers = line.partition(":")
        with suppress(ValueError):  # calib_time
            values[key] = np.array([float(x) for x in numbers.split()])
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
        raise InputError(f"{path}: intrinsics must be in pixels of the {width}x{height} images and the principal point "
                         f"inside, not fx {K[0, 0]:.4g} fy {K[1, 1]:.4g} cx {K[0, 2]:.4g} cy {K[1, 2]:.4g}")


def fov_intrinsics(width: int, height: int, fov: float) -> np.ndarray:
    """K of a camera with square pixels, a horizontal field of view in degrees and the principal point in the middle."""
    focal = width / 2 / math.tan(math.radians(fov) / 2)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])


# ---------------------------------------------------------------------------------------------- the joint transform

def resize_depth(depth: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sparse depth (h, w) at another size: every measurement moves to the nearest pixel, the nearest surface wins."""
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
    """K of an image resized from (height, width) `old` to `new`; pixel centres are integers, so edges lie at -0.5."""
    K = K.copy()
    for axis, scale in ((0, new[1] / old[1]), (1, new[0] / old[0])):
        K[axis] *= scale
        K[axis, 2] += 0.5 * scale - 0.5
    return K


def check_crop(crop: tuple[int, int] | None, height: int, width: int) -> None:
    if crop and (crop[0] > height or crop[1] > width):
        raise InputError(f"--crop {crop[0]} {crop[1]} is larger than the image ({height} x {width})")


def crop_and_flip(sample: dict, crop: tuple[int, int] | None, rng: np.random.Generator) -> dict:
    """The same random crop (height, width) and horizontal flip for images, K, stereo pose, depth and label of a sample.

    Works on the last two axes of every map. A flip mirrors the world: cx -> W - 1 - cx, the other camera changes side.
    Adds "mirrored": whether it did.
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
    return {**sample, "mirrored": flip}


# ---------------------------------------------------------------------------------------------- batches on the device

def to_device(batch: dict, device: torch.device) -> dict:
    """Move a batch, then turn image bytes into floats in [0, 1]. `index` and `mirrored` stay where they are read."""
    batch = {key: value if key in ("index", "mirrored") else value.to(device, non_blocking=True)
             for key, value in batch.items()}
    return {key: value.float() / 255 if value.dtype == torch.uint8 else value for key, value in batch.items()}


def shift_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Rotate hue by `shift` turns in HSV space: images (..., 3, H, W) in [0, 1], shift broadcasts with (..., H, W)."""
    red, green, blue = images.unbind(-3)
    value = images.amax(-3)
    chroma = value - images.amin(-3)
    safe = chroma.clamp(min=1e-8)
    hue = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = torch.where(value == red, (green - blue) / safe, hue)
    hue = hue + 6 * shift  # in sixths of a turn
    channels = [(n + hue) % 6 for n in (5, 3, 1)]
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in channels], -3)


def color_jitter(frames: torch.Tensor, generator: torch.Generator, strength: float = 0.2, hue: float = 0.1,
                 probability: float = 0.5) -> torch.Tensor:
    """Brightness, contrast, saturation (`strength`) and hue of half the samples; one draw for all frames of a sample.

    frames: (B, F, 3, H, W) or (B, 3, H, W) in [0, 1]. For the networks only; losses see the unjittered frames.
    """
    # on the CPU, as selecting by a mask would wait for a GPU; for the batch of all processes, whatever their number
    draws = share(torch.rand(len(frames) * ranks(), 5, generator=generator))
    chosen = (draws[:, 0] < probability).nonzero()[:, 0]
    if len(chosen) == 0:
        return frames
    shape = (-1,) + (1,) * (frames.dim() - 1)
    draws = (2 * draws[chosen, 1:] - 1).to(frames.device, non_blocking=True)
    chosen = chosen.to(frames.device, non_blocking=True)
    x, (b, c, s, h) = frames[chosen], draws.unbind(1)
    brightness, contrast, saturation = (1 + strength * d.view(shape) for d in (b, c, s))

    def luma(x: torch.Tensor) -> torch.Tensor:
        red, green, blue = x.split(1, -3)
        return 0.299 * red + 0.587 * green + 0.114 * blue

    x = (x * brightness).clamp(0, 1)
    x = torch.lerp(luma(x).mean((-2, -1), keepdim=True), x, contrast).clamp(0, 1)
    x = torch.lerp(luma(x), x, saturation).clamp(0, 1)
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

    def uniform(batch: int, size: int) -> torch.Tensor:
        return share(torch.rand(batch * ranks(), size, generator=generator)).to(images.device, non_blocking=True)

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
    """Batches of (index, draw) for steps `start` to `stop`: shuffled epochs, every one a function of seed and step.

    With no state of its own, a continued training sees what it would have seen, with any number of workers. Of several
    processes each has its share of every batch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int, stop: int):
        if size < batch_size:
            raise InputError(f"--batch_size {batch_size} is larger than the data ({size} samples)")
        self.size, self.batch_size, self.seed, self.start, self.stop = size, batch_size, seed, start, stop

    def __iter__(self):
        epoch, order = -1, None
        for step in range(self.start, self.stop):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = np.random.default_rng([self.seed, epoch, 1]).permutation(self.size)  # 1: not an item's draw
                batch.append((int(order[position % self.size]), (self.seed, position)))
            yield share(batch)


class Forgiving(Dataset):
    """Takes another sample for one that cannot be read: a function of seed and position alone, whoever loads it.

    "skipped" of a sample says what was wrong with those it stands for, a line each.
    """

    def __init__(self, dataset: Dataset, most: int = 10):
        self.dataset, self.most = dataset, most

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, tuple[int, int]]) -> dict:
        (index, draw), problems = item, []
        rng = np.random.default_rng([*draw, 2])  # 2: neither an item's draw nor an epoch's
        while len(problems) < self.most:
            try:
                return {**self.dataset[index, draw], "skipped": "\n".join(problems)}
            except InputError as error:
                problems.append(str(error))
                index = int(rng.integers(len(self.dataset)))
        raise InputError(f"{problems[-1]} (and {self.most - 1} more in a row: --on_bad_sample skip is for a few)")


def log_skipped(run: Run, step: int, batch: dict) -> None:
    """A log record for every sample that this batch had to replace."""
    for problem in "\n".join(batch.pop("skipped", ())).split("\n"):
        if problem:
            run.log({"step": step, "skipped": problem})


def skipped_samples(run: Run) -> dict:
    """For result.json: how often samples were replaced, and the problems, over the whole run however often resumed."""
    with open(run.path("log.jsonl")) as file:
        problems = [record["skipped"] for record in map(json.loads, file) if "skipped" in record]
    return {"skipped": {"samples": len(problems), "problems": sorted(set(problems))}} if problems else {}


def add_loader_options(parser: argparse.ArgumentParser) -> None:
    """Options of both training scripts about what is loaded and how."""
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", help="root folder of the data set (default: data/<name of the data set>)")
    group.add_argument("--height", type=within(int, 64, 8192), default=192,
                       help="pixels, a multiple of 32, or of a ViT's patch (paper: 192)")
    group.add_argument("--width", type=within(int, 64, 8192), default=640, help="pixels, likewise (paper: 640)")
    group.add_argument("--num_workers", type=within(int, 0, 256), default=2, help="loader processes; 0 for none")
    group.add_argument("--on_bad_sample", choices=("stop", "skip"), default="stop",
                       help="at an image that cannot be read: stop, or take another sample and list it in result.json")


def ignore_signals(worker: int) -> None:
    """Loader processes outlive the signals that a scheduler or Ctrl-C sends to the whole group: the run ends them."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def train_loader(dataset: Dataset, args: argparse.Namespace, start: int) -> DataLoader:
    """Batches for steps `start` to args.steps."""
    if args.on_bad_sample == "skip":
        dataset = Forgiving(dataset)
    batches = StepBatches(len(dataset), args.batch_size, args.seed, start, args.steps)
    return DataLoader(dataset, batch_sampler=batches, num_workers=args.num_workers, worker_init_fn=ignore_signals,
                      pin_memory=args.device.startswith("cuda"))


# ---------------------------------------------------------------------------------------------- clips for pre-training

class Clips(Dataset):
    """Targets with their source frames. Subclasses fill `samples`; those with depth have `depth_map`, which reads one
    sample's "depth" entry at its native size: (h, w) in metres, 0 = no measurement.

    Each of `samples` is a dict: "images" (paths, target first), "K" (3x3 at native size), "K_from" (its file, for
    messages), "baseline" (metres to the stereo source, with sign; None without), "depth" (whatever `depth_map`
    understands; None without).
    """

    dropped = ""  # what was left out at the start and why, for the log
    camera_of = None  # number of each sample's camera, see `find_cameras`

    def __init__(self, samples: list[dict], height: int, width: int, augment: bool = False,
                 crop: tuple[int, int] | None = None, with_depth: bool = False, min_motion: float = 0):
        moving = [s for s in samples if motion(s["images"]) >= min_motion] if min_motion > 0 else samples
        if len(moving) < len(samples):
            self.dropped += ", " * bool(self.dropped) + f"{len(samples) - len(moving)} near-static"
        samples = moving
        if not samples:
            raise InputError(f"no usable sample in {self.name}: {self.dropped or 'no frames found'}")
        check_crop(crop, height, width)
        self.samples, self.size, self.augment, self.crop = samples, (height, width), augment, crop
        self.with_depth = with_depth

    def __len__(self) -> int:
        return len(self.samples)

    def complete(self, samples: list[dict], with_depth: bool, depth: str) -> list[dict]:
        """Those samples whose images, and whose depth (named for the log) if it is needed, are all there, not None."""
        whole = [sample for sample in samples if None not in sample["images"]]
        kept = [sample for sample in whole if not with_depth or sample["depth"] is not None]
        missing = ((len(samples) - len(whole), "all their source frames"), (len(whole) - len(kept), depth))
        self.dropped = ", ".join(f"{count} without {what}" for count, what in missing if count)
        return kept

    def depth_files(self, depth: object) -> list[str]:
        """The files that `depth_map` reads."""
        return [depth[0] if isinstance(depth, tuple) else depth]

    def targets(self) -> list[str]:
        """The target's file of every sample."""
        return [sample["images"][0] for sample in self.samples]

    def load(self, path: str) -> tuple[torch.Tensor, tuple[int, int]]:
        """Resized image (3, H, W) uint8 and its native (height, width)."""
        image = read_image(path)
        return resize(image, list(self.size), antialias=True), tuple(image.shape[1:])

    def load_depth(self, depth: object) -> torch.Tensor:
        """Resized depth (1, H, W) in metres."""
        measured = self.depth_map(depth)
        if not (measured > 0).any():
            raise InputError(f"{depth}: no pixel is measured")
        return torch.from_numpy(resize_depth(measured, *self.size))[None]

    def resized_intrinsics(self, record: dict, sizes: list[tuple[int, int]]) -> np.ndarray:
        """K (3, 3) of a sample at this data set's size, from the native sizes of its images."""
        check_geometry(record, sizes)
        return resize_intrinsics(record["K"], sizes[0], self.size)

    def read(self, index: int) -> dict:
        """A sample, before augmentation."""
        record = self.samples[index]
        images, sizes = zip(*[self.load(path) for path in record["images"]])
        K = torch.from_numpy(self.resized_intrinsics(record, sizes)).float()
        sample = {"frames": torch.stack(images), "K": K, "index": index}
        if record["baseline"] is not None:
            sample["stereo_T"] = translation_x(record["baseline"])
        if self.with_depth:
            sample["depth"] = self.load_depth(record["depth"])
        return sample

    def __getitem__(self, item: int | tuple[int, tuple[int, int]]) -> dict:
        index, draw = item if isinstance(item, tuple) else (item, (0, 0))
        sample = self.read(index)
        if self.camera_of is not None:
            sample["camera"] = self.camera_of[index]
        return crop_and_flip(sample, self.crop, np.random.default_rng(draw)) if self.augment else sample

    def inspect(self, index: int) -> dict:
        """For `check`: "problems" (a line each), and of what is sound "size", "K", "motion" and a part of "depth"."""
        record, row = self.samples[index], {"index": index, "problems": []}

        def attempt(read: Callable, *arguments):
            try:
                return read(*arguments)
            except InputError as error:
                row["problems"].append(str(error))

        thumbnails = [attempt(thumbnail, path) for path in record["images"]]
        measured = attempt(self.depth_map, record["depth"]) if self.with_depth else None
        if measured is not None:
            row |= {"depth": measured[measured > 0][::97], "share": float((measured > 0).mean())}
        if all(thumbnails):
            attempt(check_geometry, record, [size for _, size in thumbnails])
            row |= {"size": thumbnails[0][1], "K": tuple(record["K"].flat), "motion": motion(record["images"])}
        return row


def find_cameras(dataset: Clips,
                 fov: float | None) -> tuple[list[str], list[tuple[int, int]], torch.Tensor, torch.Tensor]:
    """The cameras behind a data set, one for each folder of images, for intrinsics to be learned.

    Returns the folders, their images' native (height, width), the intrinsics (cameras, 3, 3) that come with them, and
    those to start from, which follow from the horizontal field of view where `fov` says it: both for whole images at
    the data set's size. From now on every sample has the number of its "camera".
    """
    targets = dataset.targets()
    folders, first, dataset.camera_of = np.unique([os.path.dirname(path) for path in targets],
                                                  return_index=True, return_inverse=True)
    shapes = []
    for index in first:
        with Image.open(targets[index]) as image:
            shapes.append(image.size[::-1])
    given = torch.stack([dataset.read(index)["K"] for index in first])
    start = given if fov is None else torch.stack([torch.from_numpy(
        resize_intrinsics(fov_intrinsics(shape[1], shape[0], fov), shape, dataset.size)).float() for shape in shapes])
    return folders.tolist(), shapes, given, start


def translation_x(x: float) -> torch.Tensor:
    """The pose (4, 4) of a camera beside another."""
    T = torch.eye(4)
    T[0, 3] = x
    return T


def check_geometry(record: dict, sizes: list[tuple[int, int]]) -> None:
    """Refuse frames of different sizes (height, width), and a camera that is not theirs."""
    if len(set(sizes)) > 1:
        raise InputError(f"{record['images'][0]}: its neighbouring frames have other sizes ({sorted(set(sizes))})")
    check_intrinsics(record["K"], sizes[0][1], sizes[0][0], record["K_from"])


@lru_cache(maxsize=64)
def thumbnail(path: str) -> tuple[torch.Tensor, tuple[int, int]]:
    """An image of 64x48 pixels, (3, 48, 64) in 0 to 255, and its own (height, width)."""
    image = read_image(path)
    return resize(image, [48, 64], antialias=True).float(), tuple(image.shape[1:])


def motion(paths: list[str]) -> float:
    """Least mean absolute difference (0 to 255) between the first image and the others, on thumbnails."""
    target, *sources = (thumbnail(path)[0] for path in paths)
    return min((float((source - target).abs().mean()) for source in sources), default=math.inf)


def velodyne_depth(points: np.ndarray, velodyne_to_camera: np.ndarray, P: np.ndarray, shape: tuple[int, int],
                   forward_distance: bool = False, offset: int = 0) -> np.ndarray:
    """LiDAR points projected into a camera: (h, w) metres, 0 = no measurement; the nearest point of a pixel counts.

    points: (N, 4) x forward, y left, z up, reflectance; velodyne_to_camera: (4, 4), into rectified axes; P: (3, 4).
    forward_distance: the point's velodyne x instead of camera z. offset: subtracted from rounded pixel positions.
    The published Eigen ground truth has forward distances and an offset of 1; KITTI's own depth PNGs have neither.
    """
    points = points[np.isfinite(points).all(1) & (points[:, 0] >= 0)].astype(np.float64)
    homogeneous = np.c_[points[:, :3], np.ones(len(points))]
    u, v, z = P @ velodyne_to_camera @ homogeneous.T
    x, y = np.round(u / z) - offset, np.round(v / z) - offset  # half to even
    inside = (x >= 0) & (y >= 0) & (x < shape[1]) & (y < shape[0])
    x, y, value = x[inside].astype(int), y[inside].astype(int), (points[:, 0] if forward_distance else z)[inside]
    depth = np.zeros(shape)
    order = np.argsort(-value, kind="stable")  # far first, so that the nearest is written last
    depth[y[order], x[order]] = value[order]
    return depth.clip(min=0)


CAMERAS, OTHER = {"l": "image_02", "r": "image_03"}, {"l": "r", "r": "l"}


class KittiRaw(Clips):
    """KITTI raw: `<date>/<drive>/image_0{2,3}/data/*.{png,jpg}`, calibration per date, LiDAR as .bin or depth PNG."""

    def __init__(self, root: str, frame_ids: list[str], split: str | None = "train", drives: list[str] | None = None,
                 frames: tuple[int | None, int | None] = (None, None), cameras: str = "lr", with_depth: bool = False,
                 **options):
        self.root, self.name = root, f"kitti at {root}"
        self.calibrations, self.cameras, self.listings = {}, {}, {}
        offsets = [int(f) for f in frame_ids if f != "s"]
        samples = []
        for folder, number, side in self._targets(split, drives, frames, cameras):
            found = self._listing(folder, side)
            paths = [found.get(number + offset) for offset in offsets]
            if paths[0] is None:
                raise InputError(f"{self.root}/{folder}/{CAMERAS[side]}/data: no frame {number:010d}, as the split has")
            if "s" in frame_ids:
                paths.append(self._listing(folder, OTHER[side]).get(number))
            depth = self._depth_source(folder, number, side) if with_depth else None
            K, baseline, file = self.camera(folder[:10], side)
            samples.append({"images": paths, "K": K, "depth": depth, "K_from": file, "place": (folder, number, side),
                            "baseline": baseline if "s" in frame_ids else None})
        super().__init__(self.complete(samples, with_depth, "LiDAR"), with_depth=with_depth, **options)

    def _targets(self, split, drives, frames, cameras) -> list[tuple[str, int, str]]:
        """(date/drive, frame number, side): from the split where its drives are here, else every drive that is.

        Appends to `name` which of them it is.
        """
        dates = [d for d in list_folder(self.root) if re.fullmatch(r"\d{4}_\d\d_\d\d", d)]
        present = [f"{date}/{drive}" for date in dates for drive in list_folder(os.path.join(self.root, date))
                   if os.path.isdir(os.path.join(self.root, date, drive, "image_02"))]
        if not present:
            raise InputError(f"{self.root}: no KITTI drive there; expected e.g. "
                             "2011_09_26/2011_09_26_drive_0001_sync/image_02/data")
        if drives:
            missing = [d for d in drives if not any(d in p for p in present)]
            if missing:
                raise InputError(f"--drives {missing[0]}: no such drive in {self.root} "
                                 f"(there: {', '.join(present[:4])}, ...)")
            present = [p for p in present if any(d in p for d in drives)]
        elif split and frames == (None, None):
            with open(os.path.join(SPLITS, f"eigen_{'test' if split == 'test' else f'zhou_{split}'}.txt")) as file:
                rows = [line.split() for line in file]
            here = [(folder, int(number), side) for folder, number, side in rows if folder in set(present)]
            if here:
                self.name += f" (Eigen {split} split, {len(here)} of {len(rows)})"
                return here
            self.name += f" (no drive of the Eigen {split} split there: every drive)"
        targets = []
        for folder in present:
            start, stop, _ = slice(*frames).indices(max(self._listing(folder, "l"), default=-1) + 1)
            present_cameras = [s for s in cameras if os.path.isdir(os.path.join(self.root, folder, CAMERAS[s]))]
            targets += [(folder, n, side) for side in present_cameras for n in sorted(self._listing(folder, side))
                        if start <= n < stop]
        return targets

    def _listing(self, folder: str, side: str) -> dict[int, str]:
        """Frame number -> path of one camera of one drive."""
        key = (folder, side)
        if key not in self.listings:
            path = os.path.join(self.root, folder, CAMERAS[side], "data")
            names = [n for n in list_folder(path) if re.fullmatch(r"[0-9]+\.(png|jpg|jpeg)", n.lower())]
            self.listings[key] = {int(os.path.splitext(n)[0]): os.path.join(path, n) for n in names}
        return self.listings[key]

    def calibration(self, date: str) -> dict:
        """Of one date: P_rect of both cameras (3x4) by side, the images' (height, width), R_rect_00 (4x4)."""
        if date not in self.calibrations:
            file = os.path.join(self.root, date, "calib_cam_to_cam.txt")
            values = read_calibration(file)
            try:
                P = {"l": values["P_rect_02"].reshape(3, 4), "r": values["P_rect_03"].reshape(3, 4)}
                shape = tuple(int(s) for s in values["S_rect_02"][::-1])
                rectify = np.eye(4)
                rectify[:3, :3] = values["R_rect_00"].reshape(3, 3)
            except (KeyError, ValueError) as error:
                raise InputError(f"{file}: expected P_rect_02, P_rect_03, S_rect_02, R_rect_00 ({error})") from None
            finite = np.isfinite([*P["l"].flat, *P["r"].flat, *rectify.flat]).all()
            if not finite or min(P["l"][0, 0], P["r"][0, 0]) <= 1 or len(shape) != 2 or min(shape) < 1:
                raise InputError(f"{file}: no calibration of two cameras")
            self.calibrations[date] = {"P": P, "shape": shape, "rectify": rectify}
        return self.calibrations[date]

    def camera(self, date: str, side: str) -> tuple[np.ndarray, float, str]:
        """K (3x3, native pixels), the metres along x that take this camera's points to the other's, and their file."""
        if (date, side) not in self.cameras:
            P = self.calibration(date)["P"]
            offset = {s: P[s][0, 3] / P[s][0, 0] for s in "lr"}
            file = os.path.join(self.root, date, "calib_cam_to_cam.txt")
            self.cameras[date, side] = P[side][:, :3], float(offset[OTHER[side]] - offset[side]), file
        return self.cameras[date, side]

    def _depth_source(self, folder: str, number: int, side: str) -> tuple | None:
        """LiDAR of a frame for `depth_map`: a depth PNG where there is one, else the raw points, as camera z."""
        drive, camera = os.path.join(self.root, folder), CAMERAS[side]
        for kind in ("groundtruth", "velodyne_raw"):
            png = os.path.join(drive, "proj_depth", kind, camera, f"{number:010d}.png")
            if os.path.isfile(png):
                return ("png", png)
        points = self.velodyne_file(folder, number)
        return ("velodyne", points, folder, side, False) if points else None

    def velodyne_file(self, folder: str, number: int) -> str | None:
        path = os.path.join(self.root, folder, "velodyne_points", "data", f"{number:010d}.bin")
        return path if os.path.isfile(path) else None

    def depth_files(self, depth: tuple) -> list[str]:
        calibration = [os.path.join(self.root, depth[2][:10], f"calib_{pair}.txt") for pair in
                       ("cam_to_cam", "velo_to_cam")] if depth[0] == "velodyne" else []
        return [depth[1], *calibration]

    def depth_map(self, depth: tuple) -> np.ndarray:
        if depth[0] == "png":
            return read_ids(depth[1], DEPTH_MODES).astype(np.float32) / 256
        _, path, folder, side, published = depth
        calibration = self.calibration(folder[:10])
        if "velodyne" not in calibration:
            file = os.path.join(self.root, folder[:10], "calib_velo_to_cam.txt")
            values = read_calibration(file)
            pose = np.eye(4)
            try:
                pose[:3, :3], pose[:3, 3] = values["R"].reshape(3, 3), values["T"]
            except (KeyError, ValueError):
                raise InputError(f"{file}: R and T are expected") from None
            if not np.isfinite(pose).all() or abs(np.linalg.det(pose[:3, :3]) - 1) > 0.01:
                raise InputError(f"{file}: R is no rotation, or T not finite")
            calibration["velodyne"] = calibration["rectify"] @ pose
        content = read_bytes(path).numpy()
        if content.size % 16:
            raise InputError(f"{path}: {content.size} bytes are no list of x, y, z, reflectance in float32")
        points = content.view(np.float32).reshape(-1, 4)
        return velodyne_depth(points, calibration["velodyne"], calibration["P"][side], calibration["shape"],
                              forward_distance=published, offset=int(published))


def natural_key(name: str) -> list:
    """Numeric order: frame2 before frame10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


class Frames(Clips):
    """One's own images: a folder or a folder of folders, each with `intrinsics.txt` (3x3 or fx fy cx cy).

    Numeric order; frames are neighbours when their numbers are one usual step apart. intrinsics.txt may also lie one
    folder above; without it, K follows from `fov`, the horizontal field of view in degrees. Measured depth is
    `depth/NAME.png`, 16 bits, metres * depth_scale.
    """

    def __init__(self, root: str, frame_ids: list[str], drives: list[str] | None = None, frames: tuple = (None, None),
                 fov: float | None = None, depth_scale: float = 1000.0, with_depth: bool = False, **options):
        self.root, self.name, self.depth_scale = root, f"frames at {root}", depth_scale
        if "s" in frame_ids:
            raise InputError("--supervision stereo needs a stereo data set; own frames are monocular")
        if os.path.isfile(root):
            raise InputError(f"{root} is a file; make frames of a video first: "
                             f"ffmpeg -i {os.path.basename(root)} -qscale:v 2 frames/%06d.jpg")
        offsets = [int(f) for f in frame_ids]
        samples = []
        for folder, paths in self._sequences(root, drives):
            step, numbers = self._numbers(paths)
            by_number = dict(zip(numbers, paths))
            K, K_from = self._intrinsics(root, folder, fov, paths[0])
            start, stop, _ = slice(*frames).indices(len(paths))
            for position in range(start, stop):
                images = [by_number.get(numbers[position] + step * offset) for offset in offsets]
                depth = self.depth_file(paths[position])
                samples.append({"images": images, "K": K, "K_from": K_from, "baseline": None,
                                "depth": depth if with_depth and os.path.isfile(depth) else None})
        super().__init__(self.complete(samples, with_depth, "a depth image"), with_depth=with_depth, **options)

    def _sequences(self, root: str, drives: list[str] | None) -> list[tuple[str, list[str]]]:
        """(folder, image paths in numeric order) of every sequence below root."""
        sequences = []
        below = [os.path.join(root, name) for name in list_folder(root)]
        for folder in [root, *filter(os.path.isdir, below)]:
            if os.path.islink(folder) and os.path.realpath(folder) == os.path.realpath(root):
                continue  # a link back
            if os.path.basename(folder) == "depth" or (drives and os.path.basename(folder) not in drives):
                continue
            names = sorted(image_names(folder), key=natural_key)
            if names:
                sequences.append((folder, [os.path.join(folder, n) for n in names]))
        if not sequences:
            raise InputError(f"{root}: no {', '.join(IMAGE_EXTENSIONS)} images there or in its folders"
                             + (f" {', '.join(drives)}" if drives else ""))
        return sequences

    def depth_file(self, image: str) -> str:
        folder, name = os.path.split(os.path.splitext(image)[0])
        return os.path.join(folder, "depth", f"{name}.png")

    @staticmethod
    def _numbers(paths: list[str]) -> tuple[int, list[int]]:
        """The usual step between frame numbers, and the numbers: the last digits of the names, else positions."""
        found = [re.findall(r"[0-9]+", os.path.splitext(os.path.basename(p))[0]) for p in paths]
        numbers = [int(f[-1]) for f in found] if all(found) else list(range(len(paths)))
        steps = [b - a for a, b in pairwise(numbers) if b > a]
        return (max(set(steps), key=steps.count) if steps else 1), numbers

    def _intrinsics(self, root: str, folder: str, fov: float | None, first: str) -> tuple[np.ndarray, str]:
        for place in (folder, os.path.dirname(folder) if folder != root else root, root):
            path = os.path.join(place, "intrinsics.txt")
            if os.path.isfile(path):
                return read_intrinsics(path), path
        if fov is None:
            raise InputError(f"{folder}: no intrinsics.txt (3x3 or fx fy cx cy); "
                             "give the horizontal field of view instead: --fov 60")
        height, width = read_image(first).shape[1:]
        return fov_intrinsics(width, height, fov), f"--fov {fov}"

    def depth_map(self, depth: str) -> np.ndarray:
        return read_ids(depth, DEPTH_MODES).astype(np.float32) / self.depth_scale


class NyuClips(Frames):
    """NYU-v2 for pre-training: in a folder for each scene `rgb_NUMBER.jpg` and `sync_depth_NUMBER.png` (16 bits,
    millimetres), or the labelled images as unpacked. K is the published one where there is no intrinsics.txt.
    """

    def __init__(self, root: str, *args, **options):
        inner = os.path.join(root, "image")
        super().__init__(inner if os.path.isdir(inner) else root, *args, **options)

    def depth_file(self, image: str) -> str:
        folder, name = os.path.split(os.path.splitext(image)[0])
        if os.path.basename(folder) == "image":
            return os.path.join(os.path.dirname(folder), "depth", f"{name}.png")
        return os.path.join(folder, f"sync_depth_{name.removeprefix('rgb_')}.png")

    def _intrinsics(self, root: str, folder: str, fov: float | None, first: str) -> tuple[np.ndarray, str]:
        height, width = read_image(first).shape[1:]
        if 4 * height == 3 * width and not os.path.isfile(os.path.join(folder, "intrinsics.txt")):  # whole, if smaller
            return resize_intrinsics(NYU_CAMERA, (480, 640), (height, width)), "NYU's camera"
        return super()._intrinsics(root, folder, fov, first)


class CityscapesClips(Clips):
    """Cityscapes for pre-training: its labelled images, with depth from the released disparity; or the video around
    them (`leftImg8bit_sequence`) where source frames are asked for. `drives` are cities.

    K and the stereo baseline come from `camera/train/CITY/*_camera.json`, which exist for labelled frames: the others
    of a sequence take the nearest one's.
    """

    def __init__(self, root: str, frame_ids: list[str], drives: list[str] | None = None, frames: tuple = (None, None),
                 with_depth: bool = False, **options):
        self.root, self.name, self.cameras = root, f"cityscapes at {root}", {}
        if "s" in frame_ids:
            raise InputError("--supervision stereo: of cityscapes only the left camera is read; use mono or depth")
        offsets, samples = [int(f) for f in frame_ids], []
        kind = "_sequence" if len(offsets) > 1 else ""
        for city in drives or list_folder(os.path.join(root, f"leftImg8bit{kind}", "train")):
            paths = {place: self._file(f"leftImg8bit{kind}", city, *place, "leftImg8bit.png")
                     for place in self._places(f"leftImg8bit{kind}", city, "leftImg8bit.png")}
            for sequence, number in list(paths)[slice(*frames)]:
                depth = self._file(f"disparity{kind}", city, sequence, number, "disparity.png")
                samples.append({"images": [paths.get((sequence, number + offset)) for offset in offsets],
                                "place": (city, sequence, number), "baseline": None,
                                "depth": depth if with_depth and os.path.isfile(depth) else None})
        samples = self.complete(samples, with_depth, "a disparity image")
        for sample in samples:
            sample["K"], sample["K_from"], metres = self._camera(*sample.pop("place"))
            sample["depth"] = (sample["depth"], metres)
        super().__init__(samples, with_depth=with_depth, **options)

    def _places(self, kind: str, city: str, ending: str) -> list[tuple[int, int]]:
        """(sequence, frame number) of the files in a city's folder."""
        found = [re.fullmatch(rf"{re.escape(city)}_([0-9]{{6}})_([0-9]{{6}})_{re.escape(ending)}", name)
                 for name in list_folder(os.path.join(self.root, kind, "train", city))]
        return [(int(match[1]), int(match[2])) for match in found if match]

    def _file(self, kind: str, city: str, sequence: int, number: int, ending: str) -> str:
        return os.path.join(self.root, kind, "train", city, f"{city}_{sequence:06d}_{number:06d}_{ending}")

    def _camera(self, city: str, sequence: int, number: int) -> tuple[np.ndarray, str, float]:
        """K in pixels of the 2048x1024 images, its file, and baseline * fx: metres at a disparity of one pixel."""
        if city not in self.cameras:
            self.cameras[city] = self._places("camera", city, "camera.json")
        near = [other for camera_sequence, other in self.cameras[city] if camera_sequence == sequence]
        if not near:
            raise InputError(f"{self.root}/camera/train/{city}: no camera.json of sequence {sequence:06d}")
        nearest = min(near, key=lambda other: abs(other - number))
        path = self._file("camera", city, sequence, nearest, "camera.json")
        if path not in self.cameras:
            try:
                content = json.loads(read_text(path))
                fx, fy, u0, v0 = (float(content["intrinsic"][key]) for key in ("fx", "fy", "u0", "v0"))
                metres = fx * float(content["extrinsic"]["baseline"])
                if not 0 < metres < math.inf:
                    raise ValueError(f"fx * baseline is {metres}")
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}: no camera with intrinsic fx, fy, u0, v0 and extrinsic baseline "
                                 f"({type(error).__name__} {error})") from None
            self.cameras[path] = np.array([[fx, 0, u0], [0, fy, v0], [0, 0, 1]]), path, metres
        return self.cameras[path]

    def depth_map(self, depth: tuple[str, float]) -> np.ndarray:
        path, metres = depth
        disparity = (read_ids(path, DEPTH_MODES).astype(np.float32) - 1) / 256  # stored 0: not measured, 1: infinity
        return np.where(disparity > 0, metres / disparity.clip(1 / 256), 0).astype(np.float32)


class CamVidClips(Frames):
    """CamVid's consecutive frames (`val`, 15 Hz) as clips; its intrinsics are not published, so `fov` is needed."""

    def __init__(self, root: str, *args, **options):
        super().__init__(os.path.join(root, "val"), *args, **options)


# ---------------------------------------------------------------------------------------------- the packed cache
#
# CACHE/640x192/ holds frames of any data set at that size: frames.bin, rows of (3, H, W) uint8, and depth.bin, rows of
# (1, H, W) float32 metres, which all workers and ranks map into memory and share. sources.json says which row shows
# which file in which state. Rows are only ever appended, and count once sources.json is renamed into place: what other
# processes read never changes, and an interruption costs a minute's work. clips_*.npy, which `datasets.py pack` writes,
# are samples to be read without the files that they were made of, however many.

ROWS = {"frames": (3, np.dtype(np.uint8)), "depth": (1, np.dtype(np.float32))}  # channels and type


def row_bytes(kind: str, size: tuple[int, int]) -> int:
    return ROWS[kind][0] * ROWS[kind][1].itemsize * math.prod(size)


def map_rows(folder: str, kind: str, size: tuple[int, int]) -> np.ndarray:
    """frames.bin as (N, 3, H, W) or depth.bin as (N, 1, H, W): mapped, not read."""
    path, (channels, dtype) = os.path.join(folder, f"{kind}.bin"), ROWS[kind]
    count = os.path.getsize(path) // row_bytes(kind, size) if os.path.exists(path) else 0
    if count == 0:
        return np.zeros((0, channels, *size), dtype)
    rows = np.memmap(path, dtype, "r", shape=(count, channels, *size))
    rows.base.madvise(mmap.MADV_RANDOM)  # the system's reading ahead may be megabytes for every row
    return rows


def read_row(rows: np.memmap, row: int) -> np.ndarray:
    """One row, asked for in one go instead of page by page."""
    start = row * rows[0].nbytes
    rows.base.madvise(mmap.MADV_WILLNEED, start - start % mmap.PAGESIZE, rows[0].nbytes + start % mmap.PAGESIZE)
    return rows[row]


def file_state(path: str) -> str:
    """Size and time of the last change, by which a packed row knows its file."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    return f"{found.st_size} {found.st_mtime_ns}"


def read_sources(folder: str, size: tuple[int, int]) -> dict[str, dict[str, list]]:
    """sources.json: of each kind of rows, absolute path -> [state, row, native height and width].

    Of a file that could not be read [state, -1, why].
    """
    path, sources = os.path.join(folder, "sources.json"), {kind: {} for kind in ROWS}
    if not os.path.exists(path):
        return sources
    try:
        with open(path) as file:
            sources = json.load(file)
        whole = all(next_row(sources[kind]) <= len(map_rows(folder, kind, size)) for kind in ROWS)
    except (OSError, ValueError, LookupError, TypeError):
        whole = False
    if not whole:
        raise InputError(f"{folder} is damaged: delete it, and it will be packed again")
    return sources


def next_row(entries: dict[str, list]) -> int:
    return 1 + max((entry[1] for entry in entries.values()), default=-1)


def append_rows(dataset: Clips, folder: str, sources: dict, missing: dict[str, dict[str, tuple]]) -> None:
    """Pack what is missing, of each kind key -> (state, what the data set loads), and enter it into `sources`."""
    size = dataset.size
    need = sum(len(items) * row_bytes(kind, size) for kind, items in missing.items())
    free = shutil.disk_usage(folder).free
    print(f"packing {len(missing['frames'])} frames and {len(missing['depth'])} depth maps into {folder}: "
          f"{need / 1e9:.2f} GB of the {free / 1e9:.1f} GB that are free")
    if need > free:
        raise InputError(f"{folder}: packing needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    load = {"frames": dataset.load, "depth": lambda depth: (dataset.load_depth(depth), ())}

    def attempt(kind: str, item: object) -> tuple:
        try:
            return load[kind](item)
        except InputError as error:  # the training decides (--on_bad_sample) when it comes to it
            return None, (str(error),)

    saved = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=sum(map(len, missing.values())), disable=None) as bar:
        for kind, items in missing.items():
            row = next_row(sources[kind])
            with open(os.path.join(folder, f"{kind}.bin"), "ab") as file:
                file.truncate(row * row_bytes(kind, size))  # an interruption may have left more
                keys = list(items)
                for start in range(0, len(keys), 64):
                    some = keys[start:start + 64]
                    results = pool.map(partial(attempt, kind), [items[key][1] for key in some])
                    for key, (pixels, note) in zip(some, results):
                        sources[kind][key] = [items[key][0], -1 if pixels is None else row, *note]
                        if pixels is not None:
                            file.write(pixels.numpy().tobytes())
                            row += 1
                        bar.update()
                    if time.monotonic() > saved + 60 or start + 64 >= len(keys):
                        file.flush()
                        os.fsync(file.fileno())
                        save_json(os.path.join(folder, "sources.json"), sources)
                        saved = time.monotonic()


def packed(dataset: Clips, cache: str) -> "Packed":
    """A data set, read from its packed copy below `cache`. What the copy lacks or shows in another state is packed.

    Raises InputError when the disk lacks the room, and when the copy does not show what the files show.
    """
    size, folder = dataset.size, os.path.join(cache, f"{dataset.size[1]}x{dataset.size[0]}")
    state = functools.cache(file_state)
    paths = dict.fromkeys(path for sample in dataset.samples for path in sample["images"])
    paths = {path: os.path.abspath(path) for path in paths}
    wanted = {"frames": {key: (state(path), path) for path, key in paths.items()}, "depth": {}}
    depth_keys = []
    for depth in [sample["depth"] for sample in dataset.samples] if dataset.with_depth else []:
        files = dataset.depth_files(depth)
        depth_keys.append(f"{os.path.abspath(files[0])} {depth} {getattr(dataset, 'depth_scale', '')}")
        wanted["depth"][depth_keys[-1]] = " ".join(map(state, files)), depth

    def missing(sources: dict) -> dict[str, dict]:
        return {kind: {key: item for key, item in items.items() if sources[kind].get(key, [None])[0] != item[0]}
                for kind, items in wanted.items()}

    sources = read_sources(folder, size)
    if any(missing(sources).values()):
        try:
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, "lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be packing the same
                sources = read_sources(folder, size)
                if any(missing(sources).values()):
                    append_rows(dataset, folder, sources, missing(sources))
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}") from None

    rows = {path: sources["frames"][key] for path, key in paths.items()}
    frames = map_rows(folder, "frames", size)
    for path, (_, row, *_) in list(rows.items())[::1 + len(rows) // 3]:
        if row >= 0 and not np.array_equal(frames[row], dataset.load(path)[0].numpy()):
            raise InputError(f"{folder} does not show what {path} does: delete it, and it will be packed again")
    clips = np.zeros(len(dataset), clip_type(len(dataset.samples[0]["images"])))
    clips["frames"] = [[rows[path][1] for path in sample["images"]] for sample in dataset.samples]
    clips["depth"] = [sources["depth"][key][1] for key in depth_keys] if dataset.with_depth else -1
    clips["baseline"] = [math.nan if sample["baseline"] is None else sample["baseline"] for sample in dataset.samples]
    intrinsics, broken = {}, {}
    for index, sample in enumerate(dataset.samples):
        parts = [rows[path] for path in sample["images"]] + [sources["depth"][k] for k in depth_keys[index:index + 1]]
        try:
            if any(part[1] < 0 for part in parts):
                raise InputError(next(part[2] for part in parts if part[1] < 0))
            sizes = tuple(tuple(rows[path][2:]) for path in sample["images"])
            key = sample["K"].tobytes(), sizes
            if key not in intrinsics:  # few differ
                intrinsics[key] = dataset.resized_intrinsics(sample, sizes)
            clips["K"][index] = intrinsics[key]
        except InputError as error:
            clips["frames"][index], broken[index] = -1, str(error)
    copy = Packed(cache, [], clips=clips, height=size[0], width=size[1], augment=dataset.augment, crop=dataset.crop,
                  with_depth=dataset.with_depth)
    copy.name, copy.dropped, copy.broken, copy.files = dataset.name, dataset.dropped, broken, dataset.targets()
    return copy


def clip_type(frames: int) -> np.dtype:
    """A sample in the packed cache: rows of its frames, target first, and of its depth, K, baseline (NaN: none)."""
    return np.dtype([("frames", "<i8", (frames,)), ("depth", "<i8"), ("K", "<f4", (3, 3)), ("baseline", "<f4")])


class Packed(Clips):
    """Clips of a packed copy: nothing is decoded, and no list of samples is held.

    root: the cache; clips: as `packed` makes them. Without, those that `datasets.py pack` wrote for these frame_ids:
    the files behind them are then neither needed nor compared.
    """

    name, broken = "packed clips", {}  # index of a clip -> why it cannot be read
    files = None  # of the targets, where they are known

    def __init__(self, root: str, frame_ids: list[str], clips: np.ndarray | None = None, drives: None = None,
                 frames: tuple = (None, None), min_motion: float = 0, **options):
        if drives or min_motion or tuple(frames) != (None, None):
            raise InputError("--drives, --frames and --min_motion choose what is packed: give them to datasets.py pack")
        self.folder, self.clips = os.path.join(root, f"{options['width']}x{options['height']}"), clips
        self.file = os.path.join(self.folder, f"clips_{','.join(frame_ids)}.npy")
        if clips is None and not os.path.isfile(self.file):
            there = ", ".join(sorted(str(path) for path in Path(root).glob("*/clips_*.npy")))
            raise InputError(f"{self.file} is not there (but {there or 'no clips at all'}): datasets.py pack writes it")
        super().__init__(range(1), **options)
        self._map()
        self.samples = range(len(self.clips))
        if self.with_depth and self.clips["depth"][0] < 0:
            raise InputError(f"{self.file}: packed without depth")

    def targets(self) -> list[str]:
        if self.files is None:
            raise InputError(f"{self.file} does not say which camera took a frame, as --intrinsics learned must know: "
                             "give --data and --data_path of the images")
        return self.files

    def _map(self) -> None:
        self.rows = {kind: map_rows(self.folder, kind, self.size) for kind in ROWS}
        if self.clips is None:
            try:
                self.clips = np.load(self.file, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise InputError(f"{self.file} is damaged ({error}): pack again") from None

    def __getstate__(self) -> dict:  # maps are opened by a loader process that was not forked, not sent to it
        return {**vars(self), "rows": None, "clips": None if isinstance(self.clips, np.memmap) else self.clips}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._map()

    def read(self, index: int) -> dict:
        clip = self.clips[index]
        if clip["frames"][0] < 0:
            raise InputError(self.broken.get(index, f"{self.file}: clip {index} could not be read when it was packed"))
        if clip["frames"].max() >= len(self.rows["frames"]) or clip["depth"] >= len(self.rows["depth"]):
            raise InputError(f"{self.folder} is damaged: delete it and pack again")
        sample = {"frames": torch.from_numpy(np.stack([read_row(self.rows["frames"], row) for row in clip["frames"]])),
                  "K": torch.from_numpy(clip["K"].copy()), "index": index}
        if not np.isnan(clip["baseline"]):
            sample["stereo_T"] = translation_x(float(clip["baseline"]))
        if self.with_depth:
            sample["depth"] = torch.from_numpy(read_row(self.rows["depth"], clip["depth"]).copy())
        return sample


class RandomClips(Clips):
    """Noise that comes from no file, with stereo and depth as asked for: to time all but the reading of data."""

    name = "random noise"

    def __init__(self, root: str, frame_ids: list[str], drives: None = None, frames: tuple = (None, None),
                 min_motion: float = 0, **options):
        if drives or min_motion or tuple(frames) != (None, None):
            raise InputError("--drives, --frames and --min_motion: --data random has no files to choose from")
        super().__init__(range(1000), **options)
        self.shape, self.stereo = (len(frame_ids), 3, *self.size), "s" in frame_ids

    def targets(self) -> list[str]:
        raise InputError("--intrinsics learned: --data random has no camera")

    def read(self, index: int) -> dict:
        rng = np.random.default_rng(index)
        sample = {"frames": torch.from_numpy(rng.integers(256, size=self.shape, dtype=np.uint8)), "index": index,
                  "K": torch.from_numpy(fov_intrinsics(self.size[1], self.size[0], 80)).float()}
        if self.stereo:
            sample["stereo_T"] = translation_x(-0.5)
        if self.with_depth:
            sample["depth"] = torch.from_numpy(rng.uniform(1, 80, (1, *self.size)).astype(np.float32))
        return sample


# ---------------------------------------------------------------------------------------------- labelled images

def lookup_table(ids: dict[int, int]) -> np.ndarray:
    """256 entries: raw id -> train id, 255 where the id is known but not evaluated, -1 where it is unknown."""
    table = np.full(256, -1, np.int16)
    for raw, train in ids.items():
        table[raw] = train
    return table


CITYSCAPES_TABLE = lookup_table({**dict.fromkeys((*range(34), 255), IGNORE),
                                 **{raw: train for train, raw in enumerate(CITYSCAPES_IDS)}})
CAMVID_TABLE = lookup_table({**{i: i for i in range(11)}, 11: IGNORE})


def class_names(name: str) -> tuple[str, ...]:
    """The classes that splits/NAME_classes.txt lists, in the order of train ids."""
    with open(os.path.join(SPLITS, f"{name}_classes.txt")) as file:
        return tuple(file.read().splitlines())


def palette(ids: Iterable[int]) -> tuple[tuple[int, int, int], ...]:
    """VOC's colour of each id: its bits are dealt to red, green and blue in turn, from their highest bits down."""
    return tuple(tuple(sum((i >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3))
                 for i in ids)


IN_MEMORY = 2 ** 31  # bytes that a set of labelled images, resized, may take to be kept


class Labelled(Dataset):
    """Images with label maps, kept decoded in memory: few-shot sets are small and are seen hundreds of times.

    Subclasses set `classes`, `colours`, `table` and give `pairs`, a list of (image path, label path): those that the
    training set is drawn from, or those to evaluate on. Large sets are read anew each time.
    """

    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    table: np.ndarray

    def __init__(self, pairs: list[tuple[str, str]], split: str, height: int, width: int,
                 train_size: int | None = None, split_seed: int = 0, augment: bool = False,
                 crop: tuple[int, int] | None = None):
        check_crop(crop, height, width)
        missing = [path for pair in pairs for path in pair if not os.path.exists(path)]
        if missing or not pairs:
            raise InputError(f"{missing[0]}: no such file, one of {len(missing)} that are missing" if missing else
                             f"no image is listed for {split}")
        self.pairs = draw_training_set(pairs, train_size, split_seed) if split == "train" else pairs
        self.size, self.augment, self.crop, self.cached = (height, width), augment, crop, {}
        self.keep = 4 * height * width * len(self.pairs) <= IN_MEMORY

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
        self._check_palette(path, raw)
        return torch.from_numpy(known.astype(np.int64))

    def _check_palette(self, path: str, raw: np.ndarray) -> None:
        """Refuse a palette that shows an id in another class's colour: right to look at, but the ids are not ours."""
        with Image.open(path) as image:
            colours = (image.getpalette() or []) if image.mode == "P" else []
        meant = {colour: c for c, colour in enumerate(self.colours)}
        for i in np.unique(raw).tolist() if colours else ():
            c = meant.get(tuple(colours[3 * i:3 * i + 3]), self.table[i])
            if c != self.table[i] != IGNORE:
                raise InputError(f"{path}: the palette shows id {i}, {self.classes[self.table[i]]}, in the colour of "
                                 f"{self.classes[c]}: ids must be those of the data set, not places in a palette")

    def native(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (3, h, w) uint8 and label (h, w) as they are stored."""
        image, label = read_image(self.pairs[index][0]), self.native_label(index)
        aspects = image.shape[2] / image.shape[1], label.shape[1] / label.shape[0]
        if abs(aspects[0] / aspects[1] - 1) > 0.01:  # copies of KITTI hold images a few pixels off their labels
            raise InputError(f"{self.pairs[index][1]}: label is {tuple(label.shape)}, "
                             f"its image {tuple(image.shape[1:])}")
        return image, label

    def inspect(self, index: int) -> dict:
        """For `check`: "problems" (a line each); of a sound pair "size", the "label" size and "pixels" of each id."""
        try:
            image, label = self.native(index)
            return {"index": index, "problems": [], "size": tuple(image.shape[1:]), "label": tuple(label.shape),
                    "pixels": label.flatten().bincount(minlength=256)}
        except InputError as error:
            return {"index": index, "problems": [str(error)]}

    def load(self, index: int, native_label: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Resized image (3, H, W) and label, resized likewise (H, W) or at its own size (h, w): both uint8."""
        key = index, native_label
        if key not in self.cached:
            image, label = self.native(index)
            label = label.to(torch.uint8)
            if not native_label:
                # nearest-exact takes the pixel at the new pixel's centre; any interpolation would invent ids
                label = F.interpolate(label[None, None], self.size, mode="nearest-exact")[0, 0]
            entry = resize(image, list(self.size), antialias=True), label
            if not self.keep or label.numel() * len(self) > IN_MEMORY:
                return entry
            self.cached[key] = entry
        return self.cached[key]

    def read_all(self, skip: bool = False, native_label: bool = False) -> set[int]:
        """Train ids of the labels, after reading every image (of a set too large to be kept in memory, the first 8).

        So that what cannot be read is found before a run begins, unless it is to be skipped.
        """
        seen = set()
        for index in range(len(self) if self.keep else min(8, len(self))):
            try:
                seen |= set(self.load(index, native_label)[1].unique().tolist())
            except InputError:
                if not skip:
                    raise
        return seen

    def __getitem__(self, item: int | tuple[int, tuple[int, int]]) -> dict:
        index, draw = item if isinstance(item, tuple) else (item, (0, 0))
        image, label = self.load(index)
        sample = {"image": image, "label": label.long(), "index": index}
        return crop_and_flip(sample, self.crop, np.random.default_rng(draw)) if self.augment else sample


def draw_training_set(pool: list, train_size: int | None, split_seed: int) -> list:
    """`train_size` of the pool's items at random; a larger draw of the same seed contains the smaller one."""
    if train_size is not None and not 1 <= train_size <= len(pool):
        raise InputError(f"--train_size {train_size}: there are 1 to {len(pool)} images for training")
    order = np.random.default_rng(split_seed).permutation(len(pool))
    return [pool[i] for i in order[:train_size]]


def read_names(path: str) -> list[str]:
    """The images that a split file lists: the first word of each line, without folder and extension."""
    words = [line.split()[0] for line in read_text(path).splitlines() if line.strip()]
    return [os.path.splitext(os.path.basename(word))[0] for word in words]


def pair_up(images: str, labels: str, image_end: str = "", label_end: str = "") -> list[tuple[str, str]]:
    """Every image of a folder with its label, a PNG in another folder, of the same name up to its end."""
    stems = [(name, os.path.splitext(name)[0].removesuffix(image_end)) for name in image_names(images)]
    if not stems:
        raise InputError(f"{images}: no images there")
    return [(os.path.join(images, name), os.path.join(labels, f"{stem}{label_end}.png")) for name, stem in stems]


class KittiSemantics(Labelled):
    """KITTI's labelled images, `training/image_2` and `training/semantic`, 19 Cityscapes classes.

    A fixed 36 % (72 of the 200) are for evaluation, whatever the training set, which is drawn from the others.
    """

    classes, colours, table = CITYSCAPES_CLASSES, CITYSCAPES_COLOURS, CITYSCAPES_TABLE

    def __init__(self, root: str, split: str, **options):
        folder = os.path.join(root, "training") if os.path.isdir(os.path.join(root, "training")) else root
        pairs = pair_up(os.path.join(folder, "image_2"), os.path.join(folder, "semantic"))
        if len(pairs) < 2:
            raise InputError(f"{folder}/image_2: at least 2 labelled images are needed, {len(pairs)} found")
        shuffled = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
        pool = max(1, int(0.64 * len(pairs)))
        super().__init__(shuffled[:pool] if split == "train" else shuffled[pool:], split, **options)


class CamVid(Labelled):
    """CamVid in SegNet's layout, 11 classes: training images drawn from `train`, evaluation on `val`."""

    classes, colours, table = CAMVID_CLASSES, CAMVID_COLOURS, CAMVID_TABLE

    def __init__(self, root: str, split: str, **options):
        folder = os.path.join(root, split)
        super().__init__(pair_up(folder, f"{folder}annot"), split, **options)


class Cityscapes(Labelled):
    """Cityscapes' fine labels, 19 classes: training images drawn from the cities of `train`, evaluation on `val`."""

    classes, colours, table = CITYSCAPES_CLASSES, CITYSCAPES_COLOURS, CITYSCAPES_TABLE

    def __init__(self, root: str, split: str, **options):
        images, labels = (os.path.join(root, kind, split) for kind in ("leftImg8bit", "gtFine"))
        pairs = [pair for city in list_folder(images) for pair in pair_up(
            os.path.join(images, city), os.path.join(labels, city), "_leftImg8bit", "_gtFine_labelIds")]
        super().__init__(pairs, split, **options)


class Voc(Labelled):
    """Pascal VOC 2012, 21 classes: training images drawn from `train_aug` (with SBD's; where there is none, from
    `train`), evaluation on `val`, which are lists in ImageSets/Segmentation. SBD's labels: PNG, SegmentationClassAug.
    """

    classes, colours = class_names("voc"), palette(range(21))
    table = lookup_table({**{i: i for i in range(21)}, 255: IGNORE})

    def __init__(self, root: str, split: str, **options):
        inner = os.path.join(root, "VOCdevkit", "VOC2012")
        root = inner if os.path.isdir(inner) else root
        lists = os.path.join(root, "ImageSets", "Segmentation")
        augmented = split == "train" and os.path.isfile(os.path.join(lists, "train_aug.txt"))
        labels = os.path.join(root, "SegmentationClassAug" if augmented else "SegmentationClass")
        names = read_names(os.path.join(lists, "train_aug.txt" if augmented else f"{split}.txt"))
        super().__init__([(os.path.join(root, "JPEGImages", f"{name}.jpg"), os.path.join(labels, f"{name}.png"))
                          for name in names], split, **options)


class Ade20k(Labelled):
    """ADE20K in the layout of ADEChallengeData2016, 150 classes (0 is ignored): training images drawn from `training`,
    evaluation on `validation`.
    """

    classes, colours = class_names("ade20k"), palette(range(1, 151))
    table = lookup_table({0: IGNORE, **{i + 1: i for i in range(150)}})

    def __init__(self, root: str, split: str, **options):
        folder = {"train": "training", "val": "validation"}[split]
        images, labels = (os.path.join(root, kind, folder) for kind in ("images", "annotations"))
        super().__init__(pair_up(images, labels), split, **options)


class Nyu(Labelled):
    """NYU-v2's labelled images, 40 classes (0 is ignored): `image`, `label40`, and the official split, 795 and 654, in
    `train.txt` and `test.txt`; `python datasets.py unpack` writes them from the published .mat files.
    """

    classes, colours = class_names("nyu"), palette(range(1, 41))
    table = lookup_table({0: IGNORE, **{i + 1: i for i in range(40)}})

    def __init__(self, root: str, split: str, **options):
        names = os.path.join(root, {"train": "train.txt", "val": "test.txt"}[split])
        if not os.path.isfile(names):
            raise InputError(f"{names} is missing; python datasets.py unpack --data_path {root} writes it")
        super().__init__([(os.path.join(root, "image", f"{name}.png"), os.path.join(root, "label40", f"{name}.png"))
                          for name in read_names(names)], split, **options)


class Nyu13(Nyu):
    """The same images and labels with 13 classes."""

    classes, colours = class_names("nyu13"), palette(range(1, 14))
    table = lookup_table({0: IGNORE, **{i + 1: thirteen - 1 for i, thirteen in enumerate(NYU13_OF_40)}})


def unpack_nyu(root: str) -> None:
    """Write NYU-v2's labelled images as PNG files: `image`, `depth` (millimetres, 0 = not measured), `label40`.

    Reads nyu_depth_v2_labeled.mat and splits.mat (both NYU's) and classMapping40.mat (894 raw classes to 40, Gupta et
    al., CVPR 2013). The lists of the split are written last.
    """
    try:
        import h5py
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError(f"unpacking NYU needs {error.name}: pip install h5py scipy") from None
    path = os.path.join(root, "nyu_depth_v2_labeled.mat")
    try:
        splits, mapping = (loadmat(os.path.join(root, name)) for name in ("splits.mat", "classMapping40.mat"))
        to_40 = np.append(0, mapping["mapClass"].ravel()).astype(np.uint8)
        with h5py.File(path) as file:
            for i in tqdm(range(len(file["images"])), desc="unpack", disable=None):  # MATLAB's axes come reversed
                label = np.asarray(file["labels"][i]).T
                depth = (1000 * np.asarray(file["rawDepths"][i]).T).round().clip(0, 65535)
                for kind, array in (("image", np.asarray(file["images"][i]).T), ("label40", to_40[label]),
                                    ("depth", depth.astype(np.uint16))):
                    save_image(Path(root, kind, f"{i + 1:04d}.png"), np.ascontiguousarray(array))
        for name in ("train", "test"):
            numbers = splits[f"{name}Ndxs"].ravel()
            Path(root, f"{name}.txt").write_text("".join(f"{number:04d}\n" for number in numbers))
    except Exception as error:  # noqa: BLE001  (of two readers, each with exceptions of its own)
        raise InputError(f"{root}: nyu_depth_v2_labeled.mat, splits.mat and classMapping40.mat are needed there, "
                         f"as published ({error})") from None


class RandomLabels(Labelled):
    """Noise of KITTI's size, in KITTI's classes, that comes from no file: to time all but the reading of data."""

    classes, colours, table = CITYSCAPES_CLASSES, CITYSCAPES_COLOURS, CITYSCAPES_TABLE

    def __init__(self, root: str, split: str, **options):
        super().__init__([(os.devnull, os.devnull)] * 200, split, **options)

    def native_label(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.random.default_rng(index).integers(19, size=(375, 1242)))

    def native(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = np.random.default_rng(index).integers(256, size=(3, 375, 1242), dtype=np.uint8)
        return torch.from_numpy(image), self.native_label(index)


# ---------------------------------------------------------------------------------------------- the synthetic world
#
# A procedural street, ray cast in numpy. World and camera axes are those of KITTI's cameras: x right, y down, z
# forward, in metres; the ground is y = 0. Every object (a house, a tree, a car) has an anchor frame on the street and
# consists of solids: frustums (boxes whose top may be smaller than their bottom), upright cylinders and ellipsoids.
# Surfaces are Lambertian, with textures fixed to the anchor frames, so a point keeps its colour from frame to frame and
# from camera to camera.

ROAD, SIDEWALK, BUILDING, POLE, VEGETATION, TERRAIN, SKY, CAR = 7, 8, 11, 17, 21, 22, 23, 26  # KITTI's raw ids
MATERIALS = {"wall": BUILDING, "roof": BUILDING, "metal": POLE, "sign": POLE, "bark": VEGETATION,
             "leaves": VEGETATION, "paint": CAR, "cabin": CAR, "tyre": CAR}
MATERIAL_LABELS = np.array(list(MATERIALS.values()), np.uint8)

CAMERA_HEIGHT, BASELINE = 1.65, 0.54  # m; the baseline separates the cameras image_02 and image_03
NEAR, REACH, FAR = 0.2, 150.0, 250.0  # m; solids beyond REACH are left out, and ground beyond FAR counts as sky
START, END = -30.0, 480.0  # m along the street between which it is built up
MAP_SCALE, MAP_REACH = 6, 60  # cells per m, and m to either side of x = 0, of the map of shadows on the ground
LIDAR_ROTATION = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])  # velodyne (x forward, z up) to camera
LIDAR_TRANSLATION, LIDAR_RANGE = np.array([-0.004, -0.076, -0.272]), 80.0  # m

CUBE = np.array(list(product((-1, 1), repeat=3)), np.float32)  # its corners, and its faces as quads of corners
QUADS = np.array([(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)])
TOP, BOTTOM, RIGHT, LEFT, FRONT, BACK, CURVED = range(7)  # faces of a frustum; ellipsoids and cylinders are CURVED
NOISE = {k: np.pad(np.random.default_rng(k).random((n,) * k, np.float32), (0, 1), "wrap")
         for k, n in ((2, 512), (3, 64))}  # random values on a periodic lattice, by number of dimensions


def value_noise(*coordinates: np.ndarray) -> np.ndarray:
    """Smooth noise in [0, 1] at points given by 2 or 3 arrays of coordinates: random values at integers, blended."""
    lattice = NOISE[len(coordinates)]
    strides = [s // lattice.itemsize for s in lattice.strides]
    floors = [np.floor(c) for c in coordinates]
    index = sum((f.astype(np.int32) & (lattice.shape[0] - 2)) * s for f, s in zip(floors, strides))
    values = [lattice.ravel()[index + np.dot(corner, strides)] for corner in product((0, 1), repeat=len(strides))]
    for coordinate, floor in zip(coordinates[::-1], floors[::-1]):  # the last axis varies fastest among the corners
        share = coordinate - floor
        share = share * share * (3 - 2 * share)
        values = [a + share * (b - a) for a, b in zip(values[::2], values[1::2])]
    return values[0]


def grain(cell: float, footprint: np.ndarray, *coordinates: np.ndarray) -> np.ndarray:
    """Noise about zero with cells of a given size, fading out where a ray's footprint outgrows them (all in m)."""
    return (value_noise(*(c / cell for c in coordinates)) - 0.5) / (1 + (2 * footprint / cell) ** 2)


def stripe(offset: np.ndarray, half_width: np.ndarray | float, footprint: np.ndarray) -> np.ndarray:
    """Share of a ray's footprint around `offset` that lies on the stripe |offset| < half_width (all in m)."""
    reach = np.minimum(half_width, offset + footprint / 2) - np.maximum(-half_width, offset - footprint / 2)
    return np.clip(reach / footprint, 0, 1)


def repeat(offset: np.ndarray, period: float) -> np.ndarray:
    """Signed distance to the closest multiple of the period."""
    return offset - period * np.round(offset / period)


def mix(first: np.ndarray, second: np.ndarray | tuple, share: np.ndarray) -> np.ndarray:
    """Colours (3, n), or one colour of 3 numbers, blended from first (share 0) to second (share 1)."""
    first, second = (np.asarray(c, np.float32).reshape(3, -1) for c in (first, second))
    return first + (second - first) * share.astype(np.float32)


def rotation_y(angle: np.ndarray) -> np.ndarray:
    """Rotations (..., 3, 3) by angles (rad) about the vertical; positive ones turn z forward towards x right."""
    c, s, o = np.cos(angle), np.sin(angle), np.zeros_like(angle)
    return np.stack([c, o, s, o, o + 1, o, -s, o, c], -1).reshape(*np.shape(angle), 3, 3)


def frustum_planes(half: np.ndarray, top: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Outward unit normals (6, 3) and offsets (6,) about the centre of a box with its top scaled along x and z."""
    (x, y, z), (top_x, top_z) = half, top
    lean_x, lean_z = x * (1 - top_x) / (2 * y), z * (1 - top_z) / (2 * y)
    normals = np.array([[0, -1, 0], [0, 1, 0], [1, -lean_x, 0], [-1, -lean_x, 0], [0, -lean_z, 1], [0, -lean_z, -1]])
    lengths = np.linalg.norm(normals, axis=1)
    middles = np.array([y, y, *[x * (1 + top_x) / 2] * 2, *[z * (1 + top_z) / 2] * 2])
    return (normals / lengths[:, None]).astype(np.float32), (middles / lengths).astype(np.float32)


class StreetWorld:
    """One street with its houses, plants, cars, light and colours, and a camera's drive along it."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.bend, self.bend_rate, self.bend_phase = rng.uniform(1, 8), rng.uniform(0.018, 0.035), rng.uniform(0, 6.3)
        self.half_road, self.walk, self.verge = rng.uniform(5.3, 7), rng.uniform(1.8, 3.5), 1.2 * rng.integers(2)
        self.side_streets = np.cumsum(rng.uniform(45, 110, 6)).astype(np.float32) - 20  # m along the street
        self.speed, self.wobble = rng.uniform(0.6, 1.0), rng.uniform(0, 6.3, 4)  # m a frame, rad

        overcast, warmth = rng.random() < 0.35, rng.uniform(0, 0.3)
        height, azimuth = np.radians(80 if overcast else rng.uniform(28, 60)), rng.uniform(0, 6.3)
        self.sun = np.array([np.cos(height) * np.sin(azimuth), -np.sin(height), np.cos(height) * np.cos(azimuth)],
                            np.float32)
        self.sun_colour = np.float32([1, 1 - warmth / 2, 1 - warmth]) * (0.5 if overcast else rng.uniform(1.3, 1.8))
        self.ambient = np.float32([0.85, 0.93, 1.05]) * (0.75 if overcast else rng.uniform(0.4, 0.55))
        self.zenith = np.float32([0.55, 0.6, 0.66] if overcast else [0.13, 0.27, 0.6]) * rng.uniform(0.8, 1.2)
        self.haze, self.visibility = np.float32([0.72, 0.75, 0.78]) * rng.uniform(0.9, 1.1), rng.uniform(300, 900)
        self.clouds = rng.uniform(0.5, 0.8) if overcast else rng.uniform(0.25, 0.6)

        self.anchors: list[tuple] = []  # m right of the centre line, m along it, speed in m a frame, turn in rad
        self.solids: list[tuple] = []
        self._build()
        self._tabulate()
        self.sunlight = self._map_sunlight(blur=6.0 if overcast else 1.0)

    def centre(self, z: np.ndarray | float) -> np.ndarray:
        """Lateral position (m) of the street's centre line at z (m)."""
        return self.bend * np.sin(z * self.bend_rate + self.bend_phase)

    def heading(self, z: np.ndarray | float) -> np.ndarray:
        """Direction (rad) of the street's centre line at z (m)."""
        return np.arctan(self.bend * self.bend_rate * np.cos(z * self.bend_rate + self.bend_phase))

    def pose(self, time: float) -> np.ndarray:
        """Camera-to-world matrix (4, 4) of the left camera at a time in frames."""
        sway, nod, drift, pace = np.sin(time * np.array([0.31, 0.47, 0.13, 0.1]) + self.wobble)
        z, pitch = 10 + self.speed * (time + 0.5 * pace), 0.006 * nod
        tilt = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
        pose = np.eye(4)
        pose[:3, :3] = rotation_y(self.heading(z) + 0.012 * sway) @ tilt
        pose[:3, 3] = self.centre(z) + 1.6 + 0.15 * drift, -CAMERA_HEIGHT + 0.015 * nod, z
        return pose

    def frames(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Anchor-to-world rotations (A, 3, 3) and origins (A, 3) at a time in frames."""
        u, z, speed, turn = np.array(self.anchors).T
        z = z + speed * time
        return rotation_y(self.heading(z) + turn), np.stack([self.centre(z) + u, np.zeros_like(z), z], -1)

    # ---- layout ----------------------------------------------------------------------------------------------------

    def _solid(self, shape: str, material: str, centre: tuple, half: tuple, colour, top: tuple = (1.0, 1.0)) -> None:
        """Add a solid to the latest anchor: centre and half extents in its frame (m), and its linear colour."""
        self.solids.append((len(self.anchors) - 1, shape, material, centre, half, colour, top))

    def _along(self, low: float, high: float, margin: float) -> list[float]:
        """Positions along the street, low to high m apart, that keep a margin (m) from the side streets."""
        positions = START + np.cumsum(self.rng.uniform(low, high, int((END - START) / low)))
        return [z for z in positions if z < END and np.abs(self.side_streets - z).min() > margin]

    def _build(self) -> None:
        rng = self.rng
        gaps, storeys, parked, hedges = rng.uniform(.05, .35), rng.uniform(2, 4.5), rng.uniform(.1, .55), rng.random()
        tree_gap, post_gap = rng.uniform(9, 26), rng.uniform(8, 16)
        curb, house_width = self.half_road + self.verge, rng.uniform(9, 15)
        for side in (-1, 1):
            garden = rng.choice([0.3, 2.0, 4.5])
            front = curb + self.walk + garden
            for z in self._along(house_width + 0.2, house_width * 1.25, house_width / 2 + 5):
                if rng.random() < gaps:
                    self._tree(side * (front + rng.uniform(0, 8)), z)
                else:
                    self._house(side, front, z, house_width, storeys)
            for z in self._along(8, 20, 0):  # trees far from the street close the view between the houses
                self._tree(side * rng.uniform(35, 50), z)
            for z in self._along(0.5 * tree_gap, 1.5 * tree_gap, 6):
                self._tree(side * (curb + 0.5 + rng.integers(2) * (self.walk + 0.6)), z)
            for z in self._along(0.5 * post_gap, 1.5 * post_gap, 4):
                self._post(side, z)
            for z in self._along(5.6, 8, 9):
                if rng.random() < parked:
                    self._car(side * (self.half_road - 1.05), z, 0.0, 0.0 if side > 0 else np.pi)
            for z in self._along(5, 5.5, 8):
                if garden > 1 and rng.random() < hedges:
                    self.anchors.append((side * (curb + self.walk + 0.6), z, 0.0, 0.0))
                    height, green = rng.uniform(0.4, 0.8), rng.uniform([.05, .1, .02], [.12, .18, .05])
                    self._solid("frustum", "leaves", (0, -height, 0), (0.45, height, 2.4), green, (0.8, 0.97))
        self._car(1.7, rng.uniform(26, 45), self.speed * rng.uniform(0.97, 1.05), 0.0)
        for z in np.cumsum(rng.uniform(18, 70, 30)):  # enough oncoming cars for the longest drive
            self._car(-1.6, z, -1.1 * self.speed, np.pi)

    def _house(self, side: int, front: float, z: float, width: float, storeys: float) -> None:
        rng = self.rng
        walls = [(.55, .42, .26), (.6, .55, .45), (.38, .14, .09), (.5, .3, .2), (.62, .6, .58), (.6, .48, .2),
                 (.4, .41, .4)]
        floors = max(1, round(storeys + rng.uniform(-1.2, 1.2)))
        height, depth, rise = floors * rng.uniform(1.45, 1.7), rng.uniform(4, 6.5), rng.uniform(1, 2)
        self.anchors.append((side * (front + depth + rng.uniform(0, 0.4)), z, 0.0, 0.0))
        plaster = rng.choice(walls) * rng.uniform(0.7, 1.1)
        self._solid("frustum", "wall", (0, -height, 0), (depth, height, width / 2), plaster)
        if floors < 5 and rng.random() < 0.75:  # a gable or hipped roof with a chimney, or a flat roof
            tiles, ridge = rng.choice([(.28, .1, .06), (.12, .11, .11), (.2, .14, .1)]), (0.02, rng.choice([1.0, 0.6]))
            top = -2 * height - rise
            self._solid("frustum", "roof", (0, top, 0), (depth + 0.4, rise, width / 2 + 0.1), tiles, ridge)
            self._solid("frustum", "roof", (-1.5 * side, top - 0.6 * rise, 2), (0.35, rise, 0.45), (.3, .14, .1))
        else:
            self._solid("frustum", "roof", (0, -2 * height - 0.2, 0), (depth + 0.25, 0.25, width / 2), (.4, .39, .37))

    def _tree(self, u: float, z: float) -> None:
        rng = self.rng
        size, green = rng.uniform(0.6, 1.25), rng.uniform([.05, .09, .02], [.14, .18, .06])
        trunk = rng.uniform(1.9, 2.9) * size
        self.anchors.append((u, z, 0.0, rng.uniform(0, 6.3)))
        half = (0.16 * size, 0.75 * trunk, 0.16 * size)
        self._solid("cylinder", "bark", (0, -0.75 * trunk, 0), half, (.12, .09, .065))
        for _ in range(rng.integers(5, 8)):
            x, y, w = rng.uniform([-1.2, 0.5, -1.2], [1.2, 3.4, 1.2]) * size
            half = rng.uniform([0.9, 0.7, 0.9], [1.6, 1.4, 1.6]) * size
            self._solid("ellipsoid", "leaves", (x, -trunk - y, w), half, green * rng.uniform(0.8, 1.2))

    def _post(self, side: int, z: float) -> None:
        rng = self.rng
        grey = np.array([.2, .21, .21]) * rng.uniform(0.4, 1.3)
        self.anchors.append((side * (self.half_road + 0.45), z, 0.0, 0.0))
        if rng.random() < 0.55:  # a street lamp, its arm over the road
            height, radius, arm = rng.uniform(2.6, 3.8), rng.uniform(0.07, 0.12), rng.uniform(0.5, 1.0)
            self._solid("cylinder", "metal", (0, -height, 0), (radius, height, radius), grey)
            self._solid("frustum", "metal", (-side * arm, -2 * height, 0), (arm, 0.05, 0.05), grey)
            self._solid("frustum", "metal", (-side * 2 * arm, -2 * height, 0), (0.35, 0.09, 0.13), grey * 1.5)
        else:
            height, colour = rng.uniform(1.15, 1.4), rng.choice([(.6, .03, .03), (.03, .1, .5), (.6, .45, .03)])
            self._solid("cylinder", "metal", (0, -height, 0), (0.05, height, 0.05), grey * 1.4)
            self._solid("ellipsoid", "sign", (0, -2 * height + 0.3, -0.07), (0.36, 0.36, 0.03), colour)

    def _car(self, u: float, z: float, speed: float, turn: float) -> None:
        rng = self.rng
        paint = rng.choice([(.7, .7, .7), (.35, .36, .38), (.03, .03, .035), (.1, .11, .12), (.45, .03, .03),
                            (.04, .1, .3), (.5, .47, .4)])
        length, van = rng.uniform(1.95, 2.25), rng.random() < 0.25
        body, cabin, share, slope = (0.46, 0.42, 0.78, 0.84) if van else (0.35, 0.28, 0.62, 0.6)
        self.anchors.append((u, z, speed, turn))
        self._solid("frustum", "paint", (0, -0.25 - body, 0), (0.88, body, length), paint, (0.93, 0.95))
        middle = (0, -0.25 - 2 * body - cabin, -0.3)
        self._solid("frustum", "cabin", middle, (0.8, cabin, share * length), paint, (0.82, slope))
        for x, w in product((-0.78, 0.78), (-0.62 * length, 0.62 * length)):
            self._solid("ellipsoid", "tyre", (x, -0.32, w), (0.15, 0.32, 0.32), (.02, .02, .02))

    def _tabulate(self) -> None:
        """Turn the list of solids into arrays, to be indexed by the number of the solid that a ray hits."""
        anchor, shape, material, middle, half, colour, top = (np.array(column) for column in zip(*self.solids))
        self.anchor, self.shape, self.material = anchor, shape, np.array([list(MATERIALS).index(m) for m in material])
        self.middle, self.half, self.colour = (v.astype(np.float32) for v in (middle, half, colour))
        self.style = self.rng.random((len(anchor), 3), np.float32)
        self.normals, self.offsets = (np.stack(v) for v in zip(*map(frustum_planes, half, top)))
        scale = np.ones((len(anchor), 8, 3), np.float32)
        scale[:, CUBE[:, 1] < 0, ::2] = top[:, None]  # y points down
        self.corners = self.middle[:, None] + self.half[:, None] * CUBE * scale

    def _map_sunlight(self, blur: float) -> np.ndarray:
        """Share of sunlight that reaches each cell of the ground past the standing solids, blurred (in cells)."""
        size = 2 * MAP_REACH * MAP_SCALE, int((END + 100 - START) * MAP_SCALE)
        canvas = Image.new("L", size, 255)
        draw = ImageDraw.Draw(canvas)
        rotations, origins = self.frames(0.0)
        for i in np.nonzero(np.array(self.anchors)[self.anchor, 2] == 0)[0]:
            points = self.corners[i] @ rotations[self.anchor[i]].T + origins[self.anchor[i]]
            points = points - self.sun * (points[:, 1:2] / self.sun[1])
            cells = (points[:, ::2] + [MAP_REACH, -START]) * MAP_SCALE
            if self.shape[i] == "ellipsoid":
                middle, radius = cells.mean(axis=0), self.half[i].mean() * MAP_SCALE
                draw.ellipse([*(middle - radius), *(middle + radius)], fill=0)
            else:
                for quad in QUADS:
                    draw.polygon(cells[quad].ravel().tolist(), fill=0)
        return np.asarray(canvas.filter(ImageFilter.GaussianBlur(blur)), np.float32) / 255

    # ---- ray casting -----------------------------------------------------------------------------------------------

    def render(self, pose: np.ndarray, time: float, K: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
        """Image (H, W, 3) uint8, depth (H, W) float32 (camera z in m, inf for sky), label (H, W) uint8, solid (H, W).

        Depth, label and solid belong to the rays through the pixels' centres, which have integer coordinates; the
        colour is the mean of these rays and those through the pixels' corners, which neighbours share.
        """
        row, column = np.mgrid[-0.5:height:0.5, 0:width + 1]
        column -= 0.5 * (row % 1 > 0)  # rows of corners alternate with rows of centres
        x, y = ((column - K[0, 2]) / K[0, 0]).astype(np.float32), ((row - K[1, 2]) / K[1, 1]).astype(np.float32)
        colour, *per_pixel = self._trace(pose, time, x, y)
        corners = colour[:, :-1:2] + colour[:, 2::2]
        colour = colour[:, 1::2, :-1] / 2 + (corners[..., :-1] + corners[..., 1:]) / 8
        image = np.rint(255 * np.clip(colour, 0, 1) ** (1 / 2.2)).astype(np.uint8).transpose(1, 2, 0)
        return dict(zip(("depth", "label", "solid"), (v[1::2, :-1] for v in per_pixel)), image=image)

    def _trace(self, pose: np.ndarray, time: float, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
        """Linear colour, depth, label and solid (-1 for ground and sky) on a grid of rays (x, y, 1)."""
        depth, solid, face = self._cast(pose, time, x, y)
        rays = np.einsum("ij,jhw->ihw", pose[:3, :3].astype(np.float32), np.stack([x, y, np.ones_like(x)]))
        colour, label = np.empty_like(rays), np.full(depth.shape, SKY, np.uint8)
        sky, things = np.isinf(depth), solid >= 0
        eye, spacing = pose[:3, 3:].astype(np.float32), x[0, 1] - x[0, 0]
        for region, shade in ((~sky & ~things, self._shade_ground), (things, self._shade_solids)):
            z = depth[region]
            hits = rays[:, region] * z + eye, eye, z * spacing, time, solid[region], face[region]
            shaded, label[region] = shade(*hits)
            colour[:, region] = mix(shaded, self.haze, 1 - np.exp(-z / self.visibility))
        colour[:, sky] = self._shade_sky(rays[:, sky])
        return colour, depth, label, solid

    def _cast(self, pose: np.ndarray, time: float, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
        """Depth (inf for sky), number of the solid (-1 for ground and sky) and its face where each ray ends."""
        down = pose[1, 0] * x + pose[1, 1] * y + pose[1, 2]
        depth = (-pose[1, 3] / np.maximum(down, 1e-6)).astype(np.float32)
        depth[depth > FAR] = np.inf
        solid, face = np.full(depth.shape, -1, np.int32), np.full(depth.shape, TOP, np.int8)

        rotations, origins = self.frames(time)
        turns = (pose[:3, :3].T @ rotations)[self.anchor].astype(np.float32)  # from the anchors' frames to the camera's
        eyes = np.einsum("nji,nj->ni", rotations, pose[:3, 3] - origins)[self.anchor].astype(np.float32) - self.middle
        corners = np.einsum("nij,nkj->nki", turns, self.half[:, None] * CUBE - eyes[:, None])
        image = corners[..., :2] / np.maximum(corners[..., 2:], NEAR)  # far off the image for corners behind the camera
        (left, top), (right, bottom) = ([np.searchsorted(axis, bound[:, k]) for k, axis in enumerate((x[0], y[:, 0]))]
                                        for bound in (image.min(axis=1), image.max(axis=1)))
        nearest, farthest = corners[..., 2].min(axis=1), corners[..., 2].max(axis=1)
        left = np.maximum(left - 1, 0)  # as the rows are staggered
        size = np.maximum(right - left, 0) * np.maximum(bottom - top, 0)
        visible = (size > 8) & (farthest > NEAR) & (nearest < REACH)
        order = np.argsort(nearest)
        for i in order[visible[order]]:
            window = slice(top[i], bottom[i]), slice(left[i], right[i])
            if nearest[i] < depth[window].max():
                hit = self._hit_frustum if self.shape[i] == "frustum" else self._hit_round
                hit(i, turns[i], eyes[i], x[window], y[window], depth[window], solid[window], face[window])
        return depth, solid, face

    def _hit_frustum(self, i: int, turn: np.ndarray, eye: np.ndarray, x: np.ndarray, y: np.ndarray,
                     depth: np.ndarray, solid: np.ndarray, face: np.ndarray) -> None:
        """Draw solid i into a window of the image where it is the closest; the eye is given from its middle."""
        enter, leave, entered = np.float32(0), np.float32(np.inf), np.int8(0)
        gaps = self.offsets[i] - self.normals[i] @ eye  # negative: the eye is outside this plane
        with np.errstate(divide="ignore"):
            for side, (gap, (a, b, c)) in enumerate(zip(gaps, self.normals[i] @ turn.T)):
                slope = a * x + (b * y[:, :1] + c)
                if gap < 0:
                    crossing = np.where(slope < 0, gap / slope, np.inf)
                    entered = np.where(crossing > enter, np.int8(side), entered)
                    enter = np.maximum(enter, crossing)
                else:
                    leave = np.minimum(leave, np.where(slope > 0, gap / slope, np.inf))
        closer = (enter < np.minimum(leave, depth)) & (enter > NEAR)
        depth[closer], solid[closer], face[closer] = enter[closer], i, entered[closer]

    def _hit_round(self, i: int, turn: np.ndarray, eye: np.ndarray, x: np.ndarray, y: np.ndarray,
                   depth: np.ndarray, solid: np.ndarray, face: np.ndarray) -> None:
        """The same for an ellipsoid or a cylinder; leaves have holes, through which the far side may be seen."""
        axes = [0, 2] if self.shape[i] == "cylinder" else [0, 1, 2]
        start = eye / self.half[i]  # in units of the half extents the solid has a radius of 1
        ray = [(turn[0, k] * x + (turn[1, k] * y[:, :1] + turn[2, k])) / self.half[i, k] for k in range(3)]
        a, b = sum(ray[k] ** 2 for k in axes), sum(ray[k] * start[k] for k in axes)
        root = np.sqrt(np.maximum(b * b - a * (sum(start[k] ** 2 for k in axes) - 1), 0))
        open_rays = (root > 0) & (root + b > -depth * a)
        for sign in (-1, 1):  # the near side, then the far side
            rows, columns = np.nonzero(open_rays)
            distance = ((sign * root - b) / a)[rows, columns]
            point = [s + distance * r[rows, columns] for s, r in zip(start, ray)]
            dense = (np.abs(point[1]) <= 1) & (distance > NEAR) & (distance < depth[rows, columns])
            if self.material[i] == list(MATERIALS).index("leaves"):
                cells = zip(point, self.half[i] / 0.25, 60 * self.style[i])
                dense &= value_noise(*(p * scale + shift for p, scale, shift in cells)) > 0.45
            hit = rows[dense], columns[dense]
            depth[hit], solid[hit], face[hit], open_rays[hit] = distance[dense], i, CURVED, False

    # ---- shading: colours (3, n) and labels (n,) of points (3, n); a footprint is the spacing (m) of the rays there

    def _shade_sky(self, rays: np.ndarray) -> np.ndarray:
        x, y, z = rays / np.linalg.norm(rays, axis=0)
        up = np.maximum(-y, 0.01)
        x, z = x / (up + 0.12), z / (up + 0.12)  # on a plane above, which bends down towards the horizon
        cloud = sum(value_noise(x * f, z * f + 7 * f) / f for f in (1.5, 3.0, 6.0, 12.0)) / 1.25
        cover = 0.9 * np.clip(4 * (cloud - 1 + self.clouds), 0, 1) * np.clip(6 * up, 0, 1)
        return mix(mix(self.haze, self.zenith, np.clip(2.2 * up, 0, 1) ** 0.6), 1.25 * self.haze, cover)

    def _shade_ground(self, points: np.ndarray, eye: np.ndarray, footprint: np.ndarray, time: float, *_) -> tuple:
        x, _, z = points
        u = x - self.centre(z)
        aside, across = np.abs(u), np.abs(z - self.side_streets[:, None]).min(axis=0)  # m from the two kinds of streets
        curb = self.half_road + self.verge
        road = (aside < self.half_road) | (across < 3.2)
        walk = (aside > curb) & (aside < curb + self.walk) | (across < 5)
        label = np.where(road, ROAD, np.where(walk, SIDEWALK, TERRAIN)).astype(np.uint8)

        lengthwise = footprint * np.linalg.norm(points - eye, axis=0) / -eye[1]  # rays graze the ground
        width = np.maximum(footprint, 0.3 * lengthwise)
        coarse, middle, fine = (grain(cell, width, x, z) for cell in (2.5, 0.5, 0.12))
        asphalt = mix((0, 0, 0), (.13, .13, .13), 1 + 0.5 * coarse + 0.2 * middle + 0.5 * fine)
        dash = stripe(repeat(z, 9), 1.5, lengthwise) * stripe(u, 0.07, footprint)
        edge = stripe(aside - self.half_road + 2.2, 0.05, footprint)
        zebra = stripe(repeat(u, 1), 0.25, footprint) * stripe(across - 5.5, 1.2, lengthwise) * (aside < self.half_road)
        asphalt = mix(asphalt, (.55, .55, .52), 0.85 * np.where(across > 4.5, np.maximum(dash, edge), 0) + 0.8 * zebra)
        joints = stripe(repeat(u, 0.6), 0.02, footprint) + stripe(repeat(z, 0.6), 0.02, lengthwise)
        paving = mix((0, 0, 0), (.3, .28, .26), 1 + 0.5 * coarse + 0.2 * middle + 0.3 * fine - 0.4 * joints)
        grass = mix((.1, .14, .035), (.2, .17, .08), np.clip(0.4 + coarse, 0, 1))
        grass = grass * (1 + 0.6 * middle + 0.9 * fine)
        colour = np.where(label == ROAD, asphalt, np.where(label == SIDEWALK, paving, grass))
        colour = mix(colour, (.38, .37, .35), stripe(aside - self.half_road, 0.1, footprint) * (across > 3.2))

        column, row = (x + MAP_REACH) * MAP_SCALE - 0.5, (z - START) * MAP_SCALE - 0.5
        c = np.clip(column, 0, self.sunlight.shape[1] - 2).astype(np.int32)
        r = np.clip(row, 0, self.sunlight.shape[0] - 2).astype(np.int32)
        right, lower = column - np.floor(column), row - np.floor(row)
        near, far = (self.sunlight[k, c] * (1 - right) + self.sunlight[k, c + 1] * right for k in (r, r + 1))
        sun = near * (1 - lower) + far * lower
        rotations, origins = self.frames(time)
        for a in np.nonzero(np.array(self.anchors)[:, 2])[0]:  # moving cars are not in the map: a soft blob below each
            right, _, ahead = rotations[a].T.astype(np.float32) @ (points - origins[a, :, None].astype(np.float32))
            blob = np.clip(3 - 2.6 * np.abs(right), 0, 1) * np.clip(5.5 - 2.2 * np.abs(ahead), 0, 1)
            sun = np.minimum(sun, 1 - blob)
        return self._reflect(colour, -self.sun[1] * sun, 0.55 + 0.45 * sun), label

    def _reflect(self, albedo: np.ndarray, sun: np.ndarray, sky: np.ndarray) -> np.ndarray:
        """Colour of surfaces that the given shares of the sun's and the sky's light reach."""
        return albedo * (sun * self.sun_colour[:, None] + sky * self.ambient[:, None])

    def _shade_solids(self, points: np.ndarray, eye: np.ndarray, footprint: np.ndarray, time: float, solid: np.ndarray,
                      face: np.ndarray) -> tuple:
        rotations, origins = (v.astype(np.float32) for v in self.frames(time))
        anchor, material = self.anchor[solid], self.material[solid]
        middle, half, colour = (np.take(v.T, solid, axis=1) for v in (self.middle, self.half, self.colour))
        x, y, z = points - np.take(origins.T, anchor, axis=1)
        cosine, sine = rotations[anchor, 0, 0], rotations[anchor, 0, 2]
        local = np.stack([cosine * x - sine * z, y, sine * x + cosine * z])
        offset = (local - middle) / half  # -1 to 1
        normal = self.normals[solid, np.minimum(face, BACK)].T.copy()
        curved = face == CURVED
        outward = offset[:, curved] / half[:, curved]
        outward[1] *= self.shape[solid[curved]] != "cylinder"
        normal[:, curved] = outward / np.linalg.norm(outward, axis=0)

        suns, eyes = self.sun @ rotations, np.einsum("aji,aj->ai", rotations, eye[:, 0] - origins)
        view = local - np.take(eyes.T, anchor, axis=1)
        slant = np.abs((normal * view).sum(axis=0)) / np.linalg.norm(view, axis=0)
        grazing = footprint / np.maximum(slant, 0.05)
        for number, name in enumerate(MATERIALS):
            shader, chosen = getattr(self, f"_{name}", None), np.nonzero(material == number)[0]
            if shader and len(chosen):
                hits = (v[..., chosen] for v in (colour, local, offset, solid, face, footprint, grazing))
                colour[:, chosen] = shader(*hits)
        sun = np.maximum((normal * np.take(suns.T, anchor, axis=1)).sum(axis=0), 0)
        sun = np.where(material == list(MATERIALS).index("leaves"), 0.25 + 0.6 * sun, sun)  # leaves scatter light
        sky = (0.8 - 0.25 * normal[1]) * np.clip(0.6 - 0.3 * local[1], 0.6, 1)  # less of it close to the ground
        return self._reflect(colour, sun, sky), MATERIAL_LABELS[material]

    def _wall(self, colour, local, offset, solid, face, footprint, grazing) -> np.ndarray:
        """Plaster or brick with storeys of windows, and on the ground floor shops or doors."""
        (bays, size, kind), extent, height = self.style[solid].T, 2 * self.half[solid].T, -local[1]
        span = np.where(face < FRONT, extent[2], extent[0])
        along = (np.where(face < FRONT, offset[2], offset[0]) + 1) * span / 2
        bay = span / np.maximum(np.round(span / (2.2 + 1.2 * bays)), 1)
        storey = extent[1] / np.maximum(np.round(extent[1] / 3.1), 1)
        column, floor = np.floor(along / bay), np.floor(height / storey)
        a, h = along - (column + 0.5) * bay, height - (floor + 0.52) * storey  # m from the middle of the window
        random = value_noise(column + np.floor(300 * size), floor + np.floor(300 * bays))

        course = np.floor(height / 0.2)
        brick = value_noise(np.floor(along / 0.4 + 0.5 * course), course) - 0.5
        plaster = 0.5 * grain(0.3, grazing, along, height)
        rough = np.where(kind < 0.4, brick / (1 + (6 * grazing) ** 2), plaster)
        colour = colour * (1 + 0.4 * grain(2.0, grazing, along + 50 * size, height) + 0.6 * rough)
        colour = mix(colour, (.42, .4, .37), 0.8 * stripe(h + 0.52 * storey, 0.12, footprint))  # a ledge on each storey

        shop = (floor == 0) & (kind > 0.65)
        wide, tall = np.where(shop, 0.42, 0.2 + 0.1 * size) * bay, np.where(shop, 0.36, 0.28) * storey
        frame = stripe(a, wide + 0.12, grazing) * stripe(h, tall + 0.12, footprint)
        bars = np.maximum(stripe(a, 0.04, grazing), stripe(h - 0.3, 0.04, footprint))
        glass = stripe(a, wide, grazing) * stripe(h, tall, footprint) * (1 - 0.9 * bars)
        pane = mix((.03, .04, .055), (.2, .25, .3), np.clip(0.4 + h / storey, 0, 1))
        pane = mix(pane, (.5, .47, .42), 0.6 * ((random > 0.5) & (h > (random - 0.7) * 3)))  # curtains
        pane = mix(pane, (.16, .08, .04), (floor == 0) & ~shop & (random < 0.25))  # doors
        return mix(mix(colour, (.6, .59, .56), frame * (bays > 0.3)), pane, glass)

    def _roof(self, colour, local, offset, solid, face, footprint, grazing) -> np.ndarray:
        rows = stripe(repeat(local[1], 0.3), 0.05, grazing)
        return colour * (1 - 0.3 * rows + 0.5 * grain(0.35, grazing, local[2], local[1]))

    def _leaves(self, colour, local, offset, solid, face, footprint, grazing) -> np.ndarray:
        clumps, leaf = grain(0.8, footprint, *(local + 30 * self.style[solid].T)), grain(0.16, footprint, *local)
        return colour * np.maximum(0.95 + 1.1 * clumps + 1.8 * leaf - 0.35 * offset[1], 0.1)  # darker below

    def _disc(self, colour, local, offset, solid, face, footprint, grazing) -> np.ndarray:
        """Light grey in the middle of a thin ellipsoid: where the offset along its thinnest axis is large."""
        thin = np.take_along_axis(offset, self.half[solid].argmin(axis=1)[None], axis=0)[0]
        return mix(colour, (.45, .45, .45), np.abs(thin) > 0.75)

    _sign = _tyre = _disc

    def _paint(self, colour, local, offset, solid, face, footprint, grazing) -> np.ndarray:
        """Bodywork with wheel arches, door seams, lights and number plates."""
        x, height, z = local[0], -local[1], local[2]
        flank, end = (face == RIGHT) | (face == LEFT), (face == FRONT) | (face == BACK)
        arch = np.hypot(np.abs(z) - 0.62 * self.half[solid, 2], height - 0.32) < 0.4
        seam = stripe(repeat(z + 0.05, 1.1), 0.02, grazing) * (np.abs(z) < 1.3)
        colour = mix(colour, (.015, .015, .015), flank * np.maximum(arch, 0.7 * seam))
        colour = mix(colour, (.03, .03, .03), 0.8 * stripe(height - 0.25, 0.12, footprint))
        lamp = end * stripe(np.abs(x) - 0.66, 0.14, footprint) * stripe(height - 0.74, 0.09, footprint)
        colour = mix(mix(colour, (.75, .75, .7), lamp * (face == FRONT)), (.5, .02, .02), lamp * (face == BACK))
        return mix(colour, (.7, .7, .65), end * stripe(x, 0.26, footprint) * stripe(height - 0.5, 0.06, footprint))

    def _cabin(self, colour, local, offset, solid, face, footprint, grazing) -> np.ndarray:
        """Windows between the pillars of a car."""
        x, y, z = np.abs(offset[0]), offset[1], np.abs(offset[2])
        flank = (z < 0.72 + 0.12 * y) & (z > 0.04)
        glass = np.where((face == RIGHT) | (face == LEFT), flank, x < 0.82) & (face != TOP) & (y > -0.8)
        return mix(colour, mix((.02, .025, .03), (.14, .17, .2), np.clip(-y, 0, 1)), glass)


# ---- writing KITTI's layout ------------------------------------------------------------------------------------------

def camera_matrix(height: int, width: int) -> np.ndarray:
    """Intrinsics (3, 3) in pixels with KITTI's field of view."""
    return np.array([[0.58 * width, 0, 0.5 * (width - 1)], [0, 0.58 * width, 0.48 * (height - 1)], [0, 0, 1]])


def lidar_scan(depth: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Points (n, 4) in the velodyne's frame: the depth at the pixels nearest to its beams in the camera's view."""
    elevation, azimuth = np.meshgrid(np.radians(np.linspace(-24.8, 2, 64)), np.radians(np.arange(-60, 60, 0.35)))
    u = np.rint(K[0, 0] * np.tan(azimuth) + K[0, 2]).astype(int)
    v = np.rint(-K[1, 1] * np.tan(elevation) / np.cos(azimuth) + K[1, 2]).astype(int)
    inside = (u >= 0) & (u < depth.shape[1]) & (v >= 0) & (v < depth.shape[0])
    u, v = u[inside], v[inside]
    rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones(len(u))], -1)
    close = depth[v, u] * np.linalg.norm(rays, axis=1) <= LIDAR_RANGE
    points = (rays[close] * depth[v, u][close, None] - LIDAR_TRANSLATION) @ LIDAR_ROTATION
    return np.insert(points, 3, 0.3, axis=1).astype(np.float32)  # a constant reflectance


def save_image(path: Path, image: np.ndarray) -> None:
    """Write a PNG, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=1)


def write_calibration(day: Path, K: np.ndarray, height: int, width: int) -> None:
    """Write KITTI's two calibration files; camera 0 coincides with camera 2."""
    size, right = [width, height], [-BASELINE * K[0, 0], 0, 0]
    cameras = {"S_rect_02": size, "R_rect_00": np.eye(3), "P_rect_02": np.c_[K, np.zeros(3)], "S_rect_03": size,
               "P_rect_03": np.c_[K, right]}
    day.mkdir(parents=True)
    for name, entries in (("cam_to_cam", cameras), ("velo_to_cam", {"R": LIDAR_ROTATION, "T": LIDAR_TRANSLATION})):
        lines = [f"{key}: " + " ".join(f"{v:e}" for v in np.ravel(values)) + "\n" for key, values in entries.items()]
        (day / f"calib_{name}.txt").write_text("".join(lines))


def render_drive(drive: Path, seed: int, frames: int, K: np.ndarray, height: int, width: int) -> None:
    """Render a drive with both cameras, and write its images, lidar scans and poses."""
    world, right = StreetWorld(seed), np.eye(4)
    right[0, 3] = BASELINE
    (drive / "velodyne_points" / "data").mkdir(parents=True)
    poses = [world.pose(frame) for frame in range(frames)]
    for frame, pose in enumerate(poses):
        view, name = world.render(pose, frame, K, height, width), f"data/{frame:010d}"
        save_image(drive / "image_02" / f"{name}.png", view["image"])
        save_image(drive / "image_03" / f"{name}.png", world.render(pose @ right, frame, K, height, width)["image"])
        lidar_scan(view["depth"], K).tofile(drive / "velodyne_points" / f"{name}.bin")
    np.savetxt(drive / "poses.txt", [pose[:3].ravel() for pose in poses], fmt="%.9e")


def render_labelled(folder: Path, seeds: range, numbers: range, K: np.ndarray, height: int, width: int) -> None:
    """Render one image of each world, somewhere along its street, and write them with their labels."""
    for seed, number in zip(seeds, numbers):
        world, time = StreetWorld(seed), 37 * number % 300
        view = world.render(world.pose(time), time, K, height, width)
        save_image(folder / "image_2" / f"{number:06d}_10.png", view["image"])
        save_image(folder / "semantic" / f"{number:06d}_10.png", view["label"])


def render_synthetic(root: str | Path, drives: int = 8, frames: int = 24, labelled: int = 200, height: int = 128,
                     width: int = 416, seed: int = 0, workers: int = 2) -> None:
    """Write the data set to `root`, which must not exist yet and appears only once everything is rendered.

    Each labelled image shows a world of its own, none that the drives show. Drives count from 9001, so that none is
    taken for one of KITTI's splits.
    """
    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(root.with_name(f"{root.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be rendering the same
        if root.exists():
            raise InputError(f"{root} exists already")
        unfinished = root.with_name(f"{root.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        day, camera = unfinished / "2011_09_26", (camera_matrix(height, width), height, width)
        write_calibration(day, *camera)
        seeds = range(1000 * seed, 1000 * (seed + 1))  # drives from the first on, labelled worlds from the middle on
        jobs = [partial(render_drive, day / f"{day.name}_drive_{9001 + i}_sync", seeds[i], frames, *camera)
                for i in range(drives)]
        jobs += [partial(render_labelled, unfinished / "training", seeds[500 + i:], range(i, min(i + 10, labelled)),
                         *camera) for i in range(0, labelled, 10)]
        with ProcessPoolExecutor(workers, get_context("fork")) as pool:
            for done in tqdm([pool.submit(job) for job in jobs], desc="rendering worlds", disable=None):
                done.result()
        unfinished.rename(root)


# ---------------------------------------------------------------------------------------------- by name

CLIPS = {"kitti": KittiRaw, "synthetic": KittiRaw, "cityscapes": CityscapesClips, "camvid": CamVidClips,
         "nyu": NyuClips, "frames": Frames, "packed": Packed, "random": RandomClips}
LABELLED = {"kitti": KittiSemantics, "synthetic": KittiSemantics, "cityscapes": Cityscapes, "camvid": CamVid,
            "nyu": Nyu, "nyu13": Nyu13, "voc": Voc, "ade20k": Ade20k, "random": RandomLabels}


def find_data(name: str, path: str | None, known: dict) -> tuple[type, str]:
    """Class and root folder of a data set; the synthetic one is rendered where it is missing."""
    if name not in known:
        raise InputError(f"--data {name}: unknown here, choose from {', '.join(known)}")
    path = path or os.path.join("data", name)
    if name == "synthetic" and not os.path.exists(path):
        try:
            render_synthetic(path)
        except InputError:
            if not os.path.exists(path):  # else another process was faster
                raise
    if not os.path.exists(path) and name != "random":
        raise InputError(f"{path}: no such folder; give the root of {name} with --data_path (README, Data: its layout)")
    return known[name], path


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    """Options that choose clips, of training and packing."""
    group = parser.add_argument_group("clips")
    group.add_argument("--data", default="synthetic", help=f"one of {', '.join(CLIPS)}")
    group.add_argument("--frames", type=parse_range, default=(None, None), metavar="A:B",
                       help="of each drive or folder only frames A to B - 1 (KITTI: by number; else counted from 0)")
    group.add_argument("--drives", nargs="+", metavar="NAME", help="only these drives or folders, not the split's")
    group.add_argument("--min_motion", type=within(float, 0, 255), default=0, metavar="X",
                       help="leave out targets that differ from a source frame by less than X on average, of 255 "
                            "(try 2 where the camera stands still)")
    group.add_argument("--fov", type=within(float, 1, 178),
                       help="horizontal field of view in degrees, where the images come without intrinsics; with "
                            "--intrinsics learned, whatever they come with, the first guess")
    group.add_argument("--depth_scale", type=within(float, 1e-3), default=1000,
                       help="of --data frames: depth PNG value of one metre")
    group.add_argument("--cache", metavar="FOLDER",
                       help="read images and depth from a packed copy in this folder, decoded and resized once; what "
                            "it lacks, or shows in an earlier state, is packed first")


def find_clips(args: argparse.Namespace, frame_ids: list[str], with_depth: bool, fov: float | None = None,
               **options) -> Clips:
    """The clips that the options ask for; frame_ids: the target's "0", the sources' offsets, "s" the other camera."""
    cls, root = find_data(args.data, args.data_path, CLIPS)
    if args.cache and cls in (Packed, RandomClips):
        raise InputError(f"--data {args.data} has no images to pack")
    if issubclass(cls, Frames):
        options |= {"fov": args.fov or fov, "depth_scale": args.depth_scale}
    dataset = cls(root, frame_ids, drives=args.drives, frames=tuple(args.frames), with_depth=with_depth,
                  height=args.height, width=args.width, min_motion=args.min_motion, **options)
    return packed(dataset, args.cache) if args.cache else dataset


def parse_range(text: str) -> tuple[int | None, int | None]:
    """From "A:B" (A, B); either may be missing."""
    match = re.fullmatch(r"(\d{0,9}):(\d{0,9})", text)
    start, stop = (int(part) if part else None for part in match.groups()) if match else (0, 0)
    if stop is not None and (start or 0) >= stop:
        raise argparse.ArgumentTypeError(f"{text!r} is no range like 0:100")
    return start, stop


def picture_path(text: str) -> str:
    """A type for options that name a picture to write."""
    if not text.lower().endswith(IMAGE_EXTENSIONS):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png or .jpg")
    return text


# ---------------------------------------------------------------------------------------------- walking a data set

STATIC = 2.0  # of 255: a target whose thumbnail differs less from a source's counts as near-static


def walk(dataset: Clips | Labelled, workers: int) -> list[dict]:
    """`inspect` of every sample, in the order of the files, as neighbours share theirs."""
    first = [sample["images"][0] for sample in dataset.samples] if isinstance(dataset, Clips) else dataset.pairs
    order, rows = sorted(range(len(dataset)), key=first.__getitem__), []
    loader = DataLoader(order, 32, num_workers=workers, collate_fn=lambda part: [dataset.inspect(i) for i in part])
    for part in tqdm(loader, desc="check", unit_scale=32, disable=None):
        rows += part
    return rows


def describe(dataset: Clips | Labelled, rows: list[dict]) -> list[str]:
    """What `walk` found, in lines: sizes; intrinsics, motion and measured depth of clips; classes of labels."""
    def tally(values: Iterable) -> str:
        return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common(6)) or "none"

    sound = [row for row in rows if "size" in row]
    lines = ["sizes: " + tally("{1}x{0}".format(*row["size"]) for row in sound)]
    other = [row for row in sound if row.get("label", row["size"]) != row["size"]]
    if other:
        lines.append("labels of another size than their image: " + tally("{1}x{0}".format(*r["label"]) for r in other))
    if isinstance(dataset, Labelled):
        pixels = torch.stack([row["pixels"] for row in sound] or [torch.zeros(256)])
        shares, images = pixels.sum(0) / pixels.sum(), (pixels > 0).sum(0)
        return lines + [f"{name:20} {shares[c]:7.2%} of the pixels, in {images[c]} images"
                        for c, name in (*enumerate(dataset.classes), (IGNORE, "unlabelled"))]
    lines.append("intrinsics: "
                 + tally("fx {0:.1f} fy {4:.1f} cx {2:.1f} cy {5:.1f}".format(*row["K"]) for row in sound))
    if sound and np.isfinite(sound[0]["motion"]):
        share = np.mean([row["motion"] < STATIC for row in sound])
        lines.append(f"near-static: {share:.1%} of the targets, which --min_motion {STATIC:g} would leave out")
    measured = [row for row in rows if "depth" in row]
    if measured:
        low, middle, high = np.percentile(np.concatenate([row["depth"] for row in measured]), (0.1, 50, 99.9))
        lines.append(f"measured depth: {np.mean([row['share'] for row in measured]):.1%} of the pixels, median "
                     f"{middle:.2f} m, nearest and farthest 0.1 % at {low:.2f} and {high:.2f} m")
    return lines


def view(dataset: Clips | Labelled, index: int, width: int = 320) -> tuple[str, torch.Tensor]:
    """The image file of a sample and its pictures side by side, (3, h, n * width) in [0, 1].

    Image and label; or target, sources and measured depth.
    """
    from evaluate import colour_depth, colour_labels  # which imports this module
    if isinstance(dataset, Labelled):
        path, (image, label) = dataset.pairs[index][0], dataset.native(index)
        pictures = [image / 255, colour_labels(label[None], dataset.colours)[0]]
    else:
        record = dataset.samples[index]
        path, pictures = record["images"][0], [read_image(path) / 255 for path in record["images"]]
    size = [round(width * pictures[0].shape[1] / pictures[0].shape[2]), width]
    pictures = [resize(picture, size, antialias=True) for picture in pictures]
    if isinstance(dataset, Clips) and dataset.with_depth:
        depth = torch.from_numpy(resize_depth(dataset.depth_map(record["depth"]), *size))[None, None]
        pictures.append(colour_depth(depth.where(depth > 0, depth.max()))[0] * (depth[0] > 0))
    return path, torch.cat(pictures, 2)


def contact_sheet(tiles: list[tuple[str, torch.Tensor]], title: str, legend: list[tuple[tuple, str]]) -> Image.Image:
    """One picture of captioned tiles, (3, h, w) in [0, 1], in columns, with a legend of (colour, name) below."""
    from evaluate import to_picture
    gap, line = 8, 22
    height, width = max(t.shape[1] for _, t in tiles) + line + gap, max(t.shape[2] for _, t in tiles) + gap
    columns = max(1, min(len(tiles), 1960 // width))
    across, top, rows = max(1, columns * width // 170), 40, -(-len(tiles) // columns)
    bottom = top + rows * height + gap
    sheet = Image.new("RGB", (columns * width + gap, bottom + -(-len(legend) // across) * line + gap), (24, 24, 24))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((gap, 9), title, "white", ImageFont.load_default(18))
    for i, (caption, picture) in enumerate(tiles):
        x, y = gap + i % columns * width, top + i // columns * height
        sheet.paste(to_picture(picture), (x, y))
        draw.text((x, y + picture.shape[1] + 1), caption, (200, 200, 200), font)
    for i, (colour, name) in enumerate(legend):
        x, y = gap + i % across * 170, bottom + i // across * line
        draw.rectangle((x, y + 2, x + 26, y + 16), tuple(colour), (90, 90, 90))
        draw.text((x + 34, y + 1), name, "white", font)
    return sheet


def check_command(args: argparse.Namespace) -> int:
    """Walk a data set before a run; exit code 2 when something is broken, all of which is listed."""
    cls, root = find_data(args.data, args.data_path, LABELLED if args.labels else CLIPS)
    if cls in (Packed, RandomClips) or args.cache:
        raise InputError("--data packed, --data random and --cache: check the files before they are packed")
    makers = {split: partial(cls, root, split, height=64, width=64) for split in ("train", "val")}
    if not args.labels:
        makers = {"clips": partial(find_clips, args, [str(f) for f in args.frame_ids], args.depth, fov=60.0)}
    problems, tiles, legend = [], [], []
    for part, make in makers.items():
        try:
            dataset = make()
        except InputError as error:
            problems.append(f"{part}: {error}")
            continue
        rows = walk(dataset, args.num_workers)
        left_out = f", left out: {dataset.dropped}" if not args.labels and dataset.dropped else ""
        print("\n  ".join([f"{part}: {len(dataset)} samples of {root}{left_out}", *describe(dataset, rows)]))
        problems += dict.fromkeys(problem for row in rows for problem in row["problems"])
        sound = [row["index"] for row in rows if "size" in row]
        for index in sound[::max(1, len(sound) // 9)][:9]:
            path, picture = view(dataset, index)
            tiles.append((f"{part}: {os.path.relpath(path, root)}", picture))
        legend = [*zip(dataset.colours, dataset.classes), ((0, 0, 0), "unlabelled")] if args.labels else []
    if tiles and args.output:
        what = "image, label" if args.labels else f"frames {args.frame_ids}{', measured depth' * args.depth}"
        contact_sheet(tiles, f"{args.data} at {root}: {what}", legend).save(args.output)
        print(f"{len(tiles)} samples -> {args.output}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"broken: {len(problems)}" if problems else "everything can be read")
    return 2 if problems else 0


def pack_command(args: argparse.Namespace) -> None:
    """Pack clips, and list them, so that they can be read without the files that they are made of."""
    args.cache = args.output
    dataset = find_clips(args, args.frame_ids, args.depth)
    path = os.path.join(dataset.folder, f"clips_{','.join(args.frame_ids)}.npy")
    write_atomically(path, lambda file: np.save(file, dataset.clips))
    print(f"{path}: {len(dataset)} clips of {dataset.name}" + f" (left out: {dataset.dropped})" * bool(dataset.dropped))


def benchmark_command(args: argparse.Namespace) -> None:
    """Read batches as a training does, flipped and jittered; the last line is a JSON object."""
    args.seed, args.on_bad_sample, args.device = 0, "stop", "cpu"
    dataset = find_clips(args, args.frame_ids, with_depth=False, augment=True)
    generator, start, args.steps = torch.Generator().manual_seed(0), 0.0, args.steps + 2
    for step, batch in enumerate(train_loader(dataset, args, 0)):
        color_jitter(to_device(batch, torch.device("cpu"))["frames"], generator)
        if step == 1:
            start = time.perf_counter()
    seconds = (time.perf_counter() - start) / (args.steps - 2)
    record = {"samples_per_s": args.batch_size / seconds, "ms_per_batch": 1000 * seconds,
              "device": f"cpu, {torch.get_num_threads()} threads"}
    print(f"{record['samples_per_s']:.1f} samples of {len(args.frame_ids)} frames a second from {dataset.name}")
    print(json.dumps({**record, "options": {k: v for k, v in vars(args).items() if k != "run"}}))


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    render = commands.add_parser("render", help="write the synthetic street world in KITTI's layout")
    render.add_argument("--data_path", default="data/synthetic")
    render.add_argument("--drives", type=within(int, 1), default=8, help="for pre-training, each another street")
    render.add_argument("--frames", type=within(int, 1), default=24, help="stereo pairs a drive")
    render.add_argument("--labelled", type=within(int, 2), default=200, help="labelled images, of other streets")
    render.add_argument("--height", type=within(int, 32, 8192), default=128)
    render.add_argument("--width", type=within(int, 32, 8192), default=416)
    render.add_argument("--seed", type=within(int, 0), default=0)
    render.add_argument("--workers", type=within(int, 1, 256), default=2, help="processes")
    render.set_defaults(run=lambda args: render_synthetic(
        args.data_path, args.drives, args.frames, args.labelled, args.height, args.width, args.seed, args.workers))
    check = commands.add_parser("check", help="walk a data set before a run: what is there, and what is broken")
    add_clip_options(check)
    check.add_argument("--data_path", help="root folder of the data set (default: data/<name of the data set>)")
    check.add_argument("--labels", action="store_true", help="labelled images for train_seg.py, not clips")
    check.add_argument("--frame_ids", type=within(int, -1000, 1000), nargs="+", default=[0, -1, 1],
                       help="of clips (default: 0 -1 1)")
    check.add_argument("--depth", action="store_true", help="walk the measured depth as well")
    check.add_argument("--num_workers", type=within(int, 0, 256), default=2, help="loader processes")
    check.add_argument("--output", type=picture_path, metavar="contact.png", help="write a picture of some samples")
    check.set_defaults(run=check_command, height=64, width=64)
    benchmark = commands.add_parser("benchmark", help="how many samples a second the loader makes, with jitter on half")
    pack = commands.add_parser("pack", help="write a packed copy, for --cache, or to train on alone with --data packed")
    for command in (pack, benchmark):
        add_clip_options(command)
        command.add_argument("--data_path", help="root folder of the data set (default: data/<name of the data set>)")
        command.add_argument("--height", type=within(int, 64, 8192), default=192, help="pixels")
        command.add_argument("--width", type=within(int, 64, 8192), default=640, help="pixels")
        command.add_argument("--frame_ids", nargs="+", default=["0", "-1", "1"], metavar="ID",
                             help="target, source frames, and s for the other camera: those of a training, or more")
    pack.add_argument("--depth", action="store_true", help="measured depth as well")
    pack.add_argument("--output", required=True, metavar="FOLDER", help="what --cache or --data_path then names")
    pack.set_defaults(run=pack_command)
    benchmark.add_argument("--batch_size", type=within(int, 1), default=12)
    benchmark.add_argument("--num_workers", type=within(int, 0, 256), default=0, help="loader processes; 0 for none")
    benchmark.add_argument("--steps", type=within(int, 1), default=10, help="batches")
    benchmark.set_defaults(run=benchmark_command)
    unpack = commands.add_parser("unpack", help="write NYU-v2's labelled images from its .mat files (h5py, scipy)")
    unpack.add_argument("--data_path", default="data/nyu", help="folder of the .mat files; the images go there as well")
    unpack.set_defaults(run=lambda args: unpack_nyu(args.data_path))
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    run_main(main)
