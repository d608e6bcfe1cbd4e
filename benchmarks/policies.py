"""How fast anyone's policy is evaluated: `vla_finetune.py --policy` beside the usual loop, the same small policy in all of them.

    python -m benchmarks.policies --json docs/results/policies.json

- callable: 200 episodes (50 of each of four tasks) of a Python function, many environments at once;
- server: the same of a server that speaks openpi's protocol, which this benchmark starts (needs: pip install websockets msgpack);
- usual: LIBERO's own OffScreenRenderEnv under GL, one environment, one episode after the other, both pictures drawn in every step, as
  openpi's and OpenVLA's scripts do; a few episodes, for they take minutes each without a GPU.
The policy moves the hand over the table and looks on, so that every episode lasts to the step cap and all ways do equal work; it costs
nothing, so what is measured is what a policy would wait for. LIBERO's reset, which rebuilds the scene, counts: it is in that loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from benchmarks.throughput import find_gl, gl_driver
from common import policies
from common.cli import Count, Range, UserError, check_ranges, run_command, usable_cores
from common.libero.step import NO_OP
from common.runs import versions, write_json
from common.suites import expand, max_steps

ROOT = Path(__file__).resolve().parent.parent
PORT = 8571


@dataclasses.dataclass
class Args:
    """Episodes an hour of a callable, a server and the usual loop."""

    tasks: tuple[str, ...] = ("libero_goal/0", "libero_goal/1", "libero_goal/7", "libero_goal/8")
    """task ids"""
    trials: Annotated[int, Range(1, 50)] = 50
    """episodes a task"""
    usual_episodes: Count = 2
    """episodes of the usual loop, of the first task"""
    num_envs: Count = 16
    """environments at once"""
    renderer: Literal["warp", "gl"] = "warp"
    """what draws the pictures of the callable and the server; the usual loop's are GL's"""
    json: Path | None = None
    """also write all numbers here"""
    serve: bool = False
    """be the server (for the benchmark itself)"""

    def __post_init__(self) -> None:
        check_ranges(self)


def act(observations: dict) -> np.ndarray:
    """Over the table, and there in a circle: (n, 10, 7)."""
    state = np.asarray(observations["observation/state"])
    brightness = observations["observation/image"].reshape(len(state), -1).mean(1) / 255  # looks at what it is shown
    actions = np.zeros((len(state), 10, 7))
    actions[..., :3] = 0.2 * np.clip((np.array([0.0, 0.0, 1.15]) - state[:, None, :3]) / 0.05, -1, 1)
    actions[..., 5], actions[..., 6] = 0.05 * brightness[:, None], -1
    return actions


def serve() -> None:
    """`act` behind openpi's protocol, a thread a connection."""
    import msgpack
    from websockets.sync.server import serve as listen

    def handle(connection) -> None:
        connection.send(msgpack.packb({"policy": "benchmarks.policies"}))
        for request in connection:
            observation = msgpack.unpackb(request, object_hook=policies.unpack_array)
            batch = {name: value[None] for name, value in observation.items() if isinstance(value, np.ndarray)}
            connection.send(msgpack.packb({"actions": act(batch)[0]}, default=policies.pack_array))

    with listen(handle, "127.0.0.1", PORT, compression=None, max_size=None) as server:
        print("ready", flush=True)
        server.serve_forever()


@contextlib.contextmanager
def server():
    """The server, in a process of its own; yields its address."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.policies", "--serve"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout.readline() != "ready\n":
            raise UserError(f"the server does not start; it needs: {policies.OPTIONAL}")
        yield f"ws://127.0.0.1:{PORT}"
    finally:
        process.terminate()
        process.wait()


def evaluate(args: Args, policy: str) -> dict:
    """`vla_finetune.py --policy`: episodes, and the seconds that they took (compiling tasks, the check and videos are not counted)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "vla_finetune.py", "--eval-only", "--policy", policy, "--trials", str(args.trials), "--videos", "0"]
        command += ["--num-envs", str(args.num_envs), "--renderer", args.renderer, "--run-folder", folder, "--tasks", *args.tasks]
        subprocess.run(command, cwd=ROOT, check=True)
        (run,) = Path(folder).iterdir()
        rows = json.loads((run / "results.json").read_text())["tasks"]
    return {"episodes": sum(row["trials"] for row in rows), "seconds": sum(row["seconds"] for row in rows)}


def usual(args: Args) -> dict:
    """LIBERO's own environment in the usual loop, in a process of its own, which GL wants."""
    gl, reason = find_gl()
    if gl is None:
        raise UserError(f"the usual loop needs GL: {reason}")
    code = f"from benchmarks.policies import usual_loop; usual_loop({expand([args.tasks[0]])[0]!r}, {args.usual_episodes})"
    environment = os.environ | {"MUJOCO_GL": gl, "LP_NUM_THREADS": str(usable_cores())}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"the usual loop failed: {(result.stderr.strip() or '?').splitlines()[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


def usual_loop(task_id: str, episodes: int) -> None:
    from common.libero.assets import find_assets
    from common.libero.original import construct_libero_env
    from common.libero.tasks import load_task
    from common.suites import find_task

    task, size = load_task(task_id), policies.DRAWN
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):  # LIBERO and robosuite print
        options = dict(use_camera_obs=True, has_offscreen_renderer=True, camera_heights=size, camera_widths=size)
        env = construct_libero_env(find_task(task_id), find_assets(), **options)
        env.seed(0)
        start, successes = time.time(), 0
        for episode in range(episodes):
            env.reset()
            observation = env.set_init_state(task.init_states[episode])
            for _ in range(10):
                observation, *_ = env.step(NO_OP)
            plan: list[np.ndarray] = []
            for _ in range(max_steps(task.suite)):
                names = ("agentview_image", "robot0_eye_in_hand_image")
                pictures = policies.resize(np.stack([observation[name][::-1, ::-1] for name in names]), policies.SHOWN)
                if not plan:
                    robot = [observation[f"robot0_{name}"] for name in ("eef_pos", "eef_quat", "gripper_qpos")]
                    state = np.concatenate([robot[0], robot[1][:3], robot[2]])  # the policy reads the position only
                    plan = list(act({"observation/image": pictures[:1], "observation/state": state[None]})[0, :5])
                observation, _, done, _ = env.step(plan.pop(0))
                if done:
                    successes += 1
                    break
        seconds, driver = time.time() - start, gl_driver()
        env.close()
    print(json.dumps({"episodes": episodes, "seconds": seconds, "successes": successes, "driver": driver}), flush=True)
    os._exit(0)  # robosuite's EGL context raises, with much text, when the interpreter ends


def table(rows: dict[str, dict]) -> str:
    """Markdown: episodes an hour, and how many times the usual loop that is."""
    hourly = {name: 3600 * row["episodes"] / row["seconds"] for name, row in rows.items()}
    lines = ["| | episodes | seconds | episodes an hour | against the usual loop |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        times = f"{hourly[name] / hourly['usual loop']:.1f} x" if "usual loop" in rows else ""
        lines.append(f"| {name} | {row['episodes']} | {row['seconds']:.0f} | {hourly[name]:.0f} | {times} |")
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args)
    if args.serve:
        return serve()
    if missing := [name for name in ("websockets", "msgpack") if importlib.util.find_spec(name) is None]:
        raise UserError(f"{missing[0]} is not installed; run: {policies.OPTIONAL}")
    rows = {"callable": evaluate(args, "benchmarks.policies:act")}
    with server() as address:
        rows["server"] = evaluate(args, address)
    rows["usual loop"] = usual(args)
    print(table(rows))
    if args.json:
        settings = {"tasks": args.tasks, "num_envs": args.num_envs, "renderer": args.renderer, "cores": usable_cores()}
        write_json(args.json, {"rows": rows, "settings": settings, "versions": versions()})


if __name__ == "__main__":
    run_command(main)
