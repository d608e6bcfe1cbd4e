"""The documentation says what is true: its commands parse, its links lead somewhere, its error messages are the code's."""

from __future__ import annotations

import ast
import dataclasses
import functools
import glob
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = sorted((ROOT / "docs" / "notebook").glob("*.md"))  # commands in it are of earlier revisions
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(text: str) -> list[str]:
    """The commands in a page's code: lines of code blocks, and inline code, that call python, torchrun or bash."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    blocks += re.findall(r"^(?: {4}(?! ).*\n)+", re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S), re.M)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    parts = [part.strip() for line in lines for part in line.split(" #")[0].split("&&")]
    ours = [part for part in parts if re.match(r"(?:\w+=\S+ )*(?:time )?(?:python3?|torchrun|bash) \S", part)]
    return [part for part in ours if not re.match(r'python3? (-m venv|-c ")', part)]


@dataclasses.dataclass(frozen=True)
class Command:
    target: str  # a script, or a module after -m
    is_module: bool
    args: tuple[str, ...]


def read_command(line: str) -> Command:
    words = shlex.split(re.sub(r"^(?:\w+=\S+ )*(?:time )?", "", line))
    if words[0] == "torchrun":
        words = words[words.index(next(w for w in words if w.endswith(".py"))) - 1 :]
    if words[1] == "-m":
        return Command(words[2], True, tuple(words[3:]))
    return Command(words[1], False, tuple(words[2:]))


def parse(command: Command, monkeypatch) -> None:
    """Run the command up to where its arguments have been parsed, by its own parser."""

    class Parsed(Exception):
        pass

    real = tyro.cli

    def only_parse(f, **kwargs):
        if not dataclasses.is_dataclass(f):  # a function: the same signature, doing nothing
            f = functools.wraps(f)(lambda *args, **kwargs: None)
        real(f, **kwargs)
        raise Parsed

    def only_parse_one_of(functions, **kwargs):
        real_one_of({name: functools.wraps(f)(lambda *args, **kwargs: None) for name, f in functions.items()}, **kwargs)
        raise Parsed

    real_one_of = tyro.extras.subcommand_cli_from_dict
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", only_parse_one_of)
    monkeypatch.setattr(tyro, "cli", only_parse)
    monkeypatch.setattr(sys, "argv", [command.target, *command.args])
    with pytest.raises(Parsed):
        if command.is_module:
            runpy.run_module(command.target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / command.target), run_name="__main__")


# The commands of bad_inputs.md end in errors, and tests/test_inputs.py runs them.
ALL = sorted({(line, name(page)) for page in PAGES if page.name != "bad_inputs.md" for line in commands(page.read_text())})


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # what runpy says when a module had been imported
@pytest.mark.parametrize("line", sorted({line for line, _ in ALL}))
def test_commands_are_real(line, monkeypatch, capsys):
    """Every command names a script or module of ours and flags that it has, with values that they take."""
    pages = [page for other, page in ALL if other == line]
    if line.startswith("bash") or " bash " in line:
        assert (ROOT / re.search(r"bash (\S+)", line)[1]).is_file(), pages
        return
    command = read_command(line)
    if "--help" in command.args:
        assert (ROOT / command.target).is_file(), pages
        return
    try:
        parse(command, monkeypatch)
    except SystemExit:
        pytest.fail(f"{pages}: {line}\n{capsys.readouterr().err}")


def test_a_wrong_flag_is_found(monkeypatch):
    """The test above can fail."""
    for wrong in (
        "python gaussian_ppo.py --num-pattern 3",
        "python -m common.data --strickt F",
        "python gaussian_ppo.py --seed one",
        "python -m common.lerobot export F --ou D",
    ):
        with pytest.raises(SystemExit), monkeypatch.context() as patch:
            parse(read_command(wrong), patch)


def test_commands_are_found():
    text = "A `python a.py --b 1`.\n\n```bash\nX=1 python -m c.d E  # f\npip install g && python h.py\n```\n"
    assert commands(text) == ["X=1 python -m c.d E", "python h.py", "python a.py --b 1"]


# ------------------------------------------------------------------------------------------------------------------ links


@functools.cache
def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    headings = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h) for h in re.findall(r"^#+ +(.+?) *$", text, re.M)]
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h.lower()).strip()) for h in headings}


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOK], ids=name)
def test_links_lead_somewhere(page):
    """Relative links and images exist, and so does the heading that a link names."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def test_every_page_and_image_is_used():
    navigation = re.sub(r"#.*", "", (ROOT / "mkdocs.yml").read_text())
    left_out = [name(p) for p in (ROOT / "docs").glob("**/*.md") if f": {p.relative_to(ROOT / 'docs')}\n" not in navigation]
    assert not left_out, "mkdocs.yml's navigation lacks these pages: add a line for each"
    text = "".join(p.read_text() for p in [*PAGES, *NOTEBOOK])
    images = [Path(p).name for p in glob.glob(str(ROOT / "docs" / "images" / "*"))]
    assert not [image for image in images if image not in text]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


# ------------------------------------------------------------------------------------------------------------------ error messages


def strings_of_the_code() -> str:
    """All strings in the code, one a line; what an f-string fills in is a gap."""
    found = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(" ".join(s.split()) for s in found)


def test_error_messages_are_the_codes():
    """The first column of troubleshooting's tables quotes messages (in backticks); upper-case letters and ... stand for what varies."""
    strings = strings_of_the_code()
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    quoted = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 20
    pieces = [piece.strip(" ;:()'") for message in quoted for piece in re.split(r"\.\.\.|\b[A-Z]\b|'|\bSUITE/TASK\b|--\w+", message)]
    assert not [piece for piece in pieces if len(piece) > 8 and piece not in strings]
