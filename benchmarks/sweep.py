"""What a sweep adds to its runs, and how busy it keeps the cores (docs/sweep.md).

    python -m benchmarks.sweep --runs 8 --seconds 60

Each run is a stand-in for a script, which computes for so many seconds of one core. They are run by a plain pool of processes, and then by
`python -m common.sweep`. On a machine that does other work, too, compare CPU time, not wall time.
"""

from __future__ import annotations

import dataclasses
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tyro

from common.cli import Count, Positive, UserError, check_ranges, run_command, usable_cores
from common.suites import expand

SCRIPT = """
import dataclasses, sys, time
from pathlib import Path

@dataclasses.dataclass
class Args:
    task: str = ""
    seed: int = 1
    seconds: float = 1.0
    torch_threads: int = 1

if __name__ == "__main__":
    words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    run = Path(words["--run-folder"]) / "run"
    run.mkdir(parents=True)
    for name in ("config.json", "checkpoint.pt"):
        (run / name).write_text("{}")
    while time.process_time() < float(words["--seconds"]):
        sum(range(10_000))
    (run / "summary.json").write_text("{}")
"""


@dataclasses.dataclass
class Args:
    """Compare a sweep with a plain pool of processes."""

    runs: Count = 8
    """how many runs"""
    seconds: Positive = 60.0
    """of one core, each"""


def measure(what) -> tuple[float, float]:
    """Wall and CPU seconds of `what()`, its child processes' alone."""

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    began, before = time.perf_counter(), cpu()
    what()
    return time.perf_counter() - began, cpu() - before


def main() -> None:
    args = tyro.cli(Args)
    check_ranges(args)
    tasks, cores = expand(["libero_90"])[: args.runs], usable_cores()
    with tempfile.TemporaryDirectory() as name:
        script, seconds = Path(name) / "burn.py", ["--seconds", str(args.seconds)]
        script.write_text(SCRIPT)

        def by_hand(number: int) -> None:
            subprocess.run([sys.executable, script, "--run-folder", Path(name) / "by-hand" / str(number), *seconds], check=True)

        def pool() -> None:
            with ThreadPoolExecutor(cores) as executor:
                list(executor.map(by_hand, range(args.runs)))

        def sweep() -> None:
            words = [
                sys.executable,
                "-m",
                "common.sweep",
                str(script),
                "--memory",
                "0.1",
                "--out",
                str(Path(name) / "out"),
                "--tasks",
                *tasks,
            ]
            if subprocess.run([*words, "--", *seconds, "--torch-threads", "1"], capture_output=True).returncode:
                raise UserError("the sweep failed")

        rows = {"plain pool": measure(pool), "sweep": measure(sweep)}
    for label, (wall, cpu) in rows.items():
        print(f"{label:10}  {wall:7.1f} s wall, {cpu:7.1f} s CPU, {cpu / wall / cores:4.0%} of {cores} cores")
    (wall, cpu), (wall_then, cpu_then) = rows["sweep"], rows["plain pool"]
    print(f"the sweep adds {wall / wall_then - 1:+.1%} wall, {cpu / cpu_then - 1:+.1%} CPU")


if __name__ == "__main__":
    run_command(main)
