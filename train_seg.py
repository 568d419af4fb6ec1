"""Fine-tunes for semantic segmentation from any initialisation (Eq. 2), with few labels or all.

    python train_seg.py --data kitti --init runs/NAME --train_size 16
    python train_seg.py --data camvid --init runs/NAME --init_parts encoder --freeze_encoder
    python train_seg.py --height 64 --width 192 --batch_size 4 --steps 60 --learning_rate 2e-3

Defaults are the paper's KITTI schedule; the last line is a short try on the synthetic street.
Weights, options, log and scores go to runs/<name>/; the same command again continues there.
"""

import argparse
import math
import os
import re
import time

import torch
from tqdm import tqdm

import batches
import datasets
import losses
import metrics
import networks
import pictures
import utils
import weights
from utils import IGNORE, InputError, within

CURVES = ("miou", "pixel_accuracy", "cross_entropy")  # logged at every evaluation (Figure 2)


# ---- options -----------------------------------------------------------------------------------

def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to learn").add_argument
    add("--data", default="synthetic", help=f"one of {', '.join(datasets.LABELLED)}")
    add("--train_size", type=within(int, 1), help="images drawn at random (paper: 16; default: all)")
    add("--split_seed", type=within(int, 0), default=0,
        help="seed of that draw; the evaluation images are always the same")
    add("--leave_out", nargs="+", default=[], metavar="NAME",
        help="images to leave out of training and evaluation, e.g. 000018")
    add("--crop", type=within(int, 64, 8192), nargs=2, metavar=("H", "W"),
        help="random crops of the resized images (Cityscapes: 512 512)")
    add("--scale", type=within(float, 0.1, 10), nargs=2, metavar=("LOW", "HIGH"),
        help="resize by a random factor before the crop (Table 6: 0.5 2)")
    add("--jitter", type=within(float, 0, 1), default=0.0,
        help="brightness, contrast, saturation vary by this share (Cityscapes: 0.5)")
    add("--eval_mode", choices=("whole", "slide"), default="whole",
        help="evaluate whole images, or through overlapping windows of the crop's size")
    datasets.add_loader_options(parser)

    add = parser.add_argument_group("network").add_argument
    add("--arch", choices=("unet", "deeplabv3", "dpt", "linear"), default="unet",
        help="unet: the depth network with a new last layer; linear: a probe of a frozen encoder")
    add("--encoder", choices=networks.ENCODERS, default="resnet18", help="vit: size and patch")
    add("--output_stride", type=int, choices=(8, 16), default=8, help="of deeplabv3 (Table 5: 16)")
    add("--dpt_layers", choices=("spread", "last"), default="spread",
        help="blocks that DPT reads: spread over the depth, or the last four")
    add("--init", default="none", type=os.path.normpath, help="none, imagenet, a run or a checkpoint")
    add("--init_parts", choices=("encoder", "all"), default="all", help="what --init loads")
    add("--freeze_encoder", action="store_true", help="train the decoder alone")
    add("--calibrate_batch_norm", action="store_true",
        help="first estimate the encoder's batch-norm statistics on the training images")
    add("--freeze_batch_norm_only", action="store_true",
        help="what the authors' release calls freezing: weights train, statistics do not")
    add("--normalize_twice", action="store_true",
        help="subtract mean and divide by deviation twice, as the release does for ImageNet")

    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=within(int, 1), default=20_000, help="paper: 20000")
    add("--batch_size", type=within(int, 1), default=16, help="paper: 16")
    add("--learning_rate", type=within(float, 1e-12, 1), default=1e-4, help="at first; falls to 0")
    add("--encoder_learning_rate_factor", type=within(float, 1e-12), default=1.0, metavar="X",
        help="the encoder's rate is X times the decoder's")
    add("--optimizer", choices=("adam", "sgd", "adamw"), default="adam",
        help="sgd has momentum 0.9 (paper: adam; Cityscapes sgd)")
    add("--weight_decay", type=within(float, 0, 1), help="default: adam 0, sgd 1e-4, adamw 0.05")
    add("--clip_gradients", type=within(float, 1e-9), metavar="NORM", help="largest gradient norm")
    add("--warmup_steps", type=within(int, 0), default=0, help="the rate rises from 0 over these")
    add("--schedule", choices=("cosine", "poly"), default="cosine", help="Cityscapes: poly")
    add("--poly_power", type=within(float, 0, 10), default=0.9, help="(1 - step / steps)^POWER")
    add("--eval_every", type=within(int, 1), default=1000, help="steps (paper: 1000)")
    utils.add_run_options(parser)
    utils.add_device_options(parser)
    args = parser.parse_args(argv)

    args.freeze_encoder |= args.arch == "linear"
    if args.freeze_encoder and args.freeze_batch_norm_only:
        raise InputError("--freeze_encoder and --freeze_batch_norm_only: choose one")
    if args.scale is not None and args.crop is None:
        raise InputError("--scale needs --crop: scaled images differ in size")
    if args.scale is not None and args.scale[0] > args.scale[1]:
        raise InputError(f"--scale LOW HIGH: {args.scale[0]:g} is above {args.scale[1]:g}")
    if args.schedule != "poly" and args.poly_power != parser.get_default("poly_power"):
        raise InputError("--poly_power is for --schedule poly")
    args.name = args.name or default_name(args)
    networks.check_options(args)
    return args


def default_name(args: argparse.Namespace) -> str:
    init = os.path.basename(os.path.normpath(args.init).removesuffix("/model.pt"))
    tuned = "frozen" if args.freeze_encoder else "all"
    network = args.encoder if args.arch == "unet" else f"{args.arch}_{args.encoder}"
    draw = f"n{args.train_size or 'all'}_split{args.split_seed}_seed{args.seed}"
    name = f"seg_{args.data}_{network}_{init}_{tuned}_{draw}"
    return re.sub(r"[^\w.+=-]", "-", name)  # --init may be "my weights.pth"


# ---- model and optimiser -----------------------------------------------------------------------

class Objective(torch.nn.Module):
    """Network and loss as one module with one forward: what is compiled and what DDP wraps.

    forward(batch) returns (terms, logits): {"loss"} and (B, classes, H, W).
    """

    def __init__(self, args: argparse.Namespace, classes: int, device: torch.device):
        super().__init__()
        self.args = args
        self.autocast = utils.autocast(args, device)
        self.model = networks.build(
            args.arch, args.encoder, classes, output_stride=args.output_stride,
            dpt_layers=args.dpt_layers, normalize_twice=args.normalize_twice)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[dict, torch.Tensor]:
        image = batch["image"]
        if self.args.jitter > 0:
            image = batches.color_jitter(
                image, batch["jitter"], self.args.jitter, hue=0.0, probability=1.0)
        with self.autocast():
            logits = self.model(image)[0]
        return losses.segmentation_loss(logits, batch["label"]), logits.detach()


def build(args: argparse.Namespace, classes: int, device: torch.device) -> tuple[Objective, str]:
    """The objective on its device, and what was loaded into it."""
    torch.manual_seed(args.seed)
    objective = Objective(args, classes, device)
    loaded = weights.load_weights(objective.model, args.init, "segmentation", args.init_parts)
    objective.to(device).train()
    encoder = objective.model.encoder.requires_grad_(not args.freeze_encoder)
    if args.freeze_encoder or args.freeze_batch_norm_only:
        encoder.eval()
    return objective, loaded


@torch.no_grad()
def calibrate_batch_norm(encoder: torch.nn.Module, train_set: datasets.Labelled) -> None:
    """Estimates the encoder's batch-norm statistics on the training images, and nothing else.

    With means 0 and variances 1, a random frozen encoder is an unfairly weak baseline.
    """
    device = next(encoder.parameters()).device
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if not norms:
        raise InputError("--calibrate_batch_norm: this encoder has no batch norm")
    modes = {norm: (norm.momentum, norm.training) for norm in norms}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    for indices in torch.arange(len(train_set)).tensor_split(math.ceil(len(train_set) / 16)):
        batch = torch.stack([train_set.load(index)[0] for index in indices.tolist()])
        encoder(batch.to(device).float() / 255)
    for norm, (momentum, training) in modes.items():
        norm.momentum = momentum
        norm.train(training)


def make_optimizer(args: argparse.Namespace, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimiser over what is not frozen; each group's "factor" scales its learning rate."""
    groups = []
    for part, factor in ((model.encoder, args.encoder_learning_rate_factor), (model.decoder, 1.0)):
        parameters = [parameter for parameter in part.parameters() if parameter.requires_grad]
        if parameters:
            groups.append({"params": parameters, "factor": factor})
    decay = args.weight_decay
    if decay is None:
        decay = {"adam": 0.0, "sgd": 1e-4, "adamw": 0.05}[args.optimizer]
    common = {"lr": args.learning_rate, "weight_decay": decay, "fused": True}
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, **common)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[args.optimizer](groups, **common)


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """The decoder's learning rate: falls to 0, times a linear warm-up."""
    done = step / args.steps
    share = (1 - done) ** args.poly_power
    if args.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * done))
    if step < args.warmup_steps:
        share *= (step + 1) / args.warmup_steps
    return args.learning_rate * share


# ---- training ----------------------------------------------------------------------------------

def main() -> int:
    args = parse_options()
    utils.join_processes(args)
    device = utils.pick_device(args.device)

    # data
    train_set = datasets.find_labelled(args, "train", train=True)
    val_set = datasets.find_labelled(args, "val")
    val_set.read_all(native_label=True)  # bad files of a small set show at once
    seen = train_set.read_all()
    args.data_files = train_set.identity()
    absent = [name for c, name in enumerate(train_set.classes) if c not in seen]
    window = (args.crop or val_set.size) if args.eval_mode == "slide" else None

    # model
    objective, loaded = build(args, len(train_set.classes), device)
    model = objective.model
    args.pretraining = weights.name_pretraining(args.init)
    if args.calibrate_batch_norm:
        calibrate_batch_norm(model.encoder, train_set)
        args.pretraining += ", calibrated"
    optimizer = make_optimizer(args, model)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    # run folder: a checkpoint there is continued
    run = utils.Run(args, "train_seg.py", defaults=parse_options([]))
    if run.finished:
        print(f"{run.folder}: finished already")
        return 0
    step_module = utils.prepare(objective, args, device)
    start = run.restore(optimizer, model.parts())
    print(f"{args.name}: {len(train_set.classes)} classes of {args.data}, {len(train_set)} images "
          f"for training and {len(val_set)} for evaluation")
    millions = sum(parameter.numel() for parameter in trained) / 1e6
    print(f"{args.arch} {args.encoder}, {millions:.1f} M trained parameters, {loaded}; "
          f"{args.width}x{args.height}, {args.steps} steps of {args.batch_size} on {device}")
    if absent and train_set.keep:
        print("no training image shows " + ", ".join(absent))
    keys = ("arch", "encoder", "height", "width", "crop", "eval_mode", "data", "train_size",
            "split_seed", "leave_out")
    options = {key: getattr(args, key) for key in keys} | model.settings
    options |= {"task": "segmentation", "classes": list(train_set.classes)}
    options["colours"] = [list(colour) for colour in train_set.colours]

    def evaluate_now(done: int) -> dict:
        scores = metrics.evaluate_segmentation(model, val_set, device, window=window)
        run.log({"step": done, **{key: scores[key] for key in CURVES}})
        return scores

    # loop
    scores = {}
    if start == 0 and run.writes:
        evaluate_now(0)  # where the curves begin
    meter = utils.Meter()
    done = start
    stream = batches.train_batches(train_set, args, start, device)
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps,
                     disable=None if run.writes else True):
        try:
            batch = next(stream)
        except InputError:  # a file that cannot be read: what was trained is kept
            run.save(done, options)
            raise
        indices = batch.pop("index")
        waited = batch.pop("waited")
        batches.seed_dropout(args.seed, step)
        if args.jitter > 0:
            draws = batches.draw_jitter(len(batch["image"]), args.seed, step)
            batch["jitter"] = batches.to_device(draws, device)
        rate = learning_rate(args, step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]

        optimizer.zero_grad(set_to_none=True)
        terms, logits = step_module(batch)
        loss = terms["loss"] * utils.balance(batch["label"] != IGNORE)
        loss.backward()
        meter.add({"loss": loss}, waited)
        done = step + 1
        last = done == args.steps or run.stops()
        logs = last or done % args.log_every == 0
        saves = last or done % args.save_every == 0
        if logs or saves or device.type == "cpu":  # reading values synchronises a GPU
            metrics.refuse_nonfinite(terms, objective, done, indices)
        if args.clip_gradients:
            torch.nn.utils.clip_grad_norm_(trained, args.clip_gradients)
        optimizer.step()
        if step == start:
            tqdm.write(f"first step: {time.perf_counter() - meter.start:.1f} s")
        if run.writes and (step == 0 or saves):
            prediction = logits.argmax(1)
            grid = pictures.draw_labels(batch["image"], batch["label"], prediction, train_set.colours)
            grid.save(run.path(f"samples/{done:06d}.png"))
        if logs:
            run.log({"step": done, **meter.record(args.batch_size), "learning_rate": rate})
        if run.writes and (done % args.eval_every == 0 or done == args.steps):
            began = time.perf_counter()
            scores = evaluate_now(done)
            meter.start += time.perf_counter() - began  # not a step's time
        if last:
            break
        if saves:
            run.save(done, options)
    run.save(done, options)

    if done < args.steps:
        print(f"stopped at step {done}, saved; the same command continues")
        return utils.STOPPED
    if run.writes:
        scores = scores or evaluate_now(done)  # empty if killed between last.pt and here
        result = {"step": done, "pretraining": args.pretraining, **scores}
        utils.save_json(run.path("result.json"), result)
        print(f"{args.pretraining}: mIoU {scores['miou']:.2f} %, P.Acc {scores['pixel_accuracy']:.2f} %")
    return 0


if __name__ == "__main__":
    utils.run_main(main)
