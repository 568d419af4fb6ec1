"""What both training scripts share: common options, the run folder, checkpoints, signals, exit codes."""

import argparse
import atexit
import ctypes
import fcntl
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from typing import BinaryIO

import numpy as np
import torch
from tqdm import tqdm

STOPPED = 75  # exit code of a run that a signal stopped with everything saved (EX_TEMPFAIL: run the command again)
WARM_UP = 5  # steps before a benchmark's
PARTS = ("data", "networks", "loss", "backward", "optimizer")  # of a step, as a benchmark tells them apart
SIGNALS = (signal.SIGTERM, signal.SIGINT)
MAY_CHANGE = {"resume", "detect", "device", "num_workers", "log_dir", "log_every", "save_every", "cache",  # later on
              "on_bad_sample", "tensorboard"}


class InputError(Exception):
    """A bad option or input: one line for the user, exit code 2."""


def run_main(main: Callable[[], int | None]) -> None:
    """Call a script's main and turn its outcome into the exit codes of the README."""
    try:
        sys.exit(main() or 0)
    except (InputError, OSError) as error:  # that of a loader process comes with its traceback above
        line = re.sub(r"^(utils.InputError: |\[Errno \d+\] )", "", str(error).strip().splitlines()[-1])
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1 if "DataLoader worker" in line else 2)  # its death may be told of while a checkpoint is written
    except RuntimeError as error:
        if not re.search("DataLoader worker|allocate", str(error)):  # killed from outside, or out of memory
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
        if not low <= kind(text) <= high:  # as NaN is not
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return kind(text)
    parse.__name__ = kind.__name__  # argparse says so where text is no number
    return parse


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options of both training scripts, grouped as --help shows them."""
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", help="root folder of the data set (default: data/<name of the data set>)")
    group.add_argument("--height", type=within(int, 64, 8192), default=192,
                       help="pixels, a multiple of 32, or of a ViT's patch (paper: 192)")
    group.add_argument("--width", type=within(int, 64, 8192), default=640, help="pixels, likewise (paper: 640)")
    group.add_argument("--num_workers", type=within(int, 0, 256), default=2, help="loader processes; 0 for none")
    group.add_argument("--on_bad_sample", choices=("stop", "skip"), default="stop",
                       help="at an image that cannot be read: stop, or take another sample and list it in result.json")
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
    group = parser.add_argument_group("speed")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    group.add_argument("--amp", choices=("auto", "none", "bf16"), default="auto",
                       help="networks in bfloat16, losses always in float32 (auto: on a GPU that has it)")
    group.add_argument("--memory_format", choices=("auto", "contiguous", "channels_last"), default="auto",
                       help="of the networks (auto: channels_last on a GPU)")
    group.add_argument("--compile", choices=("auto", "none", "loss", "all"), default="auto",
                       help="torch.compile: the photometric error, or the networks as well (auto: loss on a GPU)")
    group.add_argument("--benchmark", type=within(int, 1), nargs="?", const=20, metavar="STEPS",
                       help="time so many steps after five others, print ms by part as JSON, and leave nothing behind")


def pick_device(name: str) -> torch.device:
    if re.fullmatch(r"cpu|cuda(:\d+)?", name):
        with suppress(RuntimeError, AssertionError):  # AssertionError: a torch without CUDA
            return torch.empty(0, device=name).device
    raise InputError(f"--device {name}: use cpu, cuda or cuda:N; here are {torch.cuda.device_count()} CUDA devices")


def device_choices(args: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    """All that depends on the device, in one place; options that are not "auto" have their way.

    autocast(): a context for the networks; memory_format: of the networks; compile: "none", "loss" or "all"; batched:
    the scales of the photometric loss go through as one batch.
    """
    gpu = device.type == "cuda"
    if not gpu:  # freed memory stays with the process, which would have to clear every page of it again in each step
        with suppress(OSError, AttributeError):  # another C library than glibc
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-4, 0), mallopt(-1, 2 ** 31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    bf16 = args.amp == "bf16" or (args.amp == "auto" and gpu and torch.cuda.is_bf16_supported(False))
    last = args.memory_format == "channels_last" or (args.memory_format == "auto" and gpu)
    scales = getattr(args, "scales", "auto")
    compile = ("loss" if gpu and find_spec("triton") else "none") if args.compile == "auto" else args.compile
    if compile != "none" and not gpu and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError(f"--compile {args.compile} needs a C++ compiler, and there is no g++: install it, or set CXX")
    return argparse.Namespace(
        autocast=partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16),
        memory_format=torch.channels_last if last else torch.contiguous_format,
        compile=compile, batched=gpu if scales == "auto" else scales == "batched")


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
        self.args, self.folder, self.stop, self.board = args, os.path.join(args.log_dir, args.name), False, None
        if args.resume and not any(os.path.exists(self.path(name)) for name in ("last.pt", "last.pt.1")):
            raise InputError(f"--resume: there is no {self.path('last.pt')}")
        try:
            os.makedirs(self.path("samples"), exist_ok=True)
            self.lock = open(self.path("lock"), "w")  # noqa: SIM115  (held as long as the process lives)
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by loader processes
        except BlockingIOError:
            raise InputError(f"{self.folder}: another process runs there; give another --name") from None

        self.finished = all(os.path.exists(self.path(name)) for name in ("result.json", "model.pt"))
        self.checkpoint = read_last(self.path("last.pt"))
        if self.checkpoint is not None:
            self._refuse_other_options(self.checkpoint["args"])
        elif not self.finished:
            self._describe(script)
        if not self.finished:
            self.log_file = open(self.path("log.jsonl"), "a", buffering=1)  # noqa: SIM115  (open as long as the run)
            known = self.checkpoint["log_size"] if self.checkpoint else 0
            self.log_file.truncate(min(known, self.log_file.tell()))  # later records are of steps that are run again
            for each in SIGNALS:
                signal.signal(each, self._on_signal)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

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
        self.stop = True
        for each in SIGNALS:  # a second one ends at once
            signal.signal(each, signal.SIG_DFL)

    def log(self, record: dict) -> None:
        """One record, the same for people and as a line of JSON."""
        self.log_file.write(json.dumps(record) + "\n")
        if self.board is not None:
            self.board(record)
        tqdm.write("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                             for key, value in record.items()))


class Meter:
    """Means of loss terms, and where the time went, between two log records; no step waits for a number of them."""

    def __init__(self, device: torch.device, exact: bool = False):
        self.wait = exact and device.type == "cuda"  # only a benchmark has the GPU finish one part before the next
        self.reset()

    def reset(self) -> None:
        """Start anew, at a record or after what was no step."""
        self.sums, self.steps, self.seconds, self.start = {}, 0, dict.fromkeys(PARTS, 0.0), time.perf_counter()
        self.last = self.start

    def lap(self, part: str | None = None) -> None:
        """The time since the last call was for this part of a step, one of PARTS, or for none of them."""
        if self.wait:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if part:
            self.seconds[part] += now - self.last
        self.last = now

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        self.sums = {key: self.sums.get(key, 0) + value.detach() for key, value in terms.items()}
        self.steps += 1

    def record(self, batch_size: int, parts: tuple[str, ...] = ("data",)) -> dict:
        """Means since the last reset, per step; resets."""
        seconds = time.perf_counter() - self.start
        out = {key: float(value) / self.steps for key, value in self.sums.items()}
        out |= {"ms_per_step": 1000 * seconds / self.steps, "samples_per_s": batch_size * self.steps / seconds,
                **{f"ms_{part}": 1000 * self.seconds[part] / self.steps for part in parts}}
        self.reset()
        return out


def prepare_benchmark(args: argparse.Namespace) -> None:
    """A benchmark is a short run in a folder that does not outlive it."""
    if args.benchmark:
        args.steps, args.log_dir = WARM_UP + args.benchmark, tempfile.mkdtemp()
        atexit.register(shutil.rmtree, args.log_dir, ignore_errors=True)


def print_benchmark(meter: Meter, args: argparse.Namespace, device: torch.device) -> None:
    """A line for people, and as the last line a JSON object."""
    record = meter.record(args.batch_size, PARTS)
    if device.type == "cuda":
        memory, name = torch.cuda.max_memory_allocated() / 2 ** 20, torch.cuda.get_device_name()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        name = f"cpu, {torch.get_num_threads()} threads"
    record |= {"peak_memory_mb": memory, "device": name}
    print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in record.items()))
    print(json.dumps({**record, "options": vars(args)}))
