"""The doctor's findings against what this machine says by other means, and each thing that can be missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import doctor
from common.cli import usable_cores
from common.libero.assets import asset_names, find_assets
from common.libero.renderers import available

ROOT = Path(__file__).resolve().parent.parent


def run(*options: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *python, "-m", "common.doctor", *options], cwd=ROOT, capture_output=True, text=True)


def test_this_machine(assets):
    result = run("--json")
    found = json.loads(result.stdout)
    assert result.returncode == 0 and found["problems"] == [], result.stdout
    assert found["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["machine"]["usable_cores"] == usable_cores()
    assert found["machine"]["memory"]["total"] <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("torch", "numpy", "mujoco"):
        assert found["packages"]["requirements.txt"][name]["found"] == importlib.metadata.version(name)
    folder = find_assets()
    assert (found["assets"]["folder"], found["assets"]["name"]) == (str(folder), asset_names(folder)[1])
    assert [not found["pictures"][name] for name in ("warp", "gl")] == [available(name)[0] for name in ("warp", "gl")]
    assert list(found["scripts"]) == list(doctor.SCRIPTS)
    assert {path.stem for path in ROOT.glob("*.py")} - {"env"} == set(doctor.SCRIPTS)  # env.py is for LeRobot to load
    screen = doctor.report(found).splitlines()
    assert len(screen) <= 50 and screen[-1] == "Nothing that is needed is missing."


def test_bare_python():
    """Without any package it still runs, and says what to install, in this order."""
    result = run(python=("-S",))
    assert result.returncode == 1 and result.stderr == ""
    needed = result.stdout.split("\nNeeded\n")[1]
    assert "torch" in needed and "hf-libero" in needed
    mends = [line.strip() for line in needed.splitlines() if "->" in line]
    assert mends == ["-> pip install -r requirements.txt", "-> pip install --no-deps -r requirements-libero.txt"]
    assert "packages  0 of " in result.stdout


def test_pins():
    text = """
# a comment
--require-hashes
a==1.2            # why
b[c]==2.0; python_version >= "3.11"   # why
b[c]==1.0; python_version < "3.11"
d-e==3 --hash=sha256:00
f==4; python_version >= "3.11" and python_version < "3.13"
"""
    assert doctor.pins(text, (3, 10)) == {"a": "1.2", "b": "1.0", "d-e": "3"}
    assert doctor.pins(text, (3, 12)) == {"a": "1.2", "b": "2.0", "d-e": "3", "f": "4"}
    assert doctor.pins(text, (3, 13)) == {"a": "1.2", "b": "2.0", "d-e": "3"}


def test_packages_missing_and_other(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name in ("h5py", "imageio"):
            raise importlib.metadata.PackageNotFoundError(name)
        return {"numpy": "1.0", "torch": real("torch").partition("+")[0] + "+cu130"}.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    problems, hints = [], []
    listed = doctor.packages(problems, hints)["requirements.txt"]
    assert problems == [{"what": "not installed: h5py", "mend": "pip install -r requirements.txt"}]
    (other,) = [hint["what"] for hint in hints if "other versions" in hint["what"]]
    assert "numpy 1.0 (pinned: " in other and "torch" not in other and listed["h5py"]["found"] is None


def test_what_single_flags_need(monkeypatch):
    real, there = importlib.metadata.version, {"pyarrow": "26.0.1"}

    def version(name):
        if name in doctor.EXTRAS and name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = doctor.extras()
    assert found["pyarrow"]["found"] == "26.0.1" and found["wandb"]["found"] is None
    lines = doctor.table([(name, row["found"] or "-", row["for"], row["install"]) for name, row in found.items()])
    assert any(line.split() == ["wandb", "-", "--track", "pip", "install", "wandb"] for line in lines)
    files = {name for name in ("lerobot", "policies") for name in doctor.pins((ROOT / f"requirements-{name}.txt").read_text())}
    assert files < set(found)  # and what the scripts' own messages say
    for path, package in (("common/runs.py", "wandb"), ("common/view.py", "rerun-sdk"), ("common/sweep/jobs.py", "ray")):
        assert found[package]["install"] in (ROOT / path).read_text()


def test_assets_that_are_none(monkeypatch, tmp_path):
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path / "nowhere"))
    problems, hints = [], []
    assert doctor.assets(problems, hints)["kind"] is None
    assert "nowhere (LIBERO_ASSETS) is not a LIBERO asset tree" in problems[0]["mend"]
    monkeypatch.setenv("LIBERO_ASSETS", "standin")
    assert doctor.assets(problems, hints)["kind"] == "standin" and "not comparable" in hints[0]["what"] and len(problems) == 1


def test_cache_and_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("RL_DATA_ENGINE_CACHE", str(tmp_path / "cache"))
    problems = []
    assert doctor.disk(problems)["cache_bytes"] == 0  # no such folder yet
    (tmp_path / "cache" / "tasks").mkdir(parents=True)
    (tmp_path / "cache" / "tasks" / "one.npz").write_bytes(bytes(1000))
    (tmp_path / "cache" / "other").write_bytes(bytes(24))
    found = doctor.disk(problems)
    assert found["cache_bytes"] == 1024 and found["compiled_tasks"] == 1 and problems == []
    monkeypatch.setattr(doctor, "MIN_FREE", 10**18)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    doctor.disk(problems)
    assert ["can't be written" in problems[0]["what"], *("are free at" in p["what"] for p in problems[1:])] == [True] * 3


@pytest.mark.parametrize("limit, total, available", [("max", 8000 * 1024, 6000 * 1024), ("4096000", 4096000, 3096000)])
def test_memory_of_a_container(tmp_path, limit, total, available):
    (tmp_path / "meminfo").write_text("MemTotal:        8000 kB\nMemFree:   10 kB\nMemAvailable:    6000 kB\n")
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text("1000000")
    assert doctor.memory(tmp_path / "meminfo", tmp_path) == {"total": total, "available": available}


def test_gpus(monkeypatch, tmp_path):
    """What the driver's own tool says of them; none, if it is not there or fails."""
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.86.15, 81559 MiB, 80990 MiB'\n")
    tool.chmod(0o755)
    assert doctor.gpus() == [{"name": "NVIDIA H100 80GB HBM3", "driver": "570.86.15", "memory": "81559 MiB", "free": "80990 MiB"}]
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert doctor.gpus() == []


def test_script_that_does_not_start(monkeypatch):
    monkeypatch.setattr(doctor, "SCRIPTS", ("no_such_script",))
    problems = []
    assert doctor.scripts({}, problems) == {}
    assert problems[0]["what"].startswith("no_such_script.py does not start (ModuleNotFoundError")
