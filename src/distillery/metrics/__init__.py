"""Scores of predicted labels, probabilities and answers, and their statistics: pure functions of NumPy arrays.

Labels are values of `labels`, the task's order. A prediction that is none of them (an unparsable answer) counts as
wrong and never as one of the labels. Higher is better unless the docstring states otherwise.
"""

from distillery.metrics.calibration import (
    PROBABILITY_FLOOR,
    apply_temperature,
    calibration,
    conformal_threshold,
    fit_temperature,
    kl_divergence,
    log_loss,
    risk_coverage,
    selective_threshold,
)
from distillery.metrics.classification import classification_report
from distillery.metrics.counts import (
    confusion,
    encode_labels,
)
from distillery.metrics.free_text import exact_match, token_overlap
from distillery.metrics.label_noise import entropy, label_margin, prediction_margin, suspect_labels
from distillery.metrics.significance import (
    SCORES,
    bootstrap_scores,
    cluster_bootstrap,
    holm,
    interval,
    mean_scores,
    paired_difference,
    permutation_test,
    smallest_detectable_difference,
)

__all__ = [
    "PROBABILITY_FLOOR",
    "SCORES",
    "apply_temperature",
    "bootstrap_scores",
    "calibration",
    "classification_report",
    "cluster_bootstrap",
    "conformal_threshold",
    "confusion",
    "encode_labels",
    "entropy",
    "exact_match",
    "fit_temperature",
    "holm",
    "interval",
    "kl_divergence",
    "label_margin",
    "log_loss",
    "mean_scores",
    "paired_difference",
    "permutation_test",
    "prediction_margin",
    "risk_coverage",
    "selective_threshold",
    "smallest_detectable_difference",
    "suspect_labels",
    "token_overlap",
]
