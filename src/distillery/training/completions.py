"""The completions that a phase supervises, and the kind of each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distillery.config.schema import PhaseConfig
from distillery.models.label_model import Completion, LabelModel
from distillery.training.rows import TrainingRows

ANSWER, RATIONALE, SAMPLED = range(3)  # the kinds of supervised tokens


def row_completions(model: LabelModel, rows: TrainingRows) -> list[list[Completion]]:
    """The completions of every row in the tokens of `model`: the answer, then the rationale if the row has one.

    For rows with free answers, those become the labels of `model`.
    """
    if rows.answers is not None:
        model.set_answers(rows.answers)
    rationales = rows.rationales or [None] * len(rows)
    return [model.row_completions(int(i), rationale) for i, rationale in zip(rows.targets, rationales, strict=True)]


def count_supervised(completions: Sequence[Completion]) -> int:
    """How many tokens of `completions` are supervised."""
    return sum(len(tokens) - skip for tokens, skip in completions)


@dataclass
class MicroBatch:
    """Rows that go through the student together.

    rows: their indices. completions [rows][any number]: what the student scores after each row; None when no term of
    the loss is over tokens. sampled [rows]: answers that the student, or a teacher behind an endpoint, generated, each
    of them also the last completion of its row; None when the completions are those of the data.
    counted: whether the loss counts them; else they only keep this process in step with others.
    """

    rows: list[int]
    completions: list[list[Completion]] | None = None
    sampled: list[Completion] | None = None
    counted: bool = True

    @cached_property
    def token_kinds(self) -> list[int]:
        """ANSWER, RATIONALE or SAMPLED for each supervised token, row after row."""
        kinds = []
        for row in self.completions or []:
            last = [] if self.sampled is None else [SAMPLED]
            row_kinds = [ANSWER, RATIONALE][: len(row) - len(last)] + last
            for kind, completion in zip(row_kinds, row, strict=True):
                kinds += [kind] * count_supervised([completion])
        return kinds

    @cached_property
    def supervised_tokens(self) -> list[int]:
        """[rows]: how many tokens of each row are supervised."""
        return [count_supervised(row) for row in self.completions or []]

    @cached_property
    def compared_tokens(self) -> list[int]:
        """[rows]: at how many tokens the student's vocabulary distribution is compared with a teacher's.

        These are the sampled tokens if there are any, else all supervised ones.
        """
        compared = self.completions if self.sampled is None else [[answer] for answer in self.sampled]
        return [count_supervised(row) for row in compared or []]


@dataclass
class StepCounts:
    """What one optimizer step, all its micro-batches together, holds of each kind: the denominators of the loss."""

    rows: int
    answer_tokens: int
    rationale_tokens: int
    compared_tokens: int

    @classmethod
    def of(cls, batches: Sequence[MicroBatch]) -> StepCounts:
        """The counts of an optimizer step that consists of `batches`."""
        kinds = [kind for batch in batches for kind in batch.token_kinds]
        return cls(
            rows=sum(len(batch.rows) for batch in batches),
            answer_tokens=kinds.count(ANSWER),
            rationale_tokens=kinds.count(RATIONALE),
            compared_tokens=sum(sum(batch.compared_tokens) for batch in batches),
        )


class PhaseCompletions:
    """The completions of a phase's rows in the student's tokens.

    by_row [n][any number]: None when no term of the loss is over tokens, as for a classifier.
    offsets [n + 1]: how many completions stand before those of each row.
    generated [n]: a teacher's own answers, with which the student is compared; None where it is at those of the data.
    """

    def __init__(
        self,
        student: LabelModel,
        rows: TrainingRows,
        phase: PhaseConfig,
        generated: Sequence[Completion] | None = None,
    ):
        self.generated = generated
        over_tokens = phase.space == "vocabulary" or {"ce", "uld", "rationale"} & set(phase.loss)
        self.by_row = row_completions(student, rows) if student.arch != "classifier" and over_tokens else None
        self.offsets = np.cumsum([0, *(len(row) for row in self.by_row or [])])
        # the completions of the data are scored beside sampled or generated ones for these terms alone
        self.beside_sampled = bool({"ce", "rationale"} & set(phase.loss))

    def micro_batch(self, rows: list[int], sampled: list[Completion] | None = None) -> MicroBatch:
        """The micro-batch of `rows`; `sampled` [rows]: answers to them that the student generated."""
        if self.by_row is None:
            return MicroBatch(rows)
        if sampled is None and self.generated is not None:
            sampled = [self.generated[i] for i in rows]
        if sampled is None:
            return MicroBatch(rows, [self.by_row[i] for i in rows])
        return MicroBatch(rows, [self._beside(i, answer) for i, answer in zip(rows, sampled, strict=True)], sampled)

    def _beside(self, row: int, answer: Completion) -> list[Completion]:
        return [*(self.by_row[row] if self.beside_sampled else []), answer]

    @property
    def off_policy(self) -> list[list[Completion]] | None:
        """[n][any number]: what the student scores of each row while it generates nothing itself."""
        if self.by_row is None or self.generated is None:
            return self.by_row
        return [self._beside(i, answer) for i, answer in enumerate(self.generated)]
