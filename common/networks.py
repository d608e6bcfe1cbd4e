"""Network pieces that the scripts share."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def layer_init(layer: nn.Linear, std: float = float(np.sqrt(2)), bias: float = 0.0) -> nn.Linear:
    """Orthogonal weights of gain `std`, constant bias (the usual PPO initialisation; Andrychowicz et al. 2021)."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias)
    return layer


def mlp(sizes: list[int], out_std: float, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Fully connected layers of the given sizes; the last is linear, with orthogonal weights of gain `out_std`."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        last = i == len(sizes) - 2
        layers += [layer_init(nn.Linear(a, b), out_std)] if last else [layer_init(nn.Linear(a, b)), activation()]
    return nn.Sequential(*layers)


class Normalizer(nn.Module):
    """Standardises observations with fixed statistics, clipped to +-10; the statistics are part of the state dict."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def fit(self, x: np.ndarray, floor: float = 0.01) -> Normalizer:
        """`x` (N, size); `floor` keeps nearly constant inputs (under 1 cm or 0.01 rad) from being blown up."""
        self.mean.copy_(torch.as_tensor(x.mean(axis=0)))
        self.std.copy_(torch.as_tensor(np.maximum(x.std(axis=0), floor)))
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.mean) / self.std).clamp(-10.0, 10.0)
