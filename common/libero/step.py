"""The compiled control step: MuJoCo's C library, LIBERO's controller, the goal and the observation without a Python lock.

One control step (20 Hz) is 25 physics substeps (fewer if asked) of `mj_step1`, OSC_POSE, `mj_step2`, then the goal and the observation.
Everything that numba compiles is in this one file, because its cache of compiled code notices changes of the file that a function is
in, not of others.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import llvmlite.binding
import mujoco
import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

SUBSTEPS = 25  # LIBERO's: 20 Hz control over 500 Hz physics
NO_OP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])  # what published evaluations send while objects settle
KP = 150.0  # robosuite's OSC_POSE: stiffness, damping ratio 1
NULL_KP = 10.0  # null-space stiffness toward the arm's reset pose
GRIPPER_SPEED = 0.01  # of the finger range, a substep of 2 ms

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
FIELDS = ("qpos", "qvel", "ctrl", "M", "qfrc_bias", "xpos", "xmat", "xipos", "site_xpos", "site_xmat")
QPOS, QVEL, CTRL, MASS, BIAS, XPOS, XMAT, XIPOS, SITE_XPOS, SITE_XMAT = range(len(FIELDS))


def addresses(data: mujoco.MjData) -> np.ndarray:
    """(len(FIELDS),) int64 memory addresses of the FIELDS of `data`, which stay put as long as it lives."""
    return np.array([getattr(data, field).__array_interface__["data"][0] for field in FIELDS], np.int64)


def update_sleep(model: mujoco.MjModel, data: mujoco.MjData) -> None:
    """MuJoCo's mj_updateSleep: take up what was written into `data.tree_asleep`."""
    _libmujoco.mj_updateSleep(ctypes.c_void_p(model._address), ctypes.c_void_p(data._address))


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
def control_steps(
    envs,
    counter,
    model,
    data,
    pointers,
    sizes,
    arm,
    masses,
    q0,
    limits,
    fingers,
    goal,
    terms,
    substeps,
    actions,
    repeat,
    goal_rot,
    grip,
    near,
    obs,
):
    """Run `repeat` control steps of environments `envs` with constant actions, then judge and observe them.

    Several threads share the work: each takes the next environment when it is done with one. (An environment with many
    contacts takes longer than others.)

    Args:
        envs (n,): indices; counter: address of the int64 number of environments already taken.
        model, data: addresses of mjModel and of each environment's mjData; pointers (num_envs, len(FIELDS)): see
            `addresses`; sizes: nq, nv, nu, nsite, nC, grip site id.
        arm (3, 7): qpos and dof addresses and actuators; masses (7, 7): where M[i, j] lies in the sparse mass matrix, or -1.
        limits (7, 2): torque limits; fingers (2, 3): actuator, middle and half width of its control range.
        goal, terms: what to judge (see `goal_table`) and to observe (see `StateObservation`).
        substeps: physics steps a control step; the model's timestep is 1/20 s divided by it.
        goal_rot (num_envs, 3, 3), grip (num_envs, 2): the controller's memory, updated in place.
        near (num_envs,) bool, obs (num_envs, size) float32: output.
    """
    nq, nv, nu, nsite, nC, grip_site = sizes
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
        mass, qfrc_bias = _view(pointers[e, MASS], (nC,)), _view(pointers[e, BIAS], (nv,))
        site_xpos, site_xmat = _view(pointers[e, SITE_XPOS], (nsite, 3)), _view(pointers[e, SITE_XMAT], (nsite, 3, 3))
        eef, rot = site_xpos[grip_site], site_xmat[grip_site]
        for substep in range(repeat * substeps):
            _mj_step1(model, data[e])
            if substep % substeps == 0:  # a new action sets the goal pose, relative to where the hand is now
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
                    M[i, k] = mass[masses[i, k]] if masses[i, k] >= 0 else 0.0
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
            # LIBERO's gripper: the sign of the action moves both fingers' targets at a fixed speed
            step = GRIPPER_SPEED * SUBSTEPS / substeps * np.sign(actions[e, 6])
            grip[e, 0] = min(1.0, max(-1.0, grip[e, 0] - step))
            grip[e, 1] = min(1.0, max(-1.0, grip[e, 1] + step))
            for f in range(2):
                ctrl[int(fingers[f, 0])] = fingers[f, 1] + fingers[f, 2] * grip[e, f]
            _mj_step2(model, data[e])
        near[e] = goal_near(pointers[e], goal)  # LIBERO judges success on poses one substep old,
        _mj_kinematics(model, data[e])  # but observations are of the state itself
        observe_into(pointers[e], terms, obs[e])


# ---------------------------------------------------------------------------------------------- goal and observation


@numba.njit(cache=True)
def goal_near(pointers, goal):
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


@numba.njit(cache=True)
def observe_into(pointers, terms, out):
    for k in range(len(terms)):
        value = _view(pointers[terms[k, 0]], (terms[k, 1] + 1,))[terms[k, 1]]
        if terms[k, 2] >= 0:
            value -= _view(pointers[terms[k, 2]], (terms[k, 3] + 1,))[terms[k, 3]]
        out[k] = value
