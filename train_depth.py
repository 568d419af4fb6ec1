"""Pre-train on geometry: depth from video, stereo or LiDAR (Eq. 1), and the paper's flow and reconstruction baselines.

    python train_depth.py                                            # the synthetic street world, rendered when missing
    python train_depth.py --data kitti --supervision mono+stereo     # the paper's KITTI pre-training, in data/kitti
    python train_depth.py --data frames --data_path my_video --fov 60
    python train_depth.py --task flow --learning_rate 5e-5 --batch_size 8

Weights, options, log and pictures go to runs/<name>/. The same command again continues where it stopped.
"""

import argparse
import math
from datetime import timedelta
from functools import partial

import numpy as np
import torch
from torchvision.utils import flow_to_image
from tqdm import tqdm

import datasets
import evaluate
import losses
import networks
import utils
from utils import STOPPED, InputError, Parser, Run, run_main, save_json, within

INTRINSICS_RATE = 30  # learning rate of the intrinsics relative to that of the networks


def parse_options() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what to learn")
    group.add_argument("--task", choices=("depth", "flow", "reconstruction"), default="depth")
    group.add_argument("--supervision", choices=("mono", "stereo", "mono+stereo", "depth"), default="mono",
                       help="of --task depth: neighbouring frames, the other camera, both, or measured depth")
    group.add_argument("--depth_loss", choices=("l1", "abs_rel", "affine"), default="l1",
                       help="of --supervision depth: L1 in metres (paper), L1 / depth, or 1/depth up to scale, shift")
    group.add_argument("--frame_ids", type=within(int, -1000, 1000), nargs="+", default=None,
                       help="target, then source frames (default: 0 -1 1 for mono, 0 -1 for flow, else 0)")
    group.add_argument("--intrinsics", choices=("given", "learned"), default="given",
                       help="learned: estimate focal lengths and principal point of each folder's camera together with "
                            "depth and pose, from frames between which the camera turns (of --supervision mono)")
    group.add_argument("--crop", type=within(int, 64, 8192), nargs=2, metavar=("H", "W"),
                       help='random crops (Table 5, "Depth-cropped": 256 256)')
    group.add_argument("--min_depth", type=within(float, 1e-6),
                       help="of the network's range (default: 0.1; stereo 0.54 metres, depth 1 metre)")
    group.add_argument("--max_depth", type=within(float, 1e-6),
                       help="of the network's range (default: 100; stereo 540 metres, depth 100 metres)")
    datasets.add_clip_options(parser)
    group = parser.add_argument_group("network")
    group.add_argument("--arch", choices=("unet", "deeplabv3", "dpt"), default="unet",
                       help="paper: unet, with four output scales; deeplabv3 for Table 5; dpt for a ViT")
    group.add_argument("--encoder", choices=networks.ENCODERS, default="resnet18", metavar="NAME",
                       help=f"one of {', '.join(networks.ENCODERS)}: size and patch of a ViT")
    group.add_argument("--dpt_layers", choices=("spread", "last"), default="spread", help=networks.DPT_LAYERS_HELP)
    group.add_argument("--init", default="none",
                       help="none, imagenet, or a checkpoint (model.pt, run folder, Monodepth2 folder, ...)")
    group.add_argument("--init_parts", choices=("encoder", "all"), default="all",
                       help="what --init loads of a checkpoint")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--steps", type=within(int, 1), default=66_350,
                       help="paper: 66350, 20 epochs of Eigen-Zhou's 39810 samples at batch 12")
    group.add_argument("--batch_size", type=within(int, 1), default=12,
                       help="paper: 12; flow and reconstruction 8")
    group.add_argument("--learning_rate", type=within(float, 1e-12, 1), default=1e-4,
                       help="of Adam; paper: 1e-4, flow 5e-5")
    group.add_argument("--learning_rate_drop", type=within(float, 0, 1), default=0.75, metavar="SHARE",
                       help="share of the steps after which the learning rate falls (paper: 15 of 20 epochs)")
    group.add_argument("--learning_rate_factor", type=within(float, 0, 1), default=0.1,
                       help="by which it then falls (paper: 0.1; reconstruction 0.5 after half of the steps)")
    group.add_argument("--smoothness", type=within(float, 0),
                       help="weight of smoothness (paper: 1e-3; flow 2)")
    group.add_argument("--no_automask",
                       action="store_true", help="train on pixels that an unmoved source explains as well")
    group.add_argument("--average_sources", action="store_true", help="mean error over sources instead of the minimum")
    group.add_argument("--patches", choices=("patches", "rectangles"), default="rectangles",
                       help="what --task reconstruction removes: the paper's rectangles, the release's 7x7 patches")
    group.add_argument("--scales", choices=("auto", "looped", "batched"), default="auto",
                       help="the photometric loss of the four scales one after the other, or as one batch, which takes "
                            "more memory (auto: batched on a GPU)")
    datasets.add_loader_options(parser)
    utils.add_run_options(parser)
    networks.add_device_options(parser)
    args = parser.parse_args()

    video = args.task == "depth" and "mono" in args.supervision
    args.frame_ids = args.frame_ids or ([0, -1, 1] if video else [0, -1] if args.task == "flow" else [0])
    if args.frame_ids[0] != 0 or len(set(args.frame_ids)) < len(args.frame_ids):
        raise InputError("--frame_ids starts with the target, 0, and names every frame once")
    if video and len(args.frame_ids) < 2:
        raise InputError("--frame_ids needs at least one source frame besides 0")
    if args.task == "flow" and len(args.frame_ids) != 2:
        raise InputError("--task flow takes two frames: --frame_ids 0 -1")
    if args.task == "flow" and args.arch != "unet":
        raise InputError(f"--task flow has the U-Net's decoder: leave --arch {args.arch} out")
    if args.intrinsics == "learned" and (args.task, args.supervision) != ("depth", "mono"):
        raise InputError("--intrinsics learned is for --task depth --supervision mono: a stereo pair is calibrated")
    # the range of Monodepth2's network, 0.1 to 100; with a metric baseline its unit is 5.4 m
    near, far = {"mono": (0.1, 100.0), "depth": (1.0, 100.0)}.get(args.supervision, (0.54, 540.0))
    args.min_depth, args.max_depth = args.min_depth or near, args.max_depth or far
    if args.min_depth >= args.max_depth:
        raise InputError(f"--min_depth {args.min_depth:g} is not below --max_depth {args.max_depth:g}")
    if args.smoothness is None:
        args.smoothness = 2.0 if args.task == "flow" else 1e-3
    kind = args.supervision if args.task == "depth" else args.task
    init = args.init if args.init in ("none", "imagenet") else "init"
    network = args.encoder if args.arch == "unet" else f"{args.arch}_{args.encoder}"
    args.name = args.name or f"{kind}_{args.data}_{network}_{init}_seed{args.seed}"
    networks.check_options(args)
    evaluate.prepare_benchmark(args)
    return args


def make_dataset(args: argparse.Namespace) -> datasets.Clips:
    # the baselines have no use for K, and where it is learned it may start anywhere
    fov = None if args.task == "depth" and args.intrinsics == "given" else 60.0
    other_camera = ["s"] * (args.task == "depth" and "stereo" in args.supervision)
    return datasets.find_clips(args, [str(f) for f in args.frame_ids] + other_camera, augment=True, crop=args.crop,
                               with_depth=args.task == "depth" and args.supervision == "depth", fov=fov)


def run_networks(args: argparse.Namespace, model: torch.nn.Module, pose: torch.nn.Module | None, batch: dict,
                 step: int, intrinsics: torch.nn.Module | None = None) -> dict:
    """What the networks say of jittered frames: "reconstructions", "flows", or "disparities", "poses" (mono), "K"."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    # no network sees the other camera
    jittered = datasets.color_jitter(batch["frames"][:, :len(args.frame_ids)], generator)
    target = jittered[:, 0]
    if args.task == "reconstruction":
        removed = datasets.remove_patches(target, generator, args.patches)
        images = model(target.masked_fill(removed, 0.45))  # 0 once normalised
        return {"reconstructions": [out.float().sigmoid() for out in images], "removed": removed}
    if args.task == "flow":
        return {"flows": model(target, jittered[:, 1])}

    K, unit = (batch["K"], 1) if intrinsics is None else intrinsics(batch["K"], batch["camera"], batch["mirrored"])
    outputs = {"disparities": [out.float().sigmoid() for out in model(target)], "poses": [], "K": K}
    for i, offset in enumerate(args.frame_ids[1:] if "mono" in args.supervision else (), start=1):
        # the pose network always sees a pair in temporal order; a past source needs the inverse of what it says
        pair = (jittered[:, i], target) if offset < 0 else (target, jittered[:, i])
        motion = [unit * part for part in pose(*pair)]
        outputs["poses"].append(losses.pose_to_matrix(*motion, invert=offset < 0))
    return outputs


def compute_loss(args: argparse.Namespace, model: torch.nn.Module, pose: torch.nn.Module | None, batch: dict,
                 step: int, choices: argparse.Namespace, meter: evaluate.Meter,
                 intrinsics: torch.nn.Module | None = None) -> tuple[dict, dict]:
    """Loss terms and maps to look at, of one batch. Networks see jittered frames, losses the real ones."""
    with choices.autocast():
        outputs = run_networks(args, model, pose, batch, step, intrinsics)
    meter.lap("networks")
    frames = batch["frames"]  # (B, F, 3, H, W), target first
    pyramid = losses.image_pyramid(frames[:, 0])
    if args.task == "reconstruction":
        loss = losses.reconstruction_loss(outputs["reconstructions"], pyramid, outputs["removed"])
        return {"loss": loss}, {"removed": outputs["removed"], "reconstruction": outputs["reconstructions"][0].detach()}
    if args.task == "flow":
        return losses.flow_loss(outputs["flows"], pyramid, frames[:, 1], args.smoothness)
    if args.supervision == "depth":
        return losses.measured_depth_loss(outputs["disparities"], batch["depth"], args.min_depth, args.max_depth,
                                          args.depth_loss)
    sources, poses = [frames[:, i + 1] for i in range(len(outputs["poses"]))], outputs["poses"]
    if "stereo" in args.supervision:
        sources, poses = [*sources, frames[:, -1]], [*poses, batch["stereo_T"]]
    terms, views = losses.depth_loss(
        outputs["disparities"], pyramid, sources, outputs["K"], poses, min_depth=args.min_depth,
        max_depth=args.max_depth, smoothness_weight=args.smoothness, automask=not args.no_automask,
        minimum=not args.average_sources, compare=choices.compare, batched=choices.batched)
    return terms, {**views, "poses": torch.stack(poses, 1).detach()}


def find_trouble(record: dict, views: dict) -> dict[str, str]:
    """What is wrong with a training that went on for a while, by kind. Asks the device, so at log steps only."""
    trouble = {}
    if record.get("masked", 0) > 0.8:
        trouble["masked"] = (f"{record['masked']:.0%} of the pixels do not train, as an unmoved source explains them: "
                             "does the camera stand still? (--min_motion 2 leaves such frames out)")
    if "depth" in views:
        disparity = 1 / views["depth"].flatten(1)
        if float((disparity.std(1) / disparity.mean(1)).mean()) < 0.02:
            trouble["depth"] = "disparity is nearly the same everywhere: try another --seed or a lower --learning_rate"
    if "poses" in views:
        change = (views["poses"] - torch.eye(4, device=views["poses"].device))[:, :, :3]  # (B, sources, 3, 4)
        moved = change[..., 3].norm(dim=-1).mean() / views["depth"].mean()
        if float(moved) < 1e-3 and float(change[..., :3].abs().mean()) < 1e-3:
            trouble["pose"] = "the pose network sees hardly any motion between frames, and depth is learned from motion"
    return trouble


def focal_and_centre(K: torch.Tensor | np.ndarray) -> dict[str, float]:
    """fx, fy, cx, cy in pixels of K (3, 3)."""
    return dict(zip(("fx", "fy", "cx", "cy"), (float(K[i]) for i in ((0, 0), (1, 1), (0, 2), (1, 2)))))


def describe_cameras(intrinsics: torch.nn.Module, folders: list[str], shapes: list[tuple[int, int]]) -> dict[str, dict]:
    """Learned intrinsics by folder, also printed, at the size of training and at the images' native (height, width)."""
    cameras = {}
    for folder, shape, K in zip(folders, shapes, intrinsics.cameras().detach().cpu().double().numpy()):
        native = focal_and_centre(datasets.resize_intrinsics(K, intrinsics.size, shape))
        cameras[folder] = {"training": focal_and_centre(K), "native": {**native, "height": shape[0], "width": shape[1]}}
        print(f"{folder}: " + "  ".join(f"{key} {value:.1f}" for key, value in native.items())
              + f" in pixels of its {shape[1]}x{shape[0]} images")
    return cameras


def save_pictures(path: str, frames: torch.Tensor, views: dict, count: int = 4) -> None:
    """Columns: target, then depth, warped source and mask; or flow and warped; or removed and reconstructed."""
    columns = [frames[:count, 0]]
    if "depth" in views:
        columns.append(evaluate.colour_depth(views["depth"][:count]))
    if "flow" in views:
        columns.append(flow_to_image(views["flow"][:count]) / 255)
    if "warped" in views:
        warped = views["warped"][:count]
        columns.append(warped[:, 0] if warped.dim() == 5 else warped)
    if "mask" in views:
        columns.append(views["mask"][:count].float().expand(-1, 3, -1, -1))
    if "removed" in views:
        columns += [frames[:count, 0].masked_fill(views["removed"][:count], 0.45), views["reconstruction"][:count]]
    evaluate.to_picture(torch.cat([torch.cat(list(column), 1) for column in columns], 2)).save(path)


def main() -> int:
    args = parse_options()
    utils.join_ranks(args)
    device = networks.pick_device(args.device)
    choices = networks.device_choices(args, device)

    # data
    dataset = make_dataset(args)
    if len(dataset) < args.batch_size:
        raise InputError(f"--batch_size {args.batch_size} is larger than the data ({len(dataset)} samples)")
    if args.on_bad_sample == "stop":
        dataset[0]  # what cannot be read is found before the run begins

    # model
    torch.manual_seed(args.seed)
    channels = {"depth": 1, "flow": 2, "reconstruction": 3}[args.task]
    arch = "flow" if args.task == "flow" else args.arch
    model = networks.build(arch, args.encoder, channels, scales=(0, 1, 2, 3), dpt_layers=args.dpt_layers)
    pose = networks.PoseNet("resnet18") if args.task == "depth" and "mono" in args.supervision else None
    metric = args.task == "depth" and ("stereo" in args.supervision or (args.supervision == "depth"
                                                                        and args.depth_loss != "affine"))
    if metric:  # start in the middle of the range of depths: a sigmoid of 0.5 is twice the nearest, far from any street
        middle = losses.depth_to_disparity(math.sqrt(args.min_depth * args.max_depth), args.min_depth, args.max_depth)
        networks.set_head_bias(model.decoder, math.log(middle / (1 - middle)))
    loaded = "random weights"
    if args.init != "none":
        loaded = networks.load_weights(model, args.init, args.task, args.init_parts, pose)
    model.to(device, memory_format=choices.memory_format).train()
    if args.sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    parameters = list(model.parameters())
    if pose is not None:
        pose.to(device, memory_format=choices.memory_format).train()
        if args.sync_bn:
            pose = torch.nn.SyncBatchNorm.convert_sync_batchnorm(pose)
        parameters += list(pose.parameters())

    groups, intrinsics = [{"params": parameters, "factor": 1}], None
    if args.intrinsics == "learned":
        folders, shapes, given, guess = datasets.find_cameras(dataset, args.fov)
        intrinsics = networks.Intrinsics(given, guess, dataset.size).to(device)
        groups.append({"params": list(intrinsics.parameters()), "factor": INTRINSICS_RATE})

    # optimiser
    optimizer = torch.optim.Adam(groups, lr=args.learning_rate, fused=True)

    choices.compare = losses.photometric_error
    if choices.compile != "none":
        choices.compare = torch.compile(losses.photometric_error)
    if choices.compile == "all":
        for part in networks.parts_of(model, pose).values():
            part.compile()

    run = Run(args, "train_depth.py", networks.read_last)
    start = networks.restore(run.checkpoint, optimizer, model, pose, intrinsics)
    if run.finished:
        print(f"{run.folder}: finished already")
        return 0
    if args.tensorboard and run.writes:
        run.board = evaluate.tensorboard(run.folder, start)
    what = f"depth ({args.supervision})" if args.task == "depth" else args.task
    print(f"{run.folder}: {what} on {len(dataset)} samples of {dataset.name}"
          + (f" (left out: {dataset.dropped})" * bool(dataset.dropped)))
    print(f"{args.arch} {args.encoder}, {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters, {loaded}; "
          f"{args.width}x{args.height}, batch {args.batch_size}, {args.steps} steps = "
          f"{args.steps * args.batch_size / len(dataset):.1f} epochs on {device}"
          + (f"; continues at step {start}" if start else ""))
    if args.data == "camvid":
        print("these are CamVid's test images: a comparison on CamVid should name this pre-training as transductive")
    if args.task == "depth" and args.supervision == "mono":
        print("monocular video fixes depth up to one unknown scale: it has no metres")
    if intrinsics is not None:
        print("only turning shows a focal length: where the camera hardly turns, it depends on --fov and --steps")

    keys = ("task", "supervision", "depth_loss", "arch", "encoder", "dpt_layers", "init", "height", "width", "crop",
            "min_depth", "max_depth", "data", "seed")
    options = {key: getattr(args, key) for key in keys}
    options |= {"metric": metric, "samples": len(dataset)}

    # loop
    meter, done, record, trouble = evaluate.Meter(device, exact=args.benchmark), start, {}, {}
    batches = iter(datasets.train_loader(dataset, args, start))
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, dynamic_ncols=True,
                    disable=None if run.writes else True)
    for step in progress:
        meter.lap()
        batch = next(batches)
        datasets.log_skipped(run, step + 1, batch)
        batch = datasets.to_device(batch, device)
        meter.lap("data")
        rate = args.learning_rate * (args.learning_rate_factor if step >= args.learning_rate_drop * args.steps else 1)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]

        terms, views = compute_loss(args, model, pose, batch, step, choices, meter, intrinsics)
        meter.add(terms)
        meter.lap("loss")
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        utils.average_gradients(optimizer)
        meter.lap("backward")
        done = step + 1
        last = done == args.steps or run.stops()
        # on a GPU not at every step, as asking means waiting
        if device.type == "cpu" or args.detect or last or done % args.log_every == 0 or done % args.save_every == 0:
            again = partial(compute_loss, args, model, pose, batch, step, choices, meter, intrinsics)
            rerun = again if args.detect else None
            losses.refuse_nonfinite(terms, networks.parts_of(model, pose, intrinsics), done, batch["index"], rerun)
        optimizer.step()
        meter.lap("optimizer")

        if args.benchmark:
            if last:
                return evaluate.print_benchmark(meter, args, device)
            if done == evaluate.WARM_UP:
                meter.reset()
            continue
        if run.writes and (step == 0 or done % args.save_every == 0 or last):
            save_pictures(run.path(f"samples/{done:06d}.png"), batch["frames"], views)
        if done % args.log_every == 0 or last:
            record = {**meter.record(args.batch_size), "learning_rate": rate}
            if intrinsics is not None:
                record |= focal_and_centre(intrinsics.cameras().detach().mean(0))
            progress.set_postfix({key: f"{value:.4g}" for key, value in record.items()})
            run.log({"step": done, **record})
            if not last and done <= start + args.log_every:
                left = timedelta(seconds=round((args.steps - done) * record["ms_per_step"] / 1000))
                tqdm.write(f"about {left} to go (h:mm:ss)")
            found = find_trouble(record, views) if done > 0.1 * args.steps else {}
            for kind in found.keys() - trouble.keys():
                tqdm.write(f"warning: {found[kind]}")
            trouble = {**found, **trouble}
        if done % args.save_every == 0 or last:
            networks.save(run, done, options, optimizer, model, pose, intrinsics)
        if last:
            break

    if done < args.steps:
        print(f"stopped at step {done}, saved; the same command continues")
        return STOPPED
    if not run.writes:
        return 0
    result = {"step": done, "samples": len(dataset), **record, **datasets.skipped_samples(run),
              "warnings": [*trouble.values()]}
    if intrinsics is not None:
        result["cameras"] = describe_cameras(intrinsics, folders, shapes)
    save_json(run.path("result.json"), result)
    print(f"{what}: {done} steps done" + (f", loss {record['loss']:.4f}" if record else ""))
    return 0


if __name__ == "__main__":
    run_main(main)
