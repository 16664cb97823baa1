"""Are planted errors among gold labels found, and what does a student gain when the flagged rows are left out?

    python benchmarks/label_noise.py [--noise 0.05 0.1] [--seeds 3] [--folds 5]

Gold labels of the finance corpus (all rows but the test rows) are replaced by another label at random. A logistic
regression on sentence vectors of MiniLM (frozen) gives out-of-fold probabilities, with whole groups in one fold;
`metrics.suspect_labels` flags rows by them. The student is the same kind of model, scored on the untouched test rows:
trained on the clean labels, on the noisy ones, without the flagged rows, without as many rows at random, without the
worst flagged rows (as many as errors were planted), and without the rows that are wrong, which no method can beat.
"""

from __future__ import annotations

import argparse

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from distillery import metrics
from distillery.config.load import load_params
from distillery.data.prepare import prepare_source
from distillery.files import repository_root
from distillery.models.embeddings import embed_texts
from distillery.models.fetch import fetch_model
from distillery.tasks.schema import load_task

FIRST = 50  # rows that a person reads first
WAYS = (
    *("clean labels", "noisy labels", "without flagged rows", "without as many at random"),
    *("without the worst rows", "without all wrong rows"),
)


def classifier() -> LogisticRegression:
    return LogisticRegression(C=10, max_iter=2000)


def out_of_fold(vectors: np.ndarray, labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Probabilities [n, K] of each row by a model that saw no row of its fold."""
    p = np.zeros((len(labels), labels.max() + 1))
    for learned, held_out in StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(
        vectors, labels, groups
    ):
        p[held_out] = classifier().fit(vectors[learned], labels[learned]).predict_proba(vectors[held_out])
    return p


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=5)
    arguments = parser.parse_args()
    params = load_params()
    spec = params.data["finance"]
    task = load_task(spec.task)
    prepared = prepare_source("finance", spec, task, repository_root())
    vectors = embed_texts(fetch_model("minilm-l6", params.models["minilm-l6"]), prepared.rows["text"].tolist())
    codes = metrics.encode_labels(prepared.rows["label"], task.names)
    groups = prepared.rows["group"].to_numpy()
    gold, test = np.flatnonzero(prepared.split != "test"), np.flatnonzero(prepared.split == "test")
    print(f"{len(gold):,} gold rows, {len(test):,} test rows, {arguments.folds} folds, {arguments.seeds} seeds\n")
    print(
        "| planted | flagged | precision | recall | of the first 50 | "
        + " | ".join(WAYS)
        + " |\n|--:|--:|--:|--:|--:|"
        + "--:|" * len(WAYS)
    )
    for share in arguments.noise:
        lines = []
        for seed in range(arguments.seeds):
            rng = np.random.default_rng(seed)
            labels = codes[gold].copy()
            wrong = rng.choice(len(gold), round(share * len(gold)), replace=False)
            labels[wrong] = (labels[wrong] + rng.integers(1, len(task.names), len(wrong))) % len(task.names)
            is_wrong = labels != codes[gold]
            p = out_of_fold(vectors[gold], labels, groups[gold], arguments.folds, seed)
            flagged = metrics.suspect_labels(labels, p)
            at_random = np.zeros(len(gold), dtype=bool)
            at_random[rng.choice(len(gold), flagged.sum(), replace=False)] = True
            worst = np.flatnonzero(flagged)[np.argsort(metrics.label_margin(labels, p)[flagged], kind="stable")]
            is_worst = np.isin(np.arange(len(gold)), worst[: is_wrong.sum()])
            nothing = np.zeros(len(gold), dtype=bool)
            left_out = dict(zip(WAYS, (nothing, nothing, flagged, at_random, is_worst, is_wrong), strict=True))
            line = [is_wrong.sum(), flagged.sum(), (flagged & is_wrong).sum() / flagged.sum()]
            line += [(flagged & is_wrong).sum() / is_wrong.sum(), is_wrong[worst[:FIRST]].mean()]
            for way, dropped in left_out.items():
                of_way = codes[gold] if way == "clean labels" else labels
                student = classifier().fit(vectors[gold][~dropped], of_way[~dropped])
                line.append((student.predict(vectors[test]) == codes[test]).mean())
            lines.append(line)
        mean, low, high = np.mean(lines, 0), np.min(lines, 0), np.max(lines, 0)
        shown = [f"{mean[0]:.0f} ({share:.0%})", f"{mean[1]:.0f}"]
        shown += [
            f"{100 * m:.1f} % ({100 * a:.1f}–{100 * b:.1f})"
            for m, a, b in zip(mean[2:], low[2:], high[2:], strict=True)
        ]
        print("| " + " | ".join(shown) + " |", flush=True)
    print("\nMeans over the seeds, in brackets the lowest and the highest.")


if __name__ == "__main__":
    main()
