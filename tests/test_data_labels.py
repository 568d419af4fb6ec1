"""Labelled images in every data set's layout, and tools/check_data.py.

    python -m pytest tests/test_data_labels.py
    python -m pytest tests/test_data_labels.py -k check
"""

import os
import re
import shutil
from pathlib import Path

import make_data
import numpy as np
import pytest
import torch
from conftest import call, truncate
from make_data import assert_refused, labelled, options
from PIL import Image

import batches
from batches import train_batches
from tools import check_data
from utils import IGNORE, InputError

# ------------------------------------------------------------------------------------ ids

RAW_IDS = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}


def test_every_cityscapes_id(tmp_path):
    """Each raw id from 0 to 33, one a column: its train id, or ignored."""
    root = make_data.write_semantics(tmp_path, count=2)
    label = np.tile(np.arange(96, dtype=np.uint8) % 34, (64, 1))
    for path in Path(root, "training", "semantic").iterdir():
        make_data.write_array(path, label)
    data = labelled("kitti", root, "val")
    columns = data.native(0)[1][0].tolist()
    assert list(data.classes) == list(RAW_IDS)
    for raw in range(34):
        name = data.classes[columns[raw]] if columns[raw] != IGNORE else None
        assert name == {number: name for name, number in RAW_IDS.items()}.get(raw)
    assert len(data.colours) == len(data.classes) == 19


@pytest.mark.parametrize("size", ((64, 64), (64, 96), (96, 160), (352, 1216)))
def test_labels_keep_their_ids_when_resized(tmp_path, size):
    """{unlabelled, road, car} stay those three, and each new pixel has the id under its centre."""
    root = make_data.write_semantics(tmp_path, count=2, height=75, width=124)
    data = labelled("kitti", root, "val", height=size[0], width=size[1])
    image, label = data.load(0)
    native = data.native(0)[1]
    assert set(label.unique().tolist()) <= {0, 13, IGNORE} == set(native.unique().tolist())
    rows = ((torch.arange(size[0]) + 0.5) * 75 / size[0]).long()
    columns = ((torch.arange(size[1]) + 0.5) * 124 / size[1]).long()
    different = label.long() != native[rows][:, columns].long()
    assert different.float().mean() < 1e-2  # a centre on the seam of two pixels may go either way
    assert image.shape == (3, *size)
    assert image.dtype == torch.uint8
    own_size = data.load(0, native_label=True)[1]
    assert torch.equal(own_size.long(), native.long())


def test_labelled_batches(tmp_path):
    """Image and label are flipped and cropped together; labels are int64 train ids."""
    root = make_data.write_semantics(tmp_path, count=8)
    for path in sorted(Path(root, "training", "semantic").iterdir()):
        image = np.array(Image.open(str(path).replace("semantic", "image_2")))
        bright = image[..., 0] > 127
        make_data.write_array(path, np.where(bright, 26, 7).astype(np.uint8))
    extra = {"crop": (64, 64), "batch_size": 3, "steps": 4}
    data = labelled("kitti", root, "train", train=True, **extra)
    args = options("kitti", root, **extra)
    mirrored = 0
    for batch in train_batches(data, args, 0, torch.device("cpu")):
        assert batch["image"].shape == (3, 3, 64, 64)
        assert batch["label"].shape == (3, 64, 64)
        assert batch["label"].dtype == torch.int64
        expected = torch.where(batch["image"][:, 0] > 127.5 / 255, 13, 0)
        assert torch.equal(batch["label"], expected)
        mirrored += int(batch["mirrored"].sum())
        assert len(batch["index"]) == 3
    assert 0 < mirrored < 12


def test_test_images_are_fixed_and_draws_nested(tmp_path):
    root = make_data.write_semantics(tmp_path, count=25, height=32, width=32)
    test = labelled("kitti", root, "val").pairs
    assert len(test) == 9
    assert len(labelled("kitti", root, "train", train=True)) == 16
    chosen = {}
    for split_seed in range(3):
        for train_size in (2, 5, 16):
            draw = {"train_size": train_size, "split_seed": split_seed}
            assert labelled("kitti", root, "val", **draw).pairs == test
            pairs = labelled("kitti", root, "train", train=True, **draw).pairs
            assert len(set(pairs)) == train_size
            assert not set(pairs) & set(test)
            chosen[split_seed, train_size] = set(pairs)
        assert chosen[split_seed, 2] < chosen[split_seed, 5] < chosen[split_seed, 16]
    assert len({frozenset(chosen[split_seed, 5]) for split_seed in range(3)}) == 3
    too_many = {"train": True, "train_size": 17}
    assert_refused("--train_size 17.*16", labelled, "kitti", root, "train", **too_many)


def test_images_that_are_left_out(tmp_path):
    """--leave_out: never in training, neither in evaluation; a name that is none is refused."""
    root = make_data.write_semantics(tmp_path, count=10)
    for split in ("train", "val"):
        everything = labelled("kitti", root, split, train=split == "train").pairs
        name = Path(everything[0][0]).stem
        rest = labelled("kitti", root, split, train=split == "train", leave_out=[name]).pairs
        assert rest == [pair for pair in everything if name not in pair[0]]
    assert_refused("nowhere", labelled, "kitti", root, "train", train=True, leave_out=["nowhere"])
    everyone = [Path(image).stem for image, _ in labelled("kitti", root, "val").pairs]
    assert_refused("--leave_out", labelled, "kitti", root, "val", leave_out=everyone)


@pytest.mark.parametrize("scale", ((0.5, 0.5), (2, 2), (0.5, 2)))
def test_image_and_label_are_scaled_together(tmp_path, scale):
    """Where an image does not fill its crop, it is neutral and ignored."""
    root = make_data.write_semantics(tmp_path, count=12)
    bright = np.zeros((64, 96), bool)
    bright[10:40, 30:70] = True
    for path in Path(root, "training", "semantic").iterdir():
        label = np.where(bright, 26, 7)
        picture = np.repeat(255 * bright[..., None], 3, 2)
        make_data.write_array(path, label.astype(np.uint8))
        place = str(path).replace("semantic", "image_2")
        make_data.write_array(place, picture.astype(np.uint8))
    extra = {"crop": (64, 64), "scale": scale, "batch_size": 3, "steps": 4}
    data = labelled("kitti", root, "train", train=True, **extra)
    padded = []
    args = options("kitti", root, **extra)
    for batch in train_batches(data, args, 0, torch.device("cpu")):
        grey = batch["image"].mean(1)
        label = batch["label"]
        outside = label == IGNORE
        neutral = torch.full_like(grey[outside], batches.NEUTRAL)
        torch.testing.assert_close(grey[outside], neutral)
        expected = torch.where(grey > 0.5, 13, 0)
        wrong = (label != expected) & ~outside
        assert wrong.float().mean() < 0.01
        padded += outside.float().mean((1, 2)).tolist()
    if scale[1] == 0.5:
        assert padded == [1 - 32 * 48 / 64**2] * 12
    elif scale[0] == 2:
        assert padded == [0] * 12
    else:
        assert len(set(padded)) > 3


# ------------------------------------------------------------------------------------ layouts


def test_cityscapes_labels(tmp_path):
    root = make_data.write_cityscapes(tmp_path)
    train = labelled("cityscapes", root, "train", train=True)
    val = labelled("cityscapes", root, "val")
    assert len(train) == 4
    assert len(val) == 2
    assert all("/train/" in path for pair in train.pairs for path in pair)
    assert all("/val/" in path for pair in val.pairs for path in pair)
    raw = np.array(Image.open(val.pairs[0][1]))
    expected = np.select([raw == 7, raw == 23, raw == 26], (0, 10, 13), 255)
    assert (val.native(0)[1].numpy() == expected).all()


def test_camvid_labels(tmp_path):
    root = make_data.write_camvid(tmp_path)
    train = labelled("camvid", root, "train", train=True)
    val = labelled("camvid", root, "val")
    assert (len(train), len(val)) == (4, 3)
    assert set(val.native(0)[1].unique().tolist()) == {0, 3, 8, IGNORE}
    assert [train.classes[i] for i in (0, 3, 8)] == ["sky", "road", "car"]


def test_voc_lists_and_palette(tmp_path):
    """Training from the augmented list where there is one; labels are palette PNGs, 255 is ignored."""
    listed = {
        "train": ["2007_000032"],
        "val": ["2007_000033"],
        "train_aug": ["2007_000032", "2008_000002"],
    }
    root = make_data.write_voc(tmp_path, listed)
    data = labelled("voc", tmp_path, "train", train=True)
    assert len(data) == 2
    assert all("SegmentationClassAug" in label for _, label in data.pairs)
    assert data.native(0)[1].unique().tolist() == [0, 15, 255]
    assert data.classes[15] == "person"
    assert tuple(data.colours[15]) == (192, 128, 128)
    assert len(data.classes) == len(data.colours) == 21
    os.remove(f"{root}/ImageSets/Segmentation/train_aug.txt")
    assert len(labelled("voc", root, "train", train=True)) == 1
    os.remove(f"{root}/JPEGImages/2007_000033.jpg")
    assert_refused("2007_000033.jpg", labelled, "voc", root, "val")


def test_ade20k_classes(tmp_path):
    data = labelled("ade20k", make_data.write_ade20k(tmp_path), "val")
    first = data.native(0)[1].flatten()[:152].tolist()
    assert first == [IGNORE, *range(150), 149]
    assert len(data.classes) == len(set(data.classes)) == len(set(data.colours)) == 150
    assert [data.classes[i] for i in (0, 12, 20, 149)] == ["wall", "person", "car", "flag"]


@pytest.mark.parametrize("name, count", (("nyu", 40), ("nyu13", 13)))
def test_nyu_classes(tmp_path, name, count):
    root = make_data.write_nyu(tmp_path)
    train = labelled(name, root, "train", train=True)
    val = labelled(name, root, "val")
    assert (len(train), len(val)) == (2, 1)
    assert [Path(image).name for image, _ in val.pairs] == ["0002.png"]
    assert len(train.classes) == len(train.colours) == count
    raw = np.array(Image.open(val.pairs[0][1]))
    label = val.native(0)[1].numpy()
    assert (label[raw == 0] == IGNORE).all()
    of_40 = labelled("nyu", root, "val").classes
    pairs = {
        "wall": "wall",
        "door": "wall",
        "bookshelf": "furniture",
        "desk": "table",
        "curtain": "window",
        "television": "television",
        "floor mat": "floor",
        "lamp": "objects",
    }
    for fine, coarse in pairs.items():
        expected = fine if count == 40 else coarse
        found = {train.classes[i] for i in np.unique(label[raw == 1 + of_40.index(fine)])}
        assert found == {expected}


def test_nyu_that_was_not_unpacked(tmp_path):
    assert_refused("prepare_nyu", labelled, "nyu", tmp_path, "train", train=True)


def test_camvid_is_scored_on_val_and_test_together(tmp_path):
    """Where the folder is there; training never sees it."""
    root = make_data.write_camvid(tmp_path)
    make_data.write_camvid(tmp_path / "other", val=5)
    for suffix in ("", "annot"):
        shutil.copytree(tmp_path / "other" / f"val{suffix}", tmp_path / f"test{suffix}")
    sizes = {split: len(labelled("camvid", root, split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 4, "val": 8, "test": 5}


@pytest.mark.parametrize("split", ("val", "test"))
def test_camvid_does_not_train_on_what_it_is_scored_on(tmp_path, split):
    """An image is known by its name, as in the lists of VOC and NYU, whatever its extension."""
    root = make_data.write_camvid(tmp_path)
    make_data.write_image(f"{root}/{split}/0001TP_006690.jpg")
    words = f"{root}/train and {root}/{split} share 1 images, 0001TP_006690"
    assert_refused(words, labelled, "camvid", root, "train", train=True)


def test_a_split_that_is_not_there(tmp_path):
    """CamVid has a test split elsewhere; here the folder is absent, which is said."""
    root = make_data.write_camvid(tmp_path)
    assert_refused("test", labelled, "camvid", root, "test")
    assert_refused("nowhere", labelled, "camvid", tmp_path / "nowhere", "val")
    assert_refused("--data frames|frames", labelled, "frames", root, "val")


# ------------------------------------------------------------------------------------ what is refused


def test_labels_that_are_refused(tmp_path):
    root = make_data.write_semantics(tmp_path, count=2)
    data = labelled("kitti", root, "val")
    path = data.pairs[0][1]
    colours = [value for colour in data.colours for value in colour]
    label = np.full((64, 96), 7, np.uint8)

    def refusal(image: Image.Image, words: str) -> None:
        image.save(path)
        assert_refused(f"{path}.*{words}", labelled("kitti", root, "val").native, 0)

    refusal(Image.fromarray(label).convert("RGB"), "RGB")
    refusal(Image.fromarray(label.astype(np.uint16) * 100), "I;16")
    refusal(Image.fromarray(label[:32]), "96x32|32, 96")
    refusal(Image.fromarray(label + 40), "47")
    painted = Image.fromarray(label)
    painted.putpalette(colours)  # entry 7, the road, has the colour of class 7, the traffic sign
    refusal(painted, "road.*traffic sign")
    painted.putpalette([0, 0, 0] * 7 + colours[:3])
    painted.save(path)
    assert labelled("kitti", root, "val").native(0)[1].unique().tolist() == [0]


def test_a_label_of_an_image_that_exif_turns_is_refused(tmp_path):
    root = make_data.write_semantics(tmp_path, count=2)
    data = labelled("kitti", root, "val")
    make_data.write_image(data.pairs[0][0], exif=make_data.turned(6))
    assert_refused(
        "96x64.*64x96|64x96.*96x64|\\(96, 64\\)|\\(64, 96\\)",
        labelled("kitti", root, "val").native,
        0,
    )


def write_train_ids(root) -> str:
    """Cityscapes where the files called labelIds hold train ids."""
    make_data.write_cityscapes(root)
    for path in Path(root, "gtFine").rglob("*labelIds.png"):
        label = make_data.blocks((0, 2, 8, 10, 13, 18, 255), 64, 128, seed=len(str(path)))
        make_data.write_array(path, label)
    return str(root)


def test_train_ids_in_label_id_files(tmp_path):
    """255 occurs and nothing above 18: refused by training, or at least warned of by the check."""
    root = write_train_ids(tmp_path)
    try:
        labelled("cityscapes", root, "train", train=True).read_all()
    except InputError as refusal:
        assert re.search("train id", str(refusal))
    result = call(check_data, "--data", "cityscapes", "--data_path", root, "--labels", *QUICK)
    assert "train ids" in result.out + result.err


def test_missing_labels_and_images(tmp_path):
    root = make_data.write_camvid(tmp_path)
    lost = sorted(Path(root, "valannot").iterdir())[0]
    lost.unlink()
    assert_refused(lost.name, labelled, "camvid", root, "val")
    shutil.rmtree(f"{root}/val")
    assert_refused("val", labelled, "camvid", root, "val")


@pytest.mark.parametrize("split, use", (("train", "training"), ("val", "evaluated")))
def test_images_without_any_label_are_refused_before_a_run(tmp_path, split, use):
    """One labelled pixel is enough."""
    root = make_data.write_camvid(tmp_path, ids=(11,))
    native = split == "val"
    data = labelled("camvid", root, split)
    words = f"{split}annot: no {use} pixel is labelled"
    assert_refused(words, data.read_all, native_label=native)

    label = np.full((64, 96), 11, np.uint8)
    label[32, 48] = 3
    make_data.write_array(data.pairs[0][1], label)
    data = labelled("camvid", root, split)
    assert data.read_all(native) == {3, IGNORE}


def test_everything_is_read_before_a_run(tmp_path):
    root = make_data.write_semantics(tmp_path, count=6)
    data = labelled("kitti", root, "train", train=True)
    assert set(data.read_all()) == {0, 13, IGNORE}
    truncate(data.pairs[-1][0], 0.5)
    assert_refused(
        Path(data.pairs[-1][0]).name, labelled("kitti", root, "train", train=True).read_all
    )


# ------------------------------------------------------------------------------------ tools/check_data.py: clips

QUICK = ("--num_workers", "0", "--height", "64", "--width", "96")


def check(data: str, path, *more, expect: int = 0):
    return call(check_data, "--data", data, "--data_path", path, *QUICK, *more, expect=expect)


def assert_says(result, *patterns: str) -> None:
    text = " ".join(result.out.split())
    for pattern in patterns:
        assert re.search(pattern, text), (pattern, result)


@pytest.mark.parametrize("cx, warns", ((47.5, False), (52, False), (55.5, True), (39.5, True)))
def test_intrinsics_off_the_centre_are_warned_of(tmp_path, cx, warns):
    """As KITTI's are with images that were saved at another size and aspect."""
    root = make_data.write_frames(
        tmp_path / "video", [f"{number}.png" for number in range(4)], f"60 60 {cx} 31.5"
    )
    result = check("frames", root)
    assert ("centre" in result.err) == warns


def write_moving_video(root, count: int = 12, step: int = 4) -> str:
    """A camera that pans over a picture, so that neighbours look alike and others less."""
    wide = make_data.picture(64, 96 + step * count, seed=5)
    for number in range(count):
        view = wide[:, step * number : step * number + 96]
        make_data.write_array(f"{root}/{number:04d}.png", np.ascontiguousarray(view))
    make_data.write_text(f"{root}/intrinsics.txt", "60 60 47.5 31.5")
    return str(root)


def test_check_tells_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(check_data, "SHOWN", 2)
    root = write_moving_video(tmp_path / "video")
    for number in range(12):
        make_data.write_depth(f"{root}/depth/{number:04d}.png", 2 + number)
    sheet = tmp_path / "contact.png"
    result = check("frames", root, "--depth", "--output", sheet)
    assert_says(
        result,
        "10 samples",
        "10 distinct targets",
        "0001.png .* 0010.png",
        r"96x64 \(10\)",
        "fx 60.0",
        "intrinsics.txt",
        "near-static",
        "measured",
    )
    assert "warning" in result.out + result.err  # 2 of 12 were left out
    assert Image.open(sheet).width > 4 * 96


def test_check_refuses_what_training_refuses(tmp_path):
    """A folder without intrinsics and no --fov; a folder that is not there; no usable sample."""
    root = make_data.write_frames(tmp_path / "video", make_data.numbered("{}.jpg", range(4)), None)
    result = check("frames", root, expect=2)
    assert "--fov" in result.err
    assert_says(check("frames", root, "--fov", "60"), "--fov")
    assert "nowhere" in check("kitti", tmp_path / "nowhere", expect=2).err
    assert check("frames", root, "--fov", "60", "--frame_ids", "0", "9", expect=2).err


def test_check_lists_everything_that_is_broken(tmp_path):
    root = make_data.write_frames(tmp_path / "video", make_data.numbered("{}.jpg", range(8)))
    for number in (2, 5):
        truncate(f"{root}/{number}.jpg", 0.5)
    result = check("frames", root, "--frame_ids", "0", expect=2)
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert all(f"{number}.jpg" in result.err for number in (2, 5))
    assert "2" in result.out.splitlines()[-1]


def test_check_warns_of_a_wrong_order(tmp_path):
    root = write_moving_video(tmp_path / "video", count=24)
    assert "order" not in check("frames", root).err
    order = np.random.default_rng(0).permutation(24)
    contents = [Path(root, f"{number:04d}.png").read_bytes() for number in range(24)]
    for number, source in enumerate(order):
        Path(root, f"{number:04d}.png").write_bytes(contents[source])
    assert "order" in check("frames", root).err


def test_check_counts_pictures_that_are_the_same(tmp_path):
    """12 frames of which 4 show the same: near-static, and fewer distinct pictures than targets."""
    root = write_moving_video(tmp_path / "video")
    for number in (6, 7, 8):
        shutil.copy(f"{root}/0005.png", f"{root}/{number:04d}.png")
    result = check("frames", root, "--frame_ids", "0", "1")
    assert_says(
        result, "11 samples", "11 distinct targets", "8 distinct pictures", r"near-static.* 27"
    )


def test_check_finds_training_images_that_evaluation_shows(tmp_path):
    """Saved anew as JPEG, under another name."""
    root = write_moving_video(tmp_path / "video", step=16)
    other = tmp_path / "evaluation"
    for number in (3, 7):
        os.makedirs(other, exist_ok=True)
        Image.open(f"{root}/{number:04d}.png").save(other / f"test_{number}.jpg", quality=95)
    make_data.write_image(other / "strange.jpg", seed=99)
    result = check("frames", root, "--against", other)
    assert_says(result, "2 .*test_3.jpg")
    assert "strange" not in result.out + result.err


def test_check_warns_of_implausible_depth(tmp_path):
    root = write_moving_video(tmp_path / "video")
    for number in range(12):
        depth = np.full((64, 96), 4000, np.uint16)
        depth[:24] = 60000
        make_data.write_array(f"{root}/depth/{number:04d}.png", depth)
    result = check("frames", root, "--depth", "--depth_scale", "100")
    assert_says(result, "40.00 m", "600")
    assert "100 m" in result.err
    unlikely = check("frames", root, "--depth", "--depth_scale", "65535")
    assert "--depth_scale" in unlikely.err


def write_stereo(root, disparity: int = 5) -> str:
    """A drive past a wall: the right camera sees it `disparity` pixels further left."""
    make_data.write_calibration(root / "2011_09_26")
    wide = make_data.picture(64, 160, seed=3)
    for number in range(4):
        for side in (2, 3):
            start = 6 * number + disparity * (side == 3)
            view = np.ascontiguousarray(wide[:, start : start + 96])
            path = root / make_data.DRIVE / f"image_0{side}" / "data" / f"{number:010d}.png"
            make_data.write_array(path, view)
    return str(root)


def test_check_of_stereo(tmp_path):
    """K at native and training size, both cameras, a sheet; swapped cameras are noticed."""
    root = write_stereo(tmp_path / "kitti")
    sheet = tmp_path / "contact.png"
    more = ("--frame_ids", "0", "s", "--width", "64")
    result = check("kitti", root, *more, "--output", sheet)
    assert_says(
        result,
        "8 samples",
        "8 distinct targets",
        r"96x64 \(8\)",
        "calib_cam_to_cam.txt",
        "fx 56.0 .* fx 37.3",
        "image_02",
        "image_03",
    )
    assert "swapped" not in result.err
    assert Image.open(sheet).width > 5 * 96
    drive = tmp_path / "kitti" / make_data.DRIVE
    os.rename(drive / "image_02", drive / "aside")
    os.rename(drive / "image_03", drive / "image_02")
    os.rename(drive / "aside", drive / "image_03")
    assert "swapped" in check("kitti", root, *more).err


# ------------------------------------------------------------------------------------ tools/check_data.py: labels


def test_check_of_labels(tmp_path):
    root = make_data.write_cityscapes(tmp_path / "data")
    sheet = tmp_path / "sheet.png"
    result = check("cityscapes", root, "--labels", "--output", sheet)
    raw = np.stack(
        [np.array(Image.open(path)) for path in Path(root, "gtFine", "train").rglob("*.png")]
    )
    assert_says(
        result,
        "train: 4 images",
        "val: 2 images",
        r"128x64 \(4\)",
        f"car {100 * (raw == 26).mean():.2f} %",
        f"unlabelled {100 * (raw == 0).mean():.2f} %",
    )
    assert Image.open(sheet).width > 300

    broken = [
        truncate(path, 0.6)
        for path in sorted(Path(root, "leftImg8bit", "train").rglob("*.png"))[:2]
    ]
    last = sorted(Path(root, "gtFine", "train").rglob("*.png"))[3]
    broken.append(make_data.write_array(last, np.full((64, 128), 99, np.uint8)))
    result = check("cityscapes", root, "--labels", expect=2)
    assert sum(line.startswith("error: ") for line in result.err.splitlines()) == 3
    assert all(Path(path).name in result.err for path in broken)


def test_check_finds_images_of_training_in_evaluation(tmp_path):
    root = make_data.write_camvid(tmp_path)
    shutil.copy(f"{root}/train/0001TP_006690.png", f"{root}/val/0016E5_07959.png")
    result = check("camvid", root, "--labels")
    assert re.search(
        "0016E5_07959.*0001TP_006690|0001TP_006690.*0016E5_07959", result.out + result.err
    )


def test_check_warns_of_suspicious_labels(tmp_path):
    """Nearly everything unlabelled; the same map for every image; a split that is not there is no error."""
    root = make_data.write_camvid(tmp_path)
    for path in Path(root, "trainannot").iterdir():
        label = np.full((64, 96), 11, np.uint8)
        label[:10] = 3
        make_data.write_array(path, label)
    result = check("camvid", root, "--labels")
    assert "unlabelled" in result.err
    assert re.search("same label", result.err)
