"""The tables and figures of benchmarks.vla_compare, of what is there so far: Markdown, JSON, and two PNGs.

Intervals are 95 %, over trials and seeds: Wilson's, for as many trials as all the seeds' are worth. Seeds of a VLA differ by more than
chance in their trials; so the number of trials is divided by the design effect (Kish 1965), the variance between the seeds of a row over
the binomial variance of one seed's trials, pooled over all rows of a table's column, as three seeds alone say little about it. It is 1
at least, and with one seed, where the interval is over trials only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.vla_corpora import CONTROL, HELD_OUT, Cell
from common.bddl import language_of
from common.cli import atomic_path
from common.metrics import newcombe_interval, wilson_interval
from common.plots import COLOURS
from common.runs import versions, write_json
from common.suites import find_task, number

NAMES = {
    "none": "none",
    "demonstrations": "demonstrations",
    "human": "human demonstrations",
    "gaussian_ppo": "Gaussian RL",
    "diffusion_ppo": "diffusion RL",
    "dlr_discover": "DLR",
    CONTROL: "demonstrations without noise",
}
PAIRS = [(s, "demonstrations") for s in ("human", "gaussian_ppo", "diffusion_ppo", "dlr_discover")]
PAIRS += [("diffusion_ppo", "gaussian_ppo"), ("dlr_discover", "gaussian_ppo")]
SIZED = ("gaussian_ppo", "dlr_discover")  # sources of which there are rows by size
IN_WAYS = ("dlr_discover", "demonstrations", CONTROL)  # and by patterns, or ways
MEASURES = {  # what may explain success: title and unit, and where it stands in a result (JSON has None for NaN)
    "action error, own source": lambda cell, r: r["action_error"][cell.source],
    "action error, other sources": lambda cell, r: np.mean([v for s, v in r["action_error"].items() if s != cell.source] or [np.nan]),
    "start to corpus (cm)": lambda cell, r: 100 * r["coverage"]["starts"],
    "met to corpus (cm)": lambda cell, r: 100 * r["coverage"]["met"],
    "jerk (m/s³)": lambda cell, r: r["corpus"]["mean_jerk"] or np.nan,
    "dispersion in a way (cm)": lambda cell, r: 100 * (r["corpus"]["consistency"] or np.nan),
}
Rows = Sequence[dict]  # of tasks: task, successes, trials
Results = dict[Cell, dict[int, dict]]  # what there is of each row, by seed


# ---------------------------------------------------------------------------------------------- success


def count(rows: Rows) -> tuple[int, int]:
    return sum(row["successes"] for row in rows), sum(row["trials"] for row in rows)


def design_effect(groups: Sequence[Sequence[Rows]]) -> float:
    """How many trials are worth one, at least 1, from groups of rows by seed; see the module's docstring."""
    between = binomial = 0.0
    for seeds in groups:
        counts = np.array([count(rows) for rows in seeds], float)
        if len(counts) > 1:
            rate = counts[:, 0].sum() / counts[:, 1].sum()
            between += (len(counts) - 1) * (counts[:, 0] / counts[:, 1]).var(ddof=1)
            binomial += (len(counts) - 1) * rate * (1 - rate) / counts[:, 1].mean()
    return max(1.0, between / binomial) if binomial else 1.0


def pooled(seeds: Sequence[Rows], effect: float) -> dict:
    """Success over all trials of all seeds, with its interval."""
    successes, trials = count([row for rows in seeds for row in rows])
    return {"success_rate": successes / trials, "interval": wilson_interval(successes / effect, trials / effect), "trials": trials}


def difference(a: Sequence[Rows], b: Sequence[Rows], effect: float) -> tuple[float, float, float]:
    """How much more success `a` has than `b`, and the interval (Newcombe's)."""
    (x, n), (y, m) = (count([row for rows in seeds for row in rows]) for seeds in (a, b))
    return x / n - y / m, *newcombe_interval((x / effect, y / effect), (n / effect, m / effect))


def columns(results: Results) -> dict[str, list[str]]:
    """Tables' columns -> their tasks: the tasks themselves, or, of more than ten, their suites."""
    tasks = list(dict.fromkeys(row["task"] for seeds in results.values() for r in seeds.values() for row in r["tasks"]))
    named = [(task if len(tasks) <= 10 else task.split("/")[0], task) for task in tasks]
    return {name: [t for n, t in named if n == name] for name, _ in named}


def of_tasks(results: Results, cell: Cell, tasks: Sequence[str], starts: str | None = None) -> list[Rows]:
    """A row's results on some tasks, by seed: from official starts, or from those of another kind."""
    found = []
    for r in results.get(cell, {}).values():
        rows = r["tasks"] if starts is None else [row for row in r["starts"] if row["starts"] == starts]
        found.append([row for row in rows if row["task"] in tasks])
    return [rows for rows in found if rows]


def percent(found: dict) -> str:
    low, high = found["interval"]
    return f"{100 * found['success_rate']:.0f} ({100 * low:.0f} to {100 * high:.0f})"


# ---------------------------------------------------------------------------------------------- tables


def label(cell: Cell, results: Results) -> str:
    """How much a row's VLA was trained on, of each task."""
    if cell.kind == "none":
        return "-"
    way = ("pattern" if cell.source == "dlr_discover" else "way") + "s" * (cell.amount > 1)
    wanted = {"episodes": f"{cell.amount} episodes", "steps": "equal steps", "patterns": f"{cell.amount} {way}"}[cell.kind]
    if not (corpora := [r["corpus"] for r in results[cell].values()]):
        return wanted
    mean = {name: np.mean([c[name] for c in corpora]) for name in ("episodes", "steps", "ways")}
    episodes = "" if cell.kind == "episodes" else f"{mean['episodes']:.0f} episodes, "
    return f"{wanted} ({episodes}{mean['steps']:.0f} steps, {mean['ways']:.1f} ways)"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def success_table(cells: Sequence[Cell], results: Results) -> str:
    """A line for each row, a column for each task or suite, and their mean."""
    named = columns(results)
    named["all"] = [task for tasks in named.values() for task in tasks]
    effects = {name: design_effect([of_tasks(results, c, tasks) for c in results]) for name, tasks in named.items()}
    lines = []
    for cell in cells:
        found = {name: of_tasks(results, cell, tasks) for name, tasks in named.items()}
        texts = [percent(pooled(seeds, effects[name])) if seeds else "to do" for name, seeds in found.items()]
        lines.append([NAMES[cell.source], label(cell, results), str(len(results[cell])), *texts])
    return markdown(["trained on", "of each task", "seeds", *map(number, named)], lines)


def differences_table(cells: Sequence[Cell], results: Results) -> str:
    """Who has more success than whom, in points, where equally much was trained on."""
    effect, lines = design_effect([of_tasks(results, c, all_tasks(results)) for c in results]), []
    for a, b in PAIRS:
        line = []
        for kind in ("episodes", "steps"):
            mine = {c.source: of_tasks(results, c, all_tasks(results)) for c in cells if c.kind == kind}
            known = mine.get(a) and mine.get(b)
            line.append(points(mine[a], mine[b], effect) if known else "to do")
        if {a, b} <= {c.source for c in cells}:
            lines.append([f"{NAMES[a]} - {NAMES[b]}", *line])
    return markdown(["points of success", "equal episodes", "equal steps"], lines)


def list_causes(results: Results, most: int) -> dict[str, tuple[Cell, Cell]]:
    """Pairs of rows that differ in one thing: what it is -> with it, and without."""
    amounts = [c.amount for c in results if c.kind == "patterns"]
    few, many = (min(amounts, default=0), max(amounts, default=0))
    causes = {f"{NAMES[s]}: {many} ways, not {few}": (Cell(s, "patterns", many), Cell(s, "patterns", few)) for s in IN_WAYS}
    for kind, k, of in (("patterns", few, f"ways: {few}"), ("patterns", many, f"ways: {many}"), ("episodes", most, f"{most} episodes")):
        causes[f"action noise ({of})"] = Cell("demonstrations", kind, k), Cell(CONTROL, kind, k)
    return {what: pair for what, pair in causes.items() if set(pair) <= set(results)}


def causes_table(causes: dict[str, tuple[Cell, Cell]], results: Results) -> str:
    """What each cause does to success, in points."""
    tasks, lines = all_tasks(results), []
    effect = design_effect([of_tasks(results, c, tasks) for c in results])
    for what, pair in causes.items():
        seeds = [of_tasks(results, cell, tasks) for cell in pair]
        texts = [percent(pooled(s, effect)) if s else "to do" for s in seeds]
        lines.append([what, *texts, points(*seeds, effect) if all(seeds) else "to do"])
    return markdown(["cause", "with it", "without", "points of success"], lines)


def points(a: Sequence[Rows], b: Sequence[Rows], effect: float) -> str:
    """`difference` in points."""
    return "{:+.0f} ({:+.0f} to {:+.0f})".format(*100 * np.array(difference(a, b, effect)))


def all_tasks(results: Results) -> list[str]:
    return [task for tasks in columns(results).values() for task in tasks]


def measured(cell: Cell, results: Results) -> dict[str, float]:
    """The means over seeds of what may explain a row's success; without what there is not."""
    found = {}
    for name, of in MEASURES.items():
        known = [r for r in results[cell].values() if r.get("corpus") and (r["coverage"] or "to corpus" not in name)]
        values = [v for r in known if np.isfinite(v := of(cell, r))]
        found |= {name: float(np.mean(values))} if values else {}
    return found


def why_table(cells: Sequence[Cell], results: Results) -> str:
    effect, lines = design_effect([of_tasks(results, c, all_tasks(results)) for c in results]), []
    for cell in cells:
        values, seeds = measured(cell, results), of_tasks(results, cell, all_tasks(results))
        success = percent(pooled(seeds, effect)) if seeds else "to do"
        texts = [f"{values[name]:.3g}" if name in values else "-" for name in MEASURES]
        lines.append([NAMES[cell.source], label(cell, results), success, *texts])
    return markdown(["trained on", "of each task", "success", *MEASURES], lines)


def starts_table(cells: Sequence[Cell], results: Results) -> str:
    """Success from perturbed starts, beside that from official ones on the same tasks."""
    kinds, effects, lines = ("objects", "hand"), {}, []
    tried = [row for seeds in results.values() for r in seeds.values() for row in r["starts"]]
    tasks = {kind: list(dict.fromkeys(row["task"] for row in tried if row["starts"] == kind)) for kind in kinds}
    for kind in kinds:
        for starts in (None, kind):
            effects[kind, starts] = design_effect([of_tasks(results, c, tasks[kind], starts) for c in results])
    for cell in cells:
        line = []
        for kind, starts in effects:
            seeds = of_tasks(results, cell, tasks[kind], starts)
            line.append(percent(pooled(seeds, effects[kind, starts])) if seeds else "-" if results[cell] else "to do")
        lines.append([NAMES[cell.source], label(cell, results), *line])
    titles = [f"{what} ({len(tasks[kind])} tasks)" for kind in kinds for what in ("official starts", f"{kind} elsewhere")]
    return markdown(["trained on", "of each task", *titles], lines)


# ---------------------------------------------------------------------------------------------- figures


def colour(source: str) -> str:
    return COLOURS[list(NAMES).index(source)]


def save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def plot_scaling(path: Path, results: Results) -> None:
    """Mean success over the number of episodes, a line a source, and over the number of patterns; dotted: no pretraining."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    effect = design_effect([of_tasks(results, c, all_tasks(results)) for c in results])
    for axes, kind, x in ((left, "episodes", "episodes of each task"), (right, "patterns", "patterns of each task")):
        for source in dict.fromkeys(c.source for c in results):
            cells = sorted((c for c in results if (c.source, c.kind) == (source, kind) and results[c]), key=lambda c: c.amount)
            found = [pooled(of_tasks(results, c, all_tasks(results)), effect) for c in cells]
            rates = [100 * f["success_rate"] for f in found]
            errors = [[100 * abs(f["interval"][i] - f["success_rate"]) for f in found] for i in (0, 1)]
            if cells:
                style = {"marker": "o", "capsize": 3, "color": colour(source), "label": NAMES[source]}
                axes.errorbar([c.amount for c in cells], rates, errors, **style)
        axes.set_xticks(sorted({c.amount for c in results if c.kind == kind}))
        axes.set(xlabel=x, ylim=(-2, 102))
        axes.spines[["top", "right"]].set_visible(False)
    for seeds in (of_tasks(results, c, all_tasks(results)) for c in results if c.kind == "none"):
        if seeds:
            left.axhline(100 * pooled(seeds, effect)["success_rate"], color="0.4", linestyle=":", label=NAMES["none"])
    left.set_ylabel("success (%)")
    if left.get_legend_handles_labels()[0]:
        left.legend(title="trained on", frameon=False)
    save(figure, path)


def plot_why(path: Path, results: Results) -> None:
    """Success over what may explain it: a panel a measure, a point a row."""
    figure = Figure(figsize=(10.8, 6.4), layout="constrained")
    grid = figure.subplots(2, 3, sharey=True)
    shapes, named = {"episodes": "o", "steps": "s", "patterns": "^"}, {}
    for axes, name in zip(grid.flat, MEASURES, strict=True):
        for cell in results:
            x = measured(cell, results).get(name)
            if x is None:
                continue
            rate = 100 * pooled(of_tasks(results, cell, all_tasks(results)), 1.0)["success_rate"]
            style = {"color": colour(cell.source), "marker": shapes[cell.kind], "edgecolor": "white"}
            named[f"{NAMES[cell.source]}, {cell.kind}"] = axes.scatter(x, rate, 50, **style)
        axes.set(xlabel=name, ylim=(-2, 102))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("success (%)")
    if named:
        figure.legend(list(named.values()), list(named), loc="outside right upper", frameon=False)
    save(figure, path)


# ---------------------------------------------------------------------------------------------- the report


def write(path: Path, about: dict, results: Results) -> str:
    """Write PATH.md, PATH.json, PATH.png and PATH-why.png; returns the Markdown."""
    preset, most = about["settings"], about["settings"]["episodes"][-1]
    tables = [c for c in results if c.kind in ("none", "episodes", "steps") and c.amount in (0, most)]
    equal = {kind: [c for c in tables if c.kind in ("none", kind)] for kind in ("episodes", "steps")}
    sizes, patterns = by_size(results, "episodes", SIZED), by_size(results, "patterns", IN_WAYS)
    ways = f"## Patterns, {preset['pattern_episodes']} episodes of each task\n\nTasks with fewer patterns give all that they have.\n\n"
    finished = [r for seeds in results.values() for r in seeds.values()]
    effect = design_effect([of_tasks(results, c, all_tasks(results)) for c in results])
    named = "; ".join(f"{number(name)}: {language_of(find_task(name).bddl.read_text())}" for name in columns(results) if "/" in name)
    parts = [
        f"# What a VLA learns from corpora, {about['protocol']} ({about['preset']} preset, {about['head']} head)",
        f"Success in % from the 50 official init states of each task, with 95 % intervals over trials and seeds (design effect "
        f"{effect:.2f}: so many trials are worth one). Seeds of VLAs and of their episodes: {', '.join(map(str, about['seeds']))}. "
        f"Corpora of {len(about['tasks'])} tasks, assets {about['assets']}, pictures {preset['image_size']} x {preset['image_size']}, "
        f"model {preset['size']}, {preset['steps']} steps of {preset['batch_size']} samples for each VLA. {HELD_OUT} episodes of each "
        f"file are held out. {len(finished)} of {len(results) * len(about['seeds'])} VLAs are done, in "
        f"{sum({r['folder']: r['hours'] for r in finished}.values()):.1f} hours of a worker. "
        f"Revisions: {', '.join(sorted({r['versions']['revision'] for r in finished})) or 'none yet'}.",
        *(["Fine-tuned on " + downstream(about)] if about["downstream"] else []),
        *(["Left out: " + "; ".join(about["left_out"]) + "."] if about["left_out"] else []),
        *(["Failed: " + "; ".join(f"{name}: {why}" for name, why in about["failed"].items()) + "."] if about["failed"] else []),
        *([f"Tasks: {named}."] if named else []),
        f"## Equally many episodes\n\n{success_table(equal['episodes'], results)}",
        f"## Equally many steps\n\n{success_table(equal['steps'], results)}",
        f"## Differences\n\n{differences_table(tables, results)}",
        *([f"## Size\n\n{success_table(sizes, results)}\n\n![]({path.name}.png)"] if len({c.amount for c in sizes}) > 1 else []),
        *([ways + success_table(patterns, results)] if patterns else []),
        *([f"## One cause at a time\n\n{causes_table(causes, results)}"] if (causes := list_causes(results, most)) else []),
        "## Why\n\nAction errors are on held-out episodes; those of demonstrations hold noise that nobody can predict.\n\n"
        f"{why_table([c for c in results if c.kind != 'none'], results)}\n\n![]({path.name}-why.png)",
        f"## Perturbed starts\n\n{preset['starts']} trials of each task.\n\n{starts_table(list(results), results)}",
    ]
    text = "\n\n".join(parts) + "\n"
    with atomic_path(path.with_suffix(".md")) as temporary:
        temporary.write_text(text)
    content = []
    for cell, seeds in results.items():
        rows = of_tasks(results, cell, all_tasks(results))
        row = {"source": cell.source, "kind": cell.kind, "amount": cell.amount, **(pooled(rows, effect) if rows else {})}
        content.append(row | {"measured": measured(cell, results), "seeds": seeds})
    write_json(path.with_suffix(".json"), about | {"design_effect": effect, "rows": content, "versions": versions()})
    plot_scaling(path.with_suffix(".png"), results)
    plot_why(path.with_name(f"{path.name}-why.png"), results)
    return text


def by_size(results: Results, kind: str, sources: Sequence[str]) -> list[Cell]:
    """Rows of one kind, source by source, the smallest first."""
    chosen = [c for c in results if c.kind == kind and c.source in sources]
    return sorted(chosen, key=lambda c: (sources.index(c.source), c.amount))


def downstream(about: dict) -> str:
    return (
        f"{about['settings']['downstream_episodes']} demonstrations of each of {sum(map(len, about['downstream']))} tasks. Where LIBERO's "
        "human ones are not on disk they are scripted, and not as the row demonstrations has them: in ways (paths) that its corpora hold "
        "none of, with half of their action noise, from other starts; at the same speed, as the demonstrator has only one."
    )
