"""What a training prints while it runs."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from distillery import metrics
from distillery.label_sets import sets_of
from distillery.models.label_model import LabelModel
from distillery.training.rows import TrainingRows

LOG_EVERY = 10  # optimizer steps
LAST_LOOKS = 25  # at the validation rows, whose mean accuracy is printed
SHOWN_CHARACTERS = 200  # of the text of a training row


class ProgressPrinter(TrainerCallback):
    """A line now and then: under papermill every redraw of a bar would become a line of the notebook."""

    def __init__(self, title: str):
        self.title = title
        self.start: tuple[float, int] | None = None  # when the first step began, and how many came before it

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.start is None:
            self.start = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True  # the trainer logs every n-th step, and the last one may be none of them

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs and state.global_step % max(LOG_EVERY, state.max_steps // 80 * 10) == 0:
            start, first = self.start or (time.monotonic(), state.global_step - 1)
            left = (time.monotonic() - start) / (state.global_step - first) * (state.max_steps - state.global_step)
            estimate = f", {time_left(left)}" if left else ""
            line = f"{self.title}: step {state.global_step}/{state.max_steps}, loss {logs['loss']:.4f}{estimate}"
            print(line, flush=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        accuracies = [entry["eval_accuracy"] for entry in state.log_history if "eval_accuracy" in entry][-LAST_LOOKS:]
        scores = f"loss {metrics['eval_loss']:.4f}, "
        if "eval_agreement" in metrics:
            scores += f"agreement with the teachers {metrics['eval_agreement']:.4f}, "
        scores += f"accuracy {accuracies[-1]:.4f}"
        line = f"{self.title}: step {state.global_step}, on validation rows {scores}"
        print(f"{line}, mean of the last {len(accuracies)} {sum(accuracies) / len(accuracies):.4f}", flush=True)


def time_left(seconds: float) -> str:
    """An estimate in words: about 40 s left, about 3 min left."""
    return f"about {seconds:.0f} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"


def example_line(student: LabelModel, rows: TrainingRows, step: int) -> str:
    """A training row, another one at each `step`: its text, its label, and what teachers and student predict."""
    i, task = step % len(rows), student.task
    text = " ".join(rows.texts[i].split())
    parts = [f"row: {text[:SHOWN_CHARACTERS]}{'…' if len(text) > SHOWN_CHARACTERS else ''}"]
    if rows.answers is not None:
        parts.append(f"answer: {rows.answers[rows.targets[i]]}")
        for name, answers in (rows.teacher_answers or {}).items():
            title = f"teacher {name}" if len(rows.teacher_answers) > 1 else "teacher"
            parts += [f"{title}: {answers[i]}"] if isinstance(answers[i], str) else []
        return " | ".join([*parts, f"student: {student.answer_questions([rows.texts[i]])[0]}"])
    if rows.are_sets:
        parts.append(f"label: {sets_of(rows.targets[i : i + 1] > 0, task.names)[0]}")
    elif rows.targets[i] >= 0:
        parts.append(f"label: {task.names[rows.targets[i]]}")
    if rows.logprobs is not None:
        teacher = rows.logprobs[i].exp()[:, 1] if rows.are_sets else rows.logprobs[i]
        parts.append(f"teacher: {metrics.decide(teacher.numpy(), task.names)}")
    n_options = None if rows.n_options is None else [rows.n_options[i]]
    prediction = student.predict([rows.texts[i]], n_options=n_options)[0]
    return " | ".join([*parts, f"student: {metrics.decide(prediction, task.names)}"])
