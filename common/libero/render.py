"""Pictures of the stored states, into demonstrations and corpora.

python -m common.libero.render FILE [FILE ...]
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tyro

from common.cli import UserError, run_command
from common.data import Episode, image_names, read_attrs, replace_images, require_sound
from common.libero.renderers import CAMERAS, make_renderer
from common.libero.tasks import Task, load_task_of


def add_images(
    path: str | os.PathLike,
    size: int = 128,
    cameras: Sequence[str] = CAMERAS,
    renderer: str = "warp",
    assets: str | None = None,
    progress=None,
    overwrite: bool = False,
) -> None:
    """Render the stored states of a file in LIBERO's layout into its obs/agentview_rgb, obs/eye_in_hand_rgb (T, size, size, 3).

    As LIBERO's, picture t shows the state AFTER action t. After the last one that is `final_state`; where the file has none (LIBERO's
    own), the robot as the proprioception has it among the objects one step (50 ms) earlier. The task is the one that the file names, the
    scene as `load_task` compiles it (fixtures of LIBERO's own files stood up to millimetres elsewhere). `renderer` and `image_assets`
    are recorded. On all cores; the file is replaced whole or left as it is.

    Args:
        cameras: names in the model, robot0_eye_in_hand becoming eye_in_hand_rgb.
        assets: default those that the file was made on; see `common.libero.tasks.load_task`.
        progress: a `common.runs.Progress`.
        overwrite: replace all pictures that the file has.

    Raises UserError for a file that is missing, damaged or of another layout, or has pictures; and as `make_renderer` and `load_task_of`.
    """
    require_sound(path)
    if not overwrite and (names := image_names(path)):
        raise UserError(f"{path} has pictures already ({', '.join(names)}); --overwrite replaces them")
    task = load_task_of(path, assets)
    require_sound(path, task)
    camera = make_renderer(task.model, cameras, size, size, renderer)
    batch = max(1, min(64, 2**22 // size**2))  # states at a time: bounds memory

    def pictures(episode: Episode) -> Iterator[dict[str, np.ndarray]]:
        qpos = _qpos_after(task, episode)
        for i in range(0, len(qpos), batch):
            seen = camera.render(qpos[i : i + batch])
            yield {f"{name.removeprefix('robot0_')}_rgb": frames for name, frames in seen.items()}
            if progress is not None:
                progress.update(len(qpos[i : i + batch]))

    if progress is not None:
        progress.stage(f"pictures of {Path(path).name}", int(read_attrs(path)["total"]))
    replace_images(path, pictures, {"renderer": camera.name, "image_assets": task.image_assets})


def _qpos_after(task: Task, episode: Episode) -> np.ndarray:
    """(T, nq) AFTER each action."""
    qpos = episode.states[:, 1 : 1 + task.model.nq]
    if episode.final_state is not None:
        last = episode.final_state[1 : 1 + task.model.nq]
    else:
        last = qpos[-1].copy()
        last[task.arm_qpos], last[task.gripper_qpos] = episode.proprio["joint_states"][-1], episode.proprio["gripper_states"][-1]
    return np.vstack([qpos[1:], last])


@dataclasses.dataclass
class Args:
    """Render the stored states of demonstrations and corpora into their files, as LIBERO's agentview_rgb and eye_in_hand_rgb."""

    files: tyro.conf.Positional[list[Path]]
    """HDF5 files in LIBERO's layout; each is replaced whole, or left as it is"""
    size: int = 128
    """height and width in pixels"""
    cameras: tuple[str, ...] = CAMERAS
    """camera names"""
    renderer: str = "warp"
    """warp (needs no GL library) or gl (MuJoCo's own, needs MUJOCO_GL=egl or osmesa and its library)"""
    overwrite: bool = False
    """replace all pictures that a file has"""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: those that the files were made on)"""


def main() -> None:
    from common.runs import Progress

    args = tyro.cli(Args)
    if not args.files:
        raise UserError("no file given; name one or more HDF5 files")
    progress = Progress()
    try:
        for path in args.files:
            add_images(path, args.size, args.cameras, args.renderer, args.assets, progress, args.overwrite)
            progress.say(f"{path}: {', '.join(image_names(path))}, {args.size} x {args.size}, renderer {args.renderer}")
    finally:
        progress.close()


if __name__ == "__main__":
    run_command(main)
