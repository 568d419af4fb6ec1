"""How a camera sees the synthetic street: ray casting and light, in numpy.

World and camera axes are those of KITTI's cameras: x right, y down, z forward, in metres; the
ground is y = 0. A solid is a frustum (a box whose top may be smaller than its bottom), an upright
cylinder or an ellipsoid, given in the frame of its anchor on the street. Surfaces are Lambertian
and their textures are fixed to the anchors, so that a point keeps its colour from frame to frame
and from camera to camera: what the photometric loss assumes.

tools/street.py lays out the street and calls `render` here; the colours of surfaces are in
tools/street_textures.py.
"""

from itertools import product
from typing import NamedTuple

import numpy as np

from tools.street_textures import (
    BACK,
    CURBSTONE,
    CURVED,
    TEXTURES,
    TOP,
    Ground,
    Surface,
    grass_texture,
    ground_speckle,
    mix,
    paving_texture,
    road_texture,
    sky_texture,
    stripe,
    value_noise,
)

Array = np.ndarray

# KITTI's raw label ids
ROAD = 7
SIDEWALK = 8
BUILDING = 11
POLE = 17
VEGETATION = 21
TERRAIN = 22
SKY = 23
CAR = 26
MATERIALS = {
    "wall": BUILDING,
    "roof": BUILDING,
    "metal": POLE,
    "sign": POLE,
    "bark": VEGETATION,
    "leaves": VEGETATION,
    "paint": CAR,
    "cabin": CAR,
    "tyre": CAR,
}
MATERIAL_NAMES = list(MATERIALS)
MATERIAL_LABELS = np.array(list(MATERIALS.values()), np.uint8)
LEAVES = MATERIAL_NAMES.index("leaves")

NEAR = 0.2  # m
REACH = 150.0  # m; solids beyond are left out
FAR = 250.0  # m; ground beyond counts as sky
MAP_START = -30.0  # m along the street, where the map of sunlight starts
MAP_SCALE = 6  # cells of that map per metre
MAP_REACH = 60  # m that it reaches to either side of x = 0

CORNERS = list(product((-1, 1), repeat=3))
CUBE = np.array(CORNERS, np.float32)  # (8, 3)


class Hits(NamedTuple):
    """What each ray meets first, as arrays of one shape."""

    depth: Array  # m along the camera's z, inf for sky
    solid: Array  # number of the solid, -1 for ground and sky
    face: Array  # which of its faces

    def part(self, chosen) -> "Hits":
        return Hits(*(values[chosen] for values in self))


class Points(NamedTuple):
    """Where rays end, and how they are seen."""

    place: Array  # (3, n) in the world
    eye: Array  # (3, 1), the camera's place
    footprint: Array  # (n,) m between neighbouring rays
    time: float  # in frames
    hits: Hits  # (n,)


# -------------------------------------------------------------------------------- geometry


def rotation_y(angle: Array) -> Array:
    """Rotations (..., 3, 3) by angles (rad) about the vertical; positive: z forward to x right."""
    c = np.cos(angle)
    s = np.sin(angle)
    rotation = np.zeros((*np.shape(angle), 3, 3))
    rotation[..., 0, 0] = c
    rotation[..., 0, 2] = s
    rotation[..., 1, 1] = 1
    rotation[..., 2, 0] = -s
    rotation[..., 2, 2] = c
    return rotation


def frustum_planes(half: Array, top: Array) -> tuple[Array, Array]:
    """Outward unit normals (n, 6, 3) of boxes' faces, and offsets (n, 6) from their middles.

    half (n, 3): half extents. top (n, 2): scale of the upper face along x and z.
    """
    x, y, z = half.T
    top_x, top_z = top.T
    zero = np.zeros_like(x)
    lean_x = x * (1 - top_x) / (2 * y)
    lean_z = z * (1 - top_z) / (2 * y)
    normals = [
        [zero, zero - 1, zero],
        [zero, zero + 1, zero],
        [zero + 1, -lean_x, zero],
        [zero - 1, -lean_x, zero],
        [zero, -lean_z, zero + 1],
        [zero, -lean_z, zero - 1],
    ]
    normals = np.array(normals).transpose(2, 0, 1)  # (n, 6, 3)
    middle_x = x * (1 + top_x) / 2
    middle_z = z * (1 + top_z) / 2
    middles = np.stack([y, y, middle_x, middle_x, middle_z, middle_z], 1)
    lengths = np.linalg.norm(normals, axis=2)
    normals = normals / lengths[..., None]
    offsets = middles / lengths
    return normals.astype(np.float32), offsets.astype(np.float32)


# -------------------------------------------------------------------------------- pictures


def render(world, pose: Array, time: float, K: Array, size: tuple) -> dict:
    """Image (H, W, 3) uint8; depth (H, W) in m, inf for sky; label (H, W) uint8; solid (H, W).

    Depth, label and solid belong to the rays through the pixels' centres, which have integer
    coordinates. The colour is the mean of such a ray and those through the pixel's four corners.
    """
    height, width = size
    row, column = np.mgrid[-0.5:height:0.5, 0 : width + 1]
    column -= 0.5 * (row % 1 > 0)  # rows of corners alternate with rows of centres
    x = (column - K[0, 2]) / K[0, 0]
    y = (row - K[1, 2]) / K[1, 1]
    grid = x.astype(np.float32), y.astype(np.float32)
    hits = cast(world, pose, time, grid)
    colour, label = shade(world, pose, time, grid, hits)

    pairs = colour[:, :-1:2] + colour[:, 2::2]
    corners = pairs[..., :-1] + pairs[..., 1:]
    centres = colour[:, 1::2, :-1]
    colour = np.clip(centres / 2 + corners / 8, 0, 1)
    image = np.rint(255 * colour ** (1 / 2.2))
    image = image.astype(np.uint8)
    at_centres = np.s_[1::2, :-1]
    return {
        "image": image.transpose(1, 2, 0),
        "depth": hits.depth[at_centres],
        "label": label[at_centres],
        "solid": hits.solid[at_centres],
    }


def shade(world, pose: Array, time: float, grid: tuple, hits: Hits) -> tuple:
    """Linear colour (3, H, W) and label (H, W) of what a grid of rays (x, y, 1) meets."""
    x, y = grid
    one = np.ones_like(x)
    rotation = pose[:3, :3].astype(np.float32)
    rays = np.einsum("ij,jhw->ihw", rotation, np.stack([x, y, one]))
    rays = rays.reshape(3, -1)
    eye = pose[:3, 3:].astype(np.float32)
    spacing = x[0, 1] - x[0, 0]
    flat = Hits(*(values.ravel() for values in hits))
    colour = np.empty_like(rays)
    label = np.full(flat.depth.shape, SKY, np.uint8)

    sky = np.isinf(flat.depth)
    things = flat.solid >= 0
    ground = ~sky & ~things
    for region, shader in ((ground, shade_ground), (things, shade_solids)):
        chosen = np.flatnonzero(region)
        met = flat.part(chosen)
        place = rays.take(chosen, axis=1) * met.depth + eye
        points = Points(place, eye, met.depth * spacing, time, met)
        shaded, label[chosen] = shader(world, points)
        haze = 1 - np.exp(-met.depth / world.visibility)
        colour[:, chosen] = mix(shaded, world.haze, haze)
    above = rays[:, sky]
    colour[:, sky] = sky_texture(above, world.haze, world.zenith, world.clouds)
    colour = colour.reshape(3, *x.shape)
    return colour, label.reshape(x.shape)


# -------------------------------------------------------------------------------- ray casting


class Poses(NamedTuple):
    """All solids as the camera sees them."""

    turns: Array  # (n, 3, 3) from the anchors' frames to the camera's
    eyes: Array  # (n, 3) the camera's place from the solids' middles, in the anchors' frames
    corners: Array  # (n, 8, 3) of the boxes around them, in the camera's frame


def place_solids(world, pose: Array, time: float) -> Poses:
    rotations, origins = world.frames(time)
    turns = pose[:3, :3].T @ rotations
    turns = turns[world.anchor].astype(np.float32)
    eyes = np.einsum("nji,nj->ni", rotations, pose[:3, 3] - origins)
    eyes = eyes[world.anchor].astype(np.float32)
    eyes = eyes - world.middle
    corners = world.half[:, None] * CUBE
    corners = corners - eyes[:, None]
    corners = np.einsum("nij,nkj->nki", turns, corners)
    return Poses(turns, eyes, corners)


def cast(world, pose: Array, time: float, grid: tuple) -> Hits:
    """What a grid of rays (x, y, 1) meets. The closest solids are tried first."""
    x, y = grid
    down = pose[1, 0] * x + pose[1, 1] * y
    down = down + pose[1, 2]
    ground = -pose[1, 3] / np.maximum(down, 1e-6)
    ground = ground.astype(np.float32)
    ground[ground > FAR] = np.inf
    solid = np.full(x.shape, -1, np.int32)
    face = np.full(x.shape, TOP, np.int8)
    hits = Hits(ground, solid, face)

    placed = place_solids(world, pose, time)
    depths = placed.corners[..., 2]
    nearest = depths.min(axis=1)
    farthest = depths.max(axis=1)
    windows, area = find_windows(placed.corners, x[0], y[:, 0])
    visible = (area > 8) & (farthest > NEAR)
    visible = visible & (nearest < REACH)
    order = np.argsort(nearest)
    for i in order[visible[order]]:
        left, right, top, bottom = windows[i]
        window = np.s_[top:bottom, left:right]
        part = hits.part(window)
        if nearest[i] < part.depth.max():
            rays = x[window], y[window][:, :1]
            hit = hit_frustum if world.shape[i] == "frustum" else hit_round
            hit(world, i, placed, rays, part)
    return hits


def find_windows(corners: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Part (n, 4) of the grid of rays that boxes (n, 8, 3) may cover, and its area (n,).

    Corners behind the camera end far off the grid. x (columns,) and y (rows,) ascend.
    """
    depth = np.maximum(corners[..., 2:], NEAR)
    image = corners[..., :2] / depth
    low = image.min(axis=1).T
    high = image.max(axis=1).T
    left = np.searchsorted(x, low[0])
    left = np.maximum(left - 1, 0)  # as the rows are staggered
    right = np.searchsorted(x, high[0])
    top = np.searchsorted(y, low[1])
    bottom = np.searchsorted(y, high[1])
    columns = np.maximum(right - left, 0)
    rows = np.maximum(bottom - top, 0)
    return np.stack([left, right, top, bottom], 1), columns * rows


def hit_frustum(world, i: int, placed: Poses, rays: tuple, hits: Hits) -> None:
    """Write solid i into `hits` where it is the closest.

    A ray is inside between its last entry through a plane and its first exit.
    """
    x, y = rays
    enter = np.float32(0)
    leave = np.float32(np.inf)
    entered = np.int8(0)
    gaps = world.offsets[i] - world.normals[i] @ placed.eyes[i]  # negative: the eye is outside
    normals = world.normals[i] @ placed.turns[i].T
    with np.errstate(divide="ignore"):
        for side in range(6):
            gap = gaps[side]
            a, b, c = normals[side]
            slope = a * x + (b * y + c)
            if gap < 0:
                crossing = np.where(slope < 0, gap / slope, np.inf)
                later = crossing > enter
                entered = np.where(later, np.int8(side), entered)
                enter = np.maximum(enter, crossing)
            else:
                crossing = np.where(slope > 0, gap / slope, np.inf)
                leave = np.minimum(leave, crossing)
    closer = enter < np.minimum(leave, hits.depth)
    closer = closer & (enter > NEAR)
    if closer.any():
        hits.depth[closer] = enter[closer]
        hits.solid[closer] = i
        hits.face[closer] = entered[closer]


def hit_round(world, i: int, placed: Poses, rays: tuple, hits: Hits) -> None:
    """The same for an ellipsoid or a cylinder. Leaves have holes that may show the far side."""
    x, y = rays
    half = world.half[i]
    start = placed.eyes[i] / half  # in units of the half extents, where the solid has a radius of 1
    ray = []
    for turn, extent in zip(placed.turns[i].T, half):
        along = turn[0] * x + (turn[1] * y + turn[2])
        ray.append(along / extent)

    # Solve |start + distance * ray| = 1
    axes = [0, 2] if world.shape[i] == "cylinder" else [0, 1, 2]
    a = sum(ray[k] ** 2 for k in axes)
    b = sum(ray[k] * start[k] for k in axes)
    c = sum(start[k] ** 2 for k in axes) - 1
    root = np.sqrt(np.maximum(b * b - a * c, 0))
    candidates = root > 0
    candidates &= root + b > -hits.depth * a
    rows, columns = np.nonzero(candidates)
    for sign in (-1, 1):  # the near side, then the far side
        at = rows, columns
        distance = sign * root[at] - b[at]
        distance = distance / a[at]
        point = [s + distance * r[at] for s, r in zip(start, ray)]
        dense = np.abs(point[1]) <= 1
        dense &= distance > NEAR
        dense &= distance < hits.depth[at]
        if world.material[i] == LEAVES:
            dense &= foliage(point, half, world.style[i])
        hit = rows[dense], columns[dense]
        hits.depth[hit] = distance[dense]
        hits.solid[hit] = i
        hits.face[hit] = CURVED
        rows = rows[~dense]
        columns = columns[~dense]


def foliage(point: list, half: Array, style: Array) -> Array:
    """Whether there is a leaf at points on an ellipsoid, in units of its half extents."""
    scale = half / 0.25
    shift = 60 * style
    cells = [point[k] * scale[k] + shift[k] for k in range(3)]
    return value_noise(*cells) > 0.45


# -------------------------------------------------------------------------------- light


def reflect(world, albedo: Array, sun: Array, sky: Array) -> Array:
    """Colour of surfaces that the given shares of the sun's and the sky's light reach."""
    direct = sun * world.sun_colour[:, None]
    diffuse = sky * world.ambient[:, None]
    return albedo * (direct + diffuse)


def shade_ground(world, points: Points) -> tuple[Array, Array]:
    """Colours (3, n) and labels (n,) of points on the ground."""
    x, _, z = points.place
    u = x - world.centre(z)
    aside = np.abs(u)
    across = np.abs(z - world.side_streets[:, None])
    across = across.min(axis=0)
    distance = np.linalg.norm(points.place - points.eye, axis=0)
    lengthwise = points.footprint * distance / -points.eye[1]
    ground = Ground(x, z, u, aside, across, points.footprint, lengthwise)

    curb = world.half_road + world.verge
    road = (aside < world.half_road) | (across < 3.2)
    walk = (aside > curb) & (aside < curb + world.walk)
    walk = walk | (across < 5)
    label = np.where(walk, SIDEWALK, TERRAIN)
    label = np.where(road, ROAD, label).astype(np.uint8)

    noise = ground_speckle(ground)
    asphalt = road_texture(ground, noise, world.half_road)
    paving = paving_texture(ground, noise)
    grass = grass_texture(noise)
    colour = np.where(label == SIDEWALK, paving, grass)
    colour = np.where(label == ROAD, asphalt, colour)
    curbstone = stripe(aside - world.half_road, 0.1, points.footprint)
    colour = mix(colour, CURBSTONE, curbstone * (across > 3.2))

    sun = ground_sunlight(world, points)
    sky = 0.55 + 0.45 * sun
    return reflect(world, colour, -world.sun[1] * sun, sky), label


def ground_sunlight(world, points: Points) -> Array:
    """Share (n,) of the sunlight that reaches points on the ground, from the world's map of it."""
    x, _, z = points.place
    column = (x + MAP_REACH) * MAP_SCALE - 0.5
    row = (z - MAP_START) * MAP_SCALE - 0.5
    rows, columns = world.sunlight.shape
    c = np.clip(column, 0, columns - 2).astype(np.int32)
    r = np.clip(row, 0, rows - 2).astype(np.int32)
    right = column - np.floor(column)
    lower = row - np.floor(row)
    left = 1 - right
    near = world.sunlight[r, c] * left + world.sunlight[r, c + 1] * right
    far = world.sunlight[r + 1, c] * left + world.sunlight[r + 1, c + 1] * right
    sun = near * (1 - lower) + far * lower

    # Moving cars are not in the map: a soft blob below each of those among the points
    rotations, origins = world.frames(points.time)
    along = origins[:, 2]
    among = along > z.min(initial=np.inf) - 4
    among &= along < z.max(initial=-np.inf) + 4
    for a in np.flatnonzero(world.moves & among):
        origin = origins[a, :, None].astype(np.float32)
        rotation = rotations[a].T.astype(np.float32)
        right, _, ahead = rotation @ (points.place - origin)
        side = np.clip(3 - 2.6 * np.abs(right), 0, 1)
        end = np.clip(5.5 - 2.2 * np.abs(ahead), 0, 1)
        sun = np.minimum(sun, 1 - side * end)
    return sun


def shade_solids(world, points: Points) -> tuple[Array, Array]:
    """Colours (3, n) and labels (n,) of points on solids."""
    solid = points.hits.solid
    anchor = world.anchor[solid]
    material = world.material[solid]
    rotations, origins = world.frames(points.time)
    rotations = rotations.astype(np.float32)
    origins = origins.astype(np.float32)
    x, y, z = points.place - origins.T.take(anchor, axis=1)
    cosine = rotations[anchor, 0, 0]
    sine = rotations[anchor, 0, 2]
    right = cosine * x - sine * z
    ahead = sine * x + cosine * z
    local = np.stack([right, y, ahead])
    half = world.half.T.take(solid, axis=1)
    middle = world.middle.T.take(solid, axis=1)
    offset = (local - middle) / half
    normal = surface_normals(world, points.hits, offset, half)

    eyes = np.einsum("aji,aj->ai", rotations, points.eye[:, 0] - origins)
    view = local - eyes.T.take(anchor, axis=1)
    slant = np.abs((normal * view).sum(axis=0))
    slant = slant / np.linalg.norm(view, axis=0)
    surface = Surface(
        world.colour.T.take(solid, axis=1),
        local,
        offset,
        half,
        world.style.T.take(solid, axis=1),
        points.hits.face,
        points.footprint,
        points.footprint / np.maximum(slant, 0.05),
    )
    colour = surface.colour.copy()
    for number, name in enumerate(MATERIAL_NAMES):
        chosen = np.flatnonzero(material == number)
        if name in TEXTURES and len(chosen):
            texture = TEXTURES[name]
            colour[:, chosen] = texture(surface.part(chosen))

    suns = world.sun @ rotations
    suns = suns.T.take(anchor, axis=1)
    sun = np.maximum((normal * suns).sum(axis=0), 0)
    sun = np.where(material == LEAVES, 0.25 + 0.6 * sun, sun)  # leaves scatter light
    sky = 0.8 - 0.25 * normal[1]
    sky = sky * np.clip(0.6 - 0.3 * local[1], 0.6, 1)  # less of it close to the ground
    return reflect(world, colour, sun, sky), MATERIAL_LABELS[material]


def surface_normals(world, hits: Hits, offset: Array, half: Array) -> Array:
    """Outward unit normals (3, n) in the anchors' frames."""
    face = np.minimum(hits.face, BACK)
    normal = world.normals[hits.solid, face].T.copy()
    curved = np.flatnonzero(hits.face == CURVED)
    outward = offset[:, curved] / half[:, curved]
    upright = world.shape[hits.solid[curved]] == "cylinder"
    outward[1] *= ~upright
    normal[:, curved] = outward / np.linalg.norm(outward, axis=0)
    return normal
