"""Encoders: ResNet, EfficientNet-Lite0 and ViT. Each gives a list of feature maps, finest first.

    features = ResnetEncoder("resnet18")(images)  # (B, 3, H, W) in [0, 1], sides multiples of 32

An encoder normalises its input, once and only there. The paper starts from Monodepth2 (Section 3.1),
so ResNet's parameters are named as in its published checkpoints; ViTs serve Tables 3 and 6.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESNETS = {  # channels of the five maps
    "resnet18": (64, 64, 128, 256, 512),
    "resnet50": (64, 256, 512, 1024, 2048),
}
LITE_CHANNELS = (16, 24, 40, 112, 320)
LITE_STAGES = (  # of EfficientNet-Lite0: expansion, kernel, stride, channels, blocks
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
VITS = {  # patch, blocks, heads, width
    "vit_s14": (14, 12, 6, 384),
    "vit_b14": (14, 12, 12, 768),
    "vit_l14": (14, 24, 16, 1024),
    "vit_s16": (16, 12, 6, 384),
    "vit_b16": (16, 12, 12, 768),
    "vit_l16": (16, 24, 16, 1024),
}
CNNS = (*RESNETS, "efficientnet_lite0")
ENCODERS = (*CNNS, *VITS)
POSITION_RULES = {  # how each source resizes its position embeddings to another size of image
    "timm": {"mode": "bicubic", "antialias": True},  # DINOv2 with registers as well
    "dinov2": {"mode": "bicubic"},  # by the factor (size + 0.1) / grid; Depth Anything as well
    "dino": {"mode": "bicubic"},  # likewise
    "bicubic": {"mode": "bicubic"},  # MAE, Hugging Face
    "torchvision": {"mode": "bicubic", "align_corners": True},
    "dpt": {"mode": "bilinear"},
}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """Base of the encoders. `channels` of its maps, `stride` of the last; images are in [0, 1]."""

    def __init__(self, name: str, channels: tuple, stride: int, mean: tuple, std: tuple):
        super().__init__()
        self.name = name
        self.channels = channels
        self.stride = stride
        mean = torch.tensor(mean).view(1, -1, 1, 1)
        std = torch.tensor(std).view(1, -1, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


# ------------------------------------------------------------------------------------ ResNet


class ResnetEncoder(Encoder):
    """torchvision's ResNet cut into five maps, at strides 2, 4, 8, 16, 32.

    images: (B, 3 * stacked, H, W), H and W multiples of 32. With an output stride of 8 or 16, which
    torchvision has for ResNet-50 alone, dilation keeps the last maps at that stride.
    """

    def __init__(self, name: str = "resnet18", stacked: int = 1, output_stride: int = 32):
        import torchvision  # here, as it takes a second

        # Monodepth2's constants, close to ImageNet's mean and deviation
        super().__init__(name, RESNETS[name], output_stride, (0.45,), (0.225,))
        build = getattr(torchvision.models, name)
        dilation = (False, output_stride < 16, output_stride < 32)
        self.encoder = build(replace_stride_with_dilation=dilation)
        del self.encoder.fc
        if stacked > 1:
            conv1 = nn.Conv2d(3 * stacked, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(conv1.weight, mode="fan_out", nonlinearity="relu")
            self.encoder.conv1 = conv1

    def forward(self, images: Tensor) -> list[Tensor]:
        net = self.encoder
        x = net.conv1(self.normalize(images))
        x = net.relu(net.bn1(x))
        features = [x]
        x = net.maxpool(x)
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            features.append(x)
        return features


# ------------------------------------------------------------------------------------ EfficientNet-Lite0


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """Convolution and batch norm, with TensorFlow's SAME padding: at stride 2, more at the far end."""
    total = kernel - stride  # of both ends, where sizes are even
    near = total // 2
    far = total - near
    pad = nn.Identity()
    if total > 0:
        pad = nn.ZeroPad2d((near, far, near, far))
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        kernel,
        stride,
        groups=groups,
        bias=False,
    )
    fan_out = kernel**2 * out_channels // groups
    nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    norm = nn.BatchNorm2d(out_channels, eps=1e-3)
    return nn.Sequential(OrderedDict(pad=pad, conv=conv, norm=norm))


class InvertedResidual(nn.Module):
    """EfficientNet-Lite's block: expand, filter each channel, project; no squeeze-and-excitation."""

    def __init__(self, width: int, out_width: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        inner = expansion * width
        self.expand = None
        if expansion > 1:
            self.expand = conv_norm(width, inner)
        self.depthwise = conv_norm(inner, inner, kernel, stride, groups=inner)
        self.project = conv_norm(inner, out_width)
        self.residual = stride == 1 and width == out_width

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs
        if self.expand is not None:
            x = F.relu6(self.expand(x))
        x = F.relu6(self.depthwise(x))
        x = self.project(x)
        return inputs + x if self.residual else x


class EfficientNetEncoder(Encoder):
    """EfficientNet-Lite0: images (B, 3, H, W), multiples of 32 -> five maps at strides 2, 4, 8, 16, 32."""

    def __init__(self, name: str = "efficientnet_lite0"):
        super().__init__(name, LITE_CHANNELS, 32, (127 / 255,), (128 / 255,))
        self.stem = conv_norm(3, 32, kernel=3, stride=2)
        self.blocks = nn.ModuleList()
        self.ends = []  # the last block at each stride
        width = 32
        for expansion, kernel, stride, out_width, count in LITE_STAGES:
            for i in range(count):
                step = stride if i == 0 else 1
                block = InvertedResidual(width, out_width, expansion, kernel, step)
                self.blocks.append(block)
                width = out_width
            if width in LITE_CHANNELS:
                self.ends.append(len(self.blocks) - 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(self.normalize(images))
        x = F.relu6(x)
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.ends:
                features.append(x)
        return features


# ------------------------------------------------------------------------------------ ViT


class VitEncoder(Encoder):
    """torchvision's vision transformer: maps of patch tokens after some of its blocks, the `layers`.

    images: (B, 3, H, W), H and W multiples of the patch. Returns (B, width, H / patch, W / patch) for
    each layer, after the last layer norm; or, with `readout`, (B, 2 * width, ...) before it, with the
    class token beside every patch.
    """

    def __init__(self, name: str, layers: list[int], readout: bool = False):
        import torchvision

        patch, blocks, heads, width = VITS[name]
        channels = 2 * width if readout else width
        channels = (channels,) * len(layers)
        super().__init__(name, channels, patch, IMAGENET_MEAN, IMAGENET_STD)
        self.layers = layers
        self.readout = readout
        build = torchvision.models.VisionTransformer
        self.encoder = build(224, patch, blocks, heads, width, 4 * width)
        del self.encoder.heads
        if readout:  # nothing reads after the last norm
            self.encoder.encoder.ln.requires_grad_(False)
        self.set_positions("timm", 0)

    def set_positions(self, rule: str, registers: int) -> None:
        """How to resize position embeddings (POSITION_RULES), and how many register tokens to add."""
        self.position_rule = rule
        self.registers = registers
        self.register_tokens = None
        if registers > 0:
            width = VITS[self.name][3]
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings (1, 1 + rows * columns, width), resized as their source does."""
        table = self.encoder.encoder.pos_embedding  # (1, 1 + grid * grid, width)
        grid = math.isqrt(table.shape[1] - 1)
        if rows == columns == grid:
            return table
        target = {"size": (rows, columns)}
        if self.position_rule in ("dino", "dinov2"):
            factors = (rows + 0.1) / grid, (columns + 0.1) / grid
            target = {"scale_factor": factors}
        rule = POSITION_RULES[self.position_rule]
        patches = table[:, 1:].transpose(1, 2)
        patches = patches.unflatten(2, (grid, grid))
        patches = F.interpolate(patches, **target, **rule)
        patches = patches.flatten(2).transpose(1, 2)
        return torch.cat([table[:, :1], patches], 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        net = self.encoder
        patches = net.conv_proj(self.normalize(images))  # (B, width, rows, columns)
        size = patches.shape[2:]
        patches = patches.flatten(2).transpose(1, 2)
        class_token = net.class_token.expand(len(images), -1, -1)
        x = torch.cat([class_token, patches], 1)
        x = x + self.positions(*size)
        if self.registers > 0:  # at the end: a transformer does not see the order
            registers = self.register_tokens.expand(len(images), -1, -1)
            x = torch.cat([x, registers], 1)
        features = []
        for i, block in enumerate(net.encoder.layers):
            x = block(x)
            if i in self.layers:
                features.append(self.to_map(x, size))
        return features

    def to_map(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens after a block as a map (B, channels, *size)."""
        if not self.readout:
            x = self.encoder.encoder.ln(x)
        patches = x[:, 1 : 1 + size[0] * size[1]]
        if self.readout:
            class_token = x[:, :1].expand_as(patches)
            patches = torch.cat([patches, class_token], 2)
        return patches.transpose(1, 2).unflatten(2, size)
