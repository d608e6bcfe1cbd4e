"""A vision-language-action model (VLA): pictures of two cameras, proprioception and an instruction to a chunk of actions.

Tokens of what is seen go through a transformer; an action head attends to what comes out, and has its own loss and its own way of
sampling. `FlowHead`: conditional flow matching over the chunk, as pi0 (arXiv 2410.24164). `TokenHead`: 256 bins an action dimension,
predicted one after the other by maximum likelihood, as OpenVLA (arXiv 2406.09246).

    model = VLA("flow", "tiny", chunk=8, image_size=64, crop=60).fit(statistics)
    loss = model(batch)                                                         # a scalar: model(batch).backward()
    actions = model.act(images, proprio, tokens, instruction, noise)            # (B, chunk, 7) in [-1, 1]
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.cli import UserError
from common.data.vla import ACTION_SIZE, CAMERAS, PROPRIO_SIZE
from common.runs import load_checkpoint, save_checkpoint


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


def attention(q, k, v, keep=None, causal=False):
    """softmax(q k^T / sqrt(d)) v: q (B, heads, N, d), k and v (B, heads, M, d), keep (B, M) bool -> (B, heads, N, d)."""
    keep = None if keep is None else keep[:, None, None, :]
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, is_causal=causal)
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)  # on CPUs, and so few tokens, faster than the fused kernel
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return (scores if keep is None else scores.masked_fill(~keep, -math.inf)).softmax(-1).to(v.dtype) @ v


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
        return self.out(attention(heads(self.q(x)), k, v, keep, causal).transpose(1, 2).flatten(2))


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
    """Convolutions down to 1/16 of the resolution: pictures (N, 3, S, S) uint8 -> tokens (N, ceil(S / 16)^2, width)."""

    def __init__(self, side: int, size: Size):
        super().__init__()
        layers: list[nn.Module] = []
        for before, channels, blocks in zip((3, *size.channels), size.channels, size.blocks, strict=False):
            layers += [nn.Conv2d(before, channels, 3, stride=2, padding=1)]
            layers += [ResidualBlock(channels) for _ in range(blocks)]
            layers += [nn.GroupNorm(channels // 16, channels), nn.SiLU()]
        self.net = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # as pictures are stored
        self.project = nn.Linear(size.channels[-1], size.width)
        self.position = nn.Parameter(0.02 * torch.randn(math.ceil(side / 16) ** 2, size.width))

    def forward(self, pictures):
        x = self.net(pictures.float().div_(127.5).sub_(1)).flatten(2).transpose(1, 2)  # (N, tokens, channels)
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
        x = F.interpolate(pictures / 255.0, (self.side, self.side), mode="bilinear", antialias=True)
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
        pictures = crop_images(images.flatten(0, 1), offsets.flatten(0, 1), self.config["crop"])  # (B * cameras, 3, S, S)
        pictures = self.vision(pictures).unflatten(0, offsets.shape[:2]) + self.camera
        state = self.proprio(((proprio - self.proprio_mean) / self.proprio_std).clamp(-10, 10))
        x = torch.cat([self.text(tokens)[instruction][:, None], state[:, None], pictures.flatten(1, 2)], dim=1)
        for layer in self.trunk:
            x = layer(x)
        return self.norm(x)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The action head's loss; a mean over the batch, padding counting as zeros.

        Beside what `encode` takes (`crop` are its offsets): actions (B, chunk, 7) in [-1, 1], mask (B, chunk), and of the flow head's R
        draws noise (B, R, chunk, 7), standard normal, and uniform (B, R) in [0, 1).
        """
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
    """(N, H, W, 3) and each one's upper left corner (N, 2) -> (N, 3, side, side), the channels last in memory."""
    windows = images.unfold(1, side, 1).unfold(2, side, 1)  # a view, (N, rows, columns, 3, side, side)
    return windows[torch.arange(len(images), device=images.device), offsets[:, 0], offsets[:, 1]]


def crop_side(share: float, image_size: int) -> int:
    """Pixels of a crop that is `share` of a picture's side, even, so that it has a centre."""
    return round(share * image_size / 2) * 2


def digest(model: nn.Module) -> str:
    """Twelve hex digits over a model's weights."""
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.detach().cpu().numpy().tobytes())
    return found.hexdigest()[:12]


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
        reason = str(error).splitlines()[:2][-1].strip()  # torch's first line says no more than that there is an error
        raise UserError(f"{path} does not fit this version of the model ({reason}); train it again") from error
    return model, content["meta"]
