"""Reading episodes and attributes out of files in LIBERO's HDF5 layout."""

from __future__ import annotations

import json
import os
from typing import Any

import h5py
import numpy as np

from common.cli import UserError
from common.data.check import require_sound
from common.data.layout import (
    DAMAGE,
    DEMO_ATTRS,
    JSON_KEYS,
    PROPRIO,
    Episode,
    as_text,
    base_name,
    damaged,
    demo_names,
    opened,
    python_value,
)

_DEFAULTS = {"pattern": -1, "strategy": "", "init_state": -1}  # of files without our attributes


def read_episodes(path: str | os.PathLike, task=None, images: bool = False) -> list[Episode]:
    """Every episode of a file of ours or of LIBERO's published ones, by their numbers; with pictures if `images`.

    The file is checked first, with `task` against that task (`check_file`). What human files lack gets defaults:
    pattern and init_state -1, strategy "", success True, ee_quat from ee_ori, final_state None.
    Raises UserError with the first problem and their number.
    """
    require_sound(path, task)
    with opened(path) as file:
        data = file["data"]
        flip = as_text(data.attrs["macros_image_convention"]) == "opengl"
        try:
            return [read_episode(data[name], images, flip) for name in demo_names(data)]
        except DAMAGE as error:
            raise UserError(f"{path}: {damaged(error)}") from None


def read_attrs(path: str | os.PathLike) -> dict[str, Any]:
    """The attributes on `data` as Python values: LIBERO's (JSON parsed, bddl_file_name without its folder) and ours.

    Raises UserError if the file can't be opened or has no such group.
    """
    try:
        with opened(path) as file:
            if "data" not in file:
                raise UserError("foreign layout: no group data")
            attrs = {key: python_value(value) for key, value in file["data"].attrs.items()}
            for key in JSON_KEYS.keys() & attrs.keys():
                attrs[key] = json.loads(attrs[key])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except DAMAGE as error:
        raise UserError(f"{path}: {damaged(error)}") from None
    if "bddl_file_name" in attrs:
        attrs["bddl_file_name"] = base_name(attrs["bddl_file_name"])
    return attrs


def image_names(path: str | os.PathLike) -> list[str]:
    """The names of a sound file's pictures (agentview_rgb, ...), [] if it has none."""
    with opened(path) as file:
        return sorted(name for name in file["data"][demo_names(file["data"])[0]]["obs"] if name.endswith("_rgb"))


def read_episode(demo: h5py.Group, images: bool, flip: bool) -> Episode:
    proprio = {name: demo[f"obs/{name}"][()] for name in PROPRIO if f"obs/{name}" in demo}
    if "ee_quat" not in proprio:
        proprio["ee_quat"] = axis_angle_to_quat(proprio["ee_ori"])
    pictures = {}
    for name in demo["obs"] if images else ():
        if name.endswith("_rgb"):
            frames = demo[f"obs/{name}"][()]
            pictures[name] = np.ascontiguousarray(frames[:, ::-1]) if flip else frames
    attrs = {key: python_value(value) for key, value in demo.attrs.items() if key not in DEMO_ATTRS}
    success, final_state = attrs.pop("success", True), attrs.pop("final_state", None)
    if "init_state_index" in attrs:
        attrs["init_state"] = attrs.pop("init_state_index")
    return Episode(
        actions=demo["actions"][()],
        states=demo["states"][()],
        proprio=proprio,
        images=pictures,
        success=success,
        attrs={**_DEFAULTS, **attrs},
        final_state=final_state,
    )


def axis_angle_to_quat(axis_angle: np.ndarray) -> np.ndarray:
    """(T, 3) -> (T, 4) xyzw; undoes robosuite's quat2axisangle, whose angle is 2 acos(w) in [0, 2 pi]."""
    half = np.linalg.norm(axis_angle, axis=-1, keepdims=True) / 2
    return np.concatenate([axis_angle * 0.5 * np.sinc(half / np.pi), np.cos(half)], axis=-1)  # sinc(x/pi) = sin(x)/x
