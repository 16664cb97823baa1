"""Scores of predicted labels, probabilities and answers, and their statistics: pure functions of NumPy arrays.

Labels are values of `labels`, the task's order. A prediction that is none of them (an unparsable answer) counts as
wrong and never as one of the labels. Higher is better unless the docstring states otherwise.

Where `labels` are :class:`distillery.label_sets.LabelSets`, values are label sets, probabilities [n, K] are of each
label by itself, and accuracy is the share of rows with exactly the gold set.
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
from distillery.metrics.decisions import DEFAULT_THRESHOLD, choose_thresholds, confidence, decide
from distillery.metrics.free_text import exact_match, token_overlap
from distillery.metrics.label_noise import entropy, label_margin, mutual_information, prediction_margin, suspect_labels
from distillery.metrics.label_sets import average_precision, label_set_report, two_outcomes
from distillery.metrics.significance import (
    SCORES,
    bootstrap_scores,
    cluster_bootstrap,
    holm,
    interval,
    mean_scores,
    paired_difference,
    permutation_test,
    scores_of,
    smallest_detectable_difference,
)

__all__ = [
    "DEFAULT_THRESHOLD",
    "PROBABILITY_FLOOR",
    "SCORES",
    "apply_temperature",
    "average_precision",
    "bootstrap_scores",
    "calibration",
    "choose_thresholds",
    "classification_report",
    "cluster_bootstrap",
    "confidence",
    "conformal_threshold",
    "confusion",
    "decide",
    "encode_labels",
    "entropy",
    "exact_match",
    "fit_temperature",
    "holm",
    "interval",
    "kl_divergence",
    "label_margin",
    "label_set_report",
    "log_loss",
    "mean_scores",
    "mutual_information",
    "paired_difference",
    "permutation_test",
    "prediction_margin",
    "risk_coverage",
    "scores_of",
    "selective_threshold",
    "smallest_detectable_difference",
    "suspect_labels",
    "token_overlap",
    "two_outcomes",
]
