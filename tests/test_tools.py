"""Tools: the synthetic street's geometry, exported networks, NYU's files, measurements."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Result, assert_one_line, call, differing, smooth_images
from PIL import Image

import datasets
import losses
import networks
import utils
import weights
from tools import bench, export, prepare_nyu, run_jobs, street, street_view

SIZE = (64, 208)
TINY = ("--height", 64, "--width", 96, "--batch_size", 2)


# ------------------------------------------------------------------------------------ street


class StreetViews:
    """A street, its camera, and three views: now, one frame later, and by the right camera."""

    def __init__(self, seed: int):
        self.world = street.StreetWorld(seed)
        self.K = street.camera_matrix(*SIZE)
        right = np.eye(4)
        right[0, 3] = street.BASELINE
        now = self.world.pose(5)
        self.poses = {
            "now": now,
            "next": self.world.pose(6),
            "right": now @ right,
        }
        self.times = {
            "now": 5,
            "next": 6,
            "right": 5,
        }

    def render(self, name: str) -> dict:
        pose = self.poses[name]
        time = self.times[name]
        return self.world.render(pose, time, self.K, SIZE)

    def moving(self, view: dict) -> torch.Tensor:
        """Which pixels (H, W) show a moving car."""
        moves = self.world.moves[self.world.anchor]
        solid = view["solid"]
        return torch.from_numpy(moves[solid] & (solid >= 0))

    def rays(self) -> np.ndarray:
        """(H, W, 3) through the pixels, in the camera's frame, with z = 1."""
        v, u = np.indices(SIZE)
        pixels = np.stack([u, v, np.ones(SIZE)], -1)
        return pixels @ np.linalg.inv(self.K).T

    def points(self, view: dict) -> np.ndarray:
        """Where (H, W, 3) the pixels of the view "now" lie in the world; the sky 1 km away."""
        pose = self.poses["now"]
        depth = np.minimum(view["depth"], 1000)
        places = self.rays() * depth[..., None]
        return places @ pose[:3, :3].T + pose[:3, 3]

    def moved(self, view: dict, points: np.ndarray, other: str) -> np.ndarray:
        """The points at another view's time."""
        points = points.copy()
        things = view["solid"] >= 0
        anchor = self.world.anchor[view["solid"][things]]
        rotations, origins = self.world.frames(self.times["now"])
        new_rotations, new_origins = self.world.frames(self.times[other])
        turns = new_rotations @ rotations.transpose(0, 2, 1)
        local = points[things] - origins[anchor]
        turned = np.einsum("nij,nj->ni", turns[anchor], local)
        points[things] = turned + new_origins[anchor]
        return points

    def pixels_in(self, view: dict, other: str) -> torch.Tensor:
        """Where (1, H, W, 2) the points of the view "now" are in another view, cars moved along."""
        pose = self.poses[other]
        points = self.moved(view, self.points(view), other)
        rotation = self.poses["now"][:3, :3]
        directions = self.rays() @ rotation.T
        sky = np.isinf(view["depth"])  # infinitely far away
        directions[~sky] = points[~sky] - pose[:3, 3]
        image = directions @ pose[:3, :3] @ self.K.T
        pixels = image[..., :2] / image[..., 2:]
        return torch.from_numpy(pixels)[None].float()


def to_tensor(image: np.ndarray) -> torch.Tensor:
    image = torch.tensor(image).permute(2, 0, 1)
    return image[None] / 255


@pytest.mark.parametrize("other", ("next", "right"))
@pytest.mark.parametrize("seed", (0, 3))
def test_street_is_photometrically_consistent(seed, other):
    """Exact depth and pose reproduce the other view where nothing moves; exact flow, everywhere."""
    views = StreetViews(seed)
    now = views.render("now")
    image = to_tensor(now["image"])
    source = to_tensor(views.render(other)["image"])
    moving = views.moving(now)

    depth = torch.tensor(now["depth"])[None, None]
    depth = depth.clamp(max=1e6)
    to_other = np.linalg.inv(views.poses[other]) @ views.poses["now"]
    T = torch.from_numpy(to_other)[None].float()
    K = torch.from_numpy(views.K)[None].float()
    warped, seen = losses.synthesize(source, depth, K, T)
    by_flow, inside = losses.sample(source, views.pixels_in(now, other))

    def error(prediction: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        difference = (prediction - image).abs().mean(1)
        return difference[0][chosen]

    still = seen[0, 0] & ~moving
    everywhere = inside[0, 0]
    for prediction, chosen in ((warped, still), (by_flow, everywhere)):
        assert error(prediction, chosen).median() < 0.02
        unmoved = error(source, chosen).mean()
        assert error(prediction, chosen).mean() < 0.5 * unmoved
    if other == "next":  # a static world would not explain the cars
        cars = moving & everywhere
        assert cars.any()
        assert error(by_flow, cars).median() < 0.03


def test_street_labels_and_depth_belong_together():
    """Sky is infinitely far, the road lies on the ground, and materials have their class."""
    views = StreetViews(1)
    view = views.render("now")
    label = view["label"]
    assert set(np.unique(label)) <= set(street.LABEL_COLOURS)
    sky = label == street_view.SKY
    assert (sky == np.isinf(view["depth"])).all()

    height = views.points(view)[..., 1]
    road = label == street_view.ROAD
    np.testing.assert_allclose(height[road], 0, atol=1e-4)
    assert (height[~road & ~sky] < 0.01).all()  # y points down

    things = view["solid"] >= 0
    material = views.world.material[view["solid"][things]]
    expected = street_view.MATERIAL_LABELS[material]
    assert (label[things] == expected).all()


def read_calibration(path: Path) -> dict[str, np.ndarray]:
    entries = {}
    for line in path.read_text().splitlines():
        key, values = line.split(":")
        entries[key] = np.array(values.split(), float)
    return entries


def test_lidar_points_project_onto_the_depth(world):
    """Through the calibration files, as anyone reads KITTI."""
    day = Path(world) / street.DAY
    cameras = read_calibration(day / "calib_cam_to_cam.txt")
    lidar = read_calibration(day / "calib_velo_to_cam.txt")
    shift = -street.BASELINE * cameras["P_rect_02"][0]
    assert cameras["P_rect_03"][3] == pytest.approx(shift)
    K = cameras["P_rect_02"].reshape(3, 4)[:, :3]
    height, width = 64, 128
    expected = street.camera_matrix(height, width)
    np.testing.assert_allclose(K, expected, rtol=1e-5)

    drive = day / f"{street.DAY}_drive_{street.FIRST_DRIVE}_sync"
    path = drive / "velodyne_points" / "data" / "0000000001.bin"
    scan = np.fromfile(path, np.float32).reshape(-1, 4)
    rotation = lidar["R"].reshape(3, 3)
    points = scan[:, :3] @ rotation.T + lidar["T"]
    image = points @ K.T
    pixels = np.rint(image[:, :2] / image[:, 2:])
    u, v = pixels.astype(int).T
    different = np.unique(pixels, axis=0)
    assert len(different) > 0.1 * height * width

    drawn = street.StreetWorld(0)
    pose = drawn.pose(1)
    exact = drawn.render(pose, 1, expected, (height, width))["depth"]
    np.testing.assert_allclose(points[:, 2], exact[v, u], rtol=1e-3)
    poses = np.loadtxt(drive / "poses.txt")
    np.testing.assert_allclose(poses[1], pose[:3].ravel(), rtol=1e-6)


def test_street_on_disk(world, tmp_path):
    """The same bytes with other workers and fewer frames; every class occurs."""
    again = tmp_path / "again"
    size = {"height": 64, "width": 128}
    counts = {
        "drives": 2,
        "frames": 2,
        "labelled": 3,
    }
    street.render(again, workers=2, **counts, **size)
    files = [path.relative_to(again) for path in again.rglob("*.png")]
    assert len(files) == 2 * 2 * 2 + 2 * 3
    for file in files:
        expected = Path(world, file).read_bytes()
        assert (again / file).read_bytes() == expected, file
    assert not list(tmp_path.glob("*.unfinished"))
    with pytest.raises(utils.InputError, match="exists"):
        street.render(again)

    ids = set()
    for path in Path(world, "training", "semantic").iterdir():
        label = np.asarray(Image.open(path))
        ids |= set(np.unique(label).tolist())
    assert ids == set(street.LABEL_COLOURS)


def test_preview_comes_first(tmp_path):
    """Even where the data exist already."""
    (tmp_path / "data").mkdir()
    picture = tmp_path / "pictures" / "preview.png"
    size = ("--height", 64, "--width", 96)
    result = call(street, "--data_path", tmp_path / "data", "--preview", picture, *size)
    assert_one_line(result, "exists")
    assert str(picture) in result.out
    grid = np.asarray(Image.open(picture))
    assert grid.shape[0] > 4 * 64  # the views with titles
    assert grid.shape[1] > 3 * 96  # and names
    assert grid.std() > 20


# ------------------------------------------------------------------------------------ export


def run_onnx(path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        (output,) = session.run(None, {"image": images.numpy()})
        return torch.from_numpy(output)

    return run


CASES = (
    ("mono", "onnx", ("--dynamic",)),
    ("none", "torch", ()),
)


@pytest.mark.parametrize(("kind", "form", "options"), CASES)
def test_exported_networks_say_the_same(runs, tmp_path, kind, form, options):
    """Dynamic ones at another batch and size as well."""
    if form == "onnx":
        pytest.importorskip("onnxscript")
    folder = runs.pretrained(kind) if kind == "mono" else runs.fine_tuned(kind)
    path = tmp_path / "network.pt2"
    options = (*options, "--format", form)
    call(export, "--weights", folder, "--output", path, *options, expect=0)
    if form == "onnx":
        program = run_onnx(path)
    else:
        program = torch.export.load(path).module()
    model = export.Exported(*weights.load_model(folder))
    channels = 1 if kind == "mono" else 19
    sizes = [(1, 64, 96)]
    if "--dynamic" in options:
        sizes.append((3, 96, 128))
    for batch, height, width in sizes:
        images = smooth_images(batch, height, width)
        with torch.inference_mode():
            expected = model(images)
            actual = program(images)
        assert expected.shape == (batch, channels, height, width)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ("mono", "stereo", "mono+stereo", "depth"))
def test_monodepth2_folder_loads_back(runs, tmp_path, kind):
    """The same depth and motion, in metres where they were; Monodepth2's stereo unit is 5.4 m.

    A training in metres that starts from the folder has motion in metres.
    """
    unit = 5.4 if "stereo" in kind else 1.0
    source = runs.pretrained(kind)
    folder = tmp_path / "folder"
    options = ("--format", "monodepth2", "--output", folder)
    call(export, "--weights", source, *options, expect=0)
    pose = {"pose_encoder.pth", "pose.pth"} if "mono" in kind else set()
    assert set(os.listdir(folder)) == {"encoder.pth", "depth.pth"} | pose

    model, options = weights.load_model(source)
    again, options_again = weights.load_model(str(folder))
    assert (options_again["height"], options_again["width"]) == (64, 96)
    assert bool(options_again["use_stereo"]) == ("stereo" in kind)
    assert bool(options_again.get("metric")) == (kind == "depth")
    assert differing(model.state_dict(), again.state_dict()) == []
    images = smooth_images(1, 64, 96)
    with torch.inference_mode():
        depth = export.Exported(model, options)(images)
        depth_again = export.Exported(again, options_again)(images)
    torch.testing.assert_close(unit * depth_again, depth)

    if pose:
        pair = smooth_images(2, 64, 96).split(1)
        with torch.inference_mode():
            turned, moved = load_pose(source).eval()(*pair)
            turned_again, moved_again = load_pose(str(folder)).eval()(*pair)
        torch.testing.assert_close(turned_again, turned)
        torch.testing.assert_close(unit * moved_again, moved)
        with torch.inference_mode():
            _, in_metres = load_pose(str(folder), options["min_depth"]).eval()(*pair)
        torch.testing.assert_close(in_metres, moved)


def load_pose(path: str, min_depth: float | None = None) -> torch.nn.Module:
    pose = networks.PoseNet("resnet18")
    depth = networks.build("unet", "resnet18", 1, (0, 1, 2, 3))
    weights.load_weights(depth, path, "depth", pose=pose, min_depth=min_depth)
    return pose


def test_what_cannot_be_exported(runs, tmp_path, monkeypatch):
    output = ("--output", tmp_path / "network")
    result = call(export, "--weights", runs.pretrained("flow"), *output)
    assert_one_line(result, "flow")
    folder = runs.fine_tuned("none")
    result = call(export, "--weights", folder, *output, "--format", "monodepth2")
    assert_one_line(result, "segmentation", "depth by the U-Net")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    result = call(export, "--weights", runs.pretrained("mono"), *output)
    assert_one_line(result, "pip install onnx")
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------ NYU


@pytest.fixture
def nyu_files(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """Three invented images in the layout of the published files, and what is in them."""
    h5py = pytest.importorskip("h5py")
    io = pytest.importorskip("scipy.io")
    rng = np.random.default_rng(0)
    size = (48, 64)
    content = {
        "images": rng.integers(0, 255, (3, *size, 3), np.uint8),
        "labels": rng.integers(0, 895, (3, *size)),
        "depth": rng.uniform(0.7, 9, (3, *size)),
        "mapping": rng.integers(1, 41, 894),
    }
    content["depth"][:, :7] = 0
    with h5py.File(tmp_path / prepare_nyu.IMAGES, "w") as file:  # MATLAB stores columns first
        file["images"] = content["images"].transpose(0, 3, 2, 1)
        labels = content["labels"].transpose(0, 2, 1)
        depth = content["depth"].transpose(0, 2, 1)
        file["labels"] = labels.astype(np.uint16)
        file["rawDepths"] = depth.astype(np.float32)
    splits = {
        "trainNdxs": np.array([[1], [3]]),
        "testNdxs": np.array([[2]]),
    }
    io.savemat(tmp_path / prepare_nyu.SPLITS, splits)
    classes = {"mapClass": content["mapping"][None]}
    io.savemat(tmp_path / prepare_nyu.CLASSES, classes)
    return tmp_path, content


def test_prepare_nyu(nyu_files):
    root, content = nyu_files
    call(prepare_nyu, "--data_path", root, expect=0)
    assert (root / "train.txt").read_text().split() == ["0001", "0003"]
    assert (root / "test.txt").read_text().split() == ["0002"]
    to_40 = np.append(0, content["mapping"])
    expected_labels = to_40[content["labels"]]
    for i in range(3):
        name = f"{i + 1:04d}.png"
        image = np.asarray(Image.open(root / "image" / name))
        label = np.asarray(Image.open(root / "label40" / name))
        depth = np.asarray(Image.open(root / "depth" / name))
        assert (image == content["images"][i]).all()
        assert (label == expected_labels[i]).all()
        np.testing.assert_allclose(depth / 1000, content["depth"][i], atol=0.0006)

    Nyu = datasets.LABELLED["nyu"]
    train = Nyu(str(root), "train", height=48, width=64)
    assert len(train) == 2


def test_nyu_files_that_do_not_fit(nyu_files):
    root, _ = nyu_files
    io = pytest.importorskip("scipy.io")
    classes = {"mapClass": np.ones((1, 100))}
    io.savemat(root / prepare_nyu.CLASSES, classes)
    assert_one_line(call(prepare_nyu, "--data_path", root), prepare_nyu.IMAGES, "not up to 100")
    (root / prepare_nyu.IMAGES).write_bytes(b"nothing")
    assert_one_line(call(prepare_nyu, "--data_path", root), prepare_nyu.IMAGES)
    (root / prepare_nyu.SPLITS).write_bytes(b"nothing")
    assert_one_line(call(prepare_nyu, "--data_path", root), prepare_nyu.SPLITS, "trainNdxs")
    (root / prepare_nyu.CLASSES).unlink()
    assert_one_line(call(prepare_nyu, "--data_path", root), prepare_nyu.CLASSES, "missing")


# ------------------------------------------------------------------------------------ bench


def run_bench(*options: object) -> dict:
    """The JSON object on the last line."""
    result = call(bench, *options, expect=0)
    record = json.loads(result.out.splitlines()[-1])
    assert record["torch"] == torch.__version__
    assert record["command"].startswith("python tools/bench.py")
    assert record["device"].startswith("cpu")
    return record


TRAINED = (
    ("step", "--supervision", "mono+stereo"),
    ("step", "--supervision", "depth"),
    ("step", "--task", "flow"),
    ("step", "--task", "reconstruction"),
    ("seg", "--images", "2"),
)


@pytest.mark.parametrize("command", TRAINED, ids=" ".join)
def test_bench_splits_a_step(command, tmp_path, monkeypatch):
    """The parts make up the step; nothing is written."""
    monkeypatch.chdir(tmp_path)
    record = run_bench(*command, "--steps", 2, "--warm_up", 1, *TINY)
    parts = ("ms_data", "ms_forward", "ms_backward", "ms_optimizer")
    assert all(record[part] > 0 for part in parts)
    total = sum(record[part] for part in parts)
    assert total == pytest.approx(record["ms_per_step"], rel=0.05)
    assert record["samples_per_s"] == pytest.approx(2000 / record["ms_per_step"])
    assert record["peak_memory_mb"] > 50
    assert not os.listdir(tmp_path)


def test_bench_total():
    record = run_bench("step", "--total", "--steps", 1, "--warm_up", 1, *TINY)
    assert record["ms_per_step"] > 0
    assert "ms_forward" not in record and "compile_s" not in record


def test_bench_loader(world):
    data = ("--data_path", world, "--num_workers", 0)
    record = run_bench("loader", "--steps", 2, *TINY, *data)
    assert record["samples_per_s_cache"] > 0
    assert record["samples_per_s_files"] > 0


def test_bench_compares_compiled_with_eager(monkeypatch):
    """Two eager steps agree exactly; with other weights they do not."""
    monkeypatch.setattr(bench, "COMPILED", ["--compile", "none"])
    record = run_bench("compare", *TINY)
    assert record["agrees"]
    assert record["gradient_error"] == 0 < record["gradient_error_of_rounding"] < 0.01
    monkeypatch.setattr(bench, "COMPILED", ["--seed", "1"])
    record = run_bench("compare", *TINY)
    assert not record["agrees"]
    assert record["gradient_error"] > 1e-3


def test_bench_schedule():
    name = "fine-tuning"
    short = ("--seconds", 0.1, "--warm_up", 1)
    record = run_bench("schedule", "--only", name, *short, *TINY)
    row = record["schedules"][name]
    assert row["steps"] == 20_000
    hours = row["ms_per_step"] * 20_000 / 3.6e6
    assert row["hours"] == pytest.approx(hours)
    assert_one_line(call(bench, "schedule", "--only", "kitti"), "--only kitti")


def test_bench_all_goes_on_after_a_failure():
    """Every part is a process of its own; one that fails or finds no time says so."""
    name = "mono, eager float32"
    record = run_bench("all", "--only", name, *TINY, "--init", "nowhere")
    assert "nowhere" in record["parts"][name]["error"]
    record = run_bench("all", "--only", name, "--limit", 1)
    assert "no time left" in record["parts"][name]["error"]


# ---------------------------------------------------------------- tools/run_jobs.py


@pytest.mark.parametrize(
    "line, lacks",
    (
        ("python train_depth.py --log_dir runs", "--name"),
        ("python train_seg.py --name one", "--log_dir"),
        ("python train_seg.py --log_dir runs --name", "--name"),
        ("python evaluate.py depth --weights runs/one", "--output"),
        ("python evaluate.py depth --output runs/one", "--weights"),
    ),
)
def test_a_job_without_a_place_is_refused(line, lacks):
    with pytest.raises(utils.InputError, match=f"{lacks}.*{line}"):
        run_jobs.read_job(line)


@pytest.mark.parametrize(
    "rest, lacks",
    (
        ("--steps 1e3", "--steps"),
        ("--steps many", "--steps"),
        ("--steps -100", "--steps"),
        ("--init 'my run", "quotation"),
        ('--init "my run', "quotation"),
        ("--init my\\", "escaped"),
    ),
)
def test_a_line_that_cannot_be_read_is_refused(tmp_path, monkeypatch, rest, lacks):
    """Before any job starts."""
    line = f"python train_depth.py --log_dir runs --name one {rest}"
    result = run_lines(monkeypatch, bash_job(tmp_path, "first", "exit 0"), line)
    assert_one_line(result, lacks, rest)
    assert not os.listdir(tmp_path)


def bash_job(log_dir: Path, name: str, command: str) -> str:
    """A line for run_jobs.py that stands for a training."""
    return f"bash -c {shlex.quote(command)} --log_dir {log_dir} --name {name}"


def run_lines(monkeypatch, *lines: str) -> Result:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    return call(run_jobs)


def leaves(folder: Path, text: str) -> str:
    """A command that writes a result."""
    return f"mkdir -p {folder}; echo '{text}' > {folder}/result.json"


@pytest.mark.parametrize("text", (None, "", "{", "3", '{"miou": "high"}'))
def test_a_job_without_a_result_has_failed(tmp_path, monkeypatch, text):
    """Though it ends with code 0; the next one runs."""
    command = "exit 0" if text is None else leaves(tmp_path / "empty", text)
    good = leaves(tmp_path / "good", '{"miou": 12.34}')
    lines = (bash_job(tmp_path, "empty", command), bash_job(tmp_path, "good", good))
    result = run_lines(monkeypatch, *lines)
    assert_one_line(result, "1 jobs failed")
    first, second = result.out.splitlines()
    assert first.startswith(f"[1/2] empty failed: no result in {tmp_path}/empty/result.json")
    assert second == "[2/2] good mIoU 12.3 %"


def test_a_picture_that_is_not_drawn_has_failed(tmp_path, monkeypatch):
    options = f"--output {tmp_path}/grid.png --weights {tmp_path}/run"
    result = run_lines(monkeypatch, f"bash -c true evaluate.py {options}")
    assert_one_line(result, "1 jobs failed")
    assert "no result in" in result.out


def test_a_program_that_does_not_exist_has_failed(tmp_path, monkeypatch):
    """Neither what starts from its run nor a log that cannot be written stops the queue."""
    (tmp_path / "file").touch()
    lines = (
        f"no_such_program --log_dir {tmp_path} --name first",
        bash_job(tmp_path, "heir", "exit 0") + f" --init {tmp_path}/first",
        bash_job(tmp_path / "file", "unlogged", "exit 0"),
        bash_job(tmp_path, "good", leaves(tmp_path / "good", "{}")),
    )
    result = run_lines(monkeypatch, *lines)
    assert_one_line(result, "3 jobs failed")
    rows = result.out.splitlines()
    assert len(rows) == 4
    assert "first failed to start" in rows[0] and "no_such_program" in rows[0]
    assert "heir not run" in rows[1]
    assert "unlogged failed to start" in rows[2]
    assert rows[3] == "[4/4] good"


DIES = "echo ready; for i in {1..300}; do sleep 0.1; done"
SAVES = f'trap "echo INT" INT; trap "echo TERM; exit 75" TERM; {DIES}'


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT))
def test_a_job_hears_of_a_signal_once(tmp_path, number):
    """A terminal sends it to the whole group; "saved" is said of those alone that say so."""
    lines = (bash_job(tmp_path, "saves", SAVES), bash_job(tmp_path, "dies", DIES))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "run_jobs.py"), "--jobs", "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # ignored in the background
    )
    process.stdin.write("\n".join(lines))
    process.stdin.close()
    process.stdin = None
    logs = [tmp_path / "logs" / f"{name}.txt" for name in ("saves", "dies")]
    while not all(log.exists() and "ready" in log.read_text() for log in logs):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert logs[0].read_text().split() == ["ready", "TERM"]
    assert "stopped, saved: saves" in errors
    assert "stopped, exit code -15: dies" in errors


def test_no_job_outlives_the_queue(tmp_path, monkeypatch):
    """Whatever error it ends by."""

    def broken(job: run_jobs.Job) -> None:
        raise RuntimeError(job.name)

    lines = (bash_job(tmp_path, "short", "exit 0"), bash_job(tmp_path, "long", "sleep 60"))
    jobs = [run_jobs.read_job(line) for line in lines]
    queue = run_jobs.Queue(jobs, 2)
    monkeypatch.setattr(queue, "finish", broken)
    with pytest.raises(RuntimeError, match="short"):
        queue.run()
    assert jobs[1].process.poll() == -signal.SIGTERM
