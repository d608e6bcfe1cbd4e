"""The corpora that benchmarks.vla_compare trains on: where they come from, copies with pictures, and which episodes of them are taken.

A copy holds all of a corpus's episodes, and robomimic's filter keys in it say which are taken: mask/held_out, which no VLA is trained on,
and one for each VLA.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import h5py
import numpy as np

from common.cli import UserError, atomic_path
from common.data import image_names, read_attrs
from common.data.layout import as_text, demo_names
from common.sweep import report as sweep_report

SOURCES = ("demonstrations", "human", "gaussian_ppo", "diffusion_ppo", "dlr_discover")
DEMONSTRATED = ("demonstrations", "human")  # the others are RL scripts, whose corpora sweeps hold
CONTROL = "noiseless"  # demonstrations without action noise: of no paper, to tell causes apart
HELD_OUT = 4  # episodes of each file
DOWNSTREAM = ("direct", "near")  # paths of the scripted demonstrator that only downstream demonstrations take; the others: only corpora


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row of the tables: what a VLA is trained on.

    `kind` says of what there are `amount` in each task: episodes; steps (as many as so many episodes of the shortest source have); or
    patterns (in one number of episodes); none: no training on corpora.
    """

    source: str
    kind: str
    amount: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """An episode of a corpus."""

    name: str
    steps: int
    way: str  # the demonstrator's strategy, or the pattern
    digest: str  # of its actions

    @property
    def downstream(self) -> bool:
        """Whether it goes a path that is kept for downstream demonstrations: of several steps, the first one's."""
        path = re.search(r"path (\w+)", self.way)
        return path is not None and path[1] in DOWNSTREAM


def entries(path: Path, key: str | None = None) -> list[Entry]:
    """The episodes of a file, or those that mask/KEY names."""
    with h5py.File(path) as file:
        data, found = file["data"], []
        for name in demo_names(data):
            attrs, actions = data[name].attrs, data[f"{name}/actions"][()]
            way = str(as_text(attrs.get("strategy", ""))) or str(attrs.get("pattern", -1))
            found.append(Entry(name, len(actions), way, hashlib.sha256(actions.tobytes()).hexdigest()[:8]))
        chosen = None if key is None else {as_text(name) for name in file["mask"][key][()]}
    return [e for e in found if chosen is None or e.name in chosen]


# ---------------------------------------------------------------------------------------------- where they come from


def read_sweeps(folders: Iterable[Path], sources: Iterable[str]) -> dict[str, dict[str, Path]]:
    """Source -> task -> the corpus that a sweep has; of several seeds the first one's.

    A source may come in parts, sweeps of one script and the same flags. UserError for no sweep, one of another source or with other flags,
    or a task that two of them have.
    """
    found: dict[str, dict[str, Path]] = {}
    flags: dict[str, list[str]] = {}
    for folder in folders:
        settings = sweep_report.read(folder)
        if not settings:
            raise UserError(f"{folder} is no sweep's folder: no sweep.json in it")
        script, source = settings["script"], Path(settings["script"]).stem
        if source not in sources or source in DEMONSTRATED:
            raise UserError(f"{folder} is a sweep of {script}, and --sources are {' '.join(sources)}")
        if settings["flags"] != flags.setdefault(source, settings["flags"]):
            raise UserError(f"{folder} is a sweep of {script} with other flags than another of it; give sweeps with the same")
        rows = sorted((row for row in settings.get("runs", []) if row["corpus"]), key=lambda row: -row["seed"])
        corpora = {row["task"]: folder.absolute() / row["corpus"] for row in rows}
        if not corpora:
            raise UserError(f"{folder} has no corpus yet; go on with it: python -m common.sweep --out {folder}")
        if twice := corpora.keys() & found.setdefault(source, {}).keys():
            raise UserError(f"{folder} is a second sweep of {script} with {min(twice)}; leave one out")
        found[source] |= corpora
    return found


def check_alike(paths: Iterable[Path], image_size: int) -> None:
    """UserError unless corpora were made on the same assets and such pictures as they have are of `image_size` and from our renderer."""
    seen = {"image size": (image_size, "this preset"), "renderer": ("warp", "this comparison")}
    for path in paths:
        attrs = read_attrs(path)
        here = {"assets": attrs.get("assets")} if "assets" in attrs else {}  # LIBERO's own do not say
        if (names := image_names(path)) and "renderer" in attrs:
            with h5py.File(path) as file:
                here |= {"image size": file[f"data/{demo_names(file['data'])[0]}/obs/{names[0]}"].shape[1], "renderer": attrs["renderer"]}
        for name, value in here.items():
            then, where = seen.setdefault(name, (value, path))
            if value != then:
                remedy = "make them on the same" if name == "assets" else "python -m common.libero.render FILE --overwrite makes others"
                raise UserError(f"{name} mismatch: {where} has {then}, {path} has {value}; {remedy}")


def assets_of(path: Path) -> str:
    return str(read_attrs(path).get("image_assets", "unknown"))


def copy_run(run: Path, to: Path) -> None:
    """What a finished run's --resume needs."""
    to.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "checkpoint.pt"):
        if not (to / name).exists():
            with atomic_path(to / name) as temporary:
                shutil.copyfile(run / name, temporary)


def copy_corpus(origin: Path, path: Path, call: Callable[..., bool], size: int, assets: str | None) -> None:
    """A copy with pictures of `size`, drawn by `call` unless our renderer has already, and with mask/held_out."""
    with atomic_path(path) as temporary:
        shutil.copyfile(origin, temporary)
        if not image_names(origin) or "renderer" not in read_attrs(origin):
            flags = ["--size", str(size), "--overwrite", *(["--assets", assets] if assets else [])]
            if not call("-m", "common.libero.render", temporary, *flags):
                raise UserError(f"{origin} got no pictures; python -m common.libero.render says why")
        order = np.random.default_rng(0).permutation([e.name for e in entries(temporary)])
        _write(temporary, {"held_out": list(order[:HELD_OUT])})


def write_masks(path: Path, masks: dict[str, list[str]]) -> None:
    """Add robomimic's filter keys to a file, which is replaced whole where it lacks one."""
    with h5py.File(path) as file:
        missing = {key: names for key, names in masks.items() if key not in file["mask"]}
    if missing:
        with atomic_path(path) as temporary:
            shutil.copyfile(path, temporary)
            _write(temporary, missing)


def _write(path: Path, masks: dict[str, list[str]]) -> None:
    with h5py.File(path, "r+") as file:
        for key, names in masks.items():
            file.require_group("mask").create_dataset(key, data=np.array(names, "S"))


# ---------------------------------------------------------------------------------------------- which episodes are taken


def pool(path: Path, source: str, protocol: str) -> list[Entry]:
    """What may be trained on: not what is held out, nor, where VLAs are fine-tuned, demonstrations in ways that downstream ones go."""
    held_out = {e.name for e in entries(path, "held_out")}
    kept = source == "demonstrations" and protocol == "transfer"
    return [e for e in entries(path) if e.name not in held_out and not (kept and e.downstream)]


def choose(episodes: list[Entry], cell: Cell, seed: int, steps: int = 0, size: int = 0) -> list[Entry]:
    """The episodes of one task that a row's VLA is trained on. They nest: more episodes, steps or patterns are these and others.

    Args:
        steps: of kind steps, how many there are to be; the number of episodes that comes closest.
        size: of kind patterns, how many episodes there are to be in all, of patterns each of which has as many.
    """
    order = [episodes[i] for i in np.random.default_rng(seed).permutation(len(episodes))]
    if cell.kind == "episodes":
        return order[: cell.amount]
    if cell.kind == "steps":
        return order[: 1 + int(np.abs(np.cumsum([e.steps for e in order]) - steps).argmin())]
    ways: dict[str, list[Entry]] = {}
    for e in order:
        ways.setdefault(e.way, []).append(e)
    ways = dict([way for way in ways.items() if len(way[1]) >= size][: cell.amount])
    return [e for turn in zip(*(found[:size] for found in ways.values()), strict=True) for e in turn][:size]
