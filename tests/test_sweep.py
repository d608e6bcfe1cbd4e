"""Sweeps of a stand-in for our scripts: kills and resumes, failures, limits, reports; and on a Ray cluster, if Ray is installed."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from benchmarks import all_tasks
from common.cli import UserError, usable_cores
from common.runs import write_json
from common.suites import expand
from common.sweep import __main__ as sweep
from common.sweep import jobs, report

# It takes the flags of our scripts, writes their files, saves every third of its 12 steps, and can be resumed and stopped as they can.
# Its result depends on every step before. --fail TASK:HOW makes the run on a task go wrong.
SCRIPT = """
import dataclasses, hashlib, json, os, signal, sys, time
from pathlib import Path

@dataclasses.dataclass
class Args:
    task: str = "x"
    seed: int = 1
    run_folder: str = "runs"
    resume: str | None = None
    torch_threads: int = 2
    pause: float = 0.0
    fail: str = ""

def write(path, text):
    Path(f"{path}.new").write_text(text)
    os.replace(f"{path}.new", path)

def main():
    words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    if "--resume" in words:
        run = Path(words["--resume"])
        words = json.loads((run / "config.json").read_text())["args"]
        state = json.loads((run / "checkpoint.pt").read_text())
    else:
        run = Path(words["--run-folder"]) / f"{words['--task'].replace('/', '-')}__fake__{words['--seed']}__{time.time():.6f}"
        run.mkdir(parents=True)
        state = {"step": 0, "value": words["--task"] + words["--seed"]}
        write(run / "config.json", json.dumps({"script": "fake", "args": words}))
        write(run / "checkpoint.pt", json.dumps(state))
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    task, _, how = words.get("--fail", "").partition(":")
    while state["step"] < 12:
        if task and task in words["--task"] and state["step"] >= 4:
            if how == "always":
                sys.exit("error: the scripted demonstrator finds no way that works")
            if how == "disk":
                sys.exit("error: cannot write corpus.hdf5: No space left on device; free some space")
            if how == "oom":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hang":
                time.sleep(0.05)
                if not stopping:
                    continue
            if how == "once" and not (run / "tried").exists():
                (run / "tried").touch()
                raise ValueError("it was the weather")
        time.sleep(float(words.get("--pause", 0)))
        state["value"] = hashlib.sha256(f"{state['value']} {state['step']}".encode()).hexdigest()
        state["step"] += 1
        with open(run / "steps", "a") as steps:
            steps.write(f"{state['step']}\\n")
        print(f"[{state['step']:6.0f} s] Reinforce {state['step'] / 12:.0%}  success 50%", file=sys.stderr, flush=True)
        if state["step"] % 3 == 0 or stopping:
            write(run / "checkpoint.pt", json.dumps(state))
        if stopping:
            sys.exit(143)
    (run / "corpus.hdf5").write_text(state["value"])
    success = int(state["value"][:2], 16) / 255
    write(run / "summary.json", json.dumps({
        "task": words["--task"], "success_rate": success, "stages": {"learn": success / 2, "reinforce": success}, "alive": 2,
        "per_pattern": [{"pattern": 0, "success_rate": success - 0.1}, {"pattern": 1, "success_rate": success + 0.1}],
        "leakage": {"p_leak": 0.125}, "diversity": {"mean_pairwise_distance": 1.5}, "corpus_episodes": 7, "env_steps": 12,
        "assets": "standin:0123456789", "demos": "scripted", "versions": {"torch": "2"}}))

if __name__ == "__main__":
    main()
"""
TASKS = ["libero_spatial/0", "libero_goal/0", "libero_10/0", "libero_90/0"]


@pytest.fixture
def script(tmp_path, monkeypatch) -> str:
    path = tmp_path / "fake.py"
    path.write_text(SCRIPT)
    monkeypatch.setattr(jobs, "usable_cores", lambda: 2)
    monkeypatch.setattr(jobs, "_gpus", list)
    monkeypatch.setattr(sweep, "check_flags", lambda settings: None)  # it starts a process; tested by itself
    monkeypatch.setattr(jobs, "NOTE", 0.5)
    return str(path)


def run(*words: object) -> None:
    """The command, in this process."""
    before = sys.argv, [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background, which ignores it
    sys.argv = ["sweep", *map(str, words)]
    try:
        sweep.main()
    finally:
        sys.argv = before[0]
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before[1], strict=True):
            signal.signal(number, handler)


def background(*words: object) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=run, args=words)
    process.start()
    return process


def values(out: Path) -> dict[str, str]:
    """Each run's result."""
    return {path.parents[1].name: path.read_text() for path in out.glob("runs/*/*/corpus.hdf5")}


def rows(out: Path) -> dict[str, dict]:
    return {row["task"].split("/")[0]: row for row in json.loads((out / "sweep.json").read_text())["runs"]}


def truth(tmp_path: Path, script: str) -> dict[str, str]:
    """What the script gives when it is started by hand."""
    found = {}
    for task in expand(TASKS):
        folder = tmp_path / "by-hand" / task.replace("/", "-")
        subprocess.run(
            [sys.executable, script, "--task", task, "--seed", "1", "--run-folder", str(folder)], check=True, capture_output=True
        )
        found[f"{task.replace('/', '-')}__1"] = next(folder.glob("*/corpus.hdf5")).read_text()
    return found


# ---------------------------------------------------------------------------------------------- running


def test_killed_at_random_moments(tmp_path, script):
    """Ten kills -9 later every run has the result of one that nobody touched, and has done again at most what a checkpoint allows."""
    out, rng, kills = tmp_path / "out", random.Random(0), 10
    words = (script, "--tasks", *TASKS, "--out", out, "--", "--pause", "0.1")
    for _ in range(kills):
        process = background(*words)
        time.sleep(rng.uniform(0.1, 0.9))
        process.kill()
        process.join()
    run(*words)
    assert values(out) == truth(tmp_path, script)
    for steps in out.glob("runs/*/*/steps"):
        done = [int(line) for line in steps.read_text().split()]
        assert sorted(set(done)) == list(range(1, 13))
        assert len(done) <= 12 + 3 * kills
        assert all(b <= a + 1 for a, b in zip(done, done[1:], strict=False))  # nothing skipped, and no two processes at once


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_runs_save(tmp_path, script, number, capfd):
    """Ctrl-C and SIGTERM: the children save where they are, and not a step is done twice."""
    out = tmp_path / "out"
    words = (script, "--tasks", *TASKS[:2], "--out", out, "--", "--pause", "0.1")
    process = background(*words)
    wait_for(lambda: len(list(out.glob("runs/*/*/steps"))) == 2)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode not in (0, None)
    assert "0 of 2 runs are done; the same command goes on" in capfd.readouterr().err
    run(*words)
    for steps in out.glob("runs/*/*/steps"):
        assert [int(line) for line in steps.read_text().split()] == list(range(1, 13))
    outcomes = [[a["outcome"] for a in json.loads(path.read_text())] for path in out.glob("runs/*/attempts.json")]
    assert outcomes == [["stopped", "done"]] * 2


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it never happened"
        time.sleep(0.02)


def test_failures_are_tried_once_more_and_listed(tmp_path, script, capsys):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="1 of 4 runs failed"):
        run(script, "--tasks", *TASKS, "--out", out, "--", "--fail", f"{expand(TASKS)[2]}:always")
    row = rows(out)["libero_10"]
    assert (row["state"], row["attempts"]) == ("failed", 2)
    assert row["outcome"] == "the scripted demonstrator finds no way that works"
    assert row["outcome"] in (out / "table.md").read_text() and row["outcome"] in (out / "README.md").read_text()
    assert "and will be tried once more: the scripted demonstrator" in capsys.readouterr().err
    assert len(values(out)) == 3 and values(out).items() <= truth(tmp_path, script).items()


def test_a_second_try_goes_on(tmp_path, script):
    run(script, "--tasks", TASKS[0], "--out", tmp_path / "out", "--", "--fail", "spatial:once")
    (attempts,) = [json.loads(path.read_text()) for path in tmp_path.glob("out/runs/*/attempts.json")]
    assert [a["outcome"] for a in attempts] == ["ValueError: it was the weather", "done"]
    (steps,) = (tmp_path / "out").glob("runs/*/*/steps")
    assert [int(line) for line in steps.read_text().split()] == [1, 2, 3, 4, *range(4, 13)]  # from the checkpoint of step 3
    assert values(tmp_path / "out").items() <= truth(tmp_path, script).items()


def test_killed_run_says_so(tmp_path, script):
    with pytest.raises(UserError):
        run(script, "--tasks", TASKS[0], "--out", tmp_path / "out", "--", "--fail", "spatial:oom")
    assert rows(tmp_path / "out")["libero_spatial"]["outcome"].startswith("killed by signal 9 (9: out of memory?), after: [")


def test_time_limit_counts_all_attempts(tmp_path, script):
    out, words = tmp_path / "out", ("--", "--fail", "spatial:hang")
    with pytest.raises(UserError):
        run(script, "--tasks", TASKS[0], "--out", out, "--time-limit", 0.02, *words)
    row = rows(out)["libero_spatial"]
    assert (row["state"], row["outcome"], row["attempts"]) == ("failed", "time limit of 0.02 min", 1)  # not tried once more
    began = time.time()
    with pytest.raises(UserError):  # its time is up: it isn't even started
        run(script, "--tasks", TASKS[0], "--out", out, "--time-limit", 0.02, *words)
    assert rows(out)["libero_spatial"]["attempts"] == 1 and time.time() - began < 60
    with pytest.raises(UserError):
        run(script, "--tasks", TASKS[0], "--out", out, "--time-limit", 0.04, *words)
    assert rows(out)["libero_spatial"]["attempts"] == 2 and rows(out)["libero_spatial"]["minutes"] > 0.04


def test_two_sweeps_on_one_folder(tmp_path, script):
    out = tmp_path / "out"
    first = background(script, "--tasks", TASKS[0], "--out", out, "--", "--fail", "spatial:hang")
    wait_for(lambda: list(out.glob("runs/*/*/steps")))
    with pytest.raises(UserError, match="another sweep is working on .*; wait for it, or stop it"):
        run(script, "--tasks", TASKS[0], "--out", out, "--", "--fail", "spatial:hang")
    first.kill()  # a dead one holds nothing
    first.join()
    with pytest.raises(UserError, match="1 of 1 runs failed"):
        run(script, "--tasks", TASKS[0], "--out", out, "--time-limit", 0.03, "--", "--fail", "spatial:hang")


def test_full_disk_stops_the_sweep(tmp_path, script):
    """It is no run's fault: none is listed as failed, and with space the same command goes on."""
    assert os.strerror(errno.ENOSPC) == "No space left on device"
    out, words = tmp_path / "out", ("--", "--fail", "goal:disk")
    with pytest.raises(UserError, match="is on a full disk: . of 2 runs are done; the same command goes on when there is space"):
        run(script, "--tasks", *TASKS[:2], "--out", out, *words)
    Path(script).write_text(SCRIPT.replace('how == "disk"', "False"))
    run(script, "--tasks", *TASKS[:2], "--out", out, *words)
    assert values(out).items() <= truth(tmp_path, script).items() and len(values(out)) == 2


def test_longest_first(tmp_path, script):
    names = expand(TASKS)
    settings = {"script": script, "flags": [], "jobs": [(task, seed) for seed in (1, 2) for task in names]}
    args = sweep.Args()
    order = [job.task.split("/")[0] for job in sweep.make_jobs(args, settings, tmp_path, 1)]
    assert order[::2] == ["libero_10", "libero_90", "libero_goal", "libero_spatial"]
    folder = tmp_path / "runs" / f"{names[0].replace('/', '-')}__1"  # spatial took 1000 s with seed 1: 1000 / 220 s a step for the others
    write_json(folder / "attempts.json", [{"start": 0.0, "end": 1000.0, "host": "h", "outcome": "done"}])
    for name in ("config.json", "checkpoint.pt", "summary.json"):
        write_json(folder / "run" / name, {})
    expected = sweep.estimate(sweep.make_jobs(args, settings, tmp_path, 1))
    by_task = {(job.task, job.seed): expected(job) for job in sweep.make_jobs(args, settings, tmp_path, 1)}
    assert by_task[names[0], 2] == 1000.0 and by_task[names[2], 1] == pytest.approx(1000 * 520 / 220)


def test_resources(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "usable_cores", lambda: 8)
    monkeypatch.setattr(jobs, "_gpus", list)
    monkeypatch.setattr(jobs, "_available_memory", lambda: 9.0)
    machine = jobs.Machine(None, 2.0, True)
    assert (machine.workers, machine.cores) == (4, 1)  # memory for four
    assert jobs.Machine(4, 2.0, True).workers == 2
    assert jobs.Machine(None, 100.0, True).workers == 1
    monkeypatch.setattr(jobs, "_gpus", lambda: ["3", "5"])
    machine = jobs.Machine(None, 2.0, True)
    assert (machine.workers, machine.cores) == (2, 4)
    seen, both = [], threading.Barrier(2, timeout=60)  # two runs at a time, a GPU each
    monkeypatch.setattr(jobs, "attempt", lambda job, stop: seen.append(job.gpu) or [both.wait(), "done"][1])
    job = jobs.Job("s", (), "libero_goal/x", 1, tmp_path, 1, 1.0)
    assert [f.result() for f in [machine.submit(job) for _ in range(4)]] == ["done"] * 4
    assert sorted(seen) == ["3", "3", "5", "5"]
    monkeypatch.setenv("RL_DATA_ENGINE_CORES", "3")
    assert usable_cores() == 3


def test_memory_of_a_container(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable: 32000000 kB\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    assert jobs._available_memory(tmp_path, tmp_path) == 32.0
    (tmp_path / "memory.max").write_text("5000000000\n")
    assert jobs._available_memory(tmp_path, tmp_path) == 4.0


# ---------------------------------------------------------------------------------------------- storage


def test_another_machine_goes_on_with_what_is_stored(tmp_path, script, capsys):
    """The first machine is gone, with its disk: killed at once, without a word. The second one does again at most what was not stored."""
    out, other, store = tmp_path / "out", tmp_path / "other", tmp_path / "store"
    words = (script, "--tasks", *TASKS[:2], "--storage", f"file://{store}")
    process = background(*words, "--out", out, "--", "--pause", "0.2")
    wait_for(lambda: len([p for p in store.glob("*/*/steps") if len(p.read_text().split()) >= 4]) == 2)
    process.kill()
    process.join()
    stored = {path.parents[1].name: json.loads(path.read_text())["step"] for path in store.glob("*/*/checkpoint.pt")}
    wait_for(lambda: not any(job_process(out)))  # told by the kernel, they save and end
    shutil.rmtree(out)
    run(*words, "--out", other, "--", "--pause", "0.2")
    assert values(other).items() <= truth(tmp_path, script).items() and len(values(other)) == 2
    for path in other.glob("runs/*/*/steps"):
        steps = [int(line) for line in path.read_text().split()]
        assert sorted(set(steps)) == list(range(1, 13)) and len(steps) <= 12 + 3 and stored[path.parents[1].name] >= 3
    assert {p.relative_to(store) for p in store.glob("*/*/corpus.hdf5")} == {
        p.relative_to(other / "runs") for p in other.glob("runs/*/*/corpus.hdf5")
    }
    assert not list(store.rglob("*.part"))
    third = tmp_path / "third"  # all is done, and comes from there
    capsys.readouterr()
    run(*words, "--out", third, "--", "--pause", "0.2")
    assert values(third) == values(other) and "0 of 2 runs to do" in capsys.readouterr().err


def job_process(out: Path) -> list[int]:
    """Processes that work in `out`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [int(path.parent.name)] if str(out).encode() in path.read_bytes() else []
    return found


@pytest.mark.parametrize(("url", "message"), [("s4://x/y", "Protocol not known: s4"), ("file:///proc/x", "--storage file:///proc/x: ")])
def test_a_storage_that_is_none(tmp_path, script, url, message):
    with pytest.raises(UserError, match=message) as caught:
        run(script, "--tasks", TASKS[0], "--out", tmp_path / "out", "--storage", url)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- Ray


@pytest.fixture
def cluster():
    """A Ray cluster of two nodes with two cores each; the head is the first."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


def command(tmp_path: Path, *words: object) -> subprocess.Popen:
    with open(tmp_path / "err", "wb") as err:
        return subprocess.Popen([sys.executable, "-m", "common.sweep", *map(str, words)], stdout=subprocess.DEVNULL, stderr=err)


@pytest.mark.parametrize("stored", [False, True])
def test_ray_node_dies(tmp_path, script, cluster, stored, monkeypatch):
    """The runs of a node that is killed go on from their checkpoints on the other one, out of the shared folder or out of a storage."""
    out, store = tmp_path / "out", tmp_path / "store"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    words = (script, "--tasks", *TASKS, "--out", out, "--memory", "0.1", "--address", cluster.address)
    words += ("--storage", store) if stored else ()
    sweep = command(tmp_path, *words, "--", "--pause", "1")
    wait_for(lambda: len([s for s in (store if stored else out / "runs").glob("*/*/steps") if len(s.read_text().split()) > 3]) == 4, 300)
    cluster.remove_node(list(cluster.worker_nodes)[0], allow_graceful=False)
    assert sweep.wait(300) == 0
    assert values(out) == truth(tmp_path, script)
    steps = [[int(line) for line in path.read_text().split()] for path in out.glob("runs/*/*/steps")]
    assert all(sorted(set(done)) == list(range(1, 13)) and len(done) <= 12 + 3 for done in steps)
    attempts = [len(json.loads(path.read_text())) for path in out.glob("runs/*/attempts.json")]
    assert sorted(attempts) == [1, 1, 2, 2]


def test_ray_head_is_gone(tmp_path, script, cluster):
    """One line, and on this machine the sweep goes on with what was saved."""
    out = tmp_path / "out"
    words = (script, "--tasks", *TASKS[:2], "--out", out, "--memory", "0.1")
    sweep = command(tmp_path, *words, "--address", cluster.address, "--", "--pause", "0.5")
    wait_for(lambda: len([s for s in out.glob("runs/*/*/steps") if len(s.read_text().split()) > 3]) == 2, 300)
    cluster.shutdown()
    assert sweep.wait(300) == 2
    errors = [line for line in (tmp_path / "err").read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "the head of the Ray cluster is gone (Connection refused)" in errors[0]
    run(*words, "--", "--pause", "0.5")
    assert values(out).items() <= truth(tmp_path, script).items() and len(values(out)) == 2
    with pytest.raises(UserError, match="no Ray cluster answers at 127.0.0.1:1 .*; start one: ray start --head"):
        run(*words, "--address", "127.0.0.1:1", "--", "--pause", "0.5")


# ---------------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "libero_91"], "unknown task 'libero_91'"),
        (["--tasks", "libero_91/3"], "unknown suite 'libero_91'"),
        ([], "holds no sweep to go on with; name --tasks"),
        (["--tasks", "libero_goal", "--time-limit", "0"], "--time-limit must be more than 0, not 0"),
        (["--tasks", "libero_goal", "--", "--seed", "3"], "--seed after -- is the sweep's to give"),
        (["--tasks", "libero_goal", "--", "--run_folder=x"], "--run_folder=x after -- is the sweep's to give"),
        (["--tasks", "libero_goal", "--address", "auto"], "--address needs Ray; run: pip install"),
    ],
)
def test_errors_are_one_line(tmp_path, script, words, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=message) as caught:
        run(script, "--out", tmp_path / "out", *words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "runs").exists()


def test_one_folder_one_sweep(tmp_path, script):
    out = tmp_path / "out"
    run(script, "--tasks", TASKS[0], "--out", out)
    with pytest.raises(UserError, match="is a sweep of .*fake.py, not of .*fake.py --pause 1; choose another --out"):
        run(script, "--tasks", TASKS[0], "--out", out, "--", "--pause", "1")
    run("--out", out, "--seeds", "2")  # it may grow, and needn't be told what it is of
    assert sorted(r["seed"] for r in json.loads((out / "sweep.json").read_text())["runs"]) == [1, 2]
    (out / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="sweep.json is damaged; remove it"):
        run("--out", out, "--report")


def test_wrong_flags_are_found_at_the_start(tmp_path, script, capsys, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(SystemExit) as caught:
        run(script, "--tasks", TASKS[0], "--out", tmp_path / "out", "--", "--pauze", "1")
    assert caught.value.code == 2 and "--pauze" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- the report


def test_report(tmp_path, script):
    out = tmp_path / "out"
    run(script, "--tasks", *TASKS, "--seeds", 1, 2, "--out", out)
    found = json.loads((out / "sweep.json").read_text())
    assert found["revision"] and len(found["runs"]) == 8
    success = {}
    for row in found["runs"]:
        value = int((out / row["corpus"]).read_text()[:2], 16) / 255
        success.setdefault(row["suite"], []).append(value)
        assert row["reinforce"] == pytest.approx(value) and row["learn"] == pytest.approx(value / 2)
        assert row["worst_pattern"] == pytest.approx(value - 0.1)
        assert (row["patterns"], row["p_leak"], row["distance"], row["state"]) == (2, 0.125, 1.5, "done")
    assert json.loads((out / "corpora.json").read_text()) == [row["corpus"] for row in found["runs"]]
    table = (out / "table.md").read_text()
    for suite, both in success.items():  # one task a suite, two seeds: no interval, which is over tasks
        mean = f"{100 * np.mean(both):.0f} %"
        assert f"| {suite} | 2 of 2 | 0 | {100 * np.mean(both) / 2:.0f} % | {mean} | {mean} | 2.0 |" in table
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "README.md").read_text()
    assert "56 successful trajectories" in text and "standin:0123456789" in text and "p_leak" in text and "1.50 m from each other" in text
    (out / "table.md").unlink()
    run("--out", out, "--report")
    assert (out / "table.md").read_text() == table


def test_tasks_of_ones_own_come_last(tmp_path, script):
    file = Path(__file__).parent.parent / "docs" / "tasks" / "put_the_cream_cheese_on_the_plate.bddl"
    run(script, "--tasks", file, TASKS[1], "--out", tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text()
    assert list(rows(tmp_path / "out")) == ["libero_goal", "tasks"] and table.index("| libero_goal |") < table.index("| tasks | 1 of 1 |")


def test_failed_runs_count_as_zero_beside(tmp_path):
    row = dict.fromkeys(report.FIELDS) | {"suite": "libero_goal", "minutes": 30.0}
    rows = [
        row | {"task": "a", "state": "done", "reinforce": 0.9},
        row | {"task": "b", "state": "failed"},
        row | {"task": "c", "state": "todo"},
    ]
    assert "| libero_goal | 1 of 3 | 1 |  | 90 % | 45 % |" in report.suites_table(rows)


def test_sweeps_of_one_script_make_one_table(tmp_path, monkeypatch, capsys):
    """Two sweeps, the later of which ran a task again: its run counts, a failed one as 0 %, and one that is not done is missing."""
    tasks = expand(["libero_goal"])
    row = dict.fromkeys(report.FIELDS) | {"suite": "libero_goal", "seed": 1, "minutes": 1.0, "folder": "x", "corpus": "y"}
    done = row | {"state": "done", "versions": {"revision": "abc"}, "learn": 0.5, "patterns": 1, "found": 2}
    first = [done | {"task": tasks[1], "reinforce": 0.6}, done | {"task": tasks[0], "reinforce": 0.9}]
    again = [
        done | {"task": tasks[1], "reinforce": 1.0},
        row | {"task": tasks[2], "state": "failed", "outcome": "error: no way"},
        row | {"task": tasks[3], "state": "todo"},
    ]
    for name, runs, flags in (("a", first, []), ("b", again, []), ("c", [], ["--seed", "2"])):
        write_json(tmp_path / name / "sweep.json", {"script": "s.py", "flags": flags, "runs": runs})

    def tell(*words):
        monkeypatch.setattr(sys, "argv", ["all_tasks", *map(str, words), "--tasks", "libero_goal", "--json", str(tmp_path / "all.json")])
        all_tasks.main()
        return capsys.readouterr().out

    said = tell(tmp_path / "a", tmp_path / "b")
    assert "2 of 3 tasks at 90 % or better; mean 63.3%" in said and "2 clones under 80 %, of which RL makes +45.0%" in said
    assert "7 of 10 tasks have no run yet" in said and "| 1 of 2 |" in said and "Revisions: abc." in said
    kept = json.loads((tmp_path / "all.json").read_text())["runs"]
    assert [(run["task"], run["reinforce"]) for run in kept] == [(tasks[0], 0.9), (tasks[1], 1.0), (tasks[2], None)]
    assert "folder" not in kept[0] and tell(tmp_path / "all.json") == said
    page = tmp_path / "page.md"
    page.write_text("# All tasks\n\nBy hand.\n\n## `python s.py`\n\nold\n\n## Why\n\nBy hand, too.\n")
    for _ in range(2):  # written again, it stays
        tell(tmp_path / "all.json", "--page", page)
        before, after = page.read_text().split("## Why")
        assert before.startswith("# All tasks\n\nBy hand.\n\n## `python s.py`\n\n2 of 3 tasks at 90 %") and after == "\n\nBy hand, too.\n"
        assert before.endswith(", seed 1: error: no way.\n\nRevisions: abc.\n\n") and "old" not in before
        assert f"| libero_goal/1 {tasks[1].split('/')[1].replace('_', ' ')} | 1 | 50 % | 100 % |" in before
    all_tasks.write_section(page, "More", "text\n\n")
    assert page.read_text().endswith("By hand, too.\n\n## More\n\ntext\n")
    with pytest.raises(UserError, match="differ in script or flags"):
        tell(tmp_path / "a", tmp_path / "c")
    with pytest.raises(UserError, match="neither a sweep's folder"):
        tell(tmp_path)
    write_json(tmp_path / "a" / "sweep.json", {"script": "gaussian_ppo.py", "flags": [], "jobs": []})
    with pytest.raises(UserError, match="has not ended; python -m common.sweep --out .*a --report says what it has"):
        tell(tmp_path / "a")


def test_interval_covers():
    """The bootstrap's interval of a mean of 40 has the normal one's width, 2 x 1.96 s / sqrt(n), to a tenth."""
    x = np.random.default_rng(1).normal(size=40)
    low, high = report.interval(x)
    assert high - low == pytest.approx(2 * 1.96 * x.std() / np.sqrt(40), rel=0.1) and low < x.mean() < high


def test_minutes_to_goal(tmp_path):
    """By hand: attempts of 60 s and 90 s with an hour between them; 95 % is seen 30 s into the second: 1.5 min."""
    job = jobs.Job("s", (), "libero_goal/x", 1, tmp_path / "job", 1, 1.0)
    times = [{"start": 1000.0, "end": 1060.0}, {"start": 4660.0, "end": 4750.0}]
    write_json(job.folder / "attempts.json", [a | {"host": "h", "outcome": None} for a in times])
    for name in ("config.json", "checkpoint.pt"):
        write_json(job.folder / "run" / name, {})
    with SummaryWriter(job.folder / "run") as writer:
        for step, (when, success) in enumerate([(1040.0, float("nan")), (1050.0, 0.7), (4690.0, 0.95), (4700.0, 0.5)]):
            writer.add_scalar("charts/success", success, step, walltime=when)
            writer.add_scalar("charts/SPS", 100.0, step, walltime=when)
            writer.add_scalar("charts/rollout_seconds", 8.0, step, walltime=when)
            writer.add_scalar("charts/update_seconds", 2.0, step, walltime=when)
    assert report.minutes_to_goal(job, {"stages": {"learn": 0.8}}) == pytest.approx(1.5)
    assert report.minutes_to_goal(job, {"stages": {"learn": 0.9}}) == pytest.approx(0.5)  # at 1030, before the first iteration's 10 s
    (job.folder / "run" / "x").mkdir()
    for path in job.folder.glob("run/events*"):
        path.unlink()
    assert report.minutes_to_goal(job, {"success_rate": 0.9}) == pytest.approx(2.5)  # only seen in the end
    assert report.minutes_to_goal(job, {"success_rate": 0.89}) is None
