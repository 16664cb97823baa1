"""A teacher whose answers were read from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery.config.schema import AnswerFilesConfig
from distillery.data.readers import read_rows
from distillery.data.records import normalize_text
from distillery.errors import UserError
from distillery.tasks.parsing import first_sentence, parse_explained_label, parse_label
from distillery.tasks.schema import Task

REPEATED = "repeats the answer before"
UNREADABLE = "cannot be read"


def read_answer_files(spec: AnswerFilesConfig, task: Task, base: Path) -> pd.DataFrame:
    """Answers of an external LLM from files below `base`, one row per answer, in the order of the files.

    Returns at (file and line), key (id, or the text as :func:`normalize_text` returns it), label (None if it cannot be
    read), explanation, status: `kept`, `repeats the answer before`, or `cannot be read`.
    Raises UserError naming the file, and the line or the column, when something is missing there.
    """
    columns, answers = spec.columns, []
    key_column = columns.id or columns.text
    for file in spec.files:
        records, previous = read_rows(file, base), None
        for column in filter(None, vars(columns).values()):
            if column not in records.rows[0]:
                raise UserError(f"{file}: no column `{column}`; there are: {', '.join(records.rows[0])}")
        for i, row in enumerate(records.rows):
            key = row.get(key_column)
            if key in (None, ""):
                raise UserError(f"{records.at(i)}: `{key_column}` is empty")
            label, explanation = _read_answer(spec, task, row)
            # a script that kept its last answer when a call failed repeats it for another text
            repeated = (
                explanation and previous is not None and previous[0] != key and previous[1:] == (label, explanation)
            )
            previous = (key, label, explanation)
            status = "kept" if label else UNREADABLE
            if repeated and spec.repeats == "drop":
                status = REPEATED
            answers.append((records.at(i), normalize_text(str(key)), label, explanation, status))
    return pd.DataFrame(answers, columns=["at", "key", "label", "explanation", "status"])


def _read_answer(spec: AnswerFilesConfig, task: Task, row: dict[str, Any]) -> tuple[str | None, str]:
    """(label, explanation) of one record; the label is None if it cannot be read."""
    columns = spec.columns
    if columns.answer:
        return parse_explained_label(task, str(row.get(columns.answer) or ""))
    label = parse_label(task, str(row.get(columns.label) or ""))
    return label, str(row.get(columns.explanation) or "").strip() if columns.explanation else ""


class FileTeacher:
    """Answers from files as a teacher. answers: see :func:`read_answer_files`. by: the column of rows with the keys."""

    model = None

    def __init__(self, answers: pd.DataFrame, task: Task, by: str = "text"):
        self.answers, self.task, self.by = answers, task, by
        self.answers_by_key = dict(list(answers[answers["status"] != REPEATED].groupby("key")))

    def keys(self, rows: pd.DataFrame) -> list[str]:
        """The keys of `rows` (id, text) in `answers_by_key`."""
        return [normalize_text(value) for value in rows[self.by]]

    def covered(self, rows: pd.DataFrame) -> np.ndarray:
        """Whether each of `rows` (id, text) has an answer: [n] bool."""
        return np.array([key in self.answers_by_key for key in self.keys(rows)], dtype=bool)

    def predict(self, rows: pd.DataFrame) -> np.ndarray:
        """Share of the answers to each of `rows` that gave each label [n, labels]; NaN where none could be read."""
        shares = np.full((len(rows), len(self.task.names)), np.nan)
        for i, key in enumerate(self.keys(rows)):
            labels = self.answers_by_key[key]["label"].dropna() if key in self.answers_by_key else ()
            if len(labels):
                shares[i] = [(labels == name).mean() for name in self.task.names]
        return shares

    def explanations(self, rows: pd.DataFrame, labels: Sequence[str]) -> list[str | None]:
        """The first sentence of its explanation of each label, one label per row; None where it gave another label."""
        sentences = []
        for key, label in zip(self.keys(rows), labels, strict=True):
            answers = self.answers_by_key.get(key)
            given = [] if answers is None else answers["explanation"][answers["label"] == label].tolist()
            sentences.append(first_sentence(" ".join(given[0].split())) or None if given else None)
        return sentences

    def prompt(self, row: pd.Series) -> str:
        """The text of `row` and the answers to it: the prompt is not known. Raises KeyError when it has no answer."""
        (key,) = self.keys(pd.DataFrame([row]))
        return f"{row['text']}\n\n{self.answers_by_key[key].drop(columns='key').to_string(index=False)}"

    def answer(self, rows: pd.DataFrame, max_new_tokens: int) -> list[str]:
        raise UserError("params.yaml: teachers: free answers come from `kind: lm` and `seq2seq` only, so far")

    def generate(self, conversations: Sequence[list[dict[str, str]]], **settings: Any) -> list[str]:
        raise UserError("params.yaml: teachers: `kind: answers` generates no text")
