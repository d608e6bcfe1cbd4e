"""Network pieces: orthogonal layers of the asked gain, and standardisation that travels with the weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from common.networks import Normalizer, mlp


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
