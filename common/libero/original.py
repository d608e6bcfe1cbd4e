"""LIBERO itself, imported without a question, a GL library or a download: what tasks are compiled by and ours is measured against."""

from __future__ import annotations

import logging
import os
import sys
import types
from pathlib import Path

import mujoco
import numpy as np

from common.cli import UserError, atomic_path, cache_dir
from common.libero.assets import find_assets, libero_root
from common.libero.tasks import resolve, task_names


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


def libero_env(task_id: str, assets: str | None = None, **kwargs):
    """LIBERO's own environment of a task: the truth that ours is measured against. By default from states, without cameras.

    Its layout is that of the usual evaluation: constructed, seeded with 0, reset once. (Fixture poses are drawn from
    numpy's global generator and written into the model; every further reset draws others.)
    """
    suite, index = resolve(task_id)
    env = construct_libero_env(suite, index, find_assets(assets), **kwargs)
    env.seed(0)
    env.reset()
    return env


def construct_libero_env(suite: str, index: int, folder: Path, **kwargs):
    kwargs = {"use_camera_obs": False, "has_offscreen_renderer": False, **kwargs}
    return import_libero(folder)(bddl_file_name=str(bddl_file(suite, index)), **kwargs)


def bddl_file(suite: str, index: int) -> Path:
    return libero_root() / "bddl_files" / suite / f"{task_names()[suite][index]}.bddl"


def official_init_states(suite: str, index: int) -> np.ndarray:
    """LIBERO's 50 init states: a pickle that torch wrote, read with a loader that admits numpy arrays only."""
    import _codecs

    import torch

    path = libero_root() / "init_files" / suite / f"{task_names()[suite][index]}.pruned_init"
    allowed = [(np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, _codecs.encode]
    with torch.serialization.safe_globals([*allowed, type(np.dtype(np.float64))]):
        return np.asarray(torch.load(path, weights_only=True), np.float64)
