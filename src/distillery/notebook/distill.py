"""Figures, tables and sentences of 04_distill: one student, phase by phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from distillery.notebook.style import BLUE, join_words, shown_change
from distillery.training.progress import LAST_LOOKS
from distillery.training.rows import phase_rows
from distillery.wording import percent

if TYPE_CHECKING:
    from distillery.config.schema import StudentConfig
    from distillery.tasks.schema import Task


NO_TARGET = {  # kinds of task without one distribution over the labels of a row
    "qa": "Free answers have no distribution over labels: there is no such row.",
    "multilabel": "Each label has a probability of its own, not a share of one distribution: there is no such row.",
}

CLEAR_AREA = 0.6  # an area under the ROC curve up to this hardly differs from chance


@dataclass(frozen=True)
class TargetRow:
    """One training row and the distribution that the student shall learn for it.

    probabilities: [labels], at T = 1. temperature: of the phase. source: where the distribution comes from.
    n_options: how many labels have an option, in a list of one as `predict` takes it; None unless of a `choice` task.
    """

    text: str
    probabilities: np.ndarray
    temperature: float
    source: str
    n_options: list[int] | None


def choose_target_row(
    rows: pd.DataFrame, spec: StudentConfig, task: Task, scores: dict[str, float]
) -> TargetRow | None:
    """A row of the first phase with a teacher whose distribution is neither flat nor certain; None without such a row.

    Free answers have no distribution over labels, and of label sets each label has one of its own.

    Without a teacher, a row with its gold label: a distribution with all its mass on one label, at temperature 1.
    """
    if task.kind in NO_TARGET or not spec.phases:
        return None
    phase = next((phase for phase in spec.phases if phase.teachers), spec.phases[0])
    chosen = phase_rows(rows, phase.model_copy(update={"loss": {"ce": 1.0}}), task.names, scores)
    i, source, temperature = 0, "gold label", 1.0
    probabilities = np.eye(len(task.names))[chosen.targets]
    if chosen.logprobs is not None:
        source, temperature = join_words(phase.teachers), phase.temperature
        probabilities = chosen.logprobs.double().exp().numpy()
        i = int(np.argmin(np.abs(probabilities.max(-1) - 0.75)))
    n_options = None if chosen.n_options is None else [chosen.n_options[i]]
    return TargetRow(chosen.texts[i], probabilities[i], temperature, source, n_options)


def phase_table(spec: StudentConfig) -> pd.DataFrame:
    """The phases of a student, a row each: which rows, which teachers, which loss, how long."""
    columns = {
        "rows": [p.rows_text for p in spec.phases],
        "teachers": [", ".join(p.teachers) or "gold labels" for p in spec.phases],
        "loss": [" + ".join(f"{weight:g} {term}" for term, weight in p.loss.items()) for p in spec.phases],
        "space": [p.space for p in spec.phases],
        "temperature": [f"{p.temperature:g}" for p in spec.phases],
        "length": [p.length for p in spec.phases],
        "learning rate": [f"{p.learning_rate:g}" for p in spec.phases],
    }
    return pd.DataFrame(columns, index=pd.RangeIndex(1, len(spec.phases) + 1, name="phase")).reset_index()


def plot_training(history: pd.DataFrame, phases: pd.DataFrame, teachers: Mapping[str, float] | None = None) -> None:
    """The training loss over the optimizer steps, and the accuracy on validation rows after each phase.

    Where validation rows were looked at during the training, also their loss (dashed), and the mean accuracy of the
    last 25 looks, with the agreement with the teachers (dashed) of a phase that stops by it. history: phase, step,
    loss, and then validation_loss, validation_accuracy and validation_agreement. phases: phase, split, label,
    prediction; phase 0 is the untrained student. teachers: the accuracy of each teacher on the same rows, a
    dotted line, as a teacher does not change.
    """
    looked = "validation_accuracy" in history
    scored = {name: score for name, score in (teachers or {}).items() if pd.notna(score)}
    figure, (left, *middle, right) = plt.subplots(
        1, 2 + looked, figsize=(9, 2.8), width_ratios=[2, *([1.5] * looked), 1]
    )
    offset = 0
    for phase, part in history.groupby("phase"):
        (line,) = left.plot(part["step"] + offset, part["loss"], label=f"phase {phase}")
        for axes in middle:
            looks = part.dropna(subset="validation_accuracy")
            mean = looks["validation_accuracy"].rolling(LAST_LOOKS, min_periods=1).mean()
            axes.plot(looks["step"] + offset, mean, ".-", color=line.get_color())
            axes.set(title=f"validation accuracy, mean of {LAST_LOOKS} looks", xlabel="optimizer step", ylim=(0, 1))
            if "validation_agreement" in looks:
                axes.plot(looks["step"] + offset, looks["validation_agreement"], "--", color=line.get_color())
            if "validation_loss" in looks:
                left.plot(looks["step"] + offset, looks["validation_loss"], "--", color=line.get_color())
        offset += part["step"].max()
    left.set(title="training loss", xlabel="optimizer step")
    if len(history):
        left.set(yscale="log", ylabel="loss (nats), logarithmic")  # phases may have losses of different sizes
        left.legend()
    accuracy = accuracy_by_phase(phases)
    right.plot(accuracy.index, accuracy, "o-", color=BLUE)
    right.set(title="validation accuracy after each phase", xlabel="phase", xticks=accuracy.index, ylim=(0, 1))
    for axes in (*middle, right):
        for i, (teacher, score) in enumerate(scored.items()):
            axes.axhline(score, ls=":", color=f"C{i}", label=f"teacher {teacher}")
    if scored:
        right.legend(loc="lower right")
    figure.tight_layout()


def accuracy_by_phase(phases: pd.DataFrame) -> pd.Series:
    """Accuracy on the validation rows after each phase, in [0, 1]."""
    rows = phases[phases["split"] == "validation"]
    return rows["label"].eq(rows["prediction"]).groupby(rows["phase"]).mean()


def rows_sentence(gold: int, paraphrases: int, unlabelled: int) -> str:
    """How many of a student's training rows have a gold label, inherit one, or have none, and what these teach."""
    if not unlabelled and not paraphrases:
        return f"All {gold:,} training rows have a gold label: this student needs no teacher to have an answer."
    parts = [f"{gold:,} gold rows"]
    if paraphrases:
        parts.append(f"{paraphrases:,} paraphrases that inherit a label")
    if unlabelled:
        parts.append(f"{unlabelled:,} rows without a label")
    text = f"The training rows are {join_words(parts)}. "
    if not unlabelled:
        return text + "A paraphrase may have changed its meaning, so its label is less sure than a gold one."
    return text + "For rows without a label the teacher's distribution is all there is to learn from."


def size_sentence(layers: int, parameters: int, trainable: int, adapter: str) -> str:
    """How large a student is, and which share of it training moves. adapter: its kind, a value of `adapter.kind`."""
    size = f"The student has {layers} layers and {parameters:,} parameters. "
    if adapter in ("lora", "qlora"):
        return size + f"Training moves none of these: it moves {trainable:,} parameters of adapters beside them."
    if trainable == parameters:
        return size + "Training moves all of them."
    parts = ", those of its adapters and of a classifier's head" if adapter == "series" else ""
    return size + f"Training moves {trainable:,} of them, {percent(trainable / parameters)}{parts}."


def equality_sentence(by_hand: float, package: float, name: str, unit: str = " nats") -> str:
    """Whether a value computed by hand is the package's, to a relative error of 1e-4."""
    text = f"By hand {by_hand:.6f}{unit}, `{name}` {package:.6f}{unit}: "
    if np.isclose(by_hand, package, rtol=1e-4, atol=1e-6):
        return text + "the same number."
    return text + "**not** the same number, one of them is wrong."


def softening_sentence(before: np.ndarray, after: np.ndarray, temperature: float) -> str:
    """What a temperature does to one distribution. before, after: [labels], probabilities."""
    if np.isclose(np.max(before), 1):
        return "A hard label has nothing to soften."
    if temperature == 1:
        return "T = 1 leaves the target as it is."
    if np.max(after) > np.max(before) + 0.005:
        return (
            f"T = {temperature:g} raises the largest probability from {np.max(before):.2f} to {np.max(after):.2f}: "
            "the other labels weigh less in the loss."
        )
    if np.max(after) < np.max(before) - 0.005:
        return (
            f"T = {temperature:g} lowers the largest probability from {np.max(before):.2f} to {np.max(after):.2f}: "
            "the other labels weigh more in the loss, so the student also learns which errors are close."
        )
    return f"T = {temperature:g} changes next to nothing here: the largest probability stays {np.max(before):.2f}."


def movement_sentence(kl_before: float, kl_after: float) -> str:
    """Whether training moved the student towards its target on one row. Both in nats."""
    text = f"On this row KL went from {kl_before:.4f} to {kl_after:.4f} nats: the student moved "
    if kl_after < kl_before:
        return text + "towards its target."
    return text + "**away** from its target. One row may get worse while the mean over all rows gets better."


def progress_sentence(accuracy: pd.Series) -> str:
    """What training gave on validation rows. accuracy: phase -> share right in [0, 1], phase 0 first."""
    first, last = float(accuracy.iloc[0]), float(accuracy.iloc[-1])
    parts = [f"on {percent(first)} before training"]
    for phase, before, after in zip(accuracy.index[1:], accuracy.iloc[:-1], accuracy.iloc[1:], strict=True):
        parts.append(f"on {percent(after)} after phase {phase} ({shown_change(before, after)} points)")
    text = f"On validation rows the student is right {join_words(parts)}. "
    if len(accuracy) == 1:
        return text + "It has no phase."
    if last <= first:
        return text + ("Training made it **worse** here." if last < first else "Training gave nothing that shows here.")
    return text + f"In sum: {shown_change(first, last)} points."


def result_sentence(accuracy: float, majority: float | None, rows: int, answer: str = "label") -> str:
    """The student's test accuracy beside the share of the most frequent label, both in [0, 1]; None: no labels.

    A difference below two standard errors of the accuracy counts as none. answer: what the share is of, see
    :func:`distillery.notebook.labels.answer_name`.
    """
    if majority is None:
        return f"{percent(accuracy)} of its answers to {rows:,} test questions are accepted."
    text = f"On {rows:,} test rows the student is right on {percent(accuracy)}; the most frequent {answer} alone is "
    text += f"right on {percent(majority)}. "
    if accuracy > majority + 2 * np.sqrt(accuracy * (1 - accuracy) / rows):
        return text + "The student has learned to read the text."
    return text + "The student has learned **nothing** that clearly beats a constant answer."


def confidence_sentence(right: np.ndarray, wrong: np.ndarray) -> str:
    """Whether confidence separates right predictions from wrong ones, by the area under the ROC curve.

    right, wrong: confidences of these predictions, in [0, 1]. The area is the share of pairs of both in which the wrong
    prediction is less confident than the right one; equal confidences count half (Fawcett 2006).
    """
    if not len(right) or not len(wrong):
        return f"All predictions are {'right' if len(right) else 'wrong'}: confidence has nothing to separate."
    ranks = pd.Series(np.concatenate([right, wrong])).rank()[: len(right)]
    area = float((ranks.sum() - len(right) * (len(right) + 1) / 2) / (len(right) * len(wrong)))
    text = f"A wrong prediction is less confident than a right one in {percent(area)} of all pairs of the two "
    text += "(AUROC; 50 % is chance): confidence "
    if area > CLEAR_AREA:
        return text + "helps to find errors."
    return text + ("hardly helps to find errors." if area > 0.5 else "does **not** help to find errors.")
