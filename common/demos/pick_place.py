"""The skill that takes a free object and brings it to where a predicate (on, in) wants it.

It joins a grasp (`common.demos.grasps`), a place (`common.demos.places`) and the paths between them (`common.demos.motion`).
"""

from __future__ import annotations

import copy
import functools
import math

import mujoco
import numpy as np

from common.demos.geometry import UP, axis_rotation, nearby_points, surface_points, world_points
from common.demos.grasps import SIDES, Grasp, hand_points, inward_grasps, own_grasps, push_contact, push_grasps, top_grasps
from common.demos.motion import CLOSE, OPEN, PATHS, Hand, PlanError, aligned, come_in, detour, follow, grip_phase, paths_to, ramp, readiness
from common.demos.places import Place, closed_later, find_drop, find_slot
from common.libero import Task
from common.libero.tasks import Predicate


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
        contact = push_contact(origin, self.shape @ turn.T, way, press)
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
