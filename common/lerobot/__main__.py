"""python -m common.lerobot export | import: corpora to a LeRobot dataset, and back."""

from __future__ import annotations

from pathlib import Path

import tyro

from common.cli import Count, UserError, run_command
from common.lerobot import dataset
from common.runs import Progress


def export(
    files: tyro.conf.Positional[list[Path]],
    out: Path,
    videos: bool = True,
    mirror: bool = False,
    drop_no_ops: bool = False,
    max_episodes: Count | None = None,
    filter_key: str | None = None,
) -> None:
    """Write corpora and demonstrations as a LeRobot dataset (v3.0).

    Args:
        files: HDF5 files in LIBERO's layout, with pictures (python -m common.libero.render FILE --size 256 adds them).
        out: The dataset's folder, a new one.
        videos: Pictures as H.264 videos; else as PNG, exact and several times as large.
        mirror: Swap left and right, as in LeRobot's own sets of LIBERO (and OpenVLA's), to mix with them or to fine-tune what they trained.
        drop_no_ops: Leave out steps that neither move the hand nor the gripper.
        max_episodes: Of each file, drawn at random.
        filter_key: Take only the demonstrations that robomimic's mask/KEY names.
    """
    if max_episodes is not None and max_episodes < 1:
        raise UserError(f"--max-episodes must be at least 1, not {max_episodes}")
    progress = Progress()
    try:
        dataset.export(out, files, videos, mirror, drop_no_ops, max_episodes, filter_key, progress)
    finally:
        progress.close()
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    progress.say(f"{out} ({size / 1e6:.1f} MB)")


def import_(folder: tyro.conf.Positional[Path], out: Path) -> None:
    """Put the corpora of an exported dataset together again.

    Args:
        folder: What `export` wrote.
        out: Where the corpora go.
    """
    progress = Progress()
    try:
        files = dataset.import_(folder, out, progress)
    finally:
        progress.close()
    for file in files:
        progress.say(str(file))


if __name__ == "__main__":
    run_command(lambda: tyro.extras.subcommand_cli_from_dict({"export": export, "import": import_}))
