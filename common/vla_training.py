"""What training a VLA needs besides the algorithm: its processes, its batches and random numbers, validation, and the log.

The algorithm itself, the loop over steps, stands in vla_pretrain.py and in vla_finetune.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

from common.cli import UserError
from common.data.vla import ACTION_SIZE, CAMERAS, Chunks, Order, batches, explained
from common.runs import Progress, choose_device
from common.vla_model import VLA

# ---------------------------------------------------------------------------------------------- processes and devices


def rank() -> int:
    return int(os.environ.get("RANK", 0))  # torchrun sets these


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def find_device(device: str, compile: bool) -> torch.device:
    """The device of this process; raises UserError if it is not there."""
    found = choose_device(device, compile)
    return torch.device(found, int(os.environ.get("LOCAL_RANK", 0)) if found == "cuda" else None)


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


def shared_folder(folder: Path | None) -> Path:
    """The run folder that rank 0 made, on all ranks."""
    names = [str(folder)]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(names)
    return Path(names[0])


def autocast(device: torch.device):
    """bfloat16 where the hardware multiplies it: on GPUs, and on CPUs with AMX or AVX512-BF16."""
    cpu = torch.cpu.get_capabilities()
    possible = device.type == "cuda" or cpu.get("amx_bf16") or cpu.get("avx512_bf16")
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(possible))


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
                    asked = time.time()
                    try:
                        batch = next(source)
                    except UserError as error:
                        raise ReadError(str(error)) from None
                    self.waited += time.time() - asked
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
        with autocast(batches.model.device):
            loss = batches.model(batch)
        loss.backward()
    batches.model.zero_grad()
    return counter.get_total_flops() / batches.part_size


class Log:
    """A training run's TensorBoard events, progress line and results, written by the first process."""

    def __init__(self, run: Path, batches: Batches, held_out: Batches | None, step: int, steps: int, results: dict):
        """`batches` and `held_out` (None: nothing to validate on), of training and of the averaged weights; `step` steps are done."""
        self.batches, self.held_out, self.steps, self.results = batches, held_out, steps, results
        self.silent = rank() > 0
        if self.silent:
            return
        model = batches.model
        self.writer, self.progress = SummaryWriter(str(run)), Progress()
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        self.progress.say(f"{parameters:.1f} M parameters, {model.device}, {len(batches.chunks)} training samples")
        self.flops = count_flops(batches)
        self.progress.stage("train", steps, step)
        self.since, self.done = time.time(), step  # speed is measured from here on
        self.noted, self.note = 0.0, ""

    def step(self, step: int, loss: torch.Tensor, norm: torch.Tensor, rate: float) -> None:
        """`step` steps are done, the last of which had this loss, norm of the gradient and learning rate.

        Raises UserError if the loss is not finite.
        """
        if self.silent:
            return
        args, seconds = self.batches.args, time.time() - self.since
        speed = (step - self.done) * args.batch_size / seconds
        if time.time() - self.noted >= self.progress.interval:
            self.note = f"loss {loss.item():.3f}  {speed:.0f} samples/s  {speed * self.flops / 1e12:.3g} TFLOP/s"
            self.noted = time.time()
        self.progress.update(1, self.note)
        if step % 50 and step % args.checkpoint_interval and step < self.steps:
            return
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss.item()} at step {step}; start again with a smaller --lr than {args.lr}")
        self.results |= {"samples_per_second": speed, "tflops_per_second": speed * self.flops / 1e12}
        charts = {"losses/train": loss.item(), "losses/grad_norm": norm.item(), "charts/learning_rate": rate}
        charts |= {f"charts/{name}": value for name, value in self.results.items() if "per_second" in name}
        charts |= {"charts/epoch": step / self.batches.order.steps_per_epoch, "charts/data_wait": self.batches.waited / seconds}
        for name, value in charts.items():
            self.writer.add_scalar(name, value, step)
        self.since, self.done, self.batches.waited = time.time(), step, 0.0

    def validate(self, step: int) -> None:
        """Loss and action error of the averaged weights on at most 256 held-out samples, always the same."""
        if self.silent or self.held_out is None:
            return
        began, held_out = time.time(), self.held_out
        loss, error, count = 0.0, 0.0, 0.0
        rows = torch.linspace(0, len(held_out.chunks) - 1, min(256, len(held_out.chunks))).long().unique().tolist()
        for batch in held_out.fixed(rows):
            with torch.no_grad(), autocast(held_out.model.device):
                loss += held_out.model(batch).item() * len(batch["mask"])
                inputs = (batch[name] for name in ("images", "proprio", "tokens", "instruction"))
                found = held_out.model.act(*inputs, batch["noise"][:, 0])
            error += ((found - batch["actions"]).abs().mean(-1) * batch["mask"]).sum().item()
            count += batch["mask"].sum().item()
        self.results |= {"validation": loss / len(rows), "action_l1": error / count}
        for name in ("validation", "action_l1"):
            self.writer.add_scalar(f"losses/{name}", self.results[name], step)
        self.progress.say(f"step {step}: validation loss {loss / len(rows):.4f}, action error {error / count:.4f}")
        self.since += time.time() - began  # not the training's

    def say(self, line: str) -> None:
        if not self.silent:
            self.progress.say(line)

    def close(self) -> None:
        if not self.silent:
            self.progress.close()
            self.writer.close()
