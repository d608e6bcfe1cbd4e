"""gaussian_ppo: each stage against closed forms and a problem with a known answer; the whole job, killed and resumed; bad input."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import diffusion_ppo
import dlr_discover
import gaussian_ppo
from common import rollout, runs
from common.cli import UserError, run_command
from common.data import check_file, read_attrs, read_episodes
from common.job import Job, Trainer, choose_devices, load_demos, switch_weights
from common.libero import make_env
from common.libero.make import choose_physics
from common.networks import Normalizer
from common.runs import Progress, load_checkpoint, save_checkpoint, versions, write_json
from gaussian_ppo import Agent, Args, Reinforce, gaussian_kl

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent


def weights(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------- options


def options(script: str) -> dict[str, tuple[str, str]]:
    """Default (as source) and docstring of each option of a script."""
    body = next(node for node in ast.parse((ROOT / f"{script}.py").read_text()).body if getattr(node, "name", "") == "Args").body
    found = {}
    for field, text in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign):
            found[field.target.id] = ast.unparse(field.value), text.value.value
    return found


CHAIN = {"actor_lr", "clip_coef", "std_start"}  # what has another size or meaning for a chain of denoising steps


@pytest.mark.parametrize(
    "script, other, excepted",
    [
        ("gaussian_ppo", "dlr_discover", {"actor_lr"}),
        ("diffusion_ppo", "dlr_discover", CHAIN | {"kl_coef"}),
        ("diffusion_ppo", "gaussian_ppo", CHAIN),
    ],
)
def test_shared_options_are_the_same_in_every_script(script, other, excepted):
    mine, theirs = options(script), options(other)
    shared = mine.keys() & theirs.keys()
    assert len(shared) >= 18 and excepted <= shared
    assert {name for name in shared if mine[name] != theirs[name]} == excepted
    if script == "gaussian_ppo":
        assert mine.keys() <= theirs.keys()  # it has nothing of its own


@pytest.mark.parametrize("script", [gaussian_ppo, dlr_discover, diffusion_ppo])
def test_a_run_from_before_a_flag_is_continued_without_what_it_does(script):
    args = runs.stored_args(script.Args, {"seed": 3})
    assert args.seed == 3 and args.near_field == 0 and args.train_encoder == "policy" and getattr(args, "learn_switch_weight", 1) == 1
    assert runs.stored_args(script.Args, {"near_field": 0.05}).near_field == 0.05 and script.Args().near_field > 0


@pytest.mark.parametrize(
    "gpu, given, chosen",
    [
        (False, {}, ("cpu", "cpu")),
        (False, {"num_envs": 4096}, ("cpu", "cpu")),
        (False, {"device": "cpu", "backend": "warp"}, ("cpu", "warp")),  # for tests
        (True, {}, ("cuda", "cpu")),  # few environments
        (True, {"backend": "warp"}, ("cuda", "warp")),
        (True, {"device": "cuda", "backend": "cpu", "num_envs": 4096}, ("cuda", "cpu")),
        (True, {"device": "cpu", "num_envs": 4096}, ("cpu", "cpu")),
        (True, {"obs": "pixels", "backend": "warp"}, ("cuda", "warp")),
    ],
)
def test_what_auto_means(monkeypatch, gpu, given, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    checks = torch.distributions.Distribution
    monkeypatch.setattr(checks, "_validate_args", True)
    args = choose_devices(Args(**given))
    assert (args.device, args.backend) == chosen and checks._validate_args == (chosen[0] == "cpu")
    assert args.physics == choose_physics("auto", args.backend)
    seen = {"cpu": ("small", 64), "cuda": ("resnet18", 84)}
    assert (args.encoder, args.image_size) == seen[args.device]
    auto = {"device": "auto", "backend": "auto", "physics": "auto", "encoder": "auto", "image_size": 0}
    assert dataclasses.replace(args, **auto) == dataclasses.replace(Args(**given), **auto)
    assert choose_devices(args) == args  # so that a resumed run is where it was


@pytest.mark.parametrize("script", [dlr_discover, gaussian_ppo, diffusion_ppo], ids=lambda script: script.__name__)
def test_no_gpu_to_learn_on(capsys, tmp_path, monkeypatch, script):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags in ("--device cuda", "--backend warp"):
        line = refused(script, capsys, tmp_path, "--run-folder", tmp_path / "runs", *flags.split())
        assert f"{flags}: torch finds no GPU here" in line
    for flags in ("--compile", "--compile --device cpu"):
        assert "--compile is for CUDA" in refused(script, capsys, tmp_path, "--run-folder", tmp_path / "runs", *flags.split())


# ---------------------------------------------------------------------------------------------- Learn


def linear_demos(number, seed=0, noise=0.02):
    """Demonstrations of actions linear in the observation."""
    rng = np.random.default_rng(seed)
    coefficients = np.random.default_rng(5).normal(size=(6, 7)) * 0.2
    demos = [rng.normal(size=(30, 6)).astype(np.float32) for _ in range(number)]
    return demos, [o @ coefficients + noise * rng.normal(size=(30, 7)) for o in demos], coefficients


def test_learn_recovers_a_linear_policy_and_its_noise():
    demos, actions, coefficients = linear_demos(60, noise=0.15)
    agent = Agent(Normalizer(6), 64)
    critic = weights(agent.critic)
    args = Args(hidden=64, learn_epochs=60, learn_batch=128, learn_lr=2e-3, learn_patience=60, learn_switch_weight=1)
    gaussian_ppo.learn(args, agent, demos, actions, lambda *_: None)
    assert same(weights(agent.critic), critic)  # the value function is Reinforce's
    obs = np.random.default_rng(9).normal(size=(500, 6)).astype(np.float32)
    with torch.no_grad():
        policy = agent.policy(agent.obs_encoder(torch.as_tensor(obs)))
    truth, mean = obs @ coefficients, policy.mean.numpy()
    assert ((mean - truth)[:, :6] ** 2).mean() < 0.05 * (truth[:, :6] ** 2).mean()
    np.testing.assert_allclose(policy.stddev[0, :6].numpy(), 0.15, rtol=0.15)
    likely = norm.cdf(truth[:, 6] / 0.15)  # that the gripper closes
    assert np.abs(1 / (1 + np.exp(-4 * mean[:, 6])) - likely).mean() < 0.08
    np.testing.assert_array_equal(agent.act(obs, np.zeros(500, int)), policy.mean.numpy().clip(-1, 1))


def test_learn_stops_early_and_keeps_the_best_weights():
    demos, actions, _ = linear_demos(10, noise=0.5)  # little data, much noise: it overfits
    args = Args(hidden=64, learn_epochs=300, learn_batch=64, learn_lr=3e-3, learn_patience=7, learn_switch_weight=1)
    agent, seen = Agent(Normalizer(6), 64), []
    gaussian_ppo.learn(args, agent, demos, actions, lambda epoch, row: seen.append((epoch, row, weights(agent))))
    losses = [row["learn/held_out_loss"] for _, row, _ in seen]
    best = int(np.argmin(losses))
    assert [epoch for epoch, _, _ in seen] == list(range(best + 1 + 7)) and len(seen) < 300
    assert same(weights(agent), seen[best][2]) and not same(weights(agent), seen[-1][2])
    with torch.no_grad():  # the first tenth of the ten episodes was held out
        policy = agent.policy(agent.obs_encoder(torch.as_tensor(demos[0])))
    motion = MultivariateNormal(policy.mean[:, :6], torch.diag_embed(policy.stddev[:, :6] ** 2)).log_prob(
        torch.as_tensor(actions[0])[:, :6]
    )
    gripper = torch.nn.functional.binary_cross_entropy_with_logits(4 * policy.mean[:, 6], torch.as_tensor(actions[0] > 0)[:, 6].float())
    held_out = gripper - motion.mean()
    assert held_out.item() == pytest.approx(losses[best], rel=1e-4)


def grasp(obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """A hand on a line, observations (N, 2) of place and fingers, takes a step: the fingers need two steps to close."""
    return np.stack([obs[:, 0] + actions[:, 0], np.clip(obs[:, 1] + 0.5 * np.sign(actions[:, 6]), 0, 1)], axis=1).astype(np.float32)


def grasp_demo(rng) -> tuple[np.ndarray, np.ndarray]:
    """Come slowly to 0, close on arriving, carry to 0.5: observations (T, 2) and actions (T, 7)."""
    obs, actions = [np.array([rng.uniform(0.5, 1.0), 0.0], np.float32)], []
    while obs[-1][0] < 0.5 or obs[-1][1] < 1:
        x, fingers = obs[-1]
        action = np.array([0.5 if fingers == 1 else -0.2 * x, 0, 0, 0, 0, 0, 1.0 if x < 0.05 or fingers else -1.0])
        action[0] += 0.02 * rng.normal()
        actions.append(action)
        obs.append(grasp(obs[-1][None], action[None])[0])
    return np.array(obs[:-1]), np.array(actions)


@pytest.mark.parametrize("script", [gaussian_ppo, dlr_discover])
def test_the_mean_action_closes_the_hand_where_demonstrations_do(script):
    demos, actions = zip(*(grasp_demo(np.random.default_rng(k)) for k in range(12)), strict=True)
    shut = {}
    for weight in (1.0, script.Args.learn_switch_weight):
        args = script.Args(learn_epochs=60, learn_batch=64, learn_lr=3e-3, learn_noise=0.8, learn_switch_weight=weight, learn_patience=60)
        torch.manual_seed(1)
        patterns = (1,) if script is dlr_discover else ()
        agent = script.Agent(Normalizer(2), *patterns, 32)
        script.learn(args, agent, demos, actions, *([[np.zeros(len(a), int) for a in actions]] if patterns else []), lambda *_: None)
        obs = np.stack([np.linspace(0.5, 1.0, 20), np.zeros(20)], axis=1).astype(np.float32)
        shut[weight] = np.zeros(20, bool)
        for _ in range(60):
            obs = grasp(obs, agent.act(obs, np.zeros(20, int)))
            shut[weight] |= obs[:, 1] == 1
    assert not shut[1.0].any()  # it stands there, open
    assert shut[script.Args.learn_switch_weight].all()


def test_switch_weights_are_of_each_change_and_the_step_after():
    actions = np.zeros((9, 7))
    actions[:, 6] = [-1, -1, 1, 1, 1, 0.3, -0.2, -1, 1]
    np.testing.assert_array_equal(switch_weights(actions, 5.0), [1, 1, 5, 5, 1, 1, 5, 5, 5])


def test_learn_with_one_demonstration():
    demos, actions, _ = linear_demos(1)
    agent = Agent(Normalizer(6), 16)
    before = weights(agent)
    gaussian_ppo.learn(Args(hidden=16, learn_epochs=5), agent, demos, actions, lambda *_: None)
    assert not same(weights(agent), before)


# ---------------------------------------------------------------------------------------------- Reinforce: the mathematics


def column(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


@pytest.fixture(params=[gaussian_ppo, dlr_discover], ids=lambda script: script.__name__)
def gae(request) -> Callable:
    """Generalised advantage estimation as each script that decides every step writes it out."""
    return request.param.gae


@pytest.mark.parametrize(
    "terminated, expected",
    [
        (0.0, [1.75, 5.0, 4.0]),  # deltas 0.5, 5, 4, V of the final state being 8; A_0 = 0.5 + 0.25 * 5
        (1.0, [0.75, 1.0, 4.0]),  # deltas 0.5, 1, 4
    ],
    ids=["truncation", "termination"],
)
def test_gae_by_hand(gae, terminated, expected):
    """gamma = lambda = 1/2; the episode ends at the second step: the third one's advantage 4 must not reach back."""
    rewards, values, next_values = column(1, 2, 4), column(1, 1, 1), column(1, 8, 2)
    advantages = gae(rewards, values, next_values, column(0, terminated, 0), column(0, 1, 0), 0.5, 0.5)
    assert advantages.flatten().tolist() == expected


def test_gae_is_the_discounted_sum_of_deltas(gae):
    rng = np.random.default_rng(0)
    steps, envs, gamma, lam = 30, 4, 0.97, 0.9
    rewards, values, next_values = rng.normal(size=(3, steps, envs))
    done = rng.uniform(size=(steps, envs)) < 0.15
    terminated = done & (rng.uniform(size=(steps, envs)) < 0.5)
    expected = np.zeros((steps, envs))
    for t, i in np.ndindex(steps, envs):
        for u in range(t, steps):
            delta = rewards[u, i] + gamma * next_values[u, i] * (not terminated[u, i]) - values[u, i]
            expected[t, i] += (gamma * lam) ** (u - t) * delta
            if done[u, i]:
                break
    tensors = [torch.as_tensor(x.astype(np.float32)) for x in (rewards, values, next_values, terminated, done)]
    np.testing.assert_allclose(gae(*tensors, gamma, lam).numpy(), expected, atol=1e-5)


def test_policy_and_kl_are_those_of_a_multivariate_normal():
    torch.manual_seed(0)
    agent, other = Agent(Normalizer(6), 16), Agent(Normalizer(6), 16)
    with torch.no_grad():
        for a in (agent, other):
            a.log_std.copy_(torch.linspace(-5.0, 1.0, 7) + 0.1 * torch.randn(7))  # beyond both limits
            for layer in a.actor[::2]:
                layer.weight.normal_()
    obs, actions = torch.randn(20, 6), torch.randn(20, 7)
    policies = [a.policy(obs) for a in (agent, other)]
    dense = [MultivariateNormal(p.mean, torch.diag_embed(p.stddev**2)) for p in policies]
    torch.testing.assert_close(policies[0].stddev, agent.log_std.clamp(-4.0, 0.5).exp().expand(20, 7))
    torch.testing.assert_close(policies[0].log_prob(actions).sum(-1), dense[0].log_prob(actions), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gaussian_kl(*policies), kl_divergence(*dense), rtol=1e-4, atol=1e-3)
    assert agent.value(obs).shape == (20,)


# ---------------------------------------------------------------------------------------------- Reinforce: a goal on a plane


class Plane:
    """A point that walks from (0, 0) to a goal at (1, 0.6): LiberoVectorEnv's interface, with a known answer.

    Observations: position, vector to the goal. The first two actions move it by up to 0.15. `score` holds whether each finished
    episode reached the goal, `trace` what each step returned.
    """

    GOAL = np.array([1.0, 0.6])
    single_observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)

    def __init__(self, num_envs=16, max_steps=14, radius=0.15, seed=0):
        self.num_envs, self.max_steps, self.radius = num_envs, max_steps, radius
        self.position, self.elapsed = np.zeros((num_envs, 2)), np.zeros(num_envs, np.int64)
        self.rng = np.random.default_rng(seed)
        self.score, self.trace = [], []

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self._start(np.arange(self.num_envs))
        return self.observations(), {}

    def _start(self, envs):
        self.position[envs] = self.rng.normal(scale=0.05, size=(len(envs), 2))
        self.elapsed[envs] = 0

    def observations(self):
        return np.hstack([self.position, self.GOAL - self.position]).astype(np.float32)

    def step(self, actions):
        assert actions.shape == (self.num_envs, 7) and np.abs(actions).max() <= 1
        self.position += 0.15 * actions[:, :2]
        self.elapsed += 1
        terminated = np.linalg.norm(self.GOAL - self.position, axis=-1) < self.radius
        truncated = ~terminated & (self.elapsed >= self.max_steps)
        ended, obs, info = terminated | truncated, self.observations(), {}
        self.score += terminated[ended].tolist()
        self.trace.append((actions.copy(), obs, terminated, truncated))
        if ended.any():
            info = {"final_obs": obs, "_final_obs": ended, "final_length": self.elapsed.copy()}
            self._start(np.flatnonzero(ended))
            obs = self.observations()
        return obs, terminated.astype(np.float64), terminated, truncated, info

    def snapshot(self):
        return {"position": self.position.copy(), "elapsed": self.elapsed.copy(), "rng": self.rng.bit_generator.state}

    def restore(self, snapshot):
        self.position[:], self.elapsed[:] = snapshot["position"], snapshot["elapsed"]
        self.rng.bit_generator.state = snapshot["rng"]


def walks(number=60, aim=0.82, seed=0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Walks past the goal, a little too far out: observations and actions."""
    rng = np.random.default_rng(seed)
    env, out = Plane(1), ([], [])
    for _ in range(number):
        env._start([0])
        obs, actions = [], []
        for t in range(12):
            action = np.zeros(7)
            action[:2] = np.clip(([1.0, aim] - env.position[0]) / 0.3, -0.6, 0.6) + 0.1 * rng.normal(size=2)
            action[6] = 1.0 if t >= 6 else -1.0
            obs.append(env.observations()[0])
            actions.append(action)
            env.position[0] += 0.15 * action[:2]
        out[0].append(np.array(obs))
        out[1].append(np.array(actions))
    return out


def plane_args(**changes) -> Args:
    settings = dict(hidden=32, learn_epochs=60, learn_batch=128, learn_lr=3e-3, num_steps=32, total_steps=16 * 32 * 20)
    settings |= dict(actor_lr=1e-3, critic_lr=3e-3, num_minibatches=4, std_start=0.22, std_end=0.22)
    settings |= dict(step_kl=0.1, critic_warmup=2)
    return Args(**(settings | changes))


@pytest.fixture(scope="module")
def learned() -> Agent:
    """The Learn policy of the plane, which sometimes hits its goal."""
    torch.manual_seed(0)
    agent = Agent(Normalizer(4), plane_args().hidden)
    gaussian_ppo.learn(plane_args(), agent, *walks(), lambda *_: None)
    return agent


def make_trainer(learned, env=None, **changes) -> tuple[Reinforce, Plane]:
    torch.manual_seed(0)
    env = env or Plane()
    return Reinforce(plane_args(**changes), env, copy.deepcopy(learned)), env


def policies_of(trainer) -> tuple[Normal, Normal]:
    """The policy and the Learn policy in the states of some walks."""
    obs = torch.as_tensor(np.concatenate(walks(20, seed=3)[0]))
    with torch.no_grad():
        agent, reference = trainer.agent, trainer.reference
        return agent.policy(agent.obs_encoder(obs)), reference.policy(reference.obs_encoder(obs))


def test_first_minibatch_has_ratio_one_and_no_kl(learned):
    trainer, _ = make_trainer(learned, critic_warmup=0, update_epochs=1, num_minibatches=1)
    for _ in range(3):  # also after updates: what acted is what the ratio is taken against
        logs = trainer.run_iteration()
        assert logs["losses/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert logs["losses/approx_kl"] == pytest.approx(0.0, abs=1e-6)
        assert logs["losses/clipfrac"] == 0.0 and logs["losses/updates"] == 1
        assert logs["losses/kl_to_learn"] == pytest.approx(0.0, abs=1e-6) or trainer.iteration > 1
    assert logs["losses/kl_to_learn"] > 1e-4


def test_critic_warmup_leaves_the_policy_alone(learned):
    trainer, _ = make_trainer(learned, critic_warmup=2)
    actor, critic = weights(trainer.agent.actor), weights(trainer.agent.critic)
    for _ in range(2):
        logs = trainer.run_iteration()
        assert same(weights(trainer.agent.actor), actor) and not same(weights(trainer.agent.critic), critic)
        assert logs["losses/updates"] == 0 and "losses/policy_loss" not in logs
    trainer.run_iteration()
    assert not same(weights(trainer.agent.actor), actor)
    assert same(weights(trainer.reference.actor), actor)  # the Learn policy stays


def test_noise_falls_geometrically(learned):
    trainer, env = make_trainer(learned, total_steps=16 * 32 * 6, std_start=0.4, std_end=0.025)
    for expected in (0.4, 0.2, 0.1, 0.05, 0.025, 0.025):  # the last third has the least
        assert trainer.run_iteration()["charts/policy_std"] == pytest.approx(expected)
        assert [p.stddev.unique().item() for p in policies_of(trainer)] == pytest.approx([expected] * 2)


def test_step_kl_ends_the_updates_of_a_rollout(learned):
    trainer, _ = make_trainer(learned, critic_warmup=0, step_kl=1e-3, update_epochs=20, actor_lr=3e-4)
    logs = trainer.run_iteration()
    assert 1 < logs["losses/updates"] < 80 == 20 * 4
    assert 1e-3 < gaussian_kl(*policies_of(trainer)).mean().item() < 0.2  # it stops just after, not twenty epochs later


def test_reinforce_solves_the_plane(learned):
    trainer, env = make_trainer(learned)
    trainer.run_iteration()
    trainer.run_iteration()
    assert 0.15 < np.mean(env.score) < 0.8  # there is something to learn
    for iteration in range(2, trainer.num_iterations):
        if iteration == trainer.num_iterations - 3:
            env.score = []
        logs = trainer.run_iteration()
    assert len(env.score) > 60 and np.mean(env.score) > 0.9
    assert logs["charts/success"] > 0.9
    assert trainer.env_steps == 16 * 32 * 20 == trainer.history[-1][0]


def test_reinforce_continues_exactly_from_a_checkpoint(learned, tmp_path):
    results = []
    for stop in (None, 3):
        trainer, _ = make_trainer(learned)
        for iteration in range(6):
            if iteration == stop:
                save_checkpoint(tmp_path / "c.pt", {"script": "s", "trainer": trainer.state_dict()})
                trainer, _ = make_trainer(learned, env=Plane(seed=99))
                torch.rand(17)
                trainer.load_state_dict(load_checkpoint(tmp_path / "c.pt", "s")["trainer"])
            logs = trainer.run_iteration()
        clock = ("charts/rollout_seconds", "charts/update_seconds", "charts/SPS")
        results.append((weights(trainer.agent), trainer.history, {name: value for name, value in logs.items() if name not in clock}))
    assert same(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    np.testing.assert_equal(results[0][2], results[1][2])


def test_reinforce_begins_from_learns_weights_and_nothing_else(learned):
    """As a run does that is resumed there: Learn's last gradients, of what Reinforce does not train, would be clipped along."""
    results = []
    for left in (None, 1.0):
        torch.manual_seed(0)
        agent = copy.deepcopy(learned)
        for parameter in agent.parameters():
            parameter.grad = None if left is None else torch.full_like(parameter, left)
        trainer = Reinforce(plane_args(critic_warmup=1), Plane(), agent)
        for _ in range(2):
            trainer.run_iteration()
        results.append(weights(agent))
    assert same(*results)


def test_success_waits_until_failures_have_had_time_to_end(learned):
    trainer, _ = make_trainer(learned, num_steps=7, total_steps=16 * 7 * 4)  # an episode takes 14 steps at most
    first, second = trainer.run_iteration(), trainer.run_iteration()
    assert math.isnan(first["charts/success"]) and 0.0 <= second["charts/success"] <= 1.0
    assert trainer.history[0][0] == 16 * 7 and math.isnan(trainer.history[0][1])


# ---------------------------------------------------------------------------------------------- the whole job

TINY = """--num-envs 4 --torch-threads 1 --learn-epochs 100 --hidden 64 --num-steps 16 --total-steps 384 --num-minibatches 2
    --update-epochs 2 --actor-lr 1e-5 --critic-warmup 1 --checkpoint-interval 2 --eval-episodes 1 --corpus-episodes 2
    --demo-noise 0.01 --no-videos"""


def run_main(script, *flags) -> None:
    """A script (module) with these flags, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        run_command(script.main)


def job(demos, runs, *flags) -> list[str]:
    return ["--task", "libero_goal/0", "--demos", str(demos), "--run-folder", str(runs), *TINY.split(), *flags]


def run_and_copy(script, flags, target: Path, at: int) -> None:
    """A whole run; as it was when the `at`-th checkpoint of Reinforce had been written, it is copied to `target`: as if killed then."""
    written = []

    def save_and_copy(path, content):
        save_checkpoint(path, content)
        written.append(content["stage"])
        if written.count("reinforce") == at and not target.exists():
            shutil.copytree(path.parent, target / path.parent.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "save_checkpoint", save_and_copy)
        run_main(script, *flags)


def check_whole_job(run: Path, name: str, task, demos, iterations: int) -> dict:
    """What a finished run's folder must hold, whichever script wrote it; returns the summary."""
    config = json.loads((run / "config.json").read_text())
    assert config["script"] == name and config["assets"] == task.assets and config["demos"] == str(demos)
    assert config["versions"].keys() == versions().keys()
    assert check_file(run / "corpus.hdf5", task) == []
    corpus, attrs = read_episodes(run / "corpus.hdf5", task), read_attrs(run / "corpus.hdf5")
    assert attrs["script"] == name and attrs["demos"] == str(demos) and attrs["assets"] == task.assets
    assert corpus and all(e.success and e.attrs["source"] == name and e.attrs["pattern"] == 0 for e in corpus)
    summary = json.loads((run / "summary.json").read_text())
    documented = {"task", "success_rate", "per_pattern", "diversity", "smoothness", "env_steps", "wall_seconds", "demos", "assets"}
    assert documented | {"consistency", "stages", "corpus_episodes"} <= summary.keys()
    assert summary["task"] == task.id and summary["env_steps"] == 64 * iterations and summary["corpus_episodes"] == len(corpus)
    (row,) = summary["per_pattern"]
    assert row["pattern"] == 0 and row["episodes"] == 1 and row["success_rate"] == summary["success_rate"] == summary["stages"]["reinforce"]
    assert {"mean_pairwise_distance", "endpoint_variance", "direction_variance", "path_length_variance"} <= summary["diversity"].keys()
    figures = {path.name: path.read_bytes() for path in (run / "figures").iterdir()}
    assert figures.keys() == {"paths.png", "dtw.png", "map.png", "success.png"}
    assert all(content.startswith(b"\x89PNG") for content in figures.values())
    assert list(run.glob("events.out.tfevents.*")) and not list(run.rglob(".*"))  # nothing temporary is left
    assert f'"title":"{task.language}"' in (run / "report.html").read_text()
    checkpoint = load_checkpoint(run / "checkpoint.pt", name)
    assert checkpoint["stage"] == "done" and len(checkpoint["history"]) == iterations
    assert config["args"]["physics"] == choose_physics("auto", "cpu") and checkpoint["physics"].startswith(config["args"]["physics"])
    assert summary["physics"] == attrs["training_physics"] == checkpoint["physics"]
    return summary


def check_resumed_is_the_same(script, demos, tmp_path, drawer_task, *flags) -> None:
    """A whole run and one that was killed and resumed end in the same weights, corpus and summary, bit for bit."""
    name = script.__name__
    run_and_copy(script, job(demos, tmp_path / "whole", *flags), tmp_path / "killed", at=1)
    folders = [next((tmp_path / part).iterdir()) for part in ("whole", "killed")]
    whole, killed = folders
    summary = check_whole_job(whole, name, drawer_task, demos, 6)
    assert summary["wall_seconds"] > 1
    assert not (killed / "corpus.hdf5").exists() and not (killed / "summary.json").exists()
    assert load_checkpoint(killed / "checkpoint.pt", name)["trainer"]["iteration"] == 2
    run_main(script, "--resume", killed)
    whole, resumed = (load_checkpoint(run / "checkpoint.pt", name) for run in folders)
    assert same(whole["agent"], resumed["agent"])
    np.testing.assert_array_equal(whole["history"], resumed["history"])
    one, other = (read_episodes(run / "corpus.hdf5") for run in folders)
    assert len(one) == len(other)
    assert all(np.array_equal(a.states, b.states) and np.array_equal(a.actions, b.actions) for a, b in zip(one, other, strict=True))
    summaries = [json.loads((run / "summary.json").read_text()) for run in folders]
    for summary in summaries:
        del summary["wall_seconds"], summary["versions"]  # the revision
    assert summaries[0] == summaries[1]


def test_whole_job_killed_and_resumed_is_as_if_never_stopped(demos, tmp_path, drawer_task):
    check_resumed_is_the_same(gaussian_ppo, demos, tmp_path, drawer_task)


@pytest.mark.skipif(choose_physics("auto", "cpu") != "coarse", reason="this MuJoCo cannot sleep")
def test_killed_after_training_went_on_in_finer_physics(demos, tmp_path, drawer_task, monkeypatch):
    """After the first iteration training looks good enough, and the evaluation in exact physics says no."""
    monkeypatch.setattr(Trainer, "promising", property(lambda self: self.iteration == 1))
    evaluate = rollout.evaluate
    monkeypatch.setattr(rollout, "evaluate", lambda *a, **k: (None, []) if "can it stop?" in a else evaluate(*a, **k))
    check_resumed_is_the_same(gaussian_ppo, demos, tmp_path, drawer_task)
    for part in ("whole", "killed"):
        (summary,) = (tmp_path / part).glob("*/summary.json")
        assert json.loads(summary.read_text())["physics"] == "coarse, then sleep"


def test_what_takes_longer_to_do_is_trained_for_longer(demos, drawer_task, tmp_path, monkeypatch):
    """In all, and in each episode of training; evaluation keeps LIBERO's limit, 300 steps in this suite."""
    monkeypatch.setattr("common.job.load_task", lambda *_: drawer_task)
    episodes = read_episodes(demos, drawer_task)
    cases = ((101, 450_000, 152, []), (216, 777_600, 300, []), (100, 64, 200, ["--total-steps", "64", "--train-limit", "2"]))
    cases += ((100, 450_000, 300, ["--train-limit", "inf"]),)
    for length, steps, limit, flags in cases:
        same_length = [dataclasses.replace(e, actions=np.zeros((length, 7), np.float32)) for e in episodes]
        monkeypatch.setattr("common.job.load_demos", lambda *_, found=same_length: (found, "made up"))
        monkeypatch.setattr(
            sys, "argv", ["gaussian_ppo.py", "--task", "libero_goal/0", "--num-envs", "1", "--run-folder", str(tmp_path), *flags]
        )
        made = Job("gaussian_ppo", gaussian_ppo.Args)
        assert made.args.total_steps == steps and made.run.args.total_steps == (64 if "--total-steps" in flags else None)
        assert made.train_env.max_steps == limit and made.eval_env.max_steps == 300


def test_what_is_more_to_do_is_shown_more_often(drawer_task, monkeypatch):
    monkeypatch.setattr("common.demos.load_or_collect", lambda task, num_demos, **_: num_demos)
    two = dataclasses.replace(drawer_task, goal=drawer_task.goal * 2)
    for task, given, found in ((drawer_task, None, 48), (two, None, 96), (two, 5, 5)):
        assert load_demos("scripted", task, given, 0.1, 0, Progress(1e9)) == (found, "scripted")


# ---------------------------------------------------------------------------------------------- bad input


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(script, capsys, folder: Path, *flags) -> str:
    """The one line that a script ends in with exit code 2, having left every file under `folder` as it was."""
    before = tree(folder)
    with pytest.raises(SystemExit) as exit_:
        run_main(script, *flags)
    errors = capsys.readouterr().err
    line = errors.splitlines()[-1]
    assert exit_.value.code == 2 and line.startswith("error: ") and errors.count("error: ") == 1 and "Traceback" not in errors
    assert tree(folder) == before
    return line


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num-envs 0", "--num-envs must be at least 1, not 0"),
        ("--total-steps -5", "--total-steps must be at least 1, not -5"),
        ("--learn-lr nan", "--learn-lr must be more than 0, not nan"),
        ("--demo-noise inf", "--demo-noise must be at least 0, not inf"),
        ("--gamma 1.01", "--gamma must be between 0 and 1, not 1.01"),
        ("--std-end 0", "--std-end must be between 0.02 and 1.5, not 0.0"),
        ("--num-minibatches 4097", "--num-minibatches 4097 is more than the 4096 steps"),
    ],
)
def test_wrong_flag_values(capsys, tmp_path, flags, message):
    assert message in refused(gaussian_ppo, capsys, tmp_path, "--run-folder", tmp_path / "runs", *flags.split())


def test_missing_demonstrations(capsys, tmp_path, drawer_task, monkeypatch):
    monkeypatch.setattr("common.job.load_task", lambda *_: drawer_task)
    line = refused(gaussian_ppo, capsys, tmp_path, *job(tmp_path / "none.hdf5", tmp_path / "runs"))
    assert "no such file" in line and str(tmp_path / "none.hdf5") in line


def test_no_success_no_corpus(demos, tmp_path, drawer_task, monkeypatch, capsys):
    monkeypatch.setattr("common.job.load_task", lambda *_: drawer_task)
    monkeypatch.setattr("common.job.make_env", lambda *args, **how: make_env(*args, **how | {"max_steps": 3}))  # nobody is so quick
    monkeypatch.setattr("common.rollout.collect_corpus", None)  # nor tried for again
    with pytest.raises(SystemExit) as exit_:
        run_main(gaussian_ppo, *job(demos, tmp_path / "runs", "--learn-epochs", "1", "--total-steps", "64"))
    (run,) = (tmp_path / "runs").iterdir()
    line = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and "no rollout succeeded" in line and str(run) in line
    assert not (run / "corpus.hdf5").exists() and not (run / "summary.json").exists()


def stopped_run(script, folder: Path, demos, task, content: dict) -> Path:
    """The folder of a run that was stopped before Reinforce, as far as its bookkeeping goes."""
    args = script.Args(task="libero_goal/0", demos=str(demos), run_folder=str(folder / "runs"))
    run, name = folder / "runs" / "stopped", script.__name__
    write_json(run / "config.json", {"script": name, "args": dataclasses.asdict(args)})
    save_checkpoint(run / "checkpoint.pt", {"script": name, "name": task.id, "stage": "learn"} | content)
    return run


@pytest.mark.parametrize(
    "content, flags, message",
    [
        ({}, "--hidden 64", "was started with --hidden 256, not 64"),
        ({"script": "dlr_discover"}, "", "is a checkpoint of dlr_discover, not of gaussian_ppo"),
        ({"name": "libero_goal/turn_on_the_stove"}, "", "is not this run's: it is of libero_goal/turn_on_the_stove"),
    ],
    ids=["another flag", "another script", "another task"],
)
def test_runs_that_cannot_be_resumed(capsys, tmp_path, drawer_task, demos, monkeypatch, content, flags, message):
    monkeypatch.setattr("common.job.load_task", lambda *_: drawer_task)
    run = stopped_run(gaussian_ppo, tmp_path, demos, drawer_task, content)
    line = refused(gaussian_ppo, capsys, tmp_path, "--resume", run, *flags.split())
    assert message in line and str(run) in line


def test_flags_are_checked_wherever_they_come_from():
    Args()
    with pytest.raises(UserError, match="--seed must be at least 0, not -1"):
        Args(seed=-1)
