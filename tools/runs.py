"""Finished runs as tools/tables.py reads them, and tables as text and HTML.

from tools.runs import read_runs
means = {run.name: run.result["miou"] for run in read_runs("runs/kitti") if run.segments}
"""

import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np

import train_seg
from utils import MAY_CHANGE, InputError

# Options without which a run has no place in a table.
NEEDED = {"data", "encoder", "height", "width", "steps", "batch_size", "learning_rate", "seed"}
NEEDED_OF_TUNING = {"init", "train_size", "freeze_encoder"}
# Options in which the runs of one row may differ: seeds, what follows from them, and what leaves
# the result as it is. Data in another place may be other data.
FREE = {"name", "seed", "split_seed", "data_files", "pretraining", *MAY_CHANGE} - {"data_path"}
DEFAULTS = vars(train_seg.parse_options([]))  # of options that an older run does not have
RELEASE_OPTIONS = ("normalize_twice", "freeze_batch_norm_only")
PRETRAININGS = {  # how run_all.sh calls them in names of runs, in the order of tables
    "none": "None",
    "calibrated": "None, calibrated",
    "imagenet": "ImageNet",
    "flow": "Flow",
    "flowimagenet": "Flow from ImageNet",
    "reconstruction": "Reconstruction",
    "release": "Reconstruction as released",
    "shuffled": "LiDAR shuffled",
    "lidar": "LiDAR",
    "mono": "Monocular video",
    "stereo": "Stereo",
    "depthrand": "Depth-Rand",
    "depth": "Depth",
}


@dataclass
class FinishedRun:
    """A finished run folder. `train` and `depth` are what evaluate.py wrote into it, or empty."""

    name: str
    options: dict
    result: dict
    curve: list[dict] = field(default_factory=list)  # of log.jsonl
    train: dict = field(default_factory=dict)
    depth: dict = field(default_factory=dict)

    @property
    def stem(self) -> str:
        return re.sub(r"_seed\d+$", "", self.name)

    @property
    def seed(self) -> int:
        return self.options["seed"]

    @property
    def segments(self) -> bool:
        return self.result.get("miou") is not None

    def points(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of what was logged under a key."""
        return [
            (record["step"], record[key]) for record in self.curve if record.get(key) is not None
        ]


Cell = dict[int, FinishedRun]  # the runs of one experiment, by seed


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def read_runs(log_dir: str) -> list[FinishedRun]:
    """Every finished run directly below a folder. Says which are damaged, and leaves them out.

    Raises InputError where no run is left.
    """
    runs = []
    damaged = []
    for path in sorted(Path(log_dir).glob("*/result.json")):
        try:
            runs.append(read_run(path.parent))
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged.append(f"{path.parent}: args.json, result.json or log.jsonl is damaged")
    if not runs:
        raise InputError(damaged[0] if damaged else f"{log_dir}: no finished run there yet")
    for reason in damaged:
        print(f"left out: {reason}", file=sys.stderr)
    return runs


def read_run(folder: Path) -> FinishedRun:
    """A finished run; raises one of Python's errors where a file of it is damaged."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    run = FinishedRun(
        folder.name,
        read_json(folder / "args.json")["options"],
        read_json(folder / "result.json"),
        [json.loads(line) for line in lines],
        read_json(folder / "train" / "segmentation.json"),
        read_json(folder / "depth.json"),
    )
    needed = NEEDED | NEEDED_OF_TUNING if run.segments else NEEDED
    named = "pretraining" in run.result or not run.segments
    if not named or needed - run.options.keys():
        raise KeyError(folder.name)
    return run


def by_stem(runs: list[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Fine-tunings by their names without the seed."""
    stems = {}
    for run in runs:
        if run.segments:
            stems.setdefault(run.stem, []).append(run)
    return stems


def network_of(run: FinishedRun) -> str:
    return f"{run.options['encoder']} {run.options.get('arch', 'unet')}"


def size_of(run: FinishedRun) -> str:
    return f"{run.options['width']}x{run.options['height']}"


def schedule_of(run: FinishedRun) -> str:
    options = run.options
    return (
        f"{options['steps']} steps of batch {options['batch_size']} at {options['learning_rate']:g}"
    )


def shared_facts(runs: list[FinishedRun], everything: list[FinishedRun]) -> str:
    """What all runs of a table have in common, in one line."""
    wanted = {os.path.basename(run.options.get("init", "")) for run in runs}
    sources = [run for run in everything if run.name in wanted]
    facts = [
        ("", {f"data {run.options['data']}" for run in runs}),
        ("", {network_of(run) for run in runs}),
        ("", {size_of(run) for run in runs}),
        ("", {schedule_of(run) for run in runs}),
        (
            "scored on ",
            {f"{run.result['images']} images" for run in runs if "images" in run.result},
        ),
        ("pre-trained for ", {f"{schedule_of(run)}, {size_of(run)}" for run in sources}),
    ]
    return "; ".join(what + min(values) for what, values in facts if len(values) == 1)


def pretraining_label(init: str) -> str:
    """What tables call a pre-training that run_all.sh calls `init`."""
    kind = init.removesuffix("-encoder")
    return PRETRAININGS.get(kind, kind) + (", encoder only" if kind != init else "")


def is_named(name: str) -> bool:
    """Whether run_all.sh gives runs such names; those that train_seg.py chooses tell the split, too."""
    named = re.fullmatch(r"(\w+_)?seg_.+_(all|frozen)_n(\d+|all)(_.+)?_seed\d+", name)
    return named is not None and not re.search(r"_split\d+_seed\d+$", name)


def tuning_of(run: FinishedRun) -> str:
    """What is trained, and what is done as the authors' release does it."""
    tuned = ["frozen" if run.options["freeze_encoder"] else "all"]
    return ", ".join(tuned + [flag for flag in RELEASE_OPTIONS if run.options.get(flag)])


def setting_of(run: FinishedRun) -> str:
    """What a panel of curves or a group of other runs has in common."""
    images = f"{run.options['train_size'] or 'all'} images"
    facts = [run.options["data"], network_of(run), tuning_of(run), images, size_of(run)]
    return ", ".join([*facts, schedule_of(run)])


def label_of(run: FinishedRun) -> str:
    """The row's name where run_all.sh named the run, else what result.json says of the pre-training."""
    named = re.match(r"(?:\w+_)?seg_([^_]+)_", run.name)
    if named and is_named(run.name):
        return pretraining_label(named[1])
    encoder_only = run.options.get("init_parts") == "encoder" and run.options["init"] not in (
        "none",
        "imagenet",
    )
    return run.result["pretraining"] + (", encoder only" if encoder_only else "")


def settings_of(run: FinishedRun, free: tuple[str, ...] = ()) -> dict:
    """The options that decide a score, but for seeds and the free ones."""
    options = {**DEFAULTS, **run.options}
    options["init"] = re.sub(r"_seed\d+", "", options["init"])  # each seed may have its own
    return {key: options[key] for key in options.keys() - FREE - set(free)}


def differences(settings: dict, others: list[dict]) -> list[str]:
    """The settings in which some of the others differ, as "optimizer sgd"."""
    differing = []
    for key, value in sorted(settings.items()):
        if any(other.get(key, value) != value for other in others):
            differing.append(f"{key} {value}")
    return differing


def group_runs(
    runs: list[FinishedRun],
    panel: Callable[[FinishedRun], str] = setting_of,
    free: tuple[str, ...] = (),
) -> dict[str, dict[str, list[FinishedRun]]]:
    """Fine-tunings by panel, then by label. Runs under one label differ in seeds and `free` alone.

    Of those that would look alike, the label names the options in which they differ.
    """
    alike = {}
    for run in runs:
        alike.setdefault((panel(run), label_of(run)), []).append(run)
    groups = {}
    for (title, label), members in alike.items():
        every = [settings_of(run, free) for run in members]
        for run, settings in zip(members, every):
            name = ", ".join([label, *differences(settings, every)])
            groups.setdefault(title, {}).setdefault(name, []).append(run)
    return groups


def mean_of(cell: Cell, key: str = "miou") -> float:
    return (
        float(np.mean([run.result.get(key, math.nan) for run in cell.values()]))
        if cell
        else math.nan
    )


def mean_deviation(cell: Cell, key: str) -> str:
    """Mean ± deviation over seeds, "–" without a run."""
    values = [run.result[key] for run in cell.values() if run.result.get(key) is not None]
    if not values:
        return "–"
    spread = f" ± {deviation(values):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def deviation(values: list[float]) -> float:
    """The sample's standard deviation, 0 of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


# ---------------------------------------------------------------------------------------------- tables


@dataclass
class Table:
    """Rows of text; the first cell is the row's group. `notes` stand above, `below` under it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    below: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Markdown that is aligned for a terminal, too."""
        rows = []
        group = None
        for first, *others in self.rows:
            rows.append(["" if first == group else first, *others])
            group = first
        widths = [max(map(len, column)) for column in zip(self.header, *rows)]
        lines = [f"## {self.title}", ""]
        for note in self.notes:
            lines += [note, ""]
        for row in (self.header, ["-" * width for width in widths], *rows):
            cells = [cell.ljust(width) for cell, width in zip(row, widths)]
            lines.append(f"| {' | '.join(cells)} |")
        for note in self.below:
            lines += ["", note]
        return "\n".join(lines)

    def html(self) -> str:
        """Groups become heading rows; on a narrow screen each row is a block (see PAGE)."""
        parts = [f"<h2>{escape(self.title)}</h2>"]
        parts += [f"<p>{escape(note)}</p>" for note in self.notes]
        parts.append("<table><thead><tr>")
        parts += [f"<th>{escape(name)}</th>" for name in self.header[1:]]
        parts.append("</tr></thead>")
        group = None
        for row in self.rows:
            if row[0] != group:
                group = row[0]
                parts.append(
                    f'<tr><th class="group" colspan="{len(row) - 1}">{escape(group)}</th></tr>'
                )
            parts.append("<tr>")
            for name, cell in zip(self.header[1:], row[1:]):
                parts.append(f'<td data-name="{escape(name)}">{escape(cell)}</td>')
            parts.append("</tr>")
        parts.append("</table>")
        parts += [f"<p>{escape(note)}</p>" for note in self.below]
        return "".join(parts)
