"""Runs that are killed, stopped, shared among processes, on a full disk, or begun by older code.

    python -m pytest tests/test_runs.py
    KILLS=20 python -m pytest tests/test_runs.py -k killed     # more kills for every task
"""

import contextlib
import itertools
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import make_data
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    PRETRAINING,
    ROOT,
    SMALL,
    assert_one_line,
    assert_same_runs,
    call,
    frames_run,
    read_json,
    read_log,
    read_losses,
    read_weights,
    stop_after,
    truncate,
    write_frames,
    write_png,
    write_semantics,
)

import evaluate
import networks
import train_depth
import train_seg
import utils
import weights
from tools import tables

KILLS = int(os.environ.get("KILLS", "2"))  # for each task
MANY_STEPS = int(os.environ.get("MANY_STEPS", "60"))
SCRIPTS = {"train_depth.py": train_depth, "train_seg.py": train_seg}
TASKS = ("mono", "stereo", "depth", "flow", "reconstruction", "segmentation")

# ------------------------------------------------------------ scripts as processes

# torch is imported once, in a process that forks the others
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_runs"])


class Process:
    """A script in a process of its own, leader of a process group; what it prints goes to a file.

    environment: variables that torchrun would set; fixed_statistics: see `use_fixed_statistics`.
    """

    def __init__(
        self,
        script: str,
        options: list,
        output: Path,
        environment: dict,
        fixed_statistics: bool = False,
    ):
        self.output = output
        words = [str(option) for option in options]
        arguments = (script, words, str(output), environment, fixed_statistics)
        self.process = FORKS.Process(target=run_forked, args=arguments)
        self.process.start()
        self.pid = self.process.pid
        STARTED.append(self)

    def wait(self, seconds: float = 120) -> int:
        """The exit code; a process that takes longer is killed."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        return self.process.exitcode

    def wait_for(self, condition) -> None:
        """Wait until a condition holds or the process has ended."""
        deadline = time.monotonic() + 120
        while not condition() and self.process.is_alive():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.005)

    def wait_for_records(self, folder: Path, count: int) -> None:
        self.wait_for(lambda: count_lines(folder / "log.jsonl") >= count)

    def text(self) -> str:
        return self.output.read_text()


STARTED: list[Process] = []


@pytest.fixture(autouse=True)
def no_process_left():
    """Kill what a failed test leaves running."""
    yield
    while STARTED:
        STARTED.pop().wait(0)


def run_forked(
    script: str, options: list[str], output: str, environment: dict, fixed_statistics: bool
) -> None:
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if fixed_statistics:
        use_fixed_statistics()
    sys.argv = [script, *options]
    utils.run_main(SCRIPTS[script].main)


def use_fixed_statistics() -> None:
    """Batch norm over a share of a batch is another function than over the whole, so take it out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)

    torch.nn.BatchNorm2d.forward = forward


def launch(script: str, options: list, folder: Path) -> Process:
    folder.mkdir(parents=True, exist_ok=True)
    return Process(script, options, folder / "output.txt", {})


def launch_two(
    script: str, options: list, folder: Path, fixed_statistics: bool = False
) -> list[Process]:
    """Two processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number in (0, 1):
        environment = {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        output = folder / f"rank{number}.txt"
        started.append(Process(script, options, output, environment, fixed_statistics))
    return started


def count_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def training(kind: str, runs, log_dir: Path) -> tuple[str, str, list]:
    """Script, finished reference run and options of one of TASKS."""
    if kind == "segmentation":
        return "train_seg.py", runs.fine_tuned("all"), runs.fine_tuning_options("all", log_dir)
    return "train_depth.py", runs.pretrained(kind), runs.pretraining_options(kind, log_dir)


# ------------------------------------------------------------ the same bits


@pytest.mark.parametrize("kind", ("mono", "depth", "flow", "reconstruction", "segmentation"))
def test_a_run_killed_before_its_result(tmp_path, runs, kind):
    """All steps are done and saved; the same command adds result.json as it would have been."""
    script, reference, options = training(kind, runs, tmp_path)
    run = Path(shutil.copytree(reference, tmp_path / Path(reference).name))
    (run / "result.json").unlink()
    call(SCRIPTS[script], *options, expect=0)
    assert read_json(run, "result.json") == read_json(reference, "result.json")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_a_killed_run_continues_bit_for_bit(tmp_path, runs, kind):
    """SIGKILL at random moments, with zero, one or two loader processes."""
    script, reference, options = training(kind, runs, tmp_path)
    options = [*options, "--save_every", 3 if kind == "mono" else 1]
    folder = tmp_path / Path(reference).name
    steps = read_json(reference, "result.json")["step"]
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 100_000))
    print("KILL_SEED", seed)
    draw = np.random.default_rng(seed)
    kills = 0
    while kills < KILLS:
        process = launch(script, [*options, "--num_workers", kills % 3], tmp_path)
        process.wait_for_records(folder, draw.integers(steps + 1))
        time.sleep(draw.uniform(0, 0.5))
        process.wait(0)
        if (folder / "result.json").exists():  # it was faster: start anew
            shutil.rmtree(folder)
        else:
            kills += 1
    process = launch(script, [*options, "--num_workers", kills % 3], tmp_path)
    assert process.wait() == 0, process.text()
    assert_same_runs(folder, reference)


@pytest.mark.parametrize("kind", ("mono", "segmentation"))
def test_a_stopped_run_saves_and_continues(tmp_path, runs, kind):
    """SIGTERM: exit code 75 with everything saved; the same command then ends with the same bits."""
    script, reference, options = training(kind, runs, tmp_path)
    folder = tmp_path / Path(reference).name
    process = launch(script, options, tmp_path)
    process.wait_for_records(folder, 1)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == utils.STOPPED, process.text()
    step = utils.read_last(str(folder / "last.pt"))["step"]
    assert f"stopped at step {step}" in process.text()
    assert 0 < step < read_json(reference, "result.json")["step"]
    assert (folder / "model.pt").exists() and not (folder / "result.json").exists()

    result = call(SCRIPTS[script], *options, "--resume", "--num_workers", 2, expect=0)
    assert f"continues at step {step}" in result.out
    assert_same_runs(folder, reference)


def test_the_same_command_gives_the_same_weights(tmp_path, runs):
    call(train_depth, *runs.pretraining_options("stereo", tmp_path), expect=0)
    assert_same_runs(tmp_path / "stereo", runs.pretrained("stereo"))


def test_loader_processes_and_the_cache_change_nothing(tmp_path, runs):
    reference = runs.pretrained("mono+stereo")
    variants = {"workers": ("--num_workers", 2), "cache": ("--cache", tmp_path / "cache")}
    for name, options in variants.items():
        call(
            train_depth,
            *runs.pretraining_options("mono+stereo", tmp_path / name),
            *options,
            expect=0,
        )
        assert_same_runs(tmp_path / name / "mono+stereo", reference)


def test_learned_intrinsics_continue(tmp_path, monkeypatch):
    """Each folder's camera starts from --fov; a stopped run ends with the same bits."""
    for name in ("one", "two"):
        write_frames(tmp_path / "videos" / name, 4, intrinsics=None)
    data = ("--data", "frames", "--data_path", tmp_path / "videos", "--fov", 90)
    learned = ("--intrinsics", "learned", "--learning_rate", 1e-3)
    options = (*data, *SMALL, *learned, "--steps", 4, "--log_dir", tmp_path)
    through = call(train_depth, *options, "--name", "through", expect=0)
    cameras = read_json(tmp_path, "through", "result.json")["cameras"]
    assert [Path(folder).name for folder in cameras] == ["one", "two"]
    for folder, camera in cameras.items():
        focal = camera["native"]["fx"]
        assert f"{folder}: fx {focal:.1f}" in through.out
        assert 0 < abs(focal - 48) < 20  # 90 degrees over 96 pixels is 48
    for record in read_log(tmp_path / "through"):
        assert {"fx", "fy", "cx", "cy"} <= record.keys()

    stop_after(1, monkeypatch)
    call(train_depth, *options, "--name", "stopped", expect=utils.STOPPED)
    monkeypatch.undo()
    call(train_depth, *options, "--name", "stopped", expect=0)
    assert_same_runs(tmp_path / "stopped", tmp_path / "through")
    assert "intrinsics.focal" in read_weights(tmp_path / "through")


def test_dropout_continues(tmp_path, monkeypatch):
    """What a network draws itself follows from seed and step, too."""
    write_frames(tmp_path / "video", 4, "png")
    task = ("--task", "reconstruction", "--arch", "deeplabv3", "--batch_size", 2, "--steps", 3)
    options = frames_run(tmp_path, *task)
    call(train_depth, *options, "--name", "through", expect=0)
    stop_after(1, monkeypatch)
    call(train_depth, *options, "--name", "stopped", expect=utils.STOPPED)
    monkeypatch.undo()
    torch.rand(5)  # the global generator stands somewhere else
    call(train_depth, *options, "--name", "stopped", expect=0)
    assert_same_runs(tmp_path / "runs" / "stopped", tmp_path / "runs" / "through")


def test_moments_continue_in_the_memory_format_of_a_gpu(monkeypatch, unfinished):
    """Fused Adam takes moments and parameters in one format alone, and a GPU has channels_last."""
    options, _ = unfinished
    prepare = utils.prepare
    step = torch.optim.Adam.step
    formats = []

    def as_on_a_gpu(module, *more):
        return prepare(module.to(memory_format=torch.channels_last), *more)

    def look_and_step(optimizer, *more):
        for parameter, moments in optimizer.state.items():
            formats.append(moments["exp_avg"].stride() == parameter.stride())
        return step(optimizer, *more)

    monkeypatch.setattr(utils, "prepare", as_on_a_gpu)
    monkeypatch.setattr(torch.optim.Adam, "step", look_and_step)
    call(train_depth, *options, expect=0)
    assert len(formats) > 50 and all(formats)


@pytest.mark.parametrize("kind", ("stereo", "segmentation"))
def test_a_finished_run_says_so(tmp_path, runs, kind):
    script, reference, options = training(kind, runs, tmp_path)
    copy = shutil.copytree(reference, tmp_path / Path(reference).name)
    before = {path: path.stat().st_mtime_ns for path in copy.glob("*.*")}
    result = call(SCRIPTS[script], *options, expect=0)
    assert "finished" in result.out
    assert before == {path: path.stat().st_mtime_ns for path in before}


# ------------------------------------------------------------ signals, locks, lost processes


SIGNALS = {  # name -> the signals, and the seconds before each
    "Ctrl-C": [(0, signal.SIGINT)],
    "a scheduler": [(0, signal.SIGTERM)],
    "a closed terminal": [(0, signal.SIGHUP)],
    "passed on by a launcher": [(0, signal.SIGTERM), (0.2, signal.SIGTERM)],
    "Ctrl-C, passed on as another": [(0, signal.SIGINT), (0.2, signal.SIGTERM)],
    "impatient": [(0, signal.SIGINT), (1.5, signal.SIGTERM)],
}


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_to_the_whole_group(tmp_path, name):
    """To loader processes, too. What comes along with the first is no second one, which ends at once."""
    write_frames(tmp_path / "video", 3)
    # large enough that a step still runs when the second signal comes
    size = ("--height", 512, "--width", 1024) if name == "impatient" else ()
    options = frames_run(tmp_path, "--steps", 1000, "--num_workers", 2, *size)
    process = launch("train_depth.py", options, tmp_path)
    process.wait_for_records(tmp_path / "runs" / "run", 1)
    for pause, number in SIGNALS[name]:
        time.sleep(pause)
        os.killpg(process.pid, number)
    if name == "impatient":
        assert process.wait() == -signal.SIGTERM
    else:
        assert process.wait() == utils.STOPPED, process.text()
        step = utils.read_last(f"{tmp_path}/runs/run/last.pt")["step"]
        assert f"stopped at step {step}" in process.text()
    assert "Traceback" not in process.text()


def test_a_run_under_nohup_outlives_its_terminal(tmp_path, monkeypatch):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        log = utils.Run.log

        def hang_up(run, record):
            log(run, record)
            os.kill(os.getpid(), signal.SIGHUP)

        monkeypatch.setattr(utils.Run, "log", hang_up)
        write_frames(tmp_path / "video", 3)
        call(train_depth, *frames_run(tmp_path, "--steps", 2), expect=0)
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_two_runs_of_one_name_and_a_lost_loader_process(tmp_path):
    """The second run is refused. A killed loader process ends the run with code 1; the checkpoint stays."""
    write_frames(tmp_path / "video", 3)
    options = frames_run(tmp_path, "--steps", 1000, "--save_every", 1, "--num_workers", 1)
    process = launch("train_depth.py", options, tmp_path)
    checkpoint = tmp_path / "runs" / "run" / "last.pt"
    process.wait_for(checkpoint.exists)
    assert_one_line(call(train_depth, *options), f"{tmp_path}/runs/run", "another process")

    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(int(children.split()[0]), signal.SIGKILL)
    assert process.wait() == 1, process.text()
    assert "worker" in process.text().splitlines()[-1]
    assert utils.read_last(str(checkpoint))["step"] >= 1


# ------------------------------------------------------------ damaged files, a full disk


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


class Bomb:
    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


DAMAGES = {
    "cut": lambda path: truncate(path, 0.7),
    "empty": lambda path: truncate(path, 0),
    "flipped": flip_a_bit,
    "bomb": lambda path: torch.save({"step": Bomb(path.parent / "executed")}, path),
    "something else": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "gone": os.remove,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, small_run, damage):
    """A line names it; if the older is damaged too, the user is asked."""
    run = shutil.copytree(small_run / "runs" / "run", tmp_path / "run")
    last = run / "last.pt"
    DAMAGES[damage](last)
    assert utils.read_last(str(last))["step"] == 2
    assert damage == "gone" or str(last) in capsys.readouterr().out
    if damage != "gone":
        DAMAGES[damage](last)
        with pytest.raises(utils.InputError, match=f"{last}.*delete it to start again"):
            utils.read_last(str(last))
    assert not (run / "executed").exists()


def test_continuing_from_the_checkpoint_before_ends_the_same(unfinished, small_run):
    options, run = unfinished
    shutil.copy(small_run / "runs" / "run" / "last.pt", run / "last.pt.1")
    (run / "last.pt").rename(run / "older")
    (run / "last.pt.1").rename(run / "last.pt")
    (run / "older").rename(run / "last.pt.1")
    truncate(run / "last.pt", 0.7)
    result = call(train_depth, *options, "--resume", expect=0)
    assert f"{run}/last.pt" in result.out
    assert_same_runs(run, small_run / "runs" / "run")


def test_a_full_disk_leaves_the_checkpoint(unfinished, small_run):
    """A limit on the size of files has the effect of a full disk. Loader processes end with the run."""
    options, run = unfinished
    before = (run / "last.pt").read_bytes()
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    words = [str(option) for option in options]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_depth.py"), *words, "--num_workers", "2"],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    last_line = done.stderr.strip().splitlines()[-1]
    assert f"error: could not write {run}/model.pt" in last_line and "File too large" in last_line
    assert (run / "last.pt").read_bytes() == before
    assert not list(run.glob("*.tmp"))
    call(train_depth, *options, expect=0)
    assert_same_runs(run, small_run / "runs" / "run")


def test_a_clock_set_back_harms_nothing(monkeypatch, unfinished, small_run):
    options, run = unfinished
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1.7e9 - 3600 * next(hours))
    call(train_depth, *options, expect=0)
    assert_same_runs(run, small_run / "runs" / "run")


# ------------------------------------------------------------ several processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ("mono", "mono+stereo", "depth", "flow", "reconstruction", "segmentation")
)
def test_two_processes_train_as_one(tmp_path, world, kind):
    """The same losses at every step, whichever process holds the pixels that count."""
    script = "train_seg.py" if kind == "segmentation" else "train_depth.py"
    task = PRETRAINING[kind][0][:2] if kind in PRETRAINING else ()
    size = ["--data_path", world, *SMALL, "--batch_size", 4, "--steps", 3]
    options = [*size, *task, "--log_dir", tmp_path]
    first, second = launch_two(script, [*options, "--name", "two"], tmp_path, fixed_statistics=True)
    assert first.wait() == 0, first.text()
    assert second.wait() == 0, second.text()
    assert second.text() == ""
    output = tmp_path / "one.txt"
    alone = Process(script, [*options, "--name", "one"], output, {}, fixed_statistics=True)
    assert alone.wait() == 0, alone.text()

    expected = read_losses(tmp_path / "one")
    assert len(set(expected)) == 3
    np.testing.assert_allclose(read_losses(tmp_path / "two"), expected, rtol=1e-4)


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_the_run_continues(tmp_path):
    """SIGKILL to one: the other ends with code 1. SIGTERM to one: both stop, saved."""
    write_frames(tmp_path / "video", 3)
    options = frames_run(tmp_path, "--steps", 2000, "--save_every", 1, "--batch_size", 2)
    first, second = launch_two("train_depth.py", options, tmp_path)
    first.wait_for_records(tmp_path / "runs" / "run", 2)
    second.wait(0)
    assert first.wait(60) == 1, first.text()

    first, second = launch_two("train_depth.py", options, tmp_path)
    first.wait_for_records(tmp_path / "runs" / "run", 4)
    os.kill(second.pid, signal.SIGTERM)
    assert [first.wait(60), second.wait(60)] == [utils.STOPPED] * 2, first.text()
    assert "stopped at step" in first.text()


@pytest.mark.slow
def test_torchrun(tmp_path, world):
    """As a user starts it."""
    options = ["--data_path", world, *SMALL, "--steps", 2, "--device", "cpu"]
    options += ["--log_dir", tmp_path, "--name", "run"]
    engine = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *engine, ROOT / "train_seg.py", *options]
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mIoU") == 1
    assert read_json(tmp_path, "run", "result.json")["step"] == 2


@pytest.mark.parametrize(
    ("options", "word"),
    (
        (("--batch_size", 3), "--batch_size 3"),
        (("--arch", "deeplabv3", "--batch_size", 2), "--batch_size 2"),
    ),
    ids=("uneven batch", "one image each"),
)
def test_what_several_processes_refuse(tmp_path, world, options, word):
    shared = ["--data_path", world, *SMALL, "--log_dir", tmp_path / "runs", "--device", "cpu"]
    started = launch_two("train_seg.py", [*shared, *options], tmp_path)
    assert [process.wait() for process in started] == [2, 2]
    (line,) = started[0].text().splitlines()
    assert line.startswith("error: ") and word in line
    assert not (tmp_path / "runs").exists()


def test_a_batch_that_no_label_reaches(tmp_path):
    """Nothing but unlabelled pixels, as in one process's share: the loss is 0 and finite."""
    root = write_semantics(tmp_path / "kitti")
    drawn = make_data.labelled("kitti", root, "train", train=True).pairs
    write_png(drawn[0][1], np.zeros((64, 96), np.uint8))
    options = ("--data", "kitti", "--data_path", root, "--batch_size", 1, "--steps", len(drawn))
    call(train_seg, *SMALL, *options, "--log_dir", tmp_path, "--name", "run", expect=0)
    losses = read_losses(tmp_path / "run")
    assert len(losses) == 2 and min(losses) == 0 < max(losses)


# ------------------------------------------------------------ memory, finite numbers


def resident_memory(pid: int) -> float:
    """MB."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize() / 2**20


@pytest.mark.slow
def test_memory_stays_flat(tmp_path):
    """Resident memory of a run of $MANY_STEPS steps, once warm: the same at its end, within 2 %."""
    write_frames(tmp_path / "video", 3)
    process = launch(
        "train_depth.py", frames_run(tmp_path, "--steps", MANY_STEPS, "--num_workers", 1), tmp_path
    )
    log = tmp_path / "runs" / "run" / "log.jsonl"
    samples = []
    while process.process.is_alive():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, IndexError):
            samples.append((log.stat().st_size, resident_memory(process.pid)))
        time.sleep(0.05)
    assert process.wait() == 0, process.text()
    end = samples[-1][0]
    start = end * min(0.4, 500 / MANY_STEPS)
    warm = max(memory for size, memory in samples if start < size < 0.6 * end)
    late = max(memory for size, memory in samples if size > 0.8 * end)
    print(f"{warm:.0f} MB when warm, {late:.0f} MB at the end of {MANY_STEPS} steps")
    assert late < 1.02 * warm


def depth_network() -> dict:
    """The content of a model.pt of depth, untrained."""
    model = networks.build("unet", "resnet18", 1, scales=(0, 1, 2, 3))
    options = {
        "task": "depth",
        "supervision": "mono",
        "arch": "unet",
        "encoder": "resnet18",
        "height": 64,
        "width": 64,
    }
    return {"options": options, **{name: part.state_dict() for name, part in model.parts().items()}}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    write_frames(tmp_path / "video", 3)
    content = depth_network()
    content["encoder"]["encoder.layer2.0.conv1.weight"] *= 1e38
    torch.save(content, tmp_path / "huge.pt")
    result = call(train_depth, *frames_run(tmp_path, "--init", tmp_path / "huge.pt"), expect=1)
    assert re.search(r"stopped: .* by step 1 \(its samples: \[\d\]\)", result.err)
    assert "Traceback" not in result.err
    assert not list(tmp_path.glob("runs/run/*.pt"))


def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch, unfinished):
    """The loss is finite; the derivative of a root at zero is not. The checkpoint stays as it was."""
    import losses

    real = losses.reconstruction_loss

    def with_a_root(reconstructions, *arguments, **options):
        terms, views = real(reconstructions, *arguments, **options)
        root = (reconstructions[3] * 0).mean().sqrt()
        return {**terms, "loss": terms["loss"] + root}, views

    monkeypatch.setattr(losses, "reconstruction_loss", with_a_root)
    options, run = unfinished
    before = (run / "last.pt").read_bytes()
    result = call(train_depth, *options, expect=1)
    assert re.search(
        r"stopped: gradient of \S*decoder\S* is not finite by step 3 \(its samples: \[", result.err
    )
    assert (run / "last.pt").read_bytes() == before


# ------------------------------------------------------------ runs of older code

OLD_SHARED_OPTIONS = (  # of both scripts in the first edition
    "data data_path height width num_workers cache on_bad_sample arch encoder dpt_layers init init_parts steps "
    "batch_size learning_rate name log_dir seed resume detect tensorboard log_every save_every device amp "
    "memory_format compile sync_bn benchmark"
)
OLD_DEPTH_OPTIONS = (
    "task supervision depth_loss frame_ids intrinsics crop min_depth max_depth frames drives min_motion fov "
    "depth_scale learning_rate_drop learning_rate_factor smoothness no_automask average_sources patches scales"
)
OLD_SEG_OPTIONS = (
    "train_size split_seed crop jitter eval_mode freeze_encoder no_feature_cache freeze_batch_norm_only "
    "normalize_twice encoder_learning_rate_factor optimizer schedule eval_every"
)
OLD_VALUES = {  # of options that went or that looked different
    "on_bad_sample": "stop",
    "detect": False,
    "memory_format": "channels_last",
    "benchmark": None,
    "dpt_layers": "spread",
    "depth_loss": "l1",
    "min_motion": 0,
    "patches": "rectangles",
    "scales": "auto",
    "average_sources": False,
    "no_automask": False,
    "learning_rate_drop": 0.75,
    "learning_rate_factor": 0.1,
    "no_feature_cache": False,
}
OLD_MODEL_OPTIONS = (  # in model.pt
    "task supervision depth_loss arch encoder dpt_layers init height width crop min_depth max_depth data seed metric "
    "samples steps eval_mode normalize_twice classes colours"
)


def rewrite_as_first_edition(run: Path) -> None:
    """Leave in a run folder what the first edition wrote, under its options."""
    seg = run.name.startswith("seg")
    names = f"{OLD_SHARED_OPTIONS} {OLD_SEG_OPTIONS if seg else OLD_DEPTH_OPTIONS}".split()
    last = torch.load(run / "last.pt", weights_only=True)
    last["args"] = {name: OLD_VALUES.get(name, last["args"].get(name)) for name in names}
    torch.save(last, run / "last.pt")
    described = read_json(run, "args.json")
    utils.save_json(
        str(run / "args.json"), {**described, "options": last["args"], "git_commit": None}
    )

    model = torch.load(run / "model.pt", weights_only=True)
    kept = {
        name: model["options"][name]
        for name in OLD_MODEL_OPTIONS.split()
        if name in model["options"]
    }
    if not seg:
        kept |= {"depth_loss": "l1", "dpt_layers": "spread"}
    model["options"] = kept
    assert list(model)[0] == "options"
    torch.save(model, run / "model.pt")


@pytest.mark.parametrize("kind", ("mono", "depth", "flow", "reconstruction", "segmentation"))
def test_a_run_of_the_first_edition_continues(tmp_path, monkeypatch, runs, kind):
    script, reference, options = training(kind, runs, tmp_path)
    stop_after(1, monkeypatch)
    call(SCRIPTS[script], *options, expect=utils.STOPPED)
    monkeypatch.undo()
    run = tmp_path / Path(reference).name
    rewrite_as_first_edition(run)
    call(SCRIPTS[script], *options, "--resume", expect=0)
    assert_same_runs(run, reference)

    other = ("--encoder_learning_rate_factor", 0.5) if kind == "segmentation" else ("--monodepth2",)
    (run / "result.json").unlink()
    rewrite_as_first_edition(run)
    assert_one_line(call(SCRIPTS[script], *options, *other), other[0])


def test_a_run_of_the_first_edition_evaluates_and_initialises(tmp_path, runs):
    depth = Path(shutil.copytree(runs.pretrained("mono"), tmp_path / "mono"))
    seg = Path(shutil.copytree(runs.fine_tuned("all"), tmp_path / "seg_all"))
    for run in (depth, seg):
        rewrite_as_first_edition(run)
        (run / "last.pt").unlink()

    data = ("--data", "synthetic", "--data_path", runs.world)
    call(
        evaluate,
        "depth",
        "--weights",
        depth,
        *data,
        "--frames",
        "0:2",
        "--output",
        tmp_path,
        expect=0,
    )
    call(
        evaluate, "seg", "--weights", seg, "--data_path", runs.world, "--output", tmp_path, expect=0
    )
    trained = read_json(runs.fine_tuned("all"), "result.json")
    assert read_json(tmp_path, "segmentation.json")["miou"] == pytest.approx(
        trained["miou"], abs=1e-4
    )
    call(tables, "--log_dir", tmp_path, expect=0)

    model = networks.build("unet", "resnet18", 1, scales=(0, 1, 2, 3))
    pose = networks.PoseNet("resnet18")
    message = weights.load_weights(model, str(depth), "depth", pose=pose)
    assert "encoder 120/120, decoder 28/28" in message
    saved = read_weights(runs.pretrained("mono"))
    for name, part in {**model.parts(), **pose.parts()}.items():
        for key, value in part.state_dict().items():
            assert torch.equal(value, saved[f"{name}.{key}"])
    segmenter = networks.build("unet", "resnet18", 19)
    message = weights.load_weights(segmenter, str(depth), "segmentation")
    assert "encoder 120/120, decoder 20/22: head replaced" in message
