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
import math

import mujoco
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from common.cli import UserError
from common.env import predicate_holds
from common.tasks import Predicate, Task

UP = np.array([0.0, 0.0, 1.0])
OPEN, CLOSE = -1.0, 1.0
SPEED = 0.9  # of the largest hand speed (0.3 m/s)
# The hand, in the frame of its grip site: x is the axis along which the fingers move, z points out of the palm (m).
PAD_HALF_GAP, FINGER_OUTER, FINGER_HALF_WIDTH, PAD_REACH = 0.036, 0.066, 0.012, 0.006
HAND_HALF_LENGTH, HAND_HALF_WIDTH, HAND_HEIGHT = 0.105, 0.034, 0.040
CELL = 0.004  # resolution of the height maps that grasps are searched in (m)


# ---------------------------------------------------------------------------------------------- geometry


def surface_points(model: mujoco.MjModel, geoms, spacing: float = CELL) -> list[tuple[int, np.ndarray]]:
    """Points on the surface of collision geoms: a list of (geom, (n, 3) points in the geom's frame).

    Meshes, cylinders and the like are taken as their bounding boxes: LIBERO's objects collide as boxes.
    """
    clouds = []
    for g in geoms:
        centre, half = model.geom_aabb[g, :3], np.minimum(model.geom_aabb[g, 3:], 0.4)
        axes = [np.linspace(-h, h, max(2, int(np.ceil(2 * h / spacing)) + 1)) for h in half]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        surface = (np.abs(np.abs(grid) - half) < 1e-9).any(1)
        clouds.append((int(g), centre + grid[surface]))
    return clouds


def world_points(data: mujoco.MjData, clouds) -> np.ndarray:
    """(n, 3) points of `surface_points` in the world frame."""
    return np.concatenate([data.geom_xpos[g] + points @ data.geom_xmat[g].reshape(3, 3).T for g, points in clouds])


def hand_rotation(finger: np.ndarray, approach: np.ndarray) -> np.ndarray:
    """Rotation matrix of the grip site whose fingers move along `finger` and whose palm looks along `approach`."""
    finger = finger - approach * (finger @ approach)
    finger = finger / np.linalg.norm(finger)
    return np.column_stack([finger, np.cross(approach, finger), approach])


def yaw_rotation(angle: float, turn: np.ndarray = np.eye(3)) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]) @ turn


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
    area: int  # cells of material between the pads


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
        grasps.append(Grasp(position, rotation, float(last[i, j] - first[i, j]), int(material[i, j].sum())))
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
    missing = length * ramp(distance, 0.0, width) - along
    return missing * axis - across * (1.0 - ramp(missing, 0.02, 0.10))


def come_down(offset: np.ndarray, path: Path, height: float, width: float) -> np.ndarray:
    """Displacement that leads to the goal from above, and to above the goal along `path`.

    Low and far from the goal, the flow rises before it goes sideways; the last `height` above the goal are vertical.
    """
    distance = math.sqrt(offset[0] * offset[0] + offset[1] * offset[1])
    rise = height * ramp(distance, 0.008, width)
    flow = funnel(offset - rise * UP, path.axis, path.length, path.width)
    slow = 1.0 - ramp(rise - offset[2], 0.02, 0.06)
    flow[:2] *= slow
    return flow


@dataclasses.dataclass(frozen=True)
class Path:
    """The side from which the hand, or what it carries, arrives."""

    axis: np.ndarray
    length: float
    width: float


PATHS = {
    "left": Path(np.array([0.0, 0.9, 0.436]), 0.18, 0.10),  # the robot's left is +y
    "right": Path(np.array([0.0, -0.9, 0.436]), 0.18, 0.10),
    "over": Path(UP, 0.22, 0.12),
    "direct": Path(UP, 0.02, 0.10),
}


# ---------------------------------------------------------------------------------------------- skills


class PickPlace:
    """Take a free object and bring it to where a predicate wants it."""

    def __init__(self, task: Task, predicate: Predicate, side: str, path: str):
        self.task, self.predicate = task, predicate
        self.object = next(o for o in task.objects.values() if o.body == predicate.body)
        self.side, self.path = side, PATHS[path]
        self.grasp = None

    def plan(self, data: mujoco.MjData) -> None:
        task, model = self.task, self.task.model
        points = world_points(data, surface_points(model, self.object.geoms))
        origin = data.xpos[self.object.body]
        side = np.array(SIDES[self.side])
        hand = data.site_xmat[task.eef_site].reshape(3, 3)
        finger = side if side @ hand[:, 0] > -0.1 else -side
        grasps = find_grasps(points, nearby_points(task, data, origin), hand_rotation(finger, -UP), 0.022, points[:, 2].min() + 0.002)
        across = np.cross(UP, side)
        centre = 0.5 * (points.min(0) + points.max(0))

        def cost(g):
            r = g.position - centre
            return abs(r @ across) + 0.2 * g.width + (0.5 if r @ side < 0.015 else 0.0)

        if not grasps:
            raise PlanError(f"no grasp of {self.object.name} from {self.side}")
        self.grasp = min(grasps, key=cost)
        turn = data.xmat[self.object.body].reshape(3, 3)
        self.offset = turn.T @ (self.grasp.position - origin)  # in the object's frame
        self.bottom = points[:, 2].min() - origin[2]

    def target(self, data: mujoco.MjData) -> np.ndarray:
        """Where the object's origin has to go."""
        p = self.predicate
        if p.kind == "ontop":
            place = data.xpos[p.target_body].copy()
            place[2] += 0.005 - self.bottom
            return place
        place = data.site_xpos[p.site].copy()
        place[2] += -self.bottom
        return place

    def __call__(self, data: mujoco.MjData, hand: np.ndarray, opening: float):
        if self.grasp is None:
            self.plan(data)
        body = self.object.body
        origin = data.xpos[body]
        grip = hand - origin - data.xmat[body].reshape(3, 3) @ self.offset  # grip site minus grasp
        miss = math.sqrt(grip @ grip)
        place = origin - self.target(data)
        placed = place[0] * place[0] + place[1] * place[1] < 0.012**2 and place[2] < 0.012
        if placed:
            return (UP * 0.05 if opening > self.grasp.width + 0.02 else np.zeros(3)), self.grasp.rotation, OPEN
        near = miss < 0.012 or (miss < 0.03 and opening < 0.070)
        if near and opening < self.grasp.width + 0.006:  # the fingers have stopped on the object
            return come_down(place, self.path, 0.10, 0.05), self.grasp.rotation, CLOSE
        if near:
            return -grip, self.grasp.rotation, CLOSE
        return come_down(grip, self.path, 0.08, 0.04), self.grasp.rotation, OPEN


SIDES = {"front": (1.0, 0.0, 0.0), "back": (-1.0, 0.0, 0.0), "left": (0.0, 1.0, 0.0), "right": (0.0, -1.0, 0.0)}


class PlanError(Exception):
    """No way was found to do a task with a strategy from a state."""


def nearby_points(task: Task, data: mujoco.MjData, centre: np.ndarray, radius: float = 0.3) -> np.ndarray:
    """Points of everything solid near `centre` but the robot."""
    model = task.model
    robot = model.body_rootid[model.site_bodyid[task.eef_site]]
    solid = (model.geom_contype | model.geom_conaffinity).astype(bool) & (model.body_rootid[model.geom_bodyid] != robot)
    size = model.geom_aabb[:, 3:].max(1)
    solid &= (model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE) & (size < 0.4)
    solid &= np.linalg.norm(data.geom_xpos - centre, axis=1) < radius + size
    return world_points(data, surface_points(model, np.flatnonzero(solid)))


class Demonstrator:
    def __init__(self, task: Task, strategy, noise: float, rng):
        self.task, self.strategy, self.noise, self.rng = task, strategy, noise, rng
        self.skills = [PickPlace(task, p, strategy[0], strategy[1]) for p in task.goal]
        self.done = self.failed = False

    def act(self, data: mujoco.MjData) -> np.ndarray:
        task = self.task
        hand = data.site_xpos[task.eef_site]
        rot = data.site_xmat[task.eef_site].reshape(3, 3)
        q = data.qpos
        opening = q[task.gripper_qpos[0]] - q[task.gripper_qpos[1]]
        flow, turn, grip = self.skills[0](data, hand, opening)
        action = np.empty(7)
        flow = flow * (1.3 / 0.05)
        speed = math.sqrt(flow @ flow)
        action[:3] = flow if speed < SPEED else flow * (SPEED / speed)
        twist = rotation_vector(turn @ rot.T) * 2.0
        speed = math.sqrt(twist @ twist)
        action[3:6] = twist if speed < 0.5 else twist * (0.5 / speed)
        action[:6] += self.noise * self.rng.standard_normal(6)
        np.clip(action, -1.0, 1.0, out=action)
        action[6] = grip
        return action
