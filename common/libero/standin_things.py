"""The objects and fixtures among the stand-ins, each a file of LIBERO's asset tree (see `common.libero.standins`).

Lengths are in millimetres and masses in grams, in LIBERO's body frames.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from common.libero.standin_shapes import (
    BLACK,
    BLUE,
    BROWN,
    DARK,
    GRAY,
    GREEN,
    METAL,
    ORANGE,
    RED,
    TAN,
    WHITE,
    WINE,
    WOOD,
    YELLOW,
    Body,
    Joint,
    Shape,
    Site,
    Thing,
    about,
    box,
    chain,
    look,
    plank,
    prism,
    ring,
    span,
    tier,
)

# LIBERO's contact parameters of the microwave: it collides with others and not with itself (its door with its case).
MICROWAVE_CONTACT = {"contype": "0", "conaffinity": "1", "margin": "0.001", "solref": "0.02 1", "solimp": "0.8 0.9 0.01"}


def thing(folder: str, name: str, mass: float, shapes, sites=(), pos=(0, 0, 0), **marks) -> Thing:
    return Thing(f"{folder}/{name}/{name}.xml", Body("object", shapes, sites, pos=pos, mass=mass), **marks)


# ---------------------------------------------------------------------------------------------- objects


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


def book(centre, half, colour) -> list[Shape]:
    """A standing book: covers and back, and pages that look out at three sides."""
    x, y, z = centre
    pages = look("box", (x, y + 1.5, z), (half[0] * 0.75, half[1], half[2] + 0.3), WHITE)
    return [box(centre, half, colour), pages]


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
