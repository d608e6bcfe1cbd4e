"""Reading episodes and attributes out of files in LIBERO's HDF5 layout."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import h5py
import numpy as np

from common.cli import UserError
from common.data.layout import (
    DAMAGE,
    DEMO_ATTRS,
    JSON_KEYS,
    PROPRIO,
    Episode,
    base_name,
    demo_names,
    opened,
    proprioception,
    python_value,
    unreadable,
)
from common.data.understand import Source, is_state, understand
from common.suites import remember_task

UNTOLD = "neither rewards nor attributes say whether the task was done: taken to be"
_JUDGED = "where neither rewards nor attributes say whether the task was done, LIBERO's goal on the last state does"
_DEFAULTS = {"pattern": -1, "strategy": "", "init_state": -1}  # of files without our attributes


def read_episodes(
    path: str | os.PathLike,
    task=None,
    images: bool = False,
    filter_key: str | None = None,
    judge: Callable[[Sequence[Episode]], Sequence[bool]] | None = None,
) -> list[Episode]:
    """Every episode of a file of ours, of LIBERO's published ones or of what people make of them, by their numbers.

    What differs from the layout is repaired, and demonstrations that can't be used are left out; both are logged, in a line each
    (`common.data.understand`). What human files lack gets defaults: pattern and init_state -1, strategy "", ee_quat from ee_ori,
    final_state None.

    Args:
        task: what the file must be of.
        images: with pictures.
        filter_key: only the demonstrations that robomimic's mask/<filter_key> names.
        judge: says of episodes whether they did the task, where the file does not (`common.libero.judge`). Without it they count as done.

    Raises UserError if the file can't be read, contradicts itself or the task, or holds no demonstration that can be used.
    """
    source = understand(path, task, filter_key, images)
    episodes = list(episodes_of(source, images))
    settle(source, episodes, judge)
    source.say()
    return episodes


def settle(source: Source, episodes: Sequence[Episode], judge: Callable[[Sequence[Episode]], Sequence[bool]] | None) -> None:
    """Decide the success of those episodes whose file does not say it."""
    unknown = [e for e, demo in zip(episodes, source.demos.values(), strict=True) if demo.success is None]
    if not unknown:
        return
    if judge is not None:
        for episode, done in zip(unknown, judge(unknown), strict=True):
            episode.success = bool(done)
    source.notes.append(UNTOLD if judge is None else f"{_JUDGED}: {sum(e.success for e in unknown)} of {len(unknown)} are")


def episodes_of(source: Source, images: bool) -> Iterator[Episode]:
    """The episodes of a file that has been understood, one by one; success True where the file does not say it."""
    try:
        with opened(source.path) as file:
            for name, demo in source.demos.items():
                yield read_episode(file["data"][name], source, images, demo.success is not False)
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None
    except DAMAGE as error:
        raise UserError(f"{source.path}: {unreadable(error)}") from None


def read_attrs(path: str | os.PathLike) -> dict[str, Any]:
    """The attributes on `data` as Python values: LIBERO's (JSON parsed, bddl_file_name without its folder) and ours.

    A task of one's own that the file brings along is known from then on (`common.suites.remember_task`).
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
        raise UserError(f"{path}: {unreadable(error)}") from None
    try:
        remember_task(attrs)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if "bddl_file_name" in attrs:
        attrs["bddl_file_name"] = base_name(attrs["bddl_file_name"])
    return attrs


def image_names(path: str | os.PathLike) -> list[str]:
    """The names of a sound file's pictures (agentview_rgb, ...), [] if it has none."""
    with opened(path) as file:
        return sorted(name for name in file["data"][demo_names(file["data"])[0]]["obs"] if name.endswith("_rgb"))


def read_episode(demo: h5py.Group, source: Source, images: bool, success: bool) -> Episode:
    """One demonstration of a file that has been understood."""

    def after(array: np.ndarray) -> np.ndarray:
        """What was seen after each action; of the last one, where the file ends before it, what was seen last."""
        return np.concatenate([array[1:], array[-1:]]) if source.before else array

    obs = demo["obs"]
    proprio = {name: proprioception(obs, name) for name in PROPRIO if name in obs or name != "ee_quat"}
    if "ee_quat" not in proprio:
        proprio["ee_quat"] = axis_angle_to_quat(proprio["ee_ori"])
    pictures = {}
    for name in obs if images else ():
        if name.endswith("_rgb"):
            frames = after(obs[name][()])
            pictures[name] = np.ascontiguousarray(frames[:, ::-1]) if source.flip else frames
    attrs = {key: python_value(value) for key, value in demo.attrs.items() if key not in (*DEMO_ATTRS, "success")}
    states = np.asarray(demo["states"][()], np.float64)
    final_state = attrs.pop("final_state", None)
    if "init_state_index" in attrs:
        attrs["init_state"] = attrs.pop("init_state_index")
    return Episode(
        actions=source.commands(demo["actions"][()]),
        states=states,
        proprio={name: after(np.asarray(proprio[name], np.float64)) for name in PROPRIO},
        images=pictures,
        success=success,
        attrs={**_DEFAULTS, **attrs},
        final_state=final_state if is_state(final_state, states) else None,
    )


def axis_angle_to_quat(axis_angle: np.ndarray) -> np.ndarray:
    """(T, 3) -> (T, 4) xyzw; undoes robosuite's quat2axisangle, whose angle is 2 acos(w) in [0, 2 pi]."""
    half = np.linalg.norm(axis_angle, axis=-1, keepdims=True) / 2
    return np.concatenate([axis_angle * 0.5 * np.sinc(half / np.pi), np.cos(half)], axis=-1)  # sinc(x/pi) = sin(x)/x
