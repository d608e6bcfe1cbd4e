"""A run's folder, checkpoints and progress: what the scripts share and no algorithm depends on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from common.cli import UserError, atomic_path


def versions() -> dict[str, str]:
    """Versions that a result depends on, and the git revision of the code."""
    packages = ("torch", "numpy", "mujoco", "hf-libero", "robosuite", "gymnasium")
    found = {name: importlib.metadata.version(name) for name in packages}
    root = Path(__file__).resolve().parent.parent
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
        revision = git.stdout.strip()
    except FileNotFoundError:
        revision = ""
    return {"python": platform.python_version(), **found, "revision": revision or "unknown"}


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all; nan and infinities become null."""

    def plain(value):
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, np.ndarray):
            return plain(value.tolist())
        if isinstance(value, np.generic):
            return plain(value.item())
        return None if isinstance(value, float) and not math.isfinite(value) else value

    _write(path, (json.dumps(plain(content), indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:  # a full disk is reported without the file's name
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_run(folder: str, task_name: str, script: str, args) -> Path:
    """Create `folder/{task}__{script}__{seed}__{time}` for a new run."""
    now = int(time.time())
    while True:
        run = Path(folder) / f"{task_name.replace('/', '-')}__{script}__{args.seed}__{now}"
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:  # another run began in the same second
            now += 1
        except OSError as error:
            raise UserError(f"cannot create the run folder {run}: {error.strerror}; choose another --run-folder") from error


def read_finished(run: Path) -> tuple[dict, dict]:
    """config.json and summary.json of a finished run."""
    try:
        config, summary = (json.loads((run / name).read_text()) for name in ("config.json", "summary.json"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is not a finished run: no readable config.json and summary.json in it") from error
    return config, summary


def stored_args(cls: type, stored: dict):
    """A script's arguments (a `cls`) from those in a config.json, which may be of a version with other flags."""
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in stored.items() if name in names})


AFTER_TRAINING = ("corpus_episodes", "corpus_images", "videos")  # flags that may change when a run is resumed


def resumed_args(run: Path, script: str, cls: type):
    """The arguments (a `cls`) of the run in folder `run`. A flag on the command line that differs from the run's is an error, but for
    those that matter only after training: a finished run can be resumed for a larger corpus. config.json stays as it was."""
    try:
        config = json.loads((run / "config.json").read_text())
        stored = dict(config["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run} is not a run folder that can be resumed: no readable config.json in it") from error
    if config.get("script") != script:
        raise UserError(f"{run} is a run of {config.get('script')}, not of {script}; resume it with that script")
    started = stored_args(cls, stored | {"resume": str(run)})
    given = tyro.cli(cls, default=started)  # the run's arguments, but for what the command line says
    for name in (f.name for f in dataclasses.fields(cls)):
        then, now = getattr(started, name), getattr(given, name)
        if name != "resume" and name not in AFTER_TRAINING and now != then:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{run} was started with {flag} {then}, not {now}; resume it without {flag}, or start a new run")
    return given


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint of tensors, numbers, strings, arrays and containers of these, whole or not at all."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(plain(v) for v in value)
        if isinstance(value, np.ndarray):  # so that loading needs no pickled classes
            return torch.from_numpy(value.copy())
        return value.item() if isinstance(value, np.generic) else value

    buffer = io.BytesIO()  # torch's own writer reports a full disk as an internal error
    torch.save(plain(content), buffer)
    _write(path, buffer.getvalue())


def load_checkpoint(path: Path, script: str) -> dict:
    """Read a checkpoint of `script` without running any code in it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)  # modules and optimizers take it to their own device
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: the run was stopped before its first checkpoint; start it again") from error
    except Exception as error:  # torch raises many kinds on foreign and truncated files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path} is not a readable checkpoint (damaged or truncated): {reason}") from error
    if not isinstance(content, dict) or content.get("script") != script:
        other = content.get("script") if isinstance(content, dict) else None
        raise UserError(f"{path} is a checkpoint of {other or 'another program'}, not of {script}")
    return content


def choose_device(device: str, compile: bool) -> str:
    """ "cpu" or "cuda": what --device (auto, cpu, cuda) means on this machine; UserError if it isn't there, or cannot --compile."""
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu, or install torch's CUDA build and a driver")
    if compile and (device == "cpu" or not cuda):
        raise UserError("--compile is for CUDA; leave it out on a CPU")
    return "cuda" if cuda and device != "cpu" else "cpu"


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Torch's random streams that work on `device` draws from, for a checkpoint."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state()} | cuda


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Go on with the streams of `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


class Progress:
    """One progress bar over a run's stages, or a plain line every few seconds where there is no terminal."""

    def __init__(self, interval: float = 10.0):
        self.interval, self.start, self.last = interval, time.time(), 0.0
        self.terminal = sys.stderr.isatty()
        self.bar = None
        self.stage_name = ""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Begin a stage of `total` units of work."""
        from tqdm import tqdm

        self.close()
        self.stage_name, self.total, self.done, self.stage_start, self.first = name, max(1, total), done, time.time(), done
        self.last = 0.0
        if self.terminal:
            form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(total=self.total, initial=done, desc=name, bar_format=form, dynamic_ncols=True, leave=False)

    def update(self, amount: int = 1, note: str = "") -> None:
        """`amount` units more are done; `note` is what to show beside them."""
        self.done += amount
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(amount)
        elif time.time() - self.last >= self.interval:
            self.last = time.time()
            spent = self.last - self.stage_start
            left = spent / max(1, self.done - self.first) * (self.total - self.done)
            self.say(f"{self.stage_name} {self.done / self.total:4.0%}  {note}  {left:.0f} s left")

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        line = f"[{time.time() - self.start:6.0f} s] {line}"
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
