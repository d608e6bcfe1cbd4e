"""Our two renderers against LIBERO's own pictures: the same states, pixel by pixel (docs/pictures.md).

    python -m benchmarks.renderers --json docs/results/renderers.json --out docs/images/renderers.png

LIBERO's own are the observations of its `OffScreenRenderEnv`, under the GL library that MuJoCo finds (MUJOCO_GL, else EGL, else
OSMesa). Against them:
- MuJoCo's renderer (`--renderer gl`) on LIBERO's model, on the compiled task, whose textures are smaller, and on LIBERO's model with
  textures halved as often as leaves them at least so many pixels wide and high;
- our ray tracer (`--renderer warp`) on the compiled task; and the two renderers against each other.
Of each task two states: official init state 0 at rest, and init state 1 after three seconds of a seeded random walk of the arm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import mujoco
import numpy as np
import tyro
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.ndimage import gaussian_filter

from benchmarks.throughput import find_gl, gl_driver
from common.cli import UserError, atomic_path, run_command
from common.libero import load_task, make_env
from common.libero.original import libero_env
from common.libero.renderers import CAMERAS, make_renderer
from common.libero.step import NO_OP
from common.runs import Progress, versions, write_json

TASKS = ("libero_spatial/0", "libero_object/3", "libero_goal/0", "libero_10/0", "libero_10/5", "libero_90/5")
COMPARISONS = {
    "gl, LIBERO's model": "MuJoCo's renderer, LIBERO's own model",
    "gl": "MuJoCo's renderer, compiled task",
    "warp": "ray tracer, compiled task",
    "warp, gl": "ray tracer against MuJoCo's renderer, compiled task",
}


@dataclasses.dataclass
class Args:
    """Compare both renderers with LIBERO's own pictures of the same states."""

    tasks: tuple[str, ...] = TASKS
    """task ids: at least one of each suite, and all five scenes"""
    sizes: tuple[int, ...] = (128, 256)
    """heights and widths of pictures in pixels"""
    textures: tuple[int, ...] = (256, 512, 1024)
    """of LIBERO's model with halved textures: how many pixels wide and high they stay at least"""
    json: Path | None = None
    """also write all numbers here"""
    out: Path | None = None
    """also draw pictures of each task side by side, a PNG"""
    assets: str | None = None
    """LIBERO's asset folder, or standin (default: as everywhere)"""


# ---------------------------------------------------------------------------------------------- measures


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two pictures (H, W, 3) uint8: of their luma, with Gaussian windows (Wang et al. 2004)."""
    x, y = (p @ np.array([0.299, 0.587, 0.114]) for p in (a, b))
    blur = lambda image: gaussian_filter(image, 1.5, truncate=3.5)  # noqa: E731
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))))


def measure(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How two pictures (H, W, 3) uint8 differ, in units of 1/255."""
    difference = np.abs(ours.astype(int) - theirs)
    largest = difference.max(-1)  # of a pixel's channels
    return {
        "mean": float(difference.mean()),
        "largest": int(difference.max()),
        "over_1": float((largest > 1).mean()),
        "over_8": float((largest > 8).mean()),
        "mse": float((difference**2).mean()),
        "ssim": ssim(ours, theirs),
    }


def pooled(rows: list[dict]) -> dict[str, float | None]:
    """`measure` of several pictures together, with the peak signal-to-noise ratio in dB (None: they are equal)."""
    result = {name: float(np.mean([row[name] for row in rows])) for name in ("mean", "over_1", "over_8", "mse", "ssim")}
    mse = result.pop("mse")
    return result | {"largest": max(row["largest"] for row in rows), "psnr": 10 * np.log10(255**2 / mse) if mse else None}


# ---------------------------------------------------------------------------------------------- textures


def halved(image: Image.Image, at_least: int, srgb: bool) -> Image.Image:
    """A texture halved, as OpenGL makes its mipmaps, while its sides stay at least so long: averages of 2 x 2 pixels (between them, if
    a side is odd), of light and not of numbers where the texture is sRGB."""
    bands = [np.asarray(band, np.float32) / 255 for band in image.convert("RGB").split()]
    if srgb:
        bands = [np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) for x in bands]
    bands = [Image.fromarray(x) for x in bands]
    while min(bands[0].size) // 2 >= at_least:
        width, height = bands[0].size
        small, scale = (width // 2, height // 2), (width / (width // 2), 0, 0, 0, height / (height // 2), 0)
        bands = [band.transform(small, Image.Transform.AFFINE, scale, Image.Resampling.BILINEAR) for band in bands]
    bands = [np.asarray(band) for band in bands]
    if srgb:
        bands = [np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055) for x in bands]
    return Image.fromarray(np.stack([(255 * x + 0.5).clip(0, 255).astype(np.uint8) for x in bands], -1))


def with_halved_textures(xml: str, model: mujoco.MjModel, at_least: int, folder: Path) -> mujoco.MjModel:
    """LIBERO's model (`xml` is its MJCF) compiled again with smaller textures, kept in `folder` meanwhile."""
    root, written = ET.fromstring(xml), {}
    for texture in root.iter("texture"):
        file = texture.get("file")
        if file is None:
            continue
        if file not in written:
            with Image.open(file) as image:
                intent, chunks = image.info.get("srgb"), PngInfo()
                if intent is not None:
                    chunks.add(b"sRGB", bytes([intent]))
                written[file] = str(folder / f"{at_least}-{len(written)}.png")
                halved(image, at_least, intent is not None).save(written[file], pnginfo=chunks, compress_level=1)
        texture.set("file", written[file])
    smaller = mujoco.MjModel.from_xml_string(ET.tostring(root, encoding="unicode"))
    smaller.body_pos[:], smaller.body_quat[:] = model.body_pos, model.body_quat  # where the reset has put the fixtures
    return smaller


# ---------------------------------------------------------------------------------------------- one task


def states_of(task) -> np.ndarray:
    """(2, 1 + nq + nv): init state 0 at rest, and init state 1 after a walk."""
    env = make_env(task, 2)
    env.reset(options={"init_state": [0, 1]})
    for _ in range(10):
        env.step(np.tile(NO_OP, (2, 1)))
    rest, _ = env.get_state()
    rng, action = np.random.default_rng(0), np.array(NO_OP, float)
    spread, drift = np.repeat([0.1, 0.01], 3), np.array([0, 0, -0.015, 0, 0, 0])
    for step in range(60):
        action[:6] = np.clip(0.9 * action[:6] + spread * rng.standard_normal(6) + drift, -1, 1)  # down, on the whole
        action[6] = 1.0 if step >= 30 else -1.0
        env.step(np.stack([NO_OP, action]))
    _, walked = env.get_state()
    env.close()
    return np.stack([rest, walked])


def draw(model: mujoco.MjModel, states: np.ndarray, sizes: tuple[int, ...], renderer: str) -> dict[tuple[str, int], np.ndarray]:
    """Pictures (2, size, size, 3) by camera and size."""
    qpos = states[:, 1 : 1 + model.nq]
    drawn = {size: make_renderer(model, CAMERAS, size, size, renderer).render(qpos) for size in sizes}
    return {(camera, size): drawn[size][camera] for size in sizes for camera in CAMERAS}


def compare(task_id: str, args: Args) -> tuple[dict, dict[str, list[np.ndarray]]]:
    """The measures of one task, and for each camera LIBERO's own, MuJoCo's and the ray tracer's picture of both states."""
    task = load_task(task_id, args.assets)
    states, first = states_of(task), args.sizes[0]
    env = libero_env(task_id, args.assets, use_camera_obs=True, has_offscreen_renderer=True, camera_heights=first, camera_widths=first)
    theirs: dict[tuple[str, int], list] = {(camera, size): [] for camera in CAMERAS for size in args.sizes}
    for state in states:
        seen = env.set_init_state(state)
        for (camera, size), pictures in theirs.items():
            picture = seen[f"{camera}_image"] if size == first else env.sim.render(camera_name=camera, width=size, height=size)
            pictures.append(picture[::-1].copy())  # LIBERO's have the bottom row first
    driver, model, xml = gl_driver(), env.sim.model._model, env.env.model.get_xml()

    drawn = {"gl, LIBERO's model": (draw(model, states, args.sizes, "gl"), theirs)}
    ours = {renderer: draw(task.model, states, args.sizes, renderer) for renderer in ("gl", "warp")}
    drawn |= {"gl": (ours["gl"], theirs), "warp": (ours["warp"], theirs), "warp, gl": (ours["warp"], ours["gl"])}
    megabytes = {"gl, LIBERO's model": model.ntexdata / 1e6, "gl": task.model.ntexdata / 1e6}
    with tempfile.TemporaryDirectory() as folder:
        for at_least in args.textures:
            smaller = with_halved_textures(xml, model, at_least, Path(folder))
            drawn[f"gl, textures {at_least}"] = draw(smaller, states, args.sizes, "gl"), theirs
            megabytes[f"gl, textures {at_least}"] = smaller.ntexdata / 1e6
    rows = [
        {"task": task_id, "comparison": name, "camera": camera, "size": size, "state": state}
        | measure(a[camera, size][k], b[camera, size][k])
        for name, (a, b) in drawn.items()
        for (camera, size) in theirs
        for k, state in enumerate(("at rest", "walked"))
    ]
    largest = max(args.sizes)
    shown = {camera: [x[camera, largest] for x in (theirs, ours["gl"], ours["warp"])] for camera in CAMERAS}
    return {"rows": rows, "texture_megabytes": megabytes, "driver": driver, "assets": task.image_assets}, shown


def worker(connection, task_id: str, args: Args) -> None:
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):  # LIBERO and robosuite print
            connection.send(compare(task_id, args))
    except UserError as error:
        connection.send(error)
    connection.close()
    os._exit(0)  # robosuite's EGL context raises, with much text, when the interpreter ends


def compare_in_a_process(task_id: str, args: Args) -> tuple[dict, dict[str, list[np.ndarray]]]:
    """`compare` in a process of its own: GL contexts and LIBERO's full textures go with it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=worker, args=(theirs, task_id, args), daemon=True)
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        raise UserError(f"{task_id}: the process that draws LIBERO's pictures has ended") from None
    process.join()
    if isinstance(result, UserError):
        raise result
    return result


# ---------------------------------------------------------------------------------------------- what is shown


def lines(rows: list[dict], name: str, label: str, sizes: tuple[int, ...]) -> list[str]:
    """Markdown rows of one comparison, a size and camera each, over all tasks and states."""
    found = []
    for size in sizes:
        for camera in CAMERAS:
            x = pooled([r for r in rows if (r["comparison"], r["size"], r["camera"]) == (name, size, camera)])
            cells = [label, f"{camera.removeprefix('robot0_')}, {size}", f"{x['mean']:.2f}", f"{x['largest']}", f"{x['over_1']:.2%}"]
            cells += [f"{x['over_8']:.2%}", "equal" if x["psnr"] is None else f"{x['psnr']:.1f}", f"{x['ssim']:.4f}"]
            found.append(f"| {' | '.join(cells)} |")
    return found


def table(results: dict, sizes: tuple[int, ...], textures: tuple[int, ...]) -> str:
    names = COMPARISONS | {f"gl, textures {n}": f"MuJoCo's renderer, textures halved to at least {n}" for n in textures}
    columns = ["", "camera, pixels", "mean", "largest", "pixels off by > 1", "by > 8", "PSNR (dB)", "SSIM"]
    found = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, label in names.items():
        found += lines(results["rows"], name, label, sizes)
    return "\n".join(found)


def figure(shown: dict[str, dict[str, list[np.ndarray]]], out: Path) -> None:
    """A row a task: agentview at rest and the wrist after the walk; LIBERO's own, MuJoCo's renderer, the ray tracer."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(9.6, 1.68 * len(shown)), layout="constrained")
    axes = sheet.subplots(len(shown), 6, squeeze=False)
    for row, (task_id, pictures) in zip(axes, shown.items(), strict=True):
        for axis, picture in zip(row, [x[k] for k, camera in enumerate(CAMERAS) for x in pictures[camera]], strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(task_id, fontsize=8)
    for axis, title in zip(axes[0], ("LIBERO's own", "MuJoCo's renderer", "ray tracer") * 2, strict=True):
        axis.set_title(title, fontsize=8)
    with atomic_path(out) as temporary:
        sheet.savefig(temporary, dpi=100, format="png")


def main() -> None:
    args = tyro.cli(Args)
    if not args.tasks or not args.sizes or min((*args.sizes, *args.textures)) < 1:
        raise UserError("name at least one task and one size; --sizes and --textures must be at least 1")
    gl, reason = find_gl()
    if gl is None:
        raise UserError(f"LIBERO's own pictures need a GL library: {reason}")
    os.environ["MUJOCO_GL"] = gl  # for the processes
    progress, found, shown = Progress(), {}, {}
    progress.stage("tasks", len(args.tasks))
    for task_id in args.tasks:
        found[task_id], shown[task_id] = compare_in_a_process(task_id, args)
        progress.update(1)
    progress.close()
    results = {"gl": gl, "driver": found[args.tasks[0]]["driver"], "assets": found[args.tasks[0]]["assets"], "versions": versions()}
    results["texture_megabytes"] = {task_id: x["texture_megabytes"] for task_id, x in found.items()}
    results["rows"] = [row for x in found.values() for row in x["rows"]]
    print(table(results, args.sizes, args.textures))
    if args.json:
        write_json(args.json, results)
    if args.out:
        figure(shown, args.out)


if __name__ == "__main__":
    run_command(main)
