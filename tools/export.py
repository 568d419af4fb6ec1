#!/usr/bin/env python3
"""Exports a network for use elsewhere: ONNX, torch.export, or Monodepth2's folder of weights.

    python tools/export.py --weights runs/NAME --output depth.onnx
    python tools/export.py --weights runs/NAME --output depth.pt2 --format torch --dynamic
    python tools/export.py --weights runs/NAME --output my_model --format monodepth2

ONNX and torch.export map images (B, 3, H, W) in [0, 1] to depth (B, 1, H, W), class scores
(B, classes, H, W) or, for reconstruction, colours (B, 3, H, W); of DPT and Depth Anything to
inverse depth, up to scale and shift. The input is called "image", the output like the task.
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import losses
import networks
import weights
from utils import InputError, Parser, run_main, write_atomically
from weights import MONODEPTH2_RANGE, MONODEPTH2_UNIT


class Exported(nn.Module):
    """The whole way from images (B, 3, H, W) in [0, 1] to depth, class scores or colours."""

    def __init__(self, model: nn.Module, options: dict):
        super().__init__()
        self.model = model
        self.task = options["task"]
        self.inverse_depth = options.get("output") == "inverse depth"  # DPT, Depth Anything
        self.min_depth = options.get("min_depth")
        self.max_depth = options.get("max_depth")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        output = self.model(image)[0]  # the finest scale
        if self.task == "segmentation":
            return output
        if self.inverse_depth:
            return output.relu()
        values = output.sigmoid()
        if self.task == "depth":
            return losses.disparity_to_depth(values, self.min_depth, self.max_depth)
        return values


def trace(model: nn.Module, options: dict, dynamic: bool) -> torch.export.ExportedProgram:
    """The network as a graph, for its training size or, if dynamic, for any batch and size."""
    batch = 2 if dynamic else 1
    example = torch.rand(batch, 3, options["height"], options["width"])
    shapes = None
    if dynamic:
        if options["encoder"] in networks.VITS:
            raise InputError("--dynamic is not for a ViT, whose position embeddings have one size")
        stride = model.encoder.stride
        rows = torch.export.Dim("rows", min=2, max=128)
        columns = torch.export.Dim("columns", min=2, max=128)
        count = torch.export.Dim("batch", min=1, max=1024)
        shapes = ({0: count, 2: stride * rows, 3: stride * columns},)
    exported = Exported(model, options).eval()
    return torch.export.export(exported, (example,), dynamic_shapes=shapes)


def save_onnx(path: str, program: torch.export.ExportedProgram, task: str) -> None:
    if not find_spec("onnx") or not find_spec("onnxscript"):
        raise InputError("--format onnx needs two more packages: pip install onnx onnxscript")
    graph = torch.onnx.export(
        program,
        opset_version=18,
        input_names=["image"],
        output_names=[task],
        verbose=False,
    )
    content = graph.model_proto.SerializeToString()
    write_atomically(path, lambda file: file.write(content))


def save_monodepth2(folder: str, parts: dict, options: dict) -> None:
    """Write encoder.pth, depth.pth and, if there is a pose network, pose_encoder.pth and pose.pth.

    Monodepth2 knows two depth ranges, with and without stereo; any other is added to encoder.pth.
    """
    on_resnet = options["arch"] == "unet" and options["encoder"].startswith("resnet")
    if options["task"] != "depth" or not on_resnet:
        what = f"{options['task']} by {options['arch']} on {options['encoder']}"
        raise InputError(f"--format monodepth2 is for depth by the U-Net on a ResNet, this is {what}")
    depth_range = options["min_depth"], options["max_depth"]
    stereo_range = tuple(MONODEPTH2_UNIT * limit for limit in MONODEPTH2_RANGE)
    stereo = bool(options.get("use_stereo")) or depth_range == stereo_range
    extra = {
        "height": options["height"],
        "width": options["width"],
        "use_stereo": stereo,
    }
    if not stereo and depth_range != MONODEPTH2_RANGE:
        extra["min_depth"], extra["max_depth"] = depth_range
        extra["metric"] = bool(options.get("metric"))

    files = {"encoder": {**parts["encoder"], **extra}, "depth": parts["decoder"]}
    if "pose" in parts:
        unit = MONODEPTH2_UNIT if stereo and options.get("metric") else 1.0
        files["pose_encoder"] = parts["pose_encoder"]
        files["pose"] = networks.scale_translation(parts["pose"], 1 / unit)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = str(Path(folder) / f"{name}.pth")
        write_atomically(path, partial(torch.save, content))


def parse_options(argv: list[str] | None = None) -> Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--weights", required=True, help="run folder, model.pt, or another readable checkpoint")
    add("--output", required=True, metavar="PATH", help="a file, or for monodepth2 a folder")
    add(
        "--format",
        choices=("onnx", "torch", "monodepth2"),
        default="onnx",
        help="one file, or for monodepth2 a folder of weights",
    )
    add("--dynamic", action="store_true", help="for any batch and size, not one image of its own")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_options()
    model, options = weights.load_model(args.weights)
    if options["task"] == "flow":
        raise InputError(f"{args.weights}: a flow network, which takes two images, is not exported")
    if args.format == "monodepth2":
        _, parts, _ = weights.read_checkpoint(args.weights)
        save_monodepth2(args.output, parts, options)
        print(f"{args.weights} (depth) -> {args.output}")
        return
    program = trace(model, options, args.dynamic)
    if args.format == "onnx":
        save_onnx(args.output, program, options["task"])
    else:
        write_atomically(args.output, lambda file: torch.export.save(program, file))
    size = f"1x3x{options['height']}x{options['width']}"
    if args.dynamic:
        size = "any batch and size"
    print(f"{args.weights} ({options['task']}) -> {args.output}: images in [0, 1], {size}")


if __name__ == "__main__":
    run_main(main)
