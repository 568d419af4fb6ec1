"""The losses, as pure functions: Eqs. (1) and (2) of the paper, and the baselines of Section 4.1.

Images are (B, 3, H, W) in [0, 1]. Depth (B, 1, H, W) is camera z, and disparity is the network's
sigmoid in (0, 1). Intrinsics K (B, 3, 3) are in pixels, without skew; the centre of the first pixel
is (0, 0), hence align_corners=True. T (B, 4, 4) maps target-camera to source-camera points.
A list of outputs starts at full size; map s has 1 / 2^s of that size. Leading dots in a shape
stand for stacked scales (S) and sources (V), which compile to fewer kernels than loops. A training
loss returns terms, of which "loss" trains; those of pre-training also return views, maps to look at.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import IGNORE

SSIM_WEIGHT = 0.85  # of (1 - SSIM) / 2 in the photometric error; the rest is L1
C1 = 0.01**2  # SSIM's constants, for images in [0, 1]
C2 = 0.03**2
BORDER = 1 + 1e-5  # rounding must not decide whether the first row, which stereo never moves, is seen
Results = tuple[dict[str, Tensor], dict]  # terms and views


# ------------------------------------------------------------------------------ means and scales
def channel_mean(x: Tensor) -> Tensor:
    """(..., C, H, W) -> (..., 1, H, W)."""
    return x.mean(-3, keepdim=True)


def masked_mean(values: Tensor, mask: Tensor, dim=None) -> Tensor:
    """Mean of `values` where `mask` is set, over `dim` or over all; 0 where the mask is empty."""
    count = mask.sum(dim).clamp(min=1)
    return (values * mask).sum(dim) / count


def mean_over_scales(values: Tensor) -> Tensor:
    """Mean of one value per scale (S,), finest first, with weights 1, 1/2, 1/4, ..."""
    weights = 0.5 ** torch.arange(len(values), device=values.device)
    return (values * weights).sum() / weights.sum()


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A coarse scale's map at full size (H, W), where the losses compare."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def image_pyramid(image: Tensor, levels: int = 4) -> list[Tensor]:
    """The image and its halvings by area, finest first."""
    return [F.avg_pool2d(image, 2**level) for level in range(levels)]


# -------------------------------------------------------------------------------------- geometry
def disparity_to_depth(disparity: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """1 / depth grows linearly from 1 / max_depth at disparity 0 to 1 / min_depth at disparity 1."""
    nearest = 1 / min_depth
    farthest = 1 / max_depth
    return 1 / (farthest + (nearest - farthest) * disparity)


def pose_to_matrix(axisangle: Tensor, translation: Tensor, invert: bool = False) -> Tensor:
    """The rigid motion x -> R x + t, or its inverse, as (B, 4, 4).

    axisangle: (B, 3), the rotation's axis times its angle in radians; translation: (B, 3).
    """
    angle = axisangle.norm(dim=1, keepdim=True)  # (B, 1)
    axis = axisangle / (angle + 1e-7)
    x, y, z = axis.unbind(1)
    zero = torch.zeros_like(x)
    entries = [zero, -z, y, z, zero, -x, -y, x, zero]
    cross = torch.stack(entries, 1).view(-1, 3, 3)  # cross @ v is the cross product of axis and v
    outer = axis[:, :, None] * axis[:, None, :]
    angle = angle[..., None]  # (B, 1, 1)
    identity = torch.eye(4, device=axis.device)
    rotation = angle.cos() * identity[:3, :3] + angle.sin() * cross  # Rodrigues' formula
    rotation = rotation + (1 - angle.cos()) * outer
    if invert:
        rotation = rotation.transpose(1, 2)
        translation = -(rotation * translation[:, None]).sum(2)
    T = identity.repeat(len(axis), 1, 1)
    T[:, :3, :3] = rotation
    T[:, :3, 3] = translation
    return T


def pixel_grid(image: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels' coordinates in a map (..., H, W): x (W,) and y (H, 1)."""
    height, width = image.shape[-2:]
    x = torch.arange(width, device=image.device)
    y = torch.arange(height, device=image.device)
    return x, y[:, None]


def project(depth: Tensor, K: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    """Where the target's pixels land in the source view: (..., B, H, W, 2), x then y.

    depth: (..., B, 1, H, W). Also returns the points' depth z in the source camera, of that shape.
    """
    # K (R depth K^-1 p + t) = depth (K R) (K^-1 p) + K t, in homogeneous pixels of the source;
    # as sums, which compile to one kernel and stay exact under TF32 and autocast
    motion = (K[:, :, :, None] * T[:, None, :3]).sum(2)  # (B, 3, 4): K [R | t]
    motion = motion[..., None, None]
    right, down, ahead, origin = motion.unbind(2)  # (B, 3, 1, 1) each
    K = K[..., None, None]
    x, y = pixel_grid(depth)
    x = (x - K[:, :1, 2]) / K[:, :1, 0]  # (x - cx) / fx, (B, 1, 1, W)
    y = (y - K[:, 1:2, 2]) / K[:, 1:2, 1]  # (y - cy) / fy, (B, 1, H, 1)
    rays = right * x + (down * y + ahead)  # (B, 3, H, W)
    points = depth * rays + origin  # (..., B, 3, H, W)
    z = points[..., 2:, :, :]
    divisor = z + 1e-7
    divisor = divisor + (divisor == 0)  # an infinite pixel would make the gradient NaN
    pixels = points[..., :2, :, :] / divisor
    return pixels.movedim(-3, -1), z


def sample(image: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear samples (..., B, C, H, W) at `pixels` (..., B, H, W, 2); outside, the border's colour.

    Also returns which positions lie in the image, (..., B, 1, H, W) bool.
    """
    height, width = image.shape[2:]
    x, y = pixels.unbind(-1)
    x = x * (2 / (width - 1)) - 1  # from -1 at the first pixel's centre to 1 at the last one's
    y = y * (2 / (height - 1)) - 1
    inside = (x.abs() <= BORDER) & (y.abs() <= BORDER)
    grid = torch.stack([x, y], -1)
    batch = grid.shape[:-3]  # (..., B)
    image = image.expand(*batch, -1, -1, -1)
    samples = F.grid_sample(
        image.flatten(0, -4), grid.flatten(0, -4), "bilinear", "border", align_corners=True)
    return samples.unflatten(0, batch), inside.unsqueeze(-3)


def synthesize(source: Tensor, depth: Tensor, K: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    """View synthesis: the target view in the source's colours, (..., B, 3, H, W).

    Also returns which pixels the source sees, (..., B, 1, H, W) bool: in front of it, in its image.
    """
    pixels, z = project(depth, K, T)
    warped, inside = sample(source, pixels)
    return warped, inside & (z > 0)


# ----------------------------------------------------------------- photometric error, smoothness
def pad(x: Tensor) -> Tensor:
    """A map (..., B, C, H, W) padded by one pixel on each side, by reflection."""
    batch = x.shape[:-3]
    padded = F.pad(x.flatten(0, -4), (1, 1, 1, 1), mode="reflect")
    return padded.unflatten(0, batch)


def box_mean(x: Tensor) -> Tensor:
    """Mean of 3x3 windows of a padded map; shifted sums are faster than pooling."""
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    return sums / 9


def ssim_error(prediction: Tensor, target: Tensor) -> Tensor:
    """(1 - SSIM) / 2, clamped to [0, 1], for each pixel and channel, (..., B, C, H, W)."""
    x = pad(prediction)
    y = pad(target)
    mean_x = box_mean(x)
    mean_y = box_mean(y)
    product = mean_x * mean_y
    squares = mean_x * mean_x + mean_y * mean_y
    covariance = box_mean(x * y) - product
    variances = box_mean(x * x + y * y) - squares  # that of x plus that of y
    luminance = (2 * product + C1) / (squares + C1)
    structure = (2 * covariance + C2) / (variances + C2)
    error = (1 - luminance * structure) / 2
    return error.clamp(0, 1)


def photometric_error(prediction: Tensor, target: Tensor, ssim: bool = True) -> Tensor:
    """0.85 (1 - SSIM) / 2 + 0.15 L1, averaged over channels, (..., B, 1, H, W); or L1 alone."""
    l1 = channel_mean((prediction - target).abs())
    if not ssim:
        return l1
    structure = channel_mean(ssim_error(prediction, target))
    return SSIM_WEIGHT * structure + (1 - SSIM_WEIGHT) * l1


def smoothness(values: Tensor, image: Tensor) -> Tensor:
    """Mean absolute gradient of `values` (B, C, H, W), less where the image itself changes."""
    edges_x = channel_mean(image.diff(dim=3).abs())
    edges_y = channel_mean(image.diff(dim=2).abs())
    along_x = values.diff(dim=3).abs() * torch.exp(-edges_x)
    along_y = values.diff(dim=2).abs() * torch.exp(-edges_y)
    return along_x.mean() + along_y.mean()


def disparity_smoothness(disparity: Tensor, image: Tensor) -> Tensor:
    """Smoothness of disparity divided by its mean, so that shrinking it does not lower the loss."""
    mean = disparity.mean((2, 3), keepdim=True)
    return smoothness(disparity / (mean + 1e-7), image)


# ----------------------------------------------------------------------------------------- depth
@dataclass(frozen=True)
class PhotometricLoss:
    """Self-supervised depth, the first term of Eq. (1), as in Monodepth2; no script sets its ablations.

    automask: pixels that an unmoved source explains at least as well do not train.
    minimum: the best source counts at each pixel; if False, the mean of those that see it.
    border: pixels that a source does not see compare with its border's colour, as in Monodepth2.
    """

    min_depth: float = 0.1
    max_depth: float = 100.0
    smoothness_weight: float = 1e-3
    automask: bool = True
    minimum: bool = True
    ssim: bool = True
    border: bool = False

    def __call__(
        self,
        disparities: list[Tensor],
        target: Tensor,
        sources: list[Tensor],
        K: Tensor,
        poses: list[Tensor],
    ) -> Results:
        """Compare the target with each source, warped by the source's pose T (B, 4, 4).

        Terms: loss, photometric, smoothness, masked (share of pixels that do not train).
        Views, finest scale: depth, warped (B, V, 3, H, W), mask (B, 1, H, W), set where it trains.
        """
        unmoved = torch.zeros_like(target[:, :1])  # the constant where a pixel does not train
        if self.automask:  # then it is also what a warped source has to beat
            unmoved = self.best_error(torch.stack(sources), target)

        full = [upsample(disparity, target.shape[2:]) for disparity in disparities]
        depth = disparity_to_depth(torch.stack(full), self.min_depth, self.max_depth)
        warped = []
        seen = []
        for source, T in zip(sources, poses):
            image, mask = synthesize(source, depth, K, T)
            warped.append(image)
            seen.append(mask)
        warped = torch.stack(warped)  # (V, S, B, 3, H, W)
        seen = torch.stack(seen) | self.border  # (V, S, B, 1, H, W)
        error = self.best_error(warped, target, seen)  # (S, B, 1, H, W)
        trains = seen.any(0)
        if self.automask:
            trains = trains & (error < unmoved)
        error = torch.where(trains, error, unmoved)  # a constant where it does not train

        smooth = []
        pyramid = image_pyramid(target, len(disparities))
        for scale, disparity in enumerate(disparities):
            smooth.append(disparity_smoothness(disparity, pyramid[scale]) / 2**scale)

        views = {
            "depth": depth[0].detach(),
            "warped": warped[:, 0].transpose(0, 1).detach(),
            "mask": trains[0],
        }
        terms = {
            "photometric": error.mean(),
            "smoothness": torch.stack(smooth).mean(),
            "masked": 1 - trains[0].float().mean(),
        }
        terms["loss"] = terms["photometric"] + self.smoothness_weight * terms["smoothness"]
        return terms, views

    def best_error(self, images: Tensor, target: Tensor, seen: Tensor | None = None) -> Tensor:
        """Photometric error of the best of the images at each pixel, or their mean, (..., B, 1, H, W).

        images: (V, ..., B, 3, H, W); seen: (V, ..., B, 1, H, W), everything where it is None.
        """
        errors = photometric_error(images, target, self.ssim)
        if seen is None:
            seen = torch.ones_like(errors, dtype=torch.bool)
        if self.minimum:
            return errors.masked_fill(~seen, torch.inf).amin(0)
        return masked_mean(errors, seen, 0)


def supervised_depth_loss(
    disparities: list[Tensor],
    measured: Tensor,
    min_depth: float,
    max_depth: float,
) -> Results:
    """Second term of Eq. (1): L1 in metres over all measured pixels, averaged over scales.

    measured: (B, 1, H, W). Only values in [min_depth, max_depth] train: 0 means unknown, and the
    sky of a renderer is farther than the network can answer. Views: depth, measured (what trains).
    """
    valid = (measured >= min_depth) & (measured <= max_depth)
    full = [upsample(disparity, measured.shape[2:]) for disparity in disparities]
    depth = disparity_to_depth(torch.stack(full), min_depth, max_depth)  # (S, B, 1, H, W)
    error = (depth - measured).abs()
    loss = masked_mean(error, valid.expand_as(error))
    views = {
        "depth": depth[0].detach(),
        "measured": valid,
    }
    return {"loss": loss}, views


# ---------------------------------------------------------------- baselines: flow, reconstruction
def flow_loss(
    flows: list[Tensor],
    target: Tensor,
    source: Tensor,
    smoothness_weight: float = 2.0,
) -> Results:
    """Optical flow: photometric error of the warped source, plus weighted smoothness.

    flows: (B, 2, H / 2^s, W / 2^s) in pixels of their own scale, from target to source.
    Smoothness is of both components at full size, as a share of the image, as in the release.
    Terms: loss, photometric, smoothness, outside (share of pixels); views: flow, warped.
    """
    height, width = target.shape[2:]
    shares = []
    smooth = []
    for flow in flows:
        x, y = upsample(flow, (height, width)).unbind(1)
        x = x / flow.shape[3]  # as a share of the width, (B, H, W)
        y = y / flow.shape[2]
        share = torch.stack([x, y], 1)
        shares.append(share)
        smooth.append(2 * smoothness(share, target))  # the sum over both components
    x, y = torch.stack(shares).unbind(2)  # (S, B, H, W)
    columns, rows = pixel_grid(target)
    pixels = torch.stack([columns + width * x, rows + height * y], -1)
    warped, inside = sample(source, pixels)  # (S, B, 3, H, W)
    error = photometric_error(warped, target)
    by_image = masked_mean(error, inside, (-3, -2, -1))  # (S, B)
    terms = {
        "photometric": mean_over_scales(by_image.mean(1)),
        "smoothness": mean_over_scales(torch.stack(smooth)),
        "outside": 1 - inside[0].float().mean(),
    }
    views = {
        "flow": flows[0].detach(),
        "warped": warped[0].detach(),
    }
    terms["loss"] = terms["photometric"] + smoothness_weight * terms["smoothness"]
    return terms, views


def reconstruction_loss(
    reconstructions: list[Tensor],
    target: Tensor,
    removed: Tensor,
    everywhere: bool = False,
) -> Results:
    """Masked reconstruction: L1 over the removed pixels of each image.

    reconstructions: (B, 3, H / 2^s, W / 2^s) in (0, 1); removed: (B, 1, H, W) bool.
    everywhere: L1 over all pixels, as in the release.
    """
    pyramid = image_pyramid(target, len(reconstructions))
    trains = (removed | everywhere).float()
    losses = []
    for scale, reconstruction in enumerate(reconstructions):
        error = channel_mean((reconstruction - pyramid[scale]).abs())
        mask = F.max_pool2d(trains, 2**scale)  # 1 if any part of a pixel trains
        by_image = masked_mean(error, mask, (1, 2, 3))
        losses.append(by_image.mean())
    views = {"removed": removed, "reconstruction": reconstructions[0].detach()}
    return {"loss": mean_over_scales(torch.stack(losses))}, views


# ---------------------------------------------------------------------------------- segmentation
def segmentation_loss(logits: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Cross-entropy (Eq. 2) over labelled pixels, or 0 if there are none.

    logits: (B, classes, H, W); label: (B, H, W) int64 train ids, 255 where unlabelled.
    """
    errors = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    return {"loss": masked_mean(errors, label != IGNORE)}
