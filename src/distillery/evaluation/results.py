"""The results of an evaluation as typed objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.schema import Params
from distillery.label_sets import LabelSets
from distillery.tasks.schema import Task

ERROR_KINDS = (
    "only the teacher is right",
    "only the student is right",
    "both wrong",
    "both right",
    "wrong",
    "right",
)

ROLES = ("student", "control", "export", "teacher", "untrained", "majority")

TRAINED_ROLES = ("student", "control", "teacher")


@dataclass(frozen=True)
class ModelResult:
    """One row of the leaderboard: a model's predictions of the test rows of `source`, over its seeds."""

    name: str
    key: str  # its name in params (of the student it starts from, for an untrained one)
    role: str  # one of ROLES
    source: str
    predictions: np.ndarray  # [seeds, rows] labels
    probabilities: np.ndarray | None = None  # [seeds, rows, K]
    token_scores: dict[str, float] | None = None  # mean scores of free answers' words
    answers: np.ndarray | None = None  # [rows] free answers of the first seed
    validation: np.ndarray | None = None  # [seeds, validation rows, K]
    parameters: int | None = None
    trainable: int | None = None
    size_bytes: int | None = None
    tokens_per_row: dict[str, float] | None = None  # mean `input` and `output` tokens of a teacher behind an endpoint
    seconds: float | None = None  # wall clock of its training, mean over seeds
    cut_texts: dict[str, int] | None = None  # see :func:`distillery.models.cut_texts.count_cut_texts`
    training_mb: float | None = None  # peak memory of its training, largest of the seeds
    training_gpu_mb: float | None = None  # as training_mb, on the GPU that it was trained on
    teacher: str | None = None  # key of the teacher it is compared with
    control: str | None = None  # key of the student it is compared with
    is_further: bool = False  # a student on a source of its task that it was not chosen on


@dataclass(frozen=True)
class Check:
    """One thing that would make the numbers worthless, and whether the check for it passed."""

    kind: str  # leak, contamination or shortcut
    passed: bool
    text: str
    models: tuple[str, ...] = ()  # names of the models it concerns; all of them when empty


@dataclass(frozen=True)
class Results:
    """Everything that the report is made of."""

    params: Params
    tasks: dict[str, Task]  # of each source
    labels: dict[str, list[str]]  # of each source, in the order of probability vectors
    tests: dict[str, pd.DataFrame]  # of each source
    validations: dict[str, pd.DataFrame]  # of each source
    models: list[ModelResult]
    signals: dict[tuple[str, str], pd.DataFrame]  # (teacher, source) -> its test signals, in the order of the rows
    history: pd.DataFrame  # model, seed, phase (from 1), step, loss
    audits: dict[str, Any]
    counts: dict[str, Any] | None  # of the augmentation: candidates, and reasons -> number
    checks: list[Check]

    @property
    def headline(self) -> ModelResult:
        return self.find(self.params.evaluate.headline)

    @property
    def are_sets(self) -> bool:
        """Whether the headline predicts label sets."""
        return isinstance(self.labels[self.headline.source], LabelSets)

    def find(self, key: str | None, source: str | None = None) -> ModelResult | None:
        """The student (or control) called `key` on `source`, or on its own one; None when there is no such model."""
        named = [m for m in self.models if m.key == key and m.role in TRAINED_ROLES[:2]]
        return next((m for m in named if (m.source == source if source else not m.is_further)), None)

    def teacher_of(self, result: ModelResult) -> ModelResult | None:
        """The teacher that `result` is compared with, on the same source; None when it has none."""
        wanted = (result.teacher, result.source)
        return next((m for m in self.models if m.role == "teacher" and (m.key, m.source) == wanted), None)

    def decide(self, result: ModelResult, probabilities: np.ndarray, seed: int = 0) -> np.ndarray:
        """The predictions [n] for `probabilities` [n, K]; of label sets with :meth:`thresholds`."""
        return metrics.decide(probabilities, self.labels[result.source], self.thresholds(result, seed))

    def thresholds(self, result: ModelResult, seed: int = 0) -> np.ndarray | None:
        """The thresholds of label sets that the validation rows of `result` choose [K]; None of other labels.

        seed: position among the seeds of `result`.
        """
        labels = self.labels[result.source]
        if not isinstance(labels, LabelSets) or result.validation is None:
            return None
        gold = self.validations[result.source]["label"].to_numpy(object)
        return metrics.choose_thresholds(gold, result.validation[seed], labels)

    @property
    def compared(self) -> list[ModelResult]:
        """The headline, its control and its teacher, as far as they exist and were tested on the same rows."""
        head = self.headline
        related = [head, self.find(head.control, head.source), self.teacher_of(head)]
        return [result for result in related if result is not None]

    @property
    def of_confusion(self) -> list[ModelResult]:
        """The models of `evaluate.confusion` that were tested on the headline's rows, or `compared`."""
        source, keys = self.headline.source, self.params.evaluate.confusion
        by_key = {m.key: m for m in self.models if m.role in TRAINED_ROLES and m.source == source}
        return [by_key[key] for key in keys if key in by_key] or self.compared


def main_teacher(params: Params, student: str) -> str | None:
    """The first teacher of `student`; a control is compared with the teacher of the student it is the control of."""
    names = [t for phase in params.students[student].phases for t in phase.teachers]
    if not names:
        counterparts = [s for s, spec in params.students.items() if spec.control == student]
        names = [t for s in counterparts for phase in params.students[s].phases for t in phase.teachers]
    return names[0] if names else None
