"""Evaluate and look: depth and segmentation metrics, pictures of any image, tables of many runs.

    python evaluate.py depth --weights runs/NAME --data kitti --frames 105:144   # without --frames the Eigen split
    python evaluate.py seg --weights runs/NAME --data camvid
    python evaluate.py predict --weights runs/NAME street.jpg folder/ --output predictions
    python evaluate.py grid street.jpg --weights runs/NAME runs/OTHER --output grid.png
    python evaluate.py gradcam --weights runs/NAME runs/OTHER                # where a shallow layer looks, side by side
    python evaluate.py export --weights runs/NAME --output depth.onnx        # or --format torch, monodepth2
    python evaluate.py tables --log_dir runs
    python evaluate.py html --log_dir runs                                # a page of all runs: runs/index.html

The metrics are functions that return dicts; training calls the same ones.
"""

import argparse
import atexit
import csv
import fnmatch
import functools
import html
import json
import math
import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

import datasets
import losses
import networks
from utils import MAY_CHANGE, InputError, Parser, mean_over_ranks, run_main, save_json, within, write_atomically

DEPTH_METRICS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "a1", "a2", "a3")
STEREO_SCALE = 5.4  # metres in the unit of Monodepth2's stereo weights, whose baseline is 0.1
TABLE_ORDER = ("None", "ImageNet", "Flow", "Reconstruction", "Depth")
WARM_UP = 5  # steps before a benchmark's
PARTS = ("data", "networks", "loss", "backward", "optimizer")  # of a step, as a benchmark tells them apart
RELEASE_CLASSES = (0, 1, 2, 8, 9, 10, 13)  # train ids of the 7 classes that the authors' release averages


# ---------------------------------------------------------------------------------------------- depth metrics

def depth_errors(measured: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """The seven metrics of Eigen et al. over matching positive depths in metres."""
    if measured.shape != predicted.shape:
        raise ValueError(f"predicted depth is {predicted.shape}, measured depth {measured.shape}")
    ratio = np.maximum(measured / predicted, predicted / measured)
    difference = measured - predicted
    log_difference = np.log(measured) - np.log(predicted)
    return {"abs_rel": float(np.mean(np.abs(difference) / measured)),
            "sq_rel": float(np.mean(difference ** 2 / measured)),
            "rmse": float(np.sqrt(np.mean(difference ** 2))), "rmse_log": float(np.sqrt(np.mean(log_difference ** 2))),
            **{f"a{k}": float(np.mean(ratio < 1.25 ** k)) for k in (1, 2, 3)}}


def garg_crop(height: int, width: int) -> tuple[int, int, int, int]:
    """Rows and columns (top, bottom, left, right) that the Eigen protocol evaluates."""
    return tuple(int(share * size) for share, size in
                 ((0.40810811, height), (0.99189189, height), (0.03594771, width), (0.96405229, width)))


def evaluate_depth_image(inverse_depth: np.ndarray, measured: np.ndarray, scale: float | str = "median",
                         min_depth: float = 1e-3, max_depth: float = 80.0, crop: bool = True) -> dict[str, float]:
    """Eigen protocol for one image.

    inverse_depth: (h, w) 1 / metres (or up to scale), of any size; measured: (H, W) metres, 0 = no measurement.
    scale: a factor that makes metres of the prediction, "median" (ratio of medians) or, for relative depth, "affine"
    (least-squares scale and shift of inverse depth). Without the crop every measured pixel counts, however far.
    Returns the seven metrics, "ratio" (of medians), "scale" (used) and "pixels"; empty when nothing was measured.
    """
    H, W = measured.shape
    resized = F.interpolate(torch.from_numpy(inverse_depth)[None, None], (H, W), mode="bilinear",
                            align_corners=False)[0, 0].numpy()
    if crop:
        top, bottom, left, right = garg_crop(H, W)
        valid = np.zeros((H, W), bool)
        valid[top:bottom, left:right] = True
        valid &= (measured > min_depth) & (measured < max_depth)
    else:
        valid = measured > 0
    if not valid.any():
        return {}
    measured, inverse = measured[valid], resized[valid]
    if scale == "affine":
        slope, shift = np.linalg.lstsq(np.c_[inverse, np.ones_like(inverse)], 1 / measured, rcond=None)[0]
        inverse, scale = (slope * inverse + shift).clip(1 / max_depth), 1.0
    predicted = 1 / inverse
    ratio = float(np.median(measured) / np.median(predicted))
    factor = ratio if scale == "median" else scale
    return {**depth_errors(measured, (predicted * factor).clip(min_depth, max_depth)), "ratio": ratio, "scale": factor,
            "pixels": int(valid.sum())}


def summarise_depth(rows: list[dict]) -> dict[str, float]:
    """Mean of every metric over images, with median and deviation of the ratios of medians."""
    ratios = np.array([row["ratio"] for row in rows])
    return {**{key: float(np.mean([row[key] for row in rows])) for key in DEPTH_METRICS}, "images": len(rows),
            "ratio_median": float(np.median(ratios)), "ratio_deviation": float(np.std(ratios / np.median(ratios)))}


def constant_depth(maps: list[np.ndarray]) -> np.ndarray:
    """The best constant picture: per-pixel median of measured depth maps (H, W).

    Gaps are filled along the row, rows without any measurement from the nearest row that has one.
    """
    stacked = np.stack(maps).astype(np.float32)
    stacked[stacked == 0] = np.nan
    filled = np.isfinite(stacked).any(0)
    picture = np.zeros(stacked.shape[1:], np.float32)
    picture[filled] = np.nanmedian(stacked[:, filled], axis=0)
    columns = np.arange(picture.shape[1])
    for row in reversed(range(len(picture))):
        known = filled[row]
        if known.any():
            picture[row] = np.interp(columns, columns[known], picture[row, known])
        elif row + 1 < len(picture):
            picture[row] = picture[row + 1]
    empty = picture[:, 0] == 0  # rows below the lowest measurement
    picture[empty] = picture[~empty][-1] if (~empty).any() else 1
    return picture


# ---------------------------------------------------------------------------------------------- segmentation metrics

def confusion_matrix(label: torch.Tensor, prediction: torch.Tensor, classes: int) -> torch.Tensor:
    """(classes + 1, classes) int64 counts, rows = truth; the last row counts predictions on pixels labelled 255.

    Raises ValueError for maps of different shapes and ids out of range.
    """
    if label.shape != prediction.shape:
        raise ValueError(f"prediction is {tuple(prediction.shape)}, label {tuple(label.shape)}")
    unlabelled = label == datasets.IGNORE
    for name, ids in (("label", label.masked_fill(unlabelled, 0)), ("prediction", prediction)):
        low, high = map(int, ids.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"{name} ids must be in 0 to {classes - 1}, found {low} to {high}")
    rows = label.masked_fill(unlabelled, classes)
    counts = torch.bincount((rows * classes + prediction).flatten(), minlength=(classes + 1) * classes)
    return counts.view(classes + 1, classes)


def segmentation_scores(confusion: torch.Tensor) -> dict:
    """mIoU and pixel accuracy in percent from the `confusion_matrix` of a whole data set.

    The mean is over the classes that the labels show: the same classes for every model, whatever it predicts.
    """
    counts = confusion[:-1].double()
    correct, labelled = counts.diag(), counts.sum(1)
    union = counts.sum(0) + labelled - correct
    iou = torch.where(labelled > 0, 100 * correct / union.clamp(min=1), torch.nan)
    return {"miou": float(iou.nanmean()), "pixel_accuracy": float(100 * correct.sum() / counts.sum().clamp(min=1)),
            "iou": iou.tolist()}


def release_score(confusion: torch.Tensor) -> float:
    """One image as the authors' release scores it, to compare with the paper: mean IoU in percent over 7 classes.

    Predictions on unlabelled pixels count as false positives, and a class that is predicted but absent scores 0.
    """
    correct = confusion.diagonal()
    union = confusion.sum(0) + confusion[:-1].sum(1) - correct
    return float((100 * correct / union)[list(RELEASE_CLASSES)].nanmean())  # 0 / 0 where a class is absent from both


def slide(forward: Callable, image: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Logits (1, classes, H, W) of an image (1, 3, H, W), averaged over windows of a size that overlap by a third.

    An image smaller than the window is enlarged first, and the logits are of that size.
    """
    scale = max(1, *(side / length for side, length in zip(window, image.shape[2:])))
    if scale > 1:
        size = [max(side, round(scale * length)) for side, length in zip(window, image.shape[2:])]
        image = F.interpolate(image, size, mode="bilinear", align_corners=False)
    starts = []  # rows, then columns: evenly spread
    for side, length in zip(window, image.shape[2:]):
        count = 1 + math.ceil((length - side) / (2 / 3 * side))
        starts.append(np.linspace(0, length - side, count).round().astype(int).tolist())
    total, times = None, image.new_zeros(1, 1, *image.shape[2:])
    for top, left in product(*starts):
        place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
        logits = forward(image[place])
        total = logits.new_zeros(1, logits.shape[1], *image.shape[2:]) if total is None else total
        total[place] += logits
        times[place] += 1
    return total / times


@torch.inference_mode()
def evaluate_segmentation(model: torch.nn.Module, dataset: datasets.Labelled, device: torch.device,
                          batch_size: int = 8, window: tuple[int, int] | None = None, flip: bool = False) -> dict:
    """Scores of a segmenter on every image, at the labels' native size.

    Images are resized to the data set's size; with a `window` (height, width) they keep their own and are seen through
    windows of that size. flip: logits are averaged with those of the mirrored image.

    Returns "miou" and "pixel_accuracy" in percent, "iou" by class name, "cross_entropy" in nats per pixel (the paper's
    proxy of H(y|h), Eq. 3), and for the 19 Cityscapes classes "release_miou". The model's mode is restored.
    """
    classes = len(dataset.classes)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    confusion, nats, release = torch.zeros(classes + 1, classes, dtype=torch.int64, device=device), 0.0, []

    def forward(images: torch.Tensor) -> torch.Tensor:
        logits = model(images)[0]
        return (logits + model(images.flip(-1))[0].flip(-1)) / 2 if flip else logits

    size = 1 if window else max(1, min(batch_size, 2 ** 20 // math.prod(dataset.size)))
    for start in range(0, len(dataset), size):
        indices = range(start, min(start + size, len(dataset)))
        images, labels = zip(*[dataset.native(i) if window else dataset.load(i, native_label=True) for i in indices])
        images = torch.stack(images).to(device).float() / 255
        logits = slide(forward, images, window) if window else forward(images)
        for one, label in zip(logits.contiguous(), labels):  # to enlarge channels_last takes several times as long
            label = label.long().to(device)
            one = F.interpolate(one[None], label.shape, mode="bilinear", align_corners=False)
            counts = confusion_matrix(label, one[0].max(0).indices, classes)  # four times as fast as argmax(0)
            confusion += counts
            nats += F.cross_entropy(one, label[None], ignore_index=datasets.IGNORE, reduction="sum").double()
            if dataset.classes == datasets.CITYSCAPES_CLASSES:
                release.append(release_score(counts))
    for module, mode in modes:
        module.training = mode
    scores = segmentation_scores(confusion)
    scores["iou"] = dict(zip(dataset.classes, scores["iou"]))
    scores["cross_entropy"] = float(nats) / max(int(confusion[:-1].sum()), 1)
    scores["images"] = len(dataset)
    if release:
        scores["release_miou"] = float(np.nanmean(release))
    return scores


# ---------------------------------------------------------------------------------------------- colours

DEPTH_COLOURS = torch.tensor([  # dark = far, bright = near
    (13, 8, 35), (59, 15, 112), (114, 31, 129), (168, 46, 126), (222, 73, 104), (248, 118, 92), (254, 167, 111),
    (254, 211, 149), (252, 248, 196)]) / 255


def colour_values(values: torch.Tensor) -> torch.Tensor:
    """Values (B, H, W), 0 to 1, as colours (B, 3, H, W) from dark to bright."""
    position = values.clamp(0, 1) * (len(DEPTH_COLOURS) - 1)
    below = position.long().clamp(max=len(DEPTH_COLOURS) - 2)
    colours, share = DEPTH_COLOURS.to(values.device), (position - below)[..., None]
    return (colours[below] * (1 - share) + colours[below + 1] * share).permute(0, 3, 1, 2)


def colour_depth(depth: torch.Tensor) -> torch.Tensor:
    """Depth (B, 1, H, W) as colours (B, 3, H, W): inverse depth between its 2nd and 98th percentile."""
    inverse = 1 / depth.clamp(min=1e-6)
    sorted_values = inverse.flatten(1).sort(1).values
    n = sorted_values.shape[1] - 1
    low, high = (sorted_values[:, int(q * n)].view(-1, 1, 1) for q in (0.02, 0.98))
    return colour_values((inverse[:, 0] - low) / (high - low).clamp(min=1e-9))


def colour_labels(label: torch.Tensor, colours: tuple) -> torch.Tensor:
    """Train ids (B, H, W) as colours (B, 3, H, W); ignored pixels black."""
    table = torch.zeros(256, 3)
    table[:len(colours)] = torch.tensor(colours) / 255
    return table.to(label.device)[label.long()].permute(0, 3, 1, 2)


def to_picture(image: torch.Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> Pillow."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def tensorboard(folder: str, step: int = 0) -> Callable[[dict], None]:
    """What to call with every record of the log after `step`: it shows the numbers, and new pictures of samples/."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs the package: pip install tensorboard") from None
    writer, shown = SummaryWriter(folder, purge_step=step + 1), set(Path(folder, "samples").glob("*.png"))

    def show(record: dict) -> None:
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)):
                writer.add_scalar(key, value, record["step"])
        for path in sorted(set(Path(folder, "samples").glob("*.png")) - shown):
            shown.add(path)
            writer.add_image("samples", datasets.read_image(str(path)), int(path.stem))
        writer.flush()
    return show


# ---------------------------------------------------------------------------------------------- of a training

class Meter:
    """Means of loss terms, and where the time went, between two log records; adding to them does not wait for a GPU."""

    def __init__(self, device: torch.device, exact: bool = False):
        self.wait = exact and device.type == "cuda"  # only a benchmark has the GPU finish one part before the next
        self.reset()

    def reset(self) -> None:
        self.sums, self.steps, self.seconds, self.start = {}, 0, dict.fromkeys(PARTS, 0.0), time.perf_counter()
        self.last = self.start

    def skip(self) -> None:
        """The time since the last lap was no step's."""
        now = time.perf_counter()
        self.start, self.last = self.start + now - self.last, now

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
        out = {key: float(mean_over_ranks(value)) / self.steps for key, value in self.sums.items()}
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


# ---------------------------------------------------------------------------------------------- sub-commands

def depth_test_set(args: argparse.Namespace, frames: tuple, height: int, width: int) -> datasets.KittiRaw:
    """Left-camera test frames with ground truth: the Eigen test split, or the frames asked for."""
    cls, root = datasets.find_data(args.data, args.data_path, datasets.CLIPS)
    if args.baseline and args.train_frames == (None, None):
        raise InputError("--baseline needs --train_frames, the frames whose LiDAR makes the picture")
    if cls is not datasets.KittiRaw:
        raise InputError(f"evaluate.py depth needs LiDAR in KITTI's layout; --data {args.data} has none")
    options = {"drives": args.drives, "frames": tuple(frames), "cameras": "l", "height": height, "width": width}
    return cls(root, ["0"], split="test", with_depth=True, **options)


def ground_truth(dataset: datasets.KittiRaw, kind: str, exact: bool) -> tuple[str, list]:
    """What counts, "velodyne_x" (the published protocol) or "z", and what `depth_map` is to read for each sample.

    exact: the data set is ours, so the published protocol's quirks have no place.
    """
    raw = []
    for folder, number, side in (sample["place"] for sample in dataset.samples):
        points = dataset.velodyne_file(folder, number)
        raw.append(points and ("velodyne", points, folder, side, True))
    if kind == "z" or (kind == "auto" and (exact or None in raw)):
        return "z", [sample["depth"] for sample in dataset.samples]
    if None in raw:
        raise InputError(f"--ground_truth velodyne_x: {raw.count(None)} of {len(raw)} frames have no velodyne .bin; "
                         "use --ground_truth z")
    return "velodyne_x", raw


@torch.inference_mode()
def depth_command(args: argparse.Namespace) -> int:
    device = networks.pick_device(args.device)
    if args.min_eval >= args.max_eval:
        raise InputError(f"--min_eval {args.min_eval:g} is not below --max_eval {args.max_eval:g}")
    if args.baseline:
        dataset = depth_test_set(args, args.frames, 32, 32)
        training = depth_test_set(args, args.train_frames, 32, 32)
        shape = dataset.depth_map(dataset.samples[0]["depth"]).shape
        maps = [training.depth_map(s["depth"]) for s in training.samples]
        maps = [m for m in maps if m.shape == shape]
        picture = constant_depth(maps)
        scale, what = args.scale or 1.0, f"constant picture, median of {len(maps)} frames"

        def inverse_depth(sample: dict) -> np.ndarray:
            return 1 / picture
    else:
        model, options = networks.load_model(args.weights, device, "depth")
        dataset = depth_test_set(args, args.frames, options["height"], options["width"])
        default = STEREO_SCALE if options.get("use_stereo") else 1.0 if options.get("metric") else "median"
        if options.get("depth_loss") == "affine":
            default = "affine"
        scale = args.scale or default

        def inverse_depth(sample: dict) -> np.ndarray:
            disparity = model(sample["frames"][None, 0].to(device).float() / 255)[0].sigmoid()
            depth = losses.disparity_to_depth(disparity, options["min_depth"], options["max_depth"])
            return (1 / depth)[0, 0].cpu().numpy()
        what = args.weights

    kind, entries = ground_truth(dataset, args.ground_truth, exact=args.data == "synthetic")
    dataset.with_depth = False
    rows = []
    for index, entry in enumerate(tqdm(entries, desc="depth", disable=None)):
        row = evaluate_depth_image(inverse_depth(dataset[index]), dataset.depth_map(entry), scale, args.min_eval,
                                   args.max_eval, not args.no_crop)
        if row:
            rows.append({"image": dataset.samples[index]["images"][0], **row})
    if not rows:
        raise InputError(f"{dataset.name}: no measured pixel in any frame")
    result = {**summarise_depth(rows), "ground_truth": kind, "scale": scale, "crop": "none" if args.no_crop else "garg",
              "cap": args.max_eval}
    scaling = f"{scale} scaling" if isinstance(scale, str) else f"factor {scale:g}, no median scaling"
    region = "no crop, no cap on the truth" if args.no_crop else f"Garg crop, cap {args.max_eval:g} m"
    print(f"{what}: {len(rows)} images of {dataset.name}; ground truth {kind}, {scaling}, {region}")
    print("  ".join(f"{key:>8}" for key in DEPTH_METRICS))
    print("  ".join(f"{result[key]:8.4f}" for key in DEPTH_METRICS))
    print(f"ratio of medians: median {result['ratio_median']:.3f}, relative deviation {result['ratio_deviation']:.3f}")
    if args.output:
        os.makedirs(args.output, exist_ok=True)
        with open(os.path.join(args.output, "depth.csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        save_json(os.path.join(args.output, "depth.json"), result)
    return 0


def seg_command(args: argparse.Namespace) -> int:
    device = networks.pick_device(args.device)
    model, options = networks.load_model(args.weights, device, "segmentation")
    cls, root = datasets.find_data(args.data or options["data"], args.data_path, datasets.LABELLED)
    dataset = cls(root, "val", height=options["height"], width=options["width"])
    if list(dataset.classes) != list(options["classes"]):
        raise InputError(f"{args.weights} knows the classes {', '.join(options['classes'])}; {args.data} has others")
    mode = args.eval_mode or options.get("eval_mode", "whole")
    window = (options.get("crop") or dataset.size) if mode == "slide" else None
    scores = evaluate_segmentation(model, dataset, device, window=window, flip=args.flip)
    release = f", the release's 7-class mIoU {scores['release_miou']:.2f} %" if "release_miou" in scores else ""
    print(f"{args.weights}: {len(dataset)} images, mIoU {scores['miou']:.2f} %, P.Acc {scores['pixel_accuracy']:.2f} "
          f"%, {scores['cross_entropy']:.3f} nats per pixel{release}")
    for name, value in scores["iou"].items():
        print(f"  {name:16} {value:6.2f}")
    if args.output:
        os.makedirs(args.output, exist_ok=True)
        save_json(os.path.join(args.output, "segmentation.json"), scores)
    return 0


@torch.inference_mode()
def predict(model: torch.nn.Module, options: dict, image: torch.Tensor) -> tuple[torch.Tensor, np.ndarray | None]:
    """What a model makes of one image (3, H, W) uint8, whatever its size.

    Returns a picture (3, H, W) in [0, 1] (depth in colour, or labels over the image, or the reconstruction) and the
    array behind it: depth float32 (H, W), in metres where training was metric, or train ids uint8 (H, W).
    """
    if options["task"] == "flow":
        raise InputError("a flow network needs two frames; its pictures are in the samples/ of its run")
    small = resize(image, [options["height"], options["width"]], antialias=True)[None].float() / 255
    out = model(small)[0]
    if options["task"] != "segmentation":
        out = out.sigmoid()
    out = F.interpolate(out, image.shape[1:], mode="bilinear", align_corners=False)
    if options["task"] == "segmentation":
        label = out[0].argmax(0)
        picture = 0.5 * image / 255 + 0.5 * colour_labels(label[None], options["colours"])[0]
        return picture, label.byte().cpu().numpy()
    if options["task"] == "depth":
        depth = losses.disparity_to_depth(out, options["min_depth"], options["max_depth"])
        return colour_depth(depth)[0], depth[0, 0].cpu().numpy()
    return out[0], None


def gradcam(model: torch.nn.Module, images: torch.Tensor, layer: int = 0) -> torch.Tensor:
    """Grad-CAM of one of the encoder's maps, the first being the one before pooling (Figure 6): (B, h, w), 0 or more.

    images: (B, 3, H, W) in [0, 1]. The channels' weights are the gradients of the predicted classes' scores, summed
    over the pixels; of a depth network, of the disparity (before the sigmoid). 1 is where 99 % of the map are below.
    """
    features = model.encoder(images)
    score = model.decoder(features)[0].amax(1).sum()
    weights = torch.autograd.grad(score, features[layer])[0].mean((2, 3), keepdim=True)
    heat = (weights * features[layer]).sum(1).relu().detach()
    return heat / heat.flatten(1).quantile(0.99, 1).clamp(min=1e-9).view(-1, 1, 1)


def gradcam_picture(model: torch.nn.Module, options: dict, image: torch.Tensor, layer: int) -> torch.Tensor:
    """One image (3, H, W) uint8 under its Grad-CAM, (3, H, W) in [0, 1]."""
    if options["task"] == "flow":
        raise InputError("a flow network needs two frames: Grad-CAM is for networks that see one")
    model.requires_grad_()
    small = resize(image, [options["height"], options["width"]], antialias=True)[None].float() / 255
    heat = F.interpolate(gradcam(model, small, layer)[:, None], image.shape[1:], mode="bilinear", align_corners=False)
    return 0.4 * image / 255 + 0.6 * colour_values(heat[:, 0])[0]


def list_images(paths: list[str]) -> list[str]:
    """Image files named or in the folders named, in numeric order."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            names = datasets.image_names(path)
            if not names:
                raise InputError(f"{path}: no images there")
            found += [os.path.join(path, n) for n in sorted(names, key=datasets.natural_key)]
        else:
            found.append(path)
    return found


def predict_command(args: argparse.Namespace) -> int:
    device = networks.pick_device(args.device)
    model, options = networks.load_model(args.weights, device)
    paths, written = list_images(args.images), set()
    os.makedirs(args.output, exist_ok=True)
    for path in tqdm(paths, desc="predict", disable=None):
        picture, array = predict(model, options, datasets.read_image(path).to(device))
        name = os.path.splitext(os.path.basename(path))[0]
        while name in written:  # the same file name in another folder
            name += "_"
        written.add(name)
        target = os.path.join(args.output, f"{name}_{options['task']}")
        to_picture(picture).save(f"{target}.png")
        if array is not None:
            np.save(f"{target}.npy", array)
    print(f"{len(paths)} images -> {args.output}")
    return 0


def grid_command(args: argparse.Namespace) -> int:
    """Images in rows, then what each of several models makes of them, or its Grad-CAM (Figure 6)."""
    def draw(model: torch.nn.Module, options: dict, image: torch.Tensor) -> torch.Tensor:
        if args.command == "gradcam":
            return gradcam_picture(model, options, image, args.layer)
        return predict(model, options, image)[0]

    device = networks.pick_device(args.device)
    if args.images:
        images = [datasets.read_image(path).to(device) for path in list_images(args.images)]
        labels = []
    else:  # four test images of a data set, and their labels
        cls, root = datasets.find_data(args.data, args.data_path, datasets.LABELLED)
        dataset = cls(root, "val", height=64, width=64)
        chosen = range(0, len(dataset), max(1, len(dataset) // 4))[:4]
        images = [datasets.read_image(dataset.pairs[i][0]).to(device) for i in chosen]
        labels = [colour_labels(dataset.native_label(i)[None], dataset.colours)[0].to(device) for i in chosen]
    shape = list(images[0].shape[1:])
    columns = [[resize(image, shape, antialias=True) / 255 for image in images]]
    if labels:
        columns.append([resize(label, shape, antialias=True) for label in labels])
    for path in args.weights:
        model, options = networks.load_model(path, device)
        columns.append([resize(draw(model, options, image), shape, antialias=True) for image in images])
    to_picture(torch.cat([torch.cat(column, 1) for column in columns], 2)).save(args.output)
    print(f"{len(images)} images, {len(args.weights)} models -> {args.output}")
    return 0


class Exported(torch.nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> depth (B, 1, H, W), class scores (B, classes, H, W) or colours (B, 3, H, W)."""

    def __init__(self, model: torch.nn.Module, options: dict):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = self.model(images)[0]
        if self.options["task"] == "depth":
            return losses.disparity_to_depth(out.sigmoid(), self.options["min_depth"], self.options["max_depth"])
        return out if self.options["task"] == "segmentation" else out.sigmoid()


def export_graph(path: str, kind: str, model: torch.nn.Module, options: dict, dynamic: bool) -> None:
    """An ONNX file ("onnx", input "image", output of the task's name) or a file of `torch.export` ("torch")."""
    if kind == "onnx" and not all(map(find_spec, ("onnx", "onnxscript"))):
        raise InputError("--format onnx needs two packages more: pip install onnx onnxscript")
    images, shapes = torch.rand(2, 3, options["height"], options["width"]), None
    if dynamic:
        if options["arch"] == "dpt" or options["encoder"] in networks.VITS:
            raise InputError("--dynamic: a ViT's position embeddings are for one size, leave it out")
        rows, columns = (model.encoder.stride * torch.export.Dim(name, min=2, max=128) for name in ("rows", "columns"))
        shapes = ({0: torch.export.Dim("batch", min=1, max=1024), 2: rows, 3: columns},)
    program = torch.export.export(Exported(model, options).eval(), (images if dynamic else images[:1],),
                                  dynamic_shapes=shapes)
    if kind == "torch":
        write_atomically(path, lambda file: torch.export.save(program, file))
    else:
        graph = torch.onnx.export(program, opset_version=18, input_names=["image"], output_names=[options["task"]],
                                  verbose=False).model_proto
        write_atomically(path, lambda file: file.write(graph.SerializeToString()))


def export_monodepth2(folder: str, parts: dict, options: dict) -> None:
    """Monodepth2's folder of weights. What it cannot say (a range other than 0.1 to 100 of its units) is added."""
    if options["task"] != "depth" or options["arch"] != "unet":
        raise InputError(f"--format monodepth2 is for depth by the U-Net, not {options['task']} by {options['arch']}")
    depth_range = options["min_depth"], options["max_depth"]
    stereo = options.get("use_stereo") or depth_range == (0.1 * STEREO_SCALE, 100 * STEREO_SCALE)
    extra = {"height": options["height"], "width": options["width"], "use_stereo": bool(stereo)}
    if not stereo and depth_range != (0.1, 100):
        extra |= {"min_depth": depth_range[0], "max_depth": depth_range[1], "metric": bool(options.get("metric"))}
    os.makedirs(folder, exist_ok=True)
    for name, content in {"encoder": {**parts["encoder"], **extra}, "depth": parts["decoder"],
                          **{k: parts[k] for k in ("pose_encoder", "pose") if k in parts}}.items():
        write_atomically(os.path.join(folder, f"{name}.pth"), functools.partial(torch.save, content))


def export_command(args: argparse.Namespace) -> int:
    model, options = networks.load_model(args.weights)
    if options["task"] == "flow":
        raise InputError("export is for networks that see one image, not for flow")
    if args.format == "monodepth2":
        export_monodepth2(args.output, networks.read_checkpoint(args.weights)[1], options)
    else:
        export_graph(args.output, args.format, model, options, args.dynamic)
    size = "any batch and size" if args.dynamic else f"1x3x{options['height']}x{options['width']}"
    print(f"{args.weights} ({options['task']}) -> {args.output}"
          + (f": images in [0, 1], {size}" if args.format != "monodepth2" else ""))
    return 0


# ---------------------------------------------------------------------------------------------- tables of many runs

# The paper's tables by the names that run_all.sh gives its runs: columns as patterns of names, in which {} stands for
# the row's initialisation; the paper's mIoU and pixel accuracy (Table 5: validation), None where it has none.
# In the text of Table 1 that this was taken from, one column is incomplete: frozen ResNet50.
PAPER = {
    "Table 1: KITTI, 16 images": (
        {"ResNet18": "seg_{}_resnet18_unet_all_n16", "ResNet50": "seg_{}_resnet50_unet_all_n16",
         "DeepLabV3": "seg_{}_resnet50_deeplabv3_all_n16", "ResNet18, frozen": "seg_{}_resnet18_unet_frozen_n16",
         "ResNet50, frozen": "seg_{}_resnet50_unet_frozen_n16"},
        {"none": ("None", (41.35, 70.75), (44.66, 73.37), (21.93, 52.32), (41.24, 70.52), None),
         "imagenet": ("ImageNet", (45.15, 72.39), (44.65, 73.06), (43.39, 72.66), (33.33, 65.34), None),
         "depthrand": ("Depth-Rand", (46.00, 72.43), (49.90, 76.28), (43.43, 71.34), (43.02, 72.38), None),
         "depth": ("Depth", (50.20, 76.39), (50.92, 77.34), (43.77, 72.68), (46.53, 74.42), (46.55, 74.48))}),
    "Table 2: forms of depth supervision (from random weights)": (
        {"ResNet18": "seg_{}_resnet18_unet_all_n16"},
        {"none": ("None", None), "mono": ("Monocular", None), "stereo": ("Stereo", None), "lidar": ("LiDAR", None)}),
    "Table 3: encoder only": (
        {"ResNet18": "seg_{}_resnet18_unet_all_n16", "ResNet50": "seg_{}_resnet50_unet_all_n16",
         "ViT-L": "seg_{}_vit_l16_dpt_all_n16_lr5e-8"},
        {"none": ("None", (41.35, 70.75), (44.66, 73.37), None),
         "imagenet": ("ImageNet", (45.15, 72.39), (44.65, 73.06), None),
         "vit": ("ImageNet", None, None, (57.53, 81.48)),
         "depthrand-encoder": ("Depth-Rand (encoder only)", None, None, None),
         "depth-encoder": ("Depth (encoder only)", (46.69, 75.04), (46.99, 73.57), None),
         "dpt": ("Depth (encoder only)", None, None, (58.12, 81.94))}),
    "Table 4: other pre-trainings": (
        {"ResNet50": "seg_{}_resnet50_unet_all_n16"},
        {"none": ("None", (44.66, 73.37)), "coco": ("Supervised segmentation", (51.28, 74.88)),
         "depthrand": ("Depth-Rand", (49.90, 76.28)), "depth": ("Depth", (50.92, 77.34)),
         "reconstruction": ("Reconstruction", (47.18, 74.16)), "dino": ("DINO", (44.19, 71.36)),
         "flow": ("Optical flow", (42.72, 71.80)), "moco": ("MoCo v2", (37.04, 65.91))}),
    "Table 5: Cityscapes, DeepLabV3": (
        {"full": "cityscapes_seg_{}_resnet50_deeplabv3_all_nall_full",
         "controlled": "cityscapes_seg_{}_resnet50_deeplabv3_all_nall_controlled"},
        {"none": ("None", (63.97, 93.76), (60.43, 93.07)), "imagenet": ("ImageNet", (70.41, 95.75), (61.80, 93.40)),
         "depth": ("Depth", (73.17, 95.24), (62.57, 93.46)),
         "cropped": ("Depth-cropped", (72.22, 95.01), (65.09, 94.00))}),
    "Table 6: other domains": (
        {f"{data}, {how}": f"{data.lower()}_seg_{{}}_vit_l1?_{pattern}" for data in ("ADE20k", "VOC", "Cityscapes")
         for how, pattern in (("fine-tuned", "dpt_all_nall"), ("linear", "linear_frozen_nall_lr1e-3"))},
        {"mae": ("MAE", (53.6, None), (49.0, None), None, (67.6, None), None, (58.4, None)),
         "dinov2": ("DINOv2", (58.1, None), (47.7, None), (86.5, None), (86.3, None), (82.7, None), (71.3, None)),
         "depthanything": ("Depth Anything", (59.7, None), (52.3, None), (87.7, None), (87.3, None), (84.8, None),
                           (74.8, None))}),
    "Figure 3: size of the training set, ResNet18": (
        {f"{n} images": f"seg_{{}}_resnet18_unet_all_n{n}" for n in (8, 16, 32, 64, 128)},
        {row: (name, *[None] * 5) for row, name in (("none", "None"), ("imagenet", "ImageNet"),
                                                    ("depthrand", "Depth-Rand"), ("depth", "Depth"))}),
    "Figure 5: pre-trained at one size, fine-tuned at another": (
        {"the usual size": "seg_{}_resnet18_unet_all_n16", "the other size": "seg_{}_resnet18_unet_all_n16_resized"},
        {"none": ("None", None, None), "depthrand": ("Depth-Rand at the usual size", None, None),
         "resized": ("Depth-Rand at the other size", None, None)}),
    "Figure 7: depth and flow, ResNet18": (
        {"all": "seg_{}_resnet18_unet_all_n16", "frozen": "seg_{}_resnet18_unet_frozen_n16"},
        {"none": ("None", (41.35, None), (41.24, None)), "flow": ("Flow", (38.47, None), (32.19, None)),
         "depthrand": ("Depth-Rand", (46.00, None), (43.02, None)), "depth": ("Depth", (50.20, None), (46.53, None))}),
    "Figure 8: NYU-v2": (
        {"ResNet18": "nyu_seg_{}_resnet18_unet_all_nall", "ResNet50": "nyu_seg_{}_resnet50_unet_all_nall"},
        {"none": ("None", None, None), "imagenet": ("ImageNet", None, None), "depth": ("Depth", None, None)}),
    "What the release does otherwise, ResNet18": (
        {"as it should be": "seg_{}_resnet18_unet_all_n16", "normalised twice": "seg_{}_resnet18_unet_all_n16_twice",
         "frozen": "seg_{}_resnet18_unet_frozen_n16", "batch norm frozen": "seg_{}_resnet18_unet_all_n16_batchnorm"},
        {row: (name, *[None] * 4) for row, name in (("none", "None"), ("imagenet", "ImageNet"),
                                                    ("depthrand", "Depth-Rand"))}),
}

RELEASE_OPTIONS = ("normalize_twice", "freeze_batch_norm_only")  # what the authors' release does otherwise
# options in which the runs of one row may differ
SAME_RUN = {"name", "seed", "split_seed", "data_path", "init", "eval_every", "no_feature_cache", *MAY_CHANGE}


def paired_test(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean of a - b and the two-sided p value of Student's paired t test; nan where two pairs are not there."""
    difference = np.subtract(a, b)
    n = len(difference)
    if n < 2:
        return float(difference.mean()) if n else float("nan"), float("nan")
    error = difference.std(ddof=1) / np.sqrt(n)
    if error == 0:
        return float(difference.mean()), float(difference.mean() == 0)
    # with x = sqrt(n - 1) tan(angle) Student's density is a power of a cosine, integrated here by the midpoint rule
    start = np.arctan(abs(difference.mean()) / error / np.sqrt(n - 1))
    middles = (np.arange(10_000) + 0.5) / 10_000
    tail = np.mean(np.cos(start + (np.pi / 2 - start) * middles) ** (n - 2)) * (np.pi / 2 - start)
    return float(difference.mean()), float(tail / np.mean(np.cos(np.pi / 2 * middles) ** (n - 2)) / (np.pi / 2))


def read_runs(log_dir: str) -> list[dict]:
    """Every finished fine-tuning below a folder: its name, options, result and curve of (step, mIoU)."""
    runs = []
    for name in datasets.list_folder(log_dir):
        paths = [os.path.join(log_dir, name, file) for file in ("result.json", "args.json", "log.jsonl")]
        if not all(map(os.path.isfile, paths)):
            continue
        try:
            result, options = (json.loads(Path(path).read_text()) for path in paths[:2])
            records = [json.loads(line) for line in Path(paths[2]).read_text().splitlines()]
            curve = [(record["step"], record["miou"]) for record in records if record.get("miou") is not None]
            if result.get("miou") is not None:
                runs.append({"name": name, "options": options["options"], "result": result, "curve": curve})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{os.path.join(log_dir, name)}: result.json, args.json or log.jsonl is damaged") from None
    return runs


def mean_deviation(values: list[float], digits: int) -> str:
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def paper_tables(runs: list[dict]) -> list[str]:
    """Lines of Markdown: the paper's tables with our mIoU / P.Acc, the paper's in brackets, – for missing runs."""
    by_stem = {}
    for run in runs:
        by_stem.setdefault(re.sub(r"_seed\d+$", "", run["name"]), []).append(run["result"])
    lines, empty = [], []
    for title, (columns, rows) in PAPER.items():
        cells, found = [], False
        for init, (name, *papers) in rows.items():
            cells.append([name])
            for pattern, paper in zip(columns.values(), papers):
                stems = fnmatch.filter(by_stem, pattern.format(init))
                results = by_stem[stems[0]] if stems else []
                found |= bool(results)
                ours = " / ".join(mean_deviation([r[key] for r in results], 1) for key in ("miou", "pixel_accuracy")
                                  if results) or "–"
                theirs = " / ".join(f"{value:.2f}" for value in paper or () if value is not None)
                cells[-1].append(f"{ours} [{theirs}]" if theirs else ours)
        if found:
            lines += ["", f"**{title}** (mIoU / P.Acc in %; in brackets the paper's)", "",
                      *markdown([["pre-training", *columns], *cells])]
        else:
            empty.append(title.split(":")[0])
    return [*lines, "", f"No runs of: {', '.join(empty)}"] if lines and empty else lines


def all_runs_table(runs: list[dict]) -> list[list[str]]:
    """Header and rows: fine-tunings that differ in seeds alone are one row, with the mean and deviation over them.

    Compared with the row "None" of the same options by a paired test over seeds; "90 % at" is the mean number of steps
    to 90 % of the final mIoU.
    """
    groups = {}
    for run in runs:
        o = run["options"]
        setting = json.dumps({k: v for k, v in o.items() if v not in (None, False) and k not in SAME_RUN
                              | {"init_parts"}}, sort_keys=True)
        groups.setdefault((setting, describe(run)[1]), []).append(run)
    rows = []
    for (setting, name), members in groups.items():
        o, results = members[0]["options"], [run["result"] for run in members]
        none = {(r["options"]["split_seed"], r["options"]["seed"]): r["result"]["miou"]
                for r in groups.get((setting, "None"), [])}
        pairs = [(r["result"]["miou"], none[key]) for r in members
                 if (key := (r["options"]["split_seed"], r["options"]["seed"])) in none]
        versus = "" if name == "None" or not pairs else "{:+.2f} (p {:.3f})".format(*paired_test(*zip(*pairs)))
        reached = [next((step for step, miou in run["curve"] if miou >= 0.9 * run["result"]["miou"]), o["steps"])
                   for run in members]
        place = next((i for i, first in enumerate(TABLE_ORDER) if name.startswith(first)), len(TABLE_ORDER))
        changed = [flag for flag in RELEASE_OPTIONS if o.get(flag)]
        cells = [o["data"], " ".join([o.get("arch", "unet"), o["encoder"], *changed]), str(o["train_size"] or "all"),
                 f"{o['steps']} x {o['batch_size']}, {o['learning_rate']:g}, {o['width']}x{o['height']}",
                 "frozen" if o["freeze_encoder"] else "all", name, str(len(members)),
                 mean_deviation([r["miou"] for r in results], 2), versus.replace(" (p nan)", ""),
                 mean_deviation([r["pixel_accuracy"] for r in results], 2),
                 mean_deviation([r["cross_entropy"] for r in results], 3), f"{np.mean(reached):.0f}"]
        rows.append((cells[:2], o["train_size"] or math.inf, cells[3:5], place, cells))
    header = ["data", "network", "images", "steps x batch, rate, size", "fine-tuned", "pre-training", "runs", "mIoU %",
              "against None", "P.Acc %", "nats / pixel", "90 % at"]
    return [header, *[row[-1] for row in sorted(rows)]]


def describe(run: dict) -> tuple[str, str]:
    """How tables and figures call a fine-tuning: its network, size and schedule, and what it started from."""
    o, name = run["options"], run["result"]["pretraining"]
    if o.get("init_parts") == "encoder" and o["init"] not in ("none", "imagenet"):
        name += ", encoder only"
    tuned = ["frozen" if o["freeze_encoder"] else "all", *[flag for flag in RELEASE_OPTIONS if o.get(flag)]]
    return (f"{o['encoder']} {o.get('arch', 'unet')}, {', '.join(tuned)}, {o['width']}x{o['height']}, "
            f"{o['steps']} steps at {o['learning_rate']:g}"), name


def shorten(lines: dict[str, object]) -> dict[str, object]:
    """The same by shorter names: without what was pre-trained on, unless that tells two of them apart."""
    short = [re.sub(r" on \w+( \(\d+ samples.*?\))?", "", name) for name in lines]
    return {s if short.count(s) == 1 else name: value for s, (name, value) in zip(short, lines.items())}


def draw_figures(runs: list[dict], log_dir: str) -> None:
    """curves.png: mIoU while fine-tuning (Figures 2, 4, 8); bars.png: its end; sizes.png: over images (Figure 3)."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("--figures needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rc("axes", titlesize=10)
    pyplot.rc("legend", fontsize=8)
    panels, sizes = {}, {}
    for run in runs:
        o, (network, name) = run["options"], describe(run)
        panels.setdefault(f"{network}, {o['train_size'] or 'all'} images", {}).setdefault(name, []).append(run)
        if o["train_size"]:
            points = sizes.setdefault(network, {}).setdefault(name, {})
            points.setdefault(o["train_size"], []).append(run["result"]["miou"])
    panels = {title: shorten(lines) for title, lines in panels.items() if len(lines) > 1}
    sizes = {title: shorten(lines) for title, lines in sizes.items() if max(map(len, lines.values())) > 1}

    def spread(values: list[float]) -> float:
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    def axes_grid(count: int) -> tuple:
        figure, axes = pyplot.subplots(-(-count // 2), min(count, 2), squeeze=False, layout="constrained",
                                       figsize=(6 * min(count, 2), 4 * -(-count // 2)))
        for axis in axes.flat[count:]:
            axis.axis("off")
        return figure, axes.flat

    if panels:
        figure, axes = axes_grid(len(panels))
        for axis, (title, lines) in zip(axes, panels.items()):
            for name, members in sorted(lines.items()):
                steps = sorted(set.intersection(*(set(dict(run["curve"])) for run in members)))
                values = np.array([[dict(run["curve"])[step] for step in steps] for run in members])
                line, = axis.plot(steps, values.mean(0), label=f"{name} ({len(members)})")
                axis.fill_between(steps, values.min(0), values.max(0), alpha=0.15, color=line.get_color(), linewidth=0)
            axis.set(title=title, xlabel="step", ylabel="mIoU %")
            axis.legend()
        figure.savefig(os.path.join(log_dir, "curves.png"), dpi=120)
        figure, axes = axes_grid(len(panels))
        for axis, (title, lines) in zip(axes, panels.items()):
            names = sorted(lines, reverse=True)
            values = [[run["result"]["miou"] for run in lines[name]] for name in names]
            axis.barh(names, [np.mean(v) for v in values], xerr=[spread(v) for v in values])
            axis.set(title=title, xlabel="mIoU %")
        figure.savefig(os.path.join(log_dir, "bars.png"), dpi=120)
    if sizes:
        figure, axes = axes_grid(len(sizes))
        for axis, (title, lines) in zip(axes, sizes.items()):
            for name, points in sorted(lines.items()):
                counts = sorted(points)
                axis.errorbar(counts, [np.mean(points[n]) for n in counts], [spread(points[n]) for n in counts],
                              label=name, capsize=3)
            axis.set(title=title, xlabel="training images", ylabel="mIoU %", xscale="log", xticks=counts,
                     xticklabels=counts)
            axis.minorticks_off()
            axis.legend()
        figure.savefig(os.path.join(log_dir, "sizes.png"), dpi=120)
    pyplot.close("all")


def markdown(rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|", *[f"| {' | '.join(row)} |" for row in rows[1:]]]


def tables_command(args: argparse.Namespace) -> int:
    """Print every finished fine-tuning in --log_dir and the paper's tables; write tables.md and tables.csv there."""
    runs = read_runs(args.log_dir)
    if not runs:
        raise InputError(f"{args.log_dir}: no finished fine-tuning there yet")
    rows = all_runs_table(runs)
    text = "\n".join([*markdown(rows), *paper_tables(runs)])
    print(text)
    Path(args.log_dir, "tables.md").write_text(text + "\n")
    with open(os.path.join(args.log_dir, "tables.csv"), "w", newline="") as file:
        csv.writer(file).writerows(rows)
    if args.figures:
        draw_figures(runs, args.log_dir)
    return 0


# ---------------------------------------------------------------------------------------------- a page of all runs

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
body {{ max-width: 76rem; margin: 0 auto; padding: 1rem }}
h1, h2, h3 {{ line-height: 1.2; overflow-wrap: anywhere }}
h2 {{ margin-top: 2.5rem }}
article {{ border-top: 1px solid #8886; margin-top: 1.5rem }}
.scroll {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: .8125rem }}
th, td {{ padding: .25rem .75rem .25rem 0; text-align: left; white-space: nowrap; border-bottom: 1px solid #8884 }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem }}
figure {{ margin: .5rem 0 }}
figcaption, .quiet {{ font-size: .875rem; opacity: .8 }}
svg, img {{ display: block; width: 100%; height: auto }}
img {{ max-width: 60rem }}
text {{ font-size: 12px; fill: currentColor }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8125rem }}
</style>
<h1>{title}</h1>
{body}
"""
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8a6fd1", "#7f7f7f")
CHARTS = {"loss": "training loss", "miou": "mIoU %", "masked": "share of masked pixels", "fx": "learned fx, pixels"}


def html_table(lines: list[str]) -> str:
    """HTML of the Markdown that the tables are written in: rows between bars, titles between asterisks, other lines."""
    parts, rows = [], []
    for line in [*lines, ""]:
        if line.startswith("|"):
            cells = [html.escape(cell.strip()) for cell in line.strip("|").split("|")]
            if not set(line) <= set("|-"):
                tag = "td" if rows else "th"
                rows.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>")
            continue
        if rows:
            parts.append(f'<div class="scroll"><table>{"".join(rows)}</table></div>')
        rows = []
        parts += [f"<p>{html.escape(line).replace('**', '')}</p>"] if line else []
    return "\n".join(parts)


def svg_chart(title: str, curves: dict[str, list[tuple[float, float]]]) -> str:
    """Curves of (step, value) by name as a figure with inline SVG, and a legend where there are several."""
    curves = {name: points[::1 + len(points) // 300] + points[-1:] for name, points in curves.items()}
    steps, values = zip(*(point for points in curves.values() for point in points))
    left, right, low, high = min(steps), max(steps), min(values), max(values)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1
    low, high, width = max(low - margin, 0) if low >= 0 else low - margin, high + margin, max(right - left, 1)
    parts = []
    for share in (0, 0.5, 1):
        x, y = 50 + 300 * share, 170 - 160 * share
        parts.append(f'<path d="M50 {y:.0f}H350" stroke="#8885" fill="none"/>'
                     f'<text x="44" y="{y + 4:.0f}" text-anchor="end">{low + share * (high - low):.3g}</text>'
                     f'<text x="{x:.0f}" y="188" text-anchor="{("start", "middle", "end")[int(2 * share)]}">'
                     f'{left + share * (right - left):.0f}</text>')
    legend = []
    for i, (name, points) in enumerate(curves.items()):
        colour, dash = LINE_COLOURS[i % len(LINE_COLOURS)], ("", "6 3", "2 2")[i // len(LINE_COLOURS) % 3]
        path = " ".join(f"{50 + 300 * (x - left) / width:.1f},{170 - 160 * (y - low) / (high - low):.1f}"
                        for x, y in points)
        label = html.escape(f"{name} {points[-1][1]:.4g}")
        dots = "".join(f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="2" fill="{colour}"/>'
                       for p in path.split() if len(points) < 8)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" '
                     f'stroke-dasharray="{dash}"><title>{label}</title></polyline>{dots}')
        legend.append(f'<span style="color:{colour}">&#9632;</span> {label}')
    caption = f"{html.escape(title)}: " + ("<br>" + "<br>".join(legend) if len(curves) > 1 else f"{points[-1][1]:.4g}")
    return (f'<figure><figcaption>{caption}</figcaption><svg viewBox="0 0 360 194" role="img" '
            f'aria-label="{html.escape(title)}">{"".join(parts)}</svg></figure>')


def html_of_run(folder: Path, base: Path) -> str:
    """What a run folder holds, finished or not: how it ended, its curves, its first and last samples, its options."""
    def read(name: str) -> str:
        return (folder / name).read_text() if (folder / name).is_file() else ""

    arguments, result = (json.loads(read(name) or "{}") for name in ("args.json", "result.json"))
    records = [json.loads(line) for line in read("log.jsonl").splitlines() if line.endswith("}")]
    options = arguments["options"]
    step = max((record["step"] for record in records), default=0)
    state = "finished" if result else f"at step {step} of {options['steps']}"
    numbers = " · ".join(f"{key} {value:.4g}" for key, value in result.items()
                        if isinstance(value, float) and math.isfinite(value) and not key.startswith("ms_"))
    curves = {key: [(record["step"], record[key]) for record in records
                    if isinstance(record.get(key), (int, float)) and math.isfinite(record[key])] for key in CHARTS}
    charts = "".join(svg_chart(title, {"": curves[key]}) for key, title in CHARTS.items() if curves[key])
    pictures = sorted(folder.glob("samples/*.png"))
    figures = "".join(
        f'<figure><a href="{link}"><img src="{link}" loading="lazy" alt="samples at step {int(picture.stem)}"></a>'
        f"<figcaption>samples at step {int(picture.stem)}</figcaption></figure>" for picture in pictures[:1] * (
            len(pictures) > 1) + pictures[-1:] if (link := quote(picture.relative_to(base).as_posix())))
    return (f'<article id="{quote(folder.relative_to(base).as_posix())}"><h3>{html.escape(folder.name)}</h3>'
            f"<p>{html.escape(state)}. {html.escape(numbers)}</p>"
            f'<div class="charts">{charts}</div>{figures}<details><summary>command and options</summary>'
            f"<pre>{html.escape(arguments['command'])}\n\n{html.escape(json.dumps(options, indent=1))}</pre></details>"
            "</article>")


def html_command(args: argparse.Namespace) -> int:
    """index.html in --log_dir: of every folder of runs the tables, the curves of mIoU, and then each run."""
    base = Path(args.log_dir)
    folders = sorted(path.parent for path in base.glob("**/args.json"))
    if not folders:
        raise InputError(f"{base}: no runs there yet")
    body = []
    for parent in sorted({folder.parent for folder in folders}):
        body.append(f"<h2>{html.escape(parent.relative_to(base).as_posix())}</h2>" * (parent != base))
        runs, panels = read_runs(str(parent)), {}
        if runs:
            body.append(html_table([*markdown(all_runs_table(runs)), *paper_tables(runs)]))
        for run in runs:
            if run["curve"]:
                network, name = describe(run)
                title = f"mIoU %, {network}, {run['options']['train_size'] or 'all'} images"
                panels.setdefault(title, {}).setdefault(name, []).append(dict(run["curve"]))
        means = {title: {name: [(step, float(np.mean([curve[step] for curve in curves])))
                                for step in sorted(set.intersection(*map(set, curves)))]
                         for name, curves in sorted(shorten(lines).items())} for title, lines in panels.items()}
        charts = "".join(svg_chart(title, lines) for title, lines in means.items())
        members = [folder for folder in folders if folder.parent == parent]
        links = " · ".join(f'<a href="#{quote(folder.relative_to(base).as_posix())}">{html.escape(folder.name)}</a>'
                           for folder in members)
        body.append(f'<div class="charts">{charts}</div><details class="quiet"><summary>{len(members)} runs</summary>'
                    f"{links}</details>")
        for folder in members:
            try:
                body.append(html_of_run(folder, base))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f"{folder}: args.json, result.json or log.jsonl is damaged") from None
    page = PAGE.format(title=f"{len(folders)} runs of depth2seg", body="\n".join(body))
    write_atomically(str(base / "index.html"), lambda file: file.write(page.encode()))
    print(f"{len(folders)} runs -> {base / 'index.html'}")
    return 0


def scale_option(text: str) -> float | str:
    if text in ("median", "affine"):
        return text
    return within(float, 1e-9)(text)


def parse_options() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    depth = commands.add_parser("depth", help="the Eigen protocol's seven metrics against LiDAR")
    which = depth.add_mutually_exclusive_group(required=True)
    which.add_argument("--weights", help="run folder, model.pt or Monodepth2 folder")
    which.add_argument("--baseline", action="store_true",
                       help="evaluate the best constant picture instead: the per-pixel median of --train_frames' LiDAR")
    depth.add_argument("--data", default="kitti")
    depth.add_argument("--data_path")
    depth.add_argument("--drives", nargs="+", metavar="NAME")
    depth.add_argument("--frames", type=datasets.parse_range, default=(None, None), metavar="A:B",
                       help="instead of the Eigen test split")
    depth.add_argument("--train_frames", type=datasets.parse_range, default=(None, None), metavar="A:B",
                       help="of --baseline")
    depth.add_argument("--scale", type=scale_option,
                       help="a factor to metres, median, or affine (default: median for monocular training, affine for "
                            "--depth_loss affine, 1 for other networks of ours, 5.4 for Monodepth2's stereo weights)")
    depth.add_argument("--ground_truth", choices=("auto", "velodyne_x", "z"), default="auto",
                       help="velodyne_x: forward distance of the raw points, the published protocol; z: camera depth. "
                            "auto: velodyne_x where every frame has raw points")
    depth.add_argument("--min_eval", type=within(float, 1e-6), default=1e-3, help="metres")
    depth.add_argument("--max_eval", type=within(float, 1e-6), default=80.0, help="cap in metres")
    depth.add_argument("--no_crop", action="store_true", help="every measured pixel instead of the Garg crop")
    depth.add_argument("--output", help="folder for depth.csv (per image) and depth.json")
    depth.set_defaults(run=depth_command)

    seg = commands.add_parser("seg", help="mIoU, pixel accuracy, cross-entropy over a whole data set")
    seg.add_argument("--weights", required=True, help="run folder or model.pt of a segmenter")
    seg.add_argument("--data", help="default: what it was trained on")
    seg.add_argument("--data_path")
    seg.add_argument("--eval_mode", choices=("whole", "slide"),
                     help="images resized to the network's size, or at their own size through overlapping windows of "
                          "the size it was trained on (default: as in training)")
    seg.add_argument("--flip", action="store_true", help="average with the prediction for the mirrored image")
    seg.add_argument("--output", help="folder for segmentation.json")
    seg.set_defaults(run=seg_command)

    images = commands.add_parser("predict", help="pictures and .npy for images or folders of any size")
    images.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    images.add_argument("--weights", required=True)
    images.add_argument("--output", default="predictions")
    images.set_defaults(run=predict_command)

    grid = commands.add_parser("grid", help="one picture: images in rows, then a column of predictions for each model")
    cam = commands.add_parser("gradcam", help="the same grid with Grad-CAM: where the encoder looks")
    cam.add_argument("--layer", type=within(int, 0, 4), default=0,
                     help="of the encoder's maps, from the finest; 0 is the one before pooling (paper: a shallow one)")
    for command, output in ((grid, "grid.png"), (cam, "gradcam.png")):
        command.add_argument("images", nargs="*", metavar="IMAGE_OR_FOLDER", help="default: four test images of --data")
        command.add_argument("--data", default="synthetic")
        command.add_argument("--data_path")
        command.add_argument("--weights", nargs="+", required=True, metavar="WEIGHTS")
        command.add_argument("--output", type=datasets.picture_path, default=output)
        command.set_defaults(run=grid_command)

    for command in (depth, seg, images, grid, cam):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    export = commands.add_parser("export", help="a network for use elsewhere: ONNX, torch.export, Monodepth2's folder")
    export.add_argument("--weights", required=True, help="run folder, model.pt or Monodepth2 folder")
    export.add_argument("--output", required=True, metavar="FILE_OR_FOLDER")
    export.add_argument("--format", choices=("onnx", "torch", "monodepth2"), default="onnx",
                        help="a file from images in [0, 1] to depth or class scores (onnx, torch: .pt2), or a folder")
    export.add_argument("--dynamic", action="store_true",
                        help="any batch, and any height and width that the encoder's stride divides")
    export.set_defaults(run=export_command)

    tables = commands.add_parser("tables", help="a table of all finished fine-tunings, mean and deviation over seeds")
    tables.add_argument("--log_dir", default="runs", help="folder of run folders; tables.md and .csv go there")
    tables.add_argument("--figures", action="store_true", help="curves.png, bars.png, sizes.png as well (matplotlib)")
    tables.set_defaults(run=tables_command)

    page = commands.add_parser("html", help="index.html in --log_dir: tables, curves, samples and options of every run")
    page.add_argument("--log_dir", default="runs", help="folder of run folders, or of folders of these")
    page.set_defaults(run=html_command)

    return parser.parse_args()


def main() -> int:
    args = parse_options()
    return args.run(args)


if __name__ == "__main__":
    run_main(main)
