"""LIBERO's HDF5 layout: bit-exact round trips, robomimic's and LIBERO's own readers, every kind of damage."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import h5py
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from common.cli import UserError
from common.data import PROPRIO, Episode, Recorder, check_file, read_attrs, read_episodes, require_sound, write_episodes
from common.data.read import axis_angle_to_quat

NQ, NV = 12, 10
TASK = SimpleNamespace(
    name="open_the_drawer",
    language="open the drawer",
    problem_name="libero_tabletop_manipulation",
    bddl_file="/somewhere/libero/bddl_files/libero_goal/open_the_drawer.bddl",
    xml="<mujoco>" + "<body/>" * 20_000 + "</mujoco>",  # longer than the 64 KiB of a plain HDF5 attribute
    model=SimpleNamespace(nq=NQ, nv=NV),
)


def episode(seed=0, length=7, images=False, **changes) -> Episode:
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (length, 7))
    actions[:, 6] = rng.choice([-1.0, 1.0], length)
    quat = rng.normal(size=(length, 4))
    quat /= np.linalg.norm(quat, axis=1, keepdims=True)
    angle = 2 * np.arccos(quat[:, 3:])  # robosuite's quat2axisangle
    states = rng.normal(size=(length + 1, 1 + NQ + NV))  # of before each action, and after the last
    proprio = {
        "ee_pos": rng.normal(size=(length, 3)),
        "ee_ori": quat[:, :3] / np.sin(angle / 2) * angle,
        "ee_quat": quat,
        "gripper_states": states[1:, 8:10],
        "joint_states": states[1:, 1:8],
    }
    pixels = {name: rng.integers(0, 256, (length, 8, 6, 3), np.uint8) for name in ("agentview_rgb", "eye_in_hand_rgb")}
    fields = {
        "actions": actions,
        "states": states[:-1],
        "proprio": proprio,
        "images": pixels if images else {},
        "attrs": {"pattern": seed % 3, "strategy": f"rim{seed % 2}", "init_state": seed, "seed": seed, "speed": 0.1},
        "final_state": states[-1],
    }
    return Episode(**{**fields, **changes})


@pytest.fixture
def path(tmp_path):
    """A sound file of three episodes of 7, 5 and 9 steps, with pictures."""
    file = tmp_path / "open_the_drawer_demo.hdf5"
    lengths = (7, 5, 9)
    episodes = [episode(seed, length, images=True) for seed, length in enumerate(lengths)]
    write_episodes(file, episodes, TASK, {"script": "test", "mujoco": "3.8.1"})
    return file


# ----------------------------------------------------------------------------------------------------- writing, reading


def test_round_trip_is_bit_exact(tmp_path):
    """Eleven, so that demo_10 must not come before demo_2; one of them failed, the first without what is optional."""
    written = [episode(seed, 3 + seed, images=True, success=seed != 4) for seed in range(11)]
    written[0].final_state, written[0].attrs = None, {}
    write_episodes(tmp_path / "a.hdf5", iter(written), TASK, {"script": "test"})
    assert check_file(tmp_path / "a.hdf5", TASK) == []
    for images in (True, False):
        for old, new in zip(written, read_episodes(tmp_path / "a.hdf5", TASK, images=images), strict=True):
            assert old.length == new.length == len(new.actions)
            for name in ("actions", "states", "robot_states"):
                np.testing.assert_array_equal(getattr(old, name), getattr(new, name), strict=True)
            for old_arrays, new_arrays in ((old.proprio, new.proprio), (old.images if images else {}, new.images)):
                assert list(old_arrays) == list(new_arrays)
                for name in old_arrays:
                    np.testing.assert_array_equal(old_arrays[name], new_arrays[name], strict=True)
            assert (old.final_state is None) == (new.final_state is None)
            assert old.final_state is None or np.array_equal(old.final_state, new.final_state)
            assert new.success is old.success
            assert new.attrs == {"pattern": -1, "strategy": "", "init_state": -1, **old.attrs}
            assert {key: type(value) for key, value in old.attrs.items()} == {k: type(new.attrs[k]) for k in old.attrs}


def test_layout(path):
    """Names, types and shapes of the published demonstrations (LIBERO, scripts/create_dataset.py)."""
    with h5py.File(path) as file:
        assert list(file) == ["data"] and set(file["data"]) == {"demo_0", "demo_1", "demo_2"}
        attrs = dict(file["data"].attrs)
        assert attrs["num_demos"] == 3 and attrs["total"] == 21 and attrs["tag"] == "libero-v1"
        assert attrs["macros_image_convention"] == "opengl" and attrs["env_name"] == "Libero_Tabletop_Manipulation"
        assert attrs["bddl_file_name"] == "bddl_files/libero_goal/open_the_drawer.bddl"
        assert json.loads(attrs["problem_info"]) == {
            "problem_name": "libero_tabletop_manipulation",
            "domain_name": "robosuite",
            "language_instruction": "open the drawer",
        }
        kwargs = json.loads(attrs["env_args"])["env_kwargs"]
        assert (kwargs["camera_heights"], kwargs["camera_widths"], kwargs["control_freq"]) == (8, 6, 20)
        demo, truth = file["data/demo_1"], episode(1, 5, images=True)
        assert demo.attrs["num_samples"] == 5 and demo.attrs["model_file"] == TASK.xml
        np.testing.assert_array_equal(demo.attrs["init_state"], truth.states[0], strict=True)
        layout = {}
        demo.visititems(lambda key, item: layout.update({key: (item.shape, str(item.dtype))} if hasattr(item, "shape") else {}))
        assert layout == {
            "actions": ((5, 7), "float64"),
            "states": ((5, 1 + NQ + NV), "float64"),
            "robot_states": ((5, 9), "float64"),
            "rewards": ((5,), "uint8"),
            "dones": ((5,), "uint8"),
            "obs/agentview_rgb": ((5, 8, 6, 3), "uint8"),
            "obs/eye_in_hand_rgb": ((5, 8, 6, 3), "uint8"),
            "obs/ee_pos": ((5, 3), "float64"),
            "obs/ee_ori": ((5, 3), "float64"),
            "obs/ee_states": ((5, 6), "float64"),
            "obs/ee_quat": ((5, 4), "float64"),
            "obs/gripper_states": ((5, 2), "float64"),
            "obs/joint_states": ((5, 7), "float64"),
        }
        np.testing.assert_array_equal(demo["rewards"], [0, 0, 0, 0, 1])
        np.testing.assert_array_equal(demo["dones"], [0, 0, 0, 0, 1])
        np.testing.assert_array_equal(demo["obs/ee_states"][:, 3:], demo["obs/ee_ori"])
        np.testing.assert_array_equal(demo["obs/agentview_rgb"], truth.images["agentview_rgb"][:, ::-1])  # bottom row first


def test_controller_is_robosuites(path):
    spec = importlib.util.find_spec("robosuite")  # not imported: that would load a GL library
    if spec is None:
        pytest.skip("robosuite is not installed")
    truth = json.loads((Path(spec.origin).parent / "controllers/config/osc_pose.json").read_text())
    assert read_attrs(path)["env_args"]["env_kwargs"]["controller_configs"] == truth


def test_human_file(path):
    """LIBERO's own files lack our attributes and the quaternion, and name the BDDL file of another machine."""
    with h5py.File(path, "r+") as file:
        file["data"].attrs["bddl_file_name"] = "chiliocosm/bddl_files/libero_goal/open_the_drawer.bddl"
        for key in ("script", "mujoco", "task"):
            del file["data"].attrs[key]
        for demo in file["data"].values():
            for key in set(demo.attrs) - {"num_samples", "model_file", "init_state"}:
                del demo.attrs[key]
            del demo["obs/ee_quat"]
    truth = episode(2, 9).proprio["ee_quat"]
    assert (truth[:, 3] < 0).any() and (truth[:, 3] > 0).any()
    human = read_episodes(path, TASK)[2]
    np.testing.assert_allclose(human.proprio["ee_quat"], truth, atol=1e-14)
    np.testing.assert_allclose(Rotation.from_rotvec(human.proprio["ee_ori"]).as_matrix(), Rotation.from_quat(truth).as_matrix())
    assert human.success is True and human.final_state is None and human.images == {}
    assert human.attrs == {"pattern": -1, "strategy": "", "init_state": -1}
    assert read_attrs(path)["bddl_file_name"] == "open_the_drawer.bddl"


def test_no_rotation_has_a_quaternion():
    np.testing.assert_array_equal(axis_angle_to_quat(np.zeros((1, 3))), [[0, 0, 0, 1]])


def test_image_convention(path):
    stored = h5py.File(path)["data/demo_0/obs/agentview_rgb"][()]
    np.testing.assert_array_equal(read_episodes(path, images=True)[0].images["agentview_rgb"], stored[:, ::-1])
    with h5py.File(path, "r+") as file:
        file["data"].attrs["macros_image_convention"] = "opencv"
    np.testing.assert_array_equal(read_episodes(path, images=True)[0].images["agentview_rgb"], stored)


def test_robomimic_reads_it(path):
    dataset_module = pytest.importorskip("robomimic.utils.dataset", reason="robomimic is not installed")
    obs_utils = pytest.importorskip("robomimic.utils.obs_utils")
    low_dim, rgb = ["ee_pos", "ee_states", "gripper_states", "joint_states"], ["agentview_rgb", "eye_in_hand_rgb"]
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": low_dim, "rgb": rgb}})
    sequences = dataset_module.SequenceDataset(
        hdf5_path=str(path),
        obs_keys=low_dim + rgb,
        dataset_keys=["actions", "rewards", "dones"],
        seq_length=3,
        load_next_obs=False,
        hdf5_cache_mode="low_dim",
    )
    truth = read_episodes(path, TASK, images=True)
    assert sequences.n_demos == 3 and len(sequences) == 21
    at = 0
    for one in truth:
        for t in range(one.length):
            steps = np.minimum([t, t + 1, t + 2], one.length - 1)  # robomimic repeats the last step
            item = sequences[at]
            at += 1
            np.testing.assert_array_equal(item["actions"], one.actions[steps].astype(np.float32))
            np.testing.assert_array_equal(item["rewards"], steps == one.length - 1)
            for name in ("ee_pos", "gripper_states", "joint_states"):
                np.testing.assert_array_equal(item["obs"][name], one.proprio[name][steps].astype(np.float32))
            upside_down = np.moveaxis(one.images["agentview_rgb"][steps][:, ::-1], -1, 1)  # robomimic: (., 3, H, W)
            np.testing.assert_array_equal(item["obs"]["agentview_rgb"], (upside_down / 255).astype(np.float32))


def test_liberos_loader_reads_it(path, monkeypatch):
    """libero.lifelong.datasets.get_dataset, as LIBERO's training script calls it, and its get_dataset_info."""
    pytest.importorskip("robomimic.utils.dataset", reason="robomimic is not installed")
    pytest.importorskip("libero.lifelong", reason="hf-libero is not installed")
    torchvision = ModuleType("torchvision")  # robomimic imports its networks on the way; no picture is transformed
    torchvision.models = torchvision.transforms = ModuleType("torchvision.any")
    torchvision.transforms.functional = None
    for name in ("torchvision", "torchvision.models", "torchvision.transforms", "torchvision.transforms.functional"):
        monkeypatch.setitem(sys.modules, name, torchvision)
    from libero.lifelong.datasets import SequenceVLDataset, get_dataset

    modality = {"rgb": ["agentview_rgb", "eye_in_hand_rgb"], "low_dim": ["gripper_states", "joint_states"], "depth": []}
    dataset, shapes = get_dataset(dataset_path=str(path), obs_modality=modality, initialize_obs_utils=True, seq_len=10)
    assert shapes["ac_dim"] == 7 and dict(shapes["all_shapes"])["agentview_rgb"] == [3, 8, 6]
    dataset = SequenceVLDataset(dataset, "embedding")
    assert dataset.n_demos == 3 and dataset.total_num_sequences == len(dataset) == 21
    np.testing.assert_array_equal(dataset[7]["actions"][:5], episode(1, 5).actions.astype(np.float32))


def test_liberos_info_command_reads_it(path, capsys):
    spec = importlib.util.find_spec("libero")
    if spec is None:
        pytest.skip("hf-libero is not installed")
    file = Path(spec.submodule_search_locations[0]) / "libero/utils/dataset_utils.py"  # without libero's own import
    module_spec = importlib.util.spec_from_file_location("libero_dataset_utils", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    module.get_dataset_info(str(path))
    printed = capsys.readouterr().out
    assert "total transitions: 21" in printed and "language instruction: open the drawer\n" in printed


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": np.full((7, 7), np.nan)}, "demo_1/actions: NaN or infinite at step 0"),
        ({"actions": np.full((7, 7), 1.5)}, r"demo_1/actions: 1.5 at step 0 is outside \[-1, 1\]"),
        ({"actions": np.full((7, 7), 0.5)}, "demo_1/actions: gripper 0.5 at step 0 is neither -1 nor 1"),
        ({"actions": np.ones((6, 7))}, r"demo_1/states: shape \(7, 23\), expected \(6, 23 = 1\+nq\+nv\)"),
        ({"actions": np.ones((0, 7))}, "demo_1/actions: no steps"),
        ({"states": np.where(np.arange(7)[:, None] == 4, np.inf, np.ones((7, 23)))}, "demo_1/states: NaN .* at step 4"),
        ({"states": np.ones((7, 20))}, r"demo_1/states: shape \(7, 20\), expected \(7, 23"),
        ({"final_state": np.ones(22)}, r"demo_1/final_state: shape \(22,\), expected \(23,\)"),
        ({"final_state": np.full(23, np.nan)}, "demo_1/final_state: NaN"),
        ({"images": {}}, "demo_1/images {}, but {'agentview_rgb': .8, 6."),
        (
            {"images": {"agentview_rgb": np.zeros((7, 8, 6, 3))}},
            "demo_1/obs/agentview_rgb: type float64, expected uint8",
        ),
    ],
)
def test_unfit_episodes_are_not_written(tmp_path, change, message):
    file = tmp_path / "a.hdf5"
    write_episodes(file, [episode(5)], TASK, {})
    before = file.read_bytes()
    with pytest.raises(UserError, match=f"a.hdf5 is not written: {message}"):
        write_episodes(file, [episode(0, images=True), replace(episode(1, images=True), **change)], TASK, {})
    with pytest.raises(UserError, match="there is no episode to write"):
        write_episodes(file, [], TASK, {})
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [RuntimeError("killed"), OSError(28, "Can't write data (errno = 28, ...)")])
def test_a_failing_write_leaves_the_old_file(path, monkeypatch, error):
    before, calls = path.read_bytes(), []

    def create_dataset(group, *args, original=h5py.Group.create_dataset, **kwargs):
        calls.append(args)
        if len(calls) == 20:  # in the second episode
            raise error
        return original(group, *args, **kwargs)

    monkeypatch.setattr(h5py.Group, "create_dataset", create_dataset)
    with pytest.raises(type(error)) as caught:
        write_episodes(path, [episode(0), episode(1)], TASK, {})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    if isinstance(error, OSError):  # `run_command` names the file and the reason
        assert (caught.value.errno, caught.value.filename) == (28, str(path))
        assert caught.value.strerror == "No space left on device"


def test_liberos_attributes_are_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match="total"):
        write_episodes(tmp_path / "a.hdf5", [episode()], TASK, {"total": 3})
    with pytest.raises(ValueError, match="num_samples"):
        write_episodes(tmp_path / "a.hdf5", [episode(attrs={"num_samples": 3})], TASK, {})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- checking


def put(key, change):
    """A damage: replace the dataset data/`key` by `change` of it, None to delete it."""

    def damage(file):
        array = file[f"data/{key}"][()]
        del file[f"data/{key}"]
        if (array := change(array)) is not None:
            file[f"data/{key}"] = array

    return damage


def at(index, value):
    def change(array):
        array[index] = value
        return array

    return change


def attr(key, value, group="data"):
    """A damage: set an attribute, or delete it if `value` is None."""

    def damage(file):
        if value is None:
            del file[group].attrs[key]
        else:
            file[group].attrs[key] = value

    return damage


def foreign(file):
    file.move("data", "episodes")


def without_demos(file):
    for name in list(file["data"]):
        del file["data"][name]


D1 = "data/demo_1"
DAMAGES = {
    "foreign": (foreign, "foreign layout: no demonstrations data/demo_0"),
    "empty": (without_demos, "foreign layout: no demonstrations data/demo_0"),
    "stray": (lambda file: file["data"].create_group("extra"), "data/extra: does not belong here"),
    "no actions": (put("demo_1/actions", lambda a: None), "demo_1/actions: missing"),
    "no states": (put("demo_1/states", lambda a: None), "demo_1/states: missing"),
    "no obs": (put("demo_1/obs/joint_states", lambda a: None), "demo_1/obs/joint_states: missing"),
    "shape": (put("demo_1/actions", lambda a: a[:, :6]), "demo_1/actions: shape (5, 6), expected (5, 7)"),
    "flat": (put("demo_1/actions", lambda a: a[0, 0]), "demo_1/actions: missing"),
    "length": (put("demo_1/obs/ee_pos", lambda a: a[:-1]), "demo_1/obs/ee_pos: shape (4, 3), expected (5, 3)"),
    "type": (put("demo_1/states", lambda a: a.astype("f4")), "demo_1/states: type float32, expected float64"),
    "reward type": (put("demo_1/rewards", lambda a: a.astype("f8")), "demo_1/rewards: type float64, expected uint8"),
    "image type": (put("demo_1/obs/agentview_rgb", lambda a: a / 255), "demo_1/obs/agentview_rgb: type float64"),
    "image shape": (put("demo_1/obs/agentview_rgb", lambda a: a[..., 0]), "shape (5, 8, 6), expected (5, any, any, 3)"),
    "image size": (put("demo_1/obs/agentview_rgb", lambda a: a[:, :4]), "demo_1/obs: images {'agentview_rgb': (4, 6)"),
    "image gone": (put("demo_1/obs/agentview_rgb", lambda a: None), "demo_1/obs: images {'eye_in_hand_rgb': (8, 6)}"),
    "nan": (put("demo_1/obs/ee_ori", at((3, 1), np.nan)), "demo_1/obs/ee_ori: NaN or infinite at step 3"),
    "nan state": (put("demo_1/states", at((0, 1), np.nan)), "demo_1/states: NaN or infinite at step 0"),
    "range": (put("demo_1/actions", at((2, 0), -1.25)), "demo_1/actions: -1.25 at step 2 is outside [-1, 1]"),
    "gripper": (put("demo_1/actions", at((4, 6), 0)), "demo_1/actions: gripper 0 at step 4 is neither -1 nor 1"),
    "reward": (put("demo_1/rewards", at(-1, 0)), "demo_1/rewards: the last one is 0, expected 1"),
    "done": (put("demo_1/dones", at(-1, 0)), "demo_1/dones: the last one is 0, expected 1"),
    "failed": (attr("success", False, D1), "demo_1/rewards: the last one is 1, expected 0"),
    "init_state": (put("demo_1/states", at((0, 3), 9.0)), "demo_1/attribute init_state is not states[0]"),
    "init_state text": (attr("init_state", "here", D1), "demo_1"),
    "no init_state": (attr("init_state", None, D1), "demo_1/attribute init_state is missing"),
    "no model_file": (attr("model_file", None, D1), "demo_1/attribute model_file is missing"),
    "final_state": (attr("final_state", np.ones(3), D1), "demo_1/final_state: shape (3,), expected (23,)"),
    "num_samples": (attr("num_samples", 6, D1), "demo_1/attribute num_samples says 6, but there are 5 actions"),
    "num_demos": (attr("num_demos", 4), "data: attribute num_demos says 4, but the file holds 3"),
    "total": (attr("total", 22), "data: attribute total says 22, but the file holds 21"),
    "lost demo": (lambda file: file["data"].pop("demo_2"), "data: attribute num_demos says 3, but the file holds 2"),
    "no env_args": (attr("env_args", None), "data: attribute env_args is missing"),
    "json": (attr("env_args", "{'type': 1"), "data: attribute env_args is not the JSON it should be"),
    "json number": (attr("problem_info", 3), "data: attribute problem_info is not the JSON it should be"),
    "json key": (attr("problem_info", '{"problem_name": ""}'), "attribute problem_info has no language_instruction"),
    "convention": (attr("macros_image_convention", "vulkan"), "macros_image_convention is 'vulkan', expected 'opengl'"),
    "task": (
        attr("bddl_file_name", "/x/close_it.bddl"),
        "made for another task: close_it.bddl, not open_the_drawer.bddl",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named(path, damage, message):
    with h5py.File(path, "r+") as file:
        damage(file)
    problems = check_file(path, TASK)
    assert message in problems[0] and all("\n" not in problem for problem in problems)
    with pytest.raises(UserError) as caught:
        require_sound(path, TASK)
    assert str(caught.value).startswith(f"{path}: {problems[0]}") and "--repair" in str(caught.value)


def test_every_problem_is_counted(path):
    with h5py.File(path, "r+") as file:
        for change in (attr("total", 1), attr("num_demos", 1), put("demo_0/actions", lambda a: 2 * a)):
            change(file)
    assert len(check_file(path, TASK)) == 3
    with pytest.raises(UserError, match=r"demo_0/actions: .* is outside \[-1, 1\] \(and 2 more"):
        require_sound(path)


def test_states_of_another_model(path):
    other = SimpleNamespace(**{**vars(TASK), "model": SimpleNamespace(nq=NQ + 7, nv=NV + 6)})
    assert check_file(path, other)[0] == "demo_0/states: shape (7, 23), expected (7, 36 = 1+nq+nv)"
    with h5py.File(path, "r+") as file:
        put("demo_1/states", lambda a: a[:, :-1])(file)
        attr("init_state", file[f"{D1}/states"][0], D1)(file)
    assert "demo_1/states: shape (5, 22), expected (5, 23" in check_file(path)[0]  # against demo_0, without a task


def test_files_that_are_none(path, tmp_path):
    content = path.read_bytes()
    (tmp_path / "half.hdf5").write_bytes(content[: len(content) // 2])
    (tmp_path / "notes.hdf5").write_text("not a table\n" * 100)
    (tmp_path / "empty.hdf5").touch()
    for name, message in {
        "half.hdf5": "truncated: the end of the file is missing",
        "notes.hdf5": "not an HDF5 file",
        "empty.hdf5": "not an HDF5 file",
        "nowhere.hdf5": "no such file",
        ".": "is a folder",
    }.items():
        (problem,) = check_file(tmp_path / name)
        assert message in problem
        for read in (read_episodes, read_attrs):
            with pytest.raises(UserError, match=message) as caught:
                read(tmp_path / name)
            assert str(caught.value).startswith(str(tmp_path / name))


def test_damaged_pixels_are_told(path):
    with h5py.File(path) as file:
        images = file["data/demo_1/obs/agentview_rgb"]
        assert images.chunks == (1, 8, 6, 3) and images.compression_opts == 4
        chunk = images.id.get_chunk_info(2)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)
    assert check_file(path) == [] and len(read_episodes(path)) == 3
    with pytest.raises(UserError, match="damaged, cannot be read"):
        read_episodes(path, images=True)


def test_damaged_bytes_never_raise_anything_else(path):
    """Noise over any part of the file: found or harmless, but one line, and no other exception."""
    content, rng = np.frombuffer(path.read_bytes(), np.uint8), np.random.default_rng(0)
    told = 0
    for _ in range(60):
        noisy = content.copy()
        place = rng.integers(len(noisy) - 64)
        noisy[place : place + 64] = rng.integers(0, 256, 64)
        path.write_bytes(noisy)
        told += bool(check_file(path, TASK))
        for read in (lambda: read_episodes(path, TASK, images=True), lambda: read_attrs(path)):
            try:
                read()
            except UserError as error:
                assert "\n" not in str(error)
    assert told


def test_strict_is_liberos_integrity_check(path, tmp_path):
    assert check_file(path, strict=True) == ["data: 3 demonstrations, LIBERO's integrity check wants 50"]
    write_episodes(tmp_path / "fifty.hdf5", (episode(seed) for seed in range(50)), TASK, {})
    assert check_file(tmp_path / "fifty.hdf5", TASK, strict=True) == []
    with h5py.File(tmp_path / "fifty.hdf5", "r+") as file:
        del file["data"].attrs["tag"]
    assert check_file(tmp_path / "fifty.hdf5") == []
    assert "attribute tag is None" in check_file(tmp_path / "fifty.hdf5", strict=True)[0]


# -------------------------------------------------------------------------------------------------------------- command


def command(*args):
    return subprocess.run([sys.executable, "-m", "common.data", *map(str, args)], capture_output=True, text=True)


def test_command(path, tmp_path):
    result = command(path)
    assert result.returncode == 0 and result.stderr == ""
    words = " ".join(result.stdout.split())
    assert "task open_the_drawer (open the drawer)" in words
    assert "episodes 3, 3 successful steps 21, 5 to 9 an episode, 7.0 on average" in words
    assert "patterns 0: 1, 1: 1, 2: 1 strategies rim0: 2, rim1: 1" in words
    assert "images agentview_rgb 8x6, eye_in_hand_rgb 8x6 mujoco 3.8.1 script test" in words
    (tmp_path / "notes.hdf5").write_text("no")
    result = command(path, tmp_path / "notes.hdf5", "--strict")
    assert result.returncode == 2 and result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"{path}: data: 3 demonstrations") and lines[1].endswith("notes.hdf5: not an HDF5 file")
    assert lines[2].startswith("error: 2 of 2 files")
    assert command().returncode == 2


# ------------------------------------------------------------------------------------------------------------ recording


class FakeEnv:
    """Environment i's state is [time, i, number of the reset, 0...]; its proprioception repeats the time."""

    metadata = {"autoreset_mode": None}
    num_envs = 3

    def __init__(self):
        self.state = np.zeros((3, 1 + NQ + NV))
        self.state[:, 1] = range(3)

    def get_state(self):
        return self.state  # its own buffer: the recorder must copy

    def proprioception(self):
        return {name: np.repeat(self.state[:, :1], width, axis=1) for name, width in PROPRIO.items()}

    def step(self):
        self.state[:, 0] += 1

    def reset(self, mask):
        self.state[mask, 0] = 0
        self.state[mask, 2] += 1


def test_recorder(tmp_path):
    """States before, proprioception after; environment i ends every i + 2 steps; successes alternate."""
    env, cut = FakeEnv(), []
    recorder = Recorder(env)
    for step in range(24):
        actions = np.full((3, 7), step / 10, np.float32)
        actions[:, 6] = [0, -0.3, 5]
        recorder.before()
        env.step()
        ended = env.state[:, 0] == [2, 3, 4]
        succeeded = ended & (env.state[:, 2] % 2 == 0)
        cut += recorder.after(actions, succeeded, ended & ~succeeded)
        env.reset(ended)
        assert len(recorder._steps) < 4
    assert [sum(i == j for i, _ in cut) for j in range(3)] == [12, 8, 6]
    for number in range(3):
        mine = [one for i, one in cut if i == number]
        for reset, one in enumerate(mine):
            length = number + 2
            assert one.length == length and one.success is (reset % 2 == 0)
            np.testing.assert_array_equal(one.states[:, 0], range(length))
            np.testing.assert_array_equal(one.states[:, 1:3], [[number, reset]] * length)
            np.testing.assert_array_equal(one.robot_states, np.repeat(one.states[:, :1] + 1, 9, axis=1))
            for name, width in PROPRIO.items():
                np.testing.assert_array_equal(one.proprio[name], np.repeat(one.states[:, :1] + 1, width, axis=1))
            assert list(one.final_state[:3]) == [length, number, reset]
            sent = np.minimum(np.float32((np.arange(length) + reset * length) / 10), 1)
            np.testing.assert_allclose(one.actions[:, :6], sent[:, None].repeat(6, axis=1), rtol=1e-7)
            assert set(one.actions[:, 6]) == {(-1, -1, 1)[number]}
    write_episodes(tmp_path / "a.hdf5", (one for _, one in cut), TASK, {})
    assert check_file(tmp_path / "a.hdf5", TASK) == []


def test_what_idle_environments_do_is_in_no_episode():
    """The last of three is idle until step 2, and the first from step 3 on."""
    env, cut = FakeEnv(), []
    recorder = Recorder(env)
    for step in range(8):
        recorder.before()
        env.step()
        active = np.array([step < 3, True, step >= 2])
        ended = np.array([step in (2, 5), step == 7, step in (1, 7)])
        cut += [(step, i, one.length) for i, one in recorder.after(np.zeros((3, 7)), ended, ended & False, active)]
    assert cut == [(2, 0, 3), (7, 1, 8), (7, 2, 6)]


def test_recorder_refuses_other_autoreset():
    gymnasium = pytest.importorskip("gymnasium")
    env = FakeEnv()
    env.metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}
    Recorder(env)
    env.metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    with pytest.raises(ValueError, match="DISABLED"):
        Recorder(env)
