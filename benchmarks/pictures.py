"""A side-by-side picture of the same states under both renderers and on both asset sets (docs/standins.md).

    MUJOCO_GL=egl python -m benchmarks.pictures --assets DIR --out docs/images/standins.png

One row a task: LIBERO's assets and the stand-ins, each drawn by the ray tracer and, where a GL library is found, by MuJoCo's renderer.
The state is the first official init state after half a second of no-ops on LIBERO's assets.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt

from common.cli import UserError, atomic_path, run_command
from common.libero import load_task, make_env
from common.libero.renderers import available, make_renderer

NAMES = {"warp": "ray tracer", "gl": "MuJoCo's OpenGL"}


@dataclasses.dataclass
class Args:
    """Draw the same states under both renderers and on both asset sets."""

    out: Path
    """the PNG to write"""
    tasks: tuple[str, ...] = ("libero_90/5", "libero_90/45", "libero_90/75", "libero_object/0")
    """task ids: a kitchen, a living room, a study, the floor"""
    camera: str = "agentview"
    size: int = 256
    """height and width of each picture in pixels"""
    assets: str | None = None
    """LIBERO's asset folder (default: $LIBERO_ASSETS, else LIBERO's own, else a download)"""


def main() -> None:
    import tyro

    args = tyro.cli(Args)
    possible, reason = available("gl")
    if not possible:
        print(f"the ray tracer's pictures only: {reason}")
    renderers = ["gl", "warp"] if possible else ["warp"]
    columns = [(kind, renderer) for kind in ("libero", "standin") for renderer in renderers]
    figure, axes = plt.subplots(len(args.tasks), len(columns), figsize=(2.6 * len(columns), 2.6 * len(args.tasks)), squeeze=False)
    for row, task_id in zip(axes, args.tasks, strict=True):
        real = load_task(task_id, args.assets)
        if real.assets.startswith("standin"):
            raise UserError("the picture compares with LIBERO's own assets; pass their folder with --assets DIR")
        tasks = {"libero": real, "standin": load_task(task_id, "standin")}
        env = make_env(real, settle_steps=10)
        env.reset(options={"init_state": [0]})
        qpos = env.get_state()[:, 1 : 1 + real.model.nq]
        env.close()
        for axis, (kind, renderer) in zip(row, columns, strict=True):
            axis.imshow(make_renderer(tasks[kind].model, (args.camera,), args.size, args.size, renderer).render(qpos)[args.camera][0])
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{real.suite}/{real.index}", fontsize=9)
    for axis, (kind, renderer) in zip(axes[0], columns, strict=True):
        axis.set_title(f"{'stand-ins' if kind == 'standin' else 'LIBERO'}, {NAMES[renderer]}", fontsize=9)
    figure.tight_layout(pad=0.3)
    with atomic_path(args.out) as temporary:
        figure.savefig(temporary, dpi=100)


if __name__ == "__main__":
    run_command(main)
