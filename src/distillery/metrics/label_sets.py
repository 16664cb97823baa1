"""Scores of predicted label sets: of whole sets, of all decisions together, and of each label by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from distillery.label_sets import LabelSets, membership
from distillery.metrics.counts import check_same_rows, safe_ratio

PROBABILITY_FLOOR = float(np.finfo(np.float32).eps)  # that of one outcome of two, as in `calibration`


def check_label_probabilities(p: ArrayLike, rows: int, k: int) -> np.ndarray:
    """`p` in float64. Raises ValueError unless it is [rows, k] with every value in [0, 1]."""
    p = np.asarray(p, dtype=np.float64)
    if p.shape != (rows, k):
        raise ValueError(f"probabilities must have the shape ({rows}, {k}), not {p.shape}")
    if not np.isfinite(p).all() or (p < 0).any() or (p > 1).any():
        raise ValueError("each probability of a label must be finite and from 0 to 1")
    return p


def two_outcomes(p: ArrayLike) -> np.ndarray:
    """Probabilities of labels [n, K] as distributions over `no` and `yes`: [n * K, 2], row after row."""
    p = np.asarray(p, dtype=np.float64).reshape(-1)
    return np.stack([1 - p, p], axis=-1)


def encode_gold_sets(gold: ArrayLike, labels: LabelSets) -> np.ndarray:
    """Which labels the gold sets [n] hold: [n, K] bool. Raises ValueError for empty input and for an unknown label."""
    gold = np.asarray(gold, dtype=object)
    if gold.ndim != 1 or not gold.size:
        raise ValueError(f"gold label sets must be one non-empty row, not of shape {gold.shape}")
    members = membership(gold, labels)
    known = {value: labels.text(value) for value in set(gold)}
    unknown = [value for value, text in known.items() if text != value]
    if unknown:
        raise ValueError(f"gold label set {unknown[0]!r} is not made of {list(labels)}")
    return members


def set_counts(gold: np.ndarray, predictions: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """What all scores of sets are made of, a line a row: [..., rows, 3 K + 2], to be added up over rows.

    gold [rows, K], predictions [..., rows, K]: which labels the sets hold. exact [..., rows]: which sets are equal.
    The columns: right predictions of each label, its predictions, its gold rows; equal sets, rows.
    """
    gold = np.broadcast_to(gold, predictions.shape)
    parts = [gold & predictions, predictions, gold, exact[..., None], np.ones((*exact.shape, 1))]
    return np.concatenate([part.astype(np.float64) for part in parts], axis=-1)


def _parts(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right predictions, predictions and gold rows of each label, [..., K] each, of added-up `set_counts`."""
    k = (counts.shape[-1] - 2) // 3
    return counts[..., :k], counts[..., k : 2 * k], counts[..., 2 * k : 3 * k]


def exact_of(counts: np.ndarray) -> np.ndarray:
    """Share of rows with exactly the gold set, in [0, 1] (subset accuracy), [..., F] -> [...]."""
    return counts[..., -2] / counts[..., -1]


def micro_f1_of(counts: np.ndarray) -> np.ndarray:
    """F1 in [0, 1] of all decisions on labels together, [..., F] -> [...]; 0 where no label is held or predicted.

    counts: `set_counts`, added up over rows, as for the scores below.
    """
    right, predicted, support = (part.sum(-1) for part in _parts(counts))
    return safe_ratio(2 * right, predicted + support, 0.0)


def label_f1_of(counts: np.ndarray) -> np.ndarray:
    """F1 of each label in [0, 1], [..., F] -> [..., K]; NaN for a label that no row holds and none is predicted."""
    right, predicted, support = _parts(counts)
    return safe_ratio(2 * right, predicted + support, np.nan)


def set_macro_f1_of(counts: np.ndarray) -> np.ndarray:
    """Unweighted mean of F1 over the labels held or predicted, [..., F] -> [...]; 0 where there are none."""
    f1 = label_f1_of(counts)
    present = ~np.isnan(f1)
    return safe_ratio(np.nan_to_num(f1).sum(-1), present.sum(-1), 0.0)


def hamming_loss_of(counts: np.ndarray) -> np.ndarray:
    """Share of wrong decisions on single labels, in [0, 1] (0 best), [..., F] -> [...]."""
    right, predicted, support = _parts(counts)
    return (predicted + support - 2 * right).sum(-1) / (counts[..., -1] * right.shape[-1])


SET_SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": exact_of,
    "micro_f1": micro_f1_of,
    "macro_f1": set_macro_f1_of,
    "hamming_loss": hamming_loss_of,
}


def average_precision(gold: np.ndarray, p: np.ndarray) -> float:
    """Mean precision at the rows that hold a label, those of the highest probability first, in [0, 1].

    gold [n] bool; p [n]. Rows of one probability count together. 0 without a row that holds it, as in scikit-learn.
    """
    if not gold.any():
        return 0.0
    levels, level = np.unique(-p, return_inverse=True)
    held = np.bincount(level, gold, len(levels))
    precision = np.cumsum(held) / np.cumsum(np.bincount(level, minlength=len(levels)))
    return float((held * precision).sum() / gold.sum())


def label_set_report(
    gold: ArrayLike, predicted: ArrayLike, probabilities: ArrayLike | None, labels: LabelSets
) -> dict[str, Any]:
    """Every score of one set of predictions, as plain floats; a score that divides by zero is 0, as in scikit-learn.

    gold [n] and predicted [n] hold label sets; probabilities [n, K] of each label by itself, or None (the scores that
    need them are then left out).

    Returns rows, accuracy (share of rows with exactly the gold set), micro_f1, micro_precision, micro_recall, macro_f1,
    weighted_f1, hamming_loss (0 best), labels_per_row (predicted ones), commonest_answer (share of the most frequent
    predicted set); with probabilities log_loss (0 best, nats, mean over rows and labels), brier (0 best, at most 1),
    macro_average_precision; and `labels`: per label precision, recall (sensitivity), f1, specificity, support, and
    average_precision.

    Raises ValueError for empty input, unequal lengths, a gold label that is not in `labels`, or values that are no
    probabilities.
    """
    true = encode_gold_sets(gold, labels)
    predictions = np.asarray(predicted, dtype=object)
    check_same_rows(predictions, len(true))
    members = membership(predictions, labels)
    exact = predictions == np.asarray(gold, dtype=object)
    counts = set_counts(true, members, exact).sum(0)
    right, n_predicted, support = _parts(counts)
    precision, recall = safe_ratio(right, n_predicted, 0.0), safe_ratio(right, support, 0.0)
    specificity = safe_ratio(len(true) - support - n_predicted + right, len(true) - support, 0.0)
    f1 = np.nan_to_num(label_f1_of(counts))
    report: dict[str, Any] = {"rows": len(true)} | {name: float(score(counts)) for name, score in SET_SCORES.items()}
    report |= {
        "micro_precision": float(safe_ratio(right.sum(), n_predicted.sum(), 0.0)),
        "micro_recall": float(safe_ratio(right.sum(), support.sum(), 0.0)),
        "weighted_f1": float(safe_ratio((f1 * support).sum(), support.sum(), 0.0)),
        "labels_per_row": float(members.sum(-1).mean()),
        "commonest_answer": float(np.unique(predictions.astype(str), return_counts=True)[1].max() / len(true)),
    }
    per_label = {"precision": precision, "recall": recall, "f1": f1, "specificity": specificity}
    if probabilities is not None:
        p = check_label_probabilities(probabilities, len(true), len(labels))
        per_label["average_precision"] = np.array([average_precision(true[:, k], p[:, k]) for k in range(len(labels))])
        held = np.where(true, p, 1 - p)
        report |= {
            "log_loss": float(-np.log(np.maximum(held, PROBABILITY_FLOOR)).mean()),
            "brier": float(np.square(1 - held).mean()),
            "macro_average_precision": float(per_label["average_precision"][support > 0].mean())
            if support.any()
            else 0.0,
        }
    report["labels"] = {
        label: {name: float(values[k]) for name, values in per_label.items()} | {"support": int(support[k])}
        for k, label in enumerate(labels)
    }
    return report
