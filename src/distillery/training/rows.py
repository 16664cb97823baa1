"""The rows of a phase: labels, mixed teacher distributions, rationales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
import torch

from distillery import losses, metrics
from distillery.config.schema import DIVERGENCES, PhaseConfig, PseudoLabelFilter
from distillery.errors import UserError
from distillery.label_sets import LabelSets, membership
from distillery.tasks.schema import ANSWER_LABELS, N_OPTIONS, Task, accepted_answers
from distillery.training.pseudo_labels import select_pseudo_labels


@dataclass
class TrainingRows:
    """The rows of a phase. targets [n]: label indices (gold, or the teachers' where there is no gold label).

    Of label sets targets [n, labels] are 1 for a label of the row and 0 for another one.
    logprobs [n, labels]: the teachers' mixed distribution at T = 1, None when the phase has no teacher. Of label sets
    [n, labels, 2], the distributions over `no` and `yes`.
    rationales [n]: text, or None where there is none. teacher_weights {teacher: [n]}: weight of each teacher in a mix.
    teacher_folds {teacher: [n]}: the fold whose model may score a row. label_prior [labels]: shares of the gold labels.
    answers: of a `qa` task, the texts that targets are indices of. accepted_answers [n]: the right ones, for scores.
    teacher_answers {teacher: [n]}: its own answer to each row of a `qa` task, or None.
    n_options [n]: of a `choice` task, how many labels have an option. gold [n]: which targets are gold; None: all.
    ids [n]: split_ref and id, where the rows come from a file.
    teacher_targets [n]: of validation rows, where `early_stopping.metric` is `agreement`, see :func:`teacher_targets`.
    """

    texts: list[str]
    targets: np.ndarray
    logprobs: torch.Tensor | None = None
    rationales: list[str | None] | None = None
    teacher_weights: dict[str, torch.Tensor] | None = None
    teacher_folds: dict[str, list[int]] | None = None
    label_prior: torch.Tensor | None = None
    answers: list[str] | None = None
    accepted_answers: list[str] | None = None
    teacher_answers: dict[str, list[str | None]] | None = None
    n_options: list[int] | None = None
    gold: np.ndarray | None = None
    ids: list[tuple[str, str]] | None = None
    teacher_targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, rows: Sequence[int]) -> TrainingRows:
        """The rows of these positions alone."""

        def take(value: Any) -> Any:
            if isinstance(value, list):
                return [value[i] for i in rows]
            if isinstance(value, dict):
                return {key: take(part) for key, part in value.items()}
            return None if value is None else value[list(rows)]

        whole = ("label_prior", "answers")  # of labels, not of rows
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return TrainingRows(**{name: value if name in whole else take(value) for name, value in values.items()})

    @property
    def are_sets(self) -> bool:
        """Whether a row has a set of labels in place of one."""
        return self.targets.ndim == 2

    def label_distributions(self) -> torch.Tensor:
        """[n, labels]: one-hot of a gold label, and where there is none the teachers' mixed distribution."""
        targets = torch.as_tensor(self.targets)
        n_labels = -1 if self.logprobs is None else self.logprobs.shape[1]
        one_hot = torch.nn.functional.one_hot(targets, n_labels).double()
        if self.logprobs is None or self.gold is None:
            return one_hot
        return torch.where(torch.as_tensor(self.gold)[:, None], one_hot, self.logprobs.double().exp())


def phase_rows(
    frame: pd.DataFrame, phase: PhaseConfig, labels: Sequence[str], scores: dict[str, float] | None = None
) -> TrainingRows:
    """The rows of `phase` out of a student's `rows.parquet`, with its teachers' distributions mixed.

    frame: columns split_ref, text, label, `probabilities_<teacher>` (over `labels`), and where they are wanted
    `fold_<teacher>` and rationale. scores: each teacher's validation accuracy, for `mix: validation`.
    A row for which no teacher of the phase has a signal is left out; of several teachers, those that have one count.
    Raises UserError when a phase has no row, or no rationale to learn from.
    """
    rows = frame[frame["split_ref"].isin(phase.data)].reset_index(drop=True)
    if list(labels) == list(ANSWER_LABELS) and len(rows):
        return question_rows(rows, phase)
    if phase.teachers:
        if phase.pseudo_labels != PseudoLabelFilter():
            rows = rows[select_pseudo_labels(rows, phase)].reset_index(drop=True)
        rows = rows[_has_signal(rows, phase).any(0)].reset_index(drop=True)
    if rows.empty:
        raise UserError(f"phases: no row in {', '.join(phase.data)}")
    index = {label: i for i, label in enumerate(labels)}
    if isinstance(labels, LabelSets):
        return _set_rows(rows, phase, labels)
    training_rows = TrainingRows(rows["text"].tolist(), np.array([index.get(label, -1) for label in rows["label"]]))
    if "id" in rows:
        training_rows.ids = list(zip(rows["split_ref"], rows["id"], strict=True))
    if N_OPTIONS in rows:
        training_rows.n_options = rows[N_OPTIONS].tolist()
    if phase.trains_on_rationales:
        training_rows.rationales = _row_rationales(rows, phase)
    if "label_prior" in phase.loss:
        gold = frame["label"].map(index).dropna().to_numpy(int, copy=True)
        counts = torch.bincount(torch.from_numpy(gold), minlength=len(labels))
        training_rows.label_prior = counts.double() if counts.sum() else torch.ones(len(labels))
    if phase.teachers:
        _add_teachers(training_rows, rows, phase, len(labels), scores)
    return training_rows


def teacher_targets(
    rows: pd.DataFrame, phase: PhaseConfig, labels: Sequence[str], scores: dict[str, float] | None = None
) -> np.ndarray:
    """[n]: the index of the label that the teachers of `phase`, mixed as it mixes them, give each of `rows`.

    rows: id, text, and `probabilities_<teacher>` over `labels`. Below 0 where no teacher has a distribution. scores: as
    in :func:`phase_rows`.
    """
    unlabelled = rows.assign(split_ref=phase.data[0], label=None)
    every = {"loss": {"kl": 1.0}, "pseudo_labels": PseudoLabelFilter(), "rationales": False}
    taught = phase_rows(unlabelled, phase.model_copy(update=every), labels, scores)
    by_id = {identifier: target for (_, identifier), target in zip(taught.ids, taught.targets, strict=True)}
    return np.array([by_id.get(identifier, -1) for identifier in rows["id"]])


def label_targets(labels: pd.Series, names: Sequence[str]) -> np.ndarray:
    """The gold `labels` as targets of :class:`TrainingRows`."""
    if isinstance(names, LabelSets):
        return membership(labels, names).astype(np.float32)
    return np.array([names.index(label) for label in labels])


def _set_rows(rows: pd.DataFrame, phase: PhaseConfig, names: LabelSets) -> TrainingRows:
    """As :func:`phase_rows` for label sets. Of several teachers the mean of their probabilities counts.

    Where there is no gold set, the labels that the teachers find likelier than not are the target.
    """
    training_rows = TrainingRows(rows["text"].tolist(), label_targets(rows["label"], names))
    if not phase.teachers:
        return training_rows
    missing = np.full(len(names), np.nan)
    by_teacher = [
        np.stack([missing if p is None else p for p in rows[f"probabilities_{teacher}"]]) for teacher in phase.teachers
    ]
    has_signal = torch.from_numpy(_has_signal(rows, phase).astype(np.float64))
    weights = has_signal / has_signal.sum(0)  # [teachers, n]
    probabilities = torch.from_numpy(np.stack(by_teacher)).double().nan_to_num(0.0)
    mixed = (probabilities * weights[:, :, None]).sum(0).clamp(0, 1)
    training_rows.logprobs = losses.two_outcome_probabilities(mixed).log().float()
    gold = rows["label"].notna().to_numpy()
    predicted = (mixed >= metrics.DEFAULT_THRESHOLD).numpy().astype(np.float32)
    training_rows.gold, training_rows.targets = gold, np.where(gold[:, None], training_rows.targets, predicted)
    _set_folds(training_rows, rows, phase)
    training_rows.teacher_weights = dict(zip(phase.teachers, weights, strict=True))
    return training_rows


def _has_signal(rows: pd.DataFrame, phase: PhaseConfig) -> np.ndarray:
    """[teachers, n]: which teachers of `phase` have a distribution for which of `rows`."""
    return np.stack([rows[f"probabilities_{teacher}"].notna() for teacher in phase.teachers])


def _row_rationales(rows: pd.DataFrame, phase: PhaseConfig) -> list[str | None]:
    """[n]: the rationale of each row, or None. Raises UserError when no row has one."""
    rationales = rows["rationale"].tolist() if "rationale" in rows else []
    rationales = [rationale if isinstance(rationale, str) else None for rationale in rationales]  # of pandas: nan
    if not any(rationales):
        raise UserError(f"phases: no row in {', '.join(phase.data)} has a rationale; set the teacher's `rationales`")
    return rationales


def _add_teachers(
    training_rows: TrainingRows,
    rows: pd.DataFrame,
    phase: PhaseConfig,
    n_labels: int,
    scores: dict[str, float] | None,
) -> None:
    """Set the mixed distribution, the teachers' weights and folds, and the targets of rows without a gold label."""
    uniform = np.full(n_labels, 1 / n_labels)  # of weight 0
    probabilities = [
        np.stack([uniform if p is None else p for p in rows[f"probabilities_{teacher}"]]) for teacher in phase.teachers
    ]
    logprobs = torch.from_numpy(np.stack(probabilities)).double().log()
    weights = _teacher_weights(logprobs, torch.from_numpy(training_rows.targets), phase, scores)
    has_signal = _has_signal(rows, phase)
    if not has_signal.all():
        weights = weights.reshape(len(weights), -1) * torch.from_numpy(has_signal)
    training_rows.logprobs = losses.mix_teachers(logprobs, weights).float()
    predicted = training_rows.logprobs.argmax(-1).numpy()
    training_rows.gold = training_rows.targets >= 0
    training_rows.targets = np.where(training_rows.targets < 0, predicted, training_rows.targets)
    by_row = weights if weights.dim() == 2 else weights[:, None].expand(-1, len(rows))
    training_rows.teacher_weights = dict(zip(phase.teachers, by_row, strict=True))
    _set_folds(training_rows, rows, phase)


def _set_folds(training_rows: TrainingRows, rows: pd.DataFrame, phase: PhaseConfig) -> None:
    """Set the folds of the teachers, where `rows` name them."""
    if f"fold_{phase.teachers[0]}" in rows:
        folds = {teacher: rows[f"fold_{teacher}"].fillna(-1) for teacher in phase.teachers}
        training_rows.teacher_folds = {teacher: fold.astype(int).tolist() for teacher, fold in folds.items()}


def _teacher_weights(
    logprobs: torch.Tensor, targets: torch.Tensor, phase: PhaseConfig, scores: dict[str, float] | None
) -> torch.Tensor:
    """[teachers] or [teachers, n]: weights as `phase.mix` sets them. targets [n]: gold labels, below 0 for none."""
    if phase.mix == "confidence":
        with_gold = losses.confidence_weights(logprobs, targets.clamp_min(0))
        return torch.where(targets >= 0, with_gold, losses.confidence_weights(logprobs))
    if phase.mix == "validation":
        return torch.tensor([scores[teacher] for teacher in phase.teachers], dtype=torch.double)
    return torch.ones(len(phase.teachers), dtype=torch.double)


def gold_rows(rows: pd.DataFrame, task: Task) -> TrainingRows:
    """Gold `rows` (text, label; accepted `answers` of a `qa` task) for the fine-tuning of a teacher."""
    if task.kind != "qa":
        return TrainingRows(rows["text"].tolist(), label_targets(rows["label"], task.names))
    return _answered_rows(rows, [accepted_answers(answers)[0] for answers in rows["answers"]])


def question_rows(rows: pd.DataFrame, phase: PhaseConfig) -> TrainingRows:
    """As :func:`phase_rows` for a `qa` task: gold answers, and where there are none that of the first teacher with one.

    Raises UserError for a loss or an order that needs a distribution over labels, and for a row without an answer.
    """
    label_terms = {"label_prior", "rationale", *(DIVERGENCES if phase.space == "labels" else ())}
    wrong = [f"loss.{term}" for term in phase.loss if term in label_terms]
    wrong += ["order: confidence"] if phase.order == "confidence" else []
    wrong += ["rationales"] if phase.rationales else []
    wrong += [
        key
        for key in ("pseudo_labels", "mix", "select")
        if getattr(phase, key) != PhaseConfig.model_fields[key].default
    ]
    if wrong:
        raise UserError(f"phases: {wrong[0]}: answers are free text, not labels; use `ce`, or `space: vocabulary`")
    gold = rows["answers"] if "answers" in rows else [None] * len(rows)  # a pool's are hidden
    answers = [accepted_answers(accepted)[0] if isinstance(accepted, str) else None for accepted in gold]
    for teacher in phase.teachers:
        answers = [known or answer for known, answer in zip(answers, rows[f"answer_{teacher}"], strict=True)]
    if not all(answers):
        missing = answers.count(None) + answers.count("")
        raise UserError(f"phases: {missing} rows of {', '.join(phase.data)} have no answer")
    training_rows = _answered_rows(rows, answers)
    if phase.teachers:
        training_rows.teacher_answers = {teacher: rows[f"answer_{teacher}"].tolist() for teacher in phase.teachers}
        training_rows.teacher_weights = {
            teacher: torch.ones(len(rows), dtype=torch.double) for teacher in phase.teachers
        }
        training_rows.teacher_folds = {
            teacher: rows[f"fold_{teacher}"].astype(int).tolist() for teacher in phase.teachers
        }
    return training_rows


def _answered_rows(rows: pd.DataFrame, answers: list[str]) -> TrainingRows:
    """`rows` with the free `answers` [n], whose distinct texts are the labels."""
    distinct = list(dict.fromkeys(answers))
    index = {answer: i for i, answer in enumerate(distinct)}
    targets = np.array([index[answer] for answer in answers])
    return TrainingRows(rows["text"].tolist(), targets, answers=distinct)
