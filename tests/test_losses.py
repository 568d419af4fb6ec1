"""The losses by construction: scenes and images whose answer is known, and plain restatements.

    python -m pytest tests/test_losses.py
    python -m pytest tests/test_losses.py -m "not slow"  # without code generation
"""

import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import smooth_images

import losses
from losses import PhotometricLoss

HEIGHT, WIDTH = 32, 64  # of most images here


def assert_close(ours, expected, relative=2e-5, absolute=2e-6):
    expected = torch.as_tensor(expected, dtype=ours.dtype)
    torch.testing.assert_close(ours, expected, rtol=relative, atol=absolute)


def relative_distance(ours, expected):
    """L2 distance relative to the expected norm: single pixels may take another subgradient."""
    distance = (ours - expected).norm()
    return float(distance / expected.norm())


def image(seed=0):
    """(1, 3, 32, 64)."""
    return smooth_images(1, HEIGHT, WIDTH, seed)


def images(seed=0):
    """Two of them, (2, 3, 32, 64)."""
    return smooth_images(2, HEIGHT, WIDTH, seed)


def constant(value, height=HEIGHT, width=WIDTH):
    return torch.full((1, 1, height, width), value)


def inner(x):
    """A map without its border, where something may come from outside."""
    return x[..., 8:-8, 8:-8]


def random_depth():
    """Between 2 and 22 m, (1, 1, 32, 64)."""
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(1, 1, HEIGHT, WIDTH, generator=generator)
    return 2 + 20 * uniform


def camera(focal=40.0):
    """K (1, 3, 3) with the principal point off the middle."""
    rows = [
        [focal, 0, 30],
        [0, 1.1 * focal, 17],
        [0, 0, 1],
    ]
    return torch.tensor(rows)[None]


def shift(x=0.0, y=0.0, z=0.0):
    """T (1, 4, 4) of a translation."""
    T = torch.eye(4)
    T[:3, 3] = torch.tensor([x, y, z])
    return T[None]


def general_pose():
    """T (1, 4, 4) of a translation and a rotation about all axes."""
    axisangle = torch.tensor([[0.02, -0.1, 0.05]])
    translation = torch.tensor([[0.3, -0.2, 0.4]])
    return losses.pose_to_matrix(axisangle, translation)


def pixels_of(height, width):
    """Every pixel's own position, (2, H, W), x then y."""
    y = torch.arange(height)
    x = torch.arange(width)
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y]).float()


def homogeneous_pixels(height, width):
    """(3, H * W): x, y, 1."""
    pixels = pixels_of(height, width).flatten(1)
    return F.pad(pixels, (0, 0, 0, 1), value=1.0)


# ------------------------------------------------------------------------------- means, scales


def test_masked_mean():
    values = torch.tensor([[1.0, 2.0], [3.0, 10.0]])
    mask = torch.tensor([[True, False], [True, False]])
    assert losses.masked_mean(values, mask) == 2
    by_row = losses.masked_mean(values, mask, (1,))
    assert by_row.tolist() == [1, 3]


def test_masked_mean_of_an_empty_mask():
    values = torch.ones(2, 2)
    assert losses.masked_mean(values, values > 1) == 0


def test_fine_scales_weigh_more():
    values = torch.tensor([7.0, 14.0, 28.0])
    mean = losses.mean_over_scales(values)
    assert_close(mean, (7 + 14 / 2 + 28 / 4) / 1.75)


def test_image_pyramid():
    pyramid = losses.image_pyramid(image(), 3)
    sizes = [tuple(level.shape[2:]) for level in pyramid]
    assert sizes == [(32, 64), (16, 32), (8, 16)]
    for level in pyramid:
        assert_close(level.mean(), image().mean())


# ------------------------------------------------------------------------------- geometry


def depth_to_disparity(depth, min_depth, max_depth):
    return (1 / depth - 1 / max_depth) / (1 / min_depth - 1 / max_depth)


def test_disparity_to_depth():
    disparity = torch.tensor([0.0, 0.5, 1.0])
    depth = losses.disparity_to_depth(disparity, 0.5, 50)
    assert_close(depth, [50, 1 / 1.01, 0.5])


def test_inverse_pose():
    generator = torch.Generator().manual_seed(0)
    axisangle = 2 * torch.randn(16, 3, generator=generator)
    translation = torch.randn(16, 3, generator=generator)
    there = losses.pose_to_matrix(axisangle, translation)
    back = losses.pose_to_matrix(axisangle, translation, invert=True)
    identity = torch.eye(4).expand(16, 4, 4)
    assert_close(there @ back, identity, absolute=1e-5)


def test_pose_of_a_quarter_turn():
    about_z = torch.tensor([[0, 0, torch.pi / 2]])
    translation = torch.tensor([[1.0, 2, 3]])
    T = losses.pose_to_matrix(about_z, translation)[0]
    point = torch.tensor([1.0, 0, 0, 1])
    assert_close(T @ point, [1, 3, 3, 1])


def test_pose_has_a_gradient_at_rest():
    still = torch.zeros(1, 3, requires_grad=True)
    T = losses.pose_to_matrix(still, torch.zeros(1, 3))
    T.sum().backward()
    assert still.grad.isfinite().all()


def test_projection_is_the_textbook_formula():
    depth = random_depth()
    K = camera()
    T = general_pose()
    pixels, z = losses.project(depth, K, T)
    rays = K[0].inverse() @ homogeneous_pixels(HEIGHT, WIDTH)
    points = depth.view(1, -1) * rays
    rotation, translation = T[0, :3].split((3, 1), 1)
    points = rotation @ points + translation
    projected = K[0] @ points
    expected = projected[:2] / projected[2]
    assert_close(pixels.view(-1, 2).T, expected, absolute=1e-4)
    assert_close(z.view(-1), points[2], absolute=1e-5)


def test_projection_there_and_back():
    """A plane from two places: the way back, sampled where a pixel landed, ends where it began."""
    T = shift(x=0.2, y=-0.1, z=0.5)
    depth = constant(4.0)
    there, z = losses.project(depth, camera(), T)
    assert_close(z, depth + 0.5)
    back, _ = losses.project(z, camera(), T.inverse())
    back = back.permute(0, 3, 1, 2)
    ended, inside = losses.sample(back, there)
    began = pixels_of(HEIGHT, WIDTH)
    difference = (ended - began).abs() * inside
    assert inside.float().mean() > 0.8
    assert difference.max() < 1e-3


def test_identity_pose_warps_an_image_to_itself():
    depth = random_depth()
    warped, seen = losses.synthesize(image(), depth, camera(), shift())
    assert_close(warped, image(), absolute=1e-4)
    assert seen.all()


@pytest.mark.parametrize("disparity", (6, -6))
def test_a_plane_shifts_by_focal_length_times_baseline_over_depth(disparity):
    """A camera `baseline` to the right sees it `disparity` pixels to the left."""
    z = 5.0
    baseline = disparity * z / 40
    target = image()
    source = target.roll(-disparity, 3)
    T = shift(x=-baseline)
    warped, seen = losses.synthesize(source, constant(z), camera(40), T)
    assert_close(inner(warped), inner(target), absolute=1e-3)
    landed = torch.arange(WIDTH) - disparity
    inside = (landed >= 0) & (landed < WIDTH)
    assert torch.equal(seen[0, 0, 5], inside)


def test_synthesis_commutes_with_flips():
    """Mirrored image, depth, K and motion give the mirrored view."""
    depth = random_depth()
    K = camera()
    T = general_pose()
    warped, seen = losses.synthesize(image(), depth, K, T)

    mirror = torch.diag(torch.tensor([-1.0, 1, 1, 1]))
    T = mirror @ T @ mirror
    K[:, 0, 2] = WIDTH - 1 - K[:, 0, 2]
    source = image().flip(-1)
    depth = depth.flip(-1)
    flipped, flipped_seen = losses.synthesize(source, depth, K, T)
    assert_close(flipped, warped.flip(-1), absolute=1e-3)
    differs = flipped_seen != seen.flip(-1)
    assert differs.float().mean() < 1e-2  # at the image's border, rounding decides


WHERE = {"division by zero": -1e-7, "in the camera's plane": 0.0, "behind": -2.0}


@pytest.mark.parametrize("where", WHERE)
def test_gradients_are_finite_wherever_a_point_is(where):
    depth = constant(0.0).requires_grad_()
    T = shift(z=WHERE[where]).requires_grad_()
    warped, seen = losses.synthesize(image(), depth, camera(), T)
    assert not seen.any()
    warped.sum().backward()
    assert depth.grad.isfinite().all()
    assert T.grad.isfinite().all()


# -------------------------------------------------------------- photometric error, smoothness


def plain_ssim_error(x, y):
    """SSIM as in the literature, by average pooling."""
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    y = F.pad(y, (1, 1, 1, 1), mode="reflect")
    mean_x = F.avg_pool2d(x, 3, 1)
    mean_y = F.avg_pool2d(y, 3, 1)
    variance_x = F.avg_pool2d(x**2, 3, 1) - mean_x**2
    variance_y = F.avg_pool2d(y**2, 3, 1) - mean_y**2
    covariance = F.avg_pool2d(x * y, 3, 1) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
    means = mean_x**2 + mean_y**2 + 1e-4
    variances = variance_x + variance_y + 9e-4
    error = (1 - numerator / (means * variances)) / 2
    return error.clamp(0, 1)


def plain_photometric_error(x, y):
    l1 = (x - y).abs()
    error = 0.85 * plain_ssim_error(x, y) + 0.15 * l1
    return error.mean(1, keepdim=True)


def test_ssim_of_an_image_with_itself():
    error = losses.ssim_error(images(), images())
    assert error.max() < 1e-5


def test_ssim_is_the_formula_of_the_literature():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 16, 24, generator=generator)
    y = torch.rand(2, 3, 16, 24, generator=generator)
    error = losses.ssim_error(x, y)
    assert_close(error, plain_ssim_error(x, y), absolute=1e-5)
    assert_close(error, losses.ssim_error(y, x), absolute=1e-5)


def test_photometric_error_of_flat_images():
    """Without structure, SSIM is its luminance term."""
    x, y = 0.2, 0.5
    error = losses.photometric_error(constant(x), constant(y))
    squares = x * x + y * y
    luminance = (2 * x * y + 1e-4) / (squares + 1e-4)
    expected = 0.85 * (1 - luminance) / 2 + 0.15 * (y - x)
    assert_close(error, constant(expected), absolute=1e-4)


def test_photometric_error_without_ssim():
    error = losses.photometric_error(image(), image() + 0.1, ssim=False)
    assert_close(error, constant(0.1))


def test_smoothness_of_a_ramp():
    x, y = pixels_of(HEIGHT, WIDTH)
    ramp = 0.3 * x + 0.2 * y
    smooth = losses.smoothness(ramp[None, None], constant(0.0))
    assert_close(smooth, 0.3 + 0.2)


def test_an_edge_of_the_image_excuses_one_of_the_depth():
    step = constant(0.0)
    step[..., 8:] = 1
    flat = losses.smoothness(step, constant(0.0))
    with_edge = losses.smoothness(step, step)
    elsewhere = losses.smoothness(step, step.roll(3, 3))
    assert_close(with_edge, flat / torch.e)
    assert_close(elsewhere, flat)


def test_smoothness_ignores_the_scale_of_disparity():
    disparity = 0.1 + image()[:, :1]
    smooth = losses.disparity_smoothness(disparity, image(1))
    scaled = losses.disparity_smoothness(0.3 * disparity, image(1))
    assert_close(scaled, smooth, 1e-4)


def test_constant_disparity_is_smooth():
    assert losses.disparity_smoothness(constant(0.4), image()) == 0


# ------------------------------------------------------------------------- self-supervised depth


of_sources = pytest.mark.parametrize("minimum", (True, False), ids=("minimum", "mean"))


def random_disparities(scales):
    disparities = []
    for scale in range(scales):
        maps = smooth_images(2, HEIGHT >> scale, WIDTH >> scale, 10 + scale)
        disparity = 0.05 + 0.3 * maps[:, :1]
        disparities.append(disparity.requires_grad_())
    return disparities


def video(scales=4, sources=2):
    """Arguments of PhotometricLoss; disparities and poses have gradients."""
    disparities = random_disparities(scales)
    pose = general_pose().repeat(2, 1, 1)
    poses = [pose, pose.inverse()][:sources]
    poses = [T.requires_grad_() for T in poses]
    frames = [images(1), images(2)][:sources]
    K = camera().repeat(2, 1, 1)
    return disparities, images(), frames, K, poses


def leaves_of(arguments):
    disparities, _, _, _, poses = arguments
    return disparities + poses


def enlarge(x):
    return F.interpolate(x, (HEIGHT, WIDTH), mode="bilinear", align_corners=False)


def plain_warp(source, depth, K, T):
    rays = K.inverse() @ homogeneous_pixels(HEIGHT, WIDTH)
    points = depth.view(2, 1, -1) * rays
    rotation, translation = T[:, :3].split((3, 1), 2)
    points = K @ (rotation @ points + translation)
    pixels, z = points.split((2, 1), 1)
    limits = torch.tensor([[WIDTH - 1], [HEIGHT - 1]])
    grid = 2 * pixels / (z + 1e-7) / limits - 1
    grid = grid.view(2, 2, HEIGHT, WIDTH)
    grid = grid.permute(0, 2, 3, 1)
    return F.grid_sample(source, grid, padding_mode="border", align_corners=True)


def plain_disparity_smoothness(disparity, target):
    mean = disparity.mean((2, 3), keepdim=True)
    normalised = disparity / (mean + 1e-7)
    total = 0
    for dim in (2, 3):
        edges = target.diff(dim=dim).abs()
        edges = edges.mean(1, keepdim=True)
        gradients = normalised.diff(dim=dim).abs()
        damped = gradients * torch.exp(-edges)
        total = total + damped.mean()
    return total


def plain_depth_loss(disparities, target, sources, K, poses):
    """Monodepth2's formulation: unmoved and warped sources compete for the minimum."""
    total = 0
    for scale, disparity in enumerate(disparities):
        full = enlarge(disparity)
        depth = 1 / (0.01 + 9.99 * full)
        views = list(sources)
        for source, T in zip(sources, poses):
            views.append(plain_warp(source, depth, K, T))
        errors = [plain_photometric_error(view, target) for view in views]
        minimum = torch.cat(errors, 1).amin(1)
        smooth = plain_disparity_smoothness(disparity, F.avg_pool2d(target, 2**scale))
        total = total + minimum.mean() + 1e-3 * smooth / 2**scale
    return total / len(disparities)


def test_photometric_loss_is_monodepth2s():
    arguments = video()
    leaves = leaves_of(arguments)
    terms, _ = PhotometricLoss(border=True)(*arguments)
    expected = plain_depth_loss(*arguments)
    assert_close(terms["loss"], expected, absolute=4e-6)
    gradients = torch.autograd.grad(terms["loss"], leaves)
    expected = torch.autograd.grad(expected, leaves)
    for i in range(len(leaves)):
        assert relative_distance(gradients[i], expected[i]) < 2e-2


def test_photometric_loss_adds_up():
    loss = PhotometricLoss(smoothness_weight=0.5)
    terms, views = loss(*video())
    assert_close(terms["loss"], terms["photometric"] + 0.5 * terms["smoothness"])
    trains = views["mask"].float()
    assert_close(terms["masked"], 1 - trains.mean())


def test_views_of_the_photometric_loss():
    _, views = PhotometricLoss()(*video())
    assert views["depth"].shape == (2, 1, HEIGHT, WIDTH)
    assert views["warped"].shape == (2, 2, 3, HEIGHT, WIDTH)
    assert views["mask"].shape == (2, 1, HEIGHT, WIDTH)
    for view in views.values():
        assert not view.requires_grad


def test_gradients_reach_every_scale_and_pose():
    arguments = video()
    loss = PhotometricLoss(smoothness_weight=0.0)
    terms, _ = loss(*arguments)
    terms["loss"].backward()
    for leaf in leaves_of(arguments):
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().sum() > 0


def stereo(disparity, source, target, **options):
    """The loss of a plane; at 5 m, it is 6 pixels further left in the source."""
    loss = PhotometricLoss(**options)
    maps = constant(disparity)
    T = shift(x=-0.75)
    return loss([maps], target, [source], camera(), [T])


def test_true_depth_explains_the_other_view():
    target = image()
    source = target.roll(-6, 3)
    true = depth_to_disparity(5, 0.1, 100)
    terms, views = stereo(true, source, target)
    warped = views["warped"][:, 0]
    assert_close(inner(warped), inner(target), absolute=1e-3)
    for factor in (0.5, 2):
        wrong, _ = stereo(factor * true, source, target)
        assert wrong["photometric"] > 2 * terms["photometric"]


def test_stationary_pixels_do_not_train():
    """A camera that stands still: the unmoved source explains every pixel."""
    terms, views = stereo(0.02, image(), image())
    assert terms["masked"] == 1
    assert not views["mask"].any()


def test_stationary_pixels_train_without_the_auto_mask():
    terms, _ = stereo(0.02, image(), image(), automask=False)
    assert terms["masked"] < 0.5


@of_sources
def test_sources_compete(minimum):
    """One source is the target, another something else: the best counts, or the mean."""
    target = image()
    other = image(1)
    loss = PhotometricLoss(automask=False, minimum=minimum)
    disparity = constant(0.5)
    still = [shift(), shift()]
    terms, _ = loss([disparity], target, [other, target], camera(), still)
    error = losses.photometric_error(other, target).mean()
    expected = 0 if minimum else error / 2
    assert_close(terms["photometric"], expected, 2e-2, 1e-4)


def half_unseen(pose, near=0.5, **options):
    """Loss, gradient and mask of a scene: its left half is near, the right half 2 km away."""
    disparity = constant(1e-5)
    disparity[..., :32] = near
    disparity.requires_grad_()
    loss = PhotometricLoss(1, 2000, 0, automask=False, ssim=False, **options)
    sources = [image(1)]
    terms, views = loss([disparity], image(), sources, camera(), [pose])
    terms["loss"].backward()
    return terms["loss"].detach(), disparity.grad, views["mask"]


UNSEEN = {  # the source has the near half behind itself, or far outside its image
    "behind": shift(z=-5),
    "outside": shift(x=-400),
}
unseen = pytest.mark.parametrize("pose", UNSEEN.values(), ids=UNSEEN)


@unseen
@of_sources
def test_unseen_pixels_do_not_train(pose, minimum):
    _, gradient, mask = half_unseen(pose, minimum=minimum)
    assert not mask[..., :32].any()
    assert mask[..., 32:].float().mean() > 0.5
    assert not gradient[..., :32].any()
    assert gradient[..., 32:].any()


@unseen
@of_sources
def test_unseen_pixels_change_nothing_for_others(pose, minimum):
    loss, gradient, _ = half_unseen(pose, 0.5, minimum=minimum)
    other_loss, other_gradient, _ = half_unseen(pose, 0.999, minimum=minimum)
    assert torch.equal(loss, other_loss)
    assert torch.equal(gradient[..., 32:], other_gradient[..., 32:])


@unseen
def test_border_colours_compete_as_in_monodepth2(pose):
    loss, _, _ = half_unseen(pose)
    with_border, _, mask = half_unseen(pose, border=True)
    assert mask.all()
    assert with_border > loss


def with_gradient(disparity, sources, poses, **options):
    loss = PhotometricLoss(automask=False, **options)
    terms, _ = loss([disparity], image(), sources, camera(), poses)
    gradient = torch.autograd.grad(terms["loss"], disparity)
    return terms["loss"].detach(), gradient[0]


@of_sources
def test_a_source_that_sees_nothing_changes_nothing(minimum):
    disparity = 0.02 + 0.1 * image(4)[:, :1]
    disparity.requires_grad_()
    sources = [image(1), image(2)]
    poses = [shift(x=-0.1), shift(z=-1000)]
    both = with_gradient(disparity, sources, poses, minimum=minimum)
    alone = with_gradient(disparity, sources[:1], poses[:1], minimum=minimum)
    assert_close(both[0], alone[0], absolute=1e-9)
    assert_close(both[1], alone[1], absolute=1e-9)


@of_sources
def test_without_anything_seen_smoothness_remains(minimum):
    disparity = 0.02 + 0.1 * image(4)[:, :1]
    disparity.requires_grad_()
    behind = [shift(z=-1000)]
    loss, gradient = with_gradient(disparity, [image(1)], behind, minimum=minimum)
    smooth = 1e-3 * losses.disparity_smoothness(disparity, image())
    assert_close(loss, smooth.detach())
    expected = torch.autograd.grad(smooth, disparity)
    assert_close(gradient, expected[0], absolute=1e-9)


# ------------------------------------------------------------------------- supervised depth


def flat_disparities(depth, scales=2):
    """Maps of a wall between 1 and 100 m away."""
    disparity = depth_to_disparity(depth, 1, 100)
    disparities = []
    for scale in range(scales):
        maps = constant(disparity, HEIGHT >> scale, WIDTH >> scale)
        disparities.append(maps.requires_grad_())
    return disparities


def test_supervised_depth_is_l1_in_metres_over_measured_pixels():
    measured = constant(0.0)
    measured[..., 0, 0] = 4.0
    measured[..., 0, 1] = 10.0
    terms, views = losses.supervised_depth_loss(flat_disparities(5), measured, 1, 100)
    assert_close(terms["loss"], (1 + 5) / 2, 1e-4)
    assert_close(views["depth"], constant(5.0), 1e-4)


def test_supervised_depth_trains_every_scale():
    disparities = flat_disparities(5, scales=3)
    terms, _ = losses.supervised_depth_loss(disparities, constant(7.0), 1, 100)
    terms["loss"].backward()
    for disparity in disparities:
        assert (disparity.grad > 0).all()  # disparity is to fall, for depth to grow


BEYOND = {"unknown": 0.0, "too near": 0.5, "sky": 655.35}


@pytest.mark.parametrize("what", BEYOND)
def test_depth_out_of_range_does_not_train(what):
    disparity = flat_disparities(5, scales=1)[0]
    measured = constant(7.0)
    measured[..., 4:] = BEYOND[what]
    terms, _ = losses.supervised_depth_loss([disparity], measured, 1, 100)
    terms["loss"].backward()
    assert_close(terms["loss"].detach(), 7 - 5, 1e-4)
    assert (disparity.grad[..., :4] > 0).all()
    assert not disparity.grad[..., 4:].any()


def test_nothing_measured_is_no_loss():
    disparities = flat_disparities(5)
    terms, _ = losses.supervised_depth_loss(disparities, constant(0.0), 1, 100)
    terms["loss"].backward()
    assert terms["loss"] == 0
    assert not disparities[0].grad.any()


# ------------------------------------------------------------------------- flow


def constant_flows(x, y):
    """The same flow, (x, y) pixels at full size 64x96, at four scales."""
    flows = []
    for scale in range(4):
        size = (64 >> scale, 96 >> scale)
        both = [constant(x, *size), constant(y, *size)]
        flows.append(torch.cat(both, 1) / 2**scale)
    return flows


def moved_texture(x, y):
    """Target and source with target(p) = source(p + (x, y)), flat where they enter and leave."""
    texture = image() - 0.5
    source = F.pad(texture, (16, 16, 16, 16)) + 0.5
    target = source.roll((-y, -x), (2, 3))
    return target, source


def test_flow_loss_vanishes_at_the_true_flow():
    target, source = moved_texture(6, -4)
    terms, views = losses.flow_loss(constant_flows(6.0, -4.0), target, source)
    assert terms["loss"] < 1e-4
    assert terms["smoothness"] == 0
    assert 0 < terms["outside"] < 0.15
    warped = views["warped"]
    assert_close(inner(warped), inner(target), absolute=1e-4)


@pytest.mark.parametrize("factor", (-1, 0, 0.5, 2))
def test_flow_loss_of_a_wrong_flow(factor):
    target, source = moved_texture(6, -4)
    flows = constant_flows(6.0 * factor, -4.0 * factor)
    terms, _ = losses.flow_loss(flows, target, source)
    assert terms["photometric"] > 0.01


def random_flows(scales=4):
    flows = []
    for scale in range(scales):
        maps = smooth_images(2, HEIGHT >> scale, WIDTH >> scale, 20 + scale)
        flows.append(4 * maps[:, :2] - 2)
    return flows


def plain_flow_smoothness(flow, target):
    """As in the release: the flow at full size, as a share of it; x and y are summed."""
    height, width = flow.shape[2:]
    x, y = enlarge(flow).unbind(1)
    edges_x = target.diff(dim=3).abs().mean(1)
    edges_y = target.diff(dim=2).abs().mean(1)
    total = 0
    for share in (x / width, y / height):  # (B, H, W)
        along_x = share.diff(dim=2).abs() * torch.exp(-edges_x)
        along_y = share.diff(dim=1).abs() * torch.exp(-edges_y)
        total = total + along_x.mean() + along_y.mean()
    return total


def test_flow_smoothness_is_the_releases():
    terms, _ = losses.flow_loss(random_flows(), images(), images())
    by_scale = [plain_flow_smoothness(flow, images()) for flow in random_flows()]
    expected = sum(value / 2**scale for scale, value in enumerate(by_scale))
    assert_close(terms["smoothness"], expected / 1.875)


def test_flow_loss_weighs_smoothness():
    terms, _ = losses.flow_loss(random_flows(), images(), images(), 3.0)
    assert_close(terms["loss"], terms["photometric"] + 3 * terms["smoothness"])


def test_every_image_counts_alike_in_flow():
    """An image whose flow leaves it at most pixels weighs as much as one that stays."""
    flow = torch.zeros(2, 2, HEIGHT, WIDTH)
    flow[1, 0] = 48
    both, _ = losses.flow_loss([flow], images(), images(1))
    alone = []
    for i in (0, 1):
        target = images()[i, None]
        source = images(1)[i, None]
        terms, _ = losses.flow_loss([flow[i, None]], target, source)
        alone.append(terms["photometric"])
    assert_close(both["photometric"], torch.stack(alone).mean())


# ------------------------------------------------------------------------- reconstruction


def removed_square():
    removed = torch.zeros(2, 1, HEIGHT, WIDTH)
    removed[..., 8:16, 16:24] = 1
    return removed.bool()


def outputs_with_error(error, scales=4):
    pyramid = losses.image_pyramid(images(), scales)
    outputs = [level + error for level in pyramid]
    return [output.requires_grad_() for output in outputs]


def test_perfect_reconstruction():
    outputs = outputs_with_error(0)
    terms, views = losses.reconstruction_loss(outputs, images(), removed_square())
    assert terms["loss"] == 0
    assert torch.equal(views["reconstruction"], images())
    assert torch.equal(views["removed"], removed_square())


@pytest.mark.parametrize("everywhere", (False, True), ids=("removed", "everywhere"))
def test_which_pixels_reconstruction_trains(everywhere):
    outputs = outputs_with_error(0.1)
    removed = removed_square()
    terms, _ = losses.reconstruction_loss(outputs, images(), removed, everywhere)
    terms["loss"].backward()
    assert_close(terms["loss"].detach(), 0.1, absolute=1e-5)
    for scale, output in enumerate(outputs):
        part_removed = F.max_pool2d(removed.float(), 2**scale).bool()
        expected = (part_removed | everywhere).expand_as(output)
        assert torch.equal(output.grad > 0, expected)


def test_finer_scales_weigh_more_in_reconstruction():
    outputs = outputs_with_error(0.1)
    terms, _ = losses.reconstruction_loss(outputs, images(), removed_square())
    terms["loss"].backward()
    sums = [float(output.grad.sum()) for output in outputs]
    for finer, coarser in zip(sums, sums[1:]):
        assert finer == pytest.approx(2 * coarser, rel=1e-4)


def test_every_image_counts_alike_in_reconstruction():
    removed = removed_square()
    removed[1, :, :24] = True
    output = images()
    output[0] += 0.1
    output[1] += 0.3
    terms, _ = losses.reconstruction_loss([output], images(), removed)
    assert_close(terms["loss"], (0.1 + 0.3) / 2, absolute=1e-5)


# ------------------------------------------------------------------------- segmentation


def random_labels():
    """Logits of 5 classes, and a label whose first rows are unlabelled."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 8, 12, generator=generator)
    label = torch.randint(5, (2, 8, 12), generator=generator)
    label[:, :2] = 255
    return logits.requires_grad_(), label


def test_segmentation_ignores_unlabelled_pixels():
    logits, label = random_labels()
    loss = losses.segmentation_loss(logits, label)["loss"]
    loss.backward()
    unlabelled, labelled = logits.grad.split((2, 6), 2)
    assert not unlabelled.any()
    assert labelled.all()
    logits = logits.detach()[:, :, 2:]
    expected = F.cross_entropy(logits, label[:, 2:])
    assert_close(loss.detach(), expected)


def test_nothing_labelled_is_no_loss():
    logits, label = random_labels()
    label[:] = 255
    loss = losses.segmentation_loss(logits, label)["loss"]
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


# ------------------------------------------------------------------ all losses: compiler, devices


def mono_case():
    """A loss, its arguments, and what has gradients, as in all cases."""
    arguments = video(scales=2, sources=1)
    return PhotometricLoss(), arguments, leaves_of(arguments)


def monodepth2_case():
    arguments = video(scales=1, sources=1)
    return PhotometricLoss(border=True), arguments, leaves_of(arguments)


def mean_case():
    loss = PhotometricLoss(automask=False, minimum=False, ssim=False)
    arguments = video(scales=1)
    return loss, arguments, leaves_of(arguments)


def depth_case():
    disparities = random_disparities(scales=2)
    measured = 10 * images()[:, :1]
    return losses.supervised_depth_loss, (disparities, measured, 1.0, 8.0), disparities


def flow_case():
    flows = [flow.requires_grad_() for flow in random_flows(scales=2)]
    return losses.flow_loss, (flows, images(), images(1)), flows


def reconstruction_case():
    outputs = outputs_with_error(0.1, scales=2)
    return losses.reconstruction_loss, (outputs, images(), removed_square()), outputs


def segmentation_case():
    logits, label = random_labels()
    return losses.segmentation_loss, (logits, label), [logits]


CASES = (
    mono_case,
    monodepth2_case,
    mean_case,
    depth_case,
    flow_case,
    reconstruction_case,
    segmentation_case,
)
every_loss = pytest.mark.parametrize("make_case", CASES)
inductor = pytest.param("inductor", marks=pytest.mark.slow)


def value_of(loss, arguments):
    result = loss(*arguments)
    terms = result if isinstance(result, dict) else result[0]
    return terms["loss"]


@every_loss
@pytest.mark.parametrize("backend", ("aot_eager", inductor))
def test_compiled_and_eager_agree(make_case, backend):
    """As one graph; inductor also generates code, which takes a while."""
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs g++")
    torch._dynamo.reset()
    loss, arguments, leaves = make_case()
    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend=backend)
    ours = value_of(compiled, arguments)
    eager = value_of(loss, arguments)
    assert_close(ours, eager, absolute=1e-5)
    gradients = torch.autograd.grad(ours, leaves)
    expected = torch.autograd.grad(eager, leaves)
    for i in range(len(leaves)):
        assert relative_distance(gradients[i], expected[i]) < 1e-4


def on_meta(value):
    """Tensors without numbers but with shapes; numbers as they are."""
    if isinstance(value, (list, tuple)):
        return [on_meta(part) for part in value]
    if not torch.is_tensor(value):
        return value
    copy = value.detach().to("meta")
    return copy.requires_grad_(value.requires_grad)


@every_loss
def test_no_loss_waits_for_the_device(make_case):
    """The meta device has no numbers: to ask for one, for which a GPU would be waited for, fails."""
    loss, arguments, _ = make_case()
    value = value_of(loss, on_meta(arguments))
    value.backward()
