"""Runs: whole files, checkpoints that run no code, resuming, one-line errors, progress without a terminal, rollouts."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from common import rollout, runs
from common.cli import UserError, atomic_path, run_command
from common.data import check_file, image_names, read_attrs
from common.job import Job, JobArgs, Trainer, gaps
from common.libero import make_env
from common.runs import (
    Progress,
    Run,
    load_checkpoint,
    make_run,
    resumed_args,
    rng_state,
    save_checkpoint,
    set_rng_state,
    versions,
    write_json,
)


@dataclasses.dataclass
class Args:
    seed: int = 1
    num_patterns: int | str = 8
    resume: str | None = None
    added_later: float = 0.5
    corpus_episodes: int = 20
    demos: str = "auto"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a file system with no space left."""
    folder = tmp_path / "full"
    folder.mkdir()
    if sys.platform != "linux" or os.getuid() != 0:
        pytest.skip("a full disk needs a tmpfs, which only root can mount")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    (folder / "config.json").write_text("earlier")
    try:
        with open(folder / "filling", "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
    except OSError as error:
        assert error.errno == errno.ENOSPC
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


# ---------------------------------------------------------------------------------------------- files


def test_atomic_path_keeps_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "folder" / "file.bin"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".bin"
        temporary.write_bytes(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one" and path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert tree(tmp_path) == {"folder/file.bin": b"one"}


def test_write_json_makes_plain_and_valid_json(tmp_path):
    content = {1: np.float32(0.5), "a": np.arange(3), "b": (np.nan, np.inf, -np.inf, True), "c": {"d": np.array([[1.0, np.nan]])}}
    write_json(tmp_path / "x.json", content)

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert read == {"1": 0.5, "a": [0, 1, 2], "b": [None, None, None, True], "c": {"d": [[1.0, None]]}}
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == read


@pytest.mark.parametrize("write", [write_json, save_checkpoint], ids=["json", "checkpoint"])
def test_full_disk_is_one_line_and_leaves_earlier_files(full_disk, write, capsys):
    before = tree(full_disk)
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: write(full_disk / "config.json", {"a": list(range(100_000))}))
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "No space left" in message and str(full_disk / "config.json") in message
    assert tree(full_disk) == before


# ---------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_round_trip_is_exact(tmp_path):
    generator = np.random.default_rng(3)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    content = {
        "script": "s",
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": generator.bit_generator.state,  # 128-bit integers
        "torch_rng": rng_state(torch.device("cpu")),
        "array": np.array([np.pi, np.nan]),
        "mixed": [1, (2.5, None), "text", np.float64(1 / 3), np.int64(-7), np.bool_(True)],
    }
    expected, noise = generator.normal(size=4), torch.rand(4)
    save_checkpoint(tmp_path / "c.pt", content)
    content["array"][:] = 0  # the file holds a copy
    loaded = load_checkpoint(tmp_path / "c.pt", "s")
    again = np.random.default_rng(0)
    again.bit_generator.state = loaded["rng"]
    np.testing.assert_array_equal(again.normal(size=4), expected)
    set_rng_state(loaded["torch_rng"], torch.device("cpu"))
    assert torch.equal(torch.rand(4), noise)
    np.testing.assert_array_equal(loaded["array"].numpy(), [np.pi, np.nan])
    assert loaded["mixed"] == [1, (2.5, None), "text", 1 / 3, -7, True]
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(loaded["model"])
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    torch.optim.Adam(other.parameters(), lr=1.0).load_state_dict(loaded["optimizer"])


class Boobytrap:
    def __reduce__(self):
        return (os.mkdir, ("boobytrap-went-off",))


def test_unreadable_and_foreign_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.pt"
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(path, "dlr_discover")
    save_checkpoint(path, {"script": "gaussian_ppo", "x": torch.zeros(1000)})
    with pytest.raises(UserError, match="is a checkpoint of gaussian_ppo, not of dlr_discover"):
        load_checkpoint(path, "dlr_discover")
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"not a checkpoint at all" * 20):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a readable checkpoint") as error:
            load_checkpoint(path, "gaussian_ppo")
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    torch.save(torch.zeros(3), path)
    with pytest.raises(UserError, match="another program"):
        load_checkpoint(path, "dlr_discover")
    for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))):
        save({"script": "dlr_discover", "x": Boobytrap()}, path)
        with pytest.raises(UserError, match="not a readable checkpoint"):
            load_checkpoint(path, "dlr_discover")
    assert not (tmp_path / "boobytrap-went-off").exists()


# ---------------------------------------------------------------------------------------------- run folders


def test_make_run_names_and_never_shares_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1234.9)
    first = make_run(str(tmp_path / "runs"), "libero_goal/some_task", "dlr_discover", Args(seed=5))
    assert first == tmp_path / "runs" / "libero_goal-some_task__dlr_discover__5__1234" and first.is_dir()
    second = make_run(str(tmp_path / "runs"), "libero_goal/some_task", "dlr_discover", Args(seed=5))  # in the same second
    assert second != first and second.is_dir() and second.name.rpartition("__")[0] == first.name.rpartition("__")[0]


@pytest.mark.parametrize("folder", ["file/runs", "file"])
def test_unusable_run_folder(tmp_path, folder):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="run folder.*--run-folder") as error:
        make_run(str(tmp_path / folder), "suite/task", "dlr_discover", Args())
    assert "\n" not in str(error.value)
    assert tree(tmp_path) == {"file": b"in the way"}


def stored_run(tmp_path, **content) -> Path:
    args = {"seed": 3, "num_patterns": 2, "resume": None, "gone_since": 7}
    write_json(tmp_path / "run" / "config.json", {"script": "dlr_discover", "args": args} | content)
    return tmp_path / "run"


@pytest.fixture
def resumed(tmp_path, monkeypatch):
    """The arguments of the stored run, when these flags are given beside --resume."""

    def resumed(*flags, run=None, script="dlr_discover"):
        run = run or tmp_path / "run"
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--resume", str(run), *flags])
        return resumed_args(run, script, Args)

    return resumed


def test_resumed_args_are_the_runs(tmp_path, resumed):
    run = stored_run(tmp_path)
    assert resumed() == Args(3, 2, str(run), 0.5)
    assert resumed("--seed", "3", "--num-patterns", "2") == Args(3, 2, str(run), 0.5)


def test_what_comes_after_training_may_change(tmp_path, resumed):
    run = stored_run(tmp_path)
    assert resumed("--corpus-episodes", "100") == Args(3, 2, str(run), 0.5, 100)
    assert resumed().corpus_episodes == 20


def test_where_the_data_lie_may_change(tmp_path, resumed):
    """They are compared by what is in them (see the fingerprints)."""
    stored_run(tmp_path, args={"seed": 3, "num_patterns": 2, "resume": None, "demos": "there.hdf5"})
    assert resumed().demos == "there.hdf5" and resumed("--demos", "here.hdf5").demos == "here.hdf5"


def test_resume_errors(tmp_path, resumed):
    run = stored_run(tmp_path)
    for k in (3, 8):  # 8 is the default, but not the run's
        with pytest.raises(UserError, match=f"was started with --num-patterns 2, not {k}; resume it without --num-patterns"):
            resumed("--num-patterns", str(k))
    with pytest.raises(UserError, match="was started with --added-later 0.5, not 0.7"):
        resumed("--added-later", "0.7")
    with pytest.raises(UserError, match="is a run of dlr_discover, not of gaussian_ppo"):
        resumed(script="gaussian_ppo")
    with pytest.raises(UserError, match="not a run folder"):
        resumed(run=tmp_path / "nowhere")
    for text in ("", "[]", "{}", '{"script": "dlr_discover", "args": 3}', "\x00"):
        (run / "config.json").write_text(text)
        with pytest.raises(UserError, match="not a run folder"):
            resumed()


@dataclasses.dataclass
class RunArgs(Args):
    run_folder: str = "runs"
    allow_mismatch: bool = False
    checkpoint_interval: int = 1
    target_kl: float = 1.0
    track: bool = False
    wandb_project_name: str = "rl-data-engine"
    wandb_entity: str | None = None


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Begin or resume a run with these flags, on assets "a"."""

    def begin(*flags, assets="a", name="suite/task"):
        monkeypatch.setattr(sys, "argv", ["dlr_discover.py", "--run-folder", str(tmp_path / "runs"), *map(str, flags)])
        run = Run("dlr_discover", RunArgs)
        run.open(name, depends={"assets": assets}, demos="scripted")
        return run

    handler = signal.getsignal(signal.SIGTERM)
    yield begin
    signal.signal(signal.SIGTERM, handler)


def let_go(run: Run) -> Run:
    """As if its process had ended."""
    run.writer.close()
    run._locked.close()
    return run


def test_a_run_is_continued_with_what_it_was_started_with(begin):
    run = let_go(begin("--target-kl", "inf", "--seed", "4"))
    run.save("learn", found=np.arange(3))
    again = let_go(begin("--resume", run.folder))
    assert (again.folder, again.stage, again.args.seed, again.args.target_kl) == (run.folder, "learn", 4, math.inf)
    np.testing.assert_array_equal(again.checkpoint["found"], [0, 1, 2])
    config = json.loads((run.folder / "config.json").read_text())
    assert (config["assets"], config["demos"], config["script"]) == ("a", "scripted", "dlr_discover")


def test_a_stage_is_kept_as_it_was(begin):
    """What goes on changing, in place, is not saved anew with the next stage: a resumed run would have the old one."""
    run, weights, counts = begin(), torch.nn.Linear(2, 1), np.zeros(2)
    run.save("learn", agent=weights.state_dict(), rest=[counts])
    expected = weights.weight.detach().clone()
    torch.nn.init.zeros_(weights.weight)
    counts += 1
    run.finish({}, "nothing")
    kept = load_checkpoint(let_go(run).folder / "checkpoint.pt", "dlr_discover")
    assert kept["stage"] == "done" and torch.equal(kept["agent"]["weight"], expected) and not kept["rest"][0].any()


def test_a_run_is_not_continued_on_other_assets_or_mujoco(begin, monkeypatch, capsys):
    run = let_go(begin())
    with pytest.raises(UserError, match="was started with assets a, and here it is b; .*--allow-mismatch") as error:
        begin("--resume", run.folder, assets="b")
    assert str(run.folder) in str(error.value)
    let_go(begin("--resume", run.folder, "--allow-mismatch", assets="b"))
    monkeypatch.setattr(runs, "versions", lambda: versions() | {"mujoco": "9.9.9", "torch": "9.9"})
    with pytest.raises(UserError, match="was started with mujoco .*, and here it is 9.9.9"):
        begin("--resume", run.folder)
    let_go(begin("--resume", run.folder, "--allow-mismatch"))
    assert "goes on with 9.9" in capsys.readouterr().err


def test_two_processes_do_not_share_a_run(begin):
    run = begin()
    with pytest.raises(UserError, match="another process is working on"):
        begin("--resume", run.folder)
    let_go(run)
    let_go(begin("--resume", run.folder))


def test_track_as_cleanrl_does(begin, monkeypatch):
    """The run under its folder's name, with its arguments; a resumed run goes on there; one that can't begin leaves nothing."""
    calls = []
    wandb = types.SimpleNamespace(init=lambda **given: calls.append(given), finish=lambda: calls.append("finish"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = let_go(begin("--track", "--wandb-project-name", "mine", "--wandb-entity", "we", "--seed", "4"))
    (given,) = calls
    assert (given["project"], given["entity"], given["name"], given["sync_tensorboard"]) == ("mine", "we", run.folder.name, True)
    assert given["config"]["seed"] == 4 and given["dir"] == str(run.folder)
    again = begin("--resume", run.folder)
    assert calls[1]["id"] == given["id"] == run.folder.name and calls[1]["resume"] == "allow"
    again.finish({}, "all is well")
    assert calls[2:] == ["finish"]
    let_go(again)
    let_go(begin("--resume", run.folder, "--no-track"))
    wandb.init = lambda **given: (_ for _ in ()).throw(RuntimeError("no account"))
    before = tree(run.folder.parent)
    with pytest.raises(UserError, match="--track: Weights & Biases says: no account; run wandb login, or set WANDB_MODE=offline"):
        begin("--track")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--track needs Weights & Biases .*; run: pip install wandb"):
        begin("--track")
    assert tree(run.folder.parent) == before and len(list(run.folder.parent.iterdir())) == 1


def test_track_with_wandb_itself(begin, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = begin("--track")
    run.log({"charts/some_number": 0.625}, 3)
    run.finish({}, "all is well")
    let_go(run)
    (log,) = run.folder.glob("wandb/offline-run-*/*.wandb")
    assert run.folder.name in log.name and b"charts/some_number" in log.read_bytes()


class Counting:
    """A trainer of 5 iterations that counts; `at` its second one, something happens."""

    num_iterations, agent = 5, torch.nn.Linear(1, 1)

    def __init__(self, at=lambda: None):
        self.iteration, self.history, self.at = 0, [], at

    @property
    def env_steps(self):
        return 10 * self.iteration

    def run_iteration(self):
        self.iteration += 1
        self.history.append(self.iteration)
        return {"losses/value_loss": (self.at() if self.iteration == 2 else None) or 0.5}

    def state_dict(self):
        return {"iteration": self.iteration, "history": self.history}

    def load_state_dict(self, state):
        self.iteration, self.history = state["iteration"], state["history"]


def test_sigterm_ends_a_run_with_its_work_saved(begin):
    run = begin("--checkpoint-interval", "100")
    with pytest.raises(SystemExit) as exit_:
        run.train(Counting(at=lambda: signal.raise_signal(signal.SIGTERM)), lambda logs: "")
    assert exit_.value.code == 143
    again = begin("--resume", let_go(run).folder)
    assert again.checkpoint["trainer"]["iteration"] == 2
    again.train(trainer := Counting(), lambda logs: "")
    assert trainer.history == [1, 2, 3, 4, 5] and again.stage == "roll out" and again.checkpoint["env_steps"] == 50
    with pytest.raises(SystemExit) as exit_:  # at other times, at once
        signal.raise_signal(signal.SIGTERM)
    assert exit_.value.code == 143
    let_go(again)


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(begin):
    run = begin()
    with pytest.raises(UserError, match=r"losses/value_loss is nan at step 20: training has diverged.*lower learning rate"):
        run.train(Counting(at=lambda: math.nan), lambda logs: "")
    assert load_checkpoint(let_go(run).folder / "checkpoint.pt", "dlr_discover")["trainer"]["iteration"] == 1


def test_weights_that_are_not_finite_are_never_saved(begin):
    """A gradient that is NaN in the last update of an iteration, whose losses are finite."""
    run, trainer = begin(), Counting(at=lambda: trainer.agent.weight.data.fill_(math.nan) and None)
    trainer.agent = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="weights are not finite after step 20, since a gradient was not.*lower learning rate"):
        run.train(trainer, lambda logs: "")
    assert load_checkpoint(let_go(run).folder / "checkpoint.pt", "dlr_discover")["trainer"]["iteration"] == 1


def test_success_that_training_and_evaluation_disagree_on_is_said():
    rows = [{"pattern": z, "success_rate": rate} for z, rate in ((0, 0.8), (1, 0.79), (3, 1.0), (4, 0.1))]
    lines = gaps(rows, [0.9, 0.9, 0.0, 0.7, math.nan])
    assert [line.partition(" in the last")[0] for line in lines] == [
        "warning: pattern 1 succeeded 90%",
        "warning: pattern 3 succeeded 70%",
    ]
    assert "and 79% in the evaluation" in lines[0]
    assert gaps([{"pattern": 0, "success_rate": 0.5}], [0.7])[0].startswith("warning: the policy succeeded 70%")


def test_a_resumed_run_logs_each_step_once(begin):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = begin("--checkpoint-interval", "2")
    with pytest.raises(RuntimeError):
        fail_at(run, 4)
    again = begin("--resume", let_go(run).folder)
    again.train(Counting(), lambda logs: "")
    events = EventAccumulator(str(let_go(again).folder))
    events.Reload()
    assert [event.step for event in events.Scalars("losses/value_loss")] == [10, 20, 30, 40, 50]


def test_a_run_that_is_killed_while_it_looks_whether_it_is_done_looks_again(begin):
    run, trainer, looks = begin(), Counting(), []

    def done() -> bool:
        looks.append(trainer.iteration)
        if len(looks) == 3:
            raise RuntimeError
        return trainer.iteration == 4

    with pytest.raises(RuntimeError):
        run.train(trainer, lambda logs: "", done)
    again, trainer = begin("--resume", let_go(run).folder), Counting()
    again.train(trainer, lambda logs: "", done)
    assert looks == [0, 1, 2, 2, 3, 4] and trainer.history == [1, 2, 3, 4]
    let_go(again)


def test_sigterm_while_it_looks_whether_it_is_done_ends_a_run_that_is(begin):
    run, trainer = begin("--checkpoint-interval", "100"), Counting()

    def done() -> bool:
        if trainer.iteration == 2:
            signal.raise_signal(signal.SIGTERM)
        return trainer.iteration == 2

    with pytest.raises(SystemExit) as exit_:
        run.train(trainer, lambda logs: "", done)
    assert exit_.value.code == 143
    again = let_go(begin("--resume", let_go(run).folder))
    assert again.stage == "roll out" and trainer.history == [1, 2]


def fail_at(run: Run, iteration: int) -> None:
    """Train, and be killed after `iteration` was logged and before it is saved."""
    trainer = Counting()

    def note(logs):
        if trainer.iteration == iteration:
            raise RuntimeError
        return ""

    run.train(trainer, note)


class Succeeding(Trainer):
    """A trainer of two patterns, of 30 iterations of 10 steps in 2 environments, whose episodes succeed at these `rates`."""

    def __init__(self, rates: list[float], stop_success: float | None):
        args = types.SimpleNamespace(total_steps=600, num_steps=10, seed=0, physics="exact", stop_success=stop_success)
        super().__init__(args, types.SimpleNamespace(num_envs=2, max_steps=40), torch.nn.Linear(1, 1), num_patterns=2)
        self.rates = rates

    def iterate(self):
        self.iteration += 1
        for outcomes, rate in zip(self.outcomes, self.rates, strict=True):
            outcomes.extend(np.arange(10) < round(10 * rate))
        return {"losses/value_loss": 0.5}


@pytest.mark.parametrize(
    "rates, evaluated, stop_success, stopped, looks",
    [
        ([0.9, 0.9], [0.9, 0.86], 0.88, 5, 1),  # after 50 episodes of each, longer than the 40 steps in which failures end
        ([1.0, 0.9], [1.0, 0.91], 0.95, 5, 1),  # a pattern may be 5 points lower
        ([0.9, 0.9], [1.0, 0.82], 0.88, 30, 13),  # one pattern too low in the evaluation: looked at again each fifteenth
        ([0.9, 0.9], [0.9, 0.84], 0.88, 30, 13),  # the mean too low
        ([0.9, 0.8], [1.0, 1.0], 0.88, 30, 0),
        ([1.0, 0.8], [1.0, 1.0], 0.88, 30, 0),
        ([1.0, 1.0], [1.0, 1.0], None, 30, 0),
    ],
)
def test_training_stops_when_training_and_evaluation_say_so(begin, monkeypatch, rates, evaluated, stop_success, stopped, looks):
    run, seen, finer, evaluated_in = begin("--checkpoint-interval", "1000"), [], [], []
    run.checkpoint["physics"] = "coarse"

    def evaluate(env, policy, patterns, each, progress, stage, passes, official):
        assert each == 50 and not official  # 100 in all; official init states are kept for the end
        seen.append(stage)
        return ([{"success_rate": rate} for rate in evaluated] if passes(evaluated) else None), []

    monkeypatch.setattr(rollout, "evaluate", evaluate)
    trainer = Succeeding(rates, stop_success)
    trainer.args.eval_episodes = 50
    eval_env = types.SimpleNamespace(reset=lambda seed: None, set_physics=evaluated_in.append)
    envs = {"eval_env": eval_env, "train_env": types.SimpleNamespace(set_physics=finer.append)}
    args = types.SimpleNamespace(**vars(trainer.args) | {"physics": "coarse"})  # of its environments; this trainer has none
    job = types.SimpleNamespace(run=run, args=args, **envs)
    Job.train(job, trainer, None, [0, 1], lambda logs: "")
    assert (trainer.iteration, len(seen)) == (stopped, looks)
    disagreed = looks > 1  # training succeeded, and the evaluation did not
    assert evaluated_in == ["sleep", "exact"] * looks  # and the one in the end is exact
    assert finer == ["sleep"] * disagreed and run.checkpoint["physics"] == ("coarse, then sleep" if disagreed else "coarse")
    assert run.stage == "roll out"
    let_go(run)


def test_a_run_from_before_there_was_a_choice_keeps_its_physics_and_its_steps():
    found = runs.stored_args(JobArgs, {"seed": 3, "gone": 1})
    assert (found.seed, found.physics, found.stop_success) == (3, "exact", None)
    assert runs.stored_args(JobArgs, {"physics": "sleep", "stop_success": 0.9}).physics == "sleep"


def test_revision_is_not_another_repositorys(tmp_path, monkeypatch):
    """A copy of the code inside somebody's repository doesn't record that repository's revision."""
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    commit = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "theirs"]
    subprocess.run(commit, cwd=tmp_path, check=True)
    (tmp_path / "copy" / "common").mkdir(parents=True)
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "copy" / "common" / "runs.py"))
    assert versions()["revision"] == "unknown"


def test_versions_name_what_results_depend_on():
    found = versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert {"python", "numpy", "mujoco", "hf-libero", "robosuite", "gymnasium", "revision"} <= set(found)
    assert all(found.values())


# ---------------------------------------------------------------------------------------------- commands and progress


def fail(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("what is wrong;\n what to do"), 2, "error: what is wrong; what to do\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "cannot write /x/y: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "cannot write /x: Permission denied"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 2, "error: the GPU's memory is full (CUDA out of memory. Tried)"),
        (RuntimeError("Too many open files. Communication with"), 2, "error: too many files are open in this process, which may have"),
        (RuntimeError("could not create a primitive"), 2, "error: the memory is full (could not create a primitive)"),
        (mujoco.FatalError("Could not allocate memory"), 2, "error: the memory is full (Could not allocate memory)"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_run_command_ends_in_one_line(capsys, error, code, line):
    with pytest.raises(SystemExit) as exit_:
        run_command(fail(error))
    assert exit_.value.code == code
    text = capsys.readouterr().err
    assert line in text and text.count("\n") == 1


def test_weights_of_another_version_end_in_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: torch.nn.Linear(2, 2).load_state_dict(torch.nn.Linear(3, 2).state_dict()))
    text = capsys.readouterr().err
    assert exit_.value.code == 2 and "weights don't fit this version of the code" in text and text.count("\n") == 1


def test_nothing_is_said_of_what_was_half_made(capfd, monkeypatch):
    """By torch: its iterator of a data set whose readers' pipes can't be opened lacks what its destructor asks for."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    class HalfMade:
        def __del__(self):
            raise AttributeError("_shutdown")

    def main():
        half_made = HalfMade()  # noqa: F841
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(SystemExit):
        run_command(main)
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "a bug", "/x")])
def test_run_command_leaves_bugs_their_traceback(error):
    with pytest.raises(type(error)):
        run_command(fail(error))


def test_progress_without_a_terminal_is_plain_lines(monkeypatch):
    stream, now = io.StringIO(), [1000.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    progress = Progress(interval=10.0)
    progress.stage("Learn", 100, done=20)  # 20 were done before this process
    for _ in range(40):
        now[0] += 1.0
        progress.update(1, "loss 0.5")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue() and 4 <= len(lines) <= 5  # one every 10 s
    assert "Learn  51%  loss 0.5" in lines[-1] and lines[-1].endswith("49 s left")  # 31 units took 31 s, 49 are left


# ---------------------------------------------------------------------------------------------- rollouts


def drawer_pusher(env):
    """A policy whose pattern 1 always succeeds, at the second step of an episode, and whose pattern 0 never does."""
    (goal,) = env.task.goal

    def policy(obs, patterns):
        assert obs.shape == env.observation_space.shape
        for i in np.flatnonzero(patterns == 1):
            if env._elapsed[i] == 1:
                env.data[i].qpos[goal.qpos[0]] = goal.threshold + goal.sign * 0.02
        return np.tile([0.0, 0, 0, 0, 0, 0, -1], (env.num_envs, 1))

    return policy


@pytest.fixture(scope="module")
def short_env(drawer_task):
    return make_env(drawer_task, 3, seed=0, max_steps=6, autoreset_mode=AutoresetMode.DISABLED)


def test_evaluate_runs_each_pattern_from_each_official_state(short_env):
    policy = drawer_pusher(short_env)
    rows, episodes = rollout.evaluate(short_env, policy, [0, 1], 4, Progress(interval=1e9), "evaluate")
    assert rows == [
        {"pattern": 0, "success_rate": 0.0, "episodes": 4, "mean_length": None},
        {"pattern": 1, "success_rate": 1.0, "episodes": 4, "mean_length": 2.0},
    ]
    assert [(e.attrs["pattern"], e.attrs["init_state"]) for e in episodes] == [(z, i) for i in range(4) for z in (0, 1)]
    for e in episodes:
        short_env.reset(options={"init_state": e.attrs["init_state"]})
        np.testing.assert_array_equal(e.states[0], short_env.get_state()[0])
        assert e.length == (2 if e.success else 6)


@pytest.mark.parametrize("least, ended", [(0.0, 8), (0.25, 7), (0.5, 5), (0.51, 3)])
def test_evaluation_ends_when_it_cannot_pass_any_more(short_env, least, ended):
    """Pattern 0 fails, and every other episode is one of its four: with its n-th failure its success is at most 1 - n / 4."""
    ended_so = []

    class Counting(Progress):
        def update(self, amount=1, note=""):
            ended_so.append(note)

    env, passes = make_env(short_env.task, 1, max_steps=6, autoreset_mode=AutoresetMode.DISABLED), lambda rates: rates[0] >= least
    rows, episodes = rollout.evaluate(env, drawer_pusher(env), [0, 1], 4, Counting(interval=1e9), "evaluate", passes)
    assert (rows is None) == (least > 0) and len(ended_so) == sum(e is not None for e in episodes) == ended


def test_corpus_is_successes_from_training_resets(short_env, drawer_task, tmp_path):
    policy = drawer_pusher(short_env)

    def collect(seed):
        return rollout.collect_corpus(short_env, policy, [0, 1], 5, seed, "dlr_discover", Progress(interval=1e9))

    corpus = collect(7)
    assert len(corpus) == 5 and all(e.success and e.attrs["pattern"] == 1 and e.attrs["init_state"] == -1 for e in corpus)
    assert len({e.states[0].tobytes() for e in corpus}) > 1
    again, other = collect(7), collect(8)
    assert all(np.array_equal(a.states, b.states) for a, b in zip(corpus, again, strict=True))
    assert not all(np.array_equal(a.states[0], b.states[0]) for a, b in zip(corpus, other, strict=True))
    rollout.write_corpus(tmp_path, drawer_task, corpus, {"script": "dlr_discover", "demos": "scripted"}, 32, None, Progress(interval=1e9))
    assert image_names(tmp_path / "corpus.hdf5") == ["agentview_rgb", "eye_in_hand_rgb"]
    assert check_file(tmp_path / "corpus.hdf5", drawer_task) == []
    attrs = read_attrs(tmp_path / "corpus.hdf5")
    assert attrs["script"] == "dlr_discover" and attrs["demos"] == "scripted" and attrs["version_mujoco"] == versions()["mujoco"]
    features = rollout.path_features(drawer_task, corpus)
    for e, x in zip(corpus, features, strict=True):
        assert len(x) == e.length
        np.testing.assert_array_equal(x[:, :3], e.proprio["ee_pos"])


def test_consistency_is_the_dispersion_that_action_noise_makes(short_env):
    policy = drawer_pusher(short_env)

    def measure(noise):
        return rollout.measure_consistency(short_env, policy, [1], 50, noise, 3, Progress(interval=1e9))

    assert measure(0.0) < 1e-9 < measure(0.1) < 0.01  # two steps of up to a few mm
    assert math.isnan(rollout.measure_consistency(short_env, policy, [0], 50, 0.1, 3, Progress(interval=1e9)))  # no success


@pytest.mark.parametrize("num_patterns, init_states, starts", [(1, 50, 10), (3, 50, 4), (8, 50, 2), (1, 3, 3), (1, 99, 10)])
def test_consistency_takes_ten_starts_or_as_many_as_are_evaluated(drawer_task, num_patterns, init_states, starts):
    assert rollout.same_starts(drawer_task, num_patterns, init_states) == (range(starts), 4)


def test_noise_leaves_the_gripper_alone():
    noisy = rollout.Disturbed(lambda obs, patterns: np.tile([0.0, 0, 0, 0, 0, 1, -1], (4000, 1)), 0.1, 0)(None, None)
    assert noisy[:, :5].std(0) == pytest.approx(0.1, rel=0.05) and (noisy[:, 6] == -1).all() and noisy.max() <= 1


def test_observations_of_stored_states_are_those_of_the_rollout(short_env, drawer_task):
    seen = []

    def watching(obs, patterns):
        seen.append(obs[0].copy())
        return drawer_pusher(short_env)(obs, patterns)

    (episode,) = rollout.roll_out(short_env, watching, [(0, 3)], lambda e: None)
    obs = rollout.trajectory_observations(drawer_task, episode)
    assert obs.shape == (7, short_env.observe.size)
    np.testing.assert_allclose(obs[:6], seen, atol=1e-6)
