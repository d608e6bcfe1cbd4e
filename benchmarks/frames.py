"""A contact sheet: frames of the first demonstration in each of some files (docs/demonstrator.md).

    python -m common.demos --task libero_90/9 --episodes 1 --out DIR
    python -m benchmarks.frames DIR/*/*.hdf5 --out docs/images/demonstrator.png

The files need no pictures: the stored states are rendered here, from the first one to the one in which the task is done.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from common.cli import UserError, atomic_path, run_command
from common.data import read_episodes
from common.libero.renderers import make_renderer
from common.libero.tasks import load_task_of
from common.runs import Progress


@dataclasses.dataclass
class Args:
    """Draw frames of the first demonstration in each file, a file a strip."""

    files: tyro.conf.Positional[list[Path]]
    """HDF5 files in LIBERO's layout"""
    out: Path
    """the PNG to write"""
    frames: int = 4
    """of each demonstration, evenly spaced in time"""
    columns: int = 3
    """strips beside each other"""
    camera: str = "agentview"
    size: int = 160
    """height and width of each frame in pixels"""
    renderer: str = "warp"
    """warp (needs no GL library) or gl (MuJoCo's own, needs MUJOCO_GL=egl or osmesa and its library)"""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: those that the files were made on)"""


def strip(path: Path, args: Args) -> tuple[str, np.ndarray]:
    """The task's instruction, and (size, frames * size, 3) uint8."""
    task = load_task_of(path, args.assets)
    episode = read_episodes(path, task)[0]
    states = episode.states if episode.final_state is None else np.vstack([episode.states, episode.final_state])
    shown = states[np.linspace(0, len(states) - 1, args.frames).round().astype(int), 1 : 1 + task.model.nq]
    pictures = make_renderer(task.model, (args.camera,), args.size, args.size, args.renderer).render(shown)[args.camera]
    return f"{task.suite}/{task.index} {task.language}", np.concatenate(list(pictures), axis=1)


def main() -> None:
    args = tyro.cli(Args)
    if not args.files or min(args.frames, args.columns, args.size) < 1:
        raise UserError("name at least one HDF5 file; --frames, --columns and --size must be at least 1")
    progress = Progress()
    progress.stage("frames", len(args.files))
    strips = []
    for path in args.files:
        strips.append(strip(path, args))
        progress.update(1)
    progress.close()
    rows = math.ceil(len(strips) / args.columns)
    figure = Figure(figsize=(1.2 * args.frames * args.columns, 1.55 * rows), layout="constrained")
    axes = figure.subplots(rows, args.columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, picture) in zip(axes, strips, strict=False):
        axis.imshow(picture)
        axis.set_title("\n".join(textwrap.wrap(title, 16 * args.frames)), fontsize=7)
    with atomic_path(args.out) as temporary:
        figure.savefig(temporary, dpi=85, format="png")  # about a pixel of the picture for one of a frame


if __name__ == "__main__":
    run_command(main)
