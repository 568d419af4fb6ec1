"""Models of other people with random weights, in the form in which their authors publish them.

What test_weights.py and its neighbours share. Each model is built by its own library (torchvision, timm,
transformers); rules for positions that no library has are written out in NumPy.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import smooth_images

import encoders
import networks
import weights

BLOCKS = 6
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean and deviation
IMAGENET = (encoders.IMAGENET_MEAN, encoders.IMAGENET_STD)
MONODEPTH2 = ((0.45,), (0.225,))


@pytest.fixture
def few_blocks(monkeypatch) -> None:
    """ViTs of six blocks instead of 12 or 24."""
    for name, (patch, _, heads, width) in list(encoders.VITS.items()):
        shape = (patch, BLOCKS, heads, width)
        monkeypatch.setitem(encoders.VITS, name, shape)


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Weights whose outputs neither vanish nor hide behind a normalisation, biases and LayerScale too."""
    generator = torch.Generator().manual_seed(0)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.dim() == 0:
            continue
        draw = torch.randn(value.shape, generator=generator)
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
    mean = torch.tensor(constants[0]).view(1, -1, 1, 1)
    std = torch.tensor(constants[1]).view(1, -1, 1, 1)
    return (images - mean) / std


def image_of(rows: int, columns: int, patch: int) -> torch.Tensor:
    """A smooth image (1, 3, H, W) of so many patches."""
    small = smooth_images(1, 4 * rows, 4 * columns)
    return F.interpolate(small, (patch * rows, patch * columns))


def save(folder: Path, content: dict) -> str:
    path = folder / "weights.pth"
    torch.save(content, path)
    return str(path)


def load(arch: str, encoder: str, path: str, channels: int = 3, **settings) -> tuple:
    """A segmenter with the weights of a file, in eval mode, and what was taken."""
    model = networks.build(arch, encoder, channels, **settings)
    message = weights.load_weights(model, path, "segmentation")
    return model.eval(), message


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def under(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


# ------------------------------------------------------------------------------------ positions


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic kernel."""
    x = np.abs(x)
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    outer = np.where(x < 2, outer, 0)
    return np.where(x <= 1, inner, outer)


def antialiased(size: int, grid: int) -> np.ndarray:
    """Weights (size, grid) of Pillow's bicubic: a kernel as wide as the step, cut at the border."""
    step = grid / size
    centres = (np.arange(size) + 0.5) * step
    distances = np.arange(grid) + 0.5 - centres[:, None]
    kernel = cubic(distances / max(step, 1), -0.5)
    return kernel / kernel.sum(1, keepdims=True)


def interpolated(points: np.ndarray, grid: int, kernel, reach: int) -> np.ndarray:
    """Weights (points, grid) of a kernel at points of a grid whose border repeats."""
    table = np.zeros((len(points), grid))
    for row, point in enumerate(points):
        first = int(np.floor(point)) + 1 - reach
        for cell in range(first, first + 2 * reach):
            inside = np.clip(cell, 0, grid - 1)
            table[row, inside] += kernel(point - cell)
    return table


def axis_weights(rule: str, size: int, grid: int) -> np.ndarray:
    """Each source's rule along one axis: weights (size, grid)."""
    if rule == "timm":
        return antialiased(size, grid)
    numbers = np.arange(size)
    if rule in ("dino", "dinov2"):  # a scale factor of (size + 0.1) / grid
        points = (numbers + 0.5) * grid / (size + 0.1) - 0.5
    elif rule == "torchvision":
        points = numbers * (grid - 1) / (size - 1)
    else:
        points = (numbers + 0.5) * grid / size - 0.5
    if rule == "dpt":
        points = np.clip(points, 0, grid - 1)
        return interpolated(points, grid, lambda x: max(0, 1 - abs(x)), 1)
    return interpolated(points, grid, lambda x: cubic(x, -0.75), 2)


def resized(table: torch.Tensor, rule: str, rows: int, columns: int) -> torch.Tensor:
    """A table of positions (1, 1 + grid * grid, width) for rows x columns patches."""
    grid = round((table.shape[1] - 1) ** 0.5)
    patches = table[0, 1:].unflatten(0, (grid, grid))
    patches = patches.double().numpy()
    patches = np.einsum("ri,ijw->rjw", axis_weights(rule, rows, grid), patches)
    patches = np.einsum("cj,rjw->rcw", axis_weights(rule, columns, grid), patches)
    patches = torch.from_numpy(patches).float()
    patches = patches.flatten(0, 1)[None]
    return torch.cat([table[:, :1], patches], 1)


# ------------------------------------------------------------------------------------ timm


def timm_vit(name: str, patch: int, size: tuple = (8, 8), **options) -> torch.nn.Module:
    """A ViT of timm for images of rows x columns patches."""
    timm = pytest.importorskip("timm")
    pixels = (patch * size[0], patch * size[1])
    model = timm.create_model(
        name,
        depth=BLOCKS,
        img_size=pixels,
        dynamic_img_size=True,
        **options,
    )
    return randomise(model)


def patch_tokens(source: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """timm's patch tokens after the last norm, (B, width, patches)."""
    tokens = source.forward_features(images)
    patches = tokens[:, source.num_prefix_tokens :]
    return patches.transpose(1, 2)


# ------------------------------------------------------------------------------------ Hugging Face

SHAPE14 = {
    "hidden_size": 384,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 6,
    "patch_size": 14,
    "image_size": 8 * 14,
}
SHAPE16 = {**SHAPE14, "patch_size": 16, "image_size": 8 * 16, "intermediate_size": 4 * 384}
TASKS = ("Model", "ForPreTraining", "ForImageClassification", "ForDepthEstimation")


def hugging_face(kind: str, **options) -> torch.nn.Module:
    """A model of transformers, whose configuration has the same name."""
    transformers = pytest.importorskip("transformers")
    stem = kind
    for task in TASKS:
        stem = stem.removesuffix(task)
    config = getattr(transformers, f"{stem}Config")(**options)
    model = getattr(transformers, kind)(config)
    return randomise(model)


def hugging_face_tokens(source: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Patch tokens after the last norm, (B, width, patches)."""
    kind = type(source).__name__
    body = source.base_model
    options = {}
    if "ViT" in kind:
        options["interpolate_pos_encoding"] = True
    pixels = images.shape[2] * images.shape[3]
    count = pixels // source.config.patch_size**2
    if "MAE" in kind:
        body.config.mask_ratio = 0.0  # no patch is masked, and they keep their order
        options["noise"] = torch.arange(count)[None] / count
    tokens = body(images, **options).last_hidden_state
    return tokens[:, -count:].transpose(1, 2)


def hugging_face_depth(kind: str) -> torch.nn.Module:
    """"DPT" or "Depth Anything", small, reading blocks 0, 2, 3 and 5 as ours of six blocks does."""
    transformers = pytest.importorskip("transformers")
    neck = {"neck_hidden_sizes": [48, 96, 192, 384], "fusion_hidden_size": 64}
    if kind == "DPT":
        return hugging_face(
            "DPTForDepthEstimation",
            **SHAPE16,
            **neck,
            is_hybrid=False,
            backbone_out_indices=[0, 2, 3, 5],
            readout_type="project",
        )
    backbone = transformers.Dinov2Config(
        **SHAPE14,
        out_features=["stage1", "stage3", "stage4", "stage6"],
        reshape_hidden_states=False,
    )
    return hugging_face(
        "DepthAnythingForDepthEstimation",
        **neck,
        backbone_config=backbone,
        reassemble_hidden_size=384,
        head_hidden_size=32,
    )


def predicted_depth(source: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Inverse depth (B, H, W). transformers' own forward of DPT takes square images only, its parts any."""
    if "DepthAnything" in type(source).__name__:
        return source(images).predicted_depth
    outputs = source.dpt(images, output_hidden_states=True)
    hidden = [outputs.hidden_states[1 + i] for i in source.config.backbone_out_indices]
    rows = images.shape[2] // 16
    columns = images.shape[3] // 16
    return source.head(source.neck(hidden, rows, columns))


# ------------------------------------------------------------------------------------ authors' names

WHOLE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
LAYERS = {
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
}
FUSION = {
    "projection": "out_conv",
    "residual_layer1": "resConfUnit1",
    "residual_layer2": "resConfUnit2",
}
REASSEMBLE_DPT = {"projection": 3, "resize": 4}
REASSEMBLE = {"projection": "projects", "resize": "resize_layers"}
HEAD = {"conv1": "output_conv1", "conv2": "output_conv2.0", "conv3": "output_conv2.2"}


def in_authors_names(tensors: dict) -> dict:
    """Hugging Face's DPT and Depth Anything under the names of their authors' files."""
    dpt = "dpt.embeddings.cls_token" in tensors
    renamed = {}
    for key, value in tensors.items():
        if key.startswith(("dpt.", "backbone.")):
            renamed |= encoder_in_authors_names(key, tensors)
            continue
        new = decoder_in_authors_names(key, dpt)
        renamed[new if dpt else f"depth_head.{new}"] = value
    return renamed


def decoder_in_authors_names(key: str, dpt: bool) -> str:
    words = key.split(".")
    if key.startswith("neck.fusion_stage"):
        block = f"scratch.refinenet{4 - int(words[3])}"
        rest = ".".join(words[5:]).replace("convolution", "conv")
        return f"{block}.{FUSION[words[4]]}.{rest}"
    if key.startswith("neck.convs"):
        return f"scratch.layer{int(words[2]) + 1}_rn.weight"
    if key.startswith("neck.reassemble_stage"):
        number = int(words[3])
        kind = words[-1]
        if "readout" in key:
            return f"pretrained.act_postprocess{number + 1}.0.project.0.{kind}"
        if dpt:
            return f"pretrained.act_postprocess{number + 1}.{REASSEMBLE_DPT[words[4]]}.{kind}"
        return f"{REASSEMBLE[words[4]]}.{number}.{kind}"
    if dpt:
        return key.replace("head.head.", "scratch.output_conv.")
    return f"scratch.{HEAD[words[1]]}.{words[2]}"


def encoder_in_authors_names(key: str, tensors: dict) -> dict:
    """One tensor under timm's name; query, key and value become one."""
    prefix = "pretrained.model." if key.startswith("dpt.") else "pretrained."
    inner = key.partition(".")[2]
    if inner in WHOLE:
        return {prefix + WHOLE[inner]: tensors[key]}
    _, _, number, *layer, kind = inner.split(".")
    layer = ".".join(layer)
    block = f"{prefix}blocks.{number}"
    if layer in ("attention.attention.key", "attention.attention.value"):
        return {}
    if layer == "attention.attention.query":
        names = [key.replace("query", name) for name in ("query", "key", "value")]
        joined = torch.cat([tensors[name] for name in names])
        return {f"{block}.attn.qkv.{kind}": joined}
    kind = kind.replace("lambda1", "gamma")
    return {f"{block}.{LAYERS.get(layer, layer)}.{kind}": tensors[key]}
