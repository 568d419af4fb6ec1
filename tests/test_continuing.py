"""What a run continues with, and what it refuses.

    python -m pytest tests/test_continuing.py
"""

import os
import re
import shutil
import sys
from pathlib import Path

import make_data
import pytest
import torch
from conftest import (
    SMALL,
    assert_one_line,
    assert_same_runs,
    call,
    frames_run,
    run_script,
    stop_after,
    write_frames,
    write_image,
)

import batches
import evaluate
import train_depth
import train_seg
import utils
import weights


@pytest.mark.parametrize("module", (train_depth, train_seg))
def test_a_run_continues_with_its_own_options_only(tmp_path, monkeypatch, module):
    """Every option of both scripts but those in MAY_CHANGE."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--log_dir", str(tmp_path)])
    args = module.parse_options()
    for option, value in vars(args).items():
        then = {"args": {**vars(args), option: "another"}, "step": 1, "log_size": 0}
        monkeypatch.setattr(utils, "read_last", lambda *_, then=then, **__: then)
        if option in utils.MAY_CHANGE:
            utils.Run(args, "", args)
        else:
            words = re.escape(f"--{option} another there, {value} now")
            with pytest.raises(utils.InputError, match=words):
                utils.Run(args, "", args)


def test_other_options_are_refused_and_moved_data_continue(unfinished, small_run):
    options, run = unfinished
    refused = call(train_depth, *options, "--learning_rate", 3e-4, "--num_workers", 1)
    assert_one_line(refused, "--learning_rate 0.0001 there, 0.0003 now", str(run))
    assert "num_workers" not in refused.err
    moved = shutil.copytree(small_run / "video", run.parent / "moved")
    call(train_depth, *options, "--data_path", f"{moved}/", expect=0)
    assert_same_runs(run, small_run / "runs" / "run")


@pytest.mark.parametrize("change", ("name", "content", "number"))
def test_other_data_are_refused(unfinished, small_run, change):
    """A run goes on with moved data, but not with another video, whose run may have its name."""
    options, run = unfinished
    other = Path(write_frames(run.parent / "other", 4 if change == "number" else 3, "png"))
    if change == "content":
        write_image(other / "frame2.png", seed=9)
    if change == "name":
        for number in (1, 2, 3):
            (other / f"frame{number}.png").rename(other / f"frame{10 + number}.png")
    refused = call(train_depth, *options, "--data_path", other)
    assert_one_line(refused, "--data_files", str(run))


def write_associations(folder: Path, depths: list[int]) -> None:
    """Four images, each with the depth of the frame of this number."""
    lines = [f"{time} {time}.png {time} depth/{depth}.png" for time, depth in enumerate(depths)]
    make_data.write_text(folder / "associations.txt", "\n".join(lines))


@pytest.mark.parametrize("change", ("intrinsics", "depth"))
def test_other_geometry_is_refused(tmp_path, monkeypatch, change):
    """The same images with other intrinsics, or with other frames' depth."""
    video = tmp_path / "video"
    make_data.write_frames(video, [f"{number}.png" for number in range(4)])
    for number in range(4):
        make_data.write_depth(video / "depth" / f"{number}.png", 3 + number)
    options = [*SMALL, "--data", "frames", "--data_path", video, "--log_dir", tmp_path]
    options += ["--name", "run", "--steps", 3]
    if change == "depth":
        write_associations(video, [0, 1, 2, 3])
        options += ["--supervision", "depth"]
    stop_after(1, monkeypatch)
    call(train_depth, *options, expect=utils.STOPPED)
    monkeypatch.undo()
    if change == "depth":
        write_associations(video, [3, 2, 1, 0])
    else:
        make_data.write_text(video / "intrinsics.txt", "70 70 47.5 31.5")
    assert_one_line(call(train_depth, *options), "--data_files")


@pytest.mark.parametrize("module", (train_depth, train_seg))
def test_a_file_that_cannot_be_read_loses_no_step(tmp_path, runs, monkeypatch, module):
    """What was trained until then is kept; with the file repaired, the run ends as one without a fault."""
    folder, options = (
        (runs.pretrained("depth"), runs.pretraining_options("depth", tmp_path))
        if module is train_depth
        else (runs.fine_tuned("all"), runs.fine_tuning_options("all", tmp_path))
    )
    finish = batches.finish

    def fails_later(*arguments):
        stream = finish(*arguments)
        yield next(stream)
        raise utils.InputError("0050.jpg: the file is truncated")

    monkeypatch.setattr(batches, "finish", fails_later)
    assert_one_line(call(module, *options), "0050.jpg: the file is truncated")
    monkeypatch.undo()
    name = Path(folder).name
    assert utils.read_last(f"{tmp_path / name}/last.pt")["step"] == 1
    call(module, *options, expect=0)
    assert_same_runs(tmp_path / name, folder)


def test_a_lost_model_is_written_again(small_run, tmp_path):
    runs = shutil.copytree(small_run / "runs", tmp_path / "runs")
    os.remove(runs / "run" / "model.pt")
    options = [*frames_run(small_run, "--steps", 3, "--save_every", 1), "--log_dir", runs]
    call(train_depth, *options, expect=0)
    assert_same_runs(runs / "run", small_run / "runs" / "run")


def test_another_network_in_the_place_of_the_start_is_refused(tmp_path, runs, monkeypatch):
    """Weights go on from last.pt, so result.json would name a pre-training that they do not have."""
    options = runs.fine_tuning_options("all", tmp_path)
    stop_after(1, monkeypatch)
    call(train_seg, *options, expect=utils.STOPPED)
    monkeypatch.undo()
    monkeypatch.setattr(weights, "name_pretraining", lambda init: "Depth on another drive")
    assert_one_line(call(train_seg, *options), "--pretraining", "Depth on another drive now")


def test_a_start_may_end_in_a_slash(unfinished, small_run):
    _, run = unfinished
    options = [*frames_run(small_run, "--steps", 1), "--log_dir", run.parent, "--name", "next"]
    call(train_depth, *options, "--init", run, expect=0)
    assert "finished already" in call(train_depth, *options, "--init", f"{run}/", expect=0).out


@pytest.mark.parametrize(
    "error",
    (
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
        PermissionError(13, "Permission denied", "/out"),
        FileNotFoundError(2, "No such file or directory", "out/picture.png"),
        OSError(30, "Read-only file system", "/out"),
        OSError(36, "File name too long", "/out"),
        OSError(28, "No space left on device", "/out"),
    ),
)
def test_what_the_machine_refuses_ends_in_one_line(monkeypatch, small_run, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(train_depth, "make_dataset", fail)
    assert_one_line(call(train_depth, *frames_run(small_run)), str(error).split()[0])


def test_a_name_that_a_terminal_cannot_show(tmp_path):
    write_frames(tmp_path / "vidéo", 4)
    options = [*SMALL, "--data", "frames", "--data_path", tmp_path / "vidéo", "--fov", 60]
    options += ["--steps", 1, "--log_dir", tmp_path, "--name", "run"]
    result = run_script("train_depth.py", *options, PYTHONIOENCODING="ascii:strict")
    assert "vid\\xe9o" in result.out


def test_output_below_a_file_is_refused(small_run):
    file = small_run / "video" / "frame1.png"
    options = ["--weights", small_run / "runs" / "run", "--output", file / "out"]
    assert_one_line(call(evaluate, "predict", file, *options), "frame1.png")


def test_a_start_from_an_unfinished_run_says_so(unfinished, small_run):
    _, run = unfinished
    options = [*frames_run(small_run, "--steps", 1), "--log_dir", run.parent, "--name", "next"]
    result = call(train_depth, *options, "--init", run, expect=0)
    assert "of an unfinished run, step 3" in result.out
    result = call(train_depth, *options, "--init", small_run / "runs" / "run", "--name", "last", expect=0)
    assert "unfinished" not in result.out


def test_other_options_are_refused_without_a_checkpoint(small_run, tmp_path):
    runs = shutil.copytree(small_run / "runs", tmp_path / "runs")
    for name in ("last.pt", "last.pt.1"):
        (runs / "run" / name).unlink(missing_ok=True)
    options = [*frames_run(small_run, "--steps", 3, "--save_every", 1), "--log_dir", runs]
    call(train_depth, *options, expect=0)
    refused = call(train_depth, *options, "--learning_rate", 3e-4)
    assert_one_line(refused, "--learning_rate", "0.0003 now")
    (runs / "run" / "args.json").write_text("{")  # says nothing
    assert "finished already" in call(train_depth, *options, expect=0).out


def test_identity_of_data_does_not_depend_on_their_place(tmp_path, monkeypatch):
    write_frames(tmp_path / "one" / "a")
    write_frames(tmp_path / "one" / "b", 3)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    identities = set()
    for root in ("one", "two/", str(tmp_path / "one")):
        identities.add(make_data.clips("frames", root).identity())
    assert len(identities) == 1
    mixed = make_data.clips("frames", "one")
    mixed.samples[0]["images"][0] = os.path.abspath(mixed.samples[0]["images"][0])
    assert {mixed.identity()} == identities
