"""Label codes, confusion counts, and the scores that follow from counts alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def encode_labels(values: ArrayLike, labels: Sequence[str]) -> np.ndarray:
    """Positions of `values` in `labels`, same shape; `len(labels)` for a value that is none of them."""
    index = {label: i for i, label in enumerate(labels)}
    values = np.asarray(values, dtype=object)
    return np.array([index.get(v, len(labels)) for v in values.ravel()], dtype=np.int64).reshape(values.shape)


def encode_gold(gold: ArrayLike, labels: Sequence[str]) -> np.ndarray:
    """Positions of the gold labels [n] in `labels`. Raises ValueError for empty input and for an unknown label."""
    codes = encode_labels(gold, labels)
    if codes.ndim != 1 or not codes.size:
        raise ValueError(f"gold labels must be one non-empty row, not of shape {codes.shape}")
    unknown = np.asarray(gold, dtype=object)[codes == len(labels)]
    if len(unknown):
        raise ValueError(f"gold label {unknown[0]!r} is not among {labels}")
    return codes


def check_same_rows(codes: np.ndarray, rows: int) -> np.ndarray:
    """`codes` [..., rows] of predictions. Raises ValueError when there are more or fewer than `rows`."""
    if codes.shape[-1] != rows:
        raise ValueError(f"{codes.shape[-1]} predictions for {rows} gold labels")
    return codes


def confusion(gold: ArrayLike, predicted: ArrayLike, labels: Sequence[str]) -> np.ndarray:
    """Counts [K, K + 1]: gold label by predicted label; the last column counts predictions that are no label.

    Raises ValueError for empty input, unequal lengths, or a gold label that is not in `labels`.
    """
    k, true = len(labels), encode_gold(gold, labels)
    predictions = check_same_rows(encode_labels(predicted, labels), len(true))
    return np.bincount(true * (k + 1) + predictions, minlength=k * (k + 1)).reshape(k, k + 1)


def safe_ratio(numerator: np.ndarray, denominator: np.ndarray, default: float) -> np.ndarray:
    """`numerator / denominator`, and `default` where the denominator is 0."""
    ratio = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), default)
    return np.divide(numerator, denominator, out=ratio, where=denominator > 0)


def accuracy_of(counts: np.ndarray) -> np.ndarray:
    """Accuracy in [0, 1] of confusion counts [..., K, K + 1] -> [...]."""
    return np.trace(counts, axis1=-2, axis2=-1) / counts.sum((-2, -1))


def f1_of(counts: np.ndarray) -> np.ndarray:
    """F1 of each label in [0, 1], [..., K, K + 1] -> [..., K]; NaN for a label neither present nor predicted."""
    true_positives = np.diagonal(counts, axis1=-2, axis2=-1).astype(float)
    return safe_ratio(2 * true_positives, counts[..., :-1].sum(-2) + counts.sum(-1), np.nan)


def macro_f1_of(counts: np.ndarray) -> np.ndarray:
    """Unweighted mean of F1 over the labels present or predicted (as scikit-learn does), [..., K, K + 1] -> [...]."""
    return np.nanmean(f1_of(counts), axis=-1)


def mcc(counts: np.ndarray) -> float:
    """Matthews correlation of confusion counts [K, K + 1], in [-1, 1]; 0 when either side has one label only.

    The multi-class form of Gorodkin 2004.
    """
    support, n_predicted, rows = np.append(counts.sum(1), 0), counts.sum(0), counts.sum()
    variances = float(rows**2 - (support**2).sum()) * float(rows**2 - (n_predicted**2).sum())
    covariance = np.trace(counts) * rows - (support * n_predicted).sum()
    return float(covariance / np.sqrt(variances)) if variances > 0 else 0.0
