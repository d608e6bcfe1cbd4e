"""Which ways of doing a task there are: choices are combined, imagined, and rehearsed on a few training states."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np

from common.cli import UserError, atomic_path
from common.demos.attempts import Attempt, perform
from common.demos.cache import cache_file
from common.demos.demonstrator import PATIENCE, SKILLS, Strategy, agenda, unsettled
from common.demos.motion import PATHS
from common.demos.pick_place import PickPlace
from common.libero import Task, make_env
from common.libero.env import can_sleep
from common.libero.step import NO_OP
from common.libero.tasks import Predicate

MAX_STRATEGIES = 8
# Training states on which a strategy has to succeed in a row, and if it fails once, on how many in all. In a task of several steps
# choices multiply: of so many combinations some pass a short rehearsal by luck, and count only where none passes a long one.
REHEARSALS, REHEARSALS_OF_STEPS = (4, 6), (8, 12)
ROUNDS = 6  # of rehearsals of a task of several steps
_strategies: dict[tuple[str, str], list[Strategy]] = {}


def strategies(task: Task) -> list[Strategy]:
    """The repertoire of a task: up to 8 ways that work and differ visibly. Found once, then kept in the user's cache folder.

    Of all combinations of choices that can be planned, those are taken whose imagined paths lie farthest apart; each is
    rehearsed on a few training states, and replaced if it fails. Raises UserError if nothing works.
    """
    key = (task.id, task.assets)
    if key not in _strategies:
        path = cache_file(task, "strategies", "json")
        try:
            rows = json.loads(path.read_text())
        except (OSError, ValueError):
            rows = rehearse(task)
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(rows, indent=1))
        _strategies[key] = [Strategy(", ".join(f"{k} {v}" for k, v in factors.items()), factors) for factors in rows]
    return _strategies[key]


def fast_physics() -> str:
    """What strategies are rehearsed in: who succeeds there succeeds in exact physics (docs/physics.md), and it takes half as long."""
    return "sleep" if can_sleep() else "exact"


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


def rehearse(task: Task) -> list[dict[str, str]]:
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
        try:
            return _rehearse_steps(task, predicates, env.data[0])
        except UserError:
            return _rehearse_steps(task, predicates, env.data[0], usual=False)
        finally:
            env.close()
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
        for attempt, episode in perform(task, lambda trials=trials: next_trial(trials), 0.1, 16, max_steps, physics=fast_physics()):
            trials[attempt.key].outcomes.append(episode.success)
        tried |= trials
        passed |= {c for c, t in trials.items() if t.passed()}
        failed |= set(trials) - passed
        for hold in {_hold(ways[c]) for c in failed}:  # two failures and no success: this way of taking hold is no good
            same = {c for c in range(len(ways)) if _hold(ways[c]) == hold}
            if len(same & failed) > 1 and not same & passed:
                failed |= same
    return tried


def _rehearse_steps(task: Task, predicates: list[Predicate], data: mujoco.MjData, usual: bool = True) -> list[dict[str, str]]:
    """The factors of the strategies for a task of several steps, each with choices of its own.

    Whole episodes are rehearsed. When one fails, the choice that was made for the step under way is to blame; what was
    chosen for the steps before it has proved its worth. Unless `usual`, of each step the unusual ways are tried, where there are any.
    """
    options: list[list[dict[str, str]]] = []  # of each step, what is usual first
    for p in predicates:
        skill = SKILLS[p.name]
        key = "grasp" if skill is PickPlace else "contact"
        found = skill.holds(task, p, data)
        holds = skill.order(found)
        holds = holds if usual else [name for name in found if name not in holds] or holds
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

    def may_work(combination: tuple[int, ...]) -> bool:
        return all(alive(k, j) for k, j in enumerate(combination))

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
            return next_trial(fresh, may_work)

        for attempt, episode in perform(task, next_attempt, 0.1, 16, physics=fast_physics()):
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
