"""Tests: agreement with Monodepth2, geometry and metrics by construction, every script tiny, errors as users meet them.

    python -m pytest                         # everything, a few minutes on one core, no network
    python -m pytest -k golden               # numbers of Monodepth2, from ../shared/golden or $GOLDEN_DIR

Tests on real images read ../shared/data or $DEPTH2SEG_DATA. Where a folder is absent, its tests are skipped and say so.
"""

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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


# ---------------------------------------------------------------------------------------------- helpers

def golden_files(pattern: str) -> list:
    """Parameters for every golden file (or folder) of a kind, whatever its seed; one skipped parameter where there is none."""
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
    """L2 distance relative to the expected norm: what gradients are compared by, as single pixels may take a subgradient."""
    return float((actual - expected).norm() / expected.norm())


def without_outliers(actual: torch.Tensor, expected: torch.Tensor, share: float = 2e-3) -> tuple[torch.Tensor, torch.Tensor]:
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


# ---------------------------------------------------------------------------------------------- golden: geometry

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
    """Where pixels land, how deep, and the colour there; with `_behind` a quarter of the points lie behind the camera."""
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
        assert abs(float(error.mean() / golden["ssim" + suffix].mean()) - 1) < 2e-5
    assert_close(losses.photometric_error(golden["ssim_x"], golden["ssim_y"]), golden["photometric"], absolute=5e-5)
    assert_close(losses.disparity_smoothness(golden["smooth_disp"], golden["smooth_image"]), golden["smooth_loss"])
    assert_close(losses.smoothness(golden["smooth_disp"], golden["smooth_image"]), golden["smooth_loss_raw"])


# ---------------------------------------------------------------------------------------------- golden: depth loss

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
        poses.append(losses.pose_to_matrix(leaves[f"axisangle_{view}"][:, 0], leaves[f"translation_{view}"][:, 0], invert=view == "-1"))
    pyramid = [inputs[f"color_0_{s}"].float() / 255 for s in range(4)]
    sources = [inputs[f"color_{view}_0"].float() / 255 for view in views]
    disparities = [leaves[f"disp_{s}"] for s in range(4)]

    def loss(disparities, pyramid=pyramid):
        return losses.depth_loss(disparities, pyramid, sources, inputs["K_0"][:, :3, :3], poses, mask_outside=False, **options)
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
        monkeypatch.setattr(losses.F, "grid_sample", lambda *args, **options: grid_sample(*args, **{**options, "align_corners": False}))
    golden = {key[4:]: value for key, value in read_golden(path).items() if key.startswith(f"ac{int(corners)}_")}
    loss, disparities, leaves = golden_loss(path, variant)

    terms, views = loss(disparities)
    assert_close(terms["loss"], golden["loss"])
    terms["loss"].backward()
    expected = {key[5:]: value for key, value in golden.items() if key.startswith("grad_")}
    assert corners or set(expected) == set(leaves)
    for name, gradient in expected.items():
        # where a sampling point sits on an integer, or two sources tie, either subgradient is right: a few single pixels
        # may differ, all others must not, and the sums over pixels (the poses) only by that little
        assert relative_distance(leaves[name].grad, gradient) < (5e-2 if "disp" in name else 1e-2), name
        assert relative_distance(*without_outliers(leaves[name].grad, gradient)) < (2e-3 if "disp" in name else 1e-2), name

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


# ---------------------------------------------------------------------------------------------- golden: networks

def golden_keys() -> dict[str, dict[str, list[int]]]:
    with open(os.path.join(GOLDEN, "state_dict_keys.json")) as file:
        return json.load(file)


def golden_parameters(network: str, seed: int) -> dict[str, torch.Tensor]:
    """The reference's state dict of a network (with its unused `fc`), filled by the formula of the golden folder's README."""
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
    for file, network in (("encoder", "encoder"), ("depth", "depth"), ("pose_encoder", "pose_encoder"), ("pose", "pose")):
        content = golden_parameters(f"{network}_{size}", seed)
        torch.save({**content, **extra} if file == "encoder" else content, os.path.join(folder, f"{file}.pth"))
    return str(folder)


@pytest.mark.parametrize("size", ("r18", "r50"))
@pytest.mark.parametrize("path", golden_files("state_dict_keys.json"))
def test_golden_parameter_names(path, size):
    """Names and shapes are the published ones, except for the classifier that nothing uses."""
    model, pose = networks.build("unet", f"resnet{size[1:]}", 1, scales=(0, 1, 2, 3)), networks.PoseNet(f"resnet{size[1:]}")
    for part, module in (("encoder", model.encoder), ("depth", model.decoder), ("pose_encoder", pose.encoder), ("pose", pose.decoder)):
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
    message = networks.load_weights(initialised, folder)
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
    """The same for the pose network. Only the ResNet-18 one is ever built by training, so it also loads from the folder."""
    golden, size = read_golden(path), os.path.basename(path).split("_")[1]
    pose = networks.PoseNet(f"resnet{size[1:]}").eval()
    folder = write_monodepth2_folder(tmp_path / "mono", size, seed_of(path))
    message = networks.load_weights(networks.build("unet", f"resnet{size[1:]}", 1, scales=(0, 1, 2, 3)), folder, pose=pose)
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


# ---------------------------------------------------------------------------------------------- golden: evaluation

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
        np.testing.assert_allclose([row[key] for key in evaluate.DEPTH_METRICS], golden[f"{variant}_errors"][index], rtol=1e-4, atol=1e-6)
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
    clips = datasets.KittiRaw(str(root), ["0"], split=None, cameras="l" if camera_number == 2 else "r", with_depth=True, height=32, width=96)
    kind, points, name, side, _ = clips.samples[0]["depth"]
    ours = clips.depth_map((kind, points, name, side, forward_distance))

    golden = np.load(root / "depth_maps.npz")
    expected = golden[f"cam{camera_number}_vel{int(forward_distance)}"]
    # the reference takes the last pixel of a row and the first of the next for the same one: where both are hit it is wrong
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


# ---------------------------------------------------------------------------------------------- geometry by construction

def test_identity_pose_warps_an_image_to_itself():
    image, depth = smooth_images(2, 32, 48), 1 + 20 * torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(1))
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
    warped_flipped, valid_flipped = losses.synthesize(flipped["frames"][1:], flipped["depth"][None], flipped["K"][None], flipped["stereo_T"][None])
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
        np.testing.assert_allclose(ray_after[inner], ray_before[inner], atol=1e-4)


# ---------------------------------------------------------------------------------------------- losses by construction

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
        terms, views = losses.depth_loss([disparity], [target], [source], K, [pose], min_depth=1, max_depth=2000, smoothness_weight=0.0,
                                         automask=False, minimum=minimum, ssim=False, mask_outside=mask_outside)
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
    terms, views = losses.depth_loss([torch.full((1, 1, 32, 64), 0.3)], [image], [image], camera(40, 32, 64), [shift_pose(x=-0.1)])
    assert float(terms["masked"]) == 1 and not views["mask"].any()
    terms, views = losses.depth_loss([torch.full((1, 1, 32, 64), 0.3)], [image], [image], camera(40, 32, 64), [shift_pose(x=-0.1)],
                                     automask=False)
    assert views["mask"].float().mean() > 0.5


def test_smoothness_ignores_the_scale_of_disparity():
    disparity, image = 0.1 + smooth_images(1, 32, 64)[:, :1], smooth_images(1, 32, 64, seed=1)
    assert_close(losses.disparity_smoothness(0.3 * disparity, image), losses.disparity_smoothness(disparity, image), 1e-4)
    assert float(losses.disparity_smoothness(torch.full_like(disparity, 0.4), image)) == 0
    assert losses.smoothness(disparity, torch.full_like(image, 0.5)) > losses.smoothness(disparity, image)  # edges in the image excuse


def test_supervised_loss_counts_measured_pixels_only():
    depth = torch.tensor([[[[1.0, 2, 3, 90]]]], requires_grad=True)
    measured = torch.tensor([[[[2.0, 0, 6, 0]]]])
    loss = losses.supervised_depth_loss(depth, measured)
    loss.backward()
    assert float(loss) == (1 + 3) / 2
    assert depth.grad.tolist() == [[[[-0.5, 0, -0.5, 0]]]]
    nothing = losses.supervised_depth_loss(depth, torch.zeros_like(measured))
    assert float(nothing) == 0 and torch.autograd.grad(nothing, depth)[0].abs().sum() == 0


def test_scale_and_shift_invariant_loss():
    prediction, target = smooth_images(3, 32, 48)[:, :1], smooth_images(3, 32, 48, seed=1)[:, :1]
    valid = torch.rand(3, 1, 32, 48, generator=torch.Generator().manual_seed(0)) > 0.3
    valid[2] = False  # an image without any measurement
    loss = losses.scale_shift_invariant_loss(prediction, target, valid)
    assert 0.1 < float(loss) < 2
    assert_close(losses.scale_shift_invariant_loss(7 * prediction - 3, target, valid), loss, 1e-4)
    assert_close(losses.scale_shift_invariant_loss(prediction, 0.2 * target + 9, valid), loss, 1e-3)
    assert_close(losses.scale_shift_invariant_loss(prediction.masked_fill(~valid, 50), target.masked_fill(~valid, -50), valid), loss)
    assert float(losses.scale_shift_invariant_loss(2 * target + 1, target, valid)) < 1e-4


def test_reconstruction_loss_looks_at_removed_pixels_only():
    image = smooth_images(2, 32, 64)
    pyramid = losses.image_pyramid(image)
    removed = torch.zeros(2, 1, 32, 64, dtype=torch.bool)
    removed[..., 8:16, 16:24] = True
    perfect = [level.clone().requires_grad_() for level in pyramid]
    assert float(losses.reconstruction_loss(perfect, pyramid, removed)) == 0
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


# ---------------------------------------------------------------------------------------------- networks

def test_flow_network_treats_both_frames_alike():
    """Shared weights: exchanging the frames exchanges the halves of the features, and the range is a fifth of the image."""
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
    depth, segmenter = networks.build("unet", "resnet18", 1, scales=(0, 1, 2, 3)), networks.build("unet", "resnet18", 19)
    path = str(tmp_path / "model.pt")
    torch.save({"options": {"task": "depth"}, **networks.state(depth)}, path)
    head = segmenter.decoder.decoder[10].conv.weight.clone()
    message = networks.load_weights(segmenter, path)
    assert "encoder 120/120" in message and "decoder 20/22: head replaced" in message
    assert torch.equal(segmenter.decoder.decoder[10].conv.weight, head)
    for key, value in segmenter.decoder.state_dict().items():
        assert key.startswith("decoder.10.") or torch.equal(value, depth.decoder.state_dict()[key])

    fresh = networks.build("unet", "resnet18", 19)
    before = {key: value.clone() for key, value in fresh.decoder.state_dict().items()}
    assert "decoder fresh" in networks.load_weights(fresh, path, "encoder")
    assert all(torch.equal(value, before[key]) for key, value in fresh.decoder.state_dict().items())
    assert all(torch.equal(value, depth.encoder.state_dict()[key]) for key, value in fresh.encoder.state_dict().items())
