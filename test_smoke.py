"""Run first after any change: every script end to end, resume, an error each. Under a minute.

    python -m pytest -q test_smoke.py

Properties are tested in tests/: losses, data, weights, metrics, runs, errors.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    FINE_TUNING,
    PRETRAINING,
    ROOT,
    SMALL,
    assert_one_line,
    assert_same_runs,
    call,
    fresh_signals,
    read_json,
    read_log,
    read_weights,
    runs,
    shared_folder,
    world,
    write_image,
)
from PIL import Image

import evaluate
import networks
import train_depth
import train_seg
import utils
from metrics import DEPTH_METRICS

# ------------------------------------------------------------ pre-training


def assert_run_folder(folder: str, steps: int) -> None:
    """Everything that a finished run leaves behind."""
    described = read_json(folder, "args.json")
    assert {"script", "command", "options"} <= set(described)
    assert described["options"]["steps"] == steps
    assert read_json(folder, "result.json")["step"] == steps
    assert utils.read_tensors(f"{folder}/last.pt")["step"] == steps

    pictures = sorted(Path(folder, "samples").iterdir())
    assert pictures[0].name == "000001.png" and pictures[-1].name == f"{steps:06d}.png"
    assert np.asarray(Image.open(pictures[-1])).std() > 5

    records = [record for record in read_log(folder) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    for record in records:
        assert {"learning_rate", "ms_per_step", "ms_data", "samples_per_s"} <= set(record)
    assert not list(Path(folder).glob("*.tmp"))


@pytest.mark.parametrize("kind", PRETRAINING)
def test_pretraining(runs, kind):
    options, terms = PRETRAINING[kind]
    folder = runs.pretrained(kind)
    steps = options[options.index("--steps") + 1]
    assert_run_folder(folder, steps)
    for record in read_log(folder):
        assert terms <= set(record)
        assert np.isfinite(list(record.values())).all()

    saved = read_weights(folder)
    assert any(name.startswith("pose.") for name in saved) == ("mono" in kind)
    words = [str(option) for option in runs.pretraining_options(kind, runs.folder)]
    start, _ = train_depth.build(train_depth.parse_options(words), torch.device("cpu"))
    for part, module in start.parts().items():
        for name, parameter in module.named_parameters():
            change = (parameter - saved[f"{part}.{name}"]).abs().max()
            assert 0 < change < 1e-3, name  # everything trains, in steps of Adam


def test_the_learning_rate_drops(runs):
    """Ten times lower after three quarters of the steps, or wherever the options say."""
    rates = [record["learning_rate"] for record in read_log(runs.pretrained("mono"))]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-4, 1e-5])
    drops = ["--learning_rate_drop", "0.5", "0.75", "--learning_rate_factor", "0.5", "0.25"]
    args = train_depth.parse_options([*drops, "--steps", "4"])
    assert [train_depth.learning_rate(args, step) for step in range(4)] == pytest.approx(
        [1e-4, 1e-4, 5e-5, 2.5e-5]
    )


@pytest.mark.parametrize("module", (train_depth, train_seg))
def test_a_stopped_run_continues(runs, tmp_path, monkeypatch, module):
    """Stopped after the second step as by a signal; the same command ends with the same bits."""
    if module is train_depth:
        folder, options = runs.pretrained("depth"), runs.pretraining_options("depth", tmp_path)
    else:
        folder, options = runs.fine_tuned("all"), runs.fine_tuning_options("all", tmp_path)
    log = utils.Run.log

    def stop_after_two(run, record):
        log(run, record)
        run.signalled |= record["step"] == 1 and "loss" in record  # asked again in the second step

    with monkeypatch.context() as patch:
        patch.setattr(utils.Run, "log", stop_after_two)
        call(module, *options, expect=utils.STOPPED)
    call(module, *options, "--resume", expect=0)
    assert_same_runs(tmp_path / Path(folder).name, folder)
    assert "finished" in call(module, *options, expect=0).out


# ------------------------------------------------------------ fine-tuning


@pytest.mark.parametrize("kind", FINE_TUNING)
def test_fine_tuning(runs, kind):
    folder = runs.fine_tuned(kind)
    assert_run_folder(folder, 4 if kind == "all" else 2)
    result = read_json(folder, "result.json")
    source, _ = FINE_TUNING[kind]
    expected = "None"
    if source:
        options = utils.read_tensors(f"{runs.pretrained(source)}/model.pt")["options"]
        name = {"mono": "Depth-Rand (mono)", "flow": "Flow"}[source]
        size = f"{options['samples']} samples, 96x64, {options['steps']} steps"
        expected = f"{name} on synthetic ({size})"
    assert result["pretraining"] == expected
    assert 0 <= result["miou"] <= 100 and 0 <= result["pixel_accuracy"] <= 100
    assert result["images"] == 5  # 36 % of twelve, rounded up
    evaluations = [record for record in read_log(folder) if "miou" in record]
    assert evaluations[-1]["miou"] == result["miou"]


@pytest.mark.parametrize("kind", ("frozen", "all", "encoder"))
def test_a_frozen_encoder_stays_as_it_was(runs, kind):
    """Bit by bit, batch-norm statistics included. Without freezing, everything moves."""
    before = read_weights(runs.pretrained("mono"))
    after = read_weights(runs.fine_tuned(kind))
    encoder = [name for name in after if name.startswith("encoder.")]
    moved = [name for name in encoder if not torch.equal(after[name], before[name])]
    assert moved == ([] if kind == "frozen" else encoder)
    block = "decoder.decoder.9.conv.conv.weight"
    assert not torch.equal(after[block], before[block])


ARCHITECTURES = (
    "--arch deeplabv3 --optimizer sgd --schedule poly --crop 64 64 --eval_mode slide",
    "--encoder efficientnet_lite0 --jitter 0.5 --scale 0.5 2 --crop 64 64 --clip_gradients 1",
    "--arch dpt --encoder vit_s16 --optimizer adamw --warmup_steps 1 --width 64",
    "--arch linear --calibrate_batch_norm",
)


@pytest.mark.parametrize("options", ARCHITECTURES)
def test_every_architecture(monkeypatch, world, tmp_path, options):
    """Fine-tunes, and evaluate.py finds the score that training reported."""
    monkeypatch.setitem(networks.VITS, "vit_s16", (16, 5, 6, 384))  # five blocks instead of twelve
    shared = ("--data_path", world, *SMALL, "--steps", 1, "--log_dir", tmp_path, "--name", "run")
    call(train_seg, *shared, *options.split(), expect=0)
    folder = tmp_path / "run"
    call(evaluate, "seg", "--weights", folder, "--data_path", world, "--output", folder, expect=0)
    again = read_json(folder, "segmentation.json")
    assert again["miou"] == pytest.approx(read_json(folder, "result.json")["miou"], abs=1e-4)


# ------------------------------------------------------------ evaluate.py


@pytest.mark.parametrize("kind", ("mono", "stereo"))
def test_evaluate_depth(runs, tmp_path, kind):
    """Monocular networks by the ratio of medians, metric ones as they are."""
    data = ("--data", "synthetic", "--data_path", runs.world, "--frames", "0:4")
    weights = runs.pretrained(kind)
    result = call(evaluate, "depth", "--weights", weights, *data, "--output", tmp_path, expect=0)
    scores = read_json(tmp_path, "depth.json")
    assert scores["images"] == 8
    assert scores["scale"] == ("median" if kind == "mono" else 1)
    for metric in DEPTH_METRICS:
        assert f"{scores[metric]:.4f}" in result.out


def test_evaluate_seg(runs, tmp_path):
    """A saved segmenter scores what its training reported."""
    folder = runs.fine_tuned("all")
    data = ("--data_path", runs.world)
    call(evaluate, "seg", "--weights", folder, *data, "--output", tmp_path, expect=0)
    scores = read_json(tmp_path, "segmentation.json")
    trained = read_json(folder, "result.json")
    assert scores["miou"] == pytest.approx(trained["miou"], abs=1e-4)
    assert scores["cross_entropy"] == pytest.approx(trained["cross_entropy"], rel=1e-5)


@pytest.mark.parametrize("kind", ("depth", "segmentation"))
def test_predict(runs, tmp_path, kind):
    """Pictures of any size, each at its own size."""
    folder = runs.pretrained("mono") if kind == "depth" else runs.fine_tuned("all")
    sizes = {"a": (133, 75), "b": (50, 33)}
    for name, (width, height) in sizes.items():
        write_image(tmp_path / f"{name}.png", height, width)
    pictures = [tmp_path / f"{name}.png" for name in sizes]
    call(
        evaluate, "predict", *pictures, "--weights", folder, "--output", tmp_path / "out", expect=0
    )
    for name, size in sizes.items():
        made = sorted((tmp_path / "out").glob(f"{name}*.png"))
        assert len(made) == 2  # in colour, and as numbers
        assert {Image.open(path).size for path in made} == {size}


@pytest.mark.parametrize("command", ("grid", "gradcam"))
def test_pictures_of_several_models(runs, tmp_path, command):
    models = (runs.fine_tuned("none"), runs.fine_tuned("all"))
    output = tmp_path / "picture.png"
    call(
        evaluate,
        command,
        "--weights",
        *models,
        "--data_path",
        runs.world,
        "--output",
        output,
        expect=0,
    )
    picture = np.asarray(Image.open(output))
    assert picture.shape[1] > 4 * 96 and picture.std() > 5  # image, label, two models


# ------------------------------------------------------------ tools


def tool(name: str):
    return importlib.import_module(f"tools.{name}")


def test_street(tmp_path):
    """The same bytes from the same command; an existing world is not overwritten."""
    size = ("--drives", 1, "--frames", 1, "--labelled", 1, "--height", 64, "--width", 64)
    for name in ("one", "two"):
        call(tool("street"), "--data_path", tmp_path / name, *size, expect=0)
    files = [
        path.relative_to(tmp_path / "one")
        for path in (tmp_path / "one").rglob("*.*")
        if path.is_file()
    ]
    assert len(files) > 5
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert_one_line(call(tool("street"), "--data_path", tmp_path / "one", *size), "exists")


@pytest.mark.parametrize(
    "options", (("--labels",), ("--frame_ids", 0, -1, 1)), ids=("labels", "clips")
)
def test_check_data(world, tmp_path, options):
    sheet = tmp_path / "contact.png"
    data = ("--data", "synthetic", "--data_path", world, "--height", 64, "--width", 128)
    call(tool("check_data"), *data, *options, "--output", sheet, expect=0)
    assert Image.open(sheet).width > 128


def test_tables(runs):
    miou = read_json(runs.fine_tuned("none"), "result.json")["miou"]
    result = call(tool("tables"), "--log_dir", runs.folder, "--figures", "--page", expect=0)
    assert f"{miou:.1f}" in result.out
    assert Path(runs.folder, "index.html").exists()


# ------------------------------------------------------------ as a user starts them


def test_help_and_an_error_of_each_script(tmp_path):
    scripts = ("train_depth", "train_seg", "evaluate")
    tools = [f"tools.{path.stem}" for path in ROOT.glob("tools/*.py")]
    for name in (*scripts, *tools):
        module = importlib.import_module(name)
        if hasattr(module, "main"):
            assert "usage:" in call(module, "--help", expect=0).out
            assert_one_line(call(module, "--no_such_option"))


def test_from_the_shell(tmp_path):
    """A script in a process of its own, from another folder: exit code 2 and one line."""
    command = [sys.executable, str(ROOT / "train_depth.py"), "--data", "kitti"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_run_all_lists_its_experiments():
    command = ["bash", str(ROOT / "run_all.sh"), "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert listing.count("train_depth.py") > 1 and listing.count("train_seg.py") > 5
