"""Agreement with Monodepth2 as published: geometry, losses, networks, evaluation, LiDAR.

    python -m pytest tests/test_golden.py
    GOLDEN=/path/to/vectors python -m pytest tests/test_golden.py

The vectors are inputs and outputs of its code, in ../shared/golden beside the repository or in $GOLDEN.
Where the folder is missing these tests are skipped, and test_losses.py tests the same by construction.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from numpy.testing import assert_allclose
from PIL import Image

import datasets
import losses
import networks
import weights
from images import velodyne_depth
from metrics import DEPTH_METRICS, depth_errors, evaluate_depth_image, garg_crop, summarise_depth

GOLDEN = Path(os.environ.get("GOLDEN") or ROOT.parent / "shared" / "golden")


def files(pattern: str) -> list:
    """Every golden file of a kind, whatever its seed, as parameters of a test; or one that is skipped."""
    found = sorted(GOLDEN.glob(pattern))
    if not found:
        skip = pytest.mark.skip(reason=f"no {pattern} in {GOLDEN}: set $GOLDEN")
        return [pytest.param(None, marks=skip, id="missing")]
    return [pytest.param(path, id=path.stem) for path in found]


def read(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of a file as tensors, without its text."""
    arrays = {}
    with np.load(path) as content:
        for key in content.files:
            if content[key].dtype.kind != "U":
                arrays[key] = torch.from_numpy(content[key])
    return arrays


def seed_of(path: Path) -> int:
    return int(path.stem.rpartition("seed")[2])


def size_of(path: Path) -> str:
    """Of depth_r18_seed0.npz: 18."""
    return path.stem.split("_")[1].removeprefix("r")


def assert_close(ours, golden, relative: float = 2e-5, absolute: float = 2e-6) -> None:
    torch.testing.assert_close(ours, golden, rtol=relative, atol=absolute)


# ------------------------------------------------------------------------------------ geometry

geometry = pytest.mark.parametrize("path", files("geometry_seed*.npz"))


@geometry
def test_depth_from_disparity(path):
    golden = read(path)
    depth = losses.disparity_to_depth(golden["disp"], 0.1, 100)
    assert_close(depth, golden["depth_from_disp"])
    assert_close(1 / depth, golden["scaled_disp"])


@geometry
@pytest.mark.parametrize("invert", (False, True))
def test_pose_to_matrix(path, invert):
    golden = read(path)
    axisangle = golden["axisangle"][:, 0]
    translation = golden["translation"][:, 0]
    T = losses.pose_to_matrix(axisangle, translation, invert)
    assert_close(T, golden[f"T_invert{int(invert)}"])


@geometry
@pytest.mark.parametrize("suffix", ("", "_behind"))  # a quarter of the points behind the camera
def test_view_synthesis(path, suffix):
    golden = read(path)
    K = golden["K"][:, :3, :3]
    pixels, z = losses.project(golden["depth"], K, golden["T" + suffix])
    assert_close(z, golden["z" + suffix], absolute=2e-5)

    normalised = golden["pix_coords" + suffix]
    height, width = golden["image"].shape[2:]
    expected = (normalised + 1) / 2 * torch.tensor([width - 1, height - 1])
    usable = golden["z" + suffix][:, 0].abs() > 1e-2  # nearer to the camera plane, rounding decides
    assert_close(pixels[usable], expected[usable], 1e-4, 1e-3)

    warped, inside = losses.sample(golden["image"], pixels)
    expected = golden["warped_ac1" + suffix]
    warped = warped.movedim(1, 3)
    expected = expected.movedim(1, 3)
    assert_close(warped[usable], expected[usable], absolute=2e-4)

    from_border = (normalised.abs() - 1).abs()
    clear = usable & (from_border > 1e-4).all(3)
    expected = (normalised.abs() <= 1).all(3)
    assert torch.equal(inside[:, 0][clear], expected[clear])


@geometry
@pytest.mark.parametrize("suffix", ("", "_near"))  # two images that differ by noise of 1e-3
def test_ssim(path, suffix):
    golden = read(path)
    error = losses.ssim_error(golden["ssim_x" + suffix], golden["ssim_y" + suffix])
    expected = golden["ssim" + suffix]
    # variances are differences of nearly equal numbers: in float32 both sides are off by 7e-5
    assert_close(error, expected, absolute=1.5e-4)
    assert_close(error.mean(), expected.mean(), absolute=5e-7)


@geometry
def test_photometric_error(path):
    golden = read(path)
    error = losses.photometric_error(golden["ssim_x"], golden["ssim_y"])
    assert_close(error, golden["photometric"], absolute=5e-5)


@geometry
def test_smoothness(path):
    golden = read(path)
    disparity = golden["smooth_disp"]
    image = golden["smooth_image"]
    assert_close(losses.smoothness(disparity, image), golden["smooth_loss_raw"])
    assert_close(losses.disparity_smoothness(disparity, image), golden["smooth_loss"])


# ------------------------------------------------------------------------------------ depth loss

VARIANTS = {  # source views, and options of PhotometricLoss
    "mono": (("-1", "1"), {}),
    "mono_avg": (("-1", "1"), {"minimum": False}),
    "mono_noautomask": (("-1", "1"), {"automask": False}),
    "mono_avg_noautomask": (("-1", "1"), {"automask": False, "minimum": False}),
    "mono_nossim": (("-1", "1"), {"ssim": False}),
    "stereo": (("s",), {}),
    "mono_stereo": (("-1", "1", "s"), {}),
}


def loss_files() -> list:
    found = []
    for variant in VARIANTS:
        for entry in files(f"loss_{variant}_seed*.npz"):
            path = entry.values[0]
            case = pytest.param(variant, path, marks=entry.marks, id=entry.id)
            found.append(case)
    return found


class LossCase:
    """PhotometricLoss on the inputs of a golden file; `leaves` are what has golden gradients."""

    def __init__(self, path: Path, variant: str):
        inputs = read(path.parent / f"loss_inputs_seed{seed_of(path)}.npz")
        self.views, options = VARIANTS[variant]
        self.loss = losses.PhotometricLoss(border=True, **options)
        self.leaves = {}
        self.disparities = [self.leaf(inputs, f"disp_{scale}") for scale in range(4)]
        self.target = inputs["color_0_0"] / 255
        self.sources = [inputs[f"color_{view}_0"] / 255 for view in self.views]
        self.K = inputs["K_0"][:, :3, :3]
        self.poses = [self.pose(inputs, view) for view in self.views]

    def leaf(self, inputs: dict, name: str) -> torch.Tensor:
        self.leaves[name] = inputs[name].requires_grad_()
        return self.leaves[name]

    def pose(self, inputs: dict, view: str) -> torch.Tensor:
        if view == "s":
            return inputs["stereo_T"]
        axisangle = self.leaf(inputs, f"axisangle_{view}")[:, 0]
        translation = self.leaf(inputs, f"translation_{view}")[:, 0]
        return losses.pose_to_matrix(axisangle, translation, invert=view == "-1")

    def compute(self, disparities: list) -> tuple[dict, dict]:
        return self.loss(disparities, self.target, self.sources, self.K, self.poses)

    def at_full_size(self, scale: int) -> tuple[dict, dict]:
        """One scale alone, upsampled as the loss does."""
        full = losses.upsample(self.disparities[scale], (64, 96))
        return self.compute([full])


@pytest.fixture(params=(True, False), ids=("ac1", "ac0"))
def corners(request, monkeypatch) -> bool:
    """Both readings of grid_sample's align_corners; the golden gradients are of False, mostly."""
    if not request.param:
        grid_sample = F.grid_sample

        def sample(*args, **options):
            return grid_sample(*args, **{**options, "align_corners": False})

        monkeypatch.setattr(F, "grid_sample", sample)
    return request.param


def read_outputs(path: Path, corners: bool) -> dict[str, torch.Tensor]:
    prefix = f"ac{int(corners)}_"
    golden = read(path)
    outputs = {}
    for key, value in golden.items():
        if key.startswith(prefix):
            outputs[key.removeprefix(prefix)] = value
    return outputs


def relative_distance(ours: torch.Tensor, golden: torch.Tensor, left_out: int = 0) -> float:
    """L2 distance relative to the golden norm, without the values that differ most."""
    ours = ours.flatten()
    golden = golden.flatten()
    order = (ours - golden).abs().argsort()
    kept = order[: len(order) - left_out]
    distance = (ours - golden)[kept].norm()
    return float(distance / golden[kept].norm())


@pytest.mark.parametrize("variant, path", loss_files())
def test_depth_loss(variant, path, corners):
    golden = read_outputs(path, corners)
    case = LossCase(path, variant)
    terms, _ = case.compute(case.disparities)
    assert_close(terms["loss"], golden["loss"])
    for scale in range(4):
        terms, _ = case.compute(case.disparities[: scale + 1])
        expected = [golden[f"loss_{finer}"] for finer in range(scale + 1)]
        assert_close(terms["loss"], torch.stack(expected).mean())


@pytest.mark.parametrize("variant, path", loss_files())
def test_depth_loss_gradients(variant, path, corners):
    """Where a sampling point is an integer, or two sources tie, either subgradient is right.

    Such a pixel shows in four values of a coarse disparity, and hardly in a pose.
    """
    golden = read_outputs(path, corners)
    case = LossCase(path, variant)
    terms, _ = case.compute(case.disparities)
    terms["loss"].backward()
    compared = 0
    for name, leaf in case.leaves.items():
        if f"grad_{name}" not in golden:
            assert corners, name
            continue
        compared += 1
        expected = golden[f"grad_{name}"]
        if name.startswith("disp"):
            assert relative_distance(leaf.grad, expected) < 5e-2, name
            assert relative_distance(leaf.grad, expected, left_out=16) < 2e-3, name
        else:
            assert relative_distance(leaf.grad, expected) < 1e-2, name
    assert corners or compared == len(case.leaves)


@pytest.mark.parametrize("variant, path", loss_files())
def test_auto_mask(variant, path, corners):
    golden = read_outputs(path, corners)
    case = LossCase(path, variant)
    for scale in range(4):
        _, views = case.at_full_size(scale)
        if case.loss.automask:
            expected = golden[f"identity_selection_{scale}"].bool()
            wrong = views["mask"][:, 0] != expected
            assert wrong.float().mean() < 1e-3  # a tie may fall either way
        else:
            assert views["mask"].all()


@pytest.mark.parametrize("variant, path", loss_files())
def test_warped_views(variant, path, corners):
    golden = read_outputs(path, corners)
    case = LossCase(path, variant)
    _, views = case.at_full_size(2)
    for i, view in enumerate(case.views):
        if f"warped_{view}_2" in golden:
            assert_close(views["warped"][:, i], golden[f"warped_{view}_2"], absolute=2e-4)


# ------------------------------------------------------------------------------------ networks


def published_shapes(network: str) -> dict[str, list[int]]:
    return json.loads((GOLDEN / "state_dict_keys.json").read_text())[network]


def fill(index: int, key: str, shape: tuple, seed: int) -> torch.Tensor:
    """A parameter by the formula of the golden folder's README."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    count = int(np.prod(shape))
    j = np.arange(count, dtype=np.int64)
    linear = j * (2 * index + 1) * 101
    numerator = j * j * 7919 + linear + 13 * index + 977 * seed
    u = (numerator % 65521) / 65521 * 2 - 1
    if key.endswith("running_var"):
        values = 1 + 0.5 * u
    elif len(shape) > 1:
        values = u * np.sqrt(4.5 / (count // shape[0]))
    elif key.endswith("weight"):
        values = 0.7 + 0.2 * u
    else:
        values = 0.1 * u
    return torch.from_numpy(values.astype(np.float32)).view(shape)


def published_state(network: str, seed: int) -> dict[str, torch.Tensor]:
    """A state dict as Monodepth2 saves it, with the classifier `fc` that it never uses."""
    shapes = published_shapes(network)
    state = {}
    for index, key in enumerate(sorted(shapes)):
        state[key] = fill(index, key, tuple(shapes[key]), seed)
    return state


def unet(size: str) -> networks.Network:
    model = networks.build("unet", f"resnet{size}", 1, scales=(0, 1, 2, 3))
    return model.eval()


def without_classifier(entries: dict) -> dict:
    return {key: value for key, value in entries.items() if ".fc." not in key}


def load_published(module: torch.nn.Module, network: str, seed: int) -> None:
    state = published_state(network, seed)
    module.load_state_dict(without_classifier(state))


def assert_features(features: list[torch.Tensor], golden: dict, ending: str) -> None:
    for level, feature in enumerate(features):
        expected = golden[f"feature_{level}_every8th_channel{ending}"]
        assert_close(feature[: len(expected), ::8], expected, 1e-5, 1e-5)


@pytest.mark.parametrize("size", ("18", "50"))
@pytest.mark.parametrize("path", files("state_dict_keys.json"))
def test_parameter_names(path, size):
    model = unet(size)
    pose = networks.PoseNet(f"resnet{size}")
    modules = {
        "encoder": model.encoder,
        "depth": model.decoder,
        "pose_encoder": pose.encoder,
        "pose": pose.decoder,
    }
    for part, module in modules.items():
        state = module.state_dict()
        ours = {key: list(value.shape) for key, value in state.items()}
        published = published_shapes(f"{part}_r{size}")
        assert ours == without_classifier(published)


@torch.no_grad()
@pytest.mark.parametrize("path", files("depth_r*_seed*.npz"))
def test_depth_network(path):
    golden = read(path)
    size = size_of(path)
    model = unet(size)
    load_published(model.encoder, f"encoder_r{size}", seed_of(path))
    load_published(model.decoder, f"depth_r{size}", seed_of(path))
    assert_features(model.encoder(golden["input"]), golden, "_of_sample0")
    for scale, output in enumerate(model(golden["input"])):
        assert_close(output.sigmoid(), golden[f"disp_{scale}"], 1e-5, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("path", files("pose_r*_seed*.npz"))
def test_pose_network(path):
    golden = read(path)
    size = size_of(path)
    pose = networks.PoseNet(f"resnet{size}").eval()
    load_published(pose.encoder, f"pose_encoder_r{size}", seed_of(path))
    load_published(pose.decoder, f"pose_r{size}", seed_of(path))
    features = pose.encoder(golden["input"])
    assert_features(features, golden, "")
    axisangle, translation = pose.decoder(features[-1])  # (1, 2, 3): two predictions
    assert_close(axisangle, golden["axisangle"][:, :, 0], 1e-5, 1e-7)
    assert_close(translation, golden["translation"][:, :, 0], 1e-5, 1e-7)
    first = pose(*golden["input"].split(3, 1))
    assert torch.equal(first[0], axisangle[:, 0])
    assert torch.equal(first[1], translation[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("path", files("depth_r18_seed*.npz"))
def test_published_folder(path, tmp_path):
    """encoder.pth, depth.pth and the pose network's files load as they are, through both ways in."""
    golden = read(path)
    for file in ("encoder", "depth", "pose_encoder", "pose"):
        content = published_state(f"{file}_r18", seed_of(path))
        if file == "encoder":
            content.update(height=64, width=96, use_stereo=True)
        torch.save(content, tmp_path / f"{file}.pth")
    whole, options = weights.load_model(str(tmp_path))
    assert options["task"] == "depth"
    assert (options["height"], options["width"]) == (64, 96)
    assert (options["min_depth"], options["max_depth"]) == (0.1, 100)

    model = unet("18")
    pose = networks.PoseNet("resnet18")
    message = weights.load_weights(model, str(tmp_path), "depth", pose=pose)
    assert "encoder 120/120" in message
    assert "decoder 28/28" in message
    assert "pose 8/8" in message
    for network in (whole, model):
        outputs = network(golden["input"])
        assert_close(outputs[0].sigmoid(), golden["disp_0"], 1e-5, 1e-5)


# ------------------------------------------------------------------------------------ evaluation

PROTOCOLS = {
    "mono_eigen": {},
    "stereo_eigen": {"scale": 5.4},
    "mono_eigen_noscale": {"scale": 1.0},
    "mono_benchmark_mask": {"crop": False},
}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in read(path).items()}


def metrics(errors: dict[str, float]) -> list[float]:
    return [errors[key] for key in DEPTH_METRICS]


def evaluate_all(golden: dict, protocol: str) -> list[dict]:
    rows = []
    for index, disparity in enumerate(golden["pred_disp"]):
        measured = golden[f"gt_{index}"]
        rows.append(evaluate_depth_image(disparity, measured, **PROTOCOLS[protocol]))
    return rows


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("path", files("evaluation_seed*.npz"))
def test_evaluation(path, protocol):
    golden = read_arrays(path)
    rows = evaluate_all(golden, protocol)
    for index, row in enumerate(rows):
        assert row["pixels"] == golden[f"{protocol}_count"][index]
        expected = golden[f"{protocol}_errors"][index]
        assert_allclose(metrics(row), expected, rtol=1e-4, atol=1e-6)
    summary = summarise_depth(rows)
    assert_allclose(metrics(summary), golden[f"{protocol}_mean"], rtol=5e-5)


@pytest.mark.parametrize("path", files("evaluation_seed*.npz"))
def test_median_scaling(path):
    golden = read_arrays(path)
    rows = evaluate_all(golden, "mono_eigen")
    ratios = golden["mono_eigen_ratios"]
    for row, ratio in zip(rows, ratios, strict=True):
        assert row["ratio"] == pytest.approx(ratio, rel=2e-5)
        assert row["scale"] == pytest.approx(ratio, rel=2e-5)
    summary = summarise_depth(rows)
    median = np.median(ratios)
    assert summary["ratio_median"] == pytest.approx(median, rel=2e-5)
    assert summary["ratio_deviation"] == pytest.approx(np.std(ratios / median), rel=1e-4)


@pytest.mark.parametrize("path", files("evaluation_seed*.npz"))
def test_depth_errors(path):
    golden = read_arrays(path)
    errors = depth_errors(golden["errors_gt"], golden["errors_pred"])
    assert_allclose(metrics(errors), golden["errors"], rtol=2e-5)
    errors = depth_errors(golden["mono_eigen_gt0"], golden["mono_eigen_pred0"])
    assert_allclose(metrics(errors), golden["mono_eigen_errors"][0], rtol=2e-5)


@pytest.mark.parametrize("path", files("evaluation_seed*.npz"))
def test_garg_crop(path):
    golden = read_arrays(path)
    for index in range(len(golden["pred_disp"])):
        height, width = golden[f"gt_{index}"].shape
        assert garg_crop(height, width) == tuple(golden[f"crop_{index}"])


# ------------------------------------------------------------------------------------ LiDAR


def kitti_with_images(folder: Path, copy: Path) -> tuple[str, str]:
    """A copy of a golden KITTI folder, with made-up images beside the points, and its drive."""
    shutil.copytree(folder, copy)
    drive = next(copy.glob("2011_09_26/*_drive_*"))
    drive.chmod(0o755)
    for camera in ("image_02", "image_03"):
        data = drive / camera / "data"
        data.mkdir(parents=True)
        Image.new("RGB", (310, 94)).save(data / "0000000007.png")
    return str(copy), drive.name


def wrapped_pixels(ours: np.ndarray, golden: np.ndarray) -> np.ndarray:
    """Where the reference errs: it takes a row's last pixel and the next row's first for one."""
    hit = (ours > 0) | (golden > 0)
    both = hit[:-1, -1] & hit[1:, 0]
    wrapped = np.zeros(ours.shape, bool)
    wrapped[:-1, -1] = both
    wrapped[1:, 0] = both
    return wrapped


@pytest.mark.parametrize("forward_distance", (False, True), ids=("z", "forward"))
@pytest.mark.parametrize("camera, side", ((2, "l"), (3, "r")))
@pytest.mark.parametrize("folder", files("kitti_seed*"))
def test_velodyne_depth(tmp_path, folder, camera, side, forward_distance):
    root, drive = kitti_with_images(folder, tmp_path / "kitti")
    drive = f"2011_09_26/{drive}"
    split = tmp_path / "split.txt"
    split.write_text(f"{drive} 7 {side}\n")
    clips = datasets.KittiRaw(root, ["0"], str(split), height=32, width=96)
    calibration = clips.calibration(drive)
    points = np.fromfile(clips.velodyne_file(drive, 7), np.float32)
    ours = velodyne_depth(
        points.reshape(-1, 4),
        clips.velodyne_pose(drive),
        calibration["P"][side],
        calibration["size"],
        forward_distance=forward_distance,
        offset=1,
    )
    maps = np.load(folder / "depth_maps.npz")
    golden = maps[f"cam{camera}_vel{int(forward_distance)}"]
    assert (golden > 0).sum() > 500
    wrapped = wrapped_pixels(ours, golden)
    assert wrapped.sum() < 40
    if camera == 2 and not forward_distance:
        rows, columns = maps["pixels_differing_from_clean_min_cam2_vel0"].T
        assert wrapped[rows, columns].all()
        wrapped[:] = False
        wrapped[rows, columns] = True
    assert_allclose(ours[~wrapped], golden[~wrapped], rtol=1e-9)
