"""LeRobot's environment hub: `make_env("USER/REPO", n_envs=8, trust_remote_code=True)` of lerobot.envs.factory calls the one in here.

Put the project into a repository on the Hub, env.py at its root. Of a repository LeRobot fetches this file alone, so it fetches the rest.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent

if not (HERE / "common" / "lerobot").is_dir():  # .../models--USER--REPO/snapshots/REVISION/env.py
    from huggingface_hub import snapshot_download

    user, repository = HERE.parents[1].name.split("--")[1:3]
    snapshot_download(f"{user}/{repository}", revision=HERE.name, cache_dir=HERE.parents[2])
sys.path.insert(0, str(HERE))

from common.lerobot.hub import make_env  # noqa: E402

__all__ = ["make_env"]
