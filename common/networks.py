"""Network pieces that the scripts share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from common.tensors import TensorDict


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


@functools.cache  # so that what is compiled is kept
def compiled(function: Callable, really: bool) -> Callable:
    """`function`, if `really` by torch.compile, its GPU work recorded as CUDA graphs: what it returns is good until it is called again."""
    return torch.compile(function, mode="reduce-overhead") if really else function


class Normalizer(nn.Module):
    """Standardises observations with fixed statistics, clipped to +-10; the statistics are part of the state dict.

    `size` numbers in and out: of states it is all the encoder that a policy needs.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def fit(self, x: np.ndarray | torch.Tensor, floor: float = 0.01) -> Normalizer:
        """`x` (N, size); `floor` keeps nearly constant inputs (under 1 cm or 0.01 rad) from being blown up."""
        x = np.asarray(x)
        self.mean.copy_(torch.as_tensor(x.mean(axis=0)))
        self.std.copy_(torch.as_tensor(np.maximum(x.std(axis=0), floor)))
        return self

    def augment(self, x: torch.Tensor, noise: float) -> torch.Tensor:
        """`x` (N, size) with Gaussian noise of `noise` standard deviations."""
        return x + noise * self.std * torch.randn_like(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.mean) / self.std).clamp(-10.0, 10.0)


# ---------------------------------------------------------------------------------------------- pixels


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016), with GroupNorm of 16 channels a group (Wu & He 2018)."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(channels // 16, channels), nn.GroupNorm(channels // 16, channels)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels:
            convolution = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.GroupNorm(channels // 16, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.shortcut(x) + self.norm2(self.conv2(h)))


class ResNet18(nn.Sequential):
    """The convolutions of ResNet-18 (He et al. 2016, table 1), (N, 3, H, W) -> (N, 512, ceil(H / 32), ceil(W / 32)).

    GroupNorm instead of BatchNorm: a picture's features must not depend on what else is in the batch, or the policy that is trained
    would not be the one that acted.
    """

    def __init__(self):
        layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.GroupNorm(4, 64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        for channels_in, channels in ((64, 64), (64, 128), (128, 256), (256, 512)):
            layers += [ResidualBlock(channels_in, channels, channels // channels_in), ResidualBlock(channels, channels, 1)]
        super().__init__(*layers)


class PixelEncoder(nn.Module):
    """ResNet-18 features of the third-person picture beside standardised proprioception (as in arXiv 2511.19528): (N, size).

    On CUDA the pictures are worked on in bfloat16.
    """

    FEATURES = 128
    PICTURES = 256  # at a time: without gradients, a whole rollout's activations would fill the memory

    def __init__(self, space: gym.spaces.Dict):
        super().__init__()
        height, width, _ = space["agentview_rgb"].shape
        (proprio,) = space["proprio"].shape
        cells = math.ceil(height / 32) * math.ceil(width / 32)
        self.resnet = ResNet18()
        # all cells, not their average, which would forget where things are
        self.project = nn.Sequential(nn.Flatten(), nn.Linear(512 * cells, self.FEATURES), nn.LayerNorm(self.FEATURES))
        self.normalizer = Normalizer(proprio)
        self.size = self.FEATURES + proprio

    def fit(self, obs: TensorDict) -> PixelEncoder:
        """Standardise proprioception by that of `obs`."""
        self.normalizer.fit(obs["proprio"])
        return self

    def augment(self, obs: TensorDict, noise: float) -> TensorDict:
        """`obs` with pictures shifted at random and proprioception with noise, see `Normalizer.augment`."""
        return TensorDict(random_shift(obs).tensors | {"proprio": self.normalizer.augment(obs["proprio"], noise)})

    def forward(self, obs: TensorDict) -> torch.Tensor:
        """`agentview_rgb` (N, H, W, 3) uint8 and `proprio` (N, 9) -> (N, size)."""
        pictures = obs["agentview_rgb"].split(self.PICTURES)
        with torch.autocast("cuda", torch.bfloat16, enabled=obs["proprio"].is_cuda):
            features = [self.project(self.resnet(p.permute(0, 3, 1, 2) / 127.5 - 1.0)) for p in pictures]
        return torch.cat([torch.cat(features).float(), self.normalizer(obs["proprio"])], dim=-1)


def make_obs_encoder(space: gym.Space) -> Normalizer | PixelEncoder:
    """What turns an environment's observations (its `single_observation_space`) into (N, encoder.size) features.

    Its `fit` takes the statistics of demonstrations, its `augment` varies observations for behaviour cloning.
    """
    return PixelEncoder(space) if isinstance(space, gym.spaces.Dict) else Normalizer(space.shape[0])


def random_shift(obs: torch.Tensor | TensorDict, pad: int = 4) -> torch.Tensor | TensorDict:
    """Each picture of a batch moved by up to `pad` pixels either way, its edge repeated (DrQ; Kostrikov et al. 2021, section 3.1).

    Pictures are the entries (N, H, W, 3) of a TensorDict whose names end in _rgb; everything else, and states, stay as they are.
    """
    if not isinstance(obs, TensorDict):
        return obs
    shifted = dict(obs.tensors)
    for name in (name for name in shifted if name.endswith("_rgb")):
        pictures = shifted[name]
        (number, height, width, _), on = pictures.shape, {"device": pictures.device}
        down, right = torch.randint(-pad, pad + 1, (2, number, 1), **on)
        rows = (torch.arange(height, **on) - down).clamp(0, height - 1)  # (N, H) where each row comes from
        columns = (torch.arange(width, **on) - right).clamp(0, width - 1)
        shifted[name] = pictures[torch.arange(number, **on)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return TensorDict(shifted)
