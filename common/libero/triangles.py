"""Geoms of a MuJoCo model as triangles with normals and texture coordinates, as MuJoCo's OpenGL code draws them."""

from __future__ import annotations

import mujoco
import numpy as np

REVOLVED = mujoco.mjtGeom.mjGEOM_SPHERE, mujoco.mjtGeom.mjGEOM_ELLIPSOID, mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_CYLINDER


def areas(corners: np.ndarray) -> np.ndarray:
    """Twice the areas of triangles (F, 3, 3)."""
    return np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=-1)


def texture_coordinates(model: mujoco.MjModel, geom, texture: int, points: np.ndarray, uvs: np.ndarray | None) -> np.ndarray:
    """(F, 3, 3) as MuJoCo's OpenGL code generates them from positions, where the mesh has none of its own."""
    coordinates = np.zeros(points.shape)
    if texture < 0:
        return coordinates
    size = np.where(np.asarray(geom.size) > 0, geom.size, 1.0)
    uniform = model.mat_texuniform[geom.matid]
    if uvs is not None:
        coordinates[..., :2] = uvs
    elif model.tex_type[texture] == mujoco.mjtTexture.mjTEXTURE_2D:  # along x and y; repeats count by size or by metre
        repeat = 0.5 * model.mat_texrepeat[geom.matid] / (1 if uniform else size[:2])
        coordinates[..., :2] = points[..., :2] * repeat * [1, -1] - 0.5
    else:
        coordinates[:] = points if uniform or geom.type == mujoco.mjtGeom.mjGEOM_MESH else points / size
    return coordinates


def triangles(model: mujoco.MjModel, geom) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A geom's corners (F, 3, 3), their normals (F, 3, 3) and texture coordinates (F, 3, 2) or None, in the geom's frame."""
    kind, size = mujoco.mjtGeom(geom.type), model.geom_size[geom.objid]
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        return _mesh(model, geom.dataid // 2)  # dataid is odd for the convex hull
    if kind == mujoco.mjtGeom.mjGEOM_PLANE:
        x, y = np.where(size[:2] > 0, size[:2], 50.0)  # 0: no end
        points, normals = _quad([x, 0, 0], [0, y, 0], [0, 0, 0])
    elif kind == mujoco.mjtGeom.mjGEOM_BOX:
        axes = np.diag(size)
        sides = [_quad(axes[(i + 1) % 3], sign * axes[(i + 2) % 3], sign * axes[i]) for i in range(3) for sign in (1, -1)]
        points, normals = (np.concatenate(x) for x in zip(*sides, strict=True))
    elif kind in REVOLVED:
        points, normals = _revolved(kind, size)
    else:
        raise NotImplementedError(f"the ray tracer has no triangles for {kind.name}")
    return points, normals, None


def _mesh(model: mujoco.MjModel, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    faces = slice(model.mesh_faceadr[i], model.mesh_faceadr[i] + model.mesh_facenum[i])
    points = model.mesh_vert[model.mesh_vertadr[i] + model.mesh_face[faces]]
    normals = model.mesh_normal[model.mesh_normaladr[i] + model.mesh_facenormal[faces]]
    if model.mesh_texcoordadr[i] >= 0:
        return points, normals, model.mesh_texcoord[model.mesh_texcoordadr[i] + model.mesh_facetexcoord[faces]]
    flat = np.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0])[:, None]
    flat /= np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-20)
    # as MuJoCo does: a normal that is far from its face's gives way to it
    return points, np.where((normals * flat).sum(-1, keepdims=True) < 0.8, flat, normals), None


def _quad(x, y, centre) -> tuple[np.ndarray, np.ndarray]:
    """Two triangles over centre +- x +- y, facing x cross y."""
    x, y, centre = (np.asarray(a, float) for a in (x, y, centre))
    a, b, c, d = centre - x - y, centre + x - y, centre + x + y, centre - x + y
    normal = np.cross(x, y)
    return np.array([[a, b, c], [a, c, d]]), np.broadcast_to(normal / np.linalg.norm(normal), (2, 3, 3))


def _revolved(kind: mujoco.mjtGeom, size: np.ndarray, segments: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """A sphere, ellipsoid, capsule or cylinder: a profile of (radius, height), bottom to top, and its normals, turned about z."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, segments // 2 + 1)
    arc = np.stack([np.cos(angle), np.sin(angle)], -1)
    points = normals = arc  # the unit sphere
    if kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
        points = np.array([[0, -1], [1, -1], [1, -1], [1, 1], [1, 1], [0, 1]]) * size[:2]
        normals = np.array([[0, -1], [0, -1], [1, 0], [1, 0], [0, 1], [0, 1]])
    elif kind == mujoco.mjtGeom.mjGEOM_CAPSULE:
        half = np.arange(segments // 2 + 2) - (np.arange(segments // 2 + 2) > segments // 4)
        normals = arc[half]
        points = normals * size[0] + np.where(np.arange(len(half)) > segments // 4, 1, -1)[:, None] * [0, size[1]]
    turn = np.linspace(0, 2 * np.pi, segments + 1)

    def turned(profile: np.ndarray) -> np.ndarray:
        rings = [profile[:, :1] * np.cos(turn), profile[:, :1] * np.sin(turn), np.broadcast_to(profile[:, 1:], (len(profile), len(turn)))]
        grid = np.stack(rings, -1)
        a, b, c, d = grid[:-1, :-1], grid[:-1, 1:], grid[1:, 1:], grid[1:, :-1]
        return np.stack([a, b, c, a, c, d], 2).reshape(-1, 3, 3)

    points, normals = turned(points), turned(normals)
    if kind in (mujoco.mjtGeom.mjGEOM_SPHERE, mujoco.mjtGeom.mjGEOM_ELLIPSOID):
        scale = size if kind == mujoco.mjtGeom.mjGEOM_ELLIPSOID else np.full(3, size[0])
        points, normals = points * scale, normals / scale
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    solid = areas(points) > 1e-14  # no triangles at the poles
    return points[solid], normals[solid]
