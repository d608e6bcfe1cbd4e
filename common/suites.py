"""Which tasks there are: LIBERO's five suites, read off its package without importing it."""

from __future__ import annotations

import functools
import importlib.util
import re
from difflib import get_close_matches
from pathlib import Path

from common.cli import UserError

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
# Step caps of published evaluations, without the no-op steps at the start (OpenVLA's, adopted by pi0 and others).
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
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
        raise UserError(f"unknown suite {suite!r} in task {task_id!r}; suites are {', '.join(SUITES)}")
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
    raise UserError(f"unknown task {task_id!r}" + (f"; the nearest are {listed}" if listed else "; see python -m common.libero"))


def expand(names: list[str]) -> list[str]:
    """Suites and task ids -> task ids suite/name."""
    found = []
    for name in names:
        if name in task_names():
            found += [f"{name}/{task}" for task in task_names()[name]]
        else:
            suite, index = resolve(name)
            found.append(f"{suite}/{task_names()[suite][index]}")
    return list(dict.fromkeys(found))


def instruction(suite: str, index: int) -> str:
    """What a task's BDDL file says is to be done, in lower case, as LIBERO's environment gives it."""
    text = (libero_root() / "bddl_files" / suite / f"{task_names()[suite][index]}.bddl").read_text()
    return " ".join(re.search(r"\(:language\s+([^)]*)\)", text)[1].lower().split())
