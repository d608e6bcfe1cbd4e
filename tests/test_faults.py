"""benchmarks.faults on a toy script: all that scripts share (folder, lock, checkpoints, signals, lines) under every fault, in seconds; and
the campaign finds what is wrong. `python -m benchmarks.faults` does the same to the scripts themselves."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils import tensorboard  # noqa: F401  (before forks, which then need not)

from benchmarks import faults
from benchmarks.faults import Case
from common.cli import UserError, remove_leftovers
from common.data.write import _new_file
from common.runs import Run, rng_state, set_rng_state

CPU = torch.device("cpu")
if sys.platform != "linux":
    pytest.skip("processes and limits as Linux has them", allow_module_level=True)


@dataclasses.dataclass
class Args:
    seed: int = 1
    run_folder: str = "runs"
    resume: str | None = None
    allow_mismatch: bool = False
    checkpoint_interval: int = 2


class Trainer:
    """Six steps of a small regression whose data are drawn as it goes."""

    num_iterations = 6

    def __init__(self):
        torch.manual_seed(0)
        self.agent, self.iteration, self.history = torch.nn.Linear(3, 1), 0, []
        self.optimizer = torch.optim.Adam(self.agent.parameters())

    @property
    def env_steps(self):
        return self.iteration

    def run_iteration(self):
        loss = self.agent(torch.randn(8, 3)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.iteration += 1
        self.history.append([self.iteration, loss.item()])
        return {"losses/value_loss": loss.item()}

    def state_dict(self):
        parts = {"agent": self.agent.state_dict(), "optimizer": self.optimizer.state_dict(), "rng": rng_state(CPU)}
        return parts | {"iteration": self.iteration, "history": self.history}

    def load_state_dict(self, state):
        self.agent.load_state_dict(state["agent"])
        self.optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"], CPU)
        self.iteration, self.history = state["iteration"], state["history"]


def script() -> None:
    run, trainer = Run("toy", Args), Trainer()
    run.open("suite/task", depends={})
    if run.stage in ("start", "reinforce"):
        run.train(trainer, lambda logs: "")
    trainer.agent.load_state_dict(run.checkpoint["agent"])
    with _new_file(run.folder / "corpus.hdf5") as file:
        for k in range(3):
            for name in ("states", "actions"):
                file.create_dataset(f"data/demo_{k}/{name}", data=np.outer(trainer.agent.weight.detach().numpy(), range(k + 2)))
    run.finish({"success_rate": 1.0}, "well")


def forgetful() -> None:
    """A script that resumes with other random numbers."""
    trained = set_rng_state
    globals()["set_rng_state"] = lambda *_: None
    try:
        script()
    finally:
        globals()["set_rng_state"] = trained


@pytest.fixture
def quiet(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(faults.Progress, "say", lambda *_: None)


def test_runs_outlive_every_fault(tmp_path, quiet):
    possible = [fault for fault in faults.FAULTS if fault not in faults.VLA_ALONE]
    if os.getuid() != 0 or subprocess.run(["unshare", "-m", "true"]).returncode:  # what may not mount
        possible = [fault for fault in possible if fault not in ("disk full", "read-only")]
    case, kept = Case("toy", script, []), tmp_path / "trials.json"
    faults.campaign([case], possible, 2, 0, tmp_path / "a", kept)
    rows = faults.campaign([case], possible, len(possible), 0, tmp_path / "b", kept)  # stopped, it goes on
    assert sorted(path.name for path in (tmp_path / "b" / "toy").iterdir() if path.is_dir()) == ["first", "second"]
    table = ["| | toy |", "|---|---|", *(f"| {fault} | 1 of 1 |" for fault in possible), f"| all | {len(possible)} of {len(possible)} |"]
    assert faults.report(rows).splitlines() == table
    assert faults.campaign([case], possible, len(possible), 0, tmp_path / "c", kept) == rows and not (tmp_path / "c").exists()


def test_what_is_not_continued_exactly_is_found(tmp_path, quiet):
    case = Case("toy", forgetful, [])
    faults.undisturbed(case, tmp_path)
    amid = SimpleNamespace(random=lambda: 0.0, integers=lambda *_: case.writes // 2, uniform=lambda *_: 0.0)
    wrong = faults.trial(case, "kill", tmp_path / "0", amid)
    assert wrong == "continued, it ends with other weights, corpus or success"
    rows = [{"script": "toy", "trial": k, "fault": "kill", "wrong": wrong if k == 2 else None} for k in range(4)]
    assert faults.report(rows).splitlines()[2:] == ["| kill | 3 of 4 |", "| all | 3 of 4 |", "", f"- toy, trial 2, kill: {wrong}"]


def test_damage_tracebacks_and_codes_are_found(tmp_path):
    (tmp_path / "a.json").write_text('{"half')
    (tmp_path / "b.pt").write_bytes(b"half")
    (tmp_path / "c.hdf5").write_bytes(b"half")
    (tmp_path / ".d-0123456789ab.json").write_text('{"half')
    assert sorted(line.split(" is damaged")[0] for line in faults.damaged(tmp_path)) == ["a.json", "b.pt", "c.hdf5"]
    log = tmp_path / "log"
    for text, code, found in (
        ("[ 0 s] x\nerror: y\n", 2, None),
        ("Traceback\nValueError: y\n", 1, "a traceback: ValueError: y"),
        ("well\n", 2, "no line: well"),
        ("interrupted\n", 130, "exit code 130: interrupted"),
    ):
        log.write_text(text)
        assert faults.complaint(log, code, {0, 2}) == found
    with pytest.raises(UserError, match="toy does not run: a traceback: ZeroDivisionError"):
        faults.undisturbed(Case("toy", lambda: 1 / 0, []), tmp_path / "runs")


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path):
    keep = ["checkpoint.pt", ".hidden", ".x-0123456789ab.pt.txt", ".checkpoint-0123456789AB.pt", "a/b-0123456789ab.pt"]
    for name in [*keep, ".checkpoint-0123456789ab.pt", "a/.paths-ffffffffffff.png", "a/.lock-00000000000f"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(keep)


def test_a_clock_that_is_set_back_takes_no_time_away(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy.py", "--run-folder", str(tmp_path)])
    run, now = Run("toy", Args), time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    assert 0 <= run.seconds < 60


ROOT = Path(__file__).resolve().parent.parent


def test_the_table_of_reports_names_tests_that_exist():
    """docs/notebook/reports.md: 29 rows, each with a test."""
    rows = re.findall(r"^\| (\d+) \|.*\|(.*)\|$", (ROOT / "docs" / "notebook" / "reports.md").read_text(), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 30))
    for number, named in rows:
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", named)
        assert tests, number
        for file, test in tests:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{number}: {file} has no {test}"
