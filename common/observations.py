"""Observations in pixels: pictures and proprioception of LIBERO's states, the environment that returns them, and batches of them.

The RL scripts see either states, (N, size) float32, or a gymnasium Dict of pictures and proprioception. `to_tensor`, `join` and
`obs_buffer` take both; what they return is indexed alike, so that an algorithm is written once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.vector import VectorEnv, VectorWrapper

from common.data import PROPRIO as STORED
from common.env import proprioception
from common.render import make_renderer
from common.tasks import Task

if TYPE_CHECKING:
    from common.warp_env import LiberoWarpEnv

PROPRIO = {name: STORED[name] for name in ("ee_pos", "ee_quat", "gripper_states")}  # m, xyzw, m


class PixelObservation:
    """What cameras and the robot's own sensors show of states: a function of the states alone.

    For each camera a picture (image_size, image_size, 3) uint8 under LIBERO's name (`agentview_rgb`, `eye_in_hand_rgb`), bottom row
    first as in LIBERO's HDF5 files; `proprio` (9,) float32, see PROPRIO. `space` is their gymnasium space.

    Raises UserError for what `common.render.make_renderer` refuses.
    """

    def __init__(self, task: Task, image_size: int, cameras: Sequence[str], renderer: str, device: str = "cpu"):
        self.task, self.data = task, mujoco.MjData(task.model)
        self.renderer = make_renderer(task.model, cameras, image_size, image_size, renderer, device=device)
        self.names = {camera: camera.removeprefix("robot0_") + "_rgb" for camera in cameras}
        picture = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        proprio = gym.spaces.Box(-np.inf, np.inf, (sum(PROPRIO.values()),), np.float32)
        self.bytes = 3 * len(cameras) * 3 * image_size**2  # of an environment's: as drawn, as turned, and those of the step before
        self.space = gym.spaces.Dict({name: picture for name in self.names.values()} | {"proprio": proprio})

    def __call__(self, states: np.ndarray) -> dict[str, np.ndarray]:
        """States (B, 1 + nq + nv) -> pictures (B, image_size, image_size, 3) and proprio (B, 9)."""
        qpos = states[:, 1 : 1 + self.task.model.nq]
        pictures = self.renderer.render(qpos)
        proprio = np.empty((len(states), sum(PROPRIO.values())), np.float32)
        for row, q in zip(proprio, qpos, strict=True):
            self.data.qpos[:] = q
            mujoco.mj_kinematics(self.task.model, self.data)
            sensed = proprioception(self.task, self.data)
            row[:] = np.concatenate([sensed[name] for name in PROPRIO])
        return {name: pictures[camera][:, ::-1].copy() for camera, name in self.names.items()} | {"proprio": proprio}

    def of_worlds(self, env: LiberoWarpEnv) -> dict[str, torch.Tensor]:
        """The same of a Warp environment's current states, as tensors that never leave its device."""
        pictures, sensed = self.renderer.render_worlds(env), env.sensed()
        proprio = torch.cat([sensed[name] for name in PROPRIO], dim=1)
        return {name: pictures[camera].flip(1) for camera, name in self.names.items()} | {"proprio": proprio}


class PixelEnv(VectorWrapper):
    """A LIBERO vector environment whose observations are `PixelObservation`'s; everything else is the wrapped environment's.

    Observations are numpy arrays; of an environment on Warp, torch tensors on its device (with the renderer "warp").
    `device`: the ray tracer's.
    """

    def __init__(self, env: VectorEnv, image_size: int, cameras: Sequence[str], renderer: str, device: str = "cpu"):
        super().__init__(env)
        self.pixels = PixelObservation(env.task, image_size, cameras, renderer, device)
        self.stays = hasattr(env, "poses") and renderer == "warp"  # on the device
        if self.stays:
            env.require_memory(env.num_envs * self.pixels.bytes, what="worlds' pictures")
        self.single_observation_space = self.pixels.space
        self.observation_space = gym.vector.utils.batch_space(self.pixels.space, env.num_envs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "env":
            raise AttributeError(name)
        return getattr(self.env, name)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        _, info = self.env.reset(seed=seed, options=options)
        return self.observations(), info

    def step(self, actions, active: np.ndarray | None = None):
        _, reward, terminated, truncated, info = self.env.step(actions, active)
        observations = self.observations()
        if "final_obs" in info:  # an autoreset has put the next episodes' states in the place of the last ones
            ended, states = (np.asarray(torch.as_tensor(info[name]).cpu()) for name in ("_final_obs", "final_states"))
            info["final_obs"] = copy.deepcopy(observations)
            for name, x in self.pixels(states[ended]).items():
                values = info["final_obs"][name]
                values[ended] = torch.as_tensor(x, device=values.device) if self.stays else x
        return observations, reward, terminated, truncated, info

    def observations(self) -> dict[str, np.ndarray] | dict[str, torch.Tensor]:
        """Pictures and proprioception of the current states, (num_envs, ...) each."""
        return self.pixels.of_worlds(self.env) if self.stays else self.pixels(self.env.get_state())


class TensorDict:
    """Tensors by name that share their first dimensions and are indexed together, as if they were one."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def __getitem__(self, at):
        return self.tensors[at] if isinstance(at, str) else TensorDict({name: x[at] for name, x in self.tensors.items()})

    def __setitem__(self, at, values: TensorDict) -> None:
        for name, x in self.tensors.items():
            x[at] = values[name]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def flatten(self, start: int, end: int) -> TensorDict:
        return TensorDict({name: x.flatten(start, end) for name, x in self.tensors.items()})


def to_tensor(obs: np.ndarray | dict[str, np.ndarray], device: torch.device | None = None) -> torch.Tensor | TensorDict:
    """Observations as an environment returns them -> tensors of the same shapes and types, on `device` (default CPU)."""
    if isinstance(obs, dict):
        return TensorDict({name: torch.as_tensor(x, device=device) for name, x in obs.items()})
    return torch.as_tensor(obs, device=device)


def join(obs: Sequence[np.ndarray] | Sequence[dict[str, np.ndarray]], device: torch.device | None = None) -> torch.Tensor | TensorDict:
    """Batches of observations, one after the other, as tensors on `device` (default CPU)."""
    if isinstance(obs[0], dict):
        return TensorDict({name: join([x[name] for x in obs], device) for name in obs[0]})
    return torch.as_tensor(np.concatenate(obs), device=device)


def obs_buffer(num_steps: int, obs: np.ndarray | dict[str, np.ndarray], device: torch.device | None = None) -> torch.Tensor | TensorDict:
    """Zeros on `device` in which `num_steps` batches of observations like `obs` find room, (num_steps, num_envs, ...)."""
    if isinstance(obs, dict):
        return TensorDict({name: obs_buffer(num_steps, x, device) for name, x in obs.items()})
    return torch.zeros((num_steps, *obs.shape), dtype=torch.as_tensor(obs).dtype, device=device)
