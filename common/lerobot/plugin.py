"""What `lerobot-eval --env.discover_packages_path=common.lerobot` imports: the environment's name and settings.

This module alone imports lerobot; elsewhere it is not needed.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

LOCAL = "here"
ENV_FILE = Path(__file__).resolve().parents[2] / "env.py"


def register() -> None:
    """Make `--env.type=fast_libero` known: LeRobot's own `libero`, with our simulator."""
    from lerobot.envs import factory
    from lerobot.envs.configs import EnvConfig, HubEnvConfig, LiberoEnv

    @EnvConfig.register_subclass("fast_libero")
    @dataclass
    class FastLiberoEnv(LiberoEnv, HubEnvConfig):
        hub_path: str | None = LOCAL  # or a repository on the Hub, with our env.py in it
        mirror: bool = True
        renderer: str = "warp"
        assets: str | None = None
        observation_height: int = 256
        observation_width: int = 256

    fetch = factory._download_hub_file

    def find(hub_path: str, trust_remote_code: bool, hub_cache_dir: str | None):
        """LeRobot fetches an env.py from the Hub alone; this checkout's needs no fetching."""
        return (LOCAL, "env.py", str(ENV_FILE), None) if hub_path == LOCAL else fetch(hub_path, trust_remote_code, hub_cache_dir)

    factory._download_hub_file = find


if importlib.util.find_spec("lerobot") is not None:
    register()
