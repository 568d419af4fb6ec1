"""Our own model.pt, Monodepth2's folders, and what is refused: strictness, pickles, damaged files.

    python -m pytest tests/test_checkpoints.py
    FUZZ=2000 FUZZ_SEED=7 python -m pytest tests/test_checkpoints.py -k damaged
"""

import itertools
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import smooth_images
from sources import few_blocks, image_of, load, save, timm_vit, under  # noqa: F401

import networks
import train_depth
import weights
from utils import InputError

pytestmark = pytest.mark.usefixtures("few_blocks")

DEPTH_OPTIONS = {  # in a model.pt of the first edition
    "task": "depth",
    "supervision": "stereo",
    "depth_loss": "l1",
    "arch": "unet",
    "encoder": "resnet18",
    "dpt_layers": "spread",
    "init": "none",
    "height": 64,
    "width": 96,
    "crop": None,
    "min_depth": 0.54,
    "max_depth": 540.0,
    "data": "kitti",
    "seed": 0,
    "metric": True,
    "samples": 39810,
    "steps": 3,
}


def own_file(folder: Path, model: torch.nn.Module, options: dict) -> str:
    path = str(folder / "model.pt")
    parts = {name: part.state_dict() for name, part in model.parts().items()}
    torch.save({"options": options, **parts}, path)
    return path


@pytest.fixture(scope="module")
def depth() -> torch.nn.Module:
    """A depth network as train_depth.py makes it."""
    torch.manual_seed(0)
    return networks.build("unet", "resnet18", 1, scales=(0, 1, 2, 3)).eval()


# ------------------------------------------------------------------------------------ our own files


def test_whole_depth_network(tmp_path, depth):
    """From model.pt and from its folder: the same outputs, its options, and its name in tables."""
    path = own_file(tmp_path, depth, DEPTH_OPTIONS)
    images = smooth_images(1, 64, 96)
    for place in (path, str(tmp_path)):
        model, options = weights.load_model(place, task="depth")
        assert options["max_depth"] == 540.0
        torch.testing.assert_close(model(images), depth(images))
        expected = "Depth-Rand (stereo) on kitti (39810 samples, 96x64, 3 steps)"
        assert weights.name_pretraining(place) == expected
    with pytest.raises(InputError, match="not for segmentation"):
        weights.load_model(path, task="segmentation")


def test_only_the_head_may_differ(tmp_path, depth):
    """From a depth network, a segmenter takes all but the last layer, and says so."""
    path = own_file(tmp_path, depth, DEPTH_OPTIONS)
    segmenter = networks.build("unet", "resnet18", 19)
    head = segmenter.decoder.decoder[10].conv.weight.clone()
    message = weights.load_weights(segmenter, path, "segmentation")
    assert message == "depth2seg: encoder 120/120, decoder 20/22: head replaced"
    assert torch.equal(segmenter.decoder.decoder[10].conv.weight, head)
    before = depth.decoder.state_dict()
    for key, value in segmenter.decoder.state_dict().items():
        assert key.startswith("decoder.10.") or torch.equal(value, before[key])
    one_class = networks.build("unet", "resnet18", 1)  # the shapes agree, but depth is no class
    message = weights.load_weights(one_class, path, "segmentation")
    assert "head replaced" in message


def test_encoder_alone_leaves_the_decoder(tmp_path, depth):
    path = own_file(tmp_path, depth, DEPTH_OPTIONS)
    model = networks.build("unet", "resnet18", 19)
    before = {key: value.clone() for key, value in model.decoder.state_dict().items()}
    message = weights.load_weights(model, path, "segmentation", "encoder")
    assert message.endswith("decoder fresh")
    for key, value in model.decoder.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("layers", ("spread", "last"))
def test_vits_of_the_first_edition(tmp_path, layers):
    """Their options say nothing of positions, registers or the readout that patches of 16 always had."""
    model = networks.build("dpt", "vit_s16", 1, dpt_layers=layers, readout=True).eval()
    options = {**DEPTH_OPTIONS, "arch": "dpt", "encoder": "vit_s16", "dpt_layers": layers}
    loaded, _ = weights.load_model(own_file(tmp_path, model, options))
    assert loaded.settings == model.settings
    images = image_of(4, 5, 16)
    torch.testing.assert_close(loaded(images), model(images))


def test_positions_and_registers_come_back_from_model_pt(tmp_path):
    """A probe of DINOv2 with registers, saved with its settings, says the same; and starts another."""
    source = timm_vit("vit_small_patch14_reg4_dinov2", 14)
    model, _ = load("linear", "vit_s14", save(tmp_path, source.state_dict()))
    options = {
        "task": "segmentation",
        "arch": "linear",
        "encoder": "vit_s14",
        "height": 70,
        "width": 126,
        "classes": ["a", "b", "c"],
        "colours": [[0, 0, 0], [0, 0, 1], [0, 0, 2]],
        **model.settings,
    }
    path = own_file(tmp_path, model, options)
    loaded, _ = weights.load_model(path)
    images = image_of(5, 9, 14)
    torch.testing.assert_close(loaded(images), model(images))
    again, message = load("linear", "vit_s14", path)
    assert "head replaced" not in message
    assert again.settings == model.settings
    torch.testing.assert_close(again(images), model(images))


def test_other_settings_are_refused(tmp_path):
    model = networks.build("dpt", "vit_s16", 1, dpt_layers="last")
    options = {**DEPTH_OPTIONS, "arch": "dpt", "encoder": "vit_s16", "dpt_layers": "last"}
    path = own_file(tmp_path, model, options)
    with pytest.raises(InputError, match="dpt_layers last, this network has spread"):
        load("dpt", "vit_s16", path)
    load("dpt", "vit_s16", path, dpt_layers="last")


SENSELESS = [
    {"height": 3},
    {"width": 10**6},
    {"min_depth": -1.0},
    {"min_depth": 1000.0},
    {"min_depth": float("nan")},
    {"encoder": "resnet34"},
    {"arch": "pspnet"},
    {"arch": "dpt"},
    {"output_stride": 5},
    {"positions": "mine"},
    {"registers": 10**9},
    {"task": "segmentation"},
    {"task": "segmentation", "classes": ["a"], "colours": [[0, 0, 256]]},
    {"task": "segmentation", "classes": ["a", "b"], "colours": [[0, 0, 0], [0, 0, 0]]},
    {"task": "flow"},
]


@pytest.mark.parametrize("changed", SENSELESS)
def test_senseless_options_are_refused(tmp_path, depth, changed):
    path = own_file(tmp_path, depth, {**DEPTH_OPTIONS, **changed})
    with pytest.raises(InputError) as refusal:
        weights.load_model(path)
    assert "\n" not in str(refusal.value)


# ------------------------------------------------------------------------------------ Monodepth2


def test_monodepth2_folders(tmp_path):
    """As it saves them: sizes beside the encoder's tensors, and a pose network that comes along."""
    depth = networks.build("unet", "resnet50", 1, (0, 1, 2, 3)).eval()
    pose = networks.PoseNet("resnet50")
    extra = {
        "height": 64,
        "width": 96,
        "use_stereo": True,
        "encoder.fc.weight": torch.zeros(1000, 2048),
        "encoder.fc.bias": torch.zeros(1000),
        "encoder.conv1.total_ops": torch.zeros(1),  # thop leaves them
        "total_params": torch.zeros(1),
    }
    torch.save({**depth.encoder.state_dict(), **extra}, tmp_path / "encoder.pth")
    torch.save(depth.decoder.state_dict(), tmp_path / "depth.pth")
    torch.save(pose.encoder.state_dict(), tmp_path / "pose_encoder.pth")
    torch.save(pose.decoder.state_dict(), tmp_path / "pose.pth")
    model, options = weights.load_model(str(tmp_path))
    assert options["encoder"] == "resnet50"
    assert (options["height"], options["width"]) == (64, 96)
    images = smooth_images(1, 64, 96)
    torch.testing.assert_close(model(images), depth(images))

    args = train_depth.parse_options(["--encoder", "resnet50"])
    objective = train_depth.Objective(args, torch.device("cpu"))
    other = objective.pose
    message = weights.load_weights(objective.model, str(tmp_path), "depth", pose=other)
    assert message.endswith("encoder 318/318, decoder 28/28, pose_encoder 318/318, pose 8/8")
    for ours, theirs in zip(other.parameters(), pose.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    message = weights.load_weights(objective.model, str(tmp_path), "depth", "encoder", pose=other)
    assert message.endswith("encoder 318/318, decoder fresh")
    partial = {"net.0.weight": pose.decoder.state_dict()["net.0.weight"]}
    torch.save(partial, tmp_path / "pose.pth")
    with pytest.raises(InputError, match="does not fit pose"):
        weights.load_weights(objective.model, str(tmp_path), "depth", pose=other, min_depth=0.54)
    os.remove(tmp_path / "pose.pth")
    with pytest.raises(InputError, match="belong together"):
        weights.read_checkpoint(str(tmp_path))
    os.remove(tmp_path / "encoder.pth")
    with pytest.raises(InputError, match="neither model.pt nor encoder.pth"):
        weights.read_checkpoint(str(tmp_path))


# ------------------------------------------------------------------------------------ refusals


class Bomb:
    """Unpickled, it would leave a folder."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("key", ("encoder", "state_dict", "options"))
def test_pickles_do_not_run(tmp_path, key):
    path = save(tmp_path, {key: Bomb(f"{tmp_path}/executed")})
    with pytest.raises(InputError, match="code"):
        weights.read_checkpoint(path)
    assert not os.path.exists(tmp_path / "executed")


def test_missing_unknown_and_odd_tensors_are_refused(tmp_path):
    """Nothing is loaded then."""
    state = torchvision.models.resnet18().state_dict()
    short = dict(state)
    del short["bn1.weight"]
    changes = {
        "absent there": short,
        "encoder.layer5.weight is absent here": {**state, "layer5.weight": torch.zeros(3)},
        r"\(64,\) here, \(32,\) there": {**state, "bn1.weight": torch.zeros(32)},
        "not finite": {**state, "bn1.weight": torch.full((64,), torch.nan)},
    }
    for prefix, words in itertools.product(("", "net.trunk."), changes):
        content = under(prefix, changes[words])
        model = networks.build("unet", "resnet18", 3)
        before = model.encoder.encoder.conv1.weight.clone()
        with pytest.raises(InputError, match=words) as refusal:
            weights.load_weights(model, save(tmp_path, content), "segmentation")
        assert "\n" not in str(refusal.value)
        assert torch.equal(model.encoder.encoder.conv1.weight, before)


TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
HYBRID = "pretrained.model.patch_embed.backbone.stem.conv.weight"
LAST = {"step": 3, "args": {}, "log_size": 9, "model": {"encoder": {}}, "optimizer": {}}
THREE = torch.zeros(3)
TOKEN = torch.zeros(1, 1, 384)
RESNET = {"layer4.0.conv1.weight": THREE}
SIAMESE = {**under("online.0.", RESNET), **under("target.0.", RESNET)}
ENDLESS = {}
ENDLESS["net"] = ENDLESS
UNSUPPORTED = [  # content, and what is said of it
    ({"state_dict": {"stages.0.weight": THREE}}, "stages.0.weight"),
    ({"net.cls_token": TOKEN, "net.patch_embed.proj.weight": THREE}, "holds net.cls_token"),
    ({"epoch": 3}, "no tensors"),
    ({"net": RESNET, "ema": RESNET}, r"several networks \(net, ema\)"),
    ({"model": {"net": RESNET, "ema": RESNET}}, r"several networks \(model.net, model.ema\)"),
    (SIAMESE, r"several networks \(online.0., target.0.\)"),
    ({"state_dict": SIAMESE}, r"several networks \(online.0., target.0.\)"),
    ({"encoder.conv1.weight": THREE, "height": 192}, "give its folder"),
    ({"decoder.0.conv.conv.weight": THREE}, "give its folder"),
    ({}, "no tensors"),
    (ENDLESS, "no tensors"),
    ({"teacher": {"blocks.0.mlp.w12.weight": THREE}}, "SwiGLU"),
    ({"model": {"dist_token": THREE}}, "distilled"),
    ({HYBRID: THREE}, "hybrid"),
    ({TABLE: THREE}, "Swin"),
    ({"module.base_encoder.cls_token": TOKEN}, "12 heads"),
    ({"cls_token": TOKEN, "head.weight": THREE}, "not whole"),
    (LAST, "take model.pt"),
    ({"options": {"task": 3}, "encoder": {}}, "task"),
    ({"options": [], "encoder": {}}, "not a dict"),
    ({"options": {}, "encoder": {"weight": 3}}, "not a dict of tensors"),
    ({"options": {}, "encoder": {3: THREE}}, "not a dict of tensors"),
]


@pytest.mark.parametrize("content, words", UNSUPPORTED)
def test_what_is_not_supported_says_why(tmp_path, content, words):
    path = save(tmp_path, content)
    with pytest.raises(InputError, match=words) as refusal:
        weights.read_checkpoint(path)
    assert str(refusal.value).startswith(path)


def test_torchscript_says_so(tmp_path, recwarn):
    """A file or the one of a folder; torch would warn in two lines and call it damaged."""
    path = str(tmp_path / "model.pt")
    torch.jit.trace(torch.nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 8, 8)).save(path)
    recwarn.clear()
    for place in (path, str(tmp_path)):
        with pytest.raises(InputError, match="TorchScript.*state_dict") as refusal:
            weights.read_checkpoint(place)
        assert str(refusal.value).startswith(path)
    assert not recwarn.list


def test_an_empty_path_says_so(tmp_path, monkeypatch):
    """As of a variable that is not set; training options make a dot of it."""
    monkeypatch.chdir(tmp_path)
    for path, words in (("", "empty"), (os.path.normpath(""), r"^\. holds neither")):
        with pytest.raises(InputError, match=words):
            weights.read_checkpoint(path)


def test_whole_networks_are_needed_to_predict(tmp_path):
    """What holds less is for --init, and says so."""
    resnet = torchvision.models.resnet18().state_dict()
    with pytest.raises(InputError, match="for --init"):
        weights.load_model(save(tmp_path, resnet))
    state = timm_vit("vit_small_patch14_dinov2", 14).state_dict()
    tensors = under("pretrained.", state)
    tensors["depth_head.projects.0.weight"] = torch.zeros(48, 384, 1, 1)
    path = save(tmp_path, tensors)
    with pytest.raises(InputError, match="for --init"):
        weights.load_model(path)
    with pytest.raises(InputError, match="--init_parts encoder"):
        load("dpt", "vit_s14", path)
    model = networks.build("dpt", "vit_s14", 3)
    message = weights.load_weights(model, path, "segmentation", "encoder")
    assert message == "Depth Anything: encoder 78/78, decoder fresh"


# ------------------------------------------------------------------------------------ damaged files


def tiny_files(folder: Path) -> list[Path]:
    """One of each container, small, to be damaged."""
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {}
    for i in range(6):
        tensors[f"layer4.{i}.conv1.weight"] = torch.rand(8, 3, 3, 3)
    own = {"options": DEPTH_OPTIONS, "encoder": tensors, "decoder": tensors}
    torch.save(own, folder / "model.pt")
    torch.save({"state_dict": tensors}, folder / "resnet.pth")
    torch.save({"model": tensors}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    safetensors.save_file(tensors, folder / "resnet.safetensors")
    return sorted(folder.iterdir())


def mutate(data: bytes, other: bytes, draw: np.random.Generator) -> bytes:
    """Cut a file, change some bytes, or give it another file's end."""
    kind = draw.integers(3)
    cut = draw.integers(len(data))
    if kind == 0:
        return data[:cut]
    if kind == 1:
        return data[:cut] + other[cut:]
    changed = bytearray(data)
    for position in draw.integers(len(data), size=draw.integers(1, 5)):
        changed[position] = draw.integers(256)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_damaged_files_are_refused_in_one_line(tmp_path):
    """$FUZZ random mutations: refused, or still dicts of tensors."""
    paths = tiny_files(tmp_path)
    contents = [path.read_bytes() for path in paths]
    draw = np.random.default_rng(int(os.environ.get("FUZZ_SEED", "0")))
    for number in range(int(os.environ.get("FUZZ", "200"))):
        which, other = draw.integers(len(paths), size=2)
        path = paths[which]
        path.write_bytes(mutate(contents[which], contents[other], draw))
        try:
            _, parts, _ = weights.read_checkpoint(str(path))
        except InputError as error:
            assert "\n" not in str(error), number
            assert len(str(error)) < 600, number
        else:
            for part in parts.values():
                assert all(torch.is_tensor(value) for value in part.values()), number
        path.write_bytes(contents[which])


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = [
    json.dumps({"a": {**ENTRY, "shape": [3]}}),
    json.dumps({"a": {**ENTRY, "dtype": "F99"}}),
    json.dumps({"a": {**ENTRY, "data_offsets": [0, 10**12]}}),
    "{" + 30 * "x",
]


@pytest.mark.parametrize("header", HEADERS)
def test_safetensors_with_a_false_header(tmp_path, header):
    """Sizes that do not fit, an unknown type, a header that is no JSON."""
    path = tmp_path / "model.safetensors"
    length = struct.pack("<Q", len(header))
    path.write_bytes(length + header.encode() + bytes(8))
    with pytest.raises(InputError, match="damaged"):
        weights.read_checkpoint(str(path))
