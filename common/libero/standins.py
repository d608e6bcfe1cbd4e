"""LIBERO-shaped assets made of primitives, for machines that can't have the real ones.

`standin_assets` writes an asset tree into the user's cache on which LIBERO's own object classes, scenes, BDDL files, predicates
and official init states work unchanged: the files that the 130 tasks load, with LIBERO's names of files, bodies, joints, sites
and named geoms, its collision geoms in group 0 and what pictures show in group 1. There are no meshes: every shape is made of
boxes (what collides) and boxes, cylinders and ellipsoids (what is seen), and the few textures are drawn here. What things
measure was taken from LIBERO's assets: sizes, masses, friction, joints and the sites' regions (docs/standins.md: how closely).

The things are in `standin_things.py`, the arenas in `standin_scenes.py`; here they become MJCF and files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

from common.cli import cache_dir
from common.libero.standin_scenes import CAMERAS, TEXTURE_SIZE, TEXTURES, WALLS, Scene, scenes
from common.libero.standin_shapes import Body, Shape, Thing
from common.libero.standin_things import fixtures, small_objects

MARKER = "STANDINS.txt"  # a file of this name in an asset tree says what the tree is


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


# ---------------------------------------------------------------------------------------------- the tree


def is_standin(folder: Path) -> bool:
    """Whether an asset tree is these stand-ins'."""
    return (folder / MARKER).is_file()


def generator_fingerprint() -> str:
    """Twelve hex digits over the text of all files that make the stand-ins: the modules named standin*.py."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("standin*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def standin_assets() -> Path:
    """The folder of the stand-ins in the user's cache, written if it is not there: whole or not at all, by any number of processes."""
    folder = cache_dir() / "standins" / generator_fingerprint()
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
