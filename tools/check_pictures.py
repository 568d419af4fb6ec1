"""What tools/check_data.py does with pictures: it compares them, warps a neighbour, draws the contact sheet.

    python tools/check_data.py --data kitti --data_path data/kitti --frame_ids 0 s --output contact.png

The neighbour is warped into the target's view as in Section 3.1 of the paper, so that a wrong K,
baseline or order shows as a difference.
"""

import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from images import resize_label
from losses import masked_mean, photometric_error, pose_to_matrix, synthesize
from pictures import colour_depth, colour_labels, colour_values, picture_grid

THUMBNAIL = (24, 32)  # height and width at which pictures are compared
ALIKE = 2.0  # of 255: pictures that differ less are taken for the same
WIDTH = 320  # pixels of a picture on the sheet
PLANES = 48  # distances tried where the other camera is matched


# ---------------------------------------------------------------------------------------------- comparing pictures


def thumbnails(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) from 0 to 255 at the size of comparison, (B, 3 * 24 * 32)."""
    return F.adaptive_avg_pool2d(images.float(), THUMBNAIL).flatten(1)


def difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).mean())


def same_pictures(
    first: list[np.ndarray], second: list[np.ndarray]
) -> list[tuple[int, int]]:
    """(place in first, place in second) of thumbnails of one picture, whatever its size or format."""
    first, second = (
        torch.tensor(np.stack(first)),
        torch.tensor(np.stack(second)),
    )
    pairs = []
    for start in range(0, len(first), 256):
        some = first[start : start + 256]
        distances = torch.cdist(some, second, p=1) / first.shape[1]
        nearest, column = distances.min(1)
        for row in (nearest < ALIKE).nonzero()[:, 0].tolist():
            pairs.append((start + row, int(column[row])))
    return pairs


def edge_agreement(image: Tensor, label: Tensor) -> float:
    """How much stronger an image (3, H, W) changes where its label (H, W) does than at the mirrored places.

    From 1.5 to 5 for real labels, about 1 for those of other images.
    """
    contrast = image.float().mean(0).diff(dim=1).abs()
    edges = label[:, 1:] != label[:, :-1]
    if not edges.any():
        return 1.0
    elsewhere = contrast[edges.flip(1)].mean()
    return float(contrast[edges].mean() / elsewhere.clamp(min=1e-3))


# ---------------------------------------------------------------------------------------------- warping a neighbour


def fill(depth: Tensor) -> Tensor:
    """Sparse depth (1, 1, H, W) with its holes closed from their edges; 0 where that does not reach."""
    for _ in range(depth.shape[2] // 6):
        known = depth > 0
        count = F.avg_pool2d(known.float(), 3, 1, 1)
        mean = F.avg_pool2d(depth, 3, 1, 1) / count.clamp(min=1e-6)
        depth = depth.where(known, mean)
    return depth


def reduce(K: Tensor, factor: int) -> Tensor:
    """K (1, 3, 3) of an image that is `factor` times smaller."""
    K = K.clone()
    K[:, :2] /= factor
    K[:, :2, 2] += 0.5 / factor - 0.5
    return K


def match(
    target: Tensor, source: Tensor, K: Tensor, T: Tensor
) -> tuple[Tensor, float]:
    """Depth (1, 1, H, W) at which the other camera fits best, and the error that is left.

    Tries a stack of planes, at half the size.
    """
    size = target.shape[2:]
    target = F.avg_pool2d(target, 2)
    source = F.avg_pool2d(source, 2)
    K = reduce(K, 2)
    far = torch.tensor(1.0)
    planes = []
    errors = []
    for disparity in torch.linspace(1, 0.2 * target.shape[3], PLANES):
        plane = K[0, 0, 0] * T[0, 0, 3].abs() / disparity
        depth = plane.expand(1, 1, *target.shape[2:])
        warped, seen = synthesize(source, depth, K, T)
        error = photometric_error(warped, target).where(seen, far)
        errors.append(F.avg_pool2d(error, 5, 1, 2, count_include_pad=False))
        planes.append(plane)
    least, best = torch.cat(errors, 1).min(1, keepdim=True)
    depth = torch.stack(planes)[best]
    return F.interpolate(depth, size, mode="nearest"), float(least.mean())


class Alignment:
    """Direct alignment, from coarse to fine: the motion that explains the source by the target's depth."""

    def __init__(
        self, target: Tensor, source: Tensor, depth: Tensor, K: Tensor
    ):
        self.images = (target, source)
        self.depth = depth
        self.K = K
        self.metres = depth[depth > 0].median() / 5  # a unit of translation

    def motion(self, numbers: Tensor) -> Tensor:
        """T (1, 4, 4) of six numbers (1, 6) of one order of magnitude."""
        return pose_to_matrix(
            numbers[:, :3] / 10, self.metres * numbers[:, 3:]
        )

    def shrunk(self, factor: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Target, source, depth and K, `factor` times smaller."""
        target, source = (F.avg_pool2d(image, factor) for image in self.images)
        depth = F.max_pool2d(self.depth, factor)
        return target, source, depth, reduce(self.K, factor)

    def error(self, numbers: Tensor, views: tuple) -> Tensor:
        """The mean difference that is left, of what `shrunk` returns."""
        target, source, depth, K = views
        warped, seen = synthesize(source, depth, K, self.motion(numbers))
        error = (warped - target).abs().mean(1, keepdim=True)
        return masked_mean(error, seen & (depth > 0))

    def solve(self) -> Tensor:
        """T (1, 4, 4), starting from the best of some steps forwards and backwards."""
        starts = torch.full((9, 1, 6), 1e-4)
        starts[:, 0, 5] = torch.linspace(-1, 1, 9)
        views = self.shrunk(4)
        errors = torch.stack([self.error(start, views) for start in starts])
        numbers = starts[errors.argmin()].clone().requires_grad_()
        for factor in (8, 4, 2):
            views = self.shrunk(factor)
            optimizer = torch.optim.Adam([numbers], lr=0.003 * factor)
            for _ in range(50):
                optimizer.zero_grad()
                self.error(numbers, views).backward()
                optimizer.step()
        return self.motion(numbers).detach()


class View:
    """A sample's target, its depth, a neighbour, and the neighbour warped into the target's view.

    `depth` is measured, or matched between stereo cameras, or None. `swapped` says whether the other
    camera fits better on the other side. neighbour: its place among the frames, or None.
    """

    def __init__(self, sample: dict, neighbour: int | None):
        frames = sample["frames"].float() / 255
        self.target = frames[:1]  # (1, 3, H, W)
        self.source = None
        if neighbour is not None:
            self.source = frames[neighbour : neighbour + 1]
        self.measured = sample["depth"][None] if "depth" in sample else None
        self.depth = None
        self.warped = None
        self.swapped = False
        K = sample["K"][None]
        T = sample["stereo_T"][None] if "stereo_T" in sample else None
        if T is not None:
            self.depth, error = match(self.target, self.source, K, T)
            _, reversed_error = match(self.target, self.source, K, T.inverse())
            self.swapped = reversed_error < error
        if self.measured is not None:
            self.depth = fill(self.measured)
        if self.depth is not None and self.source is not None:
            if T is None:
                T = Alignment(self.target, self.source, self.depth, K).solve()
            self.warped, seen = synthesize(self.source, self.depth, K, T)
            self.counted = seen & (self.depth > 0)

    def caption(self) -> str:
        """Mean difference from 0 to 1 of the neighbour, as it is and warped, where it can be warped."""
        if self.source is None:
            return ""
        before = (self.source - self.target).abs().mean(1, keepdim=True)
        if self.warped is None:
            return f"differs by {before.mean():.3f}"
        before = masked_mean(before, self.counted)
        after = masked_mean(self.difference(), self.counted)
        return f"differs by {before:.3f}, warped {after:.3f}"

    def pictures(self) -> list[Tensor]:
        """Target, depth, neighbour, warped neighbour, difference: (3, H, W) each, those that exist."""
        shown = [self.target[0]]
        if self.depth is not None:
            depth = self.depth if self.measured is None else self.measured
            nowhere_zero = depth.where(depth > 0, depth.max())
            coloured = colour_depth(nowhere_zero)[0]
            shown.append(coloured * (depth[0] > 0))
        if self.source is not None:
            shown.append(self.source[0])
        if self.warped is not None:
            unseen = 0.5 * self.target
            shown.append(self.warped.where(self.counted, unseen)[0])
        if self.source is not None:
            shown.append(colour_values(4 * self.difference()[0])[0])
        return [shrink(picture) for picture in shown]

    def difference(self) -> Tensor:
        """Of the target and the warped neighbour, or the neighbour as it is: (1, 1, H, W), 0 where it is unseen."""
        if self.warped is None:
            return (self.source - self.target).abs().mean(1, keepdim=True)
        error = (self.warped - self.target).abs().mean(1, keepdim=True)
        return error * self.counted

    def titles(self, neighbour: str | None) -> list[str]:
        found = ["target"]
        if self.measured is not None:
            found.append("measured depth")
        elif self.depth is not None:
            found.append("depth by matching")
        if self.source is not None:
            found.append(f"frame {neighbour}")
        if self.warped is not None:
            found.append("warped to the target")
        if self.source is not None:
            found.append("difference x 4")
        return found


# ---------------------------------------------------------------------------------------------- sheets


def shrink(picture: Tensor) -> Tensor:
    """(3, H, W) at the sheet's width."""
    size = (round(WIDTH * picture.shape[1] / picture.shape[2]), WIDTH)
    return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[
        0
    ].clamp(0, 1)


def clip_sheet(
    views: list[View], paths: list[str], neighbour: str | None
) -> Image.Image:
    """A row for every view, with its file's name and how far the neighbour differs."""
    names = [
        f"{path[-28:]} {view.caption()}" for view, path in zip(views, paths)
    ]
    rows = [view.pictures() for view in views]
    return picture_grid(rows, views[0].titles(neighbour), tuple(names))


def label_sheet(chosen: list[tuple]) -> Image.Image:
    """A row for every (data set, index): image, label, the label over the image; a legend below."""
    rows = []
    names = []
    for dataset, index in chosen:
        image, label = dataset.native(index)
        names.append(os.path.basename(dataset.pairs[index][0]))
        image = shrink(image.float() / 255)
        label = resize_label(label.to(torch.uint8), image.shape[1:])
        coloured = colour_labels(label[None], dataset.colours)[0]
        rows.append([image, coloured, 0.5 * (image + coloured)])
    titles = ["image", "label", "label over image"]
    sheet = picture_grid(same_height(rows), titles, tuple(names))
    legend = [
        *zip(dataset.colours, dataset.classes),
        ((0, 0, 0), "unlabelled"),
    ]
    return with_legend(sheet, legend)


def same_height(rows: list[list[Tensor]]) -> list[list[Tensor]]:
    """Pictures of lower rows padded at the bottom, as images of a set may differ in shape."""
    height = max(row[0].shape[1] for row in rows)
    padded = []
    for row in rows:
        below = height - row[0].shape[1]
        padded.append(
            [F.pad(picture, (0, 0, 0, below), value=1.0) for picture in row]
        )
    return padded


def with_legend(
    sheet: Image.Image, entries: list[tuple[tuple, str]]
) -> Image.Image:
    """The sheet with (colour, name) entries below it."""
    step = 160  # pixels from entry to entry, and from line to line
    line = 22
    across = max(1, sheet.width // step)
    lines = -(-len(entries) // across)
    whole = Image.new(
        "RGB", (sheet.width, sheet.height + lines * line), "white"
    )
    whole.paste(sheet)
    draw = ImageDraw.Draw(whole)
    font = ImageFont.load_default(13)
    for number, (colour, name) in enumerate(entries):
        x = number % across * step + 6
        y = sheet.height + number // across * line
        draw.rectangle((x, y + 3, x + 22, y + 17), tuple(colour), "gray")
        draw.text((x + 28, y + 2), name, "black", font)
    return whole
