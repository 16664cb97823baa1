"""A teacher whose answers were read from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from distillery.config.schema import AnswerFilesConfig
from distillery.data.cleaning import normalize_text
from distillery.data.readers import read_rows
from distillery.errors import UserError
from distillery.tasks.parsing import first_sentence, parse_explained_label, parse_label
from distillery.tasks.schema import Task


def read_answer_files(spec: AnswerFilesConfig, task: Task, base: Path) -> pd.DataFrame:
    """Answers of an external LLM out of files below `base`, a row each, in their order.

    Returns at (file and line), key (id, or the text as :func:`normalize_text` leaves it), label (None if it cannot be
    read), explanation, fate: `kept`, `repeats the answer before`, or `cannot be read`.
    Raises UserError naming the file, and the line or the column, when something is missing there.
    """
    columns, out = spec.columns, []
    for file in spec.files:
        raw, before = read_rows(file, base), None
        for name in filter(None, vars(columns).values()):
            if name not in raw.rows[0]:
                raise UserError(f"{file}: no column `{name}`; there are: {', '.join(raw.rows[0])}")
        for i, row in enumerate(raw.rows):
            key = row.get(columns.id or columns.text)
            if key in (None, ""):
                raise UserError(f"{raw.at(i)}: `{columns.id or columns.text}` is empty")
            if columns.answer:
                label, explanation = parse_explained_label(task, str(row.get(columns.answer) or ""))
            else:
                label = parse_label(task, str(row.get(columns.label) or ""))
                explanation = str(row.get(columns.explanation) or "").strip() if columns.explanation else ""
            said = (label, explanation)
            repeated = explanation and before is not None and before[0] != key and before[1] == said
            before = (key, said)
            fate = "kept" if label else "cannot be read"
            if repeated and spec.repeats == "drop":
                fate = "repeats the answer before"
            out.append((raw.at(i), normalize_text(str(key)), label, explanation, fate))
    return pd.DataFrame(out, columns=["at", "key", "label", "explanation", "fate"])


class FileTeacher:
    """Answers that were read from files, as a teacher. answers: see :func:`read_answer_files`."""

    arch, model = "answers", None

    def __init__(self, answers: pd.DataFrame, task: Task, by: str = "text"):
        self.answers, self.task, self.by = answers, task, by
        usable = answers[answers["fate"] != "repeats the answer before"]
        self.known = dict(list(usable.groupby("key")))

    def keys(self, rows: pd.DataFrame) -> list[str]:
        return [normalize_text(value) for value in rows[self.by]]

    def covered(self, rows: pd.DataFrame) -> np.ndarray:
        """Which of `rows` (id, text) it has an answer for: [n] bool."""
        return np.array([key in self.known for key in self.keys(rows)], dtype=bool)

    def look_up(self, rows: pd.DataFrame) -> np.ndarray:
        """Share of the answers to each of `rows` that gave each label [n, labels]; NaN where none could be read."""
        out = np.full((len(rows), len(self.task.names)), np.nan)
        for i, key in enumerate(self.keys(rows)):
            said = self.known[key]["label"].dropna() if key in self.known else ()
            if len(said):
                out[i] = [(said == name).mean() for name in self.task.names]
        return out

    def explanations(self, rows: pd.DataFrame, labels: Sequence[str]) -> list[str | None]:
        """What it gave as the reason for `labels`, one of each of `rows`; None where it did not answer so."""
        out = []
        for key, label in zip(self.keys(rows), labels, strict=True):
            found = self.known.get(key)
            reasons = [] if found is None else found["explanation"][found["label"] == label].tolist()
            out.append(first_sentence(" ".join(reasons[0].split())) or None if reasons else None)
        return out
