"""LeRobot's dataset format: what is exported is what is in the corpora, by pyarrow and, where it is there, by LeRobot itself; and back."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from common.cli import UserError
from common.data import check_file, read_episodes, write_episodes
from common.lerobot import dataset, layout
from common.lerobot.__main__ import export as export_command
from common.video import read_video

ROOT = Path(__file__).resolve().parents[1]
LENGTHS, SIDE = (6, 4, 5), 96  # 96: what LeRobot's smallest vision backbone takes


@pytest.fixture(scope="module")
def episodes(drawer_task, demos):
    """The ends of three demonstrations, with pictures that are smooth (so that a codec keeps them) and all different."""
    short = []
    down, right = np.mgrid[:SIDE, :SIDE] / SIDE
    for k, (episode, n) in enumerate(zip(read_episodes(demos, drawer_task)[:3], LENGTHS, strict=True)):
        proprio = {name: values[-n:] for name, values in episode.proprio.items()}
        images = {
            name: np.stack([255 * np.stack([down, right, np.full_like(down, (20 * k + 3 * t + 5 * c) / 100)], -1) for t in range(n)])
            for c, name in enumerate(("agentview_rgb", "eye_in_hand_rgb"))
        }
        images = {name: frames.astype(np.uint8) for name, frames in images.items()}
        episode.attrs.update(pattern=k, source="dlr_discover", init_state=7)
        actions, states = episode.actions[-n:], episode.states[-n:]
        short.append(dataclasses.replace(episode, actions=actions, states=states, proprio=proprio, images=images))
    return short


@pytest.fixture(scope="module")
def corpora(drawer_task, episodes, tmp_path_factory):
    """A run's corpus of two episodes, and a file of one and of one that failed."""
    folder = tmp_path_factory.mktemp("corpora")
    paths = [folder / "a_run" / "corpus.hdf5", folder / "demos.hdf5"]
    attrs = {"script": "dlr_discover", "assets": drawer_task.assets, "renderer": "warp"}
    paths[0].parent.mkdir()
    write_episodes(paths[0], episodes[:2], drawer_task, attrs)
    write_episodes(paths[1], [episodes[2], dataclasses.replace(episodes[1], success=False)], drawer_task, attrs)
    with h5py.File(paths[0], "a") as file:
        file["mask/train"] = [b"demo_0"]
    return paths


@pytest.fixture(scope="module")
def exported(corpora, tmp_path_factory):
    """Datasets with videos and with images."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (requirements-lerobot.txt)")
    folder = tmp_path_factory.mktemp("lerobot")
    for videos in (True, False):
        dataset.export(folder / str(videos), corpora, videos=videos)
    return {videos: folder / str(videos) for videos in (True, False)}


def expected(episodes):
    """(n, 8) states, (n, 7) actions and the pictures of all frames: what was seen after an action belongs to the next one."""
    state = [np.hstack([e.proprio[name][:-1] for name in ("ee_pos", "ee_ori", "gripper_states")]) for e in episodes]
    images = [np.concatenate([e.images[name][:-1] for e in episodes]) for name in ("agentview_rgb", "eye_in_hand_rgb")]
    return np.concatenate(state).astype(np.float32), np.concatenate([e.actions[1:] for e in episodes]).astype(np.float32), images


def test_layout_by_pyarrow(exported, episodes, drawer_task):
    from PIL import Image
    from pyarrow import parquet

    state, action, images = expected(episodes)
    info = json.loads((exported[False] / "meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_episodes"], info["total_frames"], info["total_tasks"]) == (
        "v3.0",
        20,
        3,
        12,
        1,
    )
    assert info["splits"] == {"train": "0:3"} and info["video_path"] is None
    table = parquet.read_table(exported[False] / info["data_path"].format(chunk_index=0, file_index=0))
    assert set(table.column_names) == set(info["features"]) and len(table) == 12
    np.testing.assert_array_equal(np.array(table["observation.state"].to_pylist(), np.float32), state)
    np.testing.assert_array_equal(np.array(table["action"].to_pylist(), np.float32), action)
    assert table["index"].to_pylist() == list(range(12)) and set(table["task_index"].to_pylist()) == {0}
    assert table["episode_index"].to_pylist() == [0] * 5 + [1] * 3 + [2] * 4
    assert table["frame_index"].to_pylist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]
    np.testing.assert_allclose(table["timestamp"].to_pylist(), np.array(table["frame_index"].to_pylist()) / 20, atol=1e-7)
    for key, frames in zip(("observation.images.image", "observation.images.image2"), images, strict=True):
        assert info["features"][key] == {"dtype": "image", "shape": [SIDE, SIDE, 3], "names": ["height", "width", "channels"]}
        stored = [np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in table[key].to_pylist()]
        np.testing.assert_array_equal(stored, frames)
    tasks = parquet.read_table(exported[False] / "meta/tasks.parquet")
    assert tasks.to_pydict() == {"task_index": [0], "__index_level_0__": [drawer_task.language]}
    rows = parquet.read_table(exported[False] / layout.EPISODES).to_pylist()
    assert [(r["dataset_from_index"], r["dataset_to_index"], r["length"]) for r in rows] == [(0, 5, 5), (5, 8, 3), (8, 12, 4)]
    assert [(r["pattern"], r["source"], r["init_state"], r["tasks"]) for r in rows] == [
        (k, "dlr_discover", 7, [drawer_task.language]) for k in range(3)
    ]
    assert [(r["corpus"], r["demo"]) for r in rows] == [("a_run", "demo_0"), ("a_run", "demo_1"), ("demos", "demo_0")]


def test_statistics_are_numpys(exported, episodes):
    state, action, images = expected(episodes)
    stats = json.loads((exported[True] / "meta/stats.json").read_text())
    for key, values in (("observation.state", state), ("action", action)):
        for name, value in (("min", values.min(0)), ("max", values.max(0)), ("mean", values.mean(0, np.float64)), ("std", values.std(0))):
            np.testing.assert_allclose(stats[key][name], value, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(stats[key]["q90"], np.quantile(values, 0.9, axis=0), rtol=1e-5, atol=1e-7)
        assert stats[key]["count"] == [12]
    for key, frames in zip(("observation.images.image", "observation.images.image2"), images, strict=True):
        pixels = frames.reshape(-1, 3) / 255
        for name, value in (("min", pixels.min(0)), ("max", pixels.max(0)), ("mean", pixels.mean(0)), ("std", pixels.std(0))):
            np.testing.assert_allclose(stats[key][name], value[:, None, None], atol=1e-9)
        for name, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
            value = np.quantile(pixels, q, axis=0, method="inverted_cdf")
            np.testing.assert_allclose(stats[key][name], value[:, None, None], atol=1e-9)
        assert stats[key]["count"] == [12]


def test_videos(exported, episodes):
    from pyarrow import parquet

    _, _, images = expected(episodes)
    info = json.loads((exported[True] / "meta/info.json").read_text())
    for key, frames in zip(("observation.images.image", "observation.images.image2"), images, strict=True):
        path = exported[True] / info["video_path"].format(video_key=key, chunk_index=0, file_index=0)
        back = np.stack(list(read_video(path, SIDE, SIDE)))
        assert back.shape == frames.shape and np.abs(back.astype(int) - frames).mean() < 2
        assert info["features"][key]["dtype"] == "video" and info["features"][key]["info"]["video.fps"] == 20
        rows = parquet.read_table(exported[True] / layout.EPISODES).to_pylist()
        times = [(row[f"videos/{key}/from_timestamp"], row[f"videos/{key}/to_timestamp"]) for row in rows]
        np.testing.assert_allclose(times, [(0, 0.25), (0.25, 0.4), (0.4, 0.6)])


def contents(path) -> tuple[dict, dict]:
    """Everything in an HDF5 file: datasets and attributes by their path."""
    values, attrs = {}, {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: values.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
        file.visititems(lambda name, item: attrs.update({f"{name}@{key}": value for key, value in item.attrs.items()}))
    return values, attrs


def check_same(path, original, error: float) -> None:
    (values, attrs), (before, attrs_before) = contents(path), contents(original)
    assert values.keys() == before.keys() and attrs.keys() == attrs_before.keys()
    assert all(np.array_equal(attrs[key], attrs_before[key]) for key in attrs)
    for key, value in values.items():
        if key.endswith("_rgb"):
            assert value.shape == before[key].shape and np.abs(value.astype(int) - before[key]).mean((1, 2, 3)).max() <= error, key
        else:
            np.testing.assert_array_equal(value, before[key])


def test_there_and_back(exported, corpora, drawer_task, tmp_path):
    for videos, error in ((True, 2), (False, 0)):
        out = tmp_path / str(videos)
        assert dataset.import_(exported[videos], out) == [out / "a_run.hdf5", out / "demos.hdf5"]
        assert len(os.listdir(out)) == 2 and check_file(out / "a_run.hdf5", drawer_task) == []
        for path, original in zip((out / "a_run.hdf5", out / "demos.hdf5"), corpora, strict=True):
            check_same(path, original, error)


def test_no_ops_and_mirrored_there_and_back(corpora, drawer_task, episodes, tmp_path):
    """Steps that are left out keep their pictures; left and right are swapped in the dataset alone."""
    pytest.importorskip("pyarrow")
    still = [dataclasses.replace(e, actions=e.actions.copy()) for e in episodes[:1]]
    still[0].actions[2:4, :6], still[0].actions[:, 6] = 0, -1  # of 6
    write_episodes(tmp_path / "still.hdf5", still, drawer_task, {"renderer": "warp"})
    dataset.export(tmp_path / "out", [tmp_path / "still.hdf5"], videos=False, mirror=True, drop_no_ops=True)
    from PIL import Image
    from pyarrow import parquet

    table = parquet.read_table(tmp_path / "out/data/chunk-000/file-000.parquet")
    np.testing.assert_array_equal(np.array(table["action"].to_pylist(), np.float32), still[0].actions[[1, 4, 5]].astype(np.float32))
    seen = [np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in table["observation.images.image"].to_pylist()]
    np.testing.assert_array_equal(seen, still[0].images["agentview_rgb"][[0, 3, 4], :, ::-1])
    dataset.import_(tmp_path / "out", tmp_path / "back")
    check_same(tmp_path / "back" / "still.hdf5", tmp_path / "still.hdf5", 0)


def test_files_are_not_endless(corpora, episodes, tmp_path, monkeypatch):
    """Past their sizes new files are begun, and the way back finds everything."""
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(layout, "DATA_MB", 1e-6)
    monkeypatch.setattr(layout, "VIDEO_MB", -1)
    monkeypatch.setattr(layout, "FILES_A_CHUNK", 2)
    dataset.export(tmp_path / "out", corpora)
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out/data").rglob("*.parquet"))
    assert files == [f"data/chunk-00{c}/file-00{f}.parquet" for c, f in ((0, 0), (0, 1), (1, 0))]
    assert len(list((tmp_path / "out/videos").rglob("*.mp4"))) == 6
    dataset.import_(tmp_path / "out", tmp_path / "back")
    check_same(tmp_path / "back" / "a_run.hdf5", corpora[0], 2)


def test_errors(corpora, exported, drawer_task, episodes, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    bare = [dataclasses.replace(episodes[0], images={})]
    write_episodes(tmp_path / "bare.hdf5", bare, drawer_task, {})
    with pytest.raises(UserError, match=r"bare.hdf5 has no pictures agentview_rgb; render them: python -m common.libero.render"):
        dataset.export(tmp_path / "out", [tmp_path / "bare.hdf5"])
    with pytest.raises(UserError, match="exists; choose another folder"):
        dataset.export(exported[True], corpora)
    odd = {name: frames[:, 1:, 1:] for name, frames in episodes[0].images.items()}
    write_episodes(tmp_path / "odd.hdf5", [dataclasses.replace(episodes[0], images=odd)], drawer_task, {})
    with pytest.raises(UserError, match="95 x 95 pixels can't be H.264.*--no-videos"):
        dataset.export(tmp_path / "out", [tmp_path / "odd.hdf5"])
    with pytest.raises(UserError, match="--max-episodes must be at least 1"):
        export_command(corpora, tmp_path / "out", max_episodes=0)
    with pytest.raises(UserError, match="is not a LeRobot dataset"):
        dataset.import_(tmp_path, tmp_path / "back")

    def changed(name: str, change) -> str:
        """A copy of the dataset with a change, and what importing it says."""
        shutil.copytree(exported[False], tmp_path / name)
        change(tmp_path / name)
        with pytest.raises(UserError) as error:
            dataset.import_(tmp_path / name, tmp_path / "back")
        return str(error.value)

    def other_action(folder):
        path = folder / "data/chunk-000/file-000.parquet"
        table = parquet.read_table(path)
        actions = table["action"].to_pylist()
        actions[6][0] += 0.5
        columns = table.to_pydict() | {"action": actions}
        parquet.write_table(type(table).from_pydict(columns, table.schema), path)

    def one_less(folder):
        table = parquet.read_table(folder / layout.EPISODES)
        parquet.write_table(table.slice(0, 2), folder / layout.EPISODES)

    def old(folder):
        (folder / "meta/info.json").write_text('{"codebase_version": "v2.1"}')

    assert "the actions of episode 1 are others" in changed("action", other_action)
    assert "demo_0 of demos is not in it" in changed("episode", one_less)
    assert "of LeRobot's format v2.1, not v3" in changed("old", old)
    assert "was not exported from a corpus" in changed("foreign", lambda folder: [p.unlink() for p in (folder / "corpus").iterdir()])
    assert not list((tmp_path / "back").glob("*")) and not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow .*; run: pip install -r requirements-lerobot.txt"):
        dataset.export(tmp_path / "out", corpora)


# ---------------------------------------------------------------------------------------------- LeRobot itself


@pytest.mark.parametrize("videos", [True, False], ids=["videos", "images"])
def test_lerobot_loads_every_frame(exported, episodes, drawer_task, videos, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lerobot = pytest.importorskip(
        "lerobot.datasets.lerobot_dataset", reason="lerobot is not installed (it needs an environment of its own)"
    )
    state, action, images = expected(episodes)
    loaded = lerobot.LeRobotDataset("someone/corpus", root=exported[videos], video_backend="pyav")
    assert len(loaded) == 12 and loaded.num_episodes == 3 and loaded.fps == 20
    for i in range(12):
        item = loaded[i]
        np.testing.assert_array_equal(item["observation.state"], state[i])
        np.testing.assert_array_equal(item["action"], action[i])
        assert item["task"] == drawer_task.language
        for key, frames in zip(("observation.images.image", "observation.images.image2"), images, strict=True):
            error = np.abs(np.moveaxis(item[key].numpy(), 0, -1) * 255 - frames[i])
            assert error.mean() < 2 if videos else error.max() < 1e-3
    assert loaded.meta.stats["action"]["mean"].shape == (7,) and loaded.meta.episodes[1]["pattern"] == 1


def test_lerobot_trains_on_it_and_evaluates_here(exported, tmp_path):
    """Ten steps of a small ACT by LeRobot's trainer; then `lerobot-eval` in our simulator, by one flag."""
    if importlib.util.find_spec("lerobot") is None:
        pytest.skip("lerobot is not installed (it needs an environment of its own)")

    def run(script: str, flags: str) -> None:
        command = [sys.executable, "-m", f"lerobot.scripts.{script}", *flags.split()]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        print(*result.stderr.splitlines()[-25:], *result.stdout.splitlines()[-10:], sep="\n")

    run(
        "lerobot_train",
        f"""--dataset.repo_id=someone/corpus --dataset.root={exported[True]} --dataset.video_backend=pyav
        --output_dir={tmp_path / "out"} --policy.type=act --policy.device=cpu --policy.push_to_hub=false --policy.chunk_size=4
        --policy.n_action_steps=4 --policy.dim_model=32 --policy.n_heads=2 --policy.dim_feedforward=32 --policy.n_encoder_layers=1
        --policy.latent_dim=8 --policy.n_vae_encoder_layers=1 --policy.pretrained_backbone_weights=null
        --steps=10 --batch_size=2 --num_workers=0 --log_freq=1 --eval_freq=0 --save_freq=10 --wandb.enable=false""",
    )
    policy = tmp_path / "out/checkpoints/000010/pretrained_model"
    assert (policy / "model.safetensors").is_file()
    run(
        "lerobot_eval",
        f"""--policy.path={policy} --policy.device=cpu --env.discover_packages_path=common.lerobot --env.type=fast_libero
        --env.task=libero_goal/0 --env.observation_height={SIDE} --env.observation_width={SIDE} --env.episode_length=8
        --eval.n_episodes=4 --eval.batch_size=2 --output_dir={tmp_path / "eval"}""",
    )
    info = json.loads((tmp_path / "eval/eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 4 and info["per_task"][0]["task_group"] == "libero_goal"
    assert len(list((tmp_path / "eval/videos").rglob("*.mp4"))) == 4
