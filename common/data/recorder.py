"""Cutting the steps of a vector environment into episodes."""

from __future__ import annotations

import numpy as np

from common.data.layout import PROPRIO, Episode


class Recorder:
    """Cuts the steps of a vector environment into episodes.

        recorder = Recorder(env)
        recorder.before()
        obs, reward, terminated, truncated, info = env.step(actions)
        for i, episode in recorder.after(actions, terminated, truncated):
            episode.attrs.update(pattern=..., init_state=...)
        obs, info = env.reset(options={"reset_mask": terminated | truncated})

    The environment must leave finished episodes alone (AutoresetMode.DISABLED): what follows the last action is read
    from `env.get_state()` and `env.proprioception()`. An episode begins at the first `before` or at the one after a
    finished one; after resetting an unfinished one, make a new Recorder.
    """

    def __init__(self, env):
        mode = env.metadata.get("autoreset_mode")
        if getattr(mode, "value", mode) not in (None, "Disabled"):
            raise ValueError(f"Recorder needs AutoresetMode.DISABLED, the environment has {mode}")
        self.env = env
        self._steps: list[dict[str, np.ndarray]] = []  # every step since the oldest unfinished episode began
        self._starts = np.zeros(env.num_envs, int)  # where each unfinished episode begins in _steps

    def before(self) -> None:
        """Call before `env.step`."""
        self._steps.append({"states": np.array(self.env.get_state(), np.float64)})

    def after(
        self, actions: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, active: np.ndarray | None = None
    ) -> list[tuple[int, Episode]]:
        """Call after `env.step` with its actions and flags; returns (environment, episode) for those that ended.

        Recorded is what the controller made of the actions: clipped to [-1, 1], of the gripper the sign (0 is open).
        An episode is a success if it terminated. What environments that are not `active` (num_envs,) do is in no episode.
        """
        actions = np.clip(np.array(actions, np.float64), -1, 1)
        actions[:, 6] = np.where(actions[:, 6] == 0, -1, np.sign(actions[:, 6]))  # NaN stays, for the writer to refuse
        proprio = self.env.proprioception()
        self._steps[-1].update(actions=actions, **{name: np.array(proprio[name], np.float64) for name in PROPRIO})
        finished = np.asarray(terminated) | np.asarray(truncated)
        idle = np.zeros(len(actions), bool) if active is None else ~np.asarray(active)
        final_states = np.array(self.env.get_state(), np.float64) if (finished & ~idle).any() else None
        episodes = []
        for i in np.flatnonzero(finished & ~idle):
            steps = self._steps[self._starts[i] :]
            arrays = {name: np.array([step[name][i] for step in steps]) for name in steps[0]}
            episode = Episode(
                actions=arrays["actions"],
                states=arrays["states"],
                proprio={name: arrays[name] for name in PROPRIO},
                success=bool(terminated[i]),
                final_state=final_states[i],
            )
            episodes.append((int(i), episode))
        self._starts[finished | idle] = len(self._steps)
        oldest = self._starts.min()
        del self._steps[:oldest]
        self._starts -= oldest
        return episodes
