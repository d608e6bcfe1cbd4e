"""Demonstrations of a task, equally many of each strategy: collected, kept in the cache, written."""

from __future__ import annotations

import heapq
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from tqdm import tqdm

from common.cli import UserError
from common.data import Episode, read_episodes, write_episodes
from common.demos.attempts import Attempt, perform
from common.demos.cache import cache_file
from common.demos.rehearsal import strategies
from common.libero import Task, load_task


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
    progress: bool | Callable[[int], Any] = True,
    physics: str = "exact",
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
        progress: show a bar in a terminal; or a function that is called with how many more are done.
        physics: exact, or sleep or coarse (faster; see `make_env`).

    Returns episodes in the order (round, strategy). Their attrs: strategy (name), strategy_index, init_state (-1 for a
    training state), seed, attempt, noise, source.
    Raises UserError if a strategy hardly ever succeeds.
    """
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

    with tqdm(total=num_episodes, desc=f"demonstrations of {task.id}", disable=None if progress is True else True) as bar:
        done, tick = 0, progress if callable(progress) else bar.update
        for attempt, episode in perform(task, next_attempt, noise, min(num_envs, num_episodes), replayable=replayable, physics=physics):
            s, k = attempt.key
            start = -1 if attempt.init_state is None else attempt.init_state
            episode.attrs.update(strategy=repertoire[s].name, strategy_index=s, init_state=start, seed=seed, attempt=k)
            episode.attrs.update(noise=noise, source="scripted")
            results[s][k] = episode if episode.success or keep_failures else None
            before, done = done, sum(len(taken(s)) for s in chosen)
            tick(done - before)
    rounds = [[(k, s, e) for k, e in enumerate(taken(s))] for s in chosen]
    return [e for _, _, e in heapq.merge(*rounds, key=lambda row: row[:2])]


def load_or_collect(
    task: Task,
    num_episodes: int,
    seed: int = 0,
    noise: float = 0.1,
    progress: bool | Callable[[int], Any] = True,
    physics: str = "exact",
) -> list[Episode]:
    """`collect`, kept in LIBERO's HDF5 layout in the user's cache folder."""
    path = cache_file(task, "episodes", "hdf5", num_episodes, seed, noise, physics)
    if path.exists():
        try:
            episodes = read_episodes(path, task)
            if len(episodes) == num_episodes:  # else some could not be read
                return episodes
        except UserError as error:
            logging.getLogger(__name__).warning("%s", error)
        logging.getLogger(__name__).warning("%s is damaged: collecting again", path)
    episodes = collect(task, num_episodes, seed, noise, progress=progress, physics=physics)
    write_demonstrations(path, task, episodes)
    return episodes


def make_file(
    path: Path, task_id: str, num_episodes: int, seed: int, noise: float, num_envs: int, assets: str | None, progress: bool
) -> list[str]:
    """Write the demonstrations of one task that replay from their first state, unless the file is there, made in the same way.

    Returns a line for each strategy. As `collect`, and `load_task` for `assets`.
    """
    task, made = load_task(task_id, assets), {"noise": noise, "seed": seed}
    try:
        episodes = read_episodes(path, task)
    except (OSError, UserError):
        episodes = []
    if len(episodes) != num_episodes or any(e.attrs.get(k) != v for e in episodes for k, v in made.items()):
        episodes = collect(task, num_episodes, seed, noise, num_envs, replayable=True, progress=progress)
        write_demonstrations(path, task, episodes)
    lengths: dict[str, list[int]] = {}
    for e in episodes:
        lengths.setdefault(e.attrs["strategy"], []).append(e.length)
    return [f"{name}: {len(n)} episodes of {np.mean(n):.0f} steps" for name, n in lengths.items()]


def write_demonstrations(path: str | os.PathLike, task: Task, episodes: list[Episode]) -> None:
    attrs = {"script": "common.demos", "mujoco": mujoco.__version__, "assets": task.assets}
    write_episodes(path, episodes, task, attrs)
