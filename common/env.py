"""LIBERO's simulation as a gymnasium vector environment: exact, without robosuite in the loop, parallel over CPU cores.

One control step (20 Hz) is 25 physics substeps of `mj_step1`, OSC_POSE, `mj_step2`, then the goal and the observation, all in
one compiled function that calls MuJoCo's C library directly and holds no Python lock, so environments run in plain threads.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import llvmlite.binding
import mujoco
import numba
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from common.cli import UserError, usable_cores
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
for _name in ("mj_step1", "mj_step2", "mj_jacSite", "mj_kinematics"):  # by name, so that numba can cache the compiled code
    llvmlite.binding.add_symbol(_name, ctypes.cast(getattr(_libmujoco, _name), ctypes.c_void_p).value)
_mj_step1 = types.ExternalFunction("mj_step1", types.void(types.intp, types.intp))
_mj_step2 = types.ExternalFunction("mj_step2", types.void(types.intp, types.intp))
_mj_kinematics = types.ExternalFunction("mj_kinematics", types.void(types.intp, types.intp))
_mj_jac_site = types.ExternalFunction("mj_jacSite", types.void(types.intp, types.intp, types.intp, types.intp, types.int32))

# The arrays of mjData that compiled code reads and writes, as the columns of a table of addresses.
FIELDS = ("qpos", "qvel", "ctrl", "qM", "qfrc_bias", "xpos", "xmat", "xipos", "site_xpos", "site_xmat")
QPOS, QVEL, CTRL, QM, BIAS, XPOS, XMAT, XIPOS, SITE_XPOS, SITE_XMAT = range(len(FIELDS))


def _addresses(data: mujoco.MjData) -> np.ndarray:
    """(len(FIELDS),) int64 memory addresses of the FIELDS of `data`, which stay put as long as it lives."""
    return np.array([getattr(data, field).__array_interface__["data"][0] for field in FIELDS], np.int64)


@intrinsic
def _pointer(typing_context, address):
    """The integer `address` as a pointer that numba.carray accepts."""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.intp), codegen


@intrinsic
def _take_number(typing_context, address):
    """Atomically increment the int64 at the integer `address`; returns its value before."""

    def codegen(context, builder, signature, arguments):
        counter = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.intp), codegen


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


@numba.njit(cache=True)
def _axis_angle_matrix(v, out):
    """Rotation matrix of the axis-angle vector v (rad, not zero), with robosuite's own rounding.

    Robosuite goes by a quaternion in float32 whose squared norm is summed in float64: without that, a rotation command is
    1e-8 off, and the trajectories with it.
    """
    angle = np.sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2])
    q = np.empty(4, np.float32)
    q[0] = np.cos(0.5 * angle)
    for i in range(3):
        q[1 + i] = v[i] / angle * np.sin(0.5 * angle)
    norm = np.float32(np.float64(q[0] * q[0]) + np.float64(q[1] * q[1]) + np.float64(q[2] * q[2]) + np.float64(q[3] * q[3]))
    for i in range(4):
        q[i] = q[i] * np.sqrt(2.0 / norm)
    w, x, y, z = q
    out[0, 0], out[0, 1], out[0, 2] = 1.0 - y * y - z * z, x * y - z * w, x * z + y * w
    out[1, 0], out[1, 1], out[1, 2] = x * y + z * w, 1.0 - x * x - z * z, y * z - x * w
    out[2, 0], out[2, 1], out[2, 2] = x * z - y * w, y * z + x * w, 1.0 - x * x - y * y


@numba.njit(cache=True)
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
def _control_steps(
    envs, counter, model, data, pointers, sizes, arm, masses, q0, limits, fingers, goal, terms, actions, repeat, goal_rot, grip, near, obs
):
    """Run `repeat` control steps of environments `envs` with constant actions, then judge and observe them.

    Several threads share the work: each takes the next environment when it is done with one. (An environment with many
    contacts takes longer than others.)

    Args:
        envs (n,): indices; counter: address of the int64 number of environments already taken.
        model, data: addresses of mjModel and of each environment's mjData; pointers (num_envs, len(FIELDS)): see
            `_addresses`; sizes: nq, nv, nu, nsite, nM, grip site id.
        arm (3, 7): qpos and dof addresses and actuators; masses (7, 7): where M[i, j] lies in the sparse qM, or -1.
        limits (7, 2): torque limits; fingers (2, 3): actuator, middle and half width of its control range.
        goal, terms: what to judge (see `goal_table`) and to observe (see `StateObservation`).
        goal_rot (num_envs, 3, 3), grip (num_envs, 2): the controller's memory, updated in place.
        near (num_envs,) bool, obs (num_envs, size) float32: output.
    """
    nq, nv, nu, nsite, nM, grip_site = sizes
    jacobian = np.zeros((2, 3, nv))
    jac_pos, jac_rot = jacobian[0].ctypes.data, jacobian[1].ctypes.data
    M, J = np.empty((7, 7)), np.empty((6, 7))
    q, qd, bias, torque = np.empty(7), np.empty(7), np.empty(7), np.empty(7)
    target, pos_error, ori_error, velocity = np.empty(3), np.empty(3), np.empty(3), np.empty(6)
    delta, turn = np.empty(3), np.empty((3, 3))
    while True:
        number = _take_number(counter)
        if number >= len(envs):
            return
        e = envs[number]
        qpos, qvel, ctrl = _view(pointers[e, QPOS], (nq,)), _view(pointers[e, QVEL], (nv,)), _view(pointers[e, CTRL], (nu,))
        qM, qfrc_bias = _view(pointers[e, QM], (nM,)), _view(pointers[e, BIAS], (nv,))
        site_xpos, site_xmat = _view(pointers[e, SITE_XPOS], (nsite, 3)), _view(pointers[e, SITE_XMAT], (nsite, 3, 3))
        eef, rot = site_xpos[grip_site], site_xmat[grip_site]
        for substep in range(repeat * SUBSTEPS):
            _mj_step1(model, data[e])
            if substep % SUBSTEPS == 0:  # a new action sets the goal pose, relative to where the hand is now
                turned = False
                for i in range(3):
                    target[i] = eef[i] + 0.05 * min(1.0, max(-1.0, actions[e, i]))
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
                pos_error[i] = target[i] - eef[i]
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
        near[e] = _goal_near(pointers[e], goal)  # LIBERO judges success on poses 2 ms old,
        _mj_kinematics(model, data[e])  # but observations are of the state itself
        _observe(pointers[e], terms, obs[e])


# ---------------------------------------------------------------------------------------------- goal predicates


KINDS = {"joint": 0, "contain": 1, "under": 2, "ontop": 3}
_GOAL_DTYPE = np.dtype(
    [("kind", "i8"), ("body", "i8"), ("target", "i8"), ("extent", "f8", 3), ("qpos", "i8", 8), ("joints", "i8")]
    + [("sign", "f8"), ("threshold", "f8"), ("inclusive", "?"), ("any", "?")]
)


@functools.lru_cache(maxsize=1024)
def goal_table(goal: tuple[Predicate, ...]) -> np.ndarray:
    """One record for each conjunct. `target` is a site, or a body if the goal is to be on top of an object."""
    table = np.zeros(len(goal), _GOAL_DTYPE)
    for row, p in zip(table, goal, strict=True):
        row["kind"], row["body"], row["target"] = KINDS[p.kind], p.body, p.target_body if p.kind == "ontop" else p.site
        row["extent"], row["sign"], row["threshold"], row["inclusive"], row["any"] = p.size, p.sign, p.threshold, p.inclusive, p.any
        row["joints"], row["qpos"][: len(p.qpos)] = len(p.qpos), p.qpos
    return table


@numba.njit(cache=True)
def _goal_near(pointers, goal):
    """Whether all conjuncts hold as far as positions say; contacts, where LIBERO asks for them, are left to `in_contact`."""
    near = True
    for i in range(len(goal)):
        near = near and _near(pointers, goal[i])
    return near


@numba.njit
def _near(pointers, p):
    if p.kind == 0:  # a joint, beyond a threshold
        count = 0
        for i in range(p.joints):
            value, threshold = p.sign * _view(pointers[QPOS], (p.qpos[i] + 1,))[p.qpos[i]], p.sign * p.threshold
            count += value > threshold or (p.inclusive and value == threshold)
        return count > 0 if p.any else count == p.joints
    position = _view(pointers[XPOS], (p.body + 1, 3))[p.body]
    if p.kind == 3:  # LIBERO compares body origins: the target's not above the object's, 3 cm apart at most
        target = _view(pointers[XPOS], (p.target + 1, 3))[p.target]
        return target[2] <= position[2] and np.hypot(target[0] - position[0], target[1] - position[1]) < 0.03
    centre, rot = _view(pointers[SITE_XPOS], (p.target + 1, 3))[p.target], _view(pointers[SITE_XMAT], (p.target + 1, 3, 3))[p.target]
    for i in range(3):
        if p.kind == 1:  # an axis-aligned box around the turned site, 1 cm deeper at the bottom
            extent = abs(rot[i, 0] * p.extent[0] + rot[i, 1] * p.extent[1] + rot[i, 2] * p.extent[2])
            lower, upper, x = centre[i] - extent, centre[i] + extent, position[i]
            if i == 2:
                lower -= 0.01
        else:  # (sic) LIBERO does not transpose the rotation
            x = rot[i, 0] * (position[0] - centre[0]) + rot[i, 1] * (position[1] - centre[1]) + rot[i, 2] * (position[2] - centre[2])
            lower, upper = (-p.extent[i], p.extent[i]) if i < 2 else (p.extent[2] - 0.005, p.extent[2] + 0.10)
        if not lower < x < upper:
            return False
    return True


def predicate_holds(predicate: Predicate, data: mujoco.MjData, model: mujoco.MjModel) -> bool:
    """LIBERO's `_eval_predicate` on one environment, with LIBERO's exact semantics.

    It reads `data` as it is: after `step` that is 2 ms newer than what the returned success was judged on, because LIBERO
    judges what its last physics substep leaves: joint positions after integration, body poses and contacts from before.
    """
    return bool(_goal_near(_addresses(data), goal_table((predicate,)))) and _contacts_hold((predicate,), data, model)


def _contacts_hold(goal: Sequence[Predicate], data: mujoco.MjData, model: mujoco.MjModel) -> bool:
    return all(p.contact is None or in_contact(data, model, *p.contact) for p in goal)


def in_contact(data: mujoco.MjData, model: mujoco.MjModel, geoms_1: tuple[int, ...], geoms_2: tuple[int, ...]) -> bool:
    """Whether any geom of one group touches any of the other in the current contact list."""
    pairs = data.contact.geom  # (ncon, 2)
    first, second = np.zeros(model.ngeom, bool), np.zeros(model.ngeom, bool)
    first[list(geoms_1)], second[list(geoms_2)] = True, True
    a, b = pairs[:, 0], pairs[:, 1]
    return bool(np.any((first[a] & second[b]) | (first[b] & second[a])))


def success(task: Task, data: mujoco.MjData) -> bool:
    """LIBERO's `_check_success`: all conjuncts of the goal hold (see `predicate_holds`)."""
    return bool(_goal_near(_addresses(data), goal_table(tuple(task.goal)))) and _contacts_hold(task.goal, data, task.model)


# ---------------------------------------------------------------------------------------------- observations


TWO_COLUMNS = (0, 3, 6, 1, 4, 7)  # of a rotation matrix stored row by row


class StateObservation:
    """The float32 state vector of the objects that matter for the goal, with named slices in `layout`.

    Positions in metres, world frame; rotations as the first two columns of the rotation matrix (6 numbers; Zhou et al. 2019);
    joints in rad or m; velocities per second. For each movable object that the goal or BDDL's `obj_of_interest` names: its
    position, rotation and position relative to the hand; for each region named: its position relative to the hand; for
    each articulated joint named: its position and its moving body's centre relative to the hand; for each binary goal: the
    object's position relative to the target.

    Every number is an entry of mjData or the difference of two: `terms` (size, 4) int64 holds field and flat index of the
    first, and of the second (or -1), for compiled code to gather.
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
        model, eef, hand = task.model, (SITE_XPOS, 3 * task.eef_site), (SITE_XMAT, 9 * task.eef_site)
        terms: dict[str, list] = {
            "eef_pos": self._terms(eef),
            "eef_rot": self._terms(hand, offsets=TWO_COLUMNS),
            "gripper_qpos": [(QPOS, i, -1, 0) for i in task.gripper_qpos],
            "gripper_qvel": [(QVEL, i, -1, 0) for i in task.gripper_dof],
        }
        for obj in self.objects:
            terms[f"{obj.name}_pos"] = self._terms((XPOS, 3 * obj.body))
            terms[f"{obj.name}_rot"] = self._terms((XMAT, 9 * obj.body), offsets=TWO_COLUMNS)
            terms[f"{obj.name}_to_eef"] = self._terms((XPOS, 3 * obj.body), eef)
        for site in self.sites:
            terms[f"{site.name}_to_eef"] = self._terms((SITE_XPOS, 3 * site.site), eef)
        for joint in self.joints:
            name = model.joint(joint).name
            terms[f"{name}_qpos"] = [(QPOS, int(model.jnt_qposadr[joint]), -1, 0)]
            terms[f"{name}_to_eef"] = self._terms((XIPOS, 3 * int(model.jnt_bodyid[joint])), eef)
        for p in self.pairs:
            target = (SITE_XPOS, 3 * p.site) if p.site >= 0 else (XPOS, 3 * p.target_body)
            terms[f"{p.args[0]}_to_{p.args[1]}"] = self._terms((XPOS, 3 * p.body), target)
        ends = np.cumsum([len(rows) for rows in terms.values()])
        self.layout = {name: slice(int(end) - len(rows), int(end)) for (name, rows), end in zip(terms.items(), ends, strict=True)}
        self.size = int(ends[-1])
        self.terms = np.array([row for rows in terms.values() for row in rows], np.int64)

    @staticmethod
    def _terms(plus, minus=(-1, 0), offsets=(0, 1, 2)) -> list[tuple[int, int, int, int]]:
        return [(plus[0], plus[1] + k, minus[0], minus[1] + k) for k in offsets]

    def __call__(self, data: mujoco.MjData) -> np.ndarray:
        """(size,) float32 of one environment."""
        out = np.empty(self.size, np.float32)
        _observe(_addresses(data), self.terms, out)
        return out


@numba.njit(cache=True)
def _observe(pointers, terms, out):
    for k in range(len(terms)):
        value = _view(pointers[terms[k, 0]], (terms[k, 1] + 1,))[terms[k, 1]]
        if terms[k, 2] >= 0:
            value -= _view(pointers[terms[k, 2]], (terms[k, 3] + 1,))[terms[k, 3]]
        out[k] = value


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
    w = min(1.0, max(-1.0, float(quat_wxyz[0])))
    norm = math.sqrt(1.0 - w * w)
    return np.zeros(3) if norm <= 1e-8 else np.asarray(quat_wxyz[1:]) * (2.0 * np.arccos(w) / norm)


# ---------------------------------------------------------------------------------------------- the environment


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
    `options={"init_state": indices}`, runs `settle_steps` no-ops, and then observes.

    Autoreset is gymnasium's SAME_STEP (the observation is the next episode's first, `info["final_obs"]` the last one's,
    `info["final_states"]` its state) or DISABLED (`options={"reset_mask": mask}` resets some).

    `step(actions, active)` moves only the environments whose number in `active` (num_envs,) bool is True: those that have ended and
    have no further episode to run cost nothing. The others stand still; what is returned of them means nothing.
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
        super().__init__(task, num_envs, settle_steps, max_steps, autoreset_mode)
        self._np_random = np.random.default_rng(seed)
        self._settled: dict[tuple[str, int], tuple[np.ndarray, ...]] = {}

        model = task.model
        self.data = [mujoco.MjData(model) for _ in range(num_envs)]
        pointers = np.stack([_addresses(d) for d in self.data])
        addresses = np.array([d._address for d in self.data], np.int64)
        sizes = tuple(int(n) for n in (model.nq, model.nv, model.nu, model.nsite, model.nM, task.eef_site))
        arm = np.array([task.arm_qpos, task.arm_dof, task.arm_actuators])
        low, high = model.actuator_ctrlrange[task.gripper_actuators].T
        fingers = np.stack([np.array(task.gripper_actuators, np.float64), (high + low) / 2, (high - low) / 2], axis=1)
        limits = model.actuator_ctrlrange[task.arm_actuators].copy()
        q0 = np.array(task.initial_joints)
        masses, goal = mass_addresses(task), goal_table(tuple(task.goal))
        self._constants = (model._address, addresses, pointers, sizes, arm, masses, q0, limits, fingers, goal, self.observe.terms)
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
            self._np_random = np.random.default_rng(seed)
        options = options or {}
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs, bool)), bool)
        if (indices := options.get("init_state")) is not None:
            indices = self._checked_indices(indices)
        self._reset(np.flatnonzero(mask), indices)
        return self._observations(), {"state_index": self._state_indices.copy()}

    def step(self, actions, active: np.ndarray | None = None):
        actions = np.ascontiguousarray(actions, np.float64)
        if actions.shape != (self.num_envs, 7) or not np.isfinite(actions).all():
            raise ValueError(f"actions must be finite numbers of shape {(self.num_envs, 7)}, not {actions.shape}")
        moving = self._all if active is None else np.flatnonzero(active)
        self._advance(actions, moving)
        self._elapsed[moving] += 1
        terminated = self._near.copy()
        for i in np.flatnonzero(self._near):
            terminated[i] = _contacts_hold(self.task.goal, self.data[i], self.task.model)
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

    # ------------------------------------------------------------------ inside

    def _observations(self) -> np.ndarray:
        return np.stack([self.observe(d) for d in self.data])

    def _advance(self, actions: np.ndarray, envs: np.ndarray | None = None, repeat: int = 1) -> None:
        """Control steps with constant actions, in threads; `envs` (default all) are the environments that move."""

        envs, counter = self._all if envs is None else envs, np.zeros(1, np.int64)
        memory = actions, repeat, self._goal_rot, self._grip, self._near, self._obs
        arguments = (envs, counter.ctypes.data, *self._constants, *memory)
        helpers = [self._threads.submit(_control_steps, *arguments) for _ in range(min(self._num_threads, len(envs)) - 1)]
        _control_steps(*arguments)  # this thread works too
        for helper in helpers:
            helper.result()

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
            self._elapsed[i], self._near[i] = 0, False

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


def mass_addresses(task: Task) -> np.ndarray:
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


BACKENDS = ("auto", "cpu", "warp")
WARP_WORLDS = 256  # environments from which "auto" takes a GPU, if there is one (docs/warp.md: 1.3 times 16 CPU cores)


def choose_backend(backend: str, num_envs: int, device: str | None = None) -> str:
    """ "cpu" or "warp": what "auto" means for `num_envs` environments on this machine."""
    if backend not in BACKENDS:
        raise UserError(f"no simulator for backend={backend!r}; choose from {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    if num_envs < WARP_WORLDS or device == "cpu":
        return "cpu"
    try:
        from common.warp_env import find_device

        find_device(device)
    except UserError as error:
        logging.getLogger(__name__).info("physics on CPU cores: %s", error)
        return "cpu"
    return "warp"


def make_env(
    task: Task | str,
    num_envs: int = 1,
    obs: str = "state",
    backend: str = "cpu",
    seed: int | None = None,
    device: str | None = None,
    image_size: int = 84,
    cameras: Sequence[str] = ("agentview",),
    renderer: str = "warp",
    **kwargs,
) -> VectorEnv:
    """Make a vector environment of a LIBERO task (a `Task` or a task id).

    Args:
        obs: "state", float32 vectors (see `StateObservation`), or "pixels", a Dict of pictures and proprioception (see
            `common.observations.PixelObservation`); image_size (pixels), cameras and renderer are of these pictures.
        backend: "cpu" (`LiberoVectorEnv`), "warp" (`common.warp_env.LiberoWarpEnv`, on `device`) or "auto" (see `choose_backend`).
        device: of "warp", default the first GPU; and of the ray tracer, default where the worlds are.
        kwargs: as in the class.
    """
    if obs not in ("state", "pixels"):
        raise UserError(f"obs must be 'state' or 'pixels', not {obs!r}")
    backend = choose_backend(backend, num_envs, device)
    task = load_task(task) if isinstance(task, str) else task
    if backend == "cpu":
        env = LiberoVectorEnv(task, num_envs, seed, **kwargs)
    else:
        from common.warp_env import LiberoWarpEnv

        env = LiberoWarpEnv(task, num_envs, seed, device=device, **kwargs)
    if obs == "state":
        return env
    from common.observations import PixelEnv  # it needs this module, and a renderer

    return PixelEnv(env, image_size, cameras, renderer, device or ("cpu" if backend == "cpu" else "cuda"))
