"""Pictures: depth, labels and flow in colour, and grids with titles."""

import torch
from PIL import Image, ImageDraw, ImageFont

REMOVED_COLOUR = 0.45  # of removed pixels: 0 once the encoder has normalised

DEPTH_COLOURS = torch.tensor([  # dark = far, bright = near
    (13, 8, 35), (59, 15, 112), (114, 31, 129), (168, 46, 126), (222, 73, 104), (248, 118, 92),
    (254, 167, 111), (254, 211, 149), (252, 248, 196)]) / 255


def colour_values(values: torch.Tensor) -> torch.Tensor:
    """Values (B, H, W) from 0 to 1 as colours (B, 3, H, W) from dark to bright."""
    position = values.clamp(0, 1) * (len(DEPTH_COLOURS) - 1)
    below = position.long().clamp(max=len(DEPTH_COLOURS) - 2)
    colours = DEPTH_COLOURS.to(values.device)
    mixed = torch.lerp(colours[below], colours[below + 1], (position - below)[..., None])
    return mixed.permute(0, 3, 1, 2)


def colour_depth(depth: torch.Tensor, near: float | None = None,
                 far: float | None = None) -> torch.Tensor:
    """Depth (B, 1, H, W) as colours (B, 3, H, W), linear in 1/depth.

    The range is near to far; by default each image's 2nd to 98th percentile.
    """
    inverse = 1 / depth[:, 0].clamp(min=1e-6)
    ordered = inverse.flatten(1).sort(1).values
    last = ordered.shape[1] - 1
    low = 1 / far if far else ordered[:, int(0.02 * last)].view(-1, 1, 1)
    high = 1 / near if near else ordered[:, int(0.98 * last)].view(-1, 1, 1)
    spread = torch.as_tensor(high - low).clamp(min=1e-9)
    return colour_values((inverse - low) / spread)


def colour_labels(label: torch.Tensor, colours: tuple) -> torch.Tensor:
    """Train ids (B, H, W) as colours (B, 3, H, W); ignored pixels black."""
    table = torch.zeros(256, 3)
    table[:len(colours)] = torch.tensor(colours) / 255
    return table.to(label.device)[label.long()].permute(0, 3, 1, 2)


def colour_flow(flow: torch.Tensor) -> torch.Tensor:
    """Flow (B, 2, H, W) as colours (B, 3, H, W): hue is direction, saturation is length."""
    from torchvision.utils import flow_to_image
    return flow_to_image(flow) / 255


def to_picture(image: torch.Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] as a Pillow image."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def picture_grid(rows: list[list], columns: list[str], names: tuple = ()) -> Image.Image:
    """Pictures (3, H, W) in [0, 1] in rows, under column titles and beside row names."""
    font = ImageFont.load_default(14)
    height, width = (side + 4 for side in rows[0][0].shape[1:])
    width = max([width, *(int(font.getlength(title)) + 8 for title in columns)])  # titles fit
    left = max([int(font.getlength(name)) + 12 for name in names], default=0)
    grid = Image.new("RGB", (left + len(columns) * width, 24 + len(rows) * height), "white")
    draw = ImageDraw.Draw(grid)
    for c, title in enumerate(columns):
        draw.text((left + c * width + 2, 4), title, "black", font)
    for r, name in enumerate(names):
        draw.text((6, 16 + (r + 0.5) * height), name, "black", font)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            grid.paste(to_picture(picture), (left + c * width, 24 + r * height))
    return grid


def draw_views(target: torch.Tensor, views: dict, count: int = 4) -> Image.Image:
    """A row an image: the target (B, 3, H, W), and the views that a loss returned of it."""
    views = {key: view[:count] for key, view in views.items()}
    columns = {"image": target[:count]}
    if "depth" in views:
        columns["depth"] = colour_depth(views["depth"])
    if "flow" in views:
        columns["flow"] = colour_flow(views["flow"])
    if "warped" in views:
        warped = views["warped"]  # depth warps several sources, (B, S, 3, H, W)
        columns["warped source"] = warped[:, 0] if warped.dim() == 5 else warped
    if "mask" in views:
        columns["trains here"] = views["mask"].float().expand(-1, 3, -1, -1)
    if "removed" in views:
        columns["input"] = columns["image"].masked_fill(views["removed"], REMOVED_COLOUR)
        columns["reconstruction"] = views["reconstruction"]
    rows = [list(row) for row in zip(*columns.values())]
    return picture_grid(rows, list(columns))


def draw_labels(images: torch.Tensor, label: torch.Tensor, prediction: torch.Tensor,
                colours: tuple, count: int = 4) -> Image.Image:
    """A row an image (B, 3, H, W): with its label and the prediction, train ids (B, H, W)."""
    label = colour_labels(label[:count], colours)
    prediction = colour_labels(prediction[:count], colours)
    rows = [list(row) for row in zip(images[:count], label, prediction)]
    return picture_grid(rows, ["image", "label", "prediction"])
