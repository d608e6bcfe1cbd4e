"""What can go wrong with a machine, done to the five scripts and the sweep on purpose: does a run end in one line, and go on exactly?

Each trial is one tiny run that meets one fault, at a moment drawn at random, and is then continued without it to its end:

  kill, term, interrupt   SIGKILL; SIGTERM, as Slurm sends it; Ctrl-C twice (to the whole process group), 50 ms apart
  disk full, read-only    the run's folder is a small tmpfs, which from that moment on is full, or can't be written
  files, memory           from that moment on no file more can be opened; no more memory than there is in use, and 32 MB
  clock                   the clock is set back by an hour
  second process          another process is told to go on with the same run, while the first one works on it
  worker, truncated, changed   of the VLA scripts: a process that reads is killed; a corpus is cut in half, or has other numbers

Half of the moments are amid what a run writes: before a file is begun, amid it, before it is flushed, before it gets its name, and after.
The others are a share of the CPU time that an undisturbed run takes. A trial is sound if

  - the run ends with the code that the fault stands for (-9; 143, or -15 before it has begun; 130; 2, or 0 if the fault came too late or
    does not matter),
  - it says so in one line: no traceback; for code 2 the last line begins with "error: ",
  - every file that it leaves under its own name can be read whole,
  - continued (`--resume`; from the start if there was no checkpoint yet), it ends with the weights, the corpus and the success of a run
    that nothing has happened to, bit for bit, and nothing else lies in its folder.

    python -m benchmarks.faults --json docs/results/faults.json                  # an hour of a core; stopped, it goes on there
    python -m benchmarks.faults --scripts gaussian_ppo --faults kill --trials 2  # a minute

Runs, and those that a sweep starts, are forked off a process that has imported what they need: that takes longer than they do, and is the
same every time. Linux; full disks need root.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import json
import multiprocessing.util
import os
import pickle
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
import torch._dynamo  # which an optimizer imports, and which takes longer than all else
import tyro

from common.cli import Count, UserError, atomic_path, check_ranges, run_command
from common.runs import Progress, versions, write_json

SCRIPTS = ["dlr_discover", "gaussian_ppo", "diffusion_ppo", "vla_pretrain", "vla_finetune", "sweep"]
FAULTS = ["kill", "term", "interrupt", "disk full", "read-only", "files", "memory", "clock", "second process"]
FAULTS += ["worker", "truncated", "changed"]
VLA_ALONE = ("worker", "truncated", "changed")
CODES = {"kill": {-9}, "term": {143, -15}, "interrupt": {130}, "clock": {0}, "second process": {0}}  # the others: 2
TASK = "--task libero_goal/0"
RL = """--num-envs 4 --torch-threads 1 --learn-epochs 100 --hidden 64 --num-steps 16 --total-steps 384
    --num-minibatches 2 --update-epochs 2 --checkpoint-interval 1 --eval-episodes 1 --corpus-episodes 1 --no-videos"""
VLA = "--size tiny --chunk 4 --batch-size 4 --num-workers 1 --torch-threads 1 --checkpoint-interval 4 --eval-interval 4"
FLAGS = {
    "gaussian_ppo": f"{TASK} {RL} --actor-lr 1e-5 --critic-warmup 1",
    "dlr_discover": f"{TASK} {RL} --actor-lr 1e-5 --critic-warmup 1 --num-patterns 2 --discover-steps 60 --discover-points 16",
    "diffusion_ppo": f"{TASK} {RL} --actor-lr 1e-6 --critic-warmup 1",
    "vla_pretrain": f"{VLA} --steps 16 --warmup 1",
    "vla_finetune": f"{VLA} --epochs 0.06 --warmup 1 --trials 1 --num-envs 1 --videos 0 --replan 4",
    "sweep": f"gaussian_ppo.py --tasks libero_goal/0 --seeds 1 2 --cores 1 -- {RL} --actor-lr 1e-5 --critic-warmup 1",
}


@dataclasses.dataclass
class Args:
    """Do to runs what can go wrong with a machine."""

    scripts: list[str] = dataclasses.field(default_factory=lambda: list(SCRIPTS))
    """which of the five scripts, and sweep"""
    faults: list[str] = dataclasses.field(default_factory=lambda: list(FAULTS))
    """which faults"""
    trials: Count = 50
    """moments of each script, the faults in turn"""
    seed: int = 0
    """seed of the moments"""
    json: Path | None = None
    """write each trial's outcome here, and do not do again those that are there"""
    data: Path | None = None
    """a folder for what all runs learn from, which takes a minute to make: what is there is taken"""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: $LIBERO_ASSETS, else LIBERO's own, else stand-ins)"""


@dataclasses.dataclass
class Case:
    """A script to be disturbed: what runs it, with which flags (besides the folder), and its data, which may be damaged."""

    name: str
    main: Callable[[], None]
    flags: list[str]
    data: Path | None = None
    cpu: float = 0.0  # seconds, undisturbed
    writes: int = 0  # moments amid writing, undisturbed
    expected: str = ""  # `outcome`, undisturbed

    def command(self, folder: Path) -> list[str]:
        """What begins a run in `folder`, or goes on with the one there."""
        if self.name == "sweep":
            at = self.flags.index("--")
            return [*self.flags[:at], "--out", str(folder / "sweep"), *self.flags[at:]]
        if run := run_in(folder):
            return ["--resume", str(run)] + (["--data", str(self.data)] if self.data else [])
        return [*self.flags, "--run-folder", str(folder)] + (["--data", str(self.data)] if self.data else [])


def run_in(folder: Path) -> Path | None:
    """The run that can be continued."""
    return next((path.parent for path in sorted(folder.glob("*/checkpoint.pt"))), None)


# ---------------------------------------------------------------------------------------------- a run in a process of its own


class Moments:
    """In the run's process: calls `act` when the run writes for the `at`-th time; `at` None: only counts."""

    def __init__(self, at: int | None, act: Callable[[], None]):
        self.count, self.at, self.act = 0, at, act
        for owner, name in ((os, "open"), (os, "fsync"), (os, "replace"), (h5py.Group, "create_dataset")):
            setattr(owner, name, self._watched(getattr(owner, name), after=name == "replace"))
        Path.write_bytes = self._write_bytes()

    def _watched(self, function: Callable, after: bool) -> Callable:
        def watched(*args, **kwargs):
            self.pass_()
            result = function(*args, **kwargs)
            if after:
                self.pass_()
            return result

        return watched

    def _write_bytes(self) -> Callable:
        def write_bytes(path: Path, content: bytes) -> None:
            with open(path, "wb") as file:
                file.write(content[: len(content) // 2])
                file.flush()
                self.pass_()
                file.write(content[len(content) // 2 :])

        return write_bytes

    def pass_(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.count += 1
            if self.count == self.at:
                self.act()


def start(case: Case, command: list[str], log: Path, at: int | None = None, act: Callable[[], None] = lambda: None) -> int:
    """Fork a process that runs the script; its output goes to `log`, what it did besides to `log`.seen. Returns its id."""
    if pid := os.fork():
        return pid
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(number, target)
    moments = Moments(at, act)
    if case.name == "sweep":
        subprocess.Popen = forking(moments)

    def seen() -> None:
        with contextlib.suppress(OSError):
            modules = [name for name, module in list(sys.modules.items()) if getattr(module, "__spec__", None)]
            log.with_suffix(".seen").write_text(json.dumps({"writes": moments.count, "modules": modules}))

    be_a_process(lambda: run_command(case.main), [f"{case.name}.py", *command], seen)


def be_a_process(main: Callable[[], None], argv: list[str], ended: Callable[[], None] = lambda: None) -> None:
    """In a forked process: what an interpreter does around `main`, from signals to the exit code."""
    code = 1
    try:
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.unraisablehook = sys.__unraisablehook__  # not pytest's
        atexit._clear()
        atexit.register(multiprocessing.util._exit_function)
        sys.argv = argv
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
        finally:
            threading._shutdown()  # what ends an interpreter
            atexit._run_exitfuncs()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ended()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def forking(moments: Moments) -> type:
    """In a sweep's process: subprocess.Popen, but `python -c CODE ...` is a fork of this process instead of a new interpreter, and a script
    that CODE executes is run in it."""
    Popen = subprocess.Popen
    names = inspect.signature(Popen._execute_child)

    class Forking(Popen):
        def _execute_child(self, *values) -> None:
            told = names.bind(self, *values).arguments
            words = list(told["args"]) if not isinstance(told["args"], str) else []
            if words[:2] != [sys.executable, "-c"]:
                return super()._execute_child(*values)
            if pid := os.fork():
                self.pid, self._child_created = pid, True
                for name, ours in (("p2cread", "p2cwrite"), ("c2pwrite", "c2pread"), ("errwrite", "errread")):
                    if told[name] != -1 and told[name] != told[ours] and told[ours] != -1:
                        os.close(told[name])
                return
            moments.at = None
            try:
                if told["start_new_session"]:
                    os.setsid()
                for name, number in (("p2cread", 0), ("c2pwrite", 1), ("errwrite", 2)):
                    if told[name] != -1:
                        os.dup2(told[name], number)
                kept = {0, 1, 2, *told["pass_fds"]}
                for number in (int(name) for name in os.listdir("/proc/self/fd") if int(name) not in kept):
                    with contextlib.suppress(OSError):
                        os.close(number)
                os.environ.clear()
                os.environ.update(told["env"])
                sys.path[:0] = told["env"].get("PYTHONPATH", "").split(os.pathsep)
            except OSError:  # no file more can be opened: no interpreter would have started
                os._exit(1)

            def execute(_, command: list[str]) -> None:
                sys.argv = command[1:]
                runpy.run_path(command[1], run_name="__main__")

            os.execv = execute
            be_a_process(lambda: exec(words[2], {"__name__": "__main__"}), ["-c", *words[3:]])

    return Forking


def cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait(pid: int) -> tuple[int, float]:
    """Exit code, -9 for SIGKILL, and CPU seconds, of a process that ends; what it started ends with it."""
    _, status, usage = os.wait4(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


# ---------------------------------------------------------------------------------------------- what a run leaves


def digest(value) -> str:
    """Of a checkpoint's content: tensors by their bits."""
    if isinstance(value, torch.Tensor):
        value = (str(value.dtype), tuple(value.shape), hashlib.sha256(value.contiguous().cpu().numpy().tobytes()).hexdigest())
    elif isinstance(value, dict):
        value = [(key, digest(v)) for key, v in sorted(value.items(), key=lambda item: str(item[0]))]
    elif isinstance(value, (list, tuple)):
        value = [digest(v) for v in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()


def outcome(folder: Path) -> str:
    """A digest of what the finished runs under `folder` have learned and made: weights, corpora, success."""
    found = []
    for summary in sorted(folder.rglob("summary.json"), key=lambda path: path.parent.name.rpartition("__")[0]):
        run, row = summary.parent, json.loads(summary.read_text())
        weights = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        found.append({name: weights[name] for name in ("agent", "history", "model", "average", "step") if name in weights})
        found.append({name: row.get(name) for name in ("success_rate", "per_pattern", "env_steps", "validation", "success", "steps")})
        if (run / "corpus.hdf5").exists():
            with h5py.File(run / "corpus.hdf5") as file:
                found += [digest(torch.from_numpy(file[f"data/{d}/{x}"][()])) for d in sorted(file["data"]) for x in ("states", "actions")]
    return digest(found) if found else "nothing"


def damaged(folder: Path) -> list[str]:
    """Files under their own names that can't be read whole."""
    found = []
    for path in (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".pt":
                torch.load(path, map_location="cpu", weights_only=True)
            elif path.suffix == ".hdf5":
                with h5py.File(path) as file:
                    file.visititems(lambda _, item: item[()] if isinstance(item, h5py.Dataset) else None)
        except (OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            found.append(f"{path.name} is damaged: {error}")
    return found


def complaint(log: Path, code: int, codes: set[int]) -> str | None:
    """What is wrong with how a run ended."""
    text = log.read_text(errors="replace")
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    if "Traceback" in text or "Exception ignored" in text:
        return f"a traceback: {last}"
    if "cannot write None" in text:
        return "a file without a name"
    if code not in codes:
        return f"exit code {code}: {last}"
    return f"no line: {last}" if code == 2 and not last.startswith("error: ") else None


# ---------------------------------------------------------------------------------------------- faults


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int = 64):
    """A file system of its own at `folder`."""
    folder.mkdir(parents=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode:
        raise UserError(f"a full disk needs root, to mount a tmpfs: {made.stderr.strip()}; leave out 'disk full' and 'read-only'")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), open(folder / "filling", "wb", buffering=0) as file:
        for size in (2**20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)


def act(fault: str, folder: Path, case: Case) -> Callable[[], None]:
    """What the run's process does to itself at the moment."""
    me, group = os.getpid, os.getpgrp

    def interrupt() -> None:  # as a terminal does; the second one comes while the first is seen to
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(group(), signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        os.killpg(group(), signal.SIGINT)

    def memory() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, resource.RLIM_INFINITY))

    def clock() -> None:
        now = time.time
        time.time = lambda: now() - 3600

    def worker() -> None:
        for child in Path(f"/proc/{me()}/task/{me()}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)

    def change() -> None:
        code = "import h5py, sys\nwith h5py.File(sys.argv[1], 'r+', locking=False) as file:\n"
        code += "    for demo in file['data'].values():\n        demo['actions'][:, :6] *= 0.5"
        subprocess.run([sys.executable, "-c", code, str(case.data)], check=True)  # a process that reads a file may not write it

    return {
        "kill": lambda: os.kill(me(), signal.SIGKILL),
        "term": lambda: os.kill(me(), signal.SIGTERM),
        "interrupt": interrupt,
        "disk full": lambda: fill(folder),
        "read-only": lambda: subprocess.run(["mount", "-o", "remount,ro", str(folder)]),
        "files": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, 4096)),
        "memory": memory,
        "clock": clock,
        "second process": lambda: os.kill(me(), signal.SIGSTOP),
        "worker": worker,
        "truncated": lambda: os.truncate(case.data, case.data.stat().st_size // 2),
        "changed": change,
    }[fault]


def trial(case: Case, fault: str, folder: Path, rng: np.random.Generator) -> str | None:
    """One run that meets the fault and is continued: what is wrong with it, or None."""
    codes = CODES.get(fault, {2}) | {0}
    amid = fault not in ("kill", "term", "interrupt") or rng.random() < 0.5
    at, share = int(rng.integers(1, case.writes + 1)), rng.uniform(0, 1)
    data = case.data
    if fault in ("truncated", "changed"):
        case = dataclasses.replace(case, data=Path(shutil.copy(data, folder.with_suffix(".hdf5"))))
    disk = small_disk(folder) if fault in ("disk full", "read-only") else contextlib.nullcontext(folder.mkdir(parents=True))
    log = folder.with_suffix(".log")
    with disk:
        pid = start(case, case.command(folder), log, at if amid else None, act(fault, folder, case))
        if fault == "second process":
            _, status = os.waitpid(pid, os.WUNTRACED)
            if os.WIFSTOPPED(status):
                if (run := run_in(folder)) or case.name == "sweep":
                    second = folder.with_suffix(".second.log")
                    code, _ = wait(start(case, case.command(folder), second))
                    if wrong := complaint(second, code, {2}):
                        return f"the second process: {wrong} ({run})"
                os.kill(pid, signal.SIGCONT)
            else:
                return None
        elif not amid:
            while cpu_seconds(pid) < share * case.cpu and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.005)
            number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}[fault]
            for _ in range(1 + (fault == "interrupt")):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, number) if fault == "interrupt" else os.kill(pid, number)
                time.sleep(0.05 * (fault == "interrupt"))
        code, _ = wait(pid)
        if wrong := complaint(log, code, codes):
            return wrong
        if fault == "disk full":
            (folder / "filling").unlink(missing_ok=True)
        elif fault == "read-only":
            subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        elif fault in ("truncated", "changed"):
            shutil.copy(data, case.data)
        if wrong := damaged(folder):
            return "; ".join(wrong)
        return continued(case, folder, log)


def continued(case: Case, folder: Path, log: Path) -> str | None:
    """Let the run in `folder` go on to its end: what is wrong with that, or with what is there then."""
    if case.name != "sweep" and run_in(folder) is None:
        for path in folder.iterdir():  # it had not begun
            shutil.rmtree(path)
    again = log.with_suffix(".again.log")
    code, _ = wait(start(case, case.command(folder), again))
    if wrong := complaint(again, code, {0}):
        return f"continued: {wrong}"
    if left := [path.name for path in folder.rglob(".*") if path.is_file()]:
        return f"left behind: {', '.join(left)}"
    return None if outcome(folder) == case.expected else "continued, it ends with other weights, corpus or success"


def undisturbed(case: Case, folder: Path) -> None:
    """Fill in what a run without faults takes and ends with. Twice: caches are warm the second time, and the two must agree."""
    found = []
    for name in ("first", "second"):
        (folder / name).mkdir(parents=True)
        log = folder / f"{name}.log"
        code, case.cpu = wait(start(case, case.command(folder / name), log))
        if wrong := complaint(log, code, {0}):
            raise UserError(f"{case.name} does not run: {wrong}")
        seen = json.loads((folder / f"{name}.seen").read_text())
        case.writes = seen["writes"]
        for module in seen["modules"]:  # for the forks that follow
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        found.append(outcome(folder / name))
    if found[0] != found[1]:
        raise UserError(f"two undisturbed runs of {case.name} differ")
    case.expected = found[0]


# ---------------------------------------------------------------------------------------------- the campaign


def cases(names: list[str], folder: Path, assets: str | None) -> list[Case]:
    """The scripts, with demonstrations and pictures to learn from, made once."""
    demos, corpus = folder / "libero_goal" / "open_the_middle_drawer_of_the_cabinet_demo.hdf5", folder / "corpus.hdf5"
    told = ["--assets", assets] if assets else []

    def make() -> None:
        from common.demos import collect, write_demonstrations
        from common.libero import load_task
        from common.libero.render import add_images

        task = load_task("libero_goal/0", assets)
        ways = [collect(task, 8, strategy=way, progress=False) for way in (0, 1)]  # few ways, which little training learns
        write_demonstrations(demos, task, [episode for pair in zip(*ways, strict=True) for episode in pair])
        with atomic_path(corpus) as temporary:
            shutil.copy(demos, temporary)
            add_images(temporary, 32, assets=assets)

    if not demos.exists() or not corpus.exists():
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "make.log"
        code, _ = wait(start(Case("make", make, []), [], log))
        if wrong := complaint(log, code, {0}):
            raise UserError(f"no demonstrations: {wrong}")
    found = []
    for name in names:
        module = importlib.import_module("common.sweep.__main__" if name == "sweep" else name)
        flags = FLAGS[name].split()
        flags += told if name not in ("vla_pretrain",) else []
        flags += [] if name.startswith("vla") else ["--demos", str(demos)]
        found.append(Case(name, module.main, flags, corpus if name.startswith("vla") else None))
    return found


def report(trials: list[dict]) -> str:
    """Sound trials of all, faults down and scripts across, as markdown; then what was wrong."""
    scripts, faults = (list(dict.fromkeys(row[key] for row in trials)) for key in ("script", "fault"))

    def cell(**chosen: str) -> str:
        rows = [row for row in trials if all(row[key] == value for key, value in chosen.items())]
        return f"{sum(row['wrong'] is None for row in rows)} of {len(rows)}" if rows else ""

    lines = [f"| | {' | '.join(scripts)} |", "|---" * (len(scripts) + 1) + "|"]
    lines += [f"| {fault} | {' | '.join(cell(script=script, fault=fault) for script in scripts)} |" for fault in faults]
    lines.append(f"| all | {' | '.join(cell(script=script) for script in scripts)} |")
    wrong = [f"- {row['script']}, trial {row['trial']}, {row['fault']}: {row['wrong']}" for row in trials if row["wrong"]]
    return "\n".join([*lines, *([""] if wrong else []), *wrong])


def campaign(found: list[Case], faults: list[str], trials: int, seed: int, folder: Path, json_path: Path | None = None) -> list[dict]:
    """A row for each trial of each script. Those in `json_path` are taken from there; an unsound trial leaves its folder and log."""
    rows, progress = [], Progress()
    if json_path is not None and json_path.exists():
        then = json.loads(json_path.read_text())
        if then["seed"] != seed:
            raise UserError(f"{json_path} is of --seed {then['seed']}, not {seed}; choose another --json")
        rows = then["trials"]
    for case in found:
        mine = [fault for fault in faults if case.data or fault not in VLA_ALONE]
        done = {(row["trial"], row["fault"]) for row in rows if row["script"] == case.name}
        todo = [(k, mine[k % len(mine)]) for k in range(trials) if (k, mine[k % len(mine)]) not in done]
        if not todo:
            continue
        undisturbed(case, folder / case.name)
        progress.stage(case.name, trials, trials - len(todo))
        for k, fault in todo:
            place = folder / case.name / f"{k}-{fault.replace(' ', '-')}"
            said = trial(case, fault, place, np.random.default_rng([seed, k, *case.name.encode()]))
            if said is None:
                for path in place.parent.glob(f"{place.name}*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            rows.append({"script": case.name, "trial": k, "fault": fault, "wrong": said})
            if json_path is not None:
                write_json(json_path, {"seed": seed, "versions": versions(), "trials": rows})
            progress.update(1, f"{sum(row['wrong'] is not None for row in rows if row['script'] == case.name)} unsound")
    progress.close()
    return rows


def main() -> None:
    args = tyro.cli(Args)
    check_ranges(args)
    for name, known in (("scripts", SCRIPTS), ("faults", FAULTS)):
        if unknown := [word for word in getattr(args, name) if word not in known]:
            raise UserError(f"--{name}: no {unknown[0]!r}; choose from {', '.join(known)}")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    found = cases(args.scripts, args.data or folder, args.assets)
    rows = campaign(found, args.faults, args.trials, args.seed, folder, args.json)
    print(report(rows))
    if bad := sum(row["wrong"] is not None for row in rows):
        raise UserError(f"{bad} trials are not sound; their folders and logs are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    run_command(main)
