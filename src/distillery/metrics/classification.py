"""Every score of one set of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from distillery.label_sets import LabelSets
from distillery.metrics.calibration import brier, calibration, check_probabilities, log_loss, risk_coverage
from distillery.metrics.counts import accuracy_of, confusion, encode_labels, f1_of, macro_f1_of, mcc, safe_ratio
from distillery.metrics.label_sets import label_set_report


def classification_report(
    gold: ArrayLike, predicted: ArrayLike, probabilities: ArrayLike | None, labels: Sequence[str]
) -> dict[str, Any]:
    """Every score of one set of predictions, as plain floats.

    gold [n] and predicted [n] hold labels; probabilities [n, K] in the order of `labels`, or None (the scores that need
    them are then left out). A score that divides by zero is 0, as in scikit-learn.

    Returns rows, accuracy, balanced_accuracy (mean recall of the labels present), macro_specificity (mean specificity
    of the labels that some row does not have), macro_f1, weighted_f1, mcc, answer_bias (0 best), commonest_answer
    (share of the most frequent prediction); with probabilities log_loss (0 best, nats), brier (0 best, at most 2), ece
    (0 best), risk_coverage_area (0 best); and `labels`: per label precision, recall (sensitivity), f1, specificity,
    support.

    Of label sets it is :func:`distillery.metrics.label_sets.label_set_report`.

    Raises ValueError for empty input, unequal lengths, or a gold label that is not in `labels`.
    """
    if isinstance(labels, LabelSets):
        return label_set_report(gold, predicted, probabilities, labels)
    counts = confusion(gold, predicted, labels)
    rows, true_positives = counts.sum(), np.diagonal(counts).astype(float)
    support, n_predicted = counts.sum(1), counts[:, :-1].sum(0)
    precision, recall = safe_ratio(true_positives, n_predicted, 0.0), safe_ratio(true_positives, support, 0.0)
    specificity = safe_ratio(rows - support - n_predicted + true_positives, rows - support, 0.0)
    f1 = np.nan_to_num(f1_of(counts))
    has_negatives = support < rows
    report = {
        "rows": int(rows),
        "accuracy": float(accuracy_of(counts)),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "macro_specificity": float(specificity[has_negatives].mean()) if has_negatives.any() else 0.0,
        "macro_f1": float(macro_f1_of(counts)),
        "weighted_f1": float((f1 * support).sum() / rows),
        "mcc": mcc(counts),
        "answer_bias": answer_bias(counts),
        "commonest_answer": float(counts.sum(0).max() / rows),
    }
    if probabilities is not None:
        true = encode_labels(gold, labels)
        p = check_probabilities(probabilities, len(true), len(labels))
        report |= {
            "log_loss": log_loss(true, p),
            "brier": brier(true, p),
            "ece": calibration(true, p)["ece"],
            "risk_coverage_area": risk_coverage(true, p)["area"],
        }
    per_label = zip(labels, precision, recall, f1, specificity, support, strict=True)
    report["labels"] = {
        label: {"precision": float(p), "recall": float(r), "f1": float(f), "specificity": float(s), "support": int(n)}
        for label, p, r, f, s, n in per_label
    }
    return report


def answer_bias(counts: np.ndarray) -> float:
    """Total variation distance, in [0, 1], of the shares of predicted labels from the gold ones (0 best).

    counts: confusion counts [K, K + 1]. A model with a shortcut, such as to predict the most frequent label always,
    shows here before it shows in accuracy.
    """
    support = np.append(counts.sum(1), 0)
    return float(np.abs(counts.sum(0) - support).sum() / counts.sum() / 2)
