"""Action chunks out of corpora in LIBERO's HDF5 layout, read while they are needed: what vla_pretrain.py and vla_finetune.py learn from.

A sample is what the policy sees before action t and the actions t, t+1, ... after it. LIBERO's files hold pictures and proprioception
AFTER each action, so those of step t - 1 belong to action t, and the first action of an episode, which has no picture, is left out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.cli import UserError
from common.data.check import require_sound
from common.data.layout import PROPRIO as STORED
from common.data.read import read_attrs
from common.suites import resolve, task_names

CAMERAS = {"agentview_rgb": "agentview", "eye_in_hand_rgb": "robot0_eye_in_hand"}  # as files and as models call them
PROPRIO = {name: STORED[name] for name in ("ee_pos", "ee_ori", "gripper_states")}  # LeRobot's observation.state: m, axis-angle rad, m
PROPRIO_SIZE, ACTION_SIZE = sum(PROPRIO.values()), 7
_DAMAGE = (OSError, RuntimeError, KeyError, ValueError)  # what h5py raises on damaged bytes


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
    flip: bool  # pictures are stored bottom row first
    demos: list[str]
    lengths: list[int]  # T of each


def read_corpora(paths: Sequence[str | os.PathLike], max_episodes: int | None = None, seed: int = 0) -> list[Corpus]:
    """Check corpora and choose their episodes; no picture is decoded.

    Args:
        max_episodes: of each file, drawn at random; a larger number draws the same ones and more.

    Raises UserError for no file, a damaged one, one without pictures or successful episodes, and files that do not go together.
    """
    if not paths:
        raise UserError("no corpus to learn from; give --data FILE ... (runs/*/corpus.hdf5, or demonstrations)")
    corpora = []
    for path in paths:
        require_sound(path)
        try:
            corpora.append(_read_corpus(Path(path), max_episodes, seed))
        except _DAMAGE as error:
            raise UserError(f"{path}: damaged, cannot be read ({' '.join(str(error).split())}); write it again") from None
    for corpus in corpora[1:]:
        for name in ("image_size", "renderer", "assets"):
            ours, theirs = getattr(corpora[0], name), getattr(corpus, name)
            if ours != theirs:
                remedy = (
                    "render one of them again: python -m common.libero.render FILE --overwrite" if name != "assets" else "use one of them"
                )
                raise UserError(f"{name} mismatch: {corpora[0].path} has {ours}, {corpus.path} has {theirs}; {remedy}")
    return corpora


def _read_corpus(path: Path, max_episodes: int | None, seed: int) -> Corpus:
    attrs = read_attrs(path)
    with h5py.File(path, "r") as file:
        data = file["data"]
        demos = sorted((d for d in data if data[d].attrs.get("success", True)), key=lambda name: int(name[5:]))
        if not demos:
            raise UserError(f"{path} holds no successful episode to learn from")
        missing = [name for name in CAMERAS if any(f"obs/{name}" not in data[d] for d in demos)]
        if missing:
            raise UserError(f"{path} has no pictures {missing[0]}; render them: python -m common.libero.render {path} --size 64")
        height, width = data[demos[0]]["obs/agentview_rgb"].shape[1:3]
        if height != width:
            raise UserError(
                f"{path} has pictures of {width} x {height} pixels, not square ones; python -m common.libero.render --overwrite makes such"
            )
        if max_episodes is not None:
            demos = [demos[i] for i in np.random.default_rng(seed).permutation(len(demos))[:max_episodes]]
        bddl = data.attrs["bddl_file_name"]
        parts = PurePosixPath((bddl.decode() if isinstance(bddl, bytes) else bddl).replace("\\", "/")).parts
        suite, name = parts[-2] if len(parts) > 1 else "", parts[-1].removesuffix(".bddl")
        if suite not in task_names():  # a file from elsewhere: any suite that has such a task
            suite, index = resolve(name)
            name = task_names()[suite][index]
        return Corpus(
            path=str(path),
            task=f"{suite}/{name}",
            language="".join(attrs["problem_info"]["language_instruction"]).strip('"'),
            source=str(attrs.get("script", "unknown")),
            image_size=int(height),
            renderer=str(attrs.get("renderer", "unknown")),
            assets=str(attrs.get("image_assets", attrs.get("assets", "unknown"))),
            mujoco=str(attrs.get("version_mujoco", attrs.get("mujoco", "unknown"))),
            flip=attrs["macros_image_convention"] == "opengl",
            demos=demos,
            lengths=[len(data[d]["actions"]) for d in demos],
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
            part.append(Corpus(**vars(corpus) | {k: [getattr(corpus, k)[i] for i in rows] for k in ("demos", "lengths")}))
    for part, name in ((training, "training"), (validation, "validation")):
        if (fraction > 0 or name == "training") and not any(max(c.lengths, default=0) > 1 for c in part):
            count = sum(len(c.demos) for c in corpora)
            raise UserError(f"the {name} split is empty: {count} episodes in all; give more, or --val-fraction 0")
    return training, validation


class Chunks(Dataset):
    """Samples of corpora, read from their files one by one, in any process: memory does not grow with the corpus.

    A sample: images (2, H, W, 3) uint8, row 0 the top; proprio (8,) float32; actions (chunk, 7) float32, 0 after the episode's end;
    mask (chunk,) float32, 1 where there is an action; instruction, an index into `instructions`.
    """

    def __init__(self, corpora: Sequence[Corpus], chunk: int):
        self.corpora, self.chunk = list(corpora), chunk
        self.instructions = sorted({c.language for c in corpora})
        self.instruction_of = [self.instructions.index(c.language) for c in corpora]
        self.episodes = [(c, name) for c, corpus in enumerate(corpora) for name in corpus.demos]
        lengths = [length - 1 for corpus in corpora for length in corpus.lengths]
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.sizes = [sum(length - 1 for length in corpus.lengths) for corpus in corpora]  # samples of each corpus
        self._files: dict[str, h5py.File] = {}
        self._process = 0

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict:
        return vars(self) | {"_files": {}, "_process": 0}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        episode = int(np.searchsorted(self.starts, index, side="right")) - 1
        number, name = self.episodes[episode]
        corpus, t = self.corpora[number], int(index - self.starts[episode]) + 1
        try:
            demo = self._open(corpus.path)[f"data/{name}"]
            obs = demo["obs"]
            images = np.stack([obs[camera][t - 1] for camera in CAMERAS])
            proprio = np.concatenate([obs[key][t - 1] for key in PROPRIO])
            found = demo["actions"][t : t + self.chunk]
        except _DAMAGE as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{corpus.path}: {name} is damaged, cannot be read ({reason}); write the file again") from None
        actions, mask = np.zeros((self.chunk, ACTION_SIZE), np.float32), np.zeros(self.chunk, np.float32)
        actions[: len(found)], mask[: len(found)] = found, 1
        return {
            "images": torch.from_numpy(np.ascontiguousarray(images[:, ::-1]) if corpus.flip else images),
            "proprio": torch.from_numpy(proprio.astype(np.float32)),
            "actions": torch.from_numpy(actions),
            "mask": torch.from_numpy(mask),
            "instruction": torch.tensor(self.instruction_of[number]),
        }

    def _open(self, path: str) -> h5py.File:
        if self._process != os.getpid():  # HDF5 files must not be shared over a fork
            self._files, self._process = {}, os.getpid()
        if path not in self._files:
            self._files[path] = h5py.File(path, "r")
        return self._files[path]

    def statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation of the proprioception, 1 % and 99 % quantiles of the actions; one episode in memory at a time."""
        edges = np.linspace(-1, 1, 2001)
        counts, total = np.zeros((ACTION_SIZE, 2000)), 0
        mean, square = np.zeros(PROPRIO_SIZE), np.zeros(PROPRIO_SIZE)
        for number, name in self.episodes:
            with h5py.File(self.corpora[number].path, "r") as file:
                demo = file[f"data/{name}"]
                proprio = np.concatenate([demo[f"obs/{key}"][()] for key in PROPRIO], axis=1)
                actions = demo["actions"][()]
            counts += [np.histogram(column, edges)[0] for column in actions.T]
            mean, square, total = mean + proprio.sum(0), square + (proprio**2).sum(0), total + len(proprio)
        mean, square = mean / total, square / total
        below = np.cumsum(counts, axis=1) / total
        return {
            "proprio_mean": mean.tolist(),
            "proprio_std": np.sqrt(np.maximum(square - mean**2, 0)).tolist(),
            "action_low": [float(edges[np.searchsorted(row, 0.01)]) for row in below],
            "action_high": [float(edges[np.searchsorted(row, 0.99) + 1]) for row in below],
        }


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
    loader = DataLoader(chunks, batch_sampler=_Sized(sampler), num_workers=num_workers, pin_memory=pin)
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
    if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
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
        {"path": c.path, "task": c.task, "source": c.source, "episodes": len(c.demos), "steps": int(sum(c.lengths)), "mujoco": c.mujoco}
        for c in corpora
    ]


def fingerprint(corpora: Sequence[Corpus]) -> str:
    """Tells whether a resumed run still has the same episodes."""
    return hashlib.sha256(repr([[c.path, c.task, c.demos, c.lengths] for c in corpora]).encode()).hexdigest()
