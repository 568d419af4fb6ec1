"""Random inputs against an oracle that knows the right targets, K, depth and labels: right, or refused in one line.

    python -m pytest tests/test_fuzz.py
    FUZZ=2000 FUZZ_SEED=7 python -m pytest tests/test_fuzz.py -s

Each mutation is a function of its number and FUZZ_SEED, so that a failure can be repeated.
"""

import collections
import os
import shutil
import warnings
from pathlib import Path

import make_data
import numpy as np
import pytest
import torch
from make_data import DRIVE, clips, labelled
from PIL import Image, ImageOps

import utils
import weights
from images import read_ids, read_image

MUTATIONS = int(os.environ.get("FUZZ", "150"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
ONLY = [
    int(number) for number in os.environ.get("FUZZ_ONLY", "").split()
]  # to repeat some
SIDES = {2: "image_02", 3: "image_03"}


class Case:
    """A folder and what is right: the frames of every target by name, K at training size, depth and baseline."""

    def __init__(self, data: str, root, frame_ids: str):
        self.data = data
        self.root = root
        self.frame_ids = frame_ids
        self.options = []
        self.targets = {}  # path of the target -> paths of its frames, target first
        self.K = {}  # path of the target -> fx, fy, cx, cy
        self.depth = {}  # path of the target -> metres
        self.baseline = {}  # path of the target -> metres to the other camera along x
        self.may_refuse = False  # whether a refusal is right as well
        self.must_refuse = False
        self.what = ""

    def check(self) -> str:
        """ "read" or "refused"; raises AssertionError where the outcome is wrong."""
        try:
            self.compare()
        except utils.InputError as error:
            assert "\n" not in str(error), error
            assert len(str(error)) < 600, error
            assert self.may_refuse or self.must_refuse, f"refused: {error}"
            return "refused"
        assert not self.must_refuse, "read what should be refused"
        return "read"

    def compare(self) -> None:
        dataset = clips(
            self.data,
            self.root,
            self.frame_ids,
            *self.options,
            with_depth=bool(self.depth),
        )
        found = {sample["images"][0]: sample["images"] for sample in dataset.samples}
        samples = [dataset.read(index) for index in range(len(dataset))]
        assert not self.must_refuse, "read what should be refused"
        assert len(found) == len(dataset), "targets occur twice"
        assert found == self.targets, differing(found, self.targets)
        for path, sample in zip(dataset.targets(), samples):
            K = [float(sample["K"][place]) for place in ((0, 0), (1, 1), (0, 2), (1, 2))]
            assert pytest.approx(self.K[path], rel=1e-3, abs=0.02) == K, path
            for frame, source in zip(sample["frames"], self.targets[path]):
                assert shows(frame, source), source
            if self.baseline:
                assert float(sample["stereo_T"][0, 3]) == pytest.approx(
                    self.baseline[path]
                ), path
            if self.depth:
                measured = sample["depth"][sample["depth"] > 0]
                assert measured.unique().tolist() == pytest.approx([self.depth[path]]), (
                    path
                )


def differing(found: dict, expected: dict) -> str:
    """One line on what two dicts of lists of paths do not share."""
    for path in sorted(found.keys() | expected.keys()):
        if found.get(path) != expected.get(path):
            return f"{path}: {found.get(path)} instead of {expected.get(path)}"
    return ""


def shows(frame: torch.Tensor, path: str) -> bool:
    """Whether a frame (3, H, W) uint8 is the picture in the file."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            upright = Image.fromarray(
                (np.asarray(upright).astype(int) >> 8).astype(np.uint8)
            )
        upright = upright.convert("RGB").resize(
            (frame.shape[2], frame.shape[1]), Image.Resampling.BILINEAR
        )
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    return float((frame.float() - expected.float()).abs().mean()) < 6


# ------------------------------------------------------------------------------------ own frames


def draw_numbers(draw: np.random.Generator) -> list[int]:
    """Frame numbers at a usual step, with a frame or two missing."""
    step = int(draw.choice((1, 1, 2, 5, 10)))
    start = int(draw.choice((0, 1, 7, 95, 998)))
    numbers = [start + step * i for i in range(9)]
    for _ in range(draw.integers(3)):
        numbers.pop(draw.integers(len(numbers)))
    return numbers


def number_names(draw: np.random.Generator) -> list[list[tuple[float, str]]]:
    """Sequences in one folder, each a list of (time in steps, name), named by numbers."""
    affixes = (
        (("", ""),),
        (("frame", ""),),
        (("seqA_", ""), ("seqB_", "")),
        (("left_", ""), ("right_", "")),
        (("cam0_", ""), ("cam1_", "")),
        (("cam0-", "-rgb8"), ("cam1-", "-rgb8")),
        (("run 1 (", ")"), ("run 2 (", ")")),
        (("", "_left"), ("", "_right")),
        (("2024-05-01_", ""),),
        (("GOPR0042_", ""), ("GOPR0043_", "")),
        (("IMG_20240501_", "_HDR"),),
        (("a1b2c3_", ""), ("a1b2c4_", "")),
        (("", "_leftImg8bit"),),
        (("rgb_", "_1280x720"),),
        (("drone_4k_", ""),),
    )
    width = int(draw.choice((1, 4, 6, 10)))
    sequences = []
    for prefix, suffix in affixes[draw.integers(len(affixes))]:
        numbers = draw_numbers(draw)
        step = collections.Counter(np.diff(numbers).tolist()).most_common(1)[0][0]
        names = [f"{prefix}{number:0{width}d}{suffix}" for number in numbers]
        sequences.append([(number / step, name) for number, name in zip(numbers, names)])
    return sequences


def time_names(draw: np.random.Generator) -> list[list[tuple[float, str]]]:
    """One sequence of (time in steps, name), named by clocks that jitter."""
    unit = int(draw.choice((1, 1000, 1_000_000)))  # nanoseconds, micro- or milliseconds
    period = 1_000_000_000 // int(draw.choice((10, 20, 30)))
    jitter = int(0.03 * period)
    start = 1_403_636_579_763_555_584
    lost = draw.choice(12, draw.integers(3), replace=False)
    kept = [i for i in range(12) if i not in lost]
    found = []
    for i in kept:
        time = start + i * period + int(draw.integers(-jitter, jitter + 1))
        name = str(time // unit)
        if unit == 1000 and draw.bit_generator.seed_seq.entropy[1] % 2:
            name = f"{name[:-6]}.{name[-6:]}"
        found.append((float(i), name))
    return [found]


def neighbours(
    sequence: list[tuple[float, str]], offsets: list[int]
) -> dict[str, list[str]]:
    """Name of a target -> names of its frames, of those that have all of them."""
    by_time = {round(time * 1000): name for time, name in sequence}
    found = {}
    for time, name in sequence:
        frames = [by_time.get(round((time + offset) * 1000)) for offset in offsets]
        if None not in frames:
            found[name] = frames
    return found


def save_picture(
    draw: np.random.Generator, path: str, size: tuple[int, int], kind: str, turn: int
) -> None:
    """A picture of its own in one of the ways in which images are stored; `turn` is its EXIF orientation."""
    image = Image.fromarray(make_data.picture(*size, seed=int(draw.integers(2**31))))
    if kind == "gray16":
        deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
        image = Image.fromarray(deep)
    elif kind != "RGB":
        image = image.quantize(64) if kind == "P" else image.convert(kind)
    extra = {"exif": make_data.turned(turn)} if turn != 1 else {}
    image.save(path, **extra)


def write_intrinsics(
    draw: np.random.Generator, case: Case, shown: tuple[int, int]
) -> list[float]:
    """intrinsics.txt in some spelling, or --fov; returns fx, fy, cx, cy at training size (64 x 96)."""
    height, width = shown
    fx = float(draw.uniform(0.6, 1.5) * width)
    K = np.array([fx, fx * float(draw.uniform(0.97, 1.03)), 0.49 * width, 0.52 * height])
    style = draw.integers(5)
    if style == 0:
        case.options += ["--fov", "70"]
        focal = width / 2 / np.tan(np.radians(35))
        K = np.array([focal, focal, (width - 1) / 2, (height - 1) / 2])
    else:
        separator = (" ", ", ", ",", "\t")[style - 1]
        numbers = (K[0], 0, K[2], 0, K[1], K[3], 0, 0, 1) if draw.random() < 0.5 else K
        text = separator.join(f"{number:.6f}" for number in numbers)
        mark = "\ufeff" if draw.random() < 0.3 else ""
        make_data.write_text(
            f"{case.root}/intrinsics.txt", mark + text + "\n" * int(draw.integers(3))
        )
    across, down = 96 / width, 64 / height
    return [
        K[0] * across,
        K[1] * down,
        (K[2] + 0.5) * across - 0.5,
        (K[3] + 0.5) * down - 0.5,
    ]


def own_frames(draw: np.random.Generator, root: str) -> Case:
    """Names, sizes, EXIF, bit depths and spellings of intrinsics of a user's own folder."""
    offsets = [(0,), (0, 1), (0, -1, 1), (0, -2, 2), (0, 1, -1)][draw.integers(5)]
    case = Case("frames", root, " ".join(map(str, offsets)))
    named = (number_names, number_names, time_names)[draw.integers(3)](draw)
    kind = str(draw.choice(("RGB", "RGB", "L", "P", "gray16", "RGBA")))
    turn = int(draw.choice((1, 1, 1, 3, 6, 8)))
    extension = str(draw.choice(("png", "PNG", "jpg", "jpeg", "JPG")))
    if extension.lower() != "png":
        kind = "L" if kind == "L" else "RGB"
    size = ((64, 96), (72, 96), (80, 64))[draw.integers(3)]
    shown = size[::-1] if turn in (6, 8) else size
    K = write_intrinsics(draw, case, shown)
    files = [name for sequence in named for _, name in sequence]
    for name in draw.permutation(files):
        save_picture(draw, f"{root}/{name}.{extension}", size, kind, turn)
    for sequence in named:
        for target, frames in neighbours(sequence, list(offsets)).items():
            path = f"{root}/{target}.{extension}"
            case.targets[path] = [f"{root}/{frame}.{extension}" for frame in frames]
            case.K[path] = K
    case.must_refuse = not case.targets
    for name in ("notes.txt", ".hidden.jpg", "Thumbs.db", f"._{files[0]}.{extension}"):
        if draw.random() < 0.3:
            make_data.write_text(f"{root}/{name}", "odd")
    case.what = (
        f"{named[0][0][1]}.{extension} {len(named)} sequences, {kind}, EXIF {turn}"
    )
    return case


def own_depth(draw: np.random.Generator, root: str) -> Case:
    """Measured depth of two sequences, some of it missing, or of another shape or coding."""
    case = Case("frames", root, "0")
    scale = int(draw.choice((100, 256, 1000, 5000)))
    case.options = ["--fov", "60", "--depth_scale", str(scale)]
    focal = 48 / np.tan(np.radians(30))
    fault = str(
        draw.choice(
            ("none", "none", "none", "shape", "8 bits", "colour", "empty", "16-bit copy")
        )
    )
    for sequence in ("a", "b"):
        for number in range(3):
            path = make_data.write_image(
                f"{root}/{sequence}_{number}.png", seed=int(draw.integers(2**31))
            )
            metres = int(draw.integers(1, 12))
            if draw.random() < 0.3 and case.depth:
                continue
            make_data.write_depth(
                f"{root}/depth/{sequence}_{number}.png", metres, scale=scale
            )
            case.targets[path] = [path]
            case.K[path] = [focal, focal, 47.5, 31.5]
            case.depth[path] = metres
    spoil_depth(case, fault)
    case.what = f"depth, {fault}"
    return case


def spoil_depth(case: Case, fault: str) -> None:
    path = sorted(case.depth)[0]
    depth = f"{case.root}/depth/{os.path.basename(path)}"
    arrays = {
        "shape": np.full((96, 64), 3000, np.uint16),
        "8 bits": np.full((64, 96), 30, np.uint8),
        "colour": np.full((64, 96, 3), 30, np.uint8),
        "empty": np.zeros((64, 96), np.uint16),
    }
    if fault in arrays:
        make_data.write_array(depth, arrays[fault])
        case.must_refuse = True
    if (
        fault == "16-bit copy"
    ):  # the depth lies beside the images as well, under other names
        for other in sorted(case.depth):
            name = f"{os.path.splitext(other)[0]}_depth.png"
            make_data.write_depth(name, 3)
        case.may_refuse = True


def own_stereo(draw: np.random.Generator, root: str) -> Case:
    """Pairs in folders or by names, cameras that miss frames, a K of each camera."""
    case = Case("frames", root, str(draw.choice(("0 s", "0 -1 s"))))
    baseline = round(float(draw.uniform(0.05, 1)), 3)
    case.options = ["--baseline", str(baseline)]
    layouts = (
        "{}/{:04d}.jpg",
        "{}_{:04d}.jpg",
        "{:04d}_{}.jpg",
        "scene/{}/data/{:04d}.jpg",
    )
    number_first = draw.random() < 0.25
    layout = layouts[2] if number_first else layouts[draw.choice((0, 1, 3))]
    words = (("left", "right"), ("Left", "Right"), ("cam0", "cam1"))[draw.integers(3)]
    paths = {}
    for side in (0, 1):
        lost = draw.integers(12)  # one frame of every other camera
        for number in range(6):
            if number == lost:
                continue
            parts = (number, words[side]) if number_first else (words[side], number)
            paths[side, number] = os.path.join(root, layout.format(*parts))
            make_data.write_image(paths[side, number], seed=int(draw.integers(2**31)))
    make_data.write_text(f"{root}/intrinsics.txt", "60 60 47.5 31.5")
    for (side, number), path in paths.items():
        wanted = [(side, number), (side, number - 1), (1 - side, number)]
        if "-1" not in case.frame_ids:
            wanted.pop(1)
        frames = [paths.get(place) for place in wanted]
        if None not in frames:
            case.targets[path] = frames
            case.K[path] = [60, 60, 47.5, 31.5]
            case.baseline[path] = baseline if side else -baseline
    # both numbers count up; a folder that is too deep to be searched
    case.may_refuse = number_first and words[0] == "cam0" or layout == layouts[3]
    case.what = f"stereo {layout} {words}"
    return case


# ------------------------------------------------------------------------------------ KITTI


def kitti(draw: np.random.Generator, root: str) -> Case:
    """Sizes, missing frames and damaged calibrations of a drive."""
    stereo = draw.random() < 0.5
    case = Case("kitti", root, "0 s" if stereo else "0 -1 1")
    factor = float(draw.choice((1, 1, 0.5, 2)))
    shape = (round(64 * factor), round(96 * factor))
    if draw.random() < 0.15:
        shape = (shape[0], shape[1] - 16)
        case.must_refuse = True
    fx = float(draw.uniform(40, 90))
    K = np.array([[fx, 0, 46], [0, fx, 30], [0, 0, 1]])
    make_data.write_calibration(f"{root}/2011_09_26", K)
    make_data.write_drive(root, frames=5, height=shape[0], width=shape[1])
    present = {(side, number) for side in SIDES for number in range(5)}
    for side, number in [
        (side, number) for side, number in sorted(present) if draw.random() < 0.1
    ]:
        os.remove(image_path(root, side, number))
        present.remove((side, number))
    for side, number in sorted(present):
        frames = [(side, number), (5 - side, number)]
        if not stereo:
            frames = [(side, number), (side, number - 1), (side, number + 1)]
        if present.issuperset(frames):
            paths = [image_path(root, *frame) for frame in frames]
            case.targets[paths[0]] = paths
            case.K[paths[0]] = [fx, fx, 46, 30]
            if stereo:
                case.baseline[paths[0]] = 0.5 if side == 3 else -0.5
    case.must_refuse |= not case.targets
    spoil_calibration(draw, case)
    return case


def image_path(root: str, side: int, number: int) -> str:
    return f"{root}/{DRIVE}/{SIDES[side]}/data/{number:010d}.png"


def spoil_calibration(draw: np.random.Generator, case: Case) -> None:
    path = Path(case.root, "2011_09_26", "calib_cam_to_cam.txt")
    text = path.read_text()
    fault = str(
        draw.choice(
            (
                "none",
                "none",
                "none",
                "nan",
                "key",
                "short",
                "empty",
                "size",
                "missing",
                "mark",
            )
        )
    )
    changed = {
        "nan": text.replace("P_rect_02: ", "P_rect_02: nan "),
        "key": text.replace("P_rect_02", "P_rect_99"),
        "short": text.replace("P_rect_03: ", "P_rect_03: 1 2 3\nold: "),
        "empty": "",
        "size": text.replace("S_rect_02: 9.6", "S_rect_02: 7.3"),
        "mark": "\ufeff" + text.replace("\n", "\r\n"),
    }
    path.write_text(changed.get(fault, text), newline="")
    if fault == "missing":
        path.unlink()
    case.must_refuse |= fault in ("nan", "key", "short", "empty", "size", "missing")
    case.what = f"calibration {fault}"


# ------------------------------------------------------------------------------------ labels


class LabelCase:
    """One damaged label or image of KITTI's labelled ones: refused, or read as it is."""

    def __init__(self, draw: np.random.Generator, root: str):
        self.root = make_data.write_semantics(root, count=4)
        data = labelled("kitti", self.root, "val")
        self.image, self.label = data.pairs[0]
        faults = {
            "none": self.change(lambda raw: raw),
            "unknown id": self.change(
                lambda raw: np.where(raw == 7, np.uint8(34 + draw.integers(200)), raw)
            ),
            "16 bits": self.change(lambda raw: raw.astype(np.uint16) * 300),
            "colour": self.change(lambda raw: np.stack([raw] * 3, -1)),
            "turned": self.change(lambda raw: raw.T),
            "other size": self.change(lambda raw: raw.repeat(2, 0).repeat(2, 1)),
            "cut": self.change(lambda raw: raw[:, :60]),
            "flipped": self.change(lambda raw: raw[:, ::-1]),
            "exif": lambda: make_data.write_image(self.image, exif=make_data.turned(6)),
            "lost": lambda: os.remove(self.label),
            "image for label": lambda: shutil.copy(self.image, self.label),
        }
        self.what = str(draw.choice(list(faults)))
        faults[self.what]()

    def change(self, how):
        """A function that rewrites the label."""

        def rewrite() -> None:
            changed = how(np.array(Image.open(self.label)))
            make_data.write_array(self.label, np.ascontiguousarray(changed))

        return rewrite

    def check(self) -> str:
        right = self.what in ("none", "other size", "flipped")
        try:
            data = labelled("kitti", self.root, "val")
            image, label = data.native(0)
        except utils.InputError as error:
            assert not right, f"refused: {error}"
            assert "\n" not in str(error)
            return "refused"
        assert right, "read what should be refused"
        raw = np.array(Image.open(self.label))
        expected = np.select([raw == 7, raw == 26], (0, 13), utils.IGNORE)
        assert (label.numpy() == expected).all()
        return "read"


# ------------------------------------------------------------------------------------ damaged bytes


class DamageCase:
    """Bytes of one file flipped, or its end cut off: refused, or what a checksum covers is unchanged."""

    def __init__(self, draw: np.random.Generator, root: str):
        self.kind = str(
            draw.choice(("png", "jpg", "depth", "label", "checkpoint", "points"))
        )
        self.path = self.write(draw, root)
        self.before = self.read()
        self.what = f"{self.kind} {damage(self.path, draw)}"

    def write(self, draw: np.random.Generator, root: str) -> str:
        if self.kind in ("png", "jpg"):
            return make_data.write_image(
                f"{root}/a.{self.kind}", seed=int(draw.integers(99))
            )
        if self.kind == "depth":
            return make_data.write_array(
                f"{root}/a.png", draw.integers(1, 60000, (64, 96)).astype(np.uint16)
            )
        if self.kind == "label":
            return make_data.write_array(
                f"{root}/a.png", make_data.blocks(range(19), 64, 96)
            )
        if self.kind == "points":
            make_data.write_kitti(root, frames=1)
            return f"{root}/{DRIVE}/velodyne_points/data/0000000000.bin"
        tensors = {f"conv{i}.weight": torch.rand(8, 3, 3, 3) for i in range(20)}
        torch.save({"encoder": tensors, "options": {"arch": "unet"}}, f"{root}/a.pt")
        return f"{root}/a.pt"

    def read(self) -> list[torch.Tensor]:
        if self.kind in ("png", "jpg"):
            return [read_image(self.path)]
        if self.kind in ("depth", "label"):
            modes = ("I;16", "I") if self.kind == "depth" else ("L", "P")
            return [
                torch.from_numpy(read_ids(self.path, modes).astype(np.int64))
            ]
        if self.kind == "points":
            root = self.path.partition("/2011_09_26/")[0]
            return [clips("kitti", root, "0", with_depth=True).read(0)["depth"]]
        content = utils.read_tensors(self.path)
        weights.read_checkpoint(self.path)
        return [*content["encoder"].values()]

    def check(self) -> str:
        try:
            now = self.read()
        except utils.InputError as error:
            assert "\n" not in str(error)
            return "refused"
        assert all(value.float().isfinite().all() for value in now)
        same = len(now) == len(self.before) and all(map(torch.equal, now, self.before))
        assert same or self.kind in ("jpg", "points")  # neither has a checksum
        return "unchanged" if same else "another input"


def damage(path: str, draw: np.random.Generator) -> str:
    """Flip bytes of a file, or cut it; what was done."""
    size = os.path.getsize(path)
    if draw.random() < 0.4:
        os.truncate(path, draw.integers(size))
        return "cut"
    with open(path, "r+b") as file:
        for position in draw.integers(size, size=draw.integers(1, 5)):
            file.seek(position)
            file.write(bytes([draw.integers(256)]))
    return "flipped"


def test_fuzz(tmp_path):
    """Sound inputs are read and right; the others are refused in one line; no traceback, no warning of numpy."""
    frames = (own_frames, own_frames, own_frames, own_depth, own_stereo)
    kinds = (*frames, kitti, LabelCase, DamageCase, DamageCase)
    outcomes = collections.Counter()
    failures = []
    for number in ONLY or range(MUTATIONS):
        draw = np.random.default_rng([SEED, number])
        make = kinds[number % len(kinds)]
        root = tmp_path / str(number)
        root.mkdir()
        case = make(draw, str(root))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                outcomes[make.__name__, case.check()] += 1
        except Exception as error:  # noqa: BLE001  (whatever it is, the others are tried as well)
            reason = f"{type(error).__name__} {error}".splitlines()[0]
            failures.append(f"mutation {number} ({make.__name__}, {case.what}): {reason}")
        else:
            shutil.rmtree(root)
    print(f"{outcomes.total()} mutations: {dict(sorted(outcomes.items()))}")
    assert not failures, f"{len(failures)} failures:\n" + "\n".join(failures[:20])
