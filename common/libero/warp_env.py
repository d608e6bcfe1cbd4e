"""LIBERO's simulation in batch on a GPU: common/libero/env.py's environment, with all worlds of a task on MuJoCo Warp.

A control step is 25 times step1, OSC_POSE, step2, then the goal, the next episode's start where one has ended, and the
observation. All of it stays on the device, and on CUDA it is one recorded graph. Physics is in single precision: trajectories
follow those of the CPU until a contact makes or breaks a little earlier or later (docs/warp.md), so rollouts agree statistically.

The module also runs on Warp's CPU device: slowly, for tests. It imports Warp and MuJoCo Warp, so `make_env` imports it late.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import mujoco
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from common.cli import UserError
from common.libero.env import LiberoEnv, LiberoVectorEnv, mass_addresses, thrown
from common.libero.observation import axis_angles
from common.libero.step import NO_OP, SUBSTEPS
from common.libero.tasks import Task
from common.libero.warp_start import start_warp, warp_device

start_warp()  # before MuJoCo Warp's import starts it: quietly, with our folder for compiled kernels


def require_mujoco_warp() -> None:
    """Raise UserError unless MuJoCo Warp is there, in the release that was made for this MuJoCo."""
    try:
        found = importlib.metadata.version("mujoco-warp")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("MuJoCo Warp is not installed; run: pip install -r requirements.txt") from error
    if found.split(".")[:2] != mujoco.__version__.split(".")[:2]:
        raise UserError(
            f"MuJoCo Warp {found} does not go with MuJoCo {mujoco.__version__}; "
            "install both in one version (docs/versions.md says with which Warp), or use the cpu backend"
        )


require_mujoco_warp()
import mujoco_warp as mjw  # noqa: E402
import warp as wp  # noqa: E402

from common.libero.warp_kernels import (  # noqa: E402
    Arm,
    Memory,
    Poses,
    Starts,
    begin,
    control,
    find_touching,
    goal_struct,
    join_state,
    judge,
    observe,
    real,
    to_array,
)

CUDA_OVERHEAD = 0.5e9  # bytes for the CUDA context, modules and graph

# ---------------------------------------------------------------------------------------------- what a task needs


def settled(task: Task, states: np.ndarray, steps: int) -> dict[str, np.ndarray]:
    """`states` (n, 1 + nq + nv) after `steps` no-ops of the CPU backend, so that both backends' episodes begin alike.

    Returns time (n,), qpos, qvel, warmstart (n, nv), goal_rot (n, 3, 3), grip (n, 2), and contacts and rows (n,), how many there are.
    """
    chunks = []
    for first in range(0, len(states), 64):  # an mjData takes megabytes
        chunk = states[first : first + 64]
        env = LiberoVectorEnv(task, len(chunk), max_steps=steps + 1, autoreset_mode=AutoresetMode.DISABLED)
        env.set_state(chunk)
        for _ in range(steps):
            env.step(np.tile(NO_OP, (len(chunk), 1)))
        snapshot, new = env.snapshot(), env.get_state()
        chunks.append(
            {
                "time": new[:, 0],
                "qpos": new[:, 1 : 1 + task.model.nq],
                "qvel": new[:, 1 + task.model.nq :],
                "warmstart": np.stack([d.qacc_warmstart for d in env.data]),
                "goal_rot": snapshot["goal_rot"],
                "grip": snapshot["grip"],
                "contacts": np.array([d.ncon for d in env.data]),
                "rows": np.array([d.nefc for d in env.data]),
            }
        )
        env.close()
    return {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}


_settled: dict[tuple, dict[str, np.ndarray]] = {}


def start_states(task: Task, official: bool, steps: int) -> dict[str, np.ndarray]:
    """`settled` official or training states, once a process."""
    key = task.id, task.assets, official, steps
    if key not in _settled:
        states = task.init_states if official else task.train_states
        found = settled(task, states, steps)
        if not official and len(good := np.flatnonzero(~thrown(task, states[:, 1 : 1 + task.model.nq], found["qpos"]))):
            # as in `LiberoVectorEnv`
            found = {name: x[good[np.searchsorted(good, np.arange(len(states))) % len(good)]] for name, x in found.items()}
        _settled[key] = found
    return _settled[key]


_sizes: dict[tuple, Sizes] = {}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Room for contacts, and for pairs of geoms that may touch, a world on average; and for constraint rows, in every world."""

    nconmax: int
    njmax: int


def warp_model(model: mujoco.MjModel) -> mujoco.MjModel:
    """A copy of a task's model, with the options that make MuJoCo Warp do what MuJoCo does by default."""
    model, flag = copy.copy(model), mujoco.mjtDisableBit
    model.opt.disableflags |= flag.mjDSBL_SENSOR  # the wrist's force and torque, which nobody reads
    # Boxes collide by MuJoCo's own algorithm. By default MuJoCo Warp takes another one, which often finds one contact of a
    # box's edge on a face where MuJoCo finds two: a finger pad on the side of a can.
    model.opt.disableflags |= flag.mjDSBL_NATIVECCD
    if model.geom_margin.any():  # LIBERO's microwave; MuJoCo Warp has margins or several contacts of a mesh, not both
        model.opt.disableflags |= flag.mjDSBL_MULTICCD
    return model


def contact_sizes(task: Task) -> Sizes:
    """Sizes from what start states need, raw (objects may overlap in the air) and settled, with room for what a policy does."""
    key = task.id, task.assets
    if key not in _sizes:
        states = np.concatenate([task.init_states, task.train_states[:64]])
        raw, rest = settled(task, states, 0), settled(task, states, 10)
        room = lambda name, extra: int(-(-max(raw[name].max(), 2 * rest[name].max() + extra) // 8) * 8)  # noqa: E731
        _sizes[key] = Sizes(nconmax=room("contacts", 48), njmax=room("rows", 160))
    return _sizes[key]


def _bytes(values) -> int:
    """Memory of the Warp arrays in a dataclass of MuJoCo Warp's, and in those that it holds."""
    if isinstance(values, wp.array):
        return values.capacity
    return sum(_bytes(getattr(values, f.name)) for f in dataclasses.fields(values)) if dataclasses.is_dataclass(values) else 0


def memory_needed(model: mujoco.MjModel, num_envs: int, sizes: Sizes) -> int:
    """Bytes of device memory that `num_envs` worlds take, about: MuJoCo Warp's data, and the scratch space of its two big users."""
    room = dict(nconmax=sizes.nconmax, njmax=sizes.njmax)
    with wp.ScopedDevice("cpu"):
        one, two = (_bytes(mjw.make_data(model, nworld=n, **room)) for n in (1, 2))
    polygon, degree = int(np.append(model.mesh_polyvertnum, 4).max()), int(np.append(model.mesh_polymapnum, 3).max())
    epa = 16 * (10 + 2 * model.opt.ccd_iterations) + 20 * (6 + 5 * model.opt.ccd_iterations) + 4 * 24  # expanding polytope: vertices, faces
    collision = epa + 88 * polygon + 44 * degree  # and clipping, for each pair
    padded = -(-model.nv // 16) * 16
    solver = 28 * sizes.njmax + 8 * padded**2
    return int(num_envs * (two - one + sizes.nconmax * (collision + 20) + solver))


def find_device(device: str | None) -> wp.Device:
    """The Warp device "cuda", "cuda:1" or "cpu" (for tests); None is the first GPU. Raises UserError if it can't be used."""
    name = device or "cuda"
    if name != "cpu" and wp.is_cuda_available() and not wp.is_conditional_graph_supported():
        raise UserError("the NVIDIA driver is too old for the warp backend, which needs CUDA 12.4; update it, or use the cpu backend")
    return warp_device(name)


# ---------------------------------------------------------------------------------------------- the environment


class LiberoWarpEnv(LiberoEnv):
    """A LIBERO task as `gymnasium.vector.VectorEnv` on a GPU: `common.libero.env.LiberoVectorEnv`'s interface and semantics.

    What differs: physics is in single precision; training resets are drawn on the device from (seed, world, episode); an episode
    whose world needs more constraint rows than `njmax`, or blows up, is truncated, with a warning.

    Args:
        task, num_envs, seed, settle_steps, max_steps, autoreset_mode: as in LiberoVectorEnv.
        device: "cuda" (default), "cuda:1", ..., or "cpu".
        tensors: whether `reset` and `step` return torch tensors on the device (rewards float32), without any wait for it. Then
            info always has final_obs, _final_obs, final_length and final_states, under SAME_STEP.
        nconmax, njmax: room for contacts (a world, on average) and constraint rows (every world), default `contact_sizes`.

    Raises UserError without such a device, with too little memory, or when contacts overflow.
    """

    def __init__(
        self,
        task: Task,
        num_envs: int = 1,
        seed: int | None = None,
        settle_steps: int = 10,
        max_steps: int | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
        device: str | None = None,
        tensors: bool = False,
        nconmax: int | None = None,
        njmax: int | None = None,
    ):
        super().__init__(task, num_envs, settle_steps, max_steps, autoreset_mode)
        self.device, self.tensors = find_device(device), tensors

        default = contact_sizes(task)
        self.sizes = Sizes(nconmax or default.nconmax, njmax or default.njmax)
        model = warp_model(task.model)
        self.require_memory(memory_needed(model, num_envs, self.sizes) + CUDA_OVERHEAD, CUDA_OVERHEAD)
        with wp.ScopedDevice(self.device):
            self._allocate(model)
            self._seed(seed)
            self._graph, self.graph_seconds = None, 0.0
            if self.device.is_cuda:
                self._record()

    def require_memory(self, needed: float, fixed: float = 0.0, what: str = "worlds") -> None:
        """Raise UserError if `needed` bytes for all worlds, of which `fixed` are for any number of them, are not free on the GPU."""
        if self.device.is_cuda and needed > (free := self.device.free_memory):
            raise UserError(
                f"{self.num_envs} {what} of {self.task.id} need about {needed / 1e9:.1f} GB and {self.device.name} has "
                f"{free / 1e9:.1f} GB free; take {int(self.num_envs * max(free - fixed, 0) / (needed - fixed))} at most"
            )

    def _allocate(self, model: mujoco.MjModel) -> None:
        """Model, data and everything that kernels read and write, on the device."""
        n, task, sizes = self.num_envs, self.task, self.sizes
        home = mujoco.MjData(model)
        home.qpos[task.arm_qpos] = task.initial_joints
        mujoco.mj_kinematics(model, home)
        self._home_rot = home.site_xmat[task.eef_site].reshape(3, 3).copy()
        try:
            self.model = mjw.put_model(model)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"MuJoCo Warp cannot simulate {task.id} ({error}); use the cpu backend") from error
        self.data = data = mjw.make_data(model, nworld=n, nconmax=sizes.nconmax, njmax=sizes.njmax)

        arm = self._arm = Arm()
        arm.qpos, arm.dof, arm.actuator = to_array(task.arm_qpos), to_array(task.arm_dof), to_array(task.arm_actuators)
        self._mass, masses = self._mass_matrix(model)
        arm.mass, arm.home = to_array(masses), to_array(task.initial_joints, real)
        low, high = model.actuator_ctrlrange[task.arm_actuators].T
        arm.low, arm.high = to_array(low, real), to_array(high, real)
        low, high = model.actuator_ctrlrange[task.gripper_actuators].T
        arm.finger, arm.finger_middle = to_array(task.gripper_actuators), to_array((low + high) / 2, real)
        arm.finger_half = to_array((high - low) / 2, real)
        arm.site, arm.root = task.eef_site, int(model.body_rootid[model.site_bodyid[task.eef_site]])

        poses = self._poses = Poses()
        for name in ("qpos", "qvel", "xpos", "xmat", "xipos", "site_xpos", "site_xmat"):
            setattr(poses, name, _floats(getattr(data, name)))
        memory = self._memory = Memory()
        memory.actions = wp.zeros((n, 7), dtype=float)
        memory.target, memory.goal_rot = wp.zeros(n, dtype=wp.vec3d), wp.zeros(n, dtype=wp.mat33d)
        memory.grip = wp.zeros(n, dtype=wp.vec2d)
        for name in ("elapsed", "episode", "state_index", "broken"):
            setattr(memory, name, wp.zeros(n, dtype=int))
        memory.peaks = wp.zeros(4, dtype=int)
        self._peaks = wp.zeros(4, dtype=int, device="cpu", pinned=self.device.is_cuda)  # their copy, current when a step is over
        self._warned, self._failed = 0, False

        self._goal = goal_struct(task.goal, model.ngeom)
        self._touching = wp.zeros((n, len(task.goal)), dtype=int)
        self._terms = to_array(self.observe.terms)

        self._reward, self._length = wp.zeros(n, dtype=float), wp.zeros(n, dtype=int)
        self._terminated, self._truncated, self._done, self._mask = (wp.zeros(n, dtype=bool) for _ in range(4))
        self._obs, self._final_obs = (wp.zeros((n, self.observe.size), dtype=float) for _ in range(2))
        self._final_states = wp.zeros((n, 1 + model.nq + model.nv), dtype=float)
        self._random = wp.full(n, -1, dtype=int)
        self._official = wp.full(n, -1, dtype=int)
        self._seed_array = wp.zeros(1, dtype=int)
        train, official = (start_states(task, kind, self.settle_steps) for kind in (False, True))
        both = {name: np.concatenate([train[name], official[name]]) for name in train}
        starts = self._starts = Starts()
        for name in ("qpos", "qvel", "warmstart", "time"):
            setattr(starts, name, to_array(both[name], float))
        starts.goal_rot, starts.grip = to_array(both["goal_rot"], wp.mat33d), to_array(both["grip"], wp.vec2d)
        starts.train = len(train["time"])

    def _mass_matrix(self, model: mujoco.MjModel) -> tuple[wp.array, np.ndarray]:
        """The worlds' mass matrices (N, .), and where in them the arm's entries lie (7, 7): MuJoCo Warp changed the layout with 4.0."""
        masses = mass_addresses(self.task)
        if hasattr(self.data, "M"):  # since 4.0: as in mjData
            return self.data.M, masses
        if self.model.is_sparse:
            masses = np.where(masses < 0, -1, model.mapM2M[masses])
        else:
            masses = np.array(self.task.arm_dof)[:, None] * self.data.qM.shape[2] + self.task.arm_dof
        return self.data.qM.reshape((self.num_envs, -1)), masses

    def _record(self) -> None:
        """The control step as one CUDA graph. A step before that, and a start state before that, since recording loads no code."""
        if not any(Path(wp.config.kernel_cache_dir).glob("*/*.sm*")):
            logging.getLogger(__name__).warning("compiling the simulator's kernels for %s, once: this takes minutes", self.device.name)
        self._restart(np.ones(self.num_envs, bool), np.zeros(self.num_envs, np.int32))
        self._control_step()
        wp.synchronize_device(self.device)
        start = time.perf_counter()
        with wp.ScopedCapture(self.device) as capture:
            self._control_step()
        self._graph, self.graph_seconds = capture.graph, time.perf_counter() - start
        self._memory.peaks.zero_()

    # ------------------------------------------------------------------ gymnasium's interface

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Start episodes. `options`: "init_state" (num_envs,) indices of official init states; "reset_mask" (num_envs,) bool."""
        options = options or {}
        mask = np.asarray(_host(options.get("reset_mask", np.ones(self.num_envs, bool))), bool)
        official = np.full(self.num_envs, -1)
        if (indices := options.get("init_state")) is not None:
            official = self._checked_indices(_host(indices))
        with self.on_device():
            if seed is not None:
                self._seed(seed)
            self._restart(mask, official)
            self._check_contacts()
            return self._out(self._obs), {"state_index": self._out(self._memory.state_index)}

    def step(self, actions, active: np.ndarray | None = None):
        """As `LiberoVectorEnv.step`, but that all worlds are simulated: those that are not `active` do nothing. At rest they take the
        constraint solver, which ends with the slowest world, few iterations."""
        with self.on_device():
            if active is not None:
                actions = self._only(actions, active)
            self._take_actions(actions)
            if self._graph is None:
                self._control_step()
            else:
                wp.capture_launch(self._graph)
            observations, reward, info = self._out(self._obs), self._out(self._reward), {}
            terminated, truncated = self._out(self._terminated), self._out(self._truncated)
            if self.autoreset_mode == AutoresetMode.SAME_STEP and (self.tensors or (terminated | truncated).any()):
                final = (("final_obs", self._final_obs), ("_final_obs", self._done), ("final_length", self._length))
                info = {name: self._out(values) for name, values in (*final, ("final_states", self._final_states))}
            self._check_contacts()
        if not self.tensors:
            types = {"final_length": np.int64, "final_states": np.float64}
            reward, info = reward.astype(np.float64), {k: v.astype(types.get(k, v.dtype)) for k, v in info.items()}
        return observations, reward, terminated, truncated, info

    def close_extras(self, **kwargs):
        wp.synchronize_device(self.device)  # with tensors, the last step's counters may not be here yet
        if not self._failed:
            self._check_contacts()

    # ------------------------------------------------------------------ LIBERO's states

    def get_state(self) -> np.ndarray:
        """(num_envs, 1 + nq + nv) float64 (of single precision): time, qpos, qvel."""
        columns = self.data.time.numpy()[:, None], self.data.qpos.numpy(), self.data.qvel.numpy()
        return np.concatenate(columns, axis=1).astype(np.float64)

    def set_state(self, states: np.ndarray, gripper: np.ndarray | None = None, envs: np.ndarray | None = None) -> None:
        """As `LiberoVectorEnv.set_state`."""
        envs, states = self._checked_states(states, envs)
        nq = self.task.model.nq
        told = np.zeros(len(envs)) if gripper is None else np.asarray(gripper, np.float64)
        memory, data = self._memory, self.data
        for array, rows in (
            (data.time, states[:, 0]),
            (data.qpos, states[:, 1 : 1 + nq]),
            (data.qvel, states[:, 1 + nq :]),
            (data.qacc_warmstart, 0.0),
            (memory.goal_rot, self._home_rot),
            (memory.grip, np.stack([-told, told], axis=1)),
            (memory.elapsed, 0),
            (memory.broken, 0),
        ):
            values = array.numpy().copy()
            values[envs] = rows
            array.assign(values)
        with wp.ScopedDevice(self.device):
            self._look(self._obs)

    def observations(self) -> np.ndarray:
        """(num_envs, size) float32 of the current states."""
        return self._out(self._obs)

    def proprioception(self) -> dict[str, np.ndarray]:
        """LIBERO's robot observations, (num_envs, .) float64 each; see `common.libero.observation.proprioception`."""
        sensed = {name: x.cpu().numpy().astype(np.float64) for name, x in self.sensed().items()}
        return sensed | {"ee_ori": axis_angles(sensed["ee_quat"][:, [3, 0, 1, 2]])}

    def sensed(self) -> dict[str, torch.Tensor]:
        """`proprioception` but for ee_ori, as float32 tensors on the device."""
        task = self.task
        with self.on_device():
            position, quat, qpos = (wp.to_torch(getattr(self.data, name)) for name in ("site_xpos", "xquat", "qpos"))
            quat = quat[:, task.hand_body]
            return {
                "ee_pos": position[:, task.eef_site].clone(),
                "ee_quat": (quat / quat.norm(dim=1, keepdim=True)).roll(-1, 1),
                "gripper_states": torch.stack([qpos[:, i] for i in task.gripper_qpos], 1),
                "joint_states": torch.stack([qpos[:, i] for i in task.arm_qpos], 1),
            }

    def poses(self) -> tuple[wp.array, wp.array, wp.array, wp.array]:
        """Positions (N, .) vec3 (m) and rotations (N, .) mat33 of all geoms, then of all cameras, of the current states: MuJoCo Warp's
        own arrays, good until the next step. To be called and used within `on_device`."""
        mjw.com_pos(self.model, self.data)  # for cameras that track a centre of mass
        mjw.camlight(self.model, self.data)
        return self.data.geom_xpos, self.data.geom_xmat, self.data.cam_xpos, self.data.cam_xmat

    def _remembered(self) -> dict[str, wp.array]:
        names = ("goal_rot", "grip", "elapsed", "episode", "state_index", "broken")
        physics = {name: getattr(self.data, name) for name in ("time", "qpos", "qvel", "qacc_warmstart")}
        return {**physics, **{name: getattr(self._memory, name) for name in names}, "seed": self._seed_array}

    def snapshot(self) -> dict:
        """Everything that the future depends on, on the host."""
        return {name: array.numpy().copy() for name, array in self._remembered().items()}

    def restore(self, snapshot: dict) -> None:
        for name, array in self._remembered().items():
            array.assign(snapshot[name])
        with wp.ScopedDevice(self.device):
            self._look(self._obs)

    # ------------------------------------------------------------------ inside

    def _control_step(self) -> None:
        """The device's work of one `step`, without a word from the host."""
        n, data, memory = self.num_envs, self.data, self._memory
        counters = data.nefc, data.nacon, data.ncollision, data.njmax
        for substep in range(SUBSTEPS):
            mjw.step1(self.model, data)
            inputs = [substep == 0, self._arm, self._poses, memory, self._mass, data.qfrc_bias, data.cdof, data.subtree_com, *counters]
            wp.launch(control, n, inputs=inputs, outputs=[data.ctrl])
            mjw.step2(self.model, data)
        # LIBERO judges success on poses and contacts 2 ms old, but observations are of the state itself
        self._touching.zero_()
        wp.launch(find_touching, data.naconmax, inputs=[self._goal, data.nacon, data.contact.geom, data.contact.worldid, self._touching])
        flags = [self._reward, self._terminated, self._truncated, self._done, self._length]
        wp.launch(judge, n, inputs=[self._goal, self._poses, memory, self._touching, self.max_steps], outputs=flags)
        self._look(self._final_obs)
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            wp.launch(join_state, self._final_states.shape, inputs=[data.time, data.qpos, data.qvel], outputs=[self._final_states])
            self._begin(self._done, self._random)
            self._look(self._obs)
        else:
            wp.copy(self._obs, self._final_obs)
        wp.copy(self._peaks, memory.peaks)

    def _look(self, obs: wp.array) -> None:
        """Observe the states as they are."""
        mjw.kinematics(self.model, self.data)
        wp.launch(observe, obs.shape, inputs=[self._terms, self._poses], outputs=[obs])

    def _begin(self, mask: wp.array, official: wp.array) -> None:
        data = self.data
        state = [data.qpos, data.qvel, data.qacc_warmstart, data.time]
        wp.launch(begin, self.num_envs, inputs=[mask, official, self._seed_array, self._starts, self._memory], outputs=state)

    def _restart(self, mask: np.ndarray, official: np.ndarray) -> None:
        """Begin episodes where `mask`, from official init states or (-1) training states."""
        self._mask.assign(mask)
        self._official.assign(np.asarray(official, np.int32))
        self._begin(self._mask, self._official)
        self._look(self._obs)

    def _seed(self, seed: int | None) -> None:
        """Draws depend on the seed, the world and its episode number."""
        self._seed_array.fill_(int(np.random.default_rng(seed).integers(2**31)))
        self._memory.episode.zero_()

    @staticmethod
    def _only(actions, active: np.ndarray):
        """Actions (num_envs, 7) of the active worlds, and no-ops for the others, which are at rest: array or tensor as given."""
        if isinstance(actions, torch.Tensor):
            mask = torch.as_tensor(np.asarray(active), device=actions.device)[:, None]
            return torch.where(mask, actions, torch.as_tensor(NO_OP, dtype=actions.dtype, device=actions.device))
        return np.where(np.asarray(active)[:, None], actions, NO_OP)

    def _take_actions(self, actions) -> None:
        if self.tensors and not isinstance(actions, np.ndarray):
            if tuple(actions.shape) != (self.num_envs, 7):
                raise ValueError(f"actions must have shape {(self.num_envs, 7)}, not {tuple(actions.shape)}")
            wp.copy(self._memory.actions, wp.from_torch(actions.detach().float().contiguous()))
            return
        actions = self._checked_actions(actions)
        self._memory.actions.assign(actions.astype(np.float32))

    def _check_contacts(self) -> None:
        """Report what did not fit into MuJoCo Warp's buffers, from its own counters. With tensors, a step late at most."""
        rows, contacts, pairs, broken = (int(x) for x in self._peaks.numpy())
        data, n = self.data, self.num_envs
        if max(contacts, pairs) > data.naconmax:
            self._failed = True
            needed = -(-max(contacts, pairs) * 5 // (4 * n))
            raise UserError(
                f"contacts of {self.task.id} overflow: {contacts} contacts, {pairs} pairs in {n} worlds, with room for {data.naconmax}, "
                f"so some were dropped; pass nconmax={needed} (now {self.sizes.nconmax}) to make_env"
            )
        if broken > self._warned:
            why = f"up to {rows} constraint rows in a world, with room for {data.njmax}; pass njmax={rows * 5 // 4} to make_env"
            why = why if rows > data.njmax else "the simulation became unstable"
            message = "%s: %d episodes truncated since they could not be simulated: %s"
            logging.getLogger(__name__).warning(message, self.task.id, broken, why)
            self._warned = 10 * broken  # not every time

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """What is launched within goes to the device, on CUDA to torch's stream: tensors go in and out, and neither waits for the other."""
        stream = wp.stream_from_torch(wp.device_to_torch(self.device)) if self.device.is_cuda else None
        with wp.ScopedDevice(self.device), wp.ScopedStream(stream, sync_exit=True):
            yield

    def _out(self, array: wp.array):
        """A copy that the next step leaves alone: a torch tensor on the device, or on the host."""
        return wp.to_torch(array).clone() if self.tensors else array.numpy().copy()


def _floats(array: wp.array) -> wp.array:
    """(N, .) view of an array of floats, vectors or matrices (N, ...), which must outlive it."""
    shape = array.shape[0], array.capacity // (4 * array.shape[0])
    return wp.array(ptr=array.ptr, dtype=float, shape=shape, device=array.device, copy=False)


def _host(values):
    return values.cpu().numpy() if hasattr(values, "cpu") else values
