"""The training step: one graph that never waits for a device; and what a run says of itself.

    python -m pytest tests/test_step.py
"""

import argparse
import contextlib
import shutil
import sys
from functools import partial

import pytest
import torch
from conftest import (
    PRETRAINING,
    SMALL,
    assert_one_line,
    call,
    frames_run,
    read_json,
    read_log,
    smooth_images,
    write_frames,
    write_image,
)

import batches
import losses
import metrics
import train_depth
import train_seg
import utils

# ------------------------------------------------------------ the step as one function


def step_arguments(kind: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """An objective and a random batch for it, as train_depth.py and train_seg.py make them."""
    device = torch.device("cpu")
    size = ["--height", "64", "--width", "96", "--batch_size", "2"]
    generator = torch.Generator().manual_seed(0)
    if kind == "segmentation":
        args = train_seg.parse_options([*size, "--jitter", "0.5"])
        objective, _ = train_seg.build(args, 19, device)
        label = torch.randint(0, 19, (2, 64, 96), generator=generator)
        image = torch.rand(2, 3, 64, 96, generator=generator)
        jitter = torch.rand(2, 5, generator=generator)
        return objective, {"image": image, "label": label, "jitter": jitter}

    task = [str(option) for option in PRETRAINING[kind][0][:2]]
    args = train_depth.parse_options([*size, *task])
    objective, _ = train_depth.build(args, device)
    count = len(args.frame_ids) + ("stereo" in kind)
    K = torch.tensor([[56.0, 0, 47.5], [0, 56, 31.5], [0, 0, 1]])
    stereo_T = torch.eye(4)
    stereo_T[0, 3] = 0.5
    batch = {
        "frames": torch.rand(2, count, 3, 64, 96, generator=generator),
        "depth": 1 + 50 * torch.rand(2, 1, 64, 96, generator=generator),
        "K": K.repeat(2, 1, 1),
        "stereo_T": stereo_T.repeat(2, 1, 1),
    }
    train_depth.add_draws(batch, args, step=0)
    return objective, batch


def loss_and_gradients(
    step, objective: torch.nn.Module, batch: dict
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    objective.zero_grad()
    terms, _ = step(batch)
    terms["loss"].backward()
    gradients = [
        parameter.grad.clone() for parameter in objective.parameters() if parameter.grad is not None
    ]
    return terms["loss"].detach(), gradients


KINDS = ("mono+stereo", "depth", "flow", "reconstruction", "segmentation")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_one_graph(kind):
    """torch.compile traces networks and loss without a break; loss and gradients stay what they are."""
    objective, batch = step_arguments(kind)
    traced = torch.compile(objective, backend="aot_eager", fullgraph=True)
    expected, gradients = loss_and_gradients(objective, objective, batch)
    loss, again = loss_and_gradients(traced, objective, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert len(again) == len(gradients) > 50
    difference = sum((ours - theirs).square().sum() for ours, theirs in zip(again, gradients))
    norm = sum(theirs.square().sum() for theirs in gradients)
    assert difference.sqrt() < 1e-4 * norm.sqrt()


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_device(monkeypatch, kind):
    """The meta device has no numbers: a step that asks for one fails, as it would wait for a GPU."""
    objective, batch = step_arguments(kind)
    # the meta device has no autocast either
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    objective.autocast = contextlib.nullcontext
    batch = {key: value.to("meta") for key, value in batch.items()}
    terms, _ = objective.to("meta")(batch)
    terms["loss"].backward()


@pytest.mark.parametrize("kind", ("mono+stereo", "segmentation"))
def test_bfloat16_reaches_neither_heads_nor_losses(kind):
    """--amp bf16: networks in bfloat16; outputs and losses in float32, close to those without."""
    objective, batch = step_arguments(kind)
    exact, exact_views = objective(batch)
    objective.autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    terms, views = objective(batch)
    assert terms["loss"].dtype == torch.float32
    torch.testing.assert_close(terms["loss"], exact["loss"], rtol=0.03, atol=0)
    values = views if kind == "segmentation" else views["depth"]
    expected = exact_views if kind == "segmentation" else exact_views["depth"]
    assert not torch.equal(values, expected)
    assert values.dtype == torch.float32
    assert len(values.unique()) > 0.9 * values.numel()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_training_agrees_with_eager(tmp_path, runs):
    """The generated code as well, in the cheapest task."""
    options = runs.pretraining_options("reconstruction", tmp_path)
    call(train_depth, *options, "--compile", "all", expect=0)
    torch.compiler.reset()
    expected = read_log(runs.pretrained("reconstruction"))
    for ours, theirs in zip(read_log(tmp_path / "reconstruction"), expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    result = call(train_depth, *options, expect=0)  # --compile may change
    assert "finished" in result.out


class TimeOfFrames(torch.nn.Module):
    """A pose network for frames whose grey tells the time: half a metre ahead from one to the next."""

    def forward(self, earlier, later):
        passed = (later - earlier).mean((1, 2, 3))
        assert (passed > 0).all()  # pairs come in temporal order
        rotation = torch.zeros(len(passed), 3)
        translation = torch.zeros(len(passed), 3)
        translation[:, 2] = -5 * passed  # points come nearer
        return rotation, translation


@pytest.mark.parametrize("offsets", ((-1, 1), (1, -1), (-2, 1)))
def test_poses_lead_from_the_target_to_each_source(offsets):
    objective, batch = step_arguments("mono")
    objective.args.frame_ids = [0, *offsets]
    times = 0.5 + 0.1 * torch.tensor([0, *offsets])
    batch["frames"] = times.view(1, 3, 1, 1, 1).expand(2, 3, 3, 64, 96)
    batch["jitter"] = torch.ones(2, 5)  # chooses no sample
    objective.pose = TimeOfFrames()
    _, views = objective(batch)
    expected = -0.5 * torch.tensor(offsets)
    torch.testing.assert_close(views["poses"][:, :, 2, 3], expected.expand(2, 2))


@pytest.mark.parametrize("kind, inputs", (("mono+stereo", 5), ("flow", 2), ("reconstruction", 1)))
def test_networks_see_jittered_frames_and_losses_real_ones(monkeypatch, kind, inputs):
    """Real frames are dark here, and jitter turns them bright."""
    objective, batch = step_arguments(kind)
    batch["frames"] = 0.4 * batch["frames"]
    monkeypatch.setattr(batches, "color_jitter", lambda frames, draws: 1 - frames)
    seen = []
    for network in filter(None, (objective.model, objective.pose)):
        network.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments))
    compared = []

    def recorded(function):
        def record(*arguments, **more):
            compared.extend(filter(torch.is_tensor, arguments))
            return function(*arguments, **more)

        return record

    for name in ("photometric_error", "image_pyramid"):
        monkeypatch.setattr(losses, name, recorded(getattr(losses, name)))
    objective(batch)
    assert len(seen) == inputs  # the other camera is not among them
    for frames in seen:
        assert ((frames >= 0.6) | (frames == batches.NEUTRAL)).all()
    assert compared
    for frames in compared:
        assert frames.max() <= 0.4 + 1e-5


STARTS = {  # metres, or Monodepth2's unit
    "stereo": 17.1,
    "depth": 10.0,
    "stereo --monodepth2": 1.08,
    "mono": 0.2,
}


@pytest.mark.parametrize("words", STARTS)
def test_where_depth_starts(words):
    """Metric training in the middle of its range, others at twice the nearest depth."""
    size = ("--height", "64", "--width", "96")
    options = (*size, "--supervision", *words.split())
    args = train_depth.parse_options(options)
    objective, _ = train_depth.build(args, torch.device("cpu"))
    with torch.no_grad():
        output = objective.eval().model(smooth_images(2, 64, 96))[0]
    depth = losses.disparity_to_depth(output.sigmoid(), args.min_depth, args.max_depth)
    expected = STARTS[words]
    assert expected / 2 < depth.median() < 2 * expected


PRECISIONS = {"auto": torch.float32, "none": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("amp", PRECISIONS)
def test_amp_decides_on_the_precision_of_networks(amp):
    layer = torch.nn.Linear(3, 3)
    with utils.autocast(argparse.Namespace(amp=amp), torch.device("cpu"))():
        assert layer(torch.rand(2, 3)).dtype == PRECISIONS[amp]


# ------------------------------------------------------------ what a run says of itself


def test_a_record_leaves_evaluations_out(monkeypatch):
    """A record is the mean over the steps since the last one, and of their time alone."""
    now = [0.0]
    monkeypatch.setattr(utils.time, "perf_counter", lambda: now[0])
    meter = utils.Meter()
    for loss, evaluation in ((1.0, 100.0), (3.0, 0.0)):
        now[0] += 2
        meter.add({"loss": torch.tensor(loss)}, waited=0.5)
        now[0] += evaluation
        meter.start += evaluation  # as train_seg.py does
    record = meter.record(batch_size=4)
    assert record["loss"] == 2
    assert record["ms_per_step"] == 2000 and record["ms_data"] == 500
    assert record["samples_per_s"] == 2


def test_trouble_is_named():
    depth = torch.linspace(1, 10, 64).view(1, 1, 8, 8)
    still = torch.eye(4).repeat(1, 2, 1, 1)
    moving = still.clone()
    moving[..., 2, 3] = 0.5
    turning = still.clone()
    turning[..., 0, 2] = 0.02
    flat = torch.full_like(depth, 5)
    half = {"masked": torch.tensor(0.5)}
    for terms, views, expected in (
        (half, {"depth": depth, "poses": moving}, set()),
        (half, {"depth": depth, "poses": turning}, set()),
        (half, {"depth": depth, "poses": still}, {"pose"}),
        (half, {"depth": flat, "poses": moving}, {"depth"}),
        ({"masked": torch.tensor(0.9)}, {"depth": depth}, {"masked"}),
        ({"loss": torch.tensor(1.0)}, {}, set()),
        ({}, {"depth": depth, "measured": depth > 9}, set()),
        ({}, {"depth": depth, "measured": depth > 10}, {"measured"}),
    ):
        assert metrics.find_trouble(terms, views).keys() == expected


def test_a_static_camera_is_warned_of_once(tmp_path):
    for number in range(4):
        write_image(tmp_path / "video" / f"{number}.png")
    data = ("--data", "frames", "--data_path", tmp_path / "video", "--fov", 80)
    result = call(
        train_depth, *data, *SMALL, "--steps", 5, "--log_dir", tmp_path, "--name", "still", expect=0
    )
    output = result.out + result.err
    assert output.count("does the camera stand still?") == 1
    warnings = read_json(tmp_path, "still", "result.json")["warnings"]
    assert any("does the camera stand still?" in warning for warning in warnings)


def test_tensorboard_shows_the_log(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_frames(tmp_path / "video", 3)
    call(train_depth, *frames_run(tmp_path, "--steps", 2, "--tensorboard"), expect=0)
    run = tmp_path / "runs" / "run"
    events = accumulator.EventAccumulator(str(run)).Reload()
    for record in read_log(run):
        for key in record.keys() - {"step"}:
            shown = {event.step: event.value for event in events.Scalars(key)}
            assert shown[record["step"]] == pytest.approx(record[key])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused = call(train_depth, *frames_run(tmp_path, "--tensorboard", "--name", "other"))
    assert_one_line(refused, "pip install tensorboard")
