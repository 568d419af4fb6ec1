"""Labelled images for segmentation (Section 3.2): one class per data set, listed in LABELLED.

Every data set maps its raw ids to train ids by a table and refuses ids outside it; labels are only
ever resized to the id under a pixel's centre. To add one: a subclass of Labelled with its classes,
colours and table, and a method that lists its files.
"""

import os
import re

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from batches import Cache, Row, Samples, gather
from images import (
    Size,
    image_names,
    list_folder,
    read_ids,
    read_image,
    read_lines,
    resize,
    resize_label,
    same_aspect,
    size_text,
)
from utils import IGNORE, InputError

SPLITS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "splits")
IN_MEMORY = 2 ** 31  # bytes of resized images that are kept decoded
CROPPED = 0.01  # a label's aspect may differ by this much: some copies are a few pixels off

# Raw id, colour and name of each class, in the order of train ids.
CITYSCAPES = """
 7 128  64 128 road
 8 244  35 232 sidewalk
11  70  70  70 building
12 102 102 156 wall
13 190 153 153 fence
17 153 153 153 pole
19 250 170  30 traffic light
20 220 220   0 traffic sign
21 107 142  35 vegetation
22 152 251 152 terrain
23  70 130 180 sky
24 220  20  60 person
25 255   0   0 rider
26   0   0 142 car
27   0   0  70 truck
28   0  60 100 bus
31   0  80 100 train
32   0   0 230 motorcycle
33 119  11  32 bicycle
"""
CAMVID = """
 0 128 128 128 sky
 1 128   0   0 building
 2 192 192 128 pole
 3 128  64 128 road
 4  60  40 222 pavement
 5 128 128   0 tree
 6 192 128 128 sign
 7  64  64 128 fence
 8  64   0 128 car
 9  64  64   0 pedestrian
10   0 128 192 bicyclist
"""
# The 13-class id of each of the 40.
NYU13_OF_40 = """
12 5 6 1 4 9 10 12 13 6 8 6 13 10 6 13 6 7 7 5
7 3 2 6 11 7 7 7 7 7 7 6 7 7 7 7 7 7 6 7
"""


def parse_classes(table: str) -> tuple[tuple, tuple, tuple]:
    """Raw ids, colours and names of a table above."""
    ids = []
    colours = []
    names = []
    for line in table.strip().splitlines():
        raw, red, green, blue, name = line.split(maxsplit=4)
        ids.append(int(raw))
        colours.append((int(red), int(green), int(blue)))
        names.append(name)
    return tuple(ids), tuple(colours), tuple(names)


def class_names(name: str) -> tuple[str, ...]:
    """The classes that splits/NAME_classes.txt lists, in the order of train ids."""
    return tuple(read_lines(os.path.join(SPLITS, f"{name}_classes.txt")))


def lookup_table(classes: list[int], ignored: tuple | range = ()) -> np.ndarray:
    """256 entries by raw id: train id, IGNORE where `ignored`, -1 where unknown.

    classes: the raw id of each train id.
    """
    table = np.full(256, -1, np.int16)
    table[list(ignored)] = IGNORE
    table[list(classes)] = range(len(classes))
    return table


def palette(ids: range) -> tuple[tuple[int, int, int], ...]:
    """VOC's colour of each id: its bits are dealt to red, green and blue, highest bits first."""
    colours = []
    for i in ids:
        colour = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                is_set = i >> (3 * bit + channel) & 1
                colour[channel] |= is_set << (7 - bit)
        colours.append(tuple(colour))
    return tuple(colours)


CITYSCAPES_IDS, CITYSCAPES_COLOURS, CITYSCAPES_CLASSES = parse_classes(CITYSCAPES)
CITYSCAPES_TABLE = lookup_table(CITYSCAPES_IDS, ignored=(*range(34), 255))
CAMVID_IDS, CAMVID_COLOURS, CAMVID_CLASSES = parse_classes(CAMVID)
CAMVID_TABLE = lookup_table(CAMVID_IDS, ignored=(11,))


class Labelled(Samples):
    """Images with label maps. Small sets are decoded once and kept; large ones are read anew.

    Subclasses have `classes`, `colours`, `table` (see `lookup_table`) and `list_pairs`. Of "train",
    `train_size` images are drawn by `split_seed`: a larger draw contains the smaller one. Images
    called as in `leave_out` are never used.
    """

    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    table: np.ndarray
    splits = ("train", "val")

    def __init__(self, root: str, split: str, height: int, width: int,
                 train_size: int | None = None, split_seed: int = 0,
                 leave_out: list[str] | None = None):
        if split not in self.splits:
            there = ", ".join(self.splits)
            raise InputError(f"{root}: there are labels of {there}, none of {split}")
        pairs = self.list_pairs(root, split)
        check_pairs(pairs, f"{root}: no image is listed for {split}")
        if split == "train":
            order = np.random.default_rng(split_seed).permutation(len(pairs))
            pairs = [pairs[i] for i in order]
        if leave_out:
            everything = self.list_pairs(root, "train") + self.list_pairs(root, "val")
            pairs = leave_images_out(pairs, leave_out, everything)
            check_pairs(pairs, f"--leave_out leaves no image for {split}")
        if split == "train" and train_size is not None:
            if not 1 <= train_size <= len(pairs):
                raise InputError(f"--train_size {train_size}: there are 1 to {len(pairs)} images "
                                 "for training")
            pairs = pairs[:train_size]
        self.pairs = pairs
        self.size = height, width
        self.cached = {}
        self.keep = 4 * height * width * len(pairs) <= IN_MEMORY

    def list_pairs(self, root: str, split: str) -> list[tuple[str, str]]:
        """(image file, label file) of a split."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.pairs)

    def targets(self) -> list[str]:
        return [image for image, _ in self.pairs]

    def native_label(self, index: int) -> Tensor:
        """Train ids (h, w) int64 at the size of the file; refuses ids that the table lacks."""
        path = self.pairs[index][1]
        raw = read_ids(path)
        known = self.table[raw]
        if known.min() < 0:
            unknown = raw[known < 0][0]
            raise InputError(f"{path}: label id {unknown} is not one of this data set's")
        if self.table is CITYSCAPES_TABLE:
            refuse_train_ids(path, raw)
        self.check_palette(path, raw)
        return torch.from_numpy(known.astype(np.int64))

    def check_palette(self, path: str, raw: np.ndarray) -> None:
        """Refuses a palette that shows an id in another class's colour: its ids are not ours."""
        with Image.open(path) as image:
            colours = image.getpalette() if image.mode == "P" else None
        if not colours:
            return
        classes = {colour: train for train, colour in enumerate(self.colours)}
        for i in np.unique(raw).tolist():
            train = self.table[i]
            colour = tuple(colours[3 * i:3 * i + 3])
            shown = classes.get(colour, train)
            if train not in (shown, IGNORE):
                raise InputError(
                    f"{path}: the palette shows id {i}, {self.classes[train]}, in the colour of "
                    f"{self.classes[shown]}: these are places in a palette, not the data set's ids")

    def native(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (3, h, w) uint8 and label (h, w) int64 as they are stored."""
        image_path, label_path = self.pairs[index]
        image = read_image(image_path)
        label = self.native_label(index)
        size = tuple(image.shape[1:])
        if not same_aspect(size, label.shape, CROPPED):
            raise InputError(f"{label_path}: label is {size_text(label.shape)}, its image "
                             f"{size_text(size)}")
        return image, label

    def load(self, index: int, native_label: bool = False) -> tuple[Tensor, Tensor]:
        """Resized image (3, H, W) and label (H, W), uint8; native_label: the label at its own size."""
        if self.arrays is not None and not native_label:
            sample = gather(self.arrays, torch.tensor(index))
            return sample["image"], sample["label"]
        key = (index, native_label)
        if key in self.cached:
            return self.cached[key]
        image, label = self.native(index)
        label = label.to(torch.uint8)
        if not native_label:
            label = resize_label(label, self.size)
        entry = (resize(image, self.size), label)
        if self.keep and label.numel() * len(self) <= IN_MEMORY:
            self.cached[key] = entry
        return entry

    def read(self, index: int) -> dict[str, Tensor]:
        image, label = self.load(index)
        return {"image": image, "label": label, "index": index}

    def read_all(self, native_label: bool = False) -> set[int]:
        """Train ids that occur, after reading every image; of a large set, the first 8."""
        seen = set()
        count = len(self) if self.keep else min(8, len(self))
        for index in range(count):
            _, label = self.load(index, native_label)
            seen |= set(label.unique().tolist())
        if self.keep and seen == {IGNORE}:
            self.refuse_unlabelled("evaluated" if native_label else "training")
        return seen

    def refuse_unlabelled(self, use: str) -> None:
        """Without a label there is nothing to learn or score."""
        folder = os.path.dirname(self.pairs[0][1])
        raise InputError(f"{folder}: no {use} pixel is labelled, in {len(self)} images")

    def in_memory(self) -> dict[str, tuple] | None:
        if self.arrays is None and self.keep:
            batch = self.gather(list(range(len(self))))
            self.arrays = {key: (values, None) for key, values in batch.items()}
            self.cached = {key: entry for key, entry in self.cached.items() if key[1]}
        return self.arrays

    def use_cache(self, folder: str) -> None:
        """Reads a set too large for the memory from a cache."""
        if self.keep:
            return
        rows = {"image": {}, "label": {}}
        for index, (image, label) in enumerate(self.pairs):
            files = (image, label)
            rows["image"][os.path.abspath(image)] = Row(files, self.reader(index, 0))
            rows["label"][os.path.abspath(label)] = Row(files, self.reader(index, 1))
        self.arrays = {}
        for kind, wanted in rows.items():
            cache = Cache(folder, kind, wanted)
            self.arrays[kind] = (cache.array, torch.tensor([cache.row(key) for key in wanted]))

    def reader(self, index: int, part: int):
        """A function that reads the image (0) or label (1) of a pair, for the cache."""
        def read() -> tuple[Tensor, Size]:
            image, label = self.native(index)
            if part == 0:
                return resize(image, self.size), tuple(image.shape[1:])
            return resize_label(label.to(torch.uint8), self.size), tuple(label.shape)
        return read


def check_pairs(pairs: list[tuple[str, str]], otherwise: str) -> None:
    """Refuses an empty list, a pair twice, and files that are missing."""
    if not pairs:
        raise InputError(otherwise)
    if len(set(pairs)) < len(pairs):
        image = next(pair[0] for pair in pairs if pairs.count(pair) > 1)
        raise InputError(f"{image}: listed twice")
    missing = [path for pair in pairs for path in pair if not os.path.exists(path)]
    if missing:
        raise InputError(f"{missing[0]}: no such file, one of {len(missing)} that are missing")


def refuse_train_ids(path: str, raw: np.ndarray) -> None:
    """Train ids run from 0 to 18, and to 255 where nothing is labelled; label ids go up to 33."""
    highest = raw[raw < 255].max(initial=0)
    if raw.max() == 255 and highest < 19:
        raise InputError(f"{path}: 255 occurs and nothing above 18, so these are train ids; label "
                         "ids (labelIds) are needed")


def leave_images_out(pairs: list[tuple], names: list[str], everything: list[tuple]) -> list[tuple]:
    """The pairs without images called NAME, NAME_* or NAME.*, which must be among everything."""
    patterns = [re.compile(rf"{re.escape(name)}($|[_.])") for name in names]
    for name, pattern in zip(names, patterns):
        if not any(pattern.match(os.path.basename(image)) for image, _ in everything):
            raise InputError(f"--leave_out {name}: no such labelled image")
    kept = []
    for image, label in pairs:
        if not any(pattern.match(os.path.basename(image)) for pattern in patterns):
            kept.append((image, label))
    return kept


def read_names(path: str) -> list[str]:
    """The images that a folder holds or a split file lists (the first word of each line), by bare name."""
    if os.path.isdir(path):
        words = image_names(path)
    else:
        words = [line.split()[0] for line in read_lines(path)]
    return [os.path.splitext(os.path.basename(word))[0] for word in words]


def refuse_overlap(names: str, others: str) -> None:
    """Refuses a list or folder of training images that shares some with one for evaluation."""
    shared = sorted(set(read_names(names)) & set(read_names(others)))
    if shared:
        raise InputError(f"{names} and {others} share {len(shared)} images, {shared[0]} first")


def pair_up(images: str, labels: str, image_end: str = "", label_end: str = "") -> list[tuple]:
    """Every image of a folder with its label, a PNG in another, of the same name up to its end."""
    pairs = {}
    for name in image_names(images):
        stem = os.path.splitext(name)[0].removesuffix(image_end)
        label = os.path.join(labels, f"{stem}{label_end}.png")
        image = os.path.join(images, name)
        if label in pairs:
            raise InputError(f"{pairs[label]} and {image} have the same label")
        pairs[label] = image
    if not pairs:
        raise InputError(f"{images}: no images there")
    return [(image, label) for label, image in pairs.items()]


def pairs_of_names(names: list[str], images: str, extension: str, labels: str) -> list[tuple]:
    """Files of the images that a list names."""
    pairs = []
    for name in names:
        image = os.path.join(images, name + extension)
        label = os.path.join(labels, f"{name}.png")
        pairs.append((image, label))
    return pairs


# ---- the data sets -----------------------------------------------------------------------------

class KittiSemantics(Labelled):
    """KITTI's labelled images, `training/image_2` and `training/semantic`, 19 Cityscapes classes.

    A fixed 36 % (72 of the 200) are for evaluation; the training set is drawn from the others.
    """

    classes = CITYSCAPES_CLASSES
    colours = CITYSCAPES_COLOURS
    table = CITYSCAPES_TABLE

    def list_pairs(self, root: str, split: str) -> list[tuple[str, str]]:
        training = os.path.join(root, "training")
        folder = training if os.path.isdir(training) else root
        images = os.path.join(folder, "image_2")
        pairs = pair_up(images, os.path.join(folder, "semantic"))
        if len(pairs) < 2:
            raise InputError(f"{images}: at least 2 labelled images are needed, "
                             f"{len(pairs)} found")
        order = np.random.default_rng(0).permutation(len(pairs))
        shuffled = [pairs[i] for i in order]
        pool = max(1, int(0.64 * len(pairs)))
        return shuffled[:pool] if split == "train" else shuffled[pool:]


class CamVid(Labelled):
    """CamVid in SegNet's layout, 11 classes: `train`, `val` and `test`, each with its `annot`.

    What is asked of `val` is scored on `val` and, where it is there, on `test` together.
    """

    classes = CAMVID_CLASSES
    colours = CAMVID_COLOURS
    table = CAMVID_TABLE
    splits = ("train", "val", "test")

    def list_pairs(self, root: str, split: str) -> list[tuple[str, str]]:
        images = os.path.join(root, split)
        pairs = pair_up(images, os.path.join(root, f"{split}annot"))
        if split == "val" and os.path.isdir(os.path.join(root, "test")):
            pairs += self.list_pairs(root, "test")
        if split == "train":
            for other in ("val", "test"):
                evaluated = os.path.join(root, other)
                if os.path.isdir(evaluated):
                    refuse_overlap(images, evaluated)
        return pairs


class Cityscapes(Labelled):
    """Cityscapes' fine labels, 19 classes, by the cities of `train` and `val`."""

    classes = CITYSCAPES_CLASSES
    colours = CITYSCAPES_COLOURS
    table = CITYSCAPES_TABLE

    def list_pairs(self, root: str, split: str) -> list[tuple[str, str]]:
        images = os.path.join(root, "leftImg8bit", split)
        labels = os.path.join(root, "gtFine", split)
        pairs = []
        for city in list_folder(images):
            if not os.path.isdir(os.path.join(images, city)):
                continue
            pairs += pair_up(os.path.join(images, city), os.path.join(labels, city),
                             "_leftImg8bit", "_gtFine_labelIds")
        return pairs


class Voc(Labelled):
    """Pascal VOC 2012, 21 classes, by the lists in ImageSets/Segmentation.

    Training images come from `train_aug` with SBD's labels (PNG, SegmentationClassAug) where that
    list is there, else from `train`.
    """

    classes = class_names("voc")
    colours = palette(range(21))
    table = lookup_table(range(21), ignored=(255,))

    def list_pairs(self, root: str, split: str) -> list[tuple[str, str]]:
        inner = os.path.join(root, "VOCdevkit", "VOC2012")
        if os.path.isdir(inner):
            root = inner
        lists = os.path.join(root, "ImageSets", "Segmentation")
        names = os.path.join(lists, f"{split}.txt")
        labels = "SegmentationClass"
        augmented = os.path.join(lists, "train_aug.txt")
        if split == "train" and os.path.isfile(augmented):
            names = augmented
            labels = "SegmentationClassAug"
        if split == "train":
            refuse_overlap(names, os.path.join(lists, "val.txt"))
        images = os.path.join(root, "JPEGImages")
        return pairs_of_names(read_names(names), images, ".jpg", os.path.join(root, labels))


class Ade20k(Labelled):
    """ADE20K as ADEChallengeData2016, 150 classes (0 is ignored): `training`, `validation`."""

    classes = class_names("ade20k")
    colours = palette(range(1, 151))
    table = lookup_table(range(1, 151), ignored=(0,))

    def list_pairs(self, root: str, split: str) -> list[tuple[str, str]]:
        folder = {"train": "training", "val": "validation"}[split]
        images = os.path.join(root, "images", folder)
        return pair_up(images, os.path.join(root, "annotations", folder))


class Nyu(Labelled):
    """NYU-v2's labelled images, 40 classes (0 is ignored), in the official split, 795 and 654.

    `image`, `label40`, `train.txt` and `test.txt`: tools/prepare_nyu.py writes them.
    """

    classes = class_names("nyu")
    colours = palette(range(1, 41))
    table = lookup_table(range(1, 41), ignored=(0,))
    splits = ("train", "val", "test")  # val is test

    def list_pairs(self, root: str, split: str) -> list[tuple[str, str]]:
        names = os.path.join(root, "train.txt" if split == "train" else "test.txt")
        if not os.path.isfile(names):
            raise InputError(f"{names} is missing; python tools/prepare_nyu.py --data_path {root} "
                             "writes it")
        if split == "train":
            refuse_overlap(names, os.path.join(root, "test.txt"))
        images = os.path.join(root, "image")
        return pairs_of_names(read_names(names), images, ".png", os.path.join(root, "label40"))


class Nyu13(Nyu):
    """The same images and labels with 13 classes."""

    classes = class_names("nyu13")
    colours = palette(range(1, 14))
    table = Nyu.table.copy()
    table[1:41] = [int(word) - 1 for word in NYU13_OF_40.split()]


LABELLED = {
    "kitti": KittiSemantics,
    "synthetic": KittiSemantics,
    "cityscapes": Cityscapes,
    "camvid": CamVid,
    "nyu": Nyu,
    "nyu13": Nyu13,
    "voc": Voc,
    "ade20k": Ade20k,
}
