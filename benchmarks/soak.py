"""Does a process that runs for long stay as it is? Memory, open files and threads over a million environment steps, ten thousand resets and
a thousand batches of pictures, one after the other in this process.

    python -m benchmarks.soak --json docs/results/soak.json      # half an hour of a core
    python -m benchmarks.soak --steps 100000 --resets 2000 --batches 100

Of each kind of work the first tenth warms up (caches fill, pages are touched). From there on, files and threads must not change, and memory
must not grow by more than 16 MB: a leak of 20 bytes a step would show.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from common.cli import Count, UserError, check_ranges, run_command
from common.libero import load_task, make_env
from common.libero.make import choose_physics
from common.libero.renderers import make_renderer
from common.runs import Progress, versions, write_json

GROWTH = 16.0  # MB


@dataclasses.dataclass
class Args:
    """Measure what long work leaves in a process."""

    task: str = "libero_90/9"
    """a LIBERO task"""
    steps: Count = 1_000_000
    """environment steps, of all environments together"""
    resets: Count = 10_000
    """episodes begun"""
    batches: Count = 1_000
    """batches of as many pictures as there are environments"""
    num_envs: Count = 16
    """parallel environments"""
    physics: Literal["auto", "exact", "sleep", "coarse"] = "auto"
    """of steps and resets; auto: training's"""
    image_size: Count = 128
    """pixels of a picture's side"""
    json: Path | None = None
    """write the numbers here"""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: $LIBERO_ASSETS, else LIBERO's own, else stand-ins)"""


def usage() -> dict[str, float]:
    """What this process has: resident memory (MB), open files, threads."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    here = Path("/proc/self")
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "files": len(os.listdir(here / "fd")),
        "threads": len(os.listdir(here / "task")),
    }


def soak(name: str, total: int, work: Callable[[int], int], progress: Progress) -> list[dict]:
    """`work(done)` until it has done `total`, which it returns how much of it did: `usage` at each twentieth."""
    rows, done = [], 0
    progress.stage(name, total)
    while done < total:
        amount = work(done)
        done += amount
        progress.update(amount)
        if done * 20 // total > len(rows):
            rows.append({"done": done, **usage()})
    return rows


def growth(rows: list[dict]) -> dict[str, float]:
    """How much more of each there is at the end than after the first tenth; memory by medians over a fifth of the rows at either end."""
    rows = rows[1:]
    fifth = max(1, len(rows) // 5)
    memory = [float(np.median([row["memory"] for row in part])) for part in (rows[:fifth], rows[-fifth:])]
    return {"memory": memory[1] - memory[0]} | {name: rows[-1][name] - rows[0][name] for name in ("files", "threads")}


def leaks(found: dict[str, list[dict]]) -> list[str]:
    """What is not flat."""
    wrong = []
    for name, rows in found.items():
        more = growth(rows)
        if more["memory"] > GROWTH or more["files"] > 0 or more["threads"] > 0:
            wrong.append(f"{name}: {more['memory']:+.1f} MB, {more['files']:+d} files, {more['threads']:+d} threads")
    return wrong


def report(found: dict[str, list[dict]]) -> str:
    lines = ["| | done | memory, MB: after a tenth | at the end | files | threads |", "|---|---|---|---|---|---|"]
    for name, rows in found.items():
        first, last = rows[1], rows[-1]
        pairs = [f"{first[key]}, {last[key]}" for key in ("files", "threads")]
        lines.append(f"| {name} | {last['done']:,} | {first['memory']:.1f} | {last['memory']:.1f} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def measure(args: Args, progress: Progress) -> dict[str, list[dict]]:
    task = load_task(args.task, args.assets)
    rng, found = np.random.default_rng(0), {}
    env = make_env(task, args.num_envs, seed=0, physics=args.physics)
    env.reset(seed=0)

    def step(done: int) -> int:
        env.step(np.clip(rng.normal(size=(args.num_envs, 7)), -1, 1))  # episodes end, and others begin
        return args.num_envs

    def reset(done: int) -> int:
        official = {} if done // args.num_envs % 2 else {"options": {"init_state": rng.integers(0, 50, args.num_envs)}}
        env.reset(**official)
        return args.num_envs

    found["steps"] = soak("steps", args.steps, step, progress)
    found["resets"] = soak("resets", args.resets, reset, progress)
    env.close()
    renderer = make_renderer(task.model, ("agentview",), args.image_size, args.image_size)

    def pictures(done: int) -> int:
        renderer.render(task.train_states[rng.integers(0, len(task.train_states), args.num_envs), 1 : 1 + task.model.nq])
        return 1

    found["pictures"] = soak("pictures", args.batches, pictures, progress)
    progress.close()
    return found


def main() -> None:
    args = tyro.cli(Args)
    check_ranges(args)
    if min(args.steps, args.resets) < 40 * args.num_envs or args.batches < 40:
        raise UserError("too little to tell: at least 40 batches, and 40 steps and resets of each environment")
    found = measure(args, Progress())
    if args.json is not None:
        write_json(args.json, {"task": args.task, "physics": choose_physics(args.physics, "cpu"), "versions": versions(), "rows": found})
    print(report(found))
    if wrong := leaks(found):
        raise UserError(f"not flat: {'; '.join(wrong)}")


if __name__ == "__main__":
    run_command(main)
