"""LIBERO for `lerobot-eval`, in place of LeRobot's own environment: it observes and tells the same, and simulates and draws as we do.

lerobot-eval --policy.path=... --env.discover_packages_path=common.lerobot --env.type=fast_libero --env.task=libero_goal ...

LeRobot's contract, as of 0.4.4: `make_env(n_envs, use_async_envs, cfg)` -> {suite: {index: vector environment}}; observations "pixels"
(image, image2) and "robot_state"; info["final_info"]["is_success"]; `envs[i].task_description`; `call("_max_episode_steps")`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from common.cli import UserError
from common.libero import load_task
from common.libero import make_env as make_libero_env
from common.libero.renderers import make_renderer
from common.suites import MAX_STEPS, SUITES, instruction, resolve, task_names

CAMERAS = {"agentview": "image", "robot0_eye_in_hand": "image2"}
STEPS = MAX_STEPS | {"libero_spatial": 280}  # LeRobot's caps


def make_env(n_envs: int = 1, use_async_envs: bool = False, cfg: Any = None) -> dict[str, dict[int, gym.vector.VectorEnv]]:
    """{suite: {index: environments}} of the suites and tasks in `cfg.task`, with commas between them ("libero_goal", "libero_90/3").

    They run in threads whatever `use_async_envs` says. Of `cfg` (LeRobot's settings of its own environment; None: all as by default)
    these count: task, task_ids, episode_length, observation_height, init_states; and ours (`common.lerobot.plugin`): mirror, renderer,
    assets. Nothing is compiled before an environment is reset. Raises UserError for an unknown task.
    """

    def setting(name: str, default: Any) -> Any:
        value = getattr(cfg, name, None)
        return default if value is None else value

    found: dict[str, dict[int, gym.vector.VectorEnv]] = {}
    for name in setting("task", "libero_10").split(","):
        name = name.strip()
        indices = range(len(task_names()[name])) if name in SUITES else None
        chosen = [(name, i) for i in indices if i in setting("task_ids", indices)] if indices else [resolve(name)]
        for suite, index in chosen:
            found.setdefault(suite, {})[index] = Environments(
                suite,
                index,
                n_envs,
                size=setting("observation_height", 256),
                max_steps=setting("episode_length", STEPS[suite]),
                official=setting("init_states", True),
                mirror=setting("mirror", True),
                renderer=setting("renderer", "warp"),
                assets=setting("assets", None),
            )
    if not found:
        raise UserError(f"no task left of {setting('task', '')} with task_ids {list(setting('task_ids', []))}")
    return found


class Environments(gym.vector.SyncVectorEnv):
    """A LIBERO task as LeRobot sees it. A SyncVectorEnv by name alone, for of those `lerobot-eval` records videos.

    Episodes begin after ten no-ops from official init states, the next `num_envs` of the fifty at each reset, as LeRobot's; an
    environment whose episode has ended stands still, and costs nothing, until all are reset.

    Observations: pixels {image, image2} (n, size, size, 3) uint8, turned as robosuite's are, bottom row first (LeRobot turns them by 180
    degrees, so that its policies see them with left and right swapped; not `mirror`: they then see them as they are); robot_state {eef
    {pos, quat, mat}, gripper {qpos, qvel}, joints {pos, vel}} float64, m, rad and per second.
    """

    def __init__(
        self,
        suite: str,
        index: int,
        num_envs: int,
        size: int,
        max_steps: int,
        official: bool,
        mirror: bool,
        renderer: str,
        assets: str | None,
    ):
        self.suite, self.index, self.num_envs, self.size, self.max_steps = suite, index, num_envs, size, max_steps
        self.official, self.mirror, self.renderer, self.assets = official, mirror, renderer, assets
        self.metadata = {"render_fps": 20, "render_modes": ["rgb_array"], "autoreset_mode": AutoresetMode.DISABLED}
        self.render_mode, self.closed, self.worlds, self.resets = "rgb_array", False, None, 0
        self.task, self.task_description = task_names()[suite][index], instruction(suite, index)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (7,), np.float32)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.single_observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Dict({name: gym.spaces.Box(0, 255, (size, size, 3), np.uint8) for name in CAMERAS.values()}),
                "robot_state": gym.spaces.Dict(
                    {
                        "eef": gym.spaces.Dict({"pos": _unbounded(3), "quat": _unbounded(4), "mat": _unbounded(3, 3)}),
                        "gripper": gym.spaces.Dict({"qpos": _unbounded(2), "qvel": _unbounded(2)}),
                        "joints": gym.spaces.Dict({"pos": _unbounded(7), "vel": _unbounded(7)}),
                    }
                ),
            }
        )
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.envs = [
            SimpleNamespace(task=self.task, task_description=self.task_description, render=lambda i=i: self._render(i))
            for i in range(num_envs)
        ]

    def reset(self, *, seed: int | Sequence[int] | None = None, options: dict | None = None):
        if self.worlds is None:
            task = load_task(f"{self.suite}/{self.index}", self.assets)
            how = dict(settle_steps=10, max_steps=self.max_steps, autoreset_mode=AutoresetMode.DISABLED)
            self.worlds = make_libero_env(task, self.num_envs, **how)
            self.camera = make_renderer(task.model, tuple(CAMERAS), self.size, self.size, self.renderer)
            self.pictures = {name: np.zeros((self.num_envs, self.size, self.size, 3), np.uint8) for name in CAMERAS.values()}
        self.active = np.ones(self.num_envs, bool)
        states = (self.resets * self.num_envs + np.arange(self.num_envs)) % len(self.worlds.task.init_states)
        self.resets += 1
        seed = seed[0] if isinstance(seed, Sequence) else seed
        self.worlds.reset(seed=seed, options={"init_state": states} if self.official else None)
        return self._observe(), {"is_success": np.zeros(self.num_envs, bool)}

    def step(self, actions):
        moved = self.active
        _, _, terminated, truncated, _ = self.worlds.step(np.clip(np.asarray(actions, np.float64), -1, 1), moved)
        terminated, truncated = terminated & moved, truncated & moved
        ended = terminated | truncated
        self.active = moved & ~ended
        info: dict[str, Any] = {"is_success": terminated, "_is_success": moved}
        if ended.any():
            info |= {"final_info": {"is_success": terminated.copy(), "_is_success": ended}, "_final_info": ended}
        return self._observe(moved), terminated.astype(np.float64), terminated, truncated, info

    def _observe(self, moved: np.ndarray | None = None) -> dict[str, Any]:
        """What is seen now; of environments that have not `moved`, what was seen before."""
        task, state, robot = self.worlds.task, self.worlds.get_state(), self.worlds.proprioception()
        qpos, qvel = np.split(state[:, 1:], [task.model.nq], axis=1)
        rows = np.arange(self.num_envs) if moved is None else np.flatnonzero(moved)
        if len(rows):
            for camera, frames in self.camera.render(qpos[rows]).items():
                self.pictures[CAMERAS[camera]][rows] = frames[:, ::-1, :: 1 if self.mirror else -1]
        x, y, z, w = robot["ee_quat"].T
        columns = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
        eef = {"pos": robot["ee_pos"], "quat": robot["ee_quat"], "mat": np.moveaxis(np.array(columns), 2, 0)}
        gripper = {"qpos": robot["gripper_states"], "qvel": qvel[:, task.gripper_dof]}
        joints = {"pos": robot["joint_states"], "vel": qvel[:, task.arm_dof]}
        pixels = {name: frames.copy() for name, frames in self.pictures.items()}
        return {"pixels": pixels, "robot_state": {"eef": eef, "gripper": gripper, "joints": joints}}

    def _render(self, index: int) -> np.ndarray:
        return self.pictures["image"][index, ::-1, :: 1 if self.mirror else -1]

    def call(self, name: str, *args, **kwargs) -> tuple:
        """One value for each environment: `_max_episode_steps`, `task`, `task_description` or `render`."""
        values = {"_max_episode_steps": self.max_steps, "task": self.task, "task_description": self.task_description}
        return tuple(env.render() for env in self.envs) if name == "render" else (values[name],) * self.num_envs

    def close(self, **kwargs) -> None:
        if self.worlds is not None:
            self.worlds.close()
        self.worlds = self.camera = None
        self.closed = True


def _unbounded(*shape: int) -> gym.spaces.Box:
    return gym.spaces.Box(-np.inf, np.inf, shape, np.float64)
