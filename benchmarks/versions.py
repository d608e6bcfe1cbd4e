"""Which MuJoCo? The same measurements under several releases, in Python environments that differ in nothing else.

    python -m benchmarks.versions --pythons VENV337/bin/python VENV381/bin/python VENV400/bin/python --json docs/results/versions.json
    python -m benchmarks.versions --json docs/results/versions.json      # prints the tables of docs/versions.md from the file
    python -m benchmarks.versions --check libero_goal/0                  # this interpreter's release alone: parity, in seconds

Each interpreter runs one process, which is asked by lines of JSON; they work in turn, never at the same time.

  settle   Official init states start objects up to 11 cm in the air. Where do they rest after two seconds of no-ops: how far aside of
           their start and how far tilted, and how far from where they rest under the first interpreter's release?
  success  The scripted demonstrator from official init states with action noise, each state with one strategy in turn. The strategies
           were rehearsed under the second release (today's default), and all releases are given the same.
  replay   What succeeded there is played back, actions only, under every release.
  parity   Our environment against LIBERO's own under the same release: benchmarks.fidelity's trajectories and flags.
  speed    Our control step and 25 bare mj_steps (benchmarks.throughput's `ours` and `limit`), under small random motions and amid each
           release's own demonstrations. CPU time of blocks of 20 steps; the releases take turns, block by block, in turning order;
           the ratios are to the second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gymnasium.vector import AutoresetMode

from benchmarks import fidelity
from benchmarks.throughput import Ours, quartiles, spread
from common.cli import UserError, atomic_path, run_command
from common.demos import Attempt, Strategy, perform, strategies
from common.libero import load_task, make_env
from common.libero.assets import find_assets
from common.libero.step import NO_OP
from common.metrics import wilson_interval
from common.runs import Progress, versions

PARTS = ("settle", "success", "replay", "parity", "speed")
# Chosen before anything was measured: every suite, every predicate, and what is known to be delicate (the bowl on the ramekin, cans,
# margins of the microwave's door).
TASKS = [
    *("libero_spatial/0", "libero_spatial/5", "libero_object/0", "libero_object/6", "libero_goal/0", "libero_goal/7"),
    *("libero_10/2", "libero_10/3", "libero_90/9", "libero_90/20", "libero_90/33", "libero_90/39"),
]
SPEED_TASKS = ["libero_spatial/0", "libero_object/0", "libero_90/9"]
PARITY_TASKS = ["libero_spatial/0", "libero_goal/7", "libero_90/39"]
NUM_ENVS, STEPS, BLOCKS = 8, 20, 10  # of speed


@dataclasses.dataclass
class Args:
    """Compare releases of MuJoCo: settling, success, replay, parity with LIBERO, speed."""

    pythons: list[Path] = dataclasses.field(default_factory=list)
    """interpreters of environments with all requirements and one MuJoCo each, the oldest first; none: print what --json holds"""
    tasks: list[str] = dataclasses.field(default_factory=lambda: list(TASKS))
    """task ids (speed and parity: those of them that docs/versions.md names, or else all)"""
    parts: list[str] = dataclasses.field(default_factory=lambda: list(PARTS))
    """what to measure: settle, success, replay (needs success in the same run), parity, speed (needs success, too)"""
    init_states: int = 20
    """official init states a task, evenly chosen"""
    noise: float = 0.1
    """standard deviation of the demonstrator's action noise"""
    check: str | None = None
    """a task: only see whether our environment does what LIBERO's own does, under the MuJoCo of this interpreter; an error if not"""
    json: Path | None = None
    """write the numbers here, after every task"""
    assets: str | None = None
    """LIBERO's asset folder, or standin (default: as everywhere)"""


# ---------------------------------------------------------------------------------------------- in a process of each release


class Worker:
    """Answers requests under the release that this process runs."""

    def __init__(self, assets: str):
        self.assets = assets

    def versions(self) -> dict:
        import importlib.metadata

        found = versions()
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found |= {name: importlib.metadata.version(name) for name in ("mujoco-warp", "warp-lang")}
        return found

    def strategies(self, task: str) -> list[dict]:
        return [strategy.factors for strategy in strategies(load_task(task, self.assets))]

    def settle(self, task: str, states: list[int]) -> dict:
        """Of each state and free object (or articulated joint): where it rests, and how far that is from its start."""
        task = load_task(task, self.assets)
        objects = {o.name: o.joint_qpos for o in task.objects.values() if o.joint_qpos is not None}
        env = make_env(task, len(states), settle_steps=0, autoreset_mode=AutoresetMode.DISABLED)
        env.reset(options={"init_state": states})
        seen = []
        for step in range(42):
            if step in (0, 40, 41):
                seen.append(env.get_state()[:, 1:])
            env.step(np.tile(NO_OP, (len(states), 1)))
        env.close()
        start, rest, later = (np.stack([s[:, a : a + 7] for a in objects.values()], 1) for s in seen)
        upright = [axes(s[..., 3:]) for s in (start, rest)]
        return {
            "objects": list(objects),
            "position": rest[..., :3].round(5).tolist(),
            "aside": np.linalg.norm((rest - start)[..., :2], axis=-1).round(5).tolist(),
            "tilt": np.degrees(np.arccos(np.clip((upright[0] * upright[1]).sum(-1), -1, 1))).round(2).tolist(),
            "speed": (20 * np.linalg.norm((later - rest)[..., :3], axis=-1)).round(5).tolist(),
        }

    def success(self, task: str, factors: list[dict], states: list[int], noise: float, file: str) -> dict:
        """Attempts, the successful of which go into `file` for `replay` and `speed`."""
        task, ways = load_task(task, self.assets), [Strategy(str(k), f) for k, f in enumerate(factors)]
        queue = iter([Attempt(k, ways[k % len(ways)], [0, k], state) for k, state in enumerate(states)])
        done = sorted(((a.key, e) for a, e in perform(task, lambda: next(queue, None), noise, 10, replayable=True)), key=lambda row: row[0])
        kept = {f"{name}{k}": values for k, e in done if e.success for name, values in (("actions", e.actions), ("state", e.states[0]))}
        np.savez(file, keys=[k for k, e in done if e.success], **kept)
        return {"episodes": len(done), "successes": [k for k, e in done if e.success], "lengths": [e.length for _, e in done]}

    def replay(self, task: str, file: str) -> list[int]:
        """The demonstrations, by number, that come to success again."""
        task, again = load_task(task, self.assets), []
        episodes = read(file)
        if not episodes:
            return []
        env = make_env(task, len(episodes), settle_steps=0, max_steps=10**6, autoreset_mode=AutoresetMode.DISABLED)
        env.set_state(np.stack([state for _, state, _ in episodes]))
        for t in range(max(len(actions) for _, _, actions in episodes)):
            active = np.array([t < len(actions) and k not in again for k, _, actions in episodes])
            now = np.stack([actions[min(t, len(actions) - 1)] for _, _, actions in episodes])
            terminated = env.step(now, active)[2]
            again += [k for (k, _, _), won, on in zip(episodes, terminated, active, strict=True) if won and on]
        env.close()
        return sorted(again)

    def parity(self, task: str, steps: int = 60, states: int = 24) -> dict:
        return fidelity.compare(task, ["trajectories", "flags"], fidelity.Args(assets=self.assets, steps=steps, states=states))

    def prepare_speed(self, task: str, file: str | None, num_envs: int) -> int:
        """Start: with `file` from its demonstrations, else from official init states; returns how many blocks there are."""
        self.ours = Ours(load_task(task, self.assets), num_envs, 1)
        self.rng, self.file = np.random.default_rng(0), file
        if file is None:
            return BLOCKS + 1
        episodes = [(state, actions) for _, state, actions in read(file)]
        episodes = [episodes[i % len(episodes)] for i in range(num_envs)]
        self.ours.env.set_state(np.stack([state for state, _ in episodes]))
        steps = min(len(actions) for _, actions in episodes)
        self.actions = np.stack([actions[:steps] for _, actions in episodes], 1)
        return steps // STEPS

    def speed(self, block: int) -> dict:
        """CPU seconds of one block, with the controller and bare: they say the same on a busy machine, where the clock doesn't."""
        ours = self.ours
        if self.file is None:
            n = ours.env.num_envs
            ours.prepare((block * n + np.arange(n)) % len(ours.env.task.init_states))
            actions = np.clip(0.3 * self.rng.normal(size=(STEPS, n, 7)), -1.0, 1.0)
        else:
            actions = self.actions[block * STEPS : (block + 1) * STEPS]
        start = ours.env.snapshot()
        record = ours.record(actions)
        found = {}
        for name in ("ours", "limit")[:: 1 - 2 * (block % 2)]:
            ours.env.restore(start)
            before = time.process_time()
            ours.run(actions) if name == "ours" else ours.limit(record)
            found[name] = time.process_time() - before
        ours.env.restore(start)
        ours.run(actions)
        return found

    def end_speed(self) -> None:
        self.ours.close()


def axes(quaternions: np.ndarray) -> np.ndarray:
    """The z axes (., 3) of frames given by quaternions wxyz (., 4)."""
    w, x, y, z = np.moveaxis(quaternions, -1, 0)
    return np.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], -1)


def read(file: str) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(number, first state, actions) of the demonstrations in a file of `Worker.success`."""
    with np.load(file) as stored:
        return [(int(k), stored[f"state{k}"], stored[f"actions{k}"]) for k in stored["keys"]]


def serve(assets: str) -> None:
    """Answer requests, a line each, until there are no more."""
    worker, out = Worker(assets), sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # LIBERO and robosuite print
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(getattr(worker, request.pop("do"))(**request)), file=out, flush=True)


class Release:
    """The process of one interpreter."""

    def __init__(self, python: Path, assets: str, log):
        command = [str(python), "-m", "benchmarks.versions", "--serve", assets]
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        except OSError as error:
            raise UserError(f"{python} does not start: {error.strerror}; name the interpreters of virtual environments") from error
        self.python, self.log = python, log
        self.versions = self("versions")
        self.name = self.versions["mujoco"]

    def __call__(self, do: str, **request):
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        if not (line := self.process.stdout.readline()):
            raise UserError(f"{self.python} ended while asked for {do} {request.get('task', '')}; its messages are in {self.log.name}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def differences(parity: dict) -> list[str]:
    """What of our environment is not LIBERO's, in a result of `Worker.parity`."""
    found = [f"field {name} of the model" for name in parity["model_differences"]]
    found += [
        f"{name}: success at steps {run['flags_unequal_at']}" for name, run in parity["trajectories"].items() if not run["flags_equal"]
    ]
    found += [
        f"{name}: positions by {run['free']:.0e} in free motion" for name, run in parity["trajectories"].items() if run["free"] > 1e-9
    ]
    return found + [f"flag {name} in {c['unequal']} states" for name, c in parity["flags"]["predicates"].items() if c["unequal"]]


# ---------------------------------------------------------------------------------------------- all releases


def measure(task: str, args: Args, releases: list[Release], folder: Path) -> dict:
    """All numbers of one task: {part: {release: ...}}."""
    states = np.linspace(0, 50, args.init_states, endpoint=False).astype(int).tolist()
    default, found = releases[min(1, len(releases) - 1)], {}
    file = {r.name: str(folder / f"{task.replace('/', '-')}-{r.name}.npz") for r in releases}
    only = lambda chosen: task in chosen or not set(chosen) & set(args.tasks)  # noqa: E731
    if "settle" in args.parts:
        found["settle"] = {r.name: r("settle", task=task, states=states) for r in releases}
    if "success" in args.parts:
        ways = default("strategies", task=task)
        how = {"task": task, "factors": ways, "states": states, "noise": args.noise}
        found["success"] = {r.name: r("success", **how, file=file[r.name]) for r in releases}
        found["strategies"] = ways
        if "replay" in args.parts:
            found["replay"] = {a.name: {b.name: b("replay", task=task, file=file[a.name]) for b in releases} for a in releases}
    if "parity" in args.parts and only(PARITY_TASKS):
        found["parity"] = {r.name: r("parity", task=task) for r in releases}
    if "speed" in args.parts and only(SPEED_TASKS):
        found["speed"] = {kind: speed(task, releases, file if kind == "demonstrations" else None) for kind in ("random", "demonstrations")}
    return found


def speed(task: str, releases: list[Release], files: dict[str, str] | None) -> dict:
    """Seconds of blocks, {release: {"ours": [...], "limit": [...]}}; the first block warms up and isn't kept."""
    blocks = min(r("prepare_speed", task=task, file=files and files[r.name], num_envs=NUM_ENVS) for r in releases)
    seconds = {r.name: {"ours": [], "limit": []} for r in releases}
    for block in range(blocks):
        turn = block % len(releases)
        for release in releases[turn:] + releases[:turn]:
            taken = release("speed", block=block)
            for kind, values in taken.items():
                seconds[release.name][kind] += [values] if block > 0 else []
    for release in releases:
        release("end_speed")
    return seconds


# ---------------------------------------------------------------------------------------------- tables


def table(head: list[str], rows: list[list]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def report_settling(tasks: dict[str, dict], names: list[str]) -> list[str]:
    rows = []
    for name in names:
        found = [t["settle"] for t in tasks.values() if "settle" in t]
        aside, tilt, pace = (np.concatenate([np.ravel(f[name][key]) for f in found]) for key in ("aside", "tilt", "speed"))
        shift = [np.subtract(f[name]["position"], f[names[0]]["position"]) for f in found]
        shift = np.concatenate([np.linalg.norm(s, axis=-1).ravel() for s in shift])
        cells = [f"{1e3 * q:.1f}" for q in np.quantile(aside, (0.5, 0.9, 1.0))] + [f"{q:.1f}" for q in np.quantile(tilt, (0.9, 1.0))]
        apart = [f"{(shift > d).mean():.1%}" for d in (0.001, 0.01)]
        rows.append([name, len(aside), *cells, (pace > 0.001).sum(), *apart, f"{1e3 * shift.max():.0f}"])
    head = ["MuJoCo", "objects", "aside (mm): median", "90 %", "largest", "tilt (deg): 90 %", "largest", "over 1 mm/s"]
    return table([*head, f"over 1 mm from {names[0]}", "over 1 cm", "largest (mm)"], rows)


def report_movers(tasks: dict[str, dict], names: list[str], limit: float = 0.005) -> list[str]:
    """The objects that rest elsewhere, on average over the states, than under the first release."""
    rows = []
    for task, found in tasks.items():
        settle = found.get("settle", {})
        for i, name in enumerate(settle[names[0]]["objects"] if settle else []):
            place = {n: np.array(settle[n]["position"])[:, i] for n in names}
            shift = {n: np.linalg.norm(place[n] - place[names[0]], axis=-1) for n in names}
            if max(x.mean() for x in shift.values()) < limit:
                continue
            cells = [f"{1e3 * np.mean(shift[n]):.0f} mm, {np.mean(np.array(settle[n]['tilt'])[:, i]):.0f} deg" for n in names]
            rows.append([task, name, *cells])
    return table(["task", "object: mean distance from its rest under the first, mean tilt from its start", *names], rows)


def report_success(tasks: dict[str, dict], names: list[str]) -> list[str]:
    rows, total = [], {n: np.zeros(2, int) for n in names}
    for task, found in tasks.items():
        if "success" in found:
            pairs = {n: (len(found["success"][n]["successes"]), found["success"][n]["episodes"]) for n in names}
            rows.append([task, len(found["strategies"]), *(f"{won} of {all_}" for won, all_ in pairs.values())])
            for n in names:
                total[n] += pairs[n]
    rates = []
    for won, tried in total.values():
        low, high = wilson_interval(int(won), int(tried))
        rates.append(f"**{won / tried:.1%}** ({low:.1%} to {high:.1%})")
    return table(["task", "strategies", *names], [*rows, ["all", "", *rates]])


def report_replay(tasks: dict[str, dict], names: list[str]) -> list[str]:
    rows = []
    for made in names:
        cells = []
        for played in names:
            won = sum(len(f["replay"][made][played]) for f in tasks.values() if "replay" in f)
            tried = sum(len(f["success"][made]["successes"]) for f in tasks.values() if "replay" in f)
            cells.append(f"{won} of {tried} ({won / tried:.1%})")
        rows.append([made, *cells])
    return table(["made under, played under", *names], rows)


def report_parity(tasks: dict[str, dict], names: list[str]) -> list[str]:
    rows = []
    for name in names:
        found = [f["parity"][name] for f in tasks.values() if "parity" in f]
        runs = [run for f in found for run in f["trajectories"].values()]
        flags = [counts for f in found for counts in f["flags"]["predicates"].values()]
        judged = sum(c["true"] + c["false"] for c in flags)
        close = [r["all"] for r in runs if r["all"] < 1e-6]
        rows.append(
            [
                name,
                f"{max(r['free'] for r in runs):.0e}",
                f"{len(close)} of {len(runs)}",
                sum(len(r["flags_unequal_at"]) for r in runs),
                f"{sum(c['unequal'] for c in flags)} of {judged}",
                sum(len(f["model_differences"]) for f in found),
            ]
        )
    head = ["MuJoCo", "largest difference of qpos, free", "runs within 1e-6 throughout", "steps with unequal success"]
    return table([*head, "unequal flags", "fields of mjModel that differ"], rows)


def report_speed(tasks: dict[str, dict], names: list[str]) -> list[str]:
    base = names[min(1, len(names) - 1)]
    rows = []
    for task, found in tasks.items():
        for kind, seconds in found.get("speed", {}).items():
            for what, title in (("ours", "control step"), ("limit", "25 bare mj_step")):
                times = {n: np.array(seconds[n][what]) for n in names}
                rate = NUM_ENVS * STEPS / np.median(times[base])
                ratios = [spread(quartiles(times[base] / times[n])) for n in names if n != base]
                rows.append([task, kind, title, f"{rate:.0f}/s", *ratios])
    return table(["task", "motion", "", base, *(f"{n} / {base}" for n in names if n != base)], rows)


def report(content: dict) -> str:
    """The results as markdown."""
    tasks, names = content["tasks"], [v["mujoco"] for v in content["versions"]]
    lines = []
    for part, titled in (
        ("settle", (report_settling, report_movers)),
        ("success", (report_success,)),
        ("replay", (report_replay,)),
        ("parity", (report_parity,)),
        ("speed", (report_speed,)),
    ):
        if any(part in found for found in tasks.values()):
            lines += [f"### {part}", "", *(line for write in titled for line in write(tasks, names))]
    return "\n".join(lines).rstrip()


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
        return {"settings": content["settings"], "versions": content["versions"], "tasks": content["tasks"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file that this command wrote ({error}); move it away or choose another --json") from None


def main() -> None:
    import tyro

    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2])
    args = tyro.cli(Args)
    if unknown := set(args.parts) - set(PARTS):
        raise UserError(f"unknown part {min(unknown)!r}; parts are {', '.join(PARTS)}")
    if {"replay", "speed"} & set(args.parts) and "success" not in args.parts:
        raise UserError("replay and speed take the demonstrations that success makes: add success to --parts")
    if not 1 <= args.init_states <= 50:
        raise UserError("--init-states is 1 to 50")
    if args.check is not None:
        if found := differences(Worker(str(find_assets(args.assets))).parity(args.check, steps=25, states=6)):
            raise UserError(f"{args.check} under {versions()['mujoco']} differs from LIBERO's: {'; '.join(found)}")
        print(f"{args.check} under MuJoCo {versions()['mujoco']}: as LIBERO's own environment")
        return
    if not args.pythons:
        if args.json is None:
            raise UserError("name --pythons to measure, or a --json to print")
        print(report(read_json(args.json)))
        return
    assets, progress = str(find_assets(args.assets)), Progress()
    with tempfile.TemporaryDirectory() as temporary, open(Path(tempfile.gettempdir()) / "benchmarks-versions.log", "w") as log:
        releases = [Release(python, assets, log) for python in args.pythons]
        content = {
            "settings": {"init_states": args.init_states, "noise": args.noise, "assets": load_task(args.tasks[0], assets).assets},
            "versions": [r.versions for r in releases],
            "tasks": {},
        }
        if args.json is not None and args.json.exists():
            stored = read_json(args.json)
            if all(stored[key] == content[key] for key in ("settings", "versions")):
                content["tasks"] = stored["tasks"]
        progress.stage("tasks", len(args.tasks))
        for task in args.tasks:
            if task not in content["tasks"]:
                start = time.time()
                content["tasks"][task] = measure(task, args, releases, Path(temporary))
                if args.json is not None:  # a line a task: the lists are long
                    lines = ",\n".join(f"{json.dumps(t)}: {json.dumps(found)}" for t, found in content["tasks"].items())
                    with atomic_path(args.json) as temporary:
                        head = {key: content[key] for key in ("settings", "versions")}
                        temporary.write_text(f'{json.dumps(head)[:-1]}, "tasks": {{\n{lines}\n}}}}\n')
                progress.update(1, f"{task} {time.time() - start:.0f} s")
        for release in releases:
            release.close()
    progress.close()
    print(report(content))


if __name__ == "__main__":
    run_command(main)
