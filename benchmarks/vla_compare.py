"""What a VLA learns from corpora of different sources: the papers' tables (arXiv 2509.19752; arXiv 2511.19528, Table 2), and why.

    python -m benchmarks.vla_compare --corpora runs/sweep-gaussian_ppo runs/sweep-dlr_discover     # small: a night on 2 cores
    python -m benchmarks.vla_compare --protocol transfer --corpora runs/sweep-gaussian_ppo         # small: 30 tasks, half a night
    python -m benchmarks.vla_compare --preset paper                                                # all of LIBERO, for a GPU node

Sources are scripted demonstrations, gaussian_ppo, diffusion_ppo and dlr_discover (and human demonstrations, where they are on disk). A VLA
is trained on equally many episodes, or steps, of each, and by protocol
  in-domain  is evaluated on the same tasks (arXiv 2509.19752);
  transfer   is fine-tuned on demonstrations of other tasks for under 3 epochs and evaluated on these (arXiv 2511.19528).
Gaussian RL and DLR are also trained on at several sizes, and DLR on 1 to 8 patterns at one size; in domain also demonstrations in one way
and in eight, each with action noise and without. `benchmarks.vla_why` measures of each VLA what may explain its success. Everything is a
command that could be typed by hand, and is printed. What is finished is kept, what was stopped is resumed: stop it at any time and start it
again, also with more --seeds or --corpora. Several machines, or sittings of which only the report was kept, add up: --earlier takes what is
in their PROTOCOL.json, and only the rest is done.

Writes OUT/PROTOCOL.md and PROTOCOL.json, PROTOCOL.png (success over size and patterns) and PROTOCOL-why.png, after each VLA.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import tyro

from benchmarks import vla_corpora, vla_report
from benchmarks.vla_corpora import CONTROL, DEMONSTRATED, HELD_OUT, SOURCES, Cell, Entry
from common.cli import UserError, lock, remove_leftovers, run_command
from common.libero.tasks import find_human_demos
from common.runs import plain_json
from common.suites import expand, find_task
from common.sweep.jobs import Machine

PROTOCOLS = ("in-domain", "transfer")
COMPARED = ("preset", "protocol", "head", "tasks", "settings", "assets", "downstream")  # in a report: what its rows depend on, but seeds
ESTIMATES = ("minutes", "samples_per_second", "trial_seconds", "measured")  # of a preset: how long it takes, and not what is done
STEPS = 100  # of an episode, about, to tell the time beforehand
WAYS = 8  # at most, of the scripted demonstrator
ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Preset:
    tasks: tuple[str, ...]  # tasks and suites that every source has corpora of
    downstream: tuple[tuple[str, ...], ...]  # of transfer, groups of tasks and suites; a VLA is fine-tuned on each group
    episodes: tuple[int, ...]  # of each task; the last is that of the tables
    patterns: tuple[int, ...]  # DLR's, of each task (none: no such rows),
    pattern_episodes: int  # in so many episodes
    downstream_episodes: int  # demonstrations of each downstream task
    starts: int  # trials of each task from each kind of perturbed starts
    image_size: int
    size: str  # of the model
    steps: int  # of pretraining, in batches of
    batch_size: int
    pretraining: list[str]  # more flags of vla_pretrain.py
    finetuning: list[str]  # and of vla_finetune.py
    rl: dict[str, list[str]]  # flags of the RL scripts, where no sweep is given
    minutes: dict[str, float]  # of a worker for a corpus, by source, and for its pictures
    samples_per_second: float  # in training, of each worker while all work
    trial_seconds: float  # of an evaluation
    measured: str  # on what

    @property
    def needed(self) -> int:
        """Episodes of each corpus."""
        return self.episodes[-1] + HELD_OUT


SMALL = Preset(
    # bowl on the plate, bowl in the drawer, open the top drawer, turn on the stove, close the bottom drawer, close the microwave
    tasks=tuple(f"libero_90/{i}" for i in (9, 2, 7, 20, 22, 33)),
    downstream=(),
    episodes=(5, 10, 20, 40),
    patterns=(1, 2, 4, 8),
    pattern_episodes=16,
    downstream_episodes=20,
    starts=25,
    image_size=64,
    size="tiny",
    steps=3000,
    batch_size=64,
    pretraining=["--warmup", "100", "--val-fraction", "0", "--num-workers", "0"],
    finetuning=["--val-fraction", "0", "--num-workers", "0", "--videos", "0"],
    rl={
        "gaussian_ppo": ["--corpus-episodes", "44", "--no-videos"],
        "diffusion_ppo": ["--corpus-episodes", "44", "--no-videos"],
        "dlr_discover": ["--corpus-episodes", "20", "--no-videos"],
    },
    minutes={"demonstrations": 1, CONTROL: 1, "human": 0, "gaussian_ppo": 5, "diffusion_ppo": 10, "dlr_discover": 7, "pictures": 2},
    samples_per_second=360,
    trial_seconds=0.9,
    measured="on a core of an EPYC with AVX512-BF16",
)
PAPER = Preset(
    tasks=("libero_90", "libero_spatial", "libero_object", "libero_goal", "libero_10"),
    downstream=(),
    episodes=(6, 12, 25, 50),
    patterns=(1, 2, 4, 8),
    pattern_episodes=50,
    downstream_episodes=50,
    starts=50,
    image_size=128,
    size="base",
    steps=20_000,
    batch_size=512,
    pretraining=["--compile", "--val-fraction", "0", "--num-workers", "8"],
    finetuning=["--batch-size", "128", "--val-fraction", "0", "--num-workers", "8", "--num-envs", "50", "--videos", "0"],
    rl={
        "gaussian_ppo": ["--corpus-episodes", "54", "--no-videos"],
        "diffusion_ppo": ["--corpus-episodes", "54", "--no-videos"],
        "dlr_discover": ["--corpus-episodes", "54", "--no-videos"],
    },
    minutes={"demonstrations": 1, CONTROL: 1, "human": 0, "gaussian_ppo": 5, "diffusion_ppo": 10, "dlr_discover": 8, "pictures": 1},
    samples_per_second=3000,
    trial_seconds=0.5,
    measured="on a GPU with 16 cores, assumed and not measured",
)
PRESETS = {
    "small": {
        "in-domain": SMALL,
        "transfer": dataclasses.replace(
            SMALL,
            tasks=tuple(f"libero_90/{i}" for i in range(0, 90, 3)),
            # bowl between plate and ramekin; soup into the basket; middle drawer, bowl on the plate; stove on and moka pot on it
            downstream=(("libero_spatial/0",), ("libero_object/0",), ("libero_goal/0", "libero_goal/8"), ("libero_10/2",)),
            episodes=(16,),  # of the 20 that a sweep's corpus has
            patterns=(),
        ),
    },
    "paper": {
        "in-domain": PAPER,
        "transfer": dataclasses.replace(
            PAPER, tasks=("libero_90",), downstream=(("libero_spatial",), ("libero_object",), ("libero_goal",), ("libero_10",))
        ),
    },
}


@dataclasses.dataclass
class Args:
    """Train VLAs on equally large corpora of different sources, and compare what they can do."""

    preset: str = "small"
    """small (2 cores, a night for each protocol) or paper (130 tasks, base model, 128 x 128; a GPU node)"""
    protocol: str = "in-domain"
    """in-domain (evaluated on the tasks of the corpora) or transfer (fine-tuned on others)"""
    corpora: list[Path] = dataclasses.field(default_factory=list)
    """folders of sweeps (python -m common.sweep), of a source one or more; a source without one is swept here"""
    sources: list[str] = dataclasses.field(default_factory=lambda: [s for s in SOURCES if s != "human"])
    """which of demonstrations, human, gaussian_ppo, diffusion_ppo and dlr_discover"""
    tasks: list[str] = dataclasses.field(default_factory=list)
    """tasks and suites of the corpora (default: the preset's)"""
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3])
    """of the VLA, and of which episodes it is trained on"""
    head: str = "flow"
    """action head of the VLA: flow or tokens"""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: $LIBERO_ASSETS, else LIBERO's own, else stand-ins)"""
    earlier: list[Path] = dataclasses.field(default_factory=list)
    """PROTOCOL.json of this comparison from elsewhere: the VLAs in them are not trained here again"""
    out: Path = Path("vla_compare")
    """folder of everything: corpora, runs, tables and figures; protocols may share one"""


# ---------------------------------------------------------------------------------------------- commands

WORKER = threading.local()  # .env: the cores and the GPU of this thread's commands; of the main thread, all
CHILDREN: set[subprocess.Popen] = set()


def call(*words: str | Path, log: Path | None = None) -> bool:
    """Run a command of this repository, its output in `log`; whether it succeeded."""
    words = [str(w) for w in words]
    print("python " + " ".join(words), flush=True)
    with open(log or os.devnull, "ab") as file:
        output = {"stdout": file, "stderr": subprocess.STDOUT} if log else {}
        child = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=os.environ | getattr(WORKER, "env", {}), **output)
    CHILDREN.add(child)
    try:
        return child.wait() == 0
    finally:
        CHILDREN.discard(child)


def make_pool(machine: Machine) -> ThreadPoolExecutor:
    """A thread for each of a sweep's workers: one a GPU, or as many as cores and memory carry."""

    def begin() -> None:
        gpu = machine.slots.get()
        cores = {"RL_DATA_ENGINE_CORES": str(machine.cores), "OMP_NUM_THREADS": str(machine.cores)}
        WORKER.env = cores | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})

    return ThreadPoolExecutor(machine.workers, initializer=begin)


def run_script(script: str, folder: Path, flags: list) -> Path:
    """The finished run of a script in `folder`: made, resumed or found there. UserError if it failed."""
    if not list(folder.glob("*/summary.json")):
        folder.mkdir(parents=True, exist_ok=True)
        started, log = sorted(folder.glob("*/checkpoint.pt")), folder / "log.txt"
        if not call(f"{script}.py", *(["--resume", started[-1].parent] if started else [*flags, "--run-folder", folder]), log=log):
            raise UserError(f"{script}.py failed: {last_line(log)} ({log})")
    return next(path.parent for path in folder.glob("*/summary.json"))


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "no output")


# ---------------------------------------------------------------------------------------------- corpora


def sweep(args: Args, preset: Preset, source: str, tasks: list[str]) -> Path:
    """The folder of a sweep of a source's script on `tasks`, made here; what fails is in its report."""
    folder = args.out.absolute() / "sweeps" / source
    assets = ["--assets", args.assets] if args.assets else []
    call("-m", "common.sweep", f"{source}.py", "--tasks", *tasks, "--out", folder, "--", *preset.rl[source], *assets)
    return folder


def demonstrations(args: Args, folder: str, task: str, episodes: int, noise: float, seed: int) -> Path:
    """A file of scripted demonstrations, which may not be there if the demonstrator can't do the task."""
    where, assets = args.out.absolute() / folder / str(episodes), ["--assets", args.assets] if args.assets else []
    suite, name = task.split("/")
    where.mkdir(parents=True, exist_ok=True)
    how = ["--episodes", str(episodes), "--noise", str(noise), "--seed", str(seed), "--out", where, *assets]
    call("-m", "common.demos", "--task", task, *how, log=where / f"{suite}-{name}.log")
    return where / suite / f"{name}_demo.hdf5"


def corpora_folder(args: Args, preset: Preset) -> Path:
    """Protocols that need equally many episodes share their corpora."""
    return args.out.absolute() / "corpora" / str(preset.needed)


def make_corpus(args: Args, preset: Preset, source: str, task: str, swept: Path | None) -> Path | None:
    """OUT/corpora/EPISODES/SOURCE/SUITE/TASK_demo.hdf5, with pictures, the held-out ones masked; None if the source has no corpus.

    `swept`: the corpus that a sweep has of the task. If it is too small, a copy of its run goes on to a larger one.
    """
    path, needed = corpora_folder(args, preset) / source / f"{task}_demo.hdf5", preset.needed
    if path.exists():
        return path
    if source in ("demonstrations", CONTROL):
        each_way = preset.pattern_episodes + HELD_OUT if preset.patterns else 0
        episodes = max(3 * needed, WAYS * each_way)  # transfer leaves out some of the ways
        origin = demonstrations(args, source, task, episodes, 0.0 if source == CONTROL else 0.1, 0)
    elif source == "human":
        origin = find_human_demos(find_task(task))
    elif (origin := swept) and len(vla_corpora.entries(swept)) < needed:
        folder = args.out.absolute() / "larger" / source / task
        vla_corpora.copy_run(swept.parent, folder / swept.parent.name)
        more = ["--resume", folder / swept.parent.name, "--corpus-episodes", str(needed), "--no-videos", "--allow-mismatch"]
        finished = folder / swept.parent.name / "summary.json"
        if finished.exists() or call(f"{source}.py", *more, log=folder / "log.txt"):
            origin = folder / swept.parent.name / "corpus.hdf5"
    if origin is None or not origin.exists():
        return None
    vla_corpora.copy_corpus(origin, path, lambda *words: call(*words, log=args.out / "render.log"), preset.image_size, args.assets)
    return path


def make_downstream(args: Args, preset: Preset, task: str) -> Path | None:
    """Demonstrations to fine-tune on, masked "downstream": human ones, or scripted in ways, noise and starts that no corpus has."""
    path = args.out.absolute() / "downstream" / f"{task}_demo.hdf5"
    if not path.exists():
        human = find_human_demos(find_task(task))
        origin = human or demonstrations(args, "demonstrations-downstream", task, 5 * preset.downstream_episodes, 0.05, 1000)
        if not origin.exists():
            return None
        found = [e for e in vla_corpora.entries(origin) if human or e.downstream]
        if len(found) < preset.downstream_episodes:
            return None
        vla_corpora.copy_corpus(origin, path, lambda *words: call(*words, log=args.out / "render.log"), preset.image_size, args.assets)
        vla_corpora.write_masks(path, {"downstream": [e.name for e in found[: preset.downstream_episodes]]})
    return path


def choose_tasks(preset: Preset, protocol: str, corpora: dict[str, dict[str, Path | None]], cells: list[Cell]):
    """Source -> task -> the episodes to train on, for the tasks of which every source has enough; and what is left out, and why."""
    pools, left_out = {source: {} for source in corpora}, []
    for task in next(iter(corpora.values())):
        found = {s: vla_corpora.pool(paths[task], s, protocol) if paths[task] else [] for s, paths in corpora.items()}
        short = [f"{s} has {len(p)} of {preset.episodes[-1]} episodes" for s, p in found.items() if len(p) < preset.episodes[-1]]
        for source in dict.fromkeys(c.source for c in cells if c.kind == "patterns"):
            ways = [e.way for e in found[source]]
            if max(map(ways.count, ways), default=0) < preset.pattern_episodes:
                short.append(f"{source} has no way of {preset.pattern_episodes} episodes")
        if short:
            left_out.append(f"{task}: {', '.join(short)}")
            continue
        for source in corpora:
            pools[source][task] = found[source]
    if not pools[next(iter(corpora))]:
        raise UserError(f"no task has enough episodes of every source: {'; '.join(left_out)}")
    return pools, left_out


def choose_episodes(preset: Preset, pools: dict[str, dict[str, list[Entry]]], cell: Cell, seed: int) -> dict[str, list[Entry]]:
    """Of each task the episodes that a VLA is trained on. Of kind steps, as many steps as the shortest of the sources' equally many
    episodes have."""
    chosen = {}
    for task in pools[cell.source]:
        compared = [s for s in pools if s != CONTROL]
        whole = [vla_corpora.choose(pools[s][task], Cell(s, "episodes", preset.episodes[-1]), seed) for s in compared]
        steps = min(sum(e.steps for e in episodes) for episodes in whole)
        chosen[task] = vla_corpora.choose(pools[cell.source][task], cell, seed, steps, preset.pattern_episodes)
    return chosen


# ---------------------------------------------------------------------------------------------- cells


def list_cells(preset: Preset, protocol: str, sources: list[str]) -> list[Cell]:
    """The rows of all tables, those that matter most first."""
    cells = [Cell("none", "none", 0)] if protocol == "transfer" else []
    cells += [Cell(s, kind, preset.episodes[-1]) for kind in ("episodes", "steps") for s in sources]
    cells += [Cell("dlr_discover", "patterns", k) for k in preset.patterns if "dlr_discover" in sources]
    if protocol == "in-domain" and "demonstrations" in sources:
        few, many = preset.patterns[0], preset.patterns[-1]
        cells += [Cell(s, "patterns", k) for s in ("demonstrations", CONTROL) for k in (few, many)]
        cells += [Cell(CONTROL, "episodes", preset.episodes[-1])]
    return cells + [Cell(s, "episodes", n) for s in ("gaussian_ppo", "dlr_discover") if s in sources for n in preset.episodes[:-1]]


def corpora_of(cells: list[Cell]) -> list[str]:
    """The sources that rows are trained on."""
    return list(dict.fromkeys(cell.source for cell in cells if cell.source != "none"))


def digest(*content) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:8]


@dataclasses.dataclass(frozen=True)
class Work:
    """A VLA to be trained and evaluated. Its folder is named after all that it depends on: other episodes or flags are another one, and
    rows of the same episodes share one."""

    cell: Cell
    seed: int
    folder: Path
    place: str  # of what is evaluated, in the folder
    tasks: tuple[str, ...]
    downstream: tuple[tuple[Path, ...], ...]
    sources: tuple[str, ...]  # whose held-out episodes it predicts

    @property
    def key(self) -> str:
        return self.folder.name

    def result(self) -> dict | None:
        """What came out, once all of it is there: rows of results.json, what vla_why measured, and hours of a worker."""
        why, runs = self.folder / self.place / "why.json", sorted((self.folder / self.place).glob("*/*/results.json"))
        if not why.exists() or not (found := json.loads(why.read_text()))["done"]:
            return None
        if self.cell.source != "none" and set(self.sources) - set(found["action_error"]):  # there was one less
            return None
        rows = [row for run in runs for row in json.loads(run.read_text())["tasks"]]
        finished = [*self.folder.glob("pretrain/*/summary.json"), *(run.with_name("summary.json") for run in runs)]
        seconds = sum(json.loads(path.read_text())["wall_seconds"] for path in finished) + found["seconds"]
        return found | {"tasks": rows, "hours": seconds / 3600, "folder": self.key}


def do(args: Args, preset: Preset, work: Work) -> None:
    """Train, evaluate and explain a VLA. UserError if a command failed."""
    folder = corpora_folder(args, preset)
    corpora = [folder / work.cell.source / f"{task}_demo.hdf5" for task in work.tasks]
    shape, assets = ["--head", args.head, "--seed", str(work.seed)], ["--assets", args.assets] if args.assets else []
    start, why = ["--size", preset.size, *shape], ["--trials", str(preset.starts), *assets]
    if work.cell.source != "none":
        flags = ["--steps", str(preset.steps), "--batch-size", str(preset.batch_size), *preset.pretraining]
        run = run_script("vla_pretrain", work.folder / "pretrain", ["--data", *corpora, "--filter-key", work.key, *start, *flags])
        start = ["--checkpoint", run, *shape]
        why += ["--pretrained", run, "--corpora", folder, "--source", work.cell.source, "--key", work.key]
        why += ["--sources", *work.sources, "--tasks", *work.tasks]
    place, runs = work.folder / work.place, []
    if args.protocol == "in-domain":
        flags = [*start, "--eval-only", "--tasks", *work.tasks, "--save-states", *preset.finetuning, *assets]
        runs = [run_script("vla_finetune", place / "0", flags)]
    for number, data in enumerate(work.downstream):
        flags = [*start, "--data", *data, "--filter-key", "downstream", *preset.finetuning, *assets]
        runs.append(run_script("vla_finetune", place / str(number), flags))
    if not call("-m", "benchmarks.vla_why", *runs, *why, "--json", place / "why.json", log=place / "log.txt"):
        raise UserError(f"benchmarks.vla_why failed: {last_line(place / 'log.txt')} ({place / 'log.txt'})")


def read_earlier(paths: list[Path], about: dict, sources: list[str]) -> dict[tuple[Cell, int], dict]:
    """What came out of the VLAs that were done elsewhere, by row and seed. UserError if it was not of what `about` says."""
    found = {}
    for path in paths:
        try:
            record = json.loads(path.read_text())
            rows = [(Cell(r["source"], r["kind"], r["amount"]), r["seeds"]) for r in record["rows"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--earlier {path} is no report of this command: {error}") from error
        for name in [name for name in COMPARED if name in about]:
            if record.get(name) != (value := plain_json(about[name])):
                raise UserError(f"--earlier {path} is of another comparison: {name} {record.get(name)}, here {value}")
        of = [((cell, int(seed)), result) for cell, seeds in rows for seed, result in seeds.items()]
        found |= {key: result for key, result in of if key[0].source == "none" or set(sources) <= set(result["action_error"])}
    return found


def expected(args: Args, preset: Preset, tasks: int, cells: list[Cell], new: list[str], workers: int) -> str:
    """How long everything takes, by the preset's steps, episodes and trials."""
    vlas, trained = len(cells) * len(args.seeds), sum(c.source != "none" for c in cells) * len(args.seeds)
    down = [len(expand(list(group))) for group in preset.downstream]
    trials = (sum(down) or tasks) * (50 + 2 * preset.starts)
    samples = trained * preset.steps * preset.batch_size + 2.5 * vlas * sum(down) * preset.downstream_episodes * STEPS
    minutes = sum(preset.minutes[s] for s in new) * tasks + sum(down) * preset.minutes["demonstrations"]
    minutes += (len(corpora_of(cells)) * tasks + sum(down)) * preset.minutes["pictures"]
    hours = {"corpora": minutes / 60, "training": samples / preset.samples_per_second / 3600}
    hours["evaluation"] = vlas * trials * preset.trial_seconds / 3600
    parts = ", ".join(f"{name} {h:.1f} h" for name, h in hours.items())
    total = f"about {sum(hours.values()) / workers:.1f} h with {workers} at a time, less what is done"
    return f"{len(cells)} rows x {len(args.seeds)} seeds = {vlas} VLAs on {tasks} tasks; {parts} {preset.measured}; {total}"


# ---------------------------------------------------------------------------------------------- the whole job


def check(args: Args) -> None:
    for name, known in (("preset", tuple(PRESETS)), ("protocol", PROTOCOLS), ("head", ("flow", "tokens"))):
        if (value := getattr(args, name)) not in known:
            raise UserError(f"--{name} must be {' or '.join(known)}, not {value}")
    if unknown := [s for s in args.sources if s not in SOURCES]:
        raise UserError(f"--sources: there is no {unknown[0]!r}; choose from {' '.join(SOURCES)}")
    if not args.seeds or not args.sources:
        raise UserError("--seeds and --sources need at least one value")


def main() -> None:
    args = tyro.cli(Args)
    check(args)
    preset = PRESETS[args.preset][args.protocol]
    tasks, groups = expand(args.tasks or list(preset.tasks)), [expand(list(group)) for group in preset.downstream]
    if both := set(tasks) & {task for group in groups for task in group}:
        raise UserError(f"{sorted(both)[0]} is fine-tuned on, so no corpus may hold it; leave it out of --tasks")
    swept = vla_corpora.read_sweeps(args.corpora, args.sources)
    lacking = {task: [s for s, found in swept.items() if task not in found] for task in tasks}
    left_out = [f"{task}: no corpus in the sweep of {', '.join(sources)}" for task, sources in lacking.items() if sources]
    if not (tasks := [task for task in tasks if not lacking[task]]):
        raise UserError(f"no task is in all sweeps: {'; '.join(left_out)}")
    if "human" in args.sources and (missing := [task for task in tasks if find_human_demos(find_task(task)) is None]):
        raise UserError(f"no human demonstrations of {missing[0]}; set LIBERO_DATASETS to the folder of LIBERO's, or leave human out")
    vla_corpora.check_alike([found[task] for found in swept.values() for task in tasks], preset.image_size)
    cells = list_cells(preset, args.protocol, args.sources)
    new = [s for s in corpora_of(cells) if s not in swept]
    about = {"preset": args.preset, "protocol": args.protocol, "head": args.head, "tasks": tasks}
    about |= {"settings": {name: value for name, value in dataclasses.asdict(preset).items() if name not in ESTIMATES}}
    read_earlier(args.earlier, about, args.sources)  # errors now, and not when the corpora are there
    machine = Machine(None, memory=4.0, use_gpus=True)
    print(f"{args.preset}, {args.protocol}: {expected(args, preset, len(tasks), cells, new, machine.workers)}")
    print("".join(f"left out: {line}\n" for line in left_out), end="", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    if (held := lock(args.out / "lock")) is None:
        raise UserError(f"another process is working on {args.out}; wait for it, or choose another --out")
    remove_leftovers(args.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pool = make_pool(machine)
    try:
        with held:
            todo, more = plan(args, preset, pool, tasks, groups, swept, cells, left_out)
            compare(args, preset, pool, cells, todo, about | more)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in list(CHILDREN):  # each saves, and ends
            child.terminate()


def plan(args: Args, preset: Preset, pool: ThreadPoolExecutor, tasks, groups, swept, cells, left_out) -> tuple[list[Work], dict]:
    """Have all corpora, and choose what is taken of them: the VLAs to be trained, and more that the report says about all of them.

    Args: as in `main`: tasks of the corpora, groups of downstream tasks, source -> task -> corpus of a sweep, the tables' rows, and lines.
    """
    for source in args.sources:
        if source not in (*swept, *DEMONSTRATED):
            swept |= vla_corpora.read_sweeps([sweep(args, preset, source, tasks)], args.sources)
    sources = corpora_of(cells)
    jobs = {(s, t): pool.submit(make_corpus, args, preset, s, t, swept.get(s, {}).get(t)) for t in tasks for s in sources}
    down = {task: pool.submit(make_downstream, args, preset, task) for group in groups for task in group}
    corpora = {s: {t: jobs[s, t].result() for t in tasks} for s in sources}
    vla_corpora.check_alike([p for paths in corpora.values() for p in paths.values() if p], preset.image_size)
    left_out += [f"{task}: too few demonstrations to fine-tune on" for task, job in down.items() if job.result() is None]
    downstream = tuple(tuple(p for task in group if (p := down[task].result())) for group in groups)
    if not all(downstream):
        raise UserError(f"nothing to fine-tune on: {'; '.join(left_out)}")

    pools, short = choose_tasks(preset, args.protocol, corpora, cells)
    left_out += short
    used, todo, masks = tuple(next(iter(pools.values()))), [], {}
    recipe = (args.head, preset.size, preset.steps, preset.batch_size, preset.pretraining)
    tuned = (preset.finetuning, [[[e.digest for e in vla_corpora.entries(p, "downstream")] for p in group] for group in downstream])
    for seed in args.seeds:
        for cell in cells:
            chosen = {} if cell.source == "none" else choose_episodes(preset, pools, cell, seed)
            of = digest(recipe, [(task, [e.digest for e in episodes]) for task, episodes in chosen.items()])
            folder = args.out.absolute() / "vlas" / f"{cell.source}-seed{seed}-{of}"
            place = f"transfer-{digest(tuned)}" if groups else "in-domain"
            predicted = tuple(dict.fromkeys([*args.sources, *corpora_of([cell])]))
            todo.append(Work(cell, seed, folder, place, used, downstream, predicted))
            for task, episodes in chosen.items():
                masks.setdefault(corpora[cell.source][task], {})[folder.name] = [e.name for e in episodes]
    for path, of in masks.items():
        vla_corpora.write_masks(path, of)

    more = {"tasks": list(used), "seeds": args.seeds, "left_out": left_out, "assets": vla_corpora.assets_of(next(iter(masks)))}
    more |= {"downstream": [[f"{p.parent.name}/{p.stem.removesuffix('_demo')}" for p in group] for group in downstream]}
    more |= {"runs": {s: [swept[s][t].parent.name for t in used] for s in args.sources if s in swept}}
    return todo, more


def compare(args: Args, preset: Preset, pool: ThreadPoolExecutor, cells: list[Cell], todo: list[Work], about: dict) -> None:
    """Train, evaluate and explain all VLAs that were not done elsewhere, and report after each."""
    failed: dict[str, str] = {}
    earlier = read_earlier(args.earlier, about, args.sources)

    def result(work: Work) -> dict | None:
        return earlier.get((work.cell, work.seed)) or work.result()

    def report() -> str:
        results = {cell: {w.seed: r for w in todo if w.cell == cell and (r := result(w))} for cell in cells}
        return vla_report.write(args.out / args.protocol, about | {"failed": failed}, results)

    left = {work.folder: work for work in todo[::-1] if result(work) is None}
    print(f"{sum(result(work) is not None for work in todo)} of {len(todo)} VLAs are done", flush=True)
    jobs = {pool.submit(do, args, preset, work): work for work in list(left.values())[::-1]}
    for job in as_completed(jobs):
        try:
            job.result()
        except UserError as error:
            failed[jobs[job].key] = str(error)
        report()
        print(f"{jobs[job].key}: {failed.get(jobs[job].key, 'done')}", flush=True)
    print(report())
    if failed:
        raise UserError(f"{len(failed)} VLAs failed, {next(iter(failed.values()))}; start again once that is mended")


if __name__ == "__main__":
    run_command(main)
