"""Naming, compiling and caching of tasks, and the errors a user can cause."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.cli import UserError
from common.libero import load_task, original, tasks
from common.libero.assets import find_assets
from common.libero.original import official_init_states
from common.suites import SUITES, resolve, task_names

ROOT = Path(__file__).resolve().parent.parent


def run_python(code, **environment):
    """Run `code` in a fresh interpreter with stdin closed."""
    env = {k: v for k, v in os.environ.items() if k != "LIBERO_CONFIG_PATH"} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)


# ---------------------------------------------------------------------------------------------- names


def test_all_130_tasks_have_names():
    assert {suite: len(names) for suite, names in task_names().items()} == dict(zip(SUITES, (10, 10, 10, 10, 90), strict=True))
    for suite, names in task_names().items():
        for index, name in enumerate(names):
            assert resolve(f"{suite}/{name}") == resolve(f"{suite}/{index}") == (suite, index)
            assert original.bddl_file(suite, index).exists()


@pytest.mark.parametrize(
    ("task_id", "expected"),
    [
        ("libero_spatial/0", ("libero_spatial", 0)),
        ("libero_90/KITCHEN_SCENE1_open_the_bottom_drawer_of_the_cabinet", ("libero_90", 6)),
        ("turn_off_the_stove", ("libero_90", 39)),
        ("TURN_OFF", ("libero_90", 39)),
        ("libero_goal/turn_on_the_stove", ("libero_goal", 7)),
        ("libero_goal/turn_on", ("libero_goal", 7)),
        ("turn_on_the_stove", ("libero_goal", 7)),  # the whole name of one task, a part of several
    ],
)
def test_resolve(task_id, expected):
    assert resolve(task_id) == expected


@pytest.mark.parametrize(
    ("task_id", "message"),
    [
        ("libero_spatial/10", "libero_spatial has tasks 0 to 9, not 10"),
        ("moka", "ambiguous: .*SCENE.*moka_pot"),
        ("libero_10/put_both", "ambiguous: 4 tasks match"),
        ("libero_everest/0", "unknown suite 'libero_everest'.*libero_spatial, libero_object"),
        ("turn_of_the_stofe", "unknown task 'turn_of_the_stofe'; the nearest are .*libero_goal/turn_on_the_stove"),
        ("libero_goal/trun_on_the_stove", "nearest are .*libero_goal/turn_on_the_stove"),
        ("qqqqqqqq", "unknown task 'qqqqqqqq'; see python -m common.libero"),
        ("", "unknown task ''"),
        ("libero_goal/", "unknown task"),
    ],
)
def test_resolve_errors(task_id, message):
    with pytest.raises(UserError, match=message):
        resolve(task_id)


# ---------------------------------------------------------------------------------------------- assets


def test_missing_assets(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"nowhere \(--assets\) is not a LIBERO asset tree: it has no folder 'scenes'"):
        find_assets(str(tmp_path / "nowhere"))
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path))
    with pytest.raises(UserError, match=r"\(LIBERO_ASSETS\).*pass --assets DIR"):
        load_task("libero_goal/0")
    (tmp_path / "scenes").mkdir()
    with pytest.raises(UserError, match="no folder 'articulated_objects'"):
        find_assets()


def test_broken_assets(assets, tmp_path, monkeypatch):
    """A damaged file in the asset tree is named, and leaves nothing in the cache."""
    folder = tmp_path / "assets"
    shutil.copytree(assets, folder, copy_function=os.symlink)
    broken = folder / "articulated_objects" / "wooden_cabinet.xml"
    broken.unlink()
    broken.write_text("<mujoco><worldbody>")
    monkeypatch.setenv("RL_DATA_ENGINE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="libero_goal/open_the_middle_drawer_of_the_cabinet does not build") as caught:
        load_task("libero_goal/0", str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not list((tmp_path / "cache").glob("tasks/*"))


# ---------------------------------------------------------------------------------------------- the cache


def test_damaged_cache_and_two_builders(assets, tmp_path, monkeypatch):
    """Two processes find a truncated cache entry at once: both rebuild it, both get the task, one good file remains."""
    good = load_task("libero_goal/7", assets)
    whole = tasks.cache_file("libero_goal", 7, find_assets(assets)).read_bytes()
    monkeypatch.setenv("RL_DATA_ENGINE_CACHE", str(tmp_path))
    path = tasks.cache_file("libero_goal", 7, find_assets(assets))
    assert path.is_relative_to(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(whole[: len(whole) // 2])
    code = f"from common.libero import load_task; t = load_task('libero_goal/7', {assets!r}); print(t.id, t.train_states.sum())"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [p.communicate()[0] for p in processes]
    assert outputs == [f"{good.id} {good.train_states.sum()}\n"] * 2
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file left
    again = load_task("libero_goal/7", assets)
    np.testing.assert_array_equal(again.train_states, good.train_states)  # building is deterministic
    np.testing.assert_array_equal(again.model.body_pos, good.model.body_pos)
    assert (again.goal, again.objects, again.sites) == (good.goal, good.objects, good.sites)


def test_flipped_byte_is_noticed(assets, tmp_path):
    load_task("libero_goal/7", assets)
    content = bytearray(tasks.cache_file("libero_goal", 7, find_assets(assets)).read_bytes())
    content[len(content) // 3] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(content)
    with pytest.raises(tasks.zipfile.BadZipFile, match="CRC"):
        tasks._read_task(tmp_path / "flipped.npz")


def test_cached_task_needs_no_libero(assets):
    """From the cache, neither LIBERO nor robosuite nor torch is imported, and the task steps."""
    load_task("libero_goal/7", assets)
    result = run_python(
        f"""
import sys
from common.libero import make_env
from common.libero import load_task
env = make_env(load_task('libero_goal/7', {assets!r}))
env.reset(seed=0)
env.step(env.action_space.sample())
print([m for m in ('robosuite', 'libero', 'torch', 'cv2', 'bddl', 'matplotlib') if m in sys.modules])
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------- LIBERO


def test_importing_libero_asks_nothing(tmp_path):
    """In a fresh home, without a terminal, without a GL library being touched."""
    code = "import os; from common.libero.original import import_libero; print(import_libero(None).__name__, os.environ.get('MUJOCO_GL'))"
    environment = {"HOME": str(tmp_path), "RL_DATA_ENGINE_CACHE": str(tmp_path / "cache")}
    result = run_python(code, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == "ControlEnv None"
    assert not (tmp_path / ".libero").exists()


def test_official_init_states(drawer_task):
    for suite, index in (("libero_spatial", 3), ("libero_object", 9), ("libero_goal", 0), ("libero_10", 8), ("libero_90", 89)):
        states = official_init_states(suite, index)
        assert states.shape[0] == 50 and states.dtype == np.float64 and np.isfinite(states).all()
    model = drawer_task.model
    assert drawer_task.init_states.shape == (50, 1 + model.nq + model.nv)
    np.testing.assert_array_equal(drawer_task.init_states, official_init_states("libero_goal", 0))


def test_init_states_are_read_without_running_code(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "init_files" / "libero_goal" / "open_the_middle_drawer_of_the_cabinet.pruned_init"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    task_names()  # read from the real folder
    monkeypatch.setattr(original, "libero_root", lambda: tmp_path)
    with pytest.raises(Exception, match="(?i)weights.only|unsupported|unpickl"):
        official_init_states("libero_goal", 0)
    import torch

    torch.save(Evil(), path)
    with pytest.raises(pickle.UnpicklingError):
        official_init_states("libero_goal", 0)
    assert not (tmp_path / "executed").exists()


def test_command_errors(assets):
    for arguments, message in (
        (["common.libero.build", "--task", "libero_goal/12"], "tasks 0 to 9"),
        (["common.libero", "--suite", "libero_11"], "unknown suite"),
    ):
        command = [sys.executable, "-m", *arguments, "--assets", assets]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert result.returncode == 2 and result.stderr.startswith("error: ") and message in result.stderr
        assert result.stderr.count("\n") == 1
