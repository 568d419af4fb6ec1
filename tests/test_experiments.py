"""run_all.sh and its tables: every command is the paper's experiment, and every number stands where it belongs.

    python -m pytest -q tests/test_experiments.py
"""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, assert_one_line, call
from PIL import Image

import networks
import train_depth
import train_seg
from tools import claim, tables
from tools.runs import read_runs

# ------------------------------------------------------------------------------------ the commands


def list_jobs(*names: str, **settings: str) -> list[list[str]]:
    """The commands of run_all.sh as words, without the interpreter."""
    done = subprocess.run(
        ["bash", "run_all.sh", "list", *names],
        cwd=ROOT,
        env={**os.environ, **settings},
        text=True,
        capture_output=True,
        check=True,
    )
    return [shlex.split(line)[1:] for line in done.stdout.splitlines()]


def parse(words: list[str]) -> object:
    """The options of a training command, as its script reads them."""
    script = {"train_depth.py": train_depth, "train_seg.py": train_seg}[words[0]]
    return script.parse_options(words[1:])


@pytest.fixture(scope="module")
def kitti() -> dict[str, object]:
    """The options of every training of the paper's tables and figures, by the run's name."""
    jobs = [parse(words) for words in list_jobs(DATA="kitti", SEEDS="0") if words[0] != "evaluate.py"]
    return {args.name: args for args in jobs if args.log_dir != "runs/real"}


@pytest.fixture(scope="module")
def real() -> dict[str, object]:
    """The options of every training of the claim, in the order of the jobs."""
    jobs = [parse(words) for words in list_jobs("real", SEEDS="0 1 2") if words[0] != "evaluate.py"]
    return {args.name: args for args in jobs}


def seg(kitti: dict, name: str) -> object:
    return kitti[f"seg_{name}_seed0"]


def assert_options(args: object, **expected: object) -> None:
    assert {key: getattr(args, key) for key in expected} == expected, args.name


def test_paper_s_schedule(kitti):
    assert_options(
        kitti["depth_resnet18"],
        supervision="mono+stereo", init="imagenet", height=192, width=640, steps=66350, batch_size=12,
        learning_rate=1e-4, learning_rate_drop=[0.75], learning_rate_factor=[0.1],
        frame_ids=[0, -1, 1], smoothness=1e-3, no_automask=False, min_depth=0.54,
    )
    assert_options(kitti["depthrand_resnet50"], init="none", encoder="resnet50")
    assert_options(
        seg(kitti, "depth_resnet18_unet_all_n16"),
        init="runs/kitti/depth_resnet18", init_parts="all", freeze_encoder=False, train_size=16, batch_size=16,
        steps=20000, learning_rate=1e-4, optimizer="adam", schedule="cosine", eval_every=1000, jitter=0.0,
        height=192, width=640,
    )
    assert seg(kitti, "depth_resnet50_deeplabv3_all_n16").init_parts == "encoder"
    assert seg(kitti, "imagenet_resnet18_unet_all_n8").batch_size == 8


def test_figure_8_pretrains_on_raw_scenes(kitti):
    for encoder in ("resnet18", "resnet50"):
        assert_options(
            kitti[f"nyu_depth_{encoder}"],
            data="nyu", data_path="data/nyu_raw", supervision="depth", height=384, width=448, batch_size=8,
            learning_rate=1e-4, learning_rate_drop=[0.5], learning_rate_factor=[0.5],
            min_depth=0.1, max_depth=10, steps=10 * 407_024 // 8 + 20, init="imagenet",
        )
        assert_options(
            kitti[f"nyu_seg_depth_{encoder}_unet_all_nall_seed0"],
            data="nyu", data_path="data/nyu", init=f"runs/kitti/nyu_depth_{encoder}", train_size=None,
        )


def test_table_5_is_the_release_s_cityscapes(kitti):
    depth = kitti["cityscapes_depth_resnet50"]
    assert_options(
        depth,
        data="cityscapes", supervision="depth", arch="deeplabv3", output_stride=16, batch_size=20,
        height=576, width=640, crop=[512, 512], min_depth=2, depth_rows=[0.1, 0.7], learning_rate=1e-4,
        learning_rate_drop=[5 / 80, 40 / 80, 70 / 80], learning_rate_factor=[5, 2, 1], init="imagenet",
    )
    assert abs(depth.steps * 20 / (2975 + 19998) - 80) < 0.1  # epochs over train and train_extra
    assert kitti["cityscapes_cropped_resnet50"].crop == [256, 256]
    rates = {"none": 0.1, "depth": 0.1, "cropped": 0.1, "imagenet": 0.01, "imagenet-fast": 0.1}
    for init, rate in rates.items():
        for kind, steps, jitter in (("full", 50000, 0.5), ("controlled", 20000, 0.0)):
            args = kitti[f"cityscapes_seg_{init}_resnet50_deeplabv3_all_nall_{kind}_seed0"]
            assert_options(
                args,
                learning_rate=rate, steps=steps, jitter=jitter, output_stride=16, crop=[512, 512], batch_size=32,
                optimizer="sgd", weight_decay=1e-4, schedule="poly", poly_power=0.9, height=1024, width=2048,
            )
            assert args.init_parts == "all"  # all but the last layer
    scored = [words[words.index("--weights") + 1] for words in list_jobs("table5", "evaluation", SEEDS="0")]
    assert len(scored) == 10  # the table's training columns


def test_table_3_vit_has_a_decoder_that_learns(kitti):
    for init, file in (("vit", "vit_large_patch16_384.augreg_in21k_ft_in1k.safetensors"),
                       ("dpt", "dpt_large-midas-2f21e586.pt")):
        args = seg(kitti, f"{init}_vit_l16_dpt_all_n16_lr5e-8")
        assert_options(args, init=f"weights/{file}", init_parts="encoder", learning_rate=1e-4, arch="dpt")
        rates = [seg(kitti, f"{init}_vit_l16_dpt_all_n16_lr{rate}") for rate in ("5e-9", "5e-8", "5e-7", "5e-6")]
        encoder_rates = [args.learning_rate * args.encoder_learning_rate_factor for args in rates]
        assert np.allclose(encoder_rates, (5e-9, 5e-8, 5e-7, 5e-6), rtol=1e-9, atol=0)


def test_figure_5_goes_both_ways(kitti):
    assert_options(kitti["large_resnet18"], height=320, width=1024, init="imagenet", supervision="mono+stereo")
    to_small = seg(kitti, "large_resnet18_unet_all_n16")
    assert_options(to_small, init="runs/kitti/large_resnet18", height=192, width=640)
    to_large = seg(kitti, "depth_resnet18_unet_all_n16_large")
    assert_options(to_large, init="runs/kitti/depth_resnet18", height=320, width=1024)
    assert_options(seg(kitti, "imagenet_resnet18_unet_all_n16_large"), height=320, width=1024)


def test_table_6_has_one_decoder_and_the_published_recipe(kitti):
    recipe = {
        "arch": "dpt", "dpt_layers": "last", "scale": [0.5, 2.0], "jitter": 0.5, "optimizer": "adamw",
        "learning_rate": 3e-5, "encoder_learning_rate_factor": 0.1, "weight_decay": 0.05, "clip_gradients": 0.01,
        "warmup_steps": 1500, "schedule": "poly", "poly_power": 1.0, "batch_size": 16, "eval_mode": "slide",
        "init_parts": "encoder",
    }
    for init in ("mae", "dinov2", "depthanything"):
        encoder = "vit_l16" if init == "mae" else "vit_l14"
        pascal = 512 if init == "mae" else 518
        for name, steps, crop in (("ade20k", 160_000, 896), ("cityscapes", 80_000, 896), ("voc", 40_000, pascal)):
            whole = kitti[f"{name}_seg_{init}_{encoder}_dpt_all_nall_seed0"]
            assert_options(whole, **recipe, steps=steps, crop=[crop, crop])
            probe = kitti[f"{name}_seg_{init}_{encoder}_linear_frozen_nall_seed0"]
            assert_options(probe, freeze_encoder=True, arch="linear", crop=[crop, crop])


def test_baselines_as_ours_and_as_released(kitti):
    ours = kitti["reconstruction_resnet50"]
    assert_options(ours, task="reconstruction", reconstruction="paper", batch_size=8, learning_rate=1e-4,
                   learning_rate_drop=[0.5], learning_rate_factor=[0.5], init="none")
    assert seg(kitti, "reconstruction_resnet50_unet_all_n16").init_parts == "all"
    assert seg(kitti, "reconstruction-encoder_resnet50_unet_all_n16").init_parts == "encoder"
    assert kitti["release_resnet50"].reconstruction == "release"
    assert seg(kitti, "release-encoder_resnet50_unet_all_n16").init_parts == "encoder"
    flow = {"task": "flow", "batch_size": 8, "learning_rate": 5e-5, "learning_rate_factor": [1.0], "smoothness": 2.0,
            "frame_ids": [0, -1]}
    assert_options(kitti["flow_resnet18"], init="none", **flow)
    assert_options(kitti["flowimagenet_resnet18"], init="imagenet", **flow)
    assert seg(kitti, "flow-encoder_resnet18_unet_frozen_n16").init_parts == "encoder"
    assert kitti["parity_resnet18"].monodepth2


def test_every_frozen_table_has_none_calibrated(kitti):
    frozen = {name: args for name, args in kitti.items() if "_unet_frozen_" in name}
    settings = {re.sub(r"seg_[^_]+_", "", name) for name in frozen}
    for setting in settings - {name for name in settings if "batchnorm" in name}:
        args = kitti[f"seg_calibrated_{setting}"]
        assert_options(args, calibrate_batch_norm=True, init="none", freeze_encoder=True)
        assert_options(kitti[f"seg_none_{setting}"], calibrate_batch_norm=False, init="none")
    for table in ("core", "table1", "fig4", "fig7", "release"):
        names = [words[words.index("--name") + 1] for words in list_jobs(table, "finetuning")]
        assert any("seg_calibrated_" in name for name in names), table


def test_rows_that_were_missing(kitti):
    assert {"seg_imagenet", "seg_mono", "seg_stereo", "seg_lidar"} <= {
        words[words.index("--name") + 1].removesuffix("_resnet18_unet_all_n16_seed0")
        for words in list_jobs("table2", "finetuning", SEEDS="0")}
    for rate in (1e-5, 1e-3, 1e-2):  # Figure 4's grid; 1e-4 has no tag
        tag = f"{rate:.0e}".replace("e-0", "e-")
        for init in ("none", "calibrated", "imagenet", "depthrand", "depth"):
            for encoder in ("resnet18", "resnet50"):
                assert seg(kitti, f"{init}_{encoder}_unet_frozen_n16_lr{tag}").learning_rate == rate
    commands = [words[1] for words in list_jobs("fig6", "evaluation")]
    assert commands == ["gradcam", "grid"]  # activations, and the segmentations beside them
    drawn = list_jobs("fig7", "evaluation", DATA="kitti")[-1]
    assert drawn[drawn.index("--weights") + 1:] == ["runs/kitti/flow_resnet18", "runs/kitti/depthrand_resnet18"]


def test_published_weights_replace_pretraining():
    names = ("table1", "table2", "table3", "fig5")
    jobs = [parse(words) for words in list_jobs(*names, DATA="kitti", PUBLISHED="1", SEEDS="0")]
    trained = {args.name for args in jobs if hasattr(args, "supervision")}
    assert trained == {"lidar_resnet18"}  # nobody has published it
    found = {args.name: args.init for args in jobs}
    folders = {
        "depth_resnet18_unet_all_n16": "mono+stereo_640x192",
        "depthrand_resnet18_unet_frozen_n16": "mono+stereo_no_pt_640x192",
        "depth-encoder_resnet50_unet_all_n16": "mono_resnet50_640x192",
        "depthrand_resnet50_deeplabv3_all_n16": "mono_resnet50_no_pt_640x192",
        "mono_resnet18_unet_all_n16": "mono_no_pt_640x192",
        "stereo_resnet18_unet_all_n16": "stereo_no_pt_640x192",
        "large_resnet18_unet_all_n16": "mono+stereo_1024x320",
    }
    for name, folder in folders.items():
        assert found[f"seg_{name}_seed0"] == f"weights/{folder}"
    assert {args.log_dir for args in jobs} == {"runs/kitti_published"}


def test_no_pretraining_reads_the_images_that_are_scored():
    """Every pre-training root differs from the labelled one, or holds other files (KITTI raw, Cityscapes train)."""
    roots = {name: f"/{name.lower()}" for name in ("KITTI_RAW", "KITTI_LABELS", "CITYSCAPES", "NYU", "NYU_RAW", "CAMVID")}
    jobs = [parse(words) for words in list_jobs(DATA="kitti", SEEDS="0", **roots) if words[0] != "evaluate.py"]
    pretrained = {(args.data, args.data_path) for args in jobs if hasattr(args, "supervision")}
    assert pretrained == {("kitti", "/kitti_raw"), ("cityscapes", "/cityscapes"), ("nyu", "/nyu_raw")}
    labelled = {args.data_path for args in jobs if not hasattr(args, "supervision")}
    assert {"/kitti_labels", "/nyu", "/camvid", "/cityscapes"} <= labelled
    assert not {"/kitti_raw", "/nyu_raw"} & labelled


def test_the_claim_s_design(real):
    """protocol.md, "The claim, tested": rows, labels, seeds, and the primary contrasts first."""
    encoders = {"resnet18": set(), "efficientnet_lite0": {"imagenet", "depth", "depth-encoder"}}
    ours = {"none", "shuffled", "lidar", "depthrand", "reconstruction", "release"}
    ours |= {f"{init}-encoder" for init in ours - {"none"}} | {"flow-encoder"}
    for encoder, more in encoders.items():
        for tuned in ("frozen", "all"):
            for labels in ("kitti_seg_{}_n16", "camvid_seg_{}_n16", "camvid_seg_{}_n64"):
                for init in ours | more | ({"calibrated"} if tuned == "frozen" else set()):
                    name = labels.format(f"{init}_{encoder}_unet_{tuned}")
                    for seed in (0, 1, 2):
                        args = real[f"{name}_seed{seed}"]
                        assert_options(args, seed=seed, split_seed=seed, freeze_encoder=tuned == "frozen")
                        if args.init not in ("none", "imagenet"):
                            assert real[os.path.basename(args.init)].seed == seed  # a pre-training a seed
    assert not any("imagenet_resnet18" in name or name.startswith("depth_resnet18") for name in real)
    order = list(real)
    primary = {"calibrated", "shuffled-encoder", "lidar-encoder", "flow-encoder", "depthrand-encoder", "imagenet",
               "depth-encoder"}
    first = [re.match(r"\w+_seg_([^_]+)_(efficientnet_lite0)_unet_frozen", name) for name in order if "_seg_" in name]
    assert {match[1] for match in first[:63]} == primary  # 7 rows, 3 label sets, 3 seeds


def test_the_claim_s_data(real):
    drive = ["2011_09_26_drive_0013_sync"]
    for name, args in real.items():
        assert (args.encoder == "resnet18") + (args.encoder == "efficientnet_lite0") == 1
        if name.startswith("kitti_"):
            assert_options(args, data="kitti", train_size=16, height=96, width=320)
            assert args.leave_out == ["000018", "000019", "000020", "000021"]
        elif not name.startswith("camvid_"):
            assert_options(args, data="kitti", drives=drive, height=96, width=320, steps=2000, batch_size=4)
    assert_options(real["shuffled_resnet18_seed2"], supervision="depth", shuffle_depth=2, init="none")
    assert_options(real["lidar_resnet18_seed2"], supervision="depth", shuffle_depth=None, init="none")
    assert_options(real["depth_efficientnet_lite0_seed1"], supervision="stereo", init="imagenet")
    assert_options(real["depthrand_efficientnet_lite0_seed1"], supervision="stereo", init="none")
    scored = [words[words.index("--weights") + 1] for words in list_jobs("real", "evaluation", SEEDS="0")]
    assert len(scored) == 7 and len(set(scored)) == 7  # quality of every depth pre-training


@pytest.mark.parametrize("data", ["synthetic", "kitti"])
def test_every_start_is_trained_before(data):
    folders = set()
    for words in list_jobs(DATA=data, SEEDS="0"):
        if words[0] == "evaluate.py":
            assert folders.issuperset(words[words.index("--weights") + 1:]), words
            continue
        args = parse(words)
        if args.init.startswith(args.log_dir):
            assert args.init in folders, words
        assert os.path.join(args.log_dir, args.name) not in folders, "two jobs of one name"
        folders.add(os.path.join(args.log_dir, args.name))


def test_every_network_can_be_built(kitti):
    import torch
    for arch, encoder in {(args.arch, args.encoder) for args in kitti.values()}:
        with torch.device("meta"):
            networks.build(arch, encoder, 3)


def test_every_cell_of_the_paper_has_a_job(kitti):
    """A run for each number that the paper prints, and for each row that a table shows."""
    stems = {name.removesuffix("_seed0"): [] for name in kitti}
    for layout in tables.LAYOUTS:
        if layout.key == "core":
            continue
        found = 0
        for init, _, papers in layout.rows:
            for (column, pattern), paper in zip(layout.columns.items(), papers, strict=True):
                name = pattern.removeprefix("train:").replace("{}", init)
                matches = [stem for stem in stems if re.fullmatch(name.replace("?", "."), stem)]
                found += len(matches)
                assert len(matches) <= 1, (layout.title, init, column)
                assert matches or pattern == "best" or paper == "-", (layout.title, init, column)
        assert found >= len(layout.rows)


def test_unknown_names_are_refused():
    for names, word in ((["list", "table9"], "table9"), (["core", "real"], "alone")):
        done = subprocess.run(["bash", "run_all.sh", *names], cwd=ROOT, text=True, capture_output=True, check=False)
        assert done.returncode == 2 and word in done.stderr and done.stderr.count("\n") == 1


def test_shell_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck") or os.path.join(os.path.dirname(sys.executable), "shellcheck")
    if not os.path.exists(shellcheck):
        pytest.skip("no shellcheck")
    done = subprocess.run([shellcheck, "run_all.sh", ".ci/run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# ------------------------------------------------------------------------------------ the tables


def write_run(log_dir: Path, name: str, miou: float, release: float | None = None, **changed: object) -> Path:
    """A finished fine-tuning as far as tables read it; its pixel accuracy is 30 above its mIoU."""
    folder = log_dir / name
    (folder / "samples").mkdir(parents=True)
    seed = int(re.search(r"_seed(\d+)$", name)[1]) if "_seed" in name else 0
    options = {
        "data": "kitti", "encoder": "resnet18", "arch": "unet", "train_size": 16, "freeze_encoder": "_frozen_" in name,
        "steps": 100, "batch_size": 4, "learning_rate": 1e-4, "height": 64, "width": 96, "init": "none",
        "init_parts": "all", "seed": seed, **changed,
    }
    result = {"miou": miou, "pixel_accuracy": miou + 30, "cross_entropy": 1.0, "images": 72, "pretraining": "None"}
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
    section = text[text.index(f"## {title}"):].split("\n## ")[1 if text.startswith("\n## ") else 0]
    group = ""
    for line in section.splitlines():
        if line.startswith("| ") and "---" not in line:
            row = [cell.strip() for cell in line.strip("|").split("|")]
            group = row[0] = row[0] or group
            if row[:len(cells)] == list(cells):
                return row
    raise AssertionError(f"{title} has no row {cells}:\n{section}")


def make_tables(log_dir: Path, *options: str) -> str:
    return call(tables, "--log_dir", log_dir, *options, expect=0).out


@pytest.fixture
def table1(tmp_path) -> Path:
    """Every cell of Table 1 with a number of its own, three seeds, and the release's score 3 above."""
    number = 20.0
    for encoder, arch, tuned in (("resnet18", "unet", "all"), ("resnet50", "unet", "all"),
                                 ("resnet50", "deeplabv3", "all"), ("resnet18", "unet", "frozen"),
                                 ("resnet50", "unet", "frozen")):
        for init in ("none", "calibrated", "imagenet", "depthrand", "depth"):
            if init == "calibrated" and tuned == "all":
                continue
            number += 1
            for seed, more in ((0, -0.5), (1, 0.0), (2, 0.5)):
                name = f"seg_{init}_{encoder}_{arch}_{tuned}_n16_seed{seed}"
                write_run(tmp_path, name, number + more, number + more + 3, encoder=encoder, arch=arch)
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
            column, label, "3", f"{miou:.1f} ± 0.5", gain, f"{miou + 3:.1f} ± 0.5 [{paper}]",
            f"{miou + 30:.1f} ± 0.5 [{accuracy}]"]
    assert row_of(text, title, "ResNet18, frozen", "None, calibrated")[3:] == ["34.0 ± 0.5", "", "37.0 ± 0.5", "64.0 ± 0.5"]
    assert "release's score % [paper]" in text and "7 classes, mean over images" in text
    assert "–" not in text  # no gaps
    assert text.count("96x64; 100 steps of batch 4 at 0.0001; scored on 72 images") == 1


def test_claims_of_the_text(table1):
    text = make_tables(table1, "--tables", "table1")
    assert ("common practice (ImageNet, DeepLabV3): mIoU -2.00 (release's score -2.00), P.Acc -2.00 "
            "[+7.53 / +4.68]") in text
    # Depth - ImageNet is 2 in each of the five columns
    assert "mIoU +2.00 (release's score +2.00), P.Acc +2.00 [+5.8 / +5.2" in text
    layout = next(layout for layout in tables.LAYOUTS if layout.key == "table1")
    cells = {(column, init): paper for init, _, papers in layout.rows for column, paper in zip(layout.columns, papers)}

    def paper(column: str, init: str) -> np.ndarray:
        return np.array(list(map(float, cells[column, init].split("/"))))

    best = paper("ResNet50", "depth") - paper("DeepLabV3", "imagenet")
    assert np.allclose(best, (7.53, 4.68))
    gains = [paper(column, "depth") - paper(column, "imagenet") for column in list(layout.columns)[:4]]
    assert np.allclose(np.mean(gains, 0), (6.2, 4.3), atol=0.05)  # not the text's 5.8 and 5.2


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
    text = make_tables(tmp_path)
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Figure 3: number of training images, ResNet18", "## Other runs"]
    assert row_of(text, "Figure 3: number of training images, ResNet18", "8 images", "None")[2:4] == ["1", "40.0"]
    assert row_of(text, "Other runs")[1:4] == ["pre-training", "runs", "mIoU %"]
    everything = make_tables(tmp_path, "--all")
    assert everything.count("## ") >= len(tables.LAYOUTS) and "–" in everything
    assert row_of(everything, "Table 5", "full, training", "Depth-cropped")[3] == "– [86.80]"
    with open(tmp_path / "tables.csv") as file:
        assert [row["miou"] for row in csv.DictReader(file)] == ["41.0", "40.0"]


def test_training_scores_and_the_best_of_a_grid(tmp_path):
    name = "cityscapes_seg_depth_resnet50_deeplabv3_all_nall_full_seed0"
    folder = write_run(tmp_path, name, 60.0, encoder="resnet50", arch="deeplabv3", data="cityscapes")
    (folder / "train").mkdir()
    (folder / "train" / "segmentation.json").write_text(json.dumps({"miou": 70.0, "pixel_accuracy": 90.0}))
    for rate, miou in (("", 20.0), ("_lr1e-5", 10.0), ("_lr1e-3", 25.0)):
        write_run(tmp_path, f"seg_depth_resnet18_unet_frozen_n16{rate}_seed0", miou)
    text = make_tables(tmp_path)
    assert row_of(text, "Table 5", "full, training", "Depth")[3] == "70.0 [83.46]"
    assert row_of(text, "Table 5", "full, validation", "Depth")[3] == "60.0 [73.17]"
    assert row_of(text, "Figure 4: frozen ResNet18", "best", "Depth")[3] == "25.0 [46.53]"
    assert row_of(text, "Figure 4: frozen ResNet18", "1e-5", "Depth")[3] == "10.0"


def test_damaged_and_empty_folders(tmp_path):
    assert_one_line(call(tables, "--log_dir", tmp_path), str(tmp_path), "no finished run")
    folder = write_run(tmp_path, "seg_none_resnet18_unet_all_n16_seed0", 40.0)
    (folder / "result.json").write_text("{")
    assert_one_line(call(tables, "--log_dir", tmp_path), str(folder), "damaged")


# ------------------------------------------------------------------------------------ the claim


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 10, 29])
def test_student_s_t(freedom):
    for t in (0.0, 0.1, 1.0, 2.5, 12.0):
        assert claim.student_p(t, freedom) == pytest.approx(2 * scipy.stats.t.sf(t, freedom), rel=1e-7, abs=1e-12)
    assert claim.student_quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=1e-9)


def test_estimate_is_scipy_s():
    values = np.random.default_rng(0).normal(1, 2, 5)
    ours = claim.estimate(values)
    theirs = scipy.stats.ttest_1samp(values, 0)
    interval = theirs.confidence_interval(0.95)
    assert ours.mean == pytest.approx(values.mean()) and ours.p == pytest.approx(theirs.pvalue)
    assert (ours.mean - ours.half, ours.mean + ours.half) == pytest.approx((interval.low, interval.high))
    assert np.isnan(claim.estimate([1.0]).half) and claim.estimate([]).seeds == 0


def test_holm():
    assert claim.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert claim.holm([0.5, 0.6, 0.02]) == pytest.approx([1.0, 1.0, 0.06])
    assert claim.holm([float("nan"), 0.02, 0.01]) == pytest.approx([np.nan, 0.04, 0.03], nan_ok=True)


LABEL_SETS = {"KITTI, 16 images": ("kitti", 16), "CamVid, 16 images": ("camvid", 16), "CamVid, 64 images": ("camvid", 64)}


@pytest.fixture
def claim_runs(tmp_path) -> tuple[Path, dict]:
    """Frozen scores on three label sets, of known differences: the mean of each row, label set and seed."""
    base = {"calibrated": 20.0, "shuffled-encoder": 21.0, "lidar-encoder": 24.0, "flow-encoder": 22.0,
            "depthrand-encoder": 26.0, "imagenet": 30.0, "depth-encoder": 29.0}
    noise = np.random.default_rng(0).normal(0, 1, (len(base), 3, 4))
    scores = {}
    for row, (init, mean) in enumerate(base.items()):
        for column, (labels, (data, images)) in enumerate(LABEL_SETS.items()):
            for seed in range(4):
                score = mean + 5 * column + noise[row, column, seed]
                scores[init, labels, seed] = score
                name = f"{data}_seg_{init}_efficientnet_lite0_unet_frozen_n{images}_seed{seed}"
                write_run(tmp_path, name, score, train_size=images, data=data, encoder="efficientnet_lite0")
    lidar = write_run(tmp_path, "lidar_efficientnet_lite0_seed0", 0.0)
    (lidar / "result.json").write_text(json.dumps({"abs_rel": 0.5}))
    depth = {"abs_rel": 0.123, "constant_abs_rel": 0.456}
    (lidar / "depth.json").write_text(json.dumps(depth))
    return tmp_path, scores


def test_the_claim_s_contrasts(claim_runs):
    folder, scores = claim_runs
    text = make_tables(folder)
    pairs = {"LiDAR - LiDAR shuffled": ("lidar-encoder", "shuffled-encoder"),
             "Depth-Rand - Flow (the best baseline)": ("depthrand-encoder", "flow-encoder"),
             "Depth - ImageNet": ("depth-encoder", "imagenet")}
    tests = {}
    for name, (left, right) in pairs.items():
        differences = [np.mean([scores[left, labels, seed] - scores[right, labels, seed] for labels in LABEL_SETS])
                       for seed in range(4)]
        tests[name] = scipy.stats.ttest_1samp(differences, 0)
    corrected = claim.holm([test.pvalue for test in tests.values()])
    for (name, test), p in zip(tests.items(), corrected):
        row = row_of(text, "The claim", "efficientnet_lite0", name, "mean of 3 label sets")
        interval = test.confidence_interval(0.95)
        left, right = pairs[name]
        mean = np.mean([scores[left, labels, seed] - scores[right, labels, seed]
                        for labels in LABEL_SETS for seed in range(4)])
        assert row[3:5] == ["4", f"{mean:+.1f} ({interval.low:+.1f} to {interval.high:+.1f})"]
        assert row[5:] == [claim.p_text(test.pvalue), claim.p_text(p)]
        each = row_of(text, "The claim", "efficientnet_lite0", name, "CamVid, 64 images")
        assert each[5:] == ["", ""]  # described, not tested


def test_the_claim_s_rows(claim_runs):
    folder, scores = claim_runs
    text = make_tables(folder)
    values = [scores["depth-encoder", "KITTI, 16 images", seed] for seed in range(4)]
    against = [scores["depth-encoder", "KITTI, 16 images", seed] - scores["calibrated", "KITTI, 16 images", seed]
               for seed in range(4)]
    title = "Every row: efficientnet_lite0"
    row = row_of(text, title, "KITTI, 16 images, frozen", "Depth, encoder only")
    assert row[2:5] == ["4", claim.estimate(values).text(), claim.estimate(against).text(sign="+")]
    assert row_of(text, "Was depth learned", "efficientnet_lite0", "LiDAR")[2:] == ["1", "0.123", "0.456"]
    with open(folder / "claim.csv") as file:
        records = {(record["labels"], record["pretraining"]): record for record in csv.DictReader(file)}
    record = records["KITTI, 16 images", "Depth, encoder only"]
    assert float(record["miou"]) == pytest.approx(np.mean(values))
    assert float(record["miou_high"]) - float(record["miou"]) == pytest.approx(claim.estimate(values).half)


def test_an_interrupted_night_has_its_seeds(claim_runs):
    """A seed that lacks a label set leaves the tested contrast, not the described ones."""
    folder, _ = claim_runs
    shutil.rmtree(folder / "camvid_seg_depth-encoder_efficientnet_lite0_unet_frozen_n64_seed3")
    text = make_tables(folder)
    row = ("The claim", "efficientnet_lite0", "Depth - ImageNet")
    assert row_of(text, *row, "mean of 3 label sets")[3] == "3"
    assert row_of(text, *row, "KITTI, 16 images")[3] == "4"


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


def test_curves(table1):
    out = make_tables(table1, "--figures")
    assert "curves.png" in out and Image.open(table1 / "curves.png").size[0] > 1000
    assert not (table1 / "sizes.png").exists()  # one number of images is no curve
    panels = {run.options["encoder"] for run in read_runs(str(table1))}
    assert panels == {"resnet18", "resnet50"}


def test_figures_without_matplotlib(table1, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_one_line(call(tables, "--log_dir", table1, "--figures"), "pip install matplotlib")
