"""LIBERO's tasks under Gymnasium's names and by its rules."""

from __future__ import annotations

import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import common.libero  # noqa: F401  (registers the ids)
from common.cli import UserError
from common.libero import make_env
from common.libero.gym_env import LiberoGymEnv, make_vector_env
from common.libero.renderers import available, make_renderer
from common.libero.step import NO_OP
from common.suites import MAX_STEPS, NUM_TASKS, task_names

ID = "libero/libero_goal-0-v0"
MODES = (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP)


def opened(task, state):
    """The state with the drawer beyond the goal's threshold."""
    (goal,) = task.goal
    state = state.copy()
    state[1 + goal.qpos[0]] = goal.threshold + goal.sign * 0.02
    return state


def test_ids():
    """Every task has two ids, which name the same task with the published step cap."""
    assert {suite: len(names) for suite, names in task_names().items()} == NUM_TASKS
    for suite, names in task_names().items():
        for index, name in enumerate(names):
            specs = [gym.spec(f"libero/{suite}-{key}-v0") for key in (index, name)]
            assert [spec.kwargs["task"] for spec in specs] == [f"{suite}/{index}"] * 2
            assert [spec.max_episode_steps for spec in specs] == [MAX_STEPS[suite]] * 2
    assert sum(name.startswith("libero/") for name in gym.registry) == 260


def test_registering_imports_nothing_that_simulates():
    heavy = "mujoco", "numba", "torch", "warp", "robosuite", "libero"
    code = f"import sys, gymnasium, common.libero; print({ID!r} in gymnasium.registry, [m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True []\n"


def test_ids_without_libero():
    """The ids by index are there without LIBERO, so that gym.make says what to install."""
    code = f"""
import sys
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "libero" else find(name, *rest)
import gymnasium, common.libero
print(sum(name.startswith("libero/") for name in gymnasium.registry))
gymnasium.make({ID!r})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "130\n" and "LIBERO is not installed; run: pip install" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("obs", ["state", "pixels"])
def test_check_env(drawer_task, obs):
    """Gymnasium's checker finds nothing but that numbers in metres have no bounds."""
    possible, reason = available()
    if obs == "pixels" and not possible:
        pytest.skip(reason)
    env = gym.make(ID, obs=obs, image_size=32, render_size=32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.unwrapped, skip_render_check=obs == "pixels" or not possible)
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]  # what Gymnasium warns with
    assert said and not [text for text in said if "is -infinity" not in text and "is infinity" not in text], said


def test_render_is_upright(drawer_task):
    """render shows what LIBERO's own camera sees of the state, row 0 the top: the same as the renderer's picture of it."""
    possible, reason = available()
    if not possible:
        pytest.skip(reason)
    env = gym.make(ID, render_mode="rgb_array", render_size=64)
    env.reset(seed=0, options={"init_state": 3})
    for _ in range(3):
        env.step(env.action_space.sample())
    picture = env.render()
    qpos = env.unwrapped.worlds.get_state()[:, 1 : 1 + drawer_task.model.nq]
    expected = make_renderer(drawer_task.model, ("agentview",), 64, 64).render(qpos)["agentview"][0]
    np.testing.assert_array_equal(picture, expected)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and env.metadata["render_fps"] == 20
    vector = gym.make_vec(ID, num_envs=2, render_mode="rgb_array", render_size=64)
    vector.reset(seed=0, options={"init_state": 3})
    frames = vector.render()
    assert isinstance(frames, tuple) and len(frames) == 2 and vector.render_mode == "rgb_array"
    np.testing.assert_array_equal(frames[0], frames[1])
    assert np.abs(frames[0].astype(int) - picture).max() > 20  # three steps earlier
    with pytest.raises(ValueError, match="rgb_array"):
        LiberoGymEnv(drawer_task, render_mode="human")


def test_one_environment_is_the_vector_environment(drawer_task):
    """The single environment gives the vector environment's numbers; TimeLimit ends it, success terminates it and is said."""
    env, vector = gym.make(ID, max_episode_steps=4), make_env(drawer_task, 1, seed=0, max_steps=4, autoreset_mode=AutoresetMode.DISABLED)
    assert gym.make(ID).spec.max_episode_steps == 300
    obs, info = env.reset(seed=7)
    expected, expected_info = vector.reset(seed=7)
    np.testing.assert_array_equal(obs, expected[0])
    assert info == {"state_index": expected_info["state_index"][0]}
    rng = np.random.default_rng(0)
    for _ in range(4):
        action = rng.uniform(-1, 1, 7)
        obs, reward, terminated, truncated, info = env.step(action)
        expected, *flags, _ = vector.step(action[None])
        np.testing.assert_array_equal(obs, expected[0])
        assert [reward, terminated, truncated] == [flag[0] for flag in flags]
    assert truncated and info == {"is_success": False}
    _, info = env.reset(options={"init_state": 5})
    assert info == {"state_index": 5}
    inner = env.unwrapped
    inner.worlds.set_state(opened(drawer_task, inner.worlds.get_state()[0])[None])
    _, reward, terminated, truncated, info = env.step(NO_OP)
    assert (reward, terminated, truncated, info) == (1.0, True, False, {"is_success": True})


@pytest.mark.parametrize("mode", MODES)
def test_autoreset_is_gymnasiums(drawer_task, mode):
    """Our vector environment against Gymnasium's own of the single one: the same at every step, over ends by time and by success."""
    ours = gym.make_vec(ID, num_envs=1, max_episode_steps=4, autoreset_mode=mode.value)
    reference = gym.vector.SyncVectorEnv([lambda: gym.make(ID, max_episode_steps=4)], autoreset_mode=mode)
    assert ours.metadata["autoreset_mode"] == mode and ours.spec.id == ID
    np.testing.assert_array_equal(ours.reset(seed=3)[0], reference.reset(seed=[3])[0])
    rng, ends = np.random.default_rng(1), []
    for t in range(14):
        action = rng.uniform(-1, 1, (1, 7)).astype(np.float32)
        if t == 6:  # both succeed, before their time is over (TimeLimit would call the last step truncated, too)
            state = opened(drawer_task, ours.get_state()[0])[None]
            ours.unwrapped.data[0].qpos[:] = reference.envs[0].unwrapped.worlds.data[0].qpos[:] = state[0, 1 : 1 + drawer_task.model.nq]
        got, want = ours.step(action), reference.step(action)
        for one, other in zip(got[:4], want[:4], strict=True):
            np.testing.assert_array_equal(one, other)
        if mode == AutoresetMode.SAME_STEP and (got[2] | got[3]).any():
            np.testing.assert_array_equal(got[4]["final_obs"][0], want[4]["final_obs"][0])
        ends.append("terminated" if got[2][0] else "truncated" if got[3][0] else "")
    assert ends.count("terminated") == 1 and ends.count("truncated") == 2


def test_next_step_autoreset_of_some(drawer_task):
    """Environments end at different times; the ended one's next action is ignored, the others go on; and the future can be restored."""
    env = make_env(drawer_task, 3, seed=0, max_steps=6, settle_steps=0, autoreset_mode=AutoresetMode.NEXT_STEP)
    env.reset(seed=0, options={"init_state": [0, 1, 2]})
    still = np.tile(NO_OP, (3, 1))
    env.step(still)
    states = env.get_state()
    env.unwrapped.data[1].qpos[:] = opened(drawer_task, states[1])[1 : 1 + drawer_task.model.nq]
    assert env.step(still)[2].tolist() == [False, True, False]
    snapshot = env.snapshot()
    violent = np.where(np.arange(3)[:, None] == 1, 1.0, still)
    obs, reward, terminated, truncated, info = env.step(violent)
    assert not reward.any() and not terminated.any() and not truncated.any()
    assert info["_state_index"].tolist() == [False, True, False]
    begun = env.get_state()[1]
    np.testing.assert_array_equal(begun, drawer_task.train_states[info["state_index"][1]])
    env.restore(snapshot)
    np.testing.assert_array_equal(env.step(violent)[0], obs)
    ends = [np.flatnonzero(env.step(still)[3]).tolist() for _ in range(7)]
    assert ends == [[], [], [0, 2], [], [], [1], []]  # after six steps each; 0 and 2 reset on the step after
    env.restore(snapshot)  # 1 has ended; a reset by hand, a new state and a step that leaves it out
    env.step(still, np.array([True, False, True]))
    assert "_state_index" in env.step(still)[4]
    for begin in (lambda: env.reset(options={"reset_mask": np.array([False, True, False])}), lambda: env.set_state(states)):
        env.restore(snapshot)
        begin()
        assert env.step(still)[4] == {}


def test_next_step_of_pictures_and_on_warp(drawer_task):
    with pytest.raises(UserError, match="tensors on the device"):
        make_env(drawer_task, backend="warp", device="cpu", tensors=True, autoreset_mode=AutoresetMode.NEXT_STEP)
    possible, reason = available()
    if not possible:
        pytest.skip(reason)
    env = make_env(drawer_task, 2, obs="pixels", image_size=32, seed=0, max_steps=2, autoreset_mode=AutoresetMode.NEXT_STEP)
    first, _ = env.reset(seed=0)
    for truncates in (False, True, False):
        obs, _, _, truncated, info = env.step(np.tile(NO_OP, (2, 1)))
        assert truncated.all() == truncates
    assert obs["agentview_rgb"].shape == (2, 32, 32, 3) and obs in env.observation_space
    np.testing.assert_array_equal(obs["proprio"], env.pixels(env.get_state())["proprio"])


def test_gymnasiums_wrappers(drawer_task):
    """Those that count on an autoreset mode take ours: statistics over episodes, normalised observations."""
    env = gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec(ID, num_envs=2, max_episode_steps=3))
    env = gym.wrappers.vector.NormalizeObservation(env)
    env.reset(seed=0)
    lengths = []
    for _ in range(8):
        info = env.step(env.action_space.sample())[4]
        lengths += info["episode"]["l"].tolist() if "episode" in info else []
    assert lengths == [3] * 4
    with pytest.raises(ValueError, match="AutoresetMode"):
        make_vector_env(drawer_task, autoreset_mode="Never")


def test_stable_baselines3_trains(drawer_task):
    """PPO of Stable-Baselines3 takes a thousand steps: its weights move, and it sees three whole episodes."""
    reason = "Stable-Baselines3 is not installed (pip install stable-baselines3)"
    ppo = pytest.importorskip("stable_baselines3", reason=reason).PPO
    model = ppo("MlpPolicy", gym.make(ID), n_steps=250, batch_size=125, n_epochs=2, seed=0, device="cpu")
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    model.learn(1000)
    assert model.num_timesteps == 1000 and [info["l"] for info in model.ep_info_buffer] == [300] * 3
    after = list(model.policy.parameters())
    assert all(p.isfinite().all() for p in after) and any((p != q).any() for p, q in zip(after, before, strict=True))
