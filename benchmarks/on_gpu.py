"""What only a GPU can tell, in order of value, within a few minutes: the steps of benchmarks/on_gpu.sh.

Each step is a command of its own with a time limit; what it has found by then is kept in OUT/STEP.json, and OUT/on_gpu.json sums up after
every step, so that a machine that goes away takes nothing along. A step that fails or runs out of time stops no other one.

    python -m benchmarks.on_gpu --out DIR                # on a machine with a GPU
    python -m benchmarks.on_gpu --out DIR --dry-run      # all of it, tiny, on Warp's CPU device (the RL script on the CPU backend)
    python -m benchmarks.on_gpu --prepare 90             # no GPU: compile the tasks and, for sm_90, Warp's kernels into the cache
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

import tyro

from common.cli import UserError, run_command
from common.runs import Progress, read_finished, versions, write_json

TASKS = ["libero_90/9", "libero_goal/0", "libero_spatial/0"]  # the first is the default, the second the tests'
WORLDS = [256, 1024, 4096, 8192]
PEAK = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362}  # TFLOP/s, bfloat16, dense, from NVIDIA's data sheets


@dataclasses.dataclass
class Args:
    """Measure on a GPU what is to be measured there."""

    out: Path = Path("on_gpu")
    """folder of the results"""
    seconds: float = 470.0
    """for all steps together"""
    dry_run: bool = False
    """every step, tiny, without a GPU"""
    prepare: int | None = None
    """measure nothing: compile for this compute capability (H100: 90) what the steps will run"""


@dataclasses.dataclass
class Step:
    """A command (words after `python`), how long it may take, and what reads its result when it has ended, in whatever way."""

    name: str
    seconds: float
    command: str
    result: Callable[[], dict]


def steps(args: Args) -> list[Step]:
    """In order of value."""
    out, dry = args.out, args.dry_run
    task, both = ("libero_goal/0", ["libero_goal/0"]) if dry else (TASKS[0], TASKS[:2])
    tests = "tests/test_warp_env.py tests/test_pixels.py -k cuda"
    sizes = f"--worlds {' '.join(map(str, WORLDS))} --num-envs 4 --blocks 2"
    if dry:
        sizes = "--worlds 2 --num-envs 1 --steps 1 --blocks 1 --demonstrations 1"
    device = "warp-cpu" if dry else "cuda"
    tasks = " ".join([task] if dry else TASKS)
    pixels = f"--pixels --device {device} --task {task}"
    if dry:
        job = "--backend cpu --device cpu --num-patterns 4 --num-demos 24 --num-envs 8 --discover-steps 60 --learn-epochs 200 --hidden 128 "
        job += "--num-steps 8 --total-steps 64 --num-minibatches 2 --eval-episodes 1 --corpus-episodes 1 --no-videos --corpus-images 32"
        backends, vla = "--episodes 1 --num-envs 1 --max-steps 2 --device cpu", "--steps 2 --batch-size 2 --num-workers 0 --device cpu"
    else:
        job = "--num-patterns 8 --device cuda --backend warp --num-envs 1024 --num-steps 32 --total-steps 1000000 --stop-success 0.95 "
        job += "--corpus-images 64"
        backends, vla = "--episodes 50 --num-envs 50", "--steps 150 --size base --batch-size 512 --num-workers 6 --device cuda"
    corpus = f"{out}/runs/*dlr_discover*/corpus.hdf5"
    read = lambda name: lambda: json.loads((out / f"{name}.found.json").read_text())  # noqa: E731
    found = [
        Step("tests", 90, f"-m pytest -q -p no:cacheprovider {tests} --junitxml {out}/tests.xml", lambda: read_tests(out / "tests.xml")),
        Step(
            "throughput", 150, f"-m benchmarks.throughput --device {device} --task {tasks} {sizes} --json {out}/throughput.found.json",
            read("throughput"),
        ),
        Step("pictures", 50, f"-m benchmarks.throughput {pixels} {sizes} --json {out}/pictures.found.json", read("pictures")),
        Step("dlr_discover", 240, f"dlr_discover.py --task {task} {job} --run-folder {out}/runs", lambda: read_job(out / "runs")),
        Step(
            "backends", 60, f"-m benchmarks.fidelity --part backends --tasks {' '.join(both)} {backends} --json {out}/backends.found.json",
            read("backends"),
        ),
    ]  # fmt: skip
    for name, more in (("vla", ""), ("vla_compiled", "" if dry else " --compile")):  # --compile is CUDA's
        command = f"vla_pretrain.py --data {corpus} {vla}{more} --val-fraction 0 --run-folder {out}/{name}"
        found.append(Step(name, 45, command, lambda name=name: read_vla(out / name)))
    for step in found if dry else []:
        step.seconds *= 10  # of what is measured, nothing: CI's cores may be slow, and have kernels to compile
    return found


def read_tests(path: Path) -> dict:
    suite = xml.etree.ElementTree.parse(path).getroot().find("testsuite")
    return {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}


def read_job(folder: Path) -> dict:
    """The end of the run in `folder`: how good, how long; and what its rollouts and updates took."""
    (run,) = folder.glob("*dlr_discover*")
    times = {name: value for name, value in read_means(run).items() if name.endswith("_seconds")}
    _, summary = read_finished(run)
    names = ("success_rate", "alive", "leakage", "recovery", "stages", "env_steps", "wall_seconds")
    return {name: summary[name] for name in names} | {"iteration": times}


def read_means(run: Path) -> dict[str, float]:
    """The mean of each of a run's charts over its logged steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("charts/")]
    return {name: sum(e.value for e in events.Scalars(name)) / len(events.Scalars(name)) for name in names}


def read_vla(folder: Path) -> dict:
    (run,) = folder.glob("*vla_pretrain*")
    _, summary = read_finished(run)
    name = gpu()["name"] or ""
    peak = next((value for key, value in PEAK.items() if all(word in name for word in key.split())), None)
    found = {key: summary[key] for key in ("samples_per_second", "tflops_per_second", "parameters")}
    return found | {"of_bf16_peak": found["tflops_per_second"] / peak if peak else None}


def gpu() -> dict:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return {"name": None, "driver": None, "memory": None}
    return dict(zip(("name", "driver", "memory"), (part.strip() for part in line.split(",")), strict=True))


def perform(step: Step, out: Path, seconds: float) -> dict:
    """Run a step for at most so many seconds; returns its row, which is in OUT/STEP.json, too."""
    began, limit, code = time.monotonic(), min(step.seconds, seconds), None
    command = f"exec {shlex.quote(sys.executable)} {step.command}"  # bash: it finds what * stands for
    with open(out / f"{step.name}.log", "wb") as log:
        child = subprocess.Popen(["bash", "-c", command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(limit)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and what it has started
            child.wait()
    row = {"step": step.name, "command": f"python {step.command}", "seconds": round(time.monotonic() - began, 1), "exit_code": code}
    try:
        row["result"] = step.result()
    except Exception as error:  # of many kinds: the step did not get so far
        row["result"] = None
        lines = (out / f"{step.name}.log").read_text(errors="replace").strip().splitlines()
        row["error"] = f"stopped after {limit:.0f} s" if code is None else lines[-1][:300] if lines else type(error).__name__
    write_json(out / f"{step.name}.json", row)
    return row


def report(rows: list[dict]) -> str:
    lines = ["| step | seconds | ended | result |", "|---|---|---|---|"]
    for row in rows:
        ended = {None: "stopped", 0: "well"}.get(row["exit_code"], f"exit code {row['exit_code']}")
        result = row.get("error") or f"{row['step']}.json"
        lines.append(f"| {row['step']} | {row['seconds']:.0f} | {ended} | {result} |")
    return "\n".join(lines)


def prepare(arch: int) -> None:
    """Compile tasks, and Warp's kernels for CUDA devices of an architecture, into the cache, without such a device.

    The steps' environments are made, and step, on Warp's CPU device, and it is noted which modules are launched with how many threads a
    block, which is what a CUDA device will look for.
    """
    import warp as wp

    from common.libero import load_task, make_env
    from common.libero.warp_start import start_warp

    start_warp()
    used: dict[tuple, None] = {}

    def watch(launch: Callable) -> Callable:
        def noted(kernel, *args, **kwargs):
            used[kernel.module, kwargs.get("block_dim", 256)] = None
            return launch(kernel, *args, **kwargs)

        return noted

    wp.launch, wp.launch_tiled = watch(wp.launch), watch(wp.launch_tiled)
    progress = Progress()
    for task in TASKS:
        env = make_env(load_task(task), 2, backend="warp", device="cpu", obs="pixels", image_size=32, settle_steps=0)
        env.reset(seed=0)
        env.step(env.action_space.sample() * 0)
        env.close()
    progress.stage(f"kernels for sm_{arch}", len(used))
    for module, block_dim in used:
        module.options["block_dim"] = block_dim
        wp.compile_aot_module(module, arch=arch)
        progress.update(1, module.name)
    progress.close()


def main() -> None:
    args = tyro.cli(Args)
    if args.prepare is not None:
        return prepare(args.prepare)
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.glob("*.json")):
        raise UserError(f"{args.out} holds results; choose another --out")
    if args.dry_run:
        os.environ["RL_DATA_ENGINE_QUICK_KERNELS"] = "1"
    end, rows, progress = time.monotonic() + args.seconds, [], Progress()
    for step in steps(args):
        left = end - time.monotonic()
        if left < 5:
            rows.append({"step": step.name, "seconds": 0.0, "exit_code": None, "result": None, "error": "no time was left"})
            continue
        progress.say(f"{step.name}, {min(left, step.seconds):.0f} s at most")
        rows.append(perform(step, args.out, left))
        write_json(args.out / "on_gpu.json", {"gpu": gpu(), "versions": versions(), "steps": rows})
    print(report(rows))
    if failed := [row["step"] for row in rows if row["exit_code"] != 0]:
        raise UserError(f"{len(failed)} of {len(rows)} steps did not end well ({', '.join(failed)}): see their logs in {args.out}")


if __name__ == "__main__":
    run_command(main)
