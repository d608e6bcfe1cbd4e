"""LIBERO's 130 tasks, compiled once to a MuJoCo model plus the indices a simulation needs.

LIBERO and robosuite build a task's scene out of BDDL, meshes and Python classes in seconds. Everything that a simulation
needs afterwards is in the compiled `MjModel`, the parsed goal and the initial states, so `load_task` runs LIBERO once per
task in a process of its own (`common.libero.build`), and keeps the result in one file of the user's cache folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import mujoco
import numpy as np

from common.cli import UserError, atomic_path, cache_dir
from common.data import read_attrs
from common.libero import store
from common.libero.assets import asset_names, assets_like, find_assets
from common.suites import TaskFiles, find_task, keep_init_states, libero_root, max_steps

MUJOCO_FIRST, MUJOCO_END = (3, 3, 7), (5, 0, 0)


@dataclasses.dataclass(frozen=True)
class ObjectInfo:
    """A movable object or a fixture of a task."""

    name: str
    category: str
    fixture: bool
    body: int  # root body id
    joint_qpos: int | None  # address of a free joint's 7 numbers (position, quaternion wxyz), None for a fixture
    geoms: tuple[int, ...]  # geoms that count as contact with the object
    joints: tuple[int, ...]  # ids of its articulation joints


@dataclasses.dataclass(frozen=True)
class SiteInfo:
    """A region that goals refer to: a box-shaped site."""

    name: str
    site: int
    parent: str | None  # object or fixture that carries it; None for a region of the table or floor
    size: tuple[float, ...]  # half extents in metres
    joints: tuple[int, ...]  # ids of the joints that open or close it


@dataclasses.dataclass(frozen=True)
class Predicate:
    """One conjunct of the goal, with what is needed to evaluate it (LIBERO's `object_states`, `predicates`, `site_object`).

    `kind` is `contain` (in, site), `under` (on, site), `ontop` (on, object) or `joint` (open, close, turnon, turnoff).
    For `joint`, each joint position q is compared as `sign * q > sign * threshold` (`>=` if `inclusive`), and any or all must hold.
    """

    name: str
    args: tuple[str, ...]
    kind: str
    site: int = -1
    body: int = -1  # the object that must be in or on the target
    target_body: int = -1
    size: tuple[float, ...] = (0.0, 0.0, 0.0)
    contact: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # the two geom groups that must touch
    qpos: tuple[int, ...] = ()
    sign: float = 1.0
    threshold: float = 0.0
    inclusive: bool = False
    any: bool = False


@dataclasses.dataclass
class Task:
    """A compiled task. States are (time, qpos, qvel) rows of 1 + nq + nv float64, as LIBERO writes them."""

    suite: str
    index: int  # in LIBERO's suite; -1 for a task of one's own
    name: str
    language: str
    problem_name: str
    bddl_file: str
    bddl: str  # the text of that file
    xml: str
    assets: str  # which assets the model was built from: "libero" or "standin", with the fingerprint of what moves and collides
    image_assets: str  # the same with a fingerprint of what is only seen: which assets pictures show
    goal: list[Predicate]
    objects: dict[str, ObjectInfo]
    sites: dict[str, SiteInfo]
    of_interest: list[str]  # BDDL's obj_of_interest: objects, fixtures or regions
    eef_site: int  # the grip site, between the fingertips
    hand_body: int
    arm_qpos: list[int]
    arm_dof: list[int]
    arm_actuators: list[int]
    gripper_qpos: list[int]
    gripper_dof: list[int]
    gripper_actuators: list[int]
    initial_joints: list[float]  # the arm's reset pose (rad), toward which the null space is controlled
    model: mujoco.MjModel
    init_states: np.ndarray  # (50, 1 + nq + nv), official, for evaluation; of one's own: from its file (50 at most), else drawn
    train_states: np.ndarray  # (256, 1 + nq + nv), from LIBERO's placement distribution

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.name}"

    @property
    def max_steps(self) -> int:
        return max_steps(self.suite)


# ---------------------------------------------------------------------------------------------- which task, which assets


def find_human_demos(task: Task) -> Path | None:
    """LIBERO's human demonstrations of a task, if they are on disk: in $LIBERO_DATASETS, or where LIBERO downloads them to."""
    name = f"{task.name}_demo.hdf5"
    folders = [Path(f).expanduser() for f in [os.environ.get("LIBERO_DATASETS")] if f] + [libero_root().parent / "datasets"]
    candidates = [folder / suite / name for folder in folders for suite in (task.suite, "libero_100", ".")]
    return next((path for path in candidates if path.is_file()), None)


# ---------------------------------------------------------------------------------------------- loading through the cache


def require_mujoco() -> None:
    """Raise UserError for a MuJoCo that this code has not been made for (docs/versions.md)."""
    version = tuple(int(number) for number in re.findall(r"\d+", mujoco.__version__)[:3])
    if not MUJOCO_FIRST <= version < MUJOCO_END:
        first, end = (".".join(map(str, v)) for v in (MUJOCO_FIRST, MUJOCO_END))
        raise UserError(
            f"MuJoCo {mujoco.__version__} is installed, and {first} or later, before {end}, is needed; run: pip install -r requirements.txt"
        )


def cache_file(files: TaskFiles, folder: Path) -> Path:
    """Where a compiled task is kept: the key covers the task's files, the versions, the assets and the code that compiles it."""
    versions = [mujoco.__version__, *(importlib.metadata.version(p) for p in ("robosuite", "hf-libero", "bddl"))]
    sources = [Path(__file__).with_name(f"{name}.py") for name in ("tasks", "build", "original", "store")]
    digest = hashlib.sha256(repr((versions, asset_names(folder))).encode())
    # Of a task of one's own the init states are named after, or drawn from, what is in the BDDL file: its name has a digest.
    given = (files.bddl, files.init_states) if files.index >= 0 else (files.bddl,)
    for path in (*sources, *given):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    name = f"{files.index:02d}" if files.index >= 0 else files.name[-40:]
    return cache_dir() / "tasks" / f"{files.suite}-{name}-mujoco{mujoco.__version__}-{digest.hexdigest()[:12]}.npz"


def load_task(task_id: str, assets: str | None = None, made_on: str | None = None, file: object = "the file") -> Task:
    """Load a task, compiling it (some seconds) if the cache has no good copy.

    Args:
        task_id: LIBERO's (suite/index, suite/name, any part of a name that is unique), a BDDL file, or its id; see `find_task`.
        assets: LIBERO's asset folder, "libero" or "standin", see `find_assets`.
        made_on: the assets (`Task.assets`) of a file that the task is loaded for: without `assets`, assets of that kind are taken.
        file: what to call that file.

    Raises:
        UserError: unknown or ambiguous task, missing or broken assets, others than `made_on`, an unknown MuJoCo.
    """
    require_mujoco()
    task = _load(find_task(task_id), find_assets(assets_like(made_on, assets)))
    if made_on not in (None, "unknown", task.assets):
        raise UserError(f"{file} was made on assets {made_on}, and those here are {task.assets}; name its own with --assets")
    return task


def load_task_of(path: str | os.PathLike, assets: str | None = None) -> Task:
    """The task that a file in LIBERO's layout is of, on the assets that it was made on; see `load_task` for `assets`.

    Raises UserError, with the file's name, for a file that is missing or of another layout, and as `load_task`.
    """
    attrs = read_attrs(path)
    try:
        find_task(task_id := attrs["bddl_file_name"].removesuffix(".bddl"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return load_task(task_id, assets, attrs.get("assets"), path)


def _load(files: TaskFiles, folder: Path) -> Task:
    path = cache_file(files, folder)
    try:
        return _read_task(path)
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error, mujoco.FatalError) as error:
        if path.exists():
            logging.getLogger(__name__).warning("cache entry %s is damaged (%s): building it again", path.name, error)
    # A process of its own, because importing robosuite changes numpy's global generator and more.
    arguments = [sys.executable, "-m", "common.libero.build", "--task", files.id, "--assets", str(folder)]
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(arguments, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode != 0 or not path.exists():
        reason = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()[-1]
        raise UserError(f"{files.id} does not build from {folder}: {reason.removeprefix('error: ')}")
    task = _read_task(path)
    if files.index < 0:
        keep_init_states(files, task.init_states)
    return task


def _read_task(path: Path) -> Task:
    with np.load(path, allow_pickle=False) as file:  # a zip archive: every member carries a checksum
        meta = json.loads(file["meta"].tobytes())
        model = store.load({name: file[name] for name in ("size", "kept", "blocks")}, meta.pop("meshes"))
        arrays = {name: file[name] for name in ("init_states", "train_states")}
    tuples = lambda values: tuple(tuples(v) if isinstance(v, list) else v for v in values)  # noqa: E731
    read = lambda cls, row: cls(**{k: tuples(v) if isinstance(v, list) else v for k, v in row.items()})  # noqa: E731
    meta["goal"] = [read(Predicate, row) for row in meta["goal"]]
    meta["objects"] = {row["name"]: read(ObjectInfo, row) for row in meta["objects"]}
    meta["sites"] = {row["name"]: read(SiteInfo, row) for row in meta["sites"]}
    return Task(model=model, **meta, **arrays)


def write_task(path: Path, task: Task) -> None:
    rest, meshes = store.save(task.model)
    meta = {f.name: getattr(task, f.name) for f in dataclasses.fields(task) if f.name not in ("model", "init_states", "train_states")}
    meta["goal"] = [dataclasses.asdict(p) for p in task.goal]
    meta["objects"] = [dataclasses.asdict(o) for o in task.objects.values()]
    meta["sites"] = [dataclasses.asdict(s) for s in task.sites.values()]
    meta["meshes"] = meshes
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
            **rest,
            init_states=task.init_states,
            train_states=task.train_states,
        )
