"""The environment against LIBERO's own, against closed forms, and against gymnasium's contract."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import mujoco
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from scipy import stats

from common import cli
from common.cli import UserError
from common.libero import env as env_module
from common.libero import load_task, make_env, step
from common.libero.env import LiberoVectorEnv, mass_addresses
from common.libero.goals import predicate_holds, success
from common.libero.observation import axis_angle, axis_angles, observe_states
from common.libero.tasks import Predicate

ROOT = Path(__file__).resolve().parent.parent
# All six predicates, conjunctions, and every suite but libero_object, whose goals are all In, as libero_10/3's, and libero_spatial, whose
# goals are all On, as libero_10/2's.
PARITY_TASKS = ["libero_goal/0", "libero_10/2", "libero_10/3", "libero_90/39"]


def random_actions(num_envs, steps, seed=0):
    return np.clip(np.random.default_rng(seed).normal(size=(steps, num_envs, 7)), -1, 1)


def opened(task, state):
    """`state` with the drawer of `drawer_task` pulled out beyond the goal's threshold."""
    (goal,), state = task.goal, state.copy()
    state[1 + goal.qpos[0]] = goal.threshold + goal.sign * 0.01
    return state


# ---------------------------------------------------------------------------------------------- LIBERO's own environment


@pytest.fixture(scope="module")
def parity(assets, tmp_path_factory):
    """Results of benchmarks.fidelity, in a process of its own, as LIBERO changes global state."""
    file = tmp_path_factory.mktemp("fidelity") / "results.json"
    command = [sys.executable, "-m", "benchmarks.fidelity", "--part", "trajectories", "flags", "--steps", "30", "--states", "20"]
    command += ["--processes", "1", "--assets", assets, "--json", str(file), "--tasks", *PARITY_TASKS]
    subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=True)
    return json.loads(file.read_text())["tasks"]


def test_trajectories_are_liberos(parity):
    assert set(parity) == set(PARITY_TASKS)
    for task, result in parity.items():
        assert result["model_differences"] == [], task
        for name, run in result["trajectories"].items():
            assert run["flags_equal"], (task, name)
            assert run["free_steps"] >= 10, (task, name)
            assert run["free"] < 1e-9, (task, name)  # the same numbers but for rounding
            if run["all"] < 1e-9:
                assert run["proprioception"] < 1e-6, (task, name)
        assert min(run["all"] for run in result["trajectories"].values()) < 1e-9, task


def test_success_flags_are_liberos(parity):
    seen = {}
    for task, result in parity.items():
        assert 0 < result["flags"]["successful_states"] < result["flags"]["states"] == 20, task
        for name, counts in result["flags"]["predicates"].items():
            assert counts["unequal"] == 0, (task, name)
            seen.setdefault(name, []).append((counts["true"], counts["false"]))
    assert set(seen) == {"in", "on", "open", "close", "turnon", "turnoff", "success", "success after a step"}
    assert all(sum(p for p, _ in counts) >= 5 and sum(n for _, n in counts) >= 5 for counts in seen.values()), seen


# ---------------------------------------------------------------------------------------------- closed forms


def test_osc_torques_formula():
    """Against the formula with explicit inverses: Khatib's controller with Lambda = pinv(J M^-1 J^T), N = I - Jbar J."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        root = rng.normal(size=(7, 7))
        M, J = root @ root.T + 0.3 * np.eye(7), rng.normal(size=(6, 7))
        bias, q, qd, q0, wrench_pos, wrench_ori = (rng.normal(size=n) for n in (7, 7, 7, 7, 3, 3))
        velocity, torque, inverse = J @ qd, np.empty(7), np.linalg.inv(M)
        force = 150 * np.concatenate([wrench_pos, wrench_ori]) - 2 * np.sqrt(150) * velocity
        lam = np.linalg.pinv(J @ inverse @ J.T)
        lam_pos, lam_ori = np.linalg.pinv(J[:3] @ inverse @ J[:3].T), np.linalg.pinv(J[3:] @ inverse @ J[3:].T)
        null = np.eye(7) - inverse @ J.T @ lam @ J
        posture = M @ (10 * (q0 - q) - 2 * np.sqrt(10) * qd)
        expected = J.T @ np.concatenate([lam_pos @ force[:3], lam_ori @ force[3:]]) + bias + null.T @ posture
        step._osc_torques(M.copy(), J, bias, q, qd, q0, wrench_pos, wrench_ori, velocity, torque)
        np.testing.assert_allclose(torque, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())


def test_axis_angle_matrix_closed_form():
    matrix, scipy_rotation = np.empty((3, 3)), pytest.importorskip("scipy.spatial.transform").Rotation
    for v in ([0.5, 0.0, 0.0], [0.0, -0.3, 0.0], [0.1, 0.2, -0.4], [1e-6, 0.0, 2e-6]):
        step._axis_angle_matrix(np.array(v), matrix)
        np.testing.assert_allclose(matrix, scipy_rotation.from_rotvec(v).as_matrix(), atol=2e-7)  # robosuite's float32


def test_axis_angles_are_those_of_rotations():
    rng = np.random.default_rng(0)
    quats = np.vstack([rng.normal(size=(50, 4)), [[1, 0, 0, 0], [-1, 0, 0, 0], [1, 1e-9, 0, 0]]])
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    vectors = axis_angles(quats)
    np.testing.assert_array_equal(vectors, [axis_angle(q) for q in quats])
    rotations = pytest.importorskip("scipy.spatial.transform").Rotation
    np.testing.assert_allclose(
        rotations.from_rotvec(vectors).as_matrix(), rotations.from_quat(quats[:, [1, 2, 3, 0]]).as_matrix(), atol=1e-6
    )


def test_mass_matrix_is_mujocos(drawer_task):
    """The arm's entries, picked out of the sparse matrix, against MuJoCo's own product with it."""
    task = drawer_task
    data, column = mujoco.MjData(task.model), np.zeros(task.model.nv)
    data.qpos[:] = task.init_states[0][1 : 1 + task.model.nq]
    mujoco.mj_step1(task.model, data)
    masses, expected = mass_addresses(task), np.empty((7, 7))
    for k, dof in enumerate(task.arm_dof):
        mujoco.mj_mulM(task.model, data, column, np.eye(task.model.nv)[dof])
        expected[:, k] = column[task.arm_dof]
    np.testing.assert_array_equal(np.where(masses < 0, 0.0, data.M[masses]), expected)
    assert (np.linalg.eigvalsh(expected) > 0.01).all()


def test_a_simulation_reserves_little_and_has_room(drawer_task):
    """By robosuite's own limits 1.3 GB: a process with twenty could not be forked, nor live where memory is granted strictly."""
    task, here = drawer_task, np.random.default_rng(0)
    data = mujoco.MjData(task.model)
    data.qpos[:] = task.init_states[0][1 : 1 + task.model.nq]
    for thing in (o for o in task.objects.values() if o.joint_qpos is not None):
        data.qpos[thing.joint_qpos :][:3] = [0.0, 0.0, 1.2] + 0.02 * here.normal(size=3)  # all in one place
    mujoco.mj_forward(task.model, data)
    assert data.ncon > 50 and 8 * data.maxuse_arena < task.model.narena < 100e6


@pytest.mark.parametrize("version", ["2.3.7", "3.3.6", "5.0.0", "10.1.0.dev3"])
def test_an_unknown_mujoco_is_refused_at_the_start(version, monkeypatch):
    monkeypatch.setattr(mujoco, "__version__", version)
    with pytest.raises(UserError, match=f"^MuJoCo {version} is installed, and 3.3.7 or later, before 5.0.0, is needed; run: pip"):
        make_env("libero_goal/0")


SCENE = """
<mujoco>
  <worldbody>
    <body name="table"><geom name="top" type="box" size="1 1 0.05" pos="0 0 -0.05"/>
      <site name="straight" type="box" size="0.10 0.05 0.01" pos="0.2 0 0"/>
      <site name="turned" type="box" size="0.10 0.05 0.01" pos="-0.2 0 0" euler="0 0 90"/>
      <site name="tilted" type="box" size="0.10 0.05 0.01" pos="0 0.5 0.3" euler="0 0 30"/>
    </body>
    <body name="cube"><freejoint/><geom name="cube" type="box" size="0.02 0.02 0.02"/></body>
    <body name="plate" pos="0.5 0.5 0.01"><geom name="plate" type="cylinder" size="0.08 0.01"/></body>
    <body name="drawer" pos="2 0 0"><joint name="a" type="slide"/><geom size="0.1"/></body>
    <body name="door" pos="3 0 0"><joint name="b" type="hinge"/><geom size="0.1"/></body>
  </worldbody>
</mujoco>
"""


@pytest.fixture
def scene():
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)

    def holds(predicate, cube=(0, 0, 1), joints=(0, 0)):
        data.qpos[:3], data.qpos[7:] = cube, joints
        mujoco.mj_forward(model, data)
        return predicate_holds(predicate, data, model)

    ids = {name: model.site(name).id for name in ("straight", "turned", "tilted")}
    return model, ids, model.body("cube").id, holds


def test_predicate_contain(scene):
    """In: inside the site's axis-aligned box |R s|, which reaches 1 cm deeper at the bottom."""
    _, sites, cube, holds = scene
    inside = lambda site: Predicate("in", ("cube", site), "contain", site=sites[site], body=cube, size=(0.10, 0.05, 0.01))  # noqa: E731
    e = 1e-6
    for site, (x, y, sx, sy) in {"straight": (0.2, 0, 0.10, 0.05), "turned": (-0.2, 0, 0.05, 0.10)}.items():
        for offset in ([sx - e, 0, 0], [-sx + e, 0, 0], [0, sy - e, 0], [0, -sy + e, 0], [0, 0, 0.01 - e], [0, 0, -0.02 + e]):
            assert holds(inside(site), np.array([x, y, 0]) + offset)
        for offset in ([sx + e, 0, 0], [-sx - e, 0, 0], [0, sy + e, 0], [0, -sy - e, 0], [0, 0, 0.01 + e], [0, 0, -0.02 - e]):
            assert not holds(inside(site), np.array([x, y, 0]) + offset)
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    reach = abs(c * 0.10 - s * 0.05)  # |R s| has the signs of R inside: LIBERO's own approximation
    assert holds(inside("tilted"), (reach - e, 0.5, 0.3)) and not holds(inside("tilted"), (reach + e, 0.5, 0.3))


def test_predicate_under(scene):
    """On a region: R d (sic, not transposed) within the site's half sizes, and from 5 mm below its top to 10 cm above."""
    model, sites, cube, holds = scene
    on = lambda site, contact=None: Predicate(  # noqa: E731
        "on", ("cube", site), "under", site=sites[site], body=cube, size=(0.10, 0.05, 0.01), contact=contact
    )
    e = 1e-6
    for z, expected in ((0.005 + e, True), (0.005 - e, False), (0.11 - e, True), (0.11 + e, False)):
        assert holds(on("straight"), (0.2, 0, z)) is expected
    for x, y, expected in ((0.3 - e, 0, True), (0.3 + e, 0, False), (0.2, 0.05 - e, True), (0.2, -0.05 - e, False)):
        assert holds(on("straight"), (x, y, 0.05)) is expected
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    for along, expected in ((0.10 - e, True), (0.10 + e, False)):  # R d = (along, 0, .) for d = R^T (along, 0, .)
        assert holds(on("tilted"), (c * along, 0.5 - s * along, 0.35)) is expected
    touching = on("straight", ((model.geom("top").id,), (model.geom("cube").id,)))
    assert holds(touching, (0.2, 0, 0.0199)) and not holds(touching, (0.2, 0, 0.0201))


def test_predicate_on_top(scene):
    """On an object: not below it, 3 cm between the origins at most, and in contact."""
    model, _, cube, holds = scene
    groups = ((model.geom("plate").id,), (model.geom("cube").id,))
    on = Predicate("on", ("cube", "plate"), "ontop", body=cube, target_body=model.body("plate").id, contact=groups)
    for d, expected in ((0.0, True), (0.0299, True), (0.0301, False)):
        assert holds(on, (0.5 + d * 0.6, 0.5 - d * 0.8, 0.039)) is expected
    for z, expected in ((0.0399, True), (0.0401, False), (0.0101, True), (0.0099, False)):
        assert holds(on, (0.51, 0.5, z)) is expected, z


def test_predicate_joints(scene):
    """Open and turnon want any joint beyond the threshold, close and turnoff all; inclusive only where LIBERO writes >=."""
    model, _, _, holds = scene
    qpos = (int(model.joint("a").qposadr[0]), int(model.joint("b").qposadr[0]))
    joint = lambda **kwargs: Predicate("open", ("x",), "joint", qpos=qpos, **kwargs)  # noqa: E731
    cases = [(0.1, 0.0, True, False), (0.1, 0.2, True, False), (0.2, 0.3, True, True), (0.0, 0.0, False, False)]
    for a, b, any_beyond, all_beyond in cases:
        assert holds(joint(threshold=0.05 if any_beyond else 0.15, any=True), joints=(a, b)) is any_beyond
        assert holds(joint(threshold=0.15), joints=(a, b)) is all_beyond
        assert holds(joint(threshold=-0.15, sign=-1.0), joints=(-a, -b)) is all_beyond
    assert not holds(joint(threshold=0.25, any=True), joints=(0.25, 0))
    assert holds(joint(threshold=0.25, any=True, inclusive=True), joints=(0.25, 0))
    assert not holds(joint(threshold=0.25, inclusive=True), joints=(0.25, 0))


# ---------------------------------------------------------------------------------------------- gymnasium's contract


def test_spaces_and_layout(drawer_task):
    env = make_env(drawer_task, num_envs=3, seed=0)
    assert (
        env.single_action_space.shape == (7,)
        and env.action_space.shape == (3, 7)
        and env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    )
    obs, info = env.reset(seed=1)
    assert obs.dtype == np.float32 and obs in env.observation_space and info["state_index"].shape == (3,)
    filled = np.zeros(env.observe.size, int)
    for part in env.obs_layout.values():
        filled[part] += 1
    assert (filled == 1).all()
    out = env.step(env.action_space.sample())
    assert out[0] in env.observation_space and [x.dtype for x in out[1:4]] == [np.float64, bool, bool] and out[4] == {}
    np.testing.assert_allclose(obs[:, env.obs_layout["eef_pos"]][0], [-0.2, 0.0, 1.17], atol=0.08)  # LIBERO's start pose
    env.close()


def test_autoreset_same_step(drawer_task):
    """Truncation at max_steps: the returned observation opens the next episode, final_obs closes the last one."""
    env = make_env(drawer_task, num_envs=2, seed=0, settle_steps=0, max_steps=3)
    straight = make_env(drawer_task, num_envs=2, seed=0, settle_steps=0, max_steps=3, autoreset_mode=AutoresetMode.DISABLED)
    actions = random_actions(2, 4)
    indices = [3, 4]
    env.reset(seed=5, options={"init_state": indices})
    straight.reset(seed=5, options={"init_state": indices})
    for t in range(2):
        obs, reward, terminated, truncated, info = env.step(actions[t])
        np.testing.assert_array_equal(obs, straight.step(actions[t])[0])
        assert not terminated.any() and not truncated.any() and not reward.any() and info == {}
    obs, _, terminated, truncated, info = env.step(actions[2])
    last, _, _, also_truncated, _ = straight.step(actions[2])
    assert truncated.all() and also_truncated.all() and not terminated.any()
    np.testing.assert_array_equal(info["final_obs"], last)
    assert info["_final_obs"].all() and info["final_length"].tolist() == [3, 3]
    np.testing.assert_array_equal(obs, observe_states(drawer_task, env.get_state()))  # of the new episodes,
    assert not np.allclose(obs, last)
    for row in env.get_state():  # which start from training states
        assert any(np.array_equal(row[1:], state[1:]) for state in drawer_task.train_states)
    assert not env.step(actions[3])[3].any()


def test_success_terminates(drawer_task):
    env = make_env(drawer_task, num_envs=3, seed=0, max_steps=1, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    states = env.get_state()
    states[1] = opened(drawer_task, states[1])
    env.set_state(states)
    assert [success(drawer_task, data) for data in env.data] == [False, True, False]
    _, reward, terminated, truncated, _ = env.step(np.tile(step.NO_OP, (3, 1)))
    assert reward.tolist() == [0, 1, 0] and terminated.tolist() == [False, True, False]
    assert truncated.tolist() == [True, False, True]  # success at the time limit is success
    env.reset(options={"reset_mask": terminated})
    np.testing.assert_array_equal(env.step(np.zeros((3, 7)))[3], [True, True, True])  # the others went on counting


def test_reset_mask_leaves_the_others(drawer_task):
    env = make_env(drawer_task, num_envs=3, seed=0, settle_steps=0, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0, options={"init_state": 7})
    env.step(random_actions(3, 1)[0])
    before = env.get_state()
    obs, info = env.reset(options={"reset_mask": np.array([False, True, False]), "init_state": [0, 1, 2]})
    after = env.get_state()
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    np.testing.assert_array_equal(after[1], drawer_task.init_states[1])
    assert info["state_index"].tolist() == [7, 1, 7]
    np.testing.assert_array_equal(obs, observe_states(drawer_task, after))


def test_only_active_environments_move(drawer_task):
    env, full = (make_env(drawer_task, 3, max_steps=3, autoreset_mode=AutoresetMode.DISABLED) for _ in range(2))
    actions, active = random_actions(3, 4), np.array([True, False, True])
    for e in (env, full):
        e.reset(options={"init_state": [0, 1, 2]})
    still = env.get_state()[1]
    for action in actions[:3]:
        obs, _, _, truncated, _ = env.step(action, active)
        expected, *_ = full.step(action)
        np.testing.assert_array_equal(obs[active], expected[active])
        np.testing.assert_array_equal(env.get_state()[active], full.get_state()[active])
        np.testing.assert_array_equal(env.get_state()[1], still)
    assert truncated.tolist() == [True, False, True]  # the time of the one that stood still stood still, too
    assert not env.step(actions[3], ~active)[3][1]
    before = env.get_state()
    env.step(actions[3], np.zeros(3, bool))
    np.testing.assert_array_equal(env.get_state(), before)


def test_processes_that_work_side_by_side_share_the_cores(drawer_task, monkeypatch):
    monkeypatch.setattr(cli.os, "sched_getaffinity", lambda pid: range(6), raising=False)
    for processes, threads in ((1, 6), (2, 3), (4, 1), (12, 1)):
        monkeypatch.setattr(env_module, "_processes", 1)
        env_module.share_cores(processes)
        env = make_env(drawer_task, 1)
        assert env._num_threads == threads
        env.close()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the worker in /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = """
        import os, time
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        from common.libero.env import share_cores
        if __name__ == "__main__":
            with ProcessPoolExecutor(1, get_context("spawn"), share_cores, (1,)) as pool:
                print(pool.submit(os.getpid).result(), flush=True)
                pool.submit(time.sleep, 60).result()
    """
    (tmp_path / "parent.py").write_text(textwrap.dedent(code))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(worker)


def running(pid: int) -> bool:
    """Whether a process is there and not a zombie (in a container nobody may wait for an orphan)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_num_envs_and_threads_change_nothing(drawer_task):
    actions = random_actions(6, 15)
    runs = []
    for num_envs, threads in ((6, 1), (6, 4), (1, 1)):
        states = []
        for first in range(0, 6, num_envs):
            env = make_env(drawer_task, num_envs, num_threads=threads)
            env.reset(options={"init_state": np.arange(first, first + num_envs)})
            for action in actions[:, first : first + num_envs]:
                env.step(action)
            states.append(env.get_state())
            env.close()
        runs.append(np.concatenate(states))
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])


def test_seed_decides_everything(drawer_task):
    def run(seed):
        env = make_env(drawer_task, 2, max_steps=4)
        rows = [env.reset(seed=seed)[0]] + [env.step(action)[0] for action in random_actions(2, 10)]
        return np.stack(rows)

    np.testing.assert_array_equal(run(3), run(3))
    assert not np.allclose(run(3), run(4))


def test_snapshot_and_restore(drawer_task):
    env = make_env(drawer_task, num_envs=2, seed=0, max_steps=25)
    env.reset(seed=0)
    actions = random_actions(2, 40)
    for action in actions[:10]:
        env.step(action)
    snapshot = env.snapshot()
    first = [env.step(action) for action in actions[10:]]  # across autoresets
    other = make_env(drawer_task, num_envs=2, seed=9, max_steps=25)  # a new process would do the same
    other.restore(snapshot)
    for (obs, _, terminated, truncated, _), action in zip(first, actions[10:], strict=True):
        again = other.step(action)
        np.testing.assert_array_equal(again[0], obs)
        np.testing.assert_array_equal(again[2], terminated)
        np.testing.assert_array_equal(again[3], truncated)


def test_states(drawer_task):
    env = make_env(drawer_task, num_envs=2, settle_steps=0)
    env.reset(options={"init_state": [0, 1]})
    np.testing.assert_array_equal(env.get_state(), drawer_task.init_states[:2])
    env.set_state(drawer_task.train_states[:2])
    np.testing.assert_array_equal(env.get_state(), drawer_task.train_states[:2])
    env.set_state(drawer_task.init_states[5:6], envs=np.array([1]))
    np.testing.assert_array_equal(env.get_state()[1], drawer_task.init_states[5])
    for action in random_actions(2, 5):
        obs, *_ = env.step(action)
    np.testing.assert_array_equal(obs, observe_states(drawer_task, env.get_state()))
    np.testing.assert_array_equal(obs, env.observations())


def test_reset_settles_with_noops(drawer_task):
    env, plain = make_env(drawer_task, 1), make_env(drawer_task, 1, settle_steps=0)
    plain.reset(options={"init_state": [2]})
    for _ in range(10):
        obs, *_ = plain.step(step.NO_OP[None])
    for _ in range(2):  # the second reset comes from what the first one kept
        np.testing.assert_array_equal(env.reset(options={"init_state": [2]})[0], obs)
        np.testing.assert_array_equal(env.get_state(), plain.get_state())
        a, b = env.snapshot(), plain.snapshot()
        np.testing.assert_array_equal(a["grip"], b["grip"])
        np.testing.assert_array_equal(a["goal_rot"], b["goal_rot"])
        plain.step(step.NO_OP[None])
        env.step(step.NO_OP[None])
        np.testing.assert_array_equal(env.get_state(), plain.get_state())
        plain.restore(b)


def test_bad_input(drawer_task):
    env = make_env(drawer_task, num_envs=2)
    for indices in ([0, 50], [-1, 0], 50):
        with pytest.raises(ValueError, match="0 to 49"):
            env.reset(options={"init_state": indices})
    env.reset(seed=0)
    for actions in (np.zeros((3, 7)), np.zeros(7), np.full((2, 7), np.nan)):
        with pytest.raises(ValueError, match="finite"):
            env.step(actions)
    with pytest.raises(ValueError, match="shape"):
        env.set_state(np.zeros((2, 5)))
    with pytest.raises(ValueError, match="SAME_STEP or DISABLED"):
        LiberoVectorEnv(drawer_task, autoreset_mode=AutoresetMode.NEXT_STEP)
    with pytest.raises(UserError, match="backend='tpu'"):
        make_env(drawer_task, backend="tpu")


def test_actions_are_clipped_and_move_the_hand(drawer_task):
    env = make_env(drawer_task, num_envs=3)
    env.reset(options={"init_state": 0})
    start = env.proprioception()
    actions = np.tile(step.NO_OP, (3, 1))
    actions[1, 0], actions[2, 0] = 1.0, 5.0
    for _ in range(5):
        env.step(actions)
    moved = env.proprioception()["ee_pos"] - start["ee_pos"]
    assert np.abs(moved[0]).max() < 0.002 and 0.03 < moved[1, 0] < 0.25
    np.testing.assert_array_equal(moved[1], moved[2])


# ---------------------------------------------------------------------------------------------- training resets


@pytest.mark.parametrize("task_id", ["libero_goal/0", "libero_10/3", "libero_spatial/7"])  # the last: a bowl starts on the stove
def test_training_states_follow_the_official_distribution(assets, task_id):
    task = load_task(task_id, assets)
    official, ours = task.init_states[:, 1 : 1 + task.model.nq], task.train_states[:, 1 : 1 + task.model.nq]
    assert len(official) == 50 and len(ours) >= 200
    distances = np.abs(official[:, None] - ours[None]).max(-1)
    assert distances.min() > 1e-6  # none of the evaluation's states is trained on
    columns = [o.joint_qpos + k for o in task.objects.values() if o.joint_qpos is not None for k in (0, 1)] + task.arm_qpos
    p_values = [stats.ks_2samp(official[:, c], ours[:, c]).pvalue for c in columns]
    assert min(p_values) > 0.001 / len(columns), dict(zip(columns, p_values, strict=True))
    heights = [o.joint_qpos + 2 for o in task.objects.values() if o.joint_qpos is not None]
    np.testing.assert_allclose(official[:, heights].mean(0), ours[:, heights].mean(0), atol=2e-3)


def test_reading_the_seed_changes_nothing(drawer_task):
    env, other = (make_env(drawer_task, 2, seed=5) for _ in range(2))
    assert env.np_random_seed == 5
    np.testing.assert_array_equal(env.reset()[1]["state_index"], other.reset()[1]["state_index"])
    env.reset(seed=7)
    assert env.np_random_seed == 7 and make_env(drawer_task).np_random_seed == -1


@pytest.mark.parametrize(
    "files, quota",
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu.max": "nonsense"}, math.inf),
        ({}, math.inf),
    ],
)
def test_a_containers_quota_counts(tmp_path, monkeypatch, files, quota):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cli._quota(tmp_path) == quota
    monkeypatch.setattr(cli, "_quota", lambda: 0.5)
    assert cli.usable_cores() == 1


def test_training_starts_from_no_state_that_things_are_thrown_from(drawer_task):
    """A bowl that is placed in the cheese is thrown; the next state takes the place of that one, and if there is no other, it is taken."""
    states = drawer_task.train_states[:3].copy()
    bowl, cheese = (1 + drawer_task.objects[name].joint_qpos for name in ("akita_black_bowl_1", "cream_cheese_1"))
    states[1, bowl : bowl + 3] = states[1, cheese : cheese + 3] + (0.05, 0.0, 0.0)
    env = make_env(dataclasses.replace(drawer_task, train_states=states), 12)
    _, info = env.reset(seed=0)
    drawn = np.random.default_rng(0).integers(3, size=12)
    assert set(drawn) == {0, 1, 2} and (info["state_index"] == np.where(drawn == 1, 2, drawn)).all()
    moved = np.linalg.norm(env.get_state()[:, bowl : bowl + 2] - states[info["state_index"], bowl : bowl + 2], axis=1)
    assert moved.max() < 0.01

    env = make_env(dataclasses.replace(drawer_task, train_states=states[1:2]), 2)
    _, info = env.reset(seed=0)
    moved = np.linalg.norm(env.get_state()[:, bowl : bowl + 2] - states[1, bowl : bowl + 2], axis=1)
    assert (info["state_index"] == 0).all() and moved.min() > 0.06
