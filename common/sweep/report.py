"""What a sweep's runs came to: sweep.json, table.md, figure.png, corpora.json and the data card README.md, all from the runs' folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import plots
from common.cli import UserError, atomic_path
from common.runs import versions, write_json
from common.suites import SUITES
from common.sweep.jobs import Job

FIELDS = ("learn", "reinforce", "worst_pattern", "patterns", "found", "p_leak", "distance")  # of finished runs
FIELDS += ("minutes_to_90", "env_steps", "corpus", "corpus_episodes", "corpus_bytes", "assets", "demos", "versions")
GOAL = 0.9  # the success that "to 90 %" is about
CARD = """# Trajectories of {script}, {tasks} tasks

{episodes:,} successful trajectories ({megabytes:,.0f} MB) on {tasks} tasks of LIBERO, from

    {command}

A policy learned each task from {demos} demonstrations and by reinforcement learning, and was then rolled out. There is no failed
episode among them. `corpora.json` lists the files, one a run; `table.md` and `sweep.json` say how each run went.

{suites}
## How they were made

- Script: {script}, code {revision}; {versions}.
- Assets: {assets}. Stand-ins (`standin:`) are this project's own; their numbers don't compare with published LIBERO.
- Seeds: {seeds}. Starts are LIBERO's own random placements, not its 50 official initial states: those were evaluated on.
- Success is of the deterministic policy from the official initial states, under exact physics.
- Diversity: each episode carries the number of its pattern (`pattern`). {distance}{leak}
{failures}
## How to load them

Each file is in LIBERO's HDF5 layout: `data/demo_N` with `actions` (T, 7), `states` (T, 1 + nq + nv), `obs/...`, `rewards`, `dones`.

    files = json.load(open("corpora.json"))

    from common.data import read_episodes                       # this project: actions, states, proprioception, pattern
    episodes = read_episodes(files[0])

    from robomimic.utils.dataset import SequenceDataset         # robomimic, and LIBERO's own get_dataset, which calls it
    SequenceDataset(hdf5_path=files[0], obs_keys=["ee_states", "gripper_states", "joint_states"],
                    dataset_keys=["actions", "rewards", "dones"])

Pictures can be rendered into the files later: `python -m common.libero.render FILE`.

## Licence

The trajectories are numbers that this project's code (MIT) made with LIBERO's tasks (MIT, Copyright (c) 2023 Lifelong Robot Learning);
no mesh or texture is in them. Pictures rendered from them show LIBERO's assets, whose packages say MIT, too.
"""


def read(out: Path) -> dict:
    """sweep.json, or {} if there is none. UserError if it isn't one."""
    try:
        found = json.loads((out / "sweep.json").read_text())
        return {**found, "jobs": [tuple(job) for job in found["jobs"]], "script": str(found["script"]), "flags": list(found["flags"])}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / 'sweep.json'} is damaged; remove it, and give --tasks and all flags again: the runs go on") from error


def row(job: Job) -> dict:
    """A run's line of sweep.json. Rates are in [0, 1]; None is what isn't known."""
    attempts = job.attempts()
    outcome = attempts[-1]["outcome"] if attempts else None
    state = "done" if job.done else "running" if job.running else "todo" if outcome in (None, "stopped", "done") else "failed"
    found = {"task": job.task, "suite": job.task.split("/")[0], "seed": job.seed, "state": state, "attempts": len(attempts)}
    found |= {"minutes": job.seconds / 60, "outcome": outcome, "folder": str(job.folder.relative_to(job.folder.parents[1]))}
    empty = dict.fromkeys(FIELDS)
    if state != "done":
        return found | empty
    summary = json.loads((job.run / "summary.json").read_text())
    rates = [pattern["success_rate"] for pattern in summary.get("per_pattern", [])]
    corpus = job.run / "corpus.hdf5"
    return found | {
        "learn": summary.get("stages", {}).get("learn"),
        "reinforce": summary.get("success_rate"),
        "worst_pattern": min(rates, default=None),
        "patterns": summary.get("alive", len(rates)),
        "found": summary.get("num_patterns", len(rates)),
        "p_leak": summary.get("leakage", {}).get("p_leak"),
        "distance": summary.get("diversity", {}).get("mean_pairwise_distance"),
        "minutes_to_90": minutes_to_goal(job, summary),
        "env_steps": summary.get("env_steps"),
        "corpus": str(corpus.relative_to(job.folder.parents[1])) if corpus.exists() else None,
        "corpus_episodes": summary.get("corpus_episodes"),
        "corpus_bytes": corpus.stat().st_size if corpus.exists() else None,
        "assets": summary.get("assets"),
        "demos": summary.get("demos"),
        "versions": summary.get("versions", {}),
    }


def minutes_to_goal(job: Job, summary: dict) -> float | None:
    """Minutes that the run took, demonstrations, compiling and evaluations included, until success was first seen to be 90 %: in the
    evaluation after Learn, in the mean of training's last 50 episodes (charts/success), or in the evaluation in the end. None: never.

    TensorBoard's events say when; time in which the run stood still between two attempts doesn't count.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(job.run), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    known = events.Tags()["scalars"]
    series = {name: events.Scalars(f"charts/{name}") if f"charts/{name}" in known else [] for name in ("success", "SPS")}
    times = [event.wall_time for event in series["success"] if event.value >= GOAL]
    if (summary.get("stages", {}).get("learn") or 0) >= GOAL and series["SPS"]:
        first = {name: events.Scalars(f"charts/{name}_seconds")[0].value for name in ("rollout", "update")}
        times.append(series["SPS"][0].wall_time - sum(first.values()))  # PPO began right after that evaluation
    if times:
        return sum(min(max(min(times) - a["start"], 0), a["end"] - a["start"]) for a in job.attempts()) / 60
    return job.seconds / 60 if (summary.get("success_rate") or 0) >= GOAL else None


def line(job: Job) -> str:
    """A finished run in a few words."""
    summary = json.loads((job.run / "summary.json").read_text())
    learn = summary.get("stages", {}).get("learn")
    return f"success {_percent(summary.get('success_rate'))}" + (f" (after Learn {_percent(learn)})" if learn is not None else "")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of a mean, over 10,000 draws of as many values."""
    values = np.asarray(values, float)
    means = values[np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))].mean(1)
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in cells)} |\n" for cells in lines)


def _suite_order(suite: str) -> tuple[int, str]:
    """LIBERO's suites in its order, then those of tasks of one's own."""
    return (SUITES.index(suite) if suite in SUITES else len(SUITES), suite)


def suites_table(rows: list[dict]) -> str:
    """Means over tasks, seeds averaged before, with the interval over tasks."""
    lines = []
    found = {row["suite"] for row in rows}
    for suite in sorted(found, key=_suite_order):
        mine = [row for row in rows if row["suite"] == suite]
        done = [row for row in mine if row["state"] == "done"]
        failed = sum(row["state"] == "failed" for row in mine)

        def means(name: str, rows: list[dict]) -> list[float]:
            tasks = dict.fromkeys(row["task"] for row in rows)
            values = [[row[name] for row in rows if row["task"] == task and row[name] is not None] for task in tasks]
            return [float(np.mean(v)) for v in values if v]

        cells = [suite, f"{len(done)} of {len(mine)}", failed]
        for name in ("learn", "reinforce"):
            values = means(name, done)
            within = " ({} to {})".format(*map(_percent, interval(values))) if len(values) > 1 else ""  # one task says nothing of others
            cells.append(_percent(np.mean(values)) + within if values else "")
        zero = [row if row["state"] == "done" else row | {"reinforce": 0.0} for row in mine if row["state"] in ("done", "failed")]
        cells.append(_percent(np.mean(means("reinforce", zero))) if zero else "")
        cells += [
            _number(np.mean(v), d) if (v := means(name, done)) else "" for name, d in (("patterns", 1), ("p_leak", 2), ("distance", 2))
        ]
        lines.append([*cells, _number(sum(row["minutes"] for row in mine) / 60, 1)])
    head = "suite, runs done, failed, after Learn, after Reinforce, failed as 0 %, patterns, p_leak, distance, hours"
    return _table(head.split(", "), lines)


def tasks_table(rows: list[dict]) -> str:
    lines = []
    for r in rows:
        after = _percent(r["reinforce"]) if r["state"] == "done" else r["state"]
        cells = [
            r["task"],
            r["seed"],
            _percent(r["learn"]),
            after,
            _percent(r["worst_pattern"]),
            f"{r['patterns']} of {r['found']}" if r.get("found", r["patterns"]) != r["patterns"] else r["patterns"] or "",
            _percent(r["p_leak"]),
        ]
        lines.append([*cells, _number(r["distance"]), _number(r["minutes"], 1), _number(r["minutes_to_90"], 1)])
    head = "task, seed, after Learn, after Reinforce, worst pattern, patterns, p_leak, distance, minutes, minutes to 90 %"
    return _table(head.split(", "), lines)


def card(settings: dict, rows: list[dict], command: str) -> str:
    """The data card: what the corpora are, how they came about, and how to read them."""
    done = [row for row in rows if row["corpus"]]
    failed = [row for row in rows if row["state"] == "failed"]
    distances = [row["distance"] for row in done if row["distance"] is not None]
    leaks = [row["p_leak"] for row in done if row["p_leak"] is not None]

    def all_of(values) -> str:
        return ", ".join(sorted({str(value) for value in values})) or "none"

    found = sorted({(name, number) for row in done for name, number in row["versions"].items() if name != "revision"})
    return CARD.format(
        script=settings["script"],
        command=command,
        tasks=len({row["task"] for row in done}),
        episodes=sum(row["corpus_episodes"] or 0 for row in done),
        megabytes=sum(row["corpus_bytes"] for row in done) / 1e6,
        demos=all_of("human" if str(row["demos"]) != "scripted" else "scripted" for row in done),
        revision=all_of(row["versions"].get("revision", "unknown") for row in done),
        versions=", ".join(f"{name} {number}" for name, number in found),
        assets=all_of(row["assets"] for row in done),
        seeds=all_of(row["seed"] for row in done),
        suites=suites_table(rows),
        distance=f"Trajectories of a run are {np.mean(distances):.2f} m from each other (mean pairwise L2).\n" if distances else "",
        leak=f"  p_leak, how often a trajectory is recognised as another pattern's, is {_percent(np.mean(leaks))}." if leaks else "",
        failures="".join(f"- No trajectories of {row['task']} (seed {row['seed']}): {row['outcome']}.\n" for row in failed),
    )


def write(out: Path, settings: dict, jobs: list[Job]) -> str:
    """Write the sweep's report into `out`; returns a summary for the terminal."""
    jobs = sorted(jobs, key=lambda job: (_suite_order(job.task.split("/")[0]), settings["jobs"].index((job.task, job.seed))))
    rows = [row(job) for job in jobs]
    settings = settings | {"revision": versions()["revision"]}
    command = " ".join(["python", settings["script"], *settings["flags"]])
    failed = [[r["task"], r["seed"], r["attempts"], r["outcome"]] for r in rows if r["state"] == "failed"]
    suites, failures = suites_table(rows), _table(["task", "seed", "attempts", "last line"], failed)
    note = "Means over tasks with 95 % bootstrap intervals. Minutes and hours are of all attempts."
    text = f"# `{command}`\n\n{suites}\n{note}\n\n{tasks_table(rows)}"
    _write(out / "table.md", text + (f"\n## Failed\n\n{failures}" if failed else ""))
    done = [r for r in rows if r["state"] == "done"]
    if done:
        plots.plot_sweep(out / "figure.png", done, command)
    write_json(out / "corpora.json", [r["corpus"] for r in done if r["corpus"]])
    _write(out / "README.md", card(settings, rows, command))
    write_json(out / "sweep.json", settings | {"runs": rows})
    return f"{suites}\n" + (f"{failures}\n" if failed else "") + f"see {out / 'table.md'}, {out / 'figure.png'} and {out / 'README.md'}"


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)
