"""A teacher whose answers were read from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.schema import AnswerFilesConfig
from distillery.data.label_sets import LabelSetReader
from distillery.data.labels import LabelReader
from distillery.data.nested import open_paths
from distillery.data.readers import read_rows
from distillery.data.records import RawRows, normalize_text
from distillery.errors import UserError
from distillery.label_sets import rows_with
from distillery.tasks.parsing import first_sentence, parse_explained_label, parse_label
from distillery.tasks.schema import Task
from distillery.teachers.calibration import Calibration, calibrated
from distillery.teachers.prompted import NO_FREE_ANSWERS

REPEATED = "repeats the answer before"
UNREADABLE = "cannot be read"
MAX_ROUNDING = 0.01  # by which rounded probabilities may miss 1


def read_answer_files(spec: AnswerFilesConfig, task: Task, base: Path) -> pd.DataFrame:
    """Answers of an external LLM from files below `base`, one row per answer, in the order of the files.

    Returns at (file and line), key (id, or the text as :func:`normalize_text` returns it), label (None if it cannot be
    read), probabilities (of all labels, or None), explanation, paraphrase (empty if there is none), status: `kept`,
    `repeats the answer before`, or `cannot be read`. Raises UserError naming the file, and the line or the column, when
    something is missing there, for explanations or paraphrases that no file has, and for probabilities that are none.
    """
    columns, answers = spec.columns, []
    key_column = columns.id or columns.text
    if columns.answer and task.kind == "multilabel":
        raise UserError(
            "params.yaml: teachers: answers.columns.answer: holds one label and its explanation; a task of `kind: "
            "multilabel` needs `label` or `probabilities`"
        )
    if columns.probabilities and set(columns.probabilities) != set(task.names):
        raise UserError(
            f"params.yaml: teachers: answers.columns.probabilities names {', '.join(columns.probabilities)}; "
            f"the labels are {', '.join(task.names)}"
        )
    present: dict[str, None] = {}  # the columns of all files, in their order
    for file in spec.files:
        records, previous = open_paths(read_rows(file, base), [*columns.names, *columns.optional_names]), None
        for column in columns.names:
            if column not in records.rows[0]:
                raise UserError(f"{file}: no column `{column}`; there are: {', '.join(records.rows[0])}")
        present |= dict.fromkeys(column for row in records.rows for column in row)
        read_label = _label_function(spec, task, records)
        for i, row in enumerate(records.rows):
            key = row.get(key_column)
            if key in (None, ""):
                raise UserError(f"{records.at(i)}: `{key_column}` is empty")
            label, explanation = _read_answer(spec, task, row, read_label)
            probabilities = None
            if columns.probabilities:
                probabilities = _read_probabilities(columns.probabilities, task, row, records.at(i))
                label = np.asarray(metrics.decide(np.array(probabilities), task.names)).item()
            # a script that kept its last answer when a call failed repeats it for another text
            repeated = (
                explanation and previous is not None and previous[0] != key and previous[1:] == (label, explanation)
            )
            previous = (key, label, explanation)
            status = "kept" if label else UNREADABLE
            if repeated and spec.repeats == "drop":
                status = REPEATED
            paraphrase = str(row.get(columns.paraphrase) or "").strip() if columns.paraphrase else ""
            key = normalize_text(str(key))
            answers.append((records.at(i), key, label, probabilities, explanation, paraphrase, status))
    for column in columns.optional_names:
        if column not in present:
            raise UserError(f"{', '.join(spec.files)}: no column `{column}`; there are: {', '.join(present)}")
    names = ["at", "key", "label", "probabilities", "explanation", "paraphrase", "status"]
    return pd.DataFrame(answers, columns=names)


def _read_probabilities(columns: dict[str, str], task: Task, row: dict[str, Any], at: str) -> list[float]:
    """The probabilities [labels] in one record, which sum to 1; of label sets each from 0 to 1. Raises UserError."""
    try:
        values = [float(row[columns[name]]) for name in task.names]
    except (TypeError, ValueError):
        values = []
    total, each = sum(values), task.kind == "multilabel"
    if each and values and min(values) >= 0 and max(values) <= 1:
        return values
    if each or not values or min(values) < 0 or not abs(total - 1) <= MAX_ROUNDING:
        shown = ", ".join(f"{column} {row.get(column)}" for column in columns.values())
        rule = "" if each else " that sum to 1"
        raise UserError(f"{at}: probabilities must be numbers from 0 to 1{rule}, not {shown}")
    return [value / total for value in values]


def _label_function(spec: AnswerFilesConfig, task: Task, records: RawRows) -> Callable[[Any], str | None]:
    """What finds the label, or the label set, in a value of the column of labels of `records`; None if it cannot."""
    column = spec.columns.label
    if task.kind != "multilabel" or column is None:
        return lambda value: parse_label(task, str(value or ""))
    words = {task.word(name): name for name in task.names}
    reader = LabelSetReader(LabelReader(task.names, words), task.names, (row.get(column) for row in records.rows))

    def read(value: Any) -> str | None:
        try:
            return reader.read("", column, value)
        except UserError:
            return None

    return read


def _read_answer(
    spec: AnswerFilesConfig, task: Task, row: dict[str, Any], read_label: Callable[[Any], str | None]
) -> tuple[str | None, str]:
    """(label, explanation) of one record; the label is None if it cannot be read."""
    columns = spec.columns
    explanation = str(row.get(columns.explanation) or "").strip() if columns.explanation else ""
    if columns.probabilities:
        return None, explanation
    if columns.answer:
        return parse_explained_label(task, str(row.get(columns.answer) or ""))
    return read_label(row.get(columns.label)), explanation


class FileTeacher:
    """Answers from files as a teacher. answers: see :func:`read_answer_files`. by: the column of rows with the keys.

    calibration: see :func:`distillery.teachers.prompt_search.estimate_calibration`; None: not calibrated.
    """

    model = None

    def __init__(self, answers: pd.DataFrame, task: Task, by: str = "text", calibration: Calibration | None = None):
        self.answers, self.task, self.by, self.calibration = answers, task, by, calibration
        self.answers_by_key = dict(list(answers[answers["status"] != REPEATED].groupby("key")))
        self.paraphrases_by_key = dict(zip(answers["key"], answers["paraphrase"], strict=True))

    def keys(self, rows: pd.DataFrame) -> list[str]:
        """The keys of `rows` (id, text) in `answers_by_key`."""
        return [normalize_text(value) for value in rows[self.by]]

    def covered(self, rows: pd.DataFrame) -> np.ndarray:
        """Whether each of `rows` (id, text) has an answer: [n] bool."""
        return np.array([key in self.answers_by_key for key in self.keys(rows)], dtype=bool)

    def predict(self, rows: pd.DataFrame) -> np.ndarray:
        """The mean of the answers to each of `rows` [n, labels], a label or set without probabilities counting as sure.

        NaN where none could be read.
        """
        shares = np.full((len(rows), len(self.task.names)), np.nan)
        for i, key in enumerate(self.keys(rows)):
            if key not in self.answers_by_key:
                continue
            answers = self.answers_by_key[key].dropna(subset="label")
            if answers["probabilities"].notna().any():
                shares[i] = np.mean(answers["probabilities"].tolist(), axis=0)
            elif len(answers):
                names = self.task.names
                shares[i] = [rows_with(answers["label"], name, names).mean() for name in names]
        return calibrated(shares, self.calibration)

    def explanations(self, rows: pd.DataFrame, labels: Sequence[str]) -> list[str | None]:
        """The first sentence of its explanation of each label, one label per row; None where it gave another label.

        Of several answers with that label the first that has an explanation counts.
        """
        sentences = []
        for key, label in zip(self.keys(rows), labels, strict=True):
            answers = self.answers_by_key.get(key)
            texts = [] if answers is None else answers["explanation"][answers["label"] == label]
            explanation = next(filter(None, texts), "")
            sentences.append(first_sentence(" ".join(explanation.split())) or None)
        return sentences

    def paraphrases(self, rows: pd.DataFrame, sample: int) -> list[str]:
        """The paraphrase number `sample` of each of `rows` (id); empty where the files have none."""
        return [self.paraphrases_by_key.get(normalize_text(f"{row_id}#{sample}"), "") for row_id in rows["id"]]

    def prompt(self, row: pd.Series) -> str:
        """The text of `row` and the answers to it: the prompt is not known. Raises KeyError when it has no answer."""
        (key,) = self.keys(pd.DataFrame([row]))
        return f"{row['text']}\n\n{self.answers_by_key[key].drop(columns='key').to_string(index=False)}"

    def answer(self, rows: pd.DataFrame, max_new_tokens: int) -> list[str]:
        raise UserError(NO_FREE_ANSWERS)

    def generate(self, conversations: Sequence[list[dict[str, str]]], **settings: Any) -> list[str]:
        raise UserError("params.yaml: teachers: `kind: answers` generates no text")
