"""Scores of probabilities: log loss, Brier, calibration error, risk and coverage, temperature scaling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # not scipy.stats, which is slow to import: every stage would pay for it

from distillery.label_sets import LabelSets
from distillery.metrics.counts import safe_ratio
from distillery.metrics.label_sets import two_outcomes

# Probabilities are stored as float32, which cannot separate anything smaller from zero.
PROBABILITY_FLOOR = float(np.finfo(np.float32).eps)


def check_probabilities(p: ArrayLike, rows: int, k: int) -> np.ndarray:
    """`p` in float64, normalised. Raises ValueError unless it is [rows, k] and each row is a distribution."""
    p = np.asarray(p, dtype=np.float64)
    if p.shape != (rows, k):
        raise ValueError(f"probabilities must have the shape ({rows}, {k}), not {p.shape}")
    if not np.isfinite(p).all() or (p < 0).any() or np.abs(p.sum(1) - 1).max() > 1e-2:
        raise ValueError("each row of probabilities must be finite, >= 0 and add up to 1")
    return p / p.sum(1, keepdims=True)  # float32 sums are off by a few millionths


def log_loss(true: np.ndarray, p: np.ndarray) -> float:
    """Mean of -ln p[true], in nats (0 best), with p floored at `PROBABILITY_FLOOR`.

    true [n]: positions of the gold labels; p [n, K].
    """
    return float(-np.log(np.maximum(p[np.arange(len(true)), true], PROBABILITY_FLOOR)).mean())


def brier(true: np.ndarray, p: np.ndarray) -> float:
    """Mean squared distance of p [n, K] from the one-hot gold label, in [0, 2] (0 best). Brier 1950."""
    return float(np.square(p - np.eye(p.shape[1])[true]).sum(1).mean())


def calibration(true: np.ndarray, p: np.ndarray, bins: int = 15) -> dict[str, Any]:
    """Expected calibration error of the likeliest label over bins of equal width (Guo et al. 2017; 0 best).

    true [n] are positions, p [n, K]. Returns ece, and per bin: edges [bins + 1], confidence, accuracy (NaN where the
    bin is empty), rows. A confidence on an edge belongs to the bin below it.
    """
    confidence, correct = p.max(1), p.argmax(1) == true
    edges = np.linspace(0, 1, bins + 1)
    bin_of_row = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    rows = np.bincount(bin_of_row, minlength=bins)
    mean_confidence = safe_ratio(np.bincount(bin_of_row, confidence, bins), rows, np.nan)
    accuracy = safe_ratio(np.bincount(bin_of_row, correct, bins), rows, np.nan)
    ece = np.nansum(rows * np.abs(accuracy - mean_confidence)) / len(true)
    return {"ece": float(ece), "edges": edges, "confidence": mean_confidence, "accuracy": accuracy, "rows": rows}


def risk_coverage(true: np.ndarray, p: np.ndarray) -> dict[str, Any]:
    """Error rate among the most confident rows, at every share of rows that are answered (Geifman, El-Yaniv 2017).

    true [n] are positions, p [n, K]. Returns coverage [n] (from 1/n to 1), risk [n], and area, the mean risk (0 best).
    Rows of equal confidence share their errors evenly, so that the order of rows does not matter.
    """
    confidence, errors = p.max(1), (p.argmax(1) != true).astype(float)
    _, tie = np.unique(-confidence, return_inverse=True)
    shared_errors = (np.bincount(tie, errors) / np.bincount(tie))[np.sort(tie)]
    answered = np.arange(1, len(true) + 1)
    risk = np.cumsum(shared_errors) / answered
    return {"coverage": answered / len(true), "risk": risk, "area": float(risk.mean())}


def kl_divergence(teacher: ArrayLike, student: ArrayLike, labels: Sequence[str] = ()) -> np.ndarray:
    """KL(teacher || student) of each row in nats, [n, K], [n, K] -> [n] (0 best); the student is floored.

    Where `labels` are label sets it is the mean over labels of the divergence of `yes` and `no`.

    Raises ValueError for unequal shapes or rows that are no distributions.
    """
    p, q = np.asarray(teacher), np.asarray(student)
    if p.ndim != 2 or p.shape != q.shape:
        raise ValueError(f"both must have one shape [n, K], not {p.shape} and {q.shape}")
    if isinstance(labels, LabelSets):
        return kl_divergence(two_outcomes(p), two_outcomes(q)).reshape(p.shape).mean(1)
    p, q = check_probabilities(p, *p.shape), check_probabilities(q, *q.shape)
    q = np.maximum(q, PROBABILITY_FLOOR)
    return special.rel_entr(p, q / q.sum(1, keepdims=True)).sum(1)


def apply_temperature(p: ArrayLike, temperature: float) -> np.ndarray:
    """Probabilities [n, K] proportional to p^(1/temperature), [n, K]: flatter above 1, more peaked below 1."""
    p = np.asarray(p, dtype=np.float64)
    return special.softmax(np.log(np.maximum(p, PROBABILITY_FLOOR)) / temperature, axis=-1)


def fit_temperature(true: np.ndarray, p: ArrayLike) -> float:
    """The temperature in [1/20, 20] at which :func:`apply_temperature` gives the smallest log loss (Guo et al. 2017).

    true [n] are positions, p [n, K]. Fit it on validation rows only: on the rows of a score it makes that score better.
    """
    from scipy import optimize  # only needed here

    p = np.asarray(p, dtype=np.float64)
    bounds = (-np.log(20), np.log(20))
    return float(
        np.exp(optimize.minimize_scalar(lambda t: log_loss(true, apply_temperature(p, np.exp(t))), bounds=bounds).x)
    )


def selective_threshold(true: np.ndarray, p: np.ndarray, accuracy: float, min_rows: int = 10) -> float | None:
    """The lowest confidence at which the rows at or above it are right as often as `accuracy` (Geifman, El-Yaniv 2017).

    true [n] are positions, p [n, K], accuracy in (0, 1]. None where fewer than `min_rows` rows reach it. It is an
    estimate from these rows, no guarantee: take rows that neither trained the model nor score it.
    """
    confidence, correct = p.max(1), p.argmax(1) == true
    levels, counts = np.unique(-confidence, return_counts=True)  # the most confident first
    answered = np.cumsum(counts)
    right = np.cumsum(correct[np.argsort(-confidence, kind="stable")])[answered - 1]
    reached = np.flatnonzero((right / answered >= accuracy) & (answered >= min_rows))
    return float(-levels[reached[-1]]) if len(reached) else None


def conformal_threshold(true: np.ndarray, p: np.ndarray, coverage: float) -> float:
    """The probability from which a label belongs to the prediction set of a row, in [0, 1].

    true [n] are positions, p [n, K], coverage in (0, 1). Sets of the labels at or above it hold the gold label of a new
    row of the same distribution with at least this probability (split conformal: Sadinle, Lei, Wasserman 2019). It is
    0, so that a set holds all labels, where n is too small for `coverage`.
    """
    right = np.sort(p[np.arange(len(true)), true])
    excluded = len(true) - int(np.ceil((len(true) + 1) * coverage - 1e-9))  # rows whose gold label may be outside
    return float(right[excluded]) if excluded >= 0 else 0.0
