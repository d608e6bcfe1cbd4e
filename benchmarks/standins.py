"""How far the stand-in assets are from LIBERO's: object by object, and where things come to rest in whole scenes.

    python -m benchmarks.standins --assets DIR                  # masses, sizes, inertia and regions
    python -m benchmarks.standins --assets DIR --settle all     # and all 130 tasks after two seconds of no-ops

Prints the Markdown tables of docs/standins.md. The objects' files are read by MuJoCo itself, without LIBERO's or robosuite's code.
"""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from pathlib import Path

import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

from benchmarks.demonstrator import suite_tasks
from common.cli import UserError, run_command
from common.libero import load_task, make_env
from common.libero.assets import find_assets
from common.libero.standin_things import fixtures, small_objects
from common.libero.standins import is_standin, standin_assets
from common.libero.step import NO_OP
from common.suites import SUITES, resolve


@dataclasses.dataclass
class Args:
    """Compare the stand-ins with LIBERO's assets: object by object, and where things come to rest."""

    settle: str | None = None
    """let the scenes of this suite, task or of all tasks (all) come to rest from official init states, on both asset sets"""
    init_states: int = 4
    """how many of a task's 50 official init states"""
    assets: str | None = None
    """LIBERO's asset folder (default: $LIBERO_ASSETS, else LIBERO's own, else a download)"""


@dataclasses.dataclass(frozen=True)
class Measures:
    """What an object measures in the frame of its body "object", joints at zero; SI units."""

    mass: float
    centre: np.ndarray  # (3,) of mass
    inertia: np.ndarray  # (3,) principal moments about it, in ascending order
    box: np.ndarray  # (2, 3) the lowest and highest corner of its collision geoms
    regions: dict[str, np.ndarray]  # (6,) centre and half size of the sites that goals refer to
    geoms: int  # that collide


def measure(path: Path) -> Measures:
    """Read one MJCF file of an asset tree, less what is only seen: as in robosuite, that weighs nothing."""
    tree = ET.parse(path).getroot()
    for asset in tree.findall("asset"):
        tree.remove(asset)
    for element in tree.iter():
        element.attrib.pop("material", None)
    for parent in list(tree.find("worldbody").iter()):
        for geom in [g for g in parent.findall("geom") if g.get("mesh") or g.get("group", "0") != "0"]:
            parent.remove(geom)
    for compiler in tree.findall("compiler"):
        compiler.set("inertiagrouprange", "0 0")
    model = mujoco.MjModel.from_xml_string(ET.tostring(tree, encoding="unicode"))
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    mujoco.mj_comPos(model, data)
    root = model.body("object").id
    turn, origin = data.xmat[root].reshape(3, 3), data.xpos[root]
    centre = data.subtree_com[root]
    inertia = np.zeros((3, 3))
    for body in range(root, model.nbody):  # all that follow are its parts
        axes, arm = data.ximat[body].reshape(3, 3), data.xipos[body] - centre
        inertia += axes @ np.diag(model.body_inertia[body]) @ axes.T
        inertia += model.body_mass[body] * (arm @ arm * np.eye(3) - np.outer(arm, arm))
    solid = [g for g in range(model.ngeom) if model.geom_contype[g] or model.geom_conaffinity[g]]
    signs = np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, -1).T
    corners = []
    for g in solid:
        box = model.geom_aabb[g, :3] + signs * model.geom_aabb[g, 3:]
        corners.append((data.geom_xpos[g] + box @ data.geom_xmat[g].reshape(3, 3).T - origin) @ turn)
    corners = np.concatenate(corners)
    regions = {}
    for site in map(model.site, range(model.nsite)):
        if site.name.endswith(("region", "side")):
            regions[site.name] = np.concatenate([turn.T @ (data.site_xpos[site.id] - origin), site.size])
    return Measures(
        mass=float(model.body_subtreemass[root]),
        centre=turn.T @ (centre - origin),
        inertia=np.linalg.eigvalsh(inertia),
        box=np.stack([corners.min(0), corners.max(0)]),
        regions=regions,
        geoms=len(solid),
    )


def compare(assets: Path) -> dict[str, tuple[Measures, Measures]]:
    """By name: LIBERO's object or fixture, and its stand-in."""
    ours, files = standin_assets(), [thing.file for thing in (*small_objects(), *fixtures())]
    return {Path(file).stem: (measure(assets / file), measure(ours / file)) for file in files}


def table(pairs: dict[str, tuple[Measures, Measures]]) -> str:
    columns = ["", "mass (g): LIBERO", "stand-in", "centre of mass off by (mm)", "extent off by (mm)", "moments of inertia, ratio"]
    columns += ["regions off by (mm)", "collision geoms: LIBERO", "stand-in"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, (real, ours) in pairs.items():
        ratio = ours.inertia / real.inertia
        regions = [np.abs(ours.regions[site] - region).max() for site, region in real.regions.items()]
        off = f"{1e3 * np.linalg.norm(ours.centre - real.centre):.1f} | {1e3 * np.abs(ours.box - real.box).max():.1f}"
        off += f" | {ratio.min():.2f} to {ratio.max():.2f} | " + (f"{1e3 * max(regions):.1f}" if regions else "")
        lines.append(f"| {name} | {1e3 * real.mass:.1f} | {1e3 * ours.mass:.1f} | {off} | {real.geoms} | {ours.geoms} |")
    return "\n".join(lines)


def rest(task_id: str, assets: Path | str, init_states: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """After two seconds of no-ops: positions (n, objects, 3) of what is free, (n, joints) of what is not, and speeds (n, objects)."""
    task = load_task(task_id, str(assets))
    free = [o.joint_qpos for o in task.objects.values() if o.joint_qpos is not None]
    joints = [task.model.jnt_qposadr[j] for o in task.objects.values() if o.joint_qpos is None for j in o.joints]
    env = make_env(task, init_states, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(options={"init_state": np.linspace(0, len(task.init_states), init_states, endpoint=False).astype(int)})
    for _ in range(40):
        env.step(np.tile(NO_OP, (init_states, 1)))
    before = env.get_state()[:, 1:]
    env.step(np.tile(NO_OP, (init_states, 1)))
    after = env.get_state()[:, 1:]
    env.close()
    positions = np.stack([after[:, i : i + 3] for i in free], 1)
    speeds = np.linalg.norm(positions - np.stack([before[:, i : i + 3] for i in free], 1), axis=-1) * 20  # control steps a second
    return positions, after[:, joints], speeds


def settled(task_ids: list[str], assets: Path, init_states: int) -> str:
    """Markdown: how far apart things rest on the two asset sets, a line a suite."""
    found: dict[str, list] = {}
    for task_id in tqdm(task_ids, desc="tasks"):
        (real, real_joints, real_speed), (ours, our_joints, our_speed) = (rest(task_id, a, init_states) for a in (assets, "standin"))
        aside = np.linalg.norm((ours - real)[..., :2], axis=-1).ravel()
        rise = np.abs((ours - real)[..., 2]).ravel()
        joints = np.abs(our_joints - real_joints).ravel()
        row = aside, rise, joints, real_speed.ravel(), our_speed.ravel()
        for name in (task_id.split("/")[0], "all"):
            found.setdefault(name, []).append(row)
    columns = ["", "tasks", "objects at rest", "aside (mm): median", "90 %", "largest", "height (mm): median", "90 %", "largest"]
    columns += ["joints (mm, mrad): largest", "still moving (over 1 cm/s): LIBERO", "stand-ins"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in sorted(found, key=lambda n: (n == "all", n)):
        aside, rise, joints, real_speed, our_speed = (np.concatenate(x) for x in zip(*found[name], strict=True))
        cells = [name, str(len(found[name])), str(len(aside))]
        cells += [f"{1e3 * q:.1f}" for values in (aside, rise) for q in np.quantile(values, (0.5, 0.9, 1.0))]
        cells += [f"{1e3 * joints.max():.1f}" if len(joints) else "", str((real_speed > 0.01).sum()), str((our_speed > 0.01).sum())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    import tyro

    args = tyro.cli(Args)
    if not 1 <= args.init_states <= 50:
        raise UserError("--init-states is 1 to 50")
    if args.settle in ("all", *SUITES):
        task_ids = suite_tasks(args.settle)
    else:
        task_ids = [] if args.settle is None else ["{}/{}".format(*resolve(args.settle))]
    folder = find_assets(args.assets)
    if is_standin(folder):
        raise UserError("LIBERO's own assets are needed: name their folder with --assets DIR")
    print(table(compare(folder)))
    if task_ids:
        print("\n" + settled(task_ids, folder, args.init_states))


if __name__ == "__main__":
    run_command(main)
