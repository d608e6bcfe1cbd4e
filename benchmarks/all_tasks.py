"""The runs of several sweeps of one script as one table and figure (docs/sweep.md).

    python -m benchmarks.all_tasks docs/results/all_gaussian_ppo.json runs/sweep-gaussian_ppo --json docs/results/all_gaussian_ppo.json \
        --page docs/all_tasks.md

130 tasks take longer than one sitting, or more than one machine: each sweep's folder, or the JSON file that was written of earlier
ones, adds its finished runs. Of two of the same task and seed the later source's counts. Prints the tables of `common.sweep` and a
line of how many tasks reach 90 %, what RL adds where the clone is under 80 %, and what is missing of the suites.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from common import plots
from common.cli import UserError, atomic_path, run_command
from common.runs import write_json
from common.suites import SUITES, expand, number
from common.sweep.report import interval, suites_table, tasks_table


@dataclass
class Args:
    """Put the runs of several sweeps into one table."""

    sources: tyro.conf.Positional[tuple[Path, ...]]
    """folders of sweeps, or JSON files that this command wrote"""
    tasks: list[str] = field(default_factory=lambda: list(SUITES))
    """suites and tasks that the table should hold"""
    json: Path | None = None
    """also write the runs to this file"""
    figure: Path | None = None
    """also draw them"""
    page: Path | None = None
    """also write them into this Markdown page, under a heading of the script's, in the place of what stands there"""


def read(source: Path) -> dict:
    """What a sweep reported: its script, flags and runs."""
    path = source / "sweep.json" if source.is_dir() else source
    try:
        found = json.loads(path.read_text())
        if "runs" not in found and "jobs" in found:
            raise UserError(f"the sweep in {source} has not ended; python -m common.sweep --out {source} --report says what it has so far")
        return {"script": found["script"], "flags": list(found["flags"]), "runs": list(found["runs"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source} is neither a sweep's folder nor a file that this command wrote: {error}") from error


def merge(sources: list[dict]) -> dict:
    """Sources of one script and the same flags, the later before the earlier. Folders, which were of another disk, are left out."""
    kinds = {(source["script"], tuple(source["flags"])) for source in sources}
    if len(kinds) > 1:
        raise UserError("the sweeps differ in script or flags: " + "; ".join(" ".join((script, *flags)) for script, flags in sorted(kinds)))
    runs = {(run["task"], run["seed"]): run for source in sources for run in source["runs"] if run["state"] in ("done", "failed")}
    kept = [{k: v for k, v in run.items() if k not in ("folder", "corpus")} for run in runs.values()]
    return {**sources[0], "runs": kept}


def in_order(runs: list[dict], tasks: list[str]) -> list[dict]:
    """The runs of `tasks`, in their order, by seed."""
    return sorted((run for run in runs if run["task"] in tasks), key=lambda run: (tasks.index(run["task"]), run["seed"]))


def verdict(runs: list[dict], tasks: list[str]) -> str:
    """Tasks at 90 % or more, the mean over tasks, what RL adds to weak clones, and what is missing. A failed run counts as 0 %."""
    of = {task: [run for run in runs if run["task"] == task] for task in tasks}
    success = {task: float(np.mean([run["reinforce"] or 0.0 for run in mine])) for task, mine in of.items() if mine}
    if not success:
        return f"none of {len(tasks)} tasks has a run"
    low, high = interval(list(success.values()))
    lines = [f"{sum(rate >= 0.9 for rate in success.values())} of {len(success)} tasks at 90 % or better"]
    lines.append(f"mean {np.mean(list(success.values())):.1%} ({low:.1%} to {high:.1%})")
    known = [run for run in runs if run["learn"] is not None and run["learn"] < 0.8 and run["reinforce"] is not None]
    if known:
        lines.append(f"{len(known)} clones under 80 %, of which RL makes {np.mean([r['reinforce'] - r['learn'] for r in known]):+.1%}")
    missing = len(tasks) - len(success)
    return "; ".join(lines) + (f"; {missing} of {len(tasks)} tasks have no run yet" if missing else "")


def name(task: str) -> str:
    """A task as in a table: its suite, its number there, and its name with blanks, which can be wrapped."""
    return f"{number(task)} {task.partition('/')[2].replace('_', ' ')}"


def write_section(page: Path, title: str, text: str) -> None:
    """Put `text` into a Markdown page under the heading `title`, in the place of what stood there, or at the end."""
    before, found, rest = (page.read_text() if page.exists() else "").partition(f"## {title}\n")
    _, heading, after = rest.partition("\n## ")
    with atomic_path(page) as temporary:
        temporary.write_text(f"{before if found else before.rstrip() + 2 * chr(10)}## {title}\n\n{text.strip()}\n{heading}{after}".lstrip())


def main() -> None:
    args = tyro.cli(Args)
    found = merge([read(source) for source in args.sources])
    tasks = expand(args.tasks)
    found["runs"] = in_order(found["runs"], tasks)
    done = [run for run in found["runs"] if run["state"] == "done"]
    command = " ".join(["python", found["script"], *found["flags"]])
    rows = [run | {"task": name(run["task"])} for run in found["runs"]]
    parts = [f"{verdict(found['runs'], tasks)}.\n", suites_table(rows), tasks_table(rows)]
    parts += [f"Failed: {run['task']}, seed {run['seed']}: {run['outcome']}.\n" for run in rows if run["state"] == "failed"]
    text = "\n".join([*parts, "Revisions: " + ", ".join(sorted({run["versions"].get("revision", "unknown") for run in done})) + "."])
    if args.page:
        write_section(args.page, f"`{command}`", text)
    print(f"`{command}`\n\n{text}")
    if args.json:
        write_json(args.json, found)
    if args.figure and done:
        plots.plot_sweep(args.figure, done, command)


if __name__ == "__main__":
    run_command(main)
