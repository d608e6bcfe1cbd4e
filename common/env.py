"""LIBERO's simulation as a gymnasium vector environment: exact, without robosuite in the loop, parallel over CPU cores.

One control step (20 Hz) is 25 physics substeps of `mj_step1`, OSC_POSE, `mj_step2`, all in one compiled function that calls
MuJoCo's C library directly and holds no Python lock, so environments run in plain threads.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import llvmlite.binding
import mujoco
import numba
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numba.core import types
from numba.extending import intrinsic

from common.cli import UserError
from common.tasks import Predicate, Task, load_task

SUBSTEPS = 25  # 20 Hz control over 500 Hz physics
NO_OP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])  # what published evaluations send while objects settle
KP = 150.0  # robosuite's OSC_POSE: stiffness, damping ratio 1
NULL_KP = 10.0  # null-space stiffness toward the arm's reset pose
GRIPPER_SPEED = 0.01  # of the finger range, a substep

# ---------------------------------------------------------------------------------------------- compiled control step

_library = next(Path(mujoco.__file__).parent.glob("libmujoco*"), None)
if _library is None:
    raise ImportError(f"no libmujoco beside {mujoco.__file__}; reinstall mujoco with pip")
_libmujoco = ctypes.CDLL(str(_library))
for _name in ("mj_step1", "mj_step2", "mj_jacSite"):  # by name, so that numba can cache the compiled code
    llvmlite.binding.add_symbol(_name, ctypes.cast(getattr(_libmujoco, _name), ctypes.c_void_p).value)
_mj_step1 = types.ExternalFunction("mj_step1", types.void(types.intp, types.intp))
_mj_step2 = types.ExternalFunction("mj_step2", types.void(types.intp, types.intp))
_mj_jac_site = types.ExternalFunction("mj_jacSite", types.void(types.intp, types.intp, types.intp, types.intp, types.int32))


@intrinsic
def _pointer(typing_context, address):
    """The integer `address` as a pointer that numba.carray accepts."""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.intp), codegen


@numba.njit(inline="always")
def _view(address, shape):
    return numba.carray(_pointer(address), shape, np.float64)


@numba.njit
def _cholesky(matrix, n):
    """In-place lower Cholesky factor of the leading n x n block of a symmetric positive definite matrix."""
    for i in range(n):
        for j in range(i + 1):
            total = matrix[i, j]
            for k in range(j):
                total -= matrix[i, k] * matrix[j, k]
            matrix[i, j] = np.sqrt(max(total, 1e-18)) if i == j else total / matrix[j, j]


@numba.njit
def _solve(factor, n, x):
    """Solve L L^T x = x in place."""
    for i in range(n):
        for k in range(i):
            x[i] -= factor[i, k] * x[k]
        x[i] /= factor[i, i]
    for i in range(n - 1, -1, -1):
        for k in range(i + 1, n):
            x[i] -= factor[k, i] * x[k]
        x[i] /= factor[i, i]


@numba.njit
def _axis_angle_matrix(v, out):
    """Rotation matrix (Rodrigues) of the axis-angle vector v (rad)."""
    angle = np.sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2])
    if angle == 0.0:
        x, y, z = 0.0, 0.0, 0.0
    else:
        x, y, z = v[0] / angle, v[1] / angle, v[2] / angle
    c, s = np.cos(angle), np.sin(angle)
    t = 1.0 - c
    out[0, 0], out[0, 1], out[0, 2] = t * x * x + c, t * x * y - s * z, t * x * z + s * y
    out[1, 0], out[1, 1], out[1, 2] = t * x * y + s * z, t * y * y + c, t * y * z - s * x
    out[2, 0], out[2, 1], out[2, 2] = t * x * z - s * y, t * y * z + s * x, t * z * z + c


@numba.njit
def _osc_torques(M, J, bias, q, qd, q0, pos_error, ori_error, velocity, torque):
    """Operational space control with decoupled position and orientation, and a null-space pull toward q0.

    Khatib 1987, as robosuite 1.4's OSC_POSE computes it: tau = J^T [Lambda_p f; Lambda_o m] + bias + N^T M (kp (q0-q) - kd qd).
    With Jbar = M^-1 J^T Lambda, the last term is M a - J^T Lambda J a for a = kp (q0 - q) - kd qd, so N is never formed.

    Args: M (7, 7) arm mass matrix, overwritten; J (6, 7); bias, q, qd, q0 (7,); pos_error (3,) m, ori_error (3,) rad,
        velocity (6,) of the grip site; torque (7,) output, before clipping.
    """
    kd = 2.0 * np.sqrt(KP)
    null_kd = 2.0 * np.sqrt(NULL_KP)
    a = np.empty(7)
    for i in range(7):
        a[i] = NULL_KP * (q0[i] - q[i]) - null_kd * qd[i]
    for i in range(7):
        total = bias[i]
        for k in range(7):
            total += M[i, k] * a[k]
        torque[i] = total
    _cholesky(M, 7)
    A = np.empty((6, 6))  # J M^-1 J^T, the inverse of the full task-space inertia
    column = np.empty(7)
    for i in range(6):
        column[:] = J[i]
        _solve(M, 7, column)
        for j in range(6):
            total = 0.0
            for k in range(7):
                total += J[j, k] * column[k]
            A[j, i] = total
    wrench = np.empty(6)
    for i in range(3):
        wrench[i] = KP * pos_error[i] - kd * velocity[i]
        wrench[3 + i] = KP * ori_error[i] - kd * velocity[3 + i]
    block = A[:3, :3].copy()
    _cholesky(block, 3)
    _solve(block, 3, wrench[:3])
    block = A[3:, 3:].copy()
    _cholesky(block, 3)
    _solve(block, 3, wrench[3:])
    null = np.empty(6)
    for i in range(6):
        total = 0.0
        for k in range(7):
            total += J[i, k] * a[k]
        null[i] = total
    _cholesky(A, 6)
    _solve(A, 6, null)
    for k in range(7):
        for i in range(6):
            torque[k] += J[i, k] * (wrench[i] - null[i])


@numba.njit(nogil=True, cache=True)
def _control_steps(first, last, model, data, pointers, sizes, arm, masses, q0, limits, fingers, actions, goal_rot, grip, repeat):
    """Run `repeat` control steps of environments first..last-1 with constant actions.

    Args:
        model, data: addresses of mjModel and of each environment's mjData; pointers (num_envs, 7): addresses of its qpos,
            qvel, ctrl, site_xpos, site_xmat, qM, qfrc_bias; sizes: nq, nv, nu, nsite, nM, grip site id.
        arm (3, 7): qpos and dof addresses and actuators; masses (7, 7): where M[i, j] lies in the sparse qM, or -1.
        limits (7, 2): torque limits; fingers (2, 3): actuator, middle and half width of its control range.
        goal_rot (num_envs, 3, 3), grip (num_envs, 2): the controller's memory, updated in place.
    """
    nq, nv, nu, nsite, nM, grip_site = sizes
    jacobian = np.zeros((2, 3, nv))
    jac_pos, jac_rot = jacobian[0].ctypes.data, jacobian[1].ctypes.data
    M, J = np.empty((7, 7)), np.empty((6, 7))
    q, qd, bias, torque = np.empty(7), np.empty(7), np.empty(7), np.empty(7)
    goal, pos_error, ori_error, velocity = np.empty(3), np.empty(3), np.empty(3), np.empty(6)
    delta, turn = np.empty(3), np.empty((3, 3))
    for e in range(first, last):
        qpos, qvel = _view(pointers[e, 0], (nq,)), _view(pointers[e, 1], (nv,))
        ctrl = _view(pointers[e, 2], (nu,))
        site_xpos, site_xmat = _view(pointers[e, 3], (nsite, 3)), _view(pointers[e, 4], (nsite, 3, 3))
        qM, qfrc_bias = _view(pointers[e, 5], (nM,)), _view(pointers[e, 6], (nv,))
        eef, rot = site_xpos[grip_site], site_xmat[grip_site]
        for substep in range(repeat * SUBSTEPS):
            _mj_step1(model, data[e])
            if substep % SUBSTEPS == 0:  # a new action sets the goal pose, relative to where the hand is now
                turned = False
                for i in range(3):
                    goal[i] = eef[i] + 0.05 * min(1.0, max(-1.0, actions[e, i]))
                    delta[i] = 0.5 * min(1.0, max(-1.0, actions[e, 3 + i]))
                    turned = turned or delta[i] != 0.0
                if turned:  # an all-zero rotation keeps the old goal orientation
                    _axis_angle_matrix(delta, turn)
                    for i in range(3):
                        for j in range(3):
                            goal_rot[e, i, j] = turn[i, 0] * rot[0, j] + turn[i, 1] * rot[1, j] + turn[i, 2] * rot[2, j]
            _mj_jac_site(model, data[e], jac_pos, jac_rot, grip_site)
            for k in range(7):
                q[k], qd[k], bias[k] = qpos[arm[0, k]], qvel[arm[1, k]], qfrc_bias[arm[1, k]]
                for i in range(3):
                    J[i, k], J[3 + i, k] = jacobian[0, i, arm[1, k]], jacobian[1, i, arm[1, k]]
                for i in range(7):
                    M[i, k] = qM[masses[i, k]] if masses[i, k] >= 0 else 0.0
            for i in range(3):
                pos_error[i] = goal[i] - eef[i]
                # half the sum over the axes of current x desired
                a, b = (i + 1) % 3, (i + 2) % 3
                total = 0.0
                for c in range(3):
                    total += rot[a, c] * goal_rot[e, b, c] - rot[b, c] * goal_rot[e, a, c]
                ori_error[i] = 0.5 * total
            for i in range(6):
                total = 0.0
                for k in range(7):
                    total += J[i, k] * qd[k]
                velocity[i] = total
            _osc_torques(M, J, bias, q, qd, q0, pos_error, ori_error, velocity, torque)
            for k in range(7):
                ctrl[arm[2, k]] = min(limits[k, 1], max(limits[k, 0], torque[k]))
            # LIBERO's gripper: the sign of the action moves both fingers' targets by a fixed amount a substep
            step = GRIPPER_SPEED * np.sign(actions[e, 6])
            grip[e, 0] = min(1.0, max(-1.0, grip[e, 0] - step))
            grip[e, 1] = min(1.0, max(-1.0, grip[e, 1] + step))
            for f in range(2):
                ctrl[int(fingers[f, 0])] = fingers[f, 1] + fingers[f, 2] * grip[e, f]
            _mj_step2(model, data[e])


# ---------------------------------------------------------------------------------------------- goal predicates


def predicate_holds(predicate: Predicate, data: mujoco.MjData, model: mujoco.MjModel) -> bool:
    """LIBERO's `_eval_predicate` on one environment, with LIBERO's exact semantics.

    Like LIBERO it reads `data` as the last physics substep left it: joint positions after integration, body poses and
    contacts from before (2 ms older).
    """
    if predicate.kind == "joint":
        q = data.qpos[list(predicate.qpos)]
        value, threshold = predicate.sign * q, predicate.sign * predicate.threshold
        holds = value >= threshold if predicate.inclusive else value > threshold
        return bool(holds.any() if predicate.any else holds.all())
    position = data.xpos[predicate.body]
    if predicate.kind == "ontop":  # LIBERO compares body origins: the target's not above the object's, 3 cm apart at most
        target = data.xpos[predicate.target_body]
        near = target[2] <= position[2] and np.linalg.norm(target[:2] - position[:2]) < 0.03
    else:
        center, rot = data.site_xpos[predicate.site], data.site_xmat[predicate.site].reshape(3, 3)
        size = np.array(predicate.size)
        if predicate.kind == "contain":  # an axis-aligned box around the turned site, 1 cm deeper at the bottom
            extent = np.abs(rot @ size)
            lower, upper = center - extent, center + extent
            lower[2] -= 0.01
            near = np.all(position > lower) and np.all(position < upper)
        else:
            offset = rot @ (position - center)  # (sic) LIBERO does not transpose
            near = size[2] - 0.005 < offset[2] < size[2] + 0.10 and np.all(np.abs(offset[:2]) < size[:2])
    return bool(near) and (predicate.contact is None or in_contact(data, model, *predicate.contact))


def in_contact(data: mujoco.MjData, model: mujoco.MjModel, geoms_1: tuple[int, ...], geoms_2: tuple[int, ...]) -> bool:
    """Whether any geom of one group touches any of the other in the current contact list."""
    pairs = data.contact.geom  # (ncon, 2)
    first, second = np.zeros(model.ngeom, bool), np.zeros(model.ngeom, bool)
    first[list(geoms_1)], second[list(geoms_2)] = True, True
    a, b = pairs[:, 0], pairs[:, 1]
    return bool(np.any((first[a] & second[b]) | (first[b] & second[a])))


def success(task: Task, data: mujoco.MjData) -> bool:
    """LIBERO's `_check_success`: all conjuncts of the goal hold."""
    return all(predicate_holds(p, data, task.model) for p in task.goal)


# ---------------------------------------------------------------------------------------------- observations


class StateObservation:
    """The float32 state vector of the objects that matter for the goal, with named slices in `layout`.

    Positions in metres, world frame; rotations as the first two columns of the rotation matrix (6 numbers; Zhou et al. 2019);
    joints in rad or m; velocities per second. For each movable object that the goal or BDDL's `obj_of_interest` names: its
    position, rotation and position relative to the hand; for each region named: its position relative to the hand; for
    each articulated joint named: its position and its moving body's centre relative to the hand; for each binary goal: the
    object's position relative to the target.
    """

    def __init__(self, task: Task):
        self.task = task
        names = list(dict.fromkeys([a for p in task.goal for a in p.args] + task.of_interest))
        self.objects = [task.objects[n] for n in names if n in task.objects and task.objects[n].joint_qpos is not None]
        self.sites = [task.sites[n] for n in names if n in task.sites]
        # A region inside a drawer brings its drawer's joint; a whole fixture brings all of its joints.
        joints = [j for n in names for j in (task.sites.get(n) or task.objects[n]).joints]
        self.joints = list(dict.fromkeys(joints))
        self.pairs = [p for p in task.goal if p.kind != "joint"]
        sizes = {"eef_pos": 3, "eef_rot": 6, "gripper_qpos": 2, "gripper_qvel": 2}
        for obj in self.objects:
            sizes |= {f"{obj.name}_pos": 3, f"{obj.name}_rot": 6, f"{obj.name}_to_eef": 3}
        for site in self.sites:
            sizes[f"{site.name}_to_eef"] = 3
        for joint in self.joints:
            name = task.model.joint(joint).name
            sizes |= {f"{name}_qpos": 1, f"{name}_to_eef": 3}
        for pair in self.pairs:
            sizes[f"{pair.args[0]}_to_{pair.args[1]}"] = 3
        ends = np.cumsum(list(sizes.values()))
        self.layout = {name: slice(int(end - size), int(end)) for (name, size), end in zip(sizes.items(), ends, strict=True)}
        self.size = int(ends[-1])

    def __call__(self, data: mujoco.MjData) -> np.ndarray:
        """(size,) float32 of one environment."""
        task = self.task
        eef, rot = data.site_xpos[task.eef_site], data.site_xmat[task.eef_site]
        parts = [eef, rot[[0, 3, 6, 1, 4, 7]], data.qpos[task.gripper_qpos], data.qvel[task.gripper_dof]]
        for obj in self.objects:
            parts += [data.xpos[obj.body], data.xmat[obj.body][[0, 3, 6, 1, 4, 7]], data.xpos[obj.body] - eef]
        parts += [data.site_xpos[site.site] - eef for site in self.sites]
        for joint in self.joints:
            body = task.model.jnt_bodyid[joint]
            parts += [data.qpos[[task.model.jnt_qposadr[joint]]], data.xipos[body] - eef]
        for p in self.pairs:
            target = data.site_xpos[p.site] if p.site >= 0 else data.xpos[p.target_body]
            parts.append(data.xpos[p.body] - target)
        return np.concatenate(parts).astype(np.float32)


def observe_states(task: Task, states: np.ndarray) -> np.ndarray:
    """(T, size) float32 state observations of stored (T, 1 + nq + nv) states: what the environment returned in them."""
    observe, data, nq = StateObservation(task), mujoco.MjData(task.model), task.model.nq
    rows = np.empty((len(states), observe.size), np.float32)
    for row, state in zip(rows, states, strict=True):
        data.qpos[:], data.qvel[:] = state[1 : 1 + nq], state[1 + nq :]
        mujoco.mj_kinematics(task.model, data)
        row[:] = observe(data)
    return rows


def proprioception(task: Task, data: mujoco.MjData) -> dict[str, np.ndarray]:
    """LIBERO's robot observations of one environment, float64.

    ee_pos (3,) m, ee_quat (4,) xyzw, ee_ori (3,) axis-angle rad, gripper_states (2,) m, joint_states (7,) rad.
    """
    quat = data.xquat[task.hand_body]  # LIBERO reports the grip site's position, but the hand's orientation
    return {
        "ee_pos": data.site_xpos[task.eef_site].copy(),
        "ee_quat": quat[[1, 2, 3, 0]],
        "ee_ori": axis_angle(quat),
        "gripper_states": data.qpos[task.gripper_qpos],
        "joint_states": data.qpos[task.arm_qpos],
    }


def axis_angle(quat_wxyz: np.ndarray) -> np.ndarray:
    """Axis-angle vector of a unit quaternion as robosuite's `quat2axisangle` gives it: angle 2 acos(w), in [0, 2 pi]."""
    w = float(np.clip(quat_wxyz[0], -1.0, 1.0))
    norm = np.sqrt(1.0 - w * w)
    return np.zeros(3) if np.isclose(norm, 0.0) else np.asarray(quat_wxyz[1:]) * (2.0 * np.arccos(w) / norm)


# ---------------------------------------------------------------------------------------------- the environment


class LiberoVectorEnv(VectorEnv):
    """A LIBERO task as `gymnasium.vector.VectorEnv` on CPU cores.

    Actions (num_envs, 7) in [-1, 1]: hand translation (0.05 m full scale) and rotation (axis-angle, 0.5 rad full scale) in
    the world frame, and the gripper (its sign: negative opens, positive closes). Reward 1 at success, which terminates;
    `max_steps` truncates. `reset` starts from a training state, or from the official init states in
    `options={"init_state": indices}`, runs `settle_steps` no-ops, and then observes.

    Autoreset is gymnasium's SAME_STEP (the observation is the next episode's first, `info["final_obs"]` the last one's) or
    DISABLED (`options={"reset_mask": mask}` resets some).
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
    ):
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
        self._np_random = np.random.default_rng(seed)
        self._settled: dict[tuple[str, int], tuple[np.ndarray, ...]] = {}

        model = task.model
        self.data = [mujoco.MjData(model) for _ in range(num_envs)]
        fields = ("qpos", "qvel", "ctrl", "site_xpos", "site_xmat", "qM", "qfrc_bias")
        pointers = np.array([[getattr(d, f).ctypes.data for f in fields] for d in self.data], np.int64)
        addresses = np.array([d._address for d in self.data], np.int64)
        sizes = tuple(int(n) for n in (model.nq, model.nv, model.nu, model.nsite, model.nM, task.eef_site))
        arm = np.array([task.arm_qpos, task.arm_dof, task.arm_actuators])
        low, high = model.actuator_ctrlrange[task.gripper_actuators].T
        fingers = np.stack([np.array(task.gripper_actuators, np.float64), (high + low) / 2, (high - low) / 2], axis=1)
        limits = model.actuator_ctrlrange[task.arm_actuators].copy()
        q0 = np.array(task.initial_joints)
        self._constants = (model._address, addresses, pointers, sizes, arm, _mass_addresses(task), q0, limits, fingers)
        # LIBERO's controller starts with the arm in its reset pose, and keeps that goal orientation until told otherwise.
        home = self.data[0]
        home.qpos[task.arm_qpos] = task.initial_joints
        mujoco.mj_kinematics(model, home)
        self._home_rot = home.site_xmat[task.eef_site].reshape(3, 3).copy()
        self._goal_rot = np.tile(self._home_rot, (num_envs, 1, 1))
        self._grip = np.zeros((num_envs, 2))
        self._elapsed = np.zeros(num_envs, np.int64)
        self._state_indices = np.zeros(num_envs, np.int64)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._threads = ThreadPoolExecutor(min(num_threads or cores, num_envs))

    # ------------------------------------------------------------------ gymnasium's interface

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Start episodes. `options`: "init_state" (num_envs,) indices of official init states; "reset_mask" (num_envs,) bool."""
        if seed is not None:
            self._np_random = np.random.default_rng(seed)
        options = options or {}
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs, bool)), bool)
        if (indices := options.get("init_state")) is not None:
            indices = np.broadcast_to(np.asarray(indices, np.int64), (self.num_envs,))
            if indices.min() < 0 or indices.max() >= len(self.task.init_states):
                raise ValueError(f"init_state indices run from 0 to {len(self.task.init_states) - 1}")
        self._reset(np.flatnonzero(mask), indices)
        return self._observations(), {"state_index": self._state_indices.copy()}

    def step(self, actions):
        actions = np.ascontiguousarray(actions, np.float64)
        if actions.shape != (self.num_envs, 7) or not np.isfinite(actions).all():
            raise ValueError(f"actions must be finite numbers of shape {(self.num_envs, 7)}, not {actions.shape}")
        self._advance(actions)
        self._elapsed += 1
        terminated = np.array([success(self.task, d) for d in self.data])
        truncated = ~terminated & (self._elapsed >= self.max_steps)
        for data in self.data:  # LIBERO judges success on poses 2 ms old; observations are of the state itself
            mujoco.mj_kinematics(self.task.model, data)
        observations, info = self._observations(), {}
        done = terminated | truncated
        if done.any() and self.autoreset_mode == AutoresetMode.SAME_STEP:
            info = {"final_obs": observations.copy(), "_final_obs": done.copy(), "final_length": self._elapsed.copy()}
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

    def set_state(self, states: np.ndarray, gripper: np.ndarray | None = None) -> None:
        """Continue from (num_envs, 1 + nq + nv) states, as LIBERO's `set_init_state` does in a freshly reset environment.

        A state doesn't hold the controller's memory. `gripper` (num_envs,) in [-1, 1] is how far the fingers were told to
        close (-1 open, 1 closed); without it they start in the middle, as after LIBERO's reset.
        """
        states = np.asarray(states, np.float64)
        if states.shape != (self.num_envs, 1 + self.task.model.nq + self.task.model.nv):
            raise ValueError(f"states of {self.task.id} have shape (num_envs, {1 + self.task.model.nq + self.task.model.nv})")
        for i, state in enumerate(states):
            self._load(i, state, 0.0 if gripper is None else float(gripper[i]))
        self._elapsed[:] = 0

    def observations(self) -> np.ndarray:
        """(num_envs, size) float32 of the current states."""
        return self._observations()

    def proprioception(self) -> dict[str, np.ndarray]:
        """LIBERO's robot observations, (num_envs, .) each; see `proprioception`."""
        rows = [proprioception(self.task, d) for d in self.data]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

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

    # ------------------------------------------------------------------ inside

    def _observations(self) -> np.ndarray:
        return np.stack([self.observe(d) for d in self.data])

    def _advance(self, actions: np.ndarray, envs: np.ndarray | None = None, repeat: int = 1) -> None:
        """Control steps with constant actions, in threads; `envs` (default all) are the environments that move."""

        def run(first, last):
            _control_steps(first, last, *self._constants, actions, self._goal_rot, self._grip, repeat)

        if envs is not None:
            list(self._threads.map(run, envs, envs + 1))
        else:  # small slices, so that an environment with many contacts doesn't hold up the others
            size = max(1, self.num_envs // (8 * self._threads._max_workers))
            starts = range(0, self.num_envs, size)
            list(self._threads.map(run, starts, (min(s + size, self.num_envs) for s in starts)))

    def _reset(self, envs: np.ndarray, init_states: np.ndarray | None) -> None:
        kind, pool = ("train", self.task.train_states) if init_states is None else ("init", self.task.init_states)
        for i in envs:
            index = int(self._np_random.integers(len(pool)) if init_states is None else init_states[i])
            self._state_indices[i] = index
        new = {int(self._state_indices[i]): i for i in envs if (kind, int(self._state_indices[i])) not in self._settled}
        for index, i in new.items():
            self._load(i, pool[index], 0.0)
        if new and self.settle_steps:
            actions = np.tile(NO_OP, (self.num_envs, 1))
            self._advance(actions, np.array(list(new.values())), self.settle_steps)
        for index, i in new.items():
            self._settled[kind, index] = self._integration_state(self.data[i]), self._goal_rot[i].copy(), self._grip[i].copy()
        for i in envs:
            physics, self._goal_rot[i], self._grip[i] = self._settled[kind, int(self._state_indices[i])]
            self._set_integration_state(i, physics)
            self._elapsed[i] = 0

    def _load(self, i: int, state: np.ndarray, gripper: float) -> None:
        model, data = self.task.model, self.data[i]
        mujoco.mj_resetData(model, data)
        data.time, data.qpos[:], data.qvel[:] = state[0], state[1 : 1 + model.nq], state[1 + model.nq :]
        self._goal_rot[i] = self._home_rot
        self._grip[i] = (-gripper, gripper)
        mujoco.mj_fwdPosition(model, data)

    def _integration_state(self, data: mujoco.MjData) -> np.ndarray:
        state = np.empty(mujoco.mj_stateSize(self.task.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(self.task.model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        return state

    def _set_integration_state(self, i: int, physics: np.ndarray) -> None:
        mujoco.mj_setState(self.task.model, self.data[i], physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_fwdPosition(self.task.model, self.data[i])  # poses and contacts, leaving the solver's warm start alone


def _mass_addresses(task: Task) -> np.ndarray:
    """(7, 7) int64: where the arm's mass matrix entries lie in MuJoCo's sparse qM, -1 for structural zeros."""
    model, dofs = task.model, task.arm_dof
    addresses = np.full((7, 7), -1)
    for row, dof in enumerate(dofs):
        address, ancestor = int(model.dof_Madr[dof]), dof
        while ancestor >= 0:
            if ancestor in dofs:
                column = dofs.index(ancestor)
                addresses[row, column] = addresses[column, row] = address
            address, ancestor = address + 1, int(model.dof_parentid[ancestor])
    return addresses


def make_env(
    task: Task | str, num_envs: int = 1, obs: str = "state", backend: str = "cpu", seed: int | None = None, **kwargs
) -> LiberoVectorEnv:
    """Make a vector environment of a LIBERO task (a `Task` or a task id); `kwargs` as in `LiberoVectorEnv`."""
    if obs != "state" or backend != "cpu":
        raise UserError(f"make_env offers obs='state' on backend='cpu' so far, not obs={obs!r} on backend={backend!r}")
    return LiberoVectorEnv(load_task(task) if isinstance(task, str) else task, num_envs, seed, **kwargs)
