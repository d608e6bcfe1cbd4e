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

import copy
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from torch import nn
from torch.distributions import Normal
from torch.utils.tensorboard import SummaryWriter

from common import metrics, plots, rollout
from common.cli import UserError, run_command
from common.libero import load_task, make_env
from common.libero.env import LiberoVectorEnv
from common.networks import Normalizer, PixelEncoder, compiled, make_obs_encoder, mlp, random_shift
from common.runs import Progress, load_checkpoint, make_run, resumed_args, rng_state, save_checkpoint, set_rng_state, versions, write_json
from common.tensors import TensorDict, join, obs_buffer, to_tensor


@dataclasses.dataclass
class Args:
    """Clone demonstrations of a LIBERO task with a Gaussian policy, improve it by PPO, and write a corpus."""

    task: str = "libero_90/KITCHEN_SCENE1_put_the_black_bowl_on_the_plate"
    """a LIBERO task: suite/index, suite/name, or any part of a name that is unique"""
    assets: str | None = None
    """LIBERO's asset folder, or standin (default: $LIBERO_ASSETS, else LIBERO's own, else a download, else stand-ins)"""
    seed: int = 1
    """seed of everything that is random"""
    resume: str | None = None
    """go on with the run in this folder, exactly where its last checkpoint left it"""
    run_folder: str = "runs"
    """where runs are written"""
    num_envs: int = 32
    """parallel environments"""
    torch_threads: int = 2
    """threads of the learner (results are reproducible for a fixed number)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto (CUDA, if there is a GPU; for few environments with states, cpu may be faster), cpu or cuda"""
    backend: Literal["auto", "cpu", "warp"] = "auto"
    """simulator: cpu (all cores), warp (MuJoCo Warp on --device) or auto (warp on a GPU from 256 environments on)"""
    compile: bool = False
    """compile acting and PPO's losses (CUDA)"""
    checkpoint_interval: int = 5
    """PPO iterations between checkpoints: what a kill can lose at most"""
    videos: bool = True
    """a video, where pictures can be rendered"""
    corpus_images: int = 0
    """also store pictures of so many pixels a side in the corpus, agentview's and the wrist's (0: none; common.libero.render adds them)"""
    obs: Literal["state", "pixels"] = "state"
    """what the policy sees: the simulator's state, or the third-person picture and proprioception"""
    image_size: int = 84
    """pixels of a picture's side"""

    # Demonstrations
    demos: str = "auto"
    """auto (LIBERO's human files if they are on disk, else scripted), scripted, or an HDF5 file in LIBERO's layout"""
    num_demos: int = 48
    """scripted demonstrations to generate (cached)"""
    demo_noise: float = 0.1
    """action noise of scripted demonstrations (standard deviation, in units of the action range)"""

    # Learn
    learn_epochs: int = 150
    """at most so many epochs of behaviour cloning"""
    learn_patience: int = 15
    """stop after so many epochs without a better held-out loss"""
    learn_batch: int = 512
    """transitions a gradient step of behaviour cloning"""
    learn_lr: float = 1e-3
    """learning rate of behaviour cloning"""
    learn_noise: float = 0.1
    """Gaussian noise on cloned observations, in units of their standard deviation: teaches the way back to the demonstrations"""
    hidden: int = 256
    """width of the hidden layers"""

    # Reinforce
    total_steps: int = 300_000
    """environment steps of PPO"""
    num_steps: int = 128
    """steps an environment takes between updates"""
    gamma: float = 0.99
    """discount: success at step T is worth gamma^(T-1)"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    actor_lr: float = 4e-5
    """learning rate of the policy"""
    anneal_lr: bool = False
    """let the policy's learning rate fall linearly to 0"""
    critic_lr: float = 1e-3
    """learning rate of the value function"""
    update_epochs: int = 5
    """passes over each rollout"""
    num_minibatches: int = 8
    """minibatches a pass"""
    clip_coef: float = 0.2
    """PPO's clip range"""
    std_start: float = 0.15
    """standard deviation of the policy when Reinforce begins, in units of the action range"""
    std_end: float = 0.08
    """and when it ends (geometric schedule): evaluation and the corpus take the mean action, so training must come near it"""
    max_grad_norm: float = 0.5
    """gradients are clipped to this norm"""
    step_kl: float = 0.1
    """updates of one rollout stop when the policy has moved so far (nats) from the one that acted"""
    critic_warmup: int = 5
    """iterations in which only the value function learns"""

    # Roll out
    eval_episodes: int = 50
    """official init states to evaluate the policy on (at most 50)"""
    corpus_episodes: int = 20
    """successful trajectories in the corpus"""


def validate(args: Args) -> None:
    """Refuse flag values that cannot work, before anything has begun."""
    counts = "num_envs torch_threads checkpoint_interval num_demos learn_epochs learn_batch hidden"
    counts += " total_steps num_steps update_epochs num_minibatches eval_episodes corpus_episodes"
    rules = [
        (lambda v: v >= 1, "at least 1", counts),
        (lambda v: 32 <= v <= 512, "between 32 and 512", "image_size"),
        (lambda v: v == 0 or 32 <= v <= 512, "0 or between 32 and 512", "corpus_images"),
        (lambda v: v > 0, "more than 0", "learn_lr actor_lr critic_lr clip_coef max_grad_norm step_kl"),
        (lambda v: 0.02 <= v <= 1.5, "between 0.02 and 1.5", "std_start std_end"),  # what Agent.policy clamps to, at least
        (lambda v: 0 <= v < math.inf, "at least 0", "seed demo_noise learn_noise learn_patience critic_warmup"),
        (lambda v: 0 <= v <= 1, "between 0 and 1", "gamma gae_lambda"),
    ]
    for holds, wanted, names in rules:
        for name in names.split():
            if not holds(value := getattr(args, name)):
                raise UserError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")
    if args.num_minibatches > (batch := args.num_steps * args.num_envs):
        raise UserError(f"--num-minibatches {args.num_minibatches} is more than the {batch} steps of --num-steps x --num-envs")


# ---------------------------------------------------------------------------------------------- the policy


class Agent(nn.Module):
    """pi_theta(a | s), a diagonal Gaussian, and V(s). The gripper is an action dimension of which LIBERO takes the sign."""

    def __init__(self, obs_encoder: Normalizer | PixelEncoder, hidden: int, action_size: int = 7):
        super().__init__()
        self.obs_encoder = obs_encoder  # observations -> features (N, size)
        self.actor = mlp([obs_encoder.size, hidden, hidden, hidden, action_size], out_std=0.01)
        self.critic = mlp([obs_encoder.size, hidden, hidden, 1], out_std=1.0)
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

    def value(self, features: torch.Tensor) -> torch.Tensor:
        """V of features (N, size), (N,). It reads the policy's features and doesn't train them: that would move the policy."""
        return self.critic(features.detach()).squeeze(-1)


# ---------------------------------------------------------------------------------------------- Learn


def learn(args: Args, agent: Agent, demos: list[np.ndarray | dict], actions: list[np.ndarray], tick: Callable):
    """Behaviour cloning: maximise log pi(a | s) on demonstrations, observations (T_i, ...) and actions (T_i, 7).

    A tenth of the episodes is held out; the weights of the best held-out loss are kept, and training stops after
    `learn_patience` epochs without a better one. `tick(epoch, losses)` is called after each epoch.
    """
    torch.manual_seed(args.seed + 1)
    agent.obs_encoder.fit(join(demos))
    held_out = np.arange(len(demos)) < (max(1, len(demos) // 10) if len(demos) > 1 else 0)

    def tensors(mask):
        obs, act = zip(*[(o, a) for o, a, m in zip(demos, actions, mask, strict=True) if m], strict=True)
        return join(obs, agent.device), join(act, agent.device).float()

    obs, act = tensors(~held_out)
    test_obs, test_act = tensors(held_out if held_out.any() else ~held_out)  # a single demonstration
    optimizer = torch.optim.Adam([*agent.obs_encoder.parameters(), *agent.actor.parameters(), agent.log_std], lr=args.learn_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.learn_epochs, eta_min=args.learn_lr / 20)
    best, best_loss, best_epoch = copy.deepcopy(agent.state_dict()), math.inf, 0
    for epoch in range(args.learn_epochs):
        losses, batches = [], torch.randperm(len(obs), device=agent.device).split(args.learn_batch)
        for batch in batches:
            features = agent.obs_encoder(agent.obs_encoder.augment(obs[batch], args.learn_noise))
            loss = -agent.policy(features).log_prob(act[batch]).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        schedule.step()
        with torch.no_grad():
            test_loss = -agent.policy(agent.obs_encoder(test_obs)).log_prob(test_act).sum(-1).mean().item()
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
    row = {"value_loss": 0.5 * (agent.value(features) - batch["returns"]).square().mean()}
    if train_actor:
        policy = agent.policy(features)
        log_ratio = policy.log_prob(batch["actions"]).sum(-1) - batch["log_probs"]
        ratio, advantages = log_ratio.exp(), batch["advantages"]
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        row["policy_loss"] = -torch.min(advantages * ratio, advantages * clipped).mean()
        with torch.no_grad():
            row |= {
                "kl_to_learn": gaussian_kl(policy, Normal(batch["learn_mean"], batch["std"])).mean(),
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


class Reinforce:
    """PPO, warm-started from Learn; can be stopped and continued exactly."""

    def __init__(self, args: Args, env: LiberoVectorEnv, agent: Agent):
        self.args, self.env, self.agent = args, env, agent
        self.reference = copy.deepcopy(agent).requires_grad_(False)  # the Learn policy
        agent.log_std.requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            [
                {"params": [*agent.obs_encoder.parameters(), *agent.actor.parameters()], "lr": args.actor_lr},
                {"params": agent.critic.parameters(), "lr": args.critic_lr},
            ],
            eps=1e-5,
        )
        self.num_iterations = max(1, args.total_steps // (args.num_steps * env.num_envs))
        self.iteration = 0
        torch.manual_seed(args.seed + 2)
        self.outcomes: deque[float] = deque(maxlen=50)  # success of the last episodes
        self.history: list[list[float]] = []  # environment steps, then success
        self.obs, _ = env.reset(seed=args.seed)

    def run_iteration(self) -> dict[str, float]:
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
        log_probs, rewards, terminated, done = (torch.zeros(shape, device=device) for _ in range(4))
        lengths, sample, began = [], compiled(Agent.sample, args.compile), time.perf_counter()
        for t in range(args.num_steps):
            obs[t] = random_shift(to_tensor(self.obs, device))  # the policy acts on the shifted picture, so the ratio is of one picture
            actions[t], means[t], log_probs[t] = sample(agent, obs[t])
            self.obs, reward, term, trunc, info = env.step(actions[t].clamp(-1, 1).cpu().numpy())
            ended = term | trunc
            next_obs[t] = to_tensor(self.obs, device)
            if ended.any():
                next_obs[t, ended] = to_tensor(info["final_obs"], device)[ended]
            rewards[t], terminated[t], done[t] = (torch.as_tensor(x.astype(np.float32)) for x in (reward, term, ended))
            self.outcomes.extend(term[ended].astype(float))
            lengths += list(info["final_length"][ended]) if ended.any() else []
        rollout_seconds, began = time.perf_counter() - began, time.perf_counter()

        obs = obs.flatten(0, 1)
        with torch.no_grad():
            values = agent.value(agent.obs_encoder(obs)).reshape(shape)
            next_values = agent.value(agent.obs_encoder(next_obs.flatten(0, 1))).reshape(shape)
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
        settled = self.iteration * args.num_steps >= env.max_steps  # before that, only successes have had time to end
        success = float(np.mean(self.outcomes)) if self.outcomes and settled else math.nan
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

    @property
    def env_steps(self) -> int:
        return self.iteration * self.args.num_steps * self.env.num_envs

    def state_dict(self) -> dict:
        """Everything that the rest of the training depends on."""
        return {
            "agent": self.agent.state_dict(),
            "reference": self.reference.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
            "history": self.history,
            "outcomes": list(self.outcomes),
            "env": self.env.snapshot(),
            "torch_rng": rng_state(self.agent.device),
        }

    def load_state_dict(self, state: dict) -> None:
        for name in ("agent", "reference", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.iteration, self.history = state["iteration"], state["history"]
        self.outcomes = deque(state["outcomes"], maxlen=50)
        self.env.restore(state["env"])
        self.obs = self.env.observations()
        set_rng_state(state["torch_rng"], self.agent.device)


# ---------------------------------------------------------------------------------------------- the whole job


def main() -> None:
    args = tyro.cli(Args)
    run = None
    if args.resume:
        run = Path(args.resume)
        args = resumed_args(run, "gaussian_ppo", Args)
    validate(args)
    args = rollout.choose_devices(args)
    torch.set_num_threads(args.torch_threads)
    began, progress = time.time(), Progress()
    task = load_task(args.task, args.assets)
    progress.say(f"task {task.id}: {task.language}; simulator {args.backend}, learner on {args.device}")
    renderer, videos = rollout.find_renderer(args.obs, args.videos, args.corpus_images, progress)
    how = {"obs": args.obs, "image_size": args.image_size, "backend": args.backend, "device": args.device}
    train_env = make_env(task, args.num_envs, seed=args.seed, **how)
    eval_env = make_env(task, min(args.num_envs, rollout.EVAL_ENVS), seed=args.seed, **how, autoreset_mode=AutoresetMode.DISABLED)
    demos, demo_source = rollout.load_demos(args.demos, task, args.num_demos, args.demo_noise, args.seed, progress)
    checkpoint = {"script": "gaussian_ppo", "task": task.id, "stage": "start", "seconds": 0.0}
    if run is None:
        run = make_run(args.run_folder, task.id, "gaussian_ppo", args)
        config = {"script": "gaussian_ppo", "args": dataclasses.asdict(args), "versions": versions()}
        write_json(run / "config.json", config | {"assets": task.assets, "demos": demo_source, "renderer": renderer})
        save_checkpoint(run / "checkpoint.pt", checkpoint)
    else:
        checkpoint = load_checkpoint(run / "checkpoint.pt", "gaussian_ppo")
        if (found := checkpoint.get("task", task.id)) != task.id:
            raise UserError(f"{run / 'checkpoint.pt'} is not this run's: it is of {found}")
        progress.say(f"resuming after stage {checkpoint['stage']!r}")
    progress.say(f"run folder {run}")
    writer = SummaryWriter(str(run))

    def save(stage: str, **content) -> None:
        nonlocal began
        checkpoint.update(content, stage=stage, seconds=checkpoint["seconds"] + time.time() - began)
        began = time.time()
        save_checkpoint(run / "checkpoint.pt", checkpoint)

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    # 1. Learn
    torch.manual_seed(args.seed + 1)
    agent = Agent(make_obs_encoder(train_env.single_observation_space), args.hidden).to(args.device)
    if checkpoint["stage"] == "start":
        demo_obs = rollout.observe_demos(train_env, demos, progress)
        progress.stage("Learn", args.learn_epochs)

        def learn_tick(epoch: int, values: dict[str, float]) -> None:
            log(values, epoch)
            progress.update(1, f"held-out loss {values['learn/held_out_loss']:.2f}")

        learn(args, agent, demo_obs, [e.actions for e in demos], learn_tick)
        rows, _ = rollout.evaluate(eval_env, agent.act, [0], args.eval_episodes, progress, "evaluate Learn")
        save("learn", agent=agent.state_dict(), learn_success=rows[0]["success_rate"])
    agent.load_state_dict(checkpoint["agent"])
    learn_success = checkpoint["learn_success"]
    progress.say(f"Learn: success {learn_success:.0%}")

    # 2. Reinforce
    if checkpoint["stage"] in ("learn", "reinforce"):
        trainer = Reinforce(args, train_env, agent)
        if checkpoint["stage"] == "reinforce":
            trainer.load_state_dict(checkpoint["trainer"])
        progress.stage("Reinforce", trainer.num_iterations, trainer.iteration)
        while trainer.iteration < trainer.num_iterations:
            logs = trainer.run_iteration()
            log(logs, trainer.env_steps)
            success = "--" if math.isnan(logs["charts/success"]) else f"{logs['charts/success']:.0%}"
            progress.update(1, f"success {success} {logs['charts/SPS']:.0f} steps/s")
            if trainer.iteration % args.checkpoint_interval == 0 and trainer.iteration < trainer.num_iterations:
                save("reinforce", trainer=trainer.state_dict())
        checkpoint.pop("trainer", None)
        save("roll out", agent=agent.state_dict(), history=trainer.history, env_steps=trainer.env_steps)
    agent.load_state_dict(checkpoint["agent"])

    # Roll out, keep successes
    per_pattern, _ = rollout.evaluate(eval_env, agent.act, [0], args.eval_episodes, progress, "evaluate Reinforce")
    success = per_pattern[0]["success_rate"]
    progress.say(f"Reinforce: success {success:.0%}")
    corpus = rollout.collect_corpus(eval_env, agent.act, [0], args.corpus_episodes, args.seed + 4, "gaussian_ppo", progress)
    if not corpus:
        raise UserError(f"no rollout succeeded, so there is no corpus to write; the logs are in {run}")
    patterns = [e.attrs["pattern"] for e in corpus]
    features = rollout.path_features(task, corpus)
    distances = metrics.pairwise_dtw(features)
    within, between = metrics.within_between(distances, patterns)
    consistency = rollout.measure_consistency(eval_env, agent.act, [0], args.eval_episodes, args.demo_noise, args.seed + 5, progress)
    rollout.write_corpus(run, task, corpus, "gaussian_ppo", demo_source, args.corpus_images, args.assets, progress)
    rollout.plot_corpus(run, task, features, patterns, distances)
    history = np.array([[0.0, learn_success], *checkpoint["history"]])
    plots.plot_success(run / "figures" / "success.png", history[:, 0], history[:, 1:], [(0, "Reinforce")], task.language)
    if videos:
        rollout.make_videos(run, task, corpus, renderer, progress)
    summary = {
        "task": task.id,
        "success_rate": success,
        "per_pattern": per_pattern,
        "diversity": metrics.diversity(features) | {"dtw_within": within, "dtw_between": between},
        "smoothness": metrics.smoothness([e.proprio["ee_pos"] for e in corpus], [e.actions for e in corpus]),
        "consistency": consistency,
        "stages": {"learn": learn_success, "reinforce": success},
        "corpus_episodes": len(corpus),
        "env_steps": checkpoint["env_steps"],
        "wall_seconds": checkpoint["seconds"] + time.time() - began,
        "demos": demo_source,
        "assets": task.assets,
        "renderer": renderer,
        "versions": versions(),
    }
    write_json(run / "summary.json", summary)
    save("done")
    writer.close()
    progress.close()
    progress.say(
        f"done: {len(corpus)} trajectories, success {success:.0%}, "
        f"mean pairwise distance {summary['diversity']['mean_pairwise_distance']:.2f}; see {run}"
    )


if __name__ == "__main__":
    run_command(main)
