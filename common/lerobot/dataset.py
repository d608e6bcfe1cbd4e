"""Corpora to a LeRobot dataset, and back."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from common.cli import UserError, atomic_path
from common.data.layout import as_text, opened, proprioception
from common.data.understand import understand
from common.data.vla import PROPRIO, Corpus, corpus_files, read_corpora
from common.lerobot import layout
from common.lerobot.layout import CAMERAS, FPS, INDICES, Statistics, arrow
from common.runs import Progress, write_json
from common.video import read_video, video_writer

CRF, GOP = 18, 2  # every other picture is a whole one, for training reads them at random
KEPT, MIRROR = (
    "lerobot_rows",
    "lerobot_mirror",
)  # attributes in corpus/*.hdf5: which of a demonstration's pictures are in the dataset, and how
CARD = """---
task_categories: [robotics]
tags: [LeRobot, libero]
configs:
- {{config_name: default, data_files: data/*/*.parquet}}
---
{episodes} episodes, {frames} frames at {fps} a second, of {tasks}. LeRobot v3.0. Pictures are upright{mirrored}.
`meta/episodes` says of which pattern and from which script each episode is. `corpus/` holds what the format has no place for
(simulator states, attributes); its pictures are here, so don't train on those files.
"""


def export(
    out: Path,
    paths: Sequence[Path],
    videos: bool = True,
    mirror: bool = False,
    drop_no_ops: bool = False,
    max_episodes: int | None = None,
    filter_key: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the successful episodes of `paths` as a LeRobot dataset into the folder `out`, which appears whole or not at all.

    A frame is what was seen before an action, and the action, as `common.data.vla` pairs them: of an episode of T actions in LIBERO's
    layout there are T - 1, for what was seen before the first one is in no file. What the format has no place for (simulator states,
    attributes, pictures that belong to no frame) is kept beside it in corpus/NAME.hdf5, from which `import_` puts the corpora together.

    Args:
        videos: pictures as H.264; else as PNG in the parquet files, exact and several times as large.
        mirror: swap left and right, as in LeRobot's own sets of LIBERO.
        drop_no_ops, max_episodes, filter_key: see `read_corpora`.

    Raises UserError as `read_corpora`, and where pyarrow is missing or `out` exists.
    """
    arrow()
    progress = progress or Progress()
    if out.exists():
        raise UserError(f"{out} exists; choose another folder")
    corpora = read_corpora(
        [file for path in paths for file in corpus_files(path)], max_episodes, filter_key=filter_key, drop_no_ops=drop_no_ops
    )
    side, count = corpora[0].image_size, sum(len(corpus.demos) for corpus in corpora)
    if videos and side % 2:
        raise UserError(f"pictures of {side} x {side} pixels can't be H.264, whose sides are even; take --no-videos, or render others")
    instructions = list(dict.fromkeys(corpus.language for corpus in corpora))
    progress.stage("episodes", count)
    with _new_folder(out) as folder, contextlib.ExitStack() as stack:
        data = stack.enter_context(_DataFiles(folder, videos))
        films = {key: stack.enter_context(_Films(folder, key, side)) for key in CAMERAS.values()} if videos else {}
        episodes: list[dict[str, Any]] = []
        total: dict[str, Statistics] = {}
        begin = 0
        for corpus, name in zip(corpora, _distinct_names([corpus.path for corpus in corpora]), strict=True):
            with opened(corpus.path) as file:
                shown = {}
                for demo, rows in zip(corpus.demos, corpus.rows, strict=True):
                    if not len(rows := rows[rows >= corpus.lag]):
                        continue
                    group, shown[demo] = file["data"][demo], rows - corpus.lag
                    columns, pictures = _numbers(corpus, group, rows), _pictures(corpus, group, rows - corpus.lag, mirror)
                    columns |= _indices(len(rows), len(episodes), begin, instructions.index(corpus.language))
                    statistics = {key: Statistics.of(values) for key, values in (pictures | columns).items()}
                    total = {key: total[key] + s if key in total else s for key, s in statistics.items()}
                    row = {"episode_index": len(episodes), "tasks": [corpus.language], "length": len(rows)}
                    row |= {"dataset_from_index": begin, "dataset_to_index": (begin := begin + len(rows))}
                    row |= data.add(columns, {} if videos else pictures)
                    for key, film in films.items():
                        row |= film.add(pictures[key])
                    row |= {f"stats/{key}/{what}": v for key, s in statistics.items() for what, v in s.as_lists().items()}
                    row |= _told(corpus, group) | {"corpus": name, "demo": demo}
                    episodes.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
                    progress.update(1)
                _keep_rest(folder / "corpus" / f"{name}.hdf5", file, shown, mirror)
        if not episodes:
            raise UserError(f"{out} is not written: no episode has an action before which something was seen")
        stack.close()  # the folder is complete before it gets its name
        _write_meta(folder, episodes, instructions, total, side, videos, mirror)
    progress.close()


def _numbers(corpus: Corpus, demo: h5py.Group, rows: np.ndarray) -> dict[str, np.ndarray]:
    """observation.state (n, 8) before, and action (n, 7) of, each of `rows`."""
    state = np.concatenate([proprioception(demo["obs"], name)[rows - corpus.lag] for name in PROPRIO], axis=1)
    return {"observation.state": state.astype(np.float32), "action": corpus.file.commands(demo["actions"][()])[rows].astype(np.float32)}


def _pictures(corpus: Corpus, demo: h5py.Group, rows: np.ndarray, mirror: bool) -> dict[str, np.ndarray]:
    """(n, H, W, 3) uint8 of each camera, top row first."""
    turn = np.s_[:, :: -1 if corpus.file.flip else 1, :: -1 if mirror else 1]
    return {key: np.ascontiguousarray(demo["obs"][name][()][rows][turn]) for name, key in CAMERAS.items()}


def _indices(length: int, episode: int, begin: int, task: int) -> dict[str, np.ndarray]:
    """The columns that every dataset has."""
    steps = np.arange(length)
    values = dict(zip(INDICES, (steps, np.full(length, episode), begin + steps, np.full(length, task)), strict=True))
    return {"timestamp": (steps / FPS).astype(np.float32), **values}


def _told(corpus: Corpus, demo: h5py.Group) -> dict[str, Any]:
    """What the corpus says of an episode."""
    texts = {name: str(as_text(demo.attrs.get(name, default))) for name, default in (("source", corpus.source), ("strategy", ""))}
    return {"pattern": int(demo.attrs.get("pattern", -1)), "init_state": int(demo.attrs.get("init_state_index", -1)), **texts}


def _distinct_names(paths: Sequence[str]) -> list[str]:
    """A name for each file: of a run's corpus.hdf5 the run's; with a number behind it, if it is taken."""
    names: list[str] = []
    for path in map(Path, paths):
        stem = path.resolve().parent.name if path.name == "corpus.hdf5" else path.stem
        names.append(next(n for n in [stem, *(f"{stem}-{k}" for k in range(2, len(paths) + 1))] if n not in names))
    return names


def _place(number: int) -> dict[str, int]:
    """The chunk and the file of the number-th file of a kind."""
    return {"chunk_index": number // layout.FILES_A_CHUNK, "file_index": number % layout.FILES_A_CHUNK}


class _DataFiles:
    """data/*.parquet, a row group an episode; a new file after DATA_MB."""

    def __init__(self, folder: Path, videos: bool):
        self.folder, self.schema, self.number, self.bytes = folder, layout.frame_schema(videos), -1, math.inf
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> _DataFiles:
        return self

    def __exit__(self, *error) -> None:
        self.stack.__exit__(*error)

    def add(self, columns: Mapping[str, np.ndarray], pictures: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Write an episode; returns where, as meta/episodes has it."""
        pa, parquet = arrow()
        if self.bytes > layout.DATA_MB * 2**20:
            self.stack.close()
            self.number, self.bytes = self.number + 1, 0
            path = self.folder / layout.DATA.format(**_place(self.number))
            path.parent.mkdir(parents=True, exist_ok=True)
            self.writer = self.stack.enter_context(parquet.ParquetWriter(path, self.schema))
        arrays: dict[str, Any] = {key: v if v.ndim == 1 else list(v) for key, v in columns.items()}
        for key, frames in pictures.items():
            arrays[key] = [{"bytes": _png(frame), "path": f"{key}-{t}.png"} for t, frame in enumerate(frames)]
        table = pa.table([pa.array(arrays[field.name], field.type) for field in self.schema], schema=self.schema)
        self.writer.write_table(table)
        self.bytes += table.nbytes
        return {f"data/{name}": value for name, value in _place(self.number).items()}


def _png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


class _Films:
    """videos/KEY/*.mp4, episode after episode; a new file after VIDEO_MB."""

    def __init__(self, folder: Path, key: str, side: int):
        self.folder, self.key, self.side, self.number, self.frames = folder, key, side, -1, 0
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> _Films:
        return self

    def __exit__(self, *error) -> None:
        self.stack.__exit__(*error)

    def add(self, frames: np.ndarray) -> dict[str, Any]:
        """Write an episode; returns where, as meta/episodes has it."""
        if self.number < 0 or sum(p.stat().st_size for p in self.path.parent.glob(f".{self.path.stem}-*")) > layout.VIDEO_MB * 2**20:
            self.stack.close()
            self.number, self.frames = self.number + 1, 0
            self.path = self.folder / layout.VIDEO.format(video_key=self.key, **_place(self.number))
            options = ("-g", str(GOP), "-bf", "0")
            self.write = self.stack.enter_context(video_writer(self.path, self.side, self.side, FPS, CRF, options))
        self.write(frames)
        began, self.frames = self.frames, self.frames + len(frames)
        row = _place(self.number) | {"from_timestamp": began / FPS, "to_timestamp": self.frames / FPS}
        return {f"videos/{self.key}/{name}": value for name, value in row.items()}


def _keep_rest(path: Path, file: h5py.File, shown: Mapping[str, np.ndarray], mirror: bool) -> None:
    """`file` without the pictures that the dataset shows: `shown` says which, of each demonstration. HDF5 keeps no room for them."""
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as rest:
        for name in file:
            if name != "data":
                file.copy(name, rest)
        data = rest.create_group("data")
        data.attrs.update(file["data"].attrs)
        data.attrs[MIRROR] = mirror
        for name, demo in file["data"].items():
            if not isinstance(demo.get("obs"), h5py.Group):
                file["data"].copy(name, data)
                continue
            new = data.create_group(name)
            new.attrs.update(demo.attrs)
            new.attrs[KEPT] = shown.get(name, np.zeros(0, int))
            for key in demo:
                if key != "obs":
                    demo.copy(key, new)
            obs = new.create_group("obs")
            for key, values in demo["obs"].items():
                if key not in CAMERAS:
                    demo["obs"].copy(key, obs)
                    continue
                pictures = obs.create_dataset(key, values.shape, values.dtype, chunks=(1, *values.shape[1:]), compression="gzip")
                for row in np.setdiff1d(np.arange(len(values)), new.attrs[KEPT]):
                    pictures[row] = values[row]


def _write_meta(
    folder: Path, episodes: list[dict], instructions: list[str], total: dict[str, Statistics], side: int, videos: bool, mirror: bool
) -> None:
    pa, parquet = arrow()
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(episodes), folder / layout.EPISODES)
    parquet.write_table(layout.task_table(instructions), folder / "meta/tasks.parquet")
    write_json(folder / "meta/stats.json", {key: statistics.as_lists() for key, statistics in total.items()})
    frames = episodes[-1]["dataset_to_index"]
    counts = {"total_episodes": len(episodes), "total_frames": frames, "total_tasks": len(instructions), "fps": FPS}
    sizes = {"chunks_size": layout.FILES_A_CHUNK, "data_files_size_in_mb": layout.DATA_MB, "video_files_size_in_mb": layout.VIDEO_MB}
    info = {"codebase_version": "v3.0", "robot_type": "panda", **counts, **sizes, "splits": {"train": f"0:{len(episodes)}"}}
    info |= {"data_path": layout.DATA, "video_path": layout.VIDEO if videos else None, "features": layout.features(side, videos)}
    write_json(folder / "meta/info.json", info)
    tasks = f"{len(instructions)} tasks of LIBERO" if len(instructions) > 1 else f"one task of LIBERO ({instructions[0]})"
    mirrored = ", left and right swapped" if mirror else ""
    (folder / "README.md").write_text(CARD.format(episodes=len(episodes), frames=frames, fps=FPS, tasks=tasks, mirrored=mirrored))


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, which becomes it in the end, or is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- and back


def import_(folder: Path, out: Path, progress: Progress | None = None) -> list[Path]:
    """Put the corpora that were exported to `folder` together again, as `out`/NAME.hdf5: all as it was, pictures as the codec left them.

    Returns the files. Raises UserError if `folder` is no LeRobot dataset, was not exported from here, or is no longer what was exported.
    """
    progress = progress or Progress()
    info, episodes = _read_meta(folder)
    files = sorted((folder / "corpus").glob("*.hdf5"))
    if not files or "corpus" not in episodes[0]:
        raise UserError(
            f"{folder} was not exported from a corpus (there is no corpus/*.hdf5 in it): LIBERO's layout needs the simulator's states, and "
            "LeRobot's has no place for them"
        )
    if taken := [out / file.name for file in files if (out / file.name).exists()]:
        raise UserError(f"{taken[0]} exists; choose another folder")
    progress.stage("pictures", 2 * info["total_frames"])
    with contextlib.ExitStack() as stack:
        corpora = {}
        for file in files:
            temporary = stack.enter_context(atomic_path(out / file.name))
            shutil.copyfile(file, temporary)
            _compare(folder, info, [e for e in episodes if e["corpus"] == file.stem], file)
            corpora[file.stem] = stack.enter_context(h5py.File(temporary, "r+"))
        for stored, key in CAMERAS.items():
            for corpus, demo, t, frame in _stored_pictures(folder, info, episodes, key):
                data = corpora[corpus]["data"]
                pictures = data[demo]["obs"][stored]
                turn = np.s_[:: -1 if as_text(data.attrs.get("macros_image_convention", "opengl")) != "opencv" else 1]
                pictures[data[demo].attrs[KEPT][t]] = frame[turn, :: -1 if data.attrs[MIRROR] else 1]
                progress.update(1)
        for corpus in corpora.values():
            del corpus["data"].attrs[MIRROR]
            for demo in corpus["data"].values():
                demo.attrs.pop(KEPT, None)
    progress.close()
    return [out / file.name for file in files]


def _read_meta(folder: Path) -> tuple[dict, list[dict]]:
    """info.json, and meta/episodes but for the statistics."""
    _, parquet = arrow()
    try:
        info = json.loads((folder / "meta/info.json").read_text())
        version = info["codebase_version"]
        if not version.startswith("v3."):
            raise UserError(f"{folder} is of LeRobot's format {version}, not v3; lerobot's convert_dataset_v21_to_v30 brings it up to date")
        tables = [parquet.read_table(path) for path in sorted((folder / "meta/episodes").glob("*/*.parquet"))]
        rows = [row for t in tables for row in t.select([c for c in t.column_names if not c.startswith("stats/")]).to_pylist()]
        return info, sorted(rows, key=lambda row: row["episode_index"]) or [{}]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is not a LeRobot dataset (no readable meta/info.json and meta/episodes in it): {error}") from error


def _compare(folder: Path, info: dict, episodes: Sequence[dict], file: Path) -> None:
    """UserError unless the dataset's actions are those of the corpus that it was exported from."""
    _, parquet = arrow()
    source = understand(file)
    with opened(file) as corpus:
        kept = {name: demo.attrs[KEPT] for name, demo in corpus["data"].items() if len(demo.attrs.get(KEPT, ()))}
        if missing := kept.keys() - {e["demo"] for e in episodes}:
            raise UserError(f"{folder} is no longer what was exported: {sorted(missing)[0]} of {file.stem} is not in it")
        for episode in episodes:
            where = {name: episode[f"data/{name}"] for name in ("chunk_index", "file_index")}
            path, mine = folder / info["data_path"].format(**where), [("episode_index", "=", episode["episode_index"])]
            actions = np.array(parquet.read_table(path, columns=["action"], filters=mine)["action"].to_pylist(), np.float32)
            rows = kept[episode["demo"]] + (0 if source.before else 1)
            commands = source.commands(corpus["data"][episode["demo"]]["actions"][()])[rows].astype(np.float32)
            if actions.shape != commands.shape or (actions != commands).any():
                raise UserError(f"{folder} is no longer what was exported: the actions of episode {episode['episode_index']} are others")


def _stored_pictures(folder: Path, info: dict, episodes: Sequence[dict], key: str) -> Iterator[tuple[str, str, int, np.ndarray]]:
    """(corpus, demonstration, frame, picture (H, W, 3) uint8) of all frames."""
    _, parquet = arrow()
    if info["features"][key]["dtype"] == "image":
        for e in episodes:
            where = {name: e[f"data/{name}"] for name in ("chunk_index", "file_index")}
            path, mine = folder / info["data_path"].format(**where), [("episode_index", "=", e["episode_index"])]
            for t, picture in enumerate(parquet.read_table(path, columns=[key], filters=mine)[key].to_pylist()):
                yield e["corpus"], e["demo"], t, np.asarray(Image.open(io.BytesIO(picture["bytes"])).convert("RGB"))
        return
    place = [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    height, width, _ = info["features"][key]["shape"]
    for chunk, file in sorted({(e[place[0]], e[place[1]]) for e in episodes}):
        mine = sorted((e for e in episodes if (e[place[0]], e[place[1]]) == (chunk, file)), key=lambda e: e[place[2]])
        path = folder / info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file)
        frames, now = read_video(path, height, width), 0
        for e in mine:
            for _ in range(round(e[place[2]] * info["fps"]) - now):  # what an edited dataset no longer uses
                next(frames)
            for t in range(e["length"]):
                if (frame := next(frames, None)) is None:
                    raise UserError(f"{path} ends before its episodes do; copy or export it again")
                yield e["corpus"], e["demo"], t, frame
            now = round(e[place[2]] * info["fps"]) + e["length"]
