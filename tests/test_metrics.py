"""Every metric against a closed form, a brute-force count or scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from common import metrics


def line(start, end, steps):
    return np.linspace(np.asarray(start, float), np.asarray(end, float), steps)


def test_features_and_resample():
    ee, states = np.arange(6.0).reshape(2, 3), np.arange(30.0).reshape(2, 15)
    np.testing.assert_array_equal(metrics.trajectory_features(ee, states, [2, 7])[1], [3, 4, 5, 18, 19, 20, 23, 24, 25])
    np.testing.assert_allclose(metrics.resample([[0.0], [2.0], [10.0]], 5)[:, 0], [0, 1, 2, 6, 10])
    np.testing.assert_allclose(metrics.resample(line([0, 1], [3, 5], 7), 100), line([0, 1], [3, 5], 100), atol=1e-14)
    np.testing.assert_array_equal(metrics.resample([[1.0, 2.0]], 3), [[1, 2]] * 3)
    for bad in (np.zeros((0, 3)), np.zeros(3), [[np.nan]]):
        with pytest.raises(ValueError, match="finite"):
            metrics.resample(bad, 5)


def test_diversity_closed_form():
    """Three straight lines from the origin along x, y, z of lengths 1, 2, 3, with different numbers of steps."""
    lines = [line([0, 0, 0], (k + 1) * np.eye(3)[k], steps) for k, steps in enumerate((20, 35, 50))]
    d = metrics.diversity(lines, points=100)
    # ||tau_i - tau_j||^2 = (l_i^2 + l_j^2) sum_p (p/99)^2, sum of squares 0..99 = 99*100*199/6
    scale = np.sqrt(99 * 100 * 199 / 6) / 99
    assert d["mean_pairwise_distance"] == pytest.approx(scale * np.mean(np.sqrt([1 + 4, 1 + 9, 4 + 9])))
    assert d["endpoint_variance"] == pytest.approx(sum(n * n * (1 / 3 - 1 / 9) for n in (1, 2, 3)))
    assert d["direction_variance"] == pytest.approx(1 - 3 * (1 / 3) ** 2)
    assert d["path_length_variance"] == pytest.approx(2 / 3)


def test_diversity_degenerate():
    same = metrics.diversity([line([0, 0], [1, 1], n) for n in (10, 20, 30)])
    assert all(v == pytest.approx(0, abs=1e-12) for v in same.values())
    assert all(np.isnan(v) for v in metrics.diversity([np.zeros((5, 3))]).values())
    assert metrics.diversity([np.zeros((5, 3))] * 2)["direction_variance"] == 0
    with pytest.raises(ValueError, match="same D"):
        metrics.diversity([np.zeros((5, 3)), np.zeros((5, 4))])


def brute_force_dtw(a, b):
    """The least (cost, cells) over every alignment there is."""

    def alignments(i, j):
        if i == j == 0:
            yield [(0, 0)]
        for di, dj in ((1, 1), (1, 0), (0, 1)):
            if i >= di and j >= dj and (i, j) != (0, 0):
                for path in alignments(i - di, j - dj):
                    yield [*path, (i, j)]

    costs = ((sum(np.linalg.norm(a[i] - b[j]) for i, j in p), len(p)) for p in alignments(len(a) - 1, len(b) - 1))
    cost, cells = min(costs)
    return cost / cells


def test_dtw():
    rng = np.random.default_rng(0)
    for n, m in itertools.product((1, 2, 4, 5), repeat=2):
        a, b = rng.normal(size=(n, 2)), rng.normal(size=(m, 2))
        assert metrics.dtw_distance(a, b, points=None) == pytest.approx(brute_force_dtw(a, b), abs=1e-14)
    # 0,1,2 against 0,2: 1 matches either end at cost 1, over three cells
    assert metrics.dtw_distance([[0.0], [1.0], [2.0]], [[0.0], [2.0]], points=None) == pytest.approx(1 / 3)
    # Parallel lines: the distance between them, whatever their tempo.
    assert metrics.dtw_distance(line([0, 0], [1, 0], 30), line([0, 0.2], [1, 0.2], 170)) == pytest.approx(0.2)
    # One path at two tempi: apart at equal times by up to 1/4, close when warped.
    t = np.linspace(0, 1, 200)[:, None]
    assert metrics.dtw_distance(t, t**2) < 0.01 < 0.15 < np.abs(t - t**2).mean()
    with pytest.raises(ValueError, match="same D"):
        metrics.dtw_distance(np.zeros((3, 2)), np.zeros((3, 3)))


def test_pairwise_dtw_and_blocks():
    lines = [line([0, y], [1, y], n) for y, n in ((0, 20), (0.1, 30), (1, 40), (1.1, 25))]
    matrix = metrics.pairwise_dtw(lines)
    np.testing.assert_allclose(matrix, np.abs(np.subtract.outer([0, 0.1, 1, 1.1], [0, 0.1, 1, 1.1])), atol=1e-12)
    assert metrics.within_between(matrix, ["a", "a", "b", "b"]) == pytest.approx((0.1, 1.0))
    rng = np.random.default_rng(0)
    ties = metrics.pairwise_dtw([rng.integers(0, 2, (12, 1)).astype(float) for _ in range(8)], points=12)
    np.testing.assert_array_equal(ties, ties.T)
    assert metrics.pairwise_dtw([]).shape == (0, 0)


def test_coverage():
    x = [np.array([[0.01, 0.0], [0.04, 0.0], [0.06, 0.0]]), np.array([[0.01, 0.06]])]
    a = [np.array([[-1.0], [1.0], [0.0]]), np.array([[0.0]])]
    c = metrics.coverage(x, a, cell=0.05)
    assert (c["state_cells"], c["state_action_cells"]) == pytest.approx((3, 4))
    # Cells of 2, 1 and 1 steps: of the 6 ways to draw two of four steps, one stays in one cell.
    c = metrics.coverage(x, a, cell=0.05, samples=2)
    assert (c["state_cells"], c["state_action_cells"]) == pytest.approx((2 - 1 / 6, 2))
    assert metrics.coverage(x, a, samples=1)["state_cells"] == pytest.approx(1)
    with pytest.raises(ValueError, match="between 1 and"):
        metrics.coverage(x, a, samples=5)


def test_smoothness():
    dt, t = 0.05, np.arange(60)[:, None] * 0.05
    cubic = np.array([[3.0, 0.0, 4.0]]) * t**3  # third derivative 6 * 5; second 6 * 5 * t, exact at the middle point
    ramp = np.arange(60)[:, None] / 60 * np.ones(7)
    s = metrics.smoothness([cubic], [ramp], dt)
    assert s["mean_jerk"] == pytest.approx(30)
    assert s["mean_acceleration"] == pytest.approx(30 * t[1:-1].mean())
    assert s["action_variation"] == pytest.approx(7 / 60)
    assert s["path_length"] == pytest.approx(5 * t[-1, 0] ** 3)
    assert s["steps"] == 60
    # A circle of radius r: the n-th difference of r exp(i w t) has the modulus r (2 sin(w dt / 2))^n.
    w, r = 2.0, 0.1
    circle = np.hstack([r * np.cos(w * t), r * np.sin(w * t), 0 * t])
    s = metrics.smoothness([circle, circle[:2]], [np.zeros((60, 7)), np.zeros((2, 7))], dt)
    assert s["mean_jerk"] == pytest.approx(r * (2 * np.sin(w * dt / 2) / dt) ** 3)
    assert s["mean_acceleration"] == pytest.approx(r * (2 * np.sin(w * dt / 2) / dt) ** 2)
    assert s["steps"] == 31
    assert all(np.isnan(v) for v in metrics.smoothness([], []).values())


def test_consistency():
    # Two rollouts 2h apart have variance 2h^2 with n - 1; pooled with an identical pair: h^2.
    h = 0.03
    pairs = [line([0, y], [1, y], n) for y, n in ((-h, 20), (h, 50), (1, 30), (1, 60))]
    assert metrics.consistency(pairs, [(0, 1), (0, 1), (1, 1), (1, 1)]) == pytest.approx(h)
    assert metrics.consistency(pairs[:2], ["a", "a"]) == pytest.approx(np.sqrt(2) * h)
    assert np.isnan(metrics.consistency(pairs, [0, 1, 2, 3])) and np.isnan(metrics.consistency([], []))


@pytest.mark.parametrize(
    ("a", "b", "ari", "nmi"),
    [
        ([0, 0, 1, 1], ["left", "left", "right", "right"], 1, 1),
        ([0, 0, 1, 1], [1, 1, 0, 0], 1, 1),
        ([0, 0, 1, 2], [0, 0, 1, 1], 4 / 7, 0.8),  # n_ij pairs 1, rows 1, columns 2, E = 1/3: (1 - 1/3) / (3/2 - 1/3)
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5, 0),
        ([0, 0, 0, 0], [0, 1, 2, 3], 0, 0),
        ([0, 0, 0], [1, 1, 1], 1, 1),
        ([0], [0], 1, 1),
    ],
)
def test_recovery_known_values(a, b, ari, nmi):
    assert metrics.adjusted_rand_index(a, b) == metrics.adjusted_rand_index(b, a) == pytest.approx(ari, abs=1e-12)
    assert metrics.normalized_mutual_information(a, b) == pytest.approx(nmi, abs=1e-12)


def test_adjusted_rand_index_by_counting_pairs_and_by_chance():
    """The pair-counting form of the index (same/different in both), and its mean of 0 over random relabellings."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 60), rng.integers(0, 3, 60)
    b[:30] = a[:30] % 3
    i, j = np.triu_indices(60, 1)
    same_a, same_b = a[i] == a[j], b[i] == b[j]
    ss, dd = (same_a & same_b).sum(), (~same_a & ~same_b).sum()
    sd, ds = (same_a & ~same_b).sum(), (~same_a & same_b).sum()
    truth = 2 * (ss * dd - sd * ds) / ((ss + sd) * (sd + dd) + (ss + ds) * (ds + dd))
    assert metrics.adjusted_rand_index(a, b) == pytest.approx(truth)
    shuffled = [metrics.adjusted_rand_index(a, rng.permutation(b)) for _ in range(500)]
    assert abs(np.mean(shuffled)) < 4 * np.std(shuffled) / np.sqrt(500)
    with pytest.raises(ValueError, match="two labels"):
        metrics.adjusted_rand_index([0, 1], [0])


def test_leakage():
    commanded, recognised = [0, 0, 0, 0, 1, 1, 3], [0, 0, 0, 2, 1, 0, 3]
    matrix = metrics.confusion_matrix(commanded, recognised, 4)
    np.testing.assert_array_equal(matrix, [[3, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
    assert metrics.leakage(commanded, recognised, 4) == pytest.approx((1 / 4 + 1 / 2 + 0) / 3)
    assert np.isnan(metrics.leakage([], [], 4))
    for bad in ([4], [-1]):
        with pytest.raises(ValueError, match="0..3"):
            metrics.leakage([0], bad, 4)


def test_wilson_interval():
    for k, n, confidence in ((0, 10, 0.95), (10, 10, 0.95), (45, 50, 0.95), (3, 7, 0.9)):
        truth = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
        assert metrics.wilson_interval(k, n, confidence) == pytest.approx((truth.low, truth.high), abs=1e-12)
    assert metrics.wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes"):
        metrics.wilson_interval(3, 2)


def test_newcombe_interval():
    """The first example of Newcombe 1998, table II, method 10; and no difference."""
    assert metrics.newcombe_interval((56, 48), (70, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    low, high = metrics.newcombe_interval((200, 200), (200, 200))
    assert low == pytest.approx(-high) and 0 < high < 0.02


def test_bootstrap_interval():
    """The mean of n draws from n/2 zeros and n/2 ones is Binomial(n, 1/2) / n."""
    low, high = metrics.bootstrap_interval([0, 1] * 50, resamples=20000)
    truth = stats.binom(100, 0.5).ppf([0.025, 0.975]) / 100
    assert (low, high) == pytest.approx(truth, abs=0.0101)  # one count
    assert metrics.bootstrap_interval([2.0] * 9) == (2.0, 2.0)
    low, high = metrics.bootstrap_interval(np.arange(101), statistic=np.median)
    assert low < 50 < high
    assert np.isnan(metrics.bootstrap_interval([])).all()


def test_pass_and_coverage_at_k_by_going_through_all_draws():
    rng = np.random.default_rng(0)
    ways = rng.integers(-1, 3, (5, 6))  # five starts, six rollouts of each, three ways or failed
    for k in (1, 3, 6):
        draws = [row[list(chosen)] for row in ways for chosen in itertools.combinations(range(6), k)]
        assert metrics.pass_at_k(ways >= 0, k) == pytest.approx(np.mean([(draw >= 0).any() for draw in draws]))
        seen = [len(set(draw[draw >= 0])) / 3 for draw in draws]
        assert metrics.coverage_at_k(ways, k, 3) == pytest.approx(np.mean(seen))
    assert metrics.pass_at_k(ways >= 0, 1) == pytest.approx((ways >= 0).mean())
    assert metrics.coverage_at_k(np.zeros((4, 8), int), 8, 8) == 1 / 8  # one way alone, however often
    for k in (0, 7):
        with pytest.raises(ValueError, match=r"k must be in 1\.\.6"):
            metrics.coverage_at_k(ways, k, 3)
