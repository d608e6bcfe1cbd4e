"""Scripted demonstrations of LIBERO tasks whose strategy is known.

A demonstrator reads the privileged state and sends the 7-D actions that a person would have sent. Nothing in it is written
for one task. The goal's predicates name what has to happen (`subgoals`); the collision geometry of the scene says where the
hand can take hold (`find_grasps`); and two skills do it: `PickPlace` moves a free object to a region or onto an object,
`Articulate` moves a drawer, door or knob along its joint by grasping, hooking or pushing it.

Every action is a function of the current state, the task and the strategy, without hidden timers or counters, so that a
policy without memory can imitate it: paths are flows in space (`funnel`), and a phase ends when the state says so.

    python -m common.demonstrator --task libero_goal/0 --episodes 50 --out DIR
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.lib.stride_tricks import sliding_window_view

from common.cli import UserError, atomic_path, cache_dir, run_command
from common.data import Episode, Recorder, read_episodes, write_episodes
from common.env import NO_OP, make_env, predicate_holds
from common.tasks import Predicate, Task, load_task

UP = np.array([0.0, 0.0, 1.0])
OPEN, CLOSE = -1.0, 1.0
SPEED, TURN_SPEED = 0.9, 0.7  # largest action without noise (full scale is 0.3 m/s)
GAIN, TURN_GAIN = 1.3, 1.0  # of the remaining way, what is sent as the next displacement
# The hand, in the frame of its grip site: x is the axis along which the fingers move, z points out of the palm (m).
PAD_HALF_GAP, FINGER_OUTER, FINGER_HALF_WIDTH, PAD_REACH = 0.036, 0.058, 0.010, 0.009
HAND_HALF_LENGTH, HAND_HALF_WIDTH, HAND_HEIGHT = 0.104, 0.030, 0.040
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

    def height_map(points):
        heights = np.full(size, -np.inf)
        cells = ((points[:, :2] - low) / CELL).astype(int)
        inside = ((cells >= 0) & (cells < size) & (points[:, :2] >= low)).all(1)
        np.maximum.at(heights, tuple(cells[inside].T), -points[inside, 2])
        return heights

    def windows(heights, x, y):  # (shape[0], shape[1], 2x+1, 2y+1) around each cell of the target's footprint
        view = sliding_window_view(heights, (2 * x + 1, 2 * y + 1))
        return view[margin - x : margin - x + shape[0], margin - y : margin - y + shape[1]]

    thing, everything = height_map(local), height_map(scene @ rotation)
    gap, outer, half_width = int(PAD_HALF_GAP / CELL), int(FINGER_OUTER / CELL), int(FINGER_HALF_WIDTH / CELL)
    between = windows(thing, gap, 2).max(-1)  # the profile along the finger axis
    top = between[..., gap - 3 : gap + 4].max(-1)
    tip = np.maximum(top - depth, floor)  # height of the fingertips
    material = between > (tip + 0.003)[..., None]
    offsets = np.arange(-gap, gap + 1) * CELL
    first = np.where(material, offsets, np.inf).min(-1)
    last = np.where(material, offsets, -np.inf).max(-1)
    column = windows(everything, outer, half_width).max(-1)
    fingers = np.maximum(column[..., : outer - gap].max(-1), column[..., outer + gap + 1 :].max(-1))
    hand = windows(everything, int(HAND_HALF_LENGTH / CELL), int(HAND_HALF_WIDTH / CELL)).max((-1, -2))
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


def top_grasps(task: Task, data: mujoco.MjData, obj, only: str | None = None) -> dict[str, Grasp]:
    """Ways to take an object from above: by the rim on one of its sides, or across its middle, by name.

    A way that keeps clear of everything is preferred; failing that, one that pushes other movable objects aside.
    """
    points = world_points(data, surface_points(task.model, obj.geoms))
    bottom, centre = points[:, 2].min(), 0.5 * (points.min(0) + points.max(0))
    reach = 0.5 * (points.max(0) - points.min(0))[:2].min()
    others = [o.body for o in task.objects.values() if not o.fixture and o is not obj]
    scenes = [nearby_points(task, data, data.xpos[obj.body], ignore) for ignore in ((), others)]
    found: dict[str, Grasp] = {}
    for angle in (0, 90, 45, 135):
        finger = np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle)), 0.0])
        home = finger if angle > 0 else -finger  # of the two ways to hold, the one that turns the wrist by 90 degrees or less
        names = {name: float(side @ finger) for name, side in SIDES.items() if abs(side @ finger) > 0.99}
        names[f"across {angle}"] = 0.0
        for scene in scenes if only is None or only in names else ():
            if not (missing := [n for n in names if n not in found and only in (None, n)]):
                break
            for g in find_grasps(points, scene, hand_rotation(home, -UP), 0.022, bottom + 0.004):
                offset = (g.position - centre)[:2]
                along, across = float(offset @ finger[:2]), float(offset @ (finger[1], -finger[0]))
                g.cost = abs(across) + 0.2 * g.width
                for name in missing:
                    rim = along * names[name] > 0.6 * reach and g.width < 0.03 if names[name] else abs(along) < 0.012
                    if rim and abs(across) < 0.02 and (name not in found or g.cost < found[name].cost):
                        found[name] = g
    return found


class PickPlace:
    """Take a free object and bring it to where a predicate (on, in) wants it."""

    REACH, CARRY = (0.08, 0.04), (0.10, 0.05)  # the last part is vertical: its height, and how far off it begins

    def __init__(self, task: Task, predicate: Predicate, factors: dict[str, str]):
        self.task, self.predicate = task, predicate
        self.object = next(o for o in task.objects.values() if o.body == predicate.body)
        self.factors, self.path = factors, detour(factors["path"], UP)
        self.grasp: Grasp | None = None

    @staticmethod
    def holds(task: Task, predicate: Predicate, data: mujoco.MjData) -> dict[str, Grasp]:
        """The ways to take hold that can be planned from a state, by name."""
        return top_grasps(task, data, next(o for o in task.objects.values() if o.body == predicate.body))

    @classmethod
    def repertoire(cls, task: Task, predicate: Predicate, data: mujoco.MjData, holds: dict[str, Grasp]) -> list[PickPlace]:
        """A skill, planned from a state, for every combination of a way to take hold and a path."""
        names = [n for n in SIDES if n in holds][:4] or list(holds)[:4]
        skills = [cls(task, predicate, {"grasp": name, "path": path}) for name in names for path in paths_to(UP)]
        for skill in skills:
            skill.plan(data, holds)
        return skills

    def plan(self, data: mujoco.MjData, found: dict[str, Grasp] | None = None) -> None:
        found = found or top_grasps(self.task, data, self.object, self.factors["grasp"])
        name = self.factors["grasp"]
        if name not in found and name in SIDES:  # a little to the side of it, as a person would
            found = top_grasps(self.task, data, self.object)
            name = max((n for n in found if n in SIDES and SIDES[n] @ SIDES[name] > 0.7), default=name)
        if name not in found:
            raise PlanError(f"no grasp {name!r} of {self.object.name}")
        self.grasp = found[name]
        origin, turn = data.xpos[self.object.body], data.xmat[self.object.body].reshape(3, 3)
        self.offset = turn.T @ (self.grasp.position - origin)  # in the object's frame
        points = world_points(data, surface_points(self.task.model, self.object.geoms))
        self.bottom = points[:, 2].min() - origin[2]

    def preview(self, data: mujoco.MjData) -> list[np.ndarray]:
        """The hand's way to the object, and with it to the target."""
        grasp, place = self.grasp.position, self.target(data)
        origin = data.xpos[self.object.body]
        reach = grasp + follow(data.site_xpos[self.task.eef_site] - grasp, UP, self.path, *self.REACH)
        carry = grasp + place - origin + follow(origin - place, UP, self.path, *self.CARRY)
        return [reach, carry]

    def target(self, data: mujoco.MjData) -> np.ndarray:
        """Where the object's origin has to go."""
        p = self.predicate
        place = (data.xpos[p.target_body] if p.kind == "ontop" else data.site_xpos[p.site]).copy()
        place[2] -= self.bottom - (0.005 if p.kind == "ontop" else 0.0)
        return place

    def __call__(self, data: mujoco.MjData, hand: Hand) -> tuple[np.ndarray, np.ndarray, float]:
        """For the state: displacement of the hand (3,) m, rotation (3, 3) that it should have, gripper command."""
        if self.grasp is None:
            self.plan(data)
        body = self.object.body
        origin = data.xpos[body]
        grip = hand.position - origin - data.xmat[body].reshape(3, 3) @ self.offset  # grip site minus grasp
        miss = math.sqrt(grip @ grip)
        place = origin - self.target(data)
        if place[0] * place[0] + place[1] * place[1] < 0.012**2 and place[2] < 0.012:  # placed: let go, and rise
            return (0.05 * UP if hand.opening > self.grasp.width + 0.02 else 0.0 * UP), self.grasp.rotation, OPEN
        phase = grip_phase(miss, hand, self.grasp.width)
        if phase == "held":
            return come_in(place, UP, self.path, *self.CARRY), self.grasp.rotation, CLOSE
        if phase == "closing":
            return -grip, self.grasp.rotation, CLOSE
        flow = come_in(grip, UP, self.path, *self.REACH, readiness(hand, self.grasp.rotation))
        return flow, self.grasp.rotation, OPEN


@dataclasses.dataclass
class Contact:
    """How the hand acts on a drawer, door or knob: a pose of the grip site in the world when planned, and what it does there."""

    position: np.ndarray  # (3,)
    rotation: np.ndarray  # (3, 3)
    out: np.ndarray  # (3,) direction from which the hand comes
    width: float | None  # of what the fingers close on (m); None: push with closed fingers


def joint_motion(model: mujoco.MjModel, data: mujoco.MjData, joint: int, point: np.ndarray) -> np.ndarray:
    """(3,) velocity of a point of the joint's body per unit of joint velocity."""
    if model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_SLIDE:
        return data.xaxis[joint].copy()
    return np.cross(data.xaxis[joint], point - data.xanchor[joint])


def contacts(task: Task, data: mujoco.MjData, joint: int, sign: float) -> dict[str, Contact]:
    """Ways to move a joint in the direction of `sign`, by name."""
    model = task.model
    link = model.jnt_bodyid[joint]
    solid = (model.geom_contype | model.geom_conaffinity).astype(bool)
    points = world_points(data, surface_points(model, np.flatnonzero((model.geom_bodyid == link) & solid)))
    scene = nearby_points(task, data, points.mean(0))
    if model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_SLIDE:
        front = data.xaxis[joint] * np.sign(model.jnt_range[joint].sum())
        if sign * float(front @ data.xaxis[joint]) > 0:
            return drawer_grasps(points, scene, front)
        return drawer_pushes(points, front)
    if np.linalg.norm((points - data.xanchor[joint])[:, :2], axis=1).max() > 0.1:
        return door_pushes(points, data.xanchor[joint], sign * data.xaxis[joint])
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
        address = predicate.qpos[0]
        self.joint = int(np.flatnonzero(task.model.jnt_qposadr == address)[0])
        self.slide = task.model.jnt_type[self.joint] == mujoco.mjtJoint.mjJNT_SLIDE
        self.contact: Contact | None = None

    @staticmethod
    def holds(task: Task, predicate: Predicate, data: mujoco.MjData) -> dict[str, Contact]:
        """The ways to act on the joint that can be planned from a state, by name."""
        joint = int(np.flatnonzero(task.model.jnt_qposadr == predicate.qpos[0])[0])
        return contacts(task, data, joint, predicate.sign)

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

    def preview(self, data: mujoco.MjData) -> list[np.ndarray]:
        """The hand's way to the contact, and the first centimetres with it."""
        c = self.contact
        reach = c.position + follow(data.site_xpos[self.task.eef_site] - c.position, c.out, self.path, *self.REACH)
        motion = self.predicate.sign * joint_motion(self.task.model, data, self.joint, c.position)
        return [reach, c.position + np.linspace(0.0, 0.15, 8)[:, None] * motion]

    def __call__(self, data: mujoco.MjData, hand: Hand) -> tuple[np.ndarray, np.ndarray, float]:
        if self.contact is None:
            self.plan(data)
        c = self.contact
        moved = float(data.qpos[self.predicate.qpos[0]]) - self.start
        axis, anchor = data.xaxis[self.joint], data.xanchor[self.joint]
        if self.slide:
            position, rotation = c.position + moved * axis, c.rotation
            motion = self.predicate.sign * axis
        else:
            turn = axis_rotation(axis, moved)
            position, rotation = anchor + turn @ (c.position - anchor), turn @ c.rotation
            motion = self.predicate.sign * np.cross(axis, position - anchor)
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


# ---------------------------------------------------------------------------------------------- strategies


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way of doing a task: its name, and the choices it is made of."""

    name: str
    factors: dict[str, str]


MAX_STRATEGIES = 8
REHEARSALS = 6  # training states on which a strategy may fail once
_strategies: dict[tuple[str, str], list[Strategy]] = {}


def strategies(task: Task) -> list[Strategy]:
    """The repertoire of a task: up to 8 ways that work and differ visibly. Found once, then kept in the user's cache folder.

    Of all combinations of choices that can be planned, those are taken whose imagined paths lie farthest apart; each is
    rehearsed on a few training states, and replaced if it fails. Raises UserError if nothing works.
    """
    key = (task.id, task.assets)
    if key not in _strategies:
        path = _cache_file(task, "strategies", "json")
        try:
            rows = json.loads(path.read_text())
        except (OSError, ValueError):
            rows = _rehearse(task)
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(rows, indent=1))
        _strategies[key] = [Strategy(", ".join(f"{k} {v}" for k, v in factors.items()), factors) for factors in rows]
    return _strategies[key]


def _cache_file(task: Task, kind: str, suffix: str, *details) -> Path:
    """Where something about a task is kept: the key covers the task, MuJoCo's version, the assets, this file and `details`."""
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    key = hashlib.sha256(repr((mujoco.__version__, task.assets, source, details)).encode()).hexdigest()[:12]
    return cache_dir() / "demos" / f"{task.suite}-{task.index:02d}-{kind}-{key}.{suffix}"


def _rehearse(task: Task) -> list[dict[str, str]]:
    """The factors of the strategies that `strategies` describes."""
    if unknown := [p.name for p in task.goal if p.name not in SKILLS]:
        raise UserError(f"{task.id}: the scripted demonstrator has no skill for the goal {unknown[0]!r}")
    env = make_env(task, 8)
    env.reset(seed=0)
    main = next((p for p in task.goal if SKILLS[p.name] is PickPlace), task.goal[0])
    holds = [SKILLS[main.name].holds(task, main, data) for data in env.data]
    common = {name: hold for name, hold in holds[0].items() if sum(name in others for others in holds) >= 5}
    skills = SKILLS[main.name].repertoire(task, main, env.data[0], common)
    features = np.array([_features(skill, env.data[0]) for skill in skills])
    env.close()
    distance = np.linalg.norm(features[:, None] - features[None], axis=-1)
    passed: set[int] = set()
    failed: set[int] = set()
    stumbled: set[int] = set()
    while len(skills) > len(failed):
        pool = [c for c in range(len(skills)) if c not in failed]
        chosen = sorted(passed)
        while len(chosen) < min(MAX_STRATEGIES, len(pool)):  # the farthest from those chosen so far
            rest = [c for c in pool if c not in chosen]
            chosen.append(max(rest, key=lambda c: distance[c, chosen].min() if chosen else distance[c, pool].sum()))
        if set(chosen) == passed:
            break
        new = [c for c in chosen if c not in passed]
        queue = [Attempt(c, Strategy("", skills[c].factors), [k, 1], None) for k in range(REHEARSALS) for c in new]

        def next_attempt(queue=queue):
            while queue and queue[0].key in failed:
                queue.pop(0)
            return queue.pop(0) if queue else None

        for c, episode in perform(task, next_attempt, 0.1, 16, task.max_steps // 2):
            if not episode.success:
                (failed if c in stumbled else stumbled).add(c)
        passed |= set(new) - failed
        for hold in {_hold(skills[c]) for c in failed}:  # two failures and no success: this way of taking hold is no good
            same = {c for c in range(len(skills)) if _hold(skills[c]) == hold}
            if len(same & failed) > 1 and not same & passed:
                failed |= same
    if not passed:
        raise UserError(f"{task.id}: the scripted demonstrator finds no way that works")
    return [skills[c].factors for c in sorted(passed)]


def _hold(skill) -> str:
    return next(iter(skill.factors.values()))


def _features(skill, data: mujoco.MjData) -> np.ndarray:
    """(n,) numbers whose distances say how different two ways of doing a task look: the hand's positions, and how it is turned."""
    parts = [p[np.linspace(0, len(p) - 1, 12).astype(int)].ravel() for p in skill.preview(data)]
    hold = skill.grasp if isinstance(skill, PickPlace) else skill.contact
    return np.concatenate([*parts, 0.3 * hold.rotation[:, :2].ravel()])


class Demonstrator:
    """Does a task with one strategy, a control step at a time.

    Args:
        noise: standard deviation of the Gaussian noise on the first six numbers of each action.
        rng: numpy generator of the noise.
    """

    def __init__(self, task: Task, strategy: Strategy, noise: float = 0.1, rng: np.random.Generator | None = None):
        self.task, self.strategy, self.noise = task, strategy, noise
        self.rng = rng or np.random.default_rng()
        self.skills = [SKILLS[p.name](task, p, strategy.factors) for p in task.goal]
        self.failed = False  # set when no plan was found, or the hand is stuck
        self._trail: list[np.ndarray] = []

    def done(self, data: mujoco.MjData) -> bool:
        return all(predicate_holds(p, data, self.task.model) for p in self.task.goal)

    def act(self, data: mujoco.MjData) -> np.ndarray:
        """(7,) action in [-1, 1] for the state in `data`, whose poses are up to date; the gripper is -1 or 1."""
        position, rotation = data.site_xpos[self.task.eef_site], data.site_xmat[self.task.eef_site].reshape(3, 3)
        (left, right), (left_speed, right_speed) = data.qpos[self.task.gripper_qpos], data.qvel[self.task.gripper_dof]
        hand = Hand(position, rotation, float(left - right), float(right_speed - left_speed))
        try:
            flow, turn, gripper = self.skills[0](data, hand)
        except PlanError:
            self.failed = True
            return NO_OP.copy()
        self._trail.append(position.copy())
        if len(self._trail) % 30 == 0:  # giving up is the only thing that looks back
            self.failed = bool(np.ptp(self._trail[-30:], axis=0).max() < 0.01)
        action = self.noise * self.rng.standard_normal(7)
        flow *= GAIN / 0.05
        action[:3] += flow * (SPEED / max(SPEED, np.abs(flow).max()))
        twist = rotation_vector(turn @ rotation.T) * (TURN_GAIN / 0.5)
        action[3:6] += twist * (TURN_SPEED / max(TURN_SPEED, np.abs(twist).max()))
        np.clip(action, -1.0, 1.0, out=action)
        action[6] = gripper
        return action


# ---------------------------------------------------------------------------------------------- collecting


@dataclasses.dataclass
class Attempt:
    """One try: who asked for it, with which strategy, its random seed, and its official init state (None: a training state)."""

    key: Any
    strategy: Strategy
    seed: list[int]
    init_state: int | None


def perform(
    task: Task, next_attempt: Callable[[], Attempt | None], noise: float, num_envs: int, max_steps: int | None = None
) -> Iterator[tuple[Any, Episode]]:
    """Make the attempts that `next_attempt` hands out (None: no more for now), `num_envs` at a time; yields (key, episode).

    An attempt ends at success, after `max_steps` (default: the task's), or when its demonstrator gives up.
    """
    env = make_env(task, num_envs, autoreset_mode=AutoresetMode.DISABLED, max_steps=max_steps)
    recorder = Recorder(env)
    running: dict[int, tuple[Attempt, Demonstrator]] = {}

    def launch() -> None:
        for i in range(num_envs):
            if i not in running and (attempt := next_attempt()) is not None:
                rng = np.random.default_rng(attempt.seed)
                options = {"reset_mask": np.arange(num_envs) == i}
                if attempt.init_state is not None:
                    options["init_state"] = attempt.init_state
                env.reset(seed=int(rng.integers(2**31)), options=options)
                running[i] = attempt, Demonstrator(task, attempt.strategy, noise, rng)

    launch()
    while running:
        actions = np.tile(NO_OP, (num_envs, 1))
        for i, (_, demonstrator) in running.items():
            actions[i] = demonstrator.act(env.data[i])
        recorder.before()
        _, _, terminated, truncated, _ = env.step(actions)
        for i in range(num_envs):  # what idle environments record is cut off and dropped
            truncated[i] |= i not in running or running[i][1].failed
        for i, episode in recorder.after(actions, terminated & [i in running for i in range(num_envs)], truncated):
            if i in running:
                yield running.pop(i)[0].key, episode
        launch()
    env.close()


def collect(
    task: Task,
    num_episodes: int,
    seed: int = 0,
    noise: float = 0.1,
    num_envs: int = 16,
    strategy: int | None = None,
    keep_failures: bool = False,
    init_states: Sequence[int] | None = None,
    progress: bool = True,
) -> list[Episode]:
    """Let the demonstrator do a task until there are `num_episodes` successful episodes, equally many of each strategy.

    The k-th attempt with a strategy depends on (seed, strategy, k) alone, and the first successful ones are taken, so the
    result depends neither on `num_envs` nor on the machine's speed.

    Args:
        noise: standard deviation of the action noise.
        strategy: index of the only strategy to use; default all.
        keep_failures: take the first attempts, successful or not.
        init_states: official init states; the k-th attempt starts from the k-th, cyclically. Default: training states.

    Returns episodes in the order (round, strategy). Their attrs: strategy (name), strategy_index, init_state (-1 for a
    training state), seed, attempt, noise, source.
    Raises UserError if a strategy hardly ever succeeds.
    """
    from tqdm import tqdm

    repertoire = strategies(task)
    chosen = list(range(len(repertoire))) if strategy is None else [strategy]
    quota = {s: num_episodes // len(chosen) + (i < num_episodes % len(chosen)) for i, s in enumerate(chosen)}
    results: dict[int, dict[int, Episode | None]] = {s: {} for s in chosen}  # attempt -> episode, None if it failed
    launched = dict.fromkeys(chosen, 0)

    def taken(s: int) -> list[Episode]:
        return [e for _, e in sorted(results[s].items()) if e is not None][: quota[s]]

    def next_attempt() -> Attempt | None:
        """Of the strategy that is furthest from its quota, counting what is under way."""
        missing = {s: quota[s] - len(taken(s)) - (launched[s] - len(results[s])) for s in chosen}
        s = max(chosen, key=missing.get)
        if missing[s] <= 0:
            return None
        k = launched[s]
        if len(results[s]) >= 20 and len(taken(s)) < 0.2 * len(results[s]):
            name = repertoire[s].name
            raise UserError(f"{task.id}: strategy {name!r} succeeded {len(taken(s))} times in {len(results[s])}")
        launched[s] += 1
        return Attempt((s, k), repertoire[s], [seed, s, k], None if init_states is None else int(init_states[k % len(init_states)]))

    with tqdm(total=num_episodes, desc=f"demonstrations of {task.id}", disable=None if progress else True) as bar:
        for (s, k), episode in perform(task, next_attempt, noise, min(num_envs, num_episodes)):
            start = -1 if init_states is None else int(init_states[k % len(init_states)])
            episode.attrs.update(strategy=repertoire[s].name, strategy_index=s, init_state=start, seed=seed, attempt=k)
            episode.attrs.update(noise=noise, source="scripted")
            results[s][k] = episode if episode.success or keep_failures else None
            bar.update(sum(len(taken(s)) for s in chosen) - bar.n)
    rounds = [[(k, s, e) for k, e in enumerate(taken(s))] for s in chosen]
    return [e for _, _, e in heapq.merge(*rounds, key=lambda row: row[:2])]


def load_or_collect(task: Task, num_episodes: int, seed: int = 0, noise: float = 0.1, progress: bool = True) -> list[Episode]:
    """`collect`, kept in LIBERO's HDF5 layout in the user's cache folder."""
    path = _cache_file(task, "episodes", "hdf5", num_episodes, seed, noise)
    if path.exists():
        try:
            return read_episodes(path, task)
        except UserError as error:
            logging.getLogger(__name__).warning("%s: collecting again", error)
    episodes = collect(task, num_episodes, seed, noise, progress=progress)
    write_demonstrations(path, task, episodes)
    return episodes


def write_demonstrations(path: str | os.PathLike, task: Task, episodes: list[Episode]) -> None:
    attrs = {"script": "common.demonstrator", "mujoco": mujoco.__version__, "assets": task.assets}
    write_episodes(path, episodes, task, attrs)


# ---------------------------------------------------------------------------------------------- command


@dataclasses.dataclass
class Args:
    """Write scripted demonstrations of a task in LIBERO's HDF5 layout: OUT/<suite>/<task name>_demo.hdf5."""

    task: str
    """task id: suite/index, suite/name, or any part of a name that is unique"""
    out: Path
    """folder to write to"""
    episodes: int = 50
    """successful episodes to collect"""
    noise: float = 0.1
    """standard deviation of the action noise"""
    seed: int = 0
    num_envs: int = 16
    assets: str | None = None
    """LIBERO's asset folder (default: $LIBERO_ASSETS, else LIBERO's own)"""


def main() -> None:
    import tyro

    args = tyro.cli(Args)
    task = load_task(args.task, args.assets)
    if args.episodes < 1 or args.num_envs < 1 or args.noise < 0:
        raise UserError("--episodes and --num-envs must be at least 1, --noise at least 0")
    path = args.out / task.suite / f"{task.name}_demo.hdf5"
    episodes = collect(task, args.episodes, args.seed, args.noise, args.num_envs)
    write_demonstrations(path, task, episodes)
    for s in strategies(task):
        lengths = [e.length for e in episodes if e.attrs["strategy"] == s.name]
        print(f"{s.name}: {len(lengths)} episodes" + (f" of {np.mean(lengths):.0f} steps" if lengths else ""))
    print(path)


if __name__ == "__main__":
    run_command(main)
