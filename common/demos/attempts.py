"""Attempts at a task, many at a time: demonstrators in a vector environment, and the episodes that come of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from common.data import Episode, Recorder
from common.demos.demonstrator import Demonstrator, Strategy
from common.libero import Task, make_env
from common.libero.step import NO_OP


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
    physics: str = "exact",
) -> Iterator[tuple[Attempt, Episode]]:
    """Make the attempts that `next_attempt` hands out (None: no more for now), `num_envs` at a time; yields (attempt, episode).

    An attempt ends at success, after `max_steps` (default: the task's), or when its demonstrator gives up. If it is to be
    `replayable`, it starts from nothing but its first state, without the memory of controller and solver that no file holds,
    as a replay will.
    """
    env = make_env(task, num_envs, autoreset_mode=AutoresetMode.DISABLED, max_steps=max_steps, physics=physics)
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
