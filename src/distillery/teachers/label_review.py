"""Rows for a person to read: gold labels that are probably wrong, and pool rows whose label would teach most."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.files import atomic_write
from distillery.label_sets import membership, sets_of
from distillery.tasks.schema import Task
from distillery.teachers.signals import KEYS

MAX_ROWS_TO_LABEL = 500
REVIEWED_KINDS = ("classification", "multilabel")
ERROR_FILE, LABELLING_FILE = "label_errors.csv", "to_label.csv"
ERROR_COLUMNS = [*KEYS, "text", "label", "suggestion", "probability", "label_probability"]
LABELLING_COLUMNS = [*KEYS, "text", "suggestion", "probability", "margin", "entropy"]


def find_label_errors(rows: pd.DataFrame, signals: pd.DataFrame, task: Task) -> pd.DataFrame:
    """Rows whose gold label is probably wrong, the worst first, with the most probable label as `suggestion`.

    rows: source, split, id, text, label. signals: of a teacher that learned from none of these rows; for gold rows that
    it was tuned on, out of fold. The labels of a pool are unknown, so its rows are left out. `probability` is that of
    the suggestion, `label_probability` that of the label. Of label sets each label is looked at by itself, and the
    suggestion has the suspect ones the other way round. Empty for other kinds of task. See
    :func:`metrics.suspect_labels`.
    """
    known = rows[rows["label"].notna() & (rows["split"] != "pool")]
    merged = _with_probabilities(known, signals)
    if task.kind not in REVIEWED_KINDS or merged.empty:
        return pd.DataFrame(columns=ERROR_COLUMNS)
    if task.kind == "multilabel":
        return _set_errors(merged, task)[ERROR_COLUMNS].reset_index(drop=True)
    codes, p = metrics.encode_labels(merged["label"], task.names), np.stack(merged["probabilities"].to_list())
    merged = merged.assign(label_probability=p[np.arange(len(p)), codes], badness=-metrics.label_margin(codes, p))
    suspect = merged[metrics.suspect_labels(codes, p)].sort_values("badness", ascending=False, kind="stable")
    return _with_suggestion(suspect, task)[ERROR_COLUMNS].reset_index(drop=True)


def find_rows_to_label(rows: pd.DataFrame, signals: pd.DataFrame, task: Task) -> pd.DataFrame:
    """The pool rows that a person should label next: those with the smallest margin, at most `MAX_ROWS_TO_LABEL`.

    rows: source, split, id, text, group. Of a group of near-duplicates only one row is taken. `margin` is between the
    two most probable labels, `entropy` in nats; of label sets the margin is that of the least sure decision on a label,
    and the entropy is summed over labels. Empty for other kinds of task. See :func:`metrics.prediction_margin`.
    """
    merged = _with_probabilities(rows[rows["split"] == "pool"], signals)
    if task.kind not in REVIEWED_KINDS or merged.empty:
        return pd.DataFrame(columns=LABELLING_COLUMNS)
    p = np.stack(merged["probabilities"].to_list())
    if task.kind == "multilabel":
        outcomes = metrics.two_outcomes(p)
        margin = metrics.prediction_margin(outcomes).reshape(p.shape).min(1)
        merged = merged.assign(margin=margin, entropy=metrics.entropy(outcomes).reshape(p.shape).sum(1))
    else:
        merged = merged.assign(margin=metrics.prediction_margin(p), entropy=metrics.entropy(p))
    ranked = merged.sort_values("margin", kind="stable").drop_duplicates(["source", "group"])
    return _with_suggestion(ranked.head(MAX_ROWS_TO_LABEL), task)[LABELLING_COLUMNS].reset_index(drop=True)


def _set_errors(merged: pd.DataFrame, task: Task) -> pd.DataFrame:
    """As :func:`find_label_errors` for label sets. merged: rows with probabilities."""
    p, members = np.stack(merged["probabilities"].to_list()), membership(merged["label"], task.names)
    suspect = np.stack(
        [
            metrics.suspect_labels(members[:, k].astype(int), metrics.two_outcomes(p[:, k]))
            for k in range(len(task.names))
        ],
        axis=-1,
    )
    suggestion = sets_of(members ^ suspect, task.names)
    merged = merged.assign(
        suggestion=suggestion,
        probability=metrics.confidence(p, suggestion, task.names),
        label_probability=metrics.confidence(p, merged["label"], task.names),
    )
    return merged[suspect.any(1)].sort_values("label_probability", kind="stable")


def _with_probabilities(rows: pd.DataFrame, signals: pd.DataFrame) -> pd.DataFrame:
    return rows.merge(signals[[*KEYS, "probabilities"]], on=KEYS)


def _with_suggestion(rows: pd.DataFrame, task: Task) -> pd.DataFrame:
    p = np.stack(rows["probabilities"].to_list()) if len(rows) else np.zeros((0, len(task.names)))
    suggestion = metrics.decide(p, task.names)
    return rows.assign(suggestion=suggestion, probability=metrics.confidence(p, suggestion, task.names))


def write_review(folder: Path, errors: pd.DataFrame, to_label: pd.DataFrame) -> None:
    """Write both tables into `folder` as CSV files that spreadsheets open."""
    for name, table in ((ERROR_FILE, errors), (LABELLING_FILE, to_label)):
        with atomic_write(folder / name) as path:
            table.to_csv(path, index=False, float_format="%.4f", encoding="utf-8")


def read_label_errors(folder: Path) -> pd.DataFrame | None:
    """What :func:`write_review` wrote of label errors; None where it wrote nothing."""
    path = folder / ERROR_FILE
    if not path.exists():
        return None
    text = dict.fromkeys(ERROR_COLUMNS[:-2], str)
    return pd.read_csv(path, dtype=text, keep_default_na=False, encoding="utf-8")
