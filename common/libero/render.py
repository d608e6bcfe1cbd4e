"""Pictures and videos of LIBERO states, upright: row 0 is the top, agentview shows the robot's base at the top, at the back of the table.

LIBERO's HDF5 files store pictures bottom row first ("opengl"): `picture[::-1]`. Public VLA data sets rotate those files' pictures
by 180 degrees, which makes ours mirrored left to right: `picture[:, ::-1]`.

Two renderers; outputs record which one was used (`renderer.name`), for a policy trained on one may not take the other's pictures:
- "warp": our ray tracer (common/libero/raytracer.py), on the CPU or a GPU, without a GL library and under any MuJoCo version. It
  follows MuJoCo's OpenGL code in light and textures, with hard edges, without shadows (LIBERO's lights cast none) or reflections.
- "gl": MuJoCo's own, pixel for pixel LIBERO's OffScreenRenderEnv; needs a GL library (MUJOCO_GL=egl or osmesa).
Both show the visual geoms (group 1), not the collision geoms (group 0), and no sites.

    python -m common.libero.render FILE [FILE ...]         # pictures of the stored states, into demonstrations and corpora
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mujoco
import numpy as np
import tyro

from common.cli import UserError, atomic_path, cache_dir, run_command
from common.data import Episode, image_names, read_attrs, replace_images, require_sound
from common.libero.tasks import Task, load_task

if TYPE_CHECKING:  # torch, Warp and MuJoCo Warp are imported late
    import torch
    import warp

    from common.libero.warp_env import LiberoWarpEnv

RENDERERS = ("warp", "gl")
CAMERAS = ("agentview", "robot0_eye_in_hand")


def available(renderer: str = "warp") -> tuple[bool, str]:
    """Whether pictures and videos can be made here, and else why not (one line)."""
    try:
        _check(renderer)
        _ffmpeg()
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


def start_warp() -> None:
    """Import Warp quietly, its compiled kernels in our cache folder."""
    try:
        import warp
    except ImportError as error:
        raise UserError(f"Warp does not import ({error}); run: pip install -r requirements.txt") from error
    folder = cache_dir() / "warp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"Permission denied: {folder}")
    except OSError as error:
        raise UserError(
            f"cannot keep compiled kernels in {folder} ({error}); set RL_DATA_ENGINE_CACHE to a folder you can write"
        ) from error
    warp.config.quiet = True
    if warp.config.kernel_cache_dir is None:
        warp.config.kernel_cache_dir = str(folder)
    with _silent_stderr():
        warp.init()


def warp_device(name: str) -> warp.Device:
    """Warp's device "cpu", "cuda" or "cuda:1"; UserError if there is none of that name."""
    start_warp()
    import warp as wp

    if name != "cpu" and not wp.is_cuda_available():
        raise UserError(f"no CUDA device for Warp (asked for {name}); choose cpu, or use a GPU with a driver of CUDA 12.4 or later")
    try:
        return wp.get_device(name)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"no device {name!r}; choose from {', '.join(d.alias for d in wp.get_devices())}") from error


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence C code: Warp's library warns on stderr wherever there is no CUDA driver."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float = 20) -> None:
    """Write frames (T, H, W, 3) uint8 as an mp4 (H.264) with the ffmpeg that imageio-ffmpeg brings; H and W must be even.

    The file appears whole or not at all. 20 frames a second is LIBERO's control rate.
    """
    frames = np.ascontiguousarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) == 0:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 (T, H, W, 3)")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames of {width} x {height} pixels cannot be H.264; make width and height even")
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    encoding = ["-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p"]  # 4:2:0 is what browsers play
    with atomic_path(Path(path)) as temporary:
        command = [_ffmpeg(), "-y", "-loglevel", "error", *source, *encoding, str(temporary)]
        result = subprocess.run(command, input=frames.tobytes(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if result.returncode != 0:
            said = result.stderr.decode(errors="replace").strip()
            if os.strerror(errno.ENOSPC) in said:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            raise UserError(f"ffmpeg cannot write {path}: {said}")


def _ffmpeg() -> str:
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise UserError(f"no ffmpeg for videos ({error}); run: pip install -r requirements.txt") from error


# --------------------------------------------------------------------------------------------------- pictures into files


def add_images(
    path: str | os.PathLike,
    size: int = 128,
    cameras: Sequence[str] = CAMERAS,
    renderer: str = "warp",
    assets: str | None = None,
    progress=None,
    overwrite: bool = False,
) -> None:
    """Render the stored states of a file in LIBERO's layout into its obs/agentview_rgb, obs/eye_in_hand_rgb (T, size, size, 3).

    As LIBERO's, picture t shows the state AFTER action t. After the last one that is `final_state`; where the file has none (LIBERO's
    own), the robot as the proprioception has it among the objects one step (50 ms) earlier. The task is the one that the file names, the
    scene as `load_task` compiles it (fixtures of LIBERO's own files stood up to millimetres elsewhere). `renderer` and `image_assets`
    are recorded. On all cores; the file is replaced whole or left as it is.

    Args:
        cameras: names in the model, robot0_eye_in_hand becoming eye_in_hand_rgb.
        assets: LIBERO's asset folder or "standin", of the kind that the file was made on; see `common.libero.assets.find_assets`.
        progress: a `common.runs.Progress`.
        overwrite: replace all pictures that the file has.

    Raises UserError for a file that is missing, damaged or of another layout, or has pictures; and as `make_renderer` and `load_task`.
    """
    require_sound(path)
    if not overwrite and (names := image_names(path)):
        raise UserError(f"{path} has pictures already ({', '.join(names)}); --overwrite replaces them")
    attrs = read_attrs(path)
    try:
        task = load_task(attrs["bddl_file_name"].removesuffix(".bddl"), assets)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    require_sound(path, task)
    made_on, here = (str(a).startswith("standin") for a in (attrs.get("assets", task.assets), task.assets))
    if made_on != here:
        wanted = "stand-ins: pass --assets standin" if made_on else "LIBERO's assets: pass their folder with --assets DIR"
        raise UserError(f"{path} was made on {wanted}")
    camera = make_renderer(task.model, cameras, size, size, renderer)
    batch = max(1, min(64, 2**22 // size**2))  # states at a time: bounds memory

    def pictures(episode: Episode) -> Iterator[dict[str, np.ndarray]]:
        qpos = _qpos_after(task, episode)
        for i in range(0, len(qpos), batch):
            seen = camera.render(qpos[i : i + batch])
            yield {f"{name.removeprefix('robot0_')}_rgb": frames for name, frames in seen.items()}
            if progress is not None:
                progress.update(len(qpos[i : i + batch]))

    if progress is not None:
        progress.stage(f"pictures of {Path(path).name}", int(attrs["total"]))
    replace_images(path, pictures, {"renderer": camera.name, "image_assets": task.assets})


def _qpos_after(task: Task, episode: Episode) -> np.ndarray:
    """(T, nq) AFTER each action."""
    qpos = episode.states[:, 1 : 1 + task.model.nq]
    if episode.final_state is not None:
        last = episode.final_state[1 : 1 + task.model.nq]
    else:
        last = qpos[-1].copy()
        last[task.arm_qpos], last[task.gripper_qpos] = episode.proprio["joint_states"][-1], episode.proprio["gripper_states"][-1]
    return np.vstack([qpos[1:], last])


@dataclasses.dataclass
class Args:
    """Render the stored states of demonstrations and corpora into their files, as LIBERO's agentview_rgb and eye_in_hand_rgb."""

    files: tyro.conf.Positional[list[Path]]
    """HDF5 files in LIBERO's layout; each is replaced whole, or left as it is"""
    size: int = 128
    """height and width in pixels"""
    cameras: tuple[str, ...] = CAMERAS
    """camera names"""
    renderer: str = "warp"
    """warp (needs no GL library) or gl (MuJoCo's own, needs MUJOCO_GL=egl or osmesa and its library)"""
    overwrite: bool = False
    """replace all pictures that a file has"""
    assets: str | None = None
    """LIBERO's asset folder, or standin (default: $LIBERO_ASSETS, else LIBERO's own, else a download, else stand-ins)"""


def main() -> None:
    from common.runs import Progress

    args = tyro.cli(Args)
    if not args.files:
        raise UserError("no file given; name one or more HDF5 files")
    progress = Progress()
    try:
        for path in args.files:
            add_images(path, args.size, args.cameras, args.renderer, args.assets, progress, args.overwrite)
            progress.say(f"{path}: {', '.join(image_names(path))}, {args.size} x {args.size}, renderer {args.renderer}")
    finally:
        progress.close()


if __name__ == "__main__":
    run_command(main)
