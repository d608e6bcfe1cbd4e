"""benchmarks/frames.py: which trajectories are shown, what a sheet and a moving picture hold."""

import dataclasses
import sys

import numpy as np
import pytest
from PIL import Image, ImageSequence

from benchmarks import frames
from common.cli import UserError
from common.data import read_episodes, write_episodes
from common.libero.renderers import make_renderer


@pytest.fixture(scope="module")
def corpus(drawer_task, demos, tmp_path_factory):
    """Pattern 1, 16 steps; pattern 0, 6 steps; and a second one of pattern 1."""
    path, episodes = tmp_path_factory.mktemp("frames") / "corpus.hdf5", []
    for episode, pattern, n in zip(read_episodes(demos, drawer_task), (1, 0, 1), (16, 6, 9), strict=False):
        proprio = {name: x[-n:] for name, x in episode.proprio.items()}
        short = dataclasses.replace(episode, actions=episode.actions[-n:], states=episode.states[-n:], proprio=proprio)
        episodes.append(dataclasses.replace(short, attrs={**episode.attrs, "pattern": pattern}))
    write_episodes(path, episodes, drawer_task, {"assets": drawer_task.assets})
    return path, episodes


def seen(task, states, size=24):
    """What agentview sees of states, four rays a pixel."""
    large = make_renderer(task.model, ("agentview",), 2 * size, 2 * size).render(states[:, 1 : 1 + task.model.nq])["agentview"]
    return (sum(large[:, i::2, j::2].astype(float) for i in (0, 1) for j in (0, 1)) / 4 + 0.5).astype(np.uint8)


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["frames.py", *map(str, flags)])
    frames.main()


def test_the_first_of_each_pattern_or_file(corpus, demos, drawer_task, assets, tmp_path, monkeypatch):
    (path, (one, zero, _)), args = corpus, frames.Args([], tmp_path / "x.png", frames=3, size=24, assets=assets)
    shown = frames.trajectories(path, args)
    title = "libero_goal/0 open the middle layer of the drawer"
    assert [t.title for t in shown] == [f"pattern 0: {title}", f"pattern 1: {title}"]
    for trajectory, episode in zip(shown, (zero, one), strict=True):
        states = np.vstack([episode.states, episode.final_state])
        np.testing.assert_array_equal(trajectory.qpos, states[:, 1 : 1 + drawer_task.model.nq])
        expected = seen(drawer_task, states[[0, episode.length // 2, episode.length]])  # the first, the middle and the last
        np.testing.assert_array_equal(frames.strip(trajectory, args), np.concatenate(list(expected), axis=1))
    (plain,) = frames.trajectories(demos, args)
    assert plain.title == title and len(plain.qpos) == read_episodes(demos, drawer_task)[0].length + 1
    call(monkeypatch, path, demos, "--out", tmp_path / "sheet.png", "--size", 24, "--assets", assets)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.mode == "P" and sheet.width > 3 * 4 * 24


def test_all_move_together_at_one_speed():
    steps = frames.timelines([41, 21], seconds=9)  # 2 s and 1 s of simulated time
    moving = round(2 * frames.FPS)
    assert len(steps) == moving + round(frames.HOLD * frames.FPS) and (steps[moving - 1 :] == [40, 20]).all()
    np.testing.assert_allclose(steps[:moving, 0], np.arange(moving) * 40 / (moving - 1), atol=0.5)
    np.testing.assert_array_equal(steps[:, 1], np.minimum(steps[:, 0], 20))
    faster = frames.timelines([1001], seconds=6)  # 50 s
    assert len(faster) == round(4.5 * frames.FPS) + round(frames.HOLD * frames.FPS) and faster[0] == 0 and faster[-1] == 1000


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_moving_picture(corpus, drawer_task, assets, tmp_path, monkeypatch, suffix):
    (path, (one, zero, _)), out = corpus, tmp_path / f"patterns{suffix}"
    call(monkeypatch, path, "--animate", "--out", out, "--size", 24, "--assets", assets)
    with Image.open(out) as moving:
        assert moving.size == (2 * 24 + 4, 24) and moving.info["loop"] == 0
        milliseconds, cells = 0, []
        for frame in ImageSequence.Iterator(moving):
            cells.append(np.asarray(frame.convert("RGB")).astype(int))
            milliseconds += frame.info["duration"]
    assert milliseconds == 80 * (round(16 / 20 * frames.FPS) + round(frames.HOLD * frames.FPS))
    for left, episode in ((0, zero), (28, one)):
        states = np.vstack([episode.states[:1], episode.final_state])
        for cell, expected in zip((cells[0], cells[-1]), seen(drawer_task, states), strict=True):
            ours, label = cell[:, left : left + 24], cell[:12, left : left + 12]
            assert np.abs(ours - expected)[12:].mean() < 6  # in 255 colours, or compressed
            colour = [int(frames.COLOURS[left > 0][i : i + 2], 16) for i in (1, 3, 5)]
            off = np.abs(np.median(label, (0, 1)) - colour).max()  # a white number on the pattern's colour
            assert off <= (0 if suffix == ".gif" else 60) and label.max() > 200


def test_refused(corpus, assets, tmp_path, monkeypatch):
    path, _ = corpus
    for flags, message in (
        (["--out", tmp_path / "x.gif"], "must end in .png; moving pictures: --animate"),
        (["--animate", "--out", tmp_path / "x.png"], "must end in .gif or .webp"),
        (["--animate", "--out", tmp_path / "x.gif", "--seconds", 1], "--seconds must be more than 1.5"),
        (["--out", tmp_path / "x.png", "--columns", 0], "must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            call(monkeypatch, path, *flags, "--assets", assets)
    assert not list(tmp_path.iterdir())
