"""Fine-tune a vision-language-action model on demonstrations of downstream tasks, and measure its success in the simulator by
LIBERO's published protocol.

    python vla_finetune.py --checkpoint runs/PRETRAINED --data demos/libero_goal/*.hdf5             # its tasks are evaluated
    python vla_finetune.py --data demos/libero_goal/*.hdf5                                          # the same without pretraining
    python vla_finetune.py --checkpoint runs/RUN --eval-only --tasks libero_spatial libero_90/9
    python vla_finetune.py --eval-only --policy my_module:act --tasks libero_spatial                # anyone's (docs/policies.md)
    python vla_finetune.py --eval-only --policy ws://localhost:8000 --tasks libero_spatial
    python vla_finetune.py --resume runs/RUN

The model and its losses are one file, common/vla_model.py. docs/vla_finetune.md explains every result and implementation detail.
"""

from __future__ import annotations

if __name__ == "__main__":
    import common.start  # noqa: F401  (Ctrl-C amid the imports below is one line)

import contextlib
import copy
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import policies
from common.cli import Count, NotNegative, Positive, PositiveOrInf, Range, UserError, atomic_path, run_command
from common.data import vla as vla_data
from common.data.vla import ACTION_SIZE, CAMERAS, PROPRIO, Chunks, Order
from common.job import choose_devices
from common.libero import Task, load_task, make_env
from common.libero.assets import assets_like
from common.libero.renderers import Renderer, available, make_renderer
from common.libero.step import NO_OP
from common.metrics import wilson_interval
from common.networks import autocast
from common.runs import Progress, versions, write_json
from common.suites import base_suite, expand
from common.video import write_video
from common.vla_model import VLA, crop_side, digest, load_model, save_model
from common.vla_training import Batches, Log, ReadError, SharedRun, TrainingArgs, distributed, prepare, rank, world_size


@dataclasses.dataclass
class Args(TrainingArgs):
    """Fine-tune a vision-language-action model on demonstrations, and evaluate it in the simulator."""

    checkpoint: str | None = None
    """run folder or model.pt of vla_pretrain.py or of this script (default: none, a fresh model)"""

    # Optimisation
    epochs: Annotated[float, Range(above=0)] = 2.5
    """passes over --data"""
    batch_size: Count = 64
    """samples a step, of all ranks together"""
    lr: Positive = 5e-4
    """learning rate, reached after the warm-up; from there it follows a cosine to zero"""
    warmup: Annotated[int, Range(0)] = 20
    """steps of linear warm-up"""
    weight_decay: NotNegative = 0.01
    """of AdamW, on matrices"""
    max_grad_norm: PositiveOrInf = 1.0
    """gradients are clipped to this norm"""
    ema: Annotated[float, Range(0, below=1)] = 0.99
    """decay of the moving average of the weights, which is what is validated, kept and evaluated"""
    flow_draws: Count = 4
    """draws of noise and time for each chunk (flow): the pictures, which cost most, are encoded once for all of them"""

    # Model; with --checkpoint these are the checkpoint's, and another value is an error
    head: Literal["flow", "tokens"] | None = None
    """flow (default) or tokens"""
    size: Literal["tiny", "small", "base"] | None = None
    """tiny (default), small or base"""
    chunk: Count | None = None
    """actions predicted at once (default 8)"""
    crop: Annotated[float, Range(0.5, 1)] | None = None
    """side of the random crop as a share of the picture's (default 0.94); evaluation takes the centre"""
    vision: str | None = None
    """a pretrained image encoder: Hugging Face model id or local folder"""
    text: str | None = None
    """a pretrained text encoder: Hugging Face model id or local folder"""

    # Evaluation
    tasks: list[str] = dataclasses.field(default_factory=list)
    """suites, tasks, BDDL files and folders of them (default: the tasks of --data, else those that the checkpoint was trained on)"""
    eval_only: bool = False
    """no training: evaluate --checkpoint, or --policy, as it is"""
    policy: str | None = None
    """anyone's policy: module:function, file.py:function, or a server that speaks openpi's protocol, ws://host:port"""
    prompt: Literal["name", "bddl"] = "name"
    """what --policy is told: the sentence in the task's name, as published ones are, or that in its BDDL file"""
    policy_size: Annotated[int, Range(32, 512)] = 224
    """pixels of the pictures that --policy is shown; they are drawn at 256"""
    trials: Annotated[int, Range(1, 50)] = 50
    """episodes a task, one from each official init state"""
    replan: Count | None = None
    """actions of a chunk that are executed before the next one is predicted (default: 8; of --policy, 5)"""
    num_envs: Count = 16
    """parallel environments"""
    videos: Annotated[int, Range(0)] = 1
    """videos of successes and as many of failures, a task"""
    save_states: bool = False
    """also write the states in which the policy was asked for actions: RUN/states/TASK.npz"""
    backend: Literal["auto", "cpu", "warp"] = "auto"
    """simulator: cpu (all cores), warp (MuJoCo Warp on --device) or auto (warp on a GPU from 256 environments on)"""
    renderer: Literal["warp", "gl"] | None = None
    """what draws the pictures (default: what drew those of the training; for --policy gl, where it starts, else warp)"""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: those that the files were made on)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.checkpoint = self.checkpoint and str(Path(self.checkpoint).absolute())
        if self.eval_only and not (self.checkpoint or self.policy):
            raise UserError("--eval-only needs the --checkpoint or the --policy to evaluate")
        if self.policy and not self.eval_only:
            raise UserError("--policy is only evaluated: pass --eval-only, too")
        if self.policy and self.checkpoint:
            raise UserError("--policy and --checkpoint are two policies: name one of them")
        if self.policy and not self.tasks:
            raise UserError("--policy needs the --tasks to evaluate it on")
        if self.replan is None:
            self.replan = 5 if self.policy else 8
        if self.eval_only and self.data:
            raise UserError("--eval-only does not train, so it takes no --data; name what to evaluate on with --tasks")


def make_model(args: Args, image_size: int | None) -> tuple[VLA, dict]:
    """The checkpoint's model and its record, or a fresh model of the flags' shape (and an empty record) for pictures of `image_size`.

    Raises UserError if the checkpoint's model is not what the flags or the pictures ask for.
    """
    if not args.checkpoint:
        crop = crop_side(args.crop or 0.94, image_size)
        return VLA(args.head or "flow", args.size or "tiny", args.chunk or 8, image_size, crop, args.vision, args.text), {}
    model, meta = load_model(args.checkpoint)
    config = model.config
    wanted = {name: getattr(args, name) for name in ("head", "size", "chunk", "vision", "text")}
    if args.crop is not None:
        wanted["crop"] = crop_side(args.crop, config["image_size"])
    for name, value in wanted.items():
        if value is not None and value != config[name]:
            raise UserError(f"{args.checkpoint} has --{name} {config[name]}, not {value}; leave the flag out, or take another checkpoint")
    if image_size not in (None, config["image_size"]):
        size = config["image_size"]
        raise UserError(
            f"image size mismatch: {args.checkpoint} takes pictures of {size} x {size}, the data has {image_size} x {image_size}; "
            f"render them again: python -m common.libero.render FILE --size {size} --overwrite"
        )
    return model, meta


def check_match(meta: dict, task: Task, renderer: str, allow: bool, say: Callable[[str], None]) -> None:
    """Raise UserError (with `allow`: say so) where an evaluation would not be in the world that the model was trained in."""
    recorded = {corpus["mujoco"] for corpus in meta["corpora"]}
    pairs = {
        "renderer": ({meta["renderer"]}, renderer),
        "assets": ({meta["assets"]}, task.image_assets),
        "mujoco": (recorded, versions()["mujoco"]),
        "instruction": ({corpus["language"] for corpus in meta["corpora"] if corpus["task"] == task.id}, task.language),
    }
    wrong = [
        f"{name} {', '.join(sorted(then))} in training, {now} here" for name, (then, now) in pairs.items() if then - {"unknown"} - {now}
    ]
    if wrong and not allow:
        raise UserError(f"{task.id}: {'; '.join(wrong)}; evaluate with what the model was trained on, or pass --allow-mismatch")
    if wrong:
        say(f"mismatch allowed: {'; '.join(wrong)}")


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


# ---------------------------------------------------------------------------------------------- evaluation


@dataclasses.dataclass
class Trial:
    """One episode of an evaluation."""

    init_state: int
    success: bool
    qpos: np.ndarray  # (T, nq), before each action


# images (n, 2, H, W, 3) uint8, row 0 the top, proprioception (n, 8), official init states (n,), steps taken so far (n,)
# -> actions (n, chunk, 7) in [-1, 1]
Policy = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class ModelPolicy:
    """A model that is told one instruction. Its noise depends on (seed, init state, step) alone, not on the batch."""

    def __init__(self, model: VLA, instruction: str, seed: int):
        self.model, self.prompt, self.seed = model.eval(), instruction, seed
        self.tokens = model.text.tokenize([instruction]).to(model.device)

    def __call__(self, images, proprio, init_states, steps) -> np.ndarray:
        device, shape = self.model.device, (self.model.config["chunk"], ACTION_SIZE)
        seeds = [(self.seed * 1000 + int(i)) * 10_000 + int(t) for i, t in zip(init_states, steps, strict=True)]
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        instruction = torch.zeros(len(images), dtype=torch.long, device=device)
        inputs = torch.from_numpy(images).to(device), torch.from_numpy(proprio).float().to(device)
        return self.model.act(*inputs, self.tokens, instruction, noise.to(device)).cpu().numpy()


def evaluate(
    task: Task, policy: Policy, camera: Renderer, trials: int, num_envs: int, replan: int, tick: Callable[[Trial], None], **simulator
) -> list[Trial]:
    """LIBERO's published protocol: trial i starts from official init state i, after 10 no-ops; 20 Hz; the suite's step cap.

    `policy` is asked for a chunk every `replan` steps, for all environments that are due at once; `tick(trial)` is called as each ends;
    `simulator`: backend and device, as in `make_env`.
    """
    num_envs = min(num_envs, trials)
    env = make_env(task, num_envs, settle_steps=10, autoreset_mode=AutoresetMode.DISABLED, **simulator)
    nq = task.model.nq
    todo, done = list(range(trials))[::-1], []
    trial, step = np.full(num_envs, -1), np.zeros(num_envs, int)  # trial -1: none left
    plans, paths = np.tile(NO_OP, (num_envs, replan, 1)), [[] for _ in range(num_envs)]

    def assign(envs: np.ndarray) -> None:
        for i in envs:
            trial[i], step[i], paths[i] = todo.pop() if todo else -1, 0, []
        env.reset(options={"reset_mask": np.isin(np.arange(num_envs), envs), "init_state": np.maximum(trial, 0)})

    assign(np.arange(num_envs))
    while (trial >= 0).any():
        qpos = env.get_state()[:, 1 : 1 + nq]
        due = np.flatnonzero((trial >= 0) & (step % replan == 0))
        if len(due):
            pictures = camera.render(qpos[due])
            images = np.stack([pictures[name] for name in CAMERAS.values()], axis=1)
            robot = env.proprioception()
            proprio = np.concatenate([robot[name][due] for name in PROPRIO], axis=1)
            plans[due] = policy(images, proprio, trial[due], step[due])[:, :replan]
        actions = np.where((trial >= 0)[:, None], plans[np.arange(num_envs), step % replan], NO_OP)
        for i in range(num_envs):
            paths[i].append(qpos[i])
        _, _, terminated, truncated, _ = env.step(actions, trial >= 0)
        step += 1
        ended = np.flatnonzero((terminated | truncated) & (trial >= 0))
        for i in ended:
            done.append(Trial(int(trial[i]), bool(terminated[i]), np.stack(paths[i])))
            tick(done[-1])
        if len(ended):
            assign(ended)
    env.close()
    return sorted(done, key=lambda t: t.init_state)


def summarise(task: Task, trials: list[Trial]) -> dict:
    """A task's row in results.json: success with its 95 % Wilson interval."""
    successes = sum(t.success for t in trials)
    lengths = [len(t.qpos) for t in trials if t.success]
    return {
        "task": task.id,
        "instruction": task.language,
        "success_rate": successes / len(trials),
        "interval": wilson_interval(successes, len(trials)),
        "successes": successes,
        "trials": len(trials),
        "mean_length": float(np.mean(lengths)) if lengths else None,
        "outcomes": [t.success for t in trials],
        "assets": task.image_assets,
    }


def make_videos(run: Path, task: Task, trials: list[Trial], count: int, renderer: str) -> None:
    """RUN/videos: the first `count` successes and failures, seen by agentview."""
    chosen = [t for outcome in (True, False) for t in [t for t in trials if t.success == outcome][:count]]
    if chosen:
        camera = make_renderer(task.model, ("agentview",), 256, 256, renderer)
    for t in chosen:
        name = f"{task.id.replace('/', '-')}__{'success' if t.success else 'failure'}_{t.init_state}.mp4"
        write_video(run / "videos" / name, camera.render(t.qpos)["agentview"])


def save_states(run: Path, task: Task, trials: list[Trial], replan: int) -> None:
    """RUN/states/{task}.npz: of each trial, by its init state, qpos (n, nq) float32 whenever the policy was asked."""
    with atomic_path(run / "states" / f"{task.id.replace('/', '-')}.npz") as temporary:
        np.savez_compressed(temporary, **{str(t.init_state): t.qpos[::replan].astype(np.float32) for t in trials})


def by_suite(rows: list[dict]) -> dict[str, dict]:
    """Success of each suite, with its 95 % Wilson interval."""
    found = {}
    for suite in dict.fromkeys(row["task"].split("/")[0] for row in rows):
        mine = [row for row in rows if row["task"].split("/")[0] == suite]
        successes, trials = sum(row["successes"] for row in mine), sum(row["trials"] for row in mine)
        found[suite] = {"success_rate": successes / trials, "interval": wilson_interval(successes, trials), "tasks": len(mine)}
        found[suite] |= {"successes": successes, "trials": trials}
    return found


def suites_table(rows: list[dict]) -> str:
    """Markdown: a line a task, a column a suite; LIBERO-PRO's suites stand beside those that they perturb, by their tasks' names."""
    suites, cells = by_suite(rows), {}
    for row in rows:
        suite, _, name = row["task"].partition("/")
        base = base_suite(suite) or suite
        cells.setdefault(f"{base}/{name.partition('@')[0]}", {})[suite] = f"{row['success_rate']:.0%}"
    lines = [["task", *suites], ["---"] * (len(suites) + 1)]
    lines += [[task, *(found.get(suite, "") for suite in suites)] for task, found in cells.items()]
    lines.append(["all", *(f"{s['success_rate']:.0%} ({s['interval'][0]:.0%} to {s['interval'][1]:.0%})" for s in suites.values())])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@dataclasses.dataclass
class Subject:
    """What is evaluated: its policy for a task, what is checked before, and how pictures are drawn for it."""

    policy: Callable[[Task], Policy]
    check: Callable[[Task, Policy, Renderer], None]
    size: int  # pixels of a picture's side
    renderer: str
    assets: str | None  # what it was trained on, as `Task.assets`
    device: str


def evaluate_tasks(args: Args, subject: Subject, tasks: list[str], run: Path, results: dict, progress: Progress) -> None:
    """Evaluate task by task; RUN/results.json is written after each, and what it holds already is kept."""
    rows = results.setdefault("tasks", [])
    for number, name in enumerate(tasks, start=1):
        if any(row["task"] == name for row in rows):
            continue
        task = load_task(name, assets_like(subject.assets, args.assets))
        camera = make_renderer(task.model, tuple(CAMERAS.values()), subject.size, subject.size, subject.renderer, device=subject.device)
        policy = subject.policy(task)
        subject.check(task, policy, camera)
        progress.say(f"evaluate {number}/{len(tasks)}: {task.id}, {args.trials} trials; it is told to {policy.prompt}")
        progress.stage(f"evaluate {number}/{len(tasks)}", args.trials)
        outcomes: list[bool] = []

        def tick(trial: Trial, outcomes=outcomes) -> None:
            outcomes.append(trial.success)
            progress.update(1, f"success {np.mean(outcomes):.0%}")

        simulator = {"backend": args.backend, "device": subject.device}
        began = time.monotonic()
        trials = evaluate(task, policy, camera, args.trials, args.num_envs, args.replan, tick, **simulator)
        row = summarise(task, trials) | {"prompt": policy.prompt, "seconds": time.monotonic() - began}
        make_videos(run, task, trials, args.videos, subject.renderer)
        if args.save_states:
            save_states(run, task, trials, args.replan)
        rows.append(row)
        low, high = row["interval"]
        progress.say(f"{task.id}: success {row['success_rate']:.0%} ({low:.0%} to {high:.0%})")
        successes, total = sum(r["successes"] for r in rows), sum(r["trials"] for r in rows)
        results |= {"success_rate": successes / total, "interval": wilson_interval(successes, total), "suites": by_suite(rows)}
        write_json(run / "results.json", results)


def finish_evaluation(args: Args, subject: Subject, tasks: list[str], run: SharedRun, results: dict) -> None:
    """Evaluate, going on with what results.json has, and end the run."""
    protocol = {"trials": args.trials, "replan": args.replan, "no_ops": 10, "control_hz": 20, "allow_mismatch": args.allow_mismatch}
    results |= {"protocol": protocol | {"backend": args.backend}, "versions": versions(), "renderer": subject.renderer}
    if (run.folder / "results.json").exists():
        found = json.loads((run.folder / "results.json").read_text())
        kept = ("tasks", "success_rate", "interval", "suites", "conventions")
        results |= {name: found[name] for name in kept if name in found}
    evaluate_tasks(args, subject, tasks, run.folder, results, run.progress)
    rows = [{name: value for name, value in row.items() if name != "outcomes"} for row in results["tasks"]]
    low, high = results["interval"]
    line = f"success {results['success_rate']:.1%} ({low:.1%} to {high:.1%}) over {len(rows)} tasks"
    if len(results["suites"]) > 1:
        (run.folder / "table.md").write_text(text := suites_table(rows))
        run.progress.say(f"{text}\n(also in {run.folder / 'table.md'})")
    run.finish(results | {"tasks": rows}, line)


def require_simulator(args: Args, task: Task, renderer: str, device: str) -> None:
    """Raise UserError if a renderer, a simulator or ffmpeg is missing: now, not after hours."""
    make_renderer(task.model, tuple(CAMERAS.values()), 16, 16, renderer, device=device)
    if args.backend == "warp":
        make_env(task, min(args.num_envs, args.trials), backend="warp", device=device).close()
    if args.videos and not (possible := available(renderer))[0]:
        raise UserError(f"no videos: {possible[1]}; or pass --videos 0")


def evaluate_policy(args: Args, run: SharedRun, device: torch.device) -> None:
    """--policy: anyone's, by the same protocol. It is first compared with a demonstration of the first task."""
    tasks, say = expand(args.tasks), run.progress.say
    gl, reason = available("gl") if args.renderer is None else (False, "")
    renderer = args.renderer or ("gl" if gl else "warp")
    if args.renderer is None and not gl:
        say(f"pictures by our ray tracer, as LIBERO's own renderer is not available: {reason}")
    first = load_task(tasks[0], args.assets)
    require_simulator(args, first, renderer, device.type)
    answer = policies.find_policy(args.policy, args.num_envs)
    run.open(tasks[0] if len(tasks) == 1 else f"{len(tasks)}-tasks", {"image_assets": first.image_assets, "renderer": renderer})
    results = {"policy": args.policy, "server": getattr(answer, "metadata", None), "checkpoint": None}

    def policy(task: Task) -> policies.Policy:
        prompt = task.language if args.prompt == "bddl" else policies.instruction_of(task)
        return policies.Policy(answer, f"--policy {args.policy}", prompt, args.replan, args.policy_size)

    def check(task: Task, policy: policies.Policy, camera: Renderer) -> None:
        if "conventions" not in results:
            results["conventions"] = policies.compare(task, policy, camera, args.seed, say)

    subject = Subject(policy, check, policies.DRAWN, renderer, args.assets, device.type)
    with contextlib.closing(answer) if hasattr(answer, "close") else contextlib.nullcontext():  # a server hears that we leave
        finish_evaluation(args, subject, tasks, run, results)


# ---------------------------------------------------------------------------------------------- the whole job


def main() -> None:
    run = SharedRun("vla_finetune", Args)
    device = prepare(run)
    run.args = args = dataclasses.replace(run.args, backend=choose_devices(run.args).backend)
    if args.policy:
        return evaluate_policy(args, run, device)
    corpora = [] if args.eval_only else args.read()
    model, meta = make_model(args, corpora[0].image_size if corpora else None)
    depends = {"pretrained": digest(model)} if args.checkpoint else {}
    if args.replan > model.config["chunk"]:
        raise UserError(f"--replan {args.replan} is more than the {model.config['chunk']} actions of a chunk")
    if corpora:
        parts = vla_data.split(corpora, args.val_fraction, args.seed)
        training, validation = (Chunks(part, model.config["chunk"]) for part in parts)
        if not args.checkpoint:
            model.fit(training.statistics())
        for name in ("renderer", "assets"):
            then, now = meta.get(name), getattr(corpora[0], name)
            if then not in (None, now) and not args.allow_mismatch:
                raise UserError(f"{name} mismatch: {then} in {args.checkpoint}, {now} in {corpora[0].path}; or pass --allow-mismatch")
        order = Order(training.sizes, args.weights or [1.0] * len(training.sizes), args.batch_size, args.seed)
        steps = max(1, round(args.epochs * order.steps_per_epoch))
        meta = {"renderer": corpora[0].renderer, "assets": corpora[0].assets, "versions": versions(), "seed": args.seed, "pretrained": meta}
        meta |= {"tasks": sorted({c.task for c in corpora}), "corpora": vla_data.describe(corpora)}
        depends["data"] = vla_data.fingerprint(corpora)
    tasks, renderer = expand(args.tasks or meta["tasks"]), args.renderer or meta["renderer"]
    first = load_task(tasks[0], assets_like(meta["assets"], args.assets))  # what is missing is found now
    check_match(meta, first, renderer, args.allow_mismatch, lambda line: None)
    require_simulator(args, first, renderer, device.type)
    model.to(device)
    with distributed(device):
        name = tasks[0] if len(tasks) == 1 else f"{len(tasks)}-tasks"
        run.open(name, depends | {"assets": meta["assets"], "image_assets": first.image_assets, "renderer": renderer}, trained_on=meta)
        trained = None if args.eval_only else train(args, model, training, validation, steps, run, meta)
    if rank() > 0:  # one process evaluates
        return
    results = {"checkpoint": args.checkpoint, "model": model.config, "training": trained, "trained_on": meta}

    def check(task: Task, policy: Policy, camera: Renderer) -> None:
        check_match(meta, task, renderer, args.allow_mismatch, run.progress.say)

    size = model.config["image_size"]
    subject = Subject(lambda task: ModelPolicy(model, task.language, args.seed), check, size, renderer, meta["assets"], device.type)
    finish_evaluation(args, subject, tasks, run, results)


if __name__ == "__main__":
    run_command(main)
