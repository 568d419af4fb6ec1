"""The commands of evaluate.py on networks with a known answer: scores, files, refusals."""

import argparse
import json
import os
import shutil
from pathlib import Path

import make_data
import numpy as np
import pytest
import torch
from conftest import (
    assert_one_line,
    call,
    read_json,
    smooth_images,
    truncate,
    write_image,
    write_png,
)
from make_data import clips, names
from PIL import Image
from test_metrics import CPU, ColourClassifier
from torch import nn

import datasets
import evaluate
import metrics
import networks
import pictures
from labels import CITYSCAPES_CLASSES, CITYSCAPES_COLOURS, CITYSCAPES_IDS
from utils import InputError

# ---------------------------------------------------------------- Grad-CAM


class TwoMaps(nn.Module):
    """Two maps: the red channel, and what green lacks."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([images[:, 0], 1 - images[:, 1]], 1) * self.one]


class TwoClasses(nn.Module):
    """The first map speaks for the class that wins everywhere, the second against it."""

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        score = 3 * features[0][:, :1] - 2 * features[0][:, 1:]
        return [torch.cat([score, score - 1], 1)]


def test_gradcam_by_hand():
    images = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    expected = (3 * images[:, 0] - 2 * (1 - images[:, 1])).relu()
    heat = evaluate.gradcam(networks.Network(TwoMaps(), TwoClasses(), {}), images)
    torch.testing.assert_close(heat, expected / expected.flatten(1).quantile(0.99, 1).view(2, 1, 1))
    assert ((heat <= 1).flatten(1).float().mean(1) >= 0.98).all()


@pytest.mark.parametrize("layer", (0, 2, 4))
def test_gradcam_of_a_real_network(layer):
    """Non-negative, of the layer's size, and the same for one image alone and in a batch."""
    torch.manual_seed(0)
    model = networks.build("unet", "resnet18", 19).eval()
    images = smooth_images(2, 64, 96)
    heat = evaluate.gradcam(model, images, layer)
    assert heat.shape == (2, 32 >> layer, 48 >> layer) and heat.min() >= 0
    torch.testing.assert_close(
        evaluate.gradcam(model, images[:1], layer), heat[:1], rtol=1e-3, atol=1e-4
    )


def test_gradcam_names_a_missing_layer():
    with pytest.raises(InputError, match="--layer 3"):
        evaluate.gradcam(networks.Network(TwoMaps(), TwoClasses(), {}), torch.rand(1, 3, 8, 8), 3)


# ---------------------------------------------------------------- networks with a known answer

NEAR, FAR = 2.0, 50.0


class Brightness(nn.Module):
    """Disparity, or relative inverse depth, is the image's brightness."""

    def __init__(self, logit: bool = True):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
        self.logit = logit

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        brightness = images.mean(1, keepdim=True) * self.one
        return [brightness.clamp(1e-4, 1 - 1e-4).logit() if self.logit else brightness]


class ShiftRight(nn.Module):
    """Flow of two pixels to the right, times the difference of brightness."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        change = (second - first).mean(1, keepdim=True)
        return [torch.cat([2 * torch.ones_like(change) * self.one, change], 1)]


def options(task: str, **more) -> dict:
    """What model.pt says of a network for images of 96x64 pixels."""
    settings = {
        "task": task,
        "height": 64,
        "width": 96,
        "min_depth": NEAR,
        "max_depth": FAR,
        "metric": True,
    }
    if task == "segmentation":
        settings["data"] = "kitti"
        settings["classes"] = list(CITYSCAPES_CLASSES)
        settings["colours"] = [list(colour) for colour in CITYSCAPES_COLOURS]
    return {**settings, **more}


@pytest.fixture
def use_model(monkeypatch):
    """Has --weights NAME load the network given under this name."""
    models = {}

    def load(path, device="cpu", task=None):
        return models[os.path.basename(path)]

    monkeypatch.setattr(evaluate, "load_model", load)
    return lambda name, model, settings: models.__setitem__(name, (model.eval(), settings))


def write_grey(path, *columns: int, height: int = 64, width: int = 96) -> str:
    """An image of grey stripes, from left to right."""
    grey = np.array(columns, np.uint8).repeat(width // len(columns))
    return write_png(path, np.broadcast_to(grey[None, :, None], (height, len(grey), 3)).copy())


def depth_of(grey: float) -> float:
    return 1 / (1 / FAR + (1 / NEAR - 1 / FAR) * grey / 255)


def read_png(path) -> np.ndarray:
    return np.array(Image.open(path))


# ---------------------------------------------------------------- predict


def test_ids_of_an_unknown_data_set_are_refused(tmp_path):
    with pytest.raises(InputError, match="trained on elsewhere"):
        evaluate.save_ids(tmp_path / "ids.png", np.zeros((2, 2), int), "elsewhere")


def test_metric_depth_as_a_png_in_kittis_coding(tmp_path, use_model):
    use_model("model", Brightness(), options("depth"))
    write_grey(tmp_path / "a.png", 40, 200, height=100, width=150)
    call(
        evaluate,
        "predict",
        tmp_path / "a.png",
        "--weights",
        "model",
        "--output",
        tmp_path / "out",
        "--arrays",
        expect=0,
    )
    values = read_png(tmp_path / "out" / "a_depth_16bit.png")
    assert values.dtype == np.uint16 and values.shape == (100, 150)
    for column, grey in ((10, 40), (140, 200)):
        assert values[50, column] / 256 == pytest.approx(depth_of(grey), abs=1 / 256)
    array = np.load(tmp_path / "out" / "a_depth.npy")
    assert array.dtype == np.float32 and np.abs(values / 256 - array).max() < 1 / 256
    assert read_png(tmp_path / "out" / "a_depth.png").shape == (100, 150, 3)


@pytest.mark.parametrize("relative", (False, True))
def test_depth_without_a_unit_says_what_its_png_means(tmp_path, use_model, relative):
    """Inverse depth; the text in the file gives depth from a value."""
    more = {"output": "inverse depth", "encoder": "vit_s14"} if relative else {}
    use_model("model", Brightness(logit=not relative), options("depth", metric=False, **more))
    write_grey(tmp_path / "a.png", 51, 102, 204)
    call(
        evaluate,
        "predict",
        tmp_path / "a.png",
        "--weights",
        "model",
        "--output",
        tmp_path / "out",
        "--arrays",
        expect=0,
    )
    picture = Image.open(tmp_path / "out" / "a_depth_16bit.png")
    formula = picture.text["Description"]
    assert formula.startswith("depth = ") and "without a unit" in formula
    number = float(formula.split()[2])
    depth = number / np.array(picture)
    assert depth == pytest.approx(np.load(tmp_path / "out" / "a_depth.npy"), rel=1e-3)
    if relative:  # brightness is 1 / depth up to a factor
        assert depth[32, 10] / depth[32, 90] == pytest.approx(4, rel=1e-3)


def test_depth_models_of_others_see_the_images_aspect():
    """518 pixels on the shorter side, multiples of the patch, as Depth Anything's own script has it."""
    theirs = options("depth", output="inverse depth", encoder="vit_s14", height=518, width=518)
    assert evaluate.input_size(theirs, (375, 1242)) == (518, 1722)
    assert evaluate.input_size(theirs, (480, 640)) == (518, 686)
    assert evaluate.input_size(theirs, (800, 400)) == (1036, 518)
    assert evaluate.input_size(options("depth"), (375, 1242)) == (64, 96)


def test_one_range_of_colours_for_a_video(tmp_path, use_model):
    """The same depth has the same colour in every frame, whatever else the frame shows."""
    use_model("model", Brightness(), options("depth"))
    write_grey(tmp_path / "video" / "1.png", 20, 120)
    write_grey(tmp_path / "video" / "2.png", 120, 240)
    call(
        evaluate,
        "predict",
        tmp_path / "video",
        "--weights",
        "model",
        "--output",
        tmp_path / "out",
        expect=0,
    )
    first, second = (read_png(tmp_path / "out" / f"{n}_depth.png") for n in (1, 2))
    assert first[32, 90].tolist() == second[32, 10].tolist()
    assert first[32, 10].mean() < first[32, 90].mean() < second[32, 90].mean()  # near is bright
    alone = tmp_path / "alone"
    call(
        evaluate,
        "predict",
        tmp_path / "video" / "1.png",
        "--weights",
        "model",
        "--output",
        alone,
        expect=0,
    )
    assert (read_png(alone / "1_depth.png")[32, 90] != first[32, 90]).any()


def test_depth_range_by_hand(tmp_path, use_model):
    use_model("model", Brightness(), options("depth"))
    write_grey(tmp_path / "a.png", 20, 240)
    near, far = depth_of(240), depth_of(20)
    words = (
        "predict",
        tmp_path / "a.png",
        "--weights",
        "model",
        "--output",
        tmp_path / "out",
        "--depth_range",
    )
    call(evaluate, *words, near, far, expect=0)
    picture = read_png(tmp_path / "out" / "a_depth.png")
    ends = (255 * pictures.DEPTH_COLOURS[[0, -1]]).round()
    assert np.abs(picture[32, [10, 90]] - ends.numpy()).max() <= 2
    assert_one_line(call(evaluate, *words, far, near), "--depth_range")


def test_label_ids_in_the_data_sets_own_coding(tmp_path, use_model):
    """Cityscapes' server takes 7, 8, 11, ...; the table that reads labels takes them back."""
    model = ColourClassifier()
    use_model("model", model, options("segmentation", data="cityscapes"))
    write_image(tmp_path / "a.png", 64, 96)
    call(
        evaluate,
        "predict",
        tmp_path / "a.png",
        "--weights",
        "model",
        "--output",
        tmp_path / "out",
        "--arrays",
        expect=0,
    )
    ids = read_png(tmp_path / "out" / "a_segmentation_ids.png")
    train = np.load(tmp_path / "out" / "a_segmentation.npy")
    assert set(np.unique(ids)) <= set(CITYSCAPES_IDS) and len(np.unique(ids)) > 2
    assert (datasets.LABELLED["cityscapes"].table[ids] == train).all()
    assert read_png(tmp_path / "out" / "a_segmentation.png").shape == (64, 96, 3)


@pytest.mark.parametrize("data", sorted(set(datasets.LABELLED)))
def test_every_coding_can_be_read_back(tmp_path, data):
    cls = datasets.LABELLED[data]
    label = np.arange(len(cls.classes))[None]
    evaluate.save_ids(str(tmp_path / "ids.png"), label, data)
    assert (cls.table[read_png(tmp_path / "ids.png")] == label).all()


@pytest.mark.parametrize("offset, drawn", ((None, ("2", "3")), (-1, ("2", "3")), (1, ("1", "2"))))
def test_flow_of_consecutive_frames(tmp_path, use_model, offset, drawn):
    """Each image against the one before it, or after it as in training, in its own pixels."""
    more = {} if offset is None else {"frame_ids": [0, offset]}
    use_model("model", ShiftRight(), options("flow", **more))
    for name, grey in (("1", 0), ("2", 51), ("3", 204)):
        write_grey(tmp_path / "video" / f"{name}.png", grey, height=128, width=192)
    call(
        evaluate,
        "predict",
        tmp_path / "video",
        "--weights",
        "model",
        "--output",
        tmp_path / "out",
        "--arrays",
        expect=0,
    )
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        f"{name}_flow.png" for name in drawn
    ]
    flow = np.load(tmp_path / "out" / "2_flow.npy")
    assert flow.shape == (2, 128, 192)
    assert flow[0] == pytest.approx(2 * 192 / 96)
    change = (0 - 51) / 255 if offset != 1 else (204 - 51) / 255
    assert flow[1] == pytest.approx(change * 128 / 64, abs=1e-5)


def test_flow_does_not_run_from_one_sequence_into_another(tmp_path, use_model):
    use_model("model", ShiftRight(), options("flow"))
    for name in ("a_1", "a_2", "b_1", "b_2"):
        write_grey(tmp_path / "video" / f"{name}.png", 50)
    call(
        evaluate,
        "predict",
        tmp_path / "video",
        "--weights",
        "model",
        "--output",
        tmp_path / "out",
        expect=0,
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a_2_flow.png",
        "b_2_flow.png",
    ]


def test_flow_needs_two_frames_of_one_size(tmp_path, use_model):
    use_model("model", ShiftRight(), options("flow"))
    one = write_grey(tmp_path / "1.png", 0)
    two = write_grey(tmp_path / "2.png", 0, height=32)
    words = ("--weights", "model", "--output", tmp_path / "out")
    assert_one_line(call(evaluate, "predict", one, *words), "two frames")
    assert_one_line(call(evaluate, "predict", one, two, *words), "2.png", "one size")


@pytest.mark.parametrize("task", ("depth", "segmentation", "reconstruction"))
def test_a_bad_file_among_many(tmp_path, use_model, task):
    """It is named once, the others are done, and the exit code is not 0."""
    models = {
        "depth": Brightness(),
        "segmentation": ColourClassifier(),
        "reconstruction": ColourClassifier(3),
    }
    use_model("model", models[task], options(task))
    for name in "abc":
        write_image(tmp_path / "in" / f"{name}.jpg")
    truncate(tmp_path / "in" / "b.jpg", 0.5)
    result = call(
        evaluate, "predict", tmp_path / "in", "--weights", "model", "--output", tmp_path / "out"
    )
    assert_one_line(result, "b.jpg")
    assert {path.name[0] for path in (tmp_path / "out").iterdir()} == {"a", "c"}
    assert "2 of 3" in result.out


def test_a_bad_frame_costs_its_neighbours_flow_only(tmp_path, use_model):
    use_model("model", ShiftRight(), options("flow"))
    for number in range(1, 6):
        write_image(tmp_path / "in" / f"{number}.jpg")
    truncate(tmp_path / "in" / "3.jpg", 0.5)
    result = call(
        evaluate, "predict", tmp_path / "in", "--weights", "model", "--output", tmp_path / "out"
    )
    assert_one_line(result, "3.jpg")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "2_flow.png",
        "5_flow.png",
    ]


@pytest.mark.parametrize(
    "name, words", (("clip.mp4", ("ffmpeg", "frames")), ("street.webp", ("street.png",)))
)
def test_files_that_are_not_read_name_their_conversion(tmp_path, use_model, name, words):
    use_model("model", Brightness(), options("depth"))
    (tmp_path / name).write_bytes(b"not an image of ours")
    result = call(
        evaluate, "predict", tmp_path / name, "--weights", "model", "--output", tmp_path / "out"
    )
    assert_one_line(result, name, *words)


def test_pictures_of_any_kind_and_size(tmp_path, use_model):
    """File and folder, odd sizes, grey images, opaque alpha, one name in two folders."""
    use_model("model", Brightness(), options("depth"))
    write_image(tmp_path / "street" / "a10.png", 75, 133)
    write_image(tmp_path / "street" / "a9.jpg", 33, 50)
    Image.new("L", (61, 47), 90).save(tmp_path / "street" / "grey.png")
    Image.new("RGBA", (64, 40), (10, 200, 30, 255)).save(tmp_path / "grey.png")
    words = (
        "predict",
        tmp_path / "street",
        tmp_path / "grey.png",
        "--weights",
        "model",
        "--output",
        tmp_path / "out",
    )
    call(evaluate, *words, expect=0)
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out").glob("*_depth.png")}
    assert sizes == {
        "a10_depth.png": (133, 75),
        "a9_depth.png": (50, 33),
        "grey_depth.png": (64, 40),
        "grey__depth.png": (61, 47),
    }


@pytest.mark.parametrize(
    "inputs, output",
    (
        ("video", "video"),
        ("video", "video/predictions"),
        ("video", "link"),
        ("link", "video/a/b"),
        ("other video", "video"),
        ("other/c.png video/a.png", "video"),
        ("video/a.png", "video/a.png"),
        ("link/a.png", "video"),
    ),
)
def test_predictions_among_the_inputs_are_refused(tmp_path, monkeypatch, inputs, output):
    """Before the network is loaded: they could replace images, and be taken for some later."""
    monkeypatch.chdir(tmp_path)
    for name in ("video/a.png", "video/a_depth.png", "other/c.png"):
        write_image(tmp_path / name)
    os.symlink("video", "link")
    before = sorted(tmp_path.rglob("*"))
    result = call(evaluate, "predict", *inputs.split(), "--weights", "none", "--output", output)
    assert_one_line(result, f"--output {output}: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("output", ("predictions", "video_out", "video/../predictions"))
def test_predictions_beside_the_inputs(tmp_path, monkeypatch, use_model, output):
    """What the README shows: a file in the current folder, a folder there, and an output there."""
    monkeypatch.chdir(tmp_path)
    use_model("model", Brightness(), options("depth"))
    for name in ("street.png", "video/1.png"):
        write_image(tmp_path / name)
    words = ("predict", "street.png", "video", "--weights", "model", "--output", output)
    call(evaluate, *words, expect=0)
    assert len(list(Path(output).glob("*_depth.png"))) == 2


# ---------------------------------------------------------------- grid and gradcam


def test_grid_has_titles_and_names(tmp_path, use_model, monkeypatch):
    """A row an image and a column a network, flow among them, all of the first image's size."""
    use_model("depths", Brightness(), options("depth"))
    use_model("classes", ColourClassifier(), options("segmentation"))
    use_model("moves", ShiftRight(), options("flow"))
    drawn = []

    def record(rows, columns, names=()):
        drawn.append((rows, columns, names))
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(pictures, "picture_grid", record)
    for number in (1, 2, 10):
        write_image(tmp_path / "video" / f"{number}.png", 60 + number, 90)
    weights = ("--weights", "runs/depths", "runs/classes", "runs/moves")
    call(
        evaluate, "grid", tmp_path / "video", *weights, "--output", tmp_path / "grid.png", expect=2
    )
    for number in (1, 2, 10):
        write_image(tmp_path / "video" / f"{number}.png", 64, 90)
    call(
        evaluate, "grid", tmp_path / "video", *weights, "--output", tmp_path / "grid.png", expect=0
    )
    rows, columns, names = drawn[-1]
    assert columns == ["image", "depths", "classes", "moves"]
    assert list(names) == ["2", "10"]  # the first image has no frame before it
    assert {tuple(cell.shape) for row in rows for cell in row} == {(3, 64, 90)}


@pytest.mark.parametrize("command", ("grid", "gradcam"))
def test_pictures_of_a_labelled_data_set(tmp_path, use_model, monkeypatch, command):
    """Four test images with labels; Grad-CAM has the segmentation beside it (Figure 6)."""
    root = make_data.write_semantics(tmp_path / "data", 12, ids=(7, 8, 23, 26))
    torch.manual_seed(0)
    for name in ("one", "two"):
        use_model(name, networks.build("unet", "resnet18", 19), options("segmentation"))
    drawn = []
    original = pictures.picture_grid

    def record(rows, columns, names=()):
        drawn.append((rows, columns, names))
        return original(rows, columns, names)

    monkeypatch.setattr(pictures, "picture_grid", record)
    output = tmp_path / "picture.png"
    words = ("--data", "kitti", "--data_path", root, "--weights", "one", "two", "--output", output)
    result = call(evaluate, command, *words, expect=0)
    rows, columns, names = drawn[0]
    if command == "grid":
        assert columns == ["image", "label", "one", "two"]
    else:
        assert columns == ["image", "label", "one", "one, segmentation", "two", "two, segmentation"]
    assert len(rows) == len(names) == 4 and "4 images, 2 models" in result.out
    picture = read_png(output)
    assert (
        picture.shape[0] >= 4 * 64 and picture.shape[1] >= len(columns) * 96 and picture.std() > 5
    )


def test_what_a_grid_refuses(tmp_path, use_model):
    use_model("flow", ShiftRight(), options("flow"))
    root = make_data.write_semantics(tmp_path / "data")
    data = ("--data", "kitti", "--data_path", root, "--weights", "flow")
    for command in ("grid", "gradcam"):
        assert_one_line(call(evaluate, command, *data), "flow", "two frames")
    assert_one_line(call(evaluate, "grid", *data, "--output", "grid.tiff"), "--output", ".png")
    use_model("ahead", ShiftRight(), options("flow", frame_ids=[0, 1]))
    assert_one_line(call(evaluate, "grid", root, "--weights", "flow", "ahead"), "--frame_ids")


@pytest.mark.parametrize("command", ("grid", "gradcam"))
@pytest.mark.parametrize("inputs", ("own.jpg video/1.jpg", "video", ""))
def test_a_picture_never_replaces_its_inputs(tmp_path, monkeypatch, use_model, command, inputs):
    """Neither a file, nor one of a folder, nor an image of the data set; the folder stays as it is."""
    monkeypatch.chdir(tmp_path)
    use_model("model", Brightness(), options("depth"))
    root = Path(make_data.write_semantics("data", 12))
    image = make_data.labelled("kitti", root, "val").pairs[0][0]
    for name in ("own.jpg", "video/1.jpg"):
        write_image(tmp_path / name)
    outputs = {
        "own.jpg video/1.jpg": ("own.jpg", "video/1.jpg", "video/../own.jpg"),
        "video": ("video/1.jpg", "video/grid.png"),
        "": (image,),
    }
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*g")}
    words = (command, *inputs.split(), "--data", "kitti", "--data_path", root, "--weights", "model")
    for output in outputs[inputs]:
        assert_one_line(call(evaluate, *words, "--output", output), f"--output {output}: ")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*g")} == before


# ---------------------------------------------------------------- evaluate.py depth


def kitti(tmp_path) -> str:
    """Four frames of a drive with raw points, and improved ground truth for two of them."""
    root = make_data.write_kitti(tmp_path / "kitti")
    for number in (0, 1):
        ground_truth(root, number)
    return root


def ground_truth(root: str, number: int) -> None:
    path = f"{root}/{make_data.DRIVE}/proj_depth/groundtruth/image_02/{number:010d}.png"
    make_data.write_depth(path, 30, scale=256)


def points_file(root: str, number: int) -> Path:
    return Path(root, make_data.DRIVE, "velodyne_points", "data", f"{number:010d}.bin")


def evaluate_depth(root: str, tmp_path, *more, data: str = "kitti") -> tuple[dict, str]:
    words = (
        "depth",
        "--weights",
        "model",
        "--data",
        data,
        "--data_path",
        root,
        "--output",
        tmp_path / "scores",
    )
    result = call(evaluate, *words, *more, expect=0)
    return read_json(tmp_path / "scores", "depth.json"), result.out


def test_one_kind_of_ground_truth_for_all_frames(tmp_path, use_model):
    """The published protocol where all have raw points, else the kind that most frames have."""
    use_model("model", Brightness(), options("depth"))
    root = kitti(tmp_path)
    scores, out = evaluate_depth(root, tmp_path)
    assert scores["ground_truth"] == "velodyne_x" and scores["images"] == 4 and "4 of 4" in out
    scores, out = evaluate_depth(root, tmp_path, "--ground_truth", "z")
    assert scores["ground_truth"] == "z of velodyne" and scores["images"] == 4
    points_file(root, 3).unlink()
    scores, out = evaluate_depth(root, tmp_path)
    assert scores["ground_truth"] == "z of velodyne" and "3 of 4" in out
    scores, out = evaluate_depth(root, tmp_path, "--ground_truth", "velodyne_x")
    assert scores["ground_truth"] == "velodyne_x" and scores["images"] == 3
    for number in (2, 3):
        ground_truth(root, number)
    scores, out = evaluate_depth(root, tmp_path, "--scale", "1", "--no_crop")
    assert scores["ground_truth"] == "z of groundtruth" and scores["images"] == 4
    assert scores["by_image"][0]["pixels"] == 64 * 96 and "every measured pixel" in out


def test_each_split_of_kitti_for_its_purpose(tmp_path, monkeypatch, use_model):
    """Training reads Eigen and Zhou's training split, evaluation Eigen's test split."""
    use_model("model", Brightness(), options("depth"))
    root = make_data.write_kitti(tmp_path / "kitti")
    for number, split in enumerate(("eigen_zhou_train", "eigen_zhou_val", "eigen_test")):
        make_data.write_text(tmp_path / "splits" / f"{split}.txt", f"{make_data.DRIVE} {number} l\n")
    monkeypatch.setattr(datasets, "SPLITS", str(tmp_path / "splits"))
    assert names(clips("kitti", root)) == [["0000000000.png"]]
    assert names(clips("kitti", root, "0", "--split", "val")) == [["0000000001.png"]]
    scores, _ = evaluate_depth(root, tmp_path)
    assert [Path(row["image"]).name for row in scores["by_image"]] == ["0000000002.png"]


def test_the_published_ground_truth(tmp_path):
    """Forward distance from the scanner, half a metre behind the camera, one pixel up and left."""
    root = make_data.write_kitti(tmp_path / "kitti")
    text = "R: 0 -1 0 0 0 -1 1 0 0\nT: 0 0 -0.5\n"
    make_data.write_text(f"{root}/2011_09_26/calib_velo_to_cam.txt", text)
    args = argparse.Namespace(data="kitti", data_path=root, drives=None)
    found = {}
    for truth in ("z", "velodyne_x"):
        _, _, frames = evaluate.find_measured(args, (0, 1), truth)
        (_, read), *_ = frames
        depth = read()
        rows, columns = depth.nonzero()
        found[truth] = sorted(zip(depth[rows, columns].round(3), rows, columns))
    assert [value for value, _, _ in found["z"]] == [9.5, 19.5]
    assert [value for value, _, _ in found["velodyne_x"]] == [10, 20]
    for (_, row, column), (_, above, left) in zip(found["z"], found["velodyne_x"]):
        assert (above, left) == (row - 1, column - 1)


def test_the_range_that_is_evaluated(tmp_path, use_model):
    """Points at 10 and 20 m."""
    use_model("model", Brightness(), options("depth"))
    root = make_data.write_kitti(tmp_path / "kitti")
    for limits, count in ((("--max_eval", 15), 1), (("--min_eval", 15), 1), ((), 2)):
        scores, _ = evaluate_depth(root, tmp_path, *limits, "--frames", "0:1")
        assert scores["by_image"][0]["pixels"] == count


def test_depth_without_any_ground_truth(tmp_path, use_model):
    use_model("model", Brightness(), options("depth"))
    root = make_data.write_kitti(tmp_path)
    shutil.rmtree(points_file(root, 0).parent)
    result = call(evaluate, "depth", "--weights", "model", "--data_path", root)
    assert_one_line(result, "ground truth")


def test_scores_and_those_of_a_constant_picture(tmp_path, use_model):
    """Frames at 30 m, a network that says 20 m, and a constant that is right."""
    use_model("model", Brightness(), options("depth"))
    root = make_data.write_kitti(tmp_path)
    grey = round(255 * (1 / 20 - 1 / FAR) / (1 / NEAR - 1 / FAR))
    for number in range(4):
        ground_truth(root, number)
        write_grey(f"{root}/{make_data.DRIVE}/image_02/data/{number:010d}.png", grey)
    words = ("--ground_truth", "z", "--frames", "2:4", "--constant_from", "0:2")
    scores, out = evaluate_depth(root, tmp_path, *words)
    assert scores["images"] == 2 and scores["scale"] == 1
    assert scores["abs_rel"] == pytest.approx(1 / 3, abs=0.02)
    assert scores["constant"]["abs_rel"] == pytest.approx(0, abs=1e-6)
    for name in metrics.DEPTH_METRICS:
        assert f"{name} {scores[name]:.4f}" in out
        assert np.mean([row[name] for row in scores["by_image"]]) == pytest.approx(scores[name])
    scaled, _ = evaluate_depth(root, tmp_path, *words, "--scale", "median")
    assert scaled["abs_rel"] < 0.01 and scaled["ratio_median"] == pytest.approx(1.5, rel=0.05)
    call(
        evaluate,
        "depth",
        "--weights",
        "model",
        "--data_path",
        root,
        "--constant_from",
        "90:99",
        expect=2,
    )


@pytest.mark.parametrize(
    "settings, scale",
    (
        ({"metric": True}, 1),
        ({"metric": False}, "median"),
        ({"metric": False, "use_stereo": True}, 5.4),
        ({"metric": False, "output": "inverse depth"}, "affine"),
        ({"metric": False, "depth_loss": "affine"}, "affine"),
    ),
)
def test_what_makes_metres(settings, scale):
    assert evaluate.default_scale(options("depth", **settings)) == scale


def write_nyu(root: Path) -> str:
    """Two training images at 4 m, two test images at 5 m with a border of 9 m, in millimetres."""
    for number in range(1, 5):
        name = f"{number:04d}.png"
        write_grey(root / "image" / name, 100, height=480, width=640)
        write_png(root / "label40" / name, np.ones((480, 640), np.uint8))
        depth = np.full((480, 640), 4000 if number < 3 else 9000, np.uint16)
        if number > 2:
            depth[45:471, 41:601] = 5000
        write_png(root / "depth" / name, depth)
    (root / "train.txt").write_text("0001\n0002\n")
    (root / "test.txt").write_text("0003\n0004\n")
    return str(root)


def test_nyu(tmp_path, use_model):
    """Eigen's crop, up to 10 m, median scaling on request, the constant from training images."""
    use_model("model", Brightness(), options("depth"))
    root = write_nyu(tmp_path / "nyu")
    write_png(Path(root) / "depth" / "0002.png", np.full((480, 640), 2000, np.uint16))
    scores, out = evaluate_depth(root, tmp_path, "--constant_from", "0:1", data="nyu")
    assert (
        scores["images"] == 2
        and scores["cap"] == 10
        and scores["crop"] == "nyu"
        and scores["scale"] == 1
    )
    assert scores["by_image"][0]["pixels"] == 426 * 560
    assert scores["abs_rel"] == pytest.approx(abs(depth_of(100) - 5) / 5, rel=1e-3)
    assert scores["constant"]["abs_rel"] == pytest.approx(0.2)
    scores, _ = evaluate_depth(root, tmp_path, "--scale", "median", "--frames", "0:1", data="nyu")
    assert scores["images"] == 1 and scores["abs_rel"] == pytest.approx(0, abs=1e-4)


# ---------------------------------------------------------------- evaluate.py seg


def test_seg_scores_what_the_function_scores(tmp_path, use_model):
    model = ColourClassifier()
    use_model("model", model, options("segmentation"))
    root = make_data.write_semantics(tmp_path / "data", 12, ids=(7, 8, 23, 26))
    result = call(
        evaluate, "seg", "--weights", "model", "--data_path", root, "--output", tmp_path, expect=0
    )
    expected = metrics.evaluate_segmentation(model, make_data.labelled("kitti", root, "val"), CPU)
    np.testing.assert_equal(read_json(tmp_path, "segmentation.json"), expected)
    assert (
        f"mIoU {expected['miou']:.2f} %" in result.out
        and f"{expected['release_miou']:.2f} %" in result.out
    )
    assert all(name in result.out for name in CITYSCAPES_CLASSES)


def test_seg_splits(tmp_path, use_model):
    """train: the images that the run drew, of which args.json tells; a lone model.pt does not."""
    use_model("model", ColourClassifier(), options("segmentation"))
    root = make_data.write_semantics(tmp_path / "data", 12)
    words = ("seg", "--data_path", root, "--output", tmp_path, "--weights", tmp_path / "model")

    def images(*more) -> int:
        call(evaluate, *words, *more, expect=0)
        return read_json(tmp_path, "segmentation.json")["images"]

    assert images() == images("--split", "val") == 5
    assert_one_line(call(evaluate, *words, "--split", "train"), "args.json")
    drawn = {"train_size": 3, "split_seed": 1, "leave_out": None}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "args.json").write_text(json.dumps({"options": drawn}))
    assert images("--split", "train") == 3
    elsewhere = {**drawn, "data_path": str(make_data.write_semantics(tmp_path / "elsewhere", 40))}
    (tmp_path / "model" / "args.json").write_text(json.dumps({"options": elsewhere}))
    words = ("seg", "--output", tmp_path, "--weights", tmp_path / "model")
    assert images() == 15  # the run's own data, where no others are named
    truncate(tmp_path / "model" / "args.json", 0.5)
    assert_one_line(call(evaluate, *words), "args.json")


def test_seg_passes_its_options_on(tmp_path, monkeypatch, use_model):
    use_model("model", ColourClassifier(), options("segmentation"))
    root = make_data.write_semantics(tmp_path / "data", 12)
    passed = []

    def record(model, dataset, device, window, flip):
        passed.append((window, flip))
        raise InputError("enough")

    monkeypatch.setattr(evaluate, "evaluate_segmentation", record)
    for more in ((), ("--flip",), ("--eval_mode", "slide")):
        call(evaluate, "seg", "--weights", "model", "--data_path", root, *more, expect=2)
    assert passed == [(None, False), (None, True), ((64, 96), False)]


def test_seg_without_a_label_is_refused(tmp_path, use_model):
    """Of whatever data set: there is no score then, and no NaN is saved for one."""
    use_model("model", ColourClassifier(), options("segmentation"))
    root = make_data.write_semantics(tmp_path / "data", 12, ids=(0,))
    words = ("seg", "--weights", "model", "--data_path", root, "--output", tmp_path / "out")
    assert_one_line(call(evaluate, *words), "semantic", "no evaluated pixel is labelled")
    assert not (tmp_path / "out").exists()


def test_label_pictures(monkeypatch):
    """The label and the prediction in their colours; what is ignored is black."""
    monkeypatch.setattr(pictures, "picture_grid", lambda rows, columns: (rows, columns))
    colours = ((255, 0, 0), (0, 255, 0))
    label = torch.tensor([[[0, 1, 255]]])
    prediction = torch.tensor([[[1, 1, 0]]])
    rows, _ = pictures.draw_labels(torch.zeros(1, 3, 1, 3), label, prediction, colours)
    _, shown, predicted = rows[0]
    assert shown.permute(1, 2, 0).tolist() == [[[1, 0, 0], [0, 1, 0], [0, 0, 0]]]
    assert predicted.permute(1, 2, 0).tolist() == [[[0, 1, 0], [0, 1, 0], [1, 0, 0]]]


def test_seg_on_the_very_images_of_a_training(tmp_path, use_model, monkeypatch):
    """The same files as train_seg.py draws, and none that --leave_out names."""
    root = make_data.write_semantics(tmp_path / "data", 20)
    drawn = {"train_size": 4, "split_seed": 2, "leave_out": ["000003", "000007"]}
    use_model("model", ColourClassifier(), options("segmentation", **drawn))
    seen = []

    def record(model, dataset, *more):
        seen.append(dataset.pairs)
        raise InputError("enough")

    monkeypatch.setattr(evaluate, "evaluate_segmentation", record)
    for split in ("train", "val"):
        call(evaluate, "seg", "--weights", "model", "--data_path", root, "--split", split, expect=2)
        expected = make_data.labelled("kitti", root, split, train=split == "train", **drawn)
        assert seen.pop() == expected.pairs


def test_a_model_of_other_classes_names_the_data_set(tmp_path, use_model):
    use_model("model", ColourClassifier(), options("segmentation"))
    root = make_data.write_camvid(tmp_path)
    for data in (("--data", "camvid"), ()):
        if not data:  # what it was trained on
            use_model("model", ColourClassifier(), options("segmentation", data="camvid"))
        assert_one_line(
            call(evaluate, "seg", "--weights", "model", "--data_path", root, *data),
            "model",
            "camvid has others",
        )


# ---------------------------------------------------------------- run folders of the first edition


@pytest.mark.parametrize("task", ("depth", "flow", "reconstruction", "segmentation"))
def test_first_edition_models_load(tmp_path, task):
    """Options as the first edition wrote them, with names of options that are gone."""
    channels = {"depth": 1, "flow": 2, "reconstruction": 3, "segmentation": 19}[task]
    arch = "flow" if task == "flow" else "unet"
    model = networks.build(
        arch, "resnet18", channels, (0,) if task == "segmentation" else (0, 1, 2, 3)
    )
    more = {
        "supervision": "mono",
        "depth_loss": "l1",
        "arch": "unet",
        "encoder": "resnet18",
        "dpt_layers": "spread",
    }
    more |= {"init": "none", "crop": None, "seed": 0, "samples": 352, "steps": 12}
    content = {name: part.state_dict() for name, part in model.parts().items()}
    torch.save({**content, "options": options(task, **more)}, tmp_path / "model.pt")
    for number in (1, 2):
        write_image(tmp_path / "in" / f"{number}.png")
    call(
        evaluate,
        "predict",
        tmp_path / "in",
        "--weights",
        tmp_path,
        "--output",
        tmp_path / "out",
        expect=0,
    )
    assert len(list((tmp_path / "out").glob(f"*_{task}.png"))) == (1 if task == "flow" else 2)
