"""What the tests share: the real assets and tasks compiled from them, or a reason to skip."""

from __future__ import annotations

import pytest

from common import tasks
from common.cli import UserError


def _no_download():
    raise UserError("they are not on this machine; set LIBERO_ASSETS")


@pytest.fixture(scope="session")
def assets() -> str:
    """LIBERO's asset folder. Tests never download it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "_download_assets", _no_download)
        try:
            return str(tasks.find_assets())
        except UserError as error:
            pytest.skip(f"needs LIBERO's assets: {error}")


@pytest.fixture(scope="session")
def drawer_task(assets) -> tasks.Task:
    """libero_goal/0, open the middle drawer of the cabinet: success can be had by setting a joint."""
    return tasks.load_task("libero_goal/0", assets)
