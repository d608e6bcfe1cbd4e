"""Skills of the scripted demonstrator: grasps from collision geometry, flows in space, pick and place, and moving joints.

See `common.demos.demonstrator`, which puts them together.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import mujoco
import numba
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import maximum_filter, maximum_filter1d

from common.libero import Task
from common.libero.tasks import Predicate

UP = np.array([0.0, 0.0, 1.0])
OPEN, CLOSE = -1.0, 1.0
SPEED, TURN_SPEED = 0.9, 0.7  # largest action without noise (full scale is 0.3 m/s)
GAIN, TURN_GAIN = 1.3, 1.0  # of the remaining way, what is sent as the next displacement
# The hand, in the frame of its grip site: x is the axis along which the fingers move, z points out of the palm (m).
PAD_HALF_GAP, FINGER_OUTER, FINGER_HALF_WIDTH, PAD_REACH = 0.036, 0.058, 0.010, 0.009
HAND_HALF_LENGTH, HAND_HALF_WIDTH, HAND_HEIGHT = 0.104, 0.030, 0.040
WRIST = 0.2  # cost (m) of a place where the wrist has to be turned by more than 90 degrees from where it rests
AJAR = 0.55  # rad by which a door is pulled open by its handle before it is pushed on from the inside
CELL = 0.004  # resolution of the height maps that grasps are searched in (m)


# ---------------------------------------------------------------------------------------------- geometry


def surface_points(model: mujoco.MjModel, geoms, spacing: float = CELL) -> list[tuple[int, np.ndarray]]:
    """Points on the surface of collision geoms: a list of (geom, (n, 3) points in the geom's frame).

    Meshes, cylinders and the like are taken as their bounding boxes: LIBERO's objects collide as boxes.
    """
    return [(int(g), model.geom_aabb[g, :3] + _box_points(tuple(model.geom_aabb[g, 3:]), spacing)) for g in geoms]


@functools.lru_cache(4096)
def _box_points(half: tuple[float, ...], spacing: float) -> np.ndarray:
    axes = [np.linspace(-h, h, max(2, int(np.ceil(2 * h / spacing)) + 1)) for h in half]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    return grid[(np.abs(np.abs(grid) - half) < 1e-9).any(1)]


def world_points(data: mujoco.MjData, clouds) -> np.ndarray:
    """(n, 3) points of `surface_points` in the world frame."""
    if not clouds:
        return np.empty((0, 3))
    return np.concatenate([data.geom_xpos[g] + points @ data.geom_xmat[g].reshape(3, 3).T for g, points in clouds])


def nearby_points(task: Task, data: mujoco.MjData, centre: np.ndarray, ignore: Sequence[int] = (), radius: float = 0.3):
    """(n, 3) points of everything solid near `centre` but the robot and the root bodies `ignore`."""
    model = task.model
    robot = [model.body_rootid[model.site_bodyid[task.eef_site]], *ignore]
    size = model.geom_aabb[:, 3:].max(1)
    plane = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    solid = (model.geom_contype | model.geom_conaffinity).astype(bool) & ~np.isin(model.body_rootid[model.geom_bodyid], robot)
    solid &= plane | (np.linalg.norm(data.geom_xpos - centre, axis=1) < radius + size)
    small = solid & ~plane & (size < 0.4)
    clouds = surface_points(model, np.flatnonzero(small))
    for g in np.flatnonzero(solid & ~small):  # table tops and floors: only the part that is near
        local = (centre - data.geom_xpos[g]) @ data.geom_xmat[g].reshape(3, 3) - model.geom_aabb[g, :3]
        half = np.array([np.inf, np.inf, 0.0]) if plane[g] else model.geom_aabb[g, 3:]
        low, high = np.maximum(local - 0.2, -half), np.minimum(local + 0.2, half)
        if (low <= high).all():
            points = _box_points(tuple(np.round(0.5 * (high - low), 4)), 2 * CELL)
            clouds.append((g, model.geom_aabb[g, :3] + 0.5 * (low + high) + points))
    return world_points(data, clouds)


@numba.njit(cache=True)
def height_map(points, low, shape, cell):
    """(shape) height of the highest of (n, 3) points in each cell of a grid that begins at `low` (2,), -inf where there is none."""
    heights = np.full((shape[0], shape[1]), -np.inf)
    for n in range(len(points)):
        i, j = math.floor((points[n, 0] - low[0]) / cell), math.floor((points[n, 1] - low[1]) / cell)
        if 0 <= i < shape[0] and 0 <= j < shape[1] and points[n, 2] > heights[i, j]:
            heights[i, j] = points[n, 2]
    return heights


def hand_rotation(finger: np.ndarray, approach: np.ndarray) -> np.ndarray:
    """Rotation matrix of the grip site whose fingers move along `finger` and whose palm looks along `approach`."""
    finger = finger - approach * (finger @ approach)
    finger = finger / np.linalg.norm(finger)
    return np.column_stack([finger, np.cross(approach, finger), approach])


def rotation_vector(rot: np.ndarray) -> np.ndarray:
    """Axis times angle (rad) of a rotation matrix."""
    v = np.array([rot[2, 1] - rot[1, 2], rot[0, 2] - rot[2, 0], rot[1, 0] - rot[0, 1]])
    sine = 0.5 * math.sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2])
    angle = math.atan2(sine, 0.5 * (rot[0, 0] + rot[1, 1] + rot[2, 2] - 1.0))
    return v * (0.5 if sine < 1e-6 else 0.5 * angle / sine)


@dataclasses.dataclass
class Grasp:
    """Where the grip site has to be to take hold, in the world frame when it was planned."""

    position: np.ndarray  # (3,)
    rotation: np.ndarray  # (3, 3)
    width: float  # of what is between the fingers (m)
    cost: float = 0.0  # the lower, the better
    clear: bool = True  # of other movable things, which the hand would push aside or take along


def find_grasps(target: np.ndarray, scene: np.ndarray, rotation: np.ndarray, depth: float, floor: float) -> list[Grasp]:
    """Places where the open hand, held at `rotation`, can come down along its approach axis and take hold of something.

    The scene is seen along the approach axis as a height map. A place is good if both fingers come down beside the material
    without touching anything, the palm stays clear, and the material between the pads is centred and narrow enough.

    Args:
        target, scene: (n, 3) surface points of the thing to grasp, and of everything (the thing included).
        depth: how far the fingertips reach below the top of the material (m).
        floor: lowest height of the fingertips along the approach axis (m).
    """
    local = target @ rotation
    lower = local[:, :2].min(0) - CELL
    shape = np.ceil((local[:, :2].max(0) - lower) / CELL).astype(int) + 1
    margin = int(HAND_HALF_LENGTH / CELL) + 1
    low, size = lower - margin * CELL, shape + 2 * margin

    def profile(heights, x, y):  # (shape[0], shape[1], 2x+1) along the finger axis, y cells to both sides, at each cell of the footprint
        wide = maximum_filter1d(heights, 2 * y + 1, axis=1, mode="constant", cval=-np.inf)
        return sliding_window_view(wide, 2 * x + 1, axis=0)[margin - x : margin - x + shape[0], margin : margin + shape[1]]

    thing, everything = (height_map(points * (1.0, 1.0, -1.0), low, size, CELL) for points in (local, scene @ rotation))
    gap, outer, half_width = int(PAD_HALF_GAP / CELL), int(FINGER_OUTER / CELL), int(FINGER_HALF_WIDTH / CELL)
    between = profile(thing, gap, 2)
    top = between[..., gap - 3 : gap + 4].max(-1)
    tip = np.maximum(top - depth, floor)  # height of the fingertips
    material = between > (tip + 0.003)[..., None]
    offsets = np.arange(-gap, gap + 1) * CELL
    first = np.where(material, offsets, np.inf).min(-1)
    last = np.where(material, offsets, -np.inf).max(-1)
    column = profile(everything, outer, half_width)
    fingers = np.maximum(column[..., : outer - gap].max(-1), column[..., outer + gap + 1 :].max(-1))
    hand = profile(everything, int(HAND_HALF_LENGTH / CELL), int(HAND_HALF_WIDTH / CELL)).max(-1)
    with np.errstate(invalid="ignore"):
        good = np.isfinite(top) & (np.abs(first + last) <= 2 * CELL) & (top - tip > 0.006)
        good &= (fingers < tip - 0.002) & (hand < tip + HAND_HEIGHT) & (last - first < 2 * PAD_HALF_GAP - 0.006)
    grasps = []
    for i, j in np.argwhere(good):
        centre = lower + (np.array([i, j]) + 0.5) * CELL
        centre[0] += 0.5 * (first[i, j] + last[i, j])
        position = rotation @ np.array([*centre, -tip[i, j] - PAD_REACH])
        grasps.append(Grasp(position, rotation, float(last[i, j] - first[i, j])))
    return grasps


# ---------------------------------------------------------------------------------------------- flows


def ramp(x: float, start: float, end: float) -> float:
    """0 before `start`, 1 after `end`, linear between."""
    return min(1.0, max(0.0, (x - start) / (end - start)))


def funnel(offset: np.ndarray, axis: np.ndarray, length: float, width: float) -> np.ndarray:
    """Displacement (m) that leads from `offset` (position minus goal) to the goal, arriving from the side of `axis`.

    Far from the axis the flow first climbs to `length` along it, then closes in on the axis, and within `width` of it comes
    down to the goal: a path with a large detour that is still a function of the position alone.
    """
    along = offset @ axis
    across = offset - along * axis
    distance = math.sqrt(across @ across)
    missing = length * ramp(distance, 0.03, width) - along
    return missing * axis - across * (1.0 - 0.8 * ramp(missing, 0.0, 0.12))


def come_in(offset: np.ndarray, axis: np.ndarray, path: Detour, height: float, width: float, ready: float = 1.0) -> np.ndarray:
    """Displacement that leads to the goal along `axis` over the last `height`, and to there along `path`.

    Before it is `height` out along the axis, the flow moves out rather than sideways; it goes in as far as the hand is
    `ready` (0 to 1: turned as it should be).
    """
    across = offset - (offset @ axis) * axis
    rise = height * max(ramp(math.sqrt(across @ across), 0.008, width), 1.0 - ready)
    flow = funnel(offset - rise * axis, path.axis, path.length, path.width)
    outward = flow @ axis
    return outward * axis + (flow - outward * axis) * (1.0 - ramp(rise - offset @ axis, 0.02, 0.06))


def follow(offset: np.ndarray, *args) -> np.ndarray:
    """(n, 3) offsets that a hand would pass through if it moved as `come_in(offset, *args)` says."""
    path = [offset.copy()]
    while math.sqrt(offset @ offset) > 0.012 and len(path) < 150:
        step = come_in(offset, *args) * GAIN
        offset = offset + 0.3 * step * min(1.0, 0.05 * SPEED / np.abs(step).max())
        path.append(offset)
    return np.array(path)


@dataclasses.dataclass(frozen=True)
class Detour:
    """The side from which the hand, or what it carries, arrives."""

    axis: np.ndarray
    length: float
    width: float


# Directions seen from the robot: x points away from it, y to its left.
DIRECTIONS = {
    "left": np.array([0.0, 1.0, 0.0]),
    "right": np.array([0.0, -1.0, 0.0]),
    "far": np.array([1.0, 0.0, 0.0]),
    "near": np.array([-1.0, 0.0, 0.0]),
    "over": UP,
}


PATHS = ("direct", *DIRECTIONS)


def detour(name: str, out: np.ndarray) -> Detour:
    """The path called `name` to a goal that the last centimetres approach from the direction `out`."""
    if name == "direct":
        return Detour(out, 0.02, 0.10)
    side = DIRECTIONS[name]
    across = side - (side @ out) * out
    if across @ across < 0.3:
        return Detour(out, 0.40, 0.12)
    axis = 0.9 * across / math.sqrt(across @ across) + 0.436 * out
    return Detour(axis, 0.42 if name == "over" else 0.28, 0.11)


def paths_to(out: np.ndarray) -> list[str]:
    """Names of the paths that make sense to a goal that is approached from `out`."""
    return [name for name in PATHS if name == "direct" or DIRECTIONS[name] @ out > -0.5]


# ---------------------------------------------------------------------------------------------- skills


@dataclasses.dataclass
class Hand:
    """What a skill has to know of the hand."""

    position: np.ndarray  # (3,) of the grip site
    rotation: np.ndarray  # (3, 3)
    opening: float  # between the fingers (m)
    closing: float  # speed at which it shrinks (m/s)


def aligned(turned: np.ndarray, rotation: np.ndarray) -> float:
    """1 if two rotations differ by 0.3 rad or less, 0 if by 0.6 rad or more."""
    return ramp(0.5 * (np.vdot(turned, rotation) - 1.0), 0.825, 0.955)


def readiness(hand: Hand, rotation: np.ndarray) -> float:
    """1 if the hand is turned as `rotation` and open, 0 if it is not."""
    return aligned(hand.rotation, rotation) * ramp(hand.opening, 0.05, 0.07)


def grip_phase(miss: float, hand: Hand, width: float) -> str:
    """What the hand is doing, read off the state alone.

    `miss` is how far the hand is from where it has to be to take hold (m), `width` the thickness of what is to be between the
    fingers: "reaching" (come in, open), "closing", or "held" (the fingers have stopped; if on nothing, the hand will move
    away without the thing, and be "reaching" again).
    """
    if miss > 0.03 or (miss > 0.012 and hand.opening > 0.07):
        return "reaching"
    return "held" if hand.opening < width + 0.012 and hand.closing < 0.02 else "closing"


class PlanError(Exception):
    """No way was found to do a task with a strategy from a state."""


SIDES = {name: side for name, side in DIRECTIONS.items() if name != "over"}
SIDES |= {f"{x} {y}": (SIDES[x] + SIDES[y]) / math.sqrt(2.0) for x in ("far", "near") for y in ("left", "right")}


def scene_around(task: Task, data: mujoco.MjData, obj) -> Callable[[bool], np.ndarray]:
    """(n, 3) points of what is solid near an object, itself included: everything (True), or all but other movable things (False)."""
    others = [o.body for o in task.objects.values() if not o.fixture and o is not obj]
    return functools.cache(lambda clear: nearby_points(task, data, data.xpos[obj.body], () if clear else others))


def top_grasps(task: Task, data: mujoco.MjData, obj, only: str | None = None) -> dict[str, Grasp]:
    """Ways to take an object from above: by the rim on one of its sides, or across its middle, by name.

    A way that keeps clear of everything is preferred; failing that, one that pushes other movable objects aside.
    """
    points = world_points(data, surface_points(task.model, obj.geoms))
    bottom, centre = points[:, 2].min(), 0.5 * (points.min(0) + points.max(0))
    reach = 0.5 * (points.max(0) - points.min(0))[:2].min()
    scene = scene_around(task, data, obj)
    found: dict[str, Grasp] = {}
    for angle in (0, 90, 45, 135):
        finger = np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle)), 0.0])
        home = finger if angle > 0 else -finger  # of the two ways to hold, the one that turns the wrist by 90 degrees or less
        names = {name: float(side @ finger) for name, side in SIDES.items() if abs(side @ finger) > 0.99}
        names[f"across {angle}"] = 0.0
        for clear in (True, False) if only is None or only in names else ():
            if not (missing := [n for n in names if n not in found and only in (None, n)]):
                break
            for g in find_grasps(points, scene(clear), hand_rotation(home, -UP), 0.022, bottom + 0.004):
                g.clear = clear
                offset = (g.position - centre)[:2]
                along, across = float(offset @ finger[:2]), float(offset @ (finger[1], -finger[0]))
                g.cost = abs(across) + 0.2 * g.width
                for name in missing:
                    rim = along * names[name] > 0.6 * reach and g.width < 0.03 if names[name] else abs(along) < 0.012
                    if rim and abs(across) < 0.02 and (name not in found or g.cost < found[name].cost):
                        found[name] = g
    return found


def own_grasps(task: Task, data: mujoco.MjData, obj, only: str = "") -> dict[str, Grasp]:
    """More ways to take an object, along its own axes and not the world's: by its middle, an end, a corner or a handle, by name.

    The hand comes from above, or leans over by 45 degrees to come from the robot's side, for what stands in a niche.
    """
    points = world_points(data, surface_points(task.model, obj.geoms))
    scene = scene_around(task, data, obj)
    heavy = data.subtree_com[obj.body]
    axes = data.xmat[obj.body].reshape(3, 3)
    first = abs(axes[2, 0]) < abs(axes[2, 1]) + 0.3  # the second of the object's axes only where that lies flatter by far
    level = axes[:, 0 if first else 1] * (1.0, 1.0, 0.0)
    level /= np.linalg.norm(level)
    found: dict[str, Grasp] = {}
    for tilt in (0.0, 45.0):
        for angle in (0, 90, 45, 135):
            way = f"own {angle}{' leaning' if tilt else ''} "
            if not way.startswith(only):
                continue
            finger = axis_rotation(UP, math.radians(angle)) @ level
            finger *= 1.0 if finger[1] > 0 else -1.0  # the wrist turns by 90 degrees or less
            approach = axis_rotation(finger, math.radians(tilt)) @ -UP
            if tilt and approach[0] < 0.0:
                approach = axis_rotation(finger, -math.radians(tilt)) @ -UP
            rotation = hand_rotation(finger, approach)
            local = points @ rotation
            low, high = local.min(0), local.max(0)
            for clear, depth in ((clear, depth) for clear in (True, False) for depth in (0.022, 0.011)):
                floor = -np.inf if tilt else points[:, 2].min() + 0.004
                grasps = find_grasps(points, scene(clear), rotation, depth, floor)
                for g in grasps:
                    g.clear = clear
                    u, v = (2.0 * (g.position @ rotation - low) / (high - low) - 1.0)[:2]
                    g.cost = 0.2 * g.width + np.linalg.norm((g.position - heavy)[:2]) + 0.03 * (tilt > 0)
                    part = "".join("-0+"[min(2, max(0, int(1.5 * x + 1.5)))] for x in (u, v))
                    name = way + part
                    if name not in found or g.cost < found[name].cost:
                        found[name] = g
                if grasps:
                    break
    return dict(sorted(found.items(), key=lambda row: row[1].cost))


def inward_grasps(task: Task, data: mujoco.MjData, predicate: Predicate, obj) -> dict[str, Grasp]:
    """Ways to take an object that goes into a region from its side, by name: with the hand leaning in already, far out.

    The object need not be turned on its way, and hardly more than the fingers follow it in: a mug is held by its handle.
    """
    points = world_points(data, surface_points(task.model, obj.geoms))
    scene = scene_around(task, data, obj)
    middle = 0.5 * (points.min(0) + points.max(0))
    found: dict[str, Grasp] = {}
    for out in openings(task, data, predicate):
        side = np.cross(UP, out)
        for name, finger in (("inward", side), ("inward flipped", -side)):
            rotation = hand_rotation(finger, -math.sqrt(0.5) * (out + UP))
            for clear in (True, False):
                for g in find_grasps(points, scene(clear), rotation, 0.022, -np.inf):
                    g.clear = clear
                    offset = g.position - middle
                    g.cost = 0.2 * g.width + abs(offset @ side) - offset @ out - 0.3 * offset[2]  # high up it swings less
                    if name not in found or g.cost < found[name].cost:
                        found[name] = g
                if name in found:
                    break
    return found


# ---------------------------------------------------------------------------------------------- places


@dataclasses.dataclass
class Place:
    """Where an object has to go, and how it gets there. All in the frame of what carries the region, so that it moves along."""

    position: np.ndarray  # (3,) of the object's origin
    rotation: np.ndarray  # (3, 3) of the object
    out: np.ndarray  # (3,) direction from which it arrives
    height: float  # of the last, straight part (m)


def palm_points() -> np.ndarray:
    """(n, 3) points on the hand without its fingers, in the grip site's frame."""
    return _box_points((HAND_HALF_LENGTH, HAND_HALF_WIDTH, 0.05), 0.016) - (0.0, 0.0, HAND_HEIGHT + 0.045)


def hand_points() -> np.ndarray:
    """(n, 3) points on the open hand and its fingers, in the grip site's frame."""
    finger = _box_points((0.011, FINGER_HALF_WIDTH, 0.024), 0.016) - (0.0, 0.0, 0.018)
    gap = np.array([FINGER_OUTER - 0.011, 0.0, 0.0])
    return np.concatenate([palm_points(), finger + gap, finger - gap])


def slack(predicate: Predicate, centre: np.ndarray, frame: np.ndarray, origins: np.ndarray, axes: int = 3) -> np.ndarray:
    """(n,) how far (m) inside the region the (n, 3) origins are, negative outside: `common.libero.step` says what LIBERO's regions are.

    Of the region's `axes`, 2 leave out its height.
    """
    size = np.array(predicate.size)
    if predicate.kind == "contain":
        extent = np.abs(frame @ size)
        offset = origins - centre
        low, high = offset + extent + (0.0, 0.0, 0.01), extent - offset
    else:
        offset = (origins - centre) @ frame.T
        limit = np.array([size[0], size[1], size[2] + 0.10])
        low, high = offset + (size[0], size[1], 0.005 - size[2]), limit - offset
    return np.minimum(low, high)[:, :axes].min(1)


def columns(points: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """The lower side of (n, 3) points: the cells (m, 2) int that it covers, and its height in each of them (m,)."""
    cells = np.floor(points[:, :2] / cell + 0.5).astype(int)
    low = cells.min(0)
    under = np.full(cells.max(0) - low + 1, np.inf)
    np.minimum.at(under, tuple((cells - low).T), points[:, 2])
    covered = np.isfinite(under)
    return np.argwhere(covered) + low, under[covered]


@numba.njit(cache=True, fastmath={"nnan", "nsz", "reassoc"})
def rest(cells, under, surface, spots):
    """(n,) heights at which something of `columns` (cells, under) touches the height map `surface`, at each of the spots (n, 2) int.

    What would reach beyond the map's edge is taken to lie inside it.
    """
    rows, width = surface.shape
    flat, offsets, heights = surface.ravel(), cells[:, 0] * width + cells[:, 1], np.empty(len(spots))
    i_low, i_high, j_low, j_high = -cells[:, 0].min(), rows - 1 - cells[:, 0].max(), -cells[:, 1].min(), width - 1 - cells[:, 1].max()
    for s in range(len(spots)):
        i, j = min(max(spots[s, 0], i_low), i_high), min(max(spots[s, 1], j_low), j_high)
        height = -np.inf
        for c in range(len(cells)):
            height = max(height, flat[i * width + j + offsets[c]] - under[c])
        heights[s] = height
    return heights


def find_drop(
    task: Task,
    data: mujoco.MjData,
    predicate: Predicate,
    cargo: np.ndarray,
    hand: np.ndarray,
    turn: np.ndarray,
    usual: float,
    grip: np.ndarray,
    crowded: np.ndarray | None = None,
    fall: bool = False,
):
    """Where an object that is held can be let down, straight from above, so that it lies in or on a region.

    What would stand higher than the region, as a bottle in a drawer, is leaned over.

    Args:
        cargo, hand: (n, 3) points of the object and of the hand that holds it, relative to the object's origin, as they are now.
        turn: (3, 3) of the object now. usual: height of the origin if it is put down in the middle of the region.
        grip: (3, 3) of the hand now: as in `top_grasps`, the wrist is not to be turned too far.
        crowded: (2,) the point to stay near, if other things have to go to the same region and the middle is not to be taken.
        fall: it may be let go of above the region, where it falls in: for when what is in there already leaves no other place.

    Returns None if the middle is as good a place as any, as it is turned now; else (origin, rotation of the object).
    Raises PlanError if there is no place.
    """
    centre, frame = data.site_xpos[predicate.site], data.site_xmat[predicate.site].reshape(3, 3)
    cell, shape = CELL, np.array([200, 200])
    low = centre[:2] - 0.5 * cell * shape
    body = task.model.body_rootid[predicate.body]
    scene = height_map(nearby_points(task, data, centre, [body], 0.4), low, shape, cell)

    def widened(cells):  # a margin on every side
        return maximum_filter(scene, 2 * cells + 1, mode="constant", cval=-np.inf)

    middle, wide = np.floor((centre[None, :2] - low) / cell).astype(int), widened(2)
    aim = centre[:2] if crowded is None else crowded
    if crowded is None and rest(*columns(cargo, cell), wide, middle)[0] < usual + 0.01:
        height = rest(*columns(hand, cell), wide, middle)[0] - 0.01  # to which the hand can come down
        if len(task.goal) > 1 or predicate.kind == "under":  # it has to be put down, not just be inside once
            height = usual if height < usual else np.inf
        if slack(predicate, centre, frame, np.array([[*centre[:2], max(usual, height)]]))[0] > 0.0:
            return None
    extent = np.abs(frame) @ (np.array(predicate.size) + (0.0, 0.0, 0.05 * (predicate.kind == "under")))
    axes = [np.linspace(-e, e, 2 * int(min(10, max(1, e / 0.006))) + 1) for e in extent[:2]]
    spots = centre[:2] + np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    parent = data.xmat[task.model.site_bodyid[predicate.site]].reshape(3, 3)
    now = math.atan2(turn[1, 0], turn[0, 0])
    square = [k * math.pi / 2 + math.atan2(parent[1, 0], parent[0, 0]) - now for k in range(4)]  # aligned with what carries the region
    index = np.floor((spots - low) / cell).astype(int)

    def turned(spin, angle):
        thing, holder = columns(cargo @ spin.T, cell), columns(hand @ spin.T, cell)
        return angle, spin, thing, holder, rest(*thing, scene, index)

    ways = [turned(axis_rotation(UP, a), a) for a in (0.0, *((a + math.pi) % (2 * math.pi) - math.pi for a in square))]
    if predicate.kind == "contain" and all(slack(predicate, centre, frame, np.column_stack([spots, w[-1]])).max() < 0.0 for w in ways):
        spins = [pose @ grip.T for pose in _leaning(grip)]
        ways = [turned(spin, math.sqrt(v @ v)) for spin in spins for v in [rotation_vector(spin)]]
    for surface in (wide, widened(1), scene):
        best = None
        for angle, spin, thing, holder, touch in ways:
            z = np.maximum(rest(*thing, surface, index), rest(*holder, surface, index)) + 0.004
            origins = np.column_stack([spots, z])
            inside = slack(predicate, centre, frame, np.column_stack([spots, touch]) if fall else origins)
            cost = np.linalg.norm(spots - aim, axis=1) + 0.06 * abs(angle) + 2.0 * np.maximum(z - touch - 0.01, 0.0)
            if crowded is not None:  # well inside, and not on top of each other
                aside = slack(predicate, centre, frame, origins, axes=2)
                cost += 3.0 * np.maximum(0.027 - aside, 0.0) + touch - touch[np.isfinite(touch)].min(initial=0.0)
            cost += 3.0 * np.maximum(0.015 - inside, 0.0) + np.where((inside > 0.003) & np.isfinite(z), 0.0, np.inf)
            k = int(np.argmin(cost))
            cost = cost + WRIST * (spin[1] @ grip[:, 0] < -0.1)
            if np.isfinite(cost[k]) and (best is None or cost[k] < best[0]):
                best = cost[k], origins[k], spin @ turn
        if best is not None:
            return best[1:]
    raise PlanError(f"no place for {predicate.args[0]} from above")


def inside_solids(model: mujoco.MjModel, data: mujoco.MjData, geoms: np.ndarray, points: np.ndarray, margin: float) -> bool:
    """Whether any of the (n, 3) points is inside a geom's bounding box, widened by `margin`."""
    return _inside_boxes(points, geoms, data.geom_xpos, data.geom_xmat, model.geom_aabb, margin)


@numba.njit(cache=True)
def _inside_boxes(points, geoms, positions, frames, boxes, margin):
    for g in geoms:
        for n in range(len(points)):
            x, y, z = points[n, 0] - positions[g, 0], points[n, 1] - positions[g, 1], points[n, 2] - positions[g, 2]
            inside = True
            for j in range(3):
                along = x * frames[g, j] + y * frames[g, 3 + j] + z * frames[g, 6 + j]
                inside = inside and abs(along - boxes[g, j]) < boxes[g, 3 + j] + margin
            if inside:
                return True
    return False


def solid_geoms(task: Task, data: mujoco.MjData, body: int, centre: np.ndarray, radius: float) -> np.ndarray:
    """Ids of everything solid near a point, but the robot, the floor and an object."""
    model = task.model
    ignored = model.body_rootid[model.site_bodyid[task.eef_site]], model.body_rootid[body]
    solid = (model.geom_contype | model.geom_conaffinity).astype(bool) & ~np.isin(model.body_rootid[model.geom_bodyid], ignored)
    near = np.linalg.norm(data.geom_xpos - centre, axis=1) < radius + model.geom_aabb[:, 3:].max(1)
    return np.flatnonzero(solid & near & (model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE))


def closed_later(task: Task, predicate: Predicate) -> int | None:
    """The joint that the goal wants closed of the thing that a region belongs to."""
    carrier = next((s.parent for s in task.sites.values() if s.site == predicate.site), None)
    joints = (joint_at(task.model, q.qpos[0]) for q in task.goal if q.name == "close" and q.args[0] in (carrier, predicate.args[1]))
    return next(joints, None)


def openings(task: Task, data: mujoco.MjData, predicate: Predicate) -> list[np.ndarray]:
    """The sides from which nothing is in the way to the middle of a region."""
    centre, frame = data.site_xpos[predicate.site], data.site_xmat[predicate.site].reshape(3, 3)
    extent = np.abs(frame) @ np.array(predicate.size)
    geoms = solid_geoms(task, data, predicate.body, centre, 0.5)
    found = []
    for out in (side for side in DIRECTIONS.values() if side is not UP):
        way = centre + out * np.linspace(0.0, float(np.abs(out) @ extent) + 0.12, 12)[:, None]
        if not inside_solids(task.model, data, geoms, way, 0.004):
            found.append(out)
    return found


def find_slot(
    task: Task, data: mujoco.MjData, predicate: Predicate, cargo: np.ndarray, hand: np.ndarray, turn: np.ndarray, grip: np.ndarray
):
    """Where an object that is held can be pushed into a region from its side: (origin, rotation, out). Raises PlanError.

    The same arguments as `find_drop`; `grip` (3, 3) is how the hand is turned now.
    """
    model = task.model
    centre, frame = data.site_xpos[predicate.site], data.site_xmat[predicate.site].reshape(3, 3)
    extent = np.abs(frame) @ np.array(predicate.size)
    whole = closed_later(task, predicate) is not None
    geoms = solid_geoms(task, data, predicate.body, centre, 0.5)
    cargo, hand = cargo[:: max(1, len(cargo) // 200)], hand[:: max(1, len(hand) // 80)]
    best = None
    for out in openings(task, data, predicate):
        side = np.cross(UP, out)
        deep, broad = float(np.abs(out) @ extent), float(np.abs(side) @ extent)
        for pose in _hand_turns(grip, out):
            spin = pose @ grip.T
            thing, holder = cargo @ spin.T, hand @ spin.T
            effort = 0.03 * np.linalg.norm(rotation_vector(spin)) + WRIST * (pose[1, 0] < -0.1)
            depths, shifts = [(depth, 0.5 * depth) for depth in (0.02, 0.05)], (0.0, 0.5, -0.5)  # (depth of its origin, cost)
            if whole:  # all of it has to be inside, or nearly: a door pushes it on
                depths = [(float((thing @ out).max()) - rest, 0.5 * rest) for rest in (0.0, 0.01, 0.02, 0.03, 0.04)]
                shifts = (0.0, 0.25, -0.25, 0.5, -0.5)
            for depth, price in depths:
                for across in shifts:
                    for z in np.linspace(-extent[2] - 0.002, extent[2] - 0.006, 6):
                        cost = effort + price + 0.05 * abs(across)
                        if best is not None and cost >= best[0]:
                            continue
                        origin = centre + out * (deep - depth) + side * broad * across + UP * z
                        body = np.concatenate([thing, holder]) + origin
                        if inside_solids(model, data, geoms, body[::8], 0.004):
                            continue
                        if not any(inside_solids(model, data, geoms, body + out * s, 0.004) for s in (0.0, 0.04, 0.09)):
                            best = cost, origin, spin @ turn, out
    if best is None:
        raise PlanError(f"no place for {predicate.args[0]} from the side")
    return best[1:]


def _hand_turns(grip: np.ndarray, out: np.ndarray) -> list[np.ndarray]:
    """Ways to turn the hand to push something in against the direction `out`: from as it is now, or leaning in by 45 or 90 degrees."""
    turns = [axis_rotation(UP, k * math.pi / 4) @ grip for k in range(-3, 5)]
    for lean in (45.0, 90.0):
        approach = -out * math.sin(math.radians(lean)) - UP * math.cos(math.radians(lean))
        side = np.cross(UP, out)
        turns += [hand_rotation(f, approach) for f in (side, -side, np.cross(side, approach), -np.cross(side, approach))]
    return turns


def _leaning(grip: np.ndarray) -> list[np.ndarray]:
    """Ways to lean the hand over, to lay down what it holds: in five directions, not back toward the robot."""
    turns = []
    for way in (axis_rotation(UP, k * math.pi / 4) @ DIRECTIONS["far"] for k in (0, 1, 2, -1, -2)):
        side = np.cross(UP, way)
        side *= 1.0 if side @ grip[:, 0] > 0.0 else -1.0
        turns += [hand_rotation(side, way * math.sin(lean) - UP * math.cos(lean)) for lean in np.radians([50.0, 65.0, 80.0])]
    return turns


def push_grasps(task: Task, data: mujoco.MjData, predicate: Predicate, points: np.ndarray) -> dict[str, Grasp]:
    """Not to take a flat object at all, but to move it over the table with the closed hand, by name.

    The hand pushes it from behind, or half from a side (the number says by how many degrees off the way to the target), or
    presses down on it and drags it along.
    """
    origin = data.xpos[predicate.body]
    straight = (data.site_xpos[predicate.site] - origin) * (1.0, 1.0, 0.0)
    straight /= np.linalg.norm(straight)
    geoms, found = solid_geoms(task, data, predicate.body, origin, 0.3), {}
    finger = _box_points((0.024, FINGER_HALF_WIDTH, 0.024), 0.008) - (0.0, 0.0, 0.018)
    hand = np.concatenate([palm_points(), finger])
    for angle in (None, 0, 30, -30, 60, -60):
        way = axis_rotation(UP, math.radians(angle or 0)) @ straight
        position = _push_contact(origin, points - origin, way, angle is None)
        for name, finger in (("wide", np.cross(UP, way)), ("narrow", way)):
            rotation = hand_rotation(finger if finger[1] > 0 else -finger, -UP)  # the wrist turns by 90 degrees or less
            body = hand @ rotation.T + position
            if not any(inside_solids(task.model, data, geoms, body + UP * z, 0.003) for z in (0.003, 0.05, 0.1)):
                found[f"push {'pressing' if angle is None else angle} {name}"] = Grasp(position, rotation, 0.0)
    return found


def _push_contact(origin: np.ndarray, shape: np.ndarray, way: np.ndarray, press: bool) -> np.ndarray:
    """Where the grip site has to be to push an object of (n, 3) surface points `shape`, relative to `origin`, along `way`."""
    if press:
        contact = origin + 0.02 * way
        contact[2] += shape[np.linalg.norm(shape[:, :2], axis=1) < 0.03, 2].max() + PAD_REACH - 0.006
        return contact
    contact = origin - way * ((shape @ -way).max() + 0.014)
    contact[2] = origin[2] + shape[:, 2].min() + 0.006 + PAD_REACH
    return contact


class PickPlace:
    """Take a free object and bring it to where a predicate (on, in) wants it."""

    REACH, CARRY = (0.08, 0.04), (0.10, 0.05)  # the last part is vertical: its height, and how far off it begins

    def __init__(self, task: Task, predicate: Predicate, factors: dict[str, str]):
        self.task, self.predicate = task, predicate
        self.object = next(o for o in task.objects.values() if o.body == predicate.body)
        self.factors, self.path = factors, detour(factors["path"], UP)
        self.far_out = factors["grasp"].startswith("push")  # the hand may have to go as far as the arm can reach
        self.grasp: Grasp | None = None

    @staticmethod
    def holds(task: Task, predicate: Predicate, data: mujoco.MjData) -> dict[str, Grasp]:
        """The ways to take hold that can be planned from a state, by name, the most usual first."""
        obj = next(o for o in task.objects.values() if o.body == predicate.body)
        joint = closed_later(task, predicate)
        door = joint is not None and task.model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE  # a drawer is filled from above
        if door and (found := inward_grasps(task, data, predicate, obj)):
            return found
        found = top_grasps(task, data, obj)
        if len(found) > 3:
            return found
        points = world_points(data, surface_points(task.model, obj.geoms))
        size = points.max(0) - points.min(0)
        flat = size[2] < 0.04 and size[:2].min() > 0.08 and predicate.kind == "under" and predicate.contact is None
        return (push_grasps(task, data, predicate, points) if flat else {}) | found | own_grasps(task, data, obj)

    @classmethod
    def repertoire(cls, task: Task, predicate: Predicate, data: mujoco.MjData, holds: dict[str, Grasp]) -> list[PickPlace]:
        """A skill, planned from a state, for every combination of a way to take hold and a path."""
        skills, usable = [], 0
        for name in cls.order(holds):
            first = cls(task, predicate, {"grasp": name, "path": PATHS[0]})
            try:
                first.plan(data, holds)
            except PlanError:
                continue
            skills, usable = skills + [first._along(path) for path in paths_to(UP)], usable + 1
            if usable == 6:
                break
        return skills

    @staticmethod
    def order(holds) -> list[str]:
        """Names of ways to take hold that are worth trying, the most usual first."""
        own = [n for n in holds if n.startswith("own")]
        if pushes := [n for n in holds if n.startswith("push")]:
            return pushes
        usual = ([n for n in SIDES if n in holds] or [n for n in holds if n not in own])[:4]
        return sorted(usual + own, key=lambda n: not holds[n].clear) if own else usual

    def plan(self, data: mujoco.MjData, found: dict[str, Grasp] | None = None) -> None:
        name = self.factors["grasp"]
        if found is None and name.startswith("push"):
            found = self.holds(self.task, self.predicate, data)
        elif found is None and name.startswith("inward"):
            found = inward_grasps(self.task, data, self.predicate, self.object)
        elif found is None:
            own, way = name.startswith("own"), name[: name.rfind(" ") + 1]
            found = own_grasps(self.task, data, self.object, way) if own else top_grasps(self.task, data, self.object, name)
        if name not in found and name in SIDES:  # a little to the side of it, as a person would
            found = top_grasps(self.task, data, self.object)
            name = max((n for n in found if n in SIDES and SIDES[n] @ SIDES[name] > 0.7), default=name)
        if name not in found:  # the same way, a little beside it, or turned a little
            found = found if found and name.startswith("own") else own_grasps(self.task, data, self.object)
            way = name.split()[1:-1] or [name.split()[-1]]
            name = next((n for n in found if n.split()[1:-1] == way), next(iter(found), name))
        if name not in found:
            raise PlanError(f"no grasp {name!r} of {self.object.name}")
        self.grasp = found[name]
        origin, turn = data.xpos[self.object.body], data.xmat[self.object.body].reshape(3, 3)
        self.offset = turn.T @ (self.grasp.position - origin)  # in the object's frame
        points = world_points(data, surface_points(self.task.model, self.object.geoms))
        self.bottom = points[:, 2].min() - origin[2]
        self._free = min(self.grasp.width + 0.02, 0.072)  # the opening from which on the fingers do not hold it any more
        self.start, self.turn, self.place = origin.copy(), turn.copy(), None
        self.out, self.path, self.carry, self.lift = UP, detour(self.factors["path"], UP), self.CARRY, 0.0
        self.side = UP if self.grasp.rotation[2, 2] < -0.99 else -self.grasp.rotation[:, 2]  # where the hand comes from
        self.reach = detour(self.factors["path"], self.side)
        self.shape = (points - origin) @ turn
        pushed, self.inward = name.startswith("push"), name.startswith("inward")
        if not pushed and self.predicate.kind != "ontop" and (place := self._find_place(data, points)) is not None:
            self.place, self.carry = place, (place.height, 0.02 if self.inward else self.CARRY[1])
            if (self._frame(data) @ place.out)[2] < 0.9:
                self.out = self._frame(data) @ place.out
                self.path = detour(self.factors["path"], self.out)
        target = self.target(data)
        there = nearby_points(self.task, data, target, [self.object.body], 0.3)
        there = there[np.linalg.norm((there - target)[:, :2], axis=1) < 0.14]
        tall = there[:, 2].max(initial=-np.inf) - target[2] - self.bottom + 0.03
        if self.predicate.kind == "ontop" and tall > self.CARRY[0]:  # something beside it is in the way of all but a straight descent
            self.carry = (min(tall, 0.30), 0.03)
        usual = target[2] + (self.grasp.position - origin)[2] + 0.11
        self.level = min(max(usual, there[:, 2].max(initial=-np.inf) + 0.12), usual + 0.20)  # to rise to before what comes next
        walls = nearby_points(self.task, data, origin, [self.object.body], 0.2) - origin
        walls = walls[(np.linalg.norm(walls[:, :2], axis=1) < 0.14) & (walls[:, 2] > self.bottom + 0.03)]
        enclosed = len(np.unique(np.floor(np.arctan2(walls[:, 1], walls[:, 0]) / (math.pi / 2) + 0.5) % 4)) > 2
        if enclosed or origin[2] - self.target(data)[2] > 0.03:  # out of what it stands in, before it goes sideways
            self.lift = float(np.clip(walls[:, 2].max(initial=0.0) - self.bottom + 0.02, 0.05, 0.12))

    def _along(self, path: str) -> PickPlace:
        """The same plan, by another path."""
        other = copy.copy(self)
        other.factors, other.path, other.reach = {**self.factors, "path": path}, detour(path, self.out), detour(path, self.side)
        return other

    def _frame(self, data: mujoco.MjData) -> np.ndarray:
        return data.site_xmat[self.predicate.site].reshape(3, 3)

    def _find_place(self, data: mujoco.MjData, points: np.ndarray) -> Place | None:
        p, model = self.predicate, self.task.model
        cargo, grip = points - self.start, self.grasp.rotation
        hand = hand_points() @ grip.T + self.grasp.position - self.start
        crowded = self.start[:2] if sum(q.body >= 0 and q.site == p.site for q in self.task.goal) > 1 else None
        drop = functools.partial(find_drop, self.task, data, p, cargo, hand, self.turn, self.target(data)[2], grip, crowded)
        try:
            if (spot := drop()) is None:
                return None
            (position, rotation), out = spot, UP
            parent = model.body_rootid[model.site_bodyid[p.site]]
            near = nearby_points(self.task, data, data.site_xpos[p.site], [self.object.body], 0.4)
            near = near[np.linalg.norm((near - position)[:, :2], axis=1) < 0.16] if parent else near[:0]
            height = float(np.clip(near[:, 2].max(initial=-np.inf) - position[2] - self.bottom + 0.025, 0.10, 0.25))
        except PlanError:
            if p.kind != "contain":
                raise
            try:
                position, rotation, out = find_slot(self.task, data, p, cargo, hand, self.turn, grip)
            except PlanError:
                (position, rotation), out = drop(fall=True), UP
            length = float(np.ptp(cargo @ (rotation @ self.turn.T).T @ out))
            height = length + 0.06 if self.inward else 0.14  # in line with the opening before it gets there
        frame = self._frame(data)
        return Place(frame.T @ (position - data.site_xpos[p.site]), frame.T @ rotation, frame.T @ out, height)

    def preview(self, data: mujoco.MjData) -> list[np.ndarray]:
        """The hand's way to the object, and with it to the target."""
        grasp, place = self.grasp.position, self.target(data)
        origin = data.xpos[self.object.body]
        reach = grasp + follow(data.site_xpos[self.task.eef_site] - grasp, self.side, self.reach, *self.REACH)
        carry = grasp + place - origin + follow(origin - place, self.out, self.path, *self.carry)
        return [reach, carry]

    def target(self, data: mujoco.MjData) -> np.ndarray:
        """Where the object's origin has to go."""
        p = self.predicate
        if self.place is not None:
            return data.site_xpos[p.site] + self._frame(data) @ self.place.position
        place = (data.xpos[p.target_body] if p.kind == "ontop" else data.site_xpos[p.site]).copy()
        place[2] -= self.bottom - (0.005 if p.kind == "ontop" else 0.0)
        return place

    def holding(self, data: mujoco.MjData, hand: Hand) -> bool:
        """Whether the fingers are on the object."""
        if self.grasp is None:
            return False
        return math.dist(hand.position, self._grip(data)) < 0.04 and hand.opening < self._free

    def _grip(self, data: mujoco.MjData) -> np.ndarray:
        body = self.object.body
        return data.xpos[body] + data.xmat[body].reshape(3, 3) @ self.offset

    def leave(self, data: mujoco.MjData, hand: Hand) -> tuple[np.ndarray, np.ndarray, float] | None:
        """Let go and move away, until nothing is in the way of what comes next: then None."""
        if self.grasp is None:
            return None
        away = hand.position - self._grip(data)
        back = -hand.rotation[:, 2]
        risen = hand.position[2] > self.level if self.out is UP else away @ back > 0.13
        if risen or math.dist(hand.position, self.target(data)) > 0.35:
            return None
        return (0.05 * back if hand.opening > self._free else 0.0 * back), hand.rotation, OPEN

    def __call__(self, data: mujoco.MjData, hand: Hand) -> tuple[np.ndarray, np.ndarray, float]:
        """For the state: displacement of the hand (3,) m, rotation (3, 3) that it should have, gripper command."""
        if self.grasp is None:
            self.plan(data)
        body = self.object.body
        origin, turn = data.xpos[body], data.xmat[body].reshape(3, 3)
        grip = hand.position - origin - turn @ self.offset  # grip site minus grasp
        miss = math.sqrt(grip @ grip)
        place = origin - self.target(data)
        if self.factors["grasp"].startswith("push"):
            return self._push(data, hand, place)
        if self._placed(data, hand, place):  # let go, and move away; and once more, if it does not lie as it should
            if miss > 0.08 and hand.opening > self._free:
                self.plan(data)
                if self._placed(data, hand, origin - self.target(data)):
                    raise PlanError(f"{self.object.name} is where it should be, and does not count")
            back = UP if self.place is None else -hand.rotation[:, 2]
            return (0.05 * back if hand.opening > self._free else 0.0 * UP), self.grasp.rotation, OPEN
        phase = grip_phase(miss, hand, self.grasp.width)
        if phase == "held":
            return self._carry(data, hand, place)
        if phase == "closing":
            return -grip, self.grasp.rotation, CLOSE
        if miss > 0.06 and np.vdot(turn, self.turn) < 1.0 + 2.0 * math.cos(0.6):  # it has fallen over
            self.plan(data)
        flow = come_in(grip, self.side, self.reach, *self.REACH, readiness(hand, self.grasp.rotation))
        return flow, self.grasp.rotation, OPEN

    def _push(self, data: mujoco.MjData, hand: Hand, place: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """From behind, toward the place: the line is taken anew in every state, so that a push off the centre is put right.

        A push that begins from a side leads to the place in a curve, and ends straight.
        """
        distance = math.hypot(place[0], place[1])
        way = np.array([-place[0], -place[1], 0.0]) / max(distance, 1e-6)
        angle, press = self.factors["grasp"].split()[1], "pressing" in self.factors["grasp"]
        way = way if press else axis_rotation(UP, math.radians(float(angle)) * ramp(distance, 0.02, 0.16)) @ way
        origin, turn = data.xpos[self.object.body], data.xmat[self.object.body].reshape(3, 3)
        contact = _push_contact(origin, self.shape @ turn.T, way, press)
        offset = hand.position - contact
        along = offset @ way
        across = offset - along * way
        beside = math.sqrt(across @ across)
        if beside < 0.025 and abs(along) < 0.03:
            speed = min(0.03 if press else 0.06, 0.02 + distance) * (1.0 - ramp(beside, 0.008, 0.02))  # a dragged one slips if hurried
            return speed * way - across, self.grasp.rotation, CLOSE
        ready = aligned(hand.rotation, self.grasp.rotation)
        return come_in(offset + 0.01 * way, UP, self.reach, *self.REACH, ready), self.grasp.rotation, CLOSE

    def _placed(self, data: mujoco.MjData, hand: Hand, place: np.ndarray) -> bool:
        if self.out is UP:
            across, along = place[0] * place[0] + place[1] * place[1], place[2]
        else:
            along = place @ self.out
            across = place @ place - along * along
            if self.inward and hand.closing < -0.02 and along < 0.03 and across < 0.03**2:
                return True  # it is being let go, and drops a little
        if across < 0.012**2 and along < 0.012:
            return True
        if across > 0.02**2 or not (0.012 if self.place is None else -0.01) < along < 0.05:
            return False
        speed = data.qvel[self.task.model.body_dofadr[self.object.body] :][:3]
        return speed @ speed < (0.008 if self.place is None else 0.03) ** 2  # it has come to rest on something

    def _carry(self, data: mujoco.MjData, hand: Hand, place: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        origin = data.xpos[self.object.body]
        moved = origin - self.start
        if self.lift and moved[2] < self.lift and moved[0] * moved[0] + moved[1] * moved[1] < 0.05**2:
            return 0.05 * UP - 0.5 * moved * (1.0, 1.0, 0.0), self.grasp.rotation, CLOSE
        if self.place is None:
            return come_in(place, UP, self.path, *self.carry), self.grasp.rotation, CLOSE
        turn, goal = data.xmat[self.object.body].reshape(3, 3), self._frame(data) @ self.place.rotation
        ready = ramp(0.5 * (np.vdot(turn, goal) - 1.0), 0.955, 0.99)
        free = math.sqrt(moved @ moved) > 0.05
        # what is held by a handle gives a little: the hand would wind up if it were turned after it
        before, held = (self.turn, self.grasp.rotation) if self.inward else (turn, hand.rotation)
        rotation = goal @ before.T @ held if free else self.grasp.rotation
        return come_in(place, self.out, self.path, *self.carry, ready), rotation, CLOSE


@dataclasses.dataclass
class Contact:
    """How the hand acts on a drawer, door or knob: a pose of the grip site in the world when planned, and what it does there."""

    position: np.ndarray  # (3,)
    rotation: np.ndarray  # (3, 3)
    out: np.ndarray  # (3,) direction from which the hand comes
    width: float | None  # of what the fingers close on (m); None: push with closed fingers


def joint_at(model: mujoco.MjModel, address: int) -> int:
    """The joint whose position begins at an address in qpos."""
    return int(np.flatnonzero(model.jnt_qposadr == address)[0])


def joint_motion(model: mujoco.MjModel, data: mujoco.MjData, joint: int, point: np.ndarray) -> np.ndarray:
    """(3,) velocity of a point of the joint's body per unit of joint velocity."""
    if model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_SLIDE:
        return data.xaxis[joint].copy()
    return np.cross(data.xaxis[joint], point - data.xanchor[joint])


def link_points(model: mujoco.MjModel, data: mujoco.MjData, joint: int) -> np.ndarray:
    """(n, 3) surface points of what a joint moves."""
    solid = (model.geom_contype | model.geom_conaffinity).astype(bool)
    return world_points(data, surface_points(model, np.flatnonzero((model.geom_bodyid == model.jnt_bodyid[joint]) & solid)))


def contacts(task: Task, data: mujoco.MjData, joint: int, sign: float) -> dict[str, Contact]:
    """Ways to move a joint in the direction of `sign`, by name."""
    model = task.model
    points = link_points(model, data, joint)
    scene = nearby_points(task, data, points.mean(0))
    if model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_SLIDE:
        front = data.xaxis[joint] * np.sign(model.jnt_range[joint].sum())
        if sign * float(front @ data.xaxis[joint]) > 0:
            return drawer_grasps(points, scene, front)
        return drawer_pushes(points, front)
    if np.linalg.norm((points - data.xanchor[joint])[:, :2], axis=1).max() > 0.1:
        inward = sign * float(model.jnt_range[joint].sum()) < 0  # toward the closed end of its range
        if inward:
            return door_pushes(points, data.xanchor[joint], sign * data.xaxis[joint])
        return door_grasps(points, scene, data.xanchor[joint], sign * data.xaxis[joint])
    return knob_turns(points, scene, data.xanchor[joint], sign)


def drawer_grasps(points: np.ndarray, scene: np.ndarray, front: np.ndarray) -> dict[str, Contact]:
    """Take the handle between a finger above and one below, at one of its ends or in the middle."""
    handle = points[points @ front > (points @ front).max() - 0.018]
    bar = np.cross(front, UP)  # to the left as one looks out of the drawer
    middle = 0.5 * (handle.min(0) + handle.max(0))
    tilt = math.radians(75.0)
    approach = -front * math.sin(tilt) - UP * math.cos(tilt)
    upright, found = np.cross(bar, approach), {}
    for turn, roll in (("", 0.0), (" turned left", 40.0), (" turned right", -40.0), (" flipped", 180.0)):
        finger = math.cos(math.radians(roll)) * upright + math.sin(math.radians(roll)) * bar
        grasps = find_grasps(handle, scene, hand_rotation(finger, approach), 0.016, -np.inf)
        for end, place in (("left end", 0.032), ("right end", -0.032), ("middle", 0.0)):
            near = [(abs((g.position - middle) @ bar - place), k, g) for k, g in enumerate(grasps)]
            if near and min(near)[0] < 0.012:
                g = min(near)[2]
                found[f"{end}{turn}"] = Contact(g.position, g.rotation, -approach, g.width)
    return found


def drawer_pushes(points: np.ndarray, front: np.ndarray) -> dict[str, Contact]:
    """Push the front of a drawer with closed fingers."""
    bar = np.cross(front, UP)
    face = (points @ front).max()
    handle = points[points @ front > face - 0.018]
    middle = 0.5 * (handle.min(0) + handle.max(0))
    found = {}
    for tilt in (30.0, 60.0):
        approach = -front * math.sin(math.radians(tilt)) - UP * math.cos(math.radians(tilt))
        for end, place in (("left", 0.03), ("right", -0.03), ("middle", 0.0)):
            for grip, finger, thickness in (("wide", bar, 0.014), ("narrow", np.cross(bar, approach), 0.024)):
                position = middle + bar * place + front * (face + thickness - middle @ front)
                found[f"{end} tilted {tilt:.0f} {grip}"] = Contact(position, hand_rotation(finger, approach), -approach, None)
    return found


def door_pushes(points: np.ndarray, hinge: np.ndarray, axis: np.ndarray) -> dict[str, Contact]:
    """Push a door that turns about a vertical `axis`, near its top and at several distances from the hinge."""
    edge = points[np.linalg.norm((points - hinge)[:, :2], axis=1).argmax()] - hinge
    edge[2] = 0.0
    width = math.sqrt(edge @ edge)
    along = edge / width
    motion = np.cross(axis, along)
    found = {}
    for name, part in (("edge", 0.92), ("middle", 0.6)):
        beside = points[np.abs((points - hinge) @ along - part * width) < 0.012]
        position = hinge + part * width * along - motion * (((beside - hinge) @ -motion).max() + 0.014)
        position[2] = beside[:, 2].max() - 0.025
        for turn, finger in (("", along), (" flipped", -along)):
            found[f"{name}{turn}"] = Contact(position, hand_rotation(finger, -UP), UP, None)
    return found


def door_grasps(points: np.ndarray, scene: np.ndarray, hinge: np.ndarray, axis: np.ndarray) -> dict[str, Contact]:
    """Take the upright handle of a door that opens about `axis` between two fingers, from in front of it."""
    edge = points[np.linalg.norm((points - hinge)[:, :2], axis=1).argmax()] - hinge
    along = np.array([edge[0], edge[1], 0.0]) / math.hypot(edge[0], edge[1])
    front = np.cross(axis, along)  # where the door opens to
    front = front * (1.0, 1.0, 0.0)
    door = points @ front
    handle = points[door > np.sort(door)[-1] - 0.018]
    middle = 0.5 * (handle.min(0) + handle.max(0))
    found = {}
    for tilt in (45.0, 65.0, 85.0):
        approach = -front * math.sin(math.radians(tilt)) - UP * math.cos(math.radians(tilt))
        for turn, finger in (("", along), (" flipped", -along)):
            grasps = find_grasps(handle, scene, hand_rotation(finger, approach), 0.016, -np.inf)
            for end, place in (("middle", 0.0), ("top", 0.035), ("bottom", -0.035)):
                near = [(abs((g.position - middle) @ UP - place), k, g) for k, g in enumerate(grasps)]
                if near and min(near)[0] < 0.015:
                    g = min(near)[2]
                    found[f"{end} tilted {tilt:.0f}{turn}"] = Contact(g.position, g.rotation, -approach, g.width)
    return found


def knob_turns(points: np.ndarray, scene: np.ndarray, anchor: np.ndarray, sign: float) -> dict[str, Contact]:
    """Twist a knob between the fingers, or push one end of its ridge with closed fingers."""
    found = {}
    top = points[:, 2].max()
    ridge = points[points[:, 2] > top - 0.008]
    flat = ridge[:, :2] - ridge[:, :2].mean(0)
    along = np.append(np.linalg.svd(flat, full_matrices=False)[2][0], 0.0)
    along = along * (1.0 if along[np.argmax(np.abs(along))] > 0 else -1.0)
    for name, finger in (("twist", np.cross(UP, along)), ("twist flipped", np.cross(along, UP))):
        grasps = find_grasps(points, scene, hand_rotation(finger, -UP), 0.02, points[:, 2].min())
        near = [(float(np.linalg.norm((g.position - anchor)[:2])), k, g) for k, g in enumerate(grasps)]
        if near and min(near)[0] < 0.015:
            g = min(near)[2]
            found[name] = Contact(g.position, g.rotation, UP, g.width)
    fin = points[points[:, 2] > points[:, 2].min() + 0.4 * (top - points[:, 2].min())]  # what stands out of the dial
    for end, e in (("far", along), ("near", -along)):
        lever = ((fin - anchor) @ e).max() - 0.016
        motion = sign * np.cross(UP, e)
        beside = fin[np.abs((fin - anchor) @ e - lever) < 0.010]
        position = anchor + e * lever - motion * (((beside - anchor) @ -motion).max() + 0.012)
        position[2] = 0.5 * (fin[:, 2].min() + beside[:, 2].max()) + PAD_REACH
        for name, finger in (("", along), (" flipped", -along)):
            found[f"push {end} end{name}"] = Contact(position, hand_rotation(finger, -UP), UP, None)
    return found


class Articulate:
    """Move a drawer, door or knob along its joint until a predicate (open, close, turnon, turnoff) holds."""

    REACH = (0.08, 0.04)

    def __init__(self, task: Task, predicate: Predicate, factors: dict[str, str]):
        self.task, self.predicate, self.factors = task, predicate, factors
        self.joint = joint_at(task.model, predicate.qpos[0])
        self.slide = task.model.jnt_type[self.joint] == mujoco.mjtJoint.mjJNT_SLIDE
        self.far_out = False  # as in PickPlace; a door's edge is
        self.contact: Contact | None = None
        self.second: Articulate | None = None  # for a door that is ajar

    @staticmethod
    def holds(task: Task, predicate: Predicate, data: mujoco.MjData) -> dict[str, Contact]:
        """The ways to act on the joint that can be planned from a state, by name."""
        return contacts(task, data, joint_at(task.model, predicate.qpos[0]), predicate.sign)

    @staticmethod
    def order(holds) -> list[str]:
        return list(holds)

    @classmethod
    def repertoire(cls, task: Task, predicate: Predicate, data: mujoco.MjData, holds: dict[str, Contact]) -> list[Articulate]:
        """A skill, planned from a state, for every combination of a way to take hold and a path."""
        pairs = [(name, path) for name in holds for path in paths_to(holds[name].out)]
        skills = [cls(task, predicate, {"contact": name, "path": path}) for name, path in pairs]
        for skill in skills:
            skill.plan(data, holds)
        return skills

    def plan(self, data: mujoco.MjData, found: dict[str, Contact] | None = None) -> None:
        found = found or self.holds(self.task, self.predicate, data)
        if self.factors["contact"] not in found:
            raise PlanError(f"no contact {self.factors['contact']!r} with {self.predicate.args[0]}")
        self.contact = found[self.factors["contact"]]
        self.start = float(data.qpos[self.predicate.qpos[0]])
        self.path = detour(self.factors["path"], self.contact.out)
        arm = (self.contact.position - data.xanchor[self.joint])[:2]
        self.door = self.far_out = not self.slide and math.hypot(*arm) > 0.1

    def leave(self, data: mujoco.MjData, hand: Hand) -> tuple[np.ndarray, np.ndarray, float] | None:
        """Let go and move away, until nothing is in the way of what comes next: then None."""
        if self.contact is None:
            return None
        position = self._pose(data)[0]
        away = hand.position - position
        if math.sqrt(away @ away) > 0.16 or away @ self.contact.out > 0.09:
            return None
        free = self.contact.width is None or hand.opening > self.contact.width + 0.02
        return (0.05 * self.contact.out if free else 0.0 * UP), hand.rotation, OPEN if self.contact.width else CLOSE

    def holding(self, data: mujoco.MjData, hand: Hand) -> bool:
        """A joint stays where it was left: there is nothing to put down."""
        return False

    def _pose(self, data: mujoco.MjData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the contact has moved to with the joint, how it is turned, and where it moves next (3,) per unit of the joint."""
        c, axis = self.contact, data.xaxis[self.joint]
        moved = float(data.qpos[self.predicate.qpos[0]]) - self.start
        if self.slide:
            return c.position + moved * axis, c.rotation, self.predicate.sign * axis
        anchor, turn = data.xanchor[self.joint], axis_rotation(axis, moved)
        position = anchor + turn @ (c.position - anchor)
        return position, turn @ c.rotation, self.predicate.sign * np.cross(axis, position - anchor)

    def preview(self, data: mujoco.MjData) -> list[np.ndarray]:
        """The hand's way to the contact, and the first centimetres with it."""
        c = self.contact
        reach = c.position + follow(data.site_xpos[self.task.eef_site] - c.position, c.out, self.path, *self.REACH)
        motion = self.predicate.sign * joint_motion(self.task.model, data, self.joint, c.position)
        return [reach, c.position + np.linspace(0.0, 0.15, 8)[:, None] * motion]

    def _push_on(self, data: mujoco.MjData, hand: Hand) -> tuple[np.ndarray, np.ndarray, float]:
        """The door is ajar: let go of the handle, and push on from the inside."""
        if self.second is None:
            axis = self.predicate.sign * data.xaxis[self.joint]
            found = door_pushes(link_points(self.task.model, data, self.joint), data.xanchor[self.joint], axis)
            name = "edge" if found["edge"].rotation[:, 0] @ hand.rotation[:, 0] > 0.0 else "edge flipped"  # as the hand is turned now
            self.second = Articulate(self.task, self.predicate, {"contact": name, "path": "direct"})
            self.second.plan(data, found)
        position, _, motion = self._pose(data)
        if math.dist(hand.position, position) < 0.07 and hand.position[2] < position[2] + 0.05:
            free = hand.opening > self.contact.width + 0.02
            return (0.05 * motion / math.sqrt(motion @ motion) if free else 0.0 * UP), hand.rotation, OPEN
        return self.second(data, hand)

    def __call__(self, data: mujoco.MjData, hand: Hand) -> tuple[np.ndarray, np.ndarray, float]:
        if self.contact is None:
            self.plan(data)
        c = self.contact
        if self.door and c.width is not None and self.predicate.sign * (data.qpos[self.predicate.qpos[0]] - self.start) > AJAR:
            return self._push_on(data, hand)
        position, rotation, motion = self._pose(data)
        axis, moved = data.xaxis[self.joint], float(data.qpos[self.predicate.qpos[0]]) - self.start
        offset = hand.position - position
        if c.width is None:  # push
            speed = math.sqrt(motion @ motion)
            direction = motion / speed
            along = offset @ direction
            across = offset - along * direction
            slack = math.sqrt(across @ across)
            if slack < 0.02 and along > -0.03:
                return 0.06 * (1.0 - ramp(slack, 0.006, 0.016)) * direction - across, c.rotation, CLOSE
            ready = aligned(hand.rotation, c.rotation)
            return come_in(offset + 0.01 * direction, c.out, self.path, *self.REACH, ready), c.rotation, CLOSE
        miss = math.sqrt(offset @ offset)
        phase = grip_phase(miss, hand, c.width)
        if phase == "held":
            if self.slide:
                return 0.022 * motion - (offset - (offset @ motion) * motion), rotation, CLOSE
            if self.door:  # the handle turns between the fingers, so that the hand need not turn as far as the door
                rotation = axis_rotation(axis, -0.5 * moved) @ rotation
                ahead = motion / math.sqrt(motion @ motion)
                return 0.03 * ahead - (offset - (offset @ ahead) * ahead), rotation, CLOSE
            return -offset, axis_rotation(axis, self.predicate.sign * 0.4) @ rotation, CLOSE
        if phase == "closing":
            return -offset, rotation, CLOSE
        return come_in(offset, c.out, self.path, *self.REACH, readiness(hand, rotation)), rotation, OPEN


def axis_rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rotation matrix of a turn about a unit axis."""
    turn, quat = np.empty(9), np.empty(4)
    mujoco.mju_axisAngle2Quat(quat, axis, angle)
    mujoco.mju_quat2Mat(turn, quat)
    return turn.reshape(3, 3)


SKILLS = {
    "on": PickPlace,
    "in": PickPlace,
    "open": Articulate,
    "close": Articulate,
    "turnon": Articulate,
    "turnoff": Articulate,
}
