"""Losses as pure functions: view synthesis, photometric error, smoothness, supervised depth, flow, reconstruction.

Conventions: images (B, 3, H, W) in [0, 1]; depth (B, 1, H, W) is camera z; disparity is the network's sigmoid in
(0, 1); K (B, 3, 3) in pixels with the first pixel's centre at (0, 0); T (B, 4, 4) maps target-camera points to
source-camera points. Every `grid_sample` uses align_corners=True, which is what pixel centres on integers mean.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from itertools import repeat

import torch
import torch.nn.functional as F

from utils import mean_over_ranks

SSIM_WEIGHT = 0.85  # photometric error = 0.85 SSIM + 0.15 L1
C1, C2 = 0.01 ** 2, 0.03 ** 2


def constant(like: torch.Tensor, *values: float) -> torch.Tensor:
    """A small vector filled on the device of `like`: copying it there would make the CPU wait for a GPU."""
    return torch.stack([like.new_full((), value) for value in values])


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where the mask (of the same shape) is set, 0 where it nowhere is.

    Where several processes share a batch, the mean of what they return is that over the whole batch.
    """
    return (values * mask).sum() / mean_over_ranks(mask.sum().float()).clamp(min=1)


# ---------------------------------------------------------------------------------------------- geometry

def disparity_to_depth(disparity: torch.Tensor, min_depth: float, max_depth: float) -> torch.Tensor:
    """1 / depth runs linearly from 1 / max_depth at disparity 0 to 1 / min_depth at disparity 1."""
    return 1 / (1 / max_depth + (1 / min_depth - 1 / max_depth) * disparity)


def depth_to_disparity(depth: float, min_depth: float, max_depth: float) -> float:
    """The inverse of `disparity_to_depth`."""
    return (1 / depth - 1 / max_depth) / (1 / min_depth - 1 / max_depth)


def pose_to_matrix(axisangle: torch.Tensor, translation: torch.Tensor, invert: bool = False) -> torch.Tensor:
    """Axis-angle (B, 3) in radians and translation (B, 3) -> (B, 4, 4): x -> R x + t, or its inverse."""
    angle = axisangle.norm(dim=1, keepdim=True)
    x, y, z = (axisangle / (angle + 1e-7)).unbind(1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3)
    axis = torch.stack([x, y, z], 1)
    sin, cos = angle.sin()[..., None], angle.cos()[..., None]
    eye = torch.eye(3, dtype=axisangle.dtype, device=axisangle.device)
    # Rodrigues with the outer product spelled out, so that a vanishing axis gives cos * I
    rotation = cos * eye + sin * cross + (1 - cos) * axis[:, :, None] * axis[:, None, :]
    translation = translation[..., None]
    if invert:
        rotation = rotation.transpose(1, 2)
        translation = -rotation @ translation
    bottom = constant(eye, 0, 0, 0, 1).expand(len(axisangle), 1, 4)
    return torch.cat([torch.cat([rotation, translation], 2), bottom], 1)


def pixel_rays(K: torch.Tensor, T: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All of projection but the depth: a target pixel at depth d lands in the source view at d * ray + origin.

    Returns rays (B, 3, height, width) and origins (B, 3, 1, 1), in the source's homogeneous pixels.
    """
    y, x = torch.meshgrid(torch.arange(height, dtype=K.dtype, device=K.device),
                          torch.arange(width, dtype=K.dtype, device=K.device), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).view(1, 3, -1)
    # K (R d K^-1 p + t) = d (K R K^-1) p + K t: one matrix product a view instead of three
    rays = K @ T[:, :3, :3] @ torch.linalg.inv_ex(K)[0] @ pixels  # inv would wait for the device, to check
    return rays.view(-1, 3, height, width), (K @ T[:, :3, 3:])[..., None]


def project(depth: torch.Tensor, K: torch.Tensor, T: torch.Tensor,
            rays: tuple[torch.Tensor, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each target pixel lands in the source view; rays: `pixel_rays` of K and T where they are at hand.

    Returns pixel coordinates (B, H, W, 2), x then y, and the points' depth z in the source camera (B, 1, H, W).
    """
    rays, origin = rays or pixel_rays(K, T, *depth.shape[2:])
    points, z = torch.addcmul(origin, depth, rays).split((2, 1), 1)
    divisor = z + 1e-7
    divisor = divisor + (divisor == 0)  # infinities would turn the gradient of grid_sample into NaN
    return (points / divisor).permute(0, 2, 3, 1), z


def sample(image: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear samples of `image` at `pixels` (B, H, W, 2); outside, the border's colour.

    Returns samples (B, C, H, W) and where the position was inside the image (B, 1, H, W) bool.
    """
    grid = pixels * (2 / constant(pixels, image.shape[3] - 1, image.shape[2] - 1)) - 1
    inside = (grid.detach().abs() <= 1).all(3)[:, None]  # NaN compares false
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True), inside


def synthesize(source: torch.Tensor, depth: torch.Tensor, K: torch.Tensor, T: torch.Tensor,
               rays: tuple[torch.Tensor, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """View synthesis: the target view painted with the source's colours, (B, 3, H, W).

    Also returns where that colour means something (B, 1, H, W) bool: in front of the source camera and in its image.
    """
    pixels, z = project(depth, K, T, rays)
    warped, inside = sample(source, pixels)
    return warped, inside & (z > 0)


# ---------------------------------------------------------------------------------------------- photometric error

def box3(x: torch.Tensor) -> torch.Tensor:
    """Sum over 3x3 windows of an already padded map; shifted sums are several times faster than avg_pool2d on a CPU."""
    rows = x[:, :, :-2] + x[:, :, 1:-1]
    rows += x[:, :, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1]
    sums += rows[..., 2:]
    return sums


def local_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Padded map, 3x3 mean and variance: of a target they are needed once, however many views are compared with it."""
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    mean = box3(padded) / 9
    return padded, mean, box3(padded * padded) / 9 - mean * mean


class SsimError(torch.autograd.Function):
    """`ssim_error` with its derivative written out: five maps are kept for it, where recording would keep thirty."""

    @staticmethod
    def forward(ctx, prediction: torch.Tensor, target: torch.Tensor, mean_y: torch.Tensor,
                var_y: torch.Tensor) -> torch.Tensor:
        padded = F.pad(prediction, (1, 1, 1, 1), mode="reflect")
        mean_x = box3(padded).div_(9)
        product, square = mean_x * mean_y, mean_x * mean_x
        contrast = box3(padded * target).div_(4.5).sub_(product, alpha=2).add_(C2)  # 2 covariance + C2
        variances = box3(padded * padded).div_(9).sub_(square).add_(var_y).add_(C2)  # var_x + var_y + C2
        luminance = product.mul_(2).add_(C1)  # 2 mean_x mean_y + C1
        means = square.addcmul_(mean_y, mean_y).add_(C1)  # mean_x^2 + mean_y^2 + C1
        inverse = (means * variances).reciprocal_()
        by_contrast = luminance * inverse  # d ssim / d contrast
        ssim = by_contrast * contrast
        if ctx.needs_input_grad[0]:
            # half of d ssim / d mean(x), d mean(x^2) and d mean(x y)
            by_mean = (contrast - luminance).mul_(mean_y).addcmul_((variances - means).mul_(ssim), mean_x, value=-1)
            ctx.save_for_backward(padded, target, by_mean.mul_(inverse), ssim / variances, by_contrast)
        return ssim.mul_(-0.5).add_(0.5).clamp_(0, 1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        padded, target, by_mean, by_square, by_contrast = ctx.saved_tensors
        # a pixel belongs to nine windows; in each it counts through mean_x, the mean of x^2 and that of x y
        windows = [box3(F.pad(part * gradient, (2, 2, 2, 2))) for part in (by_mean, by_square, by_contrast)]
        total = windows[0].addcmul_(windows[1], padded, value=-1).addcmul_(windows[2], target)
        total[:, :, 2] += total[:, :, 0]  # what was reflected at the border
        total[:, :, -3] += total[:, :, -1]
        total[..., 2] += total[..., 0]
        total[..., -3] += total[..., -1]
        return total[:, :, 1:-1, 1:-1] / -9, None, None, None  # error = (1 - ssim) / 2; a window averages nine


def ssim_error(prediction: torch.Tensor, target_statistics: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """clamp((1 - SSIM) / 2, 0, 1) per pixel and channel, (B, C, H, W); of the target, its `local_statistics`."""
    return SsimError.apply(prediction, *target_statistics)


def photometric_error(prediction: torch.Tensor, target: torch.Tensor, target_statistics: tuple | None = None,
                      ssim: bool = True) -> torch.Tensor:
    """0.85 SSIM + 0.15 L1, averaged over channels: (B, 1, H, W). `target_statistics`: `local_statistics(target)`."""
    l1 = (prediction - target).abs().mean(1, keepdim=True)
    if not ssim:
        return l1
    structure = ssim_error(prediction, target_statistics or local_statistics(target)).mean(1, keepdim=True)
    return SSIM_WEIGHT * structure + (1 - SSIM_WEIGHT) * l1


def smoothness(values: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Edge-aware first-order smoothness: gradients of `values` (B, C, H, W), damped where the image has edges."""
    return sum((values.diff(dim=d).abs() * (-image.diff(dim=d).abs().mean(1, keepdim=True)).exp()).mean()
               for d in (3, 2))


def disparity_smoothness(disparity: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Smoothness of disparity divided by its mean, so that shrinking the depth does not lower it."""
    return smoothness(disparity / (disparity.mean((2, 3), keepdim=True) + 1e-7), image)


def upsample(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A coarse scale's map at full resolution (H, W), where the losses compare."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def image_pyramid(image: torch.Tensor, levels: int = 4) -> list[torch.Tensor]:
    """The image and its halvings by area: what the coarser scales' smoothness looks at."""
    return [image] + [F.avg_pool2d(image, 2 ** level) for level in range(1, levels)]


# ---------------------------------------------------------------------------------------------- self-supervised depth

def depth_loss(disparities: list[torch.Tensor], pyramid: list[torch.Tensor], sources: list[torch.Tensor],
               K: torch.Tensor, poses: list[torch.Tensor], *, min_depth: float = 0.1, max_depth: float = 100.0,
               smoothness_weight: float = 1e-3, automask: bool = True, minimum: bool = True, ssim: bool = True,
               mask_outside: bool = True, compare: Callable = photometric_error,
               batched: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Photometric depth loss of Monodepth2: first term of Eq. (1), at four scales and full resolution.

    disparities: sigmoid outputs, finest first; pyramid: the target image at those scales (`image_pyramid`);
    sources and poses: one image (B, 3, H, W) and one T (B, 4, 4) a source view.
    minimum: the best source counts at each pixel, else their mean. automask: pixels that an unmoved source explains at
    least as well as the warped one do not train (they still count in the reported value, as in Monodepth2).
    mask_outside: views that see a pixel behind them or outside their image do not compete; False compares with the
    border's colour, as Monodepth2 does. ssim: False leaves L1 alone. Both are for parity and ablations.
    compare: `photometric_error`, maybe compiled. batched: the scales go through as one batch, not one after the other.
    Returns (terms, views): scalars "loss", "photometric", "smoothness", "masked" (share of pixels that do not train);
    finest-scale maps "depth", "warped" (B, sources, 3, H, W) and "mask" (B, 1, H, W) bool, True where it trains.
    """
    target, B = pyramid[0], len(pyramid[0])
    statistics = local_statistics(target)

    def reduce(errors: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:  # both (B, sources, H, W)
        if minimum:
            return errors.masked_fill(~seen, torch.inf).amin(1, keepdim=True)
        return (errors * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)

    identity = torch.zeros_like(target[:, :1])
    if automask:  # the same at every scale: computed once, without gradients
        with torch.no_grad():
            unmoved = torch.cat([compare(source, target, statistics, ssim) for source in sources], 1)
            identity = reduce(unmoved, torch.ones_like(unmoved, dtype=torch.bool))
    rays = [pixel_rays(K, T, *target.shape[2:]) for T in poses]  # as are these
    full = [upsample(disparity, target.shape[2:]) for disparity in disparities]
    if batched:
        def repeated(maps: Iterable[torch.Tensor]) -> list[torch.Tensor]:
            return [x.repeat(len(disparities), 1, 1, 1) for x in maps]

        full, sources, statistics = [torch.cat(full)], repeated(sources), repeated(statistics)
        rays, (target, identity) = [repeated(r) for r in rays], repeated((target, identity))

    photometric, views = [], {}
    for disparity in full:
        depth = disparity_to_depth(disparity, min_depth, max_depth)
        warped, valid = zip(*[synthesize(*view) for view in zip(sources, repeat(depth), repeat(K), poses, rays)])
        errors = torch.cat([compare(view, target, statistics, ssim) for view in warped], 1)
        seen = torch.cat(valid, 1) | (not mask_outside)
        error, trains = reduce(errors, seen), seen.any(1, keepdim=True)
        if automask:
            trains = trains & (error < identity)
        error = torch.where(trains, error, identity)
        photometric.append(error.mean())
        if not views:  # the finest scale
            views = {"depth": depth[:B].detach(), "warped": torch.stack(warped, 1)[:B].detach(), "mask": trains[:B]}

    smooth = [disparity_smoothness(*level) / 2 ** scale for scale, level in enumerate(zip(disparities, pyramid))]
    terms = {"photometric": torch.stack(photometric).mean(), "smoothness": torch.stack(smooth).mean()}
    terms["loss"] = terms["photometric"] + smoothness_weight * terms["smoothness"]
    terms["masked"] = 1 - views["mask"].float().mean()
    return terms, views


# ---------------------------------------------------------------------------------------------- supervised depth

def supervised_depth_loss(depth: torch.Tensor, measured: torch.Tensor, relative: bool = False) -> torch.Tensor:
    """Second term of Eq. (1): L1 over measured pixels only (measured > 0), 0 when nothing was measured.

    In metres, as in the paper; or relative to what was measured, where a metre counts more the closer it is.
    """
    valid = measured > 0
    error = (depth - measured).abs()
    return masked_mean(error / measured.where(valid, 1) if relative else error, valid)


def scale_shift_invariant_loss(prediction: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """For relative depth: mean |s * prediction + t - target| with the least-squares s, t of each image.

    prediction, target: (B, 1, H, W), in the same space (disparity, say); valid: bool, same shape. The error is divided
    by the target's mean absolute deviation, so that images of different depth ranges weigh the same.
    """
    weight = valid.flatten(1).float()
    count = weight.sum(1, keepdim=True).clamp(min=1)
    p, q = prediction.flatten(1), target.flatten(1)
    p_mean, q_mean = (p * weight).sum(1, keepdim=True) / count, (q * weight).sum(1, keepdim=True) / count
    p_centred, q_centred = (p - p_mean) * weight, (q - q_mean) * weight
    scale = (p_centred * q_centred).sum(1, keepdim=True) / (p_centred ** 2).sum(1, keepdim=True).clamp(min=1e-9)
    scale = scale.clamp(min=0)  # a negative one would make an inside-out picture a perfect one
    spread = (q_centred.abs().sum(1, keepdim=True) / count).clamp(min=1e-9)
    error = (scale * p_centred - q_centred).abs().sum(1, keepdim=True) / count / spread
    return masked_mean(error, weight.sum(1, keepdim=True) > 0)


def measured_depth_loss(disparities: list[torch.Tensor], measured: torch.Tensor, min_depth: float, max_depth: float,
                        kind: str = "l1") -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Supervised depth at four scales and full resolution, which trains every head as the photometric loss does.

    disparities: sigmoid outputs, finest first; measured: (B, 1, H, W) metres, 0 = no measurement; kind: "l1" in metres
    (paper), "abs_rel" (L1 / measured), or "affine" (1 / depth up to scale and shift).
    Returns terms ("loss") and views ("depth").
    """
    by_scale = []
    for scale, disparity in enumerate(disparities):
        full = upsample(disparity, measured.shape[2:])
        if kind == "affine":
            by_scale.append(scale_shift_invariant_loss(full, 1 / measured.clamp(min=min_depth), measured > 0))
        else:
            depth = disparity_to_depth(full, min_depth, max_depth)
            by_scale.append(supervised_depth_loss(depth, measured, relative=kind == "abs_rel"))
    finest = disparity_to_depth(disparities[0], min_depth, max_depth).detach()
    return {"loss": torch.stack(by_scale).mean()}, {"depth": finest}


# ---------------------------------------------------------------------------------------------- the two baselines

def flow_loss(flows: list[torch.Tensor], pyramid: list[torch.Tensor], source: torch.Tensor,
              smoothness_weight: float = 2.0,
              mask_outside: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Optical flow baseline (Section 4.1): photometric error of the source warped by the flow, edge-aware smoothness.

    flows: (B, 2, H / 2^s, W / 2^s) in pixels of their own scale, from target to source; scale weights 1 / 2^s.
    Returns terms "loss", "photometric", "smoothness", "outside" and the finest scale's "flow" and "warped".
    """
    target = pyramid[0]
    H, W = target.shape[2:]
    statistics = local_statistics(target)
    y, x = torch.meshgrid(torch.arange(H, device=target.device), torch.arange(W, device=target.device), indexing="ij")
    pixels = torch.stack([x, y], -1).to(target.dtype)
    photometric, smooth, weights, views = [], [], [], {}
    for scale, flow in enumerate(flows):
        full = 2 ** scale * upsample(flow, (H, W))
        warped, inside = sample(source, pixels + full.permute(0, 2, 3, 1))
        error = photometric_error(warped, target, statistics)
        photometric.append(masked_mean(error, inside) if mask_outside else error.mean())
        size = constant(flow, flow.shape[3], flow.shape[2]).view(1, 2, 1, 1)
        smooth.append(smoothness(flow / size, pyramid[scale]))  # as a share of the image, whatever the resolution
        weights.append(1 / 2 ** scale)
        if scale == 0:
            views = {"flow": flow.detach(), "warped": warped.detach()}
            outside = 1 - inside.float().mean()
    weights = constant(target, *weights) / sum(weights)
    terms = {"photometric": (torch.stack(photometric) * weights).sum(),
             "smoothness": (torch.stack(smooth) * weights).sum()}
    terms["loss"] = terms["photometric"] + smoothness_weight * terms["smoothness"]
    terms["outside"] = outside
    return terms, views


def reconstruction_loss(reconstructions: list[torch.Tensor], pyramid: list[torch.Tensor],
                        removed: torch.Tensor) -> torch.Tensor:
    """Masked-reconstruction baseline (Table 4): L1 over removed pixels, scale weights 1 / 2^s.

    reconstructions: (B, 3, H / 2^s, W / 2^s) in (0, 1); removed: (B, 1, H, W) bool.
    """
    losses, weights = [], []
    for scale, prediction in enumerate(reconstructions):
        # a coarse pixel counts if any part of it was removed
        mask = F.adaptive_max_pool2d(removed.float(), prediction.shape[2:])
        error = (prediction - pyramid[scale]).abs().mean(1, keepdim=True)
        losses.append(masked_mean(error, mask))
        weights.append(1 / 2 ** scale)
    weights = constant(losses[0], *weights)
    return (torch.stack(losses) * weights).sum() / weights.sum()


# ---------------------------------------------------------------------------------------------- what is not finite

def refuse_nonfinite(terms: dict[str, torch.Tensor], parts: dict[str, torch.nn.Module], step: int,
                     indices: torch.Tensor, rerun: Callable[[], tuple[dict, object]] | None = None) -> None:
    """Between backward and update, end a run whose loss or gradients are not finite: one line, exit code 1.

    indices: of the samples; rerun: computes the terms of this step again, to name the layer.
    """
    bad = [f"{name} is {value.item()}" for name, value in terms.items() if not value.isfinite()]
    gradients = {f"{part}.{name}": parameter.grad for part, module in parts.items()
                 for name, parameter in module.named_parameters() if parameter.grad is not None}
    if not bad and not torch.nn.utils.get_total_norm(gradients.values()).isfinite():
        bad = [f"the gradient of {name} is not finite" for name, g in gradients.items() if not g.isfinite().all()][-1:]
    if bad:
        found = find_nonfinite(rerun, parts) if rerun else "the same command with --detect names the layer"
        sys.exit(f"stopped: {bad[0]} at step {step} (samples {indices.tolist()}), nothing was overwritten; {found}")


def find_nonfinite(rerun: Callable[[], tuple[dict, object]], parts: dict[str, torch.nn.Module]) -> str:
    """Compute a step again: the first layer whose output is not finite, or the operation whose gradient is not."""
    layers, operation = [], "no layer's output, but the loss itself"

    def watch(name: str) -> Callable:
        def look(module: torch.nn.Module, inputs: tuple, output: object) -> None:
            outputs = output if isinstance(output, (list, tuple)) else [output]
            if not all(x.isfinite().all() for x in outputs if torch.is_tensor(x)):
                layers.append(name)
        return look

    hooks = [module.register_forward_hook(watch(f"{part}.{name}")) for part, whole in parts.items()
             for name, module in whole.named_modules()]
    with warnings.catch_warnings(record=True) as notes, torch.autograd.detect_anomaly():
        try:
            rerun()[0]["loss"].backward()
        except RuntimeError as error:
            operation, trace = str(error).splitlines()[0], "\n".join(str(note.message) for note in notes)
            for path, line, function in re.findall(r'File "(?!.*site-packages)(.+)", line (\d+), in (\w+)', trace)[-1:]:
                operation += f" It belongs to {os.path.basename(path)} line {line}, {function}"
    for hook in hooks:
        hook.remove()
    return f"first in the output of {layers[0]}" if layers else operation
