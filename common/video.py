"""Videos: frames into an mp4, with the ffmpeg that imageio-ffmpeg brings."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import numpy as np

from common.cli import UserError, atomic_path


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float = 20, crf: int = 18) -> None:
    """Write frames (T, H, W, 3) uint8 as an mp4 (H.264) with the ffmpeg that imageio-ffmpeg brings; H and W must be even.

    The file appears whole or not at all. 20 frames a second is LIBERO's control rate. `crf`: x264's, lower is better and larger.
    """
    frames = np.ascontiguousarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) == 0:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 (T, H, W, 3)")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames of {width} x {height} pixels cannot be H.264; make width and height even")
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    encoding = ["-c:v", "libx264", "-crf", str(crf), "-pix_fmt", "yuv420p"]  # 4:2:0 is what browsers play
    with atomic_path(Path(path)) as temporary:
        command = [find_ffmpeg(), "-y", "-loglevel", "error", *source, *encoding, str(temporary)]
        result = subprocess.run(command, input=frames.tobytes(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if result.returncode != 0:
            said = result.stderr.decode(errors="replace").strip()
            if os.strerror(errno.ENOSPC) in said:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            raise UserError(f"ffmpeg cannot write {path}: {said}")


def find_ffmpeg() -> str:
    """The path of imageio-ffmpeg's ffmpeg; UserError if there is none."""
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise UserError(f"no ffmpeg for videos ({error}); run: pip install -r requirements.txt") from error
