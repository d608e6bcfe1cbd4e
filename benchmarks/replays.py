"""The corpora of a sweep as one small file, and back.

    python -m benchmarks.replays runs/sweep-gaussian_ppo --out gaussian_ppo.npz     # a folder is packed
    python -m benchmarks.replays gaussian_ppo.npz --out runs/replayed               # and a file unpacked, to a folder like the sweep's

Kept is of each episode in which training state it began, and its actions: 28 bytes a step, a fiftieth of what the corpus has. Exact
physics make the rest again: to the bit on a machine of the same kind, which a digest of each episode's states tells. On another one
rounding may differ; then what still succeeds is kept. `vla_pretrain.py --data` and `benchmarks.vla_compare --corpora` take the folder
as they take the sweep's.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

from common.cli import Count, UserError, atomic_path, check_ranges, run_command
from common.data import Episode, Recorder, read_attrs, read_episodes, write_episodes
from common.data.layout import DATA_ATTRS
from common.libero import Task, load_task, make_env
from common.libero.step import NO_OP
from common.runs import plain_json, write_json
from common.sweep import report

SETTLE = 10  # no-ops before an episode, as `make_env` has them
NUM_ENVS = 16


@dataclass
class Args:
    """Pack the corpora of a sweep into one small file, or make them again from it."""

    source: tyro.conf.Positional[Path]
    """a sweep's folder, to be packed, or a file that this command wrote, to be unpacked"""
    out: Path
    """the file, or the folder, to be written"""
    episodes: Count | None = None
    """pack at most so many of each corpus, of each of its patterns about equally many (default: all)"""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: $LIBERO_ASSETS, else LIBERO's own, else stand-ins)"""


def begin(env, states: np.ndarray) -> None:
    """Start as training does in the first len(states) environments: from a training state, things come to rest."""
    some = np.arange(env.num_envs) < len(states)
    env.set_state(states, envs=np.flatnonzero(some))
    for _ in range(SETTLE):
        env.step(np.tile(NO_OP, (env.num_envs, 1)), some)


def environment(task: Task):
    return make_env(task, NUM_ENVS, autoreset_mode=AutoresetMode.DISABLED, max_steps=task.max_steps + SETTLE + 1)


def starts_of(task: Task, episodes: Sequence[Episode]) -> np.ndarray:
    """(n,) the training states that the episodes began in. UserError if one began elsewhere, as human demonstrations do."""
    env, at_rest = environment(task), {}
    for first in range(0, len(task.train_states), NUM_ENVS):
        begin(env, states := task.train_states[first : first + NUM_ENVS])
        at_rest |= {state.tobytes(): first + i for i, state in enumerate(env.get_state()[: len(states)])}
    env.close()
    starts = [at_rest.get(e.states[0].tobytes(), -1) for e in episodes]
    if -1 in starts:
        raise UserError(f"{task.id}: episode {starts.index(-1)} began in no training state as it is on this machine: it can't be replayed")
    return np.array(starts)


def digest(episode: Episode) -> int:
    """64 bits that tell an episode's states."""
    return int.from_bytes(hashlib.sha256(np.vstack([episode.states, episode.final_state]).tobytes()).digest()[:8], "little")


def replay(task: Task, starts: np.ndarray, actions: Sequence[np.ndarray]) -> list[Episode]:
    """Episodes that begin in these training states and take these actions, each (T, 7), to their end or to success."""
    env, episodes = environment(task), []
    for first in range(0, len(starts), NUM_ENVS):
        mine = actions[first : first + NUM_ENVS]
        begin(env, task.train_states[starts[first : first + NUM_ENVS]])
        recorder, found = Recorder(env), {}
        lengths = np.array([*map(len, mine), *[0] * (NUM_ENVS - len(mine))])
        for t in range(lengths.max()):
            active = (t < lengths) & ~np.isin(np.arange(NUM_ENVS), list(found))
            step = np.array([mine[i][t] if active[i] else NO_OP for i in range(NUM_ENVS)])
            recorder.before()
            _, _, terminated, _, _ = env.step(step, active)
            found |= dict(recorder.after(step, terminated & active, ~terminated & (t == lengths - 1), active))
        episodes += [found[i] for i in range(len(mine))]
    env.close()
    return episodes


def evenly(episodes: Sequence[Episode], most: int | None) -> list[Episode]:
    """At most so many of these, in their order: of each pattern the first ones, and of each about equally many."""
    seen: Counter[int] = Counter()
    ranks = []  # among those of the same pattern
    for episode in episodes:
        ranks.append(seen[pattern := episode.attrs.get("pattern", -1)])
        seen[pattern] += 1
    return [episodes[i] for i in sorted(np.argsort(ranks, kind="stable")[:most])]


def pack(folder: Path, out: Path, assets: str | None, most: int | None = None) -> None:
    settings = report.read(folder)
    rows = [row for row in settings.get("runs", []) if row["corpus"]]
    if not rows:
        raise UserError(f"{folder} is no sweep that has a corpus")
    arrays: dict[str, np.ndarray] = {}
    for k, row in enumerate(tqdm(rows, desc="corpora")):
        task, path = load_task(row["task"], assets), folder / row["corpus"]
        episodes = evenly(read_episodes(path, task), most)
        actions = np.concatenate([e.actions for e in episodes])
        arrays[f"{k}/start"] = starts_of(task, episodes).astype(np.int16)
        arrays[f"{k}/length"] = np.array([e.length for e in episodes], np.int16)
        arrays[f"{k}/digest"] = np.array([digest(e) for e in episodes], np.uint64)
        arrays[f"{k}/actions"] = small if ((small := actions.astype(np.float32)) == actions).all() else actions
        row["attrs"] = {name: v for name, v in read_attrs(path).items() if name not in (*DATA_ATTRS, "tag", "task")}
        row["episodes"] = [{name: v for name, v in e.attrs.items() if v != ""} for e in episodes]  # what a reader fills in is ""
    about = plain_json({"script": settings["script"], "flags": settings["flags"], "runs": rows})
    with atomic_path(out) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
    print(f"{sum(len(row['episodes']) for row in rows)} episodes of {len(rows)} corpora, {out.stat().st_size / 1e6:.2f} MB: {out}")


def read_packed(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `pack` wrote: script, flags and runs; and arrays by name."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        return json.loads(arrays.pop("about").tobytes()), arrays
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is neither a sweep's folder nor a file that this command wrote: {error}") from error


def unpack(path: Path, out: Path, assets: str | None) -> None:
    about, arrays = read_packed(path)
    if (out / "sweep.json").exists() and "replayed" not in report.read(out):
        raise UserError(f"{out} is a sweep's folder; choose another --out")
    for k, row in enumerate(tqdm(about["runs"], desc="corpora")):
        task, corpus = load_task(row["task"], assets), out / row["corpus"]
        if task.assets != row["assets"]:
            raise UserError(f"assets mismatch: {path} is of {row['assets']}, and here are {task.assets}; give --assets")
        attrs, of_episodes = row.pop("attrs"), row.pop("episodes")
        if not corpus.exists():
            actions = np.split(arrays[f"{k}/actions"].astype(np.float64), np.cumsum(arrays[f"{k}/length"])[:-1])
            episodes = replay(task, arrays[f"{k}/start"], actions)
            same = sum(digest(e) == int(d) for e, d in zip(episodes, arrays[f"{k}/digest"], strict=True))
            for episode, own in zip(episodes, of_episodes, strict=True):
                episode.attrs |= own
            done = [e for e in episodes if e.success]
            tqdm.write(f"{row['task']}: {len(done)} of {len(episodes)} episodes succeed, {same} are as they were to the bit")
            corpus.parent.mkdir(parents=True, exist_ok=True)
            write_episodes(corpus, done, task, attrs)
        row |= {"corpus_episodes": len(read_episodes(corpus, task)), "corpus_bytes": corpus.stat().st_size}
    jobs = [[row["task"], row["seed"]] for row in about["runs"]]
    write_json(out / "corpora.json", [row["corpus"] for row in about["runs"]])
    write_json(out / "sweep.json", about | {"jobs": jobs, "replayed": str(path)})


def main() -> None:
    args = tyro.cli(Args)
    check_ranges(args)
    if args.source.is_dir():
        pack(args.source, args.out, args.assets, args.episodes)
    elif args.episodes is not None:
        raise UserError(f"--episodes is how many to pack, and {args.source} is no folder")
    else:
        unpack(args.source, args.out, args.assets)


if __name__ == "__main__":
    run_command(main)
