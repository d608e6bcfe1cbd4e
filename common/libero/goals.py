"""LIBERO's goal predicates on a simulated state, with LIBERO's exact semantics."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import mujoco
import numpy as np

from common.libero.step import addresses, goal_near
from common.libero.tasks import Predicate, Task

KINDS = {"joint": 0, "contain": 1, "under": 2, "ontop": 3}
GOAL_DTYPE = np.dtype(
    [("kind", "i8"), ("body", "i8"), ("target", "i8"), ("extent", "f8", 3), ("qpos", "i8", 8), ("joints", "i8")]
    + [("sign", "f8"), ("threshold", "f8"), ("inclusive", "?"), ("any", "?")]
)


@functools.lru_cache(maxsize=1024)
def goal_table(goal: tuple[Predicate, ...]) -> np.ndarray:
    """One record for each conjunct. `target` is a site, or a body if the goal is to be on top of an object."""
    table = np.zeros(len(goal), GOAL_DTYPE)
    for row, p in zip(table, goal, strict=True):
        row["kind"], row["body"], row["target"] = KINDS[p.kind], p.body, p.target_body if p.kind == "ontop" else p.site
        row["extent"], row["sign"], row["threshold"], row["inclusive"], row["any"] = p.size, p.sign, p.threshold, p.inclusive, p.any
        row["joints"], row["qpos"][: len(p.qpos)] = len(p.qpos), p.qpos
    return table


def predicate_holds(predicate: Predicate, data: mujoco.MjData, model: mujoco.MjModel) -> bool:
    """LIBERO's `_eval_predicate` on one environment, with LIBERO's exact semantics.

    It reads `data` as it is: after `step` that is 2 ms newer than what the returned success was judged on, because LIBERO
    judges what its last physics substep leaves: joint positions after integration, body poses and contacts from before.
    """
    return bool(goal_near(addresses(data), goal_table((predicate,)))) and contacts_hold((predicate,), data, model)


def contacts_hold(goal: Sequence[Predicate], data: mujoco.MjData, model: mujoco.MjModel) -> bool:
    return all(p.contact is None or in_contact(data, model, *p.contact) for p in goal)


def in_contact(data: mujoco.MjData, model: mujoco.MjModel, geoms_1: tuple[int, ...], geoms_2: tuple[int, ...]) -> bool:
    """Whether any geom of one group touches any of the other."""
    first, second = np.zeros(model.ngeom, bool), np.zeros(model.ngeom, bool)
    first[list(geoms_1)], second[list(geoms_2)] = True, True

    def among(pairs: np.ndarray) -> bool:
        a, b = pairs[:, 0], pairs[:, 1]
        return bool(np.any((first[a] & second[b]) | (first[b] & second[a])))

    return among(data.contact.geom) or (some_sleep(data, model) and among(touching_geoms(data, model)))


def touching_geoms(data: mujoco.MjData, model: mujoco.MjModel) -> np.ndarray:
    """Pairs of geoms that touch, (n, 2): MuJoCo's contact list, and the contacts of bodies that sleep, which are not in it."""
    if not some_sleep(data, model):
        return data.contact.geom
    awake = _scratch(model)
    mujoco.mj_resetData(model, awake)
    awake.qpos[:] = data.qpos
    mujoco.mj_fwdPosition(model, awake)
    return awake.contact.geom


def some_sleep(data: mujoco.MjData, model: mujoco.MjModel) -> bool:
    return getattr(data, "ntree_awake", model.ntree) < model.ntree  # MuJoCo before 3.8 doesn't sleep


@functools.lru_cache(maxsize=4)
def _scratch(model: mujoco.MjModel) -> mujoco.MjData:
    return mujoco.MjData(model)


def success(task: Task, data: mujoco.MjData) -> bool:
    """LIBERO's `_check_success`: all conjuncts of the goal hold (see `predicate_holds`)."""
    return bool(goal_near(addresses(data), goal_table(tuple(task.goal)))) and contacts_hold(task.goal, data, task.model)
