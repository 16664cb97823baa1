"""A signal for each row, and its scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from distillery.errors import UserError
from distillery.models.label_model import LabelModel
from distillery.models.predictions import score_answers, score_predictions
from distillery.teachers.file import FileTeacher
from distillery.teachers.local import answer_cached, predict_labels

if TYPE_CHECKING:
    from distillery.teachers.api.teacher import ApiTeacher


def signal_table(
    rows: pd.DataFrame, probabilities: np.ndarray, names: Sequence[str], fold: np.ndarray | int
) -> pd.DataFrame:
    """One signal a row: source, split, id (from `rows`), label, probabilities, fold (-1: the teacher on all gold).

    Where no answer could be read (NaN) the label is None: scored as wrong, taught to nobody; all labels are then
    equally likely.
    """
    unread = np.isnan(probabilities).any(-1)
    probabilities = np.where(unread[:, None], 1 / len(names), probabilities)
    return pd.DataFrame(
        {
            "source": rows["source"].tolist(),
            "split": rows["split"].tolist(),
            "id": rows["id"].tolist(),
            "label": pd.Series(np.where(unread, None, np.array(names, object)[probabilities.argmax(-1)]), dtype=object),
            "probabilities": list(probabilities.astype(np.float32)),
            "fold": np.broadcast_to(np.asarray(fold), len(rows)).astype(int),
            "rationale": None,
            "contradicts": None,  # whether the rationale argues for another label
        }
    )


def label_rows(
    teacher: LabelModel | ApiTeacher | FileTeacher, rows: pd.DataFrame, fold: np.ndarray | int, max_new_tokens: int
) -> pd.DataFrame:
    """What `teacher` says of `rows`, as :func:`signal_table` tells it.

    Of a `qa` task the label is whether its answer is accepted, and there are the columns `answer` and its scores.
    """
    if teacher.task.kind != "qa":
        return signal_table(rows, predict_labels(teacher, rows), teacher.task.names, fold)
    if not isinstance(teacher, LabelModel):
        raise UserError("params.yaml: teachers: free answers are asked of `kind: lm` and `seq2seq` only, so far")
    judged = score_answers(rows, answer_cached(teacher, rows["text"].tolist(), max_new_tokens))
    out = signal_table(rows, np.stack(judged["probabilities"].to_list()), teacher.task.names, fold)
    return out.join(judged.drop(columns=["id", "label", "prediction", "probabilities"]))


def score_signals(rows: pd.DataFrame, said: pd.DataFrame, names: Sequence[str]) -> dict[str, dict]:
    """Scores of the signals `said` against the gold labels of `rows` that have one, per split; and how many answers
    could not be read."""
    keys = ["source", "split", "id"]
    wanted = [*keys, "label", "probabilities", *(column for column in said if column.startswith("token_"))]
    both = rows[[*keys, "label"]].dropna(subset="label").merge(said[wanted].rename(columns={"label": "prediction"}))
    return {
        split: score_predictions(part, names) | {"unparsable": int(part["prediction"].isna().sum())}
        for split, part in both.groupby("split", sort=False)
    }
