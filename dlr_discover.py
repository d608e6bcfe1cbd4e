"""Discover, Learn, Reinforce (arXiv 2511.19528): several distinct, successful ways of doing a task, as a corpus for VLAs.

Policy-gradient RL maximises success and collapses to one way of doing a task. This script keeps K ways apart:

1. Discover: a variational autoencoder with a categorical latent finds K patterns z in successful demonstrations.
2. Learn: behaviour cloning of a policy pi(a | s, z) on the demonstrations, each labelled with its pattern.
3. Reinforce: PPO on the sparse success reward alone, one pattern an episode, all patterns together.

Then it rolls the patterns out and writes the successful trajectories in LIBERO's HDF5 layout.

    python dlr_discover.py --num-patterns 8
    python dlr_discover.py --resume runs/RUN

docs/dlr_discover.md explains every metric and implementation detail.
"""

from __future__ import annotations

if __name__ == "__main__":
    import common.start  # noqa: F401  (Ctrl-C amid the imports below is one line)

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import cdist
from scipy.special import log_softmax
from torch import nn
from torch.distributions import Categorical, Normal

from common import metrics, plots, rollout, view
from common.cli import Count, Fraction, NotNegative, Positive, PositiveOrInf, Range, UserError, run_command
from common.data import Episode
from common.job import Job, JobArgs, Trainer, switch_weights
from common.libero import Task
from common.libero.env import LiberoVectorEnv
from common.libero.observation import observe_states
from common.networks import Normalizer, PixelEncoder, compiled, mlp, random_shift
from common.tensors import TensorDict, join, obs_buffer, to_tensor


@dataclasses.dataclass
class Args(JobArgs):
    """Discover K patterns in demonstrations of a LIBERO task, learn them, reinforce each, and write a corpus."""

    # Discover
    num_patterns: Count | Literal["auto"] = 8
    """at most so many patterns, or auto (12): K is how many of them unseen demonstrations confirm (prediction strength of at least 0.8)"""
    vib_beta: NotNegative = 1.0
    """weight of KL(q(z|s) || p(z)), the variational information bottleneck (1: the ELBO)"""
    discover_steps: Count = 300
    """gradient steps of the encoder"""
    discover_points: Annotated[int, Range(2)] = 32
    """states a demonstration is resampled to, evenly along the hand's path"""

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
    learn_switch_weight: Annotated[float, Range(1)] = 3.0
    """weight of the gripper in the two steps from each change of its command on: without it the mean action waits there for ever"""
    hidden: Count = 256
    """width of the hidden layers"""

    # Reinforce
    total_steps: Count | None = None
    """environment steps of PPO (default: 3,600 times the mean length of demonstrations, 450,000 at least)"""
    num_steps: Count = 128
    """steps an environment takes between updates"""
    gamma: Fraction = 0.997
    """discount: success at step T is worth gamma^(T-1), so haste that fails more often must not pay"""
    gae_lambda: Fraction = 0.95
    """lambda of generalised advantage estimation"""
    actor_lr: Positive = 4e-5
    """learning rate of the policy when Reinforce begins; it falls in proportion to the noise"""
    anneal_lr: bool = False
    """let the policy's learning rate fall linearly to 0"""
    critic_lr: Positive = 1e-3
    """learning rate of the value function"""
    update_epochs: Count = 5
    """passes over each rollout"""
    num_minibatches: Count = 8
    """minibatches a pass"""
    clip_coef: Positive = 0.2
    """PPO's clip range"""
    std_start: Annotated[float, Range(0.02, 1.5)] = 0.15
    """standard deviation of the policy when Reinforce begins, in units of the action range"""
    std_end: Annotated[float, Range(0.02, 1.5)] = 0.04
    """and after two thirds of it (geometric schedule): evaluation and the corpus take the mean action, so training must come near it"""
    max_grad_norm: PositiveOrInf = 0.5
    """gradients are clipped to this norm"""
    kl_coef: NotNegative = 0.05
    """weight of KL(policy || Learn policy) in the loss, which keeps noise in the updates from using up target_kl"""
    kl_hold: NotNegative = 2.5
    """the same for patterns in which the Learn policy always succeeds (kl_coef for at most half the time): they could gain but speed"""
    target_kl: PositiveOrInf = 1.0
    """E in Theorem 1: the policy loss is left out while KL(policy || Learn policy), in nats a step, is above it"""
    step_kl: PositiveOrInf = 0.1
    """updates of one rollout stop when the policy has moved so far (nats) from the one that acted"""
    critic_warmup: Annotated[int, Range(0)] = 5
    """iterations in which only the value function learns"""
    mi_coef: NotNegative = 0.0
    """beta of the naive objective's bonus log q(z|s) - log p(z) (the paper's ablation; 0: off)"""
    mi_on: Literal["success", "all"] = "all"
    """pay the bonus at every step, or its sum at success"""
    mi_encoder: Literal["frozen", "onpolicy"] = "frozen"
    """q(z|s) of the bonus: Discover's, or one trained on the policy's own rollouts"""
    curriculum: Literal["none", "reverse"] = "none"
    """reverse: begin episodes in demonstration states near success, and earlier as success rises"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mi_coef and self.obs == "pixels":
            raise UserError("--mi-coef needs --obs state: its bonus is of simulator states, of which pictures say too little")
        if self.num_minibatches > (batch := self.num_steps * self.num_envs):
            raise UserError(f"--num-minibatches {self.num_minibatches} is more than the {batch} steps of --num-steps x --num-envs")


# ---------------------------------------------------------------------------------------------- Discover


def pattern_features(obs: np.ndarray, layout: dict[str, slice]) -> np.ndarray:
    """(T, obs_size) state observations -> (T, F) metres, what a way of doing the task looks like: where the hand is, how it is
    turned (as the displacement of a point 10 cm from it), and where the goal's objects, regions and joints are from it.
    """
    columns = [obs[:, layout["eef_pos"]], 0.1 * obs[:, layout["eef_rot"]]]
    return np.hstack(columns + [obs[:, rows] for name, rows in layout.items() if name.endswith("_to_eef")])


def without_loops(obs: np.ndarray, layout: dict[str, slice]) -> np.ndarray:
    """The states, (<= T, obs_size), that are left when each way back to where the hand has been is cut out: what lies between has
    achieved nothing. A grasp that failed and is tried again is no other way of doing the task, nor is the jitter of a hand at rest.

    Back is within 2 cm (root mean square over the features' 3-vectors: the goal's things are where they were, too) after 5 cm of path.
    """
    features, kept, i = pattern_features(obs, layout), [], 0
    path = np.append(0.0, np.linalg.norm(np.diff(obs[:, layout["eef_pos"]], axis=0), axis=1).cumsum())  # metres
    while i < len(obs):
        kept.append(i)
        apart = np.linalg.norm(features[i:] - features[i], axis=1) / math.sqrt(features.shape[1] / 3)
        back = np.flatnonzero((apart < 0.02) & (path[i:] - path[i] > 0.05))
        i += back[-1] if len(back) else 1
    return obs[kept]


def along_path(obs: np.ndarray, layout: dict[str, slice], points: int) -> np.ndarray:
    """(points, obs_size): states at equal distances along the hand's path without its loops, half of them before the first contact.

    That is when the first of the goal's things has moved by 3 cm. So neither hesitating counts as a pattern, nor a detour as delay.
    """
    obs = without_loops(obs, layout)
    hand = obs[:, layout["eef_pos"]]
    moved = np.linalg.norm(np.diff(hand, axis=0), axis=1)
    distance = np.concatenate([[0.0], np.cumsum(moved + 1e-4)])  # metres; the small term keeps it rising while the hand rests
    things = np.stack([obs[:, rows] + hand for name, rows in layout.items() if name.endswith("_to_eef")])  # (things, T, 3), world
    touched = (np.linalg.norm(things - things[:, :1], axis=-1) > 0.03).any(0)
    contact = distance[touched.argmax()] if touched.any() else distance[-1] / 2
    at = np.interp(np.linspace(0, 2, points), [0, 1, 2], [0.0, contact, distance[-1]])
    return np.stack([np.interp(at, distance, column) for column in obs.T], axis=1).astype(np.float32)


class PatternEncoder(nn.Module):
    """q_phi(z | s): state observation -> log-probabilities of K patterns."""

    def __init__(self, obs_size: int, num_patterns: int, hidden: int = 128):
        super().__init__()
        self.normalizer = Normalizer(obs_size)
        self.net = mlp([obs_size, hidden, hidden, num_patterns], out_std=0.01)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """(..., obs_size) -> (..., K) log q(z | s)."""
        return torch.log_softmax(self.net(self.normalizer(obs)), dim=-1)


@dataclasses.dataclass
class StateDecoder:
    """p_psi(s | z, u, s_0): Laplace around each pattern's typical state at progress u along the path, with shared scales.

    The paper's decoder is p(s | z). Here one z explains a whole trajectory, so the centre moves along the path, or z would encode how
    far the episode has come; and linearly with the start s_0, or z would encode where things stand. Laplace's heavier tails keep a
    demonstration that strayed from pulling a centre to itself.

    centres (K, points, F), slopes on the start (F, points, F), mean start (F,), scale (F,); metres.
    """

    centres: np.ndarray
    slopes: np.ndarray
    start: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, patterns: np.ndarray, slopes: np.ndarray) -> StateDecoder:
        """Of maximum likelihood for features (N, points, F) of patterns (N,), given slopes (F, points * F)."""
        decoder = cls(np.zeros(0), slopes.reshape(-1, *features.shape[1:]), features[:, 0].mean(0), np.ones(features.shape[-1]))
        left = decoder.without_start(features)
        centres = np.stack([np.median(left[patterns == z], axis=0) for z in range(patterns.max() + 1)])
        return dataclasses.replace(decoder, centres=centres, scale=np.abs(left - centres[patterns]).mean((0, 1)).clip(0.005))

    def without_start(self, features: np.ndarray) -> np.ndarray:
        """(N, points, F), less what the start explains."""
        return features - np.einsum("ns,spf->npf", features[:, 0] - self.start, self.slopes)

    def log_prob(self, features: np.ndarray) -> np.ndarray:
        """(N, points, F) -> (N, points, K) log p(s | z, u, s_0), averaged over the F dimensions."""
        left = self.without_start(features)
        log_p = [-(np.abs(left - centre) / self.scale + np.log(2 * self.scale)).mean(-1) for centre in self.centres]
        return np.stack(log_p, axis=-1).astype(np.float32)

    def log_posterior(self, features: np.ndarray) -> np.ndarray:
        """(N, points, F) -> (N, K) log q(z | tau), q ~ p(z) prod_t p(s_t | z, u, s_0): where the ELBO of trajectories is largest."""
        return log_softmax(self.log_prob(features).sum(1), axis=-1)

    def recognise(self, features: np.ndarray) -> np.ndarray:
        """The pattern, (N,), of trajectories (N, points, F): argmax_z q(z | tau)."""
        return self.log_posterior(features).argmax(1)


def elbo(log_q: torch.Tensor, log_p: torch.Tensor, beta: float) -> torch.Tensor:
    """E_q[log p(s|z)] - beta KL(q(z|s) || p(z)) with uniform p(z), a mean over states; the expectation is exact, as z is discrete.

    Args: log_q, log_p: (..., K) log q(z | s) and log p(s | z).
    """
    return (log_q.exp() * (log_p - beta * (log_q + math.log(log_q.shape[-1])))).sum(-1).mean()


def cut_tree(x: np.ndarray, clusters: int) -> np.ndarray:
    """(N, D) -> (N,) labels of at most so many clusters, from Ward's tree: no restarts, and as good here as the best of 20 mixtures."""
    return fcluster(linkage(x, "ward"), clusters, "maxclust") - 1 if len(x) > 1 else np.zeros(len(x), int)


def start_slopes(x: np.ndarray, start: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """(S, D): how trajectories (N, D) lean on their starts (N, S), linearly, estimated within at most 12 small clusters.

    Over all demonstrations, few as they are, start and way correlate by chance, and a part of the way would be taken for the start's.
    """
    scale, groups = start.std(0) + 1e-3, min(12, max(1, len(x) // 4))
    start = (start - start.mean(0)) / scale
    slopes = np.zeros((start.shape[1], x.shape[1]))
    for _ in range(3):
        within = np.eye(groups)[cut_tree(x - start @ slopes, groups)]  # (N, groups) one-hot
        mean = within / np.maximum(within.sum(0), 1)
        s, y = start - within @ (mean.T @ start), x - within @ (mean.T @ x)
        slopes = np.linalg.solve(s.T @ s + ridge * np.eye(s.shape[1]), s.T @ y)
    return slopes / scale[:, None]


def cut_patterns(x: np.ndarray, num_patterns: int, least: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """At most K patterns of trajectories (N, D): clusters in Ward's tree of at least `least` and N/16; each trajectory goes to the nearest.

    Returns: labels (N,), each of them twice or more, and centres (K, D). One pattern if there are no two clusters of that size.
    """
    found, least = np.zeros(len(x), int), max(least, len(x) // 16)  # of more demonstrations more stray, some of them together
    for clusters in range(2, len(x)):
        labels = cut_tree(x, clusters)
        sizes = np.bincount(labels)
        big = np.flatnonzero(sizes >= least)
        if found.max() + 1 < len(big) <= num_patterns:
            nearest = cdist(x, [x[labels == k].mean(0) for k in big]).argmin(1)
            if np.bincount(nearest, minlength=len(big)).min() > 1:
                found = nearest
        if sizes.max() < least or len(big) >= num_patterns:
            break
    return found, centres_of(x, found)


def centres_of(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N, D), (N,) -> (K, D) means."""
    return np.stack([x[labels == k].mean(0) for k in range(labels.max() + 1)])


def halve(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two halves of each pattern, drawn at random."""
    order = np.concatenate([rng.permutation(np.flatnonzero(labels == k)) for k in range(labels.max() + 1)])
    return order[::2], order[1::2]


def prediction_strength(confusion: np.ndarray) -> np.ndarray:
    """(splits, K, K) counts of found x recognised -> (K,) share of a pattern's pairs that are recognised as one, mean over splits."""
    n = confusion.sum(2)
    return ((np.square(confusion).sum(2) - n) / np.maximum(n * (n - 1), 1)).mean(0)


def confirmed_patterns(x: np.ndarray, num_patterns: int, seed: int, say: Callable[[str], None]) -> tuple[np.ndarray, float]:
    """At most K patterns of trajectories (N, D), each confirmed by demonstrations that it was not found in.

    Prediction strength (Tibshirani and Walther 2005): fit one half, recognise the other, compare with what the other's own fit
    finds. The weakest pattern is merged with the one that it is taken for until it has 0.8. One way cut in two along its longest
    direction is predicted well, too: patterns whose mean paths are less than 1.5 cm apart are merged first. The ELBO can't choose K:
    it keeps rising.

    Returns: labels (N,), numbered without gaps, and the strength of the weakest pattern.
    """
    labels, _ = cut_patterns(x, num_patterns)
    k, rng, found, members = labels.max() + 1, np.random.default_rng(seed), [], 0
    for _ in range(10 if k > 1 else 0):
        halves, fits = halve(labels, rng), []
        for half in halves:
            own, centres = cut_patterns(x[half], k, least=2)  # two: three of a pattern, one of which strayed
            # a half's patterns have the name of the pattern that most of their demonstrations have
            names = np.array([np.bincount(labels[half][own == z]).argmax() for z in range(len(centres))])
            fits.append((names[own], names, centres))
        for half, (own, *_), (_, names, centres) in zip(halves, fits, fits[::-1], strict=True):
            recognised = names[cdist(x[half], centres).argmin(1)]
            found.append(metrics.confusion_matrix(own, recognised, k))
            members = members + metrics.confusion_matrix(labels[half], recognised, k)
    found = np.array(found)
    while k > 1:
        centres = centres_of(x, labels)
        apart = cdist(centres, centres) / math.sqrt(x.shape[1] / 3) + np.diag(np.full(k, np.inf))  # m, root mean square over 3-vectors
        strength = prediction_strength(found)
        if apart.min() < 0.015:
            z, other = np.unravel_index(apart.argmin(), apart.shape)
            reason = f"are {100 * apart.min():.1f} cm apart"
        elif strength.min() < 0.8:
            z = int(strength.argmin())
            mistaken = np.where(np.arange(k) == z, -np.inf, members[z] + members[:, z] - apart[z])  # of equals, the nearer
            other, reason = int(mistaken.argmax()), f"are mistaken for each other (prediction strength {strength[z]:.2f})"
        else:
            return labels, float(strength.min())
        say(f"Discover: patterns of {(labels == z).sum()} and {(labels == other).sum()} demonstrations {reason}: merged")
        merge = np.eye(k, dtype=int)[:, np.arange(k) != max(z, other)]
        merge[max(z, other), min(z, other)] = 1
        labels, found, members, k = merge[labels].argmax(1), merge.T @ found @ merge, merge.T @ members @ merge, k - 1
    return labels, 1.0


def fit_encoder(args: Args, paths: np.ndarray, log_p: np.ndarray, tick: Callable | None = None) -> PatternEncoder:
    """Maximise the ELBO of states (N, points, obs_size), given log_p (N, points, K): at beta = 1, q(z|s) is the decoder's posterior.

    With a decoder that is free to follow, q gives close patterns to their neighbour: the ELBO has such local optima.
    """
    encoder = PatternEncoder(paths.shape[-1], log_p.shape[-1])
    encoder.normalizer.fit(paths.reshape(-1, paths.shape[-1]))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    obs, log_p = torch.as_tensor(paths), torch.as_tensor(log_p)
    for step in range(args.discover_steps):
        rows = torch.randperm(len(obs))[:64]
        log_q = encoder(obs[rows] + 0.1 * encoder.normalizer.std * torch.randn_like(obs[rows]))  # rollouts will not match exactly
        bound = elbo(log_q, log_p[rows], args.vib_beta)
        optimizer.zero_grad()
        (-bound).backward()
        optimizer.step()
        if tick is not None and step % 20 == 0:
            usage = log_q.sum(1).softmax(-1).mean(0)
            tick(step, {"discover/elbo": bound.item(), "discover/pattern_entropy": Categorical(usage).entropy().item()})
    return encoder.requires_grad_(False)


def discover(args: Args, paths: np.ndarray, layout: dict[str, slice], say: Callable[[str], None], tick: Callable | None = None):
    """Find the patterns of demonstrations given by `along_path`, (N, points, obs_size), at most `--num-patterns`; fit the autoencoder.

    Returns: the frozen encoder q(z | s), the decoder, the labels, (N,) ints 0 to K - 1, and how sure they are, for summary.json:
    `prediction_strength` of the weakest pattern; `bits`, H(Z) + E log2 q(z | tau) <= I(Z; tau), and `recognised`, the share whose label
    is argmax q(z | tau), both of demonstrations that the decoder was not fitted to (two halves, either way).
    """
    torch.manual_seed(args.seed)
    features = np.stack([pattern_features(path, layout) for path in paths])  # (N, points, F)
    x, start = features.reshape(len(paths), -1), features[:, 0]
    slopes = start_slopes(x, start)
    most = 12 if args.num_patterns == "auto" else args.num_patterns
    labels, strength = confirmed_patterns(x - (start - start.mean(0)) @ slopes, most, args.seed, say)

    halves, log_q = halve(labels, np.random.default_rng(args.seed)), np.zeros((len(paths), labels.max() + 1))
    for half, other in (halves, halves[::-1]):
        if len(half):
            log_q[other] = StateDecoder.fit(features[half], labels[half], slopes).log_posterior(features[other])
    share = np.bincount(labels) / len(paths)
    bits = (log_q[np.arange(len(paths)), labels].mean() - share @ np.log(share)) / math.log(2)
    sure = {"prediction_strength": strength, "bits": float(bits), "recognised": float((log_q.argmax(1) == labels).mean())}

    decoder = StateDecoder.fit(features, labels, slopes)
    alive, named = np.unique(decoder.recognise(features), return_inverse=True)
    for z in set(range(len(decoder.centres))) - set(alive):
        say(f"Discover: a pattern of {(labels == z).sum()} demonstrations is dropped: all of them are nearer to others")
    decoder.centres = decoder.centres[alive]
    return fit_encoder(args, paths, decoder.log_prob(features), tick), decoder, named, sure


# ---------------------------------------------------------------------------------------------- the policy


class Agent(nn.Module):
    """pi_theta(a | s, z), a diagonal Gaussian, and V(s, z). The gripper is an action dimension of which LIBERO takes the sign."""

    def __init__(self, obs_encoder: Normalizer | PixelEncoder, num_patterns: int, hidden: int, action_size: int = 7):
        super().__init__()
        self.num_patterns = num_patterns
        self.obs_encoder = obs_encoder  # observations -> features (N, size)
        self.actor = mlp([obs_encoder.size + num_patterns, hidden, hidden, hidden, action_size], out_std=0.01)
        self.critic = mlp([obs_encoder.critic_size + num_patterns, hidden, hidden, 1], out_std=1.0)
        self.log_std = nn.Parameter(torch.full((action_size,), -1.6))  # learned by Learn, scheduled by Reinforce

    def inputs(self, features: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.cat([features, nn.functional.one_hot(z, self.num_patterns)], dim=-1)

    def policy(self, features: torch.Tensor, z: torch.Tensor) -> Normal:
        """features (N, size), z (N,) -> distribution of actions (N, 7)."""
        mean = self.actor(self.inputs(features, z))
        return Normal(mean, self.log_std.clamp(-4.0, 0.5).exp().expand_as(mean))

    @property
    def device(self) -> torch.device:
        return self.log_std.device

    @torch.no_grad()
    def act(self, obs: np.ndarray | dict, z: np.ndarray) -> np.ndarray:
        """The mean action of each environment, (N, 7) in [-1, 1]."""
        policy = self.policy(self.obs_encoder(to_tensor(obs, self.device)), torch.as_tensor(z, device=self.device))
        return policy.mean.clamp(-1, 1).cpu().numpy()

    @torch.no_grad()
    def sample(self, obs: torch.Tensor | TensorDict, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For observations (N, ...) and z (N,) actions (N, 7), the policy's means (N, 7), and the actions' log-probabilities (N,)."""
        policy = self.policy(self.obs_encoder(obs), z)
        actions = policy.sample()
        return actions, policy.mean, policy.log_prob(actions).sum(-1)

    def value(self, obs: torch.Tensor | TensorDict, z: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
        """V of observations (N, ...) and z (N,), (N,). It reads the policy's features, not trains them: that would move the policy."""
        return self.critic(self.inputs(self.obs_encoder.critic_view(obs, features), z)).squeeze(-1)


# ---------------------------------------------------------------------------------------------- Learn


def learn(args: Args, agent: Agent, demos: list[np.ndarray | dict], actions: list[np.ndarray], labels: list[np.ndarray], tick: Callable):
    """Behaviour cloning: maximise log pi(a | s, z) on the labelled demonstrations.

    LIBERO takes the gripper's sign: its term is log P(sign) with P(close) = sigmoid(4 x its mean), weighted by `switch_weights`.
    A tenth of each pattern's episodes is held out; the weights of the best held-out loss are kept, and training stops after
    `learn_patience` epochs without a better one. `tick(epoch, losses)` is called after each epoch.
    """
    torch.manual_seed(args.seed + 1)
    agent.obs_encoder.fit(join(demos))
    patterns = np.array([z[0] for z in labels])
    held_out = np.zeros(len(demos), bool)
    for k in np.unique(patterns):
        members = np.flatnonzero(patterns == k)
        held_out[members[: max(1, len(members) // 10)]] = len(members) > 1

    weights = [switch_weights(a, args.learn_switch_weight) for a in actions]

    def tensors(mask):
        columns = ([rows for rows, m in zip(column, mask, strict=True) if m] for column in (demos, actions, weights, labels))
        obs, act, weight, z = (join(column, agent.device) for column in columns)
        return obs, act.float(), weight, z.long()

    obs, act, weight, z = tensors(~held_out)
    test = tensors(held_out if held_out.any() else ~held_out)  # a single demonstration a pattern

    def negative_log_likelihood(obs, act, weight, z):
        policy = agent.policy(agent.obs_encoder(obs), z)
        gripper = nn.functional.logsigmoid(4.0 * policy.mean[:, -1] * act[:, -1].sign())
        return -(policy.log_prob(act)[:, :-1].sum(-1) + weight * gripper).mean()

    optimizer = torch.optim.Adam([*agent.obs_encoder.parameters(), *agent.actor.parameters(), agent.log_std], lr=args.learn_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.learn_epochs, eta_min=args.learn_lr / 20)
    best, best_loss, best_epoch = copy.deepcopy(agent.state_dict()), math.inf, 0
    for epoch in range(args.learn_epochs):
        losses, batches = [], torch.randperm(len(obs), device=agent.device).split(args.learn_batch)
        for batch in batches:
            augmented = agent.obs_encoder.augment(obs[batch], args.learn_noise)
            loss = negative_log_likelihood(augmented, act[batch], weight[batch], z[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        schedule.step()
        with torch.no_grad():
            test_loss = negative_log_likelihood(*test).item()
        total = sum(loss.item() * len(batch) for loss, batch in zip(losses, batches, strict=True))
        tick(epoch, {"learn/train_loss": total / len(obs), "learn/held_out_loss": test_loss})
        if test_loss < best_loss:
            best, best_loss, best_epoch = copy.deepcopy(agent.state_dict()), test_loss, epoch
        elif epoch - best_epoch >= args.learn_patience:
            break
    agent.load_state_dict(best)


def kept_apart(commanded: np.ndarray, log_q: np.ndarray, say: Callable[[str], None], least: float = 0.8) -> list[int]:
    """Patterns that the cloned policy keeps apart: of each, `least` of the rollouts that succeed are recognised, among those left.

    Theorem 1 keeps what is apart when Reinforce begins, its condition (ii). What Discover tells apart and the policy doesn't, because
    the difference is small beside its errors, would go on to be commanded as a pattern and be another.

    Args: commanded (N,), log_q (N, K) log q(z | tau) of the rollouts that succeeded. What never succeeded is left to Reinforce.
    """
    alive = np.arange(log_q.shape[1])
    while True:
        known = np.isin(commanded, alive)
        recognised = alive[log_q[known][:, alive].argmax(1)]
        confusion = metrics.confusion_matrix(commanded[known], recognised, log_q.shape[1])
        share = np.diag(confusion) / np.maximum(confusion.sum(1), 1) + (confusion.sum(1) == 0)
        z = int(alive[share[alive].argmin()])
        if share[z] >= least:
            return alive.tolist()
        other = int(np.where(np.arange(len(share)) == z, -1, confusion[z]).argmax())
        say(f"Learn: pattern {z} is dropped: {share[z]:.0%} of what succeeds is recognised, most of the rest as pattern {other}")
        alive = alive[alive != z]


# ---------------------------------------------------------------------------------------------- Reinforce


def gae(rewards, values, next_values, terminated, done, gamma: float, lam: float) -> torch.Tensor:
    """Generalised advantage estimation (Schulman et al. 2016), all arguments (num_steps, num_envs).

    `next_values` are V of the state that followed each action, also where a time limit cut the episode: truncation
    bootstraps, termination doesn't. `done` is either; nothing flows back across it.
    """
    advantages, last = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_values[t] * (1 - terminated[t]) - values[t]
        last = advantages[t] = delta + gamma * lam * (1 - done[t]) * last
    return advantages


def normalise_per_pattern(advantages: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance within each pattern, so that a pattern that mostly fails doesn't drown in one that succeeds."""
    out = torch.empty_like(advantages)
    for k in z.unique():
        rows = advantages[z == k]
        out[z == k] = (rows - rows.mean()) / (rows.std(correction=0) + 1e-6)
    return out


def gaussian_kl(p: Normal, q: Normal) -> torch.Tensor:
    """KL(p || q) summed over action dimensions, (N,)."""
    return torch.distributions.kl_divergence(p, q).sum(-1)


def ppo_losses(args: Args, agent: Agent, batch: dict, train_actor: bool) -> dict[str, torch.Tensor]:
    """A minibatch's `value_loss`, and if `train_actor` also its `policy_loss` and `leash` and, for the stops and the log, how far the
    policy is (nats) from the one that acted (`moved`) and from Learn's (`kl_to_learn`)."""
    features, z = agent.obs_encoder(batch["obs"]), batch["z"]
    row = {"value_loss": 0.5 * (agent.value(batch["obs"], z, features) - batch["returns"]).square().mean()}
    if train_actor:
        policy = agent.policy(features, z)
        log_ratio = policy.log_prob(batch["actions"]).sum(-1) - batch["log_probs"]
        ratio, advantages = log_ratio.exp(), batch["advantages"]
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        row["policy_loss"] = -torch.min(advantages * ratio, advantages * clipped).mean()
        # both as wide as at the start: as the noise fell, what was learned would be pulled back (0.15 / 0.04)^2 times as hard
        std = torch.full_like(policy.mean, args.std_start)
        kl_to_learn = gaussian_kl(Normal(policy.mean, std), Normal(batch["learn_mean"], std))
        row |= {"kl_to_learn": kl_to_learn.mean(), "leash": (batch["leash"] * kl_to_learn).mean()}
        with torch.no_grad():
            row |= {
                "moved": gaussian_kl(policy, Normal(batch["mean"], batch["std"])).mean(),
                "approx_kl": ((ratio - 1) - log_ratio).mean(),
                "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
                "ratio": ratio.mean(),
            }
    return row


def ppo_update(args: Args, agent: Agent, optimizer, batch: dict, train_actor: bool) -> dict[str, float]:
    """One PPO update (Schulman et al. 2017) on a flattened rollout: obs, z, actions, log_probs, mean, std, advantages, returns.

    The actor stops for this rollout when it has moved `step_kl` from the policy that acted. Its divergence from the Learn policy,
    whose mean actions are `learn_mean`, weighs `leash` in the loss (by the pattern of each step), and while it exceeds `target_kl` the
    actor is only pulled back: Theorem 1's bound on how much of one pattern's gradient reaches another rests on
    D_KL(pi_theta || pi_Learn) <= E.
    """
    size, losses = len(batch["obs"]), compiled(ppo_losses, args.compile)
    logs: dict[str, list[torch.Tensor]] = {}  # read at the end: a GPU would be waited for
    for _ in range(args.update_epochs):
        for rows in torch.randperm(size, device=agent.device).tensor_split(args.num_minibatches):
            row = losses(args, agent, {name: value[rows] for name, value in batch.items()}, train_actor)
            loss = row["value_loss"]
            if train_actor:  # the one time that a GPU is waited for
                moved, strayed = torch.stack([row.pop("moved"), row["kl_to_learn"].detach()]).tolist()
                train_actor = moved <= args.step_kl
                if train_actor:
                    loss = loss + row["leash"] + (row["policy_loss"] if strayed <= args.target_kl else 0.0)
            optimizer.zero_grad()
            loss.backward()
            if not train_actor:  # a compiled backward leaves zeros, and Adam would still move the policy
                for parameter in optimizer.param_groups[0]["params"]:
                    parameter.grad = None
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            for name, value in row.items():
                logs.setdefault(name, []).append(value.detach().clone())  # a CUDA graph writes to the same place again
    logs = {name: [float(value) for value in values] for name, values in logs.items()}
    return {name: float(np.mean(values)) for name, values in logs.items()} | {"updates": len(logs.get("policy_loss", []))}


class Curriculum:
    """Reverse curriculum (Florensa et al. 2017): begin episodes near success, then earlier as success rises.

    `progress` runs from 0 (the last fifth of a demonstration) to 1 (ordinary resets).
    """

    def __init__(self, demos: list[Episode], patterns: np.ndarray, rng: np.random.Generator):
        self.demos, self.patterns, self.rng = demos, patterns, rng
        self.progress = 0.0

    def start(self, z: int) -> tuple[np.ndarray, float] | None:
        """A demonstration state of pattern z and what the gripper was told there; None: reset as usual."""
        members = np.flatnonzero(self.patterns == z)
        if self.progress >= 1.0 or not len(members):
            return None
        episode = self.demos[self.rng.choice(members)]
        earliest = 0.8 * (1.0 - self.progress)
        t = int(episode.length * self.rng.uniform(earliest, 0.95))
        return episode.states[t], float(episode.actions[max(0, t - 1), 6])

    def update(self, success: float) -> None:
        if success > 0.8:
            self.progress = min(1.0, self.progress + 0.1)


class Reinforce(Trainer):
    """PPO with all patterns together, one pattern an episode, warm-started from Learn; can be stopped and continued exactly."""

    parts = ("agent", "reference", "optimizer", "bonus_encoder", "bonus_optimizer")

    def __init__(
        self,
        args: Args,
        env: LiberoVectorEnv,
        agent: Agent,
        encoder: PatternEncoder,
        alive: list[int],
        learn_success: np.ndarray,
        curriculum: Curriculum | None = None,
    ):
        """`learn_success` (K,): how often the Learn policy, which `agent` is, succeeds with each pattern."""
        if len(alive) == 1:  # no other pattern to keep apart from: Theorem 1's leash off, as in the paper's O2O-RL baseline
            args = dataclasses.replace(args, kl_coef=0.0, kl_hold=0.0, target_kl=math.inf)
        super().__init__(args, env, agent, agent.num_patterns)
        held = np.clip(2 * learn_success - 1, 0, 1)
        leash = args.kl_coef ** (1 - held) * args.kl_hold**held
        self.leash = torch.as_tensor(leash, dtype=torch.float32, device=agent.device)
        self.encoder, self.alive, self.curriculum = encoder, np.array(alive), curriculum
        self.reference = copy.deepcopy(agent).requires_grad_(False)  # the Learn policy
        self.bonus_encoder = copy.deepcopy(encoder).requires_grad_(args.mi_encoder == "onpolicy").to(agent.device)
        agent.log_std.requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            [
                {"params": [*agent.obs_encoder.parameters(), *agent.actor.parameters()], "lr": args.actor_lr},
                {"params": agent.critic.parameters(), "lr": args.critic_lr},
            ],
            eps=1e-5,
        )
        self.bonus_optimizer = torch.optim.Adam(self.bonus_encoder.parameters(), lr=1e-3)
        self.rng = np.random.default_rng(args.seed + 2)
        self.z = self.rng.choice(self.alive, env.num_envs)
        self.bonus_sums = np.zeros(env.num_envs)
        self.obs, _ = env.reset(seed=args.seed)
        self.begin(np.arange(env.num_envs))

    def begin(self, envs: np.ndarray) -> None:
        """New episodes have begun in `envs`: draw their patterns from p(z), and with the curriculum their start states."""
        self.z[envs] = self.rng.choice(self.alive, len(envs))
        self.bonus_sums[envs] = 0.0
        if self.curriculum is not None:
            starts = {i: start for i in envs if (start := self.curriculum.start(int(self.z[i]))) is not None}
            if starts:
                states, grippers = zip(*starts.values(), strict=True)
                self.env.set_state(np.array(states), np.array(grippers), envs=np.array(list(starts)))
                self.obs = self.env.observations()

    def iterate(self) -> dict[str, float]:
        """Roll out `num_steps` steps in every environment, then update. Returns what to log."""
        args, env, agent, device = self.args, self.env, self.agent, self.agent.device
        progress = self.iteration / self.num_iterations
        fallen = min(1.0, 1.5 * progress)  # the last third of the steps is for what the mean action can't do yet
        std = args.std_start ** (1 - fallen) * args.std_end**fallen
        # a step of the mean is (step / std)^2 / 2 in KL, and Adam's is about the learning rate: with less noise, smaller ones
        lr = args.actor_lr * std / args.std_start
        self.optimizer.param_groups[0]["lr"] = lr * (1 - progress if args.anneal_lr else 1)
        with torch.no_grad():
            agent.log_std.fill_(math.log(std))
            self.reference.log_std.fill_(math.log(std))
        shape = (args.num_steps, env.num_envs)
        look = agent.obs_encoder.look  # of pictures, where an estimator reads them, its estimate is kept
        seen = look(to_tensor(self.obs, device))
        obs, next_obs = (obs_buffer(args.num_steps, seen) for _ in range(2))
        actions, means = (torch.zeros(*shape, 7, device=device) for _ in range(2))
        z = torch.zeros(shape, dtype=torch.long, device=device)
        log_probs, rewards, terminated, done, bonus = (torch.zeros(shape, device=device) for _ in range(5))
        lengths, log_k, sample = [], math.log(len(self.alive)), compiled(Agent.sample, args.compile)
        began = time.perf_counter()
        with rollout.acting(env):
            for t in range(args.num_steps):
                obs[t] = random_shift(seen)  # pictures: the policy acts on the shifted one, so the ratio is of one picture
                z[t] = torch.as_tensor(self.z)
                actions[t], means[t], log_probs[t] = sample(agent, obs[t], z[t])
                self.obs, reward, term, trunc, info = env.step(actions[t].clamp(-1, 1).cpu().numpy())
                ended = term | trunc
                next_obs[t] = seen = look(to_tensor(self.obs, device))
                if ended.any():
                    next_obs[t, ended] = look(to_tensor(info["final_obs"], device)[ended])
                rewards[t], terminated[t], done[t] = (torch.as_tensor(x.astype(np.float32)) for x in (reward, term, ended))
                if args.mi_coef:
                    with torch.no_grad():  # r_div = log q(z|s) - log p(z)
                        r_div = self.bonus_encoder(next_obs[t]).gather(1, z[t][:, None])[:, 0] + log_k
                    self.bonus_sums += r_div.cpu().numpy()
                    bonus[t] = r_div if args.mi_on == "all" else torch.as_tensor(self.bonus_sums * term, dtype=torch.float32)
                for i in np.flatnonzero(ended):
                    self.outcomes[self.z[i]].append(float(term[i]))
                    lengths.append(int(info["final_length"][i]))
                if ended.any():
                    self.begin(np.flatnonzero(ended))
                    if self.curriculum is not None:  # it may have begun elsewhere
                        seen = look(to_tensor(self.obs, device))
        rollout_seconds, began = time.perf_counter() - began, time.perf_counter()

        rewards += args.mi_coef * bonus
        obs, z = obs.flatten(0, 1), z.flatten()
        with torch.no_grad():
            values = agent.value(obs, z).reshape(shape)
            next_values = agent.value(next_obs.flatten(0, 1), z).reshape(shape)
            learn_means = self.reference.policy(self.reference.obs_encoder(obs), z).mean
        advantages = gae(rewards, values, next_values, terminated, done, args.gamma, args.gae_lambda)
        returns = (advantages + values).flatten()
        batch = {
            "obs": obs,
            "z": z,
            "actions": actions.flatten(0, 1),
            "log_probs": log_probs.flatten(),
            "mean": means.flatten(0, 1),
            "learn_mean": learn_means,
            "leash": self.leash[z],
            "std": torch.full_like(means.flatten(0, 1), std),
            "advantages": normalise_per_pattern(advantages.flatten(), z),
            "returns": returns,
        }
        losses = ppo_update(args, agent, self.optimizer, batch, train_actor=self.iteration >= args.critic_warmup)
        if args.mi_coef and args.mi_encoder == "onpolicy":
            for rows in torch.randperm(len(returns), device=device).split(512):
                loss = nn.functional.nll_loss(self.bonus_encoder(batch["obs"][rows]), batch["z"][rows])
                self.bonus_optimizer.zero_grad()
                loss.backward()
                self.bonus_optimizer.step()
        self.iteration += 1
        success = [np.mean(o) if o and self.settled else np.nan for o in self.outcomes]
        known = [success[k] for k in self.alive if not np.isnan(success[k])]
        mean_success = float(np.mean(known)) if known else np.nan
        if self.curriculum is not None and known:
            self.curriculum.update(mean_success)
        self.history.append([self.env_steps, *success])
        variance = returns.var()
        charts = {
            "charts/success": mean_success,
            "charts/episodic_length": float(np.mean(lengths)) if lengths else np.nan,
            "charts/rollout_seconds": rollout_seconds,
            "charts/update_seconds": time.perf_counter() - began,
            "charts/SPS": args.num_steps * env.num_envs / (rollout_seconds + time.perf_counter() - began),
            "charts/policy_std": std,
            "charts/learning_rate": self.optimizer.param_groups[0]["lr"],
            "losses/explained_variance": float(1 - (returns - values.flatten()).var() / variance) if variance > 0 else np.nan,
        }
        if args.mi_coef:
            charts["charts/mi_bonus"] = float(bonus.mean())
        if self.curriculum is not None:
            charts["charts/curriculum"] = self.curriculum.progress
        per_pattern = {f"patterns/success_{k}": success[k] for k in self.alive if not np.isnan(success[k])}
        return charts | per_pattern | {f"losses/{name}": value for name, value in losses.items()}

    def state_dict(self) -> dict:
        curriculum = self.curriculum and [self.curriculum.progress, self.curriculum.rng.bit_generator.state]
        own = {"z": self.z, "bonus_sums": self.bonus_sums, "rng": self.rng.bit_generator.state, "curriculum": curriculum}
        return super().state_dict() | own

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.z, self.bonus_sums = state["z"].numpy(), state["bonus_sums"].numpy()
        self.rng.bit_generator.state = state["rng"]
        if self.curriculum is not None:
            self.curriculum.progress, self.curriculum.rng.bit_generator.state = state["curriculum"]


# ---------------------------------------------------------------------------------------------- the whole job


def main() -> None:
    job = Job("dlr_discover", Args)
    args, run, task = job.args, job.run, job.task
    job.begin()
    demo_states = [observe_states(task, e.states) for e in job.demos]  # Discover's, whatever the policy sees
    layout = job.train_env.obs_layout
    paths = np.stack([along_path(obs, layout, args.discover_points) for obs in demo_states])

    # 1. Discover
    if run.stage == "start":
        tick = run.ticker("Discover", args.discover_steps, "ELBO {discover_elbo:.3f}", each=20)
        encoder, decoder, patterns, sure = discover(args, paths, layout, run.progress.say, tick)
        run.log({f"discover/{name}": value for name, value in sure.items()}, args.discover_steps)
        saved = {"encoder": encoder.state_dict(), "decoder": vars(decoder), "patterns": patterns, "discover": sure}
        run.save("discover", num_patterns=len(decoder.centres), **saved)
    k, patterns, sure = run.checkpoint["num_patterns"], np.asarray(run.checkpoint["patterns"]), run.checkpoint["discover"]
    decoder = StateDecoder(**{name: np.asarray(array) for name, array in run.checkpoint["decoder"].items()})
    encoder = PatternEncoder(paths.shape[-1], k).requires_grad_(False)
    encoder.load_state_dict(run.checkpoint["encoder"])
    strategies = [e.attrs.get("strategy", "") for e in job.demos]
    recovery = metrics.adjusted_rand_index(patterns, strategies) if all(strategies) else None
    truth = "" if recovery is None else f"; adjusted Rand index against the true strategies {recovery:.2f}"
    run.progress.say(
        f"Discover: K = {k}, --num-patterns {args.num_patterns} at most ({', '.join(map(str, np.bincount(patterns)))} demonstrations); "
        f"prediction strength {sure['prediction_strength']:.2f} or more, {sure['bits']:.2f} of {math.log2(k):.2f} bits, "
        f"{sure['recognised']:.0%} of unseen demonstrations recognised{truth}"
    )

    # 2. Learn
    torch.manual_seed(args.seed + 1)
    agent = Agent(job.obs_encoder(), k, args.hidden).to(args.device)
    if run.stage == "discover":
        demo_obs, actions = job.observed_demos(agent.obs_encoder), [e.actions for e in job.demos]
        tick = run.ticker("Learn", args.learn_epochs, "held-out loss {learn_held_out_loss:.2f}")
        learn(args, agent, demo_obs, actions, [np.full(len(obs), z) for obs, z in zip(demo_states, patterns, strict=True)], tick)
        rows, episodes = job.evaluate(agent.act, range(k), "Learn", most=150)  # on the way: failures take long
        alive = kept_apart(*recognise(task, layout, decoder, args.discover_points, [e for e in episodes if e.success]), run.progress.say)
        run.save("learn", agent=agent.state_dict(), learn_success=[row["success_rate"] for row in rows], alive=alive)
    agent.load_state_dict(run.checkpoint["agent"])
    alive = run.checkpoint.get("alive", list(range(k)))  # runs of earlier revisions kept all
    learn_success = np.asarray(run.checkpoint["learn_success"])

    # 3. Reinforce
    if run.stage in ("learn", "reinforce"):
        curriculum = Curriculum(job.demos, patterns, np.random.default_rng(args.seed + 3)) if args.curriculum == "reverse" else None
        job.train(Reinforce(args, job.train_env, agent, encoder, alive, learn_success, curriculum), agent.act, alive, note)
    agent.load_state_dict(run.checkpoint["agent"])

    # Roll out, keep successes
    corpus, summary = job.roll_out(agent.act, alive)
    commanded, log_q = recognise(task, layout, decoder, args.discover_points, corpus)
    confusion = metrics.confusion_matrix(commanded, np.array(alive)[log_q[:, alive].argmax(1)], k)
    plots.plot_leakage(run.folder / "figures" / "leakage.png", confusion, task.language)
    history = np.array([[0.0] + [np.nan] * k, *run.checkpoint["history"]])
    history[0, 1:] = learn_success
    plots.plot_success(run.folder / "figures" / "success.png", history[:, 0], history[:, 1:], [(0, "Reinforce")], task.language)
    stages = {"learn": learn_success[alive].mean(), "reinforce": summary["success_rate"], "learn_per_pattern": learn_success}
    leakage = {"p_leak": metrics.p_leak(confusion), "confusion": confusion}
    run.finish(
        summary
        | {
            "leakage": leakage,
            "recovery": recovery,
            "stages": stages,
            "num_patterns": k,
            "alive": len(alive),
            "discover": sure | {"bits_at_most": math.log2(k)},
        },
        f"{len(corpus)} trajectories of {len(alive)} patterns, success {summary['success_rate']:.0%}, leakage {leakage['p_leak']:.0%}, "
        f"mean pairwise distance {summary['diversity']['mean_pairwise_distance']:.2f}",
    )
    view.write_report(run.folder, task, run.progress)


def recognise(
    task: Task, layout: dict[str, slice], decoder: StateDecoder, points: int, episodes: list[Episode]
) -> tuple[np.ndarray, np.ndarray]:
    """The patterns that rollouts were commanded, (N,), and Discover's log q(z | tau) of them, (N, K)."""
    paths = [along_path(rollout.trajectory_observations(task, e), layout, points) for e in episodes]
    features = np.stack([pattern_features(path, layout) for path in paths]) if paths else np.zeros((0, *decoder.centres.shape[1:]))
    return np.array([e.attrs["pattern"] for e in episodes], int), decoder.log_posterior(features)


def note(logs: dict[str, float]) -> str:
    """What the progress bar shows of an iteration: success in all, and of each pattern that has finished episodes."""
    success = "--" if math.isnan(logs["charts/success"]) else f"{logs['charts/success']:.0%}"
    each = " ".join(f"{rate:.0%}" for name, rate in logs.items() if name.startswith("patterns/success_"))
    return f"success {success} ({each}) {logs['charts/SPS']:.0f} steps/s"


if __name__ == "__main__":
    run_command(main)
