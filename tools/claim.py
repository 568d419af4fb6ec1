"""The claim, tested: does depth pre-training carry semantics? For tools/tables.py, from the runs of run_all.sh real.

    bash run_all.sh real
    python tools/tables.py --log_dir runs/real --figures

Fixed before the runs: three contrasts on the frozen encoder alone, each a paired difference over seeds (a seed is a
pre-training, a draw of training images and a fine-tuning), averaged over the label sets; Student's t, and Holm's
correction over the three. All else is described by 95 % intervals, not tested.
"""

import csv
import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tools.runs import PRETRAININGS, Cell, FinishedRun, Table, pretraining_label
from utils import write_atomically

NAME = re.compile(r"(kitti|camvid)_seg_([^_]+)_(\w+)_unet_(all|frozen)_n(\d+)_seed(\d+)")
NETWORK = "efficientnet_lite0"  # whose contrasts are tested; another network's are described
LABELS = {"kitti": "KITTI", "camvid": "CamVid"}
CONTRASTS = (  # a pre-training, and the others of which the best is compared with it
    ("lidar-encoder", ("shuffled-encoder",)),
    ("depthrand-encoder", ("flow-encoder", "calibrated")),
    ("depth-encoder", ("imagenet",)),
)


# ---------------------------------------------------------------------------------------------- statistics


def student_p(t: float, freedom: int) -> float:
    """Two-sided p value of Student's t for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan2(abs(t), math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1, 2):  # powers of the cosine up to freedom - 2
        total += term
        term *= cosine**2 * (k - 1) / k
    inside = math.sin(angle) * total
    if odd:
        inside = 2 / math.pi * (angle + inside)
    return max(1 - inside, 0.0)  # nan stays nan


def student_quantile(freedom: int, share: float = 0.95) -> float:
    """The t between whose negative and itself Student's distribution has this share, by bisection."""
    low = 0.0
    high = 1.0
    while student_p(high, freedom) > 1 - share:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if student_p(middle, freedom) > 1 - share:
            low = middle
        else:
            high = middle
    return high


@dataclass
class Estimate:
    """Mean of a value per seed, half its 95 % interval, and the p value of a mean of 0 (nan below two seeds)."""

    mean: float
    half: float
    p: float
    seeds: int

    def text(self, digits: int = 1, sign: str = "") -> str:
        """ "mean (low to high)"; sign "+" shows that of a difference."""
        if self.seeds == 0:
            return "–"
        mean = f"{self.mean:{sign}.{digits}f}"
        if math.isnan(self.half):
            return mean
        low = self.mean - self.half
        high = self.mean + self.half
        return f"{mean} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"


def estimate(values: Iterable[float]) -> Estimate:
    values = np.array(list(values), float)
    count = len(values)
    mean = float(values.mean()) if count else math.nan
    if count < 2:
        return Estimate(mean, math.nan, math.nan, count)
    error = float(values.std(ddof=1)) / math.sqrt(count)
    half = student_quantile(count - 1) * error
    if error == 0:
        return Estimate(mean, 0.0, float(mean == 0), count)
    return Estimate(mean, half, student_p(mean / error, count - 1), count)


def holm(values: list[float]) -> list[float]:
    """Holm's corrected p values; nan (a contrast not there yet) counts as a test and stays nan."""
    order = sorted(range(len(values)), key=lambda i: (math.isnan(values[i]), values[i]))
    corrected = [math.nan] * len(values)
    largest = 0.0
    for rank, i in enumerate(order):
        if not math.isnan(values[i]):
            largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
            corrected[i] = largest
    return corrected


# ---------------------------------------------------------------------------------------------- cells


class Claim:
    """The runs of the claim by network, label set, what is fine-tuned, and pre-training."""

    def __init__(self, runs: list[FinishedRun]):
        self.cells = {}
        # depth networks named as run_all.sh names them, scored beside a constant picture
        self.pretrainings = [
            run for run in runs if "_" in run.stem and "constant" in (run.depth or ())
        ]
        for run in runs:
            match = NAME.fullmatch(run.name)
            if match and run.segments:
                data, init, network, tuned, images, seed = match.groups()
                key = (network, f"{LABELS[data]}, {images} images", tuned, init)
                self.cells.setdefault(key, {})[int(seed)] = run
        self.networks = sorted(
            {key[0] for key in self.cells}, key=lambda name: (name != NETWORK, name)
        )
        self.label_sets = sorted(
            {key[1] for key in self.cells}, key=lambda name: (name[0] != "K", len(name), name)
        )

    def cell(self, network: str, labels: str, tuned: str, init: str) -> Cell:
        return self.cells.get((network, labels, tuned, init), {})

    def inits(self, network: str, labels: str, tuned: str) -> list[str]:
        """Pre-trainings with a run, in the order of tables."""
        found = [key[3] for key in self.cells if key[:3] == (network, labels, tuned)]
        return sorted(found, key=lambda init: (place_of(init.removesuffix("-encoder")), init))

    def differences(
        self, network: str, label_sets: list[str], left: str, right: str, tuned: str = "frozen"
    ) -> dict[int, float]:
        """left - right for each seed that has all label sets on both sides, averaged over these."""
        pairs = [
            (self.cell(network, labels, tuned, left), self.cell(network, labels, tuned, right))
            for labels in label_sets
        ]
        seeds = None
        for pair in pairs:
            shared = pair[0].keys() & pair[1].keys()
            seeds = shared if seeds is None else seeds & shared
        return {
            seed: float(np.mean([score(a[seed]) - score(b[seed]) for a, b in pairs]))
            for seed in sorted(seeds or ())
        }

    def best(self, network: str, inits: tuple[str, ...], tuned: str) -> str | None:
        """The pre-training with the highest mean over label sets, on the seeds that all have; None without any."""
        if len(inits) == 1:
            return inits[0]
        cells = {
            init: [self.cell(network, labels, tuned, init) for labels in self.label_sets]
            for init in inits
        }
        everything = [set(cell) for row in cells.values() for cell in row]
        shared = set.intersection(*everything)

        def mean(init: str) -> float:
            return float(np.mean([score(cell[seed]) for cell in cells[init] for seed in shared]))

        return max(inits, key=mean) if shared else None

    def contrast(
        self,
        network: str,
        label_sets: list[str],
        left: str,
        rights: tuple[str, ...],
        tuned: str = "frozen",
    ) -> tuple[str, Estimate]:
        """The name of left - the best of `rights`, and its estimate, of 0 seeds where runs are missing."""
        right = self.best(network, rights, tuned)
        if right is None:
            return "", estimate([])
        differences = self.differences(network, label_sets, left, right, tuned)
        return contrast_name(left, right, rights), estimate(differences.values())


def score(run: FinishedRun) -> float:
    return run.result["miou"]


def place_of(pretraining: str) -> int:
    """Its place in a table; a follow-up's own come last."""
    known = list(PRETRAININGS)
    return known.index(pretraining) if pretraining in known else len(known)


# ---------------------------------------------------------------------------------------------- tables


def claim_tables(runs: list[FinishedRun], folder: str | None = None) -> list[Table]:
    """The contrasts, the quality of depth, and every row; also as claim.csv where a folder is given."""
    claim = Claim(runs)
    if not claim.cells:
        return []
    tables = [contrast_table(claim), other_contrast_table(claim), depth_table(claim)]
    tables = [table for table in tables if table.rows]
    records = []
    for network in claim.networks:
        members = []
        for labels in claim.label_sets:
            for tuned in ("frozen", "all"):
                members += row_records(claim, network, labels, tuned)
        tables.append(full_table(network, members))
        records += members
    if folder is not None:
        write_csv(f"{folder}/claim.csv", records)
    return tables


def full_table(network: str, records: list[dict]) -> Table:
    rows = []
    for record in records:
        against = record["against_none"]
        rows.append(
            [
                f"{record['labels']}, {record['tuned']}",
                record["pretraining"],
                str(record["seeds"]),
                record["miou"].text(),
                against.text(sign="+") if against.seeds else "",
                f"{record['pixel_accuracy'].mean:.1f}",
            ]
        )
    header = [
        " ",
        "pre-training",
        "seeds",
        "mIoU % (95 % interval)",
        "against None (95 % interval)",
        "P.Acc %",
    ]
    note = "Against None: paired over seeds; frozen rows against None, calibrated. Described, not tested."
    return Table(f"Every row: {network}", header, rows, [note])


def contrast_table(claim: Claim) -> Table:
    """The three primary contrasts, tested for NETWORK over all label sets; below them, described, each label set's."""
    rows = []
    together = f"mean of {len(claim.label_sets)} label sets"
    for network in claim.networks:
        pooled = [claim.contrast(network, claim.label_sets, *sides) for sides in CONTRASTS]
        corrected = holm([value.p for _, value in pooled])
        for sides, (name, value), p in zip(CONTRASTS, pooled, corrected):
            tests = [p_text(value.p), p_text(p)] if network == NETWORK else ["", ""]
            rows.append([network, name, together, str(value.seeds), value.text(sign="+"), *tests])
            for labels in claim.label_sets:
                _, each = claim.contrast(network, [labels], *sides)
                rows.append([network, name, labels, str(each.seeds), each.text(sign="+"), "", ""])
    rows = [row for row in rows if row[3] != "0"]
    header = [
        " ",
        "contrast",
        "labels",
        "seeds",
        "difference in mIoU (95 % interval)",
        "p",
        "p, Holm",
    ]
    notes = [
        "Frozen encoder, decoder from random weights. Differences are paired over seeds; p of Student's t, "
        f"two-sided, corrected over the three contrasts of {NETWORK}. Rows without p are described, not tested."
    ]
    return Table("The claim: three contrasts fixed beforehand", header, rows, notes)


def other_contrast_table(claim: Claim) -> Table:
    """The contrasts where more is pre-trained or fine-tuned than the frozen encoder, described."""
    rows = []
    for network in claim.networks:
        for tuned, whole in (("all", False), ("frozen", True), ("all", True)):
            part = "whole network" if whole else "encoder only"
            for left, rights in CONTRASTS:
                left, *rights = (elsewhere(init, tuned, whole) for init in (left, *rights))
                name, value = claim.contrast(network, claim.label_sets, left, rights, tuned)
                rows.append(
                    [network, f"{tuned}, {part}", name, str(value.seeds), value.text(sign="+")]
                )
    rows = [row for row in rows if row[3] != "0"]
    header = [" ", "fine-tuned", "contrast", "seeds", "difference in mIoU (95 % interval)"]
    note = (
        f"Mean of {len(claim.label_sets)} label sets, paired over seeds; described, not tested. Whole network: "
        "the decoder is pre-trained, too (flow's takes two frames and is not)."
    )
    return Table("The same contrasts elsewhere", header, rows, [note])


def elsewhere(init: str, tuned: str, whole: bool) -> str:
    """What takes the place of a pre-training of CONTRASTS."""
    if init == "calibrated" and tuned == "all":
        return "none"
    return init.removesuffix("-encoder") if whole and init != "flow-encoder" else init


def contrast_name(left: str, right: str, rights: tuple[str, ...]) -> str:
    names = [pretraining_label(init.removesuffix("-encoder")) for init in (left, right)]
    return " - ".join(names) + (" (the best baseline)" if len(rights) > 1 else "")


def p_text(p: float) -> str:
    if math.isnan(p):
        return "–"
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def depth_table(claim: Claim) -> Table:
    """How well each depth pre-training predicts depth, beside a constant picture."""
    groups = {}
    for run in claim.pretrainings:
        kind, network = run.stem.split("_", 1)
        groups.setdefault((network, kind), []).append(run)
    rows = []
    for (network, kind), members in sorted(
        groups.items(), key=lambda item: (item[0][0], place_of(item[0][1]))
    ):
        ours = estimate([run.depth["abs_rel"] for run in members])
        constant = np.mean([run.depth["constant"]["abs_rel"] for run in members])
        rows.append(
            [
                network,
                pretraining_label(kind),
                str(len(members)),
                ours.text(digits=3),
                f"{constant:.3f}",
            ]
        )
    header = [
        " ",
        "pre-training",
        "seeds",
        "abs_rel (95 % interval)",
        "abs_rel of a constant picture",
    ]
    return Table(
        "Was depth learned at all?",
        header,
        rows,
        [
            "On the LiDAR of the video itself. The constant is each pixel's median over the training frames."
        ],
    )


def row_records(claim: Claim, network: str, labels: str, tuned: str) -> list[dict]:
    """One dict per pre-training: means and intervals as numbers."""
    baseline = claim.cell(network, labels, tuned, "calibrated" if tuned == "frozen" else "none")
    records = []
    for init in claim.inits(network, labels, tuned):
        cell = claim.cell(network, labels, tuned, init)
        shared = sorted(cell.keys() & baseline.keys()) if cell is not baseline else []
        records.append(
            {
                "network": network,
                "labels": labels,
                "tuned": tuned,
                "pretraining": pretraining_label(init),
                "seeds": len(cell),
                "miou": estimate(map(score, cell.values())),
                "against_none": estimate(
                    score(cell[seed]) - score(baseline[seed]) for seed in shared
                ),
                "pixel_accuracy": estimate(run.result["pixel_accuracy"] for run in cell.values()),
            }
        )
    return records


def write_csv(path: str, records: list[dict]) -> None:
    """A line per row of the full tables; an estimate becomes NAME, NAME_low and NAME_high."""
    text = io.StringIO(newline="")
    writer = None
    for record in records:
        line = {}
        for key, value in record.items():
            if isinstance(value, Estimate):
                low, high = value.mean - value.half, value.mean + value.half
                line |= {key: value.mean, f"{key}_low": low, f"{key}_high": high}
            else:
                line[key] = value
        if writer is None:
            writer = csv.DictWriter(text, line)
            writer.writeheader()
        writer.writerow(line)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
