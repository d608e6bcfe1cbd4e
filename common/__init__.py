"""What the scripts share: the simulator, the demonstrator, files, and small helpers.

MuJoCo, when it is imported, loads the GL library that MUJOCO_GL names, and fails where that is missing. Only the renderer "gl" needs
one, so the variable is dropped then, with a line that says so. numba, when it decorates a function whose code it is to keep, fails where
it can keep none: then it is given our cache folder. This is the first thing that any module here runs.
"""

import importlib.util
import logging
import os
import tempfile
from pathlib import Path


def _drop_missing_gl() -> None:
    """Unset MUJOCO_GL, here and for the processes that are started later, if MuJoCo cannot be imported with it."""
    try:
        import mujoco  # noqa: F401
    except Exception as error:  # each backend fails in its own way: AttributeError, ImportError, RuntimeError
        if isinstance(error, ModuleNotFoundError) and error.name == "mujoco":
            return  # not installed: whoever imports it says so
        message = "MUJOCO_GL=%s does not work here (%s: %s): going on without a GL library; the renderer gl is not available"
        logging.getLogger(__name__).warning(message, os.environ.pop("MUJOCO_GL"), type(error).__name__, error)
        os.environ.pop("PYOPENGL_PLATFORM", None)  # set by the attempt


def _keep_compiled_functions() -> None:
    """Set NUMBA_CACHE_DIR, if numba cannot keep what it compiles beside the source, ours and robosuite's."""
    robosuite = importlib.util.find_spec("robosuite")
    folders = [Path(__file__).parent, *(Path(location) for location in (robosuite.submodule_search_locations if robosuite else ()))]
    if "NUMBA_CACHE_DIR" not in os.environ and not all(map(_keeps_bytecode, folders)):
        from common.cli import cache_dir

        os.environ["NUMBA_CACHE_DIR"] = str(cache_dir() / "numba")


def _keeps_bytecode(folder: Path) -> bool:
    try:
        (folder / "__pycache__").mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "__pycache__"):
            return True
    except OSError:
        return False


if os.environ.get("MUJOCO_GL"):
    _drop_missing_gl()
_keep_compiled_functions()
