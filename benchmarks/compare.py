"""The RL scripts side by side on one task: success, diversity, smoothness, consistency, and what they cost.

    python -m benchmarks.compare runs/RUN [runs/RUN ...]                  # runs that are finished
    python -m benchmarks.compare --task libero_90/20 --seeds 1 2 3        # runs everything itself; finished runs are kept
    python -m benchmarks.compare runs/RUN --merge compare/compare.json    # more seeds for an earlier table, e.g. from another machine

A column is a script (with the flags in which its runs differ, if they do) over its seeds: the mean, and a 95 % interval. Of several
seeds that is a bootstrap over seeds. Of one seed it says how well this one policy was measured, not how far others would fall from it:
Wilson's interval of its success, and the jackknife over its trajectories. The first column holds the demonstrations that the runs
learned from. Trajectories are compared in equal numbers: as many of each run as the smallest corpus holds, the same number of each
pattern.

Writes OUT/compare.md, compare.json, compare.png (paths from above, pairwise DTW distances, one PCA map of all) and curves.png
(success during PPO, with exploration noise, over environment steps and over time).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import metrics, plots, rollout
from common.cli import UserError, atomic_path, run_command
from common.data import Episode, read_episodes
from common.demos import collect, strategies
from common.job import load_demos
from common.libero import Task, load_task
from common.libero.make import choose_physics
from common.runs import Progress, read_config, read_finished, stored_args, write_json

SCRIPTS = ("gaussian_ppo", "diffusion_ppo", "dlr_discover")
NO_METHOD = {"seed", "run_folder", "resume", "videos", "corpus_images", "checkpoint_interval", "assets"}  # flags that change no result
# Measure: its unit or meaning, and how it is printed.
MEASURES = {
    "learn_success": ("success of the cloned policy (%)", "{:.0%}"),
    "success_rate": ("success, 50 official init states a pattern (%)", "{:.0%}"),
    "mean_jerk": ("jerk (m/s^3)", "{:.1f}"),
    "mean_acceleration": ("acceleration (m/s^2)", "{:.2f}"),
    "action_variation": ("action variation (a step)", "{:.2f}"),
    "steps": ("steps to success", "{:.0f}"),
    "consistency": ("dispersion from the same start (m)", "{:.3f}"),
    "within_pattern": ("dispersion within a pattern (m)", "{:.3f}"),
    "mean_pairwise_distance": ("mean pairwise distance (m)", "{:.2f}"),
    "dtw": ("mean DTW distance (m)", "{:.3f}"),
    "path_length_variance": ("path-length variance (m^2)", "{:.3f}"),
    "state_cells": ("states visited (5 cm cells in 1000 steps)", "{:.0f}"),
    "env_steps": ("environment steps", "{:,.0f}"),
    "wall_minutes": ("minutes", "{:.1f}"),
}


@dataclass
class Args:
    """Compare finished runs, or run the RL scripts on a task and compare them."""

    runs: tyro.conf.Positional[list[Path]] = field(default_factory=list)
    """run folders, all of one task"""
    task: str | None = None
    """run the scripts on this task instead, with their default flags, but to the last step (--stop-success None)"""
    seeds: list[int] = field(default_factory=lambda: [1])
    """with --task: seeds of the runs"""
    scripts: list[str] = field(default_factory=lambda: list(SCRIPTS))
    """with --task: which scripts"""
    run_folder: str = "runs"
    """with --task: where runs are, and are written"""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: $LIBERO_ASSETS, else LIBERO's own, else stand-ins)"""
    merge: list[Path] = field(default_factory=list)
    """compare.json of earlier comparisons on this task: their columns and seeds are added to the table and the curves"""
    out: Path = Path("compare")
    """folder for the table and the figure"""


@dataclass
class Run:
    """A finished run: what its summary says, and its corpus."""

    script: str
    seed: int
    config: dict
    summary: dict
    corpus: list[Episode]
    curve: np.ndarray
    """(M, 3) environment steps, minutes of PPO, success during training"""


@dataclass
class Column:
    """What the table says of one source, a seed at a time."""

    seeds: list[int] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    """MEASURES and `intervals`"""
    curves: list[np.ndarray] = field(default_factory=list)
    """`learning_curve`"""

    def add(self, seed: int, row: dict, curve: np.ndarray) -> None:
        self.seeds.append(seed)
        self.rows.append(row)
        self.curves.append(curve)


def load_run(folder: Path) -> Run:
    """Raises UserError if the run is not finished, or not of an RL script."""
    config, summary = read_finished(folder)
    if config.get("script") not in SCRIPTS:
        raise UserError(f"{folder} is a run of {config.get('script')}, not of {', '.join(SCRIPTS)}")
    return Run(config["script"], config["args"]["seed"], config, summary, read_episodes(folder / "corpus.hdf5"), learning_curve(folder))


def learning_curve(folder: Path) -> np.ndarray:
    """(M, 3) from the run's TensorBoard files: environment steps, minutes spent in PPO's rollouts and updates, success during training
    (the last 50 episodes, with exploration noise)."""
    log = EventAccumulator(str(folder), {"scalars": 0})
    log.Reload()
    tags = "charts/success", "charts/rollout_seconds", "charts/update_seconds"
    if not set(tags) <= set(log.Tags()["scalars"]):
        return np.zeros((0, 3))
    success, *seconds = ({event.step: event.value for event in log.Scalars(tag)} for tag in tags)  # a resumed run's later value counts
    steps = np.array(sorted(success))
    spent = np.cumsum([sum(part[step] for part in seconds) for step in steps])
    return np.column_stack([steps, spent / 60, [success[step] for step in steps]])


def load_comparison(path: Path, task: Task) -> dict:
    """An earlier compare.json, without its demonstrations. Raises UserError if it is none, or of another task."""
    try:
        found = json.loads(path.read_text())
        columns = {name: column for name, column in found["columns"].items() if not name.startswith("demonstrations")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a comparison's compare.json") from error
    for key, mine in (("task", task.id), ("assets", task.assets)):
        if found.get(key) != mine:
            raise UserError(f"{path} is a comparison on {found.get(key)}, not on {mine}")
    return found | {"columns": columns}


def merge(columns: dict[str, Column], old: dict, path: Path) -> None:
    """Add the columns and seeds of an earlier comparison, `load_comparison(path)`."""
    for name, column in old["columns"].items():
        for seed, row, curve in zip(column["seeds"], column["rows"], column["curves"], strict=True):
            if name in columns and seed in columns[name].seeds:
                raise UserError(f"seed {seed} of {name} is in {path}, and given besides")
            columns.setdefault(name, Column()).add(seed, row, np.array(curve, float).reshape(-1, 3))


def column_names(runs: list[Run]) -> list[str]:
    """The column of each run: its script, and those flags in which the runs of this script differ."""
    names = []
    for run in runs:
        same_script = [other.config["args"] for other in runs if other.script == run.script]
        mine = run.config["args"]
        flags = [f for f in mine if f not in NO_METHOD and any(other.get(f) != mine[f] for other in same_script)]
        names.append(" ".join([run.script, *(f"--{f.replace('_', '-')} {mine[f]}" for f in flags)]))
    return names


def run_scripts(args: Args, task: Task) -> list[Path]:
    """Run every script with every seed, to the last step; what has been finished so is kept, what was stopped is resumed."""
    folders = []
    for script in args.scripts:
        if script not in SCRIPTS:
            raise UserError(f"--scripts: there is no {script!r}; choose from {' '.join(SCRIPTS)}")
        for seed in args.seeds:
            pattern = f"{task.id.replace('/', '-')}__{script}__{seed}__*"
            found = [f for f in sorted(Path(args.run_folder).glob(pattern)) if by_default(f, script)]
            if not any((f / "summary.json").exists() for f in found):
                flags = ["--task", task.id, "--seed", str(seed), "--run-folder", args.run_folder, "--stop-success", "None"]
                flags = ["--resume", str(found[-1])] if found else flags
                flags += ["--assets", args.assets] if args.assets and not found else []
                print(f"{script}.py {' '.join(flags)}", flush=True)
                if code := subprocess.run([sys.executable, f"{script}.py", *flags]).returncode:
                    raise UserError(f"{script}.py ended with exit code {code}; the table needs all runs")
                found = [f for f in sorted(Path(args.run_folder).glob(pattern)) if by_default(f, script)]
            folders.append([f for f in found if (f / "summary.json").exists()][-1])
    return folders


def by_default(folder: Path, script: str) -> bool:
    """Whether a run has the script's default flags, but for those that change no result, and goes to the last step; not if unreadable."""
    cls = importlib.import_module(script).Args
    try:
        mine = stored_args(cls, read_config(folder)["args"])
    except UserError:
        return False
    names = {f.name for f in dataclasses.fields(cls)} - NO_METHOD - {"task", "device", "backend"}
    usual = cls(stop_success=None, physics=choose_physics(cls.physics, mine.backend))
    return all(getattr(mine, name) == getattr(usual, name) for name in names)


def patterns_of(episodes: list[Episode]) -> list[int]:
    """The pattern of each episode: of a demonstration its true strategy, 0 if that is not known."""
    return [int(e.attrs["pattern"] if e.attrs.get("pattern", -1) >= 0 else e.attrs.get("strategy_index", 0)) for e in episodes]


def equal_numbers(episodes: list[Episode], size: int) -> list[Episode]:
    """The first `size` episodes, taking turns between patterns."""
    turn: dict[int, int] = {}
    order = []
    for position, pattern in enumerate(patterns_of(episodes)):
        order.append((turn.setdefault(pattern, 0), position))
        turn[pattern] += 1
    return [episodes[position] for _, position in sorted(order)[:size]]


def measure(task: Task, episodes: list[Episode]) -> dict[str, float]:
    """The measures that are read off trajectories."""
    features = rollout.path_features(task, episodes)
    distances = metrics.pairwise_dtw(features)
    actions = [e.actions for e in episodes]
    steps = min(1000, sum(map(len, actions)))
    values = metrics.smoothness([e.proprio["ee_pos"] for e in episodes], actions) | metrics.diversity(features)
    values |= metrics.coverage([e.proprio["ee_pos"] for e in episodes], actions, samples=steps)
    values["dtw"] = float(distances[np.triu_indices(len(distances), 1)].mean()) if len(distances) > 1 else float("nan")
    values["within_pattern"] = metrics.consistency(features, patterns_of(episodes))
    return {name: values[name] for name in MEASURES if name in values}


def with_intervals(task: Task, episodes: list[Episode], per_pattern: list[dict] = ()) -> dict:
    """`measure`, and in `intervals` how well these few trajectories determine it (95 %).

    The jackknife (Efron & Stein 1981): the spread of the values when each trajectory is left out in turn. Unlike the bootstrap it holds no
    trajectory twice, which would pull distances between trajectories down. Success: Wilson's interval over all tries.
    """
    values, n = measure(task, episodes), len(episodes)
    intervals = {}
    if n > 2:
        without = [measure(task, episodes[:i] + episodes[i + 1 :]) for i in range(n)]
        for name, value in values.items():
            half = 1.96 * np.sqrt((n - 1) * np.var([w[name] for w in without]))
            intervals[name] = value - half, value + half
    if tries := sum(row["episodes"] for row in per_pattern):
        intervals["success_rate"] = metrics.wilson_interval(sum(row["success_rate"] * row["episodes"] for row in per_pattern), tries)
    return values | {"intervals": intervals}


def demonstrator_consistency(task: Task, noise: float) -> float:
    """`rollout.measure_consistency` of the scripted demonstrator, a pattern being a strategy."""
    ways = len(strategies(task))
    states, repeats = rollout.same_starts(task, ways, len(task.init_states))
    episodes = collect(task, ways * len(states) * repeats, noise=noise, keep_failures=True, init_states=states)
    return rollout.dispersion(task, episodes, "strategy_index")


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a line for each measure, a column for each source."""
    lines = ["| | " + " | ".join(f"{name} ({len(values)})" for name, values in rows.items()) + " |", "|---|" + "---|" * len(rows)]
    for measure, (meaning, form) in MEASURES.items():
        cells = []
        for values in rows.values():
            x = np.array([v[measure] for v in values if v.get(measure) is not None])
            cell = form.format(x.mean()) if len(x) else "-"
            interval = metrics.bootstrap_interval(x) if len(x) > 1 else values[0].get("intervals", {}).get(measure)
            if interval is not None:
                cell += " ({} to {})".format(*map(form.format, interval))
            cells.append(cell)
        lines.append(f"| {meaning} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args)
    if bool(args.runs) == bool(args.task):
        raise UserError("give run folders, or --task to run the scripts here")
    if args.task:
        args.runs = run_scripts(args, load_task(args.task, args.assets))
    runs = [load_run(folder) for folder in dict.fromkeys(folder.resolve() for folder in args.runs)]
    if len(names := sorted({run.summary["task"] for run in runs})) > 1:
        raise UserError(f"the runs are of different tasks: {', '.join(names)}")
    if len(kinds := sorted({run.config["assets"] for run in runs})) > 1:
        raise UserError(f"the runs were made on different assets: {', '.join(kinds)}")
    task = load_task(names[0], args.assets, made_on=kinds[0], file=args.runs[0])
    first = runs[0].config["args"]
    demos, source = load_demos(first["demos"], task, first["num_demos"], first["demo_noise"], first["seed"], Progress())
    merged = [load_comparison(path, task) for path in args.merge]
    size = min(len(demos), *(len(run.corpus) for run in runs), *(old["trajectories"] for old in merged))
    if uneven := [path for path, old in zip(args.merge, merged, strict=True) if old["trajectories"] > size]:
        raise UserError(
            f"{uneven[0]} compares more than the {size} trajectories that every run here has; compare its runs again with these"
        )
    shown = {"demonstrations": equal_numbers(demos, size)}
    known = {"consistency": demonstrator_consistency(task, first["demo_noise"])} if source == "scripted" else {}
    columns: dict[str, Column] = {f"demonstrations, {source}": Column([0], [known | with_intervals(task, shown["demonstrations"])], [])}
    named = sorted(zip(runs, column_names(runs), strict=True), key=lambda pair: (SCRIPTS.index(pair[0].script), pair[1], pair[0].seed))
    for run, name in named:
        known = {"success_rate": run.summary["success_rate"], "env_steps": run.summary["env_steps"]}
        known["learn_success"] = run.summary["stages"]["learn"]
        known["consistency"] = run.summary.get("consistency")  # not in runs of older versions
        known["wall_minutes"] = run.summary["wall_seconds"] / 60
        chosen = equal_numbers(run.corpus, size)
        shown.setdefault(name, chosen)
        columns.setdefault(name, Column()).add(run.seed, known | with_intervals(task, chosen, run.summary["per_pattern"]), run.curve)
    for path, old in zip(args.merge, merged, strict=True):
        merge(columns, old, path)
    versions = {run.config["versions"]["mujoco"] for run in runs}
    if len(versions) > 1:
        print(f"warning: the runs used different MuJoCo versions, {', '.join(map(str, versions))}", file=sys.stderr)

    args.out.mkdir(parents=True, exist_ok=True)
    text = table({name: column.rows for name, column in columns.items()})
    header = f"# {task.id}\n\n{size} trajectories a run. In brackets the number of seeds, and 95 % intervals:"
    header += " over seeds, or, of one seed, over its tries and trajectories.\n\n"
    with atomic_path(args.out / "compare.md") as temporary:
        temporary.write_text(header + text + "\n")
    content = {name: dataclasses.asdict(column) for name, column in columns.items()}
    write_json(args.out / "compare.json", {"task": task.id, "assets": task.assets, "trajectories": size, "columns": content})
    features = {name: rollout.path_features(task, episodes) for name, episodes in shown.items()}
    labels = {name: patterns_of(episodes) for name, episodes in shown.items()}
    plots.plot_comparison(args.out / "compare.png", features, labels, task.language)
    plots.plot_learning_curves(args.out / "curves.png", {n: c.curves for n, c in columns.items() if c.curves}, task.language)
    print(header + text)


if __name__ == "__main__":
    run_command(main)
