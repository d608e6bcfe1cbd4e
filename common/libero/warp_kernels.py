"""What a GPU computes in a control step beside the physics: the controller, the goal, the observation, an episode's start.

Each kernel does in Warp what common/libero/step.py does in numba, one world a thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.libero.goals import KINDS, goal_table
from common.libero.step import GRIPPER_SPEED, KP, NULL_KP, QPOS, QVEL, SITE_XPOS, XIPOS, XMAT, XPOS
from common.libero.tasks import Predicate
from common.libero.warp_start import start_warp

start_warp()  # quietly, with our folder for compiled kernels

import warp as wp  # noqa: E402

wp.set_module_options({"enable_backward": False, "max_unroll": 0})  # loops stay loops: unrolled 7 x 7 factors compile for minutes

# ---------------------------------------------------------------------------------------------- the controller, one world a thread

# Double precision: the arithmetic is a thousandth of a physics step's, and factors of J M^-1 J^T lose half of their digits.
real = wp.float64
vec7 = wp.types.vector(7, real)
mat77 = wp.types.matrix((7, 7), real)
mat67 = wp.types.matrix((6, 7), real)


NUMPY_TYPES = {int: np.int32, float: np.float32, real: np.float64, wp.vec3: np.float32, wp.mat33d: np.float64, wp.vec2d: np.float64}


def to_array(values, dtype=int) -> wp.array:
    """On the current device."""
    return wp.array(np.asarray(values, NUMPY_TYPES[dtype]), dtype=dtype)


@wp.struct
class Arm:
    """Where the arm's numbers lie, and the constants of its controller (see `common.libero.step.control_steps`)."""

    qpos: wp.array(dtype=int)  # (7,) addresses
    dof: wp.array(dtype=int)  # (7,)
    actuator: wp.array(dtype=int)  # (7,)
    mass: wp.array2d(dtype=int)  # (7, 7) addresses in a world's mass matrix, -1: zero
    home: wp.array(dtype=real)  # (7,) joint positions that the null space is pulled to
    low: wp.array(dtype=real)  # (7,) torque limits
    high: wp.array(dtype=real)  # (7,)
    finger: wp.array(dtype=int)  # (2,) actuators
    finger_middle: wp.array(dtype=real)  # (2,) of the control range
    finger_half: wp.array(dtype=real)  # (2,) half its width
    site: int  # the grip site
    root: int  # the body that the arm's tree begins with


@wp.struct
class Poses:
    """N worlds' numbers that controller, goal and observation read, each as (N, .) float: see `common.libero.step.FIELDS`."""

    qpos: wp.array2d(dtype=float)
    qvel: wp.array2d(dtype=float)
    xpos: wp.array2d(dtype=float)
    xmat: wp.array2d(dtype=float)
    xipos: wp.array2d(dtype=float)
    site_xpos: wp.array2d(dtype=float)
    site_xmat: wp.array2d(dtype=float)


@wp.struct
class Memory:
    """What a world remembers beside its physics."""

    actions: wp.array2d(dtype=float)  # (N, 7)
    target: wp.array(dtype=wp.vec3d)  # (N,) where the hand is to go
    goal_rot: wp.array(dtype=wp.mat33d)  # (N,)
    grip: wp.array(dtype=wp.vec2d)  # (N,) how far each finger was told to go, in [-1, 1]
    elapsed: wp.array(dtype=int)  # (N,) control steps of this episode
    episode: wp.array(dtype=int)  # (N,) episodes begun since the seed
    state_index: wp.array(dtype=int)  # (N,) the start state
    broken: wp.array(dtype=int)  # (N,) 1: constraints were dropped, or the state is not finite
    peaks: wp.array(dtype=int)  # (4,) most constraint rows in a world, contacts, and pairs in all worlds; broken episodes


@wp.func
def cholesky(a: mat77, n: int):
    """Lower Cholesky factor of the leading n x n block of a symmetric positive definite matrix."""
    for i in range(n):
        for j in range(i + 1):
            total = a[i, j]
            for k in range(j):
                total -= a[i, k] * a[j, k]
            if i == j:
                a[i, j] = wp.sqrt(wp.max(total, real(1.0e-18)))
            else:
                a[i, j] = total / a[j, j]
    return a


@wp.func
def solve(factor: mat77, n: int, x: vec7):
    """L L^T \\ x."""
    for i in range(n):
        for k in range(i):
            x[i] -= factor[i, k] * x[k]
        x[i] /= factor[i, i]
    for m in range(n):
        i = n - 1 - m
        for k in range(i + 1, n):
            x[i] -= factor[k, i] * x[k]
        x[i] /= factor[i, i]
    return x


@wp.func
def osc_torques(M: mat77, J: mat67, bias: vec7, q: vec7, qd: vec7, q0: vec7, pos_error: wp.vec3d, ori_error: wp.vec3d, velocity: vec7):
    """`common.libero.step._osc_torques`, term by term."""
    kd = real(2.0) * wp.sqrt(real(wp.static(KP)))
    null_kd = real(2.0) * wp.sqrt(real(wp.static(NULL_KP)))
    a = vec7()
    torque = vec7()
    for i in range(7):
        a[i] = real(wp.static(NULL_KP)) * (q0[i] - q[i]) - null_kd * qd[i]
    for i in range(7):
        torque[i] = bias[i]
        for k in range(7):
            torque[i] += M[i, k] * a[k]
    factor = cholesky(M, 7)
    A = mat77()  # J M^-1 J^T, 6 x 6
    for i in range(6):
        column = vec7()
        for k in range(7):
            column[k] = J[i, k]
        column = solve(factor, 7, column)
        for j in range(6):
            for k in range(7):
                A[j, i] += J[j, k] * column[k]
    force = vec7()
    moment = vec7()
    null = vec7()
    lower = mat77()  # the rotational block of A
    for i in range(3):
        force[i] = real(wp.static(KP)) * pos_error[i] - kd * velocity[i]
        moment[i] = real(wp.static(KP)) * ori_error[i] - kd * velocity[3 + i]
        for j in range(3):
            lower[i, j] = A[3 + i, 3 + j]
    force = solve(cholesky(A, 3), 3, force)
    moment = solve(cholesky(lower, 3), 3, moment)
    for i in range(6):
        for k in range(7):
            null[i] += J[i, k] * a[k]
    null = solve(cholesky(A, 6), 6, null)
    for k in range(7):
        for i in range(3):
            torque[k] += J[i, k] * (force[i] - null[i]) + J[3 + i, k] * (moment[i] - null[3 + i])
    return torque


@wp.func
def axis_angle_matrix(v: wp.vec3d):
    """`common.libero.step._axis_angle_matrix`: by a quaternion in single precision, as robosuite does it."""
    angle = wp.sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2])
    s = wp.sin(real(0.5) * angle) / angle
    w = float(wp.cos(real(0.5) * angle))
    x = float(v[0] * s)
    y = float(v[1] * s)
    z = float(v[2] * s)
    scale = wp.sqrt(real(2.0) / real(float(real(w * w) + real(x * x) + real(y * y) + real(z * z))))
    w = float(real(w) * scale)
    x = float(real(x) * scale)
    y = float(real(y) * scale)
    z = float(real(z) * scale)
    one = real(1.0)
    return wp.mat33d(
        one - real(y * y) - real(z * z),
        real(x * y - z * w),
        real(x * z + y * w),
        real(x * y + z * w),
        one - real(x * x) - real(z * z),
        real(y * z - x * w),
        real(x * z - y * w),
        real(y * z + x * w),
        one - real(x * x) - real(y * y),
    )


@wp.kernel
def control(
    first: bool,  # of the control step's substeps: a new action sets the goal pose, relative to where the hand is now
    arm: Arm,
    poses: Poses,
    memory: Memory,
    mass: wp.array2d(dtype=float),  # (N, .)
    bias: wp.array2d(dtype=float),  # (N, nv)
    cdof: wp.array2d(dtype=wp.spatial_vector),  # (N, nv) axes of motion about the tree's centre of mass: rotation, translation
    subtree_com: wp.array2d(dtype=wp.vec3),  # (N, nbody)
    nefc: wp.array(dtype=int),  # (N,)
    nacon: wp.array(dtype=int),
    ncollision: wp.array(dtype=int),
    njmax: int,
    ctrl: wp.array2d(dtype=float),  # (N, nu) output
):
    world = wp.tid()
    eef = wp.vec3d()
    rot = wp.mat33d()
    for i in range(3):
        eef[i] = real(poses.site_xpos[world, 3 * arm.site + i])
        for j in range(3):
            rot[i, j] = real(poses.site_xmat[world, 9 * arm.site + 3 * i + j])
    if first:
        goal = eef
        delta = wp.vec3d()
        for i in range(3):
            goal[i] += real(0.05) * wp.clamp(real(memory.actions[world, i]), real(-1.0), real(1.0))
            delta[i] = real(0.5) * wp.clamp(real(memory.actions[world, 3 + i]), real(-1.0), real(1.0))
        memory.target[world] = goal
        if delta[0] != real(0.0) or delta[1] != real(0.0) or delta[2] != real(0.0):  # else the old goal orientation stays
            memory.goal_rot[world] = axis_angle_matrix(delta) * rot

    M = mat77()
    J = mat67()
    q = vec7()
    qd = vec7()
    qfrc = vec7()
    home = vec7()
    com = subtree_com[world, arm.root]
    offset = wp.vec3d(eef[0] - real(com[0]), eef[1] - real(com[1]), eef[2] - real(com[2]))
    for k in range(7):
        dof = arm.dof[k]
        q[k] = real(poses.qpos[world, arm.qpos[k]])
        qd[k] = real(poses.qvel[world, dof])
        qfrc[k] = real(bias[world, dof])
        home[k] = arm.home[k]
        motion = cdof[world, dof]
        axis = wp.vec3d(real(motion[0]), real(motion[1]), real(motion[2]))
        linear = wp.vec3d(real(motion[3]), real(motion[4]), real(motion[5])) + wp.cross(axis, offset)
        for i in range(3):
            J[i, k] = linear[i]
            J[3 + i, k] = axis[i]
        for i in range(7):
            if arm.mass[i, k] >= 0:
                M[i, k] = real(mass[world, arm.mass[i, k]])
    velocity = vec7()
    for i in range(6):
        for k in range(7):
            velocity[i] += J[i, k] * qd[k]
    goal_rot = memory.goal_rot[world]
    ori_error = wp.vec3d()  # half the sum over the axes of current x desired
    for i in range(3):
        a = (i + 1) % 3
        b = (i + 2) % 3
        for c in range(3):
            ori_error[i] += real(0.5) * (rot[a, c] * goal_rot[b, c] - rot[b, c] * goal_rot[a, c])
    torque = osc_torques(M, J, qfrc, q, qd, home, memory.target[world] - eef, ori_error, velocity)
    for k in range(7):
        ctrl[world, arm.actuator[k]] = float(wp.clamp(torque[k], arm.low[k], arm.high[k]))

    step = real(0.0)  # LIBERO's gripper: the sign of the action moves both fingers' targets by a fixed amount a substep
    if memory.actions[world, 6] > 0.0:
        step = real(wp.static(GRIPPER_SPEED))
    elif memory.actions[world, 6] < 0.0:
        step = -real(wp.static(GRIPPER_SPEED))
    grip = memory.grip[world]
    grip = wp.vec2d(wp.max(real(-1.0), wp.min(real(1.0), grip[0] - step)), wp.max(real(-1.0), wp.min(real(1.0), grip[1] + step)))
    memory.grip[world] = grip
    for f in range(2):
        ctrl[world, arm.finger[f]] = float(arm.finger_middle[f] + arm.finger_half[f] * grip[f])

    # MuJoCo Warp's own counters of this substep
    wp.atomic_max(memory.peaks, 0, nefc[world])
    if nefc[world] > njmax:
        memory.broken[world] = 1
    if world == 0:
        wp.atomic_max(memory.peaks, 1, nacon[0])
        wp.atomic_max(memory.peaks, 2, ncollision[0])


# ---------------------------------------------------------------------------------------------- goal, observation, new episodes


@wp.struct
class Goal:
    """P conjuncts (see `common.libero.goals.goal_table`)."""

    kind: wp.array(dtype=int)  # (P,)
    body: wp.array(dtype=int)
    target: wp.array(dtype=int)
    extent: wp.array(dtype=wp.vec3)
    qpos: wp.array2d(dtype=int)  # (P, 8)
    joints: wp.array(dtype=int)
    sign: wp.array(dtype=float)
    threshold: wp.array(dtype=float)
    inclusive: wp.array(dtype=int)
    any: wp.array(dtype=int)
    contact: wp.array(dtype=int)  # (P,) 1: two groups of geoms must touch
    group: wp.array2d(dtype=int)  # (P, ngeom) 1: in the first group, 2: in the second


def goal_struct(goal: Sequence[Predicate], ngeom: int) -> Goal:
    """The conjuncts on the current device."""
    rows, out = goal_table(tuple(goal)), Goal()
    for name in ("kind", "body", "target", "joints", "inclusive", "any", "qpos"):
        setattr(out, name, to_array(rows[name]))
    out.extent, out.sign, out.threshold = (
        to_array(rows["extent"], wp.vec3),
        to_array(rows["sign"], float),
        to_array(rows["threshold"], float),
    )
    out.contact = to_array([p.contact is not None for p in goal])
    group = np.zeros((len(goal), ngeom), np.int32)
    for p, predicate in enumerate(goal):
        for bit, geoms in zip((1, 2), predicate.contact or (), strict=False):
            group[p, list(geoms)] |= bit
    out.group = to_array(group)
    return out


@wp.func
def near(p: int, goal: Goal, poses: Poses, world: int):
    """`common.libero.step._near`: whether conjunct p holds as far as positions say."""
    kind = goal.kind[p]
    if kind == wp.static(KINDS["joint"]):
        count = int(0)  # noqa: UP018 (a variable to Warp, not a constant)
        for i in range(goal.joints[p]):
            value = goal.sign[p] * poses.qpos[world, goal.qpos[p, i]]
            threshold = goal.sign[p] * goal.threshold[p]
            if value > threshold or (goal.inclusive[p] == 1 and value == threshold):
                count += 1
        if goal.any[p] == 1:
            return count > 0
        return count == goal.joints[p]
    position = wp.vec3()
    centre = wp.vec3()
    for i in range(3):
        position[i] = poses.xpos[world, 3 * goal.body[p] + i]
    if kind == wp.static(KINDS["ontop"]):
        for i in range(3):
            centre[i] = poses.xpos[world, 3 * goal.target[p] + i]
        across = wp.vec2(centre[0] - position[0], centre[1] - position[1])
        return centre[2] <= position[2] and wp.length(across) < 0.03
    rot = wp.mat33()
    for i in range(3):
        centre[i] = poses.site_xpos[world, 3 * goal.target[p] + i]
        for j in range(3):
            rot[i, j] = poses.site_xmat[world, 9 * goal.target[p] + 3 * i + j]
    extent = goal.extent[p]
    if kind == wp.static(KINDS["contain"]):
        reach = rot * extent
        inside = bool(True)  # noqa: UP018
        for i in range(3):
            lower = centre[i] - wp.abs(reach[i])
            if i == 2:
                lower -= 0.01
            inside = inside and lower < position[i] and position[i] < centre[i] + wp.abs(reach[i])
        return inside
    d = rot * (position - centre)
    if wp.abs(d[0]) >= extent[0] or wp.abs(d[1]) >= extent[1]:
        return False
    return extent[2] - 0.005 < d[2] and d[2] < extent[2] + 0.10


@wp.kernel
def find_touching(
    goal: Goal,
    nacon: wp.array(dtype=int),
    geoms: wp.array(dtype=wp.vec2i),  # (naconmax,) of the contacts of all worlds
    worlds: wp.array(dtype=int),
    touching: wp.array2d(dtype=int),  # (N, P) output
):
    contact = wp.tid()
    if contact >= nacon[0]:
        return
    for p in range(goal.group.shape[0]):
        a = goal.group[p, geoms[contact][0]]
        b = goal.group[p, geoms[contact][1]]
        if ((a & 1) != 0 and (b & 2) != 0) or ((a & 2) != 0 and (b & 1) != 0):
            touching[worlds[contact], p] = 1


@wp.kernel
def judge(
    goal: Goal,
    poses: Poses,
    memory: Memory,
    touching: wp.array2d(dtype=int),
    max_steps: int,
    reward: wp.array(dtype=float),
    terminated: wp.array(dtype=bool),
    truncated: wp.array(dtype=bool),
    done: wp.array(dtype=bool),
    length: wp.array(dtype=int),
):
    world = wp.tid()
    holds = bool(True)  # noqa: UP018
    for p in range(goal.kind.shape[0]):
        holds = holds and near(p, goal, poses, world) and (goal.contact[p] == 0 or touching[world, p] == 1)
    for i in range(poses.qpos.shape[1]):
        if not wp.isfinite(poses.qpos[world, i]):
            memory.broken[world] = 1
    for i in range(poses.qvel.shape[1]):
        if not wp.isfinite(poses.qvel[world, i]):
            memory.broken[world] = 1
    broken = memory.broken[world] == 1
    if broken:
        wp.atomic_add(memory.peaks, 3, 1)
    holds = holds and not broken
    memory.elapsed[world] += 1
    length[world] = memory.elapsed[world]
    terminated[world] = holds
    truncated[world] = (not holds) and (broken or memory.elapsed[world] >= max_steps)
    done[world] = terminated[world] or truncated[world]
    reward[world] = wp.where(holds, 1.0, 0.0)


@wp.func
def entry(field: int, index: int, poses: Poses, world: int):
    """A number of `common.libero.step.FIELDS`."""
    if field == wp.static(QPOS):
        return poses.qpos[world, index]
    if field == wp.static(QVEL):
        return poses.qvel[world, index]
    if field == wp.static(XPOS):
        return poses.xpos[world, index]
    if field == wp.static(XMAT):
        return poses.xmat[world, index]
    if field == wp.static(XIPOS):
        return poses.xipos[world, index]
    if field == wp.static(SITE_XPOS):
        return poses.site_xpos[world, index]
    return poses.site_xmat[world, index]


@wp.kernel
def observe(terms: wp.array2d(dtype=int), poses: Poses, obs: wp.array2d(dtype=float)):
    world, k = wp.tid()
    value = entry(terms[k, 0], terms[k, 1], poses, world)
    if terms[k, 2] >= 0:
        value -= entry(terms[k, 2], terms[k, 3], poses, world)
    obs[world, k] = value


@wp.kernel
def join_state(time: wp.array(dtype=float), qpos: wp.array2d(dtype=float), qvel: wp.array2d(dtype=float), out: wp.array2d(dtype=float)):
    """LIBERO's flattened simulator state."""
    world, k = wp.tid()
    nq = qpos.shape[1]
    if k == 0:
        out[world, k] = time[world]
    elif k <= nq:
        out[world, k] = qpos[world, k - 1]
    else:
        out[world, k] = qvel[world, k - 1 - nq]


@wp.struct
class Starts:
    """Start states, settled: T training states, then the official ones."""

    qpos: wp.array2d(dtype=float)  # (T + O, nq)
    qvel: wp.array2d(dtype=float)
    warmstart: wp.array2d(dtype=float)  # the constraint solver's, (., nv)
    time: wp.array(dtype=float)
    goal_rot: wp.array(dtype=wp.mat33d)
    grip: wp.array(dtype=wp.vec2d)
    train: int  # T


@wp.kernel
def begin(
    mask: wp.array(dtype=bool),
    official: wp.array(dtype=int),  # (N,) index of an official state, -1: a training state, drawn here
    seed: wp.array(dtype=int),
    starts: Starts,
    memory: Memory,
    qpos: wp.array2d(dtype=float),
    qvel: wp.array2d(dtype=float),
    warmstart: wp.array2d(dtype=float),
    time: wp.array(dtype=float),
):
    world = wp.tid()
    if not mask[world]:
        return
    # world and episode decide the draw, not the order in which worlds finish
    random = wp.rand_init(seed[0], world + mask.shape[0] * memory.episode[world])
    index = wp.randi(random, 0, starts.train)
    row = index
    if official[world] >= 0:
        index = official[world]
        row = starts.train + index
    memory.episode[world] += 1
    memory.state_index[world] = index
    memory.elapsed[world] = 0
    memory.broken[world] = 0
    memory.goal_rot[world] = starts.goal_rot[row]
    memory.grip[world] = starts.grip[row]
    time[world] = starts.time[row]
    for i in range(qpos.shape[1]):
        qpos[world, i] = starts.qpos[row, i]
    for i in range(qvel.shape[1]):
        qvel[world, i] = starts.qvel[row, i]
        warmstart[world, i] = starts.warmstart[row, i]
