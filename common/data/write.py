"""Writing episodes to files in LIBERO's HDF5 layout, and giving a file other pictures: whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from common.cli import UserError, atomic_path
from common.data.check import array_problems, final_state_problems, state_width
from common.data.layout import DATA_ATTRS, DEMO_ATTRS, PROPRIO, TAG, Episode, as_text, demo_names, environment_fault, opened, picture_sizes
from common.data.read import read_episode
from common.data.understand import understand
from common.suites import task_attrs

_GZIP = 4  # of pictures
_ASSET_FOLDERS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "textures", "turbosquid_objects")
_FILE = re.compile(r'\bfile="([^"]*)"')
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


def write_episodes(path: str | os.PathLike, episodes: Iterable[Episode], task, attrs: Mapping[str, Any]) -> None:
    """Write episodes of one task to `path`, whole or not at all. A generator will do: they are written one by one.

    `task` has bddl_file, problem_name, language, name and xml; one of one's own is brought along (`common.suites.task_attrs`).
    `attrs` (script, mujoco, assets, renderer, ...: numbers and strings) go beside LIBERO's own on `data`. A failed episode (success
    False) ends in reward 0 instead of 1. An episode's attribute model_file, if it has one, is the XML of its own scene; else it is the
    task's.
    Raises UserError if there is no episode, or one does not fit the layout (NaN, actions outside [-1, 1], ...).
    """
    if clash := sorted(set(attrs) & {*DATA_ATTRS, "tag", "task"}):
        raise ValueError(f"these attributes are LIBERO's own: {', '.join(clash)}")
    with _new_file(path) as file:
        data = file.create_group("data")
        count = total = 0
        width, image_shapes = state_width(task), None
        for count, episode in enumerate(episodes, start=1):
            name = f"demo_{count - 1}"
            arrays = _arrays_of(episode)
            shapes = picture_sizes(arrays)
            problems = list(array_problems(arrays, width, episode.success))
            problems += final_state_problems(episode.final_state, arrays)
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
        data.attrs.update(_libero_attrs(task, height, width) | task_attrs(task))
        data.attrs.update({"num_demos": count, "total": total, "tag": TAG, "task": task.name, **attrs})


def replace_images(
    path: str | os.PathLike, pictures: Callable[[Episode], Iterator[Mapping[str, np.ndarray]]], attrs: Mapping[str, Any]
) -> None:
    """Give every demonstration of a sound file (`require_sound`) pictures in place of any it has; the file is replaced whole or not at all.

    `pictures(episode)` yields those of the first n steps, of the next, ...: {"agentview_rgb": (n, H, W, 3) uint8, ...}, top row first.
    In memory are one episode's numbers and what was yielded last. `attrs` go beside those on `data`.
    """
    with _new_file(path) as file, opened(path) as old, ThreadPoolExecutor() as pool:
        for name in old:
            if name != "data":  # robomimic's masks
                old.copy(name, file)
        data = file.create_group("data")
        data.attrs.update(old["data"].attrs)
        flip, source = as_text(data.attrs["macros_image_convention"]) == "opengl", understand(path)
        shape: tuple[int, ...] = ()
        for name in demo_names(old["data"]):
            before, demo = old["data"][name], data.create_group(name)
            demo.attrs.update(before.attrs)
            obs = demo.create_group("obs")
            for key in before:
                if key != "obs":
                    before.copy(key, demo)
            for key in before["obs"]:
                if not key.endswith("_rgb"):
                    before["obs"].copy(key, obs)
            done, length = 0, len(before["actions"])
            for batch in pictures(read_episode(before, source, images=False, success=True)):
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
        env_args = json.loads(as_text(data.attrs["env_args"]))
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
        if reason := environment_fault(error):
            raise UserError(f"{path} is not written: {reason}") from None
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
    xml = portable(attrs.pop("model_file", xml))
    if clash := sorted(set(attrs) & {*DEMO_ATTRS, "final_state"}):
        raise ValueError(f"these attributes are written from the episode itself: {', '.join(clash)}")
    attrs["success"] = bool(episode.success)
    if episode.final_state is not None:
        attrs["final_state"] = np.asarray(episode.final_state, np.float64)
    demo.attrs.update(attrs)
    demo.attrs.update({"num_samples": episode.length, "model_file": xml, "init_state": arrays["states"][0]})


def portable(xml: str) -> str:
    """A scene's XML whose files are named relative to where robosuite and LIBERO lie, instead of by paths of this machine.

    robosuite's as LIBERO's and robomimic's tools look for them, from the last robosuite/ on; the others, which share LIBERO's asset
    folder, as libero/libero/assets/...
    """
    files = {name: os.path.normpath(name).replace("\\", "/") for name in _FILE.findall(xml) if os.path.isabs(name)}
    own = {name: path for name, path in files.items() if "/robosuite/" not in path}
    root = Path(os.path.commonpath(map(os.path.dirname, own.values())) if own else "")
    root = next((root.parents[len(root.parts) - 1 - i] for i, part in enumerate(root.parts) if part in _ASSET_FOLDERS), root)

    def relative(match: re.Match) -> str:
        name = match[1]
        if name in own:
            return f'file="libero/libero/assets/{os.path.relpath(own[name], root)}"'
        return f'file="robosuite/{files[name].rpartition("/robosuite/")[2]}"' if name in files else match[0]

    return _FILE.sub(relative, xml)


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
