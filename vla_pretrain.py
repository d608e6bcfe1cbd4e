"""A vision-language-action model (VLA), trained from scratch on corpora of many tasks: pictures, proprioception and an instruction
to a chunk of actions.

One model with either of two action heads. `--head flow`: conditional flow matching over the chunk, as pi0 (arXiv 2410.24164).
`--head tokens`: 256 bins an action dimension, predicted one after the other by maximum likelihood, as OpenVLA (arXiv 2406.09246).

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
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

from common.cli import UserError, run_command
from common.data import vla as vla_data
from common.data.vla import ACTION_SIZE, CAMERAS, PROPRIO_SIZE, Chunks, Corpus, Order
from common.runs import Progress, choose_device, load_checkpoint, make_run, resumed_args, save_checkpoint, versions, write_json


@dataclasses.dataclass
class Training:
    """What pretraining and fine-tuning share."""

    data: list[str] = dataclasses.field(default_factory=list)
    """HDF5 files in LIBERO's layout with pictures (python -m common.libero.render adds them)"""
    weights: list[float] = dataclasses.field(default_factory=list)
    """how often an epoch shows each file's samples, one number a file in the order of --data (default: once)"""
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


@dataclasses.dataclass
class Args(Training):
    """Train a vision-language-action model from scratch on corpora."""

    steps: int = 10_000
    """optimiser steps"""

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


def validate(args: Training) -> None:
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


# ---------------------------------------------------------------------------------------------- the model


@dataclasses.dataclass(frozen=True)
class Size:
    width: int  # of all tokens
    heads: int
    text: int  # layers of the text encoder,
    trunk: int  # of the transformer over everything seen,
    decoder: int  # and of the action head
    channels: tuple[int, int, int, int]  # of the image encoder at 1/2, 1/4, 1/8 and 1/16 of the resolution
    blocks: tuple[int, int, int, int]  # residual blocks there


SIZES = {
    "tiny": Size(128, 4, 1, 2, 2, (32, 64, 96, 128), (0, 0, 0, 0)),
    "small": Size(320, 5, 2, 5, 4, (64, 96, 192, 320), (1, 1, 1, 1)),
    "base": Size(512, 8, 1, 6, 3, (64, 128, 256, 512), (1, 2, 2, 2)),
}
MAX_BYTES = 256  # of an instruction


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves, or to a context."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x, context=None, keep=None, causal=False, cache: dict | None = None):
        """x (B, N, width) -> (B, N, width).

        context (B, M, width): what is attended to (default x); keep (B, M) bool: what of it counts. cache: keys and values of this
        layer's earlier calls, to which x's are added, or which stand for the context's.
        """
        heads = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731  (B, heads, N, width / heads)
        if context is not None and cache is not None and self in cache:
            k, v = cache[self]
        else:
            k, v = (heads(t) for t in self.kv(x if context is None else context).chunk(2, dim=-1))
            if cache is not None:
                if self in cache:
                    k, v = torch.cat([cache[self][0], k], dim=2), torch.cat([cache[self][1], v], dim=2)
                cache[self] = k, v
        mask = None if keep is None else keep[:, None, None, :]
        y = F.scaled_dot_product_attention(heads(self.q(x)), k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A pre-norm transformer layer; with `cross`, it also attends to a context: x (B * R, N, width), context (B, M, width)."""

    def __init__(self, width: int, heads: int, cross: bool = False):
        super().__init__()
        self.norm1, self.attend = nn.LayerNorm(width), Attention(width, heads)
        if cross:
            self.norm2, self.cross = nn.LayerNorm(width), Attention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, context=None, keep=None, causal=False, cache: dict | None = None):
        x = x + self.attend(self.norm1(x), keep=keep, causal=causal, cache=cache)
        if context is not None:
            queries = self.norm2(x).reshape(len(context), -1, x.shape[-1])  # several rows of x may share a context's
            x = x + self.cross(queries, context, cache=cache).reshape(x.shape)
        return x + self.mlp(self.norm3(x))


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        layers = [[nn.GroupNorm(channels // 16, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)] for _ in range(2)]
        self.net = nn.Sequential(*layers[0], *layers[1])

    def forward(self, x):
        return x + self.net(x)


class ImageEncoder(nn.Module):
    """Convolutions down to 1/16 of the resolution: pictures (N, 3, S, S) in [0, 1] -> tokens (N, ceil(S / 16)^2, width)."""

    def __init__(self, side: int, size: Size):
        super().__init__()
        layers: list[nn.Module] = []
        for before, channels, blocks in zip((3, *size.channels), size.channels, size.blocks, strict=False):
            layers += [nn.Conv2d(before, channels, 3, stride=2, padding=1)]
            layers += [ResidualBlock(channels) for _ in range(blocks)]
            layers += [nn.GroupNorm(channels // 16, channels), nn.SiLU()]
        self.net = nn.Sequential(*layers)
        self.project = nn.Linear(size.channels[-1], size.width)
        self.position = nn.Parameter(0.02 * torch.randn(math.ceil(side / 16) ** 2, size.width))

    def forward(self, pictures):
        x = self.net(2 * pictures - 1).flatten(2).transpose(1, 2)  # (N, tokens, channels)
        return self.project(x) + self.position


class TextEncoder(nn.Module):
    """The instruction as UTF-8 bytes: no vocabulary, so nothing to download."""

    def __init__(self, size: Size):
        super().__init__()
        self.embed = nn.Embedding(257, size.width, padding_idx=0)
        self.position = nn.Parameter(0.02 * torch.randn(MAX_BYTES, size.width))
        self.layers = nn.ModuleList(Layer(size.width, size.heads) for _ in range(size.text))
        self.norm = nn.LayerNorm(size.width)

    def tokenize(self, instructions: Sequence[str]) -> torch.Tensor:
        """(N, L) int64: bytes plus 1, filled up with 0."""
        rows = [torch.tensor(list(text.encode())) + 1 for text in instructions]
        if (longest := max(map(len, rows))) > MAX_BYTES:
            raise UserError(f"an instruction has {longest} bytes, more than the {MAX_BYTES} that the model takes")
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def forward(self, tokens):
        """(N, L) -> (N, width), the mean over the text."""
        keep = tokens > 0
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, keep=keep)
        return (self.norm(x) * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)


def pretrained(name: str, flag: str):
    """The module transformers, and a Hugging Face model (an id or a folder) with its weights."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{flag} needs transformers; run: pip install transformers") from error
    try:
        model = transformers.AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {name}: not a model id or folder that loads here ({str(error).splitlines()[0]})") from error
    return transformers, model


class PretrainedImageEncoder(nn.Module):
    """A Hugging Face image encoder (ViT, CLIP, SigLIP, DINOv2, ResNet, ...), trained on with everything else."""

    def __init__(self, name: str, size: Size):
        super().__init__()
        transformers, model = pretrained(name, "--vision")
        self.net = getattr(model, "vision_model", model)  # of CLIP and its like
        config = self.net.config
        self.side = getattr(config, "image_size", 224)
        try:
            processor, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
        except OSError:  # weights without a preprocessor
            processor = {}
        for key in ("image_mean", "image_std"):
            self.register_buffer(key, torch.tensor(processor.get(key) or [0.5, 0.5, 0.5])[:, None, None])
        channels = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
        self.project = nn.Linear(channels, size.width)

    def forward(self, pictures):
        x = F.interpolate(pictures, (self.side, self.side), mode="bilinear", antialias=True)
        x = self.net(pixel_values=(x - self.image_mean) / self.image_std).last_hidden_state
        return self.project(x.flatten(2).transpose(1, 2) if x.ndim == 4 else x)


class PretrainedTextEncoder(nn.Module):
    """A Hugging Face text encoder (BERT, T5, CLIP, ...) with its tokenizer, trained on with everything else."""

    def __init__(self, name: str, size: Size):
        super().__init__()
        transformers, model = pretrained(name, "--text")
        self.net = getattr(model, "text_model", None) or (model.get_encoder() if model.config.is_encoder_decoder else model)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        self.project = nn.Linear(self.net.config.hidden_size, size.width)

    def tokenize(self, instructions: Sequence[str]) -> torch.Tensor:
        """(N, 2, L) int64: ids and attention mask."""
        found = self.tokenizer(list(instructions), padding=True, return_tensors="pt")
        return torch.stack([found["input_ids"], found["attention_mask"]], dim=1)

    def forward(self, tokens):
        ids, keep = tokens.unbind(1)
        x = self.net(input_ids=ids, attention_mask=keep).last_hidden_state
        return self.project((x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True))


class FlowHead(nn.Module):
    """Conditional flow matching over an action chunk (Lipman et al. 2023; as pi0, arXiv 2410.24164, section IV and appendix B).

    With A the chunk, e ~ N(0, I) and A_t = t A + (1 - t) e, the network v(A_t, t, o) learns A - e; actions come from integrating
    dA/dt = v from noise at t = 0 to t = 1.
    """

    def __init__(self, chunk: int, actions: int, size: Size):
        super().__init__()
        self.embed_action, self.embed_time = nn.Linear(actions, size.width), nn.Linear(size.width, size.width)
        self.mix = nn.Sequential(nn.Linear(2 * size.width, size.width), nn.SiLU(), nn.Linear(size.width, size.width))
        self.position = nn.Parameter(0.02 * torch.randn(chunk, size.width))
        self.layers = nn.ModuleList(Layer(size.width, size.heads, cross=True) for _ in range(size.decoder))
        self.norm, self.out = nn.LayerNorm(size.width), nn.Linear(size.width, actions)
        nn.init.zeros_(self.out.weight)
        self.register_buffer("frequencies", 2 * math.pi * 1000 ** torch.linspace(-1, 0, size.width // 2) / 4, persistent=False)

    def velocity(self, actions, time, memory, cache: dict | None = None):
        """v(A_t, t, o): actions (B * R, chunk, D), time (B * R,), memory (B, M, width) -> (B * R, chunk, D)."""
        phase = time[:, None] * self.frequencies
        time = self.embed_time(torch.cat([phase.sin(), phase.cos()], dim=-1))
        x = torch.cat([self.embed_action(actions), time[:, None].expand(-1, actions.shape[1], -1)], dim=-1)
        x = self.mix(x) + self.position
        for layer in self.layers:
            x = layer(x, memory, cache=cache)
        return self.out(self.norm(x))

    def loss(self, memory, actions, mask, noise, uniform):
        """Mean squared error of the velocity at R draws of noise and time for each chunk.

        actions (B, chunk, D), mask (B, chunk), noise (B, R, chunk, D), uniform (B, R) in [0, 1).
        """
        time = 0.999 * (1 - uniform ** (2 / 3))  # 1 - Beta(1.5, 1): pi0's emphasis on noisy actions
        t, actions = time[..., None, None], actions[:, None]
        noisy = t * actions + (1 - t) * noise
        velocity = self.velocity(noisy.flatten(0, 1), time.flatten(), memory).reshape(noise.shape)
        return ((velocity - (actions - noise)).square() * mask[:, None, :, None]).mean()

    @torch.no_grad()
    def sample(self, memory, noise, steps: int = 10):
        """Euler's method from noise (B, chunk, D)."""
        actions = noise
        for i in range(steps):
            actions = actions + self.velocity(actions, actions.new_full((len(actions),), i / steps), memory) / steps
        return actions


class TokenHead(nn.Module):
    """Actions as 256 uniform bins a dimension, predicted one after the other, as OpenVLA (arXiv 2406.09246, section 3.2)."""

    bins = 256

    def __init__(self, chunk: int, actions: int, size: Size):
        super().__init__()
        self.shape = chunk, actions
        self.embed = nn.Embedding(self.bins + 1, size.width)  # the last one begins the sequence
        self.position = nn.Parameter(0.02 * torch.randn(chunk * actions, size.width))
        self.layers = nn.ModuleList(Layer(size.width, size.heads, cross=True) for _ in range(size.decoder))
        self.norm, self.out = nn.LayerNorm(size.width), nn.Linear(size.width, self.bins)
        nn.init.zeros_(self.out.weight)

    def logits(self, tokens, memory, first: int = 0, cache: dict | None = None):
        """(B, N) tokens at positions first, first + 1, ... -> (B, N, bins) of those that follow."""
        x = self.embed(tokens) + self.position[first : first + tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, memory, causal=tokens.shape[1] > 1, cache=cache)
        return self.out(self.norm(x))

    def loss(self, memory, actions, mask, noise=None, uniform=None):
        """Negative log-likelihood (nats a token) of actions (B, chunk, D) in [-1, 1]; mask (B, chunk)."""
        tokens = ((actions.flatten(1) + 1) * (self.bins / 2)).long().clamp(0, self.bins - 1)
        begin = torch.full_like(tokens[:, :1], self.bins)
        logits = self.logits(torch.cat([begin, tokens[:, :-1]], dim=1), memory)
        nll = F.cross_entropy(logits.transpose(1, 2).float(), tokens, reduction="none")
        return (nll * mask.repeat_interleave(self.shape[1], dim=1)).mean()

    @torch.no_grad()
    def sample(self, memory, noise=None):
        """The likeliest bin's centre at each position, (B, chunk, D)."""
        token = torch.full((len(memory), 1), self.bins, device=memory.device)
        found, cache = [], {}
        for i in range(math.prod(self.shape)):
            token = self.logits(token, memory, i, cache).argmax(-1)
            found.append(token)
        return ((torch.cat(found, dim=1) + 0.5) * (2 / self.bins) - 1).reshape(-1, *self.shape)


HEADS = {"flow": FlowHead, "tokens": TokenHead}


class VLA(nn.Module):
    """Pictures of two cameras, proprioception and an instruction -> a chunk of actions.

    Tokens of the text (one), the proprioception (one) and each picture go through a transformer trunk; the action head attends to
    what comes out. Proprioception is standardised; of each action dimension the 1 % and 99 % quantiles become -1 and 1. These
    statistics are part of the state dict.
    """

    def __init__(self, head: str, size: str, chunk: int, image_size: int, crop: int, vision: str | None = None, text: str | None = None):
        super().__init__()
        self.config = {"head": head, "size": size, "chunk": chunk, "image_size": image_size, "crop": crop, "vision": vision, "text": text}
        s = SIZES[size]
        self.vision = PretrainedImageEncoder(vision, s) if vision else ImageEncoder(crop, s)
        self.text = PretrainedTextEncoder(text, s) if text else TextEncoder(s)
        self.proprio = nn.Sequential(nn.Linear(PROPRIO_SIZE, s.width), nn.SiLU(), nn.Linear(s.width, s.width))
        self.camera = nn.Parameter(0.02 * torch.randn(len(CAMERAS), 1, s.width))
        self.trunk = nn.ModuleList(Layer(s.width, s.heads) for _ in range(s.trunk))
        self.norm = nn.LayerNorm(s.width)
        self.head = HEADS[head](chunk, ACTION_SIZE, s)
        for name, length in (("proprio_mean", 8), ("proprio_std", 8), ("action_low", 7), ("action_high", 7)):
            self.register_buffer(name, torch.zeros(length))

    def fit(self, statistics: dict[str, list[float]]) -> VLA:
        """Take normalisation statistics (`Chunks.statistics`); what hardly varies is not blown up."""
        for name, values in statistics.items():
            getattr(self, name).copy_(torch.tensor(values))
        self.proprio_std.clamp_(min=0.01)
        middle, half = (self.action_high + self.action_low) / 2, ((self.action_high - self.action_low) / 2).clamp(min=0.05)
        self.action_low.copy_(middle - half)
        self.action_high.copy_(middle + half)
        return self

    @property
    def device(self) -> torch.device:
        return self.proprio_mean.device

    def encode(self, images, offsets, proprio, tokens, instruction):
        """What the action head attends to, (B, M, width).

        images (B, cameras, H, W, 3) uint8, row 0 the top; offsets (B, cameras, 2): the crops' upper left corners; proprio (B, 8);
        tokens: of U different instructions, instruction (B,): which one.
        """
        images = crop_images(images.flatten(0, 1), offsets.flatten(0, 1), self.config["crop"])  # (B * cameras, S, S, 3)
        pictures = self.vision(images.permute(0, 3, 1, 2) / 255.0).unflatten(0, offsets.shape[:2]) + self.camera
        state = self.proprio(((proprio - self.proprio_mean) / self.proprio_std).clamp(-10, 10))
        x = torch.cat([self.text(tokens)[instruction][:, None], state[:, None], pictures.flatten(1, 2)], dim=1)
        for layer in self.trunk:
            x = layer(x)
        return self.norm(x)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch (`Chunks`' samples with `draws` and tokens); a mean over the batch, padding counting as zeros."""
        memory = self.encode(batch["images"], batch["crop"], batch["proprio"], batch["tokens"], batch["instruction"])
        actions = 2 * (batch["actions"] - self.action_low) / (self.action_high - self.action_low) - 1
        return self.head.loss(memory, actions, batch["mask"], batch["noise"], batch["uniform"])

    @torch.no_grad()
    def act(self, images, proprio, tokens, instruction, noise):
        """Chunks of actions (B, chunk, 7) in [-1, 1], the gripper -1 or 1; noise (B, chunk, 7), standard normal."""
        margin = (self.config["image_size"] - self.config["crop"]) // 2
        offsets = torch.full((*images.shape[:2], 2), margin, device=images.device)
        memory = self.encode(images, offsets, proprio, tokens, instruction)
        x = self.head.sample(memory, noise).float()
        actions = (self.action_low + (x + 1) / 2 * (self.action_high - self.action_low)).clamp(-1, 1)
        return torch.cat([actions[..., :6], torch.where(actions[..., 6:] > 0, 1.0, -1.0)], dim=-1)


def crop_images(images: torch.Tensor, offsets: torch.Tensor, side: int) -> torch.Tensor:
    """(N, H, W, 3) and each one's upper left corner (N, 2) -> (N, side, side, 3)."""
    if images.shape[1] == side:
        return images
    span = torch.arange(side, device=images.device)
    rows, columns = offsets[:, 0, None] + span, offsets[:, 1, None] + span
    return images[torch.arange(len(images), device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def draws(seed: int, step: int, batch_size: int, chunk: int, margin: int, flow_draws: int = 1) -> dict[str, torch.Tensor]:
    """All random numbers of a step: they depend on (seed, step) alone, not on what came before or on the number of processes."""
    generator = torch.Generator().manual_seed(seed * 2**40 + step)
    return {
        "noise": torch.randn(batch_size, flow_draws, chunk, ACTION_SIZE, generator=generator),
        "uniform": torch.rand(batch_size, flow_draws, generator=generator),
        "crop": torch.randint(margin + 1, (batch_size, len(CAMERAS), 2), generator=generator),
    }


def save_model(path: Path, model: VLA, meta: dict) -> None:
    """A model and all that evaluation has to know: pictures, statistics, renderer, assets, versions, what it was trained on."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    save_checkpoint(path, {"script": "vla", "config": model.config, "meta": meta, "model": state})


def load_model(path: str | os.PathLike) -> tuple[VLA, dict]:
    """The model of a run folder or a model.pt, on the CPU, and what was saved with it."""
    path = Path(path) / "model.pt" if Path(path).is_dir() else Path(path)
    content = load_checkpoint(path, "vla")
    try:
        model = VLA(**content["config"])
        model.load_state_dict(content["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this version of the model ({str(error).splitlines()[0]})") from error
    return model, content["meta"]


# ---------------------------------------------------------------------------------------------- training


def rank() -> int:
    return int(os.environ.get("RANK", 0))  # torchrun sets these


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def find_device(args: Training) -> torch.device:
    """The device of this process; raises UserError if it is not there."""
    device = choose_device(args.device, args.compile)
    return torch.device(device, int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else None)


def learning_rate(args: Training, step: int, steps: int) -> float:
    """Linear warm-up to `lr`, then a cosine to zero at the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, steps - args.warmup)))


def count_flops(model: VLA, tokens: torch.Tensor, size: int, flow_draws: int, autocast) -> float:
    """Floating-point operations a sample, forward and backward, counted on an empty batch of `size` samples."""
    side, chunk = model.config["image_size"], model.config["chunk"]
    batch = {
        "images": torch.zeros(size, len(CAMERAS), side, side, 3, dtype=torch.uint8),
        "proprio": torch.zeros(size, PROPRIO_SIZE),
        "actions": torch.zeros(size, chunk, ACTION_SIZE),
        "mask": torch.ones(size, chunk),
        "instruction": torch.zeros(size, dtype=torch.long),
        **draws(0, 0, size, chunk, 0, flow_draws),
    }
    batch = {name: value.to(model.device) for name, value in batch.items()} | {"tokens": tokens}
    with FlopCounterMode(display=False) as counter:
        with autocast():
            loss = model(batch)
        loss.backward()
    model.zero_grad()
    return counter.get_total_flops() / size


def train(args: Training, model: VLA, training: list[Corpus], validation: list[Corpus], steps: int, run: Path, meta: dict) -> dict:
    """Train `model` (left with the averaged weights) for `steps` steps, going on from RUN/checkpoint.pt if there is one.

    Writes RUN/checkpoint.pt, RUN/model.pt and TensorBoard events. Returns the last validation's losses and the speed.
    """
    device, main_process = model.device, rank() == 0
    chunks, held_out = Chunks(training, model.config["chunk"]), Chunks(validation, model.config["chunk"])
    order = Order(chunks.sizes, args.weights or [1.0] * len(training), args.batch_size, args.seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    average = copy.deepcopy(model).requires_grad_(False).eval()
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

    def autocast():
        return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()

    def prepare(batch: dict, numbers: dict, part: slice, tokens: torch.Tensor) -> dict:
        batch = batch | {name: value[part] for name, value in numbers.items()}
        return {name: value.to(device, non_blocking=True) for name, value in batch.items()} | {"tokens": tokens}

    margin = model.config["image_size"] - model.config["crop"]
    size = args.batch_size // (world_size() * args.accumulate)  # samples of a process at a time
    parts = [slice(first := (k * world_size() + rank()) * size, first + size) for k in range(args.accumulate)]
    tokens = model.text.tokenize(chunks.instructions).to(device)
    flops = count_flops(model, tokens, size, args.flow_draws, autocast)

    def losses() -> dict[str, float]:
        """Loss and error of the averaged weights on at most 256 held-out samples, always the same."""
        rows = torch.linspace(0, len(held_out) - 1, min(256, len(held_out))).long().unique().tolist()
        total, error, count = 0.0, 0.0, 0.0
        words = model.text.tokenize(held_out.instructions).to(device)
        numbers = draws(args.seed, 2**40 - 1, len(rows), model.config["chunk"], margin, args.flow_draws)
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            batch = prepare(torch.utils.data.default_collate([held_out[i] for i in rows[part]]), numbers, part, words)
            with torch.no_grad(), autocast():
                total += average(batch).item() * len(batch["mask"])
                found = average.act(batch["images"], batch["proprio"], words, batch["instruction"], batch["noise"][:, 0])
            error += ((found - batch["actions"]).abs().mean(-1) * batch["mask"]).sum().item()
            count += batch["mask"].sum().item()
        return {"losses/validation": total / len(rows), "losses/action_l1": error / count}

    progress = Progress() if main_process else None
    writer = SummaryWriter(str(run)) if main_process else None
    if main_process:
        progress.say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {device}, {len(chunks)} training samples")
        progress.stage("train", steps, step)

    def save() -> None:
        """Everything that the rest of the training depends on; random numbers depend on the step alone."""
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"step": step, "seconds": seconds + time.time() - began, "results": results, "corpora": corpora}
        save_checkpoint(run / "checkpoint.pt", {"script": "vla_training", **state})
        save_model(run / "model.pt", average, meta | {"step": step})

    learner: nn.Module = model
    if world_size() > 1:
        unused = bool(
            model.config["vision"] or model.config["text"]
        )  # pretrained encoders have parts, like poolers, that nothing here uses
        learner = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None, find_unused_parameters=unused)
    if args.compile:
        learner = torch.compile(learner)
    began = logged = time.time()
    waited, done = 0.0, step
    source = vla_data.batches(chunks, order, range(step, steps), parts, args.num_workers, pin=device.type == "cuda")
    try:
        while step < steps:
            rate = learning_rate(args, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            numbers = draws(args.seed, step, args.batch_size, model.config["chunk"], margin, args.flow_draws)
            train_loss = torch.zeros((), device=device)
            for k, part in enumerate(parts):
                asked = time.time()
                try:
                    batch = prepare(next(source), numbers, part, tokens)
                except UserError:  # of a file or a reading process; the weights are those after `step` steps
                    if main_process:
                        save()
                        progress.say(f"stopped after step {step}; to go on: --resume {run}")
                    raise
                waited += time.time() - asked
                last = k == args.accumulate - 1
                with contextlib.nullcontext() if last or world_size() == 1 else learner.no_sync():
                    with autocast():
                        loss = learner(batch) / args.accumulate
                    loss.backward()
                train_loss += loss.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            decay = min(args.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
            step += 1
            if not main_process:
                continue
            if step % 50 == 0 or step == steps:
                if not math.isfinite(train_loss):
                    raise UserError(f"the loss is {train_loss.item()} at step {step}; start again with a smaller --lr than {args.lr}")
                now = time.time()
                speed = (step - done) * args.batch_size / (now - logged)
                results |= {"samples_per_second": speed, "tflops_per_second": speed * flops / 1e12}
                charts = {"losses/train": train_loss.item(), "losses/grad_norm": norm.item(), "charts/learning_rate": rate}
                charts |= {f"charts/{name}": value for name, value in results.items() if "per_second" in name}
                charts |= {"charts/epoch": step / order.steps_per_epoch, "charts/data_wait": waited / (now - logged)}
                for name, value in charts.items():
                    writer.add_scalar(name, value, step)
                note = f"loss {train_loss.item():.3f}  {speed:.0f} samples/s  {speed * flops / 1e12:.3g} TFLOP/s"
                progress.update(step - done, note)
                waited, logged, done = 0.0, now, step
            if len(held_out) and (step % args.eval_interval == 0 or step == steps):
                found = losses()
                for name, value in found.items():
                    writer.add_scalar(name, value, step)
                results |= {name.removeprefix("losses/"): value for name, value in found.items()}
                progress.say(f"step {step}: validation loss {found['losses/validation']:.4f}, action error {found['losses/action_l1']:.4f}")
                logged = time.time()
            if step % args.checkpoint_interval == 0 or step == steps:
                save()
    except RuntimeError as error:  # torch's signal handler may report a dead worker amid a step
        raise vla_data.explained(error) from None
    finally:
        source.close()
        if main_process:
            progress.close()
            writer.close()
    model.load_state_dict(average.state_dict())
    return results | {"steps": step, "wall_seconds": seconds + time.time() - began}


# ---------------------------------------------------------------------------------------------- the whole job


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


def main() -> None:
    args = tyro.cli(Args)
    run = None
    if args.resume:
        run = Path(args.resume)
        args = resumed_args(run, "vla_pretrain", Args)
    validate(args)
    torch.set_num_threads(args.torch_threads)
    device = find_device(args)
    corpora = vla_data.read_corpora(args.data, args.max_episodes, args.seed)
    training, validation = vla_data.split(corpora, args.val_fraction, args.seed)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    image_size = corpora[0].image_size
    model = VLA(args.head, args.size, args.chunk, image_size, round(args.crop * image_size / 2) * 2, args.vision, args.text)
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
