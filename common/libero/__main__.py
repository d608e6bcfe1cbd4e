"""List LIBERO's tasks, and compile what is missing: `python -m common.libero [--suite libero_goal]`."""

from __future__ import annotations

import tyro

from common.cli import UserError, run_command
from common.libero.tasks import load_task
from common.suites import SUITES, task_names


def main(suite: str | None = None, assets: str | None = None) -> None:
    """List LIBERO's tasks and compile those that the cache does not hold.

    Args:
        suite: one suite only.
        assets: a folder, libero (its own or none) or standin (default: $LIBERO_ASSETS, else LIBERO's own, else stand-ins).
    """
    if suite is not None and suite not in SUITES:
        raise UserError(f"unknown suite {suite!r}; suites are {', '.join(SUITES)}")
    for name in [suite] if suite else SUITES:
        for index in range(len(task_names()[name])):
            task = load_task(f"{name}/{index}", assets)
            goal = " & ".join(f"{p.name}({', '.join(p.args)})" for p in task.goal)
            print(f"{name}/{index}  {task.name}  {goal}", flush=True)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
