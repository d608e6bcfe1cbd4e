"""How far the stand-in assets are from LIBERO's, object by object: masses, sizes, inertia and regions.

    python -m benchmarks.standins --assets DIR

Prints the Markdown table of docs/standins.md. Both asset sets are read by MuJoCo itself, without LIBERO's or robosuite's code.
"""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from pathlib import Path

import mujoco
import numpy as np

from common.cli import UserError, run_command
from common.standins import fixtures, is_standin, small_objects, standin_assets
from common.tasks import find_assets


@dataclasses.dataclass
class Args:
    """Compare the stand-ins with LIBERO's assets, object by object."""

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


def main() -> None:
    import tyro

    folder = find_assets(tyro.cli(Args).assets)
    if is_standin(folder):
        raise UserError("LIBERO's own assets are needed: name their folder with --assets DIR")
    print(table(compare(folder)))


if __name__ == "__main__":
    run_command(main)
