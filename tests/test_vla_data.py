"""Samples for a VLA out of files that people have: the picture before each action, whatever the file's convention."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from test_data import TASK, at, attr, episode, put
from test_understand import before, masked, no_attributes

from common.cli import UserError
from common.data import write_episodes
from common.data.vla import Chunks, corpus_files, fingerprint, read_corpora
from common.vla_training import TrainingArgs

NAME = "open_the_middle_drawer_of_the_cabinet"
DRAWER = SimpleNamespace(**{**vars(TASK), "name": NAME, "bddl_file": f"/libero/bddl_files/libero_goal/{NAME}.bddl"})
LENGTHS = (7, 5, 9)


@pytest.fixture
def path(tmp_path):
    """Three episodes; every picture's first number says after which action it was taken, the first position likewise."""
    episodes = []
    for seed, length in enumerate(LENGTHS):
        e = episode(seed, length)
        numbers = np.arange(length, dtype=np.uint8) + 10 * seed
        e.images = {name: np.tile(numbers[:, None, None, None], (1, 8, 8, 3)) for name in ("agentview_rgb", "eye_in_hand_rgb")}
        e.proprio["ee_pos"][:, 0] = numbers
        episodes.append(e)
    write_episodes(tmp_path / f"{NAME}_demo.hdf5", episodes, DRAWER, {"renderer": "warp", "assets": "standin:1", "script": "test"})
    return tmp_path / f"{NAME}_demo.hdf5"


def samples(path, **options):
    chunks = Chunks(read_corpora([path], **options), 4)
    return chunks, [single(chunks, i) for i in range(len(chunks))]


def single(chunks, index):
    return {key: value[0] for key, value in chunks[[index]].items()}


def test_a_sweeps_folder_stands_for_its_corpora(path, tmp_path):
    (tmp_path / "corpora.json").write_text(json.dumps([path.name, path.name]))
    assert corpus_files(tmp_path) == [path, path] and corpus_files(path) == [path]
    args = TrainingArgs(data=[str(path), str(tmp_path)], weights=[1.0, 0.5], batch_size=2, num_workers=0)
    assert args.data == 3 * [str(path)] and args.weights == [1.0, 0.5, 0.5]
    assert TrainingArgs(data=args.data, weights=args.weights).data == args.data  # as a resumed run has them
    assert [corpus.lengths for corpus in args.read()] == 3 * [list(LENGTHS)]
    (tmp_path / "corpora.json").write_text("[]")
    with pytest.raises(UserError, match="has no corpus yet; python -m common.sweep"):
        TrainingArgs(data=[str(tmp_path)])
    with pytest.raises(UserError, match="is a folder without a sweep's corpora.json"):
        TrainingArgs(data=[str(tmp_path.parent)])


def copied(path):
    """Another file of the same name: HDF5 still holds the one that was read from open."""
    (path.parent / "other").mkdir()
    return Path(shutil.copy(path, path.parent / "other"))


def test_files_as_openvla_regenerates_them(path, caplog):
    """Without attributes, and seen before the action: the same pairs of picture and actions, and the first action, too."""
    _, after = samples(path)
    assert len(after) == sum(LENGTHS) - 3
    path = copied(path)
    with h5py.File(path, "r+") as file:
        before(file)
        no_attributes(file)
    (corpus,) = read_corpora([path])
    assert (
        corpus.task == f"libero_goal/{NAME}" and corpus.language == "open the middle layer of the drawer" and corpus.renderer == "unknown"
    )
    assert "moved by one step" in caplog.text and "taken to be" in caplog.text
    _, found = samples(path)
    starts = np.cumsum([0, *LENGTHS[:-1]])
    assert len(found) == sum(LENGTHS)
    rest = [sample for i, sample in enumerate(found) if i not in starts]
    for ours, theirs in zip(rest, after, strict=True):
        for key in ("images", "proprio", "actions", "mask"):
            np.testing.assert_array_equal(ours[key], theirs[key])
    for seed, start in enumerate(starts):
        np.testing.assert_array_equal(found[start]["actions"], episode(seed, LENGTHS[seed]).actions[:4].astype(np.float32))


def test_numbers_of_other_conventions(path):
    _, good = samples(path)
    statistics = Chunks(read_corpora([path]), 4).statistics()
    path = copied(path)
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            demo["actions"][:, 6] = (demo["actions"][:, 6] + 1) / 2
            ee = demo["obs/ee_pos"][()]
            demo["obs/ee_states"][:, :3] = ee
            del demo["obs/ee_pos"]
        # the fingers of these made-up episodes move at random: which of 0 and 1 closes is told here
    corpora = read_corpora([path])
    corpora[0].file.gripper = (0.5, 1.0)
    chunks = Chunks(corpora, 4)
    for i, sample in enumerate(good):
        for key, value in sample.items():
            np.testing.assert_array_equal(single(chunks, i)[key], value)
    assert chunks.statistics() == statistics


def test_demonstrations_left_out(path):
    with h5py.File(path, "r+") as file:
        put("demo_0/states", at((2, 3), np.nan))(file)
        put("demo_2/obs/agentview_rgb", lambda a: a[:, :4])(file)
        attr("success", False, "data/demo_1")(file)
        put("demo_1/rewards", lambda a: 0 * a)(file)
    with pytest.raises(UserError, match="holds no successful episode"):
        read_corpora([path])


def test_demonstrations_without_pictures_are_left_out(path):
    """Even if more have none than have some."""
    for name, left in (("demo_0", ["demo_1", "demo_2"]), ("demo_1", ["demo_2"])):
        with h5py.File(path, "r+") as file:
            del file[f"data/{name}/obs/agentview_rgb"], file[f"data/{name}/obs/eye_in_hand_rgb"]
        assert [corpus.demos for corpus in read_corpora([path])] == [left]


def test_filter_key(path):
    with h5py.File(path, "r+") as file:
        masked(file)
    (corpus,) = read_corpora([path], filter_key="train")
    assert corpus.demos == ["demo_0", "demo_2"]
    assert [int(s["images"][0, 0, 0, 0]) for s in samples(path, filter_key="valid")[1]] == [10, 11, 12, 13]


def test_a_file_of_no_known_task_is_told_how_to_be_called(path):
    with h5py.File(path, "r+") as file:
        no_attributes(file)
    path = path.rename(path.parent / "a.hdf5")
    with pytest.raises(UserError, match="a.hdf5 does not say of which task it is; call it SUITE/TASK_demo.hdf5"):
        read_corpora([path])


def test_no_ops_are_dropped_as_if_they_had_not_been(path, caplog):
    """Steps 0, 3, 4 of one episode do nothing; step 5 does nothing but closes the hand."""
    with h5py.File(path, "r+") as file:
        actions = file["data/demo_0/actions"][()]
        actions[:, 6] = [1, 1, 1, 1, 1, -1, -1]
        actions[[0, 3, 4, 5], :6] = 0
        actions[4, 0] = 0.9e-4
        file["data/demo_0/actions"][:] = actions
    chunks, found = samples(path, drop_no_ops=True)
    assert "3 no-op steps of 21 dropped" in caplog.text
    assert chunks.corpora[0].lengths == [4, 5, 9] and len(found) == 4 + 4 + 8
    kept = actions[[1, 2, 5, 6]].astype(np.float32)
    for i, t in enumerate((1, 2, 5, 6)):  # what is seen before a step is what came after the one before it, a no-op or not
        assert int(found[i]["images"][0, 0, 0, 0]) == t - 1 and found[i]["proprio"][0] == t - 1
        np.testing.assert_array_equal(found[i]["actions"][: 4 - i], kept[i:])
        np.testing.assert_array_equal(found[i]["mask"], np.arange(4) < 4 - i)
    assert len(samples(path)[1]) == sum(LENGTHS) - 3


def test_the_content_tells_whether_data_are_the_same(path, tmp_path):
    first = fingerprint(read_corpora([path]))
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(path, tmp_path / "moved" / "x.hdf5")
    assert fingerprint(read_corpora([moved])) == first
    assert fingerprint(read_corpora([moved], drop_no_ops=True)) == first  # there are none
    assert fingerprint(read_corpora([moved], max_episodes=2)) != first
    with h5py.File(moved, "r+") as file:
        file["data/demo_2/actions"][4, 1] += 1e-9
    assert fingerprint(read_corpora([moved])) != first
