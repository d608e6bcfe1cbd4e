"""Warp, started quietly: where its kernels are kept, and its devices. Warp itself is imported late."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from common.cli import UserError, cache_dir

if TYPE_CHECKING:
    import warp


def start_warp() -> None:
    """Import Warp quietly, its compiled kernels in our cache folder."""
    try:
        import warp
    except ImportError as error:
        raise UserError(f"Warp does not import ({error}); run: pip install -r requirements.txt") from error
    warp.config.quiet = True
    warp.config.log_level = 30  # warnings and worse: what `quiet` is called in Warp 1.19
    if warp.config.kernel_cache_dir is None:
        warp.config.kernel_cache_dir = str(cache_dir() / "warp")
    if os.environ.get("RL_DATA_ENGINE_QUICK_KERNELS") == "1":  # compiled a fifth sooner, for what takes a few steps only
        warp.config.optimization_level, warp.config.max_unroll = 1, 4
    with _silent_stderr():
        warp.init()


def warp_device(name: str) -> warp.Device:
    """Warp's device "cpu", "cuda" or "cuda:1"; UserError if there is none of that name."""
    start_warp()
    import warp as wp

    if name != "cpu" and not wp.is_cuda_available():
        raise UserError(f"no CUDA device for Warp (asked for {name}); choose cpu, or use a GPU with a driver of CUDA 12.4 or later")
    try:
        return wp.get_device(name)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"no device {name!r}; choose from {', '.join(d.alias for d in wp.get_devices())}") from error


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence C code: Warp's library warns on stderr wherever there is no CUDA driver."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
