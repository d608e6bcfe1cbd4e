"""How well Discover's encoder recognises trajectories that it was not trained on, by `--vib-beta` (docs/dlr_discover.md).

    python -m benchmarks.recognition --tasks libero_90/9 --seeds 1 2 3      # demonstrations of other starts
    python -m benchmarks.recognition --runs RUN RUN                         # and the corpora of finished runs: p_leak

p_leak blames the policy for every trajectory that the encoder names wrongly. Scripted demonstrations have a known strategy, so on
demonstrations that were held out the encoder's own errors can be told apart from the policy's. Trained again with a run's seed and
demonstrations, Discover gives the run's labels, unless beta changes them ("same labels"), and no policy has to be trained anew.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

import dlr_discover
from common import metrics, rollout
from common.cli import UserError, run_command
from common.data import read_episodes
from common.libero import load_task, make_env
from common.libero.assets import assets_like
from common.libero.observation import observe_states
from common.runs import Progress, load_checkpoint, read_finished, stored_args

HELD_OUT_SEED = 1_000  # of starts and noise that no run of a small seed has


@dataclasses.dataclass
class Args:
    """Train Discover with several --vib-beta and count what it recognises."""

    tasks: list[str] = dataclasses.field(default_factory=list)
    """LIBERO tasks: suite/index, suite/name, or any part of a name that is unique"""
    runs: list[Path] = dataclasses.field(default_factory=list)
    """folders of finished runs of dlr_discover.py with scripted demonstrations"""
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3])
    """of --tasks"""
    vib_beta: list[float] = dataclasses.field(default_factory=lambda: [0.02, 0.1, 0.3, 1.0])
    """weights of the information bottleneck"""
    num_patterns: int = 8
    """K of --tasks"""
    label_level: Literal["trajectory", "state"] = "trajectory"
    """of --tasks"""
    held_out: int = 160
    """demonstrations that Discover is not trained on"""
    assets: str | None = None
    """a folder, libero or standin (default: those of each run; for --tasks $LIBERO_ASSETS, else LIBERO's own, else stand-ins)"""


def read_run(run: Path, assets: str | None) -> dlr_discover.Args:
    """The arguments of a finished run, with the assets that it ran on; `assets` may say where they are."""
    config, summary = read_finished(run)
    if (config.get("script"), config.get("demos")) != ("dlr_discover", "scripted"):
        raise UserError(f"{run} is not the folder of a finished run of dlr_discover.py with scripted demonstrations")
    stored = config["args"] | {"num_patterns": summary["num_patterns"]}  # it may have been auto
    stored["assets"] = assets_like(config["assets"], assets)
    load_task(stored["task"], assets, config["assets"], run)
    return stored_args(dlr_discover.Args, stored)


def measure(args: dlr_discover.Args, betas: list[float], held_out: int, run: Path | None, progress: Progress) -> list[str]:
    """A line of the table for each beta."""
    task = load_task(args.task, args.assets)
    layout = make_env(task).obs_layout

    def path(obs: np.ndarray) -> np.ndarray:
        return dlr_discover.along_path(obs, layout, args.discover_points)

    demos, _ = rollout.load_demos("scripted", task, args.num_demos, args.demo_noise, args.seed, progress)
    others, _ = rollout.load_demos("scripted", task, held_out, args.demo_noise, HELD_OUT_SEED, progress)
    corpus, before = [], []
    if run:
        corpus = read_episodes(run / "corpus.hdf5", task)
        before = [dlr_discover.episode_pattern(row.numpy()) for row in load_checkpoint(run / "checkpoint.pt", "dlr_discover")["labels"]]
    known, unknown = ([e.attrs["strategy"] for e in episodes] for episodes in (demos, others))
    demo_paths = np.stack([path(observe_states(task, e.states)) for e in demos])
    other_paths, corpus_paths = ([path(rollout.trajectory_observations(task, e)) for e in episodes] for episodes in (others, corpus))
    progress.stage(f"{task.suite}/{task.index} seed {args.seed}", len(betas))
    lines = []
    for beta in betas:
        encoder, labels = dlr_discover.discover(dataclasses.replace(args, vib_beta=beta), demo_paths, layout, args.num_patterns)
        patterns = [dlr_discover.episode_pattern(row) for row in labels]
        ours = metrics.adjusted_rand_index(patterns, known)
        theirs = metrics.adjusted_rand_index([encoder.recognise(x) for x in other_paths], unknown)
        cells = [f"{task.suite}/{task.index}", args.seed, beta, len(set(patterns)), f"{ours:.2f}", f"{theirs:.2f}"]
        if run:
            recognised = [encoder.recognise(x) for x in corpus_paths]
            leak = metrics.leakage([e.attrs["pattern"] for e in corpus], recognised, args.num_patterns)
            cells += [f"{np.mean(np.equal(patterns, before)):.0%}", f"{leak:.1%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        progress.update(1)
    return lines


def main() -> None:
    args = tyro.cli(Args)
    if bool(args.tasks) == bool(args.runs):
        raise UserError("name either --tasks or --runs")
    torch.set_num_threads(1)
    common = {"num_patterns": args.num_patterns, "label_level": args.label_level, "assets": args.assets}
    jobs = [(dlr_discover.Args(task=task, seed=seed, **common), None) for task in args.tasks for seed in args.seeds]
    jobs += [(read_run(run, args.assets), run) for run in args.runs]
    progress = Progress()
    lines = [line for job, run in jobs for line in measure(job, args.vib_beta, args.held_out, run, progress)]
    progress.close()
    head = ["task", "seed", "beta", "alive", "adjusted Rand index: trained on", "held out"]
    head += ["same labels", "p_leak"] if args.runs else []
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|\n" + "\n".join(lines))


if __name__ == "__main__":
    run_command(main)
