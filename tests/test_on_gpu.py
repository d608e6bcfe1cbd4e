"""benchmarks.on_gpu: steps are timed out, fail alone, and leave what they found. Its dry run, which takes longer, is CI's (.ci/run)."""

from __future__ import annotations

import json
import sys
import time

import pytest

from benchmarks import on_gpu
from benchmarks.on_gpu import Step
from common.cli import UserError


def test_steps_end_in_time_and_leave_what_they_found(tmp_path, monkeypatch, capsys):
    def step(name, seconds, code):
        (tmp_path / f"{name}.py").write_text(code)
        found = tmp_path / f"{name}.found"
        return Step(name, seconds, f"{tmp_path}/{name}.p* {found}", lambda: {"found": int(found.read_text())})

    write = "import sys, time\nopen(sys.argv[1], 'w').write('7')\n"
    late = tmp_path / "late"
    child = f"import subprocess\nsubprocess.Popen(['sh', '-c', 'sleep 2; touch {late}'])\n"
    made = [
        step("good", 60, write),
        step("slow", 1.0, write + child + "time.sleep(60)"),
        step("bad", 60, "raise SystemExit('error: no GPU')"),
    ]
    monkeypatch.setattr(on_gpu, "steps", lambda args: made)
    monkeypatch.setattr(on_gpu, "gpu", lambda: {"name": "a GPU"})
    monkeypatch.setattr(sys, "argv", ["on_gpu", "--out", str(tmp_path / "out"), "--seconds", "60"])
    began = time.monotonic()
    with pytest.raises(UserError, match=r"2 of 3 steps did not end well \(slow, bad\)"):
        on_gpu.main()
    rows = json.loads((tmp_path / "out" / "on_gpu.json").read_text())["steps"]
    found = [(row["step"], row["exit_code"], row["result"], row.get("error")) for row in rows]
    assert found == [("good", 0, {"found": 7}, None), ("slow", None, {"found": 7}, None), ("bad", 1, None, "error: no GPU")]
    assert rows == [json.loads((tmp_path / "out" / f"{row['step']}.json").read_text()) for row in rows]
    assert "| slow | 1 | stopped | slow.json |" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds results"):
        on_gpu.main()
    time.sleep(max(0, 2.5 - (time.monotonic() - began)))
    assert not late.exists()  # what a step started ended with it


def test_no_step_starts_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(on_gpu, "steps", lambda args: [Step("one", 60, "-c 0", dict)])
    monkeypatch.setattr(sys, "argv", ["on_gpu", "--out", str(tmp_path / "out"), "--seconds", "0"])
    with pytest.raises(UserError, match="1 of 1 steps"):
        on_gpu.main()


@pytest.mark.parametrize("dry_run", [False, True])
def test_limits_leave_room_for_every_step(tmp_path, dry_run):
    names = [step.name for step in on_gpu.steps(on_gpu.Args(tmp_path, dry_run=dry_run))]
    assert names == ["tests", "throughput", "pictures", "dlr_discover", "backends", "vla", "vla_compiled"]
