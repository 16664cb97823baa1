"""A signal for each row, and its scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.label_sets import LabelSets
from distillery.models.predictions import score_answers, score_predictions, validation_thresholds
from distillery.teachers.base import Teacher

KEYS = ["source", "split", "id"]  # columns that together name one row


def signal_table(
    rows: pd.DataFrame,
    probabilities: np.ndarray,
    names: Sequence[str],
    fold: np.ndarray | int,
    thresholds: np.ndarray | None = None,
) -> pd.DataFrame:
    """One signal per row: source, split, id (from `rows`), label, probabilities, fold (-1: the teacher on all gold).

    probabilities: [n, labels]. Where no answer could be read (NaN) the label is None, which scores as wrong and trains
    no student, and all labels are equally likely. thresholds: [labels] of label sets, see :func:`metrics.decide`.
    """
    unreadable = np.isnan(probabilities).any(-1)
    unknown = metrics.DEFAULT_THRESHOLD if isinstance(names, LabelSets) else 1 / len(names)
    probabilities = np.where(unreadable[:, None], unknown, probabilities)
    labels = np.where(unreadable, None, metrics.decide(probabilities, names, thresholds))
    return pd.DataFrame(
        {
            "source": rows["source"].tolist(),
            "split": rows["split"].tolist(),
            "id": rows["id"].tolist(),
            "label": pd.Series(labels, dtype=object),
            "probabilities": list(probabilities.astype(np.float32)),
            "fold": np.broadcast_to(np.asarray(fold), len(rows)).astype(int),
            "rationale": None,
            "contradicts": None,  # whether the rationale argues for another label
        }
    )


def label_rows(
    teacher: Teacher,
    rows: pd.DataFrame,
    fold: np.ndarray | int,
    max_new_tokens: int,
    thresholds: np.ndarray | None = None,
) -> pd.DataFrame:
    """The signals of `teacher` for `rows`, as :func:`signal_table` returns them.

    thresholds: [labels] of a `multilabel` task; None: those of the validation rows among `rows`, 0.5 without any.

    For a `qa` task the label is whether its answer is accepted; the table then also has the answers and their scores.
    Raises UserError when this kind of teacher gives no free answers.
    """
    names = teacher.task.names
    if teacher.task.kind != "qa":
        signals = signal_table(rows, teacher.predict(rows), names, fold, thresholds)
        return signals if thresholds is not None else decide_signals(rows, signals, names)
    scored = score_answers(rows, teacher.answer(rows, max_new_tokens))
    signals = signal_table(rows, np.stack(scored["probabilities"].to_list()), names, fold)
    return signals.join(scored.drop(columns=["id", "label", "prediction", "probabilities"]))


def signal_thresholds(rows: pd.DataFrame, signals: pd.DataFrame, names: Sequence[str]) -> np.ndarray | None:
    """The threshold of each label [labels] by the gold sets of the validation rows among `rows` and their `signals`.

    None without such rows, and where `names` are no label sets.
    """
    readable = signals.loc[signals["label"].notna(), [*KEYS, "probabilities"]]
    return validation_thresholds(rows[[*KEYS, "label"]].merge(readable, on=KEYS), names)


def decide_signals(rows: pd.DataFrame, signals: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """`signals` of label sets with the labels that reach :func:`signal_thresholds`; those of other labels unchanged."""
    thresholds = signal_thresholds(rows, signals, names)
    if thresholds is None:
        return signals
    labels = metrics.decide(np.stack(signals["probabilities"].to_list()), names, thresholds)
    return signals.assign(label=np.where(signals["label"].isna(), None, labels))


def score_signals(rows: pd.DataFrame, signals: pd.DataFrame, names: Sequence[str]) -> dict[str, dict]:
    """Scores of `signals` against the gold labels of `rows` that have one: split -> scores and number unparsable."""
    columns = [*KEYS, "label", "probabilities", *(column for column in signals if column.startswith("token_"))]
    predicted = signals[columns].rename(columns={"label": "prediction"})
    scored = rows[[*KEYS, "label"]].dropna(subset="label").merge(predicted)
    return {
        split: score_predictions(part, names) | {"unparsable": int(part["prediction"].isna().sum())}
        for split, part in scored.groupby("split", sort=False)
    }
