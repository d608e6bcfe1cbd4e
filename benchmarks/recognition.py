"""Does Discover find the ways that are in demonstrations? Discover alone, seconds a task, no policy is trained.

    python -m benchmarks.recognition --json docs/results/recognition.json --figure docs/images/recognition.png   # sixty tasks
    python -m benchmarks.recognition --suite libero_goal
    python -m benchmarks.recognition --tasks libero_90/9 libero_90/33 --seeds 1 2 3

Scripted demonstrations have a known way, which Discover isn't told. A task's demonstrations are collected once (with sleeping physics)
and shared by the seeds: each draws equally many of each way to fit, and names the others. Beside it a linear classifier that is told
the truth says how well the ways can be told apart at all. With --json, what the file holds isn't measured again.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

import dlr_discover
from benchmarks.demonstrator import read_rows, suite_tasks
from common import metrics
from common.cli import UserError, atomic_path, run_command
from common.demos import load_or_collect
from common.libero import load_task, make_env
from common.libero.observation import observe_states
from common.runs import versions, write_json
from common.suites import SUITES

DEVELOPED_ON = [
    *("libero_90/0", "libero_90/2", "libero_90/9", "libero_90/33", "libero_90/57"),
    *("libero_10/0", "libero_10/1", "libero_10/2", "libero_10/3", "libero_10/4", "libero_10/5"),
    *(f"libero_goal/{i}" for i in (0, 1, 3, 4, 5, 6, 7, 8)),
    *(f"libero_object/{i}" for i in (0, 1, 4, 6, 7, 8, 9)),
    *(f"libero_spatial/{i}" for i in (0, 3, 4, 6, 8, 9)),
]
"""Tasks that Discover's rules and numbers were chosen on; the others are its test."""
DEMO_SEED = 7  # of the demonstrations, whatever the seed of the split and of Discover


@dataclasses.dataclass
class Args:
    """Fit Discover on a part of a task's demonstrations and let it name the others."""

    tasks: list[str] = dataclasses.field(default_factory=list)
    """LIBERO tasks: suite/index, suite/name, or any part of a name that is unique"""
    suite: list[str] = dataclasses.field(default_factory=list)
    """all tasks of suites instead (default: the forty of the other suites and twenty of libero_90)"""
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3])
    """of the split and of Discover"""
    num_patterns: int | str = 8
    """patterns at most, or auto"""
    num_demos: int = 48
    """demonstrations that Discover is fit on"""
    held_out: int = 48
    """and that it is not"""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: $LIBERO_ASSETS, else LIBERO's own, else stand-ins)"""
    json: Path | None = None
    """also write the numbers to this file, and go on from what it holds"""
    figure: Path | None = None
    """also draw the held-out index over the classifier's, a dot a task"""


def sixty_tasks() -> list[str]:
    """All of four suites, and of libero_90 twenty, evenly spaced: chosen without a look at what comes out."""
    return [name for suite in SUITES[:4] for name in suite_tasks(suite)] + [f"libero_90/{9 * i // 2}" for i in range(20)]


def classify(x: np.ndarray, truth: np.ndarray, others: np.ndarray, ridge: float = 1e-3) -> np.ndarray:
    """A linear classifier (ridge regression on one-hot classes) of x (N, D), told the truth (N,): the classes of others (M, D)."""
    names, codes = np.unique(truth, return_inverse=True)
    mean = x.mean(0)
    x, others, targets = x - mean, others - mean, np.eye(len(names))[codes] - 1 / len(names)
    kernel = x @ x.T
    return names[(others @ x.T @ np.linalg.solve(kernel + ridge * np.trace(kernel) / len(x) * np.eye(len(x)), targets)).argmax(1)]


def measure(args: dlr_discover.Args, paths: np.ndarray, layout: dict[str, slice], ways: np.ndarray, num_demos: int) -> dict:
    """Fit Discover on `num_demos` of the demonstrations (N, points, obs_size), as many of each of their ways (N,), and name the rest."""
    rng = np.random.default_rng(args.seed)
    turn = np.empty(len(ways), int)  # of a demonstration among those of its way
    for way in np.unique(ways):
        turn[ways == way] = rng.permutation((ways == way).sum())
    order = np.argsort(turn, kind="stable")
    fit, rest = order[:num_demos], order[num_demos:]
    began = time.process_time()
    _, decoder, labels, sure = dlr_discover.discover(args, paths[fit], layout, lambda line: None)
    features = np.stack([dlr_discover.pattern_features(path, layout) for path in paths])
    x = features.reshape(len(paths), -1)
    return {
        "seed": args.seed,
        "k": len(decoder.centres),
        "demonstrations": np.bincount(labels).tolist(),
        **sure,
        "index": metrics.adjusted_rand_index(labels, ways[fit]),
        "held_out_index": metrics.adjusted_rand_index(decoder.recognise(features[rest]), ways[rest]),
        "classifier_index": metrics.adjusted_rand_index(classify(x[fit], ways[fit], x[rest]), ways[rest]),
        "cpu_seconds": time.process_time() - began,
    }


def mean(row: dict, name: str) -> float:
    """Over a task's seeds."""
    return float(np.mean([seed[name] for seed in row["seeds"]]))


def misses(row: dict) -> bool:
    """Whether Discover misses the bar: 0.9 where the classifier has 0.95, elsewhere 0.85 of its index."""
    ours, told = mean(row, "held_out_index"), mean(row, "classifier_index")
    return ours < (0.9 if told >= 0.95 else 0.85 * told)


def report(rows: list[dict]) -> str:
    """A line a task, means over seeds, and what the bar asks: of all, and of those that nothing was tuned on."""
    lines = ["| task | ways | K | weakest strength | index: fitted | held out | classifier | bits | of | recognised |", "|---" * 10 + "|"]
    for row in rows:
        ks, strength = ", ".join(str(seed["k"]) for seed in row["seeds"]), min(seed["prediction_strength"] for seed in row["seeds"])
        numbers = [mean(row, name) for name in ("index", "held_out_index", "classifier_index", "bits")]
        limit = np.mean([np.log2(seed["k"]) for seed in row["seeds"]])
        cells = [row["task"], row["ways"], ks, *(f"{x:.2f}" for x in (strength, *numbers, limit)), f"{mean(row, 'recognised'):.0%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for name, some in (("All", rows), ("Not developed on", [row for row in rows if row["task"] not in DEVELOPED_ON])):
        clear = [row for row in some if mean(row, "classifier_index") >= 0.95]
        rest = [row for row in some if mean(row, "classifier_index") < 0.95]
        weakest = min((seed["prediction_strength"] for row in some for seed in row["seeds"]), default=np.nan)
        lines += [
            "",
            f"{name}: where the classifier has 0.95, Discover has 0.9 in {sum(not misses(row) for row in clear)} of {len(clear)} tasks; "
            f"elsewhere at least 0.85 of its index in {sum(not misses(row) for row in rest)} of {len(rest)}. The weakest pattern kept has "
            f"{weakest:.2f}.",
        ]
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """The held-out index of Discover over the classifier's: a dot a task, as large as there are tasks there; what the bar asks is white."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.8), layout="constrained")
    axes = figure.subplots()
    low = min([mean(row, name) for row in rows for name in ("held_out_index", "classifier_index")], default=0.0) - 0.07
    axes.fill_between([low, 0.95, 0.95, 1.05], [0.85 * low, 0.85 * 0.95, 0.9, 0.9], low, color="0.92", linewidth=0)
    for developed, colour in ((False, "#0072B2"), (True, "#E69F00")):
        if not (some := [row for row in rows if (row["task"] in DEVELOPED_ON) == developed]):
            continue
        where = [(round(mean(row, "classifier_index"), 2), round(mean(row, "held_out_index"), 2)) for row in some]
        spots = sorted(set(where))
        label = f"{'developed on' if developed else 'test'} ({len(some)} tasks)"
        axes.scatter(*zip(*spots, strict=True), [36 * where.count(xy) for xy in spots], colour, alpha=0.6, linewidth=0, label=label)
        for spot in spots:
            if names := [row["task"].removeprefix("libero_") for row, xy in zip(some, where, strict=True) if xy == spot and misses(row)]:
                axes.annotate(", ".join(names), spot, (-7, -3), textcoords="offset points", ha="right", fontsize=8)
    axes.set(xlabel="a linear classifier, told the truth", ylabel="Discover, untold", xlim=(low, 1.05), ylim=(low, 1.05))
    axes.set_title("Adjusted Rand index of unseen demonstrations", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def main() -> None:
    args = tyro.cli(Args)
    if args.tasks and args.suite:
        raise UserError("name either --tasks or --suite")
    torch.set_num_threads(1)
    made = {"num_demos": args.num_demos, "held_out": args.held_out, "num_patterns": args.num_patterns}
    rows = read_rows(args.json) if args.json and args.json.exists() else []
    names = args.tasks or [name for suite in args.suite for name in suite_tasks(suite)] or sixty_tasks()
    for name in tqdm(names, desc="Discover"):
        task = load_task(name, args.assets)
        done = {"task": f"{task.suite}/{task.index}", "assets": task.assets, **made}
        old = next((row for row in rows if row.items() >= done.items()), None)
        if old and {row["seed"] for row in old["seeds"]} >= set(args.seeds):
            continue
        demos = load_or_collect(task, args.num_demos + args.held_out, seed=DEMO_SEED, physics="sleep")
        layout, ways = make_env(task).obs_layout, np.array([e.attrs["strategy"] for e in demos])
        settings = [dlr_discover.Args(task=name, seed=seed, num_patterns=args.num_patterns, discover_steps=1) for seed in args.seeds]
        paths = [dlr_discover.along_path(observe_states(task, e.states), layout, settings[0].discover_points) for e in demos]
        seeds = [measure(each, np.stack(paths), layout, ways, args.num_demos) for each in settings]
        rows = [row for row in rows if row is not old]
        rows.append(done | {"ways": len(set(ways)), "seeds": seeds, "versions": versions()})
        rows.sort(key=lambda row: (row["task"].split("/")[0], int(row["task"].split("/")[1])))
        if args.json:
            write_json(args.json, rows)
    rows = [row for row in rows if row.items() >= made.items()]
    print(report(rows))
    if args.figure:
        plot(rows, args.figure)


if __name__ == "__main__":
    run_command(main)
