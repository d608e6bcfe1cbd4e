"""LIBERO itself, imported without a question, a GL library or a download: what tasks are compiled by and ours is measured against."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import types
from pathlib import Path

import mujoco
import numpy as np

from common.cli import UserError, atomic_path, cache_dir
from common.libero.assets import find_assets
from common.suites import LIBERO_PRO, TaskFiles, find_task, libero_root, read_init_states


def import_libero(assets: Path | None):
    """Import LIBERO without a question, a GL library or the asset download; returns its `ControlEnv` class.

    Pictures from LIBERO itself need MUJOCO_GL=egl or osmesa, and that library. Numpy's global generator is used by LIBERO's resets.
    """
    gl, theirs = os.environ.get("MUJOCO_GL"), os.environ.get("LIBERO_CONFIG_PATH")
    os.environ["LIBERO_CONFIG_PATH"] = str(_libero_config())
    pictures = (gl or "").lower().strip() in ("egl", "osmesa", "glx")  # under any other value robosuite would ask for EGL
    for backend, name in (("egl", "EGLGLContext"), ("osmesa", "OSMesaGLContext"), ("glfw", "GLFWGLContext")):
        if not pictures:
            _pretend(f"robosuite.renderers.context.{backend}_context", **{name: None})
    _pretend("robosuite.macros_private", FILE_LOGGING_LEVEL=None)  # else a log file of one name for all users of a machine
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    try:
        import libero.libero
        from libero.libero.envs.env_wrapper import ControlEnv
    except ImportError as error:
        raise UserError(f"LIBERO does not import ({error}); run: pip install --no-deps -r requirements-libero.txt") from error
    finally:
        for variable, value in (("MUJOCO_GL", gl), ("LIBERO_CONFIG_PATH", theirs)):
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value
    _mend_robosuite()
    if assets is not None:
        libero.libero._assets_path_cache = str(assets)
    return ControlEnv


def _mend_robosuite() -> None:
    """MuJoCo 4 under robosuite 1.4: `mjData.qM` is gone (`M` holds the same numbers), and an mjtJoint equals no numpy integer."""
    if hasattr(mujoco.MjData, "qM"):
        return
    from robosuite.controllers import base_controller
    from robosuite.utils import binding_utils

    def dense(model, out, mass):
        mujoco.mju_sym2dense(out, mass, model.M_rownnz, model.M_rowadr, model.M_colind)

    binding_utils.MjData.qM = property(lambda self: self._data.M)
    base_controller.mujoco = types.SimpleNamespace(mj_fullM=dense)  # the one function that it calls
    binding_utils.MjModel.jnt_type = property(lambda self: self._model.jnt_type.tolist())


def _libero_config() -> Path:
    """A folder with LIBERO's config.yaml: without one, its first import asks for a data folder on stdin."""
    root = libero_root()
    folders = {"bddl_files": "bddl_files", "init_states": "init_files", "datasets": "../datasets", "assets": "assets"}
    text = "\n".join([f"benchmark_root: {root}", *(f"{k}: {root / v}" for k, v in folders.items())]) + "\n"
    file = cache_dir() / "libero-config" / hashlib.sha256(text.encode()).hexdigest()[:12] / "config.yaml"
    if not file.exists():
        with atomic_path(file) as temporary:
            temporary.write_text(text)
    return file.parent


def _pretend(name: str, **content) -> None:
    """Have `import name` find a module with this content instead of the real one."""
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)


def libero_env(task_id: str, assets: str | None = None, **kwargs):
    """LIBERO's own environment of a task: the truth that ours is measured against. By default from states, without cameras.

    Its layout is that of the usual evaluation: constructed, seeded with 0, reset once. (Fixture poses are drawn from
    numpy's global generator and written into the model; every further reset draws others.)
    """
    env = construct_libero_env(find_task(task_id), find_assets(assets), **kwargs)
    env.seed(0)
    env.reset()
    return env


def construct_libero_env(files: TaskFiles, folder: Path, **kwargs):
    kwargs = {"use_camera_obs": False, "has_offscreen_renderer": False, **kwargs}
    control_env = import_libero(folder)
    if files.index < 0:
        _register_libero_pro(folder)
    return control_env(bddl_file_name=str(files.bddl), **kwargs)


def _register_libero_pro(folder: Path) -> None:
    """Have LIBERO know LIBERO-PRO's objects: its own classes, with files of another name. Those that the assets lack stay unknown."""
    from libero.libero.envs.base_object import OBJECTS_DICT, VISUAL_CHANGE_OBJECTS_DICT

    for category, like in LIBERO_PRO.items():
        if category in OBJECTS_DICT or not any(folder.glob(f"*/{category}.xml")) and not any(folder.glob(f"*/{category}/{category}.xml")):
            continue
        cls = OBJECTS_DICT[like]

        def __init__(self, name=category, obj_name=category, cls=cls, **kwargs):
            cls.__init__(self, name=name, obj_name=obj_name, **kwargs)

        named = "".join(word.capitalize() for word in category.split("_"))  # the category that robosuite's sensors report comes from it
        OBJECTS_DICT[category] = type(named, (cls,), {"__init__": __init__})
        if like in VISUAL_CHANGE_OBJECTS_DICT:
            VISUAL_CHANGE_OBJECTS_DICT[category] = OBJECTS_DICT[category]


def bddl_file(suite: str, index: int) -> Path:
    return find_task(f"{suite}/{index}").bddl


def official_init_states(suite: str, index: int) -> np.ndarray:
    """LIBERO's init states, (50, 1 + nq + nv), read without running what is in the file; UserError if it is anything else."""
    return read_init_states(find_task(f"{suite}/{index}").init_states)
