"""Clips for pre-training: every reader in its data set's layout, its intrinsics, depth and refusals.

    python -m pytest tests/test_data.py
    python -m pytest tests/test_data.py -k kitti
"""

import json
import os
import re
import shutil
from pathlib import Path

import make_data
import numpy as np
import pytest
import torch
from conftest import truncate
from make_data import assert_refused, clips, intrinsics, names, numbered, read_first, target_names
from PIL import Image, ImageOps

import datasets
import losses
from images import image_size, natural_key, read_ids, read_image
from utils import InputError

# ------------------------------------------------------------------------------------ own frames: names and order


def same_sequence(sample_names: list[str], key: str) -> bool:
    """Whether the part of the names that `key` matches is the same for all."""
    return len({re.search(key, name)[0] for name in sample_names}) == 1


@pytest.mark.parametrize(
    "patterns, key",
    (
        (("seqA_{:04d}.jpg", "seqB_{:04d}.jpg"), "seq."),
        (("left_{:04d}.jpg", "right_{:04d}.jpg"), "left|right"),
        (("cam0_{:06d}.jpg", "cam1_{:06d}.jpg"), "cam."),
        (("take-1-{}.jpg", "take-2-{}.jpg"), "take-."),
        (("{:04d}_left.jpg", "{:04d}_right.jpg"), "left|right"),
    ),
)
def test_two_sequences_in_one_folder(tmp_path, patterns, key):
    """Every image is a target of its own, and its neighbours belong to the same sequence."""
    files = [name for pattern in patterns for name in numbered(pattern, range(12))]
    root = make_data.write_frames(tmp_path / "data", files)
    alone = clips("frames", root, "0")
    assert sorted(target_names(alone)) == sorted(files)
    with_neighbours = clips("frames", root, "0 -1 1")
    assert len(with_neighbours) == len(set(with_neighbours.targets())) == 20
    assert all(same_sequence(sample, key) for sample in names(with_neighbours))
    numbers = [
        [int(re.findall(r"\d+", re.sub(key, "", name))[-1]) for name in sample]
        for sample in names(with_neighbours)
    ]
    assert all(
        after == [number, number - 1, number + 1] for after in numbers for number in after[:1]
    )


def test_depth_of_two_sequences_in_one_folder(tmp_path):
    root = make_data.write_frames(tmp_path / "data", [])
    for metres, sequence in ((3, "seqA"), (7, "seqB")):
        for number in range(4):
            make_data.write_image(f"{root}/{sequence}_{number:04d}.jpg", seed=10 * metres + number)
            make_data.write_depth(f"{root}/depth/{sequence}_{number:04d}.png", metres)
    dataset = clips("frames", root, "0", with_depth=True)
    assert len(set(dataset.targets())) == 8
    for index, target in enumerate(target_names(dataset)):
        measured = dataset.read(index)["depth"].unique().tolist()
        assert measured == [3.0 if target.startswith("seqA") else 7.0]


def test_images_beside_depth_of_the_same_name(tmp_path):
    """1.jpg is an image, 1.png its 8-bit depth: only the .jpg is trained on."""
    root = make_data.write_frames(tmp_path / "data", numbered("{}.jpg", range(1, 13)))
    for number in range(1, 13):
        make_data.write_array(f"{root}/{number}.png", np.full((64, 96), 10 * number, np.uint8))
    try:
        dataset = clips("frames", root, "0 -1 1")
    except InputError as refusal:  # as good, if it names both files
        assert "1.jpg" in str(refusal)
        assert "1.png" in str(refusal)
    else:
        assert target_names(dataset) == numbered("{}.jpg", range(2, 12))
        assert all(name.endswith(".jpg") for sample in names(dataset) for name in sample)


def nanoseconds(count: int, jitter: int) -> list[str]:
    """Names of frames at 20 Hz, off by up to `jitter` nanoseconds."""
    draws = np.random.default_rng(0).integers(-jitter, jitter + 1, count)
    start = 1403636579763555584
    return [f"{start + 50_000_000 * i + int(draws[i])}.jpg" for i in range(count)]


def microseconds(count: int) -> list[str]:
    """TUM's names: seconds, a point and microseconds, at 30 Hz with some jitter."""
    draws = np.random.default_rng(1).integers(-900, 901, count)
    steps = [33_333 * i + int(draws[i]) for i in range(count)]
    return [
        f"{1305031102 + (175_304 + s) // 1_000_000}.{(175_304 + s) % 1_000_000:06d}.png"
        for s in steps
    ]


def dates(count: int) -> list[str]:
    """A date, a time and milliseconds, at 10 Hz, over the turn of a minute."""
    found = []
    for i in range(count):
        tenths = 589 + i
        found.append(
            f"2024-05-01_12-{10 + tenths // 600:02d}-{tenths % 600 // 10:02d}.{tenths % 10}00.jpg"
        )
    return found


@pytest.mark.parametrize(
    "files",
    (nanoseconds(24, 500), microseconds(24), dates(24)),
    ids=("nanoseconds", "microseconds", "dates"),
)
def test_frames_named_by_time(tmp_path, files):
    """Neighbours follow from the order where steps are within a tolerance: 22 of 24 have both."""
    root = make_data.write_frames(tmp_path / "data", files)
    dataset = clips("frames", root, "0 -1 1")
    expected = [[files[i], files[i - 1], files[i + 1]] for i in range(1, 23)]
    assert names(dataset) == expected


def test_a_gap_in_time_separates_frames(tmp_path):
    files = nanoseconds(24, 500)
    root = make_data.write_frames(tmp_path / "data", files[:10] + files[14:])
    dataset = clips("frames", root, "0 -1 1")
    assert target_names(dataset) == files[1:9] + files[15:23]


@pytest.mark.parametrize(
    "numbers, frame_ids, targets",
    (
        ((1, 2, 3, 5, 6), "0 -1 1", [2]),
        ((1, 2, 3, 5, 6), "0 -1", [2, 3, 6]),
        ((8, 9, 10, 11, 100, 101), "0 1", [8, 9, 10, 100]),
        ((2, 4, 6, 10, 12), "0 -1", [4, 6, 12]),  # every second frame was kept
        ((1, 2, 3, 4, 5, 6), "0 -2 2", [3, 4]),
    ),
)
def test_gaps_between_frames(tmp_path, numbers, frame_ids, targets):
    root = make_data.write_frames(tmp_path / "video", numbered("frame{}.jpg", numbers))
    dataset = clips("frames", root, frame_ids)
    step = numbers[1] - numbers[0]
    offsets = [step * int(offset) for offset in frame_ids.split()]
    assert names(dataset) == [numbered("frame{}.jpg", [t + o for o in offsets]) for t in targets]
    assert str(len(numbers) - len(targets)) in dataset.dropped


def test_natural_order():
    mixed = ["f10.png", "f9.png", "f100.png", "a1b2.png", "a1b10.png"]
    expected = ["a1b2.png", "a1b10.png", "f9.png", "f10.png", "f100.png"]
    assert sorted(mixed, key=natural_key) == expected


def test_a_root_that_is_called_depth(tmp_path):
    root = make_data.write_frames(tmp_path / "depth", numbered("{:04d}.jpg", range(14)))
    assert len(clips("frames", root, "0 -1 1")) == 12


def test_folders_within_a_root(tmp_path):
    """Each folder is a sequence; --drives and --frames choose among them; an odd link does no harm."""
    for folder in ("Szene 1", "a/b/c/d/e/f/ä 图"):
        make_data.write_frames(
            tmp_path / folder, numbered("Bild {} ü.jpg", range(5)), intrinsics=None
        )
    make_data.write_text(tmp_path / "intrinsics.txt", "60 60 47.5 31.5")
    os.symlink("loop", tmp_path / "loop")
    os.symlink(".", tmp_path / "same")
    assert len(clips("frames", tmp_path, "0 1")) == 8
    assert len(clips("frames", tmp_path, "0 1", "--drives", "ä 图")) == 4
    chosen = clips("frames", tmp_path, "0", "--frames", "1:3")
    assert set(target_names(chosen)) == {"Bild 1 ü.jpg", "Bild 2 ü.jpg"}
    assert len(chosen) == 4
    assert_refused(
        "--drives nowhere|nowhere", clips, "frames", tmp_path, "0", "--drives", "nowhere"
    )


def test_a_list_of_targets(tmp_path):
    """--split FILE: these targets only, with neighbours from the whole folder."""
    root = make_data.write_frames(tmp_path / "video", numbered("{:04d}.jpg", range(10)))
    listed = make_data.write_text(tmp_path / "list.txt", "0003.jpg\n0007.jpg\n")
    dataset = clips("frames", root, "0 -1 1", "--split", listed)
    assert names(dataset) == [
        ["0003.jpg", "0002.jpg", "0004.jpg"],
        ["0007.jpg", "0006.jpg", "0008.jpg"],
    ]
    wrong = make_data.write_text(tmp_path / "wrong.txt", "0003.jpg\n0077.jpg\n")
    assert_refused("0077", clips, "frames", root, "0 -1 1", "--split", wrong)


@pytest.mark.parametrize(
    "name, words",
    (
        ("clip.mp4", "ffmpeg"),
        ("holiday.MOV", "ffmpeg"),
        ("photo.webp", "webp"),
        ("photo.heic", "heic"),
    ),
)
def test_files_that_are_not_read_come_with_the_line_that_converts_them(tmp_path, name, words):
    make_data.write_text(tmp_path / "video" / name, "not an image")
    assert_refused(
        f"{name}.*{words}|{words}.*{name}", clips, "frames", tmp_path / "video", "0", "--fov", "60"
    )


# ------------------------------------------------------------------------------------ own frames: intrinsics


@pytest.mark.parametrize(
    "text",
    (
        "60 62 47.5 31.5",
        "60 0 47.5\n0 62 31.5\n0 0 1\n",
        "\ufeff60 0 47.5\n0 62 31.5\n0 0 1\n",
        "60, 0, 47.5\n0, 62, 31.5\n0, 0, 1\n",
        "60,0,47.5,0,62,31.5,0,0,1",
    ),
    ids=("four", "nine", "byte-order mark", "commas", "one line"),
)
def test_intrinsics_as_people_write_them(tmp_path, text):
    root = make_data.write_frames(tmp_path / "video", ["1.jpg"], intrinsics=text)
    assert intrinsics(clips("frames", root).read(0)["K"]) == pytest.approx([60, 62, 47.5, 31.5])


@pytest.mark.parametrize(
    "text",
    (
        "nan 60 47 31",
        "60 inf 47 31",
        "0 0 47 31",
        "-60 60 47 31",
        "0.6 0.9 0.5 0.5",
        "60 60 97 31",
        "60 60 47 -1",
        "60 60 0 31",
        "60 60 47",
        "fx fy cx cy",
        "",
        "60 0 47 5 60 31 0 0 1",
        "60 0 47 0 60 31 0 0 2",
    ),
)
def test_impossible_intrinsics(tmp_path, text):
    root = make_data.write_frames(tmp_path / "video", ["1.jpg"], intrinsics=text)
    assert_refused("intrinsics.txt", read_first, "frames", root)


def test_no_intrinsics_and_no_field_of_view(tmp_path):
    root = make_data.write_frames(tmp_path / "video", ["1.jpg", "2.jpg"], intrinsics=None)
    assert_refused("--fov", read_first, "frames", root)


def test_one_field_of_view_for_images_of_two_sizes(tmp_path):
    """The camera of --fov 80 spans 80 degrees of either image: fx 190.7 at a width of 320."""
    root = tmp_path / "data"
    make_data.write_frames(root, numbered("{:04d}.jpg", range(4)), None, height=120, width=400)
    make_data.write_frames(
        root, numbered("{:04d}.jpg", range(100, 104)), None, height=240, width=800
    )
    dataset = clips("frames", root, "0 -1 1", "--fov", "80", "--width", "320", "--height", "96")
    found = {
        tuple(round(value, 3) for value in intrinsics(dataset.read(i)["K"]))
        for i in range(len(dataset))
    }
    focal = 160 / np.tan(np.radians(40))
    assert len(dataset) == 4
    assert found == {(round(focal, 3), round(focal, 3), 159.5, 47.5)}
    assert focal == pytest.approx(190.7, abs=0.05)


def test_intrinsics_of_another_resolution_are_scaled_or_refused(tmp_path):
    """K of 1242x375 on images of 640x192, where the principal point would still lie inside."""
    text = "721.5 721.5 609.6 172.9"
    root = make_data.write_frames(tmp_path / "video", ["1.jpg"], text, height=192, width=640)
    assert_refused("intrinsics.txt.*640x192", read_first, "frames", root)


def test_cameras_of_turned_images(tmp_path):
    """EXIF orientation 6: stored 320x240, shown 240x320; learned intrinsics start from what is shown."""
    for folder, size, extra in (
        ("turned", (240, 320), {"exif": make_data.turned(6)}),
        ("upright", (320, 240), {}),
    ):
        for number in range(4):
            path = tmp_path / folder / f"{number:04d}.jpg"
            make_data.write_image(path, *size, seed=number, **extra)
    found = {}
    for folder in ("turned", "upright"):
        dataset = clips("frames", tmp_path / folder, "0 -1 1", "--fov", "60")
        cameras = datasets.find_cameras(dataset, 60.0)
        assert [tuple(shape) for shape in cameras.shapes] == [(320, 240)]
        assert len(cameras.folders) == 1
        found[folder] = intrinsics(cameras.start[0])
    focal = 120 / np.tan(np.radians(30))
    assert found["turned"] == pytest.approx(found["upright"])
    assert found["turned"] == pytest.approx(
        [focal * 96 / 240, focal * 64 / 320, 47.5, 31.5], rel=1e-4
    )


def test_learned_intrinsics_start_from_what_is_known(tmp_path):
    """From intrinsics.txt; from --fov where it is given as well; one camera a folder."""
    for folder, focal in (("one", 60), ("two", 75)):
        files = numbered("{}.jpg", range(3))
        make_data.write_frames(tmp_path / folder, files, f"{focal} {focal} 47.5 31.5")
    dataset = clips("frames", tmp_path, "0 1")
    cameras = datasets.find_cameras(dataset, None)
    assert [os.path.basename(folder) for folder in cameras.folders] == ["one", "two"]
    assert [float(K[0, 0]) for K in cameras.given] == [60, 75]
    assert torch.equal(cameras.given, cameras.start)
    assert [float(K[0, 0]) for K in datasets.find_cameras(dataset, 90.0).start] == pytest.approx(
        [48, 48]
    )


def test_intrinsics_of_every_frame(tmp_path):
    """SfMLearner's NAME_cam.txt: nine numbers with commas, for that frame."""
    root = make_data.write_frames(tmp_path / "video", numbered("{:06d}.jpg", range(4)), None)
    for number in range(4):
        text = f"{60 + number}.0,0.0,47.5,0.0,62.0,31.5,0.0,0.0,1.0"
        make_data.write_text(f"{root}/{number:06d}_cam.txt", text)
    dataset = clips("frames", root, "0")
    assert [float(dataset.read(i)["K"][0, 0]) for i in range(4)] == [60, 61, 62, 63]


# ------------------------------------------------------------------------------------ own frames: depth and stereo


def test_measured_depth_of_own_frames(tmp_path):
    root = make_data.write_frames(tmp_path / "video", numbered("frame{}.png", (1, 2, 3)), None)
    for number in (1, 3):
        make_data.write_depth(f"{root}/depth/frame{number}.png", 2.5 * number)
    dataset = clips("frames", root, "0", "--fov", "90", with_depth=True)
    assert target_names(dataset) == ["frame1.png", "frame3.png"]
    assert "1 without" in dataset.dropped
    assert dataset.read(1)["depth"].unique().tolist() == [7.5]
    assert intrinsics(dataset.read(0)["K"]) == pytest.approx([48, 48, 47.5, 31.5])
    scaled = clips("frames", root, "0", "--fov", "90", "--depth_scale", "5000", with_depth=True)
    assert scaled.read(1)["depth"].unique().tolist() == [1.5]


@pytest.mark.parametrize("exif", (None, 6))
def test_depth_of_another_shape_is_refused(tmp_path, exif):
    """An image that EXIF turns upright beside depth that lies, and one whose depth was cropped."""
    root = tmp_path / "data"
    extra = {"exif": make_data.turned(exif)} if exif else {}
    make_data.write_image(root / "1.jpg", 240, 320, **extra)
    shape = (240, 320) if exif else (240, 240)
    make_data.write_depth(root / "depth" / "1.png", 3, *shape)
    image = "240x320" if exif else "320x240"
    depth = f"{shape[1]}x{shape[0]}"
    read = f"{depth}.*{image}|{image}.*{depth}"
    assert_refused(read, lambda: read_first("frames", root, "0", "--fov", "60", with_depth=True))


def test_depth_of_a_smaller_sensor_is_taken(tmp_path):
    """Depth of half the resolution and the same aspect is as good."""
    make_data.write_image(tmp_path / "1.jpg", 128, 192)
    make_data.write_depth(tmp_path / "depth" / "1.png", 3)
    sample = read_first("frames", tmp_path, "0", "--fov", "60", with_depth=True)
    assert sample["depth"].unique().tolist() == [3.0]


def test_far_depth_is_read_as_it_is_and_does_not_train(tmp_path):
    """Sky at 60000 is 600 m: beyond --max_depth it has no part in the loss."""
    make_data.write_image(tmp_path / "1.jpg")
    depth = np.full((64, 96), 5000, np.uint16)
    depth[:20] = 60000
    make_data.write_array(tmp_path / "depth" / "1.png", depth)
    sample = read_first(
        "frames", tmp_path, "0", "--fov", "60", "--depth_scale", "100", with_depth=True
    )
    assert sample["depth"].max() == pytest.approx(600)
    at_50_metres = (1 / 50 - 1 / 100) / (1 / 0.1 - 1 / 100)
    disparities = [torch.full((1, 1, 64 >> s, 96 >> s), at_50_metres) for s in range(4)]
    terms, _ = losses.supervised_depth_loss(disparities, sample["depth"][None], 0.1, 100.0)
    assert float(terms["loss"]) == pytest.approx(0, abs=1e-2)


def test_depth_without_any_measurement_is_refused(tmp_path):
    make_data.write_image(tmp_path / "1.jpg")
    make_data.write_depth(tmp_path / "depth" / "1.png", 0)
    assert_refused(
        "1.png", lambda: read_first("frames", tmp_path, "0", "--fov", "60", with_depth=True)
    )


@pytest.mark.parametrize(
    "array", (np.full((64, 96), 200, np.uint8), np.zeros((64, 96, 3), np.uint8))
)
def test_depth_of_8_bits_is_refused(tmp_path, array):
    make_data.write_image(tmp_path / "1.jpg")
    make_data.write_array(tmp_path / "depth" / "1.png", array)
    assert_refused(
        "1.png", lambda: read_first("frames", tmp_path, "0", "--fov", "60", with_depth=True)
    )


def test_tum_associations(tmp_path):
    """rgb/ and depth/ have other names; associations.txt says which belong together."""
    lines = []
    for number in range(4):
        colour = f"rgb/1305031102.{175304 + 33333 * number}.png"
        depth = f"depth/1305031102.{160407 + 33333 * number}.png"
        make_data.write_image(tmp_path / colour, seed=number)
        make_data.write_depth(tmp_path / depth, number + 1, scale=5000)
        lines.append(" ".join((colour[4:-4], colour, depth[6:-4], depth)))
    make_data.write_text(tmp_path / "associations.txt", "\n".join(lines) + "\n")
    more = ("--fov", "60", "--depth_scale", "5000")
    dataset = clips("frames", tmp_path, "0", *more, with_depth=True)
    assert [float(dataset.read(i)["depth"].mean()) for i in range(4)] == pytest.approx([1, 2, 3, 4])
    assert len(clips("frames", tmp_path, "0 -1 1", *more)) == 2


@pytest.mark.parametrize("times", (("0.000000", "0.033333", "0.066667"), ("9.9", "10.0", "10.1")))
def test_tum_times_of_any_length(tmp_path, times):
    """Times since the start of the recording order frames as well as those since 1970."""
    lines = []
    for number, time in enumerate(times):
        make_data.write_image(tmp_path / f"rgb/{number}.png", seed=number)
        make_data.write_depth(tmp_path / f"depth/{number}.png", number + 1, scale=5000)
        lines.append(f"{time} rgb/{number}.png {time} depth/{number}.png")
    make_data.write_text(tmp_path / "associations.txt", "\n".join(lines) + "\n")
    more = ("--fov", "60", "--depth_scale", "5000")
    dataset = clips("frames", tmp_path, "0", *more, with_depth=True)
    assert [float(dataset.read(i)["depth"].mean()) for i in range(3)] == pytest.approx([1, 2, 3])
    (sample,) = clips("frames", tmp_path, "0 -1 1", *more).samples
    assert [path.name for path in map(Path, sample["images"])] == ["1.png", "0.png", "2.png"]
    make_data.write_text(tmp_path / "associations.txt", "\n".join([*lines, lines[0]]) + "\n")
    assert_refused("same time", lambda: clips("frames", tmp_path, "0", *more))


def write_left_and_right(root, name: str = "{number:04d}.jpg") -> str:
    for side in ("left", "right"):
        for number in range(4):
            seed = number + 50 * (side == "right")
            file = name.format(side=side, number=number)
            make_data.write_image(f"{root}/{side}/{file}", seed=seed)
    make_data.write_text(f"{root}/intrinsics.txt", "60 60 47.5 31.5")
    return str(root)


@pytest.mark.parametrize("name", ("{number:04d}.jpg", "{side}_{number:04d}.jpg"))
@pytest.mark.parametrize("frame_ids, count", (("0 s", 4), ("0 -1 1 s", 2)))
def test_own_stereo_pairs(tmp_path, frame_ids, count, name):
    """left/ and right/ with --baseline: the right camera sees points further left, so its x is negative."""
    root = write_left_and_right(tmp_path / "data", name)
    dataset = clips("frames", root, frame_ids, "--baseline", "0.12")
    assert "left" in {Path(path).parent.name for path in dataset.targets()}
    of_left = 0
    for index, sample in enumerate(dataset.samples):
        target = Path(sample["images"][0])
        other = Path(sample["images"][-1])
        assert target.name == other.name.replace(other.parent.name, target.parent.name)
        assert {target.parent.name, other.parent.name} == {"left", "right"}
        expected = torch.eye(4)
        expected[0, 3] = -0.12 if target.parent.name == "left" else 0.12
        assert torch.allclose(dataset.read(index)["stereo_T"], expected)
        of_left += target.parent.name == "left"
    assert of_left == count
    assert len(set(dataset.targets())) == len(dataset)
    assert_refused("--baseline", read_first, "frames", root, frame_ids)


def test_own_frames_of_one_camera_are_no_stereo_pairs(tmp_path):
    root = make_data.write_frames(tmp_path / "video", numbered("{}.jpg", range(4)))
    assert_refused("left|right|stereo", clips, "frames", root, "0 s", "--baseline", "0.1")


def test_a_missing_right_image_is_left_out_and_counted(tmp_path):
    root = write_left_and_right(tmp_path / "data")
    os.remove(f"{root}/right/0002.jpg")
    dataset = clips("frames", root, "0 s", "--baseline", "0.12")
    left = [Path(path).name for path in dataset.targets() if "/left/" in path]
    assert left == ["0000.jpg", "0001.jpg", "0003.jpg"]
    assert "1 " in dataset.dropped


# ------------------------------------------------------------------------------------ KITTI


def test_kitti_raw(tmp_path):
    """Both cameras are targets; K is P_rect's, the baseline has the sign of the camera, LiDAR is camera z."""
    root = make_data.write_kitti(tmp_path)
    dataset = clips("kitti", root, "0 -1 1 s", with_depth=True)
    assert len(dataset) == len(set(dataset.targets())) == 4
    for index, sample in enumerate(dataset.samples):
        read = dataset.read(index)
        left = "image_02" in sample["images"][0]
        assert ("image_03" in sample["images"][-1]) == left
        assert float(read["stereo_T"][0, 3]) == pytest.approx(-0.5 if left else 0.5)
        assert intrinsics(read["K"]) == pytest.approx([56, 56, 47.5, 30.5])
        assert read["depth"].unique().tolist() == pytest.approx([0, 10, 20])
    rows, columns = (read["depth"][0] == 10).nonzero().T.tolist()
    assert rows[0] in (30, 31)


def test_kitti_that_was_resized_before(tmp_path):
    """Images of half the size that the calibration has: K follows, also where width and height round."""
    root = make_data.write_kitti(tmp_path, frames=1, height=32, width=48)
    dataset = clips("kitti", root, "0", "--height", "64", "--width", "96")
    assert intrinsics(dataset.read(0)["K"]) == pytest.approx([56, 56, 47.5, 30.5], rel=1e-4)


def test_published_kitti_numbers(tmp_path):
    """1242x375 saved at 640x192: fx 185.9, fy 184.7, cx 156.7, cy 43.9 at 320x96, as from the originals."""
    K = np.array([[721.5377, 0, 609.5593], [0, 721.5377, 172.854], [0, 0, 1]])
    found = {}
    for height, width in ((375, 1242), (192, 640)):
        root = tmp_path / f"{width}"
        make_data.write_calibration(root / "2011_09_26", K, 375, 1242)
        make_data.write_drive(root, frames=1, height=height, width=width)
        sample = read_first("kitti", root, "0", "--height", "96", "--width", "320")
        found[width] = intrinsics(sample["K"])
    assert found[1242] == pytest.approx([185.90, 184.71, 156.68, 43.88], abs=0.01)
    assert found[640] == pytest.approx([185.9, 184.7, 156.7, 43.9], abs=0.1)


@pytest.mark.parametrize("height, width", ((48, 96), (64, 64), (64, 80)))
def test_kitti_that_was_cropped_before_is_refused(tmp_path, height, width):
    """The aspect is that of a crop: where it was cut cannot be known."""
    root = make_data.write_kitti(tmp_path, frames=1, height=height, width=width)
    assert_refused(f"{width}x{height}.*96x64|96x64.*{width}x{height}", read_first, "kitti", root)


def test_kitti_depth_at_another_size_than_the_image(tmp_path):
    """LiDAR projects into the images as they are, though they were resized."""
    root = make_data.write_kitti(tmp_path, frames=1, height=32, width=48)
    depth = read_first("kitti", root, "0", with_depth=True)["depth"]
    rows, columns = (depth[0] == 10).nonzero().T.tolist()
    assert depth.unique().tolist() == pytest.approx([0, 10, 20])
    assert abs(rows[0] - 30.5) <= 1
    assert abs(columns[0] - 47.5) <= 1


def test_kitti_with_the_left_camera_only(tmp_path, monkeypatch):
    """Rows of the split that are the right camera's are left out, which is said."""
    root = make_data.write_kitti(tmp_path / "kitti")
    shutil.rmtree(f"{root}/{make_data.DRIVE}/image_03")
    assert len(clips("kitti", root, "0 -1 1")) == 2
    rows = [f"{make_data.DRIVE} {number} {side}" for number in (1, 2) for side in "lr"]
    for name in ("train", "val"):
        make_data.write_text(tmp_path / "splits" / f"eigen_zhou_{name}.txt", "\n".join(rows) + "\n")
    monkeypatch.setattr(datasets, "SPLITS", str(tmp_path / "splits"))
    dataset = clips("kitti", root, "0 -1 1")
    assert len(dataset) == 2
    assert re.search("2 .*(image_03|right)", dataset.dropped)
    assert_refused("image_03|right", clips, "kitti", root, "0 s")


def test_kitti_with_ground_truth_for_some_frames(tmp_path):
    """One kind of depth for all frames, or a count of each: never two under one name."""
    root = make_data.write_kitti(tmp_path)
    for number in (0, 1):
        folder = f"{root}/{make_data.DRIVE}/proj_depth/groundtruth/image_02"
        make_data.write_depth(f"{folder}/{number:010d}.png", 30, scale=256)
    dataset = clips("kitti", root, "0", with_depth=True)
    kinds = {30 in dataset.read(i)["depth"].unique().tolist() for i in range(len(dataset))}
    assert len(kinds) == 1 or re.search(r"\d+ .*groundtruth", f"{dataset.dropped} {dataset.name}")


def test_improved_ground_truth_as_downloaded(tmp_path):
    """KITTI's depth archive unpacks to train/DRIVE and val/DRIVE beside the dates."""
    root = make_data.write_kitti(tmp_path)
    shutil.rmtree(f"{root}/{make_data.DRIVE}/velodyne_points")
    drive = os.path.basename(make_data.DRIVE)
    for number in range(4):
        for side in (2, 3):
            name = f"image_0{side}/{number:010d}.png"
            make_data.write_depth(
                f"{root}/train/{drive}/proj_depth/groundtruth/{name}", 12, scale=256
            )
    dataset = clips("kitti", root, "0", with_depth=True)
    assert len(dataset) == 8
    assert dataset.read(0)["depth"].unique().tolist() == [12]


def test_kitti_odometry(tmp_path):
    root = make_data.write_odometry(tmp_path)
    dataset = clips("kitti", root, "0 -1 1 s")
    assert len(dataset) == len(set(dataset.targets())) == 4
    for index, sample in enumerate(dataset.samples):
        read = dataset.read(index)
        left = "image_2" in sample["images"][0]
        assert intrinsics(read["K"]) == pytest.approx([56, 56, 47.5, 30.5])
        assert float(read["stereo_T"][0, 3]) == pytest.approx(-0.5 if left else 0.5)


def remove(path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def rewrite(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAY = "2011_09_26"
CALIBRATION = f"{DAY}/calib_cam_to_cam.txt"


@pytest.mark.parametrize(
    "damage, more, words",
    (
        (lambda root: None, ("--drives", "0005"), "--drives 0005|0005"),
        (lambda root: remove(root / make_data.DRIVE), (), "no KITTI|KITTI"),
        (lambda root: remove(root / CALIBRATION), (), "calib_cam_to_cam.txt"),
        (
            lambda root: rewrite(root / CALIBRATION, "P_rect_03", "P_rect_04"),
            (),
            "calib_cam_to_cam.txt.*P_rect_03",
        ),
        (
            lambda root: rewrite(root / CALIBRATION, "P_rect_02: ", "P_rect_02: nan "),
            (),
            "calib_cam_to_cam.txt",
        ),
        (
            lambda root: rewrite(root / CALIBRATION, "P_rect_02: 5.6", "P_rect_02: inf"),
            (),
            "calib_cam_to_cam.txt",
        ),
        (
            lambda root: remove(root / f"{DAY}/calib_velo_to_cam.txt"),
            "depth",
            "calib_velo_to_cam.txt",
        ),
        (
            lambda root: rewrite(root / f"{DAY}/calib_velo_to_cam.txt", "0 -1 0", "0 -7 0"),
            "depth",
            "velo_to_cam.txt",
        ),
        (lambda root: remove(root / make_data.DRIVE / "velodyne_points"), "depth", "8 without"),
        (
            lambda root: truncate(
                root / make_data.DRIVE / "velodyne_points/data/0000000000.bin", 0.7
            ),
            "depth",
            ".bin",
        ),
        (
            lambda root: truncate(root / make_data.DRIVE / "image_02/data/0000000000.png", 0.7),
            (),
            "0000000000.png",
        ),
        (
            lambda root: make_data.write_image(
                root / make_data.DRIVE / "image_03/data/0000000000.png", 32, 48
            ),
            (),
            "size|32",
        ),
    ),
    ids=(
        "drives",
        "no drive",
        "no calibration",
        "no projection",
        "nan",
        "inf",
        "no velodyne calibration",
        "not a rotation",
        "no velodyne",
        "cut points",
        "cut image",
        "sizes",
    ),
)
def test_incomplete_kitti(tmp_path, damage, more, words):
    root = make_data.write_kitti(tmp_path / "kitti")
    with_depth = more == "depth"
    assert len(clips("kitti", root, "0 s", with_depth=with_depth)) == 8
    damage(tmp_path / "kitti")
    more = () if with_depth else more
    assert_refused(words, lambda: read_first("kitti", root, "0 s", *more, with_depth=with_depth))


# ------------------------------------------------------------------------------------ Cityscapes, CamVid, NYU


def test_cityscapes_clips_and_depth(tmp_path):
    """Depth is baseline * fx / disparity; stored 0 is unmeasured and 1 infinitely far."""
    root = make_data.write_cityscapes(tmp_path)
    size = ("--height", "64", "--width", "128")
    alone = clips("cityscapes", root, "0", *size, with_depth=True)
    sample = alone.read(0)
    assert len(alone) == 4
    assert sample["depth"].unique().tolist() == pytest.approx([0, 200 * 0.2 / 10])
    assert (sample["depth"][..., :2] == 0).all()
    assert (sample["depth"][..., 2:] > 0).all()
    assert intrinsics(sample["K"]) == pytest.approx([200, 210, 63, 33])

    video = clips("cityscapes", root, "0 -1 1", *size, "--drives", "ulm")
    frames = [[int(name[11:17]) for name in sample] for sample in names(video)]
    assert frames == [[18, 17, 19], [19, 18, 20], [20, 19, 21]]
    assert "2 without" in video.dropped


def test_cityscapes_takes_the_extra_training_images(tmp_path):
    """Table 5's 20,000 pairs are train and train_extra together."""
    root = make_data.write_cityscapes(tmp_path)
    for kind in ("leftImg8bit", "disparity", "camera"):
        shutil.copytree(f"{root}/{kind}/train/ulm", f"{root}/{kind}/train_extra/bayreuth")
        for path in Path(root, kind, "train_extra", "bayreuth").iterdir():
            path.rename(path.with_name(path.name.replace("ulm", "bayreuth")))
    assert len(clips("cityscapes", root, "0", with_depth=True)) == 6


@pytest.mark.parametrize(
    "text",
    (
        None,
        "{",
        "[]",
        '{"intrinsic": {}}',
        json.dumps({**make_data.CITYSCAPES_CAMERA, "extrinsic": {"baseline": 0}}),
        json.dumps({**make_data.CITYSCAPES_CAMERA, "extrinsic": {"baseline": "far"}}),
    ),
)
def test_damaged_cityscapes_cameras(tmp_path, text):
    root = make_data.write_cityscapes(tmp_path, cities=("ulm",))
    for path in Path(root, "camera", "train", "ulm").iterdir():
        path.unlink()
        if text is not None:
            path.write_text(text)
    assert_refused("camera/train/ulm.*camera", read_first, "cityscapes", root)


def test_camvid_clips(tmp_path):
    """The val frames are 15 Hz with a step of 2; intrinsics are not published."""
    root = make_data.write_camvid(tmp_path, val=6)
    dataset = clips("camvid", root, "0 -1 1", "--fov", "60")
    assert len(dataset) == 4
    assert_refused("--fov", read_first, "camvid", root)


def test_nyu_raw_scenes(tmp_path):
    root = make_data.write_nyu_scenes(tmp_path)
    dataset = clips("nyu", root, "0", with_depth=True)
    found = {
        name: float(dataset.read(i)["depth"].max()) for i, name in enumerate(target_names(dataset))
    }
    assert found == pytest.approx({"rgb_00001.jpg": 1.5, "rgb_00002.jpg": 3, "rgb_00007.jpg": 10.5})
    K = intrinsics(clips("nyu", root, "0", "--height", "480", "--width", "640").read(0)["K"])
    assert pytest.approx([518.858, 519.470, 325.582, 253.736], rel=1e-4) == K
    assert len(clips("nyu", root, "0 1")) == 1


def test_nyu_never_trains_on_a_test_image(tmp_path):
    """Raw scenes win over the labelled images; of those alone, the test images stay out."""
    root = make_data.write_nyu(tmp_path, train=(1, 3), test=(2, 4))
    alone = clips("nyu", root, "0", with_depth=True)
    assert sorted(target_names(alone)) == ["0001.png", "0003.png"]
    assert sorted(float(alone.read(i)["depth"].max()) for i in range(2)) == [1, 3]
    make_data.write_nyu_scenes(root)
    both = clips("nyu", root, "0", with_depth=True)
    assert sorted(target_names(both)) == ["rgb_00001.jpg", "rgb_00002.jpg", "rgb_00007.jpg"]


def test_unknown_data_and_missing_folders(tmp_path):
    assert_refused("--data nothing.*kitti", clips, "nothing", tmp_path)
    assert_refused("nowhere.*--data_path", clips, "kitti", tmp_path / "nowhere")
    os.makedirs(tmp_path / "empty")
    for data in ("kitti", "cityscapes", "camvid", "nyu", "frames"):
        assert_refused("empty", clips, data, tmp_path / "empty")


# ------------------------------------------------------------------------------------ files of every kind


def test_images_of_every_kind_become_rgb(tmp_path):
    """As Pillow converts them; 16-bit by its upper byte, EXIF orientation applied."""
    rgb = Image.fromarray(make_data.picture())
    kinds = {
        "gray.png": (rgb.convert("L"), {}),
        "gray.jpg": (rgb.convert("L"), {}),
        "bits.png": (rgb.convert("1"), {}),
        "palette.png": (rgb.quantize(32), {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "progressive.jpg": (rgb, {"progressive": True}),
        "opaque.png": (rgb.convert("RGBA"), {}),
        "gray_alpha.png": (rgb.convert("LA"), {}),
        "turned.jpg": (rgb, {"exif": make_data.turned(6)}),
        "turned.png": (rgb, {"exif": make_data.turned(6)}),
        "ein Bild ä 图.JPG": (rgb, {}),
    }
    for name, (image, more) in kinds.items():
        image.save(tmp_path / name, **more)
        expected = np.array(Image.open(tmp_path / name).convert("RGB"))
        if "turned" in name:
            expected = np.rot90(expected, -1)
        ours = read_image(str(tmp_path / name))
        assert ours.dtype == torch.uint8, name
        difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.max() <= 1, name
    deep = np.arange(64 * 96, dtype=np.uint16).reshape(64, 96) * 10
    ours = read_image(make_data.write_array(tmp_path / "deep.png", deep))
    assert (ours.numpy() == (deep >> 8)).all()


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
def test_every_exif_orientation(tmp_path, orientation):
    path = make_data.write_image(tmp_path / "a.png", exif=make_data.turned(orientation))
    with Image.open(path) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    assert (read_image(path).permute(1, 2, 0).numpy() == expected).all()
    assert image_size(path) == expected.shape[:2]


def test_images_that_are_refused(tmp_path, monkeypatch):
    """Each with one line that names the file; a bomb before anything of it is decoded."""
    rgb = Image.open(make_data.write_image(tmp_path / "rgb.png"))
    half = rgb.convert("RGBA")
    half.putalpha(Image.new("L", rgb.size, 128))
    half.save(tmp_path / "glass.png")
    rgb.quantize(32).save(tmp_path / "hole.png", transparency=3)
    rgb.save(tmp_path / "film.gif")
    os.makedirs(tmp_path / "folder.png")
    os.symlink("loop.png", tmp_path / "loop.png")
    (tmp_path / "empty.png").touch()
    truncate(make_data.write_image(tmp_path / "cut.jpg"), 0.6)
    truncate(make_data.write_image(tmp_path / "cut.png"), 0.6)
    for name in ("glass", "hole", "folder", "loop", "empty", "nowhere", "cut"):
        assert_refused(f"{name}.png", read_image, str(tmp_path / f"{name}.png"))
    assert_refused("film.gif", read_image, str(tmp_path / "film.gif"))
    assert_refused("cut.jpg", read_image, str(tmp_path / "cut.jpg"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 96 // 2 - 1)
    for read in (read_image, read_ids):
        assert_refused("rgb.png", read, str(tmp_path / "rgb.png"))


# ------------------------------------------------------------------------------------ real data

REAL = Path(
    os.environ.get("DEPTH2SEG_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
)


def real(*parts: str) -> str:
    """A folder of real data, or a skip that names it."""
    path = REAL.joinpath(*parts)
    if not path.is_dir():
        pytest.skip(f"no real data at {path} (set DEPTH2SEG_DATA)")
    return str(path)


def test_real_kitti_calibration():
    """K from P_rect of the date, and a baseline of 0.5327 m, the right camera being on the right."""
    size = ("--height", "96", "--width", "320", "--frames", "0:3")
    dataset = clips("kitti", real("kitti_raw"), "0 s", *size)
    for sample, index in zip(dataset.samples, range(len(dataset))):
        left = "image_02" in sample["images"][0]
        expected = -0.5327 if left else 0.5327
        assert float(dataset.read(index)["stereo_T"][0, 3]) == pytest.approx(expected, abs=1e-3)
    assert intrinsics(dataset.read(0)["K"]) == pytest.approx(
        [185.90, 184.71, 156.68, 43.88], abs=0.01
    )


@pytest.mark.parametrize("camera", ("image_02", "image_03"))
def test_real_lidar_explains_the_other_camera(camera):
    """At measured pixels the other image, warped with the true depth, fits better than with depth 10 % off."""
    size = ("--height", "375", "--width", "1242", "--frames", "10:131")
    dataset = clips("kitti", real("kitti_raw"), "0 s", *size, with_depth=True)
    chosen = [i for i, path in enumerate(dataset.targets()) if camera in path][::40]
    errors = {0.9: 0.0, 1.0: 0.0, 1.1: 0.0}
    for index in chosen:
        sample = dataset.read(index)
        target, source = (sample["frames"].float() / 255).split(1)
        depth = sample["depth"][None]
        for factor in errors:
            K, T = sample["K"][None], sample["stereo_T"][None]
            warped, seen = losses.synthesize(source, factor * depth, K, T)
            counted = (depth > 0) & seen
            error = (warped - target).abs().mean(1, keepdim=True)
            errors[factor] += float((error * counted).sum() / counted.sum())
    assert errors[1.0] < 0.8 * min(errors[0.9], errors[1.1])


def test_real_video():
    assert len(clips("frames", real("own_video"), "0 -1 1")) == 89
    assert len(clips("camvid", real("camvid"), "0 -1 1", "--fov", "60")) == 99
