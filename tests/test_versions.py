"""The comparison of MuJoCo's releases: what it measures, on the release that is here, and what it makes of the numbers."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from benchmarks import versions
from common.cli import UserError
from common.libero import make_env
from common.libero.step import NO_OP


def test_settling_is_measured_from_the_official_state(drawer_task, assets):
    found = versions.Worker(assets).settle("libero_goal/0", [3])
    env = make_env(drawer_task, 1, settle_steps=0, autoreset_mode=AutoresetMode.DISABLED)
    env.set_state(drawer_task.init_states[3:4])
    for _ in range(40):  # 2 s
        env.step(NO_OP[None])
    rotation = pytest.importorskip("scipy.spatial.transform").Rotation
    for i, name in enumerate(found["objects"]):
        free = slice(a := 1 + drawer_task.objects[name].joint_qpos, a + 7)
        start, rest = drawer_task.init_states[3][free], env.get_state()[0][free]
        np.testing.assert_allclose(found["position"][0][i], rest[:3], atol=1e-5)
        assert found["aside"][0][i] == pytest.approx(np.hypot(*(rest - start)[:2]), abs=1e-5)
        up = [rotation.from_quat(pose[[4, 5, 6, 3]]).apply([0, 0, 1]) for pose in (start, rest)]
        assert found["tilt"][0][i] == pytest.approx(np.degrees(np.arccos(np.clip(up[0] @ up[1], -1, 1))), abs=0.01)
    assert len(found["objects"]) == sum(o.joint_qpos is not None for o in drawer_task.objects.values())


def test_replay_counts_what_comes_to_success_again(drawer_task, assets, tmp_path):
    """Two made-up demonstrations: in one the drawer is open already, in the other nothing happens."""
    (goal,), shut = drawer_task.goal, drawer_task.init_states[0]
    opened = shut.copy()
    opened[1 + goal.qpos[0]] = goal.threshold + goal.sign * 0.01
    kept = {"state5": opened, "actions5": np.tile(NO_OP, (3, 1)), "state2": shut, "actions2": np.tile(NO_OP, (2, 1))}
    np.savez(tmp_path / "demos.npz", keys=[2, 5], **kept)
    assert versions.Worker(assets).replay("libero_goal/0", str(tmp_path / "demos.npz")) == [5]
    np.savez(tmp_path / "none.npz", keys=[])
    assert versions.Worker(assets).replay("libero_goal/0", str(tmp_path / "none.npz")) == []


def test_a_worker_answers_line_by_line(assets, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"do": "versions"}\n'))
    versions.serve(assets)
    assert json.loads(capsys.readouterr().out)["mujoco"]
    with pytest.raises(UserError, match="nowhere/python does not start: No such file"):
        versions.Release(Path("nowhere/python"), assets, None)


def test_what_differs_from_liberos_is_named():
    run = {"flags_equal": True, "flags_unequal_at": [], "free": 1e-15}
    same = {"model_differences": [], "trajectories": {"random 0": run}, "flags": {"predicates": {"open": {"unequal": 0}}}}
    assert versions.differences(same) == []
    other = {
        "model_differences": ["geom_pos"],
        "trajectories": {"random 0": run | {"free": 1e-3}, "random 1": run | {"flags_equal": False, "flags_unequal_at": [7]}},
        "flags": {"predicates": {"open": {"unequal": 2}}},
    }
    assert [text.split(":")[0] for text in versions.differences(other)] == [
        *("field geom_pos of the model", "random 1", "random 0", "flag open in 2 states"),
    ]


def made_up(releases):
    """Two releases' numbers of a task: in the second one an object rests 2 cm away, and everything takes half as long."""
    old, new = releases
    settle = {"objects": ["bowl"], "aside": [[0.001]], "tilt": [[2.0]], "speed": [[0.0]]}
    success = {"episodes": 4, "lengths": [90] * 4}
    seconds = lambda s: {"ours": [s, s], "limit": [s / 2, s / 2]}  # noqa: E731
    parity = {
        "model_differences": [],
        "trajectories": {"random 0": {"free": 1e-15, "all": 1e-12, "flags_unequal_at": []}},
        "flags": {"predicates": {"on": {"true": 5, "false": 3, "unequal": 0}}},
    }
    return {
        "settle": {old: settle | {"position": [[[0.0, 0, 1]]]}, new: settle | {"position": [[[0.02, 0, 1]]]}},
        "strategies": [{}],
        "success": {old: success | {"successes": [0, 1, 3]}, new: success | {"successes": [0, 1, 2, 3]}},
        "replay": {old: {old: [0, 1, 3], new: [0]}, new: {old: [0, 1], new: [0, 1, 2, 3]}},
        "parity": {old: parity, new: parity},
        "speed": {"random": {old: seconds(2.0), new: seconds(1.0)}},
    }


def test_report(tmp_path, monkeypatch, capsys):
    content = {"settings": {}, "versions": [{"mujoco": "1.0"}, {"mujoco": "2.0"}], "tasks": {"libero_goal/0": made_up(["1.0", "2.0"])}}
    (tmp_path / "numbers.json").write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["versions", "--json", str(tmp_path / "numbers.json")])
    versions.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| 2.0 | 1 | 1.0 | 1.0 | 1.0 | 2.0 | 2.0 | 0 | 100.0% | 100.0% | 20 |" in lines
    assert "| libero_goal/0 | bowl | 0 mm, 2 deg | 20 mm, 2 deg |" in lines
    assert "| libero_goal/0 | 1 | 3 of 4 | 4 of 4 |" in lines
    assert "| 1.0 | 3 of 3 (100.0%) | 1 of 3 (33.3%) |" in lines and "| 2.0 | 2 of 4 (50.0%) | 4 of 4 (100.0%) |" in lines
    assert "| 1.0 | 1e-15 | 1 of 1 | 0 | 0 of 8 | 0 |" in lines
    assert "| libero_goal/0 | random | control step | 160/s | 0.50 (0.50 to 0.50) |" in lines
    for flags, words in (([], "name --pythons"), (["--parts", "sped"], "unknown part 'sped'"), (["--parts", "speed"], "add success")):
        monkeypatch.setattr(sys, "argv", ["versions", *flags])
        with pytest.raises(UserError, match=words):
            versions.main()
    (tmp_path / "numbers.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["versions", "--json", str(tmp_path / "numbers.json")])
    with pytest.raises(UserError, match="is not a file that this command wrote"):
        versions.main()
