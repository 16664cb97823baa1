"""The rows of a phase: labels, mixed teacher distributions, rationales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from distillery import losses
from distillery.config.schema import DIVERGENCES, PhaseConfig, PseudoLabelFilter
from distillery.errors import UserError
from distillery.tasks.schema import ANSWER_LABELS, Task, accepted_answers


@dataclass
class TrainingRows:
    """What a phase learns from. targets [n]: label indices (gold, or the teachers' where there is no gold).

    logprobs [n, labels]: the teachers' mixed distribution at T = 1, None when the phase has no teacher.
    rationales [n]: text, or None where there is none. teacher_weights {teacher: [n]}: weight of each teacher in a mix.
    teacher_folds {teacher: [n]}: which of its models may answer a row. label_prior [labels]: shares of the gold labels.
    answers: of a `qa` task, what targets are indices of. accepted_answers [n]: what is right, to score by.
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

    def __len__(self) -> int:
        return len(self.texts)


def select_pseudo_labels(rows: pd.DataFrame, phase: PhaseConfig) -> np.ndarray:
    """Which of `rows` (label, `probabilities_<teacher>`) `phase.take` leaves [n]: all with a gold label, and of the
    others those whose teachers are sure enough of one label, or agree on it."""
    keep = rows["label"].notna().to_numpy(copy=True)
    for i in np.flatnonzero(~keep):
        said = [rows[f"probabilities_{teacher}"][i] for teacher in phase.teachers]
        said = np.stack([p for p in said if p is not None] or [[0.0]])
        mean = said.mean(0)
        agree = (said.argmax(-1) == mean.argmax()).all()
        keep[i] = mean.max() >= phase.pseudo_labels.min_confidence and (agree or not phase.pseudo_labels.agreement)
    return keep


def phase_rows(
    frame: pd.DataFrame, phase: PhaseConfig, labels: Sequence[str], scores: dict[str, float] | None = None
) -> TrainingRows:
    """The rows of `phase` out of a student's `rows.parquet`, with its teachers' distributions mixed.

    frame: columns split_ref, text, label, `probabilities_<teacher>` (over `labels`), and where they are wanted
    `fold_<teacher>` and rationale. scores: each teacher's validation accuracy, for `mix: validation`.
    A row that no teacher of the phase has a signal for is left out; of several teachers, those that have one count.
    Raises UserError when a phase finds no row, or no rationale that it should learn from.
    """
    rows = frame[frame["split_ref"].isin(phase.data)].reset_index(drop=True)
    if list(labels) == list(ANSWER_LABELS) and len(rows):
        return question_rows(rows, phase)
    if phase.teachers and phase.pseudo_labels != PseudoLabelFilter():
        rows = rows[select_pseudo_labels(rows, phase)].reset_index(drop=True)
    told = (
        np.stack([rows[f"probabilities_{teacher}"].notna() for teacher in phase.teachers]) if phase.teachers else None
    )
    if told is not None and not told.all():
        rows, told = rows[told.any(0)].reset_index(drop=True), told[:, told.any(0)]
    if rows.empty:
        raise UserError(f"phases: no row in {', '.join(phase.data)}")
    index = {label: i for i, label in enumerate(labels)}
    targets = np.array([index.get(label, -1) for label in rows["label"]])
    out = TrainingRows(rows["text"].tolist(), targets)
    if phase.trains_on_rationales:
        reasons = rows["rationale"].tolist() if "rationale" in rows else []
        out.rationales = [reason if isinstance(reason, str) else None for reason in reasons]  # pandas says nan for none
        if not any(out.rationales):
            raise UserError(
                f"phases: no row in {', '.join(phase.data)} has a rationale; set the teacher's `rationales`"
            )
    if "label_prior" in phase.loss:
        gold = torch.bincount(
            torch.from_numpy(frame["label"].map(index).dropna().to_numpy(int, copy=True)), minlength=len(labels)
        )
        out.label_prior = gold.double() if gold.sum() else torch.ones(len(labels))
    if not phase.teachers:
        return out
    equally = np.full(len(labels), 1 / len(labels))
    said = [[equally if p is None else p for p in rows[f"probabilities_{teacher}"]] for teacher in phase.teachers]
    stack = np.stack([np.stack(of_one) for of_one in said])
    logprobs = torch.from_numpy(stack).double().log()
    if phase.mix == "confidence":
        gold = torch.from_numpy(targets)
        weights = torch.where(
            gold >= 0,
            losses.confidence_weights(logprobs, gold.clamp_min(0)),
            losses.confidence_weights(logprobs),
        )
    elif phase.mix == "validation":
        weights = torch.tensor([scores[teacher] for teacher in phase.teachers], dtype=torch.double)
    else:
        weights = torch.ones(len(phase.teachers), dtype=torch.double)
    if not told.all():
        weights = weights.reshape(len(weights), -1) * torch.from_numpy(told)
    out.logprobs = losses.mix_teachers(logprobs, weights).float()
    out.targets = np.where(targets < 0, out.logprobs.argmax(-1).numpy(), targets)
    each = weights if weights.dim() == 2 else weights[:, None].expand(-1, len(rows))
    out.teacher_weights = dict(zip(phase.teachers, each, strict=True))
    if f"fold_{phase.teachers[0]}" in rows:
        folds = {teacher: rows[f"fold_{teacher}"] for teacher in phase.teachers}
        out.teacher_folds = {teacher: found.fillna(-1).astype(int).tolist() for teacher, found in folds.items()}
    return out


def gold_rows(rows: pd.DataFrame, task: Task) -> TrainingRows:
    """Gold `rows` (text, label; accepted `answers` of a `qa` task) for a teacher to be tuned on."""
    if task.kind != "qa":
        return TrainingRows(rows["text"].tolist(), np.array([task.names.index(label) for label in rows["label"]]))
    told = [accepted_answers(answers)[0] for answers in rows["answers"]]
    answers = list(dict.fromkeys(told))
    return TrainingRows(rows["text"].tolist(), np.array([answers.index(answer) for answer in told]), answers=answers)


def question_rows(rows: pd.DataFrame, phase: PhaseConfig) -> TrainingRows:
    """As :func:`phase_rows` for a `qa` task: gold answers, and where there are none the first that a teacher gave.

    Raises UserError for a loss or an order that needs a distribution over labels, and for a row without an answer.
    """
    barred = {"label_prior", "rationale", *(DIVERGENCES if phase.space == "labels" else ())}
    wrong = [f"loss.{term}" for term in phase.loss if term in barred]
    wrong += ["order: confidence"] if phase.order == "confidence" else []
    wrong += ["rationales"] if phase.rationales else []
    wrong += [key for key in ("pseudo_labels", "mix") if getattr(phase, key) != PhaseConfig.model_fields[key].default]
    if wrong:
        what = wrong[0]
        raise UserError(f"phases: {what}: answers are free text, not labels; use `ce`, or `space: vocabulary`")
    known = rows["answers"] if "answers" in rows else [None] * len(rows)  # a pool's are hidden
    told = [accepted_answers(gold)[0] if isinstance(gold, str) else None for gold in known]
    for teacher in phase.teachers:
        told = [ours or theirs for ours, theirs in zip(told, rows[f"answer_{teacher}"], strict=True)]
    if not all(told):
        raise UserError(f"phases: {told.count(None) + told.count('')} rows of {', '.join(phase.data)} have no answer")
    answers = list(dict.fromkeys(told))
    index = {answer: i for i, answer in enumerate(answers)}
    out = TrainingRows(rows["text"].tolist(), np.array([index[answer] for answer in told]), answers=answers)
    if phase.teachers:
        out.teacher_weights = {teacher: torch.ones(len(rows), dtype=torch.double) for teacher in phase.teachers}
        out.teacher_folds = {teacher: rows[f"fold_{teacher}"].astype(int).tolist() for teacher in phase.teachers}
    return out
