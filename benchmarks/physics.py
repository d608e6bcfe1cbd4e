"""What faster physics change: success of demonstrators and of trained policies under exact physics, under sleep and under coarse, from
the same official init states with the same noise.

    python -m benchmarks.physics --suite all --json docs/results/physics.json
    python -m benchmarks.physics --runs runs/RUN [...] --episodes 200

All try the same strategies, those that docs/results/demonstrator.json has for a task, so nothing is rehearsed. With --json, what the
file already holds is not measured again.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import mujoco
import numpy as np
import tyro
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

from benchmarks.demonstrator import asset_set, read_rows, suite_tasks
from benchmarks.fidelity import load_policy
from common.cli import Count, UserError, check_ranges, run_command, usable_cores
from common.demos import Attempt, Strategy, perform
from common.libero import load_task, make_env
from common.libero.env import PHYSICS, share_cores
from common.metrics import newcombe_interval
from common.rollout import roll_out
from common.runs import versions, write_json
from common.suites import SUITES

REPERTOIRES = Path("docs/results/demonstrator.json")


@dataclass
class Args:
    """Compare success under exact, sleeping and coarse physics."""

    tasks: list[str] = field(default_factory=list)
    """task ids, suite/index"""
    suite: str | None = None
    """all tasks of a suite instead, or of all suites: all"""
    runs: list[Path] = field(default_factory=list)
    """folders of finished runs of RL scripts instead: their policies"""
    episodes: Count = 8
    """episodes of each task or run"""
    workers: Count = usable_cores()
    """tasks at a time, each in a process of its own"""
    assets: str | None = None
    """a folder, libero or standin (default: as everywhere)"""
    json: Path | None = None
    """also write the numbers to this file, and go on from what it holds of tasks"""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.suite not in (None, "all", *SUITES):
            raise UserError(f"unknown suite {self.suite!r}; suites are {', '.join(SUITES)}, or all")
        if sum(map(bool, (self.tasks, self.suite, self.runs))) != 1:
            raise UserError("name either --tasks, a --suite or --runs")


def strategy(name: str) -> Strategy:
    """The strategy of a name like "grasp right, path direct" or "step 1 grasp right, step 1 path direct, ..."."""
    return Strategy(name, dict(re.fullmatch(r"((?:step \d+ )?\w+) (.+)", part).groups() for part in name.split(", ")))


def scripted(task_id: str, ways: list[str], args: Args, found: dict) -> dict:
    """All physics that `found` lacks on one task: the control step at which each attempt succeeds, or -1."""
    task, found = load_task(task_id, args.assets), dict(found)
    for physics in [name for name in PHYSICS if name not in found]:
        steps = np.full(args.episodes, -1)
        jobs = [Attempt(k, strategy(ways[k % len(ways)]), [0, k], k % len(task.init_states)) for k in range(args.episodes)]
        queue = iter(jobs)
        for attempt, episode in perform(task, lambda queue=queue: next(queue, None), 0.1, min(8, args.episodes), physics=physics):
            steps[attempt.key] = episode.length if episode.success else -1
        found[physics] = steps.tolist()
    return {"task": task_id, "policy": "scripted", "steps": found}


def trained(run: Path, args: Args) -> dict:
    """All physics with a trained policy, from official init states."""
    task, options, make, patterns = load_policy(run, args.assets)
    found = {}
    for physics in PHYSICS:
        env = make_env(task, 32, seed=0, physics=physics, autoreset_mode=AutoresetMode.DISABLED, **options)
        jobs = [(patterns[k % len(patterns)], k // len(patterns) % len(task.init_states)) for k in range(args.episodes)]
        found[physics] = [e.length if e.success else -1 for e in roll_out(env, make(env), jobs, lambda e: None)]
    return {"task": task.id, "policy": run.name, "steps": found}


def report(rows: list[dict], other: str) -> str:
    """Exact physics beside `other`, as markdown: a line a suite, and a line for each task where a flag differs."""

    def line(name: str, rows: list[dict]) -> str:
        exact, faster = (np.concatenate([row["steps"][physics] for row in rows]) for physics in ("exact", other))
        both = (exact >= 0) & (faster >= 0)
        won = [int((steps >= 0).sum()) for steps in (exact, faster)]
        low, high = newcombe_interval((won[1], won[0]), (len(exact), len(exact)))
        near = np.mean(np.abs(exact[both] - faster[both]) <= 2) if both.any() else np.nan
        cells = [len(rows), len(exact), f"{won[0] / len(exact):.1%}", f"{won[1] / len(exact):.1%}"]
        cells += [f"{100 * (won[1] - won[0]) / len(exact):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"]
        cells += [int(((exact >= 0) & (faster < 0)).sum()), int(((exact < 0) & (faster >= 0)).sum()), f"{near:.0%}"]
        return f"| {name} | " + " | ".join(map(str, cells)) + " |"

    head = f"| | tasks | episodes | exact | {other} | difference, points | only exact | only {other} | within 2 steps |"
    lines = [head, "|---" * 9 + "|"]
    groups = {suite: [row for row in rows if row["task"].startswith(f"{suite}/")] for suite in SUITES}
    lines += [line(suite, part) for suite, part in groups.items() if part] + [line("all", rows)]
    flipped = [row for row in rows if np.any((np.array(row["steps"]["exact"]) >= 0) != (np.array(row["steps"][other]) >= 0))]
    lines += ["", "Where success differs in at least one episode:", "", head, "|---" * 9 + "|"]
    return "\n".join(lines + [line(f"{row['task']} ({row['policy']})", [row]) for row in flipped])


def main() -> None:
    args = tyro.cli(Args)
    if args.runs:
        rows = [trained(run, args) for run in tqdm(args.runs, desc="runs")]
        if args.json:
            write_json(args.json, {"versions": versions(), "rows": rows})
    else:
        asked = {"assets": asset_set(args.assets), "mujoco": mujoco.__version__, "episodes": args.episodes}
        repertoires = {row["task"]: [s["name"] for s in row["strategies"]] for row in read_rows(REPERTOIRES)}
        tasks = [task for task in args.tasks or suite_tasks(args.suite) if repertoires.get(task)]
        kept = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
        done = {row["task"]: row for row in kept if all(row.get(k) == v for k, v in asked.items())}
        whole = [task for task in tasks if task in done and set(PHYSICS) <= set(done[task]["steps"])]
        workers = min(args.workers, len(tasks))
        with ProcessPoolExecutor(workers, get_context("spawn"), share_cores, (workers,)) as pool:
            rest = [task for task in tasks if task not in whole]
            futures = [pool.submit(scripted, task, repertoires[task], args, done.get(task, {}).get("steps", {})) for task in rest]
            for future in tqdm(as_completed(futures), total=len(tasks), initial=len(tasks) - len(rest), desc="tasks"):
                row = asked | future.result()
                done[row["task"]] = row
                if args.json:
                    write_json(args.json, {"versions": versions(), "rows": list(done.values())})
        rows = [done[task] for task in tasks]
    print("\n\n".join(report(rows, other) for other in PHYSICS[1:]))


if __name__ == "__main__":
    run_command(main)
