"""What both training scripts share: common options, the run folder, checkpoints, signals, exit codes."""

import argparse
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

STOPPED = 75  # exit code of a run that a signal stopped with everything saved (EX_TEMPFAIL: run the command again)
MAY_CHANGE = {"resume", "device", "num_workers", "log_dir", "log_every", "save_every", "cache"}  # in a continued run


class InputError(Exception):
    """A bad option or input: one line for the user, exit code 2."""


def run_main(main: Callable[[], int | None]) -> None:
    """Call a script's main and turn its outcome into the exit codes of the README."""
    try:
        sys.exit(main() or 0)
    except InputError as error:
        # an error of a loader process comes with its traceback above
        line = str(error).strip().splitlines()[-1].removeprefix("utils.InputError: ")
        sys.exit(print(f"error: {line}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(130)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options of both training scripts, grouped as --help shows them."""
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", help="root folder of the data set (default: data/<name of the data set>)")
    group.add_argument("--height", type=int, default=192, help="pixels, a multiple of 32 (paper: 192)")
    group.add_argument("--width", type=int, default=640, help="pixels, a multiple of 32 (paper: 640)")
    group.add_argument("--num_workers", type=int, default=2, help="loader processes; 0 loads in this one")
    group = parser.add_argument_group("run")
    group.add_argument("--name", help="folder below --log_dir (default: made of the options)")
    group.add_argument("--log_dir", default="runs", help="where run folders go")
    group.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    group.add_argument("--resume", action="store_true",
                       help="demand a checkpoint to continue from; one that is there is used in any case")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    group.add_argument("--log_every", type=int, default=50, help="steps between log records")
    group.add_argument("--save_every", type=int, default=1000, help="steps between checkpoints")


def check_options(args: argparse.Namespace) -> None:
    """Refuse numbers out of range, and sizes that five halvings do not divide or leave without a pixel to reflect."""
    sizes = {"height": args.height, "width": args.width}
    if getattr(args, "crop", None):
        sizes |= {"crop height": args.crop[0], "crop width": args.crop[1]}
    for name, value in sizes.items():
        if value < 64 or value % 32:
            nearest = max(64, round(value / 32) * 32)
            raise InputError(f"--{name} {value} is not a multiple of 32 of at least 64: try {nearest}")
    for name, least in {"steps": 1, "batch_size": 1, "log_every": 1, "save_every": 1, "eval_every": 1, "num_workers": 0,
                        "seed": 0, "split_seed": 0}.items():
        if getattr(args, name, least) < least:
            raise InputError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if not 0 < args.learning_rate < 1:
        raise InputError(f"--learning_rate must be between 0 and 1, not {args.learning_rate}")


def pick_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name} is no device: use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: use cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def write_atomically(path: str, write: Callable[[str], None]) -> None:
    """`write(temporary)`, flushed to disk and renamed: readers see the old file or the new one, never a part."""
    temporary = f"{path}.tmp"
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        reason = str(error).splitlines()[0]
        raise InputError(f"could not write {path}: {reason} (what was there before is untouched)") from None


def save_json(path: str, content: dict) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
    write_atomically(path, write)


def read_tensors(path: str) -> dict:
    """A checkpoint file as a dict of tensors and builtins; refused when damaged, or when reading it needs code."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # torch does not compare checksums
            raise InputError(f"{path} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no checkpoint at {path}") from None
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  (unpickling errors, truncated files, texts: all the same to a user)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} is not a readable checkpoint of tensors: {reason[:160]}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    return content


def step_of(line: str) -> float:
    """The step of a log record; a line that a crash cut short comes after all others."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Run:
    """The run folder `<log_dir>/<name>`: args.json, log.jsonl, last.pt, model.pt, result.json, samples/.

    Continues a run whose last.pt is there, after checking that its options are those of this command; `finished` when
    there is nothing left to do. Raises InputError when another process runs there.
    """

    def __init__(self, args: argparse.Namespace, script: str):
        if not re.fullmatch(r"[\w][\w.+=-]*", args.name):
            raise InputError(f"--name {args.name!r}: letters, digits and . _ + = - only (it names a folder)")
        self.args, self.folder, self.stop = args, os.path.join(args.log_dir, args.name), False
        try:
            os.makedirs(self.path("samples"), exist_ok=True)
            self.lock = open(self.path("lock"), "w")  # noqa: SIM115  (held as long as the process lives)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder}: another process runs there; give another --name") from None
        except OSError as error:
            raise InputError(f"cannot make the run folder {self.folder}: {error.strerror}") from None

        self.finished = os.path.exists(self.path("result.json")) and os.path.exists(self.path("model.pt"))
        self.checkpoint = read_tensors(self.path("last.pt")) if os.path.exists(self.path("last.pt")) else None
        if self.checkpoint is None and args.resume:
            raise InputError(f"--resume: there is no {self.path('last.pt')}")
        if self.checkpoint is not None:
            if not {"step", "args", "model", "optimizer"} <= self.checkpoint.keys():
                raise InputError(f"{self.path('last.pt')} is no checkpoint of a run: delete it to start again")
            self._refuse_other_options(self.checkpoint["args"])
        elif not self.finished:
            git = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"],
                                 capture_output=True, text=True, check=False) if shutil.which("git") else None
            save_json(self.path("args.json"), {
                "script": script, "command": " ".join([script, *sys.argv[1:]]), "options": vars(args),
                "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
                "git_commit": git.stdout.strip() if git and git.returncode == 0 else None})
        if not self.finished:
            self._open_log()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _refuse_other_options(self, then: dict) -> None:
        now = vars(self.args)
        differing = [f"--{k} {then.get(k)} there, {now.get(k)} now" for k in sorted(now.keys() | then.keys())
                     if now.get(k) != then.get(k) and k not in MAY_CHANGE]
        if differing:
            raise InputError(f"{self.folder} holds a run with other options ({'; '.join(differing)}): "
                             "give another --name, or delete the folder")

    def _open_log(self) -> None:
        """Records after the checkpoint belong to steps that are run again."""
        kept = []
        if self.checkpoint is not None and os.path.exists(self.path("log.jsonl")):
            with open(self.path("log.jsonl")) as file:
                kept = [line for line in file if step_of(line) <= self.checkpoint["step"]]
        self.log_file = open(self.path("log.jsonl"), "w", buffering=1)  # noqa: SIM115  (open as long as the run)
        self.log_file.writelines(kept)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.stop:  # a second signal ends at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stop = True

    def log(self, record: dict) -> None:
        """One record, the same for people and as a line of JSON."""
        self.log_file.write(json.dumps(record) + "\n")
        tqdm.write("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                             for key, value in record.items()))

    def save(self, step: int, parts: dict, optimizer: torch.optim.Optimizer, options: dict) -> None:
        """model.pt, to use, and last.pt, to continue: every draw is a function of (seed, step), so it needs no more."""
        for name, part in parts.items():
            if not all(torch.isfinite(value).all() for value in part.values()):
                sys.exit(f"stopped: weights of the {name} are not finite after step {step}; nothing was overwritten")
        model = {"options": {**options, "steps": step}, **parts}
        last = {"step": step, "args": vars(self.args), "model": parts, "optimizer": optimizer.state_dict()}
        for name, content in (("model.pt", model), ("last.pt", last)):
            write_atomically(self.path(name), lambda temporary, content=content: torch.save(content, temporary))


class Meter:
    """Means of loss terms and times between two log records, kept on the device so that no step waits for a number."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Start anew, at a record or after time that is not the steps'."""
        self.sums, self.steps, self.data_seconds, self.start = {}, 0, 0.0, time.perf_counter()

    def add(self, terms: dict[str, torch.Tensor], data_seconds: float) -> None:
        for key, value in terms.items():
            self.sums[key] = self.sums.get(key, 0) + value.detach()
        self.steps += 1
        self.data_seconds += data_seconds

    def check(self, step: int, indices: torch.Tensor) -> None:
        """Refuse to go on with a loss that is not finite: one line, exit code 1, last.pt as it was."""
        for key, value in self.sums.items():
            if not torch.isfinite(value):
                sys.exit(f"stopped: {key} is {float(value)} at step {step} (samples {indices.tolist()})")

    def record(self, batch_size: int) -> dict:
        """Means since the last record; starts anew."""
        means = {key: float(value) / self.steps for key, value in self.sums.items()}
        seconds = time.perf_counter() - self.start
        out = {**means, "ms_per_step": 1000 * seconds / self.steps, "ms_data": 1000 * self.data_seconds / self.steps,
               "samples_per_s": batch_size * self.steps / seconds}
        self.reset()
        return out
