"""`python -m common.demos --task libero_goal/0 --episodes 50 --out DIR`: scripted demonstrations in LIBERO's HDF5 layout."""

from __future__ import annotations

import dataclasses
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from common.cli import UserError, run_command, usable_cores
from common.data import read_episodes
from common.demos.collection import collect, write_demonstrations
from common.libero import load_task
from common.libero.env import share_cores
from common.suites import SUITES, resolve, task_names


@dataclasses.dataclass
class Args:
    """Write scripted demonstrations in LIBERO's HDF5 layout, a file a task: OUT/<suite>/<task name>_demo.hdf5.

    Files that are there already, with as many demonstrations made in the same way, are left alone.
    """

    out: Path
    """folder to write to"""
    task: str | None = None
    """task id: suite/index, suite/name, or any part of a name that is unique"""
    suite: str | None = None
    """all tasks of a suite instead"""
    episodes: int = 50
    """successful episodes a task"""
    noise: float = 0.1
    """standard deviation of the action noise"""
    seed: int = 0
    num_envs: int = 16
    workers: int = usable_cores()
    """tasks of a suite worked on at a time, each in a process of its own"""
    assets: str | None = None
    """LIBERO's asset folder (default: $LIBERO_ASSETS, else LIBERO's own)"""


def _demonstrate(task_id: str, path: Path, args: Args, progress: bool) -> list[str]:
    """Write the file of one task, unless it is there; returns a line for each strategy."""
    task = load_task(task_id, args.assets)
    made = {"noise": args.noise, "seed": args.seed}
    try:
        episodes = read_episodes(path, task)
    except (OSError, UserError):
        episodes = []
    if len(episodes) != args.episodes or any(e.attrs.get(k) != v for e in episodes for k, v in made.items()):
        episodes = collect(task, args.episodes, args.seed, args.noise, args.num_envs, replayable=True, progress=progress)
        write_demonstrations(path, task, episodes)
    lengths: dict[str, list[int]] = {}
    for e in episodes:
        lengths.setdefault(e.attrs["strategy"], []).append(e.length)
    return [f"{name}: {len(n)} episodes of {np.mean(n):.0f} steps" for name, n in lengths.items()]


def main() -> None:
    args = tyro.cli(Args)
    if bool(args.task) == bool(args.suite):
        raise UserError("name either a --task or a --suite")
    if args.suite is not None and args.suite not in SUITES:
        raise UserError(f"unknown suite {args.suite!r}; suites are {', '.join(SUITES)}")
    if args.episodes < 1 or args.num_envs < 1 or args.workers < 1 or args.noise < 0:
        raise UserError("--episodes, --num-envs and --workers must be at least 1, --noise at least 0")
    tasks = [resolve(args.task)] if args.task else [(args.suite, i) for i in range(len(task_names()[args.suite]))]
    paths = {f"{suite}/{i}": args.out / suite / f"{task_names()[suite][i]}_demo.hdf5" for suite, i in tasks}
    if args.task:
        ((task_id, path),) = paths.items()
        print(*_demonstrate(task_id, path, args, True), path, sep="\n")
        return
    failures, workers = [], min(args.workers, len(paths))
    with ProcessPoolExecutor(workers, get_context("spawn"), share_cores, (workers,)) as pool:
        futures = {pool.submit(_demonstrate, task_id, path, args, False): task_id for task_id, path in paths.items()}
        for future in tqdm(as_completed(futures), total=len(futures), desc=f"demonstrations of {args.suite}"):
            try:
                future.result()
            except UserError as error:
                failures.append(str(error))
                tqdm.write(f"{futures[future]}: {error}", file=sys.stderr)
    if failures:
        raise UserError(f"{len(failures)} of {len(paths)} tasks have no demonstrations: {'; '.join(failures)}")


if __name__ == "__main__":
    run_command(main)
