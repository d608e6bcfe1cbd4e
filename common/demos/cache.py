"""Where what is found out about a task once is kept: strategies and demonstrations, in the user's cache folder."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import mujoco

from common import libero
from common.cli import cache_dir
from common.libero import Task


def cache_file(task: Task, kind: str, suffix: str, *details) -> Path:
    """Where something about a task is kept: the key covers the task and its BDDL, MuJoCo's version, the assets, the code and `details`."""
    key = hashlib.sha256(repr((mujoco.__version__, task.assets, task.bddl, _source(), details)).encode()).hexdigest()[:12]
    return cache_dir() / "demos" / f"{task.suite}-{task.index:02d}-{kind}-{key}.{suffix}"


@functools.cache
def _source() -> str:
    """A digest of the demonstrator's and the simulator's code: every file of the two folders, so that none can be forgotten."""
    folders = (Path(__file__).parent, Path(libero.__file__).parent)
    return hashlib.sha256(b"".join(path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py")))).hexdigest()
