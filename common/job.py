"""What an RL script does around its learning: flags, run, task, environments, demonstrations, when to stop, and what comes out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from common import metrics, rollout
from common.cli import Count, Fraction, NotNegative, PositiveOrInf, Range, UserError, check_ranges
from common.data import Episode, read_attrs, read_episodes
from common.estimator import HandState, StateEstimator, learn_to_estimate, make_estimator
from common.libero import Task, load_task, make_env
from common.libero.assets import assets_like
from common.libero.env import LiberoVectorEnv
from common.libero.judge import goal_reached
from common.libero.make import choose_backend, choose_physics
from common.libero.observation import StateObservation, observe_states
from common.libero.pixels import PixelEnv
from common.libero.tasks import find_human_demos
from common.networks import CONVOLUTIONS, Normalizer, PixelEncoder, make_obs_encoder
from common.rollout import Policy
from common.runs import Progress, Run, choose_device, read_config, rng_state, set_rng_state
from common.suites import canonical
from common.tensors import join, to_tensor

# At most so many environments evaluate and roll out the corpus, by backend. On CPU cores, more would mostly idle in the end. A GPU takes
# about as long for 512 worlds as for 64, and then 50 to 400 episodes run at once instead of one after the other.
EVAL_ENVS = {"cpu": 64, "warp": 512}
DEMOS_PER_GOAL = 48  # 48 of libero_10/0, two things into the basket, are cloned to 78 %, 96 to 94 %


@dataclasses.dataclass
class JobArgs:
    """Flags that the RL scripts share: the task, where to run, demonstrations, and what is rolled out in the end."""

    task: str = "libero_90/KITCHEN_SCENE1_put_the_black_bowl_on_the_plate"
    """a LIBERO task: suite/index, suite/name, or any part of a name that is unique; or your own: path/to/task.bddl"""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: $LIBERO_ASSETS, else LIBERO's own, else stand-ins)"""
    seed: Annotated[int, Range(0)] = 1
    """seed of everything that is random"""
    resume: str | None = None
    """go on with the run in this folder, exactly where its last checkpoint left it"""
    allow_mismatch: bool = False
    """go on also where assets, demonstrations or MuJoCo's version are not those that the run was started with"""
    run_folder: str = "runs"
    """where runs are written"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb)"""
    wandb_project_name: str = "rl-data-engine"
    """the project there"""
    wandb_entity: str | None = None
    """the team there"""
    num_envs: Count = 32
    """parallel environments"""
    torch_threads: Count = 2
    """threads of the learner (results are reproducible for a fixed number)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto (CUDA, if there is a GPU; for few environments with states, cpu may be faster), cpu or cuda"""
    backend: Literal["auto", "cpu", "warp"] = "auto"
    """simulator: cpu (all cores), warp (MuJoCo Warp on --device) or auto (warp on a GPU from 256 environments on)"""
    physics: Literal["auto", "exact", "sleep", "coarse"] = "auto"
    """of training: exact, sleep (what rests costs nothing), coarse (also physics steps of 4 ms, not 2; once an evaluation says that success
    there is not success in exact physics, sleep) or auto (coarse where MuJoCo has sleep); evaluation and corpus are always exact"""
    compile: bool = False
    """compile acting and PPO's losses (CUDA)"""
    checkpoint_interval: Count = 5
    """PPO iterations between checkpoints: what a kill can lose at most"""
    obs: Literal["state", "pixels"] = "state"
    """what the policy sees: the simulator's state, or the third-person picture and proprioception"""
    cameras: list[Literal["agentview", "robot0_eye_in_hand"]] = dataclasses.field(default_factory=lambda: ["agentview"])
    """whose pictures the policy sees: LIBERO's third-person camera, the one at the wrist, or both"""
    encoder: Literal["auto", "small", "resnet18"] = "auto"
    """of pictures: resnet18, the papers', or small, four convolutions; auto: small on a CPU"""
    image_size: Annotated[int, Range(32, 512, zero=True)] = 0
    """pixels of a picture's side (0: as the encoder likes it, small 64, resnet18 84)"""
    train_encoder: Literal["state", "policy"] = "state"
    """with pixels, what the encoder is trained for: before Learn, to tell the simulator's state, which the policy then acts on; or the
    policy, by Learn and PPO, as in the papers"""
    estimator_steps: Count = 1000
    """gradient steps of an encoder that tells the state"""
    near_field: NotNegative = 0.03
    """with states, metres within which relative positions are shown in detail, beside the standardised state (0: not)"""
    critic: Literal["features", "state"] = "features"
    """with pixels, what the critic sees: the policy's features, or the simulator's state, which the policy never does (as it always is with
    --train-encoder state)"""

    # Demonstrations
    demos: str = "auto"
    """auto (LIBERO's human files if they are on disk, else scripted), scripted, or an HDF5 file in LIBERO's layout"""
    filter_key: str | None = None
    """of a file with robomimic's filter keys, only the demonstrations that mask/KEY names"""
    num_demos: Count | None = None
    """scripted demonstrations to generate (cached). None: 48 for each thing that the goal asks for"""
    demo_noise: NotNegative = 0.1
    """action noise of scripted demonstrations (standard deviation, in units of the action range)"""

    # Reinforce
    train_limit: PositiveOrInf = 1.5
    """episodes of training end, without success, after so many times the mean length of demonstrations (inf: at the task's limit, as
    evaluation's): what has failed by then seldom succeeds, and would be most of the steps"""
    stop_success: Fraction | None = 0.97
    """stop training when the last 50 episodes of each pattern, and then half an evaluation from training starts, succeed so often (mean;
    each pattern within 5 points of it). None: train for all --total-steps, as a comparison at equal steps needs"""

    # Roll out
    eval_episodes: Count = 50
    """official init states to evaluate each pattern on (at most 50)"""
    corpus_episodes: Count = 20
    """successful trajectories a pattern in the corpus"""
    corpus_images: Annotated[int, Range(32, 512, zero=True)] = 0
    """also store pictures of so many pixels a side in the corpus, agentview's and the wrist's (0: none; common.libero.render adds them)"""
    videos: bool = True
    """one video a pattern, where pictures can be rendered"""

    def __post_init__(self) -> None:
        check_ranges(self)
        self.task = canonical(self.task)


class Job:
    """What an RL script has at hand while it learns: its run, the task, environments, and demonstrations; and the rollouts in the end.

    `train_env` resets itself, `eval_env` doesn't. Nothing is written before `begin`.
    """

    def __init__(self, script: str, cls: type):
        self.run = run = Run(script, cls)
        self.args = run.args = args = choose_devices(run.args)
        torch.set_num_threads(args.torch_threads)
        if run.folder is not None:  # where they are others, `begin` says so
            self.task = task = load_task(args.task, assets_like(read_config(run.folder).get("assets"), args.assets))
        else:
            made_on = None if args.demos in ("auto", "scripted") else read_attrs(args.demos).get("assets")
            self.task = task = load_task(args.task, args.assets, made_on, args.demos)
        run.progress.say(f"task {task.id}: {task.language}; simulator {args.backend}, physics {args.physics}, learner on {args.device}")
        self.renderer, self.videos = rollout.find_renderer(args.obs, args.videos, args.corpus_images, run.progress)
        self.demos, self.demo_source = load_demos(
            args.demos, task, args.num_demos, args.demo_noise, args.seed, run.progress, args.filter_key
        )
        length = np.mean([e.length for e in self.demos])
        how = observation(args) | {"backend": args.backend, "device": args.device}
        limit = math.ceil(min(task.max_steps, args.train_limit * length))
        self.train_env = make_env(task, args.num_envs, seed=args.seed, physics=args.physics, max_steps=limit, **how)
        self.eval_env = make_env(
            task, min(args.num_envs, EVAL_ENVS[args.backend]), seed=args.seed, **how, autoreset_mode=AutoresetMode.DISABLED
        )
        if args.total_steps is None:  # config.json keeps the None: it is of the demonstrations, which a resumed run has, too
            self.args = dataclasses.replace(args, total_steps=max(450_000, round(3600 * length)))
        run.progress.say(f"Reinforce: {self.args.total_steps:,} steps at most, in episodes of {limit} at most")

    def begin(self) -> None:
        """Begin the run, or go on with it."""
        depends = {"assets": self.task.assets, "demonstrations": fingerprint(self.demos)}
        if self.args.obs == "pixels":
            depends["image_assets"] = self.task.image_assets
        self.run.open(self.task.id, depends, demos=self.demo_source, renderer=self.renderer)
        if self.run.checkpoint.setdefault("physics", self.args.physics) != self.args.physics:  # see `train`
            self.train_env.set_physics("sleep")

    def obs_encoder(self) -> Normalizer | PixelEncoder | StateEstimator:
        """A new encoder of what the environment shows."""
        return obs_encoder(self.args, self.train_env.single_observation_space, self.task)

    def observed_demos(self, encoder: Normalizer | PixelEncoder | StateEstimator) -> list:
        """What the policy would have seen in the demonstrations, see `observe_demos`; by a `StateEstimator`, which is trained on them."""
        seen = observe_demos(self.train_env, self.demos, self.run.progress)
        if not isinstance(encoder, StateEstimator):
            return seen
        steps, device = self.args.estimator_steps, encoder.middle.device
        tick = self.run.ticker("Learn to tell the state", steps, "error {learn_estimator_error:.4f}", each=20)
        torch.manual_seed(self.args.seed + 1)
        learn_to_estimate(encoder, join(seen, device), steps, tick)
        return [{name: x.cpu().numpy() for name, x in encoder.look(to_tensor(obs, device)).tensors.items()} for obs in seen]

    def evaluate(self, policy: Policy, patterns: Sequence[int], stage: str, most: int | None = None) -> tuple[list[dict], list[Episode]]:
        """Success of each pattern from the official init states: rows of summary.json's `per_pattern`, the episodes, and a line about it.

        `most` episodes of all patterns together, and as many of each.
        """
        each = self.args.eval_episodes if most is None else min(self.args.eval_episodes, max(1, most // len(patterns)))
        rows, episodes = rollout.evaluate(self.eval_env, policy, patterns, each, self.run.progress, f"evaluate {stage}")
        rates = [row["success_rate"] for row in rows]
        each = f" ({', '.join(f'{rate:.0%}' for rate in rates)})" if len(rates) > 1 else ""
        self.run.progress.say(f"{stage}: success {np.mean(rates):.0%}{each}")
        return rows, episodes

    def train(self, trainer: Trainer, policy: Policy, patterns: Sequence[int], note: Callable[[dict[str, float]], str]) -> None:
        """Train to the end, or until `--stop-success` is reached: in training's last episodes, and then in an evaluation from training
        starts, of half as many episodes a pattern as the final one, and twice as many in all. Official init states are kept for the end:
        what had been stopped for on them would look too good. If that fails, what is left to learn may be what coarse physics get wrong:
        training goes on in finer ones, those of this evaluation: sleep, in which success is that of exact physics."""

        def done() -> bool:
            if not trainer.promising:
                return False
            trainer.looked = trainer.iteration
            passes, episodes = functools.partial(succeeds, self.args.stop_success), self.args.eval_episodes
            each = max(1, episodes // 2, 2 * episodes // len(patterns))
            if fast := self.args.physics != "exact":
                self.eval_env.set_physics("sleep")
            self.eval_env.reset(seed=self.args.seed + 6)
            rows, _ = rollout.evaluate(self.eval_env, policy, patterns, each, self.run.progress, "can it stop?", passes, official=False)
            if fast:
                self.eval_env.set_physics("exact")
            finer = rows is None and self.run.checkpoint["physics"] == "coarse"
            if finer:
                self.run.checkpoint["physics"] = "coarse, then sleep"
                self.train_env.set_physics("sleep")
            verdict = "good enough to stop" if rows is not None else "not good enough yet" + ", on in finer physics" * finer
            self.run.progress.say(f"after {trainer.env_steps} steps: {verdict}")
            if rows is None:
                self.run.progress.stage("Reinforce", trainer.num_iterations, trainer.iteration)
            return rows is not None

        self.run.train(trainer, note, done)

    def roll_out(self, policy: Policy, patterns: Sequence[int]) -> tuple[list[Episode], dict[str, Any]]:
        """The trained policy's evaluation and its corpus, with figures and videos, into the run's folder.

        Returns: the corpus, sorted by pattern, and what summary.json says of it.
        """
        run, args, task, env, progress = self.run, self.args, self.task, self.eval_env, self.run.progress
        per_pattern, _ = self.evaluate(policy, patterns, "Reinforce")
        trained = run.checkpoint["history"][-1][1:]
        for line in gaps(per_pattern, trained):
            progress.say(line)
        corpus = []
        if any(row["success_rate"] for row in per_pattern):
            corpus = rollout.collect_corpus(env, policy, patterns, args.corpus_episodes, args.seed + 4, run.script, progress)
        if not corpus:
            raise UserError(f"no rollout succeeded, so there is no corpus to write; the logs are in {run.folder}")
        commanded = [e.attrs["pattern"] for e in corpus]
        features = rollout.path_features(task, corpus)
        distances = metrics.pairwise_dtw(features)
        within, between = metrics.within_between(distances, commanded)
        consistency = rollout.measure_consistency(env, policy, patterns, args.eval_episodes, args.demo_noise, args.seed + 5, progress)
        attrs = {"script": run.script, "demos": self.demo_source, "training_physics": run.checkpoint["physics"]}
        rollout.write_corpus(run.folder, task, corpus, attrs, args.corpus_images, args.assets, progress)
        rollout.plot_corpus(run.folder, task, features, commanded, distances)
        if self.videos:
            rollout.make_videos(run.folder, task, corpus, self.renderer, progress)
        return corpus, {
            "task": task.id,
            "success_rate": float(np.mean([row["success_rate"] for row in per_pattern])),
            "per_pattern": per_pattern,
            "success_in_training": trained,
            "diversity": metrics.diversity(features) | {"dtw_within": within, "dtw_between": between},
            "smoothness": metrics.smoothness([e.proprio["ee_pos"] for e in corpus], [e.actions for e in corpus]),
            "consistency": consistency,
            "corpus_episodes": len(corpus),
            "env_steps": run.checkpoint["env_steps"],
            "demos": self.demo_source,
            "assets": task.assets,
            "physics": run.checkpoint["physics"],
            "renderer": self.renderer,
        }


def succeeds(stop_success: float, rates: Sequence[float]) -> bool:
    """Whether the success of all patterns is enough to stop at: their mean, and each within 5 points of it."""
    return bool(np.mean(rates) >= stop_success and min(rates) >= stop_success - 0.05)


def gaps(per_pattern: Sequence[dict], trained: Sequence[float]) -> list[str]:
    """A warning for each pattern whose success in the evaluation and in the last episodes of training differ by more than 10 points.

    Args: rows of `Job.evaluate`; success in training by pattern, NaN where it is not known.
    """
    found = []
    for row in per_pattern:
        name, then, now = (
            f"pattern {row['pattern']}" if len(per_pattern) > 1 else "the policy",
            trained[row["pattern"]],
            row["success_rate"],
        )
        if abs(now - then) > 0.1 + 1e-9:  # never where it is NaN
            found.append(
                f"warning: {name} succeeded {then:.0%} in the last episodes of training (sampled actions, training starts, training's "
                f"physics) and {now:.0%} in the evaluation (mean actions, official starts, exact physics)"
            )
    return found


class Trainer:
    """What PPO's trainers share that is not PPO: how far they are, and all that an exact continuation needs.

    Subclasses have an optimizer, and name in `parts` what else of theirs has a state dict.
    """

    parts: tuple[str, ...] = ("agent", "optimizer")

    def __init__(self, args: JobArgs, env: LiberoVectorEnv, agent: torch.nn.Module, num_patterns: int = 1):
        self.args, self.env, self.agent, self.alive = args, env, agent, np.arange(num_patterns)
        self.outcomes = [deque(maxlen=50) for _ in range(num_patterns)]  # success of the last episodes of each pattern
        self.looked = 0  # when it was last seen whether training can stop
        self.num_iterations = max(1, args.total_steps // (args.num_steps * env.num_envs))
        self.iteration = 0
        self.history: list[list[float]] = []  # environment steps, then success (of each pattern)
        torch.manual_seed(args.seed + 2)
        agent.zero_grad()  # what Learn left, and a run that is resumed here does not have, would be clipped along

    @property
    def env_steps(self) -> int:
        return self.iteration * self.args.num_steps * self.env.num_envs

    @property
    def settled(self) -> bool:
        """Whether failures have had time to end, too: before that, success says nothing."""
        return self.iteration * self.args.num_steps >= self.env.max_steps

    @property
    def promising(self) -> bool:
        """Whether each pattern's last 50 episodes say that training might stop (and a fifteenth has passed since it was looked at)."""
        if self.args.stop_success is None or not self.settled or self.iteration - self.looked < self.num_iterations / 15:
            return False
        outcomes = [self.outcomes[k] for k in self.alive]
        return all(len(o) == o.maxlen for o in outcomes) and succeeds(self.args.stop_success, [np.mean(o) for o in outcomes])

    def run_iteration(self) -> dict[str, float]:
        """One rollout and update; returns what to log."""
        if self.args.physics != "exact":  # poses of what sleeps may be one physics step old: be where a resumed run would be
            self.env.restore(self.env.snapshot())
            self.obs = self.env.observations()
        return self.iterate()

    def iterate(self) -> dict[str, float]:
        raise NotImplementedError

    def state_dict(self) -> dict:
        """Everything that the rest of the training depends on."""
        return {name: getattr(self, name).state_dict() for name in self.parts} | {
            "iteration": self.iteration,
            "history": self.history,
            "outcomes": [list(o) for o in self.outcomes],
            "looked": self.looked,
            "env": self.env.snapshot(),
            "torch_rng": rng_state(self.agent.device),
        }

    def load_state_dict(self, state: dict) -> None:
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])
        self.iteration, self.history, self.looked = state["iteration"], state["history"], state["looked"]
        self.outcomes = [deque(o, maxlen=50) for o in state["outcomes"]]
        self.env.restore(state["env"])
        self.obs = self.env.observations()
        set_rng_state(state["torch_rng"], self.agent.device)


def fingerprint(episodes: Sequence[Episode]) -> str:
    """Twelve hex digits over the actions and states of episodes, in their order."""
    digest = hashlib.sha256()
    for episode in episodes:
        digest.update(episode.actions.tobytes() + episode.states.tobytes())
    return digest.hexdigest()[:12]


def observation(args: JobArgs) -> dict[str, Any]:
    """What `make_env` has to know of what the policy, and the critic, see."""
    return {
        "obs": args.obs,
        "image_size": args.image_size,
        "cameras": args.cameras,
        "show_state": "state" in (args.critic, args.train_encoder),
    }


def choose_devices(args: Any) -> Any:
    """A script's arguments with what `auto` means on this machine in the place of --device and --backend, and of the RL scripts'
    --physics and --encoder.

    --device cpu takes the simulator off the GPU, too: --backend warp then runs on Warp's CPU device, which is for tests. So without
    a GPU, `auto` isn't enough for it.
    """
    device = choose_device(args.device, args.compile)
    if device == "cpu" and args.device == "auto" and args.backend == "warp":
        raise UserError("--backend warp: torch finds no GPU here; use --backend cpu, or install torch's CUDA build and a driver")
    if device == "cuda":  # what distributions check about their arguments is read from the GPU, and waited for, several times a minibatch
        torch.distributions.Distribution.set_default_validate_args(False)
    backend = choose_backend(args.backend, args.num_envs, device)
    if not isinstance(args, JobArgs):  # a VLA script's
        return dataclasses.replace(args, device=device, backend=backend)
    encoder = args.encoder if args.encoder != "auto" else "small" if device == "cpu" else "resnet18"
    chosen = {"physics": choose_physics(args.physics, backend), "encoder": encoder}
    return dataclasses.replace(args, device=device, backend=backend, image_size=args.image_size or CONVOLUTIONS[encoder][1], **chosen)


def load_demos(
    demos: str, task: Task, num_demos: int | None, noise: float, seed: int, progress: Progress, filter_key: str | None = None
) -> tuple[list[Episode], str]:
    """Successful demonstrations and where they come from, which every output records.

    Args:
        demos: "auto" (LIBERO's human files if they are on disk, else scripted), "scripted", or a file in LIBERO's layout.
        num_demos, noise, seed: of scripted demonstrations, which are generated once and cached. None: DEMOS_PER_GOAL for each conjunct.
        filter_key: only the demonstrations of the file that robomimic's mask/<filter_key> names.
    """
    path = find_human_demos(task) if demos == "auto" else None if demos == "scripted" else Path(demos)
    if path is None and filter_key:
        raise UserError("--filter-key is for a file of demonstrations, and there is none; leave it out, or name one with --demos FILE")
    if path is None:
        from common.demos import load_or_collect

        num_demos = DEMOS_PER_GOAL * len(task.goal) if num_demos is None else num_demos
        progress.say(f"demonstrations: {num_demos} scripted, action noise {noise}")
        progress.stage("demonstrations", num_demos)
        return load_or_collect(task, num_demos, seed=seed, noise=noise, progress=progress.update), "scripted"
    episodes = [e for e in read_episodes(path, task, filter_key=filter_key, judge=functools.partial(goal_reached, task)) if e.success]
    if not episodes:
        raise UserError(f"{path} holds no successful demonstration to learn from")
    source = f"{path} (filter key {filter_key})" if filter_key else str(path)
    progress.say(f"demonstrations: {len(episodes)} from {source}")
    return episodes, source


def obs_encoder(args: JobArgs, space: gym.Space, task: Task) -> Normalizer | PixelEncoder | StateEstimator:
    """A new encoder of what an environment of `task` shows, its `single_observation_space`."""
    observe = StateObservation(task)
    if args.obs == "pixels" and args.train_encoder == "state":
        return make_estimator(space, args.encoder, observe.relative, args.near_field, HandState(observe))
    return make_obs_encoder(space, args.encoder, observe.relative, args.near_field)


def observe_demos(env: LiberoVectorEnv, demos: Sequence[Episode], progress: Progress) -> list:
    """What the environment would have returned before each action: for each episode (T, obs_size) states, or a dict of (T, ...) arrays."""
    if not isinstance(env, PixelEnv):
        return [observe_states(env.task, e.states) for e in demos]
    progress.stage("pictures of the demonstrations", len(demos))
    seen = []
    for episode in demos:
        seen.append(env.pixels(episode.states))
        if env.show_state:
            seen[-1]["state"] = observe_states(env.task, episode.states)
        progress.update(1)
    return seen


def switch_weights(actions: np.ndarray, weight: float) -> np.ndarray:
    """(T,) float32 weights of the gripper in a demonstration's actions (T, 7): `weight` in the two steps from each change of its sign on.

    A demonstration closes its hand on arriving, in one step of a hundred; around it, a centimetre away, the hand is open and on its way.
    A policy that is smooth over that makes of it an open hand that stands still, and so for ever: to close early costs little.
    """
    switch = np.diff(np.sign(actions[:, 6]), prepend=np.sign(actions[0, 6])) != 0
    switch[1:] |= switch[:-1].copy()
    return np.where(switch, weight, 1.0).astype(np.float32)
