"""Is our environment LIBERO's? Both, side by side, from the same states with the same actions.

The truth is LIBERO's own `ControlEnv` on robosuite (`common.libero.original.libero_env`), stepped in the same process.

Trajectories (twelve tasks, two or more of each suite). From three official init states: ten no-ops, then smooth random actions with
pauses of the rotation. After every control step the joint positions qpos (m, rad) and both success flags are compared.
Up to where the robot first touches anything, both simulations compute the same numbers in another order, and differ by
rounding. A contact that has just been struck amplifies rounding, in any simulator, so the differences are reported

  free     over the steps before the first one at whose end the robot touches an object or a fixture (in our simulation),
  all      over all steps.

Flags (all 130 tasks). On states that span the goal's boundary (`boundary_states`), LIBERO's `_eval_predicate` of each
conjunct and `_check_success` against ours: once in the state itself and once after a control step from it, where LIBERO
judges poses that are 2 ms old (there only success, as `step` returns it).

Demonstrations (all tasks that the scripted demonstrator solves). Both of the above with two demonstrations of each: their
actions from their starts, so that things are grasped, moved and solved, and the flags in their last states; and in how many of them
LIBERO's environment comes to success as well.

Backends (`--part backends`, alone; six tasks whose contacts differ). Ours on CPU cores against ours on MuJoCo Warp: does it matter that
physics there is in single precision? Closed loop: the scripted demonstrator from the official init states, with the same strategies and
noise on both, and the policies of finished runs (`--runs`) from training states. Success, and its difference with a 95 % interval.

The compiled model is compared too: every field of mjModel but the textures, which we shrink.

    python -m benchmarks.fidelity                                     # everything: two to three hours on two cores
    python -m benchmarks.fidelity --tasks libero_goal/0 libero_90/5   # a minute
    python -m benchmarks.fidelity --part backends --runs runs/RUN     # needs a GPU
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode

from common.cli import UserError, run_command, usable_cores
from common.data import Episode
from common.demos import Demonstrator, Strategy, strategies
from common.job import obs_encoder, observation
from common.libero import Task, load_task, make_env
from common.libero.assets import find_assets
from common.libero.env import share_cores
from common.libero.goals import predicate_holds, success
from common.libero.original import libero_env
from common.libero.step import NO_OP
from common.libero.tasks import Predicate
from common.metrics import newcombe_interval
from common.rollout import roll_out
from common.runs import Progress, load_checkpoint, read_finished, stored_args, versions, write_json
from common.suites import SUITES, resolve, task_names

PARTS = ("trajectories", "flags", "demonstrations")
BACKEND_TASKS = [  # a bowl held by its rim, a can into a basket, a drawer's handle, a knob, a microwave's door (margins), a bowl on a plate
    *("libero_spatial/0", "libero_object/0", "libero_goal/0", "libero_90/20", "libero_90/33", "libero_90/9"),
]
# Two tasks a suite and more, all six predicates among them.
TRAJECTORY_TASKS = [
    *("libero_spatial/0", "libero_spatial/5", "libero_object/0", "libero_object/6", "libero_goal/0", "libero_goal/7"),
    *("libero_10/2", "libero_10/3", "libero_90/5", "libero_90/20", "libero_90/39", "libero_90/60"),
]


@dataclasses.dataclass
class Args:
    """Compare our environment with LIBERO's own."""

    tasks: list[str] = dataclasses.field(default_factory=list)
    """task ids (default: every task; for the trajectories two or more of each suite)"""
    suite: str | None = None
    """one suite only"""
    part: list[Literal["trajectories", "flags", "demonstrations", "backends"]] = dataclasses.field(default_factory=lambda: list(PARTS))
    """what to compare (backends by itself)"""
    steps: int = 100
    """control steps of a trajectory"""
    states: int = 24
    """states a task for the flags, on each of which every conjunct is compared twice"""
    runs: list[Path] = dataclasses.field(default_factory=list)
    """of backends: finished runs of RL scripts, whose policies are compared on their tasks"""
    episodes: int = 200
    """of backends: episodes of a policy on a task"""
    num_envs: int = 64
    """of backends: parallel environments"""
    max_steps: int | None = None
    """of backends: end episodes after so many control steps (default: LIBERO's cap), for tests"""
    device: Literal["cuda", "cpu"] = "cuda"
    """of backends: where Warp computes (cpu is a hundred times slower than the CPU backend)"""
    json: Path | None = None
    """write the numbers here, after every task; tasks that the file already holds, of the same settings, are not run again"""
    processes: int = 0
    """tasks at a time (default: one a core)"""
    assets: str | None = None
    """a folder, libero (its own or none) or standin (default: $LIBERO_ASSETS, else LIBERO's own, else stand-ins)"""


# ---------------------------------------------------------------------------------------------- both simulators


class Pair:
    """LIBERO's environment and ours of one task, in the same state."""

    def __init__(self, task_id: str, assets: str | None):
        self.task = load_task(task_id, assets)
        self.libero = libero_env(task_id, assets)
        self.home = self.libero.robots[0].controller.goal_ori.copy()
        self.env = make_env(self.task, 1, settle_steps=0, max_steps=10**6, autoreset_mode=AutoresetMode.DISABLED)
        self.data, self.sim = self.env.data[0], self.libero.sim
        body_of = self.task.model.geom_bodyid
        self.robot = self.task.model.body_rootid[body_of] == self.task.model.body_rootid[self.task.hand_body]

    def set_state(self, state: np.ndarray) -> None:
        """Put both into a state, and the controllers' memories to where LIBERO's reset leaves them.

        After `set_init_state` LIBERO's controller would compute its first action from the pose before: `new_update` mends that.
        """
        self.libero.set_init_state(state)
        robot = self.libero.robots[0]
        robot.controller.new_update, robot.controller.goal_ori = True, self.home.copy()
        robot.gripper.current_action = np.zeros_like(robot.gripper.current_action)
        self.libero.env.timestep, self.libero.env.done = 0, False
        self.env.set_state(state[None])

    def step(self, action: np.ndarray) -> tuple[bool, bool]:
        """One control step of both; returns (LIBERO's success flag, ours)."""
        _, _, theirs, _ = self.libero.step(action)
        _, _, ours, _, _ = self.env.step(action[None])
        return bool(theirs), bool(ours[0])

    def difference(self) -> float:
        """Largest difference of any joint position, or infinity if one of them is not finite."""
        difference = np.abs(self.sim.data.qpos - self.data.qpos).max()
        return float(difference) if np.isfinite(difference) else np.inf

    def robot_touches(self) -> bool:
        """Whether any part of the robot is in contact with anything else."""
        geoms = self.data.contact.geom
        return bool((self.robot[geoms[:, 0]] != self.robot[geoms[:, 1]]).any())

    def flags(self) -> tuple[list[bool], list[bool]]:
        """(LIBERO's, ours): one flag for each conjunct of the goal, then success."""
        domain = self.libero.env
        theirs = [bool(domain._eval_predicate(state)) for state in domain.parsed_problem["goal_state"]]
        ours = [predicate_holds(p, self.data, self.task.model) for p in self.task.goal]
        return theirs + [bool(self.libero.check_success())], ours + [success(self.task, self.data)]

    def proprioception_difference(self) -> float:
        """Largest difference (m, rad, quaternion) of the robot observations.

        LIBERO samples them some substeps before the end of a control step; here they are taken anew from the current state.
        """
        from robosuite.utils.transform_utils import quat2axisangle

        self.sim.forward()
        self.libero._update_observables(force=True)
        names = {"ee_pos": "eef_pos", "ee_quat": "eef_quat", "gripper_states": "gripper_qpos", "joint_states": "joint_pos"}
        observed = self.libero.env._get_observations()
        theirs = {ours: np.asarray(observed[f"robot0_{name}"]) for ours, name in names.items()}
        theirs["ee_ori"] = quat2axisangle(theirs["ee_quat"].copy())
        return max(float(np.abs(values[0] - theirs[name]).max()) for name, values in self.env.proprioception().items())

    def model_differences(self) -> list[str]:
        """Fields of mjModel that are not equal, textures and the paths of the asset files aside."""
        ours, theirs = self.task.model, self.sim.model._model
        equal = functools.partial(np.array_equal, equal_nan=True)
        arrays = [n for n in dir(ours) if n[0] != "_" and isinstance(getattr(ours, n), np.ndarray)]
        return [n for n in arrays if "tex" not in n and "path" not in n and not equal(getattr(ours, n), getattr(theirs, n))]


def random_actions(rng: np.random.Generator, steps: int) -> np.ndarray:
    """(steps, 7): ten no-ops, then smooth random motion; in three of ten steps the rotation is left as it was."""
    actions = np.zeros((steps, 7))
    for t in range(1, steps):
        actions[t] = 0.8 * actions[t - 1] + 0.4 * rng.normal(size=7)
    actions = np.clip(actions, -1.0, 1.0)
    actions[np.arange(steps) % 10 < 3, 3:6] = 0.0
    actions[:10] = NO_OP
    return actions


def trajectory(pair: Pair, start: np.ndarray, actions: np.ndarray) -> dict:
    """Step both from `start`; see the module's docstring for what is reported."""
    pair.set_state(start)
    differences, theirs, ours, touched = [], [], [], []
    for action in actions:
        flags = pair.step(action)
        theirs.append(flags[0])
        ours.append(flags[1])
        differences.append(pair.difference())
        touched.append(pair.robot_touches())
    free = touched.index(True) if True in touched else len(actions)
    return {
        "steps": len(actions),
        "free_steps": free,
        "free": max(differences[:free], default=0.0),
        "all": max(differences),
        "flags_equal": theirs == ours,
        "flags_unequal_at": [t for t in range(len(actions)) if theirs[t] != ours[t]],
        "successes": sum(theirs),
        "proprioception": pair.proprioception_difference(),  # in the last state
        "steps_below_1e-6": sum(d < 1e-6 for d in differences),
    }


# ---------------------------------------------------------------------------------------------- states around the goal


def boundary_states(task: Task, rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 1 + nq + nv) states on both sides of the goal's boundary.

    A sixth are official init states. In the others each conjunct is made true or nearly true (see `_try`): a joint is put
    around its threshold, an object in, on or beside its target, at heights where it just touches and just does not. Half are kept
    only if the whole goal holds (by our own evaluation, which is then compared with LIBERO's).
    """
    model, data = task.model, mujoco.MjData(task.model)
    targets = {p.args[-1] for p in task.goal}  # drawers are pulled first, and what something else is put on is placed first
    states = []
    for k in range(count):
        official = task.init_states[rng.integers(len(task.init_states))]
        if k % 6 == 0:
            states.append(official)
            continue
        for _attempt in range(60):
            data.time, data.qpos[:], data.qvel[:] = official[0], official[1 : 1 + model.nq], official[1 + model.nq :]
            for predicate in sorted(task.goal, key=lambda p: (p.kind != "joint", p.args[0] not in targets)):
                mujoco.mj_fwdPosition(model, data)
                _try(task, data, predicate, rng)
            mujoco.mj_fwdPosition(model, data)
            shallow = data.ncon == 0 or data.contact.dist.min() > -0.01  # else the next step may explode
            if shallow and (k % 2 == 0 or success(task, data)):
                break
        states.append(np.concatenate([[data.time], data.qpos, data.qvel]))
    return np.array(states)


def _try(task: Task, data: mujoco.MjData, predicate: Predicate, rng: np.random.Generator) -> None:
    """Change the state so that the predicate holds, or nearly holds."""
    if predicate.kind == "joint":
        for address in predicate.qpos:
            offset = rng.choice([0.0, 1e-9, 1e-6, 1e-3, 0.02, 0.1]) * rng.choice([-1.0, 1.0, 1.0])
            data.qpos[address] = predicate.threshold + predicate.sign * offset
        return
    obj = task.objects[predicate.args[0]]
    here = slice(obj.joint_qpos, obj.joint_qpos + 3)
    # In units of the allowed range: mostly inside, sometimes within a hair of the edge, sometimes outside.
    u = rng.uniform(-1.0, 1.0, 3)
    if rng.random() < 0.5:
        u[rng.integers(3)] = rng.choice([-1.0, 1.0]) * rng.choice([0.5, 0.99, 1.0 - 1e-6, 1.0 + 1e-6, 1.01, 1.5])
    body_offset = data.xpos[predicate.body] - data.qpos[here]
    if predicate.kind == "ontop":
        target = data.xpos[predicate.target_body]
        direction = np.array([np.cos(np.pi * u[1]), np.sin(np.pi * u[1])])
        place = target + np.append(0.03 * abs(u[0]) * direction, 0.1 * u[2])
    else:
        centre, rot = data.site_xpos[predicate.site], data.site_xmat[predicate.site].reshape(3, 3)
        size = np.array(predicate.size)
        if predicate.kind == "contain":
            place = centre + u * np.abs(rot @ size) + np.array([0.0, 0.0, -0.01 if u[2] < -0.99 else 0.0])
        else:
            low, high = size[2] - 0.005, size[2] + 0.10
            place = centre + rot.T @ np.append(u[:2] * size[:2], (low + high) / 2 + u[2] * (high - low) / 2)
    data.qpos[here] = place - body_offset
    if predicate.contact is None or rng.random() < 0.2:
        return
    # The flag also asks for contact: scan the heights for the last one that touches, and take it or the one above.
    heights = place[2] + np.linspace(-0.08, 0.08, 33)
    touching = []
    for z in heights:
        data.qpos[here] = np.append(place[:2], z) - body_offset
        mujoco.mj_fwdPosition(task.model, data)
        touching.append(predicate_holds(predicate, data, task.model))
    if any(touching):
        last = len(touching) - 1 - touching[::-1].index(True)
        z = heights[min(last + int(rng.random() < 0.3), len(heights) - 1)]
        data.qpos[here] = np.append(place[:2], z) - body_offset


def flag_comparison(pair: Pair, states: np.ndarray) -> dict:
    """Compare every conjunct's flag and success in each state, and success after one control step from it."""
    names = [p.name for p in pair.task.goal] + ["success"]
    counts = {name: {"true": 0, "false": 0, "unequal": 0} for name in (*names, "success after a step")}
    successful = 0
    for state in states:
        pair.set_state(state)
        flags = list(zip(names, *pair.flags(), strict=True))
        successful += flags[-1][1]
        flags.append(("success after a step", *pair.step(np.array([0.1, -0.1, 0.1, 0.0, 0.0, 0.1, 1.0]))))
        for name, theirs, ours in flags:
            counts[name]["true" if theirs else "false"] += 1
            counts[name]["unequal"] += theirs != ours
    return {"states": len(states), "successful_states": successful, "predicates": counts}


# ---------------------------------------------------------------------------------------------- backends


class Scripted:
    """The scripted demonstrator as a `common.rollout.Policy`. Pattern k is attempt k, whose strategy and noise depend on k alone.

    It reads the states, of whatever simulator, as MuJoCo sees them: put into an mjData, which finds poses and contacts anew.
    """

    def __init__(self, env, ways: list[Strategy], noise: float):
        self.env, self.ways, self.noise = env, ways, noise
        self.data, self.running = mujoco.MjData(env.task.model), {}

    def begin(self, envs: np.ndarray) -> None:
        for i in envs:
            self.running.pop(i, None)

    def __call__(self, obs, patterns: np.ndarray) -> np.ndarray:
        task, data, actions = self.env.task, self.data, np.zeros((len(patterns), 7))
        for i, (k, state) in enumerate(zip(patterns, self.env.get_state(), strict=True)):
            if i not in self.running:
                self.running[i] = Demonstrator(task, self.ways[k % len(self.ways)], self.noise, np.random.default_rng(int(k)))
            data.time, data.qpos[:], data.qvel[:] = state[0], state[1 : 1 + task.model.nq], state[1 + task.model.nq :]
            mujoco.mj_fwdPosition(task.model, data)
            actions[i] = self.running[i].act(data)
        return actions


def load_policy(run: Path, assets: str | None) -> tuple[Task, dict, Callable, list[int]]:
    """Of a finished run of an RL script: its task, what its environment is made with, what makes its policy for an environment, and its
    patterns."""
    import diffusion_ppo  # late: they bring TensorBoard, which the processes of the other parts do without
    import dlr_discover
    import gaussian_ppo

    scripts = {"dlr_discover": dlr_discover, "gaussian_ppo": gaussian_ppo, "diffusion_ppo": diffusion_ppo}
    try:
        config, summary = read_finished(run)
        script = scripts[config["script"]]
        patterns = [row["pattern"] for row in summary["per_pattern"]]
    except (UserError, KeyError) as error:
        raise UserError(f"{run} is not the folder of a finished run of {', '.join(f'{name}.py' for name in scripts)}") from error
    args = stored_args(script.Args, config["args"])
    checkpoint = load_checkpoint(run / "checkpoint.pt", config["script"])

    def make(env):
        encoder = obs_encoder(args, env.single_observation_space, task)
        if script is diffusion_ppo:
            agent = script.Agent(args, encoder)
        else:
            agent = script.Agent(encoder, *([checkpoint["num_patterns"]] if script is dlr_discover else []), args.hidden)
        try:
            agent.load_state_dict(checkpoint["agent"])
        except RuntimeError as error:
            raise UserError(f"{run} was made by another version of {config['script']}.py, with other weights; train it again") from error
        return script.ChunkPolicy(agent, env.num_envs, args.execute) if script is diffusion_ppo else agent.act

    task = load_task(checkpoint["name"], assets, config["assets"], run)
    return task, observation(args), make, patterns


def compare_backends(
    task: Task, make_policy: Callable, jobs: list[tuple[int, int]], num_envs: int, device: str, tick: Callable, **options
) -> dict:
    """Closed loop with the same policy on CPU cores and on Warp: how often each succeeds, and Warp's rate minus the CPU's.

    `make_policy(env)`; `jobs`: (pattern, official init state or -1 for a training state) for each episode; `tick(episode)` is called as
    each ends; `options` of the environments.
    """
    wins = {}
    for backend in ("cpu", "warp"):
        where = {"backend": backend, "device": device if backend == "warp" else "cpu"}
        env = make_env(task, min(num_envs, len(jobs)), seed=0, autoreset_mode=AutoresetMode.DISABLED, **where, **options)
        wins[backend] = sum(e.success for e in roll_out(env, make_policy(env), jobs, tick))
        env.close()
    interval = newcombe_interval((wins["warp"], wins["cpu"]), (len(jobs), len(jobs)))
    return {"episodes": len(jobs), **wins, "difference": (wins["warp"] - wins["cpu"]) / len(jobs), "interval": interval}


def backends(args: Args) -> list[dict]:
    """A row for each task and policy, see the module's docstring; written to --json after each."""
    from common.libero.warp_env import find_device

    find_device(args.device)
    jobs, rows, progress = [], [], Progress()
    for run in args.runs:
        task, options, make, patterns = load_policy(run, args.assets)
        jobs.append((task, run.name, make, [(patterns[k % len(patterns)], -1) for k in range(args.episodes)], options))
    for name in args.tasks or ([] if args.runs else BACKEND_TASKS):
        task = load_task(name, args.assets)
        ways, states = strategies(task), len(task.init_states)
        tries = [(k // states + k, k % states) for k in range(args.episodes)]  # each state with another strategy every time
        jobs.append((task, "scripted", lambda env, ways=ways: Scripted(env, ways, 0.1), tries, {}))
    for task, policy, make, tries, options in jobs:
        progress.stage(f"{task.id}, {policy}", 2 * len(tries))
        row = compare_backends(
            task, make, tries, args.num_envs, args.device, lambda e: progress.update(1), max_steps=args.max_steps, **options
        )
        rows.append({"task": task.id, "policy": policy, **row})
        if args.json is not None:
            write_json(args.json, {"device": args.device, "versions": versions(), "backends": rows})
    progress.close()
    return rows


def report_backends(rows: list[dict], limit: float = 0.03) -> str:
    """The results as markdown, and the tasks whose success differs by more than `limit`."""
    lines = ["| task | policy | episodes | success: CPU | Warp | difference, points |", "|---" * 6 + "|"]
    for r in rows:
        low, high = r["interval"]
        difference = f"{100 * r['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        rates = [f"{r[backend] / r['episodes']:.1%}" for backend in ("cpu", "warp")]
        lines.append(f"| {' | '.join([r['task'], r['policy'], str(r['episodes']), *rates, difference])} |")
    beyond = [f"{r['task']} ({r['policy']})" for r in rows if abs(r["difference"]) > limit]
    lines += ["", f"Differences of more than {100 * limit:.0f} points: {', '.join(beyond) or 'none'}."]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- one task, all tasks


def demonstrations(task: Task, count: int = 2) -> list[Episode]:
    """Scripted demonstrations as the data-set command would store them; none where the demonstrator has no strategy."""
    from common.demos import collect

    try:
        return collect(task, count, replayable=True, progress=False)
    except UserError:
        return []


def compare(task_id: str, parts: list[str], args: Args) -> dict:
    """All numbers of one task, by part."""
    start, result = time.time(), {}
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):  # LIBERO and robosuite print
        if "demonstrations" in parts:
            result["demonstrations"] = None
            if not (episodes := demonstrations(load_task(task_id, args.assets))) and parts == ["demonstrations"]:
                return result
        pair = Pair(task_id, args.assets)
        task = pair.task
        result |= {"name": task.name, "goal": [[p.name, *p.args] for p in task.goal], "model_differences": pair.model_differences()}
        if "trajectories" in parts:
            starts = {k: (task.init_states[k], random_actions(np.random.default_rng(k), args.steps)) for k in range(3)}
            result["trajectories"] = {f"random {k}": trajectory(pair, *start) for k, start in starts.items()}
        if "flags" in parts:
            result["flags"] = flag_comparison(pair, boundary_states(task, np.random.default_rng(task.index), args.states))
        if "demonstrations" in parts and episodes:
            replays = [trajectory(pair, e.states[0], e.actions) for e in episodes]
            last = np.concatenate([e.states[-5:] for e in episodes])
            result["demonstrations"] = {"replays": replays, "flags": flag_comparison(pair, last)}
        pair.libero.close()
        pair.env.close()
    return {**result, "seconds": round(time.time() - start, 1)}


def _job(job):
    task_id, parts, args = job
    try:
        return task_id, compare(task_id, parts, args)
    except UserError:
        raise
    except Exception as error:  # one task must not end a run of an hour
        return task_id, {"error": f"{type(error).__name__}: {error}"}


def report(tasks: dict[str, dict]) -> str:
    """The results as markdown."""
    lines = []
    shown = {t: r["demonstrations"] for t, r in tasks.items() if r.get("demonstrations")}
    rows = [(t, name, r) for t, result in tasks.items() for name, r in result.get("trajectories", {}).items()]
    replays = [(t, f"demonstration {k}", r) for t, demo in shown.items() for k, r in enumerate(demo["replays"])]
    rows += replays
    if rows:
        lines = ["| task | trajectory | steps | free steps | difference: free | all | flags equal | successes |", "|---" * 8 + "|"]
        for task_id, name, r in rows:
            equal = "yes" if r["flags_equal"] else f"no, at {r['flags_unequal_at']}"
            numbers = f"{r['steps']} | {r['free_steps']} | {r['free']:.1e} | {r['all']:.1e}"
            lines.append(f"| {task_id} | {name} | {numbers} | {equal} | {r['successes']} |")
        free, largest = (max(r[key] for _, _, r in rows) for key in ("free", "all"))
        steps, below = (sum(r[key] for _, _, r in rows) for key in ("steps", "steps_below_1e-6"))
        unequal = sum(len(r["flags_unequal_at"]) for _, _, r in rows)
        lines += [
            "",
            f"{len(rows)} trajectories of {len({t for t, _, _ in rows})} tasks. Largest qpos difference: {free:.1e} while the robot has "
            f"touched nothing, {largest:.1e} over all steps, of which {below / steps:.1%} are below 1e-6. "
            f"Success flags equal at {steps - unequal} of {steps} steps. Robot observations at the end of those that agree to 1e-6 "
            f"differ by {max((r['proprioception'] for _, _, r in rows if r['all'] < 1e-6), default=np.nan):.1e} at most.",
            "",
        ]
    if replays:
        lost = [f"{t}, {name}" for t, name, r in replays if not r["successes"]]
        lines += [
            f"LIBERO's environment comes to success in {len(replays) - len(lost)} of {len(replays)} demonstrations of {len(shown)} tasks"
            f"{', but not in ' if lost else ''}{'; '.join(lost)}.",
            "",
        ]
    for title, flagged in (
        ("boundary", {t: r["flags"] for t, r in tasks.items() if "flags" in r}),
        ("demonstrations' last", {t: demo["flags"] for t, demo in shown.items()}),
    ):
        if not flagged:
            continue
        lines += ["| flag | tasks | LIBERO says: true | false | unequal |", "|---" * 5 + "|"]
        for name in sorted({name for r in flagged.values() for name in r["predicates"]}):
            counts = [r["predicates"][name] for r in flagged.values() if name in r["predicates"]]
            true, false, unequal = (sum(c[key] for c in counts) for key in ("true", "false", "unequal"))
            lines.append(f"| {name} | {len(counts)} | {true} | {false} | {unequal} |")
        wrong = [t for t, r in flagged.items() if any(c["unequal"] for c in r["predicates"].values())]
        states, solved = [r["states"] for r in flagged.values()], sum(r["successful_states"] > 0 for r in flagged.values())
        lines += [
            "",
            f"{len(flagged)} tasks, {min(states)} to {max(states)} {title} states each; in {solved} tasks some "
            f"are successful. Flags differ in {len(wrong)} tasks{': ' if wrong else ''}{', '.join(wrong)}.",
            "",
        ]
    models = [t for t, r in tasks.items() if r.get("model_differences")]
    listed = f"{': ' if models else ''}{', '.join(models)}"
    lines.append(f"Compiled models differ from LIBERO's (textures aside) in {len(models)} of {len(tasks)} tasks{listed}.")
    return "\n".join([*lines, *(f"FAILED {t}: {r['error']}" for t, r in tasks.items() if "error" in r)])


def main() -> None:
    import tyro

    args = tyro.cli(Args)
    if args.suite is not None and args.suite not in SUITES:
        raise UserError(f"unknown suite {args.suite!r}; suites are {', '.join(SUITES)}")
    args.assets = str(find_assets(args.assets))
    if "backends" in args.part:
        if args.part != ["backends"] or args.suite is not None or min(args.episodes, args.num_envs) < 1:
            raise UserError("--part backends stands alone, takes --tasks and no --suite, and --episodes and --num-envs of at least 1")
        print(report_backends(backends(args)))
        return
    given = [f"{suite}/{index}" for suite, index in map(resolve, args.tasks)]
    everything = [f"{suite}/{i}" for suite in SUITES for i in range(len(task_names()[suite]))]
    parts = {t: [] for t in given or everything if args.suite is None or t.startswith(args.suite + "/")}
    for task_id, wanted in parts.items():
        wanted += [part for part in PARTS if part in args.part and (given or part != "trajectories" or task_id in TRAJECTORY_TASKS)]
    parts = {t: wanted for t, wanted in parts.items() if wanted}
    if not parts:
        raise UserError(f"no task to compare: --suite {args.suite} has none of --tasks {' '.join(args.tasks)}")

    settings = {"steps": args.steps, "states": args.states, "versions": versions()}
    settings["versions"].pop("revision")
    tasks: dict[str, dict] = {}
    if args.json is not None and args.json.exists():
        try:
            stored = json.loads(args.json.read_text())
            tasks = {t: r for t, r in stored["tasks"].items() if stored["settings"] == settings and "error" not in r}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(f"{args.json} is not a file that this command wrote; move it away or choose another --json") from error
    missing = {t: [part for part in wanted if part not in tasks.get(t, {})] for t, wanted in parts.items()}
    jobs = [(t, wanted, args) for t, wanted in missing.items() if wanted]

    progress = Progress()
    progress.stage("fidelity", len(parts), done=len(parts) - len(jobs))
    processes = min(args.processes or usable_cores(), max(1, len(jobs)))
    # Fresh processes: LIBERO changes numpy's global generator and leaks a model at every reset.
    with multiprocessing.get_context("spawn").Pool(processes, share_cores, (processes,), maxtasksperchild=8) as pool:
        for task_id, result in pool.imap_unordered(_job, jobs):
            tasks[task_id] = tasks.get(task_id, {}) | result
            progress.update(1, f"{task_id} {result.get('seconds', '')} s {result.get('error', '')}")
            if args.json is not None:
                write_json(args.json, {"settings": settings, "revision": versions()["revision"], "tasks": dict(sorted(tasks.items()))})
    progress.close()
    tasks = {t: tasks[t] for t in parts}
    print(report(tasks))
    if any("error" in r for r in tasks.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
