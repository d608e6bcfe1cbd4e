"""Naming, compiling and caching of tasks, and the errors a user can cause."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import mujoco
import numpy as np
import pytest

from common import suites
from common.cli import UserError
from common.demos.cache import cache_file as kept_file
from common.libero import load_task, store, tasks
from common.libero.assets import find_assets
from common.libero.original import official_init_states
from common.suites import SUITES, find_task, libero_root, resolve, task_names

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
            assert find_task(f"{suite}/{index}").bddl.exists()


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


# ---------------------------------------------------------------------------------------------- the cache


def test_damaged_cache_and_two_builders(standin_task, tmp_path, monkeypatch):
    """Two processes find a truncated cache entry at once: both rebuild it, both get the task, one good file remains."""
    good = standin_task
    whole = tasks.cache_file(find_task("libero_goal/7"), find_assets("standin")).read_bytes()
    monkeypatch.setenv("RL_DATA_ENGINE_CACHE", str(tmp_path))
    path = tasks.cache_file(find_task("libero_goal/7"), find_assets("standin"))
    assert path.is_relative_to(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(whole[: len(whole) // 2])
    code = "from common.libero import load_task; t = load_task('libero_goal/7', 'standin'); print(t.id, t.train_states.sum())"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [p.communicate()[0] for p in processes]
    assert outputs == [f"{good.id} {good.train_states.sum()}\n"] * 2
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file left
    again = load_task("libero_goal/7", "standin")
    np.testing.assert_array_equal(again.train_states, good.train_states)  # building is deterministic
    np.testing.assert_array_equal(again.model.body_pos, good.model.body_pos)
    assert (again.goal, again.objects, again.sites) == (good.goal, good.objects, good.sites)


def test_flipped_byte_is_noticed(assets, drawer_task, tmp_path):
    content = bytearray(tasks.cache_file(find_task("libero_goal/0"), find_assets(assets)).read_bytes())
    content[len(content) // 3] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(content)
    with pytest.raises((zipfile.BadZipFile, zlib.error)):
        tasks._read_task(tmp_path / "flipped.npz")


def test_a_model_that_has_no_room(monkeypatch):
    """Not taken for a damaged one, which would be built again."""

    class Full:
        @staticmethod
        def from_binary_path(*_):
            raise RuntimeError("Caught an unknown exception!")  # MuJoCo, under a limit of memory

    monkeypatch.setattr(mujoco, "MjModel", Full)
    rest = {"size": np.array(3_000_000), "kept": np.zeros(0, int), "blocks": np.zeros((0, store.BLOCK), np.uint8)}
    with pytest.raises(MemoryError, match="no room for a model of 3 MB"):
        store.load(rest, [])


def binary(model: mujoco.MjModel) -> bytes:
    content = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, content)
    return content.tobytes()


def test_meshes_are_kept_once(standin_task, drawer_task, tmp_path, monkeypatch):
    """A model comes back bit for bit; a second one adds only its own meshes and textures; a damaged file is noticed and replaced."""
    models = [standin_task.model, drawer_task.model]
    monkeypatch.setenv("RL_DATA_ENGINE_CACHE", str(tmp_path))
    rest, names = store.save(models[0])
    assert len(names) == models[0].nmesh + models[0].ntex and binary(store.load(rest, names)) == binary(models[0])
    assert sum(array.nbytes for array in rest.values()) < 0.1 * len(binary(models[0]))
    files = sorted((tmp_path / "meshes").iterdir(), key=lambda path: path.stat().st_size)
    second, more = store.save(models[1])
    assert binary(store.load(second, more)) == binary(models[1])
    robot = {models[0].mesh(i).name for i in range(models[0].nmesh)} & {models[1].mesh(i).name for i in range(models[1].nmesh)}
    assert len(robot) >= 20 and len(set(names) & set(more)) >= len(robot)
    good = files[-1].read_bytes()
    for damage in (good[:-100], good[:200] + b"\0" + good[201:], zlib.compress(b"another")):
        files[-1].write_bytes(damage)
        with pytest.raises(store.Damaged, match=files[-1].stem):
            store.load(rest, names)
        assert store.save(models[0])[1] == names and files[-1].read_bytes() == good
    files[-1].unlink()
    with pytest.raises(store.Damaged):
        store.load(rest, names)


def files_of(task_id: str) -> tuple[Path, Path]:
    files = find_task(task_id)
    return files.bddl, files.init_states


def test_what_the_key_covers(assets, tmp_path, monkeypatch):
    """An edited BDDL file, other init states, other assets or another MuJoCo: another cache entry."""
    root = tmp_path / "libero"
    for file in files_of("libero_goal/7"):
        copy = root / file.relative_to(libero_root())
        copy.parent.mkdir(parents=True)
        shutil.copy(file, copy)
    folder = find_assets(assets)
    keys = [tasks.cache_file(find_task("libero_goal/7"), folder)]
    monkeypatch.setattr(suites, "libero_root", lambda: root)
    assert tasks.cache_file(find_task("libero_goal/7"), folder) == keys[0]  # the content counts
    for file in files_of("libero_goal/7"):
        file.write_bytes(file.read_bytes() + b"\n")
        keys.append(tasks.cache_file(find_task("libero_goal/7"), folder))
    monkeypatch.setattr(tasks, "asset_names", lambda folder: ("libero:0", "libero:0-0"))
    keys.append(tasks.cache_file(find_task("libero_goal/7"), folder))
    monkeypatch.setattr(tasks.mujoco, "__version__", "3.3.7")
    keys.append(tasks.cache_file(find_task("libero_goal/7"), folder))
    assert len(set(keys)) == 5


def test_demonstrations_are_kept_for_one_bddl_text(standin_task):
    edited = dataclasses.replace(standin_task, bddl=standin_task.bddl + "\n")
    assert kept_file(standin_task, "demos", "hdf5") != kept_file(edited, "demos", "hdf5")


def test_cached_task_needs_no_libero(assets, drawer_task):
    """From the cache, neither LIBERO nor robosuite nor torch is imported, and the task steps."""
    result = run_python(
        f"""
import sys
from common.libero import make_env
from common.libero import load_task
env = make_env(load_task('libero_goal/0', {assets!r}))
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


def test_importing_libero_in_a_strange_place(tmp_path):
    """A configured folder without a configuration stays empty, another user's robosuite.log is not touched, MUJOCO_GL is left alone."""
    code = """if True:
        import logging, os
        def refused(path, *args, **kwargs):
            raise PermissionError(f"{path} belongs to another user")
        logging.FileHandler = refused
        from common.libero.original import import_libero
        print(import_libero(None).__name__, os.environ["LIBERO_CONFIG_PATH"])
    """
    (tmp_path / "empty").mkdir()
    environment = {"LIBERO_CONFIG_PATH": str(tmp_path / "empty"), "RL_DATA_ENGINE_CACHE": str(tmp_path / "cache")}
    result = run_python(code, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == f"ControlEnv {tmp_path / 'empty'}"
    assert not list((tmp_path / "empty").iterdir())


def test_official_init_states(drawer_task):
    for suite, index in (("libero_spatial", 3), ("libero_object", 9), ("libero_goal", 0), ("libero_10", 8), ("libero_90", 89)):
        states = official_init_states(suite, index)
        assert states.shape[0] == 50 and states.dtype == np.float64 and np.isfinite(states).all()
    model = drawer_task.model
    assert drawer_task.init_states.shape == (50, 1 + model.nq + model.nv)
    np.testing.assert_array_equal(drawer_task.init_states, official_init_states("libero_goal", 0))


def test_init_states_are_torch_s():
    torch = pytest.importorskip("torch")
    path = find_task("libero_goal/0").init_states
    np.testing.assert_array_equal(official_init_states("libero_goal", 0), torch.load(path, weights_only=False))


def test_init_states_are_read_without_running_code(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    import torch

    path = tmp_path / "init_files" / "libero_goal" / "open_the_middle_drawer_of_the_cabinet.pruned_init"
    path.parent.mkdir(parents=True)
    assert task_names()  # read before
    monkeypatch.setattr(suites, "libero_root", lambda: tmp_path)
    torch.save(Evil(), path)
    with pytest.raises(UserError, match="mkdir has no place"):
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
