"""Corpora as small files: what is unpacked is what was packed, to the bit."""

from __future__ import annotations

from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from benchmarks import replays
from benchmarks.vla_corpora import read_sweeps
from common.cli import UserError
from common.data import read_episodes, write_episodes
from common.data.vla import corpus_files
from common.demos import Attempt, Strategy, perform
from common.runs import write_json
from common.sweep.report import read as read_sweep

PULL = Strategy("", {"contact": "middle", "path": "near"})


@pytest.fixture
def swept(drawer_task, tmp_path):
    """A folder like a sweep's, with one corpus: three episodes from training states, as policies have them."""
    queue = [Attempt(k, PULL, [k], None) for k in range(3)]
    done = dict((attempt.key, episode) for attempt, episode in perform(drawer_task, lambda: queue.pop() if queue else None, 0.1, 3))
    for k, episode in done.items():
        episode.attrs.update(pattern=k, init_state=-1, source="gaussian_ppo", seed=5)
    corpus = tmp_path / "sweep" / "runs" / "drawer__1" / "corpus.hdf5"
    corpus.parent.mkdir(parents=True)
    write_episodes(corpus, [done[k] for k in range(3)], drawer_task, {"script": "gaussian_ppo", "assets": drawer_task.assets})
    row = {"task": drawer_task.id, "seed": 1, "state": "done", "corpus": "runs/drawer__1/corpus.hdf5", "assets": drawer_task.assets}
    settings = {"script": "gaussian_ppo.py", "flags": [], "jobs": [[drawer_task.id, 1]], "runs": [row, row | {"corpus": None}]}
    write_json(tmp_path / "sweep" / "sweep.json", settings)
    return tmp_path / "sweep"


def everything(path):
    """All arrays and attributes of an HDF5 file, by name."""
    found = {}
    with h5py.File(path) as file:
        for name in ("data", *(f"data/{n}" for n in file["data"])):
            found |= {f"{name}@{key}": value for key, value in file[name].attrs.items()}
        file.visititems(lambda name, item: found.update({name: item[()]} if isinstance(item, h5py.Dataset) else {}))
    return found


def test_a_start_is_found_though_things_have_moved_more_than_starts_differ(drawer_task):
    """As things come to rest they drop by more than two training states are apart: the nearest one may be another."""
    env = replays.environment(drawer_task)
    replays.begin(env, drawer_task.train_states[20 : 20 + replays.NUM_ENVS])
    episodes = [SimpleNamespace(states=state[None]) for state in env.get_state()]
    env.close()
    assert replays.starts_of(drawer_task, episodes[::-1]).tolist() == list(range(20, 20 + replays.NUM_ENVS))[::-1]


def test_what_is_unpacked_is_what_was_packed(swept, assets, tmp_path, capsys):
    packed, out = tmp_path / "small.npz", tmp_path / "again"
    corpus = swept / "runs" / "drawer__1" / "corpus.hdf5"
    replays.pack(swept, packed, assets)
    assert packed.stat().st_size < corpus.stat().st_size / 20
    for _ in range(2):  # the second time it is there
        replays.unpack(packed, out, assets)
    assert capsys.readouterr().out.count("3 of 3 episodes succeed, 3 are as they were to the bit") == 1
    before, after = everything(corpus), everything(out / "runs" / "drawer__1" / "corpus.hdf5")
    assert before.keys() == after.keys() and len(before) > 60
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert corpus_files(out) == [out / "runs" / "drawer__1" / "corpus.hdf5"]
    assert read_sweeps([out], ["gaussian_ppo"]) == {"gaussian_ppo": {read_sweep(swept)["runs"][0]["task"]: corpus_files(out)[0]}}


def test_fewer_episodes_are_of_all_patterns(swept, assets, tmp_path, monkeypatch):
    of = [SimpleNamespace(attrs={"pattern": p}) for p in (0, 0, 0, 2, 2, 1, 0)]
    for most, kept in {1: [0], 3: [0, 3, 5], 5: [0, 1, 3, 4, 5], 6: [0, 1, 2, 3, 4, 5], 9: range(7), None: range(7)}.items():
        assert replays.evenly(of, most) == [of[i] for i in kept], most
    monkeypatch.setattr("sys.argv", ["replays", str(swept), "--out", str(tmp_path / "small.npz"), "--episodes", "2", "--assets", assets])
    replays.main()
    about, arrays = replays.read_packed(tmp_path / "small.npz")
    assert [e["pattern"] for e in about["runs"][0]["episodes"]] == [0, 1] and len(arrays["0/length"]) == 2
    monkeypatch.setattr("sys.argv", ["replays", str(tmp_path / "small.npz"), "--out", str(tmp_path / "again"), "--episodes", "2"])
    with pytest.raises(UserError, match="--episodes is how many to pack"):
        replays.main()


def test_what_does_not_succeed_any_more_is_left_out(swept, assets, tmp_path, capsys):
    packed, out = tmp_path / "small.npz", tmp_path / "again"
    replays.pack(swept, packed, assets)
    with np.load(packed) as file:
        arrays = dict(file)
    arrays["0/actions"][: arrays["0/length"][0], :6] = 0.0  # the first one's hand stands still
    np.savez(packed, **arrays)
    replays.unpack(packed, out, assets)
    assert "2 of 3 episodes succeed, 2 are as they were to the bit" in capsys.readouterr().out
    assert [e.attrs["pattern"] for e in read_episodes(corpus_files(out)[0])] == [1, 2]


def test_what_cannot_be_replayed_is_said(swept, drawer_task, assets, tmp_path, monkeypatch):
    packed = tmp_path / "small.npz"
    with h5py.File(swept / "runs" / "drawer__1" / "corpus.hdf5", "r+") as file:
        file["data/demo_1/states"][0, 5] += 1e-9
    with pytest.raises(UserError, match="episode 1 began in no training state as it is on this machine"):
        replays.pack(swept, packed, assets)
    assert not packed.exists()
    with pytest.raises(UserError, match="is no sweep that has a corpus"):
        replays.pack(tmp_path, packed, assets)
    packed.write_bytes(b"PK")
    with pytest.raises(UserError, match="neither a sweep's folder nor a file that this command wrote"):
        replays.unpack(packed, tmp_path / "again", assets)
    about = {"runs": [{"task": drawer_task.id, "seed": 1, "corpus": "c.hdf5", "assets": "libero:other"}]}
    monkeypatch.setattr(replays, "read_packed", lambda path: (about, {}))
    with pytest.raises(UserError, match="assets mismatch: .* is of libero:other"):
        replays.unpack(packed, tmp_path / "again", assets)
    with pytest.raises(UserError, match="is a sweep's folder; choose another --out"):
        replays.unpack(packed, swept, assets)
