"""Batches: which samples make up a step, the joint transform, the way to the device, a cache.

Crops and mirror images change pixels, depth, labels, intrinsics and the other camera in one
function. Every draw follows from seed and step, so that a continued training sees what an
uninterrupted one sees, bit for bit, on a CPU or a GPU.
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import signal
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from images import Size, resize_label
from utils import IGNORE, SIGNALS, InputError, processes, rank, save_json

GPU_SHARE = 0.6  # of a GPU's free memory, which data may take
SHARED_MEMORY = "/dev/shm"
NEUTRAL = 0.45  # of removed pixels, and around an image that is smaller than its crop: a ResNet's mean


# ---- which samples -----------------------------------------------------------------------------

class StepBatches(Sampler):
    """Batches of (index, draw) for steps `start` to `stop`: shuffled epochs without a break.

    A draw is the sample's (seed, position). Of several processes each has its rows of a batch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int, stop: int):
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.steps = range(start, stop)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple]]:
        epoch = -1
        for step in self.steps:
            batch = []
            first = step * self.batch_size
            for position in range(first, first + self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    rng = np.random.default_rng([self.seed, epoch, 1])  # 1: not a sample's draw
                    order = rng.permutation(self.size)
                index = int(order[position % self.size])
                batch.append((index, (self.seed, position)))
            yield batch[rank()::processes()]


class Samples(Dataset):
    """What clips and labelled images have in common.

    arrays: None where samples are read from their files, else name -> (values, rows), where
    sample i has values[rows[i]], or values[i] if rows is None.
    """

    size: Size
    arrays: dict[str, tuple] | None = None
    camera_of: Tensor | None = None  # the number of each sample's camera, see `find_cameras`

    def targets(self) -> list[str]:
        """The image file of every sample; of a clip, the target's."""
        raise NotImplementedError

    def identity(self) -> str:
        """Tells data sets apart wherever they lie: number and checksum of the images that train.

        The checksum is of their names, the sizes of the first, the middle and the last, and of what
        `geometry` says.
        """
        paths = [os.path.abspath(path) for path in self.targets()]
        root = os.path.commonpath(paths)
        names = [os.path.relpath(path, root) for path in paths]
        sizes = [os.path.getsize(paths[i]) for i in (0, len(paths) // 2, -1)]
        code = zlib.crc32(repr((names, sizes, *self.geometry())).encode())
        return f"{len(paths)} ({code:08x})"

    def geometry(self) -> list:
        """What is known of the samples beside their images."""
        return []

    def read(self, index: int) -> dict[str, Tensor]:
        """A sample before augmentation."""
        raise NotImplementedError

    def in_memory(self) -> dict[str, tuple] | None:
        """The arrays, if the samples need not be read from files."""
        return self.arrays

    def gather(self, indices: list[int]) -> dict[str, Tensor]:
        """A batch before augmentation."""
        if self.arrays is not None:
            return gather(self.arrays, torch.tensor(indices))
        samples = [self.read(index) for index in indices]
        batch = {}
        for key in samples[0].keys() - {"index"}:
            batch[key] = torch.stack([sample[key] for sample in samples])
        return batch


def gather(arrays: dict[str, tuple], indices: Tensor) -> dict[str, Tensor]:
    """The samples `indices` (B,) of arrays on the same device."""
    batch = {}
    for name, (values, rows) in arrays.items():
        where = indices if rows is None else rows[indices]
        batch[name] = values[where]
    return batch


# ---- the joint transform of a batch: scale, crop, mirror image ----------------------------------

class View(NamedTuple):
    """How a sample is augmented: resized by `scale`, cropped at (top, left), then mirrored."""

    mirrored: bool
    scale: float
    top: int
    left: int


def draw_view(draw: tuple[int, int], size: Size, crop: Size | None,
              scale: tuple[float, float] | None) -> View:
    """The view of a sample of (height, width): a function of `draw`, its (seed, position)."""
    rng = np.random.default_rng(draw)
    mirrored = bool(rng.random() < 0.5)
    if crop is None:
        return View(mirrored, 1.0, 0, 0)
    factor = float(rng.uniform(*scale)) if scale else 1.0
    height, width = scaled_size(size, factor)
    top = rng.integers(max(height - crop[0], 0) + 1)
    left = rng.integers(max(width - crop[1], 0) + 1)
    return View(mirrored, factor, int(top), int(left))


def scaled_size(size: Size, factor: float) -> Size:
    height, width = size
    return round(factor * height), round(factor * width)


def rescale(image: Tensor, label: Tensor, factor: float,
            crop: Size) -> tuple[Tensor, Tensor]:
    """Image (3, H, W) and label (H, W) resized by a factor, and padded to the crop's size."""
    height, width = scaled_size(label.shape, factor)
    smaller = factor < 1
    size = (height, width)
    image = F.interpolate(image[None].float(), size, mode="bilinear", antialias=smaller)[0]
    label = resize_label(label, size)
    below = max(crop[0] - height, 0)
    right = max(crop[1] - width, 0)
    padding = (0, right, 0, below)
    image = F.pad(image, padding, value=255 * NEUTRAL)
    label = F.pad(label, padding, value=IGNORE)
    return image, label


def augment(batch: dict, views: list[View], crop: Size | None) -> dict:
    """Scales, crops and mirrors a batch: images, depth, labels, K and stereo pose alike.

    Maps (B, ..., H, W), K (B, 3, 3), stereo_T (B, 4, 4), all on one device. Adds "mirrored" (B,).
    """
    batch = dict(batch)
    maps = [key for key in ("frames", "image", "depth", "label") if key in batch]
    device = batch[maps[0]].device
    if any(view.scale != 1 for view in views):
        rows = zip(batch["image"], batch["label"], views)
        scaled = [rescale(image, label, view.scale, crop) for image, label, view in rows]
        batch["image"], batch["label"] = zip(*scaled)  # of several sizes, until they are cropped
    if crop is not None:
        for key in maps:
            batch[key] = crop_each(batch[key], views, crop)
    flips = torch.tensor([view.mirrored for view in views])
    mirrored = to_device(flips, device)
    for key in maps:
        flipped = batch[key].flip(-1)
        where = expand(mirrored, flipped)
        batch[key] = torch.where(where, flipped, batch[key])
    if "K" in batch:
        corners = torch.tensor([(view.left, view.top) for view in views])
        corners = to_device(corners, device)
        width = batch[maps[0]].shape[-1]
        batch["K"] = move_intrinsics(batch["K"], corners, mirrored, width)
    if "stereo_T" in batch:
        T = batch["stereo_T"].clone()
        x = T[:, 0, 3]
        T[:, 0, 3] = torch.where(mirrored, -x, x)  # the other camera changes side
        batch["stereo_T"] = T
    batch["mirrored"] = mirrored
    return batch


def crop_each(maps: Tensor, views: list[View], crop: Size) -> Tensor:
    """The crop (height, width) of each map (..., H, W) where its view says: (B, ..., h, w)."""
    height, width = crop
    cropped = []
    for one, view in zip(maps, views):
        rows = slice(view.top, view.top + height)
        columns = slice(view.left, view.left + width)
        cropped.append(one[..., rows, columns])
    return torch.stack(cropped)


def move_intrinsics(K: Tensor, corners: Tensor, mirrored: Tensor,
                    width: int) -> Tensor:
    """K (B, 3, 3) of crops at corners (B, 2), x and y, some of which (B,) are then mirrored."""
    K = K.clone()
    K[:, :2, 2] -= corners
    cx = K[:, 0, 2]
    K[:, 0, 2] = torch.where(mirrored, width - 1 - cx, cx)
    return K


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) as (B, 1, ..., 1), to go with a tensor (B, ...)."""
    ones = [1] * (like.dim() - 1)
    return values.view(-1, *ones)


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; the CPU does not wait for what a GPU is doing."""
    if device.type == "cuda" and value.device.type == "cpu" and not value.is_pinned():
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


# ---- colour jitter and removed patches: drawn on the CPU, applied on the device ----------------

def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def seed_dropout(seed: int, step: int) -> None:
    """What networks draw themselves (DeepLabV3's dropout) follows from seed and step as well."""
    torch.manual_seed(step_generator(seed, step).initial_seed() + 2**31)  # not jitter's numbers


def draw_uniform(count: int, columns: int, generator: torch.Generator) -> Tensor:
    """This process's rows (count, columns) of what is drawn for the batch of all processes."""
    drawn = torch.rand(count * processes(), columns, generator=generator)
    return drawn[rank()::processes()]


def draw_jitter(count: int, seed: int, step: int) -> Tensor:
    """Random numbers (count, 5) in [0, 1] of this process's samples, for `color_jitter`."""
    return draw_uniform(count, 5, step_generator(seed, step))


def color_jitter(frames: Tensor, draws: Tensor, strength: float = 0.2,
                 hue: float = 0.1, probability: float = 0.5) -> Tensor:
    """Varies brightness, contrast, saturation (by `strength`) and hue (in turns) of some samples.

    frames: (B, F, 3, H, W) or (B, 3, H, W) in [0, 1]; draws: (B, 5), a row for all frames of a
    sample. For the networks only: losses compare the frames as they are.
    """
    chosen = draws[:, 0] < probability
    change = 2 * draws[:, 1:] - 1  # (B, 4), from -1 to 1
    brightness = expand(1 + strength * change[:, 0], frames)
    contrast = expand(1 + strength * change[:, 1], frames)
    saturation = expand(1 + strength * change[:, 2], frames)
    shift = expand(hue * change[:, 3], frames[..., 0, :, :])
    x = (frames * brightness).clamp(0, 1)
    mean = luma(x).mean((-2, -1), keepdim=True)
    x = torch.lerp(mean, x, contrast).clamp(0, 1)
    x = torch.lerp(luma(x), x, saturation).clamp(0, 1)
    x = shift_hue(x, shift)
    return torch.where(expand(chosen, frames), x, frames)


def luma(images: Tensor) -> Tensor:
    """The grey of colours (..., 3, H, W), (..., 1, H, W)."""
    red, green, blue = images.split(1, -3)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotates hue by `shift` turns in HSV space.

    images: (..., 3, H, W) in [0, 1]; shift broadcasts with (..., H, W).
    """
    red, green, blue = images.unbind(-3)
    value = images.amax(-3)
    chroma = value - images.amin(-3)
    safe = chroma.clamp(min=1e-8)
    from_green = 2 + (blue - red) / safe
    from_blue = 4 + (red - green) / safe
    hue = torch.where(value == green, from_green, from_blue)
    hue = torch.where(value == red, (green - blue) / safe, hue)
    hue = hue + 6 * shift  # in sixths of a turn
    channels = []
    for n in (5, 3, 1):
        k = (n + hue) % 6
        away = torch.minimum(k, 4 - k).clamp(0, 1)
        channels.append(value - chroma * away)
    return torch.stack(channels, -3)


def draw_patches(shape: tuple, seed: int, step: int, kind: str = "rectangles") -> Tensor:
    """Pixels (B, 1, H, W) bool to remove for the reconstruction baseline; shape: (B, ..., H, W).

    "patches": 7x7 squares until about 0.1 to 1 % of the pixels are gone (the authors' release);
    "rectangles": one to four rectangles of 10 to 50 % of each side (the paper).
    """
    B = shape[0]
    H, W = shape[-2:]
    generator = step_generator(seed, step)
    draw_uniform(B, 5, generator)  # what jitter draws from the same seed
    if kind == "patches":
        most = max(1, math.ceil(0.01 * H * W / 49))
        share = 0.1 + 0.9 * draw_uniform(B, 1, generator)  # of 1 % of the pixels
        count = (share * 0.01 * H * W / 49).ceil()  # squares of 49 pixels
        height = torch.full((B, most), 7.0)
        width = height
    else:
        most = 4
        count = (most * draw_uniform(B, 1, generator)).ceil()
        height = (0.1 + 0.4 * draw_uniform(B, most, generator)) * H
        width = (0.1 + 0.4 * draw_uniform(B, most, generator)) * W
    top = (draw_uniform(B, most, generator) * (H - height)).floor()
    left = (draw_uniform(B, most, generator) * (W - width)).floor()
    used = torch.arange(most) < count  # (B, most)
    in_rows = between(torch.arange(H), top, top + height)  # (B, most, H)
    in_rows &= used[..., None]
    in_columns = between(torch.arange(W), left, left + width)  # (B, most, W)
    covered = torch.einsum("bnh,bnw->bhw", in_rows.float(), in_columns.float())
    return covered[:, None] > 0


def between(positions: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Whether positions (N,) lie from low to below high, both (B, M): (B, M, N)."""
    return (positions >= low[..., None]) & (positions < high[..., None])


# ---- how they reach the device -----------------------------------------------------------------

def train_batches(dataset: Samples, args: argparse.Namespace, start: int,
                  device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Batches on the device for steps `start` to args.steps, cropped and mirrored.

    Clips: "frames" (B, F, 3, H, W) in [0, 1], target first, "K" (B, 3, 3), "stereo_T"? (B, 4, 4),
    "depth"? (B, 1, H, W) metres, "camera"? (B,). Labelled images: "image" (B, 3, H, W), "label"
    (B, H, W) int64. Both: "mirrored" (B,) bool, and for the caller "index" (B,), on the CPU, and
    "waited", the seconds that the batch was waited for.
    """
    steps = StepBatches(len(dataset), args.batch_size, args.seed, start, args.steps)
    arrays = on_device(dataset, device)
    if arrays is not None:
        source = gather_steps(arrays, steps, device)
    else:
        check_shared_memory(dataset, args)
        source = DataLoader(
            WholeBatches(dataset), batch_size=None, sampler=steps, num_workers=args.num_workers,
            multiprocessing_context="fork" if args.num_workers else None,  # data sets do not pickle
            worker_init_fn=ignore_signals, pin_memory=device.type == "cuda")
    return finish(dataset, args, zip(steps, source), device)


def check_fit(args: argparse.Namespace, samples: int, size: Size) -> None:
    """Refuses a batch that is larger than the data, and a crop that is larger than the image."""
    if samples < getattr(args, "batch_size", 1):
        raise InputError(f"--batch_size {args.batch_size} is larger than the data, {samples} samples")
    crop = getattr(args, "crop", None)
    if crop and (crop[0] > size[0] or crop[1] > size[1]):
        raise InputError(f"--crop {crop[0]} {crop[1]} is larger than the image "
                         f"({size[0]} x {size[1]})")


def on_device(dataset: Samples, device: torch.device) -> dict[str, tuple] | None:
    """The data set's arrays on the device, or None where loader processes are to read samples."""
    arrays = dataset.in_memory()
    if arrays is None or device.type == "cpu":
        return arrays
    need = sum(values.nbytes for values, _ in arrays.values())
    free = torch.cuda.mem_get_info(device)[0]
    fits = need < GPU_SHARE * free
    place = "in the GPU's memory" if fits else "read from main memory, too large for the GPU's"
    print(f"data: {need / 1e9:.2f} GB {place} ({free / 1e9:.1f} GB free)")
    if not fits:
        return None
    moved = {}
    for name, (values, rows) in arrays.items():
        rows = None if rows is None else rows.to(device)
        moved[name] = (values.to(device), rows)
    return moved


def gather_steps(arrays: dict[str, tuple], steps: StepBatches, device: torch.device) -> Iterator:
    for batch in steps:
        indices = torch.tensor([index for index, _ in batch])
        yield gather(arrays, to_device(indices, device))


class WholeBatches(Dataset):
    """Batches by their lists of (index, draw), for loader processes.

    What is wrong with a file comes back as a value: an exception would bring its traceback.
    """

    def __init__(self, dataset: Samples):
        self.dataset = dataset

    def __getitem__(self, batch: list[tuple]) -> dict:
        try:
            return self.dataset.gather([index for index, _ in batch])
        except InputError as error:
            return {"error": str(error)}


def ignore_signals(worker: int) -> None:
    """Loader processes outlive the signals that a scheduler sends to all: the run ends them."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def check_shared_memory(dataset: Samples, args: argparse.Namespace) -> None:
    """Refuses loader processes whose batches do not fit into shared memory (Docker: 64 MB)."""
    if args.num_workers == 0 or not os.path.isdir(SHARED_MEMORY):
        return
    sample = dataset.gather([0])
    size = sum(value.nbytes for value in sample.values()) * args.batch_size / processes()
    need = (2 * args.num_workers + 1) * size  # each prepares two
    free = shutil.disk_usage(SHARED_MEMORY).free
    if need > free:
        raise InputError(
            f"{SHARED_MEMORY}: --num_workers {args.num_workers} needs {need / 1e6:.0f} MB, "
            f"{free / 1e6:.0f} MB are free: use --num_workers 0, or start Docker with --shm-size=2g")


def finish(dataset: Samples, args: argparse.Namespace, source: Iterator,
           device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Augments batches on the device; images become floats in [0, 1] there."""
    crop = getattr(args, "crop", None)
    scale = getattr(args, "scale", None)
    for waited, (step, batch) in timed(source):
        if "error" in batch:
            raise InputError(batch["error"])
        indices = torch.tensor([index for index, _ in step])
        views = [draw_view(draw, dataset.size, crop, scale) for _, draw in step]
        batch = {key: to_device(value, device) for key, value in batch.items()}
        if "depth" in batch:  # a cache holds all rows
            batch["depth"] = dataset.keep_rows(batch["depth"])
        batch = augment(batch, views, crop)
        for key in ("frames", "image"):
            if key in batch:
                batch[key] = batch[key].float() / 255
        if "label" in batch:
            batch["label"] = batch["label"].long()
        if dataset.camera_of is not None:
            batch["camera"] = to_device(dataset.camera_of[indices], device)
        batch["index"] = indices
        batch["waited"] = waited
        yield batch


def timed(source: Iterable) -> Iterator[tuple[float, object]]:
    """Each item after the seconds that it was waited for."""
    began = time.perf_counter()
    for item in source:
        yield time.perf_counter() - began, item
        began = time.perf_counter()


# ---- the cache ---------------------------------------------------------------------------------

class Row(NamedTuple):
    """What a row of the cache holds: an array that is read from some files."""

    files: tuple[str, ...]
    read: Callable[[], tuple[Tensor, Size]]  # the array, and the (height, width) of the file


class Cache:
    """Decoded and resized files as the rows of one array, <folder>/<kind>.npy, mapped, not read.

    rows: key -> Row. What the folder lacks, or was made of files that have changed since, is
    decoded; the folder is then replaced as a whole. Raises InputError where the disk lacks the
    room, and where the folder is damaged.
    """

    def __init__(self, folder: str, kind: str, rows: dict[str, Row]):
        self.folder = os.path.join(folder, kind)
        self.kind = kind
        self.rows = rows
        state = cache(file_state)
        self.states = {key: " ".join(map(state, row.files)) for key, row in rows.items()}
        with locked(self.folder):
            self.index = self.read_index()  # key -> [row, state of its files, height, width]
            missing = [key for key in rows if self.index.get(key, (0, ""))[1] != self.states[key]]
            if missing:
                self.write(missing)
            self.array = self.open_array()
        for key in list(rows)[::1 + len(rows) // 3]:  # a few, as the whole would take too long
            values, _ = rows[key].read()
            if not torch.equal(self.array[self.index[key][0]], values):
                raise self.damaged()

    def row(self, key: str) -> int:
        return self.index[key][0]

    def native_size(self, key: str) -> Size:
        _, _, height, width = self.index[key]
        return height, width

    def damaged(self) -> InputError:
        return InputError(f"the cache {self.folder} is damaged: delete it, and it will be made anew")

    def read_index(self) -> dict[str, list]:
        if not os.path.isdir(self.folder):
            return {}
        try:
            with open(os.path.join(self.folder, "index.json")) as file:
                index = json.load(file)
        except (OSError, ValueError):
            raise self.damaged() from None
        if not isinstance(index, dict):
            raise self.damaged()
        return index

    def open_array(self) -> Tensor:
        """The array (N, ...) of the index."""
        try:
            array = np.load(os.path.join(self.folder, f"{self.kind}.npy"), mmap_mode="r")
        except (OSError, ValueError, EOFError):
            raise self.damaged() from None
        if len(array) != len(self.index):
            raise self.damaged()
        with warnings.catch_warnings(action="ignore"):  # that nobody may write to it
            return torch.from_numpy(array)

    def write(self, missing: list[str]) -> None:
        """Writes a new folder beside the old one, and puts it in its place."""
        example, _ = self.rows[missing[0]].read()
        count = len(self.index)
        index = dict(self.index)
        for key in missing:
            row = index[key][0] if key in index else len(index)
            index[key] = [row]
        self.check_disk_space(len(missing), len(index) * example.nbytes)
        new = f"{self.folder}.new"
        shutil.rmtree(new, ignore_errors=True)
        os.makedirs(new)
        path = os.path.join(new, f"{self.kind}.npy")
        try:
            array = np.lib.format.open_memmap(
                path, "w+", dtype=example.numpy().dtype, shape=(len(index), *example.shape))
            if hasattr(os, "posix_fallocate"):  # a disk that fills up later would end the process
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        except OSError as error:
            raise InputError(f"the cache {self.folder}: {error.strerror}") from None
        if count:
            array[:count] = self.open_array().numpy()
        self.decode(missing, index, array)
        array.flush()
        save_json(os.path.join(new, "index.json"), index)
        old = f"{self.folder}.old"
        shutil.rmtree(old, ignore_errors=True)
        if count:
            os.rename(self.folder, old)
        os.rename(new, self.folder)
        shutil.rmtree(old, ignore_errors=True)
        self.index = index

    def check_disk_space(self, count: int, need: int) -> None:
        free = shutil.disk_usage(os.path.dirname(self.folder)).free
        print(f"cache: decoding {count} files into {self.folder}, {need / 1e9:.2f} GB of the "
              f"{free / 1e9:.1f} GB that are free")
        if need > free:
            raise InputError(f"the cache {self.folder} needs {need / 1e9:.2f} GB, "
                             f"{free / 1e9:.2f} GB are free")

    def decode(self, keys: list[str], index: dict[str, list], array: np.ndarray) -> None:
        """Fills rows of the array and of the index."""
        def fill(key: str) -> None:
            values, native = self.rows[key].read()
            array[index[key][0]] = values.numpy()
            index[key] += [self.states[key], *native]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                done = pool.map(fill, keys)
                for _ in tqdm(done, self.kind, len(keys), disable=None):
                    pass
            except BaseException:  # a file that cannot be read, or Ctrl-C
                pool.shutdown(cancel_futures=True)
                raise


def file_state(path: str) -> str:
    """What shows that a file has changed: its size and time."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    return f"{found.st_size} {found.st_mtime_ns}"


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """One process at a time opens or writes a cache; after an interruption, the old one is restored."""
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        lock = open(f"{folder}.lock", "w")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.isdir(f"{folder}.old") and not os.path.isdir(folder):
            os.rename(f"{folder}.old", folder)
        yield
