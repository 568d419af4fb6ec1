"""tools/tables.py: every number stands where it belongs, and the claim's statistics are the textbook's.

python -m pytest -q tests/test_tables.py
"""

import csv
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import assert_one_line, call
from PIL import Image

import train_seg
import utils
from tools import claim, report, runs, tables
from tools.runs import FinishedRun, read_runs


def write_run(
    log_dir: Path, name: str, miou: float, release: float | None = None, **changed: object
) -> Path:
    """A finished fine-tuning as far as tables read it; its pixel accuracy is 30 above its mIoU."""
    folder = log_dir / name
    (folder / "samples").mkdir(parents=True)
    seed = int(re.search(r"_seed(\d+)$", name)[1]) if "_seed" in name else 0
    options = {
        "data": "kitti",
        "encoder": "resnet18",
        "arch": "unet",
        "train_size": 16,
        "freeze_encoder": "_frozen_" in name,
        "steps": 100,
        "batch_size": 4,
        "learning_rate": 1e-4,
        "height": 64,
        "width": 96,
        "init": "none",
        "init_parts": "all",
        "seed": seed,
        **changed,
    }
    result = {
        "miou": miou,
        "pixel_accuracy": miou + 30,
        "cross_entropy": 1.0,
        "images": 72,
        "pretraining": "None",
    }
    if release is not None:
        result["release_miou"] = release
    curve = [(0, 1.0), (25, 0.5 * miou), (50, 0.9 * miou), (100, miou)]
    records = [{"step": step, "miou": value, "pixel_accuracy": value + 30} for step, value in curve]
    records += [{"step": 50, "loss": 2.0}, {"step": 100, "loss": 0.5}]
    (folder / "args.json").write_text(json.dumps({"options": options}))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Image.new("RGB", (600, 80)).save(folder / "samples" / "000100.png")
    return folder


def row_of(text: str, title: str, *cells: str) -> list[str]:
    """The cells of the first row of a table that begins with the given ones, group included."""
    section = text[text.index(f"## {title}") :].split("\n## ")[1 if text.startswith("\n## ") else 0]
    group = ""
    for line in section.splitlines():
        if line.startswith("| ") and "---" not in line:
            row = [cell.strip() for cell in line.strip("|").split("|")]
            group = row[0] = row[0] or group
            if row[: len(cells)] == list(cells):
                return row
    raise AssertionError(f"{title} has no row {cells}:\n{section}")


def make_tables(log_dir: Path, *options: str) -> str:
    return call(tables, "--log_dir", log_dir, *options, expect=0).out


@pytest.fixture
def table1(tmp_path) -> Path:
    """Every cell of Table 1 with a number of its own, three seeds, and the release's score 3 above."""
    number = 20.0
    for encoder, arch, tuned in (
        ("resnet18", "unet", "all"),
        ("resnet50", "unet", "all"),
        ("resnet50", "deeplabv3", "all"),
        ("resnet18", "unet", "frozen"),
        ("resnet50", "unet", "frozen"),
    ):
        for init in ("none", "calibrated", "imagenet", "depthrand", "depth"):
            if init == "calibrated" and tuned == "all":
                continue
            number += 1
            for seed, more in ((0, -0.5), (1, 0.0), (2, 0.5)):
                name = f"seg_{init}_{encoder}_{arch}_{tuned}_n16_seed{seed}"
                write_run(
                    tmp_path, name, number + more, number + more + 3, encoder=encoder, arch=arch
                )
    return tmp_path


def test_table_1(table1):
    text = make_tables(table1, "--tables", "table1")
    title = "Table 1: KITTI, 16 training images"
    expected = {  # the order in which the numbers were given out, and the paper's
        ("ResNet18", "None"): (21.0, "", "41.35", "70.75"),
        ("ResNet18", "Depth"): (24.0, "+3.0", "50.20", "76.39"),
        ("ResNet50", "ImageNet"): (26.0, "+1.0", "44.65", "73.06"),
        ("DeepLabV3", "Depth-Rand"): (31.0, "+2.0", "43.43", "71.34"),
        ("ResNet18, frozen", "None"): (33.0, "-1.0", "41.24", "70.52"),
        ("ResNet18, frozen", "Depth"): (37.0, "+3.0", "46.53", "74.42"),  # against None, calibrated
        ("ResNet50, frozen", "Depth"): (42.0, "+3.0", "46.55", "74.48"),
    }
    for (column, label), (miou, gain, paper, accuracy) in expected.items():
        assert row_of(text, title, column, label) == [
            column,
            label,
            "3",
            f"{miou:.1f} ± 0.5",
            f"{miou + 3:.1f} ± 0.5 [{paper}]",
            f"{miou + 30:.1f} ± 0.5 [{accuracy}]",
            gain,
        ]
    assert row_of(text, title, "ResNet18, frozen", "None, calibrated")[3:] == [
        "34.0 ± 0.5",
        "37.0 ± 0.5",
        "64.0 ± 0.5",
        "",
    ]
    assert "release's score % [paper]" in text and "7 classes, mean over images" in text
    assert "–" not in text  # no gaps
    assert text.count("96x64; 100 steps of batch 4 at 0.0001; scored on 72 images") == 1


def test_only_kitti_has_the_release_s_score(tmp_path):
    """Table 5's brackets are over 19 classes, like ours."""
    name = "cityscapes_seg_depth_resnet50_deeplabv3_all_nall_full_seed0"
    write_run(tmp_path, name, 60.0, 63.0, data="cityscapes")
    text = make_tables(tmp_path)
    assert "release" not in text and "63.0" not in text
    assert row_of(text, "Table 5", "full, validation", "Depth")[3] == "60.0 [73.17]"


def test_claims_of_the_text(table1):
    text = make_tables(table1, "--tables", "table1")
    assert (
        "common practice (ImageNet, DeepLabV3): mIoU -2.00 (release's score -2.00), P.Acc -2.00 "
        "[+7.53 / +4.68]"
    ) in text
    # Depth - ImageNet is 2 in each of the five columns
    assert "mIoU +2.00 (release's score +2.00), P.Acc +2.00 [+5.8 / +5.2" in text
    layout = next(layout for layout in tables.LAYOUTS if layout.key == "table1")
    cells = {
        (column, init): paper
        for init, _, papers in layout.rows
        for column, paper in zip(layout.columns, papers)
    }

    def paper(column: str, init: str) -> np.ndarray:
        return np.array(list(map(float, cells[column, init].split("/"))))

    best = paper("ResNet50", "depth") - paper("DeepLabV3", "imagenet")
    assert np.allclose(best, (7.53, 4.68))
    gains = [
        paper(column, "depth") - paper(column, "imagenet") for column in list(layout.columns)[:4]
    ]
    assert np.allclose(np.mean(gains, 0), (6.2, 4.3), atol=0.05)  # not the text's 5.8 and 5.2


def test_the_text_s_claims_are_paired_over_seeds(table1):
    """ImageNet keeps the seed on which all are worse; Depth is still 2 above it."""
    for seed in (1, 2):
        shutil.rmtree(table1 / f"seg_imagenet_resnet18_unet_all_n16_seed{seed}")
    text = make_tables(table1, "--tables", "table1")
    assert "mIoU +2.00 (release's score +2.00), P.Acc +2.00 [+5.8 / +5.2" in text


def test_figure_2_steps(table1):
    """ImageNet ends at 22 (ResNet18): None never gets there, the others do at the last of their steps."""
    text = make_tables(table1, "--tables", "fig2")
    title = "Figure 2: how fast each start learns"
    assert row_of(text, title, "resnet18", "None")[2:6] == ["3", "–", "3", "0.500"]
    assert row_of(text, title, "resnet18", "ImageNet")[2:5] == ["3", "100 [15000-20000]", "0"]
    assert row_of(text, title, "resnet18", "Depth")[2:5] == ["3", "100 [5000]", "0"]


def test_tables_without_runs_are_not_shown(tmp_path):
    write_run(tmp_path, "seg_none_resnet18_unet_all_n8_seed0", 40.0)
    write_run(tmp_path, "my_own_try", 41.0)
    options = ("--data", "kitti", "--init", "runs/own", "--train_size", "16")
    write_run(tmp_path, train_seg.parse_options(options).name, 43.0)  # the name it has by default
    text = make_tables(tmp_path)
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Figure 3: number of training images, ResNet18",
        "## Other runs",
    ]
    assert row_of(text, "Figure 3: number of training images, ResNet18", "8 images", "None")[
        2:4
    ] == ["1", "40.0"]
    assert row_of(text, "Other runs")[1:4] == ["pre-training", "runs", "mIoU %"]
    *_, own = text.strip().splitlines()
    assert [cell.strip() for cell in own.split("|")[2:5]] == ["None", "2", "42.0 ± 1.4"]
    everything = make_tables(tmp_path, "--all")
    assert everything.count("## ") >= len(tables.LAYOUTS) and "–" in everything
    assert row_of(everything, "Table 5", "full, training", "Depth-cropped")[3] == "– [86.80]"
    with open(tmp_path / "tables.csv") as file:
        assert [row["miou"] for row in csv.DictReader(file)] == ["41.0", "43.0", "40.0"]


SETTING = "kitti, resnet18 unet, all, 16 images, 96x64, 100 steps of batch 4 at 0.0001"
OTHERWISE = {  # an option and another value of it
    "optimizer": "sgd",
    "jitter": 0.5,
    "crop": [64, 64],
    "leave_out": ["000018", "000019"],
    "weight_decay": 0.1,
    "schedule": "poly",
    "encoder_learning_rate_factor": 0.1,
    "init": "runs/another",
    "data_path": "data/another",
}


@pytest.mark.parametrize("option", OTHERWISE)
def test_other_runs_of_other_options_are_other_rows(tmp_path, option):
    """The option in which they differ is named; an older run has its default."""
    value = OTHERWISE[option]
    for seed in (0, 1):
        write_run(tmp_path, f"mine_seed{seed}", 40.0 + seed)
        write_run(tmp_path, f"other_seed{seed}", 50.0 + seed, **{option: value})
    text = make_tables(tmp_path, "--tables", "other")
    default = "none" if option == "init" else runs.DEFAULTS[option]
    first = row_of(text, "Other runs", SETTING, f"None, {option} {default}")
    second = row_of(text, "Other runs", SETTING, f"None, {option} {value}")
    assert first[2:4] == ["2", "40.5 ± 0.7"]
    assert second[2:4] == ["2", "50.5 ± 0.7"]


def test_seeds_are_one_row(tmp_path):
    """Each from a pre-training and images of its own, on any machine; one by an older script."""
    for seed in (0, 1, 2):
        write_run(
            tmp_path,
            f"mine_seed{seed}",
            40.0 + seed,
            init=f"runs/depth_seed{seed}/model.pt",
            split_seed=seed,
            data_files=f"16 (0000000{seed})",
            device=f"cuda:{seed}",
            num_workers=seed,
            memory_format="channels_last",  # an option that is gone
        )
    older = tmp_path / "mine_seed0" / "args.json"
    record = json.loads(older.read_text())
    del record["options"]["memory_format"], record["options"]["split_seed"]
    older.write_text(json.dumps(record))
    text = make_tables(tmp_path, "--tables", "other")
    assert row_of(text, "Other runs", SETTING, "None")[2:4] == ["3", "41.0 ± 1.0"]


@pytest.mark.parametrize("option", sorted({*runs.DEFAULTS, *utils.MAY_CHANGE, "data_files"}))
def test_every_option_that_decides_a_score_tells_runs_apart(option):
    same = {**runs.DEFAULTS, "init": "none", "data_files": "16 (00000000)"}
    both = [
        FinishedRun("one", same, {"pretraining": "None"}),
        FinishedRun("two", {**same, option: 77}, {"pretraining": "None"}),
    ]
    if option == "init":
        both[1].options["init"] = "runs/77"
    rows = runs.group_runs(both, lambda run: "all")["all"]
    costs_time_alone = utils.MAY_CHANGE - {"data_path"}
    free = option in {"name", "seed", "split_seed", "data_files", *costs_time_alone}
    assert len(rows) == (1 if free else 2), rows
    assert free or any(option in label and "77" in label for label in rows)


def test_unknown_tables_are_refused(tmp_path):
    """And what a call has no table for leaves tables.md as it was."""
    write_run(tmp_path, "my_own_try", 41.0)
    make_tables(tmp_path)
    before = (tmp_path / "tables.md").read_text()
    for names in (("tabel1",), ("table1", "tabel1"), ("pretraining",), ("Table1",), ("",)):
        result = call(tables, "--log_dir", tmp_path, "--tables", *names)
        assert_one_line(result, "--tables", f"'{names[-1]}'")
    make_tables(tmp_path, "--tables", "fig6")  # a picture
    make_tables(tmp_path, "--tables", "table1")  # without a run
    assert (tmp_path / "tables.md").read_text() == before


def test_training_scores_and_the_best_of_a_grid(tmp_path):
    name = "cityscapes_seg_depth_resnet50_deeplabv3_all_nall_full_seed0"
    folder = write_run(
        tmp_path, name, 60.0, encoder="resnet50", arch="deeplabv3", data="cityscapes"
    )
    (folder / "train").mkdir()
    (folder / "train" / "segmentation.json").write_text(
        json.dumps({"miou": 70.0, "pixel_accuracy": 90.0})
    )
    for rate, miou in (("", 20.0), ("_lr1e-5", 10.0), ("_lr1e-3", 25.0)):
        write_run(tmp_path, f"seg_depth_resnet18_unet_frozen_n16{rate}_seed0", miou)
    for init, miou in (("none", 5.0), ("calibrated", 12.0)):
        write_run(tmp_path, f"seg_{init}_resnet18_unet_frozen_n16_seed0", miou)
    text = make_tables(tmp_path)
    assert row_of(text, "Table 5", "full, training", "Depth")[3] == "70.0 [83.46]"
    assert row_of(text, "Table 5", "full, validation", "Depth")[3] == "60.0 [73.17]"
    best = row_of(text, "Figure 4: frozen ResNet18", "best", "Depth")
    assert best[3] == "25.0 [46.53]"
    assert best[-1] == "+13.0"  # against None, calibrated, at its best
    assert row_of(text, "Figure 4: frozen ResNet18", "1e-5", "Depth")[3] == "10.0"
    write_run(tmp_path, "seg_depth_resnet18_unet_frozen_n16_seed1", 20.0)
    best = row_of(make_tables(tmp_path), "Figure 4: frozen ResNet18", "best", "Depth")
    assert best[2] == "2"  # a rate with fewer seeds is not compared


def test_damaged_and_empty_folders(tmp_path):
    assert_one_line(call(tables, "--log_dir", tmp_path), str(tmp_path), "no finished run")
    folder = write_run(tmp_path, "seg_none_resnet18_unet_all_n16_seed0", 40.0)
    (folder / "result.json").write_text("{")
    assert_one_line(call(tables, "--log_dir", tmp_path), str(folder), "damaged")


DAMAGED = (
    ("args.json", "{}"),
    ("args.json", '{"options": {}}'),
    ("args.json", '{"options": null}'),
    ("args.json", '{"options": []}'),
    ("args.json", '{"options": {"data": "kitti", "seed": 0}}'),
    ("args.json", "["),
    ("result.json", "{"),
    ("result.json", "[]"),
    ("result.json", '{"miou": 50.0}'),
    ("log.jsonl", "{"),
)


@pytest.mark.parametrize(("file", "text"), DAMAGED)
def test_a_damaged_run_is_left_out(tmp_path, file, text):
    """With a word; the others have their tables."""
    write_run(tmp_path, "seg_none_resnet18_unet_all_n16_seed0", 40.0)
    folder = write_run(tmp_path, "seg_none_resnet18_unet_all_n16_seed1", 50.0)
    (folder / file).write_text(text)
    result = call(tables, "--log_dir", tmp_path, expect=0)
    assert result.err == f"left out: {folder}: args.json, result.json or log.jsonl is damaged\n"
    assert row_of(result.out, "Table 1", "ResNet18", "None")[2:4] == ["1", "40.0 [41.35]"]


# ------------------------------------------------------------------------------------ the claim


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 10, 29])
def test_student_s_t(freedom):
    for t in (0.0, 0.1, 1.0, 2.5, 12.0):
        assert claim.student_p(t, freedom) == pytest.approx(
            2 * scipy.stats.t.sf(t, freedom), rel=1e-7, abs=1e-12
        )
    assert claim.student_quantile(freedom) == pytest.approx(
        scipy.stats.t.ppf(0.975, freedom), rel=1e-9
    )


def test_estimate_is_scipy_s():
    values = np.random.default_rng(0).normal(1, 2, 5)
    ours = claim.estimate(values)
    theirs = scipy.stats.ttest_1samp(values, 0)
    interval = theirs.confidence_interval(0.95)
    assert ours.mean == pytest.approx(values.mean()) and ours.p == pytest.approx(theirs.pvalue)
    assert (ours.mean - ours.half, ours.mean + ours.half) == pytest.approx(
        (interval.low, interval.high)
    )
    assert np.isnan(claim.estimate([1.0]).half) and claim.estimate([]).seeds == 0


def test_holm():
    assert claim.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert claim.holm([0.5, 0.6, 0.02]) == pytest.approx([1.0, 1.0, 0.06])
    assert claim.holm([float("nan"), 0.02, 0.01]) == pytest.approx(
        [np.nan, 0.04, 0.03], nan_ok=True
    )


LABEL_SETS = {
    "KITTI, 16 images": ("kitti", 16),
    "CamVid, 16 images": ("camvid", 16),
    "CamVid, 64 images": ("camvid", 64),
}


@pytest.fixture
def claim_runs(tmp_path) -> tuple[Path, dict]:
    """Frozen scores on three label sets, of known differences: the mean of each row, label set and seed."""
    base = {
        "calibrated": 20.0,
        "shuffled-encoder": 21.0,
        "lidar-encoder": 24.0,
        "flow-encoder": 22.0,
        "depthrand-encoder": 26.0,
        "imagenet": 30.0,
        "depth-encoder": 29.0,
    }
    noise = np.random.default_rng(0).normal(0, 1, (len(base), 3, 4))
    scores = {}
    for row, (init, mean) in enumerate(base.items()):
        for column, (labels, (data, images)) in enumerate(LABEL_SETS.items()):
            for seed in range(4):
                score = mean + 5 * column + noise[row, column, seed]
                scores[init, labels, seed] = score
                name = f"{data}_seg_{init}_efficientnet_lite0_unet_frozen_n{images}_seed{seed}"
                write_run(
                    tmp_path,
                    name,
                    score,
                    train_size=images,
                    data=data,
                    encoder="efficientnet_lite0",
                )
    lidar = write_run(tmp_path, "lidar_efficientnet_lite0_seed0", 0.0)
    (lidar / "result.json").write_text(json.dumps({"abs_rel": 0.5}))
    depth = {"abs_rel": 0.123, "constant": {"abs_rel": 0.456}}
    (lidar / "depth.json").write_text(json.dumps(depth))
    return tmp_path, scores


def test_the_claim_s_contrasts(claim_runs):
    folder, scores = claim_runs
    text = make_tables(folder)
    pairs = {
        "LiDAR - LiDAR shuffled": ("lidar-encoder", "shuffled-encoder"),
        "Depth-Rand - Flow (the best baseline)": ("depthrand-encoder", "flow-encoder"),
        "Depth - ImageNet": ("depth-encoder", "imagenet"),
    }
    tests = {}
    for name, (left, right) in pairs.items():
        differences = [
            np.mean(
                [scores[left, labels, seed] - scores[right, labels, seed] for labels in LABEL_SETS]
            )
            for seed in range(4)
        ]
        tests[name] = scipy.stats.ttest_1samp(differences, 0)
    corrected = claim.holm([test.pvalue for test in tests.values()])
    for (name, test), p in zip(tests.items(), corrected):
        row = row_of(text, "The claim", "efficientnet_lite0", name, "mean of 3 label sets")
        interval = test.confidence_interval(0.95)
        left, right = pairs[name]
        mean = np.mean(
            [
                scores[left, labels, seed] - scores[right, labels, seed]
                for labels in LABEL_SETS
                for seed in range(4)
            ]
        )
        assert row[3:5] == ["4", f"{mean:+.1f} ({interval.low:+.1f} to {interval.high:+.1f})"]
        assert row[5:] == [claim.p_text(test.pvalue), claim.p_text(p)]
        each = row_of(text, "The claim", "efficientnet_lite0", name, "CamVid, 64 images")
        assert each[5:] == ["", ""]  # described, not tested


@pytest.mark.parametrize("whole", (False, True))
def test_the_contrasts_elsewhere(claim_runs, whole):
    """Trained all through, None takes the place of the calibrated one; flow has no decoder to hand over."""
    folder, _ = claim_runs
    depth = "depthrand" if whole else "depthrand-encoder"
    means = {"none": 30.0, "flow-encoder": 29.0, depth: 33.0}
    scores = {}
    for init, mean in means.items():
        for data, images in LABEL_SETS.values():
            for seed in range(2):
                scores[init, seed] = mean + seed * (mean - 29)
                name = f"{data}_seg_{init}_efficientnet_lite0_unet_all_n{images}_seed{seed}"
                write_run(folder, name, scores[init, seed])
    part = "whole network" if whole else "encoder only"
    title = "The same contrasts elsewhere"
    text = make_tables(folder)
    name = "Depth-Rand - None (the best baseline)"
    row = row_of(text, title, "efficientnet_lite0", f"all, {part}", name)
    differences = [scores[depth, seed] - scores["none", seed] for seed in range(2)]
    assert row[3:] == ["2", claim.estimate(differences).text(sign="+")]
    assert text.count("(the best baseline)") == 5  # four with the frozen encoder


def test_the_claim_s_rows(claim_runs):
    folder, scores = claim_runs
    text = make_tables(folder)
    values = [scores["depth-encoder", "KITTI, 16 images", seed] for seed in range(4)]
    against = [
        scores["depth-encoder", "KITTI, 16 images", seed]
        - scores["calibrated", "KITTI, 16 images", seed]
        for seed in range(4)
    ]
    title = "Every row: efficientnet_lite0"
    row = row_of(text, title, "KITTI, 16 images, frozen", "Depth, encoder only")
    assert row[2:5] == ["4", claim.estimate(values).text(), claim.estimate(against).text(sign="+")]
    assert row_of(text, "Was depth learned", "efficientnet_lite0", "LiDAR")[2:] == [
        "1",
        "0.123",
        "0.456",
    ]
    with open(folder / "claim.csv") as file:
        records = {
            (record["labels"], record["pretraining"]): record for record in csv.DictReader(file)
        }
    record = records["KITTI, 16 images", "Depth, encoder only"]
    assert float(record["miou"]) == pytest.approx(np.mean(values))
    assert float(record["miou_high"]) - float(record["miou"]) == pytest.approx(
        claim.estimate(values).half
    )


def test_an_interrupted_night_has_its_seeds(claim_runs):
    """A seed that lacks a label set leaves the tested contrast, not the described ones."""
    folder, _ = claim_runs
    shutil.rmtree(folder / "camvid_seg_depth-encoder_efficientnet_lite0_unet_frozen_n64_seed3")
    text = make_tables(folder)
    row = ("The claim", "efficientnet_lite0", "Depth - ImageNet")
    assert row_of(text, *row, "mean of 3 label sets")[3] == "3"
    assert row_of(text, *row, "KITTI, 16 images")[3] == "4"


def test_the_best_baseline_is_found_on_shared_seeds(claim_runs):
    """Flow is above calibrated; with its best label sets missing it would not be."""
    folder, _ = claim_runs
    for data, images in (("camvid", 16), ("camvid", 64)):
        for seed in (1, 2, 3):
            name = f"{data}_seg_flow-encoder_efficientnet_lite0_unet_frozen_n{images}_seed{seed}"
            shutil.rmtree(folder / name)
    row = ("The claim", "efficientnet_lite0", "Depth-Rand - Flow (the best baseline)")
    assert row_of(make_tables(folder), *row, "mean of 3 label sets")[3] == "1"
    for data, images in LABEL_SETS.values():
        name = f"{data}_seg_flow-encoder_efficientnet_lite0_unet_frozen_n{images}_seed0"
        shutil.rmtree(folder / name)
    assert "(the best baseline)" not in make_tables(folder)  # rather than the other of the two


def test_runs_of_a_follow_up_come_last(claim_runs):
    folder, _ = claim_runs
    write_run(folder, "kitti_seg_jigsaw-encoder_efficientnet_lite0_unet_frozen_n16_seed0", 33.0)
    for name in ("mine", "jigsaw_efficientnet_lite0_seed0"):
        run = write_run(folder, name, 0.0)
        (run / "depth.json").write_text(json.dumps({"abs_rel": 0.5}))  # without a constant picture
    text = make_tables(folder)
    title = "Every row: efficientnet_lite0"
    assert row_of(text, title, "KITTI, 16 images, frozen", "jigsaw, encoder only")[2] == "1"


def test_a_score_that_is_no_number_is_no_result():
    assert math.isnan(claim.estimate([1.0, math.nan, 2.0]).p)


# ------------------------------------------------------------------------------------ figures and the page


def test_figures_and_page(table1, claim_runs):
    for n, miou in ((8, 30.0), (32, 40.0)):
        for init in ("none", "depth"):
            write_run(table1, f"seg_{init}_resnet18_unet_all_n{n}_seed0", miou, train_size=n)
    Image.new("RGB", (900, 200)).save(table1 / "street.png")
    out = make_tables(table1, "--tables", "table1", "--page")
    folder = claim_runs[0]
    assert folder == table1  # one tmp_path: the claim's figures
    assert "claim_frozen.png" in out and f"report page: {table1}/index.html" in out
    page = (table1 / "index.html").read_text()
    assert 'src="street.png"' in page and 'src="claim_frozen.png"' in page
    assert "samples/000100.png" in page and "50.20" in page
    for name in re.findall(r'src="([^"]+)"', page):
        assert (table1 / name).is_file(), name


def test_sizes(tmp_path):
    """Figure 3: one line a pre-training, and no run of another setting among its points."""
    for images in (8, 16, 32):
        for init in ("none", "depth"):
            name = f"seg_{init}_resnet18_unet_all_n{images}_seed0"
            write_run(tmp_path, name, 30 + images, train_size=images, batch_size=min(images, 16))
    write_run(tmp_path, "seg_none_resnet18_unet_all_n16_twice_seed0", 9.0, normalize_twice=True)
    make_tables(tmp_path, "--figures")
    assert Image.open(tmp_path / "sizes.png").height < 700  # one panel


def test_curves(table1):
    out = make_tables(table1, "--figures")
    assert "curves.png" in out and Image.open(table1 / "curves.png").size[0] > 1000
    assert not (table1 / "sizes.png").exists()  # one number of images is no curve
    panels = {run.options["encoder"] for run in read_runs(str(table1))}
    assert panels == {"resnet18", "resnet50"}


def test_curves_of_other_options_are_other_lines(tmp_path):
    for rate in ("5e-9", "5e-8"):
        for seed in (0, 1):
            name = f"seg_vit_vit_l16_dpt_all_n16_lr{rate}_seed{seed}"
            write_run(tmp_path, name, 40.0, encoder_learning_rate_factor=float(rate) / 1e-4)
    (lines,) = report.lines_of(read_runs(str(tmp_path))).values()
    assert sorted(map(len, lines.values())) == [2, 2]
    make_tables(tmp_path, "--figures")
    assert (tmp_path / "curves.png").exists()


def test_sizes_of_other_options_are_other_lines(tmp_path):
    for images in (8, 16):
        for seed, jitter in ((0, 0.0), (1, 0.5)):
            name = f"mine_{images}_jitter{jitter}_seed{seed}"
            write_run(tmp_path, name, 40.0, train_size=images, batch_size=images, jitter=jitter)
    figure = report.sizes_figure(report.plotting(), read_runs(str(tmp_path)))
    (axis,) = figure.axes
    _, labels = axis.get_legend_handles_labels()
    assert labels == ["None, jitter 0.0", "None, jitter 0.5"]


def test_figures_without_matplotlib(table1, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_one_line(call(tables, "--log_dir", table1, "--figures"), "pip install matplotlib")
