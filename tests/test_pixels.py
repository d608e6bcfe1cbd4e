"""Pixels: the environment that returns pictures, against the renderer; the three RL scripts on pictures, at a tiny size."""

from __future__ import annotations

import dataclasses

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import test_dlr_discover
import test_gaussian_ppo
import torch
from gymnasium.vector import AutoresetMode
from test_gaussian_ppo import run_main, same, weights

import diffusion_ppo
import dlr_discover
import gaussian_ppo
from common.cli import UserError
from common.data import read_episodes, write_episodes
from common.estimator import HandState, learn_to_estimate, make_estimator
from common.job import observe_demos
from common.libero import make_env
from common.libero.observation import StateObservation, observe_states
from common.libero.renderers import make_renderer
from common.networks import compiled, make_obs_encoder
from common.runs import Progress, load_checkpoint, save_checkpoint
from common.tensors import TensorDict, join, obs_buffer, to_tensor

torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------- batches


def test_tensor_dict_is_indexed_like_a_tensor():
    rng = np.random.default_rng(0)
    arrays = {"agentview_rgb": rng.integers(0, 256, (4, 2, 2, 3)).astype(np.uint8), "proprio": rng.normal(size=(4, 9)).astype(np.float32)}
    obs, flat = to_tensor(arrays), to_tensor(arrays["proprio"])
    rows = np.array([True, False, True, False])
    for at in (2, slice(1, 3), [3, 0], rows, torch.tensor([1, 1])):
        assert torch.equal(obs[at]["proprio"], flat[at]) and torch.equal(obs[at]["agentview_rgb"], obs["agentview_rgb"][at])
    room, plain = obs_buffer(3, obs), obs_buffer(3, flat)
    assert room["agentview_rgb"].dtype == torch.uint8 and room["agentview_rgb"].shape == (3, 4, 2, 2, 3)
    for buffer, values in ((room, obs), (plain, flat)):
        buffer[1] = values
        buffer[2, rows] = values[rows]
    assert torch.equal(room["proprio"], plain) and torch.equal(room.flatten(0, 1)["proprio"], plain.flatten(0, 1))
    assert len(room) == 3 and not room["proprio"][2, ~rows].any() and room["proprio"][2, rows].any()
    both = join([arrays, arrays])
    assert len(both) == 8 and torch.equal(both["proprio"], torch.cat([flat, flat]))
    assert torch.equal(both[4:]["agentview_rgb"], obs["agentview_rgb"])


# ---------------------------------------------------------------------------------------------- the environment


def test_pixel_env_shows_what_the_renderer_draws(drawer_task):
    """Same physics as the state environment; pictures of every state, in LIBERO's orientation; also of episodes' last states."""
    settings = dict(num_envs=3, seed=0, settle_steps=0, max_steps=2)
    cameras = ("agentview", "robot0_eye_in_hand")
    env = make_env(drawer_task, obs="pixels", image_size=32, cameras=cameras, **settings)
    plain = make_env(drawer_task, **settings)
    renderer = make_renderer(drawer_task.model, cameras, 32, 32)

    def check(obs, states, state_obs):
        drawn = renderer.render(states[:, 1 : 1 + drawer_task.model.nq])
        assert obs.keys() == {"agentview_rgb", "eye_in_hand_rgb", "proprio"}
        np.testing.assert_array_equal(obs["agentview_rgb"][:, ::-1], drawn["agentview"])  # bottom row first
        np.testing.assert_array_equal(obs["eye_in_hand_rgb"][:, ::-1], drawn["robot0_eye_in_hand"])
        layout = plain.obs_layout
        np.testing.assert_allclose(obs["proprio"][:, :3], state_obs[:, layout["eef_pos"]], atol=1e-6)
        np.testing.assert_allclose(obs["proprio"][:, 7:], state_obs[:, layout["gripper_qpos"]], atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(obs["proprio"][:, 3:7], axis=1), 1, atol=1e-6)

    (obs, _), (state_obs, _) = (e.reset(seed=3, options={"init_state": [0, 1, 2]}) for e in (env, plain))
    assert obs in env.observation_space and obs["agentview_rgb"].dtype == np.uint8 and obs["agentview_rgb"].std() > 10
    check(obs, env.get_state(), state_obs)
    assert not np.array_equal(obs["agentview_rgb"][0], obs["agentview_rgb"][1])
    rng = np.random.default_rng(0)
    for step in range(3):
        actions = rng.uniform(-1, 1, (3, 7))
        (obs, *flags, info), (state_obs, *same_flags, same_info) = env.step(actions), plain.step(actions)
        np.testing.assert_array_equal(env.get_state(), plain.get_state())
        np.testing.assert_array_equal(flags, same_flags)
        check(obs, env.get_state(), state_obs)
        assert ("final_obs" in info) == (step == 1)
        if "final_obs" in info:
            np.testing.assert_array_equal(info["final_length"], same_info["final_length"])
            check(info["final_obs"], info["final_states"], same_info["final_obs"])
            assert not np.array_equal(info["final_obs"]["agentview_rgb"], obs["agentview_rgb"])
    snapshot = env.snapshot()
    after = env.step(actions)[0]
    env.restore(snapshot)
    np.testing.assert_array_equal(env.observations()["agentview_rgb"], obs["agentview_rgb"])
    np.testing.assert_array_equal(env.step(actions)[0]["agentview_rgb"], after["agentview_rgb"])
    assert env.unwrapped.task is drawer_task and env.max_steps == 2 and env.obs_layout == plain.obs_layout


def test_pixel_env_draws_what_is_asked_for_and_new(drawer_task, monkeypatch):
    """Black elsewhere; new episodes always; what is idle, or was not reset, keeps its picture without drawing."""
    env = make_env(drawer_task, 3, seed=0, obs="pixels", image_size=32, settle_steps=0, max_steps=2, show_state=True)
    render, drawn = env.pixels.renderer.render, []
    monkeypatch.setattr(env.pixels.renderer, "render", lambda qpos: drawn.append(len(qpos)) or render(qpos))

    def check(obs, shown):
        assert [bool(picture.any()) for picture in obs["agentview_rgb"]] == shown
        truth = render(env.get_state()[:, 1 : 1 + drawer_task.model.nq])["agentview"][:, ::-1]
        np.testing.assert_array_equal(obs["agentview_rgb"][shown], truth[shown])
        np.testing.assert_array_equal(obs["proprio"], env.pixels(env.get_state(), pictures=False)["proprio"])
        np.testing.assert_array_equal(obs["state"], env.env.observations())

    rng = np.random.default_rng(0)
    env.reset(seed=3)
    obs = env.step(rng.uniform(-1, 1, (3, 7)), draw=np.array([True, False, False]))[0]
    check(obs, [True, False, False])
    check(env.observations(), [True, True, True])
    assert sum(drawn) == 3 + 1 + 2
    obs, _, _, truncated, info = env.step(rng.uniform(-1, 1, (3, 7)), draw=np.zeros(3, bool))
    assert truncated.all() and not info["final_obs"]["agentview_rgb"].any()
    check(obs, [True, True, True])
    drawn.clear()
    check(env.step(rng.uniform(-1, 1, (3, 7)), np.array([False, True, False]))[0], [True, True, True])
    check(env.reset(options={"reset_mask": np.array([False, False, True])})[0], [True, True, True])
    assert sum(drawn) == 1 + 1


def test_demonstrations_are_seen_as_by_the_environment(drawer_task, demos):
    episode = read_episodes(demos, drawer_task)[0]
    env = make_env(drawer_task, 1, obs="pixels", image_size=32, autoreset_mode=AutoresetMode.DISABLED)
    (seen,) = observe_demos(env, [dataclasses.replace(episode, states=episode.states[:3], actions=episode.actions[:3])], Progress())
    assert seen["agentview_rgb"].shape == (3, 32, 32, 3) and seen["proprio"].shape == (3, 9)
    for t in range(3):
        env.set_state(episode.states[t : t + 1])
        for name, x in env.observations().items():
            np.testing.assert_array_equal(x[0], seen[name][t])
    # files hold proprioception from after each action
    after = np.hstack([episode.proprio[name][:2] for name in ("ee_pos", "ee_quat", "gripper_states")])
    np.testing.assert_allclose(seen["proprio"][1:], after, atol=1e-5)


def test_bad_pixel_options(drawer_task):
    for options in ({"obs": "depth"}, {"obs": "pixels", "image_size": 0}, {"obs": "pixels", "cameras": ("nowhere",)}):
        with pytest.raises(UserError):
            make_env(drawer_task, **options)


# ---------------------------------------------------------------------------------------------- the scripts on a plane


def with_pictures(plane: type, show_state: bool = False) -> type:
    """A Plane whose observations are a picture of the point and the vectors to its goals as proprioception, and perhaps its state."""

    class PixelPlane(plane):
        single_observation_space = pixel_space(plane(num_envs=1).observations().shape[1] if show_state else 0)

        def observations(self):
            state = super().observations()
            views = np.full((self.num_envs, 32, 32, 3), 60, np.uint8)
            for view, (x, y) in zip(views, self.position, strict=True):
                row, column = (np.clip([0.5 - y / 2, 0.1 + x / 1.5], 0, 0.9) * 28).astype(int)
                view[row : row + 5, column : column + 5] = (250, 200, 20)
            seen = {"agentview_rgb": views, "proprio": np.resize(state[:, 2:].T, (6, self.num_envs)).T.copy()}
            return seen | {"state": state} if show_state else seen

        def step(self, actions, draw=None):
            obs, *flags, info = super().step(actions)
            if draw is not None:
                obs["agentview_rgb"][~(draw | flags[1] | flags[2])] = 0
                if "final_obs" in info:
                    info["final_obs"]["agentview_rgb"] = np.zeros_like(obs["agentview_rgb"])
            return obs, *flags, info

    return PixelPlane


def pixel_space(states: int = 0) -> gym.spaces.Dict:
    """Of pictures and proprioception, and of a state of so many numbers, if any."""
    numbers = {"proprio": 6} | ({"state": states} if states else {})
    boxes = {name: gym.spaces.Box(-np.inf, np.inf, (size,), np.float32) for name, size in numbers.items()}
    return gym.spaces.Dict({"agentview_rgb": gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)} | boxes)


def make_trainer(script, env=None, seed=0, **changes):
    """Reinforce of each script, with random weights, in `env`: by default a plane of pictures."""
    settings = dict(num_steps=6, total_steps=4 * 6 * 8, hidden=16, num_minibatches=1, update_epochs=1, critic_warmup=0)
    torch.manual_seed(0)
    plane = (test_dlr_discover if script is dlr_discover else test_gaussian_ppo).Plane
    estimate = changes.setdefault("train_encoder", "policy") == "state"
    env = env or with_pictures(plane, estimate)(num_envs=4, max_steps=4, seed=seed)
    space = getattr(env, "single_observation_space", None)  # a plane has none
    space = space or (pixel_space() if isinstance(env.observations(), dict) else env.observations()[0])
    encoder = (make_estimator if estimate else make_obs_encoder)(space, "small")
    args = script.Args(**(settings | changes))
    if script is diffusion_ppo:
        args = dataclasses.replace(args, chunk=2, execute=2, denoising_steps=3, finetune_steps=2)
        return script.Reinforce(args, env, script.Agent(args, encoder))
    if script is gaussian_ppo:
        return script.Reinforce(args, env, script.Agent(encoder, args.hidden))
    parts = script.Agent(encoder, 2, args.hidden), script.PatternEncoder(6, 2)
    return script.Reinforce(args, env, *parts, [0, 1], np.ones(2))


SCRIPTS = pytest.mark.parametrize("script", [dlr_discover, gaussian_ppo, diffusion_ppo], ids=lambda script: script.__name__)


@SCRIPTS
def test_first_minibatch_has_ratio_one_in_pixels(script, monkeypatch):
    """The policy is scored on the very pictures that it acted on, shifted as they were."""
    trainer, batches = make_trainer(script), []
    update = script.ppo_update

    def spy(*arguments, **named):
        batches.append(next(x for x in arguments if isinstance(x, dict)))
        return update(*arguments, **named)

    monkeypatch.setattr(script, "ppo_update", spy)
    pictures = (trainer.agent.actor if script is diffusion_ppo else trainer.agent).obs_encoder.pictures
    before = weights(pictures)
    for iteration in range(2):
        logs = trainer.run_iteration()
        assert logs["losses/ratio"] == pytest.approx(1.0, abs=1e-4)
        assert logs["losses/approx_kl"] == pytest.approx(0.0, abs=1e-5)
        assert logs["losses/clipfrac"] == 0.0 and logs["losses/updates"] == 1
        assert logs["losses/kl_to_learn"] == pytest.approx(0.0, abs=1e-5) or iteration
        assert not same(weights(pictures), before)  # PPO trains the encoder
    seen = batches[0]["obs"]
    assert isinstance(seen, TensorDict) and seen["agentview_rgb"].dtype == torch.uint8
    tops = (seen["agentview_rgb"][:4, :, :, 0] == 250).any(2).int().argmax(1)  # where the four points begin, 1 pixel apart at most
    assert tops.max() - tops.min() >= 3


@SCRIPTS
def test_pictures_are_worked_on_once_where_an_estimator_reads_them(script, monkeypatch):
    """--train-encoder state: PPO keeps estimates, not pictures, and trains what acts on them."""
    trainer, batches, encoded = make_trainer(script, train_encoder="state"), [], []
    agent = trainer.agent.actor if script is diffusion_ppo else trainer.agent
    update, body = script.ppo_update, agent.obs_encoder.encoder.pictures["agentview_rgb"][0]
    monkeypatch.setattr(script, "ppo_update", lambda *args, **named: batches.extend(args) or update(*args, **named))
    body.register_forward_hook(lambda module, pictures, cells: encoded.append(len(cells)))
    encoder, whole = weights(agent.obs_encoder), weights(agent)
    logs = trainer.run_iteration()
    assert same(weights(agent.obs_encoder), encoder) and not same(weights(agent), whole)
    assert logs["losses/ratio"] == pytest.approx(1.0, abs=1e-4) and logs["losses/updates"] == 1
    (batch,) = (x for x in batches if isinstance(x, dict))
    assert sorted(batch["obs"].tensors) == ["estimate", "proprio", "state"]
    if script is diffusion_ppo:  # chunks of two actions: where they begin, and what the last step returns
        assert sum(encoded) == 4 * 4
    else:  # what six steps return, what came before, and the four last pictures of episodes
        assert sum(encoded) == 4 * 7 + 4
    assert not any(x.isnan().any() for x in batch["obs"].tensors.values())
    obs = to_tensor(trainer.env.observations())
    with torch.no_grad():
        assert torch.equal(agent.obs_encoder(agent.obs_encoder.look(obs)), agent.obs_encoder(obs))


def test_an_estimator_tells_where_things_are():
    """A point that the picture shows and proprioception doesn't, on pictures it has not seen, beside what no picture shows; the policy
    never sees the true state."""
    rng = np.random.default_rng(0)

    def drawn(number: int) -> TensorDict:
        at = rng.integers(2, 28, (number, 2))
        views = np.full((number, 32, 32, 3), 60, np.uint8)
        for view, (row, column) in zip(views, at, strict=True):
            view[row : row + 4, column : column + 4] = (250, 200, 20)
        state = np.concatenate([at / 32 - 0.5, rng.uniform(-1, 1, (number, 6))], 1).astype(np.float32)
        return to_tensor({"agentview_rgb": views, "proprio": np.zeros((number, 6), np.float32), "state": state})

    torch.manual_seed(0)
    estimator = make_estimator(pixel_space(8), "small")
    seen, unseen, losses = drawn(400), drawn(100), []
    learn_to_estimate(estimator, seen, 150, lambda step, row: losses.append(row["learn/estimator_loss"]))
    estimator.fit(estimator.look(seen))
    with torch.no_grad():
        error = (estimator.estimate(unseen) - unseen["state"])[:, :2].abs()
        assert error.median() < 0.02 and losses[-1] < losses[0] - 1  # guessing the middle is 0.2 off
        assert estimator.log_scale[:2].max() < estimator.log_scale[2:].min()
        moved = TensorDict(unseen.tensors | {"state": -unseen["state"]})
        assert torch.equal(estimator(moved), estimator(unseen))
        assert not torch.equal(estimator.critic_view(moved), estimator.critic_view(unseen))


def test_what_proprioception_says_of_a_state_is_exact(drawer_task, demos):
    """The hand's own numbers; what is relative to it, but for where in the world the other thing is. An estimator only adds the rest."""
    observe, episode = StateObservation(drawer_task), read_episodes(demos, drawer_task)[0]
    env = make_env(drawer_task, 1, obs="pixels", image_size=32, show_state=True)
    hand, state = HandState(observe), torch.as_tensor(observe_states(drawer_task, episode.states))
    seen = to_tensor(env.pixels(episode.states))
    unknown, layout = state - hand(seen["proprio"]), observe.layout
    assert hand.rest.sum() == observe.size - 11
    torch.testing.assert_close(unknown[:, hand.rest == 0], torch.zeros(len(state), 11), atol=1e-6, rtol=0)
    (handle,) = (name for name in layout if name.endswith("_to_eef") and not name.endswith("region_to_eef"))
    assert unknown[:, layout[handle]].std(0).max() > 0.02 and unknown[:20, layout[handle]].std(0).max() < 1e-5  # until the drawer moves
    estimator = make_estimator(env.single_observation_space, "small", hand=hand)
    with torch.no_grad():
        torch.testing.assert_close(estimator.estimate(seen)[:, hand.rest == 0], state[:, hand.rest == 0], atol=1e-6, rtol=0)


@SCRIPTS
def test_compiled_updates_are_the_eager_ones(script, monkeypatch):
    """--compile, up to the compiler itself (which needs CUDA): all of acting and of the losses is traced, and gives the same weights."""
    traced, trace = [], torch.compile
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)  # as on CUDA
    monkeypatch.setattr(torch, "compile", lambda f, mode: traced.append(f) or trace(f, backend="aot_eager", fullgraph=True))
    results = []
    for compile in (False, True):
        plane = (test_dlr_discover if script is dlr_discover else test_gaussian_ppo).Plane
        trainer = make_trainer(script, plane(num_envs=4, max_steps=4, seed=0), num_minibatches=2, step_kl=1e-7, compile=compile)
        logs = trainer.run_iteration()
        assert logs["losses/updates"] == 2  # the second one does not move the policy any more
        results.append(weights(trainer.agent))
    assert same(*results) and len(traced) == 2
    compiled.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@SCRIPTS
def test_compiled_losses_on_cuda(script, monkeypatch):
    """One batch: compiled on the GPU against eager on the CPU. States; pictures are in bfloat16."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    plane, batches, results = (test_dlr_discover if script is dlr_discover else test_gaussian_ppo).Plane, [], []
    trainer = make_trainer(script, plane(num_envs=4, max_steps=4, seed=0))
    update = script.ppo_update

    def spy(args, agent, optimizer, batch, train_actor):
        batches.append((batch, weights(agent)))
        return update(args, agent, optimizer, batch, train_actor)

    monkeypatch.setattr(script, "ppo_update", spy)
    trainer.run_iteration()
    ((batch, before),), args, agent = batches, trainer.args, trainer.agent
    weighing = [script.denoising_weights(args)] if script is diffusion_ppo else []
    agent.load_state_dict(before)
    for device, compile in (("cpu", False), ("cuda", True)):
        agent.to(device).zero_grad()
        here = [[x.to(device) for x in w] for w in weighing]
        row = compiled(script.ppo_losses, compile)(args, agent, *here, {name: x.to(device) for name, x in batch.items()}, True)
        (row["value_loss"] + row["policy_loss"]).backward()
        results.append([x.detach().cpu() for x in (*row.values(), *(p.grad for p in agent.parameters() if p.grad is not None))])
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager, atol=1e-4, rtol=1e-3)
    compiled.cache_clear()


@pytest.mark.skipif(mujoco.__version__ < "3.8", reason="MuJoCo Warp needs mujoco 3.8 or later")
@pytest.mark.parametrize("train_encoder", ["state", "policy"])
@SCRIPTS
def test_ppo_on_pictures_of_warps_worlds(script, train_encoder, drawer_task):
    """--obs pixels --backend warp, on Warp's CPU device."""
    how = dict(obs="pixels", image_size=32, backend="warp", device="cpu", settle_steps=0, max_steps=2, show_state=train_encoder == "state")
    trainer = make_trainer(script, make_env(drawer_task, 2, **how), num_steps=3, train_encoder=train_encoder)
    logs = trainer.run_iteration()
    assert logs["losses/ratio"] == pytest.approx(1.0, abs=1e-4) and logs["losses/updates"] == 1 and logs["charts/episodic_length"] == 2


@SCRIPTS
def test_the_critic_leaves_the_policys_features_alone(script):
    trainer = make_trainer(script, critic_warmup=1)
    before = weights(trainer.agent)
    trainer.run_iteration()
    after = weights(trainer.agent)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed - {"log_std"} == {"critic"}  # which Reinforce sets by schedule


@pytest.mark.parametrize("train_encoder", ["policy", "state"])
@SCRIPTS
def test_reinforce_continues_exactly_in_pixels(script, train_encoder, tmp_path):
    results = []
    for stop in (None, 1):
        trainer = make_trainer(script, train_encoder=train_encoder)
        for iteration in range(2):
            if iteration == stop:
                save_checkpoint(tmp_path / "c.pt", {"script": "s", "trainer": trainer.state_dict()})
                trainer = make_trainer(script, seed=99, train_encoder=train_encoder)
                torch.rand(17)
                trainer.load_state_dict(load_checkpoint(tmp_path / "c.pt", "s")["trainer"])
            trainer.run_iteration()
        results.append(weights(trainer.agent))
    assert same(*results)


def bright_demos(number: int) -> tuple[list, list, gym.Space]:
    """Demonstrations whose action is how bright the picture is, which nothing else says; and the space of the observations."""
    rng, demos, actions = np.random.default_rng(0), [], []
    for _ in range(number):
        bright = rng.uniform(size=8)
        views = np.broadcast_to((255 * bright[:, None, None, None]).astype(np.uint8), (8, 32, 32, 3)).copy()
        demos.append({"agentview_rgb": views, "proprio": np.zeros((8, 6), np.float32)})
        actions.append(np.repeat(1.6 * bright[:, None] - 0.8, 7, axis=1))
    return demos, actions, pixel_space()


def test_learn_reads_the_pictures():
    demos, actions, space = bright_demos(10)
    torch.manual_seed(0)
    args = gaussian_ppo.Args(hidden=32, learn_epochs=12, learn_batch=24, learn_lr=1e-3)
    agent = gaussian_ppo.Agent(make_obs_encoder(space, "small"), args.hidden)
    gaussian_ppo.learn(args, agent, demos, actions, lambda *_: None)
    dark, light = agent.act(demos[0], np.zeros(8, int))[np.argsort(actions[0][:, 0])][[0, -1]]
    assert dark.mean() < -0.2 and light.mean() > 0.2


def test_learn_trains_the_encoder_of_the_diffusion_policy():
    demos, actions, space = bright_demos(3)
    args = diffusion_ppo.Args(hidden=16, learn_epochs=2, learn_batch=8)
    agent, losses = diffusion_ppo.Agent(args, make_obs_encoder(space, "small")), []
    before = weights(agent.actor.obs_encoder.pictures)
    diffusion_ppo.learn(args, agent, demos, actions, lambda epoch, row: losses.append(row["learn/held_out_loss"]))
    assert losses[1] < losses[0] < 2  # near 1: the network has hardly begun
    assert not same(weights(agent.actor.obs_encoder.pictures), before)
    assert same(weights(agent.actor), weights(agent.base))


# ---------------------------------------------------------------------------------------------- the whole job

TINY = """--obs pixels --image-size 32 --num-envs 2 --torch-threads 1 --learn-epochs 1 --learn-batch 64 --hidden 16 --num-steps 4
    --total-steps 24 --num-minibatches 2 --update-epochs 1 --critic-warmup 1 --checkpoint-interval 1 --eval-episodes 1 --corpus-episodes 1
    --no-videos"""
OWN = {dlr_discover: "--num-patterns 2 --discover-steps 20", gaussian_ppo: "", diffusion_ppo: "--chunk 2 --execute 2"}


@SCRIPTS
def test_whole_job_in_pixels(script, demos, tmp_path, drawer_task, monkeypatch, capsys):
    """Every stage, with episodes that are over too soon to succeed."""
    few = []
    for e in read_episodes(demos, drawer_task)[:4]:  # their beginnings are enough
        proprio = {name: x[:20] for name, x in e.proprio.items()}
        few.append(dataclasses.replace(e, states=e.states[:20], actions=e.actions[:20], proprio=proprio, final_state=e.states[20]))
    write_episodes(tmp_path / "few.hdf5", few, drawer_task, {})
    monkeypatch.setattr("common.job.make_env", lambda *args, **how: make_env(*args, **how | {"max_steps": 3}))
    flags = ["--task", "libero_goal/0", "--demos", tmp_path / "few.hdf5", "--run-folder", tmp_path / "runs", *TINY.split()]
    flags += OWN[script].split()
    with pytest.raises(SystemExit):
        run_main(script, *flags)
    assert "no corpus to write" in capsys.readouterr().err
    (run,) = (tmp_path / "runs").iterdir()
    checkpoint = load_checkpoint(run / "checkpoint.pt", script.__name__)
    assert checkpoint["stage"] == "roll out" and checkpoint["env_steps"] == 24
    assert '"renderer": "warp"' in (run / "config.json").read_text()
    assert any("pictures.agentview_rgb" in name for name in checkpoint["agent"])


def test_wrong_pixel_flags(tmp_path, capsys):
    for script, flags, message in (
        (gaussian_ppo, ["--image-size", 16], "--image-size must be 0 or between 32 and 512, not 16"),
        (diffusion_ppo, ["--image-size", 1000], "--image-size must be 0 or between 32 and 512, not 1000"),
        (dlr_discover, ["--obs", "pixels", "--mi-coef", 0.1], "--mi-coef needs --obs state"),
    ):
        line = test_gaussian_ppo.refused(script, capsys, tmp_path, "--run-folder", tmp_path / "runs", *flags)
        assert message in line
