"""A vision-language-action model (VLA), trained from scratch on corpora of many tasks: pictures, proprioception and an instruction
to a chunk of actions.

The model and the losses of its two action heads are one file, common/vla_model.py: `--head flow`, conditional flow matching over the
chunk, as pi0 (arXiv 2410.24164), and `--head tokens`, 256 bins an action dimension by maximum likelihood, as OpenVLA (arXiv 2406.09246).

    python vla_pretrain.py --data runs/*/corpus.hdf5
    python vla_pretrain.py --resume runs/RUN
    torchrun --nproc-per-node 8 vla_pretrain.py --data runs/*/corpus.hdf5 --size base --compile

vla_finetune.py fine-tunes and evaluates what comes out. docs/vla_pretrain.md explains every metric and implementation detail.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import time
from pathlib import Path

import torch
import tyro
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.cli import UserError, run_command
from common.data import vla as vla_data
from common.data.vla import Chunks, Corpus
from common.runs import load_checkpoint, make_run, resumed_args, save_checkpoint, versions, write_json
from common.vla_model import HEADS, SIZES, VLA, crop_side, save_model
from common.vla_training import Batches, Log, ReadError, autocast, distributed, find_device, keep_memory, rank, shared_folder, world_size


@dataclasses.dataclass
class Args:
    """Train a vision-language-action model from scratch on corpora."""

    data: list[str] = dataclasses.field(default_factory=list)
    """HDF5 files in LIBERO's layout with pictures (python -m common.libero.render adds them)"""
    weights: list[float] = dataclasses.field(default_factory=list)
    """how often an epoch shows each file's samples, one number a file in the order of --data (default: once)"""
    filter_key: str | None = None
    """of files with robomimic's filter keys, only the demonstrations that mask/KEY names"""
    drop_no_ops: bool = False
    """leave out steps that neither move the hand nor the gripper, of which human demonstrations have many"""
    max_episodes: int | None = None
    """at most so many episodes of each file, drawn at random: to compare sources at equal size"""
    val_fraction: float = 0.05
    """share of each file's episodes that is held out for validation"""
    seed: int = 1
    """seed of everything that is random"""
    resume: str | None = None
    """go on with the run in this folder, exactly where its last checkpoint left it"""
    run_folder: str = "runs"
    """where runs are written"""
    device: str = "auto"
    """auto (CUDA, if there is a GPU), cpu or cuda"""
    compile: bool = False
    """compile the model (CUDA)"""
    torch_threads: int = 2
    """threads on a CPU (results are reproducible for a fixed number)"""
    num_workers: int = 1
    """processes that read the files, each rank its own; 0: read between steps"""
    checkpoint_interval: int = 500
    """steps between checkpoints: what a kill can lose at most"""
    eval_interval: int = 500
    """steps between validations"""

    # Optimisation
    steps: int = 10_000
    """optimiser steps"""
    batch_size: int = 128
    """samples a step, of all ranks together"""
    accumulate: int = 1
    """parts that each rank's share of a batch is cut into, where memory is short; the gradient is that of the whole batch"""
    lr: float = 1e-3
    """learning rate, reached after the warm-up; from there it follows a cosine to zero"""
    warmup: int = 200
    """steps of linear warm-up"""
    weight_decay: float = 0.01
    """of AdamW, on matrices"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    ema: float = 0.999
    """decay of the moving average of the weights, which is what is validated, kept and evaluated"""
    flow_draws: int = 4
    """draws of noise and time for each chunk (flow): the pictures, which cost most, are encoded once for all of them"""

    # Model
    head: str = "flow"
    """flow (conditional flow matching) or tokens (256 bins a dimension, autoregressive)"""
    size: str = "tiny"
    """tiny (1.5 M parameters, for CPUs), small (20 M) or base (50 M)"""
    chunk: int = 8
    """actions predicted at once"""
    crop: float = 0.94
    """side of the random crop as a share of the picture's; evaluation takes the centre"""
    vision: str | None = None
    """a pretrained image encoder instead: Hugging Face model id or local folder (needs transformers)"""
    text: str | None = None
    """a pretrained text encoder instead: Hugging Face model id or local folder (needs transformers)"""


def validate(args: Args) -> None:
    """Refuse flag values that cannot work, before anything has begun."""
    rules = [
        (lambda v: v >= 1, "at least 1", "torch_threads checkpoint_interval eval_interval batch_size accumulate flow_draws"),
        (lambda v: v >= 1, "at least 1", "steps chunk max_episodes"),
        (lambda v: 0 < v < math.inf, "more than 0", "lr max_grad_norm"),
        (lambda v: 0 <= v < math.inf, "at least 0", "seed num_workers warmup weight_decay"),
        (lambda v: 0 <= v < 1, "at least 0 and less than 1", "ema val_fraction"),
        (lambda v: 0.5 <= v <= 1, "between 0.5 and 1", "crop"),
        (lambda v: v in ("auto", "cpu", "cuda"), "auto, cpu or cuda", "device"),
        (lambda v: v in HEADS, " or ".join(HEADS), "head"),
        (lambda v: v in SIZES, ", ".join(SIZES), "size"),
    ]
    for holds, wanted, names in rules:
        for name in names.split():
            value = getattr(args, name, None)
            if value is not None and not holds(value):
                raise UserError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")
    if args.weights and len(args.weights) != len(args.data):
        raise UserError(f"--weights needs one number for each of the {len(args.data)} files of --data, not {len(args.weights)}")
    if any(not 0 <= w < math.inf for w in args.weights) or (args.weights and not any(args.weights)):
        raise UserError("--weights must be at least 0, and one of them more")
    if args.batch_size % (world_size() * args.accumulate):
        parts = f"{world_size()} processes x --accumulate {args.accumulate}"
        raise UserError(f"--batch-size {args.batch_size} cannot be cut into equal parts for {parts}")


# ---------------------------------------------------------------------------------------------- training


def learning_rate(args: Args, step: int, steps: int) -> float:
    """Linear warm-up to `lr`, then a cosine to zero at the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, steps - args.warmup)))


def train(args: Args, model: VLA, training: list[Corpus], validation: list[Corpus], steps: int, run: Path, meta: dict) -> dict:
    """Train `model` (left with the averaged weights) for `steps` steps, going on from RUN/checkpoint.pt if there is one.

    Writes RUN/checkpoint.pt, RUN/model.pt and TensorBoard events. Returns the last validation's losses and the speed.
    """
    device = model.device
    average = copy.deepcopy(model).requires_grad_(False).eval()
    decayed = [p for p in model.parameters() if p.ndim >= 2]  # matrices; not biases, gains and what there is one of
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": [p for p in model.parameters() if p.ndim < 2]}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    step, seconds, results = 0, 0.0, {}  # results: of the last validation, and the speed
    corpora = vla_data.fingerprint(training + validation)
    if (run / "checkpoint.pt").exists():
        state = load_checkpoint(run / "checkpoint.pt", "vla_training")
        if state["corpora"] != corpora:
            raise UserError(f"the corpora of {run} have changed since it was started; put them back, or start a new run")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, results = state["step"], state["seconds"], state["results"]

    def save() -> None:
        """Everything that the rest of the training depends on; random numbers depend on the step alone."""
        if rank() == 0:
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "seconds": seconds + time.time() - began, "results": results, "corpora": corpora}
            save_checkpoint(run / "checkpoint.pt", {"script": "vla_training", **state})
            save_model(run / "model.pt", average, meta | {"step": step})

    batches, held_out = Batches(args, model, Chunks(training, model.config["chunk"])), Chunks(validation, model.config["chunk"])
    began = time.time()
    log = Log(run, batches, Batches(args, average, held_out) if len(held_out) else None, step, steps, results)
    learner: nn.Module = model
    if world_size() > 1:
        unused = bool(model.config["vision"] or model.config["text"])  # pretrained encoders have parts, like poolers, without a use here
        learner = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None, find_unused_parameters=unused)
    if args.compile:
        learner = torch.compile(learner)
    with contextlib.closing(log), batches.reading(range(step, steps)) as source:
        while step < steps:
            rate = learning_rate(args, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            train_loss = torch.zeros((), device=device)
            for k in range(args.accumulate):
                try:
                    batch = next(source)
                except ReadError:
                    save()
                    log.say(f"stopped after step {step}; to go on: --resume {run}")
                    raise
                last = k == args.accumulate - 1  # only then do the processes have to agree on the gradient
                with contextlib.nullcontext() if last or world_size() == 1 else learner.no_sync():
                    with autocast(device):
                        loss = learner(batch) / args.accumulate
                    loss.backward()
                train_loss += loss.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            decay = min(args.ema, (1 + step) / (10 + step))  # a short memory at first
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
            step += 1
            log.step(step, train_loss, norm, rate)
            if step % args.eval_interval == 0 or step == steps:
                log.validate(step)
            if step % args.checkpoint_interval == 0 or step == steps:
                save()
    model.load_state_dict(average.state_dict())
    return results | {"steps": step, "wall_seconds": seconds + time.time() - began}


# ---------------------------------------------------------------------------------------------- the whole job


def main() -> None:
    args = tyro.cli(Args)
    run = None
    if args.resume:
        run = Path(args.resume)
        args = resumed_args(run, "vla_pretrain", Args)
    validate(args)
    torch.set_num_threads(args.torch_threads)
    keep_memory()
    device = find_device(args.device, args.compile)
    corpora = vla_data.read_corpora(args.data, args.max_episodes, args.seed, args.filter_key, args.drop_no_ops)
    training, validation = vla_data.split(corpora, args.val_fraction, args.seed)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    image_size = corpora[0].image_size
    model = VLA(args.head, args.size, args.chunk, image_size, crop_side(args.crop, image_size), args.vision, args.text)
    model.fit(Chunks(training, args.chunk).statistics()).to(device)
    tasks = sorted({c.task for c in corpora})
    meta = {"tasks": tasks, "renderer": corpora[0].renderer, "assets": corpora[0].assets, "versions": versions()}
    meta |= {"corpora": vla_data.describe(corpora), "seed": args.seed}
    with distributed(device):
        if run is None:
            if rank() == 0:
                run = make_run(args.run_folder, tasks[0] if len(tasks) == 1 else f"{len(tasks)}-tasks", "vla_pretrain", args)
                write_json(run / "config.json", {"script": "vla_pretrain", "args": dataclasses.asdict(args), **meta})
            run = shared_folder(run)
        results = train(args, model, training, validation, args.steps, run, meta)
    if rank() == 0:
        summary = {"parameters": sum(p.numel() for p in model.parameters()), **results, **meta}
        write_json(run / "summary.json", summary)
        print(json.dumps({name: value for name, value in results.items()}), f"see {run}", sep="\n")


if __name__ == "__main__":
    run_command(main)
