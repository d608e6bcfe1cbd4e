"""What the scripted demonstrator knows of shapes: points on the surfaces of collision geoms, height maps of them, rotations.

Metres and radians in the world frame, unless a docstring says otherwise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import mujoco
import numba
import numpy as np

from common.libero import Task

UP = np.array([0.0, 0.0, 1.0])
CELL = 0.004  # resolution of the height maps that grasps are searched in (m)


def surface_points(model: mujoco.MjModel, geoms, spacing: float = CELL) -> list[tuple[int, np.ndarray]]:
    """Points on the surface of collision geoms: a list of (geom, (n, 3) points in the geom's frame).

    Meshes, cylinders and the like are taken as their bounding boxes: LIBERO's objects collide as boxes.
    """
    return [(int(g), model.geom_aabb[g, :3] + box_points(tuple(model.geom_aabb[g, 3:]), spacing)) for g in geoms]


@functools.lru_cache(4096)
def box_points(half: tuple[float, ...], spacing: float) -> np.ndarray:
    """(n, 3) points on the surface of a box of these half extents around the origin."""
    axes = [np.linspace(-h, h, max(2, int(np.ceil(2 * h / spacing)) + 1)) for h in half]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    return grid[(np.abs(np.abs(grid) - half) < 1e-9).any(1)]


def world_points(data: mujoco.MjData, clouds) -> np.ndarray:
    """(n, 3) points of `surface_points` in the world frame."""
    if not clouds:
        return np.empty((0, 3))
    return np.concatenate([data.geom_xpos[g] + points @ data.geom_xmat[g].reshape(3, 3).T for g, points in clouds])


def nearby_points(task: Task, data: mujoco.MjData, centre: np.ndarray, ignore: Sequence[int] = (), radius: float = 0.3):
    """(n, 3) points of everything solid near `centre` but the robot and the root bodies `ignore`."""
    model = task.model
    robot = [model.body_rootid[model.site_bodyid[task.eef_site]], *ignore]
    size = model.geom_aabb[:, 3:].max(1)
    plane = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    solid = (model.geom_contype | model.geom_conaffinity).astype(bool) & ~np.isin(model.body_rootid[model.geom_bodyid], robot)
    solid &= plane | (np.linalg.norm(data.geom_xpos - centre, axis=1) < radius + size)
    small = solid & ~plane & (size < 0.4)
    clouds = surface_points(model, np.flatnonzero(small))
    for g in np.flatnonzero(solid & ~small):  # table tops and floors: only the part that is near
        local = (centre - data.geom_xpos[g]) @ data.geom_xmat[g].reshape(3, 3) - model.geom_aabb[g, :3]
        half = np.array([np.inf, np.inf, 0.0]) if plane[g] else model.geom_aabb[g, 3:]
        low, high = np.maximum(local - 0.2, -half), np.minimum(local + 0.2, half)
        if (low <= high).all():
            points = box_points(tuple(np.round(0.5 * (high - low), 4)), 2 * CELL)
            clouds.append((g, model.geom_aabb[g, :3] + 0.5 * (low + high) + points))
    return world_points(data, clouds)


@numba.njit(cache=True)
def height_map(points, low, shape, cell):
    """(shape) height of the highest of (n, 3) points in each cell of a grid that begins at `low` (2,), -inf where there is none."""
    heights = np.full((shape[0], shape[1]), -np.inf)
    for n in range(len(points)):
        i, j = math.floor((points[n, 0] - low[0]) / cell), math.floor((points[n, 1] - low[1]) / cell)
        if 0 <= i < shape[0] and 0 <= j < shape[1] and points[n, 2] > heights[i, j]:
            heights[i, j] = points[n, 2]
    return heights


def columns(points: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """The lower side of (n, 3) points: the cells (m, 2) int that it covers, and its height in each of them (m,)."""
    cells = np.floor(points[:, :2] / cell + 0.5).astype(int)
    low = cells.min(0)
    under = np.full(cells.max(0) - low + 1, np.inf)
    np.minimum.at(under, tuple((cells - low).T), points[:, 2])
    covered = np.isfinite(under)
    return np.argwhere(covered) + low, under[covered]


@numba.njit(cache=True, fastmath={"nnan", "nsz", "reassoc"})
def rest(cells, under, surface, spots):
    """(n,) heights at which something of `columns` (cells, under) touches the height map `surface`, at each of the spots (n, 2) int.

    What would reach beyond the map's edge is taken to lie inside it.
    """
    rows, width = surface.shape
    flat, offsets, heights = surface.ravel(), cells[:, 0] * width + cells[:, 1], np.empty(len(spots))
    i_low, i_high, j_low, j_high = -cells[:, 0].min(), rows - 1 - cells[:, 0].max(), -cells[:, 1].min(), width - 1 - cells[:, 1].max()
    for s in range(len(spots)):
        i, j = min(max(spots[s, 0], i_low), i_high), min(max(spots[s, 1], j_low), j_high)
        height = -np.inf
        for c in range(len(cells)):
            height = max(height, flat[i * width + j + offsets[c]] - under[c])
        heights[s] = height
    return heights


def solid_geoms(task: Task, data: mujoco.MjData, body: int, centre: np.ndarray, radius: float) -> np.ndarray:
    """Ids of everything solid near a point, but the robot, the floor and an object."""
    model = task.model
    ignored = model.body_rootid[model.site_bodyid[task.eef_site]], model.body_rootid[body]
    solid = (model.geom_contype | model.geom_conaffinity).astype(bool) & ~np.isin(model.body_rootid[model.geom_bodyid], ignored)
    near = np.linalg.norm(data.geom_xpos - centre, axis=1) < radius + model.geom_aabb[:, 3:].max(1)
    return np.flatnonzero(solid & near & (model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE))


def inside_solids(model: mujoco.MjModel, data: mujoco.MjData, geoms: np.ndarray, points: np.ndarray, margin: float) -> bool:
    """Whether any of the (n, 3) points is inside a geom's bounding box, widened by `margin`."""
    return _inside_boxes(points, geoms, data.geom_xpos, data.geom_xmat, model.geom_aabb, margin)


@numba.njit(cache=True)
def _inside_boxes(points, geoms, positions, frames, boxes, margin):
    for g in geoms:
        for n in range(len(points)):
            x, y, z = points[n, 0] - positions[g, 0], points[n, 1] - positions[g, 1], points[n, 2] - positions[g, 2]
            inside = True
            for j in range(3):
                along = x * frames[g, j] + y * frames[g, 3 + j] + z * frames[g, 6 + j]
                inside = inside and abs(along - boxes[g, j]) < boxes[g, 3 + j] + margin
            if inside:
                return True
    return False


def joint_at(model: mujoco.MjModel, address: int) -> int:
    """The joint whose position begins at an address in qpos."""
    return int(np.flatnonzero(model.jnt_qposadr == address)[0])


def hand_rotation(finger: np.ndarray, approach: np.ndarray) -> np.ndarray:
    """Rotation matrix of the grip site whose fingers move along `finger` and whose palm looks along `approach`."""
    finger = finger - approach * (finger @ approach)
    finger = finger / np.linalg.norm(finger)
    return np.column_stack([finger, np.cross(approach, finger), approach])


def rotation_vector(rot: np.ndarray) -> np.ndarray:
    """Axis times angle (rad) of a rotation matrix."""
    v = np.array([rot[2, 1] - rot[1, 2], rot[0, 2] - rot[2, 0], rot[1, 0] - rot[0, 1]])
    sine = 0.5 * math.sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2])
    angle = math.atan2(sine, 0.5 * (rot[0, 0] + rot[1, 1] + rot[2, 2] - 1.0))
    return v * (0.5 if sine < 1e-6 else 0.5 * angle / sine)


def axis_rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rotation matrix of a turn about a unit axis."""
    turn, quat = np.empty(9), np.empty(4)
    mujoco.mju_axisAngle2Quat(quat, axis, angle)
    mujoco.mju_quat2Mat(turn, quat)
    return turn.reshape(3, 3)
