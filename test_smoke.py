"""Tests: agreement with Monodepth2, geometry and metrics by construction, every script tiny, errors as users meet them.

    python -m pytest -n 2                    # everything, three minutes on two cores, no network
    python -m pytest -k golden               # numbers of Monodepth2, from ../shared/golden or $GOLDEN_DIR

Tests on real images read ../shared/data or $DEPTH2SEG_DATA. Where a folder is absent, its tests are skipped and say so.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the same bits in this process and in those that it starts, and no idle spinning

import argparse
import ast
import collections
import contextlib
import csv
import fnmatch
import functools
import glob
import itertools
import json
import multiprocessing
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import datasets
import evaluate
import losses
import networks
import train_depth
import train_seg
import utils

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.environ.get("GOLDEN_DIR") or os.path.join(HERE, "..", "shared", "golden")
DATA = os.environ.get("DEPTH2SEG_DATA") or os.path.join(HERE, "..", "shared", "data")


# ------------------------------------------------------------------------------------ helpers

@pytest.fixture(autouse=True)
def fresh_signals():
    """No test runs for more than five minutes ($TEST_SECONDS), and none leaves a run's signal handlers behind."""
    def give_up(number: int, frame: object) -> None:
        raise TimeoutError("a test took more than $TEST_SECONDS (300)")

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(int(os.environ.get("TEST_SECONDS", "300")))
    yield
    signal.alarm(0)
    for number, handler in before.items():
        signal.signal(number, handler)


def golden_files(pattern: str) -> list:
    """Parameters for every golden file (or folder) of a kind, whatever its seed; a skipped one where there is none."""
    found = sorted(glob.glob(os.path.join(GOLDEN, pattern)))
    missing = pytest.param(None, marks=pytest.mark.skip(reason=f"no {pattern} in {GOLDEN} (set GOLDEN_DIR)"))
    return [pytest.param(path, id=os.path.splitext(os.path.basename(path))[0]) for path in found] or [missing]


def read_golden(path: str) -> dict[str, torch.Tensor]:
    """The arrays of a golden file as tensors; text stays out."""
    with np.load(path) as content:
        return {key: torch.from_numpy(content[key]) for key in content.files if content[key].dtype.kind != "U"}


def real_data(*parts: str) -> str:
    """A folder of real data, or a skip that names it."""
    path = os.path.join(DATA, *parts)
    if not os.path.isdir(path):
        pytest.skip(f"no real data at {path} (set DEPTH2SEG_DATA)")
    return path


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float = 2e-5, absolute: float = 2e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=relative, atol=absolute)


def relative_distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 distance relative to the expected norm: for gradients, where single pixels may take a subgradient."""
    return float((actual - expected).norm() / expected.norm())


def without_outliers(
    actual: torch.Tensor, expected: torch.Tensor, share: float = 2e-3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both without the few pixels that differ most."""
    kept = (actual - expected).abs().flatten().argsort()[:int((1 - share) * actual.numel())]
    return (actual.flatten()[kept], expected.flatten()[kept]) if actual.numel() > 100 else (actual, expected)


def smooth_images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random images without hard edges, (batch, 3, height, width) in (0, 1)."""
    coarse = torch.rand(batch, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)


def camera(focal: float, height: int, width: int, batch: int = 1) -> torch.Tensor:
    """K (batch, 3, 3) with the principal point off the middle, as in KITTI."""
    K = torch.tensor([[focal, 0, 0.48 * width], [0, 1.1 * focal, 0.53 * height], [0, 0, 1]])
    return K.expand(batch, 3, 3).clone()


def shift_pose(x: float = 0.0, y: float = 0.0, z: float = 0.0) -> torch.Tensor:
    """T (1, 4, 4) of a translation."""
    T = torch.eye(4)[None]
    T[0, :3, 3] = torch.tensor([x, y, z])
    return T


# ------------------------------------------------------------------------------------ golden: geometry

@pytest.mark.parametrize("path", golden_files("geometry_seed*.npz"))
def test_golden_geometry(path):
    golden = read_golden(path)
    depth = losses.disparity_to_depth(golden["disp"], float(golden["min_depth"]), float(golden["max_depth"]))
    assert_close(depth, golden["depth_from_disp"])
    assert_close(1 / depth, golden["scaled_disp"])
    for invert in (False, True):
        matrix = losses.pose_to_matrix(golden["axisangle"][:, 0], golden["translation"][:, 0], invert=invert)
        assert_close(matrix, golden[f"T_invert{int(invert)}"])


@pytest.mark.parametrize("suffix", ("", "_behind"))
@pytest.mark.parametrize("path", golden_files("geometry_seed*.npz"))
def test_golden_projection(path, suffix):
    """Where pixels land, how deep, and the colour there; `_behind`: a quarter of them lie behind the camera."""
    golden = read_golden(path)
    K, T, image = golden["K"][:, :3, :3], golden["T" + suffix], golden["image"]
    pixels, z = losses.project(golden["depth"], K, T)
    limit = torch.tensor([image.shape[3] - 1, image.shape[2] - 1])
    usable = (golden["z" + suffix].abs() > 1e-2)[:, 0]  # nearer to the camera plane, rounding decides
    assert_close(z, golden["z" + suffix], absolute=2e-5)
    expected = (golden["pix_coords" + suffix] + 1) / 2 * limit
    assert_close(pixels[usable], expected[usable], relative=1e-4, absolute=1e-3)
    warped, inside = losses.sample(image, pixels)
    assert_close(warped.movedim(1, 3)[usable], golden[f"warped_ac1{suffix}"].movedim(1, 3)[usable], absolute=2e-4)
    clear = usable & ((golden["pix_coords" + suffix].abs() - 1).abs() > 1e-4).all(3)  # off the very border
    assert torch.equal(inside[:, 0][clear], (golden["pix_coords" + suffix].abs() <= 1).all(3)[clear])


@pytest.mark.parametrize("path", golden_files("geometry_seed*.npz"))
def test_golden_photometric_and_smoothness(path):
    golden = read_golden(path)
    for suffix in ("", "_near"):
        error = losses.ssim_error(golden["ssim_x" + suffix], losses.local_statistics(golden["ssim_y" + suffix]))
        # variances are differences of nearly equal numbers: float32 leaves either side about 7e-5 away from float64
        assert_close(error, golden["ssim" + suffix], absolute=1.5e-4)
        assert_close(error.mean(), golden["ssim" + suffix].mean(), absolute=1e-7)
    assert_close(losses.photometric_error(golden["ssim_x"], golden["ssim_y"]), golden["photometric"], absolute=5e-5)
    assert_close(losses.disparity_smoothness(golden["smooth_disp"], golden["smooth_image"]), golden["smooth_loss"])
    assert_close(losses.smoothness(golden["smooth_disp"], golden["smooth_image"]), golden["smooth_loss_raw"])


# ------------------------------------------------------------------------------------ golden: depth loss

LOSS_VARIANTS = {  # source views and options of every variant that depth_loss offers
    "mono": (("-1", "1"), {}),
    "mono_avg": (("-1", "1"), {"minimum": False}),
    "mono_noautomask": (("-1", "1"), {"automask": False}),
    "mono_avg_noautomask": (("-1", "1"), {"automask": False, "minimum": False}),
    "mono_nossim": (("-1", "1"), {"ssim": False}),
    "stereo": (("s",), {}),
    "mono_stereo": (("-1", "1", "s"), {}),
}
LOSS_FILES = [pytest.param(variant, *entry.values, marks=entry.marks, id=entry.id)
              for variant in LOSS_VARIANTS for entry in golden_files(f"loss_{variant}_seed*.npz")]


def golden_loss(path: str, variant: str):
    """Arguments of depth_loss from the golden inputs, and the leaves whose gradients are known, by name."""
    inputs = read_golden(os.path.join(os.path.dirname(path), f"loss_inputs_seed{path.rpartition('seed')[2]}"))
    views, options = LOSS_VARIANTS[variant]
    leaves = {f"disp_{s}": inputs[f"disp_{s}"].requires_grad_() for s in range(4)}
    poses = []
    for view in views:
        if view == "s":
            poses.append(inputs["stereo_T"])
            continue
        for kind in ("axisangle", "translation"):
            leaves[f"{kind}_{view}"] = inputs[f"{kind}_{view}"].requires_grad_()
        poses.append(
            losses.pose_to_matrix(
                leaves[f"axisangle_{view}"][:, 0], leaves[f"translation_{view}"][:, 0], invert=view == "-1"
            )
        )
    pyramid = [inputs[f"color_0_{s}"].float() / 255 for s in range(4)]
    sources = [inputs[f"color_{view}_0"].float() / 255 for view in views]
    disparities = [leaves[f"disp_{s}"] for s in range(4)]

    def loss(disparities, pyramid=pyramid):
        return losses.depth_loss(
            disparities, pyramid, sources, inputs["K_0"][:, :3, :3], poses, mask_outside=False, **options
        )
    return loss, disparities, leaves


@pytest.mark.parametrize("corners", (True, False), ids=("ac1", "ac0"))
@pytest.mark.parametrize("variant, path", LOSS_FILES)
def test_golden_depth_loss(monkeypatch, variant, path, corners):
    """Loss, masks, warped views and gradients.

    The published numbers exist for both readings of `grid_sample`, gradients mostly for align_corners=False (ac0): the
    sampling is switched for those, and everything around it stays what it is.
    """
    grid_sample = F.grid_sample
    if not corners:
        monkeypatch.setattr(
            losses.F, "grid_sample", lambda *args, **options: grid_sample(*args, **{**options, "align_corners": False})
        )
    golden = {key[4:]: value for key, value in read_golden(path).items() if key.startswith(f"ac{int(corners)}_")}
    loss, disparities, leaves = golden_loss(path, variant)

    terms, views = loss(disparities)
    assert_close(terms["loss"], golden["loss"])
    terms["loss"].backward()
    expected = {key[5:]: value for key, value in golden.items() if key.startswith("grad_")}
    assert corners or set(expected) == set(leaves)
    for name, gradient in expected.items():
        # where a sampling point sits on an integer, or two sources tie, either subgradient is right: a few pixels
        # may differ, all others must not, and the sums over pixels (the poses) only by that little
        assert relative_distance(leaves[name].grad, gradient) < (5e-2 if "disp" in name else 1e-2), name
        assert relative_distance(*without_outliers(leaves[name].grad, gradient)) < (2e-3 if "disp" in name else 1e-2), (
            name
        )

    for scale in range(4):
        first, _ = loss(disparities[:scale + 1])
        assert_close(first["loss"], torch.stack([golden[f"loss_{s}"] for s in range(scale + 1)]).mean())
        full = F.interpolate(disparities[scale], (64, 96), mode="bilinear", align_corners=False)
        _, views = loss([full])
        if f"identity_selection_{scale}" in golden:
            won = golden[f"identity_selection_{scale}"].bool()
            assert (views["mask"][:, 0] != won).float().mean() < 1e-3  # a tie may fall either way
        else:
            assert views["mask"].all()
        if scale == 2 and any(key.startswith("warped_") for key in golden):
            warped = torch.stack([golden[f"warped_{view}_2"] for view in LOSS_VARIANTS[variant][0]], 1)
            assert_close(views["warped"], warped, absolute=2e-4)


# ------------------------------------------------------------------------------------ golden: networks

def golden_keys() -> dict[str, dict[str, list[int]]]:
    with open(os.path.join(GOLDEN, "state_dict_keys.json")) as file:
        return json.load(file)


def golden_parameters(network: str, seed: int) -> dict[str, torch.Tensor]:
    """The reference's state dict of a network (with its unused `fc`), filled by the golden folder's formula."""
    shapes, filled = golden_keys()[network], {}
    for i, key in enumerate(sorted(shapes)):
        shape = tuple(shapes[key])
        count = int(np.prod(shape))
        j = np.arange(count, dtype=np.int64)
        u = ((j * j * 7919 + j * (2 * i + 1) * 101 + 13 * i + 977 * seed) % 65521) / 65521 * 2 - 1
        if key.endswith("num_batches_tracked"):
            filled[key] = torch.zeros((), dtype=torch.int64)
            continue
        if key.endswith("running_var"):
            values = 1 + 0.5 * u
        elif len(shape) > 1:
            values = u * np.sqrt(4.5 / (count // shape[0]))
        elif key.endswith("weight"):
            values = 0.7 + 0.2 * u
        else:
            values = 0.1 * u
        filled[key] = torch.from_numpy(values.astype(np.float32)).view(shape)
    return filled


def seed_of(path: str) -> int:
    return int(os.path.splitext(path)[0].rpartition("seed")[2])


def write_monodepth2_folder(folder, size: str, seed: int, **extra) -> str:
    """A folder as Monodepth2 publishes its weights; `extra` entries go into encoder.pth beside the tensors."""
    os.makedirs(folder, exist_ok=True)
    for file, network in (
        ("encoder", "encoder"),
        ("depth", "depth"),
        ("pose_encoder", "pose_encoder"),
        ("pose", "pose"),
    ):
        content = golden_parameters(f"{network}_{size}", seed)
        torch.save({**content, **extra} if file == "encoder" else content, os.path.join(folder, f"{file}.pth"))
    return str(folder)


@pytest.mark.parametrize("size", ("r18", "r50"))
@pytest.mark.parametrize("path", golden_files("state_dict_keys.json"))
def test_golden_parameter_names(path, size):
    """Names and shapes are the published ones, except for the classifier that nothing uses."""
    model, pose = (
        networks.build("unet", f"resnet{size[1:]}", 1, scales=(0, 1, 2, 3)),
        networks.PoseNet(f"resnet{size[1:]}"),
    )
    for part, module in (
        ("encoder", model.encoder),
        ("depth", model.decoder),
        ("pose_encoder", pose.encoder),
        ("pose", pose.decoder),
    ):
        ours = {key: list(value.shape) for key, value in module.state_dict().items()}
        assert ours == {key: shape for key, shape in golden_keys()[f"{part}_{size}"].items() if ".fc." not in key}


@pytest.mark.parametrize("path", golden_files("depth_r*_seed*.npz"))
def test_golden_depth_network(tmp_path, path):
    """A folder of Monodepth2 loads as it is, through both ways in, and gives the published outputs."""
    golden, size = read_golden(path), os.path.basename(path).split("_")[1]
    folder = write_monodepth2_folder(tmp_path / "mono", size, seed_of(path), height=64, width=96, use_stereo=True)
    model, options = networks.load_model(folder)
    assert (options["height"], options["width"], options["use_stereo"], options["task"]) == (64, 96, True, "depth")
    assert (options["min_depth"], options["max_depth"], options["encoder"]) == (0.1, 100, f"resnet{size[1:]}")

    initialised = networks.build("unet", f"resnet{size[1:]}", 1, scales=(0, 1, 2, 3)).eval()
    message = networks.load_weights(initialised, folder, "depth")
    total = len(initialised.encoder.state_dict())
    assert f"encoder {total}/{total}" in message and "decoder 28/28" in message
    with torch.no_grad():
        features = model.encoder(golden["input"])
        for level, feature in enumerate(features):
            assert_close(feature[:1, ::8], golden[f"feature_{level}_every8th_channel_of_sample0"], 1e-5, 1e-5)
        for network in (model, initialised):
            for scale, output in enumerate(network(golden["input"])):
                assert_close(output.sigmoid(), golden[f"disp_{scale}"], 1e-5, 1e-5)


@pytest.mark.parametrize("path", golden_files("pose_r*_seed*.npz"))
def test_golden_pose_network(tmp_path, path):
    """The same for the pose network, with both predictions of the decoder."""
    golden, size = read_golden(path), os.path.basename(path).split("_")[1]
    pose = networks.PoseNet(f"resnet{size[1:]}").eval()
    folder = write_monodepth2_folder(tmp_path / "mono", size, seed_of(path))
    message = networks.load_weights(
        networks.build("unet", f"resnet{size[1:]}", 1, scales=(0, 1, 2, 3)), folder, "depth", pose=pose
    )
    assert "pose 8/8" in message
    with torch.no_grad():
        features = pose.encoder(golden["input"])
        for level, feature in enumerate(features):
            assert_close(feature[:, ::8], golden[f"feature_{level}_every8th_channel"], 1e-5, 1e-5)
        axisangle, translation = pose.decoder(features[-1])
        assert_close(axisangle, golden["axisangle"][:, :, 0], 1e-5, 1e-7)
        assert_close(translation, golden["translation"][:, :, 0], 1e-5, 1e-7)
        first, second = golden["input"].split(3, 1)
        for ours, all_predictions in zip(pose(first, second), (axisangle, translation)):
            assert torch.equal(ours, all_predictions[:, 0])


# ------------------------------------------------------------------------------------ golden: evaluation

EVALUATION_VARIANTS = {"mono_eigen": {}, "stereo_eigen": {"scale": 5.4}, "mono_eigen_noscale": {"scale": 1.0},
                       "mono_benchmark_mask": {"crop": False}}


@pytest.mark.parametrize("variant", EVALUATION_VARIANTS)
@pytest.mark.parametrize("path", golden_files("evaluation_seed*.npz"))
def test_golden_evaluation(path, variant):
    golden = {key: value.numpy() for key, value in read_golden(path).items()}
    rows = []
    for index, disparity in enumerate(golden["pred_disp"]):
        row = evaluate.evaluate_depth_image(disparity, golden[f"gt_{index}"], **EVALUATION_VARIANTS[variant])
        assert row["pixels"] == golden[f"{variant}_count"][index]
        np.testing.assert_allclose(
            [row[key] for key in evaluate.DEPTH_METRICS], golden[f"{variant}_errors"][index], rtol=1e-4, atol=1e-6
        )
        rows.append(row)
    summary = evaluate.summarise_depth(rows)
    np.testing.assert_allclose([summary[key] for key in evaluate.DEPTH_METRICS], golden[f"{variant}_mean"], rtol=5e-5)
    if variant == "mono_eigen":
        ratios = golden["mono_eigen_ratios"]
        np.testing.assert_allclose([row["ratio"] for row in rows], ratios, rtol=2e-5)
        np.testing.assert_allclose([row["scale"] for row in rows], ratios, rtol=2e-5)
        assert summary["ratio_median"] == pytest.approx(np.median(ratios), rel=2e-5)
        assert summary["ratio_deviation"] == pytest.approx(np.std(ratios / np.median(ratios)), rel=1e-4)


@pytest.mark.parametrize("path", golden_files("evaluation_seed*.npz"))
def test_golden_depth_errors_and_crop(path):
    golden = {key: value.numpy() for key, value in read_golden(path).items()}
    for measured, predicted, expected in (("errors_gt", "errors_pred", golden["errors"]),
                                          ("mono_eigen_gt0", "mono_eigen_pred0", golden["mono_eigen_errors"][0])):
        errors = evaluate.depth_errors(golden[measured], golden[predicted])
        np.testing.assert_allclose([errors[key] for key in evaluate.DEPTH_METRICS], expected, rtol=2e-5)
    for index in range(len(golden["pred_disp"])):
        assert evaluate.garg_crop(*golden[f"gt_{index}"].shape) == tuple(golden[f"crop_{index}"])


@pytest.mark.parametrize("forward_distance", (False, True), ids=("z", "forward"))
@pytest.mark.parametrize("camera_number", (2, 3))
@pytest.mark.parametrize("folder", golden_files("kitti_seed*"))
def test_golden_velodyne(tmp_path, folder, camera_number, forward_distance):
    """Raw points through `KittiRaw`, beside images that are made up for it."""
    root = shutil.copytree(folder, tmp_path / "kitti")
    drive = next(path for path in (root / "2011_09_26").iterdir() if path.is_dir())
    os.chmod(drive, 0o755)
    for images in ("image_02", "image_03"):
        os.makedirs(drive / images / "data")
        Image.new("RGB", (310, 94)).save(drive / images / "data" / "0000000007.png")
    clips = datasets.KittiRaw(
        str(root), ["0"], split=None, cameras="l" if camera_number == 2 else "r", with_depth=True, height=32, width=96
    )
    kind, points, name, side, _ = clips.samples[0]["depth"]
    ours = clips.depth_map((kind, points, name, side, forward_distance))
    if not forward_distance:  # ours lies where the depth benchmark has it; the reference counts pixels from 1 here too
        calibration = clips.calibration("2011_09_26")
        points = np.fromfile(points, np.float32).reshape(-1, 4)
        arguments = points, calibration["velodyne"], calibration["P"][side], calibration["shape"]
        unmoved, ours = ours, datasets.velodyne_depth(*arguments, offset=1)
        np.testing.assert_array_equal(unmoved, datasets.velodyne_depth(*arguments))

    golden = np.load(root / "depth_maps.npz")
    expected = golden[f"cam{camera_number}_vel{int(forward_distance)}"]
    # the reference takes the last pixel of a row and the first of the next for one: where both are hit it is wrong
    compared = np.ones(ours.shape, bool)
    both = (expected[:-1, -1] > 0) | (ours[:-1, -1] > 0), (expected[1:, 0] > 0) | (ours[1:, 0] > 0)
    compared[:-1, -1] &= ~(both[0] & both[1])
    compared[1:, 0] &= ~(both[0] & both[1])
    assert (~compared).sum() < 40
    if camera_number == 2 and not forward_distance:
        rows, columns = golden["pixels_differing_from_clean_min_cam2_vel0"].T
        assert not compared[rows, columns].any()
        compared[:] = True
        compared[rows, columns] = False
    np.testing.assert_allclose(ours[compared], expected[compared], rtol=1e-9)
    assert (expected > 0).sum() > 500


# ------------------------------------------------------------------------------------ geometry by construction

def test_identity_pose_warps_an_image_to_itself():
    image, depth = (
        smooth_images(2, 32, 48),
        1 + 20 * torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(1)),
    )
    warped, valid = losses.synthesize(image, depth, camera(40, 32, 48, 2), torch.eye(4).expand(2, 4, 4))
    assert_close(warped, image, absolute=1e-4)
    assert valid[..., 1:-1, 1:-1].all()


@pytest.mark.parametrize("disparity", (6, -6))
def test_plane_shifts_by_focal_baseline_over_depth(disparity):
    """A camera `b` to the right sees a plane at depth z shifted to the left by fx * b / z pixels."""
    focal, z = 40.0, 5.0
    baseline = disparity * z / focal  # of the source camera, to the right of the target's
    target = smooth_images(1, 32, 96)
    source = target.roll(-disparity, 3)
    depth = torch.full((1, 1, 32, 96), z)
    pixels, in_front = losses.project(depth, camera(focal, 32, 96), shift_pose(x=-baseline))
    columns, rows = torch.arange(96.0), torch.arange(32.0)
    assert_close(pixels[0, ..., 0], (columns - disparity).expand(32, 96), absolute=1e-3)
    assert_close(pixels[0, ..., 1], rows[:, None].expand(32, 96), absolute=1e-3)
    assert_close(in_front, depth)
    warped, valid = losses.synthesize(source, depth, camera(focal, 32, 96), shift_pose(x=-baseline))
    assert_close(warped[..., 8:-8], target[..., 8:-8], absolute=1e-3)
    outside = columns < disparity if disparity > 0 else columns > 95 + disparity
    assert torch.equal(valid[0, 0, 5], ~outside)


def test_pose_matrices():
    generator = torch.Generator().manual_seed(0)
    axisangle, translation = 2 * torch.randn(16, 3, generator=generator), torch.randn(16, 3, generator=generator)
    forward, backward = (losses.pose_to_matrix(axisangle, translation, invert) for invert in (False, True))
    assert_close(forward @ backward, torch.eye(4).expand(16, 4, 4), absolute=1e-5)
    quarter_turn = losses.pose_to_matrix(torch.tensor([[0, 0, torch.pi / 2]]), torch.tensor([[1.0, 2, 3]]))
    assert_close(quarter_turn @ torch.tensor([1.0, 0, 0, 1]), torch.tensor([[1.0, 3, 3, 1]]))
    still = torch.zeros(1, 3, requires_grad=True)  # where training starts: the gradient must exist there
    losses.pose_to_matrix(still, torch.zeros(1, 3)).sum().backward()
    assert still.grad.isfinite().all()


def seed_that_flips(flip: bool) -> int:
    return next(seed for seed in range(100) if (np.random.default_rng(seed).random() < 0.5) == flip)


def test_flip_of_a_sample_commutes_with_view_synthesis():
    images, depth = smooth_images(2, 32, 48), 2 + 5 * smooth_images(1, 32, 48, seed=1)[:, :1]
    K, T = camera(40, 32, 48), shift_pose(x=-0.3)
    warped, valid = losses.synthesize(images[1:], depth, K, T)
    sample = {"frames": images.clone(), "depth": depth[0].clone(), "K": K[0].clone(), "stereo_T": T[0].clone()}
    flipped = datasets.crop_and_flip(sample, None, np.random.default_rng(seed_that_flips(True)))
    assert torch.equal(flipped["frames"], images.flip(-1)) and torch.equal(flipped["depth"], depth[0].flip(-1))
    warped_flipped, valid_flipped = losses.synthesize(
        flipped["frames"][1:], flipped["depth"][None], flipped["K"][None], flipped["stereo_T"][None]
    )
    assert_close(warped_flipped, warped.flip(-1), absolute=1e-4)
    assert torch.equal(valid_flipped[..., 1:-1, 1:-1], valid.flip(-1)[..., 1:-1, 1:-1])


@pytest.mark.parametrize("seed", range(6))
def test_crop_and_flip_keep_every_pixels_ray(seed):
    """Images that hold their own pixel coordinates: after the transform, K must send each to the ray it had."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    K = camera(50, 40, 60)[0]
    sample = datasets.crop_and_flip({"frames": torch.stack([x, y])[None], "label": x.clone(), "K": K.clone()}, (32, 32),
                                    np.random.default_rng(seed))
    assert sample["frames"].shape == (1, 2, 32, 32) and torch.equal(sample["label"], sample["frames"][0, 0])
    (x, y), new = sample["frames"][0], sample["K"]
    sign = -1 if x[0, 0] > x[0, 1] else 1
    assert_close((torch.arange(32.0) - new[0, 2]) / new[0, 0] * sign, (x[0] - K[0, 2]) / K[0, 0], absolute=1e-5)
    assert_close((torch.arange(32.0) - new[1, 2]) / new[1, 1], (y[:, 0] - K[1, 2]) / K[1, 1], absolute=1e-5)


@pytest.mark.parametrize("new", ((16, 32), (32, 48), (96, 160)))
def test_intrinsics_follow_the_resized_image(new):
    """Images that hold their own pixel coordinates, resized by the function the data sets use, against K resized."""
    old = (48, 80)
    K = camera(60, *old)[0].double().numpy()
    resized_K = datasets.resize_intrinsics(K, old, new)
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(80.0), indexing="ij")
    x, y = datasets.resize(torch.stack([x, y, y]), list(new), antialias=True)[:2].double().numpy()
    inner = slice(3, -3)  # the filter has no neighbours beyond the edge
    for axis, coordinates, count in ((0, x[5], new[1]), (1, y[:, 5], new[0])):
        ray_before = (coordinates - K[axis, 2]) / K[axis, axis]
        ray_after = (np.arange(count) - resized_K[axis, 2]) / resized_K[axis, axis]
        difference = (ray_after - ray_before)[inner] * K[
            axis, axis
        ]  # in old pixels; the filter itself wobbles by less than 0.1
        assert abs(difference.mean()) < 0.01 and abs(difference).max() < 0.1


# ------------------------------------------------------------------------------------ losses by construction

@pytest.mark.parametrize("minimum", (True, False), ids=("minimum", "average"))
@pytest.mark.parametrize("pose", (shift_pose(z=-5), shift_pose(x=-400)), ids=("behind", "outside"))
def test_unseen_pixels_do_not_train(pose, minimum):
    """The left half of the scene is near: the source has it behind itself, or far outside its image."""
    target, source = smooth_images(1, 32, 64), smooth_images(1, 32, 64, seed=1)
    near = torch.zeros(1, 1, 32, 64, dtype=torch.bool)
    near[..., :32] = True
    K = camera(40, 32, 64)

    def run(near_disparity: float, mask_outside: bool = True):
        disparity = torch.full((1, 1, 32, 64), 1e-5).masked_fill(near, near_disparity).requires_grad_()
        terms, views = losses.depth_loss(
            [disparity],
            [target],
            [source],
            K,
            [pose],
            min_depth=1,
            max_depth=2000,
            smoothness_weight=0.0,
            automask=False,
            minimum=minimum,
            ssim=False,
            mask_outside=mask_outside,
        )
        terms["loss"].backward()
        return terms["loss"].detach(), disparity.grad, views["mask"]

    loss, gradient, mask = run(0.5)
    other_loss, other_gradient, _ = run(0.999)
    assert not mask[near].any() and mask[~near].float().mean() > 0.5
    assert torch.equal(loss, other_loss) and torch.equal(gradient[~near], other_gradient[~near])
    assert (gradient[near] == 0).all() and gradient[~near].abs().sum() > 0
    assert run(0.5, mask_outside=False)[0] != loss  # it would have mattered


@pytest.mark.parametrize("minimum", (True, False), ids=("minimum", "average"))
def test_a_source_that_sees_nothing_changes_nothing(minimum):
    target, good, bad = (smooth_images(2, 32, 64, seed=seed) for seed in range(3))
    disparity = (0.02 + 0.1 * smooth_images(2, 32, 64, seed=4)[:, :1]).requires_grad_()
    K, T, behind = camera(40, 32, 64, 2), shift_pose(x=-0.1).expand(2, 4, 4), shift_pose(z=-1000).expand(2, 4, 4)

    def run(sources, poses):
        terms, _ = losses.depth_loss([disparity], [target], sources, K, poses, automask=False, minimum=minimum)
        return terms["loss"].detach(), torch.autograd.grad(terms["loss"], disparity)[0]
    for ours, alone in zip(run([good, bad], [T, behind]), run([good], [T])):
        assert_close(ours, alone, absolute=1e-9)
    loss, gradient = run([bad], [behind])
    smooth = losses.disparity_smoothness(disparity, target)
    assert_close(loss, 1e-3 * smooth.detach())
    assert_close(gradient, 1e-3 * torch.autograd.grad(smooth, disparity)[0], absolute=1e-9)


def test_stationary_pixels_are_masked():
    """A camera that stands still: the unmoved source explains every pixel, so nothing trains."""
    image = smooth_images(1, 32, 64)
    terms, views = losses.depth_loss(
        [torch.full((1, 1, 32, 64), 0.3)], [image], [image], camera(40, 32, 64), [shift_pose(x=-0.1)]
    )
    assert float(terms["masked"]) == 1 and not views["mask"].any()
    terms, views = losses.depth_loss(
        [torch.full((1, 1, 32, 64), 0.3)], [image], [image], camera(40, 32, 64), [shift_pose(x=-0.1)], automask=False
    )
    assert views["mask"].float().mean() > 0.5


def test_smoothness_ignores_the_scale_of_disparity():
    disparity, image = 0.1 + smooth_images(1, 32, 64)[:, :1], smooth_images(1, 32, 64, seed=1)
    assert_close(
        losses.disparity_smoothness(0.3 * disparity, image), losses.disparity_smoothness(disparity, image), 1e-4
    )
    assert float(losses.disparity_smoothness(torch.full_like(disparity, 0.4), image)) == 0
    assert losses.smoothness(disparity, torch.full_like(image, 0.5)) > losses.smoothness(
        disparity, image
    )  # edges in the image excuse


def test_supervised_loss_counts_measured_pixels_only():
    depth = torch.tensor([[[[1.0, 2, 3, 90]]]], requires_grad=True)
    measured = torch.tensor([[[[2.0, 0, 6, 0]]]])
    loss = losses.supervised_depth_loss(depth, measured)
    loss.backward()
    assert loss.item() == (1 + 3) / 2
    assert depth.grad.tolist() == [[[[-0.5, 0, -0.5, 0]]]]
    nothing = losses.supervised_depth_loss(depth, torch.zeros_like(measured))
    assert nothing.item() == 0 and torch.autograd.grad(nothing, depth)[0].abs().sum() == 0


def test_scale_and_shift_invariant_loss():
    prediction, target = smooth_images(3, 32, 48)[:, :1], smooth_images(3, 32, 48, seed=1)[:, :1]
    valid = torch.rand(3, 1, 32, 48, generator=torch.Generator().manual_seed(0)) > 0.3
    valid[2] = False  # an image without any measurement
    loss = losses.scale_shift_invariant_loss(prediction, target, valid)
    assert 0.1 < float(loss) < 2
    assert_close(losses.scale_shift_invariant_loss(7 * prediction - 3, target, valid), loss, 1e-4)
    assert_close(losses.scale_shift_invariant_loss(prediction, 0.2 * target + 9, valid), loss, 1e-3)
    assert_close(
        losses.scale_shift_invariant_loss(prediction.masked_fill(~valid, 50), target.masked_fill(~valid, -50), valid),
        loss,
    )
    assert float(losses.scale_shift_invariant_loss(2 * target + 1, target, valid)) < 1e-4
    assert float(losses.scale_shift_invariant_loss(-target, target, valid)) > 0.5  # near for far is no solution


def test_reconstruction_loss_looks_at_removed_pixels_only():
    image = smooth_images(2, 32, 64)
    pyramid = losses.image_pyramid(image)
    removed = torch.zeros(2, 1, 32, 64, dtype=torch.bool)
    removed[..., 8:16, 16:24] = True
    perfect = [level.clone().requires_grad_() for level in pyramid]
    assert losses.reconstruction_loss(perfect, pyramid, removed).item() == 0
    wrong = [(level + 0.1).requires_grad_() for level in pyramid]
    loss = losses.reconstruction_loss(wrong, pyramid, removed)
    loss.backward()
    assert_close(loss, torch.tensor(0.1), absolute=1e-5)
    for scale, level in enumerate(wrong):
        gone = F.max_pool2d(removed.float(), 2 ** scale).bool().expand_as(level)
        assert (level.grad[~gone] == 0).all() and (level.grad[gone] > 0).all()
    # finer scales weigh more
    assert wrong[0].grad.sum() > wrong[1].grad.sum() > wrong[3].grad.sum() > 0


def test_removed_patches():
    images = smooth_images(8, 64, 128)
    squares = datasets.remove_patches(images, torch.Generator().manual_seed(0))
    assert squares.shape == (8, 1, 64, 128) and squares.dtype == torch.bool
    share = squares.float().mean((1, 2, 3))
    assert (share >= 49 / (64 * 128) - 1e-6).all() and (share < 0.013).all()
    rectangles = datasets.remove_patches(images, torch.Generator().manual_seed(0), "rectangles").float().mean((1, 2, 3))
    assert (rectangles > 0.005).all() and (rectangles < 1).all() and rectangles.unique().numel() == 8


def test_flow_loss_vanishes_at_the_true_flow():
    """target(x) = source(x + flow), textured in the middle only, so that nothing enters or leaves the picture."""
    source = F.pad(smooth_images(1, 32, 64) - 0.5, (16, 16, 16, 16)) + 0.5
    dx, dy = 6, -4
    target = source.roll((-dy, -dx), (2, 3))
    true = [torch.tensor([dx, dy]).view(1, 2, 1, 1) / 2 ** s * torch.ones(1, 1, 64 >> s, 96 >> s) for s in range(4)]
    terms, views = losses.flow_loss(true, losses.image_pyramid(target), source)
    assert float(terms["loss"]) < 1e-4 and float(terms["smoothness"]) == 0
    assert_close(views["warped"][..., 8:-8, 8:-8], target[..., 8:-8, 8:-8], absolute=1e-4)
    assert 0 < float(terms["outside"]) < 0.15
    for factor in (-1, 0, 0.5, 2):
        wrong, _ = losses.flow_loss([factor * flow for flow in true], losses.image_pyramid(target), source)
        assert wrong["photometric"] > 50 * terms["photometric"] + 0.005


# ------------------------------------------------------------------------------------ as fast as it should be

def plain_depth_loss(disparities, pyramid, sources, K, poses, smoothness_weight=1e-3, min_depth=0.1, max_depth=100.0):
    """Monodepth2's formulation, restated plainly: SSIM by average pooling of every pair, identity errors per scale."""
    target, (B, _, H, W) = pyramid[0], pyramid[0].shape

    def error(x, y):
        l1 = (x - y).abs().mean(1, keepdim=True)
        x, y = (F.pad(image, (1, 1, 1, 1), mode="reflect") for image in (x, y))
        mean_x, mean_y = F.avg_pool2d(x, 3, 1), F.avg_pool2d(y, 3, 1)
        var_x, var_y = F.avg_pool2d(x ** 2, 3, 1) - mean_x ** 2, F.avg_pool2d(y ** 2, 3, 1) - mean_y ** 2
        covariance = F.avg_pool2d(x * y, 3, 1) - mean_x * mean_y
        ssim = (2 * mean_x * mean_y + 0.01 ** 2) * (2 * covariance + 0.03 ** 2) / (
            (mean_x ** 2 + mean_y ** 2 + 0.01 ** 2) * (var_x + var_y + 0.03 ** 2))
        return 0.85 * ((1 - ssim) / 2).clamp(0, 1).mean(1, keepdim=True) + 0.15 * l1

    def warp(source, depth, T):
        y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
        pixels = torch.stack([x, y, torch.ones_like(x)]).float().view(1, 3, -1).repeat(B, 1, 1)
        points = depth.view(B, 1, -1) * (K.inverse() @ pixels)
        points = K @ (T[:, :3, :3] @ points + T[:, :3, 3:])
        grid = (points[:, :2] / (points[:, 2:] + 1e-7)).view(B, 2, H, W).permute(0, 2, 3, 1)
        grid = 2 * (grid / torch.tensor([W - 1, H - 1]) - 0.5)
        return F.grid_sample(source, grid, padding_mode="border", align_corners=True)

    total = 0
    for scale, (disparity, image) in enumerate(zip(disparities, pyramid)):
        full = F.interpolate(disparity, (H, W), mode="bilinear", align_corners=False)
        depth = 1 / (1 / max_depth + (1 / min_depth - 1 / max_depth) * full)
        errors = [error(source, target) for source in sources]
        errors += [error(warp(source, depth, T), target) for source, T in zip(sources, poses)]
        disparity = disparity / (disparity.mean((2, 3), keepdim=True) + 1e-7)
        smooth = sum((disparity.diff(dim=d).abs() * (-image.diff(dim=d).abs().mean(1, keepdim=True)).exp()).mean()
                     for d in (2, 3))
        total = total + torch.cat(errors, 1).min(1).values.mean() + smoothness_weight * smooth / 2 ** scale
    return total / len(disparities)


def loss_arguments(height: int, width: int, batch: int = 1, device: str = "cpu") -> tuple:
    """Disparities, pyramid, two sources, K and poses of a plausible scene; disparities and poses are leaves."""
    generator = torch.Generator().manual_seed(0)
    target = smooth_images(batch, height, width)
    sources = [(target.roll(shift, 3) + 0.05 * smooth_images(batch, height, width, 1)).clamp(0, 1) for shift in (2, -3)]
    disparities = [torch.randn(batch, 1, height >> s, width >> s, generator=generator).sigmoid() for s in range(4)]
    poses = [shift_pose(x=0.02 * sign, z=0.05 * sign).repeat(batch, 1, 1) for sign in (-1, 1)]

    def leaves(tensors):
        return [x.to(device).requires_grad_() for x in tensors]
    return (leaves(disparities), [x.to(device) for x in losses.image_pyramid(target)], [x.to(device) for x in sources],
            camera(0.6 * width, height, width, batch).to(device), leaves(poses))


def alternate(*steps, repeats: int = 3) -> list[float]:
    """How many times as long as the last each of some functions takes: the median over rounds, in processor time."""
    rounds = []
    for _ in range(repeats + 1):
        rounds.append([])
        for step in steps:
            start = time.process_time()
            step()
            rounds[-1].append(time.process_time() - start)
    return np.median([[t / times[-1] for t in times] for times in rounds[1:]], 0).tolist()


def backward_of(loss, leaves, results: list):
    """A step without update: `loss()` and its gradients."""
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        results.append(loss())
        results[-1].backward()
    return step


def compare_with_monodepth2(height: int = 192, width: int = 640, batch: int = 2, repeats: int = 5,
                            threads: int = 2) -> None:
    """Print how losses and whole steps compare with the plain formulation (README, "Speed"): ratios of medians."""
    torch.set_num_threads(threads)
    networks.pick_device("cpu")
    arguments = loss_arguments(height, width, batch)
    leaves = [*arguments[0], *arguments[4]]
    ours, compiled = (partial(losses.depth_loss, *arguments, mask_outside=False, compare=compare) for compare in (
        losses.photometric_error, torch.compile(losses.photometric_error)))
    eager, fast, _ = alternate(*(backward_of(loss, leaves, []) for loss in (
        lambda: ours()[0]["loss"], lambda: compiled()[0]["loss"], lambda: plain_depth_loss(*arguments))),
        repeats=repeats)
    print(f"losses and synthesis, forward and backward, {width}x{height}, batch {batch}, {threads} threads: "
          f"{1 / eager:.2f} times as fast as the plain formulation, compiled {1 / fast:.2f} times", flush=True)

    steps = [whole_step(height, width, batch, plain) for plain in (False, True)]
    print(f"whole step: {1 / alternate(*steps, repeats=repeats)[0]:.2f} times as fast", flush=True)
    peaks = FORKS.SimpleQueue()
    for plain in (False, True):  # each in a process of its own
        process = FORKS.Process(target=peak_memory, args=(height, width, batch, plain, threads, peaks))
        process.start()
        process.join()
    print(f"peak memory of the step: {peaks.get():.0f} MB against {peaks.get():.0f} MB")


def whole_step(height: int, width: int, batch: int, plain: bool):
    """A training step on two source frames: as train_depth.py does it, or with the plain formulation."""
    arguments = loss_arguments(height, width, batch)
    frames = torch.stack([arguments[1][0], *arguments[2]], 1)
    torch.manual_seed(0)
    model, pose = networks.build("unet", "resnet18", 1, (0, 1, 2, 3)), networks.PoseNet("resnet18")
    if not plain:
        model.to(memory_format=torch.channels_last), pose.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam([*model.parameters(), *pose.parameters()], 1e-4, **({} if plain else {"fused": True}))

    def step() -> None:
        pyramid = losses.image_pyramid(frames[:, 0])
        disparities = [x.sigmoid() for x in model(frames[:, 0])]
        poses = [losses.pose_to_matrix(*pose(frames[:, 1], frames[:, 0]), invert=True),
                 losses.pose_to_matrix(*pose(frames[:, 0], frames[:, 2]))]
        seen = disparities, pyramid, [frames[:, 1], frames[:, 2]], arguments[3], poses
        value = plain_depth_loss(*seen) if plain else losses.depth_loss(*seen, mask_outside=False)[0]["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return step


def peak_memory(height: int, width: int, batch: int, plain: bool, threads: int, peaks) -> None:
    """Put MB of resident memory that three steps take at most into a queue."""
    torch.set_num_threads(threads)
    if not plain:
        networks.pick_device("cpu")
    step = whole_step(height, width, batch, plain)
    for _ in range(3):
        step()
    peaks.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def test_the_loss_is_monodepth2s_and_several_times_faster():
    """To 4e-6 and with the same gradients; times in alternation, with room for a busy machine."""
    arguments = loss_arguments(96, 320)
    leaves, gradients, results = [*arguments[0], *arguments[4]], [], []
    steps = [backward_of(loss, leaves, results) for loss in (
        lambda: plain_depth_loss(*arguments), lambda: losses.depth_loss(*arguments, mask_outside=False)[0]["loss"])]
    for step in steps:
        step()
        gradients.append([leaf.grad for leaf in leaves])
    assert abs((results[0] - results[1]).item()) < 4e-6
    assert all(relative_distance(*without_outliers(*pair)) < 2e-3 for pair in zip(*gradients))
    assert alternate(*steps)[0] > 2


def test_ssim_derivative():
    """The one that is written out, against differences in float64, at the border too."""
    x, y = (torch.rand(1, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.autograd.gradcheck(lambda x: losses.ssim_error(x, losses.local_statistics(y)), x.requires_grad_())


@pytest.mark.parametrize("options", ({}, {"automask": False, "minimum": False}), ids=("default", "other"))
def test_scales_in_one_batch_or_compiled_give_the_same_loss(options):
    """The compiler's tracing is tested, without what it generates, which takes a minute."""
    arguments = loss_arguments(64, 96, batch=2)
    leaves = [*arguments[0], *arguments[4]]
    traced = torch.compile(losses.photometric_error, backend="aot_eager", fullgraph=True)
    terms, views = losses.depth_loss(*arguments, **options)
    gradients = torch.autograd.grad(terms["loss"], leaves)
    for choice in ({"batched": True}, {"compare": traced}):
        other_terms, other_views = losses.depth_loss(*arguments, **choice, **options)
        for key, value in (terms | views).items():
            assert_close((other_terms | other_views)[key].float(), value.float())
        for one, other in zip(gradients, torch.autograd.grad(other_terms["loss"], leaves)):
            assert relative_distance(other, one) < 1e-5


def parse(module, *options) -> argparse.Namespace:
    """A script's options as it understands them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *options])
        return module.parse_options()


@pytest.mark.parametrize("task", ("mono+stereo", "depth", "flow", "reconstruction"))
def test_no_step_waits_for_the_device(task):
    """On the meta device, which has no numbers, asking for one fails: so does a step that would wait for a GPU."""
    args = parse(train_depth, *(["--task", task] if task in ("flow", "reconstruction") else ["--supervision", task]))
    clips = datasets.RandomClips("", [*map(str, args.frame_ids), *["s"] * (task == "mono+stereo")], height=64, width=96,
                                 with_depth=task == "depth", augment=True)
    batch = torch.utils.data.default_collate([clips[i, (0, i)] for i in range(2)])
    for device in ("cpu", "meta"):
        choices = networks.device_choices(args, torch.device("cpu"))
        choices.compare, here = losses.photometric_error, datasets.to_device(batch, torch.device(device))
        torch.manual_seed(0)
        model = networks.build("flow" if task == "flow" else "unet", "resnet18",
                               {"flow": 2, "reconstruction": 3}.get(task, 1), (0, 1, 2, 3)).to(device)
        pose = networks.PoseNet("resnet18").to(device)
        meter = evaluate.Meter(torch.device("cpu"))
        terms, _ = train_depth.compute_loss(args, model, pose, here, 0, choices, meter)
        terms["loss"].backward()
        if device == "meta" or task != "mono+stereo":
            continue
        args.amp = "bf16"  # networks in bfloat16, losses close to those in float32 and in float32 themselves
        choices.autocast = networks.device_choices(args, torch.device("cpu")).autocast
        half, _ = train_depth.compute_loss(args, model, pose, here, 0, choices, meter)
        assert half["loss"].dtype == torch.float32 and half["loss"] != terms["loss"]
        assert_close(half["loss"], terms["loss"], 0.03)


def test_elu_is_pytorchs():
    x = torch.cat([torch.linspace(-90, 90, 1001), torch.tensor([0, -1e-6, 1e-6, -torch.inf, torch.nan])])
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    values = networks.Elu.apply(ours * 1), torch.nn.functional.elu(theirs)
    for value in values:
        value.nansum().backward()
    assert torch.allclose(*values, rtol=0, atol=1e-7, equal_nan=True)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_choices_for_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(networks, "find_spec", lambda name: True)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def chosen(device, *options):
        choices = networks.device_choices(parse(train_depth, *options), device)
        return choices.autocast.keywords["enabled"], choices.memory_format, choices.compile, choices.batched

    assert chosen(cpu) == (False, torch.channels_last, "none", False)
    assert chosen(gpu) == (True, torch.channels_last, "loss", True)
    assert chosen(gpu, "--amp", "none", "--compile", "none", "--scales", "looped") == chosen(cpu)
    assert chosen(cpu, "--amp", "bf16", "--memory_format", "contiguous", "--compile", "all", "--scales",
                  "batched") == (True, torch.contiguous_format, "all", True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(utils.InputError, match="--compile loss needs a C"):
        chosen(cpu, "--compile", "loss")


def test_a_record_leaves_evaluations_out(monkeypatch):
    """A record is of all steps since the last one, and of their time alone."""
    now = [0.0]
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: now[0])
    meter = evaluate.Meter(torch.device("cpu"))
    for loss, evaluation in ((1.0, 100.0), (3.0, 0.0)):
        now[0] += 2
        meter.add({"loss": torch.tensor(loss)})
        meter.lap("optimizer")
        now[0] += evaluation
        meter.skip()
    record = meter.record(batch_size=4)
    assert record["loss"] == 2 and record["ms_per_step"] == 2000 and record["samples_per_s"] == 2


@pytest.mark.parametrize("script", ("train_depth", "train_seg", "datasets"))
def test_benchmarks(tmp_path, capsys, monkeypatch, script):
    """The last line is JSON; the parts make up the step; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    size = ["--data", "random", "--height", "64", "--width", "96", "--batch_size", "2", "--num_workers", "0"]
    if script == "datasets":
        code, output, _ = call(capsys, datasets, "benchmark", *size, "--steps", "2")
        record = json.loads(output.splitlines()[-1])
        assert code == 0 and record["samples_per_s"] == pytest.approx(2000 / record["ms_per_batch"])
        return
    module = {"train_depth": train_depth, "train_seg": train_seg}[script]
    code, output, _ = call(capsys, module, *size, "--benchmark", "2", *["--train_size", "4"] * (script == "train_seg"))
    record = json.loads(output.splitlines()[-1])
    parts = ("ms_data", "ms_networks", "ms_loss", "ms_backward", "ms_optimizer")
    assert code == 0 and all(record[part] > 0 for part in parts)
    assert 0.5 * record["ms_per_step"] < sum(record[part] for part in parts) <= 1.01 * record["ms_per_step"]
    assert record["samples_per_s"] == pytest.approx(2000 / record["ms_per_step"])
    assert record["peak_memory_mb"] > 50 and record["device"].startswith("cpu")
    assert record["options"]["batch_size"] == 2
    assert not os.listdir(tmp_path) and not os.path.exists(record["options"]["log_dir"] + "/last.pt")


# ------------------------------------------------------------------------------------ networks

def test_flow_network():
    """Flow depends on the order of the frames, and is at most a fifth of the image."""
    torch.manual_seed(0)
    model = networks.build("flow", "resnet18", 2, scales=(0, 1, 2, 3)).eval()
    first, second = smooth_images(1, 64, 96), smooth_images(1, 64, 96, seed=1)
    with torch.no_grad():
        flows = model(first, second)
        assert [tuple(flow.shape) for flow in flows] == [(1, 2, 64 >> s, 96 >> s) for s in range(4)]
        assert (flows[0].abs().amax((0, 2, 3)) <= torch.tensor([0.2 * 96, 0.2 * 64])).all()
        assert not torch.allclose(flows[0], model(second, first)[0])


@pytest.mark.parametrize("encoder", tuple(networks.RESNETS))
def test_segmenter_computes_the_finest_scale_only(encoder):
    model = networks.build("unet", encoder, 19).eval()
    with torch.no_grad():
        outputs = model(smooth_images(1, 64, 96))
    assert [tuple(output.shape) for output in outputs] == [(1, 19, 64, 96)]
    assert len(model.decoder.decoder) == 11  # ten blocks and one head


def test_only_the_head_may_differ(tmp_path):
    """From a depth network, a segmenter takes all but the last layer, says so, and leaves the new head as it was."""
    torch.manual_seed(0)
    depth, segmenter = (
        networks.build("unet", "resnet18", 1, scales=(0, 1, 2, 3)),
        networks.build("unet", "resnet18", 19),
    )
    path = str(tmp_path / "model.pt")
    torch.save({"options": {"task": "depth"}, **networks.state(depth)}, path)
    head = segmenter.decoder.decoder[10].conv.weight.clone()
    message = networks.load_weights(segmenter, path, "segmentation")
    assert "encoder 120/120" in message and "decoder 20/22: head replaced" in message
    assert torch.equal(segmenter.decoder.decoder[10].conv.weight, head)
    for key, value in segmenter.decoder.state_dict().items():
        assert key.startswith("decoder.10.") or torch.equal(value, depth.decoder.state_dict()[key])

    fresh = networks.build("unet", "resnet18", 19)
    before = {key: value.clone() for key, value in fresh.decoder.state_dict().items()}
    assert "decoder fresh" in networks.load_weights(fresh, path, "segmentation", "encoder")
    assert all(torch.equal(value, before[key]) for key, value in fresh.decoder.state_dict().items())
    assert all(torch.equal(value, depth.encoder.state_dict()[key]) for key, value in fresh.encoder.state_dict().items())

    one_class = networks.build("unet", "resnet18", 1)  # the shapes agree, but depth's last layer is no classifier
    assert "head replaced" in networks.load_weights(one_class, path, "segmentation")


# ------------------------------------------------------------------------------------ data

def write_image(path, height: int = 64, width: int = 96, seed: int = 0) -> str:
    """A smooth random picture; the format follows from the name."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    picture = (255 * smooth_images(1, height, width, seed)[0]).byte().permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(path)
    return str(path)


def write_frames(
    folder, numbers=range(1, 7), extension: str = "jpg", intrinsics: str | None = "60 60 47.5 31.5"
) -> str:
    """One's own images, `frame<number>.<extension>`, and intrinsics.txt."""
    for number in numbers:
        write_image(os.path.join(folder, f"frame{number}.{extension}"), seed=number)
    if intrinsics is not None:
        with open(os.path.join(folder, "intrinsics.txt"), "w") as file:
            file.write(intrinsics)
    return str(folder)


def write_semantics(folder, count: int = 4, ids=(0, 7, 26), height: int = 64, width: int = 96) -> str:
    """KITTI's semantics layout with blocks of the given raw ids."""
    for index in range(count):
        write_image(os.path.join(folder, "training", "image_2", f"{index:06d}_10.png"), height, width, seed=index)
        blocks = np.random.default_rng(index).choice(np.array(ids, np.uint8), (-(-height // 4), -(-width // 4)))
        label = blocks.repeat(4, 0).repeat(4, 1)[:height, :width]
        os.makedirs(os.path.join(folder, "training", "semantic"), exist_ok=True)
        Image.fromarray(label).save(os.path.join(folder, "training", "semantic", f"{index:06d}_10.png"))
    return str(folder)


@pytest.mark.parametrize("size", ((32, 64), (64, 96), (96, 160), (352, 1216)))
def test_labels_keep_their_ids_when_resized(tmp_path, size):
    """{unlabelled, road, car} stay those three, and each new pixel has the id under its centre."""
    root = write_semantics(tmp_path, count=2, height=75, width=124)
    data = datasets.KittiSemantics(root, "val", height=size[0], width=size[1])
    label, native = data[0]["label"], data.native_label(0)
    assert set(label.unique().tolist()) <= {0, 13, datasets.IGNORE} == set(native.unique().tolist())
    rows = ((torch.arange(size[0]) + 0.5) * 75 / size[0]).long()
    columns = ((torch.arange(size[1]) + 0.5) * 124 / size[1]).long()
    assert (
        label != native[rows][:, columns]
    ).float().mean() < 1e-2  # a centre on the seam of two pixels may go either way
    assert label.dtype == torch.int64 and data[0]["image"].shape == (3, *size)


def test_cityscapes_ids():
    raw = {
        "road": 7,
        "sidewalk": 8,
        "building": 11,
        "wall": 12,
        "fence": 13,
        "pole": 17,
        "traffic light": 19,
        "traffic sign": 20,
        "vegetation": 21,
        "terrain": 22,
        "sky": 23,
        "person": 24,
        "rider": 25,
        "car": 26,
        "truck": 27,
        "bus": 28,
        "train": 31,
        "motorcycle": 32,
        "bicycle": 33,
    }
    for train_id, name in enumerate(datasets.CITYSCAPES_CLASSES):
        assert datasets.CITYSCAPES_TABLE[raw[name]] == train_id
    for other in range(256):
        if other not in raw.values():
            assert datasets.CITYSCAPES_TABLE[other] == (datasets.IGNORE if other < 34 or other == 255 else -1)
    assert len(datasets.CITYSCAPES_COLOURS) == 19 and len(datasets.CAMVID_COLOURS) == len(datasets.CAMVID_CLASSES) == 11
    assert datasets.CAMVID_TABLE[11] == datasets.IGNORE and datasets.CAMVID_TABLE[12] == -1


def test_test_images_are_fixed_and_draws_nested(tmp_path):
    root = write_semantics(tmp_path, count=25, height=32, width=32)
    options = {"height": 32, "width": 32}
    test = datasets.KittiSemantics(root, "val", **options).pairs
    assert len(test) == 9 and len(datasets.KittiSemantics(root, "train", **options)) == 16
    chosen = {}
    for split_seed in range(3):
        for train_size in (2, 5, 16):
            assert (
                datasets.KittiSemantics(root, "val", train_size=train_size, split_seed=split_seed, **options).pairs
                == test
            )
            pairs = datasets.KittiSemantics(
                root, "train", train_size=train_size, split_seed=split_seed, **options
            ).pairs
            assert len(set(pairs)) == train_size and not set(pairs) & set(test)
            chosen[split_seed, train_size] = set(pairs)
        assert chosen[split_seed, 2] < chosen[split_seed, 5] < chosen[split_seed, 16]
    assert len({frozenset(chosen[split_seed, 5]) for split_seed in range(3)}) == 3


def test_step_batches():
    """Continuing at step k gives what the uninterrupted sequence gives; every epoch shows each sample once."""
    def batches(start, stop, seed=3):
        return list(datasets.StepBatches(10, 4, seed, start, stop))
    everything = batches(0, 20)
    for k in (1, 7, 19):
        assert batches(k, 20) == everything[k:]
    order = [index for batch in everything for index, _ in batch]
    epochs = [order[10 * epoch:10 * epoch + 10] for epoch in range(8)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    assert {len(batch) for batch in everything} == {4}  # never a part of one, whatever the epoch leaves
    draws = [draw for batch in everything for _, draw in batch]
    assert len(set(draws)) == len(draws)
    assert batches(0, 20, seed=4) != everything


@pytest.mark.parametrize("shift", (-0.5, -0.1, 0.03, 0.1, 0.5))
def test_hue_shift_equals_torchvision(shift):
    from torchvision.transforms.functional import adjust_hue
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images[0, :, :4] = images[0, :1, :4]  # grey pixels have no hue
    assert_close(datasets.shift_hue(images, torch.tensor(shift)), adjust_hue(images, shift), absolute=1e-4)


def test_jitter_is_one_draw_a_sample():
    """Frames of a sample that are alike stay alike; about half of the samples change, each in its own way."""
    image = 0.2 + 0.6 * smooth_images(1, 16, 16)
    frames = image[:, None].expand(40, 3, 3, 16, 16).clone()
    jittered = datasets.color_jitter(frames, torch.Generator().manual_seed(0))
    for other in (1, 2):
        assert_close(jittered[:, other], jittered[:, 0])
    changed = (jittered != frames).flatten(1).any(1)
    assert 10 < changed.sum() < 30
    assert len({tuple(sample.flatten()[:6].tolist()) for sample in jittered[changed][:, 0]}) == changed.sum()
    assert (
        (jittered >= 0).all()
        and (jittered <= 1).all()
        and torch.equal(frames[:, :1], image[:, None].expand(40, 1, 3, 16, 16))
    )
    again = datasets.color_jitter(frames, torch.Generator().manual_seed(0))
    assert torch.equal(again, jittered)


def test_jitter_equals_torchvision():
    """Brightness, contrast and saturation in that order, against torchvision with the same factors."""
    from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation
    image = smooth_images(1, 16, 16)
    ours = datasets.color_jitter(image, torch.Generator().manual_seed(5), strength=0.2, hue=0.0, probability=1)
    brightness, contrast, saturation = (
        1 + 0.2 * (2 * torch.rand(1, 5, generator=torch.Generator().manual_seed(5)) - 1)[0, 1:4]
    ).tolist()
    expected = adjust_saturation(adjust_contrast(adjust_brightness(image, brightness), contrast), saturation)
    assert_close(ours, expected, absolute=2e-3)


@pytest.mark.parametrize("size", ((94, 310), (32, 96), (47, 155), (96, 320)))
def test_resized_depth_keeps_measured_values(size):
    """Sparse depth is moved, never blended; where two measurements meet, the nearer surface stays."""
    generator = np.random.default_rng(0)
    depth = np.where(generator.random((94, 310)) < 0.05, generator.uniform(1, 80, (94, 310)), 0).astype(np.float32)
    resized = datasets.resize_depth(depth, *size)
    assert resized.shape == size and set(np.unique(resized)) <= set(np.unique(depth))
    rows, columns = np.nonzero(depth)
    new_rows = np.clip(np.round((rows + 0.5) * size[0] / 94 - 0.5).astype(int), 0, size[0] - 1)
    new_columns = np.clip(np.round((columns + 0.5) * size[1] / 310 - 0.5).astype(int), 0, size[1] - 1)
    assert (resized[new_rows, new_columns] <= depth[rows, columns]).all()
    assert (resized > 0).sum() == len(set(zip(new_rows.tolist(), new_columns.tolist())))


def test_natural_order():
    assert sorted(["f10.png", "f9.png", "f100.png", "a1b2.png", "a1b10.png"], key=datasets.natural_key) == \
        ["a1b2.png", "a1b10.png", "f9.png", "f10.png", "f100.png"]


@pytest.mark.parametrize("numbers, frame_ids, targets", (
    ((1, 2, 3, 5, 6), ["0", "-1", "1"], [2]),
    ((1, 2, 3, 5, 6), ["0", "-1"], [2, 3, 6]),
    ((8, 9, 10, 11, 100, 101), ["0", "1"], [8, 9, 10, 100]),
    ((2, 4, 6, 10, 12), ["0", "-1"], [4, 6, 12]),  # every second frame was kept
))
def test_own_frames_with_gaps(tmp_path, numbers, frame_ids, targets):
    clips = datasets.Frames(write_frames(tmp_path / "video", numbers), frame_ids, height=32, width=64)
    step = numbers[1] - numbers[0]
    expected = [[f"frame{target + step * int(offset)}.jpg" for offset in frame_ids] for target in targets]
    assert [[os.path.basename(path) for path in sample["images"]] for sample in clips.samples] == expected
    assert str(len(numbers) - len(targets)) in clips.dropped
    sample = clips[0]
    assert sample["frames"].shape == (len(frame_ids), 3, 32, 64) and sample["frames"].dtype == torch.uint8
    assert_close(sample["K"], torch.tensor([[60 * 64 / 96, 0, 31.5], [0, 30, 15.5], [0, 0, 1]]), absolute=1e-4)


def test_own_frames_with_depth_and_field_of_view(tmp_path):
    root = write_frames(tmp_path / "video", (1, 2, 3), "png", intrinsics=None)
    os.makedirs(tmp_path / "video" / "depth")
    for number in (1, 3):
        Image.fromarray(np.full((64, 96), 2500 * number, np.uint16)).save(
            tmp_path / "video" / "depth" / f"frame{number}.png"
        )
    clips = datasets.Frames(root, ["0"], fov=90, with_depth=True, height=64, width=96)
    assert len(clips) == 2 and "1 without" in clips.dropped
    assert clips[1]["depth"].unique().tolist() == [7.5]
    assert_close(clips[0]["K"], torch.tensor([[48, 0, 47.5], [0, 48, 31.5], [0, 0, 1]]))


# ------------------------------------------------------------------------------------ data sets in their own layouts

def write_png(path, array: np.ndarray) -> str:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(array).save(path)
    return str(path)


def write_cityscapes(root, cities=("aachen", "ulm"), height: int = 64, width: int = 128) -> str:
    """Two labelled images a city in train and one in val, disparity and camera of each, and a video around the first.

    Disparity is 10 pixels, 0 (none) in the first column and 1 (infinity) in the second; fx is 200, the baseline 0.2 m.
    """
    camera = {"extrinsic": {"baseline": 0.2}, "intrinsic": {"fx": 200.0, "fy": 210.0, "u0": 63.0, "v0": 33.0}}
    disparity = np.full((height, width), 256 * 10 + 1, np.uint16)
    disparity[:, :2] = (0, 1)
    for number, split in enumerate(("train", "train", "val")):
        blocks = np.random.default_rng(number).choice((0, 7, 23, 26), (height // 4, width // 4)).astype(np.uint8)
        for city in cities:
            def path(kind, ending, frame=19, split=split, place=f"{city}_{number:06d}", city=city):
                return os.path.join(root, kind, split, city, f"{place}_{frame:06d}_{ending}")
            write_image(path("leftImg8bit", "leftImg8bit.png"), height, width, seed=number)
            write_png(path("gtFine", "gtFine_labelIds.png"), blocks.repeat(4, 0).repeat(4, 1))
            write_png(path("disparity", "disparity.png"), disparity)
            os.makedirs(os.path.dirname(path("camera", "")), exist_ok=True)
            with open(path("camera", "camera.json"), "w") as file:
                json.dump(camera, file)
            for frame in range(17, 22) if number == 0 else ():
                write_image(path("leftImg8bit_sequence", "leftImg8bit.png", frame), height, width, seed=frame)
    return str(root)


def test_cityscapes_labels_clips_and_depth(tmp_path):
    root, size = write_cityscapes(tmp_path), {"height": 64, "width": 128}
    train, val = (datasets.Cityscapes(root, split, **size) for split in ("train", "val"))
    assert len(train) == 4 and len(val) == 2
    assert all("/train/" in path for path, _ in train.pairs) and all("/val/" in path for path, _ in val.pairs)
    raw = np.array(Image.open(val.pairs[0][1]))
    assert (val.native_label(0).numpy() == np.select([raw == 7, raw == 23, raw == 26], (0, 10, 13), 255)).all()
    assert len(datasets.Cityscapes(root, "train", train_size=3, split_seed=1, **size)) == 3

    labelled = datasets.CityscapesClips(root, ["0"], with_depth=True, **size)
    sample = labelled[0]
    assert len(labelled) == 4 and sample["frames"].shape == (1, 3, 64, 128)
    assert sample["depth"].unique().tolist() == [0, pytest.approx(200 * 0.2 / 10)]
    assert (sample["depth"][..., :2] == 0).all() and (sample["depth"][..., 2:] > 0).all()
    assert_close(sample["K"], torch.tensor([[200.0, 0, 63], [0, 210, 33], [0, 0, 1]]))
    crops = datasets.CityscapesClips(root, ["0"], with_depth=True, augment=True, crop=(32, 64), **size)
    assert crops[0, (0, 5)]["depth"].shape == (1, 32, 64)

    video = datasets.CityscapesClips(root, ["0", "-1", "1"], drives=["ulm"], **size)
    assert [os.path.basename(path)[11:17] for sample in video.samples for path in sample["images"]] == [
        f"{number:06d}" for target in (18, 19, 20) for number in (target, target - 1, target + 1)]
    assert "2 without" in video.dropped and video[0]["frames"].shape == (3, 3, 64, 128)
# ------------------------------------------------------------------------------------ the packed cache

def assert_same_samples(first, second, items) -> None:
    for item in items:
        one, other = first[item], second[item]
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key], (item, key)


@pytest.mark.parametrize("options", ({}, {"with_depth": True, "augment": True, "crop": (64, 96)}), ids=("plain", "all"))
def test_packed_and_read_samples_are_the_same(tmp_path, world, options):
    """Frames, K, stereo pose and depth, flipped and cropped or not; also when sent to a loader process."""
    read = datasets.KittiRaw(world, ["0", "-1", "s"], height=64, width=128, **options)
    copy = datasets.packed(read, str(tmp_path / "cache"))
    items = [(i, (0, draw)) for i in (0, 3, len(read) - 1) for draw in range(3)]
    assert len(copy) == len(read)
    assert_same_samples(read, copy, items)
    sent = pickle.dumps(copy)
    assert len(sent) < 20_000
    assert_same_samples(read, pickle.loads(sent), items)


def test_packing_adds_what_is_missing_and_what_has_changed(tmp_path, capsys):
    """Frames are shared by whatever needs them; a file with another time or size is packed again, others are not."""
    write_frames(tmp_path / "video", range(1, 7))
    cache = str(tmp_path / "cache")

    def pack(frame_ids, height=64, frames=(None, None)):
        clips = datasets.Frames(str(tmp_path / "video"), frame_ids, height=height, width=96, frames=frames)
        copy = datasets.packed(clips, cache)
        assert_same_samples(clips, copy, range(len(clips)))
        said = capsys.readouterr().out
        return int(said.split()[1]) if said else 0  # "packing N frames ..."

    assert [pack(["0"], frames=(0, 4)), pack(["0", "-1", "1"], frames=(0, 4)), pack(["0", "-1"])] == [4, 1, 1]
    assert pack(["0"], height=128) == 6  # a folder of its own
    assert pack(["0", "1"]) == 0
    write_image(tmp_path / "video" / "frame3.jpg", seed=77)
    assert [pack(["0"]), pack(["0"])] == [1, 0]
    os.utime(tmp_path / "video" / "frame5.jpg", (1, 1))
    assert [pack(["0"]), pack(["0"])] == [1, 0]


def test_an_interrupted_packing_loses_nothing_and_a_damaged_cache_is_refused(tmp_path, monkeypatch):
    write_frames(tmp_path / "video", range(1, 7))
    clips = datasets.Frames(str(tmp_path / "video"), ["0"], height=64, width=96)
    cache, frames = str(tmp_path / "cache"), tmp_path / "cache" / "96x64" / "frames.bin"
    first = datasets.packed(datasets.Frames(str(tmp_path / "video"), ["0"], height=64, width=96, frames=(0, 2)), cache)
    kept = first[1]["frames"].clone()
    with open(frames, "ab") as file:  # rows that an interruption left
        file.write(b"half a row")
    assert_same_samples(clips, datasets.packed(clips, cache), range(6))
    assert torch.equal(first[1]["frames"], kept) and frames.stat().st_size == 6 * 3 * 64 * 96

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(utils.InputError, match="needs 0.00 GB"):
        datasets.packed(datasets.Frames(str(tmp_path / "video"), ["0"], height=128, width=96), cache)
    os.truncate(frames, 5 * 3 * 64 * 96)
    with pytest.raises(utils.InputError, match="96x64 is damaged"):
        datasets.packed(clips, cache)
    with open(frames, "wb") as file:
        file.write(bytes(6 * 3 * 64 * 96))
    with pytest.raises(utils.InputError, match="does not show"):
        datasets.packed(clips, cache)


def test_a_packed_copy_of_broken_files_fails_as_the_files_do(tmp_path):
    write_frames(tmp_path / "video", range(1, 7))
    truncate(f"{tmp_path}/video/frame4.jpg", 0.5)
    write_image(tmp_path / "video" / "frame2.jpg", 96, 96)
    clips = datasets.Frames(str(tmp_path / "video"), ["0", "1"], height=64, width=96)
    copy = datasets.packed(clips, str(tmp_path / "cache"))
    for index in range(5):
        if index == 4:
            assert_same_samples(clips, copy, [index])
            continue
        with pytest.raises(utils.InputError) as expected:
            clips[index]
        with pytest.raises(utils.InputError, match=re.escape(str(expected.value))):
            copy[index]
    item = (2, (0, 1))
    assert_same_samples(datasets.Forgiving(clips), datasets.Forgiving(copy), [item])


def test_packed_clips_alone(tmp_path, capsys):
    """Packed by the command, the files gone, trained on; other frames than were packed are refused."""
    write_frames(tmp_path / "video", range(1, 6))
    cache, size = str(tmp_path / "cache"), ["--height", "64", "--width", "96"]
    code, output, _ = call(capsys, datasets, "pack", "--data", "frames", "--data_path", f"{tmp_path}/video", *size,
                           "--frame_ids", "0", "-1", "--output", cache)
    assert code == 0 and "clips_0,-1.npy: 4 clips" in output and "1 without" in output
    shutil.rmtree(tmp_path / "video")
    options = tiny_run(tmp_path, "--width", "96", "--data", "packed", "--data_path", cache, "--task", "flow")
    assert call(capsys, train_depth, *options)[0] == 0
    code, _, errors = call(capsys, train_depth, *options, "--frame_ids", "0", "1")
    assert_one_line(code, errors, ("clips_0,1.npy", "clips_0,-1.npy"))


def test_a_long_index_is_not_read(tmp_path):
    """Many clips ($CLIPS), of rows that are holes in a file: opened and read at once, in little memory."""
    folder, count = tmp_path / "192x96", CLIPS
    os.makedirs(folder)
    with open(folder / "frames.bin", "wb") as file:
        file.truncate(count * 3 * 96 * 192)
    clips = np.lib.format.open_memmap(folder / "clips_0,-1.npy", "w+", datasets.clip_type(2), (count,))
    clips["frames"], clips["depth"] = np.arange(count)[:, None], -1
    clips.flush()
    start, before = time.perf_counter(), resident_memory()
    data = datasets.Packed(str(tmp_path), ["0", "-1"], height=96, width=192)
    opened = time.perf_counter()
    assert len(data) == count and len(pickle.dumps(data)) < 20_000
    indices = np.random.default_rng(0).integers(count, size=200)
    assert all(data[int(index)]["frames"].shape == (2, 3, 96, 192) for index in indices)
    first = time.perf_counter()
    assert all(data[int(index)]["frames"].shape == (2, 3, 96, 192) for index in indices)
    again, memory = time.perf_counter(), resident_memory() - before
    print(f"{count} clips: opened in {1000 * (opened - start):.1f} ms, {5 * (first - opened):.2f} ms a clip of two "
          f"frames, {5 * (again - first):.2f} from the page cache, {memory:.0f} MB")
    assert again - start < 5 and memory < 300


def test_voc_lists_and_palette(tmp_path):
    """Training from SBD's augmented list where there is one; labels are palette PNGs, 255 is ignored."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    label = np.zeros((40, 60), np.uint8)
    label[10:20], label[20:22] = 15, 255
    colours = [value for colour in datasets.palette(range(256)) for value in colour]
    names = {"train": ["2007_000032"], "val": ["2007_000033"], "train_aug": ["2007_000032", "2008_000002"]}
    for name in {name for listed in names.values() for name in listed}:
        write_image(root / "JPEGImages" / f"{name}.jpg", 40, 60)
        picture = Image.fromarray(label)
        picture.putpalette(colours)
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            os.makedirs(root / folder, exist_ok=True)
            picture.save(root / folder / f"{name}.png")
    os.makedirs(root / "ImageSets" / "Segmentation")
    for split, listed in names.items():
        line = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n" if split == "train_aug" else "{}\n"
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(line.format(n) for n in listed))
    data = datasets.Voc(str(tmp_path), "train", height=32, width=64)
    assert len(data) == 2 and all("SegmentationClassAug" in label for _, label in data.pairs)
    assert data.native_label(0).unique().tolist() == [0, 15, 255] and data.classes[15] == "person"
    assert data.colours[15] == (192, 128, 128) and len(data.classes) == len(data.colours) == 21
    os.remove(root / "ImageSets" / "Segmentation" / "train_aug.txt")
    assert len(datasets.Voc(str(root), "train", height=32, width=64)) == 1
    os.remove(root / "JPEGImages" / "2007_000033.jpg")
    with pytest.raises(utils.InputError, match="2007_000033.jpg: no such file"):
        datasets.Voc(str(root), "val", height=32, width=64)


def test_ade20k_classes(tmp_path):
    for folder, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        write_image(tmp_path / "images" / folder / f"{name}.jpg", 40, 60)
        write_png(tmp_path / "annotations" / folder / f"{name}.png", np.arange(2400, dtype=np.uint16).reshape(40, 60)
                  .clip(0, 150).astype(np.uint8))
    data = datasets.Ade20k(str(tmp_path), "val", height=32, width=64)
    assert data.native_label(0).flatten()[:152].tolist() == [datasets.IGNORE, *range(150), 149]
    assert len(data.classes) == len(set(data.classes)) == len(set(data.colours)) == 150
    assert [data.classes[i] for i in (0, 12, 20, 149)] == ["wall", "person", "car", "flag"]


def test_nyu_from_its_mat_files(tmp_path, capsys, monkeypatch):
    """Unpacked once, upright, in the official split; 40 or 13 classes; measured depth in metres and NYU's camera."""
    h5py, io = pytest.importorskip("h5py"), pytest.importorskip("scipy.io")
    root, generator = tmp_path / "nyu", np.random.default_rng(0)
    code, _, errors = call(capsys, train_seg, *tiny_run(tmp_path, "--data", "nyu", "--data_path", str(tmp_path)))
    assert_one_line(code, errors, ("train.txt", "datasets.py unpack"))
    os.makedirs(root)
    code, _, errors = call(capsys, datasets, "unpack", "--data_path", root)
    assert_one_line(code, errors, ("nyu_depth_v2_labeled.mat", "splits.mat"))
    images = generator.integers(0, 255, (3, 480, 640, 3), np.uint8)
    labels, depth = generator.integers(0, 895, (3, 480, 640)), generator.uniform(0.7, 9, (3, 480, 640))
    depth[:, :7] = 0
    mapping = generator.integers(1, 41, 894)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:  # MATLAB stores columns first
        file["images"], file["labels"] = images.transpose(0, 3, 2, 1), labels.transpose(0, 2, 1).astype(np.uint16)
        file["rawDepths"] = depth.transpose(0, 2, 1).astype(np.float32)
    io.savemat(root / "splits.mat", {"trainNdxs": np.array([[1], [3]]), "testNdxs": np.array([[2]])})
    io.savemat(root / "classMapping40.mat", {"mapClass": mapping[None]})
    code, _, errors = call(capsys, datasets, "unpack", "--data_path", root)
    assert code == 0, errors

    size = {"height": 480, "width": 640}
    for cls in (datasets.Nyu, datasets.Nyu13):
        data = cls(str(root), "val", **size)
        assert len(cls(str(root), "train", **size)) == 2 and len(data) == 1
        image, label = data.native(0)
        assert (image.permute(1, 2, 0).numpy() == images[1]).all()
        expected = np.append(255, mapping - 1)[labels[1]]
        if cls is datasets.Nyu13:
            expected = np.append(np.array(datasets.NYU13_OF_40) - 1, np.full(216, 255))[expected]
        assert (label.numpy() == expected).all()
    pairs = {"wall": "wall", "door": "wall", "bookshelf": "furniture", "desk": "table", "curtain": "window",
             "television": "television", "floor mat": "floor", "lamp": "objects"}
    of_40 = dict(zip(datasets.Nyu.classes, (datasets.Nyu13.classes[i - 1] for i in datasets.NYU13_OF_40), strict=True))
    assert pairs.items() <= of_40.items()
    clips = datasets.NyuClips(str(root), ["0"], with_depth=True, **size)
    assert len(clips) == 3 and clips[1]["K"][0, 0] == pytest.approx(518.858)
    assert (np.abs(clips[1]["depth"][0].numpy() - depth[1]) <= 0.0006).all()


def test_nyu_raw_scenes(tmp_path):
    for scene, numbers in (("kitchen_0001", (1, 2)), ("office_0002", (7,))):
        for number in numbers:
            write_image(tmp_path / scene / f"rgb_{number:05d}.jpg", 480, 640)
            write_png(tmp_path / scene / f"sync_depth_{number:05d}.png", np.full((480, 640), 1500 * number, np.uint16))
    clips = datasets.NyuClips(str(tmp_path), ["0"], with_depth=True, height=96, width=128)
    assert [float(clips[i]["depth"].mean()) for i in range(3)] == [1.5, 3, 10.5]
    assert len(datasets.NyuClips(str(tmp_path), ["0", "1"], height=96, width=128)) == 1


# ------------------------------------------------------------------------------------ kinds of images

def test_images_of_every_kind_become_rgb(tmp_path):
    """As Pillow converts them; 16-bit by its upper byte, EXIF orientation applied."""
    rgb = Image.open(write_image(tmp_path / "rgb.png"))
    rotated = Image.Exif()
    rotated[0x112] = 6
    for name, image, options in (
        ("gray.png", rgb.convert("L"), {}), ("gray.jpg", rgb.convert("L"), {}), ("bits.png", rgb.convert("1"), {}),
        ("palette.png", rgb.quantize(32), {}), ("cmyk.jpg", rgb.convert("CMYK"), {}), ("progressive.jpg", rgb,
                                                                                       {"progressive": True}),
        ("opaque.png", rgb.convert("RGBA"), {}), ("gray_alpha.png", rgb.convert("LA"), {}),
        ("turned.jpg", rgb, {"exif": rotated}), ("turned.png", rgb, {"exif": rotated}),
        ("ein Bild ä 图.jpg", rgb, {}),
    ):
        image.save(tmp_path / name, **options)
        expected = np.array(Image.open(tmp_path / name).convert("RGB"))
        if "turned" in name:
            expected = np.rot90(expected, -1)
        ours = datasets.read_image(str(tmp_path / name))
        assert ours.dtype == torch.uint8, name
        assert (np.abs(ours.permute(1, 2, 0).numpy().astype(int) - expected) <= 1).all(), name
    deep = np.arange(64 * 96, dtype=np.uint16).reshape(64, 96) * 10
    ours = datasets.read_image(write_png(tmp_path / "deep.png", deep))
    assert (ours.numpy() == (deep >> 8)).all()


def test_images_that_are_refused(tmp_path, monkeypatch):
    """Each with one line that names the file; a bomb before anything of it is decoded."""
    rgb = Image.open(write_image(tmp_path / "rgb.png"))
    half = rgb.convert("RGBA")
    half.putalpha(Image.new("L", rgb.size, 128))
    half.save(tmp_path / "glass.png")
    rgb.quantize(32).save(tmp_path / "hole.png", transparency=3)
    rgb.save(tmp_path / "film.gif")
    os.makedirs(tmp_path / "folder.png")
    os.symlink("loop.png", tmp_path / "loop.png")
    write_image(tmp_path / "header.jpg")
    with open(tmp_path / "header.jpg", "r+b") as file:
        file.seek(2)
        file.write(bytes(100))
    for name, words in (("glass.png", "transparent"), ("hole.png", "transparent"), ("film.gif", "neither a JPEG nor"),
                        ("folder.png", "directory"), ("loop.png", "symbolic links"), ("nowhere.png", "No such file"),
                        ("header.jpg", "")):
        with pytest.raises(utils.InputError, match=f"{name}: .*{words}") as refusal:
            datasets.read_image(str(tmp_path / name))
        assert "\n" not in str(refusal.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 96 // 2 - 1)
    monkeypatch.setattr(datasets, "decode_image", None)
    for read in (datasets.read_image, datasets.read_ids):
        with pytest.raises(utils.InputError, match="rgb.png: .*(bomb|exceeds)"):
            read(str(tmp_path / "rgb.png"))


def test_labels_that_are_refused(tmp_path):
    root = write_semantics(tmp_path, count=2)
    data = datasets.KittiSemantics(root, "val", height=64, width=96)
    path, colours = data.pairs[0][1], [value for colour in datasets.CITYSCAPES_COLOURS for value in colour]
    label = np.full((64, 96), 7, np.uint8)

    def refusal(image: Image.Image, words: str) -> None:
        image.save(path)
        with pytest.raises(utils.InputError, match=f"{path}: .*{words}"):
            data.native(0)
    refusal(Image.fromarray(label).convert("RGB"), "mode L or P .* RGB")
    refusal(Image.fromarray(label.astype(np.uint16) * 100), "mode L or P .* I;16")
    refusal(Image.fromarray(label[:32]), "label is .32, 96")
    refusal(Image.fromarray(label + 40), "label id 47")
    painted = Image.fromarray(label)
    painted.putpalette(colours)  # entry 7, the road, has the colour of class 7, the traffic sign
    refusal(painted, "id 7, road, in the colour of traffic sign")
    painted.putpalette([0, 0, 0] * 7 + colours[:3])
    painted.save(path)
    assert data.native(0)[1].unique().tolist() == [0]


# ------------------------------------------------------------------------------------ incomplete and odd folders

DRIVE = "2011_09_26/2011_09_26_drive_9001_sync"


def write_kitti(root, frames: int = 3) -> str:
    """One drive with both cameras, calibration and a few LiDAR points straight ahead."""
    K = datasets.camera_matrix(64, 96)
    datasets.write_calibration(root / "2011_09_26", K, 64, 96)
    os.makedirs(root / DRIVE / "velodyne_points" / "data")
    for number in range(frames):
        for camera_number in (2, 3):
            write_image(root / DRIVE / f"image_0{camera_number}" / "data" / f"{number:010d}.png", seed=number)
        points = np.array([[10, 0, 0, 0.3], [20, 1, 0, 0.3]], np.float32)
        points.tofile(root / DRIVE / "velodyne_points" / "data" / f"{number:010d}.bin")
    return str(root)


def unlink(root, name: str) -> None:
    path = root / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def rewrite(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("damage, options, words", (
    (lambda root: None, {"drives": ["0005"]}, "--drives 0005: no such drive"),
    (lambda root: unlink(root, DRIVE), {}, "no KITTI drive there"),
    (lambda root: unlink(root, "2011_09_26/calib_cam_to_cam.txt"), {}, "calib_cam_to_cam.txt: No such file"),
    (lambda root: rewrite(root / "2011_09_26" / "calib_cam_to_cam.txt", "P_rect_03", "P_rect_04"), {},
     "calib_cam_to_cam.txt: .*P_rect_03"),
    (lambda root: rewrite(root / "2011_09_26" / "calib_cam_to_cam.txt", "P_rect_02: ", "P_rect_02: nan "), {},
     "calib_cam_to_cam.txt"),
    (lambda root: unlink(root, f"{DRIVE}/image_03"), {"cameras": "l"}, "image_03/data: No such file"),
    (lambda root: unlink(root, "2011_09_26/calib_velo_to_cam.txt"), {"with_depth": True},
     "calib_velo_to_cam.txt: No such file"),
    (lambda root: unlink(root, f"{DRIVE}/velodyne_points"), {"with_depth": True}, "6 without LiDAR"),
    (lambda root: truncate(f"{root}/{DRIVE}/velodyne_points/data/0000000000.bin", 0.7), {"with_depth": True},
     "0000000000.bin: 22 bytes"),
    (lambda root: write_image(root / DRIVE / "image_03/data/0000000000.png", 32, 96), {}, "other sizes"),
    (lambda root: (root / "eigen_zhou_train.txt").write_text(f"{DRIVE} 7 l\n"), {}, "image_02/data: no frame 00000000"),
), ids=("drives", "drive", "calibration", "projection", "nan", "camera", "velodyne calibration", "velodyne",
        "velodyne points", "sizes", "split"))
def test_incomplete_kitti(tmp_path, monkeypatch, damage, options, words):
    root = write_kitti(tmp_path / "kitti")
    os.symlink(tmp_path / "kitti" / "eigen_zhou_train.txt", tmp_path / "eigen_zhou_train.txt")
    (tmp_path / "kitti" / "eigen_zhou_train.txt").touch()
    monkeypatch.setattr(datasets, "SPLITS", str(tmp_path))
    assert len(datasets.KittiRaw(root, ["0", "s"], with_depth=True, height=64, width=96)) == 6
    damage(tmp_path / "kitti")
    with pytest.raises(utils.InputError, match=words) as refusal:
        datasets.KittiRaw(root, ["0", "s"], height=64, width=96, **options)[0]
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("intrinsics", (
    "nan 60 47 31", "60 inf 47 31", "0 0 47 31", "-60 60 47 31", "0.6 0.9 0.5 0.5", "60 60 97 31", "60 60 47 -1",
    "60 60 0 31"))
def test_impossible_intrinsics(tmp_path, intrinsics):
    clips = datasets.Frames(write_frames(tmp_path / "video", [1], intrinsics=intrinsics), ["0"], height=64, width=96)
    with pytest.raises(utils.InputError, match="intrinsics.txt: .*pixels of the 96x64 images"):
        clips[0]


@pytest.mark.parametrize("content", (
    None, "{", "[]", '{"intrinsic": {}}',
    '{"extrinsic": {"baseline": 0}, "intrinsic": {"fx": 1, "fy": 1, "u0": 1, "v0": 1}}'))
def test_damaged_cityscapes_cameras(tmp_path, content):
    root = write_cityscapes(tmp_path, cities=("ulm",))
    for path in glob.glob(f"{root}/camera/train/ulm/*"):
        os.remove(path)
        if content is not None:
            with open(path, "w") as file:
                file.write(content)
    with pytest.raises(utils.InputError, match="camera/train/ulm.*camera"):
        datasets.CityscapesClips(root, ["0"], height=64, width=128)


def test_folders_with_odd_names_and_links_that_may_not_be_written(tmp_path, capsys):
    """Spaces, other scripts, a link to itself and one to the folder above; the data stay as they are."""
    folder = tmp_path / "mein Film, 2. Teil ä 图"
    for number in range(4):
        write_image(folder / "Szene 1" / f"Bild {number} ü.jpg", seed=number)
    (folder / "intrinsics.txt").write_text("60 60 47.5 31.5")
    os.symlink("loop", folder / "loop")
    os.symlink(".", folder / "same")
    os.symlink(folder, folder / "Szene 1" / "above")
    files = sorted((folder / "Szene 1").glob("Bild*"))
    for path in (*files, folder / "Szene 1", folder):
        os.chmod(path, 0o555)
    before = {path: os.stat(path).st_mtime_ns for path in (*files, folder)}
    try:
        clips = datasets.Frames(str(folder), ["0", "1"], height=64, width=96)
        assert len(clips) == 3 and clips[2]["frames"].shape == (2, 3, 64, 96)
        code, _, errors = call(capsys, train_depth, *tiny_run(tmp_path, "--data", "frames", "--data_path", str(folder)))
        assert code == 0, errors
        assert {path: os.stat(path).st_mtime_ns for path in before} == before
    finally:
        for path in (folder, folder / "Szene 1"):
            os.chmod(path, 0o755)


# ------------------------------------------------------------------------------------ real data

def test_real_kitti_calibration():
    """K from P_rect of the date, and a stereo baseline of 0.5327 m, the right camera being on the right."""
    clips = datasets.KittiRaw(real_data("kitti_raw"), ["0", "s"], frames=(0, 3), height=375, width=1242)
    left, right = clips.samples[0], clips.samples[3]
    assert "image_02" in left["images"][0] and "image_03" in left["images"][1] and "image_03" in right["images"][0]
    assert left["baseline"] == pytest.approx(-0.5327, abs=1e-3) and right["baseline"] == pytest.approx(0.5327, abs=1e-3)
    assert_close(clips[0]["K"], torch.tensor([[721.5377, 0, 609.5593], [0, 721.5377, 172.854], [0, 0, 1]]))
    half = datasets.KittiRaw(real_data("kitti_raw"), ["0"], frames=(0, 1), height=96, width=320)[0]["K"]
    assert_close(half, torch.tensor([[185.9028, 0, 156.6795], [0, 184.7137, 43.8786], [0, 0, 1]]), absolute=1e-2)


@pytest.mark.parametrize("side", ("l", "r"))
def test_real_lidar_explains_the_other_camera(side):
    """At measured pixels the other image, warped with the true depth, fits better than with depth 10 % off."""
    clips = datasets.KittiRaw(
        real_data("kitti_raw"), ["0", "s"], frames=(10, 131), cameras=side, with_depth=True, height=375, width=1242
    )
    errors = {0.9: 0.0, 1.0: 0.0, 1.1: 0.0}
    for index in range(0, len(clips), 30):
        sample = clips[index]
        target, source = (sample["frames"].float() / 255).split(1)
        depth, measured = sample["depth"][None], sample["depth"][None] > 0
        for factor in errors:
            warped, valid = losses.synthesize(source, factor * depth, sample["K"][None], sample["stereo_T"][None])
            counted = measured & valid
            errors[factor] += float(((warped - target).abs().mean(1, keepdim=True) * counted).sum() / counted.sum())
    assert errors[1.0] < 0.8 * min(errors[0.9], errors[1.1])


def test_real_velodyne_agrees_with_depth_images():
    """Raw points projected by us against the depth benchmark's projection of the same sweep, camera z."""
    clips = datasets.KittiRaw(
        real_data("kitti_raw"), ["0"], frames=(0, 144), cameras="l", with_depth=True, height=375, width=1242
    )
    folder = "2011_09_26/2011_09_26_drive_0013_sync"
    numbers = [n for n in range(144) if clips.velodyne_file(folder, n)]
    sample = clips.samples[numbers[1]]
    png = clips.depth_map(sample["depth"])
    ours = clips.depth_map(("velodyne", clips.velodyne_file(folder, numbers[1]), folder, "l", False))
    both = (png > 0) & (ours > 0)
    assert both.sum() > 0.9 * (png > 0).sum()
    assert (abs(png - ours)[both] < 0.02 * png[both]).mean() > 0.99


def test_real_labels_and_camvid():
    semantics = datasets.KittiSemantics(real_data("kitti_semantics"), "train", height=96, width=320)
    assert set(semantics[0]["label"].unique().tolist()) <= {*range(19), datasets.IGNORE}
    camvid = datasets.CamVid(real_data("camvid"), "train", train_size=2, height=96, width=128)
    assert set(camvid[0]["label"].unique().tolist()) <= {*range(11), datasets.IGNORE}
    clips = datasets.CamVidClips(real_data("camvid"), ["0", "-1", "1"], fov=60, height=96, width=128)
    assert len(clips) == 99 and clips[0]["frames"].shape == (3, 3, 96, 128)
    video = datasets.Frames(real_data("own_video"), ["0", "-1", "1"], height=96, width=320)
    assert len(video) == 89


@pytest.mark.parametrize("name, cls", (
    ("cityscapes", datasets.Cityscapes), ("kitti_semantics", datasets.KittiSemantics)))
def test_real_scores_equal_cityscapes_own_evaluation(tmp_path, monkeypatch, name, cls):
    """Decoding, IoU by class and mIoU of a network's predictions, against cityscapesScripts on raw ids, native size."""
    scripts = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
                                  reason="needs pip install cityscapesscripts", exc_type=ImportError)
    size = {"height": 64, "width": 128}
    data = cls(real_data(name), "train", **size)
    if name == "kitti_semantics":
        data.pairs = data.pairs + cls(real_data(name), "val", **size).pairs
    assert len(data) == {"cityscapes": 4, "kitti_semantics": 5}[name]
    torch.manual_seed(0)
    model = networks.build("unet", "resnet18", 19)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    batch = next(iter(torch.utils.data.DataLoader(data, 4)))
    for module in model.modules():
        module.momentum = 1.0  # of batch norms: their statistics are the last step's
    for _ in range(8):  # so that it predicts more than one class
        optimizer.zero_grad()
        F.cross_entropy(model(batch["image"] / 255)[0], batch["label"], ignore_index=255).backward()
        optimizer.step()

    raw_ids, predictions = np.array(datasets.CITYSCAPES_IDS, np.uint8), []
    confusion_matrix = evaluate.confusion_matrix

    def record(label, prediction, classes):
        predictions.append(write_png(tmp_path / f"{len(predictions)}.png", raw_ids[prediction]))
        return confusion_matrix(label, prediction, classes)
    monkeypatch.setattr(evaluate, "confusion_matrix", record)
    scores = evaluate.evaluate_segmentation(model, data, torch.device("cpu"))
    arguments = scripts.args
    arguments.evalInstLevelScore = arguments.evalPixelAccuracy = arguments.JSONOutput = False
    arguments.quiet = True
    result = scripts.evaluateImgLists(predictions, [label for _, label in data.pairs], arguments)
    shown = [c for c, value in scores["iou"].items() if not np.isnan(value)]
    assert len(shown) == {"cityscapes": 15, "kitti_semantics": 19}[name]
    assert sum(scores["iou"][c] > 0 for c in shown) > 2
    for c in shown:
        assert scores["iou"][c] == pytest.approx(100 * result["classScores"][c], abs=1e-9)
    # theirs gives 0 to a class that is predicted but not labelled, which does not happen on a whole validation set
    assert scores["miou"] == pytest.approx(100 * np.mean([result["classScores"][c] for c in shown]))


# ------------------------------------------------------------------------------------ metrics

def test_confusion_matrix_by_hand():
    label = torch.tensor([[0, 0, 1, 1], [2, 2, 255, 255]])
    prediction = torch.tensor([[0, 1, 1, 1], [2, 0, 0, 1]])
    confusion = evaluate.confusion_matrix(label, prediction, 4)
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    absent = evaluate.segmentation_scores(evaluate.confusion_matrix(label, prediction.where(label != 2, 3), 4))
    assert absent["miou"] == pytest.approx((50 + 200 / 3 + 0) / 3)  # class 3, which no label shows, does not count
    scores = evaluate.segmentation_scores(confusion)
    assert scores["pixel_accuracy"] == pytest.approx(100 * 4 / 6)
    assert scores["iou"][:3] == pytest.approx([100 / 3, 200 / 3, 50]) and np.isnan(
        scores["iou"][3]
    )  # class 3 occurs nowhere
    assert scores["miou"] == pytest.approx(50)


@pytest.mark.parametrize("seed", range(3))
def test_segmentation_scores_equal_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 7, (3, 20, 30), generator=generator)
    prediction = torch.where(
        torch.rand(label.shape, generator=generator) < 0.5, label, torch.randint(0, 7, label.shape, generator=generator)
    )
    label[torch.rand(label.shape, generator=generator) < 0.1] = datasets.IGNORE
    counted = label != datasets.IGNORE
    truth, guess = label[counted].numpy(), prediction[counted].numpy()
    confusion = sum(evaluate.confusion_matrix(a, b, 7) for a, b in zip(label, prediction))
    assert (confusion[:7].numpy() == metrics.confusion_matrix(truth, guess, labels=range(7))).all()
    scores = evaluate.segmentation_scores(confusion)
    assert scores["iou"] == pytest.approx(100 * metrics.jaccard_score(truth, guess, average=None))
    assert scores["miou"] == pytest.approx(100 * metrics.jaccard_score(truth, guess, average="macro"))
    assert scores["pixel_accuracy"] == pytest.approx(100 * metrics.accuracy_score(truth, guess))


@pytest.mark.parametrize("label, prediction", (
    (torch.zeros(4, 6), torch.zeros(6, 4)),
    (torch.full((4, 6), 3), torch.zeros(4, 6)),
    (torch.zeros(4, 6), torch.full((4, 6), 3)),
    (torch.full((4, 6), -1), torch.zeros(4, 6)),
    (torch.zeros(4, 6), torch.full((4, 6), 255)),
), ids=("size", "label", "prediction", "negative", "ignored prediction"))
def test_confusion_matrix_refuses(label, prediction):
    with pytest.raises(ValueError):
        evaluate.confusion_matrix(label.long(), prediction.long(), 3)


def test_depth_errors_by_hand():
    errors = evaluate.depth_errors(np.array([2.0, 4.0]), np.array([4.0, 4.0]))
    assert errors == pytest.approx(
        {"abs_rel": 0.5, "sq_rel": 1, "rmse": 2**0.5, "rmse_log": np.log(2) / 2**0.5, "a1": 0.5, "a2": 0.5, "a3": 0.5}
    )
    with pytest.raises(ValueError):
        evaluate.depth_errors(np.ones(3), np.ones(4))
    assert evaluate.evaluate_depth_image(np.ones((4, 6), np.float32), np.zeros((40, 60), np.float32)) == {}


def test_release_score_by_hand():
    """Class 0 (road): 2 of 4 pixels agree, one prediction falls on unlabelled; class 13 (car): predicted, absent."""
    label = torch.tensor([[0, 0, 0, 255]])
    prediction = torch.tensor([[0, 0, 13, 0]])
    confusion = evaluate.confusion_matrix(label, prediction, 19)
    assert evaluate.release_score(confusion) == pytest.approx(100 * (2 / 4 + 0) / 2)


def test_constant_depth():
    """Per-pixel median; gaps from the row's neighbours, rows without any from the row below, the lowest from above."""
    a, b, c = (np.zeros((4, 3), np.float32) for _ in range(3))
    a[1], b[1], c[1] = (10, 0, 30), (12, 0, 30), (20, 0, 0)
    a[2] = (5, 5, 5)
    assert evaluate.constant_depth([a, b, c]).tolist() == [[12, 21, 30], [12, 21, 30], [5, 5, 5], [5, 5, 5]]


def test_evaluation_of_a_segmenter(tmp_path):
    """Cross-entropy as torch has it, over all pixels of the set; the modes of all modules as they were."""
    data = datasets.KittiSemantics(write_semantics(tmp_path, count=6), "val", height=64, width=96)
    torch.manual_seed(0)
    model = networks.build("unet", "resnet18", 19).train()
    model.encoder.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scores = evaluate.evaluate_segmentation(model, data, torch.device("cpu"), batch_size=2)
    assert model.training and model.decoder.training and not any(module.training for module in model.encoder.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    with torch.no_grad():  # files and network have the same size here, so nothing is resized
        logits = torch.cat([model.eval()(data[i]["image"][None].float() / 255)[0] for i in range(len(data))])
    label = torch.stack([data.native_label(i) for i in range(len(data))])
    assert scores["cross_entropy"] == pytest.approx(F.cross_entropy(logits, label, ignore_index=255).item(), rel=1e-4)
    counted = label != datasets.IGNORE
    assert scores["pixel_accuracy"] == pytest.approx(
        100 * (logits.argmax(1) == label)[counted].double().mean().item(), abs=0.01
    )
    assert (
        scores["images"] == len(data)
        and list(scores["iou"]) == list(datasets.CITYSCAPES_CLASSES)
        and "release_miou" in scores
    )


# ------------------------------------------------------------------------------------ windows and flips

@pytest.mark.parametrize("height, width", ((64, 96), (65, 200), (150, 97), (40, 60)))
def test_windows_cover_an_image_and_are_averaged(height, width):
    """A network that looks at single pixels gives the same through windows; constants average where windows overlap."""
    image, window, calls = smooth_images(1, height, width), (64, 96), []

    def forward(part):
        assert part.shape[2:] == window
        calls.append(part)
        return torch.cat([part, torch.full_like(part[:, :1], len(calls))], 1)
    logits = evaluate.slide(forward, image, window)
    scale = max(64 / height, 96 / width, 1)
    size = (max(64, round(scale * height)), max(96, round(scale * width)))
    seen = image if scale == 1 else F.interpolate(image, size, mode="bilinear", align_corners=False)
    assert_close(logits[:, :3], seen)
    assert len(calls) == np.prod([1 + np.ceil((a - b) / (2 / 3 * b)) for a, b in zip(size, window)])
    assert logits[0, 3, 0, 0] == 1 and logits[0, 3, -1, -1] == len(calls)  # the corners are in one window each
    if (height, width) == (65, 200):  # two rows of windows, three columns of them
        assert logits[0, 3, 32, 70] == np.mean([1, 2, 4, 5])


def test_evaluation_through_windows_and_with_flips(tmp_path):
    """A window as large as the image is the whole image; a flip averages with the mirrored image's prediction."""
    data = datasets.KittiSemantics(write_semantics(tmp_path, height=64, width=96), "val", height=64, width=96)
    torch.manual_seed(0)
    model, device = networks.build("unet", "resnet18", 19), torch.device("cpu")
    whole = evaluate.evaluate_segmentation(model, data, device)
    window = evaluate.evaluate_segmentation(model, data, device, window=(64, 96))
    assert window["cross_entropy"] == pytest.approx(whole["cross_entropy"], rel=1e-5)
    small = evaluate.evaluate_segmentation(model, data, device, window=(64, 64))
    assert small["cross_entropy"] != pytest.approx(whole["cross_entropy"], rel=1e-5)

    with torch.no_grad():
        image = torch.stack([data[i]["image"] for i in range(len(data))]).float() / 255
        logits = (model.eval()(image)[0] + model(image.flip(-1))[0].flip(-1)) / 2
    label = torch.stack([data.native_label(i) for i in range(len(data))])
    flipped = evaluate.evaluate_segmentation(model, data, device, flip=True)["cross_entropy"]
    assert flipped == pytest.approx(F.cross_entropy(logits, label, ignore_index=255).item(), rel=1e-4)


# ------------------------------------------------------------------------------------ scripts, as a user runs them

SMALL = ["--height", "64", "--width", "96", "--batch_size", "2", "--log_every", "1"]


def run_script(script: str, *options: str, expect: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """One command line in a process of its own, on one thread."""
    done = subprocess.run(
        [sys.executable, os.path.join(HERE, script), *options],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_until_stopped(script: str, folder: str, *options: str) -> str:
    """Start a script, let it finish a step, send SIGTERM; its output."""
    process = subprocess.Popen(
        [sys.executable, os.path.join(HERE, script), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.time() + 120
    while not read_log(folder) and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == utils.STOPPED, output
    return output


def read_log(folder: str) -> list[dict]:
    path = os.path.join(folder, "log.jsonl")
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file]


def read_json(*parts: str) -> dict:
    with open(os.path.join(*parts)) as file:
        return json.load(file)


def read_weights(folder: str) -> dict[str, torch.Tensor]:
    """All tensors of a run's model.pt by part and name."""
    content = torch.load(os.path.join(folder, "model.pt"), weights_only=True)
    return {
        f"{part}.{key}": value
        for part, tensors in content.items()
        if part != "options"
        for key, value in tensors.items()
    }


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same bit by bit."""
    assert first.keys() == second.keys()
    return [key for key in first if not torch.equal(first[key], second[key])]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> str:
    """A tiny synthetic world: two drives of six frames, twelve labelled images."""
    root = str(tmp_path_factory.mktemp("world") / "synthetic")
    datasets.render_synthetic(root, drives=2, frames=6, labelled=12, height=64, width=128, seed=0, workers=1)
    return root


@pytest.fixture(scope="session")
def log_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


PRETRAINING = {  # every task and supervision: options and loss terms that the log must show
    "mono": (
        ["--supervision", "mono", "--steps", "4", "--save_every", "3"],
        {"loss", "photometric", "smoothness", "masked"},
    ),
    "stereo": (["--supervision", "stereo", "--steps", "2"], {"loss", "photometric", "smoothness", "masked"}),
    "mono+stereo": (["--supervision", "mono+stereo", "--steps", "2"], {"loss", "photometric", "smoothness", "masked"}),
    "depth": (["--supervision", "depth", "--steps", "2"], {"loss"}),
    "flow": (["--task", "flow", "--steps", "2"], {"loss", "photometric", "smoothness", "outside"}),
    "reconstruction": (["--task", "reconstruction", "--steps", "2"], {"loss"}),
}


def pretraining_options(kind: str, world: str, log_dir: str, workers: int = 0) -> list[str]:
    return [
        "--data",
        "synthetic",
        "--data_path",
        world,
        *SMALL,
        *PRETRAINING[kind][0],
        "--name",
        kind,
        "--log_dir",
        log_dir,
        "--num_workers",
        str(workers),
    ]


@pytest.fixture(scope="session")
def pretrained(world, log_dir):
    """Run folders of every kind of pre-training, made when first asked for."""
    def run(kind: str) -> str:
        folder = os.path.join(log_dir, kind)
        if not os.path.exists(os.path.join(folder, "result.json")):
            run_script("train_depth.py", *pretraining_options(kind, world, log_dir))
        return folder
    return run


FINE_TUNING = {  # pre-training that it starts from, and options
    "none": (None, []),
    "all": ("mono", ["--steps", "4"]),
    "encoder": ("mono", ["--init_parts", "encoder"]),
    "frozen": ("mono", ["--freeze_encoder"]),
    "from_flow": ("flow", ["--init_parts", "encoder"]),
}


def fine_tuning_options(kind: str, world: str, log_dir: str, pretrained, workers: int = 0) -> list[str]:
    source, options = FINE_TUNING[kind]
    return [
        "--data",
        "synthetic",
        "--data_path",
        world,
        *SMALL,
        "--steps",
        "2",
        "--train_size",
        "4",
        "--init",
        pretrained(source) if source else "none",
        *options,
        "--name",
        f"seg_{kind}",
        "--log_dir",
        log_dir,
        "--num_workers",
        str(workers),
    ]


@pytest.fixture(scope="session")
def fine_tuned(world, log_dir, pretrained):
    """The same for fine-tuning."""
    def run(kind: str) -> str:
        folder = os.path.join(log_dir, f"seg_{kind}")
        if not os.path.exists(os.path.join(folder, "result.json")):
            run_script("train_seg.py", *fine_tuning_options(kind, world, log_dir, pretrained))
        return folder
    return run


def assert_run_folder(folder: str, steps: int) -> None:
    arguments = read_json(folder, "args.json")
    assert {"script", "command", "options", "versions", "git_commit"} <= set(arguments) and arguments["options"][
        "steps"
    ] == steps
    assert read_json(folder, "result.json")["step"] == steps
    assert torch.load(os.path.join(folder, "last.pt"), weights_only=True)["step"] == steps
    pictures = sorted(os.listdir(os.path.join(folder, "samples")))
    assert pictures[0] == "000001.png" and pictures[-1] == f"{steps:06d}.png"
    assert np.asarray(Image.open(os.path.join(folder, "samples", pictures[-1]))).std() > 5
    records = [record for record in read_log(folder) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    for record in records:
        assert {"learning_rate", "ms_per_step", "ms_data", "samples_per_s"} <= set(record)
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


@pytest.mark.parametrize("kind", PRETRAINING)
def test_pretraining(pretrained, kind):
    options, terms = PRETRAINING[kind]
    steps = int(options[options.index("--steps") + 1])
    folder = pretrained(kind)
    assert_run_folder(folder, steps)
    for record in read_log(folder):
        assert terms <= set(record) and all(np.isfinite(value) for value in record.values())
    weights = read_weights(folder)
    assert all(value.isfinite().all() for value in weights.values())
    assert any(key.startswith("pose.") for key in weights) == ("mono" in kind)
    torch.manual_seed(0)  # the weights it started from
    start = networks.build(
        "flow" if kind == "flow" else "unet", "resnet18", {"flow": 2, "reconstruction": 3}.get(kind, 1), (0, 1, 2, 3)
    )
    near_far = {"stereo": (0.54, 540), "mono+stereo": (0.54, 540), "depth": (1, 100)}.get(kind)
    if near_far:
        middle = losses.depth_to_disparity(np.sqrt(near_far[0] * near_far[1]), *near_far)
        networks.set_head_bias(start.decoder, np.log(middle / (1 - middle)))
    for part in ("encoder", "decoder"):
        for key, value in getattr(start, part).named_parameters():
            assert 0 < (value - weights[f"{part}.{key}"]).abs().max() < 1e-3, key


def test_learning_rate_drops(pretrained):
    """Ten times lower after three quarters of the steps."""
    rates = [record["learning_rate"] for record in read_log(pretrained("mono"))]
    assert rates == pytest.approx([1e-4] * 3 + [1e-5])


@pytest.mark.parametrize("kind", FINE_TUNING)
def test_fine_tuning(fine_tuned, pretrained, kind):
    folder = fine_tuned(kind)
    assert_run_folder(folder, 4 if kind == "all" else 2)
    result = read_json(folder, "result.json")
    source, expected = FINE_TUNING[kind][0], "None"
    if source:
        samples, steps = map(read_json(pretrained(source), "result.json").get, ("samples", "step"))
        name = {"mono": "Depth-Rand (mono)", "flow": "Flow"}[source]
        expected = f"{name} on synthetic ({samples} samples, 96x64, {steps} steps)"
    assert result["pretraining"] == expected
    assert 0 <= result["miou"] <= 100 and 0 <= result["pixel_accuracy"] <= 100 and result["cross_entropy"] > 0
    assert (
        list(result["iou"]) == list(datasets.CITYSCAPES_CLASSES) and result["images"] == 5
    )  # 36 % of the twelve, rounded up
    evaluations = [record for record in read_log(folder) if "miou" in record]
    assert evaluations[-1]["miou"] == result["miou"]


@pytest.mark.parametrize("kind, frozen", (("frozen", True), ("all", False), ("encoder", False)))
def test_frozen_encoder_stays_as_it_was(pretrained, fine_tuned, kind, frozen):
    """Bit by bit, batch-norm statistics included; while the decoder trains. Without freezing, everything moves."""
    before, after = read_weights(pretrained("mono")), read_weights(fine_tuned(kind))
    encoder = [key for key in after if key.startswith("encoder.")]
    moved = [key for key in encoder if not torch.equal(after[key], before[key])]
    assert moved == [] if frozen else len(moved) == len(encoder)
    assert not torch.equal(after["decoder.decoder.9.conv.conv.weight"], before["decoder.decoder.9.conv.conv.weight"])


# ------------------------------------------------------------------------------------ features of a frozen encoder

def test_kept_features_do_not_depend_on_the_batch():
    """Bit by bit, so that a continued run, which meets images in other batches, computes the same."""
    torch.manual_seed(0)
    model = networks.build("unet", "resnet18", 5).eval().requires_grad_(False)
    images = torch.rand(3, 3, 64, 96)

    def batch(*items):
        index, flip = torch.tensor(items).T
        image = torch.stack([images[i].flip(-1) if mirror else images[i] for i, mirror in items])
        return {"image": image, "index": index, "mirrored": flip.bool()}

    one, other = {}, {}
    for items in (((0, 0), (1, 1)), ((2, 0), (0, 0))):
        train_seg.encode(model, batch(*items), one)
    together = train_seg.encode(model, batch((2, 0), (1, 1), (0, 0)), other)
    for i, key in enumerate(((2, False), (1, True), (0, False))):
        assert all(torch.equal(a, b) and torch.equal(a[0], c[i]) for a, b, c in zip(one[key], other[key], together))
    for kept, computed in zip(together, train_seg.encode(model, batch((2, 0), (1, 1), (0, 0)), None)):
        assert_close(kept, computed, 1e-4, 1e-5)


def test_feature_cache(tmp_path, capsys, monkeypatch):
    """As many encoder passes as there are images and mirror images, and the same training as without."""
    passes = []
    forward = networks.ResnetEncoder.forward
    monkeypatch.setattr(networks.ResnetEncoder, "forward", lambda self, x: passes.append(1) or forward(self, x))
    monkeypatch.setattr(evaluate, "evaluate_segmentation", lambda *_, **__: dict.fromkeys(
        ("miou", "pixel_accuracy", "cross_entropy", "images"), 0))
    options = [*semantics_run(tmp_path), "--batch_size", "2", "--steps", "8", "--log_every", "1", "--freeze_encoder"]
    counts = {}
    for name in ("kept", "no_feature_cache"):
        code, output, _ = call(capsys, train_seg, *options, "--name", name, *["--" + name] * (name != "kept"))
        assert code == 0 and ("features kept" in output) == (name == "kept")
        counts[name] = len(passes)
        passes.clear()
    drawn = {(index, np.random.default_rng(draw).random() < 0.5) for batch in datasets.StepBatches(2, 2, 0, 0, 8)
             for index, draw in batch}
    assert counts["kept"] == 1 + len(drawn) < 1 + 8 and counts["no_feature_cache"] == 8  # 1: to see how large they are
    kept, computed = ([record["loss"] for record in read_log(f"{tmp_path}/runs/{name}") if "loss" in record]
                      for name in counts)
    assert kept == pytest.approx(computed, rel=1e-4)


def test_the_same_command_gives_the_same_weights(tmp_path, world, pretrained):
    folder = pretrained("stereo")
    run_script("train_depth.py", *pretraining_options("stereo", world, str(tmp_path)))
    assert differing(read_weights(folder), read_weights(str(tmp_path / "stereo"))) == []
    for ours, theirs in zip(read_log(folder), read_log(str(tmp_path / "stereo"))):
        assert ours["loss"] == theirs["loss"]


def test_the_number_of_workers_changes_nothing(tmp_path, world, pretrained):
    run_script("train_depth.py", *pretraining_options("mono+stereo", world, str(tmp_path), workers=2))
    assert differing(read_weights(pretrained("mono+stereo")), read_weights(str(tmp_path / "mono+stereo"))) == []


@pytest.mark.parametrize("script", ("train_depth.py", "train_seg.py"))
def test_a_stopped_run_continues_as_if_nothing_had_happened(tmp_path, world, pretrained, fine_tuned, script):
    """SIGTERM after the first step: everything saved, exit code 75; the same command then ends with the same bits."""
    if script == "train_depth.py":
        reference, options = pretrained("mono"), pretraining_options("mono", world, str(tmp_path))
    else:
        reference, options = fine_tuned("all"), fine_tuning_options("all", world, str(tmp_path), pretrained)
    folder = str(tmp_path / os.path.basename(reference))
    output = run_until_stopped(script, folder, *options)
    stopped_at = torch.load(os.path.join(folder, "last.pt"), weights_only=True)["step"]
    steps = read_json(reference, "result.json")["step"]
    assert 1 <= stopped_at < steps and f"stopped at step {stopped_at}" in output
    assert not os.path.exists(os.path.join(folder, "result.json")) and os.path.exists(os.path.join(folder, "model.pt"))

    # the number of loader processes may change on the way
    assert f"continues at step {stopped_at}" in run_script(script, *options, "--resume", "--num_workers", "2").stdout
    assert differing(read_weights(reference), read_weights(folder)) == []
    assert_run_folder(folder, steps)
    for ours, theirs in zip(read_log(folder), read_log(reference), strict=True):
        assert {key: ours.get(key) for key in ("step", "loss", "miou")} == {
            key: theirs.get(key) for key in ("step", "loss", "miou")
        }


def test_a_finished_run_says_so(capsys, world, log_dir, pretrained, fine_tuned):
    for script, folder, options in (
        (train_depth, pretrained("stereo"), pretraining_options("stereo", world, log_dir)),
        (train_seg, fine_tuned("none"), fine_tuning_options("none", world, log_dir, pretrained)),
    ):
        before = {
            name: os.path.getmtime(os.path.join(folder, name)) for name in ("model.pt", "result.json", "args.json")
        }
        log = read_log(folder)
        code, output, _ = call(capsys, script, *options)
        assert code == 0 and "finished already" in output
        assert (
            before == {name: os.path.getmtime(os.path.join(folder, name)) for name in before}
            and read_log(folder) == log
        )


# ------------------------------------------------------------------------------------ several processes

def run_rank(number: int, port: int, fixed_statistics: bool, *arguments) -> None:
    """One of two processes as torchrun starts them (number < 0: the only one)."""
    if number >= 0:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}
    if fixed_statistics:  # batch norm over a share of the batch is another function
        torch.nn.BatchNorm2d.forward = lambda self, x: F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias)
    run_forked(*arguments)


def launch_ranks(script: str, options: list, folder, numbers=(0, 1), fixed_statistics: bool = False) -> list:
    """Start processes of one run; each with the file of its output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number in numbers:
        output = str(folder / f"rank{number}.txt")
        arguments = (number, port, fixed_statistics, script, [str(option) for option in options], output)
        started.append((FORKS.Process(target=run_rank, args=arguments), output))
        started[-1][0].start()
    return started


def wait_for_end(started: list) -> list[int]:
    """Exit codes, within a minute."""
    deadline = time.monotonic() + 60
    for process, _ in started:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process, _ in started]
    for process, _ in started:
        process.kill()
    return codes


@pytest.mark.parametrize("kind", ("mono+stereo", "depth", "affine", "flow", "reconstruction", "segmentation"))
def test_two_processes_train_as_one(tmp_path, world, kind):
    """The same losses at every step, whichever process holds the pixels that count, and one folder of files."""
    script, losses_of = ("train_seg.py" if kind == "segmentation" else "train_depth.py"), []
    for numbers in ((-1,), (0, 1)):
        options = ["--data", "synthetic", "--data_path", world, *SMALL, "--batch_size", 4, "--steps", 3,
                   "--num_workers", 0, "--log_every", 1, "--name", f"run{len(numbers)}", "--log_dir", tmp_path]
        if kind == "affine":
            options += ["--supervision", "depth", "--depth_loss", "affine"]
        elif kind in PRETRAINING:
            options += PRETRAINING[kind][0][:2]
        started = launch_ranks(script, options, tmp_path, numbers, fixed_statistics=True)
        assert wait_for_end(started) == [0] * len(numbers), [read_text(output) for _, output in started]
        losses_of.append([r["loss"] for r in read_log(f"{tmp_path}/run{len(numbers)}") if "loss" in r])
    assert len(losses_of[0]) == 3 and len(set(losses_of[0])) == 3
    np.testing.assert_allclose(losses_of[1], losses_of[0], rtol=1e-4)
    assert read_text(tmp_path / "rank1.txt") == ""


def test_a_lost_process_ends_the_others_and_the_run_goes_on(tmp_path):
    """SIGKILL to one: the other ends with a line; the same command goes on. SIGTERM to one: both stop, saved."""
    write_frames(tmp_path / "video", range(1, 4))
    options = frames_run(tmp_path, "--steps", 2000, "--log_every", 1, "--save_every", 1, "--name", "run",
                         "--batch_size", 2)
    started = launch_ranks("train_depth.py", options, tmp_path)
    wait_for_records(tmp_path / "runs" / "run", 2, started[0][0])
    started[1][0].kill()
    assert wait_for_end(started) == [1, -signal.SIGKILL]
    assert read_text(started[0][1]).splitlines()[-1].startswith("error: another process of this run has ended")
    started = launch_ranks("train_depth.py", options, tmp_path)
    wait_for_records(tmp_path / "runs" / "run", 4, started[0][0])
    os.kill(started[1][0].pid, signal.SIGTERM)
    assert wait_for_end(started) == [utils.STOPPED] * 2
    assert "continues at step" in read_text(started[0][1]) and "saved" in read_text(started[0][1])


def test_torchrun(tmp_path, world):
    """As a user starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               os.path.join(HERE, "train_seg.py"), "--data", "synthetic", "--data_path", world, *SMALL, "--steps", "2",
               "--num_workers", "0", "--log_dir", str(tmp_path), "--device", "cpu"]
    command += ["--name", "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mIoU") == 1 and read_json(tmp_path, "run", "result.json")["step"] == 2


def test_what_several_processes_refuse(tmp_path, world):
    for refused in (["--batch_size", 3], ["--sync_bn"], ["--on_bad_sample", "skip"], ["--benchmark", 2]):
        options = ["--data", "synthetic", "--data_path", world, *SMALL, "--log_dir", tmp_path, "--device", "cpu",
                   *refused]
        started = launch_ranks("train_seg.py", options, tmp_path)
        assert wait_for_end(started) == [2, 2]
        line, = read_text(started[0][1]).splitlines()
        assert line.startswith("error: ") and refused[0] in line


# ------------------------------------------------------------------------------------ a run that can be trusted

FORKS = multiprocessing.get_context("forkserver")  # torch is imported once, in a process that forks the others
FORKS.set_forkserver_preload(["test_smoke"])
KILLS = int(os.environ.get("KILLS", "10"))  # in all, over the five kinds of training
MUTATIONS = int(os.environ.get("FUZZ", "100"))
CLIPS = int(os.environ.get("CLIPS", "200000"))
MANY_STEPS = int(os.environ.get("MANY_STEPS", "60"))


def run_forked(script: str, options: list[str], output: str) -> None:
    """A script's main as the leader of a group of processes, on one thread; what it prints goes to a file."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as from the shell
    sys.argv = [script, *options]
    utils.run_main({"train_depth.py": train_depth, "train_seg.py": train_seg}[script].main)


def launch(script: str, options: list[str], folder) -> tuple[multiprocessing.Process, str]:
    """Start a script; the process, and the file of its output."""
    os.makedirs(folder, exist_ok=True)
    output = os.path.join(folder, "output.txt")
    process = FORKS.Process(target=run_forked, args=(script, [str(option) for option in options], output))
    process.start()
    return process, output


def wait_for(condition, process: multiprocessing.Process) -> None:
    """Until a condition holds, or the process has ended."""
    deadline = time.monotonic() + 240
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_records(folder, count: int, process: multiprocessing.Process) -> None:
    """Until the log has so many records."""
    path = os.path.join(folder, "log.jsonl")
    wait_for(lambda: os.path.exists(path) and open(path).read().count("\n") >= count, process)  # noqa: SIM115


def read_text(path) -> str:
    with open(path) as file:
        return file.read()


def assert_same_runs(ours, theirs) -> None:
    """Weights and log, bit by bit."""
    assert differing(read_weights(str(ours)), read_weights(str(theirs))) == []
    for first, second in zip(read_log(str(ours)), read_log(str(theirs)), strict=True):
        assert {k: v for k, v in first.items() if "ms_" not in k and "samples_per_s" not in k} == {
            k: v for k, v in second.items() if "ms_" not in k and "samples_per_s" not in k}


@pytest.mark.parametrize("kind, share", (
    ("mono", 0.1), ("stereo", 0.2), ("flow", 0.2), ("reconstruction", 0.2), ("segmentation", 0.3)))
def test_a_killed_run_continues_as_if_nothing_had_happened(tmp_path, world, pretrained, fine_tuned, kind, share):
    """SIGKILL at random moments ($KILLS in all), with zero, one or two loader processes: the same bits in the end."""
    if kind == "segmentation":
        script, reference = "train_seg.py", fine_tuned("all")
        options = fine_tuning_options("all", world, str(tmp_path), pretrained)
    else:
        script, reference, options = "train_depth.py", pretrained(kind), pretraining_options(kind, world, str(tmp_path))
    folder, steps = tmp_path / os.path.basename(reference), read_json(reference, "result.json")["step"]
    draw, kills, saving = np.random.default_rng(), 0, ["--save_every", 3 if kind == "mono" else 1]
    while kills < share * KILLS:
        process, _ = launch(script, [*options, *saving, "--num_workers", kills % 3], tmp_path)
        wait_for_records(folder, draw.integers(steps), process)
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        process.join()
        if os.path.exists(folder / "result.json"):  # it was faster: once more
            shutil.rmtree(folder)
        else:
            kills += 1
    process, output = launch(script, [*options, *saving, "--num_workers", kills % 3], tmp_path)
    process.join()
    assert process.exitcode == 0, read_text(output)
    assert_same_runs(folder, reference)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> tuple[str, list[str]]:
    """A finished run of three steps, every one saved, and the options that made it, but its --log_dir."""
    folder = tmp_path_factory.mktemp("small")
    write_frames(folder / "video", range(1, 4), "png")
    options = frames_run(folder, "--steps", 3, "--save_every", 1, "--log_every", 1, "--name", "run")
    process, output = launch("train_depth.py", options, folder)
    process.join()
    assert process.exitcode == 0, read_text(output)
    return str(folder / "runs"), options


def unfinished_copy(small_run, folder) -> tuple[list[str], str]:
    """The options of a copy of the small run, killed before its last checkpoint; and its folder."""
    run = os.path.join(shutil.copytree(small_run[0], folder / "runs"), "run")
    os.remove(os.path.join(run, "result.json"))
    os.replace(os.path.join(run, "last.pt.1"), os.path.join(run, "last.pt"))
    return [*small_run[1], "--log_dir", f"{folder}/runs"], run


@pytest.mark.parametrize("several, code", ((False, utils.STOPPED), (True, -signal.SIGTERM)))
def test_signals_to_a_whole_group(tmp_path, several, code):
    """As a scheduler or Ctrl-C sends them, to loader processes too. A second signal ends the run at once."""
    write_frames(tmp_path / "video", range(1, 4))
    size = ("--height", 256, "--width", 512) if several else ()  # steps that are still running when the second comes
    options = frames_run(tmp_path, "--steps", 1000, "--log_every", 1, "--name", "run", "--num_workers", 2, *size)
    process, output = launch("train_depth.py", options, tmp_path)
    wait_for_records(tmp_path / "runs" / "run", 1, process)
    os.killpg(process.pid, signal.SIGTERM if several else signal.SIGINT)
    if several:
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == code and "Traceback" not in read_text(output), read_text(output)
    if not several:
        step = networks.read_last(f"{tmp_path}/runs/run/last.pt")["step"]
        assert f"stopped at step {step}, saved" in read_text(output)


def cut(path: str) -> None:
    truncate(path, 0.7)


def empty(path: str) -> None:
    truncate(path, 0)


def flip_a_bit(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def plant_a_bomb(path: str) -> None:
    torch.save({"step": Bomb(os.path.join(os.path.dirname(path), "executed"))}, path)


def put_something_else(path: str) -> None:
    torch.save({"weights": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", (cut, empty, flip_a_bit, plant_a_bomb, put_something_else, os.remove))
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, small_run, damage):
    """Named, in one line; and when that one is damaged too, the user is asked."""
    run = shutil.copytree(f"{small_run[0]}/run", tmp_path / "run")
    damage(f"{run}/last.pt")
    assert networks.read_last(f"{run}/last.pt")["step"] == 2
    line, = capsys.readouterr().out.splitlines()
    assert f"{run}/last.pt" in line and f"{run}/last.pt.1" in line and not os.path.exists(f"{run}/last.pt.1")
    if damage is not os.remove:
        damage(f"{run}/last.pt")
        with pytest.raises(utils.InputError, match=f"{run}/last.pt .*delete it to start again"):
            networks.read_last(f"{run}/last.pt")
    assert not os.path.exists(f"{run}/executed")


def test_continuing_from_the_checkpoint_before_ends_the_same(tmp_path, capsys, small_run):
    run = os.path.join(shutil.copytree(small_run[0], tmp_path / "runs"), "run")
    os.remove(f"{run}/result.json")
    cut(f"{run}/last.pt")
    code, output, errors = call(capsys, train_depth, *small_run[1], "--log_dir", tmp_path / "runs", "--resume")
    assert code == 0 and "last.pt.1" in output and "continues at step 2" in output, errors
    assert_same_runs(run, f"{small_run[0]}/run")


def test_a_full_disk_leaves_the_checkpoint(tmp_path, capsys, small_run):
    """A limit on the size of files says what a full disk says. Loader processes end with the run."""
    options, run = unfinished_copy(small_run, tmp_path)
    before = Path(f"{run}/last.pt").read_bytes()
    limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2 ** 20, resource.RLIM_INFINITY))
    command = [sys.executable, os.path.join(HERE, "train_depth.py"), *map(str, options), "--num_workers", "2"]
    done = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, timeout=240, check=False)
    assert_one_line(done.returncode, done.stderr, (f"could not write {run}/model.pt", "File too large"))
    assert Path(f"{run}/last.pt").read_bytes() == before and not glob.glob(f"{run}/*.tmp")
    assert call(capsys, train_depth, *options)[0] == 0
    assert_same_runs(run, f"{small_run[0]}/run")


def test_a_clock_set_back_harms_nothing(tmp_path, capsys, monkeypatch, small_run):
    options, run = unfinished_copy(small_run, tmp_path)
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1.7e9 - 3600 * next(hours))
    assert call(capsys, train_depth, *options)[0] == 0
    assert_same_runs(run, f"{small_run[0]}/run")


@pytest.mark.parametrize("module", (train_depth, train_seg))
def test_a_run_continues_with_its_own_options_only(tmp_path, monkeypatch, module):
    """Every option of both scripts, but those that may change."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--log_dir", str(tmp_path)])
    args = module.parse_options()
    for option, value in vars(args).items():
        then = {"args": {**vars(args), option: "another"}, "step": 1, "log_size": 0}
        if option in utils.MAY_CHANGE:
            utils.Run(args, "", lambda path, then=then: then)
        else:
            with pytest.raises(utils.InputError, match=re.escape(f"--{option} another there, {value} now")):
                utils.Run(args, "", lambda path, then=then: then)


def test_two_runs_of_one_name_and_a_lost_loader_process(tmp_path, capsys):
    """While one runs, the second is refused. When a loader process is killed, a line says so, the checkpoint stays."""
    write_frames(tmp_path / "video", range(1, 4))
    options = frames_run(tmp_path, "--steps", 1000, "--log_every", 1, "--save_every", 1, "--name", "run")
    process, output = launch("train_depth.py", [*options, "--num_workers", 1], tmp_path)
    wait_for(lambda: os.path.exists(tmp_path / "runs" / "run" / "last.pt"), process)
    code, _, errors = call(capsys, train_depth, *options)
    assert_one_line(code, errors, (f"{tmp_path}/runs/run", "another process", "--name"))

    worker = int(read_text(f"/proc/{process.pid}/task/{process.pid}/children").split()[0])
    os.kill(worker, signal.SIGKILL)
    process.join()
    lines = [line for line in read_text(output).splitlines() if "error" in line]
    assert process.exitcode == 1 and len(lines) == 1 and "worker" in lines[0] and "Traceback" not in read_text(output)
    assert networks.read_last(f"{tmp_path}/runs/run/last.pt")["step"] >= 1


def resident_memory(process: int | str = "self") -> float:
    """MB."""
    return int(read_text(f"/proc/{process}/statm").split()[1]) * resource.getpagesize() / 2 ** 20


def test_memory_stays_flat(tmp_path):
    """Resident memory of a run of $MANY_STEPS steps, once warm: the same at its end, within 2 %."""
    write_frames(tmp_path / "video", range(1, 4))
    options = frames_run(tmp_path, "--steps", MANY_STEPS, "--log_every", 1, "--name", "run", "--num_workers", 1)
    process, output = launch("train_depth.py", options, tmp_path)
    log, samples = tmp_path / "runs" / "run" / "log.jsonl", []
    while process.is_alive():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, IndexError):
            steps = log.stat().st_size
            samples.append((steps, resident_memory(process.pid)))
        time.sleep(0.05)
    assert process.exitcode == 0, read_text(output)
    end = samples[-1][0]
    warm = [memory for size, memory in samples if end * min(0.4, 500 / MANY_STEPS) < size < 0.6 * end]
    late = [memory for size, memory in samples if size > 0.8 * end]
    growth = max(late) / max(warm) - 1
    print(f"memory: {max(warm):.0f} MB when warm, {100 * growth:+.2f} % at the end of {MANY_STEPS} steps")
    assert growth < 0.02


def huge_weights(folder) -> str:
    content = depth_checkpoint()
    content["encoder"]["encoder.layer2.0.conv1.weight"] *= 1e38
    return save_checkpoint(folder, content)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    write_frames(tmp_path / "video", range(1, 4))
    options = frames_run(tmp_path, "--name", "run", "--init", huge_weights(tmp_path))
    for detect, words in (([], "--detect"), (["--detect"], "encoder.encoder.layer2.0.conv1")):
        code, _, errors = call(capsys, train_depth, *options, *detect)
        assert re.match(r"stopped: loss is nan at step 1 \(samples \[\d\]\).*" + words, code) and not errors
    assert not glob.glob(f"{tmp_path}/runs/run/*.pt")


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch, small_run):
    """The loss is fine; the derivative of a root at zero is not. The checkpoint stays as it was."""
    def with_a_root(images, pyramid, removed):
        return real(images, pyramid, removed) + (images[3] * 0).mean().sqrt()

    real = losses.reconstruction_loss
    monkeypatch.setattr(losses, "reconstruction_loss", with_a_root)
    options, run = unfinished_copy(small_run, tmp_path)
    before = Path(f"{run}/last.pt").read_bytes()
    for detect, words in (([], "--detect"), (["--detect"], "Function 'MulBackward0'")):
        code, _, errors = call(capsys, train_depth, *options, *detect)
        assert code.startswith("stopped: the gradient of decoder.decoder.13") and not errors
        assert "at step 3 (samples [" in code and words in code
    assert "test_smoke.py line" in code and "with_a_root" in code
    assert Path(f"{run}/last.pt").read_bytes() == before


def parsers(monkeypatch) -> dict[str, argparse.ArgumentParser]:
    """The option parsers of every script and command, by name."""
    found = {}

    def remember(self, *arguments):
        found[self.prog] = self
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found.update({f"{self.prog} {name}": parser for name, parser in action.choices.items()})
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", remember)
    for module in (train_depth, train_seg, evaluate, datasets):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py"])
        with contextlib.suppress(SystemExit):
            module.main()
    return found


def test_every_number_has_a_range(monkeypatch):
    """No option of any script takes nan, inf, or a number without bounds."""
    checked = 0
    for name, parser in parsers(monkeypatch).items():
        for action in parser._actions:
            if action.type is None or action.type is datasets.parse_range:
                continue
            for text in ("nan", "inf", "-inf", "1e30", "-1e30", str(10 ** 30), str(-10 ** 30), "", "x"):
                with pytest.raises((argparse.ArgumentTypeError, ValueError)):
                    print(name, action.dest, action.type(text))
            checked += 1
    assert checked > 25


@pytest.mark.parametrize("module, options, words", (
    (train_depth, ["--steps", "0"], ("--steps 0", "1 to")),
    (train_depth, ["--learning_rate", "nan"], ("--learning_rate nan",)),
    (train_seg, ["--batch_size", "many"], ("--batch_size", "many")),
    (train_seg, ["--arch", "none"], ("--arch", "none", "unet")),
    (train_seg, ["--colour"], ("--colour",)),
    (train_seg, ["--steps"], ("--steps",)),
    (evaluate, ["seg"], ("--weights",)),
    (evaluate, [], ("command",)),
    (evaluate, ["depth", "--weights", "x", "--min_eval", "5", "--max_eval", "4"], ("--min_eval", "--max_eval")),
    (datasets, ["render", "--drives", "-1"], ("--drives -1",)),
    (train_depth, ["--device", "cuda:99"], ("--device cuda:99",)),
    (train_depth, ["--frames", "5:1", "--data", "frames"], ("--frames",)),
))
def test_mistaken_options_are_one_line(tmp_path, capsys, monkeypatch, module, options, words):
    monkeypatch.chdir(tmp_path)
    code, _, errors = call(capsys, module, *options)
    assert_one_line(code, errors, words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ("depth", "seg", "predict", "grid"))
def test_a_pickle_bomb_as_weights_does_not_run(tmp_path, capsys, command):
    path = save_checkpoint(tmp_path, {"encoder": Bomb(f"{tmp_path}/executed")})
    output = ("--output", f"{tmp_path}/out.png")
    picture = [write_image(tmp_path / "street.png")] if command in ("predict", "grid") else []
    code, _, errors = call(capsys, evaluate, command, *picture, "--weights", path, *output)
    assert_one_line(code, errors, (path,))
    assert not os.path.exists(tmp_path / "executed")


def test_nothing_reads_code_from_files():
    """No unpickling but torch.load with weights_only=True, no eval or exec, no shell."""
    for path in glob.glob(os.path.join(HERE, "*.py")):
        if os.path.basename(path) == "test_smoke.py":
            continue
        for node in ast.walk(ast.parse(read_text(path))):
            if isinstance(node, ast.Call):
                name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert name not in ("eval", "exec", "os.system", "os.popen", "torch.hub.load"), path
                assert name != "torch.load" or keywords.get("weights_only") == "True", path
                assert keywords.get("shell", "False") == "False" and keywords.get("allow_pickle") != "True", path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "pickle" not in ast.unparse(node), path


def test_run_all_survives_spaces(tmp_path):
    """Every path with a space, and a Python that only leaves results; what is done is not done again."""
    python = tmp_path / "a python"
    python.write_text("""#!/usr/bin/env bash
        for word in "$@"; do
          case $last in --name) name=$word ;; --log_dir) runs=$word ;; --data_path) [ -d "$word" ] || exit 2 ;; esac
          last=$word
        done
        [ -z "${name:-}" ] || { mkdir -p "$runs/$name" && echo {} > "$runs/$name/result.json" && echo "ran $1"; }
    """)
    python.chmod(0o755)
    os.makedirs(tmp_path / "my data")
    settings = {"PYTHON": str(python), "DATA_PATH": f"{tmp_path}/my data", "RUNS": f"{tmp_path}/my runs", "SEEDS": "0"}
    for words in ("ran train_seg.py", "done already"):
        done = subprocess.run(["bash", os.path.join(HERE, "run_all.sh")], env={**os.environ, **settings}, text=True,
                              capture_output=True, check=False)
        assert done.returncode == 0 and not done.stderr and words in done.stdout, done.stdout + done.stderr
    assert {"depthrand_resnet18", "logs"} < set(os.listdir(tmp_path / "my runs"))
    assert "core.png.txt" in os.listdir(tmp_path / "my runs" / "logs")


def test_shell_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck") or os.path.join(os.path.dirname(sys.executable), "shellcheck")
    if not os.path.exists(shellcheck):
        pytest.skip("no shellcheck")
    done = subprocess.run([shellcheck, "run_all.sh", ".ci/run"], cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# What the fuzz test damages: files, and a function that reads them all as the scripts do, into tensors.

def read_samples(dataset) -> list[torch.Tensor]:
    return [value for index in range(len(dataset)) for value in dataset[index].values() if torch.is_tensor(value)]


def read_last(path: str) -> list[torch.Tensor]:
    checkpoint = networks.read_last(path)
    return [torch.tensor(checkpoint["step"]), *checkpoint["model"]["encoder"].values()]


def fuzzed(world: str, small_run, folder) -> dict:
    """Copies of what is damaged."""
    frames, kitti, labels, model, last = (str(folder / name) for name in ("frames", "kitti", "labels", "model", "last"))
    write_frames(frames, range(1, 4), "png")
    write_image(f"{frames}/frame4.jpg")
    os.makedirs(f"{frames}/depth")
    for number in (1, 2, 3):
        depth = np.random.default_rng(number).integers(500, 60000, (64, 96)).astype(np.uint16)
        Image.fromarray(depth).save(f"{frames}/depth/frame{number}.png")
    shutil.copytree(world, kitti, ignore=shutil.ignore_patterns("training", "*9002*"))
    write_semantics(labels, 3)
    for place in (model, last):
        os.makedirs(place)
    shutil.copy(f"{small_run[0]}/run/model.pt", model)
    weights = {f"conv{i}": torch.rand(8, 3, 3, 3) for i in range(20)}
    torch.save({"step": 3, "args": {"name": "run"}, "log_size": 9, "model": {"encoder": weights}, "optimizer": {}},
               f"{last}/last.pt")
    size = {"height": 64, "width": 64}
    read = {
        frames: lambda: read_samples(datasets.Frames(frames, ["0", "1"], **size))
        + read_samples(datasets.Frames(frames, ["0"], with_depth=True, **size)),
        kitti: lambda: read_samples(datasets.KittiRaw(kitti, ["0", "s"], with_depth=True, frames=(1, 3), **size)),
        labels: lambda: read_samples(datasets.KittiSemantics(labels, "train", **size))
        + read_samples(datasets.KittiSemantics(labels, "val", **size)),
        last: lambda: read_last(f"{last}/last.pt"),
        model: lambda: list(networks.load_model(model)[0].state_dict().values()),
    }
    return {place: (sorted(str(path) for path in Path(place).rglob("*.*") if path.is_file()), how)
            for place, how in read.items()}


def mutate(path: str, other: str, draw: np.random.Generator) -> str:
    """Flip bytes of a file, cut it, or swap it with another; what was done."""
    size, kind = os.path.getsize(path), ("flip", "cut", "swap")[draw.integers(3)]
    if kind == "swap":
        os.rename(path, f"{path}.aside")
        os.rename(other, path)
        os.rename(f"{path}.aside", other)
    elif kind == "cut":
        os.truncate(path, draw.integers(size))
    else:
        with open(path, "r+b") as file:
            for position in draw.integers(size, size=draw.integers(1, 5)):
                file.seek(position)
                file.write(bytes([draw.integers(256)]))
    return kind


def test_fuzz(world, small_run, tmp_path):
    """$FUZZ random mutations of files: each is refused in a line, or changes nothing that a checksum covers."""
    places = fuzzed(world, small_run, tmp_path)
    reference = {place: read() for place, (_, read) in places.items()}
    draw, outcomes = np.random.default_rng(int(os.environ.get("FUZZ_SEED", "0"))), collections.Counter()
    for number in range(MUTATIONS):
        place = draw.choice(list(places), p=(0.25, 0.25, 0.25, 0.2, 0.05))  # the real model takes longest
        path = str(draw.choice(places[place][0]))
        other = str(draw.choice([p for paths, _ in list(places.values())[:4] for p in paths if p != path]))
        content, other_content = Path(path).read_bytes(), Path(other).read_bytes()
        kind = mutate(path, other, draw)
        what, start = f"mutation {number}: {kind} {path}" + f" {other}" * (kind == "swap"), time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                result = places[place][1]()
        except utils.InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, what
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(what) from error
        else:
            assert all(value.isfinite().all() for value in result), what
            same = len(result) == len(reference[place]) and all(map(torch.equal, result, reference[place]))
            assert same or kind == "swap" or path.endswith((".jpg", ".txt", ".bin")), what
            outcomes["harmless" if same else "another input"] += 1
        assert time.monotonic() - start < 20, what
        Path(path).write_bytes(content)
        if kind == "swap":
            Path(other).write_bytes(other_content)
    print(f"{MUTATIONS} mutations: {dict(outcomes)}")


# ------------------------------------------------------------------------------------ evaluate.py

def call(capsys, module, *arguments: str) -> tuple[int, str, str]:
    """A script's main in this process: exit code, standard output and standard error."""
    before, sys.argv = sys.argv, [f"{module.__name__}.py", *(str(argument) for argument in arguments)]
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as outcome:
            utils.run_main(module.main)
    finally:
        sys.argv = before
    return outcome.value.code, *capsys.readouterr()


@pytest.mark.parametrize("kind", ("mono", "stereo", "depth"))
def test_evaluate_depth(tmp_path, capsys, world, pretrained, kind):
    """Monocular networks by the ratio of medians, metric ones as they are; per-image rows average to the summary."""
    code, output, errors = call(
        capsys,
        evaluate,
        "depth",
        "--weights",
        pretrained(kind),
        "--data",
        "synthetic",
        "--data_path",
        world,
        "--frames",
        "0:6",
        "--ground_truth",
        "z",
        "--output",
        tmp_path,
    )
    assert code == 0, errors
    result = read_json(str(tmp_path), "depth.json")
    assert (
        result["images"] == 12
        and result["ground_truth"] == "z"
        and result["scale"] == ("median" if kind == "mono" else 1)
    )
    rows = np.genfromtxt(tmp_path / "depth.csv", delimiter=",", names=True, dtype=None, encoding="utf8")
    for metric in evaluate.DEPTH_METRICS:
        assert f"{result[metric]:.4f}" in output and rows[metric].mean() == pytest.approx(result[metric])


def test_evaluate_depth_baseline(world, tmp_path):
    done = run_script(
        "evaluate.py",
        "depth",
        "--baseline",
        "--data",
        "synthetic",
        "--data_path",
        world,
        "--train_frames",
        "0:4",
        "--frames",
        "4:6",
        "--ground_truth",
        "z",
        "--output",
        str(tmp_path),
    )
    result = read_json(str(tmp_path), "depth.json")
    assert "median of 8 frames" in done.stdout and result["images"] == 4 and 0 < result["abs_rel"] < 2


def test_evaluate_segmentation(capsys, world, tmp_path, fine_tuned):
    """A saved segmenter scores what training reported at its end."""
    code, output, _ = call(
        capsys, evaluate, "seg", "--weights", fine_tuned("all"), "--data_path", world, "--output", tmp_path
    )
    assert code == 0
    scores, trained = read_json(str(tmp_path), "segmentation.json"), read_json(fine_tuned("all"), "result.json")
    assert scores["miou"] == pytest.approx(trained["miou"], abs=1e-4)
    assert scores["cross_entropy"] == pytest.approx(trained["cross_entropy"], rel=1e-5)
    assert f"mIoU {trained['miou']:.2f} %" in output and all(name in output for name in datasets.CITYSCAPES_CLASSES)


@pytest.mark.parametrize("kind, array", (("mono", np.float32), ("seg_all", np.uint8), ("reconstruction", None)))
def test_predict_pictures_of_any_size(tmp_path, capsys, pretrained, fine_tuned, kind, array):
    """A file and a folder, sizes that are no multiples of anything, grey images and such with an opaque alpha."""
    folder = fine_tuned("all") if kind == "seg_all" else pretrained(kind)
    write_image(tmp_path / "street" / "a10.png", 75, 133)
    write_image(tmp_path / "street" / "a9.jpg", 33, 50)
    Image.new("L", (61, 47), 90).save(tmp_path / "street" / "grey.png")
    Image.new("RGBA", (64, 40), (10, 200, 30, 255)).save(tmp_path / "single.png")
    code, _, errors = call(
        capsys,
        evaluate,
        "predict",
        tmp_path / "street",
        tmp_path / "single.png",
        "--weights",
        folder,
        "--output",
        tmp_path / "out",
    )
    assert code == 0, errors
    task = {"mono": "depth", "seg_all": "segmentation", "reconstruction": "reconstruction"}[kind]
    for name, (width, height) in {"a10": (133, 75), "a9": (50, 33), "grey": (61, 47), "single": (64, 40)}.items():
        assert Image.open(tmp_path / "out" / f"{name}_{task}.png").size == (width, height)
        if array is not None:
            content = np.load(tmp_path / "out" / f"{name}_{task}.npy")
            assert content.shape == (height, width) and content.dtype == array
            assert 0.1 <= content.min() and content.max() <= 100 if task == "depth" else content.max() < 19


def write_run(folder: Path, pretraining: str, seed: int, miou: float, **changed) -> None:
    """What a finished fine-tuning leaves behind, as far as tables read it."""
    os.makedirs(folder)
    options = {"data": "kitti", "encoder": "resnet18", "arch": "unet", "train_size": 16, "freeze_encoder": False,
               "steps": 100, "batch_size": 4, "learning_rate": 1e-4, "height": 64, "width": 96, "init": "none",
               "init_parts": "all", "name": folder.name, "seed": seed, "split_seed": seed, **changed}
    utils.save_json(str(folder / "args.json"), {"options": options})
    utils.save_json(str(folder / "result.json"), {"miou": miou, "pixel_accuracy": 80.0, "cross_entropy": 1.0,
                                                  "pretraining": pretraining})
    curve = [(0, 1.0), (25, 0.8 * miou), (50, 0.95 * miou), (100, miou)]
    (folder / "log.jsonl").write_text("".join(json.dumps({"step": s, "miou": m}) + "\n" for s, m in curve))


def test_tables(capsys, tmp_path):
    """Mean and deviation over runs that differ in their seed alone, a paired test against None, the paper's values."""
    bonus = (2.0, 5.0, 4.0)
    for seed, miou in enumerate((40.0, 50.0, 60.0)):
        write_run(tmp_path / f"seg_none_resnet18_unet_all_n16_seed{seed}", "None", seed, miou)
        write_run(tmp_path / f"seg_depthrand_resnet18_unet_all_n16_seed{seed}", "Depth-Rand (stereo)", seed,
                  miou + bonus[seed], init="runs/depthrand_resnet18")
    write_run(tmp_path / "longer", "None", 0, 40.0, steps=200)  # another experiment is no further seed
    code, output, errors = call(capsys, evaluate, "tables", "--log_dir", tmp_path, "--figures")
    assert code == 0, errors
    rows = [line for line in output.splitlines() if line.startswith("| kitti")]
    assert len(rows) == 3
    assert "| 200 x 4, 0.0001, 96x64 | all | None | 1 | 40.00 |  | 80.00 | 1.000 | 50 |" in rows.pop()
    assert "| None | 3 | 50.00 ± 10.00 |  | 80.00 ± 0.00 | 1.000 ± 0.000 | 50 |" in rows[0]
    p = scipy.stats.ttest_1samp(bonus, 0).pvalue
    assert f"| Depth-Rand (stereo) | 3 | 53.67 ± 11.06 | +3.67 (p {p:.3f}) |" in rows[1]
    table1 = output[output.index("Table 1"):].splitlines()
    assert next(line for line in table1 if line.startswith("| Depth-Rand")).startswith(
        "| Depth-Rand | 53.7 ± 11.1 / 80.0 ± 0.0 [46.00 / 72.43] | – [49.90 / 76.28] |")
    assert (tmp_path / "tables.md").read_text().strip() == output.strip()
    with open(tmp_path / "tables.csv") as file:
        assert [row[6] for row in csv.reader(file)] == ["runs", "3", "3", "1"]
    for name in ("curves.png", "bars.png"):
        assert Image.open(tmp_path / name).size[0] > 500
    assert not (tmp_path / "sizes.png").exists()  # one number of images is no curve


def test_tables_go_by_the_number_of_images(capsys, tmp_path):
    for train_size in (128, None, 8, 16):
        write_run(tmp_path / f"n{train_size}", "None", 0, 40.0, train_size=train_size)
    assert call(capsys, evaluate, "tables", "--log_dir", tmp_path)[0] == 0
    with open(tmp_path / "tables.csv") as file:
        assert [row[2] for row in csv.reader(file)] == ["images", "8", "16", "128", "all"]


@pytest.mark.parametrize("n", (2, 3, 5, 12))
def test_paired_test_is_student_s(n):
    a, b = np.random.default_rng(n).normal(0.4, 1, (2, n))
    difference, p = evaluate.paired_test(a, b)
    expected = scipy.stats.ttest_rel(a, b)
    assert difference == pytest.approx((a - b).mean()) and p == pytest.approx(expected.pvalue, rel=1e-5)
    assert np.isnan(evaluate.paired_test([1.0], [2.0])[1])


def test_every_cell_of_the_paper_has_a_job():
    """run_all.sh lists a run for each number that the paper prints, and every run that a table asks for."""
    listing = subprocess.run(["bash", "run_all.sh", "list", "finetuning"], cwd=HERE, text=True, check=True,
                             capture_output=True, env={**os.environ, "SEEDS": "0"}).stdout.splitlines()
    stems = {re.search(r"--name (\S+)_seed0 ", line)[1] for line in listing}
    assert len(stems) == len(listing)
    for title, (columns, rows) in evaluate.PAPER.items():
        for init, (_, *papers) in rows.items():
            assert len(papers) == len(columns), (title, init)
            for column, paper in zip(columns.values(), papers):
                found = fnmatch.filter(stems, column.format(init))
                assert len(found) <= 1 and (found or paper is None), (title, init, column)


def test_figures_tell_schedules_apart(tmp_path):
    """Runs at another learning rate, or as the release does it, are no further seeds of a curve."""
    for name, changed in (("a", {}), ("b", {"learning_rate": 1e-3}), ("c", {"freeze_batch_norm_only": True})):
        write_run(tmp_path / name, "None", 0, 40.0, **changed)
    panels = {evaluate.describe(run)[0] for run in evaluate.read_runs(str(tmp_path))}
    assert panels == {"resnet18 unet, all, 96x64, 100 steps at 0.0001", "resnet18 unet, all, 96x64, 100 steps at 0.001",
                      "resnet18 unet, all, freeze_batch_norm_only, 96x64, 100 steps at 0.0001"}


def test_figures_tell_pretrainings_of_other_lengths_apart():
    """Figures call them by a short name where that is enough, and by all there is where it is not."""
    once, twice = (f"Depth (mono) on kitti (288 samples, 192x64, {steps} steps), encoder only" for steps in (750, 3000))
    assert evaluate.shorten({"None": 1, once: 2}) == {"None": 1, "Depth (mono), encoder only": 2}
    assert evaluate.shorten({once: 1, twice: 2, "Flow on kitti, encoder only": 3}) == {
        once: 1, twice: 2, "Flow, encoder only": 3}


def test_tables_of_real_runs(capsys, log_dir, fine_tuned):
    fine_tuned("none")
    fine_tuned("frozen")
    code, output, _ = call(capsys, evaluate, "tables", "--log_dir", log_dir)
    assert (
        code == 0
        and f"{read_json(fine_tuned('none'), 'result.json')['miou']:.2f}" in output
        and "| frozen | Depth-Rand (mono) on synthetic" in output
    )


# ------------------------------------------------------------------------------------ architectures

@pytest.fixture
def small_vits(monkeypatch):
    """Five blocks instead of twelve."""
    for patch in (14, 16):
        monkeypatch.setitem(networks.VITS, f"vit_s{patch}", (patch, 5, 6, 384))


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Parameters whose outputs neither vanish nor hide behind a normalisation, LayerScale's and biases too."""
    generator = torch.Generator().manual_seed(0)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        draw = torch.randn(value.shape, generator=generator)
        if value.dim() < 2:
            value.data.copy_(draw.mul(0.1).add(0 if name.endswith("bias") else 1) if value.dim() else value)
        else:
            value.data.copy_(draw * (0.3 if "pos" in name else (1.3 / value[0].numel()) ** 0.5))
    for name, value in model.named_buffers():
        if name.endswith("running_var"):
            value.abs_()
    return model.eval()


def normalised(images: torch.Tensor, encoder: torch.nn.Module) -> torch.Tensor:
    """What a model of another project has to be fed with."""
    return (images - encoder.mean) / encoder.std


RESNET_FILES = {  # how a file names what it holds: format, and the content for a classifier's state dict
    "torchvision ResNet (ImageNet)": lambda state: state,
    "DINO ResNet-50": lambda state: {k: v for k, v in state.items() if not k.startswith("fc.")},
    "MoCo v2": lambda state: {"epoch": 800, "arch": "resnet50", "optimizer": {"state": {}}, "state_dict": {
        "module.queue": torch.zeros(128, 8), **{f"module.encoder_k.{k}": 0 * v for k, v in state.items()},
        "module.encoder_q.fc.2.bias": torch.zeros(128), **{f"module.encoder_q.{k}": v for k, v in state.items()}}},
    "DINO ResNet-50, whole": lambda state: {
        "args": argparse.Namespace(arch="resnet50", lr=0.03), "epoch": 800,
        "student": {f"module.backbone.{k}": 0 * v for k, v in state.items()},
        "teacher": {"module.head.mlp.0.weight": torch.zeros(4, 4), "module.head.last_layer.weight_v": torch.zeros(4, 4),
                    **{f"module.backbone.{k}": v for k, v in state.items() if not k.startswith("fc.")}}},
}


@pytest.mark.parametrize("kind", RESNET_FILES)
def test_resnet_files(tmp_path, kind):
    source = randomise(torchvision.models.resnet18())
    path = save_checkpoint(tmp_path, RESNET_FILES[kind](source.state_dict()))
    model, images = networks.build("deeplabv3", "resnet18", 3).eval(), smooth_images(1, 64, 96)
    message = networks.load_weights(model, path, "segmentation")
    assert message == f"{kind.removesuffix(', whole')}: encoder 120/120, decoder fresh"
    assert train_seg.name_pretraining(path) == kind.removesuffix(", whole")
    with torch.no_grad():
        expected = torch.nn.Sequential(*list(source.children())[:-2])(normalised(images, model.encoder))
        assert_close(model.encoder(images)[-1], expected, 1e-4, 1e-4)


def test_torchvision_deeplab(tmp_path):
    """Encoder and decoder of the COCO file, all but the last layer; with that as well, torchvision's outputs."""
    source = randomise(torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, num_classes=21, weights_backbone=None, aux_loss=True))
    path = save_checkpoint(tmp_path, source.state_dict())
    model, images = networks.build("deeplabv3", "resnet50", 21).eval(), smooth_images(1, 64, 96)
    message = networks.load_weights(model, path, "segmentation")
    assert message.startswith("torchvision DeepLabV3 (COCO): encoder 318/318, decoder ") and "head replaced" in message
    model.decoder[4].load_state_dict(source.classifier[4].state_dict())
    with torch.no_grad():
        assert_close(model(images)[0], source(normalised(images, model.encoder))["out"], 1e-4, 1e-4)
    with pytest.raises(utils.InputError, match="--init_parts encoder"):
        networks.load_weights(networks.build("unet", "resnet50", 19), path, "segmentation")


def timm_vit(patch: int, **options) -> torch.nn.Module:
    import timm
    name = {14: "vit_small_patch14_dinov2", 16: "vit_small_patch16_224"}[patch]
    return randomise(timm.create_model(name, depth=5, img_size=8 * patch, dynamic_img_size=True, **options))


VIT_FILES = {  # format: patch, options of timm's model, and the content for its state dict
    "timm ViT (ImageNet)": (16, {}, lambda state: state),
    "DINOv2 ViT": (14, {}, lambda state: {**state, "mask_token": torch.zeros(1, 384)}),
    "MAE ViT": (16, {"num_classes": 0}, lambda state: {
        "model": {**state, "mask_token": torch.zeros(1, 1, 512), "decoder_embed.weight": torch.zeros(512, 384)},
        "args": argparse.Namespace(model="mae_vit_base_patch16", lr=1e-3), "epoch": 800}),
    "DINO ViT": (16, {"num_classes": 0}, lambda state: state),
    "DINO ViT, whole": (16, {"num_classes": 0}, lambda state: {
        "args": argparse.Namespace(arch="vit_small", output_dir="."), "student": {}, "epoch": 100,
        "teacher": {"head.last_layer.weight_g": torch.ones(4, 1), **{f"backbone.{k}": v for k, v in state.items()}}}),
}


@pytest.mark.parametrize("kind", VIT_FILES)
def test_vit_files(tmp_path, small_vits, kind):
    """timm's patch tokens at the size that the position embeddings have and at two others; LayerScale is folded."""
    patch, options, content = VIT_FILES[kind]
    source = timm_vit(patch, **options)
    path = save_checkpoint(tmp_path, content(source.state_dict()))
    model = networks.build("linear", f"vit_s{patch}", 3).eval()
    message = networks.load_weights(model, path, "segmentation")
    assert message.startswith(kind.removesuffix(", whole") + ": encoder 66/66")
    for h, w in ((8, 8), (5, 9), (12, 10)):
        images = smooth_images(2, 4 * h, 4 * w)
        images = F.interpolate(images, (patch * h, patch * w))
        with torch.no_grad():
            expected = source.forward_features(normalised(images, model.encoder))[:, 1:].transpose(1, 2)
            assert_close(model.encoder(images)[0].flatten(2), expected, 1e-4, 1e-4)
            assert model(images)[0].shape == (2, 3, patch * h, patch * w)


@pytest.mark.parametrize("legacy", (False, True))
def test_torchvision_vit(tmp_path, small_vits, legacy):
    """As torchvision names its layers now, and as the published files name them."""
    source = randomise(torchvision.models.VisionTransformer(128, 16, 5, 6, 384, 4 * 384))
    state = source.state_dict()
    if legacy:
        state = {k.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): v
                 for k, v in state.items()}
    model, images = networks.build("linear", "vit_s16", 3).eval(), F.interpolate(smooth_images(1, 32, 32), (128, 128))
    message = networks.load_weights(model, save_checkpoint(tmp_path, state), "segmentation")
    assert message == "torchvision ViT (ImageNet): encoder 66/66, decoder fresh"
    with torch.no_grad():
        x = source._process_input(normalised(images, model.encoder))
        expected = source.encoder(torch.cat([source.class_token, x], 1))[:, 1:]
        assert_close(model.encoder(images)[0].flatten(2), expected.transpose(1, 2), 1e-4, 1e-4)


def published_dpt(maps: list[torch.Tensor], tensors: dict, patch: int) -> torch.Tensor:
    """Depth of DPT-Large (16) or Depth Anything (14) from the maps of four blocks, by the keys of their files."""
    def conv(x, name, **options):
        return F.conv2d(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), **options)

    def up(x, name, by):
        return F.conv_transpose2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], stride=by)

    def unit(x, name):
        return x + conv(F.relu(conv(F.relu(x), f"{name}.conv1", padding=1)), f"{name}.conv2", padding=1)

    head = "depth_head." if patch == 14 else ""
    for n, x in enumerate(maps):
        names = (f"{head}projects.{n}", f"{head}resize_layers.{n}")
        if patch == 16:
            names = (f"pretrained.act_postprocess{n + 1}.3", f"pretrained.act_postprocess{n + 1}.4")
        x = conv(x, names[0])
        x = up(x, names[1], 4 >> n) if n < 2 else conv(x, names[1], stride=2, padding=1) if n == 3 else x
        maps[n] = conv(x, f"{head}scratch.layer{n + 1}_rn", padding=1)
    x = None
    for n in (4, 3, 2, 1):
        name = f"{head}scratch.refinenet{n}"
        x = maps[3] if x is None else x + unit(maps[n - 1], f"{name}.resConfUnit1")
        size = maps[n - 2].shape[2:] if n > 1 else [2 * side for side in maps[0].shape[2:]]
        x = F.interpolate(unit(x, f"{name}.resConfUnit2"), size, mode="bilinear", align_corners=True)
        x = conv(x, f"{name}.out_conv")
    names = [f"{head}scratch.output_conv{i}" for i in (("1", "2.0", "2.2") if patch == 14 else (".0", ".2", ".4"))]
    x = conv(x, names[0], padding=1)
    x = F.interpolate(x, [patch * side // 8 for side in x.shape[2:]], mode="bilinear", align_corners=True)
    return conv(F.relu(conv(x, names[1], padding=1)), names[2])


@pytest.mark.parametrize("patch", (14, 16))
def test_dpt_files(tmp_path, small_vits, patch):
    """DPT-Large (readout, blocks before the last norm, (x - 0.5) / 0.5) and Depth Anything (none, after it), small."""
    vit, images = timm_vit(patch), F.interpolate(smooth_images(2, 24, 40), (6 * patch, 10 * patch))
    names = {"project": "projects", "resize": "resize_layers", "skip": "resConfUnit1", "fuse": "resConfUnit2",
             "mix": "out_conv", "conv1": "scratch.output_conv1", "conv2": "scratch.output_conv2.0",
             "head": "scratch.output_conv2.2"}
    if patch == 16:
        names |= {"conv1": "scratch.output_conv.0", "conv2": "scratch.output_conv.2", "head": "scratch.output_conv.4"}
    tensors = {}
    for key, value in randomise(networks.build("dpt", f"vit_s{patch}", 1).decoder).state_dict().items():
        part, *middle, last = key.split(".")
        n = int(middle[0]) + 1 if middle and middle[0].isdigit() else 0
        if part in ("skip", "fuse", "mix"):
            key = ".".join([f"scratch.refinenet{n}", names[part], *middle[1:], last])
        elif part == "reduce":
            key = f"scratch.layer{n}_rn.{last}"
        elif patch == 16 and n:
            slot = {"readout": "0.project.0", "project": "3", "resize": "4"}[part]
            key = f"pretrained.act_postprocess{n}.{slot}.{last}"
            value = value.flatten(1) if part == "readout" and last == "weight" else value
        else:
            key = ".".join([names[part], *middle, last])
        tensors["depth_head." * (patch == 14) + key] = value
    unused = "depth_head." * (patch == 14) + "scratch.refinenet4.resConfUnit1.conv1.bias"
    tensors |= {("pretrained." if patch == 14 else "pretrained.model.") + k: v for k, v in vit.state_dict().items()}
    path = save_checkpoint(tmp_path, {**tensors, unused: torch.zeros(64)})

    model = networks.build("dpt", f"vit_s{patch}", 1).eval()
    message = networks.load_weights(model, path, "depth")
    total = len(model.decoder.state_dict())
    kind = "DPT" if patch == 16 else "Depth Anything"
    assert message.startswith(f"{kind}: encoder 66/66, decoder {total - 2}/{total}")
    head = {14: "depth_head.scratch.output_conv2.2", 16: "scratch.output_conv.4"}[patch]
    model.decoder.head.load_state_dict({kind: tensors[f"{head}.{kind}"] for kind in ("weight", "bias")})
    with torch.no_grad():
        x = normalised(images, model.encoder) if patch == 14 else (images - 0.5) / 0.5
        pairs = vit.forward_intermediates(x, [0, 1, 2, 4], return_prefix_tokens=True, norm=patch == 14,
                                          intermediates_only=True)
        maps = [tokens for tokens, _ in pairs]
        if patch == 16:
            both = [torch.cat([m, c[:, 0, :, None, None].expand_as(m)], 1).movedim(1, 3) for m, c in pairs]
            maps = [F.gelu(F.linear(x, *(tensors[f"pretrained.act_postprocess{n}.0.project.0.{kind}"]
                                         for kind in ("weight", "bias")))).movedim(3, 1) for n, x in enumerate(both, 1)]
        assert_close(model(images)[0], published_dpt(maps, tensors, patch), 1e-4, 1e-4)


def test_normalize_twice():
    """Once by ImageNet's mean and deviation, then by the encoder's own."""
    images, outputs = smooth_images(1, 64, 96), []
    for twice in (False, True):
        torch.manual_seed(0)
        outputs.append(networks.build("unet", "resnet18", 3, normalize_twice=twice).eval())
    once, twice = outputs
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        assert_close(twice(images)[0], once((images - mean) / std)[0], 1e-4, 1e-5)
        assert not torch.allclose(twice(images)[0], once(images)[0], rtol=0.1)


def test_optimizers_and_schedules():
    """SGD as for Cityscapes, a polynomial schedule, and a learning rate of the encoder's own."""
    args = argparse.Namespace(optimizer="sgd", schedule="poly", learning_rate=0.1, steps=100,
                              encoder_learning_rate_factor=0.1)
    model = networks.build("unet", "resnet18", 3)
    optimizer = train_seg.make_optimizer(args, model)
    assert isinstance(optimizer, torch.optim.SGD)
    assert [(group["factor"], group["momentum"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.1, 0.9, 1e-4), (1.0, 0.9, 1e-4)]
    assert train_seg.learning_rate(args, 0) == 0.1
    assert train_seg.learning_rate(args, 50) == pytest.approx(0.1 * 0.5 ** 0.9)
    args.schedule, args.optimizer = "cosine", "adam"
    assert train_seg.learning_rate(args, 50) == pytest.approx(0.05)
    model.encoder.requires_grad_(False)
    assert [group["factor"] for group in train_seg.make_optimizer(args, model).param_groups] == [1.0]


def arch_run(script, capsys, world: str, log_dir, name: str, *options: str) -> str:
    """Two steps of a script in this process: the run folder."""
    code, _, errors = call(capsys, script, "--data_path", world, "--log_dir", log_dir, "--num_workers", "0", "--name",
                           name, "--batch_size", "2", "--steps", "2", "--log_every", "1", *options)
    assert code == 0, errors
    return os.path.join(log_dir, name)


@pytest.mark.parametrize("arch, encoder", (("unet", "resnet18"), ("deeplabv3", "resnet18")))
def test_metric_depth_starts_in_the_middle_of_its_range(arch, encoder):
    """Whatever the image, a fresh network says about the geometric mean of the nearest and the farthest depth."""
    model = networks.build(arch, encoder, 1, (0, 1, 2, 3)).eval()
    middle = losses.depth_to_disparity(10.0, 0.5, 200.0)
    networks.set_head_bias(model.decoder, np.log(middle / (1 - middle)))
    for output in model(torch.rand(1, 3, 64, 96)):
        depth = losses.disparity_to_depth(output.sigmoid(), 0.5, 200.0)
        assert 7 < depth.median().item() < 14


def test_deeplab_from_depth_to_segmentation(tmp_path, capsys, world, pretrained):
    """Table 5's way: depth with a one-channel last layer, then all but that layer for segmentation. And across:
    a U-Net's encoder in DeepLabV3, a DeepLabV3's in a U-Net."""
    size = ["--height", "64", "--width", "64"]
    depth = arch_run(train_depth, capsys, world, tmp_path, "depth", *size, "--arch", "deeplabv3", "--supervision",
                     "depth")
    code, _, errors = call(capsys, evaluate, "depth", "--weights", depth, "--data", "synthetic", "--data_path", world,
                           "--frames", "0:1")
    assert code == 0, errors

    network, head = networks.build("deeplabv3", "resnet18", 19), "decoder.4.weight"
    message = networks.load_weights(network, depth, "segmentation")
    total = len(network.decoder.state_dict())
    assert f"encoder 120/120, decoder {total - 2}/{total}: head replaced" in message
    seg = arch_run(train_seg, capsys, world, tmp_path, "seg", *size, "--arch", "deeplabv3", "--init", depth,
                   "--normalize_twice", "--freeze_batch_norm_only", "--optimizer", "sgd", "--schedule", "poly")
    before, after = read_weights(depth), read_weights(seg)
    assert before.keys() == after.keys() and before[head].shape[0] == 1 and after[head].shape[0] == 19
    changed = {key for key in differing(before, after) if key.startswith("encoder.")}
    assert changed == {key for key in after if key.startswith("encoder.") and not key.endswith(
        ("running_mean", "running_var", "num_batches_tracked"))}  # what the release called frozen
    code, output, errors = call(capsys, evaluate, "seg", "--weights", seg, "--data_path", world)
    assert code == 0 and f"mIoU {read_json(seg, 'result.json')['miou']:.2f} %" in output, errors  # twice here as well

    for arch, source in (("deeplabv3", pretrained("mono")), ("unet", depth)):
        network = networks.build(arch, "resnet18", 19)
        with pytest.raises(utils.InputError, match="--init_parts encoder"):
            networks.load_weights(network, source, "segmentation")
        assert "encoder 120/120, decoder fresh" in networks.load_weights(network, source, "segmentation", "encoder")


def test_dpt_from_depth_to_segmentation(tmp_path, capsys, world, small_vits):
    """A vision transformer trained for depth, then, without its last layer, for segmentation."""
    vit = ["--arch", "dpt", "--encoder", "vit_s16", "--height", "64", "--width", "80", "--dpt_layers", "last"]
    depth = arch_run(train_depth, capsys, world, tmp_path, "depth", *vit, "--supervision", "depth")
    code, _, errors = call(capsys, evaluate, "depth", "--weights", depth, "--data", "synthetic", "--data_path", world,
                           "--frames", "0:1")
    assert code == 0, errors
    with pytest.raises(utils.InputError, match="--dpt_layers last"):
        networks.load_weights(networks.build("dpt", "vit_s16", 19), depth, "segmentation")
    seg = arch_run(train_seg, capsys, world, tmp_path, "seg", *vit, "--init", depth)
    before, after = read_weights(depth), read_weights(seg)
    assert {key for key in before if before[key].shape != after[key].shape} == {
        "decoder.head.weight", "decoder.head.bias"}
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert same == {f"encoder.encoder.encoder.ln.{kind}" for kind in ("weight", "bias")}  # which DPT does not look at
    code, output, errors = call(capsys, evaluate, "seg", "--weights", seg, "--data_path", world)
    assert code == 0 and f"mIoU {read_json(seg, 'result.json')['miou']:.2f} %" in output, errors


def test_linear_probe(tmp_path, capsys, world, small_vits):
    """Of a DINOv2 file: its encoder is frozen, with the position embeddings' own grid, in model.pt and afterwards."""
    path = save_checkpoint(tmp_path, timm_vit(14).state_dict())
    options = ["--arch", "linear", "--encoder", "vit_s14", "--height", "70", "--width", "98", "--init", path]
    seg = arch_run(train_seg, capsys, world, tmp_path, "probe", *options)
    weights, loaded = read_weights(seg), networks.read_checkpoint(path)[1]["encoder"]
    assert loaded[networks.POSITIONS].shape == (1, 65, 384)
    assert all(torch.equal(value, weights[f"encoder.{key}"]) for key, value in loaded.items())
    assert {key for key in weights if key.startswith("decoder.")} == {
        *(f"decoder.0.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        "decoder.1.weight", "decoder.1.bias"}
    assert read_json(seg, "result.json")["pretraining"] == "DINOv2 ViT"
    write_image(tmp_path / "street.png", 75, 133)
    code, _, errors = call(capsys, evaluate, "predict", tmp_path / "street.png", "--weights", seg, "--output", tmp_path)
    assert code == 0 and np.load(tmp_path / "street_segmentation.npy").shape == (75, 133), errors
    os.remove(os.path.join(seg, "result.json"))  # as if killed before its last line
    arch_run(train_seg, capsys, world, tmp_path, "probe", *options)
    assert networks.build("linear", "resnet18", 5)(smooth_images(2, 64, 96))[0].shape == (2, 5, 64, 96)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, world) -> dict[str, str]:
    """Folders in the true layouts of the data sets that run_all.sh names; labels are listed there, not read."""
    root = tmp_path_factory.mktemp("stand_ins")

    def touch(*parts: str) -> None:
        path = root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    shutil.copytree(world, root / "kitti")
    for split, n in itertools.product(("train", "val"), range(64)):
        touch("camvid", split, f"{n}.png")
        touch("camvid", f"{split}annot", f"{n}.png")
    for n in range(200):
        touch("kitti", "training", "image_2", f"{n:06d}_10.png")
        touch("kitti", "training", "semantic", f"{n:06d}_10.png")
    write_cityscapes(str(root / "cityscapes"))
    for split in ("train", "val"):
        for n in range(20):
            touch("cityscapes", "leftImg8bit", split, "ulm", f"ulm_{n:06d}_000030_leftImg8bit.png")
            touch("cityscapes", "gtFine", split, "ulm", f"ulm_{n:06d}_000030_gtFine_labelIds.png")
            touch("ade20k", "images", {"train": "training", "val": "validation"}[split], f"{n:08d}.jpg")
            touch("ade20k", "annotations", {"train": "training", "val": "validation"}[split], f"{n:08d}.png")
            touch("voc", "JPEGImages", f"{split}{n}.jpg")
            touch("voc", "SegmentationClass", f"{split}{n}.png")
            touch("nyu", "label40", f"{n:05d}.png")
            if n < 3:
                write_image(root / "nyu" / "image" / f"{n:05d}.png", 48, 64)
                write_png(root / "nyu" / "depth" / f"{n:05d}.png", np.full((48, 64), 1500, np.uint16))
            else:
                touch("nyu", "image", f"{n:05d}.png")
        lists = root / "voc" / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("".join(f"{split}{n}\n" for n in range(20)))
        (root / "nyu" / {"train": "train.txt", "val": "test.txt"}[split]).write_text(
            "".join(f"{n:05d}\n" for n in range(20)))
    names = ("kitti", "camvid", "cityscapes", "ade20k", "voc", "nyu")
    return {name: str(root / name) for name in names} | {"synthetic": str(root / "kitti")}


@pytest.mark.parametrize("data", ("synthetic", "kitti"))
def test_every_listed_job_parses_and_builds_its_model_and_data(data, stand_ins, monkeypatch):
    environment = {**os.environ, "SEEDS": "0", "DATA": data, "DATA_PATH": stand_ins[data],
                   **{name.upper(): folder for name, folder in stand_ins.items() if name != "synthetic"}}
    listing = subprocess.run(["bash", "run_all.sh", "list"], cwd=HERE, text=True, check=True, capture_output=True,
                             env=environment).stdout.splitlines()
    scripts = {"train_depth.py": train_depth, "train_seg.py": train_seg, "evaluate.py": evaluate}
    folders, used = set(), set()
    for line in listing:
        _, script, *options = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [script, *options])
        args = scripts[script].parse_options()
        if script == "evaluate.py":
            assert folders.issuperset(args.weights), line
            continue
        folders.add(os.path.join(args.log_dir, args.name))
        if script == "train_depth.py":
            args.cache = None
            assert len(train_depth.make_dataset(args)) > 0
            arch, channels = args.arch, {"depth": 1, "flow": 2, "reconstruction": 3}[args.task]
        else:
            train_set, _ = train_seg.make_datasets(args)
            arch, channels = args.arch, len(train_set.classes)
            assert args.train_size is None or len(train_set) == args.train_size >= args.batch_size, line
            if args.init.startswith(args.log_dir):
                assert args.init in folders, f"{args.name} starts from {args.init}, which no job before it trains"
        if (arch, args.encoder, channels) not in used:
            used.add((arch, args.encoder, channels))
            with torch.device("meta"):
                networks.build("flow" if channels == 2 else arch, args.encoder, channels)


# ------------------------------------------------------------------------------------ pictures and a page of runs

def test_gradcam_by_hand():
    """Of two maps, one speaks for the class that is predicted everywhere and the other against it."""
    class Encoder(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [torch.stack([images[:, 0], 1 - images[:, 1]], 1) * self.one]

    class Decoder(torch.nn.Module):
        def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
            score = 3 * features[0][:, :1] - 2 * features[0][:, 1:]
            return [torch.cat([score, score - 1], 1)]

    encoder = Encoder()
    encoder.one = torch.nn.Parameter(torch.ones(()))
    images = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    expected = (3 * images[:, 0] - 2 * (1 - images[:, 1])).relu()
    heat = evaluate.gradcam(networks.Network(encoder, Decoder()), images)
    assert_close(heat, expected / expected.flatten(1).quantile(0.99, 1).view(2, 1, 1))


def test_gradcam_pictures(capsys, world, tmp_path, pretrained, fine_tuned):
    options = ("--weights", fine_tuned("none"), pretrained("mono"), "--output", tmp_path / "cam.png")
    for layer in (0, 4):
        code, output, errors = call(capsys, evaluate, "gradcam", "--data_path", world, "--layer", layer, *options)
        assert code == 0 and "4 images, 2 models" in output, errors
        picture = np.asarray(Image.open(tmp_path / "cam.png"))
        assert picture.shape == (4 * 64, 4 * 128, 3)  # image, label, two models
        assert all(picture[:, 128 * i:128 * i + 128].std() > 5 for i in range(4))
    code, _, errors = call(capsys, evaluate, "gradcam", "--data_path", world, "--weights", pretrained("flow"))
    assert code == 2 and "two frames" in errors


class PageReader(HTMLParser):
    """Checks that every element is closed in its turn, and collects what is shown and what is linked to."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links, self.ids, self.text = [], [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href")]
        self.ids += [value for key, value in attributes if key == "id"]
        if tag not in ("meta", "img", "br", "html"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_of_runs(capsys, tmp_path, pretrained, fine_tuned):
    """Complete in itself: no script, nothing from elsewhere; tables, curves, pictures and options of every run."""
    shutil.copytree(fine_tuned("none"), tmp_path / "a & b" / "<seg>")
    shutil.copytree(fine_tuned("frozen"), tmp_path / "a & b" / "seg_frozen")
    shutil.copytree(pretrained("mono"), tmp_path / "mono")
    os.remove(tmp_path / "mono" / "result.json")
    code, output, errors = call(capsys, evaluate, "html", "--log_dir", tmp_path)
    assert code == 0 and "3 runs" in output, errors
    content = (tmp_path / "index.html").read_text()
    page = PageReader()
    page.feed(content)
    assert page.open == [] and {"table", "svg", "polyline", "img"} <= set(page.seen) and "script" not in page.seen
    assert len(page.links) >= 9 and not [link for link in page.links if ":" in link]
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (tmp_path / unquote(link)).is_file()
    for words in ("<seg>", "a & b", "finished", "at step 4 of 4", "mIoU %", "training loss", '"freeze_encoder": true',
                  "share of masked pixels"):
        assert words in page.text
    code, _, errors = call(capsys, evaluate, "html", "--log_dir", tmp_path / "mono" / "samples")
    assert code == 2 and "no runs there" in errors
    (tmp_path / "mono" / "args.json").write_text("{")
    code, _, errors = call(capsys, evaluate, "html", "--log_dir", tmp_path)
    assert code == 2 and "mono" in errors and "damaged" in errors and (tmp_path / "index.html").read_text() == content


# ------------------------------------------------------------------------------------ the README's fork guide

def fork_guide() -> dict[str, str]:
    """The diffs of the README's "Change one thing" by their headings."""
    guide = Path(HERE, "README.md").read_text().split("\n## Change one thing\n")[1].split("\n## ")[0]
    sections = dict(part.split("\n", 1) for part in guide.split("\n### ")[1:])
    return {title: re.search(r"```diff\n(.*?)```", text, re.DOTALL)[1] for title, text in sections.items()}


@pytest.mark.skipif(not shutil.which("git"), reason="git applies the diffs")
@pytest.mark.parametrize("title, script, options", (
    ("A new loss", "train_depth.py", ("--supervision", "depth", "--depth_loss", "log")),
    ("A new encoder", "train_seg.py", ("--encoder", "mobilenet_v2", "--train_size", "4")),
    ("A new data set", "train_seg.py", ("--data", "own", "--train_size", "4")),
    ("A new pre-training task", "train_depth.py", ("--task", "colour"))))
def test_fork_guide(tmp_path, world, title, script, options):
    """Every diff is of at most 15 lines, applies as the README says, and trains."""
    diff, copy = fork_guide()[title], tmp_path / "copy"
    assert len(re.findall(r"^[-+](?!\+\+ |-- )", diff, re.MULTILINE)) <= 15
    shutil.copytree(HERE, copy, ignore=lambda _, names: {n for n in names if n != "splits" and not n.endswith(
        (".py", ".txt"))})
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=copy, check=True)
    root = world
    if "own" in options:
        root = write_semantics(tmp_path / "kitti", 5, ids=(0, 1))
        os.rename(tmp_path / "kitti" / "training" / "image_2", tmp_path / "kitti" / "images")
        os.rename(tmp_path / "kitti" / "training" / "semantic", tmp_path / "kitti" / "labels")
    run_script(str(copy / script), *options, "--data_path", root, *SMALL, "--steps", "1", "--num_workers", "0",
               "--log_dir", str(tmp_path), "--name", "run")
    assert read_json(str(tmp_path / "run"), "result.json")["step"] == 1


# ------------------------------------------------------------------------------------ what a run says of itself

def test_trouble_is_named():
    depth = 1 + 9 * smooth_images(2, 16, 24)[:, :1]
    moving, still = shift_pose(z=0.5).repeat(2, 2, 1, 1), shift_pose(z=1e-4).repeat(2, 2, 1, 1)
    turning = losses.pose_to_matrix(torch.full((4, 3), 0.02), torch.zeros(4, 3)).view(2, 2, 4, 4)
    for record, views, expected in (
            ({"masked": 0.5}, {"depth": depth, "poses": moving}, set()),
            ({"masked": 0.9}, {"depth": depth}, {"masked"}),
            ({}, {"depth": torch.full_like(depth, 5), "poses": moving}, {"depth"}), ({"loss": 1.0}, {}, set()),
            ({}, {"depth": depth, "poses": still}, {"pose"}), ({}, {"depth": depth, "poses": turning}, set())):
        assert train_depth.find_trouble(record, views).keys() == expected


def test_a_static_camera_is_warned_of_once(tmp_path, capsys):
    for number in range(1, 5):
        write_image(tmp_path / "video" / f"{number}.png")
    (tmp_path / "video" / "intrinsics.txt").write_text("60 60 47.5 31.5")
    options = ("--data", "frames", "--data_path", tmp_path / "video", *SMALL, "--steps", "5", "--num_workers", "0",
               "--log_dir", tmp_path, "--name", "still")
    code, output, _ = call(capsys, train_depth, *options)
    assert code == 0 and output.count("does the camera stand still?") == 1 and output.count(" to go (h:mm:ss)") == 1
    warnings = read_json(str(tmp_path / "still"), "result.json")["warnings"]
    assert len([warning for warning in warnings if "100% of the pixels" in warning]) == 1


def test_tensorboard_shows_the_log(tmp_path, capsys, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = ("--data", "frames", "--data_path", write_frames(tmp_path / "video"), *SMALL, "--steps", "2",
               "--num_workers", "0", "--log_dir", tmp_path, "--tensorboard", "--name")
    assert call(capsys, train_depth, *options, "run")[0] == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    for record in read_log(str(tmp_path / "run")):
        for key in record.keys() - {"step"}:
            shown = {event.step: event.value for event in events.Scalars(key)}
            assert shown[record["step"]] == pytest.approx(record[key])
    assert [event.step for event in events.Images("samples")] == [1, 2]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, errors = call(capsys, train_depth, *options, "other")
    assert code == 2 and "pip install tensorboard" in errors


# ------------------------------------------------------------------------------------ export

@pytest.mark.parametrize("kind, suffix, dynamic", (
    ("mono", "onnx", True), ("seg", "onnx", False), ("mono", "torch", False), ("seg", "torch", True)))
def test_exported_networks_say_the_same(capsys, tmp_path, pretrained, fine_tuned, kind, suffix, dynamic):
    """A file of onnxruntime's or torch.export's against PyTorch; dynamic ones at another batch and size as well."""
    onnxruntime = pytest.importorskip("onnxruntime") if suffix == "onnx" else None
    weights, path = fine_tuned("none") if kind == "seg" else pretrained(kind), str(tmp_path / "network.pt2")
    code, output, errors = call(capsys, evaluate, "export", "--weights", weights, "--output", path, "--format", suffix,
                                *["--dynamic"] * dynamic)
    assert code == 0 and path in output, errors
    model = evaluate.Exported(*networks.load_model(weights))
    if onnxruntime:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [port.name for port in session.get_outputs()] == ["depth" if kind == "mono" else "segmentation"]

        def program(images: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    else:
        program = torch.export.load(path).module()
    for shape in ((1, 3, 64, 96), (3, 3, 96, 128))[:1 + dynamic]:
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected, actual = model(images), program(images)
        assert expected.shape == (shape[0], 19 if kind == "seg" else 1, *shape[2:])
        assert_close(actual, expected, relative=1e-4, absolute=1e-4)


@pytest.mark.parametrize("kind, unit", (("mono", 1.0), ("stereo", 5.4), ("depth", 1.0)))
def test_monodepth2_folder_loads_back(capsys, tmp_path, pretrained, kind, unit):
    """The same depth, in metres where it was; Monodepth2's stereo unit is 5.4 m."""
    code, _, errors = call(capsys, evaluate, "export", "--weights", pretrained(kind), "--format", "monodepth2",
                           "--output", tmp_path / "folder")
    assert code == 0, errors
    assert {"encoder.pth", "depth.pth"} | ({"pose_encoder.pth", "pose.pth"} if kind == "mono" else set()) == set(
        os.listdir(tmp_path / "folder"))
    (model, options), (again, options_again) = (
        networks.load_model(path) for path in (pretrained(kind), str(tmp_path / "folder")))
    assert (options_again["height"], options_again["width"]) == (64, 96)
    assert options_again["use_stereo"] == (kind == "stereo") and bool(options_again.get("metric")) == (kind == "depth")
    assert differing(model.state_dict(), again.state_dict()) == []
    images = smooth_images(1, 64, 96)
    with torch.inference_mode():
        depth, depth_again = (evaluate.Exported(*pair)(images) for pair in ((model, options), (again, options_again)))
    assert_close(unit * depth_again, depth)
    if kind == "mono":
        poses = [networks.PoseNet(), networks.PoseNet()]
        for pose, path in zip(poses, (pretrained(kind), str(tmp_path / "folder"))):
            networks.load_weights(networks.build("unet", "resnet18", 1, (0, 1, 2, 3)), path, "depth", pose=pose)
        assert differing(poses[0].state_dict(), poses[1].state_dict()) == []


def test_what_cannot_be_exported(capsys, monkeypatch, tmp_path, pretrained, fine_tuned):
    for weights, options, words in (
            (pretrained("flow"), (), "not for flow"), (fine_tuned("none"), ("--format", "monodepth2"), "for depth"),
            (pretrained("mono"), (), "pip install onnx")):
        if "pip" in words:
            monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
        code, _, errors = call(capsys, evaluate, "export", "--weights", weights, "--output", tmp_path / "x", *options)
        assert code == 2 and words in errors and len(errors.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------ learned intrinsics

def render_room(K: torch.Tensor, pose: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Image (3, height, width) of a textured room's walls; pose (4, 4) maps room points to camera points."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    rays = pose[:3, :3].T @ torch.linalg.inv(K) @ torch.stack([x, y, torch.ones_like(x)]).view(3, -1)
    eye = -pose[:3, :3].T @ pose[:3, 3:]
    wall = ((torch.tensor([[2.0], [1.2], [4.0]]) * rays.sign() - eye) / rays).amin(0)
    generator = torch.Generator().manual_seed(0)
    waves, phases = torch.randn(3, 12, 3, generator=generator), 6.3 * torch.rand(3, 12, 1, generator=generator)
    return (0.5 + 0.12 * (1.2 * waves @ (eye + wall * rays) + phases).sin().sum(1)).view(3, height, width).clamp(0, 1)


def test_a_turning_camera_shows_its_focal_length():
    """Depth, poses and intrinsics from rendered views alone: of two cameras, the guess for one is 30 % too short, for
    the other 30 % too long; both see crops, the second mirror images.
    """
    height, width, views = 40, 56, 6
    K, starts = torch.tensor([[40.0, 0, 29.5], [0, 40, 18.5], [0, 0, 1]]), torch.eye(3).repeat(2, 1, 1)
    starts[:, :2, 2] = torch.tensor([(width - 1) / 2, (height - 1) / 2])
    starts[:, 0, 0] = starts[:, 1, 1] = 40 * torch.tensor([0.7, 1.3])
    generator = torch.Generator().manual_seed(1)
    samples = []
    for flip in (False, True):
        axisangle, translation = (s * torch.randn(views, 3, generator=generator) for s in (0.1, 0.25))
        frames = torch.stack([render_room(K, T, height, width) for T in losses.pose_to_matrix(axisangle, translation)])
        sample = {"frames": frames, "K": starts[int(flip)].clone()}
        samples.append(datasets.crop_and_flip(sample, (36, 52), np.random.default_rng(seed_that_flips(flip))))
    frames, given = (torch.stack([sample[key] for sample in samples]) for key in ("frames", "K"))
    mirrored = torch.tensor([sample["mirrored"] for sample in samples])
    assert mirrored.tolist() == [False, True]

    intrinsics = networks.Intrinsics(starts, starts, (height, width))
    inverse = torch.nn.Parameter(torch.full((2, 1, 9, 13), -2.0))
    pose = torch.nn.Parameter(1e-3 * torch.randn(views - 1, 2, 2, 3, generator=generator))
    optimizer = torch.optim.Adam([{"params": [inverse], "lr": 0.05}, {"params": [pose], "lr": 0.01},
                                  {"params": intrinsics.parameters(), "lr": 0.02}])
    pyramid = losses.image_pyramid(frames[:, 0], 1)
    for _ in range(300):
        learned, unit = intrinsics(given, torch.arange(2), mirrored)
        terms, _ = losses.depth_loss([losses.upsample(inverse, (36, 52)).sigmoid()], pyramid,
                                     list(frames[:, 1:].unbind(1)), learned,
                                     [losses.pose_to_matrix(*(unit * part for part in parts)) for parts in pose],
                                     automask=False, minimum=False, ssim=False)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    for guess in intrinsics.cameras():
        assert_close(guess[:2], K[:2], relative=0.06, absolute=1.5)


@pytest.mark.parametrize("seed", range(4))
def test_learned_intrinsics_follow_crops_and_mirror_images(seed):
    """Correcting the whole image's K and then cropping is the same as correcting what the data set's K became."""
    given, start, size = camera(70, 40, 60).repeat(2, 1, 1), camera(50, 36, 64).repeat(2, 1, 1), (40, 60)
    intrinsics = networks.Intrinsics(given, start, size)
    for parameter in intrinsics.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    learned = intrinsics.cameras().detach()
    assert not torch.equal(learned[0], learned[1]) and torch.equal(learned[:, 2], start[:, 2])
    first, second = (datasets.crop_and_flip({"frames": torch.zeros(1, 3, *size), "K": K.clone()}, (32, 48),
                                            np.random.default_rng(seed)) for K in (given[1], learned[1]))
    K, unit = intrinsics(first["K"][None], torch.tensor([1]), torch.tensor([first["mirrored"]]))
    assert_close(K[0], second["K"], absolute=1e-4)
    assert_close((K[0, 0, 0] * K[0, 1, 1]).sqrt() * unit[0, 0], (start[1, 0, 0] * start[1, 1, 1]).sqrt())  # in pixels


@pytest.mark.parametrize("extreme", (-100.0, 100.0))
def test_learned_intrinsics_are_bounded(extreme):
    intrinsics = networks.Intrinsics(camera(50, 40, 60), camera(50, 40, 60), (40, 60))
    for parameter in intrinsics.parameters():
        torch.nn.init.constant_(parameter, extreme)
    change = (intrinsics.cameras() - intrinsics.start)[0].detach()
    assert_close(change[:2, 2].abs(), torch.tensor([15.0, 10]))
    assert 1 / 3.2 < intrinsics.cameras()[0, 0, 0] / 50 < 3.2 and intrinsics.cameras()[0, 1, 1] > 0


def test_learning_intrinsics_of_two_folders(tmp_path, capsys, monkeypatch):
    """Each folder's camera from --fov; a run stopped after two steps ends with the same bits as one that was not."""
    for name in ("one", "two"):
        write_frames(tmp_path / "videos" / name, range(1, 5), intrinsics=None)
    options = ("--data", "frames", "--data_path", tmp_path / "videos", "--intrinsics", "learned", "--fov", "90", *SMALL,
               "--steps", "4", "--num_workers", "0", "--learning_rate", "1e-3", "--log_dir", tmp_path)
    code, output, errors = call(capsys, train_depth, *options, "--name", "through")
    assert code == 0, errors
    cameras = read_json(str(tmp_path / "through"), "result.json")["cameras"]
    assert [os.path.basename(folder) for folder in cameras] == ["one", "two"]
    for folder, K in cameras.items():
        assert f"{folder}: fx {K['native']['fx']:.1f}" in output and K["native"]["width"] == 96
        assert 0 < abs(K["native"]["fx"] - 48) < 20 and all(
            K["native"][key] == pytest.approx(value, abs=1e-3) for key, value in K["training"].items())
    for record in read_log(str(tmp_path / "through")):
        assert {"fx", "fy", "cx", "cy"} <= record.keys()

    def log_and_stop(run, record, log=utils.Run.log):
        log(run, record)
        run.signalled = record["step"] == 2
    monkeypatch.setattr(utils.Run, "log", log_and_stop)
    assert call(capsys, train_depth, *options, "--name", "stopped")[0] == utils.STOPPED
    monkeypatch.undo()
    code, output, errors = call(capsys, train_depth, *options, "--name", "stopped")
    assert code == 0 and "continues at step 3" in output, errors
    through, stopped = (read_weights(str(tmp_path / name)) for name in ("through", "stopped"))
    assert differing(through, stopped) == [] and "intrinsics.focal" in through


def test_learned_intrinsics_start_from_what_is_known(tmp_path):
    """intrinsics.txt, or --fov where that is given as well; the same from a packed copy."""
    root = write_frames(tmp_path / "one")  # images of 96x64 pixels, a focal length of 60
    clips = datasets.Frames(root, ["0", "1"], height=64, width=64)
    for dataset in (clips, datasets.packed(clips, str(tmp_path / "cache"))):
        for fov, focal in ((None, 60), (90, 48)):
            folders, shapes, given, start = datasets.find_cameras(dataset, fov)
            assert folders == [root] and shapes == [(64, 96)] and dataset[2]["camera"] == 0
            assert given[0, 0, 0] == pytest.approx(40) and given[0, 1, 1] == pytest.approx(60)
            assert start[0, 0, 0] == pytest.approx(focal * 64 / 96) and start[0, 1, 1] == pytest.approx(focal)
    with pytest.raises(utils.InputError, match="--intrinsics learned"):
        dataset.files = None  # as of what `datasets.py pack` wrote
        datasets.find_cameras(dataset, None)


# ------------------------------------------------------------------------------------ errors as users meet them

def assert_one_line(code: int, errors: str, words: tuple[str, ...]) -> None:
    """Exit code 2 and one line on standard error; a progress bar may have been there before, on lines of its own."""
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.strip()]
    lines = [line for line in lines if not ("it/s]" in line or "s/it]" in line) or "error" in line]
    assert code == 2, errors
    assert len(lines) == 1 and lines[0].startswith("error: "), errors
    for word in words:
        assert word in lines[0]


def tiny_run(folder, *options) -> list[str]:
    """One step on two frames, in this process."""
    return [
        "--height",
        "64",
        "--width",
        "64",
        "--batch_size",
        "1",
        "--steps",
        "1",
        "--num_workers",
        "0",
        "--log_dir",
        f"{folder}/runs",
        *options,
    ]


def frames_run(folder, *options) -> list[str]:
    return tiny_run(folder, "--data", "frames", "--data_path", f"{folder}/video", "--task", "reconstruction", *options)


def semantics_run(folder, *options) -> list[str]:
    return tiny_run(folder, "--data", "kitti", "--data_path", write_semantics(f"{folder}/kitti"), *options)


def truncate(path: str, share: float) -> str:
    with open(path, "r+b") as file:
        file.truncate(int(share * os.path.getsize(path)))
    return path


def save_checkpoint(folder, content: object) -> str:
    torch.save(content, f"{folder}/checkpoint.pt")
    return f"{folder}/checkpoint.pt"


def depth_checkpoint(encoder: str = "resnet18") -> dict:
    """What train_depth.py would save, untrained."""
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
    return {"options": options, **networks.state(networks.build("unet", encoder, 1, (0, 1, 2, 3)))}


class Bomb:
    """Pickles to a call that would make a file when read without care."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


# Each case prepares what is wrong below a folder, and returns the script, its options and words of the line.

def missing_root(folder):
    return (
        train_depth,
        tiny_run(folder, "--data", "kitti", "--data_path", f"{folder}/nowhere"),
        [f"{folder}/nowhere", "--data_path"],
    )


def missing_labelled_root(folder):
    return (
        train_seg,
        tiny_run(folder, "--data", "camvid", "--data_path", f"{folder}/nowhere"),
        [f"{folder}/nowhere", "--data_path"],
    )


def file_as_root(folder):
    path = write_image(folder / "picture.png")
    return train_depth, tiny_run(folder, "--data", "kitti", "--data_path", path), [path]


def unknown_dataset(folder):
    return train_depth, tiny_run(folder, "--data", "mars"), ["--data mars", "kitti"]


def unknown_labelled_dataset(folder):
    return train_seg, tiny_run(folder, "--data", "frames"), ["--data frames", "kitti"]


def empty_clip_folder(folder):
    os.makedirs(folder / "empty")
    return train_depth, tiny_run(folder, "--data", "kitti", "--data_path", f"{folder}/empty"), [f"{folder}/empty"]


def empty_frames_folder(folder):
    os.makedirs(folder / "empty")
    return train_depth, tiny_run(folder, "--data", "frames", "--data_path", f"{folder}/empty"), [f"{folder}/empty"]


def empty_labelled_folder(folder):
    os.makedirs(folder / "empty")
    return train_seg, tiny_run(folder, "--data", "kitti", "--data_path", f"{folder}/empty"), [f"{folder}/empty"]


def video_file(folder):
    write_image(folder / "street.png")
    os.rename(folder / "street.png", folder / "street.mp4")
    return (
        train_depth,
        tiny_run(folder, "--data", "frames", "--data_path", f"{folder}/street.mp4"),
        ["street.mp4", "ffmpeg"],
    )


def truncated_jpeg(folder):
    path = truncate(os.path.join(write_frames(folder / "video", [1]), "frame1.jpg"), 0.6)
    return train_depth, frames_run(folder), [path]


def truncated_png(folder):
    path = truncate(os.path.join(write_frames(folder / "video", [1], "png"), "frame1.png"), 0.6)
    return train_depth, frames_run(folder), [path]


def empty_image(folder):
    path = truncate(os.path.join(write_frames(folder / "video", [1], "png"), "frame1.png"), 0)
    return train_depth, frames_run(folder), [path]


def text_as_image(folder):
    write_frames(folder / "video", [1], "png")
    (folder / "video" / "frame1.png").write_text("no picture at all")
    return train_depth, frames_run(folder), [f"{folder}/video/frame1.png"]


def truncated_label(folder):
    options = semantics_run(folder)
    paths = [truncate(f"{folder}/kitti/training/semantic/{index:06d}_10.png", 0.6) for index in range(4)]
    return train_seg, options, [os.path.dirname(paths[0])]


def missing_label(folder):
    options = semantics_run(folder)
    shutil.rmtree(folder / "kitti" / "training" / "semantic")
    return train_seg, options, [f"{folder}/kitti/training/semantic"]


def unknown_label_id(folder):
    write_semantics(folder / "kitti", ids=(7, 26, 77))
    return (
        train_seg,
        tiny_run(folder, "--data", "kitti", "--data_path", f"{folder}/kitti"),
        [f"{folder}/kitti/training/semantic", "77"],
    )


def size_no_multiple_of_32(folder):
    return train_depth, tiny_run(folder, "--height", "100"), ["--height 100", "32"]


def size_too_small(folder):
    """At 32 pixels the deepest feature is one pixel high, which reflection padding cannot pad."""
    write_frames(folder / "video", [1])
    return train_depth, frames_run(folder, "--height", "32"), ["--height 32"]


def size_no_multiple_of_the_patch(folder):
    options = ["--arch", "dpt", "--encoder", "vit_s14", "--width", "70"]
    return train_seg, semantics_run(folder, *options), ["--height 64", "multiple of 14", "70"]


def unet_of_a_vit(folder):
    return train_seg, semantics_run(folder, "--encoder", "vit_s16"), ["--arch unet", "ResNet", "--encoder vit_s16"]


def dpt_of_a_resnet(folder):
    return train_seg, semantics_run(folder, "--arch", "dpt"), ["--arch dpt", "ViT", "--encoder resnet18"]


def imagenet_for_a_small_vit(folder):
    options = ["--arch", "linear", "--encoder", "vit_s16", "--init", "imagenet"]
    return train_seg, semantics_run(folder, *options), ["ImageNet weights of vit_s16"]


def vit_of_another_size(folder):
    path = save_checkpoint(folder, torchvision.models.VisionTransformer(64, 16, 2, 3, 192, 768).state_dict())
    options = ["--arch", "linear", "--encoder", "vit_s16", "--init", path]
    return train_seg, semantics_run(folder, *options), [path, "encoder.class_token", "(1, 1, 384) here"]


def damaged_layer_scale(folder):
    path = save_checkpoint(folder, {"blocks.0.ls1.gamma": torch.ones(384), "norm.weight": torch.ones(384)})
    return train_seg, semantics_run(folder, "--init", path), [path, "DINOv2 ViT", "not whole"]


def checkpoint_with_more_than_tensors(folder):
    path = save_checkpoint(folder, {"state_dict": {}, "metric": np.float64(3)})
    return train_seg, semantics_run(folder, "--init", path), [path, "it holds numpy"]


def deeplab_of_one_image(folder):
    return train_seg, semantics_run(folder, "--arch", "deeplabv3"), ["--batch_size 1", "DeepLabV3"]


def flow_by_deeplab(folder):
    return train_depth, tiny_run(folder, "--task", "flow", "--arch", "deeplabv3"), ["--task flow", "--arch deeplabv3"]


def two_ways_of_freezing(folder):
    options = ["--freeze_encoder", "--freeze_batch_norm_only"]
    return train_seg, semantics_run(folder, *options), options


def encoder_without_learning_rate(folder):
    return train_seg, semantics_run(folder, "--encoder_learning_rate_factor", "0"), ["--encoder_learning_rate_factor"]


def train_size_too_large(folder):
    return train_seg, semantics_run(folder, "--train_size", "16"), ["--train_size 16"]


def negative_train_size(folder):
    """Not "all but the last one", which a slice would make of it."""
    return train_seg, semantics_run(folder, "--train_size", "-1"), ["--train_size -1"]


def noise_to_check(folder):
    return datasets, ["check", "--data", "random"], ["--data random"]


def noise_to_pack(folder):
    return datasets, ["pack", "--data", "random", "--output", folder / "cache"], ["--data random"]


def moving_noise(folder):
    return train_depth, tiny_run(folder, "--data", "random", "--min_motion", "2"), ["--min_motion", "--data random"]


def camera_of_noise(folder):
    return train_depth, tiny_run(folder, "--data", "random", "--intrinsics", "learned"), ["--data random has no camera"]


def batch_larger_than_data(folder):
    return train_seg, semantics_run(folder, "--batch_size", "8"), ["--batch_size 8"]


def batch_larger_than_clips(folder):
    write_frames(folder / "video", [1, 2])
    return train_depth, frames_run(folder, "--batch_size", "8"), ["--batch_size 8"]


def crop_larger_than_image(folder):
    write_frames(folder / "video", [1, 2])
    return train_depth, frames_run(folder, "--crop", "128", "128"), ["--crop 128 128"]


def other_encoder(folder):
    path = save_checkpoint(folder, depth_checkpoint("resnet50"))
    return train_seg, semantics_run(folder, "--init", path), [path, "encoder"]


def partial_checkpoint(folder):
    content = depth_checkpoint()
    del content["encoder"]["encoder.layer3.0.conv1.weight"]
    path = save_checkpoint(folder, content)
    return train_seg, semantics_run(folder, "--init", path), [path, "encoder.layer3.0.conv1.weight", "119/120"]


def checkpoint_without_decoder(folder):
    content = depth_checkpoint()
    del content["decoder"]
    path = save_checkpoint(folder, content)
    return train_seg, semantics_run(folder, "--init", path), [path, "--init_parts encoder"]


def flow_decoder(folder):
    model = networks.build("flow", "resnet18", 2, (0, 1, 2, 3))
    path = save_checkpoint(folder, {"options": {"task": "flow"}, **networks.state(model)})
    return train_seg, semantics_run(folder, "--init", path), [path, "--init_parts encoder"]


def checkpoint_with_nan(folder):
    content = depth_checkpoint()
    content["encoder"]["encoder.conv1.weight"][0] = torch.nan
    path = save_checkpoint(folder, content)
    return train_seg, semantics_run(folder, "--init", path), [path, "encoder.conv1.weight"]


def unknown_checkpoint(folder):
    path = save_checkpoint(folder, {"something": torch.zeros(3)})
    return train_seg, semantics_run(folder, "--init", path), [path, "something"]


def missing_checkpoint(folder):
    return train_seg, semantics_run(folder, "--init", f"{folder}/nowhere.pt"), [f"{folder}/nowhere.pt"]


def pickle_bomb(folder):
    path = save_checkpoint(folder, {"encoder": Bomb(f"{folder}/executed"), "options": {}})
    return train_seg, semantics_run(folder, "--init", path), [path]


def text_as_checkpoint(folder):
    (folder / "weights.pth").write_text("<html>404 not found</html>")
    return train_seg, semantics_run(folder, "--init", f"{folder}/weights.pth"), [f"{folder}/weights.pth"]


def truncated_checkpoint(folder):
    path = truncate(save_checkpoint(folder, depth_checkpoint()), 0.5)
    return train_seg, semantics_run(folder, "--init", path), [path]


def name_with_a_slash(folder):
    write_frames(folder / "video", [1])
    return train_depth, frames_run(folder, "--name", "../elsewhere"), ["--name", "../elsewhere"]


def resume_from_nothing(folder):
    write_frames(folder / "video", [1])
    return train_depth, frames_run(folder, "--name", "fresh", "--resume"), ["--resume", "fresh"]


def damaged_run(folder):
    write_frames(folder / "video", [1])
    os.makedirs(folder / "runs" / "broken")
    (folder / "runs" / "broken" / "last.pt").write_text("half a checkpoint")
    return train_depth, frames_run(folder, "--name", "broken"), [f"{folder}/runs/broken/last.pt"]


def normalised_intrinsics(folder):
    write_frames(folder / "video", [1], intrinsics="0.58 1.92 0.5 0.5")
    return train_depth, frames_run(folder), [f"{folder}/video/intrinsics.txt", "pixels"]


def too_few_intrinsics(folder):
    write_frames(folder / "video", [1], intrinsics="700 320 96")
    return train_depth, frames_run(folder), [f"{folder}/video/intrinsics.txt"]


def words_as_intrinsics(folder):
    write_frames(folder / "video", [1], intrinsics="fx: 700")
    return train_depth, frames_run(folder), [f"{folder}/video/intrinsics.txt"]


def no_intrinsics(folder):
    write_frames(folder / "video", [1], intrinsics=None)  # the task comes last, and depth needs K
    return train_depth, frames_run(folder, "--task", "depth", "--frame_ids", "0", "1"), [f"{folder}/video", "--fov"]


def stereo_of_own_frames(folder):
    write_frames(folder / "video", [1, 2])
    return (
        train_depth,
        tiny_run(folder, "--data", "frames", "--data_path", f"{folder}/video", "--supervision", "stereo"),
        ["stereo"],
    )


def unknown_device(folder):
    return train_depth, frames_run(folder, "--device", "abacus"), ["--device abacus"]


def no_usable_clip(folder):
    write_frames(folder / "video", [1])
    return (
        train_depth,
        tiny_run(folder, "--data", "frames", "--data_path", f"{folder}/video"),
        [f"{folder}/video", "1 without"],
    )


def depth_network_as_segmenter(folder):
    return evaluate, ["seg", "--weights", save_checkpoint(folder, depth_checkpoint())], [f"{folder}/checkpoint.pt"]


def prediction_of_a_truncated_image(folder):
    path = truncate(write_image(folder / "street.jpg"), 0.6)
    return (
        evaluate,
        ["predict", path, "--weights", save_checkpoint(folder, depth_checkpoint()), "--output", f"{folder}/out"],
        [path],
    )


def tables_of_nothing(folder):
    return evaluate, ["tables", "--log_dir", f"{folder}/nowhere"], [f"{folder}/nowhere"]


ERRORS = (
    missing_root,
    missing_labelled_root,
    file_as_root,
    unknown_dataset,
    unknown_labelled_dataset,
    empty_clip_folder,
    empty_frames_folder,
    empty_labelled_folder,
    video_file,
    truncated_jpeg,
    truncated_png,
    empty_image,
    text_as_image,
    truncated_label,
    missing_label,
    unknown_label_id,
    size_no_multiple_of_32,
    size_too_small,
    size_no_multiple_of_the_patch,
    unet_of_a_vit,
    dpt_of_a_resnet,
    imagenet_for_a_small_vit,
    vit_of_another_size,
    damaged_layer_scale,
    checkpoint_with_more_than_tensors,
    deeplab_of_one_image,
    flow_by_deeplab,
    two_ways_of_freezing,
    encoder_without_learning_rate,
    noise_to_check,
    noise_to_pack,
    moving_noise,
    camera_of_noise,
    train_size_too_large,
    negative_train_size,
    batch_larger_than_data,
    batch_larger_than_clips,
    crop_larger_than_image,
    other_encoder,
    partial_checkpoint,
    checkpoint_without_decoder,
    flow_decoder,
    checkpoint_with_nan,
    unknown_checkpoint,
    missing_checkpoint,
    pickle_bomb,
    text_as_checkpoint,
    truncated_checkpoint,
    name_with_a_slash,
    resume_from_nothing,
    damaged_run,
    normalised_intrinsics,
    too_few_intrinsics,
    words_as_intrinsics,
    no_intrinsics,
    stereo_of_own_frames,
    unknown_device,
    no_usable_clip,
    depth_network_as_segmenter,
    prediction_of_a_truncated_image,
    tables_of_nothing,
)


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.__name__)
def test_errors_are_one_line(tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)  # defaults such as data/ and runs/ lie below the current folder
    script, options, words = case(tmp_path)
    code, _, errors = call(capsys, script, *options)
    assert_one_line(code, errors, words)
    assert not os.path.exists(tmp_path / "executed")  # by the pickle


def test_resuming_with_other_options_is_refused(tmp_path, capsys):
    write_frames(tmp_path / "video", [1])
    options = frames_run(tmp_path, "--name", "run")
    assert call(capsys, train_depth, *options)[0] == 0
    code, _, errors = call(capsys, train_depth, *options, "--learning_rate", "3e-4", "--num_workers", "1")
    assert_one_line(code, errors, ("--learning_rate 0.0001 there, 0.0003 now", f"{tmp_path}/runs/run"))
    assert "num_workers" not in errors


def test_errors_in_a_process_of_their_own(tmp_path, world):
    """The same from the shell: an image that a loader process cannot read, and ImageNet weights without a network."""
    root = shutil.copytree(world, tmp_path / "world")
    for path in glob.glob(f"{root}/2011_*/*/image_02/data/*"):
        truncate(path, 0.6)
    options = [
        "--data",
        "synthetic",
        "--data_path",
        str(root),
        *SMALL,
        "--steps",
        "1",
        "--log_dir",
        str(tmp_path / "runs"),
    ]
    done = run_script("train_depth.py", *options, "--num_workers", "2", expect=2)
    assert_one_line(2, done.stderr, (f"{root}/2011_", "image_02/data"))

    closed = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    done = run_script(
        "train_seg.py", *options, "--init", "imagenet", expect=2, TORCH_HOME=str(tmp_path / "torch"), **closed
    )
    assert_one_line(2, done.stderr, (f"{tmp_path}/torch/hub/checkpoints/resnet18-", ".pth", "--init none"))
    assert not os.path.exists(tmp_path / "runs" / "seg_synthetic_resnet18_imagenet_all_nall_split0_seed0" / "model.pt")


# ------------------------------------------------------------------------------------ bad samples, crops and jitter

def test_bad_samples_stop_or_are_replaced(tmp_path, capsys, monkeypatch):
    """Skipping depends on seed and position alone: not on the loader processes, nor on an interruption."""
    write_frames(tmp_path / "video", range(1, 9))
    broken = [truncate(f"{tmp_path}/video/frame{number}.jpg", 0.6) for number in (1, 3, 6)]

    def run(name: str, *options: str) -> tuple[int, str, str]:
        return call(capsys, train_depth, *frames_run(tmp_path, "--steps", "4", "--batch_size", "2", "--name", name,
                                                     "--on_bad_sample", "skip", *options))
    code, _, errors = run("stop", "--on_bad_sample", "stop")
    assert_one_line(code, errors, (broken[0],))

    assert run("skip")[0] == 0
    skipped = read_json(tmp_path, "runs", "skip", "result.json")["skipped"]
    assert skipped["samples"] >= 3 and len(skipped["problems"]) == 3
    assert all(path in problem for path, problem in zip(broken, skipped["problems"]))
    weights = read_weights(f"{tmp_path}/runs/skip")

    assert run("workers", "--num_workers", "2")[0] == 0
    with monkeypatch.context() as patch:
        log = utils.Run.log

        def log_and_stop(self, record):
            self.signalled |= record["step"] == 2 and "loss" in record
            log(self, record)
        patch.setattr(utils.Run, "log", log_and_stop)
        assert run("resumed", "--log_every", "1")[0] == utils.STOPPED
    assert run("resumed", "--log_every", "1")[0] == 0
    for name in ("workers", "resumed"):
        assert differing(weights, read_weights(f"{tmp_path}/runs/{name}")) == []
        assert read_json(tmp_path, "runs", name, "result.json")["skipped"] == skipped

    for number in range(1, 9):
        truncate(f"{tmp_path}/video/frame{number}.jpg", 0.5)
    code, _, errors = run("nothing")
    assert_one_line(code, errors, ("video/frame", "in a row", "--on_bad_sample"))


def test_fine_tuning_on_crops_with_jitter(tmp_path, capsys):
    """Trained on crops, evaluated through windows of their size; evaluate.py does the same by itself."""
    root = write_cityscapes(tmp_path / "data", height=96, width=192)
    options = ["--data", "cityscapes", "--data_path", root, "--height", "96", "--width", "192", "--crop", "64", "96",
               "--jitter", "0.5", "--eval_mode", "slide", "--batch_size", "2", "--steps", "2", "--num_workers", "0",
               "--log_dir", f"{tmp_path}/runs"]
    shapes = []
    build = networks.build

    def spy(*arguments, **more):
        model = build(*arguments, **more)
        model.encoder.register_forward_pre_hook(
            lambda module, inputs: shapes.append((module.training, *inputs[0].shape[2:])))
        return model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "build", spy)
        code, _, errors = call(capsys, train_seg, *options, "--name", "crops")
    assert code == 0, errors
    assert set(shapes) == {(True, 64, 96), (False, 64, 96)}
    result = read_json(tmp_path, "runs", "crops", "result.json")
    command = ["seg", "--weights", f"{tmp_path}/runs/crops", "--data_path", root, "--output", f"{tmp_path}/out"]
    assert call(capsys, evaluate, *command)[0] == 0
    assert read_json(tmp_path, "out", "segmentation.json")["cross_entropy"] == pytest.approx(result["cross_entropy"])
    assert call(capsys, evaluate, *command, "--eval_mode", "whole", "--flip")[0] == 0
    assert read_json(tmp_path, "out", "segmentation.json")["cross_entropy"] != pytest.approx(result["cross_entropy"])
    code, _, errors = call(capsys, train_seg, *options, "--crop", "128", "96")
    assert_one_line(code, errors, ("--crop 128 96", "96 x 192"))


# ------------------------------------------------------------------------------------ datasets.py check

def test_check_lists_what_is_there_and_what_is_broken(tmp_path, capsys):
    root, sheet = write_cityscapes(tmp_path / "data"), tmp_path / "sheet.png"
    options = ["check", "--data", "cityscapes", "--data_path", root, "--num_workers", "0", "--output", str(sheet)]
    code, out, _ = call(capsys, datasets, *options, "--labels")
    assert code == 0 and "train: 4 samples" in out and "val: 2 samples" in out and "128x64 (4)" in out
    raw = np.stack([np.array(Image.open(path)) for path in glob.glob(f"{root}/gtFine/train/*/*")])
    assert f"car {(raw == 26).mean():.2%} of the pixels, in 4 images" in " ".join(out.split())
    assert Image.open(sheet).width > 640
    code, out, _ = call(capsys, datasets, *options, "--frame_ids", "0", "--depth")
    assert code == 0 and "fx 200.0 fy 210.0 cx 63.0 cy 33.0 (4)" in out and "median 4.00 m" in out
    code, out, _ = call(capsys, datasets, *options)
    assert code == 0 and "left out: 4 without all their source frames" in out and "near-static: 0.0%" in out

    broken = [truncate(path, 0.6) for path in sorted(glob.glob(f"{root}/leftImg8bit/train/*/*"))[:2]]
    broken.append(sorted(glob.glob(f"{root}/gtFine/train/*/*"))[3])
    write_png(broken[-1], np.full((64, 128), 99, np.uint8))
    code, out, errors = call(capsys, datasets, *options, "--labels")
    assert code == 2 and len(errors.splitlines()) == 3 and all(path in errors for path in broken)


# ------------------------------------------------------------------------------------ the synthetic world

def street_views(seed: int) -> tuple[datasets.StreetWorld, np.ndarray, dict]:
    """A street, its K, and two frames and the right camera of the first: (pose, time, what was rendered) by name."""
    street, K, right = datasets.StreetWorld(seed), datasets.camera_matrix(64, 208), np.eye(4)
    right[0, 3] = datasets.BASELINE
    cameras = {"now": (street.pose(5), 5), "next": (street.pose(6), 6), "right": (street.pose(5) @ right, 5)}
    views = {name: (pose, time, street.render(pose, time, K, 64, 208)) for name, (pose, time) in cameras.items()}
    return street, K, views


def street_flow(street, view, pose, time, other_pose, other_time, K) -> np.ndarray:
    """Displacement (H, W, 2) in pixels of every pixel of a rendered view towards another pose and time."""
    v, u = np.indices(view["depth"].shape)
    rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones(u.shape)], -1) @ pose[:3, :3].T
    sky, things = np.isinf(view["depth"])[..., None], view["solid"] >= 0
    points = rays * np.where(sky, 1, view["depth"][..., None]) + pose[:3, 3]
    anchor = street.anchor[view["solid"][things]]
    (rotations, origins), (new_rotations, new_origins) = street.frames(time), street.frames(other_time)
    motion = new_rotations @ rotations.transpose(0, 2, 1)
    points[things] = np.einsum("nij,nj->ni", motion[anchor], points[things] - origins[anchor]) + new_origins[anchor]
    seen = np.where(sky, rays, points - other_pose[:3, 3]) @ other_pose[:3, :3]  # the sky is infinitely far
    pixel = seen[..., :2] / seen[..., 2:] * [K[0, 0], K[1, 1]] + K[:2, 2]
    return (pixel - np.stack([u, v], -1)).astype(np.float32)


@pytest.mark.parametrize("other", ("next", "right"))
@pytest.mark.parametrize("seed", (0, 3))
def test_the_synthetic_world_is_photometrically_consistent(seed, other):
    """Exact depth and pose explain the other view where the scene stands still; exact flow explains moving cars too."""
    street, K, views = street_views(seed)
    (pose, time, view), (other_pose, other_time, other_view) = views["now"], views[other]
    image, source = (torch.from_numpy(v["image"]).permute(2, 0, 1)[None] / 255 for v in (view, other_view))
    depth = torch.from_numpy(np.where(np.isinf(view["depth"]), 1e6, view["depth"]))[None, None].float()
    T = torch.from_numpy(np.linalg.inv(other_pose) @ pose)[None].float()
    warped, valid = losses.synthesize(source, depth, torch.from_numpy(K)[None].float(), T)

    flow = street_flow(street, view, pose, time, other_pose, other_time, K)
    pixels = torch.from_numpy(flow + np.stack(np.meshgrid(np.arange(208), np.arange(64)), -1))[None].float()
    by_flow, inside = losses.sample(source, pixels)
    speeds = np.array(street.anchors)[street.anchor, 2]
    moving = torch.from_numpy((view["solid"] >= 0) & (speeds[view["solid"]] != 0))
    unmoved = (source - image).abs().mean(1)[0]
    for prediction, chosen in ((warped, valid[0, 0] & ~moving), (by_flow, inside[0, 0])):
        error = (prediction - image).abs().mean(1)[0]
        assert error[chosen].median() < 0.02
        assert error[chosen].mean() < 0.5 * unmoved[chosen].mean()
    if other == "next":  # a static world would not explain the cars
        assert moving.any() and (by_flow - image).abs().mean(1)[0][moving & inside[0, 0]].median() < 0.03


def test_the_synthetic_world_on_disk(world, tmp_path):
    """LiDAR read through KITTI's code is the exact depth, K the renderer's, labels the classes, bytes repeatable."""
    clips = datasets.KittiRaw(world, ["0", "s"], cameras="l", with_depth=True, height=64, width=128)
    assert len(clips) == 12 and not clips.dropped
    sample, K = clips[1], datasets.camera_matrix(64, 128)
    assert_close(sample["K"], torch.from_numpy(K).float(), 1e-4)
    assert sample["stereo_T"][0, 3] == pytest.approx(-datasets.BASELINE, rel=1e-4)
    street = datasets.StreetWorld(0)
    exact = street.render(street.pose(1), 1, K, 64, 128)["depth"]
    measured = sample["depth"][0].numpy()
    assert (measured > 0).mean() > 0.1
    np.testing.assert_allclose(measured[measured > 0], exact[measured > 0], rtol=1e-4)

    found = [np.unique(datasets.read_ids(path)) for path in glob.glob(os.path.join(world, "training", "semantic", "*"))]
    ids = {7, 8, 11, 17, 21, 22, 23, 26}
    assert len(found) == 12 and all(set(f) <= ids for f in found) and set(np.concatenate(found)) == ids

    again = str(tmp_path / "again")
    datasets.render_synthetic(again, drives=2, frames=2, labelled=12, height=64, width=128, seed=0, workers=2)
    for name in ("training/semantic/000011_10.png", "training/image_2/000003_10.png",
                 "2011_09_26/2011_09_26_drive_9002_sync/image_03/data/0000000001.png"):
        with open(os.path.join(world, name), "rb") as one, open(os.path.join(again, name), "rb") as other:
            assert one.read() == other.read(), name
    with pytest.raises(utils.InputError, match="exists"):
        datasets.render_synthetic(again)


def test_near_static_targets_are_left_out(tmp_path):
    """Frames 2 and 3 show the same picture, so nothing moves between them."""
    for number, seed in enumerate((1, 2, 2, 3), start=1):
        picture = (smooth_images(1, 64, 96, seed)[0].permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    (tmp_path / "intrinsics.txt").write_text("60 60 47.5 31.5")
    clips = datasets.Frames(str(tmp_path), ["0", "-1"], min_motion=2, height=64, width=96)
    assert [os.path.basename(s["images"][0]) for s in clips.samples] == ["2.png", "4.png"]
    assert "1 near-static" in clips.dropped
