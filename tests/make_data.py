"""Small folders in every data set's true layout, and the options that read them, for the tests of the data."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import utils
from labels import palette

DRIVE = "2011_09_26/2011_09_26_drive_9001_sync"
UPRIGHT_TAG = 0x112  # the EXIF tag that says how a picture is turned
KITTI_K = np.array(
    [[56.0, 0, 47.5], [0, 56, 30.5], [0, 0, 1]]
)  # of images of 96x64 pixels
BASELINE = 0.5


def picture(height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """A smooth random picture, (H, W, 3) uint8, another for every seed."""
    coarse = np.random.default_rng(seed).integers(
        0, 256, (height // 8, width // 8, 3), np.uint8
    )
    return np.array(
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    )


def write_image(
    path, height: int = 64, width: int = 96, seed: int = 0, **options
) -> str:
    """Write a smooth random picture; the format follows from the name."""
    return write_array(path, picture(height, width, seed), **options)


def write_array(path, array: np.ndarray, **options) -> str:
    """Write an image file of an array, and the folders above it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return str(path)


def write_text(path, text: str) -> str:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(path).write_text(text)
    return str(path)


def write_depth(
    path, metres: float, height: int = 64, width: int = 96, scale: int = 1000
) -> str:
    """A 16-bit PNG of one distance everywhere."""
    return write_array(path, np.full((height, width), round(metres * scale), np.uint16))


def turned(orientation: int) -> Image.Exif:
    """EXIF data that say how a picture is to be turned; 6: by 90 degrees, clockwise."""
    exif = Image.Exif()
    exif[UPRIGHT_TAG] = orientation
    return exif


# ---------------------------------------------------------------- own frames


def write_frames(
    folder, names, intrinsics: str | None = "60 60 47.5 31.5", **size
) -> str:
    """Own images of these names, each with a picture of its own, and intrinsics.txt."""
    for seed, name in enumerate(names):
        write_image(os.path.join(folder, name), seed=seed, **size)
    if intrinsics is not None:
        write_text(os.path.join(folder, "intrinsics.txt"), intrinsics)
    return str(folder)


def numbered(pattern: str, numbers) -> list[str]:
    """Names such as frame3.jpg from the pattern "frame{}.jpg"."""
    return [pattern.format(number) for number in numbers]


# ---------------------------------------------------------------- KITTI


def calibration_text(K: np.ndarray, height: int, width: int, baseline: float) -> str:
    """KITTI's calib_cam_to_cam.txt; the first camera coincides with the left one."""
    left = np.c_[K, np.zeros(3)]
    right = np.c_[K, [-baseline * K[0, 0], 0, 0]]
    entries = {
        "S_rect_02": (width, height),
        "R_rect_00": np.eye(3),
        "P_rect_02": left,
        "S_rect_03": (width, height),
        "P_rect_03": right,
    }
    lines = ["calib_time: 09-Jan-2012 13:57:47"]
    for key, values in entries.items():
        numbers = " ".join(f"{value:e}" for value in np.ravel(values))
        lines.append(f"{key}: {numbers}")
    return "\n".join(lines) + "\n"


# Velodyne axes are forward, left, up; the camera's are right, down, forward.
VELODYNE_TEXT = "R: 0 -1 0 0 0 -1 1 0 0\nT: 0 0 0\n"


def write_calibration(day, K=KITTI_K, height: int = 64, width: int = 96) -> None:
    write_text(
        os.path.join(day, "calib_cam_to_cam.txt"),
        calibration_text(K, height, width, BASELINE),
    )
    write_text(os.path.join(day, "calib_velo_to_cam.txt"), VELODYNE_TEXT)


def write_drive(
    root, drive: str = DRIVE, frames: int = 4, height: int = 64, width: int = 96
) -> None:
    """The images of both cameras and two LiDAR points straight ahead, 10 and 20 m away."""
    for number in range(frames):
        for side in (2, 3):
            path = f"{root}/{drive}/image_0{side}/data/{number:010d}.png"
            write_image(path, height, width, seed=10 * number + side)
        points = np.array([[10, 0, 0, 0.3], [20, 1, 0, 0.3]], np.float32)
        path = Path(root, drive, "velodyne_points", "data", f"{number:010d}.bin")
        path.parent.mkdir(parents=True, exist_ok=True)
        points.tofile(path)


def write_kitti(root, frames: int = 4, height: int = 64, width: int = 96) -> str:
    """One drive of KITTI raw, outside every published split, with its calibration."""
    write_calibration(os.path.join(root, "2011_09_26"))
    write_drive(root, DRIVE, frames, height, width)
    return str(root)


def write_odometry(root, sequence: str = "00", frames: int = 4) -> str:
    """A sequence in the layout of KITTI's odometry benchmark, with both colour cameras."""
    folder = os.path.join(root, "sequences", sequence)
    for number in range(frames):
        for side in (2, 3):
            path = os.path.join(folder, f"image_{side}", f"{number:06d}.png")
            write_image(path, seed=10 * number + side)
    left = np.c_[KITTI_K, np.zeros(3)]
    right = np.c_[KITTI_K, [-BASELINE * KITTI_K[0, 0], 0, 0]]
    lines = []
    for key, P in (("P0", left), ("P1", right), ("P2", left), ("P3", right)):
        numbers = " ".join(f"{value:e}" for value in P.flat)
        lines.append(f"{key}: {numbers}\n")
    write_text(os.path.join(folder, "calib.txt"), "".join(lines))
    return str(root)


# ---------------------------------------------------------------- Cityscapes

CITYSCAPES_CAMERA = {
    "extrinsic": {"baseline": 0.2},
    "intrinsic": {"fx": 200.0, "fy": 210.0, "u0": 63.0, "v0": 33.0},
}


def blocks(ids, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A label map (H, W) uint8 of blocks of 4x4 pixels with these ids."""
    shape = (-(-height // 4), -(-width // 4))
    coarse = np.random.default_rng(seed).choice(np.array(ids, np.uint8), shape)
    return coarse.repeat(4, 0).repeat(4, 1)[:height, :width]


def write_cityscapes(
    root, cities=("aachen", "ulm"), height: int = 64, width: int = 128
) -> str:
    """Two labelled images a city in train, one in val, with disparity and camera; a video around the first.

    Disparity is 10 pixels, 0 (none) in the first column, 1 (infinity) in the second.
    """
    disparity = np.full((height, width), 256 * 10 + 1, np.uint16)
    disparity[:, 0] = 0
    disparity[:, 1] = 1
    for number, split in enumerate(("train", "train", "val")):
        for city in cities:
            start = f"{city}_{number:06d}_000019"
            seed = 100 * len(city) + number

            def path(kind, ending, start=start, split=split, city=city):
                return os.path.join(root, kind, split, city, f"{start}_{ending}")

            write_image(path("leftImg8bit", "leftImg8bit.png"), height, width, seed)
            label = blocks((0, 7, 23, 26), height, width, seed)
            write_array(path("gtFine", "gtFine_labelIds.png"), label)
            write_array(path("disparity", "disparity.png"), disparity)
            write_text(path("camera", "camera.json"), json.dumps(CITYSCAPES_CAMERA))
        if number == 0:
            write_cityscapes_video(root, cities, height, width)
    return str(root)


def write_cityscapes_video(root, cities, height: int, width: int) -> None:
    for city in cities:
        for frame in range(17, 22):
            name = f"{city}_000000_{frame:06d}_leftImg8bit.png"
            path = os.path.join(root, "leftImg8bit_sequence", "train", city, name)
            write_image(path, height, width, seed=frame)


# ---------------------------------------------------------------- labelled images


def write_semantics(
    folder, count: int = 4, ids=(0, 7, 26), height: int = 64, width: int = 96
) -> str:
    """KITTI's semantics layout with blocks of the given raw ids."""
    for index in range(count):
        name = f"{index:06d}_10.png"
        write_image(
            os.path.join(folder, "training", "image_2", name), height, width, seed=index
        )
        label = blocks(ids, height, width, index)
        write_array(os.path.join(folder, "training", "semantic", name), label)
    return str(folder)


def write_camvid(folder, train: int = 4, val: int = 3, ids=(0, 3, 8, 11)) -> str:
    """CamVid in SegNet's layout; the frames of val are consecutive, with a step of 2."""
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            stem = (
                f"0016E5_{7959 + 2 * index:05d}"
                if split == "val"
                else f"0001TP_{6690 + 30 * index:06d}"
            )
            seed = index + 50 * (split == "val")
            write_image(os.path.join(folder, split, f"{stem}.png"), seed=seed)
            write_array(
                os.path.join(folder, f"{split}annot", f"{stem}.png"),
                blocks(ids, 64, 96, seed),
            )
    return str(folder)


def write_voc(folder, listed: dict[str, list[str]]) -> str:
    """Pascal VOC 2012; `listed` has the names of each list in ImageSets/Segmentation."""
    root = os.path.join(folder, "VOCdevkit", "VOC2012")
    colours = [value for colour in palette(range(256)) for value in colour]
    label = np.zeros((40, 64), np.uint8)
    label[10:20] = 15
    label[20:22] = 255
    names = sorted({name for some in listed.values() for name in some})
    for seed, name in enumerate(names):
        write_image(os.path.join(root, "JPEGImages", f"{name}.jpg"), 40, 64, seed)
        coloured = Image.fromarray(label)
        coloured.putpalette(colours)
        for place in ("SegmentationClass", "SegmentationClassAug"):
            os.makedirs(os.path.join(root, place), exist_ok=True)
            coloured.save(os.path.join(root, place, f"{name}.png"))
    for split, some in listed.items():
        line = "{}\n"
        if split == "train_aug":
            line = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n"
        text = "".join(line.format(name) for name in some)
        write_text(
            os.path.join(root, "ImageSets", "Segmentation", f"{split}.txt"), text
        )
    return root


def write_ade20k(folder) -> str:
    """One image each for training and validation, with every id from 0 to 150."""
    label = np.arange(2560).reshape(40, 64).clip(0, 150).astype(np.uint8)
    for split, name in (
        ("training", "ADE_train_00000001"),
        ("validation", "ADE_val_00000001"),
    ):
        write_image(
            os.path.join(folder, "images", split, f"{name}.jpg"), 40, 64, len(name)
        )
        write_array(os.path.join(folder, "annotations", split, f"{name}.png"), label)
    return str(folder)


def write_nyu(root, train=(1, 3), test=(2,)) -> str:
    """NYU-v2's labelled images as tools/prepare_nyu.py unpacks them; depth is the image's number in metres."""
    for number in (*train, *test):
        name = f"{number:04d}.png"
        write_image(os.path.join(root, "image", name), 60, 80, seed=number)
        write_array(
            os.path.join(root, "label40", name), blocks(range(41), 60, 80, number)
        )
        write_depth(os.path.join(root, "depth", name), number, 60, 80)
    for split, numbers in (("train", train), ("test", test)):
        write_text(
            os.path.join(root, f"{split}.txt"), "".join(f"{n:04d}\n" for n in numbers)
        )
    return str(root)


def write_nyu_scenes(
    root, scenes=(("kitchen_0001", (1, 2)), ("office_0002", (7,)))
) -> str:
    """NYU-v2's raw scenes; depth is one and a half times the frame's number, in metres."""
    for scene, numbers in scenes:
        for number in numbers:
            seed = 1000 + 10 * len(scene) + number
            write_image(
                os.path.join(root, scene, f"rgb_{number:05d}.jpg"), 60, 80, seed
            )
            path = os.path.join(root, scene, f"sync_depth_{number:05d}.png")
            write_depth(path, 1.5 * number, 60, 80)
    return str(root)


# ---------------------------------------------------------------- reading them


def options(data: str, path, *more, **extra):
    """The options of a training on this folder; `extra` are those that the data's own parser lacks."""
    parser = utils.Parser()
    datasets.add_loader_options(parser)
    datasets.add_clip_options(parser)
    words = ["--data", data, "--data_path", str(path), "--num_workers", "0"]
    words += ["--height", "64", "--width", "96"]
    args = parser.parse_args([*words, *(str(word) for word in more)])
    defaults = {
        "batch_size": 2,
        "steps": 4,
        "seed": 0,
        "crop": None,
        "device": "cpu",
        "task": "depth",
        "supervision": "mono",
        "jitter": 0.2,
    }
    for name, value in {**defaults, **extra}.items():
        setattr(args, name, value)
    return args


def clips(
    data: str, path, frame_ids: str = "0", *more, with_depth: bool = False, fov=None
):
    """The clips that a training with these --frame_ids reads."""
    return datasets.find_clips(
        options(data, path, *more, batch_size=1), frame_ids.split(), with_depth, fov
    )


def labelled(data: str, path, split: str, train: bool = False, **extra):
    """The labelled images of a split, at 96x64 pixels unless told otherwise."""
    defaults = {
        "batch_size": 1,
        "train_size": None,
        "split_seed": 0,
        "leave_out": None,
        "height": 64,
        "width": 96,
    }
    args = options(data, path, **{**defaults, **extra})
    return datasets.find_labelled(args, split, train)


def names(dataset) -> list[list[str]]:
    """The names of the files of every sample, the target's first."""
    return [
        [os.path.basename(path) for path in sample["images"]]
        for sample in dataset.samples
    ]


def target_names(dataset) -> list[str]:
    return [os.path.basename(path) for path in dataset.targets()]


def intrinsics(K) -> list[float]:
    """fx, fy, cx, cy of a matrix (3, 3)."""
    K = torch.as_tensor(K)
    return [float(value) for value in (K[0, 0], K[1, 1], K[0, 2], K[1, 2])]


def assert_refused(words: str, read, *arguments, **keywords) -> None:
    """`read` raises InputError with one line that matches the words."""
    with pytest.raises(utils.InputError, match=words) as refusal:
        read(*arguments, **keywords)
    assert "\n" not in str(refusal.value)


def read_first(*arguments, **keywords) -> dict:
    """The first sample of `clips(...)`, whatever of the two refuses."""
    return clips(*arguments, **keywords).read(0)
