"""Evaluates networks and draws what they see: the scores and pictures of Section 4.

    python evaluate.py depth --weights runs/NAME --data kitti --frames 105:144
    python evaluate.py seg --weights runs/NAME
    python evaluate.py predict street.jpg video/ --weights runs/NAME --output predictions
    python evaluate.py grid video/ --weights runs/NAME runs/OTHER --output grid.png
    python evaluate.py gradcam --weights runs/NAME runs/OTHER --output gradcam.png

The metrics themselves are functions in metrics.py, which training calls as well.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import datasets
import pictures
import utils
from encoders import VITS
from images import (
    image_names,
    natural_key,
    read_image,
    read_scaled_depth,
    resize,
    split_sequences,
)
from losses import disparity_to_depth
from metrics import (
    DEPTH_METRICS,
    at_size,
    constant_depth,
    evaluate_depth_image,
    evaluate_segmentation,
    summarise_depth,
)
from utils import InputError, within
from weights import MONODEPTH2_UNIT, load_model

# ---- options -----------------------------------------------------------------------------------

def scale_option(text: str) -> float | str:
    if text in ("median", "affine"):
        return text
    return within(float, 1e-9)(text)


def picture_path(text: str) -> str:
    if not text.lower().endswith((".png", ".jpg", ".jpeg")):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png or .jpg")
    return text


def parse_options() -> argparse.Namespace:
    parser = utils.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    depth = commands.add_parser("depth", help="the seven metrics of Eigen et al.")
    add_depth_options(depth.add_argument)
    depth.set_defaults(run=depth_command)

    seg = commands.add_parser("seg", help="mIoU, pixel accuracy and cross-entropy of a data set")
    add_seg_options(seg.add_argument)
    seg.set_defaults(run=seg_command)

    images = commands.add_parser("predict", help="pictures and data for images of any size")
    add_predict_options(images.add_argument)
    images.set_defaults(run=predict_command)

    grid = commands.add_parser("grid", help="one picture: images in rows, networks in columns")
    cam = commands.add_parser("gradcam", help="the same with Grad-CAM: where a shallow layer looks")
    cam.add_argument("--layer", type=within(int, 0, 4), default=0,
                     help="which of the encoder's maps, the finest first (before pooling)")
    for command, name in ((grid, "grid.png"), (cam, "gradcam.png")):
        add_grid_options(command.add_argument, name)
        command.set_defaults(run=grid_command, height=64, width=64)  # only native labels are read
    for command in commands.choices.values():
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                             help="cpu, cuda or cuda:N")
    return parser.parse_args()


def add_depth_options(add: Callable) -> None:
    add("--weights", required=True,
        help="run folder, model.pt, Monodepth2 folder, or a file of DPT or Depth Anything")
    add("--data", choices=("kitti", "synthetic", "nyu"), default="kitti", help="test data")
    add("--data_path", help="root of the data set (default: data/NAME)")
    add("--drives", nargs="+", metavar="NAME", help="KITTI: only these drives")
    add("--frames", type=datasets.parse_range, default=(None, None), metavar="A:B",
        help="these frames, not the Eigen split (NYU: these of the test images)")
    add("--constant_from", type=datasets.parse_range, metavar="A:B",
        help="also score a constant picture, the median depth of these training frames")
    add("--scale", type=scale_option, metavar="{median,affine,NUMBER}",
        help="how predicted depth becomes metres (default: 1 for metric training, 5.4 for "
             "Monodepth2's stereo weights, affine for DPT and Depth Anything, else median)")
    add("--ground_truth", choices=("auto", "velodyne_x", "z"), default="auto",
        help="KITTI: forward distance of the raw points, the published protocol, or camera z "
             "(auto: the former where every frame has raw points)")
    add("--min_eval", type=within(float, 1e-6), default=1e-3,
        help="nearest depth that counts, in metres; with --no_crop, it and --max_eval only clip "
             "predictions")
    add("--max_eval", type=within(float, 1e-6), help="metres (default: 80; NYU 10)")
    add("--no_crop", action="store_true", help="every measured pixel instead of Eigen's crop")
    add("--output", help="folder for depth.json, with the scores of every image")


def add_seg_options(add: Callable) -> None:
    add("--weights", required=True, help="run folder or model.pt of a segmenter")
    add("--data", help="default: what it was trained on")
    add("--data_path", help="root of the data set (default: the run's own, of other data data/NAME)")
    add("--split", choices=("train", "val", "test"), default="val",
        help="which images (train: those it was trained on)")
    add("--eval_mode", choices=("whole", "slide"),
        help="whole images, or through windows of the crop's size (default: as in training)")
    add("--flip", action="store_true", help="average with the mirrored image")
    add("--output", help="folder for segmentation.json")


def add_predict_options(add: Callable) -> None:
    add("images", nargs="+", metavar="IMAGE_OR_FOLDER",
        help="for flow: folders of frames, or files in order")
    add("--weights", required=True,
        help="run folder, model.pt, Monodepth2 folder, or a file of DPT or Depth Anything")
    add("--output", default="predictions", help="folder")
    add("--depth_range", type=within(float, 1e-6), nargs=2, metavar=("NEAR", "FAR"), default=(),
        help="of the colours (default: one range for all images, found in a first pass)")
    add("--arrays", action="store_true", help="write .npy files as well")


def add_grid_options(add: Callable, output: str) -> None:
    add("images", nargs="*", metavar="IMAGE_OR_FOLDER",
        help="default: four test images of --data and their labels")
    add("--data", default="synthetic", help="a labelled data set")
    add("--data_path", help="root of the data set (default: data/NAME)")
    add("--weights", nargs="+", required=True, help="run folders, model.pt files, ...")
    add("--output", type=picture_path, default=output, metavar="PICTURE", help=".png or .jpg")


# ---- what a network makes of an image ----------------------------------------------------------

def load(path: str, device: torch.device, task: str | None = None) -> tuple[torch.nn.Module, dict]:
    """A network and its options; args.json beside model.pt adds those it was trained with."""
    model, options = load_model(path, device, task)
    file = Path(path.removesuffix("model.pt"), "args.json")
    try:
        training = json.loads(file.read_text())["options"] if file.is_file() else {}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file}: damaged, it should hold a run's options") from None
    return model, {**training, **options}


def input_size(options: dict, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) at which a network sees an image of this size: that of its training.

    Depth models of others keep the aspect, as their own scripts do; the shorter side is given.
    """
    if "output" not in options:
        return options["height"], options["width"]
    patch = VITS[options["encoder"]][0]
    patches = options["height"] / min(size) / patch  # for each pixel
    return max(1, round(patches * size[0])) * patch, max(1, round(patches * size[1])) * patch


def shrink(image: torch.Tensor, options: dict) -> torch.Tensor:
    """An image (3, H, W) uint8 as the network sees it: (1, 3, height, width) in [0, 1]."""
    small = resize(image, input_size(options, image.shape[1:]))
    return small[None].float() / 255


def inverse_depth(model: torch.nn.Module, options: dict, images: torch.Tensor) -> torch.Tensor:
    """1 / depth (B, 1, h, w) of images (B, 3, h, w) in [0, 1]."""
    out = model(images)[0]
    if options.get("output") == "inverse depth":  # DPT, Depth Anything: up to scale and shift
        return out.relu()
    return 1 / disparity_to_depth(out.sigmoid(), options["min_depth"], options["max_depth"])


@torch.inference_mode()
def predict(model: torch.nn.Module, options: dict, images: list[torch.Tensor]) -> torch.Tensor:
    """What a network makes of an image (3, H, W) uint8 of any size, at that size, on the CPU.

    images: of a flow network the target and its source; other networks look at the first only.
    Returns by task: depth (1, H, W), in metres where training was metric; train ids (1, H, W);
    flow (2, H, W) in pixels; a reconstruction (3, H, W).
    """
    task = options["task"]
    size = images[0].shape[1:]
    device = next(model.parameters()).device
    seen = images if task == "flow" else images[:1]
    inputs = [shrink(image, options).to(device) for image in seen]
    if task == "depth":
        inverse = at_size(inverse_depth(model, options, *inputs), size)[0]
        return 1 / inverse.clamp(min=1e-6).cpu()
    out = at_size(model(*inputs)[0], size)[0].cpu()
    if task == "segmentation":
        return out.max(0, keepdim=True).indices
    if task == "flow":
        x = out[0] * (size[1] / options["width"])
        y = out[1] * (size[0] / options["height"])
        return torch.stack([x, y])
    return out.sigmoid()  # colours


def draw(prediction: torch.Tensor, options: dict, image: torch.Tensor,
         depth_range: tuple = ()) -> torch.Tensor:
    """A picture (3, H, W) in [0, 1] of what `predict` made of an image (3, H, W) uint8.

    depth_range: nearest and farthest depth of the colours; () for those of the image.
    """
    if options["task"] == "depth":
        return pictures.colour_depth(prediction[None], *depth_range)[0]
    if options["task"] == "flow":
        return pictures.colour_flow(prediction[None])[0]
    if options["task"] == "segmentation":
        colours = pictures.colour_labels(prediction, options["colours"])[0]
        return 0.5 * image / 255 + 0.5 * colours
    return prediction


def gradcam(model: torch.nn.Module, images: torch.Tensor, layer: int = 0) -> torch.Tensor:
    """Grad-CAM (B, h, w) of one of the encoder's maps for images (B, 3, H, W) in [0, 1] (Figure 6).

    A channel's weight is the mean gradient of the predicted classes' scores, summed over pixels
    (of a depth network: of the disparity before its sigmoid). 99 % of each map lies below 1.
    """
    features = model.requires_grad_().encoder(images)
    if layer >= len(features):
        raise InputError(f"--layer {layer}: this encoder has {len(features)} maps, the first is 0")
    score = model.decoder(features)[0].amax(1).sum()
    gradient = torch.autograd.grad(score, features[layer])[0]
    weights = gradient.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
    heat = (weights * features[layer]).sum(1).relu().detach()
    top = heat.flatten(1).quantile(0.99, dim=1)
    return heat / top.clamp(min=1e-9).view(-1, 1, 1)


def draw_gradcam(model: torch.nn.Module, options: dict, image: torch.Tensor,
                 layer: int) -> torch.Tensor:
    """One image (3, H, W) uint8 under its Grad-CAM, (3, H, W) in [0, 1]."""
    device = next(model.parameters()).device
    heat = gradcam(model, shrink(image, options).to(device), layer)
    heat = at_size(heat[None], image.shape[1:])[0].cpu()
    return 0.4 * image / 255 + 0.6 * pictures.colour_values(heat)[0]


# ---- depth -------------------------------------------------------------------------------------

Measured = list[tuple[str, Callable[[], np.ndarray]]]  # image, and what reads its depth in metres


def find_measured(args: argparse.Namespace, span: tuple, truth: str,
                  training: bool = False) -> tuple[str, str, Measured]:
    """Title, kind of ground truth, and the frames of the span (A, B) that have depth."""
    if args.data == "nyu":
        return nyu_frames(args, span, "train" if training else "test")
    return kitti_frames(args, span, truth)


def kitti_frames(args: argparse.Namespace, span: tuple, truth: str) -> tuple[str, str, Measured]:
    """The left camera's frames: the Eigen test split or A to B.

    truth: as --ground_truth has it. Camera z is of one kind for all frames, the one that most have;
    the title says how many.
    """
    cls, root = datasets.find_data(args.data, args.data_path, datasets.CLIPS)
    clips = cls(root, ["0"], split="test", drives=args.drives, frames=span, cameras="l",
                height=32, width=32)
    points = [clips.depth_file("velodyne", *sample["place"]) for sample in clips.samples]
    if truth == "auto":
        exact = args.data == "synthetic"  # our own world needs none of the published quirks
        truth = "z" if exact or None in points else "velodyne_x"
    if truth == "velodyne_x":
        entries = [entry and (*entry[:-1], True) for entry in points]  # True: forward distance
    else:
        clips.find_depth(clips.samples)
        entries = [sample["depth"] for sample in clips.samples]
        truth = f"z of {clips.depth_kind}"
    found = []
    for sample, entry in zip(clips.samples, entries):
        if entry is not None:
            found.append((sample["images"][0], partial(clips.depth_map, entry)))
    return f"{len(found)} of {len(clips)} frames of {clips.name}", truth, found


def nyu_frames(args: argparse.Namespace, span: tuple, split: str) -> tuple[str, str, Measured]:
    """NYU-v2's labelled images, as tools/prepare_nyu.py writes them."""
    cls, root = datasets.find_data("nyu", args.data_path, datasets.LABELLED)
    pairs = sorted(cls(root, split, height=32, width=32).pairs)[slice(*span)]
    found = []
    for image, _ in pairs:
        depth = os.path.join(root, "depth", os.path.basename(image))
        found.append((image, partial(read_scaled_depth, depth, 1000)))
    return f"{len(found)} {split} images of nyu at {root}", "z", found


def default_scale(options: dict) -> float | str:
    """What makes metres of a network's depth.

    depth_loss: of runs of the first edition, and of FORKING.md's "A new loss".
    """
    if options.get("output") == "inverse depth" or options.get("depth_loss") == "affine":
        return "affine"
    if options.get("use_stereo"):
        return MONODEPTH2_UNIT
    return 1.0 if options.get("metric") else "median"


def score_depth(args: argparse.Namespace, frames: Measured, scale: float | str,
                inverse_of: Callable) -> dict:
    """Prints and returns scores, also "by_image"; inverse_of(path) gives 1 / depth (h, w)."""
    rows = []
    limits = (args.min_eval, args.max_eval, args.crop)
    for path, read in tqdm(frames, desc="depth", disable=None):
        row = evaluate_depth_image(inverse_of(path), read(), scale, *limits)
        if row:
            rows.append({"image": path, **row})
    if not rows:
        raise InputError(f"--data {args.data}: no frame there has ground truth of this kind")
    summary = summarise_depth(rows)
    print("  ".join(f"{name} {summary[name]:.4f}" for name in DEPTH_METRICS))
    return {**summary, "by_image": rows}


def constant_picture(training: Measured, test: Measured) -> np.ndarray:
    """`constant_depth` of the training frames that have the first test frame's size."""
    shape = test[0][1]().shape
    maps = [read() for _, read in training]
    maps = [depth for depth in maps if depth.shape == shape]
    print(f"a constant picture, the median depth of {len(maps)} training frames:")
    if not maps:
        raise InputError("--constant_from: there is no such frame of the test frames' size")
    return constant_depth(maps)


def depth_command(args: argparse.Namespace) -> int:
    nyu = args.data == "nyu"
    args.max_eval = args.max_eval or (10.0 if nyu else 80.0)
    if args.min_eval >= args.max_eval:
        raise InputError(f"--min_eval {args.min_eval:g} is not below --max_eval {args.max_eval:g}")
    if nyu and (args.drives or args.ground_truth != "auto"):
        raise InputError("--drives and --ground_truth are for KITTI, not for --data nyu")
    crop = "nyu" if nyu else "garg"
    args.crop = None if args.no_crop else crop
    range_text = f"{args.min_eval:g} to {args.max_eval:g} m"
    counted = f"{args.crop} crop, measured depth from {range_text}"
    if args.no_crop:
        counted = f"every measured pixel, predictions clipped to {range_text}"
    device = utils.pick_device(args.device)
    model, options = load(args.weights, device, "depth")
    scale = args.scale or default_scale(options)
    title, truth, frames = find_measured(args, args.frames, args.ground_truth)
    print(f"{args.weights} on {title}; ground truth {truth}, scale {scale}, {counted}")

    @torch.inference_mode()
    def inverse_of(path: str) -> np.ndarray:
        image = shrink(read_image(path), options).to(device)
        return inverse_depth(model, options, image)[0, 0].cpu().numpy()

    scores = score_depth(args, frames, scale, inverse_of)
    print(f"ratio of medians: median {scores['ratio_median']:.3f}, "
          f"relative deviation {scores['ratio_deviation']:.3f}")
    if args.constant_from:
        _, _, training = find_measured(args, args.constant_from, truth, training=True)
        picture = 1 / constant_picture(training, frames)
        factor = scale if isinstance(scale, str) else 1.0  # the picture is in metres
        scores["constant"] = score_depth(args, frames, factor, lambda path: picture)
    scores |= {"ground_truth": truth, "scale": scale, "crop": args.crop, "cap": args.max_eval}
    save_scores(args.output, "depth.json", scores)
    return 0


def save_scores(folder: str | None, name: str, scores: dict) -> None:
    if folder:
        os.makedirs(folder, exist_ok=True)
        utils.save_json(os.path.join(folder, name), scores)


# ---- segmentation ------------------------------------------------------------------------------

def seg_command(args: argparse.Namespace) -> int:
    device = utils.pick_device(args.device)
    model, options = load(args.weights, device, "segmentation")
    data = args.data or options["data"]
    if args.split == "train" and (data != options["data"] or "train_size" not in options):
        raise InputError(f"{args.weights}: --split train needs the run's args.json, which says "
                         "what images it was trained on")
    own_path = options.get("data_path") if data == options["data"] else None
    chosen = {"data": data, "data_path": args.data_path or own_path, "crop": None, "cache": None,
              "batch_size": 1}
    chosen = argparse.Namespace(**{**options, **chosen})
    if data != options["data"]:
        chosen.leave_out = []
    dataset = datasets.find_labelled(chosen, args.split, train=args.split == "train")
    if list(dataset.classes) != list(options["classes"]):
        known = ", ".join(options["classes"])
        raise InputError(f"{args.weights} knows the classes {known}; {data} has others")
    window = None
    if (args.eval_mode or options.get("eval_mode")) == "slide":
        window = options.get("crop") or dataset.size
    scores = evaluate_segmentation(model, dataset, device, window, args.flip)
    print(f"{args.weights}: {len(dataset)} images ({args.split}) of {data}, "
          f"mIoU {scores['miou']:.2f} %, P.Acc {scores['pixel_accuracy']:.2f} %, "
          f"{scores['cross_entropy']:.3f} nats per pixel")
    if "release_miou" in scores:
        print(f"scored as in the authors' release, 7 classes: {scores['release_miou']:.2f} %")
    for name, iou in scores["iou"].items():
        print(f"  {name:16} {iou:6.2f}")
    save_scores(args.output, "segmentation.json", scores)
    return 0


# ---- pictures ----------------------------------------------------------------------------------

def source_offset(options: dict) -> int | None:
    """How many frames after the target a flow network's source comes; None for other networks."""
    if options["task"] != "flow":
        return None
    return options.get("frame_ids", (0, -1))[1]


def refuse_output(output: str, paths: list[str]) -> None:
    """Refuses an --output that is an input, or the folder of one, or lies in a folder of inputs.

    There it could replace an image, and would be read as one the next time.
    """
    target = Path(output).resolve()
    for path in paths:
        source = Path(path).resolve()
        if source.is_dir():
            among = target.is_relative_to(source)
        else:
            among = target in (source, source.parent)
        if among:
            raise InputError(f"--output {output}: the input {path} is there, choose another place")


def list_inputs(paths: list[str], offset: int | None = None) -> list[list[str]]:
    """What `predict` takes: every image among `paths` and, in numeric order, of the folders there.

    offset: each together with the image so many frames later, where there is one.
    """
    sequences = [[path for path in paths if not os.path.isdir(path)]]
    for folder in filter(os.path.isdir, paths):
        names = sorted(image_names(folder), key=natural_key)
        if not names:
            raise InputError(f"{folder}: no images there")
        for members in split_sequences(names).values():
            sequences.append([os.path.join(folder, name) for _, name in members])
    if offset is None:
        return [[path] for sequence in sequences for path in sequence]
    inputs = []
    for sequence in sequences:
        for index, path in enumerate(sequence):
            if 0 <= index + offset < len(sequence):
                inputs.append([path, sequence[index + offset]])
    if not inputs:
        raise InputError(f"{', '.join(paths)}: flow needs two frames, a folder or files in order")
    return inputs


def read_inputs(inputs: list[list[str]], bad: set[str]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """First path and images of each input that can be read; the others are named, once.

    bad: collects the files that could not be read.
    """
    for paths in tqdm(inputs, disable=None):
        if not bad.isdisjoint(paths):
            continue
        images = []
        for path in paths:
            try:
                images.append(read_image(path))
            except InputError as error:
                tqdm.write(f"error: {error}", sys.stderr)
                bad.add(path)
                break
        if len({image.shape for image in images}) > 1:
            tqdm.write(f"error: {' and '.join(paths)}: flow needs frames of one size", sys.stderr)
            bad.add(" and ".join(paths))  # each may fit another
        elif len(images) == len(paths):
            yield paths[0], images


def find_depth_range(depths: Iterator[torch.Tensor]) -> list[float]:
    """Nearest and farthest depth of the colours: 2nd and 98th percentile over all images."""
    some = [depth.flatten()[::101] for depth in depths]  # enough pixels for a percentile
    return np.quantile(torch.cat(some), (0.02, 0.98)).tolist() if some else []


def save_depth(path: str, depth: np.ndarray, options: dict) -> None:
    """Depth (H, W) as a 16-bit PNG, whose text "Description" says what its values mean.

    Metres: 256 a metre, as in KITTI, up to 255.99. Depth without a unit: inverse depth, where
    65535 is the nearest depth (of our networks: their min_depth).
    """
    if options.get("metric"):
        values = 256 * depth
        meaning = "depth = value / 256 metres"
    else:
        nearest = depth.min() if "output" in options else options["min_depth"]
        values = 65535 * nearest / depth
        meaning = f"depth = {65535 * nearest:.6g} / value, without a unit"
    text = PngImagePlugin.PngInfo()
    text.add_text("Description", meaning)
    values = values.round().clip(1, 65535).astype(np.uint16)
    Image.fromarray(values).save(path, pnginfo=text)


def save_ids(path: str, label: np.ndarray, data: str) -> None:
    """Train ids (H, W) as a PNG of the data set's own ids, as its server takes them.

    Of classes that merge several ids (nyu13: NYU's 40), the first.
    """
    cls = datasets.LABELLED.get(data)
    if cls is None:
        raise InputError(f"the network was trained on {data}, whose ids are not known here")
    own = []
    for train_id in range(len(cls.classes)):
        own.append(np.flatnonzero(cls.table == train_id)[0])
    Image.fromarray(np.array(own, np.uint8)[label]).save(path)


def predict_command(args: argparse.Namespace) -> int:
    refuse_output(args.output, args.images)
    model, options = load(args.weights, utils.pick_device(args.device))
    task = options["task"]
    inputs = list_inputs(args.images, source_offset(options))
    bad = set()
    depth_range = args.depth_range
    if depth_range and depth_range[0] >= depth_range[1]:
        raise InputError("--depth_range: NEAR is not below FAR")
    if task == "depth" and not depth_range:
        depths = (predict(model, options, images) for _, images in read_inputs(inputs, bad))
        depth_range = find_depth_range(depths)
    os.makedirs(args.output, exist_ok=True)
    names = set()
    for path, images in read_inputs(inputs, bad):
        name = Path(path).stem
        while name in names:  # the same file name in another folder
            name += "_"
        names.add(name)
        target = os.path.join(args.output, f"{name}_{task}")
        prediction = predict(model, options, images)
        picture = draw(prediction, options, images[0], depth_range)
        pictures.to_picture(picture).save(f"{target}.png")
        array = prediction.numpy()
        if task == "depth":
            save_depth(f"{target}_16bit.png", array[0], options)
        if task == "segmentation":
            save_ids(f"{target}_ids.png", array[0], options["data"])
        if args.arrays:
            np.save(f"{target}.npy", array.squeeze())
    print(f"{len(names)} of {len(inputs)} images -> {args.output}")
    return 2 if bad else 0


def coloured_labels(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Labels in colour, (3, H, W), of four test images of --data, by the image's path."""
    dataset = datasets.find_labelled(args, "val")
    labels = {}
    for index in range(0, len(dataset), max(1, len(dataset) // 4))[:4]:
        label = dataset.native_label(index)[None]
        path = dataset.pairs[index][0]
        labels[path] = pictures.colour_labels(label, dataset.colours)[0]
    return labels


def load_models(args: argparse.Namespace) -> dict[str, tuple[torch.nn.Module, dict]]:
    """Networks and their options, by a column's title: the name of the run."""
    device = utils.pick_device(args.device)
    models = {}
    for weights in args.weights:
        title = Path(weights.removesuffix("model.pt")).name
        if title in models:
            title = weights
        models[title] = load(weights, device)
        is_flow = source_offset(models[title][1]) is not None
        if is_flow and (args.command == "gradcam" or not args.images):
            raise InputError(f"{weights}: flow needs two frames; grid FOLDER draws it")
    return models


def grid_command(args: argparse.Namespace) -> int:
    """One picture: images in rows, in columns what each network makes of them, or its Grad-CAM."""
    models = load_models(args)
    labels = {} if args.images else coloured_labels(args)
    refuse_output(args.output, args.images or list(labels))
    offsets = {source_offset(options) for _, options in models.values()} - {None}
    if len(offsets) > 1:
        raise InputError("the flow networks were trained on different --frame_ids: one grid for each")
    offset = next(iter(offsets), None)  # then only images with a source make rows
    inputs = list_inputs(args.images or list(labels), offset)
    bad = set()
    rows = {}
    for path, images in read_inputs(inputs, bad):
        image = images[0]
        row = {"image": image / 255}
        if labels:
            row["label"] = labels[path]
        for title, (model, options) in models.items():
            if args.command == "gradcam":
                row[title] = draw_gradcam(model, options, image, args.layer)
                title += ", segmentation"
            if args.command == "grid" or options["task"] == "segmentation":
                row[title] = draw(predict(model, options, images), options, image)
        rows[path] = row
    if rows:
        first = next(iter(rows.values()))
        size = first["image"].shape[1:]
        names = [Path(path).stem for path in rows]
        cells = []
        for row in rows.values():
            cells.append([F.interpolate(cell[None], size, mode="area")[0] for cell in row.values()])
        pictures.picture_grid(cells, list(first), names).save(args.output)
        print(f"{len(rows)} images, {len(models)} models -> {args.output}")
    return 2 if bad else 0


def main() -> int:
    args = parse_options()
    return args.run(args)


if __name__ == "__main__":
    utils.run_main(main)
