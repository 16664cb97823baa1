"""Predictions of rows as tables, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.models.label_model import LabelModel
from distillery.tasks.schema import ANSWER_LABELS, Task, accepted_answers


def predict_rows(student: LabelModel, rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` (id, text, label) with what `student` says of them: id, label, prediction, probabilities.

    Of a `qa` task (rows with accepted `answers`) the prediction is `right` or `wrong`, with more columns: answer
    (what was written), token_f1, token_precision, token_recall.
    """
    names, told = student.task.names, rows["text"].tolist()
    if student.task.kind == "qa":
        return score_answers(rows, student.answer_questions(told))
    probabilities = student.predict(told)
    return pd.DataFrame(
        {
            "id": rows["id"].tolist(),
            "label": rows["label"].tolist(),
            "prediction": [names[i] for i in probabilities.argmax(-1)],
            "probabilities": list(probabilities),
        }
    )


def find_alerts(said: pd.DataFrame, task: Task) -> pd.DataFrame:
    """Which of the predictions `said` call for an alert, the gravest first: id, alert (the label), confidence (its
    probability) and severity, the task's severities weighted by the probabilities, both in [0, 1]."""
    p = np.stack(said["probabilities"].to_list()) if len(said) else np.zeros((0, len(task.names)))
    grave = np.array([task.severity.get(name, 0.0) for name in task.names])
    out = pd.DataFrame({"id": said["id"], "alert": said["prediction"], "confidence": p.max(-1), "severity": p @ grave})
    out = out[np.array([task.severity.get(label, 0) > 0 for label in out["alert"]], dtype=bool)]
    return out.sort_values(["severity", "id"], ascending=[False, True], ignore_index=True)


def score_answers(rows: pd.DataFrame, said: Sequence[str]) -> pd.DataFrame:
    """Scores of the answers `said` to `rows` (id, label, accepted `answers`); see :func:`predict_rows`."""
    # a question whose answer nobody knows has none that is right
    pairs = [
        (text, accepted_answers(known)) if isinstance(known, str) else (None, [""])
        for text, known in zip(said, rows["answers"], strict=True)
    ]
    right = np.array([metrics.exact_match(*pair) for pair in pairs])
    shared = [metrics.token_overlap(*pair) for pair in pairs]
    out = pd.DataFrame(shared, columns=["token_f1", "token_precision", "token_recall"]).astype(float)
    out.insert(0, "answer", list(said))
    out.insert(0, "probabilities", list(np.stack([right, 1 - right], 1).astype(np.float32)))
    out.insert(0, "prediction", np.where(right == 1, *ANSWER_LABELS))
    out.insert(0, "label", rows["label"].tolist())
    out.insert(0, "id", rows["id"].tolist())
    return out


def predict_splits(student: LabelModel, asked: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """What `student` says of the rows of every split in `asked`: split, and the columns of :func:`predict_rows`."""
    columns = ["split", "id", "label", "prediction", "probabilities"]
    parts = [predict_rows(student, rows) for rows in asked.values()]
    parts = [part.assign(split=split)[["split", *part]] for split, part in zip(asked, parts, strict=True)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def score_predictions(rows: pd.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """Every score of the predictions in `rows` (label, prediction, probabilities); of free answers also exact_match
    and the mean token scores."""
    report = metrics.classification_report(
        rows["label"].tolist(), rows["prediction"].tolist(), np.stack(rows["probabilities"].to_list()), names
    )
    if "token_f1" in rows:
        report["exact_match"] = report["accuracy"]
        report |= {key: float(rows[key].mean()) for key in ("token_f1", "token_precision", "token_recall")}
    return report
