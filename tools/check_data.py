"""Walk a data set before a run: what is there, what looks suspicious, what is broken.

    python tools/check_data.py --data kitti --frame_ids 0 -1 1 s --depth --output contact.png
    python tools/check_data.py --data camvid --labels --output contact.png

Every sample (of Section 4.1's data sets, or your own) is read as training reads it, with the same
refusals. Exit code 2 when something is broken, all of which is listed; what merely looks wrong is
a warning.
"""

import argparse
import math
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import datasets
from images import image_names, image_size, natural_key, read_ids, read_image, size_text
from tools.check_pictures import View, clip_sheet, difference, edge_agreement, label_sheet, same_pictures, thumbnails
from utils import IGNORE, InputError, Parser, run_main, within

STATIC = 2.0  # of 255: a target that differs less from a neighbour is near-static
NEAR, FAR = 1.0, 100.0  # metres, LiDAR's default range: what lies outside does not train
SHOWN = 6  # samples on the contact sheet
DROPPED = 0.1  # a warning above this share
OFF_CENTRE = 0.06  # share of the width between the principal point and the middle; KITTI's: 0.01


def parse_options() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets.add_loader_options(parser)
    datasets.add_clip_options(parser)
    add = parser.add_argument_group("check").add_argument
    add("--labels", action="store_true", help="labelled images for train_seg.py instead of clips")
    add("--frame_ids", nargs="+", type=frame_id, default=["0", "-1", "1"], metavar="ID",
        help="of clips: target 0, sources, s for the other camera (default: 0 -1 1)")
    add("--depth", action="store_true", help="check the measured depth of clips as well")
    add("--against", nargs="+", default=[], metavar="FOLDER",
        help="folders of images that training must not see, searched for the same pictures")
    add("--output", metavar="contact.png", help="write a contact sheet of some samples")
    args = parser.parse_args()
    if args.output and not args.output.lower().endswith((".png", ".jpg")):
        raise InputError(f"--output {args.output} does not end in .png or .jpg")
    if args.cache:
        raise InputError("--cache: the files themselves are checked")
    args.frame_ids.sort(key=lambda offset: offset == "s")  # the other camera comes last
    return args


def frame_id(text: str) -> str:
    """An offset as train_depth.py takes it, or s."""
    return text if text == "s" else str(within(int, -1000, 1000)(text))


class Report:
    """What is found: printed at once, warnings and errors on standard error, and counted."""

    def __init__(self):
        self.warnings = 0
        self.problems = {}  # a line each, in order, without repetition

    def warn(self, line: str) -> None:
        self.warnings += 1
        print(f"warning: {line}", file=sys.stderr)

    def broken(self, line: str) -> None:
        if line not in self.problems:
            print(f"error: {line}", file=sys.stderr)
        self.problems[line] = True


# ---------------------------------------------------------------------------------------------- reading samples

def walk(dataset, inspect: Callable, workers: int, report: Report) -> list[dict]:
    """Rows of `inspect(dataset, index)` for all sound samples; reports the others' problems.

    Rows hold no tensors: each would keep a file of shared memory open.
    """

    def inspect_some(indices: list[int]) -> list[dict]:
        return [inspect(dataset, index) for index in indices]

    loader = DataLoader(range(len(dataset)), 8, num_workers=workers, collate_fn=inspect_some,
                        multiprocessing_context="fork" if workers else None)  # the above does not pickle
    rows = []
    for some in tqdm(loader, desc="check", unit_scale=8, disable=None):
        for row in some:
            for problem in row["problems"]:
                report.broken(problem)
            if not row["problems"]:
                rows.append(row)
    return rows


def unreadable(paths: list[str]) -> list[str]:
    """Why some of these images cannot be read."""
    problems = []
    for path in paths:
        try:
            read_image(path)
        except InputError as error:
            problems.append(str(error))
    return problems


def inspect_clip(dataset, index: int) -> dict:
    """"problems" of a sample; of a sound one its sizes, K, motion, order and a part of its depth."""
    sample = dataset.samples[index]
    try:
        read = dataset.read(index)
    except InputError as error:
        return {"problems": unreadable(sample["images"]) or [str(error)]}
    target, *sources = thumbnails(read["frames"]).numpy()
    size = image_size(sample["images"][0])
    row = {
        "problems": [],
        "index": index,
        "native": size,
        "native_K": dataset.native_intrinsics(sample, size),
        "K": read["K"].numpy(),
        "K_from": sample["K_from"],
        "thumbnail": target,
        "motion": [difference(target, source) for source in sources],
    }
    if len(sources) > 1:
        row["between"] = difference(sources[0], sources[1])
    if "depth" in read:
        measured = read["depth"][read["depth"] > 0].numpy()
        row["share"] = measured.size / read["depth"].numel()
        row["far"] = (measured > FAR).mean()
        row["depth"] = measured[::97]
    return row


def inspect_label(dataset, index: int) -> dict:
    """"problems" of a labelled image; of a sound one its sizes, class counts and raw ids."""
    try:
        image, label = dataset.native(index)
        raw = read_ids(dataset.pairs[index][1])
    except InputError as error:
        return {"problems": [str(error)]}
    row = {
        "problems": [],
        "index": index,
        "native": tuple(image.shape[1:]),
        "label": tuple(label.shape),
        "pixels": np.bincount(label.flatten(), minlength=256),
        "raw": set(np.unique(raw).tolist()),
        "map": zlib.crc32(raw.tobytes()),
        "thumbnail": thumbnails(image[None])[0].numpy(),
    }
    if row["native"] == row["label"]:
        row["edges"] = edge_agreement(image, label)
    return row


# ---------------------------------------------------------------------------------------------- pictures seen twice

def report_same(report: Report, ours: dict, theirs: dict, where: str) -> None:
    """Warn of training images, path -> thumbnail, that are in a set which training must not see."""
    if not ours or not theirs:
        return
    pairs = same_pictures([*ours.values()], [*theirs.values()])
    if not pairs:
        print(f"none of the {len(ours)} training images is in {where}")
        return
    report.warn(f"{len(pairs)} training images are also in {where}")
    for one, other in pairs[:8]:
        print(f"  {[*ours][one]} = {[*theirs][other]}")


def read_folder(folder: str, report: Report) -> dict[str, np.ndarray]:
    """Path -> thumbnail of all images in a folder and those below."""
    found = {}
    for place, _, _ in sorted(os.walk(folder)):
        for name in image_names(place):
            path = os.path.join(place, name)
            try:
                found[path] = thumbnails(read_image(path)[None])[0].numpy()
            except InputError as error:
                report.broken(str(error))
    if not found:
        report.broken(f"--against {folder}: no images there")
    return found


# ---------------------------------------------------------------------------------------------- describing clips

def tally(values) -> str:
    return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common(6))


def describe_sequences(dataset) -> None:
    """What was taken for a sequence, with its first and last target."""
    found = {}
    for sample in dataset.samples:
        name = os.path.basename(sample["images"][0])
        found.setdefault(sample["sequence"], []).append(name)
    print(f"sequences: {len(found)}")
    for place, names in [*found.items()][:20]:
        ordered = sorted(names, key=natural_key)
        print(f"  {place}: {ordered[0]} to {ordered[-1]} ({len(names)} targets)")


def describe_dropped(dataset, report: Report) -> None:
    if dataset.dropped:
        print(f"left out: {dataset.dropped}")
    share = dataset.dropped_count / (len(dataset) + dataset.dropped_count)
    if share > DROPPED:
        report.warn(f"{100 * share:.0f} % of the targets are left out: {dataset.dropped}")


def camera_text(K: np.ndarray) -> str:
    return f"fx {K[0, 0]:.1f} fy {K[1, 1]:.1f} cx {K[0, 2]:.1f} cy {K[1, 2]:.1f}"


def describe_cameras(report: Report, rows: list[dict], size: tuple) -> None:
    """K at native and at training size, where it came from, and whether a camera can be so."""
    cameras = Counter()
    odd = Counter()
    for row in rows:
        native = row["native_K"]
        line = (f"{camera_text(native)} of {size_text(row['native'])}, "
                f"{camera_text(row['K'])} of {size_text(size)}")
        cameras[line, row["K_from"]] += 1
        angle = 2 * math.degrees(math.atan(row["native"][1] / 2 / native[0, 0]))
        if not 20 < angle < 150:
            odd[f"a field of view of {angle:.0f} degrees by {row['K_from']}"] += 1
        if not 0.9 < native[0, 0] / native[1, 1] < 1.1:
            odd[f"fx / fy = {native[0, 0] / native[1, 1]:.2f} by {row['K_from']}"] += 1
        off = native[0, 2] / row["native"][1] - 0.5
        if abs(off) > OFF_CENTRE:
            share = f"{100 * abs(off):.0f} % of the width"
            odd[f"a principal point {share} off the centre by {row['K_from']}"] += 1
    for (line, source), count in cameras.most_common(8):
        print(f"intrinsics: {line}, from {source} ({count})")
    for what, count in odd.items():
        report.warn(f"{what} is unusual ({count} samples): is it of these images?")


def describe_motion(report: Report, rows: list[dict]) -> None:
    moving = [min(row["motion"]) for row in rows if row["motion"]]
    if not moving:
        return
    static = np.mean([value < STATIC for value in moving])
    print(f"near-static: {100 * static:.1f} % of the targets are within {STATIC:g} of 255 of a neighbour")
    if static > 0.5:
        report.warn("more than half of the targets are near-static")


def describe_order(report: Report, rows: list[dict], frame_ids: list[str]) -> None:
    """In the right order, the frames before and after differ more from each other than from the target."""
    if frame_ids[1:3] not in (["-1", "1"], ["1", "-1"]):
        return
    moving = [row for row in rows if min(row["motion"][:2]) >= STATIC]
    ordered = [row["between"] > max(row["motion"][:2]) for row in moving]
    if ordered:
        share = np.mean(ordered)
        print(f"order: of {100 * share:.0f} % of the moving targets, frames -1 and 1 are furthest apart")
        if share < 0.6:
            report.warn("frames -1 and 1 are often closer to each other than to the target: "
                        "is the order right?")


def describe_depth(report: Report, rows: list[dict]) -> None:
    values = np.concatenate([row["depth"] for row in rows])
    low, middle, high = np.percentile(values, (0.1, 50, 99.9))
    share = 100 * np.mean([row["share"] for row in rows])
    far = 100 * np.mean([row["far"] for row in rows])
    print(f"measured depth: {share:.1f} % of the pixels at training size, median {middle:.2f} m, "
          f"99.8 % from {low:.2f} m to {high:.2f} m")
    if far > 1:
        report.warn(f"{far:.1f} % of the measured depth is beyond {FAR:g} m, --max_depth's default, "
                    "and does not train")
    near = 100 * np.mean(values < NEAR)
    if near > 1:
        report.warn(f"{near:.1f} % of the measured depth is within {NEAR:g} m, --min_depth's default, "
                    "and does not train")
    if not 0.3 < middle < FAR:
        report.warn(f"a median depth of {middle:.3g} m is unlikely: see --depth_scale")
    if share < 0.5:
        report.warn(f"only {share:.2f} % of the pixels are measured")


def describe_views(args: argparse.Namespace, dataset, rows: list[dict], report: Report) -> None:
    """A neighbour warped into some targets' view; writes the contact sheet."""
    sources = args.frame_ids[1:]
    if not args.output and "s" not in sources:
        return
    neighbour = "s" if "s" in sources else (*sources, None)[0]
    position = args.frame_ids.index(neighbour) if neighbour else None
    chosen = spread(rows)
    views = [View(dataset.read(row["index"]), position) for row in chosen]
    if sum(view.swapped for view in views) > len(views) / 2:
        report.warn("the other camera fits better on the other side: are left and right swapped?")
    if args.output:
        paths = [dataset.targets()[row["index"]] for row in chosen]
        clip_sheet(views, paths, neighbour).save(args.output)
        print(f"{len(views)} samples -> {args.output}")


def spread(rows: list[dict]) -> list[dict]:
    """A few rows from first to last."""
    positions = np.linspace(0, len(rows) - 1, min(SHOWN, len(rows)))
    return [rows[round(position)] for position in positions]


def check_clips(args: argparse.Namespace, report: Report) -> None:
    dataset = datasets.find_clips(args, args.frame_ids, args.depth)
    targets = dataset.targets()
    distinct = len(set(targets))
    ids = " ".join(args.frame_ids)
    print(f"{dataset.name}: {len(dataset)} samples of frames {ids}, {distinct} distinct targets")
    if distinct < len(dataset):
        report.broken(f"{len(dataset)} samples have only {distinct} distinct targets")
    describe_sequences(dataset)
    describe_dropped(dataset, report)
    rows = walk(dataset, inspect_clip, args.num_workers, report)
    if not rows:
        return
    pictures = {row["thumbnail"].tobytes() for row in rows}
    print(f"pictures: {len(pictures)} distinct pictures among the targets")
    print("sizes: " + tally(size_text(row["native"]) for row in rows))
    describe_cameras(report, rows, dataset.size)
    describe_motion(report, rows)
    describe_order(report, rows, args.frame_ids)
    if args.depth:
        describe_depth(report, rows)
    ours = {targets[row["index"]]: row["thumbnail"] for row in rows}
    for folder in args.against:
        report_same(report, ours, read_folder(folder, report), folder)
    describe_views(args, dataset, rows, report)


# ---------------------------------------------------------------------------------------------- describing labels

def describe_classes(dataset, rows: list[dict], part: str, report: Report) -> None:
    """Each class's share of the pixels, and codings that look wrong."""
    pixels = np.stack([row["pixels"] for row in rows])  # (images, 256)
    shares = 100 * pixels.sum(0) / pixels.sum()
    images = (pixels > 0).sum(0)
    for c, name in (*enumerate(dataset.classes), (IGNORE, "unlabelled")):
        if images[c]:
            print(f"  {name:20} {shares[c]:6.2f} % of the pixels, in {images[c]} images")
    absent = [name for c, name in enumerate(dataset.classes) if not images[c]]
    if absent:
        print(f"  absent: {', '.join(absent[:30])}")
    raw = sorted(set().union(*(row["raw"] for row in rows)))
    print(f"  ids in the files: {', '.join(map(str, raw))}")
    if shares[IGNORE] > 50:
        report.warn(f"{part}: {shares[IGNORE]:.0f} % of the pixels are unlabelled: are ids of another coding?")
    empty = (pixels[:, :IGNORE].sum(1) == 0).sum()
    if empty:
        report.warn(f"{part}: {empty} images are all unlabelled")
    repeated = len(rows) - len({row["map"] for row in rows})
    if repeated:
        report.warn(f"{part}: {repeated} images have the same label as another")
    agreement = np.median([row["edges"] for row in rows if "edges" in row] or [np.inf])
    print(f"  at edges of labels, images change {agreement:.1f} times as much as elsewhere")
    if agreement < 1.3:
        report.warn(f"{part}: labels hardly follow the images: do they belong together?")


def check_labels(args: argparse.Namespace, report: Report) -> None:
    args.train_size = None
    args.split_seed = 0
    args.leave_out = None
    pictures = {}
    shown = []
    for part in ("train", "val"):
        try:
            dataset = datasets.find_labelled(args, part)
        except InputError as error:
            report.broken(f"{part}: {error}")
            continue
        distinct = len({image for image, _ in dataset.pairs})
        print(f"{part}: {len(dataset)} images, {distinct} distinct, "
              f"{os.path.basename(dataset.pairs[0][0])} to {os.path.basename(dataset.pairs[-1][0])}")
        rows = walk(dataset, inspect_label, args.num_workers, report)
        if not rows:
            continue
        print("  sizes: " + tally(size_text(row["native"]) for row in rows))
        other = [row for row in rows if row["native"] != row["label"]]
        if other:
            print("  labels of other sizes: " + tally(size_text(row["label"]) for row in other))
        describe_classes(dataset, rows, part, report)
        pictures[part] = {dataset.pairs[row["index"]][0]: row["thumbnail"] for row in rows}
        shown += [(dataset, row["index"]) for row in spread(rows)]
    for folder in args.against:
        report_same(report, pictures.get("train"), read_folder(folder, report), folder)
    report_same(report, pictures.get("train"), pictures.get("val"), "the evaluation images")
    if shown and args.output:
        label_sheet(shown).save(args.output)
        print(f"{len(shown)} images -> {args.output}")


def main() -> int:
    args = parse_options()
    report = Report()
    check = check_labels if args.labels else check_clips
    check(args, report)
    broken = len(report.problems)
    print(f"broken: {broken}" if broken else f"everything can be read, {report.warnings} warnings")
    return 2 if broken else 0


if __name__ == "__main__":
    run_main(main)
