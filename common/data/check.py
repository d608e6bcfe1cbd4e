"""What is wrong with a demonstration file, one line a problem; the writer asks the same of what it is about to write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import h5py
import numpy as np

from common.cli import UserError
from common.data.layout import (
    DAMAGE,
    DATA_ATTRS,
    DEMO_ATTRS,
    JSON_KEYS,
    LAYOUT,
    OPTIONAL,
    TAG,
    as_text,
    base_name,
    demo_names,
    opened,
    picture_sizes,
    read_arrays,
    unreadable,
)

_LIFELONG_DEMOS = 50  # what LIBERO's scripts/check_dataset_integrity.py asks for


def check_file(path: str | os.PathLike, task=None, strict: bool = False) -> list[str]:
    """What is wrong with a demonstration file: one line a problem, naming the demonstration and dataset; [] if nothing.

    With `task` the file must be of that task: by the BDDL file's name and, if there is a task.model, the states' width.
    `strict` adds what LIBERO's own integrity check asks for: 50 demonstrations and the tag. Pixels are not decoded.
    """
    try:
        with opened(path) as file:
            return list(_file_problems(file, task, strict))
    except UserError as error:
        return [str(error)]
    except DAMAGE as error:
        return [unreadable(error)]


def require_sound(path: str | os.PathLike, task=None) -> None:
    """Raise UserError with the first problem that `check_file` finds, and their number."""
    if problems := check_file(path, task):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{path}: {problems[0]}{more}; `python -m common.data FILE --strict` lists all, `--repair OUT` mends what can be")


def state_width(task) -> int | None:
    """1+nq+nv of the task's model; None if it has none."""
    model = getattr(task, "model", None)
    return None if model is None else 1 + model.nq + model.nv


def _file_problems(file: h5py.File, task, strict: bool) -> Iterator[str]:
    data = file.get("data")
    names = demo_names(data) if isinstance(data, h5py.Group) else []
    if not names:
        yield "foreign layout: no demonstrations data/demo_0, data/demo_1, ... as LIBERO's and robomimic's files have"
        return
    yield from _data_attr_problems(data, task)
    for name in sorted(set(data) - set(names)):
        yield f"data/{name}: does not belong here, only demo_<number> does"
    width = state_width(task)
    total, shapes, first, sound = 0, None, None, []
    for name in names:
        try:
            arrays = read_arrays(data[name])
            success = bool(data[name].attrs.get("success", True))
            problems = [*array_problems(arrays, width, success), *_demo_attr_problems(data[name], arrays)]
        except DAMAGE as error:
            yield f"{name}: {unreadable(error)}"
            continue
        yield from (f"{name}/{problem}" for problem in problems)
        if arrays.get("actions") is not None:
            total += len(arrays["actions"])
        if not problems:
            sound.append({key: arrays[key] for key in ("states", "obs/joint_states", "obs/gripper_states")})
            width = arrays["states"].shape[1]
            if shapes is not None and picture_sizes(arrays) != shapes:
                yield f"{name}/obs: images {picture_sizes(arrays) or 'missing'}, but {shapes or 'none'} in {first}"
            elif shapes is None:
                shapes, first = picture_sizes(arrays), name
    if alignment(sound) == "before":
        yield "obs: of before each action, not after it, as the states tell"
    for key, found in (("num_demos", len(names)), ("total", total)):
        if key in data.attrs and not np.array_equal(data.attrs[key], found):
            yield f"data: attribute {key} says {data.attrs[key]}, but the file holds {found}"
    if strict and len(names) != _LIFELONG_DEMOS:
        yield f"data: {len(names)} demonstrations, LIBERO's integrity check wants {_LIFELONG_DEMOS}"
    if strict and as_text(data.attrs.get("tag")) != TAG:
        yield f"data: attribute tag is {as_text(data.attrs.get('tag'))!r}, LIBERO's integrity check wants {TAG!r}"


def alignment(episodes: Iterable[Mapping[str, np.ndarray]]) -> str | None:
    """Whether proprioception, and with it the pictures, is of "before" or "after" its action; None if that can't be told.

    The states, of before the action, hold the same joints: in LIBERO's models the arm's seven and the two fingers come first.
    """
    off: dict[str, list[np.ndarray]] = {"before": [], "after": []}  # how far the joints are from what either would have them be
    for arrays in episodes:
        joints = np.concatenate([arrays["obs/joint_states"], arrays["obs/gripper_states"]], axis=1)
        states = arrays["states"][:, 1:10]
        if states.shape[1] == 9:
            off["before"].append(np.abs(joints - states).max(1)[:-1])
            off["after"].append(np.abs(joints[:-1] - states[1:]).max(1))
    if not sum(map(len, off["before"])):
        return None
    before, after = (float(np.median(np.concatenate(rows))) for rows in off.values())
    return "before" if before < 0.5 * after else "after" if after < 0.5 * before else None


def _data_attr_problems(data: h5py.Group, task) -> Iterator[str]:
    yield from (f"data: attribute {key} is missing" for key in DATA_ATTRS if key not in data.attrs)
    for key, needed in JSON_KEYS.items():
        if key in data.attrs:
            try:
                content = json.loads(as_text(data.attrs[key]))
                missing = [name for name in needed if name not in content]
            except (ValueError, TypeError):
                yield f"data: attribute {key} is not the JSON it should be"
            else:
                yield from (f"data: attribute {key} has no {name}" for name in missing)
    convention = as_text(data.attrs.get("macros_image_convention", "opengl"))
    if convention not in ("opengl", "opencv"):
        yield f"data: attribute macros_image_convention is {convention!r}, expected 'opengl' or 'opencv'"
    if task is not None and "bddl_file_name" in data.attrs:
        found, wanted = base_name(data.attrs["bddl_file_name"]), base_name(task.bddl_file)
        if found != wanted:
            yield f"data: made for another task: {found}, not {wanted}"


def _demo_attr_problems(demo: h5py.Group, arrays: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"attribute {key} is missing" for key in DEMO_ATTRS if key not in demo.attrs)
    actions, states = arrays.get("actions"), arrays.get("states")
    samples, init_state = demo.attrs.get("num_samples"), demo.attrs.get("init_state")
    if actions is not None and samples is not None and not np.array_equal(samples, len(actions)):
        yield f"attribute num_samples says {samples}, but there are {len(actions)} actions"
    if states is not None and len(states):
        if init_state is not None and not np.array_equal(init_state, states[0], equal_nan=True):  # NaN: told elsewhere
            yield "attribute init_state is not states[0]"
        yield from final_state_problems(demo.attrs.get("final_state"), arrays)


def final_state_problems(final_state: np.ndarray | None, arrays: Mapping[str, Any]) -> Iterator[str]:
    if final_state is not None and np.shape(final_state) != arrays["states"].shape[1:]:
        yield f"final_state: shape {np.shape(final_state)}, expected {arrays['states'].shape[1:]} as a state's"
    elif final_state is not None and not np.isfinite(final_state).all():
        yield "final_state: NaN or infinite"


def array_problems(arrays: Mapping[str, Any], width: int | None, success: bool) -> Iterator[str]:
    """What is wrong with one episode's arrays (path below demo_<i> -> array, or HDF5 dataset for images).

    `width`: of a state, 1+nq+nv; None if any will do. Writer and checker share it: what is written passes.
    """
    if (steps := arrays.get("actions")) is not None and len(steps) == 0:
        yield "actions: no steps"
        return
    length = "T" if steps is None else len(steps)
    layout = {**LAYOUT, **{key: ((None, None, 3), "uint8") for key in arrays if key.endswith("_rgb")}}
    good = set()
    for key, (step_shape, dtype) in layout.items():
        array = arrays.get(key)
        if array is None:
            if key not in OPTIONAL:
                yield f"{key}: missing"
            continue
        expected = (length, *((width,) if key == "states" else step_shape))
        known = len(expected) == len(array.shape) and all(
            want in (None, "T", have) for want, have in zip(expected, array.shape, strict=True)
        )
        if not known:
            shape = ", ".join("any" if want is None else str(want) for want in expected)
            yield f"{key}: shape {array.shape}, expected ({shape}{' = 1+nq+nv' if key == 'states' and width else ''})"
        elif array.dtype != np.dtype(dtype):
            yield f"{key}: type {array.dtype}, expected {dtype}"
        elif dtype == "float64" and not np.isfinite(array).all():
            yield f"{key}: NaN or infinite at step {_first(~np.isfinite(array))}"
        else:
            good.add(key)
    if "actions" in good:
        actions = arrays["actions"]
        if (outside := np.abs(actions) > 1).any():
            yield f"actions: {actions[outside][0]:g} at step {_first(outside)} is outside [-1, 1]"
        elif (between := np.abs(actions[:, 6]) != 1).any():
            yield f"actions: gripper {actions[between, 6][0]:g} at step {_first(between)} is neither -1 nor 1"
    for key, last in (("rewards", success), ("dones", True)):
        if key in good and arrays[key][-1] != last:
            yield f"{key}: the last one is {arrays[key][-1]}, expected {int(last)}"


def _first(wrong: np.ndarray) -> int:
    return int(np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))[0])
