"""Predictions of rows as tables, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from distillery import metrics
from distillery.label_sets import LabelSets
from distillery.models.batches import batches_by_length
from distillery.models.label_model import LabelModel
from distillery.tasks.schema import ANSWER_LABELS, N_OPTIONS, Task, accepted_answers


def predict_rows(model: LabelModel, rows: pd.DataFrame, thresholds: np.ndarray | None = None) -> pd.DataFrame:
    """The predictions of `model` for `rows` (id, text, label; of a `choice` task n_options).

    thresholds: [labels] of a `multilabel` task, see :func:`metrics.decide`.

    Columns: id, label, prediction, probabilities [labels].

    Of a `qa` task (rows with accepted `answers`) the table is that of :func:`score_answers`.
    """
    names, texts = model.task.names, rows["text"].tolist()
    if model.task.kind == "qa":
        return score_answers(rows, model.answer_questions(texts))
    probabilities = model.predict(texts, n_options=rows.get(N_OPTIONS))
    return pd.DataFrame(
        {
            "id": rows["id"].tolist(),
            "label": rows["label"].tolist(),
            "prediction": metrics.decide(probabilities, names, thresholds).tolist(),
            "probabilities": list(probabilities),
        }
    )


def find_alerts(predictions: pd.DataFrame, task: Task) -> pd.DataFrame:
    """The alerts among `predictions` (id, prediction, probabilities), the most severe first.

    Columns: id, alert (the label), confidence (its probability) and severity, the task's severities weighted by the
    probabilities, both in [0, 1].
    """
    p = np.stack(predictions["probabilities"].to_list()) if len(predictions) else np.zeros((0, len(task.names)))
    severities = np.array([task.severity.get(name, 0.0) for name in task.names])
    alerts = pd.DataFrame(
        {
            "id": predictions["id"],
            "alert": predictions["prediction"],
            "confidence": p.max(-1),
            "severity": p @ severities,
        }
    )
    alerts = alerts[np.array([task.severity.get(label, 0) > 0 for label in alerts["alert"]], dtype=bool)]
    return alerts.sort_values(["severity", "id"], ascending=[False, True], ignore_index=True)


def score_answers(rows: pd.DataFrame, answers: Sequence[str]) -> pd.DataFrame:
    """Scores of the predicted `answers` to `rows` (id, label, accepted `answers`) of a `qa` task.

    Columns: id, label, prediction (the first of `ANSWER_LABELS` for an accepted answer, else the second), probabilities
    (1 for the prediction), answer, token_f1, token_precision, token_recall. A row without accepted answers scores 0.
    """
    pairs = [
        (answer, accepted_answers(accepted)) if isinstance(accepted, str) else (None, [""])
        for answer, accepted in zip(answers, rows["answers"], strict=True)
    ]
    correct = np.array([metrics.exact_match(*pair) for pair in pairs])
    token_scores = pd.DataFrame(
        [metrics.token_overlap(*pair) for pair in pairs], columns=["token_f1", "token_precision", "token_recall"]
    )
    return pd.DataFrame(
        {
            "id": rows["id"].tolist(),
            "label": rows["label"].tolist(),
            "prediction": np.where(correct == 1, *ANSWER_LABELS),
            "probabilities": list(np.stack([correct, 1 - correct], 1).astype(np.float32)),
            "answer": list(answers),
        }
    ).join(token_scores.astype(float))


@torch.no_grad()
def answer_losses(model: LabelModel, rows: pd.DataFrame) -> pd.DataFrame:
    """What the first accepted answers to `rows` (text, `answers`) of a `qa` task cost `model`, without dropout.

    Columns: answer_nll, the sum of the negative log-likelihoods (nats) of the answer's tokens and its end token, each
    after the answer's own tokens before it; answer_tokens, their number. Both are 0 without accepted answers.
    """
    answers = [accepted_answers(accepted)[0] if isinstance(accepted, str) else None for accepted in rows["answers"]]
    answered = [i for i, answer in enumerate(answers) if answer is not None]
    losses = np.zeros((len(answers), 2))
    ids = model.encode(rows["text"].iloc[answered].tolist())
    labels, training = model.label_token_ids, model.model.training
    model.set_answers([answers[i] for i in answered])
    completions = [model.label_completion(k) for k in range(len(answered))]
    model.label_token_ids = labels  # a training's are those of its own rows
    model.model.eval()
    for batch in batches_by_length(ids, model.batch_size):
        outputs = model.forward([ids[k] for k in batch], [[completions[k]] for k in batch], label_space=False)
        lengths = [len(completions[k][0]) for k in batch]
        parts = outputs.completion_nll.double().split(lengths)
        losses[[answered[k] for k in batch]] = [(float(nll.sum()), n) for nll, n in zip(parts, lengths, strict=True)]
    model.model.train(training)
    return pd.DataFrame(losses, columns=["answer_nll", "answer_tokens"])


def predict_splits(
    model: LabelModel,
    splits: dict[str, pd.DataFrame],
    predict: Callable[[LabelModel, pd.DataFrame], pd.DataFrame] = predict_rows,
) -> pd.DataFrame:
    """The predictions of `model` for the rows of every split: split, and the columns of :func:`predict_rows`.

    predict: computes them for the rows of one split.
    Of a `multilabel` task the thresholds are those of the rows of `validation`, see :func:`decide_by_validation`.
    """
    columns = ["split", "id", "label", "prediction", "probabilities"]
    parts = [predict(model, rows) for rows in splits.values()]
    parts = [part.assign(split=split)[["split", *part]] for split, part in zip(splits, parts, strict=True)]
    predictions = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
    return decide_by_validation(predictions, model.task.names)


def decide_by_validation(predictions: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """`predictions` (split, label, probabilities) of label sets with the thresholds of their own validation rows.

    Those of other labels as they are. See :func:`validation_thresholds`.
    """
    thresholds = validation_thresholds(predictions, names)
    if thresholds is None:
        return predictions
    p = np.stack(predictions["probabilities"].to_list())
    return predictions.assign(prediction=metrics.decide(p, names, thresholds))


def validation_thresholds(predictions: pd.DataFrame, names: Sequence[str]) -> np.ndarray | None:
    """The threshold of each label [labels] by the rows of `validation` among `predictions`; None without such rows.

    None too where `names` are no label sets. See :func:`metrics.choose_thresholds`.
    """
    rows = predictions[(predictions["split"] == "validation") & predictions["label"].notna()]
    if rows.empty or not isinstance(names, LabelSets):
        return None
    return metrics.choose_thresholds(rows["label"].to_numpy(object), np.stack(rows["probabilities"].to_list()), names)


def score_predictions(rows: pd.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """Every score of the predictions in `rows` (label, prediction, probabilities) over the labels `names`.

    Of free answers also exact_match and the mean token scores.
    """
    report = metrics.classification_report(
        rows["label"].tolist(), rows["prediction"].tolist(), np.stack(rows["probabilities"].to_list()), names
    )
    if "token_f1" in rows:
        report["exact_match"] = report["accuracy"]
        report |= {key: float(rows[key].mean()) for key in ("token_f1", "token_precision", "token_recall")}
    return report
