"""Behaviour cloning, then PPO with a Gaussian policy on the sparse success reward, as a data engine for VLAs.

The baseline of two papers: "O2O-RL" of Discover, Learn, Reinforce (arXiv 2511.19528), and the Gaussian RL of diffusion RL as a
data engine (arXiv 2509.19752). It is dlr_discover.py without patterns, and everything else alike:

1. Learn: behaviour cloning of a policy pi(a | s) on successful demonstrations.
2. Reinforce: PPO on the sparse success reward.

Then it rolls the policy out and writes the successful trajectories in LIBERO's HDF5 layout.

    python gaussian_ppo.py
    python gaussian_ppo.py --resume runs/RUN

docs/gaussian_ppo.md explains every metric and implementation detail.
"""

from __future__ import annotations

if __name__ == "__main__":
    import common.start  # noqa: F401  (Ctrl-C amid the imports below is one line)

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
from torch import nn
from torch.distributions import Normal

from common import plots, rollout, view
from common.cli import Count, Fraction, NotNegative, Positive, PositiveOrInf, Range, UserError, run_command
from common.job import Job, JobArgs, Trainer, switch_weights
from common.libero.env import LiberoVectorEnv
from common.networks import Normalizer, PixelEncoder, compiled, mlp, random_shift
from common.tensors import TensorDict, join, obs_buffer, to_tensor


@dataclasses.dataclass
class Args(JobArgs):
    """Clone demonstrations of a LIBERO task with a Gaussian policy, improve it by PPO, and write a corpus."""

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
    actor_lr: Positive = 2e-5
    """learning rate of the policy: of few successes a rollout, larger steps follow chance"""
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
    step_kl: PositiveOrInf = 0.1
    """updates of one rollout stop when the policy has moved so far (nats) from the one that acted"""
    critic_warmup: Annotated[int, Range(0)] = 5
    """iterations in which only the value function learns"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_minibatches > (batch := self.num_steps * self.num_envs):
            raise UserError(f"--num-minibatches {self.num_minibatches} is more than the {batch} steps of --num-steps x --num-envs")


# ---------------------------------------------------------------------------------------------- the policy


class Agent(nn.Module):
    """pi_theta(a | s), a diagonal Gaussian, and V(s). The gripper is an action dimension of which LIBERO takes the sign."""

    def __init__(self, obs_encoder: Normalizer | PixelEncoder, hidden: int, action_size: int = 7):
        super().__init__()
        self.obs_encoder = obs_encoder  # observations -> features (N, size)
        self.actor = mlp([obs_encoder.size, hidden, hidden, hidden, action_size], out_std=0.01)
        self.critic = mlp([obs_encoder.critic_size, hidden, hidden, 1], out_std=1.0)
        self.log_std = nn.Parameter(torch.full((action_size,), -1.6))  # learned by Learn, scheduled by Reinforce

    def policy(self, features: torch.Tensor) -> Normal:
        """features (N, size) -> distribution of actions (N, 7)."""
        mean = self.actor(features)
        return Normal(mean, self.log_std.clamp(-4.0, 0.5).exp().expand_as(mean))

    @property
    def device(self) -> torch.device:
        return self.log_std.device

    @torch.no_grad()
    def act(self, obs: np.ndarray | dict, patterns: np.ndarray) -> np.ndarray:
        """The mean action of each environment, (N, 7) in [-1, 1]. `patterns`, which `common.rollout` commands, has no meaning here."""
        return self.policy(self.obs_encoder(to_tensor(obs, self.device))).mean.clamp(-1, 1).cpu().numpy()

    @torch.no_grad()
    def sample(self, obs: torch.Tensor | TensorDict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For observations (N, ...) actions (N, 7), the policy's means (N, 7), and the actions' log-probabilities (N,)."""
        policy = self.policy(self.obs_encoder(obs))
        actions = policy.sample()
        return actions, policy.mean, policy.log_prob(actions).sum(-1)

    def value(self, obs: torch.Tensor | TensorDict, features: torch.Tensor | None = None) -> torch.Tensor:
        """V of observations (N, ...), (N,). It reads the policy's features and doesn't train them: that would move the policy."""
        return self.critic(self.obs_encoder.critic_view(obs, features)).squeeze(-1)


# ---------------------------------------------------------------------------------------------- Learn


def learn(args: Args, agent: Agent, demos: list[np.ndarray | dict], actions: list[np.ndarray], tick: Callable):
    """Behaviour cloning: maximise log pi(a | s) on demonstrations, observations (T_i, ...) and actions (T_i, 7).

    LIBERO takes the gripper's sign: its term is log P(sign) with P(close) = sigmoid(4 x its mean), weighted by `switch_weights`.
    A tenth of the episodes is held out; the weights of the best held-out loss are kept, and training stops after `learn_patience`
    epochs without a better one. `tick(epoch, losses)` is called after each epoch.
    """
    torch.manual_seed(args.seed + 1)
    agent.obs_encoder.fit(join(demos))
    held_out = np.arange(len(demos)) < (max(1, len(demos) // 10) if len(demos) > 1 else 0)

    weights = [switch_weights(a, args.learn_switch_weight) for a in actions]

    def tensors(mask):
        columns = ([rows for rows, m in zip(column, mask, strict=True) if m] for column in (demos, actions, weights))
        obs, act, weight = (join(column, agent.device) for column in columns)
        return obs, act.float(), weight

    obs, act, weight = tensors(~held_out)
    test = tensors(held_out if held_out.any() else ~held_out)  # a single demonstration

    def negative_log_likelihood(obs, act, weight):
        policy = agent.policy(agent.obs_encoder(obs))
        gripper = nn.functional.logsigmoid(4.0 * policy.mean[:, -1] * act[:, -1].sign())
        return -(policy.log_prob(act)[:, :-1].sum(-1) + weight * gripper).mean()

    optimizer = torch.optim.Adam([*agent.obs_encoder.parameters(), *agent.actor.parameters(), agent.log_std], lr=args.learn_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.learn_epochs, eta_min=args.learn_lr / 20)
    best, best_loss, best_epoch = copy.deepcopy(agent.state_dict()), math.inf, 0
    for epoch in range(args.learn_epochs):
        losses, batches = [], torch.randperm(len(obs), device=agent.device).split(args.learn_batch)
        for batch in batches:
            augmented = agent.obs_encoder.augment(obs[batch], args.learn_noise)
            loss = negative_log_likelihood(augmented, act[batch], weight[batch])
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


def gaussian_kl(p: Normal, q: Normal) -> torch.Tensor:
    """KL(p || q) summed over action dimensions, (N,)."""
    return torch.distributions.kl_divergence(p, q).sum(-1)


def ppo_losses(args: Args, agent: Agent, batch: dict, train_actor: bool) -> dict[str, torch.Tensor]:
    """A minibatch's `value_loss`, and if `train_actor` also its `policy_loss` and, for the stops and the log, how far the policy is
    (nats) from the one that acted (`moved`) and from Learn's (`kl_to_learn`)."""
    features = agent.obs_encoder(batch["obs"])
    row = {"value_loss": 0.5 * (agent.value(batch["obs"], features) - batch["returns"]).square().mean()}
    if train_actor:
        policy = agent.policy(features)
        log_ratio = policy.log_prob(batch["actions"]).sum(-1) - batch["log_probs"]
        ratio, advantages = log_ratio.exp(), batch["advantages"]
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        row["policy_loss"] = -torch.min(advantages * ratio, advantages * clipped).mean()
        std = torch.full_like(policy.mean, args.std_start)
        with torch.no_grad():
            row |= {
                "kl_to_learn": gaussian_kl(Normal(policy.mean, std), Normal(batch["learn_mean"], std)).mean(),
                "moved": gaussian_kl(policy, Normal(batch["mean"], batch["std"])).mean(),
                "approx_kl": ((ratio - 1) - log_ratio).mean(),
                "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
                "ratio": ratio.mean(),
            }
    return row


def ppo_update(args: Args, agent: Agent, optimizer, batch: dict, train_actor: bool) -> dict[str, float]:
    """One PPO update (Schulman et al. 2017) on a flattened rollout: obs, actions, log_probs, mean, std, advantages, returns.

    The actor stops for this rollout when it has moved `step_kl` from the policy that acted. How far it has come from the Learn
    policy, whose mean actions are `learn_mean`, is only logged.
    """
    size, losses = len(batch["obs"]), compiled(ppo_losses, args.compile)
    logs: dict[str, list[torch.Tensor]] = {}  # read at the end: a GPU would be waited for
    for _ in range(args.update_epochs):
        for rows in torch.randperm(size, device=agent.device).tensor_split(args.num_minibatches):
            row = losses(args, agent, {name: value[rows] for name, value in batch.items()}, train_actor)
            loss = row["value_loss"]
            if train_actor:
                train_actor = row.pop("moved").item() <= args.step_kl  # the one time that a GPU is waited for
                if train_actor:
                    loss = loss + row["policy_loss"]
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


class Reinforce(Trainer):
    """PPO, warm-started from Learn; can be stopped and continued exactly."""

    parts = ("agent", "reference", "optimizer")

    def __init__(self, args: Args, env: LiberoVectorEnv, agent: Agent):
        super().__init__(args, env, agent)
        self.reference = copy.deepcopy(agent).requires_grad_(False)  # the Learn policy
        agent.log_std.requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            [
                {"params": [*agent.obs_encoder.parameters(), *agent.actor.parameters()], "lr": args.actor_lr},
                {"params": agent.critic.parameters(), "lr": args.critic_lr},
            ],
            eps=1e-5,
        )
        self.obs, _ = env.reset(seed=args.seed)

    def iterate(self) -> dict[str, float]:
        """Roll out `num_steps` steps in every environment, then update. Returns what to log."""
        args, env, agent, device = self.args, self.env, self.agent, self.agent.device
        progress = self.iteration / self.num_iterations
        self.optimizer.param_groups[0]["lr"] = args.actor_lr * (1 - progress if args.anneal_lr else 1)
        fallen = min(1.0, 1.5 * progress)  # the last third of the steps is for what the mean action can't do yet
        std = args.std_start ** (1 - fallen) * args.std_end**fallen
        with torch.no_grad():
            agent.log_std.fill_(math.log(std))
            self.reference.log_std.fill_(math.log(std))
        shape = (args.num_steps, env.num_envs)
        look = agent.obs_encoder.look  # of pictures, where an estimator reads them, its estimate is kept
        seen = look(to_tensor(self.obs, device))
        obs, next_obs = (obs_buffer(args.num_steps, seen) for _ in range(2))
        actions, means = (torch.zeros(*shape, 7, device=device) for _ in range(2))
        log_probs, rewards, terminated, done = (torch.zeros(shape, device=device) for _ in range(4))
        lengths, sample, began = [], compiled(Agent.sample, args.compile), time.perf_counter()
        with rollout.acting(env):
            for t in range(args.num_steps):
                obs[t] = random_shift(seen)  # pictures: the policy acts on the shifted one, so the ratio is of one picture
                actions[t], means[t], log_probs[t] = sample(agent, obs[t])
                self.obs, reward, term, trunc, info = env.step(actions[t].clamp(-1, 1).cpu().numpy())
                ended = term | trunc
                next_obs[t] = seen = look(to_tensor(self.obs, device))
                if ended.any():
                    next_obs[t, ended] = look(to_tensor(info["final_obs"], device)[ended])
                rewards[t], terminated[t], done[t] = (torch.as_tensor(x.astype(np.float32)) for x in (reward, term, ended))
                self.outcomes[0].extend(term[ended].astype(float))
                lengths += list(info["final_length"][ended]) if ended.any() else []
        rollout_seconds, began = time.perf_counter() - began, time.perf_counter()

        obs = obs.flatten(0, 1)
        with torch.no_grad():
            values = agent.value(obs).reshape(shape)
            next_values = agent.value(next_obs.flatten(0, 1)).reshape(shape)
            learn_means = self.reference.policy(self.reference.obs_encoder(obs)).mean
        advantages = gae(rewards, values, next_values, terminated, done, args.gamma, args.gae_lambda)
        returns = (advantages + values).flatten()
        batch = {
            "obs": obs,
            "actions": actions.flatten(0, 1),
            "log_probs": log_probs.flatten(),
            "mean": means.flatten(0, 1),
            "learn_mean": learn_means,
            "std": torch.full_like(means.flatten(0, 1), std),
            "advantages": ((advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-6)).flatten(),
            "returns": returns,
        }
        losses = ppo_update(args, agent, self.optimizer, batch, train_actor=self.iteration >= args.critic_warmup)
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
            "charts/policy_std": std,
            "charts/learning_rate": self.optimizer.param_groups[0]["lr"],
            "losses/explained_variance": float(1 - (returns - values.flatten()).var() / variance) if variance > 0 else math.nan,
        }
        return charts | {f"losses/{name}": value for name, value in losses.items()}


# ---------------------------------------------------------------------------------------------- the whole job


def main() -> None:
    job = Job("gaussian_ppo", Args)
    args, run = job.args, job.run
    job.begin()

    # 1. Learn
    torch.manual_seed(args.seed + 1)
    agent = Agent(job.obs_encoder(), args.hidden).to(args.device)
    if run.stage == "start":
        demo_obs, actions = job.observed_demos(agent.obs_encoder), [e.actions for e in job.demos]
        learn(args, agent, demo_obs, actions, run.ticker("Learn", args.learn_epochs, "held-out loss {learn_held_out_loss:.2f}"))
        (row,), _ = job.evaluate(agent.act, [0], "Learn")
        run.save("learn", agent=agent.state_dict(), learn_success=row["success_rate"])
    agent.load_state_dict(run.checkpoint["agent"])

    # 2. Reinforce
    if run.stage in ("learn", "reinforce"):
        job.train(Reinforce(args, job.train_env, agent), agent.act, [0], note)
    agent.load_state_dict(run.checkpoint["agent"])

    # Roll out, keep successes
    _, summary = job.roll_out(agent.act, [0])
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
