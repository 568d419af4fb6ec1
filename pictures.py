"""Pictures: depth, labels and flow in colour, and grids with titles."""

import re

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from batches import NEUTRAL

DEPTH_COLOURS = torch.tensor([
    (13, 8, 35),  # far
    (59, 15, 112),
    (114, 31, 129),
    (168, 46, 126),
    (222, 73, 104),
    (248, 118, 92),
    (254, 167, 111),
    (254, 211, 149),
    (252, 248, 196),  # near
]) / 255


def colour_values(values: Tensor) -> Tensor:
    """Values (B, H, W) from 0 to 1 as colours (B, 3, H, W) from dark to bright."""
    colours = DEPTH_COLOURS.to(values.device)
    last = len(colours) - 1
    position = last * values.clamp(0, 1)
    below = position.long().clamp(max=last - 1)
    share = (position - below)[..., None]
    mixed = torch.lerp(colours[below], colours[below + 1], share)
    return mixed.permute(0, 3, 1, 2)


def colour_depth(depth: Tensor, near: float | None = None,
                 far: float | None = None) -> Tensor:
    """Depth (B, 1, H, W) as colours (B, 3, H, W), linear in 1/depth.

    The range is near to far; by default each image's 2nd to 98th percentile.
    """
    inverse = 1 / depth[:, 0].clamp(min=1e-6)  # (B, H, W)
    if near is None:
        few = inverse.flatten(1)[:, ::1 + inverse[0].numel() // 100_000]
        shares = few.new_tensor([0.02, 0.98])
        low, high = few.quantile(shares, dim=1)  # (B,)
        low = low[:, None, None]
        high = high[:, None, None]
    else:
        low = torch.tensor(1 / far)
        high = torch.tensor(1 / near)
    spread = (high - low).clamp(min=1e-9)
    return colour_values((inverse - low) / spread)


def colour_labels(label: Tensor, colours: tuple) -> Tensor:
    """Train ids (B, H, W) as colours (B, 3, H, W); ignored pixels black."""
    table = torch.zeros(256, 3)
    table[:len(colours)] = torch.tensor(colours) / 255
    coloured = table.to(label.device)[label.long()]
    return coloured.permute(0, 3, 1, 2)


def colour_flow(flow: Tensor) -> Tensor:
    """Flow (B, 2, H, W) as colours (B, 3, H, W): hue is direction, saturation is length."""
    from torchvision.utils import flow_to_image
    return flow_to_image(flow) / 255


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] as a Pillow image."""
    values = 255 * image.clamp(0, 1)
    values = values.round().byte().cpu()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def picture_grid(rows: list[list], columns: list[str], names: tuple = ()) -> Image.Image:
    """Pictures (3, H, W) in [0, 1] in rows, under column titles and beside row names."""
    font = ImageFont.load_default(14)
    height, width = rows[0][0].shape[1:]
    titles = [wrap(title, font, width) for title in columns]
    lines = [line for title in titles for line in title.splitlines()]
    longest = max(font.getlength(line) for line in lines)
    height += 4
    width = max(width + 4, int(longest) + 8)
    top = 8 + 18 * max(title.count("\n") + 1 for title in titles)
    left = 0
    if names:
        left = 12 + max(int(font.getlength(name)) for name in names)
    right = left + len(columns) * width
    bottom = top + len(rows) * height
    grid = Image.new("RGB", (right, bottom), "white")
    draw = ImageDraw.Draw(grid)
    for c, title in enumerate(titles):
        x = left + c * width
        draw.multiline_text((x + 2, 4), title, "black", font)
        for r, row in enumerate(rows):
            y = top + r * height
            grid.paste(to_picture(row[c]), (x, y))
    for r, name in enumerate(names):
        y = top - 8 + (r + 0.5) * height
        draw.text((6, y), name, "black", font)
    return grid


def wrap(title: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The title in lines of at most this width where it can be broken: after _ and spaces."""
    lines = [""]
    for piece in re.findall(r"[^_ ]+[_ ]*|[_ ]+", title):
        if lines[-1] and font.getlength(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def draw_views(target: Tensor, views: dict, count: int = 4) -> Image.Image:
    """One row per image: the target (B, 3, H, W), and the views that a loss returned of it."""
    few = {key: view[:count] for key, view in views.items()}
    target = target[:count]
    columns = {"image": target}
    if "depth" in few:
        columns["depth"] = colour_depth(few["depth"])
    if "flow" in few:
        columns["flow"] = colour_flow(few["flow"])
    if "warped" in few:
        warped = few["warped"]
        if warped.dim() == 5:  # of several sources, (B, V, 3, H, W)
            warped = warped[:, 0]
        columns["warped source"] = warped
    if "mask" in few:
        mask = few["mask"].float()
        columns["trains here"] = mask.expand(-1, 3, -1, -1)
    if "removed" in few:
        columns["input"] = target.masked_fill(few["removed"], NEUTRAL)
        columns["reconstruction"] = few["reconstruction"]
    return picture_grid(by_image(columns), list(columns))


def by_image(columns: dict[str, Tensor]) -> list[tuple]:
    """Rows of pictures from columns of them."""
    return list(zip(*columns.values()))


def draw_labels(images: Tensor, label: Tensor, prediction: Tensor,
                colours: tuple, count: int = 4) -> Image.Image:
    """One row per image (B, 3, H, W): with its label and the prediction, train ids (B, H, W)."""
    columns = {
        "image": images[:count],
        "label": colour_labels(label[:count], colours),
        "prediction": colour_labels(prediction[:count], colours),
    }
    return picture_grid(by_image(columns), list(columns))
