"""Every metric beside an independent reference: the largest difference over random cases.

    PYTHONPATH=src python benchmarks/metric_check.py [random cases, 1000 by default]

Prints a markdown table. A case has 1 to 60 rows of 2 to 5 labels; among them are cases in which a class is absent, all
predictions are equal, all are right, or the true label got a probability of zero. Exits with 1 if a difference is above
its tolerance.
"""

import re
import string
import sys
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
from scipy import optimize, special, stats
from sklearn import metrics as sk

from distillery import metrics

KINDS = ("plain", "a class is absent", "all predictions equal", "all right", "zero probability", "one row")


def case(rng: np.random.Generator, kind: str) -> dict:
    """gold, predicted (labels), true (positions), p, q [n, K], groups, of the given kind."""
    k, n = int(rng.integers(2, 6)), 1 if kind == "one row" else int(rng.integers(2, 61))
    labels = [f"label {i}" for i in range(k)]
    true, predicted = rng.integers(0, k, n), rng.integers(0, k, n)
    if kind == "a class is absent":
        true, predicted = rng.integers(0, k - 1, n), rng.integers(0, k, n)
    elif kind == "all predictions equal":
        predicted = np.full(n, predicted[0])
    elif kind == "all right":
        predicted = true
    p, q = rng.dirichlet([rng.choice([0.05, 0.5, 3])] * k, n), rng.dirichlet([1.0] * k, n)
    if kind == "zero probability":
        p = np.eye(k)[predicted]
    names = np.array(labels, dtype=object)
    return {"labels": labels, "gold": names[true], "predicted": names[predicted], "true": true, "p": p, "q": q,
            "groups": rng.integers(0, max(1, n // 2), n)}  # fmt: skip


def reported(name: str) -> Callable[[dict], float]:
    def value(c: dict) -> float:
        return metrics.classification_report(c["gold"], c["predicted"], c["p"], c["labels"])[name]

    return value


def per_label(name: str) -> Callable[[dict], np.ndarray]:
    def value(c: dict) -> np.ndarray:
        report = metrics.classification_report(c["gold"], c["predicted"], None, c["labels"])["labels"]
        return np.array([report[label][name] for label in c["labels"]])

    return value


def specificity(c: dict) -> np.ndarray:
    """Recall of "is not this label"; 0 when every row is of it."""
    sides = [(c["gold"] != label, c["predicted"] != label) for label in c["labels"]]
    return np.array([sk.recall_score(a, b, zero_division=0) for a, b in sides])


def macro_specificity(c: dict) -> float:
    others = np.array([(c["gold"] != label).any() for label in c["labels"]])
    return float(specificity(c)[others].mean()) if others.any() else 0.0


def ece(c: dict, bins: int = 15) -> float:
    """Naeini et al. 2015 by `scipy.stats.binned_statistic`, whose bins are closed below: the mirror image."""
    confidence, right = c["p"].max(1), c["p"].argmax(1) == c["true"]
    columns = [stats.binned_statistic(-confidence, v, "sum", bins, (-1, 0)).statistic for v in (confidence, right)]
    return float(np.abs(columns[0] - columns[1]).sum() / len(right))


def risk_coverage(c: dict) -> float:
    """Mean over coverages of the expected error rate when equally confident rows come in any order."""
    confidence, wrong, n = c["p"].max(1), c["p"].argmax(1) != c["true"], len(c["p"])
    total = 0.0
    for m in range(1, n + 1):
        edge = np.sort(confidence)[::-1][m - 1]
        surer, tied = confidence > edge, confidence == edge
        total += (wrong[surer].sum() + (m - surer.sum()) * wrong[tied].mean()) / m
    return total / n


def floored(p: np.ndarray) -> np.ndarray:
    return np.maximum(p, metrics.PROBABILITY_FLOOR)


def kl(c: dict) -> float:
    q = floored(c["q"])
    return float(np.mean([stats.entropy(a, b) for a, b in zip(c["p"], q / q.sum(1, keepdims=True), strict=True)]))


def scaled_loss(c: dict) -> float:
    """Log loss at the best temperature, found on a grid and then by Nelder and Mead in place of Brent's search."""
    logits = np.log(floored(c["p"]))

    def loss(t: float) -> float:
        p = floored(special.softmax(logits / np.exp(np.clip(t, -np.log(20), np.log(20))), axis=1))
        return float(-np.log(p[np.arange(len(p)), c["true"]]).mean())

    start = min(np.linspace(-np.log(20), np.log(20), 121), key=loss)
    return min(loss(start), optimize.minimize(lambda t: loss(t[0]), [start], method="Nelder-Mead", tol=1e-10).fun)


def our_scaled_loss(c: dict) -> float:
    return metrics.log_loss(c["true"], metrics.apply_temperature(c["p"], metrics.fit_temperature(c["true"], c["p"])))


def bootstrap(c: dict) -> np.ndarray:
    """The definition: draw groups, take all their rows, score them."""
    rng, names = np.random.default_rng([0, 0]), np.unique(c["groups"].astype(str))
    values = []
    for drawn in rng.integers(0, len(names), (20, len(names))):
        rows = np.concatenate([np.flatnonzero(c["groups"].astype(str) == names[g]) for g in drawn])
        values.append(sk.f1_score(c["gold"][rows], c["predicted"][rows], average="macro", zero_division=0))
    return np.array(values)


def our_bootstrap(c: dict) -> np.ndarray:
    return metrics.bootstrap_scores(c["gold"], c["predicted"], c["labels"], c["groups"].astype(str), 20)["macro_f1"]


def words(c: dict) -> tuple[str, list[str]]:
    """A made-up free answer and its accepted aliases."""
    stock = ["the", "Paris", "paris.", "of", "An", "1,204", "é", ""]
    texts = [
        " ".join(stock[i % len(stock)] for i in c["true"][k : k + 5] * 3 + c["groups"][k : k + 5]) for k in (0, 2, 4)
    ]
    return texts[0], texts[1:]


def squad(c: dict) -> np.ndarray:
    """Exact match and F1 as in the evaluation script of SQuAD, the best over the aliases."""

    def tokens(text: str) -> list[str]:
        text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    predicted, scores = tokens(words(c)[0]), []
    for alias in words(c)[1]:
        meant = tokens(alias)
        same = sum((Counter(predicted) & Counter(meant)).values())
        precision, recall = same / max(1, len(predicted)), same / max(1, len(meant))
        f1 = 2 * precision * recall / (precision + recall) if same else 0.0
        scores.append([float(predicted == meant), f1 if predicted and meant else float(predicted == meant)])
    return np.max(scores, axis=0)


def our_free_answers(c: dict) -> np.ndarray:
    predicted, aliases = words(c)
    return np.array([metrics.exact_match(predicted, aliases), metrics.token_overlap(predicted, aliases)[0]])


def holm(c: dict) -> np.ndarray:
    """By the definition: the largest, over the hypotheses up to it, of p times how many are left."""
    p = c["q"][:, 0]
    order = np.argsort(p, kind="stable")
    values = np.empty(len(p))
    for i, at in enumerate(order):
        values[at] = min(1.0, max(p[order[j]] * (len(p) - j) for j in range(i + 1)))
    return values


def scores(**options: object) -> Callable[[dict], np.ndarray]:
    def value(c: dict) -> np.ndarray:
        return sk.precision_recall_fscore_support(
            c["gold"], c["predicted"], labels=c["labels"], zero_division=0, **options
        )

    return value


SKLEARN, DEFINITION = "scikit-learn", "its definition, in plain loops"
CHECKS: list[tuple[str, str, Callable, Callable, float]] = [
    ("accuracy", SKLEARN, reported("accuracy"), lambda c: sk.accuracy_score(c["gold"], c["predicted"]), 1e-12),
    ("balanced accuracy", SKLEARN, reported("balanced_accuracy"),
     lambda c: sk.balanced_accuracy_score(c["gold"], c["predicted"]), 1e-12),
    ("macro-F1", SKLEARN, reported("macro_f1"),
     lambda c: sk.f1_score(c["gold"], c["predicted"], average="macro", zero_division=0), 1e-12),
    ("weighted F1", SKLEARN, reported("weighted_f1"),
     lambda c: sk.f1_score(c["gold"], c["predicted"], average="weighted", zero_division=0), 1e-12),
    ("precision of each label", SKLEARN, per_label("precision"), lambda c: scores()(c)[0], 1e-12),
    ("recall (sensitivity) of each label", SKLEARN, per_label("recall"), lambda c: scores()(c)[1], 1e-12),
    ("F1 of each label", SKLEARN, per_label("f1"), lambda c: scores()(c)[2], 1e-12),
    ("specificity of each label", SKLEARN, per_label("specificity"), specificity, 1e-12),
    ("mean specificity", SKLEARN, reported("macro_specificity"), macro_specificity, 1e-12),
    ("MCC", SKLEARN, reported("mcc"), lambda c: sk.matthews_corrcoef(c["gold"], c["predicted"]), 1e-12),
    ("log loss, floored", SKLEARN, reported("log_loss"),
     lambda c: sk.log_loss(c["true"], floored(c["p"]) / floored(c["p"]).sum(1, keepdims=True),
                           labels=range(len(c["labels"]))), 1e-5),
    ("Brier score", DEFINITION, reported("brier"),
     lambda c: float(np.mean([np.sum((row - np.eye(len(row))[t]) ** 2)
                              for row, t in zip(c["p"], c["true"], strict=True)])), 1e-12),
    ("calibration error, 15 bins", "SciPy", reported("ece"), ece, 1e-9),
    ("risk-coverage area", DEFINITION, reported("risk_coverage_area"), risk_coverage, 1e-9),
    ("KL to the teacher", "SciPy", lambda c: float(metrics.kl_divergence(c["p"], c["q"]).mean()), kl, 1e-9),
    ("answer bias", DEFINITION, reported("answer_bias"),
     lambda c: sum(abs((c["gold"] == x).mean() - (c["predicted"] == x).mean()) for x in c["labels"]) / 2, 1e-12),
    ("share of the commonest answer", DEFINITION, reported("commonest_answer"),
     lambda c: Counter(c["predicted"]).most_common(1)[0][1] / len(c["gold"]), 1e-12),
    ("log loss at the fitted temperature", "SciPy (grid, Nelder-Mead)", our_scaled_loss, scaled_loss, 1e-4),
    ("exact match, token F1", "SQuAD's script", our_free_answers, squad, 1e-12),
    ("bootstrap of macro-F1 over groups", SKLEARN + " on every resample", our_bootstrap, bootstrap, 1e-12),
    ("Holm", DEFINITION, lambda c: metrics.holm(c["q"][:, 0]), holm, 1e-12),
]  # fmt: skip


def main(cases: int = 1000) -> bool:
    """Print the table; whether every difference is within its tolerance."""
    warnings.filterwarnings("ignore")  # scikit-learn warns of classes that are absent: that is the point
    rng = np.random.default_rng(0)
    drawn = [case(rng, KINDS[i % len(KINDS)]) for i in range(cases)]
    kinds = ", ".join(f"{kind}: {sum(i % len(KINDS) == k for i in range(cases))}" for k, kind in enumerate(KINDS))
    print(f"Largest difference over {cases} random cases ({kinds}).\n")
    print("| metric | reference | largest difference | tolerance |\n|---|---|--:|--:|")
    fine = True
    for name, reference, actual, its, tolerance in CHECKS:
        worst = max(float(np.max(np.abs(np.asarray(actual(c)) - np.asarray(its(c))))) for c in drawn)
        fine &= worst <= tolerance
        print(f"| {name} | {reference} | {worst:.1e} | {tolerance:.0e} |", flush=True)
    return fine


if __name__ == "__main__":
    sys.exit(0 if main(*(int(argument) for argument in sys.argv[1:])) else 1)
