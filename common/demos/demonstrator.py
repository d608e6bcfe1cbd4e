"""Scripted demonstrations of LIBERO tasks whose strategy is known.

A demonstrator reads the privileged state and sends the 7-D actions that a person would have sent. Nothing in it is written
for one task. The goal's predicates name what has to happen (`subgoals`); the collision geometry of the scene says where the
hand can take hold (`find_grasps`); and two skills do it: `PickPlace` moves a free object to a region or onto an object,
`Articulate` moves a drawer, door or knob along its joint by grasping, hooking or pushing it.

Every action is a function of the current state, the task and the strategy, without hidden timers or counters, so that a
policy without memory can imitate it: paths are flows in space (`funnel`), and a phase ends when the state says so.

    python -m common.demos --task libero_goal/0 --episodes 50 --out DIR
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode

from common.cli import UserError, atomic_path, cache_dir, run_command
from common.data.hdf5 import Episode, Recorder, read_episodes, write_episodes
from common.demos import skills
from common.demos.skills import (
    GAIN,
    OPEN,
    PATHS,
    SKILLS,
    SPEED,
    TURN_GAIN,
    TURN_SPEED,
    UP,
    Hand,
    PickPlace,
    PlanError,
    joint_at,
    ramp,
    rotation_vector,
)
from common.libero import Task, load_task, make_env, tasks
from common.libero.env import share_cores
from common.libero.goals import predicate_holds
from common.libero.step import NO_OP
from common.libero.tasks import Predicate
from common.suites import SUITES, resolve, task_names

# ---------------------------------------------------------------------------------------------- strategies


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way of doing a task: its name, and the choices it is made of."""

    name: str
    factors: dict[str, str]


MAX_STRATEGIES = 8
# Training states on which a strategy has to succeed in a row, and if it fails once, on how many in all. In a task of several steps
# choices multiply: of so many combinations some pass a short rehearsal by luck, and count only where none passes a long one.
REHEARSALS, REHEARSALS_OF_STEPS = (4, 6), (8, 12)
STRETCHED = -0.65, -0.45  # rad of the elbow (its range ends at -0.07): where stretching the arm begins to be avoided, and is
PATIENCE = 20  # control steps that a demonstrator waits for things to come to rest
ROUNDS = 6  # of rehearsals of a task of several steps
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
    """Where something about a task is kept: the key covers the task, MuJoCo's version, the assets, the code and `details`."""
    files = (Path(__file__), Path(skills.__file__), Path(tasks.__file__))
    source = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    key = hashlib.sha256(repr((mujoco.__version__, task.assets, source, details)).encode()).hexdigest()[:12]
    return cache_dir() / "demos" / f"{task.suite}-{task.index:02d}-{kind}-{key}.{suffix}"


@dataclasses.dataclass
class Trials:
    """The rehearsals of one strategy. At most two are under way at a time, for two failures are enough."""

    strategy: Strategy
    enough: tuple[int, int] = REHEARSALS
    begun: int = 0
    outcomes: list[bool] = dataclasses.field(default_factory=list)

    def missing(self) -> int:
        """How many more have to end without another failure until it has passed; 0: it is known whether it has."""
        return max(0, (*self.enough, 0)[min(self.outcomes.count(False), 2)] - len(self.outcomes))

    def passed(self, enough: tuple[int, int] | None = None) -> bool:
        """Whether it has passed; with `enough`, whether it would have passed a shorter rehearsal."""
        in_a_row, in_all = enough or self.enough
        return self.outcomes[:in_a_row] == [True] * in_a_row or (len(self.outcomes) >= in_all and self.outcomes[:in_all].count(False) == 1)


def next_trial(trials: dict[Any, Trials], useful: Callable[[Any], bool] = lambda key: True) -> Attempt | None:
    """The next attempt (see `perform`) at one of `trials`, whose key it has. None: no more, or not before another one has ended."""
    waiting = [c for c, t in trials.items() if t.begun - len(t.outcomes) < min(2, t.missing()) and useful(c)]
    if not waiting:
        return None
    c = min(waiting, key=lambda c: trials[c].begun)
    trials[c].begun += 1
    return Attempt(c, trials[c].strategy, [trials[c].begun - 1, 1], None)


def _rehearse(task: Task) -> list[dict[str, str]]:
    """The factors of the strategies that `strategies` describes."""
    if unknown := [p.name for p in task.goal if p.name not in SKILLS]:
        raise UserError(f"{task.id}: the scripted demonstrator has no skill for the goal {unknown[0]!r}")
    env = make_env(task, 8)
    env.reset(seed=0)
    for _ in range(PATIENCE):  # as a demonstrator does before it plans
        falling = np.array([unsettled(task, data) for data in env.data])
        if falling.any():
            env.step(np.tile(NO_OP, (env.num_envs, 1)), falling)
    predicates = agenda(task, env.data[0])
    if len(predicates) > 1:
        factors = _rehearse_steps(task, predicates, env.data[0])
        env.close()
        return factors
    main = predicates[0]
    holds = SKILLS[main.name].holds(task, main, env.data[0])
    seen = dict.fromkeys(holds, 1)  # in how many of the eight states there is such a hold
    for k, data in enumerate(env.data[1:], 1):
        if any(n < 5 <= n + env.num_envs - k for n in seen.values()):
            others = SKILLS[main.name].holds(task, main, data)
            seen = {name: n + (name in others) for name, n in seen.items()}
    ways = SKILLS[main.name].repertoire(task, main, env.data[0], {name: hold for name, hold in holds.items() if seen[name] >= 5})
    if not ways:
        raise UserError(f"{task.id}: the scripted demonstrator finds no way to plan {main.name}({', '.join(main.args)})")
    features = np.array([_features(skill, env.data[0]) for skill in ways])
    env.close()
    distance = np.linalg.norm(features[:, None] - features[None], axis=-1)
    for max_steps in (task.max_steps // 2, task.max_steps):  # what takes long counts only where nothing else works
        tried = _rehearse_ways(task, ways, distance, max_steps)
        if passed := [c for c, trials in tried.items() if trials.passed()]:
            break
    else:  # and what works mostly, only where nothing passes
        passed = [c for c, trials in tried.items() if trials.outcomes.count(True) >= 2 * trials.outcomes.count(False)][:MAX_STRATEGIES]
    if not passed:
        raise UserError(f"{task.id}: the scripted demonstrator finds no way that works")
    return [ways[c].factors for c in sorted(passed)]


def _rehearse_ways(task: Task, ways: list, distance: np.ndarray, max_steps: int) -> dict[int, Trials]:
    """The rehearsals, within `max_steps`, of as many `ways` as it takes for `MAX_STRATEGIES` to pass, as far apart as can be."""
    tried: dict[int, Trials] = {}
    passed: set[int] = set()
    failed: set[int] = set()
    while len(ways) > len(failed):
        pool = [c for c in range(len(ways)) if c not in failed]
        chosen = sorted(passed)
        while len(chosen) < min(MAX_STRATEGIES, len(pool)):  # the farthest from those chosen so far
            rest = [c for c in pool if c not in chosen]
            chosen.append(max(rest, key=lambda c: distance[c, chosen].min() if chosen else distance[c, pool].sum()))
        if set(chosen) == passed:
            break
        trials = {c: Trials(Strategy("", ways[c].factors)) for c in chosen if c not in passed}
        for attempt, episode in perform(task, lambda trials=trials: next_trial(trials), 0.1, 16, max_steps):
            trials[attempt.key].outcomes.append(episode.success)
        tried |= trials
        passed |= {c for c, t in trials.items() if t.passed()}
        failed |= set(trials) - passed
        for hold in {_hold(ways[c]) for c in failed}:  # two failures and no success: this way of taking hold is no good
            same = {c for c in range(len(ways)) if _hold(ways[c]) == hold}
            if len(same & failed) > 1 and not same & passed:
                failed |= same
    return tried


def _rehearse_steps(task: Task, predicates: list[Predicate], data: mujoco.MjData) -> list[dict[str, str]]:
    """The factors of the strategies for a task of several steps, each with choices of its own.

    Whole episodes are rehearsed. When one fails, the choice that was made for the step under way is to blame; what was
    chosen for the steps before it has proved its worth.
    """
    options: list[list[dict[str, str]]] = []  # of each step, what is usual first
    for p in predicates:
        skill = SKILLS[p.name]
        key = "grasp" if skill is PickPlace else "contact"
        holds = skill.order(skill.holds(task, p, data))
        paths = [path for path in PATHS if path in ("direct", "over") or skill is PickPlace]
        options.append([{key: hold, "path": path} for path in paths for hold in holds])
        if not holds:
            raise UserError(f"{task.id}: the scripted demonstrator finds no way to plan {p.name}({', '.join(p.args)})")
    main = next((k for k, p in enumerate(predicates) if SKILLS[p.name] is PickPlace), 0)
    wins, losses = ([np.zeros(len(o), int) for o in options] for _ in range(2))
    tried: dict[tuple[int, ...], Trials] = {}  # of each combination of choices

    def alive(k: int, j: int) -> bool:
        """Whether choice `j` for step `k` may still work."""
        return losses[k][j] < 2 or wins[k][j] > 2 * losses[k][j]

    def choices(k: int) -> list[int]:
        """Those for a step that may still work: the proven ones first, but new ones for the step that gives the variety."""
        rest = [j for j in range(len(options[k])) if alive(k, j)]
        return sorted(rest, key=lambda j: (losses[k][j] > 0, k != main and wins[k][j] == 0))

    for _ in range(ROUNDS):
        rows, new = [choices(k) for k in range(len(options))], []
        if not all(rows):
            break
        passed = [c for c, trials in tried.items() if trials.passed()]
        for i in range(4 * MAX_STRATEGIES):
            combination = tuple(row[(i if k == main else i // (1 + k)) % len(row)] for k, row in enumerate(rows))
            if combination not in tried and combination not in new and len(new) + len(passed) < MAX_STRATEGIES:
                new.append(combination)
        if not new:
            break
        fresh = {c: Trials(Strategy("", _join([options[k][j] for k, j in enumerate(c)])), REHEARSALS_OF_STEPS) for c in new}
        tried |= fresh

        def next_attempt(fresh=fresh):
            return next_trial(fresh, lambda c: all(alive(k, j) for k, j in enumerate(c)))

        for attempt, episode in perform(task, next_attempt, 0.1, 16):
            c = attempt.key
            tried[c].outcomes.append(episode.success)
            done = len(c) if episode.success else attempt.stage
            for k in range(done):
                wins[k][c[k]] += 1
            if not episode.success:
                losses[done][c[done]] += 1
    passed = [c for c, trials in tried.items() if trials.passed()]
    passed = passed or [c for c, trials in tried.items() if trials.passed(REHEARSALS)]
    if not passed:
        k = int(np.argmax([loss.sum() for loss in losses]))
        step = f"{predicates[k].name}({', '.join(predicates[k].args)})"
        raise UserError(f"{task.id}: the scripted demonstrator finds no way that works; most attempts end at {step}")
    return [_join([options[k][j] for k, j in enumerate(c)]) for c in passed]


def _join(choices: list[dict[str, str]]) -> dict[str, str]:
    return {f"step {k + 1} {name}": value for k, factors in enumerate(choices) for name, value in factors.items()}


def _hold(skill) -> str:
    return next(iter(skill.factors.values()))


def _features(skill, data: mujoco.MjData) -> np.ndarray:
    """(n,) numbers whose distances say how different two ways of doing a task look: the hand's positions, and how it is turned."""
    parts = [p[np.linspace(0, len(p) - 1, 12).astype(int)].ravel() for p in skill.preview(data)]
    hold = skill.grasp if isinstance(skill, PickPlace) else skill.contact
    return np.concatenate([*parts, 0.3 * hold.rotation[:, :2].ravel()])


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
    touching = model.body_rootid[model.geom_bodyid[data.contact.geom]]  # at the top of its flight a thing is slow, but touches nothing
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


# ---------------------------------------------------------------------------------------------- collecting


@dataclasses.dataclass
class Attempt:
    """One try: who asked for it, with which strategy, its random seed, and its official init state (None: a training state)."""

    key: Any
    strategy: Strategy
    seed: list[int]
    init_state: int | None
    stage: int = 0  # the step of the task that was under way when it ended


def perform(
    task: Task,
    next_attempt: Callable[[], Attempt | None],
    noise: float,
    num_envs: int,
    max_steps: int | None = None,
    replayable: bool = False,
) -> Iterator[tuple[Attempt, Episode]]:
    """Make the attempts that `next_attempt` hands out (None: no more for now), `num_envs` at a time; yields (attempt, episode).

    An attempt ends at success, after `max_steps` (default: the task's), or when its demonstrator gives up. If it is to be
    `replayable`, it starts from nothing but its first state, without the memory of controller and solver that no file holds,
    as a replay will.
    """
    env = make_env(task, num_envs, autoreset_mode=AutoresetMode.DISABLED, max_steps=max_steps)
    recorder = Recorder(env)
    running: dict[int, tuple[Attempt, Demonstrator]] = {}

    def launch() -> None:
        for i in range(num_envs):
            if i in running:
                continue
            if (attempt := next_attempt()) is None:
                return
            rng = np.random.default_rng(attempt.seed)
            options = {"reset_mask": np.arange(num_envs) == i}
            if attempt.init_state is not None:
                options["init_state"] = attempt.init_state
            env.reset(seed=int(rng.integers(2**31)), options=options)
            if replayable:
                env.set_state(env.get_state()[i : i + 1], envs=np.array([i]))
            running[i] = attempt, Demonstrator(task, attempt.strategy, noise, rng)

    launch()
    while running:
        actions, active = np.tile(NO_OP, (num_envs, 1)), np.isin(np.arange(num_envs), list(running))
        for i, (_, demonstrator) in running.items():
            actions[i] = demonstrator.act(env.data[i])
        recorder.before()
        _, _, terminated, truncated, _ = env.step(actions, active)
        for i in range(num_envs):  # what idle environments record is cut off and dropped
            truncated[i] |= not active[i] or running[i][1].failed
        for i, episode in recorder.after(actions, terminated, truncated):
            if active[i]:
                attempt, demonstrator = running.pop(i)
                attempt.stage = demonstrator.stage
                yield attempt, episode
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
    replayable: bool = False,
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
        replayable: start as a replay does, so that from an episode's first state its actions alone reach success (see `perform`).

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
        for attempt, episode in perform(task, next_attempt, noise, min(num_envs, num_episodes), replayable=replayable):
            s, k = attempt.key
            start = -1 if attempt.init_state is None else attempt.init_state
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
    attrs = {"script": "common.demos", "mujoco": mujoco.__version__, "assets": task.assets}
    write_episodes(path, episodes, task, attrs)


# ---------------------------------------------------------------------------------------------- command


@dataclasses.dataclass
class Args:
    """Write scripted demonstrations in LIBERO's HDF5 layout, a file a task: OUT/<suite>/<task name>_demo.hdf5.

    Files that are there already, with as many demonstrations made in the same way, are left alone.
    """

    out: Path
    """folder to write to"""
    task: str | None = None
    """task id: suite/index, suite/name, or any part of a name that is unique"""
    suite: str | None = None
    """all tasks of a suite instead"""
    episodes: int = 50
    """successful episodes a task"""
    noise: float = 0.1
    """standard deviation of the action noise"""
    seed: int = 0
    num_envs: int = 16
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """tasks of a suite worked on at a time, each in a process of its own"""
    assets: str | None = None
    """LIBERO's asset folder (default: $LIBERO_ASSETS, else LIBERO's own)"""


def _demonstrate(task_id: str, path: Path, args: Args, progress: bool) -> list[str]:
    """Write the file of one task, unless it is there; returns a line for each strategy."""
    task = load_task(task_id, args.assets)
    made = {"noise": args.noise, "seed": args.seed}
    try:
        episodes = read_episodes(path, task)
    except (OSError, UserError):
        episodes = []
    if len(episodes) != args.episodes or any(e.attrs.get(k) != v for e in episodes for k, v in made.items()):
        episodes = collect(task, args.episodes, args.seed, args.noise, args.num_envs, replayable=True, progress=progress)
        write_demonstrations(path, task, episodes)
    lengths: dict[str, list[int]] = {}
    for e in episodes:
        lengths.setdefault(e.attrs["strategy"], []).append(e.length)
    return [f"{name}: {len(n)} episodes of {np.mean(n):.0f} steps" for name, n in lengths.items()]


def main() -> None:
    import tyro
    from tqdm import tqdm

    args = tyro.cli(Args)
    if bool(args.task) == bool(args.suite):
        raise UserError("name either a --task or a --suite")
    if args.suite is not None and args.suite not in SUITES:
        raise UserError(f"unknown suite {args.suite!r}; suites are {', '.join(SUITES)}")
    if args.episodes < 1 or args.num_envs < 1 or args.workers < 1 or args.noise < 0:
        raise UserError("--episodes, --num-envs and --workers must be at least 1, --noise at least 0")
    tasks = [resolve(args.task)] if args.task else [(args.suite, i) for i in range(len(task_names()[args.suite]))]
    paths = {f"{suite}/{i}": args.out / suite / f"{task_names()[suite][i]}_demo.hdf5" for suite, i in tasks}
    if args.task:
        ((task_id, path),) = paths.items()
        print(*_demonstrate(task_id, path, args, True), path, sep="\n")
        return
    failures, workers = [], min(args.workers, len(paths))
    with ProcessPoolExecutor(workers, get_context("spawn"), share_cores, (workers,)) as pool:
        futures = {pool.submit(_demonstrate, task_id, path, args, False): task_id for task_id, path in paths.items()}
        for future in tqdm(as_completed(futures), total=len(futures), desc=f"demonstrations of {args.suite}"):
            try:
                future.result()
            except UserError as error:
                failures.append(str(error))
                tqdm.write(f"{futures[future]}: {error}", file=sys.stderr)
    if failures:
        raise UserError(f"{len(failures)} of {len(paths)} tasks have no demonstrations: {'; '.join(failures)}")


if __name__ == "__main__":
    run_command(main)
