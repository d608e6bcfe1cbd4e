"""The evaluation loop against replayed demonstrations, and fine-tuning from a bare corpus to results.json."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import h5py
import mujoco
import numpy as np
import pytest
import torch

import vla_finetune
import vla_pretrain
from common.cli import UserError
from common.data import read_episodes
from common.data import vla as vla_data
from common.demos import SKILLS, Attempt, Strategy, perform
from common.libero import make_env
from common.libero.renderers import available, make_renderer
from common.libero.step import NO_OP
from common.metrics import wilson_interval
from common.runs import Progress
from common.suites import MAX_STEPS, SUITES, expand, instruction, task_names
from common.vla_model import VLA, load_model, save_model
from tests.test_vla_pretrain import micro, opened, run_main, same, write_pictures  # noqa: F401  (micro is a fixture)
from vla_finetune import Args, ModelPolicy, check_match, evaluate, summarise


@pytest.fixture(scope="module")
def official(drawer_task) -> dict[int, object]:
    """A successful demonstration from each of some official init states among the first three."""
    env = make_env(drawer_task)
    env.reset(seed=0)
    (goal,) = drawer_task.goal
    skill = SKILLS[goal.name]
    way = skill.repertoire(drawer_task, goal, env.data[0], skill.holds(drawer_task, goal, env.data[0]))[0].factors
    queue = [Attempt(i, Strategy("a way", way), [0, i], i) for i in (2, 0)]
    done = perform(drawer_task, lambda: queue.pop() if queue else None, 0.05, 2)
    found = {attempt.key: episode for attempt, episode in done if episode.success}
    assert found
    return found


@pytest.fixture(scope="module")
def corpus(demos, drawer_task, assets, tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("corpus") / "corpus.hdf5", drawer_task, read_episodes(demos)[:6], 32, assets)


@pytest.fixture
def short(monkeypatch, official):
    """A step cap that the demonstrations just keep."""
    cap = max(e.length for e in official.values()) + 3
    monkeypatch.setitem(MAX_STEPS, "libero_goal", cap)
    return cap


def replay(official, chunk: int, log: list):
    """A policy that knows the demonstrations by heart, and does nothing where there is none."""

    def policy(images, proprio, init_states, steps):
        log.extend(zip(images, proprio, init_states, steps, strict=True))
        plans = np.tile(NO_OP, (len(images), chunk, 1))
        for plan, i, t in zip(plans, init_states, steps, strict=True):
            actions = official[i].actions[t : t + chunk] if i in official else plan[:0]
            plan[: len(actions)] = actions
        return plans

    return policy


@pytest.mark.parametrize("num_envs, replan", [(2, 5), (3, 8)])
def test_a_replayed_demonstration_succeeds(drawer_task, official, short, num_envs, replan):
    """And what the policy is shown on the way is what a corpus of these demonstrations holds."""
    camera = make_renderer(drawer_task.model, tuple(vla_data.CAMERAS.values()), 32, 32)
    log, ended = [], []
    trials = evaluate(drawer_task, replay(official, 8, log), camera, 3, num_envs, replan, ended.append)
    assert [t.init_state for t in trials] == [0, 1, 2] and len(ended) == 3
    assert [t.success for t in trials] == [i in official for i in range(3)]
    assert [len(t.qpos) for t in trials] == [official[i].length if i in official else short for i in range(3)]
    nq = drawer_task.model.nq
    for i, e in official.items():
        np.testing.assert_array_equal(trials[i].qpos, e.states[:, 1 : 1 + nq])  # bit for bit
        seen = [(images, proprio, t) for images, proprio, k, t in log if k == i]
        assert [t for *_, t in seen] == list(range(0, e.length, replan))
        for images, proprio, t in seen[1:3]:
            after = {name: camera.render(e.states[t : t + 1, 1 : 1 + nq])[c][0] for name, c in vla_data.CAMERAS.items()}
            np.testing.assert_array_equal(images, np.stack([after["agentview_rgb"], after["eye_in_hand_rgb"]]))
            stored = np.concatenate([e.proprio[name][t - 1] for name in ("ee_pos", "ee_ori", "gripper_states")])
            np.testing.assert_allclose(proprio, stored, atol=1e-12)
    row = summarise(drawer_task, trials)
    assert row["successes"] == len(official) and row["interval"] == wilson_interval(len(official), 3)
    assert row["mean_length"] == np.mean([e.length for e in official.values()])


@pytest.mark.skipif(mujoco.__version__ < "3.8", reason="MuJoCo Warp needs mujoco 3.8 or later")
def test_trials_on_warp(drawer_task, monkeypatch):
    """--backend warp, on Warp's CPU device: trials begin as on the CPU backend, and end."""
    monkeypatch.setitem(MAX_STEPS, "libero_goal", 2)
    camera = make_renderer(drawer_task.model, tuple(vla_data.CAMERAS.values()), 16, 16)
    both = [evaluate(drawer_task, replay({}, 8, []), camera, 2, 2, 8, lambda trial: None, backend=b, device="cpu") for b in ("cpu", "warp")]
    for cpu, warp in zip(*both, strict=True):
        assert warp.init_state == cpu.init_state and not warp.success and len(warp.qpos) == 2
        np.testing.assert_allclose(warp.qpos, cpu.qpos, atol=1e-5)


def test_trials_begin_as_published_evaluations_do(drawer_task, short):
    """From the official init states in order, after ten no-ops."""
    camera = make_renderer(drawer_task.model, tuple(vla_data.CAMERAS.values()), 16, 16)
    trials = evaluate(drawer_task, replay({}, 8, []), camera, 2, 1, 8, lambda trial: None)
    for i, trial in enumerate(trials):
        env = make_env(drawer_task, settle_steps=0)
        env.reset(options={"init_state": i})
        for _ in range(10):
            env.step(NO_OP[None])
        np.testing.assert_allclose(trial.qpos[0], env.get_state()[0, 1 : 1 + drawer_task.model.nq], atol=1e-9)


def test_a_models_actions_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    model = VLA("flow", "tiny", 4, 32, 30)
    model.fit({"proprio_mean": [0] * 8, "proprio_std": [1] * 8, "action_low": [-1] * 7, "action_high": [1] * 7})
    torch.nn.init.normal_(model.head.out.weight, std=0.1)
    policy = ModelPolicy(model, "open the drawer", seed=3)
    images, proprio = np.random.default_rng(0).integers(0, 255, (4, 2, 32, 32, 3), np.uint8), np.zeros((4, 8))
    whole = policy(images, proprio, np.array([5, 6, 7, 7]), np.array([0, 0, 0, 8]))
    one = policy(images[2:3], proprio[2:3], np.array([7]), np.array([0]))
    np.testing.assert_allclose(one, whole[2:3], atol=1e-5)
    assert whole.shape == (4, 4, 7) and np.abs(whole).max() <= 1 and set(np.abs(whole[..., 6]).ravel()) == {1.0}
    noisy = policy(images[:1].repeat(2, 0), proprio[:2], np.array([1, 2]), np.array([0, 0]))
    assert not np.allclose(noisy[0], noisy[1])


def test_what_a_task_is_told_is_its_bddl_files(drawer_task):
    """And not its file's name: in 29 of the 130 tasks they differ, as docs/vla_finetune.md says."""
    assert drawer_task.language == instruction("libero_goal", 0) == "open the middle layer of the drawer"
    by_name = {s: [re.sub(r"^[A-Z0-9_]+SCENE\d+_", "", name).replace("_", " ").lower() for name in task_names()[s]] for s in SUITES}
    differ = {s: sum(instruction(s, i) != name for i, name in enumerate(names)) for s, names in by_name.items()}
    assert differ == {"libero_spatial": 10, "libero_object": 10, "libero_goal": 5, "libero_10": 0, "libero_90": 4}


def test_expand_suites_and_tasks(drawer_task):
    found = expand(["libero_goal", "libero_goal/0", "libero_90/9"])
    assert len(found) == 11 and found[0] == drawer_task.id and found[-1].startswith("libero_90/")
    with pytest.raises(UserError, match="unknown task"):
        expand(["libero_gaol"])


def test_mismatches_are_errors_unless_allowed(drawer_task):
    here = {"mujoco": mujoco.__version__, "task": drawer_task.id, "language": "open the middle layer of the drawer"}
    elsewhere = {"mujoco": "unknown", "task": "libero_goal/another", "language": "do something else"}
    good = {"renderer": "warp", "assets": drawer_task.image_assets, "corpora": [here, elsewhere]}
    said = []
    check_match(good, drawer_task, "warp", False, said.append)
    assert not said
    cases = {
        "renderer gl in training, warp here": good | {"renderer": "gl"},
        "assets other in training": good | {"assets": "other"},
        "mujoco 2.3.7": good | {"corpora": [here | {"mujoco": "2.3.7"}]},
        "instruction open the middle drawer of the cabinet in training, open the middle layer of the drawer here": good
        | {"corpora": [here | {"language": "open the middle drawer of the cabinet"}]},
    }
    for message, meta in cases.items():
        with pytest.raises(UserError, match=f"{message}.*--allow-mismatch"):
            check_match(meta, drawer_task, "warp", False, said.append)
        check_match(meta, drawer_task, "warp", True, said.append)
        assert message in said.pop()


def test_both_scripts_train_alike(corpus, tmp_path):
    """Each has a loop of its own; from the same weights, with the same flags, they end in the same weights."""
    parts = vla_data.split(vla_data.read_corpora([corpus]), 0.2, 1)
    training, validation = (vla_data.Chunks(part, 4) for part in parts)
    start = VLA("flow", "tiny", 4, 32, 30).fit(training.statistics())
    flags = {"eval_interval": 3, "accumulate": 2, "ema": 0.5, "max_grad_norm": 0.1, "weight_decay": 0.1}
    found = []
    for script in (vla_pretrain, vla_finetune):
        model = copy.deepcopy(start)
        with opened(script, tmp_path / script.__name__, **flags) as run:
            results = script.train(run.args, model, training, validation, 4, run, {})
        found.append((model.state_dict(), results["validation"]))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1] and not same(found[0][0], start.state_dict())


# ---------------------------------------------------------------------------------------------- the whole job


@pytest.fixture
def flags(corpus, tmp_path, assets):
    values = {"data": corpus, "batch-size": 4, "epochs": 0.03, "num-workers": 0, "torch-threads": 1, "trials": 2, "num-envs": 2}
    values |= {"size": "tiny", "chunk": 4, "replan": 4, "videos": 0, "assets": assets, "run-folder": tmp_path / "runs"}
    return [str(x) for name, value in values.items() for x in (f"--{name}", value)]


def main(monkeypatch, *flags: str) -> None:
    run_main(monkeypatch, vla_finetune, *flags)


def without(flags: list[str], *names: str) -> list[str]:
    return [x for flag, value in zip(flags[::2], flags[1::2], strict=True) if flag[2:] not in names for x in (flag, value)]


def test_from_demonstrations_to_results(flags, tmp_path, monkeypatch, drawer_task):
    monkeypatch.setitem(MAX_STEPS, "libero_goal", 9)
    main(monkeypatch, *flags)
    (run,) = (tmp_path / "runs").iterdir()
    results = json.loads((run / "results.json").read_text())
    (row,) = results["tasks"]
    assert row["task"] == drawer_task.id and row["trials"] == 2 and row["interval"] == list(wilson_interval(row["successes"], 2))
    assert results["training"]["steps"] >= 1 and results["protocol"]["no_ops"] == 10 and results["renderer"] == "warp"
    model, meta = load_model(run)
    assert meta["tasks"] == [drawer_task.id] and meta["pretrained"] == {} and model.config["head"] == "flow"

    with monkeypatch.context() as patch:
        patch.setattr(vla_finetune, "evaluate", None)  # resumed: what has been evaluated is not again
        main(patch, "--resume", run)
    assert json.loads((run / "results.json").read_text())["tasks"] == [row]

    again = without(flags, "data", "size", "chunk", "run-folder", "epochs", "batch-size")
    main(monkeypatch, "--checkpoint", run, "--eval-only", "--run-folder", tmp_path / "eval", *again)
    (evaluated,) = (tmp_path / "eval").iterdir()
    (second,) = json.loads((evaluated / "results.json").read_text())["tasks"]
    assert second | {"seconds": row["seconds"]} == row and results["suites"]["libero_goal"]["trials"] == 2  # the same numbers
    main(monkeypatch, "--checkpoint", run, *without(flags, "size", "run-folder"), "--run-folder", tmp_path / "tuned")
    (tuned,) = (tmp_path / "tuned").iterdir()
    first, second = model.state_dict(), load_model(tuned)[0].state_dict()
    assert not same(first, second) and torch.equal(first["action_low"], second["action_low"])  # the checkpoint's statistics


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--head", "tokens"], "has --head flow, not tokens"),
        (["--chunk", "6"], "has --chunk 4, not 6"),
        (["--size", "small"], "has --size tiny, not small"),
        (["--crop", "0.6"], "has --crop 30, not 20"),
        (["--backend", "warp"], "--backend warp: torch finds no GPU here"),
        (["--replan", "5"], "--replan 5 is more than the 4 actions of a chunk"),
        (["--trials", "51"], "--trials must be between 1 and 50, not 51"),
        (["--num-envs", "0"], "--num-envs must be at least 1"),
        (["--tasks", "libero_gaol"], "unknown task"),
        (["--eval-only"], "--eval-only does not train, so it takes no --data"),
        (["--checkpoint", "nowhere"], "nowhere.* does not exist"),
    ],
)
def test_flags_that_cannot_work(flags, monkeypatch, tmp_path, changes, message, corpus):
    corpora = vla_data.read_corpora([corpus])
    model = VLA("flow", "tiny", 4, 32, 30).fit(vla_data.Chunks(corpora, 4).statistics())
    meta = {"renderer": corpora[0].renderer, "assets": corpora[0].assets, "corpora": vla_data.describe(corpora), "tasks": []}
    save_model(tmp_path / "model.pt", model, meta)
    with pytest.raises(UserError, match=message) as error:
        main(monkeypatch, "--checkpoint", tmp_path, *flags, *changes)
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


def test_pictures_of_another_size(flags, monkeypatch, tmp_path, demos, drawer_task, assets):
    save_model(tmp_path / "model.pt", VLA("flow", "tiny", 4, 32, 30), {})
    smaller = write_pictures(tmp_path / "smaller.hdf5", drawer_task, read_episodes(demos)[:2], 16, assets)
    with pytest.raises(UserError, match="image size mismatch: .* takes pictures of 32 x 32, the data has 16 x 16"):
        main(monkeypatch, "--checkpoint", tmp_path, *without(flags, "data", "size"), "--data", smaller)
    with pytest.raises(UserError, match="--eval-only needs the --checkpoint or the --policy"):
        main(monkeypatch, "--eval-only")


def test_pictures_by_an_unknown_renderer(flags, corpus, monkeypatch, tmp_path):
    """LIBERO's own files don't say what drew their pictures: the evaluation has to be told."""
    human = shutil.copy(corpus, tmp_path / "human.hdf5")
    with h5py.File(human, "a") as file:
        del file["data"].attrs["renderer"]
    with pytest.raises(UserError, match="what drew the pictures is not recorded: name it with --renderer") as error:
        main(monkeypatch, *without(flags, "data"), "--data", human)
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


@pytest.mark.skipif(not available()[0], reason=available()[1])
def test_videos_of_successes_and_failures(drawer_task, tmp_path):
    nq = drawer_task.model.nq
    path = np.repeat(drawer_task.init_states[:1, 1 : 1 + nq], 2, axis=0)
    trials = [vla_finetune.Trial(i, i % 2 == 0, path) for i in range(4)]
    vla_finetune.make_videos(tmp_path, drawer_task, trials, 1, "warp")
    names = sorted(p.name.partition("__")[2] for p in (tmp_path / "videos").iterdir())
    assert names == ["failure_1.mp4", "success_0.mp4"]


def test_tasks_that_are_done_are_kept(tmp_path, drawer_task, assets):
    """An evaluation that was stopped goes on with the tasks that are missing."""
    row = {"task": drawer_task.id, "successes": 1, "trials": 2}
    results = {"tasks": [row]}
    vla_finetune.evaluate_tasks(Args(assets=assets), None, [drawer_task.id], tmp_path, results, Progress(1e9))
    assert results == {"tasks": [row]}
