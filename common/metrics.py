"""What trajectories are worth: diversity, smoothness, consistency, pattern recovery, and intervals for rates and means.

A trajectory is a (T, D) float array, one row a control step; T may differ between trajectories. Positions are in
metres; D is by default the end-effector's and the objects' positions side by side (`trajectory_features`). "DLR" is
arXiv 2511.19528. What is undefined (the variance of one trajectory, a rate of no episodes) is nan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist

import numba
import numpy as np
from scipy.spatial.distance import pdist
from scipy.special import gammaln


def trajectory_features(ee_pos: np.ndarray, states: np.ndarray, object_qpos: Sequence[int]) -> np.ndarray:
    """(T, 3 + 3 * objects) metres: end-effector positions (T, 3) beside the objects' from states (T, 1+nq+nv).

    Both of the same moments. `object_qpos`: each object's free joint's qpos address (a state holds the time first).
    """
    return np.concatenate([ee_pos, *(states[:, 1 + address : 4 + address] for address in object_qpos)], axis=1)


def resample(trajectory: np.ndarray, points: int) -> np.ndarray:
    """(T, D) -> (points, D), linear in normalised time t/(T-1), ends included; a single row is repeated.

    ValueError: empty, not two-dimensional, not finite.
    """
    x = np.asarray(trajectory, dtype=np.float64)
    if x.ndim != 2 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"a trajectory must be a finite (T, D) array with T >= 1, not of shape {x.shape}")
    time = np.linspace(0, len(x) - 1, points)
    left = np.minimum(time.astype(int), max(len(x) - 2, 0))
    weight = (time - left)[:, None]
    return (1 - weight) * x[left] + weight * x[np.minimum(left + 1, len(x) - 1)]


def _resample_all(trajectories: Sequence[np.ndarray], points: int) -> np.ndarray:
    """N of (T_i, D) -> (N, points, D). ValueError when D differs."""
    if len(widths := {np.shape(x)[-1] for x in trajectories}) > 1:
        raise ValueError(f"trajectories must have the same D, not {sorted(widths)}")
    return np.stack([resample(x, points) for x in trajectories])


# ------------------------------------------------------------------------------------------------------------ diversity


def diversity(trajectories: Sequence[np.ndarray], points: int = 100) -> dict[str, float]:
    """DLR's four diversity metrics (Table 1) over N trajectories (T_i, D) in metres; all >= 0, nan for N < 2.

    - mean_pairwise_distance (m): 2/(N(N-1)) sum_{i<j} ||tau_i - tau_j||_2, each resampled to `points` in normalised
      time and flattened to points * D numbers; it grows with sqrt(points): rms distance = this / sqrt(points)
    - endpoint_variance (m^2): Var{s_T}
    - direction_variance (in [0, 1]): Var{(s_T - s_0) / ||s_T - s_0||}; the direction of no displacement is 0
    - path_length_variance (m^2): Var{sum_t ||s_{t+1} - s_t||}
    The paper says neither how lengths are equalised nor what the variance of a vector is; here it is the population
    variance summed over dimensions, E||x - E x||^2.
    """
    names = ("mean_pairwise_distance", "endpoint_variance", "direction_variance", "path_length_variance")
    if len(trajectories) < 2:
        return dict.fromkeys(names, float("nan"))
    x = _resample_all(trajectories, points)
    displacement = x[:, -1] - x[:, 0]
    direction = displacement / np.maximum(np.linalg.norm(displacement, axis=1, keepdims=True), 1e-12)
    lengths = [path_length(t) for t in trajectories]  # of the paths as they are: resampling cuts corners
    values = (pdist(x.reshape(len(x), -1)).mean(), x[:, -1].var(0).sum(), direction.var(0).sum(), np.var(lengths))
    return dict(zip(names, map(float, values), strict=True))


def path_length(trajectory: np.ndarray) -> float:
    """sum_t ||s_{t+1} - s_t||_2 of a (T, D) trajectory, in its units."""
    return float(np.linalg.norm(np.diff(trajectory, axis=0), axis=1).sum())


@numba.njit(nogil=True, cache=True)
def _dtw(a, b):  # (n, D), (m, D) -> float
    m = len(b)
    above, above_steps = np.full(m + 1, np.inf), np.zeros(m + 1, np.int64)
    here, here_steps = np.full(m + 1, np.inf), np.zeros(m + 1, np.int64)
    above[0] = 0.0
    for i in range(len(a)):
        here[0] = np.inf
        for j in range(m):
            best, steps = above[j], above_steps[j]
            # Of equal costs the shorter alignment, or the normalised distance would not be symmetric.
            if above[j + 1] < best or (above[j + 1] == best and above_steps[j + 1] < steps):
                best, steps = above[j + 1], above_steps[j + 1]
            if here[j] < best or (here[j] == best and here_steps[j] < steps):
                best, steps = here[j], here_steps[j]
            square = 0.0
            for k in range(a.shape[1]):
                square += (a[i, k] - b[j, k]) ** 2
            here[j + 1], here_steps[j + 1] = best + np.sqrt(square), steps + 1
        above, above_steps, here, here_steps = here, here_steps, above, above_steps
    return above[m] / above_steps[m]


@numba.njit(nogil=True, cache=True)
def _pairwise_dtw(x):  # (N, points, D) -> (N, N)
    out = np.zeros((len(x), len(x)))
    for i in range(len(x)):
        for j in range(i):
            out[i, j] = out[j, i] = _dtw(x[i], x[j])
    return out


def dtw_distance(a: np.ndarray, b: np.ndarray, points: int | None = 50) -> float:
    """Dynamic time warping between (T_a, D) and (T_b, D): the mean distance (m) along their cheapest alignment.

    Euclidean local cost and unweighted steps (1,1), (1,0), (0,1) (Sakoe & Chiba 1978, no window); the least total cost
    is divided by the number of cells on its path. Both are first resampled to `points` (None: taken as they are).
    Symmetric; near zero for one path at two tempi; not a metric, since the triangle inequality doesn't hold.
    """
    x, y = (resample(t, points or len(t)) for t in (a, b))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"trajectories must have the same D, not {x.shape[1]} and {y.shape[1]}")
    return float(_dtw(x, y))


def pairwise_dtw(trajectories: Sequence[np.ndarray], points: int = 50) -> np.ndarray:
    """`dtw_distance` between all of N trajectories (T_i, D) -> (N, N) metres, symmetric, zero diagonal."""
    return _pairwise_dtw(_resample_all(trajectories, points)) if len(trajectories) else np.zeros((0, 0))


def within_between(distances: np.ndarray, labels: Sequence[Hashable]) -> tuple[float, float]:
    """Means of distances (N, N) over pairs of one label and over pairs of two: how block-diagonal they are.

    nan where there is no such pair.
    """
    i, j = np.triu_indices(len(distances), 1)
    same = (codes := _codes(labels))[i] == codes[j]
    return tuple(float(d.mean()) if len(d) else float("nan") for d in (distances[i, j][same], distances[i, j][~same]))


def coverage(
    trajectories: Sequence[np.ndarray],
    actions: Sequence[np.ndarray],
    cell: float = 0.05,
    bins: int = 3,
    samples: int | None = None,
) -> dict[str, float]:
    """State coverage and state-action coverage: how many grid cells the steps of N trajectories fall in.

    States (T_i, D) fall in cubes of side `cell` (m), actions (T_i, A) in [-1, 1] into `bins` equal bins a dimension.
    The counts grow with the data, so compare them at equal `samples` n: then they are the expected counts in n steps
    drawn without replacement (rarefaction, Hurlbert 1971), sum_c 1 - C(M - M_c, n) / C(M, n), M_c of M steps in cell c.
    ValueError: more samples than steps.
    """
    states = np.floor(np.concatenate(trajectories) / cell)
    bin_index = np.clip(np.floor((np.concatenate(actions) + 1) / 2 * bins), 0, bins - 1)
    total = len(states)
    n = total if samples is None else samples
    if not 0 < n <= total:
        raise ValueError(f"samples must be between 1 and the number of steps, {total}, not {n}")

    def cells(x: np.ndarray) -> float:
        counts = np.unique(x, axis=0, return_counts=True)[1]
        # gammaln is +inf at 0, -1, ...: a cell that n draws can't miss has probability exp(-inf) of being missed.
        log_missed = gammaln(total - counts + 1) - gammaln(total - counts - n + 1) - gammaln(total + 1)
        return float(np.sum(1 - np.exp(log_missed + gammaln(total - n + 1))))

    return {"state_cells": cells(states), "state_action_cells": cells(np.concatenate([states, bin_index], axis=1))}


def pass_at_k(successes: np.ndarray, k: int) -> float:
    """Pass@k in [0, 1]: how often one at least of k rollouts from the same start succeeds; successes (starts, n) of n >= k rollouts.

    The mean over starts of 1 - C(n - c, k) / C(n, k), c of n having succeeded: without bias, unlike 1 - (1 - c/n)^k (Chen et al. 2021,
    eq. 1). ValueError: k is not in 1..n.
    """
    return coverage_at_k(np.where(successes, 0, -1), k, 1)


def coverage_at_k(ways: np.ndarray, k: int, num_ways: int) -> float:
    """Coverage@k in [0, 1]: the part of all ways of doing the task that k rollouts from the same start are expected to show.

    ways (starts, n) in 0..num_ways-1 of n >= k rollouts from each start, -1: failed. The mean over starts and ways of
    1 - C(n - n_w, k) / C(n, k), n_w of n having succeeded in way w. ValueError: k is not in 1..n.
    """
    ways = np.asarray(ways)
    n = ways.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n}, the rollouts from a start, not {k}")
    counts = (ways[..., None] == np.arange(num_ways)).sum(1)  # (starts, ways)
    missed = np.array([math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return float(np.mean(1 - missed[counts]))


# ---------------------------------------------------------------------------------------------- smoothness, consistency


def smoothness(ee_pos: Sequence[np.ndarray], actions: Sequence[np.ndarray], dt: float = 0.05) -> dict[str, float]:
    """Smoothness of end-effector paths (T_i, 3) in metres, a sample every `dt` s, and actions (T_i, 7) in [-1, 1].

    Means over episodes, each weighing the same:
    - mean_jerk (m/s^3): mean_t ||x_{t+3} - 3 x_{t+2} + 3 x_{t+1} - x_t|| / dt^3
    - mean_acceleration (m/s^2): mean_t ||x_{t+2} - 2 x_{t+1} + x_t|| / dt^2
    - action_variation (a step): total variation sum_k |a_{t+1,k} - a_{t,k}| over all dimensions, mean over t
    - path_length (m): sum_t ||x_{t+1} - x_t||; steps: mean T_i, for successful episodes the steps to success
    Episodes too short for a difference are left out of its mean; nan when none is left.
    """

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else float("nan")

    def derivative(order: int) -> float:
        return mean([np.linalg.norm(np.diff(x, order, 0), axis=1).mean() / dt**order for x in ee_pos if len(x) > order])

    return {
        "mean_jerk": derivative(3),
        "mean_acceleration": derivative(2),
        "action_variation": mean([np.abs(np.diff(a, axis=0)).sum(1).mean() for a in actions if len(a) > 1]),
        "path_length": mean([path_length(x) for x in ee_pos]),
        "steps": mean([len(a) for a in actions]),
    }


def consistency(trajectories: Sequence[np.ndarray], groups: Sequence[Hashable], points: int = 100) -> float:
    """Dispersion (m) between rollouts of one group: pooled standard deviation at equal normalised time; 0 is best.

    `groups`: what each of the N rollouts (T_i, D) started from, for example (pattern, init state).
    sqrt(sum_g sum_{i in g} mean_t ||x_i(t) - mean_g(t)||^2 / sum_g (n_g - 1)), paths resampled to `points`; nan when
    no group has two rollouts.
    """
    if not len(trajectories):
        return float("nan")
    x, codes = _resample_all(trajectories, points), _codes(groups)
    members = [x[codes == g] for g in range(codes.max() + 1)]
    freedom = sum(len(m) - 1 for m in members)
    squares = sum(((m - m.mean(0)) ** 2).sum() / points for m in members)
    return float(np.sqrt(squares / freedom)) if freedom else float("nan")


# ----------------------------------------------------------------------------------------------------- pattern recovery


def _codes(labels: Sequence[Hashable]) -> np.ndarray:
    """Any hashable labels -> 0, 1, ... in order of appearance."""
    index: dict[Hashable, int] = {}
    return np.array([index.setdefault(label, len(index)) for label in labels], dtype=int)


def _contingency(labels_a: Sequence[Hashable], labels_b: Sequence[Hashable]) -> np.ndarray:
    """(classes of a, classes of b) counts of items."""
    if len(labels_a) != len(labels_b) or not len(labels_a):
        raise ValueError(f"need two labels for each of one or more items, not {len(labels_a)} and {len(labels_b)}")
    a, b = _codes(labels_a), _codes(labels_b)
    table = np.zeros((a.max() + 1, b.max() + 1), dtype=np.int64)
    np.add.at(table, (a, b), 1)
    return table


def adjusted_rand_index(labels_a: Sequence[Hashable], labels_b: Sequence[Hashable]) -> float:
    """Agreement of two labellings of the same items corrected for chance (Hubert & Arabie 1985): at most 1.

    (sum_ij C(n_ij,2) - E) / ((sum_i C(a_i,2) + sum_j C(b_j,2)) / 2 - E), E = sum_i C(a_i,2) sum_j C(b_j,2) / C(n,2),
    of the contingency table n_ij with margins a_i, b_j. 1: the same partition, whatever its labels are called; 0: what
    chance gives; negative: worse. ValueError: no items, or unequal numbers of labels.
    """
    table = _contingency(labels_a, labels_b)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1)).sum()) / 2

    rows, columns = pairs(table.sum(1)), pairs(table.sum(0))
    expected = rows * columns / max(pairs(table.sum(keepdims=True)), 1.0)
    maximum = (rows + columns) / 2
    return 1.0 if maximum == expected else (pairs(table) - expected) / (maximum - expected)


def normalized_mutual_information(labels_a: Sequence[Hashable], labels_b: Sequence[Hashable]) -> float:
    """2 I(A; B) / (H(A) + H(B)) in [0, 1], not corrected for chance (Vinh et al. 2010, NMI_sum)."""
    joint = _contingency(labels_a, labels_b) / len(labels_a)

    def entropy(p: np.ndarray) -> float:
        p = p[p > 0]
        return float(-(p * np.log(p)).sum())

    total = entropy(joint.sum(1)) + entropy(joint.sum(0))
    return 2 * (total - entropy(joint)) / total if total > 0 else 1.0


def confusion_matrix(commanded: Sequence[int], recognised: Sequence[int], num_patterns: int) -> np.ndarray:
    """(K, K) counts of episodes: row = pattern commanded, column = pattern recognised, both in 0..K-1."""
    commanded, recognised = np.asarray(commanded, int), np.asarray(recognised, int)
    for labels in (commanded, recognised):
        if labels.size and not 0 <= labels.min() <= labels.max() < num_patterns:
            raise ValueError(f"patterns must be in 0..{num_patterns - 1}")
    matrix = np.zeros((num_patterns, num_patterns), dtype=np.int64)
    np.add.at(matrix, (commanded, recognised), 1)
    return matrix


def p_leak(confusion: np.ndarray) -> float:
    """Leakage in [0, 1] (DLR, Theorem 1): the part of episodes recognised as another pattern than the one commanded.

    Of a `confusion_matrix`, as the mean over the living patterns, those with an episode, so that a frequent one doesn't
    hide a rare one; nan if none lives.
    """
    living = (totals := confusion.sum(1)) > 0
    return float(np.mean(1 - np.diag(confusion)[living] / totals[living])) if living.any() else float("nan")


def leakage(commanded: Sequence[int], recognised: Sequence[int], num_patterns: int) -> float:
    """`p_leak` of episodes (N,) commanded and recognised, patterns in 0..K-1."""
    return p_leak(confusion_matrix(commanded, recognised, num_patterns))


# ------------------------------------------------------------------------------------------------------------ intervals


def wilson_interval(successes: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a success rate (Wilson 1927), within [0, 1]: sound for few trials and for rates of 0 and 1.

    (0, 1) of no trials. ValueError: more successes than trials.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be between 0 and trials, not {successes} of {trials}")
    if not trials:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = (successes + z2 / 2) / (trials + z2)
    half = np.sqrt(z2 * (successes * (trials - successes) / trials + z2 / 4)) / (trials + z2)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def newcombe_interval(successes: tuple[int, int], trials: tuple[int, int]) -> tuple[float, float]:
    """95 % interval of the difference of two success rates, first minus second, by their score intervals (Newcombe 1998, method 10)."""
    (p, q), ((p_low, p_high), (q_low, q_high)) = np.divide(successes, trials), map(wilson_interval, successes, trials)
    return p - q - float(np.hypot(p - p_low, q_high - q)), p - q + float(np.hypot(p_high - p, q - q_low))


def bootstrap_interval(
    values: np.ndarray, statistic: Callable = np.mean, confidence: float = 0.95, resamples: int = 5000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of `statistic(values, axis=1)` over values (n,); nan of none.

    The values must be independent: give per-seed or per-episode numbers, not pairs of trajectories.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    if not len(values):
        return float("nan"), float("nan")
    draws = values[np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))]
    low, high = np.quantile(statistic(draws, axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
