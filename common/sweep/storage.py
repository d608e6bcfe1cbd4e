"""Copies of a sweep's runs at a path that outlives machines: an object store (s3://, gs://) or a folder, whatever fsspec knows."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import fsspec

from common.cli import UserError


class Storage:
    """A folder for each run, NAME, below `url`. A run is worked on by one process at a time, which pushes; others pull."""

    def __init__(self, url: str):
        """UserError if nothing can be written there."""
        try:
            self.fs, self.root = fsspec.url_to_fs(url, use_listings_cache=False)
            self.fs.makedirs(self.root, exist_ok=True)
            self.fs.pipe_file(f"{self.root}/.writable", b"")
        except Exception as error:  # of many kinds, by what is behind the url
            raise UserError(f"--storage {url}: {' '.join(str(error).split()) or type(error).__name__}") from error
        self.pushed: dict[str, tuple[int, int]] = {}  # what each file was when it was copied

    def push(self, name: str, folder: Path) -> None:
        """Copy what is new in `folder`, each file whole or not at all; attempts.json last, as it says how far the others are."""
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lock" and not p.name.startswith(".")]
        for path in sorted(files, key=lambda p: p.name == "attempts.json"):
            target = f"{self.root}/{name}/{path.relative_to(folder).as_posix()}"
            try:
                now = path.stat().st_mtime_ns, path.stat().st_size
                if self.pushed.get(target) != now:
                    self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                    self.fs.put_file(str(path), f"{target}.part")
                    self.fs.mv(f"{target}.part", target)
            except FileNotFoundError:  # replaced meanwhile: next time
                continue
            self.pushed[target] = now

    def pull(self, name: str, folder: Path, only: Collection[str] = (), force: bool = False) -> None:
        """Copy what is stored of a run into `folder`, or `only` files of these names, if it has come further than what is there, or by
        `force`."""
        source = f"{self.root}/{name}"
        try:
            stored = json.loads(self.fs.cat_file(f"{source}/attempts.json"))
        except FileNotFoundError:
            return
        here = folder / "attempts.json"
        if not force and here.exists() and _seconds(json.loads(here.read_text())) >= _seconds(stored):
            return
        files = [p for p in self.fs.find(source) if not p.endswith(".part")]
        for path in sorted(files, key=lambda p: p.endswith("/attempts.json")):
            relative = path[path.index(f"{source}/") + len(source) + 1 :]
            file_name = relative.rpartition("/")[2]
            if only and file_name not in only:
                continue
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            self.fs.get_file(path, str(folder / relative))

    def clear(self, name: str) -> None:
        """Forget what is stored of a run that begins anew."""
        if self.fs.exists(f"{self.root}/{name}"):
            self.fs.rm(f"{self.root}/{name}", recursive=True)
        self.pushed.clear()


def _seconds(attempts: list[dict]) -> float:
    return sum(a["end"] - a["start"] for a in attempts)
