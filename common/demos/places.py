"""Where an object that is held can be put down so that the goal's predicate holds.

From above, straight down (`find_drop`), or pushed in from a side (`find_slot`). `slack` says how far inside a region a point is.
"""

from __future__ import annotations

import dataclasses
import math

import mujoco
import numpy as np
from scipy.ndimage import maximum_filter

from common.demos.geometry import (
    CELL,
    UP,
    axis_rotation,
    columns,
    hand_rotation,
    height_map,
    inside_solids,
    joint_at,
    nearby_points,
    rest,
    rotation_vector,
    solid_geoms,
)
from common.demos.motion import DIRECTIONS, PlanError
from common.libero import Task
from common.libero.tasks import Predicate

WRIST = 0.2  # cost (m) of a place where the wrist has to be turned by more than 90 degrees from where it rests


@dataclasses.dataclass
class Place:
    """Where an object has to go, and how it gets there. All in the frame of what carries the region, so that it moves along."""

    position: np.ndarray  # (3,) of the object's origin
    rotation: np.ndarray  # (3, 3) of the object
    out: np.ndarray  # (3,) direction from which it arrives
    height: float  # of the last, straight part (m)


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
                lowest = touch[np.isfinite(touch)].min(initial=0.0)
                cost += 3.0 * np.maximum(0.027 - aside, 0.0) + np.where(np.isfinite(touch), touch - lowest, np.inf)  # -inf: nothing below
            cost += 3.0 * np.maximum(0.015 - inside, 0.0) + np.where((inside > 0.003) & np.isfinite(z), 0.0, np.inf)
            k = int(np.argmin(cost))
            cost = cost + WRIST * (spin[1] @ grip[:, 0] < -0.1)
            if np.isfinite(cost[k]) and (best is None or cost[k] < best[0]):
                best = cost[k], origins[k], spin @ turn
        if best is not None:
            return best[1:]
    raise PlanError(f"no place for {predicate.args[0]} from above")


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
