"""`python -m common.data FILE ...`: sum up demonstration files and corpora, say what is wrong with them, mend them.

python -m common.data runs/*/corpus.hdf5              # what is in them, and what had to be assumed to read them
python -m common.data FILE --strict                   # everything that departs from LIBERO's layout
python -m common.data FILE --repair CLEAN.hdf5        # a copy that departs from it in nothing
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro

from common.cli import UserError, run_command
from common.data.check import check_file
from common.data.layout import DATA_ATTRS, Episode, as_text, opened, picture_sizes, read_arrays
from common.data.read import episodes_of, settle
from common.data.understand import Source, understand
from common.data.write import write_episodes


def main(files: tyro.conf.Positional[list[Path]], strict: bool = False, repair: Path | None = None, filter_key: str | None = None) -> None:
    """Sum up demonstration files and corpora, or list what is wrong with them.

    Args:
        files: HDF5 files in LIBERO's layout, or near it.
        strict: List every departure from the layout, and what else LIBERO's integrity check wants: 50 demonstrations a file and the tag.
        repair: Write a clean copy of the one file to this path: what can be understood, in LIBERO's layout to the letter.
        filter_key: Take only the demonstrations that robomimic's mask/KEY names.
    """
    if not files:
        raise UserError("no file given; name one or more HDF5 files")
    if repair and (strict or len(files) > 1):
        raise UserError("--repair takes one file, and goes without --strict")
    bad = 0
    for path in files:
        try:
            if strict and (problems := check_file(path, strict=True)):
                raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
            source = understand(path, filter_key=filter_key)
            if repair:
                _repair(source, repair)
                source = understand(repair)
            print(_summary(source))
        except UserError as error:
            if len(files) == 1 and not strict:
                raise
            bad += 1
            print(error, file=sys.stderr)
    if bad:
        raise UserError(f"{bad} of {len(files)} files can't be used as they are; each problem is listed above")


def _repair(source: Source, out: Path) -> None:
    """Write what can be used of a file to another one, whole or not at all, and say what was changed."""
    from common.libero import load_task  # the scene, and LIBERO's goal: only here does a file need the simulator
    from common.libero.judge import goal_reached

    if source.suite is None:
        raise UserError(f"{source.path} is not of a task of LIBERO's ({source.name or 'it names none'}); call it <task name>_demo.hdf5")
    if out.exists():
        raise UserError(f"{out} exists; choose another path")
    task = load_task(f"{source.suite}/{source.name}")
    source = understand(source.path, task, source.filter_key)
    numbers = list(episodes_of(source, images=False))
    settle(source, numbers, functools.partial(goal_reached, task))

    def episodes() -> Iterator[Episode]:
        with opened(source.path) as file:
            for name, judged, episode in zip(source.demos, numbers, episodes_of(source, images=True), strict=True):
                episode.success = judged.success
                if "model_file" in file[f"data/{name}"].attrs:
                    episode.attrs["model_file"] = as_text(file[f"data/{name}"].attrs["model_file"])
                yield episode

    ours = {key: value for key, value in source.attrs.items() if key not in (*DATA_ATTRS, "tag", "task")}
    repaired = "; ".join([*source.notes, *(f"left out {name}: {reason}" for name, reason in source.skipped.items())])
    write_episodes(out, episodes(), task, {**ours, "repaired": repaired or "nothing to repair"})


def _summary(source: Source) -> str:
    episodes = list(episodes_of(source, images=False))
    settle(source, episodes, None)
    with opened(source.path) as file:
        shapes = picture_sizes(read_arrays(file["data"][next(iter(source.demos))]))
    lengths = [episode.length for episode in episodes]
    patterns = Counter(episode.attrs["pattern"] for episode in episodes)
    strategies = Counter(episode.attrs["strategy"] for episode in episodes)
    lines = {
        "task": f"{source.name or 'unknown'} ({source.language or 'no instruction'})",
        "episodes": f"{len(episodes)}, {sum(episode.success for episode in episodes)} successful",
        "steps": f"{sum(lengths)}, {min(lengths)} to {max(lengths)} an episode, {np.mean(lengths):.1f} on average",
        "patterns": ", ".join(f"{'unknown' if p == -1 else p}: {n}" for p, n in sorted(patterns.items())),
        "strategies": ", ".join(f"{s or 'unknown'}: {n}" for s, n in sorted(strategies.items())),
        "images": ", ".join(f"{name} {height}x{width}" for name, (height, width) in shapes.items()) or "none",
    }
    ours = {key: value for key, value in source.attrs.items() if key not in (*DATA_ATTRS, "tag", "task")}
    left_out = (f"{name} ({reason})" for name, reason in source.skipped.items())
    told = {"assumed": "; ".join(source.notes), "left out": "; ".join(left_out)}
    rows = {**lines, **ours, **{key: value for key, value in told.items() if value}}
    return "\n".join([str(source.path), *(f"  {key:<10} {value}" for key, value in rows.items())])


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
