"""Where the hand can take hold of an object, found in its collision geometry: `find_grasps`, and the ways that have names.

A way to take hold is a `Grasp` under a name that means the same in every state of a task ("left", "across 90", "own 45 leaning 0+"),
so that it can be one of the choices that a strategy is made of.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import mujoco
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import maximum_filter1d

from common.demos.geometry import (
    CELL,
    UP,
    axis_rotation,
    box_points,
    hand_rotation,
    height_map,
    inside_solids,
    nearby_points,
    solid_geoms,
    surface_points,
    world_points,
)
from common.demos.motion import DIRECTIONS
from common.demos.places import openings
from common.libero import Task
from common.libero.tasks import Predicate

# The hand, in the frame of its grip site: x is the axis along which the fingers move, z points out of the palm (m).
PAD_HALF_GAP, FINGER_OUTER, FINGER_HALF_WIDTH, PAD_REACH = 0.036, 0.058, 0.010, 0.009
HAND_HALF_LENGTH, HAND_HALF_WIDTH, HAND_HEIGHT = 0.104, 0.030, 0.040
SIDES = {name: side for name, side in DIRECTIONS.items() if name != "over"}
SIDES |= {f"{x} {y}": (SIDES[x] + SIDES[y]) / math.sqrt(2.0) for x in ("far", "near") for y in ("left", "right")}


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


def palm_points() -> np.ndarray:
    """(n, 3) points on the hand without its fingers, in the grip site's frame."""
    return box_points((HAND_HALF_LENGTH, HAND_HALF_WIDTH, 0.05), 0.016) - (0.0, 0.0, HAND_HEIGHT + 0.045)


def hand_points() -> np.ndarray:
    """(n, 3) points on the open hand and its fingers, in the grip site's frame."""
    finger = box_points((0.011, FINGER_HALF_WIDTH, 0.024), 0.016) - (0.0, 0.0, 0.018)
    gap = np.array([FINGER_OUTER - 0.011, 0.0, 0.0])
    return np.concatenate([palm_points(), finger + gap, finger - gap])


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


def push_grasps(task: Task, data: mujoco.MjData, predicate: Predicate, points: np.ndarray) -> dict[str, Grasp]:
    """Not to take a flat object at all, but to move it over the table with the closed hand, by name.

    The hand pushes it from behind, or half from a side (the number says by how many degrees off the way to the target), or
    presses down on it and drags it along.
    """
    origin = data.xpos[predicate.body]
    straight = (data.site_xpos[predicate.site] - origin) * (1.0, 1.0, 0.0)
    straight /= np.linalg.norm(straight)
    geoms, found = solid_geoms(task, data, predicate.body, origin, 0.3), {}
    finger = box_points((0.024, FINGER_HALF_WIDTH, 0.024), 0.008) - (0.0, 0.0, 0.018)
    hand = np.concatenate([palm_points(), finger])
    for angle in (None, 0, 30, -30, 60, -60):
        way = axis_rotation(UP, math.radians(angle or 0)) @ straight
        position = push_contact(origin, points - origin, way, angle is None)
        for name, finger in (("wide", np.cross(UP, way)), ("narrow", way)):
            rotation = hand_rotation(finger if finger[1] > 0 else -finger, -UP)  # the wrist turns by 90 degrees or less
            body = hand @ rotation.T + position
            if not any(inside_solids(task.model, data, geoms, body + UP * z, 0.003) for z in (0.003, 0.05, 0.1)):
                found[f"push {'pressing' if angle is None else angle} {name}"] = Grasp(position, rotation, 0.0)
    return found


def push_contact(origin: np.ndarray, shape: np.ndarray, way: np.ndarray, press: bool) -> np.ndarray:
    """Where the grip site has to be to push an object of (n, 3) surface points `shape`, relative to `origin`, along `way`."""
    if press:
        contact = origin + 0.02 * way
        contact[2] += shape[np.linalg.norm(shape[:, :2], axis=1) < 0.03, 2].max() + PAD_REACH - 0.006
        return contact
    contact = origin - way * ((shape @ -way).max() + 0.014)
    contact[2] = origin[2] + shape[:, 2].min() + 0.006 + PAD_REACH
    return contact
