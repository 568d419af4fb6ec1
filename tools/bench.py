#!/usr/bin/env python3
"""Measures training steps, loading and fine-tuning; the last line is one JSON object.

    python tools/bench.py step --total --supervision mono+stereo --encoder resnet50
    python tools/bench.py loader --data kitti --data_path data/kitti --cache cache
    python tools/bench.py all

step      ms per step of train_depth.py, and its split
seg       the same of train_seg.py, and ms to evaluate an image
compare   loss and gradients, compiled against eager, both in float32
loader    samples per second with and without the cache
real      a short training from the cache, stopped and continued
schedule  how long the paper's schedules take, from about a minute of steps
all       what a new GPU has to show, in four minutes; a second run finds what the first compiled

step, seg, compare and schedule train on noise that lies in memory. Options that are not listed
below are those of the training script.
"""

import gc
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import batches
import datasets
import metrics
import train_depth
import train_seg
import utils
from utils import InputError, within

KITTI = datasets.LABELLED["kitti"]
KITTI_SIZE = (375, 1242)
EAGER = ["--amp", "none", "--compile", "none"]  # with cuDNN's TF32, which Monodepth2 has, too
COMPILED = ["--compile", "all"]
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
LAST_BIT = 2**-24  # relative, of float32

EPOCH = 39_810  # samples of KITTI's Eigen-Zhou split
SCHEDULES = {  # script, options, steps
    "depth, mono": ("depth", [], 66_350),
    "depth, mono+stereo": ("depth", ["--supervision", "mono+stereo"], 66_350),
    "depth, mono, resnet50": ("depth", ["--encoder", "resnet50"], 66_350),
    "flow": ("depth", ["--task", "flow", "--batch_size", "8"], 50 * EPOCH // 8),
    "reconstruction": ("depth", ["--task", "reconstruction", "--batch_size", "8"], 50 * EPOCH // 8),
    "fine-tuning": ("seg", [], 20_000),
    "fine-tuning, resnet50": ("seg", ["--encoder", "resnet50"], 20_000),
}


# -------------------------------------------------------------------------------- noise


class NoiseClips(datasets.Clips):
    """Clips of noise in memory, as the options of train_depth.py ask for them."""

    def __init__(self, args: Namespace):
        count = 2 * args.batch_size
        frames = len(args.frame_ids)
        if train_depth.is_stereo(args):
            frames += 1
        self.size = args.height, args.width
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, 3, args.height // 16, args.width // 16, generator=generator)
        images = F.interpolate(coarse, self.size, mode="bicubic")  # smooth, as pictures are
        images = (255 * images).clamp(0, 255).byte()
        rows = (torch.arange(count)[:, None] + torch.arange(frames)) % count
        K = torch.eye(3)
        K[0, 0] = K[1, 1] = 0.58 * args.width  # KITTI's field of view
        K[0, 2] = (args.width - 1) / 2
        K[1, 2] = (args.height - 1) / 2
        self.arrays = {
            "frames": (images, rows),
            "K": (K.expand(count, 3, 3).contiguous(), None),
        }
        if train_depth.is_stereo(args):
            T = torch.eye(4)
            T[0, 3] = -0.54  # m
            self.arrays["stereo_T"] = T.expand(count, 4, 4).contiguous(), None
        if train_depth.is_measured(args):
            depth = torch.empty(count, 1, *self.size)
            depth.uniform_(2, 80, generator=generator)
            unmeasured = torch.rand(depth.shape, generator=generator) > 0.05
            self.arrays["depth"] = depth.masked_fill(unmeasured, 0), None

    def __len__(self) -> int:
        return len(self.arrays["K"][0])

    def in_memory(self) -> dict[str, tuple]:
        return self.arrays


class NoiseLabels(KITTI):
    """Labelled noise of KITTI's size, in KITTI's classes."""

    def __init__(self, count: int, args: Namespace):
        self.pairs = [(f"image {i}", f"label {i}") for i in range(count)]
        self.size = args.height, args.width
        self.cached = {}
        self.keep = True

    def native_label(self, index: int) -> torch.Tensor:
        rng = np.random.default_rng(index)
        label = rng.integers(len(self.classes), size=KITTI_SIZE)
        return torch.from_numpy(label)

    def native(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng(index)
        image = rng.integers(256, size=(3, *KITTI_SIZE), dtype=np.uint8)
        return torch.from_numpy(image), self.native_label(index)


# -------------------------------------------------------------------------------- training steps


class DepthTraining:
    """What train_depth.py does in a step, on noise, part by part."""

    def __init__(self, argv: list[str]):
        self.args = args = train_depth.parse_options(argv)
        if args.intrinsics == "learned":
            raise InputError("--intrinsics learned needs a data set: use `real`")
        self.device = utils.pick_device(args.device)
        self.objective, _ = train_depth.build(args, self.device)
        self.optimizer = train_depth.make_optimizer(args, self.objective)
        self.module = utils.prepare(self.objective, args, self.device)
        dataset = NoiseClips(args)
        self.stream = iter(batches.train_batches(dataset, args, 0, self.device))
        self.step = 0

    def data(self) -> dict:
        batch = next_batch(self.stream)
        train_depth.add_draws(batch, self.args, self.step)
        self.step += 1
        return batch

    def forward(self, batch: dict) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        terms, _ = self.module(batch)
        return terms["loss"]

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()


class SegTraining(DepthTraining):
    """What train_seg.py does in a step, on noise."""

    def __init__(self, argv: list[str]):
        self.args = args = train_seg.parse_options(argv)
        self.device = utils.pick_device(args.device)
        self.objective, _ = train_seg.build(args, len(KITTI.classes), self.device)
        self.optimizer = train_seg.make_optimizer(args, self.objective.model)
        self.module = utils.prepare(self.objective, args, self.device)
        dataset = NoiseLabels(args.batch_size, args)
        self.stream = iter(batches.train_batches(dataset, args, 0, self.device))
        self.step = 0

    def data(self) -> dict:
        batch = next_batch(self.stream)
        batches.seed_dropout(self.args.seed, self.step)
        if self.args.jitter > 0:
            draws = batches.draw_jitter(self.args.batch_size, self.args.seed, self.step)
            batch["jitter"] = batches.to_device(draws, self.device)
        self.step += 1
        return batch


def next_batch(stream: Iterator) -> dict:
    """What a training passes on: tensors on the device alone."""
    batch = next(stream)
    del batch["index"], batch["waited"]
    return batch


TRAININGS = {"depth": DepthTraining, "seg": SegTraining}


def run_steps(training: DepthTraining, count: int) -> None:
    """Steps as in a training: nothing in them waits for the device."""
    for _ in range(count):
        batch = training.data()
        loss = training.forward(batch)
        training.backward(loss)
        training.update()
    wait_for(training.device)


def run_split_steps(training: DepthTraining, count: int) -> dict[str, float]:
    """Mean ms of each part of a step; the device finishes each part before the next begins."""
    seconds = {"data": 0.0, "forward": 0.0, "backward": 0.0, "optimizer": 0.0}
    last = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal last
        wait_for(training.device)
        now = time.perf_counter()
        seconds[part] += now - last
        last = now

    for _ in range(count):
        batch = training.data()
        lap("data")
        loss = training.forward(batch)
        lap("forward")
        training.backward(loss)
        lap("backward")
        training.update()
        lap("optimizer")
    return {f"ms_{part}": 1000 * total / count for part, total in seconds.items()}


def measure(training: DepthTraining, options: Namespace) -> dict:
    """ms per step, its split unless --total, peak memory, and the seconds that compiling took."""
    from torch._dynamo import OptimizedModule  # slow to import

    device = training.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    run_steps(training, options.warm_up)
    warmed = time.perf_counter()
    if options.total:
        parts = {}
        run_steps(training, options.steps)
    else:
        parts = run_split_steps(training, options.steps)
    seconds = (time.perf_counter() - warmed) / options.steps
    if isinstance(training.module, OptimizedModule):
        steps = options.warm_up * seconds  # what those would take without compiling
        parts["compile_s"] = warmed - began - steps
    return {
        "ms_per_step": 1000 * seconds,
        **parts,
        "samples_per_s": training.args.batch_size / seconds,
        "peak_memory_mb": peak_memory(device),
    }


def chosen_device(options: Namespace) -> torch.device:
    return utils.pick_device(train_depth.parse_options(options.training).device)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """MB: what tensors took on a GPU, or what the process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


# -------------------------------------------------------------------------------- commands


def step_command(options: Namespace) -> dict:
    training = DepthTraining(options.training)
    return {"device": describe_device(training.device), **measure(training, options)}


def seg_command(options: Namespace) -> dict:
    training = SegTraining(options.training)
    record = {"device": describe_device(training.device), **measure(training, options)}
    model = training.objective.model
    dataset = NoiseLabels(options.images, training.args)
    dataset.read_all(native_label=True)  # decoding happens once per run, so it is not measured
    metrics.evaluate_segmentation(model, dataset, training.device)  # as does loading kernels
    began = time.perf_counter()
    metrics.evaluate_segmentation(model, dataset, training.device)
    seconds = time.perf_counter() - began
    record["ms_per_evaluated_image"] = 1000 * seconds / len(dataset)
    return record


def third_step(argv: list[str], round_weights: bool = False) -> tuple[float, torch.Tensor]:
    """Loss and all gradients (n,) of the third batch, without updates.

    A CUDA graph warms up in the first step, is recorded in the second and replayed in the third.
    round_weights: change each weight by about its last bit.
    """
    training = DepthTraining(argv)
    if round_weights:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in training.objective.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.mul_(1 + LAST_BIT * noise.to(weight.device))
    for _ in range(3):
        loss = training.forward(training.data())
        training.backward(loss)
    gradients = []
    for parameter in training.objective.parameters():
        if parameter.grad is not None:
            gradients.append(parameter.grad.flatten().double().cpu())
    return float(loss.detach()), torch.cat(gradients)


def compare_command(options: Namespace) -> dict:
    """Compiled against eager, in true float32.

    The photometric loss has kinks: which source is best flips at some pixels when a weight changes
    by its last bit. So gradients may differ by as much as that changes them.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    device = chosen_device(options)
    eager_loss, eager = third_step([*options.training, *EAGER])
    _, rounded = third_step([*options.training, *EAGER], round_weights=True)
    began = time.perf_counter()
    loss, gradients = third_step([*options.training, "--amp", "none", *COMPILED])
    seconds = time.perf_counter() - began
    loss_error = abs(loss - eager_loss) / abs(eager_loss)
    gradient_error = float((gradients - eager).norm() / eager.norm())
    rounding_error = float((rounded - eager).norm() / eager.norm())
    tolerance = max(GRADIENT_TOLERANCE, 3 * rounding_error)
    return {
        "device": describe_device(device),
        "agrees": loss_error <= LOSS_TOLERANCE and gradient_error <= tolerance,
        "loss": eager_loss,
        "loss_error": loss_error,
        "gradient_error": gradient_error,
        "gradient_error_of_rounding": rounding_error,
        "first_compiled_step_s": seconds,
    }


def count_samples(args: Namespace, device: torch.device, steps: int) -> float:
    """Samples a second that a training could have."""
    dataset = train_depth.make_dataset(args)
    stream = iter(batches.train_batches(dataset, args, 0, device))
    next(stream)  # starts loader processes
    next(stream)
    wait_for(device)
    began = time.perf_counter()
    for _ in range(steps):
        next(stream)
    wait_for(device)
    return steps * args.batch_size / (time.perf_counter() - began)


def loader_command(options: Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        args = train_depth.parse_options(with_data(options.training, folder))
        cache = args.cache or f"{folder}/cache"
        args.cache = None
        device = utils.pick_device(args.device)
        record = {"device": describe_device(device), "frames_per_sample": len(args.frame_ids)}
        record["samples_per_s_files"] = count_samples(args, device, options.steps)
        args.cache = cache
        began = time.perf_counter()
        train_depth.make_dataset(args)
        built = time.perf_counter()
        train_depth.make_dataset(args)
        record["cache_build_s"] = built - began
        record["cache_open_s"] = time.perf_counter() - built
        record["samples_per_s_cache"] = count_samples(args, device, options.steps)
    return record


def with_data(training: list[str], folder: str) -> list[str]:
    """The options with a small street in `folder`, unless they say where data are."""
    chosen = {"--data", "--data_path"} & set(training)
    if chosen or os.path.exists("data/synthetic"):
        return training
    from tools.street import render

    street = f"{folder}/street"
    render(street, drives=4, frames=6, labelled=0, workers=min(4, os.cpu_count()))
    return [*training, "--data_path", street]


def real_command(options: Namespace) -> dict:
    """train_depth.py from the cache: stopped by a signal after a third, then continued."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "runs" / "real"
        training = with_data(options.training, folder)
        command = [sys.executable, str(ROOT / "train_depth.py"), *training]
        command += ["--steps", str(options.steps)]
        command += ["--log_dir", str(run.parent), "--name", run.name]
        command += ["--cache", f"{folder}/cache"]
        command += ["--log_every", str(max(1, options.steps // 20))]
        stopped, errors = run_script(command, stop_when=lambda: len(read_log(run)) > 6)
        if not read_log(run):
            raise InputError(f"train_depth.py ended with code {stopped}: {errors}")
        print(f"stopped with code {stopped}: {summary(describe_log(read_log(run)))}", flush=True)
        continued, errors = run_script(command)
        record = describe_log(read_log(run))
    if continued:
        raise InputError(f"train_depth.py, continued, ended with code {continued}: {errors}")
    return {
        "device": describe_device(chosen_device(options)),
        "exit_code_stopped": stopped,
        "exit_code_continued": continued,
        **record,
    }


def describe_log(log: list[dict]) -> dict:
    """The last step and loss, and the time of a step in the later half, which is warm."""
    late = log[len(log) // 2 :]
    step_ms = float(np.mean([record["ms_per_step"] for record in late]))
    data_ms = float(np.mean([record["ms_data"] for record in late]))
    return {
        "steps": log[-1]["step"],
        "loss": log[-1]["loss"],
        "ms_per_step": step_ms,
        "waiting_for_data": data_ms / step_ms,
    }


def read_log(run: Path) -> list[dict]:
    path = run / "log.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def run_script(command: list[str], stop_when=None) -> tuple[int, str]:
    """Exit code and last line of stderr; `stop_when` tells when to send SIGTERM."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while process.poll() is None:
                if stop_when and stop_when():
                    process.send_signal(signal.SIGTERM)
                    stop_when = None
                time.sleep(0.05)
        finally:
            process.kill()
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    return process.returncode, lines[-1] if lines else ""


def schedule_command(options: Namespace) -> dict:
    """Times each schedule's steps for its share of --seconds, after they are warm."""
    names = options.only or list(SCHEDULES)
    unknown = set(names) - set(SCHEDULES)
    if unknown:
        raise InputError(f"--only {unknown.pop()}: choose from {', '.join(SCHEDULES)}")
    share = options.seconds / len(names)
    rows = {}
    for name in names:
        script, extra, steps = SCHEDULES[name]
        training = TRAININGS[script]([*extra, *options.training])
        run_steps(training, options.warm_up)
        began = time.perf_counter()
        done = 0
        while time.perf_counter() - began < share:
            run_steps(training, 5)
            done += 5
        ms = 1000 * (time.perf_counter() - began) / done
        hours = ms * steps / 3.6e6
        rows[name] = {"ms_per_step": ms, "steps": steps, "hours": hours}
        print(f"{name}: {steps} steps of {ms:.1f} ms take {hours:.2f} hours", flush=True)
        device = training.device
        del training
        free_memory()
    return {"device": describe_device(device), "schedules": rows}


def free_memory() -> None:
    """Before the next network: compiled code, graphs and tensors of the last one go."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------- all at once


def list_parts() -> dict[str, list[str]]:
    """Commands of `all`, the most important ones first."""
    total = ["step", "--total"]
    stereo = ["--supervision", "mono+stereo"]
    large = ["--encoder", "resnet50"]
    return {
        "compare": ["compare"],
        "mono, eager float32": [*total, *EAGER],
        "mono, compiled": [*total, *COMPILED],
        "mono+stereo, compiled": [*total, *COMPILED, *stereo],
        "real": ["real", "--steps", "400", *COMPILED],
        "seg": ["seg", "--total", *COMPILED],
        "loader": ["loader", "--steps", "60", "--num_workers", str(max(2, os.cpu_count() - 2))],
        "mono+stereo, eager float32": [*total, *EAGER, *stereo],
        "resnet50, eager float32": [*total, *EAGER, *large],
        "resnet50, compiled": [*total, *COMPILED, *large],  # alone compiles for minutes
        "mono, split": ["step", "--compile", "none"],
    }


def start_part(argv: list[str]) -> subprocess.Popen:
    command = [sys.executable, __file__, *argv]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group that can be ended with all its processes
    )


def finish_part(process: subprocess.Popen, seconds: float) -> dict:
    """The JSON object that a part ends with, or {"error": why there is none}."""
    try:
        output, errors = process.communicate(timeout=max(seconds, 0))
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {seconds:.0f} s"}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        lines = errors.strip().splitlines() or ["no message"]
        return {"error": f"exit code {process.returncode}: {lines[-1]}"}
    return json.loads(output.splitlines()[-1])


def compile_ahead(parts: dict[str, list[str]], end: float) -> dict[str, dict]:
    """Runs the first parts that compile side by side, which fills torch's cache of compiled code.

    More of them would take longer than --limit. The comparison is done with that; the timings of
    the others are dropped.
    """
    compiling = {}
    for name, argv in parts.items():
        if name in ("compare", "mono, compiled", "mono+stereo, compiled"):
            short = [] if name == "compare" else ["--steps", "1"]
            compiling[name] = start_part([*argv, *short])
    records = {}
    for name, process in compiling.items():
        record = finish_part(process, end - time.monotonic())
        seconds = record.get("compile_s", record.get("first_compiled_step_s"))
        print(f"compiled {name}: {record.get('error', seconds)}", flush=True)
        records[name] = record
    return records


def all_command(options: Namespace) -> dict:
    """Every part in a process of its own, until --limit; says which parts found no time."""
    end = time.monotonic() + options.limit
    device = chosen_device(options)
    parts = list_parts()
    for name in options.only or []:
        if name not in parts:
            raise InputError(f"--only {name}: choose from {', '.join(parts)}")
    parts = {
        name: [*argv, *options.training]
        for name, argv in parts.items()
        if not options.only or name in options.only
    }
    records = {}
    if device.type == "cuda":
        cold = compile_ahead(parts, end - 0.35 * options.limit)
        records["compile_s, cold and side by side"] = {
            name: record.get("compile_s") for name, record in cold.items()
        }
        if "compare" in cold:
            records["compare"] = cold["compare"]
            del parts["compare"]
    for name, argv in parts.items():
        left = end - time.monotonic()
        if left > 5:
            records[name] = finish_part(start_part(argv), left)
        else:
            records[name] = {"error": "skipped: no time left"}
        print(f"{name}: {summary(records[name])}", flush=True)
    return {"device": describe_device(device), "parts": records}


def summary(record: dict) -> str:
    shown = {}
    for key, value in record.items():
        if isinstance(value, float):
            shown[key] = f"{value:.4g}"
        elif not isinstance(value, dict):
            shown[key] = str(value)
    return "  ".join(f"{key} {value}" for key, value in shown.items())


# -------------------------------------------------------------------------------- command line

COMMANDS = {
    "step": step_command,
    "seg": seg_command,
    "compare": compare_command,
    "loader": loader_command,
    "real": real_command,
    "schedule": schedule_command,
    "all": all_command,
}


class BenchParser(utils.Parser):
    """Keeps the options that it does not know, as `training`, for the training script."""

    def parse_known_args(self, args=None, namespace=None) -> tuple[Namespace, list[str]]:
        options, rest = super().parse_known_args(args, namespace)
        options.training = rest
        return options, []


def parse_options(argv: list[str] | None = None) -> Namespace:
    parser = BenchParser(
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("command", choices=list(COMMANDS), help="see above")
    add("--total", action="store_true", help="time whole steps; nothing in them waits")
    add("--steps", type=within(int, 1), default=50, help="steps to time; of real, to train")
    add("--warm_up", type=within(int, 1), default=10, help="steps before the timed ones")
    add("--images", type=within(int, 1), default=50, help="of seg, images to evaluate")
    add("--seconds", type=within(float, 0.1), default=60, help="of schedule, to measure in all")
    add("--limit", type=within(float, 1), default=235, help="of all, seconds to finish in")
    add("--only", nargs="+", metavar="NAME", help="of schedule and all, only these rows")
    return parser.parse_args(argv)


def main() -> None:
    options = parse_options()
    record = COMMANDS[options.command](options)
    print(summary(record))
    header = {
        "command": shlex.join(["python", "tools/bench.py", *sys.argv[1:]]),
        "torch": torch.__version__,
    }
    print(json.dumps({**header, **record}))


if __name__ == "__main__":
    utils.run_main(main)
