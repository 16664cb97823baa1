"""The rows that a student can learn most from, chosen by its own predictions at the start of a phase."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from distillery import losses
from distillery.config.schema import ActiveSelection, PhaseConfig
from distillery.files import write_json
from distillery.models.label_model import LabelModel
from distillery.training.processes import from_first
from distillery.training.rows import TrainingRows
from distillery.training.sharding import choose_methods, predict_in_step


def select_rows(student: LabelModel, rows: TrainingRows, phase: PhaseConfig, file: Path, title: str) -> TrainingRows:
    """The share of `rows` that `phase.select` keeps, by what `student` predicts now, in the order of `rows`.

    Of equal scores the earlier row counts. file: where the choice is kept, for a run that continues: its student would
    have been trained since. Prints the scores of the chosen rows and of all.
    """
    if phase.select is None:
        return rows

    def predict() -> np.ndarray:
        return student.predict(rows.texts, n_options=rows.n_options)

    if student.sharded is not None and not from_first(file.exists):  # then all processes predict, all rows
        choose_methods(student, student.encode(rows.texts))
        probabilities = predict_in_step(student, predict)
        return rows.subset(from_first(lambda: _choose(lambda: probabilities, rows, phase.select, file, title)))
    return rows.subset(from_first(lambda: _choose(predict, rows, phase.select, file, title)))


def _choose(
    predict: Callable[[], np.ndarray], rows: TrainingRows, select: ActiveSelection, file: Path, title: str
) -> list[int]:
    """The indices of the chosen rows: those in `file`, or new ones, which are then written there.

    predict: gives the student's probabilities [n, labels].
    """
    if file.exists():
        return json.loads(file.read_text())
    scores = row_scores(predict(), rows, select.by)
    wanted = max(1, math.ceil(select.share * len(rows)))
    chosen = sorted(np.argsort(-scores, kind="stable")[:wanted].tolist())
    mean = f"{scores[chosen].mean():.3f} nats on average, {scores.mean():.3f} of all rows"
    print(f"{title}: {wanted:,} of {len(rows):,} rows by {select.by}: {mean}", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, chosen)
    return chosen


def row_scores(probabilities: np.ndarray, rows: TrainingRows, by: str) -> np.ndarray:
    """What speaks for each row [n], in nats, by the student's `probabilities` [n, labels].

    `doubt`: the entropy of its prediction. `disagreement`: the Kullback-Leibler divergence of its prediction from the
    teachers' mixed distribution. Of label sets the sum over the labels.
    """
    student = torch.from_numpy(probabilities).double()
    if rows.are_sets:
        student = losses.two_outcome_probabilities(student)
    log_student = student.clamp_min(1e-12).log()
    if by == "doubt":
        scores = -(student * log_student)
    else:
        teacher = rows.logprobs.double().exp()
        scores = teacher * (teacher.clamp_min(1e-12).log() - log_student)
    return scores.flatten(1).sum(-1).numpy()
