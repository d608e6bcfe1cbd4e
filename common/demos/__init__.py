"""The scripted demonstrator: several ways of doing any LIBERO task, whose names are known.

    from common.demos import load_or_collect, strategies

    strategies(task)                        # up to eight ways of doing it that work and differ visibly, found once
    episodes = load_or_collect(task, 80)    # demonstrations, equally many of each, kept in the cache

Read it from the bottom up: `geometry` and `motion`, `grasps` and `places`, the two skills `pick_place` and `articulate`, the
`demonstrator` that does one task in one way, `attempts` at it by the dozen, the `rehearsal` that chooses the ways, and the
`collection` of demonstrations. `python -m common.demos` writes them to files.
"""

from common.demos.attempts import Attempt, perform
from common.demos.collection import collect, load_or_collect, write_demonstrations
from common.demos.demonstrator import SKILLS, Demonstrator, Strategy
from common.demos.rehearsal import strategies

__all__ = [
    "SKILLS",
    "Attempt",
    "Demonstrator",
    "Strategy",
    "collect",
    "load_or_collect",
    "perform",
    "strategies",
    "write_demonstrations",
]
