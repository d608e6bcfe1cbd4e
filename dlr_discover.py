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
from torch import nn
from torch.distributions import Categorical, Laplace, Normal

from common import metrics, plots, rollout, view
from common.cli import Count, Fraction, NotNegative, Positive, PositiveOrInf, Range, UserError, run_command
from common.data import Episode
from common.libero.env import LiberoVectorEnv
from common.libero.observation import observe_states
from common.networks import Normalizer, PixelEncoder, compiled, mlp, random_shift
from common.tensors import TensorDict, join, obs_buffer, to_tensor


@dataclasses.dataclass
class Args(rollout.JobArgs):
    """Discover K patterns in demonstrations of a LIBERO task, learn them, reinforce each, and write a corpus."""

    # Discover
    num_patterns: Count | Literal["auto"] = 8
    """K, or auto: as many, up to 12, as unseen demonstrations confirm (prediction strength of at least 0.8)"""
    label_level: Literal["trajectory", "state"] = "trajectory"
    """whether a whole demonstration has one pattern, or each of its states its own"""
    vib_beta: NotNegative = 0.3
    """weight of KL(q(z|s) || p(z)), the variational information bottleneck"""
    discover_steps: Count = 400
    """gradient steps of the autoencoder"""
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
    learn_switch_weight: Annotated[float, Range(1)] = 5.0
    """weight of the gripper in the two steps from each change of its command on: without it the mean action waits there for ever"""
    hidden: Count = 256
    """width of the hidden layers"""

    # Reinforce
    total_steps: Count = 300_000
    """environment steps of PPO"""
    num_steps: Count = 128
    """steps an environment takes between updates"""
    gamma: Fraction = 0.99
    """discount: success at step T is worth gamma^(T-1)"""
    gae_lambda: Fraction = 0.95
    """lambda of generalised advantage estimation"""
    actor_lr: Positive = 4e-5
    """learning rate of the policy"""
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
    std_end: Annotated[float, Range(0.02, 1.5)] = 0.08
    """and when it ends (geometric schedule): evaluation and the corpus take the mean action, so training must come near it"""
    max_grad_norm: PositiveOrInf = 0.5
    """gradients are clipped to this norm"""
    kl_coef: NotNegative = 0.05
    """weight of KL(policy || Learn policy) in the loss, which keeps noise in the updates from using up target_kl"""
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


def along_path(obs: np.ndarray, layout: dict[str, slice], points: int) -> np.ndarray:
    """(points, obs_size): the states at equal distances along the hand's path, so that hesitation does not count as a pattern."""
    moved = np.linalg.norm(np.diff(obs[:, layout["eef_pos"]], axis=0), axis=1)
    distance = np.concatenate([[0.0], np.cumsum(moved + 1e-4)])  # metres; the small term keeps it rising while the hand rests
    at = np.linspace(0.0, distance[-1], points)
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

    @torch.no_grad()
    def recognise(self, obs: np.ndarray) -> int:
        """The pattern of a trajectory given by `along_path`, (points, obs_size): argmax_z sum_t log q(z | s_t)."""
        return int(self(torch.as_tensor(obs)).sum(0).argmax())


class StateDecoder(nn.Module):
    """p_psi(s | z, u): Laplace around each pattern's typical state at progress u along the path, with shared scales.

    The paper's decoder is p(s | z). With one pattern for a whole trajectory, the centre moves along the path: otherwise z
    would encode how far the episode has come instead of how it is done. `points` = 1 gives p(s | z). Laplace's heavier
    tails keep a demonstration that strayed from claiming a pattern for itself.
    """

    def __init__(self, centres: torch.Tensor):
        super().__init__()
        self.centres = nn.Parameter(centres.clone())  # (K, points or 1, F)
        self.log_scale = nn.Parameter(torch.full((centres.shape[-1],), math.log(0.03)))  # metres

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """(N, points, F) -> (N, points, K) log p(s | z, u), averaged over the F dimensions."""
        log_p = [Laplace(centre, self.log_scale.exp()).log_prob(x).mean(-1) for centre in self.centres]
        return torch.stack(log_p, dim=-1)


def elbo(log_q: torch.Tensor, log_p: torch.Tensor, beta: float, level: str) -> tuple[torch.Tensor, torch.Tensor]:
    """E_q[log p(s|z)] - beta KL(q(z|s) || p(z)) with uniform p(z); the expectation is exact, as z is discrete.

    Args:
        log_q, log_p: (N, points, K) log q(z | s_t) and log p(s_t | z).
        level: "state" takes the expectation under each state's q(z | s_t); "trajectory" under the product of experts
            q(z | tau) ~ prod_t q(z | s_t), whose argmax is the trajectory label argmax_z sum_t log q(z | s_t).

    Returns: the ELBO, a mean over states; log q of the labels, (N, points, K) or (N, 1, K).
    """
    kl = (log_q.exp() * (log_q + math.log(log_q.shape[-1]))).sum(-1)
    log_label = torch.log_softmax(log_q.sum(1, keepdim=True), dim=-1) if level == "trajectory" else log_q
    reconstruction = (log_label.exp() * log_p).sum(-1)
    return (reconstruction - beta * kl).mean(), log_label


def seed_patterns(x: np.ndarray, num_patterns: int, rng: np.random.Generator, restarts: int) -> tuple[np.ndarray, np.ndarray]:
    """k-medians from k-means++ seeds (Arthur & Vassilvitskii 2007), the best of `restarts`: where the autoencoder starts.

    From random weights the ELBO ends in one of many local optima, where one pattern holds two ways and another none.

    Args: x (N, F). Returns: labels (N,), each of the K at least once, and centres (K, F).
    """
    best, best_cost = None, np.inf
    for _ in range(restarts):
        centres = x[[rng.integers(len(x))]]
        while len(centres) < num_patterns:
            nearest = cdist(x, centres).min(axis=1) ** 2
            if nearest.sum() == 0:
                raise UserError(f"the demonstrations have only {len(centres)} distinct trajectories; choose a smaller --num-patterns")
            centres = np.vstack([centres, x[rng.choice(len(x), p=nearest / nearest.sum())]])
        labels = None
        for _ in range(50):
            distances = cdist(x, centres, "cityblock")
            previous, labels = labels, distances.argmin(axis=1)
            if previous is not None and (labels == previous).all():
                break
            centres = np.stack([np.median(x[labels == k], axis=0) if (labels == k).any() else centres[k] for k in range(num_patterns)])
        cost = distances.min(axis=1).sum()
        if len(np.unique(labels)) == num_patterns and cost < best_cost:
            best, best_cost = (labels, centres), cost
    if best is None:
        raise UserError(f"the demonstrations do not fall into {num_patterns} patterns; choose a smaller --num-patterns")
    return best


def discover(args: Args, paths: np.ndarray, layout: dict[str, slice], num_patterns: int, tick: Callable | None = None):
    """Fit the autoencoder to demonstrations given by `along_path`, (N, points, obs_size).

    Returns: the frozen encoder, and the labels, (N, points) ints, constant over a demonstration at trajectory level.
    """
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    num, points, obs_size = paths.shape
    features = np.stack([pattern_features(path, layout) for path in paths])  # (N, points, F)
    if args.label_level == "trajectory":
        seeds, centres = seed_patterns(features.reshape(num, -1), num_patterns, rng, restarts=100)
        seeds, centres = np.repeat(seeds[:, None], points, axis=1), centres.reshape(num_patterns, points, -1)
    else:
        seeds, centres = seed_patterns(features.reshape(num * points, -1), num_patterns, rng, restarts=3)
        seeds, centres = seeds.reshape(num, points), centres[:, None]
    obs, x, seeds = torch.as_tensor(paths), torch.as_tensor(features), torch.as_tensor(seeds)
    encoder = PatternEncoder(obs_size, num_patterns)
    encoder.normalizer.fit(paths.reshape(-1, obs_size))
    decoder = StateDecoder(torch.as_tensor(centres, dtype=torch.float32))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    for step in range(args.discover_steps):
        rows = torch.randperm(num)[:64]
        noisy = obs[rows] + 0.1 * encoder.normalizer.std * torch.randn_like(obs[rows])  # rollouts will not match exactly
        log_q = encoder(noisy)
        bound, log_label = elbo(log_q, decoder.log_prob(x[rows]), args.vib_beta, args.label_level)
        loss = -bound
        if step < args.discover_steps // 4:  # guard against dead patterns: the encoder starts from the seeds
            loss = loss + nn.functional.nll_loss(log_q.flatten(0, 1), seeds[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if tick is not None and step % 20 == 0:
            usage = log_label.exp().mean((0, 1))
            tick(step, {"discover/elbo": bound.item(), "discover/pattern_entropy": Categorical(usage).entropy().item()})
    if args.label_level == "trajectory":
        labels = np.array([[encoder.recognise(path)] * points for path in paths])
    else:
        labels = encoder(obs).argmax(-1).numpy()
    return encoder.requires_grad_(False), labels


def label_states(args: Args, encoder: PatternEncoder, demos: list[np.ndarray], labels: np.ndarray) -> list[np.ndarray]:
    """The pattern of each state of each demonstration (T_i, obs_size): the episode's, or at state level argmax q(z | s)."""
    if args.label_level == "trajectory":
        return [np.full(len(obs), row[0]) for obs, row in zip(demos, labels, strict=True)]
    return [encoder(torch.as_tensor(obs)).argmax(-1).numpy() for obs in demos]


def episode_pattern(labels: np.ndarray) -> int:
    """The pattern of an episode: its label, or at state level its most frequent one."""
    return int(np.bincount(labels).argmax())


def without_start(x: np.ndarray, start: np.ndarray, groups: int = 12, ridge: float = 5.0) -> np.ndarray:
    """(N, D) trajectories less what their starts (N, S) explain: linear slopes, estimated within `groups` small clusters.

    Over all demonstrations, few as they are, start and way correlate by chance, and a part of the way would be taken out.
    """
    start = (start - start.mean(0)) / (start.std(0) + 1e-3)
    slopes = np.zeros((start.shape[1], x.shape[1]))
    for _ in range(3):
        tree = linkage(x - start @ slopes, "ward")
        within = np.eye(groups)[fcluster(tree, groups, "maxclust") - 1]  # (N, groups) one-hot
        mean = within / np.maximum(within.sum(0), 1)
        s, y = start - within @ (mean.T @ start), x - within @ (mean.T @ x)
        slopes = np.linalg.solve(s.T @ s + ridge * np.eye(s.shape[1]), s.T @ y)
    return x - start @ slopes


def cut_patterns(x: np.ndarray, num_patterns: int, least: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """At most K patterns of at least `least` trajectories (N, D), from Ward's tree; a stray one goes to the nearest.

    Returns: labels (N,) and centres (K, D). One pattern if there are no two of that size.
    """
    tree, found = linkage(x, "ward"), np.zeros(len(x), int)
    for clusters in range(2, len(x)):
        labels = fcluster(tree, clusters, "maxclust") - 1
        sizes = np.bincount(labels)
        big = np.flatnonzero(sizes >= least)
        if found.max() + 1 < len(big) <= num_patterns:
            centres = np.stack([x[labels == k].mean(0) for k in big])
            found = cdist(x, centres).argmin(1)
        if sizes.max() < least or len(big) >= num_patterns:
            break
    return found, np.stack([x[found == k].mean(0) for k in range(found.max() + 1)])


def prediction_strength(confusion: np.ndarray) -> np.ndarray:
    """(splits, K, K) counts of found x recognised -> (K,) share of a pattern's pairs that are recognised as one, mean over splits."""
    n = confusion.sum(2)
    return ((np.square(confusion).sum(2) - n) / np.maximum(n * (n - 1), 1)).mean(0)


def choose_num_patterns(args: Args, paths: np.ndarray, layout: dict[str, slice], say: Callable[[str], None]) -> int:
    """How many patterns, up to 12, are confirmed by demonstrations that they weren't found in.

    Prediction strength (Tibshirani and Walther 2005): fit one half, recognise the other, compare with what the other's own
    fit finds. The weakest pattern is merged with the one that it is taken for until it reaches 0.8. One way cut in two along its longest
    direction is predicted well, too: patterns whose mean paths are less than 1.5 cm apart are merged first. The ELBO can't
    choose: it keeps rising with K.
    """
    features = np.stack([pattern_features(path, layout) for path in paths])  # (N, points, F)
    x = without_start(features.reshape(len(paths), -1), features[:, 0], min(12, len(paths) // 4))
    labels, centres = cut_patterns(x, 12)
    rng, confusions = np.random.default_rng(args.seed), []
    for _ in range(10):
        side, order = np.zeros(len(x), bool), np.concatenate([rng.permutation(np.flatnonzero(labels == k)) for k in range(len(centres))])
        side[order[::2]] = True  # half of each pattern
        (own_a, a), (own_b, b) = cut_patterns(x[side], len(centres)), cut_patterns(x[~side], len(centres))
        name_a, name_b = (
            np.array([np.bincount(labels[half][own == k]).argmax() for k in range(own.max() + 1)])
            for half, own in ((side, own_a), (~side, own_b))
        )
        for half, found, name, seen in ((~side, name_b[own_b], name_a, a), (side, name_a[own_a], name_b, b)):
            confusions.append(metrics.confusion_matrix(found, name[cdist(x[half], seen).argmin(1)], len(centres)))
    confusion, members = np.stack(confusions), np.bincount(labels)
    while len(members) > 1:
        apart = cdist(centres, centres) / math.sqrt(x.shape[1] / 3) + np.diag(np.full(len(members), np.inf))
        strength = prediction_strength(confusion)
        if apart.min() < 0.015:
            k, other = np.unravel_index(apart.argmin(), apart.shape)
            reason = f"are {100 * apart.min():.1f} cm apart"
        elif strength.min() < 0.8:
            k = int(strength.argmin())
            mistaken = (confusion + confusion.transpose(0, 2, 1)).sum(0)[k]
            mistaken[k] = -1
            other, reason = int(mistaken.argmax()), f"are mistaken for each other (prediction strength {strength[k]:.2f})"
        else:
            say(f"Discover: {len(members)} patterns, prediction strength of the weakest {strength.min():.2f}")
            return len(members)
        say(f"Discover: patterns of {members[k]} and {members[other]} demonstrations {reason}: merged")
        k, other = sorted((int(k), int(other)))
        centres[k] = np.average(centres[[k, other]], axis=0, weights=members[[k, other]])
        members[k] += members[other]
        confusion[:, k] += confusion[:, other]
        confusion[:, :, k] += confusion[:, :, other]
        centres, members = np.delete(centres, other, 0), np.delete(members, other)
        confusion = np.delete(np.delete(confusion, other, 1), other, 2)
    say("Discover: one pattern")
    return 1


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

    The gripper's term is weighted by `rollout.switch_weights`. A tenth of each pattern's episodes is held out; the weights of the best
    held-out loss are kept, and training stops after `learn_patience` epochs without a better one. `tick(epoch, losses)` is called
    after each epoch.
    """
    torch.manual_seed(args.seed + 1)
    agent.obs_encoder.fit(join(demos))
    patterns = np.array([episode_pattern(rows) for rows in labels])
    held_out = np.zeros(len(demos), bool)
    for k in np.unique(patterns):
        members = np.flatnonzero(patterns == k)
        held_out[members[: max(1, len(members) // 10)]] = len(members) > 1

    weights = [rollout.switch_weights(a, args.learn_switch_weight) for a in actions]

    def tensors(mask):
        columns = ([rows for rows, m in zip(column, mask, strict=True) if m] for column in (demos, actions, weights, labels))
        obs, act, weight, z = (join(column, agent.device) for column in columns)
        return obs, act.float(), weight, z.long()

    obs, act, weight, z = tensors(~held_out)
    test = tensors(held_out if held_out.any() else ~held_out)  # a single demonstration a pattern

    def negative_log_likelihood(obs, act, weight, z):
        log_prob = agent.policy(agent.obs_encoder(obs), z).log_prob(act)
        return -(log_prob[:, :-1].sum(-1) + weight * log_prob[:, -1]).mean()

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
    """A minibatch's `value_loss`, and if `train_actor` also its `policy_loss` and, for the stops and the log, how far the policy is
    (nats) from the one that acted (`moved`) and from Learn's (`kl_to_learn`)."""
    features, z = agent.obs_encoder(batch["obs"]), batch["z"]
    row = {"value_loss": 0.5 * (agent.value(batch["obs"], z, features) - batch["returns"]).square().mean()}
    if train_actor:
        policy = agent.policy(features, z)
        log_ratio = policy.log_prob(batch["actions"]).sum(-1) - batch["log_probs"]
        ratio, advantages = log_ratio.exp(), batch["advantages"]
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        row["policy_loss"] = -torch.min(advantages * ratio, advantages * clipped).mean()
        row["kl_to_learn"] = gaussian_kl(policy, Normal(batch["learn_mean"], batch["std"])).mean()
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

    The actor stops for this rollout when it has moved `step_kl` from the policy that acted. While its divergence from the
    Learn policy, whose mean actions are `learn_mean`, exceeds `target_kl` it is only pulled back: Theorem 1's bound on how much of
    one pattern's gradient reaches another rests on D_KL(pi_theta || pi_Learn) <= E.
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
                    loss = loss + args.kl_coef * row["kl_to_learn"] + (row["policy_loss"] if strayed <= args.target_kl else 0.0)
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


class Reinforce(rollout.Trainer):
    """PPO with all patterns together, one pattern an episode, warm-started from Learn; can be stopped and continued exactly."""

    parts = ("agent", "reference", "optimizer", "bonus_encoder", "bonus_optimizer")

    def __init__(self, args: Args, env: LiberoVectorEnv, agent: Agent, encoder: PatternEncoder, alive: list[int], curriculum=None):
        if len(alive) == 1:  # no other pattern to keep apart from: Theorem 1's leash off, as in the paper's O2O-RL baseline
            args = dataclasses.replace(args, kl_coef=0.0, target_kl=math.inf)
        super().__init__(args, env, agent, agent.num_patterns)
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
        self.optimizer.param_groups[0]["lr"] = args.actor_lr * (1 - progress if args.anneal_lr else 1)
        std = args.std_start ** (1 - progress) * args.std_end**progress
        with torch.no_grad():
            agent.log_std.fill_(math.log(std))
            self.reference.log_std.fill_(math.log(std))
        shape = (args.num_steps, env.num_envs)
        obs, next_obs = (obs_buffer(args.num_steps, self.obs, device) for _ in range(2))
        actions, means = (torch.zeros(*shape, 7, device=device) for _ in range(2))
        z = torch.zeros(shape, dtype=torch.long, device=device)
        log_probs, rewards, terminated, done, bonus = (torch.zeros(shape, device=device) for _ in range(5))
        lengths, log_k, sample = [], math.log(len(self.alive)), compiled(Agent.sample, args.compile)
        began = time.perf_counter()
        for t in range(args.num_steps):
            obs[t] = random_shift(to_tensor(self.obs, device))  # the policy acts on the shifted picture, so the ratio is of one picture
            z[t] = torch.as_tensor(self.z)
            actions[t], means[t], log_probs[t] = sample(agent, obs[t], z[t])
            self.obs, reward, term, trunc, info = env.step(actions[t].clamp(-1, 1).cpu().numpy())
            ended = term | trunc
            next_obs[t] = to_tensor(self.obs, device)
            if ended.any():
                next_obs[t, ended] = to_tensor(info["final_obs"], device)[ended]
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
    job = rollout.Job("dlr_discover", Args)
    args, run, task = job.args, job.run, job.task
    needed = 4 if args.num_patterns == "auto" else args.num_patterns
    if len(job.demos) < needed:
        raise UserError(f"--num-patterns {args.num_patterns} needs at least {needed} demonstrations, but there are {len(job.demos)}")
    job.begin()
    demo_states = [observe_states(task, e.states) for e in job.demos]  # Discover's, whatever the policy sees
    layout = job.train_env.obs_layout
    paths = np.stack([along_path(obs, layout, args.discover_points) for obs in demo_states])

    # 1. Discover
    if run.stage == "start":
        k = args.num_patterns if args.num_patterns != "auto" else choose_num_patterns(args, paths, layout, run.progress.say)
        encoder, labels = discover(args, paths, layout, k, run.ticker("Discover", args.discover_steps, "ELBO {discover_elbo:.3f}", each=20))
        run.save("discover", num_patterns=k, encoder=encoder.state_dict(), labels=labels)
    k = run.checkpoint["num_patterns"]
    labels = np.asarray(run.checkpoint["labels"])
    encoder = PatternEncoder(paths.shape[-1], k).requires_grad_(False)
    encoder.load_state_dict(run.checkpoint["encoder"])
    patterns = np.array([episode_pattern(rows) for rows in labels])
    alive = [int(z) for z in np.unique(patterns)]
    strategies = [e.attrs.get("strategy", "") for e in job.demos]
    recovery = metrics.adjusted_rand_index(patterns, strategies) if all(strategies) else None
    counts = ", ".join(str(int((patterns == z).sum())) for z in alive)
    truth = "" if recovery is None else f"; adjusted Rand index against the true strategies {recovery:.2f}"
    run.progress.say(f"Discover: {len(alive)} of {k} patterns alive ({counts} demonstrations){truth}")

    # 2. Learn
    torch.manual_seed(args.seed + 1)
    agent = Agent(job.obs_encoder(), k, args.hidden).to(args.device)
    if run.stage == "discover":
        demo_obs, actions = job.observed_demos(), [e.actions for e in job.demos]
        tick = run.ticker("Learn", args.learn_epochs, "held-out loss {learn_held_out_loss:.2f}")
        learn(args, agent, demo_obs, actions, label_states(args, encoder, demo_states, labels), tick)
        rows = job.evaluate(agent.act, alive, "Learn", most=150)  # on the way: failures take long
        run.save("learn", agent=agent.state_dict(), learn_success=[row["success_rate"] for row in rows])
    agent.load_state_dict(run.checkpoint["agent"])

    # 3. Reinforce
    if run.stage in ("learn", "reinforce"):
        curriculum = Curriculum(job.demos, patterns, np.random.default_rng(args.seed + 3)) if args.curriculum == "reverse" else None
        job.train(Reinforce(args, job.train_env, agent, encoder, alive, curriculum), agent.act, alive, note)
    agent.load_state_dict(run.checkpoint["agent"])

    # Roll out, keep successes
    corpus, summary = job.roll_out(agent.act, alive)
    recognised = [encoder.recognise(along_path(rollout.trajectory_observations(task, e), layout, args.discover_points)) for e in corpus]
    confusion = metrics.confusion_matrix([e.attrs["pattern"] for e in corpus], recognised, k)
    plots.plot_leakage(run.folder / "figures" / "leakage.png", confusion, task.language)
    learn_success = run.checkpoint["learn_success"]
    history = np.array([[0.0] + [np.nan] * k, *run.checkpoint["history"]])
    history[0, 1 + np.array(alive)] = learn_success
    plots.plot_success(run.folder / "figures" / "success.png", history[:, 0], history[:, 1:], [(0, "Reinforce")], task.language)
    stages = {"learn": np.mean(learn_success), "reinforce": summary["success_rate"], "learn_per_pattern": learn_success}
    leakage = {"p_leak": metrics.p_leak(confusion), "confusion": confusion}
    run.finish(
        summary | {"leakage": leakage, "recovery": recovery, "stages": stages, "num_patterns": k, "alive": len(alive)},
        f"{len(corpus)} trajectories of {len(alive)} patterns, success {summary['success_rate']:.0%}, leakage {leakage['p_leak']:.0%}, "
        f"mean pairwise distance {summary['diversity']['mean_pairwise_distance']:.2f}",
    )
    view.write_report(run.folder, task, run.progress)


def note(logs: dict[str, float]) -> str:
    """What the progress bar shows of an iteration: success in all, and of each pattern that has finished episodes."""
    success = "--" if math.isnan(logs["charts/success"]) else f"{logs['charts/success']:.0%}"
    each = " ".join(f"{rate:.0%}" for name, rate in logs.items() if name.startswith("patterns/success_"))
    return f"success {success} ({each}) {logs['charts/SPS']:.0f} steps/s"


if __name__ == "__main__":
    run_command(main)
