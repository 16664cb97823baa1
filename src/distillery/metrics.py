"""How good, how sure, how calibrated: scores of predicted labels and probabilities, and their statistics.

Pure functions of NumPy arrays. Labels are given by value with `labels`, the task's order; a prediction that is none
of them (an unparsable answer) counts as wrong and never as one of the labels. Higher is better unless said otherwise.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # not scipy.stats, which is slow to import: every stage would pay for it

# Probabilities are stored as float32: nothing below its resolution can be told from zero.
FLOOR = float(np.finfo(np.float32).eps)
BLOCK = 4_000_000  # draws held in memory at once: 32 MB


# ---------------------------------------------------------------- counts


def encode(values: ArrayLike, labels: Sequence[str]) -> np.ndarray:
    """Positions of `values` in `labels`, same shape; `len(labels)` for a value that is none of them."""
    index = {label: i for i, label in enumerate(labels)}
    values = np.asarray(values, dtype=object)
    return np.array([index.get(v, len(labels)) for v in values.ravel()], dtype=np.int64).reshape(values.shape)


def _gold(gold: ArrayLike, labels: Sequence[str]) -> np.ndarray:
    codes = encode(gold, labels)
    if codes.ndim != 1 or not codes.size:
        raise ValueError(f"gold labels must be one non-empty row, not of shape {codes.shape}")
    if (codes == len(labels)).any():
        raise ValueError(
            f"gold label {np.asarray(gold, dtype=object)[codes == len(labels)][0]!r} is not among {labels}"
        )
    return codes


def _same_rows(codes: np.ndarray, rows: int) -> np.ndarray:
    if codes.shape[-1] != rows:
        raise ValueError(f"{codes.shape[-1]} predictions for {rows} gold labels")
    return codes


def confusion(gold: ArrayLike, predicted: ArrayLike, labels: Sequence[str]) -> np.ndarray:
    """Counts [K, K + 1]: gold label by predicted label; the last column holds predictions that are no label.

    Raises ValueError for empty input, unequal lengths, or a gold label that is not in `labels`.
    """
    k, true = len(labels), _gold(gold, labels)
    codes = _same_rows(encode(predicted, labels), len(true))
    return np.bincount(true * (k + 1) + codes, minlength=k * (k + 1)).reshape(k, k + 1)


def _ratio(above: np.ndarray, below: np.ndarray, otherwise: float) -> np.ndarray:
    """`above / below`, and `otherwise` where `below` is 0."""
    return np.divide(
        above, below, out=np.full(np.broadcast_shapes(above.shape, below.shape), otherwise), where=below > 0
    )


def accuracy_of(counts: np.ndarray) -> np.ndarray:
    """Accuracy in [0, 1] of confusion counts [..., K, K + 1] -> [...]."""
    right = np.trace(counts, axis1=-2, axis2=-1)
    return right / counts.sum((-2, -1))


def f1_of(counts: np.ndarray) -> np.ndarray:
    """F1 of each label in [0, 1], [..., K, K + 1] -> [..., K]; NaN for a label neither present nor predicted."""
    right = np.diagonal(counts, axis1=-2, axis2=-1).astype(float)
    return _ratio(2 * right, counts[..., :-1].sum(-2) + counts.sum(-1), np.nan)


def macro_f1_of(counts: np.ndarray) -> np.ndarray:
    """Unweighted mean of F1 over the labels present or predicted (as scikit-learn does), [..., K, K + 1] -> [...]."""
    return np.nanmean(f1_of(counts), axis=-1)


def mcc(counts: np.ndarray) -> float:
    """Matthews correlation of confusion counts [K, K + 1], in [-1, 1]; 0 when either side knows one label only.

    The multi-class form of Gorodkin 2004.
    """
    true, answers, rows = np.append(counts.sum(1), 0), counts.sum(0), counts.sum()
    below = float(rows**2 - (true**2).sum()) * float(rows**2 - (answers**2).sum())
    return float((np.trace(counts) * rows - (true * answers).sum()) / np.sqrt(below)) if below > 0 else 0.0


# ---------------------------------------------------------------- reports


def classification_report(
    gold: ArrayLike, predicted: ArrayLike, probabilities: ArrayLike | None, labels: Sequence[str]
) -> dict[str, Any]:
    """Every score of one set of predictions, as plain floats.

    gold [n] and predicted [n] hold labels; probabilities [n, K] in the order of `labels`, or None when there are none
    (the scores that need them are then left out). A score that divides by zero is 0, as in scikit-learn.

    Returns rows, accuracy, balanced_accuracy (mean recall, or sensitivity, of the labels present), macro_specificity
    (mean specificity of the labels that some row has not), macro_f1, weighted_f1, mcc, answer_bias (0 best),
    commonest_answer (share of the most frequent prediction); with probabilities log_loss (0 best, nats), brier (0
    best, at most 2), ece (0 best), risk_coverage_area (0 best); and `labels`: per label precision, recall
    (sensitivity), f1, specificity, support.

    Raises ValueError for empty input, unequal lengths, or a gold label that is not in `labels`.
    """
    counts = confusion(gold, predicted, labels)
    rows, right = counts.sum(), np.diagonal(counts).astype(float)
    support, answers = counts.sum(1), counts[:, :-1].sum(0)
    precision, recall = _ratio(right, answers, 0.0), _ratio(right, support, 0.0)
    specificity = _ratio(rows - support - answers + right, rows - support, 0.0)
    f1 = np.nan_to_num(f1_of(counts))
    true, codes = encode(gold, labels), encode(predicted, labels)
    report = {
        "rows": int(rows),
        "accuracy": float(accuracy_of(counts)),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "macro_specificity": float(specificity[support < rows].mean()) if (support < rows).any() else 0.0,
        "macro_f1": float(macro_f1_of(counts)),
        "weighted_f1": float((f1 * support).sum() / rows),
        "mcc": mcc(counts),
        "answer_bias": answer_bias(gold, predicted, labels),
        "commonest_answer": float(np.bincount(codes).max() / rows),
    }
    if probabilities is not None:
        p = _probabilities(probabilities, len(true), len(labels))
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


def answer_bias(gold: ArrayLike, predicted: ArrayLike, labels: Sequence[str]) -> float:
    """Total variation distance, in [0, 1], of the shares of predicted labels from the true ones (0 best).

    A model that has learned a short cut (always the commonest answer) shows here before it shows in accuracy.
    """
    counts = confusion(gold, predicted, labels)
    true = np.append(counts.sum(1), 0)
    return float(np.abs(counts.sum(0) - true).sum() / counts.sum() / 2)


# ---------------------------------------------------------------- probabilities


def _probabilities(p: ArrayLike, rows: int, k: int) -> np.ndarray:
    p = np.asarray(p, dtype=np.float64)
    if p.shape != (rows, k):
        raise ValueError(f"probabilities must have the shape ({rows}, {k}), not {p.shape}")
    if not np.isfinite(p).all() or (p < 0).any() or np.abs(p.sum(1) - 1).max() > 1e-2:
        raise ValueError("each row of probabilities must be finite, >= 0 and add up to 1")
    return p / p.sum(1, keepdims=True)  # float32 sums are off by a few millionths


def log_loss(true: np.ndarray, p: np.ndarray) -> float:
    """Mean of -ln p[true label], in nats (0 best); true [n] are positions, p [n, K]; p is floored at `FLOOR`."""
    return float(-np.log(np.maximum(p[np.arange(len(true)), true], FLOOR)).mean())


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
    mean_confidence = _ratio(np.bincount(at, confidence, bins), rows, np.nan)
    accuracy = _ratio(np.bincount(at, right, bins), rows, np.nan)
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


def kl(teacher: ArrayLike, student: ArrayLike) -> np.ndarray:
    """KL(teacher || student) of each row in nats, [n, K], [n, K] -> [n] (0 best); the student is floored at `FLOOR`.

    Raises ValueError for unequal shapes or rows that are no distributions.
    """
    p, q = np.asarray(teacher), np.asarray(student)
    if p.ndim != 2 or p.shape != q.shape:
        raise ValueError(f"both must have one shape [n, K], not {p.shape} and {q.shape}")
    p, q = _probabilities(p, *p.shape), _probabilities(q, *q.shape)
    q = np.maximum(q, FLOOR)
    return special.rel_entr(p, q / q.sum(1, keepdims=True)).sum(1)


def tempered(p: ArrayLike, temperature: float) -> np.ndarray:
    """Rows of probabilities [n, K] proportional to p^(1/temperature): above 1 less sure, below 1 surer; [n, K]."""
    p = np.asarray(p, dtype=np.float64)
    return special.softmax(np.log(np.maximum(p, FLOOR)) / temperature, axis=-1)


def fit_temperature(true: np.ndarray, p: ArrayLike) -> float:
    """The temperature, within 1/20 and 20, at which `tempered(p)` has the smallest log loss (Guo et al. 2017).

    true [n] are positions, p [n, K]. To be fitted on validation rows only: on rows that are scored it flatters.
    """
    from scipy import optimize  # only needed here

    p = np.asarray(p, dtype=np.float64)
    bounds = (-np.log(20), np.log(20))
    return float(np.exp(optimize.minimize_scalar(lambda t: log_loss(true, tempered(p, np.exp(t))), bounds=bounds).x))


# ---------------------------------------------------------------- free answers


def normalized(answer: str) -> str:
    """An answer in lower case without punctuation, articles and superfluous white space (SQuAD, Rajpurkar 2016)."""
    answer = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def exact_match(prediction: str | None, aliases: Sequence[str]) -> float:
    """1.0 if `prediction` is one of the accepted answers, :func:`normalized`, else 0.0; None (no answer) is wrong.

    Raises ValueError when there is no accepted answer.
    """
    if not aliases:
        raise ValueError("an answer needs at least one alias to be compared with")
    return float(prediction is not None and normalized(prediction) in {normalized(alias) for alias in aliases})


def token_f1(prediction: str | None, aliases: Sequence[str]) -> float:
    """Best F1, in [0, 1], of the words that `prediction` shares with an accepted answer, both :func:`normalized`.

    Words are counted as often as they occur. Where either side has no words left, 1.0 if neither has, else 0.0; None
    is wrong. Raises ValueError when there is no accepted answer.
    """
    if not aliases:
        raise ValueError("an answer needs at least one alias to be compared with")
    if prediction is None:
        return 0.0
    said, best = normalized(prediction).split(), 0.0
    for alias in aliases:
        meant = normalized(alias).split()
        shared = sum((Counter(said) & Counter(meant)).values())
        best = max(best, 2 * shared / (len(said) + len(meant)) if said and meant else float(said == meant))
    return best


def token_overlap(prediction: str | None, aliases: Sequence[str]) -> tuple[float, float, float]:
    """F1, precision and recall, each in [0, 1], of the words shared with the accepted answer of the best F1.

    As :func:`token_f1`; precision is the share of the prediction's words, recall that of the accepted answer's. Of
    answers of the same F1 the one with the higher recall counts. Raises ValueError when there is no accepted answer.
    """
    if not aliases:
        raise ValueError("an answer needs at least one alias to be compared with")
    if prediction is None:
        return 0.0, 0.0, 0.0
    said, best = normalized(prediction).split(), (0.0, 0.0, 0.0)
    for alias in aliases:
        meant = normalized(alias).split()
        shared = sum((Counter(said) & Counter(meant)).values())
        if said and meant:
            found = 2 * shared / (len(said) + len(meant)), shared / len(said), shared / len(meant)
        else:
            found = (float(said == meant),) * 3
        best = max(best, found, key=lambda scores: (scores[0], scores[2]))
    return best


# ---------------------------------------------------------------- statistics


def _groups(groups: ArrayLike, rows: int) -> np.ndarray:
    groups = np.asarray(groups, dtype=object)
    if groups.shape != (rows,):
        raise ValueError(f"{rows} rows need one group each, not an array of shape {groups.shape}")
    return np.unique(groups.astype(str), return_inverse=True)[1]


def _draw(units: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of `units` is drawn in each of `n` resamples with replacement -> [n, units]."""
    drawn = rng.integers(0, units, (n, units)) + np.arange(n)[:, None] * units
    return np.bincount(drawn.ravel(), minlength=n * units).reshape(n, units).astype(np.float64)


def _resample(per_group: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Sums of [G, F] over groups drawn with replacement -> [n, F]; in blocks of `BLOCK` draws."""
    units = len(per_group)
    block = max(1, BLOCK // units)
    return np.concatenate([_draw(units, min(block, n - i), rng) @ per_group for i in range(0, n, block)])


def interval(samples: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval (low, high) of resampled values [n]."""
    low, high = np.quantile(np.asarray(samples), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def cluster_bootstrap(values: ArrayLike, groups: ArrayLike, n: int = 2000, seed: int = 0) -> np.ndarray:
    """Means of `values` under `n` resamples of whole groups (and of seeds, when there are several) -> [n].

    values: [rows], or [seeds, rows], one per row and seed; groups: [rows]. Near-duplicates are one observation, not
    several, so the group is what is drawn; then as many seeds as there are, and their means averaged.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    unit = _groups(groups, values.shape[1])
    sums = np.stack([np.bincount(unit, row) for row in [np.ones(len(unit)), *values]], axis=1)
    drawn = _resample(sums, n, np.random.default_rng([seed, 0]))
    return _over_seeds(drawn[:, 1:] / drawn[:, :1], seed, stream=1)


def _over_seeds(samples: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Mean of [n, seeds] over seeds drawn with replacement -> [n]: other runs would have scored otherwise.

    S values drawn from S have a variance that is (S - 1)/S of what it should be, half for two seeds: deviations from
    the mean of the seeds are stretched to make up for it.
    """
    n, seeds = samples.shape
    if seeds == 1:
        return samples[:, 0]
    drawn = (samples * _draw(seeds, n, np.random.default_rng([seed, stream]))).sum(1) / seeds
    middle = samples.mean(1)
    return middle + (drawn - middle) * np.sqrt(seeds / (seeds - 1))


SCORES = {"accuracy": accuracy_of, "macro_f1": macro_f1_of}


def bootstrap_scores(
    gold: ArrayLike,
    predicted: ArrayLike,
    labels: Sequence[str],
    groups: ArrayLike,
    n: int = 2000,
    seed: int = 0,
    stream: int = 1,
) -> dict[str, np.ndarray]:
    """Accuracy and macro-F1 under `n` resamples of whole groups and of seeds -> {"accuracy": [n], "macro_f1": [n]}.

    gold [rows]; predicted [rows] or [seeds, rows]; groups [rows]. The groups drawn depend on `seed` alone, so the
    resamples of two models with one seed are paired; `stream` decides which of the runs are drawn.
    """
    k, true = len(labels), _gold(gold, labels)
    codes = np.atleast_2d(_same_rows(encode(predicted, labels), len(true)))
    unit = _groups(groups, len(true))
    cells = k * (k + 1)
    # Counts are additive: each resample is a weighted sum of the groups' confusion counts, one matrix product for all.
    at = (unit * len(codes) + np.arange(len(codes))[:, None]) * cells + true * (k + 1) + codes
    size = (unit.max() + 1) * len(codes) * cells
    per_group = np.bincount(at.ravel(), minlength=size).reshape(unit.max() + 1, -1).astype(np.float64)
    drawn = _resample(per_group, n, np.random.default_rng([seed, 0])).reshape(n, len(codes), k, k + 1)
    return {name: _over_seeds(score(drawn), seed, stream).clip(0, 1) for name, score in SCORES.items()}


def mean_scores(gold: ArrayLike, predicted: ArrayLike, labels: Sequence[str]) -> dict[str, float]:
    """Accuracy and macro-F1 of predicted [rows] or [seeds, rows], averaged over the seeds."""
    predicted = np.atleast_2d(np.asarray(predicted, dtype=object))
    counts = np.stack([confusion(gold, row, labels) for row in predicted])
    return {name: float(score(counts).mean()) for name, score in SCORES.items()}


def paired_difference(
    gold: ArrayLike,
    predicted_a: ArrayLike,
    predicted_b: ArrayLike,
    labels: Sequence[str],
    groups: ArrayLike,
    n: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """A minus B on the same rows: {"accuracy": {...}, "macro_f1": {...}}, each with mean, low, high, p, detectable.

    gold [rows]; predicted_a, predicted_b [rows] or [seeds, rows] (their numbers of seeds may differ); groups [rows].
    Each resample draws the same groups for both and, for each of them, its seeds. [low, high] is the percentile
    interval; p is two-sided, from the same resamples, so p < 1 - confidence just when the interval leaves out 0 (up
    to the + 1 that keeps p above 0); detectable is the :func:`smallest_detectable_difference`.

    Few seeds understate the spread between runs: with one, the interval speaks of these very models only.
    """
    a = bootstrap_scores(gold, predicted_a, labels, groups, n, seed, stream=1)
    b = bootstrap_scores(gold, predicted_b, labels, groups, n, seed, stream=2)
    mean_a, mean_b = mean_scores(gold, predicted_a, labels), mean_scores(gold, predicted_b, labels)
    out = {}
    for name in SCORES:
        difference = a[name] - b[name]
        low, high = interval(difference, confidence)
        tail = min((difference <= 0).sum(), (difference >= 0).sum())
        out[name] = {
            "mean": mean_a[name] - mean_b[name],
            "low": low,
            "high": high,
            "p": float(min(1.0, 2 * (tail + 1) / (n + 1))),
            "detectable": smallest_detectable_difference(float(difference.std(ddof=1)), confidence),
        }
    return out


def smallest_detectable_difference(standard_error: float, confidence: float = 0.95, power: float = 0.8) -> float:
    """The true difference that a two-sided test at `confidence` would have found with probability `power`."""
    return float((special.ndtri((1 + confidence) / 2) + special.ndtri(power)) * standard_error)


def permutation_test(right_a: ArrayLike, right_b: ArrayLike, groups: ArrayLike, n: int = 2000, seed: int = 0) -> float:
    """Two-sided p that two models are equally good on the same rows: whose answers are whose is drawn by lot.

    right_a, right_b: [rows] or [seeds, rows] of right or wrong, averaged over seeds; groups [rows], swapped as a whole.
    Of single rows and single runs it is the Monte Carlo form of the exact McNemar test. It speaks of these very runs.
    """
    a, b = (np.atleast_2d(np.asarray(right, dtype=np.float64)).mean(0) for right in (right_a, right_b))
    if a.shape != b.shape:
        raise ValueError(f"both must be of the same rows, not {a.shape[0]} and {b.shape[0]}")
    sums = np.bincount(_groups(groups, len(a)), a - b)
    sums = sums[np.abs(sums) > 1e-12]
    if not len(sums):
        return 1.0
    rng, observed = np.random.default_rng([seed, 3]), abs(sums.sum())
    block = max(1, BLOCK // len(sums))
    signs = (rng.integers(0, 2, (min(block, n - i), len(sums))) * 2.0 - 1.0 for i in range(0, n, block))
    as_large = sum(int((np.abs(drawn @ sums) >= observed - 1e-9).sum()) for drawn in signs)
    return (as_large + 1) / (n + 1)


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> float:
    """Two-sided p of the exact McNemar test that two models, right or wrong on the same rows [n], are equally good.

    It takes rows for independent; :func:`permutation_test` is the one that knows of groups. McNemar 1947.
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"both must have one shape [n], not {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(min(1.0, 2 * special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def holm(p_values: ArrayLike) -> np.ndarray:
    """p values [m] adjusted for being m at once: the chance of any false alarm stays under the level. Holm 1979."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted
