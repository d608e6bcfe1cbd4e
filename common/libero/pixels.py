"""Observations in pixels: pictures and proprioception of LIBERO's states, and the environment that returns them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.vector import VectorEnv

from common.data import PROPRIO as STORED
from common.libero.observation import proprioception
from common.libero.renderers import make_renderer
from common.libero.tasks import Task
from common.libero.wrappers import Wrapper

if TYPE_CHECKING:
    from common.libero.warp_env import LiberoWarpEnv

PROPRIO = {name: STORED[name] for name in ("ee_pos", "ee_quat", "gripper_states")}  # m, xyzw, m


class PixelObservation:
    """What cameras and the robot's own sensors show of states: a function of the states alone.

    For each camera a picture (image_size, image_size, 3) uint8 under LIBERO's name (`agentview_rgb`, `eye_in_hand_rgb`), bottom row
    first as in LIBERO's HDF5 files; `proprio` (9,) float32, see PROPRIO. `space` is their gymnasium space.

    Raises UserError for what `common.libero.renderers.make_renderer` refuses.
    """

    def __init__(self, task: Task, image_size: int, cameras: Sequence[str], renderer: str, device: str = "cpu"):
        self.task, self.data = task, mujoco.MjData(task.model)
        self.renderer = make_renderer(task.model, cameras, image_size, image_size, renderer, device=device)
        self.names = {camera: camera.removeprefix("robot0_") + "_rgb" for camera in cameras}
        picture = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        proprio = gym.spaces.Box(-np.inf, np.inf, (sum(PROPRIO.values()),), np.float32)
        self.bytes = 3 * len(cameras) * 3 * image_size**2  # of an environment's: as drawn, as turned, and those of the step before
        self.space = gym.spaces.Dict({name: picture for name in self.names.values()} | {"proprio": proprio})

    def __call__(self, states: np.ndarray, pictures: bool = True) -> dict[str, np.ndarray]:
        """States (B, 1 + nq + nv) -> pictures (B, image_size, image_size, 3), black ones without `pictures`, and proprio (B, 9)."""
        qpos = states[:, 1 : 1 + self.task.model.nq]
        shape = (len(states), self.renderer.height, self.renderer.width, 3)
        drawn = self.renderer.render(qpos) if pictures else dict.fromkeys(self.names, np.zeros(shape, np.uint8))
        proprio = np.empty((len(states), sum(PROPRIO.values())), np.float32)
        for row, q in zip(proprio, qpos, strict=True):
            self.data.qpos[:] = q
            mujoco.mj_kinematics(self.task.model, self.data)
            sensed = proprioception(self.task, self.data)
            row[:] = np.concatenate([sensed[name] for name in PROPRIO])
        return {name: drawn[camera][:, ::-1].copy() for camera, name in self.names.items()} | {"proprio": proprio}

    def of_worlds(self, env: LiberoWarpEnv) -> dict[str, torch.Tensor]:
        """The same of a Warp environment's current states, as tensors that never leave its device."""
        pictures, sensed = self.renderer.render_worlds(env), env.sensed()
        proprio = torch.cat([sensed[name] for name in PROPRIO], dim=1)
        return {name: pictures[camera].flip(1) for camera, name in self.names.items()} | {"proprio": proprio}


class PixelEnv(Wrapper):
    """A LIBERO vector environment whose observations are `PixelObservation`'s; everything else is the wrapped environment's.

    With `show_state` they also have its `state`, for a critic that may see what the policy may not.

    A picture of what has not changed since the last one (an environment that is idle, or was not reset) is not drawn again.

    Observations are numpy arrays; of an environment on Warp, torch tensors on its device (with the renderer "warp").
    `device`: the ray tracer's.
    """

    def __init__(
        self, env: VectorEnv, image_size: int, cameras: Sequence[str], renderer: str, device: str = "cpu", show_state: bool = False
    ):
        super().__init__(env)
        self.show_state = show_state
        self.pixels = PixelObservation(env.task, image_size, cameras, renderer, device)
        self.stays = hasattr(env, "poses") and renderer == "warp"  # on the device
        if self.stays:
            env.require_memory(env.num_envs * self.pixels.bytes, what="worlds' pictures")
        state = {"state": env.single_observation_space} if show_state else {}
        self.single_observation_space = gym.spaces.Dict(self.pixels.space.spaces | state)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, env.num_envs)
        self._drawn: np.ndarray | None = None  # (num_envs, 1 + nq + nv) the states that `_seen` shows, NaN where it shows none
        self._seen: dict[str, np.ndarray] = {}

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        _, info = self.env.reset(seed=seed, options=options)
        return self.observations(), info

    def step(self, actions, active: np.ndarray | None = None, draw: np.ndarray | None = None):
        """As the environment's. Environments (num_envs,) out of `draw` show black pictures, unless a new episode begins there; so do the
        last pictures of all episodes then. On Warp everything is drawn."""
        if self.stays:
            draw = None
        _, reward, terminated, truncated, info = self.env.step(actions, active)
        observations = self.observations(None if draw is None else draw | terminated | truncated)
        if "final_obs" in info:  # an autoreset has put the next episodes' states in the place of the last ones
            final_state = info["final_obs"]
            ended, states = (np.asarray(torch.as_tensor(info[name]).cpu()) for name in ("_final_obs", "final_states"))
            info["final_obs"] = copy.deepcopy(observations)
            for name, x in self.pixels(states[ended], pictures=draw is None).items():
                values = info["final_obs"][name]
                values[ended] = torch.as_tensor(x, device=values.device) if self.stays else x
            if self.show_state:
                info["final_obs"]["state"] = final_state
        return observations, reward, terminated, truncated, info

    def observations(self, draw: np.ndarray | None = None) -> dict[str, np.ndarray] | dict[str, torch.Tensor]:
        """Pictures (black out of `draw` (num_envs,), if given) and proprioception of the current states, (num_envs, ...) each."""
        seen = self.pixels.of_worlds(self.env) if self.stays else self._look(self.env.get_state(), draw)
        return seen | {"state": self.env.observations()} if self.show_state else seen

    def _look(self, states: np.ndarray, draw: np.ndarray | None) -> dict[str, np.ndarray]:
        if self._drawn is None:
            self._drawn, self._seen = np.full_like(states, np.nan), self.pixels(states, pictures=False)
        changed, draw = (states != self._drawn).any(1), np.ones(len(states), bool) if draw is None else draw
        for rows, pictures in ((changed & draw, True), (changed & ~draw, False)):
            for name, x in self.pixels(states[rows], pictures).items():
                self._seen[name][rows] = x
            self._drawn[rows] = states[rows] if pictures else np.nan
        return {name: x.copy() for name, x in self._seen.items()}
