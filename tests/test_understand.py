"""Files that people have: what differs from LIBERO's layout is read, left out or refused, and said in a line."""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from test_data import NQ, NV, TASK, at, attr, episode, put

from common.cli import UserError, atomic_path
from common.data import check_file, read_attrs, read_episodes, write_episodes
from common.data import write as write_module
from common.data.__main__ import main
from common.data.understand import understand
from common.data.write import portable
from common.job import load_demos
from common.libero.judge import goal_reached
from common.runs import Progress
from common.suites import SUITES, instruction, task_names

LENGTHS = (7, 5, 9)


def truth(**changes):
    return [episode(seed, length, images=True, **changes) for seed, length in enumerate(LENGTHS)]


@pytest.fixture
def path(tmp_path):
    """A sound file of three episodes of 7, 5 and 9 steps, with pictures."""
    write_episodes(tmp_path / "a.hdf5", truth(), TASK, {"script": "test"})
    return tmp_path / "a.hdf5"


def every(change, *keys):
    """The same change of datasets of all demonstrations."""

    def changed(file):
        for name in file["data"]:
            for key in keys:
                put(f"{name}/{key}", change)(file)

    return changed


def no_attributes(file):
    for group in (file["data"], *file["data"].values()):
        for key in list(group.attrs):
            del group.attrs[key]


def human(file):
    """As LIBERO's own files: without what is ours."""
    for demo in file["data"].values():
        for key in set(demo.attrs) - {"num_samples", "model_file", "init_state"}:
            del demo.attrs[key]


def both(*changes):
    def changed(file):
        for change in changes:
            change(file)

    return changed


def renumbered(file):
    for i in (2, 1, 0):
        file["data"].move(f"demo_{i}", f"demo_{i + 1}")


def step_removed(file):
    for demo in file["data"].values():
        for group in (demo, demo["obs"]):
            for key in [k for k in group if isinstance(group[k], h5py.Dataset)]:
                kept = np.delete(group[key][()], 2, axis=0)
                del group[key]
                group[key] = kept
        demo.attrs["num_samples"] = len(demo["actions"])
    file["data"].attrs["total"] = sum(LENGTHS) - 3


def extra(file):
    file["data"].create_group("notes")
    file["data/demo_0"]["actions_abs"] = np.zeros(3)


def masked(file):
    file["mask/train"] = np.array([b"demo_0", b"demo_2"])
    file["mask/valid"] = np.array([b"demo_1", b"demo_9"])


# change -> what the line says; None: nothing has to be said
READ = {
    "no attributes": (no_attributes, "no attributes on data; taken to be of open_the_drawer; pictures taken to be stored bottom row first"),
    "some attributes": (attr("env_name", None), "attributes missing or unreadable: env_name"),
    "broken json": (attr("problem_info", "{'a"), "attributes missing or unreadable: problem_info"),
    "stale bddl path": (attr("bddl_file_name", "C:\\libero\\open_the_drawer.bddl"), None),
    "float32": (every(lambda a: a.astype("f4"), "obs/ee_pos"), "obs/ee_pos stored as float32"),
    "integers": (every(lambda a: np.round(a).astype("i4"), "obs/ee_pos"), "obs/ee_pos stored as int32"),
    "no rewards": (every(lambda a: None, "rewards", "dones"), "no reward at the end, done by the attribute success"),
    "rewards as numbers": (every(lambda a: a.astype("f4"), "rewards"), None),
    "human, no rewards": (both(human, every(lambda a: 0 * a, "rewards")), "neither rewards nor attributes say whether the task was done"),
    "demonstrations dropped": (lambda f: f["data"].pop("demo_1"), "num_demos says 3, there are 2; total says 21, there are 16"),
    "members": (extra, "left aside: notes, demo_0/actions_abs"),
    "from 1": (renumbered, None),
    "steps removed": (step_removed, None),
    "num_samples": (attr("num_samples", 3, "data/demo_1"), "attribute num_samples is not the number of actions (demo_1)"),
    "init_state": (attr("init_state", np.zeros(23), "data/demo_1"), "attribute init_state is not states[0] (demo_1)"),
    "no model_file": (attr("model_file", None, "data/demo_0"), "attributes missing: model_file (demo_0)"),
    "final_state": (attr("final_state", np.zeros(4), "data/demo_2"), "attribute final_state is no state, left aside (demo_2)"),
    "without what is not needed": (every(lambda a: None, "robot_states", "obs/ee_states", "dones"), None),
    "pose in one": (every(lambda a: None, "obs/ee_pos", "obs/ee_ori"), None),
    "masks": (masked, "all demonstrations are read; --filter-key chooses among train, valid"),
    "out of range": (put("demo_1/actions", at((2, 0), 1.4)), "actions up to 1.4 clipped to 1, as the controller does (demo_1)"),
    "gripper between": (put("demo_1/actions", at((2, 6), -0.4)), "gripper commands such as -0.4 taken by their sign"),
}


@pytest.mark.parametrize(("change", "line"), READ.values(), ids=READ)
def test_what_can_be_understood_is_read(path, caplog, change, line):
    with h5py.File(path, "r+") as file:
        change(file)
    episodes = read_episodes(path, TASK, images=True)
    lines = [record.getMessage() for record in caplog.records]
    if line is None:
        assert lines == []
    else:
        assert len(lines) == 1 and lines[0].startswith(f"{path}: ") and line in lines[0]
    names = sorted(h5py.File(path)["data"])
    wanted = truth() if len(episodes) == 3 else [truth()[0], truth()[2]]
    assert len(episodes) == sum(name.startswith("demo_") for name in names) == len(wanted)
    for found, good in zip(episodes, wanted, strict=True):
        assert found.success and found.actions.dtype == np.float64 and set(found.actions[:, 6]) <= {-1.0, 1.0}
        rows = np.delete(np.arange(good.length), 2) if change is step_removed else slice(None)
        states = found.states  # bit for bit, but for the one number that was changed, and is clipped or a sign again
        np.testing.assert_array_equal(states, good.states[rows])
        off = found.actions != good.actions[rows]
        assert off.sum() <= ("out of range" in str(line)) + (line is not None and ("clipped" in line or "sign" in line))
        if "int32" not in str(line):
            np.testing.assert_allclose(found.proprio["ee_pos"], good.proprio["ee_pos"][rows], rtol=1e-6)
        np.testing.assert_array_equal(found.images["agentview_rgb"], good.images["agentview_rgb"][rows])


@pytest.mark.parametrize("closes", [1, 0])
def test_a_gripper_of_0_and_1(path, caplog, closes):
    """Which of the two closes it is read off the fingers."""

    def change(file):
        for demo in file["data"].values():
            demo["actions"][:, 6] = (demo["actions"][:, 6] * (1 if closes else -1) + 1) / 2

    episodes = []
    for seed, length in enumerate((40, 30)):
        e = episode(seed, length)
        e.actions[:, 6] = np.repeat([-1, 1, -1, 1, -1, 1], 10)[:length]
        opening = 0.04 - 0.004 * np.cumsum(np.append(0, e.actions[:, 6])).clip(-3, 3)
        states = np.vstack([e.states, e.final_state])
        states[:, 8], states[:, 9] = opening, -opening
        e.states, e.final_state, e.proprio["gripper_states"] = states[:-1], states[-1], states[1:, 8:10]
        episodes.append(e)
    write_episodes(path, episodes, TASK, {})
    with h5py.File(path, "r+") as file:
        change(file)
    for found, good in zip(read_episodes(path, TASK), episodes, strict=True):
        np.testing.assert_array_equal(found.actions, good.actions)
    assert f"gripper commands 0 and 1, of which {closes} closes the fingers" in caplog.text


def test_a_hand_that_is_always_closed_is_no_other_convention(path):
    write_episodes(path, [episode(0, 9, actions=np.ones((9, 7)))], TASK, {})
    assert understand(path, TASK).gripper == (0.0, 1.0)


def before(file):
    """As regenerated files have it: seen before the action, the first time at rest somewhere."""
    for demo in file["data"].values():
        for key in demo["obs"]:
            seen = demo[f"obs/{key}"][()]
            demo[f"obs/{key}"][:] = np.concatenate([seen[:1], seen[:-1]])


def test_what_was_seen_before_the_action_is_told_by_the_states(path, caplog):
    assert not understand(path, TASK).before
    with h5py.File(path, "r+") as file:
        before(file)
    assert check_file(path, TASK)[0] == "obs: of before each action, not after it, as the states tell"
    for found, good in zip(read_episodes(path, TASK, images=True), truth(), strict=True):
        for key in good.proprio:  # the last row isn't in the file: it is that of one step earlier
            np.testing.assert_array_equal(found.proprio[key], good.proprio[key][[*range(good.length - 1), -2]])
        np.testing.assert_array_equal(found.images["agentview_rgb"][:-1], good.images["agentview_rgb"][:-1])
        np.testing.assert_array_equal(found.states, good.states)
    assert "of before the action, not after it: moved by one step" in caplog.text
    with h5py.File(path, "r+") as file:  # unrelated: no guess, but a word
        for demo in file["data"].values():
            demo["obs/joint_states"][:] = np.random.default_rng(0).normal(size=demo["obs/joint_states"].shape)
    assert not understand(path, TASK).before and "the states do not tell" in understand(path, TASK).notes[0]


def cut(file):
    for group in (file["data/demo_1"], file["data/demo_1/obs"]):
        for key in [k for k in group if isinstance(group[k], h5py.Dataset)]:
            last = group[key][-1:]
            del group[key]
            group[key] = last


def huge(file):
    """Terabytes in a file of kilobytes: said to be there, and never written."""
    del file["data/demo_1/states"]
    file.create_dataset("data/demo_1/states", (2**37, 23), "f8", chunks=True, compression="gzip")


LEFT_OUT = {
    "quaternion, NaN": (put("demo_1/obs/ee_quat", at((2, 0), np.nan)), "obs/ee_quat: NaN or infinite at step 2"),
    "quaternion, lengths": (put("demo_1/obs/ee_quat", lambda a: a[:-1]), "obs/ee_quat has 4 steps, actions 5"),
    "huge": (huge, "/data/demo_1/states says to hold 2.53e+04 GB, of which 0 bytes are there"),
    "one step": (cut, "a single step"),
    "no steps": (put("demo_1/actions", lambda a: a[:0]), "states has 5 steps, actions 0"),
    "nan": (put("demo_1/states", at((4, 9), np.nan)), "states: NaN or infinite at step 4"),
    "lengths": (put("demo_1/states", lambda a: a[:-2]), "states has 3 steps, actions 5"),
    "missing": (put("demo_1/obs/joint_states", lambda a: None), "obs/joint_states is missing"),
    "shape": (put("demo_1/actions", lambda a: a[:, :6]), "actions: float64 of shape (5, 6), expected numbers of (T, 7)"),
    "text": (put("demo_1/obs/ee_pos", lambda a: a.astype("S8")), "obs/ee_pos: |S8 of shape (5, 3), expected numbers of (T, 3)"),
    "scale": (put("demo_1/actions", lambda a: 60 * a), "of another scale than [-1, 1]"),
    "width": (put("demo_1/states", lambda a: a[:, :-1]), "states of 22 numbers, not 23"),
    "picture size": (put("demo_1/obs/agentview_rgb", lambda a: a[:, :4]), "pictures {'agentview_rgb': (4, 6)"),
    "picture type": (put("demo_1/obs/agentview_rgb", lambda a: a / 255), "pictures {'eye_in_hand_rgb': (8, 6)}, not"),
    "no pictures": (lambda f: f["data/demo_1/obs"].pop("agentview_rgb"), "pictures {'eye_in_hand_rgb': (8, 6)}, not"),
}


@pytest.mark.parametrize(("change", "reason"), LEFT_OUT.values(), ids=LEFT_OUT)
@pytest.mark.parametrize("task", [TASK, None])
def test_a_demonstration_that_cannot_be_used_is_left_out(path, caplog, change, reason, task):
    with h5py.File(path, "r+") as file:
        change(file)
    episodes = read_episodes(path, task, images=True)
    assert [e.length for e in episodes] == [7, 9]
    np.testing.assert_array_equal(episodes[1].actions, truth()[2].actions)
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert line.startswith(f"{path}: left out demo_1 (") and reason in line
    if "pictures" in reason:  # without them it can be used
        assert len(read_episodes(path, task)) == 3


def scene(joint):
    return (
        f'<mujoco><joint name="robot0_joint1"/><body><freejoint name="bowl_1_joint0"/></body><joint type="hinge" name="{joint}"/></mujoco>'
    )


REFUSED = {
    "task": (attr("bddl_file_name", "/x/close_it.bddl"), "made for another task: close_it.bddl, not open_the_drawer.bddl"),
    "task by name": (no_attributes, "made for another task: open_the_top_drawer_and_put_the_bowl_inside, by its name, not open_the_drawer"),
    "convention": (attr("macros_image_convention", "vulkan"), "macros_image_convention is 'vulkan', expected 'opengl' or 'opencv'"),
    "success": (attr("success", False, "data/demo_1"), "demo_1 contradicts itself: by its attribute success it failed"),
    "nothing usable": (
        every(lambda a: a[:-1], "states"),
        "no demonstration can be used: demo_0: states has 6 steps, actions 7 (and 2 more)",
    ),
    "foreign": (lambda f: f.move("data", "episodes"), "foreign layout"),
    "scene": (attr("model_file", scene("stove_knob"), "data/demo_0"), "made in another scene: where the task's has drawer, the file's has"),
    "smaller scene": (attr("model_file", scene("")[:-30], "data/demo_0"), "where the task's has drawer, the file's has nothing more"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_contradicts_itself_or_the_task_is_refused(path, change, message):
    task = SimpleNamespace(**{**vars(TASK), "xml": scene("drawer")})
    write_episodes(path, truth(), task, {})
    read_episodes(path, task)
    if change is no_attributes:
        path = path.rename(path.parent / "open_the_top_drawer_and_put_the_bowl_inside_demo.hdf5")
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(UserError) as caught:
        read_episodes(path, task)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_all_the_same(path, tmp_path):
    (tmp_path / "half.hdf5").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="half.hdf5: truncated: the end of the file is missing"):
        read_episodes(tmp_path / "half.hdf5", TASK)


def test_robomimics_filter_keys(path, caplog):
    with h5py.File(path, "r+") as file:
        masked(file)
    assert [e.length for e in read_episodes(path, TASK, filter_key="train")] == [7, 9] and not caplog.records
    assert [e.length for e in read_episodes(path, TASK, filter_key="valid")] == [5]
    assert "mask/valid names demo_9, which is not there" in caplog.text
    with pytest.raises(UserError, match="no filter key 'test'; it has train, valid"):
        read_episodes(path, TASK, filter_key="test")
    with h5py.File(path, "r+") as file:
        file["mask/none"] = np.array([b"demo_7"])
    with pytest.raises(UserError, match="mask/none names no demonstration that is there"):
        read_episodes(path, TASK, filter_key="none")
    write_episodes(path, truth(), TASK, {})
    with pytest.raises(UserError, match="it has none"):
        read_episodes(path, TASK, filter_key="train")


def test_filter_keys_of_the_scripts(demos, drawer_task, tmp_path):
    with h5py.File(shutil.copy(demos, tmp_path / "a.hdf5"), "r+") as file:
        masked(file)
    how = (drawer_task, 8, 0.1, 0, Progress(1e9))
    chosen, source = load_demos(str(tmp_path / "a.hdf5"), *how, filter_key="train")
    assert len(chosen) == 2 and source == f"{tmp_path / 'a.hdf5'} (filter key train)"
    with pytest.raises(UserError, match="--filter-key is for a file of demonstrations"):
        load_demos("scripted", *how, filter_key="train")


def test_robomimic_takes_the_same_demonstrations(path):
    dataset_module = pytest.importorskip("robomimic.utils.dataset", reason="robomimic is not installed")
    obs_utils = pytest.importorskip("robomimic.utils.obs_utils")
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": ["ee_pos"]}})
    with h5py.File(path, "r+") as file:
        masked(file)
    theirs = dataset_module.SequenceDataset(
        hdf5_path=str(path), obs_keys=["ee_pos"], dataset_keys=["actions"], hdf5_cache_mode=None, filter_by_attribute="train"
    )
    ours = read_episodes(path, TASK, filter_key="train")
    assert theirs.n_demos == len(ours) and len(theirs) == sum(e.length for e in ours)


def test_the_task_of_a_file_without_attributes_is_in_its_name(path, tmp_path):
    name = "open_the_middle_drawer_of_the_cabinet"
    with h5py.File(path, "r+") as file:
        no_attributes(file)
    assert understand(path).suite is None and understand(path).name is None
    folder = tmp_path / "libero_goal_no_noops"
    folder.mkdir()
    shutil.copy(path, folder / f"{name}_demo.hdf5")
    source = understand(folder / f"{name}_demo.hdf5")
    assert (source.suite, source.name) == ("libero_goal", name)
    assert source.language == "open the middle layer of the drawer"  # as its BDDL file has it
    assert f"by the file's name, of libero_goal/{name}" in source.notes


def test_instructions_are_those_of_the_tasks(drawer_task):
    assert instruction(drawer_task.suite, drawer_task.index) == drawer_task.language
    every_one = [instruction(suite, i) for suite in SUITES for i in range(len(task_names()[suite]))]
    assert len(every_one) == 130 and all(text and "(" not in text for text in every_one)


# --------------------------------------------------------------------------------------------------------------- success


def test_the_goal_decides_where_the_file_does_not(drawer_task, demos, tmp_path, caplog):
    """Of three demonstrations: one whole, one that stops amid its way, one that stops before its last action."""
    good = read_episodes(demos, drawer_task)[:3]
    lengths = [good[0].length, good[1].length // 2, good[2].length]
    shutil.copy(demos, tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        for i in range(3, 20):
            del file[f"data/demo_{i}"]
        human(file)
        for i, length in enumerate(lengths):
            for group in (file[f"data/demo_{i}"], file[f"data/demo_{i}/obs"]):
                for key in [k for k in group if isinstance(group[k], h5py.Dataset)]:
                    part = group[key][:length]
                    del group[key]
                    group[key] = 0 * part if key == "rewards" else part
    judge = functools.partial(goal_reached, drawer_task)
    found = read_episodes(tmp_path / "a.hdf5", drawer_task, judge=judge)
    assert [e.success for e in found] == [True, False, True]
    assert "LIBERO's goal on the last state does: 2 of 3 are" in caplog.text
    assert all(e.success for e in read_episodes(tmp_path / "a.hdf5", drawer_task))  # without a judge
    assert goal_reached(drawer_task, good) == [True] * 3  # the state after the last action is known
    assert read_episodes(demos, drawer_task, judge=lambda episodes: pytest.fail("the file says it"))


# ---------------------------------------------------------------------------------------------------------------- mending


def test_a_file_is_mended(drawer_task, demos, assets, tmp_path, monkeypatch, capsys):
    """Regenerated as OpenVLA does: no attributes, seen before the action, float32; and one demonstration is damaged."""
    monkeypatch.setenv("LIBERO_ASSETS", assets)
    good, file_name = read_episodes(demos, drawer_task), tmp_path / f"{drawer_task.name}_demo.hdf5"
    shutil.copy(demos, file_name)
    with h5py.File(file_name, "r+") as file:
        for i in range(4, 20):
            del file[f"data/demo_{i}"]
        before(file)
        no_attributes(file)
        put("demo_1/states", at((4, 9), np.nan))(file)
        put("demo_0/actions", lambda a: a.astype("f4"))(file)
        every(lambda a: 0 * a, "rewards")(file)
    assert len(check_file(file_name)) > 10
    main([file_name], repair=tmp_path / "clean.hdf5")
    assert check_file(tmp_path / "clean.hdf5", drawer_task) == []
    found = read_episodes(tmp_path / "clean.hdf5", drawer_task)
    for mended, original in zip(found, [good[0], good[2], good[3]], strict=True):
        assert mended.success
        np.testing.assert_allclose(mended.actions, original.actions, atol=1e-7)
        np.testing.assert_array_equal(mended.states, original.states)
        np.testing.assert_array_equal(mended.proprio["joint_states"][:-1], original.proprio["joint_states"][:-1])
    repaired = read_attrs(tmp_path / "clean.hdf5")["repaired"]
    for part in ("no attributes", "by the file's name", "moved by one step", "float32", "3 of 3", "left out demo_1: states: NaN"):
        assert part in repaired
    assert repaired in capsys.readouterr().out
    for files, options, message in [
        ([file_name], {"repair": tmp_path / "clean.hdf5"}, "exists"),
        ([file_name] * 2, {"repair": tmp_path / "b.hdf5"}, "one file"),
        ([file_name], {"repair": tmp_path / "b.hdf5", "strict": True}, "without --strict"),
    ]:
        with pytest.raises(UserError, match=message):
            main(files, **options)
    file_name.rename(tmp_path / "x.hdf5")
    with pytest.raises(UserError, match="is not of a task of LIBERO's"):
        main([tmp_path / "x.hdf5"], repair=tmp_path / "b.hdf5")
    assert not (tmp_path / "b.hdf5").exists()


def test_what_was_fine_stays_as_it_was_in_a_mended_copy(drawer_task, demos, assets, tmp_path, monkeypatch):
    monkeypatch.setenv("LIBERO_ASSETS", assets)
    with h5py.File(shutil.copy(demos, tmp_path / "a.hdf5"), "r+") as file:
        file["data/demo_3"].attrs["model_file"] = file["data/demo_3"].attrs["model_file"].replace("bowl", "b0wl")
        put("demo_0/actions", at((0, 0), 1.5))(file)
    main([tmp_path / "a.hdf5"], repair=tmp_path / "b.hdf5")
    with h5py.File(tmp_path / "a.hdf5") as old, h5py.File(tmp_path / "b.hdf5") as new:
        assert {**new["data"].attrs, "repaired": ""} == {**old["data"].attrs, "repaired": ""}
        for name in old["data"]:
            a, b = old["data"][name], new["data"][name]
            assert {k: str(v) for k, v in a.attrs.items()}.items() <= {k: str(v) for k, v in b.attrs.items()}.items()
            for key in ("actions", "states", "robot_states", "rewards", "dones", *(f"obs/{k}" for k in a["obs"])):
                if (name, key) != ("demo_0", "actions"):
                    np.testing.assert_array_equal(a[key][()], b[key][()], strict=True)


def test_the_command_says_what_it_assumed(path, tmp_path):
    with h5py.File(path, "r+") as file:
        both(attr("total", 4), masked, cut)(file)

    def command(*arguments):
        return subprocess.run([sys.executable, "-m", "common.data", *map(str, arguments)], capture_output=True, text=True)

    result = command(path)
    words = " ".join(result.stdout.split())
    assert result.returncode == 0 and "episodes 2, 2 successful" in words and result.stderr == ""
    assert "assumed total says 4, there are 17; all demonstrations are read" in words and "left out demo_1 (a single step)" in words
    result = command(path, "--filter-key", "valid")
    assert result.returncode == 2 and "no demonstration can be used: demo_1: a single step" in result.stderr
    result = command(path, "--strict")
    assert result.returncode == 2 and result.stdout == "" and f"{path}: data: attribute total says 4" in result.stderr


# ------------------------------------------------------------------------------------------------ what surrounds the files


def test_a_locked_file_is_not_called_damaged(path, monkeypatch):
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="a.hdf5: locked: .* HDF5_USE_FILE_LOCKING=FALSE"):
            read_episodes(path, TASK)
        assert "locked" in check_file(path)[0]

    def no_locks(*args, **kwargs):
        raise OSError(37, "Unable to synchronously create file (unable to lock file, errno = 37, error message = 'No locks available')")

    monkeypatch.setattr(write_module.h5py, "File", no_locks)
    content = path.read_bytes()
    with pytest.raises(UserError, match="a.hdf5 is not written: locked: .* HDF5_USE_FILE_LOCKING=FALSE"):
        write_episodes(path, truth(), TASK, {})
    assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


def test_too_many_open_files_are_not_called_damage(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(open(os.devnull))  # noqa: SIM115
        with pytest.raises(UserError, match="a.hdf5: not opened, too many files are open in this process; raise the limit"):
            read_episodes(path, TASK)
    finally:
        for file in taken:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_filter_that_is_not_installed_is_not_called_damage(path):
    with h5py.File(path, "r+") as file:
        shape = file["data/demo_1/states"].shape
        del file["data/demo_1/states"]
        how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        how.set_chunk(shape)
        how.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())  # Zstandard
        space = h5py.h5s.create_simple(shape)
        h5py.h5d.create(file["data/demo_1"].id, b"states", h5py.h5t.NATIVE_DOUBLE, space, how).write_direct_chunk((0, 0), b"packed", 0)
    source = understand(path, TASK)
    assert "compressed with a filter that is not installed here" in source.skipped["demo_1"] and len(source.demos) == 2


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o027, 0o640), (0o002, 0o664)])
def test_the_umask_is_respected(tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("a")
        write_episodes(tmp_path / "a.hdf5", truth(), TASK, {})
    finally:
        os.umask(old)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a.txt", "a.hdf5")] == [mode, mode]


def test_a_scene_in_a_file_names_nobodys_folders(drawer_task, demos, assets):
    """Its files are found below where robosuite and LIBERO lie, by robosuite's rule of the last folder of that name."""
    files = h5py.File(demos)["data/demo_0"].attrs["model_file"].split('file="')[1:]
    files = {text[: text.index('"')] for text in files}
    assert len(files) > 50 and drawer_task.xml.count('file="/') > 50
    robosuite = Path(__import__("importlib.util").util.find_spec("robosuite").origin).parent
    for name in files:
        root, _, rest = name.rpartition("robosuite/")
        here = robosuite / rest if name.startswith("robosuite/") else Path(assets) / name.removeprefix("libero/libero/assets/")
        assert here.is_file() and root == ("" if name.startswith("robosuite/") else root)
    assert portable(portable(drawer_task.xml)) == portable(drawer_task.xml)
    assert json.dumps(sorted(files)).count(os.environ.get("HOME", "/home") + "/") == 0


def test_nothing_is_said_of_sound_files(path, demos, drawer_task, caplog):
    caplog.set_level(logging.INFO)
    assert NQ + NV == 22 and len(read_episodes(path, TASK)) == 3 and len(read_episodes(demos, drawer_task)) == 20
    assert caplog.records == [] and understand(demos, drawer_task).notes == []
