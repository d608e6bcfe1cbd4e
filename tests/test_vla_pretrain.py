"""Chunks out of corpora against the files and the renderer, both action heads against closed forms, training that resumes exactly."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import mujoco
import numpy as np
import pytest
import torch

import vla_pretrain
from common import vla_training
from common.cli import UserError
from common.data import read_episodes, write_episodes
from common.data import vla as vla_data
from common.data.vla import Chunks, Order, read_corpora
from common.libero.render import add_images
from common.libero.renderers import make_renderer
from common.runs import load_checkpoint
from common.vla_model import SIZES, VLA, FlowHead, Size, TokenHead, crop_images, load_model, save_model
from common.vla_training import SharedRun, draws
from vla_pretrain import Args, learning_rate, train

TINY = SIZES["tiny"]
MICRO = Size(32, 2, 1, 1, 2, (16, 16, 32, 32), (0, 0, 1, 0))
ROOT = Path(vla_pretrain.__file__).parent


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    """A tiny model that is smaller still, and one thread: results must not depend on it, but time does."""
    monkeypatch.setitem(SIZES, "tiny", MICRO)
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def write_pictures(path: Path, task, episodes, size: int, assets: str) -> Path:
    """Episodes with pictures of `size`, as python -m common.libero.render makes them."""
    write_episodes(path, episodes, task, {"script": "common.demos", "assets": task.assets, "mujoco": mujoco.__version__})
    add_images(path, size, assets=assets)
    return path


@pytest.fixture(scope="module")
def corpus(demos, drawer_task, assets, tmp_path_factory) -> Path:
    """Six demonstrations of the drawer task with pictures of 32 x 32."""
    folder = tmp_path_factory.mktemp("corpus")
    return write_pictures(folder / "corpus.hdf5", drawer_task, read_episodes(demos)[:6], 32, assets)


def micro_model(corpora, head="flow", chunk=4, seed=0) -> VLA:
    torch.manual_seed(seed)
    return VLA(head, "tiny", chunk, 32, 30).fit(Chunks(corpora, chunk).statistics())


# ---------------------------------------------------------------------------------------------- samples


def test_a_sample_is_what_was_seen_and_what_followed(corpus, drawer_task):
    corpora = read_corpora([corpus])
    chunks = Chunks(corpora, chunk=8)
    episodes = read_episodes(corpus)
    assert corpora[0].task == drawer_task.id and corpora[0].language == drawer_task.language and corpora[0].image_size == 32
    assert len(chunks) == sum(e.length - 1 for e in episodes)  # the first action of an episode has no picture before it
    camera = make_renderer(drawer_task.model, width=32, height=32)
    first = 0
    for e in episodes[:2]:
        for t in (1, 7, e.length - 1):
            sample = {name: value[0] for name, value in chunks[[first + t - 1]].items()}
            seen = camera.render(e.states[t : t + 1, 1 : 1 + drawer_task.model.nq])  # what evaluation renders in that state
            np.testing.assert_array_equal(sample["images"][0], seen["agentview"][0])
            np.testing.assert_array_equal(sample["images"][1], seen["robot0_eye_in_hand"][0])
            proprio = [e.proprio[name][t - 1] for name in ("ee_pos", "ee_ori", "gripper_states")]
            np.testing.assert_allclose(sample["proprio"], np.concatenate(proprio), rtol=1e-6)
            left = min(8, e.length - t)
            np.testing.assert_allclose(sample["actions"][:left], e.actions[t : t + left], rtol=1e-6)
            assert sample["mask"].tolist() == [1.0] * left + [0.0] * (8 - left) and not sample["actions"][left:].any()
        first += e.length - 1


def test_statistics_are_those_of_the_whole(corpus):
    episodes = read_episodes(corpus)
    proprio = np.concatenate([np.concatenate([e.proprio[k] for k in ("ee_pos", "ee_ori", "gripper_states")], axis=1) for e in episodes])
    actions = np.concatenate([e.actions for e in episodes])
    found = Chunks(read_corpora([corpus]), 8).statistics()
    np.testing.assert_allclose(found["proprio_mean"], proprio.mean(0), atol=1e-9)
    np.testing.assert_allclose(found["proprio_std"], proprio.std(0), atol=1e-6)
    np.testing.assert_allclose(found["action_low"], np.quantile(actions, 0.01, axis=0, method="inverted_cdf"), atol=2e-3)
    np.testing.assert_allclose(found["action_high"], np.quantile(actions, 0.99, axis=0, method="inverted_cdf"), atol=2e-3)


def test_an_epoch_shows_each_corpus_by_its_weight():
    order = Order([30, 20, 8], [1.0, 2.0, 0.5], batch_size=7, seed=3)
    assert order.steps_per_epoch == (30 + 40 + 4) // 7
    rows = [order.batch(step) for step in range(2 * order.steps_per_epoch)]
    for epoch in range(2):
        seen = np.bincount(np.concatenate(rows[epoch * order.steps_per_epoch :][: order.steps_per_epoch]), minlength=58)
        assert seen.sum() == 70 and seen[:30].max() == 1 and seen[30:50].max() == 2 and seen[50:].max() == 1
        assert seen[:30].sum() >= 26 and seen[30:50].sum() >= 36 and seen[50:].sum() <= 4  # four of 74 are left over
    assert not np.array_equal(rows[0], rows[order.steps_per_epoch])
    again = Order([30, 20, 8], [1.0, 2.0, 0.5], batch_size=7, seed=3)
    np.testing.assert_array_equal(again.batch(13), rows[13])  # without the steps before
    assert sorted(np.bincount(Order([3], [1.0], 8, 0).batch(0))) == [2, 3, 3]  # less than a batch: repeated


def test_split_is_by_episode_and_max_episodes_nests(corpus):
    whole = read_corpora([corpus])
    training, validation = vla_data.split(whole, 0.3, seed=5)
    assert len(validation[0].demos) == 2 and set(training[0].demos) | set(validation[0].demos) == set(whole[0].demos)
    assert not set(training[0].demos) & set(validation[0].demos)
    assert vla_data.split(whole, 0.0, seed=5)[1][0].demos == []
    three, four = (set(read_corpora([corpus], n, seed=2)[0].demos) for n in (3, 4))
    assert len(three) == 3 and len(four) == 4 and three < four


def test_draws_depend_on_seed_and_step_alone():
    a, b, c = draws(1, 7, 6, 4, 2), draws(1, 7, 6, 4, 2), draws(1, 8, 6, 4, 2)
    assert all(torch.equal(a[k], b[k]) and not torch.equal(a[k], c[k]) for k in a)
    assert a["crop"].min() >= 0 and draws(1, 0, 500, 4, 2)["crop"].max() == 2


def test_crop_is_a_slice():
    images = torch.randint(0, 255, (3, 9, 9, 3), dtype=torch.uint8)
    offsets = torch.tensor([[0, 0], [2, 1], [1, 2]])
    found = crop_images(images, offsets, 7)
    for image, (i, j), x in zip(images, offsets, found, strict=True):
        assert torch.equal(x.permute(1, 2, 0), image[i : i + 7, j : j + 7])


# ---------------------------------------------------------------------------------------------- the action heads


def fit(head, batch, steps: int, lr: float, size: int = 256):
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    memory = torch.zeros(size, 1, MICRO.width)
    for _ in range(steps):
        actions, noise, uniform = batch(size)
        loss = head.loss(memory, actions, torch.ones(actions.shape[:2]), noise, uniform)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def test_flow_of_a_gaussian_target():
    """For A ~ N(m, s^2) the optimal velocity is known, and integrates noise to N(m, s^2)."""
    torch.manual_seed(0)
    mean, std = torch.tensor([[0.5, -0.3]]), torch.tensor([[0.2, 0.6]])  # a chunk of one action of two numbers
    head = FlowHead(1, 2, MICRO)
    fit(head, lambda n: (mean + std * torch.randn(n, 1, 2), torch.randn(n, 1, 1, 2), torch.rand(n, 1)), steps=600, lr=3e-3)
    memory = torch.zeros(2000, 1, MICRO.width)
    x = torch.randn(2000, 1, 2)
    for t in (0.0, 0.3, 0.7):
        at = t * mean + math.sqrt(0.5) * (t**2 * std**2 + (1 - t) ** 2).sqrt() * x  # where A_t is likely
        variance = t**2 * std**2 + (1 - t) ** 2
        exact = mean + (t * std**2 - (1 - t)) / variance * (at - t * mean)  # E[A - e | A_t]
        with torch.no_grad():
            found = head.velocity(at, torch.full((2000,), t), memory)
        assert (found - exact).square().mean() < 0.01 * exact.square().mean(), t
    sample = head.sample(memory, x, steps=50)
    torch.testing.assert_close(sample.mean(0), mean, atol=0.04, rtol=0)
    torch.testing.assert_close(sample.std(0), std, atol=0.05, rtol=0)


def test_several_flow_draws_are_a_mean():
    torch.manual_seed(0)
    head = FlowHead(3, 2, MICRO)
    torch.nn.init.normal_(head.out.weight)
    memory, actions, mask = torch.randn(4, 5, MICRO.width), torch.randn(4, 3, 2), torch.tensor([[1.0, 1, 0]]).repeat(4, 1)
    noise, uniform = torch.randn(4, 6, 3, 2), torch.rand(4, 6)
    single = [head.loss(memory, actions, mask, noise[:, i : i + 1], uniform[:, i : i + 1]) for i in range(6)]
    torch.testing.assert_close(head.loss(memory, actions, mask, noise, uniform), torch.stack(single).mean())


def test_tokens_of_a_discrete_task():
    """Two dimensions that depend on each other: the loss falls to their joint entropy, and the likeliest pair comes out."""
    torch.manual_seed(0)
    joint = torch.tensor([[0.10, 0.35], [0.50, 0.05]])  # of (a, b) in {-0.5, 0.5} x {-0.25, 0.75}
    head = TokenHead(1, 2, MICRO)

    def batch(n):
        cells = torch.multinomial(joint.flatten(), n, replacement=True)
        return torch.stack([cells // 2 - 0.5, cells % 2 - 0.25], dim=-1)[:, None].float(), None, None

    fit(head, batch, steps=250, lr=1e-2)
    memory = torch.zeros(20_000, 1, MICRO.width)
    with torch.no_grad():
        loss = head.loss(memory, batch(20_000)[0], torch.ones(20_000, 1)).item()
    entropy = -(joint * joint.log()).sum().item() / 2  # nats a token
    assert abs(loss - entropy) < 0.02
    np.testing.assert_allclose(head.sample(memory[:3]).numpy(), [[[0.5, -0.25]]] * 3, atol=1 / 256)


def test_decoding_with_a_cache_is_decoding():
    torch.manual_seed(0)
    head = TokenHead(3, 2, MICRO)
    torch.nn.init.normal_(head.out.weight)
    memory = torch.randn(4, 5, MICRO.width)
    tokens = torch.full((4, 1), head.bins)
    for _ in range(6):  # the whole sequence again for each token
        with torch.no_grad():
            tokens = torch.cat([tokens, head.logits(tokens, memory)[:, -1:].argmax(-1)], dim=1)
    expected = (tokens[:, 1:].reshape(4, 3, 2) + 0.5) / 128 - 1
    assert torch.equal(head.sample(memory), expected) and len(expected.unique()) > 4


@pytest.mark.parametrize("head", ["flow", "tokens"])
def test_padding_has_no_say(corpus, head):
    model = micro_model(read_corpora([corpus]), head)
    torch.nn.init.normal_(model.head.out.weight)
    chunks = Chunks(read_corpora([corpus]), 4)
    batch = chunks[range(5)]
    batch |= draws(0, 0, 5, 4, 2) | {"tokens": model.text.tokenize(chunks.instructions)}
    batch["mask"][:, 2:] = 0
    loss = model(batch)
    batch["actions"][:, 2:] = 0.7
    other = model(batch)
    if head == "flow":  # padded actions are attended to within the chunk, though nothing is asked of them
        batch["mask"][:] = 0
        assert model(batch).item() == 0
    else:
        assert loss.item() == other.item() > 0


@pytest.mark.parametrize("head, steps", [("flow", 450), ("tokens", 150)])
def test_one_batch_can_be_learned_by_heart(corpus, head, steps):
    corpora = read_corpora([corpus])
    model, chunks = micro_model(corpora, head), Chunks(corpora, 4)
    batch = chunks[range(0, len(chunks), len(chunks) // 3)]
    size, tokens = len(batch["mask"]), model.text.tokenize(chunks.instructions)
    middle = torch.ones(size, 2, 2, dtype=torch.long)
    targets = 2 * (batch["actions"] - model.action_low) / (model.action_high - model.action_low) - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        memory = model.encode(batch["images"], middle, batch["proprio"], tokens, batch["instruction"])
        numbers = draws(0, step, size, 4, 2, flow_draws=16)
        loss = model.head.loss(memory, targets, batch["mask"], numbers["noise"], numbers["uniform"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    noise = draws(0, steps, size, 4, 2)["noise"][:, 0]
    found = model.act(batch["images"], batch["proprio"], tokens, batch["instruction"], noise)
    error = (found - batch["actions"]).abs()[batch["mask"] > 0]
    assert error[:, :6].mean() < 0.06 and error[:, 6].max() == 0
    torch.testing.assert_close(found[..., 6].abs(), torch.ones(size, 4))


def test_the_instruction_matters(corpus):
    model = micro_model(read_corpora([corpus]))
    torch.nn.init.normal_(model.head.out.weight)
    tokens = model.text.tokenize(["open the drawer", "close it", "open the drawer"])
    images, proprio = torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, 8)
    noise = torch.zeros(1, 4, 7)
    first, other, same = (model.act(images, proprio, tokens, torch.tensor([i]), noise) for i in range(3))
    torch.testing.assert_close(first, same)
    assert (first - other).abs().max() > 1e-4
    alone = model.act(images, proprio, model.text.tokenize(["close it"]), torch.tensor([0]), noise)
    torch.testing.assert_close(alone, other, atol=1e-5, rtol=0)  # padding beside a longer one changes nothing


# ---------------------------------------------------------------------------------------------- training


def test_learning_rate_by_hand():
    args = Args(lr=2.0, warmup=4)
    assert [learning_rate(args, s, 12) for s in (0, 1, 3)] == [0.5, 1.0, 2.0]
    assert learning_rate(args, 4, 12) == 2.0 and abs(learning_rate(args, 8, 12) - 1.0) < 1e-12 and learning_rate(args, 12, 12) == 0.0


@contextlib.contextmanager
def opened(script, folder: Path, **changes):
    """A run of a script in `folder`, or the one that is there continued, with these flags; let go as if its process had ended."""
    begun = list(folder.glob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *(("--resume", str(begun[0])) if begun else ("--run-folder", str(folder)))])
        run = SharedRun(script.__name__, script.Args)
    flags = {"batch_size": 8, "num_workers": 0, "warmup": 2, "eval_interval": 100, "checkpoint_interval": 3, "lr": 1e-3, "ema": 0.999}
    run.args = script.Args(**flags | changes, resume=run.args.resume, run_folder=str(folder))
    run.open("suite/task", {})
    try:
        yield run
    finally:
        run.writer.close()
        let_go(run)


def let_go(run) -> None:
    """Unlock a run as the end of its process does, together with that of those which read for it."""
    if getattr(run, "_locked", None):
        fcntl.flock(run._locked, fcntl.LOCK_UN)
        run._locked.close()


def run_training(corpus, folder: Path, steps: int = 6, **changes) -> dict[str, torch.Tensor]:
    parts = vla_data.split(read_corpora([corpus]), 0.2, 1)
    model = micro_model(parts[0])
    training, validation = (Chunks(part, 4) for part in parts)
    with opened(vla_pretrain, folder, **changes) as run:
        results = train(run.args, model, training, validation, steps, run, {})
    assert results["steps"] == steps and results["tflops_per_second"] > 0
    return model.state_dict()


def only(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


def kept(folder: Path) -> dict:
    """The checkpoint of the only run in a folder."""
    return load_checkpoint(only(folder) / "checkpoint.pt", "vla_pretrain")


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def relative(a: dict, b: dict, start: dict) -> float:
    """How far a is from b, as a share of how far b has come from `start`."""
    norm = lambda x, y: math.sqrt(sum((x[k] - y[k]).double().square().sum().item() for k in x))  # noqa: E731
    return norm(a, b) / norm(b, start)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [2, 4])
def test_resume_is_exact(corpus, tmp_path, monkeypatch, step):
    """Killed before the first checkpoint or after it, and read by another process: the same weights, bit for bit."""
    whole = run_training(corpus, tmp_path / "whole")

    def killed(args, s, steps):
        if s == step:
            raise Killed
        return learning_rate(args, s, steps)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(vla_pretrain, "learning_rate", killed)
        run_training(corpus, tmp_path / "part")
    assert kept(tmp_path / "part").get("step", 0) == 3 * (step > 3)
    assert same(run_training(corpus, tmp_path / "part", num_workers=1), whole)
    assert same(load_model(only(tmp_path / "part"))[0].state_dict(), whole)
    assert kept(tmp_path / "part")["step"] == 6


def test_sigterm_saves_what_was_learned(corpus, tmp_path, monkeypatch):
    """Between two checkpoints; and the run ends in the weights of one that nobody stopped."""
    whole = run_training(corpus, tmp_path / "whole")

    def terminated(args, s, steps):
        if s == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(args, s, steps)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(vla_pretrain, "learning_rate", terminated)
        run_training(corpus, tmp_path / "part")
    assert kept(tmp_path / "part")["step"] == 5
    assert same(run_training(corpus, tmp_path / "part"), whole)


def test_a_loss_that_is_not_finite(corpus, tmp_path):
    with pytest.raises(UserError, match="the loss is .* at step .*; start again with a smaller --lr than 1e\\+30"):
        run_training(corpus, tmp_path, steps=8, lr=1e30, warmup=0, checkpoint_interval=1)
    assert all(torch.isfinite(value).all() for value in kept(tmp_path)["model"].values())


def test_accumulation_is_the_whole_batch(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(vla_pretrain, "autocast", lambda *_: contextlib.nullcontext())  # whose rounding Adam's first steps blow up
    start = micro_model(vla_data.split(read_corpora([corpus]), 0.2, 1)[0]).state_dict()
    whole = run_training(corpus, tmp_path / "a", steps=4, ema=0.0)
    parts = run_training(corpus, tmp_path / "b", steps=4, ema=0.0, accumulate=4)
    assert relative(parts, whole, start) < 0.02


def test_the_average_follows_the_weights(corpus, tmp_path, monkeypatch):
    lerp, seen = torch._foreach_lerp_, []

    def spy(average, weights, weight):
        seen.append(([w.detach().clone() for w in weights], weight))
        lerp(average, weights, weight)

    average = [p.detach().clone() for p in micro_model(vla_data.split(read_corpora([corpus]), 0.2, 1)[0]).parameters()]
    monkeypatch.setattr(torch, "_foreach_lerp_", spy)
    found = run_training(corpus, tmp_path / "run", steps=4, ema=0.2)
    assert [weight for _, weight in seen] == pytest.approx([0.9, 1 - 2 / 11, 0.8, 0.8])  # a short memory at first, then --ema
    for weights, weight in seen:
        average = [(1 - weight) * a + weight * w for a, w in zip(average, weights, strict=True)]
    model = micro_model(read_corpora([corpus]))
    model.load_state_dict(found)
    for a, p in zip(average, model.parameters(), strict=True):
        torch.testing.assert_close(p, a)


@pytest.fixture
def flags(corpus, tmp_path):
    values = {"data": corpus, "batch-size": 4, "steps": 3, "chunk": 4, "num-workers": 0, "warmup": 1, "torch-threads": 1, "ema": 0}
    return [str(x) for name, value in values.items() for x in (f"--{name}", value)] + ["--run-folder", str(tmp_path / "runs")]


def main(monkeypatch, *flags: str) -> None:
    run_main(monkeypatch, vla_pretrain, *flags)


def run_main(monkeypatch, script, *flags: str) -> None:
    """A script in this process, which lets go of the run as if it had ended."""
    runs = []
    init = SharedRun.__init__
    monkeypatch.setattr(SharedRun, "__init__", lambda self, *args: runs.append(self) or init(self, *args))
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    try:
        script.main()
    finally:
        monkeypatch.setattr(SharedRun, "__init__", init)
        for run in runs:
            let_go(run)


def test_two_processes_train_as_one(corpus, flags, tmp_path, monkeypatch):
    """torchrun with two gloo processes on half a batch each, against one process on the whole one."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
    flags = ["--precision", "float32", *flags]  # Adam's first steps blow up bfloat16's rounding
    main(monkeypatch, *flags)
    (alone,) = (tmp_path / "runs").iterdir()
    both = [*flags[:-1], str(tmp_path / "two")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "vla_pretrain.py", *both]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "two").iterdir()
    torch.manual_seed(1)
    start = VLA("flow", "tiny", 4, 32, 30)
    trained, expected = (load_model(folder)[0].state_dict() for folder in (run, alone))
    state = start.state_dict() | {name: expected[name] for name in ("proprio_mean", "proprio_std", "action_low", "action_high")}
    assert relative(trained, expected, state) < 0.02


def test_torchrun_is_shown_with_a_port_of_its_own():
    """Without --standalone two runs on a machine want the same port."""
    pages = [p for pattern in ("*.md", "*.py", "docs/*.md", "common/*.py", "benchmarks/*.py") for p in ROOT.glob(pattern)]
    commands = [line for page in pages for line in page.read_text().splitlines() if "torchrun -" in line]
    assert commands and all("--standalone" in line for line in commands)


def test_what_a_run_leaves_behind(flags, tmp_path, monkeypatch, corpus, drawer_task):
    main(monkeypatch, *flags)
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith(f"{drawer_task.id.replace('/', '-')}__vla_pretrain__1__")
    config, summary = (json.loads((run / name).read_text()) for name in ("config.json", "summary.json"))
    assert config["args"]["data"] == [str(corpus)] and config["renderer"] == "warp" and config["assets"] == drawer_task.image_assets
    assert summary["steps"] == 3 and summary["validation"] > 0 and summary["samples_per_second"] > 0
    model, meta = load_model(run)
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert meta["tasks"] == [drawer_task.id] and meta["step"] == 3 and meta["corpora"][0]["episodes"] == 6
    assert model.config == {"head": "flow", "size": "tiny", "chunk": 4, "image_size": 32, "crop": 30, "vision": None, "text": None}
    main(monkeypatch, "--resume", run)  # nothing is left to do
    assert same(load_model(run)[0].state_dict(), model.state_dict())
    with pytest.raises(UserError, match="was started with --head flow, not tokens"):
        main(monkeypatch, "--resume", run, "--head", "tokens")


def test_a_run_is_continued_where_its_data_have_moved(flags, corpus, tmp_path, monkeypatch):
    """Started with relative paths in one folder, continued in another with the file elsewhere: the data are known by their content."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    shutil.copy(corpus, here / "some.hdf5")
    main(monkeypatch, *flags)
    whole = load_model(only(tmp_path / "runs"))[0].state_dict()
    flags = [*flags[2:-2], "--checkpoint-interval", "2"]

    def killed(args, s, steps):
        if s == 2:
            raise Killed
        return learning_rate(args, s, steps)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.chdir(here)
        patch.setattr(vla_pretrain, "learning_rate", killed)
        main(patch, "--data", "some.hdf5", "--run-folder", "runs", *flags)
    run = only(here / "runs")
    assert kept(here / "runs")["step"] == 2
    moved = (here / "some.hdf5").rename(there / "other.hdf5")
    monkeypatch.chdir(there)
    with pytest.raises(UserError, match="some.hdf5: no such file; if it has moved, name all files again with --data"):
        main(monkeypatch, "--resume", run)
    with h5py.File(shutil.copy(moved, there / "changed.hdf5"), "r+") as file:
        file["data/demo_0/actions"][3, 0] += 1e-3
    with pytest.raises(UserError, match="was started with data .*, and here it is"):
        main(monkeypatch, "--resume", run, "--data", "changed.hdf5")
    main(monkeypatch, "--resume", run, "--data", "other.hdf5")
    assert same(load_model(run)[0].state_dict(), whole)


def test_shared_memory_too_small_for_the_batches(flags, monkeypatch, tmp_path):
    """Found before anything has begun: torch's workers would lose their batches, and the training would wait for ever."""
    usage = shutil.disk_usage(tmp_path)
    needed = (2 * 2 + 1) * 4 * (2 * 3 * 32 * 32 + 1000)
    monkeypatch.setattr(vla_training, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    flags[flags.index("--num-workers") + 1] = "2"
    with pytest.raises(UserError, match="has 0.1 MB free, and reading ahead takes 0.1 MB; pass --num-workers 0"):
        main(monkeypatch, *flags)
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    main(monkeypatch, *flags, "--steps", "1")


def test_steps_suit_the_device(flags, monkeypatch):
    found = []

    def stopped(args, model, training, validation, steps, *rest):
        found.append((steps, args.torch_threads))
        raise Killed

    monkeypatch.setattr(vla_pretrain, "train", stopped)
    with pytest.raises(Killed):
        main(monkeypatch, *(x for x in flags if x not in ("--steps", "3")), "--device", "cpu")
    assert found == [(3000, 1)]


# ---------------------------------------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--batch-size", "6", "--accumulate", "4"], "--batch-size 6 cannot be cut"),
        (["--weights", "1", "2"], "--weights needs one number for each of the 1 files"),
        (["--weights", "0"], "--weights must be at least 0, and one of them more"),
        (["--lr", "0"], "--lr must be more than 0"),
        (["--crop", "0.2"], "--crop must be between 0.5 and 1"),
        (["--max-episodes", "0"], "--max-episodes must be at least 1"),
        (["--max-episodes", "1"], "the validation split is empty: 1 episodes in all"),
        (["--vision", "nowhere/at-all", "--device", "cpu"], "--vision"),
    ],
)
def test_flags_that_cannot_work(flags, monkeypatch, changes, message, tmp_path):
    if "--vision" in changes:
        monkeypatch.setitem(sys.modules, "transformers", None)
        message = "--vision needs transformers; run: pip install transformers"
    with pytest.raises(UserError, match=message) as error:
        main(monkeypatch, *flags, *changes)
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("changes", [["--head", "bins"], ["--size", "huge"], ["--device", "tpu"], ["--steps", "many"]])
def test_words_that_are_no_choice(flags, monkeypatch, changes, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, *flags, *changes)
    assert changes[0] in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("changes, message", [(["--device", "cuda"], "torch finds no GPU"), (["--compile"], "--compile is for CUDA")])
def test_without_a_gpu(flags, monkeypatch, changes, message):
    with pytest.raises(UserError, match=message):
        main(monkeypatch, *flags, *changes)


def test_corpora_that_cannot_be_used(corpus, demos, drawer_task, assets, tmp_path):
    with pytest.raises(UserError, match="no corpus to learn from"):
        read_corpora([])
    with pytest.raises(UserError, match="no such file"):
        read_corpora([tmp_path / "nowhere.hdf5"])
    with pytest.raises(UserError, match=f"{demos} has no pictures agentview_rgb; render them: python -m common.libero.render {demos}"):
        read_corpora([demos])
    damaged = tmp_path / "damaged.hdf5"
    damaged.write_bytes(corpus.read_bytes()[:-2000])
    with pytest.raises(UserError, match="truncated"):
        read_corpora([damaged])
    failures = read_episodes(corpus, images=True)[:1]
    failures[0].success = False
    write_episodes(tmp_path / "failures.hdf5", failures, drawer_task, {})
    with pytest.raises(UserError, match="no successful episode"):
        read_corpora([tmp_path / "failures.hdf5"])
    episodes = read_episodes(corpus)[:1]
    smaller = write_pictures(tmp_path / "smaller.hdf5", drawer_task, episodes, 16, assets)
    with pytest.raises(UserError, match="image_size mismatch: .*corpus.hdf5 has 32, .*smaller.hdf5 has 16"):
        read_corpora([corpus, smaller])
    with h5py.File(smaller, "r+") as file:
        file["data"].attrs["renderer"] = "gl"
    with pytest.raises(UserError, match="mismatch"):
        read_corpora([smaller, corpus])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_picture_found_damaged_amid_training(corpus, tmp_path, num_workers):
    """The error names file and episode; what was learned is kept, and a good copy of the file goes on from there."""
    whole = run_training(corpus, tmp_path / "whole", steps=8, batch_size=16)
    copy_ = tmp_path / "copy.hdf5"
    good = corpus.read_bytes()
    copy_.write_bytes(good)
    order = Order([len(Chunks(vla_data.split(read_corpora([corpus]), 0.2, 1)[0], 4))], [1.0], 16, 1)
    chunks = Chunks(vla_data.split(read_corpora([corpus]), 0.2, 1)[0], 4)
    early = set(np.concatenate([order.batch(s) for s in range(2)]).tolist())
    victim = next(int(i) for i in order.batch(4) if int(i) not in early)
    episode = int(np.searchsorted(chunks.starts, victim, side="right")) - 1
    name = chunks.episodes[episode][1]
    with h5py.File(copy_, "r+") as file:
        pictures = file[f"data/{name}/obs/agentview_rgb"]
        pictures.id.write_direct_chunk((victim - int(chunks.starts[episode]), 0, 0, 0), b"not gzip")
    with pytest.raises(UserError, match=rf"copy.hdf5: {name} is damaged, cannot be read") as error:
        run_training(copy_, tmp_path / "run", steps=8, batch_size=16, num_workers=num_workers)
    assert "\n" not in str(error.value)
    assert 2 <= kept(tmp_path / "run")["step"] <= 4
    (tmp_path / "good.hdf5").write_bytes(good)
    (tmp_path / "good.hdf5").replace(copy_)  # another file of that name: HDF5 may still hold the damaged one open
    assert same(run_training(copy_, tmp_path / "run", steps=8, batch_size=16), whole)


def test_a_killed_reader(corpus, tmp_path, monkeypatch):
    whole = run_training(corpus, tmp_path / "whole", steps=8)
    read = Chunks.__getitem__

    def killed(self, rows):
        if os.getpid() != parent and calls.append(rows) is None and len(calls) > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, rows)

    parent, calls = os.getpid(), []
    with monkeypatch.context() as patch, pytest.raises(UserError, match="was killed .*--resume"):
        patch.setattr(Chunks, "__getitem__", killed)
        run_training(corpus, tmp_path / "run", steps=8, num_workers=1)
    assert same(run_training(corpus, tmp_path / "run", steps=8, num_workers=1), whole)


KILLED = "DataLoader worker (pid 7) is killed by signal: "
SHARED = "It is possible that dataloader's workers are out of shared memory. Please try to raise your shared memory limit."


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError(f"{KILLED}Killed. "), "was killed .*--resume"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "was killed .*--resume"),
        (ConnectionResetError(), "was killed .*--resume"),
        (EOFError(), "was killed .*--resume"),
        (RuntimeError(f"{KILLED}Bus error. {SHARED}"), "/dev/shm is full; --resume the run with --num-workers 0, or .*--shm-size"),
        (RuntimeError("DataLoader timed out after 600 seconds"), "/dev/shm is full"),
    ],
)
def test_a_reader_killed_at_any_moment(monkeypatch, error, message):
    def batches_until_it_dies(*args, **kwargs):
        yield {}
        raise error

    monkeypatch.setattr(vla_data, "DataLoader", batches_until_it_dies)
    source = vla_data.batches(None, None, range(0), [], 1, False)
    assert next(source) == {}
    with pytest.raises(UserError, match=message):
        next(source)


def test_another_error_of_a_reader_stays_what_it_is():
    for text in ("mat1 and mat2 shapes cannot be multiplied", "Caught RuntimeError in DataLoader worker process 0.\nnot ours"):
        error = RuntimeError(text)
        assert vla_data.explained(error) is error


def test_an_instruction_too_long(corpus):
    with pytest.raises(UserError, match="has 300 bytes"):
        micro_model(read_corpora([corpus])).text.tokenize(["x" * 300])


def test_a_model_of_another_kind(tmp_path, corpus):
    model = micro_model(read_corpora([corpus]))
    save_model(tmp_path / "model.pt", model, {"step": 0})
    assert same(load_model(tmp_path)[0].state_dict(), model.state_dict())
    model.config = model.config | {"chunk": 5}
    save_model(tmp_path / "model.pt", model, {"step": 0})
    with pytest.raises(UserError, match="does not fit this version"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nothing.pt")


def test_pretrained_encoders(tmp_path, corpus):
    """Through transformers, on a ViT and a BERT that are made here."""
    transformers = pytest.importorskip("transformers", reason="needs transformers, which is optional: pip install transformers")
    vit = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=24, patch_size=8
    )
    transformers.ViTModel(vit).save_pretrained(tmp_path / "vit")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "open", "close", "the", "drawer"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    bert = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(**bert)).save_pretrained(tmp_path / "bert")
    corpora = read_corpora([corpus])
    model = VLA("flow", "tiny", 4, 32, 30, vision=str(tmp_path / "vit"), text=str(tmp_path / "bert"))
    model.fit(Chunks(corpora, 4).statistics())
    before = copy.deepcopy(model.state_dict())
    with opened(vla_pretrain, tmp_path / "runs") as run:
        train(run.args, model, Chunks(corpora, 4), Chunks([], 4), 3, run, {})
    for part in ("vision.net", "text.net"):  # they learn too
        assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items() if k.startswith(part))
    assert same(load_model(run.folder)[0].state_dict(), model.state_dict())
    with pytest.raises(UserError, match="--vision .*nowhere: not a model id or folder that loads here"):
        VLA("flow", "tiny", 4, 32, 30, vision=str(tmp_path / "nowhere"))
