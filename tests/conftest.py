"""What the tests share: a tiny street, folders of small images, and scripts run in this process.

    from conftest import call, write_frames
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the same bits in every process, and no idle spinning

import contextlib
import fcntl
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import utils

ROOT = Path(__file__).resolve().parent.parent
SECONDS = int(os.environ.get("TEST_SECONDS", "300"))  # no test may take longer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_signals():
    """No test runs for longer than SECONDS, and none leaves a run's signal handlers behind."""

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError(f"a test took more than {SECONDS} seconds ($TEST_SECONDS)")

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    for number, handler in before.items():
        signal.signal(number, handler)


# ------------------------------------------------------------ scripts


class Result:
    """Exit code, standard output and standard error of a script."""

    def __init__(self, code: int, out: str, err: str):
        self.code = code
        self.out = out
        self.err = err

    def __repr__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


def call(module: ModuleType, *options: object, expect: int | None = None) -> Result:
    """Run a script's main() in this process, which saves the import of torch.

    Raises AssertionError with all output if the exit code is not `expect`.
    """
    arguments = [f"{module.__name__}.py", *map(str, options)]
    streams = [
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            try:
                utils.run_main(module.main)
                code = 0
            except SystemExit as outcome:
                code = outcome.code if isinstance(outcome.code, int) else 1
                if isinstance(outcome.code, str):
                    print(outcome.code, file=sys.stderr)
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    result = Result(code, out, err)
    assert expect is None or code == expect, result
    return result


def run_script(script: str, *options: object, expect: int = 0, **environment: str) -> Result:
    """Run a script as a user does, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **environment},
    )
    result = Result(done.returncode, done.stdout, done.stderr)
    assert result.code == expect, result
    return result


def assert_one_line(result: Result, *words: str) -> None:
    """Exit code 2 and a single line on standard error that holds all words.

    A progress bar may stand above it.
    """
    assert result.code == 2, result
    lines = result.err.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.strip()]
    lines = [
        line for line in lines if "it/s" not in line and "s/it" not in line and "?it" not in line
    ]
    assert len(lines) == 1, result
    assert lines[0].startswith("error: "), result
    for word in words:
        assert word in lines[0], (word, lines[0])


# ------------------------------------------------------------ run folders


def read_json(*parts: object) -> dict:
    return json.loads(Path(*map(str, parts)).read_text())


def read_log(folder: object) -> list[dict]:
    """The records of a run; an empty list before the first."""
    path = Path(str(folder), "log.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def read_losses(folder: object) -> list[float]:
    """The training loss of every record."""
    return [record["loss"] for record in read_log(folder) if "loss" in record]


def read_weights(folder: object, file: str = "model.pt") -> dict[str, torch.Tensor]:
    """All tensors of a run's model.pt, as "part.name"."""
    content = torch.load(Path(str(folder), file), weights_only=True)
    weights = {}
    for part, tensors in content.items():
        if part == "options":
            continue
        for name, value in tensors.items():
            weights[f"{part}.{name}"] = value
    return weights


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit by bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def assert_same_runs(ours: object, theirs: object) -> None:
    """Weights and log of two runs agree bit by bit; only times may differ."""
    assert differing(read_weights(ours), read_weights(theirs)) == []
    for first, second in zip(read_log(ours), read_log(theirs), strict=True):
        assert without_times(first) == without_times(second)


def without_times(record: dict) -> dict:
    return {key: value for key, value in record.items() if "ms_" not in key and "per_s" not in key}


# ------------------------------------------------------------ data


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """One folder for all processes of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@contextlib.contextmanager
def one_process_at_a_time(path: Path):
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def world(shared_folder) -> str:
    """A street in KITTI's layout: two drives of four frames and twelve labelled images, 64x128."""
    from tools.street import render

    root = shared_folder / "synthetic"
    with one_process_at_a_time(shared_folder / "world"):
        if not root.exists():
            render(str(root), drives=2, frames=4, labelled=12, height=64, width=128)
    return str(root)


def smooth_images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random images without hard edges, (batch, 3, height, width) in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, height // 4, width // 4, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)


def write_image(path: object, height: int = 64, width: int = 96, seed: int = 0) -> str:
    """Write a smooth random picture; the suffix decides on the format."""
    path = Path(str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = (255 * smooth_images(1, height, width, seed)[0]).byte()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    return str(path)


def write_png(path: object, array: np.ndarray) -> str:
    """Write an array as it is: depth (uint16), labels (uint8)."""
    path = Path(str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return str(path)


def write_frames(
    folder: object, count: int = 6, suffix: str = "jpg", intrinsics: str | None = "60 60 47.5 31.5"
) -> str:
    """Frames of one's own: frame1.jpg, frame2.jpg, ... and intrinsics.txt."""
    folder = Path(str(folder))
    for number in range(1, count + 1):
        write_image(folder / f"frame{number}.{suffix}", seed=number)
    if intrinsics is not None:
        (folder / "intrinsics.txt").write_text(intrinsics)
    return str(folder)


def write_semantics(
    folder: object, count: int = 4, ids: tuple = (0, 7, 26), height: int = 64, width: int = 96
) -> str:
    """KITTI's semantics layout, labels in blocks of 4x4 pixels with the given raw ids."""
    training = Path(str(folder), "training")
    for index in range(count):
        name = f"{index:06d}_10.png"
        write_image(training / "image_2" / name, height, width, seed=index)
        shape = (-(-height // 4), -(-width // 4))
        blocks = np.random.default_rng(index).choice(np.array(ids, np.uint8), shape)
        label = blocks.repeat(4, 0).repeat(4, 1)
        write_png(training / "semantic" / name, label[:height, :width])
    return str(folder)


def truncate(path: object, share: float) -> str:
    """Keep the first `share` of a file."""
    size = os.path.getsize(str(path))
    os.truncate(str(path), int(share * size))
    return str(path)


# ------------------------------------------------------------ runs to start from

SMALL = ("--height", 64, "--width", 96, "--batch_size", 2, "--num_workers", 0, "--log_every", 1)


def frames_run(folder: Path, *options: object) -> list:
    """Options of a reconstruction on three frames of one's own, the cheapest run there is."""
    data = ["--data", "frames", "--data_path", folder / "video", "--task", "reconstruction"]
    size = ["--height", 64, "--width", 64, "--batch_size", 1, "--steps", 1, "--num_workers", 0]
    return [*data, *size, "--log_dir", folder / "runs", "--name", "run", "--log_every", 1, *options]


PRETRAINING = {  # options of every kind of pre-training, and the loss terms that its log shows
    "mono": (
        ("--supervision", "mono", "--steps", 4, "--save_every", 3),
        {"loss", "photometric", "smoothness", "masked"},
    ),
    "stereo": (
        ("--supervision", "stereo", "--steps", 3),
        {"loss", "photometric", "smoothness", "masked"},
    ),
    "mono+stereo": (
        ("--supervision", "mono+stereo", "--steps", 2),
        {"loss", "photometric", "smoothness", "masked"},
    ),
    "depth": (("--supervision", "depth", "--steps", 3), {"loss"}),
    "flow": (("--task", "flow", "--steps", 3), {"loss", "photometric", "smoothness"}),
    "reconstruction": (("--task", "reconstruction", "--steps", 3), {"loss"}),
}

FINE_TUNING = {  # the pre-training that it starts from, and options
    "none": (None, ()),
    "all": ("mono", ("--steps", 4)),
    "encoder": ("mono", ("--init_parts", "encoder")),
    "frozen": ("mono", ("--freeze_encoder",)),
    "from_flow": ("flow", ("--init_parts", "encoder")),
}


class Runs:
    """Tiny finished runs, each made when first asked for."""

    def __init__(self, world: str, folder: Path):
        self.world = world
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def pretraining_options(self, kind: str, log_dir: object) -> list:
        options, _ = PRETRAINING[kind]
        return [
            "--data",
            "synthetic",
            "--data_path",
            self.world,
            *SMALL,
            *options,
            "--name",
            kind,
            "--log_dir",
            log_dir,
        ]

    def fine_tuning_options(self, kind: str, log_dir: object) -> list:
        source, options = FINE_TUNING[kind]
        init = self.pretrained(source) if source else "none"
        shared = [
            "--data",
            "synthetic",
            "--data_path",
            self.world,
            *SMALL,
            "--steps",
            2,
            "--train_size",
            4,
        ]
        return [*shared, "--init", init, *options, "--name", f"seg_{kind}", "--log_dir", log_dir]

    def pretrained(self, kind: str) -> str:
        """The run folder of a pre-training."""
        import train_depth

        return self.make(train_depth, self.pretraining_options(kind, self.folder), kind)

    def fine_tuned(self, kind: str) -> str:
        """The run folder of a fine-tuning."""
        import train_seg

        return self.make(train_seg, self.fine_tuning_options(kind, self.folder), f"seg_{kind}")

    def make(self, module: ModuleType, options: list, name: str) -> str:
        folder = self.folder / name
        with one_process_at_a_time(folder):
            if not (folder / "result.json").exists():
                call(module, *options, expect=0)
        return str(folder)


@pytest.fixture(scope="session")
def runs(world, shared_folder) -> Runs:
    return Runs(world, shared_folder / "runs")


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    """A folder with video/ and a finished run of three steps, each of them saved, in runs/run/."""
    import train_depth

    folder = tmp_path_factory.mktemp("small")
    write_frames(folder / "video", 3, "png")
    call(train_depth, *frames_run(folder, "--steps", 3, "--save_every", 1), expect=0)
    return folder


@pytest.fixture
def unfinished(small_run, tmp_path) -> tuple[list, Path]:
    """Options and folder of a copy of the small run, as if killed before its last checkpoint."""
    shutil.copytree(small_run / "runs", tmp_path / "runs")
    run = tmp_path / "runs" / "run"
    (run / "result.json").unlink()
    (run / "last.pt.1").replace(run / "last.pt")
    options = frames_run(small_run, "--steps", 3, "--save_every", 1)
    return [*options, "--log_dir", tmp_path / "runs"], run


def stop_after(step: int, monkeypatch) -> None:
    """Let a run in this process believe that a signal came at the end of a step: it stops after the next."""
    log = utils.Run.log

    def log_and_stop(run, record):
        log(run, record)
        if record["step"] == step and "loss" in record:
            run.signalled = True

    monkeypatch.setattr(utils.Run, "log", log_and_stop)
