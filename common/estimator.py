"""Encoders of pictures that are trained to tell the simulator's state (--train-encoder state)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gymnasium as gym
import mujoco
import numpy as np
import torch
from torch import nn

from common.libero.observation import StateObservation
from common.networks import Normalizer, PixelEncoder, layer_init, make_obs_encoder, random_shift
from common.tensors import TensorDict


class HandState(nn.Module):
    """What proprioception alone says of a LIBERO state: the hand's own numbers, exactly, and the hand's part of what is relative to it.

    An estimator adds the rest. Left to estimate these, too, it has them wrong by centimetres as soon as the hand leaves the paths of the
    demonstrations. The mask `rest` (S,) is 0 where proprioception says all.
    """

    def __init__(self, observe: StateObservation):
        super().__init__()
        task, self.layout = observe.task, observe.layout
        self.relative = [columns for name, columns in observe.layout.items() if name.endswith("_to_eef")]
        data = mujoco.MjData(task.model)
        mujoco.mj_kinematics(task.model, data)
        body, site = data.xmat[task.hand_body].reshape(3, 3), data.site_xmat[task.eef_site].reshape(3, 3)
        self.register_buffer("turn", torch.tensor(body.T @ site, dtype=torch.float32))  # of the grip site in the hand's body
        self.register_buffer("rest", torch.ones(observe.size))
        for name in ("eef_pos", "eef_rot", "gripper_qpos"):
            self.rest[observe.layout[name]] = 0.0

    def forward(self, proprio: torch.Tensor) -> torch.Tensor:
        """Proprioception (N, 9), see `common.libero.pixels.PROPRIO` -> (N, S)."""
        position, (x, y, z, w), fingers = proprio[:, :3], proprio[:, 3:7].unbind(1), proprio[:, 7:9]
        rows = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
        rotation = torch.stack([torch.stack(row, 1) for row in rows], 1) @ self.turn
        state = proprio.new_zeros(len(proprio), len(self.rest))
        state[:, self.layout["eef_pos"]] = position
        state[:, self.layout["eef_rot"]] = torch.cat([rotation[:, :, 0], rotation[:, :, 1]], 1)
        state[:, self.layout["gripper_qpos"]] = fingers
        for columns in self.relative:
            state[:, columns] = -position
        return state


class StateEstimator(nn.Module):
    """The simulator's state, as pictures and proprioception tell it; a policy that acts on it is one of states, with its `view` of them.

    Convolutions that clone few demonstrations learn these by heart; pictures shifted at random prevent that, and leave them in doubt of
    where things are. Asked where things are, they learn it in minutes, and a few numbers a picture leave little to learn by heart. The
    simulator's state is known in training only (as in Pinto et al. 2018). docs/pixels.md has the numbers.

    `learn_to_estimate` fits it; it stays, so `look` puts its estimate in the place of the pictures: each is worked on once.
    """

    def __init__(self, encoder: PixelEncoder, view: Normalizer, hand: HandState | None = None):
        """`encoder` of pictures and proprioception, `view` of states, and what proprioception alone says of these, if anything."""
        super().__init__()
        self.encoder, self.view, self.size, self.critic_size = encoder, view, view.size, encoder.critic_size
        self.hand, states = hand, len(view.mean)
        self.tell = nn.Sequential(nn.ReLU(), layer_init(nn.Linear(encoder.size, 128)), nn.ReLU(), layer_init(nn.Linear(128, states), 0.01))
        self.log_scale = nn.Parameter(torch.zeros(states))  # of the error of each number, cm
        self.register_buffer("middle", torch.zeros(states))

    def fit(self, obs: TensorDict) -> StateEstimator:
        """Standardise estimates by those of `obs`, which `look` has seen."""
        self.view.fit(obs["estimate"])
        return self

    def augment(self, obs: TensorDict, noise: float) -> TensorDict:
        """`obs` with noise on estimates, see `Normalizer.augment`."""
        return TensorDict(obs.tensors | {"estimate": self.view.augment(obs["estimate"], noise)})

    @property
    def rest(self) -> torch.Tensor:
        """(S,) 0 where proprioception says all."""
        return self.hand.rest if self.hand else torch.ones_like(self.middle)

    def known(self, obs: TensorDict) -> torch.Tensor:
        """What proprioception alone says of the states, (N, S)."""
        return self.hand(obs["proprio"]) if self.hand else torch.zeros(len(obs), len(self.middle), device=self.middle.device)

    def estimate(self, obs: TensorDict) -> torch.Tensor:
        """Pictures (N, H, W, 3) uint8 and `proprio` (N, 9) -> states (N, S)."""
        told = self.middle + 0.05 * self.tell(self.encoder(obs))  # in units of 5 cm, about what varies
        return self.known(obs) + self.rest * told

    @torch.no_grad()
    def look(self, obs: TensorDict, rows: np.ndarray | None = None) -> TensorDict:
        """What training keeps of observations (N, ...): the estimate in the place of the pictures; of `rows` (n,) alone, if given, and NaN
        elsewhere."""
        if rows is None:
            estimate = self.estimate(obs)
        else:
            estimate = torch.full((len(obs), len(self.middle)), torch.nan, device=self.middle.device)
            if len(rows):
                estimate[rows] = self.estimate(obs[rows])
        kept = {name: x for name, x in obs.tensors.items() if name not in self.encoder.pictures}
        return TensorDict(kept | {"estimate": estimate})

    def loss(self, obs: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
        """Of observations with the `state` (N, S): what training minimises, and the median error (m, or a rotation's entries).

        The negative log-likelihood of Laplace distributions (an L1 loss), whose scales are learned with the rest (as in Kendall & Gal 2017,
        but one for each number of the state): what pictures can't show, like the turn of a round bowl, doesn't drown what they can.
        Pictures are shifted by a pixel at most: shifts by four leave centimetres of doubt.
        """
        error = (self.estimate(random_shift(obs, pad=1)) - obs["state"])[:, self.rest > 0].abs()
        log_scale = self.log_scale[self.rest > 0].clamp(-3.0, 5.0)
        return (100 * error * (-log_scale).exp() + log_scale).mean(), error.detach().median()

    def forward(self, obs: TensorDict) -> torch.Tensor:
        """Observations, or what `look` made of them -> (N, size)."""
        return self.view(obs["estimate"] if "estimate" in obs.tensors else self.estimate(obs))

    def critic_view(self, obs: TensorDict, features: torch.Tensor | None = None) -> torch.Tensor:
        """What the critic sees, (N, critic_size): the state itself."""
        return self.encoder.critic_view(obs)


def make_estimator(
    space: gym.spaces.Dict, net: str, near: Sequence[int] = (), near_field: float = 0.0, hand: HandState | None = None
) -> StateEstimator:
    """Of an environment's `single_observation_space` with pictures, `proprio` and `state`; see `make_obs_encoder`."""
    return StateEstimator(make_obs_encoder(space, net), make_obs_encoder(space["state"], net, near, near_field), hand)


def learn_to_estimate(estimator: StateEstimator, obs: TensorDict, steps: int, tick: Callable) -> None:
    """Fit it to `obs` (N, ...), among them the `state` (N, S), by `steps` gradient steps. `tick(step, losses)` is called every 20."""
    estimator.encoder.fit(obs)
    estimator.middle.copy_((obs["state"] - estimator.known(obs)).mean(0))
    optimizer = torch.optim.Adam(estimator.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=5e-5)
    for step in range(steps):
        loss, error = estimator.loss(obs[torch.randint(len(obs), (128,), device=obs["state"].device)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            tick(step, {"learn/estimator_loss": loss.item(), "learn/estimator_error": error.item()})
