"""Metrics of depth and segmentation, and the protocols around them (Sections 4.1 and 4.2).

    errors = metrics.evaluate_depth_image(1 / depth, measured, scale="median")
    scores = metrics.evaluate_segmentation(model, dataset, device)

Functions that return dicts; training and evaluate.py call the same ones. Percent is 0 to 100.
"""

import math
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from labels import CITYSCAPES_CLASSES, Labelled
from utils import IGNORE, InputError

DEPTH_METRICS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "a1", "a2", "a3")
RELEASE_CLASSES = [0, 1, 2, 8, 9, 10, 13]  # train ids of the 7 classes that the release averages
EVALUATION_PIXELS = 2 ** 20  # of a batch of images, at most
WINDOW_STEP = 2 / 3  # of a window: how far apart sliding windows are at most


def at_size(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, C, h, w) -> (B, C, H, W); contiguous, as a CPU takes far longer over channels_last."""
    return F.interpolate(values.contiguous(), tuple(size), mode="bilinear", align_corners=False)


# ---- depth ---------------------------------------------------------------------------------------

def depth_errors(measured: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """The seven metrics of Eigen et al. over matching positive depths in metres."""
    difference = measured - predicted
    squared = difference ** 2
    log_difference = np.log(measured) - np.log(predicted)
    ratio = np.maximum(measured / predicted, predicted / measured)
    errors = {
        "abs_rel": (np.abs(difference) / measured).mean(),
        "sq_rel": (squared / measured).mean(),
        "rmse": np.sqrt(squared.mean()),
        "rmse_log": np.sqrt((log_difference ** 2).mean()),
        "a1": (ratio < 1.25).mean(),
        "a2": (ratio < 1.25 ** 2).mean(),
        "a3": (ratio < 1.25 ** 3).mean(),
    }
    return {name: float(error) for name, error in errors.items()}


def garg_crop(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what Eigen's protocol evaluates on KITTI."""
    top = int(0.40810811 * height)
    bottom = int(0.99189189 * height)
    left = int(0.03594771 * width)
    right = int(0.96405229 * width)
    return top, bottom, left, right


def nyu_crop(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what Eigen's protocol evaluates on NYU-v2."""
    if (height, width) != (480, 640):
        raise InputError(f"Eigen's crop of NYU is for depth of 640x480, not {width}x{height}")
    return 45, 471, 41, 601


CROPS = {"garg": garg_crop, "nyu": nyu_crop}


def evaluate_depth_image(
    inverse_depth: np.ndarray,
    measured: np.ndarray,
    scale: float | str = "median",
    min_depth: float = 1e-3,
    max_depth: float = 80.0,
    crop: str | None = "garg",
) -> dict[str, float]:
    """Eigen's protocol for one image: inverse depth (h, w) of any size, measured (H, W), 0 = none.

    scale: a factor to metres, "median" (ratio of medians) or "affine" (least squares in 1 / depth).
    Without a crop every measured pixel counts, however far. Returns the metrics, "ratio" of
    medians, "scale" and "pixels"; {} if nothing is measured.
    """
    valid = measured > 0
    if crop:
        top, bottom, left, right = CROPS[crop](*measured.shape)
        valid = np.zeros(measured.shape, bool)
        valid[top:bottom, left:right] = True
        valid &= (measured > min_depth) & (measured < max_depth)
    if not valid.any():
        return {}
    inverse = torch.from_numpy(inverse_depth)[None, None]
    inverse = at_size(inverse, measured.shape)[0, 0]
    inverse = inverse.numpy()[valid]  # (N,)
    measured = measured[valid]
    if scale == "affine":
        inverse = fit_inverse_depth(inverse, measured).clip(1 / max_depth)
        scale = 1.0
    predicted = 1 / inverse.clip(1e-6)  # DPT's relu may end in 0
    ratio = float(np.median(measured) / np.median(predicted))
    if scale == "median":
        scale = ratio
    predicted = (predicted * scale).clip(min_depth, max_depth)
    errors = depth_errors(measured, predicted)
    return {**errors, "ratio": ratio, "scale": scale, "pixels": int(valid.sum())}


def fit_inverse_depth(inverse: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Relative inverse depth (N,) with the scale and shift that suit measured depth (N,) best."""
    design = np.stack([inverse, np.ones_like(inverse)], 1)  # (N, 2)
    slope, shift = np.linalg.lstsq(design, 1 / measured, rcond=None)[0]
    return slope * inverse + shift


def summarise_depth(rows: list[dict]) -> dict[str, float]:
    """Means over images, and the median and relative deviation of the ratios of medians."""
    summary = {}
    for name in DEPTH_METRICS:
        summary[name] = float(np.mean([row[name] for row in rows]))
    ratios = np.array([row["ratio"] for row in rows])
    median = np.median(ratios)
    summary["images"] = len(rows)
    summary["ratio_median"] = float(median)
    summary["ratio_deviation"] = float(np.std(ratios / median))
    return summary


def constant_depth(maps: list[np.ndarray]) -> np.ndarray:
    """The best constant picture: per-pixel median of measured depth maps (H, W), 0 = none.

    Gaps are filled along the row. Rows without any measurement, as in the sky, take the next row
    below that has one; those at the bottom take the lowest.
    """
    stacked = np.stack(maps).astype(np.float32)  # (N, H, W)
    stacked[stacked == 0] = np.nan
    known = np.isfinite(stacked).any(0)  # (H, W)
    if not known.any():
        raise InputError("the constant picture needs frames with measured depth")
    picture = np.zeros(known.shape, np.float32)
    picture[known] = np.nanmedian(stacked[:, known], axis=0)
    measured_rows = np.flatnonzero(known.any(1))
    columns = np.arange(known.shape[1])
    for row in measured_rows:
        there = columns[known[row]]
        picture[row] = np.interp(columns, there, picture[row, there])
    below = np.searchsorted(measured_rows, np.arange(len(picture)))
    below = below.clip(max=len(measured_rows) - 1)
    return picture[measured_rows[below]]


# ---- segmentation --------------------------------------------------------------------------------

def confusion_matrix(label: torch.Tensor, prediction: torch.Tensor, classes: int) -> torch.Tensor:
    """(classes + 1, classes) int64 counts, rows = truth, the last one for pixels labelled 255.

    Raises ValueError for maps of different shapes and for ids out of range.
    """
    if label.shape != prediction.shape:
        raise ValueError(f"prediction is {tuple(prediction.shape)}, label {tuple(label.shape)}")
    labelled = label != IGNORE
    used = {"label": label * labelled, "prediction": prediction}
    for name, ids in used.items():
        low, high = ids.aminmax()
        if low < 0 or high >= classes:
            raise ValueError(f"{name} ids are {low} to {high}, but there are {classes} classes")
    rows = label.where(labelled, classes)
    cells = (rows * classes + prediction).flatten()
    size = (classes + 1) * classes
    counts = cells.bincount(minlength=size)
    return counts.view(classes + 1, classes)


def segmentation_scores(confusion: torch.Tensor) -> dict:
    """"miou", "pixel_accuracy" and "iou" by class from the `confusion_matrix` of a whole data set.

    The mean is over the classes that the labels show: the same for every model.
    """
    counts = confusion[:-1].double()  # predictions on unlabelled pixels do not count
    correct = counts.diag()
    labelled = counts.sum(1)
    predicted = counts.sum(0)
    union = labelled + predicted - correct
    iou = 100 * correct / union.clamp(min=1)
    iou[labelled == 0] = torch.nan
    accuracy = 100 * correct.sum() / labelled.sum().clamp(min=1)
    return {
        "miou": float(iou.nanmean()),
        "pixel_accuracy": float(accuracy),
        "iou": iou.tolist(),
    }


def release_score(confusion: torch.Tensor) -> float:
    """Mean IoU of one image as the authors' release has it, over 7 classes.

    Predictions on unlabelled pixels count as false positives, and a class that is predicted but
    absent scores 0. NaN if the image shows none of the 7 and none is predicted.
    """
    correct = confusion.diagonal()
    labelled = confusion[:-1].sum(1)
    predicted = confusion.sum(0)
    iou = 100 * correct / (labelled + predicted - correct)  # 0 / 0 for a class in neither
    return float(iou[RELEASE_CLASSES].nanmean())


def window_starts(length: int, window: int) -> list[int]:
    """First pixels of evenly spread windows that cover a length."""
    count = 1 + math.ceil((length - window) / (WINDOW_STEP * window))
    starts = np.linspace(0, length - window, count)
    return starts.round().astype(int).tolist()


def slide(forward: Callable, image: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Logits (1, classes, H, W) of an image (1, 3, H, W) that is no smaller than its windows, averaged."""
    height, width = image.shape[2:]
    rows, columns = window
    total = None
    times = image.new_zeros(1, 1, height, width)
    for top in window_starts(height, rows):
        for left in window_starts(width, columns):
            place = (..., slice(top, top + rows), slice(left, left + columns))
            logits = forward(image[place])
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], height, width)
            total[place] += logits
            times[place] += 1
    return total / times


@torch.inference_mode()
def evaluate_segmentation(
    model: torch.nn.Module,
    dataset: Labelled,
    device: torch.device,
    window: tuple[int, int] | None = None,
    flip: bool = False,
) -> dict:
    """Scores of a segmenter over a data set, at the labels' native size; restores its mode.

    window: (height, width) of sliding windows over the resized images; None: these as a whole.
    flip: average with the mirrored image. Returns `segmentation_scores`, "images", "cross_entropy"
    in nats per pixel (the proxy of H(y|h), Eq. 3) and "release_miou" for the Cityscapes classes.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()

    def forward(images: torch.Tensor) -> torch.Tensor:
        logits = model(images)[0]
        if flip:
            mirrored = model(images.flip(-1))[0]
            logits = (logits + mirrored.flip(-1)) / 2
        return logits

    classes = len(dataset.classes)
    has_release_classes = tuple(dataset.classes) == CITYSCAPES_CLASSES
    confusion = torch.zeros(classes + 1, classes, dtype=torch.int64, device=device)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    release = []
    size = 1 if window else batch_size(dataset)
    for start in range(0, len(dataset), size):
        first = min(start, len(dataset) - size)  # the last batch, to be as large, looks back
        pairs = []
        for index in range(first, first + size):
            pairs.append(dataset.load(index, native_label=True))
        images = torch.stack([image for image, _ in pairs])
        images = images.to(device).float() / 255
        logits = slide(forward, images, window) if window else forward(images)
        for place in range(start - first, size):
            label = pairs[place][1].to(device).long()[None]  # (1, h, w)
            native = at_size(logits[place:place + 1], label.shape[1:])  # (1, classes, h, w)
            prediction = native.max(1).indices  # on a CPU several times as fast as argmax
            counts = confusion_matrix(label, prediction, classes)
            confusion += counts
            nats += F.cross_entropy(native, label, ignore_index=IGNORE, reduction="sum")
            if has_release_classes:
                release.append(release_score(counts))

    for module, mode in modes.items():
        module.training = mode
    labelled = int(confusion[:-1].sum())
    if labelled == 0:
        dataset.refuse_unlabelled("evaluated")
    scores = segmentation_scores(confusion)
    scores["iou"] = dict(zip(dataset.classes, scores["iou"]))
    scores["cross_entropy"] = float(nats) / labelled
    scores["images"] = len(dataset)
    if has_release_classes:
        scores["release_miou"] = float(np.nanmean(release))
    return scores


def batch_size(dataset: Labelled) -> int:
    """How many images evaluation takes at once."""
    height, width = dataset.size
    return max(1, min(8, len(dataset), EVALUATION_PIXELS // (height * width)))


# ---- during a training --------------------------------------------------------------------------

def refuse_nonfinite(terms: dict, module: torch.nn.Module, step: int, indices: torch.Tensor) -> None:
    """Before the update, ends a run whose loss or gradient is not finite (exit code 1).

    A GPU is checked only at some steps: the fault may lie in an earlier one.
    """
    bad = [name for name, value in terms.items() if not value.isfinite()]
    gradients = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            gradients[f"gradient of {name}"] = parameter.grad
    norm = torch.nn.utils.get_total_norm(gradients.values())
    if not bad and not norm.isfinite():  # the last one is nearest to the loss
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()][-1:]
    if bad:  # the loss is the sum of the terms before it
        sys.exit(f"stopped: {bad[0]} is not finite by step {step} (its samples: {indices.tolist()})")


def warn_of_trouble(terms: dict, views: dict, known: dict[str, str]) -> None:
    """Prints whatever looks wrong and is not yet in `known`, and adds it."""
    found = find_trouble(terms, views)
    for kind in found.keys() - known.keys():
        tqdm.write(f"warning: {found[kind]}")
    known |= found


def find_trouble(terms: dict, views: dict) -> dict[str, str]:
    """What looks wrong in a training. Waits for the device, so at log steps only."""
    trouble = {}
    masked = float(terms.get("masked", 0))
    if masked > 0.8:
        trouble["masked"] = (f"{masked:.0%} of the pixels do not train: does the camera stand still? "
                             "Do the sources show what the target shows?")
    if "measured" in views and not views["measured"].any():
        trouble["measured"] = ("no measured depth lies between --min_depth and --max_depth: "
                               "is --depth_scale right?")
    if "depth" in views:
        disparity = 1 / views["depth"].flatten(1)
        if float((disparity.std(1) / disparity.mean(1)).mean()) < 0.02:
            trouble["depth"] = ("disparity is nearly the same everywhere: try another --seed "
                                "or a lower --learning_rate")
    if "poses" in views:
        change = (views["poses"] - torch.eye(4, device=views["poses"].device))[:, :, :3]  # (B, V, 3, 4)
        turned = change[..., :3].abs().mean((0, 2, 3))  # (V,)
        moved = change[..., 3].norm(dim=-1).mean(0) / views["depth"].mean()
        # of the source that moves least: the other camera, if it is one, is not learned
        if float(torch.maximum(turned, moved).amin()) < 1e-3:
            trouble["pose"] = "the pose network sees hardly any motion, which depth is learned from"
    return trouble
