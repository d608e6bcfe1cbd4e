"""diffusion_ppo: diffusion and PPO over it against closed forms and problems with a known answer; the whole job; bad input."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from test_gaussian_ppo import Plane, check_resumed_is_the_same, refused, same, stopped_run, walks, weights
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

import diffusion_ppo
import gaussian_ppo
from common import rollout
from common.data import Episode
from common.libero import make_env
from common.networks import Normalizer
from common.runs import load_checkpoint, save_checkpoint
from diffusion_ppo import Agent, Args, Chain, ChunkPolicy, Reinforce, cosine_alpha_bar, gae, log_prob

torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------- diffusion: the chain


def test_cosine_schedule():
    for levels in (1, 5, 100):
        kept = cosine_alpha_bar(levels)
        assert kept.shape == (levels + 1,) and kept[0] == 1.0 and (kept[1:] < kept[:-1]).all() and 0 < kept[-1] < 1e-2
    kept = cosine_alpha_bar(100)
    for k in (1, 30, 50, 99):  # Nichol & Dhariwal's closed form, away from the clip at beta = 0.999
        f = [math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (k / 100, 0.0)]
        assert kept[k].item() == pytest.approx(f[0] / f[1], rel=1e-9)
    assert (1 - kept[-1] / kept[-2]).item() == pytest.approx(0.999)


@pytest.mark.parametrize("level", [1, 2, 7, 10])
def test_ddpm_step_is_the_exact_posterior(level):
    """q(x_{k-1} | x_k, x_0) by conditioning the joint Gaussian of (x_{k-1}, x_k) given x_0, against the chain's mean and variance."""
    kept = cosine_alpha_bar(10)
    x0, xk, alpha = 0.37, -0.9, kept[level] / kept[level - 1]
    before = torch.tensor([kept[level - 1].sqrt() * x0, kept[level].sqrt() * x0])
    variance = 1 - kept[level - 1]
    joint = torch.tensor([[variance, alpha.sqrt() * variance], [alpha.sqrt() * variance, 1 - kept[level]]])
    mean = before[0] + joint[0, 1] / joint[1, 1] * (xk - before[1])
    spread = (joint[0, 0] - joint[0, 1] ** 2 / joint[1, 1]).clamp(min=0).sqrt()
    chain, i = Chain(10), torch.tensor(10 - level)
    eps = (xk - kept[level].sqrt() * x0) / (1 - kept[level]).sqrt()
    assert chain.level[i] == level
    assert chain.mean(torch.tensor([xk]), eps[None].float(), i).item() == pytest.approx(mean.item(), abs=1e-4)
    assert chain.sigma[i].item() == pytest.approx(spread.item(), abs=1e-5)


def test_forward_process_has_the_moments_of_the_closed_form():
    """Noise added level by level, x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) eps, against sqrt(alpha_bar) x_0 and 1 - alpha_bar."""
    kept = cosine_alpha_bar(10)
    mean, variance = 0.8, 0.0
    for k in range(1, 11):
        beta = 1 - (kept[k] / kept[k - 1]).item()
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert mean == pytest.approx(kept[k].sqrt().item() * 0.8) and variance == pytest.approx(1 - kept[k].item())


@pytest.mark.parametrize("eta, tolerance", [(1.0, 0.02), (0.0, 0.02)])
def test_chain_samples_a_gaussian_given_its_exact_noise(eta, tolerance):
    """Data N(m, s^2): E[eps | x_k] is linear, so the chain's mean and variance are a recursion, which must end in m and s^2."""
    m, s2, chain = 0.1, 0.02, Chain(400, eta=eta)
    mean, variance, probe = 0.0, 1.0, torch.tensor([-0.05, 0.05])
    for i in range(len(chain)):
        signal, noise = chain.signal[i].item(), chain.noise[i].item()
        centre = signal * m  # of x_k

        def step(x, i=i, signal=signal, noise=noise, centre=centre):
            eps = noise * (x - centre) / (signal**2 * s2 + noise**2)
            return chain.mean(x[:, None], eps[:, None], torch.full((2,), i))[:, 0]

        low, high = step(centre + probe).tolist()  # two points give the linear map, where nothing is clamped
        slope = (high - low) / 0.1
        mean, variance = (low + high) / 2 + slope * (mean - centre), slope**2 * variance + chain.sigma[i].item() ** 2
    assert mean == pytest.approx(m, abs=tolerance) and math.sqrt(variance) == pytest.approx(math.sqrt(s2), abs=tolerance)


def test_ddim_limits():
    ddpm, ddim = Chain(20), Chain(20, 20, 1.0)
    kept = cosine_alpha_bar(20)
    beta = 1 - kept[1:] / kept[:-1]
    posterior = (beta * (1 - kept[:-1]) / (1 - kept[1:])).flip(0)  # Ho et al. 2020, eq. 7
    torch.testing.assert_close((ddim.sigma**2).double(), posterior, atol=1e-6, rtol=1e-5)
    assert torch.equal(ddpm.sigma, ddim.sigma) and torch.equal(ddpm.level, torch.arange(20, 0, -1))
    assert not Chain(20, 5, 0.0).sigma.any()  # eta 0: deterministic
    assert Chain(20, 5).level.tolist() == [20, 16, 12, 8, 4]
    one = Chain(20, 1)  # one step: the predicted clean chunk
    assert len(one) == 1 and one.sigma.item() == 0.0
    x0, eps = torch.tensor([[0.5, -0.25]]), torch.tensor([[0.7, 0.1]])
    x = one.signal * x0 + one.noise * eps
    torch.testing.assert_close(one.mean(x, eps, torch.tensor([0])), x0, atol=1e-3, rtol=0)
    assert one.mean(x + 9, eps, torch.tensor([0])).tolist() == [[1.0, 1.0]]  # clamped


DPPO, OURS = dict(chunk_noise="independent", start_noise=True), dict(chunk_noise="shared", start_noise=False)


def small_args(**changes) -> Args:
    settings = dict(hidden=32, learn_epochs=60, learn_batch=128, learn_lr=3e-3, learn_patience=60, ema_decay=0.95)
    settings |= dict(num_steps=32, total_steps=16 * 32 * 30, execute=2, chunk=2, denoising_steps=6, finetune_steps=3)
    settings |= dict(actor_lr=3e-4, critic_lr=3e-3, num_minibatches=4, std_start=0.22, std_end=0.22)
    settings |= dict(step_kl=0.1, critic_warmup=2) | DPPO
    return Args(**(settings | changes))


def random_agent(args, obs_size=4, seed=0) -> Agent:
    torch.manual_seed(seed)
    agent = Agent(args, Normalizer(obs_size))
    with torch.no_grad():
        for net in (agent.actor, agent.base):  # other opinions than zero, and not the same
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return agent


@pytest.mark.parametrize("denoiser", ["mlp", "unet"])
@pytest.mark.parametrize(
    "changes", [{}, {"finetune_steps": 1}, {"finetune_steps": 6}, {"ddim_steps": 2, "finetune_steps": 2, "ddim_eta": 0.0}]
)
def test_log_probability_is_that_of_the_chain_that_was_sampled(denoiser, changes):
    """The sampled path, scored step by step by torch.distributions with means recomputed in one batch."""
    args = small_args(denoiser=denoiser, **changes)
    agent, obs, floor = random_agent(args), torch.randn(9, 4), 0.3
    torch.manual_seed(1)
    path, means = agent.denoise(obs, floor)
    steps, size = args.finetune_steps, 2 * 7
    assert path.shape == (9, steps + 1, size) and means.shape == (9, steps, size)
    i = torch.arange(len(agent.chain) - steps, len(agent.chain)).repeat(9, 1)
    with torch.no_grad():
        again = agent.means(agent.actor, obs, path[:, :-1], i)
    torch.testing.assert_close(again, means, atol=1e-5, rtol=1e-5)
    std = agent.stds(i, floor)
    assert torch.equal(std, agent.chain.sigma[i].clamp(min=0.3)) and (std >= 0.3).all()
    dense = MultivariateNormal(means, covariance_matrix=std[..., None, None] ** 2 * torch.eye(size))
    torch.testing.assert_close(log_prob(path[:, 1:], means, std), dense.log_prob(path[:, 1:]) / size, atol=1e-5, rtol=1e-5)


def test_shared_noise_is_scored_as_the_offset_that_it_is():
    """All actions of a chunk move alike, by a Gaussian of 7 dimensions; the density is that Gaussian's, by torch.distributions."""
    args = small_args(chunk=4, **OURS)
    agent, obs = random_agent(args), torch.randn(4000, 4)
    path, means = agent.denoise(obs, 0.3)
    offsets = (path[:, 1:] - means).unflatten(-1, (4, 7))
    torch.testing.assert_close(offsets, offsets[:, :, :1].expand_as(offsets), atol=1e-5, rtol=0)
    std = agent.stds(torch.arange(3, 6), 0.3)
    torch.testing.assert_close(offsets[:, :, 0].std(dim=(0, 2)), std, rtol=0.02, atol=0)
    dense = MultivariateNormal(torch.zeros(7), covariance_matrix=std[:, None, None] ** 2 * torch.eye(7))
    score = log_prob(path[:, 1:], means, std.expand(4000, 3), agent.sharing)
    torch.testing.assert_close(score, dense.log_prob(offsets[:, :, 0]) / 7, atol=1e-4, rtol=1e-4)
    shifted = (means.unflatten(-1, (4, 7)) + torch.tensor([0.2, -0.2, 0.1, -0.1])[:, None]).flatten(-2)
    torch.testing.assert_close(log_prob(path[:, 1:], shifted, std.expand(4000, 3), agent.sharing), score, atol=1e-4, rtol=1e-4)


def test_without_start_noise_only_what_ppo_scores_is_random():
    obs = torch.randn(5, 4)
    for options, equal in ((OURS, True), (DPPO, False)):
        agent = random_agent(small_args(**options))
        (first, _), (second, _), (mean, _) = (agent.denoise(obs, floor) for floor in (0.3, 0.3, None))
        assert torch.equal(first[:, 0], second[:, 0]) == torch.equal(first[:, 0], mean[:, 0]) == equal
        assert not torch.equal(first[:, 1], second[:, 1])


def test_sampling_and_scoring_have_the_same_standard_deviation():
    """What is added to the means in 4,000 samples, against what scores them."""
    args = small_args(chunk=4)
    agent = random_agent(args)
    for floor in (0.05, 0.5):
        path, means = agent.denoise(torch.zeros(4000, 4), floor)
        added = (path[:, 1:] - means).std(dim=(0, 2))
        torch.testing.assert_close(added, agent.stds(torch.arange(3, 6), floor), rtol=0.01, atol=0)
    assert (agent.chain.sigma[3:] < 0.5).all() and agent.chain.sigma[3] > 0.05  # the floor is met, and is not


def test_the_mean_chain_is_a_function_of_the_observation():
    agent, obs = random_agent(small_args()), torch.randn(5, 4)
    (path, means), (again, _) = agent.denoise(obs, None), agent.denoise(obs, None)
    assert torch.equal(path, again) and torch.equal(path[:, 1:], means)
    alone, _ = agent.denoise(obs[2:3], None)
    torch.testing.assert_close(alone[0], path[2], atol=1e-5, rtol=0)
    x = torch.zeros(5, 14)  # by hand: from zero, base for the first three steps, then actor
    with torch.no_grad():
        for i in range(6):
            x = agent.means(agent.base if i < 3 else agent.actor, obs, x[:, None], torch.full((5, 1), i))[:, 0]
    torch.testing.assert_close(x, path[:, -1], atol=1e-5, rtol=0)


def test_base_is_evaluated_only_where_a_step_uses_it(monkeypatch):
    agent = random_agent(small_args(finetune_steps=6))
    monkeypatch.setattr(agent.base, "encode", lambda obs: pytest.fail("no step is base's"))
    agent.denoise(torch.zeros(3, 4), 0.1)
    agent, calls = random_agent(small_args(finetune_steps=2)), []
    for name in ("base", "actor"):  # each encodes the observations once, however many steps it takes
        net = getattr(agent, name)
        monkeypatch.setattr(net, "encode", lambda obs, net=net, name=name: (calls.append(name), net.film(obs))[1])
    agent.denoise(torch.zeros(3, 4), 0.1)
    assert calls == ["base", "actor"]


@pytest.mark.parametrize("denoiser", ["mlp", "unet"])
def test_denoiser_depends_on_chunk_level_and_observation(denoiser):
    args = small_args(denoiser=denoiser, chunk=4)
    net = random_agent(args).actor
    x, level, features = torch.randn(3, 5, 28), torch.tensor([1, 2, 3, 4, 5]).repeat(3, 1), net.encode(torch.randn(3, 4))[:, None]
    eps = net(x, level, features)
    assert eps.shape == x.shape
    torch.testing.assert_close(net(x[1, 2:3], level[1, 2:3], features[1]), eps[1, 2:3], atol=1e-5, rtol=0)  # rows don't mix
    for other in (net(x.flip(0), level, features), net(x, level.flip(1), features), net(x, level, features.flip(0))):
        assert (other - eps).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------- Learn


def test_action_chunks_repeat_the_last_action():
    actions = np.arange(6).reshape(3, 2) / 4  # [[0, .25], [.5, .75], [1, 1.25]]
    expected = [[0, 0.25, 0.5, 0.75, 1, 1], [0.5, 0.75, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(diffusion_ppo.action_chunks(actions, 3), expected)
    np.testing.assert_array_equal(diffusion_ppo.action_chunks(actions, 1), actions.clip(-1, 1))


def test_ema_by_hand():
    average, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for p, value in zip([*average.parameters(), *model.parameters()], (1.0, 0.0, 3.0, -2.0), strict=True):
        torch.nn.init.constant_(p, value)
    for expected in ((1.5, -0.5), (1.875, -0.875)):  # 3/4 of what was, 1/4 of (3, -2)
        diffusion_ppo.update_ema(average, model, 0.75)
        assert (average.weight.item(), average.bias.item()) == expected
    assert (model.weight.item(), model.bias.item()) == (3.0, -2.0)


def test_denoising_loss_is_one_for_a_network_that_says_nothing_and_zero_for_one_that_knows():
    agent = Agent(small_args(), Normalizer(4))
    torch.manual_seed(0)
    obs, chunks, eps, level = torch.zeros(500, 4), torch.rand(500, 14) - 0.5, torch.randn(500, 14), torch.randint(1, 7, (500,))
    kept = cosine_alpha_bar(6).float()[level][:, None]

    class Net:
        def encode(self, obs):
            return obs

        def __call__(self, x, level, features):
            return self.answer(x)

    net = Net()
    net.answer = torch.zeros_like
    assert diffusion_ppo.denoising_loss(agent, net, obs, chunks, level, eps).item() == pytest.approx((eps**2).mean().item())
    net.answer = lambda x: (x - kept.sqrt() * chunks) / (1 - kept).sqrt()
    assert diffusion_ppo.denoising_loss(agent, net, obs, chunks, level, eps).item() < 1e-6


def test_learn_recovers_both_modes_of_the_demonstrations():
    """In every state the demonstrator goes left (-0.6, twice as often) or right (0.6): so does the policy, and seldom between."""
    rng = np.random.default_rng(0)
    demos = [rng.normal(size=(20, 2)).astype(np.float32) for _ in range(60)]
    actions = []
    for obs in demos:
        a = np.zeros((20, 7))
        a[:, 0] = np.where(rng.uniform(size=20) < 2 / 3, -0.6, 0.6) + 0.03 * rng.normal(size=20)
        a[:, 1] = 0.5 * np.tanh(obs[:, 0])
        a[:, 6] = np.where(obs[:, 1] > 0, 1, -1)
        actions.append(a)
    args = small_args(chunk=1, execute=1, denoising_steps=16, hidden=64, learn_epochs=150, learn_batch=128, ema_decay=0.98)
    torch.manual_seed(0)
    agent, seen = Agent(args, Normalizer(2)), []
    critic = weights(agent.critic)
    diffusion_ppo.learn(args, agent, demos, actions, lambda epoch, row: seen.append(row["learn/held_out_loss"]))
    assert same(weights(agent.critic), critic) and same(weights(agent.base), weights(agent.actor))
    assert seen[-1] < 0.5 * seen[0]
    obs = torch.randn(1500, 2)
    sample = agent.denoise(obs, floor=0.0)[0][:, -1]
    left, right = (sample[:, 0] + 0.6).abs() < 0.2, (sample[:, 0] - 0.6).abs() < 0.2
    assert (left | right).float().mean() > 0.9
    assert 0.5 < left.float().mean() < 0.8  # 2/3
    assert ((sample[:, 1] - 0.5 * obs[:, 0].tanh()) ** 2).mean() < 0.02  # of a variance of 0.09
    sure = obs[:, 1].abs() > 0.3
    assert (sample[sure, 6].sign() == obs[sure, 1].sign()).float().mean() > 0.95  # the gripper
    gaussian = gaussian_ppo.Agent(Normalizer(2), 64)  # what a Gaussian policy makes of them
    settings = gaussian_ppo.Args(hidden=64, learn_epochs=30, learn_batch=128)
    gaussian_ppo.learn(settings, gaussian, demos, actions, lambda *_: None)
    assert np.abs(gaussian.act(obs.numpy(), None)[:, 0]).mean() < 0.4


def test_learn_keeps_the_average_of_the_best_epoch():
    rng = np.random.default_rng(0)
    demos = [rng.normal(size=(20, 2)).astype(np.float32) for _ in range(4)]
    actions = [rng.uniform(-1, 1, size=(20, 7)) for _ in demos]  # nothing to learn: it overfits
    args = small_args(learn_epochs=200, learn_patience=5, learn_batch=16)
    agent, seen = Agent(args, Normalizer(2)), []
    diffusion_ppo.learn(args, agent, demos, actions, lambda epoch, row: seen.append((row["learn/held_out_loss"], weights(agent.actor))))
    losses = [loss for loss, _ in seen]
    best = int(np.argmin(losses))
    assert len(seen) == best + 6 < 200
    assert not any(same(weights(agent.actor), w) for _, w in seen)  # the average, and not what Adam left


# ---------------------------------------------------------------------------------------------- Reinforce: the mathematics


def rows(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


@pytest.mark.parametrize(
    "terminated, expected",
    [
        # gamma = lambda = 1/2. Steps 0, 1 are a chunk; step 2 begins one that the episode's end cuts after a step; 3, 4 begin anew.
        # A_3 = 1 + 2/2 + 8/4 - 1 = 3. A_2 = 4 + 8/2 - 1 = 7. A_0 = 1 + 2/2 + 6/4 - 1 + 7/16 = 2.9375
        (0.0, {0: 2.9375, 2: 7.0, 3: 3.0}),
        # termination: A_2 = 4 - 1 = 3, A_0 = 1 + 2/2 + 6/4 - 1 + 3/16 = 2.6875
        (1.0, {0: 2.6875, 2: 3.0, 3: 3.0}),
    ],
    ids=["truncation", "termination"],
)
def test_gae_over_chunks_by_hand(terminated, expected):
    rewards, values = rows(1, 2, 4, 1, 2), rows(1, 99, 1, 1, 99)  # values within a chunk count for nothing
    next_values = rows(99, 6, 8, 99, 8)
    decided, done, term = rows(1, 0, 1, 1, 0), rows(0, 0, 1, 0, 0), rows(0, 0, terminated, 0, 0)
    advantages = gae(rewards, values, next_values, decided, term, done, 0.5, 0.5)
    assert {t: advantages[t].item() for t in expected} == expected


def test_gae_over_chunks_is_the_discounted_sum_of_deltas():
    """Against the definition, chunk by chunk, on random episodes; with chunks of one action it is gaussian_ppo's."""
    rng = np.random.default_rng(0)
    steps, envs, gamma, lam = 40, 5, 0.97, 0.9
    for length in (1, 3):
        r, v, nv = rng.normal(size=(3, steps, envs))
        done = rng.uniform(size=(steps, envs)) < 0.15
        term = done & (rng.uniform(size=(steps, envs)) < 0.5)
        decided, expected = np.zeros((steps, envs), bool), {}
        for e in range(envs):
            starts, t = [], 0
            while t < steps:
                starts.append(t)
                n = next((j + 1 for j in range(length) if t + j == steps - 1 or done[t + j, e]), length)
                t += n
            decided[starts, e] = True
            following = 0.0
            for t, after in reversed(list(zip(starts, [*starts[1:], steps], strict=True))):
                n, last = after - t, after - 1
                if done[last, e]:
                    following = 0.0
                delta = sum(gamma**j * r[t + j, e] for j in range(n)) + gamma**n * nv[last, e] * (not term[last, e]) - v[t, e]
                following = expected[t, e] = delta + (gamma * lam) ** n * following
        tensors = [torch.as_tensor(x.astype(np.float32)) for x in (r, v, nv, decided, term, done)]
        advantages = gae(*tensors, gamma, lam)
        for (t, e), value in expected.items():
            assert advantages[t, e].item() == pytest.approx(value, abs=1e-4)
        if length == 1:
            torch.testing.assert_close(advantages, gaussian_ppo.gae(*tensors[:3], *tensors[4:], gamma, lam), atol=1e-5, rtol=1e-5)


def test_denoising_weights():
    discounts, clips = diffusion_ppo.denoising_weights(Args(finetune_steps=4, gamma_denoise=0.9, clip_coef=0.02, clip_coef_noisy=0.002))
    np.testing.assert_allclose(discounts, [0.729, 0.81, 0.9, 1.0], rtol=1e-6)
    assert clips[0].item() == pytest.approx(0.002) and clips[-1].item() == pytest.approx(0.02)
    growth = (clips - 0.002) / 0.018
    np.testing.assert_allclose(growth, (np.exp([0, 1, 2, 3]) - 1) / (np.exp(3) - 1), rtol=1e-5)
    discounts, clips = diffusion_ppo.denoising_weights(Args(finetune_steps=1))  # K' = 1
    assert discounts.tolist() == [1.0] and clips.tolist() == [pytest.approx(Args().clip_coef)]


def random_batch(args, agent, number=24, seed=1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    obs, s, size = torch.randn(number, 4), args.finetune_steps, args.chunk * 7
    path, means = agent.denoise(obs, 0.2)
    step = torch.arange(agent.frozen_steps, len(agent.chain)).repeat(number, 1)
    batch = dict(obs=obs, step=step, x=path[:, :-1], next_x=path[:, 1:], mean=means, std=agent.stds(step, 0.2))
    batch |= dict(advantages=torch.randn(number), learn_mean=means + 0.01 * torch.randn(number, s, size))
    batch |= dict(states=torch.randn(2 * number, 4), returns=torch.rand(2 * number))
    return batch | {"log_probs": log_prob(batch["next_x"], means, batch["std"], agent.sharing)}


def test_the_critic_learns_every_state(learned):
    """Also those within chunks, whose returns are the rest of their chunk's rewards and what follows."""
    trainer, _ = make_trainer(learned)
    seen = []
    update = diffusion_ppo.ppo_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion_ppo, "ppo_update", lambda *a: (seen.append(a[3]), update(*a))[1])
        trainer.run_iteration()
    (batch,) = seen
    assert len(batch["states"]) == len(batch["returns"]) == 16 * 32 > len(batch["obs"]) and (batch["returns"] != 0).all()


def test_policy_loss_by_hand():
    """-mean over chunks and steps of min(r A', clip(r) A'), A' = gamma_denoise^(K'-1-j) A, with torch.distributions' densities."""
    args = small_args(gamma_denoise=0.8, update_epochs=1, num_minibatches=1, clip_coef=0.05, clip_coef_noisy=0.01, step_kl=1e9)
    agent = random_agent(args)
    batch = random_batch(args, agent)
    batch["log_probs"] += 0.03 * torch.randn_like(batch["log_probs"])  # so that ratios differ from 1
    expected, kl = 0.0, 0.0
    for n in range(24):
        for j in range(3):
            spread = batch["std"][n, j].expand(14)
            density = Normal(batch["mean"][n, j], spread).log_prob(batch["next_x"][n, j]).mean()
            ratio = (density - batch["log_probs"][n, j]).exp()
            clip = 0.01 + 0.04 * (math.exp(3 * j / 2) - 1) / (math.exp(3) - 1)
            advantage = 0.8 ** (2 - j) * batch["advantages"][n]
            expected -= torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).item() / (24 * 3)
            p, q = (Independent(Normal(batch[m][n, j], spread), 1) for m in ("mean", "learn_mean"))
            kl += kl_divergence(p, q).item() / 24 / 2  # the sum over a chain, for each of 2 executed actions
    logs = diffusion_ppo.ppo_update(args, agent, torch.optim.SGD(agent.parameters(), 0.0), batch, True)
    assert logs["policy_loss"] == pytest.approx(expected, rel=1e-4)
    assert logs["kl_to_learn"] == pytest.approx(kl, rel=1e-4)
    assert 0.2 < logs["clipfrac"] < 1.0


def test_gradients_are_the_same_every_time():
    """Rows of a table that many samples share: PyTorch's indexing adds their gradients up in the order in which threads come by."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        args = Args()
        agent = random_agent(args)
        obs, chunks, eps = torch.randn(512, 4), torch.rand(512, 14), torch.randn(512, 14)
        level, gradients = torch.randint(1, 11, (512,)), []
        for _ in range(5):
            agent.actor.zero_grad()
            diffusion_ppo.denoising_loss(agent, agent.actor, obs, chunks, level, eps).backward()
            gradients.append({name: p.grad.clone() for name, p in agent.actor.named_parameters() if p.grad is not None})
    finally:
        torch.set_num_threads(threads)
    assert all(same(gradients[0], other) for other in gradients[1:])


def test_no_minibatch_is_a_small_rest(monkeypatch):
    """24 chunks in 5 minibatches: not five of 4 and a step of Adam for the other 4; with 25 and 8 it would be one for a single chunk."""
    args = small_args(update_epochs=2, num_minibatches=5, step_kl=1e9)
    agent = random_agent(args)
    sizes, losses = [], diffusion_ppo.ppo_losses
    monkeypatch.setattr(diffusion_ppo, "ppo_losses", lambda *a: (sizes.append(len(a[3]["obs"])), losses(*a))[1])
    diffusion_ppo.ppo_update(args, agent, torch.optim.SGD(agent.parameters(), 0.0), random_batch(args, agent), True)
    assert sizes == 2 * [5, 5, 5, 5, 4]


def test_one_random_step_estimates_the_gradient_of_all():
    """The gradient of `one`, averaged over the K' steps that it may draw, is the gradient of `all`."""
    args = small_args(update_epochs=1, num_minibatches=1, kl_coef=0.5, step_kl=1e9)
    agent = random_agent(args)
    batch = random_batch(args, agent)

    def gradient(rows) -> torch.Tensor:
        captured = []

        class Capture:
            def zero_grad(self):
                agent.zero_grad()

            def step(self):
                captured.append(torch.cat([p.grad.flatten() for p in agent.actor.parameters()]).clone())

        inner = ("step", "x", "next_x", "mean", "learn_mean", "std", "log_probs")
        chosen = {name: value[:, rows] if name in inner else value for name, value in batch.items()}
        logs = diffusion_ppo.ppo_update(args, agent, Capture(), chosen, True)
        return captured[0], logs["kl_to_learn"]

    args.max_grad_norm = 1e9
    every, kl = gradient([0, 1, 2])
    each = [gradient([j]) for j in range(3)]
    torch.testing.assert_close(sum(g for g, _ in each) / 3, every, atol=1e-6, rtol=1e-4)
    assert np.mean([k for _, k in each]) == pytest.approx(kl, rel=1e-4)


# ---------------------------------------------------------------------------------------------- Reinforce: a goal on a plane


@pytest.fixture(scope="module")
def learned() -> Agent:
    """The Learn policy of the plane, which sometimes hits its goal."""
    args = small_args()
    torch.manual_seed(0)
    agent = Agent(args, Normalizer(4))
    diffusion_ppo.learn(args, agent, *walks(), lambda *_: None)
    return agent


def make_trainer(learned, env=None, **changes) -> tuple[Reinforce, Plane]:
    torch.manual_seed(0)
    env, args = env or Plane(), small_args(**changes)
    agent = Agent(args, Normalizer(4))  # the learned weights, also where fewer steps are trained
    state = {name: value for name, value in learned.state_dict().items() if not name.startswith("chain.")}
    agent.load_state_dict(agent.state_dict() | copy.deepcopy(state))
    return Reinforce(args, env, agent), env


@pytest.mark.parametrize("changes", [{}, {"train_steps": "one"}, {"finetune_steps": 1}, {"finetune_steps": 6}, OURS])
def test_first_minibatch_has_ratio_one_and_no_kl(learned, changes):
    trainer, _ = make_trainer(learned, critic_warmup=0, update_epochs=1, num_minibatches=1, **changes)
    for _ in range(3):  # also after updates: what acted is what the ratio is taken against
        logs = trainer.run_iteration()
        assert logs["losses/ratio"] == pytest.approx(1.0, abs=1e-6)
        assert logs["losses/approx_kl"] == pytest.approx(0.0, abs=1e-6)
        assert logs["losses/clipfrac"] == 0.0 and logs["losses/updates"] == 1
        assert logs["losses/kl_to_learn"] == pytest.approx(0.0, abs=1e-6) or trainer.iteration > 1
    assert logs["losses/kl_to_learn"] > 1e-4


@pytest.mark.parametrize("changes", [{}, {"ddim_steps": 1, "finetune_steps": 1}, {"ddim_steps": 2, "finetune_steps": 2}])
def test_critic_warmup_leaves_the_policy_alone_and_base_stays(learned, changes):
    trainer, _ = make_trainer(learned, critic_warmup=2, **changes)
    actor, critic = weights(trainer.agent.actor), weights(trainer.agent.critic)
    for _ in range(2):
        logs = trainer.run_iteration()
        assert same(weights(trainer.agent.actor), actor) and not same(weights(trainer.agent.critic), critic)
        assert logs["losses/updates"] == 0 and "losses/policy_loss" not in logs
    trainer.run_iteration()
    assert not same(weights(trainer.agent.actor), actor)
    assert same(weights(trainer.agent.base), actor)  # the Learn policy stays
    assert all(torch.isfinite(value).all() for value in weights(trainer.agent).values())


def test_floor_falls_geometrically(learned):
    trainer, _ = make_trainer(learned, total_steps=16 * 32 * 6, std_start=0.4, std_end=0.025)
    for expected in (0.4, 0.2, 0.1, 0.05, 0.025, 0.025):  # the last third has the least
        assert trainer.run_iteration()["charts/policy_std"] == pytest.approx(expected)


def test_chunks_are_executed_and_begin_with_the_episode(learned, monkeypatch):
    """Each executed action is the next of its chunk, denoised from the observation at its begin; episodes end within chunks."""
    trainer, env = make_trainer(learned, chunk=2, execute=2, num_steps=21, critic_warmup=99)
    env.max_steps, planned = 7, []
    denoise = Agent.denoise

    def spy(agent, obs, floor):
        path, means = denoise(agent, obs, floor)
        planned.append((obs.clone(), path[:, -1].reshape(-1, 2, 7).clamp(-1, 1).numpy()))
        return path, means

    monkeypatch.setattr(Agent, "denoise", spy)
    first = trainer.obs.copy()
    trainer.run_iteration()
    queue, plans, obs = [[] for _ in range(16)], iter(planned), first
    for actions, seen, terminated, truncated in env.trace:
        due = [i for i in range(16) if not queue[i]]
        if due:
            planned_obs, chunks = next(plans)
            np.testing.assert_array_equal(planned_obs.numpy()[:, 2:], obs[due, 2:] if obs is first else planned_obs.numpy()[:, 2:])
            for i, chunk in zip(due, chunks, strict=True):
                queue[i] = list(chunk)
        for i in range(16):
            np.testing.assert_array_equal(actions[i], queue[i].pop(0))
            if terminated[i] or truncated[i]:
                queue[i] = []  # an odd number of steps: the rest of a chunk is void
        obs = seen
    assert next(plans, None) is None and sum(t.any() for _, _, _, t in env.trace) >= 2


def test_step_kl_ends_the_updates_of_a_rollout(learned):
    trainer, _ = make_trainer(learned, critic_warmup=0, step_kl=1e-3, update_epochs=20)
    assert 1 < trainer.run_iteration()["losses/updates"] < 80 == 20 * 4


def test_the_leash_pulls_a_stray_policy_back(learned):
    def stray(kl_coef):
        trainer, _ = make_trainer(learned, critic_warmup=0, step_kl=10.0, kl_coef=kl_coef)
        with torch.no_grad():
            trainer.agent.actor.body.last.bias += 0.5  # as if PPO had gone far astray
        return [trainer.run_iteration()["losses/kl_to_learn"] for _ in range(4)]

    free, held = stray(0.0), stray(5.0)
    assert free[0] > 0.5 and min(free) > 0.5 * free[0] and held[-1] < 0.3 * held[0]


@pytest.mark.parametrize("changes", [{}, {"train_steps": "one"}, OURS | {"finetune_steps": 1}])
def test_reinforce_solves_the_plane(learned, changes):
    trainer, env = make_trainer(learned, **changes)
    trainer.run_iteration()
    trainer.run_iteration()
    assert 0.1 < np.mean(env.score) < 0.8  # there is something to learn
    for iteration in range(2, trainer.num_iterations):
        if iteration == trainer.num_iterations - 3:
            env.score = []
        logs = trainer.run_iteration()
    assert len(env.score) > 60 and np.mean(env.score) > 0.9
    assert logs["charts/success"] > 0.8 and trainer.env_steps == 16 * 32 * 30 == trainer.history[-1][0]


def test_reinforce_continues_exactly_from_a_checkpoint(learned, tmp_path):
    results = []
    for stop in (None, 3):
        trainer, _ = make_trainer(learned, train_steps="one")
        for iteration in range(5):
            if iteration == stop:
                save_checkpoint(tmp_path / "c.pt", {"script": "s", "trainer": trainer.state_dict()})
                trainer, _ = make_trainer(learned, env=Plane(seed=99), train_steps="one")
                torch.rand(17)
                trainer.load_state_dict(load_checkpoint(tmp_path / "c.pt", "s")["trainer"])
            logs = trainer.run_iteration()
        clock = ("charts/rollout_seconds", "charts/update_seconds", "charts/SPS")
        results.append((weights(trainer.agent), trainer.history, {name: value for name, value in logs.items() if name not in clock}))
    assert same(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    np.testing.assert_equal(results[0][2], results[1][2])


# ---------------------------------------------------------------------------------------------- rolling out


def test_chunk_policy_replans_after_execute_actions_and_at_a_new_episode():
    agent = random_agent(small_args(chunk=4, execute=3))
    policy, rng = ChunkPolicy(agent, 2, execute=3), np.random.default_rng(0)
    obs = rng.normal(size=(8, 2, 4)).astype(np.float32)

    def chunk(t, i):
        return agent.denoise(torch.as_tensor(obs[t, i : i + 1]), None)[0][0, -1].reshape(4, 7).clamp(-1, 1).numpy()

    taken = []
    for t in range(8):
        if t == 4:
            policy.begin(np.array([1]))  # amid its second chunk
        taken.append(policy(obs[t], np.zeros(2, int)).copy())
    begun = {0: [0, 0, 0, 3, 3, 3, 6, 6], 1: [0, 0, 0, 3, 4, 4, 4, 7]}
    for i, starts in begun.items():
        for t, start in enumerate(starts):
            np.testing.assert_allclose(taken[t][i], chunk(start, i)[t - start], atol=1e-5)


def test_roll_out_tells_a_policy_of_new_episodes(drawer_task):
    """common.rollout calls `begin` with the environments whose episodes begin."""
    calls = []

    class Idle:
        def begin(self, envs):
            calls.append(envs.tolist())

        def __call__(self, obs, patterns):
            return np.zeros((2, 7))

    env = make_env(drawer_task, 2, max_steps=3, autoreset_mode=AutoresetMode.DISABLED, seed=0)
    episodes = rollout.roll_out(env, Idle(), [(0, 0), (0, 1), (0, 2)], lambda e: None)
    assert calls == [[0, 1], [0, 1], [0]] and [isinstance(e, Episode) and e.length for e in episodes] == [3, 3, 3]


def test_whole_job_killed_and_resumed_is_as_if_never_stopped(demos, tmp_path, drawer_task):
    flags = "--denoising-steps 6 --finetune-steps 2 --chunk 3 --execute 2 --train-steps one"
    check_resumed_is_the_same(diffusion_ppo, demos, tmp_path, drawer_task, *flags.split())


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num-envs 0", "--num-envs must be at least 1, not 0"),
        ("--ddim-steps 0", "--ddim-steps must be at least 1, not 0"),
        ("--ddim-steps 11", "--ddim-steps 11 is more than the 10 levels of --denoising-steps"),
        ("--ddim-eta 1.5", "--ddim-eta must be between 0 and 1, not 1.5"),
        ("--finetune-steps 11", "--finetune-steps 11 is more than the 10 denoising steps of --denoising-steps"),
        ("--ddim-steps 4", "--finetune-steps 5 is more than the 4 denoising steps of --ddim-steps"),
        ("--execute 5", "--execute 5 is more than the 2 actions of --chunk"),
        ("--denoiser unet --chunk 5", "--chunk must be even, not 5"),
        ("--ema-decay 1", "--ema-decay must be at least 0 and less than 1, not 1.0"),
        ("--clip-coef-noisy nan", "--clip-coef-noisy must be more than 0, not nan"),
        ("--gamma-denoise 2", "--gamma-denoise must be between 0 and 1, not 2.0"),
        ("--std-start 0.01", "--std-start must be between 0.02 and 1.5, not 0.01"),
        ("--num-minibatches 2049", "--num-minibatches 2049 is more than the 2048 chunks"),
    ],
)
def test_wrong_flag_values(capsys, tmp_path, flags, message):
    assert message in refused(diffusion_ppo, capsys, tmp_path, "--run-folder", tmp_path / "runs", *flags.split())


@pytest.mark.parametrize(
    "content, flags, message",
    [
        ({}, "--chunk 8", "was started with --chunk 2, not 8"),
        ({"script": "gaussian_ppo"}, "", "is a checkpoint of gaussian_ppo, not of diffusion_ppo"),
        ({"name": "libero_goal/turn_on_the_stove"}, "", "is not this run's: it is of libero_goal/turn_on_the_stove"),
    ],
    ids=["another flag", "another script", "another task"],
)
def test_runs_that_cannot_be_resumed(capsys, tmp_path, drawer_task, demos, monkeypatch, content, flags, message):
    monkeypatch.setattr("common.job.load_task", lambda *_: drawer_task)
    run = stopped_run(diffusion_ppo, tmp_path, demos, drawer_task, content)
    line = refused(diffusion_ppo, capsys, tmp_path, "--resume", run, *flags.split())
    assert message in line and str(run) in line
