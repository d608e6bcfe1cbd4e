"""Compile a task: LIBERO and robosuite build its scene once, and what a simulation needs of it goes into one file."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from unittest import mock

import mujoco
import numpy as np
import tyro

from common.cli import UserError, atomic_path, cache_dir, run_command
from common.libero.assets import asset_names, find_assets
from common.libero.original import construct_libero_env, import_libero
from common.libero.tasks import ObjectInfo, Predicate, SiteInfo, Task, cache_file, write_task
from common.suites import NUM_INIT_STATES, TaskFiles, find_task, read_init_states

NUM_TRAIN_STATES = 256  # pre-sampled training resets a task
TEXTURE_SIZE = 256  # pixels; LIBERO's full textures make 90 to 220 MB a model and change no physics
MEMORY = "64M"  # what each simulation reserves for contacts, and how much of it


def build_task(files: TaskFiles, folder: Path) -> Task:
    """Compile a task through LIBERO and robosuite, and sample its training resets and, where no file holds them, its init states."""
    import_libero(folder)
    from robosuite.environments.base import MujocoEnv

    initialize = MujocoEnv._initialize_sim

    def initialize_small(self, xml_string: str | None = None) -> None:
        self.set_xml_processor(_shrink)
        initialize(self, xml_string)

    with mock.patch.object(MujocoEnv, "_initialize_sim", initialize_small):  # LIBERO compiles its model while it is constructed
        env = construct_libero_env(files, folder)
        domain = env.env
        env.seed(0)
        env.reset()  # rebuilds the model: this is the one we keep, laid out as `libero_env` does
    xml = domain.model.get_xml()
    model = domain.sim.model._model
    objects = _objects(domain, model)
    sites = _sites(domain, model, objects)
    robot = domain.robots[0]
    assets, image_assets = asset_names(folder)
    train_states = _sample_states(domain, model, 1, NUM_TRAIN_STATES)
    if files.init_states is None:
        init_states = _sample_states(domain, model, 0, NUM_INIT_STATES)
    else:
        init_states = read_init_states(files.init_states)
    if init_states.shape[1:] != train_states.shape[1:]:
        raise UserError(f"its init states have {init_states.shape[1]} numbers each, and a state of its scene has {train_states.shape[1]}")
    return Task(
        suite=files.suite,
        index=files.index,
        name=files.name,
        language=env.language_instruction,
        problem_name=env.problem_name,
        bddl_file=str(files.bddl),
        bddl=files.bddl.read_text(),
        xml=xml,
        assets=assets,
        image_assets=image_assets,
        goal=[_predicate(domain, state, objects, sites, model) for state in domain.parsed_problem["goal_state"]],
        objects=objects,
        sites=sites,
        of_interest=list(env.obj_of_interest),
        eef_site=int(robot.eef_site_id),
        hand_body=int(model.body(robot.robot_model.eef_name).id),
        arm_qpos=[int(i) for i in robot._ref_joint_pos_indexes],
        arm_dof=[int(i) for i in robot._ref_joint_vel_indexes],
        arm_actuators=[int(i) for i in robot._ref_joint_actuator_indexes],
        gripper_qpos=[int(i) for i in robot._ref_gripper_joint_pos_indexes],
        gripper_dof=[int(i) for i in robot._ref_gripper_joint_vel_indexes],
        gripper_actuators=[int(i) for i in robot._ref_joint_gripper_actuator_indexes],
        initial_joints=[float(q) for q in robot.controller.initial_joint],
        model=model,
        init_states=init_states,
        train_states=train_states,
    )


def _shrink(xml: str) -> str:
    """An MJCF text with at most TEXTURE_SIZE pixels a side in every texture file, and MEMORY for its simulations."""
    root = ET.fromstring(xml)
    for size in root.iter("size"):
        size.attrib = {"memory": MEMORY}
    for texture in root.iter("texture"):
        file = texture.get("file")
        if file is not None and file.lower().endswith(".png"):
            texture.set("file", str(_small_texture(file, texture.get("type") == "cube")))
    return ET.tostring(root, encoding="unicode")


@functools.cache
def _small_texture(file: str, cube: bool) -> Path:
    """A copy of a texture of at most TEXTURE_SIZE pixels a side, beside the cache and named after the content."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    with Image.open(file) as image:
        intent = image.info.get("srgb")  # of the sRGB chunk: without it, MuJoCo takes the colours as linear, and shows them lighter
        tag = "" if intent is None else f"-srgb{intent}"
        small = cache_dir() / "textures" / f"{hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}-{TEXTURE_SIZE}{tag}.png"
        if small.exists():
            return small
        width, height = image.size
        scale = min(1.0, TEXTURE_SIZE / max(width, height))
        shape = (max(1, round(width * scale)), max(1, round(height * scale)))
        if cube and width == height:
            shape = (shape[0], shape[0])
        chunks = PngInfo()
        if intent is not None:
            chunks.add(b"sRGB", bytes([intent]))
        with atomic_path(small) as temporary:
            image.convert("RGB").resize(shape, Image.Resampling.LANCZOS).save(temporary, pnginfo=chunks)
    return small


def _ids(model: mujoco.MjModel, kind: mujoco.mjtObj, names) -> tuple[int, ...]:
    found = (mujoco.mj_name2id(model, kind, name) for name in names if name is not None)
    return tuple(i for i in found if i >= 0)


def _objects(domain, model) -> dict[str, ObjectInfo]:
    objects = {}
    for fixture, group in ((False, domain.objects_dict), (True, domain.fixtures_dict)):
        for name, obj in group.items():
            joints = _ids(model, mujoco.mjtObj.mjOBJ_JOINT, obj.joints)
            free = [j for j in joints if model.jnt_type[j] == mujoco.mjtJoint.mjJNT_FREE]
            objects[name] = ObjectInfo(
                name=name,
                category=obj.category_name,
                fixture=fixture,
                body=int(domain.obj_body_id[name]),
                joint_qpos=int(model.jnt_qposadr[free[0]]) if free else None,
                geoms=_ids(model, mujoco.mjtObj.mjOBJ_GEOM, obj.contact_geoms),
                joints=tuple(j for j in joints if j not in free),
            )
    return objects


def _sites(domain, model, objects) -> dict[str, SiteInfo]:
    sites = {}
    for name, site in domain.object_sites_dict.items():
        (site_id,) = _ids(model, mujoco.mjtObj.mjOBJ_SITE, [name])
        joints = _ids(model, mujoco.mjtObj.mjOBJ_JOINT, site.joints or ())
        size = tuple(float(x) for x in site.size)
        sites[name] = SiteInfo(name, site_id, site.parent_name if site.parent_name in objects else None, size, joints)
    return sites


def _predicate(domain, state, objects, sites, model) -> Predicate:
    name, *args = state
    if len(args) == 1:
        return _joint_predicate(domain, name, args[0], objects, sites, model)
    body = objects[args[0]].body
    if args[1] in sites:
        site = sites[args[1]]
        common = dict(name=name, args=tuple(args), site=site.site, body=body, size=site.size)
        if name == "in":
            return Predicate(kind="contain", **common)
        contact = (objects[site.parent].geoms, objects[args[0]].geoms) if site.parent else None
        return Predicate(kind="under", contact=contact, **common)
    target = objects[args[1]]
    if name != "on":
        raise UserError(f"goal {state} asks what LIBERO itself cannot evaluate: {name!r} needs a region")
    return Predicate(name, tuple(args), "ontop", body=body, target_body=target.body, contact=(target.geoms, objects[args[0]].geoms))


def _joint_predicate(domain, name, arg, objects, sites, model) -> Predicate:
    """Open, close, turnon, turnoff: LIBERO's classes hold one threshold each, with its sign in code; found by probing them."""
    owner = domain.get_object(sites[arg].parent if arg in sites else arg)
    test = {"open": "is_open", "close": "is_close", "turnon": "turn_on", "turnoff": "turn_off"}[name]
    holds = getattr(owner, test)
    ranges = owner.object_properties["articulation"][f"default_{name}_ranges"]
    sign = 1.0 if holds(1e3) else -1.0
    threshold = float(min(ranges) if sign > 0 else max(ranges))
    probes = [threshold + sign * d for d in (-1e-6, 0.0, 1e-6)]
    below, at, above = (bool(holds(q)) for q in probes)
    if below or not above:
        raise UserError(f"LIBERO's {owner.category_name}.{test} is not a threshold at {threshold}")
    joints = sites[arg].joints if arg in sites else objects[arg].joints
    return Predicate(
        name,
        (arg,),
        "joint",
        qpos=tuple(int(model.jnt_qposadr[j]) for j in joints),
        sign=sign,
        threshold=threshold,
        inclusive=at,
        any=name in ("open", "turnon"),  # LIBERO: any joint open, all joints closed
    )


def _sample_states(domain, model, seed: int, count: int) -> np.ndarray:
    """Draw `count` resets from LIBERO's placement distribution, arm noise included (0.02 rad, as in the official states).

    A reset also jitters fixtures by writing into the model. As with the official init states, only (time, qpos, qvel) is
    kept, so the fixtures stay where `env.seed(0)` put them. What starts in or on a fixture is placed relative to the fixture's
    new pose plus the site's position in the model as it was, which LIBERO expects to be freshly compiled: fixtures at home.
    """
    from robosuite.utils.errors import RandomizationError

    fixtures = model.body_pos.copy(), model.body_quat.copy()
    homes = {model.body(f.root_body).id: f.get_obj() for f in domain.fixtures_dict.values()}
    domain.hard_reset = False
    domain.robots[0].initialization_noise = {"type": "gaussian", "magnitude": 0.02}
    # Of a reset this is most of the time and nothing of the state: forward passes for a new controller with all objects in one place,
    # and indices that have not changed.
    domain.robots[0]._load_controller = domain._setup_references = lambda: None
    states = []
    np.random.seed(seed)
    while len(states) < count:
        try:
            domain.sim.reset()
            for body, element in homes.items():
                model.body_pos[body] = np.fromstring(element.get("pos", "0 0 0"), sep=" ")
                model.body_quat[body] = np.fromstring(element.get("quat", "1 0 0 0"), sep=" ")
            domain._reset_internal()
        except RandomizationError:  # no free place found for an object: LIBERO draws again
            continue
        states.append(domain.sim.get_state().flatten())
    model.body_pos[:], model.body_quat[:] = fixtures
    return np.array(states)


# ---------------------------------------------------------------------------------------------- command


def main(task: str, assets: str | None = None) -> None:
    """Compile one task into the cache, whether or not it is there.

    Args:
        task: see `common.suites.find_task`.
        assets: a folder, libero or standin (default: as everywhere).
    """
    files, folder = find_task(task), find_assets(assets)
    with open(os.devnull, "w") as null:
        out, sys.stdout = sys.stdout, null  # LIBERO and robosuite print
        try:
            built = build_task(files, folder)
        finally:
            sys.stdout = out
    write_task(cache_file(files, folder), built)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
