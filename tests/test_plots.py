"""What the figures show against the numbers they were given, and that their files appear whole."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from common import metrics, plots

RNG = np.random.default_rng(0)
LABELS = np.tile(np.arange(3), 4)
CURVE = np.array([[1000, 1.0, np.nan], [2000, 2.0, 0.2], [3000, 3.0, 0.6]])
PATHS = [np.cumsum(RNG.normal(k, 1, (20 + k, 9)), axis=0) / 100 for k in LABELS]


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figure last drawn, instead of a file."""
    axes = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: axes.extend(figure.axes))
    return axes


def test_every_figure_is_written_whole(tmp_path):
    confusion = metrics.confusion_matrix(LABELS, np.zeros(12, int), 3)
    plots.plot_paths(tmp_path / "paths.png", PATHS, LABELS, "task")
    plots.plot_dtw(tmp_path / "dtw.png", metrics.pairwise_dtw(PATHS), LABELS, "task")
    plots.plot_leakage(tmp_path / "leakage.png", confusion, "task")
    plots.plot_success(tmp_path / "success.png", [0, 1000], [[0.1, np.nan], [0.5, 0.9]], [(0, "Learn")], "task")
    plots.plot_map(tmp_path / "new" / "map.png", PATHS, LABELS, "task")
    plots.plot_comparison(tmp_path / "compare.png", {"one": PATHS, "two": PATHS[:5]}, {"one": LABELS, "two": LABELS[:5]}, "task")
    plots.plot_learning_curves(tmp_path / "curves.png", {"one": [CURVE, CURVE], "two": [CURVE[:0]]}, "task")
    files = sorted(tmp_path.rglob("*.*"))
    assert [f.name for f in files] == ["compare.png", "curves.png", "dtw.png", "leakage.png", "map.png", "paths.png", "success.png"]
    for file in files:
        with Image.open(file) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 400 and len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_a_failure_leaves_the_earlier_figure(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, path, **kwargs):
        path.write_bytes(b"half")
        raise RuntimeError("disk")

    plots.plot_map(tmp_path / "map.png", PATHS, LABELS)
    before = (tmp_path / "map.png").read_bytes()
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(RuntimeError, match="disk"):
        plots.plot_map(tmp_path / "map.png", PATHS, LABELS)
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [before]


def test_importing_does_not_load_matplotlib():
    code = "import sys, common.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(plots.__file__).parents[1]).returncode == 0


def test_paths_show_the_trajectories(drawn):
    plots.plot_paths("", PATHS, LABELS)
    above, front, side = drawn[:3]
    for axes, columns in ((above, [1, 0]), (front, [1, 2]), (side, [0, 2])):
        thin = [line.get_xydata() for line in axes.lines if line.get_linewidth() == 0.6]
        assert len(thin) == 12
        np.testing.assert_array_equal(thin[0], PATHS[0][:, columns])
        mean = next(line for line in axes.lines if line.get_linewidth() == 2.2).get_xydata()
        np.testing.assert_allclose(mean[-1], np.mean([PATHS[n][-1, columns] for n in (0, 3, 6, 9)], axis=0))
    # Seen from the front, x comes towards the viewer: down from above, to the left from the right side.
    assert above.yaxis_inverted() and side.xaxis_inverted() and not above.xaxis_inverted()
    with pytest.raises(ValueError, match="no episode"):
        plots.plot_paths("", [], [])


def test_dtw_is_sorted_by_pattern(drawn):
    plots.plot_dtw("", np.abs(np.subtract.outer(LABELS, LABELS)) / 2, LABELS)
    expected = np.abs(np.subtract.outer(np.repeat(range(3), 4), np.repeat(range(3), 4))) / 2
    np.testing.assert_array_equal(drawn[0].images[0].get_array(), expected)
    assert [line.get_xdata()[0] for line in drawn[0].lines[1::2]] == [3.5, 7.5]
    np.testing.assert_array_equal(drawn[0].get_xticks(), [1.5, 5.5, 9.5])
    assert drawn[0].get_title() == "mean within a pattern 0.000 m, between 0.667 m"


def test_leakage_numbers(drawn):
    plots.plot_leakage("", np.array([[3, 1, 0], [0, 0, 0], [1, 0, 299]]))
    texts = {t.get_position(): t.get_text() for t in drawn[0].texts}
    assert texts == {(0, 0): "75", (1, 0): "25", (0, 2): "<1", (2, 2): "100"}
    assert drawn[0].get_title() == "p_leak 12.7 %"  # (25 + 1/3) / 2


def test_success_mean_ignores_missing_values(drawn):
    plots.plot_success("", [0, 1, 2], [[0.0, np.nan], [0.5, 1.0], [np.nan, np.nan]], [(1, "Reinforce")])
    lines = {line.get_label(): line.get_ydata() for line in drawn[0].lines}
    np.testing.assert_array_equal(lines["pattern 1"], [100])
    np.testing.assert_array_equal(lines["mean"], [0, 75, np.nan])
    assert [t.get_text() for t in drawn[0].texts] == ["Reinforce"]


def test_success_of_one_policy_is_one_line(drawn):
    plots.plot_success("", [0, 1, 2], [[0.2], [np.nan], [0.5]])
    (line,) = drawn[0].lines
    np.testing.assert_array_equal([line.get_xdata(), line.get_ydata()], [[0, 2], [20, 50]])
    assert drawn[0].get_legend() is None


def test_learning_curves_show_the_mean_of_the_seeds_and_their_range(drawn):
    plots.plot_learning_curves("", {"one": [CURVE, CURVE + [0, 0, 0.2]]})
    for axes, column in zip(drawn, (0, 1), strict=True):
        (line,) = axes.get_lines()
        np.testing.assert_allclose(line.get_xdata()[[0, -1]], CURVE[[1, -1], column])
        np.testing.assert_allclose(line.get_ydata()[[0, -1]], [30, 70])  # per cent
        band = axes.collections[0].get_paths()[0].get_extents()
        np.testing.assert_allclose([band.ymin, band.ymax], [20, 80])


def test_a_run_that_ended_counts_with_its_last_value(drawn):
    long = np.array([[0, 0, 0.2], [1000, 1, 0.4], [2000, 2, 0.8]])
    plots.plot_learning_curves("", {"one": [long, long[:2]]})
    for axes, column in zip(drawn, (0, 1), strict=True):
        (line,) = axes.get_lines()
        assert line.get_xdata()[-1] == long[-1, column] and line.get_ydata()[-1] == pytest.approx(60)
        ends = axes.collections[-1].get_offsets()
        np.testing.assert_allclose(ends, [[long[2, column], 80], [long[1, column], 40]])


def test_names_with_many_flags_stay_inside_the_figures(monkeypatch):
    """A column of benchmarks.compare is named after the flags in which runs differ."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    names = [f"diffusion_ppo --chunk {n} --actor-lr 5e-05 --clip-coef-noisy 0.02 --std-start 0.08 --chunk-noise shared" for n in (2, 4)]
    plots.plot_learning_curves("", dict.fromkeys(names, [CURVE]))
    plots.plot_comparison("", dict.fromkeys(names, PATHS), dict.fromkeys(names, LABELS))
    curves, comparison = figures
    for figure in figures:
        figure.canvas.draw()  # lays it out
    titles = [axes.title.get_window_extent() for axes in comparison.axes[:2]]
    assert titles[0].x1 < titles[1].x0, "titles overlap"
    assert titles[0].x0 >= 0 and titles[1].x1 <= comparison.bbox.x1, "a title is cut"
    assert curves.axes[1].get_legend().get_window_extent().x1 <= curves.bbox.x1, "the legend is cut"


def test_pca_closed_form(drawn):
    t = np.array([-3.0, -1.0, 1.0, 3.0])
    scores, share = plots.pca(7 + np.outer(t, [0.6, 0.8, 0]) + np.outer(t**2 - 5, [0, 0, 0.5]))
    np.testing.assert_allclose(np.abs(scores), np.abs(np.stack([t, (t**2 - 5) / 2], axis=1)), atol=1e-12)
    np.testing.assert_allclose(share, [20 / 36, 16 / 36])
    assert plots.pca(np.ones((1, 5)))[0].shape == (1, 2)
    # Two still trajectories 3 m and 4 m apart in two coordinates lie 5 m apart on the map.
    plots.plot_map("", [np.zeros((5, 2)), np.tile([3.0, 4.0], (9, 1))], [0, 1])
    assert np.linalg.norm(np.subtract(*(line.get_xydata()[0] for line in drawn[0].lines))) == pytest.approx(5)


# Linear RGB as seen without long-, middle- or short-wave cones (Machado, Oliveira & Fernandes 2009, severity 1).
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("vision", VISION)
def test_patterns_are_told_apart(vision):
    """Colours differ by 15 or more in CIELAB (a difference of about 2 is just seen), from the white behind them too."""
    rgb = np.array([to_rgb(c) for c in (*plots.COLOURS, "white")])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ np.transpose(VISION[vision])
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = np.clip(linear, 0, 1) @ to_xyz.T / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 15
    assert len({str(plots._line(k)) for k in range(16)}) == len({str(plots._point(k)) for k in range(16)}) == 16


def test_the_comparison_shares_limits_colours_and_components(drawn):
    plots.plot_comparison("", {"all": PATHS, "some": PATHS[:5]}, {"all": LABELS, "some": LABELS[:5]})
    above, matrices, charts = drawn[:2], drawn[2:4], drawn[4:6]
    assert above[0].get_xlim() == above[1].get_xlim() and above[0].get_ylim() == above[1].get_ylim()
    assert matrices[0].images[0].get_clim() == matrices[1].images[0].get_clim()
    assert matrices[1].images[0].get_array().shape == (5, 5)
    (everything, *_), coloured = charts[1].lines, charts[1].lines[1:]
    assert len(everything.get_xdata()) == 17 and sum(len(line.get_xdata()) for line in coloured) == 5
