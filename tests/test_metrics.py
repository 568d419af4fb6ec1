"""Metrics against restatements, scikit-learn, cityscapesScripts and cases with a known answer."""

import make_data
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import smooth_images, write_png
from torch import nn

import datasets
import metrics
import networks
from labels import CITYSCAPES_CLASSES, CITYSCAPES_IDS
from utils import IGNORE, InputError

CPU = torch.device("cpu")


# ---------------------------------------------------------------- depth


def test_depth_errors_by_hand():
    errors = metrics.depth_errors(np.array([2.0, 4.0]), np.array([4.0, 4.0]))
    expected = {
        "abs_rel": 0.5,
        "sq_rel": 1,
        "rmse": 2**0.5,
        "rmse_log": np.log(2) / 2**0.5,
        "a1": 0.5,
        "a2": 0.5,
        "a3": 0.5,
    }
    assert errors == pytest.approx(expected)
    assert list(errors) == list(metrics.DEPTH_METRICS)
    with pytest.raises(ValueError, match="3"):
        metrics.depth_errors(np.ones(3), np.ones(4))


def test_depth_errors_restated():
    """Pixel by pixel, as the formulas are printed."""
    generator = np.random.default_rng(0)
    measured = generator.uniform(1, 80, 300)
    predicted = measured * generator.uniform(0.5, 2, 300)
    sums = dict.fromkeys(metrics.DEPTH_METRICS, 0.0)
    for truth, guess in zip(measured.tolist(), predicted.tolist()):
        sums["abs_rel"] += abs(truth - guess) / truth
        sums["sq_rel"] += (truth - guess) ** 2 / truth
        sums["rmse"] += (truth - guess) ** 2
        sums["rmse_log"] += (np.log(truth) - np.log(guess)) ** 2
        for power in (1, 2, 3):
            sums[f"a{power}"] += max(truth / guess, guess / truth) < 1.25**power
    expected = {name: value / 300 for name, value in sums.items()}
    expected["rmse"] **= 0.5
    expected["rmse_log"] **= 0.5
    assert metrics.depth_errors(measured, predicted) == pytest.approx(expected)


def scene(height: int = 60, width: int = 80) -> np.ndarray:
    """Smooth depth between 2 and 42 metres, (H, W) float32."""
    rows, columns = np.mgrid[:height, :width]
    return (2 + 20 * (1 + np.sin(rows / 9) * np.cos(columns / 13))).astype(
        np.float32
    )


@pytest.mark.parametrize(
    "scale, distort",
    (
        ("median", lambda inverse: 7 * inverse),
        (3.0, lambda inverse: 3 * inverse),
        ("affine", lambda inverse: 7 * inverse + 0.3),
    ),
)
def test_scaling_undoes_what_it_is_for(scale, distort):
    """A scale of depth by medians or by a factor, scale and shift of 1/depth by least squares."""
    depth = scene()
    scores = metrics.evaluate_depth_image(distort(1 / depth), depth, scale)
    assert scores["abs_rel"] < 1e-4 and scores["a1"] == 1
    wrong = metrics.evaluate_depth_image(distort(1 / depth), depth, 1.0)
    assert wrong["abs_rel"] > 0.1


def test_prediction_is_resized_and_clipped():
    measured = np.full((60, 80), 50, np.float32)
    scores = metrics.evaluate_depth_image(
        np.full((6, 8), 0.001, np.float32), measured, 1.0
    )
    assert scores["rmse"] == pytest.approx(30)  # 1000 m count as the cap, 80 m
    assert scores["ratio"] == pytest.approx(0.05)
    assert (
        metrics.evaluate_depth_image(
            np.ones((4, 6), np.float32), np.zeros((40, 60), np.float32)
        )
        == {}
    )


def test_only_the_crop_and_the_range_count():
    inverse = np.full((100, 200), 0.1, np.float32)
    measured = np.zeros((100, 200), np.float32)
    assert metrics.garg_crop(100, 200) == (40, 99, 7, 192)
    measured[40, 7] = 10  # the first pixel inside
    measured[98, 191] = 10  # the last one
    for row, column in ((39, 7), (40, 6), (99, 191), (98, 192)):
        measured[row, column] = 20
    measured[60, 60] = 90  # beyond the cap
    scores = metrics.evaluate_depth_image(inverse, measured, 1.0)
    assert scores["pixels"] == 2 and scores["abs_rel"] == pytest.approx(
        0, abs=1e-6
    )
    everything = metrics.evaluate_depth_image(inverse, measured, 1.0, crop=None)
    assert everything["pixels"] == 7 and everything["abs_rel"] > 0.3


def test_nyu_crop():
    """Rows 45 to 470 and columns 41 to 600 of 640x480, as Eigen et al. published them."""
    measured = np.zeros((480, 640), np.float32)
    measured[45:471, 41:601] = 5
    inside = int((measured > 0).sum())
    measured[measured == 0] = 9
    inverse = np.full((48, 64), 0.2, np.float32)
    scores = metrics.evaluate_depth_image(
        inverse, measured, 1.0, 1e-3, 10.0, "nyu"
    )
    assert scores["pixels"] == inside == 426 * 560
    assert scores["abs_rel"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="320x240"):
        metrics.evaluate_depth_image(
            inverse, np.ones((240, 320), np.float32), 1.0, crop="nyu"
        )


def test_summary_is_the_mean_over_images():
    rows = []
    for ratio, error in ((1.0, 0.1), (2.0, 0.2), (3.0, 0.6)):
        rows.append(
            {"ratio": ratio, **dict.fromkeys(metrics.DEPTH_METRICS, error)}
        )
    summary = metrics.summarise_depth(rows)
    assert summary["abs_rel"] == summary["a3"] == pytest.approx(0.3)
    assert summary["images"] == 3 and summary["ratio_median"] == 2
    assert summary["ratio_deviation"] == pytest.approx(np.std([0.5, 1, 1.5]))


def test_constant_depth():
    """Per-pixel median; gaps along the row, empty rows from below, the lowest from above."""
    a, b, c = (np.zeros((4, 3), np.float32) for _ in range(3))
    a[1] = (10, 0, 30)
    b[1] = (12, 0, 30)
    c[1] = (20, 0, 0)
    a[2] = (5, 5, 5)
    picture = metrics.constant_depth([a, b, c])
    assert picture.tolist() == [[12, 21, 30], [12, 21, 30], [5, 5, 5], [5, 5, 5]]
    with pytest.raises(InputError, match="measured"):
        metrics.constant_depth([np.zeros((4, 3))])


# ---------------------------------------------------------------- segmentation


def test_confusion_matrix_by_hand():
    label = torch.tensor([[0, 0, 1, 1], [2, 2, 255, 255]])
    prediction = torch.tensor([[0, 1, 1, 1], [2, 0, 0, 1]])
    confusion = metrics.confusion_matrix(label, prediction, 4)
    assert confusion.tolist() == [
        [1, 1, 0, 0],
        [0, 2, 0, 0],
        [1, 0, 1, 0],
        [0, 0, 0, 0],
        [1, 1, 0, 0],
    ]
    scores = metrics.segmentation_scores(confusion)
    assert scores["pixel_accuracy"] == pytest.approx(100 * 4 / 6)
    assert scores["iou"][:3] == pytest.approx([100 / 3, 200 / 3, 50])
    assert np.isnan(scores["iou"][3])  # occurs nowhere
    assert scores["miou"] == pytest.approx(50)
    absent = metrics.confusion_matrix(label, prediction.where(label != 2, 3), 4)
    expected = (
        50 + 200 / 3 + 0
    ) / 3  # class 3, which no label shows, does not count
    assert metrics.segmentation_scores(absent)["miou"] == pytest.approx(expected)


def random_maps(
    seed: int, classes: int, shape: tuple = (3, 20, 30)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels with a tenth ignored, and predictions of which half are right."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, shape, generator=generator)
    guess = torch.randint(0, classes, shape, generator=generator)
    right = torch.rand(shape, generator=generator) < 0.5
    ignored = torch.rand(shape, generator=generator) < 0.1
    return label.masked_fill(ignored, IGNORE), torch.where(right, label, guess)


@pytest.mark.parametrize("seed", range(3))
def test_segmentation_scores_equal_scikit_learn(seed):
    reference = pytest.importorskip("sklearn.metrics")
    label, prediction = random_maps(seed, 7)
    counted = label != IGNORE
    truth = label[counted].numpy()
    guess = prediction[counted].numpy()
    confusion = sum(
        metrics.confusion_matrix(a, b, 7) for a, b in zip(label, prediction)
    )
    assert (
        confusion[:7].numpy()
        == reference.confusion_matrix(truth, guess, labels=range(7))
    ).all()
    scores = metrics.segmentation_scores(confusion)
    assert scores["iou"] == pytest.approx(
        100 * reference.jaccard_score(truth, guess, average=None)
    )
    assert scores["miou"] == pytest.approx(
        100 * reference.jaccard_score(truth, guess, average="macro")
    )
    assert scores["pixel_accuracy"] == pytest.approx(
        100 * reference.accuracy_score(truth, guess)
    )


def test_predictions_on_ignored_pixels_change_no_score():
    label, prediction = random_maps(0, 5)
    other = torch.where(label == IGNORE, (prediction + 1) % 5, prediction)
    first, second = (
        metrics.confusion_matrix(label, guess, 5) for guess in (prediction, other)
    )
    assert not torch.equal(first, second)
    assert metrics.segmentation_scores(first) == metrics.segmentation_scores(
        second
    )


@pytest.mark.parametrize(
    "label, prediction",
    (
        (torch.zeros(4, 6), torch.zeros(6, 4)),
        (torch.full((4, 6), 3), torch.zeros(4, 6)),
        (torch.zeros(4, 6), torch.full((4, 6), 3)),
        (torch.full((4, 6), -1), torch.zeros(4, 6)),
        (torch.zeros(4, 6), torch.full((4, 6), 255)),
    ),
    ids=("size", "label", "prediction", "negative", "ignored prediction"),
)
def test_confusion_matrix_refuses(label, prediction):
    with pytest.raises(ValueError):
        metrics.confusion_matrix(label.long(), prediction.long(), 3)


def release_restated(label: np.ndarray, prediction: np.ndarray) -> float:
    """The release's score of one image from its description, one class after the other."""
    scores = []
    for raw in (7, 8, 11, 21, 22, 23, 26):  # its seven classes
        train = CITYSCAPES_IDS.index(raw)
        true_positive = np.sum((prediction == train) & (label == train))
        false_positive = np.sum(
            (prediction == train) & (label != train)
        )  # on unlabelled pixels as well
        false_negative = np.sum((prediction != train) & (label == train))
        union = true_positive + false_positive + false_negative
        if union > 0:
            scores.append(true_positive / union)
    return 100 * float(np.mean(scores))


@pytest.mark.parametrize("seed", range(3))
def test_release_score_restated(seed):
    label, prediction = random_maps(seed, 19, (40, 60))
    if seed:  # few classes, so that some are predicted only
        label = label.clamp(max=8).where(label != IGNORE, IGNORE)
    ours = metrics.release_score(metrics.confusion_matrix(label, prediction, 19))
    assert ours == pytest.approx(
        release_restated(label.numpy(), prediction.numpy())
    )


def test_release_score_by_hand():
    """Road: 2 of 4 pixels agree, one prediction falls on unlabelled; car: predicted, absent."""
    label = torch.tensor([[0, 0, 0, 255]])
    prediction = torch.tensor([[0, 0, 13, 0]])
    confusion = metrics.confusion_matrix(label, prediction, 19)
    assert metrics.release_score(confusion) == pytest.approx(
        100 * (2 / 4 + 0) / 2
    )


# ---------------------------------------------------------------- evaluation of a segmenter


class ColourClassifier(nn.Module):
    """Logits that are a linear function of a pixel's colour; remembers the batches that it saw."""

    def __init__(self, classes: int = 19):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, classes, 1)
        self.batches = []

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.batches.append(tuple(images.shape))
        return [4 * self.layer(images)]


def labelled_images(tmp_path, count: int = 20) -> datasets.Labelled:
    """KITTI's layout, 36 % for evaluation, at the size of the files."""
    root = make_data.write_semantics(tmp_path, count, ids=(0, 7, 8, 23, 26))
    return make_data.labelled("kitti", root, "val")


def test_segmenter_is_scored_over_all_pixels(tmp_path):
    """The files have the network's size here, so logits can be compared directly."""
    dataset = labelled_images(tmp_path)
    model = ColourClassifier()
    scores = metrics.evaluate_segmentation(model, dataset, CPU)
    images, labels = zip(*(dataset.native(i) for i in range(len(dataset))))
    label = torch.stack(labels)
    logits = model(torch.stack(images).float() / 255)[0].detach()
    assert scores["cross_entropy"] == pytest.approx(
        F.cross_entropy(logits, label, ignore_index=255).item(), rel=1e-5
    )
    prediction = logits.argmax(1)
    right = (prediction == label)[label != IGNORE].double().mean()
    assert scores["pixel_accuracy"] == pytest.approx(100 * right.item())
    release = [
        release_restated(a.numpy(), b.numpy()) for a, b in zip(label, prediction)
    ]
    assert scores["release_miou"] == pytest.approx(np.mean(release))
    assert scores["images"] == len(dataset)
    assert list(scores["iou"]) == list(CITYSCAPES_CLASSES)


def test_a_data_set_without_any_label_has_no_score(tmp_path):
    """No mean over no class; one that is too large to be read beforehand gets here."""
    root = make_data.write_camvid(tmp_path, ids=(11,))
    dataset = make_data.labelled("camvid", root, "val")
    with pytest.raises(InputError, match="valannot: no evaluated pixel is labelled"):
        metrics.evaluate_segmentation(ColourClassifier(11), dataset, CPU)


def test_batches_have_one_size_and_no_image_counts_twice(tmp_path, monkeypatch):
    dataset = labelled_images(tmp_path)
    assert len(dataset) == 8
    model = ColourClassifier()
    whole = metrics.evaluate_segmentation(model, dataset, CPU)
    assert model.batches == [(8, 3, 64, 96)]
    model.batches.clear()
    monkeypatch.setattr(metrics, "EVALUATION_PIXELS", 3 * 64 * 96)
    parts = metrics.evaluate_segmentation(model, dataset, CPU)
    assert model.batches == [(3, 3, 64, 96)] * 3
    assert parts.pop("cross_entropy") == pytest.approx(
        whole.pop("cross_entropy"), rel=1e-6
    )
    np.testing.assert_equal(parts, whole)


def test_modes_and_statistics_stay(tmp_path):
    dataset = labelled_images(tmp_path, 4)
    model = networks.build("unet", "resnet18", 19).train()
    model.encoder.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    metrics.evaluate_segmentation(model, dataset, CPU)
    assert model.training and model.decoder.training
    assert not any(module.training for module in model.encoder.modules())
    assert all(
        torch.equal(value, before[key])
        for key, value in model.state_dict().items()
    )


@pytest.mark.parametrize(
    "height, width", ((64, 96), (65, 200), (150, 97))
)
def test_windows_cover_an_image_and_are_averaged(height, width):
    """A pointwise network gives the same; the fourth channel numbers the windows."""
    window = (64, 96)
    image = smooth_images(1, height, width)
    calls = []

    def forward(part):
        assert part.shape[2:] == window
        calls.append(part)
        return torch.cat([part, torch.full_like(part[:, :1], len(calls))], 1)

    logits = metrics.slide(forward, image, window)
    torch.testing.assert_close(logits[:, :3], image)
    assert len(calls) == np.prod(
        [1 + np.ceil((a - b) / (2 / 3 * b)) for a, b in zip((height, width), window)]
    )
    assert logits[0, 3, 0, 0] == 1 and logits[0, 3, -1, -1] == len(
        calls
    )  # corners: one window each
    if (height, width) == (65, 200):  # two rows of windows, three columns of them
        assert logits[0, 3, 32, 70] == np.mean([1, 2, 4, 5])


def test_windows_and_flips_of_a_pointwise_network_change_nothing(tmp_path):
    dataset = labelled_images(tmp_path, 6)
    model = ColourClassifier()
    whole = metrics.evaluate_segmentation(model, dataset, CPU)
    for options in ({"window": (64, 96)}, {"window": (32, 64)}, {"flip": True}):
        scores = metrics.evaluate_segmentation(model, dataset, CPU, **options)
        assert scores["cross_entropy"] == pytest.approx(
            whole["cross_entropy"], rel=1e-5
        )
        assert scores["miou"] == pytest.approx(whole["miou"], abs=0.1)


def test_windows_see_images_of_the_size_that_trained(tmp_path):
    """Windows are cut from images as training resizes them, not from the files."""
    dataset = labelled_images(tmp_path, 6)
    dataset.size = (32, 96)
    seen = []

    def forward(images):
        seen.append(tuple(images.shape[2:]))
        return [torch.zeros(len(images), 19, *images.shape[2:])]

    model = ColourClassifier()
    model.forward = forward
    metrics.evaluate_segmentation(model, dataset, CPU, window=(32, 48))
    assert seen == 3 * len(dataset) * [(32, 48)]  # three windows, spread over the width


def test_flip_averages_with_the_mirrored_image(tmp_path):
    dataset = labelled_images(tmp_path, 6)
    torch.manual_seed(0)
    model = networks.build("unet", "resnet18", 19)
    images, labels = zip(*(dataset.native(i) for i in range(len(dataset))))
    images = torch.stack(images).float() / 255
    with torch.no_grad():
        logits = (
            model.eval()(images)[0] + model(images.flip(-1))[0].flip(-1)
        ) / 2
    expected = F.cross_entropy(
        logits, torch.stack(labels), ignore_index=255
    ).item()
    scores = metrics.evaluate_segmentation(model, dataset, CPU, flip=True)
    assert scores["cross_entropy"] == pytest.approx(expected, rel=1e-4)


def test_scores_equal_cityscapes_own_evaluation(tmp_path, monkeypatch):
    """IoU by class of a network's predictions, against cityscapesScripts on raw ids."""
    path = "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"
    scripts = pytest.importorskip(
        path, reason="needs pip install cityscapesscripts", exc_type=ImportError
    )
    dataset = labelled_images(tmp_path)
    raw_ids = np.array(CITYSCAPES_IDS, np.uint8)
    predictions = []
    count = metrics.confusion_matrix

    def record(label, prediction, classes):
        file = tmp_path / f"{len(predictions)}.png"
        predictions.append(write_png(file, raw_ids[prediction[0]]))
        return count(label, prediction, classes)

    monkeypatch.setattr(metrics, "confusion_matrix", record)
    scores = metrics.evaluate_segmentation(ColourClassifier(), dataset, CPU)
    arguments = scripts.args
    arguments.evalInstLevelScore = arguments.evalPixelAccuracy = (
        arguments.JSONOutput
    ) = False
    arguments.quiet = True
    result = scripts.evaluateImgLists(
        predictions, [label for _, label in dataset.pairs], arguments
    )
    shown = [name for name, iou in scores["iou"].items() if not np.isnan(iou)]
    assert len(shown) == 4
    for name in shown:
        assert scores["iou"][name] == pytest.approx(
            100 * result["classScores"][name]
        )


# ---------------------------------------------------------------- what is not finite


def test_inverse_depth_of_zero_is_far():
    """DPT's relu may end in 0 at most pixels: scores stay numbers."""
    measured = np.full((64, 96), 5.0, np.float32)
    inverse = np.zeros((64, 96), np.float32)
    inverse[:20] = 0.2
    for scale in ("median", "affine", 1.0):
        scores = metrics.evaluate_depth_image(inverse, measured, scale, crop=None)
        assert all(np.isfinite(value) for value in scores.values())


def test_the_term_that_is_not_finite_is_named():
    """The loss is, too, as their sum."""
    terms = {name: torch.tensor(1.0) for name in ("photometric", "smoothness", "loss")}
    terms["smoothness"] = terms["loss"] = torch.tensor(torch.nan)
    with pytest.raises(SystemExit, match="stopped: smoothness is not finite by step 3"):
        metrics.refuse_nonfinite(terms, nn.Linear(1, 1), 3, torch.tensor([0]))
