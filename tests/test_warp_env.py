"""The GPU backend's logic, on Warp's CPU device: controller, goal and control step against the CPU backend, resets, overflow, errors.

The first run compiles MuJoCo Warp's kernels (a minute or two); all tests share one task, hence one set of them.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import logging

import mujoco
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from common.cli import UserError
from common.libero import make_env, step
from common.libero.goals import predicate_holds
from common.libero.make import choose_backend
from common.libero.observation import observe_states
from common.libero.step import NO_OP
from common.libero.tasks import Predicate
from common.libero.warp_start import start_warp
from tests.test_env import SCENE, opened

if tuple(int(x) for x in mujoco.__version__.split(".")[:2]) < (3, 8):
    pytest.skip("MuJoCo Warp needs mujoco 3.8 or later", allow_module_level=True)

wp = pytest.importorskip("warp")
start_warp()  # as conftest asks for
warp_kernels = pytest.importorskip("common.libero.warp_kernels")

wp.set_module_options({"enable_backward": False, "max_unroll": 0})  # as in common.libero.warp_kernels


@pytest.fixture(scope="module", autouse=True)
def mujoco_warp_is_imported():
    """Here, not where tests are collected: it takes seconds, and one of pytest-xdist's workers needs it."""
    global warp_env
    warp_env = pytest.importorskip("common.libero.warp_env")


FIELDS = ("qpos", "qvel", "xpos", "xmat", "xipos", "site_xpos", "site_xmat")


# ---------------------------------------------------------------------------------------------- kernels alone


@wp.kernel
def torques(
    M: wp.array(dtype=warp_kernels.mat77),
    J: wp.array(dtype=warp_kernels.mat67),
    vectors: wp.array2d(dtype=warp_kernels.vec7),  # bias, q, qd, q0, velocity
    errors: wp.array2d(dtype=wp.vec3d),  # of position and orientation
    out: wp.array(dtype=warp_kernels.vec7),
):
    i = wp.tid()
    v = vectors[i]
    out[i] = warp_kernels.osc_torques(M[i], J[i], v[0], v[1], v[2], v[3], errors[i, 0], errors[i, 1], v[4])


@wp.kernel
def matrices(v: wp.array(dtype=wp.vec3d), out: wp.array(dtype=wp.mat33d)):
    i = wp.tid()
    out[i] = warp_kernels.axis_angle_matrix(v[i])


def test_controller_is_the_cpu_backends():
    """Also where the hand's Jacobian is nearly singular."""
    rng, n = np.random.default_rng(0), 40
    root = rng.normal(size=(n, 7, 7))
    M, J = root @ root.transpose(0, 2, 1) + 0.3 * np.eye(7), rng.normal(size=(n, 6, 7))
    J[n // 2 :, 5] = J[n // 2 :, 4] + 1e-3 * rng.normal(size=(n // 2, 7))
    vectors, errors = rng.normal(size=(n, 5, 7)), rng.normal(size=(n, 2, 3))
    out, expected = wp.zeros(n, dtype=warp_kernels.vec7, device="cpu"), np.empty((n, 7))
    inputs = [(M, warp_kernels.mat77), (J, warp_kernels.mat67), (vectors, warp_kernels.vec7), (errors, wp.vec3d)]
    wp.launch(torques, n, inputs=[wp.array(x, dtype=t, device="cpu") for x, t in inputs], outputs=[out], device="cpu")
    for i in range(n):
        bias, q, qd, q0, velocity = vectors[i]
        step._osc_torques(M[i].copy(), J[i], bias, q, qd, q0, *errors[i], velocity[:6], expected[i])
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())

    v = rng.normal(size=(n, 3)) * rng.choice([1e-6, 0.1, 0.5], size=(n, 1))
    turned, matrix = wp.zeros(n, dtype=wp.mat33d, device="cpu"), np.empty((3, 3))
    wp.launch(matrices, n, inputs=[wp.array(v, dtype=wp.vec3d, device="cpu")], outputs=[turned], device="cpu")
    for i in range(n):
        step._axis_angle_matrix(v[i], matrix)
        np.testing.assert_allclose(turned.numpy()[i], matrix, atol=3e-7)  # a rounding of single precision


def test_goals_are_the_cpu_backends():
    """Every kind of conjunct, with and without contact, on random poses of test_env's scene."""
    model = mujoco.MjModel.from_xml_string(SCENE)
    cube, plate, size = model.body("cube").id, model.body("plate").id, (0.10, 0.05, 0.01)
    geom, qpos = (lambda name: (model.geom(name).id,)), (int(model.joint("a").qposadr[0]), int(model.joint("b").qposadr[0]))
    on = lambda site, contact=None: Predicate("on", (), "under", site=model.site(site).id, body=cube, size=size, contact=contact)  # noqa: E731
    conjuncts = [Predicate("in", (), "contain", site=model.site(s).id, body=cube, size=size) for s in ("straight", "turned", "tilted")]
    conjuncts += [on("straight"), on("tilted"), on("turned", (geom("top"), geom("cube")))]
    conjuncts += [Predicate("on", (), "ontop", body=cube, target_body=plate, contact=(geom("plate"), geom("cube")))]
    conjuncts += [Predicate("", (), "joint", qpos=qpos, threshold=0.1, any=x, inclusive=y) for x, y in ((True, False), (False, True))]
    conjuncts += [Predicate("", (), "joint", qpos=qpos[:1], threshold=-0.1, sign=-1.0)]
    rng, n = np.random.default_rng(1), 600
    centres = np.array([[0.2, 0, 0.0], [-0.2, 0, 0.01], [0, 0.5, 0.3], [0.5, 0.5, 0.03]])[rng.integers(4, size=n)]
    places = centres + rng.uniform(-1, 1, (n, 3)) * [0.12, 0.12, 0.03]
    joints, data = rng.choice([-0.2, 0.0, 0.2], size=(n, 2)), mujoco.MjData(model)
    rows, expected, contacts = {name: [] for name in FIELDS}, np.zeros((n, len(conjuncts)), bool), []
    for world in range(n):
        data.qpos[:3], data.qpos[7:] = places[world], joints[world]
        mujoco.mj_forward(model, data)
        expected[world] = [predicate_holds(p, data, model) for p in conjuncts]
        contacts += [(world, *pair) for pair in data.contact.geom]
        for name in FIELDS:
            rows[name].append(np.array(getattr(data, name)).ravel())
    contacts = np.array(contacts[::-1])
    with wp.ScopedDevice("cpu"):
        poses = warp_kernels.Poses()
        for name in FIELDS:
            setattr(poses, name, wp.array(np.array(rows[name], np.float32), dtype=float))
        memory = warp_kernels.Memory()
        memory.elapsed, memory.broken, memory.peaks = (wp.zeros(k, dtype=int) for k in (n, n, 4))
        found = np.zeros_like(expected)
        for p, predicate in enumerate(conjuncts):
            goal = warp_kernels.goal_struct([predicate], model.ngeom)
            touching = wp.zeros((n, 1), dtype=int)
            worlds, pairs = wp.array(contacts[:, 0], dtype=int), wp.array(contacts[:, 1:], dtype=wp.vec2i)
            count = wp.array([len(contacts)], dtype=int)
            wp.launch(warp_kernels.find_touching, len(contacts) + 5, inputs=[goal, count, pairs, worlds, touching])
            flags = [wp.zeros(n, dtype=t) for t in (float, bool, bool, bool, int)]
            wp.launch(warp_kernels.judge, n, inputs=[goal, poses, memory, touching, 10**6], outputs=flags)
            found[:, p] = flags[1].numpy()
    np.testing.assert_array_equal(found, expected)
    assert (expected.sum(0) >= 5).all() and (expected.sum(0) <= n - 5).all()


# ---------------------------------------------------------------------------------------------- the environment


@dataclasses.dataclass
class Small:
    """A GPU of little memory."""

    is_cuda: bool = True
    name: str = "small GPU"
    free_memory: int = 2_000_000_000


@pytest.fixture(scope="module")
def envs(drawer_task):
    """A CPU and a Warp environment of two worlds, without settling; resets are up to the caller."""
    options = dict(settle_steps=0, max_steps=10**6, autoreset_mode=AutoresetMode.DISABLED)
    return make_env(drawer_task, 2, **options), make_env(drawer_task, 2, backend="warp", device="cpu", **options)


@pytest.fixture(scope="module")
def rest(drawer_task):
    """(2, .) settled official init states."""
    env = make_env(drawer_task, 2)
    env.reset(options={"init_state": [0, 1]})
    return env.get_state()


def test_control_step_is_the_cpu_backends(drawer_task, envs, rest):
    """From the same states, in contact: 25 substeps of single precision apart, and the same observation of the same state."""
    cpu, gpu = envs
    assert gpu.obs_layout == cpu.obs_layout and gpu.single_observation_space == cpu.single_observation_space
    rng, nq = np.random.default_rng(0), drawer_task.model.nq
    for gripper in ([0.0, 0.0], [-1.0, 1.0]):
        cpu.set_state(rest, np.array(gripper))
        gpu.set_state(rest, np.array(gripper))
        np.testing.assert_allclose(gpu.observations(), cpu.observations(), atol=2e-6)
        actions = rng.uniform(-1, 1, (2, 7))
        obs_cpu, obs_gpu = cpu.step(actions)[0], gpu.step(actions)[0]
        difference = np.abs(gpu.get_state() - cpu.get_state())
        robot = [1 + a for a in drawer_task.arm_qpos + drawer_task.gripper_qpos]
        assert difference[:, robot].max() < 5e-6 and difference[:, 1 : 1 + nq].max() < 2e-5
        assert difference[:, 0].max() < 1e-6
        assert np.abs(cpu.get_state() - rest)[:, robot].max() > 1e-3  # it did move
        velocities = np.concatenate([obs_gpu[:, part] for name, part in gpu.obs_layout.items() if name.endswith("qvel")], axis=1)
        assert np.isfinite(velocities).all()
        position = np.ones(obs_cpu.shape[1], bool)
        position[gpu.obs_layout["gripper_qvel"]] = False
        np.testing.assert_allclose(obs_gpu[:, position], obs_cpu[:, position], atol=2e-4)
        np.testing.assert_allclose(obs_gpu, observe_states(drawer_task, gpu.get_state()), atol=2e-6)
        for name, values in cpu.proprioception().items():
            np.testing.assert_allclose(gpu.proprioception()[name], values, atol=1e-4)
        assert gpu._peaks.numpy()[0] == max(d.nefc for d in cpu.data)  # no constraint more or less


def test_success_terminates_and_masks_reset(drawer_task, envs, rest):
    _, env = envs
    env.set_state(np.stack([rest[0], opened(drawer_task, rest[1])]))
    _, reward, terminated, truncated, info = env.step(np.tile(NO_OP, (2, 1)))
    assert reward.tolist() == [0, 1] and terminated.tolist() == [False, True] and not truncated.any() and info == {}
    before = env.get_state()
    obs, info = env.reset(options={"reset_mask": terminated, "init_state": [3, 7]})
    after = env.get_state()
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[1], drawer_task.init_states[7].astype(np.float32))
    assert info["state_index"][1] == 7
    np.testing.assert_allclose(obs, observe_states(drawer_task, after), atol=2e-6)
    env.reset(seed=3)
    first, drawn = env.get_state(), env.snapshot()["state_index"]
    np.testing.assert_array_equal(first, drawer_task.train_states[drawn].astype(np.float32))
    env.reset()
    assert not np.array_equal(env.get_state(), first)
    env.reset(seed=3)
    np.testing.assert_array_equal(env.get_state(), first)


def test_worlds_that_are_idle_do_nothing(envs, rest):
    """An idle world's action is a no-op, whatever the policy says; arrays and tensors."""
    torch = pytest.importorskip("torch")
    _, env = envs
    actions, found = np.full((2, 7), 0.5), []
    for given, active in ((np.stack([actions[0], NO_OP]), None), (actions, np.array([True, False]))):
        env.set_state(rest)
        env.step(given, active)
        found.append(env.get_state())
    np.testing.assert_array_equal(*found)
    kept = env._only(torch.as_tensor(actions), np.array([True, False]))
    np.testing.assert_array_equal(kept.numpy(), np.stack([actions[0], NO_OP]))


def test_autoreset_tensors_and_snapshot(drawer_task):
    """SAME_STEP on the device: torch tensors, the next episode's first observation, final_obs, and the same future from a snapshot."""
    torch = pytest.importorskip("torch")
    env = make_env(drawer_task, 2, backend="warp", device="cpu", seed=0, settle_steps=0, max_steps=2, tensors=True)
    obs, _ = env.reset(seed=1, options={"init_state": [0, 1]})
    assert isinstance(obs, torch.Tensor) and obs.dtype == torch.float32 and tuple(obs.shape) == env.observation_space.shape
    action = torch.zeros(2, 7)
    obs, reward, terminated, truncated, info = env.step(action)
    assert reward.dtype == torch.float32 and terminated.dtype == torch.bool and not info["_final_obs"].any()
    assert torch.equal(info["final_obs"], obs)
    snapshot = env.snapshot()
    obs, _, terminated, truncated, info = env.step(action)
    assert truncated.all() and not terminated.any() and info["_final_obs"].all() and info["final_length"].tolist() == [2, 2]
    np.testing.assert_allclose(info["final_states"][:, 0], 0.1, rtol=1e-5)  # s
    states = env.get_state()
    for row in states:
        assert any(np.array_equal(row[1:], state[1:].astype(np.float32)) for state in drawer_task.train_states)
    np.testing.assert_allclose(obs.numpy(), observe_states(drawer_task, states), atol=2e-6)
    assert not np.allclose(obs, info["final_obs"])
    env.restore(snapshot)
    again = env.step(action)
    assert torch.equal(again[0], obs) and torch.equal(again[4]["final_obs"], info["final_obs"])  # the CPU device is deterministic
    with pytest.raises(ValueError, match="shape"):
        env.step(torch.zeros(3, 7))


def test_pictures_of_worlds(drawer_task):
    """Traced from MuJoCo Warp's own poses into tensors: what the renderer makes of these poses, and of the states but for a few edges."""
    torch = pytest.importorskip("torch")
    cameras = ("agentview", "robot0_eye_in_hand")
    options = dict(obs="pixels", image_size=64, cameras=cameras, settle_steps=0, max_steps=1)
    env = make_env(drawer_task, 2, seed=0, backend="warp", device="cpu", **options)

    def check(obs, states):
        expected = env.pixels(states)
        assert obs.keys() == expected.keys() and all(isinstance(x, torch.Tensor) for x in obs.values())
        np.testing.assert_allclose(obs["proprio"].numpy(), expected.pop("proprio"), atol=1e-6)
        for name, pictures in expected.items():  # single precision moves an edge across the middle of a pixel
            assert obs[name].dtype == torch.uint8 and (obs[name].numpy() != pictures).any(-1).mean() < 0.005

    obs, _ = env.reset(options={"init_state": [0, 1]})
    check(obs, env.get_state())
    drawn = env.pixels.renderer.tracer.render(*(x.numpy() for x in env.env.poses()))
    for i, name in enumerate(env.pixels.names.values()):
        np.testing.assert_array_equal(obs[name].numpy()[:, ::-1], drawn[:, i])
    assert not torch.equal(obs["agentview_rgb"][0], obs["agentview_rgb"][1])
    before = obs["agentview_rgb"].clone()
    obs, _, _, truncated, info = env.step(np.full((2, 7), 0.5))
    check(obs, env.get_state())
    assert truncated.all()
    for name, values in env.pixels(info["final_states"]).items():
        np.testing.assert_array_equal(info["final_obs"][name].numpy(), values)
    assert not torch.equal(info["final_obs"]["proprio"], obs["proprio"])  # training states have taken the last ones' place
    assert torch.equal(env.reset(options={"init_state": [0, 1]})[0]["agentview_rgb"], before)
    env.env.device = Small(free_memory=20_000)
    with pytest.raises(UserError, match="2 worlds' pictures of .* need about 0.0 GB and small GPU has 0.0 GB free; take 1 at most"):
        type(env)(env.env, 32, cameras, "warp")


def test_overflow_is_reported(drawer_task, rest, caplog):
    """Too few constraint rows end the world's episode, with a warning; too little room for contacts is an error."""
    options = dict(backend="warp", device="cpu", settle_steps=0, autoreset_mode=AutoresetMode.DISABLED)
    env = make_env(drawer_task, 1, njmax=64, **options)
    env.set_state(rest[:1])
    with caplog.at_level(logging.WARNING):
        _, _, terminated, truncated, _ = env.step(NO_OP[None])
    assert truncated.all() and not terminated.any()
    (message,) = [r.getMessage() for r in caplog.records if "truncated" in r.getMessage()]
    assert "room for 64; pass njmax=" in message and "\n" not in message
    env = make_env(drawer_task, 1, nconmax=20, **options)
    env.set_state(rest[:1])
    with pytest.raises(UserError, match=r"contacts .* overflow: .* pass nconmax=\d+ \(now 20\)"):
        env.step(NO_OP[None])
    ctypes.CDLL(None).fflush(None)  # what kernels print belongs to this test, and not below pytest's last line


def test_sizes_and_memory(drawer_task):
    """Room for twice what objects at rest need; memory grows by the world."""
    sizes = warp_env.contact_sizes(drawer_task)
    env = make_env(drawer_task, 8)
    env.reset(seed=0)
    assert sizes.nconmax >= 2 * max(d.ncon for d in env.data) and sizes.njmax >= 2 * max(d.nefc for d in env.data)
    one, thousand = (warp_env.memory_needed(drawer_task.model, n, sizes) for n in (1, 1000))
    assert thousand == pytest.approx(1000 * one, rel=1e-3) and 1e5 < one < 1e7


def test_bad_input(drawer_task, envs, monkeypatch):
    _, env = envs
    with pytest.raises(ValueError, match="0 to 49"):
        env.reset(options={"init_state": [0, 50]})
    for actions in (np.zeros((3, 7)), np.full((2, 7), np.nan)):
        with pytest.raises(ValueError, match="finite"):
            env.step(actions)
    with pytest.raises(ValueError, match="shape"):
        env.set_state(np.zeros((2, 5)))
    with pytest.raises(UserError, match="backend='tpu'"):
        choose_backend("tpu", 1)
    model = copy.copy(drawer_task.model)
    model.opt.solver = mujoco.mjtSolver.mjSOL_PGS
    with pytest.raises(UserError, match="cannot simulate .*PGS.*; use the cpu backend"):
        make_env(dataclasses.replace(drawer_task, model=model), backend="warp", device="cpu", settle_steps=0)

    monkeypatch.setattr(warp_env, "find_device", lambda device: Small())
    with pytest.raises(UserError, match=r"100000 worlds of .* need about \d+\.\d GB and small GPU has 2\.0 GB free; take \d+ at most"):
        make_env(drawer_task, 100_000, backend="warp")


def test_another_release_of_mujoco_warp(monkeypatch):
    for found in ("3.7.0", "9.8.1"):
        monkeypatch.setattr(warp_env.importlib.metadata, "version", lambda name, found=found: found)
        with pytest.raises(UserError, match=f"MuJoCo Warp {found} does not go with MuJoCo {mujoco.__version__}"):
            warp_env.require_mujoco_warp()


def test_without_a_usable_gpu(monkeypatch):
    monkeypatch.setattr(wp, "is_cuda_available", lambda: False)
    for device in (None, "cuda", "cuda:1"):
        with pytest.raises(UserError, match="no CUDA device for Warp"):
            warp_env.find_device(device)
    assert choose_backend("auto", 100_000) == "cpu" and choose_backend("auto", 1) == "cpu"
    monkeypatch.setattr(wp, "is_cuda_available", lambda: True)
    monkeypatch.setattr(wp, "is_conditional_graph_supported", lambda: False)
    with pytest.raises(UserError, match="driver is too old"):
        warp_env.find_device("cuda")
    assert choose_backend("auto", 100_000) == "cpu"


@pytest.mark.skipif(not wp.is_cuda_available(), reason="needs a CUDA device")
def test_pictures_on_cuda(drawer_task):
    """Traced on the GPU, of Warp's worlds and of the same states from the CPU, against the tracer on the CPU."""
    options = dict(obs="pixels", image_size=64, cameras=("agentview", "robot0_eye_in_hand"), settle_steps=0)
    env = make_env(drawer_task, 2, backend="warp", device="cuda", **options)
    obs, _ = env.reset(options={"init_state": [0, 1]})
    obs = env.step(np.full((2, 7), 0.5))[0]
    expected, sent = (make_env(drawer_task, 2, device=device, **options).pixels(env.get_state()) for device in ("cpu", "cuda"))
    for name, x in expected.items():
        assert obs[name].is_cuda
        for found in (obs[name].cpu().numpy(), sent[name]):
            assert (np.abs(found.astype(float) - x) > (2 if name.endswith("rgb") else 1e-5)).mean() < 0.005


@pytest.mark.skipif(not wp.is_cuda_available(), reason="needs a CUDA device")
def test_on_cuda(drawer_task, rest):
    """The recorded graph against the CPU backend, with arrays and with tensors."""
    torch = pytest.importorskip("torch")
    options = dict(settle_steps=0, autoreset_mode=AutoresetMode.DISABLED)
    cpu = make_env(drawer_task, 2, **options)
    for tensors in (False, True):
        gpu = make_env(drawer_task, 2, backend="warp", tensors=tensors, **options)
        gpu.set_state(rest)
        for action in np.random.default_rng(0).uniform(-1, 1, (3, 2, 7)):
            cpu.set_state(gpu.get_state(), gpu.snapshot()["grip"][:, 1])
            before = cpu.snapshot()
            cpu.restore({**before, "goal_rot": gpu.snapshot()["goal_rot"]})
            expected = cpu.step(action)[0]
            obs = gpu.step(torch.as_tensor(action, device="cuda") if tensors else action)[0]
            position = np.ones(len(expected[0]), bool)
            position[gpu.obs_layout["gripper_qvel"]] = False
            assert np.abs(gpu.get_state() - cpu.get_state())[:, [1 + a for a in drawer_task.arm_qpos]].max() < 2e-5
            np.testing.assert_allclose((obs.cpu().numpy() if tensors else obs)[:, position], expected[:, position], atol=2e-4)
        gpu.close()


def test_training_starts_give_way_as_on_the_cpu(drawer_task, monkeypatch):
    """Two of four states have a bowl in the cheese, from which it is thrown: the next one takes their place, after the last the first."""
    states = drawer_task.train_states[:4].copy()
    bowl, cheese = (1 + drawer_task.objects[name].joint_qpos for name in ("akita_black_bowl_1", "cream_cheese_1"))
    states[1::2, bowl : bowl + 3] = states[1::2, cheese : cheese + 3] + (0.05, 0.0, 0.0)
    monkeypatch.setattr(warp_env, "_settled", {})
    task = dataclasses.replace(drawer_task, train_states=states)
    found, all_of_them = warp_env.start_states(task, False, 10), warp_env.settled(task, states, 10)
    assert found.keys() == all_of_them.keys()
    for name, x in all_of_them.items():
        np.testing.assert_array_equal(found[name], x[[0, 2, 2, 0]])
