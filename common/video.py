"""Videos: frames into an mp4, with the ffmpeg that imageio-ffmpeg brings."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from common.cli import UserError, atomic_path


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float = 20, crf: int = 18) -> None:
    """Write frames (T, H, W, 3) uint8 as an mp4 (H.264) with the ffmpeg that imageio-ffmpeg brings; H and W must be even.

    The file appears whole or not at all. 20 frames a second is LIBERO's control rate. `crf`: x264's, lower is better and larger.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or len(frames) == 0:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 (T, H, W, 3)")
    with video_writer(path, *frames.shape[1:3], fps, crf) as write:
        write(frames)


@contextlib.contextmanager
def video_writer(
    path: str | os.PathLike, height: int, width: int, fps: float, crf: int, options: Sequence[str] = ()
) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that takes the next frames (n, H, W, 3) uint8 of a video, which appears at `path` once all are written; see `write_video`.

    `options`: more of ffmpeg's for the encoding.
    """
    if height % 2 or width % 2:
        raise ValueError(f"frames of {width} x {height} pixels cannot be H.264; make width and height even")
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    encoding = ["-c:v", "libx264", "-crf", str(crf), "-pix_fmt", "yuv420p", *options]  # 4:2:0 is what browsers play
    with atomic_path(Path(path)) as temporary, tempfile.TemporaryFile() as said:
        command = [find_ffmpeg(), "-y", "-loglevel", "error", *source, *encoding, str(temporary)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said)

        def write(frames: np.ndarray) -> None:
            if frames.dtype != np.uint8 or frames.shape[1:] != (height, width, 3):
                raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 (T, {height}, {width}, 3)")
            with contextlib.suppress(BrokenPipeError):  # what went wrong is said below
                process.stdin.write(np.ascontiguousarray(frames).data)

        try:
            yield write
        except BaseException:
            process.kill()
            raise
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
        if process.returncode != 0:
            said.seek(0)
            reason = said.read().decode(errors="replace").strip()
            if os.strerror(errno.ENOSPC) in reason:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            raise UserError(f"ffmpeg cannot write {path}: {reason}")


def read_video(path: str | os.PathLike, height: int, width: int) -> Iterator[np.ndarray]:
    """The frames (H, W, 3) uint8 of a video of this size, one after the other."""
    command = [find_ffmpeg(), "-loglevel", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        while len(frame := process.stdout.read(height * width * 3)) == height * width * 3:
            yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)
        if process.wait() != 0:
            raise UserError(f"ffmpeg cannot read {path}: {process.stderr.read().decode(errors='replace').strip()}")


def find_ffmpeg() -> str:
    """The path of imageio-ffmpeg's ffmpeg; UserError if there is none."""
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise UserError(f"no ffmpeg for videos ({error}); run: pip install -r requirements.txt") from error
