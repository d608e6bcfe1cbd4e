"""LIBERO's HDF5 layout, and an episode of it in memory. Reader, writer and checker go by what stands here.

    data                attributes: bddl_file_name, env_args (JSON), env_name, problem_info (JSON),
                        macros_image_convention, num_demos, total, tag; and ours: task, script, mujoco, assets, ...
    data/demo_<i>       attributes: num_samples, model_file, init_state (= states[0]);
                        and ours: success, pattern, strategy, init_state_index, final_state, ...
        actions             (T, 7)  f64  in [-1, 1], the gripper -1 (open) or 1 (close)
        states              (T, 1+nq+nv)  f64  time, qpos, qvel BEFORE action t
        robot_states        (T, 9)  f64  gripper 2, end-effector position 3, quaternion 4 (xyzw) AFTER action t
        rewards, dones      (T,)  u8  the last one 1
        obs/ee_pos, ee_ori, ee_states, gripper_states, joint_states, ee_quat    f64  AFTER action t (ee_quat is ours)
        obs/agentview_rgb, eye_in_hand_rgb    (T, H, W, 3)  u8  AFTER action t, bottom row first; optional

The layout is that of the published demonstrations (LIBERO, arXiv 2306.03310; written by its scripts/create_dataset.py).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from common.cli import UserError

PROPRIO = {"ee_pos": 3, "ee_ori": 3, "ee_quat": 4, "gripper_states": 2, "joint_states": 7}  # name -> numbers a step
# path below demo_<i> -> (shape of one step, type); None: the width of this task's states
LAYOUT: dict[str, tuple[tuple[int | None, ...], str]] = {
    "actions": ((7,), "float64"),
    "states": ((None,), "float64"),
    "robot_states": ((9,), "float64"),
    "rewards": ((), "uint8"),
    "dones": ((), "uint8"),
    "obs/ee_states": ((6,), "float64"),
    **{f"obs/{name}": ((width,), "float64") for name, width in PROPRIO.items()},
}

_PARTS = {"ee_pos": slice(0, 3), "ee_ori": slice(3, 6)}  # of ee_states
OPTIONAL = {"obs/ee_quat"}  # not in LIBERO's own files
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)  # what h5py raises on damaged bytes
TAG = "libero-v1"
JSON_KEYS = {
    "env_args": ("env_name", "problem_name", "env_kwargs"),
    "problem_info": ("problem_name", "language_instruction"),
}

DATA_ATTRS = (*JSON_KEYS, "bddl_file_name", "env_name", "macros_image_convention", "num_demos", "total")
DEMO_ATTRS = ("num_samples", "model_file", "init_state")


@dataclass(eq=False)
class Episode:
    """One episode of T control steps (20 Hz). Metres, radians."""

    actions: np.ndarray
    """(T, 7) in [-1, 1]: OSC_POSE deltas, gripper -1 (open) or 1 (close)"""
    states: np.ndarray
    """(T, 1+nq+nv) time, qpos, qvel BEFORE action t"""
    proprio: dict[str, np.ndarray]
    """AFTER action t: ee_pos (T, 3), ee_ori (T, 3) axis-angle, ee_quat (T, 4) xyzw, gripper_states (T, 2) and
    joint_states (T, 7)"""
    images: dict[str, np.ndarray] = field(default_factory=dict)
    """agentview_rgb, eye_in_hand_rgb: (T, H, W, 3) uint8 AFTER action t, TOP row first (in files: bottom row first)"""
    success: bool = True
    attrs: dict[str, Any] = field(default_factory=dict)
    """numbers, strings, number arrays: pattern (-1: unknown), strategy, init_state (official index, -1: none), ..."""
    final_state: np.ndarray | None = None
    """(1+nq+nv,) AFTER the last action: s_T of the diversity metrics, and what the last picture shows"""

    @property
    def robot_states(self) -> np.ndarray:
        """(T, 9) gripper 2, ee_pos 3, ee_quat 4, AFTER action t: LIBERO's create_dataset.py takes it after the step."""
        return np.concatenate([self.proprio["gripper_states"], self.proprio["ee_pos"], self.proprio["ee_quat"]], axis=1)

    @property
    def length(self) -> int:
        """T, the number of actions."""
        return len(self.actions)


def opened(path: str | os.PathLike) -> h5py.File:
    """An HDF5 file open for reading; UserError, without the file's name, if it can't be."""
    path = Path(path)
    if path.is_dir() or not path.exists():
        raise UserError("is a folder, not an HDF5 file" if path.is_dir() else "no such file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if "truncated file" in str(error):
            raise UserError("truncated: the end of the file is missing; copy, download or write it again") from None
        if "signature not found" in str(error):
            raise UserError("not an HDF5 file") from None
        reason = environment_fault(error) or f"cannot be opened: {os.strerror(error.errno) if error.errno else error}"
        raise UserError(reason) from None


def environment_fault(error: Exception) -> str | None:
    """What stands in the way of a file that may be sound, and what to do about it; None if it is something else."""
    said, number = str(error), getattr(error, "errno", None)
    if number in (errno.EAGAIN, errno.ENOLCK) or "unable to lock file" in said:
        return (
            "locked: another process is writing it, or its file system (a network's) has no locks; if no process is, "
            "set HDF5_USE_FILE_LOCKING=FALSE"
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return "not opened, too many files are open in this process; raise the limit (ulimit -n 4096)"
    if "plugin" in said or "not registered" in said:
        return "compressed with a filter that is not installed here; install it, or store the file with gzip (h5repack -f GZIP=4 FILE NEW)"
    return None


def unreadable(error: Exception) -> str:
    """Why what HDF5 raised amid a file's datasets makes it unreadable, and what to do."""
    return environment_fault(error) or f"damaged, cannot be read ({' '.join(str(error).split())}); copy, download or write it again"


def proprioception(obs: h5py.Group | Mapping[str, Any], name: str, steps: Any = ()) -> np.ndarray:
    """One of PROPRIO of the given `steps`, as it is stored; ee_pos and ee_ori out of ee_states where they are not by themselves."""
    if name in obs or name not in _PARTS:
        return obs[name][steps]
    return obs["ee_states"][steps][..., _PARTS[name]]


def demo_names(data: h5py.Group) -> list[str]:
    """The groups demo_<number>, by their numbers."""
    names = [name for name in data if name.startswith("demo_") and name[5:].isdecimal()]
    return sorted((name for name in names if isinstance(data[name], h5py.Group)), key=lambda name: int(name[5:]))


def whole(dataset: h5py.Dataset) -> Any:
    """All of a dataset. ValueError, and no memory taken, if it says to hold far more than lies in the file: deflate packs 1 to 1,032."""
    if dataset.nbytes > max(2**26, 2000 * (stored := dataset.id.get_storage_size())):
        raise ValueError(f"{dataset.name} says to hold {dataset.nbytes / 1e9:.3g} GB, of which {stored} bytes are there")
    return dataset[()]


def read_arrays(demo: h5py.Group) -> dict[str, Any]:
    """Path below demo_<i> -> array; images stay on disk."""
    arrays: dict[str, Any] = {key: whole(demo[key]) for key in LAYOUT if isinstance(demo.get(key), h5py.Dataset)}
    arrays = {key: array for key, array in arrays.items() if np.ndim(array)}
    obs = demo.get("obs")
    names = [name for name in obs if name.endswith("_rgb")] if isinstance(obs, h5py.Group) else []
    return {**arrays, **{f"obs/{name}": obs[name] for name in names}}


def picture_sizes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Name -> (height, width) of the pictures among `read_arrays`' arrays."""
    return {key.removeprefix("obs/"): array.shape[1:3] for key, array in sorted(arrays.items()) if key.endswith("_rgb")}


def python_value(value: Any) -> Any:
    """An attribute as h5py returns it -> bool, int, float, str or array."""
    if isinstance(value, np.generic):
        value = value.item()
    return as_text(value)


def as_text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def base_name(path: str | bytes) -> str:
    """LIBERO's published files hold paths of the machines they were recorded on: only the file's name counts."""
    return PurePosixPath(str(as_text(path)).replace("\\", "/")).name
