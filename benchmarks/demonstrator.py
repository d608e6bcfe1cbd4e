"""How often the scripted demonstrator succeeds, before failures are filtered out: per suite, task and strategy.

    python -m benchmarks.demonstrator --suite all --json FILE
    python -m benchmarks.demonstrator --tasks libero_spatial/0 libero_goal/7 --init-states 10 --each-strategy

The official init states of a task are tried once each, with action noise, and its strategies take turns; with --each-strategy, each
of them tries all of the states. The tables are Markdown. With --json, what the file already holds of the same measurement is not
measured again, so that a long one can be interrupted; what it holds of others stays.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import mujoco
import numpy as np
import tyro
from tqdm import tqdm

from common.cli import UserError, atomic_path, run_command, usable_cores
from common.demonstrator import Attempt, perform, strategies
from common.env import share_cores
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
    """all tasks of a suite instead, or of all suites: all"""
    init_states: int = 50
    """how many of the 50 official init states are tried"""
    each_strategy: bool = False
    """each strategy tries all of these states, instead of taking turns"""
    noise: float = 0.1
    """standard deviation of the action noise"""
    seed: int = 0
    workers: int = usable_cores()
    """tasks measured at a time, each in a process of its own"""
    assets: str | None = None
    """LIBERO's asset folder, or standin (default: $LIBERO_ASSETS, else LIBERO's own, else a download, else stand-ins)"""
    json: Path | None = None
    """also write the numbers to this file, and go on from what it holds"""


def measure(task_id: str, assets: str | None, init_states: int, each_strategy: bool, noise: float, seed: int) -> dict:
    """One task: {"task", "goal", "success_rate", "mean_length", "strategies": [{"name", "success_rate", ...}]} or {"error"}."""
    task = load_task(task_id, assets)
    row = {"task": f"{task.suite}/{task.index}", "name": task.name, "goal": " and ".join(p.name for p in task.goal)}
    row |= {"assets": task.assets, "mujoco": mujoco.__version__}
    row |= {"init_states": init_states, "each_strategy": each_strategy, "noise": noise, "seed": seed}
    try:
        repertoire = strategies(task)
    except UserError as error:
        return {**row, "success_rate": 0.0, "mean_length": None, "strategies": [], "error": str(error)}
    states = np.linspace(0, len(task.init_states), init_states, endpoint=False).astype(int).tolist()
    turns = [(k, s) for k in range(len(states)) for s in (range(len(repertoire)) if each_strategy else [k % len(repertoire)])]
    queue = iter([Attempt(s, repertoire[s], [seed, s, k], states[k]) for k, s in turns])
    episodes = [(attempt.key, episode) for attempt, episode in perform(task, lambda: next(queue, None), noise, min(16, len(turns)))]

    def rate(rows):
        lengths = [e.length for e in rows if e.success]
        rate, length = (len(lengths) / len(rows) if rows else None), (float(np.mean(lengths)) if lengths else None)
        return {"success_rate": rate, "mean_length": length, "episodes": len(rows)}

    by_strategy = [{"name": s.name, **rate([e for key, e in episodes if key == i])} for i, s in enumerate(repertoire)]
    return {**row, **rate([e for _, e in episodes]), "strategies": by_strategy}


def table(rows: list[dict]) -> str:
    """Markdown: a line a suite, a line a task, and a line a strategy."""

    def summary(name, rows):
        rates = [row["success_rate"] for row in rows]
        return f"| {name} | {len(rows)} | {sum(rate >= 0.8 for rate in rates)} | {100 * np.mean(rates):.1f} % |"

    def cells(row):
        length = "" if row["mean_length"] is None else f"{row['mean_length']:.0f}"
        return f"{100 * row['success_rate']:.0f} % | {length}"

    suites = {suite: [row for row in rows if row["task"].startswith(f"{suite}/")] for suite in HUMAN_STEPS}
    lines = ["| suite | tasks | at 80 % or better | mean success |", "|---|---|---|---|"]
    lines += [summary(suite, part) for suite, part in suites.items() if part] + [summary("all", rows)]
    lines += ["", "| task | goal | strategies | success | steps | longest human |", "|---|---|---|---|---|---|"]
    for row in rows:
        human = HUMAN_STEPS[row["task"].split("/")[0]]
        lines.append(f"| {row['task']} {row['name']} | {row['goal']} | {len(row['strategies'])} | {cells(row)} | {human} |")
    lines += ["", "| task | strategy | success | steps |", "|---|---|---|---|"]
    lines += [f"| {row['task']} | {s['name']} | {cells(s)} |" for row in rows for s in row["strategies"] if s["episodes"]]
    lines += ["", *(f"- {row['error']}" for row in rows if "error" in row)]
    return "\n".join(lines).rstrip()


def main() -> None:
    args = tyro.cli(Args)
    if args.suite not in (None, "all", *SUITES):
        raise UserError(f"unknown suite {args.suite!r}; suites are {', '.join(SUITES)}, or all")
    if bool(args.tasks) == bool(args.suite):
        raise UserError("name either --tasks or a --suite")
    if not 1 <= args.init_states <= 50 or args.noise < 0 or args.workers < 1:
        raise UserError("--init-states is 1 to 50, --noise at least 0, --workers at least 1")
    suites = SUITES if args.suite == "all" else [args.suite]
    tasks = args.tasks or [f"{suite}/{i}" for suite in suites for i in range(len(task_names()[suite]))]
    tasks = ["{}/{}".format(*resolve(task)) for task in tasks]  # a wrong name ends here, not after the first tasks
    kind = "standin" if is_standin(folder := find_assets(args.assets)) else "libero"
    asked = {"assets": f"{kind}:{assets_fingerprint(folder)}", "mujoco": mujoco.__version__}
    asked |= {"init_states": args.init_states, "each_strategy": args.each_strategy, "noise": args.noise, "seed": args.seed}
    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    done = {row["task"]: row for row in rows if all(row.get(k) == v for k, v in asked.items())}
    others = [row for row in rows if row not in done.values()]  # of other measurements: they stay in the file
    workers = min(args.workers, len(tasks))
    with ProcessPoolExecutor(workers, get_context("spawn"), share_cores, (workers,)) as pool:
        rest = [t for t in tasks if t not in done]
        how = args.assets, args.init_states, args.each_strategy, args.noise, args.seed
        futures = [pool.submit(measure, t, *how) for t in rest]
        for future in tqdm(as_completed(futures), total=len(tasks), initial=len(tasks) - len(rest), desc="tasks"):
            row = future.result()
            done[row["task"]] = row
            tqdm.write(f"{row['task']}: {100 * row['success_rate']:.0f} %  {row.get('error', '')}", file=sys.stderr)
            if args.json:
                with atomic_path(args.json) as temporary:
                    temporary.write_text(json.dumps([*others, *done.values()], indent=1))
    print(table([done[t] for t in tasks]))


if __name__ == "__main__":
    run_command(main)
