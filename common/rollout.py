"""Episodes of a policy: evaluation, the corpus with its figures and videos, and how firmly a policy keeps to its way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from common import metrics, plots
from common.cli import UserError
from common.data import Episode, Recorder, write_episodes
from common.libero import Task
from common.libero.env import LiberoVectorEnv
from common.libero.observation import StateObservation, observe_states
from common.libero.render import add_images
from common.libero.renderers import available, make_renderer
from common.runs import Progress, versions
from common.video import write_video

# Observations (as the environment returns them), patterns (N,) -> actions (N, 7). A policy that remembers (that is amid a chunk of
# actions) also has `begin(envs)`, which is called as new episodes begin in the environments `envs` (n,).
Policy = Callable[[np.ndarray, np.ndarray], np.ndarray]


@contextlib.contextmanager
def acting(env: gym.vector.VectorEnv) -> Iterator[None]:
    """Torch on one thread while a policy acts on states: they are too few to share, and OpenMP's threads, which wait for the next
    operation at full speed for a while, take the cores from the simulator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if isinstance(env.single_observation_space, gym.spaces.Dict) else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def roll_out(env: LiberoVectorEnv, policy: Policy, jobs: Sequence[tuple[int, int]], tick: Callable[[Episode], Any]) -> list[Episode]:
    """Run one episode for each job (pattern, official init state, or -1 for a training reset) in an env without autoreset.

    Returns the episodes in the order of the jobs, failures included; `tick(episode)` is called as each one ends. If it returns True,
    all end there; None stands for what was not finished.
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
    with acting(env):
        while (current >= 0).any():
            actions, idle = policy(obs, patterns), current < 0
            recorder.before()
            obs, _, terminated, truncated, _ = env.step(actions, ~idle)
            for i, episode in recorder.after(actions, terminated, truncated, ~idle):
                pattern, init_state = jobs[current[i]]
                episode.attrs.update(pattern=int(pattern), init_state=int(init_state))
                episodes[current[i]] = episode
                if tick(episode):
                    return episodes
            if len(ended := np.flatnonzero((terminated | truncated) & ~idle)):
                obs = assign(ended)
    return episodes


def evaluate(
    env: LiberoVectorEnv,
    policy: Policy,
    patterns: Sequence[int],
    each: int,
    progress: Progress,
    stage: str,
    passes: Callable[[list[float]], bool] | None = None,
    official: bool = True,
) -> tuple[list[dict] | None, list[Episode]]:
    """Each pattern on the first `each` official init states, or else on as many training resets: rows for summary.json's `per_pattern`,
    and the episodes.

    It ends, with None for the rows, as soon as `passes` would be False of the patterns' success rates even if all the rest succeeded.
    """
    each = min(each, len(env.task.init_states)) if official else each
    jobs = [(z, i if official else -1) for i in range(each) for z in patterns]
    progress.stage(stage, len(jobs))
    lengths: dict[int, list[int]] = {z: [] for z in patterns}  # of those that succeeded
    failed = dict.fromkeys(patterns, 0)

    def no_use() -> bool:
        return passes is not None and not passes([(each - n) / each for n in failed.values()])

    def tick(episode: Episode) -> bool:
        z = episode.attrs["pattern"]
        if episode.success:
            lengths[z].append(episode.length)
        failed[z] += not episode.success
        progress.update(1, f"{sum(map(len, lengths.values()))} succeeded, {sum(failed.values())} failed")  # no rate: failures end last
        return no_use()

    episodes = roll_out(env, policy, jobs, tick)
    if no_use():
        return None, episodes
    rates = {z: (each - failed[z]) / each for z in patterns}
    mean = {z: np.mean(lengths[z]) if lengths[z] else None for z in patterns}
    return [{"pattern": z, "success_rate": rates[z], "episodes": each, "mean_length": mean[z]} for z in patterns], episodes


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
    run: Path, task: Task, corpus: list[Episode], attrs: dict[str, str], image_size: int, assets: str | None, progress: Progress
) -> None:
    """Write RUN/corpus.hdf5 in LIBERO's layout, with where it comes from (`attrs` and versions), and with pictures if `image_size`
    isn't 0."""
    attrs = attrs | {"assets": task.assets}
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
        frames = camera.render(episode.states[::2, 1 : 1 + task.model.nq])["agentview"]
        write_video(run / "videos" / f"pattern_{pattern}.mp4", frames, fps=10)
        progress.update(1)
