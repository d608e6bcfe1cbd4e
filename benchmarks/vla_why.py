"""What may explain a VLA's success: how well it predicts actions, how near its corpus comes to what it meets, how smooth and consistent
that corpus is; and what it can do from starts that LIBERO never has.

    python -m benchmarks.vla_why runs/FINETUNED --json why.json        # perturbed starts
    python -m benchmarks.vla_why runs/EVALUATED --pretrained runs/RUN --corpora OUT/corpora --source dlr_discover --key KEY --json why.json

Corpora are files DIR/SOURCE/SUITE/TASK_demo.hdf5 with the filter keys mask/held_out and mask/KEY, what the VLA was trained on
(benchmarks.vla_compare makes all of this, and calls it for each VLA). Written to --json, task by task; what it holds is kept:

  action_error  by source: mean absolute error of a chunk's actions on held-out episodes, in units of actions (-1 to 1)
  corpus        of a task, on average: episodes, steps, ways; mean_jerk (m/s^3); consistency (m), the dispersion of a way's episodes
  coverage      distance (m) from what the evaluation met (vla_finetune.py --save-states) to the nearest state in the corpus, in the
                positions of the hand and of the things of interest: of its starts to the corpus's starts, and of all that it met.
                VLAs that fail go astray: the second is also an effect of failing.
  starts        rows as vla_finetune.py's, from official init states that are changed:
                objects  all things are shifted together, so far that each thing of interest lies at least 2 cm outside of where
                         LIBERO ever puts it (tasks in which one can be moved)
                hand     the arm's joints are turned, and the hand is 5 to 10 cm elsewhere
                Both only where after the ten no-ops nothing else has moved: nothing is pushed, dropped, or hit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated

import mujoco
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from scipy.spatial import cKDTree

import vla_finetune
from common.cli import Range, UserError, check_ranges, run_command, usable_cores
from common.data import read_episodes
from common.data.vla import CAMERAS, Chunks, Corpus, read_corpora
from common.libero import Task, load_task, make_env
from common.libero.assets import assets_like
from common.libero.renderers import make_renderer
from common.metrics import consistency, smoothness
from common.runs import Progress, choose_device, versions, write_json
from common.vla_model import VLA, load_model

BEYOND = 0.02  # m outside of where things are ever put
HAND = 0.05, 0.10  # m that the hand is elsewhere
STILL = 0.01  # m that nothing else may have moved
KINDS = ("objects", "hand")


@dataclasses.dataclass
class Args:
    """Measure what may explain a VLA's success, and its success from perturbed starts."""

    evaluated: tyro.conf.Positional[list[Path]]
    """runs of vla_finetune.py, all of one VLA: their models are tried from perturbed starts, on the tasks that they were evaluated on"""
    json: Path
    """what is measured"""
    trials: Annotated[int, Range(0, 50)] = 25
    """from each kind of perturbed starts, a task"""
    num_envs: Annotated[int, Range(1)] = 16
    """parallel environments"""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: those that the model was trained on)"""
    pretrained: Path | None = None
    """run of vla_pretrain.py whose actions are compared with corpora's"""
    corpora: Path | None = None
    """folder of corpora"""
    source: str = ""
    """whose corpus it was trained on"""
    key: str = ""
    """filter key of its episodes"""
    sources: list[str] = dataclasses.field(default_factory=list)
    """whose held-out episodes are predicted"""
    tasks: list[str] = dataclasses.field(default_factory=list)
    """tasks of the corpora"""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.pretrained and not (self.corpora and self.source and self.key and self.tasks):
            raise UserError("--pretrained needs --corpora, --source, --key and --tasks")

    def file(self, source: str, task: str) -> Path:
        return self.corpora / source / f"{task}_demo.hdf5"


# ---------------------------------------------------------------------------------------------- the corpus


def action_error(model: VLA, corpora: list[Corpus], samples: int = 512) -> float:
    """Mean |a - a'| over the seven numbers of the actions of chunks, of at most so many samples spread over the corpora."""
    chunks, shape = Chunks(corpora, model.config["chunk"]), (model.config["chunk"], 7)
    tokens, generator = model.text.tokenize(chunks.instructions).to(model.device), torch.Generator().manual_seed(0)
    rows, error, count = np.unique(np.linspace(0, len(chunks) - 1, samples).astype(int)), 0.0, 0.0
    for part in np.array_split(rows, -(-len(rows) // 64)):
        batch = {name: value.to(model.device) for name, value in chunks[part].items()}
        noise = torch.randn(len(part), *shape, generator=generator).to(model.device)
        found = model.act(batch["images"], batch["proprio"], tokens, batch["instruction"], noise)
        error += float(((found - batch["actions"]).abs().mean(-1) * batch["mask"]).sum())
        count += float(batch["mask"].sum())
    return error / count


def describe(paths: list[Path], key: str) -> dict[str, float]:
    """Of a task's part of a corpus, on average over tasks."""
    rows = []
    for path in paths:
        episodes = read_episodes(path, filter_key=key)
        hands, ways = [e.proprio["ee_pos"] for e in episodes], [e.attrs["strategy"] or e.attrs["pattern"] for e in episodes]
        row = {"episodes": len(episodes), "steps": sum(e.length for e in episodes), "ways": len(set(ways))}
        row["mean_jerk"] = smoothness(hands, [e.actions for e in episodes])["mean_jerk"]
        rows.append(row | {"consistency": consistency(hands, ways)})
    values = {name: [row[name] for row in rows if np.isfinite(row[name])] for name in rows[0]}
    return {name: float(np.mean(v)) if v else float("nan") for name, v in values.items()}


def positions(task: Task, qpos: np.ndarray) -> np.ndarray:
    """(n, 3 + 3 * things) metres: where the hand and the movable things of interest are."""
    data, hands = mujoco.MjData(task.model), []
    for row in qpos:
        data.qpos[:] = row
        mujoco.mj_kinematics(task.model, data)
        hands.append(data.site_xpos[task.eef_site].copy())
    return np.concatenate([hands, *(qpos[:, a : a + 3] for a in things(task, of_interest=True))], axis=1)


def things(task: Task, of_interest: bool = False) -> list[int]:
    """The addresses in qpos of movable things' positions."""
    chosen = [o for o in task.objects.values() if o.joint_qpos is not None and (not of_interest or o.name in task.of_interest)]
    return [o.joint_qpos for o in chosen]


def coverage(task: Task, corpus: Path, key: str, met: list[np.ndarray]) -> dict[str, float]:
    """Distance to the nearest state in the corpus: of the first states of trials `met`, each (n, nq), to first states, and of all."""
    paths = [positions(task, e.states[:, 1 : 1 + task.model.nq]) for e in read_episodes(corpus, task, filter_key=key)]
    trials = [positions(task, qpos.astype(float)) for qpos in met]
    starts = cKDTree([x[0] for x in paths]).query([x[0] for x in trials])[0].mean()
    return {"starts": float(starts), "met": float(cKDTree(np.concatenate(paths)).query(np.concatenate(trials))[0].mean())}


# ---------------------------------------------------------------------------------------------- perturbed starts


def settled(task: Task, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where things (n, things, 3) and the hand (n, 3) are after an evaluation's ten no-ops."""
    there = dataclasses.replace(task, init_states=states)
    with contextlib.closing(make_env(there, len(states), settle_steps=10, autoreset_mode=AutoresetMode.DISABLED)) as env:
        env.reset(options={"init_state": np.arange(len(states))})
        qpos = env.get_state()[:, 1 : 1 + task.model.nq]
        return np.stack([qpos[:, a : a + 3] for a in things(task)], axis=1), env.proprioception()["ee_pos"]


def shift_for(task: Task, state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(2,) metres: in a random direction, the least by which each movable thing of interest comes to lie `BEYOND` where it is ever put."""
    angle = rng.uniform(0, 2 * np.pi)
    direction = np.array([np.cos(angle), np.sin(angle)])
    columns = np.array([[1 + a, 2 + a] for a in things(task, of_interest=True)])
    known = np.concatenate([task.train_states, task.init_states])[:, columns]
    low, high = known.min(0), known.max(0)
    for length in np.arange(0, 0.2, 0.005):
        p = state[columns] + length * direction
        if np.linalg.norm(np.maximum(np.maximum(low - p, p - high), 0), axis=1).min() >= BEYOND:
            break
    return length * direction


def perturbed_starts(task: Task, kind: str, count: int, tries: int = 20) -> np.ndarray:
    """(at most count, 1 + nq + nv) official init states, changed as the module's docstring says; the same at each call."""
    rng, official = np.random.default_rng([KINDS.index(kind), task.index]), task.init_states
    objects, hand = settled(task, official)
    found: dict[int, np.ndarray] = {}
    for _ in range(tries):
        todo = [i for i in range(len(official)) if i not in found][: max(0, count - len(found))]
        if not todo:
            break
        new, moved = official[todo].copy(), np.zeros((len(todo), 3))
        for row, state in enumerate(new):
            if kind == "hand":
                state[1 + np.array(task.arm_qpos)] += rng.normal(0, 0.15, len(task.arm_qpos))
            else:
                moved[row, :2] = shift_for(task, state, rng)
                for a in things(task):
                    state[1 + a : 3 + a] += moved[row, :2]
        objects_now, hand_now = settled(task, new)
        off = np.linalg.norm(objects_now - objects[todo] - moved[:, None], axis=-1).max(axis=1, initial=0.0)
        away = np.linalg.norm(hand_now - hand[todo], axis=1)
        good = (off < STILL) & ((away >= HAND[0]) & (away <= HAND[1]) if kind == "hand" else away < STILL)
        found |= {i: state for i, state, g in zip(todo, new, good, strict=True) if g}
    return np.array([found[i] for i in sorted(found)]).reshape(-1, official.shape[1])


def try_starts(args: Args, run: Path, device: str, rows: list[dict], save, progress: Progress) -> None:
    """Evaluate a run's model from perturbed starts of the tasks that it was evaluated on; `rows` grows, and is saved after each."""
    model, meta, renderer, replan, seed = evaluated_model(run)
    model.to(device)
    for name in [row["task"] for row in json.loads((run / "results.json").read_text())["tasks"]]:
        task = load_task(name, assets_like(meta["assets"], args.assets))
        vla_finetune.check_match(meta, task, renderer, False, progress.say)
        camera = make_renderer(task.model, tuple(CAMERAS.values()), model.config["image_size"], model.config["image_size"], renderer)
        for kind in KINDS:
            known = any(row["task"] == name and row["starts"] == kind for row in rows)
            if known or (kind == "objects" and not things(task, of_interest=True)):
                continue
            states = perturbed_starts(task, kind, args.trials)
            if not len(states):
                progress.say(f"{name}: no such starts, {kind}")
                continue
            there, policy = dataclasses.replace(task, init_states=states), vla_finetune.ModelPolicy(model, task.language, seed)
            progress.stage(f"{kind}: {task.id}", len(states))
            tick = lambda trial: progress.update(1)  # noqa: E731
            trials = vla_finetune.evaluate(there, policy, camera, len(states), args.num_envs, replan, tick, device=device)
            rows.append(vla_finetune.summarise(task, trials) | {"starts": kind})
            save()


def evaluated_model(run: Path) -> tuple[VLA, dict, str, int, int]:
    """The model that a run of vla_finetune.py evaluated, what was saved with it, the renderer, how often it was asked, and the seed."""
    try:
        config, results = (json.loads((run / name).read_text()) for name in ("config.json", "results.json"))
        renderer, replan = results["renderer"], results["protocol"]["replan"]
        source = run if (run / "model.pt").exists() else config["args"]["checkpoint"]  # --eval-only keeps none of its own
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run} is no finished run of vla_finetune.py with a model") from error
    return *load_model(source), renderer, replan, config["args"]["seed"]


# ---------------------------------------------------------------------------------------------- the whole job


def main() -> None:
    args, began = tyro.cli(Args), time.monotonic()
    device, progress = choose_device("auto", False), Progress()
    torch.set_num_threads(usable_cores())
    found = json.loads(args.json.read_text()) if args.json.exists() else {"starts": [], "seconds": 0.0}
    before = found["seconds"]

    def save(done: bool = False) -> None:
        write_json(args.json, found | {"seconds": before + time.monotonic() - began, "versions": versions(), "done": done})

    if args.pretrained and set(args.sources) - set(found.get("action_error", {})):
        model, meta = load_model(args.pretrained)
        model.to(device).eval()
        held_out = {s: read_corpora([args.file(s, task) for task in args.tasks], filter_key="held_out") for s in args.sources}
        found["action_error"] = {s: action_error(model, corpora) for s, corpora in held_out.items()}
        found["corpus"] = describe([args.file(args.source, task) for task in args.tasks], args.key)
        states = {task: path for run in args.evaluated for task in args.tasks if (path := states_of(run, task)).exists()}
        rows = []
        for name, path in states.items():
            task = load_task(name, assets_like(meta["assets"], args.assets))
            with np.load(path) as met:
                rows.append(coverage(task, args.file(args.source, name), args.key, list(met.values())))
        found["coverage"] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else None
        save()
    for run in args.evaluated:
        try_starts(args, run, device, found["starts"], save, progress)
    save(done=True)
    progress.close()


def states_of(run: Path, task: str) -> Path:
    return run / "states" / f"{task.replace('/', '-')}.npz"


if __name__ == "__main__":
    run_command(main)
