"""Wrappers of LIBERO's vector environments that keep what these have beyond Gymnasium's interface; among them, next-step autoreset."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper


class Wrapper(VectorWrapper):
    """A wrapper that has all that the wrapped environment has beyond Gymnasium's interface, and its `step` with `active`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "env":
            raise AttributeError(name)
        return getattr(self.env, name)

    def step(self, actions, active: np.ndarray | None = None):
        return self.env.step(actions, active)


class NextStep(Wrapper):
    """Gymnasium's NEXT_STEP autoreset, around an environment without one (AutoresetMode.DISABLED).

    The step after an episode's last resets: its action is ignored, its observation is the next episode's first, its reward 0, and it ends
    nothing. That step's info has "state_index" (num_envs,), as `reset`'s has, and "_state_index", which environments began anew.
    """

    def __init__(self, env: VectorEnv):
        super().__init__(env)
        self.metadata = env.metadata | {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.autoreset_mode = AutoresetMode.NEXT_STEP
        self._ended = np.zeros(env.num_envs, bool)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self._ended[np.asarray((options or {}).get("reset_mask", True), bool)] = False
        return self.env.reset(seed=seed, options=options)

    def step(self, actions, active: np.ndarray | None = None):
        active = np.ones(self.num_envs, bool) if active is None else np.asarray(active, bool)
        again = self._ended & active
        obs, reward, terminated, truncated, info = self.env.step(actions, active & ~again)
        if again.any():
            obs, began = self.env.reset(options={"reset_mask": again})
            reward[again], terminated[again], truncated[again] = 0.0, False, False
            info = info | {"state_index": began["state_index"], "_state_index": again}
        self._ended = np.where(active, terminated | truncated, self._ended)
        return obs, reward, terminated, truncated, info

    def set_state(self, states: np.ndarray, gripper: np.ndarray | None = None, envs: np.ndarray | None = None) -> None:
        self.env.set_state(states, gripper, envs)
        self._ended[slice(None) if envs is None else envs] = False

    def snapshot(self) -> dict:
        return self.env.snapshot() | {"ended": self._ended.copy()}

    def restore(self, snapshot: dict) -> None:
        self.env.restore(snapshot)
        self._ended[:] = snapshot["ended"]
