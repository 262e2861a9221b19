"""Pictures of shapes and the exact mask of each: what tools/make_shapes_dataset.py writes to disk.

A scene is planned from front to back, so that what is hidden of an object is known once it is placed, and painted from
back to front. Picture and mask come from one coverage map: a pixel is the object's where half of it or more is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Outline: TypeAlias = NDArray[np.float64]
"""Corners (N, 2) of a closed line as x, y within the unit circle, y down."""
Mask: TypeAlias = NDArray[np.bool_]
Picture: TypeAlias = NDArray[np.float32]

KEYPOINTS: Final = ("top", "right", "bottom", "left")
MIN_DIAMETER: Final = 6.0  # pixels; below that a star is a circle
MIN_SIDE: Final = 3  # pixels of a visible part's box
MIN_VISIBLE: Final = 0.35  # share of an object's pixels, those beyond the image's border included
MIN_CONTRAST: Final = 90.0  # Euclidean distance in RGB from what is painted over
CLUTTER: Final = ("line", "blob")
MAX_CLUTTER: Final = 6
NEIGHBOUR_PROBABILITY: Final = 0.5  # of an object being placed so that it overlaps another
SUPERSAMPLING: Final = 4  # per axis


def _regular(corners: int, radius: float = 1.0) -> Outline:
    angles = 2 * np.pi * np.arange(corners) / corners - np.pi / 2
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _heart() -> Outline:
    t = 2 * np.pi * np.arange(48) / 48
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 18.2


def _crescent() -> Outline:
    outer = np.linspace(0.25, 1.75, 40) * np.pi
    inner = np.linspace(1.7, 0.3, 28) * np.pi
    inside = np.stack([0.4 + 0.62 * np.cos(inner), 0.66 * np.sin(inner)], axis=1)
    return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], axis=1), inside])


_CROSS = [(-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3)]
_ARROW = [(0.0, -1.0), (0.8, -0.1), (0.3, -0.1), (0.3, 0.95), (-0.3, 0.95), (-0.3, -0.1), (-0.8, -0.1)]
_BAR = [(-0.92, -0.38), (0.92, -0.38), (0.92, 0.38), (-0.92, 0.38)]
_HALF = np.linspace(0, np.pi, 32)

SHAPES: Final[dict[str, Outline]] = {
    "circle": _regular(64),
    "square": _regular(4),
    "triangle": _regular(3),
    "star": _regular(10) * np.tile([[1.0], [0.42]], (5, 1)),
    "pentagon": _regular(5),
    "cross": np.concatenate([_CROSS, -np.array(_CROSS)]),
    "ring": _regular(64),
    "heart": _heart(),
    "crescent": _crescent(),
    "arrow": np.array(_ARROW),
    "bar": np.array(_BAR),
    "semicircle": np.stack([np.cos(_HALF), np.sin(_HALF) - 0.4], axis=1) / 1.08,
}
NO_HOLE: Final[Outline] = np.empty((0, 2))
HOLES: Final = {"ring": _regular(64, radius=0.5)}


@dataclass(frozen=True)
class Stamp:
    """A shape where it will be painted: its coverage (h, w) from 0 to 1 and the pixel of its upper left corner."""

    coverage: Picture
    top: int
    left: int
    centre: tuple[float, float]
    radius: float

    @property
    def mask(self) -> Mask:
        """The pixels (h, w) that are the shape's."""
        return self.coverage >= 0.5

    def mask_in(self, size: tuple[int, int]) -> Mask:
        """Return the pixels that are the shape's in an image of ``size``."""
        image_part, stamp_part = self.clip(size)
        mask = np.zeros(size, bool)
        mask[image_part] = self.mask[stamp_part]
        return mask

    def clip(self, size: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Return where an image of ``size`` and this stamp meet: the part of the image, and that of the stamp."""
        bottom, right = self.top + self.coverage.shape[0], self.left + self.coverage.shape[1]
        rows, columns = (max(self.top, 0), min(bottom, size[0])), (max(self.left, 0), min(right, size[1]))
        return (slice(*rows), slice(*columns)), (
            slice(rows[0] - self.top, rows[1] - self.top),
            slice(columns[0] - self.left, columns[1] - self.left),
        )


@dataclass(frozen=True)
class ShapeObject:
    """One object of a picture: its shape, its visible pixels (H, W) and an (x, y, COCO visibility) per keypoint."""

    shape: str
    mask: Mask
    keypoints: list[tuple[int, int, int]]


def draw_scene(
    rng: Generator, size: tuple[int, int], shapes: Sequence[str], max_objects: int, scales: tuple[float, float]
) -> tuple[NDArray[np.uint8], list[ShapeObject]]:
    """Return a picture (H, W, 3) and its objects, the front one first; there is at least one.

    Objects that others or the border hide by more than ``1 - MIN_VISIBLE`` are left out of the picture too.

    Args:
        rng: Decides everything.
        size: Height and width in pixels.
        shapes: Names out of ``SHAPES``.
        max_objects: Most objects to place, at least 1.
        scales: Smallest and largest diameter, as fractions of the shorter side.
    """
    kinds = [*rng.choice(shapes, rng.integers(1, max_objects + 1)), *rng.choice(CLUTTER, rng.integers(MAX_CLUTTER + 1))]
    waiting = [str(kind) for kind in rng.permutation(kinds)]
    objects: list[ShapeObject] = []
    stamps: list[Stamp] = []
    hidden = np.zeros(size, bool)
    while waiting or not objects:
        kind = waiting.pop() if waiting else str(rng.choice(shapes))
        stamp = place(rng, kind, size, scales, stamps)
        whole = stamp.mask_in(size)
        visible = whole & ~hidden
        if kind in SHAPES and not _recognisable(visible, stamp):
            continue
        if kind in SHAPES:
            objects.append(ShapeObject(kind, visible, find_keypoints(stamp, visible)))
        hidden |= whole
        stamps.append(stamp)
    picture = texture(rng, size, rng.uniform(40, 215, 3), contrast=28)
    for stamp in reversed(stamps):
        paint(rng, picture, stamp)
    return picture.round().clip(0, 255).astype(np.uint8), objects


def place(
    rng: Generator, kind: str, size: tuple[int, int], scales: tuple[float, float], others: Sequence[Stamp]
) -> Stamp:
    """Return a shape or a piece of clutter of random size and rotation, often one that overlaps one of ``others``."""
    centre, angle = rng.uniform(0, size), rng.uniform(0, 2 * np.pi)
    if kind in CLUTTER:
        outline, radius = clutter(rng, kind, min(size))
        return rasterise(outline, NO_HOLE, centre, radius, angle)
    radius = 0.5 * min(size) * float(np.exp(rng.uniform(*np.log(scales))))
    if others and rng.random() < NEIGHBOUR_PROBABILITY:
        other = others[int(rng.integers(len(others)))]
        direction, distance = rng.uniform(0, 2 * np.pi), (radius + other.radius) * rng.uniform(0.4, 0.9)
        offset = distance * np.array([np.sin(direction), np.cos(direction)])
        centre = np.clip(np.array(other.centre) + offset, 0, size)
    return rasterise(SHAPES[kind], HOLES.get(kind, NO_HOLE), centre, radius, angle)


def clutter(rng: Generator, kind: str, side: int) -> tuple[Outline, float]:
    """Return the outline of a thin line or a lopsided blob, and its radius in an image whose shorter side is given."""
    if kind == "line":
        radius = 0.5 * side * rng.uniform(0.3, 1.2)
        half_width = rng.uniform(0.6, 1.6) / radius
        return np.array([(-1, -half_width), (1, -half_width), (1, half_width), (-1, half_width)]), radius
    bulge = np.full(40, 0.7)
    for waves in (2, 3, 5):
        bulge += rng.uniform(0.04, 0.1) * np.cos(2 * np.pi * (waves * np.arange(40) / 40 + rng.random()))
    flat = [1.0, rng.uniform(0.3, 0.5)]  # rounder ones would pass for hearts and circles
    return _regular(40) * bulge[:, None] * flat, 0.5 * side * rng.uniform(0.12, 0.45)


def rasterise(outline: Outline, hole: Outline, centre: NDArray[np.float64], radius: float, angle: float) -> Stamp:
    """Return the coverage of an outline less its hole, turned by ``angle`` in radians; ``centre`` is (y, x)."""
    top, left = (int(np.floor(value - radius)) - 1 for value in centre)
    side = int(np.ceil(2 * radius)) + 4
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    canvas = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    for line, value in ((outline, 255), (hole, 0)):
        if len(line):
            corners = (line @ turn * radius + [centre[1] - left, centre[0] - top]) * SUPERSAMPLING
            draw.polygon([(x, y) for x, y in corners.tolist()], fill=value)  # the subpixel n spans n to n + 1
    coverage = np.asarray(canvas.reduce(SUPERSAMPLING)).astype(np.float32) / np.float32(255)
    return Stamp(coverage, top, left, (float(centre[0]), float(centre[1])), float(radius))


def find_keypoints(stamp: Stamp, visible: Mask) -> list[tuple[int, int, int]]:
    """Return the extreme pixels of the whole shape as x, y, visibility, in the order of ``KEYPOINTS``.

    They are extremes in the image, whatever the rotation, so that each can be told from the picture alone; of several
    in one row or column the middle one. Visibility is 2 (visible), 1 (hidden by something in front) or 0, with x and y
    0, beyond the image's border.
    """
    rows, columns = np.nonzero(stamp.mask)
    keypoints = []
    for along, extreme in ((rows, rows.min()), (columns, columns.max()), (rows, rows.max()), (columns, columns.min())):
        candidates = np.flatnonzero(along == extreme)
        middle = candidates[len(candidates) // 2]
        y, x = int(rows[middle]) + stamp.top, int(columns[middle]) + stamp.left
        inside = 0 <= y < visible.shape[0] and 0 <= x < visible.shape[1]
        keypoints.append((x, y, 1 + int(visible[y, x])) if inside else (0, 0, 0))
    return keypoints


def texture(rng: Generator, size: tuple[int, int], colour: NDArray[np.float64], contrast: float) -> Picture:
    """Return ``colour`` with a gradient, stripes and noise at four scales, (H, W, 3) around 0 to 255."""
    height, width = size
    rows, columns = np.mgrid[:height, :width].astype(np.float32) / max(size) - 0.5
    surface = np.broadcast_to(colour.astype(np.float32), (height, width, 3)).copy()
    for waves in (0.25, np.exp(rng.uniform(np.log(2), np.log(14)))):  # a quarter of a wave is a gradient
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        position = np.cos(angle) * columns + np.sin(angle) * rows
        wave = np.sin(2 * np.pi * waves * position + phase, dtype=np.float32)
        surface += wave[:, :, None] * rng.normal(0, 0.7 * contrast, 3).astype(np.float32)
    for cells in (3, 8, 24):
        grey = rng.normal(0, 0.6 * contrast, (cells, cells)).astype(np.float32)
        tint = rng.uniform(0.4, 1.2, 3).astype(np.float32)
        grown = Image.fromarray(grey).resize((width, height), Image.Resampling.BICUBIC)
        surface += np.asarray(grown)[:, :, None] * tint
    return surface + rng.normal(0, 0.2 * contrast, surface.shape).astype(np.float32)


def paint(rng: Generator, picture: Picture, stamp: Stamp) -> None:
    """Paint ``stamp`` over ``picture``, in place, in a random colour that stands out from what it covers."""
    image_part, stamp_part = stamp.clip((picture.shape[0], picture.shape[1]))
    coverage = stamp.coverage[stamp_part][:, :, None]
    if not coverage.sum():
        return  # clutter beyond the border
    below = (picture[image_part] * coverage).sum((0, 1)) / coverage.sum()
    colour = rng.uniform(0, 255, 3)
    while np.linalg.norm(colour - below) < MIN_CONTRAST:
        colour = rng.uniform(0, 255, 3)
    surface = texture(rng, (stamp.coverage.shape[0], stamp.coverage.shape[1]), colour, contrast=14)
    picture[image_part] += coverage * (surface[stamp_part].clip(0, 255) - picture[image_part])


def _recognisable(visible: Mask, stamp: Stamp) -> bool:
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    if visible.sum() < MIN_VISIBLE * stamp.mask.sum() or not len(rows):
        return False
    return bool(min(np.ptp(rows), np.ptp(columns)) + 1 >= MIN_SIDE)
