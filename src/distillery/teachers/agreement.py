"""Several teachers together: votes, pseudo-labels and their precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.schema import Params
from distillery.data.storage import read_split
from distillery.files import Paths


def teacher_votes(root: Path, params: Params, source: str, split: str = "pool") -> tuple[pd.DataFrame, np.ndarray]:
    """The labels of every teacher of `source` for the rows of `split` that all of them have a signal for.

    Returns the rows (id, text, one column of labels per teacher; None where its answer could not be read) and the
    probabilities [teachers, n, labels].
    """
    rows = read_split(Paths(root).processed(source), split)[["id", "text"]]
    signals: dict[str, pd.DataFrame] = {}
    for name in params.teachers:
        if source in params.teacher_sources(name):
            table = pd.read_parquet(Paths(root).teacher(name) / "signals.parquet")
            signals[name] = table[(table["source"] == source) & (table["split"] == split)].set_index("id")
            rows = rows[rows["id"].isin(signals[name].index)]
    signals = {name: table.loc[rows["id"]] for name, table in signals.items()}
    labels = {name: table["label"].to_numpy(object) for name, table in signals.items()}
    votes = rows.reset_index(drop=True).assign(**labels)
    if votes.empty:
        return votes, np.zeros((len(signals), 0, 0))
    probabilities = [np.stack(table["probabilities"].to_list()) for table in signals.values()]
    return votes, np.stack(probabilities).astype(np.float64)


def combine_votes(votes: pd.DataFrame, probabilities: np.ndarray, labels: Sequence[str]) -> pd.DataFrame:
    """Pseudo-labels of several teachers: id, label, confidence, agree.

    label and confidence are those of the mean distribution, or of the mean probabilities of each label (see
    :func:`metrics.decide`, :func:`metrics.confidence`); agree: whether all teachers give that label, or that set.
    votes, probabilities: see :func:`teacher_votes`.
    """
    mean = probabilities.mean(0)
    label = metrics.decide(mean, labels)
    agree = (votes[votes.columns.drop(["id", "text"])].to_numpy(object) == label[:, None]).all(1)
    confidence = metrics.confidence(mean, label, labels)
    return pd.DataFrame({"id": votes["id"], "label": label, "confidence": confidence, "agree": agree})


def pseudo_label_precision(pseudo: pd.DataFrame, gold: Sequence[str], confidences: Sequence[float]) -> pd.DataFrame:
    """Precision of the pseudo-labels that each selection leaves: rows, coverage, precision with a 95 % interval.

    pseudo: see :func:`combine_votes`. gold: the true labels, which only score. One line per minimum confidence, without
    and with agreement of all teachers.
    """
    right, lines = pseudo["label"].to_numpy(object) == np.asarray(gold, dtype=object), []
    for agree in (False, True):
        for min_confidence in confidences:
            selected = (pseudo["confidence"] >= min_confidence).to_numpy() & (pseudo["agree"].to_numpy() | (not agree))
            line = {"all teachers agree": agree, "confidence from": min_confidence, "rows": int(selected.sum())}
            line |= {
                "coverage": selected.mean(),
                "precision": right[selected].mean() if selected.any() else np.nan,
            }
            if selected.any():
                resampled = metrics.cluster_bootstrap(right[selected], pseudo["id"][selected])
                line["low"], line["high"] = metrics.interval(resampled)
            lines.append(line)
    return pd.DataFrame(lines)
