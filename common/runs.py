"""A run's folder, checkpoints and progress: what the scripts share and no algorithm depends on."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import math
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from common.cli import UserError, atomic_path, lock, remove_leftovers


def versions() -> dict[str, str]:
    """Versions that a result depends on, and the git revision of the code."""
    packages = ("torch", "numpy", "mujoco", "hf-libero", "robosuite", "gymnasium")
    found = {name: importlib.metadata.version(name) for name in packages}
    root = Path(__file__).resolve().parents[1]
    try:
        git = [
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()
            for words in (["rev-parse", "--show-toplevel"], ["describe", "--always", "--dirty"])
        ]
    except FileNotFoundError:
        git = ["", ""]
    ours = git[0] and Path(git[0]) == root  # not another repository's, in which this folder lies
    return {"python": platform.python_version(), **found, "revision": git[1] if ours and git[1] else "unknown"}


def plain_json(value: Any) -> Any:
    """As JSON has it: arrays are lists, nan and infinities null."""
    if isinstance(value, dict):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain_json(value.tolist())
    if isinstance(value, np.generic):
        return plain_json(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Any) -> None:
    """Write JSON (`plain_json`) whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(plain_json(content), indent=2) + "\n")


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
    names, stored = {f.name for f in dataclasses.fields(cls)}, BEFORE | stored
    # JSON has no infinity: `Run` writes it as a word
    return cls(**{name: float(value) if value == "inf" else value for name, value in stored.items() if name in names})


AFTER_TRAINING = ("corpus_episodes", "corpus_images", "videos", "allow_mismatch")  # flags that may change when a run is resumed
BY_CONTENT = ("data", "demos", "checkpoint")  # these, too: the files may lie elsewhere now, and are compared by what is in them
NO_RESULT = ("num_workers", "track", "wandb_project_name", "wandb_entity")  # and what changes no result
# what was done before there were these flags, whose defaults are others
BEFORE = {"physics": "exact", "stop_success": None, "near_field": 0.0, "learn_switch_weight": 1.0, "train_encoder": "policy"}


def resumed_args(run: Path, script: str, cls: type):
    """The arguments (a `cls`) of the run in folder `run`. A flag on the command line that differs from the run's is an error, but for
    those that matter only after training (a finished run can be resumed for a larger corpus), and where its data lie. config.json stays as
    it was."""
    config = read_config(run)
    if config.get("script") != script:
        raise UserError(f"{run} is a run of {config.get('script')}, not of {script}; resume it with that script")
    started = stored_args(cls, config["args"] | {"resume": str(run)})
    given = tyro.cli(cls, default=started)  # the run's arguments, but for what the command line says
    for name in (f.name for f in dataclasses.fields(cls)):
        then, now = getattr(started, name), getattr(given, name)
        if name != "resume" and name not in (*AFTER_TRAINING, *BY_CONTENT, *NO_RESULT) and now != then:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{run} was started with {flag} {then}, not {now}; resume it without {flag}, or start a new run")
    return given


def read_config(run: Path) -> dict:
    """config.json of a run, finished or not."""
    try:
        config = json.loads((run / "config.json").read_text())
        config["args"] = dict(config["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run} is not a run folder that can be resumed: no readable config.json in it") from error
    return config


def find_wandb():
    """The package of Weights & Biases; UserError where it isn't installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"--track needs Weights & Biases ({error}); run: pip install wandb, or leave it out") from error
    return wandb


class Run:
    """One run of a script: its arguments, folder, checkpoint, log and progress. It can be stopped at any time and continued exactly.

        run = Run("gaussian_ppo", Args)                           # the command line; with --resume, the run's own arguments
        run.open(task.id, depends={"assets": task.assets}, ...)   # a new folder with config.json, or the old one's checkpoint
        if run.stage == "start":
            ...
            run.save("learn", agent=agent.state_dict())
        agent.load_state_dict(run.checkpoint["agent"])

    `args` needs the fields `resume`, `run_folder`, `seed` and `allow_mismatch`. SIGTERM, which Slurm sends before it kills, ends the
    process with code 143; `train` first saves what it has.
    """

    def __init__(self, script: str, cls: type):
        self.script, self.args, self.progress = script, tyro.cli(cls), Progress()
        self.folder = Path(self.args.resume) if self.args.resume else None
        if self.folder is not None:
            self.args = resumed_args(self.folder, script, cls)
        self.wandb = find_wandb() if getattr(self.args, "track", False) else None
        self.checkpoint: dict[str, Any] = {"script": script, "stage": "start", "seconds": 0.0}
        self.began = time.monotonic()  # the clock may be set
        self.training = self.stopping = False
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def open(self, name: str, depends: dict[str, Any], **config) -> None:
        """Begin the run, or go on with it, if --resume says so.

        Args:
            name: what it is of (a task id), for the folder.
            depends: what must be the same when the run is continued, by name; UserError where it isn't (--allow-mismatch goes on).
            config: what else config.json records.
        """
        found = versions()
        depends = {**depends, "mujoco": found["mujoco"]}
        if self.folder is None:
            self.folder = make_run(self.args.run_folder, name, self.script, self.args)
            try:
                self._track()
            except UserError:
                shutil.rmtree(self.folder)
                raise
            args = {k: "inf" if v == math.inf else v for k, v in dataclasses.asdict(self.args).items()}
            write_json(self.folder / "config.json", {"script": self.script, "args": args, "versions": found, **depends, **config})
            self._lock()
            self.checkpoint["name"] = name
            save_checkpoint(self.folder / "checkpoint.pt", self.checkpoint)
        else:
            self._compare(read_config(self.folder), depends, found["torch"])
            self._lock()
            remove_leftovers(self.folder)
            self._track()
            self.checkpoint = load_checkpoint(self.folder / "checkpoint.pt", self.script)
            if (found_name := self.checkpoint.get("name", name)) != name:
                raise UserError(f"{self.folder / 'checkpoint.pt'} is not this run's: it is of {found_name}")
            self.progress.say(f"resuming after stage {self.stage!r}")
        self.progress.say(f"run folder {self.folder}")
        from torch.utils.tensorboard import SummaryWriter  # which takes a second, and few that import this module need

        # what was logged after the checkpoint is logged again
        done = self.checkpoint.get("env_steps", self.checkpoint.get("step"))
        again = done + 1 if done is not None else 0 if self.stage == "start" else None
        threading.excepthook = _writer_failed
        with self._logging():
            self.writer = SummaryWriter(str(self.folder), purge_step=again if self.args.resume else None)

    def _compare(self, config: dict, depends: dict[str, Any], torch_version: str) -> None:
        for name, now in depends.items():
            then = config.get(name, now)
            if then != now and not self.args.allow_mismatch:
                raise UserError(
                    f"{self.folder} was started with {name} {then}, and here it is {now}; restore that, or go on all the same with "
                    "--allow-mismatch"
                )
        if (then := config.get("versions", {}).get("torch", torch_version)) != torch_version:
            self.progress.say(f"warning: the run was started with torch {then}, and goes on with {torch_version}")

    def _track(self) -> None:
        """With --track, send what TensorBoard gets to Weights & Biases, too; a resumed run goes on there."""
        if self.wandb is None:
            return
        names = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity, "name": self.folder.name}
        how = {"id": self.folder.name[-128:], "resume": "allow", "sync_tensorboard": True, "dir": str(self.folder)}
        try:
            self.wandb.init(**names, **how, config=dataclasses.asdict(self.args))
        except Exception as error:  # no account, no network, ...
            reason = " ".join(str(error).split())
            raise UserError(f"--track: Weights & Biases says: {reason}; run wandb login, or set WANDB_MODE=offline") from error

    def _lock(self) -> None:
        """Keep other processes out of the folder as long as this one lives, by a lock on config.json, which is never replaced."""
        try:
            self._locked = lock(self.folder / "config.json")
        except OSError as error:  # a file system without locks
            self.progress.say(f"warning: {self.folder} cannot be locked against other processes ({error.strerror})")
            return
        if self._locked is None:
            raise UserError(f"another process is working on {self.folder}; wait for it, or stop it")

    def _on_sigterm(self, *_) -> None:
        if not self.training:
            sys.exit(143)
        self.stopping = True

    @property
    def stage(self) -> str:
        """The last stage that is done; "reinforce" is amid PPO."""
        return self.checkpoint["stage"]

    @property
    def seconds(self) -> float:
        """What the run has taken so far, of all the times that it was started."""
        return self.checkpoint["seconds"] + time.monotonic() - self.began

    def save(self, stage: str, **content) -> None:
        """Keep `content`, as it is now, beside what the checkpoint holds, and that `stage` is done."""
        self.checkpoint.update(_each(_copy, content), stage=stage, seconds=self.seconds)
        self.began = time.monotonic()
        save_checkpoint(self.folder / "checkpoint.pt", self.checkpoint)

    def log(self, values: dict[str, float], step: int) -> None:
        """Scalars for TensorBoard. UserError if a loss is not finite: what was learned since would be worthless."""
        for name, value in values.items():
            with self._logging():
                self.writer.add_scalar(name, value, step)
            if name.endswith("loss") and not math.isfinite(value):
                with self._logging():
                    self.writer.flush()
                raise UserError(
                    f"{name} is {value} at step {step}: training has diverged; start a new run with a lower learning rate. The last "
                    f"checkpoint of {self.folder} is from before"
                )

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        """What TensorBoard's thread couldn't write, it says at the next call, without the file's name."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.folder)) from error

    def ticker(self, stage: str, total: int, note: str, each: int = 1) -> Callable[[int, dict[str, float]], None]:
        """A function (step, values) to call after each of `total` steps, or after each `each` of them, which logs the values and shows
        them as `note`, a format of their names with / as _: "held-out loss {learn_held_out_loss:.2f}"."""
        self.progress.stage(stage, total)

        def tick(step: int, values: dict[str, float]) -> None:
            self.log(values, step)
            self.progress.update(each, note.format(**{name.replace("/", "_"): value for name, value in values.items()}))

        return tick

    def train(self, trainer, note: Callable[[dict[str, float]], str], done: Callable[[], bool] = lambda: False) -> None:
        """Run a trainer's iterations to their end, or until `done`, from where the checkpoint has it, saving every `checkpoint_interval`.

        A trainer has `iteration`, `num_iterations`, `env_steps`, `run_iteration()`, which returns what to log, and a state dict.
        `note` makes the progress line of what is logged.
        """
        if self.stage == "reinforce":
            trainer.load_state_dict(self.checkpoint["trainer"])
        self.progress.stage("Reinforce", trainer.num_iterations, trainer.iteration)
        self.training = True
        while trainer.iteration < trainer.num_iterations and not done():  # a run that is stopped amid `done` asks it again
            logs = trainer.run_iteration()
            self.log(logs, trainer.env_steps)
            if not torch.stack([p.detach().isfinite().all() for p in trainer.agent.parameters()]).all():
                raise UserError(  # losses are of before the last update
                    f"weights are not finite after step {trainer.env_steps}, since a gradient was not: training has diverged; start a new "
                    f"run with a lower learning rate. The last checkpoint of {self.folder} is from before"
                )
            self.progress.update(1, note(logs))
            due = trainer.iteration % self.args.checkpoint_interval == 0 and trainer.iteration < trainer.num_iterations
            if due or self.stopping:
                self.save("reinforce", trainer=trainer.state_dict(), env_steps=trainer.env_steps)
            if self.stopping:
                sys.exit(143)
        self.training = False
        self.checkpoint.pop("trainer", None)
        self.save("roll out", agent=trainer.agent.state_dict(), history=trainer.history, env_steps=trainer.env_steps)
        if self.stopping:  # told so amid `done`
            sys.exit(143)

    def finish(self, summary: dict[str, Any], line: str) -> None:
        """Write summary.json, with how long it took and the versions, and say goodbye."""
        write_json(self.folder / "summary.json", summary | {"wall_seconds": self.seconds, "versions": versions()})
        self.save("done")
        with self._logging():
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()
        self.progress.close()
        self.progress.say(f"done: {line}; see {self.folder}")


def _writer_failed(failure: threading.ExceptHookArgs) -> None:
    """Of TensorBoard's thread, whose errors `Run.log` raises again: nothing more is said."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` of all that is in nested containers, in containers of the same kinds."""
    if isinstance(value, dict):
        return {k: _each(change, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_each(change, v) for v in value)
    return change(value)


def _copy(value: Any) -> Any:
    """In the CPU's memory: weights go on changing, and a later stage would save them under this one's name."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return value.copy() if isinstance(value, np.ndarray) else value


def _without_numpy(value: Any) -> Any:
    """So that loading a checkpoint needs no pickled classes."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value.item() if isinstance(value, np.generic) else value


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint of tensors, numbers, strings, arrays and containers of these, whole or not at all."""
    buffer = io.BytesIO()  # torch's own writer reports a full disk as an internal error
    torch.save(_each(_without_numpy, content), buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_checkpoint(path: Path, script: str) -> dict:
    """Read a checkpoint of `script` without running any code in it."""
    try:
        with warnings.catch_warnings():  # about foreign files, of which the error says enough
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)  # modules and optimizers take it to their own device
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: no such run, or it was stopped before its first checkpoint; start it again") from error
    except Exception as error:  # torch raises many kinds on foreign and truncated files
        if "GLOBAL " in str(error):  # a name that a pickle asks for
            raise UserError(f"{path} is not a readable checkpoint: it holds more than numbers and text, which could run code") from error
        raise UserError(f"{path} is not a readable checkpoint (damaged or truncated); take another copy, or start again") from error
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
        self.interval, self.start, self.last = interval, time.monotonic(), -math.inf
        self.terminal = sys.stderr.isatty()
        self.bar = None
        self.stage_name = ""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Begin a stage of `total` units of work."""
        from tqdm import tqdm

        self.close()
        self.stage_name, self.total, self.done, self.stage_start, self.first = name, max(1, total), done, time.monotonic(), done
        self.last = -math.inf
        if self.terminal:
            form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(total=self.total, initial=done, desc=name, bar_format=form, dynamic_ncols=True, leave=False)

    def update(self, amount: int = 1, note: str = "") -> None:
        """`amount` units more are done; `note` is what to show beside them."""
        self.done += amount
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(amount)
        elif time.monotonic() - self.last >= self.interval:
            self.last = time.monotonic()
            spent = self.last - self.stage_start
            left = spent / max(1, self.done - self.first) * (self.total - self.done)
            self.say(f"{self.stage_name} {self.done / self.total:4.0%}  {note}  {left:.0f} s left")

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        line = f"[{time.monotonic() - self.start:6.0f} s] {line}"
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
