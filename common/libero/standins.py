"""LIBERO-shaped assets made of primitives, for machines that can't have the real ones.

`standin_assets` writes an asset tree into the user's cache on which LIBERO's own object classes, scenes, BDDL files, predicates
and official init states work unchanged: the files that the 130 tasks load, with LIBERO's names of files, bodies, joints, sites
and named geoms, its collision geoms in group 0 and what pictures show in group 1. There are no meshes: every shape is made of
boxes (what collides) and boxes, cylinders and ellipsoids (what is seen), and the few textures are drawn here. What things
measure was taken from LIBERO's assets: sizes, masses, friction, joints and the sites' regions (docs/standins.md: how closely).

Lengths in this file are in millimetres and masses in grams, in LIBERO's body frames.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import shutil
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from common.cli import cache_dir

MARKER = "STANDINS.txt"  # a file of this name in an asset tree says what the tree is

# LIBERO's contact parameters of all objects but the microwave and the stove's base.
CONTACT = {"friction": "0.95 0.3 0.1", "solref": "0.001 1", "solimp": "0.998 0.998 0.001"}
# The same for the microwave: it collides with others and not with itself (its door with its case).
MICROWAVE_CONTACT = {"contype": "0", "conaffinity": "1", "margin": "0.001", "solref": "0.02 1", "solimp": "0.8 0.9 0.01"}

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


def lying(shapes: Iterable[Shape]) -> list[Shape]:
    """Turn z to y: LIBERO's cans and bottles have their axis along y."""
    turn = about("x", -90.0)
    return [dataclasses.replace(s, centre=tuple(turn @ s.centre), turn=turn @ s.turn) for s in shapes]


def packet(centre, half, colour, label) -> list[Shape]:
    """A box with a label around its middle."""
    wide = np.argmax(half)
    size = [h * 0.45 if i == wide else h + 0.3 for i, h in enumerate(half)]
    return [box(centre, half, colour), look("box", centre, size, label)]


def can(radius: float, half: float, centre, colour, label) -> list[Shape]:
    """A can whose axis is y, with a label. `centre` (x, y, z)."""
    x, y, z = centre
    body = prism(radius, y - half, y + half, colour, (x, -z), sides=12)
    return lying([*body, look("cylinder", (x, -z, y), (radius + 0.3, half * 0.8), label)])


def carton(half: float, low: float, shoulder: float, top: float, colour, cap) -> list[Shape]:
    """A milk carton whose axis is y: a box, a gable roof and its ridge."""
    body = tier((half, half), low, shoulder, colour)
    roof = [plank(a, (half - 1, shoulder), (2, top - 6), half, 2.2, colour) for a in (90, 270)]
    ridge = tier((half, 3.5), top - 5.8, top, cap)
    stripe = look("box", (0, 0, (low + shoulder) / 2), (half + 0.3, half + 0.3, 14), cap)
    return lying([body, *roof, ridge, stripe])


def bowl(base: float, low: float, high: float, profile, walls: Sequence[float], colour, seen: float) -> list[Shape]:
    """A disc of radius `base` and two rings that widen upwards, with half thicknesses `walls`."""
    rings = [s for i, thick in enumerate(walls) for s in ring(profile[i : i + 2], thick, 12, colour, seen=seen)]
    return [*prism(base, low, high, colour), *rings]


def dressing() -> list[Shape]:
    """A flat bottle with a waist and a round cap; its axis is y."""
    levels = ((-72.7, -64.5, 17.3), (-64.5, -52.0, 22.2), (-52.0, -10.2, 26.4), (-10.2, 1.4, 22.9), (1.4, 12.8, 17.1))
    body = [tier((w, 17.4), low, high, GREEN, (-0.9, -0.2)) for low, high, w in levels]
    neck = tier((12.9, 14.9), 12.0, 36.0, GREEN, (0.4, -0.2))
    label = look("box", (-0.9, -0.2, -31), (26.7, 17.7, 16), WHITE)
    return lying([*body, neck, *prism(17.0, 35.6, 72.8, (0.85, 0.85, 0.6)), label])


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


def thing(folder: str, name: str, mass: float, shapes, sites=(), pos=(0, 0, 0), **marks) -> Thing:
    return Thing(f"{folder}/{name}/{name}.xml", Body("object", shapes, sites, pos=pos, mass=mass), **marks)


def small_objects() -> list[Thing]:
    """Groceries, crockery and books."""
    hope = functools.partial(thing, "stable_hope_objects")
    scanned = functools.partial(thing, "stable_scanned_objects")
    turbo = functools.partial(thing, "turbosquid_objects")
    cheese, red_can, blue_can = (0.75, 0.85, 0.95), (0.75, 0.12, 0.1), (0.2, 0.35, 0.7)
    ketchup = [
        tier((28.1, 16.9), -72.4, -6.9, RED, (0.4, -0.8)),
        tier((23.9, 18.3), -6.9, 14.4, RED, (0.4, -0.8)),
        tier((18.7, 18.3), 14.4, 36.3, RED, (0.4, -0.8)),
        *prism(16.7, 36.3, 73.2, WHITE, (0.4, -0.8)),
        look("box", (0.4, -0.8, -38), (28.4, 17.2, 18), WHITE),
    ]
    sauce = [
        tier((23.5, 14.5), -54.6, -1.5, BROWN),
        tier((18.1, 14.3), -1.5, 26.3, BROWN),
        tier((13.1, 13.4), 26.3, 52.5, (0.75, 0.2, 0.1)),
        look("box", (0, 0, -28), (23.8, 14.8, 15), ORANGE),
    ]
    groceries = [
        hope("alphabet_soup", 25.9, can(31.2, 37.7, (0, -0.6, -3.4), METAL, red_can), bottom=-40),
        hope("tomato_sauce", 26.6, can(31.2, 37.7, (0, -0.6, -3.2), METAL, (0.35, 0.08, 0.3))),
        hope("butter", 5.2, packet((0, 0, 0), (38.1, 19.8, 8.7), YELLOW, BLUE), bottom=-20, top=20, radius=20),
        hope("cream_cheese", 6.2, packet((0, 0, 0), (40.6, 21.3, 8.9), cheese, blue_can), bottom=-25, top=25, radius=30),
        hope("chocolate_pudding", 10.2, packet((-0.5, 0, 0.6), (40.1, 23.2, 13.7), BROWN, TAN)),
        hope("cookies", 9.6, packet((0, 0, 0), (31.0, 41.3, 9.4), ORANGE, RED)),
        hope("bbq_sauce", 12.2, sauce, top=60, radius=15),
        hope("ketchup", 23.2, lying(ketchup)),
        hope("milk", 31.7, carton(26.3, -69.8, 39.8, 61.4, WHITE, BLUE), radius=30),
        hope("orange_juice", 31.7, carton(26.3, -69.8, 39.8, 61.4, ORANGE, GREEN)),
        hope("salad_dressing", 21.8, dressing()),
    ]
    # LIBERO put the shapes of this one into a body of their own.
    inner = Body("sald_dressing_body", dressing(), pos=(0, 50, 0), mass=21.8)
    name = "stable_hope_objects/new_salad_dressing/new_salad_dressing.xml"
    groceries.append(Thing(name, Body("object", bodies=[inner])))

    pan = [
        *prism(72, 0.8, 12.2, BLACK, (4, -1), sides=12),
        look("cylinder", (5, -0.7, 7.6), (78, 4.6), BLACK),  # seen only: what collides leaves a slit at the wall
        *ring(((78.4, 4.5), (100.5, 40.5)), 3.6, 16, BLACK, (6, -0.5)),
        *chain(0, ((103, 17), (128, 30)), 10.5, 9, BLACK),
        *chain(0, ((127, 35.5), (258.6, 52.7)), 12.7, 6.2, DARK),
    ]
    walls = [plank(a, (r, 13), (r + lean, 141), 72.4, 6.7, WOOD) for a, r, lean in ((0, 72.5, 6), (180, 67.8, 9.6))]
    walls += [plank(a, (66.2, 18), (71.4, 145.5), 72.4, 6.7, WOOD) for a in (90, 270)]
    contain = Site("contain_region", (0, 0, 71.85), (61.08, 61.08, 69.49), (0, 0, 0, 1), rgba="0.8 0 0 0")
    # LIBERO's lower walls are as thin: thicker ones bounce when the white bowl is dropped on the microwave, as official states do.
    black_bowl = bowl(23.5, 1.6, 6.8, ((23.0, 4.5), (43.5, 15.5), (52.0, 51.7)), (0.7, 1.2), BLACK, 1.06)
    white_bowl = bowl(17.3, 0.6, 4.2, ((17.4, 3.0), (32.8, 10.4), (39.3, 34.8)), (0.5, 1.0), WHITE, 1.08)
    ramekin = [*prism(35, 0.9, 7.3, WHITE), *ring(((35.2, 1), (41.3, 42.3)), 2.6, 12, WHITE, seen=1.35)]
    crockery = [
        scanned("akita_black_bowl", 5.6, black_bowl, pos=(0, -100, 0)),
        scanned("white_bowl", 2.1, white_bowl),
        scanned("plate", 11.5, [*prism(30, 0.9, 5.3, WHITE), *ring(((30, 0.2), (66.5, 13.2)), 2.5, 8, WHITE, seen=1.18)]),
        scanned("glazed_rim_porcelain_ramekin", 9.7, ramekin),
        scanned("chefmate_8_frypan", 50.2, pan),
        scanned("basket", 136.1, [box((2.5, 0, 13.1), (76.6, 72.4, 8.5), WOOD), *walls], [contain]),
    ]
    yellow_mug = [
        *prism(25, 0.2, 5.2, YELLOW, (-18.2, 0)),
        *ring(((26, 3.2), (36.8, 17)), 4.1, 12, YELLOW, (-18.2, 0)),
        *ring(((36.8, 17), (48.2, 102.6)), 4.1, 12, (0.93, 0.85, 0.5), (-18.2, 0)),
        *chain(0, ((17, 22), (64, 30), (64, 82), (24, 77)), 8.8, 4.1, YELLOW),
    ]
    white_mug = [
        *prism(22.5, 2.4, 12.8, WHITE, (16, -1.6)),
        *ring(((26, 7), (41, 43), (41, 108.5)), 2, 12, WHITE, (17, -1.5), seen=1.12),
        *chain(180, ((24, 19), (59.5, 38), (59.5, 74), (30, 94.7)), 8, 3.8, WHITE),
    ]
    red_mug = [
        *prism(25, 2.8, 7.8, RED, (-18, -2)),
        *ring(((24, -1), (39, 130.2)), 3.5, 8, RED, (-18.4, -1.5)),
        *chain(0, ((14, 25), (57, 75), (55, 112), (17, 109)), 7.2, 2.8, RED, (0, 1)),
    ]
    pot = [
        box((0, 1.8, 0.4), (25, 32.8, 66.5), METAL),
        *(box((x * 29.8, 0.3 + y * 13.8, 0.4), (4.2, 17.2, 66.5), METAL, about("z", x * y * 23)) for x in (-1, 1) for y in (-1, 1)),
        box((0, -35.9, 42.6), (17.6, 5.8, 24.5), METAL),
        box((0, -49.1, 46.2), (8, 7.2, 13.7), METAL),
        box((0, 41.6, 52.5), (10.2, 7.2, 13.7), METAL),
        *chain(90, ((44, 60.3), (70, 60), (84, 49), (61, 4), (51, -4)), 6.6, 7, BLACK),
        box((0, -1.3, 74.3), (5.2, 6, 11.4), BLACK),
    ]
    bottle = [
        *prism(19.8, 1.1, 63.5, WINE),
        tier((15, 15), 50, 73.5, WINE),
        tier((11.8, 11.8), 73.5, 88, WINE),
        tier((8, 8), 86, 100, WINE),
        *prism(7.2, 47.7, 158, WINE, weight=2.4),
        look("cylinder", (0, 0, 150), (7.5, 8), RED),
        look("cylinder", (0, 0, 33), (20.1, 16), TAN),
    ]
    tray = [
        span((-136.2, -83, 0.5), (151.8, 75, 7.2), WOOD),
        span((-136.4, -82, -0.1), (-125.6, 73.5, 5), WOOD),
        span((141.8, -82, -0.1), (152.6, 73.5, 5), WOOD),
        *(span((x - 2.3, -83.3, 5.3), (x + 2.3, 72.3, 54.5), WOOD) for x in (-139.2, 153.2)),
        span((-136.2, -86.8, 3.8), (151.8, -82.2, 62.6), WOOD),
        span((-136.2, 73.5, 2.8), (151.8, 78.1, 59.6), WOOD),
        *(span((x - 6.2, y - 5.5, 1.6), (x + 6.2, y + 5.5, 80), WOOD) for x in (-132.1, 145.3) for y in (-78.5, 68.5)),
        *(span((x - 6.7, -83.5, 78.5), (x + 6.7, 73.7, 80.9), WOOD) for x in (-133.5, 147.1)),
    ]
    region = Site("contain_region", (8.63, -4.71, 42.55), (40.38, 78.39, 135.49), (0.70711, 0, 0.70711, 0), rgba="1 0 0 0")
    books = [
        turbo("black_book", 42.5, book((-0.5, -12.1, 69.4), (14.3, 55.2, 67.2), BLACK)),
        turbo("yellow_book", 28.1, book((1.6, 0.1, 63.1), (11.8, 48.9, 61.1), YELLOW)),
    ]
    return [
        *groceries,
        *crockery,
        turbo("white_yellow_mug", 30.9, yellow_mug),
        turbo("porcelain_mug", 16.5, white_mug),
        turbo("red_coffee_mug", 29.4, red_mug),
        turbo("moka_pot", 68.2, pot),
        turbo("wine_bottle", 15.4, bottle),
        turbo("wooden_tray", 57.2, tray, [region]),
        *books,
    ]


def book(centre, half, colour) -> list[Shape]:
    """A standing book: covers and back, and pages that look out at three sides."""
    x, y, z = centre
    pages = look("box", (x, y + 1.5, z), (half[0] * 0.75, half[1], half[2] + 0.3), WHITE)
    return [box(centre, half, colour), pages]


# ---------------------------------------------------------------------------------------------- furniture


def cabinet(name: str, wood, handle) -> Thing:
    """Three drawers one above the other that slide out along -y, and a top to put things on."""
    case = [
        span((-117.3, -79, 8.5), (-107, 111.6, 220.1), wood),
        span((113.8, -79, 8.5), (124.2, 111.6, 220.1), wood),
        span((-117, 107.1, 8.5), (121.2, 111.7, 220.1), wood),
        span((-118.7, -73.2, 4.9), (126.8, 106, 10.2), wood),
        *(span((-107.9, -70.7, z - 0.8), (115.4, 108, z + 0.8), wood) for z in (79.3, 149.4)),
        span((-123.4, -78.3, 220.2), (131.2, 109.9, 223), wood),
    ]
    drawers = []
    for level, wall, front, bar, region in (
        ("top", 183.6, 183.1, 183.9, 185.63),
        ("middle", 113.9, 113.4, 110.4, 116.90),
        ("bottom", 45.3, 44.8, 41.1, 47.01),
    ):
        shapes = [
            span((-106, -78, front - 34.3), (112.7, -72.5, front + 34.3), wood),
            *(span((-103.4, y - 3.6, wall - 32.1), (110.1, y + 3.6, wall + 32.1), wood) for y in (-68.4, 90.8)),
            *(span((x - 2.4, -70.4, wall - 31.5), (x + 2.4, 92.5, wall + 31.5), wood) for x in (-101.9, 108.9)),
            span((-103.5, -70.5, wall - 32.5), (110.4, 91.4, wall - 24.4), wood),
            span((-47.2, -109.3, bar - 8.2), (41.7, -93.9, bar + 8.2), handle),
            *(span((x - 5.1, -94.1, bar - 5.6), (x + 5.1, -72.9, bar + 5.6), handle) for x in (-35.6, 29.2)),
        ]
        site = Site(f"{level}_region", (3.28, 11.28, region), (29.93, 75.61, 102.24), (0.70711, 0, 0.70711, 0))
        joint = Joint(f"{level}_level", "slide", "0 1 0", "-0.16 0.01", 50)
        drawers.append(Body(f"cabinet_{level}", shapes, [site], inertial=True, joint=joint))
    top = Site("top_side", (3.54, 15.67, 221.52), (125.34, 94.38, 1.47), rgba="0.8 0.8 0 0")
    body = Body("object", bodies=[Body("base", case, [top], drawers, mass=176.2)])
    return Thing(f"articulated_objects/{name}.xml", body, bottom=-45, top=45, radius=45, mark=50)


def microwave() -> Thing:
    """A case that is open in front, and a door that is hinged on the left."""
    black, steel = (0.12, 0.12, 0.13), METAL
    parts = (  # low and high corner of the case's walls, 500 g each
        ((-172.5, -88, 0), (-143.5, 111, 187)),
        ((63.5, -88, 0), (172.5, 111, 187)),
        ((-144, 80.5, 0), (63, 110.5, 187)),
        ((-143.5, -88, 168), (63.5, 81, 187)),
        ((-143.5, -88, 0), (63.5, 80, 24)),
        ((87.5, -110.5, 0), (172.5, -86.5, 187)),
    )
    case = [span(low, high, black, mass=500) for low, high in parts]
    case += [look("cylinder", (130, -113, z), (12, 3), steel, about("x", 90)) for z in (60, 110)]
    sites = [
        Site("top_side", (0, 10, 200), (120, 83.5, 5), rgba="1 0 0 0"),
        Site("heating_region", (0, 10, 96), (120, 83.5, 80), rgba="1 0 0 0"),
    ]
    grip = [Shape("capsule", (237.5, -54, 0), (10, 65), steel, mass=20)]
    grip += [Shape("capsule", (237.5, -37.5, z), (10, 15), steel, about("x", 90), mass=20) for z in (65, -65)]
    window = look("box", (115, -25.5, 0), (85, 0.5, 60), (0.3, 0.33, 0.38))
    panel = box((129.5, -13, 0), (129.5, 12, 92.5), black, mass=200)
    joint = Joint("microjoint", "hinge", "0 0 1", "-2.094 0", 0.5)
    door = Body("microdoorroot", [*grip, panel, window], pos=(-172.5, -88, 96), joint=joint, contact=MICROWAVE_CONTACT)
    body = Body("object", case, sites, [door], contact=MICROWAVE_CONTACT)
    return Thing("articulated_objects/microwave.xml", body, bottom=-60, top=60, radius=15)


def stove() -> Thing:
    """A flat hotplate, and a knob beside it that turns."""
    half, dark = (95, 95, 20), (0.1, 0.1, 0.1)
    plate = [
        box((0, 0, 0), half, GRAY, name="base", seen=False),
        look("box", (0, 0, 0), half, GRAY, name="base_vis"),
        box((0, 0, 25), (95, 95, 0.5), GRAY, name="collision_burner", seen=False),
    ]
    heat = look("cylinder", (0, 0, 22.5), (70, 3), DARK, name="burner")
    sites = [
        Site("cook_region", (0, 0, 0), (75, 75, 2.5), rgba="0.8 0.8 0. 0"),
        Site("burner", (0, 0, 22), (62.5, 0.5), kind="cylinder", rgba="0.9 0.05 0.05 1"),
    ]
    burner = Body("burner", plate, sites, [Body("burner_plate", [heat])], pos=(150, 0, 0), contact={})
    ridge = ((-17.1, 51.9, 1.4, 50), (-27.8, -17.1, 3.9, 44.9), (-32.8, -27.8, 7.7, 42.4), (-40.6, -32.8, 1, 33.8))  # y, z
    knob = [*prism(46.5, 0.4, 12.8, dark, (1.3, 4.4), sides=12)]
    knob += [span((-10.8, y0, z0), (13.3, y1, z1), dark) for y0, y1, z0, z1 in ridge]
    knob.append(look("box", (1.3, 45, 50.3), (2, 6, 0.5), WHITE))
    joint = Joint("button", "hinge", "0 0 1", "-0.005 2.1", 1)
    button = Body("button", knob, quat=(0.7071068, 0, 0, 0.7071068), inertial=True, joint=joint)
    body = Body("object", bodies=[Body("base", bodies=[burner, button])])
    return Thing("articulated_objects/flat_stove.xml", body, bottom=-45, top=45, radius=45, mark=50)


def fixtures() -> list[Thing]:
    """Cabinets, microwave, stove, caddy, rack and shelf."""
    turbo = functools.partial(thing, "turbosquid_objects")
    gray = (0.27, 0.27, 0.3)
    caddy = [  # a high compartment on the right, two small ones in the middle, a low one with slanting sides on the left
        span((-75.5, -216.9, 1.4), (75.5, 216.9, 13.8), gray),
        *(span((-70.6, y - 6.2, 2.6), (70.6, y + 6.2, 167.4), gray) for y in (-68, -209.4)),
        span((62.8, -209.8, 5.2), (70.8, 209.8, 168.3), gray),
        span((-5.6, -66.8, 11.8), (2.4, 66.8, 98.6), gray),
        span((-70.9, -209.8, 5), (-62.8, 209.8, 74), gray),
        span((-70.9, -216.4, 8.1), (-62.8, -63.2, 167.3), gray),
    ]
    for y in (70.6, 208.4):
        caddy += [span((-70.6, y - 3.6, 12), (70.6, y + 3.6, 78.5), gray), span((20, y - 3.6, 75), (66.4, y + 3.6, 140), gray)]
        caddy.append(plank(0, (-57.9, 54.5), (57.9, 134.5), 3.6, 20.9, gray, (0, y)))
    turned = (0, 0, 1, 0)
    caddy_sites = [
        Site("right_contain_region", (6.31, -143.39, 65.58), (61.96, 62.16, 60.46), turned),
        Site("left_contain_region", (6.31, 145.51, 65.58), (61.96, 62.16, 60.46), turned),
        Site("back_contain_region", (33.64, -0.64, 85.58), (27.75, 62.16, 60.46), turned),
        Site("front_contain_region", (-31.02, -0.64, 40.54), (27.75, 35.95, 62.16), (0, 0, 0.70711, -0.70711)),
    ]
    rack = [
        *(plank(90, (y - 67.2, z - 41.3), (y + 67.2, z + 41.3), 134.4, 4.5, TAN) for y, z in ((-6.1, 251.2), (-42.7, 127.3))),
        *(plank(90, (y + 4.2, z - 7.6), (y - 4.2, z + 7.6), 132.2, 1.1, WINE) for y, z in ((-74.8, 220.7), (-109.1, 97.4))),
        span((-66.5, -93, 2.1), (66.5, 93, 11.1), WINE),
        *(plank(a, (r - 59.4, z + 7.7), (r + 59.4, z - 7.7), 90, 4.5, WINE) for a, r, z in ((90, 69.4, 10.1), (270, 64.3, 12.6))),
        span((-90.5, -14.1, 16), (90.5, 14.1, 25), WINE),
        plank(90, (-34.7, 14.6), (52.5, 326), 7.6, 9.1, WINE),
    ]
    rack_top = Site("top_region", (0, -80.03, 217.45), (100.87, 22, 2.51), (0.8549119, -0.5187733, 0, 0))
    shelf = [
        *(span((x - 7.1, -79.2, 0.2), (x + 7.1, 111.6, 209), DARK) for x in (-153.8, 163.1)),
        span((-160, 107.1, 0.4), (166, 111.7, 208.9), DARK),
        span((-148, -70.7, 69.2), (158.4, 108, 70.9), DARK),
        span((-170.6, -78.8, 206.1), (180.6, 111.5, 210.3), DARK),
    ]
    shelf_sites = [
        Site("top_side", (4.96, 15.67, 206.88), (175.57, 94.38, 1.47)),
        Site("top_region", (5.38, 16.87, 136.72), (67.39, 85.64, 150.93), (0.70711, 0, -0.70711, 0)),
        Site("bottom_region", (5.55, 16.87, 14.07), (35.28, 85.64, 155.80), (0.70711, 0, 0.70711, 0)),
    ]
    return [
        cabinet("wooden_cabinet", (0.26, 0.21, 0.17), GRAY),
        cabinet("white_cabinet", (0.85, 0.84, 0.83), GRAY),
        microwave(),
        stove(),
        turbo("desk_caddy", 278, caddy, caddy_sites),
        turbo("wine_rack", 152.7, rack, [rack_top]),
        turbo("wooden_two_layer_shelf", 206.3, shelf, shelf_sites),
    ]


# ---------------------------------------------------------------------------------------------- scenes


@dataclasses.dataclass(frozen=True)
class Scene:
    """An arena: floor, walls, a table or none, and a background that is only seen."""

    name: str
    table: str | None  # the wood of a table that LIBERO's code adjusts, see `scene_xml`
    floor_body: bool  # whether the floor is in a body of its own
    bodies: Sequence[Body] = ()
    background: Sequence[Shape] = ()
    room: str = "corners"  # corners: a rear wall with slanting corners; square: four walls
    lights: Sequence[dict[str, str]] = ()


def scenes() -> list[Scene]:
    """The arenas of LIBERO's five problem domains."""
    unit, shade, leaf = (0.42, 0.36, 0.32), (0.9, 0.86, 0.75), (0.25, 0.42, 0.18)
    living_room = [
        span((-1985, -1500, 0), (-1500, 1450, 420), unit, solid=False, name="living_room"),
        span((-1985, -1500, 420), (-1700, -1000, 1820), unit, solid=False),
        span((-1960, -700, 650), (-1920, 700, 1500), BLACK, solid=False),
    ]
    picture = span((-1950, 150, 960), (-1946, 1010, 1965), (0.59, 0.47, 0.35), solid=False, name="wall_decoration")
    table = [
        span((-869.3, -588.7, 413.1), (474.1, 574.1, 436.7), BROWN),
        *(span((x - 101.3, -416.8, 413.1), (x + 101.3, 416.8, 436.7), BROWN) for x in (549.4, -970.1)),
        span((-435.2, -411.6, 0), (435.2, 411.6, 412.9), BROWN),
    ]
    quarter = (0.70710678, 0, 0, 0.70710678)
    sofa_table = Body("living_room_table", bodies=[Body("living_room_table_col", table, pos=(-250, 250, 0), quat=quarter)])
    counter, front = (0.32, 0.3, 0.27), (0.55, 0.47, 0.36)
    kitchen = [
        span((-1975, -1950, 0), (-1340, 2590, 870), front, solid=False),
        span((-1975, -1950, 870), (-1326, 2590, 900), counter, solid=False),
        span((-1975, -1950, 1500), (-1640, 2590, 2300), front, solid=False),
        span((-1935, -400, 900), (-1364, 400, 934), BLACK, solid=False),
        look("cylinder", (-1560, 276, 990), (150, 80), (0.4, 0.4, 0.4)),
        look("cylinder", (-1850, -860, 1020), (110, 130), METAL),
        span((-1970, -2835, 0), (-1528, -1966, 1774), METAL, solid=False),
    ]
    desk = [
        span((-689.5, -1392.7, 813.5), (689.5, 1392.7, 885.1), WOOD),
        *(span((x - 20, y - 50.3, 0), (x + 20, y + 50.3, 788.4), WOOD) for x in (-500.5, 496.2) for y in (-690.6, 712.2)),
        *(span((-517.5, y - 50.3, 5.3), (507.7, y + 50.3, 45.3), WOOD) for y in (-697.6, 714.7)),
    ]
    study = [
        span((-1950, -470, 525), (-1905, 1460, 2455), (0.3, 0.24, 0.16), solid=False, name="study_wall_painging"),
        look("cylinder", (300, -600, 905), (100, 15), BLACK),
        look("cylinder", (300, -600, 1300), (12, 400), BLACK),
        look("cylinder", (300, -600, 1760), (120, 95), shade),
        look("cylinder", (-1850, 565, 180), (160, 180), TAN),
        look("ellipsoid", (-1850, 565, 800), (330, 300, 460), leaf, name="plant"),
        span((-1870, -1610, 0), (-1840, -380, 1795), WHITE, solid=False, name="office_book_shelf"),
        *(span((-1870, -1610, z), (-1555, -380, z + 25), WHITE, solid=False) for z in (0, 440, 875, 1330, 1770)),
        *(span((-1821, y, 900), (-1621, y + 54, 1142), BLACK, solid=False, name=f"black_book_{i}") for i, y in ((1, -526), (2, -476))),
    ]
    wood = "martin_novak_wood_table.png"
    stove_light = dict(name="light_kitchen", dir="0 0 -1", directional="true", pos="-1.75 0 1.6", specular="0.8 0.8 0.8")
    return [
        Scene("tabletop", wood, False),
        Scene("floor", None, True, background=living_room),
        Scene("kitchen_tabletop", wood, False, background=kitchen, room="square", lights=[stove_light]),
        Scene("living_room_tabletop", None, True, [sofa_table], [*living_room, picture]),
        Scene("study", None, False, [Body("study_table", desk)], study),
    ]


WALLS = {  # position (m), quaternion, half sizes (m)
    "corners": {
        "leftcorner": ("-1.25 2.25 1.5", "0.6532815 0.6532815 0.2705981 0.2705981", "1.06 1.5 0.01"),
        "rightcorner": ("-1.25 -2.25 1.5", "0.6532815 0.6532815 -0.2705981 -0.2705981", "1.06 1.5 0.01"),
        "left": ("1.25 3 1.5", "0.7071 0.7071 0 0", "1.75 1.5 0.01"),
        "right": ("1.25 -3 1.5", "0.7071 -0.7071 0 0", "1.75 1.5 0.01"),
        "rear": ("-2 0 1.5", "0.5 0.5 0.5 0.5", "1.5 1.5 0.01"),
        "front": ("3 0 1.5", "0.5 0.5 -0.5 -0.5", "3 1.5 0.01"),
    },
    "square": {
        "left": ("0.5 3 1.5", "0.7071 0.7071 0 0", "2.5 1.5 0.01"),
        "right": ("0.5 -3 1.5", "0.7071 -0.7071 0 0", "2.5 1.5 0.01"),
        "rear": ("-2 0 1.5", "0.5 0.5 0.5 0.5", "3 1.5 0.01"),
        "front": ("3 0 1.5", "0.5 0.5 -0.5 -0.5", "3 1.5 0.01"),
    },
}
CAMERAS = {  # position (m), quaternion; LIBERO's code moves agentview and adds others
    "frontview": ("1.0 0 1.45", "0.56 0.43 0.43 0.56"),
    "birdview": ("-0.2 0 3.0", "0.7071 0 0 0.7071"),
    "agentview": ("0.5 0 1.35", "0.653 0.271 0.271 0.653"),
    "sideview": ("-0.0565 1.2761 1.488", "0.0099 0.0069 0.5912 0.8064"),
}
TEXTURES = {  # mean colour, spread, and tiles or planks a side
    "light-gray-floor-tile.png": ((195, 186, 177), 7, 4),
    "gray_ceramic_tile.png": ((186, 171, 155), 10, 4),
    "seamless_wood_planks_floor.png": ((233, 200, 137), 8, 8),
    "light-gray-plaster.png": ((223, 219, 212), 2, 0),
    "yellow_linen_wall_texture.png": ((220, 213, 180), 3, 0),
    "martin_novak_wood_table.png": ((198, 180, 162), 5, 0),
}
TEXTURE_SIZE = 128  # pixels a side


# ---------------------------------------------------------------------------------------------- MJCF


def _text(values, scale: float = 1.0) -> str:
    return " ".join(f"{round(float(v) * scale, 6):g}" for v in values)


def _quaternion(turn: np.ndarray) -> np.ndarray:
    """(w, x, y, z) of a rotation matrix: the eigenvector of largest eigenvalue of Bar-Itzhack's matrix (2000)."""
    K = np.empty((4, 4))
    K[0, 0] = np.trace(turn)
    K[0, 1:] = K[1:, 0] = turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]
    K[1:, 1:] = turn + turn.T - np.trace(turn) * np.eye(3)
    quaternion = np.linalg.eigh(K)[1][:, -1]
    return quaternion * (1.0 if quaternion[np.argmax(np.abs(quaternion))] > 0 else -1.0)


def _volume(shape: Shape) -> float:
    """mm^3 of a box, as far as it weighs."""
    return 8.0 * float(np.prod(shape.size)) * shape.weight


def _add_shape(parent: ET.Element, shape: Shape, contact: dict[str, str], density: float) -> None:
    place = {"type": shape.kind, "pos": _text(shape.centre, 1e-3), "size": _text(shape.size, 1e-3)}
    if not np.allclose(shape.turn, np.eye(3)):
        place["quat"] = _text(_quaternion(shape.turn))
    if shape.solid:
        weight = {"density": f"{density * shape.weight:.6g}"} if shape.mass is None else {"mass": f"{shape.mass * 1e-3:g}"}
        name = {} if shape.name is None else {"name": shape.name}
        ET.SubElement(parent, "geom", {**name, **place, "group": "0", **weight, **contact})
    if shape.seen:
        paint = {"material": "matte", "rgba": _text([*shape.colour, 1.0])}
        name = {} if shape.name is None or shape.solid else {"name": shape.name}
        ET.SubElement(parent, "geom", {**name, **place, "group": "1", "contype": "0", "conaffinity": "0", "mass": "0", **paint})


def _add_body(parent: ET.Element, body: Body) -> ET.Element:
    element = ET.SubElement(parent, "body", {"name": body.name, "pos": _text(body.pos, 1e-3), "quat": _text(body.quat)})
    if body.inertial:
        ET.SubElement(element, "inertial", {"pos": "0 0 0", "mass": "3", "diaginertia": "1 1 1"})
    if body.joint is not None:
        j = body.joint
        options = {"name": j.name, "type": j.kind, "axis": j.axis, "limited": "true", "range": j.range, "damping": f"{j.damping:g}"}
        ET.SubElement(element, "joint", {"pos": "0 0 0", **options})
    for site in body.sites:
        place = {"pos": _text(site.pos, 1e-3), "quat": _text(site.quat), "size": _text(site.size, 1e-3), "rgba": site.rgba}
        ET.SubElement(element, "site", {"name": site.name, "type": site.kind, "group": "0", **place})
    volume = sum(_volume(s) for s in body.shapes if s.solid and s.mass is None)
    density = 1e6 * body.mass / volume if body.mass is not None else 1000.0  # g/mm^3 to kg/m^3
    for shape in body.shapes:
        _add_shape(element, shape, body.contact, density)
    for child in body.bodies:
        _add_body(element, child)
    return element


def _add_matte(asset: ET.Element) -> None:
    """What everything is painted with, in its own colour."""
    ET.SubElement(asset, "material", {"name": "matte", "specular": "0.15", "shininess": "0.3"})


def thing_xml(thing: Thing) -> ET.Element:
    """MJCF of an object or fixture as robosuite's MujocoXMLObject reads it: the body "object" inside one with three sites."""
    root = ET.Element("mujoco", {"model": Path(thing.file).stem})
    ET.SubElement(root, "compiler", {"angle": "radian"})
    _add_matte(ET.SubElement(root, "asset"))
    outer = ET.SubElement(ET.SubElement(root, "worldbody"), "body")
    _add_body(outer, thing.body)
    marks = {"bottom": (0, 0, thing.bottom), "top": (0, 0, thing.top), "horizontal_radius": (thing.radius, thing.radius, 0)}
    for name, pos in marks.items():
        ET.SubElement(outer, "site", {"name": f"{name}_site", "pos": _text(pos, 1e-3), "size": f"{thing.mark * 1e-3:g}", "rgba": "0 0 0 0"})
    return root


def scene_xml(scene: Scene) -> ET.Element:
    """MJCF of an arena as LIBERO's arena classes read it: they choose the files of texplane and tex-wall and the table's size."""
    root = ET.Element("mujoco", {"model": "arena"})
    asset = ET.SubElement(root, "asset")
    sky = {"rgb1": ".9 .9 1.", "rgb2": ".2 .3 .4", "width": "256", "height": "256"}
    ET.SubElement(asset, "texture", {"type": "skybox", "builtin": "gradient", **sky})
    _add_matte(asset)
    flat = {"reflectance": "0", "shininess": "0"}
    for texture, material, file, repeat in (
        ("texplane", "floorplane", "light-gray-floor-tile.png", {"specular": "0", "texrepeat": "1 1", "texuniform": "true"}),
        ("tex-wall", "walls_mat", "light-gray-plaster.png", {"specular": "0.1", "texrepeat": "3 3", "texuniform": "true"}),
    ):
        ET.SubElement(asset, "texture", {"name": texture, "type": "2d", "file": f"../textures/{file}"})
        ET.SubElement(asset, "material", {"name": material, "texture": texture, **flat, **repeat})
    world = ET.SubElement(root, "worldbody")
    floor = ET.SubElement(world, "body", {"name": "floor", "pos": "0 0 0"}) if scene.floor_body else world
    plane = {"type": "plane", "pos": "0 0 0", "size": "3 3 .125", "material": "floorplane"}
    ET.SubElement(floor, "geom", {"name": "floor", "group": "1", "condim": "3", **plane})
    seen = {"group": "1", "contype": "0", "conaffinity": "0"}
    for name, (pos, quat, size) in WALLS[scene.room].items():
        place = {"type": "box", "pos": pos, "quat": quat, "size": size, "material": "walls_mat"}
        ET.SubElement(world, "geom", {"name": f"wall_{name}_visual", **place, **seen})
    if scene.table is not None:
        ET.SubElement(asset, "texture", {"name": "tex-table", "type": "cube", "file": f"../textures/{scene.table}"})
        ET.SubElement(asset, "material", {"name": "table_texture", "texture": "tex-table", "specular": "0.2", **flat})
        table = ET.SubElement(world, "body", {"name": "table", "pos": "0 0 0.4"})
        top = {"type": "box", "pos": "0 0 0", "size": "0.4 0.4 0.4"}
        ET.SubElement(table, "geom", {"name": "table_collision", **top, "group": "0", "friction": "1 0.005 0.0001"})
        ET.SubElement(table, "geom", {"name": "table_visual", **top, **seen, "material": "table_texture"})
        ET.SubElement(table, "site", {"name": "table_top", "pos": "0 0 0.4", "size": "0.001 0.001 0.001", "rgba": "0 0 0 0"})
        for i in range(1, 5):
            leg = {"type": "cylinder", "pos": "0 0 0", "size": "0.05 0.1", "material": "table_texture"}
            ET.SubElement(table, "geom", {"name": f"table_leg{i}_visual", **leg, **seen})
    for body in scene.bodies:
        _add_body(world, body)
    for shape in scene.background:
        _add_shape(world, shape, {}, 0.0)
    for i, pos in enumerate(("1 1 4.0", "-3. -3. 4.0"), 1):
        light = {"pos": pos, "dir": "0 -.15 -1", "directional": "false", "specular": "0.3 0.3 0.3"}
        ET.SubElement(world, "light", {"name": f"light{i}", "diffuse": ".8 .8 .8", "castshadow": "false", **light})
    for light in scene.lights:
        ET.SubElement(world, "light", {"diffuse": ".8 .8 .8", "castshadow": "false", **light})
    for name, (pos, quat) in CAMERAS.items():
        ET.SubElement(world, "camera", {"name": name, "mode": "fixed", "pos": pos, "quat": quat})
    return root


def _texture(colour: tuple[int, int, int], spread: int, tiles: int, seed: int) -> np.ndarray:
    """(TEXTURE_SIZE, TEXTURE_SIZE, 3) uint8: grain, and the joints between `tiles` tiles a side."""
    rng = np.random.default_rng(seed)
    grain = np.repeat(rng.normal(0, spread, (TEXTURE_SIZE, TEXTURE_SIZE // 8)), 8, 1) + rng.normal(0, spread / 2, (TEXTURE_SIZE,) * 2)
    if tiles:
        step = TEXTURE_SIZE // tiles
        grain += np.kron(rng.normal(0, spread, (tiles, tiles)), np.ones((step, step)))
        grain[::step] -= 4 * spread
        grain[:, ::step] -= 4 * spread
    return np.clip(np.array(colour) + grain[..., None], 0, 255).astype(np.uint8)


def write_assets(folder: Path) -> None:
    """Write the whole asset tree (about 60 files, 0.5 MB) into `folder`."""
    from PIL import Image

    files = {t.file: thing_xml(t) for t in (*small_objects(), *fixtures())}
    files |= {f"scenes/libero_{s.name}_base_style.xml": scene_xml(s) for s in scenes()}
    for name, root in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        ET.indent(root)
        path.write_text(ET.tostring(root, encoding="unicode") + "\n")
    (folder / "textures").mkdir()
    for seed, (name, (colour, spread, tiles)) in enumerate(TEXTURES.items()):
        Image.fromarray(_texture(colour, spread, tiles, seed)).save(folder / "textures" / name)
    (folder / MARKER).write_text("Stand-ins for LIBERO's assets, made by common/libero/standins.py: not LIBERO's, see docs/standins.md.\n")


def is_standin(folder: Path) -> bool:
    """Whether an asset tree is this file's."""
    return (folder / MARKER).is_file()


def standin_assets() -> Path:
    """The folder of the stand-ins in the user's cache, written if it is not there: whole or not at all, by any number of processes."""
    folder = cache_dir() / "standins" / hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".standins-"))
        try:
            write_assets(temporary)
            temporary.chmod(0o755)
            try:
                os.rename(temporary, folder)
            except OSError:
                if not folder.is_dir():  # else another process was first, with the same content
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
