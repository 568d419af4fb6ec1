"""Weights to start from or to use: our model.pt, Monodepth2's folders, other people's checkpoints.

    print(load_weights(model, "runs/depth", "segmentation"))  # encoder 120/120, decoder 20/22: head replaced
    model, options = load_model("runs/depth/model.pt")

Everything is loaded strictly: only the head, which each task replaces (Section 3.2), may differ.
formats.py says what other people's files hold.
"""

import math
import os

import torch
from torch import Tensor, nn

from encoders import POSITION_RULES, VITS
from formats import POSITIONS, PROFILED, imagenet_checkpoint, read_file, recognise
from networks import ARCHITECTURES, ATROUS_RATES, SETTINGS, Network, PoseNet, build, is_head, scale_translation
from utils import InputError

MONODEPTH2_FILES = {
    "encoder": "encoder.pth",
    "decoder": "depth.pth",
    "pose_encoder": "pose_encoder.pth",
    "pose": "pose.pth",
}
MONODEPTH2_RANGE = 0.1, 100.0  # of depth, in Monodepth2's unit
MONODEPTH2_UNIT = 5.4  # metres, where it was trained with stereo: it sets KITTI's baseline to 0.1
OPTION_TYPES = {  # what model.pt may say, and as what
    str: ("task", "supervision", "data", "arch", "encoder", "dpt_layers", "positions", "output"),
    int: ("height", "width", "samples", "steps", "output_stride", "registers"),
    float: ("min_depth", "max_depth"),
    list: ("classes", "colours"),
    bool: ("metric", "normalize_twice"),
}


# ------------------------------------------------------------------------------------ reading


def read_checkpoint(path: str) -> tuple[str, dict, dict]:
    """A checkpoint by its content: (format, parts, options).

    path: our model.pt, a run folder, a folder of Monodepth2 or Hugging Face, or a file of formats.py.
    parts: state dicts of "encoder", "decoder", "pose_encoder", "pose", "intrinsics".
    """
    if not path:
        raise InputError("the path of the weights is empty")
    if os.path.isdir(path):
        for name in ("model.pt", "model.safetensors", "pytorch_model.bin"):
            if os.path.isfile(os.path.join(path, name)):
                return read_checkpoint(os.path.join(path, name))
        source, parts, options = read_monodepth2(path)
    else:
        content = read_file(path)
        if "optimizer" in content and "log_size" in content:
            raise InputError(f"{path} is what a run continues from: take model.pt, beside it")
        if "options" in content and "encoder" in content:
            source, parts = "depth2seg", content
            options = parts.pop("options")
            check_types(path, options)
        else:
            source, parts, options = recognise(path, content)
    for name, part in parts.items():
        if not isinstance(part, dict) or not all(is_plain(*item) for item in part.items()):
            raise InputError(f"{path}: its {name} is not a dict of tensors")
    return source, parts, options


def is_plain(key: object, value: object) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return isinstance(key, str) and dense and value.device.type == "cpu"


def read_monodepth2(folder: str) -> tuple[str, dict, dict]:
    """A folder as Monodepth2 publishes and saves them."""
    parts = {}
    for part, name in MONODEPTH2_FILES.items():
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            parts[part] = read_file(path)
    if "encoder" not in parts:
        raise InputError(f"{folder} holds neither model.pt nor encoder.pth")
    if ("pose" in parts) != ("pose_encoder" in parts):
        raise InputError(f"{folder}: pose_encoder.pth and pose.pth belong together, one is missing")
    encoder = parts["encoder"]
    min_depth, max_depth = MONODEPTH2_RANGE
    options = {
        "task": "depth",
        "supervision": "Monodepth2",
        "arch": "unet",
        "encoder": "resnet50" if "encoder.layer1.0.conv3.weight" in encoder else "resnet18",
        "min_depth": min_depth,
        "max_depth": max_depth,
        "height": 192,
        "width": 640,
    }
    for key in ("height", "width", "use_stereo", "min_depth", "max_depth", "metric"):
        if key in encoder:
            options[key] = encoder.pop(key)
    check_types(folder, options)
    return "Monodepth2 folder", parts, options


def check_types(path: str, options: dict) -> None:
    if not isinstance(options, dict):
        raise InputError(f"{path}: its options are not a dict")
    for kind, keys in OPTION_TYPES.items():
        for key in keys:
            if key in options and not isinstance(options[key], kind):
                raise InputError(f"{path}: its option {key} is not of type {kind.__name__}")


def name_pretraining(init: str) -> str:
    """What tables call a start: "Depth (stereo) on kitti (39810 samples, 640x192, 66350 steps)"."""
    if init in ("none", "imagenet"):
        return {"none": "None", "imagenet": "ImageNet"}[init]
    source, _, options = read_checkpoint(init)
    if "task" not in options:
        return source
    name = options["task"].capitalize()
    if options["task"] == "depth":  # the paper's Depth-Rand started from random weights
        random = "-Rand" if options.get("init") == "none" else ""
        name += f"{random} ({options['supervision']})"
    if "data" in options:
        name += f" on {options['data']}"
    if "samples" in options:
        name += " ({samples} samples, {width}x{height}, {steps} steps)".format(**options)
    return name


# ------------------------------------------------------------------------------------ loading


def fit(module: nn.Module, state: dict, name: str, path: str, heads: str = "that fit") -> str:
    """Load one part strictly; of its heads "none", those "that fit", or "all".

    Returns what was taken, as in "decoder 20/22: head replaced".
    """
    if POSITIONS in state and POSITIONS in module.state_dict():  # a table of any square grid will do
        resize_positions(module, state[POSITIONS])
    own = module.state_dict()
    taken = {}
    problems = []
    for key, value in state.items():
        head = is_head(module, key)
        left = key.startswith("encoder.fc.") or key.endswith(PROFILED)
        if left or (head and heads == "none"):
            continue
        if key in own and value.shape == own[key].shape:
            taken[key] = value
        elif not head or heads == "all":
            here = tuple(own[key].shape) if key in own else "absent"
            problems.append(f"{key} is {here} here, {tuple(value.shape)} there")
    for key in own.keys() - state.keys():
        counter = key.endswith("num_batches_tracked")  # older files have none; it starts at 0 then
        demanded = heads == "all" or not is_head(module, key)
        if demanded and not counter:
            problems.append(f"{key} is {tuple(own[key].shape)} here, absent there")
    if problems:
        count = f"{len(taken)}/{len(own)} tensors"
        raise InputError(f"{path} does not fit {name} ({count}): {'; '.join(sorted(problems)[:3])}")
    for key, value in taken.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise InputError(f"{path}: values of {name} are not finite: {key}")
    module.load_state_dict({**own, **taken})
    replaced = any(is_head(module, key) for key in own.keys() - taken.keys())
    return f"{name} {len(taken)}/{len(own)}" + (": head replaced" if replaced else "")


def resize_positions(encoder: nn.Module, table: Tensor) -> None:
    """Make room for another table of position embeddings (1, 1 + grid * grid, width)."""
    own = encoder.get_parameter(POSITIONS)
    cells = math.isqrt(max(0, table.shape[1] - 1)) ** 2 if table.dim() == 3 else 0
    own.data = own.new_empty(1, cells + 1, own.shape[2])


def adopt_positions(model: Network, options: dict) -> None:
    """A ViT resizes its positions as the source of its weights does, and has its register tokens."""
    if model.encoder.name in VITS:
        chosen = {key: options.get(key, SETTINGS[key]) for key in ("positions", "registers")}
        model.encoder.set_positions(chosen["positions"], chosen["registers"])
        model.settings.update(chosen)


def load_weights(model: Network, path: str, task: str, parts: str = "all",
                 pose: PoseNet | None = None, min_depth: float | None = None) -> str:
    """Load a checkpoint ("none", "imagenet" or a path) into a model and say what was taken.

    task: of the model; the head of another task's checkpoint is not taken. parts: "encoder" leaves
    the rest as it is; "all" demands both, unless the format has only an encoder. pose: loaded with "all"
    where the checkpoint has one; its translations keep their ratio to depth, whose unit min_depth tells.
    Raises InputError naming the first mismatches.
    """
    if path == "none":
        return "random weights"
    if path == "imagenet":
        source, state, options = imagenet_checkpoint(model.encoder.name)
    else:
        source, state, options = read_checkpoint(path)
    if options.get("normalize_twice"):  # fine-tuning from other runs may do so, as the release does
        demand_same("normalize_twice", model, options, path)
    adopt_positions(model, options)
    taken = [fit(model.encoder, state["encoder"], "encoder", path)]
    if parts == "all" and "decoder" in state:
        taken.append(fit_decoder(model, state["decoder"], options, path, task))
        if source == "Depth Anything" and model.settings["dpt_layers"] == "spread":
            taken.append("taken for version 2 (version 1: train_seg.py --dpt_layers last)")
    elif parts == "all" and source in ("depth2seg", "Monodepth2 folder"):
        raise InputError(f"{path} has no decoder: pass --init_parts encoder")
    else:
        taken.append("decoder fresh")
    if pose is not None and path == "imagenet":
        taken.append(load_imagenet_pose(model, pose))
    elif pose is not None and parts == "all" and "pose" in state:
        taken.append(fit(pose.encoder, state["pose_encoder"], "pose_encoder", path))
        taken.append(fit(pose.decoder, state["pose"], "pose", path))
        if min_depth:
            factor = min_depth / options.get("min_depth", min_depth)
            scaled = scale_translation(pose.decoder.state_dict(), factor)
            pose.decoder.load_state_dict(scaled)
    if os.path.isfile(f"{path}/args.json") and not os.path.isfile(f"{path}/result.json"):
        taken.append(f"of an unfinished run, step {options.get('steps')}")
    return f"{source}: " + ", ".join(taken)


def fit_decoder(model: Network, state: dict, options: dict, path: str, task: str) -> str:
    demand_same("dpt_layers", model, options, path)
    heads = "that fit" if options.get("task") == task else "none"
    try:
        taken = fit(model.decoder, state, "decoder", path, heads)
    except InputError as error:
        hint = "--init_parts encoder takes the encoder alone"
        raise InputError(f"{error} ({hint})") from None
    demand_same("output_stride", model, options, path)  # the same weights fit, and mean something else
    return taken


def demand_same(key: str, model: Network, options: dict, path: str) -> None:
    own = model.settings[key]
    trained = options.get(key, own)
    if trained != own:
        raise InputError(f"{path} was trained with {key} {trained}, this network has {own}: "
                         f"say so with --{key}, where the script has it")


def load_imagenet_pose(model: Network, pose: PoseNet) -> str:
    """The pose network starts from ImageNet, too, both frames with the same filters."""
    if model.encoder.name == "efficientnet_lite0":  # its users may lack torchvision's
        return "pose fresh"
    state = imagenet_checkpoint(pose.encoder.name)[1]["encoder"]
    filters = state["encoder.conv1.weight"]
    state["encoder.conv1.weight"] = torch.cat([filters, filters], 1) / 2
    return fit(pose.encoder, state, "pose_encoder", "imagenet")


def load_model(path: str, device="cpu", task: str | None = None) -> tuple[Network, dict]:
    """A whole trained model, in eval mode, and its options: model.pt, Monodepth2, DPT or Depth Anything.

    options["output"] is "inverse depth" for the last two, whose relu is 1 / depth up to scale and shift.
    Raises InputError where the file holds less, or was trained for another task.
    """
    source, parts, options = read_checkpoint(path)
    if source in ("DPT", "Depth Anything"):
        options = {**describe_depth_model(source, parts), **options}
        if options["metric"]:
            raise InputError(f"{path}: a metric model gives metres, not inverse depth: use a relative one")
    if "task" not in options or "decoder" not in parts:
        raise InputError(f"{path} ({source}) is for --init: it holds no whole network trained here")
    if task not in (None, options["task"]):
        raise InputError(f"{path} was trained for {options['task']}, not for {task}")
    check_model_options(path, options)
    arch = "flow" if options["task"] == "flow" else options["arch"]
    decoder = parts["decoder"]
    heads = ARCHITECTURES.get(arch, ((), ()))[0]
    weights = sorted(key for key in decoder if key.startswith(heads) and key.endswith("weight"))
    if not weights:
        raise InputError(f"{path} ({source}) holds no whole decoder '{arch}': its encoder is for --init")
    channels = len(decoder[weights[0]])
    classes = len(options.get("classes", range(channels)))
    if channels != classes:
        raise InputError(f"{path}: its decoder has {channels} outputs, for {classes} classes")
    settings = {key: options[key] for key in SETTINGS if key in options}
    settings["readout"] = any(key.startswith("readout.") for key in decoder)
    scales = tuple(range(len(weights)))
    model = build(arch, options["encoder"], channels, scales, **settings)
    for name, part in model.parts().items():
        fit(part, parts[name], name, path, heads="all")
    return model.to(device, memory_format=torch.channels_last).eval(), options


def describe_depth_model(source: str, parts: dict) -> dict:
    """Options of DPT-Large or a Depth Anything, as model.pt would hold them."""
    width, _, patch, _ = parts["encoder"]["encoder.conv_proj.weight"].shape
    names = [name for name, shape in VITS.items() if (shape[0], shape[3]) == (patch, width)]
    side = 384 if source == "DPT" else 518
    return {
        "task": "depth",
        "supervision": source,
        "output": "inverse depth",
        "metric": False,
        "arch": "dpt",
        "encoder": names[0] if names else f"ViT of width {width}",
        "dpt_layers": "spread",
        "height": side,
        "width": side,
        "min_depth": 0.1,
        "max_depth": 100.0,
    }


def check_model_options(path: str, options: dict) -> None:
    """Refuse options with which no network can be built and used."""
    needed = {"arch", "encoder", "height", "width"}
    if options["task"] == "depth":
        needed |= {"min_depth", "max_depth"}
    if options["task"] == "segmentation":
        needed |= {"classes", "colours"}
    lacking = needed - options.keys()
    if lacking:
        raise InputError(f"{path}: its options lack {', '.join(sorted(lacking))}")
    sides = (options["height"], options["width"])
    near = options.get("min_depth", 1)
    far = options.get("max_depth", 2)
    if min(sides) < 64 or max(sides) > 8192 or not 0 < near < far < math.inf:
        raise InputError(f"{path}: its options hold no sensible size or range of depth")
    if options.get("positions", "timm") not in POSITION_RULES:
        raise InputError(f"{path}: unknown rule for positions '{options['positions']}'")
    if options.get("output_stride", 8) not in ATROUS_RATES or not 0 <= options.get("registers", 0) <= 64:
        raise InputError(f"{path}: its options hold no sensible output stride or count of registers")
    colours = options.get("colours", [])
    if len(colours) != len(options.get("classes", [])) or not all(is_colour(c) for c in colours):
        raise InputError(f"{path}: its options hold no red, green and blue of each class")


def is_colour(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(part in range(256) for part in value)
