"""Scores, intervals, comparisons and verdicts, a row for each model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.schema import Params
from distillery.evaluation.gather import TOKEN_SCORES
from distillery.evaluation.perturbations import contrast_pairs_right
from distillery.evaluation.reading import read_result_file
from distillery.evaluation.results import ROLES, TRAINED_ROLES, ModelResult, Results


def compare_accuracy(results: Results, a: ModelResult, b: ModelResult | None) -> dict[str, float] | None:
    """Accuracy of a minus that of b on the same rows: mean, low, high, p, detectable; None when there is no such b.

    p is the larger of the bootstrap's, which draws groups and runs, and the permutation test's, which swaps groups.
    """
    if b is None or a.source != b.source:
        return None
    test, e = results.tests[a.source], results.params.evaluate
    gold, groups = test["label"].to_numpy(dtype=object), test["group"]
    found = metrics.paired_difference(
        gold, a.predictions, b.predictions, results.labels[a.source], groups, e.bootstrap, e.confidence, e.seed
    )["accuracy"]
    swapped = metrics.permutation_test(a.predictions == gold, b.predictions == gold, groups, e.bootstrap, e.seed)
    return found | {"p": max(found["p"], swapped)}


def calibration_scores(results: Results, line: ModelResult) -> dict[str, float]:
    """How far `line` may be trusted to know its errors, as it is and with a temperature fitted on validation rows."""
    gold = metrics.encode_labels(results.tests[line.source]["label"], results.labels[line.source])
    chosen_on = metrics.encode_labels(results.validations[line.source]["label"], results.labels[line.source])
    rows = []
    for run, held_out in zip(line.probabilities, line.validation, strict=True):
        temperature = metrics.fit_temperature(chosen_on, held_out)
        scaled = metrics.apply_temperature(run, temperature)
        row = {"temperature": temperature, "ece_scaled": metrics.calibration(gold, scaled)["ece"]}
        rows.append(row | {"log_loss_scaled": metrics.log_loss(gold, scaled)})
    return pd.DataFrame(rows).mean().to_dict()


AVERAGED_SCORES = ("balanced_accuracy", "macro_specificity", "weighted_f1", "mcc", "answer_bias", "commonest_answer")


PROBABILITY_SCORES = ("log_loss", "brier", "ece", "risk_coverage_area")


LABEL_SCORES = ("precision", "recall", "specificity")


SPEED_COLUMNS = ("sentences_per_second", "latency_p50_ms", "latency_p95_ms", "memory_mb")


def leaderboard(results: Results, timing: dict[str, dict[str, float]] | None = None) -> pd.DataFrame:
    """One row a model, best accuracy first. Scores are means over seeds, in [0, 1], with percentile intervals.

    timing: as in :class:`Measurements` (wall clock).
    verdict, teacher_verdict: `better` or `worse` than its control, or its teacher, when p, corrected for the number of
    all these comparisons (Holm), is under 1 - confidence; `no evidence` otherwise.
    """
    e, rows = results.params.evaluate, []
    close = teacher_closeness(results).set_index(["model", "teacher"])
    for line in results.models:
        test, labels = results.tests[line.source], results.labels[line.source]
        gold, groups = test["label"].to_numpy(dtype=object), test["group"]
        drawn = metrics.bootstrap_scores(gold, line.predictions, labels, groups, e.bootstrap, e.seed)
        row: dict[str, Any] = {"model": line.name, "role": line.role, "source": line.source}
        row["seeds"] = len(line.predictions)
        row |= {"parameters": line.parameters, "trainable": line.trainable}
        row["megabytes"] = None if line.size_bytes is None else line.size_bytes / 1e6
        for score, mean in metrics.mean_scores(gold, line.predictions, labels).items():
            low, high = metrics.interval(drawn[score], e.confidence)
            row |= {score: mean, f"{score}_low": low, f"{score}_high": high}
        probabilities = [None] * len(line.predictions) if line.probabilities is None else line.probabilities
        reports = [
            metrics.classification_report(gold, said, p, labels)
            for said, p in zip(line.predictions, probabilities, strict=True)
        ]
        row |= line.token_scores or {}
        row |= {
            k: float(np.mean([r[k] for r in reports]))
            for k in (*AVERAGED_SCORES, *PROBABILITY_SCORES)
            if k in reports[0]
        }
        row |= {
            f"{score}_{label}": float(np.mean([report["labels"][label][score] for report in reports]))
            for label in labels
            for score in LABEL_SCORES
        }
        pairs, number = contrast_pairs_right(line.predictions == gold, gold, groups)
        row |= {"pairs_right": float(pairs.mean()), "pairs": number}
        if line.validation is not None:
            row |= calibration_scores(results, line)
        if (line.name, line.teacher) in close.index:
            alike = close.loc[(line.name, line.teacher)]
            row |= {"kl_to_teacher": alike["kl"], "agreement_with_teacher": alike["agreement"]}
        row |= (timing or {}).get(line.name, {}) | {"train_seconds": line.seconds, "training_mb": line.training_mb}
        if line.role in ("student", "control"):
            taught_by = results.teacher_of(line) if line.role == "student" else None
            for other, start in ((results.find(line.control), ""), (taught_by, "teacher_")):
                difference = compare_accuracy(results, line, other)
                if difference:
                    row[f"{start}versus"] = other.name
                    row |= {f"{start}difference{end}": difference[key]
                            for end, key in (("", "mean"), ("_low", "low"), ("_high", "high"))}  # fmt: skip
                    row |= {f"{start}p": difference["p"], f"{start}detectable": difference["detectable"]}
        rows.append(row)

    columns = ["model", "role", "source", "seeds", "parameters", "trainable", "megabytes"]
    columns += [f"{score}{end}" for score in metrics.SCORES for end in ("", "_low", "_high")]
    columns += [k for k in TOKEN_SCORES if any(k in row for row in rows)]
    columns += [
        *AVERAGED_SCORES,
        *PROBABILITY_SCORES,
        "temperature",
        "ece_scaled",
        "log_loss_scaled",
        "pairs_right",
        "pairs",
    ]
    columns += [f"{score}_{label}" for score in LABEL_SCORES for label in _all_labels(results)]
    columns += ["kl_to_teacher", "agreement_with_teacher", *SPEED_COLUMNS, "train_seconds", "training_mb"]
    for start in ("", "teacher_"):
        columns += [f"{start}{c}" for c in ("versus", "difference", "difference_low", "difference_high", "p")]
        columns += [f"{start}detectable", f"{start}verdict"]
    board = pd.DataFrame(rows).reindex(columns=columns)
    board[["parameters", "trainable"]] = board[["parameters", "trainable"]].astype("Int64")
    _add_verdicts(board, e.confidence)
    order = [ROLES.index(role) for role in board["role"]]
    board = board.assign(_order=order).sort_values(["accuracy", "_order", "model"], ascending=[False, True, True])
    return board.drop(columns="_order").reset_index(drop=True)


def compare_with_published(params: Params, board: pd.DataFrame) -> pd.DataFrame:
    """The source's figures beside this run's: model, score, published, this run, low, high (its interval), note.

    board: as :func:`leaderboard` makes it. What it has no score for is empty.
    """
    rows, source = [], params.test_source(params.evaluate.headline)
    found = board.set_index("model")
    # where several sources are tested, a teacher has a line for each
    found = found.rename(index={f"{teacher} on {source}": teacher for teacher in params.teachers})
    for claim in params.recipe.published if params.recipe else []:
        for score, value in claim.scores.items():
            row = {"model": claim.model, "score": score, "published": value, "note": claim.note}
            for column, name in {"this run": score, "low": f"{score}_low", "high": f"{score}_high"}.items():
                known = claim.model in found.index and name in found
                row[column] = found.loc[claim.model, name] if known else None
            rows.append(row)
    return pd.DataFrame(rows, columns=["model", "score", "published", "this run", "low", "high", "note"])


def _add_verdicts(board: pd.DataFrame, confidence: float) -> None:
    """Correct all p of `board` for their number, in place, and put every comparison into a word."""
    p = board[["p", "teacher_p"]].astype(float).to_numpy().copy()
    p[~np.isnan(p)] = metrics.holm(p[~np.isnan(p)])
    for i, start in enumerate(("", "teacher_")):
        board[f"{start}p"] = p[:, i]
        board[f"{start}verdict"] = [
            None if np.isnan(x) else "no evidence" if x >= 1 - confidence else "better" if d > 0 else "worse"
            for x, d in zip(p[:, i], board[f"{start}difference"].astype(float), strict=True)
        ]


def count_comparisons(board: pd.DataFrame) -> int:
    """How many comparisons the p of `board` are corrected for."""
    return int(board["p"].notna().sum() + board["teacher_p"].notna().sum())


def _all_labels(results: Results) -> list[str]:
    return list(dict.fromkeys(label for labels in results.labels.values() for label in labels))


def phase_accuracies(root: Path, results: Results) -> pd.DataFrame:
    """What each phase gave: model, after phase (0: as it was built), accuracy on the validation rows (mean over seeds;
    test rows are asked about at both ends only) and gain over the phase before."""
    params, parts = results.params, []
    for name in params.students:
        gold = results.validations[params.test_source(name)].set_index("id")["label"]
        runs = [read_result_file(root / f"runs/{name}-{seed}/phases.parquet", root) for seed in params.seeds]
        rows = pd.concat(runs, ignore_index=True)
        rows = rows[rows["split"] == "validation"]
        mean = rows["prediction"].eq(rows["id"].map(gold)).groupby(rows["phase"]).mean()
        found = {"model": name, "after phase": mean.index, "accuracy": mean.to_numpy(), "gain": mean.diff().to_numpy()}
        parts.append(pd.DataFrame(found))
    return pd.concat(parts, ignore_index=True)


def teacher_closeness(results: Results) -> pd.DataFrame:
    """How far every student answers as each teacher does, a row a pair: model, teacher, agreement, kl.

    agreement: share of test rows with the same answer; kl: mean KL(teacher || student) in nats; means over seeds.
    """
    rows = []
    for line in (line for line in results.models if line.role in ("student", "control", "untrained")):
        for (teacher, source), signal in results.signals.items():
            if source == line.source:
                taught = np.stack(signal["probabilities"].to_numpy())
                same = line.predictions == signal["prediction"].to_numpy(object)
                kl = np.mean([metrics.kl_divergence(taught, p).mean() for p in line.probabilities])
                rows.append({"model": line.name, "teacher": teacher, "agreement": float(same.mean()), "kl": float(kl)})
    return pd.DataFrame(rows, columns=["model", "teacher", "agreement", "kl"])


HEADLINE_SCORES = (
    *("accuracy", "macro_f1", "mcc", "ece", "pairs_right", "difference", "teacher_difference", "kl_to_teacher"),
    "agreement_with_teacher",
)


def summarize(results: Results, board: pd.DataFrame) -> dict[str, Any]:
    """What `dvc metrics` shows: the headline with its intervals, then two scores a model. No wall clock in here."""
    head = board.set_index("model").loc[results.headline.name]
    keys = [c for k in HEADLINE_SCORES for c in (k, f"{k}_low", f"{k}_high") if c in board]
    out: dict[str, Any] = {"headline": {k: round(float(head[k]), 6) for k in keys if pd.notna(head[k])}}
    trained = board[board["role"].isin(TRAINED_ROLES)]
    for score in metrics.SCORES:
        out[score] = {m: round(float(v), 6) for m, v in zip(trained["model"], trained[score], strict=True)}
    return out
