"""run_all.sh: every command is the experiment that the paper describes (protocol in NOTES.md, "Rows and departures").

python -m pytest -q tests/test_experiments.py
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import make_data
import numpy as np
import pytest
from conftest import ROOT

import datasets
import evaluate
import networks
import train_depth
import train_seg
from tools import tables

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
    jobs = [
        parse(words) for words in list_jobs(DATA="kitti", SEEDS="0") if words[0] != "evaluate.py"
    ]
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
        supervision="mono+stereo",
        init="imagenet",
        height=192,
        width=640,
        steps=66350,
        batch_size=12,
        learning_rate=1e-4,
        learning_rate_drop=[0.75],
        learning_rate_factor=[0.1],
        frame_ids=[0, -1, 1],
        smoothness=1e-3,
        min_depth=0.54,
    )
    assert_options(kitti["depthrand_resnet50"], init="none", encoder="resnet50")
    assert_options(
        seg(kitti, "depth_resnet18_unet_all_n16"),
        init="runs/kitti/depth_resnet18",
        init_parts="all",
        freeze_encoder=False,
        train_size=16,
        batch_size=16,
        steps=20000,
        learning_rate=1e-4,
        optimizer="adam",
        schedule="cosine",
        eval_every=1000,
        jitter=0.0,
        height=192,
        width=640,
    )
    assert seg(kitti, "depth_resnet50_deeplabv3_all_n16").init_parts == "encoder"
    assert seg(kitti, "imagenet_resnet18_unet_all_n8").batch_size == 8


def test_figure_8_pretrains_on_raw_scenes(kitti):
    for encoder in ("resnet18", "resnet50"):
        assert_options(
            kitti[f"nyu_depth_{encoder}"],
            data="nyu",
            data_path="data/nyu_raw",
            supervision="depth",
            height=384,
            width=448,
            batch_size=8,
            learning_rate=1e-4,
            learning_rate_drop=[0.5],
            learning_rate_factor=[0.5],
            min_depth=0.1,
            max_depth=10,
            steps=10 * 407_024 // 8 + 20,
            init="imagenet",
        )
        assert_options(
            kitti[f"nyu_seg_depth_{encoder}_unet_all_nall_seed0"],
            data="nyu",
            data_path="data/nyu",
            init=f"runs/kitti/nyu_depth_{encoder}",
            train_size=None,
        )


def test_table_5_is_the_release_s_cityscapes(kitti):
    depth = kitti["cityscapes_depth_resnet50"]
    assert_options(
        depth,
        data="cityscapes",
        supervision="depth",
        arch="deeplabv3",
        output_stride=16,
        batch_size=20,
        height=576,
        width=640,
        crop=[512, 512],
        min_depth=2,
        depth_rows=[0.1, 0.7],
        learning_rate=1e-4,
        learning_rate_drop=[5 / 80, 40 / 80, 70 / 80],
        learning_rate_factor=[5, 2, 1],
        init="imagenet",
    )
    assert abs(depth.steps * 20 / (2975 + 19998) - 80) < 0.1  # epochs over train and train_extra
    assert kitti["cityscapes_cropped_resnet50"].crop == [256, 256]
    rates = {"none": 0.1, "depth": 0.1, "cropped": 0.1, "imagenet": 0.01, "imagenet-fast": 0.1}
    for init, rate in rates.items():
        for kind, steps, jitter in (("full", 50000, 0.5), ("controlled", 20000, 0.0)):
            args = kitti[f"cityscapes_seg_{init}_resnet50_deeplabv3_all_nall_{kind}_seed0"]
            assert_options(
                args,
                learning_rate=rate,
                steps=steps,
                jitter=jitter,
                output_stride=16,
                crop=[512, 512],
                batch_size=32,
                optimizer="sgd",
                weight_decay=1e-4,
                schedule="poly",
                poly_power=0.9,
                height=1024,
                width=2048,
            )
            assert args.init_parts == "all"  # all but the last layer
    scored = [
        words[words.index("--weights") + 1]
        for words in list_jobs("table5", "evaluation", SEEDS="0")
    ]
    assert len(scored) == 10  # the table's training columns


def test_table_3_vit_has_a_decoder_that_learns(kitti):
    for init, file in (
        ("vit", "vit_large_patch16_384.augreg_in21k_ft_in1k.safetensors"),
        ("dpt", "dpt_large-midas-2f21e586.pt"),
    ):
        args = seg(kitti, f"{init}_vit_l16_dpt_all_n16_lr5e-8")
        assert_options(
            args, init=f"weights/{file}", init_parts="encoder", learning_rate=1e-4, arch="dpt"
        )
        rates = [
            seg(kitti, f"{init}_vit_l16_dpt_all_n16_lr{rate}")
            for rate in ("5e-9", "5e-8", "5e-7", "5e-6")
        ]
        encoder_rates = [args.learning_rate * args.encoder_learning_rate_factor for args in rates]
        assert np.allclose(encoder_rates, (5e-9, 5e-8, 5e-7, 5e-6), rtol=1e-9, atol=0)


def test_figure_5_goes_both_ways(kitti):
    assert_options(
        kitti["large_resnet18"], height=320, width=1024, init="imagenet", supervision="mono+stereo"
    )
    to_small = seg(kitti, "large_resnet18_unet_all_n16")
    assert_options(to_small, init="runs/kitti/large_resnet18", height=192, width=640)
    to_large = seg(kitti, "depth_resnet18_unet_all_n16_large")
    assert_options(to_large, init="runs/kitti/depth_resnet18", height=320, width=1024)
    assert_options(seg(kitti, "imagenet_resnet18_unet_all_n16_large"), height=320, width=1024)


def test_table_6_has_one_decoder_and_the_published_recipe(kitti):
    recipe = {
        "arch": "dpt",
        "dpt_layers": "last",
        "scale": [0.5, 2.0],
        "jitter": 0.5,
        "optimizer": "adamw",
        "learning_rate": 3e-5,
        "encoder_learning_rate_factor": 0.1,
        "weight_decay": 0.05,
        "clip_gradients": 0.01,
        "warmup_steps": 1500,
        "schedule": "poly",
        "poly_power": 1.0,
        "batch_size": 16,
        "eval_mode": "slide",
        "init_parts": "encoder",
    }
    for init in ("mae", "dinov2", "depthanything"):
        encoder = "vit_l16" if init == "mae" else "vit_l14"
        pascal = 512 if init == "mae" else 518
        for name, steps, crop in (
            ("ade20k", 160_000, 896),
            ("cityscapes", 80_000, 896),
            ("voc", 40_000, pascal),
        ):
            whole = kitti[f"{name}_seg_{init}_{encoder}_dpt_all_nall_seed0"]
            assert_options(whole, **recipe, steps=steps, crop=[crop, crop])
            probe = kitti[f"{name}_seg_{init}_{encoder}_linear_frozen_nall_seed0"]
            assert_options(probe, freeze_encoder=True, arch="linear", crop=[crop, crop])


def test_baselines_as_ours_and_as_released(kitti):
    ours = kitti["reconstruction_resnet50"]
    assert_options(
        ours,
        task="reconstruction",
        reconstruction="paper",
        batch_size=8,
        learning_rate=1e-4,
        learning_rate_drop=[0.5],
        learning_rate_factor=[0.5],
        init="none",
    )
    assert seg(kitti, "reconstruction_resnet50_unet_all_n16").init_parts == "all"
    assert seg(kitti, "reconstruction-encoder_resnet50_unet_all_n16").init_parts == "encoder"
    assert kitti["release_resnet50"].reconstruction == "release"
    assert seg(kitti, "release-encoder_resnet50_unet_all_n16").init_parts == "encoder"
    flow = {
        "task": "flow",
        "batch_size": 8,
        "learning_rate": 5e-5,
        "learning_rate_factor": [1.0],
        "smoothness": 2.0,
        "frame_ids": [0, -1],
    }
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
        for words in list_jobs("table2", "finetuning", SEEDS="0")
    }
    for rate in (1e-5, 1e-3, 1e-2):  # Figure 4's grid; 1e-4 has no tag
        tag = f"{rate:.0e}".replace("e-0", "e-")
        for init in ("none", "calibrated", "imagenet", "depthrand", "depth"):
            for encoder in ("resnet18", "resnet50"):
                assert seg(kitti, f"{init}_{encoder}_unet_frozen_n16_lr{tag}").learning_rate == rate
    commands = [words[1] for words in list_jobs("fig6", "evaluation")]
    assert commands == ["gradcam"]  # which draws activations and segmentations
    drawn = list_jobs("fig7", "evaluation", DATA="kitti")[-1]
    assert drawn[drawn.index("--weights") + 1 :] == [
        "runs/kitti/flow_resnet18",
        "runs/kitti/depthrand_resnet18",
    ]


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
    roots = {
        name: f"/{name.lower()}"
        for name in ("KITTI_RAW", "KITTI_LABELS", "CITYSCAPES", "NYU", "NYU_RAW", "CAMVID")
    }
    jobs = [
        parse(words)
        for words in list_jobs(DATA="kitti", SEEDS="0", **roots)
        if words[0] != "evaluate.py"
    ]
    pretrained = {(args.data, args.data_path) for args in jobs if hasattr(args, "supervision")}
    assert pretrained == {
        ("kitti", "/kitti_raw"),
        ("cityscapes", "/cityscapes"),
        ("nyu", "/nyu_raw"),
    }
    labelled = {args.data_path for args in jobs if not hasattr(args, "supervision")}
    assert {"/kitti_labels", "/nyu", "/camvid", "/cityscapes"} <= labelled
    assert not {"/kitti_raw", "/nyu_raw"} & labelled


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, str]:
    """Stand-ins in the true layouts of the data sets that are pre-trained on and scored."""
    root = tmp_path_factory.mktemp("roots")
    make_data.write_kitti(root / "kitti_raw")
    make_data.write_semantics(root / "kitti_labels", count=30)
    make_data.write_cityscapes(root / "cityscapes")
    for number in range(6):
        name = f"{number:05d}.png"
        make_data.write_image(root / "nyu" / "image" / name, 48, 64, seed=100 + number)
        make_data.write_depth(root / "nyu" / "depth" / name, 2.0, 48, 64)
        make_data.write_array(root / "nyu" / "label40" / name, np.full((48, 64), 1, np.uint8))
    make_data.write_text(root / "nyu" / "train.txt", "00000\n00001\n00002\n")
    make_data.write_text(root / "nyu" / "test.txt", "00003\n00004\n00005\n")
    for number in range(3):
        scene = root / "nyu_raw" / "kitchen_0001"
        make_data.write_image(scene / f"rgb_{number:05d}.jpg", 480, 640, seed=number)
        make_data.write_depth(scene / f"sync_depth_{number:05d}.png", 2.0, 480, 640)
    names = ("kitti_raw", "kitti_labels", "cityscapes", "nyu", "nyu_raw")
    return {name.upper(): str(root / name) for name in names}


@pytest.mark.parametrize("table", ["table1", "table5", "fig8"])
def test_no_pretraining_target_is_a_scored_image(table, roots):
    listed = list_jobs(table, DATA="kitti", SEEDS="0", **roots)
    jobs = [parse(words) for words in listed if words[0] != "evaluate.py"]
    pretrainings = [args for args in jobs if hasattr(args, "supervision")]
    scored = set()
    for args in jobs:
        if args not in pretrainings:
            pairs = datasets.find_labelled(args, "val").pairs
            scored |= {os.path.realpath(image) for image, _ in pairs}
    assert pretrainings and scored
    for args in pretrainings:
        args.batch_size = 1  # the stand-ins are small
        targets = train_depth.make_dataset(args).targets()
        assert targets and scored.isdisjoint(map(os.path.realpath, targets)), args.name


def test_nyu_without_raw_scenes_leaves_test_images_out(roots):
    """Even with the labelled folder as NYU_RAW, no file of test.txt is a target."""
    roots = {**roots, "NYU_RAW": roots["NYU"]}
    words = next(iter(list_jobs("fig8", "pretraining", DATA="kitti", **roots)))
    args = parse(words)
    args.batch_size = 1
    targets = train_depth.make_dataset(args).targets()
    assert sorted(Path(path).stem for path in targets) == ["00000", "00001", "00002"]


def test_the_claim_s_design(real):
    """Rows, labels and seeds of the claim, and the primary contrasts first."""
    encoders = {"resnet18": set(), "efficientnet_lite0": {"imagenet", "depth", "depth-encoder"}}
    ours = {"none", "shuffled", "lidar", "depthrand", "reconstruction"}
    ours |= {f"{init}-encoder" for init in ours - {"none"}}
    ours |= {"flow-encoder", "release-encoder"}  # neither hands over a decoder
    for encoder, more in encoders.items():
        for tuned in ("frozen", "all"):
            for labels in ("kitti_seg_{}_n16", "camvid_seg_{}_n16", "camvid_seg_{}_n64"):
                for init in ours | more | ({"calibrated"} if tuned == "frozen" else set()):
                    name = labels.format(f"{init}_{encoder}_unet_{tuned}")
                    for seed in (0, 1, 2):
                        args = real[f"{name}_seed{seed}"]
                        assert_options(
                            args, seed=seed, split_seed=seed, freeze_encoder=tuned == "frozen"
                        )
                        if args.init not in ("none", "imagenet"):
                            assert (
                                real[os.path.basename(args.init)].seed == seed
                            )  # a pre-training a seed
    assert not any(
        "imagenet_resnet18" in name or name.startswith("depth_resnet18") for name in real
    )
    order = list(real)
    primary = {
        "calibrated",
        "shuffled-encoder",
        "lidar-encoder",
        "flow-encoder",
        "depthrand-encoder",
        "imagenet",
        "depth-encoder",
    }
    first = [
        re.match(r"\w+_seg_([^_]+)_(efficientnet_lite0)_unet_frozen", name)
        for name in order
        if "_seg_" in name
    ]
    assert {match[1] for match in first[:63]} == primary  # 7 rows, 3 label sets, 3 seeds


def test_the_claim_s_data(real):
    drive = ["2011_09_26_drive_0013_sync"]
    for name, args in real.items():
        assert (args.encoder == "resnet18") + (args.encoder == "efficientnet_lite0") == 1
        if name.startswith("kitti_"):
            assert_options(args, data="kitti", train_size=16, height=64, width=192)
            assert args.leave_out == ["000018", "000019", "000020", "000021"]
        elif not name.startswith("camvid_"):
            assert_options(
                args, data="kitti", drives=drive, height=64, width=192, steps=1000, batch_size=4
            )
    assert_options(
        real["shuffled_resnet18_seed2"], supervision="depth", shuffle_depth=2, init="none"
    )
    assert_options(
        real["lidar_resnet18_seed2"], supervision="depth", shuffle_depth=None, init="none"
    )
    assert_options(real["depth_efficientnet_lite0_seed1"], supervision="stereo", init="imagenet")
    assert_options(real["depthrand_efficientnet_lite0_seed1"], supervision="stereo", init="none")
    scored = [
        words[words.index("--weights") + 1] for words in list_jobs("real", "evaluation", SEEDS="0")
    ]
    assert len(scored) == 7 and len(set(scored)) == 7  # quality of every depth pre-training


@pytest.mark.parametrize(("data", "published"), [("synthetic", ""), ("kitti", ""), ("kitti", "1")])
def test_every_start_is_trained_before(data, published):
    folders = set()
    for words in list_jobs(DATA=data, PUBLISHED=published, SEEDS="0"):
        if words[0] == "evaluate.py":
            for path in words[words.index("--weights") + 1 :]:
                assert path in folders or (published and path.startswith("weights/")), words
            continue
        args = parse(words)
        if args.init.startswith(args.log_dir):
            assert args.init in folders, words
        assert os.path.join(args.log_dir, args.name) not in folders, "two jobs of one name"
        folders.add(os.path.join(args.log_dir, args.name))


def test_evaluations_are_understood(monkeypatch):
    listed = list_jobs("core", "table5", "fig6", "fig7", "real", "evaluation", SEEDS="0")
    assert {words[1] for words in listed} == {"grid", "seg", "gradcam", "depth"}
    for words in listed:
        monkeypatch.setattr(sys, "argv", words)
        args = evaluate.parse_options()
        if args.command == "depth":
            chosen = (args.drives, args.frames, args.constant_from, args.scale)
            drive = ["2011_09_26_drive_0013_sync"]
            assert chosen == (drive, (0, 144), (0, 144), "median")


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


REFUSED = (  # arguments, settings, and what the error names
    ("list table9", {}, "table9"),
    ("core real", {}, "alone"),
    ("table1", {"DATA": "synthetic", "PUBLISHED": "1"}, "DATA=kitti"),
    ("table1", {"DATA": "nyu"}, "DATA=nyu"),
    ("list table1", {"DATA": "Kitti"}, "DATA=Kitti"),
    ("core", {"DATA": "kitti_odometry"}, "DATA=kitti_odometry"),
    ("core", {"DATA": "synthetic kitti"}, "DATA=synthetic kitti"),
    ("real", {"SIZE": "64x192"}, "64x192"),
    ("real", {"SIZE": "64"}, "64"),
    ("list real", {"SIZE": "64 192 3"}, "64 192 3"),
    ("list real pretraining", {"CAMVID_SIZE": "96x128"}, "96x128"),
    ("real", {"CAMVID_SIZE": "96 wide"}, "96 wide"),
    ("real", {"BATCH": "four"}, "BATCH=four"),
    ("core", {"PYTHON": "no_such_python"}, "PYTHON=no_such_python"),
    ("core", {"PYTHON": "/no/such/python"}, "PYTHON=/no/such/python"),
    ("core", {"PYTHON": "list"}, "PYTHON=list"),  # a function of the script
)


@pytest.mark.parametrize(("arguments", "settings", "word"), REFUSED)
def test_bad_settings_and_names_are_refused(tmp_path, arguments, settings, word):
    """In one line, before anything is listed or started."""
    places = {"RUNS": str(tmp_path / "runs"), "REAL": str(tmp_path / "real"), "PYTHON": "true"}
    done = subprocess.run(
        ["bash", "run_all.sh", *arguments.split()],
        cwd=ROOT,
        env={**os.environ, **places, **settings},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert word in done.stderr
    assert not done.stdout
    assert not os.listdir(tmp_path)


def test_a_size_of_one_s_own():
    jobs = list_jobs("real", SEEDS="0", SIZE="96 320", CAMVID_SIZE="128 160")
    for words in jobs:
        if words[0] != "evaluate.py":
            args = parse(words)
            size = (128, 160) if args.data == "camvid" else (96, 320)
            assert (args.height, args.width) == size, args.name


def test_shell_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck") or os.path.join(
        os.path.dirname(sys.executable), "shellcheck"
    )
    if not os.path.exists(shellcheck):
        pytest.skip("no shellcheck")
    done = subprocess.run(
        [shellcheck, "run_all.sh", ".ci/run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# ------------------------------------------------------------------------------------ running them

FAKE_PYTHON = """#!/usr/bin/env bash
case $1 in tools/*) exec "{python}" "$@" ;; esac
for word in "$@"; do
  case $last in --name) name=$word ;; --log_dir) runs=$word ;; --output) output=$word ;; esac
  case $last in --init) [[ $word = none || -d $word ]] || exit 2 ;; esac
  last=$word
done
[ "$name" != "$FAIL" ] || {{ echo "no luck"; exit 2; }}
[ -z "$WAIT" ] || {{ trap 'kill $!; exit 75' TERM; sleep 20 & wait; }}
if [ -n "$output" ]; then
  touch "$output"
else
  mkdir -p "$runs/$name"
  echo '{{"miou": 12.34, "pretraining": "None"}}' > "$runs/$name/result.json"
  cp "{args}" "$runs/$name/args.json"
fi
"""


@pytest.fixture
def fake(tmp_path) -> dict[str, str]:
    """Settings whose paths have spaces, and a Python that only leaves results."""
    python = tmp_path / "a python"
    options = {
        "data": "synthetic", "encoder": "efficientnet_lite0", "train_size": 16, "seed": 0,
        "freeze_encoder": False, "steps": 1, "batch_size": 4, "learning_rate": 1e-4, "height": 64,
        "width": 96, "init": "none",
    }  # fmt: skip
    args = tmp_path / "args.json"
    args.write_text(json.dumps({"options": options}))
    python.write_text(FAKE_PYTHON.format(python=sys.executable, args=args))
    python.chmod(0o755)
    (tmp_path / "my street").mkdir()
    return {
        **os.environ,
        "PYTHON": str(python),
        "STREET": f"{tmp_path}/my street",
        "RUNS": f"{tmp_path}/my runs",
        "SEEDS": "0",
        "FAIL": "-",
        "WAIT": "",
    }


def run_all(settings: dict[str, str], *names: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "run_all.sh"), *names]
    return subprocess.run(command, env=settings, text=True, capture_output=True, check=False)


def test_a_failed_job_keeps_only_its_heirs_from_running(fake):
    done = run_all({**fake, "FAIL": "flow_efficientnet_lite0"})
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if re.match(r"\[ *\d+/15\]", line)]
    assert len(lines) == 15 and lines[0].startswith("[ 1/15] ")
    failed = [line for line in lines if "fail" in line]
    assert sorted(line.split("] ")[1].split()[0] for line in failed) == [
        "flow_efficientnet_lite0",
        "grid",
        "seg_flow-encoder_efficientnet_lite0_unet_all_n16_seed0",
        "seg_flow-encoder_efficientnet_lite0_unet_frozen_n16_seed0",
    ]
    assert any("no luck" in line and "logs/flow_" in line for line in failed)
    assert any(re.search(r"seg_none_\S+ mIoU 12.3 %, about 1 min left", line) for line in lines)
    again = run_all(fake)  # what is done is not done again
    assert again.returncode == 0 and not again.stderr, again.stdout + again.stderr
    assert "11 of 15 jobs are done already" in again.stdout and "[12/15]" in again.stdout
    assert "core.png" in again.stdout and "my runs/index.html" in again.stdout


def test_the_jobs_of_one_stage(fake):
    """Tables go by the names, not by the stage."""
    done = run_all(fake, "core", "pretraining")
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert "[3/3]" in done.stdout and "my runs/index.html" in done.stdout


def test_a_signal_reaches_every_job_and_stops_the_rest(fake):
    command = ["bash", str(ROOT / "run_all.sh")]
    process = subprocess.Popen(
        command, env={**fake, "WAIT": "yes"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    logs = Path(fake["RUNS"], "logs")
    while len(list(logs.glob("*.txt"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    time.sleep(0.5)  # bash sets its trap
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode in (75, -signal.SIGTERM, 128 + signal.SIGTERM)
    assert len(list(logs.glob("*.txt"))) == 2 and not list(Path(fake["RUNS"]).glob("*/result.json"))
