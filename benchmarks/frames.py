"""Stored trajectories as pictures: a sheet of frames, or a moving picture of several side by side.

    python -m benchmarks.frames DIR/*/*.hdf5 --out docs/images/demonstrator.png                       # the first one of each file
    python -m benchmarks.frames RUN/corpus.hdf5 --frames 6 --columns 2 --out docs/images/frames.png   # the first one of each pattern
    python -m benchmarks.frames RUN/corpus.hdf5 --animate --out docs/images/patterns.webp             # the same, moving (.gif or .webp)

The files need no pictures: the stored states are rendered here, from the first one to the one in which the task is done.
"""

from __future__ import annotations

import dataclasses
import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image, ImageColor, ImageDraw, ImageFont

from common.cli import UserError, atomic_path, run_command
from common.data import read_episodes
from common.libero import Task
from common.libero.renderers import make_renderer
from common.libero.tasks import load_task_of
from common.plots import COLOURS
from common.runs import Progress

FPS = 12.5  # of moving pictures: GIF counts in hundredths of a second
HOLD = 1.5  # seconds at the end of a moving picture, in which nothing moves
CONTROL_HZ = 20


@dataclasses.dataclass
class Args:
    """Draw the first trajectory of each file, or of each pattern of a corpus."""

    files: tyro.conf.Positional[list[Path]]
    """HDF5 files in LIBERO's layout"""
    out: Path
    """the PNG to write; with --animate the GIF or WebP"""
    animate: bool = False
    """a looping picture in which all move at once, instead of a sheet of frames"""
    frames: int = 4
    """of a sheet: of each trajectory, evenly spaced in time"""
    seconds: float = 9.0
    """at most, of a moving picture until it begins again; where the longest trajectory takes more, all are shown faster"""
    columns: int | None = None
    """trajectories beside each other (default: 3 in a sheet, 4 in a moving picture)"""
    camera: str = "agentview"
    size: int = 160
    """height and width of each frame in pixels"""
    renderer: str = "warp"
    """warp (needs no GL library) or gl (MuJoCo's own, needs MUJOCO_GL=egl or osmesa and its library)"""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: those that the files were made on)"""


@dataclasses.dataclass
class Trajectory:
    task: Task
    qpos: np.ndarray  # (T + 1, nq)
    pattern: int  # -1: none is known

    @property
    def title(self) -> str:
        name = f"{self.task.suite}/{self.task.index} {self.task.language}"
        return name if self.pattern < 0 else f"pattern {self.pattern}: {name}"


def trajectories(path: Path, args: Args) -> list[Trajectory]:
    """The first trajectory of each pattern of a file, or of the file, if it has no patterns."""
    task = load_task_of(path, args.assets)
    first: dict[int, Trajectory] = {}
    for episode in read_episodes(path, task):
        states = episode.states if episode.final_state is None else np.vstack([episode.states, episode.final_state])
        pattern = int(episode.attrs["pattern"])
        first.setdefault(pattern, Trajectory(task, states[:, 1 : 1 + task.model.nq], pattern))
    return [first[pattern] for pattern in sorted(first)]


def pictures(shown: Trajectory, steps: Sequence[int] | np.ndarray, args: Args) -> np.ndarray:
    """(len(steps), size, size, 3) uint8 of some of a trajectory's states, drawn twice as large and averaged, for smooth edges."""
    size, (unique, order) = args.size, np.unique(steps, return_inverse=True)
    camera = make_renderer(shown.task.model, (args.camera,), 2 * size, 2 * size, args.renderer)
    drawn = camera.render(shown.qpos[unique])[args.camera].reshape(len(unique), size, 2, size, 2, 3)
    return (drawn.mean((2, 4)) + 0.5).astype(np.uint8)[order]


# ---------------------------------------------------------------------------------------------- a sheet


def strip(shown: Trajectory, args: Args) -> np.ndarray:
    """(size, frames * size, 3) uint8."""
    steps = np.linspace(0, len(shown.qpos) - 1, args.frames).round().astype(int)
    return np.concatenate(list(pictures(shown, steps, args)), axis=1)


def sheet(titles: list[str], strips: list[np.ndarray], columns: int, frames: int) -> Figure:
    rows = math.ceil(len(strips) / columns)
    figure = Figure(figsize=(1.2 * frames * columns, 1.55 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, title, picture in zip(axes, titles, strips, strict=False):
        axis.imshow(picture)
        axis.set_title("\n".join(textwrap.wrap(title, 16 * frames)), fontsize=7)
    return figure


def write_sheet(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure of pictures as a PNG of 256 colours: a third of the size, and no difference to the eye."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="png", optimize=True)


# ---------------------------------------------------------------------------------------------- a moving picture


def timelines(lengths: list[int], seconds: float) -> np.ndarray:
    """(frames, len(lengths)) steps to show: all begin together and move at one speed, the simulator's or, if the longest would take more
    than `seconds` less HOLD, as much faster; at the end all rest."""
    last = max(lengths) - 1
    moving = min(seconds - HOLD, last / CONTROL_HZ)
    moment = np.linspace(0, last, max(2, round(moving * FPS)))
    shown = np.minimum(moment[:, None].round().astype(int), np.array(lengths) - 1)
    return np.concatenate([shown, np.repeat(shown[-1:], round(HOLD * FPS), axis=0)])


def labelled(frames: np.ndarray, pattern: int) -> np.ndarray:
    """Frames (T, size, size, 3) with a pattern's number in its colour (that of all figures) in the upper left corner."""
    side = max(12, frames.shape[1] // 8)
    label = Image.new("RGB", (side, side), COLOURS[pattern % len(COLOURS)])
    ImageDraw.Draw(label).text((side / 2, side / 2), str(pattern), "white", ImageFont.load_default(0.75 * side), anchor="mm")
    frames = frames.copy()
    frames[:, :side, :side] = np.asarray(label)
    return frames


def side_by_side(shown: list[Trajectory], columns: int, args: Args, tick) -> list[Image.Image]:
    """The frames of a moving picture: a cell for each trajectory, with white lines between them. `tick()` after each cell."""
    gap, steps = 4, timelines([len(t.qpos) for t in shown], args.seconds)
    pitch, (down, across) = args.size + gap, (math.ceil(len(shown) / columns), min(columns, len(shown)))
    canvas = np.full((len(steps), down * pitch - gap, across * pitch - gap, 3), 255, np.uint8)
    for k, trajectory in enumerate(shown):
        cell = pictures(trajectory, steps[:, k], args)
        row, column = k // columns * pitch, k % columns * pitch
        cell = cell if trajectory.pattern < 0 else labelled(cell, trajectory.pattern)
        canvas[:, row : row + args.size, column : column + args.size] = cell
        tick()
    return [Image.fromarray(frame) for frame in canvas]


def write_animation(path: Path, frames: list[Image.Image]) -> None:
    """Write frames as a looping GIF or WebP, by the path's suffix."""
    options: dict = {"quality": 60, "method": 6, "minimize_size": True}
    if path.suffix == ".gif":  # one palette for all frames, so that what stands still costs nothing
        exact = ["#ffffff", *COLOURS]
        sample = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames[:: max(1, len(frames) // 8)]]))
        colours = sample.quantize(255 - len(exact), Image.Quantize.MEDIANCUT).getpalette()
        palette = Image.new("P", (1, 1))
        palette.putpalette([*colours, *(x for colour in exact for x in ImageColor.getrgb(colour))])
        frames, options = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames], {"optimize": True}
    with atomic_path(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=round(1000 / FPS), loop=0, **options)


# ---------------------------------------------------------------------------------------------- the command


def main() -> None:
    args = tyro.cli(Args)
    columns = args.columns if args.columns is not None else 4 if args.animate else 3
    if not args.files or min(args.frames, columns, args.size) < 1:
        raise UserError("name at least one HDF5 file; --frames, --columns and --size must be at least 1")
    suffixes = (".gif", ".webp") if args.animate else (".png",)
    if args.out.suffix not in suffixes:
        raise UserError(f"--out {args.out} must end in {' or '.join(suffixes)}" + ("" if args.animate else "; moving pictures: --animate"))
    if not HOLD < args.seconds <= 60:
        raise UserError(f"--seconds must be more than {HOLD}, and at most 60")
    shown = [trajectory for path in args.files for trajectory in trajectories(path, args)]
    progress = Progress()
    progress.stage("moving picture" if args.animate else "frames", len(shown))
    if args.animate:
        frames = side_by_side(shown, columns, args, lambda: progress.update(1))
        write_animation(args.out, frames)
        width, height = frames[0].size
        seconds, real = len(frames) / FPS, (max(len(t.qpos) for t in shown) - 1) / CONTROL_HZ + HOLD
        kilobytes = args.out.stat().st_size / 1000
        progress.say(f"{args.out}: {width} x {height}, {seconds:.1f} s for {real:.1f} s, {kilobytes:.0f} kB")
    else:
        strips = []
        for trajectory in shown:
            strips.append(strip(trajectory, args))
            progress.update(1)
        write_sheet(sheet([t.title for t in shown], strips, columns, args.frames), args.out, dpi=85)  # about a pixel for one of a frame
    progress.close()


if __name__ == "__main__":
    run_command(main)
