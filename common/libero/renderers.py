"""Renderers of states. Pictures are upright: row 0 is the top, agentview shows the robot's base at the top, at the back of the table.

LIBERO's HDF5 files store pictures bottom row first ("opengl"): `picture[::-1]`. Public VLA data sets rotate those files' pictures
by 180 degrees, which makes ours mirrored left to right: `picture[:, ::-1]`.

Two renderers; outputs record which one was used (`renderer.name`), for a policy trained on one may not take the other's pictures:
- "warp": our ray tracer (common/libero/raytracer.py), on the CPU or a GPU, without a GL library and under any MuJoCo version. It
  follows MuJoCo's OpenGL code in light and textures, with hard edges, without shadows (LIBERO's lights cast none) or reflections.
- "gl": MuJoCo's own, pixel for pixel LIBERO's OffScreenRenderEnv; needs a GL library (MUJOCO_GL=egl or osmesa).
Both show the visual geoms (group 1), not the collision geoms (group 0), and no sites.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import mujoco
import numpy as np

from common.cli import UserError
from common.libero.warp_start import start_warp, warp_device
from common.video import find_ffmpeg

if TYPE_CHECKING:  # torch and MuJoCo Warp are imported late
    import torch

    from common.libero.warp_env import LiberoWarpEnv

RENDERERS = ("warp", "gl")
CAMERAS = ("agentview", "robot0_eye_in_hand")


def available(renderer: str = "warp") -> tuple[bool, str]:
    """Whether pictures and videos can be made here, and else why not (one line)."""
    try:
        _check(renderer)
        find_ffmpeg()
    except UserError as error:
        return False, str(error)
    return True, ""


def make_renderer(
    model: mujoco.MjModel,
    cameras: Sequence[str] = CAMERAS,
    width: int = 128,
    height: int = 128,
    renderer: str = "warp",
    threads: int | None = None,
    device: str = "cpu",
) -> Renderer:
    """A renderer of a model, which must not change afterwards.

    Args:
        cameras: their names in the model.
        width, height: pixels, each 1 to 4096.
        renderer: "warp" or "gl".
        threads: of "warp" on the CPU, default the cores that this process may use.
        device: of "warp": "cpu" or a GPU ("cuda", "cuda:1").

    Raises UserError if this machine cannot run the renderer, or for an unknown renderer, camera or size.
    """
    names = [model.camera(i).name for i in range(model.ncam)]
    for camera in cameras:
        if camera not in names:
            raise UserError(f"no camera {camera!r} in this model; choose from {', '.join(names)}")
    if not (1 <= width <= 4096 and 1 <= height <= 4096):
        raise UserError(f"pictures of {width} x {height} pixels are not possible; choose 1 to 4096")
    _check(renderer)
    if renderer == "gl":
        return _GLRenderer(model, cameras, width, height)
    return _WarpRenderer(model, cameras, width, height, threads, warp_device(device).alias)


class Renderer:
    """Pictures of a model's states. `name` is the renderer's, `cameras`, `width` and `height` are as asked for."""

    name: str

    def __init__(self, model: mujoco.MjModel, cameras: Sequence[str], width: int, height: int):
        self.model, self.data = model, mujoco.MjData(model)
        self.cameras, self.width, self.height = tuple(cameras), width, height
        self.camera_ids = [model.camera(name).id for name in cameras]
        self.option = mujoco.MjvOption()
        self.option.geomgroup[0] = 0
        self.option.sitegroup[:] = 0

    def render(self, qpos: np.ndarray) -> dict[str, np.ndarray]:
        """Pictures of states `qpos` (B, nq): for each camera (B, height, width, 3) uint8, row 0 the top."""
        qpos = np.asarray(qpos, np.float64)
        if qpos.ndim != 2 or qpos.shape[1] != self.model.nq:
            raise ValueError(f"qpos has shape {qpos.shape}, not (B, {self.model.nq})")
        if len(qpos) == 0:
            return {name: np.zeros((0, self.height, self.width, 3), np.uint8) for name in self.cameras}
        pictures = self._render(qpos)  # (B, C, H, W, 3)
        return {name: np.ascontiguousarray(pictures[:, i]) for i, name in enumerate(self.cameras)}

    def _render(self, qpos: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _set(self, qpos: np.ndarray) -> None:
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)  # for cameras that track a centre of mass
        mujoco.mj_camlight(self.model, self.data)


class _WarpRenderer(Renderer):
    name = "warp"
    batch = 64  # states at a time: bounds memory, and a larger one is no faster

    def __init__(self, model: mujoco.MjModel, cameras: Sequence[str], width: int, height: int, threads: int | None, device: str):
        super().__init__(model, cameras, width, height)
        from common.libero.raytracer import RayTracer

        self.tracer = RayTracer(model, self.option, self.camera_ids, width, height, threads, device)

    def render_worlds(self, env: LiberoWarpEnv) -> dict[str, torch.Tensor]:
        """`render` of the environment's current states, as uint8 tensors on its device, which must be the renderer's: nothing is
        copied through the host, and nothing waits for the device."""
        import torch
        import warp as wp

        shape = env.num_envs, len(self.cameras), self.height, self.width, 3
        with env.on_device():
            pictures = torch.empty(shape, dtype=torch.uint8, device=wp.device_to_torch(env.device))
            self.tracer.draw(wp.from_torch(pictures.view(-1, 3)), *env.poses())
        return {name: pictures[:, i] for i, name in enumerate(self.cameras)}

    def _render(self, qpos: np.ndarray) -> np.ndarray:
        pictures = [self._render_batch(qpos[i : i + self.batch]) for i in range(0, len(qpos), self.batch)]
        return np.concatenate(pictures)

    def _render_batch(self, qpos: np.ndarray) -> np.ndarray:
        poses = []
        for q in qpos:
            self._set(q)
            matrices = self.data.geom_xmat.reshape(-1, 3, 3).copy(), self.data.cam_xmat.reshape(-1, 3, 3).copy()
            poses.append((self.data.geom_xpos.copy(), matrices[0], self.data.cam_xpos.copy(), matrices[1]))
        return self.tracer.render(*(np.stack(p) for p in zip(*poses, strict=True)))


class _GLRenderer(Renderer):
    name = "gl"

    def __init__(self, model: mujoco.MjModel, cameras: Sequence[str], width: int, height: int):
        super().__init__(model, cameras, width, height)
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, height)
        self.renderer = mujoco.Renderer(model, height, width)

    def _render(self, qpos: np.ndarray) -> np.ndarray:
        pictures = np.empty((len(qpos), len(self.cameras), self.height, self.width, 3), np.uint8)
        for i, q in enumerate(qpos):
            self._set(q)
            for j, camera in enumerate(self.camera_ids):
                self.renderer.update_scene(self.data, camera, self.option)
                self.renderer.render(out=pictures[i, j])
        return pictures


def _check(renderer: str) -> None:
    """Raise UserError if `renderer` is unknown or cannot run here."""
    if renderer == "unknown":  # as `common.data` reads a file that doesn't say
        raise UserError("what drew the pictures is not recorded: name it with --renderer (LIBERO's own files: MuJoCo's renderer, gl)")
    if renderer not in RENDERERS:
        raise UserError(f"no renderer {renderer!r}; choose from {', '.join(RENDERERS)}")
    if renderer == "warp":
        start_warp()
        return
    try:
        with warnings.catch_warnings():  # glfw's, where there is no display
            warnings.simplefilter("ignore")
            mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16).close()
    except Exception as error:  # a backend without its library fails in its own way: AttributeError, ImportError, RuntimeError, ...
        raise UserError(
            f"MuJoCo's GL renderer does not start ({type(error).__name__}: {error}); set MUJOCO_GL to egl or osmesa and install that "
            "library (libegl1 or libosmesa6), or use the renderer warp"
        ) from error
