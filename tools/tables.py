"""The paper's tables from finished runs, beside the paper's numbers, with figures and a report page.

    python tools/tables.py --log_dir runs/kitti --figures --page
    python tools/tables.py --log_dir runs/real --figures          # the claim: intervals, contrasts, Holm

Prints the tables that have at least one run; writes tables.md, tables.csv (a line per run) and, for the claim,
claim.csv (a line per row) into --log_dir.
"""

import argparse
import csv
import fnmatch
import importlib.util
import io
import os
import re
import sys
from dataclasses import dataclass

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tools import report
from tools.claim import claim_tables
from tools.runs import (
    Cell,
    FinishedRun,
    Table,
    by_stem,
    group_runs,
    is_named,
    label_of,
    mean_deviation,
    mean_of,
    pretraining_label,
    read_runs,
    shared_facts,
)
from utils import Parser, run_main, write_atomically

# The paper's tables. A column is a name and a pattern of the names that run_all.sh gives its runs; {} stands for the
# row's pre-training, and "train:" for the scores on the training images. A cell is the paper's mIoU / pixel accuracy.
PAPER = """
[core] What each pre-training is worth: the same video and labels for all
= all layers trained: seg_{}_efficientnet_lite0_unet_all_n16
= encoder frozen: seg_{}_efficientnet_lite0_unet_frozen_n16
none                  None
calibrated            None, calibrated
flow-encoder          Flow, encoder only
reconstruction        Reconstruction
depthrand             Depth-Rand
depthrand-encoder     Depth-Rand, encoder only

[table1] Table 1: KITTI, 16 training images
= ResNet18: seg_{}_resnet18_unet_all_n16
= ResNet50: seg_{}_resnet50_unet_all_n16
= DeepLabV3: seg_{}_resnet50_deeplabv3_all_n16
= ResNet18, frozen: seg_{}_resnet18_unet_frozen_n16
= ResNet50, frozen: seg_{}_resnet50_unet_frozen_n16
none              None              41.35/70.75  44.66/73.37  21.93/52.32  41.24/70.52
calibrated        None, calibrated
imagenet          ImageNet          45.15/72.39  44.65/73.06  43.39/72.66  33.33/65.34
depthrand         Depth-Rand        46.00/72.43  49.90/76.28  43.43/71.34  43.02/72.38
depth             Depth             50.20/76.39  50.92/77.34  43.77/72.68  46.53/74.42  46.55/74.48

[table2] Table 2: forms of depth supervision, from random weights
= ResNet18: seg_{}_resnet18_unet_all_n16
none              None              41.35/70.75
imagenet          ImageNet          45.15/72.39
mono              Monocular video
stereo            Stereo
lidar             LiDAR

[table3] Table 3: the encoder alone
= ResNet18: seg_{}_resnet18_unet_all_n16
= ResNet50: seg_{}_resnet50_unet_all_n16
none               None                      41.35/70.75  44.66/73.37
imagenet           ImageNet                  45.15/72.39  44.65/73.06
depthrand-encoder  Depth-Rand, encoder only
depth-encoder      Depth, encoder only       46.69/75.04  46.99/73.57

[table3] Table 3: ViT-L, by the encoder's learning rate (decoder 1e-4)
= 5e-9: seg_{}_vit_l16_dpt_all_n16_lr5e-9
= 5e-8: seg_{}_vit_l16_dpt_all_n16_lr5e-8
= 5e-7: seg_{}_vit_l16_dpt_all_n16_lr5e-7
= 5e-6: seg_{}_vit_l16_dpt_all_n16_lr5e-6
= best: best
vit                ImageNet                  -  57.53/81.48
dpt                Depth, encoder only       -  58.12/81.94

[table4] Table 4: other pre-trainings, ResNet50
= ResNet50: seg_{}_resnet50_unet_all_n16
none                    None                             44.66/73.37
imagenet                ImageNet                         44.65/73.06
coco                    Supervised segmentation          51.28/74.88
depthrand               Depth-Rand                       49.90/76.28
depth                   Depth                            50.92/77.34
reconstruction          Reconstruction
reconstruction-encoder  Reconstruction, encoder only
release-encoder         Reconstruction as released       47.18/74.16
dino                    DINO                             44.19/71.36
flow-encoder            Flow, encoder only
flowimagenet-encoder    Flow from ImageNet, as released  42.72/71.80
moco                    MoCo v2                          37.04/65.91

[table5] Table 5: Cityscapes, DeepLabV3 (controlled: 20,000 steps, ours; the paper gives no rate for None)
= full, training: train:cityscapes_seg_{}_resnet50_deeplabv3_all_nall_full
= full, validation: cityscapes_seg_{}_resnet50_deeplabv3_all_nall_full
= controlled, training: train:cityscapes_seg_{}_resnet50_deeplabv3_all_nall_controlled
= controlled, validation: cityscapes_seg_{}_resnet50_deeplabv3_all_nall_controlled
none           None                   76.10/95.41  63.97/93.76  73.82/95.26  60.43/93.07
imagenet       ImageNet               81.84/96.46  70.41/95.75  76.70/95.71  61.80/93.40
imagenet-fast  ImageNet at 0.1, ours
depth          Depth                  83.46/96.80  73.17/95.24  77.42/95.82  62.57/93.46
cropped        Depth-cropped          86.80/97.41  72.22/95.01  79.90/96.24  65.09/94.00

[table6] Table 6: other domains (the brackets have Mask2Former's decoder, ours DPT's)
= ADE20k: ade20k_seg_{}_vit_l1?_dpt_all_nall
= ADE20k, linear: ade20k_seg_{}_vit_l1?_linear_frozen_nall
= VOC: voc_seg_{}_vit_l1?_dpt_all_nall
= VOC, linear: voc_seg_{}_vit_l1?_linear_frozen_nall
= Cityscapes: cityscapes_seg_{}_vit_l1?_dpt_all_nall
= Cityscapes, linear: cityscapes_seg_{}_vit_l1?_linear_frozen_nall
mae            MAE               53.6/-  49.0/-  -       67.6/-  -       58.4/-
dinov2         DINOv2            58.1/-  47.7/-  86.5/-  86.3/-  82.7/-  71.3/-
depthanything  Depth Anything    59.7/-  52.3/-  87.7/-  87.3/-  84.8/-  74.8/-

[fig3] Figure 3: number of training images, ResNet18
= 8 images: seg_{}_resnet18_unet_all_n8
= 16 images: seg_{}_resnet18_unet_all_n16
= 32 images: seg_{}_resnet18_unet_all_n32
= 64 images: seg_{}_resnet18_unet_all_n64
= 128 images: seg_{}_resnet18_unet_all_n128
none              None              -  41.35/70.75
imagenet          ImageNet          -  45.15/72.39
depthrand         Depth-Rand        -  46.00/72.43
depth             Depth             -  50.20/76.39

[fig4] Figure 4: frozen ResNet18, by learning rate
= 1e-5: seg_{}_resnet18_unet_frozen_n16_lr1e-5
= as in Table 1: seg_{}_resnet18_unet_frozen_n16
= 1e-3: seg_{}_resnet18_unet_frozen_n16_lr1e-3
= 1e-2: seg_{}_resnet18_unet_frozen_n16_lr1e-2
= best: best
none              None              -  -  -  -  41.24/70.52
calibrated        None, calibrated
imagenet          ImageNet          -  -  -  -  33.33/65.34
depthrand         Depth-Rand        -  -  -  -  43.02/72.38
depth             Depth             -  -  -  -  46.53/74.42

[fig4] Figure 4: frozen ResNet50, by learning rate
= 1e-5: seg_{}_resnet50_unet_frozen_n16_lr1e-5
= as in Table 1: seg_{}_resnet50_unet_frozen_n16
= 1e-3: seg_{}_resnet50_unet_frozen_n16_lr1e-3
= 1e-2: seg_{}_resnet50_unet_frozen_n16_lr1e-2
= best: best
none              None
calibrated        None, calibrated
imagenet          ImageNet
depthrand         Depth-Rand
depth             Depth             -  -  -  -  46.55/74.48

[fig5] Figure 5: pre-trained at one size, fine-tuned at another, ResNet18 (small to large diverges in the paper)
= small images: seg_{}_resnet18_unet_all_n16
= large images: seg_{}_resnet18_unet_all_n16_large
imagenet      ImageNet              45.15/72.39
depth         Depth on small images 50.20/76.39
large         Depth on large images 48.54/-

[fig7] Figure 7: depth and flow, ResNet18
= all: seg_{}_resnet18_unet_all_n16
= frozen: seg_{}_resnet18_unet_frozen_n16
none                  None                             41.35/-  41.24/-
calibrated            None, calibrated
flow-encoder          Flow, encoder only
flowimagenet-encoder  Flow from ImageNet, as released  38.47/-  32.19/-
depthrand             Depth-Rand                       46.00/-  43.02/-
depth                 Depth                            50.20/-  46.53/-

[fig8] Figure 8: NYU-v2
= ResNet18: nyu_seg_{}_resnet18_unet_all_nall
= ResNet50: nyu_seg_{}_resnet50_unet_all_nall
none              None
imagenet          ImageNet
depth             Depth

[release] What the release does otherwise, ResNet18
= as in the paper: seg_{}_resnet18_unet_all_n16
= normalised twice: seg_{}_resnet18_unet_all_n16_twice
= frozen: seg_{}_resnet18_unet_frozen_n16
= only batch norm frozen: seg_{}_resnet18_unet_all_n16_batchnorm
none              None
calibrated        None, calibrated
imagenet          ImageNet
depthrand         Depth-Rand
parity            Depth-Rand, Monodepth2's start and border
"""


@dataclass
class Layout:
    """A table of the paper: column patterns by name, and rows of (pre-training, label, cells)."""

    key: str
    title: str
    columns: dict[str, str]
    rows: list[tuple[str, str, list[str]]]


def read_layouts(text: str) -> list[Layout]:
    """Parses PAPER."""
    layouts = []
    for block in text.strip().split("\n\n"):
        first, *lines = block.splitlines()
        key, title = re.fullmatch(r"\[(\w+)\] (.+)", first).groups()
        columns = dict(line[2:].split(": ", 1) for line in lines if line.startswith("= "))
        rows = []
        for line in lines[len(columns) :]:
            init, label, *cells = re.split(r"  +", line)
            cells += ["-"] * (len(columns) - len(cells))
            rows.append((init, label, cells))
        layouts.append(Layout(key, title, columns, rows))
    return layouts


def find_cell(stems: dict[str, list[FinishedRun]], pattern: str, init: str) -> Cell:
    """The runs of a cell. "train:" takes the scores on the training images."""
    name = pattern.removeprefix("train:").replace("{}", init)
    cell = {}
    for stem in fnmatch.filter(stems, name):
        for run in stems[stem]:
            if not pattern.startswith("train:"):
                cell[run.seed] = run
            elif run.train:
                cell[run.seed] = FinishedRun(run.name, run.options, run.train)
    return cell


def find_cells(layout: Layout, runs: list[FinishedRun]) -> dict[tuple[str, str], Cell]:
    """The runs of each (column, pre-training); a column "best" repeats the best of the others."""
    stems = by_stem(runs)
    cells = {}
    for init, _, _ in layout.rows:
        for column, pattern in layout.columns.items():
            if pattern == "best":
                found = [cells[other, init] for other in layout.columns if (other, init) in cells]
                cells[column, init] = max(found, key=lambda cell: (len(cell), mean_of(cell)))
            else:
                cells[column, init] = find_cell(stems, pattern, init)
    return cells


def gain(cell: Cell, baseline: Cell) -> str:
    """Mean difference in mIoU over the seeds that both have."""
    shared = cell.keys() & baseline.keys()
    if cell is baseline or not shared:
        return ""
    differences = [cell[seed].result["miou"] - baseline[seed].result["miou"] for seed in shared]
    return f"{np.mean(differences):+.1f}"


def with_paper(text: str, paper: str) -> str:
    return text if paper == "-" else f"{text} [{paper}]"


def paper_table(layout: Layout, runs: list[FinishedRun], gaps: bool) -> Table | None:
    """Our scores with the paper's in brackets; None without a run, unless gaps are asked for."""
    cells = find_cells(layout, runs)
    members = [run for cell in cells.values() for run in cell.values()]
    if not members and not gaps:
        return None
    has_paper = any(set(papers) != {"-"} for _, _, papers in layout.rows)
    on_kitti = all(run.options["data"] in ("kitti", "synthetic") for run in members)
    released = has_paper and on_kitti and any("release_miou" in run.result for run in members)
    rows = []
    for place, (column, pattern) in enumerate(layout.columns.items()):
        frozen = is_frozen(layout, pattern)
        baseline = cells.get((column, "calibrated" if frozen else "none"), {})
        for init, label, papers in layout.rows:
            cell = cells[column, init]
            is_job = frozen or init != "calibrated"
            if cell or (gaps and is_job):
                scores = scores_of(cell, papers[place], released)
                rows.append([column, label, str(len(cell)), *scores, gain(cell, baseline)])
    bracket = " [paper]" if has_paper else ""
    header = [
        " ",
        "pre-training",
        "seeds",
        f"mIoU %{bracket}",
        f"P.Acc %{bracket}",
        "mIoU against None",
    ]
    if released:
        header[3:4] = ["mIoU %", f"release's score %{bracket}"]
    if not any(row[-1] for row in rows):  # nothing to compare with
        header, *rows = [row[:-1] for row in (header, *rows)]
    table = Table(layout.title, header, rows, table_notes(layout, members, runs, released))
    if layout.key == "table1":
        table.below = claims(cells)
    return table


def is_frozen(layout: Layout, pattern: str) -> bool:
    """Whether a column is of frozen encoders; "best" is what the columns before it are."""
    if pattern == "best":
        pattern = next(iter(layout.columns.values()))
    return "frozen" in pattern


def scores_of(cell: Cell, paper: str, released: bool) -> list[str]:
    """mIoU, the release's score where there is one, and pixel accuracy, beside the paper's."""
    miou, accuracy = (paper.split("/") + ["-"])[:2]
    ours = mean_deviation(cell, "miou")
    scores = [with_paper(ours, miou)]
    if released:
        scores = [ours, with_paper(mean_deviation(cell, "release_miou"), miou)]
    return [*scores, with_paper(mean_deviation(cell, "pixel_accuracy"), accuracy)]


def table_notes(
    layout: Layout, members: list[FinishedRun], runs: list[FinishedRun], released: bool
) -> list[str]:
    """The options once for all, and which score is which."""
    notes = [shared_facts(members, runs)] if members else []
    if released:
        notes.append(
            "mIoU: 19 classes, from one confusion matrix of all images. Release's score: 7 classes, "
            "mean over images; the paper's mIoU in brackets is of that kind."
        )
    if any("frozen" in pattern for pattern in layout.columns.values()):
        notes.append(
            "Against None: mean difference over shared seeds; frozen rows against None, calibrated."
        )
    if layout.key != "core" and any(run.options["data"] == "synthetic" for run in members):
        notes.append("These runs are on the synthetic street, the paper's numbers on its own data.")
    return notes


def claims(cells: dict[tuple[str, str], Cell]) -> list[str]:
    """Two claims of the text, computed from Table 1's cells."""
    best = difference(cells["ResNet50", "depth"], cells["DeepLabV3", "imagenet"])
    common = "Best practice (Depth, ResNet50) against common practice (ImageNet, DeepLabV3)"
    lines = [claim_line(common, best, "+7.53 / +4.68")]
    columns = [column for column, init in cells if init == "depth"]
    each = {
        column: difference(cells[column, "depth"], cells[column, "imagenet"]) for column in columns
    }
    each = {column: values for column, values in each.items() if not np.isnan(values[0])}
    if each:
        mean = np.mean(list(each.values()), 0)
        name = f"Depth against ImageNet, mean of {', '.join(each)}"
        paper = "+5.8 / +5.2; the paper's own cells give +6.2 / +4.3"
        lines.append(claim_line(name, mean, paper))
    return [line for line in lines if line]


def difference(left: Cell, right: Cell) -> np.ndarray:
    """Of the means of mIoU, the release's score and pixel accuracy over the seeds that both have."""
    shared = left.keys() & right.keys()
    left = {seed: left[seed] for seed in shared}
    right = {seed: right[seed] for seed in shared}
    keys = ("miou", "release_miou", "pixel_accuracy")
    return np.array([mean_of(left, key) - mean_of(right, key) for key in keys])


def claim_line(name: str, values: np.ndarray, paper: str) -> str:
    miou, release, accuracy = values
    if np.isnan(miou):
        return ""
    released = "" if np.isnan(release) else f" (release's score {release:+.2f})"
    return f"{name}: mIoU {miou:+.2f}{released}, P.Acc {accuracy:+.2f} [{paper}]."


def steps_table(runs: list[FinishedRun]) -> Table | None:
    """Figure 2 in numbers: steps to the final mIoU of ImageNet's run of the same seed, and where each curve ends."""
    stems = by_stem(runs)
    papers = {"imagenet": "15000-20000", "depth": "5000"}
    rows = []
    for encoder in ("resnet18", "resnet50"):
        pattern = f"seg_{{}}_{encoder}_unet_all_n16"
        goals = {
            seed: run.result["miou"] for seed, run in find_cell(stems, pattern, "imagenet").items()
        }
        for init in ("none", "imagenet", "depthrand", "depth"):
            cell = find_cell(stems, pattern, init)
            compared = [run for seed, run in cell.items() if seed in goals]
            if not compared:
                continue
            reached = [first_step(run, goals[run.seed]) for run in compared]
            steps = [step for step in reached if step is not None]
            text = f"{np.mean(steps):.0f}" if steps else "–"
            losses = [run.points("loss")[-1][1] for run in compared if run.points("loss")]
            rows.append(
                [
                    encoder,
                    pretraining_label(init),
                    str(len(compared)),
                    with_paper(text, papers.get(init, "-")),
                    str(len(reached) - len(steps)),
                    f"{np.mean(losses):.3f}" if losses else "–",
                    mean_deviation(cell, "miou"),
                    mean_deviation(cell, "pixel_accuracy"),
                ]
            )
    if not rows:
        return None
    header = [
        " ",
        "pre-training",
        "seeds",
        "steps to ImageNet's final mIoU [paper]",
        "never there",
        "last loss",
        "mIoU %",
        "P.Acc %",
    ]
    return Table("Figure 2: how fast each start learns", header, rows)


def first_step(run: FinishedRun, goal: float) -> int | None:
    return next((step for step, miou in run.points("miou") if miou >= goal), None)


def other_runs(runs: list[FinishedRun]) -> Table | None:
    """Fine-tunings whose names are none of run_all.sh's, grouped by their options."""
    others = [run for run in runs if run.segments and not is_named(run.name)]
    rows = []
    for setting, groups in sorted(group_runs(others).items()):
        for label, members in sorted(groups.items()):
            cell = {run.name: run for run in members}
            rows.append(
                [
                    setting,
                    label,
                    str(len(cell)),
                    mean_deviation(cell, "miou"),
                    mean_deviation(cell, "pixel_accuracy"),
                ]
            )
    if not rows:
        return None
    return Table("Other runs", [" ", "pre-training", "runs", "mIoU %", "P.Acc %"], rows)


LAYOUTS = read_layouts(PAPER)


# ---------------------------------------------------------------------------------------------- command

NAMES = list(dict.fromkeys(layout.key for layout in LAYOUTS)) + ["fig2", "real", "other"]
WITHOUT_TABLE = ["fig6"]  # a picture of run_all.sh


def make_tables(runs: list[FinishedRun], names: list[str], log_dir: str, gaps: bool) -> list[Table]:
    """The named tables that have a run, in the paper's order; with gaps also those that have none."""
    tables = []
    for layout in LAYOUTS:
        if layout.key in names:
            tables.append(paper_table(layout, runs, gaps))
    if "fig2" in names:
        tables.append(steps_table(runs))
    if "real" in names:
        tables += claim_tables(runs, log_dir)
    if "other" in names:
        tables.append(other_runs(runs))
    return [table for table in tables if table is not None]


def write_runs(runs: list[FinishedRun], path: str) -> None:
    """tables.csv: one line per fine-tuning."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    scores = ("miou", "release_miou", "pixel_accuracy", "cross_entropy")
    writer.writerow(["name", "pretraining", "seed", *scores])
    for run in runs:
        if run.segments:
            values = [run.result.get(key, "") for key in scores]
            writer.writerow([run.name, label_of(run), run.seed, *values])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log_dir", default="runs", help="folder of run folders")
    parser.add_argument(
        "--tables",
        nargs="+",
        metavar="NAME",
        default=NAMES,
        choices=NAMES + WITHOUT_TABLE,
        help=f"only these of {', '.join(NAMES)}; {', '.join(WITHOUT_TABLE)} has no table",
    )
    parser.add_argument("--all", action="store_true", help="show missing rows and tables as well")
    parser.add_argument(
        "--figures",
        action="store_true",
        help="draw curves, sizes and the claim as PNG (needs matplotlib)",
    )
    parser.add_argument(
        "--page",
        action="store_true",
        help="write index.html, with figures where matplotlib is installed",
    )
    return parser.parse_args(argv)


def main() -> int:
    args = parse_options()
    runs = read_runs(args.log_dir)
    tables = make_tables(runs, args.tables, args.log_dir, args.all)
    text = "\n\n\n".join(table.text() for table in tables)
    print(text)
    if tables:
        path = os.path.join(args.log_dir, "tables.md")
        write_atomically(path, lambda file: file.write(f"{text}\n".encode()))
    write_runs(runs, os.path.join(args.log_dir, "tables.csv"))
    draws = args.page and importlib.util.find_spec("matplotlib") is not None
    if args.figures or draws:
        report.draw_figures(runs, args.log_dir)
    print()
    for name in report.find_pictures(args.log_dir):
        print(f"picture: {os.path.join(args.log_dir, name)}")
    if args.page:
        print(f"report page: {report.write_page(runs, tables, args.log_dir)}")
    return 0


if __name__ == "__main__":
    run_main(main)
