"""Scores of a student on validation rows while it learns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from distillery.label_sets import sets_of
from distillery.models.label_model import LabelModel
from distillery.models.predictions import answer_losses, predict_rows, score_predictions
from distillery.tasks.schema import N_OPTIONS
from distillery.training.rows import TrainingRows
from distillery.training.shared_predictions import predict_together


def validation_scores(student: LabelModel, rows: TrainingRows) -> dict[str, float]:
    """`eval_accuracy`, `eval_macro_f1` and `eval_loss` (nats) of `student` on `rows`.

    Where `rows` have the labels of its teachers also `eval_agreement`, see :func:`agreement`.

    The F1 of free answers is the mean over rows of the words' F1.

    The loss is the mean over rows of the cross-entropy of the gold label. Of free answers it is that of the first
    accepted answer's tokens and its end token, each after the gold ones before it: the mean over all tokens, as `ce` of
    a training is.
    """
    names = student.task.names
    labels = sets_of(rows.targets > 0, names) if rows.are_sets else [names[i] for i in rows.targets]
    frame = pd.DataFrame({"id": "", "text": rows.texts, "label": labels})
    if rows.accepted_answers is not None:
        frame["answers"] = rows.accepted_answers
    if rows.n_options is not None:
        frame[N_OPTIONS] = rows.n_options
    predictions = predict_together(student, {"validation": frame}, _predict_with_losses)
    report = score_predictions(predictions, names)
    loss = report["log_loss"]
    if "answer_nll" in predictions:
        loss = float(predictions["answer_nll"].sum() / predictions["answer_tokens"].sum())
    f1 = report.get("token_f1", report["macro_f1"])
    scores = {"eval_accuracy": report["accuracy"], "eval_macro_f1": f1, "eval_loss": loss}
    if rows.teacher_targets is not None:
        scores["eval_agreement"] = agreement(predictions["prediction"].tolist(), rows.teacher_targets, names)
    return scores


def agreement(predictions: Sequence[str], targets: np.ndarray, names: Sequence[str]) -> float:
    """The share of `predictions` [n] that are the label of `targets` [n], in [0, 1].

    targets: indices of `names`; rows where they are below 0 do not count.
    """
    given = targets >= 0
    same = [names[target] == prediction for prediction, target in zip(predictions, targets, strict=True)]
    return float(np.array(same)[given].mean())


def _predict_with_losses(student: LabelModel, rows: pd.DataFrame) -> pd.DataFrame:
    """:func:`predict_rows`, of free answers joined with :func:`answer_losses`."""
    predictions = predict_rows(student, rows)
    return predictions.join(answer_losses(student, rows)) if student.task.kind == "qa" else predictions
