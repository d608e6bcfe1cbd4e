"""The scripted demonstrator: geometry and flows against closed forms, and short demonstrations that must succeed and replay."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from scipy.spatial.transform import Rotation

from common import demonstrator
from common.cli import UserError
from common.demonstrator import (
    CELL,
    DIRECTIONS,
    PAD_REACH,
    PATHS,
    UP,
    Demonstrator,
    Strategy,
    collect,
    detour,
    find_grasps,
    follow,
    funnel,
    hand_rotation,
    joint_motion,
    load_or_collect,
    rotation_vector,
)
from common.env import make_env

PULL = Strategy("contact middle, path near", {"contact": "middle", "path": "near"})


@pytest.fixture
def pulling(drawer_task, monkeypatch):
    """The drawer task with a repertoire of one strategy, so that nothing has to be rehearsed."""
    monkeypatch.setitem(demonstrator._strategies, (drawer_task.id, drawer_task.assets), [PULL])
    return drawer_task


def box(half, centre=(0.0, 0.0, 0.0)):
    """Points on the surface of a box."""
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><worldbody><geom type="box" size="{" ".join(map(str, half))}"/></worldbody></mujoco>'
    )
    return demonstrator.surface_points(model, [0])[0][1] + np.asarray(centre)


def test_rotation_vector_agrees_with_scipy():
    rotations = Rotation.random(50, random_state=0)
    ours = [rotation_vector(r.as_matrix()) for r in rotations]
    np.testing.assert_allclose(ours, rotations.as_rotvec(), atol=1e-9)
    np.testing.assert_allclose(rotation_vector(np.eye(3)), 0.0)


def test_funnel_is_zero_at_the_goal_and_climbs_when_far_from_the_axis():
    assert np.allclose(funnel(np.zeros(3), UP, 0.2, 0.1), 0.0)
    far = funnel(np.array([0.3, 0.0, 0.0]), UP, 0.2, 0.1)
    np.testing.assert_allclose(far, [-0.3 * 0.2, 0.0, 0.2])  # a fifth of the sideways way while it has to climb
    np.testing.assert_allclose(funnel(np.array([0.3, 0.0, 0.2]), UP, 0.2, 0.1), [-0.3, 0.0, 0.0])


@pytest.mark.parametrize("out", [UP, DIRECTIONS["left"], np.array([0.0, -0.966, 0.259])])
@pytest.mark.parametrize("name", PATHS)
def test_every_path_arrives_along_its_axis_from_anywhere(name, out):
    rng = np.random.default_rng(0)
    for start in rng.uniform(-0.3, 0.3, (20, 3)):
        path = follow(start, out, detour(name, out), 0.08, 0.04)
        assert np.linalg.norm(path[-1]) < 0.012
        along = path @ out
        across = np.linalg.norm(path - along[:, None] * out, axis=1)
        outside = across > 0.04  # sideways motion happens at least most of the height away from what is approached
        arrived = np.maximum.accumulate(along > 0.05)
        assert (along[outside & arrived] > 0.02).all()


def test_detours_are_large():
    start = np.array([-0.25, 0.0, 0.2])
    reach = {name: follow(start, UP, detour(name, UP), 0.08, 0.04) for name in PATHS}
    assert reach["left"][:, 1].max() > 0.08 and reach["right"][:, 1].min() < -0.08
    assert reach["far"][:, 0].max() > 0.04 and reach["over"][:, 2].max() > reach["direct"][:, 2].max() + 0.05


def test_a_box_is_grasped_across_its_middle_and_no_wider_than_the_hand():
    narrow = box((0.02, 0.05, 0.025))
    grasps = find_grasps(narrow, narrow, hand_rotation(np.array([1.0, 0.0, 0.0]), -UP), 0.02, -0.02)
    assert grasps
    for g in grasps:
        assert abs(g.position[0]) < CELL and abs(g.width - 0.04) <= CELL
        assert g.position[2] == pytest.approx(0.025 - 0.02 + PAD_REACH, abs=1e-9)
        np.testing.assert_allclose(g.rotation[:, 2], -UP)
    assert not find_grasps(narrow, narrow, hand_rotation(np.array([0.0, 1.0, 0.0]), -UP), 0.02, -0.02)


def test_a_wall_where_a_finger_has_to_go_rules_a_grasp_out():
    thing, wall = box((0.02, 0.02, 0.025)), box((0.005, 0.1, 0.1), (0.045, 0.0, 0.0))
    across, along = (hand_rotation(np.array(axis), -UP) for axis in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]))
    assert find_grasps(thing, thing, across, 0.02, -0.02)
    assert not find_grasps(thing, np.concatenate([thing, wall]), across, 0.02, -0.02)
    assert find_grasps(thing, np.concatenate([thing, box((0.1, 0.005, 0.1), (0.0, 0.2, 0.0))]), along, 0.02, -0.02)


def test_joint_motion_is_the_derivative_of_the_pose(drawer_task):
    model, data = drawer_task.model, mujoco.MjData(drawer_task.model)
    data.qpos[:] = drawer_task.init_states[0, 1 : 1 + model.nq]
    for joint in (j for o in drawer_task.objects.values() for j in o.joints):
        mujoco.mj_kinematics(model, data)
        body = model.jnt_bodyid[joint]
        local = np.array([0.03, -0.02, 0.01])
        point = data.xpos[body] + data.xmat[body].reshape(3, 3) @ local
        motion = joint_motion(model, data, joint, point)
        data.qpos[model.jnt_qposadr[joint]] += 1e-6
        mujoco.mj_kinematics(model, data)
        moved = data.xpos[body] + data.xmat[body].reshape(3, 3) @ local
        np.testing.assert_allclose((moved - point) / 1e-6, motion, atol=1e-6)


def test_demonstrations_succeed_replay_and_do_not_depend_on_the_batch(pulling):
    episodes = collect(pulling, 2, seed=3, num_envs=2, progress=False)
    again = collect(pulling, 2, seed=3, num_envs=1, progress=False)
    env = make_env(pulling, 1, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    for k, (episode, other) in enumerate(zip(episodes, again, strict=True)):
        assert episode.success and 20 < episode.length < 150
        assert episode.attrs["strategy"] == PULL.name and episode.attrs["strategy_index"] == 0
        assert set(episode.actions[:, 6]) == {-1.0, 1.0} and np.abs(episode.actions).max() <= 1.0
        np.testing.assert_array_equal(episode.actions, other.actions)
        np.testing.assert_array_equal(episode.states, other.states)
        env.set_state(episode.states[:1], gripper=np.array([-1.0]))
        replayed = [env.step(a[None])[2][0] for a in episode.actions]
        assert replayed[-1] or any(replayed), k


def test_an_action_is_a_function_of_the_state(pulling):
    env = make_env(pulling, 1, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(options={"init_state": 0})
    one, two = (Demonstrator(pulling, PULL, 0.0) for _ in range(2))
    two.act(env.data[0])  # plans from the first state, like the other
    for k in range(12):
        action = one.act(env.data[0])
        if k == 11:  # the other one has not seen what came between
            np.testing.assert_array_equal(action, two.act(env.data[0]))
        env.step(action[None])


def test_a_way_that_does_not_exist_fails_and_is_reported(pulling, monkeypatch):
    wrong = Strategy("wrong", {"contact": "the other side", "path": "near"})
    env = make_env(pulling, 1)
    env.reset(options={"init_state": 0})
    attempt = Demonstrator(pulling, wrong)
    attempt.act(env.data[0])
    assert attempt.failed
    monkeypatch.setitem(demonstrator._strategies, (pulling.id, pulling.assets), [wrong])
    with pytest.raises(UserError, match="'wrong' succeeded 0 times"):
        collect(pulling, 2, progress=False)


def test_collected_sets_are_kept_and_a_damaged_one_is_made_again(pulling, monkeypatch, tmp_path):
    monkeypatch.setenv("RL_DATA_ENGINE_CACHE", str(tmp_path))
    first = load_or_collect(pulling, 1, progress=False)
    monkeypatch.setattr(demonstrator, "collect", lambda *a, **k: pytest.fail("not taken from the cache"))
    kept = load_or_collect(pulling, 1, progress=False)
    np.testing.assert_array_equal(kept[0].actions, first[0].actions)
    assert kept[0].attrs["strategy"] == PULL.name
    (file,) = (tmp_path / "demos").glob("*.hdf5")
    file.write_bytes(file.read_bytes()[:1000])
    monkeypatch.undo()
    monkeypatch.setenv("RL_DATA_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setitem(demonstrator._strategies, (pulling.id, pulling.assets), [PULL])
    np.testing.assert_array_equal(load_or_collect(pulling, 1, progress=False)[0].actions, first[0].actions)
