"""Where LIBERO's meshes and textures come from: a folder, a package, the hub, or stand-ins."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

from common.cli import UserError
from common.libero.standins import standin_assets
from common.suites import libero_root

ASSETS_REPO = "lerobot/libero-assets"  # where hf-libero downloads LIBERO's assets from
HUB_TIMEOUT = 5.0  # seconds until the hub counts as out of reach


def find_assets(assets: str | None = None) -> Path:
    """The asset tree that tasks are built from.

    It is `assets`, else $LIBERO_ASSETS ("standin" in either means the stand-ins of `common.libero.standins`), else LIBERO's own folder or
    cache, else downloaded from the Hugging Face Hub, else, with a warning, the stand-ins.
    """
    explicit = assets or os.environ.get("LIBERO_ASSETS")
    if explicit == "standin":
        return standin_assets()
    if explicit:
        folder, source = Path(explicit).expanduser(), "--assets" if assets else "LIBERO_ASSETS"
    else:
        cache = Path.home() / ".cache" / "libero" / "assets"
        folder, source = next((c for c in (libero_root() / "assets", cache) if c.is_dir()), cache), "LIBERO's own folder"
        if not folder.is_dir() and (obstacle := _download_assets(folder)):
            _warn_of_standins(obstacle)
            return standin_assets()
    missing = [n for n in ("scenes", "articulated_objects", "stable_hope_objects", "textures") if not (folder / n).is_dir()]
    if missing:
        raise UserError(f"{folder} ({source}) is not a LIBERO asset tree: it has no folder {missing[0]!r}; pass --assets DIR")
    return folder.resolve()


@functools.cache
def _download_assets(folder: Path) -> str | None:
    """Download LIBERO's assets into `folder`, whole or not at all; returns why that is not possible, or None."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return "not on this machine, and huggingface_hub is not installed to download them"
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return "not on this machine, and HF_HUB_OFFLINE forbids to download them"
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".assets-"))
    try:
        revision = HfApi().repo_info(ASSETS_REPO, repo_type="dataset", timeout=HUB_TIMEOUT).sha
        print(f"downloading LIBERO's assets (140 MB) from the Hugging Face Hub into {folder}", file=sys.stderr, flush=True)
        snapshot_download(ASSETS_REPO, repo_type="dataset", revision=revision, local_dir=temporary, etag_timeout=HUB_TIMEOUT)
        shutil.rmtree(temporary / ".cache", ignore_errors=True)  # the hub's bookkeeping
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except Exception as error:  # the network's, the hub's, the disk's: whatever it is, there are the stand-ins
        if not folder.is_dir():  # else another process has downloaded them meanwhile
            return f"not on this machine, and the download failed ({type(error).__name__})"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return None


@functools.cache
def _warn_of_standins(obstacle: str) -> None:
    """Once in a run: worker processes leave it to their parent."""
    if multiprocessing.parent_process() is None:
        message = "LIBERO's assets are %s: using stand-ins made of primitives, so NUMBERS ARE NOT COMPARABLE WITH PUBLISHED LIBERO; %s"
        logging.getLogger(__name__).warning(message, obstacle, "for LIBERO's own, pass --assets DIR or set LIBERO_ASSETS")


@functools.cache
def assets_fingerprint(folder: Path) -> str:
    """Ten hex digits over the names and sizes of the asset tree's files, and the text of its MJCF files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        if path.suffix == ".xml":
            digest.update(path.read_bytes())
    return digest.hexdigest()[:10]
