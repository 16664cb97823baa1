"""Scores, intervals, comparisons and verdicts, a row for each model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.schema import Params
from distillery.evaluation.costs import dollars_per_1000_rows
from distillery.evaluation.gather import TOKEN_SCORES
from distillery.evaluation.perturbations import contrast_pairs_right
from distillery.evaluation.reading import read_result_file
from distillery.evaluation.results import ROLES, TRAINED_ROLES, ModelResult, Results
from distillery.files import Paths
from distillery.label_sets import LabelSets

AVERAGED_SCORES = ("balanced_accuracy", "macro_specificity", "weighted_f1", "mcc", "answer_bias", "commonest_answer")

PROBABILITY_SCORES = ("log_loss", "brier", "ece", "risk_coverage_area")

CALIBRATION_COLUMNS = ("temperature", "ece_scaled", "log_loss_scaled")

LABEL_SCORES = ("precision", "recall", "specificity")

SET_SCORES = ("micro_f1", "hamming_loss")  # of label sets, with intervals

SET_AVERAGES = ("micro_precision", "micro_recall", "macro_average_precision", "labels_per_row")

SET_LABEL_SCORES = (*LABEL_SCORES, "f1", "average_precision")

SPEED_COLUMNS = ("sentences_per_second", "latency_p50_ms", "latency_p95_ms", "memory_mb")

GPU_COLUMNS = ("gpu_memory_mb", "training_gpu_mb")  # only where a model ran on a GPU

DOLLARS = "dollars_per_1000_rows"  # only where a price is known

COMPARISON_COLUMNS = (
    "versus",
    "difference",
    "difference_low",
    "difference_high",
    "p",
    "detectable",
    "verdict",
)

SET_COMPARISON_COLUMNS = tuple(f"micro_f1_difference{end}" for end in ("", "_low", "_high"))

EXPORT_COLUMNS = ("agreement_with_student", "largest_difference")

HEADLINE_SCORES = (
    *("accuracy", "macro_f1", "mcc", "ece", "pairs_right", "difference", "teacher_difference", "kl_to_teacher"),
    "agreement_with_teacher",
)


def leaderboard(results: Results, timing: dict[str, dict[str, float]] | None = None) -> pd.DataFrame:
    """One row a model, best accuracy first. Scores are means over seeds, in [0, 1], with percentile intervals.

    timing: as in :class:`Measurements` (wall clock).
    verdict, teacher_verdict: `better` or `worse` than its control, or its teacher, when p, corrected for the number of
    all these comparisons (Holm), is under 1 - confidence; `no evidence` otherwise. That of an export, which is compared
    with its student: whether it is `within tolerance` or `loses too much`.
    """
    closeness = teacher_closeness(results).set_index(["model", "teacher"])
    rows = []
    for result in results.models:
        row = _size_columns(result) | _score_columns(results, result) | _comparison_columns(results, result)
        if (result.name, result.teacher) in closeness.index:
            close = closeness.loc[(result.name, result.teacher)]
            row |= {"kl_to_teacher": close["kl"], "agreement_with_teacher": close["agreement"]}
        row |= (timing or {}).get(result.name, {})
        rows.append(row | {DOLLARS: dollars_per_1000_rows(results.params, result, row.get("sentences_per_second"))})
    board = pd.DataFrame(rows).reindex(columns=_all_columns(results, rows))
    board[["parameters", "trainable"]] = board[["parameters", "trainable"]].astype("Int64")
    _add_verdicts(board, results.params.evaluate.confidence)
    for i in board.index[board["role"] == "export"]:
        too_much = board.at[i, "difference"] < -results.params.evaluate.export_tolerance
        board.at[i, "verdict"] = "loses too much" if too_much else "within tolerance"
    order = [ROLES.index(role) for role in board["role"]]
    board = board.assign(_order=order).sort_values(["accuracy", "_order", "model"], ascending=[False, True, True])
    return board.drop(columns="_order").reset_index(drop=True)


def by_source(board: pd.DataFrame, first: str | None = None) -> dict[str, pd.DataFrame]:
    """The rows of `board` for each source, that of `first` first, then in the order of their best models."""
    parts = {source: rows.reset_index(drop=True) for source, rows in board.groupby("source", sort=False)}
    return ({first: parts[first]} if first in parts else {}) | parts


def _all_columns(results: Results, rows: list[dict[str, Any]]) -> list[str]:
    labels = dict.fromkeys(label for labels in results.labels.values() for label in labels)
    of_sets = any(isinstance(names, LabelSets) for names in results.labels.values())
    return [
        *("model", "role", "source", "seeds", "parameters", "trainable", "megabytes"),
        *(f"{score}{end}" for score in metrics.SCORES for end in ("", "_low", "_high")),
        *(f"{score}{end}" for score in SET_SCORES if of_sets for end in ("", "_low", "_high")),
        *(score for score in SET_AVERAGES if of_sets),
        *(score for score in TOKEN_SCORES if any(score in row for row in rows)),
        *(*AVERAGED_SCORES, *PROBABILITY_SCORES, *CALIBRATION_COLUMNS, "pairs_right", "pairs"),
        *(f"{score}_{label}" for score in (SET_LABEL_SCORES if of_sets else LABEL_SCORES) for label in labels),
        *(column for column in EXPORT_COLUMNS if any(column in row for row in rows)),
        *("kl_to_teacher", "agreement_with_teacher", *SPEED_COLUMNS),
        *([DOLLARS] if any(row[DOLLARS] is not None for row in rows) else []),
        *("train_seconds", "training_mb"),
        *(column for column in GPU_COLUMNS if any(row.get(column) is not None for row in rows)),
        *(f"{prefix}{column}" for prefix in ("", "teacher_") for column in COMPARISON_COLUMNS),
        *(f"{prefix}{column}" for prefix in ("", "teacher_") for column in SET_COMPARISON_COLUMNS if of_sets),
    ]


def _size_columns(result: ModelResult) -> dict[str, Any]:
    return {
        "model": result.name,
        "role": result.role,
        "source": result.source,
        "seeds": len(result.predictions),
        "parameters": result.parameters,
        "trainable": result.trainable,
        "megabytes": None if result.size_bytes is None else result.size_bytes / 1e6,
        "train_seconds": result.seconds,
        "training_mb": result.training_mb,
        "training_gpu_mb": result.training_gpu_mb,
    }


def _score_columns(results: Results, result: ModelResult) -> dict[str, float]:
    """Every score of `result` as the mean over its seeds, with the intervals of `metrics.SCORES`."""
    config, labels = results.params.evaluate, results.labels[result.source]
    test = results.tests[result.source]
    label, groups = test["label"].to_numpy(dtype=object), test["group"]
    drawn = metrics.bootstrap_scores(label, result.predictions, labels, groups, config.bootstrap, config.seed)
    row = dict(result.token_scores or {})
    for score, mean in metrics.mean_scores(label, result.predictions, labels).items():
        low, high = metrics.interval(drawn[score], config.confidence)
        row |= {score: mean, f"{score}_low": low, f"{score}_high": high}
    probabilities = [None] * len(result.predictions) if result.probabilities is None else result.probabilities
    reports = [
        metrics.classification_report(label, prediction, p, labels)
        for prediction, p in zip(result.predictions, probabilities, strict=True)
    ]
    for score in (*AVERAGED_SCORES, *PROBABILITY_SCORES, *SET_AVERAGES):
        if score in reports[0]:
            row[score] = float(np.mean([report[score] for report in reports]))
    for name in labels:
        for score in SET_LABEL_SCORES if isinstance(labels, LabelSets) else LABEL_SCORES:
            if score in reports[0]["labels"][name]:
                row[f"{score}_{name}"] = float(np.mean([report["labels"][name][score] for report in reports]))
    pairs, number = contrast_pairs_right(result.predictions == label, label, groups)
    row |= {"pairs_right": float(pairs.mean()), "pairs": number}
    scaled = result.validation is not None and not isinstance(labels, LabelSets)
    return row | calibration_scores(results, result) if scaled else row


def calibration_scores(results: Results, result: ModelResult) -> dict[str, float]:
    """Calibration error and log loss (nats) after temperature scaling, and that temperature; means over seeds.

    The temperature is fitted on the validation rows (Guo et al. 2017).
    """
    label = metrics.encode_labels(results.tests[result.source]["label"], results.labels[result.source])
    fitted_on = metrics.encode_labels(results.validations[result.source]["label"], results.labels[result.source])
    rows = []
    for probabilities, validation in zip(result.probabilities, result.validation, strict=True):
        temperature = metrics.fit_temperature(fitted_on, validation)
        scaled = metrics.apply_temperature(probabilities, temperature)
        row = {"temperature": temperature, "ece_scaled": metrics.calibration(label, scaled)["ece"]}
        rows.append(row | {"log_loss_scaled": metrics.log_loss(label, scaled)})
    return pd.DataFrame(rows).mean().to_dict()


def _comparison_columns(results: Results, result: ModelResult) -> dict[str, Any]:
    """A student's (or control's) accuracy minus that of its control and, of a student, of its teacher.

    Of an export, minus that of its student; without p: it is no comparison that a verdict on the student rests on.
    """
    row: dict[str, Any] = {}
    if result.role == "export":
        student = results.find(result.key)
        comparison = compare_accuracy(results, result, student)
        row = {"versus": student.name, "difference": comparison["mean"]}
        row |= {"difference_low": comparison["low"], "difference_high": comparison["high"]}
        row["agreement_with_student"] = float((result.predictions == student.predictions).mean())
        row["largest_difference"] = float(np.abs(result.probabilities - student.probabilities).max())
        return row
    if result.role not in ("student", "control"):
        return row
    teacher = results.teacher_of(result) if result.role == "student" else None
    for other, prefix in ((results.find(result.control, result.source), ""), (teacher, "teacher_")):
        comparison = compare_accuracy(results, result, other)
        if comparison:
            row |= _set_comparison(results, result, other, prefix)
            row[f"{prefix}versus"] = other.name
            row |= {
                f"{prefix}{column}": comparison[key]
                for column, key in zip(COMPARISON_COLUMNS[1:6], ("mean", "low", "high", "p", "detectable"), strict=True)
            }
    return row


def _set_comparison(results: Results, a: ModelResult, b: ModelResult, prefix: str) -> dict[str, float]:
    """Micro-F1 of `a` minus that of `b` with its interval, where they predict label sets."""
    if not isinstance(results.labels[a.source], LabelSets):
        return {}
    difference = _paired_difference(results, a, b)["micro_f1"]
    columns = zip(SET_COMPARISON_COLUMNS, ("mean", "low", "high"), strict=True)
    return {f"{prefix}{column}": difference[key] for column, key in columns}


def _paired_difference(results: Results, a: ModelResult, b: ModelResult) -> dict[str, dict[str, float]]:
    """:func:`metrics.paired_difference` of two models on the test rows of their source."""
    test, config = results.tests[a.source], results.params.evaluate
    label, names = test["label"].to_numpy(dtype=object), results.labels[a.source]
    settings = (config.bootstrap, config.confidence, config.seed)
    return metrics.paired_difference(label, a.predictions, b.predictions, names, test["group"], *settings)


def compare_accuracy(results: Results, a: ModelResult, b: ModelResult | None) -> dict[str, float] | None:
    """Accuracy of a minus that of b on the same rows: mean, low, high, p, detectable; None when there is no such b.

    p is the larger of the bootstrap's, which draws groups and runs, and the permutation test's, which swaps groups.
    """
    if b is None or a.source != b.source:
        return None
    test, config = results.tests[a.source], results.params.evaluate
    label, groups, n = test["label"].to_numpy(dtype=object), test["group"], config.bootstrap
    difference = _paired_difference(results, a, b)["accuracy"]
    swapped = metrics.permutation_test(a.predictions == label, b.predictions == label, groups, n, config.seed)
    return difference | {"p": max(difference["p"], swapped)}


def compare_with_published(params: Params, board: pd.DataFrame) -> pd.DataFrame:
    """The published scores beside those of this run: model, score, published, this run, low, high (its interval), and
    the published score's split, place in the source, and note.

    board: as returned by :func:`leaderboard`. Scores that it does not hold are empty.
    """
    rows, source = [], params.test_source(params.evaluate.headline)
    scores = board.set_index("model")
    # with several tested sources, a teacher has one row for each
    scores = scores.rename(index={f"{teacher} on {source}": teacher for teacher in params.teachers})
    for published in params.recipe.published if params.recipe else []:
        for score, value in published.scores.items():
            row = {"model": published.model, "score": score, "published": value}
            row |= {"split": published.split or "not given", "place": published.place, "note": published.note}
            for column, name in {"this run": score, "low": f"{score}_low", "high": f"{score}_high"}.items():
                exists = published.model in scores.index and name in scores
                row[column] = scores.loc[published.model, name] if exists else None
            rows.append(row)
    columns = ["model", "score", "published", "this run", "low", "high", "split", "place", "note"]
    return pd.DataFrame(rows, columns=columns)


def _add_verdicts(board: pd.DataFrame, confidence: float) -> None:
    """Correct all p of `board` for their number (Holm 1979), in place, and add the verdict of every comparison."""
    p = board[["p", "teacher_p"]].astype(float).to_numpy().copy()
    p[~np.isnan(p)] = metrics.holm(p[~np.isnan(p)])
    for i, prefix in enumerate(("", "teacher_")):
        board[f"{prefix}p"] = p[:, i]
        board[f"{prefix}verdict"] = [
            None if np.isnan(x) else "no evidence" if x >= 1 - confidence else "better" if difference > 0 else "worse"
            for x, difference in zip(p[:, i], board[f"{prefix}difference"].astype(float), strict=True)
        ]


def count_comparisons(board: pd.DataFrame) -> int:
    """The number of comparisons that the p of `board` are corrected for."""
    return int(board["p"].notna().sum() + board["teacher_p"].notna().sum())


def phase_accuracies(root: Path, results: Results) -> pd.DataFrame:
    """Accuracy after each phase: model, after phase (from 1; 0: untrained), accuracy, gain over the phase before.

    On the validation rows, the mean over seeds: the test rows are predicted before and after all training only. Also
    gain_error: the standard error of the gain, from what it is on each row.
    """
    params, parts = results.params, []
    for name in params.students:
        label = results.validations[params.test_source(name)].set_index("id")["label"]
        runs = [read_result_file(Paths(root).run(name, seed) / "phases.parquet", root) for seed in params.seeds]
        rows = pd.concat(runs, ignore_index=True)
        rows = rows[rows["split"] == "validation"]
        right = rows["prediction"].eq(rows["id"].map(label))
        mean, by_row = right.groupby(rows["phase"]).mean(), right.groupby([rows["phase"], rows["id"]]).mean()
        columns = {"after phase": mean.index, "accuracy": mean.to_numpy(), "gain": mean.diff().to_numpy()}
        columns["gain_error"] = by_row.unstack("phase").astype(float).diff(axis=1).sem().to_numpy()
        parts.append(pd.DataFrame({"model": name} | columns))
    return pd.concat(parts, ignore_index=True)


def teacher_closeness(results: Results) -> pd.DataFrame:
    """How closely every student follows each teacher, a row a pair: model, teacher, agreement, kl.

    agreement: share of test rows with the same prediction; kl: mean KL(teacher || student) in nats; means over seeds.
    """
    rows = []
    for student in (m for m in results.models if m.role in ("student", "control", "untrained")):
        for (teacher, source), signal in results.signals.items():
            if source == student.source:
                p_teacher = np.stack(signal["probabilities"].to_numpy())
                agreement = float((student.predictions == signal["prediction"].to_numpy(object)).mean())
                labels = results.labels[source]
                kl = np.mean([metrics.kl_divergence(p_teacher, p, labels).mean() for p in student.probabilities])
                rows.append({"model": student.name, "teacher": teacher, "agreement": agreement, "kl": float(kl)})
    return pd.DataFrame(rows, columns=["model", "teacher", "agreement", "kl"])


def summarize(results: Results, board: pd.DataFrame) -> dict[str, Any]:
    """The scores that `dvc metrics` shows: the headline's with intervals, then two of each model. No wall clock."""
    head = board.set_index("model").loc[results.headline.name]
    columns = [c for k in (*HEADLINE_SCORES, *SET_SCORES) for c in (k, f"{k}_low", f"{k}_high") if c in board]
    summary: dict[str, Any] = {"headline": {c: round(float(head[c]), 6) for c in columns if pd.notna(head[c])}}
    trained = board[board["role"].isin(TRAINED_ROLES)]
    for score in (*metrics.SCORES, *(score for score in SET_SCORES if score in board)):
        scored = trained[trained[score].notna()]  # some scores are of label sets alone
        summary[score] = {m: round(float(v), 6) for m, v in zip(scored["model"], scored[score], strict=True)}
    return summary
