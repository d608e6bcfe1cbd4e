"""What benchmarks compute: intervals, reports, and the loops over MuJoCo Warp at tiny size, on its CPU device."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import mujoco
import numpy as np
import pytest
from test_gaussian_ppo import refused

from benchmarks import demonstrator, fidelity, frames, recognition, throughput
from common.cli import UserError, run_command
from common.data import read_episodes
from common.demos import SKILLS, Strategy
from common.libero import make_env
from common.runs import Progress

needs_warp = pytest.mark.skipif(tuple(int(x) for x in mujoco.__version__.split(".")[:2]) < (3, 8), reason="MuJoCo Warp needs mujoco 3.8")

RESETS = ("libero", "ours_first", "ours_again", "ours_settled_first", "ours_settled_again")


def test_report_of_backends():
    rows = [
        dict(task="libero_goal/0", policy="scripted", episodes=200, cpu=198, warp=197, difference=-0.005, interval=(-0.03, 0.02)),
        dict(task="libero_90/9", policy="run", episodes=200, cpu=180, warp=172, difference=-0.04, interval=(-0.1, 0.02)),
    ]
    lines = fidelity.report_backends(rows).splitlines()
    assert lines[2] == "| libero_goal/0 | scripted | 200 | 99.0% | 98.5% | -0.5 (-3.0 to +2.0) |"
    assert lines[-1] == "Differences of more than 3 points: libero_90/9 (run)."
    assert fidelity.report_backends(rows[:1]).endswith("3 points: none.")


@pytest.mark.parametrize("each", [False, True])
def test_strategies_take_turns_over_the_init_states(drawer_task, assets, monkeypatch, each):
    """Episodes are made up: the second of three strategies always fails."""
    tried = []

    def perform(task, next_attempt, noise, num_envs):
        for attempt in iter(next_attempt, None):
            tried.append((attempt.key, attempt.init_state))
            yield attempt, SimpleNamespace(success=attempt.key != 1, length=100 + attempt.key)

    monkeypatch.setattr(demonstrator, "strategies", lambda task: [Strategy(name, {}) for name in "abc"])
    monkeypatch.setattr(demonstrator, "perform", perform)
    row = demonstrator.measure("libero_goal/0", demonstrator.Args(init_states=5, each_strategy=each, assets=assets))
    states = [0, 10, 20, 30, 40]
    assert tried == ([(s, i) for i in states for s in range(3)] if each else list(zip([0, 1, 2, 0, 1], states, strict=True)))
    assert row["success_rate"] == pytest.approx(2 / 3 if each else 3 / 5) and row["episodes"] == len(tried)
    assert [s["success_rate"] for s in row["strategies"]] == [1.0, 0.0, 1.0]
    assert [s["mean_length"] for s in row["strategies"]] == [100.0, None, 102.0]
    failed = dict(row, task="libero_10/0", success_rate=0.0, mean_length=None, strategies=[], error="libero_10/0: no way")
    lines = demonstrator.table([row, dict(row, task="libero_goal/1", success_rate=0.8), failed]).splitlines()
    mean = (row["success_rate"] + 0.8) / 2
    assert lines[2:5] == [
        f"| libero_goal | 2 | 1 | {100 * mean:.1f} % |",
        "| libero_10 | 1 | 0 | 0.0 % |",
        f"| all | 3 | 1 | {100 * mean * 2 / 3:.1f} % |",
    ]
    assert lines[-1] == "- libero_10/0: no way" and sum(" b | 0 % |  |" in line for line in lines) == 2


def test_the_demonstrators_file_keeps_rows_of_other_measurements(drawer_task, tmp_path, monkeypatch, assets, capsys):
    def measure(task, args):
        calls.append((task, args.init_states, args.rehearsed_on))
        return {"task": task, "name": "a_name", "goal": "on", "success_rate": 1.0, "mean_length": 100.0, "episodes": 50, "strategies": []}

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["demonstrator", "--assets", str(assets), "--json", str(tmp_path / "rows.json"), *flags])
        demonstrator.main()
        return capsys.readouterr().out

    calls: list = []
    monkeypatch.setattr(demonstrator, "measure", measure)
    monkeypatch.setattr(demonstrator, "ProcessPoolExecutor", lambda *workers: ThreadPoolExecutor(1))
    first = run("--tasks", "libero_goal/0", "--init-states", "6")
    second = run("--tasks", "libero_goal/0", "libero_goal/1")  # the same task, measured otherwise, and another
    again = run("--tasks", "libero_goal/0", "libero_goal/1", "--beside", str(tmp_path / "rows.json"))
    assert calls == [("libero_goal/0", 6, None), ("libero_goal/0", 50, None), ("libero_goal/1", 50, None)]
    assert "| all | 1 | 1 | 100.0 % |" in first and again.startswith(second.rstrip())
    run("--tasks", "libero_goal/0", "--rehearsed-on", str(assets))
    assert calls[3:] == [("libero_goal/0", 50, str(assets))]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["assets"] for row in rows} == {drawer_task.assets} and all(row["revision"] for row in rows)
    found = [(row["task"], row["init_states"], row["rehearsed_on"]) for row in rows]
    assert found == [(task, states, drawer_task.assets if other else None) for task, states, other in calls]


def test_success_on_two_asset_sets():
    def row(task, rate, assets):
        return {"task": task, "name": "a_name", "goal": "on", "assets": assets, "init_states": 50, "success_rate": rate}

    others = [row(f"libero_goal/{i}", rate, "libero:1") for i, rate in enumerate((1.0, 0.9, 0.7, 0.5))]
    rows = [row(f"libero_goal/{i}", rate, "standin:2") for i, rate in enumerate((0.88, 0.86, 0.9))]
    lines = demonstrator.comparison(others, rows).splitlines()
    # Newcombe's interval of 50 against 44 of 50: 0.12 lies in (0.02, 0.24)
    tasks = ("0 a name | on | 100 % | **88 %** |", "1 a name | on | 90 % | 86 % |", "2 a name | on | 70 % | **90 %** |")
    assert lines[2:4] == [f"| {suite} | 3 | 86.7 % | 88.0 % | 2 | 3 |" for suite in ("libero_goal", "all")]
    assert lines[5:] == ["| task | goal | libero:1 | standin:2 |", "|---|---|---|---|", *(f"| libero_goal/{t}" for t in tasks)]
    assert demonstrator.comparison(others[3:], rows) == "no task is in both"


@needs_warp
def test_the_demonstrator_does_the_same_on_both_backends(drawer_task):
    env = make_env(drawer_task)
    env.reset(seed=0)
    (goal,) = drawer_task.goal
    skill = SKILLS[goal.name]
    hold = skill.order(skill.holds(drawer_task, goal, env.data[0]))[0]
    ways, episodes = [Strategy(path, {"contact": hold, "path": path}) for path in ("direct", "over")], []
    policy = lambda env: fidelity.Scripted(env, ways, 0.1)  # noqa: E731
    row = fidelity.compare_backends(drawer_task, policy, [(0, 3), (1, 4)], 2, "cpu", episodes.append, max_steps=3)
    assert row == {"episodes": 2, "cpu": 0, "warp": 0, "difference": 0.0, "interval": row["interval"]} and len(episodes) == 4
    for cpu, warp in zip(*(sorted(half, key=lambda e: e.attrs["pattern"]) for half in (episodes[:2], episodes[2:])), strict=True):
        assert cpu.length == warp.length == 3
        np.testing.assert_allclose(warp.actions, cpu.actions, atol=1e-3)
        np.testing.assert_allclose(warp.final_state[1 : 1 + drawer_task.model.nq], cpu.final_state[1 : 1 + drawer_task.model.nq], atol=1e-4)
    assert np.abs(episodes[0].actions - episodes[1].actions).max() > 0.05


@pytest.mark.skipif(not hasattr(mujoco.mjtEnableBit, "mjENBL_SLEEP"), reason="needs MuJoCo 3.8 or later")
def test_throughput_compares_the_same_work(drawer_task):
    """Two environments, two and three steps, twice: five steps each time, of which LIBERO's stand-in says that they took 5 s."""
    seen = []

    def libero(cores, do, states, actions):
        seen.append((cores, do, len(states), [len(a) for a in actions]))
        return np.array([5.0, 2.5])

    def work(block, ours):
        return ours.prepare(np.array([block, block + 1])), [np.zeros((2, 7)), np.zeros((3, 7))]

    progress = Progress(interval=1e9)
    progress.stage("blocks", 1)
    speeds = throughput.take_turns(drawer_task, 2, [1], work, libero, throughput.Args(blocks=1), progress)
    assert seen == 2 * [(1, "run", 2, [2, 3])] and {name for name, _ in speeds} == {"libero", "ours", "sleep", "coarse", "limit"}
    (theirs,) = speeds["libero", 1]
    np.testing.assert_array_equal(theirs, [1.0, 2.0])
    assert all(speed.shape == (1, 2) and (speed > 0).all() for speed in map(np.array, speeds.values()))


def test_throughput_is_of_processor_time_on_one_core_and_of_the_clock_on_all():
    by_clocks = {"libero": [1.0, 2.0], "ours": [6.0, 10.0], "sleep": [12.0, 30.0], "limit": [8.0, 20.0]}
    speeds = {(name, c): [c * np.array(speed)] * 3 for name, speed in by_clocks.items() for c in (1, 2)}
    found = throughput.summarise(speeds, 2)
    assert (found["ours"], found["all_cores"]["ours"]) == (10.0, 12.0) and found["ratios"]["scaling"] == [1.0, 1.0, 1.0]
    ratios = {name: value[0] for name, value in found["ratios"].items()}
    assert ratios["sleep_over_libero"] == 15.0 and ratios["sleep_over_limit"] == 1.5 and ratios["ours_over_limit_all_cores"] == 0.75
    found |= {"reset_seconds": dict.fromkeys(RESETS, 0.001), "reset_ratios": dict.fromkeys(RESETS, 1.0)}
    lines = throughput.report({"task": found | {"demonstrations": throughput.summarise(speeds, 1)}}, 2).splitlines()
    assert lines[2].startswith("| task | 2 | 10 | 20 | 5.00 (5.00 to 5.00) | 0.50 (0.50 to 0.50) | 30 | 15.00 (15.00 to 15.00) | 1.50")
    assert lines[3].startswith("| task, 2 cores | 2 | 12 | 16 | 6.00") and lines[4].startswith("| task, demonstrations | 2 | 10 | 20 |")
    assert all(line.count("|") == 13 for line in lines[:5])


@needs_warp
@pytest.mark.parametrize("pixels", [False, True])
def test_throughput_of_warp(drawer_task, pixels, monkeypatch):
    monkeypatch.setattr(throughput, "SIZE", 16)
    args = throughput.Args(steps=1, blocks=1, worlds=[2], pixels=pixels)
    row = throughput.measure_warp(drawer_task, args, "cpu")[2]
    assert row["steps_per_second"] > 0 and row["startup_seconds"] > 0 and row["graph_seconds"] == 0.0
    speeds = {"libero": 1.0, "ours": 2.0}
    results = {drawer_task.id: {"warp": {2: row}, "all_cores": speeds, "steps_all_cores": {"ours": 2.0}}}
    _, head, _, line = throughput.report_warp(results, 4, pixels)
    assert line.startswith(f"| {drawer_task.id} | 2 | {row['steps_per_second']:.0f} |") and line.count("|") == head.count("|") == 9 + pixels
    assert ("pictures_per_second" in row) == ("pictures/s alone" in head) == pixels


def test_recognition_beside_the_truth(demos, drawer_task, assets, tmp_path, monkeypatch, capsys):
    """Of the drawer's two ways, far apart: 16 demonstrations to fit, 4 to name, as many of each way in both."""
    episodes, asked = read_episodes(demos, drawer_task), []
    monkeypatch.setattr(recognition, "load_or_collect", lambda *args, **how: asked.append((args[1:], how)) or episodes)
    flags = ["--tasks", "libero_goal/0", "--assets", assets, "--num-demos", "16", "--held-out", "4", "--seeds", "1"]
    flags += ["--figure", str(tmp_path / "dots.png")]
    monkeypatch.setattr(sys, "argv", ["recognition", *flags, "--json", str(tmp_path / "rows.json")])
    for _ in range(2):  # the second time from the file
        run_command(recognition.main)
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| libero_goal/0"))
        assert re.fullmatch(r"\| libero_goal/0 \| 2 \| 2 \| 1.00 \| 1.00 \| 1.00 \| 1.00 \| (1.00|0.9.) \| 1.00 \| 100% \|", line), line
        assert asked == [((20,), {"seed": recognition.DEMO_SEED, "physics": "sleep"})]
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["assets"] == drawer_task.assets and [seed["demonstrations"] for seed in row["seeds"]] == [[8, 8]]
    assert (tmp_path / "dots.png").read_bytes().startswith(b"\x89PNG")


def test_recognition_takes_sixty_tasks():
    names = recognition.sixty_tasks()
    assert (
        len(set(names)) == 60 and names[:2] == ["libero_spatial/0", "libero_spatial/1"] and names[-2:] == ["libero_90/81", "libero_90/85"]
    )


def test_recognition_reports_the_bar():
    def row(task, ours, told, strength):
        seed = {
            "k": 2,
            "prediction_strength": strength,
            "index": 1,
            "held_out_index": ours,
            "classifier_index": told,
            "bits": 1,
            "recognised": 1,
        }
        return {"task": task, "ways": 2, "seeds": [seed, seed | {"k": 3}]}

    lines = recognition.report(
        [row("a", 0.95, 1.0, 1.0), row("b", 0.8, 0.96, 0.9), row("libero_90/9", 0.45, 0.5, 0.8), row("d", 0.1, 0.9, 1.0)]
    )
    assert "| a | 2 | 2, 3 | 1.00 | 1.00 | 0.95 | 1.00 | 1.00 | 1.29 | 100% |" in lines
    bar = (
        "where the classifier has 0.95, Discover has 0.9 in {} tasks; elsewhere at least 0.85 of its index in {}. The weakest pattern kept"
    )
    assert "All: " + bar.format("1 of 2", "1 of 2") + " has 0.80." in lines
    assert "Not developed on: " + bar.format("1 of 2", "0 of 1") + " has 0.90." in lines


def test_the_classifier_that_is_told_the_truth_is_linear():
    rng = np.random.default_rng(0)
    x, normals = rng.normal(size=(400, 5)), rng.normal(size=(5, 3))
    truth = np.array(["a", "b", "c"])[(x @ normals).argmax(1)]
    assert (recognition.classify(x[:300], truth[:300], x[300:]) == truth[300:]).mean() > 0.85


def test_refused(capsys, tmp_path):
    for flags, message in (
        ("--part backends flags", "--part backends stands alone"),
        ("--part backends --episodes 0", "at least 1"),
        ("--part backends --device cpu --runs nowhere", "nowhere is not the folder of a finished run"),
    ):
        assert message in refused(fidelity, capsys, tmp_path, *flags.split())
    assert "can't be read as a file of --json" in refused(
        demonstrator, capsys, tmp_path, "--tasks", "libero_goal/0", "--beside", "nothing.json"
    )
    assert "name either --tasks or --suite" in refused(recognition, capsys, tmp_path, "--tasks", "libero_goal/0", "--suite", "libero_10")
    assert "name at least one HDF5 file" in refused(frames, capsys, tmp_path, "--out", str(tmp_path / "x.png"))
    with pytest.raises(UserError, match="is not the folder of a finished run"):
        fidelity.load_policy(tmp_path, None)
