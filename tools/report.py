"""What tools/tables.py draws of finished runs, and its page of tables, figures and pictures.

Not a command of its own: tools/tables.py --figures calls draw_figures (curves.png, sizes.png,
claim_*.png), and --page calls write_page (index.html).
"""

import json
import os
from html import escape
from pathlib import Path
from types import ModuleType
from urllib.parse import quote

import numpy as np

from tools.claim import Claim, estimate, score
from tools.runs import (
    FinishedRun,
    Table,
    deviation,
    group_runs,
    network_of,
    pretraining_label,
    size_of,
    tuning_of,
)
from utils import InputError, write_atomically

CURVES = {"loss": "training loss", "miou": "mIoU %", "pixel_accuracy": "pixel accuracy %"}
CAPTIONS = {  # of pictures that run_all.sh and --figures leave beside the runs
    "street.png": "The synthetic street: an image, its depth, its labels.",
    "core.png": "Test images, their labels, and what each pre-training leads to.",
    "curves.png": "While fine-tuning: mean over seeds, and the range as a band (Figures 2, 4 and 8).",
    "sizes.png": "mIoU over the number of training images: mean and deviation over seeds (Figure 3).",
    "claim_frozen.png": "The claim, frozen encoder: a point per seed, the bar is the mean and its 95 % interval.",
    "claim_all.png": "The claim, all layers trained: a point per seed, the bar is the mean and its 95 % interval.",
    "fig6.png": "What a shallow layer of each encoder reacts to, and its segmentation (Figure 6, Grad-CAM).",
    "fig7.png": "Flow and depth of the same video (Figure 7).",
}


# ---------------------------------------------------------------------------------------------- figures


def plotting() -> ModuleType:
    """matplotlib's pyplot, which only figures need; raises InputError without it."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rc("axes", titlesize=9)
    pyplot.rc("legend", fontsize=8)
    return pyplot


def draw_figures(runs: list[FinishedRun], log_dir: str) -> list[str]:
    """Draws what the runs are enough for. Returns the paths."""
    pyplot = plotting()
    figures = {}
    claim = Claim(runs)
    if claim.cells:
        for tuned in ("frozen", "all"):
            figures[f"claim_{tuned}.png"] = claim_figure(pyplot, claim, tuned)
    else:
        figures["curves.png"] = curves_figure(pyplot, runs)
        figures["sizes.png"] = sizes_figure(pyplot, runs)
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(os.path.join(log_dir, name))
            figure.savefig(paths[-1], dpi=120)
    pyplot.close("all")
    return paths


def lines_of(runs: list[FinishedRun]) -> dict[str, dict[str, list[FinishedRun]]]:
    """Fine-tunings with a curve by setting, then by pre-training and options."""
    return group_runs([run for run in runs if run.segments and run.points("miou")])


def curves_figure(pyplot: ModuleType, runs: list[FinishedRun]) -> object:
    """One row per setting: training loss, mIoU and pixel accuracy while fine-tuning."""
    panels = {title: lines for title, lines in lines_of(runs).items() if len(lines) > 1}
    if not panels:
        return None
    colours = {}  # the same in every row
    for lines in panels.values():
        for label in lines:
            colours.setdefault(label, f"C{len(colours) % 10}")
    figure, axes = pyplot.subplots(
        len(panels), 3, squeeze=False, layout="constrained", figsize=(13, 3.6 * len(panels))
    )
    for row, (title, lines) in zip(axes, panels.items()):
        for axis, (key, name) in zip(row, CURVES.items()):
            for label, members in lines.items():
                curves = [dict(run.points(key)) for run in members]
                draw_band(axis, curves, label, colours[label])
            axis.set(xlabel="step", ylabel=name)
        row[0].set_title(title, loc="left")
        row[2].legend()
    return figure


def draw_band(axis: object, curves: list[dict[int, float]], label: str, colour: str) -> None:
    """The mean of curves at the steps that all have, and their range."""
    steps = sorted(set.intersection(*map(set, curves)))
    if not steps:
        return
    values = np.array([[curve[step] for step in steps] for curve in curves])
    named = f"{label} ({len(curves)})"
    axis.plot(steps, values.mean(0), marker=".", label=named, color=colour)
    axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)


def sizes_figure(pyplot: ModuleType, runs: list[FinishedRun]) -> object:
    """One panel per setting: mIoU over the number of training images, where runs differ in it."""
    few = [run for run in runs if run.segments and run.options["train_size"]]
    panels = {}
    for title, lines in group_runs(few, setting_but_images, ("train_size", "batch_size")).items():
        panels[title] = {label: scores_by_images(members) for label, members in lines.items()}
    panels = {title: lines for title, lines in panels.items() if max(map(len, lines.values())) > 1}
    if not panels:
        return None
    figure, axes = pyplot.subplots(
        len(panels), 1, squeeze=False, layout="constrained", figsize=(8, 4.5 * len(panels))
    )
    for (axis,), (title, lines) in zip(axes, panels.items()):
        for label, points in lines.items():
            counts = sorted(points)
            means = [np.mean(points[count]) for count in counts]
            deviations = [deviation(points[count]) for count in counts]
            axis.errorbar(counts, means, deviations, label=label, capsize=3)
        ticks = sorted(set().union(*lines.values()))
        axis.set(xlabel="training images", ylabel="mIoU %", xscale="log")
        axis.set_xticks(ticks, [str(count) for count in ticks])
        axis.minorticks_off()
        axis.set_title(title, loc="left")
        axis.legend()
    return figure


def setting_but_images(run: FinishedRun) -> str:
    """What a panel of sizes has in common; the batch may be as small as the images are few."""
    rate = f"{run.options['steps']} steps at {run.options['learning_rate']:g}"
    facts = [run.options["data"], network_of(run), tuning_of(run), size_of(run), rate]
    return ", ".join(facts)


def scores_by_images(runs: list[FinishedRun]) -> dict[int, list[float]]:
    scores = {}
    for run in runs:
        scores.setdefault(run.options["train_size"], []).append(score(run))
    return scores


def claim_figure(pyplot: ModuleType, claim: Claim, tuned: str) -> object:
    """One row per network, one column per label set: every seed's mIoU, the mean and its 95 % interval."""
    inits = {network: union_of_inits(claim, network, tuned) for network in claim.networks}
    inits = {network: names for network, names in inits.items() if names}
    if not inits:
        return None
    columns = len(claim.label_sets)
    heights = [len(names) for names in inits.values()]
    figure, axes = pyplot.subplots(
        len(inits),
        columns,
        squeeze=False,
        layout="constrained",
        sharey="row",
        height_ratios=heights,
        figsize=(2.5 + 3.4 * columns, 1.2 + 0.32 * sum(heights)),
    )
    for row, (network, names) in zip(axes, inits.items()):
        for axis, labels in zip(row, claim.label_sets):
            for place, init in enumerate(names):
                scores = [score(run) for run in claim.cell(network, labels, tuned, init).values()]
                draw_seeds(axis, place, scores, colour_of(init))
            axis.set(title=f"{labels}, {network}", xlabel="mIoU %")
            axis.grid(axis="x", alpha=0.3)
        row[0].set_yticks(range(len(names)), [pretraining_label(init) for init in names])
        row[0].set_ylim(len(names) - 0.5, -0.5)  # the first on top
    how = (
        "Frozen encoder: only the decoder is trained"
        if tuned == "frozen"
        else "All layers are trained"
    )
    figure.suptitle(
        f"{how}, on few labels. A point is a seed, a bar the mean and its 95 % interval. "
        "Orange keeps the pre-trained decoder.",
        fontsize=10,
    )
    return figure


def draw_seeds(axis: object, place: int, scores: list[float], colour: str) -> None:
    if not scores:
        return
    value = estimate(scores)
    half = 0 if np.isnan(value.half) else value.half
    axis.errorbar(value.mean, place, xerr=half, fmt="|", markersize=12, capsize=4, color=colour)
    axis.plot(scores, [place] * len(scores), ".", color="black", alpha=0.5)


def colour_of(init: str) -> str:
    """Blue where the encoder alone is handed over, orange with its decoder, grey without geometry."""
    if init in ("none", "calibrated", "imagenet"):
        return "#666666"
    return "#0072b2" if init.endswith("-encoder") else "#d55e00"


def union_of_inits(claim: Claim, network: str, tuned: str) -> list[str]:
    """The pre-trainings of any label set, in the order of tables."""
    names = []
    for labels in claim.label_sets:
        names += [init for init in claim.inits(network, labels, tuned) if init not in names]
    return names


# ---------------------------------------------------------------------------------------------- the page

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
body {{ max-width: 70rem; margin: 0 auto; padding: 1rem }}
h1, h2, h3, summary {{ line-height: 1.2; overflow-wrap: anywhere }}
h2 {{ margin-top: 2.5rem }}
p {{ max-width: 50rem; overflow-wrap: anywhere }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem }}
th, td {{ padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #8884 }}
.group {{ padding-top: 1rem; font-size: 1rem }}
figure {{ margin: 1.5rem 0 }}
figcaption {{ opacity: .8 }}
img {{ display: block; max-width: 100%; height: auto }}
details {{ border-top: 1px solid #8884; padding: .4rem 0 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem }}
@media (max-width: 45rem) {{
  thead {{ display: none }}
  tr, th, td:first-child {{ display: block; border: 0; padding: 0 }}
  tr {{ border-bottom: 1px solid #8884; padding: .3rem 0 }}
  td {{ display: inline-block; border: 0; padding: 0 1rem 0 0 }}
  td:first-child {{ font-weight: 600 }}
  td:not(:first-child)::before {{ content: attr(data-name) ": "; opacity: .7 }}
  td:empty {{ display: none }}
}}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def find_pictures(log_dir: str) -> list[str]:
    """Names of the pictures beside the runs, those with a caption first."""
    found = {path.name for path in Path(log_dir).glob("*.png")}
    return [name for name in CAPTIONS if name in found] + sorted(found - CAPTIONS.keys())


def write_page(runs: list[FinishedRun], tables: list[Table], log_dir: str) -> str:
    """index.html: tables, pictures with captions, and each run with its samples. Returns its path."""
    folder = Path(log_dir)
    parts = [table.html() for table in tables]
    parts.append("<h2>Pictures</h2>")
    parts += [picture_html(name, CAPTIONS.get(name, name)) for name in find_pictures(log_dir)]
    parts.append(f"<h2>All {len(runs)} runs</h2>")
    parts += [run_html(run, folder) for run in runs]
    title = f"Depth pre-training for segmentation: {folder.resolve().name}"
    page = PAGE.format(title=escape(title), body="\n".join(parts))
    path = str(folder / "index.html")
    write_atomically(path, lambda file: file.write(page.encode()))
    return path


def picture_html(path: str, caption: str) -> str:
    link = quote(path)
    return (
        f'<figure><a href="{link}"><img src="{link}" loading="lazy" alt="{escape(caption)}"></a>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def run_html(run: FinishedRun, folder: Path) -> str:
    """A run's scores, its last samples and its options, folded."""
    numbers = [
        f"{key} {value:.4g}" for key, value in run.result.items() if isinstance(value, float)
    ]
    parts = [
        f"<details><summary>{escape(run.name)}</summary>",
        f"<p>{escape(' · '.join(numbers))}</p>",
    ]
    samples = sorted((folder / run.name / "samples").glob("*.png"))
    if samples:
        path = samples[-1].relative_to(folder).as_posix()
        columns = "image, label, prediction" if run.segments else "input and output"
        parts.append(
            picture_html(path, f"Training images at step {int(samples[-1].stem)}: {columns}.")
        )
    parts.append(f"<pre>{escape(json.dumps(run.options, indent=1))}</pre></details>")
    return "".join(parts)
