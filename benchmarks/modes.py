"""How many ways of doing its task a policy keeps: Pass@k, Coverage@k, and how far its successes are apart.

    python -m benchmarks.modes runs/RUN runs/RUN ... --json docs/results/modes.json      # finished runs of RL scripts, of one task or more

From each of the first official init states a policy is rolled out eight times, in exact physics and under the scripted demonstrator's
action noise, without which a policy that commands nothing would do the same eight times; patterns take turns. The way of each success is
told by a linear classifier that knows the demonstrations' true ways, the same for all runs of a task: Discover has no part in it. What
follows none of the ways gets the name of one all the same. Measures as in arXiv 2605.11387, by our definitions.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode

import dlr_discover
from benchmarks.fidelity import load_policy
from benchmarks.recognition import classify
from common import metrics, rollout
from common.cli import Count, Range, UserError, check_ranges, run_command
from common.data import Episode
from common.job import load_demos
from common.libero import Task, make_env
from common.libero.observation import observe_states
from common.runs import Progress, read_finished, versions, write_json

KEPT = 0.05  # of a policy's successes, for a way to count as kept


@dataclasses.dataclass
class Args:
    """Pass@k, Coverage@k and ways kept of finished runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """finished runs of RL scripts"""
    starts: Annotated[int, Range(1, 50)] = 25
    """official init states"""
    rollouts: Count = 8
    """from each of them"""
    num_envs: Count = 32
    """environments at once"""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: $LIBERO_ASSETS, else LIBERO's own, else stand-ins)"""
    json: Path | None = None
    """also write all numbers here"""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.runs:
            raise UserError("give the folders of finished runs")


def paths(task: Task, layout: dict[str, slice], observations: list[np.ndarray]) -> np.ndarray:
    """(N, D): what Discover compares trajectories by."""
    points = dlr_discover.Args.discover_points
    found = [dlr_discover.pattern_features(dlr_discover.along_path(obs, layout, points), layout) for obs in observations]
    return np.stack(found).reshape(len(found), -1)


def told_apart(x: np.ndarray, truth: np.ndarray, folds: int = 6) -> float:
    """How many of the demonstrations x (N, D) the classifier names right that it was not shown."""
    fold = np.arange(len(x)) % folds
    return float(np.mean([(classify(x[fold != f], truth[fold != f], x[fold == f]) == truth[fold == f]).mean() for f in range(folds)]))


def measure(run: Path, args: Args, progress: Progress) -> dict:
    """A run's row."""
    config, summary = read_finished(run)
    task, options, make, patterns = load_policy(run, args.assets)
    first = config["args"]
    demos, _ = load_demos(first["demos"], task, first["num_demos"], first["demo_noise"], first["seed"], progress)
    truth = np.array([e.attrs.get("strategy", "") for e in demos])
    if not all(truth):
        raise UserError(f"{run} learned from demonstrations whose way isn't known")
    jobs = [(patterns[i % len(patterns)], start) for start in range(args.starts) for i in range(args.rollouts)]
    with contextlib.closing(make_env(task, min(args.num_envs, len(jobs)), autoreset_mode=AutoresetMode.DISABLED, **options)) as env:
        layout = env.obs_layout
        policy = rollout.Disturbed(make(env), first["demo_noise"], seed=0)
        progress.stage(f"{config['script']}, seed {first['seed']}, {task.id}", len(jobs))
        episodes: list[Episode] = rollout.roll_out(env, policy, jobs, lambda episode: progress.update(1))
    x = paths(task, layout, [observe_states(task, e.states) for e in demos])
    names, successes = np.unique(truth), [e for e in episodes if e.success]
    ways = np.full(len(jobs), -1)
    if successes:
        rolled_out = paths(task, layout, [rollout.trajectory_observations(task, e) for e in successes])
        ways[[e.success for e in episodes]] = np.searchsorted(names, classify(x, truth, rolled_out))
    counts = np.bincount(ways[ways >= 0], minlength=len(names))
    ways = ways.reshape(args.starts, args.rollouts)
    distances = metrics.pairwise_dtw(features := rollout.path_features(task, successes))
    return {
        "task": task.id,
        "script": config["script"],
        "seed": first["seed"],
        "ways": len(names),
        "told_apart": told_apart(x, truth),
        "kept": int((counts >= KEPT * max(counts.sum(), 1)).sum()) if successes else 0,
        "pass": {k: metrics.pass_at_k(ways >= 0, k) for k in (1, args.rollouts)},
        "coverage": {k: metrics.coverage_at_k(ways, k, len(names)) for k in (1, args.rollouts)},
        "mean_pairwise_distance": metrics.diversity(features)["mean_pairwise_distance"],
        "dtw": metrics.within_between(distances, [0] * len(distances))[0],
        "success_rate": summary["success_rate"],
    }


def table(rows: list[dict]) -> str:
    """Markdown: a line a run."""
    most = max(max(row["pass"]) for row in rows)
    head = ["task", "script", "seed", "ways kept", "Pass@1", f"Pass@{most}", f"Coverage@{most}", "distance (m)", "DTW (m)", "told apart"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        shares = [f"{row[name][k]:.0%}" for name, k in (("pass", 1), ("pass", most), ("coverage", most))]
        far = [f"{row['mean_pairwise_distance']:.2f}", f"{row['dtw']:.3f}"]
        cells = [row["task"], row["script"], row["seed"], f"{row['kept']} of {row['ways']}", *shares, *far, f"{row['told_apart']:.0%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args)
    torch.set_num_threads(1)
    progress = Progress()
    rows = [measure(run, args, progress) for run in args.runs]
    progress.close()
    print(table(rows))
    if args.json is not None:
        write_json(args.json, {"rows": rows, "starts": args.starts, "rollouts": args.rollouts, "versions": versions()})


if __name__ == "__main__":
    run_command(main)
