"""`inference.json`: what a program needs beside a student's weights. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distillery.config.load import validate_section
from distillery.config.schema.base import Section
from distillery.data.records import normalize_text
from distillery.errors import UserError
from distillery.tasks.schema import Task

SETTINGS_FILE = "inference.json"
AGAIN = "copy the student's folder again, or where it was trained run: dvc repro --force --single-item evaluate"


class Abstention(Section):
    """The confidence below which a prediction is left out, chosen on the validation rows."""

    accuracy: float
    """Wanted accuracy of the rows that are answered."""
    threshold: float | None
    """Lowest calibrated confidence of an answered row; none where no confidence reaches the accuracy."""
    answered: float
    """Share of the validation rows that are answered."""
    accuracy_low: float | None
    """Lower end of the 95 % interval of the accuracy of these rows (Wilson)."""
    rows: int
    """Validation rows."""


class PredictionSets(Section):
    """The probability from which a label belongs to the prediction set of a row."""

    coverage: float
    """Wanted share of rows whose gold label is in their set."""
    threshold: float
    """Lowest calibrated probability of a label in a set."""


class InferenceSettings(Section):
    """How the texts of a student are prepared, and how its probabilities are read."""

    student: str
    """Name of the student in `params.yaml`."""
    arch: Literal["classifier", "causal", "seq2seq"]
    """As in `params.yaml`."""
    task: Task
    """The task, with the labels in the order of the probabilities."""
    text_columns: Annotated[list[str], Field(min_length=1)]
    """Columns that are joined with a space to the text of a row."""
    cleaning: Literal["nfc-spaces"] = "nfc-spaces"
    """Unicode NFC, runs of white space folded to one space: see `normalize_text`."""
    max_length: Annotated[int, Field(ge=1)]
    """Tokens of a text, with its prompt; a longer text loses its end."""
    prompt: str = "plain"
    """As in `params.yaml`."""
    few_shot: int = 0
    """As in `params.yaml`."""
    temperature: Annotated[float, Field(gt=0)]
    """Calibrated probabilities are proportional to p^(1 / temperature); fitted on the validation rows."""
    abstention: Abstention | None
    """When to abstain; none for free answers."""
    thresholds: list[float] | None = None
    """Of a `multilabel` task, for each label the probability from which it is predicted, chosen on validation rows."""
    prediction_sets: PredictionSets | None = None
    """Conformal prediction sets, where `evaluate.conformal_coverage` is given."""

    @model_validator(mode="after")
    def _thresholds_fit(self):
        wanted = len(self.task.labels) if self.task.kind == "multilabel" else 0
        if len(self.thresholds or []) != wanted:
            raise ValueError(f"`thresholds` has {len(self.thresholds or [])} values; this task has {wanted}")
        return self


def model_folder(student: Path) -> Path:
    """The model folder of `student`, which is that folder or that of its run. Raises UserError for any other folder."""
    for folder in (student, student / "model"):
        if (folder / SETTINGS_FILE).exists():
            return folder
    if not student.is_dir():
        raise UserError(f"{student}: no such folder; name that of a run, such as runs/tiny-kd-0")
    raise UserError(f"{student}: no {SETTINGS_FILE} here or in model/; the evaluation writes it: run `dvc repro`")


def read_settings(folder: Path) -> InferenceSettings:
    """The settings in a model `folder`. Raises UserError when the file is missing or damaged."""
    return read_section(InferenceSettings, folder / SETTINGS_FILE, AGAIN)


def read_section(kind: type[Section], path: Path, way_out: str) -> Any:
    """The JSON file `path` as an object of `kind`.

    Raises UserError when it is missing, damaged or no such object. way_out: the end of that line.
    """
    try:
        return validate_section(kind, json.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {way_out}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: no JSON; {way_out}") from None
    except UserError as error:
        raise UserError(f"{error}; {way_out}") from None


def is_unicode(text: str) -> bool:
    """Whether `text` can be written; half of a surrogate pair, which JSON can hold, is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def clean_text(row: Mapping[str, Any], columns: list[str], place: str) -> str:
    """The text of a `row`, cleaned as in training; empty where the columns are. place: of the row, for messages.

    Raises UserError for a value that is no text.
    """
    for column in columns:
        if row.get(column) is not None and not isinstance(row[column], str):
            raise UserError(f"{place}: `{column}` must be text, not {row[column]!r:.60}")
    return normalize_text(" ".join(row.get(column) or "" for column in columns))
