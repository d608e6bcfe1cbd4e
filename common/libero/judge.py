"""Whether an episode did its task, by LIBERO's own goal, for files that do not say so."""

from __future__ import annotations

from collections.abc import Sequence

import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode

from common.data import Episode
from common.libero.goals import predicate_holds
from common.libero.make import make_env
from common.libero.step import GRIPPER_SPEED, SUBSTEPS
from common.libero.tasks import Task


def goal_reached(task: Task, episodes: Sequence[Episode]) -> list[bool]:
    """For each episode, whether the goal holds in its last state, or is reached by the action that it ends with.

    The last state is the one before the last action, as files hold it, or the one after it, where that is known.
    """
    step = GRIPPER_SPEED * SUBSTEPS
    env, data = make_env(task, 1, autoreset_mode=AutoresetMode.DISABLED), mujoco.MjData(task.model)

    def holds(state: np.ndarray) -> bool:
        data.time, data.qpos[:], data.qvel[:] = state[0], state[1 : 1 + task.model.nq], state[1 + task.model.nq :]
        mujoco.mj_fwdPosition(task.model, data)
        return all(predicate_holds(p, data, task.model) for p in task.goal)

    def reached(episode: Episode) -> bool:
        if holds(episode.states[-1] if episode.final_state is None else episode.final_state):
            return True
        grip = 0.0  # what the gripper had been told
        for command in episode.actions[:-1, 6]:
            grip = min(1.0, max(-1.0, grip + step * command))
        env.set_state(episode.states[-1:], gripper=np.array([grip]))
        return bool(env.step(episode.actions[-1:])[2][0])

    verdicts = [reached(episode) for episode in episodes]
    env.close()
    return verdicts
