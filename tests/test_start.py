"""What must not stop a start: a cache or checkout that cannot be written, a user without a home. And what stops it, in one line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from common.cli import UserError, cache_dir

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The system's temporary folder, and a cache folder that cannot be made."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("RL_DATA_ENGINE_CACHE", str(tmp_path / "file" / "cache"))
    return tmp_path / "tmp"


def test_a_cache_that_cannot_be_written(temporary, caplog):
    """A folder in the temporary one takes its place, for this user alone and the same every time, with one warning."""
    folder = temporary / f"rl-data-engine-{os.getuid()}"
    assert cache_dir() == cache_dir() == folder and folder.stat().st_mode & 0o777 == 0o700
    assert os.environ["RL_DATA_ENGINE_CACHE"] == str(folder)  # for other processes
    (record,) = caplog.records
    assert "file/cache: Not a directory" in record.getMessage() and str(folder) in record.getMessage()
    assert "set RL_DATA_ENGINE_CACHE to a folder you can write" in record.getMessage()


def test_a_name_that_others_can_write_is_not_taken(temporary):
    taken = temporary / f"rl-data-engine-{os.getuid()}"
    taken.mkdir()
    taken.chmod(0o777)
    assert cache_dir() != taken and cache_dir().parent == temporary and not any(taken.iterdir())


def test_nowhere_to_write(temporary, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "nowhere"))
    with pytest.raises(UserError, match="set RL_DATA_ENGINE_CACHE"):
        cache_dir()


def test_no_home(temporary, monkeypatch, caplog):
    """As for a uid that the machine does not know, in a container."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    for name in ("RL_DATA_ENGINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RL_DATA_ENGINE_CACHE", "")  # undone by monkeypatch, also when cache_dir sets it
    assert cache_dir() == temporary / f"rl-data-engine-{os.getuid()}"
    assert "Could not determine home directory" in caplog.text


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_a_checkout_and_a_home_that_cannot_be_written(tmp_path):
    """All that numba compiles imports, and its cache is where ours is."""
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (tmp_path / "common", *(path for path in (tmp_path / "common").iterdir() if path.is_dir())):
        (folder / "__pycache__").write_text("")  # no folder can be made here, not even by root
    (tmp_path / "tmp").mkdir()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import os, common.demos, common.metrics; print(common.__file__)"
    code += "; print(os.environ['NUMBA_CACHE_DIR'])"
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache", "RL_DATA_ENGINE_CACHE": "", "TMPDIR": str(tmp_path / "tmp")}
    result = run_python(code, **nowhere)
    assert result.returncode == 0, result.stderr
    cache = tmp_path / "tmp" / f"rl-data-engine-{os.getuid()}"
    assert result.stdout.split() == [str(tmp_path / "common" / "__init__.py"), str(cache / "numba")]
    assert result.stderr.count("set RL_DATA_ENGINE_CACHE") == 1


COMMANDS = [
    ["dlr_discover.py"],
    ["gaussian_ppo.py"],
    ["diffusion_ppo.py"],
    ["vla_pretrain.py"],
    ["vla_finetune.py"],
    ["-m", "common.sweep"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=[words[-1] for words in COMMANDS])
def test_a_signal_amid_the_imports_is_one_line(tmp_path, command):
    for name in ("numpy", "torch", "tyro"):  # those that take long, and here for ever
        (tmp_path / f"{name}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    for number, said in ((signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "terminated\n")):
        with subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "MUJOCO_GL"} | {"PYTHONPATH": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored where tests are in the background
        ) as process:
            assert process.stdout.readline() == "importing\n", process.stderr.read()
            process.send_signal(number)
            assert (process.stderr.read(), process.wait()) == (said, 128 + number)


def test_a_second_ctrl_c_amid_the_unwinding_of_the_first_is_no_traceback(tmp_path):
    """As torch's DataLoader waits for its workers in `__del__`."""
    code = """
import time
from common.cli import atomic_path, run_command

class Loader:
    def __del__(self):  # what is raised here is printed, and forgotten
        print("tidying up", flush=True)
        time.sleep(60)

def main():
    loader = Loader()
    with atomic_path("file"):
        try:
            print("working", flush=True)
            time.sleep(60)
        finally:
            del loader

run_command(main)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        for line in ("working\n", "tidying up\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGINT)
        assert (process.stderr.read(), process.wait(), list(tmp_path.iterdir())) == ("interrupted\n", 130, [])


@pytest.mark.parametrize("told, count", [({}, 1000), ({"GOMP_SPINCOUNT": "7"}, 7), ({"OMP_WAIT_POLICY": "PASSIVE"}, 0)])
def test_torchs_threads_do_not_wait_at_full_speed(told, count):
    """What GNU's OpenMP says that it was told. Users' own words count."""
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env |= told | {"OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run([sys.executable, "-c", "import common.start, torch"], cwd=ROOT, env=env, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if done.returncode == 0 and not said:
        pytest.skip("torch's OpenMP here is not GNU's")
    assert said and all(line.endswith(f"GOMP_SPINCOUNT = '{count}'") for line in said), said
