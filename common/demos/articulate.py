"""The skill that moves a drawer, door or knob along its joint (open, close, turnon, turnoff), and the contacts that do it.

A contact is found in the geometry of what the joint moves: a handle to grasp, a front or an edge to push, a knob to twist.
"""

from __future__ import annotations

import dataclasses
import math

import mujoco
import numpy as np

from common.demos.geometry import UP, axis_rotation, hand_rotation, joint_at, nearby_points, surface_points, world_points
from common.demos.grasps import FINGER_HALF_WIDTH, PAD_REACH, find_grasps
from common.demos.motion import CLOSE, OPEN, Hand, PlanError, aligned, come_in, detour, follow, grip_phase, paths_to, ramp, readiness
from common.libero import Task
from common.libero.tasks import Predicate

PRESS, LEAD = 0.04, 0.03  # m that the hand is sent under a handle and ahead of it, to drag it along by friction
AJAR = 0.55  # rad by which a door is pulled open by its handle before it is pushed on from the inside


@dataclasses.dataclass
class Contact:
    """How the hand acts on a drawer, door or knob: a pose of the grip site in the world when planned, and what it does there."""

    position: np.ndarray  # (3,)
    rotation: np.ndarray  # (3, 3)
    out: np.ndarray  # (3,) direction from which the hand comes
    width: float | None  # of what the fingers close on (m); None: push with closed fingers
    press: float = 0.0  # how far under the position the hand is sent (m), to press down on what it moves


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
            return drawer_grasps(points, scene, front) | drawer_drags(points, front)
        return drawer_pushes(points, front)
    if np.linalg.norm((points - data.xanchor[joint])[:, :2], axis=1).max() > 0.1:
        inward = sign * float(model.jnt_range[joint].sum()) < 0  # toward the closed end of its range
        if inward:
            return door_pushes(points, data.xanchor[joint], sign * data.xaxis[joint])
        return door_grasps(points, scene, data.xanchor[joint], sign * data.xaxis[joint])
    return knob_turns(points, scene, data.xanchor[joint], sign)


def drawer_handle(points: np.ndarray, front: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a drawer that opens toward `front`: the direction to the left as one looks out of it, the points of its handle, and its middle."""
    handle = points[points @ front > (points @ front).max() - 0.018]
    return np.cross(front, UP), handle, 0.5 * (handle.min(0) + handle.max(0))


def drawer_grasps(points: np.ndarray, scene: np.ndarray, front: np.ndarray) -> dict[str, Contact]:
    """Take the handle between a finger above and one below, at one of its ends or in the middle."""
    bar, handle, middle = drawer_handle(points, front)
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


def drawer_drags(points: np.ndarray, front: np.ndarray) -> dict[str, Contact]:
    """Press closed fingers on the handle from above and drag it out: where the table leaves no room for a hand around it."""
    bar, handle, top = drawer_handle(points, front)
    top[2] = handle[:, 2].max()
    found = {}
    approach, lower = -math.sqrt(0.5) * (front + UP), math.sqrt(0.5) * (front - UP)
    for end, place in (("left end", 0.02), ("right end", -0.02), ("middle", 0.0)):
        position = top + bar * place - PAD_REACH * approach - FINGER_HALF_WIDTH * lower  # the lower edge of the fingertips touches
        found[f"drag {end}"] = Contact(position, hand_rotation(bar, approach), -approach, None, PRESS)
    return found


def drawer_pushes(points: np.ndarray, front: np.ndarray) -> dict[str, Contact]:
    """Push the front of a drawer with closed fingers."""
    bar, _, middle = drawer_handle(points, front)
    face = (points @ front).max()
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
        """Names of ways to act that are worth trying: a drawer is dragged only where the hand doesn't fit around its handle."""
        return [name for name, contact in holds.items() if not contact.press] or list(holds)

    @classmethod
    def repertoire(cls, task: Task, predicate: Predicate, data: mujoco.MjData, holds: dict[str, Contact]) -> list[Articulate]:
        """A skill, planned from a state, for every combination of a way to take hold and a path."""
        pairs = [(name, path) for name in cls.order(holds) for path in paths_to(holds[name].out)]
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
            if c.press and slack < 0.02 and abs(along) < 0.02:  # what goes along by friction must not be left behind
                return LEAD * direction - offset - c.press * UP, c.rotation, CLOSE
            if not c.press and slack < 0.02 and along > -0.03:
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
