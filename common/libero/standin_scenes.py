"""The arenas among the stand-ins: LIBERO's five problem domains (see `common.libero.standins`). Shapes are in millimetres."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from common.libero.standin_shapes import BLACK, BROWN, METAL, TAN, WHITE, WOOD, Body, Shape, look, span


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
