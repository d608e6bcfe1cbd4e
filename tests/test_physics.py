"""Sleeping and coarse physics: what rests is left alone, what is touched wakes, and a run goes on exactly; against exact physics."""

from __future__ import annotations

import copy

import mujoco
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from common.cli import UserError
from common.data import read_episodes
from common.demos.demonstrator import unsettled
from common.libero import env as env_module
from common.libero import goals, load_task, make_env
from common.libero.env import LiberoVectorEnv
from common.libero.make import choose_physics
from common.libero.step import SUBSTEPS

pytestmark = pytest.mark.skipif(not hasattr(mujoco.mjtEnableBit, "mjENBL_SLEEP"), reason="needs MuJoCo 3.8 or later")


@pytest.fixture(scope="module")
def bowl_task(assets):
    """libero_spatial/7: put the bowl on the plate, a goal that asks for contact."""
    return load_task("libero_spatial/7", assets)


def still(env: LiberoVectorEnv, steps: int) -> None:
    for _ in range(steps):
        env.step(np.zeros((env.num_envs, 7)))


def test_what_rests_sleeps_and_stays_where_exact_physics_has_it(bowl_task):
    exact, sleep = (make_env(bowl_task, 2, seed=0, physics=physics) for physics in ("exact", "sleep"))
    for env in (exact, sleep):
        env.reset(options={"init_state": [0, 1]})
        still(env, 20)
    assert all(data.ntree_awake == 1 for data in sleep.data)  # the arm
    for a, b in zip(exact.data, sleep.data, strict=True):
        np.testing.assert_allclose(a.xpos, b.xpos, atol=1e-3)
    assert bowl_task.model.opt.enableflags & mujoco.mjtEnableBit.mjENBL_SLEEP == 0  # the task's own model is as it was


def on_the_plate(env: LiberoVectorEnv) -> np.ndarray:
    """A state in which the bowl stands on the plate, at rest, as exact physics leaves it."""
    task = env.task
    state = env.task.init_states[0].copy()
    bowl, plate = (task.objects[name].joint_qpos for name in ("akita_black_bowl_1", "plate_1"))
    state[1 + bowl : 1 + bowl + 3] = state[1 + plate : 1 + plate + 3] + [0, 0, 0.05]
    return state


def test_a_goal_that_needs_contact_holds_among_sleepers(bowl_task, monkeypatch):
    """The bowl comes to rest on the plate; long after both have fallen asleep, and list no contact, the goal still holds."""
    (goal,) = bowl_task.goal
    assert goal.contact is not None
    env = make_env(bowl_task, 1, seed=0, physics="sleep", autoreset_mode=AutoresetMode.DISABLED)
    env.reset()
    env.set_state(on_the_plate(env)[None])
    still(env, 30)
    data = env.data[0]
    bodies = {int(bowl_task.model.body_rootid[bowl_task.model.geom_bodyid[g]]) for pair in data.contact.geom for g in pair}
    assert data.ntree_awake == 1 and bowl_task.objects["akita_black_bowl_1"].body not in bodies
    assert env.step(np.zeros((1, 7)))[2].all()
    # demonstrators read the same data, and saw neither that a step is done nor that nothing falls any more
    assert goals.predicate_holds(goal, data, bowl_task.model) and not unsettled(bowl_task, data)
    monkeypatch.setattr(goals, "some_sleep", lambda *_: False)  # without looking among sleepers
    assert not env.step(np.zeros((1, 7)))[2].any()
    assert not goals.predicate_holds(goal, data, bowl_task.model) and unsettled(bowl_task, data)


def test_demonstrations_succeed_as_in_exact_physics(drawer_task, demos):
    """Ten demonstrations of a drawer that is asleep until the hand comes: the same successes, within two control steps."""
    episodes = read_episodes(demos, drawer_task)[:10]
    found = {}
    for physics in ("exact", "sleep", "coarse"):
        env = make_env(drawer_task, 10, seed=0, physics=physics, autoreset_mode=AutoresetMode.DISABLED)
        env.reset()
        env.set_state(np.stack([e.states[0] for e in episodes]))
        found[physics] = np.full(10, -1)
        for t in range(max(e.length for e in episodes)):
            active = (found[physics] < 0) & [t < e.length for e in episodes]
            actions = np.stack([e.actions[min(t, e.length - 1)] for e in episodes])
            found[physics][active & env.step(actions, active)[2]] = t
    assert (found["exact"] >= 0).sum() >= 8
    np.testing.assert_array_equal(found["exact"] >= 0, found["sleep"] >= 0)
    assert np.abs(found["exact"] - found["sleep"]).max() <= 2
    both = (found["exact"] >= 0) & (found["coarse"] >= 0)  # without feedback, what a coarser step changes adds up
    assert both.sum() >= 8 and np.median(np.abs(found["exact"] - found["coarse"])[both]) <= 2


def test_coarse_steps_take_the_same_time_and_the_hand_the_same_way(bowl_task):
    """Fewer physics steps of the same 50 ms; the arm, which nothing touches, is within 3 mm, and the fingers close alike."""
    rng, found = np.random.default_rng(0), {}
    actions = np.concatenate([rng.uniform(-0.5, 0.5, (30, 1, 6)), np.ones((30, 1, 1))], axis=2)
    for physics in ("exact", "coarse"):
        env = make_env(bowl_task, 1, seed=0, physics=physics)
        env.reset(options={"init_state": [0]})
        before, steps = env.data[0].time, env.model.opt.timestep
        for action in actions:
            env.step(action)
        assert env.data[0].time - before == pytest.approx(30 / 20)
        assert round(0.05 / steps) == {"exact": SUBSTEPS, "coarse": env_module.COARSE_SUBSTEPS}[physics]
        found[physics] = env.proprioception()
    np.testing.assert_allclose(found["exact"]["ee_pos"], found["coarse"]["ee_pos"], atol=3e-3)
    np.testing.assert_allclose(found["exact"]["gripper_states"], found["coarse"]["gripper_states"], atol=5e-4)


@pytest.mark.parametrize("physics", ["sleep", "coarse"])
def test_goes_on_exactly_from_a_snapshot(bowl_task, physics):
    """Another environment, amid another episode, takes a snapshot over and does the same to the last bit, sleepers included."""
    rng = np.random.default_rng(2)
    actions = rng.uniform(-1, 1, (60, 2, 7))
    actions[..., 2] -= 0.4  # down, into things
    env, other = (make_env(bowl_task, 2, seed=0, physics=physics, max_steps=1000) for _ in range(2))
    env.reset(options={"init_state": [0, 1]})
    other.reset(options={"init_state": [5, 6]})
    for k, action in enumerate(actions):
        if k % 20 == 10:
            snapshot = copy.deepcopy(env.snapshot())
            for e in (env, other):  # both, as training does before each rollout
                e.restore(snapshot)
            assert any(data.ntree_awake < bowl_task.model.ntree for data in env.data)
        env.step(action)
        other.step(action)
        if k >= 10:
            np.testing.assert_array_equal(env.get_state(), other.get_state())
    assert any(data.ntree_awake > 1 for data in env.data)  # something was woken


def test_physics_can_be_changed_amid_episodes(bowl_task):
    """From a snapshot on, an environment that was coarse does what one that never was does, to the last bit."""
    rng = np.random.default_rng(2)
    changed, other = (make_env(bowl_task, 2, seed=0, physics=physics) for physics in ("coarse", "sleep"))
    changed.reset(options={"init_state": [0, 1]})
    for action in rng.uniform(-1, 1, (30, 2, 7)):
        changed.step(action)
    changed.set_physics("sleep")
    for env in (changed, other):
        env.restore(changed.snapshot())
    for action in rng.uniform(-1, 1, (30, 2, 7)):
        assert (changed.step(action)[0] == other.step(action)[0]).all()
    for env in (changed, other):  # a state that one of them was reset to before
        env.reset(options={"init_state": [0, 1]})
    assert (changed.get_state() == other.get_state()).all()
    changed.set_physics("coarse")
    assert changed.model.opt.timestep == pytest.approx(0.05 / env_module.COARSE_SUBSTEPS)


def test_an_environment_that_slept_is_exact_again(bowl_task):
    """As a run's evaluations are: on its way in sleep, in the end exact."""
    rng = np.random.default_rng(2)
    changed, other = make_env(bowl_task, 2, physics="exact"), make_env(bowl_task, 2, physics="exact")
    changed.reset(options={"init_state": [0, 1]})
    changed.set_physics("sleep")
    changed.reset(options={"init_state": [1, 0]})
    for action in rng.uniform(-1, 1, (30, 2, 7)):
        changed.step(action)
    assert any(data.ntree_awake < bowl_task.model.ntree for data in changed.data)
    changed.set_physics("exact")
    for env in (changed, other):
        env.reset(options={"init_state": [0, 1]})
    for action in rng.uniform(-1, 1, (60, 2, 7)):
        assert (changed.step(action)[0] == other.step(action)[0]).all()
    assert (changed.get_state() == other.get_state()).all()


def test_what_cannot_sleep(bowl_task, monkeypatch):
    with pytest.raises(UserError, match="no physics 'slow'; choose from exact, sleep, coarse"):
        make_env(bowl_task, physics="slow")
    with pytest.raises(UserError, match="physics sleep needs backend cpu"):
        make_env(bowl_task, physics="sleep", backend="warp")
    assert choose_physics("auto", "warp") == "exact" and choose_physics("auto", "cpu") == "coarse"
    monkeypatch.delattr(env_module.mujoco.mjtEnableBit, "mjENBL_SLEEP")
    assert choose_physics("auto", "cpu") == make_env(bowl_task, physics="auto").physics == "exact"
    for physics in ("sleep", "coarse"):
        with pytest.raises(UserError, match=f"physics {physics} needs MuJoCo 3.8 or later"):
            make_env(bowl_task, physics=physics)
