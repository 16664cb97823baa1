"""A language model as a teacher of label sets: a yes/no question about each label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distillery.tasks.prompts import label_question
from distillery.tasks.schema import FewShotExample, Task
from distillery.teachers.local import LocalTeacher


@dataclass(kw_only=True)
class YesNoTeacher(LocalTeacher):
    """A local language model that is only prompted, for a `multilabel` task.

    The probability of a label is that of `yes` against `no` after :func:`label_question`, whatever others get.
    sets: the task; that of `model` is the question about one of its labels.
    """

    sets: Task

    @property
    def task(self) -> Task:
        return self.sets

    def render(self, text: str, solved: Sequence[FewShotExample] | None) -> str:
        """The prompt about `text` and the first label as one string; there are no solved examples."""
        return self._about(self.sets.names[0]).render(text, None)

    def predict_texts(
        self,
        texts: Sequence[str],
        solved: Sequence[Sequence[FewShotExample]] | None = None,
        n_options: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Probabilities of the labels [n, labels], float32, each from 0 to 1."""
        return np.stack([self._about(label).predict_texts(texts)[:, 1] for label in self.sets.names], axis=-1)

    def _about(self, label: str) -> LocalTeacher:
        """The same model with the question about `label`."""
        self.model.task = label_question(self.sets, label)
        return LocalTeacher(self.model, self.cache)
