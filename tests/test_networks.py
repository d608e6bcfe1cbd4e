"""Network pieces: orthogonal layers of the asked gain, standardisation that travels with the weights, and pixels."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from common.networks import Normalizer, PixelEncoder, ResNet18, make_obs_encoder, mlp, random_shift
from common.tensors import TensorDict

torch.set_num_threads(1)


def test_mlp_is_orthogonal_with_gain_and_linear_at_the_end():
    net = mlp([5, 16, 16, 3], out_std=0.01)
    assert [type(layer) for layer in net] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    for layer, gain in zip(net[::2], (np.sqrt(2), np.sqrt(2), 0.01), strict=True):
        w = layer.weight.double()
        small = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        torch.testing.assert_close(small, gain**2 * torch.eye(len(small)).double(), atol=1e-5, rtol=0)
        assert not layer.bias.any()
    assert net(torch.ones(2, 4, 5)).shape == (2, 4, 3)


def test_normalizer_standardises_clips_and_is_saved():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(5000, 3)) * [2.0, 0.5, 1e-5] + [1.0, -3.0, 7.0]).astype(np.float32)
    normalizer = Normalizer(3).fit(x)
    y = normalizer(torch.as_tensor(x)).numpy()
    np.testing.assert_allclose(y[:, :2].mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(y[:, :2].std(0), 1, atol=1e-3)
    assert np.abs(y[:, 2]).max() < 0.01  # a constant's rounding isn't blown up
    assert normalizer(torch.tensor([1e6, -1e6, 7.0])).tolist()[:2] == [10.0, -10.0]
    other = Normalizer(3)
    other.load_state_dict(normalizer.state_dict())
    np.testing.assert_array_equal(other(torch.as_tensor(x)).numpy(), y)
    assert not list(normalizer.parameters())


# ---------------------------------------------------------------------------------------------- pixels


def pictures(number=3, size=40, seed=0) -> TensorDict:
    torch.manual_seed(seed)
    views = torch.randint(0, 256, (number, size, size, 3), dtype=torch.uint8)
    return TensorDict({"agentview_rgb": views, "proprio": torch.randn(number, 9)})


def pixel_space(size=40) -> gym.spaces.Dict:
    proprio = gym.spaces.Box(-np.inf, np.inf, (9,), np.float32)
    return gym.spaces.Dict({"agentview_rgb": gym.spaces.Box(0, 255, (size, size, 3), np.uint8), "proprio": proprio})


def test_resnet18_has_the_papers_size_and_strides():
    net = ResNet18()
    # torchvision's ResNet-18 has 11,689,512 parameters, 513,000 of them in the classifier that is not here; norms have as many
    assert sum(p.numel() for p in net.parameters()) == 11_689_512 - 513_000
    assert len([m for m in net.modules() if isinstance(m, nn.Conv2d)]) == 17 + 3  # 17 layers, and the shortcuts that change shape
    with torch.no_grad():
        for size in (32, 40, 84):
            cells = -(-size // 32)
            assert net(torch.zeros(1, 3, size, size)).shape == (1, 512, cells, cells)


@pytest.mark.parametrize("net", ["small", "resnet18"])
def test_pixel_encoder_does_not_mix_the_batch(net):
    torch.manual_seed(0)
    encoder, obs = make_obs_encoder(pixel_space(), net), pictures(5)
    assert isinstance(encoder, PixelEncoder) and encoder.size == 128 + 9
    encoder.fit(TensorDict({"proprio": torch.full((8, 9), 2.0)}))
    with torch.no_grad():
        together = encoder(obs)
        assert together.shape == (5, encoder.size)
        for i in range(5):  # up to the order of sums: GroupNorm, not BatchNorm
            torch.testing.assert_close(encoder(obs[i : i + 1])[0], together[i], atol=1e-4, rtol=1e-4)
        encoder.PICTURES = 2  # in pieces
        torch.testing.assert_close(encoder(obs), together, atol=1e-4, rtol=1e-4)
    assert (together[1:] - together[:-1]).abs().max(-1).values.min() > 1e-2  # and it sees the pictures
    torch.testing.assert_close(together[:, 128:], ((obs["proprio"] - 2.0) / 0.01).clamp(-10, 10))


def test_cameras_and_what_the_critic_sees():
    space, obs = pixel_space(), pictures(5)
    wrist = pictures(5)["agentview_rgb"].flip(1)
    both = gym.spaces.Dict(space.spaces | {"eye_in_hand_rgb": space["agentview_rgb"], "state": gym.spaces.Box(-9, 9, (4,), np.float32)})
    seen = TensorDict(obs.tensors | {"eye_in_hand_rgb": wrist, "state": torch.arange(20.0).reshape(5, 4)})
    encoder = make_obs_encoder(both, "small").fit(seen)
    features = encoder(seen)
    assert features.shape == (5, 2 * 128 + 9) and encoder.critic_size == 4
    unseen = TensorDict(seen.tensors | {"state": -seen["state"]})
    assert torch.equal(encoder(unseen), features)  # the policy does not see the state
    assert not torch.equal(encoder.critic_view(unseen), encoder.critic_view(seen))  # the critic does, and standardised
    torch.testing.assert_close(encoder.critic_view(seen).mean(0), torch.zeros(4))
    assert not torch.equal(encoder(TensorDict(seen.tensors | {"eye_in_hand_rgb": obs["agentview_rgb"]})), features)
    plain = make_obs_encoder(space, "small").fit(obs)
    assert torch.equal(plain.critic_view(obs), plain(obs)) and not plain.critic_view(obs, plain(obs)).requires_grad


def test_states_need_no_encoder():
    encoder = make_obs_encoder(gym.spaces.Box(-np.inf, np.inf, (7,), np.float32))
    assert isinstance(encoder, Normalizer) and encoder.size == 7 and not list(encoder.parameters())


def near_encoder(near_field: float, size: int = 5) -> Normalizer:
    return make_obs_encoder(gym.spaces.Box(-np.inf, np.inf, (size,), np.float32), "small", [3, 1, 2], near_field)


def test_near_field_shows_relative_positions_in_detail_too():
    encoder = near_encoder(0.03)
    x = torch.tensor([[0.0, 1.0, 0.5, 0.0, 7.0], [0.4, 3.0, 0.01, 0.3, 8.0], [-0.4, 2.0, -0.51, 0.1, 6.0]])
    encoder.fit(x)
    features = encoder(x)
    assert features.shape == (3, encoder.size) == (3, encoder.critic_size) == (3, 8)
    torch.testing.assert_close(features[:, :5], (x - x.mean(0)) / x.std(0, correction=0))
    torch.testing.assert_close(features[1, 5:], torch.tensor([1.0, 1.0, math.tanh(1 / 3)]))
    torch.testing.assert_close(features[2, 5:], torch.tensor([math.tanh(10 / 3), 1.0, -1.0]))
    assert type(near_encoder(0.0)) is Normalizer


def test_near_field_noise_falls_with_distance():
    encoder = near_encoder(0.03)
    encoder.fit(torch.tensor([[-0.3] * 5, [0.3] * 5]))  # a standard deviation of 0.3 in each
    x = torch.tensor([[5.0, 0.0, 0.0, 0.0, 5.0], [0.0, 0.0, 0.3, -0.4, 0.0], [0.0, 0.0, 0.0, 9.0, 0.0]]).repeat_interleave(20_000, 0)
    noise = (encoder.augment(x, 0.1) - x).reshape(3, 20_000, 5)
    assert noise.mean(1).abs().max() < 1e-3
    expected = torch.tensor([[0.03, 0.001, 0.001, 0.001, 0.03], [0.03, 0.011, 0.011, 0.011, 0.03], [0.03] * 5])
    torch.testing.assert_close(noise.std(1), expected, rtol=0.03, atol=0)


def test_near_field_tells_centimetres_within_a_metre():
    x = torch.linspace(-0.5, 0.5, 401)[:, None]
    y = torch.where(x.abs() < 0.03, 1.0, -1.0)  # as a hand that closes on what is between its fingers
    wrong = {}
    for near_field in (0.0, 0.03):
        torch.manual_seed(0)
        encoder = make_obs_encoder(gym.spaces.Box(-np.inf, np.inf, (1,), np.float32), "small", [0], near_field).fit(x)
        net = mlp([encoder.size, 32, 32, 1], out_std=0.01)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(300):
            loss = (net(encoder(x)) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wrong[near_field] = int((net(encoder(x)).sign() != y).sum())
    assert wrong[0.0] == (y > 0).sum()  # it never closes
    assert wrong[0.03] < wrong[0.0] / 2


def test_random_shift_moves_each_picture_and_repeats_its_edge():
    obs, moves = pictures(40, size=12), set()
    shifted = random_shift(obs, pad=2)
    assert torch.equal(shifted["proprio"], obs["proprio"]) and shifted["agentview_rgb"].dtype == torch.uint8
    for before, after in zip(obs["agentview_rgb"].numpy(), shifted["agentview_rgb"].numpy(), strict=True):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)), mode="edge")
        crops = {(y, x): padded[y : y + 12, x : x + 12] for y in range(5) for x in range(5)}
        found = [move for move, crop in crops.items() if np.array_equal(crop, after)]
        assert len(found) == 1
        moves.update(found)
    assert len(moves) > 12  # of the 25 there are
    states = torch.randn(3, 4)
    before = torch.get_rng_state()
    assert random_shift(states) is states and torch.equal(torch.get_rng_state(), before)


def test_augment_adds_noise_in_standard_deviations():
    torch.manual_seed(0)
    normalizer = Normalizer(2).fit(np.array([[0.0, 10.0], [4.0, 30.0]]))  # standard deviations 2 and 10
    x = torch.tensor([[1.0, -1.0]]).repeat(20000, 1)
    noisy = normalizer.augment(x, 0.3)
    torch.testing.assert_close(noisy.mean(0), x[0], atol=0.1, rtol=0)
    torch.testing.assert_close(noisy.std(0), torch.tensor([0.6, 3.0]), rtol=0.02, atol=0)
    assert torch.equal(normalizer.augment(x, 0.0), x)
    encoder, obs = make_obs_encoder(pixel_space()), pictures()
    encoder.fit(obs)
    augmented = encoder.augment(obs, 0.1)
    assert not torch.equal(augmented["agentview_rgb"], obs["agentview_rgb"]) and augmented["agentview_rgb"].dtype == torch.uint8
    moved = (augmented["proprio"] - obs["proprio"]).abs()
    assert 0 < moved.max() < 1 and torch.equal(obs["proprio"], pictures()["proprio"])
