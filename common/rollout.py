"""What comes before and after the learning in every RL script: demonstrations, evaluation, the corpus and its pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import metrics, plots
from common.cli import UserError
from common.data import Episode, Recorder, read_episodes, write_episodes
from common.libero import Task
from common.libero.env import LiberoVectorEnv
from common.libero.make import choose_backend
from common.libero.observation import StateObservation, observe_states
from common.libero.pixels import PixelEnv
from common.libero.render import add_images
from common.libero.renderers import available, make_renderer
from common.libero.tasks import find_human_demos
from common.runs import Progress, choose_device, versions
from common.video import write_video

# Observations (as the environment returns them), patterns (N,) -> actions (N, 7). A policy that remembers (that is amid a chunk of
# actions) also has `begin(envs)`, which is called as new episodes begin in the environments `envs` (n,).
Policy = Callable[[np.ndarray, np.ndarray], np.ndarray]
# At most so many environments evaluate and roll out the corpus: for 50 to 400 episodes, more would mostly idle.
EVAL_ENVS = 64


def choose_devices(args: Any) -> Any:
    """The script's arguments with what `auto` means on this machine in the place of --device and --backend.

    --device cpu takes the simulator off the GPU, too: --backend warp then runs on Warp's CPU device, which is for tests. So without
    a GPU, `auto` isn't enough for it.
    """
    device = choose_device(args.device, args.compile)
    if device == "cpu" and args.device == "auto" and args.backend == "warp":
        raise UserError("--backend warp: torch finds no GPU here; use --backend cpu, or install torch's CUDA build and a driver")
    if device == "cuda":  # what distributions check about their arguments is read from the GPU, and waited for, several times a minibatch
        torch.distributions.Distribution.set_default_validate_args(False)
    return dataclasses.replace(args, device=device, backend=choose_backend(args.backend, args.num_envs, device))


def load_demos(demos: str, task: Task, num_demos: int, noise: float, seed: int, progress: Progress) -> tuple[list[Episode], str]:
    """Successful demonstrations and where they come from, which every output records.

    Args:
        demos: "auto" (LIBERO's human files if they are on disk, else scripted), "scripted", or a file in LIBERO's layout.
        num_demos, noise, seed: of scripted demonstrations, which are generated once and cached.
    """
    path = find_human_demos(task) if demos == "auto" else None if demos == "scripted" else Path(demos)
    if path is None:
        from common.demos import load_or_collect

        progress.say(f"demonstrations: {num_demos} scripted, action noise {noise}")
        return load_or_collect(task, num_demos, seed=seed, noise=noise), "scripted"
    episodes = [e for e in read_episodes(path, task) if e.success]
    if not episodes:
        raise UserError(f"{path} holds no successful demonstration to learn from")
    progress.say(f"demonstrations: {len(episodes)} from {path}")
    return episodes, str(path)


def observe_demos(env: LiberoVectorEnv, demos: Sequence[Episode], progress: Progress) -> list:
    """What the environment would have returned before each action: for each episode (T, obs_size) states, or a dict of (T, ...) arrays."""
    if not isinstance(env, PixelEnv):
        return [observe_states(env.task, e.states) for e in demos]
    progress.stage("pictures of the demonstrations", len(demos))
    seen = []
    for episode in demos:
        seen.append(env.pixels(episode.states))
        progress.update(1)
    return seen


def roll_out(env: LiberoVectorEnv, policy: Policy, jobs: Sequence[tuple[int, int]], tick: Callable[[Episode], None]) -> list[Episode]:
    """Run one episode for each job (pattern, official init state, or -1 for a training reset) in an env without autoreset.

    Returns the episodes in the order of the jobs, failures included; `tick(episode)` is called as each one ends.
    """
    todo, episodes = list(range(len(jobs)))[::-1], [None] * len(jobs)
    recorder = Recorder(env)
    current = np.full(env.num_envs, -1)  # the job of each environment, -1: none left
    patterns = np.zeros(env.num_envs, np.int64)
    official = len(jobs) > 0 and jobs[0][1] >= 0

    def assign(envs: np.ndarray) -> np.ndarray:
        """Give each of `envs` the next job and reset it; returns all observations."""
        for i in envs:
            current[i] = todo.pop() if todo else -1
            patterns[i] = jobs[current[i]][0] if current[i] >= 0 else 0
        if hasattr(policy, "begin"):
            policy.begin(envs)
        options = {"reset_mask": np.isin(np.arange(env.num_envs), envs)}
        if official:
            options["init_state"] = np.array([jobs[j][1] if j >= 0 else 0 for j in current])
        return env.reset(options=options)[0]

    obs = assign(np.arange(env.num_envs))
    while (current >= 0).any():
        actions, idle = policy(obs, patterns), current < 0
        recorder.before()
        obs, _, terminated, truncated, _ = env.step(actions, ~idle)
        for i, episode in recorder.after(actions, terminated, truncated | idle):  # what idle environments record is cut off and dropped
            if not idle[i]:
                pattern, init_state = jobs[current[i]]
                episode.attrs.update(pattern=int(pattern), init_state=int(init_state))
                episodes[current[i]] = episode
                tick(episode)
        if len(ended := np.flatnonzero((terminated | truncated) & ~idle)):
            obs = assign(ended)
    return episodes


def evaluate(
    env: LiberoVectorEnv, policy: Policy, patterns: Sequence[int], init_states: int, progress: Progress, stage: str
) -> tuple[list[dict], list[Episode]]:
    """Each pattern on the first `init_states` official init states: rows for summary.json's `per_pattern`, and the episodes."""
    jobs = [(z, i) for z in patterns for i in range(min(init_states, len(env.task.init_states)))]
    progress.stage(stage, len(jobs))
    outcomes: list[bool] = []

    def tick(episode: Episode) -> None:
        outcomes.append(episode.success)
        progress.update(1, f"{sum(outcomes)} succeeded, {len(outcomes) - sum(outcomes)} failed")  # no rate: failures end last

    episodes = roll_out(env, policy, jobs, tick)
    rows = []
    for z in patterns:
        mine = [e for e in episodes if e.attrs["pattern"] == z]
        lengths = [e.length for e in mine if e.success]
        rate = float(np.mean([e.success for e in mine]))
        rows.append({"pattern": z, "success_rate": rate, "episodes": len(mine), "mean_length": np.mean(lengths) if lengths else None})
    return rows, episodes


def collect_corpus(
    env: LiberoVectorEnv, policy: Policy, patterns: Sequence[int], each: int, seed: int, script: str, progress: Progress
) -> list[Episode]:
    """Successful episodes from training resets, `each` a pattern, in at most four times as many tries; sorted by pattern."""
    env.reset(seed=seed)
    corpus: list[Episode] = []
    progress.stage("roll out", each * len(patterns))
    for _ in range(4):
        missing = {z: each - sum(e.attrs["pattern"] == z for e in corpus) for z in patterns}
        jobs = [(z, -1) for z in patterns for _ in range(missing[z])]
        if jobs:
            corpus += [e for e in roll_out(env, policy, jobs, lambda e: progress.update(int(e.success))) if e.success]
    for episode in corpus:
        episode.attrs.update(source=script, seed=seed)
    return sorted(corpus, key=lambda e: e.attrs["pattern"])


class Disturbed:
    """A policy under the scripted demonstrator's noise: Gaussian, on the first six numbers of each action."""

    def __init__(self, policy: Policy, noise: float, seed: int):
        self.policy, self.noise, self.rng = policy, noise, np.random.default_rng(seed)

    def begin(self, envs: np.ndarray) -> None:
        if hasattr(self.policy, "begin"):
            self.policy.begin(envs)

    def __call__(self, obs: np.ndarray | dict, patterns: np.ndarray) -> np.ndarray:
        actions = self.policy(obs, patterns).copy()
        actions[:, :6] += self.noise * self.rng.standard_normal((len(actions), 6))
        return actions.clip(-1, 1)


def same_starts(task: Task, num_patterns: int, init_states: int) -> tuple[range, int]:
    """What consistency is measured on: the official init states that each pattern begins from, ten of all patterns or a few more but
    at most `init_states`, and how often it is rolled out from each."""
    return range(min(-(-10 // num_patterns), init_states, len(task.init_states))), 4


def dispersion(task: Task, episodes: Sequence[Episode], pattern: str = "pattern") -> float:
    """`metrics.consistency` (m) of the successful episodes, grouped by official init state and by their attribute `pattern`."""
    done = [e for e in episodes if e.success]
    return metrics.consistency(path_features(task, done), [(e.attrs[pattern], e.attrs["init_state"]) for e in done])


def measure_consistency(
    env: LiberoVectorEnv, policy: Policy, patterns: Sequence[int], init_states: int, noise: float, seed: int, progress: Progress
) -> float:
    """`dispersion` of rollouts from the same init state with the same pattern, in m; lower is more consistent.

    The policies that are evaluated are deterministic, so what parts the rollouts is action noise (standard deviation `noise`), the
    same for every policy as for the scripted demonstrator: it measures how firmly a policy comes back to its way.
    """
    states, repeats = same_starts(env.task, len(patterns), init_states)
    jobs = [(z, i) for z in patterns for i in states for _ in range(repeats)]
    progress.stage("consistency", len(jobs))
    return dispersion(env.task, roll_out(env, Disturbed(policy, noise, seed), jobs, lambda e: progress.update(1)))


def write_corpus(
    run: Path, task: Task, corpus: list[Episode], script: str, demos: str, image_size: int, assets: str | None, progress: Progress
) -> None:
    """Write RUN/corpus.hdf5 in LIBERO's layout, with where it comes from, and with pictures if `image_size` isn't 0."""
    attrs = {"script": script, "assets": task.assets, "demos": demos}
    attrs |= {f"version_{name.replace('-', '_')}": value for name, value in versions().items()}
    write_episodes(run / "corpus.hdf5", corpus, task, attrs)
    if image_size:
        add_images(run / "corpus.hdf5", image_size, assets=assets, progress=progress)


def trajectory_observations(task: Task, episode: Episode) -> np.ndarray:
    """(T + 1, obs_size) state observations of an episode, the state after its last action included."""
    final = [] if episode.final_state is None else [episode.final_state]
    return observe_states(task, np.vstack([episode.states, *final]))


def path_features(task: Task, episodes: Sequence[Episode]) -> list[np.ndarray]:
    """(T, 3 + 3 n) metres: where the hand and the goal's movable objects are; what diversity is measured on."""
    free = [task.objects[o.name].joint_qpos for o in StateObservation(task).objects]
    after = [np.vstack([e.states[1:], e.final_state]) for e in episodes]  # proprioception is what followed each action
    return [metrics.trajectory_features(e.proprio["ee_pos"], s, free) for e, s in zip(episodes, after, strict=True)]


def plot_corpus(run: Path, task: Task, features: list[np.ndarray], patterns: Sequence[int], distances: np.ndarray) -> None:
    """RUN/figures: the paths over each other, their pairwise DTW matrix, a map of them."""
    plots.plot_paths(run / "figures" / "paths.png", features, patterns, task.language)
    plots.plot_dtw(run / "figures" / "dtw.png", distances, patterns, task.language)
    plots.plot_map(run / "figures" / "map.png", features, patterns, task.language)


def find_renderer(obs: str, videos: bool, corpus_images: int, progress: Progress) -> tuple[str | None, bool]:
    """The renderer that pictures will come from (None: there will be none), and whether videos can be made; before the work starts.

    If `videos` are wanted and not possible, the reason is said. Pictures for the policy or the corpus are not up to choice:
    UserError where they are not possible (of the policy's, from `make_env`).
    """
    possible = False
    if videos or corpus_images:
        possible, reason = available()
        if not possible and corpus_images:
            raise UserError(f"--corpus-images: {reason}")
        if not possible:
            progress.say(f"no videos: {reason}")
    return "warp" if possible or obs == "pixels" else None, possible and videos


def make_videos(run: Path, task: Task, corpus: list[Episode], renderer: str, progress: Progress) -> None:
    """RUN/videos/pattern_K.mp4: the first successful trajectory of each pattern, seen by agentview."""
    chosen = {e.attrs["pattern"]: e for e in reversed(corpus)}
    progress.stage("videos", len(chosen))
    camera = make_renderer(task.model, cameras=("agentview",), width=256, height=256, renderer=renderer)
    for pattern, episode in sorted(chosen.items()):
        frames = camera.render(episode.states[:, 1 : 1 + task.model.nq])["agentview"]
        write_video(run / "videos" / f"pattern_{pattern}.mp4", frames)
        progress.update(1)
