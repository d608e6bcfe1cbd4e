"""Compiled models on disk. A mesh or texture is most of a model and the same in many: each is kept once, compressed, in a file of its own.

What is read back is the model bit for bit. The boxes around meshes' faces, the larger half of them, are kept as differences from what
vertices and smaller boxes predict.
"""

from __future__ import annotations

import copy
import hashlib
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mujoco
import numpy as np

from common.cli import atomic_path, cache_dir, usable_cores

# Arrays of which each mesh has a part, and where that part begins and how long it is.
MESH_ARRAYS = {
    ("mesh_vert",): ("mesh_vertadr", "mesh_vertnum"),
    ("mesh_normal",): ("mesh_normaladr", "mesh_normalnum"),
    ("mesh_texcoord",): ("mesh_texcoordadr", "mesh_texcoordnum"),
    ("mesh_face", "mesh_facenormal", "mesh_facetexcoord"): ("mesh_faceadr", "mesh_facenum"),
    ("bvh_child", "bvh_nodeid", "bvh_depth", "bvh_aabb"): ("mesh_bvhadr", "mesh_bvhnum"),
}
BLOCK = 4096  # bytes; of the rest of a model, blocks that are zeros throughout are left out


class Damaged(ValueError):
    """What a model needs is missing, or not what was written."""


def save(model: mujoco.MjModel) -> tuple[dict[str, np.ndarray], list[str]]:
    """Keep a model's meshes and textures in the cache; returns the rest of it as arrays, and the names of the files."""
    rest = copy.copy(model)
    _difference(rest)
    names = []
    for part in _parts(rest):
        names.append(_keep(b"".join(map(_planes, part))))
        for array in part:
            array[...] = 0
    size = mujoco.mj_sizeModel(rest)
    binary = np.zeros(-(-size // BLOCK) * BLOCK, np.uint8)
    mujoco.mj_saveModel(rest, None, binary[:size])
    blocks = binary.reshape(-1, BLOCK)
    kept = np.flatnonzero(blocks.any(1))
    return {"size": np.array(size), "kept": kept, "blocks": blocks[kept]}, names


def load(rest: dict[str, np.ndarray], names: list[str]) -> mujoco.MjModel:
    """The model that `save` was given. Raises Damaged, or what MuJoCo raises for a damaged rest; MemoryError where there is no room."""
    blocks = np.zeros((-(-int(rest["size"]) // BLOCK), BLOCK), np.uint8)
    blocks[rest["kept"]] = rest["blocks"]
    binary = memoryview(blocks.reshape(-1))[: int(rest["size"])].tobytes()
    try:
        model = mujoco.MjModel.from_binary_path("model.mjb", {"model.mjb": binary})
    except RuntimeError as error:  # "Caught an unknown exception!": its own fails as FatalError, on a damaged rest
        raise MemoryError(f"no room for a model of {len(binary) / 1e6:.0f} MB") from error
    with ThreadPoolExecutor(usable_cores()) as pool:
        for name, content, part in zip(names, pool.map(_read, names), _parts(model), strict=True):
            if len(content) != sum(array.nbytes for array in part):
                raise Damaged(f"{name}.z is of another model")
            begin = 0
            for array in part:
                array[...] = _undo_planes(np.frombuffer(content, np.uint8, array.nbytes, begin), array)
                begin += array.nbytes
    _undo_difference(model)
    return model


def _parts(model: mujoco.MjModel) -> Iterator[list[np.ndarray]]:
    """For each mesh and each texture its rows of the model's arrays."""
    for mesh in range(model.nmesh):
        part = []
        for names, (first, count) in MESH_ARRAYS.items():
            begin = max(0, getattr(model, first)[mesh])  # -1: it has none
            part += [getattr(model, name)[begin : begin + getattr(model, count)[mesh]] for name in names]
        yield part
    for texture in range(model.ntex):
        begin, size = model.tex_adr[texture], model.tex_height[texture] * model.tex_width[texture] * model.tex_nchannel[texture]
        yield [model.tex_data[begin : begin + size]]


def _planes(array: np.ndarray) -> bytes:
    """An array's bytes; of integers first all lowest bytes, then the next: their high bytes are mostly alike."""
    raw = np.ascontiguousarray(array)
    return raw.reshape(-1).view(np.uint8).reshape(-1, raw.itemsize).T.tobytes() if raw.dtype.kind == "i" else raw.tobytes()


def _undo_planes(raw: np.ndarray, like: np.ndarray) -> np.ndarray:
    if like.dtype.kind == "i":
        raw = np.ascontiguousarray(raw.reshape(like.itemsize, -1).T)
    return raw.view(like.dtype).reshape(like.shape)


# ---------------------------------------------------------------------------------------------- boxes


def _difference(model: mujoco.MjModel) -> None:
    """Replace the boxes of meshes by their differences, as integers, from what is predicted."""
    boxes, whole = model.bvh_aabb.view(np.int64), model.bvh_aabb.copy()
    for nodes, predicted in _predictions(model, whole):
        boxes[nodes] -= predicted.view(np.int64)


def _undo_difference(model: mujoco.MjModel) -> None:
    boxes = model.bvh_aabb.view(np.int64)
    for nodes, predicted in _predictions(model, model.bvh_aabb):
        boxes[nodes] += predicted.view(np.int64)


def _predictions(model: mujoco.MjModel, boxes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Nodes of all meshes' trees, those without children first, then such that a node's children come before it; and a prediction of
    their boxes (centre, half size): around a face's corners, or around the children's `boxes`, read when the nodes are asked for.

    MuJoCo's own boxes are the same but for rounding: it has the vertices in double precision.
    """
    counts = model.mesh_bvhnum
    mesh = np.repeat(np.arange(model.nmesh), counts)
    first = model.mesh_bvhadr[mesh]
    nodes = first + np.arange(len(mesh)) - np.repeat(np.cumsum(counts) - counts, counts)
    face, depth = model.bvh_nodeid[nodes], model.bvh_depth[nodes]
    leaf = np.flatnonzero(face >= 0)
    corners = model.mesh_face[model.mesh_faceadr[mesh[leaf]] + face[leaf]] + model.mesh_vertadr[mesh[leaf], None]
    a, b, c = (model.mesh_vert[corners[:, i]] for i in range(3))
    yield nodes[leaf], _box(np.minimum(np.minimum(a, b), c), np.maximum(np.maximum(a, b), c))
    inner = np.flatnonzero(face < 0)
    inner = inner[np.argsort(-depth[inner].astype(np.int16), kind="stable")]  # 16 bits: sorted by counting
    for chosen in np.split(inner, np.flatnonzero(np.diff(depth[inner])) + 1):
        children = model.bvh_child[nodes[chosen]] + first[chosen, None]
        a, b = boxes[children[:, 0]], boxes[children[:, 1]]
        low = np.minimum(a[:, :3] - a[:, 3:], b[:, :3] - b[:, 3:])
        yield nodes[chosen], _box(low, np.maximum(a[:, :3] + a[:, 3:], b[:, :3] + b[:, 3:]))


def _box(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    box = np.empty((len(low), 6))
    box[:, :3], box[:, 3:] = low, high
    box[:, :3], box[:, 3:] = (box[:, :3] + box[:, 3:]) / 2, (box[:, 3:] - box[:, :3]) / 2
    return box


# ---------------------------------------------------------------------------------------------- files


def _file(name: str) -> Path:
    return cache_dir() / "meshes" / f"{name}.z"


def _read(name: str) -> bytes:
    try:
        return zlib.decompress(_file(name).read_bytes())
    except (OSError, zlib.error) as error:
        raise Damaged(f"{name}.z: {error}") from error


def _keep(content: bytes) -> str:
    """Have `content` in a file named after it; one that is there and damaged is replaced."""
    name = hashlib.sha256(content).hexdigest()[:24]
    try:
        if _read(name) == content:
            return name
    except Damaged:
        pass
    with atomic_path(_file(name)) as temporary:
        temporary.write_bytes(zlib.compress(content, 4))
    return name
