"""Network pieces that the scripts share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

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


def bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16: GPUs do, and CPUs with AMX or AVX512-BF16."""
    cpu = torch.cpu.get_capabilities()
    return device.type == "cuda" or bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))


def autocast(device: torch.device, precision: str = "auto") -> torch.autocast:
    """Matrix products and convolutions in bfloat16, where the hardware multiplies it and `precision` isn't "float32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "auto" and bfloat16(device))


class Normalizer(nn.Module):
    """Standardises observations with fixed statistics, clipped to +-10; the statistics are part of the state dict.

    `size` numbers in and out: of states it is all the encoder that a policy needs.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = self.critic_size = size
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

    def look(self, obs: torch.Tensor, rows: np.ndarray | None = None) -> torch.Tensor:
        """What training keeps of observations: all. (`rows` are for an encoder that works on them here.)"""
        return obs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.mean) / self.std).clamp(-10.0, 10.0)

    def critic_view(self, obs: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
        """What the critic sees, (N, critic_size): the same."""
        return self(obs) if features is None else features


class NearField(Normalizer):
    """A `Normalizer` for which what is near counts in detail.

    Of relative positions, the columns `near` (three to a vector, m), it also shows tanh(x / `scale`) beside the standardised: standardised
    by how far apart things are in a task, the last centimetre before a grasp is a tenth of what a network sees, and it smooths over it.
    And noise on them falls with distance: there, noise of a tenth of the standard deviation is as wide as the grasp.
    """

    def __init__(self, size: int, near: Sequence[int], scale: float):
        super().__init__(size)
        self.near, self.scale = list(near), scale
        self.size = self.critic_size = size + len(self.near)

    def augment(self, x: torch.Tensor, noise: float) -> torch.Tensor:
        """`x` (N, size) with Gaussian noise of `noise` standard deviations, on relative positions at most `noise` (1 cm + distance / 5)"""
        std = self.std.repeat(len(x), 1)
        distance = x[:, self.near].unflatten(1, (-1, 3)).norm(dim=-1).repeat_interleave(3, dim=1)
        std[:, self.near] = torch.minimum(std[:, self.near], 0.01 + 0.2 * distance)
        return x + noise * std * torch.randn_like(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([super().forward(x), torch.tanh(x[..., self.near] / self.scale)], dim=-1)


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


class SmallConvNet(nn.Sequential):
    """Four convolutions that a CPU can train, (N, 3, H, W) -> (N, 32, ceil(H / 8), ceil(W / 8)).

    Asked where things are (`StateEstimator`), all its cells tell it two to three times as closely as a spatial softmax of them does.
    """

    def __init__(self):
        layers: list[nn.Module] = []
        for channels_in, channels, size, stride in ((3, 32, 5, 2), (32, 64, 3, 2), (64, 64, 3, 2), (64, 32, 3, 1)):
            layers += [nn.Conv2d(channels_in, channels, size, stride, size // 2), nn.ReLU()]
        super().__init__(*layers)


# What turns pictures into features, and the side of the pictures, in pixels, where --image-size doesn't say
CONVOLUTIONS = {"small": (SmallConvNet, 64), "resnet18": (ResNet18, 84)}


class PixelEncoder(nn.Module):
    """Features of each camera's picture beside standardised proprioception (as in arXiv 2511.19528): (N, size).

    `net` is "resnet18", the papers' convolutions, or "small". All cells of the last map are kept, not their average, which would forget
    where things are. Each camera has convolutions of its own. Convolutions are in bfloat16 where the hardware multiplies it.
    """

    FEATURES = 128  # of each picture
    PICTURES = 256  # at a time: without gradients, a whole rollout's activations would fill the memory

    def __init__(self, space: gym.spaces.Dict, net: str = "resnet18"):
        super().__init__()
        self.cameras = [name for name in space if name.endswith("_rgb")]
        (proprio,) = space["proprio"].shape
        convolutions, _ = CONVOLUTIONS[net]
        self.pictures = nn.ModuleDict()
        for name in self.cameras:
            height, width, _ = space[name].shape
            body = convolutions().to(memory_format=torch.channels_last)  # as the pictures are stored, and faster on CPUs
            with torch.no_grad():
                cells = body(torch.zeros(1, 3, height, width)).numel()
            project = [nn.Flatten(), nn.Linear(cells, self.FEATURES), nn.LayerNorm(self.FEATURES)]
            self.pictures[name] = nn.Sequential(body, *project)
        self.normalizer = Normalizer(proprio)
        self.size = self.FEATURES * len(self.cameras) + proprio
        # what the critic sees: the simulator's state (Pinto et al. 2018), where the environment shows it, else the policy's features
        self.state = Normalizer(space["state"].shape[0]) if "state" in space.spaces else None
        self.critic_size = self.state.size if self.state else self.size

    def fit(self, obs: TensorDict) -> PixelEncoder:
        """Standardise proprioception, and the state that a critic sees, by those of `obs`."""
        self.normalizer.fit(obs["proprio"])
        if self.state:
            self.state.fit(obs["state"])
        return self

    def augment(self, obs: TensorDict, noise: float) -> TensorDict:
        """`obs` with pictures shifted at random and proprioception with noise, see `Normalizer.augment`."""
        return TensorDict(random_shift(obs).tensors | {"proprio": self.normalizer.augment(obs["proprio"], noise)})

    def look(self, obs: TensorDict, rows: np.ndarray | None = None) -> TensorDict:
        """What training keeps of observations (N, ...): all. (`rows` are for an encoder that works on them here.)"""
        return obs

    def forward(self, obs: TensorDict) -> torch.Tensor:
        """Pictures (N, H, W, 3) uint8 and `proprio` (N, 9) -> (N, size)."""
        features = []
        for name, net in self.pictures.items():
            with autocast(obs[name].device):
                cells = torch.cat([net[0](p.permute(0, 3, 1, 2) / 127.5 - 1.0) for p in obs[name].split(self.PICTURES)])
            features.append(net[1:](cells.float()))
        return torch.cat([*features, self.normalizer(obs["proprio"])], dim=-1)

    def critic_view(self, obs: TensorDict, features: torch.Tensor | None = None) -> torch.Tensor:
        """What the critic sees, (N, critic_size). The policy's `features` (of `obs`, if they aren't known) are read and not trained."""
        if self.state:
            return self.state(obs["state"])
        if features is None:
            with torch.no_grad():
                return self(obs)
        return features.detach()


def make_obs_encoder(
    space: gym.Space, net: str = "resnet18", near: Sequence[int] = (), near_field: float = 0.0
) -> Normalizer | PixelEncoder:
    """What turns an environment's observations (its `single_observation_space`) into (N, encoder.size) features; pictures by `net`, of
    states the columns `near` also in detail within `near_field` of 0 (0: without).

    Its `fit` takes the statistics of demonstrations, its `augment` varies observations for behaviour cloning, its `critic_view` is what
    V sees.
    """
    if isinstance(space, gym.spaces.Dict):
        return PixelEncoder(space, net)
    return NearField(space.shape[0], near, near_field) if near_field else Normalizer(space.shape[0])


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
