#!/usr/bin/env python3
"""Writes NYU-Depth-v2's labelled images (Section 4.4 of the paper) as PNG files.

    python tools/prepare_nyu.py --data_path data/nyu
    python train_seg.py --data nyu --data_path data/nyu

Reads three published files in the folder: nyu_depth_v2_labeled.mat and splits.mat (NYU), and
classMapping40.mat (894 raw classes to 40: Gupta et al., CVPR 2013). Writes image/0001.png, ...,
label40/ (0 = no label), depth/ (millimetres, 0 = not measured), train.txt and test.txt.
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils import InputError, Parser, run_main

IMAGES = "nyu_depth_v2_labeled.mat"
SPLITS = "splits.mat"
CLASSES = "classMapping40.mat"


def read_small(path: Path, keys: tuple[str, ...]) -> list[np.ndarray]:
    """Arrays of a MATLAB file of version 5, flattened."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError("reading NYU's files needs scipy: pip install h5py scipy") from None
    try:
        content = loadmat(path)
        return [content[key].ravel() for key in keys]
    except Exception as error:  # noqa: BLE001  (scipy raises many kinds for a damaged file)
        raise InputError(f"{path}: cannot read {', '.join(keys)} ({error})") from None


def open_images(path: Path):
    """The file of images: HDF5, in which MATLAB's axes come in reversed order."""
    try:
        import h5py
    except ImportError:
        raise InputError("reading NYU's files needs h5py: pip install h5py scipy") from None
    try:
        file = h5py.File(path)
    except OSError as error:
        raise InputError(f"{path}: not a readable MATLAB file ({error})") from None
    missing = {"images", "labels", "rawDepths"} - set(file)
    if missing:
        raise InputError(f"{path}: no {', '.join(sorted(missing))} in it")
    return file


def save(root: Path, kind: str, number: int, image: np.ndarray) -> None:
    path = root / kind / f"{number:04d}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.ascontiguousarray(image)).save(path, compress_level=1)


def unpack(root: Path) -> int:
    """Write all images, then the lists of the split; returns the number of images."""
    for name in (IMAGES, SPLITS, CLASSES):
        if not (root / name).exists():
            raise InputError(f"{root / name} is missing: put the published file there")
    train, test = read_small(root / SPLITS, ("trainNdxs", "testNdxs"))
    (mapping,) = read_small(root / CLASSES, ("mapClass",))
    to_40 = np.append(0, mapping).astype(np.uint8)  # by raw class, 0 = no label

    with open_images(root / IMAGES) as file:
        count = len(file["images"])
        for i in tqdm(range(count), desc="NYU", disable=None):
            image = np.asarray(file["images"][i])  # (3, W, H)
            label = np.asarray(file["labels"][i])  # (W, H)
            if label.max() >= len(to_40):
                limit = len(to_40) - 1
                raise InputError(f"{root / IMAGES}: class {label.max()} in image {i + 1}, not up to {limit}")
            depth = np.asarray(file["rawDepths"][i]) * 1000  # (W, H) in millimetres
            depth = depth.round().clip(0, 65535)
            save(root, "image", i + 1, image.T)
            save(root, "label40", i + 1, to_40[label].T)
            save(root, "depth", i + 1, depth.astype(np.uint16).T)

    for name, numbers in (("train", train), ("test", test)):
        lines = [f"{number:04d}\n" for number in numbers]
        (root / f"{name}.txt").write_text("".join(lines))
    return count


def parse_options(argv: list[str] | None = None) -> Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data_path",
        default="data/nyu",
        help="folder of the three files, where the images go as well",
    )
    return parser.parse_args(argv)


def main() -> None:
    root = Path(parse_options().data_path)
    count = unpack(root)
    print(f"{root}: {count} images, with labels, depth, train.txt and test.txt")


if __name__ == "__main__":
    run_main(main)
