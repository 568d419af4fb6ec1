"""Colours of the synthetic street's surfaces: noise, stripes, and one function a material.

Textures are functions of a point's place on the street or on a solid, so that a point keeps its
colour from frame to frame. A footprint is the spacing of the rays where they meet the surface;
details smaller than it fade, so that pictures do not flicker. Lengths are in metres, colours
linear, points and colours (3, n).
"""

from itertools import product
from typing import NamedTuple

import numpy as np

Array = np.ndarray
TOP, BOTTOM, RIGHT, LEFT, FRONT, BACK = range(6)  # faces of a frustum
CURVED = 6  # the face of an ellipsoid or a cylinder

# Of things, one drawn for each
WALLS = [
    (0.55, 0.42, 0.26),
    (0.6, 0.55, 0.45),
    (0.38, 0.14, 0.09),
    (0.5, 0.3, 0.2),
    (0.62, 0.6, 0.58),
    (0.6, 0.48, 0.2),
    (0.4, 0.41, 0.4),
]
TILES = [
    (0.28, 0.1, 0.06),
    (0.12, 0.11, 0.11),
    (0.2, 0.14, 0.1),
]
FLAT_ROOF = (0.4, 0.39, 0.37)
CHIMNEY = (0.3, 0.14, 0.1)
BARK = (0.12, 0.09, 0.065)
GREY = (0.2, 0.21, 0.21)
SIGNS = [
    (0.6, 0.03, 0.03),
    (0.03, 0.1, 0.5),
    (0.6, 0.45, 0.03),
]
PAINTS = [
    (0.7, 0.7, 0.7),
    (0.35, 0.36, 0.38),
    (0.03, 0.03, 0.035),
    (0.1, 0.11, 0.12),
    (0.45, 0.03, 0.03),
    (0.04, 0.1, 0.3),
    (0.5, 0.47, 0.4),
]
TYRE = (0.02, 0.02, 0.02)

# Of the ground
BLACK = (0, 0, 0)
ASPHALT = (0.13, 0.13, 0.13)
MARKING = (0.55, 0.55, 0.52)
PAVING = (0.3, 0.28, 0.26)
CURBSTONE = (0.38, 0.37, 0.35)
GREEN_GRASS = (0.1, 0.14, 0.035)
DRY_GRASS = (0.2, 0.17, 0.08)

# Of houses
LEDGE = (0.42, 0.4, 0.37)
WINDOW_FRAME = (0.6, 0.59, 0.56)
DARK_PANE = (0.03, 0.04, 0.055)
LIGHT_PANE = (0.2, 0.25, 0.3)
CURTAIN = (0.5, 0.47, 0.42)
DOOR = (0.16, 0.08, 0.04)

# Of signs, wheels and cars
DISC = (0.45, 0.45, 0.45)
SEAM = (0.015, 0.015, 0.015)
SILL = (0.03, 0.03, 0.03)
HEADLAMP = (0.75, 0.75, 0.7)
TAIL_LAMP = (0.5, 0.02, 0.02)
PLATE = (0.7, 0.7, 0.65)
DARK_GLASS = (0.02, 0.025, 0.03)
LIGHT_GLASS = (0.14, 0.17, 0.2)


# -------------------------------------------------------------------------------- noise and stripes


def make_lattice(dimensions: int, size: int) -> Array:
    """Random values on a periodic lattice; the first plane of each axis is repeated at its end."""
    rng = np.random.default_rng(dimensions)
    shape = (size,) * dimensions
    values = rng.random(shape, np.float32)
    return np.pad(values, (0, 1), "wrap")


def corner_offsets(lattice: Array) -> Array:
    """Distances in memory from a lattice point to the corners of its cell, last axis fastest."""
    strides = np.array(lattice.strides) // lattice.itemsize
    corners = list(product((0, 1), repeat=lattice.ndim))
    return np.array(corners) @ strides


LATTICES = {
    2: make_lattice(2, 512),
    3: make_lattice(3, 64),
}
CORNERS = {
    2: corner_offsets(LATTICES[2]),
    3: corner_offsets(LATTICES[3]),
}


def value_noise(*coordinates: Array) -> Array:
    """Smooth noise in [0, 1] at points with 2 or 3 coordinates: random values at integers, blended.

    The coordinates are arrays of one shape, which is the result's.
    """
    dimensions = len(coordinates)
    lattice = LATTICES[dimensions]
    period = lattice.shape[0] - 1  # a power of two
    index = 0
    shares = []
    for coordinate, stride in zip(coordinates, lattice.strides):
        floor = np.floor(coordinate)
        wrapped = floor.astype(np.int32) & (period - 1)
        index = index + wrapped * (stride // lattice.itemsize)
        share = coordinate - floor
        shares.append(share * share * (3 - 2 * share))
    corners = np.add.outer(CORNERS[dimensions], index)
    values = lattice.ravel().take(corners)  # (2 ** dimensions, ...)
    for share in shares[::-1]:
        low = values[0::2]
        high = values[1::2]
        values = low + share * (high - low)
    return values[0]


def grain(cell: float, footprint: Array, *coordinates: Array) -> Array:
    """Noise about zero in cells of a given size, fading where a ray's footprint outgrows them."""
    scaled = [coordinate / cell for coordinate in coordinates]
    blur = 2 * footprint / cell
    return (value_noise(*scaled) - 0.5) / (1 + blur**2)


def stripe(offset: Array, half_width: Array | float, footprint: Array) -> Array:
    """Share of a ray's footprint around `offset` that lies on the stripe |offset| < half_width."""
    right = np.minimum(half_width, offset + footprint / 2)
    left = np.maximum(-half_width, offset - footprint / 2)
    return np.clip((right - left) / footprint, 0, 1)


def repeat(offset: Array, period: float) -> Array:
    """Signed distance to the closest multiple of the period."""
    return offset - period * np.round(offset / period)


def mix(first: Array, second: Array, share: Array) -> Array:
    """Blend colours (3, n), or one colour of 3 numbers, from first (share 0) to second (share 1)."""
    first = np.asarray(first, np.float32)
    first = first.reshape(3, -1)
    second = np.asarray(second, np.float32)
    second = second.reshape(3, -1)
    return first + (second - first) * share.astype(np.float32)


# -------------------------------------------------------------------------------- sky and ground


def sky_texture(rays: Array, haze: Array, zenith: Array, clouds: float) -> Array:
    """Colours of rays that meet nothing: from haze to the zenith's colour, with a share of clouds."""
    x, y, z = rays / np.linalg.norm(rays, axis=0)
    up = np.maximum(-y, 0.01)
    x = x / (up + 0.12)  # on a plane above, which bends down towards the horizon
    z = z / (up + 0.12)
    cloud = 0
    for frequency in (1.5, 3.0, 6.0, 12.0):
        octave = value_noise(x * frequency, z * frequency + 7 * frequency)
        cloud = cloud + octave / frequency
    cloud = cloud / 1.25
    cover = 0.9 * np.clip(4 * (cloud - 1 + clouds), 0, 1)
    cover = cover * np.clip(6 * up, 0, 1)
    height = np.clip(2.2 * up, 0, 1) ** 0.6
    blue = mix(haze, zenith, height)
    return mix(blue, 1.25 * haze, cover)


class Ground(NamedTuple):
    """Points on the ground, every field (n,)."""

    x: Array
    z: Array
    u: Array  # to the right of the street's middle
    aside: Array  # distance from the middle
    across: Array  # and from that of the closest side street
    footprint: Array
    lengthwise: Array  # footprint in the direction of view, longer as rays graze the ground


class Speckle(NamedTuple):
    """Noise of three grain sizes, which the textures of the ground share."""

    coarse: Array
    middle: Array
    fine: Array


def ground_speckle(g: Ground) -> Speckle:
    width = np.maximum(g.footprint, 0.3 * g.lengthwise)
    coarse = grain(2.5, width, g.x, g.z)
    middle = grain(0.5, width, g.x, g.z)
    fine = grain(0.12, width, g.x, g.z)
    return Speckle(coarse, middle, fine)


def road_texture(g: Ground, noise: Speckle, half_road: float) -> Array:
    """Asphalt with a dashed line in the middle, solid ones at the edges, and zebra crossings."""
    light = 1 + 0.5 * noise.coarse + 0.2 * noise.middle + 0.5 * noise.fine
    asphalt = mix(BLACK, ASPHALT, light)
    dashes = stripe(repeat(g.z, 9), 1.5, g.lengthwise)
    dashes = dashes * stripe(g.u, 0.07, g.footprint)
    edge = stripe(g.aside - half_road + 2.2, 0.05, g.footprint)
    lines = np.maximum(dashes, edge)
    lines = np.where(g.across > 4.5, lines, 0)
    zebra = stripe(repeat(g.u, 1), 0.25, g.footprint)
    zebra = zebra * stripe(g.across - 5.5, 1.2, g.lengthwise)
    zebra = zebra * (g.aside < half_road)
    return mix(asphalt, MARKING, 0.85 * lines + 0.8 * zebra)


def paving_texture(g: Ground, noise: Speckle) -> Array:
    """Slabs with joints."""
    joints = stripe(repeat(g.u, 0.6), 0.02, g.footprint)
    joints = joints + stripe(repeat(g.z, 0.6), 0.02, g.lengthwise)
    light = 1 + 0.5 * noise.coarse + 0.2 * noise.middle
    light = light + 0.3 * noise.fine - 0.4 * joints
    return mix(BLACK, PAVING, light)


def grass_texture(noise: Speckle) -> Array:
    dry = np.clip(0.4 + noise.coarse, 0, 1)
    grass = mix(GREEN_GRASS, DRY_GRASS, dry)
    return grass * (1 + 0.6 * noise.middle + 0.9 * noise.fine)


# -------------------------------------------------------------------------------- solids


class Surface(NamedTuple):
    """Points on solids; every field is (n,) or (3, n)."""

    colour: Array  # of the solid
    local: Array  # place in the anchor's frame
    offset: Array  # place in the solid, from -1 to 1
    half: Array  # the solid's half extents
    style: Array  # three random numbers of the solid
    face: Array
    footprint: Array
    grazing: Array  # footprint along the surface

    def part(self, chosen: Array) -> "Surface":
        return Surface(*(values.take(chosen, axis=-1) for values in self))

    def on(self, face: int, other: int) -> Array:
        """Which points lie on either of two faces."""
        return (self.face == face) | (self.face == other)


def wall_texture(s: Surface) -> Array:
    """Plaster or brick with storeys of windows, and on the ground floor shops or doors."""
    bays, size, kind = s.style
    x, y, z = 2 * s.half  # extent
    height = -s.local[1]
    flank = s.face < FRONT
    span = np.where(flank, z, x)
    along = np.where(flank, s.offset[2], s.offset[0])
    along = (along + 1) * span / 2
    bay_count = np.round(span / (2.2 + 1.2 * bays))
    bay = span / np.maximum(bay_count, 1)
    storey_count = np.round(y / 3.1)
    storey = y / np.maximum(storey_count, 1)
    column = np.floor(along / bay)
    floor = np.floor(height / storey)

    colour = masonry(s, along, height)
    right = along - (column + 0.5) * bay  # from the middle of the window
    above = height - (floor + 0.52) * storey
    ledge = stripe(above + 0.52 * storey, 0.12, s.footprint)
    colour = mix(colour, LEDGE, 0.8 * ledge)

    shop = (floor == 0) & (kind > 0.65)
    wide = np.where(shop, 0.42, 0.2 + 0.1 * size) * bay
    tall = np.where(shop, 0.36, 0.28) * storey
    frame = stripe(right, wide + 0.12, s.grazing)
    frame = frame * stripe(above, tall + 0.12, s.footprint)
    colour = mix(colour, WINDOW_FRAME, frame * (bays > 0.3))

    upright = stripe(right, 0.04, s.grazing)
    level = stripe(above - 0.3, 0.04, s.footprint)
    bars = np.maximum(upright, level)
    glass = stripe(right, wide, s.grazing)
    glass = glass * stripe(above, tall, s.footprint)
    glass = glass * (1 - 0.9 * bars)

    window = column + np.floor(300 * size)  # a number of each window, and of its floor
    random = value_noise(window, floor + np.floor(300 * bays))
    curtain = (random > 0.5) & (above > (random - 0.7) * 3)
    door = (floor == 0) & ~shop & (random < 0.25)
    shine = np.clip(0.4 + above / storey, 0, 1)
    pane = mix(DARK_PANE, LIGHT_PANE, shine)
    pane = mix(pane, CURTAIN, 0.6 * curtain)
    pane = mix(pane, DOOR, door)
    return mix(colour, pane, glass)


def masonry(s: Surface, along: Array, height: Array) -> Array:
    """Plaster or brick, by the style of the house."""
    bays, size, kind = s.style
    course = np.floor(height / 0.2)
    brick = np.floor(along / 0.4 + 0.5 * course)
    bricks = value_noise(brick, course) - 0.5
    bricks = bricks / (1 + (6 * s.grazing) ** 2)
    plaster = 0.5 * grain(0.3, s.grazing, along, height)
    rough = np.where(kind < 0.4, bricks, plaster)
    stains = grain(2.0, s.grazing, along + 50 * size, height)
    return s.colour * (1 + 0.4 * stains + 0.6 * rough)


def roof_texture(s: Surface) -> Array:
    """Rows of tiles."""
    x, y, z = s.local
    rows = stripe(repeat(y, 0.3), 0.05, s.grazing)
    spots = grain(0.35, s.grazing, z, y)
    return s.colour * (1 - 0.3 * rows + 0.5 * spots)


def leaf_texture(s: Surface) -> Array:
    """Clumps of leaves, darker below."""
    shifted = s.local + 30 * s.style
    clumps = grain(0.8, s.footprint, *shifted)
    leaf = grain(0.16, s.footprint, *s.local)
    light = 0.95 + 1.1 * clumps + 1.8 * leaf
    light = light - 0.35 * s.offset[1]
    return s.colour * np.maximum(light, 0.1)


def disc_texture(s: Surface) -> Array:
    """Light grey in the middle of a thin ellipsoid, where the offset along its thin axis is large."""
    thin_axis = s.half.argmin(axis=0)
    thin = np.take_along_axis(s.offset, thin_axis[None], axis=0)
    middle = np.abs(thin[0]) > 0.75
    return mix(s.colour, DISC, middle)


def paint_texture(s: Surface) -> Array:
    """Bodywork with wheel arches, door seams, lights and number plates."""
    x, y, z = s.local
    height = -y
    from_axle = np.abs(z) - 0.62 * s.half[2]
    arch = np.hypot(from_axle, height - 0.32) < 0.4
    seam = stripe(repeat(z + 0.05, 1.1), 0.02, s.grazing)
    seam = seam * (np.abs(z) < 1.3)
    dark = s.on(RIGHT, LEFT) * np.maximum(arch, 0.7 * seam)
    colour = mix(s.colour, SEAM, dark)
    sill = stripe(height - 0.25, 0.12, s.footprint)
    colour = mix(colour, SILL, 0.8 * sill)

    end = s.on(FRONT, BACK)
    lamp = end * stripe(np.abs(x) - 0.66, 0.14, s.footprint)
    lamp = lamp * stripe(height - 0.74, 0.09, s.footprint)
    colour = mix(colour, HEADLAMP, lamp * (s.face == FRONT))
    colour = mix(colour, TAIL_LAMP, lamp * (s.face == BACK))
    plate = end * stripe(x, 0.26, s.footprint)
    plate = plate * stripe(height - 0.5, 0.06, s.footprint)
    return mix(colour, PLATE, plate)


def cabin_texture(s: Surface) -> Array:
    """Windows between the pillars of a car."""
    x, y, z = s.offset
    side = np.abs(z) < 0.72 + 0.12 * y
    side = side & (np.abs(z) > 0.04)
    end = np.abs(x) < 0.82
    window = np.where(s.on(RIGHT, LEFT), side, end)
    glass = window & (s.face != TOP) & (y > -0.8)
    shine = mix(DARK_GLASS, LIGHT_GLASS, np.clip(-y, 0, 1))
    return mix(s.colour, shine, glass)


TEXTURES = {  # by material; the others are plain
    "wall": wall_texture,
    "roof": roof_texture,
    "leaves": leaf_texture,
    "sign": disc_texture,
    "tyre": disc_texture,
    "paint": paint_texture,
    "cabin": cabin_texture,
}
