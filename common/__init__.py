"""What the scripts share: the simulator, the demonstrator, files, and small helpers.

MuJoCo, when it is imported, loads the GL library that MUJOCO_GL names, and fails where that is missing. Only the renderer "gl" needs
one, so the variable is dropped then, with a line that says so. This is the first thing that any module here runs.
"""

import logging
import os


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


if os.environ.get("MUJOCO_GL"):
    _drop_missing_gl()
