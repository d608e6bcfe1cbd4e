"""How the scripted demonstrator's hand moves: flows in space that lead to a goal from any state, and the phases of a grip.

Nothing here remembers anything: a displacement, and a phase, is a function of the state alone. A path with a large detour is a
flow too (`funnel`), so that a policy without memory can imitate it.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from common.demos.geometry import UP

OPEN, CLOSE = -1.0, 1.0
SPEED, TURN_SPEED = 0.9, 0.7  # largest action without noise (full scale is 0.3 m/s)
GAIN, TURN_GAIN = 1.3, 1.0  # of the remaining way, what is sent as the next displacement


class PlanError(Exception):
    """No way was found to do a task with a strategy from a state."""


@dataclasses.dataclass
class Hand:
    """What a skill has to know of the hand."""

    position: np.ndarray  # (3,) of the grip site
    rotation: np.ndarray  # (3, 3)
    opening: float  # between the fingers (m)
    closing: float  # speed at which it shrinks (m/s)


def ramp(x: float, start: float, end: float) -> float:
    """0 before `start`, 1 after `end`, linear between."""
    return min(1.0, max(0.0, (x - start) / (end - start)))


def funnel(offset: np.ndarray, axis: np.ndarray, length: float, width: float) -> np.ndarray:
    """Displacement (m) that leads from `offset` (position minus goal) to the goal, arriving from the side of `axis`.

    Far from the axis the flow first climbs to `length` along it, then closes in on the axis, and within `width` of it comes
    down to the goal: a path with a large detour that is still a function of the position alone.
    """
    along = offset @ axis
    across = offset - along * axis
    distance = math.sqrt(across @ across)
    missing = length * ramp(distance, 0.03, width) - along
    return missing * axis - across * (1.0 - 0.8 * ramp(missing, 0.0, 0.12))


def come_in(offset: np.ndarray, axis: np.ndarray, path: Detour, height: float, width: float, ready: float = 1.0) -> np.ndarray:
    """Displacement that leads to the goal along `axis` over the last `height`, and to there along `path`.

    Before it is `height` out along the axis, the flow moves out rather than sideways; it goes in as far as the hand is
    `ready` (0 to 1: turned as it should be).
    """
    across = offset - (offset @ axis) * axis
    rise = height * max(ramp(math.sqrt(across @ across), 0.008, width), 1.0 - ready)
    flow = funnel(offset - rise * axis, path.axis, path.length, path.width)
    outward = flow @ axis
    return outward * axis + (flow - outward * axis) * (1.0 - ramp(rise - offset @ axis, 0.02, 0.06))


def follow(offset: np.ndarray, *args) -> np.ndarray:
    """(n, 3) offsets that a hand would pass through if it moved as `come_in(offset, *args)` says."""
    path = [offset.copy()]
    while math.sqrt(offset @ offset) > 0.012 and len(path) < 150:
        step = come_in(offset, *args) * GAIN
        offset = offset + 0.3 * step * min(1.0, 0.05 * SPEED / np.abs(step).max())
        path.append(offset)
    return np.array(path)


@dataclasses.dataclass(frozen=True)
class Detour:
    """The side from which the hand, or what it carries, arrives."""

    axis: np.ndarray
    length: float
    width: float


# Directions seen from the robot: x points away from it, y to its left.
DIRECTIONS = {
    "left": np.array([0.0, 1.0, 0.0]),
    "right": np.array([0.0, -1.0, 0.0]),
    "far": np.array([1.0, 0.0, 0.0]),
    "near": np.array([-1.0, 0.0, 0.0]),
    "over": UP,
}

PATHS = ("direct", *DIRECTIONS)


def detour(name: str, out: np.ndarray) -> Detour:
    """The path called `name` to a goal that the last centimetres approach from the direction `out`."""
    if name == "direct":
        return Detour(out, 0.02, 0.10)
    side = DIRECTIONS[name]
    across = side - (side @ out) * out
    if across @ across < 0.3:
        return Detour(out, 0.40, 0.12)
    axis = 0.9 * across / math.sqrt(across @ across) + 0.436 * out
    return Detour(axis, 0.42 if name == "over" else 0.28, 0.11)


def paths_to(out: np.ndarray) -> list[str]:
    """Names of the paths that make sense to a goal that is approached from `out`."""
    return [name for name in PATHS if name == "direct" or DIRECTIONS[name] @ out > -0.5]


def aligned(turned: np.ndarray, rotation: np.ndarray) -> float:
    """1 if two rotations differ by 0.3 rad or less, 0 if by 0.6 rad or more."""
    return ramp(0.5 * (np.vdot(turned, rotation) - 1.0), 0.825, 0.955)


def readiness(hand: Hand, rotation: np.ndarray) -> float:
    """1 if the hand is turned as `rotation` and open, 0 if it is not."""
    return aligned(hand.rotation, rotation) * ramp(hand.opening, 0.05, 0.07)


def grip_phase(miss: float, hand: Hand, width: float) -> str:
    """What the hand is doing, read off the state alone.

    `miss` is how far the hand is from where it has to be to take hold (m), `width` the thickness of what is to be between the
    fingers: "reaching" (come in, open), "closing", or "held" (the fingers have stopped; if on nothing, the hand will move
    away without the thing, and be "reaching" again).
    """
    if miss > 0.03 or (miss > 0.012 and hand.opening > 0.07):
        return "reaching"
    return "held" if hand.opening < width + 0.012 and hand.closing < 0.02 else "closing"
