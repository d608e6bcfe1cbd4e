"""The VLA benchmark's table, figure and resumption, on invented results."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from benchmarks import vla_compare
from benchmarks.vla_compare import PRESETS, Args, plot_scaling, pooled, report, run_script, table
from common.cli import UserError
from common.metrics import wilson_interval
from common.suites import expand


def rows(*successes: int) -> list[dict]:
    tasks = ("libero_spatial/a", "libero_goal/b")
    return [{"task": task, "successes": n, "trials": 50} for task, n in zip(tasks, successes, strict=True)]


CELLS = {
    ("none", 0): rows(1, 0),
    ("demonstrations", 20): rows(10, 20),
    ("demonstrations", 40): rows(25, 30),
    ("dlr_discover", 40): rows(30, 40),
}


def test_table_has_the_papers_form():
    lines = table(PRESETS["small"], CELLS).splitlines()
    assert lines[0] == "| pretrained on | episodes a task | libero_spatial/a | libero_goal/b | mean |"
    assert lines[2] == "| none | - | 2 (0 to 10) | 0 (0 to 7) | 1 (0 to 5) |" and lines[5].startswith("| DLR | 40 | 60 (")
    assert pooled(CELLS["dlr_discover", 40]) == {"success_rate": 0.7, "interval": wilson_interval(70, 100), "trials": 100}
    assert table(PRESETS["paper"], CELLS).splitlines()[0].endswith("| libero_spatial | libero_goal | mean |")


def test_report_is_complete(tmp_path):
    text = report(Args(out=tmp_path), PRESETS["small"], CELLS, ["libero_90/x"], ["libero_90/y: dlr_discover has 3 of 40 episodes"])
    assert text.count("| none | -") == 2 and text.count("| demonstrations | 20 |") == 1 and "Left out: libero_90/y" in text
    record = json.loads((tmp_path / "vla_compare.json").read_text())
    assert [(c["source"], c["episodes"]) for c in record["cells"]] == list(CELLS) and record["pretrain_tasks"] == ["libero_90/x"]
    plot_scaling(tmp_path / "again.png", CELLS)
    assert (tmp_path / "vla_compare.png").read_bytes()[:4] == (tmp_path / "again.png").read_bytes()[:4] == b"\x89PNG"


def test_finished_runs_are_kept_and_stopped_ones_resumed(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(vla_compare, "call", lambda *words: calls.append(words))
    assert run_script("vla_pretrain", tmp_path, ["--steps", "3"]) is None  # it failed
    assert calls.pop() == ("vla_pretrain.py", "--steps", "3", "--run-folder", str(tmp_path))
    run = tmp_path / "task__vla_pretrain__1__1"
    run.mkdir()
    (run / "checkpoint.pt").touch()
    assert run_script("vla_pretrain", tmp_path, ["--steps", "3"]) is None
    assert calls.pop() == ("vla_pretrain.py", "--resume", str(run))
    (run / "summary.json").touch()
    assert run_script("vla_pretrain", tmp_path, []) == run and not calls


def test_presets_hold_tasks_out():
    for preset in PRESETS.values():
        downstream = {task for group in preset.downstream for task in expand(list(group))}
        assert downstream and not downstream & set(expand(list(preset.pretrain)))
        assert set(preset.rl) == set(vla_compare.SOURCES) - {"demonstrations"}
    assert len(expand(list(PRESETS["paper"].pretrain))) == 90


def test_every_flag_of_a_preset_exists(monkeypatch):
    import tyro

    import diffusion_ppo
    import dlr_discover
    import gaussian_ppo
    import vla_finetune
    import vla_pretrain

    scripts = {"gaussian_ppo": gaussian_ppo, "diffusion_ppo": diffusion_ppo, "dlr_discover": dlr_discover}
    for preset in PRESETS.values():
        for script, flags in preset.rl.items():
            assert dataclasses.is_dataclass(tyro.cli(scripts[script].Args, args=flags))
        for script, flags in ((vla_pretrain, preset.pretraining), (vla_finetune, preset.finetuning)):
            assert dataclasses.is_dataclass(tyro.cli(script.Args, args=[*flags, "--size", preset.size]))


@pytest.mark.parametrize("flags, message", [(["--preset", "huge"], "--preset must be"), (["--sources", "human"], "there is no 'human'")])
def test_wrong_flags(monkeypatch, tmp_path, flags, message):
    monkeypatch.setattr(sys, "argv", ["vla_compare", "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(UserError, match=message):
        vla_compare.main()
    assert not (tmp_path / "out").exists()
