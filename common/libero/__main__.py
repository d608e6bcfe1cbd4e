"""List the tasks and compile what is missing: `python -m common.libero [--suite libero_goal | --task FILE.bddl]`."""

from __future__ import annotations

import tyro

from common.cli import UserError, run_command
from common.libero.tasks import load_task
from common.suites import SUITES, expand


def main(suite: str | None = None, task: str | None = None, assets: str | None = None) -> None:
    """List LIBERO's tasks and compile those that the cache does not hold.

    Args:
        suite: one suite only.
        task: one task only: as the scripts' --task, also a BDDL file of your own, which is checked.
        assets: a folder, libero (its own or none) or standin (default: $LIBERO_ASSETS, else LIBERO's own, else stand-ins).
    """
    if suite is not None and suite not in SUITES:
        raise UserError(f"unknown suite {suite!r}; suites are {', '.join(SUITES)}")
    if task is not None and suite is not None:
        raise UserError("name either a --suite or a --task")
    for task_id in [task] if task else expand([suite] if suite else list(SUITES)):
        found = load_task(task_id, assets)
        goal = " & ".join(f"{p.name}({', '.join(p.args)})" for p in found.goal)
        print(f"{found.suite}/{found.index}  {found.name}  {goal}" if found.index >= 0 else f"{found.id}  {goal}", flush=True)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
