"""Data sets: clips for pre-training (Section 3.1), labelled images (Section 3.2), their options.

    python tools/check_data.py --data kitti --frame_ids 0 -1 1 s --depth --output contact.png
    python tools/check_data.py --data frames --data_path my_video --fov 60

One class per data set. Clips are here, labelled images in labels.py; images.py reads and transforms
images, batches.py makes batches of samples. To add a data set of clips: a subclass of Clips that
lists its samples, and its name in CLIPS at the end.
"""

import argparse
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from batches import Cache, Row, Samples, check_fit, gather
from images import (
    DEPTH_MODES,
    IMAGE_EXTENSIONS,
    SAME_ASPECT,
    VIDEO_EXTENSIONS,
    Size,
    check_intrinsics,
    focal_and_centre,
    fov_intrinsics,
    how_to_convert,
    image_names,
    image_size,
    list_folder,
    nearest,
    pixel_kind,
    place_key,
    read_calibration,
    read_ids,
    read_image,
    read_intrinsics,
    read_lines,
    read_points,
    read_scaled_depth,
    read_text,
    resize,
    resize_depth,
    resize_intrinsics,
    rigid,
    same_aspect,
    size_text,
    split_sequences,
    usual_step,
    velodyne_depth,
)
from labels import LABELLED, SPLITS, Labelled, read_names
from utils import InputError, within

DEPTH_READING = 2  # raise this when depth files are read differently: caches then decode them again
OTHER_EXTENSIONS = (".webp", ".heic", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".exr")
Camera = tuple[np.ndarray, Size | None, str]  # K, the size of images it is for, where it is from


# ---- clips -------------------------------------------------------------------------------------

class Clips(Samples):
    """Targets with their source frames. Subclasses list `samples`, a dict each:

    "images": paths, target first; "K": 3x3, for images of "K_size", or of any if that is None;
    "K_from": its file; "baseline": metres to the other camera with sign, or None; "depth": what
    `depth_map` reads, or None; "sequence": the camera's folder; "moment": the same for both cameras.
    """

    name: str  # for people
    dropped = ""  # what was left out and why
    dropped_count = 0  # how many targets that were
    listed = False  # whether a split chose the targets
    aspect_tolerance = SAME_ASPECT  # by which resized images may differ from K_size
    depth_rows = None  # the shares of the height between which depth supervises

    def __init__(self, samples: list[dict], height: int, width: int, with_depth: bool = False):
        if not samples:
            why = self.dropped or "no frames there"
            raise InputError(f"no usable sample in {self.name}: {why}")
        self.samples = samples
        self.size = height, width
        self.with_depth = with_depth

    def __len__(self) -> int:
        return len(self.samples)

    def keep_whole(self, samples: list[dict], with_depth: bool, depth: str) -> list[dict]:
        """Those samples that have all images and, if needed, `depth` (its name for people)."""
        whole = [sample for sample in samples if None not in sample["images"]]
        self.leave_out(len(samples) - len(whole), "without all their source frames")
        if not with_depth:
            return whole
        kept = [sample for sample in whole if sample["depth"] is not None]
        self.leave_out(len(whole) - len(kept), f"without {depth}")
        return kept

    def leave_out(self, count: int, why: str, targets: bool = True) -> None:
        if count:
            self.dropped_count += count if targets else 0
            separator = ", " if self.dropped else ""
            self.dropped += f"{separator}{count} {why}"

    def targets(self) -> list[str]:
        return [sample["images"][0] for sample in self.samples]

    def geometry(self) -> list:
        """Intrinsics, baseline and names of depth files of every sample."""
        facts = []
        for sample in self.samples:
            files = self.depth_files(sample["depth"]) if self.with_depth else ()
            names = [os.path.basename(file) for file in files]
            facts.append((np.round(sample["K"], 3).tolist(), sample["baseline"], names))
        return facts

    def depth_map(self, depth: object) -> np.ndarray:
        """Measured depth (h, w) in metres at its own size, 0 = no measurement."""
        raise NotImplementedError

    def depth_files(self, depth: object) -> tuple[str, ...]:
        """The files that `depth_map` reads."""
        return (depth[0],)

    def native_intrinsics(self, sample: dict, size: Size) -> np.ndarray:
        """K in pixels of a sample's images of this size; refuses a calibration of others."""
        K = sample["K"]
        known = sample["K_size"] or size
        if known != size:
            if not same_aspect(known, size, self.aspect_tolerance):
                raise InputError(
                    f"{sample['images'][0]}: the image is {size_text(size)}, but {sample['K_from']} "
                    f"is for {size_text(known)}, another aspect: was it cropped?")
            K = resize_intrinsics(K, known, size)
        check_intrinsics(K, size, sample["K_from"])
        return K

    def intrinsics(self, sample: dict, sizes: list[Size]) -> Tensor:
        """K (3, 3) at the data set's size, from the native sizes of a sample's images."""
        if len(set(sizes)) > 1:
            found = " and ".join(size_text(size) for size in sorted(set(sizes)))
            raise InputError(f"{sample['images'][0]}: its frames are of different sizes, {found}")
        K = self.native_intrinsics(sample, sizes[0])
        K = resize_intrinsics(K, sizes[0], self.size)
        return torch.from_numpy(K).float()

    def load(self, path: str) -> tuple[Tensor, Size]:
        """Resized image (3, H, W) uint8 and its native size."""
        image = read_image(path)
        return resize(image, self.size), tuple(image.shape[1:])

    def load_depth(self, depth: object) -> tuple[Tensor, Size]:
        """Resized depth (1, H, W) in metres and its native size."""
        measured = self.depth_map(depth)
        if not (measured > 0).any():
            raise InputError(f"{self.depth_files(depth)[0]}: no pixel is measured")
        resized = torch.from_numpy(resize_depth(measured, *self.size))
        return resized[None], measured.shape

    def check_depth(self, sample: dict, image: Size, depth: Size) -> None:
        if not same_aspect(image, depth):
            file = self.depth_files(sample["depth"])[0]
            raise InputError(f"{file}: depth is {size_text(depth)}, its image {sample['images'][0]} "
                             f"{size_text(image)}")

    def keep_rows(self, depth: Tensor) -> Tensor:
        """Depth (..., H, W) without what was measured outside --depth_rows."""
        if self.depth_rows is None:
            return depth
        height = depth.shape[-2]
        top, bottom = (round(share * height) for share in self.depth_rows)
        depth = depth.clone()
        depth[..., :top, :] = 0
        depth[..., bottom:, :] = 0
        return depth

    def read(self, index: int) -> dict[str, Tensor]:
        """A sample before augmentation: "frames" (F, 3, H, W) uint8, "K", "index" and more."""
        if self.arrays is not None:
            sample = gather(self.arrays, torch.tensor(index))
        else:
            sample = self.read_files(self.samples[index])
        if "depth" in sample:
            sample["depth"] = self.keep_rows(sample["depth"])
        return {**sample, "index": index}

    def read_files(self, record: dict) -> dict[str, Tensor]:
        images, sizes = zip(*[self.load(path) for path in record["images"]])
        sample = {"frames": torch.stack(images), "K": self.intrinsics(record, sizes)}
        if record["baseline"] is not None:
            sample["stereo_T"] = translation_x(record["baseline"])
        if self.with_depth:
            sample["depth"], size = self.load_depth(record["depth"])
            self.check_depth(record, sizes[0], size)
        return sample

    def use_cache(self, folder: str) -> None:
        """Reads all samples from a cache, after decoding what it lacks."""
        absolute = cache(os.path.abspath)
        keys = []  # of every sample's images
        rows = {}
        for sample in self.samples:
            keys.append([absolute(path) for path in sample["images"]])
            for key, path in zip(keys[-1], sample["images"]):
                if key not in rows:
                    rows[key] = Row((path,), partial(self.load, path))
        frames = Cache(folder, "frames", rows)
        frame_rows = []
        K_rows = []
        K = {}  # few differ
        for sample, names in zip(self.samples, keys):
            frame_rows.append([frames.row(name) for name in names])
            sizes = tuple(frames.native_size(name) for name in names)
            camera = (sample["K"].tobytes(), sample["K_from"], sizes)
            if camera not in K:
                K[camera] = (len(K), self.intrinsics(sample, sizes))
            K_rows.append(K[camera][0])
        matrices = torch.stack([matrix for _, matrix in K.values()])
        arrays = {
            "frames": (frames.array, torch.tensor(frame_rows)),
            "K": (matrices, torch.tensor(K_rows)),
        }
        if self.samples[0]["baseline"] is not None:
            x = torch.tensor([sample["baseline"] for sample in self.samples])
            arrays["stereo_T"] = (translation_x(x), None)
        if self.with_depth:
            arrays["depth"] = self.cached_depth(folder, frames, keys)
        self.arrays = arrays

    def cached_depth(self, folder: str, frames: Cache, keys: list[list[str]]) -> tuple:
        """Depth (N, 1, H, W), and the row of each sample."""
        rows = {}
        depth_keys = []
        for sample in self.samples:
            depth = sample["depth"]
            files = self.depth_files(depth)
            depth_keys.append(f"{os.path.abspath(files[0])} {depth} {DEPTH_READING}")
            rows[depth_keys[-1]] = Row(files, partial(self.load_depth, depth))
        depths = Cache(folder, "depth", rows)
        for sample, images, key in zip(self.samples, keys, depth_keys):
            self.check_depth(sample, frames.native_size(images[0]), depths.native_size(key))
        return depths.array, torch.tensor([depths.row(key) for key in depth_keys])

    def shuffle_depth(self, seed: int) -> None:
        """Gives every image the depth of a random other moment: same statistics, no geometry."""
        names = [str(sample["moment"]) for sample in self.samples]
        moments = np.unique(names, return_inverse=True)[1]
        if 2 * np.bincount(moments).max() > len(moments):
            raise InputError(f"--shuffle_depth: too few moments in {self.name} to exchange depth")
        rng = np.random.default_rng([seed, 0, 3])  # 3: not the draw of an epoch or a sample
        order = rng.permutation(len(moments))
        while (moments[order] == moments).any():
            order = rng.permutation(len(moments))
        depths = [self.samples[i]["depth"] for i in order]
        self.samples = [{**sample, "depth": depth} for sample, depth in zip(self.samples, depths)]


def translation_x(x: Tensor | float) -> Tensor:
    """The poses (..., 4, 4) of cameras beside others, from metres (...)."""
    x = torch.as_tensor(x)
    T = torch.eye(4).repeat(*x.shape, 1, 1)
    T[..., 0, 3] = x
    return T


@dataclass
class Cameras:
    """The cameras behind a data set, whose intrinsics are to be learned."""

    folders: list[str]
    shapes: list[Size]  # of their images
    given: Tensor  # (cameras, 3, 3): K that comes with the images, at the data set's size
    start: Tensor  # (cameras, 3, 3): where learning starts, by --fov if that is given
    size: Size  # the data set's

    def describe(self, learned: Tensor) -> dict[str, dict]:
        """Learned K (cameras, 3, 3) by folder, at the size of training and of the images."""
        found = {}
        matrices = learned.detach().cpu().double().numpy()
        for folder, shape, K in zip(self.folders, self.shapes, matrices):
            native = focal_and_centre(resize_intrinsics(K, self.size, shape))
            text = "  ".join(f"{name} {value:.1f}" for name, value in native.items())
            print(f"{folder}: {text} in pixels of its {size_text(shape)} images")
            native["height"], native["width"] = shape
            found[folder] = {"training": focal_and_centre(K), "native": native}
        return found


def find_cameras(dataset: Clips, fov: float | None) -> Cameras:
    """A camera for each "sequence" of samples. From now on batches name their "camera"."""
    sequences = [sample["sequence"] for sample in dataset.samples]
    folders, first, camera_of = np.unique(sequences, return_index=True, return_inverse=True)
    dataset.camera_of = torch.from_numpy(camera_of)
    targets = dataset.targets()
    shapes = [image_size(targets[index]) for index in first]
    given = torch.stack([dataset.read(index)["K"] for index in first.tolist()])
    start = given.clone()
    if fov is not None:
        for camera, shape in enumerate(shapes):
            K = resize_intrinsics(fov_intrinsics(shape, fov), shape, dataset.size)
            start[camera] = torch.from_numpy(K)
    return Cameras(folders.tolist(), shapes, given, start, dataset.size)


# ---- KITTI -------------------------------------------------------------------------------------

OTHER = {"l": "r", "r": "l"}
PUBLISHED_SPLITS = {"train": "eigen_zhou_train.txt", "val": "eigen_zhou_val.txt",
                    "test": "eigen_test.txt"}


def number_files(folder: str) -> dict[int, str]:
    """Frame number -> path of the numbered files in a folder; empty where there is none."""
    files = {}
    for name in list_folder(folder) if os.path.isdir(folder) else ():
        stem, extension = os.path.splitext(name)
        if stem.isdecimal() and extension.lower() in (*IMAGE_EXTENSIONS, ".bin"):
            number = int(stem)
            known, _ = os.path.splitext(os.path.basename(files.get(number, name)))
            if known != stem:
                raise InputError(f"{folder}: {known} and {stem} are the same number")
            files[number] = os.path.join(folder, name)
    return files


def parse_projections(values: dict, left: str, right: str, file: str) -> dict[str, np.ndarray]:
    """P (3, 4) of both cameras by side; refuses what is not a rectified stereo pair."""
    try:
        P = {"l": values[left].reshape(3, 4), "r": values[right].reshape(3, 4)}
    except (KeyError, ValueError) as error:
        raise InputError(f"{file}: expected {left} and {right}, 12 numbers each "
                         f"({error})") from None
    both = np.stack([P["l"], P["r"]])
    if not np.isfinite(both).all() or both[:, 0, 0].min() <= 1:
        raise InputError(f"{file}: {left} and {right} are not projections of two cameras")
    x = baselines(P)["l"]
    if not np.allclose(*both[:, :, :3], rtol=0.01) or x >= 0:
        raise InputError(f"{file}: {left} and {right} are not a rectified pair: K differs, or {right} "
                         f"is not to the right (x {x:.3g} m)")
    return P


def baselines(P: dict[str, np.ndarray]) -> dict[str, float]:
    """Metres along x that take each camera's points to the other's."""
    x = {side: P[side][0, 3] / P[side][0, 0] for side in "lr"}
    return {"l": float(x["r"] - x["l"]), "r": float(x["l"] - x["r"])}


def matches(folder: str, drives: list[str]) -> bool:
    """Whether the folder's name holds one of the names that --drives gives."""
    return any(drive in folder for drive in drives)


class KittiRaw(Clips):
    """KITTI raw: `<date>/<drive>/image_0{2,3}/data/*.{png,jpg}`, calibration by date, LiDAR.

    split: "train", "val" or "test" of Eigen and Zhou, or a file with lines `<date>/<drive> NUMBER
    l|r`. Depth is of one kind for all samples, `depth_kind`: improved ground truth (also as
    downloaded, in train/ and val/), LiDAR as PNG, or raw points.
    """

    title = "kitti"
    expected = "2011_09_26/2011_09_26_drive_0001_sync/image_02/data"
    images = {"l": "image_02/data", "r": "image_03/data"}
    points = "velodyne_points/data"
    depth_kinds = ("groundtruth", "velodyne_raw", "velodyne")
    depth_kind = None
    published = True  # whether PUBLISHED_SPLITS are of this layout

    def __init__(self, root: str, frame_ids: list[str], split: str | None = None,
                 drives: list[str] | None = None, frames: tuple = (None, None),
                 cameras: str = "lr", with_depth: bool = False, **options):
        self.root = root
        self.name = f"{self.title} at {root}"
        self.files = cache(number_files)
        self.frames_of = cache(self.find_frames)
        self.calibration = cache(self.read_cameras)
        self.velodyne_pose = cache(self.read_velodyne_pose)
        present = self.choose_drives(drives)
        targets = self.choose_targets(present, split, drives, frames)
        samples = []
        for folder, number, side in targets:
            if side in cameras:
                samples.append(self.sample(folder, number, side, frame_ids))
        if with_depth:
            self.find_depth(samples)
        samples = self.keep_whole(samples, with_depth, f"LiDAR ({self.depth_kind})")
        super().__init__(samples, with_depth=with_depth, **options)

    # which targets

    def folders(self) -> list[str]:
        """Every drive, as `<date>/<drive>`."""
        found = []
        for date in list_folder(self.root):
            if re.fullmatch(r"\d{4}_\d\d_\d\d", date):
                drives = list_folder(os.path.join(self.root, date))
                found += [f"{date}/{drive}" for drive in drives]
        return found

    def path(self, folder: str, *parts: str) -> str:
        """A path in a drive's folder."""
        return os.path.join(self.root, folder, *parts)

    def find_frames(self, folder: str, side: str) -> dict[int, str]:
        """Frame number -> image of one camera of a drive."""
        return self.files(self.path(folder, self.images[side]))

    def choose_drives(self, drives: list[str] | None) -> list[str]:
        """The drives that are there, of those asked for."""
        present = []
        for folder in self.folders():
            if any(os.path.isdir(self.path(folder, images)) for images in self.images.values()):
                present.append(folder)
        if not present:
            raise InputError(f"{self.root}: no KITTI drive there; expected e.g. {self.expected}")
        for drive in drives or ():
            if not any(drive in folder for folder in present):
                there = ", ".join(present[:4])
                raise InputError(f"--drives {drive}: no such drive in {self.root} "
                                 f"(there: {there}, ...)")
        if not drives:
            return present
        return [folder for folder in present if matches(folder, drives)]

    def choose_targets(self, present: list[str], split: str | None, drives: list[str] | None,
                       frames: tuple) -> list[tuple]:
        """(drive, frame number, side), by a file, else all of chosen drives or frames, else by the
        published split, if any of its drives is there.
        """
        first, stop = frames
        chosen = range(first or 0, stop or 10 ** 10)
        if split and split not in PUBLISHED_SPLITS:
            rows = self.rows_of(split, present)
            if rows is None:
                raise InputError(f"{split}: none of its drives is in {self.root}")
            return [row for row in rows if row[1] in chosen]
        if self.published and not drives and frames == (None, None):
            file = PUBLISHED_SPLITS[split or "train"]
            rows = self.rows_of(os.path.join(SPLITS, file), present)
            if rows is not None:
                return rows
            self.name += f" (no drive of {file} there: every drive)"
        targets = []
        for folder in present:
            for side in "lr":
                for number in sorted(self.frames_of(folder, side)):
                    if number in chosen:
                        targets.append((folder, number, side))
        return targets

    def rows_of(self, file: str, present: list[str]) -> list[tuple] | None:
        """The targets that a split file lists, of the drives and cameras here; None if of none."""
        rows = dict.fromkeys(parse_row(line, file) for line in read_lines(file))
        drives = set(present)
        here = [row for row in rows if row[0] in drives]
        if not here:
            return None
        self.listed = True
        kept = []
        lost = Counter()
        for folder, number, side in here:
            files = self.frames_of(folder, side)
            if not files:
                lost[self.images[side]] += 1
            elif number in files:
                kept.append((folder, number, side))
            else:
                raise InputError(f"{self.path(folder, self.images[side])}: no frame {number:010d}, "
                                 f"which {file} lists")
        for camera, count in lost.items():
            self.leave_out(count, f"of the split without their camera, {camera}")
        self.name += f" ({os.path.basename(file)}, {len(kept)} of {len(rows)})"
        return kept

    # what belongs to a target

    def sample(self, folder: str, number: int, side: str, frame_ids: list[str]) -> dict:
        files = self.frames_of(folder, side)
        paths = [files.get(number + int(offset)) for offset in frame_ids if offset != "s"]
        calibration = self.calibration(folder)
        P = calibration["P"]
        baseline = None
        if "s" in frame_ids:
            others = self.frames_of(folder, OTHER[side])
            paths.append(others.get(number))
            baseline = calibration["baseline"][side]
        return {
            "images": paths,
            "K": P[side][:, :3],
            "K_size": calibration["size"],
            "K_from": calibration["file"],
            "baseline": baseline,
            "depth": None,
            "place": (folder, number, side),
            "sequence": os.path.dirname(paths[0]),
            "moment": (folder, number),
        }

    def read_cameras(self, folder: str) -> dict:
        """Of a drive: "P" (3, 4) and "baseline" by side, "size" of images, "rectify", "file"."""
        file = os.path.join(self.root, folder[:10], "calib_cam_to_cam.txt")
        values = read_calibration(file)
        P = parse_projections(values, "P_rect_02", "P_rect_03", file)
        try:
            width, height = values["S_rect_02"]
            same = (values["S_rect_03"] == values["S_rect_02"]).all()
            rotation = values["R_rect_00"].reshape(3, 3)
        except (KeyError, ValueError) as error:
            raise InputError(f"{file}: expected S_rect_02, S_rect_03 and R_rect_00 "
                             f"({error})") from None
        if not (1 <= width < 1e5 and 1 <= height < 1e5 and same):
            raise InputError(f"{file}: S_rect_02 and S_rect_03 are not one size of images")
        rectify = rigid(rotation, np.zeros(3), file)
        size = (int(height), int(width))
        return {"P": P, "baseline": baselines(P), "size": size, "rectify": rectify, "file": file}

    def velodyne_calibration(self, folder: str) -> str:
        return os.path.join(self.root, folder[:10], "calib_velo_to_cam.txt")

    def read_velodyne_pose(self, folder: str) -> np.ndarray:
        """From velodyne to rectified axes, (4, 4)."""
        file = self.velodyne_calibration(folder)
        values = read_calibration(file)
        try:
            pose = rigid(values["R"].reshape(3, 3), values["T"], file)
        except (KeyError, ValueError) as error:
            raise InputError(f"{file}: expected R and T ({error})") from None
        return self.calibration(folder)["rectify"] @ pose

    # depth

    def velodyne_file(self, folder: str, number: int) -> str | None:
        return self.files(self.path(folder, self.points)).get(number)

    def depth_file(self, kind: str, folder: str, number: int, side: str) -> tuple | None:
        """What `depth_map` reads of one kind for a target."""
        if kind == "velodyne":
            points = self.velodyne_file(folder, number)
            return points and ("velodyne", points, folder, side, False)
        drive = os.path.basename(folder)
        inner = os.path.join("proj_depth", kind, os.path.dirname(self.images[side]))
        places = [folder]
        for above in ("", "data_depth_annotated", "data_depth_velodyne"):  # as archives unpack
            places += [os.path.join(above, part, drive) for part in ("train", "val")]
        for place in places:
            files = self.files(os.path.join(self.root, place, inner))
            if number in files:
                return ("png", files[number])
        return None

    def find_depth(self, samples: list[dict]) -> None:
        """Fills in "depth": of the first kind that three quarters have, else of the commonest."""
        found = {}
        counts = {}
        for kind in self.depth_kinds:
            found[kind] = [self.depth_file(kind, *sample["place"]) for sample in samples]
            counts[kind] = len(samples) - found[kind].count(None)
            if 4 * counts[kind] >= 3 * len(samples):
                break
        else:
            kind = max(counts, key=counts.get)
        self.depth_kind = kind
        for sample, depth in zip(samples, found[kind]):
            sample["depth"] = depth

    def depth_files(self, depth: tuple) -> tuple[str, ...]:
        if depth[0] == "png":
            return (depth[1],)
        _, points, folder, _, _ = depth
        return (points, self.calibration(folder)["file"], self.velodyne_calibration(folder))

    def depth_map(self, depth: tuple) -> np.ndarray:
        """depth: ("png", path) or ("velodyne", path, drive, side, as in Eigen's protocol or not)."""
        if depth[0] == "png":
            return read_ids(depth[1], DEPTH_MODES).astype(np.float32) / 256
        _, path, folder, side, published = depth
        calibration = self.calibration(folder)
        return velodyne_depth(
            read_points(path), self.velodyne_pose(folder), calibration["P"][side],
            calibration["size"], forward_distance=published, offset=int(published))


def parse_row(line: str, file: str) -> tuple[str, int, str]:
    """(drive, frame number, side) of a line in a split file."""
    words = line.split()
    if len(words) != 3 or not words[1].isdecimal() or words[2] not in OTHER:
        raise InputError(f"{file}: a line is DRIVE NUMBER l or r, not {line.strip()!r}")
    drive, number, side = words
    return drive, int(number), side


class KittiOdometry(KittiRaw):
    """KITTI's odometry benchmark: `sequences/NN/image_{2,3}/*.png`, `calib.txt`, `velodyne`."""

    title = "kitti odometry"
    expected = "sequences/00/image_2"
    images = {"l": "image_2", "r": "image_3"}
    points = "velodyne"
    depth_kinds = ("velodyne",)
    published = False

    def folders(self) -> list[str]:
        return list_folder(os.path.join(self.root, "sequences"))

    def path(self, folder: str, *parts: str) -> str:
        return os.path.join(self.root, "sequences", folder, *parts)

    def read_cameras(self, folder: str) -> dict:
        file = self.velodyne_calibration(folder)
        values = read_calibration(file)
        P = parse_projections(values, "P2", "P3", file)
        files = self.frames_of(folder, "l") or self.frames_of(folder, "r")
        size = image_size(next(iter(files.values())))  # which the file does not say
        Tr = values.get("Tr")
        return {"P": P, "baseline": baselines(P), "size": size, "file": file, "Tr": Tr}

    def velodyne_calibration(self, folder: str) -> str:
        return self.path(folder, "calib.txt")

    def read_velodyne_pose(self, folder: str) -> np.ndarray:
        calibration = self.calibration(folder)
        Tr = calibration["Tr"]
        if Tr is None or Tr.size != 12:
            raise InputError(f"{calibration['file']}: expected Tr, the velodyne's pose")
        Tr = Tr.reshape(3, 4)
        return rigid(Tr[:, :3], Tr[:, 3], calibration["file"])


# ---- one's own frames --------------------------------------------------------------------------

OTHER_CAMERA = {  # its word, and the sign of x from this camera's points to its
    "left": ("right", -1), "cam0": ("cam1", -1), "image_02": ("image_03", -1),
    "right": ("left", 1), "cam1": ("cam0", 1), "image_03": ("image_02", 1),
}
JITTER = 0.4  # of the usual step, by which a frame may be early or late


def folders_below(root: str) -> list[str]:
    """The root and all folders below it where images may be, each once, whatever the links."""
    found = []
    known = set()
    level = [root]
    while level:
        following = []
        for folder in level:
            real = os.path.realpath(folder)
            above = os.path.realpath(root).startswith(os.path.join(real, ""))  # a link to there
            if real in known or above:
                continue
            known.add(real)
            found.append(folder)
            if os.path.isfile(os.path.join(folder, "associations.txt")):
                continue  # which names the images in folders below
            for name in list_folder(folder):
                inner = os.path.join(folder, name)
                is_image = name.lower().endswith(IMAGE_EXTENSIONS)
                if not is_image and name != "depth" and name[0] not in ".@" and os.path.isdir(inner):
                    following.append(inner)
        level = following
    return found


class Sequence(NamedTuple):
    """Images of one camera in order."""

    label: str  # below the root, as "left/*"
    folder: str  # with the pattern of the names, where the folder holds several sequences
    paths: list[str]
    numbers: list[int]  # or times
    depths: list[tuple[str, float] | None]  # file, and its value of one metre

    def frame(self, wanted: int, tolerance: float) -> str | None:
        """The frame with a number or time."""
        place = nearest(self.numbers, wanted, tolerance)
        return None if place is None else self.paths[place]


def find_other_camera(label: str, by_label: dict[str, Sequence]) -> tuple[Sequence | None, int]:
    """The other camera of a stereo pair by the last word in a label (left_turn/right), and a sign."""
    label = label.lower()
    here = max(OTHER_CAMERA, key=label.rfind)
    there, sign = OTHER_CAMERA[here]
    before, word, after = label.rpartition(here)
    for other in (before + there + after, label.replace(here, there)):
        if word and other in by_label:  # the word stands in the file's name alone, or above, too
            return by_label[other], sign
    return None, 0


class Frames(Clips):
    """One's own images in a folder, or folders of them, each with `intrinsics.txt`, or with --fov.

    Sequences in one folder are told apart by their names; neighbours are one usual step apart.
    Intrinsics (3x3, or fx fy cx cy) may lie above their folder, or be NAME_cam.txt. Depth is
    `depth/NAME.png`, 16 bits, metres * depth_scale, or what TUM's `associations.txt` names. Folders
    or names with left and right are stereo pairs, --baseline metres apart.
    """

    title = "frames"

    def __init__(self, root: str, frame_ids: list[str], drives: list[str] | None = None,
                 frames: tuple = (None, None), split: str | None = None, with_depth: bool = False,
                 **options):
        self.root = os.path.normpath(root)
        self.name = f"{self.title} at {root}"
        self.fov = options.pop("fov", None)
        self.depth_scale = options.pop("depth_scale", None)
        self.baseline = options.pop("baseline", None)
        self.read_K = cache(read_intrinsics)
        self.is_file = cache(os.path.isfile)
        self.K_sizes = {}  # intrinsics file -> size of the first image it is for
        if os.path.isfile(root):
            raise InputError(f"{root} is a file; {how_to_convert(root)}")
        sequences = self.find_sequences(drives)
        by_label = {sequence.label.lower(): sequence for sequence in sequences}
        if "s" in frame_ids:
            self.check_stereo(by_label)
        samples = []
        for sequence in sequences:
            samples += self.samples_of(sequence, by_label, frame_ids, frames)
        if split:
            samples = self.select(samples, split)
        samples = self.keep_whole(samples, with_depth, "a depth image")
        super().__init__(samples, with_depth=with_depth, **options)

    # sequences

    def folders(self) -> list[str]:
        return folders_below(self.root)

    def find_sequences(self, drives: list[str] | None) -> list[Sequence]:
        found = []
        for folder in self.folders():
            found += self.sequences_in(folder)
        for drive in drives or ():
            if not any(drive in self.parts(sequence) for sequence in found):
                raise InputError(f"--drives {drive}: no such folder with images in {self.root}")
        if drives:
            found = [sequence for sequence in found if set(drives) & set(self.parts(sequence))]
        if not found:
            raise InputError(self.why_no_images())
        kinds = [pixel_kind(sequence.paths[0]) for sequence in found]
        kept = []
        for sequence, kind in zip(found, kinds):
            if kind == min(kinds):
                kept.append(sequence)
            else:  # ids or depth beside pictures
                why = f"of one channel ({sequence.label})"
                self.leave_out(len(sequence.paths), why, targets=False)
        return kept

    def parts(self, sequence: Sequence) -> list[str]:
        """What --drives may call a sequence: its folder, or one above it."""
        place = os.path.dirname(sequence.label)
        root = os.path.basename(self.root)
        return [root, place, *place.split("/")]

    def why_no_images(self) -> str:
        message = f"{self.root}: no {', '.join(IMAGE_EXTENSIONS)} images there or in its folders"
        for folder in self.folders():
            for name in list_folder(folder):
                if name.lower().endswith(VIDEO_EXTENSIONS + OTHER_EXTENSIONS):
                    return f"{message}, but {name}: {how_to_convert(name)}"
        return message

    def target_names(self, folder: str) -> list[str]:
        """Names of the images in a folder, without depth PNGs that have an image's name."""
        by_stem = {}
        for name in image_names(folder):
            stem, _ = os.path.splitext(name)
            by_stem.setdefault(stem, []).append(name)
        chosen = []
        for names in by_stem.values():
            if len(names) > 1:
                colour = [n for n in names if pixel_kind(os.path.join(folder, n)) == 0]
                if len(colour) != 1:
                    raise InputError(f"{folder}: {names[0]} and {names[1]} have the same name: "
                                     "which is the image?")
                names = colour
            chosen += names
        return chosen

    def sequences_in(self, folder: str) -> list[Sequence]:
        """The sequences whose images lie in a folder."""
        if os.path.isfile(os.path.join(folder, "associations.txt")):
            return [self.associated(folder)]
        groups = split_sequences(self.target_names(folder))
        place = os.path.relpath(folder, self.root)
        found = []
        for pattern, members in groups.items():
            for (number, name), (following, other) in pairwise(members):
                if number == following:
                    raise InputError(f"{folder}: {name} and {other} have the same number")
            numbers, names = zip(*members)
            paths = [os.path.join(folder, name) for name in names]
            label = os.path.normpath(os.path.join(place, pattern))
            camera = folder if len(groups) == 1 else os.path.join(folder, pattern)
            depths = [self.depth_file(path) for path in paths]
            found.append(Sequence(label, camera, paths, numbers, depths))
        return found

    def associated(self, folder: str) -> Sequence:
        """A sequence of TUM's benchmark: TIME FILE TIME FILE, colour and depth in either order."""
        file = os.path.join(folder, "associations.txt")
        scale = self.depth_scale or 5000
        rows = []
        for line in read_lines(file):
            words = line.partition("#")[0].split()
            if not words:
                continue
            times = [re.fullmatch(r"\d+(\.\d+)?", word) for word in words[::2]]
            if len(words) != 4 or None in times:
                raise InputError(f"{file}: a line is TIME FILE TIME FILE, not {line.strip()!r}")
            files = [os.path.join(folder, name) for name in words[1::2]]
            if not rows:  # the order of all
                colour = 1 if pixel_kind(files[0]) == 2 else 0
            depth = (files[1 - colour], scale)
            rows.append((round(1e9 * float(words[2 * colour])), files[colour], depth))
        if not rows:
            raise InputError(f"{file}: no line names images")
        numbers, paths, depths = zip(*sorted(rows))
        if len(set(numbers)) < len(numbers):
            raise InputError(f"{file}: two images have the same time")
        place = os.path.relpath(folder, self.root)
        return Sequence(os.path.normpath(f"{place}/*"), folder, paths, numbers, depths)

    def depth_file(self, image: str) -> tuple[str, float] | None:
        folder, name = os.path.split(image)
        stem, _ = os.path.splitext(name)
        path = os.path.join(folder, "depth", f"{stem}.png")
        return (path, self.depth_scale or 1000) if os.path.isfile(path) else None

    # samples

    def samples_of(self, sequence: Sequence, by_label: dict[str, Sequence], frame_ids: list[str],
                   frames: tuple) -> list[dict]:
        """Frames A to B - 1 of a sequence as targets."""
        step = usual_step(sequence.numbers)
        other, sign = find_other_camera(sequence.label, by_label)
        scene = min(camera.label for camera in (sequence, other) if camera)
        samples = []
        positions = range(len(sequence.paths))
        for position in positions[slice(*frames)]:
            number = sequence.numbers[position]
            images = []
            for offset in frame_ids:
                source = other if offset == "s" else sequence
                wanted = number if offset == "s" else number + int(offset) * step
                images.append(source and source.frame(wanted, JITTER * step))
            K, K_size, K_from = self.find_intrinsics(images[0])
            if "s" in frame_ids and images[-1]:
                self.check_pair(K, K_from, images[-1])
            samples.append({
                "images": images,
                "K": K,
                "K_size": K_size,
                "K_from": K_from,
                "baseline": sign * self.baseline if "s" in frame_ids else None,
                "depth": sequence.depths[position],
                "sequence": sequence.folder,
                "moment": (scene, number),
            })
        return samples

    def check_stereo(self, by_label: dict[str, Sequence]) -> None:
        if self.baseline is None:
            raise InputError("--supervision stereo of own frames needs --baseline, the metres "
                             "between the left and the right camera")
        if not any(find_other_camera(label, by_label)[0] for label in by_label):
            raise InputError(f"{self.root}: no stereo pairs: folders or names with left and right "
                             "are needed")

    def check_pair(self, K: np.ndarray, K_from: str, other: str) -> None:
        """Refuses a pair that is not rectified to one K."""
        other_K, _, other_from = self.find_intrinsics(other)
        if not np.allclose(K, other_K, rtol=0.01):
            raise InputError(f"{K_from} and {other_from} differ: a stereo pair must be rectified")

    def find_intrinsics(self, image: str) -> Camera:
        """The camera of an image: of its own file, or of one in its folder or above."""
        stem, _ = os.path.splitext(image)
        own = f"{stem}_cam.txt"
        if os.path.isfile(own):
            return self.read_K(own), None, own
        folder = os.path.dirname(image)
        while True:
            for name in ("intrinsics.txt", "cam.txt"):
                path = os.path.join(folder, name)
                if self.is_file(path):
                    return self.read_K(path), self.first_size(path, image), path
            if folder in (self.root, os.path.dirname(folder)):
                return self.without_intrinsics(image)
            folder = os.path.dirname(folder)

    def without_intrinsics(self, image: str) -> Camera:
        if self.fov is None:
            raise InputError(f"{os.path.dirname(image)}: no intrinsics.txt (3x3 or fx fy cx cy); "
                             "give the horizontal field of view instead: --fov 60")
        size = self.first_size(os.path.dirname(image), image)
        return fov_intrinsics(size, self.fov), size, f"--fov {self.fov:g}"

    def first_size(self, key: str, image: str) -> Size:
        if key not in self.K_sizes:
            self.K_sizes[key] = image_size(image)
        return self.K_sizes[key]

    def native_intrinsics(self, sample: dict, size: Size) -> np.ndarray:
        if sample["K_from"].startswith("--fov"):
            return fov_intrinsics(size, self.fov)  # of images of any size
        if sample["K_size"] not in (None, size):
            raise InputError(
                f"{sample['images'][0]}: the image is {size_text(size)}, others are "
                f"{size_text(sample['K_size'])}: {sample['K_from']} can only be for one size")
        return super().native_intrinsics(sample, size)

    def depth_map(self, depth: tuple[str, float]) -> np.ndarray:
        return read_scaled_depth(*depth)

    def select(self, samples: list[dict], split: str) -> list[dict]:
        """The samples whose targets a file lists, as PATH or as FOLDER NUMBER."""
        self.listed = True
        by_place = {}
        for sample in samples:
            place = os.path.relpath(sample["images"][0], self.root)
            by_place[place_key(place)] = sample
        chosen = {}
        for line in map(str.strip, read_lines(split)):
            words = line.split()
            folder_and_number = line.rsplit(maxsplit=1)  # a folder's name may hold spaces
            places = (line, "/".join(folder_and_number), words[0], "/".join(words[:2]))
            keys = [place_key(place) for place in places]
            found = [key for key in keys if key in by_place]
            if not found:
                raise InputError(f"{split}: {line!r} is not a frame in {self.root}")
            chosen[found[0]] = by_place[found[0]]
        return list(chosen.values())


# ---- NYU, CamVid, Cityscapes -------------------------------------------------------------------

NYU_CAMERA = np.array([[518.858, 0, 325.582], [0, 519.470, 253.736], [0, 0, 1]])  # of 640x480
NYU_SOURCE = "NYU's published camera"


class NyuClips(Frames):
    """NYU-v2: raw scenes with `rgb_NUMBER.jpg` and `sync_depth_NUMBER.png` (16 bits, millimetres).

    Where there is none, the labelled images that train.txt lists; never one of test.txt.
    """

    title = "nyu"
    aspect_tolerance = 0.005  # the usual crop, 561x427, is off by 0.015

    def __init__(self, root: str, frame_ids: list[str], **options):
        above, folder = os.path.split(os.path.abspath(root))
        if folder == "image" and os.path.isfile(os.path.join(above, "test.txt")):
            raise InputError(f"{root}: the labelled images; give their root, where test.txt is")
        self.is_video = len(frame_ids) > 1
        self.excluded = set()
        tests = os.path.join(root, "test.txt")
        if os.path.isfile(tests):
            listed = [line.split()[0].lstrip("/") for line in read_lines(tests)]
            self.excluded = {os.path.splitext(name)[0] for name in listed}
        super().__init__(root, frame_ids, **options)

    def folders(self) -> list[str]:
        labelled = os.path.join(self.root, "image")
        unpacked = (labelled, os.path.join(self.root, "label40"))
        scenes = [folder for folder in folders_below(self.root) if folder not in unpacked]
        if not os.path.isdir(labelled) or any(image_names(folder) for folder in scenes):
            return scenes
        if self.is_video:
            raise InputError(f"{self.root}: no raw scenes there, and labelled images are not a video")
        self.name += " (no raw scenes there: its labelled training images)"
        return [labelled]

    def target_names(self, folder: str) -> list[str]:
        place = os.path.relpath(folder, self.root)
        stems = {name: os.path.splitext(name)[0] for name in super().target_names(folder)}
        if place == "image":
            train = set(read_names(os.path.join(self.root, "train.txt")))
            return [name for name, stem in stems.items() if stem in train - self.excluded]
        return [name for name, stem in stems.items() if f"{place}/{stem}" not in self.excluded]

    def depth_file(self, image: str) -> tuple[str, float] | None:
        folder, name = os.path.split(image)
        stem, _ = os.path.splitext(name)
        path = os.path.join(folder, f"sync_depth_{stem.removeprefix('rgb_')}.png")
        if folder == os.path.join(self.root, "image"):
            path = os.path.join(self.root, "depth", f"{stem}.png")
        return (path, 1000) if os.path.isfile(path) else None

    def without_intrinsics(self, image: str) -> Camera:
        return NYU_CAMERA, (480, 640), NYU_SOURCE

    def native_intrinsics(self, sample: dict, size: Size) -> np.ndarray:
        if sample["K_from"] == NYU_SOURCE:
            return Clips.native_intrinsics(self, sample, size)  # of the whole image at any size
        return super().native_intrinsics(sample, size)


class CamVidClips(Frames):
    """CamVid's consecutive frames (`val`, 15 Hz); its intrinsics are not published: --fov."""

    title = "camvid"

    def __init__(self, root: str, frame_ids: list[str], **options):
        super().__init__(os.path.join(root, "val"), frame_ids, **options)
        self.name += " (its evaluation images: pre-training on them is transductive)"


class CityscapesClips(Clips):
    """Cityscapes: `train` and `train_extra`, with depth from the released disparity (Table 5).

    Where source frames are asked for, the video around train's images (`leftImg8bit_sequence`).
    `drives` are cities. Cameras, in `camera/*/CITY/*_camera.json`, are of labelled frames: the
    others of a sequence take the nearest one's.
    """

    def __init__(self, root: str, frame_ids: list[str], drives: list[str] | None = None,
                 frames: tuple = (None, None), split: str | None = None, with_depth: bool = False,
                 **options):
        self.root = root
        self.name = f"cityscapes at {root}"
        self.places = cache(self.find_places)
        self.read_camera = cache(read_cityscapes_camera)
        if "s" in frame_ids:
            raise InputError("--supervision stereo: only the left camera of cityscapes is read; "
                             "use mono or depth")
        if split:
            raise InputError("--split is for kitti and frames; of cityscapes choose --drives CITY")
        kind = "_sequence" if len(frame_ids) > 1 else ""
        samples = []
        for part, city in self.cities(f"leftImg8bit{kind}", drives):
            places = self.places(f"leftImg8bit{kind}", part, city, "leftImg8bit.png")
            depths = self.places(f"disparity{kind}", part, city, "disparity.png")
            for sequence, number in sorted(places)[slice(*frames)]:
                wanted = [(sequence, number + int(offset)) for offset in frame_ids]
                samples.append({
                    "images": [places.get(place) for place in wanted],
                    "baseline": None,
                    "depth": depths.get((sequence, number)),
                    "place": (part, city, sequence, number),
                    "sequence": os.path.dirname(places[sequence, number]),
                    "moment": (city, sequence, number),
                })
        samples = self.keep_whole(samples, with_depth, "a disparity image")
        for sample in samples:
            self.add_camera(sample)
        super().__init__(samples, with_depth=with_depth, **options)

    def cities(self, kind: str, drives: list[str] | None) -> list[tuple[str, str]]:
        """("train" or "train_extra", city) of the images."""
        found = []
        for part in ("train", "train_extra"):
            folder = os.path.join(self.root, kind, part)
            if part == "train" or os.path.isdir(folder):
                found += [(part, city) for city in list_folder(folder)]
        known = {city for _, city in found}
        for city in drives or ():
            if city not in known:
                raise InputError(f"--drives {city}: no such city in {self.root}")
        return [(part, city) for part, city in found if not drives or city in drives]

    def find_places(self, kind: str, part: str, city: str, ending: str) -> dict[tuple, str]:
        """(sequence, frame number) -> path of the files in a city's folder."""
        folder = os.path.join(self.root, kind, part, city)
        pattern = re.compile(rf"{re.escape(city)}_(\d{{6}})_(\d{{6}})_{re.escape(ending)}")
        places = {}
        for name in list_folder(folder) if os.path.isdir(folder) else ():
            match = pattern.fullmatch(name)
            if match:
                places[int(match[1]), int(match[2])] = os.path.join(folder, name)
        return places

    def add_camera(self, sample: dict) -> None:
        """K, and beside the depth file the metres at a disparity of one pixel."""
        part, city, sequence, number = sample["place"]
        cameras = self.places("camera", part, city, "camera.json")
        near = [place for place in cameras if place[0] == sequence]
        if not near:
            raise InputError(f"{self.root}/camera/{part}/{city}: no camera.json of sequence "
                             f"{sequence:06d}")
        place = min(near, key=lambda place: abs(place[1] - number))
        K, metres = self.read_camera(cameras[place])
        # published cameras are for 2048x1024, whatever the images' size is now
        published = 0.4 < K[0, 2] / 2048 < 0.6 and 0.4 < K[1, 2] / 1024 < 0.6
        sample["K"] = K
        sample["K_size"] = (1024, 2048) if published else None
        sample["K_from"] = cameras[place]
        sample["depth"] = (sample["depth"], metres)

    def depth_map(self, depth: tuple[str, float]) -> np.ndarray:
        path, metres = depth
        stored = read_ids(path, DEPTH_MODES).astype(np.float32)
        disparity = (stored - 1) / 256  # stored 0: not measured, 1: infinitely far
        measured = np.where(disparity > 0, metres / disparity.clip(1 / 256), 0)
        return measured.astype(np.float32)


def read_cityscapes_camera(path: str) -> tuple[np.ndarray, float]:
    """K (3, 3) and baseline * fx, the metres at a disparity of one pixel."""
    try:
        content = json.loads(read_text(path))
        values = content["intrinsic"]
        fx, fy, u0, v0 = (float(values[key]) for key in ("fx", "fy", "u0", "v0"))
        metres = fx * float(content["extrinsic"]["baseline"])
        if not 0 < metres < math.inf:
            raise ValueError(f"fx * baseline is {metres}")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no camera with intrinsic fx, fy, u0, v0 and extrinsic baseline "
                         f"({type(error).__name__} {error})") from None
    return np.array([[fx, 0, u0], [0, fy, v0], [0, 0, 1]]), metres


# ---- by name, and the options ------------------------------------------------------------------

CLIPS = {"kitti": KittiRaw, "kitti_odometry": KittiOdometry, "synthetic": KittiRaw,
         "cityscapes": CityscapesClips, "camvid": CamVidClips, "nyu": NyuClips, "frames": Frames}


def find_data(name: str, path: str | None, registry: dict[str, type]) -> tuple[type, str]:
    """Class and root folder of a data set; the synthetic one is rendered where it is missing."""
    if name not in registry:
        raise InputError(f"--data {name}: unknown here, choose from {', '.join(registry)}")
    path = os.path.join("data", name) if path is None else path
    if name == "synthetic" and not os.path.exists(path):
        from tools.street import render
        render(path)
    if not os.path.exists(path):
        raise InputError(f"{path or repr(path)}: no such folder; give the root of {name} with --data_path "
                         "(README, Data: its layout)")
    if registry[name] is KittiRaw and os.path.isdir(os.path.join(path, "sequences")):
        return KittiOdometry, path
    return registry[name], path


def add_loader_options(parser: argparse.ArgumentParser) -> None:
    """Options of both training scripts: what is loaded and how."""
    add = parser.add_argument_group("data").add_argument
    add("--data_path", help="root folder of the data set (default: data/<name of the data set>)")
    add("--height", type=within(int, 64, 8192), default=192,
        help="in pixels, a multiple of 32, or of a ViT's patch (paper: 192)")
    add("--width", type=within(int, 64, 8192), default=640, help="likewise (paper: 640)")
    add("--num_workers", type=within(int, 0, 256), default=2, help="loader processes; 0 for none")
    add("--cache", metavar="FOLDER",
        help="decode and resize all files once, and read them from this folder from then on")


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    """Options that choose clips."""
    add = parser.add_argument_group("clips").add_argument
    add("--data", default="synthetic", help=f"one of {', '.join(CLIPS)}")
    add("--drives", nargs="+", metavar="NAME", help="only these drives or folders, not the split's")
    add("--frames", type=parse_range, default=(None, None), metavar="A:B",
        help="only frames A to B - 1 of each drive (KITTI: by number) or folder (counted from 0)")
    add("--split", metavar="FILE",
        help="list of targets, one per line: DRIVE NUMBER l|r for kitti (or: train, val, test), PATH "
             "or FOLDER NUMBER for frames")
    add("--fov", type=within(float, 1, 178),
        help="horizontal field of view in degrees of images without intrinsics; with --intrinsics "
             "learned, where to start")
    add("--depth_scale", type=within(float, 1e-3),
        help="with --data frames, the value of one metre in depth PNGs (default: 1000; TUM's "
             "associations: 5000)")
    add("--baseline", type=within(float, 1e-6), metavar="METRES",
        help="with --data frames, the distance between the left and the right camera")
    add("--shuffle_depth", type=within(int, 0), nargs="?", const=0, metavar="SEED",
        help="give each image the depth of a random other frame: a control without geometry")
    add("--depth_rows", type=within(float, 0, 1), nargs=2, metavar=("A", "B"),
        help="measured depth supervises only between these shares of the height (Table 5: 0.1 0.7)")


def parse_range(text: str) -> tuple[int | None, int | None]:
    """From "A:B" (A, B); either may be missing."""
    match = re.fullmatch(r"(\d{0,9}):(\d{0,9})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range like 0:100")
    start, stop = (int(part) if part else None for part in match.groups())
    if stop is not None and (start or 0) >= stop:
        raise argparse.ArgumentTypeError(f"{text!r} is an empty range")
    return start, stop


def find_clips(args: argparse.Namespace, frame_ids: list[str], with_depth: bool,
               fov: float | None = None) -> Clips:
    """The clips that the options ask for.

    frame_ids: the target "0", offsets of sources, "s" for the other camera; fov: of images without
    intrinsics where --fov is not given.
    """
    if not with_depth and (args.shuffle_depth is not None or args.depth_rows):
        raise InputError("--shuffle_depth and --depth_rows are for measured depth, --supervision depth")
    if frame_ids[0] != "0" or len(set(frame_ids)) < len(frame_ids):
        raise InputError("--frame_ids starts with the target, 0, and names every frame once")
    uncalibrated = args.data in ("frames", "camvid")
    learned = vars(args).get("intrinsics") == "learned"  # starting from --fov
    if not uncalibrated and (args.baseline or args.depth_scale or (args.fov and not learned)):
        raise InputError(f"--fov, --depth_scale, --baseline: {args.data} comes with its own")
    cls, root = find_data(args.data, args.data_path, CLIPS)
    options = {"drives": args.drives, "frames": tuple(args.frames), "split": args.split,
               "with_depth": with_depth, "height": args.height, "width": args.width}
    if uncalibrated:
        options["fov"] = args.fov or fov
        options["depth_scale"] = args.depth_scale
        options["baseline"] = args.baseline
    dataset = cls(root, frame_ids, **options)
    if args.split and not dataset.listed:
        raise InputError(f"--split {args.split}: none of its drives is in {root}, or --drives or "
                         "--frames choose others")
    check_fit(args, len(dataset), dataset.size)
    if dataset.dropped_count > len(dataset):
        print(f"warning: more is left out than used: {dataset.dropped}")
    if args.depth_rows and args.depth_rows[0] >= args.depth_rows[1]:
        raise InputError("--depth_rows A B: A must be below B")
    dataset.depth_rows = args.depth_rows
    if args.shuffle_depth is not None:
        dataset.shuffle_depth(args.shuffle_depth)
        dataset.name += ", depth shuffled"
    use_cache(dataset, args)
    return dataset


def find_labelled(args: argparse.Namespace, split: str, train: bool = False) -> Labelled:
    """The labelled images of a split; train: those that --train_size and --split_seed draw."""
    cls, root = find_data(args.data, args.data_path, LABELLED)
    options = {"height": args.height, "width": args.width}
    options["leave_out"] = getattr(args, "leave_out", None)
    if not train:
        return cls(root, split, **options)
    dataset = cls(root, split, train_size=args.train_size, split_seed=args.split_seed, **options)
    check_fit(args, len(dataset), dataset.size)
    use_cache(dataset, args)
    return dataset


def use_cache(dataset: Samples, args: argparse.Namespace) -> None:
    if args.cache:
        dataset.use_cache(os.path.join(args.cache, f"{args.data}_{size_text(dataset.size)}"))
