"""`python -m common.demos --task libero_goal/0 --episodes 50 --out DIR`: scripted demonstrations in LIBERO's HDF5 layout."""

from __future__ import annotations

import dataclasses
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import tyro
from tqdm import tqdm

from common.cli import Count, NotNegative, UserError, check_ranges, run_command, usable_cores
from common.demos.collection import make_file
from common.libero.env import share_cores
from common.suites import SUITES, expand, find_task


@dataclasses.dataclass
class Args:
    """Write scripted demonstrations in LIBERO's HDF5 layout, a file a task: OUT/<suite>/<task name>_demo.hdf5.

    Files that are there already, with as many demonstrations made in the same way, are left alone.
    """

    out: Path
    """folder to write to"""
    task: str | None = None
    """task: suite/index, suite/name, any part of a name that is unique, or a BDDL file of your own"""
    suite: str | None = None
    """all tasks of a suite instead"""
    episodes: Count = 50
    """successful episodes a task"""
    noise: NotNegative = 0.1
    """standard deviation of the action noise"""
    seed: int = 0
    num_envs: Count = 16
    workers: Count = usable_cores()
    """tasks of a suite worked on at a time, each in a process of its own"""
    assets: str | None = None
    """LIBERO's asset folder (default: $LIBERO_ASSETS, else LIBERO's own)"""


def main() -> None:
    args = tyro.cli(Args)
    if bool(args.task) == bool(args.suite):
        raise UserError("name either a --task or a --suite")
    if args.suite is not None and args.suite not in SUITES:
        raise UserError(f"unknown suite {args.suite!r}; suites are {', '.join(SUITES)}")
    check_ranges(args)
    tasks = [find_task(task_id) for task_id in ([args.task] if args.task else expand([args.suite]))]
    paths = {task.id: args.out / task.suite / f"{task.name}_demo.hdf5" for task in tasks}
    how = args.episodes, args.seed, args.noise, args.num_envs, args.assets
    if args.task:
        ((task_id, path),) = paths.items()
        print(*make_file(path, task_id, *how, progress=True), path, sep="\n")
        return
    failures, workers = [], min(args.workers, len(paths))
    with ProcessPoolExecutor(workers, get_context("spawn"), share_cores, (workers,)) as pool:
        futures = {pool.submit(make_file, path, task_id, *how, progress=False): task_id for task_id, path in paths.items()}
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
