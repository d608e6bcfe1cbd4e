"""A run's figures. Every function takes the PNG file to write, which appears whole, and arrays.

Pattern k has the same colour, line and marker in every figure. matplotlib is imported by the first figure, and never
through pyplot: no display, no global state, safe beside a training loop's threads.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

import numpy as np

from common import metrics
from common.cli import atomic_path

# Told apart with normal vision and with red-, green- and blue-blindness (Okabe & Ito 2008, brown in the place of the
# yellow, which is faint on white). Patterns 8 to 15 repeat the colours with a dashed line and another marker.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#D55E00", "#6B2C00")


def _style(pattern: int) -> dict:
    second = pattern // len(COLOURS) % 2
    return {"color": COLOURS[pattern % len(COLOURS)], "linestyle": ("-", (0, (3, 1.2)))[second], "marker": "o^"[second]}


def _line(pattern: int) -> dict:
    return {**_style(pattern), "marker": ""}


def _point(pattern: int) -> dict:
    return {**_style(pattern), "linestyle": "", "markeredgecolor": "white", "markersize": 6, "markeredgewidth": 0.5}


def _figure(width: float, height: float):
    """An empty figure of width x height inches with its own Agg renderer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: str | os.PathLike) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _wrapped(name: str) -> str:
    """A source's name in lines of at most 30 letters: benchmarks.compare adds the flags in which runs differ."""
    return textwrap.fill(name, 30, break_on_hyphens=False)


def _grid(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def _count(labels: Sequence[int]) -> tuple[np.ndarray, list[int], list[str]]:
    """Labels as an array, the patterns among them, and their names with numbers of episodes. ValueError: no labels."""
    if not len(labels):
        raise ValueError("there is no episode to draw")
    patterns, counts = np.unique(labels, return_counts=True)
    return np.asarray(labels), patterns.tolist(), [f"{k} ({n})" for k, n in zip(patterns, counts, strict=True)]


def plot_paths(path: str | os.PathLike, trajectories: Sequence[np.ndarray], labels: Sequence[int], title: str = "") -> None:
    """Paths over each other in three views: N of (T_i, 3 or more) metres, of which x, y, z are drawn; (N,) patterns.

    Thin: every path. Thick: each pattern's mean at equal normalised time, from a circle to a star. The front is where
    LIBERO's agentview camera stands, facing the robot: y to its right, x towards it.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    labels, patterns, names = _count(labels)
    paths = [np.asarray(t)[:, :3] for t in trajectories]
    points = np.concatenate(paths)
    low, high = points.min(0), points.max(0)
    # Equal scales in all views; a direction in which little happens still gets two fifths of the widest one's room.
    span = np.maximum(1.08 * (high - low), 0.4 * (high - low).max() + 1e-3)
    limits = np.stack([(low + high - span) / 2, (low + high + span) / 2], axis=1)
    limits[0] = limits[0, ::-1]

    figure = _figure(9.5, 8 * (span[0] + span[2]) / (span[0] + span[1]) + 1.5)
    grid = figure.add_gridspec(2, 2, width_ratios=[span[1], span[0]], height_ratios=[span[0], span[2]])
    for cell, (i, j), name in (
        (grid[0, 0], (1, 0), "from above"),
        (grid[1, 0], (1, 2), "from the front"),
        (grid[1, 1], (0, 2), "from the side"),
    ):
        axes = figure.add_subplot(cell)
        for k in patterns:
            chosen = [paths[n] for n in np.flatnonzero(labels == k)]
            alpha = float(np.clip(6 / len(chosen), 0.12, 0.5))
            for x in chosen:
                axes.plot(x[:, i], x[:, j], color=_style(k)["color"], linewidth=0.6, alpha=alpha)
            mean = np.mean([metrics.resample(x, 100) for x in chosen], axis=0)[:, [i, j]]
            axes.plot(*mean.T, **_line(k), linewidth=2.2, zorder=3)
            axes.plot(*mean[0], "o", color="white", markeredgecolor=_style(k)["color"], markersize=6, zorder=4)
            axes.plot(*mean[-1], "*", color=_style(k)["color"], markeredgecolor="white", markersize=13, zorder=5)
        axes.set(xlim=limits[i], ylim=limits[j], xlabel=f"{'xyz'[i]} (m)", ylabel=f"{'xyz'[j]} (m)", title=name)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.set_aspect("equal")
        _grid(axes)
    legend = zip(patterns, names, strict=True)
    handles = [Line2D([], [], linewidth=2, label=f"pattern {name}", **_line(k)) for k, name in legend]
    handles.append(Line2D([], [], marker="o", color="white", markeredgecolor="0.3", markersize=6, label="start"))
    handles.append(Line2D([], [], marker="*", linestyle="", color="0.3", markersize=11, label="end"))
    corner = figure.add_subplot(grid[0, 1])
    corner.axis("off")
    corner.legend(handles=handles, loc="center", ncols=1 + (len(patterns) > 8), frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def plot_dtw(path: str | os.PathLike, distances: np.ndarray, labels: Sequence[int], title: str = "") -> None:
    """Pairwise DTW distances (N, N) in metres, sorted by pattern (N,), with lines between the patterns.

    Dark blocks on the diagonal: patterns that differ (DLR, arXiv 2511.19528, shows the same figure).
    """
    labels, patterns, names = _count(labels)
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], [*patterns, patterns[-1] + 1]) - 0.5
    centres = (edges[1:] + edges[:-1]) / 2
    within, between = metrics.within_between(distances, labels.tolist())

    figure = _figure(6.6, 5.8)
    axes = figure.subplots()
    image = axes.imshow(distances[np.ix_(order, order)], cmap="cividis", vmin=0, interpolation="nearest")
    for edge in edges[1:-1]:
        axes.axhline(edge, color="white", linewidth=1)
        axes.axvline(edge, color="white", linewidth=1)
    axes.set_xticks(centres, patterns)
    axes.set_yticks(centres, names)
    axes.tick_params(length=0)
    axes.set(xlabel="pattern", ylabel="pattern (episodes)")
    means = f"mean within a pattern {within:.3f} m" + f", between {between:.3f} m" * (len(patterns) > 1)
    axes.set_title("\n".join(filter(None, [title, means])), fontsize=10)
    figure.colorbar(image, ax=axes, label="DTW distance (m)", shrink=0.9)
    _save(figure, path)


def plot_leakage(path: str | os.PathLike, confusion: np.ndarray, title: str = "") -> None:
    """Pattern commanded (row) against recognised: `metrics.confusion_matrix` (K, K), in per cent of each row."""
    totals = confusion.sum(1)
    share = 100 * confusion / np.maximum(totals, 1)[:, None]
    ticks = np.arange(len(confusion))

    size = 2.2 + 0.42 * max(len(confusion), 4)
    figure = _figure(size + 1.0, size)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for i, j in np.argwhere(confusion > 0):
        text = "<1" if share[i, j] < 0.5 else f"{share[i, j]:.0f}"  # a trace must not read as none
        axes.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if share[i, j] > 55 else "black")
    axes.set_xticks(ticks, ticks)
    axes.set_yticks(ticks, [f"{k} ({n})" for k, n in enumerate(totals)])
    axes.set_xticks(ticks[1:] - 0.5, minor=True)
    axes.set_yticks(ticks[1:] - 0.5, minor=True)
    axes.grid(which="minor", color="0.9", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.set(xlabel="pattern recognised", ylabel="pattern commanded (episodes)")
    leak = f"p_leak {100 * metrics.p_leak(confusion):.1f} %"
    axes.set_title("\n".join(filter(None, [title, leak])), fontsize=10)
    figure.colorbar(image, ax=axes, label="episodes of the row (%)", shrink=0.9)
    _save(figure, path)


def plot_success(
    path: str | os.PathLike,
    steps: Sequence[float],
    success: np.ndarray,
    stages: Sequence[tuple[float, str]] = (),
    title: str = "",
) -> None:
    """Success over environment steps (M,): rates (M, K) in [0, 1], a line a pattern, and where there are several, their mean, thick.

    nan: no value. `stages`: (step, name) of where each stage begins, marked by a dotted line.
    """
    from matplotlib.patheffects import Normal, Stroke
    from matplotlib.ticker import EngFormatter

    steps, success = np.asarray(steps, float), 100 * np.asarray(success, float)
    known = ~np.isnan(success)

    figure = _figure(8.0, 4.2)
    axes = figure.subplots()
    for k in range(success.shape[1]):
        at = known[:, k]
        axes.plot(steps[at], success[at, k], **_line(k), linewidth=1 if success.shape[1] > 1 else 2, label=f"pattern {k}")
    if success.shape[1] > 1:
        mean = np.where(known, success, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)
        outline = [Stroke(linewidth=5, foreground="white"), Normal()]
        axes.plot(steps, mean, color="0.35", linewidth=3.5, label="mean", path_effects=outline, zorder=4)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    for step, name in stages:
        axes.axvline(step, color="0.35", linewidth=1, linestyle=":")
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
        axes.annotate(
            name, (step, 0), (3, 5), xycoords=("data", "axes fraction"), textcoords="offset points",
            rotation=90, fontsize=9, va="bottom", bbox=box, zorder=5,
        )  # fmt: skip
    axes.set(xlabel="environment steps", ylabel="success (%)", ylim=(-2, 102), title=title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _grid(axes)
    _save(figure, path)


def plot_learning_curves(path: str | os.PathLike, curves: dict[str, Sequence[np.ndarray]], title: str = "") -> None:
    """Success over environment steps and over minutes: source -> an (M, 3) array a seed of steps, minutes, success (nan: no value).

    The line is the mean over seeds, the band reaches from the lowest to the highest. A dot is where a run ended; it counts with its last
    value from there on.
    """
    from matplotlib.ticker import EngFormatter

    figure = _figure(9.5, 4.0)
    for axes, column, label in zip(figure.subplots(1, 2, sharey=True), (0, 1), ("environment steps of PPO", "minutes of PPO"), strict=True):
        for k, (name, runs) in enumerate(curves.items()):
            runs = [run[~np.isnan(run[:, 2])] for run in runs]
            if not all(map(len, runs)):
                continue
            x = np.linspace(max(run[0, column] for run in runs), max(run[-1, column] for run in runs), 100)
            y = 100 * np.stack([np.interp(x, run[:, column], run[:, 2]) for run in runs])
            axes.plot(x, y.mean(0), **_line(k), linewidth=2, label=_wrapped(f"{name} ({len(runs)})"))
            axes.fill_between(x, y.min(0), y.max(0), color=_style(k)["color"], alpha=0.15, linewidth=0)
            axes.scatter([run[-1, column] for run in runs], [100 * run[-1, 2] for run in runs], color=_style(k)["color"], s=18, zorder=3)
        axes.set(xlabel=label, ylabel="success with exploration (%)" if column == 0 else "", ylim=(-2, 102))
        _grid(axes)
        if column == 0:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    figure.suptitle(title)
    _save(figure, path)


def pca(x: np.ndarray, components: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of (N, F): scores (N, components), and each one's share of the variance in [0, 1]."""
    x = np.asarray(x, float) - np.mean(x, axis=0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    pad = max(components - len(s), 0)
    scores, variance = np.pad(u * s, ((0, 0), (0, pad))), np.pad(s**2, (0, pad))
    return scores[:, :components], variance[:components] / max(variance.sum(), 1e-300)


def plot_map(path: str | os.PathLike, trajectories: Sequence[np.ndarray], labels: Sequence[int], title: str = "") -> None:
    """PCA map of N trajectories (T_i, D), a point each, by pattern (N,).

    Each is resampled to 50 points of normalised time and flattened; on the map it is divided by sqrt(50), so that
    distances approximate rms distances in metres.
    """
    labels, patterns, names = _count(labels)
    scores, share = pca(np.stack([metrics.resample(t, 50).ravel() for t in trajectories]) / np.sqrt(50))

    figure = _figure(7.4, 5.2)
    axes = figure.subplots()
    for k, name in zip(patterns, names, strict=True):
        axes.plot(*scores[labels == k].T, **_point(k), alpha=0.75, label=f"pattern {name}")
    axes.set(
        xlabel=f"component 1 (m), {share[0]:.0%} of variance",
        ylabel=f"component 2 (m), {share[1]:.0%} of variance",
        title=title,
    )
    axes.set_aspect("equal", adjustable="datalim")
    _grid(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    _save(figure, path)


def plot_comparison(
    path: str | os.PathLike, trajectories: dict[str, Sequence[np.ndarray]], labels: dict[str, Sequence[int]], title: str = ""
) -> None:
    """Sources of trajectories side by side, a column each: paths from above, pairwise DTW distances, and a PCA map of all.

    `trajectories`: source -> N of (T_i, D) metres; `labels`: source -> (N,) patterns. All columns share limits, colour scale
    and components, so that a source that does one thing looks small.
    """
    every = [t for rows in trajectories.values() for t in rows]
    points = np.concatenate([np.asarray(t)[:, :2] for t in every])
    scores, share = pca(np.stack([metrics.resample(t, 50).ravel() for t in every]) / np.sqrt(50))
    distances = {name: metrics.pairwise_dtw(rows) for name, rows in trajectories.items()}
    largest = max(d.max() for d in distances.values())

    figure = _figure(3.3 * len(trajectories) + 0.8, 8.2)
    grid = figure.subplots(3, len(trajectories), squeeze=False, height_ratios=[0.7, 1, 1])
    margin, begun, image = 0.03, 0, None
    for (name, rows), (above, matrix, chart) in zip(trajectories.items(), grid.T, strict=True):
        patterns = np.asarray(labels[name])
        order = np.argsort(patterns, kind="stable")
        for k, x in zip(patterns, rows, strict=True):
            above.plot(x[:, 1], x[:, 0], color=_style(k)["color"], linewidth=0.7, alpha=0.6)
        above.set(xlim=(points[:, 1].min() - margin, points[:, 1].max() + margin), xlabel="y (m)")
        above.set_title(_wrapped(name), fontsize=10)
        above.set(ylim=(points[:, 0].max() + margin, points[:, 0].min() - margin), ylabel="x (m), from above", aspect="equal")
        _grid(above)
        image = matrix.imshow(distances[name][np.ix_(order, order)], cmap="cividis", vmin=0, vmax=largest, interpolation="nearest")
        matrix.set(xticks=[], yticks=[], xlabel="trajectories, by pattern")
        mine = scores[begun : begun + len(rows)]
        begun += len(rows)
        chart.plot(*scores.T, "o", color="0.88", markersize=3)
        for k in np.unique(patterns):
            chart.plot(*mine[patterns == k].T, **_point(k), alpha=0.8)
        chart.set(xlabel=f"component 1 (m), {share[0]:.0%}", ylabel=f"component 2 (m), {share[1]:.0%}")
        _grid(chart)
    figure.colorbar(image, ax=grid[1, -1], label="DTW distance (m)", shrink=0.9)
    figure.suptitle(title)
    _save(figure, path)


def plot_sweep(path: str | os.PathLike, rows: Sequence[dict], title: str = "") -> None:
    """Finished runs by suite, a point a run: success after Learn and after Reinforce, joined; and beside, if a run has more than one
    pattern, how many are alive, and p_leak. The bars are means.

    `rows`: `suite`, `learn`, `reinforce` and `p_leak` in [0, 1] and `patterns`; what isn't known is None.
    """
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    several = any((row["patterns"] or 1) > 1 for row in rows)
    figure = _figure(1.6 * len(suites) + 2.4 + 6.4 * several, 3.8)
    charts = figure.subplots(1, 3 if several else 1, squeeze=False)[0]
    rng = np.random.default_rng(0)
    for x, suite in enumerate(suites):
        mine = [row for row in rows if row["suite"] == suite]
        shift = rng.uniform(-0.1, 0.1, len(mine))
        for row, dx in zip(mine, shift, strict=True):
            both = [np.nan if row[stage] is None else 100 * row[stage] for stage in ("learn", "reinforce")]
            charts[0].plot([x - 0.2 + dx, x + 0.2 + dx], both, color="0.75", linewidth=0.6, zorder=1)
            charts[0].plot(x - 0.2 + dx, both[0], "o", color=COLOURS[1], markersize=3.5)
            charts[0].plot(x + 0.2 + dx, both[1], "o", color=COLOURS[0], markersize=3.5)
        for k, (chart, name, scale) in enumerate(zip(charts[1:], ("patterns", "p_leak"), (1, 100), strict=False)):
            values = [scale * row[name] for row in mine if row[name] is not None]
            chart.plot(x + shift[: len(values)], values, "o", color=COLOURS[2 + k], markersize=3.5)
        for chart, name, dx, scale in ((0, "learn", -0.2, 100), (0, "reinforce", 0.2, 100), (1, "patterns", 0, 1), (2, "p_leak", 0, 100)):
            values = [scale * row[name] for row in mine if row[name] is not None]
            if values and chart < len(charts):
                charts[chart].hlines(np.mean(values), x + dx - 0.18, x + dx + 0.18, color="black", linewidth=1.8, zorder=3)
    for chart, label in zip(charts, ("success (%)", "patterns alive", "p_leak (%)"), strict=False):
        chart.set(ylabel=label, xlim=(-0.5, len(suites) - 0.5))
        chart.set_xticks(range(len(suites)), [suite.removeprefix("libero_") for suite in suites])
        _grid(chart)
    charts[0].set_ylim(-3, 103)
    for chart in charts[1:]:  # from 0, and at least to 4 patterns, or 10 %
        chart.set_ylim(-0.02 * (top := max(1.1 * chart.dataLim.y1, 10 if chart is charts[-1] else 4)), top)
    for x, colour, name in ((0, COLOURS[1], "after Learn"), (1, COLOURS[0], "after Reinforce")):
        charts[0].plot([], [], "o", color=colour, label=name, zorder=x)
    charts[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False, fontsize=9)
    figure.suptitle(textwrap.fill(title, 24 + 16 * len(suites) + 70 * several, break_on_hyphens=False), fontsize=10)
    _save(figure, path)
