#!/usr/bin/env python3
"""Renders the synthetic street world: the data of this repo for those who have no KITTI at hand.

    python tools/street.py --data_path data/synthetic
    python tools/street.py --data_path /tmp/tiny --drives 2 --frames 6 --labelled 12 --workers 1

Each seed is one street with houses, trees, posts, cars, light and colours, and a camera's drive
along it. Written in KITTI's own layout: stereo frames, LiDAR scans, calibration and true poses of
a few drives, and labelled images, each of a world that no drive shows. tools/street_view.py says
how a camera sees the world. train_depth.py and train_seg.py render the data when they are missing.
"""

import fcntl
import os
import shutil
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from pictures import colour_depth, colour_labels, picture_grid
from tools import street_textures as textures
from tools import street_view
from tools.street_view import (
    CUBE,
    MAP_REACH,
    MAP_SCALE,
    MAP_START,
    MATERIAL_NAMES,
    frustum_planes,
    rotation_y,
)
from utils import InputError, Parser, run_main, within

Array = np.ndarray
CAMERA_HEIGHT = 1.65  # m
BASELINE = 0.54  # m between the cameras image_02 and image_03
START = MAP_START  # m along the street, where it is built up from
END = 480.0  # and to
QUADS = np.array(  # the faces of CUBE, as numbers of its corners
    [
        (0, 1, 3, 2),
        (4, 5, 7, 6),
        (0, 1, 5, 4),
        (2, 3, 7, 6),
        (0, 2, 6, 4),
        (1, 3, 7, 5),
    ]
)

LIDAR_ROTATION = np.array(  # from x forward, z up, to the camera's axes
    [
        [0.0, -1.0, 0.0],
        [0.0, 0.0, -1.0],
        [1.0, 0.0, 0.0],
    ]
)
LIDAR_TRANSLATION = np.array([-0.004, -0.076, -0.272])  # m
LIDAR_RANGE = 80.0  # m
DAY = "2011_09_26"
FIRST_DRIVE = 9001  # a number that no drive of KITTI's splits has

LABEL_COLOURS = {  # those of Cityscapes, ids ascending
    street_view.ROAD: (128, 64, 128),
    street_view.SIDEWALK: (244, 35, 232),
    street_view.BUILDING: (70, 70, 70),
    street_view.POLE: (153, 153, 153),
    street_view.VEGETATION: (107, 142, 35),
    street_view.TERRAIN: (152, 251, 152),
    street_view.SKY: (70, 130, 180),
    street_view.CAR: (0, 0, 142),
}


# -------------------------------------------------------------------------------- the world


class Anchor(NamedTuple):
    """A place on the street that solids are fixed to."""

    aside: float  # m right of the centre line
    along: float  # m along it
    speed: float = 0.0  # m a frame
    turn: float = 0.0  # rad


class Solid(NamedTuple):
    """A body in its anchor's frame; lengths in m."""

    anchor: int
    shape: str  # frustum, cylinder, ellipsoid
    material: str
    middle: tuple
    half: tuple  # half extents
    colour: tuple
    top: tuple = (1.0, 1.0)  # scale of a frustum's upper face along x and z


class StreetWorld:
    """One street with its houses, plants, cars, light and colours, and a camera's drive along it.

    Every number is drawn from the seed in a fixed order: another order gives other worlds.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.anchors = []
        self.solids = []
        self._draw_street()
        self._draw_light()
        self._build()
        self._tabulate()
        self.sunlight = self._map_sunlight()

    def _draw_street(self) -> None:
        rng = self.rng
        self.bend = rng.uniform(1, 8)  # m
        self.bend_rate = rng.uniform(0.018, 0.035)  # rad a m
        self.bend_phase = rng.uniform(0, 6.3)
        self.half_road = rng.uniform(5.3, 7)  # m
        self.walk = rng.uniform(1.8, 3.5)  # m wide
        self.verge = 1.2 * rng.integers(2)  # m of grass between road and sidewalk
        gaps = rng.uniform(45, 110, 6)
        positions = np.cumsum(gaps).astype(np.float32)
        self.side_streets = positions - 20  # m along the street
        self.speed = rng.uniform(0.6, 1.0)  # m a frame
        self.wobble = rng.uniform(0, 6.3, 4)  # phases of the camera's sway

    def _draw_light(self) -> None:
        rng = self.rng
        self.overcast = rng.random() < 0.35
        warmth = rng.uniform(0, 0.3)
        degrees = 80 if self.overcast else rng.uniform(28, 60)
        height = np.radians(degrees)
        azimuth = rng.uniform(0, 6.3)
        east = np.cos(height) * np.sin(azimuth)
        north = np.cos(height) * np.cos(azimuth)
        down = -np.sin(height)
        self.sun = np.array([east, down, north], np.float32)  # towards it

        brightness = 0.5 if self.overcast else rng.uniform(1.3, 1.8)
        sun_colour = np.float32([1, 1 - warmth / 2, 1 - warmth])
        self.sun_colour = sun_colour * brightness
        brightness = 0.75 if self.overcast else rng.uniform(0.4, 0.55)
        self.ambient = np.float32([0.85, 0.93, 1.05]) * brightness
        grey = [0.55, 0.6, 0.66]
        blue = [0.13, 0.27, 0.6]
        zenith = np.float32(grey if self.overcast else blue)
        self.zenith = zenith * rng.uniform(0.8, 1.2)
        haze = np.float32([0.72, 0.75, 0.78])
        self.haze = haze * rng.uniform(0.9, 1.1)
        self.visibility = rng.uniform(300, 900)  # m
        low, high = (0.5, 0.8) if self.overcast else (0.25, 0.6)
        self.clouds = rng.uniform(low, high)

    def centre(self, z: Array) -> Array:
        """Lateral position (m) of the street's centre line at z (m)."""
        phase = z * self.bend_rate + self.bend_phase
        return self.bend * np.sin(phase)

    def heading(self, z: Array) -> Array:
        """Direction (rad) of the street's centre line at z (m)."""
        phase = z * self.bend_rate + self.bend_phase
        slope = self.bend * self.bend_rate * np.cos(phase)
        return np.arctan(slope)

    def pose(self, time: float) -> Array:
        """Camera-to-world matrix (4, 4) of the left camera at a time in frames."""
        rates = np.array([0.31, 0.47, 0.13, 0.1])
        sway, nod, drift, pace = np.sin(time * rates + self.wobble)
        z = 10 + self.speed * (time + 0.5 * pace)
        pitch = 0.006 * nod
        c = np.cos(pitch)
        s = np.sin(pitch)
        tilt = np.eye(3)
        tilt[1, 1:] = c, -s
        tilt[2, 1:] = s, c
        yaw = self.heading(z) + 0.012 * sway
        pose = np.eye(4)
        pose[:3, :3] = rotation_y(yaw) @ tilt
        pose[0, 3] = self.centre(z) + 1.6 + 0.15 * drift
        pose[1, 3] = -CAMERA_HEIGHT + 0.015 * nod
        pose[2, 3] = z
        return pose

    def frames(self, time: float) -> tuple[Array, Array]:
        """Anchor-to-world rotations (A, 3, 3) and origins (A, 3) at a time in frames."""
        aside, along, speed, turn = self.anchor_table.T
        z = along + speed * time
        x = self.centre(z) + aside
        origins = np.stack([x, np.zeros_like(z), z], -1)
        return rotation_y(self.heading(z) + turn), origins

    def render(self, pose: Array, time: float, K: Array, size: tuple) -> dict:
        """What a camera (pose: camera to world) sees at a time; see street_view.render."""
        return street_view.render(self, pose, time, K, size)

    # ---------------------------------------------------------------------------- layout

    def _anchor(self, *place: float) -> None:
        self.anchors.append(Anchor(*place))

    def _solid(self, shape: str, material: str, *rest) -> None:
        """Add a solid to the latest anchor: shape, material, middle, half, colour, top."""
        anchor = len(self.anchors) - 1
        self.solids.append(Solid(anchor, shape, material, *rest))

    def _along(self, low: float, high: float, margin: float) -> list[float]:
        """Positions along the street, low to high m apart, a margin (m) from the side streets."""
        count = int((END - START) / low)
        gaps = self.rng.uniform(low, high, count)
        positions = START + np.cumsum(gaps)
        distances = np.abs(self.side_streets - positions[:, None])
        free = distances.min(axis=1) > margin
        return list(positions[free & (positions < END)])

    def _build(self) -> None:
        rng = self.rng
        self.gaps = rng.uniform(0.05, 0.35)  # share of places without a house
        self.storeys = rng.uniform(2, 4.5)
        self.parked = rng.uniform(0.1, 0.55)  # share with a parked car
        self.hedges = rng.random()  # share with a hedge
        self.tree_gap = rng.uniform(9, 26)  # m
        self.post_gap = rng.uniform(8, 16)  # m
        self.house_width = rng.uniform(9, 15)  # m
        for side in (-1, 1):
            self._build_side(side)

        ahead = rng.uniform(26, 45)
        speed = self.speed * rng.uniform(0.97, 1.05)
        self._car(1.7, ahead, speed, 0.0)
        gaps = rng.uniform(18, 70, 30)  # enough for the longest drive
        for z in np.cumsum(gaps):
            self._car(-1.6, z, -1.1 * self.speed, np.pi)

    def _build_side(self, side: int) -> None:
        rng = self.rng
        curb = self.half_road + self.verge
        garden = rng.choice([0.3, 2.0, 4.5])
        front = curb + self.walk + garden
        width = self.house_width
        for z in self._along(width + 0.2, width * 1.25, width / 2 + 5):
            if rng.random() < self.gaps:
                aside = front + rng.uniform(0, 8)
                self._tree(side * aside, z)
            else:
                self._house(side, front, z)
        for z in self._along(8, 20, 0):  # trees far off close the view between the houses
            self._tree(side * rng.uniform(35, 50), z)
        gap = self.tree_gap
        for z in self._along(0.5 * gap, 1.5 * gap, 6):
            aside = curb + 0.5 + rng.integers(2) * (self.walk + 0.6)
            self._tree(side * aside, z)
        gap = self.post_gap
        for z in self._along(0.5 * gap, 1.5 * gap, 4):
            self._post(side, z)
        for z in self._along(5.6, 8, 9):
            if rng.random() < self.parked:
                aside = self.half_road - 1.05
                turn = 0.0 if side > 0 else np.pi
                self._car(side * aside, z, 0.0, turn)
        for z in self._along(5, 5.5, 8):
            if garden > 1 and rng.random() < self.hedges:
                aside = curb + self.walk + 0.6
                self._hedge(side * aside, z)

    def _hedge(self, aside: float, z: float) -> None:
        rng = self.rng
        self._anchor(aside, z)
        height = rng.uniform(0.4, 0.8)
        green = rng.uniform([0.05, 0.1, 0.02], [0.12, 0.18, 0.05])
        middle = (0, -height, 0)
        half = (0.45, height, 2.4)
        top = (0.8, 0.97)
        self._solid("frustum", "leaves", middle, half, green, top)

    def _house(self, side: int, front: float, z: float) -> None:
        rng = self.rng
        floors = round(self.storeys + rng.uniform(-1.2, 1.2))
        floors = max(1, floors)
        width = self.house_width / 2  # half extents, like height, depth and rise
        height = floors * rng.uniform(1.45, 1.7)
        depth = rng.uniform(4, 6.5)
        rise = rng.uniform(1, 2)
        aside = front + depth + rng.uniform(0, 0.4)
        self._anchor(side * aside, z)
        plaster = rng.choice(textures.WALLS) * rng.uniform(0.7, 1.1)
        middle = (0, -height, 0)
        half = (depth, height, width)
        self._solid("frustum", "wall", middle, half, plaster)

        if floors < 5 and rng.random() < 0.75:  # a gable or hipped roof with a chimney
            tiles = rng.choice(textures.TILES)
            ridge = (0.02, rng.choice([1.0, 0.6]))
            top = -2 * height - rise
            middle = (0, top, 0)
            half = (depth + 0.4, rise, width + 0.1)
            self._solid("frustum", "roof", middle, half, tiles, ridge)
            middle = (-1.5 * side, top - 0.6 * rise, 2)
            half = (0.35, rise, 0.45)
            self._solid("frustum", "roof", middle, half, textures.CHIMNEY)
        else:
            middle = (0, -2 * height - 0.2, 0)
            half = (depth + 0.25, 0.25, width)
            self._solid("frustum", "roof", middle, half, textures.FLAT_ROOF)

    def _tree(self, aside: float, z: float) -> None:
        rng = self.rng
        size = rng.uniform(0.6, 1.25)
        green = rng.uniform([0.05, 0.09, 0.02], [0.14, 0.18, 0.06])
        trunk = rng.uniform(1.9, 2.9) * size
        turn = rng.uniform(0, 6.3)
        self._anchor(aside, z, 0.0, turn)
        middle = (0, -0.75 * trunk, 0)
        half = (0.16 * size, 0.75 * trunk, 0.16 * size)
        self._solid("cylinder", "bark", middle, half, textures.BARK)
        for _ in range(rng.integers(5, 8)):
            place = rng.uniform([-1.2, 0.5, -1.2], [1.2, 3.4, 1.2])
            x, y, w = place * size
            middle = (x, -trunk - y, w)
            half = rng.uniform([0.9, 0.7, 0.9], [1.6, 1.4, 1.6])
            shade = rng.uniform(0.8, 1.2)
            self._solid("ellipsoid", "leaves", middle, half * size, green * shade)

    def _post(self, side: int, z: float) -> None:
        rng = self.rng
        grey = np.array(textures.GREY) * rng.uniform(0.4, 1.3)
        self._anchor(side * (self.half_road + 0.45), z)
        if rng.random() < 0.55:  # a street lamp, its arm over the road
            height = rng.uniform(2.6, 3.8)
            radius = rng.uniform(0.07, 0.12)
            arm = rng.uniform(0.5, 1.0)
            half = (radius, height, radius)
            self._solid("cylinder", "metal", (0, -height, 0), half, grey)
            middle = (-side * arm, -2 * height, 0)
            half = (arm, 0.05, 0.05)
            self._solid("frustum", "metal", middle, half, grey)
            middle = (-side * 2 * arm, -2 * height, 0)
            half = (0.35, 0.09, 0.13)
            self._solid("frustum", "metal", middle, half, grey * 1.5)
        else:
            height = rng.uniform(1.15, 1.4)
            colour = rng.choice(textures.SIGNS)
            half = (0.05, height, 0.05)
            self._solid("cylinder", "metal", (0, -height, 0), half, grey * 1.4)
            middle = (0, -2 * height + 0.3, -0.07)
            half = (0.36, 0.36, 0.03)
            self._solid("ellipsoid", "sign", middle, half, colour)

    def _car(self, aside: float, z: float, speed: float, turn: float) -> None:
        rng = self.rng
        paint = rng.choice(textures.PAINTS)
        length = rng.uniform(1.95, 2.25)
        van = rng.random() < 0.25
        body = 0.46 if van else 0.35
        cabin = 0.42 if van else 0.28
        share = 0.78 if van else 0.62  # of the length, under the cabin
        slope = 0.84 if van else 0.6
        self._anchor(aside, z, speed, turn)
        middle = (0, -0.25 - body, 0)
        half = (0.88, body, length)
        self._solid("frustum", "paint", middle, half, paint, (0.93, 0.95))
        middle = (0, -0.25 - 2 * body - cabin, -0.3)
        half = (0.8, cabin, share * length)
        self._solid("frustum", "cabin", middle, half, paint, (0.82, slope))
        axle = 0.62 * length
        half = (0.15, 0.32, 0.32)
        for x, w in product((-0.78, 0.78), (-axle, axle)):
            self._solid("ellipsoid", "tyre", (x, -0.32, w), half, textures.TYRE)

    # ---------------------------------------------------------------------------- tables

    def _tabulate(self) -> None:
        """Turn the lists into arrays, indexed by the number of the solid that a ray hits."""
        self.anchor_table = np.array(self.anchors)  # (A, 4)
        self.moves = self.anchor_table[:, 2] != 0
        columns = [np.array(column) for column in zip(*self.solids)]
        table = Solid(*columns)
        self.anchor = table.anchor
        self.shape = table.shape
        material = [MATERIAL_NAMES.index(name) for name in table.material]
        self.material = np.array(material)
        self.middle = table.middle.astype(np.float32)
        self.half = table.half.astype(np.float32)
        self.colour = table.colour.astype(np.float32)
        count = len(self.solids)
        self.style = self.rng.random((count, 3), np.float32)
        self.normals, self.offsets = frustum_planes(table.half, table.top)

        scale = np.ones((count, 8, 3), np.float32)
        upper = CUBE[:, 1] < 0  # y points down
        scale[:, upper, 0] = table.top[:, :1]
        scale[:, upper, 2] = table.top[:, 1:]
        corners = self.half[:, None] * CUBE * scale
        self.corners = self.middle[:, None] + corners  # (n, 8, 3)

    def _map_sunlight(self) -> Array:
        """Share of sunlight that reaches each cell of the ground past the standing solids."""
        width = 2 * MAP_REACH * MAP_SCALE
        length = int((END + 100 - START) * MAP_SCALE)
        canvas = Image.new("L", (width, length), 255)
        draw = ImageDraw.Draw(canvas)
        rotations, origins = self.frames(0.0)
        standing = np.flatnonzero(~self.moves[self.anchor])
        anchor = self.anchor[standing]
        points = self.corners[standing] @ rotations[anchor].transpose(0, 2, 1)
        points = points + origins[anchor, None]
        heights = points[..., 1:2]
        points = points - self.sun * (heights / self.sun[1])  # down to the ground
        cells = points[..., ::2] + [MAP_REACH, -START]
        cells = cells * MAP_SCALE  # (n, 8, 2)
        for i, shadow in zip(standing, cells):
            if self.shape[i] == "ellipsoid":
                middle = shadow.mean(axis=0)
                radius = self.half[i].mean() * MAP_SCALE
                box = [*(middle - radius), *(middle + radius)]
                draw.ellipse(box, fill=0)
            else:
                for quad in shadow[QUADS].reshape(6, 8):
                    draw.polygon(quad.tolist(), fill=0)
        blur = 6.0 if self.overcast else 1.0  # cells
        blurred = canvas.filter(ImageFilter.GaussianBlur(blur))
        return np.asarray(blurred, np.float32) / 255


# -------------------------------------------------------------------------------- KITTI's layout


def camera_matrix(height: int, width: int) -> Array:
    """Intrinsics (3, 3) in pixels with KITTI's field of view."""
    K = np.eye(3)
    K[0, 0] = 0.58 * width
    K[1, 1] = 0.58 * width
    K[0, 2] = 0.5 * (width - 1)
    K[1, 2] = 0.48 * (height - 1)
    return K


def lidar_scan(depth: Array, K: Array) -> Array:
    """Points (n, 4) in the LiDAR's frame: the depth at the pixels closest to its beams."""
    beams = np.linspace(-24.8, 2, 64)
    sweep = np.arange(-60, 60, 0.35)
    elevation, azimuth = np.meshgrid(np.radians(beams), np.radians(sweep))
    fx, _, cx = K[0]
    _, fy, cy = K[1]
    u = np.rint(fx * np.tan(azimuth) + cx).astype(int)
    v = np.rint(-fy * np.tan(elevation) / np.cos(azimuth) + cy).astype(int)
    height, width = depth.shape
    inside = (u >= 0) & (u < width)
    inside &= (v >= 0) & (v < height)
    u = u[inside]
    v = v[inside]
    x = (u - cx) / fx
    y = (v - cy) / fy
    rays = np.stack([x, y, np.ones_like(x)], -1)
    z = depth[v, u]
    close = z * np.linalg.norm(rays, axis=1) <= LIDAR_RANGE
    points = rays[close] * z[close, None]
    points = (points - LIDAR_TRANSLATION) @ LIDAR_ROTATION
    scan = np.insert(points, 3, 0.3, axis=1)  # a constant reflectance
    return scan.astype(np.float32)


def save_image(path: Path, image: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=1)


def write_calibration(day: Path, K: Array, size: tuple) -> None:
    """Write KITTI's two calibration files; camera 0 coincides with camera 2."""
    height, width = size
    shift = [-BASELINE * K[0, 0], 0, 0]
    cameras = {
        "S_rect_02": [width, height],
        "R_rect_00": np.eye(3),
        "P_rect_02": np.c_[K, np.zeros(3)],
        "S_rect_03": [width, height],
        "P_rect_03": np.c_[K, shift],
    }
    lidar = {
        "R": LIDAR_ROTATION,
        "T": LIDAR_TRANSLATION,
    }
    day.mkdir(parents=True)
    write_entries(day / "calib_cam_to_cam.txt", cameras)
    write_entries(day / "calib_velo_to_cam.txt", lidar)


def write_entries(path: Path, entries: dict) -> None:
    with open(path, "w") as file:
        for key, values in entries.items():
            numbers = [f"{value:e}" for value in np.ravel(values)]
            print(f"{key}:", *numbers, file=file)


@dataclass
class Settings:
    """What is rendered; the defaults are what training scripts and run_all.sh render."""

    drives: int = 8
    frames: int = 24  # of each drive
    labelled: int = 80
    height: int = 128
    width: int = 416
    seed: int = 0
    workers: int = 2  # processes

    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def camera(self) -> Array:
        return camera_matrix(self.height, self.width)

    def drive_seed(self, number: int) -> int:
        return 1000 * self.seed + number

    def labelled_seed(self, number: int) -> int:
        return 1000 * self.seed + 500 + number  # no world that a drive shows


def render_drive(root: Path, number: int, settings: Settings) -> None:
    """Render a drive with both cameras, and write its images, LiDAR scans and poses."""
    world = StreetWorld(settings.drive_seed(number))
    K = settings.camera()
    right = np.eye(4)
    right[0, 3] = BASELINE
    drive = root / DAY / f"{DAY}_drive_{FIRST_DRIVE + number}_sync"
    scans = drive / "velodyne_points" / "data"
    scans.mkdir(parents=True)
    poses = []
    for frame in range(settings.frames):
        name = f"{frame:010d}"
        pose = world.pose(frame)
        poses.append(pose[:3].ravel())
        view = world.render(pose, frame, K, settings.size())
        other = world.render(pose @ right, frame, K, settings.size())
        save_image(drive / "image_02" / "data" / f"{name}.png", view["image"])
        save_image(drive / "image_03" / "data" / f"{name}.png", other["image"])
        scan = lidar_scan(view["depth"], K)
        scan.tofile(scans / f"{name}.bin")
    np.savetxt(drive / "poses.txt", poses, fmt="%.9e")


def labelled_view(number: int, settings: Settings) -> dict:
    """One view of a world of its own, somewhere along its street."""
    world = StreetWorld(settings.labelled_seed(number))
    time = 37 * number % 300
    pose = world.pose(time)
    return world.render(pose, time, settings.camera(), settings.size())


def render_labelled(root: Path, number: int, settings: Settings) -> None:
    """Write one labelled image."""
    view = labelled_view(number, settings)
    name = f"{number:06d}_10.png"
    save_image(root / "training" / "image_2" / name, view["image"])
    save_image(root / "training" / "semantic" / name, view["label"])


def render(root: str | Path, **settings) -> None:
    """Write the data set to `root`, which must not exist and appears only once it is complete.

    The settings are those of `Settings`.
    """
    settings = Settings(**settings)
    root = Path(root)
    if root.exists():
        raise InputError(f"{root} exists already")
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(root.with_name(f"{root.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if root.exists():  # another process was rendering the same
            return
        unfinished = root.with_name(f"{root.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_calibration(unfinished / DAY, settings.camera(), settings.size())
        render_worlds(unfinished, settings)
        unfinished.rename(root)


def render_worlds(root: Path, settings: Settings) -> None:
    """Render drives and labelled images in several processes."""
    with ProcessPoolExecutor(settings.workers, get_context("fork")) as pool:
        jobs = []
        for number in range(settings.drives):
            jobs.append(pool.submit(render_drive, root, number, settings))
        for number in range(settings.labelled):
            jobs.append(pool.submit(render_labelled, root, number, settings))
        for job in tqdm(jobs, desc="rendering worlds", disable=None):
            job.result()


# -------------------------------------------------------------------------------- command


def preview(path: str, settings: Settings, views: int = 4) -> None:
    """Write a picture of a few labelled views: image, depth and labels side by side."""
    rows = []
    names = []
    for number in range(views):
        view = labelled_view(number, settings)
        image = torch.tensor(view["image"]).permute(2, 0, 1) / 255  # (3, H, W)
        depth = torch.tensor(view["depth"])[None, None]
        depth = depth.clamp(max=street_view.FAR)
        depth = colour_depth(depth, 4.0, 80.0)
        ids = list(LABEL_COLOURS)
        label = torch.tensor(np.searchsorted(ids, view["label"]))
        label = colour_labels(label[None], tuple(LABEL_COLOURS.values()))
        rows.append([image, depth[0], label[0]])
        names.append(f"world {settings.labelled_seed(number)}")
    folder = os.path.dirname(path)
    os.makedirs(folder or ".", exist_ok=True)
    columns = ["image", "depth, 4 to 80 m", "labels"]
    picture_grid(rows, columns, names).save(path)
    print(f"preview: {path}", flush=True)


def parse_options(argv: list[str] | None = None) -> Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data_path", default="data/synthetic", help="folder to be made")
    add("--drives", type=within(int, 0, 500), help="streets to drive along")
    add("--frames", type=within(int, 1, 300), help="stereo pairs of each drive")
    add("--labelled", type=within(int, 0, 500), help="labelled images, of other streets")
    add("--height", type=within(int, 32, 8192), help="pixels")
    add("--width", type=within(int, 32, 8192), help="pixels")
    add("--seed", type=within(int, 0), help="other seeds are other streets")
    add("--workers", type=within(int, 1, 256), help="processes")
    add("--preview", metavar="PICTURE", help="first write a picture of a few views")
    parser.set_defaults(**vars(Settings()))
    return parser.parse_args(argv)


def main() -> None:
    settings = vars(parse_options())
    root = settings.pop("data_path")
    picture = settings.pop("preview")
    if picture:
        preview(picture, Settings(**settings))
    render(root, **settings)


if __name__ == "__main__":
    run_main(main)
