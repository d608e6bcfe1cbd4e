"""LIBERO as a simulator, the only room that knows robosuite, BDDL and MuJoCo.

from common.libero import make_env

env = make_env("libero_goal/0", num_envs=8, seed=0)    # a gymnasium.vector.VectorEnv
"""

from common.libero.make import make_env
from common.libero.tasks import Task, load_task

__all__ = ["Task", "load_task", "make_env"]
