"""From samples to batches: the joint transform by construction, order and draws, jitter, the cache.

    python -m pytest tests/test_data_batches.py
    python -m pytest tests/test_data_batches.py -k cache
"""

import errno
import multiprocessing
import os
import shutil
from pathlib import Path

import make_data
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, smooth_images, truncate
from make_data import (
    assert_refused,
    clips,
    intrinsics,
    labelled,
    numbered,
    options,
    read_first,
)

import datasets
import labels
import losses
from batches import color_jitter, draw_jitter, draw_patches, seed_dropout, train_batches
from images import read_image, resize_depth, resize_intrinsics
from tools import check_data

# ------------------------------------------------------------------------------------ the joint transform


@pytest.mark.parametrize("size", ((94, 310), (32, 96), (47, 155), (96, 320)))
def test_resized_depth_keeps_measured_values(size):
    """Sparse depth is moved, never blended; where two measurements meet, the nearer surface stays."""
    generator = np.random.default_rng(0)
    measured = generator.random((94, 310)) < 0.05
    depth = np.where(measured, generator.uniform(1, 80, (94, 310)), 0).astype(
        np.float32
    )
    resized = resize_depth(depth, *size)
    assert resized.shape == size
    assert set(np.unique(resized)) <= set(np.unique(depth))
    rows, columns = np.nonzero(depth)
    new_rows = (
        np.round((rows + 0.5) * size[0] / 94 - 0.5)
        .astype(int)
        .clip(0, size[0] - 1)
    )
    new_columns = (
        np.round((columns + 0.5) * size[1] / 310 - 0.5)
        .astype(int)
        .clip(0, size[1] - 1)
    )
    assert (resized[new_rows, new_columns] <= depth[rows, columns]).all()
    assert (resized > 0).sum() == len(
        set(zip(new_rows.tolist(), new_columns.tolist()))
    )


@pytest.mark.parametrize("size", ((94, 310), (32, 96), (47, 155), (96, 320)))
def test_resized_depth_lies_where_intrinsics_put_it(size):
    """A measurement moves as resize_intrinsics moves pixels, to the nearest one."""
    generator = np.random.default_rng(0)
    move = resize_intrinsics(np.eye(3), (94, 310), size)
    for _ in range(50):
        row, column = generator.integers((94, 310))
        depth = np.zeros((94, 310), np.float32)
        depth[row, column] = 7
        (new_row,), (new_column,) = resize_depth(depth, *size).nonzero()
        x, y, _ = move @ (column, row, 1)
        assert abs(new_column - x) <= 0.5 + 1e-9
        assert abs(new_row - y) <= 0.5 + 1e-9


def write_marked_scene(root, K, height: int, width: int) -> None:
    """Two points of a scene as coloured discs where K projects them, in three sizes of disc."""
    image = np.full((height, width, 3), 90, np.uint8)
    rows, columns = np.indices((height, width))
    for channel, point in enumerate(MARKS):
        x, y, z = K @ point
        near = (columns - x / z) ** 2 + (rows - y / z) ** 2 <= (
            0.05 * width
        ) ** 2
        image[near] = 0
        image[near, channel] = 255
    make_data.write_array(root / "1.png", image)
    text = " ".join(str(value) for value in K.flat)
    make_data.write_text(root / "intrinsics.txt", text)


MARKS = (np.array([-0.7, -0.3, 2.0]), np.array([1.1, 0.5, 3.0]))


def mark_position(image: torch.Tensor, channel: int) -> list[float]:
    """Where a disc's middle lies, (x, y), from its excess over the other channels. image: (3, H, W)."""
    others = image.sum(0) - image[channel]
    weight = (image[channel] - others).clamp(min=0)
    rows, columns = torch.meshgrid(
        *map(torch.arange, weight.shape), indexing="ij"
    )
    weight = weight / weight.sum()
    return [float((weight * columns).sum()), float((weight * rows).sum())]


@pytest.mark.parametrize("crop", (None, (96, 160)))
@pytest.mark.parametrize("seed", range(3))
def test_the_transform_moves_points_as_it_moves_pixels(tmp_path, crop, seed):
    """Discs drawn at native size lie, after resize, crop and flip, where the batch's K projects them."""
    K = np.array([[300.0, 0, 235], [0, 320, 130], [0, 0, 1]])
    write_marked_scene(tmp_path, K, 270, 480)
    size = ("--height", 144, "--width", 240)
    args = options(
        "frames", tmp_path, *size, crop=crop, batch_size=1, seed=seed, steps=8
    )
    seen = set()
    for batch in collect(args, "0"):
        image = batch["frames"][0, 0]
        mirrored = bool(batch["mirrored"][0])
        seen.add(mirrored)
        for channel, point in enumerate(MARKS):
            if mirrored:
                point = point * [-1, 1, 1]
            x, y, z = batch["K"][0].double().numpy() @ point
            expected = np.array([x / z, y / z])
            from_edge = min(
                *expected, *(np.array(image.shape[:0:-1]) - expected)
            )
            if from_edge > 15:  # the whole disc is seen
                assert mark_position(image, channel) == pytest.approx(
                    expected, abs=0.35
                )
    assert seen == {False, True}


def warp_other_camera(sample: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The other camera's image in the target's view, and which pixels it sees."""
    source = sample["frames"][None, 1]
    geometry = [sample[key][None] for key in ("depth", "K", "stereo_T")]
    return losses.synthesize(source, *geometry)


def test_a_flip_commutes_with_view_synthesis(tmp_path):
    """A stereo pair and its mirror image are warped alike: K, baseline, depth and frames agree."""
    root = make_data.write_kitti(tmp_path, frames=2)
    for number in range(2):
        for side in (2, 3):
            uneven = make_data.picture(seed=side + number)[..., 0].astype(
                np.uint16
            )
            folder = f"{root}/{make_data.DRIVE}/proj_depth/groundtruth/image_0{side}"
            make_data.write_array(
                f"{folder}/{number:010d}.png", 8 * uneven + 700
            )
    args = options("kitti", root, batch_size=4, steps=6)
    dataset = datasets.find_clips(args, ["0", "s"], True)
    mirrored = 0
    for batch in collect(args, "0 s", with_depth=True):
        for row, index in enumerate(batch["index"].tolist()):
            plain = dataset.read(index)
            plain["frames"] = plain["frames"].float() / 255
            warped, seen = warp_other_camera(plain)
            flipped = bool(batch["mirrored"][row])
            ours, ours_seen = warp_other_camera(
                {key: batch[key][row] for key in plain}
            )
            mirrored += flipped
            ours = ours.flip(-1) if flipped else ours
            ours_seen = ours_seen.flip(-1) if flipped else ours_seen
            inner = (seen & ours_seen)[..., 1:-1, 1:-1]
            assert inner.float().mean() > 0.5
            difference = (ours - warped)[..., 1:-1, 1:-1].abs() * inner
            assert difference.max() < 1e-3
    assert 0 < mirrored < 24


@pytest.mark.parametrize("new", ((16, 32), (32, 48), (96, 160)))
def test_intrinsics_follow_the_resized_image(tmp_path, new):
    """A ramp along x keeps, at every size, the ray that K gives its value."""
    ramp = np.tile(np.arange(160, dtype=np.uint8)[None, :, None], (96, 1, 3))
    make_data.write_array(tmp_path / "1.png", ramp)
    make_data.write_text(tmp_path / "intrinsics.txt", "150 150 70 40")
    height, width = (2 * side for side in new)
    size = ("--height", max(64, height), "--width", max(64, width))
    sample = read_first("frames", tmp_path, "0", *size)
    fx, _, cx, _ = intrinsics(sample["K"])
    values = sample["frames"][0, 0, 20].double().numpy()
    ray = (np.arange(len(values)) - cx) / fx
    expected = 70 + 150 * ray
    assert np.abs(values - expected)[4:-4].max() < 0.7
    assert np.abs((values - expected)[4:-4].mean()) < 0.25


def test_a_crop_larger_than_the_image_is_refused(tmp_path):
    root = make_data.write_frames(
        tmp_path / "video", numbered("{}.jpg", range(4))
    )
    args = options("frames", root, crop=(96, 96))
    assert_refused("--crop 96 96", collect, args, "0")


def test_only_rows_between_two_shares_of_the_height_supervise(tmp_path):
    """--depth_rows: the rest of the picture has no depth; a derangement keeps depth from its own image."""
    root = make_data.write_frames(
        tmp_path / "video", numbered("{}.jpg", range(5))
    )
    for number in range(5):
        make_data.write_depth(f"{root}/depth/{number}.png", number + 1)
    middle = clips(
        "frames", root, "0", "--depth_rows", 0.25, 0.75, with_depth=True
    )
    rows = middle.read(0)["depth"][0]
    assert (rows[16:48] == 1).all()
    assert (rows[:16] == 0).all()
    assert (rows[48:] == 0).all()
    shuffled = clips("frames", root, "0", "--shuffle_depth", with_depth=True)
    found = [float(shuffled.read(i)["depth"].mean()) for i in range(5)]
    assert sorted(found) == [1, 2, 3, 4, 5]
    assert all(depth != number for number, depth in enumerate(found, start=1))
    again = clips("frames", root, "0", "--shuffle_depth", with_depth=True)
    assert [float(again.read(i)["depth"].mean()) for i in range(5)] == found


def test_shuffled_depth_is_of_another_moment(tmp_path):
    """Of neither camera: the other one's depth of the same moment would be nearly right."""
    root = make_data.write_kitti(tmp_path)
    for seed in range(5):
        dataset = clips("kitti", root, "0", "--shuffle_depth", seed, with_depth=True)
        for sample in dataset.samples:
            _, number = sample["moment"]
            _, points, *_ = sample["depth"]
            assert int(Path(points).stem) != number


# ------------------------------------------------------------------------------------ batches


CPU = torch.device("cpu")


def collect(
    args, frame_ids="0 -1 1", start: int = 0, with_depth=False
) -> list[dict]:
    """All batches of a training from a step on."""
    dataset = datasets.find_clips(args, frame_ids.split(), with_depth)
    batches = list(train_batches(dataset, args, start, CPU))
    for batch in batches:
        assert batch.pop("waited") >= 0
    return batches


def assert_same_batches(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]), key


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> str:
    """Twelve frames with depth."""
    root = tmp_path_factory.mktemp("video")
    make_data.write_frames(root, numbered("{}.jpg", range(12)))
    for number in range(12):
        make_data.write_depth(root / "depth" / f"{number}.png", number + 1)
    return str(root)


def test_a_batch(video):
    batch = collect(options("frames", video, batch_size=3), with_depth=True)[0]
    assert batch["frames"].shape == (3, 3, 3, 64, 96)
    assert batch["frames"].dtype == torch.float32
    assert 0.5 < batch["frames"].max() <= 1
    assert batch["K"].shape == (3, 3, 3)
    assert batch["depth"].shape == (3, 1, 64, 96)
    assert batch["mirrored"].shape == (3,)
    assert batch["mirrored"].dtype == torch.bool
    args = options("frames", video, batch_size=3, crop=(64, 64))
    cropped = collect(args, with_depth=True)[0]
    assert cropped["frames"].shape == (3, 3, 3, 64, 64)
    assert cropped["depth"].shape == (3, 1, 64, 64)


def test_frames_and_depth_belong_to_the_index(video):
    """Every row holds the files of the sample it names, the target first."""
    args = options("frames", video, batch_size=5, steps=4)
    dataset = datasets.find_clips(args, ["0", "-1", "1"], True)
    for batch in collect(args, with_depth=True):
        for row, index in enumerate(batch["index"].tolist()):
            sample = dataset.read(index)
            frames = sample["frames"].float() / 255
            frames = frames.flip(-1) if batch["mirrored"][row] else frames
            assert torch.equal(batch["frames"][row], frames)
            number = int(Path(dataset.targets()[index]).stem)
            assert batch["depth"][row].unique().tolist() == [number + 1]


def test_the_number_of_workers_changes_nothing(video):
    reference = collect(options("frames", video, steps=6, crop=(64, 64)))
    more = options(
        "frames", video, "--num_workers", "2", steps=6, crop=(64, 64)
    )
    assert_same_batches(reference, collect(more))


@pytest.fixture
def spawning():
    """Processes start as on macOS, which hands over everything pickled."""
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(usual, force=True)


def test_loader_processes_on_any_system(video, spawning):
    reference = collect(options("frames", video, steps=2))
    assert_same_batches(reference, collect(options("frames", video, "--num_workers", "2", steps=2)))
    command = ("--data", "frames", "--data_path", video, "--fov", 60, "--num_workers", 2)
    assert "10 samples" in call(check_data, *command, expect=0).out


def test_too_little_shared_memory_is_refused(video, monkeypatch):
    nothing_free = shutil._ntuple_diskusage(10, 10, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nothing_free)
    args = options("frames", video, "--num_workers", "2")
    assert_refused("/dev/shm.*--num_workers 2 needs.*--shm-size", collect, args)
    assert len(collect(options("frames", video))) == 4


@pytest.mark.parametrize("start", (1, 5, 7))
def test_a_continued_run_sees_what_it_would_have_seen(video, start):
    args = options("frames", video, steps=8, batch_size=4)
    assert_same_batches(collect(args)[start:], collect(args, start=start))


def test_every_epoch_shows_each_sample_once(video):
    args = options("frames", video, steps=20, batch_size=4)
    order = torch.cat([batch["index"] for batch in collect(args)]).tolist()
    epochs = [order[10 * epoch : 10 * epoch + 10] for epoch in range(8)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    other = options("frames", video, steps=20, batch_size=4, seed=1)
    assert (
        torch.cat([batch["index"] for batch in collect(other)]).tolist()
        != order
    )


def test_a_batch_larger_than_the_data_is_refused(video):
    args = options("frames", video, batch_size=11)
    assert_refused("--batch_size 11.*10", collect, args)


def test_processes_share_a_batch(video, monkeypatch):
    """Each of two processes has every other row of what one process has, frames and jitter alike."""
    args = options("frames", video, steps=3, batch_size=4)
    whole = collect(args)
    jitter = draw_jitter(4, 0, 7)
    for number in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(
            torch.distributed, "get_rank", lambda number=number: number
        )
        for batch, share in zip(whole, collect(args), strict=True):
            assert_same_batches(
                [{key: batch[key][number::2] for key in batch}], [share]
            )
        assert torch.equal(draw_jitter(2, 0, 7), jitter[number::2])


def test_samples_are_those_of_the_first_edition(video):
    """Order, flips and crops follow from seed and position as they always did."""
    args = options(
        "frames", video, steps=5, batch_size=4, seed=3, crop=(64, 64)
    )
    position = 0
    for batch in collect(args):
        for row, index in enumerate(batch["index"].tolist()):
            order = np.random.default_rng([3, position // 10, 1]).permutation(
                10
            )
            assert index == order[position % 10]
            draw = np.random.default_rng((3, position))
            assert bool(batch["mirrored"][row]) == (draw.random() < 0.5)
            draw.integers(1)
            left = int(draw.integers(96 - 64 + 1))
            cx = 47.5 - left
            if batch["mirrored"][row]:
                cx = 63 - cx
            assert float(batch["K"][row, 0, 2]) == pytest.approx(cx)
            position += 1


# ------------------------------------------------------------------------------------ jitter and patches


def test_jitter_is_one_draw_a_sample():
    """Frames of a sample that are alike stay alike; about half of the samples change, each in its own way."""
    image = 0.2 + 0.6 * smooth_images(1, 16, 16)
    frames = image[:, None].expand(40, 3, 3, 16, 16).clone()
    jittered = color_jitter(frames, draw_jitter(40, 0, 0))
    for other in (1, 2):
        torch.testing.assert_close(jittered[:, other], jittered[:, 0])
    changed = (jittered != frames).flatten(1).any(1)
    assert 10 < changed.sum() < 30
    looks = jittered[changed][:, 0].flatten(1)[:, :6].unique(dim=0)
    assert len(looks) == changed.sum()
    assert jittered.min() >= 0
    assert jittered.max() <= 1
    again = color_jitter(frames, draw_jitter(40, 0, 0))
    assert torch.equal(again, jittered)
    other = color_jitter(frames, draw_jitter(40, 0, 1))
    assert not torch.equal(other, jittered)
    assert torch.equal(frames, image[:, None].expand(40, 3, 3, 16, 16))


def test_jitter_equals_torchvision():
    """Brightness, contrast, saturation and hue in that order, with the same factors."""
    from torchvision.transforms import functional

    image = smooth_images(1, 16, 16)
    draws = draw_jitter(1, 5, 0)
    ours = color_jitter(image, draws, probability=1.0)
    brightness, contrast, saturation = (
        1 + 0.2 * (2 * draws[0, 1:4] - 1)
    ).tolist()
    hue = float(0.1 * (2 * draws[0, 4] - 1))
    expected = functional.adjust_brightness(image, brightness)
    expected = functional.adjust_contrast(expected, contrast)
    expected = functional.adjust_saturation(expected, saturation)
    expected = functional.adjust_hue(expected, hue)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=0)


def test_dropout_draws_other_numbers_than_jitter():
    """Both follow from seed and step, and must not follow from each other."""
    jitter = draw_jitter(6, 3, 17)
    seed_dropout(3, 17)
    assert not torch.isclose(torch.rand(6, 5), jitter).any()


def test_jitter_draws_are_those_of_the_first_edition():
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 17)
    expected = torch.rand(6, 5, generator=generator)
    assert torch.equal(draw_jitter(6, 3, 17), expected)


@pytest.mark.parametrize(
    "kind, low, high", (("patches", 0.0, 0.02), ("rectangles", 0.01, 0.9))
)
def test_removed_pixels(kind, low, high):
    """A mask a sample, a function of seed and step, of the promised size."""
    shape = (8, 3, 96, 160)
    mask = draw_patches(shape, 0, 5, kind)
    assert mask.shape == (8, 1, 96, 160)
    assert mask.dtype == torch.bool
    shares = mask.float().mean((1, 2, 3))
    assert (shares > low).all()
    assert (shares < high).all()
    assert len({float(share) for share in shares}) > 2
    assert torch.equal(mask, draw_patches(shape, 0, 5, kind))
    assert not torch.equal(mask, draw_patches(shape, 0, 6, kind))


def opened(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What rectangles of this size that fit into a mask (B, 1, H, W) cover: its opening."""
    size = (height, width)
    holds = 1 - F.max_pool2d(1 - mask.float(), size, 1)
    grown = F.pad(holds, (width - 1, width - 1, height - 1, height - 1))
    return F.max_pool2d(grown, size, 1).bool()


def test_shapes_of_removed_pixels():
    """Squares of 7x7, 0.1 to 1 % in all; rectangles of at least a tenth of each side."""
    shape = (64, 3, 96, 160)
    squares = draw_patches(shape, 0, 5, "patches")
    assert torch.equal(opened(squares, 7, 7), squares)
    shares = squares.float().mean((1, 2, 3))
    one = 49 / (96 * 160)
    assert 0.99 * one < shares.min() < 0.005
    assert 0.006 < shares.max() <= 0.01 + one
    rectangles = draw_patches(shape, 0, 5, "rectangles")
    assert torch.equal(opened(rectangles, 9, 16), rectangles)
    assert rectangles.float().mean((1, 2, 3)).max() > 0.3


# ------------------------------------------------------------------------------------ the cache


def assert_same_samples(first, second) -> None:
    assert len(first) == len(second)
    for index in range(len(first)):
        one, other = first.read(index), second.read(index)
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(
                torch.as_tensor(value), torch.as_tensor(other[key])
            ), (index, key)


def cached(path, cache, frame_ids: str = "0", *more, with_depth: bool = False):
    more = ("--cache", cache, *more)
    return clips("frames", path, frame_ids, *more, with_depth=with_depth)


@pytest.mark.parametrize("crop", (None, (64, 64)))
def test_cached_batches_are_the_same_bits(tmp_path, crop):
    """Frames, K, stereo pose and depth, flipped and cropped or not, when the cache is new and when it is old."""
    root = make_data.write_kitti(tmp_path / "kitti")
    args = options("kitti", root, steps=4, crop=crop)
    plain = collect(args, "0 -1 s", with_depth=True)
    args.cache = str(tmp_path / "cache")
    for _ in range(2):
        assert_same_batches(plain, collect(args, "0 -1 s", with_depth=True))


def test_the_cache_follows_its_sources(tmp_path):
    """What is missing is added; a file with another content or time is read again."""
    root = make_data.write_frames(
        tmp_path / "video", numbered("frame{}.jpg", range(6))
    )
    cache = tmp_path / "cache"
    first = ("0", "--frames", "0:4")
    for words in (first, ("0 -1 1",), ("0", "--height", 128), ("0 1",)):
        assert_same_samples(
            clips("frames", root, *words), cached(root, cache, *words)
        )
    make_data.write_image(f"{root}/frame3.jpg", seed=77)
    assert_same_samples(clips("frames", root, "0"), cached(root, cache))
    before = os.stat(f"{root}/frame4.jpg")
    make_data.write_image(f"{root}/frame4.jpg", seed=78)
    os.utime(
        f"{root}/frame4.jpg", ns=(before.st_atime_ns, before.st_mtime_ns + 1)
    )
    assert_same_samples(clips("frames", root, "0"), cached(root, cache))


def test_the_cache_follows_intrinsics_and_depth_scale(tmp_path):
    root = make_data.write_frames(
        tmp_path / "video", numbered("{}.jpg", range(3))
    )
    for number in range(3):
        make_data.write_depth(f"{root}/depth/{number}.png", 4)
    cache = tmp_path / "cache"
    assert (
        float(cached(root, cache, with_depth=True).read(0)["depth"].mean())
        == 4
    )
    again = cached(root, cache, "0", "--depth_scale", "2000", with_depth=True)
    assert float(again.read(0)["depth"].mean()) == 2
    make_data.write_text(f"{root}/intrinsics.txt", "70 70 47.5 31.5")
    assert float(cached(root, cache).read(0)["K"][0, 0]) == 70
    make_data.write_depth(f"{root}/depth/1.png", 6)
    assert (
        float(cached(root, cache, with_depth=True).read(1)["depth"].mean())
        == 6
    )


def test_shuffled_and_cut_depth_from_the_cache(tmp_path):
    root = make_data.write_frames(
        tmp_path / "video", numbered("{}.jpg", range(4))
    )
    for number in range(4):
        make_data.write_depth(f"{root}/depth/{number}.png", number + 1)
    for more in ((), ("--shuffle_depth",), ("--depth_rows", "0.1", "0.7"), ()):
        plain = clips("frames", root, "0", *more, with_depth=True)
        copy = cached(root, tmp_path / "cache", "0", *more, with_depth=True)
        assert_same_samples(plain, copy)


def test_labelled_images_from_the_cache(tmp_path, monkeypatch):
    """Of a set too large for the memory: the same bits; a label that changes is read again."""
    root = make_data.write_semantics(tmp_path / "data", count=6)
    cache = str(tmp_path / "cache")
    monkeypatch.setattr(labels, "IN_MEMORY", 0)
    for _ in range(3):
        plain = labelled("kitti", root, "train", train=True)
        copy = labelled("kitti", root, "train", train=True, cache=cache)
        assert plain.arrays is None
        assert copy.arrays is not None
        assert_same_samples(plain, copy)
        make_data.write_array(plain.pairs[0][1], make_data.blocks((7, 23), 64, 96))


@pytest.mark.parametrize("workers", (0, 2))
def test_large_labelled_sets_are_read_while_training(tmp_path, monkeypatch, workers):
    root = make_data.write_semantics(tmp_path, count=8)
    args = options("kitti", root, "--num_workers", workers)

    def seen() -> list[dict]:
        data = labelled("kitti", root, "train", train=True)
        found = list(train_batches(data, args, 0, CPU))
        for batch in found:
            batch.pop("waited")
        return found

    reference = seen()
    monkeypatch.setattr(labels, "IN_MEMORY", 0)
    assert_same_batches(reference, seen())


def stop_after(monkeypatch, count: int) -> None:
    """Decoding fails like Ctrl-C from a certain image on."""
    read = read_image
    calls = []

    def interrupted(path: str) -> torch.Tensor:
        calls.append(path)
        if len(calls) > count:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(datasets, "read_image", interrupted)


def test_an_interrupted_cache_stays_usable(tmp_path, monkeypatch):
    root = make_data.write_frames(
        tmp_path / "video", numbered("{}.jpg", range(8))
    )
    cache = tmp_path / "cache"
    cached(root, cache, "0", "--frames", "0:3")
    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        cached(root, cache)
    monkeypatch.undo()
    assert_same_samples(clips("frames", root, "0"), cached(root, cache))
    assert_same_samples(clips("frames", root, "0"), cached(root, cache))


def largest_file(folder) -> Path:
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def read_everything(root, cache) -> None:
    dataset = cached(root, cache)
    for index in range(len(dataset)):
        dataset.read(index)


def test_a_damaged_cache_is_refused(tmp_path):
    """Cut short, or with other content than the files: a line that says what to delete."""
    root = make_data.write_frames(
        tmp_path / "video", numbered("{}.jpg", range(6))
    )
    plain = clips("frames", root, "0")
    cached(root, tmp_path / "cache")
    path = largest_file(tmp_path / "cache")
    content = path.read_bytes()
    for damaged in (content[: -64 * 96], bytes(len(content))):
        path.write_bytes(damaged)
        assert_refused(
            "cache.*delete", read_everything, root, tmp_path / "cache"
        )
    path.write_bytes(content)
    assert_same_samples(plain, cached(root, tmp_path / "cache"))
    for text in ("{", "[]"):
        for other in Path(tmp_path / "cache").rglob("*.json"):
            other.write_text(text)
        assert_refused("cache.*delete", read_everything, root, tmp_path / "cache")


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    root = make_data.write_frames(
        tmp_path / "video", numbered("{}.jpg", range(6))
    )
    nothing_free = shutil._ntuple_diskusage(10, 10, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nothing_free)
    assert_refused("cache.*free|free.*cache", cached, root, tmp_path / "cache")


def test_a_disk_that_another_process_fills_is_one_line(tmp_path, monkeypatch):
    """Room is taken before decoding: a memory map that finds none later ends without a word."""
    root = make_data.write_frames(tmp_path / "video", numbered("{}.jpg", range(6)))

    def no_room(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    assert_refused("cache.*No space left", cached, root, tmp_path / "cache")


def test_a_cache_of_broken_files_fails_as_the_files_do(tmp_path):
    """Before the training or when it comes to them, with the same words."""
    root = make_data.write_frames(
        tmp_path / "video", numbered("{}.jpg", range(6))
    )
    truncate(f"{root}/4.jpg", 0.5)
    assert_refused("4.jpg", read_everything, root, tmp_path / "cache")
