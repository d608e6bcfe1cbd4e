"""A vision-language-action model (VLA), trained from scratch on corpora of many tasks: pictures, proprioception and an instruction
to a chunk of actions.

The model and the losses of its two action heads are one file, common/vla_model.py: `--head flow`, conditional flow matching over the
chunk, as pi0 (arXiv 2410.24164), and `--head tokens`, 256 bins an action dimension by maximum likelihood, as OpenVLA (arXiv 2406.09246).

    python vla_pretrain.py --data runs/*/corpus.hdf5
    python vla_pretrain.py --resume runs/RUN
    torchrun --standalone --nproc-per-node 8 vla_pretrain.py --data runs/*/corpus.hdf5 --size base --compile

vla_finetune.py fine-tunes and evaluates what comes out. docs/vla_pretrain.md explains every metric and implementation detail.
"""

from __future__ import annotations

if __name__ == "__main__":
    import common.start  # noqa: F401  (Ctrl-C amid the imports below is one line)

import contextlib
import copy
import dataclasses
import math
import sys
from typing import Annotated, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.cli import Count, NotNegative, Positive, PositiveOrInf, Range, run_command
from common.data import vla as vla_data
from common.data.vla import Chunks
from common.networks import autocast
from common.runs import versions
from common.vla_model import VLA, crop_side, save_model
from common.vla_training import Batches, Log, ReadError, SharedRun, TrainingArgs, distributed, prepare, rank, world_size


@dataclasses.dataclass
class Args(TrainingArgs):
    """Train a vision-language-action model from scratch on corpora."""

    # Optimisation
    steps: Count | None = None
    """optimiser steps (default: 3000 on a CPU, 10,000 on a GPU)"""
    lr: Positive = 1e-3
    """learning rate, reached after the warm-up; from there it follows a cosine to zero"""
    warmup: Annotated[int, Range(0)] = 200
    """steps of linear warm-up"""
    weight_decay: NotNegative = 0.01
    """of AdamW, on matrices"""
    max_grad_norm: PositiveOrInf = 1.0
    """gradients are clipped to this norm"""
    ema: Annotated[float, Range(0, below=1)] = 0.999
    """decay of the moving average of the weights, which is what is validated, kept and evaluated"""
    flow_draws: Count = 4
    """draws of noise and time for each chunk (flow): the pictures, which cost most, are encoded once for all of them"""

    # Model
    head: Literal["flow", "tokens"] = "flow"
    """flow (conditional flow matching) or tokens (256 bins a dimension, autoregressive)"""
    size: Literal["tiny", "small", "base"] = "tiny"
    """tiny (1.5 M parameters, for CPUs), small (20 M) or base (50 M)"""
    chunk: Count = 8
    """actions predicted at once"""
    crop: Annotated[float, Range(0.5, 1)] = 0.94
    """side of the random crop as a share of the picture's; evaluation takes the centre"""
    vision: str | None = None
    """a pretrained image encoder instead: Hugging Face model id or local folder (needs transformers)"""
    text: str | None = None
    """a pretrained text encoder instead: Hugging Face model id or local folder (needs transformers)"""


# ---------------------------------------------------------------------------------------------- training


def learning_rate(args: Args, step: int, steps: int) -> float:
    """Linear warm-up to `lr`, then a cosine to zero at the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, steps - args.warmup)))


def train(args: Args, model: VLA, training: Chunks, validation: Chunks, steps: int, run: SharedRun, meta: dict) -> dict:
    """Train `model` (left with the averaged weights) for `steps` steps, going on from the run's checkpoint.

    Writes model.pt with `meta` into the run's folder. Returns the last validation's losses and the speed.
    """
    device = model.device
    average = copy.deepcopy(model).requires_grad_(False).eval()
    decayed = [p for p in model.parameters() if p.ndim >= 2]  # matrices; not biases, gains and what there is one of
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": [p for p in model.parameters() if p.ndim < 2]}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    step, results = 0, {}  # results: of the last validation, and the speed
    if run.stage != "start":
        for name, part in (("model", model), ("average", average), ("optimizer", optimizer)):
            part.load_state_dict(run.checkpoint[name])
        step, results = run.checkpoint["step"], run.checkpoint["results"]

    def save() -> None:
        """Everything that the rest of the training depends on; random numbers depend on the step alone."""
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        run.save("train", step=step, results=results, **state)
        if rank() == 0:
            save_model(run.folder / "model.pt", average, meta | {"step": step})

    batches = Batches(args, model, training)
    log = Log(run, batches, Batches(args, average, validation) if len(validation) else None, step, steps, results)
    learner: nn.Module = model
    if world_size() > 1:
        unused = bool(model.config["vision"] or model.config["text"])  # pretrained encoders have parts, like poolers, without a use here
        learner = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None, find_unused_parameters=unused)
    if args.compile:
        learner = torch.compile(learner)
    with run.stoppable(), batches.reading(range(step, steps)) as source:
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
                    run.progress.say(f"stopped after step {step}; to go on: --resume {run.folder}")
                    raise
                last = k == args.accumulate - 1  # only then do the processes have to agree on the gradient
                with contextlib.nullcontext() if last or world_size() == 1 else learner.no_sync():
                    with autocast(device, args.precision):
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
            stop = run.stopping
            if step % args.checkpoint_interval == 0 or step == steps or stop:
                save()
            if stop:
                sys.exit(143)
    model.load_state_dict(average.state_dict())
    return results | {"steps": step}


# ---------------------------------------------------------------------------------------------- the whole job


def main() -> None:
    run = SharedRun("vla_pretrain", Args)
    device = prepare(run)
    run.args = args = dataclasses.replace(run.args, steps=run.args.steps or (10_000 if device.type == "cuda" else 3000))
    corpora = args.read()
    training, validation = (Chunks(part, args.chunk) for part in vla_data.split(corpora, args.val_fraction, args.seed))
    image_size = corpora[0].image_size
    model = VLA(args.head, args.size, args.chunk, image_size, crop_side(args.crop, image_size), args.vision, args.text)
    model.fit(training.statistics()).to(device)
    meta = {"renderer": corpora[0].renderer, "assets": corpora[0].assets, "versions": versions(), "seed": args.seed}
    meta |= {"tasks": sorted({c.task for c in corpora}), "corpora": vla_data.describe(corpora)}
    with distributed(device):
        name = meta["tasks"][0] if len(meta["tasks"]) == 1 else f"{len(meta['tasks'])}-tasks"
        run.open(name, {"data": vla_data.fingerprint(corpora), "assets": meta["assets"], "renderer": meta["renderer"]}, **meta)
        results = train(args, model, training, validation, args.steps, run, meta)
    if rank() == 0:
        said = ["steps {steps}", *(f"{name} {{{name}:.4f}}" for name in ("validation", "action_l1") if name in results)]
        run.finish({"parameters": sum(p.numel() for p in model.parameters()), **results, **meta}, ", ".join(said).format(**results))


if __name__ == "__main__":
    run_command(main)
