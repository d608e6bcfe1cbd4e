"""LeRobot's dataset format, version 3.0: which files there are and what stands in them.

    meta/info.json                              features (name, type, shape), fps, counts, and the patterns of the paths below
    meta/stats.json                             min, max, mean, std, count and quantiles of each feature, for normalisation
    meta/tasks.parquet                          instruction -> task_index
    meta/episodes/chunk-000/file-000.parquet    a row an episode: its instruction, rows, place in the videos, statistics
    data/chunk-000/file-000.parquet             a row a frame: what was seen before an action, and the action
    videos/KEY/chunk-000/file-000.mp4           the frames' pictures, episode after episode
    corpus/NAME.hdf5                            ours: what the format has no place for (`dataset.export`)

As lerobot 0.4.4 reads and writes it, and as its documentation describes it ("LeRobotDataset v3.0").
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from common.cli import UserError

FPS = 20  # LIBERO's control rate
CAMERAS = {"agentview_rgb": "observation.images.image", "eye_in_hand_rgb": "observation.images.image2"}  # as its environment calls them
STATE = ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "finger1", "finger2"]  # m, rad, m
ACTION = ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper"]
INDICES = ("frame_index", "episode_index", "index", "task_index")
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
FILES_A_CHUNK, DATA_MB, VIDEO_MB = 1000, 100, 200  # a file is not begun with more in the one before
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


def arrow():
    """pyarrow and its Parquet module; UserError where it isn't installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"LeRobot's format needs pyarrow ({error}); run: pip install -r requirements-lerobot.txt") from error
    return pyarrow, pyarrow.parquet


def features(side: int, video: bool) -> dict[str, dict[str, Any]]:
    """info.json's `features`, with pictures of `side` x `side` pixels."""
    picture = {"dtype": "video" if video else "image", "shape": [side, side, 3], "names": ["height", "width", "channels"]}
    if video:
        codec = {"video.codec": "h264", "video.pix_fmt": "yuv420p", "video.is_depth_map": False, "has_audio": False}
        picture["info"] = {"video.height": side, "video.width": side, "video.channels": 3, "video.fps": FPS, **codec}
    return {
        **{key: picture for key in CAMERAS.values()},
        "observation.state": {"dtype": "float32", "shape": [len(STATE)], "names": STATE},
        "action": {"dtype": "float32", "shape": [len(ACTION)], "names": ACTION},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{name: {"dtype": "int64", "shape": [1], "names": None} for name in INDICES},
    }


def frame_schema(video: bool):
    """The columns of data/*.parquet; videos have none."""
    pa, _ = arrow()
    images = [] if video else [(key, pa.struct([("bytes", pa.binary()), ("path", pa.string())])) for key in CAMERAS.values()]
    vectors = [("observation.state", pa.list_(pa.float32(), len(STATE))), ("action", pa.list_(pa.float32(), len(ACTION)))]
    return pa.schema([*images, *vectors, ("timestamp", pa.float32()), *((name, pa.int64()) for name in INDICES)])


def task_table(instructions: Sequence[str]):
    """meta/tasks.parquet. LeRobot reads it with pandas, and the instructions as the index: pandas' own note in the file says so."""
    pa, _ = arrow()
    index = "__index_level_0__"
    column = {"metadata": None, "pandas_type": "int64", "numpy_type": "int64", "name": "task_index", "field_name": "task_index"}
    label = {"metadata": None, "pandas_type": "unicode", "numpy_type": "object", "name": None, "field_name": index}
    names = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": {"encoding": "UTF-8"}}
    note = {"index_columns": [index], "column_indexes": [names], "columns": [column, label], "pandas_version": "2.0.0"}
    table = pa.table({"task_index": pa.array(range(len(instructions)), pa.int64()), index: pa.array(list(instructions), pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(note)})


class Statistics:
    """What stats.json says of a feature, exactly: of vectors from all rows, of pictures from the histogram of each channel."""

    def __init__(self, rows: Sequence[np.ndarray] = (), histogram: np.ndarray | None = None, count: int = 0):
        self.rows, self.histogram, self.count = list(rows), histogram, count

    @staticmethod
    def of(values: np.ndarray) -> Statistics:
        """Of rows (n, width), or pictures (n, H, W, 3) uint8."""
        if values.ndim != 4:
            return Statistics([np.asarray(values, np.float64)], count=len(values))
        return Statistics(histogram=np.stack([np.bincount(values[..., c].ravel(), minlength=256) for c in range(3)]), count=len(values))

    def __add__(self, other: Statistics) -> Statistics:
        histogram = other.histogram if self.histogram is None else self.histogram + other.histogram if other.histogram is not None else None
        return Statistics(self.rows + other.rows, histogram, self.count + other.count)

    def as_lists(self) -> dict[str, list]:
        """Name -> numbers of each column (n), or of each channel (3, 1, 1) in [0, 1]; count (1,): rows or pictures."""
        if self.histogram is None:
            values = np.concatenate(self.rows)
            found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
            found |= {f"q{100 * q:02.0f}": row for q, row in zip(QUANTILES, np.quantile(values, QUANTILES, axis=0), strict=True)}
            return {name: value.tolist() for name, value in found.items()} | {"count": [self.count]}
        levels, weights = np.arange(256) / 255, self.histogram / self.histogram.sum(1, keepdims=True)
        cumulated, mean = weights.cumsum(1), weights @ levels
        found = {"min": levels[(weights > 0).argmax(1)], "max": levels[255 - (weights > 0)[:, ::-1].argmax(1)], "mean": mean}
        found["std"] = np.sqrt(weights @ levels**2 - mean**2)
        found |= {f"q{100 * q:02.0f}": levels[(cumulated >= q - 1e-12).argmax(1)] for q in QUANTILES}
        return {name: value[:, None, None].tolist() for name, value in found.items()} | {"count": [self.count]}
