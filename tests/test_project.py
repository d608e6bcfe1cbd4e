"""What pyproject.toml promises: pins (uv's against pip's and the lock), and which way imports go."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it under its old name
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GROUPS = PROJECT["dependency-groups"]


def pins(*files: str) -> set[str]:
    lines = [line.split(" #")[0].split(" --hash")[0].strip() for file in files for line in (ROOT / file).read_text().splitlines()]
    return {str(Requirement(line)) for line in lines if line and line[0] not in "#-"}


@pytest.mark.parametrize(
    "listed, files",
    [
        (PROJECT["project"]["dependencies"], ["requirements.txt", "requirements-libero.txt"]),
        (GROUPS["assets"], ["requirements-assets.txt"]),
        (GROUPS["docs"], ["requirements-docs.txt"]),
    ],
)
def test_uv_and_pip_install_the_same(listed, files):
    assert {str(Requirement(line)) for line in listed} == pins(*files)
    assert all([s.operator for s in Requirement(line).specifier] == ["=="] for line in listed)


def test_every_python_has_one_pin_of_everything():
    """No marker leaves a supported Python without a package, or with two."""
    names = {Requirement(line).name for line in pins("requirements.txt")}
    for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        assert python in SpecifierSet(PROJECT["project"]["requires-python"])
        chosen = [Requirement(line) for line in pins("requirements.txt")]
        chosen = [r.name for r in chosen if r.marker is None or r.marker.evaluate({"python_version": python})]
        assert sorted(chosen) == sorted(names), python


def test_the_lock_is_of_these_pins_and_of_the_public_index():
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    locked = {(package["name"], package["version"]) for package in lock["package"]}
    for line in [*PROJECT["project"]["dependencies"], *GROUPS["assets"], *GROUPS["docs"]]:
        requirement = Requirement(line)
        assert (requirement.name.lower(), str(requirement.specifier)[2:]) in locked, f"{line}: run uv lock"
    left_out = {Requirement(line).name for line in PROJECT["tool"]["uv"]["override-dependencies"]}
    assert left_out and not left_out & {name for name, _ in locked}
    sources = {package["source"].get("registry", "") for package in lock["package"]}
    assert sources == {"https://pypi.org/simple", ""}


SCRIPTS = {"dlr_discover", "gaussian_ppo", "diffusion_ppo", "vla_pretrain", "vla_finetune"}


def imported(file: Path) -> set[str]:
    """First parts of the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


def test_scripts_import_common_and_nothing_imports_scripts():
    for script in SCRIPTS:
        assert not imported(ROOT / f"{script}.py") & (SCRIPTS | {"benchmarks", "tests"}), script
    for file in (ROOT / "common").rglob("*.py"):
        assert not imported(file) & (SCRIPTS | {"benchmarks", "tests"}), file


def test_only_one_room_knows_robosuite_and_bddl():
    for file in (ROOT / "common").rglob("*.py"):
        if file.parent.name != "libero":
            assert not imported(file) & {"robosuite", "bddl", "libero"}, file


def test_imports_go_one_way():
    """The contracts of pyproject.toml, which name the rooms from the scripts' helpers down to the errors."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
