"""Which labels are probably wrong, by probabilities from a model that did not learn from them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def suspect_labels(labels: ArrayLike, probabilities: ArrayLike) -> np.ndarray:
    """Which of `labels` are probably wrong [n].

    labels: index of each label [n]. probabilities: [n, K], out of sample. A label counts for a row when its probability
    reaches the mean of those that its own rows give it. A row is suspect when the most probable label that counts is
    another than its own, which is not the most probable one either.

    Source: Northcutt, Jiang and Chuang 2021, "Confident learning: estimating uncertainty in dataset labels", equations
    1 and 2: the off-diagonal entries of the confident joint.
    """
    labels, p = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    thresholds = np.array([p[labels == k, k].mean() if (labels == k).any() else np.inf for k in range(p.shape[1])])
    confident = np.where(p >= thresholds, p, -np.inf)
    counts = np.isfinite(confident).any(axis=1)
    return counts & (confident.argmax(axis=1) != labels) & (p.argmax(axis=1) != labels)


def label_margin(labels: ArrayLike, probabilities: ArrayLike) -> np.ndarray:
    """Probability of the given label minus the highest of another one, in [-1, 1] [n]; the lowest is the worst."""
    labels, p = np.asarray(labels), np.array(probabilities, dtype=np.float64)
    rows = np.arange(len(p))
    own = p[rows, labels]
    p[rows, labels] = -np.inf
    return own - p.max(axis=1)


def prediction_margin(probabilities: ArrayLike) -> np.ndarray:
    """Highest probability minus the second highest, in [0, 1] [n]; 0 is least sure.

    Source: Scheffer, Decomain and Wrobel 2001, "Active hidden Markov models for information extraction".
    """
    p = np.sort(np.asarray(probabilities, dtype=np.float64), axis=1)
    return p[:, -1] - p[:, -2]


def entropy(probabilities: ArrayLike) -> np.ndarray:
    """Entropy of each row of probabilities [n], in nats, from 0 to log K; the highest is least sure."""
    p = np.asarray(probabilities, dtype=np.float64)
    return -(p * np.log(p, out=np.zeros_like(p), where=p > 0)).sum(axis=1)


def mutual_information(probabilities: ArrayLike) -> float:
    """Mutual information of row and prediction in nats: the entropy of the mean prediction less the mean entropy.

    probabilities: [n, K]. From 0, one prediction for every row, to log K. Source: Sorensen et al. 2022, "An
    information-theoretic approach to prompt engineering without ground truth labels", section 3.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    return max(0.0, float(entropy(p.mean(0, keepdims=True))[0] - entropy(p).mean()))
