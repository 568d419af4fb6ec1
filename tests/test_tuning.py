"""Fine-tuning: calibration, the release's freezing, the schedule and the optimisers.

    python -m pytest tests/test_tuning.py
"""

import copy

import make_data
import pytest
import torch
from conftest import smooth_images
from make_data import labelled

import networks
import train_seg

CPU = torch.device("cpu")
SIZE = ("--height", "64", "--width", "96", "--batch_size", "2")


def test_calibration_is_the_mean_over_the_training_images(tmp_path):
    """Two batches of the training images; nothing but statistics changes."""
    root = make_data.write_semantics(tmp_path, count=40)
    train_set = labelled("kitti", root, "train", train=True)
    assert len(train_set) == 25  # two batches
    torch.manual_seed(0)
    encoder = networks.build("unet", "resnet18", 19).encoder.eval()
    before = copy.deepcopy(encoder.state_dict())
    train_seg.calibrate_batch_norm(encoder, train_set)
    shown = torch.stack([train_set.load(index)[0] for index in range(25)])
    shown = shown.float() / 255
    with torch.no_grad():
        x = encoder.encoder.conv1(encoder.normalize(shown))
    norm = encoder.encoder.bn1
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)), rtol=0.02, atol=0.02)
    torch.testing.assert_close(norm.running_var, x.var((0, 2, 3)), rtol=0.05, atol=0)
    for name, value in encoder.state_dict().items():
        is_statistic = "running_" in name or name.endswith("num_batches_tracked")
        assert torch.equal(value, before[name]) != is_statistic, name
    for module in encoder.modules():
        assert not module.training
        assert getattr(module, "momentum", 0.1) == 0.1


def test_only_batch_norm_is_frozen():
    """As the release freezes: statistics stay, every weight has a gradient and is in the optimiser."""
    args = train_seg.parse_options([*SIZE, "--freeze_batch_norm_only"])
    objective, _ = train_seg.build(args, 19, CPU)
    encoder = objective.model.encoder
    before = copy.deepcopy(dict(encoder.named_buffers()))
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(19, (2, 64, 96), generator=generator)
    batch = {"image": smooth_images(2, 64, 96), "label": label}
    terms, _ = objective(batch)
    terms["loss"].backward()
    for name, value in encoder.named_buffers():
        assert torch.equal(value, before[name]), name
    for parameter in encoder.parameters():
        assert parameter.grad.abs().sum() > 0
    optimizer = train_seg.make_optimizer(args, objective.model)
    trained = sum(len(group["params"]) for group in optimizer.param_groups)
    assert trained == len(list(objective.model.parameters()))


SCHEDULES = (
    (
        "",
        (1, 0.8535534, 0.5, 0.1464466),  # cosine
    ),
    (
        "--schedule poly",
        (1, 0.75**0.9, 0.5**0.9, 0.25**0.9),
    ),
    (
        "--schedule poly --poly_power 1 --warmup_steps 2",
        (0.5, 0.75, 0.5, 0.25),
    ),
)


@pytest.mark.parametrize("words, shares", SCHEDULES)
def test_the_learning_rate_of_fine_tuning(words, shares):
    options = ("--steps", "4", "--learning_rate", "2e-3")
    args = train_seg.parse_options([*options, *words.split()])
    rates = [train_seg.learning_rate(args, step) / 2e-3 for step in range(4)]
    assert rates == pytest.approx(shares)


OPTIMIZERS = (
    ("", torch.optim.Adam, 0.0),
    ("--optimizer sgd", torch.optim.SGD, 1e-4),
    ("--optimizer adamw", torch.optim.AdamW, 0.05),
    ("--optimizer adamw --weight_decay 0", torch.optim.AdamW, 0.0),
)


@pytest.mark.parametrize("words, kind, decay", OPTIMIZERS)
def test_optimizers_of_fine_tuning(words, kind, decay):
    factor = ("--encoder_learning_rate_factor", "0.1")
    args = train_seg.parse_options([*SIZE, *factor, *words.split()])
    with torch.device("meta"):
        model = networks.build("unet", "resnet18", 19)
    optimizer = train_seg.make_optimizer(args, model)
    assert type(optimizer) is kind
    encoder, decoder = optimizer.param_groups
    assert (encoder["factor"], decoder["factor"]) == (0.1, 1)
    for group, part in ((encoder, model.encoder), (decoder, model.decoder)):
        assert list(map(id, group["params"])) == list(map(id, part.parameters()))
    for group in optimizer.param_groups:
        assert group["weight_decay"] == decay
        assert group.get("momentum", 0.9) == 0.9
