"""What a VLA learns from corpora of different sources: the papers' tables (arXiv 2511.19528, Table 2; arXiv 2509.19752) in their form.

    python -m benchmarks.vla_compare                     # small: 2 tasks to pretrain on, 2 to fine-tune on; two hours on 2 cores
    python -m benchmarks.vla_compare --preset paper      # all of LIBERO-90, then the four suites; for a GPU node

Every source writes its corpora (scripted demonstrations, gaussian_ppo, diffusion_ppo, dlr_discover), a VLA is pretrained on equally
many episodes of each, at several numbers of episodes, fine-tuned on demonstrations of tasks that no corpus holds, and evaluated by
LIBERO's published protocol. Everything is a command that could be typed by hand, and is printed; what is finished is kept, what was
stopped is resumed, so the benchmark can be stopped at any time and started again.

Writes OUT/vla_compare.md, vla_compare.json and vla_compare.png (success over the number of episodes).
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import h5py
import tyro
from matplotlib.figure import Figure

from common.cli import UserError, atomic_path, run_command
from common.metrics import wilson_interval
from common.runs import versions, write_json
from common.suites import expand

SOURCES = ("demonstrations", "gaussian_ppo", "diffusion_ppo", "dlr_discover")
NAMES = {
    "none": "none",
    "demonstrations": "demonstrations",
    "gaussian_ppo": "Gaussian",
    "diffusion_ppo": "diffusion",
    "dlr_discover": "DLR",
}


@dataclasses.dataclass(frozen=True)
class Preset:
    pretrain: tuple[str, ...]  # tasks and suites that every source makes corpora of
    downstream: tuple[tuple[str, ...], ...]  # groups of tasks and suites; a model is fine-tuned on each group
    episodes: tuple[int, ...]  # of each task in the corpora; the last is that of the table
    downstream_episodes: int  # demonstrations of each downstream task
    image_size: int
    by_suite: bool  # the table's columns: suites or tasks
    rl: dict[str, list[str]]  # flags of the RL scripts
    size: str  # of the model
    pretraining: list[str]  # flags of vla_pretrain.py
    finetuning: list[str]  # and of vla_finetune.py


SMALL_RL = ["--total-steps", "120000", "--no-videos"]
PATIENT = ["--gamma", "0.997", "--anneal-lr"]  # what a single policy does best with (docs/comparison.md)
PRESETS = {
    "small": Preset(
        pretrain=("libero_90/9", "libero_90/7"),  # bowl on the plate, open the top drawer
        downstream=(("libero_goal/8", "libero_goal/0"),),  # bowl on the plate and open the middle drawer, in another scene
        episodes=(20, 40),
        downstream_episodes=20,
        image_size=64,
        by_suite=False,
        rl={
            "gaussian_ppo": [*SMALL_RL, *PATIENT, "--actor-lr", "8e-5", "--corpus-episodes", "40"],
            "diffusion_ppo": [*SMALL_RL, *PATIENT, "--corpus-episodes", "40"],
            "dlr_discover": [*SMALL_RL, "--num-patterns", "4", "--corpus-episodes", "12"],
        },
        size="tiny",
        pretraining=["--steps", "1500", "--batch-size", "64", "--warmup", "50"],
        finetuning=["--videos", "0"],
    ),
    "paper": Preset(
        pretrain=("libero_90",),
        downstream=(("libero_spatial",), ("libero_object",), ("libero_goal",), ("libero_10",)),
        episodes=(10, 25, 50),
        downstream_episodes=50,
        image_size=128,
        by_suite=True,
        rl={
            "gaussian_ppo": ["--corpus-episodes", "50", "--no-videos"],
            "diffusion_ppo": ["--corpus-episodes", "50", "--no-videos"],
            "dlr_discover": ["--num-patterns", "3", "--corpus-episodes", "20", "--no-videos"],  # |Z| = 3 as in the paper
        },
        size="base",
        pretraining=["--steps", "60000", "--batch-size", "512", "--compile", "--num-workers", "8"],
        finetuning=["--batch-size", "128", "--num-workers", "8", "--num-envs", "50"],
    ),
}


@dataclasses.dataclass
class Args:
    """Pretrain VLAs on equally large corpora of different sources, fine-tune them on held-out tasks, and compare their success."""

    preset: str = "small"
    """small (2 cores, two hours) or paper (LIBERO-90 to the four suites; GPU)"""
    sources: list[str] = dataclasses.field(default_factory=lambda: list(SOURCES))
    """which sources, beside no pretraining"""
    head: str = "flow"
    """action head of the VLA: flow or tokens"""
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1])
    """seeds of pretraining and fine-tuning (their trials are pooled); the corpora are made with the first"""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: $LIBERO_ASSETS, else LIBERO's own, else stand-ins)"""
    out: Path = Path("vla_compare")
    """folder of everything: corpora, runs, the table and the figure"""


def call(*words: str | Path) -> bool:
    """Run a command of this repository; whether it succeeded."""
    words = [str(w) for w in words]
    print("python " + " ".join(words), flush=True)
    return subprocess.run([sys.executable, *words], cwd=Path(__file__).resolve().parent.parent).returncode == 0


def run_script(script: str, folder: Path, flags: list[str]) -> Path | None:
    """The finished run of a script in `folder`: made, resumed or found there; None if it failed."""
    if not list(folder.glob("*/summary.json")):
        started = sorted(folder.glob("*/checkpoint.pt"))
        call(f"{script}.py", *(["--resume", str(started[-1].parent)] if started else [*flags, "--run-folder", str(folder)]))
    return next((path.parent for path in folder.glob("*/summary.json")), None)


def make_corpus(args: Args, preset: Preset, source: str, task: str, episodes: int) -> Path | None:
    """A corpus of a task, with pictures; None if its source failed."""
    seed, assets = str(args.seeds[0]), ["--assets", args.assets] if args.assets else []
    if source == "demonstrations":
        suite, name = task.split("/")
        folder = args.out.absolute() / "demonstrations" / str(episodes)
        path = folder / suite / f"{name}_demo.hdf5"
        if not path.exists():
            call("-m", "common.demos", "--task", task, "--episodes", str(episodes), "--seed", seed, "--out", folder, *assets)
    else:
        folder = args.out.absolute() / "rl" / source / task.replace("/", "-")
        run = run_script(source, folder, ["--task", task, "--seed", seed, *preset.rl[source], *assets])
        path = (run or folder) / "corpus.hdf5"
    if not path.exists():
        return None
    with h5py.File(path) as file:
        pictures = "agentview_rgb" in file["data/demo_0/obs"]
    if not pictures and not call("-m", "common.libero.render", path, "--size", str(preset.image_size), *assets):
        raise UserError(f"{path} got no pictures")
    return path


def size_of(path: Path | None) -> int:
    """Episodes in a corpus."""
    if path is None:
        return 0
    with h5py.File(path) as file:
        return int(file["data"].attrs["num_demos"])


def make_corpora(args: Args, preset: Preset) -> tuple[dict[str, list[Path]], list[str], list[str]]:
    """Source -> its corpora of the tasks of which every source has enough episodes; these tasks; and the ones left out, and why."""
    most, found, tasks, left_out = max(preset.episodes), {source: [] for source in args.sources}, [], []
    for task in expand(list(preset.pretrain)):
        paths = {source: make_corpus(args, preset, source, task, most) for source in args.sources}
        if short := {source: size_of(path) for source, path in paths.items() if size_of(path) < most}:
            left_out.append(f"{task}: " + ", ".join(f"{source} has {n} of {most} episodes" for source, n in short.items()))
            continue
        tasks.append(task)
        for source, path in paths.items():
            found[source].append(path)
    if not tasks:
        raise UserError(f"no task has {most} episodes of every source: " + "; ".join(left_out))
    return found, tasks, left_out


def make_cell(args: Args, preset: Preset, source: str, episodes: int, corpora: list[Path], downstream: list[list[Path]]) -> list[dict]:
    """Pretrain (unless `source` is none), fine-tune and evaluate; rows of results.json, over groups and seeds."""
    rows = []
    assets = ["--assets", args.assets] if args.assets else []
    for seed in args.seeds:
        cell = args.out.absolute() / args.head / f"{source}-{episodes}-seed{seed}"
        shape = ["--head", args.head, "--seed", str(seed)]
        if source == "none":
            start = ["--size", preset.size]
        else:
            flags = ["--data", *map(str, corpora), "--max-episodes", str(episodes), "--size", preset.size, *shape, *preset.pretraining]
            run = run_script("vla_pretrain", cell / "pretrain", flags)
            if run is None:
                raise UserError(f"vla_pretrain.py failed in {cell}; start this benchmark again once that is mended")
            start = ["--checkpoint", str(run)]
        for number, data in enumerate(downstream):
            flags = [*start, "--data", *map(str, data), *shape, *preset.finetuning, *assets]
            run = run_script("vla_finetune", cell / f"finetune-{number}", flags)
            if run is None:
                raise UserError(f"vla_finetune.py failed in {cell}; start this benchmark again once that is mended")
            rows += json.loads((run / "results.json").read_text())["tasks"]
    return rows


def pooled(rows: list[dict]) -> dict:
    """Success over all trials of some rows, with its 95 % Wilson interval."""
    successes, trials = sum(r["successes"] for r in rows), sum(r["trials"] for r in rows)
    return {"success_rate": successes / trials, "interval": wilson_interval(successes, trials), "trials": trials}


def column_of(preset: Preset, task: str) -> str:
    return task.split("/")[0] if preset.by_suite else task


def table(preset: Preset, cells: dict[tuple[str, int], list[dict]]) -> str:
    """Markdown: a line for each source and number of episodes, a column for each suite or task."""
    columns = list(dict.fromkeys(column_of(preset, r["task"]) for rows in cells.values() for r in rows))
    lines = ["| pretrained on | episodes a task | " + " | ".join([*columns, "mean"]) + " |", "|---" * (len(columns) + 3) + "|"]
    for (source, episodes), rows in cells.items():
        found = [pooled([r for r in rows if column_of(preset, r["task"]) == c]) for c in columns] + [pooled(rows)]
        texts = [f"{100 * p['success_rate']:.0f} ({100 * p['interval'][0]:.0f} to {100 * p['interval'][1]:.0f})" for p in found]
        lines.append(f"| {NAMES[source]} | {episodes or '-'} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def plot_scaling(path: Path, cells: dict[tuple[str, int], list[dict]]) -> None:
    """Mean success over the number of pretraining episodes, a line a source; dotted: no pretraining."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for source in dict.fromkeys(source for source, _ in cells):
        points = [(n, pooled(rows)) for (s, n), rows in cells.items() if s == source]
        rates = [100 * p["success_rate"] for _, p in points]
        if source == "none":
            axes.axhline(rates[0], color="0.4", linestyle=":", label=NAMES[source])
            continue
        errors = [[100 * abs(p["interval"][i] - p["success_rate"]) for _, p in points] for i in (0, 1)]
        axes.errorbar([n for n, _ in points], rates, errors, marker="o", capsize=3, label=NAMES[source])
    axes.set(xlabel="pretraining episodes a task", ylabel="success on the downstream tasks (%)", ylim=(-2, 102))
    axes.set_xticks(sorted({n for _, n in cells if n}))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="pretrained on", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def report(args: Args, preset: Preset, cells: dict[tuple[str, int], list[dict]], tasks: list[str], left_out: list[str]) -> str:
    """Write the table, the JSON and the figure; returns the Markdown."""
    largest = max(n for _, n in cells)
    main = {key: rows for key, rows in cells.items() if key[1] in (0, largest)}
    parts = [
        f"# VLA success by source of the pretraining corpus ({args.preset} preset, {args.head} head)",
        "Success in % with 95 % Wilson intervals over all trials, 50 official init states a task. "
        f"Seeds: {', '.join(map(str, args.seeds))}. "
        f"Pretrained on {largest} episodes of each of {len(tasks)} tasks, fine-tuned on {preset.downstream_episodes} scripted "
        "demonstrations of each downstream task.",
        table(preset, main),
        "## Data scaling",
        table(preset, cells),
        *(["Left out: " + "; ".join(left_out) + "."] if left_out else []),
    ]
    text = "\n\n".join(parts) + "\n"
    with atomic_path(args.out / "vla_compare.md") as temporary:
        temporary.write_text(text)
    content = [{"source": source, "episodes": n, **pooled(rows), "tasks": rows} for (source, n), rows in cells.items()]
    record = {"preset": args.preset, "head": args.head, "seeds": args.seeds, "pretrain_tasks": tasks, "left_out": left_out}
    write_json(args.out / "vla_compare.json", record | {"cells": content, "versions": versions()})
    plot_scaling(args.out / "vla_compare.png", cells)
    return text


def main() -> None:
    args = tyro.cli(Args)
    if args.preset not in PRESETS:
        raise UserError(f"--preset must be {' or '.join(PRESETS)}, not {args.preset}")
    if unknown := [s for s in args.sources if s not in SOURCES]:
        raise UserError(f"--sources: there is no {unknown[0]!r}; choose from {' '.join(SOURCES)}")
    if not args.seeds or not args.sources:
        raise UserError("--seeds and --sources need at least one value")
    preset = PRESETS[args.preset]
    args.out.mkdir(parents=True, exist_ok=True)
    downstream, missing = [], []
    for group in preset.downstream:
        paths = {task: make_corpus(args, preset, "demonstrations", task, preset.downstream_episodes) for task in expand(list(group))}
        missing += [f"{task}: no demonstrations to fine-tune on" for task, path in paths.items() if path is None]
        downstream.append([path for path in paths.values() if path is not None])
        if not downstream[-1]:
            raise UserError("; ".join(missing))
    corpora, tasks, left_out = make_corpora(args, preset)
    left_out += missing
    cells = {("none", 0): make_cell(args, preset, "none", 0, [], downstream)}
    for source in args.sources:
        for episodes in preset.episodes:
            cells[source, episodes] = make_cell(args, preset, source, episodes, corpora[source], downstream)
            report(args, preset, cells, tasks, left_out)  # what there is so far
    print(report(args, preset, cells, tasks, left_out))


if __name__ == "__main__":
    run_command(main)
