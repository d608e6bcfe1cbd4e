"""How fast: LIBERO's own environment, ours, and the physical limit, in one run.

All do the same work. Each block takes some official init states, settled, and one sequence of small random actions, and steps them
with, in turn,

  libero   LIBERO's `ControlEnv` (from states, no cameras), one state after the other;
  ours     one vector environment of all the states, in one thread;
  sleep, coarse  the same with these `physics`, where MuJoCo can sleep (docs/physics.md);
  limit    25 bare `mj_step` a control step, in one call, of LIBERO's model as it compiles it, from the state that ours had there and
           with its torques;

so that contacts, which decide what a physics step costs, agree. Then the same on all cores: LIBERO in a process a core, ours
in a thread a core, the limit in a thread a core. And again with what RL does in the place of random motions: scripted demonstrations,
replayed from their first states to their ends. Blocks are short and their order turns, so that whatever else the machine does hits all
alike; on one core processor time is taken, on all of them the clock's; numbers are medians over the blocks, with the quartiles of the
ratios. Resets: LIBERO's `reset` (which compiles the model anew), and ours with and without the ten settling steps, the first time and
from then on (each start state is settled once).

    python -m benchmarks.throughput --task libero_90/5 libero_spatial/0 libero_object/0 [--json FILE]

With `--pixels`, pictures instead: agentview and the wrist's, 128 x 128, by LIBERO's `OffScreenRenderEnv` under the GL library that
MuJoCo finds (MUJOCO_GL, else EGL, else OSMesa; the driver's name tells software from a GPU; one process a core, without threads of
its own) and by our ray tracer. Again block by block: pictures of the same settled states, and control steps with pictures.

    python -m benchmarks.throughput --pixels [--json FILE]

With `--device cuda`, MuJoCo Warp as well: for each number of worlds, control steps a second from states or, with `--pixels`, with both
pictures of every world, and pictures alone; the GPU's memory, and the time it takes to start and to record the graph.

    python -m benchmarks.throughput --device cuda [--pixels] [--worlds 256 1024 4096 8192] [--json FILE]
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode

from common.cli import UserError, run_command, usable_cores
from common.demos import collect
from common.libero import Task, load_task, make_env
from common.libero.assets import find_assets
from common.libero.make import choose_physics
from common.libero.original import libero_env
from common.libero.renderers import CAMERAS, make_renderer
from common.libero.step import SUBSTEPS
from common.runs import Progress, versions, write_json
from common.suites import resolve

FULL = mujoco.mjtState.mjSTATE_INTEGRATION
SIZE = 128  # of pictures, pixels: LIBERO's own


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
    demonstrations: int = 4
    """demonstrations a block (0: none)"""
    pixels: bool = False
    """measure pictures instead of steps from states"""
    device: Literal["cpu", "cuda", "warp-cpu"] = "cpu"
    """cuda: measure the GPU as well, next to the CPU on all cores; warp-cpu: the same loops on Warp's CPU device, for tests"""
    worlds: list[int] = dataclasses.field(default_factory=lambda: [256, 1024, 4096, 8192])
    """numbers of environments on the GPU"""
    json: Path | None = None
    """write the numbers of the first task here, and those of every task under "tasks\""""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: $LIBERO_ASSETS, else LIBERO's own, else stand-ins)"""


# ---------------------------------------------------------------------------------------------- LIBERO, in processes


def clocks() -> np.ndarray:
    """(2,) seconds: the clock's, and what this process has taken of processors."""
    return np.array([time.perf_counter(), time.process_time()])


def libero_worker(connection, task_id: str, assets: str, gl: str | None) -> None:
    """LIBERO's environment, served over a pipe: ("run", states, actions of each), ("reset",) or ("pictures", states) -> seconds and
    processor seconds it took.

    With `gl` (egl, osmesa, ...) it is the one with pictures, and the name of the GL driver is sent before all else.
    """
    options = {} if gl is None else dict(use_camera_obs=True, has_offscreen_renderer=True, camera_heights=SIZE, camera_widths=SIZE)
    if gl is not None:
        os.environ.update(MUJOCO_GL=gl, LP_NUM_THREADS="0")  # Mesa's software driver takes all cores otherwise
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):  # LIBERO and robosuite print
        env = libero_env(task_id, assets, **options)
        connection.send(None if gl is None else gl_driver())
        while (message := connection.recv()) is not None:
            taken = np.zeros(2)
            if message[0] == "reset":
                start = clocks()
                env.reset()
                taken = clocks() - start
            elif message[0] == "pictures":
                for state in message[1]:
                    env.set_init_state(state)
                    start = clocks()
                    for camera in CAMERAS:
                        env.sim.render(camera_name=camera, width=SIZE, height=SIZE)
                    taken += clocks() - start
            else:
                for state, actions in zip(*message[1:], strict=True):
                    env.set_init_state(state)
                    env.env.timestep, env.env.done = 0, False
                    start = clocks()
                    for action in actions:
                        env.step(action)
                    taken += clocks() - start
            connection.send(taken)
    if gl is not None:
        os._exit(0)  # robosuite's EGL context raises, with much text, when the interpreter ends


def gl_driver() -> str:
    """What draws in the current GL context, e.g. llvmpipe (software) or a GPU's name."""
    from OpenGL import GL

    return GL.glGetString(GL.GL_RENDERER).decode()


def find_gl() -> tuple[str | None, str]:
    """The first GL backend that works, tried in processes of their own, and why there is none."""
    reason = ""
    for gl in [os.environ["MUJOCO_GL"]] if "MUJOCO_GL" in os.environ else ["egl", "osmesa"]:
        code = "from common.libero import renderers; print(renderers.available('gl')[1])"
        found = subprocess.run([sys.executable, "-c", code], env={**os.environ, "MUJOCO_GL": gl}, capture_output=True, text=True)
        if found.returncode == 0 and not found.stdout.strip():
            return gl, ""
        reason = (found.stdout.strip() or found.stderr.strip() or "no output").splitlines()[-1]
    return None, reason


class Libero:
    """One process of LIBERO's environment a core; `driver` is what draws its pictures, if it makes any."""

    def __init__(self, task_id: str, assets: str, cores: int, gl: str | None = None):
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(cores)]
        self.connections = [ours for ours, _ in pairs]
        self.processes = [context.Process(target=libero_worker, args=(theirs, task_id, assets, gl), daemon=True) for _, theirs in pairs]
        for process in self.processes:
            process.start()
        for connection, (_, theirs) in zip(self.connections, pairs, strict=True):
            theirs.close()  # so that a process that dies is an EOFError here
            self.driver = connection.recv()

    def __call__(self, cores: int, *message) -> np.ndarray:
        """(2,) `clocks`, on average over the processes, that `message` took on `cores` of them at once."""
        for connection in self.connections[:cores]:
            connection.send(message)
        return np.mean([connection.recv() for connection in self.connections[:cores]], axis=0)

    def close(self) -> None:
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.send(None)
            process.join()


# ---------------------------------------------------------------------------------------------- one task


class Ours:
    """A vector environment of `num_envs` environments a core, and the physical limit on its trajectory."""

    def __init__(self, task: Task, num_envs: int, cores: int, physics: str = "exact"):
        self.cores = cores
        options = dict(max_steps=10**6, autoreset_mode=AutoresetMode.DISABLED)
        self.env = make_env(task, num_envs * cores, num_threads=cores, physics=physics, **options)
        self.model = copy.copy(task.model)  # as LIBERO compiles it, with what our environment switches off
        self.model.vis.global_.bvactive = 1
        self.model.opt.disableflags &= ~int(mujoco.mjtDisableBit.mjDSBL_SENSOR)
        self.bare = [mujoco.MjData(self.model) for _ in range(num_envs * cores)]
        self.threads = ThreadPoolExecutor(cores)

    def prepare(self, init_states: np.ndarray) -> np.ndarray:
        """Settle official init states; returns their states, which LIBERO is to start from."""
        self.env.reset(options={"init_state": init_states})
        states = self.env.get_state()
        self.env.set_state(states)
        return states

    def run(self, actions: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
        """(2,) `clocks` for all control steps of (steps, num_envs * cores, 7) actions, of each environment the first of `lengths`."""
        start = clocks()
        for t, action in enumerate(actions):
            self.env.step(action, None if lengths is None else t < lengths)
        return clocks() - start

    def record(self, actions: np.ndarray, lengths: np.ndarray | None = None) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """For each environment and step: the physics state before the step, and the torques at its end."""
        rows = []
        for t, action in enumerate(actions):
            before = [self._physics(data) for data in self.env.data]
            self.env.step(action, None if lengths is None else t < lengths)
            rows.append([(state, data.ctrl.copy()) for state, data in zip(before, self.env.data, strict=True)])
        record = list(zip(*rows, strict=True))
        return record if lengths is None else [row[:length] for row, length in zip(record, lengths, strict=True)]

    def limit(self, record) -> np.ndarray:
        """(2,) `clocks` for 25 bare mj_step from each recorded state, each thread with its share of the environments."""

        def bare(core):
            for data, steps in list(zip(self.bare, record, strict=True))[core :: self.cores]:
                for state, torques in steps:
                    mujoco.mj_setState(self.model, data, state, FULL)
                    data.ctrl[:] = torques
                    mujoco.mj_step(self.model, data, nstep=SUBSTEPS)

        start = clocks()
        list(self.threads.map(bare, range(self.cores)))
        return clocks() - start

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
    episodes = collect(task, args.demonstrations * min(args.blocks, 4), replayable=True) if args.demonstrations else []
    progress.stage(task_id, (3 + bool(episodes)) * args.blocks)
    libero = Libero(task_id, args.assets, cores)
    rng = np.random.default_rng(0)

    def random_motions(block: int, ours: Ours) -> tuple[np.ndarray, list[np.ndarray]]:
        n = ours.env.num_envs
        states = ours.prepare((block * args.num_envs + np.arange(n)) % len(task.init_states))
        return states, list(np.clip(0.3 * rng.normal(size=(n, args.steps, 7)), -1.0, 1.0))

    def demonstrations(block: int, ours: Ours) -> tuple[np.ndarray, list[np.ndarray]]:
        chosen = [episodes[(block * args.demonstrations + k) % len(episodes)] for k in range(ours.env.num_envs)]
        return np.stack([e.states[0] for e in chosen]), [e.actions for e in chosen]

    counts = [1] if cores == 1 else [1, cores]
    result = summarise(take_turns(task, args.num_envs, counts, random_motions, libero, args, progress), cores)
    if episodes:
        speeds = take_turns(task, args.demonstrations, [1], demonstrations, libero, args, progress)
        result["demonstrations"] = summarise(speeds, 1)
    resets = measure_resets(task, libero, args)
    progress.update(args.blocks)
    libero.close()
    result["reset_seconds"] = resets
    result["reset_ratios"] = {name: resets["libero"] / value for name, value in resets.items() if name != "libero"}
    return result


def take_turns(task: Task, num_envs: int, counts: list[int], work, libero: Libero, args: Args, progress: Progress) -> dict:
    """{(whose, cores): control steps/s in each block, by both `clocks`}. `work(block, ours)` gives start states and the actions of each
    environment, (T_i, 7)."""
    kinds = {"ours": "exact"} | ({} if choose_physics("auto", "cpu") == "exact" else {"sleep": "sleep", "coarse": "coarse"})
    ours = {(name, c): Ours(task, num_envs, c, physics) for c in counts for name, physics in kinds.items()}
    names = ["libero", *kinds, "limit"]
    speeds = {(name, c): [] for c in counts for name in names}
    for block in range(args.blocks + 1):  # the first one compiles and warms up, and is not counted
        for c in counts:
            exact = ours["ours", c]
            states, each = work(block, exact)
            lengths = np.array([len(actions) for actions in each])
            padded = np.stack([np.pad(a, ((0, lengths.max() - len(a)), (0, 0))) for a in each], axis=1)
            for name in kinds:
                ours[name, c].env.set_state(states)
            starts = {name: ours[name, c].env.snapshot() for name in kinds}
            record = exact.record(padded, lengths)
            turn = block % len(names)
            for name in names[turn:] + names[:turn]:
                if name == "libero":  # each process takes one core's share of the states
                    taken, steps = libero(c, "run", states[:num_envs], each[:num_envs]), c * lengths[:num_envs].sum()
                elif name == "limit":
                    taken, steps = exact.limit(record), lengths.sum()
                else:
                    ours[name, c].env.restore(starts[name])
                    taken, steps = ours[name, c].run(padded, lengths), lengths.sum()
                if block > 0:
                    speeds[name, c].append(steps / taken)
        if block > 0:
            progress.update(len(counts), f"ours {np.median(speeds['ours', 1], 0)[1]:.0f} steps/s a core")
    for o in ours.values():
        o.close()
    return speeds


def measure_resets(task: Task, libero: Libero, args: Args) -> dict[str, float]:
    """Seconds for resetting one environment."""
    times = 5 if args.blocks > 1 else 1
    found: dict[str, list[float]] = {"libero": [libero(1, "reset")[0] for _ in range(times)]}
    for name, settle in (("ours", 0), ("ours_settled", 10)):
        env = make_env(task, args.num_envs, settle_steps=settle, num_threads=1)
        for when in ("first", "again"):
            found[f"{name}_{when}"] = []
            for k in range(times):
                start = time.perf_counter()
                env.reset(options={"init_state": (k * args.num_envs + np.arange(args.num_envs)) % len(task.init_states)})
                found[f"{name}_{when}"].append((time.perf_counter() - start) / args.num_envs)
        env.close()
    return {name: float(np.median(values)) for name, values in found.items()}


def quartiles(ratios: np.ndarray) -> list[float]:
    return [round(float(q), 3) for q in np.quantile(ratios, [0.5, 0.25, 0.75])]


def spread(q: list[float]) -> str:
    return f"{q[0]:.2f} ({q[1]:.2f} to {q[2]:.2f})"


def measure_warp(task: Task, args: Args, device: str) -> dict[int, dict[str, float]]:
    """MuJoCo Warp on `device`: for each number of worlds, control steps/s (with `args.pixels` from pictures, and pictures/s alone) with
    what they take to start.

    Actions and observations stay on the device. The time of a block is that of `args.steps` steps and one wait at their end.
    """
    import torch
    import warp as wp

    found = {}
    for n in args.worlds:
        free = wp.get_device(device).free_memory if device != "cpu" else 0
        start = time.perf_counter()
        options = dict(backend="warp", device=device, seed=0, tensors=True, max_steps=10**6)
        if args.pixels:  # no autoreset, which would fetch from the device which episodes have ended
            options |= dict(obs="pixels", cameras=CAMERAS, image_size=SIZE, autoreset_mode=AutoresetMode.DISABLED)
        env = make_env(task, n, **options)
        env.reset()
        wp.synchronize_device(env.device)
        startup = time.perf_counter() - start
        actions = (0.3 * torch.randn(args.steps, n, 7, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
        actions = actions.to(wp.device_to_torch(env.device))

        def speed(work, env=env, actions=actions, n=n) -> float:
            seconds = []
            for _ in range(args.blocks + 1):  # the first one warms up
                start = time.perf_counter()
                for action in actions:
                    work(action)
                wp.synchronize_device(env.device)
                seconds.append(time.perf_counter() - start)
            return n * args.steps / float(np.median(seconds[1:]))

        row = {"steps_per_second": speed(env.step)}
        if args.pixels:
            row["pictures_per_second"] = len(CAMERAS) * speed(lambda action, env=env: env.observations())
        used = (free - wp.get_device(device).free_memory) / 1e9 if device != "cpu" else 0.0
        found[n] = row | {"memory_gb": used, "startup_seconds": startup, "graph_seconds": env.graph_seconds}
        env.close()
        del env
    return found


def summarise(speeds: dict[tuple[str, int], list[np.ndarray]], cores: int) -> dict:
    """Medians, and the ratios' median and quartiles over the blocks, of what `take_turns` gives: of one core by what it took of it,
    whatever else ran there, of several by the clock."""
    names = list(dict.fromkeys(name for name, _ in speeds))
    clock = {key: np.array(values)[:, 0] for key, values in speeds.items()}
    speed = {key: np.array(values)[:, 1] if key[1] == 1 else clock[key] for key, values in speeds.items()}
    result = {name: float(np.median(speed[name, 1])) for name in names}
    result["all_cores"] = {name: float(np.median(speed[name, cores])) for name in names}
    result["ratios"] = {}
    for label, c in (("", 1), ("_all_cores", cores)):
        for name in ("ours", "sleep", "coarse"):
            for other in ("libero", "limit") if name in names else ():
                result["ratios"][f"{name}_over_{other}{label}"] = quartiles(speed[name, c] / speed[other, c])
    for name, label in (("ours", "scaling"), ("limit", "scaling_of_the_limit")):
        result["ratios"][label] = quartiles(clock[name, cores] / clock[name, 1] / cores)
    return result


def report_warp(results: dict[str, dict], cores: int, pixels: bool) -> list[str]:
    """The GPU next to the CPU on all cores, as markdown."""
    steps, more = ("control steps/s, two pictures each", " pictures/s alone |") if pixels else ("control steps/s", "")
    lines = ["", f"| on the GPU | worlds | {steps} | / LIBERO, {cores} cores | / ours, {cores} cores |{more} GB | start, s | graph, s |"]
    lines.append("|---" * (8 + pixels) + "|")
    for task, r in results.items():
        for n, w in r["warp"].items():
            theirs = r["steps_all_cores" if pixels else "all_cores"]
            ratios = [f"{w['steps_per_second'] / theirs[name]:.1f}" if name in theirs else "" for name in ("libero", "ours")]
            cells = [task, str(n), f"{w['steps_per_second']:.0f}", *ratios, *([f"{w['pictures_per_second']:.0f}"] if pixels else [])]
            cells += [f"{w['memory_gb']:.1f}", f"{w['startup_seconds']:.0f}", f"{w['graph_seconds']:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(results: dict[str, dict], cores: int) -> str:
    """The results as markdown."""
    head = ["control steps/s", "LIBERO", "ours", "limit", "ours / LIBERO", "ours / limit"]
    head += [f"{name}{over}" for name in ("sleep", "coarse") for over in ("", " / LIBERO", " / limit")]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rows = {f"{task}, {cores} cores": (r["all_cores"], r["ratios"], "_all_cores") for task, r in results.items()}
    rows = {task: (r, r["ratios"], "") for task, r in results.items()} | rows
    rows |= {
        f"{t}, demonstrations": (r["demonstrations"], r["demonstrations"]["ratios"], "")
        for t, r in results.items()
        if "demonstrations" in r
    }
    for name, (speed, ratios, label) in rows.items():
        cells = [name, *(f"{speed[who]:.0f}" for who in ("libero", "ours", "limit"))]
        for who in ("ours", "sleep", "coarse"):
            cells += [f"{speed[who]:.0f}"] if who != "ours" and who in speed else []
            cells += [spread(ratios[f"{who}_over_{other}{label}"]) for other in ("libero", "limit") if who in speed]
        lines.append(f"| {' | '.join(cells + [''] * (len(head) - len(cells)))} |")
    lines += ["", "| scaling to all cores (1 is linear) | ours | limit |", "|---|---|---|"]
    lines += [
        f"| {task} | {spread(r['ratios']['scaling'])} | {spread(r['ratios']['scaling_of_the_limit'])} |" for task, r in results.items()
    ]
    lines += ["", "| reset, ms | LIBERO | ours, first | again | with settling, first | again |", "|---" * 6 + "|"]
    for task, r in results.items():
        cells = [f"{r['reset_seconds']['libero'] * 1e3:.0f}"]
        for name in ("ours_first", "ours_again", "ours_settled_first", "ours_settled_again"):
            cells.append(f"{r['reset_seconds'][name] * 1e3:.2f} ({r['reset_ratios'][name]:.0f}x)")
        lines.append(f"| {' | '.join([task, *cells])} |")
    if all("warp" in r for r in results.values()):
        lines += report_warp(results, cores, pixels=False)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- pictures


def measure_pixels(task_id: str, args: Args, cores: int, gl: str | None, progress: Progress) -> dict:
    """Pictures a second of settled states, and control steps a second with two pictures each; without `gl`, ours alone."""
    task = load_task(task_id, args.assets)
    progress.stage(task_id, args.blocks)
    libero = None if gl is None else Libero(task_id, args.assets, cores, gl)
    rng = np.random.default_rng(0)
    counts = [1] if cores == 1 else [1, cores]
    ours = {c: Ours(task, args.num_envs, c) for c in counts}
    renderers = {c: make_renderer(task.model, CAMERAS, SIZE, SIZE, threads=c) for c in counts}
    speeds: dict[tuple[str, str, int], list[float]] = {}  # (what, whose, cores) -> one for each block

    def pictures(c: int) -> None:
        renderers[c].render(ours[c].env.get_state()[:, 1 : 1 + task.model.nq])

    def timed(work, *arguments) -> float:
        start = time.perf_counter()
        work(*arguments)
        return time.perf_counter() - start

    def steps(c: int, actions: np.ndarray) -> None:
        for action in actions:
            ours[c].env.step(action)
            pictures(c)

    for block in range(args.blocks + 1):  # the first one warms up, and is not counted
        for c in counts:
            n = args.num_envs * c
            states = ours[c].prepare((block * args.num_envs + np.arange(n)) % len(task.init_states))
            actions = np.clip(0.3 * rng.normal(size=(args.steps, n, 7)), -1.0, 1.0)
            # LIBERO steps one state a core: it takes as long for each
            jobs = {
                ("pictures", "ours"): (2 * n, lambda c=c: timed(pictures, c)),
                ("steps", "ours"): (n * args.steps, lambda c=c, a=actions: timed(steps, c, a)),
            }
            if libero is not None:
                jobs["pictures", "libero"] = 2 * n, lambda c=c, s=states: libero(c, "pictures", s[: args.num_envs])[0]
                jobs["steps", "libero"] = c * args.steps, lambda c=c, s=states, a=actions: libero(c, "run", s[:1], [a[:, 0]])[0]
            names = list(jobs)
            for name in names[block % len(names) :] + names[: block % len(names)]:
                ours[c].env.set_state(states)
                amount, work = jobs[name]
                speed = amount / work()
                if block > 0:
                    speeds.setdefault((*name, c), []).append(speed)
        if block > 0:
            progress.update(1, f"ours {np.median(speeds['pictures', 'ours', 1]):.0f} pictures/s a core")
    if libero is not None:
        libero.close()
    for o in ours.values():
        o.close()
    result: dict = {"gl": gl, "driver": None if libero is None else libero.driver, "size": SIZE, "cameras": list(CAMERAS)}
    for what in ("pictures", "steps"):
        for label, c in (("", 1), ("_all_cores", cores)):
            found = {whose: np.array(speeds[what, whose, c]) for whose in ("libero", "ours") if (what, whose, c) in speeds}
            result[what + label] = {whose: float(np.median(values)) for whose, values in found.items()}
            if "libero" in found:
                result[what + label]["ours_over_libero"] = quartiles(found["ours"] / found["libero"])
    return result


def report_pixels(results: dict[str, dict], cores: int) -> str:
    """The results as markdown."""
    driver = next(iter(results.values()))["driver"]
    lines = ["" if driver is None else f"LIBERO's pictures are drawn by {driver}.", ""]
    lines.append(f"| | pictures/s: LIBERO | ours | ratio | {cores} cores: LIBERO | ours | ratio |")
    lines.append("|---" * 7 + "|")
    for task, r in results.items():
        for what, name in (("pictures", task), ("steps", f"{task}, control steps/s with two pictures each")):
            cells = []
            for row in (r[what], r[f"{what}_all_cores"]):
                cells += [f"{row['libero']:.1f}" if "libero" in row else "", f"{row['ours']:.1f}"]
                cells.append(spread(row["ours_over_libero"]) if "libero" in row else "")
            lines.append(f"| {' | '.join([name, *cells])} |")
    if all("warp" in r for r in results.values()):
        lines += report_warp(results, cores, pixels=True)
    return "\n".join(lines).strip()


def main() -> None:
    import tyro

    args = tyro.cli(Args)
    if min(args.num_envs, args.steps, args.blocks, 1 + args.demonstrations, *args.worlds) < 1:
        raise UserError("--num-envs, --steps, --blocks and --worlds are at least 1, --demonstrations 0")
    if args.device == "cuda":
        from common.libero.warp_env import find_device

        find_device("cuda")
    args.assets = str(find_assets(args.assets))
    tasks = [f"{suite}/{index}" for suite, index in map(resolve, args.task)]
    cores = usable_cores()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes of LIBERO: one core each
    progress, results = Progress(), {}
    gl, reason = find_gl() if args.pixels else (None, "")
    if args.pixels and gl is None:
        progress.say(f"LIBERO's own pictures are not measured: {reason}")
    for task in tasks:
        results[task] = measure_pixels(task, args, cores, gl, progress) if args.pixels else measure(task, args, cores, progress)
        if args.device != "cpu":
            results[task]["warp"] = measure_warp(load_task(task, args.assets), args, args.device.removeprefix("warp-"))
        if args.json is not None:
            write_json(args.json, {**results[tasks[0]], "cores": cores, "tasks": results, "versions": versions()})
    progress.close()
    print(report_pixels(results, cores) if args.pixels else report(results, cores))


if __name__ == "__main__":
    run_command(main)
