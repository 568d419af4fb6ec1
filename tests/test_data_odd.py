"""A second look at every reader: some ten inputs each that are odd, and what is right for them.

    python -m pytest tests/test_data_odd.py
    python -m pytest tests/test_data_odd.py -k odometry

`expected` is the number of samples, each of another target, or a pattern of the line that refuses.
"""

import json
import os
import re
import shutil
from functools import partial

import make_data
import numpy as np
import pytest
from make_data import DRIVE, clips, intrinsics, labelled, numbered, read_first
from PIL import Image

from images import read_image
from utils import InputError

BOTH = "0 -1 1"  # the usual frames of monocular training


class Odd:
    """An input and what is right: `write(root)` makes it, and may return another root to read."""

    def __init__(self, name: str, expected: int | str, write, frame_ids: str = "0", *options):
        self.name = name
        self.expected = expected
        self.write = write
        self.frame_ids = frame_ids
        self.options = options
        self.K = None  # fx, fy, cx, cy of the first sample, where it is checked
        self.depth = (
            None  # the farthest measurement of the first sample; depth is read if it is set
        )

    def has(self, K=None, depth=None) -> "Odd":
        self.K = K
        self.depth = depth
        return self

    def check(self, data: str, root) -> None:
        root = self.write(root) or root
        options = [str(option).format(root=root) for option in self.options]
        read = partial(
            clips, data, root, self.frame_ids, *options, with_depth=self.depth is not None
        )
        if isinstance(self.expected, str):
            with pytest.raises(InputError, match=self.expected) as refusal:
                dataset = read()
                for index in range(len(dataset)):
                    dataset.read(index)
            assert "\n" not in str(refusal.value)
            return
        dataset = read()
        samples = [dataset.read(index) for index in range(len(dataset))]
        assert len(samples) == len(set(dataset.targets())) == self.expected
        if self.K is not None:
            assert intrinsics(samples[0]["K"]) == pytest.approx(self.K, rel=0.005)
        if self.depth is not None:
            assert float(samples[0]["depth"].max()) == pytest.approx(self.depth, rel=1e-3)


def table(*cases: Odd):
    return pytest.mark.parametrize("odd", cases, ids=[case.name for case in cases])


# ------------------------------------------------------------------------------------ own frames


def named(*names: str, K: str | None = "60 60 47.5 31.5", **size):
    """A folder of images with these names."""
    return lambda root: make_data.write_frames(root, names, K, **size)


def times(form: str, count: int, first: int = 0, step: int = 1) -> list[str]:
    """Names by a clock: {h}, {m}, {s} and {c}, hundredths of a second."""
    found = []
    for i in range(count):
        ticks = first + step * i
        seconds = ticks // 100
        clock = {
            "h": 12 + seconds // 3600,
            "m": seconds // 60 % 60,
            "s": seconds % 60,
            "c": ticks % 100,
        }
        found.append(form.format(**clock))
    return found


def grey_and_depth(root) -> None:
    """Grey images beside 16-bit depth in a folder of another name than depth."""
    make_data.write_text(root / "intrinsics.txt", "60 60 47.5 31.5")
    for number in range(4):
        grey = make_data.picture(seed=number)[..., 0]
        make_data.write_array(root / "cam0" / f"{number:04d}.png", grey)
        make_data.write_depth(root / "range" / f"{number:04d}.png", 3 + number)


def colour_and_labels(mode: str):
    """Colour images beside labels of the same names, in another folder."""

    def write(root) -> None:
        make_data.write_text(root / "intrinsics.txt", "60 60 47.5 31.5")
        os.makedirs(root / "labels")
        for number in range(4):
            make_data.write_image(root / "rgb" / f"{number:04d}.png", seed=number)
            label = Image.fromarray(make_data.blocks(range(5), 64, 96, number))
            if mode == "P":
                label.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])
            label.save(root / "labels" / f"{number:04d}.png")

    return write


def stereo(left=range(6), right=range(6), words=("left", "right"), K=None):
    """Folders of a left and a right camera; K: intrinsics of each, or of both."""

    def write(root) -> None:
        for word, numbers in zip(words, (left, right)):
            for number in numbers:
                path = root / word / f"{number:04d}.jpg"
                make_data.write_image(path, seed=number + 50 * (word == words[1]))
        if K is None:
            make_data.write_text(root / "intrinsics.txt", "60 60 47.5 31.5")
        for word, text in zip(words, K or ()):
            make_data.write_text(root / word / "intrinsics.txt", text)

    return write


def two_clocks(root) -> None:
    """EuRoC's layout: cam0/data and cam1/data, the second camera 0.3 ms late."""
    make_data.write_text(root / "intrinsics.txt", "60 60 47.5 31.5")
    for number in range(6):
        time = 1403636579763555584 + 50_000_000 * number
        make_data.write_image(root / "cam0" / "data" / f"{time}.png", seed=number)
        make_data.write_image(root / "cam1" / "data" / f"{time + 300_000}.png", seed=number + 50)


def some_turned(root) -> None:
    for number in range(6):
        exif = make_data.turned(6 if number == 3 else 1)
        make_data.write_image(root / f"{number}.jpg", seed=number, exif=exif)


def listed(*lines: str):
    """Eight frames and a list of targets with Windows' line ends."""

    def write(root) -> None:
        make_data.write_frames(root / "v", numbered("{:04d}.jpg", range(8)))
        (root / "list.txt").write_text("\r\n".join(lines) + "\r\n", newline="")

    return write


def first_is_smaller(root) -> None:
    make_data.write_frames(root, numbered("{}.jpg", range(1, 7)))
    make_data.write_image(root / "0.jpg", 32, 48)


def video_beside(root) -> None:
    make_data.write_frames(root, numbered("{}.jpg", range(5)))
    make_data.write_text(root / "clip.mp4", "a video")


def kitti_drive(root) -> str:
    return f"{make_data.write_kitti(root)}/{DRIVE}"


INDEX_AND_TIME = [f"{i:06d}_{1403636579763555584 + 50_000_000 * i}.jpg" for i in range(12)]
EXPOSURES = [f"f{i:04d}_e{100 + 100 * (i % 2)}.jpg" for i in range(12)]
CHUNKS = [f"chunk{c}_{i:04d}.jpg" for c in range(3) for i in range(5)]
FORMATS = [f"{i:04d}.{'jpg' if i % 2 else 'png'}" for i in range(12)]
def ros_times(count: int, unit: int, hertz: int = 30) -> list[str]:
    """SECONDS.FRACTION.jpg with the fraction as a whole number, as ROS prints a stamp."""
    names = []
    for i in range(count):
        stamp = 1305031102 * unit + unit // 11 + i * unit // hertz
        seconds, fraction = divmod(stamp, unit)
        names.append(f"{seconds}.{fraction}.jpg")
    return names


def two_stereo_walks(root) -> None:
    make_data.write_text(root / "intrinsics.txt", "60 60 47.5 31.5")
    for walk in ("left_turn", "right_turn"):
        for side in ("left", "right"):
            names = numbered("{:04d}.jpg", range(3))
            make_data.write_frames(root / walk / side, names, intrinsics=None)


def depth_in_every_path(root) -> None:
    """associations.txt, colour first, below a folder whose name says depth."""
    make_data.write_text(root / "intrinsics.txt", "60 60 47.5 31.5")
    lines = []
    for number in range(4):
        make_data.write_image(root / "depth_cam" / "rgb" / f"{number}.jpg", seed=number)
        make_data.write_depth(root / "depth_cam" / "depth" / f"{number}.png", 2)
        time = f"1305031102.{number}"
        lines.append(f"{time} depth_cam/rgb/{number}.jpg {time} depth_cam/depth/{number}.png")
    make_data.write_text(root / "associations.txt", "\n".join(lines))


def jpeg_as_depth(root) -> None:
    make_data.write_frames(root, ["1.jpg"])
    picture = make_data.write_image(root / "depth" / "1.jpg")
    os.rename(picture, root / "depth" / "1.png")


def thumbnails_beside(root) -> None:
    make_data.write_frames(root, numbered("{:04d}.jpg", range(4)))
    make_data.write_image(root / "@eaDir" / "0001.jpg" / "THUMB.jpg", 16, 24)


PHONE = times("IMG_20240501_{h}{m:02d}{s:02d}.jpg", 20, first=5000, step=100)
DAY_AND_INDEX = numbered("2024-05-01_{:06d}.jpg", range(50, 71))
DAY_AND_INDEX_2 = numbered("20240501_{:06d}.jpg", range(95, 110))
LIST = ("--split", "{root}/list.txt")


@table(
    Odd("index and time", 10, named(*INDEX_AND_TIME), BOTH),
    Odd("exposure behind the number", 10, named(*EXPOSURES), BOTH),
    Odd("chunks", 9, named(*CHUNKS), BOTH),
    Odd("two formats", 10, named(*FORMATS), BOTH),
    Odd("a phone's names", 18, named(*PHONE), BOTH),
    Odd("a day and a frame number", 19, named(*DAY_AND_INDEX), BOTH),
    Odd("a day and a frame number without dashes", 13, named(*DAY_AND_INDEX_2), BOTH),
    Odd("the same number twice", "1.jpg", named("1.jpg", "01.jpg", "2.jpg")),
    Odd("no numbers", 3, named("a.jpg", "b.jpg", "c.jpg")),
    Odd("grey images and depth", 4, grey_and_depth),
    Odd("grey labels", 4, colour_and_labels("L")),
    Odd("palette labels", 4, colour_and_labels("P")),
    Odd("one turned frame", "96x64 and 64x96|64x96 and 96x64", some_turned, BOTH, "--fov", 60),
    Odd("a smaller first frame", "48x32", first_is_smaller, BOTH),
    Odd("a video beside its frames", 3, video_beside, BOTH),
    Odd("a drive of KITTI", 4, kitti_drive, BOTH, "--fov", 60),
    Odd("a list with Windows' line ends", 2, listed("v/0003.jpg", "", "v/0005.jpg"), BOTH, *LIST),
    Odd("a list with a line twice", 1, listed("v/0003.jpg", "v/0003.jpg"), BOTH, *LIST),
    Odd("a list of another folder", "w/0003.jpg", listed("w/0003.jpg"), BOTH, *LIST),
    Odd("K of the unturned image", "intrinsics.txt", named("1.jpg", K="60 60 31.5 47.5")),
    Odd("K of half the size", "intrinsics.txt", named("1.jpg", height=128, width=192)),
    Odd("K of 0.8 times the size", "intrinsics.txt", named("1.jpg", height=80, width=120)),
    Odd("KITTI's K of half the size", "intrinsics.txt", named("1.jpg", K="30 30 23.6 14.3")),
    Odd("a focal length in millimetres", "intrinsics.txt", named("1.jpg", K="4.2 4.2 47.5 31.5")),
    Odd("a JPEG as depth", "1.png: not a PNG file$", jpeg_as_depth).has(depth=1),
    Odd("depth in every path", 4, depth_in_every_path).has(depth=0.4),  # TUM: 5000 per metre
    Odd("thumbnails beside", 4, thumbnails_beside),
    Odd("an off-centre crop", 1, named("1.jpg", K="60 60 47.5 20")),
    Odd("cameras that start apart", 8, stereo(right=range(2, 8)), "0 s", "--baseline", 0.1),
    Odd("two clocks", 12, two_clocks, "0 s", "--baseline", 0.11),
    Odd("turns, not cameras", 8, stereo(words=("left_turn", "right_turn")), BOTH),
    Odd(
        "two K of a pair",
        "intrinsics.txt",
        stereo(K=("60 60 47 31", "80 80 47 31")),
        "0 s",
        "--baseline",
        0.1,
    ),
)
def test_own_frames(tmp_path, odd):
    odd.check("frames", tmp_path)


PUBLISHED = {  # width, height, fx, fy, cx, cy
    "TUM": (640, 480, 517.3, 516.5, 318.6, 255.3),
    "EuRoC": (752, 480, 458.7, 457.3, 367.2, 248.4),
    "nuScenes": (1600, 900, 1266.4, 1266.4, 816.3, 491.5),
    "Waymo, front": (1920, 1280, 2055.6, 2055.6, 939.7, 641.1),
    "Waymo, side": (1920, 886, 2053.8, 2053.8, 967.5, 234.6),
    "DDAD": (1936, 1216, 2181.0, 2181.0, 927.9, 616.0),
    "Virtual KITTI": (1242, 375, 725.0, 725.0, 620.5, 187.0),
    "KITTI without sky": (1242, 250, 721.5, 721.5, 609.6, 47.9),
    "GoPro": (1920, 1080, 933.0, 933.0, 960.5, 540.3),
    "Middlebury": (1400, 1000, 1758.0, 1758.0, 829.2, 486.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cameras_are_taken(tmp_path, name):
    """What refuses a K of another resolution refuses no real camera."""
    width, height, *K = PUBLISHED[name]
    text = " ".join(map(str, K))
    root = make_data.write_frames(tmp_path, ["1.jpg"], text, height=height, width=width)
    size = ("--height", height, "--width", width)
    assert intrinsics(clips("frames", root, "0", *size).read(0)["K"]) == pytest.approx(K)


# ------------------------------------------------------------------------------------ KITTI


def drive(change=None):
    """A drive of KITTI, then `change(root)`."""

    def write(root) -> None:
        make_data.write_kitti(root)
        if change is not None:
            change(root)

    return write


def calibration(old: str, new: str):
    """A change of a drive's calibration, by a pattern."""

    def change(root) -> None:
        path = root / "2011_09_26" / "calib_cam_to_cam.txt"
        text, count = re.subn(old, new, path.read_text(), flags=re.DOTALL)
        assert count
        path.write_text(text)

    return change


def second_day(root) -> None:
    K = np.array([[70.0, 0, 45], [0, 70, 33], [0, 0, 1]])
    make_data.write_calibration(root / "2011_09_28", K)
    make_data.write_drive(root, "2011_09_28/2011_09_28_drive_9002_sync", 3)


def without_left(root) -> None:
    os.rename(root / DRIVE / "image_02", root / DRIVE / "image_xx")


def each_frame(write):
    """`write(root, camera, name)` for the four frames of both cameras."""

    def change(root) -> None:
        for camera in ("image_02", "image_03"):
            for number in range(4):
                write(root, camera, f"{number:010d}.png")

    return change


def turned_image(root, camera: str, name: str) -> None:
    make_data.write_image(root / DRIVE / camera / "data" / name, exif=make_data.turned(6))


def ground_truth(array: np.ndarray):
    def write(root, camera: str, name: str) -> None:
        make_data.write_array(root / DRIVE / "proj_depth" / "groundtruth" / camera / name, array)

    return each_frame(write)


def rows(*lines: str):
    def change(root) -> None:
        (root / "list.txt").write_text("".join(f"{line}\n" for line in lines))

    return change


def inside(folder: str):
    """A drive, read from a folder too deep."""

    def write(root) -> str:
        return f"{make_data.write_kitti(root)}/{folder}"

    return write


P2 = r"(P_rect_02: )([^\n]*)(.*P_rect_03: )([^\n]*)"
METRES_8 = np.full((64, 96), 8 * 256, np.uint16)


@table(
    Odd("two days", 14, drive(second_day), "0 s"),
    Odd("the right camera alone", 2, drive(without_left), BOTH),
    Odd("no pairs", "right|left|source frames|image_02", drive(without_left), "0 s"),
    Odd("the root is a day", "2011_09_26_drive_0001_sync", inside("2011_09_26")),
    Odd("the root is a drive", "2011_09_26_drive_0001_sync", inside(DRIVE)),
    Odd("baseline 0", "calib_cam_to_cam.txt", drive(calibration(P2, r"\1\2\3\2")), "0 s"),
    Odd("swapped cameras", "calib_cam_to_cam.txt", drive(calibration(P2, r"\1\4\3\2")), "0 s"),
    Odd(
        "two focal lengths",
        "calib_cam_to_cam.txt",
        drive(calibration("(P_rect_03: )5.6", r"\g<1>7.6")),
        "0 s",
    ),
    Odd(
        "two sizes",
        "calib_cam_to_cam.txt",
        drive(calibration("(S_rect_03: )9.6", r"\g<1>4.8")),
        "0 s",
    ),
    Odd("turned images", "64x96.*96x64", drive(each_frame(turned_image))),
    Odd("depth of another shape", "96x60.*96x64", drive(ground_truth(METRES_8[:60]))).has(depth=8),
    Odd("depth of 8 bits", "groundtruth", drive(ground_truth(METRES_8.astype(np.uint8)))).has(
        depth=8
    ),
    Odd("ground truth before LiDAR", 8, drive(ground_truth(METRES_8))).has(depth=8),
    Odd("frames 1 and 2", 4, drive(), BOTH, "--frames", "1:3"),
    Odd("frames beyond the last", "no usable sample", drive(), "0", "--frames", "90:99"),
    Odd("a row twice", 1, drive(rows(f"{DRIVE} 1 l", f"{DRIVE} 0000000001 l")), "0 s", *LIST),
    Odd("a row too long", "list.txt", drive(rows(f"{DRIVE} 1 l 4")), "0 s", *LIST),
    Odd("a frame that is not there", "77", drive(rows(f"{DRIVE} 77 l")), "0 s", *LIST),
    Odd("a list of other drives", "list.txt", drive(rows("2011_09_26/x_sync 1 l")), "0 s", *LIST),
    Odd("a split that is not there", "test", drive(), "0", "--split", "test"),
    Odd("a split of no name", "tset", drive(), "0", "--split", "tset"),
)
def test_kitti_raw(tmp_path, odd):
    odd.check("kitti", tmp_path)


def odometry(height: int = 64, width: int = 96, change=None):
    def write(root) -> None:
        make_data.write_odometry(root)
        for path in sorted((root / "sequences").rglob("*.png")):
            make_data.write_image(path, height, width, seed=int(path.stem))
        if change is not None:
            change(root / "sequences" / "00")

    return write


def published_calibration(folder) -> None:
    """That of sequence 00, whose images are 1241x376."""
    left = "718.856 0 607.1928 0 0 718.856 185.2157 0 0 0 1 0"
    right = left.replace("607.1928 0", "607.1928 -386.1448")
    lines = (f"P0: {left}", f"P1: {right}", f"P2: {left}", f"P3: {right}")
    make_data.write_text(folder / "calib.txt", "\n".join(lines) + "\n")


def left_only(folder) -> None:
    shutil.rmtree(folder / "image_3")


def velodyne(pose: str = ""):
    def change(folder) -> None:
        os.makedirs(folder / "velodyne")
        for number in range(4):
            points = np.array([[10, 0, 0, 0.3]], np.float32)
            points.tofile(folder / "velodyne" / f"{number:06d}.bin")
        with open(folder / "calib.txt", "a") as file:
            file.write(pose)

    return change


def second_sequence(folder) -> None:
    make_data.write_odometry(folder.parents[1], "01", 3)


def grey_only(folder) -> None:
    for number in (2, 3):
        os.rename(folder / f"image_{number}", folder / f"image_{number - 2}")


TR = "Tr: 0 -1 0 0 0 0 -1 0 1 0 0 0\n"
SMALL = ("--height", 320, "--width", 1024)


@table(
    Odd("its own size", 4, odometry(), BOTH).has(K=[56, 56, 47.5, 30.5]),
    Odd("half the size", "calib.txt", odometry(32, 48)),
    Odd(
        "published, native",
        8,
        odometry(376, 1241, published_calibration),
        "0",
        "--height",
        376,
        "--width",
        1241,
    ).has(K=[718.856, 718.856, 607.19, 185.22]),
    Odd(
        "no calibration",
        "calib.txt",
        odometry(change=lambda folder: os.remove(folder / "calib.txt")),
    ),
    Odd("the left camera alone", 2, odometry(change=left_only), BOTH),
    Odd(
        "two sequences",
        2,
        odometry(change=second_sequence),
        BOTH,
        "--drives",
        "01",
        "--frames",
        "0:3",
    ),
    Odd("velodyne without a pose", "Tr", odometry(change=velodyne())).has(depth=10),
    Odd("velodyne", 8, odometry(change=velodyne(TR))).has(depth=10),
    Odd("grey cameras alone", "image_2", odometry(change=grey_only)),
)
def test_kitti_odometry(tmp_path, odd):
    odd.check("kitti", tmp_path)


def test_odometry_saved_smaller(tmp_path):
    """1241x376 saved as 1024x320: K is scaled, or refused; never that of the whole image."""
    odometry(320, 1024, published_calibration)(tmp_path)
    try:
        K = intrinsics(clips("kitti", tmp_path, "0", *map(str, SMALL)).read(0)["K"])
    except InputError as refusal:
        assert "calib.txt" in str(refusal)
    else:
        assert pytest.approx([593.2, 611.8, 501.0, 157.6], abs=2) == K


# ------------------------------------------------------------------------------------ NYU, Cityscapes, CamVid


def scenes(height: int = 60, width: int = 80, depth: tuple | None = None):
    """A raw scene of three frames, with depth of 2 m."""

    def write(root) -> None:
        for number in range(3):
            make_data.write_image(root / "s" / f"rgb_{number:05d}.jpg", height, width, seed=number)
            shape = depth or (height, width)
            make_data.write_depth(root / "s" / f"sync_depth_{number:05d}.png", 2, *shape)

    return write


def one_without_depth(root) -> None:
    scenes()(root)
    os.remove(root / "s" / "sync_depth_00000.png")


def raw_dump(root) -> None:
    os.makedirs(root / "s")
    name = "r-1294439283.377657-2381571548.ppm"
    Image.fromarray(make_data.picture()).save(root / "s" / name)


def nyu_images(root) -> str:
    return f"{make_data.write_nyu(root)}/image"


def nyu_without_lists(root) -> None:
    make_data.write_nyu(root)
    for name in ("train.txt", "test.txt"):
        os.remove(root / name)


HALF = ("--height", 240, "--width", 320)


@table(
    Odd("half the size", 3, scenes(240, 320), "0", *HALF).has(
        K=[259.4, 259.7, 162.5, 126.6], depth=2
    ),
    Odd("the usual crop", "561x427", scenes(427, 561)),
    Odd("another crop", "608x448", scenes(448, 608)),
    Odd("depth of another shape", "64x60.*80x60", scenes(depth=(60, 64))).has(depth=2),
    Odd("a frame without depth", 2, one_without_depth).has(depth=2),
    Odd("the raw dump", "ppm.*ffmpeg|ppm.*convert", raw_dump),
    Odd("labelled images as a video", "video|raw scenes", make_data.write_nyu, "0 1"),
    Odd("no lists", "train.txt", nyu_without_lists),
    Odd("the folder of labelled images", "test.txt|root", nyu_images),
    Odd("two scenes", 3, make_data.write_nyu_scenes).has(depth=1.5),
)
def test_nyu(tmp_path, odd):
    odd.check("nyu", tmp_path)


def cities(change):
    def write(root) -> None:
        make_data.write_cityscapes(root)
        change(root)

    return write


def published_cameras(root) -> None:
    """Cameras of 2048x1024, whatever size the images were saved at."""
    camera = {
        "extrinsic": {"baseline": 0.209313},
        "intrinsic": {"fx": 2262.52, "fy": 2265.30, "u0": 1096.98, "v0": 513.137},
    }
    for path in (root / "camera").rglob("*.json"):
        path.write_text(json.dumps(camera))


def cropped_images(root) -> None:
    published_cameras(root)
    for path in (root / "leftImg8bit" / "train").rglob("*.png"):
        make_data.write_image(path, 48, 128)


def disparity_of_8_bits(root) -> None:
    for path in (root / "disparity").rglob("*.png"):
        make_data.write_array(path, np.full((64, 128), 9, np.uint8))


def one_without_disparity(root) -> None:
    os.remove(sorted((root / "disparity" / "train" / "ulm").iterdir())[0])


def finder_files(root) -> None:
    """What macOS leaves in every folder that was looked at."""
    for folder in [path for path in root.rglob("*") if path.is_dir()]:
        (folder / ".DS_Store").write_text("x")


WIDE = ("--height", 64, "--width", 128)
PUBLISHED_K = [141.41, 141.58, 68.09, 31.6]


@table(
    Odd("saved smaller", 4, cities(published_cameras), "0", *WIDE).has(K=PUBLISHED_K, depth=47.36),
    Odd("cropped", "128x48.*2048x1024", cities(cropped_images), "0", *WIDE),
    Odd("disparity of 8 bits", "disparity", cities(disparity_of_8_bits)).has(depth=4),
    Odd("an image without disparity", 3, cities(one_without_disparity)).has(depth=4),
    Odd("no cameras", "camera", cities(lambda root: shutil.rmtree(root / "camera"))),
    Odd("the video alone", 6, cities(lambda root: shutil.rmtree(root / "leftImg8bit")), BOTH),
    Odd(
        "no video",
        "leftImg8bit_sequence",
        cities(lambda root: shutil.rmtree(root / "leftImg8bit_sequence")),
        BOTH,
    ),
    Odd("stereo", "stereo", make_data.write_cityscapes, "0 s"),
    Odd("a city that is not there", "Ulm", make_data.write_cityscapes, "0", "--drives", "Ulm"),
    Odd("files of macOS", 4, cities(finder_files)).has(depth=4),
    Odd("the second image of a city", 2, make_data.write_cityscapes, "0", "--frames", "1:2"),
)
def test_cityscapes(tmp_path, odd):
    odd.check("cityscapes", tmp_path)


def camvid(count: int, *lost: int):
    def write(root) -> None:
        make_data.write_camvid(root, val=count)
        files = sorted((root / "val").iterdir())
        for number in lost:
            files[number].unlink()

    return write


def second_camvid_sequence(root) -> None:
    make_data.write_camvid(root, val=4)
    for number in range(0, 120, 30):
        make_data.write_image(root / "val" / f"Seq05VD_f{number:05d}.png", seed=number)


def camvid_with_K(root) -> None:
    make_data.write_camvid(root, val=6)
    make_data.write_text(root / "val" / "intrinsics.txt", "90 90 48 32")


@table(
    Odd("a gap", 3, camvid(8, 3), BOTH, "--fov", 60),
    Odd("two frames", "no usable sample", camvid(2), BOTH, "--fov", 60),
    Odd("two sequences", 4, second_camvid_sequence, BOTH, "--fov", 60),
    Odd("intrinsics of one's own", 4, camvid_with_K, BOTH).has(K=[90, 90, 48, 32]),
)
def test_camvid(tmp_path, odd):
    odd.check("camvid", tmp_path)


# ------------------------------------------------------------------------------------ labelled images


class OddLabels:
    """Labelled images of a data set, changed: the number of images of a split, or a refusal."""

    def __init__(self, name: str, data: str, expected: int | str, write, split: str = "val"):
        self.name = name
        self.data = data
        self.expected = expected
        self.write = write
        self.split = split

    def read(self, root) -> int:
        """How many images, after reading all of them."""
        dataset = labelled(self.data, root, self.split)
        for index in range(len(dataset)):
            dataset.native(index)
        assert len({image for image, _ in dataset.pairs}) == len(dataset)
        return len(dataset)

    def check(self, root) -> None:
        self.write(root)
        if isinstance(self.expected, int):
            assert self.read(root) == self.expected
            return
        with pytest.raises(InputError, match=self.expected) as refusal:
            self.read(root)
        assert "\n" not in str(refusal.value)


def relabelled(write, folder: str, how):
    """`how(raw ids)` for every label in a folder."""

    def change(root) -> None:
        write(root)
        for path in sorted((root / folder).rglob("*.png")):
            changed = how(np.array(Image.open(path)))
            make_data.write_array(path, np.ascontiguousarray(changed))

    return change


def then(write, change):
    def both(root) -> None:
        write(root)
        change(root)

    return both


def renamed(folder: str, old: str, new: str):
    def change(root) -> None:
        for path in sorted((root / folder).rglob("*.png")):
            path.rename(path.with_name(path.name.replace(old, new)))

    return change


def as_jpeg(folder: str):
    def change(root) -> None:
        for path in sorted((root / folder).rglob("*.png")):
            Image.open(path).save(path.with_suffix(".jpg"))
            path.unlink()

    return change


def twice(folder: str):
    """The first image of a folder in another format as well."""

    def change(root) -> None:
        path = sorted((root / folder).rglob("*.png"))[0]
        Image.open(path).save(path.with_suffix(".jpg"))

    return change


def colour(raw: np.ndarray) -> np.ndarray:
    return np.stack([raw] * 3, -1)


def filled(value: int, kind=np.uint8):
    return lambda raw: np.full(raw.shape, value, kind)


def voc(**lists: str):
    """Pascal VOC with these words in its lists."""
    words = {"train": "a1", "val": "a2 a3", "train_aug": "a1 a4", **lists}

    def write(root) -> None:
        make_data.write_voc(root, {name: text.split() for name, text in words.items()})

    return write


def nyu_list(name: str, line: str):
    def change(root) -> None:
        with open(root / name, "a") as file:
            file.write(f"{line}\n")

    return change


SEMANTICS = partial(make_data.write_semantics, count=6)
CAMVID = make_data.write_camvid
CITIES = make_data.write_cityscapes
ADE = make_data.write_ade20k
NYU = make_data.write_nyu
VOC_LABELS = "VOCdevkit/VOC2012/SegmentationClass"
WITHOUT_255 = {0: 3, 23: 10}
ODD_LABELS = (
    OddLabels("one image twice", "kitti", "000000_10", then(SEMANTICS, twice("training/image_2"))),
    OddLabels("one image", "kitti", "at least 2", partial(make_data.write_semantics, count=1)),
    OddLabels("colour", "kitti", "RGB", relabelled(SEMANTICS, "training/semantic", colour)),
    OddLabels("files of macOS", "kitti", 3, then(SEMANTICS, finder_files)),
    OddLabels(
        "16 bits",
        "kitti",
        "I;16",
        relabelled(SEMANTICS, "training/semantic", filled(700, np.uint16)),
    ),
    OddLabels("colour", "camvid", "RGB", relabelled(CAMVID, "valannot", colour)),
    OddLabels(
        "32 classes", "camvid", "id 23", relabelled(CAMVID, "valannot", lambda raw: raw + 12)
    ),
    OddLabels(
        "names end in _L",
        "camvid",
        "no such file",
        then(CAMVID, renamed("valannot", ".png", "_L.png")),
    ),
    OddLabels("labels as JPEG", "camvid", "no such file", then(CAMVID, as_jpeg("valannot"))),
    OddLabels(
        "half the size", "camvid", 3, relabelled(CAMVID, "valannot", lambda raw: raw[::2, ::2])
    ),
    OddLabels(
        "cut", "camvid", "90x64.*96x64", relabelled(CAMVID, "valannot", lambda raw: raw[:, :90])
    ),
    OddLabels("one image twice", "camvid", "0016E5_07959", then(CAMVID, twice("val"))),
    OddLabels(
        "train ids in name",
        "cityscapes",
        "labelIds",
        then(CITIES, renamed("gtFine", "labelI", "labelTrainI")),
    ),
    OddLabels("test has no labels", "cityscapes", "test", CITIES, "test"),
    OddLabels("id 34", "cityscapes", "id 34", relabelled(CITIES, "gtFine", filled(34))),
    OddLabels("images as JPEG", "cityscapes", 2, then(CITIES, as_jpeg("leftImg8bit"))),
    OddLabels("files of macOS", "cityscapes", 2, then(CITIES, finder_files)),
    OddLabels(
        "an empty city",
        "cityscapes",
        "berlin",
        then(CITIES, lambda root: os.makedirs(root / "leftImg8bit" / "val" / "berlin")),
    ),
    OddLabels("no palette", "voc", 2, relabelled(voc(), VOC_LABELS, lambda raw: raw)),
    OddLabels("colour", "voc", "RGB", relabelled(voc(), VOC_LABELS, colour)),
    OddLabels("id 21", "voc", "id 21", relabelled(voc(), VOC_LABELS, filled(21))),
    OddLabels("a name twice", "voc", "a2|twice", voc(val="a2 a2")),
    OddLabels("an empty list", "voc", "val", voc(val="")),
    OddLabels("evaluation in training", "voc", "a2", voc(train_aug="a1 a2"), "train"),
    OddLabels("16 bits", "ade20k", "I;16", relabelled(ADE, "annotations", filled(300, np.uint16))),
    OddLabels("id 151", "ade20k", "id 151", relabelled(ADE, "annotations", filled(151))),
    OddLabels("files of macOS", "ade20k", 1, then(ADE, finder_files)),
    OddLabels("id 41", "nyu", "id 41", relabelled(NYU, "label40", filled(41))),
    OddLabels("894 classes", "nyu13", "I;16", relabelled(NYU, "label40", filled(700, np.uint16))),
    OddLabels(
        "evaluation in training", "nyu", "0002", then(NYU, nyu_list("train.txt", "0002")), "train"
    ),
    OddLabels("an image that is not there", "nyu", "0999", then(NYU, nyu_list("test.txt", "0999"))),
)


@pytest.mark.parametrize("odd", ODD_LABELS, ids=[f"{case.data} {case.name}" for case in ODD_LABELS])
def test_labels(tmp_path, odd):
    odd.check(tmp_path)


def test_sources_of_frames_with_unpadded_fractions(tmp_path):
    """Whole or decimal fractions of a second: neighbours are neighbours in time."""
    decimal = [f"{1305031102.123456 + i / 30}.jpg" for i in range(60)]
    for case, stamps in enumerate((ros_times(60, 10**9), ros_times(60, 10**6), decimal)):
        root = make_data.write_frames(tmp_path / str(case), stamps)
        found = make_data.names(clips("frames", root, BOTH))
        assert found == [[stamps[i], stamps[i - 1], stamps[i + 1]] for i in range(1, 59)]


def test_pairs_stay_in_their_walk(tmp_path):
    two_stereo_walks(tmp_path)
    for sample in clips("frames", tmp_path, "0 s", "--baseline", 0.1).samples:
        here, there = (os.path.relpath(path, tmp_path).split("/") for path in sample["images"])
        assert here[0] == there[0] and {here[1], there[1]} == {"left", "right"}
        assert (sample["baseline"] < 0) == (here[1] == "left")


def test_a_picture_or_nothing_as_the_folder_of_frames(tmp_path):
    picture = make_data.write_image(tmp_path / "1.jpg")
    make_data.assert_refused("is a file; give the folder", clips, "frames", picture)
    make_data.assert_refused("'': no such folder", clips, "frames", "")


def test_the_largest_number_is_no_measurement(tmp_path):
    """Sensors write 65535 where they measure nothing: in millimetres it would be 65.5 m."""
    make_data.write_image(tmp_path / "1.jpg")
    depth = np.full((64, 96), 5000, np.uint16)
    depth[:20] = 65535
    make_data.write_array(tmp_path / "depth" / "1.png", depth)
    sample = read_first("frames", tmp_path, "0", "--fov", "60", with_depth=True)
    assert sample["depth"][:, :20].unique().tolist() == [0]
    assert sample["depth"][:, 20:].unique().tolist() == [5]


def test_a_split_names_frames_in_folders_with_spaces(tmp_path):
    """As PATH and as FOLDER NUMBER."""
    root = tmp_path / "data"
    for folder in ("my walk", "other"):
        make_data.write_frames(root / folder, numbered("{:04d}.png", range(1, 5)))
    make_data.write_text(root / "intrinsics.txt", "60 60 47.5 31.5")
    lines = ["my walk/0002.png", "my walk 3", "other 1", "other/0004"]
    split = make_data.write_text(tmp_path / "split.txt", "\n".join(lines))
    dataset = clips("frames", root, "0", "--split", split)
    assert make_data.target_names(dataset) == ["0002.png", "0003.png", "0001.png", "0004.png"]


@pytest.mark.parametrize("progressive", (False, True))
def test_a_jpeg_with_a_video_behind_it(tmp_path, progressive):
    """As phones write "motion photos"; a cut picture is refused, whatever its thumbnail ends with."""
    path = tmp_path / "1.jpg"
    exif = Image.Exif()
    exif[0x927C] = b"\xff\xd8\xff\xda thumbnail \xff\xd9"
    picture = Image.fromarray(make_data.picture(64, 96))
    picture.save(path, quality=90, progressive=progressive, exif=exif)
    whole = path.read_bytes()
    path.write_bytes(whole + b"ftypmp42 \xff\xda \xff\xd8 \xff\xda")
    assert read_image(str(path)).shape == (3, 64, 96)
    path.write_bytes(whole[: 2 * len(whole) // 3])
    with pytest.raises(InputError, match="truncated"):
        read_image(str(path))
