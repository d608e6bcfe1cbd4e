"""`python -m common.data FILE ...`: sum up demonstration files and corpora, or say what is wrong with them."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import tyro

from common.cli import UserError, run_command
from common.data.check import check_file
from common.data.layout import DATA_ATTRS, opened, picture_sizes, read_arrays
from common.data.read import read_attrs, read_episodes


def main(files: tyro.conf.Positional[list[Path]], strict: bool = False) -> None:
    """Sum up demonstration files and corpora, or list what is wrong with them.

    Args:
        files: HDF5 files in LIBERO's layout.
        strict: Also ask for what LIBERO's integrity check wants: 50 demonstrations a file and the tag.
    """
    if not files:
        raise UserError("no file given; name one or more HDF5 files")
    bad = 0
    for path in files:
        if problems := check_file(path, strict=strict):
            bad += 1
            print(*(f"{path}: {problem}" for problem in problems), sep="\n", file=sys.stderr)
        else:
            print(_summary(path))
    if bad:
        raise UserError(f"{bad} of {len(files)} files can't be used as they are; each problem is listed above")


def _summary(path: Path) -> str:
    attrs = read_attrs(path)
    episodes = read_episodes(path)
    with opened(path) as file:
        shapes = picture_sizes(read_arrays(next(iter(file["data"].values()))))
    lengths = [episode.length for episode in episodes]
    patterns = Counter(episode.attrs["pattern"] for episode in episodes)
    strategies = Counter(episode.attrs["strategy"] for episode in episodes)
    instruction = "".join(attrs["problem_info"]["language_instruction"]).strip('"')
    lines = {
        "task": f"{attrs['bddl_file_name'].removesuffix('.bddl')} ({instruction})",
        "episodes": f"{len(episodes)}, {sum(episode.success for episode in episodes)} successful",
        "steps": f"{sum(lengths)}, {min(lengths)} to {max(lengths)} an episode, {np.mean(lengths):.1f} on average",
        "patterns": ", ".join(f"{'unknown' if p == -1 else p}: {n}" for p, n in sorted(patterns.items())),
        "strategies": ", ".join(f"{s or 'unknown'}: {n}" for s, n in sorted(strategies.items())),
        "images": ", ".join(f"{name} {height}x{width}" for name, (height, width) in shapes.items()) or "none",
    }
    ours = {key: value for key, value in attrs.items() if key not in (*DATA_ATTRS, "tag", "task")}
    return "\n".join([str(path), *(f"  {key:<10} {value}" for key, value in {**lines, **ours}.items())])


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
