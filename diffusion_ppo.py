"""Behaviour cloning of a diffusion policy, then PPO over its denoising steps, as a data engine for VLAs.

The pipeline of "Beyond human demonstrations" (arXiv 2509.19752); its RL is DPPO (arXiv 2409.00588):

1. Learn: a denoiser of action chunks, conditioned on the state through FiLM, is cloned from successful demonstrations.
2. Reinforce: PPO on the sparse success reward. Denoising is an inner decision process: each step is a Gaussian whose log-probability
   is known, and all steps share the advantage of the chunk that they lead to.

Then it rolls the policy out and writes the successful trajectories in LIBERO's HDF5 layout.

    python diffusion_ppo.py                        # DPPO: every trained denoising step of every chunk
    python diffusion_ppo.py --train-steps one      # one random denoising step a chunk
    python diffusion_ppo.py --resume runs/RUN

docs/diffusion_ppo.md explains every metric and implementation detail.
"""

from __future__ import annotations

if __name__ == "__main__":
    import common.start  # noqa: F401  (Ctrl-C amid the imports below is one line)

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from torch import nn
from torch.distributions import Normal

from common import plots, rollout, view
from common.cli import Count, Fraction, NotNegative, Positive, PositiveOrInf, Range, UserError, run_command
from common.job import Job, JobArgs, Trainer
from common.libero.env import LiberoVectorEnv
from common.networks import Normalizer, PixelEncoder, compiled, layer_init, mlp, random_shift
from common.tensors import TensorDict, join, obs_buffer, to_tensor


@dataclasses.dataclass
class Args(JobArgs):
    """Clone demonstrations of a LIBERO task with a diffusion policy, improve it by PPO over denoising, and write a corpus."""

    # The policy
    denoiser: Literal["mlp", "unet"] = "mlp"
    """what predicts the noise: a residual MLP on the whole chunk, or a U-Net along it (--chunk must be even)"""
    denoising_steps: Count = 10
    """K, the noise levels that behaviour cloning trains"""
    ddim_steps: Count | None = None
    """sample through so many of the K levels (DDIM; default: all, which with --ddim-eta 1 is DDPM)"""
    ddim_eta: Fraction = 1.0
    """noise of the sampler: 1 is DDPM's, 0 none but the floor in the steps that PPO trains"""
    chunk: Count = 2
    """actions that are denoised together"""
    execute: Count = 2
    """actions of a chunk that are executed before the next is denoised (receding horizon)"""

    # Learn
    learn_epochs: Count = 150
    """at most so many epochs of behaviour cloning"""
    learn_patience: Annotated[int, Range(0)] = 15
    """stop after so many epochs without a better held-out loss"""
    learn_batch: Count = 512
    """transitions a gradient step of behaviour cloning"""
    learn_lr: Positive = 1e-3
    """learning rate of behaviour cloning"""
    learn_noise: NotNegative = 0.1
    """Gaussian noise on cloned observations, in units of their standard deviation: teaches the way back to the demonstrations"""
    hidden: Count = 256
    """width of the hidden layers"""
    ema_decay: Annotated[float, Range(0, below=1)] = 0.995
    """decay of the moving average of the weights, which is what behaviour cloning ends with"""

    # Reinforce
    total_steps: Count | None = None
    """environment steps of PPO (default: 3,600 times the mean length of demonstrations, 450,000 at least)"""
    num_steps: Count = 128
    """steps an environment takes between updates"""
    gamma: Fraction = 0.997
    """discount: success at step T is worth gamma^(T-1), so haste that fails more often must not pay"""
    gae_lambda: Fraction = 0.95
    """lambda of generalised advantage estimation"""
    actor_lr: Positive = 5e-5
    """learning rate of the policy"""
    anneal_lr: bool = False
    """let the policy's learning rate fall linearly to 0"""
    critic_lr: Positive = 1e-3
    """learning rate of the value function"""
    update_epochs: Count = 5
    """passes over each rollout"""
    num_minibatches: Count = 8
    """minibatches a pass"""
    finetune_steps: Count = 5
    """K', the last denoising steps, which PPO trains; those before keep the cloned weights"""
    train_steps: Literal["all", "one"] = "all"
    """which of these K' PPO trains in each chunk: all (DPPO), or one drawn at random (about 1/K' of the cost)"""
    gamma_denoise: Fraction = 0.99
    """discount of the advantage for each denoising step between a step and the clean chunk"""
    clip_coef: Positive = 0.04
    """PPO's clip range at the last denoising step; small, as log-probabilities are averaged over the noise's dimensions"""
    clip_coef_noisy: Positive = 0.02
    """and at the noisiest that is trained; it grows exponentially from there"""
    std_start: Annotated[float, Range(0.02, 1.5)] = 0.08
    """floor of a trained denoising step's standard deviation when Reinforce begins, in units of the action range"""
    std_end: Annotated[float, Range(0.02, 1.5)] = 0.04
    """and after two thirds of it (geometric schedule): evaluation and the corpus take the mean action, so training must come near it"""
    chunk_noise: Literal["shared", "independent"] = "shared"
    """exploration of a trained step: one offset for all actions of a chunk, or noise of its own for each (DPPO)"""
    start_noise: bool = False
    """also sample what PPO does not train, noise to start from and the steps before the last K' (DPPO), instead of their mean"""
    max_grad_norm: PositiveOrInf = 0.5
    """gradients are clipped to this norm"""
    kl_coef: NotNegative = 0.01
    """weight of KL(policy || Learn policy) in the loss, averaged likewise: it keeps noise in the updates from roughening the motion"""
    step_kl: PositiveOrInf = 0.1
    """updates of one rollout stop when the policy has moved so far (nats) from the one that acted"""
    critic_warmup: Annotated[int, Range(0)] = 5
    """iterations in which only the value function learns"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ddim_steps is not None and self.ddim_steps > self.denoising_steps:
            raise UserError(f"--ddim-steps {self.ddim_steps} is more than the {self.denoising_steps} levels of --denoising-steps")
        if self.finetune_steps > (steps := self.ddim_steps or self.denoising_steps):
            flag = "--ddim-steps" if self.ddim_steps else "--denoising-steps"
            raise UserError(f"--finetune-steps {self.finetune_steps} is more than the {steps} denoising steps of {flag}")
        if self.execute > self.chunk:
            raise UserError(f"--execute {self.execute} is more than the {self.chunk} actions of --chunk")
        if self.denoiser == "unet" and self.chunk % 2:
            raise UserError(f"--denoiser unet halves the chunk, so --chunk must be even, not {self.chunk}")
        if self.num_minibatches > (batch := -(-self.num_steps // self.execute) * self.num_envs):
            raise UserError(f"--num-minibatches {self.num_minibatches} is more than the {batch} chunks of --num-steps x --num-envs")


# ---------------------------------------------------------------------------------------------- diffusion


def cosine_alpha_bar(levels: int) -> torch.Tensor:
    """(K + 1,) float64: how much of a clean chunk's variance is left at noise level k = 0 (clean) .. K (noise).

    Cosine schedule (Nichol & Dhariwal 2021, eq. 17): x_k = sqrt(alpha_bar_k) x_0 + sqrt(1 - alpha_bar_k) eps.
    """
    f = torch.cos((torch.arange(levels + 1, dtype=torch.float64) / levels + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])


class Chain(nn.Module):
    """The sampler: S steps i = 0 (from pure noise) .. S - 1 (to the clean chunk), each a Gaussian N(mean, sigma_i^2).

    DDIM (Song et al. 2021, eq. 12 and 16) through S of K noise levels; with all K of them and eta = 1 it is DDPM (Ho et al. 2020,
    eq. 6 and 7). Either way the mean is a combination of the noisy chunk and of the clean one that the network predicts.
    """

    def __init__(self, levels: int, steps: int | None = None, eta: float = 1.0):
        super().__init__()
        at = torch.linspace(levels, 0, (steps or levels) + 1).round().long()
        alpha_bar = cosine_alpha_bar(levels)
        here, there = alpha_bar[at[:-1]], alpha_bar[at[1:]]
        sigma = eta * ((1 - there) / (1 - here) * (1 - here / there)).sqrt()
        from_noisy = ((1 - there - sigma**2).clamp(min=0) / (1 - here)).sqrt()
        self.register_buffer("level", at[:-1])
        for name, value in {
            "signal": here.sqrt(),  # x_k = signal x_0 + noise eps
            "noise": (1 - here).sqrt(),
            "sigma": sigma,
            "from_noisy": from_noisy,  # mean = from_clean x_0 + from_noisy x_k
            "from_clean": there.sqrt() - from_noisy * here.sqrt(),
        }.items():
            self.register_buffer(name, value.float())

    def __len__(self) -> int:
        return len(self.level)

    def mean(self, x: torch.Tensor, eps: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        """Mean of step i (...,) from x (..., D), whose noise the network says is eps (..., D). The clean chunk is clamped to [-1, 1]."""
        signal, noise, from_clean, from_noisy = (c[i][..., None] for c in (self.signal, self.noise, self.from_clean, self.from_noisy))
        return from_clean * ((x - noise * eps) / signal).clamp(-1, 1) + from_noisy * x


class MLPBody(nn.Module):
    """Residual MLP over the flat chunk, three hidden layers; FiLM (Perez et al. 2018) scales and shifts each before its activation."""

    LAYERS = 3

    def __init__(self, size: int, hidden: int):
        super().__init__()
        self.film_size = 2 * hidden * self.LAYERS
        self.first = layer_init(nn.Linear(size, hidden), 1.0)
        self.layers = nn.ModuleList(layer_init(nn.Linear(hidden, hidden), 1.0) for _ in range(self.LAYERS))
        self.last = layer_init(nn.Linear(hidden, size), 0.1)

    def forward(self, x: torch.Tensor, film: torch.Tensor) -> torch.Tensor:
        """x (..., size), film (..., film_size) -> (..., size)."""
        h = self.first(x)
        for layer, (scale, shift) in zip(self.layers, (f.chunk(2, -1) for f in film.chunk(self.LAYERS, -1)), strict=True):
            h = h + nn.functional.mish((1 + scale) * layer(h) + shift)
        return self.last(h)


class UNetBlock(nn.Module):
    """Two convolutions along the chunk, FiLM between them, and a shortcut (Chi et al. 2023)."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.film_size = 2 * channels
        self.first = nn.Sequential(nn.Conv1d(channels_in, channels, 3, padding=1), nn.GroupNorm(8, channels))
        self.second = nn.Sequential(nn.Conv1d(channels, channels, 3, padding=1), nn.GroupNorm(8, channels), nn.Mish())
        self.shortcut = nn.Conv1d(channels_in, channels, 1)

    def forward(self, x: torch.Tensor, film: torch.Tensor) -> torch.Tensor:
        """x (N, channels_in, T), film (N, film_size) -> (N, channels, T)."""
        scale, shift = film[..., None].chunk(2, 1)
        return self.shortcut(x) + self.second(nn.functional.mish((1 + scale) * self.first(x) + shift))


class UNetBody(nn.Module):
    """1-D U-Net along the chunk, 64 and 128 channels, halving it once; every block has FiLM."""

    def __init__(self, chunk: int, action_size: int, width: int = 64):
        super().__init__()
        self.shape = chunk, action_size
        self.down, self.low = UNetBlock(action_size, width), UNetBlock(width, 2 * width)
        self.middle, self.up = UNetBlock(2 * width, 2 * width), UNetBlock(2 * width, width)
        self.halve, self.widen = nn.Conv1d(width, width, 3, 2, 1), nn.ConvTranspose1d(2 * width, width, 2, 2)
        self.last = nn.Conv1d(width, action_size, 1)
        self.film_sizes = [block.film_size for block in (self.down, self.low, self.middle, self.up)]
        self.film_size = sum(self.film_sizes)

    def forward(self, x: torch.Tensor, film: torch.Tensor) -> torch.Tensor:
        """x (..., chunk x action_size), film (..., film_size) -> like x."""
        batch = x.shape[:-1]
        down, low, middle, up = film.expand(*batch, -1).flatten(0, -2).split(self.film_sizes, -1)
        skip = self.down(x.reshape(-1, *self.shape).transpose(1, 2), down)
        h = self.middle(self.low(self.halve(skip), low), middle)
        h = self.up(torch.cat([self.widen(h), skip], dim=1), up)
        return self.last(h).transpose(1, 2).reshape(*batch, -1)


class Denoiser(nn.Module):
    """eps_theta(x_k, k, s): the noise in a chunk. What the observation says is computed once a chunk, by `encode`."""

    def __init__(self, args: Args, obs_encoder: Normalizer | PixelEncoder, action_size: int):
        super().__init__()
        size, hidden = args.chunk * action_size, args.hidden
        self.obs_encoder = obs_encoder  # observations -> features (N, size)
        self.body = MLPBody(size, hidden) if args.denoiser == "mlp" else UNetBody(args.chunk, action_size)
        self.film = mlp([obs_encoder.size, hidden, hidden, self.body.film_size], out_std=0.3, activation=nn.Mish)
        self.time = nn.Linear(64, self.body.film_size)
        angles = torch.arange(args.denoising_steps + 1)[:, None] / args.denoising_steps * torch.logspace(0, 2, 32)
        self.register_buffer("waves", torch.cat([angles.sin(), angles.cos()], -1))  # of every level, (K + 1, 64)

    def encode(self, obs: torch.Tensor | TensorDict) -> torch.Tensor:
        """Observations (N, ...) -> (N, film_size), the observation's part of FiLM."""
        return self.film(self.obs_encoder(obs))

    def forward(self, x: torch.Tensor, level: torch.Tensor, film: torch.Tensor) -> torch.Tensor:
        """x (..., chunk x action_size), level k (...,), the observation's film (..., film_size) -> eps like x."""
        return self.body(x, film + nn.functional.embedding(level, self.time(self.waves)))


class Agent(nn.Module):
    """The diffusion policy and V(s). The gripper is an action dimension of which LIBERO takes the sign.

    `actor` takes the last K' denoising steps, and is what is trained; `base`, frozen, holds the Learn policy and takes the others.
    """

    def __init__(self, args: Args, obs_encoder: Normalizer | PixelEncoder, action_size: int = 7):
        super().__init__()
        self.shape = args.chunk, action_size
        self.register_buffer("alpha_bar", cosine_alpha_bar(args.denoising_steps).float())
        self.chain = Chain(args.denoising_steps, args.ddim_steps, args.ddim_eta)
        self.frozen_steps = len(self.chain) - args.finetune_steps
        self.sharing = args.chunk if args.chunk_noise == "shared" else 1  # actions that share PPO's noise
        self.start_noise = args.start_noise
        self.actor = Denoiser(args, obs_encoder, action_size)
        self.base = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = mlp([obs_encoder.critic_size, args.hidden, args.hidden, 1], out_std=1.0)

    @property
    def obs_encoder(self) -> Normalizer | PixelEncoder:
        return self.actor.obs_encoder

    @property
    def device(self) -> torch.device:
        return self.alpha_bar.device

    def value(self, obs: torch.Tensor | TensorDict) -> torch.Tensor:
        """V of observations (N, ...), (N,). It reads the actor's features and doesn't train them: that would move the policy."""
        return self.critic(self.obs_encoder.critic_view(obs)).squeeze(-1)

    def means(self, net: Denoiser, features: torch.Tensor, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        """Means of denoising steps i (N, S) from x (N, S, D) by `net`, (N, S, D), given the features (N, size) of its obs_encoder."""
        return self.chain.mean(x, net(x, self.chain.level[i], net.film(features)[:, None]), i)

    def stds(self, i: torch.Tensor, floor: float) -> torch.Tensor:
        """Standard deviation of trained denoising steps i, like i: the sampler's, but at least `floor`; to sample and to score alike."""
        return self.chain.sigma[i].clamp(min=floor)

    @torch.no_grad()
    def denoise(self, obs: torch.Tensor | TensorDict, floor: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Denoise a chunk for each observation (N, ...).

        `floor`: least standard deviation of the trained steps; None: no noise anywhere, and zero to start from (the mean of
        pure noise), so that the chunk is a function of the observation. Without `start_noise`, there is only that of the trained steps.

        Returns: the noisy chunks before and after each trained step, (N, K' + 1, D), the last one is what to execute; the
            means of the trained steps, (N, K', D).
        """
        size = self.shape[0] * self.shape[1]
        sampled = floor is not None and self.start_noise
        x = (torch.randn if sampled else torch.zeros)(len(obs), size, device=self.device)
        path, means = [], []
        for i in range(len(self.chain)):
            if i in (0, self.frozen_steps):  # the observation is encoded once by each of the two
                net = self.base if i < self.frozen_steps else self.actor
                film = net.encode(obs)
            step = torch.full((len(obs),), i, device=self.device)
            mean = self.chain.mean(x, net(x, self.chain.level[step], film), step)
            if i >= self.frozen_steps:
                path.append(x)
                means.append(mean)
            x = mean
            if i < self.frozen_steps and sampled:
                x = mean + self.chain.sigma[i] * torch.randn_like(mean)
            elif i >= self.frozen_steps and floor is not None:
                noise = torch.randn(len(obs), size // self.sharing, device=self.device).repeat(1, self.sharing)
                x = mean + self.stds(step, floor)[:, None] * noise
        return torch.stack([*path, x], 1), torch.stack(means, 1)


def log_prob(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, sharing: int = 1) -> torch.Tensor:
    """log N(x; mean, std^2) of denoising steps, x and mean (..., D), std (...,), averaged over D = chunk x action dimensions.

    DPPO's choice: ratios stay near 1 whatever the size of the chunk. It takes their D-th root, hence the small clip ranges.

    If so many actions are `sharing` their noise, the density is that of their common offset, over D / sharing dimensions. How the means
    of these actions differ from each other then has no density: PPO does not train it, and only the pull to the Learn policy holds it.
    """
    offset = (x - mean).unflatten(-1, (sharing, -1)).mean(-2)
    return Normal(torch.zeros_like(offset), std[..., None]).log_prob(offset).mean(-1)


class ChunkPolicy:
    """Receding-horizon control for `common.rollout`: the first `execute` actions of each chunk, denoised without noise."""

    def __init__(self, agent: Agent, num_envs: int, execute: int):
        self.agent, self.execute = agent, execute
        self.chunks = np.zeros((num_envs, *agent.shape), np.float32)
        self.used = np.full(num_envs, execute)  # actions of the present chunk that have been executed

    def begin(self, envs: np.ndarray) -> None:
        """New episodes have begun in `envs`: what is left of their chunks is void."""
        self.used[envs] = self.execute

    def __call__(self, obs: np.ndarray | dict, patterns: np.ndarray) -> np.ndarray:
        """The next action of each environment, (num_envs, 7) in [-1, 1]. `patterns`, which rollouts command, has no meaning here."""
        due = np.flatnonzero(self.used >= self.execute)
        if len(due):
            seen = self.agent.obs_encoder.look(to_tensor(obs, self.agent.device)[due])  # once for the denoiser and its frozen copy
            path, _ = self.agent.denoise(seen, floor=None)
            self.chunks[due] = path[:, -1].reshape(-1, *self.agent.shape).clamp(-1, 1).cpu().numpy()
            self.used[due] = 0
        actions = self.chunks[np.arange(len(self.used)), self.used]
        self.used += 1
        return actions


# ---------------------------------------------------------------------------------------------- Learn


def action_chunks(actions: np.ndarray, chunk: int) -> np.ndarray:
    """(T, A) actions -> (T, chunk x A), those from each step on; past the end the last action is repeated."""
    rows = np.minimum(np.arange(len(actions))[:, None] + np.arange(chunk), len(actions) - 1)
    return actions[rows].reshape(len(actions), -1).clip(-1, 1)


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) model, for every parameter."""
    for a, m in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(m, 1 - decay)


def denoising_loss(agent: Agent, net: Denoiser, obs, chunks: torch.Tensor, level: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the predicted noise (Ho et al. 2020, eq. 14): chunks (N, D), level k in 1..K (..., N), eps (..., N, D)."""
    kept = agent.alpha_bar[level][..., None]
    noisy = kept.sqrt() * chunks + (1 - kept).sqrt() * eps
    return (net(noisy, level, net.encode(obs)) - eps).square().mean()


def learn(args: Args, agent: Agent, demos: list[np.ndarray | dict], actions: list[np.ndarray], tick: Callable):
    """Behaviour cloning of chunks from demonstrations, observations (T_i, ...) and actions (T_i, A); `base` becomes `actor`.

    A tenth of the episodes is held out; kept are the moving average's weights of the best held-out loss, and training stops
    after `learn_patience` epochs without a better one. `tick(epoch, losses)` is called after each epoch.
    """
    torch.manual_seed(args.seed + 1)
    agent.obs_encoder.fit(join(demos))
    held_out = np.arange(len(demos)) < (max(1, len(demos) // 10) if len(demos) > 1 else 0)

    def tensors(mask):
        obs, chunks = zip(*[(o, action_chunks(a, args.chunk)) for o, a, m in zip(demos, actions, mask, strict=True) if m], strict=True)
        return join(obs, agent.device), join(chunks, agent.device).float()

    def noise(*shape):
        return torch.randint(1, args.denoising_steps + 1, shape[:-1], device=agent.device), torch.randn(shape, device=agent.device)

    obs, chunks = tensors(~held_out)
    test = tensors(held_out if held_out.any() else ~held_out)  # a single demonstration
    test += noise(8, *test[1].shape)  # the same for every epoch, so that epochs can be compared
    net, average = agent.actor, copy.deepcopy(agent.actor)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.learn_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.learn_epochs, eta_min=args.learn_lr / 20)
    best, best_loss, best_epoch, step = copy.deepcopy(average.state_dict()), math.inf, 0, 0
    for epoch in range(args.learn_epochs):
        losses, batches = [], torch.randperm(len(obs), device=agent.device).split(args.learn_batch)
        for batch in batches:
            augmented = net.obs_encoder.augment(obs[batch], args.learn_noise)
            loss = denoising_loss(agent, net, augmented, chunks[batch], *noise(*chunks[batch].shape))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            update_ema(average, net, min(args.ema_decay, (1 + step) / (10 + step)))  # its beginning, random weights, is soon forgotten
            losses.append(loss.detach())
        schedule.step()
        with torch.no_grad():
            test_loss = denoising_loss(agent, average, *test).item()
        total = sum(loss.item() * len(batch) for loss, batch in zip(losses, batches, strict=True))
        tick(epoch, {"learn/train_loss": total / len(obs), "learn/held_out_loss": test_loss})
        if test_loss < best_loss:
            best, best_loss, best_epoch = copy.deepcopy(average.state_dict()), test_loss, epoch
        elif epoch - best_epoch >= args.learn_patience:
            break
    agent.actor.load_state_dict(best)
    agent.base.load_state_dict(best)


# ---------------------------------------------------------------------------------------------- Reinforce


def gae(rewards, values, next_values, decided, terminated, done, gamma: float, lam: float) -> torch.Tensor:
    """Generalised advantage estimation (Schulman et al. 2016) over chunks, all arguments (num_steps, num_envs).

    A chunk begins where `decided` is 1 and lasts n steps, until the next one begins: `execute` of them, or fewer if the episode or
    the rollout ends within it. Then A = sum_j gamma^j r_j + gamma^n V' - V + (gamma lam)^n A', where V' is the value of the state that
    followed it and A' the next chunk's advantage: like gamma, lambda is of a control step. `next_values` are V of the state that followed
    each step, also where a time limit cut the episode: truncation bootstraps, termination doesn't. `done` is either; nothing flows back
    across it.

    Returns: (num_steps, num_envs) advantages; they mean something where `decided` is 1.
    """
    advantages, target, beyond, last = torch.zeros_like(rewards), *(torch.zeros_like(rewards[0]) for _ in range(3))
    for t in reversed(range(len(rewards))):
        ends = decided[t + 1] > 0 if t + 1 < len(rewards) else torch.ones_like(last, dtype=torch.bool)
        target = rewards[t] + gamma * torch.where(ends, next_values[t] * (1 - terminated[t]), target)
        beyond = gamma * lam * torch.where(ends, last * (1 - done[t]), beyond)
        advantages[t] = target + beyond - values[t]
        last = torch.where(decided[t] > 0, advantages[t], last)
    return advantages


def denoising_weights(args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """What PPO multiplies the advantage with and its clip range at each of the K' trained denoising steps, noisiest first; (K',) each.

    As in DPPO: gamma_denoise^(K'-1) .. 1, and a clip range that grows from clip_coef_noisy to clip_coef by (e^{3u} - 1) / (e^3 - 1),
    u = 0 .. 1. A single step is the last.
    """
    steps = args.finetune_steps
    u = torch.arange(steps) / (steps - 1) if steps > 1 else torch.ones(1)
    growth = torch.expm1(3 * u) / math.expm1(3)
    discounts = args.gamma_denoise ** torch.arange(steps - 1, -1, -1)
    return discounts, args.clip_coef_noisy + (args.clip_coef - args.clip_coef_noisy) * growth


def ppo_losses(args: Args, agent: Agent, weights: Sequence[torch.Tensor], batch: dict, train_actor: bool) -> dict[str, torch.Tensor]:
    """A minibatch's `value_loss`, and if `train_actor` also its `policy_loss` and, averaged like the log-probability, the KL to the
    policy that acted (`moved`) and to Learn's (`pull`). `weights`: `denoising_weights`, on the device."""
    row = {"value_loss": 0.5 * (agent.value(batch["states"]) - batch["returns"]).square().mean()}
    if train_actor:
        features = agent.actor.obs_encoder(batch["obs"])
        mean = agent.means(agent.actor, features, batch["x"], batch["step"])
        log_ratio = log_prob(batch["next_x"], mean, batch["std"], agent.sharing) - batch["log_probs"]
        ratio = log_ratio.exp()  # (minibatch, S)
        discount, clip = (w[batch["step"] - agent.frozen_steps] for w in weights)
        advantages = batch["advantages"][:, None] * discount
        clipped = torch.maximum(torch.minimum(ratio, 1 + clip), 1 - clip)
        row["policy_loss"] = -torch.min(advantages * ratio, advantages * clipped).mean()
        row["pull"] = ((mean - batch["learn_mean"]) / batch["std"][..., None]).square().mean() / 2
        with torch.no_grad():
            row |= {
                "moved": ((mean - batch["mean"]) / batch["std"][..., None]).square().mean() / 2,
                "approx_kl": ((ratio - 1) - log_ratio).mean(),
                "clipfrac": ((ratio - 1).abs() > clip).float().mean(),
                "ratio": ratio.mean(),
            }
    return row


def ppo_update(args: Args, agent: Agent, optimizer, batch: dict, train_actor: bool) -> dict[str, float]:
    """One PPO update (Schulman et al. 2017) over S denoising steps of M chunks, and of the critic over all N states of the rollout.

    `batch`: `states` (N, ...) and their `returns` (N,); obs (M, ...), advantages (M,); and of the denoising steps: their indices `step`,
    `log_probs` and `std` (M, S), the chunks before and after them, `x` and `next_x`, and their means by the policy that acted, `mean`,
    and by the Learn policy, `learn_mean` (M, S, D).

    The actor stops for this rollout when it has moved `step_kl` from the policy that acted. That is the KL of all trained steps of a
    chain, which is no less than that of the chunks it leads to, in nats per executed action; `kl_to_learn`, which is logged, likewise.
    """
    losses = compiled(ppo_losses, args.compile)
    logs: dict[str, list[torch.Tensor]] = {}  # read at the end: a GPU would be waited for
    weights = [x.to(agent.device) for x in denoising_weights(args)]
    # from such an average to the chain's KL per executed action
    nats = args.finetune_steps * math.prod(agent.shape) / agent.sharing / args.execute
    for _ in range(args.update_epochs):
        chunks, states = (
            torch.randperm(len(batch[name]), device=agent.device).tensor_split(args.num_minibatches) for name in ("obs", "states")
        )
        for rows, state_rows in zip(chunks, states, strict=True):
            chosen = {name: value[state_rows if name in ("states", "returns") else rows] for name, value in batch.items()}
            row = losses(args, agent, weights, chosen, train_actor)
            loss = row["value_loss"]
            if train_actor:
                pull = row.pop("pull")
                row["kl_to_learn"] = nats * pull.detach().double()
                train_actor = nats * row.pop("moved").item() <= args.step_kl  # the one time that a GPU is waited for
                if train_actor:
                    loss = loss + row["policy_loss"] + args.kl_coef * pull
            optimizer.zero_grad()
            loss.backward()
            if not train_actor:  # a compiled backward leaves zeros, and Adam would still move the policy
                agent.actor.zero_grad()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            for name, value in row.items():
                logs.setdefault(name, []).append(value.detach().clone())  # a CUDA graph writes to the same place again
    logs = {name: [float(value) for value in values] for name, values in logs.items()}
    return {name: float(np.mean(values)) for name, values in logs.items()} | {"updates": len(logs.get("policy_loss", []))}


class Reinforce(Trainer):
    """PPO over denoising, warm-started from Learn; can be stopped and continued exactly."""

    def __init__(self, args: Args, env: LiberoVectorEnv, agent: Agent):
        super().__init__(args, env, agent)
        self.optimizer = torch.optim.Adam(
            [
                {"params": agent.actor.parameters(), "lr": args.actor_lr},
                {"params": agent.critic.parameters(), "lr": args.critic_lr},
            ],
            eps=1e-5,
        )
        self.obs, _ = env.reset(seed=args.seed)

    def iterate(self) -> dict[str, float]:
        """Roll out `num_steps` steps in every environment, then update. Returns what to log.

        Every environment begins a chunk when the rollout begins, when `execute` actions of its last one are done, and when a new
        episode begins in it.
        """
        args, env, agent, device = self.args, self.env, self.agent, self.agent.device
        progress = self.iteration / self.num_iterations
        self.optimizer.param_groups[0]["lr"] = args.actor_lr * (1 - progress if args.anneal_lr else 1)
        fallen = min(1.0, 1.5 * progress)  # the last third of the steps is for what isn't done without noise yet
        floor = args.std_start ** (1 - fallen) * args.std_end**fallen
        shape, size = (args.num_steps, env.num_envs), agent.shape[0] * agent.shape[1]
        look = agent.obs_encoder.look  # of pictures, where an estimator reads them, its estimate is kept
        # where the critic sees the state, pictures are only drawn where the policy begins a chunk
        sparing = isinstance(self.obs, dict) and "state" in self.obs
        seen = look(to_tensor(self.obs, device))
        obs, next_obs = (obs_buffer(args.num_steps, seen) for _ in range(2))
        paths, means = (torch.zeros(*shape, args.finetune_steps + more, size, device=device) for more in (1, 0))
        decided, rewards, terminated, done = (torch.zeros(shape, device=device) for _ in range(4))
        chunks = np.zeros((env.num_envs, *agent.shape), np.float32)
        used = np.full(env.num_envs, args.execute)
        lengths, denoise, began = [], compiled(Agent.denoise, args.compile), time.perf_counter()
        with rollout.acting(env):
            for t in range(args.num_steps):
                obs[t] = random_shift(seen)  # pictures: the policy acts on the shifted one, so the ratio is of one picture
                due = np.flatnonzero(used >= args.execute)
                if len(due):
                    paths[t, due], means[t, due] = denoise(agent, obs[t, due], floor)
                    chunks[due] = paths[t, due, -1].reshape(-1, *agent.shape).clamp(-1, 1).cpu().numpy()
                    decided[t, due], used[due] = 1.0, 0
                begins = (used + 1 >= args.execute) | (t + 1 == args.num_steps)
                drawing = {"draw": begins} if sparing else {}
                self.obs, reward, term, trunc, info = env.step(chunks[np.arange(env.num_envs), used], **drawing)
                ended = term | trunc
                used = np.where(ended, args.execute, used + 1)
                next_obs[t] = seen = look(to_tensor(self.obs, device), np.flatnonzero(begins | ended) if sparing else None)
                if ended.any():
                    last = to_tensor(info["final_obs"], device)[ended]
                    next_obs[t, ended] = look(last, np.array([], int) if sparing else None)
                rewards[t], terminated[t], done[t] = (torch.as_tensor(x.astype(np.float32)) for x in (reward, term, ended))
                self.outcomes[0].extend(term[ended].astype(float))
                lengths += list(info["final_length"][ended]) if ended.any() else []
        rollout_seconds, began = time.perf_counter() - began, time.perf_counter()

        begun = decided > 0
        ends = torch.cat([begun[1:], torch.ones_like(begun[:1])])  # the last steps of chunks: no others need values
        values, next_values = torch.zeros_like(rewards), torch.zeros_like(rewards)
        with torch.no_grad():
            values[begun] = agent.value(obs[begun])
            next_values[ends] = agent.value(next_obs[ends])
        advantages = gae(rewards, values, next_values, decided, terminated, done, args.gamma, args.gae_lambda)
        states, all_returns = obs.flatten(0, 1), (advantages + values).flatten()  # within a chunk, too: what is left of it, then V'
        obs, advantages, values = obs[begun], advantages[begun], values[begun]
        returns = advantages + values
        if args.train_steps == "all":
            step = torch.arange(agent.frozen_steps, len(agent.chain), device=device).repeat(len(returns), 1)
        else:
            step = torch.randint(agent.frozen_steps, len(agent.chain), (len(returns), 1), device=device)
        chosen = torch.arange(len(returns), device=device)[:, None], step - agent.frozen_steps
        batch = {
            "states": states,
            "returns": all_returns,
            "obs": obs,
            "step": step,
            "x": paths[begun][chosen],
            "next_x": paths[begun][:, 1:][chosen],
            "mean": means[begun][chosen],
            "std": agent.stds(step, floor),
            "advantages": (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-6),
        }
        batch["log_probs"] = log_prob(batch["next_x"], batch["mean"], batch["std"], agent.sharing)
        train_actor = self.iteration >= args.critic_warmup
        if train_actor:
            with torch.no_grad():
                batch["learn_mean"] = agent.means(agent.base, agent.base.obs_encoder(obs), batch["x"], step)
        losses = ppo_update(args, agent, self.optimizer, batch, train_actor)
        self.iteration += 1
        success = float(np.mean(self.outcomes[0])) if self.outcomes[0] and self.settled else math.nan
        self.history.append([self.env_steps, success])
        variance = returns.var()
        charts = {
            "charts/success": success,
            "charts/episodic_length": float(np.mean(lengths)) if lengths else math.nan,
            "charts/rollout_seconds": rollout_seconds,
            "charts/update_seconds": time.perf_counter() - began,
            "charts/SPS": args.num_steps * env.num_envs / (rollout_seconds + time.perf_counter() - began),
            "charts/policy_std": floor,
            "charts/learning_rate": self.optimizer.param_groups[0]["lr"],
            "losses/explained_variance": float(1 - (returns - values).var() / variance) if variance > 0 else math.nan,
        }
        return charts | {f"losses/{name}": value for name, value in losses.items()}


# ---------------------------------------------------------------------------------------------- the whole job


def main() -> None:
    job = Job("diffusion_ppo", Args)
    args, run = job.args, job.run
    job.begin()

    # 1. Learn
    torch.manual_seed(args.seed + 1)
    agent = Agent(args, job.obs_encoder()).to(args.device)
    policy = ChunkPolicy(agent, job.eval_env.num_envs, args.execute)
    if run.stage == "start":
        demo_obs, actions = job.observed_demos(agent.obs_encoder), [e.actions for e in job.demos]
        learn(args, agent, demo_obs, actions, run.ticker("Learn", args.learn_epochs, "held-out loss {learn_held_out_loss:.3f}"))
        (row,), _ = job.evaluate(policy, [0], "Learn")
        run.save("learn", agent=agent.state_dict(), learn_success=row["success_rate"])
    agent.load_state_dict(run.checkpoint["agent"])

    # 2. Reinforce
    if run.stage in ("learn", "reinforce"):
        job.train(Reinforce(args, job.train_env, agent), policy, [0], note)
    agent.load_state_dict(run.checkpoint["agent"])

    # Roll out, keep successes
    _, summary = job.roll_out(policy, [0])
    learn_success = run.checkpoint["learn_success"]
    history = np.array([[0.0, learn_success], *run.checkpoint["history"]])
    plots.plot_success(run.folder / "figures" / "success.png", history[:, 0], history[:, 1:], [(0, "Reinforce")], job.task.language)
    run.finish(
        summary | {"stages": {"learn": learn_success, "reinforce": summary["success_rate"]}},
        f"{summary['corpus_episodes']} trajectories, success {summary['success_rate']:.0%}, "
        f"mean pairwise distance {summary['diversity']['mean_pairwise_distance']:.2f}",
    )
    view.write_report(run.folder, job.task, run.progress)


def note(logs: dict[str, float]) -> str:
    """What the progress bar shows of an iteration."""
    success = "--" if math.isnan(logs["charts/success"]) else f"{logs['charts/success']:.0%}"
    return f"success {success} {logs['charts/SPS']:.0f} steps/s"


if __name__ == "__main__":
    run_command(main)
