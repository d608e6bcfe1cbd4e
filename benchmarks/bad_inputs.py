"""Bad inputs, and the one line that each ends in: a wrong task, flag, file, checkpoint or folder, given to our commands as a user would.

Every command runs here, in this process, in a folder of its own with files that are damaged or foreign in one way each. Each must end with
exit code 2 and one line on stderr that begins with "error: ", and leave the folder as it was.

    python -m benchmarks.bad_inputs                            # the table
    python -m benchmarks.bad_inputs --write docs/bad_inputs.md  # into the page; tests/test_inputs.py compares
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import pickle
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import tyro

from common.cli import UserError, run_command
from common.data import PROPRIO, Episode, write_episodes
from common.runs import save_checkpoint, write_json
from common.vla_model import VLA, save_model

COMMANDS = {  # what is wrong -> a command
    "Tasks": {
        "a task that is none": "gaussian_ppo.py --task libero_goal/open_the_window",
        "an index beyond the suite": "diffusion_ppo.py --task libero_goal/12",
        "a part of many names": "dlr_discover.py --task drawer",
        "a suite that is none": "python -m common.libero --suite libero_100",
        "a sweep of a task that is none": "python -m common.sweep gaussian_ppo.py --tasks libero_gaol",
        "neither a task nor a suite": "python -m common.demos --out out",
        "assets that are not there": "gaussian_ppo.py --assets nowhere",
    },
    "Flags": {
        "a count of 0": "dlr_discover.py --num-patterns 0",
        "less than nothing": "gaussian_ppo.py --total-steps -5",
        "no number": "diffusion_ppo.py --learn-lr nan",
        "an infinity where there can be none": "gaussian_ppo.py --demo-noise inf",
        "more than all": "gaussian_ppo.py --gamma 1.5",
        "a negative seed": "dlr_discover.py --seed -1",
        "pictures too small": "gaussian_ppo.py --image-size 8",
        "a standard deviation of 0": "dlr_discover.py --std-end 0",
        "more minibatches than steps": "gaussian_ppo.py --num-minibatches 100000",
        "flags that exclude each other": "dlr_discover.py --mi-coef 0.1 --obs pixels",
        "a batch that can't be cut": "vla_pretrain.py --data a.hdf5 --batch-size 6 --accumulate 4",
        "weights of other files": "vla_pretrain.py --data a.hdf5 --weights 1 2",
        "weights of 0": "vla_pretrain.py --data a.hdf5 --weights 0",
        "everything held out": "vla_pretrain.py --data a.hdf5 --val-fraction 1",
        "an evaluation of nothing": "vla_finetune.py --eval-only",
        "a limit of 0": "python -m common.sweep gaussian_ppo.py --tasks libero_goal/0 --time-limit 0",
        "the sweep's own flag": "python -m common.sweep folder/gaussian_ppo.py --tasks libero_goal/0 -- --seed 3",
        "a script that is not there": "python -m common.sweep ppo.py --tasks libero_goal/0",
        "a sweep without anything": "python -m common.sweep",
    },
    "Demonstrations and corpora": {
        "no file": "vla_pretrain.py",
        "a file that is not there": "gaussian_ppo.py --demos missing.hdf5",
        "a folder": "python -m common.data folder",
        "no HDF5 file": "python -m common.data text.hdf5",
        "an empty file": "python -m common.data zero.hdf5",
        "the end is missing": "vla_pretrain.py --data truncated.hdf5",
        "HDF5 with something else in it": "python -m common.data foreign.hdf5",
        "NaN in every demonstration": "python -m common.data nan.hdf5",
        "actions of another scale": "python -m common.data scale.hdf5",
        "actions that are words": "python -m common.data words.hdf5",
        "numbers of another kind": "python -m common.data complex.hdf5",
        "arrays of another shape": "python -m common.data shape.hdf5",
        "a picture convention that is unknown": "python -m common.data convention.hdf5",
        "success that contradicts the reward": "python -m common.data success.hdf5",
        "two files to repair": "python -m common.data a.hdf5 a.hdf5 --repair b.hdf5",
        "a filter key that is not there": "vla_pretrain.py --data a.hdf5 --filter-key train",
        "no pictures": "vla_pretrain.py --data a.hdf5",
        "pictures that are not square": "vla_pretrain.py --data wide.hdf5",
        "pictures of two sizes": "vla_pretrain.py --data small.hdf5 large.hdf5",
    },
    "Runs and checkpoints": {
        "a folder that is not there": "gaussian_ppo.py --resume nowhere",
        "a run of another script": "gaussian_ppo.py --resume run",
        "another flag than the run's": "dlr_discover.py --resume run --seed 7",
        "a config.json that is damaged": "dlr_discover.py --resume damaged",
        "a model that is not there": "vla_finetune.py --checkpoint nowhere --eval-only",
        "a checkpoint that is damaged": "vla_finetune.py --checkpoint half.pt --eval-only",
        "a checkpoint of another script": "vla_finetune.py --checkpoint run/checkpoint.pt --eval-only",
        "a checkpoint that would run code": "vla_finetune.py --checkpoint hostile.pt --eval-only",
        "a pickle that would run code": "vla_finetune.py --checkpoint hostile.pickle --eval-only",
        "a model of other sizes": "vla_finetune.py --checkpoint sizes.pt --eval-only",
    },
}
TASK = SimpleNamespace(
    name="open_the_middle_drawer_of_the_cabinet",
    language="open the middle drawer of the cabinet",
    problem_name="libero_tabletop_manipulation",
    bddl_file="bddl_files/libero_goal/open_the_middle_drawer_of_the_cabinet.bddl",
    xml="<mujoco/>",
    model=SimpleNamespace(nq=12, nv=10),
)


class Hostile:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def make_files() -> None:
    """The files that the commands name, in the current folder."""
    import torch

    def corpus(name: str, change: Callable[[h5py.File], None] = lambda file: None, side: tuple[int, int] | None = None) -> None:
        rng, episodes = np.random.default_rng(0), []
        for _ in range(2):
            proprio = {key: rng.normal(size=(6, width)) for key, width in PROPRIO.items()}
            pictures = {f"{k}_rgb": np.zeros((6, *side, 3), np.uint8) for k in ("agentview", "eye_in_hand")} if side else {}
            actions = np.sign(rng.normal(size=(6, 7))) * 0.5
            actions[:, 6] = 1
            states = rng.normal(size=(7, 23))
            episodes.append(Episode(actions, states[:-1], proprio, pictures, True, {}, states[-1]))
        write_episodes(name, episodes, TASK, {"script": "test", "renderer": "warp", "assets": "standin:0"})
        with h5py.File(name, "r+") as file:
            change(file)

    def every(key: str, change: Callable[[np.ndarray], object]) -> Callable[[h5py.File], None]:
        def changed(file: h5py.File) -> None:
            for demo in file["data"].values():
                value = change(demo[key][()])
                del demo[key]
                demo[key] = value

        return changed

    corpus("a.hdf5")
    corpus("nan.hdf5", every("actions", lambda x: x * np.nan))
    corpus("scale.hdf5", every("actions", lambda x: 50 * x))
    corpus("words.hdf5", every("actions", lambda x: np.full(x.shape, b"left")))
    corpus("complex.hdf5", every("states", lambda x: x * 1j))
    corpus("shape.hdf5", every("actions", lambda x: x[:, :3]))
    corpus("convention.hdf5", lambda file: file["data"].attrs.update(macros_image_convention="sideways"))
    corpus("success.hdf5", lambda file: [demo.attrs.update(success=False) for demo in file["data"].values()])
    for name, side in (("wide", (16, 32)), ("small", (16, 16)), ("large", (32, 32))):
        corpus(f"{name}.hdf5", side=side)
    Path("folder").mkdir()
    Path("folder/gaussian_ppo.py").touch()
    Path("text.hdf5").write_text("episodes\n" * 200)
    Path("zero.hdf5").touch()
    Path("truncated.hdf5").write_bytes(Path("small.hdf5").read_bytes()[:-4096])
    with h5py.File("foreign.hdf5", "w") as file:
        file["weights"] = np.zeros(3)

    args = {"seed": 1, "resume": None, "num_patterns": 2}
    write_json(Path("run/config.json"), {"script": "dlr_discover", "args": args})
    save_checkpoint(Path("run/checkpoint.pt"), {"script": "dlr_discover", "stage": "start", "seconds": 0.0})
    Path("damaged").mkdir()
    Path("damaged/config.json").write_text('{"script": "dlr_disc')
    Path("half.pt").write_bytes(Path("run/checkpoint.pt").read_bytes()[:-200])
    torch.save({"script": "vla", "model": Hostile()}, "hostile.pt")
    Path("hostile.pickle").write_bytes(pickle.dumps({"script": "vla", "model": Hostile()}, protocol=2))
    save_model(Path("sizes.pt"), VLA("flow", "tiny", 4, 32, 30), {})
    content = torch.load("sizes.pt", weights_only=True)
    content["config"]["chunk"] = 6
    torch.save(content, "sizes.pt")


def lines() -> dict[str, str]:
    """Each command of COMMANDS, and the line that it ends in, run in a new folder. Raises UserError if one does not end as it must."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            make_files()
            found, wrong = {}, []
            for command in (command for part in COMMANDS.values() for command in part.values()):
                try:
                    found[command] = _line(command)
                except UserError as error:
                    wrong.append(str(error))
            if wrong:
                raise UserError("; ".join(wrong))
            return found
        finally:
            os.chdir(here)


def _line(command: str) -> str:
    words = shlex.split(command)
    module = importlib.import_module(words[2] if words[0] == "python" else words[0].removesuffix(".py"))
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{module.__name__}.__main__")
    main = module.main
    if module.__name__ in ("common.data.__main__", "common.libero.__main__"):  # functions with flags of their own
        main = lambda: tyro.cli(module.main)  # noqa: E731
    before, said, code = tree(), io.StringIO(), None
    kept = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = [words[0], *words[3 if words[0] == "python" else 1 :]]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            run_command(main)
    except SystemExit as exit_:
        code = exit_.code
    finally:
        sys.argv = kept[0]
        signal.signal(signal.SIGTERM, kept[1])
    *_, last = said.getvalue().strip().splitlines() or [""]
    if code != 2 or not last.startswith("error: ") or said.getvalue().count("error: ") != 1:
        raise UserError(f"{command} ends with code {code} and {last!r}")
    if tree() != before:
        raise UserError(f"{command} leaves something behind: {set(tree()) ^ set(before)}")
    return last.removeprefix("error: ").replace(f"{Path.cwd()}/", "")


def tree() -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(Path().rglob("*")) if path.is_file() or path.name == "executed"}


def table(found: dict[str, str]) -> str:
    """Markdown: a table for each part."""
    rows = []
    for part, commands in COMMANDS.items():
        rows += [f"## {part}", "", "| what is wrong | command | the line |", "|---|---|---|"]
        for what, command in commands.items():
            line = found[command].replace("|", "\\|")
            rows.append(f"| {what} | `{command if command.startswith('python') else f'python {command}'}` | {line} |")
        rows.append("")
    return "\n".join(rows)


@dataclasses.dataclass
class Args:
    """List bad inputs and the lines that they end in."""

    write: Path | None = None
    """replace the tables of this page"""


def main() -> None:
    args = tyro.cli(Args)
    text = table(lines())
    if args.write is None:
        print(text)
        return
    head = args.write.read_text().partition("\n## ")[0]
    args.write.write_text(f"{head}\n{text.rstrip()}\n")


if __name__ == "__main__":
    run_command(main)
