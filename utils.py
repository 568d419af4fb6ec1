"""What the scripts share: exit codes, devices, several processes, the run folder, running means."""

import argparse
import atexit
import fcntl
import json
import os
import pickle
import re
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

IGNORE = 255  # train id of pixels without a label
STOPPED = 75  # exit code of a run that a signal stopped with everything saved (EX_TEMPFAIL)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
COMPILE_FROM = 2000  # steps from which compiling pays on a GPU
NUMPY_SCALARS = [np._core.multiarray.scalar, np.dtype,
                 *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?"))]

# ---- exit codes and options --------------------------------------------------------------------
class InputError(Exception):
    """A bad option or input: one line for the user, exit code 2."""


def run_main(main: Callable[[], int | None]) -> None:
    """Calls a script's main. Bad input and files end in one line and code 2, a defect in a traceback."""
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # an error comes last
    try:
        sys.exit(main() or 0)
    except BrokenPipeError:  # `| head` has seen enough
        os._exit(128 + signal.SIGPIPE)
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch reports the loaders killed below
        for child in torch.multiprocessing.active_children():
            if child.daemon:
                child.kill()  # loader processes, which ignore other signals


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(message.removeprefix("argument "))  # one line, like any other bad input


def within(kind: type, low: float, high: float = 1e9) -> Callable[[str], float]:
    """An option's type: an int or float from low to high."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:  # refuses NaN, too
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is not a number
    return parse


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of a run folder, for both training scripts."""
    add = parser.add_argument_group("run").add_argument
    add("--name", help="folder below --log_dir (default: derived from the options)")
    add("--log_dir", default="runs", help="where run folders go")
    add("--seed", type=within(int, 0), default=0, help="seed of weights, order and augmentation")
    add("--resume", action="store_true", help="fail if there is no checkpoint; one is always used")
    add("--tensorboard", action="store_true", help="log for TensorBoard as well")
    add("--log_every", type=within(int, 1), default=50, help="steps between log records")
    add("--save_every", type=within(int, 1), default=1000, help="steps between checkpoints")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Options that cost or save time and memory, for both training scripts."""
    add = parser.add_argument_group("speed").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N")
    add("--amp", choices=("auto", "none", "bf16"), default="auto",
        help="networks in bfloat16, heads and losses in float32 (auto: on a GPU)")
    add("--compile", choices=("auto", "none", "all"), default="auto",
        help=f"networks and losses as one function (auto: on a GPU from {COMPILE_FROM} steps)")

# ---- the device --------------------------------------------------------------------------------
def pick_device(name: str) -> torch.device:
    """The device called cpu, cuda or cuda:N; raises InputError where it does not exist."""
    count = torch.cuda.device_count()
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match or (name != "cpu" and int(match[1] or 0) >= count):
        raise InputError(f"--device {name}: use cpu, cuda or cuda:N; CUDA devices here: {count}")
    if match[1]:
        torch.cuda.set_device(name)
    return torch.device(name)


def autocast(args: argparse.Namespace, device: torch.device) -> Callable:
    """Makes contexts for the networks: bfloat16 where --amp says so."""
    auto = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    enabled = args.amp == "bf16" or (args.amp == "auto" and auto)
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=enabled)


def prepare(module: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Fits what trains to the device; the one place that decides on compiling.

    A GPU replays the compiled step as a CUDA graph; a CPU gains next to nothing by compiling.
    """
    long_enough = device.type == "cuda" and args.steps >= COMPILE_FROM
    compiled = args.compile == "all" or (args.compile == "auto" and long_enough)
    if device.type == "cuda":
        module = module.to(memory_format=torch.channels_last)
    if processes() > 1:
        ids = [device.index] if device.type == "cuda" else None
        module = nn.parallel.DistributedDataParallel(module, device_ids=ids)
    if compiled:
        mode = "reduce-overhead" if device.type == "cuda" and processes() == 1 else "default"
        module = torch.compile(module, mode=mode, dynamic=False)
        print("compiling networks and losses: the first step takes minutes")
    return module

# ---- several processes -------------------------------------------------------------------------
def join_processes(args: argparse.Namespace) -> None:
    """Under `torchrun`, meets the other processes. They share each batch; rank 0 alone writes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return
    if args.batch_size % world:
        raise InputError(f"--batch_size {args.batch_size} is not a multiple of the {world} processes")
    if args.arch == "deeplabv3" and args.batch_size < 2 * world:
        raise InputError(f"--batch_size {args.batch_size} gives each of {world} processes one image, "
                         "and DeepLabV3's batch norm needs two")
    if args.device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(f"{os.environ['LOCAL_WORLD_SIZE']} processes on this machine, "
                             f"{torch.cuda.device_count()} GPUs: start one process per GPU")
        args.device = f"cuda:{local}"
    elif args.device != "cpu":
        raise InputError(f"--device {args.device}: torchrun gives each process a GPU; use cuda")
    backend = "gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # the others wait while rank 0 evaluates
    atexit.register(dist.destroy_process_group)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (as long as the process lives)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor, without gradient, over all processes, which wait for each other here."""
    if processes() > 1:
        value = value.detach().clone()
        dist.all_reduce(value)
    return value / processes()


def balance(mask: torch.Tensor) -> torch.Tensor:
    """This process's share of the mask's pixels, 1 where all have as many.

    Times this, the mean over one process's pixels averages to the mean over the whole batch.
    """
    count = mask.sum().float()
    return count.clamp(min=1) / mean_over_processes(count).clamp(min=1)


def write_atomically(path: str, write: Callable[[BinaryIO], None], keep_old: bool = False) -> None:
    """`write(file)`, flushed to disk and renamed; keep_old: the file before becomes PATH.1."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep_old and os.path.exists(path):
            os.replace(path, f"{path}.1")
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            os.remove(f"{path}.tmp")
        cause = error if isinstance(error, OSError) else error.__context__ or error
        if not isinstance(cause, OSError):  # a lost loader process may surface here
            raise cause from None
        raise InputError(f"could not write {path}: {cause} (what was there is untouched)") from None


def save_json(path: str, content: dict) -> None:
    """Writes a dict as JSON, all of it or nothing."""
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))


def read_tensors(path: str) -> dict:
    """A checkpoint as a dict of tensors and builtins; nothing in the file is ever executed.

    Raises InputError where the file is missing, damaged, or needs code to be read.
    """
    if not os.path.isfile(path):
        raise InputError(f"no checkpoint at {path}")
    reason = "it is damaged"
    try:
        if not zipfile.is_zipfile(path) or not zipfile.ZipFile(path).testzip():  # checksums
            with torch.serialization.safe_globals([argparse.Namespace, *NUMPY_SCALARS]):
                content = torch.load(path, map_location="cpu", weights_only=True)
                if isinstance(content, dict):
                    return content
                reason = f"it holds a {type(content).__name__}, not a dict"
    except pickle.UnpicklingError as error:
        held = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {held[1]}, which is code" if held else reason
    except Exception:  # noqa: BLE001, S110  (a damaged file can fail anywhere in a reader)
        pass
    raise InputError(f"{path} is not a readable checkpoint of tensors: {reason}")

# ---- the run folder ----------------------------------------------------------------------------
# Options that may differ when a run continues.
MAY_CHANGE = {"resume", "device", "compile", "num_workers", "log_dir", "log_every", "save_every",
              "cache", "data_path", "tensorboard"}
# Older runs have options that are gone or renamed; they continue where these had their defaults.
FIRST_EDITION = {"depth_loss": "l1", "min_motion": 0, "patches": "rectangles",
                 "average_sources": False, "no_automask": False, "depth_scale": 1000}


class Run:
    """`<log_dir>/<name>`: args.json, log.jsonl, last.pt, model.pt, result.json, samples/.

    Continues from its checkpoint; refuses other options, and a folder where a process runs.
    """

    def __init__(self, args: argparse.Namespace, script: str, defaults: argparse.Namespace):
        if not re.fullmatch(r"\w[\w.+=-]*", args.name):
            raise InputError(f"--name {args.name!r}: letters, digits and . _ + = - only")
        self.args = args
        self.folder = os.path.join(args.log_dir, args.name)
        self.writes = rank() == 0
        self.board = None  # a TensorBoard writer
        self.signalled = False  # or when the first signal came
        if self.writes:
            self._lock()
        self.finished = all(os.path.exists(self.path(name)) for name in ("result.json", "model.pt"))
        if not self.writes:
            mean_over_processes(torch.zeros(()))  # rank 0 reads first, as it may rename a file
        self.checkpoint = read_last(self.path("last.pt"))
        self.record = (self.checkpoint or {}).get("record", {})  # the last one logged
        if self.writes:
            mean_over_processes(torch.zeros(()))
        if args.resume and self.checkpoint is None:
            raise InputError(f"--resume: there is no {self.path('last.pt')}")
        if self.checkpoint is not None:
            self._refuse_other_options(self.checkpoint["args"], vars(defaults))
        elif self.finished:
            with suppress(OSError, ValueError, KeyError, TypeError), open(self.path("args.json")) as file:
                self._refuse_other_options(json.load(file)["options"], vars(defaults))
        elif self.writes:
            command = " ".join([script, *sys.argv[1:]])
            save_json(self.path("args.json"), {"script": script, "command": command,
                                               "options": vars(args), "torch": torch.__version__})
        if not self.finished:
            for each in SIGNALS:
                if signal.getsignal(each) is not signal.SIG_IGN:  # as under nohup
                    signal.signal(each, self._on_signal)
            if self.writes:
                self._open_log()

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _lock(self) -> None:
        try:
            os.makedirs(self.path("samples"), exist_ok=True)
            self.lock = open(self.path("lock"), "w")  # noqa: SIM115  (held to the end)
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            taken = "another process runs there" if isinstance(error, BlockingIOError) else None
            raise InputError(f"{self.folder}: {taken or error.strerror}") from None

    def _refuse_other_options(self, then: dict, defaults: dict) -> None:
        now = vars(self.args)
        differing = []
        for key in sorted((then.keys() | now.keys()) - MAY_CHANGE):
            before = then.get(key, defaults.get(key, now.get(key)))
            after = now.get(key, FIRST_EDITION.get(key, before))
            as_json = json.loads(json.dumps(after))  # lists for tuples
            renewed = before == FIRST_EDITION.get(key) and after == defaults.get(key)
            if before not in (after, as_json) and after != [before] and not renewed:
                differing.append(f"--{key} {before} there, {after} now")
        if differing:
            raise InputError(f"{self.folder} is a run with other options ({'; '.join(differing)}): "
                             "give another --name")

    def _open_log(self) -> None:
        """Cuts off records of steps that will run again."""
        self.log_file = open(self.path("log.jsonl"), "a", buffering=1)  # noqa: SIM115
        known = self.checkpoint["log_size"] if self.checkpoint else 0
        self.log_file.truncate(min(known, self.log_file.tell()))
        if self.args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError("--tensorboard needs a package: pip install tensorboard") from None
            self.board = SummaryWriter(self.folder)

    def _on_signal(self, number: int, frame: object) -> None:
        self.signalled = self.signalled or time.monotonic()
        if time.monotonic() > self.signalled + 1:  # a second one, not the first by another way
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def stops(self) -> bool:
        """Whether a signal has come to any process; all of them ask at every step."""
        return bool(mean_over_processes(torch.tensor(float(self.signalled))))

    def log(self, record: dict) -> None:
        """One record, for people and as a line of JSON."""
        if not self.writes:
            return
        self.record = record
        self.log_file.write(json.dumps(record) + "\n")
        tqdm.write("  ".join(f"{key} {value:.6g}" for key, value in record.items()))
        if self.board is not None:
            for key in record.keys() - {"step"}:
                self.board.add_scalar(key, record[key], record["step"])

    def restore(self, optimizer: torch.optim.Optimizer, parts: dict[str, nn.Module]) -> int:
        """Loads the checkpoint, if any, into networks and optimiser. Returns the steps done."""
        self.optimizer = optimizer
        self.parts = parts
        if self.checkpoint is None:
            return 0
        try:
            for name, part in parts.items():
                part.load_state_dict(self.checkpoint["model"][name])
            optimizer.load_state_dict(self.checkpoint["optimizer"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise InputError(f"{self.path('last.pt')} does not fit: {reason}") from None
        for parameter, moments in optimizer.state.items():
            for key, value in moments.items():  # fused Adam needs the parameter's memory format
                if value.shape == parameter.shape:
                    moments[key] = torch.empty_like(parameter).copy_(value)
        print(f"continues at step {self.checkpoint['step']}")
        return self.checkpoint["step"]

    def save(self, step: int, options: dict) -> None:
        """Writes model.pt, to use, and last.pt, to continue; draws need no state of their own."""
        if not self.writes:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        for name, part in state.items():
            if not all(torch.isfinite(value).all() for value in part.values()):
                sys.exit(f"stopped: weights of the {name} are not finite after step {step}")
        model = {"options": {**options, "steps": step}, **state}
        os.fsync(self.log_file.fileno())
        last = {"step": step, "args": vars(self.args), "record": self.record,
                "log_size": self.log_file.tell(), "model": state, "optimizer": self.optimizer.state_dict()}
        write_atomically(self.path("model.pt"), partial(torch.save, model))
        write_atomically(self.path("last.pt"), partial(torch.save, last), keep_old=True)


def read_last(path: str) -> dict | None:
    """Loads last.pt, or None if absent; if damaged, falls back to last.pt.1."""
    older = f"{path}.1"
    found = [file for file in (path, older) if os.path.exists(file)]
    kinds = {"step": int, "args": dict, "log_size": int, "model": dict, "optimizer": dict}
    for file in found:
        try:
            checkpoint = read_tensors(file)
        except InputError:
            checkpoint = {}
        if all(isinstance(checkpoint.get(key), kind) for key, kind in kinds.items()):
            if file == older:
                os.replace(older, path)
            return checkpoint
        print(f"{file} is damaged, or no checkpoint of a run")
    if found:
        raise InputError(f"{path} is damaged, or no checkpoint of a run: delete it to start again")
    return None


class Meter:
    """Means of loss terms and of the time a step takes; `add` never waits for a GPU, `record` does."""

    def __init__(self):
        self.sums = {}
        self.steps = 0
        self.waited = 0.0  # seconds that steps waited for data
        self.start = time.perf_counter()

    def add(self, terms: dict[str, torch.Tensor], waited: float) -> None:
        for key, value in terms.items():
            self.sums[key] = self.sums.get(key, 0) + value.detach()
        self.steps += 1
        self.waited += waited

    def record(self, batch_size: int) -> dict[str, float]:
        """Means per step since the last record."""
        seconds = time.perf_counter() - self.start
        record = {key: float(mean_over_processes(total)) / self.steps
                  for key, total in self.sums.items()}
        record["ms_per_step"] = 1000 * seconds / self.steps
        record["samples_per_s"] = batch_size * self.steps / seconds
        record["ms_data"] = 1000 * self.waited / self.steps
        self.__init__()  # starts again
        return record
