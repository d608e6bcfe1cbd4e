"""The runs of a sweep: one child process each, started or resumed in a folder of its own, on this machine or on a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from common.cli import Lock, UserError, atomic_path, lock, remove_leftovers, usable_cores
from common.sweep.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
GRACE = 120.0  # seconds that a stopped run gets to end its iteration and save, before it is killed
NOTE = 10.0  # seconds between notes of how long a run has taken
# The child asks Linux for SIGTERM when its parent dies, however that dies, and becomes the script.
LAUNCH = """
import ctypes, os, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)
    if os.getppid() != int(parent):
        sys.exit(143)
os.execv(sys.executable, [sys.executable, *command])
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of a sweep: `script` with `flags` on a task with a seed."""

    script: str  # an absolute path, or relative to the repository
    flags: tuple[str, ...]
    task: str  # suite/name
    seed: int
    folder: Path  # the run's folder is in it, and log.txt, attempts.json and lock
    cores: int
    limit: float  # seconds, all attempts together
    gpu: str | None = None  # which, if the sweep shares them out (Ray does so itself)
    storage: str | None = None  # where the folder is copied to, and from

    @property
    def name(self) -> str:
        return f"{self.task} seed {self.seed}"

    @property
    def run(self) -> Path | None:
        """The script's run folder, once there is something to resume."""
        found = [path.parent for path in sorted(self.folder.glob("*/checkpoint.pt"))]
        return next((path for path in found if (path / "config.json").exists()), None)

    @property
    def done(self) -> bool:
        return self.run is not None and (self.run / "summary.json").exists()

    @property
    def running(self) -> bool:
        last = (self.attempts() or [{"outcome": "none yet"}])[-1]
        return last["outcome"] is None and abs(time.time() - last["end"]) < 6 * NOTE

    def attempts(self) -> list[dict]:
        """Each `start` and `end` (Unix time; the end of a running or killed one is a few seconds old), `host`, and `outcome`: "done",
        "stopped", what went wrong, or None."""
        try:
            return json.loads((self.folder / "attempts.json").read_text())
        except (OSError, ValueError):
            return []

    @property
    def seconds(self) -> float:
        return sum(a["end"] - a["start"] for a in self.attempts())

    def last_line(self, since: int = 0) -> str:
        """The last line that the run wrote after `since` bytes of its log."""
        try:
            with open(self.folder / "log.txt", "rb") as log:
                log.seek(max(since, log.seek(0, os.SEEK_END) - 8192))
                lines = log.read().decode(errors="replace").split("\n")
        except OSError:
            return ""
        return next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")


def attempt(job: Job, stop: threading.Event | None = None) -> str:
    """Start the run, or go on with it, until it ends, `stop` is set, or its time is up. Returns how it ended, as `Job.attempts`.

    With a storage it goes on with what is stored, and is copied there whenever it has saved, and in the end.
    OSError if the disk is full: the run isn't to blame.
    """
    if job.storage is None:
        return _attempt(job, stop)
    storage, name, over = Storage(job.storage), job.folder.name, threading.Event()
    storage.pull(name, job.folder)
    if job.run is None:
        storage.clear(name)

    def copy() -> None:
        while not over.wait(NOTE):
            with contextlib.suppress(Exception):  # a store that can't be reached for a while; the last copy isn't made here
                storage.push(name, job.folder)

    copies = threading.Thread(target=copy)
    copies.start()
    try:
        return _attempt(job, stop)
    finally:
        over.set()
        copies.join()
        storage.push(name, job.folder)


def _attempt(job: Job, stop: threading.Event | None) -> str:
    stop = stop or threading.Event()
    job.folder.mkdir(parents=True, exist_ok=True)
    if (held := _wait_for_lock(job.folder / "lock", stop)) is None:
        return "stopped"
    with held:
        if job.done:  # by another process, while this one waited
            return "done"
        remove_leftovers(job.folder)
        earlier, log_path = job.attempts(), job.folder / "log.txt"
        spent = job.seconds
        if spent >= job.limit:
            return f"time limit of {job.limit / 60:g} min"
        if (run := job.run) is None:  # what a kill left before the first checkpoint is of no use
            for path in (p for p in job.folder.iterdir() if p.is_dir()):
                shutil.rmtree(path)
            told = ["--task", job.task, "--seed", str(job.seed), "--run-folder", str(job.folder), *job.flags]
        else:
            told = ["--resume", str(run)]
        now = {"start": time.time(), "end": time.time(), "host": socket.gethostname(), "outcome": None}
        clock = time.monotonic()  # the other one may be set

        def note(outcome: str | None = None) -> None:
            now.update(end=now["start"] + time.monotonic() - clock, outcome=outcome)
            with atomic_path(job.folder / "attempts.json") as temporary:
                temporary.write_text(json.dumps([*earlier, now], indent=2) + "\n")

        note()
        began = log_path.stat().st_size if log_path.exists() else 0
        cores = {"RL_DATA_ENGINE_CORES": str(job.cores), "OMP_NUM_THREADS": str(job.cores)}
        gpu = {} if job.gpu is None else {"CUDA_VISIBLE_DEVICES": job.gpu}
        with open(log_path, "ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(os.getpid()), str(ROOT / job.script), *told],
                **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "env": os.environ | cores | gpu},
                start_new_session=True,  # Ctrl-C is for the sweep, which lets the run save
                pass_fds=[held.fileno()],  # locked as long as the run lives, even if this process dies
            )
        reason = None
        try:
            while child.poll() is None and reason is None:
                if stop.is_set():
                    reason = "stopped"
                elif time.monotonic() - clock + spent > job.limit:
                    reason = f"time limit of {job.limit / 60:g} min"
                elif time.monotonic() - clock > now["end"] - now["start"] + NOTE:
                    note()
                else:
                    _wait(child, 0.2)
        finally:
            _end(child)
        last = job.last_line(began)
        if child.returncode == 0:
            reason = "done" if job.done else "ended without a summary.json"
        elif reason is None and any(os.strerror(code) in last for code in (errno.ENOSPC, errno.EDQUOT)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(job.folder))
        elif reason is None and child.returncode < 0:
            reason = f"killed by signal {-child.returncode} (9: out of memory?), after: {last}"
        note(reason or last.removeprefix("error: ") or f"exit code {child.returncode}")
        return now["outcome"]


def _wait_for_lock(path: Path, stop: threading.Event) -> Lock | None:
    """The locked file; None if `stop` is set. It may be held by the child of a sweep that was killed: that child is told so, and saves."""
    while True:
        try:
            if (held := lock(path)) is not None:
                return held
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            return open(path, "a")  # a file system without locks
        if stop.wait(0.2):
            return None


def _wait(child: subprocess.Popen, seconds: float) -> bool:
    """Whether the child has ended, in at most so many seconds."""
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(child: subprocess.Popen) -> None:
    """Have a run save and end."""
    if child.poll() is None:
        child.terminate()
        if not _wait(child, GRACE):
            child.kill()
            child.wait()


# ---------------------------------------------------------------------------------------------- where runs are carried


class Machine:
    """This machine: one run a GPU, or as many as cores and memory carry."""

    def __init__(self, cores: int | None, memory: float, use_gpus: bool):
        gpus = _gpus() if use_gpus else []
        usable = usable_cores()
        self.cores = cores or (max(1, usable // len(gpus)) if gpus else 1)
        self.workers = len(gpus) or max(1, min(usable // self.cores, int(_available_memory() / memory)))
        self.slots: queue.SimpleQueue = queue.SimpleQueue()
        for slot in gpus or [None] * self.workers:
            self.slots.put(slot)
        self.pool, self.stopping = ThreadPoolExecutor(self.workers), threading.Event()

    def submit(self, job: Job) -> Future:
        return self.pool.submit(self._attempt, job)

    def _attempt(self, job: Job) -> str:
        gpu = self.slots.get()
        try:
            return attempt(job if gpu is None else dataclasses.replace(job, gpu=gpu), self.stopping)
        finally:
            self.slots.put(gpu)

    def check(self, jobs: Collection[Job]) -> None:
        """UserError if it has gone."""

    def fetch(self, job: Job) -> None:
        """Have in the run's folder what there is of it elsewhere."""
        if job.storage:
            Storage(job.storage).pull(job.folder.name, job.folder)

    def stop(self) -> None:
        """Have all runs save and end."""
        self.stopping.set()
        self.pool.shutdown(cancel_futures=True)


def _gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible and torch.cuda.is_available() else [str(i) for i in range(torch.cuda.device_count())]


def _available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """GB that are free on this machine, or of what its container may take; inf where Linux says neither."""
    free = math.inf
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) / 1e6
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        free = min(free, (int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text())) / 1e9)
    return free


class Cluster:
    """A Ray cluster: Ray places the runs by the cores, memory and GPUs that each takes, and starts those of a dead node on another.

    The sweep's folder must be the same one on all nodes; or there is a storage, and nodes work in folders of their own. This repository's
    code is sent along; the packages must be there.
    """

    def __init__(self, address: str, cores: int | None, memory: float, use_gpus: bool):
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what can be mended is said in one line, and the rest is in Ray's logs
        try:
            import ray
        except ImportError as error:
            raise UserError("--address needs Ray; run: pip install ray (without --address, this machine works)") from error
        self.ray, self.cores, self.refs = ray, cores or 1, []
        code = {"working_dir": str(ROOT), "excludes": [".git", "/docs", "/runs", "/site", "/.venv"]}
        try:
            if address != "auto":
                _reach(address)  # Ray itself would try for minutes
            ray.init(address, runtime_env=code, log_to_driver=False, logging_level="ERROR")
            resources = ray.cluster_resources()
        except Exception as error:  # of many kinds, by what is wrong
            raise UserError(f"no Ray cluster answers at {address} ({type(error).__name__}); start one: ray start --head") from error
        needs = {"num_cpus": self.cores, "memory": memory * 1e9, "num_gpus": int(use_gpus and resources.get("GPU", 0) > 0)}
        share = [resources.get(name, 0) / need for name, need in zip(("CPU", "memory", "GPU"), needs.values(), strict=True) if need]
        if (workers := int(min(share))) < 1:
            raise UserError(f"a run needs {needs}, and the Ray cluster at {address} has {resources}; give less --cores or --memory")
        self.workers, self.gone, self.fetched = workers, False, 0.0
        self.head = address if address.startswith("ray://") else ray.get_runtime_context().gcs_address
        self.attempt = ray.remote(**needs, max_retries=-1)(attempt)  # retried if its node dies, and only then

    def submit(self, job: Job) -> Future:
        if job.storage:  # whoever works there finds it again
            place = Path(tempfile.gettempdir()) / f"sweep-{hashlib.sha256(job.storage.encode()).hexdigest()[:10]}"
            job = dataclasses.replace(job, folder=place / job.folder.name)
        self.refs.append(self.attempt.remote(job))
        return self.refs[-1].future()

    def fetch(self, job: Job) -> None:
        """Have in the run's folder what there is of it elsewhere."""
        if job.storage and not job.done:
            Storage(job.storage).pull(job.folder.name, job.folder, force=True)

    def check(self, jobs: Collection[Job]) -> None:
        """UserError if the head is gone. Ray would wait a minute for it, and then end this process in its own words.

        Of runs with a storage, what they say is copied here.
        """
        if time.monotonic() - self.fetched > 6 * NOTE:
            self.fetched = time.monotonic()
            for job in jobs:
                if job.storage:
                    Storage(job.storage).pull(job.folder.name, job.folder, only=["log.txt", "attempts.json"], force=True)
        try:
            _reach(self.head)
        except OSError as error:
            self.gone = True
            raise UserError(f"the head of the Ray cluster is gone ({error.strerror or error}); its runs save and end") from error

    def stop(self) -> None:
        """Have all runs save and end."""
        if self.gone:
            return
        for ref in self.refs:
            self.ray.cancel(ref)  # KeyboardInterrupt in `attempt`
        self.ray.wait(self.refs, num_returns=len(self.refs), timeout=GRACE)
        self.ray.shutdown()


def _reach(address: str) -> None:
    """OSError or ValueError if nothing answers at HOST:PORT or ray://HOST:PORT."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    socket.create_connection((host, int(port)), timeout=10).close()
