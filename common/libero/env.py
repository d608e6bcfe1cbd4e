"""LIBERO's simulation as a gymnasium vector environment: exact, without robosuite in the loop, parallel over CPU cores.

The control step is compiled (`common.libero.step`) and holds no Python lock, so environments run in plain threads.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from common.cli import UserError, usable_cores
from common.libero.goals import contacts_hold, goal_table
from common.libero.observation import StateObservation, proprioception
from common.libero.step import NO_OP, SUBSTEPS, addresses, control_steps, update_sleep
from common.libero.tasks import Task

PHYSICS = ("exact", "sleep", "coarse")
COARSE_SUBSTEPS = 12  # of 4.2 ms; contacts of LIBERO's grippers, with a time constant of 10 ms, need steps of at most 5
SLEEP_TOLERANCE = 1e-4  # m/s: what is slower, with all that it touches, for ten physics steps falls asleep (MuJoCo 3.8's default)
THROWN = 0.06  # m that a thing moves aside as it comes to rest: more is taken for thrown. On a neighbour's rim it may slide 5.6 cm

_processes = 1


def share_cores(processes: int) -> None:
    """For each of several worker processes at its start: environments take one share of the cores, and the worker ends with its parent.

    A parent that is killed tells its workers nothing: they would finish what they are at, and then wait for more for ever.
    """
    global _processes
    _processes = processes
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class LiberoEnv(VectorEnv):
    """What both backends share, whatever simulates: spaces, limits, and checks of what they are given."""

    def __init__(self, task: Task, num_envs: int, settle_steps: int, max_steps: int | None, autoreset_mode: AutoresetMode):
        if autoreset_mode not in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
            raise ValueError("autoreset_mode is SAME_STEP or DISABLED")
        self.task, self.num_envs, self.settle_steps = task, num_envs, settle_steps
        self.max_steps = task.max_steps if max_steps is None else max_steps
        self.autoreset_mode = autoreset_mode
        self.metadata = {"autoreset_mode": autoreset_mode, "render_fps": 20}
        self.observe = StateObservation(task)
        self.obs_layout = self.observe.layout
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (self.observe.size,), np.float32)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (7,), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def _checked_indices(self, indices) -> np.ndarray:
        """Indices of official init states, one or one for each environment -> (num_envs,) int64; ValueError if there is no such state."""
        indices = np.broadcast_to(np.asarray(indices, np.int64), (self.num_envs,))
        if indices.min() < 0 or indices.max() >= len(self.task.init_states):
            raise ValueError(f"init_state indices run from 0 to {len(self.task.init_states) - 1}")
        return indices

    def _checked_actions(self, actions) -> np.ndarray:
        """Actions (num_envs, 7) float64; ValueError for another shape, and for what is no finite number."""
        actions = np.asarray(actions)
        kind = "" if actions.dtype.kind in "fiub" else f" of {actions.dtype}"
        actions = actions if kind else np.ascontiguousarray(actions, np.float64)
        if kind or actions.shape != (self.num_envs, 7) or not np.isfinite(actions).all():
            raise ValueError(f"actions must be finite numbers of shape {(self.num_envs, 7)}, not {actions.shape}{kind}")
        return actions

    def _checked_states(self, states: np.ndarray, envs: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The environments meant by `envs` (None: all), and their states (n, 1 + nq + nv) float64; ValueError for another shape."""
        envs = np.arange(self.num_envs) if envs is None else np.asarray(envs)
        states = np.asarray(states, np.float64)
        width = 1 + self.task.model.nq + self.task.model.nv
        if states.shape != (len(envs), width):
            raise ValueError(f"states must have shape {(len(envs), width)}, not {states.shape}")
        return envs, states


class LiberoVectorEnv(LiberoEnv):
    """A LIBERO task as `gymnasium.vector.VectorEnv` on CPU cores.

    Actions (num_envs, 7) in [-1, 1]: hand translation (0.05 m full scale) and rotation (axis-angle, 0.5 rad full scale) in
    the world frame, and the gripper (its sign: negative opens, positive closes). Reward 1 at success, which terminates;
    `max_steps` truncates. `reset` starts from a training state, or from the official init states in
    `options={"init_state": indices}`, runs `settle_steps` no-ops, and then observes. A training state that things are `thrown` from
    gives way to the next one.

    Autoreset is gymnasium's SAME_STEP (the observation is the next episode's first, `info["final_obs"]` the last one's,
    `info["final_states"]` its state) or DISABLED (`options={"reset_mask": mask}` resets some).

    `step(actions, active)` moves only the environments whose number in `active` (num_envs,) bool is True: those that have ended and
    have no further episode to run cost nothing. The others stand still; what is returned of them means nothing.

    `physics` is "exact" (LIBERO's, to the bit) or "sleep": what rests is left alone until something touches it (MuJoCo's sleeping
    islands), which is faster and differs by what a body would still have crept, or "coarse": the same in 12 physics steps a control step
    instead of 25, which is about twice as fast as "sleep", and which training takes (docs/physics.md).
    """

    def __init__(
        self,
        task: Task,
        num_envs: int = 1,
        seed: int | None = None,
        settle_steps: int = 10,
        max_steps: int | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
        num_threads: int | None = None,
        physics: str = "exact",
    ):
        super().__init__(task, num_envs, settle_steps, max_steps, autoreset_mode)
        self.physics, self.model = physics, physics_model(task.model, physics)
        self._np_random, self._np_random_seed = np.random.default_rng(seed), -1 if seed is None else seed
        self._settled: dict[tuple[str, int], tuple[np.ndarray, ...]] = {}
        self._thrown: set[tuple[str, int]] = set()

        model = self.model
        self.data = [mujoco.MjData(model) for _ in range(num_envs)]
        pointers = np.stack([addresses(d) for d in self.data])
        data = np.array([d._address for d in self.data], np.int64)
        sizes = tuple(int(n) for n in (model.nq, model.nv, model.nu, model.nsite, model.nC, task.eef_site))
        arm = np.array([task.arm_qpos, task.arm_dof, task.arm_actuators])
        low, high = model.actuator_ctrlrange[task.gripper_actuators].T
        fingers = np.stack([np.array(task.gripper_actuators, np.float64), (high + low) / 2, (high - low) / 2], axis=1)
        limits = model.actuator_ctrlrange[task.arm_actuators].copy()
        q0 = np.array(task.initial_joints)
        masses, goal = mass_addresses(task), goal_table(tuple(task.goal))
        self._constants = (model._address, data, pointers, sizes, arm, masses, q0, limits, fingers, goal, self.observe.terms)
        self._constants += (substeps(model),)
        # LIBERO's controller starts with the arm in its reset pose, and keeps that goal orientation until told otherwise.
        home = self.data[0]
        home.qpos[task.arm_qpos] = task.initial_joints
        mujoco.mj_kinematics(model, home)
        self._home_rot = home.site_xmat[task.eef_site].reshape(3, 3).copy()
        self._goal_rot = np.tile(self._home_rot, (num_envs, 1, 1))
        self._grip = np.zeros((num_envs, 2))
        self._near, self._obs = np.zeros(num_envs, bool), np.zeros((num_envs, self.observe.size), np.float32)
        self._elapsed = np.zeros(num_envs, np.int64)
        self._state_indices = np.zeros(num_envs, np.int64)
        self._all, self._num_threads = np.arange(num_envs), num_threads or max(1, usable_cores() // _processes)
        self._threads = ThreadPoolExecutor(self._num_threads)

    # ------------------------------------------------------------------ gymnasium's interface

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Start episodes. `options`: "init_state" (num_envs,) indices of official init states; "reset_mask" (num_envs,) bool."""
        if seed is not None:
            self._np_random, self._np_random_seed = np.random.default_rng(seed), seed
        options = options or {}
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs, bool)), bool)
        if (indices := options.get("init_state")) is not None:
            indices = self._checked_indices(indices)
        self._reset(np.flatnonzero(mask), indices)
        return self._observations(), {"state_index": self._state_indices.copy()}

    def step(self, actions, active: np.ndarray | None = None):
        actions = self._checked_actions(actions)
        moving = self._all if active is None else np.flatnonzero(active)
        self._advance(actions, moving)
        self._elapsed[moving] += 1
        terminated = self._near.copy()
        for i in np.flatnonzero(self._near):
            terminated[i] = contacts_hold(self.task.goal, self.data[i], self.task.model)
        truncated = ~terminated & (self._elapsed >= self.max_steps)
        observations, info = self._obs.copy(), {}
        done = terminated | truncated
        if done.any() and self.autoreset_mode == AutoresetMode.SAME_STEP:
            info = {"final_obs": observations.copy(), "_final_obs": done.copy(), "final_length": self._elapsed.copy()}
            info["final_states"] = self.get_state()
            self._reset(np.flatnonzero(done), None)
            for i in np.flatnonzero(done):
                observations[i] = self.observe(self.data[i])
        return observations, terminated.astype(np.float64), terminated, truncated, info

    def close_extras(self, **kwargs):
        self._threads.shutdown()

    # ------------------------------------------------------------------ LIBERO's states

    def get_state(self) -> np.ndarray:
        """(num_envs, 1 + nq + nv) float64: time, qpos, qvel, LIBERO's flattened simulator state."""
        return np.stack([np.concatenate([[d.time], d.qpos, d.qvel]) for d in self.data])

    def set_state(self, states: np.ndarray, gripper: np.ndarray | None = None, envs: np.ndarray | None = None) -> None:
        """Continue from (num_envs, 1 + nq + nv) states, as LIBERO's `set_init_state` does in a freshly reset environment.

        A state doesn't hold the controller's memory. `gripper` (num_envs,) in [-1, 1] is how far the fingers were told to
        close (-1 open, 1 closed); without it they start in the middle, as after LIBERO's reset. `envs` (n,) indices: only
        these environments, with n states.
        """
        envs, states = self._checked_states(states, envs)
        for row, i in enumerate(envs):
            self._load(i, states[row], 0.0 if gripper is None else float(gripper[row]))
        self._elapsed[envs] = 0

    def observations(self) -> np.ndarray:
        """(num_envs, size) float32 of the current states."""
        return self._observations()

    def proprioception(self) -> dict[str, np.ndarray]:
        """LIBERO's robot observations, (num_envs, .) each; see `proprioception`."""
        rows = [proprioception(self.task, d) for d in self.data]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def snapshot(self) -> dict:
        """Everything that the future depends on: `restore` goes on exactly from here."""
        return {
            "physics": np.stack([self._integration_state(d) for d in self.data]),
            "goal_rot": self._goal_rot.copy(),
            "grip": self._grip.copy(),
            "elapsed": self._elapsed.copy(),
            "state_indices": self._state_indices.copy(),
            "rng": self._np_random.bit_generator.state,
        }

    def restore(self, snapshot: dict) -> None:
        for i, physics in enumerate(snapshot["physics"]):
            self._set_integration_state(i, physics)
        self._goal_rot[:], self._grip[:] = snapshot["goal_rot"], snapshot["grip"]
        self._elapsed[:], self._state_indices[:] = snapshot["elapsed"], snapshot["state_indices"]
        self._np_random.bit_generator.state = snapshot["rng"]

    def set_physics(self, physics: str) -> None:
        """Go on by another `physics` from where all environments are."""
        self.physics, self.model = physics, physics_model(self.task.model, physics)
        self._constants = (self.model._address, *self._constants[1:-1], substeps(self.model))
        self._settled.clear()  # things come to rest a little elsewhere
        self._thrown.clear()

    # ------------------------------------------------------------------ inside

    def _observations(self) -> np.ndarray:
        return np.stack([self.observe(d) for d in self.data])

    def _advance(self, actions: np.ndarray, envs: np.ndarray | None = None, repeat: int = 1) -> None:
        """Control steps with constant actions, in threads; `envs` (default all) are the environments that move."""

        envs, counter = self._all if envs is None else envs, np.zeros(1, np.int64)
        memory = actions, repeat, self._goal_rot, self._grip, self._near, self._obs
        arguments = (envs, counter.ctypes.data, *self._constants, *memory)
        helpers = [self._threads.submit(control_steps, *arguments) for _ in range(min(self._num_threads, len(envs)) - 1)]
        control_steps(*arguments)  # this thread works too
        for helper in helpers:
            helper.result()

    def _reset(self, envs: np.ndarray, init_states: np.ndarray | None) -> None:
        kind, pool = ("train", self.task.train_states) if init_states is None else ("init", self.task.init_states)
        for i in envs:
            self._state_indices[i] = int(self._np_random.integers(len(pool)) if init_states is None else init_states[i])
        todo = envs
        for _ in pool:  # once, but for training states that things are thrown from
            self._settle(kind, pool, todo)
            todo = [i for i in todo if (kind, int(self._state_indices[i])) in self._thrown]
            if not len(todo):
                break
            self._state_indices[todo] = (self._state_indices[todo] + 1) % len(pool)
        for i in envs:
            physics, self._goal_rot[i], self._grip[i] = self._settled[kind, int(self._state_indices[i])]
            self._set_integration_state(i, physics)
            self._elapsed[i], self._near[i] = 0, False

    def _settle(self, kind: str, pool: np.ndarray, envs: np.ndarray) -> None:
        """Have things come to rest in the states that `envs` are to start from, where that is not known yet."""
        new = {int(self._state_indices[i]): i for i in envs if (kind, int(self._state_indices[i])) not in self._settled}
        for index, i in new.items():
            self._load(i, pool[index], 0.0)
        if new and self.settle_steps:
            actions = np.tile(NO_OP, (self.num_envs, 1))
            self._advance(actions, np.array(list(new.values())), self.settle_steps)
        for index, i in new.items():
            self._settled[kind, index] = self._integration_state(self.data[i]), self._goal_rot[i].copy(), self._grip[i].copy()
            if kind == "train" and thrown(self.task, pool[index, 1 : 1 + self.model.nq], self.data[i].qpos):
                self._thrown.add((kind, index))

    def _load(self, i: int, state: np.ndarray, gripper: float) -> None:
        model, data = self.model, self.data[i]
        mujoco.mj_resetData(model, data)
        data.time, data.qpos[:], data.qvel[:] = state[0], state[1 : 1 + model.nq], state[1 + model.nq :]
        self._goal_rot[i] = self._home_rot
        self._grip[i] = (-gripper, gripper)
        mujoco.mj_fwdPosition(model, data)

    def _integration_state(self, data: mujoco.MjData) -> np.ndarray:
        """All that `mj_step` goes on from; and, where physics sleep, which trees are asleep, or how soon they will be."""
        state = np.empty(mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(self.model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        return state if self.physics == "exact" else np.concatenate([state, data.tree_asleep])

    def _set_integration_state(self, i: int, physics: np.ndarray) -> None:
        data = self.data[i]
        if self.physics != "exact":
            physics, asleep = np.split(physics, [len(physics) - self.model.ntree])
            mujoco.mj_resetData(self.model, data)  # all awake, or poses of what sleeps would not be computed
        mujoco.mj_setState(self.model, data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_fwdPosition(self.model, data)  # poses and contacts, leaving the solver's warm start alone
        if self.physics != "exact":
            data.tree_asleep[:] = asleep
            update_sleep(self.model, data)


def thrown(task: Task, placed: np.ndarray, at_rest: np.ndarray) -> np.ndarray:
    """Whether a thing has come to rest elsewhere than it was placed; both (..., nq) -> (...) bool.

    LIBERO's placement lets things overlap, which throws them as far as a metre. Its official init states have next to none of these
    (docs/simulator.md), so training has none.
    """
    free = [o.joint_qpos for o in task.objects.values() if o.joint_qpos is not None]
    return np.any([np.linalg.norm((at_rest - placed)[..., j : j + 2], axis=-1) > THROWN for j in free], axis=0)


def can_sleep() -> bool:
    """Whether this MuJoCo can let sleep what rests."""
    return hasattr(mujoco.mjtEnableBit, "mjENBL_SLEEP")


def substeps(model: mujoco.MjModel) -> int:
    """How many physics steps are a control step."""
    return round(0.05 / model.opt.timestep)


def physics_model(model: mujoco.MjModel, physics: str) -> mujoco.MjModel:
    """The model itself for "exact", else a copy that lets what rests sleep; UserError for another word or an old MuJoCo.

    Two things that no state depends on and nobody reads are switched off in the model itself: LIBERO's sensors of the wrist's force and
    torque, and marks of which boxes in meshes' trees were looked at, which MuJoCo clears each physics step for its viewer: 0.8 MB.
    """
    if physics not in PHYSICS:
        raise UserError(f"no physics {physics!r}; choose from {', '.join(PHYSICS)}")
    model.vis.global_.bvactive = 0
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_SENSOR
    if physics == "exact":
        return model
    if not can_sleep():
        raise UserError(f"physics {physics} needs MuJoCo 3.8 or later, and this is {mujoco.__version__}; choose exact")
    model = copy.copy(model)
    model.opt.enableflags |= mujoco.mjtEnableBit.mjENBL_SLEEP
    model.opt.sleep_tolerance = SLEEP_TOLERANCE
    if physics == "coarse":
        model.opt.timestep *= SUBSTEPS / COARSE_SUBSTEPS
    return model


def mass_addresses(task: Task) -> np.ndarray:
    """(7, 7) int64: where the arm's mass matrix entries lie in mjData.M (the lower triangle, compressed rows), -1 for structural zeros."""
    model, dofs = task.model, task.arm_dof
    addresses = np.full((7, 7), -1)
    for row, dof in enumerate(dofs):
        first = int(model.M_rowadr[dof])
        for address in range(first, first + int(model.M_rownnz[dof])):
            if (ancestor := int(model.M_colind[address])) in dofs:
                column = dofs.index(ancestor)
                addresses[row, column] = addresses[column, row] = address
    return addresses
