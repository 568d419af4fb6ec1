"""Bad input: a command, and what the one line on standard error says; exit code 2.

The table below is a transcript. Files and folders that a command names are made by INPUTS when the
word appears; all parts of the expected line, between the dots, must be in the line.
"""

import argparse
import ast
import contextlib
import importlib
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_one_line,
    call,
    run_script,
    truncate,
    write_frames,
    write_image,
    write_png,
    write_semantics,
)

import networks
import utils

TINY = "--height 64 --width 64 --batch_size 1 --steps 1 --num_workers 0"

# ------------------------------------------------------------ inputs


class Bomb:
    """Pickles to a call that makes a folder when read without care."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def depth_network(encoder: str = "resnet18") -> dict:
    """What train_depth.py saves, untrained."""
    options = {
        "task": "depth",
        "supervision": "mono",
        "arch": "unet",
        "encoder": encoder,
        "height": 64,
        "width": 64,
        "min_depth": 0.1,
        "max_depth": 100.0,
    }
    return {"options": options, **states(networks.build("unet", encoder, 1, scales=(0, 1, 2, 3)))}


def states(model: torch.nn.Module) -> dict:
    return {name: part.state_dict() for name, part in model.parts().items()}


def one_frame(path: Path, suffix: str = "png") -> Path:
    write_frames(path, 1, suffix)
    return path / f"frame1.{suffix}"


def text_frame(path: Path) -> None:
    one_frame(path).write_text("no picture at all")


def labels(path: Path, **options: object) -> Path:
    write_semantics(path, **options)
    return path / "training" / "semantic"


def truncated_labels(path: Path) -> None:
    for label in labels(path).iterdir():
        truncate(label, 0.6)


def train_ids(path: Path) -> None:
    """Train ids in place of label ids: 255 occurs, and nothing above 18."""
    for label in labels(path).iterdir():
        write_png(
            label, np.random.default_rng(0).choice([0, 10, 13, 255], (64, 96)).astype(np.uint8)
        )


def partial_network(path: Path) -> None:
    content = depth_network()
    del content["encoder"]["encoder.layer3.0.conv1.weight"]
    torch.save(content, path)


def without_decoder(path: Path) -> None:
    content = depth_network()
    del content["decoder"]
    torch.save(content, path)


def monodepth2_encoder(path: Path) -> None:
    sizes = {"height": 192, "width": 640, "use_stereo": True}
    torch.save({**depth_network()["encoder"], **sizes}, path)


def network_with_nan(path: Path) -> None:
    content = depth_network()
    content["encoder"]["encoder.conv1.weight"][0] = torch.nan
    torch.save(content, path)


def network_of_flow(path: Path) -> None:
    model = networks.build("flow", "resnet18", 2, scales=(0, 1, 2, 3))
    options = {"task": "flow", "arch": "unet", "encoder": "resnet18", "height": 64, "width": 64}
    torch.save({"options": options, **states(model)}, path)


def network_of_four_classes(path: Path) -> None:
    options = {
        "task": "segmentation",
        "arch": "unet",
        "encoder": "resnet18",
        "height": 64,
        "width": 64,
        "data": "own",
        "classes": ["a", "b", "c", "d"],
        "colours": [[0, 0, 0]] * 4,
    }
    torch.save({"options": options, **states(networks.build("unet", "resnet18", 4))}, path)


def tiny_vit(path: Path) -> None:
    from torchvision.models import VisionTransformer

    torch.save(VisionTransformer(64, 16, 2, 3, 192, 768).state_dict(), path)


def layer_scale_alone(path: Path) -> None:
    torch.save({"blocks.0.ls1.gamma": torch.ones(384), "norm.weight": torch.ones(384)}, path)


def intrinsics(text: str | None):
    return lambda path: write_frames(path, 2, intrinsics=text)


def damaged_run(path: Path) -> None:
    (path / "broken").mkdir(parents=True)
    (path / "broken" / "last.pt").write_text("half a checkpoint")


def left_and_right(path: Path) -> None:
    """Two frames of which the second has another size."""
    write_frames(path, 1)
    write_image(path / "frame2.jpg", 96, 96)


INPUTS = {
    "empty": lambda path: path.mkdir(),
    "picture.png": write_image,
    "street.mp4": lambda path: path.write_bytes(b"\0\0\0\x18ftypmp42"),
    "half.jpg": lambda path: truncate(write_image(path), 0.6),
    "video": lambda path: write_frames(path, 2),
    "one_frame": one_frame,
    "half_jpg": lambda path: truncate(one_frame(path, "jpg"), 0.6),
    "half_png": lambda path: truncate(one_frame(path), 0.6),
    "empty_png": lambda path: truncate(one_frame(path), 0),
    "text_png": text_frame,
    "two_sizes": left_and_right,
    "normalised_K": intrinsics("0.58 1.92 0.5 0.5"),
    "three_numbers": intrinsics("700 320 96"),
    "words": intrinsics("fx: 700"),
    "no_K": intrinsics(None),
    "labels": labels,
    "no_labels": lambda path: shutil.rmtree(labels(path)),
    "half_labels": truncated_labels,
    "void_labels": lambda path: labels(path, ids=(0,)),
    "labels_77": lambda path: labels(path, ids=(7, 26, 77)),
    "train_ids": train_ids,
    "depth.pt": lambda path: torch.save(depth_network(), path),
    "resnet50.pt": lambda path: torch.save(depth_network("resnet50"), path),
    "partial.pt": partial_network,
    "encoder.pt": without_decoder,
    "encoder.pth": monodepth2_encoder,
    "nan.pt": network_with_nan,
    "flow.pt": network_of_flow,
    "four_classes.pt": network_of_four_classes,
    "something.pt": lambda path: torch.save({"something": torch.zeros(3)}, path),
    "bomb.pt": lambda path: torch.save({"encoder": Bomb(), "options": {}}, path),
    "half.pt": lambda path: truncate(INPUTS["depth.pt"](path) or path, 0.5),
    "page.pth": lambda path: path.write_text("<html>404 not found</html>"),
    "last.pt": lambda path: torch.save(
        {"step": 1, "args": {}, "log_size": 0, "model": {}, "optimizer": {}}, path
    ),
    "tiny_vit.pt": tiny_vit,
    "layer_scale.pt": layer_scale_alone,
    "damaged_runs": damaged_run,
}

# ------------------------------------------------------------ the table

TABLE = """
-- options

$ train_depth.py --steps 0
--steps ... 0 is not from 1 to

$ train_depth.py --learning_rate nan
--learning_rate ... nan

$ train_seg.py --batch_size many
--batch_size ... many

$ train_seg.py --arch none
--arch ... none ... unet

$ train_seg.py --colour
--colour

$ train_seg.py --steps
--steps

$ train_depth.py --device cuda:99
--device cuda:99

$ train_depth.py --device abacus
--device abacus

$ train_depth.py --data frames --frames 5:1
--frames

$ train_depth.py --frame_ids 1 0
--frame_ids

$ train_depth.py --frame_ids 0
--frame_ids ... source

$ train_depth.py --task flow --frame_ids 0 -1 1
--task flow ... --frame_ids

$ train_depth.py --task flow --arch deeplabv3
--task flow ... --arch unet

$ train_depth.py --min_depth 5 --max_depth 4
--min_depth 5 ... --max_depth 4

$ train_depth.py --intrinsics learned --supervision stereo
--intrinsics ... mono, not for stereo

$ train_depth.py --learning_rate_drop 0.5 0.75 --learning_rate_factor 0.1
--learning_rate_drop ... as many values

$ train_depth.py --data frames --data_path one_frame --task reconstruction --name ../elsewhere
--name ... ../elsewhere

$ train_depth.py --data frames --data_path one_frame --task reconstruction --name fresh --resume
--resume ... fresh

$ train_depth.py --height 100
--height 100 ... 32

$ train_depth.py --height 32
--height ... 32 is not from 64

$ train_seg.py --data kitti --data_path labels --arch dpt --encoder vit_s14 --width 70
--height 64 ... multiple of 14

$ train_seg.py --data kitti --data_path labels --encoder vit_s16
--arch unet ... --encoder vit_s16

$ train_seg.py --data kitti --data_path labels --arch dpt
--arch dpt ... --encoder resnet18

$ train_seg.py --data kitti --data_path labels --arch linear --encoder vit_s16 --init imagenet
vit_s16 ... ImageNet

$ train_seg.py --data kitti --data_path labels --arch deeplabv3
--arch deeplabv3 ... two images

$ train_seg.py --data kitti --data_path labels --freeze_encoder --freeze_batch_norm_only
--freeze_encoder ... --freeze_batch_norm_only

$ train_seg.py --data kitti --data_path labels --encoder_learning_rate_factor 0
--encoder_learning_rate_factor

$ train_seg.py --data kitti --data_path labels --train_size 16
--train_size 16

$ train_seg.py --data kitti --data_path labels --train_size -1
--train_size ... -1

$ train_seg.py --data kitti --data_path labels --batch_size 8
--batch_size 8

$ train_seg.py --data kitti --data_path labels --crop 128 64
--crop 128 64 ... 64

$ train_seg.py --data kitti --data_path labels --leave_out nobody
--leave_out ... nobody

$ train_depth.py --data frames --data_path video --task reconstruction --batch_size 8
--batch_size 8

$ train_depth.py --data frames --data_path video --task reconstruction --crop 128 128
--crop 128 128

$ train_depth.py --task flow --supervision stereo
--supervision ... flow

$ train_depth.py --reconstruction release
--reconstruction ... mono

$ train_depth.py --shuffle_depth
--shuffle_depth ... --supervision depth

$ train_depth.py --supervision stereo --depth_rows 0.1 0.7
--depth_rows ... --supervision depth

$ train_depth.py --supervision stereo --fov 60
--fov ... synthetic comes with its own

$ train_depth.py --supervision depth --fov 60
--fov ... synthetic comes with its own

$ train_depth.py --task flow --fov 60
--fov ... synthetic comes with its own

$ train_depth.py --supervision depth --depth_scale 256
--depth_scale ... synthetic comes with its own

$ train_depth.py --encoder resnet50 --output_stride 16
--output_stride ... deeplabv3

$ train_seg.py --data kitti --data_path labels --encoder vit_s16 --arch dpt --calibrate_batch_norm
--calibrate_batch_norm

$ tools/check_data.py --data frames --data_path video --frame_ids 1 0
--frame_ids

$ tools/check_data.py --data frames --data_path video --frame_ids 0 x
--frame_ids

$ train_depth.py --task flow --monodepth2
--monodepth2 ... flow

$ train_seg.py --dpt_layers last
--dpt_layers ... --arch dpt

$ train_seg.py --data kitti --data_path labels --crop 64 64 --scale 2 0.5
--scale ... 2 is above 0.5

$ train_depth.py --data frames --data_path video --fov 60 --depth_scale 256
--depth_scale ... depth

$ train_depth.py --data frames --data_path video --fov 60 --baseline 0.1
--baseline ... stereo

$ train_seg.py --poly_power 2
--poly_power ... --schedule poly

$ evaluate.py depth --weights depth.pt --data nyu --ground_truth z
--ground_truth ... nyu

$ train_depth.py --supervision depth --smoothness 0.1
--smoothness ... depth

$ evaluate.py
command

$ evaluate.py seg
--weights

$ evaluate.py depth --weights depth.pt --min_eval 5 --max_eval 4
--min_eval ... --max_eval

-- folders

$ train_depth.py --data kitti --data_path nowhere
nowhere ... --data_path

$ train_seg.py --data camvid --data_path nowhere
nowhere ... --data_path

$ train_depth.py --data kitti --data_path picture.png
picture.png

$ train_depth.py --data mars
--data mars ... kitti

$ train_seg.py --data frames
--data frames ... kitti

$ train_depth.py --data kitti --data_path empty
empty

$ train_depth.py --data frames --data_path empty
empty

$ train_seg.py --data kitti --data_path empty
empty

$ train_depth.py --data frames --data_path street.mp4
street.mp4 ... ffmpeg

$ train_depth.py --data frames --data_path one_frame
one_frame ... 1 without

$ train_depth.py --data frames --data_path video --supervision stereo
stereo

-- images and labels

$ train_depth.py --data frames --data_path half_jpg --task reconstruction
half_jpg/frame1.jpg

$ train_depth.py --data frames --data_path half_png --task reconstruction
half_png/frame1.png

$ train_depth.py --data frames --data_path empty_png --task reconstruction
empty_png/frame1.png

$ train_depth.py --data frames --data_path text_png --task reconstruction
text_png/frame1.png

$ train_depth.py --data frames --data_path two_sizes --frame_ids 0 1
two_sizes/frame ... 96x64 ... 96x96

$ train_seg.py --data kitti --data_path no_labels
no_labels/training/semantic

$ train_seg.py --data kitti --data_path half_labels
half_labels/training/semantic

$ train_seg.py --data kitti --data_path labels_77
labels_77/training/semantic ... 77

$ train_seg.py --data kitti --data_path void_labels
void_labels/training/semantic ... no evaluated pixel is labelled

$ train_seg.py --data kitti --data_path train_ids
train_ids/training/semantic ... train ids

-- intrinsics

$ train_depth.py --data frames --data_path normalised_K --frame_ids 0 1
normalised_K/intrinsics.txt ... pixels

$ train_depth.py --data frames --data_path three_numbers --frame_ids 0 1
three_numbers/intrinsics.txt

$ train_depth.py --data frames --data_path words --frame_ids 0 1
words/intrinsics.txt

$ train_depth.py --data frames --data_path no_K --frame_ids 0 1
no_K ... --fov

$ tools/check_data.py --data frames --data_path no_K --frame_ids 0 1
no_K ... --fov

-- weights

$ train_seg.py --data kitti --data_path labels --init nowhere.pt
nowhere.pt

$ train_seg.py --data kitti --data_path labels --init resnet50.pt
resnet50.pt ... encoder

$ train_seg.py --data kitti --data_path labels --init partial.pt
partial.pt ... encoder.layer3.0.conv1.weight ... 119/120

$ train_seg.py --data kitti --data_path labels --init encoder.pt
encoder.pt ... --init_parts encoder

$ train_seg.py --data kitti --data_path labels --init flow.pt
flow.pt ... --init_parts encoder

$ train_seg.py --data kitti --data_path labels --init nan.pt
nan.pt ... encoder.conv1.weight

$ train_seg.py --data kitti --data_path labels --init something.pt
something.pt ... something

$ train_seg.py --data kitti --data_path labels --init bomb.pt
bomb.pt

$ train_seg.py --data kitti --data_path labels --init half.pt
half.pt

$ train_seg.py --data kitti --data_path labels --init page.pth
page.pth

$ train_seg.py --data kitti --data_path labels --init last.pt
last.pt ... model.pt

$ train_seg.py --data kitti --data_path labels --init encoder.pth
encoder.pth ... Monodepth2 ... give its folder

$ train_seg.py --data kitti --data_path labels --init ''
. holds neither model.pt

$ train_seg.py --data kitti --data_path labels --init layer_scale.pt
layer_scale.pt

$ train_seg.py --data kitti --data_path labels --arch linear --encoder vit_s16 --init tiny_vit.pt
tiny_vit.pt ... encoder.class_token

$ train_depth.py --data frames --data_path one_frame --task reconstruction --log_dir damaged_runs --name broken
damaged_runs/broken/last.pt

-- evaluation and tools

$ evaluate.py depth --weights bomb.pt
bomb.pt

$ evaluate.py seg --weights bomb.pt
bomb.pt

$ evaluate.py predict picture.png --weights bomb.pt --output out
bomb.pt

$ evaluate.py grid picture.png --weights bomb.pt --output out.png
bomb.pt

$ evaluate.py depth --weights ''
path ... empty

$ evaluate.py predict video --weights depth.pt --output video/predictions
--output video/predictions ... video

$ evaluate.py grid picture.png --weights depth.pt --output picture.png
--output picture.png ... picture.png

$ evaluate.py seg --weights depth.pt
depth.pt

$ evaluate.py seg --weights four_classes.pt --data kitti --data_path labels
four_classes.pt ... kitti

$ evaluate.py predict half.jpg --weights depth.pt --output out
half.jpg

$ evaluate.py predict street.mp4 --weights depth.pt --output out
street.mp4 ... ffmpeg

$ evaluate.py gradcam --weights flow.pt --data kitti --data_path labels
flow.pt ... two frames

$ tools/tables.py --log_dir nowhere
nowhere

$ tools/tables.py --log_dir empty
empty

$ tools/check_data.py --data mars
--data mars ... kitti

$ tools/export.py --weights flow.pt --output network.onnx
flow.pt ... flow

$ tools/export.py --weights bomb.pt --output network.onnx
bomb.pt

$ tools/street.py --data_path video
video

$ tools/street.py --drives -1
--drives ... -1

$ tools/prepare_nyu.py --data_path empty
nyu_depth_v2_labeled.mat
"""


def read_table() -> list:
    """Pytest parameters (command, expected line) of TABLE."""
    rows = []
    for block in TABLE.split("\n\n"):
        if block.startswith("$ "):
            command, line = block.strip().split("\n")
            rows.append(pytest.param(command[2:], line, id=command[2:]))
    return rows


def load(script: str) -> ModuleType:
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


@pytest.mark.parametrize(("command", "line"), read_table())
def test_bad_input_is_one_line(tmp_path, monkeypatch, command, line):
    monkeypatch.chdir(tmp_path)  # data/ and runs/, the defaults, lie below the current folder
    script, *options = shlex.split(command)
    for word in options:
        if word in INPUTS:
            INPUTS[word](Path(word))
    made = set(os.listdir())
    small = shlex.split(TINY) if script.startswith("train") else []

    result = call(load(script), *small, *options)

    assert_one_line(result, *line.split(" ... "))
    new = set(os.listdir()) - made
    assert "executed" not in new  # by the pickle
    assert not list(Path().glob("**/model.pt"))


@pytest.mark.parametrize("error, code", ((KeyboardInterrupt, 130), (BrokenPipeError, 141)))
def test_exit_codes_of_other_scripts(monkeypatch, error, code):
    """Ctrl-C, and a closed pipe as in `| head`."""
    def main():
        raise error

    def leave(number):
        raise SystemExit(number)

    monkeypatch.setattr(utils.os, "_exit", leave)
    call(SimpleNamespace(__name__="script", main=main), expect=code)


# ------------------------------------------------------------ options of every script

SCRIPTS = (
    "train_depth",
    "train_seg",
    "evaluate",
    "tools.bench",
    "tools.check_data",
    "tools.export",
    "tools.prepare_nyu",
    "tools.street",
    "tools.tables",
)


class Found(Exception):
    """Ends a script as soon as its parser is known."""


def option_parsers(script: str, monkeypatch) -> list[argparse.ArgumentParser]:
    """The parsers of a script and of its commands."""
    found = []

    def remember(self, *arguments):
        found.append(self)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found.extend(action.choices.values())
        raise Found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", remember)
    monkeypatch.setattr(sys, "argv", [script])
    with contextlib.suppress(Found):
        importlib.import_module(script).main()
    return found


ODD_NUMBERS = ("nan", "inf", "-inf", "1e30", "-1e30", str(10**30), str(-(10**30)), "", "x")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_a_range(monkeypatch, script):
    """No option takes nan, inf or a number without bounds."""
    parsers = option_parsers(script, monkeypatch)
    assert parsers
    for parser in parsers:
        for action in parser._actions:
            if action.type in (None, os.path.normpath) or action.choices is not None:
                continue
            for text in ODD_NUMBERS:
                with pytest.raises((argparse.ArgumentTypeError, ValueError)):
                    print(parser.prog, action.dest, action.type(text))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_has_help(monkeypatch, script):
    for parser in option_parsers(script, monkeypatch):
        assert parser.format_help()  # a stray % in a help text fails here
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), action.dest


# ------------------------------------------------------------ safety


def test_nothing_reads_code_from_files():
    """No unpickling but torch.load(weights_only=True), no eval or exec, no shell."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                refuse_call(path, node)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names]
                assert names == ["pickle"] or "pickle" not in ast.unparse(node), path


def refuse_call(path: Path, node: ast.Call) -> None:
    name = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    assert name not in ("eval", "exec", "os.system", "os.popen", "torch.hub.load"), path
    assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), path
    assert name != "torch.load" or keywords.get("weights_only") == "True", path
    assert keywords.get("shell", "False") == "False", path
    assert keywords.get("allow_pickle", "False") == "False", path


# ------------------------------------------------------------ from the shell


def test_an_image_that_a_loader_process_cannot_read(world, tmp_path):
    import train_depth

    root = shutil.copytree(world, tmp_path / "world")
    for path in root.glob("2011_*/*/image_02/data/*"):
        truncate(path, 0.6)
    options = (*shlex.split(TINY), "--data_path", root, "--log_dir", tmp_path / "runs")
    result = call(train_depth, *options, "--num_workers", 2)
    assert_one_line(result, f"{root}/2011_", "image_02/data")


def test_imagenet_weights_without_a_network(tmp_path, world):
    closed = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    options = (
        *shlex.split(TINY),
        "--data_path",
        world,
        "--log_dir",
        tmp_path / "runs",
        "--init",
        "imagenet",
    )
    result = run_script(
        "train_seg.py", *options, expect=2, TORCH_HOME=str(tmp_path / "torch"), **closed
    )
    assert_one_line(result, "resnet18-", ".pth", f"{tmp_path}/torch/hub/checkpoints", "--init none")
    assert not list(tmp_path.glob("runs/*/model.pt"))
