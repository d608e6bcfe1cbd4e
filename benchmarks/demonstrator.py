"""How often the scripted demonstrator succeeds, before failures are filtered out: per task and per strategy.

    python -m benchmarks.demonstrator --tasks libero_spatial/0 libero_goal/7
    python -m benchmarks.demonstrator --suite libero_goal --init-states 10

Every strategy of a task tries each of the official init states once, with action noise. The tables are Markdown. With --json,
what the file already holds of the same measurement is not measured again, so that a long one can be interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import mujoco
import numpy as np
import tyro

from common.cli import UserError, atomic_path, run_command
from common.demonstrator import collect, strategies
from common.standins import is_standin
from common.tasks import SUITES, assets_fingerprint, find_assets, load_task, resolve, task_names

# The longest human demonstration of each suite, in control steps (LIBERO's published data sets).
HUMAN_STEPS = {"libero_spatial": 193, "libero_object": 254, "libero_goal": 270, "libero_10": 505, "libero_90": 373}


@dataclass
class Args:
    """Measure the scripted demonstrator over official init states."""

    tasks: list[str] = field(default_factory=list)
    """task ids"""
    suite: str | None = None
    """all tasks of a suite instead"""
    init_states: int = 50
    """how many of the 50 official init states each strategy tries"""
    noise: float = 0.1
    """standard deviation of the action noise"""
    seed: int = 0
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """tasks measured at a time, each in a process of its own"""
    assets: str | None = None
    """LIBERO's asset folder, or standin (default: $LIBERO_ASSETS, else LIBERO's own, else a download, else stand-ins)"""
    json: Path | None = None
    """also write the numbers to this file, and go on from what it holds"""


def measure(task_id: str, assets: str | None, init_states: int, noise: float, seed: int) -> dict:
    """One task: {"task", "goal", "success_rate", "mean_length", "strategies": [{"name", "success_rate", ...}]} or {"error"}."""
    task = load_task(task_id, assets)
    row = {"task": f"{task.suite}/{task.index}", "name": task.name, "goal": " and ".join(p.name for p in task.goal)}
    row |= {"assets": task.assets, "mujoco": mujoco.__version__, "init_states": init_states, "noise": noise, "seed": seed}
    states = np.linspace(0, len(task.init_states), init_states, endpoint=False).astype(int).tolist()
    try:
        repertoire = strategies(task)
    except UserError as error:
        return {**row, "success_rate": 0.0, "mean_length": None, "strategies": [], "error": str(error)}
    episodes = collect(task, len(states) * len(repertoire), seed, noise, keep_failures=True, init_states=states, progress=False)

    def rate(rows):
        lengths = [e.length for e in rows if e.success]
        return {"success_rate": len(lengths) / len(rows), "mean_length": float(np.mean(lengths)) if lengths else None}

    by_strategy = [{"name": s.name, **rate([e for e in episodes if e.attrs["strategy_index"] == i])} for i, s in enumerate(repertoire)]
    return {**row, **rate(episodes), "strategies": by_strategy}


def table(rows: list[dict]) -> str:
    """Markdown: a line a task, then a line a strategy."""

    def cells(row):
        length = "" if row["mean_length"] is None else f"{row['mean_length']:.0f}"
        return f"{100 * row['success_rate']:.0f} % | {length}"

    lines = ["| task | goal | strategies | success | steps | longest human |", "|---|---|---|---|---|---|"]
    for row in rows:
        human = HUMAN_STEPS[row["task"].split("/")[0]]
        lines.append(f"| {row['task']} {row['name']} | {row['goal']} | {len(row['strategies'])} | {cells(row)} | {human} |")
    mean = np.mean([row["success_rate"] for row in rows])
    good = sum(row["success_rate"] >= 0.8 for row in rows)
    lines += ["", f"{good} of {len(rows)} tasks at 80 % or better; mean success {100 * mean:.1f} %.", ""]
    lines += ["| task | strategy | success | steps |", "|---|---|---|---|"]
    lines += [f"| {row['task']} | {s['name']} | {cells(s)} |" for row in rows for s in row["strategies"]]
    lines += [f"- {row['error']}" for row in rows if "error" in row]
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args)
    if args.suite is not None and args.suite not in SUITES:
        raise UserError(f"unknown suite {args.suite!r}; suites are {', '.join(SUITES)}")
    if bool(args.tasks) == bool(args.suite):
        raise UserError("name either --tasks or a --suite")
    if not 1 <= args.init_states <= 50 or args.noise < 0 or args.workers < 1:
        raise UserError("--init-states is 1 to 50, --noise at least 0, --workers at least 1")
    tasks = args.tasks or [f"{args.suite}/{i}" for i in range(len(task_names()[args.suite]))]
    tasks = ["{}/{}".format(*resolve(task)) for task in tasks]  # a wrong name ends here, not after the first tasks
    kind = "standin" if is_standin(folder := find_assets(args.assets)) else "libero"
    asked = {"assets": f"{kind}:{assets_fingerprint(folder)}", "mujoco": mujoco.__version__}
    asked |= {"init_states": args.init_states, "noise": args.noise, "seed": args.seed}
    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    done = {row["task"]: row for row in rows if all(row.get(k) == v for k, v in asked.items())}
    with ProcessPoolExecutor(min(args.workers, len(tasks)), mp_context=get_context("spawn")) as pool:
        rest = [t for t in tasks if t not in done]
        futures = [pool.submit(measure, t, args.assets, args.init_states, args.noise, args.seed) for t in rest]
        for future in as_completed(futures):
            row = future.result()
            done[row["task"]] = row
            print(f"{row['task']}: {100 * row['success_rate']:.0f} %  {row.get('error', '')}", file=sys.stderr, flush=True)
            if args.json:
                with atomic_path(args.json) as temporary:
                    temporary.write_text(json.dumps(list(done.values()), indent=1))
    print(table([done[t] for t in tasks]))


if __name__ == "__main__":
    run_command(main)
