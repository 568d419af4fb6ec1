"""The examples of FORKING.md apply wherever their context stands, and train."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, read_json, read_log, run_script, smooth_images, write_semantics

CHANGED_LINES = 30  # of the longest example
GUIDE = (ROOT / "FORKING.md").read_text()
TITLES = ("A new loss", "A new encoder", "A new data set", "A new pre-training task")


def example(title: str) -> tuple[str, list[list[str]]]:
    """The diff below a heading of FORKING.md, and the commands that the text gives."""
    _, rest = GUIDE.split(f"\n## {title}\n")
    section, *_ = rest.split("\n## ")
    diff = re.search(r"```diff\n(.*?)```", section, re.DOTALL)
    commands = re.findall(r"^python (.*)$", section, re.MULTILINE)
    return diff[1], [command.split() for command in commands]


def forked(title: str, folder: Path) -> Path:
    """A copy of the repo with an example's diff applied, every file 40 lines longer than it was."""
    compiled = shutil.ignore_patterns("__pycache__")
    for name in ("tools", "splits"):
        shutil.copytree(ROOT / name, folder / name, ignore=compiled)
    more = "# another line of one's own\n" * 40
    for path in ROOT.glob("*.py"):
        copy = folder / path.name
        copy.write_text(more + path.read_text())
    diff, _ = example(title)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=folder, check=True)
    return folder


def run_forked(folder: Path, command: list[str], *options: object) -> None:
    script, *words = command
    run_script(str(folder / script), *words, *SMALL, "--steps", 1, *options)


def import_forked(path: Path):
    spec = importlib.util.spec_from_file_location(f"forked_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_example_is_short_and_has_a_test():
    headings = re.findall(r"^## (A new .*)$", GUIDE, re.MULTILINE)
    assert tuple(headings) == TITLES
    for title in TITLES:
        diff, commands = example(title)
        changed = re.findall(r"^[-+](?!\+\+ |-- )", diff, re.MULTILINE)
        assert 0 < len(changed) <= CHANGED_LINES
        assert commands


@pytest.mark.slow
def test_a_new_loss(tmp_path, world):
    folder = forked("A new loss", tmp_path)
    _, (train, *_) = example("A new loss")
    run_forked(folder, train, "--data_path", world, "--log_dir", tmp_path, "--name", "run")
    (record,) = read_log(tmp_path / "run")
    assert 0 < record["loss"] < 5


def test_the_new_loss_knows_neither_scale_nor_shift(tmp_path):
    losses = import_forked(forked("A new loss", tmp_path) / "losses.py")
    disparity = smooth_images(3, 32, 48)[:, :1]
    target = 0.1 + smooth_images(3, 32, 48, seed=1)[:, :1]  # 1 / depth
    generator = torch.Generator().manual_seed(0)
    measured = torch.rand(3, 1, 32, 48, generator=generator) > 0.3
    measured[2] = False  # an image without any measurement

    def loss(disparity: torch.Tensor, target: torch.Tensor) -> float:
        depth = torch.where(measured, 1 / target, 0)
        terms, _ = losses.scale_and_shift_invariant_loss([disparity], depth, 0.1, 100.0)
        return float(terms["loss"])

    expected = loss(disparity, target)
    assert 0.1 < expected < 2
    same = pytest.approx(expected, rel=1e-3)
    assert loss(7 * disparity - 3, target) == same
    assert loss(disparity, 0.2 * target + 0.5) == same
    unmeasured = disparity.masked_fill(~measured, 50)
    assert loss(unmeasured, target) == same
    assert loss(2 * target + 1, target) < 1e-4
    assert loss(-target, target) > 0.5  # near for far is no solution


@pytest.mark.slow
def test_a_new_encoder(tmp_path, world):
    folder = forked("A new encoder", tmp_path)
    _, commands = example("A new encoder")
    for number, command in enumerate(commands):
        run_forked(
            folder, command, "--data_path", world, "--log_dir", tmp_path, "--name", f"run{number}"
        )
        assert read_json(tmp_path, f"run{number}", "result.json")["step"] == 1


@pytest.mark.slow
def test_a_new_data_set(tmp_path):
    folder = forked("A new data set", tmp_path)
    data = tmp_path / "own"
    training = Path(write_semantics(data, 5, ids=(0, 1, 255)), "training")
    (training / "image_2").rename(data / "images")
    (training / "semantic").rename(data / "labels")
    _, (train, *_) = example("A new data set")
    command = [str(data) if word == "FOLDER" else word for word in train]
    run_forked(folder, command, "--log_dir", tmp_path, "--name", "run")
    assert list(read_json(tmp_path, "run", "result.json")["iou"]) == ["other", "road"]


@pytest.mark.slow
def test_a_new_pretraining_task(tmp_path, world):
    """Trains, shows its pictures, and gives weights that fine-tuning starts from."""
    folder = forked("A new pre-training task", tmp_path)
    _, (train, tune, *_) = example("A new pre-training task")
    shared = ("--data_path", world, "--log_dir", tmp_path)
    run_forked(folder, train, *shared, "--name", "run")
    assert (tmp_path / "run" / "samples" / "000001.png").exists()
    command = [str(tmp_path / "run") if word == "runs/NAME" else word for word in tune]
    run_forked(folder, command, *shared, "--name", "tuned")
    assert read_json(tmp_path, "tuned", "result.json")["pretraining"].startswith(
        "Colour on synthetic"
    )
