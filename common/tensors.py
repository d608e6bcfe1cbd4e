"""Observations as tensors: arrays of states, or dicts of pictures and proprioception, indexed alike.

The RL scripts see either states, (N, size) float32, or a gymnasium Dict of pictures and proprioception. `to_tensor`, `join` and
`obs_buffer` take both; what they return is indexed alike, so that an algorithm is written once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


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


def obs_buffer(num_steps: int, obs: torch.Tensor | TensorDict) -> torch.Tensor | TensorDict:
    """Zeros in which `num_steps` batches of observations like `obs` find room, (num_steps, num_envs, ...)."""
    if isinstance(obs, TensorDict):
        return TensorDict({name: obs_buffer(num_steps, x) for name, x in obs.tensors.items()})
    return obs.new_zeros((num_steps, *obs.shape))
