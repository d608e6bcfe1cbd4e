"""The VLA benchmark on invented results and corpora: what is trained on what, resumption, tables, intervals; and what it measures."""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import tyro

import diffusion_ppo
import dlr_discover
import gaussian_ppo
import vla_finetune
import vla_pretrain
from benchmarks import vla_compare, vla_corpora, vla_report, vla_why
from benchmarks.vla_compare import PRESETS, list_cells, run_script
from benchmarks.vla_corpora import CONTROL, HELD_OUT, SOURCES, Cell, Entry, choose, entries, write_masks
from common.cli import UserError
from common.data import read_episodes, write_episodes
from common.data.vla import read_corpora
from common.metrics import wilson_interval
from common.runs import write_json
from common.suites import expand
from common.sweep.report import read as read_sweep

# ---------------------------------------------------------------------------------------------- success and its intervals


def by_seed(*counts: int, trials: int = 50) -> list[list[dict]]:
    return [[{"task": "t", "successes": n, "trials": trials}] for n in counts]


def test_seeds_that_differ_by_chance_count_fully():
    """The variance between seeds that chance alone would give is p (1 - p) / n: then the design effect is 1."""
    chance = np.sqrt(0.5 * 0.5 / 50) * 50  # 20 +- this, of two seeds a standard deviation of just that
    pair = by_seed(25 - chance / np.sqrt(2), 25 + chance / np.sqrt(2))
    assert vla_report.design_effect([pair]) == pytest.approx(1)
    wider = by_seed(25 - 3 * chance / np.sqrt(2), 25 + 3 * chance / np.sqrt(2))
    assert vla_report.design_effect([wider]) == pytest.approx(9)
    assert vla_report.design_effect([pair, wider]) == pytest.approx(5)  # pooled over rows
    assert vla_report.design_effect([by_seed(20, 20)]) == vla_report.design_effect([by_seed(7)]) == vla_report.design_effect([]) == 1
    assert vla_report.pooled(by_seed(35), 1.0)["interval"] == wilson_interval(35, 50)
    assert vla_report.pooled(by_seed(30, 40), 5.0) == {"success_rate": 0.7, "interval": wilson_interval(14, 20), "trials": 100}


def test_intervals_hold_the_truth():
    """Of ten rows of three seeds that differ by more than chance, 95 % of the intervals hold the success that seeds have on average."""
    rng, held, naive, total = np.random.default_rng(0), 0, 0, 0
    for _ in range(60):
        middle = rng.uniform(-1.5, 1.5, 10)
        rates = 1 / (1 + np.exp(-(middle + rng.normal(0, 0.25, (4000, 10)))))  # seeds: 6 points of standard deviation
        rows = [by_seed(*rng.binomial(300, rates[:3, k]), trials=300) for k in range(10)]
        effect = vla_report.design_effect(rows)
        for truth, seeds in zip(rates.mean(0), rows, strict=True):
            (low, high), (a, b) = (vla_report.pooled(seeds, e)["interval"] for e in (effect, 1.0))
            held, naive, total = held + (low <= truth <= high), naive + (a <= truth <= b), total + 1
    assert 0.91 <= held / total <= 0.98 and naive / total < 0.75


def test_a_difference_has_its_interval():
    more, low, high = vla_report.difference(by_seed(40, 40), by_seed(20, 20), 1.0)
    assert more == pytest.approx(0.4) and 0.26 < low < 0.29 and 0.50 < high < 0.53
    assert vla_report.difference(by_seed(40, 40), by_seed(20, 20), 4.0)[1] < low


# ---------------------------------------------------------------------------------------------- which episodes are taken


def pool_of(ways: int, each: int, steps: int = 50) -> list[Entry]:
    return [Entry(f"demo_{w * each + k}", steps + w + k, str(w), f"{w}-{k}") for w in range(ways) for k in range(each)]


def test_episodes_nest_and_depend_on_the_seed():
    pool = pool_of(4, 10)
    few, many = (choose(pool, Cell("gaussian_ppo", "episodes", n), 1) for n in (5, 20))
    assert len(few) == 5 and len(set(many)) == 20 and few == many[:5]
    assert few != choose(pool, Cell("gaussian_ppo", "episodes", 5), 2)


def test_steps_come_as_close_as_episodes_allow():
    pool = pool_of(1, 20)
    for wanted in (40, 300, 333):
        found = choose(pool, Cell("dlr_discover", "steps", 20), 3, steps=wanted)
        order = choose(pool, Cell("dlr_discover", "episodes", 20), 3)
        totals = np.cumsum([e.steps for e in order])
        assert found == order[: len(found)] and abs(sum(e.steps for e in found) - wanted) == abs(totals - wanted).min()


def test_patterns_share_one_number_of_episodes():
    pool = pool_of(8, 20) + [Entry("demo_999", 50, "rare", "r")]
    chosen = {k: choose(pool, Cell("dlr_discover", "patterns", k), 1, size=16) for k in (1, 2, 4, 8)}
    for k, found in chosen.items():
        ways = collections.Counter(e.way for e in found)
        assert len(set(found)) == 16 and len(ways) == k and set(ways.values()) == {16 // k} and "rare" not in ways
    assert {e.way for e in chosen[2]} < {e.way for e in chosen[4]}  # these and others
    assert {e.way for e in choose(pool_of(3, 20), Cell("dlr_discover", "patterns", 8), 1, size=16)} == {"0", "1", "2"}


def test_equal_steps_are_those_of_the_shortest_source():
    preset = dataclasses.replace(PRESETS["small"]["in-domain"], episodes=(4, 8))
    pools = {"gaussian_ppo": {"t": pool_of(1, 12, 50)}, "dlr_discover": {"t": pool_of(4, 12, 90)}}
    steps = {s: sum(e.steps for e in vla_compare.choose_episodes(preset, pools, Cell(s, "steps", 8), 1)["t"]) for s in pools}
    whole = {s: sum(e.steps for e in vla_compare.choose_episodes(preset, pools, Cell(s, "episodes", 8), 1)["t"]) for s in pools}
    assert steps["gaussian_ppo"] == whole["gaussian_ppo"] < whole["dlr_discover"]
    assert abs(steps["dlr_discover"] - whole["gaussian_ppo"]) < 60


def test_downstream_ways_are_in_no_corpus(tmp_path):
    ways = [f"grasp left, path {path}" for path in ("direct", "left", "near", "over")] + ["step 1 path over, step 2 path direct"]
    path = write_corpus(tmp_path / "c.hdf5", 10, strategies=ways)
    with h5py.File(path, "r+") as file:
        file["mask/held_out"] = np.array(["demo_1"], "S")
    kept = {protocol: [e.name for e in vla_corpora.pool(path, "demonstrations", protocol)] for protocol in ("in-domain", "transfer")}
    assert kept["in-domain"] == [f"demo_{i}" for i in (0, 2, 3, 4, 5, 6, 7, 8, 9)]
    assert kept["transfer"] == [f"demo_{i}" for i in (3, 4, 6, 8, 9)]  # left (1 is held out), over, and over first
    assert not [e for e in vla_corpora.pool(path, "demonstrations", "transfer") if e.downstream]
    assert len(vla_corpora.pool(path, "gaussian_ppo", "transfer")) == 9


# ---------------------------------------------------------------------------------------------- corpora


def write_corpus(path: Path, count: int, patterns: int = 1, strategies=(), pictures: int = 8, **attrs) -> Path:
    """Episodes of 5 to 9 steps, as far as the benchmark looks at them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs.update({"assets": "libero:1", **({"renderer": "warp"} if pictures else {}), **attrs})
        for i in range(count):
            demo = file.create_group(f"data/demo_{i}")
            demo["actions"] = rng.normal(size=(5 + i % 5, 7))
            demo.attrs.update({"strategy": strategies[i % len(strategies)]} if strategies else {"pattern": i % patterns})
            demo.create_group("obs")
            if pictures:
                demo["obs/agentview_rgb"] = np.zeros((5 + i % 5, pictures, pictures, 3), np.uint8)
    return path


def write_sweep(folder: Path, script: str, tasks, **corpus) -> Path:
    rows = []
    for task in tasks:
        name = f"runs/{task.replace('/', '-')}__1/run/corpus.hdf5"
        write_corpus(folder / name, **corpus)
        for other in ("config.json", "checkpoint.pt"):
            (folder / name).with_name(other).touch()
        rows.append({"task": task, "seed": 1, "corpus": name})
    write_json(folder / "sweep.json", {"script": script, "flags": [], "jobs": [[task, 1] for task in tasks], "runs": rows})
    return folder


def test_copies_get_pictures_and_masks(tmp_path):
    calls = []

    def render(*words):
        calls.append(words)
        return True

    for size in (0, 8):  # a file without pictures is rendered, and one with ours is not
        origin = write_corpus(tmp_path / f"{size}.hdf5", 12, pictures=size)
        before = origin.read_bytes()
        path = tmp_path / "out" / f"{size}.hdf5"
        vla_corpora.copy_corpus(origin, path, render, 8, "standin")
        assert len(entries(path)) == 12 and len(entries(path, "held_out")) == HELD_OUT
        write_masks(path, {"one": ["demo_3", "demo_1"]})
        write_masks(path, {"one": ["demo_9"], "two": ["demo_2"]})  # what is there stays
        assert [[e.name for e in entries(path, key)] for key in ("one", "two")] == [["demo_1", "demo_3"], ["demo_2"]]
        assert origin.read_bytes() == before
    (words,) = calls
    assert words[:2] == ("-m", "common.libero.render") and words[3:] == ("--size", "8", "--overwrite", "--assets", "standin")
    with pytest.raises(UserError, match="got no pictures"):
        vla_corpora.copy_corpus(tmp_path / "0.hdf5", tmp_path / "out" / "new.hdf5", lambda *words: False, 8, None)
    assert not (tmp_path / "out" / "new.hdf5").exists()


def test_what_does_not_go_together_is_refused(tmp_path):
    ours = write_corpus(tmp_path / "a.hdf5", 3)
    none = write_corpus(tmp_path / "b.hdf5", 3, pictures=0)
    vla_corpora.check_alike([ours, none], 8)
    for name, attrs in (("image size", {"pictures": 16}), ("renderer", {"renderer": "gl"}), ("assets", {"assets": "standin:2"})):
        other = write_corpus(tmp_path / f"{name}.hdf5", 3, **attrs)
        with pytest.raises(UserError, match=f"^{name} mismatch: "):
            vla_corpora.check_alike([ours, other], 8)


def test_sweeps_are_told_apart_by_their_script(tmp_path):
    one = write_sweep(tmp_path / "one", "gaussian_ppo.py", ["libero_90/x"], count=3)
    found = vla_corpora.read_sweeps([one], SOURCES)
    assert list(found) == ["gaussian_ppo"] and found["gaussian_ppo"]["libero_90/x"].exists()
    part = write_sweep(tmp_path / "part", "gaussian_ppo.py", ["libero_90/y"], count=3)
    assert list(vla_corpora.read_sweeps([one, part], SOURCES)["gaussian_ppo"]) == ["libero_90/x", "libero_90/y"]
    flags = write_sweep(tmp_path / "flags", "gaussian_ppo.py", ["libero_90/z"], count=3)
    write_json(flags / "sweep.json", read_sweep(flags) | {"flags": ["--gamma", "0.9"]})
    empty = write_sweep(tmp_path / "empty", "dlr_discover.py", [])
    other = write_sweep(tmp_path / "other", "my_script.py", [])
    for folders, message in (
        ([one, one], "second sweep of gaussian_ppo.py with libero_90/x"),
        ([one, flags], "gaussian_ppo.py with other flags"),
        ([empty], "has no corpus yet"),
        ([other], "is a sweep of my_script.py"),
        ([tmp_path], "no sweep.json"),
    ):
        with pytest.raises(UserError, match=message):
            vla_corpora.read_sweeps(folders, SOURCES)


# ---------------------------------------------------------------------------------------------- the whole, without the commands

TASKS = tuple(expand(["libero_90/33", "libero_90/22", "libero_90/20"]))
SUCCESSES = {"demonstrations": 10, CONTROL: 15, "gaussian_ppo": 30, "dlr_discover": 40, "none": 1}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The benchmark with a small preset, where commands leave what they would, at once; a list of what they were."""
    changes = {"tasks": TASKS, "episodes": (2, 4), "patterns": (1, 2), "pattern_episodes": 2, "image_size": 8, "downstream_episodes": 2}
    small = {protocol: dataclasses.replace(preset, **changes) for protocol, preset in PRESETS["small"].items()}
    small["transfer"] = dataclasses.replace(small["transfer"], downstream=(("libero_goal/5",), ("libero_spatial/0", "libero_spatial/1")))
    monkeypatch.setitem(PRESETS, "small", small)
    done = []

    def call(*words, log=None):
        words = [str(w) for w in words]
        done.append(words)

        def after(flag: str) -> list[str]:
            rest = words[words.index(flag) + 1 :]
            return rest[: next((k for k, w in enumerate(rest) if w.startswith("--")), len(rest))]

        if words[:2] == ["-m", "common.demos"]:
            suite, name = after("--task")[0].split("/")
            strategies = ["path direct", "path left", "path near", "path over"]
            write_corpus(Path(after("--out")[0]) / suite / f"{name}_demo.hdf5", int(after("--episodes")[0]), strategies=strategies)
        elif words[:2] == ["-m", "common.sweep"]:
            write_sweep(Path(after("--out")[0]), words[2], after("--tasks"), count=16, patterns=2)
        elif "--resume" in words:
            return False
        elif words[:2] == ["-m", "benchmarks.vla_why"]:
            if "fails" in done[0]:
                log.write_text("some lines\nerror: no light\n")
                return False
            found = {"starts": [{"task": TASKS[0], "successes": 5, "trials": 25, "starts": "hand"}], "seconds": 60.0}
            found |= {"versions": {"revision": "abc1234"}, "done": True}
            if "--pretrained" in words:
                found |= {"action_error": {s: 0.1 + 0.1 * (s != after("--source")[0]) for s in after("--sources")}, "coverage": None}
                found |= {"corpus": {"episodes": 4, "steps": 30, "ways": 2, "mean_jerk": 3.0}}
                found["corpus"]["consistency"] = 0.02 if after("--source")[0] == "dlr_discover" else None  # no two episodes of a way
            write_json(Path(after("--json")[0]), found)
        else:
            run = Path(after("--run-folder")[0]) / "run"
            data = [Path(p) for p in after("--data")] if "--data" in words else []
            assert all(entries(path, after("--filter-key")[0]) for path in data)  # the masks are there
            source = next((s for s in SUCCESSES if f"/{s}-" in str(run)), None)
            tasks = after("--tasks") if "--tasks" in words else [f"{p.parent.name}/{p.stem.removesuffix('_demo')}" for p in data]
            if words[0] == "vla_finetune.py":
                rows = [{"task": task, "successes": SUCCESSES[source], "trials": 50} for task in tasks]
                write_json(run / "results.json", {"tasks": rows})
            write_json(run / "summary.json", {"wall_seconds": 3600.0})
        return True

    monkeypatch.setattr(vla_compare, "call", call)
    figures = {name: getattr(vla_report, name) for name in ("plot_scaling", "plot_why")}
    for name in figures:  # drawn after each VLA: once is enough here
        monkeypatch.setattr(vla_report, name, lambda path, results, name=name: path.exists() or figures[name](path, results))

    def run(*flags: str) -> str:
        seeds = [] if "--seeds" in flags else ["--seeds", "1", "2"]
        monkeypatch.setattr(sys, "argv", ["vla_compare", "--out", str(tmp_path / "out"), *seeds, *flags])
        vla_compare.main()
        return (tmp_path / "out" / f"{'transfer' if 'transfer' in flags else 'in-domain'}.md").read_text()

    return run, done


def count(done: list, script: str) -> int:
    return sum(script in words[:2] for words in done)


def test_in_domain_from_sweeps(commands, tmp_path, capsys):
    run, done = commands
    gaussian = write_sweep(tmp_path / "g", "gaussian_ppo.py", TASKS[:2], count=9)
    dlr = write_sweep(tmp_path / "d", "dlr_discover.py", TASKS, count=12, patterns=3)
    flags = ("--corpora", str(gaussian), str(dlr), "--sources", "demonstrations", "gaussian_ppo", "dlr_discover")
    text = run(*flags)
    said = capsys.readouterr().out.splitlines()
    # corpora: 2 x 4 of pictures and 2 x 2 of demonstrations, of 2 and 1 min; 30 x 3000 x 64 samples; 30 x 2 x 100 trials
    wanted = "corpora 0.3 h, training 4.4 h, evaluation 1.5 h on a core of an EPYC with AVX512-BF16; about "
    assert said[0].startswith(f"small, in-domain: 15 rows x 2 seeds = 30 VLAs on 2 tasks; {wanted}")
    assert said[1] == f"left out: {TASKS[2]}: no corpus in the sweep of gaussian_ppo" and said[1].removeprefix("left out: ") in text
    vlas = list((tmp_path / "out" / "vlas").iterdir())  # rows of the same episodes, as all and equal steps of the shortest, share one
    assert count(done, "vla_pretrain.py") == count(done, "vla_finetune.py") == len(vlas) and not count(done, "common.sweep")
    assert 20 <= len(vlas) < 30
    assert all({"--eval-only", "--save-states"} <= set(words) for words in done if words[0] == "vla_finetune.py")
    table = text.split("## Equally many episodes")[1].split("##")[0].strip().splitlines()
    assert table[0] == "| trained on | of each task | seeds | libero_90/33 | libero_90/22 | all |"
    assert "\nTasks: libero_90/33: close the microwave; libero_90/22: close the bottom drawer of the cabinet.\n" in text
    assert [line.split(" | ")[0] for line in table[2:]] == ["| demonstrations", "| Gaussian RL", "| DLR", "| demonstrations without noise"]
    assert table[4].endswith("| 80 (71 to 87) | 80 (71 to 87) | 80 (74 to 85) |")
    assert "| Gaussian RL - demonstrations | +40 (+31 to +48) | +40 (+31 to +48) |" in text
    causes = text.split("## One cause at a time")[1].split("##")[0].strip().splitlines()
    assert causes[2] == "| DLR: 2 ways, not 1 | 80 (74 to 85) | 80 (74 to 85) | +0 (-8 to +8) |"
    assert [line.split(" | ")[0] for line in causes[3:]] == [
        "| demonstrations: 2 ways, not 1",
        "| demonstrations without noise: 2 ways, not 1",
        "| action noise (ways: 1)",
        "| action noise (ways: 2)",
        "| action noise (4 episodes)",
    ]
    assert causes[5].endswith("| 20 (15 to 26) | 30 (24 to 37) | -10 (-18 to -2) |")
    assert "30 of 30 VLAs are done, in " and text.count("to do") == 0
    record = json.loads((tmp_path / "out" / "in-domain.json").read_text())
    assert [(r["source"], r["kind"], r["amount"]) for r in record["rows"][-7:]] == [
        *((source, "patterns", k) for source in ("demonstrations", CONTROL) for k in (1, 2)),
        (CONTROL, "episodes", 4),
        ("gaussian_ppo", "episodes", 2),
        ("dlr_discover", "episodes", 2),
    ]
    assert record["rows"][0]["measured"]["action error, other sources"] == pytest.approx(0.2)
    assert ["dispersion in a way (cm)" in row["measured"] for row in record["rows"][:3]] == [False, False, True]
    for name in ("in-domain.png", "in-domain-why.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"

    done.clear()
    assert run(*flags) == text and not done  # nothing is done twice
    run(*flags, "--seeds", "1", "2", "3")
    assert 10 <= count(done, "vla_pretrain.py") <= 15 and not count(done, "common.demos")


def test_what_was_done_elsewhere_is_not_done_again(commands, tmp_path):
    """Two machines with a seed each write the report that one machine with both seeds does."""
    run, done = commands
    sweep = write_sweep(tmp_path / "g", "gaussian_ppo.py", TASKS, count=9)
    flags = ("--corpora", str(sweep), "--sources", "gaussian_ppo", "demonstrations")
    both = run(*flags)
    (tmp_path / "out").rename(tmp_path / "both")
    run(*flags, "--seeds", "1")
    earlier = tmp_path / "earlier.json"
    (tmp_path / "out" / "in-domain.json").rename(earlier)
    (tmp_path / "out").rename(tmp_path / "first")
    done.clear()
    assert run(*flags, "--earlier", str(earlier)) == both
    trained = [Path(words[-1]).parent.name for words in done if words[0] == "vla_pretrain.py"]
    assert trained and all("-seed2-" in name for name in trained)
    done.clear()
    for name, value in (("head", "tokens"), ("tasks", TASKS[:1]), ("settings", {"steps": 1})):
        write_json(tmp_path / "other.json", json.loads(earlier.read_text()) | {name: value})
        with pytest.raises(UserError, match=f"is of another comparison: {name}"):
            run(*flags, "--earlier", str(tmp_path / "other.json"))
    with pytest.raises(UserError, match="is no report of this command"):
        run(*flags, "--earlier", str(sweep / "sweep.json"))
    assert not done


def test_transfer_makes_what_no_sweep_holds(commands, tmp_path):
    run, done = commands
    flags = ("--protocol", "transfer", "--sources", "demonstrations", "gaussian_ppo")
    text = run(*flags)
    vlas = [path.name.split("-")[0] for path in (tmp_path / "out" / "vlas").iterdir()]
    assert vlas.count("none") == 2 and count(done, "vla_pretrain.py") == len(vlas) - 2 and count(done, "vla_finetune.py") == 2 * len(vlas)
    assert count(done, "common.sweep") == 1
    assert "| none | - | 2 | 2 (" in text and "## Perturbed starts" in text
    made = [words for words in done if words[1] == "common.demos"]
    assert {words[words.index("--noise") + 1] for words in made} == {"0.1", "0.05"}
    for path in (tmp_path / "out" / "downstream").glob("*/*.hdf5"):
        assert len(entries(path, "downstream")) == 2 and all(e.downstream for e in entries(path, "downstream"))
    done.clear()
    run("--sources", "demonstrations", "gaussian_ppo", "--corpora", str(tmp_path / "out" / "sweeps" / "gaussian_ppo"))
    # of the same episodes it is the same VLA: the Gaussian's (but for equal steps), and not the demonstrations', whose ways are others
    again = [Path(words[-1]).parent.name.split("-")[0] for words in done if words[0] == "vla_pretrain.py"]
    assert again.count("demonstrations") >= 2 and again.count("gaussian_ppo") <= 2
    assert set(again) <= {"demonstrations", CONTROL, "gaussian_ppo"}


def test_a_preset_without_sizes_and_patterns(commands, monkeypatch):
    """As small has them for transfer: one table, twice, and fewer demonstrations, of which no way needs to have enough."""
    run, done = commands
    few = dataclasses.replace(PRESETS["small"]["transfer"], episodes=(4,), patterns=(), pattern_episodes=50, tasks=TASKS[:1])
    monkeypatch.setitem(PRESETS, "small", {"transfer": few})
    text = run("--protocol", "transfer", "--sources", "demonstrations", "gaussian_ppo", "--seeds", "1")
    assert "## Equally many steps" in text and "## Why" in text and "## Size" not in text and "## Patterns" not in text
    (made,) = [words for words in done if words[1] == "common.demos" and TASKS[0] in words]
    assert made[made.index("--episodes") + 1] == str(3 * (4 + HELD_OUT))


def test_a_small_corpus_is_made_larger_from_its_run(commands, tmp_path):
    run, done = commands
    sweep = write_sweep(tmp_path / "g", "gaussian_ppo.py", TASKS[:1], count=5)
    before = sorted(sweep.rglob("*"))
    with pytest.raises(UserError, match=f"no task has enough episodes of every source: {TASKS[0]}: gaussian_ppo has 1 of 4 episodes"):
        run("--sources", "gaussian_ppo", "--corpora", str(sweep))
    (words,) = done
    assert words[:2] == ["gaussian_ppo.py", "--resume"] and words[3:5] == ["--corpus-episodes", "8"] and str(tmp_path / "out") in words[2]
    assert {p.name for p in Path(words[2]).iterdir()} == {"config.json", "checkpoint.pt"} and sorted(sweep.rglob("*")) == before


def test_failures_are_listed_and_the_rest_goes_on(commands, tmp_path):
    run, done = commands
    sweep = write_sweep(tmp_path / "g", "gaussian_ppo.py", TASKS, count=9)
    done.append(["fails"])
    with pytest.raises(UserError, match="VLAs failed, benchmarks.vla_why failed: error: no light"):
        run("--sources", "gaussian_ppo", "--corpora", str(sweep))
    text = (tmp_path / "out" / "in-domain.md").read_text()
    assert text.count("error: no light") >= 4 and "| Gaussian RL | equal steps | 0 | to do |" in text


def test_finished_runs_are_kept_and_stopped_ones_resumed(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(vla_compare, "call", lambda *words, log: calls.append(words))
    with pytest.raises(UserError, match="vla_pretrain.py failed: no output"):
        run_script("vla_pretrain", tmp_path, ["--steps", "3"])
    assert calls.pop() == ("vla_pretrain.py", "--steps", "3", "--run-folder", tmp_path)
    run = tmp_path / "task__vla_pretrain__1__1"
    run.mkdir()
    (run / "checkpoint.pt").touch()
    with pytest.raises(UserError):
        run_script("vla_pretrain", tmp_path, ["--steps", "3"])
    assert calls.pop() == ("vla_pretrain.py", "--resume", run)
    (run / "summary.json").touch()
    assert run_script("vla_pretrain", tmp_path, []) == run and not calls


def test_rows_are_those_of_both_papers():
    def cells_of(preset: str, protocol: str) -> list[Cell]:
        return list_cells(PRESETS[preset][protocol], protocol, [s for s in SOURCES if s != "human"])

    for (preset, protocol), count in {("small", "in-domain"): 23, ("paper", "in-domain"): 23, ("paper", "transfer"): 19}.items():
        cells, all_sizes = cells_of(preset, protocol), list(PRESETS[preset][protocol].episodes)
        assert len(set(cells)) == len(cells) == count
        sizes = {s: sorted(c.amount for c in cells if c.source == s and c.kind == "episodes") for s in SOURCES}
        assert sizes["gaussian_ppo"] == sizes["dlr_discover"] == all_sizes and sizes["diffusion_ppo"] == all_sizes[-1:]
        assert [c.amount for c in cells if c.kind == "patterns" and c.source == "dlr_discover"] == [1, 2, 4, 8]
        controls = [(c.source, c.amount) for c in cells if c.kind == "patterns" and c.source != "dlr_discover"]
        assert controls == ([(s, k) for s in ("demonstrations", CONTROL) for k in (1, 8)] if protocol == "in-domain" else [])
    cells = cells_of("small", "transfer")  # the table of Table 2, twice
    table = [(s, kind) for kind in ("episodes", "steps") for s in SOURCES if s != "human"]
    assert [(c.source, c.kind) for c in cells] == [("none", "none"), *table]


def test_presets_hold_tasks_out():
    for of in PRESETS.values():
        assert tuple(of) == vla_compare.PROTOCOLS and not of["in-domain"].downstream
        downstream = [task for group in of["transfer"].downstream for task in expand(list(group))]
        assert not set(downstream) & set(expand(list(of["transfer"].tasks)))
        assert {task.split("/")[0] for task in downstream} == {"libero_spatial", "libero_object", "libero_goal", "libero_10"}  # Table 2
        assert len(expand(list(of["in-domain"].tasks))) >= 6 and len(expand(list(of["transfer"].tasks))) >= 30
        assert all(set(preset.minutes) == {*SOURCES, CONTROL, "pictures"} for preset in of.values())
    assert [len(expand(list(preset.tasks))) for preset in PRESETS["paper"].values()] == [130, 90]


def test_every_flag_of_a_preset_exists():
    scripts = {"gaussian_ppo": gaussian_ppo, "diffusion_ppo": diffusion_ppo, "dlr_discover": dlr_discover}
    for preset in (preset for of in PRESETS.values() for preset in of.values()):
        assert set(preset.rl) == set(scripts)
        for script, flags in preset.rl.items():
            patterns = 8 if script == "dlr_discover" else 1
            assert tyro.cli(scripts[script].Args, args=flags).corpus_episodes * patterns >= preset.episodes[-1] + HELD_OUT
        for script, flags in ((vla_pretrain, preset.pretraining), (vla_finetune, [*preset.finetuning, "--save-states"])):
            assert tyro.cli(script.Args, args=[*flags, "--size", preset.size]).val_fraction == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preset", "huge"], "--preset must be"),
        (["--protocol", "a"], "--protocol must be"),
        (["--head", "linear"], "--head must be"),
        (["--sources", "robots"], "there is no 'robots'"),
        (["--tasks", "libero_90/999"], "libero_90 has tasks 0 to 89"),
        (["--protocol", "transfer", "--tasks", "libero_goal/0"], "no corpus may hold it"),
        (["--corpora", "nowhere"], "no sweep.json in it"),
        (["--sources", "human"], "no human demonstrations of libero_90/"),
    ],
)
def test_wrong_flags(monkeypatch, tmp_path, flags, message):
    monkeypatch.setattr(sys, "argv", ["vla_compare", "--out", str(tmp_path / "out"), *flags])
    monkeypatch.setattr(vla_compare, "find_human_demos", lambda task: None)
    with pytest.raises(UserError, match=message):
        vla_compare.main()
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- why


@pytest.fixture(scope="module")
def corpus(demos, drawer_task, tmp_path_factory) -> Path:
    """Two demonstrations of each of two ways, with black pictures."""
    episodes = read_episodes(demos)[:4]
    for e in episodes:
        e.images = {name: np.zeros((e.length, 16, 16, 3), np.uint8) for name in ("agentview_rgb", "eye_in_hand_rgb")}
    path = tmp_path_factory.mktemp("why") / "corpus.hdf5"
    write_episodes(path, episodes, drawer_task, {"script": "common.demos", "assets": drawer_task.assets, "renderer": "warp"})
    vla_corpora._write(path, {"all": ["demo_0", "demo_1", "demo_2", "demo_3"], "one": ["demo_0"]})
    return path


class Constant:
    """A VLA whose actions are all the same."""

    device = torch.device("cpu")
    config = {"chunk": 4}

    class text:
        tokenize = staticmethod(lambda instructions: torch.zeros(len(instructions), 1))

    @staticmethod
    def act(images, proprio, tokens, instruction, noise):
        return torch.full_like(noise, 0.5)


def test_the_action_error_of_a_constant(corpus):
    corpora = read_corpora([corpus], filter_key="all")
    total, number = 0.0, 0
    for e in read_episodes(corpus):
        for t in range(1, e.length):  # a chunk for each step that has a picture before it
            total, number = total + np.abs(e.actions[t : t + 4] - 0.5).mean(1).sum(), number + len(e.actions[t : t + 4])
    assert vla_why.action_error(Constant(), corpora, samples=10**6) == pytest.approx(total / number, rel=1e-6)


def test_coverage_is_a_distance_in_metres(corpus, drawer_task):
    task = dataclasses.replace(drawer_task, of_interest=["akita_black_bowl_1"])
    (address,) = vla_why.things(task, of_interest=True)
    qpos = read_episodes(corpus)[0].states[:, 1 : 1 + task.model.nq]
    aside = qpos.copy()
    aside[:, address + 1] += 0.03
    assert vla_why.coverage(task, corpus, "one", [qpos[::8]]) == pytest.approx({"starts": 0, "met": 0}, abs=1e-9)
    found = vla_why.coverage(task, corpus, "one", [aside[::8], qpos[::8]])
    assert found["starts"] == pytest.approx(0.015) and 0 < found["met"] <= 0.015 + 1e-9
    assert vla_why.coverage(task, corpus, "all", [qpos[4:]])["starts"] > 0  # of starts to starts alone


def test_a_corpus_is_described(corpus):
    rows = vla_why.describe([corpus, corpus], "all")
    episodes = read_episodes(corpus)
    assert rows["episodes"] == 4 and rows["ways"] == 2 and rows["steps"] == sum(e.length for e in episodes)
    assert rows["mean_jerk"] > 0 and rows["consistency"] > 0
    assert np.isnan(vla_why.describe([corpus], "one")["consistency"])  # of one episode there is none


def test_perturbed_starts_lie_outside(drawer_task):
    task = dataclasses.replace(drawer_task, of_interest=["akita_black_bowl_1", "wooden_cabinet_1"])
    known = np.concatenate([task.train_states, task.init_states])
    (bowl,) = vla_why.things(task, of_interest=True)
    states = vla_why.perturbed_starts(task, "objects", 3)
    assert len(states) == 3 and np.array_equal(states, vla_why.perturbed_starts(task, "objects", 3))
    low, high = known[:, 1 + bowl : 3 + bowl].min(0), known[:, 1 + bowl : 3 + bowl].max(0)
    for state in states:
        p = state[1 + bowl : 3 + bowl]
        assert np.linalg.norm(np.maximum(np.maximum(low - p, p - high), 0)) >= vla_why.BEYOND
        start = task.init_states[np.abs(task.init_states - state)[:, 1 + np.array(task.arm_qpos)].sum(1).argmin()]
        shifts = [state[1 + a : 4 + a] - start[1 + a : 4 + a] for a in vla_why.things(task)]
        np.testing.assert_allclose(shifts, [shifts[0]] * len(shifts), atol=1e-12)  # all things together
    hands = vla_why.settled(task, vla_why.perturbed_starts(task, "hand", 3))
    things, usual = vla_why.settled(task, task.init_states)
    nearest = [np.linalg.norm(x - things, axis=-1).max(1).argmin() for x in hands[0]]  # whose things lie there
    away = np.linalg.norm(hands[1] - usual[nearest], axis=1)
    assert len(away) == 3 and (away >= vla_why.HAND[0]).all() and (away <= vla_why.HAND[1]).all()
