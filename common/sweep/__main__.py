"""`python -m common.sweep SCRIPT --tasks libero_90 -- FLAGS`: a script on many tasks and seeds, on one machine or on a Ray cluster.

Stopped at any time, in whatever way, the same command goes on. docs/sweep.md says what comes out.
"""

from __future__ import annotations

if __name__ == "__main__":
    import common.start  # noqa: F401  (Ctrl-C amid the imports below is one line)

import collections
import dataclasses
import errno
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Annotated

import tyro

from common.cli import Count, Positive, PositiveOrInf, Range, UserError, check_ranges, lock, remove_leftovers, run_command
from common.runs import Progress, write_json
from common.suites import SUITES, expand, max_steps
from common.sweep import report
from common.sweep.jobs import ROOT, Cluster, Job, Machine

STAMP = re.compile(r"^\[ *\d+ s\] ")  # what `Progress` begins a line with
OURS = ("--task", "--seed", "--run-folder", "--resume")  # flags that the sweep gives
CHECK = "import importlib, sys, tyro; from common.cli import run_command; run_command(lambda: "
CHECK += "tyro.cli(importlib.import_module(sys.argv[1]).Args, prog=sys.argv[1], args=sys.argv[2:]))"


@dataclasses.dataclass
class Args:
    """Run SCRIPT with FLAGS (after --) on each of many tasks, as many runs at once as the machine carries."""

    script: tyro.conf.Positional[str] = ""
    """gaussian_ppo.py, dlr_discover.py, diffusion_ppo.py, or another script with their flags and files"""
    tasks: list[str] = dataclasses.field(default_factory=list)
    """suites and tasks (suite/index, suite/name, any part of a name that is unique; default: those of the sweep in --out)"""
    seeds: list[Annotated[int, Range(0)]] = dataclasses.field(default_factory=lambda: [1])
    """each task is run with each seed"""
    out: Path | None = None
    """the sweep's folder (default: runs/sweep-SCRIPT); with --address and no --storage, one that all nodes share"""
    report: bool = False
    """run nothing: sum up what is there"""
    time_limit: PositiveOrInf = math.inf
    """minutes that a run may take, all its attempts together"""
    cores: Count | None = None
    """CPU cores of a run (default: 1, or this machine's shared out among its GPUs)"""
    memory: Positive = 2.0
    """GB of memory that a run takes"""
    storage: str | None = None
    """where runs are copied to as they go on, and fetched from: s3://BUCKET/SWEEP, gs://..., or a folder, whatever fsspec knows"""
    address: str | None = None
    """a Ray cluster: auto (the one that this machine belongs to), HOST:PORT or ray://HOST:PORT (default: this machine alone)"""


def make_jobs(args: Args, settings: dict, out: Path, cores: int) -> list[Job]:
    """The sweep's runs, the longest first, by the time that their task took with other seeds, else by its step cap."""
    flags = list(settings["flags"])
    if "--torch-threads" not in [flag.replace("_", "-").split("=")[0] for flag in flags]:
        flags += ["--torch-threads", str(cores)]
    jobs = []
    for task, seed in settings["jobs"]:
        folder = out.resolve() / "runs" / f"{task.replace('/', '-')}__{seed}"
        jobs.append(Job(settings["script"], tuple(flags), task, seed, folder, cores, args.time_limit * 60, storage=args.storage))
    expected = estimate(jobs)
    return sorted(jobs, key=lambda job: -expected(job))


def estimate(jobs: list[Job]):
    """A function that tells how many seconds a whole run takes, by those that are done; before any is, by its suite's step cap."""
    took, caps = collections.defaultdict(list), {job: float(max_steps(job.task.split("/")[0])) for job in jobs}
    for job in jobs:
        if job.done:
            took[job.task].append(job.seconds)
    known = [job for job in jobs if job.task in took]
    rate = sum(sum(took[job.task]) / len(took[job.task]) for job in known) / sum(caps[job] for job in known) if known else 1.0
    return lambda job: sum(took[job.task]) / len(took[job.task]) if job.task in took else caps[job] * rate


def settle(args: Args, flags: list[str], out: Path) -> dict:
    """What the sweep in `out` is of: script, flags, and (task, seed) jobs, those of earlier starts included. UserError: it is of others."""
    then = report.read(out)
    tasks = expand(args.tasks)
    if not then and (not args.script or not tasks):
        known = f"--tasks with suites ({', '.join(SUITES)}) or tasks" if args.script else "a script"
        raise UserError(f"{out} holds no sweep to go on with; name {known}")
    script = Path(args.script).resolve() if args.script else ROOT / then["script"]
    if not script.is_file():
        raise UserError(f"{script} does not exist; name a script, for example gaussian_ppo.py")
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else str(script)
    if wrong := [flag for flag in flags if flag.replace("_", "-").split("=")[0] in OURS]:
        raise UserError(f"{wrong[0]} after -- is the sweep's to give: use its own --tasks, --seeds and --out")
    if then and args.script and (then["script"], then["flags"]) != (name, flags):
        raise UserError(
            f"{out} is a sweep of {' '.join([then['script'], *then['flags']])}, not of {' '.join([name, *flags])}; choose another --out"
        )
    jobs = [tuple(job) for job in then.get("jobs", [])]
    tasks = tasks or list(dict.fromkeys(task for task, _ in jobs))
    jobs = list(dict.fromkeys([*jobs, *((task, seed) for seed in args.seeds for task in tasks)]))
    return {**then, "script": name, "flags": then["flags"] if then and not args.script else flags, "jobs": jobs}


def check_flags(settings: dict) -> None:
    """End with the script's own message if it doesn't take the flags."""
    task, seed = settings["jobs"][0]
    script = ROOT / settings["script"]
    words = [sys.executable, "-c", CHECK, script.stem, "--task", task, "--seed", str(seed), *settings["flags"]]
    path = os.pathsep.join([str(script.parent), str(ROOT)])
    result = subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    if result.returncode != 0:
        sys.stderr.write(result.stderr or result.stdout)
        sys.exit(2)


class View:
    """What is going on: a few lines that are drawn over in a terminal, else a line a minute; and a line for each run that ends."""

    def __init__(self, jobs: list[Job], workers: int):
        self.jobs, self.workers, self.progress, self.drawn, self.last = jobs, workers, Progress(), 0, time.monotonic()
        self.failed: dict[Job, str] = {}
        self.done = {job for job in jobs if job.done}
        self.expected = estimate(jobs)

    def end(self, job: Job, outcome: str) -> None:
        """A run is done, or has failed for good."""
        if outcome == "done":
            self.done.add(job)
            self.expected = estimate(self.jobs)
            self.say(f"{job.name}: done in {job.seconds / 60:.1f} min, {report.line(job)}")
        else:
            self.failed[job] = outcome
            self.say(f"{job.name}: failed: {outcome}")

    def say(self, line: str) -> None:
        self._clear()
        self.progress.say(line)
        if self.progress.terminal:  # draw again what was cleared
            self.last = -math.inf

    def update(self, pending: list[Job]) -> None:
        interval = 2.0 if self.progress.terminal else 60.0
        if time.monotonic() - self.last < interval:
            return
        self.last = time.monotonic()
        running = [job for job in pending if job.running]
        left = sum(max(self.expected(job) - job.seconds, 0.1 * self.expected(job)) for job in pending) / self.workers
        when = f", about {left / 3600:.1f} h left" if left > 3600 else f", about {left / 60:.0f} min left"
        when = when if self.done else ""  # by what they took
        lines = [f"{len(self.done)} of {len(self.jobs)} done, {len(running)} running, {len(self.failed)} failed{when}"]
        lines += [f"  {job.name}: {STAMP.sub('', job.last_line())}" for job in running]
        if not self.progress.terminal:
            return self.progress.say("\n".join(lines))
        self._clear()
        size = shutil.get_terminal_size()
        lines = [line[: size.columns - 1] for line in lines[: size.lines - 1]]
        sys.stderr.write("".join(line + "\n" for line in lines))
        sys.stderr.flush()
        self.drawn = len(lines)

    def _clear(self) -> None:
        if self.drawn:
            sys.stderr.write(f"\033[{self.drawn}A\033[J")
            self.drawn = 0


def run_all(jobs: list[Job], where: Machine | Cluster, out: Path) -> View:
    """Run what isn't done, and once more what fails."""
    view, failures = View(jobs, where.workers), collections.Counter()
    todo = [job for job in jobs if job not in view.done]
    free = shutil.disk_usage(out).free / 1e9
    sizes = [sum(p.stat().st_size for p in job.folder.rglob("*") if p.is_file()) / 1e9 for job in view.done]
    need = f" of about {sum(sizes) / len(sizes) * len(todo):.2g} GB that they take" if sizes else ""
    view.say(f"{len(todo)} of {len(jobs)} runs to do, {min(where.workers, len(todo))} at once; {free:.0f} GB are free in {out}{need}")
    try:
        futures = {where.submit(job): job for job in todo}
        while futures:
            ended, _ = wait(futures, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in ended:
                job, outcome = futures.pop(future), future.result()
                where.fetch(job)
                if outcome == "done" or failures[job] or outcome.startswith("time limit"):
                    view.end(job, outcome)
                else:
                    failures[job] += 1
                    view.say(f"{job.name}: failed, and will be tried once more: {outcome}")
                    futures[where.submit(job)] = job
            view.update(list(futures.values()))
            where.check(futures.values())
    except BaseException as error:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: os._exit(130))
        view.say("stopping: each run ends its iteration and saves; a second Ctrl-C doesn't wait for them")
        where.stop()
        done = f"{len(view.done)} of {len(jobs)} runs are done; the same command goes on"
        if isinstance(error, (KeyboardInterrupt, SystemExit, UserError)):
            view.say(done)
            raise
        error = getattr(error, "cause", None) or error  # Ray wraps what a run raises
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{out} is on a full disk: {done} when there is space") from error
        raise
    where.stop()
    return view


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = tyro.cli(Args, args=sys.argv[1:split], prog="python -m common.sweep")
    check_ranges(args)
    flags = sys.argv[split + 1 :]
    if not args.script and args.out is None:
        raise UserError("name a script and its --tasks, or with --out the sweep to go on with")
    out = args.out or Path("runs") / f"sweep-{Path(args.script).stem}"
    settings = settle(args, flags, out)
    if args.report:
        jobs = make_jobs(args, settings, out, args.cores or 1)
        print(report.write(out, settings, jobs))
        return
    check_flags(settings)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (held := lock(out / "lock")) is None:
            raise UserError(f"another sweep is working on {out}; wait for it, or stop it")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with held:
        remove_leftovers(out, deep=False)  # runs of a sweep that was killed may still be saving
        use_gpus = "cpu" not in [b for a, b in zip(flags, flags[1:], strict=False) if a == "--device"] and "--device=cpu" not in flags
        kind = (args.cores, args.memory, use_gpus)
        where = Cluster(args.address, *kind) if args.address else Machine(*kind)
        write_json(out / "sweep.json", settings)
        jobs = make_jobs(args, settings, out, where.cores)
        for job in jobs:
            where.fetch(job)
        view = run_all(jobs, where, out)
        print(report.write(out, settings, jobs))
    if view.failed:
        raise UserError(f"{len(view.failed)} of {len(jobs)} runs failed, see {out / 'table.md'}; the same command tries them again")


if __name__ == "__main__":
    run_command(main)
