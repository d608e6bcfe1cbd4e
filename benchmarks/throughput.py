"""How fast: LIBERO's own environment, ours, and the physical limit, in one run.

All three do the same work. Each block takes some official init states, settled, and one sequence of small random actions, and
steps them with, in turn,

  libero   LIBERO's `ControlEnv` (from states, no cameras), one state after the other;
  ours     one vector environment of all the states, in one thread;
  limit    25 bare `mj_step` a control step, in one call, from the state that ours had there and with its torques;

so that contacts, which decide what a physics step costs, agree. Then the same on all cores: LIBERO in a process a core, ours
in a thread a core, the limit in a thread a core. Blocks are short and their order turns, so that whatever else the machine
does hits all alike; numbers are medians over the blocks, with the quartiles of the ratios. Resets: LIBERO's `reset` (which
compiles the model anew), and ours with and without the ten settling steps, the first time and from then on (each start state
is settled once).

    python -m benchmarks.throughput --task libero_90/5 libero_spatial/0 libero_object/0 [--json FILE]
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode

from common.cli import UserError, run_command
from common.env import SUBSTEPS, make_env
from common.runs import Progress, versions, write_json
from common.tasks import Task, find_assets, libero_env, load_task, resolve

FULL = mujoco.mjtState.mjSTATE_INTEGRATION


@dataclasses.dataclass
class Args:
    """Measure control steps a second of LIBERO's environment, ours and the physical limit."""

    task: list[str] = dataclasses.field(default_factory=lambda: ["libero_90/5", "libero_spatial/0", "libero_object/0"])
    """task ids"""
    num_envs: int = 8
    """environments a core"""
    steps: int = 20
    """control steps a block"""
    blocks: int = 10
    """blocks of each kind"""
    json: Path | None = None
    """write the numbers of the first task here, and those of every task under "tasks\""""
    assets: str | None = None
    """LIBERO's asset folder, or standin (default: $LIBERO_ASSETS, else LIBERO's own, else a download, else stand-ins)"""


# ---------------------------------------------------------------------------------------------- LIBERO, in processes


def libero_worker(connection, task_id: str, assets: str) -> None:
    """LIBERO's environment, served over a pipe: ("run", states, actions) or ("reset",) -> seconds it took."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):  # LIBERO and robosuite print
        env = libero_env(task_id, assets)
        connection.send(None)
        while (message := connection.recv()) is not None:
            seconds = 0.0
            if message[0] == "reset":
                start = time.perf_counter()
                env.reset()
                seconds = time.perf_counter() - start
            else:
                _, states, actions = message
                for k, state in enumerate(states):
                    env.set_init_state(state)
                    env.env.timestep, env.env.done = 0, False
                    start = time.perf_counter()
                    for action in actions[:, k]:
                        env.step(action)
                    seconds += time.perf_counter() - start
            connection.send(seconds)


class Libero:
    """One process of LIBERO's environment a core."""

    def __init__(self, task_id: str, assets: str, cores: int):
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(cores)]
        self.connections = [ours for ours, _ in pairs]
        self.processes = [context.Process(target=libero_worker, args=(theirs, task_id, assets), daemon=True) for _, theirs in pairs]
        for process in self.processes:
            process.start()
        for connection, (_, theirs) in zip(self.connections, pairs, strict=True):
            theirs.close()  # so that a process that dies is an EOFError here
            connection.recv()

    def __call__(self, cores: int, *message) -> float:
        """Seconds, on average over the processes, that `message` took on `cores` of them at once."""
        for connection in self.connections[:cores]:
            connection.send(message)
        return float(np.mean([connection.recv() for connection in self.connections[:cores]]))

    def close(self) -> None:
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.send(None)
            process.join()


# ---------------------------------------------------------------------------------------------- one task


class Ours:
    """A vector environment of `num_envs` environments a core, and the physical limit on its trajectory."""

    def __init__(self, task: Task, num_envs: int, cores: int):
        self.model, self.cores = task.model, cores
        options = dict(max_steps=10**6, autoreset_mode=AutoresetMode.DISABLED)
        self.env = make_env(task, num_envs * cores, num_threads=cores, **options)
        self.bare = [mujoco.MjData(task.model) for _ in range(num_envs * cores)]
        self.threads = ThreadPoolExecutor(cores)

    def prepare(self, init_states: np.ndarray) -> np.ndarray:
        """Settle official init states; returns their states, which LIBERO is to start from."""
        self.env.reset(options={"init_state": init_states})
        states = self.env.get_state()
        self.env.set_state(states)
        return states

    def run(self, actions: np.ndarray) -> float:
        """Seconds for all control steps of (steps, num_envs * cores, 7) actions."""
        start = time.perf_counter()
        for action in actions:
            self.env.step(action)
        return time.perf_counter() - start

    def record(self, actions: np.ndarray) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """For each environment and step: the physics state before the step, and the torques at its end."""
        rows = []
        for action in actions:
            before = [self._physics(data) for data in self.env.data]
            self.env.step(action)
            rows.append([(state, data.ctrl.copy()) for state, data in zip(before, self.env.data, strict=True)])
        return list(zip(*rows, strict=True))

    def limit(self, record) -> float:
        """Seconds for 25 bare mj_step from each recorded state, each thread with its share of the environments."""

        def bare(core):
            for data, steps in list(zip(self.bare, record, strict=True))[core :: self.cores]:
                for state, torques in steps:
                    mujoco.mj_setState(self.model, data, state, FULL)
                    data.ctrl[:] = torques
                    mujoco.mj_step(self.model, data, nstep=SUBSTEPS)

        start = time.perf_counter()
        list(self.threads.map(bare, range(self.cores)))
        return time.perf_counter() - start

    def _physics(self, data: mujoco.MjData) -> np.ndarray:
        state = np.empty(mujoco.mj_stateSize(self.model, FULL))
        mujoco.mj_getState(self.model, data, state, FULL)
        return state

    def close(self) -> None:
        self.env.close()
        self.threads.shutdown()


def measure(task_id: str, args: Args, cores: int, progress: Progress) -> dict:
    """Everything about one task; speeds in control steps a second."""
    task = load_task(task_id, args.assets)
    progress.stage(task_id, 3 * args.blocks)
    libero = Libero(task_id, args.assets, cores)
    rng = np.random.default_rng(0)
    counts = [1] if cores == 1 else [1, cores]
    ours = {c: Ours(task, args.num_envs, c) for c in counts}
    seconds = {(name, c): [] for c in counts for name in ("libero", "ours", "limit")}
    for block in range(args.blocks + 1):  # the first one compiles and warms up, and is not counted
        for c in counts:
            n = args.num_envs * c
            states = ours[c].prepare((block * args.num_envs + np.arange(n)) % len(task.init_states))
            actions = np.clip(0.3 * rng.normal(size=(args.steps, n, 7)), -1.0, 1.0)
            start = ours[c].env.snapshot()
            record = ours[c].record(actions)
            kinds = {
                # each process takes one core's share of the states
                "libero": lambda c=c, s=states, a=actions: libero(c, "run", s[: args.num_envs], a[:, : args.num_envs]),
                "ours": lambda c=c, a=actions: ours[c].run(a),
                "limit": lambda c=c, r=record: ours[c].limit(r),
            }
            names = list(kinds)
            for name in names[block % 3 :] + names[: block % 3]:
                ours[c].env.restore(start)
                taken = kinds[name]()
                if block > 0:
                    seconds[name, c].append(taken)
        if block > 0:
            progress.update(2, f"ours {args.num_envs * args.steps / np.median(seconds['ours', 1]):.0f} steps/s a core")
    resets = measure_resets(task, libero, args)
    progress.update(args.blocks)
    libero.close()
    for o in ours.values():
        o.close()
    return summarise(seconds, resets, args, cores)


def measure_resets(task: Task, libero: Libero, args: Args) -> dict[str, float]:
    """Seconds for resetting one environment."""
    found: dict[str, list[float]] = {"libero": [libero(1, "reset") for _ in range(5)]}
    for name, settle in (("ours", 0), ("ours_settled", 10)):
        env = make_env(task, args.num_envs, settle_steps=settle, num_threads=1)
        for when in ("first", "again"):
            found[f"{name}_{when}"] = []
            for k in range(5):
                start = time.perf_counter()
                env.reset(options={"init_state": (k * args.num_envs + np.arange(args.num_envs)) % len(task.init_states)})
                found[f"{name}_{when}"].append((time.perf_counter() - start) / args.num_envs)
        env.close()
    return {name: float(np.median(values)) for name, values in found.items()}


def summarise(seconds, resets: dict[str, float], args: Args, cores: int) -> dict:
    speed = lambda name, c: c * args.num_envs * args.steps / np.array(seconds[name, c])  # noqa: E731
    quartiles = lambda ratios: [round(float(q), 3) for q in np.quantile(ratios, [0.5, 0.25, 0.75])]  # noqa: E731
    result = {name: float(np.median(speed(name, 1))) for name in ("libero", "ours", "limit")}
    result["all_cores"] = {name: float(np.median(speed(name, cores))) for name in ("libero", "ours", "limit")}
    result["ratios"] = {  # median and quartiles over the blocks
        "ours_over_libero": quartiles(speed("ours", 1) / speed("libero", 1)),
        "ours_over_limit": quartiles(speed("ours", 1) / speed("limit", 1)),
        "ours_over_libero_all_cores": quartiles(speed("ours", cores) / speed("libero", cores)),
        "ours_over_limit_all_cores": quartiles(speed("ours", cores) / speed("limit", cores)),
        "scaling": quartiles(speed("ours", cores) / speed("ours", 1) / cores),
        "scaling_of_the_limit": quartiles(speed("limit", cores) / speed("limit", 1) / cores),
    }
    result["reset_seconds"] = resets
    result["reset_ratios"] = {name: resets["libero"] / value for name, value in resets.items() if name != "libero"}
    return result


def report(results: dict[str, dict], cores: int) -> str:
    """The results as markdown."""
    lines = [f"| control steps/s | LIBERO | ours | limit | ours / LIBERO | ours / limit | {cores} cores: LIBERO | ours | limit | scaling |"]
    lines.append("|---" * 10 + "|")
    spread = lambda q: f"{q[0]:.2f} ({q[1]:.2f} to {q[2]:.2f})"  # noqa: E731
    for task, r in results.items():
        one, all_cores = ([f"{x[name]:.0f}" for name in ("libero", "ours", "limit")] for x in (r, r["all_cores"]))
        ratios = [spread(r["ratios"][name]) for name in ("ours_over_libero", "ours_over_limit", "scaling")]
        lines.append(f"| {' | '.join([task, *one, *ratios[:2], *all_cores, ratios[2]])} |")
    lines += ["", "| reset, ms | LIBERO | ours, first | again | with settling, first | again |", "|---" * 6 + "|"]
    for task, r in results.items():
        cells = [f"{r['reset_seconds']['libero'] * 1e3:.0f}"]
        for name in ("ours_first", "ours_again", "ours_settled_first", "ours_settled_again"):
            cells.append(f"{r['reset_seconds'][name] * 1e3:.2f} ({r['reset_ratios'][name]:.0f}x)")
        lines.append(f"| {' | '.join([task, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    import tyro

    args = tyro.cli(Args)
    if min(args.num_envs, args.steps, args.blocks) < 1:
        raise UserError("--num-envs, --steps and --blocks are at least 1")
    args.assets = str(find_assets(args.assets))
    tasks = [f"{suite}/{index}" for suite, index in map(resolve, args.task)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes of LIBERO: one core each
    progress, results = Progress(), {}
    for task in tasks:
        results[task] = measure(task, args, cores, progress)
        if args.json is not None:
            write_json(args.json, {**results[tasks[0]], "cores": cores, "tasks": results, "versions": versions()})
    progress.close()
    print(report(results, cores))


if __name__ == "__main__":
    run_command(main)
