"""Scores of probabilities: log loss, Brier, calibration error, risk and coverage, temperature scaling."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # not scipy.stats, which is slow to import: every stage would pay for it

from distillery.metrics.counts import safe_ratio

# Probabilities are stored as float32: nothing below its resolution can be told from zero.
PROBABILITY_FLOOR = float(np.finfo(np.float32).eps)


def check_probabilities(p: ArrayLike, rows: int, k: int) -> np.ndarray:
    p = np.asarray(p, dtype=np.float64)
    if p.shape != (rows, k):
        raise ValueError(f"probabilities must have the shape ({rows}, {k}), not {p.shape}")
    if not np.isfinite(p).all() or (p < 0).any() or np.abs(p.sum(1) - 1).max() > 1e-2:
        raise ValueError("each row of probabilities must be finite, >= 0 and add up to 1")
    return p / p.sum(1, keepdims=True)  # float32 sums are off by a few millionths


def log_loss(true: np.ndarray, p: np.ndarray) -> float:
    """Mean of -ln p[true label], in nats (0 best); true [n] are positions, p [n, K]; p is floored at `FLOOR`."""
    return float(-np.log(np.maximum(p[np.arange(len(true)), true], PROBABILITY_FLOOR)).mean())


def brier(true: np.ndarray, p: np.ndarray) -> float:
    """Mean squared distance of p [n, K] from the one-hot true label, in [0, 2] (0 best). Brier 1950."""
    return float(np.square(p - np.eye(p.shape[1])[true]).sum(1).mean())


def calibration(true: np.ndarray, p: np.ndarray, bins: int = 15) -> dict[str, Any]:
    """Expected calibration error of the top label over bins of equal width (Guo et al. 2017; 0 best).

    true [n] are positions, p [n, K]. Returns ece, and per bin: edges [bins + 1], confidence, accuracy (NaN where the
    bin is empty), rows. A confidence on an edge belongs to the bin below it.
    """
    confidence, right = p.max(1), p.argmax(1) == true
    edges = np.linspace(0, 1, bins + 1)
    at = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    rows = np.bincount(at, minlength=bins)
    mean_confidence = safe_ratio(np.bincount(at, confidence, bins), rows, np.nan)
    accuracy = safe_ratio(np.bincount(at, right, bins), rows, np.nan)
    ece = np.nansum(rows * np.abs(accuracy - mean_confidence)) / len(true)
    return {"ece": float(ece), "edges": edges, "confidence": mean_confidence, "accuracy": accuracy, "rows": rows}


def risk_coverage(true: np.ndarray, p: np.ndarray) -> dict[str, Any]:
    """Error rate among the rows answered when only the most confident are (Geifman and El-Yaniv 2017).

    true [n] are positions, p [n, K]. Returns coverage [n] (from 1/n to 1), risk [n], and area, the mean risk (0 best).
    Rows of equal confidence share their errors evenly, so that the order of rows does not matter.
    """
    confidence, wrong = p.max(1), (p.argmax(1) != true).astype(float)
    _, block = np.unique(-confidence, return_inverse=True)
    shared = (np.bincount(block, wrong) / np.bincount(block))[np.sort(block)]
    answered = np.arange(1, len(true) + 1)
    risk = np.cumsum(shared) / answered
    return {"coverage": answered / len(true), "risk": risk, "area": float(risk.mean())}


def kl_divergence(teacher: ArrayLike, student: ArrayLike) -> np.ndarray:
    """KL(teacher || student) of each row in nats, [n, K], [n, K] -> [n] (0 best); the student is floored at `FLOOR`.

    Raises ValueError for unequal shapes or rows that are no distributions.
    """
    p, q = np.asarray(teacher), np.asarray(student)
    if p.ndim != 2 or p.shape != q.shape:
        raise ValueError(f"both must have one shape [n, K], not {p.shape} and {q.shape}")
    p, q = check_probabilities(p, *p.shape), check_probabilities(q, *q.shape)
    q = np.maximum(q, PROBABILITY_FLOOR)
    return special.rel_entr(p, q / q.sum(1, keepdims=True)).sum(1)


def apply_temperature(p: ArrayLike, temperature: float) -> np.ndarray:
    """Rows of probabilities [n, K] proportional to p^(1/temperature): above 1 less sure, below 1 surer; [n, K]."""
    p = np.asarray(p, dtype=np.float64)
    return special.softmax(np.log(np.maximum(p, PROBABILITY_FLOOR)) / temperature, axis=-1)


def fit_temperature(true: np.ndarray, p: ArrayLike) -> float:
    """The temperature, within 1/20 and 20, at which `tempered(p)` has the smallest log loss (Guo et al. 2017).

    true [n] are positions, p [n, K]. To be fitted on validation rows only: on rows that are scored it flatters.
    """
    from scipy import optimize  # only needed here

    p = np.asarray(p, dtype=np.float64)
    bounds = (-np.log(20), np.log(20))
    return float(
        np.exp(optimize.minimize_scalar(lambda t: log_loss(true, apply_temperature(p, np.exp(t))), bounds=bounds).x)
    )
