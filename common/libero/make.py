"""`make_env`: a LIBERO task as a vector environment, whatever simulates it and whatever is seen of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from gymnasium.vector import AutoresetMode, VectorEnv

from common.cli import UserError
from common.libero.env import LiberoVectorEnv, can_sleep
from common.libero.tasks import Task, load_task
from common.libero.wrappers import NextStep

BACKENDS = ("auto", "cpu", "warp")
WARP_WORLDS = 256  # environments from which "auto" takes a GPU, if there is one (docs/warp.md: 1.3 times 16 CPU cores)


def choose_backend(backend: str, num_envs: int, device: str | None = None) -> str:
    """ "cpu" or "warp": what "auto" means for `num_envs` environments on this machine."""
    if backend not in BACKENDS:
        raise UserError(f"no simulator for backend={backend!r}; choose from {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    if num_envs < WARP_WORLDS or device == "cpu":
        return "cpu"
    try:
        from common.libero.warp_env import find_device

        find_device(device)
    except UserError as error:
        logging.getLogger(__name__).info("physics on CPU cores: %s", error)
        return "cpu"
    return "warp"


def choose_physics(physics: str, backend: str) -> str:
    """ "exact", "sleep" or "coarse": what "auto" means on `backend` ("cpu" or "warp") with this MuJoCo."""
    if physics != "auto":
        return physics
    return "coarse" if backend == "cpu" and can_sleep() else "exact"


def make_env(
    task: Task | str,
    num_envs: int = 1,
    obs: str = "state",
    backend: str = "cpu",
    seed: int | None = None,
    device: str | None = None,
    image_size: int = 84,
    cameras: Sequence[str] = ("agentview",),
    renderer: str = "warp",
    show_state: bool = False,
    physics: str = "exact",
    **kwargs,
) -> VectorEnv:
    """Make a vector environment of a LIBERO task (a `Task` or a task id).

    Args:
        obs: "state", float32 vectors (see `StateObservation`), or "pixels", a Dict of pictures and proprioception (see
            `common.libero.pixels.PixelObservation`); image_size (pixels), cameras and renderer are of these pictures.
        show_state: with pictures, the state as well, for critics.
        backend: "cpu" (`LiberoVectorEnv`), "warp" (`common.libero.warp_env.LiberoWarpEnv`, on `device`) or "auto" (see `choose_backend`).
        physics: "exact", "sleep" or "coarse" (see `LiberoVectorEnv`; of the CPU backend), or "auto" (see `choose_physics`).
        device: of "warp", default the first GPU; and of the ray tracer, default where the worlds are.
        kwargs: as in the class; and autoreset_mode may be NEXT_STEP (`common.libero.wrappers.NextStep`).
    """
    if obs not in ("state", "pixels"):
        raise UserError(f"obs must be 'state' or 'pixels', not {obs!r}")
    if kwargs.get("autoreset_mode") == AutoresetMode.NEXT_STEP:
        if kwargs.get("tensors"):
            raise UserError("tensors on the device need autoreset SAME_STEP or DISABLED, not NEXT_STEP, which waits for the host")
        options = dict(
            obs=obs, device=device, image_size=image_size, cameras=cameras, renderer=renderer, physics=physics, show_state=show_state
        )
        return NextStep(
            make_env(task, num_envs, backend=backend, seed=seed, **options, **kwargs | {"autoreset_mode": AutoresetMode.DISABLED})
        )
    backend = choose_backend(backend, num_envs, device)
    physics = choose_physics(physics, backend)
    task = load_task(task) if isinstance(task, str) else task
    if backend == "cpu":
        env = LiberoVectorEnv(task, num_envs, seed, physics=physics, **kwargs)
    elif physics != "exact":
        raise UserError(f"physics {physics} needs backend cpu, not warp")
    else:
        from common.libero.warp_env import LiberoWarpEnv

        env = LiberoWarpEnv(task, num_envs, seed, device=device, **kwargs)
    if obs == "state":
        return env
    from common.libero.pixels import PixelEnv

    return PixelEnv(env, image_size, cameras, renderer, device or ("cpu" if backend == "cpu" else "cuda"), show_state)
