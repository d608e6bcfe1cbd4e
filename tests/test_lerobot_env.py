"""The environment that `lerobot-eval` takes in place of its own: LeRobot's contract, over our simulator."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from common.cli import UserError
from common.lerobot import hub
from common.libero import make_env
from common.libero.renderers import available, make_renderer
from common.libero.step import NO_OP

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def make(assets):
    """The only task's environments, with these settings."""
    if not available()[0]:
        pytest.skip(available()[1])
    made = []

    def make(n_envs: int = 2, **settings):
        settings = {"task": "libero_goal/0", "observation_height": 32, "assets": assets} | settings
        ((env,),) = [tasks.values() for tasks in hub.make_env(n_envs, cfg=types.SimpleNamespace(**settings)).values()]
        made.append(env)
        return env

    yield make
    for env in made:
        env.close()


def test_observations_are_liberos(make, drawer_task):
    """From the official init states in turn, after ten no-ops; pictures bottom row first, or so that LeRobot's turn rights them."""
    env, camera = make(), make_renderer(drawer_task.model, ("agentview", "robot0_eye_in_hand"), 32, 32)
    reference = make_env(drawer_task, 2, settle_steps=10, autoreset_mode=AutoresetMode.DISABLED)
    for states in ([0, 1], [2, 3]):
        obs, info = env.reset(seed=[5, 6])
        reference.reset(options={"init_state": np.array(states)})
        np.testing.assert_array_equal(env.worlds.get_state(), reference.get_state())
        assert env.observation_space.contains(obs) and not info["is_success"].any()
        robot, seen = reference.proprioception(), camera.render(reference.get_state()[:, 1 : 1 + drawer_task.model.nq])
        np.testing.assert_array_equal(obs["pixels"]["image"], seen["agentview"][:, ::-1])
        np.testing.assert_array_equal(obs["pixels"]["image2"], seen["robot0_eye_in_hand"][:, ::-1])
        np.testing.assert_array_equal(obs["robot_state"]["eef"]["pos"], robot["ee_pos"])
        for i in range(2):
            rotation = reference.data[i].xmat[drawer_task.hand_body].reshape(3, 3)
            np.testing.assert_allclose(obs["robot_state"]["eef"]["mat"][i], rotation, atol=1e-9)
            np.testing.assert_array_equal(obs["robot_state"]["joints"]["vel"][i], reference.data[i].qvel[drawer_task.arm_dof])
    assert env.observation_space == batch_space(env.single_observation_space, 2)
    straight = make(mirror=False).reset()[0]["pixels"]["image"]
    reference.reset(options={"init_state": np.array([0, 1])})
    seen = camera.render(reference.get_state()[:, 1 : 1 + drawer_task.model.nq])["agentview"]
    np.testing.assert_array_equal(straight[:, ::-1, ::-1], seen)  # LeRobot turns by 180 degrees


def test_ends(make, drawer_task):
    """Success and the cap end an episode, which is told once; then the environment stands still."""
    env = make(3, episode_length=4)
    env.reset()
    (goal,) = drawer_task.goal
    state = env.worlds.get_state()
    state[1, 1 + goal.qpos[0]] = goal.threshold + goal.sign * 0.02  # the second one's drawer is open
    env.worlds.set_state(state[1:2], envs=np.array([1]))
    no_ops = np.tile(NO_OP, (3, 1)).astype(np.float32)
    obs, reward, terminated, truncated, info = env.step(no_ops)
    assert terminated.tolist() == [False, True, False] == info["final_info"]["is_success"].tolist() and not truncated.any()
    assert reward.tolist() == [0, 1, 0]
    before = env.worlds.get_state()
    for step in range(3):
        obs, reward, terminated, truncated, info = env.step(no_ops)
        assert not terminated.any() and reward.sum() == 0 and ("final_info" in info) == (step == 2)
    assert truncated.tolist() == [True, False, True] and not info["final_info"]["is_success"].any()
    np.testing.assert_array_equal(env.worlds.get_state()[1], before[1])
    assert env.call("_max_episode_steps") == (4,) * 3 and env.call("task_description") == (drawer_task.language,) * 3
    assert env.envs[0].task == drawer_task.name and env.envs[2].render().shape == (32, 32, 3)
    env.reset()
    assert env.active.all()


def test_which_tasks():
    made = hub.make_env(1, cfg=types.SimpleNamespace(task="libero_goal, libero_90/3", task_ids=[3, 7]))
    assert {suite: sorted(tasks) for suite, tasks in made.items()} == {"libero_goal": [3, 7], "libero_90": [3]}
    assert made["libero_goal"][7].task_description == "turn on the stove" and made["libero_goal"][7].max_steps == 300
    assert sorted(hub.make_env()["libero_10"]) == list(range(10))
    with pytest.raises(UserError, match="unknown"):
        hub.make_env(1, cfg=types.SimpleNamespace(task="libero_nowhere"))
    with pytest.raises(UserError, match="no task left of libero_goal with task_ids"):
        hub.make_env(1, cfg=types.SimpleNamespace(task="libero_goal", task_ids=[99]))


def test_from_the_hub(tmp_path, monkeypatch):
    """LeRobot fetches env.py alone into the Hub's cache, and loads it; the rest of the project comes after it, of the same revision."""
    snapshot = tmp_path / "models--someone--fast-libero" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    shutil.copy(ROOT / "env.py", snapshot)

    def fetch(repo_id, revision, cache_dir):
        assert (repo_id, revision, cache_dir) == ("someone/fast-libero", "abc123", tmp_path)
        (snapshot / "common").symlink_to(ROOT / "common")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=fetch))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for _ in range(2):  # then it is all there
        spec = importlib.util.spec_from_file_location("hub_env_someone_fast-libero", snapshot / "env.py")
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        assert module.make_env(n_envs=3, use_async_envs=False)["libero_10"][0].num_envs == 3 and sys.path[0] == str(snapshot)


def test_lerobot_sees_what_the_datasets_hold(make):
    """LeRobot's own processing of our observations gives observation.state as `export` writes it, and pictures that are the right way."""
    utils = pytest.importorskip("lerobot.envs.utils", reason="lerobot is not installed (it needs an environment of its own)")
    from lerobot.processor.env_processor import LiberoProcessorStep

    env = make(mirror=False)
    obs, _ = env.reset()
    seen = LiberoProcessorStep()._process_observation(utils.preprocess_observation(obs))
    robot = env.worlds.proprioception()
    state = np.hstack([robot[name] for name in ("ee_pos", "ee_ori", "gripper_states")])
    np.testing.assert_allclose(seen["observation.state"], state, atol=1e-5)
    pictures = env.camera.render(env.worlds.get_state()[:, 1 : 1 + env.worlds.task.model.nq])
    for name, camera in (("image", "agentview"), ("image2", "robot0_eye_in_hand")):
        np.testing.assert_allclose(np.moveaxis(seen[f"observation.images.{name}"].numpy(), 1, 3) * 255, pictures[camera], atol=1e-3)
