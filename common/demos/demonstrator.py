"""The demonstrator: one way of doing one task, a control step at a time.

It reads the privileged state and sends the 7-D actions that a person would have sent. Nothing in it is written for one task. The
goal's predicates name what has to happen (`agenda`); the collision geometry of the scene says where the hand can take hold
(`common.demos.grasps`); and two skills do it: `PickPlace` moves a free object to a region or onto an object, `Articulate` moves a
drawer, door or knob along its joint by grasping, hooking or pushing it.

Every action is a function of the current state, the task and the strategy, without hidden timers or counters, so that a policy
without memory can imitate it: paths are flows in space (`common.demos.motion`), and a phase ends when the state says so.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import mujoco
import numpy as np

from common.demos.articulate import Articulate
from common.demos.geometry import UP, joint_at, rotation_vector
from common.demos.motion import GAIN, OPEN, SPEED, TURN_GAIN, TURN_SPEED, Hand, PlanError, ramp
from common.demos.pick_place import PickPlace
from common.libero import Task
from common.libero.goals import predicate_holds, touching_geoms
from common.libero.step import NO_OP
from common.libero.tasks import Predicate


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way of doing a task: its name, and the choices it is made of."""

    name: str
    factors: dict[str, str]


STRETCHED = -0.65, -0.45  # rad of the elbow (its range ends at -0.07): where stretching the arm begins to be avoided, and is
PATIENCE = 20  # control steps that a demonstrator waits for things to come to rest
SKILLS = {
    "on": PickPlace,
    "in": PickPlace,
    "open": Articulate,
    "close": Articulate,
    "turnon": Articulate,
    "turnoff": Articulate,
}


@dataclasses.dataclass
class Step:
    """One thing that has to be done, and how."""

    predicate: Predicate
    skill: Any


def agenda(task: Task, data: mujoco.MjData) -> list[Predicate]:
    """What has to be done in the state in `data`, in the order of need: the goal's predicates, and the opening of what is closed.

    Close what gets in the way, open, turn knobs, move things (what carries others first), and close what things were put in.
    """
    adr = task.model.jnt_qposadr
    carried = {s.site: s.joints or (task.objects[s.parent].joints if s.parent else ()) for s in task.sites.values()}
    joints = {site: tuple(int(adr[j]) for j in ids) for site, ids in carried.items()}
    moves = [p for p in task.goal if p.body >= 0]
    filled = {q for p in moves if p.kind == "contain" for q in joints.get(p.site, ())}
    steps: list[Predicate] = []
    opened = {q for p in task.goal if p.name == "open" for q in p.qpos}
    for p in moves:
        for q in joints.get(p.site, ()) if p.kind == "contain" else ():
            span = task.model.jnt_range[joint_at(task.model, q)]
            wide = float(span[np.abs(span).argmax()])
            if q not in opened and data.qpos[q] / wide < 0.5:
                steps.append(Predicate("open", p.args[1:], "joint", qpos=(q,), sign=float(np.sign(wide)), threshold=0.88 * wide, any=True))
                opened.add(q)

    steps += [p for p in task.goal if p.kind != "joint" or not predicate_holds(p, data, task.model) or opened & set(p.qpos)]

    def rank(p: Predicate) -> float:
        if p.body >= 0:
            return 3.0 + any(p.target_body == q.body for q in moves)
        if p.name == "close":
            return 5.0 if filled & set(p.qpos) else 0.0
        return 1.0 if p.name == "open" else 2.0

    return sorted(steps, key=rank) or list(task.goal)


def unsettled(task: Task, data: mujoco.MjData) -> bool:
    """Whether things are still falling: some of LIBERO's start high up in the air, or are thrown up out of the table."""
    model = task.model
    free = [o.body for o in task.objects.values() if o.joint_qpos is not None]
    touching = model.body_rootid[
        model.geom_bodyid[touching_geoms(data, model)]
    ]  # at the top of its flight a thing is slow, but touches nothing
    speeds = [np.linalg.norm(data.qvel[model.body_dofadr[body] :][:3]) for body in free]
    return max(speeds, default=0.0) > 0.3 or not np.isin(free, touching).all()


class Demonstrator:
    """Does a task with one strategy, a control step at a time.

    Args:
        noise: standard deviation of the Gaussian noise on the first six numbers of each action.
        rng: numpy generator of the noise.
    """

    def __init__(self, task: Task, strategy: Strategy, noise: float = 0.1, rng: np.random.Generator | None = None):
        self.task, self.strategy, self.noise = task, strategy, noise
        self.rng = rng or np.random.default_rng()
        self.steps: list[Step] = []  # what has to be done, known from the first state on
        self.stage = 0  # the step that is under way
        self.waited = 0  # control steps
        self.failed = False  # set when no plan was found, or the hand is stuck
        self._trail: list[np.ndarray] = []
        self._arm = [joint_at(task.model, address) for address in task.arm_qpos]

    def _within_reach(self, flow: np.ndarray, twist: np.ndarray, data: mujoco.MjData) -> tuple[np.ndarray, np.ndarray]:
        """A displacement and a turn that do not stretch the arm out: it could not be bent again.

        With a straight elbow the controller's torques for a turn overcome those for a displacement, and hold the elbow at its stop.
        What has to be taken or pulled near the limit is better reached than avoided, so this is for ways that lead that far out by
        their nature, and for a hand that an earlier step has left far out and that still has to turn.
        """
        stretched = ramp(data.qpos[self.task.arm_qpos[3]], *STRETCHED) if self.steps else 0.0
        if stretched and not self.steps[self.stage].skill.far_out:
            stretched *= ramp(math.sqrt(twist @ twist), 0.2, 0.5) if self.stage else 0.0
        if stretched == 0.0:
            return flow, twist
        outward = data.xanchor[self._arm[5]] - data.xanchor[self._arm[1]]  # from the shoulder to the wrist
        outward /= math.sqrt(outward @ outward)
        return flow - stretched * (max(0.0, flow @ outward) + 0.02) * outward, twist * (1.0 - stretched)

    def _begin(self, data: mujoco.MjData) -> None:
        predicates = agenda(self.task, data)
        for i, p in enumerate(predicates):
            prefix = "" if len(predicates) == 1 else f"step {i + 1} "
            factors = {k.removeprefix(prefix): v for k, v in self.strategy.factors.items() if k.startswith(prefix)}
            self.steps.append(Step(p, SKILLS[p.name](self.task, p, factors)))

    def _command(self, data: mujoco.MjData, hand: Hand) -> tuple[np.ndarray, np.ndarray, float]:
        """The displacement, rotation and gripper command of the step that is under way; steps that are done are left behind."""
        if not self.steps:
            self.waited += 1
            if self.waited < PATIENCE and unsettled(self.task, data):
                return 0.0 * UP, hand.rotation, OPEN
            self._begin(data)
        if len(self.steps) == 1:
            return self.steps[0].skill(data, hand)
        for _ in range(len(self.steps) + 1):
            predicate, skill = self.steps[self.stage].predicate, self.steps[self.stage].skill
            if not predicate_holds(predicate, data, self.task.model) or skill.holding(data, hand):
                return skill(data, hand)
            if (command := skill.leave(data, hand)) is not None:
                return command
            later = (self.stage + 1) % len(self.steps)
            if later == 0:  # all is done, but for what has come undone meanwhile
                goal = [k for k, step in enumerate(self.steps) if step.predicate in self.task.goal]
                later = next((k for k in goal if not predicate_holds(self.steps[k].predicate, data, self.task.model)), self.stage)
            if later == self.stage:
                break
            self.stage = later
        return 0.02 * UP, hand.rotation, OPEN

    def act(self, data: mujoco.MjData) -> np.ndarray:
        """(7,) action in [-1, 1] for the state in `data`, whose poses are up to date; the gripper is -1 or 1."""
        position, rotation = data.site_xpos[self.task.eef_site], data.site_xmat[self.task.eef_site].reshape(3, 3)
        (left, right), (left_speed, right_speed) = data.qpos[self.task.gripper_qpos], data.qvel[self.task.gripper_dof]
        hand = Hand(position, rotation, float(left - right), float(right_speed - left_speed))
        try:
            flow, turn, gripper = self._command(data, hand)
        except PlanError:
            self.failed = True
            return NO_OP.copy()
        self._trail.append(np.concatenate([position, 0.05 * rotation[:, :2].ravel()]))  # a hand that turns a knob is not stuck
        if len(self._trail) % 30 == 0:  # giving up is the only thing that looks back
            self.failed = bool(np.ptp(self._trail[-30:], axis=0).max() < 0.01)
        action = self.noise * self.rng.standard_normal(7)
        flow, twist = self._within_reach(flow, rotation_vector(turn @ rotation.T), data)
        flow *= GAIN / 0.05
        action[:3] += flow * (SPEED / max(SPEED, np.abs(flow).max()))
        twist = twist * (TURN_GAIN / 0.5)
        action[3:6] += twist * (TURN_SPEED / max(TURN_SPEED, np.abs(twist).max()))
        np.clip(action, -1.0, 1.0, out=action)
        action[6] = gripper
        return action
