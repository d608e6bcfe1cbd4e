"""Anyone's policy in LIBERO: a Python callable, or a server that speaks openpi's websocket protocol; and a check of what both mean.

What a policy is shown, and what its answer means, is that of openpi's LIBERO example, as most published checkpoints have it:

    observation/image        (n, 224, 224, 3) uint8, agentview: drawn at 256, LIBERO's rotated by 180 degrees, made smaller
    observation/wrist_image  the same of the camera in the hand
    observation/state        (n, 8) float64: grip site's position (m), hand's axis-angle (rad, angle in [0, 2 pi]), fingers (m)
    prompt                   n strings
    actions                  (n, chunk, 7): translation (1 is 0.05 m) and rotation (axis-angle, 1 is 0.5 rad) of the hand in the frame of
                             the robot's base, clipped to [-1, 1]; the gripper's sign (negative opens, positive closes)

A callable gets the dict above of all environments that are due at once; and `episode` and `step` (n,), for those that remember. A server
gets a request an environment, without n, all at the same time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from common.cli import UserError
from common.data import Episode, read_episodes
from common.data.vla import CAMERAS, PROPRIO
from common.demos import collect
from common.libero import Task, make_env
from common.libero.renderers import Renderer
from common.libero.tasks import find_human_demos

DRAWN, SHOWN = 256, 224  # pixels of a picture's side, as the simulator draws it and as the policy sees it
OPTIONAL = "pip install -r requirements-policies.txt"
PATIENCE = 600.0  # seconds that a server may take to answer: a first request may have it compile its model
# How pictures might be turned: steps along the rows and columns of an upright one.
# LIBERO's environment returns the bottom row first. Public data sets rotate that by 180 degrees: upright, and mirrored left to right.
TURNS = {"rotated as in public data sets": (1, -1), "upright": (1, 1), "as LIBERO returns them": (-1, 1), "mirrored from these": (-1, -1)}

Observations = dict[str, Any]
Answer = Callable[[Observations], np.ndarray]  # observations -> (n, chunk, 7)


class Policy:
    """A policy that is told one instruction, as `vla_finetune.evaluate` asks it; what it answers is checked.

    `beyond` is the largest translation so far, before LIBERO clips it to 1.
    """

    def __init__(self, answer: Answer, name: str, prompt: str, replan: int, size: int = SHOWN, turn: tuple[int, int] = (1, -1)):
        """`replan` actions of each chunk will be executed; `size` and `turn` (see TURNS) are of its pictures."""
        self.answer, self.name, self.prompt, self.replan, self.size, self.turn = answer, name, prompt, replan, size, turn
        self.beyond = 0.0

    def __call__(self, images: np.ndarray, proprio: np.ndarray, init_states: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Pictures (n, 2, H, W, 3) uint8, row 0 the top, proprioception (n, 8), init states and steps (n,) -> (n, chunk, 7) in [-1, 1]."""
        views = resize(images[:, :, :: self.turn[0], :: self.turn[1]], self.size)
        observations = {"observation/image": views[:, 0], "observation/wrist_image": views[:, 1], "observation/state": proprio}
        observations |= {"prompt": [self.prompt] * len(images), "episode": init_states.copy(), "step": steps.copy()}
        actions = self._checked(self.answer(observations), len(images))
        self.beyond = max(self.beyond, float(np.abs(actions[..., :3]).max(initial=0)))
        return np.clip(actions, -1, 1)

    def _checked(self, answer: Any, count: int) -> np.ndarray:
        try:
            actions = np.asarray(answer, np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.name} returned no array of actions of one shape ({error})") from error
        if actions.ndim != 3 or actions.shape[0] != count or actions.shape[2] != 7:
            wanted = f"({count}, chunk, 7)" if actions.ndim != 3 or actions.shape[0] != count else "7 numbers an action"
            raise UserError(f"{self.name} returned actions of shape {actions.shape}, not {wanted}: environments, actions of a chunk, 7")
        if actions.shape[1] < self.replan:
            raise UserError(f"{self.name} returned chunks of {actions.shape[1]} actions; pass --replan {actions.shape[1]} or less")
        if not np.isfinite(actions).all():
            raise UserError(f"{self.name} returned actions that are not finite numbers (nan or inf)")
        return actions


def resize(pictures: np.ndarray, size: int) -> np.ndarray:
    """Square pictures (..., H, H, 3) uint8 at `size` pixels a side, bilinear with antialiasing, as Pillow does it."""
    from PIL import Image

    if pictures.shape[-2] == size:
        return np.ascontiguousarray(pictures)
    small = [Image.fromarray(p).resize((size, size), Image.Resampling.BILINEAR) for p in pictures.reshape(-1, *pictures.shape[-3:])]
    return np.stack([np.asarray(p) for p in small]).reshape(*pictures.shape[:-3], size, size, 3)


def instruction_of(task: Task) -> str:
    """What published policies are told: the sentence in the file's name (docs/vla_finetune.md); of a task of one's own that in the file,
    as LIBERO-PRO reads it: its files perturb the sentence, not the name."""
    if task.index < 0:
        return task.language
    return re.sub(r"^[A-Z0-9_]+_SCENE\d+_", "", task.name).replace("_", " ")


def find_policy(spec: str, num_envs: int) -> Answer:
    """The policy that `spec` names: "ws://host:port", or "module:name" (or "file.py:name"): a function, or a class, which is made once.

    A server is connected to `num_envs` times. Raises UserError if it isn't there.
    """
    if spec.startswith(("ws://", "wss://")):
        return _Server(spec, num_envs)
    return _find_callable(spec)


# ---------------------------------------------------------------------------------------------- a callable


def _find_callable(spec: str) -> Answer:
    module_name, _, name = spec.rpartition(":")
    if not module_name or not name:
        raise UserError(f"--policy {spec!r} is neither module:function, file.py:function nor ws://host:port")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = functools.reduce(getattr, name.split("."), _import(module_name))
        found = found() if inspect.isclass(found) else found
    except UserError:
        raise
    except Exception as error:  # whatever somebody else's module raises
        raise UserError(f"--policy {spec} does not load: {_told(error)}") from error
    if not callable(found):
        raise UserError(f"--policy {spec} is a {type(found).__name__}, not a function")

    def answer(observations: Observations) -> np.ndarray:
        try:
            return found(observations)
        except Exception as error:
            raise UserError(f"--policy {spec} failed: {_told(error)}") from error

    return answer


def _import(name: str):
    if not name.endswith(".py"):
        return importlib.import_module(name)
    if not Path(name).is_file():
        raise UserError(f"--policy: there is no file {name}")
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _told(error: BaseException) -> str:
    """An exception in a line, with where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


# ---------------------------------------------------------------------------------------------- a server


class _Server:
    """Requests to a policy server, one connection an environment. It says once what it is; then each request has its answer."""

    def __init__(self, address: str, connections: int):
        self.address = address
        try:
            import msgpack
            import websockets.exceptions
            import websockets.sync.client
        except ImportError as error:
            raise UserError(f"a policy server needs {error.name}, which is not installed; run: {OPTIONAL}") from error
        self.pack = functools.partial(msgpack.packb, default=pack_array)
        self.unpack = functools.partial(msgpack.unpackb, object_hook=unpack_array)
        self.failures = (OSError, ValueError, EOFError, websockets.exceptions.WebSocketException, msgpack.exceptions.UnpackException)
        self.threads, self.connections = ThreadPoolExecutor(connections), []
        try:
            for _ in range(connections):
                connection = websockets.sync.client.connect(address, compression=None, max_size=None, open_timeout=30, proxy=None)
                self.connections.append(connection)
                self.metadata = self.unpack(connection.recv(timeout=PATIENCE))
        except self.failures as error:
            raise UserError(
                f"no policy server answers at {address} ({type(error).__name__}: {error}); start it, or name another"
            ) from error

    def __call__(self, observations: Observations) -> list:
        sent = {name: values for name, values in observations.items() if name not in ("episode", "step")}
        rows = [{name: values[i] for name, values in sent.items()} for i in range(len(observations["prompt"]))]
        return [answer for first in range(0, len(rows), len(self.connections)) for answer in self._ask_some(rows[first:])]

    def _ask_some(self, rows: list[dict]) -> list:
        return list(self.threads.map(self._ask, self.connections, rows))

    def _ask(self, connection, row: dict) -> np.ndarray:
        try:
            connection.send(self.pack(row))
            answer = connection.recv(timeout=PATIENCE)
            if isinstance(answer, str):  # a server that fails sends its traceback
                raise UserError(f"the policy server at {self.address} failed: {(answer.strip().splitlines() or ['?'])[-1]}")
            return self.unpack(answer)["actions"]
        except self.failures as error:
            raise UserError(f"the policy server at {self.address} is gone ({type(error).__name__}: {error})") from error
        except (LookupError, TypeError) as error:
            raise UserError(f"the policy server at {self.address} sent an answer without 'actions'") from error

    def close(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(*self.failures):
                connection.close()
        self.threads.shutdown()


def pack_array(value):
    """msgpack of numpy arrays and numbers, as openpi's client and server write them."""
    if not isinstance(value, (np.ndarray, np.generic)) or value.dtype.kind not in "biufSU":
        raise ValueError(f"a {type(value).__name__} cannot be sent")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def unpack_array(value: dict):
    if b"__ndarray__" in value:
        return np.frombuffer(value[b"data"], np.dtype(value[b"dtype"])).reshape(value[b"shape"])
    if b"__npgeneric__" in value:
        return np.dtype(value[b"dtype"]).type(value[b"data"])
    return value


# ---------------------------------------------------------------------------------------------- do both mean the same?


def compare(task: Task, policy: Policy, camera: Renderer, seed: int, say: Callable[[str], None]) -> dict | None:
    """`check_conventions` with a demonstration (LIBERO's human ones, if they are on disk, else a scripted one), told in a few lines.

    Returns the measurements, or None for a task that the demonstrator cannot do.
    """
    path = find_human_demos(task)
    try:
        demonstrations = read_episodes(path, task) if path else collect(task, 1, seed, noise=0.0, replayable=True, progress=False)
    except UserError as error:
        say(f"conventions are not checked: there is no demonstration to compare with ({error})")
        return None
    found, remarks = check_conventions(task, policy, camera, demonstrations[0])
    cosine = lambda x: "-" if x is None else f"{x:.2f}"  # noqa: E731
    source = path or "scripted"
    say(f"conventions: a demonstration of {task.id} ({source}) replayed: {'success' if found['replayed'] else 'no success'}; on its way")
    measured = f"translation {cosine(found['translation'])}, rotation {cosine(found['rotation'])} (cosine)"
    say(f"  the policy agrees in {measured}, gripper {found['gripper']:.0%}; translation with pictures")
    say("  " + "; ".join(f"{name} {cosine(score)}" for name, score in found["turned"].items()))
    for remark in remarks:
        say(f"warning: {remark}")
    return found | {"demonstration": str(source), "remarks": remarks}


def check_conventions(task: Task, policy: Policy, camera: Renderer, demonstration: Episode, frames: int = 12) -> tuple[dict, list[str]]:
    """Replay a demonstration, show the policy what is seen on the way, and compare what it would do with what was done.

    Returns the measurements and what stands out, a line each:
    replayed: the demonstration's actions reach the goal in the simulator; of how many steps the last one was.
    translation, rotation: cosine between the policy's motion over the next `replan` steps and the demonstration's, mean over the frames
        in which the demonstration moves so (None: it never does).
    gripper: share of actions with the demonstration's sign. largest: of the translations, before clipping.
    turned: `translation` for pictures turned in each way of TURNS.
    A policy that is right need not agree with one demonstration; one that means its numbers otherwise disagrees in a pattern.
    """
    actions, states, nq = demonstration.actions, demonstration.states, task.model.nq
    env = make_env(task, 1, autoreset_mode=AutoresetMode.DISABLED, max_steps=len(actions) + 1)
    env.set_state(states[:1])
    ends = next((t for t, action in enumerate(actions, start=1) if env.step(action[None])[2][0]), None)
    env.close()
    chosen = np.linspace(0, max(0, len(actions) - policy.replan), frames).astype(int)
    env = make_env(task, frames, autoreset_mode=AutoresetMode.DISABLED)
    env.set_state(states[chosen])
    robot = env.proprioception()
    env.close()
    proprio = np.concatenate([robot[name] for name in PROPRIO], axis=1)
    seen = camera.render(states[chosen, 1 : 1 + nq])
    images = np.stack([seen[name] for name in CAMERAS.values()], axis=1)
    done = np.stack([np.resize(actions[t : t + policy.replan], (policy.replan, 7)) for t in chosen])
    episode = np.full(frames, demonstration.attrs.get("init_state", -1))
    planned, turned = {}, {}
    for name, turn in TURNS.items():
        asked = Policy(policy.answer, policy.name, policy.prompt, policy.replan, policy.size, turn)
        planned[name] = asked(images, proprio, episode, chosen)[:, : policy.replan]
        turned[name] = _agreement(planned[name][..., :3], done[..., :3])
        if turn == policy.turn:
            own, largest = planned[name], asked.beyond
    gripper = float(np.mean(np.sign(own[..., 6]) == np.sign(done[..., 6])))
    found = {"replayed": ends is not None, "steps": ends, "translation": _agreement(own[..., :3], done[..., :3])}
    found |= {"rotation": _agreement(own[..., 3:6], done[..., 3:6]), "gripper": gripper, "largest": largest, "turned": turned}
    return found, _remarks(found, own[..., 6], policy.turn)


def _agreement(planned: np.ndarray, done: np.ndarray) -> float | None:
    """Mean cosine between motions (frames, steps, 3), each summed over its steps, where `done` moves."""
    a, b = planned.sum(1), done.sum(1)
    moves = np.linalg.norm(b, axis=1) > 0.1 * done.shape[1]
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean(((a * b).sum(1) / np.maximum(norms, 1e-9))[moves])) if moves.any() else None


def _remarks(found: dict, gripper: np.ndarray, turn: tuple[int, int]) -> list[str]:
    lines = []
    if not found["replayed"]:
        lines.append(
            "the demonstration does not reach the goal here when it is replayed: other assets, or another MuJoCo than it was made on"
        )
    if found["gripper"] < 0.2:
        lines.append("its gripper has the other sign: in LIBERO negative opens and positive closes")
    elif gripper.min() >= 0 and gripper.max() > 0:
        lines.append("its gripper never opens (no negative number): LIBERO takes the sign, and 0 to 1 would have to become -1 to 1")
    if found["largest"] > 1.5:
        lines.append(f"its translations reach {found['largest']:.1f}, and LIBERO's end at 1 (0.05 m): are they normalised otherwise?")
    elif 0 < found["largest"] < 0.1:
        lines.append(f"its translations reach {found['largest']:.3f} only; in LIBERO 1 is 0.05 m: are they metres?")
    for name in ("translation", "rotation"):
        if found[name] is not None and found[name] < -0.5:
            lines.append(f"its {name} goes against the demonstration's (cosine {found[name]:.2f}): is its frame another one?")
    own = next(name for name, way in TURNS.items() if way == turn)
    scores = {name: -1.0 if score is None else score for name, score in found["turned"].items()}
    best = max(scores, key=scores.get)
    if scores[best] > scores[own] + 0.3 and scores[best] > 0.5:
        lines.append(
            f"it agrees better when pictures are {best} (cosine {scores[best]:.2f}) than as they are shown, {own} ({scores[own]:.2f})"
        )
    return lines
