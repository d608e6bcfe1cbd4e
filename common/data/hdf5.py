"""Episodes on disk in LIBERO's HDF5 layout, which LIBERO's own loader and robomimic read: write, read, check, record.

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
`python -m common.data FILE ...` sums files up, or says what is wrong with them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
import tyro

from common.cli import UserError, atomic_path, run_command

PROPRIO = {"ee_pos": 3, "ee_ori": 3, "ee_quat": 4, "gripper_states": 2, "joint_states": 7}  # name -> numbers a step

# path below demo_<i> -> (shape of one step, type); None: the width of this task's states
_LAYOUT: dict[str, tuple[tuple[int | None, ...], str]] = {
    "actions": ((7,), "float64"),
    "states": ((None,), "float64"),
    "robot_states": ((9,), "float64"),
    "rewards": ((), "uint8"),
    "dones": ((), "uint8"),
    "obs/ee_states": ((6,), "float64"),
    **{f"obs/{name}": ((width,), "float64") for name, width in PROPRIO.items()},
}
_OPTIONAL = {"obs/ee_quat"}  # not in LIBERO's own files
_DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)  # what h5py raises on damaged bytes
_TAG = "libero-v1"
_GZIP = 4  # of pictures
_LIFELONG_DEMOS = 50  # what LIBERO's scripts/check_dataset_integrity.py asks for
_JSON_KEYS = {
    "env_args": ("env_name", "problem_name", "env_kwargs"),
    "problem_info": ("problem_name", "language_instruction"),
}
_DATA_ATTRS = (*_JSON_KEYS, "bddl_file_name", "env_name", "macros_image_convention", "num_demos", "total")
_DEMO_ATTRS = ("num_samples", "model_file", "init_state")
_DEFAULTS = {"pattern": -1, "strategy": "", "init_state": -1}  # of files without our attributes

# robosuite 1.4's OSC_POSE, as LIBERO records it in env_args.
_OSC_POSE = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150,
    "damping_ratio": 1,
    "impedance_mode": "fixed",
    "kp_limits": [0, 300],
    "damping_ratio_limits": [0, 10],
    "position_limits": None,
    "orientation_limits": None,
    "uncouple_pos_ori": True,
    "control_delta": True,
    "interpolation": None,
    "ramp_ratio": 0.2,
}


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


# -------------------------------------------------------------------------------------------------------------- writing


def write_episodes(path: str | os.PathLike, episodes: Iterable[Episode], task, attrs: Mapping[str, Any]) -> None:
    """Write episodes of one task to `path`, whole or not at all. A generator will do: they are written one by one.

    `task` has bddl_file, problem_name, language, name and xml. `attrs` (script, mujoco, assets, renderer, ...: numbers
    and strings) go beside LIBERO's own on `data`. A failed episode (success False) ends in reward 0 instead of 1.
    Raises UserError if there is no episode, or one does not fit the layout (NaN, actions outside [-1, 1], ...).
    """
    if clash := sorted(set(attrs) & {*_DATA_ATTRS, "tag", "task"}):
        raise ValueError(f"these attributes are LIBERO's own: {', '.join(clash)}")
    with _new_file(path) as file:
        data = file.create_group("data")
        count = total = 0
        width, image_shapes = _state_width(task), None
        for count, episode in enumerate(episodes, start=1):
            name = f"demo_{count - 1}"
            arrays = _arrays_of(episode)
            shapes = _image_shapes(arrays)
            problems = list(_array_problems(arrays, width, episode.success))
            problems += _final_state_problems(episode.final_state, arrays)
            if image_shapes not in (None, shapes):
                problems.append(f"images {shapes}, but {image_shapes} in demo_0")
            if problems:
                raise UserError(f"{path} is not written: {name}/{problems[0]}")
            width, image_shapes = arrays["states"].shape[1], shapes
            total += episode.length
            _write_demo(data.create_group(name), episode, arrays, task.xml)
        if not count:
            raise UserError(f"{path} is not written: there is no episode to write")
        height, width = next(iter((image_shapes or {}).values()), (128, 128))
        data.attrs.update(_libero_attrs(task, height, width))
        data.attrs.update({"num_demos": count, "total": total, "tag": _TAG, "task": task.name, **attrs})


def replace_images(
    path: str | os.PathLike, pictures: Callable[[Episode], Iterator[Mapping[str, np.ndarray]]], attrs: Mapping[str, Any]
) -> None:
    """Give every demonstration of a sound file (`require_sound`) pictures in place of any it has; the file is replaced whole or not at all.

    `pictures(episode)` yields those of the first n steps, of the next, ...: {"agentview_rgb": (n, H, W, 3) uint8, ...}, top row first.
    In memory are one episode's numbers and what was yielded last. `attrs` go beside those on `data`.
    """
    with _new_file(path) as file, _opened(path) as old, ThreadPoolExecutor() as pool:
        for name in old:
            if name != "data":  # robomimic's masks
                old.copy(name, file)
        data = file.create_group("data")
        data.attrs.update(old["data"].attrs)
        flip = _text(data.attrs["macros_image_convention"]) == "opengl"
        shape: tuple[int, ...] = ()
        for name in _demo_names(old["data"]):
            source, demo = old["data"][name], data.create_group(name)
            demo.attrs.update(source.attrs)
            obs = demo.create_group("obs")
            for key in source:
                if key != "obs":
                    source.copy(key, demo)
            for key in source["obs"]:
                if not key.endswith("_rgb"):
                    source["obs"].copy(key, obs)
            done, length = 0, len(source["actions"])
            for batch in pictures(_read_episode(source, images=False, flip=flip)):
                for key, frames in batch.items():
                    shape = frames.shape[1:]
                    if done == 0:
                        options = dict(chunks=(1, *shape), compression="gzip", compression_opts=_GZIP)
                        obs.create_dataset(key, (length, *shape), np.uint8, **options)
                    # HDF5 compresses on one core: it is handed finished chunks instead
                    packed = pool.map(lambda frame: zlib.compress(frame.tobytes(), _GZIP), frames[:, ::-1] if flip else frames)
                    for t, chunk in enumerate(packed, start=done):
                        obs[key].id.write_direct_chunk((t, 0, 0, 0), chunk)
                done += len(frames)
        env_args = json.loads(_text(data.attrs["env_args"]))
        env_args["env_kwargs"].update(camera_heights=shape[0], camera_widths=shape[1])
        data.attrs.update({"env_args": json.dumps(env_args), **attrs})


@contextlib.contextmanager
def _new_file(path: str | os.PathLike) -> Iterator[h5py.File]:
    """A new HDF5 file, which appears at `path` whole or not at all."""
    try:
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            yield file
    except (OSError, RuntimeError) as error:  # HDF5 reports a full disk without the file's name, and on closing in the text alone
        said = re.search(r"errno = (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else said and int(said[1])
        if number is None or getattr(error, "filename", None):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _arrays_of(episode: Episode) -> dict[str, np.ndarray]:
    """Path below demo_<i> -> array, of everything an episode becomes."""
    last = np.zeros(episode.length, np.uint8)
    last[-1:] = 1
    arrays = {
        "actions": episode.actions,
        "states": episode.states,
        "robot_states": episode.robot_states,
        **{f"obs/{name}": episode.proprio[name] for name in PROPRIO},
        "obs/ee_states": np.concatenate([episode.proprio["ee_pos"], episode.proprio["ee_ori"]], axis=-1),
    }
    arrays = {key: np.asarray(array, np.float64) for key, array in arrays.items()}
    for name, image in episode.images.items():
        if not name.endswith("_rgb"):
            raise ValueError(f"image {name!r}: names end in _rgb, as LIBERO's agentview_rgb and eye_in_hand_rgb")
        arrays[f"obs/{name}"] = np.asarray(image)[:, ::-1]  # "opengl": bottom row first
    return {**arrays, "rewards": last * np.uint8(episode.success), "dones": last}


def _write_demo(demo: h5py.Group, episode: Episode, arrays: Mapping[str, np.ndarray], xml: str) -> None:
    for key, array in arrays.items():
        if array.ndim == 4:  # pictures; one a chunk, for loaders draw single steps at random
            demo.create_dataset(key, data=array, chunks=(1, *array.shape[1:]), compression="gzip", compression_opts=_GZIP)
        else:
            demo.create_dataset(key, data=array)
    attrs = {key: value for key, value in episode.attrs.items() if value is not None}
    if "init_state" in attrs:  # LIBERO's attribute of this name is the state itself
        attrs["init_state_index"] = attrs.pop("init_state")
    if clash := sorted(set(attrs) & {*_DEMO_ATTRS, "final_state"}):
        raise ValueError(f"these attributes are written from the episode itself: {', '.join(clash)}")
    attrs["success"] = bool(episode.success)
    if episode.final_state is not None:
        attrs["final_state"] = np.asarray(episode.final_state, np.float64)
    demo.attrs.update(attrs)
    demo.attrs.update({"num_samples": episode.length, "model_file": xml, "init_state": arrays["states"][0]})


def _libero_attrs(task, height: int, width: int) -> dict[str, str]:
    """The text attributes on `data`. The BDDL path is kept from `bddl_files` on: the rest differs between machines."""
    bddl = "/".join(Path(task.bddl_file).parts[-3:])
    problem = task.problem_name.lower()
    env_name = "_".join(word.capitalize() for word in problem.split("_"))  # LIBERO's class, Libero_Floor_Manipulation
    env_kwargs = {
        "robots": ["Panda"],
        "controller_configs": _OSC_POSE,
        "bddl_file_name": bddl,
        "has_renderer": False,
        "has_offscreen_renderer": True,
        "ignore_done": True,
        "use_camera_obs": True,
        "camera_depths": False,
        "camera_names": ["robot0_eye_in_hand", "agentview"],
        "reward_shaping": True,
        "control_freq": 20,
        "camera_heights": height,
        "camera_widths": width,
        "camera_segmentations": None,
    }
    env_args = {"type": 1, "env_name": env_name, "problem_name": problem, "bddl_file": bddl, "env_kwargs": env_kwargs}
    problem_info = {"problem_name": problem, "domain_name": "robosuite", "language_instruction": task.language}
    return {
        "bddl_file_name": bddl,
        "env_args": json.dumps(env_args),
        "env_name": env_name,
        "problem_info": json.dumps(problem_info),
        "macros_image_convention": "opengl",
    }


# ------------------------------------------------------------------------------------------------------------- checking


def check_file(path: str | os.PathLike, task=None, strict: bool = False) -> list[str]:
    """What is wrong with a demonstration file: one line a problem, naming the demonstration and dataset; [] if nothing.

    With `task` the file must be of that task: by the BDDL file's name and, if there is a task.model, the states' width.
    `strict` adds what LIBERO's own integrity check asks for: 50 demonstrations and the tag. Pixels are not decoded.
    """
    try:
        with _opened(path) as file:
            return list(_file_problems(file, task, strict))
    except UserError as error:
        return [str(error)]
    except _DAMAGE as error:
        return [_damaged(error)]


def require_sound(path: str | os.PathLike, task=None) -> None:
    """Raise UserError with the first problem that `check_file` finds, and their number."""
    if problems := check_file(path, task):
        more = f" (and {len(problems) - 1} more; `python -m common.data` lists them)" if len(problems) > 1 else ""
        raise UserError(f"{path}: {problems[0]}{more}")


def _opened(path: str | os.PathLike) -> h5py.File:
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
        raise UserError(f"cannot be opened: {os.strerror(error.errno) if error.errno else error}") from None


def _damaged(error: Exception) -> str:
    return f"damaged, cannot be read ({' '.join(str(error).split())}); copy, download or write it again"


def _state_width(task) -> int | None:
    """1+nq+nv of the task's model; None if it has none."""
    model = getattr(task, "model", None)
    return None if model is None else 1 + model.nq + model.nv


def _file_problems(file: h5py.File, task, strict: bool) -> Iterator[str]:
    data = file.get("data")
    names = _demo_names(data) if isinstance(data, h5py.Group) else []
    if not names:
        yield "foreign layout: no demonstrations data/demo_0, data/demo_1, ... as LIBERO's and robomimic's files have"
        return
    yield from _data_attr_problems(data, task)
    for name in sorted(set(data) - set(names)):
        yield f"data/{name}: does not belong here, only demo_<number> does"
    width = _state_width(task)
    total, shapes, first = 0, None, None
    for name in names:
        try:
            arrays = _read_arrays(data[name])
            success = bool(data[name].attrs.get("success", True))
            problems = [*_array_problems(arrays, width, success), *_demo_attr_problems(data[name], arrays)]
        except _DAMAGE as error:
            yield f"{name}: {_damaged(error)}"
            continue
        yield from (f"{name}/{problem}" for problem in problems)
        if arrays.get("actions") is not None:
            total += len(arrays["actions"])
        if not problems:
            width = arrays["states"].shape[1]
            if shapes is not None and _image_shapes(arrays) != shapes:
                yield f"{name}/obs: images {_image_shapes(arrays) or 'missing'}, but {shapes or 'none'} in {first}"
            elif shapes is None:
                shapes, first = _image_shapes(arrays), name
    for key, found in (("num_demos", len(names)), ("total", total)):
        if key in data.attrs and not np.array_equal(data.attrs[key], found):
            yield f"data: attribute {key} says {data.attrs[key]}, but the file holds {found}"
    if strict and len(names) != _LIFELONG_DEMOS:
        yield f"data: {len(names)} demonstrations, LIBERO's integrity check wants {_LIFELONG_DEMOS}"
    if strict and _text(data.attrs.get("tag")) != _TAG:
        yield f"data: attribute tag is {_text(data.attrs.get('tag'))!r}, LIBERO's integrity check wants {_TAG!r}"


def _data_attr_problems(data: h5py.Group, task) -> Iterator[str]:
    yield from (f"data: attribute {key} is missing" for key in _DATA_ATTRS if key not in data.attrs)
    for key, needed in _JSON_KEYS.items():
        if key in data.attrs:
            try:
                content = json.loads(_text(data.attrs[key]))
                missing = [name for name in needed if name not in content]
            except (ValueError, TypeError):
                yield f"data: attribute {key} is not the JSON it should be"
            else:
                yield from (f"data: attribute {key} has no {name}" for name in missing)
    convention = _text(data.attrs.get("macros_image_convention", "opengl"))
    if convention not in ("opengl", "opencv"):
        yield f"data: attribute macros_image_convention is {convention!r}, expected 'opengl' or 'opencv'"
    if task is not None and "bddl_file_name" in data.attrs:
        found, wanted = _basename(data.attrs["bddl_file_name"]), _basename(task.bddl_file)
        if found != wanted:
            yield f"data: made for another task: {found}, not {wanted}"


def _demo_attr_problems(demo: h5py.Group, arrays: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"attribute {key} is missing" for key in _DEMO_ATTRS if key not in demo.attrs)
    actions, states = arrays.get("actions"), arrays.get("states")
    samples, init_state = demo.attrs.get("num_samples"), demo.attrs.get("init_state")
    if actions is not None and samples is not None and not np.array_equal(samples, len(actions)):
        yield f"attribute num_samples says {samples}, but there are {len(actions)} actions"
    if states is not None and len(states):
        if init_state is not None and not np.array_equal(init_state, states[0], equal_nan=True):  # NaN: told elsewhere
            yield "attribute init_state is not states[0]"
        yield from _final_state_problems(demo.attrs.get("final_state"), arrays)


def _final_state_problems(final_state: np.ndarray | None, arrays: Mapping[str, Any]) -> Iterator[str]:
    if final_state is not None and np.shape(final_state) != arrays["states"].shape[1:]:
        yield f"final_state: shape {np.shape(final_state)}, expected {arrays['states'].shape[1:]} as a state's"
    elif final_state is not None and not np.isfinite(final_state).all():
        yield "final_state: NaN or infinite"


def _array_problems(arrays: Mapping[str, Any], width: int | None, success: bool) -> Iterator[str]:
    """What is wrong with one episode's arrays (path below demo_<i> -> array, or HDF5 dataset for images).

    `width`: of a state, 1+nq+nv; None if any will do. Writer and checker share it: what is written passes.
    """
    if (steps := arrays.get("actions")) is not None and len(steps) == 0:
        yield "actions: no steps"
        return
    length = "T" if steps is None else len(steps)
    layout = {**_LAYOUT, **{key: ((None, None, 3), "uint8") for key in arrays if key.endswith("_rgb")}}
    good = set()
    for key, (step_shape, dtype) in layout.items():
        array = arrays.get(key)
        if array is None:
            if key not in _OPTIONAL:
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


def _image_shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {key.removeprefix("obs/"): array.shape[1:3] for key, array in sorted(arrays.items()) if key.endswith("_rgb")}


# -------------------------------------------------------------------------------------------------------------- reading


def read_episodes(path: str | os.PathLike, task=None, images: bool = False) -> list[Episode]:
    """Every episode of a file of ours or of LIBERO's published ones, by their numbers; with pictures if `images`.

    The file is checked first, with `task` against that task (`check_file`). What human files lack gets defaults:
    pattern and init_state -1, strategy "", success True, ee_quat from ee_ori, final_state None.
    Raises UserError with the first problem and their number.
    """
    require_sound(path, task)
    with _opened(path) as file:
        data = file["data"]
        flip = _text(data.attrs["macros_image_convention"]) == "opengl"
        try:
            return [_read_episode(data[name], images, flip) for name in _demo_names(data)]
        except _DAMAGE as error:
            raise UserError(f"{path}: {_damaged(error)}") from None


def read_attrs(path: str | os.PathLike) -> dict[str, Any]:
    """The attributes on `data` as Python values: LIBERO's (JSON parsed, bddl_file_name without its folder) and ours.

    Raises UserError if the file can't be opened or has no such group.
    """
    try:
        with _opened(path) as file:
            if "data" not in file:
                raise UserError("foreign layout: no group data")
            attrs = {key: _python(value) for key, value in file["data"].attrs.items()}
            for key in _JSON_KEYS.keys() & attrs.keys():
                attrs[key] = json.loads(attrs[key])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except _DAMAGE as error:
        raise UserError(f"{path}: {_damaged(error)}") from None
    if "bddl_file_name" in attrs:
        attrs["bddl_file_name"] = _basename(attrs["bddl_file_name"])
    return attrs


def image_names(path: str | os.PathLike) -> list[str]:
    """The names of a sound file's pictures (agentview_rgb, ...), [] if it has none."""
    with _opened(path) as file:
        return sorted(name for name in file["data"][_demo_names(file["data"])[0]]["obs"] if name.endswith("_rgb"))


def _read_episode(demo: h5py.Group, images: bool, flip: bool) -> Episode:
    proprio = {name: demo[f"obs/{name}"][()] for name in PROPRIO if f"obs/{name}" in demo}
    if "ee_quat" not in proprio:
        proprio["ee_quat"] = _axis_angle_to_quat(proprio["ee_ori"])
    pictures = {}
    for name in demo["obs"] if images else ():
        if name.endswith("_rgb"):
            frames = demo[f"obs/{name}"][()]
            pictures[name] = np.ascontiguousarray(frames[:, ::-1]) if flip else frames
    attrs = {key: _python(value) for key, value in demo.attrs.items() if key not in _DEMO_ATTRS}
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


def _read_arrays(demo: h5py.Group) -> dict[str, Any]:
    """Path below demo_<i> -> array; images stay on disk."""
    arrays: dict[str, Any] = {key: demo[key][()] for key in _LAYOUT if isinstance(demo.get(key), h5py.Dataset)}
    arrays = {key: array for key, array in arrays.items() if np.ndim(array)}
    obs = demo.get("obs")
    names = [name for name in obs if name.endswith("_rgb")] if isinstance(obs, h5py.Group) else []
    return {**arrays, **{f"obs/{name}": obs[name] for name in names}}


def _demo_names(data: h5py.Group) -> list[str]:
    names = [name for name in data if name.startswith("demo_") and name[5:].isdecimal()]
    return sorted((name for name in names if isinstance(data[name], h5py.Group)), key=lambda name: int(name[5:]))


def _axis_angle_to_quat(axis_angle: np.ndarray) -> np.ndarray:
    """(T, 3) -> (T, 4) xyzw; undoes robosuite's quat2axisangle, whose angle is 2 acos(w) in [0, 2 pi]."""
    half = np.linalg.norm(axis_angle, axis=-1, keepdims=True) / 2
    return np.concatenate([axis_angle * 0.5 * np.sinc(half / np.pi), np.cos(half)], axis=-1)  # sinc(x/pi) = sin(x)/x


def _python(value: Any) -> Any:
    """An attribute as h5py returns it -> bool, int, float, str or array."""
    if isinstance(value, np.generic):
        value = value.item()
    return _text(value)


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _basename(path: str | bytes) -> str:
    """LIBERO's published files hold paths of the machines they were recorded on: only the file's name counts."""
    return PurePosixPath(str(_text(path)).replace("\\", "/")).name


# ------------------------------------------------------------------------------------------------------------ recording


class Recorder:
    """Cuts the steps of a vector environment into episodes.

        recorder = Recorder(env)
        recorder.before()
        obs, reward, terminated, truncated, info = env.step(actions)
        for i, episode in recorder.after(actions, terminated, truncated):
            episode.attrs.update(pattern=..., init_state=...)
        obs, info = env.reset(options={"reset_mask": terminated | truncated})

    The environment must leave finished episodes alone (AutoresetMode.DISABLED): what follows the last action is read
    from `env.get_state()` and `env.proprioception()`. An episode begins at the first `before` or at the one after a
    finished one; after resetting an unfinished one, make a new Recorder.
    """

    def __init__(self, env):
        mode = env.metadata.get("autoreset_mode")
        if getattr(mode, "value", mode) not in (None, "Disabled"):
            raise ValueError(f"Recorder needs AutoresetMode.DISABLED, the environment has {mode}")
        self.env = env
        self._steps: list[dict[str, np.ndarray]] = []  # every step since the oldest unfinished episode began
        self._starts = np.zeros(env.num_envs, int)  # where each unfinished episode begins in _steps

    def before(self) -> None:
        """Call before `env.step`."""
        self._steps.append({"states": np.array(self.env.get_state(), np.float64)})

    def after(self, actions: np.ndarray, terminated: np.ndarray, truncated: np.ndarray) -> list[tuple[int, Episode]]:
        """Call after `env.step` with its actions and flags; returns (environment, episode) for those that ended.

        Recorded is what the controller made of the actions: clipped to [-1, 1], of the gripper the sign (0 is open).
        An episode is a success if it terminated.
        """
        actions = np.clip(np.array(actions, np.float64), -1, 1)
        actions[:, 6] = np.where(actions[:, 6] == 0, -1, np.sign(actions[:, 6]))  # NaN stays, for the writer to refuse
        proprio = self.env.proprioception()
        self._steps[-1].update(actions=actions, **{name: np.array(proprio[name], np.float64) for name in PROPRIO})
        finished = np.flatnonzero(np.asarray(terminated) | np.asarray(truncated))
        if not len(finished):
            return []
        final_states = np.array(self.env.get_state(), np.float64)
        episodes = []
        for i in finished:
            steps = self._steps[self._starts[i] :]
            arrays = {name: np.array([step[name][i] for step in steps]) for name in steps[0]}
            episode = Episode(
                actions=arrays["actions"],
                states=arrays["states"],
                proprio={name: arrays[name] for name in PROPRIO},
                success=bool(terminated[i]),
                final_state=final_states[i],
            )
            episodes.append((int(i), episode))
        self._starts[finished] = len(self._steps)
        oldest = self._starts.min()
        del self._steps[:oldest]
        self._starts -= oldest
        return episodes


# -------------------------------------------------------------------------------------------------------------- command


def main(files: tyro.conf.Positional[list[Path]], strict: bool = False) -> None:
    """Sum up demonstration files and corpora, or list what is wrong with them.

    Args:
        files: HDF5 files in LIBERO's layout.
        strict: Also ask for what LIBERO's integrity check wants: 50 demonstrations a file and the tag.
    """
    if not files:
        raise UserError("no file given; name one or more HDF5 files")
    bad = 0
    for path in files:
        if problems := check_file(path, strict=strict):
            bad += 1
            print(*(f"{path}: {problem}" for problem in problems), sep="\n", file=sys.stderr)
        else:
            print(_summary(path))
    if bad:
        raise UserError(f"{bad} of {len(files)} files can't be used as they are; each problem is listed above")


def _summary(path: Path) -> str:
    attrs = read_attrs(path)
    episodes = read_episodes(path)
    with _opened(path) as file:
        shapes = _image_shapes(_read_arrays(next(iter(file["data"].values()))))
    lengths = [episode.length for episode in episodes]
    patterns = Counter(episode.attrs["pattern"] for episode in episodes)
    strategies = Counter(episode.attrs["strategy"] for episode in episodes)
    instruction = "".join(attrs["problem_info"]["language_instruction"]).strip('"')
    lines = {
        "task": f"{attrs['bddl_file_name'].removesuffix('.bddl')} ({instruction})",
        "episodes": f"{len(episodes)}, {sum(episode.success for episode in episodes)} successful",
        "steps": f"{sum(lengths)}, {min(lengths)} to {max(lengths)} an episode, {np.mean(lengths):.1f} on average",
        "patterns": ", ".join(f"{'unknown' if p == -1 else p}: {n}" for p, n in sorted(patterns.items())),
        "strategies": ", ".join(f"{s or 'unknown'}: {n}" for s, n in sorted(strategies.items())),
        "images": ", ".join(f"{name} {height}x{width}" for name, (height, width) in shapes.items()) or "none",
    }
    ours = {key: value for key, value in attrs.items() if key not in (*_DATA_ATTRS, "tag", "task")}
    return "\n".join([str(path), *(f"  {key:<10} {value}" for key, value in {**lines, **ours}.items())])


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
