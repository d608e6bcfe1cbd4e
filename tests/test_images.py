"""common/libero/render.py: pictures of stored states into files of demonstrations."""

import dataclasses
import json
import os

import h5py
import numpy as np
import pytest

from common.cli import UserError
from common.data import check_file, read_episodes, write_episodes
from common.libero import renderers
from common.libero.render import add_images


@pytest.fixture(scope="module")
def ends(drawer_task, demos):
    """The last steps of two demonstrations, in which the drawer moves; the second without the state after its last action."""
    short = []
    for episode, n in zip(read_episodes(demos, drawer_task)[:2], (5, 3), strict=True):
        proprio = {name: values[-n:] for name, values in episode.proprio.items()}
        short.append(dataclasses.replace(episode, actions=episode.actions[-n:], states=episode.states[-n:], proprio=proprio))
    short[1].final_state = None
    return short


@pytest.fixture
def corpus(drawer_task, ends, tmp_path):
    path = tmp_path / "corpus.hdf5"
    write_episodes(path, ends, drawer_task, {"script": "test", "assets": drawer_task.assets})
    with h5py.File(path, "a") as file:
        file["mask/train"] = [b"demo_0"]  # robomimic's
        file["data/demo_0/obs/extra"] = np.arange(5)
    return path


def test_images_show_the_states_after_the_actions(corpus, drawer_task, ends):
    add_images(corpus, size=32)  # on the assets that the file names
    assert check_file(corpus, drawer_task) == []
    nq = drawer_task.model.nq
    camera = renderers.make_renderer(drawer_task.model, width=32, height=32)
    with h5py.File(corpus) as file:
        data = file["data"]
        for i, episode in enumerate(ends):
            after = [*episode.states[1:], episode.states[-1] if episode.final_state is None else episode.final_state]
            qpos = np.array(after)[:, 1 : 1 + nq]
            if episode.final_state is None:  # the robot is where its proprioception says, the objects are one step behind
                qpos[-1, drawer_task.arm_qpos] = episode.proprio["joint_states"][-1]
                qpos[-1, drawer_task.gripper_qpos] = episode.proprio["gripper_states"][-1]
            seen = camera.render(qpos)
            for name, view in (("agentview_rgb", "agentview"), ("eye_in_hand_rgb", "robot0_eye_in_hand")):
                stored = data[f"demo_{i}/obs/{name}"]
                assert stored.dtype == np.uint8 and stored.shape == (episode.length, 32, 32, 3) and stored.chunks == (1, 32, 32, 3)
                np.testing.assert_array_equal(stored[()], seen[view][:, ::-1])  # bottom row first
                assert not np.array_equal(stored[0], stored[-1])
        assert json.loads(data.attrs["env_args"])["env_kwargs"]["camera_heights"] == 32
        assert (data.attrs["renderer"], data.attrs["image_assets"], data.attrs["script"]) == ("warp", drawer_task.image_assets, "test")
        assert file["mask/train"][0] == b"demo_0" and np.array_equal(data["demo_0/obs/extra"], np.arange(5))
    for before, now in zip(ends, read_episodes(corpus, drawer_task, images=True), strict=True):
        np.testing.assert_array_equal(now.actions, before.actions)
        np.testing.assert_array_equal(now.states, before.states)
        assert now.attrs == {"init_state": -1, "pattern": -1, **before.attrs}
        assert set(now.images) == {"agentview_rgb", "eye_in_hand_rgb"}


def test_images_are_read_by_robomimic(corpus, assets):
    dataset = pytest.importorskip("robomimic.utils.dataset", reason="robomimic is not installed")
    obs_utils = pytest.importorskip("robomimic.utils.obs_utils")
    add_images(corpus, size=16, assets=assets)
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": ["ee_pos"], "rgb": ["agentview_rgb"]}})
    options = dict(dataset_keys=["actions"], load_next_obs=False, hdf5_cache_mode="low_dim", filter_by_attribute="train")
    sequences = dataset.SequenceDataset(hdf5_path=str(corpus), obs_keys=["ee_pos", "agentview_rgb"], **options)
    assert len(sequences) == 5
    with h5py.File(corpus) as file:
        expected = np.moveaxis(file["data/demo_0/obs/agentview_rgb"][2] / 255, -1, 0)
    np.testing.assert_array_equal(sequences[2]["obs"]["agentview_rgb"][0], expected.astype(np.float32))


def test_images_are_replaced_only_on_request(corpus, assets, monkeypatch):
    add_images(corpus, size=16, assets=assets)
    with pytest.raises(UserError, match=r"has pictures already \(agentview_rgb, eye_in_hand_rgb\); --overwrite"):
        add_images(corpus, size=16, assets=assets)
    before, monitor = corpus.read_bytes(), []
    monkeypatch.setattr(renderers._WarpRenderer, "_render", lambda self, qpos: monitor.append(len(qpos)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # amid the work
        add_images(corpus, size=16, assets=assets, overwrite=True)
    assert corpus.read_bytes() == before and monitor == [5] and os.listdir(corpus.parent) == [corpus.name]
    monkeypatch.undo()
    add_images(corpus, size=48, cameras=("agentview",), assets=assets, overwrite=True)
    with h5py.File(corpus) as file:
        assert file["data/demo_1/obs/agentview_rgb"].shape == (3, 48, 48, 3) and "eye_in_hand_rgb" not in file["data/demo_1/obs"]


def test_images_into_a_wrong_file(corpus, drawer_task, assets, tmp_path):
    with pytest.raises(UserError, match="none.hdf5: no such file"):
        add_images(tmp_path / "none.hdf5")
    with h5py.File(tmp_path / "foreign.hdf5", "w") as file:
        file["x"] = 1
    with pytest.raises(UserError, match="foreign.hdf5: foreign layout"):
        add_images(tmp_path / "foreign.hdf5")
    with pytest.raises(UserError, match="no renderer 'vulkan'"):
        add_images(corpus, renderer="vulkan", assets=assets)
    other = "libero:0" if drawer_task.assets.startswith("standin") else "standin:0"
    with h5py.File(corpus, "a") as file:
        file["data"].attrs["assets"] = other
    with pytest.raises(UserError, match=rf"corpus.hdf5 was made on assets {other}, and those here are {drawer_task.assets}; .*--assets"):
        add_images(corpus, assets=assets)
    with h5py.File(corpus, "a") as file:
        file["data"].attrs["bddl_file_name"] = "bddl_files/libero_goal/fly_to_the_moon.bddl"
    with pytest.raises(UserError, match="corpus.hdf5: unknown task"):
        add_images(corpus, assets=assets)
    assert check_file(corpus) == []
