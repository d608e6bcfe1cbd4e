"""common/video.py: frames come back from the file, and a full disk leaves the earlier one."""

import os
import subprocess
import sys

import numpy as np
import pytest

from common.video import write_video


def test_video_round_trip(tmp_path):
    import imageio_ffmpeg

    frames = np.zeros((30, 64, 96, 3), np.uint8)
    frames[:, :32] = [200, 30, 30]  # the upper half
    frames[15:, 32:] = [30, 30, 200]
    path = tmp_path / "videos" / "a.mp4"
    write_video(path, frames, fps=20)
    assert os.listdir(path.parent) == ["a.mp4"]
    reader = imageio_ffmpeg.read_frames(str(path))
    info = next(reader)
    back = np.array([np.frombuffer(f, np.uint8).reshape(64, 96, 3) for f in reader]).astype(int)
    assert info["fps"] == 20 and tuple(info["size"]) == (96, 64) and len(back) == 30
    assert np.abs(back[:, 16, 48] - [200, 30, 30]).max() < 15 and np.abs(back[20, 48, 48] - [30, 30, 200]).max() < 15
    with pytest.raises(ValueError, match="even"):
        write_video(path, frames[:, :63])


def test_failed_video_leaves_nothing(tmp_path):
    """ffmpeg writes what it can to a full disk, and says so: the earlier file must stay."""
    path = tmp_path / "a.mp4"
    path.write_text("earlier")
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    )
    code = f"{limit}; import numpy as np; from common.video import write_video; from common.cli import run_command; " + (
        f"run_command(lambda: write_video({str(path)!r}, np.random.default_rng(0).integers(0, 255, (20, 128, 128, 3), np.uint8)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["a.mp4"]
