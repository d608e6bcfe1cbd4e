"""How often the scripted demonstrator succeeds, before failures are filtered out: per suite, task and strategy.

    python -m benchmarks.demonstrator --suite all --json FILE
    python -m benchmarks.demonstrator --tasks libero_spatial/0 libero_goal/7 --init-states 10 --each-strategy
    python -m benchmarks.demonstrator --suite all --assets standin --beside docs/results/demonstrator.json

The official init states of a task are tried once each, with action noise, and its strategies take turns; with --each-strategy, each
of them tries all of the states. The tables are Markdown. With --json, what the file already holds of the same measurement is not
measured again, so that a long one can be interrupted; what it holds of others stays. Which strategies a task has is found by
rehearsal, and chance has a say in it: to compare asset sets, let both do the same ones (--rehearsed-on).
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
from common.demos import Attempt, perform, strategies
from common.libero import load_task
from common.libero.assets import asset_names, find_assets
from common.libero.env import share_cores
from common.metrics import newcombe_interval
from common.runs import versions
from common.suites import SUITES, resolve, task_names

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
    """a folder, libero (its own or none) or standin (default: $LIBERO_ASSETS, else LIBERO's own, else stand-ins)"""
    rehearsed_on: str | None = None
    """take the strategies that passed rehearsal on these assets (a folder or standin) instead"""
    json: Path | None = None
    """also write the numbers to this file, and go on from what it holds"""
    beside: Path | None = None
    """another file of --json: put its success beside this one, task by task"""


def asset_set(choice: str | None) -> str:
    """The name of an asset set, as `Task.assets` gives it."""
    return asset_names(find_assets(choice))[0]


def suite_tasks(suite: str) -> list[str]:
    """The ids of a suite's tasks, or of all."""
    return [f"{name}/{i}" for name in (SUITES if suite == "all" else [suite]) for i in range(len(task_names()[name]))]


def read_rows(path: Path) -> list[dict]:
    """What --json has written."""
    try:
        rows = json.loads(path.read_text())
        [row["task"] for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} can't be read as a file of --json: {error}") from None
    return rows


def measure(task_id: str, args: Args) -> dict:
    """One task: {"task", "name", "goal", "success_rate", "mean_length", "episodes", "strategies": [...]}, or with an "error"."""
    task = load_task(task_id, args.assets)
    row = {"task": f"{task.suite}/{task.index}", "name": task.name, "goal": " and ".join(p.name for p in task.goal)}
    try:
        repertoire = strategies(task if args.rehearsed_on is None else load_task(task_id, args.rehearsed_on))
    except UserError as error:
        return {**row, "success_rate": 0.0, "mean_length": None, "strategies": [], "error": str(error)}
    states = np.linspace(0, len(task.init_states), args.init_states, endpoint=False).astype(int).tolist()
    ways = range(len(repertoire))
    turns = [(k, s) for k in range(len(states)) for s in (ways if args.each_strategy else [k % len(ways)])]
    queue = iter([Attempt(s, repertoire[s], [args.seed, s, k], states[k]) for k, s in turns])
    made = perform(task, lambda: next(queue, None), args.noise, min(16, len(turns)))
    episodes = [(attempt.key, episode) for attempt, episode in made]

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


def comparison(others: list[dict], rows: list[dict]) -> str:
    """Markdown: two measurements of the same tasks beside each other; in bold where the 95 % interval of the difference excludes 0."""
    found = {row["task"]: row for row in others}
    pairs = [(found[row["task"]], row) for row in rows if row["task"] in found]
    if not pairs:
        return "no task is in both"
    names = " | ".join(row["assets"] for row in pairs[0])
    lines = [f"| suite | tasks | mean success: {names} | at 80 % or better | |", "|---" * 6 + "|"]
    for suite in [*HUMAN_STEPS, "all"]:
        rates = np.array([[row["success_rate"] for row in pair] for pair in pairs if suite in ("all", pair[0]["task"].split("/")[0])])
        if len(rates):
            means, good = 100 * rates.mean(0), (rates >= 0.8).sum(0)
            lines.append(f"| {suite} | {len(rates)} | {means[0]:.1f} % | {means[1]:.1f} % | {good[0]} | {good[1]} |")
    lines += ["", f"| task | goal | {names} |", "|---" * 4 + "|"]
    for pair in pairs:
        rates, episodes = [row["success_rate"] for row in pair], [row.get("episodes", row["init_states"]) for row in pair]
        low, high = newcombe_interval(tuple(round(r * n) for r, n in zip(rates, episodes, strict=True)), tuple(episodes))
        mark = "" if low <= 0 <= high else "**"
        task = f"{pair[1]['task']} {pair[1]['name'].replace('_', ' ')} | {pair[1]['goal']}"
        lines.append(f"| {task} | {100 * rates[0]:.0f} % | {mark}{100 * rates[1]:.0f} %{mark} |")
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args)
    if args.suite not in (None, "all", *SUITES):
        raise UserError(f"unknown suite {args.suite!r}; suites are {', '.join(SUITES)}, or all")
    if bool(args.tasks) == bool(args.suite):
        raise UserError("name either --tasks or a --suite")
    if not 1 <= args.init_states <= 50 or args.noise < 0 or args.workers < 1:
        raise UserError("--init-states is 1 to 50, --noise at least 0, --workers at least 1")
    tasks = args.tasks or suite_tasks(args.suite)
    tasks = ["{}/{}".format(*resolve(task)) for task in tasks]  # a wrong name ends here, not after the first tasks
    asked = {"assets": asset_set(args.assets), "mujoco": mujoco.__version__}
    asked |= {"init_states": args.init_states, "each_strategy": args.each_strategy, "noise": args.noise, "seed": args.seed}
    asked["rehearsed_on"] = None if args.rehearsed_on is None else asset_set(args.rehearsed_on)
    rows = read_rows(args.json) if args.json and args.json.exists() else []
    revision = versions()["revision"]
    beside = [] if args.beside is None else read_rows(args.beside)
    done = {row["task"]: row for row in rows if all(row.get(k) == v for k, v in asked.items())}
    others = [row for row in rows if row not in done.values()]  # of other measurements: they stay in the file
    workers = min(args.workers, len(tasks))
    with ProcessPoolExecutor(workers, get_context("spawn"), share_cores, (workers,)) as pool:
        rest = [t for t in tasks if t not in done]
        futures = [pool.submit(measure, t, args) for t in rest]
        for future in tqdm(as_completed(futures), total=len(tasks), initial=len(tasks) - len(rest), desc="tasks"):
            row = {**asked, "revision": revision, **future.result()}
            done[row["task"]] = row
            tqdm.write(f"{row['task']}: {100 * row['success_rate']:.0f} %  {row.get('error', '')}", file=sys.stderr)
            if args.json:
                with atomic_path(args.json) as temporary:
                    temporary.write_text(json.dumps([*others, *done.values()], indent=1))
    print(table([done[t] for t in tasks]))
    if args.beside is not None:
        print("\n" + comparison(beside, [done[t] for t in tasks]))


if __name__ == "__main__":
    run_command(main)
