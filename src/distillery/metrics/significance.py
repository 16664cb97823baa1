"""Intervals and tests: clustered bootstrap, paired differences, permutation test, Holm correction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # not scipy.stats, which is slow to import: every stage would pay for it

from distillery.label_sets import LabelSets, membership
from distillery.metrics.counts import accuracy_of, check_same_rows, confusion, encode_gold, encode_labels, macro_f1_of
from distillery.metrics.label_sets import SET_SCORES, encode_gold_sets, set_counts

BLOCK = 4_000_000  # draws held in memory at once: 32 MB


def _encode_groups(groups: ArrayLike, rows: int) -> np.ndarray:
    """Number of the group of each row [rows]. Raises ValueError unless there is one group per row."""
    groups = np.asarray(groups, dtype=object)
    if groups.shape != (rows,):
        raise ValueError(f"{rows} rows need one group each, not an array of shape {groups.shape}")
    return np.unique(groups.astype(str), return_inverse=True)[1]


def _draw(units: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of `units` is drawn in each of `n` resamples with replacement -> [n, units]."""
    drawn = rng.integers(0, units, (n, units)) + np.arange(n)[:, None] * units
    return np.bincount(drawn.ravel(), minlength=n * units).reshape(n, units).astype(np.float64)


def _resample(per_group: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Sums of [G, F] over groups drawn with replacement -> [n, F]; in blocks of `BLOCK` draws."""
    units = len(per_group)
    block = max(1, BLOCK // units)
    return np.concatenate([_draw(units, min(block, n - i), rng) @ per_group for i in range(0, n, block)])


def interval(samples: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval (low, high) of resampled values [n]."""
    low, high = np.quantile(np.asarray(samples), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def cluster_bootstrap(values: ArrayLike, groups: ArrayLike, n: int = 2000, seed: int = 0) -> np.ndarray:
    """Means of `values` under `n` resamples of whole groups (and of seeds, when there are several) -> [n].

    values: [rows], or [seeds, rows], one per row and seed; groups: [rows]. Near-duplicates are one observation, not
    several, so each resample draws groups; then it draws as many seeds as there are and averages their means.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    group = _encode_groups(groups, values.shape[1])
    sums = np.stack([np.bincount(group, row) for row in [np.ones(len(group)), *values]], axis=1)
    drawn = _resample(sums, n, np.random.default_rng([seed, 0]))
    return _over_seeds(drawn[:, 1:] / drawn[:, :1], seed, stream=1)


def _over_seeds(samples: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Mean of [n, seeds] over seeds drawn with replacement -> [n]: other seeds would give other scores.

    The variance of a resample of S values is (S - 1)/S of the variance of S new ones, half for two seeds. So the
    deviations from the mean of the seeds are scaled up by sqrt(S / (S - 1)).
    """
    n, seeds = samples.shape
    if seeds == 1:
        return samples[:, 0]
    drawn = (samples * _draw(seeds, n, np.random.default_rng([seed, stream]))).sum(1) / seeds
    mean = samples.mean(1)
    return mean + (drawn - mean) * np.sqrt(seeds / (seeds - 1))


SCORES = {"accuracy": accuracy_of, "macro_f1": macro_f1_of}


def scores_of(labels: Sequence[str]) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """The scores that have intervals, by name: `SCORES`; of label sets also micro_f1 and hamming_loss (0 best)."""
    return SET_SCORES if isinstance(labels, LabelSets) else SCORES


def bootstrap_scores(
    gold: ArrayLike,
    predicted: ArrayLike,
    labels: Sequence[str],
    groups: ArrayLike,
    n: int = 2000,
    seed: int = 0,
    stream: int = 1,
) -> dict[str, np.ndarray]:
    """The :func:`scores_of` `labels` under `n` resamples of whole groups and of seeds -> {"accuracy": [n], ...}.

    gold [rows]; predicted [rows] or [seeds, rows]; groups [rows]. The drawn groups depend on `seed` alone, so the
    resamples of two models with the same `seed` are paired; the drawn runs depend on `stream` too.
    """
    if isinstance(labels, LabelSets):
        return _bootstrap_sets(gold, predicted, labels, groups, n, seed, stream)
    k, true = len(labels), encode_gold(gold, labels)
    codes = np.atleast_2d(check_same_rows(encode_labels(predicted, labels), len(true)))
    group = _encode_groups(groups, len(true))
    cells = k * (k + 1)
    # Counts are additive: each resample is a weighted sum of the groups' confusion counts, one matrix product for all.
    cell = (group * len(codes) + np.arange(len(codes))[:, None]) * cells + true * (k + 1) + codes
    size = (group.max() + 1) * len(codes) * cells
    per_group = np.bincount(cell.ravel(), minlength=size).reshape(group.max() + 1, -1).astype(np.float64)
    drawn = _resample(per_group, n, np.random.default_rng([seed, 0])).reshape(n, len(codes), k, k + 1)
    return {name: _over_seeds(score(drawn), seed, stream).clip(0, 1) for name, score in SCORES.items()}


def _counts_of_sets(gold: ArrayLike, predicted: ArrayLike, labels: LabelSets) -> np.ndarray:
    """:func:`set_counts` of predicted [rows] or [seeds, rows]: [seeds, rows, F]."""
    predicted = np.atleast_2d(np.asarray(predicted, dtype=object))
    true = encode_gold_sets(gold, labels)
    exact = check_same_rows(predicted, len(true)) == np.asarray(gold, dtype=object)
    return set_counts(true, membership(predicted, labels), exact)


def _bootstrap_sets(
    gold: ArrayLike, predicted: ArrayLike, labels: LabelSets, groups: ArrayLike, n: int, seed: int, stream: int
) -> dict[str, np.ndarray]:
    """As :func:`bootstrap_scores`, of label sets."""
    counts = _counts_of_sets(gold, predicted, labels).swapaxes(0, 1)
    group = _encode_groups(groups, len(counts))
    per_group = np.zeros((group.max() + 1, *counts.shape[1:]))
    np.add.at(per_group, group, counts)
    drawn = _resample(per_group.reshape(len(per_group), -1), n, np.random.default_rng([seed, 0]))
    drawn = drawn.reshape(n, *counts.shape[1:])
    return {name: _over_seeds(score(drawn), seed, stream).clip(0, 1) for name, score in SET_SCORES.items()}


def mean_scores(gold: ArrayLike, predicted: ArrayLike, labels: Sequence[str]) -> dict[str, float]:
    """The :func:`scores_of` `labels` of predicted [rows] or [seeds, rows], averaged over the seeds."""
    if isinstance(labels, LabelSets):
        counts = _counts_of_sets(gold, predicted, labels).sum(1)
        return {name: float(score(counts).mean()) for name, score in SET_SCORES.items()}
    predicted = np.atleast_2d(np.asarray(predicted, dtype=object))
    counts = np.stack([confusion(gold, row, labels) for row in predicted])
    return {name: float(score(counts).mean()) for name, score in SCORES.items()}


def paired_difference(
    gold: ArrayLike,
    predicted_a: ArrayLike,
    predicted_b: ArrayLike,
    labels: Sequence[str],
    groups: ArrayLike,
    n: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """A minus B on the same rows: the :func:`scores_of` `labels` by name, each with mean, low, high, p, detectable.

    gold [rows]; predicted_a, predicted_b [rows] or [seeds, rows] (their numbers of seeds may differ); groups [rows].
    Each resample draws the same groups for both models and, for each of them, its seeds. [low, high] is the percentile
    interval. p is two-sided, from the same resamples, so p < 1 - confidence just when the interval excludes 0 (up to
    the + 1 that keeps p above 0). detectable is the :func:`smallest_detectable_difference`.

    Few seeds understate the spread between runs: with one seed, the interval holds for these two trained models only.
    """
    a = bootstrap_scores(gold, predicted_a, labels, groups, n, seed, stream=1)
    b = bootstrap_scores(gold, predicted_b, labels, groups, n, seed, stream=2)
    mean_a, mean_b = mean_scores(gold, predicted_a, labels), mean_scores(gold, predicted_b, labels)
    result = {}
    for name in scores_of(labels):
        difference = a[name] - b[name]
        low, high = interval(difference, confidence)
        tail = min((difference <= 0).sum(), (difference >= 0).sum())
        result[name] = {
            "mean": mean_a[name] - mean_b[name],
            "low": low,
            "high": high,
            "p": float(min(1.0, 2 * (tail + 1) / (n + 1))),
            "detectable": smallest_detectable_difference(float(difference.std(ddof=1)), confidence),
        }
    return result


def smallest_detectable_difference(standard_error: float, confidence: float = 0.95, power: float = 0.8) -> float:
    """The true difference that a two-sided test at `confidence` detects with probability `power`."""
    return float((special.ndtri((1 + confidence) / 2) + special.ndtri(power)) * standard_error)


def permutation_test(
    correct_a: ArrayLike, correct_b: ArrayLike, groups: ArrayLike, n: int = 2000, seed: int = 0
) -> float:
    """Two-sided p of the hypothesis that two models are equally good on the same rows: random swaps of their answers.

    correct_a, correct_b: booleans [rows] or [seeds, rows], averaged over seeds; groups [rows], swapped as a whole.
    For single rows and single runs it is the Monte Carlo form of the exact McNemar test. It holds for these runs only.
    Raises ValueError for unequal numbers of rows.
    """
    a, b = (np.atleast_2d(np.asarray(correct, dtype=np.float64)).mean(0) for correct in (correct_a, correct_b))
    if a.shape != b.shape:
        raise ValueError(f"both must be of the same rows, not {a.shape[0]} and {b.shape[0]}")
    sums = np.bincount(_encode_groups(groups, len(a)), a - b)
    sums = sums[np.abs(sums) > 1e-12]
    if not len(sums):
        return 1.0
    rng, observed = np.random.default_rng([seed, 3]), abs(sums.sum())
    block = max(1, BLOCK // len(sums))
    signs = (rng.integers(0, 2, (min(block, n - i), len(sums))) * 2.0 - 1.0 for i in range(0, n, block))
    as_large = sum(int((np.abs(drawn @ sums) >= observed - 1e-9).sum()) for drawn in signs)
    return (as_large + 1) / (n + 1)


def holm(p_values: ArrayLike) -> np.ndarray:
    """p values [m] adjusted for m tests: controls the probability of any false positive. Holm 1979."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted
