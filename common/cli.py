"""What every command shares: one-line errors, flags with ranges, files that appear whole, locks, the cache folder, the usable cores."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import math
import os
import re
import resource
import secrets
import signal
import stat
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any


class UserError(Exception):
    """Something the user can mend (a wrong task, file, flag or version). The message is one line: what is wrong, what to do."""


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_unfinished: set[Path] = set()  # files that are being written


def run_command(main: Callable[[], None]) -> None:
    """Run `main`; what the machine lacks (space, a disk that can be written, memory, files), weights of another version and a `UserError`
    become one line on stderr and exit code 2, Ctrl-C one line and 130. A second Ctrl-C does not wait for anything."""
    try:
        with contextlib.suppress(ValueError):  # not the main thread
            if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
                signal.signal(signal.SIGINT, _interrupt)  # till now it is `common.start`'s
        main()
    except UserError as error:
        sys.exit(_fail(str(error)))
    except Exception as error:  # some of MuJoCo's and torch's have no base of their own
        if (line := _explained(error)) is None:
            raise
        sys.unraisablehook = lambda _: None  # what was half made, a reader of torch's, complains when it is taken down
        sys.exit(_fail(line))
    except KeyboardInterrupt:
        _remove_unfinished()
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _explained(error: Exception) -> str | None:
    """What the machine lacks, or that weights are of another version of the code, and what to do, if that is what `error` says."""
    said, number = (str(error).splitlines() or [""])[0], getattr(error, "errno", None)
    if number in UNWRITABLE:
        return f"cannot write {error.filename}: {error.strerror}; free some space or choose another folder"
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in said:  # what torch's reading processes say
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many files are open in this process, which may have {limit}; allow more: ulimit -n {max(4096, 2 * limit)}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return f"the GPU's memory is full ({said}); take fewer environments, or smaller batches"
    # torch's, oneDNN's, MuJoCo's, C++'s
    full = ("can't allocate memory", "could not create a primitive", "Could not allocate memory", "std::bad_alloc")
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(words in said for words in full):
        return f"the memory is full ({said or 'out of memory'}); take fewer environments or workers, or smaller batches"
    if "can't start new thread" in said or number == errno.EAGAIN:
        return f"no more threads or processes can be started ({said}); stop others, or allow more: ulimit -u"
    if said.startswith("Error(s) in loading state_dict"):
        return "the checkpoint's weights don't fit this version of the code: take the revision that its config.json names, or start again"
    return None


def _interrupt(*_) -> None:
    """The first Ctrl-C. A second one may come before this one is seen to, amid what it unwinds, and ends the process at once."""
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


def _leave(*_) -> None:
    _remove_unfinished()
    os.write(2, b"interrupted\n")
    os._exit(130)


def _remove_unfinished() -> None:
    for path in list(_unfinished):
        with contextlib.suppress(OSError):
            path.unlink()


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


@dataclass(frozen=True)
class Range:
    """The values of a number, written beside its field: `std_start: Annotated[float, Range(0.02, 1.5)] = 0.15`."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf  # bounds that are not themselves allowed
    below: float = math.inf
    infinite: bool = False  # inf is allowed, too
    zero: bool = False  # 0 is, too

    def holds(self, value: float) -> bool:
        inside = self.low <= value <= self.high and self.above < value < self.below
        return inside or (self.infinite and value == math.inf) or (self.zero and value == 0)

    def __str__(self) -> str:
        if self.above > -math.inf:
            return f"more than {self.above:g}"
        bounds = f"at least {self.low:g}" if self.high == math.inf else f"between {self.low:g} and {self.high:g}"
        bounds += f" and less than {self.below:g}" if self.below < math.inf else ""
        return f"0 or {bounds}" if self.zero else bounds


Count = Annotated[int, Range(1)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(above=0)]
PositiveOrInf = Annotated[float, Range(above=0, infinite=True)]
Fraction = Annotated[float, Range(0, 1)]


def check_ranges(args: Any) -> None:
    """Raise UserError if a number in a dataclass of flags is outside the Range beside its field; words ("auto") and None are let be."""

    def ranges(hint: Any) -> Iterator[Range]:
        if typing.get_origin(hint) is Annotated:
            yield from (extra for extra in hint.__metadata__ if isinstance(extra, Range))
        for part in typing.get_args(hint):
            yield from ranges(part)

    for name, hint in typing.get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        for allowed in ranges(hint):
            if isinstance(value, (int, float)) and not allowed.holds(value):
                raise UserError(f"--{name.replace('_', '-')} must be {allowed}, not {value}")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed over `path`, else removed.

    OSError, in the name of `path`, if that is not possible."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(6)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _unfinished.add(temporary)
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))  # with the permissions that the user's umask leaves
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk is reported without the file's name, or in that of the temporary one
        if error.errno in UNWRITABLE and error.filename in (None, str(temporary)):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):  # a disk that can't be written any more
            temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


def remove_leftovers(folder: Path, deep: bool = True) -> None:
    """Remove what processes that were killed amid writing (SIGKILL, a crash) have left in a folder, in which no other one writes, and if
    `deep` in those within it."""
    for path in (folder.rglob if deep else folder.glob)(".*-*"):
        if re.fullmatch(r"\..+-[0-9a-f]{12}(\.\w+)?", path.name) and path.is_file():
            path.unlink()


class Lock(contextlib.AbstractContextManager):
    """A locked file, until it is closed or nothing refers to it any more, here and in every child process that its descriptor is passed to,
    or these processes are dead."""

    def __init__(self, path: str | os.PathLike):
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        return self.descriptor

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            self.close()


def lock(path: str | os.PathLike) -> Lock | None:
    """Open and lock a file; None if another process holds it. OSError: a file system without locks."""
    try:
        return Lock(path)
    except BlockingIOError:
        return None


def usable_cores() -> int:
    """How many CPU cores this process may use: $RL_DATA_ENGINE_CORES, if it says so, else those of its affinity, or fewer by a
    container's quota."""
    if (told := os.environ.get("RL_DATA_ENGINE_CORES", "")).isdecimal():  # by common.sweep: other runs are on the other cores
        return max(1, int(told))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


def _quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """CPU time per time that the control group grants (inf: as much as there is), of Linux's cgroups v2 or v1."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((root / name).read_text() for name in files).split()
            if quota != "max" and float(quota) > 0:
                return float(quota) / float(period)
    return math.inf


def cache_dir() -> Path:
    """The folder for what can be rebuilt: `$RL_DATA_ENGINE_CACHE`, else `rl-data-engine` in `$XDG_CACHE_HOME` or `~/.cache`.

    Where that cannot be written, one in the system's temporary folder, with a warning; processes started later take the same.
    """
    try:
        if explicit := os.environ.get("RL_DATA_ENGINE_CACHE"):
            return _writable(Path(explicit).expanduser())
        return _writable(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rl-data-engine")
    except RuntimeError as error:  # a user without a home folder
        return _temporary_cache(str(error))


@functools.cache
def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        return _temporary_cache(f"{folder}: {error.strerror}")


def _temporary_cache(obstacle: str) -> Path:
    """A folder of this user's in the system's temporary folder, the same every time if nobody else has taken its name."""
    try:
        folder = Path(tempfile.gettempdir()) / f"rl-data-engine-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            folder = Path(tempfile.mkdtemp(prefix="rl-data-engine-"))
    except OSError as error:
        raise UserError(
            f"cannot keep compiled tasks and kernels ({obstacle}); set RL_DATA_ENGINE_CACHE to a folder you can write"
        ) from error
    message = "cannot keep compiled tasks and kernels (%s): keeping them in %s; set RL_DATA_ENGINE_CACHE to a folder you can write"
    logging.getLogger(__name__).warning(message, obstacle, folder)
    os.environ["RL_DATA_ENGINE_CACHE"] = str(folder)  # one warning, and one folder for all processes
    os.environ.setdefault("MPLCONFIGDIR", str(folder / "matplotlib"))  # which has the same trouble, and a line of its own about it
    return folder
