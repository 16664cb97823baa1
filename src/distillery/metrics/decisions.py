"""From probabilities to predictions: the likeliest label, or every label that reaches its threshold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from distillery.label_sets import LabelSets, membership, sets_of

DEFAULT_THRESHOLD = 0.5  # of a label for which no rows chose one: it is then likelier held than not


def decide(p: np.ndarray, labels: Sequence[str], thresholds: ArrayLike | None = None) -> np.ndarray:
    """The predictions for probabilities `p` [..., K], as values of `labels`: [...] of text.

    The likeliest label; of label sets those labels whose probability is at least their threshold, `thresholds` [K] or
    0.5 each. Thresholds of other labels are ignored.
    """
    if isinstance(labels, LabelSets):
        return sets_of(np.asarray(p) >= (DEFAULT_THRESHOLD if thresholds is None else np.asarray(thresholds)), labels)
    return np.array(labels, dtype=object)[np.asarray(p).argmax(-1)]


def confidence(p: np.ndarray, predictions: ArrayLike, labels: Sequence[str]) -> np.ndarray:
    """Probability of each of `predictions` [...] by `p` [..., K], in [0, 1]; that of the likeliest label.

    Of a label set it is the product over labels of the probability that each is held, or not held, as predicted: that
    of exactly this set if labels are independent.
    """
    p = np.asarray(p)
    if not isinstance(labels, LabelSets):
        return p.max(-1)
    return np.where(membership(predictions, labels), p, 1 - p).prod(-1)


def choose_thresholds(gold: ArrayLike, p: ArrayLike, labels: LabelSets) -> np.ndarray:
    """For each label the probability from which to predict it, with the highest F1 on these rows: [K] in (0, 1).

    gold [n] holds label sets, p [n, K] the probabilities. A threshold lies in the middle between two probabilities of
    these rows; of equally good ones it is the nearest to 0.5. It is 0.5 for a label that none of the rows holds. Take
    rows that neither train nor score the model: on the rows of a score it makes that score better.
    Source: Lipton, Elkan and Naryanaswamy 2014, "Optimal thresholding of classifiers to maximize F1 measure".
    """
    members, p = membership(gold, labels), np.asarray(p, dtype=np.float64)
    return np.array([_best_threshold(members[:, k], p[:, k]) for k in range(len(labels))])


def _best_threshold(held: np.ndarray, p: np.ndarray) -> float:
    """See :func:`choose_thresholds`; held [n] bool and p [n] of one label."""
    if not held.any():
        return DEFAULT_THRESHOLD
    levels, level = np.unique(p, return_inverse=True)
    # predicting from level i on; the last one predicts nothing, and is never better
    right = np.cumsum(np.bincount(level, held, len(levels))[::-1])[::-1]
    predicted = np.cumsum(np.bincount(level, minlength=len(levels))[::-1])[::-1]
    f1 = 2 * right / (predicted + held.sum())
    middles = (levels + np.concatenate([[0.0], levels[:-1]])) / 2
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(middles[best[np.argmin(np.abs(middles[best] - DEFAULT_THRESHOLD))]])
