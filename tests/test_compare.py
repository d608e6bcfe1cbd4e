"""The comparison's bookkeeping: which trajectories are compared, what the table says, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

import gaussian_ppo
from benchmarks import compare
from common import metrics
from common.cli import UserError
from common.data import Episode
from common.libero.make import choose_physics
from common.runs import write_json


def episode(pattern: int, strategy: int | None = None, name: str = "") -> Episode:
    attrs = {"pattern": pattern, "name": name} | ({} if strategy is None else {"strategy_index": strategy})
    return Episode(actions=np.zeros((3, 7)), states=np.zeros((3, 4)), proprio={}, success=True, attrs=attrs)


def test_patterns_take_turns_when_trajectories_are_left_out():
    corpus = [episode(pattern, name=f"{pattern}{n}") for pattern in range(3) for n in range(4)]
    assert [e.attrs["name"] for e in compare.equal_numbers(corpus, 7)] == ["00", "10", "20", "01", "11", "21", "02"]
    assert compare.patterns_of([episode(-1, 5), episode(2, 5), episode(-1)]) == [5, 2, 0]


def test_the_table_gives_means_and_intervals_over_seeds():
    rows = {"one": [{"success_rate": 0.5}], "three": [{"success_rate": x} for x in (0.8, 0.9, 1.0)]}
    line = next(line for line in compare.table(rows).splitlines() if line.startswith("| success, 50"))
    one, three = line.strip("| ").split(" | ")[1:]
    assert one == "50%" and three.startswith("90% (8") and three.endswith("to 100%)")
    assert compare.table(rows).splitlines()[0] == "| | one (1) | three (3) |"
    assert "| - | - |" in compare.table(rows)  # what nobody measured


def test_one_seed_has_the_interval_of_its_own_tries(monkeypatch):
    """The jackknife of a mean is the standard error of the mean; success has Wilson's interval."""
    x = np.array([1.0, 4.0, 2.0, 7.0, 5.0])
    monkeypatch.setattr(compare, "measure", lambda task, episodes: {"mean_jerk": np.mean(episodes)})
    row = compare.with_intervals(None, list(x), [{"success_rate": 0.9, "episodes": 50}, {"success_rate": 1.0, "episodes": 50}])
    half = 1.96 * x.std(ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(row["intervals"]["mean_jerk"], [x.mean() - half, x.mean() + half])
    np.testing.assert_allclose(row["intervals"]["success_rate"], metrics.wilson_interval(95, 100))
    line = next(line for line in compare.table({"one": [row | {"success_rate": 0.95}]}).splitlines() if "| success, 50" in line)
    assert line.endswith("| 95% (89% to 98%) |")
    assert "mean_jerk" not in compare.with_intervals(None, list(x[:2]))["intervals"]


def test_an_earlier_comparison_adds_seeds_and_columns(tmp_path):
    task, path = SimpleNamespace(id="libero_90/9", assets="libero:1"), tmp_path / "compare.json"
    curve = np.array([[100.0, 1.0, np.nan], [200.0, 2.0, 0.5]])
    old = {"demonstrations, scripted": compare.Column([0], [{}], [])}
    old |= {name: compare.Column([2, 3], [{"success_rate": 0.5}, {"success_rate": 0.7}], [curve, curve]) for name in ("a", "b")}
    content = {
        "task": task.id,
        "assets": task.assets,
        "trajectories": 20,
        "columns": {name: dataclasses.asdict(column) for name, column in old.items()},
    }
    write_json(path, content)
    columns = {"a": compare.Column([1], [{"success_rate": 0.9}], [curve])}
    compare.merge(columns, compare.load_comparison(path, task), path)
    assert columns["a"].seeds == [1, 2, 3] and columns["b"].seeds == [2, 3] and set(columns) == {"a", "b"}
    np.testing.assert_array_equal(columns["b"].curves[1], curve)
    assert "70% (50% to 90%)" in compare.table({name: column.rows for name, column in columns.items()})
    with pytest.raises(UserError, match="seed 2 of a is in .* and given besides"):
        compare.merge(columns, compare.load_comparison(path, task), path)
    for other, message in (
        (("libero_90/7", "libero:1"), "on libero_90/9, not on libero_90/7"),
        ((task.id, "standin:1"), "on libero:1, not on"),
    ):
        with pytest.raises(UserError, match=message):
            compare.load_comparison(path, SimpleNamespace(id=other[0], assets=other[1]))
    path.write_text("[]")
    with pytest.raises(UserError, match="is not a comparison's compare.json"):
        compare.load_comparison(path, task)


def run_with(script: str, **flags) -> compare.Run:
    return compare.Run(script, flags["seed"], {"args": flags}, {}, [], np.zeros((0, 3)))


def test_runs_of_one_script_are_told_apart_by_the_flags_in_which_they_differ():
    runs = [run_with("diffusion_ppo", seed=seed, run_folder=f"r{seed}", train_steps=x, chunk=4) for seed in (1, 2) for x in ("one", "all")]
    runs.append(run_with("gaussian_ppo", seed=3, chunk=8))
    names = [f"diffusion_ppo --train-steps {x}" for x in ("one", "all")]
    assert compare.column_names(runs) == [*names, *names, "gaussian_ppo"]


def test_the_learning_curve_is_what_the_run_logged(tmp_path):
    assert compare.learning_curve(tmp_path).shape == (0, 3)
    with SummaryWriter(str(tmp_path)) as writer:
        for step, success in ((100, 0.25), (200, 0.5), (100, 0.75)):  # the first step again, after a resume
            for tag, value in (("success", success), ("rollout_seconds", 50.0), ("update_seconds", 10.0)):
                writer.add_scalar(f"charts/{tag}", value, step)
    np.testing.assert_allclose(compare.learning_curve(tmp_path), [[100, 1, 0.75], [200, 2, 0.5]])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "not a finished run"),
        ({"config.json": {"script": "gaussian_ppo", "args": {"seed": 1}}}, "not a finished run"),
        ({"config.json": {"script": "vla_pretrain", "args": {"seed": 1}}, "summary.json": {}}, "a run of vla_pretrain"),
    ],
)
def test_what_is_no_finished_run_is_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        compare.load_run(tmp_path)


@pytest.mark.parametrize("flags", [[], ["run", "--task", "libero_90/9"]])
def test_runs_or_a_task_not_both_and_not_neither(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["compare", *flags])
    with pytest.raises(UserError, match="give run folders, or --task"):
        compare.main()


def test_runs_with_other_flags_are_not_taken_for_those_with_the_default_ones(monkeypatch, tmp_path):
    """Finished ones are kept, stopped ones resumed, both only if their flags are the script's own."""
    calls = []

    def run(words):
        calls.append(words[1:])
        made("made", {})
        return SimpleNamespace(returncode=0)

    def made(name, args, finished=True):
        folder = tmp_path / f"suite-task__gaussian_ppo__1__{name}"
        folder.mkdir()
        args = {"task": "suite/task", "seed": 1, "run_folder": str(tmp_path), "device": "cpu", "backend": "cpu", "videos": False} | args
        usual = dataclasses.asdict(gaussian_ppo.Args(stop_success=None, physics=choose_physics("auto", "cpu")))
        args = usual | args
        write_json(folder / "config.json", {"script": "gaussian_ppo", "args": args})
        if finished:
            write_json(folder / "summary.json", {})
        return folder

    monkeypatch.setattr(compare.subprocess, "run", run)
    args = compare.Args(task="suite/task", run_folder=str(tmp_path), scripts=["gaussian_ppo"])
    task = SimpleNamespace(id="suite/task")
    for k, other in enumerate(({"gamma": 0.99}, {"stop_success": 0.95}, {"physics": "another"})):
        made(f"other{k}", other)
    stopped = made("stopped", {}, finished=False)
    made("unreadable", {})
    (tmp_path / "suite-task__gaussian_ppo__1__unreadable" / "config.json").write_text("{")
    (found,) = compare.run_scripts(args, task)
    assert found.name.endswith("made") and calls == [["gaussian_ppo.py", "--resume", str(stopped)]]
    assert compare.run_scripts(args, task) == [found] and len(calls) == 1
