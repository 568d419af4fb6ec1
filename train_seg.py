"""Fine-tune for semantic segmentation from any initialisation (Eq. 2), few-shot by default.

    python train_seg.py                                                       # synthetic street world, random weights
    python train_seg.py --data kitti --init runs/NAME --train_size 16   # all of a depth network but its last layer
    python train_seg.py --data camvid --init runs/NAME --init_parts encoder --freeze_encoder
    python train_seg.py --data kitti --init imagenet

Weights, options, log, pictures and scores go to runs/<name>/. The same command again continues where it stopped.
"""

import argparse
import math
import os
import re
from datetime import timedelta
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

import datasets
import evaluate
import losses
import networks
import utils
from utils import STOPPED, InputError, Parser, Run, run_main, save_json, within

FEATURES = 2 ** 32  # bytes that a frozen encoder's features of the training set may take to be kept
CURVES = ("miou", "pixel_accuracy", "cross_entropy")  # logged at every evaluation (Figure 2)


def parse_options() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what to learn")
    group.add_argument("--data", default="synthetic", help=f"one of {', '.join(datasets.LABELLED)}")
    group.add_argument("--train_size", type=within(int, 1),
                       help="labelled images to train on, drawn at random (paper: 16; default: all)")
    group.add_argument("--split_seed", type=within(int, 0), default=0,
                       help="of that draw; the images for evaluation are always the same")
    group.add_argument("--crop", type=within(int, 64, 8192), nargs=2, metavar=("H", "W"),
                       help="train on random crops of the resized images (paper: Cityscapes 512 512 of 1024 2048)")
    group.add_argument("--jitter", type=within(float, 0, 1), default=0.0,
                       help="brightness, contrast and saturation vary by this share (paper: 0; Cityscapes 0.5)")
    group.add_argument("--eval_mode", choices=("whole", "slide"), default="whole",
                       help="evaluate images resized to --height and --width, or at their own size through overlapping "
                            "windows of the size trained on")
    group = parser.add_argument_group("network")
    group.add_argument("--arch", choices=("unet", "deeplabv3", "dpt", "linear"), default="unet",
                       help="unet: the depth network with its last layer replaced; deeplabv3: torchvision's; dpt: of a "
                            "ViT; linear: a probe of the frozen encoder, batch norm and a 1x1 convolution")
    group.add_argument("--encoder", choices=networks.ENCODERS, default="resnet18", metavar="NAME",
                       help=f"one of {', '.join(networks.ENCODERS)}: size and patch of a ViT")
    group.add_argument("--dpt_layers", choices=("spread", "last"), default="spread", help=networks.DPT_LAYERS_HELP)
    group.add_argument("--init", default="none",
                       help="none, imagenet, or a checkpoint (model.pt, run folder, Monodepth2 folder, ...)")
    group.add_argument("--init_parts", choices=("encoder", "all"), default="all",
                       help="what --init loads of a checkpoint (Table 3: encoder)")
    group.add_argument("--freeze_encoder", action="store_true",
                       help="train the decoder alone: nothing in the encoder changes, nor its batch-norm statistics")
    group.add_argument("--no_feature_cache", action="store_true",
                       help="run a frozen encoder at every step, even where its features of all images and their "
                            "mirror images fit into memory")
    group.add_argument("--freeze_batch_norm_only", action="store_true",
                       help="what the authors' release calls freezing: the encoder trains, its statistics do not")
    group.add_argument("--normalize_twice", action="store_true",
                       help="as the authors' release does for ImageNet: mean and deviation are taken off twice")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--steps", type=within(int, 1), default=20_000, help="paper: 20000")
    group.add_argument("--batch_size", type=within(int, 1), default=16, help="paper: 16")
    group.add_argument("--learning_rate", type=within(float, 1e-12, 1), default=1e-4, help="at the start; falls to 0")
    group.add_argument("--encoder_learning_rate_factor", type=within(float, 1e-12), default=1.0, metavar="X",
                       help="the encoder's learning rate is X times the decoder's")
    group.add_argument("--optimizer", choices=("adam", "sgd"), default="adam",
                       help="sgd: momentum 0.9, weight decay 1e-4 (paper: adam; Cityscapes sgd)")
    group.add_argument("--schedule", choices=("cosine", "poly"), default="cosine",
                       help="poly: (1 - step / steps)^0.9 (paper: cosine; Cityscapes poly)")
    group.add_argument("--eval_every", type=within(int, 1), default=1000,
                       help="steps between evaluations (paper: 1000)")
    datasets.add_loader_options(parser)
    utils.add_run_options(parser)
    networks.add_device_options(parser)
    args = parser.parse_args()
    init = args.init
    if init not in ("none", "imagenet"):
        init = os.path.basename(os.path.normpath(init).removesuffix("/model.pt"))
    args.freeze_encoder |= args.arch == "linear"
    if args.freeze_encoder and args.freeze_batch_norm_only:
        raise InputError("--freeze_encoder and --freeze_batch_norm_only: choose one")
    tuned = "frozen" if args.freeze_encoder else "frozenbn" if args.freeze_batch_norm_only else "all"
    network = args.encoder if args.arch == "unet" else f"{args.arch}_{args.encoder}"
    name = "_".join(["seg", args.data, network, init, tuned, f"n{args.train_size or 'all'}", f"split{args.split_seed}",
                     f"seed{args.seed}"])
    args.name = args.name or re.sub(r"[^\w.+=-]", "-", name)  # --init may be "my weights.pth"
    networks.check_options(args)
    evaluate.prepare_benchmark(args)
    return args


def make_datasets(args: argparse.Namespace) -> tuple[datasets.Labelled, datasets.Labelled]:
    """The images to train on and those to evaluate on."""
    cls, root = datasets.find_data(args.data, args.data_path, datasets.LABELLED)
    size = {"height": args.height, "width": args.width}
    train_set = cls(root, "train", train_size=args.train_size, split_seed=args.split_seed, augment=True, crop=args.crop,
                    **size)
    return train_set, cls(root, "val", **size)


def make_optimizer(args: argparse.Namespace, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Adam, or SGD as for Cityscapes, over what is not frozen; each group's "factor" scales its learning rate."""
    groups = [{"params": [p for p in part.parameters() if p.requires_grad], "factor": factor} for part, factor in
              ((model.encoder, args.encoder_learning_rate_factor), (model.decoder, 1.0))]
    groups = [group for group in groups if group["params"]]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.learning_rate, momentum=0.9, weight_decay=1e-4, fused=True)
    return torch.optim.Adam(groups, lr=args.learning_rate, fused=True)


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """The decoder's learning rate at a step: falls to 0 along a cosine, or as a polynomial."""
    done = step / args.steps
    share = 0.5 * (1 + math.cos(math.pi * done)) if args.schedule == "cosine" else (1 - done) ** 0.9
    return args.learning_rate * share


def name_pretraining(init: str) -> str:
    """How the result tables call an initialisation: "Depth (stereo) on kitti (39810 samples, 640x192, 66350 steps)"."""
    if init in ("none", "imagenet"):
        return {"none": "None", "imagenet": "ImageNet"}[init]
    source, _, options = networks.read_checkpoint(init)
    if "task" not in options:
        return source
    name = options["task"].capitalize()
    if options["task"] == "depth":  # the paper's names: Depth-Rand started from random weights, Depth from ImageNet's
        name += "-Rand" if options.get("init") == "none" else ""
        name += f" ({options['supervision']})"
    if "data" in options:
        name += f" on {options['data']}"
    if "samples" in options:
        name += " ({samples} samples, {width}x{height}, {steps} steps)".format(**options)
    return name


def encode(model: torch.nn.Module, batch: dict, cache: dict | None) -> list[torch.Tensor]:
    """The encoder's features; those of a frozen one are in `cache`, by image and whether it is flipped."""
    if cache is None:
        return model.encoder(batch["image"])
    keys = list(zip(batch["index"].tolist(), batch["mirrored"].tolist()))
    for i, key in enumerate(keys):
        if key not in cache:  # alone, so that the others in the batch make no difference
            cache[key] = model.encoder(batch["image"][i:i + 1])
    return [torch.cat(level) for level in zip(*(cache[key] for key in keys))]


def compute_loss(model: torch.nn.Module, batch: dict, cache: dict | None, choices: argparse.Namespace,
                 meter: evaluate.Meter) -> tuple[dict, torch.Tensor]:
    """Cross-entropy over labelled pixels (Eq. 2), and the logits (B, classes, H, W)."""
    with choices.autocast():
        logits = model.decoder(encode(model, batch, cache))[0].float()
    meter.lap("networks")
    nats = F.cross_entropy(logits, batch["label"], ignore_index=datasets.IGNORE, reduction="none")
    return {"loss": losses.masked_mean(nats, batch["label"] != datasets.IGNORE)}, logits


def save_pictures(path: str, batch: dict, logits: torch.Tensor, colours: tuple, count: int = 4) -> None:
    """Rows of: image, label, prediction."""
    columns = (batch["image"][:count], evaluate.colour_labels(batch["label"][:count], colours),
               evaluate.colour_labels(logits[:count].argmax(1), colours))
    evaluate.to_picture(torch.cat([torch.cat(list(column), 1) for column in columns], 2)).save(path)


def main() -> int:
    args = parse_options()
    utils.join_ranks(args)
    device = networks.pick_device(args.device)
    choices = networks.device_choices(args, device)

    # data
    train_set, val_set = make_datasets(args)
    if len(train_set) < args.batch_size:
        raise InputError(f"--batch_size {args.batch_size} is larger than the data ({len(train_set)} images)")
    val_set.read_all(native_label=True)
    seen = train_set.read_all(skip=args.on_bad_sample == "skip")
    absent = [name for c, name in enumerate(train_set.classes) if c not in seen and train_set.keep]
    window = (args.crop or val_set.size) if args.eval_mode == "slide" else None

    # model
    torch.manual_seed(args.seed)
    model = networks.build(args.arch, args.encoder, len(train_set.classes), normalize_twice=args.normalize_twice,
                           dpt_layers=args.dpt_layers)
    loaded = "random weights"
    if args.init != "none":
        loaded = networks.load_weights(model, args.init, "segmentation", args.init_parts)
    pretraining = name_pretraining(args.init)
    model.to(device, memory_format=choices.memory_format).train()
    if args.sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.freeze_encoder:
        model.encoder.requires_grad_(False)
    if args.freeze_encoder or args.freeze_batch_norm_only:
        model.encoder.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    cache = None
    if args.freeze_encoder and not (args.crop or args.jitter or args.no_feature_cache):
        features = model.encoder(torch.zeros(1, 3, *train_set.size, device=device))
        if 2 * len(train_set) * sum(f.nbytes for f in features) <= FEATURES:
            cache = {}

    # optimiser
    optimizer = make_optimizer(args, model)

    if choices.compile == "all":
        for part in networks.parts_of(model).values():
            part.compile()

    run = Run(args, "train_seg.py", networks.read_last)
    start = networks.restore(run.checkpoint, optimizer, model)
    if run.finished:
        print(f"{run.folder}: finished already")
        return 0
    if args.tensorboard and run.writes:
        run.board = evaluate.tensorboard(run.folder, start)
    print(f"{run.folder}: segmentation of {len(train_set.classes)} classes of {args.data}, {len(train_set)} images for "
          f"training and {len(val_set)} for evaluation")
    print(f"{args.arch} {args.encoder}, {sum(p.numel() for p in parameters) / 1e6:.1f} M trained parameters"
          f"{' (encoder frozen)' * args.freeze_encoder}{' (its features kept)' * (cache is not None)}, {loaded}; "
          f"{args.width}x{args.height}, batch {args.batch_size}, "
          f"{args.steps} steps on {device}" + (f"; continues at step {start}" if start else ""))
    if absent:
        print("no training image shows " + ", ".join(absent))

    options = {"task": "segmentation", "arch": args.arch, "encoder": args.encoder, "height": args.height,
               "width": args.width, "crop": args.crop, "eval_mode": args.eval_mode,
               "normalize_twice": args.normalize_twice, "dpt_layers": args.dpt_layers, "data": args.data,
               "classes": list(train_set.classes),
               "colours": [list(colour) for colour in train_set.colours]}

    # loop
    if start == 0 and run.writes and not args.benchmark:  # where the curves begin
        scores = evaluate.evaluate_segmentation(model, val_set, device, window=window)
        run.log({"step": 0, **{key: scores[key] for key in CURVES}})
    meter, done, scores = evaluate.Meter(device, exact=args.benchmark), start, {}
    batches = iter(datasets.train_loader(train_set, args, start))
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, dynamic_ncols=True,
                    disable=None if run.writes else True)
    for step in progress:
        meter.lap()
        batch = next(batches)
        datasets.log_skipped(run, step + 1, batch)
        batch = datasets.to_device(batch, device)
        meter.lap("data")
        rate = learning_rate(args, step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]

        if args.jitter:
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            batch["image"] = datasets.color_jitter(batch["image"], generator, args.jitter, hue=0.0, probability=1.0)
        terms, logits = compute_loss(model, batch, cache, choices, meter)
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
            rerun = partial(compute_loss, model, batch, cache, choices, meter) if args.detect else None
            losses.refuse_nonfinite(terms, networks.parts_of(model), done, batch["index"], rerun)
        optimizer.step()
        meter.lap("optimizer")

        if args.benchmark:
            if last:
                return evaluate.print_benchmark(meter, args, device)
            if done == evaluate.WARM_UP:
                meter.reset()
            continue
        if run.writes and (step == 0 or done % args.save_every == 0 or last):
            save_pictures(run.path(f"samples/{done:06d}.png"), batch, logits.detach(), train_set.colours)
        if done % args.log_every == 0 or last:
            record = {**meter.record(args.batch_size), "learning_rate": rate}
            progress.set_postfix({key: f"{value:.4g}" for key, value in record.items()})
            run.log({"step": done, **record})
            if not last and done <= start + args.log_every:
                left = timedelta(seconds=round((args.steps - done) * record["ms_per_step"] / 1000))
                tqdm.write(f"about {left} to go (h:mm:ss), and the evaluations")
        if run.writes and (done % args.eval_every == 0 or done == args.steps):
            scores = evaluate.evaluate_segmentation(model, val_set, device, window=window)
            run.log({"step": done, **{key: scores[key] for key in CURVES}})
            meter.skip()
        if done % args.save_every == 0 or last:
            networks.save(run, done, options, optimizer, model)
        if last:
            break

    if done < args.steps:
        print(f"stopped at step {done}, saved; the same command continues")
        return STOPPED
    if not run.writes:
        return 0
    if not scores:  # killed between last.pt and here
        scores = evaluate.evaluate_segmentation(model, val_set, device, window=window)
    save_json(run.path("result.json"), {"step": done, "pretraining": pretraining, **scores,
                                        **datasets.skipped_samples(run)})
    print(f"{pretraining}: mIoU {scores['miou']:.2f} %, P.Acc {scores['pixel_accuracy']:.2f} %, "
          f"{scores['cross_entropy']:.3f} nats per pixel on {scores['images']} images")
    return 0


if __name__ == "__main__":
    run_main(main)
