"""Compiled models on disk. A mesh or texture is most of a model and the same in many: each is kept once, compressed, in a file of its own.

What is read back is the model bit for bit. Meshes' bounding boxes, the larger half of them, are kept as differences from what the
vertices and the smaller boxes predict.
"""

from __future__ import annotations

import copy
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path

import mujoco
import numpy as np

from common.cli import atomic_path, cache_dir

# Arrays of which each mesh has a part, and where that part begins and how long it is.
MESH_ARRAYS = {
    ("mesh_vert",): ("mesh_vertadr", "mesh_vertnum"),
    ("mesh_normal",): ("mesh_normaladr", "mesh_normalnum"),
    ("mesh_texcoord",): ("mesh_texcoordadr", "mesh_texcoordnum"),
    ("mesh_face", "mesh_facenormal", "mesh_facetexcoord"): ("mesh_faceadr", "mesh_facenum"),
    ("bvh_child", "bvh_nodeid", "bvh_depth", "bvh_aabb"): ("mesh_bvhadr", "mesh_bvhnum"),
}


class Damaged(ValueError):
    """What a model needs is missing, or not what was written."""


def save(model: mujoco.MjModel) -> tuple[np.ndarray, list[str]]:
    """Keep a model's meshes and textures; returns the rest as bytes (uint8), in which they are zeros, and the names of their files."""
    rest = copy.copy(model)
    names = []
    for part, zeros in zip(_parts(model), _parts(rest), strict=True):
        names.append(_keep(_encode(part)))
        for array in zeros.values():
            array[...] = 0
    binary = np.empty(mujoco.mj_sizeModel(rest), np.uint8)
    mujoco.mj_saveModel(rest, None, binary)
    return binary, names


def load(binary: np.ndarray, names: list[str]) -> mujoco.MjModel:
    """The model that `save` was given. Raises Damaged, or what MuJoCo raises for a damaged binary."""
    model = mujoco.MjModel.from_binary_path("model.mjb", {"model.mjb": binary.tobytes()})
    for part, name in zip(_parts(model), names, strict=True):
        try:
            content = zlib.decompress(_file(name).read_bytes())
        except (OSError, zlib.error) as error:
            raise Damaged(f"{_file(name).name}: {error}") from error
        if len(content) != sum(array.nbytes for array in part.values()):
            raise Damaged(f"{_file(name).name} is of another model")
        _decode(content, part)
    return model


def _parts(model: mujoco.MjModel) -> Iterator[dict[str, np.ndarray]]:
    """For each mesh and each texture its rows of the model's arrays, by name."""
    for mesh in range(model.nmesh):
        part = {}
        for names, (first, count) in MESH_ARRAYS.items():
            begin = max(0, getattr(model, first)[mesh])  # -1: it has none
            part |= {name: getattr(model, name)[begin : begin + getattr(model, count)[mesh]] for name in names}
        yield part
    for texture in range(model.ntex):
        begin, shape = model.tex_adr[texture], (model.tex_height[texture], model.tex_width[texture], model.tex_nchannel[texture])
        yield {"tex_data": model.tex_data[begin : begin + int(np.prod(shape))]}


def _encode(part: dict[str, np.ndarray]) -> bytes:
    arrays = dict(part)
    if "bvh_aabb" in part and len(part["bvh_aabb"]):
        boxes = part["bvh_aabb"].copy()
        for nodes in _levels(part):
            boxes[nodes] = (part["bvh_aabb"][nodes].view(np.int64) - _predicted(part, part["bvh_aabb"], nodes).view(np.int64)).view(float)
        arrays["bvh_aabb"] = boxes
    return b"".join(_planes(array) for array in arrays.values())


def _decode(content: bytes, part: dict[str, np.ndarray]) -> None:
    """Fill the arrays of `part` with what `_encode` made of them."""
    begin = 0
    for array in part.values():
        raw = np.frombuffer(content, np.uint8, array.nbytes, begin)
        begin += array.nbytes
        if array.dtype.kind == "i":  # undo _planes
            raw = np.ascontiguousarray(raw.reshape(array.itemsize, -1).T)
        array[...] = raw.view(array.dtype).reshape(array.shape)
    if "bvh_aabb" in part and len(part["bvh_aabb"]):
        boxes = part["bvh_aabb"]
        for nodes in _levels(part):
            boxes[nodes] = (boxes[nodes].view(np.int64) + _predicted(part, boxes, nodes).view(np.int64)).view(float)


def _planes(array: np.ndarray) -> bytes:
    """An array's bytes; of integers first all lowest bytes, then the next: their high bytes are mostly alike."""
    raw = np.ascontiguousarray(array)
    return raw.reshape(-1).view(np.uint8).reshape(-1, raw.itemsize).T.tobytes() if raw.dtype.kind == "i" else raw.tobytes()


def _levels(part: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
    """The nodes of a mesh's tree of boxes, those without children first, then such that a node's children come before it."""
    inner, depth = part["bvh_nodeid"] < 0, part["bvh_depth"]
    yield np.flatnonzero(~inner)
    order = np.argsort(-depth[inner], kind="stable")
    nodes = np.flatnonzero(inner)[order]
    yield from np.split(nodes, np.flatnonzero(np.diff(depth[nodes])) + 1) if len(nodes) else ()


def _predicted(part: dict[str, np.ndarray], boxes: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The boxes (centre, half size) of nodes: around a face's corners, or around the two children's boxes. MuJoCo's own are the same
    but for rounding: it has the vertices in double precision."""
    if len(nodes) and part["bvh_nodeid"][nodes[0]] >= 0:
        corners = part["mesh_vert"].astype(float)[part["mesh_face"][part["bvh_nodeid"][nodes]]]
        low, high = corners.min(1), corners.max(1)
    else:
        children = boxes[part["bvh_child"][nodes]]
        low, high = (children[..., :3] - children[..., 3:]).min(1), (children[..., :3] + children[..., 3:]).max(1)
    return np.hstack([(low + high) / 2, (high - low) / 2])


def _file(name: str) -> Path:
    return cache_dir() / "meshes" / f"{name}.z"


def _keep(content: bytes) -> str:
    """Have `content` in a file named after it; one that is there and damaged is replaced."""
    name = hashlib.sha256(content).hexdigest()[:24]
    try:
        if zlib.decompress(_file(name).read_bytes()) == content:
            return name
    except (OSError, zlib.error):
        pass
    with atomic_path(_file(name)) as temporary:
        temporary.write_bytes(zlib.compress(content, 6))
    return name
