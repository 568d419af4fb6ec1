"""Networks: ResNets and ViTs with U-Net, DeepLabV3, DPT or linear decoders; pose and flow; weights from elsewhere.

Parameter names follow Monodepth2's published checkpoints, so that its folders load as they are:
`encoder.pth` -> `model.encoder`, `depth.pth` -> `model.decoder`, `pose_encoder.pth` -> `PoseNet.encoder`,
`pose.pth` -> `PoseNet.decoder`.

    model = networks.build("unet", "resnet18", channels=19)       # a segmenter: logits at the finest scale
    print(networks.load_weights(model, "runs/depth/model.pt", "segmentation"))
    # depth2seg: encoder 120/120, decoder 20/22: head replaced
"""

import argparse
import ctypes
import math
import os
import re
import shutil
import sys
import zipfile
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from utils import InputError, Run, within, write_atomically

RESNETS = {"resnet18": (64, 64, 128, 256, 512), "resnet50": (64, 256, 512, 1024, 2048)}  # channels of the five features
VITS = {f"vit_{size}{patch}": (patch, *shape) for patch in (14, 16)  # patch, blocks, heads, width
        for size, shape in {"s": (12, 6, 384), "b": (12, 12, 768), "l": (24, 16, 1024)}.items()}
ENCODERS = (*RESNETS, *VITS)
IMAGENET_MEAN, IMAGENET_STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
HEADS = {  # by architecture, the names of the last layers, which each task replaces
    "unet": ("decoder.10.", "decoder.11.", "decoder.12.", "decoder.13."), "deeplabv3": ("4.",), "dpt": ("head.",),
    "linear": ("1.",)}
HEADS["flow"] = HEADS["unet"]
DECODER_CHANNELS = (16, 32, 64, 128, 256)  # of the decoder's five levels, finest first
DPT_CHANNELS = {  # by the ViT's width: of its four maps, and where they are fused
    384: ((48, 96, 192, 384), 64), 768: ((96, 192, 384, 768), 128), 1024: ((256, 512, 1024, 1024), 256)}
DPT_LAYERS_HELP = "blocks that DPT sees: spread over the depth, or the last four (Depth Anything v1)"
OPTIONS = {  # what model.pt may say, and as what
    **dict.fromkeys(("task", "supervision", "depth_loss", "data", "arch", "encoder", "dpt_layers"), str),
    **dict.fromkeys(("height", "width", "samples", "steps"), int), **dict.fromkeys(("min_depth", "max_depth"), float),
    **dict.fromkeys(("classes", "colours"), list), **dict.fromkeys(("metric", "normalize_twice"), bool)}
POSITIONS = "encoder.encoder.pos_embedding"  # of a VitEncoder; of any grid
FLOW_RANGE = 0.4  # flow = 0.4 * (sigmoid - 0.5) of the image size: at most a fifth of it in each direction


class ResnetEncoder(nn.Module):
    """torchvision's ResNet cut into five feature maps.

    images: (B, 3 * stacked, H, W) in [0, 1], H and W multiples of 32. Normalised here and nowhere else.
    Returns five tensors at strides 2, 4, 8, 16, 32; dilated (which torchvision has for ResNet-50 alone) 2, 4, 8, 8, 8.
    """

    def __init__(self, name: str = "resnet18", stacked: int = 1, dilated: bool = False):
        super().__init__()
        self.name, self.channels, self.stride = name, RESNETS[name], 8 if dilated else 32
        dilation = {"replace_stride_with_dilation": (False, True, True)} if dilated else {}
        self.encoder = getattr(torchvision.models, name)(weights=None, **dilation)
        del self.encoder.fc
        # Monodepth2's constants, close to ImageNet's mean and deviation
        self.register_buffer("mean", torch.full((1, 1, 1, 1), 0.45), persistent=False)
        self.register_buffer("std", torch.full((1, 1, 1, 1), 0.225), persistent=False)
        if stacked > 1:
            self.encoder.conv1 = nn.Conv2d(3 * stacked, 64, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.encoder.conv1.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        net = self.encoder
        features = [net.relu(net.bn1(net.conv1((images - self.mean) / self.std)))]
        features.append(net.layer1(net.maxpool(features[-1])))
        for layer in (net.layer2, net.layer3, net.layer4):
            features.append(layer(features[-1]))
        return features


class VitEncoder(nn.Module):
    """torchvision's vision transformer without its classifier: maps of patch tokens after some of its blocks.

    images: (B, 3, H, W) in [0, 1], H and W multiples of the patch. Normalised here and nowhere else.
    layers: blocks to return, from 0. Returns for each (B, width, H / patch, W / patch), after the last layer norm; or,
    with `readout`, (B, 2 * width, ...) before it, with the class token beside every patch.
    """

    def __init__(self, name: str, layers: tuple[int, ...], readout: bool = False):
        super().__init__()
        self.name, self.layers, self.readout = name, layers, readout
        self.stride, blocks, heads, width = VITS[name]
        self.channels = (width * (1 + readout),) * len(layers)
        self.encoder = torchvision.models.VisionTransformer(224, self.stride, blocks, heads, width, 4 * width)
        del self.encoder.heads
        self.encoder.encoder.ln.requires_grad_(not readout)  # DPT reads before it; other heads, after
        self.register_buffer("mean", IMAGENET_MEAN, persistent=False)
        self.register_buffer("std", IMAGENET_STD, persistent=False)

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """Position embeddings (1, 1 + rows * columns, width), interpolated from the grid they were trained on."""
        table = self.encoder.encoder.pos_embedding
        grid = math.isqrt(table.shape[1] - 1)
        if (rows, columns) == (grid, grid):
            return table
        patches = table[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
        patches = F.interpolate(patches, (rows, columns), mode="bicubic", align_corners=False, antialias=True)
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], 1)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        net = self.encoder
        patches = net.conv_proj((images - self.mean) / self.std)  # (B, width, H / patch, W / patch)
        size = patches.shape[2:]
        x = torch.cat([net.class_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
        x, features = x + self.positions(*size), []
        for i, block in enumerate(net.encoder.layers):
            x = block(x)
            if i in self.layers:
                tokens = x if self.readout else net.encoder.ln(x)
                tokens, readout = tokens[:, 1:], tokens[:, :1]
                if self.readout:
                    tokens = torch.cat([tokens, readout.expand_as(tokens)], 2)
                features.append(tokens.transpose(1, 2).unflatten(2, size))
        return features


def conv3x3(in_channels: int, out_channels: int) -> nn.Sequential:
    """3x3 convolution with reflection padding, under Monodepth2's parameter names."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode="reflect")))


class Elu(torch.autograd.Function):
    """`F.elu` in place and through exp; PyTorch's goes through expm1, which takes most of its time on a CPU.

    For float32, where near zero it differs by less than 1e-7.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        torch.maximum(x, x.clamp(max=0).exp_().sub_(1), out=x)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.elu_backward(gradient, 1, 1, 1, True, ctx.saved_tensors[0])


class ConvBlock(nn.Module):
    """Conv3x3 and ELU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = conv3x3(in_channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        from_exp = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
        return Elu.apply(x) if from_exp else F.elu(x, inplace=True)


class DepthDecoder(nn.Module):
    """U-Net decoder of Monodepth2 with a head of any channel count at each of `scales`.

    features: the encoder's five maps. Returns the heads' raw outputs, finest first: (B, channels, H / 2^s, W / 2^s).
    Module order, and with it the parameter names: upconv 4.0, 4.1, 3.0, ... 0.1, then one head a scale.
    """

    def __init__(self, encoder_channels: tuple[int, ...], channels: int = 1, scales: tuple[int, ...] = (0, 1, 2, 3)):
        super().__init__()
        self.scales = tuple(scales)
        blocks = []
        for level in range(4, -1, -1):
            below = encoder_channels[4] if level == 4 else DECODER_CHANNELS[level + 1]
            skip = encoder_channels[level - 1] if level > 0 else 0
            blocks += [ConvBlock(below, DECODER_CHANNELS[level]),
                       ConvBlock(DECODER_CHANNELS[level] + skip, DECODER_CHANNELS[level])]
        heads = [conv3x3(DECODER_CHANNELS[scale], channels) for scale in self.scales]
        self.decoder = nn.ModuleList(blocks + heads)

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        outputs = {}
        x = features[-1]
        for level in range(4, -1, -1):
            before, after = self.decoder[2 * (4 - level)], self.decoder[2 * (4 - level) + 1]
            x = F.interpolate(before(x), scale_factor=2, mode="nearest")
            x = after(torch.cat([x, features[level - 1]], 1) if level > 0 else x)
            if level in self.scales:
                outputs[level] = self.decoder[10 + self.scales.index(level)](x)
        return [outputs[scale] for scale in self.scales]


class LastMapDecoder(nn.Sequential):
    """Layers on the encoder's last map alone (DeepLabV3's head, a linear probe), upsampled to the image's size.

    features: the encoder's maps; stride: of the last one. Returns [(B, channels, H, W)].
    """

    def __init__(self, stride: int, *layers: nn.Module):
        super().__init__(*layers)
        self.stride = stride

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        small = super().forward(features[-1])
        return [F.interpolate(small, scale_factor=self.stride, mode="bilinear", align_corners=False)]


class ResidualUnit(nn.Module):
    """x plus two 3x3 convolutions of it, each after a ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class DptDecoder(nn.Module):
    """DPT's decoder: four maps of a ViT at 4, 2, 1 and 1/2 times their size, fused from the coarsest to the finest.

    With a readout, for maps with the class token beside each patch, it is DPT-Large's; without, Depth Anything's.
    features: four maps (B, C, h, w) of a VitEncoder with patches of `stride` pixels. Returns [(B, channels, H, W)].
    """

    def __init__(self, width: int, stride: int, channels: int, readout: bool):
        super().__init__()
        sizes, inner = DPT_CHANNELS[width]
        self.stride = stride
        self.readout = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for _ in sizes if readout)
        self.project = nn.ModuleList(nn.Conv2d(width, size, 1) for size in sizes)
        self.resize = nn.ModuleList([
            nn.ConvTranspose2d(sizes[0], sizes[0], 4, stride=4), nn.ConvTranspose2d(sizes[1], sizes[1], 2, stride=2),
            nn.Identity(), nn.Conv2d(sizes[3], sizes[3], 3, stride=2, padding=1)])
        self.reduce = nn.ModuleList(nn.Conv2d(size, inner, 3, padding=1, bias=False) for size in sizes)
        self.skip = nn.ModuleList(ResidualUnit(inner) for _ in sizes[1:])  # the coarsest map has nothing to join
        self.fuse = nn.ModuleList(ResidualUnit(inner) for _ in sizes)
        self.mix = nn.ModuleList(nn.Conv2d(inner, inner, 1) for _ in sizes)
        self.conv1 = nn.Conv2d(inner, inner // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(inner // 2, 32, 3, padding=1)
        self.head = nn.Conv2d(32, channels, 1)

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        h, w = features[0].shape[2:]
        maps = []
        for i, x in enumerate(features):
            if self.readout:
                x = F.gelu(self.readout[i](x))
            maps.append(self.reduce[i](self.resize[i](self.project[i](x))))
        for i in (3, 2, 1, 0):
            x = maps[3] if i == 3 else x + self.skip[i](maps[i])
            size = maps[i - 1].shape[2:] if i > 0 else (8 * h, 8 * w)
            x = F.interpolate(self.fuse[i](x), size, mode="bilinear", align_corners=True)
            x = self.mix[i](x)
        x = F.interpolate(self.conv1(x), (self.stride * h, self.stride * w), mode="bilinear", align_corners=True)
        return [self.head(F.relu(self.conv2(x)))]


class Network(nn.Module):
    """Encoder and decoder; the raw outputs are disparity (before the sigmoid), colours or class scores, as trained.

    images: (B, 3, H, W) in [0, 1]. Returns a list, finest scale first: (B, channels, H / 2^s, W / 2^s).
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.decoder(self.encoder(images))


class FlowNet(nn.Module):
    """Siamese flow network (Section 4.1, "Comparison with optical flow"): one encoder applied to both frames.

    first, second: (B, 3, H, W). Returns flow from first to second in pixels of each scale, finest first:
    (B, 2, H / 2^s, W / 2^s), x then y.
    """

    def __init__(self, encoder: str = "resnet18", scales: tuple[int, ...] = (0, 1, 2, 3)):
        super().__init__()
        self.encoder = ResnetEncoder(encoder)
        self.decoder = DepthDecoder(tuple(2 * c for c in self.encoder.channels), 2, scales)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        features = self.encoder(torch.cat([first, second]))  # one batch, so that both share batch-norm statistics too
        outputs = self.decoder([torch.cat(f.chunk(2), 1) for f in features])
        shares = [FLOW_RANGE * (out.float().sigmoid() - 0.5) for out in outputs]  # bfloat16 would step by half a pixel
        return [torch.cat([share[:, :1] * share.shape[3], share[:, 1:] * share.shape[2]], 1) for share in shares]


class PoseDecoder(nn.Module):
    """From the last map of a pose encoder (B, C, h, w), axis-angle and translation: each (B, predictions, 3)."""

    def __init__(self, in_channels: int, predictions: int = 2):
        super().__init__()
        self.net = nn.ModuleList([nn.Conv2d(in_channels, 256, 1), nn.Conv2d(256, 256, 3, padding=1),
                                  nn.Conv2d(256, 256, 3, padding=1), nn.Conv2d(256, 6 * predictions, 1)])

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = features
        for conv in self.net[:3]:
            x = F.relu(conv(x))
        pose = 0.01 * self.net[3](x).float().mean((2, 3)).view(len(x), -1, 6)  # starts near the identity
        return pose[..., :3], pose[..., 3:]


class PoseNet(nn.Module):
    """Relative pose of two frames in temporal order: (B, 3, H, W) twice -> axis-angle (B, 3), translation (B, 3)."""

    def __init__(self, encoder: str = "resnet18"):
        super().__init__()
        self.encoder = ResnetEncoder(encoder, stacked=2)
        self.decoder = PoseDecoder(self.encoder.channels[-1])

    def forward(self, earlier: torch.Tensor, later: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        axisangle, translation = self.decoder(self.encoder(torch.cat([earlier, later], 1))[-1])
        return axisangle[:, 0], translation[:, 0]


class Intrinsics(nn.Module):
    """Learned intrinsics of each camera, for video whose calibration is unknown (Section 5).

    given, start: (cameras, 3, 3), what the data set says and where to start from, for whole images of `size` (height,
    width). Bounded: the focal lengths stay within a factor of 3 of the start, their ratio within 10 % (pixels are
    nearly square), the principal point within a quarter of the image. A focal length shows where the camera turns, the
    more the further it does between two frames; while it only drives straight on, any will do.
    """

    def __init__(self, given: torch.Tensor, start: torch.Tensor, size: tuple[int, int]):
        super().__init__()
        self.size = size
        self.register_buffer("given", given.clone())
        self.register_buffer("start", start.clone())
        self.focal, self.ratio = (nn.Parameter(torch.zeros(len(start), 1)) for _ in range(2))
        self.centre = nn.Parameter(torch.zeros(len(start), 2))

    def cameras(self) -> torch.Tensor:
        """K (cameras, 3, 3) of whole images, as learned so far."""
        ratio = math.log(1.1) / 2 * self.ratio.tanh()
        scale = (math.log(3) * self.focal.tanh() + torch.cat([ratio, -ratio], 1)).exp()
        shift = 0.25 * self.start.new_tensor([self.size[1], self.size[0]]) * self.centre.tanh()
        return self.start * (1 + F.pad(scale - 1, (0, 1)).diag_embed()) + F.pad(shift[..., None], (2, 0, 0, 1))

    def forward(self, K: torch.Tensor, camera: torch.Tensor,
                mirrored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K (B, 3, 3), as the data set gives it, of maybe cropped and mirrored images (B,) of cameras (B,), corrected.

        A crop keeps focal lengths and moves the principal point, a mirror image turns its way around: what is learned
        changes both by the same amount as in the whole image. Also returns factors (B, 3) for what a pose network says
        of turning about and moving along x, y and z: those of x and y are divided by the change in focal length, so
        that motion in pixels, which the network has learned, stays the same when the focal length changes.
        """
        change = (self.cameras() - self.given)[camera]
        sign = torch.ones_like(K)
        sign[:, 0, 2] -= 2 * mirrored.to(K.device, non_blocking=True)
        per_focal_length = (-math.log(3) * self.focal[camera].tanh()).exp()
        return K + sign * change, F.pad(per_focal_length.expand(-1, 2), (0, 1), value=1)


# ---------------------------------------------------------------------------------------------- building by name

def build(arch: str, encoder: str, channels: int, scales: tuple[int, ...] = (0,), normalize_twice: bool = False,
          dpt_layers: str = "spread") -> nn.Module:
    """A network by name.

    arch: "unet", "flow" and "deeplabv3" take a ResNet, "dpt" a ViT, "linear" (a linear probe) both; channels of the
    head(s), one for each of `scales` in the U-Net, one at full size elsewhere.
    normalize_twice: as the authors' release did with ImageNet's weights, images go through ImageNet's mean and
    deviation before the encoder's own. dpt_layers: blocks that DPT sees, "spread" over the depth or the "last" four.
    """
    for kind, name, known in (("encoder", encoder, ENCODERS), ("architecture", arch, HEADS)):
        if name not in known:
            raise InputError(f"unknown {kind} '{name}': choose from {', '.join(known)}")
    if arch != "linear" and (arch == "dpt") != (encoder in VITS):
        raise InputError(f"--arch {arch} takes a {'ViT' if arch == 'dpt' else 'ResNet'}, not --encoder {encoder}")
    if arch == "flow":
        model = FlowNet(encoder, scales)
    elif arch == "unet":
        features = ResnetEncoder(encoder)
        model = Network(features, DepthDecoder(features.channels, channels, scales))
    elif arch == "deeplabv3":
        features = ResnetEncoder(encoder, dilated=encoder == "resnet50")
        model = Network(features, LastMapDecoder(features.stride, *DeepLabHead(features.channels[-1], channels)))
    elif arch == "dpt":
        patch, blocks, _, width = VITS[encoder]
        layers = [blocks * i // 4 - 1 for i in (1, 2, 3, 4)] if dpt_layers == "spread" else range(blocks - 4, blocks)
        if dpt_layers == "spread" and encoder == "vit_l14":
            layers[0] = 4  # as in Depth Anything v2
        readout = patch == 16  # DPT-Large has patches of 16 and a readout, Depth Anything 14 and none
        model = Network(VitEncoder(encoder, tuple(layers), readout), DptDecoder(width, patch, channels, readout))
    else:
        features = VitEncoder(encoder, (VITS[encoder][1] - 1,)) if encoder in VITS else ResnetEncoder(encoder)
        size = features.channels[-1]
        model = Network(features, LastMapDecoder(features.stride, nn.BatchNorm2d(size), nn.Conv2d(size, channels, 1)))
    model.decoder.heads, model.dpt_layers = HEADS[arch], dpt_layers
    if normalize_twice:  # (x - m) / s of (images - M) / S, in one
        features = model.encoder
        features.mean, features.std = IMAGENET_MEAN + IMAGENET_STD * features.mean, IMAGENET_STD * features.std
    return model


def check_options(args: argparse.Namespace) -> None:
    """Refuse what the network asked for cannot take: image sizes, and a batch of one for DeepLabV3."""
    step = VITS[args.encoder][0] if args.encoder in VITS else 32  # a pixel of the deepest map
    crop = [("crop", side) for side in vars(args).get("crop") or ()]
    for name, value in (("height", args.height), ("width", args.width), *crop):
        if value % step:
            raise InputError(f"--{name} {value} is not a multiple of {step}: try {round(value / step) * step}")
    if args.arch == "deeplabv3" and args.batch_size < 2:
        raise InputError("--batch_size 1: DeepLabV3 normalises its image-wide feature over the batch, which takes two")


# ---------------------------------------------------------------------------------------------- what the device decides

def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Options of both training scripts that cost or save time and memory."""
    group = parser.add_argument_group("speed")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    group.add_argument("--amp", choices=("auto", "none", "bf16"), default="auto",
                       help="networks in bfloat16, losses always in float32 (auto: on a GPU that has it)")
    group.add_argument("--memory_format", choices=("contiguous", "channels_last"), default="channels_last",
                       help="of the networks")
    group.add_argument("--compile", choices=("auto", "none", "loss", "all"), default="auto",
                       help="torch.compile: the photometric error, or the networks as well (auto: loss on a GPU)")
    group.add_argument("--sync_bn", action="store_true",
                       help="under torchrun, batch norm over the whole batch (else over each GPU's share of it)")
    group.add_argument("--benchmark", type=within(int, 1), nargs="?", const=20, metavar="STEPS",
                       help="time so many steps after five others, print ms by part as JSON, and leave nothing behind")


def pick_device(name: str) -> torch.device:
    """The device of that name; on a CPU the process also keeps freed memory from here on.

    The system would clear every page that is asked for anew, which takes a third of a forward pass.
    """
    if re.fullmatch(r"cpu|cuda(:\d+)?", name):
        with suppress(RuntimeError, AssertionError):  # AssertionError: a torch without CUDA
            device = torch.empty(0, device=name).device
            if device.type == "cpu":
                with suppress(OSError, AttributeError):  # another C library than glibc
                    mallopt = ctypes.CDLL("libc.so.6").mallopt
                    mallopt(-4, 0), mallopt(-1, 2 ** 31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
            return device
    raise InputError(f"--device {name}: use cpu, cuda or cuda:N; here are {torch.cuda.device_count()} CUDA devices")


def device_choices(args: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    """All that depends on the device, in one place; options that are not "auto" have their way.

    autocast(): a context for the networks; memory_format: of the networks; compile: "none", "loss" or "all"; batched:
    the scales of the photometric loss go through as one batch.
    """
    gpu = device.type == "cuda"
    bf16 = args.amp == "bf16" or (args.amp == "auto" and gpu and torch.cuda.is_bf16_supported(False))
    scales = getattr(args, "scales", "auto")
    compile = ("loss" if gpu and find_spec("triton") else "none") if args.compile == "auto" else args.compile
    if compile != "none" and not gpu and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError(f"--compile {args.compile} needs a C++ compiler, and there is no g++: install it, or set CXX")
    return argparse.Namespace(
        autocast=partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16),
        memory_format=torch.channels_last if args.memory_format == "channels_last" else torch.contiguous_format,
        compile=compile, batched=gpu if scales == "auto" else scales == "batched")


# ---------------------------------------------------------------------------------------------- checkpoints

def read_tensors(path: str) -> dict:
    """A checkpoint file as a dict of tensors and builtins; refused when damaged, or when reading it needs code."""
    try:
        damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()  # torch does not compare checksums
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options in files of MAE and DINO
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no checkpoint at {path}") from None
    except Exception as error:  # noqa: BLE001  (unpickling errors, truncated files, texts: all the same to a user)
        held = re.search(r"GLOBAL (\S+)", str(error))  # what to build would mean to run what the file says
        reason = f"it holds {held[1]}" if held else "it is damaged, or something else"
        raise InputError(f"{path} is not a readable checkpoint of tensors: {reason}") from None
    if damaged or not isinstance(content, dict):
        raise InputError(f"{path} is damaged" if damaged else f"{path} holds a {type(content).__name__}, not a dict")
    return content


def read_last(path: str) -> dict | None:
    """A run's `last.pt`, None where there is none; should it be damaged, the one before it, which ends the same.

    That one, `last.pt.1`, then takes its name, after a line that says so.
    """
    older = f"{path}.1"
    if not os.path.exists(path) and not os.path.exists(older):
        return None
    try:
        checkpoint = read_tensors(path)
        kinds = {"step": int, "args": dict, "log_size": int, "model": dict, "optimizer": dict}
        if not all(isinstance(checkpoint.get(key), kind) for key, kind in kinds.items()):
            raise InputError(f"{path} is no checkpoint of a run")
    except InputError as error:
        if not os.path.exists(older):
            raise InputError(f"{error}: delete it to start again") from None
        os.replace(older, path)
        print(f"{error}: going on from the checkpoint before it, {older}")
        return read_last(path)
    return checkpoint


def parts_of(model: nn.Module, pose: nn.Module | None = None,
             intrinsics: nn.Module | None = None) -> dict[str, nn.Module]:
    """The parts that checkpoints tell apart: "encoder", "decoder", of a PoseNet "pose_encoder", "pose"; and others."""
    parts = {"encoder": model.encoder, "decoder": model.decoder, "intrinsics": intrinsics}
    if pose is not None:
        parts |= {"pose_encoder": pose.encoder, "pose": pose.decoder}
    return {name: part for name, part in parts.items() if part is not None}


def state(*networks: nn.Module | None) -> dict[str, dict]:
    """State dicts by part, as checkpoints hold them; arguments as those of `parts_of`."""
    return {name: part.state_dict() for name, part in parts_of(*networks).items()}


def restore(checkpoint: dict | None, optimizer: torch.optim.Optimizer, *networks: nn.Module | None) -> int:
    """Put networks and optimiser to where a run's checkpoint left them; the number of steps done, 0 without one."""
    if checkpoint is None:
        return 0
    try:
        for name, part in parts_of(*networks).items():
            part.load_state_dict(checkpoint["model"][name])
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:  # from another version of the code
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"the run's last.pt does not fit its networks ({reason}): give another --name") from None
    return checkpoint["step"]


def save(run: Run, step: int, options: dict, optimizer: torch.optim.Optimizer, *networks: nn.Module | None) -> None:
    """A run's model.pt, to use, and last.pt, to continue: no more is needed, as draws are functions of (seed, step).

    Weights that are not finite end the run and leave both files as they were.
    """
    if not run.writes:
        return
    parts = state(*networks)
    for name, part in parts.items():
        if not all(torch.isfinite(value).all() for value in part.values()):
            sys.exit(f"stopped: weights of the {name} are not finite after step {step}, nothing was overwritten")
    content = {"options": {**options, "steps": step}, **parts}
    write_atomically(run.path("model.pt"), lambda file: torch.save(content, file))
    os.fsync(run.log_file.fileno())
    last = {"step": step, "args": vars(run.args), "log_size": run.log_file.tell(), "model": parts,
            "optimizer": optimizer.state_dict()}
    write_atomically(run.path("last.pt"), lambda file: torch.save(last, file), keep_previous=True)


# ---------------------------------------------------------------------------------------------- weights from elsewhere

# How others name things, as regular expressions in turn; what becomes "" is dropped.
RESNET_NAMES = ((r"^", "encoder."),)
TORCHVISION_VIT_NAMES = (
    (r"^heads\..*", ""), (r"\.linear_1\.", ".0."), (r"\.linear_2\.", ".3."), (r"^(?=.)", "encoder."))
VIT_NAMES = (  # of timm, MAE, DINO and what was made with them
    (r"^(head|fc_norm|pre_logits|mask_token|decoder_).*", ""), (r"^cls_token", "encoder.class_token"),
    (r"^pos_embed", POSITIONS), (r"^patch_embed\.proj\.", "encoder.conv_proj."), (r"^norm\.", "encoder.encoder.ln."),
    (r"^blocks\.(\d+)\.", r"encoder.encoder.layers.encoder_layer_\1."), (r"\.norm(\d)\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"), (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."), (r"\.mlp\.fc2\.", ".mlp.3."))
DPT_NAMES = (  # of DPT and of Depth Anything
    (r"^scratch\.refinenet4\.resConfUnit1\..*", ""),  # which nothing uses
    *((pattern, lambda match, name=name: f"{name}.{int(match[1]) - 1}.") for pattern, name in (
        (r"^act_postprocess(\d)\.0\.project\.0\.", "readout"), (r"^act_postprocess(\d)\.3\.", "project"),
        (r"^act_postprocess(\d)\.4\.", "resize"), (r"^scratch\.layer(\d)_rn\.", "reduce"),
        (r"^scratch\.refinenet(\d)\.resConfUnit1\.", "skip"), (r"^scratch\.refinenet(\d)\.resConfUnit2\.", "fuse"),
        (r"^scratch\.refinenet(\d)\.out_conv\.", "mix"))),
    (r"^projects\.", "project."), (r"^resize_layers\.", "resize."), (r"^scratch\.output_conv(1|\.0)\.", "conv1."),
    (r"^scratch\.output_conv(2\.0|\.2)\.", "conv2."), (r"^scratch\.output_conv(2\.2|\.4)\.", "head."))

ANY = r"((model|state_dict)/|(?!.*/))(module\.)?"  # "outer/inner" are the keys of a dict in a dict
TEACHER = r"teacher/(module\.)?backbone\."
FORMATS = (  # name, the key that tells, and for each part the prefix of its keys and their names: the first that fits
    ("MoCo v2", ANY + r"encoder_q\.conv1\.weight", {"encoder": (ANY + r"encoder_q\.(?!fc)", RESNET_NAMES)}),
    ("DINO ResNet-50", TEACHER + r"conv1\.weight", {"encoder": (TEACHER, RESNET_NAMES)}),
    ("DINO ViT", TEACHER + r"cls_token", {"encoder": (TEACHER, VIT_NAMES)}),
    ("torchvision DeepLabV3 (COCO)", ANY + r"classifier\.0\.convs\.0\.0\.weight",
     {"encoder": (ANY + r"backbone\.", RESNET_NAMES), "decoder": (ANY + r"classifier\.", ())}),
    ("DPT", ANY + r"pretrained\.act_postprocess1\.0\.project\.0\.weight",
     {"encoder": (ANY + r"pretrained\.model\.", VIT_NAMES),
      "decoder": (ANY + r"(?!pretrained\.model\.)(pretrained\.)?", DPT_NAMES)}),
    ("Depth Anything", ANY + r"depth_head\.projects\.0\.weight",
     {"encoder": (ANY + r"pretrained\.", VIT_NAMES), "decoder": (ANY + r"depth_head\.", DPT_NAMES)}),
    ("torchvision ViT (ImageNet)", ANY + r"conv_proj\.weight", {"encoder": (ANY, TORCHVISION_VIT_NAMES)}),
    ("DINOv2 ViT", ANY + r"blocks\.0\.ls1\.gamma", {"encoder": (ANY, VIT_NAMES)}),
    ("timm ViT (ImageNet)", ANY + r"head\.weight", {"encoder": (ANY, VIT_NAMES)}),
    ("MAE ViT", r"model/patch_embed\.proj\.weight", {"encoder": (ANY, VIT_NAMES)}),
    ("DINO ViT", ANY + r"patch_embed\.proj\.weight", {"encoder": (ANY, VIT_NAMES)}),
    ("torchvision ResNet (ImageNet)", ANY + r"fc\.weight", {"encoder": (ANY, RESNET_NAMES)}),
    ("DINO ResNet-50", ANY + r"layer4\.0\.conv1\.weight", {"encoder": (ANY, RESNET_NAMES)}))


def recognise(path: str, content: dict) -> tuple[str, dict[str, dict]]:
    """The name of a file's format and its parts under our names; raises InputError when it is none of FORMATS."""
    tensors = {}
    for key, value in content.items():
        inner = {f"{key}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {str(key): value}
        tensors |= {k: v for k, v in inner.items() if torch.is_tensor(v)}
    for name, tell, sources in FORMATS:
        if any(re.fullmatch(tell, key) for key in tensors):
            break
    else:
        raise InputError(f"{path} is no format known here; its first keys are {list(content)[:4]}")
    parts = {part: rename(tensors, *source) for part, source in sources.items()}
    encoder = parts["encoder"]
    try:
        for key in [key for key in encoder if key.endswith(".gamma")]:  # LayerScale: g * (W x + b) = (g W) x + g b
            gamma, block = encoder.pop(key), key.removesuffix(".ls1.gamma").removesuffix(".ls2.gamma")
            scaled = block + (".self_attention.out_proj." if "ls1" in key else ".mlp.3.")
            encoder[scaled + "weight"] = gamma[:, None] * encoder[scaled + "weight"]
            encoder[scaled + "bias"] = gamma * encoder[scaled + "bias"]
        if name == "DPT":  # it was trained on (image - 0.5) / 0.5; its readout is a linear layer
            weight = encoder["encoder.conv_proj.weight"]
            encoder["encoder.conv_proj.bias"] = encoder["encoder.conv_proj.bias"] + (
                weight * (IMAGENET_MEAN - 0.5) / 0.5).sum((1, 2, 3))
            encoder["encoder.conv_proj.weight"] = weight * IMAGENET_STD / 0.5
            parts["decoder"] = {k: v[..., None, None] if k.startswith("readout.") and k.endswith("weight") else v
                                for k, v in parts["decoder"].items()}
    except (KeyError, IndexError, RuntimeError) as error:
        raise InputError(f"{path} looks like {name}, but is not whole: {str(error).splitlines()[0]}") from None
    return name, parts


def rename(tensors: dict, prefix: str, names: tuple) -> dict:
    """Tensors whose keys start with a prefix, which goes, under other names."""
    renamed = {}
    for key, value in tensors.items():
        start = re.match(prefix, key)
        if start:
            new = key[start.end():]
            for pattern, replacement in names:
                new = re.sub(pattern, replacement, new)
            renamed[new] = value
    renamed.pop("", None)
    return renamed


def check_parts(path: str, parts: dict) -> None:
    """Refuse parts that are no dicts of dense tensors by name."""
    for name, part in parts.items():
        if not isinstance(part, dict) or not all(
                isinstance(key, str) and torch.is_tensor(value) and value.layout == torch.strided
                and value.device.type == "cpu" and not value.is_quantized for key, value in part.items()):
            raise InputError(f"{path}: {name} is no dict of tensors")


def read_checkpoint(path: str) -> tuple[str, dict, dict]:
    """Recognise a checkpoint by its content.

    path: our `model.pt` (or the run folder that holds it), a Monodepth2 folder, or a file of one of FORMATS.
    Returns (format, parts, options): parts maps "encoder", "decoder", "pose_encoder", "pose" to state dicts.
    """
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "model.pt")):
            return read_checkpoint(os.path.join(path, "model.pt"))
        files = {"encoder": "encoder.pth", "decoder": "depth.pth", "pose_encoder": "pose_encoder.pth",
                 "pose": "pose.pth"}
        parts = {part: read_tensors(os.path.join(path, name)) for part, name in files.items()
                 if os.path.isfile(os.path.join(path, name))}
        if "encoder" not in parts:
            raise InputError(f"{path} holds neither model.pt nor encoder.pth")
        if ("pose" in parts) != ("pose_encoder" in parts):
            raise InputError(f"{path}: pose_encoder.pth and pose.pth belong together, one is missing")
        extra = {key: parts["encoder"].pop(key) for key in ("height", "width", "use_stereo", "min_depth", "max_depth",
                                                            "metric") if key in parts["encoder"]}
        check_parts(path, parts)
        first_block = parts["encoder"].get("encoder.layer1.0.conv1.weight", torch.empty(0, 0, 3, 3))
        options = {"task": "depth", "supervision": "Monodepth2", "arch": "unet", "min_depth": 0.1, "max_depth": 100.0,
                   "encoder": "resnet50" if first_block.shape[-1] == 1 else "resnet18",  # 1x1: a bottleneck block
                   "height": 192, "width": 640, **extra}
        return "Monodepth2 folder", parts, options
    content = read_tensors(path)
    if "options" in content and "encoder" in content:
        options = content.pop("options")
        check_parts(path, content)
        odd = [key for key, kind in OPTIONS.items() if not isinstance(options, dict) or key in options
               and not isinstance(options[key], kind)]
        if odd:
            raise InputError(f"{path}: its option '{odd[0]}' is none")
        return "depth2seg", content, options
    name, parts = recognise(path, content)
    check_parts(path, parts)
    return name, parts, {}


def imagenet_checkpoint(encoder: str) -> tuple[str, dict, dict]:
    """ImageNet weights through torchvision; without network, says which file to put where."""
    name = re.sub(r"(vit_.)", r"\1_", encoder)  # vit_b16 is vit_b_16 there
    if name not in torchvision.models.list_models():
        raise InputError(f"torchvision has no ImageNet weights of {encoder}: give --init a file of timm's, say")
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        state = weights.get_state_dict(check_hash=True, progress=False)
    except Exception as error:  # noqa: BLE001  (every way a download can fail)
        target = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
        raise InputError(f"ImageNet weights of {encoder} could not be downloaded ({type(error).__name__}): "
                         f"put {os.path.basename(weights.url)} at {target}, or train with --init none") from None
    return *recognise(weights.url, state), {}


def is_head(module: nn.Module, key: str) -> bool:
    """Whether a parameter belongs to the last layers of a decoder, which each task replaces."""
    return key.startswith(getattr(module, "heads", ()))


def set_head_bias(decoder: nn.Module, value: float) -> None:
    """Let a decoder's heads start at `value`, before the sigmoid."""
    for key, parameter in decoder.named_parameters():
        if is_head(decoder, key) and key.endswith("bias"):
            nn.init.constant_(parameter, value)


def fit(module: nn.Module, state: dict, name: str, path: str, keep_head: bool = True) -> str:
    """Load one part strictly; only heads may stay as they are: of another shape, or all unless `keep_head`.

    Returns what was taken, e.g. "decoder 20/22: head replaced".
    """
    own = module.state_dict()
    if not keep_head:
        state = {key: value for key, value in state.items() if not is_head(module, key)}
    state = {key: value for key, value in state.items() if not key.startswith("encoder.fc.")}
    if POSITIONS in own and POSITIONS in state:  # of any grid: there is room for them from here on
        side = math.isqrt(max(0, state[POSITIONS].shape[1] - 1)) if state[POSITIONS].dim() == 3 else 0
        own[POSITIONS] = own[POSITIONS].new_empty(1, side ** 2 + 1, own[POSITIONS].shape[2])
        module.get_parameter(POSITIONS).data = own[POSITIONS]
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    problems = [f"{k} is {tuple(own[k].shape)} here, {tuple(state[k].shape) if k in state else 'absent'} there"
                for k in own if k not in fitting and not is_head(module, k)]
    problems += [f"{k} is unknown here" for k in state if k not in own and not is_head(module, k)]
    if problems:
        raise InputError(f"{path} does not fit {name} ({len(fitting)}/{len(own)} tensors): " + "; ".join(problems[:3]))
    bad = [k for k, v in fitting.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise InputError(f"{path} holds values that are not finite in {name}: {bad[0]}")
    module.load_state_dict({**own, **fitting})
    return f"{name} {len(fitting)}/{len(own)}" + (": head replaced" if len(fitting) < len(own) else "")


def load_weights(model: nn.Module, path: str, task: str, parts: str = "all", pose: nn.Module | None = None) -> str:
    """Load a checkpoint ("imagenet" or a path, see `read_checkpoint`) into a model and say what was taken.

    task: what the model is for; the head of a checkpoint of another task is not taken.
    parts: "encoder" leaves the decoder as it is; "all" demands both, unless the file's format has only an encoder.
    pose: a PoseNet to load as well, where the checkpoint has one.
    Raises InputError naming the first mismatches when a part does not fit.
    """
    source, state, options = imagenet_checkpoint(model.encoder.name) if path == "imagenet" else read_checkpoint(path)
    if path == "imagenet" and pose is not None:  # the pose network starts there too, both frames with the same filters
        pose_state = imagenet_checkpoint(pose.encoder.name)[1]["encoder"]
        pose_state["encoder.conv1.weight"] = torch.cat([pose_state["encoder.conv1.weight"]] * 2, 1) / 2
        fit(pose.encoder, pose_state, "pose_encoder", path)
    taken = [fit(model.encoder, state["encoder"], "encoder", path)]
    if parts == "all" and "decoder" in state:
        if options.get("arch") == "dpt" and options.get("dpt_layers") != model.dpt_layers:
            raise InputError(f"{path} was trained with --dpt_layers {options.get('dpt_layers')}: say so here, too")
        try:
            same_task = options.get("task") == task
            taken.append(fit(model.decoder, state["decoder"], "decoder", path, keep_head=same_task))
            if source == "Depth Anything":  # v1 and v2 are alike
                taken[-1] += " (should it be v1: --dpt_layers last)"
        except InputError as error:
            raise InputError(f"{error} (--init_parts encoder takes the encoder alone)") from None
    elif parts == "all" and source in ("depth2seg", "Monodepth2 folder"):
        raise InputError(f"{path} has no decoder: pass --init_parts encoder")
    else:
        taken.append("decoder fresh")
    if pose is not None and "pose" in state:
        taken += [fit(pose.encoder, state["pose_encoder"], "pose_encoder", path),
                  fit(pose.decoder, state["pose"], "pose", path)]
    return f"{source}: " + ", ".join(taken)


def load_model(path: str, device: torch.device | str = "cpu", task: str | None = None) -> tuple[nn.Module, dict]:
    """Rebuild a trained model from `model.pt` or a Monodepth2 folder: (model in eval mode, its options).

    Raises InputError where that is not a whole model, or was trained for another task than this one.
    """
    source, parts, options = read_checkpoint(path)
    if "task" not in options or "decoder" not in parts:
        raise InputError(f"{path} ({source}) holds only an encoder: nothing to evaluate")
    if task not in (None, options["task"]):
        raise InputError(f"{path} was trained for {options['task']}, not for {task}")
    needed = {"depth": {"min_depth", "max_depth"}, "segmentation": {"classes", "colours"}}.get(options["task"], set())
    needed = needed | {"arch", "encoder", "height", "width"}
    if not needed <= options.keys():
        raise InputError(f"{path}: its options lack {', '.join(sorted(needed - options.keys()))}")
    if not (all(64 <= options[key] <= 8192 for key in ("height", "width"))
            and 0 < options.get("min_depth", 1) < options.get("max_depth", 2) < math.inf):
        raise InputError(f"{path}: its options hold no sensible size or range of depth")
    colours = options.get("colours", [])
    if len(colours) != len(options.get("classes", [])) or not all(
            isinstance(c, list) and [x in range(256) for x in c] == 3 * [True] for c in colours):
        raise InputError(f"{path}: its options hold no red, green and blue of each class")
    arch = "flow" if options["task"] == "flow" else options["arch"]
    heads = sorted(k for k in parts["decoder"] if k.startswith(HEADS.get(arch, ())) and k.endswith("weight"))
    if not heads or (colours and parts["decoder"][heads[0]].shape[0] != len(colours)):
        raise InputError(f"{path}: its decoder is none of the architecture '{arch}', or has not its classes")
    channels = parts["decoder"][heads[0]].shape[0]
    settings = {key: options[key] for key in ("normalize_twice", "dpt_layers") if key in options}
    model = build(arch, options["encoder"], channels, tuple(range(len(heads))), **settings)
    for part in ("encoder", "decoder"):
        if ": " in fit(getattr(model, part), parts[part], part, path):
            raise InputError(f"{path}: the {part}'s head does not fit its options")
    return model.to(device, memory_format=torch.channels_last).eval(), options
