"""Inputs that nobody thought of (hypothesis): files, task names, flags and actions end as they should or in one UserError; the list of bad
inputs in docs/bad_inputs.md is what our commands say; no loader runs what is in a file."""

from __future__ import annotations

import importlib
import io
import math
import os
import pickle
import re
import typing
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from test_data import TASK, episode

from benchmarks import bad_inputs
from common import suites
from common.cli import Range, UserError
from common.data import check_file, read_attrs, read_episodes, write_episodes
from common.data.vla import read_corpora
from common.libero import make_env, original
from common.runs import load_checkpoint
from common.suites import expand, resolve, task_names
from common.vla_model import load_model

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = pytest.importorskip("hypothesis.strategies")
arrays = pytest.importorskip("hypothesis.extra.numpy").arrays

ROOT = Path(__file__).resolve().parent.parent
few = hypothesis.settings(
    max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.5, -7.0, 1e300, -1e300, 5e-324, 1e-310, math.inf, -math.inf, math.nan]
numbers = st.one_of(st.sampled_from(SPECIAL), st.floats(-2, 2))


def one_line(error: Exception) -> bool:
    return bool(str(error)) and "\n" not in str(error)


# ---------------------------------------------------------------------------------------------- files

KEYS = ["actions", "states", "robot_states", "rewards", "dones"]
KEYS += [f"obs/{name}" for name in ("ee_pos", "ee_ori", "ee_quat", "ee_states", "gripper_states", "joint_states", "agentview_rgb")]
DTYPES = ["f8", "f4", "f2", "i8", "u1", "?", "c16", "S5", "M8[s]", [("a", "f8"), ("b", "i4")]]
shapes = st.one_of(st.just(None), st.lists(st.integers(0, 8), min_size=0, max_size=4).map(tuple))  # None: as it was


@st.composite
def changes(draw):
    """What is done to a file: a dataset replaced, an attribute set, or bytes overwritten or cut off."""
    kind = draw(st.sampled_from(["dataset", "attribute", "bytes", "end"]))
    if kind == "dataset":
        values = draw(st.lists(numbers, min_size=1, max_size=9))
        return kind, draw(st.sampled_from(KEYS)), draw(shapes), draw(st.sampled_from(DTYPES)), values
    if kind == "attribute":
        names = ["problem_info", "env_args", "bddl_file_name", "macros_image_convention", "num_demos", "success", "final_state"]
        names.append("model_file")
        value = st.one_of(st.text(max_size=20).filter(lambda t: "\0" not in t), st.integers(-5, 2**40), numbers, st.binary(max_size=9))
        return kind, draw(st.sampled_from(names)), draw(st.booleans()), draw(st.one_of(value, st.lists(numbers, max_size=4)))
    return kind, draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=40))


def apply(change, path: Path) -> None:
    kind, *what = change
    if kind == "bytes":
        content = bytearray(path.read_bytes())
        at = int(what[0] * (len(content) - 1))
        content[at : at + len(what[1])] = what[1]
        path.write_bytes(content)
    elif kind == "end":
        os.truncate(path, int(what[0] * path.stat().st_size))
    else:
        with h5py.File(path, "r+") as file:
            if kind == "attribute":
                name, on_demo, value = what
                group = file["data/demo_0"] if on_demo else file["data"]
                group.attrs[name] = np.void(value) if isinstance(value, bytes) and value else value
                return
            key, shape, dtype, values = what
            shape = file[f"data/demo_0/{key}"].shape if shape is None else shape
            kind_ = np.dtype(dtype)
            new = np.zeros(shape, kind_)
            if kind_.kind in "fiu?c":
                with np.errstate(all="ignore"):
                    new = np.resize(np.array(values), shape).astype(kind_)
            del file[f"data/demo_0/{key}"]
            if kind_.kind == "M":  # a type that HDF5 has no word for
                new = new.astype("S19")
            file[f"data/demo_0/{key}"] = new


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "a.hdf5"
    write_episodes(path, [episode(seed, 6, images=True) for seed in range(2)], TASK, {"script": "test", "renderer": "warp", "assets": "x"})
    return path.read_bytes()


@pytest.mark.filterwarnings("error")
@few
@hypothesis.given(st.lists(changes(), min_size=1, max_size=2))
@hypothesis.example([("dataset", "states", None, "c16", [1.0])])
@hypothesis.example([("dataset", "actions", None, "f4", [math.nan])])
@hypothesis.example([("attribute", "num_demos", False, 2**40)])
def test_a_file_is_read_as_it_should_be_or_refused_in_one_line(sound, tmp_path_factory, made):
    path = tmp_path_factory.getbasetemp() / "libero_goal" / "open_the_middle_drawer_of_the_cabinet_demo.hdf5"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(sound)
    try:
        for change in made:
            apply(change, path)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError):
        hypothesis.assume(False)  # of two changes the second isn't possible any more
    task = SimpleNamespace(**vars(TASK))
    for read in (lambda: read_episodes(path, task), lambda: check_file(path, task), lambda: read_attrs(path), lambda: read_corpora([path])):
        try:
            found = read()
        except UserError as error:
            assert one_line(error) and str(path) in str(error)
            continue
        if isinstance(found, list) and found and hasattr(found[0], "actions"):
            for e in found:
                assert len(e.actions) == len(e.states) == len(e.proprio["ee_pos"]) > 1
                assert np.abs(e.actions).max() <= 1 and set(e.actions[:, 6]) <= {-1.0, 1.0}
                assert all(np.isfinite(x).all() for x in (e.actions, e.states, *e.proprio.values()))


# ---------------------------------------------------------------------------------------------- tasks and flags


@few
@hypothesis.given(st.one_of(st.text(max_size=30), st.from_regex(r"libero_(goal|90|10|spatial|x)/-?[0-9]{1,6}", fullmatch=True)))
def test_a_task_is_found_or_refused_in_one_line(name):
    for find in (resolve, lambda name: expand([name])):
        try:
            found = find(name)
        except UserError as error:
            assert one_line(error)
            continue
        if find is resolve:
            suite, index = found
            assert 0 <= index < len(task_names()[suite])


def ranges(hint) -> list[Range]:
    own = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)]
    return own + [r for part in typing.get_args(hint) for r in ranges(part)]


@pytest.mark.parametrize("script", ["dlr_discover", "gaussian_ppo", "diffusion_ppo", "vla_pretrain", "vla_finetune"])
def test_every_number_has_a_range_and_none_may_be_nan(script):
    cls = importlib.import_module(script).Args
    seen = 0
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if not {int, float} & set(re.findall(r"\b(int|float)\b", str(hint)) and [int, float]) or "bool" in str(hint) or "list" in str(hint):
            continue
        seen += 1
        (allowed,) = ranges(hint)
        for value in (math.nan, -math.inf, math.inf, -1e300, *([1e300] if allowed.high < 1e300 else [])):
            if allowed.infinite and value == math.inf or allowed.low == -math.inf == allowed.above or allowed.holds(value):
                continue
            with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be") as error:
                cls(**{name: value})
            assert one_line(error.value)
        assert not allowed.holds(math.nan)
    assert seen > 10


# ---------------------------------------------------------------------------------------------- actions

kinds = st.sampled_from(["f8", "f4", "f2", "i8", "i1", "u2", "?", "c8", "S3", "U3", "O"])


@st.composite
def actions(draw):
    shape = draw(st.one_of(st.just((1, 7)), st.lists(st.integers(0, 8), max_size=3).map(tuple)))
    values = draw(st.lists(numbers, min_size=1, max_size=7))
    with np.errstate(all="ignore"):
        return np.resize(np.array(values), shape).astype(draw(kinds))


@few
@hypothesis.given(actions())
@hypothesis.example(np.full((1, 7), 5e-324))
@hypothesis.example(np.full((1, 7), 1e300))
def test_an_action_is_clipped_or_refused(small, given):
    """What is no finite number, or of another shape, is a ValueError that leaves the state alone; all else acts as if clipped."""
    start = small.snapshot()
    before = small.get_state()
    try:
        small.step(given)
    except ValueError as error:
        good = given.shape == (1, 7) and given.dtype.kind in "fiu?" and np.isfinite(given).all()
        assert not good and "actions must be finite numbers of shape (1, 7)" in str(error)
        np.testing.assert_array_equal(small.get_state(), before)
        return
    found = small.get_state()
    assert np.isfinite(found).all()
    small.restore(start)
    small.step(np.clip(given.astype(np.float64), -1, 1))
    np.testing.assert_array_equal(small.get_state(), found)
    small.restore(start)


@pytest.fixture(scope="module")
def small(drawer_task):
    env = make_env(drawer_task, 1, seed=0, settle_steps=0, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(options={"init_state": 0})
    yield env
    env.close()


# ---------------------------------------------------------------------------------------------- loaders


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_loader_runs_what_is_in_a_file(tmp_path, monkeypatch, protocol):
    """Checkpoints, VLA models, init states and demonstrations: a pickle, plain and as torch writes it, that would make a folder."""
    trap = Hostile(tmp_path / "executed")
    plain = pickle.dumps({"script": "vla", "model": trap}, protocol)
    archive = io.BytesIO()
    torch.save({"script": "vla", "model": trap}, archive)
    states = tmp_path / "init_files" / "libero_goal" / "open_the_middle_drawer_of_the_cabinet.pruned_init"
    states.parent.mkdir(parents=True)
    assert task_names()  # read before
    monkeypatch.setattr(suites, "libero_root", lambda: tmp_path)
    file = tmp_path / "file"
    for content in (plain, archive.getvalue()):
        file.write_bytes(content)
        states.write_bytes(content)
        for load in (
            lambda: load_checkpoint(file, "vla"),
            lambda: load_model(file),
            lambda: read_episodes(file, TASK),
            lambda: read_attrs(file),
            lambda: read_corpora([file]),
            lambda: original.official_init_states("libero_goal", 0),
        ):
            with pytest.raises(UserError) as error:
                load()
            assert one_line(error.value)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileExistsError):  # it is armed
        (tmp_path / "executed").mkdir()
        pickle.loads(plain)


def test_init_states_are_finite_numbers_of_one_shape(tmp_path, monkeypatch):
    states = tmp_path / "init_files" / "libero_goal" / "open_the_middle_drawer_of_the_cabinet.pruned_init"
    states.parent.mkdir(parents=True)
    assert task_names()  # read before
    monkeypatch.setattr(suites, "libero_root", lambda: tmp_path)
    torch.save(np.zeros((50, 9)), states)
    assert original.official_init_states("libero_goal", 0).shape == (50, 9)
    whole = states.read_bytes()
    for broken in (np.zeros(9), np.full((50, 9), np.nan), np.zeros((0, 9)), "words", [np.zeros(3), np.zeros(4)]):
        torch.save(broken, states)
        with pytest.raises(UserError, match="no file of init states.*install LIBERO again"):
            original.official_init_states("libero_goal", 0)
    for content in (b"", whole[:200], whole[:-30], b"PK\3\4" + whole[4:100]):
        states.write_bytes(content)
        with pytest.raises(UserError, match="no file of init states"):
            original.official_init_states("libero_goal", 0)


# ---------------------------------------------------------------------------------------------- the list


def test_the_list_of_bad_inputs_is_what_the_commands_say(monkeypatch, assets):
    monkeypatch.setenv("LIBERO_ASSETS", str(assets))
    found = bad_inputs.lines()
    assert len(found) >= 40 and all(one_line(ValueError(line)) for line in found.values())
    page = (ROOT / "docs" / "bad_inputs.md").read_text()
    assert page.endswith("\n" + bad_inputs.table(found).rstrip() + "\n"), "run: python -m benchmarks.bad_inputs --write docs/bad_inputs.md"
