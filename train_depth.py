"""Pre-trains on geometry: depth from video, stereo or LiDAR (Eq. 1), and the baselines of Section 4.1.

    python train_depth.py --data kitti --supervision mono+stereo    # the paper's pre-training
    python train_depth.py --data frames --data_path my_video --fov 60
    python train_depth.py --height 64 --width 192 --batch_size 4 --steps 250 --learning_rate 1e-3

Defaults are the paper's KITTI schedule; the last line is a short try on the synthetic street.
Weights, options, log and pictures go to runs/<name>/; the same command again continues there.
"""

import math
import os
import time
from argparse import Namespace, RawDescriptionHelpFormatter

import torch
from torch import Tensor, nn
from tqdm import tqdm

import batches
import datasets
import images
import losses
import metrics
import networks
import pictures
import utils
import weights
from utils import InputError, within

INTRINSICS_RATE = 30  # learning rate of the intrinsics relative to that of the networks
CHANNELS = {"depth": 1, "flow": 2, "reconstruction": 3}
# Monodepth2's range, 0.1 to 100; it sets KITTI's baseline to 0.1, so its unit is 5.4 m
RANGES = {"mono": (0.1, 100.0), "stereo": (0.54, 540.0), "mono+stereo": (0.54, 540.0),
          "depth": (1.0, 100.0)}
# which kinds of run (kind_of) read an option that others do not
READ_BY = {"supervision": RANGES, "min_depth": RANGES, "max_depth": RANGES, "monodepth2": RANGES,
           "smoothness": ("mono", "stereo", "mono+stereo", "flow"),
           "baseline": ("stereo", "mono+stereo"), "intrinsics": ("mono",),
           "depth_scale": ("depth",), "reconstruction": ("reconstruction",)}


# ---- options -----------------------------------------------------------------------------------

def parse_options(argv: list[str] | None = None) -> Namespace:
    parser = utils.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to learn").add_argument
    add("--task", choices=("depth", "flow", "reconstruction"), default="depth", help="Section 4.1")
    add("--supervision", choices=("mono", "stereo", "mono+stereo", "depth"), default="mono",
        help="of depth: neighbouring frames, the other camera, both, or measured depth")
    add("--frame_ids", type=within(int, -1000, 1000), nargs="+",
        help="target 0, then source frames (default: 0 -1 1 for mono, 0 -1 for flow, else 0)")
    add("--intrinsics", choices=("given", "learned"), default="given",
        help="learned: estimate each camera's K together with depth and pose (mono only)")
    add("--crop", type=within(int, 64, 8192), nargs=2, metavar=("H", "W"),
        help="size of random crops (Table 5, Depth-cropped: 256 256)")
    add("--min_depth", type=within(float, 1e-6), help="default: 0.1; stereo 0.54 m, LiDAR 1 m")
    add("--max_depth", type=within(float, 1e-6), help="default: 100; stereo 540 m, LiDAR 100 m")
    add("--smoothness", type=within(float, 0), help="weight (default: 1e-3; flow 2)")
    add("--reconstruction", choices=("paper", "release"), default="paper",
        help="paper: rectangles removed, L1 there; release: 7x7 patches removed, L1 everywhere")
    add("--monodepth2", action="store_true",
        help="depth starts at twice the nearest; views that leave a source see its border")
    datasets.add_clip_options(parser)
    datasets.add_loader_options(parser)

    add = parser.add_argument_group("network").add_argument
    add("--arch", choices=("unet", "deeplabv3", "dpt"), default="unet", help="paper: unet")
    add("--encoder", choices=networks.ENCODERS, default="resnet18", help="vit: size and patch")
    add("--output_stride", type=int, choices=(8, 16), default=8, help="of deeplabv3 (Table 5: 16)")
    add("--init", default="none", type=os.path.normpath, help="none, imagenet, a run or a checkpoint")
    add("--init_parts", choices=("encoder", "all"), default="all", help="what --init loads")

    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=within(int, 1), default=66_350, help="paper: 66350, 20 epochs of KITTI")
    add("--batch_size", type=within(int, 1), default=12, help="paper: 12; the baselines 8")
    add("--learning_rate", type=within(float, 1e-12, 1), default=1e-4, help="paper: 1e-4; flow 5e-5")
    add("--learning_rate_drop", type=within(float, 0, 1), nargs="+", default=[0.75],
        help="shares of the steps at which the rate changes (paper: 0.75)")
    add("--learning_rate_factor", type=within(float, 0, 100), nargs="+", default=[0.1], metavar="X",
        help="from each share on, the rate is X * --learning_rate (paper: 0.1)")
    utils.add_run_options(parser)
    utils.add_device_options(parser)
    args = parser.parse_args(argv)
    for option, readers in READ_BY.items():
        given = getattr(args, option) != parser.get_default(option)
        if given and kind_of(args) not in readers:
            raise InputError(f"--{option} is for {', '.join(readers)}, not for {kind_of(args)}")
    complete(args)
    check(args)
    return args


def complete(args: Namespace) -> None:
    """Fills in the defaults that depend on other options."""
    if args.frame_ids is None:
        alone = [0, -1] if args.task == "flow" else [0]
        args.frame_ids = [0, -1, 1] if is_video(args) else alone
    nearest, farthest = RANGES[args.supervision]
    args.min_depth = args.min_depth or nearest
    args.max_depth = args.max_depth or farthest
    if args.smoothness is None:
        args.smoothness = 2.0 if args.task == "flow" else 1e-3
    network = args.encoder if args.arch == "unet" else f"{args.arch}_{args.encoder}"
    init = args.init if args.init in ("none", "imagenet") else "init"
    args.name = args.name or f"{kind_of(args)}_{args.data}_{network}_{init}_seed{args.seed}"


def check(args: Namespace) -> None:
    """Refuses options that do not fit together."""
    if (is_video(args) or args.task == "flow") != (len(args.frame_ids) > 1):
        raise InputError("--frame_ids: video and flow need source frames, other tasks none")
    if args.task == "flow" and (len(args.frame_ids) != 2 or args.arch != "unet"):
        raise InputError("--task flow takes two frames, --frame_ids 0 -1, and --arch unet")
    if args.min_depth >= args.max_depth:
        raise InputError(f"--min_depth {args.min_depth:g} is not below --max_depth {args.max_depth:g}")
    shares = args.learning_rate_drop
    if shares != sorted(shares) or len(shares) != len(args.learning_rate_factor):
        raise InputError("--learning_rate_drop must rise and have as many values as --learning_rate_factor")
    networks.check_options(args)


def kind_of(args: Namespace) -> str:
    """The supervision of depth, or the other task."""
    return args.supervision if args.task == "depth" else args.task


def is_video(args: Namespace) -> bool:
    return kind_of(args) in ("mono", "mono+stereo")


def is_stereo(args: Namespace) -> bool:
    return kind_of(args) in ("stereo", "mono+stereo")


def is_measured(args: Namespace) -> bool:
    return kind_of(args) == "depth"


# ---- data and model ----------------------------------------------------------------------------

def make_dataset(args: Namespace) -> datasets.Clips:
    frame_ids = [str(offset) for offset in args.frame_ids]
    if is_stereo(args):
        frame_ids.append("s")
    needs_K = is_stereo(args) or (is_video(args) and args.intrinsics == "given")
    return datasets.find_clips(args, frame_ids, is_measured(args), fov=None if needs_K else 60.0)


class Objective(nn.Module):
    """Networks and loss as one module with one forward: what is compiled and what DDP wraps.

    forward(batch) returns (terms, views): scalars with "loss" among them, and maps to look at.
    Networks see jittered frames; losses compare the real ones.
    """

    def __init__(self, args: Namespace, device: torch.device):
        super().__init__()
        self.args = args
        self.autocast = utils.autocast(args, device)
        self.photometric_loss = losses.PhotometricLoss(
            args.min_depth, args.max_depth, args.smoothness, border=args.monodepth2)
        arch = "flow" if args.task == "flow" else args.arch
        self.model = networks.build(arch, args.encoder, CHANNELS[args.task], scales=(0, 1, 2, 3),
                                    output_stride=args.output_stride)
        self.metric = is_stereo(args) or is_measured(args)  # video alone has no metres
        self.pose = networks.PoseNet(args.encoder) if is_video(args) else None
        self.intrinsics = None  # a networks.Intrinsics where K is learned

    def parts(self) -> dict[str, nn.Module]:
        parts = self.model.parts()
        for module in filter(None, (self.pose, self.intrinsics)):
            parts |= module.parts()
        return parts

    def forward(self, batch: dict) -> losses.Results:
        inputs = batch["frames"][:, :len(self.args.frame_ids)]  # no network sees the other camera
        jittered = batches.color_jitter(inputs, batch["jitter"])  # (B, F, 3, H, W)
        tasks = {"depth": self.depth, "flow": self.flow, "reconstruction": self.reconstruction}
        return tasks[self.args.task](jittered, batch)

    def depth(self, jittered: Tensor, batch: dict) -> losses.Results:
        """Eq. (1): photometric error across views, or distance to measured depth."""
        args = self.args
        with self.autocast():
            disparities = [output.sigmoid() for output in self.model(jittered[:, 0])]
        if is_measured(args):
            return losses.supervised_depth_loss(
                disparities, batch["depth"], args.min_depth, args.max_depth)
        K = batch["K"]
        sources = []
        poses = []
        if is_video(args):
            K, poses = self.motion(jittered, batch)
            neighbours = batch["frames"][:, 1:len(args.frame_ids)]
            sources = list(neighbours.unbind(1))
        if is_stereo(args):
            sources.append(batch["frames"][:, -1])
            poses.append(batch["stereo_T"])
        target = batch["frames"][:, 0]
        terms, views = self.photometric_loss(disparities, target, sources, K, poses)
        return terms, {**views, "poses": torch.stack(poses, 1).detach()}

    def motion(self, jittered: Tensor, batch: dict) -> tuple[Tensor, list]:
        """K (B, 3, 3), and the pose (B, 4, 4) from the target to each source frame."""
        K = batch["K"]
        motion_scale = 1.0
        if self.intrinsics is not None:
            K, motion_scale = self.intrinsics(K, batch["camera"], batch["mirrored"])
        target, *sources = jittered.unbind(1)
        poses = []
        for source, offset in zip(sources, self.args.frame_ids[1:]):
            # the pose network sees a pair in temporal order; a past source needs the inverse
            pair = (source, target) if offset < 0 else (target, source)
            with self.autocast():
                axisangle, translation = self.pose(*pair)
            motion = (motion_scale * axisangle, motion_scale * translation)
            poses.append(losses.pose_to_matrix(*motion, invert=offset < 0))
        return K, poses

    def flow(self, jittered: Tensor, batch: dict) -> losses.Results:
        with self.autocast():
            flows = self.model(jittered[:, 0], jittered[:, 1])
        target, source = batch["frames"].unbind(1)
        return losses.flow_loss(flows, target, source, self.args.smoothness)

    def reconstruction(self, jittered: Tensor, batch: dict) -> losses.Results:
        removed = batch["removed"]  # (B, 1, H, W)
        with self.autocast():
            outputs = self.model(jittered[:, 0].masked_fill(removed, batches.NEUTRAL))
        colours = [output.sigmoid() for output in outputs]
        everywhere = self.args.reconstruction == "release"
        return losses.reconstruction_loss(colours, batch["frames"][:, 0], removed, everywhere)


def build(args: Namespace, device: torch.device) -> tuple[Objective, str]:
    """The objective on its device, and what was loaded into it."""
    torch.manual_seed(args.seed)
    objective = Objective(args, device)
    if objective.metric and not args.monodepth2:
        # start at the range's geometric mean; a fresh sigmoid starts at twice the nearest depth
        networks.set_head_bias(objective.model.decoder, math.log(args.min_depth / args.max_depth) / 2)
    loaded = weights.load_weights(
        objective.model, args.init, args.task, args.init_parts,
        pose=objective.pose, min_depth=args.min_depth)
    return objective.to(device).train(), loaded


def make_optimizer(args: Namespace, objective: Objective) -> torch.optim.Optimizer:
    both = nn.ModuleList(filter(None, (objective.model, objective.pose)))
    groups = [{"params": both.parameters(), "factor": 1}]
    if objective.intrinsics is not None:
        groups.append({"params": objective.intrinsics.parameters(), "factor": INTRINSICS_RATE})
    return torch.optim.Adam(groups, lr=args.learning_rate, fused=True)


def learning_rate(args: Namespace, step: int) -> float:
    passed = sum(step >= share * args.steps for share in args.learning_rate_drop)
    return args.learning_rate * [1.0, *args.learning_rate_factor][passed]


def add_draws(batch: dict, args: Namespace, step: int) -> None:
    """Adds the step's random numbers to its batch: functions of seed and step alone."""
    frames = batch["frames"]
    batches.seed_dropout(args.seed, step)
    draws = {"jitter": batches.draw_jitter(len(frames), args.seed, step)}
    if args.task == "reconstruction":
        kind = "rectangles" if args.reconstruction == "paper" else "patches"
        draws["removed"] = batches.draw_patches(frames[:, 0].shape, args.seed, step, kind)
    for key, value in draws.items():
        batch[key] = batches.to_device(value, frames.device)


def introduce(args: Namespace, dataset: datasets.Clips, loaded: str) -> None:
    """Prints what this run does."""
    left_out = f" (left out: {dataset.dropped})" if dataset.dropped else ""
    epochs = args.steps * args.batch_size / len(dataset)
    print(f"{args.name}: {len(dataset)} samples of {dataset.name}{left_out}")
    print(f"{args.arch} {args.encoder}, {loaded}; {args.width}x{args.height}, "
          f"{args.steps} steps of {args.batch_size} = {epochs:.1f} epochs on {args.device}")


# ---- training ----------------------------------------------------------------------------------

def main() -> int:
    args = parse_options()
    utils.join_processes(args)
    device = utils.pick_device(args.device)

    # data
    dataset = make_dataset(args)
    dataset.read(0)  # wrong paths and calibrations show at once
    args.data_files = dataset.identity()

    # model
    objective, loaded = build(args, device)
    if args.intrinsics == "learned":
        cameras = datasets.find_cameras(dataset, args.fov)
        learned = networks.Intrinsics(cameras.given, cameras.start, dataset.size)
        objective.intrinsics = learned.to(device)
    optimizer = make_optimizer(args, objective)

    # run folder: a checkpoint there is continued
    run = utils.Run(args, "train_depth.py", defaults=parse_options([]))
    if run.finished:
        print(f"{run.folder}: finished already")
        return 0
    step_module = utils.prepare(objective, args, device)
    start = run.restore(optimizer, objective.parts())
    introduce(args, dataset, loaded)
    keys = ("task", "supervision", "arch", "encoder", "init", "height", "width", "crop", "frame_ids",
            "min_depth", "max_depth", "data", "seed", "shuffle_depth", "reconstruction")
    options = {key: getattr(args, key) for key in keys}
    options |= objective.model.settings
    options |= {"metric": objective.metric, "samples": len(dataset)}

    # loop
    meter = utils.Meter()
    trouble = {}
    done = start
    stream = batches.train_batches(dataset, args, start, device)
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps,
                     disable=None if run.writes else True):
        try:
            batch = next(stream)
        except InputError:  # a file that cannot be read: what was trained is kept
            run.save(done, options)
            raise
        indices = batch.pop("index")
        waited = batch.pop("waited")
        add_draws(batch, args, step)
        rate = learning_rate(args, step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]

        optimizer.zero_grad(set_to_none=True)
        terms, views = step_module(batch)
        if "measured" in views:
            terms["loss"] = terms["loss"] * utils.balance(views["measured"])
        terms["loss"].backward()
        meter.add(terms, waited)
        done = step + 1
        last = done == args.steps or run.stops()
        logs = last or done % args.log_every == 0
        saves = last or done % args.save_every == 0
        if logs or saves or device.type == "cpu":  # reading values synchronises a GPU
            metrics.refuse_nonfinite(terms, objective, done, indices)
        optimizer.step()
        if step == start:  # includes compiling
            tqdm.write(f"first step: {time.perf_counter() - meter.start:.1f} s")
        if run.writes and (step == 0 or saves):
            grid = pictures.draw_views(batch["frames"][:, 0], views)
            grid.save(run.path(f"samples/{done:06d}.png"))
        if logs:
            record = {**meter.record(args.batch_size), "learning_rate": rate}
            if objective.intrinsics is not None:
                record |= images.focal_and_centre(learned.cameras().detach().mean(0))
            run.log({"step": done, **record})
            if done > 0.1 * args.steps:
                metrics.warn_of_trouble(terms, views, trouble)
        if last:
            break
        if saves:
            run.save(done, options)
    run.save(done, options)

    if done < args.steps:
        print(f"stopped at step {done}, saved; the same command continues")
        return utils.STOPPED
    if run.writes:
        result = {"step": done, **run.record, "warnings": list(trouble.values())}
        if objective.intrinsics is not None:
            result["cameras"] = cameras.describe(learned.cameras())
        utils.save_json(run.path("result.json"), result)
        print(f"{args.name}: {done} steps done, loss {run.record.get('loss', math.nan):.4f}")
    return 0


if __name__ == "__main__":
    utils.run_main(main)
