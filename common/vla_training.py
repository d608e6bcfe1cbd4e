"""What training a VLA needs besides the algorithm: flags, processes, batches and random numbers, validation, the log.

The algorithm itself, the loop over steps, stands in vla_pretrain.py and in vla_finetune.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from common.cli import Count, Range, UserError, check_ranges, usable_cores
from common.data.vla import ACTION_SIZE, CAMERAS, Chunks, Corpus, Order, batches, corpus_files, explained, read_corpora
from common.networks import autocast, bfloat16
from common.runs import Progress, Run, choose_device, load_checkpoint
from common.vla_model import VLA

SHARED_MEMORY = Path("/dev/shm")  # through which processes that read hand their batches over; 64 MB in a container by default

# ---------------------------------------------------------------------------------------------- flags


@dataclasses.dataclass
class TrainingArgs:
    """Flags that the VLA scripts share: the data, where to run, and how a batch is put together."""

    data: list[str] = dataclasses.field(default_factory=list)
    """HDF5 files in LIBERO's layout with pictures (python -m common.libero.render adds them), or folders of sweeps: all their corpora"""
    weights: list[float] = dataclasses.field(default_factory=list)
    """how often an epoch shows the samples of each file, or of a folder's files; one number for each of --data, in order (default: once)"""
    filter_key: str | None = None
    """of files with robomimic's filter keys, only the demonstrations that mask/KEY names"""
    drop_no_ops: bool = False
    """leave out steps that neither move the hand nor the gripper, of which human demonstrations have many"""
    max_episodes: Count | None = None
    """at most so many episodes of each file, drawn at random: to compare sources at equal size"""
    val_fraction: Annotated[float, Range(0, below=1)] = 0.05
    """share of each file's episodes that is held out for validation"""
    seed: Annotated[int, Range(0)] = 1
    """seed of everything that is random"""
    resume: str | None = None
    """go on with the run in this folder, exactly where its last checkpoint left it; files that have moved are named by --data"""
    allow_mismatch: bool = False
    """go on although data, renderer, assets, instruction or MuJoCo are not those of the run, or of the training that is evaluated"""
    run_folder: str = "runs"
    """where runs are written"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb)"""
    wandb_project_name: str = "rl-data-engine"
    """the project there"""
    wandb_entity: str | None = None
    """the team there"""
    precision: Literal["auto", "float32"] = "auto"
    """of matrix products and convolutions: auto (bfloat16, where the hardware multiplies it) or float32"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto (CUDA, if there is a GPU), cpu or cuda"""
    compile: bool = False
    """compile the model (CUDA)"""
    torch_threads: Count | None = None
    """threads of each process on a CPU (default: its share of the cores; results are reproducible for a fixed number)"""
    num_workers: Annotated[int, Range(0)] = 1
    """processes that read the files, each rank its own; 0: read between steps"""
    checkpoint_interval: Count = 500
    """steps between checkpoints: what a kill can lose at most"""
    eval_interval: Count = 500
    """steps between validations"""
    batch_size: Count = 128
    """samples a step, of all ranks together"""
    accumulate: Count = 1
    """parts that each rank's share of a batch is cut into, where memory is short; the gradient is that of the whole batch"""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.weights and len(self.weights) != len(self.data):
            raise UserError(f"--weights needs one number for each of the {len(self.data)} files of --data, not {len(self.weights)}")
        files = [corpus_files(path) for path in self.data]
        self.weights = [weight for weight, of in zip(self.weights, files, strict=bool(self.weights)) for _ in of]
        self.data = [str(path.absolute()) for of in files for path in of]  # so that a run can be resumed from another folder
        if any(not 0 <= w < math.inf for w in self.weights) or (self.weights and not any(self.weights)):
            raise UserError("--weights must be at least 0, and one of them more")
        if self.batch_size % (world_size() * self.accumulate):
            parts = f"{world_size()} processes x --accumulate {self.accumulate}"
            raise UserError(f"--batch-size {self.batch_size} cannot be cut into equal parts for {parts}")

    def read(self) -> list[Corpus]:
        """The corpora of --data. Raises UserError, too, if /dev/shm cannot hold the batches that are read ahead: torch would hang."""
        try:
            corpora = read_corpora(self.data, self.max_episodes, self.seed, self.filter_key, self.drop_no_ops)
        except UserError as error:
            moved = self.resume and not all(Path(path).exists() for path in self.data)
            raise UserError(f"{error}; if it has moved, name all files again with --data") if moved else error from None
        ahead = (2 * self.num_workers + 1) * self.batch_size * local_world_size() // (world_size() * self.accumulate)  # samples
        needed = ahead * (len(CAMERAS) * 3 * corpora[0].image_size ** 2 + 1000)
        if self.num_workers and SHARED_MEMORY.exists() and (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
            raise UserError(
                f"{SHARED_MEMORY} has {free / 1e6:.1f} MB free, and reading ahead takes {needed / 1e6:.1f} MB; pass --num-workers 0, or "
                "give the container more (docker run --shm-size 1g)"
            )
        return corpora


# ---------------------------------------------------------------------------------------------- processes and devices


def rank() -> int:
    return int(os.environ.get("RANK", 0))  # torchrun sets these


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def prepare(run: SharedRun) -> torch.device:
    """Set torch up for the run; `run.args` then says how many threads. Returns this process's device, or UserError if it isn't there."""
    device = choose_device(run.args.device, run.args.compile)
    run.args = dataclasses.replace(run.args, torch_threads=run.args.torch_threads or max(1, usable_cores() // local_world_size()))
    torch.set_num_threads(run.args.torch_threads)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(run.args.seed)
    keep_memory()
    return torch.device(device, int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else None)


@contextlib.contextmanager
def distributed(device: torch.device):
    """The process group of torchrun, if that started us."""
    if world_size() > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield
    if world_size() > 1:
        torch.distributed.destroy_process_group()


class SharedRun(Run):
    """A run of all of torchrun's processes: the first one writes, the others read and are silent."""

    def __init__(self, script: str, cls: type):
        super().__init__(script, cls)
        if rank() > 0:
            self.progress = _Silence()

    def open(self, name: str, depends: dict[str, Any], **config) -> None:
        if rank() == 0:
            super().open(name, depends, **config)
        names = [str(self.folder)]
        if world_size() > 1:
            torch.distributed.broadcast_object_list(names)
        if rank() > 0:
            self.folder = Path(names[0])
            self.checkpoint = load_checkpoint(self.folder / "checkpoint.pt", self.script)

    def save(self, stage: str, **content) -> None:
        if rank() == 0:
            super().save(stage, **content)

    def log(self, values: dict[str, float], step: int) -> None:
        if rank() == 0:
            super().log(values, step)

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Here SIGTERM only sets `stopping`, so that a step can be ended and saved; not where processes would wait for one that is gone."""
        self.training = world_size() == 1
        try:
            yield
        finally:
            self.training = False


class _Silence(Progress):
    def stage(self, name: str, total: int, done: int = 0) -> None: ...

    def update(self, amount: int = 1, note: str = "") -> None: ...

    def say(self, line: str) -> None: ...


def keep_memory() -> None:
    """Let the C library keep what is freed instead of handing it back: the same large tensors come and go in every step."""
    with contextlib.suppress(OSError, AttributeError):  # glibc's alone
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, 2**30)


# ---------------------------------------------------------------------------------------------- batches


def draws(seed: int, step: int, batch_size: int, chunk: int, margin: int, flow_draws: int = 1) -> dict[str, torch.Tensor]:
    """All random numbers of a step: they depend on (seed, step) alone, not on what came before or on the number of processes."""
    generator = torch.Generator().manual_seed(seed * 2**40 + step)
    return {
        "noise": torch.randn(batch_size, flow_draws, chunk, ACTION_SIZE, generator=generator),
        "uniform": torch.rand(batch_size, flow_draws, generator=generator),
        "crop": torch.randint(margin + 1, (batch_size, len(CAMERAS), 2), generator=generator),
    }


class ReadError(UserError):
    """A file is damaged, or a process that reads has died: between two steps, so that what was learned is whole."""


class Batches:
    """Training batches as `VLA.forward` takes them, on the model's device: of each step this process's share, in `accumulate` parts."""

    def __init__(self, args, model: VLA, chunks: Chunks):
        """`args`: a VLA script's flags."""
        self.args, self.model, self.chunks = args, model, chunks
        self.order = Order(chunks.sizes, args.weights or [1.0] * len(chunks.sizes), args.batch_size, args.seed)
        self.tokens = model.text.tokenize(chunks.instructions).to(model.device)
        self.part_size = args.batch_size // (world_size() * args.accumulate)
        self.waited = 0.0  # seconds, for what was read

    @contextlib.contextmanager
    def reading(self, steps: range) -> Iterator[Iterator[dict[str, torch.Tensor]]]:
        """An iterator over all parts of all steps. Raises ReadError if a file is found damaged, UserError if a process that reads dies."""
        with contextlib.closing(self._parts(steps)) as source:
            try:
                yield source
            except RuntimeError as error:  # torch's signal handler may report a dead process amid a step
                raise explained(error) from None

    def _parts(self, steps: range) -> Iterator[dict[str, torch.Tensor]]:
        size, count = self.part_size, self.args.accumulate
        parts = [slice(first := (k * world_size() + rank()) * size, first + size) for k in range(count)]
        source = batches(self.chunks, self.order, steps, parts, self.args.num_workers, pin=self.model.device.type == "cuda")
        with contextlib.closing(source):
            for step in steps:
                numbers = self._draws(step, self.args.batch_size)
                for part in parts:
                    asked = time.monotonic()
                    try:
                        batch = next(source)
                    except UserError as error:
                        raise ReadError(str(error)) from None
                    self.waited += time.monotonic() - asked
                    yield self._prepare(batch, numbers, part)

    def fixed(self, rows: list[int]) -> Iterator[dict[str, torch.Tensor]]:
        """These samples, always with the same random numbers."""
        numbers = self._draws(2**40 - 1, len(rows))
        for first in range(0, len(rows), self.part_size):
            part = slice(first, first + self.part_size)
            yield self._prepare(self.chunks[rows[part]], numbers, part)

    def _draws(self, step: int, size: int) -> dict[str, torch.Tensor]:
        config = self.model.config
        return draws(self.args.seed, step, size, config["chunk"], config["image_size"] - config["crop"], self.args.flow_draws)

    def _prepare(self, batch: dict, numbers: dict, part: slice) -> dict[str, torch.Tensor]:
        batch = batch | {name: value[part] for name, value in numbers.items()}
        return {name: value.to(self.model.device, non_blocking=True) for name, value in batch.items()} | {"tokens": self.tokens}


# ---------------------------------------------------------------------------------------------- what is said about it


def count_flops(batches: Batches) -> float:
    """Floating-point operations a sample, forward and backward."""
    batch = next(batches.fixed([0] * batches.part_size))
    with FlopCounterMode(display=False) as counter:
        with autocast(batches.model.device, batches.args.precision):
            loss = batches.model(batch)
        loss.backward()
    batches.model.zero_grad()
    return counter.get_total_flops() / batches.part_size


class Log:
    """Of a training run: TensorBoard events, the progress line, validation, and `results` for the summary."""

    def __init__(self, run: SharedRun, batches: Batches, held_out: Batches | None, step: int, steps: int, results: dict):
        """`batches` and `held_out` (None: nothing to validate on), of training and of the averaged weights; `step` steps are done."""
        self.run, self.batches, self.held_out, self.steps, self.results = run, batches, held_out, steps, results
        model = batches.model
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        precision = "bfloat16" if batches.args.precision == "auto" and bfloat16(model.device) else "float32"
        where = f"{model.device}, {precision}, {torch.get_num_threads()} threads"
        run.progress.say(f"{parameters:.1f} M parameters on {where}; {len(batches.chunks)} training samples, {steps} steps")
        self.flops = count_flops(batches)
        run.progress.stage("train", steps, step)
        self.since, self.done = time.monotonic(), step  # speed is measured from here on
        self.noted, self.note = -math.inf, ""

    def step(self, step: int, loss: torch.Tensor, norm: torch.Tensor, rate: float) -> None:
        """`step` steps are done, the last of which had this loss, norm of the gradient and learning rate.

        Raises UserError if the loss or the norm is not finite.
        """
        args, seconds = self.batches.args, time.monotonic() - self.since
        speed = (step - self.done) * args.batch_size / seconds
        if time.monotonic() - self.noted >= self.run.progress.interval:
            self.note = f"loss {loss.item():.3f}  {speed:.0f} samples/s  {speed * self.flops / 1e12:.3g} TFLOP/s"
            self.noted = time.monotonic()
        self.run.progress.update(1, self.note)
        if step % 50 and step % args.checkpoint_interval and step < self.steps:
            return
        for name, value in (("loss", loss), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                raise UserError(f"the {name} is {value.item()} at step {step}; start again with a smaller --lr than {args.lr}")
        self.results |= {"samples_per_second": speed, "tflops_per_second": speed * self.flops / 1e12}
        charts = {"losses/train": loss.item(), "losses/grad_norm": norm.item(), "charts/learning_rate": rate}
        charts |= {f"charts/{name}": value for name, value in self.results.items() if "per_second" in name}
        charts |= {"charts/epoch": step / self.batches.order.steps_per_epoch, "charts/data_wait": self.batches.waited / seconds}
        self.run.log(charts, step)
        self.since, self.done, self.batches.waited = time.monotonic(), step, 0.0

    def validate(self, step: int) -> None:
        """Loss and action error of the averaged weights on at most 256 held-out samples, always the same."""
        if self.held_out is None:
            return
        began, held_out = time.monotonic(), self.held_out
        loss, error, count = 0.0, 0.0, 0.0
        rows = torch.linspace(0, len(held_out.chunks) - 1, min(256, len(held_out.chunks))).long().unique().tolist()
        for batch in held_out.fixed(rows):
            with torch.no_grad(), autocast(held_out.model.device, held_out.args.precision):
                loss += held_out.model(batch).item() * len(batch["mask"])
                inputs = (batch[name] for name in ("images", "proprio", "tokens", "instruction"))
                found = held_out.model.act(*inputs, batch["noise"][:, 0])
            error += ((found - batch["actions"]).abs().mean(-1) * batch["mask"]).sum().item()
            count += batch["mask"].sum().item()
        self.results |= {"validation": loss / len(rows), "action_l1": error / count}
        self.run.log({f"losses/{name}": self.results[name] for name in ("validation", "action_l1")}, step)
        self.run.progress.say(f"step {step}: validation loss {loss / len(rows):.4f}, action error {error / count:.4f}")
        self.since += time.monotonic() - began  # not the training's
