"""LIBERO's tasks as Gymnasium knows environments: registered ids, one environment at a time, pictures of it, its next-step autoreset.

gym.make("libero/libero_goal-0-v0")                    # LiberoGymEnv
gym.make_vec("libero/libero_goal-0-v0", num_envs=8)    # a vector environment, by make_vector_env

Importing `common.libero` registers the ids; so this module imports nothing that simulates (docs/gymnasium.md).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from common.libero.wrappers import Wrapper
from common.suites import MAX_STEPS, NUM_TASKS, is_installed, task_names

if TYPE_CHECKING:
    from common.libero.tasks import Task

MODULE = "common.libero.gym_env"
CAMERA, PICTURE = "agentview", 256


def env_ids() -> dict[str, tuple[str, int]]:
    """Gymnasium ids -> (suite, index): every task by its index and, where LIBERO is installed, by its name."""
    ids = {f"libero/{suite}-{i}-v0": (suite, i) for suite, number in NUM_TASKS.items() for i in range(number)}
    if is_installed():
        ids |= {f"libero/{suite}-{name}-v0": (suite, i) for suite, names in task_names().items() for i, name in enumerate(names)}
    return ids


def register_tasks() -> None:
    """Register `env_ids` with Gymnasium. No task is compiled, nor LIBERO imported."""
    for name, (suite, index) in env_ids().items():
        gym.register(
            name,
            entry_point=f"{MODULE}:LiberoGymEnv",
            vector_entry_point=f"{MODULE}:make_vector_env",
            max_episode_steps=MAX_STEPS[suite],
            reward_threshold=1.0,
            kwargs={"task": f"{suite}/{index}"},
        )


class LiberoGymEnv(gym.Env):
    """One environment of a LIBERO task, whose end by time is Gymnasium's TimeLimit (`gym.make` adds it, with published step caps).

    Observations, actions and rewards are `common.libero.env.LiberoVectorEnv`'s. `reset` draws a training state, or starts from an official
    init state, `options={"init_state": index}`. info: "is_success" (bool) after a step, "state_index" after a reset.

    Args:
        task: a `Task` or a task id (see `common.suites.resolve`).
        render_mode: None or "rgb_array": `render` gives an upright picture (render_size, render_size, 3) uint8 of `render_camera`.
        render_renderer: "warp" (our ray tracer) or "gl", as in `common.libero.renderers`.
        kwargs: of `make_env` (obs, image_size, cameras, physics, settle_steps, ...).

    Raises UserError for what `make_env` refuses, and where pictures are asked for that this machine cannot make.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self,
        task: Task | str,
        render_mode: str | None = None,
        render_size: int = PICTURE,
        render_camera: str = CAMERA,
        render_renderer: str = "warp",
        **kwargs: Any,
    ):
        from common.libero.make import make_env

        options = dict(num_threads=1, max_steps=sys.maxsize, autoreset_mode=AutoresetMode.DISABLED)
        self.worlds = make_env(task, 1, **options, **kwargs)  # a vector environment of one
        self.task, self.obs_layout = self.worlds.task, self.worlds.obs_layout
        self.observation_space, self.action_space = self.worlds.single_observation_space, self.worlds.single_action_space
        self.render_mode = render_mode
        self._camera = _Camera(self.worlds, render_mode, render_size, render_camera, render_renderer)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.worlds.unwrapped.np_random = self.np_random
        chosen = {"init_state": options["init_state"]} if options and "init_state" in options else None
        obs, info = self.worlds.reset(options=chosen)
        return _first(obs), {"state_index": int(info["state_index"][0])}

    def step(self, action):
        obs, reward, terminated, _, _ = self.worlds.step(np.asarray(action)[None])
        return _first(obs), float(reward[0]), bool(terminated[0]), False, {"is_success": bool(terminated[0])}

    def render(self) -> np.ndarray | None:
        return None if self.render_mode is None else self._camera.pictures()[0]

    def close(self) -> None:
        self.worlds.close()


def make_vector_env(
    task: Task | str,
    num_envs: int = 1,
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    max_episode_steps: int | None = None,
    render_mode: str | None = None,
    render_size: int = PICTURE,
    render_camera: str = CAMERA,
    render_renderer: str = "warp",
    **kwargs: Any,
) -> VectorEnv:
    """What `gym.make_vec` makes: `make_env`'s environment, with Gymnasium's default autoreset and its names for things.

    Args as in `LiberoGymEnv`; and autoreset_mode: an AutoresetMode or its value, "NextStep", "SameStep" or "Disabled".
    """
    from common.libero.make import make_env

    env = make_env(task, num_envs, autoreset_mode=AutoresetMode(autoreset_mode), max_steps=max_episode_steps, **kwargs)
    return env if render_mode is None else Rendered(env, render_mode, render_size, render_camera, render_renderer)


def _first(obs: np.ndarray | dict[str, np.ndarray]) -> np.ndarray | dict[str, np.ndarray]:
    return {name: values[0] for name, values in obs.items()} if isinstance(obs, dict) else obs[0]


class _Camera:
    """Pictures of a vector environment's current states."""

    def __init__(self, env: VectorEnv, render_mode: str | None, size: int, camera: str, renderer: str):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode is None or 'rgb_array', not {render_mode!r}")
        self.env, self.camera = env, camera
        if render_mode is not None:  # now, so that what is missing is found at the start
            from common.libero.renderers import make_renderer

            self.renderer = make_renderer(env.task.model, (camera,), size, size, renderer)

    def pictures(self) -> np.ndarray:
        """(num_envs, size, size, 3) uint8, row 0 the top."""
        return self.renderer.render(self.env.get_state()[:, 1 : 1 + self.env.task.model.nq])[self.camera]


class Rendered(Wrapper):
    """A LIBERO vector environment that `render`s: a tuple of num_envs upright pictures (size, size, 3) uint8."""

    def __init__(
        self, env: VectorEnv, render_mode: str, render_size: int = PICTURE, render_camera: str = CAMERA, render_renderer: str = "warp"
    ):
        super().__init__(env)
        self._camera = _Camera(env, render_mode, render_size, render_camera, render_renderer)
        env.unwrapped.render_mode = render_mode
        self.metadata = env.metadata | {"render_modes": LiberoGymEnv.metadata["render_modes"]}

    def render(self) -> tuple[np.ndarray, ...]:
        return tuple(self._camera.pictures())
