"""What the stand-ins are made of: primitive shapes, and bodies of them.

Lengths are in millimetres and masses in grams, in LIBERO's body frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

# LIBERO's contact parameters of all objects but the microwave and the stove's base.
CONTACT = {"friction": "0.95 0.3 0.1", "solref": "0.001 1", "solimp": "0.998 0.998 0.001"}

BLACK, DARK, GRAY, METAL, WHITE = (0.09, 0.09, 0.1), (0.2, 0.18, 0.16), (0.42, 0.42, 0.42), (0.6, 0.6, 0.62), (0.9, 0.89, 0.87)
RED, GREEN, BLUE, YELLOW, ORANGE = (0.72, 0.1, 0.08), (0.16, 0.45, 0.2), (0.15, 0.3, 0.65), (0.93, 0.8, 0.25), (0.95, 0.55, 0.1)
BROWN, WOOD, TAN, WINE = (0.32, 0.18, 0.12), (0.69, 0.49, 0.28), (0.85, 0.7, 0.5), (0.3, 0.09, 0.04)


# ---------------------------------------------------------------------------------------------- shapes


@dataclasses.dataclass(frozen=True)
class Shape:
    """A primitive of MuJoCo in its body's frame. `solid` shapes collide and weigh, `seen` ones are in pictures."""

    kind: str  # box (half sizes), cylinder (radius, half height), ellipsoid (half axes), capsule (radius, half length)
    centre: tuple[float, ...]
    size: tuple[float, ...]
    colour: tuple[float, ...]  # rgb
    turn: np.ndarray = dataclasses.field(default_factory=lambda: np.eye(3))
    solid: bool = True
    seen: bool = True
    name: str | None = None  # a named geom of LIBERO
    mass: float | None = None  # if given, not its share of the body's
    weight: float = 1.0  # density relative to the body's other shapes, for boxes that overlap


def about(axis: str, degrees: float) -> np.ndarray:
    """Rotation matrix about x, y or z."""
    i = "xyz".index(axis)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.eye(3)
    j, k = (i + 1) % 3, (i + 2) % 3
    turn[j, j], turn[j, k], turn[k, j], turn[k, k] = c, -s, s, c
    return turn


def box(centre, half, colour, turn=None, **options) -> Shape:
    return Shape("box", tuple(centre), tuple(half), colour, np.eye(3) if turn is None else turn, **options)


def span(low, high, colour, **options) -> Shape:
    """A box from corner to corner."""
    low, high = np.array(low, float), np.array(high, float)
    return box((low + high) / 2, (high - low) / 2, colour, **options)


def look(kind, centre, size, colour, turn=None, **options) -> Shape:
    """Something that is only seen."""
    return Shape(kind, tuple(centre), tuple(size), colour, np.eye(3) if turn is None else turn, solid=False, **options)


def plank(azimuth: float, start, end, width: float, thick: float, colour, centre=(0.0, 0.0), **options) -> Shape:
    """A board from `start` to `end`, given as (distance from the axis through `centre`, height), seen from the side at `azimuth`.

    `width` is half its extent along the tangent, `thick` half its thickness.
    """
    outward = about("z", azimuth) @ [1.0, 0.0, 0.0]
    up = np.array([0.0, 0.0, 1.0])
    (r0, z0), (r1, z1) = start, end
    length = np.hypot(r1 - r0, z1 - z0)
    along = ((r1 - r0) * outward + (z1 - z0) * up) / length
    tangent = np.cross(up, outward)
    middle = (r0 + r1) / 2 * outward + (z0 + z1) / 2 * up + [*centre, 0.0]
    return box(middle, (thick, width, length / 2), colour, np.column_stack([np.cross(tangent, along), tangent, along]), **options)


def chain(azimuth: float, points, width: float, thick: float, colour, centre=(0.0, 0.0)) -> list[Shape]:
    """Planks from point to point: a handle."""
    return [plank(azimuth, a, b, width, thick, colour, centre) for a, b in zip(points, points[1:], strict=False)]


def ring(profile, thick: float, sides: int, colour, centre=(0.0, 0.0), seen: float = 1.0) -> list[Shape]:
    """A hollow round thing: planks side by side along a profile of (radius, height), which is the middle of the wall.

    `seen` is the ratio of the radii that are seen to those that collide: LIBERO's collision geoms stay within its meshes.
    """
    if seen != 1.0:
        outline = [(r * seen, z) for r, z in profile]
        return [*_planks(profile, thick, sides, colour, centre, seen=False), *_planks(outline, thick, 16, colour, centre, solid=False)]
    return _planks(profile, thick, sides, colour, centre)


def _planks(profile, thick, sides, colour, centre, **options) -> list[Shape]:
    return [
        plank(360.0 * i / sides, a, b, max(a[0], b[0]) * np.tan(np.pi / sides), thick, colour, centre, **options)
        for a, b in zip(profile, profile[1:], strict=False)
        for i in range(sides)
    ]


def prism(radius: float, low: float, high: float, colour, centre=(0.0, 0.0), sides: int = 8, weight: float = 1.0) -> list[Shape]:
    """An upright regular prism of `sides` (a multiple of 4) faces at `radius`, as boxes that cross; seen as a cylinder.

    Boxes instead of a cylinder, as in LIBERO: MuJoCo finds several contacts between boxes, so that it stands still. Two of them
    reach 0.3 mm further than the others: it stands on a cross, with fewer contacts to solve for.
    """
    middle, half = (*centre, (low + high) / 2), (high - low) / 2
    across = radius * np.tan(np.pi / sides)
    shapes = []
    for i in range(sides // 2):
        size = radius, across, half - (0.3 if i % (sides // 4) else 0)
        turn = about("z", 360.0 * i / sides)
        shapes.append(box(middle, size, colour, turn, seen=False, weight=weight / 2))  # a prism has half its boxes' volume
    return [*shapes, look("cylinder", middle, (radius, half), colour)]


def tier(half, low: float, high: float, colour, centre=(0.0, 0.0)) -> Shape:
    """A box between two heights."""
    return box((*centre, (low + high) / 2), (*half, (high - low) / 2), colour)


# ---------------------------------------------------------------------------------------------- bodies


@dataclasses.dataclass(frozen=True)
class Site:
    name: str
    pos: tuple[float, ...]
    size: tuple[float, ...]
    quat: tuple[float, ...] = (1, 0, 0, 0)
    kind: str = "box"
    rgba: str = "0.8 0.8 0.8 0"


@dataclasses.dataclass(frozen=True)
class Joint:
    name: str
    kind: str
    axis: str
    range: str  # metres or radians
    damping: float


@dataclasses.dataclass(frozen=True)
class Body:
    name: str
    shapes: Sequence[Shape] = ()
    sites: Sequence[Site] = ()
    bodies: Sequence[Body] = ()
    pos: tuple[float, ...] = (0, 0, 0)
    quat: tuple[float, ...] = (1, 0, 0, 0)
    mass: float | None = None  # grams, spread evenly over the shapes that have none of their own
    inertial: bool = False  # 3 kg and 1 kg m^2 about its origin: LIBERO's drawers and knob
    joint: Joint | None = None
    contact: dict[str, str] = dataclasses.field(default_factory=lambda: CONTACT)


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object or fixture: one MJCF file."""

    file: str
    body: Body
    # Sites that robosuite's placement samplers read: the heights of bottom and top, and the radius of the footprint.
    bottom: float = -60
    top: float = 40
    radius: float = 25
    mark: float = 5  # their size
