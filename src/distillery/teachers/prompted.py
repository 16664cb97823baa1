"""Prediction with solved examples and calibration, for every teacher that is prompted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from distillery.tasks.schema import N_OPTIONS, FewShotExample
from distillery.teachers.calibration import Calibration, calibrated
from distillery.teachers.few_shot import GoldExamples

MIN_SHARED_EXAMPLES = 4  # rows with the same solved examples from which it pays to predict them in batches of their own
NO_FREE_ANSWERS = "params.yaml: teachers: free answers come from `kind: lm` and `seq2seq` only, so far"


@dataclass(kw_only=True)
class PromptedTeacher(ABC):
    """A model that is prompted for its `task`, with its solved examples and its calibration.

    examples: solved examples from gold rows; None: the first `few_shot` of the task file. calibration: of its
    predictions, see :func:`distillery.teachers.prompt_search.estimate_calibration`; None: not at all.
    """

    examples: GoldExamples | None = None
    calibration: Calibration | None = None

    @abstractmethod
    def predict_texts(
        self,
        texts: Sequence[str],
        solved: Sequence[Sequence[FewShotExample]] | None = None,
        n_options: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Uncalibrated probabilities [n, labels].

        solved: examples for each text; None: those of the task file. n_options: of a `choice` task, how many labels
        have an option.
        """

    @abstractmethod
    def render(self, text: str, solved: Sequence[FewShotExample] | None) -> str:
        """The prompt for `text` as one string. solved: its examples; None: those of the task file."""

    def predict(self, rows: pd.DataFrame) -> np.ndarray:
        """Probabilities over the task's labels [n, labels] for `rows` (text, group; of a `choice` task n_options); NaN
        where no label can be read.

        Rows with the same examples share a prefix, so they are predicted together and the prefix is read once.
        """
        texts, n_options = rows["text"].tolist(), rows.get(N_OPTIONS)
        if self.examples is None:
            return calibrated(self.predict_texts(texts, None, n_options), self.calibration)
        chosen = self.examples.choose(texts, rows["group"].tolist())
        counts = Counter(chosen)
        batches: dict[tuple[int, ...] | None, list[int]] = {}  # None: rows whose examples too few others share
        for i, positions in enumerate(chosen):
            shared = counts[positions] >= MIN_SHARED_EXAMPLES
            batches.setdefault(positions if shared else None, []).append(i)
        probabilities = np.zeros((len(rows), len(self.task.names)), dtype=np.float32)
        for indices in batches.values():
            solved = [self.examples.at(chosen[i]) for i in indices]
            limits = None if n_options is None else n_options.iloc[indices]
            probabilities[indices] = self.predict_texts([texts[i] for i in indices], solved, limits)
        return calibrated(probabilities, self.calibration)

    def prompt(self, row: pd.Series) -> str:
        """The prompt for one row (text, group), character for character."""
        if self.examples is None:
            return self.render(row["text"], None)
        (positions,) = self.examples.choose([row["text"]], [row["group"]])
        return self.render(row["text"], self.examples.at(positions))
