"""Action chunks out of corpora in LIBERO's HDF5 layout, read while they are needed: what vla_pretrain.py and vla_finetune.py learn from.

A sample is what the policy sees before action t and the actions t, t+1, ... after it. LIBERO's files hold pictures and proprioception
AFTER each action, so those of step t - 1 belong to action t, and the first action of an episode, which has no picture, is left out. Files
as OpenVLA regenerates them hold what was seen BEFORE each action: there it is that of step t, and no action is left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.cli import UserError
from common.data.layout import DAMAGE, opened, proprioception, unreadable
from common.data.layout import PROPRIO as STORED
from common.data.read import UNTOLD
from common.data.understand import Source, understand

CAMERAS = {"agentview_rgb": "agentview", "eye_in_hand_rgb": "robot0_eye_in_hand"}  # as files and as models call them
PROPRIO = {name: STORED[name] for name in ("ee_pos", "ee_ori", "gripper_states")}  # LeRobot's observation.state: m, axis-angle rad, m
PROPRIO_SIZE, ACTION_SIZE = sum(PROPRIO.values()), 7


@dataclass
class Corpus:
    """One file: what it is of, and the episodes taken from it."""

    path: str
    task: str  # suite/name
    language: str
    source: str  # the script that made it
    image_size: int
    renderer: str
    assets: str
    mujoco: str
    file: Source  # how its numbers and pictures are to be taken
    demos: list[str]
    rows: list[np.ndarray]  # of each, the steps taken: all of them, or all but no-ops

    @property
    def lengths(self) -> list[int]:
        """The number of steps taken of each episode."""
        return [len(rows) for rows in self.rows]

    @property
    def lag(self) -> int:
        """What was seen before action t stands in row t - lag."""
        return 0 if self.file.before else 1


def corpus_files(path: str | os.PathLike) -> list[Path]:
    """The corpora of a sweep, where `path` is its folder (corpora.json in it says which); any other path is a file, itself.

    UserError for another folder, and for a sweep that has no corpus yet.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    try:
        names = json.loads((path / "corpora.json").read_text())
        files = [path / name for name in names]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is a folder without a sweep's corpora.json; name HDF5 files") from error
    if not files:
        raise UserError(f"{path} has no corpus yet; python -m common.sweep --out {path} goes on with it")
    return files


def read_corpora(
    paths: Sequence[str | os.PathLike],
    max_episodes: int | None = None,
    seed: int = 0,
    filter_key: str | None = None,
    drop_no_ops: bool = False,
) -> list[Corpus]:
    """Check corpora and choose their episodes; no picture is decoded. What had to be assumed to read them is logged.

    Args:
        max_episodes: of each file, drawn at random; a larger number draws the same ones and more.
        filter_key: only the demonstrations that robomimic's mask/<filter_key> names, in each file.
        drop_no_ops: leave out steps that neither move the hand nor the gripper, and what is seen before them, as if they had not been.

    Raises UserError for no file, a damaged one, one without pictures or successful episodes, and files that do not go together.
    """
    if not paths:
        raise UserError("no corpus to learn from; give --data FILE ... (runs/*/corpus.hdf5, or demonstrations)")
    corpora = []
    for path in paths:
        file = understand(path, filter_key=filter_key, pictures=True)
        if any(demo.success is None for demo in file.demos.values()):
            file.notes.append(UNTOLD)
        if drop_no_ops:
            dropped, steps = (sum(f(demo) for demo in file.demos.values()) for f in (lambda d: d.no_ops.sum(), lambda d: d.length))
            file.notes.append(f"{dropped} no-op steps of {steps} dropped")
        file.say()
        corpora.append(_corpus(file, max_episodes, seed, drop_no_ops))
    for corpus in corpora[1:]:
        for name in ("image_size", "renderer", "assets"):
            ours, theirs = getattr(corpora[0], name), getattr(corpus, name)
            if ours != theirs:
                remedy = (
                    "render one of them again: python -m common.libero.render FILE --overwrite" if name != "assets" else "use one of them"
                )
                raise UserError(f"{name} mismatch: {corpora[0].path} has {ours}, {corpus.path} has {theirs}; {remedy}")
    return corpora


def _corpus(file: Source, max_episodes: int | None, seed: int, drop_no_ops: bool) -> Corpus:
    path, attrs = file.path, file.attrs
    demos = [name for name, demo in file.demos.items() if demo.success is not False]
    if not demos:
        raise UserError(f"{path} holds no successful episode to learn from")
    if missing := [name for name in CAMERAS if name not in file.pictures]:
        raise UserError(f"{path} has no pictures {missing[0]}; render them: python -m common.libero.render {path} --size 64")
    height, width = file.pictures["agentview_rgb"]
    if height != width:
        raise UserError(
            f"{path} has pictures of {width} x {height} pixels, not square ones; python -m common.libero.render --overwrite makes such"
        )
    if file.suite is None:
        what = f"is of {file.name}, which is no task of LIBERO's" if file.name else "does not say of which task it is"
        raise UserError(
            f"{path} {what}; call it SUITE/TASK_demo.hdf5, as LIBERO's files are called (python -m common.libero lists the tasks)"
        )
    if max_episodes is not None:
        demos = [demos[i] for i in np.random.default_rng(seed).permutation(len(demos))[:max_episodes]]
    return Corpus(
        path=str(path),
        task=f"{file.suite}/{file.name}",
        language=file.language,
        source=str(attrs.get("script", "unknown")),
        image_size=int(height),
        renderer=str(attrs.get("renderer", "unknown")),
        assets=str(attrs.get("image_assets", attrs.get("assets", "unknown"))),
        mujoco=str(attrs.get("version_mujoco", attrs.get("mujoco", "unknown"))),
        file=file,
        demos=demos,
        rows=[np.flatnonzero(~(file.demos[name].no_ops & drop_no_ops)) for name in demos],
    )


def split(corpora: Sequence[Corpus], fraction: float, seed: int) -> tuple[list[Corpus], list[Corpus]]:
    """Training and validation corpora, whole episodes each: `fraction` of every file (one at least, if it is more than 0) is held out."""
    training, validation = [], []
    for number, corpus in enumerate(corpora):
        count = len(corpus.demos)
        held_out = min(max(1, round(fraction * count)), count - 1) if fraction > 0 else 0
        order = np.random.default_rng([seed, number]).permutation(count)
        for chosen, part in ((order[held_out:], training), (order[:held_out], validation)):
            rows = sorted(chosen)
            part.append(Corpus(**vars(corpus) | {k: [getattr(corpus, k)[i] for i in rows] for k in ("demos", "rows")}))
    for part, name in ((training, "training"), (validation, "validation")):
        if (fraction > 0 or name == "training") and not any(map(samples, part)):
            count = sum(len(c.demos) for c in corpora)
            raise UserError(f"the {name} split is empty: {count} episodes in all; give more, or --val-fraction 0")
    return training, validation


def samples(corpus: Corpus) -> list[int]:
    """How many samples each episode gives: one for each step before which something was seen."""
    return [int((rows >= corpus.lag).sum()) for rows in corpus.rows]


class Chunks(Dataset):
    """Samples of corpora. Pictures are read when they are needed, in any process; the rest, 60 bytes a step, is kept in memory.

    Samples `chunks[indices]` come as a batch: images (B, 2, H, W, 3) uint8, row 0 the top; proprio (B, 8) float32; actions
    (B, chunk, 7) float32, 0 after the episode's end; mask (B, chunk) float32, 1 where there is an action; instruction (B,) int64, an
    index into `instructions`.
    """

    def __init__(self, corpora: Sequence[Corpus], chunk: int):
        """Raises UserError if a file is damaged."""
        self.corpora, self.chunk = list(corpora), chunk
        self.instructions = sorted({c.language for c in corpora})
        self.instruction_of = [self.instructions.index(c.language) for c in corpora]
        self.episodes = [(c, name) for c, corpus in enumerate(corpora) for name in corpus.demos]
        self.rows = [rows[rows >= corpus.lag] for corpus in corpora for rows in corpus.rows]  # the steps before which something was seen
        counts = [samples(corpus) for corpus in corpora]
        self.starts = np.cumsum([0, *(n for each in counts for n in each)])
        self.sizes = [sum(each) for each in counts]  # samples of each corpus
        self.proprio, self.actions = [], []  # of each episode, (T, 8) and (T, 7)
        self._files: dict[str, h5py.File] = {}
        self._process = 0
        for corpus in corpora:
            with opened(corpus.path) as file:
                for name in corpus.demos:
                    with _reading(corpus, name):
                        demo = file[f"data/{name}"]
                        self.proprio.append(np.concatenate([proprioception(demo["obs"], key) for key in PROPRIO], 1).astype(np.float32))
                        self.actions.append(corpus.file.commands(demo["actions"][()]).astype(np.float32))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict:
        return vars(self) | {"_files": {}, "_process": 0}

    def __getitem__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        count, side = len(indices), self.corpora[0].image_size
        images, proprio = np.empty((count, len(CAMERAS), side, side, 3), np.uint8), np.empty((count, PROPRIO_SIZE), np.float32)
        actions, mask = np.zeros((count, self.chunk, ACTION_SIZE), np.float32), np.zeros((count, self.chunk), np.float32)
        instruction = np.empty(count, np.int64)
        for i, index in enumerate(indices):
            episode = int(np.searchsorted(self.starts, index, side="right")) - 1
            number, name = self.episodes[episode]
            corpus = self.corpora[number]
            rows = self.rows[episode][index - self.starts[episode] :][: self.chunk]  # the steps whose actions these are
            seen = rows[0] - corpus.lag
            with _reading(corpus, name):
                for camera, stored in enumerate(CAMERAS):
                    picture = self._open(corpus.path)[f"data/{name}/obs/{stored}"][seen]
                    images[i, camera] = picture[::-1] if corpus.file.flip else picture
            actions[i, : len(rows)], mask[i, : len(rows)] = self.actions[episode][rows], 1
            proprio[i], instruction[i] = self.proprio[episode][seen], self.instruction_of[number]
        batch = {"images": images, "proprio": proprio, "actions": actions, "mask": mask, "instruction": instruction}
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def _open(self, path: str) -> h5py.File:
        if self._process != os.getpid():  # HDF5 files must not be shared over a fork
            self._files, self._process = {}, os.getpid()
        if path not in self._files:
            try:
                self._files[path] = opened(path)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
        return self._files[path]

    def statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation of the proprioception, 1 % and 99 % quantiles of the actions."""
        edges = np.linspace(-1, 1, 2001)
        taken = [rows for corpus in self.corpora for rows in corpus.rows]
        proprio = np.concatenate([x[rows] for x, rows in zip(self.proprio, taken, strict=True)]).astype(np.float64)
        actions = np.concatenate([x[rows] for x, rows in zip(self.actions, taken, strict=True)])
        below = np.cumsum([np.histogram(column, edges)[0] for column in actions.T], axis=1) / len(actions)
        return {
            "proprio_mean": proprio.mean(0).tolist(),
            "proprio_std": proprio.std(0).tolist(),
            "action_low": [float(edges[np.searchsorted(row, 0.01)]) for row in below],
            "action_high": [float(edges[np.searchsorted(row, 0.99) + 1]) for row in below],
        }


@contextlib.contextmanager
def _reading(corpus: Corpus, name: str) -> Iterator[None]:
    """What goes wrong in reading an episode becomes a UserError."""
    try:
        yield
    except DAMAGE as error:
        raise UserError(f"{corpus.path}: {name} is {unreadable(error)}") from None


class Order:
    """Which samples make up the batch of each step: a function of (seed, step), so that resuming needs no state.

    An epoch shows every sample of a corpus `weights[i]` times (a fraction: that share of them, others in the next epoch), shuffled
    over all corpora. Batches are whole: what is left at an epoch's end is dropped.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], batch_size: int, seed: int):
        self.sizes, self.weights, self.batch_size, self.seed = list(sizes), list(weights), batch_size, seed
        counts = [round(w * n) for w, n in zip(weights, sizes, strict=True)]
        self.steps_per_epoch = max(1, sum(counts) // batch_size)
        self._epoch, self._rows = -1, np.zeros(0, np.int64)

    def batch(self, step: int) -> np.ndarray:
        """(batch_size,) sample indices."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            rows, first = [], 0
            for size, weight in zip(self.sizes, self.weights, strict=True):
                whole, rest = divmod(round(weight * size), max(size, 1))
                rows += [np.tile(np.arange(first, first + size), whole), first + rng.permutation(size)[:rest]]
                first += size
            self._epoch, self._rows = epoch, rng.permutation(np.concatenate(rows))
        return np.resize(self._rows[position * self.batch_size :], self.batch_size)  # an epoch shorter than a batch is repeated


def batches(chunks: Chunks, order: Order, steps: range, parts: Sequence[slice], num_workers: int, pin: bool) -> Iterator[dict]:
    """Batches of the steps, in order: of each step's samples the `parts`, one after the other.

    Raises UserError if a file is found damaged, or a worker dies.
    """
    sampler = (order.batch(step)[part].tolist() for step in steps for part in parts)
    patience = 600 if num_workers else 0  # seconds: a worker that finds no shared memory says so on stderr, and nothing ever comes
    loader = DataLoader(chunks, batch_size=None, sampler=_Sized(sampler), num_workers=num_workers, pin_memory=pin, timeout=patience)
    try:
        yield from loader
    except UserError as error:  # from a worker it comes with that worker's traceback
        raise UserError(str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        raise explained(error) from None


def explained(error: Exception) -> Exception:
    """What DataLoader says when a worker dies, as a UserError; another error as it is.

    If the worker dies while it hands a batch over, that is the broken connection.
    """
    said = str(error)
    if "Bus error" in said or "DataLoader timed out" in said:
        return UserError(
            "no batch comes from the processes that read the corpora: the disk hangs, or /dev/shm is full; --resume the run with "
            "--num-workers 0, or give a container more shared memory (docker run --shm-size 1g)"
        )
    if isinstance(error, RuntimeError) and not ("DataLoader worker (pid" in said and ("killed" in said or "exited" in said)):
        return error
    return UserError("a process that reads the corpora was killed (out of memory?); --resume the run, perhaps with more memory free")


class _Sized:
    """An iterator of index lists, as DataLoader wants it."""

    def __init__(self, rows: Iterator[list[int]]):
        self.rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        return self.rows


def describe(corpora: Sequence[Corpus]) -> list[dict]:
    """Corpora for config.json and checkpoints."""
    return [
        {
            "file": "/".join(Path(c.path).parts[-2:]),
            "task": c.task,
            "language": c.language,
            "source": c.source,
            "episodes": len(c.demos),
            "steps": int(sum(c.lengths)),
            "mujoco": c.mujoco,
        }
        for c in corpora
    ]


def fingerprint(corpora: Sequence[Corpus]) -> str:
    """Twelve hex digits that tell whether a resumed run still has the same episodes, wherever their files lie now."""
    content = [
        [c.task, c.image_size, c.renderer, [(c.file.demos[d].digest, n) for d, n in zip(c.demos, c.lengths, strict=True)]] for c in corpora
    ]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]
