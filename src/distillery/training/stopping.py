"""When a training ends: its number of steps, and early stopping on the score of validation rows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from distillery.config.schema import EarlyStoppingConfig, PhaseConfig

SHORTEST_INTERVAL, LONGEST_INTERVAL = 20, 500  # steps between two evaluations, where params.yaml gives none


def steps_per_epoch(rows: int, phase: PhaseConfig) -> int:
    """Optimizer steps of one pass over `rows` rows; the last, smaller batch counts."""
    return math.ceil(math.ceil(rows / phase.batch_size) / phase.accumulate)


def count_optimizer_steps(rows: int, phase: PhaseConfig) -> int:
    """Optimizer steps of a phase on `rows` rows, with `auto` at most."""
    return phase.most_steps or max(1, math.ceil(phase.most_epochs * steps_per_epoch(rows, phase)))


def default_interval(rows: int, phase: PhaseConfig) -> int:
    """Optimizer steps between two evaluations where `phase` gives none: about an epoch, in tens.

    With `auto`, the learning rate rises for as long. `schedule: inverse_sqrt` falls with the square root of steps over
    this number.
    """
    epoch = min(max(steps_per_epoch(rows, phase), SHORTEST_INTERVAL), LONGEST_INTERVAL)
    return 10 * math.ceil(epoch / 10)


def evaluation_interval(rows: int, phase: PhaseConfig) -> int:
    """Optimizer steps between two evaluations of a phase with early stopping, and between two checkpoints."""
    every = phase.stopping.every or default_interval(rows, phase)
    return min(every, count_optimizer_steps(rows, phase))


def schedule_arguments(rows: int, phase: PhaseConfig) -> dict[str, Any]:
    """The learning rate's course as keyword arguments of `TrainingArguments`."""
    kind = "constant_with_warmup" if phase.schedule == "constant" else phase.schedule
    steps = count_optimizer_steps(rows, phase)
    unit, warmup = default_interval(rows, phase), int(phase.warmup * steps)
    if phase.is_auto:
        warmup = min(unit, steps) if phase.warmup else 0
    arguments = {"lr_scheduler_type": kind, "warmup_steps": warmup}
    return arguments | ({"lr_scheduler_kwargs": {"timescale": unit}} if kind == "inverse_sqrt" else {})


def evaluated_scores(history: Sequence[dict[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """The steps and scores of all evaluations in `history`, the log of a trainer; a higher score is better."""
    entries = [entry for entry in history if f"eval_{metric}" in entry]
    sign = -1 if metric == "loss" else 1
    scores = [sign * entry[f"eval_{metric}"] for entry in entries]
    return [entry["step"] for entry in entries], [-math.inf if math.isnan(score) else score for score in scores]


def is_out_of_patience(history: Sequence[dict[str, Any]], stopping: EarlyStoppingConfig) -> bool:
    """Whether the last `stopping.patience` evaluations in `history` brought no better score."""
    scores = evaluated_scores(history, stopping.metric)[1]
    return bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= stopping.patience


class PatienceCallback(TrainerCallback):
    """Stops a training as :func:`is_out_of_patience` decides: from the log alone, which a checkpoint holds.

    The callback of `transformers` counts from 0 again in a run that continues from a checkpoint.
    """

    def __init__(self, stopping: EarlyStoppingConfig):
        self.stopping = stopping

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if is_out_of_patience(state.log_history, self.stopping):
            control.should_training_stop = True


def had_ended(checkpoint: str | None, stopping: EarlyStoppingConfig | None, steps: int) -> bool:
    """Whether the run that wrote `checkpoint` was killed after its last one of `steps`, or after early stopping.

    `Trainer` would take one more step: it looks for the end after a step only.
    """
    if checkpoint is None:
        return False
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    is_out = stopping is not None and is_out_of_patience(state["log_history"], stopping)
    return is_out or state["global_step"] >= steps


def plan_sentence(rows: int, validation: int, phase: PhaseConfig) -> str:
    """How long a training on `rows` rows lasts at most, and what on `validation` rows ends it."""
    stopping, steps = phase.stopping, count_optimizer_steps(rows, phase)
    every = evaluation_interval(rows, phase)
    return (
        f"at most {steps:,} steps; {stopping.metric} on {validation:,} validation rows is looked at every {every:,} "
        f"steps, and {stopping.patience} looks without a better one end it"
    )


def end_sentence(history: Sequence[dict[str, Any]], steps: int, phase: PhaseConfig) -> str:
    """After how many of at most `steps` steps a training ended, and at which step its score was best, if any."""
    taken, scores = evaluated_scores(history, phase.stopping.metric)
    best = scores.index(max(scores))
    text = f"{taken[-1]:,} of at most {steps:,} steps; "
    if math.isinf(scores[best]):
        return f"{text}{phase.stopping.metric} was never a number, so the last weights are kept: lower `learning_rate`"
    text += f"best {phase.stopping.metric} {abs(scores[best]):.3f} after {taken[best]:,} steps, whose weights are kept"
    if not phase.is_auto or is_out_of_patience(history, phase.stopping):
        return text
    bound = "max_epochs" if phase.epochs == "auto" else "max_steps"
    return f"{text}; its score may still have risen: raise `{bound}`"
