"""A coverage-guided fuzzer (atheris) on the HDF5 reader: what it reads is sound, or refused in one line that names the file.

    pip install atheris                                   # CPython 3.11 to 3.13 on Linux; nothing else needs it
    python -m benchmarks.fuzz --seconds 3600 --json fuzz.json

Bytes that the fuzzer makes up become one to four changes of a sound file: datasets of another type, shape, storage or content, taken away,
or led elsewhere by links; attributes; groups in a dataset's place; bytes overwritten or cut off. Lines reached in `common.data` lead it.
Each finding is kept once, by where it was raised, with the bytes that make it: --again FILE does them again.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import tyro

from common.cli import Count, UserError, check_ranges, run_command
from common.runs import Progress, versions, write_json

TASK = SimpleNamespace(
    name="open_the_middle_drawer_of_the_cabinet",
    suite="libero_goal",
    language="open the middle drawer of the cabinet",
    problem_name="libero_tabletop_manipulation",
    bddl_file="libero_goal/open_the_middle_drawer_of_the_cabinet.bddl",
    xml='<mujoco><joint name="a"/></mujoco>',
    model=SimpleNamespace(nq=12, nv=11),
)
NUMBERS = [0.0, -0.0, 1.0, -1.0, 1.5, 7.0, 1e300, -1e300, 5e-324, 1e-310, float("inf"), float("nan"), 2.0**63, -(2.0**31)]
TYPES = [
    "f8",
    "f4",
    "f2",
    "i8",
    "i4",
    "u8",
    "u1",
    "?",
    "c16",
    "S5",
    "V3",
    [("a", "f8"), ("b", "i4")],
    "vlen",
    "text",
    "ref",
    "enum",
    "array",
]
KEYS = ["actions", "states", "robot_states", "rewards", "dones", "obs"]
KEYS += [f"obs/{name}" for name in ("ee_pos", "ee_ori", "ee_quat", "ee_states", "gripper_states", "joint_states", "agentview_rgb")]
ATTRS = [
    "problem_info",
    "env_args",
    "bddl_file_name",
    "macros_image_convention",
    "num_demos",
    "total",
    "success",
    "final_state",
    "model_file",
]
ATTRS += ["num_samples", "init_state", "assets", "task", "bddl_text", "init_states", "pattern", "strategy", "init_state_index", "tag"]


@dataclasses.dataclass
class Args:
    """Fuzz the HDF5 reader."""

    seconds: Count = 3600
    """how long"""
    seed: int = 1
    """of the fuzzer"""
    json: Path | None = None
    """write what came of it here, every minute and in the end"""
    again: Path | None = None
    """do the findings in this file again instead"""


def sound(path: Path) -> bytes:
    """A file of two demonstrations, with pictures."""
    from common.data import Episode, write_episodes

    rng, episodes, steps = np.random.default_rng(0), [], 6
    for k in range(2):
        states = rng.normal(size=(steps + 1, 1 + TASK.model.nq + TASK.model.nv))
        quat = rng.normal(size=(steps, 4))
        quat /= np.linalg.norm(quat, axis=1, keepdims=True)
        angle = 2 * np.arccos(quat[:, 3:])
        proprio = {"ee_pos": rng.normal(size=(steps, 3)), "ee_ori": quat[:, :3] / np.sin(angle / 2) * angle, "ee_quat": quat}
        proprio |= {"gripper_states": states[1:, 8:10], "joint_states": states[1:, 1:8]}
        actions = np.append(rng.uniform(-1, 1, (steps, 6)), rng.choice([-1.0, 1.0], (steps, 1)), axis=1)
        pictures = {name: rng.integers(0, 256, (steps, 8, 6, 3), np.uint8) for name in ("agentview_rgb", "eye_in_hand_rgb")}
        attrs = {"pattern": k, "strategy": "a", "init_state": k}
        episodes.append(Episode(actions, states[:-1], proprio, pictures, True, attrs, states[-1]))
    write_episodes(path, episodes, TASK, {"script": "fuzz", "renderer": "warp", "assets": "x"})
    return path.read_bytes()


def change(file: h5py.File, data) -> None:
    """One change of an open file, by what the fuzzer's `data` (a FuzzedDataProvider) says."""
    group = file[data.PickValueInList(["data", "data/demo_0", "data/demo_0", "data/demo_1", "/"])]
    kind = data.ConsumeIntInRange(0, 9)
    if kind <= 1:
        name = data.PickValueInList(ATTRS) if data.ConsumeIntInRange(0, 7) else data.ConsumeUnicodeNoSurrogates(6) or "x"
        group.attrs.pop(name, None)
        if value := _value(data):
            group.attrs.create(name, **value)
        return
    name = data.PickValueInList(KEYS) if data.ConsumeIntInRange(0, 9) else data.PickValueInList(["demo_0", "demo_1", "demo_2", "mask", "x"])
    if group.name not in ("/data/demo_0", "/data/demo_1") and name in KEYS:
        group = file["data/demo_0"]
    old = group.get(name)
    if name in group:
        del group[name]
    if kind == 2:
        return
    if kind == 3:
        group.create_group(name).create_group(data.PickValueInList(["all", "train", "agentview_rgb", "0"]))
    elif kind == 4:
        target = data.PickValueInList([h5py.SoftLink("/nowhere"), h5py.SoftLink("/data"), h5py.ExternalLink("nofile", "/"), group, file])
        group[name] = target
    elif kind == 5 and isinstance(old, h5py.Dataset) and old.dtype.kind in "fiu":  # some numbers of it are others
        content = old[()]
        with np.errstate(all="ignore"):
            for _ in range(data.ConsumeIntInRange(1, 3)):
                if content.size:
                    content.flat[data.ConsumeIntInRange(0, content.size - 1)] = _number(data, content.dtype)
        group[name] = content
    elif kind == 6 and isinstance(old, h5py.Dataset) and old.ndim:  # stored otherwise, or said to be huge and never written
        shape = old.shape if data.ConsumeBool() else (2 ** data.ConsumeIntInRange(1, 50), *old.shape[1:])
        group.create_dataset(name, shape, old.dtype, chunks=True, maxshape=(None, *old.shape[1:]), compression="gzip")
    elif value := _value(data):
        if value["data"] is None:
            value.pop("data")
        group.create_dataset(name, **value)


def _number(data, dtype: np.dtype):
    number = data.PickValueInList(NUMBERS) if data.ConsumeBool() else data.ConsumeFloatInRange(-2, 2)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return int(min(max(number if number == number else 0, limits.min), limits.max - 1024 * (limits.max > 2**32)))
    return np.array(number).astype(dtype)


def _value(data) -> dict | None:
    """Arguments of `create_dataset` and `attrs.create`; None: nothing."""
    kind = data.ConsumeIntInRange(0, 4)
    if kind == 0:
        return None
    if kind == 1:
        text = data.ConsumeUnicodeNoSurrogates(30).replace("\0", "")
        return {"data": data.PickValueInList(['{"problem_name": 1}', "[]", "{}", "opencv", "null", "(define (problem x))", text, text])}
    if kind == 2:
        return {"data": h5py.Empty("f8")}
    name, shape = data.PickValueInList(TYPES), tuple(data.ConsumeIntListInRange(data.ConsumeIntInRange(0, 4), 0, 8))
    special = {"vlen": h5py.vlen_dtype(np.float64), "text": h5py.string_dtype(), "ref": h5py.ref_dtype}
    special |= {"enum": h5py.enum_dtype({"A": 1, "B": 2}), "array": np.dtype(("f8", (3,)))}
    dtype = special.get(name) if isinstance(name, str) and name in special else np.dtype(name)
    if dtype.kind in "fiu?c" and name not in special:
        content = np.zeros(shape, dtype)
        with np.errstate(all="ignore"):
            content[...] = _number(data, dtype) if dtype.kind in "fiu" else 1
        return {"data": content}
    return {"data": None, "shape": shape, "dtype": dtype}


def make(path: Path, content: bytes, data) -> None:
    """Write a changed file."""
    path.write_bytes(content)
    for _ in range(data.ConsumeIntInRange(1, 4)):
        if data.ConsumeIntInRange(0, 5) == 0 and (whole := bytearray(path.read_bytes())):
            at, new = data.ConsumeIntInRange(0, len(whole) - 1), data.ConsumeBytes(data.ConsumeIntInRange(0, 16))
            whole = whole[: at + len(new)] if data.ConsumeIntInRange(0, 3) == 0 else whole
            whole[at : at + len(new)] = new
            path.write_bytes(whole)
        else:
            try:
                with h5py.File(path, "r+") as file:
                    change(file, data)
            except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError):
                return  # of two changes the second isn't possible any more


def read(path: Path) -> str | None:
    """What is wrong with how a file is read: None, or where and what."""
    from common.data import check_file, read_attrs, read_episodes
    from common.data.vla import read_corpora

    task = SimpleNamespace(**vars(TASK))
    ways = {"read_episodes": lambda: read_episodes(path, task, images=True), "check_file": lambda: check_file(path, task)}
    ways |= {"read_attrs": lambda: read_attrs(path), "read_corpora": lambda: read_corpora([path])}
    for name, way in ways.items():
        try:
            found = way()
        except UserError as error:
            if "\n" in str(error) or str(path) not in str(error):
                return f"{name}: not one line about the file: {error}"
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "common" in Path(f.filename).parts]
            return f"{name}: {type(error).__name__}: {str(error)[:150]} at {Path(frames[-1].filename).name}:{frames[-1].lineno}"
        else:
            for e in found if name == "read_episodes" else ():
                numbers = (e.actions, e.states, *e.proprio.values())
                if not (len({len(x) for x in numbers}) == 1 and len(e.actions) > 1 and all(np.isfinite(x).all() for x in numbers)):
                    return f"{name}: an episode that is not sound"
                if np.abs(e.actions).max() > 1 or not set(e.actions[:, 6]) <= {-1.0, 1.0}:
                    return f"{name}: actions that are not commands"
    return None


def main() -> None:
    args = tyro.cli(Args)
    check_ranges(args)
    try:
        import atheris
    except ImportError as error:
        raise UserError(f"the fuzzer needs atheris ({error}); run: pip install atheris") from error
    with atheris.instrument_imports(include=["common.data"]):
        import common.data.vla  # noqa: F401
    import logging
    import warnings

    logging.disable()
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)) / "libero_goal"
    folder.mkdir()
    path = folder / f"{TASK.name}_demo.hdf5"
    content, found, count, progress, began = sound(path), {}, 0, Progress(60), time.monotonic()
    progress.stage("fuzz", args.seconds)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))  # a file of kilobytes must not ask for gigabytes

    def one(raw: bytes) -> None:
        nonlocal count
        count += 1
        make(path, content, atheris.FuzzedDataProvider(raw))
        if (wrong := read(path)) is not None:
            where = wrong.rpartition(" at ")[2]
            if where not in found:
                found[where] = {"what": wrong, "bytes": base64.b64encode(raw).decode()}
                progress.say(wrong)
                if args.json is not None:
                    write_json(args.json, result())
        now = int(time.monotonic() - began)
        if now > progress.done:
            progress.update(now - progress.done, f"{count} files, {len(found)} findings")
            if args.json is not None and now % 60 == 0:
                write_json(args.json, result())

    def result() -> dict:
        return {"seed": args.seed, "files": count, "seconds": time.monotonic() - began, "findings": found, "versions": versions()}

    if args.again is not None:
        for row in json.loads(args.again.read_text())["findings"].values():
            one(base64.b64decode(row["bytes"]))
        print("\n".join(row["what"] for row in found.values()) or "none is left")
        return
    options = [f"-max_total_time={args.seconds}", f"-seed={args.seed}", "-max_len=600", "-len_control=0", "-rss_limit_mb=0", "-verbosity=0"]

    def end() -> None:
        if args.json is not None:
            write_json(args.json, result())
        print(f"{count} files in {time.monotonic() - began:.0f} s: {len(found)} findings")
        print("\n".join(row["what"] for row in found.values()))
        shutil.rmtree(folder.parent)

    import atexit

    atexit.register(end)
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    run_command(main)
