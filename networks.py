"""Networks: U-Net, DeepLabV3, DPT and linear decoders on an encoder; pose, flow, learned intrinsics.

    model = networks.build("unet", "resnet18", channels=1, scales=(0, 1, 2, 3))  # Section 3.1
    outputs = model(images)  # (B, 3, H, W) in [0, 1] -> [(B, 1, H / 2^s, W / 2^s)], finest first

Parameters are named as in Monodepth2's published checkpoints: model.encoder is its encoder.pth,
model.decoder its depth.pth, PoseNet's parts its pose_encoder.pth and pose.pth. The last layer of each
decoder, its head, computes in float32 whatever autocast says.
"""

import argparse
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders import (
    CNNS,
    ENCODERS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    RESNETS,
    VITS,
    EfficientNetEncoder,
    Encoder,
    ResnetEncoder,
    VitEncoder,
)
from utils import InputError

UNET_HEADS = ("decoder.10.", "decoder.11.", "decoder.12.", "decoder.13.")
ARCHITECTURES = {  # the parameters of the heads, which each task replaces, and the encoders
    "unet": (UNET_HEADS, CNNS),
    "flow": (UNET_HEADS, CNNS),
    "deeplabv3": (("4.",), tuple(RESNETS)),
    "dpt": (("head.",), tuple(VITS)),
    "linear": (("1.",), ENCODERS),
}
SETTINGS = {  # of `build`; model.pt keeps them
    "output_stride": 8,  # of DeepLabV3 on ResNet-50: 8 or 16
    "dpt_layers": "spread",  # the blocks that DPT reads, or "last": the last four
    "readout": None,  # DPT reads the class token; None: as DPT-Large, with "spread" and patches of 16
    "normalize_twice": False,  # by ImageNet's mean and deviation first, as the authors' release does
    "positions": "timm",  # how a ViT resizes its position embeddings
    "registers": 0,  # register tokens of a ViT
}
DECODER_CHANNELS = (16, 32, 64, 128, 256)  # of the U-Net decoder's levels, finest first
DPT_CHANNELS = {  # by the ViT's width: channels of its four maps, and of their fusion
    384: ((48, 96, 192, 384), 64),
    768: ((96, 192, 384, 768), 128),
    1024: ((256, 512, 1024, 1024), 256),
}
ATROUS_RATES = {8: (12, 24, 36), 16: (6, 12, 18)}  # by output stride
FLOW_RANGE = 0.4  # flow = 0.4 * (sigmoid - 0.5) of the image's size


def in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer outside autocast: bfloat16 leaves few distinct depths in a picture."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())


# ------------------------------------------------------------------------------------ decoders


class Conv3x3(nn.Module):
    """With reflection padding, under Monodepth2's parameter names."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        if x.is_cuda:  # compiled padding drops channels_last
            x = x.contiguous(memory_format=torch.channels_last)
        return self.conv(x)


def conv_elu(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = Conv3x3(in_channels, out_channels)
    return nn.Sequential(OrderedDict(conv=conv, elu=nn.ELU()))


def double_size(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling; F.interpolate compiles to a gather, and scatters its gradient."""
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


class DepthDecoder(nn.Module):
    """Monodepth2's U-Net decoder with a head of any number of channels at each of `scales`.

    features: the encoder's five maps. Returns [(B, channels, H / 2^s, W / 2^s)], finest first.
    The order of the layers gives their names: two a level from the coarsest on, then the heads.
    """

    def __init__(self, encoder_channels: tuple, channels: int = 1, scales: tuple = (0, 1, 2, 3)):
        super().__init__()
        self.scales = tuple(scales)
        self.decoder = nn.ModuleList()
        below = encoder_channels[4]
        for level in (4, 3, 2, 1, 0):
            width = DECODER_CHANNELS[level]
            skip = encoder_channels[level - 1] if level > 0 else 0
            self.decoder.append(conv_elu(below, width))
            self.decoder.append(conv_elu(width + skip, width))
            below = width
        for scale in self.scales:
            head = Conv3x3(DECODER_CHANNELS[scale], channels)
            self.decoder.append(head)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        outputs = {}
        x = features[4]
        for level in (4, 3, 2, 1, 0):
            first = 8 - 2 * level
            x = self.decoder[first](x)
            x = double_size(x)
            if level > 0:
                skip = features[level - 1]
                x = torch.cat([x, skip], 1)
            x = self.decoder[first + 1](x)
            if level in self.scales:
                head = 10 + self.scales.index(level)
                outputs[level] = in_float32(self.decoder[head], x)
        return [outputs[scale] for scale in self.scales]


class LastMapDecoder(nn.Sequential):
    """Layers on the last map alone (DeepLabV3's, or a linear probe), upsampled by its `stride`.

    features: the encoder's maps. Returns [(B, channels, H, W)].
    """

    def __init__(self, stride: int, *layers: nn.Module):
        super().__init__(*layers)
        self.stride = stride

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        *layers, head = self
        x = features[-1]
        for layer in layers:
            x = layer(x)
        x = in_float32(head, x)
        x = F.interpolate(x, scale_factor=self.stride, mode="bilinear")
        return [x]


class ResidualUnit(nn.Module):
    """x plus two 3x3 convolutions of it, each after a ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.relu(x))
        inner = self.conv2(F.relu(inner))
        return x + inner


def upsample_aligned(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class DptDecoder(nn.Module):
    """DPT's decoder: four maps of a ViT at 4, 2, 1 and 1/2 times their size, fused from the coarsest on.

    With a readout, for maps with the class token beside each patch, it is DPT-Large's; without, Depth
    Anything's. features: four maps (B, C, h, w) of patches of `stride`. Returns [(B, channels, H, W)].
    """

    def __init__(self, width: int, stride: int, channels: int, readout: bool):
        super().__init__()
        self.stride = stride
        widths, inner = DPT_CHANNELS[width]
        self.readout = nn.ModuleList()
        if readout:
            self.readout.extend(nn.Conv2d(2 * width, width, 1) for _ in widths)
        self.project = nn.ModuleList(nn.Conv2d(width, out, 1) for out in widths)
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
            ]
        )
        self.reduce = nn.ModuleList(nn.Conv2d(c, inner, 3, padding=1, bias=False) for c in widths)
        self.skip = nn.ModuleList(ResidualUnit(inner) for _ in range(3))
        self.fuse = nn.ModuleList(ResidualUnit(inner) for _ in range(4))
        self.mix = nn.ModuleList(nn.Conv2d(inner, inner, 1) for _ in range(4))
        self.conv1 = nn.Conv2d(inner, inner // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(inner // 2, 32, 3, padding=1)
        self.head = nn.Conv2d(32, channels, 1)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        rows, columns = features[0].shape[2:]
        maps = []
        for i, x in enumerate(features):
            if len(self.readout) > 0:
                x = self.readout[i](x)
                x = F.gelu(x)
            x = self.project[i](x)
            x = self.resize[i](x)
            maps.append(self.reduce[i](x))
        sizes = [(8 * rows, 8 * columns)]  # to which each map grows: that of the next finer one
        for x in maps[:3]:
            sizes.append(x.shape[2:])
        x = maps[3]
        for i in (3, 2, 1, 0):
            if i < 3:
                x = x + self.skip[i](maps[i])
            x = self.fuse[i](x)
            x = upsample_aligned(x, sizes[i])
            x = self.mix[i](x)
        image_size = (self.stride * rows, self.stride * columns)
        x = upsample_aligned(self.conv1(x), image_size)
        x = F.relu(self.conv2(x))
        return [in_float32(self.head, x)]


def is_head(decoder: nn.Module, key: str) -> bool:
    """Whether a parameter belongs to the last layers of a decoder, which each task replaces."""
    heads = getattr(decoder, "heads", ())
    return key.startswith(heads)


def set_head_bias(decoder: nn.Module, value: float) -> None:
    """Let the heads start at `value`, before the sigmoid."""
    for key, parameter in decoder.named_parameters():
        if is_head(decoder, key) and key.endswith("bias"):
            nn.init.constant_(parameter, value)


# ------------------------------------------------------------------------------------ whole networks


class Network(nn.Module):
    """Encoder and decoder. Outputs before any sigmoid or softmax: disparity, colours or class scores.

    images: (B, 3, H, W) in [0, 1]. Returns float32 [(B, channels, H / 2^s, W / 2^s)], finest first.
    settings: what `build` was given (SETTINGS).
    """

    def __init__(self, encoder: Encoder, decoder: nn.Module, settings: dict):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.settings = settings

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.encoder(images)
        return self.decoder(features)

    def parts(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "decoder": self.decoder}


class FlowNet(Network):
    """Siamese flow network (Section 4.1, "Comparison with optical flow"): one encoder for both frames.

    first, second: (B, 3, H, W). Returns flow from first to second in pixels of each scale, x then y:
    [(B, 2, H / 2^s, W / 2^s)], finest first.
    """

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        both = torch.cat([first, second])  # one batch: both frames share batch-norm statistics
        pairs = []
        for feature in self.encoder(both):
            pair = feature.chunk(2)
            pairs.append(torch.cat(pair, 1))
        flows = []
        for output in self.decoder(pairs):
            share = FLOW_RANGE * (output.sigmoid() - 0.5)  # of the image's width and height
            rows, columns = share.shape[2:]
            x = share[:, :1] * columns
            y = share[:, 1:] * rows
            flows.append(torch.cat([x, y], 1))
        return flows


class PoseDecoder(nn.Module):
    """From the last map of a pose encoder, axis-angle and translation: each (B, predictions, 3).

    Monodepth2's makes two predictions, of which the first is used.
    """

    def __init__(self, in_channels: int, predictions: int = 2):
        super().__init__()
        self.net = nn.ModuleList(
            [
                nn.Conv2d(in_channels, 256, 1),
                nn.Conv2d(256, 256, 3, padding=1),
                nn.Conv2d(256, 256, 3, padding=1),
                nn.Conv2d(256, 6 * predictions, 1),
            ]
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.net[:3]:
            x = F.relu(conv(x))
        x = in_float32(self.net[3], x)
        pose = 0.01 * x.mean((2, 3))  # starts near the identity
        pose = pose.unflatten(1, (-1, 6))
        return pose[..., :3], pose[..., 3:]


class PoseNet(nn.Module):
    """Relative pose of two frames in temporal order: axis-angle (B, 3) and translation (B, 3).

    encoder: the depth network's. As in Monodepth2, pose has the same ResNet; ResNet-18 beside others.
    """

    def __init__(self, encoder: str = "resnet18"):
        super().__init__()
        self.encoder = ResnetEncoder(encoder if encoder in RESNETS else "resnet18", stacked=2)
        self.decoder = PoseDecoder(self.encoder.channels[-1])

    def forward(self, earlier: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        pair = torch.cat([earlier, later], 1)  # (B, 6, H, W)
        features = self.encoder(pair)
        axisangle, translation = self.decoder(features[-1])
        return axisangle[:, 0], translation[:, 0]

    def parts(self) -> dict[str, nn.Module]:
        return {"pose_encoder": self.encoder, "pose": self.decoder}


def scale_translation(pose: dict, factor: float) -> dict:
    """A pose decoder's state whose translations are `factor` times as long."""
    scaled = dict(pose)
    for key in ("net.3.weight", "net.3.bias"):  # rows: axis-angle and translation, for each prediction
        rows = pose[key].clone().unflatten(0, (-1, 6))
        rows[:, 3:] *= factor
        scaled[key] = rows.flatten(0, 1)
    return scaled


class Intrinsics(nn.Module):
    """Learned intrinsics of each camera, for video without calibration (Section 5).

    given, start: (cameras, 3, 3), what the data set says and where to start, for whole images of `size`
    (height, width). Focal lengths stay within a factor of about 3 of the start, their ratio within 10 %,
    the principal point within a quarter of the image. Focal length shows only where the camera turns.
    """

    def __init__(self, given: Tensor, start: Tensor, size: tuple[int, int]):
        super().__init__()
        height, width = size
        self.register_buffer("extent", start.new_tensor([width, height]), persistent=False)
        self.register_buffer("given", given.clone())
        self.register_buffer("start", start.clone())
        cameras = len(start)
        self.focal = nn.Parameter(torch.zeros(cameras, 1))
        self.ratio = nn.Parameter(torch.zeros(cameras, 1))
        self.centre = nn.Parameter(torch.zeros(cameras, 2))

    def cameras(self) -> Tensor:
        """K (cameras, 3, 3) of whole images, as learned so far."""
        ratio = math.log(1.1) / 2 * self.ratio.tanh()
        stretch = self.focal_growth() + torch.cat([ratio, -ratio], 1)  # log of the change of fx, fy
        K = self.start.clone()
        K[:, [0, 1], [0, 1]] *= stretch.exp()
        K[:, :2, 2] += self.extent / 4 * self.centre.tanh()
        return K

    def focal_growth(self) -> Tensor:
        """Log of the change in focal length, (cameras, 1)."""
        return math.log(3) * self.focal.tanh()

    def forward(self, K: Tensor, camera: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        """The data set's K (B, 3, 3) for cropped and mirrored images (B,) of cameras (B,), corrected.

        A crop moves the principal point and a mirror image turns it around: the correction is that of
        the whole image. Also returns factors (B, 3) for the pose network's rotation and translation,
        which keep motion in pixels the same when the focal length changes.
        """
        change = self.cameras() - self.given
        sign = torch.ones_like(K)
        sign[:, 0, 2] -= 2 * mirrored.to(K.device)
        corrected = K + sign * change[camera]
        growth = self.focal_growth()[camera]
        factors = (-growth).exp().expand(-1, 2)
        return corrected, F.pad(factors, (0, 1), value=1)

    def parts(self) -> dict[str, nn.Module]:
        return {"intrinsics": self}


# ------------------------------------------------------------------------------------ building by name


def build(arch: str, encoder: str, channels: int, scales: tuple = (0,), **settings) -> Network:
    """A network by name, with a head of `channels`, or in the U-Net one for each of `scales`.

    settings: see SETTINGS. Raises InputError for names that do not go together.
    """
    heads, known = ARCHITECTURES.get(arch, ((), ()))
    if encoder not in known:
        raise InputError(f"--arch {arch} takes {', '.join(known)}, not --encoder {encoder}")
    settings = {**SETTINGS, **settings}
    if encoder == "resnet18" and settings["output_stride"] != 8:
        raise InputError("--output_stride takes --encoder resnet50: ResNet-18 does not dilate")
    if settings["readout"] is None:
        like_dpt_large = encoder.endswith("16") and settings["dpt_layers"] == "spread"
        settings["readout"] = arch == "dpt" and like_dpt_large
    features = build_encoder(arch, encoder, settings)
    decoder = build_decoder(arch, features, channels, scales, settings)
    decoder.heads = heads
    if settings["normalize_twice"]:  # both normalisations folded into one mean and deviation
        mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
        std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
        features.mean = mean + std * features.mean
        features.std = std * features.std
    kind = FlowNet if arch == "flow" else Network
    return kind(features, decoder, settings)


def build_encoder(arch: str, encoder: str, settings: dict) -> Encoder:
    if encoder == "efficientnet_lite0":
        return EfficientNetEncoder(encoder)
    if encoder in RESNETS:
        dilated = arch == "deeplabv3" and encoder == "resnet50"
        stride = settings["output_stride"] if dilated else 32
        return ResnetEncoder(encoder, output_stride=stride)
    blocks = VITS[encoder][1]
    layers = [blocks * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    if encoder == "vit_l14":
        layers[0] = 4  # as in Depth Anything v2
    if settings["dpt_layers"] == "last":
        layers = list(range(blocks - 4, blocks))
    if arch == "linear":
        layers = [blocks - 1]
    vit = VitEncoder(encoder, layers, settings["readout"])
    vit.set_positions(settings["positions"], settings["registers"])
    return vit


def build_decoder(
    arch: str, encoder: Encoder, channels: int, scales: tuple, settings: dict
) -> nn.Module:
    if arch == "unet":
        return DepthDecoder(encoder.channels, channels, scales)
    if arch == "flow":
        pairs = [2 * count for count in encoder.channels]
        return DepthDecoder(pairs, 2, scales)
    if arch == "dpt":
        width = VITS[encoder.name][3]
        return DptDecoder(width, encoder.stride, channels, settings["readout"])
    size = encoder.channels[-1]
    if arch == "linear":
        probe = nn.Conv2d(size, channels, 1)
        return LastMapDecoder(encoder.stride, nn.BatchNorm2d(size), probe)
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead

    rates = ATROUS_RATES[settings["output_stride"]]
    layers = DeepLabHead(size, channels, rates)
    return LastMapDecoder(encoder.stride, *layers)


def check_options(args: argparse.Namespace) -> None:
    """Refuse image sizes that the network cannot take, and what --arch rules out."""
    step = VITS[args.encoder][0] if args.encoder in VITS else 32
    sides = [("height", args.height), ("width", args.width)]
    for side in vars(args).get("crop") or ():
        sides.append(("crop", side))
    for name, value in sides:
        if value % step:
            nearest = max(step, round(value / step) * step)
            raise InputError(f"--{name} {value} is not a multiple of {step}: try {nearest}")
    if args.arch == "deeplabv3" and args.batch_size < 2:
        raise InputError("--arch deeplabv3 normalises over the batch, and needs at least two images")
    if args.arch != "deeplabv3" and args.output_stride != 8:
        raise InputError("--output_stride is for --arch deeplabv3")
    if args.arch != "dpt" and vars(args).get("dpt_layers", "spread") != "spread":
        raise InputError("--dpt_layers is for --arch dpt")
