"""LIBERO as a simulator, the only room that knows robosuite, BDDL and MuJoCo.

from common.libero import make_env

env = make_env("libero_goal/0", num_envs=8, seed=0)    # a gymnasium.vector.VectorEnv

Importing it registers the tasks with Gymnasium, too (`common.libero.gym_env`). What simulates is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from common.libero.gym_env import register_tasks

if TYPE_CHECKING:
    from common.libero.make import make_env
    from common.libero.tasks import Task, load_task

__all__ = ["Task", "load_task", "make_env"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("common.libero.make"), name)


register_tasks()
