"""What the scripts share: the run folder and its options, several processes, signals, exit codes."""

import argparse
import atexit
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

STOPPED = 75  # exit code of a run that a signal stopped with everything saved (EX_TEMPFAIL: run the command again)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
MAY_CHANGE = {"resume", "detect", "device", "num_workers", "log_dir", "log_every", "save_every", "cache",
              "on_bad_sample", "tensorboard"}  # options that may differ when a run goes on


class InputError(Exception):
    """A bad option or input: one line for the user, exit code 2."""


def run_main(main: Callable[[], int | None]) -> None:
    """Call a script's main and turn its outcome into the exit codes of the README."""
    sys.stdout.reconfigure(line_buffering=True)  # in a log, too, lines come at once and an error comes last
    try:
        sys.exit(main() or 0)
    except (InputError, OSError) as error:  # that of a loader process comes with its traceback above
        line = re.sub(r"^(utils.InputError: |\[Errno \d+\] )", "", str(error).strip().splitlines()[-1])
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1 if "DataLoader worker" in line else 2)  # its death may be told of while a checkpoint is written
    except RuntimeError as error:
        if dist.is_initialized() and re.search("gloo|NCCL|onnection|imed out", str(error)):
            error = f"another process of this run has ended, so this one does too; the same command continues ({error})"
        elif not re.search("DataLoader worker|allocate", str(error)):  # killed from outside, or out of memory
            raise
        sys.exit(f"error: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            if child.daemon:  # loader processes, which leave signals alone, so that waiting for their end never ends
                child.kill()


class Parser(argparse.ArgumentParser):
    """One whose complaints are one line, like those about any other bad input."""

    def error(self, message: str) -> None:
        raise InputError(re.sub("^argument (.+?): ", r"\1 ", message))  # --steps 0 is not ...


def within(kind: type, low: float, high: float = 1e9) -> Callable[[str], float]:
    """A type for options: an int or float from low to high."""
    def parse(text: str) -> float:
        if not low <= kind(text) <= high:  # NaN fails this, too
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return kind(text)
    parse.__name__ = kind.__name__  # argparse says so where text is no number
    return parse


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of a run folder, of both training scripts."""
    group = parser.add_argument_group("run")
    group.add_argument("--name", help="folder below --log_dir (default: made of the options)")
    group.add_argument("--log_dir", default="runs", help="where run folders go")
    group.add_argument("--seed", type=within(int, 0), default=0, help="of weights, order and augmentation")
    group.add_argument("--resume", action="store_true",
                       help="demand a checkpoint to continue from; one that is there is used in any case")
    group.add_argument("--detect", action="store_true", help="name the layer where a loss or gradient is not finite")
    group.add_argument("--tensorboard", action="store_true", help="write what is logged for TensorBoard as well")
    group.add_argument("--log_every", type=within(int, 1), default=50, help="steps between log records")
    group.add_argument("--save_every", type=within(int, 1), default=1000, help="steps between checkpoints")


# ---------------------------------------------------------------------------------------------- several processes

def join_ranks(args: argparse.Namespace) -> None:
    """Under `torchrun`, meet the other processes. The batch is shared out, on GPUs one each; rank 0 alone writes.

    Numbers on the CPU go through gloo, those on GPUs through NCCL.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return
    if args.batch_size % world or args.benchmark or args.on_bad_sample == "skip":
        raise InputError(f"{world} processes need a --batch_size that {world} divides (that of all together), and "
                         "neither --benchmark nor --on_bad_sample skip")
    if args.sync_bn and args.device == "cpu":
        raise InputError("--sync_bn is for GPUs: on the CPU torch has no batch norm over several processes")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl")
    atexit.register(dist.destroy_process_group)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (as long as the process lives)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(batch: torch.Tensor | list) -> torch.Tensor | list:
    """This process's part of a batch."""
    return batch[rank()::ranks()]


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor (without gradient) over all processes."""
    if ranks() > 1:
        value = value.detach().clone()
        dist.all_reduce(value)
        value = value / ranks()
    return value


def wait_for_ranks() -> None:
    mean_over_ranks(torch.zeros(()))


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """After backward: every process goes on with the gradient of the whole batch."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if ranks() > 1 and gradients:
        whole = mean_over_ranks(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, whole.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))


# ---------------------------------------------------------------------------------------------- files

def write_atomically(path: str, write: Callable[[BinaryIO], None], keep_previous: bool = False) -> None:
    """`write(file)`, flushed to disk and renamed: readers see the old file or the new one, never a part.

    keep_previous: the old file becomes PATH.1; a crash between the two renames leaves that alone.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and os.path.exists(path):
            os.replace(path, f"{path}.1")
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            os.remove(temporary)
        reason = error if isinstance(error, OSError) else error.__context__ or error  # torch.save adds one of its own
        raise InputError(f"could not write {path}: {reason} (what was there before is untouched)") from None


def save_json(path: str, content: dict) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))


class Run:
    """The run folder `<log_dir>/<name>`: args.json, log.jsonl, last.pt, last.pt.1, model.pt, result.json, samples/.

    Continues a run that has a checkpoint (`read_last` reads it), after checking that its options are those of this
    command; `finished` when there is nothing left to do. Raises InputError when another process runs there.
    """

    def __init__(self, args: argparse.Namespace, script: str, read_last: Callable[[str], dict | None]):
        if not re.fullmatch(r"\w[\w.+=-]*", args.name):
            raise InputError(f"--name {args.name!r}: letters, digits and . _ + = - only (it names a folder)")
        self.args, self.folder, self.board = args, os.path.join(args.log_dir, args.name), None
        self.signalled, self.writes = False, rank() == 0
        if args.resume and not any(os.path.exists(self.path(name)) for name in ("last.pt", "last.pt.1")):
            raise InputError(f"--resume: there is no {self.path('last.pt')}")
        if self.writes:
            self._lock()
        else:
            wait_for_ranks()  # until the first has put in order what has to be
        self.finished = all(os.path.exists(self.path(name)) for name in ("result.json", "model.pt"))
        self.checkpoint = read_last(self.path("last.pt"))
        if self.checkpoint is not None:
            self._refuse_other_options(self.checkpoint["args"])
        elif self.writes and not self.finished:
            self._describe(script)
        if self.writes:
            wait_for_ranks()
        if self.finished:
            return
        for each in SIGNALS:
            signal.signal(each, self._on_signal)
        if self.writes:
            self.log_file = open(self.path("log.jsonl"), "a", buffering=1)  # noqa: SIM115  (open as long as the run)
            known = self.checkpoint["log_size"] if self.checkpoint else 0
            self.log_file.truncate(min(known, self.log_file.tell()))  # later records are of steps that are run again

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _lock(self) -> None:
        try:
            os.makedirs(self.path("samples"), exist_ok=True)
            self.lock = open(self.path("lock"), "w")  # noqa: SIM115  (held as long as the process lives)
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by loader processes
        except BlockingIOError:
            raise InputError(f"{self.folder}: another process runs there; give another --name") from None

    def _refuse_other_options(self, then: dict) -> None:
        now = vars(self.args)
        differing = [f"--{k} {then.get(k)} there, {now.get(k)} now" for k in sorted(now.keys() | then.keys())
                     if now.get(k) != then.get(k) and k not in MAY_CHANGE]
        if differing:
            raise InputError(f"{self.folder} is a run with other options ({'; '.join(differing)}): give another --name")

    def _describe(self, script: str) -> None:
        git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "--verify", "HEAD"]
        commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        save_json(self.path("args.json"), {
            "script": script, "command": " ".join([script, *sys.argv[1:]]), "options": vars(self.args),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
            "git_commit": commit or None})

    def _on_signal(self, number: int, frame: object) -> None:
        self.signalled = True
        for each in SIGNALS:  # a second one ends at once
            signal.signal(each, signal.SIG_DFL)

    def stops(self) -> bool:
        """Whether a signal has come, to any process; all of them ask at every step."""
        return bool(mean_over_ranks(torch.tensor(float(self.signalled))))

    def log(self, record: dict) -> None:
        """One record, the same for people and as a line of JSON."""
        if not self.writes:
            return
        self.log_file.write(json.dumps(record) + "\n")
        if self.board is not None:
            self.board(record)
        tqdm.write("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                             for key, value in record.items()))
