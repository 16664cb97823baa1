"""How good, how sure, how calibrated: scores of predicted labels and probabilities, and their statistics.

Pure functions of NumPy arrays. Labels are given by value with `labels`, the task's order; a prediction that is none
of them (an unparsable answer) counts as wrong and never as one of the labels. Higher is better unless said otherwise.
"""

from distillery.metrics.calibration import (
    PROBABILITY_FLOOR,
    apply_temperature,
    brier,
    calibration,
    check_probabilities,
    fit_temperature,
    kl_divergence,
    log_loss,
    risk_coverage,
)
from distillery.metrics.classification import answer_bias, classification_report
from distillery.metrics.counts import (
    accuracy_of,
    check_same_rows,
    confusion,
    encode_gold,
    encode_labels,
    f1_of,
    macro_f1_of,
    mcc,
    safe_ratio,
)
from distillery.metrics.free_text import exact_match, normalize_answer, token_f1, token_overlap
from distillery.metrics.significance import (
    BLOCK,
    SCORES,
    bootstrap_scores,
    cluster_bootstrap,
    holm,
    interval,
    mcnemar,
    mean_scores,
    paired_difference,
    permutation_test,
    smallest_detectable_difference,
)

__all__ = [
    "BLOCK",
    "PROBABILITY_FLOOR",
    "SCORES",
    "accuracy_of",
    "answer_bias",
    "apply_temperature",
    "bootstrap_scores",
    "brier",
    "calibration",
    "check_probabilities",
    "check_same_rows",
    "classification_report",
    "cluster_bootstrap",
    "confusion",
    "encode_gold",
    "encode_labels",
    "exact_match",
    "f1_of",
    "fit_temperature",
    "holm",
    "interval",
    "kl_divergence",
    "log_loss",
    "macro_f1_of",
    "mcc",
    "mcnemar",
    "mean_scores",
    "normalize_answer",
    "paired_difference",
    "permutation_test",
    "risk_coverage",
    "safe_ratio",
    "smallest_detectable_difference",
    "token_f1",
    "token_overlap",
]
