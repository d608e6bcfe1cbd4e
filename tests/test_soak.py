"""benchmarks.soak: what grows is found, and a short one is flat in files and threads."""

from __future__ import annotations

import pytest

from benchmarks import soak
from common.runs import Progress


def rows(memory=0.0, files=0, threads=0):
    """Twenty rows; so much more of each in the last half."""
    grown = [k >= 10 for k in range(20)]
    return [
        {"done": k, "memory": 300 + memory * g + (k == 0) * -50, "files": 9 + files * g, "threads": 4 + threads * g}
        for k, g in enumerate(grown)
    ]


def test_what_grows_is_found():
    assert soak.leaks({"a": rows(), "b": rows(memory=15), "c": rows(memory=-40, files=-1)}) == []
    assert soak.leaks({"a": rows(memory=17), "b": rows(files=1), "c": rows(threads=2)}) == [
        "a: +17.0 MB, +0 files, +0 threads",
        "b: +0.0 MB, +1 files, +0 threads",
        "c: +0.0 MB, +0 files, +2 threads",
    ]
    assert soak.growth(rows(memory=17))["memory"] == pytest.approx(17)  # warming up, 50 MB, doesn't count


def test_files_that_stay_open_are_found(tmp_path):
    kept = []

    def work(done):
        kept.append(open(tmp_path / "x", "w"))  # noqa: SIM115
        return 1

    found = soak.soak("files", 40, work, Progress(1e9))
    assert [row["done"] for row in found] == list(range(2, 41, 2)) and soak.growth(found)["files"] == 36
    for file in kept:
        file.close()


def test_a_short_one_is_flat(drawer_task, assets):
    args = soak.Args("libero_goal/0", steps=40, resets=20, batches=20, num_envs=1, image_size=16, assets=assets)
    found = soak.measure(args, Progress(1e9))
    assert all(len(r) == 20 for r in found.values())
    for name, r in found.items():
        more = soak.growth(r)
        assert (more["files"], more["threads"]) == (0, 0), name
    assert soak.report(found).count("\n") == 4
