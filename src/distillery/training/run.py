"""Run the phases of a student, continuing where a killed run stood."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerCallback, TrainerState

from distillery.config.schema import PhaseConfig, StudentConfig
from distillery.errors import UserError
from distillery.files import atomic_write, raise_if_disk_full
from distillery.fingerprint import code_digest
from distillery.models.fast_cpu import restore_full_embedding
from distillery.models.label_model import LabelModel
from distillery.models.packed.frozen_layers import SharedStates
from distillery.tasks.schema import N_OPTIONS, Task
from distillery.training.active import select_rows
from distillery.training.disk import check_disk, disk_need, size_text
from distillery.training.keys import result_key
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.processes import from_first, process_rank, wait_for_all
from distillery.training.rows import TrainingRows, label_targets, phase_rows, teacher_targets
from distillery.training.served_teacher import ServedTeacher, rows_with_tokens
from distillery.training.sharding import restore_sharded_embedding
from distillery.training.shared_predictions import predict_together
from distillery.training.stopping import end_sentence, had_ended, plan_sentence
from distillery.training.tracking import Tracking
from distillery.training.trainers import build_trainer
from distillery.training.weights import load_weights, save_weights

HISTORY_COLUMNS = ("step", "epoch", "loss", "learning_rate")
VALIDATION_SCORES = ("loss", "accuracy", "agreement")


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; one that a kill left half-written is removed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())  # the trainer writes this file last
            return str(checkpoint)
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return None


def train_phase(
    student: LabelModel,
    rows: TrainingRows,
    phase: PhaseConfig,
    *,
    folder: Path,
    seed: int,
    title: str = "training",
    checkpoint_every: int = 50,
    validation: TrainingRows | None = None,
    teachers: dict[str, OpenableTeacher | ServedTeacher] | None = None,
    shared: SharedStates | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> pd.DataFrame:
    """Train `student` in place on the `rows` of `phase`; continue from the last checkpoint in `folder`, if any.

    checkpoint_every: optimizer steps between two checkpoints, unless early stopping sets them; it changes no weight.
    validation: the rows that early stopping scores. teachers: those whose tokens or hidden states the loss compares.
    shared: states of frozen layers, see :func:`compute_frozen_states`. callbacks: more of them for the trainer.
    Returns the history, a row a logged step: step, epoch, loss, learning_rate, the terms' values, and where validation
    rows were looked at validation_loss (nats), validation_accuracy and, where the phase stops by it,
    validation_agreement, empty at other steps.
    Prints the size of a checkpoint and the disk that the training needs.
    Raises UserError when the disk has less, or is full, when a teacher does not fit the student, and when early
    stopping has no validation rows.
    """
    if (phase.stopping or phase.validate_every) and not validation:
        keys = "`early_stopping` and `auto` need" if phase.stopping else "`validate_every` needs"
        raise UserError(f"{title}: {keys} validation rows, and there are none")
    try:
        trainer = build_trainer(
            student,
            rows,
            phase,
            folder=folder,
            seed=seed,
            title=title,
            checkpoint_every=checkpoint_every,
            validation=validation,
            teachers=teachers,
            shared=shared,
            callbacks=callbacks,
        )
        need = disk_need(student, trainer.model)
        check_disk(need, folder)
        sizes = f"a checkpoint takes {size_text(need.checkpoint)}, and the run up to {size_text(need.total)} of disk"
        print(f"{title}: {sizes}", flush=True)
        _train_or_restore(trainer, from_first(lambda: last_whole_checkpoint(folder)), title)
    except Exception as error:  # torch and safetensors have error classes of their own
        raise_if_disk_full(error, folder)
        raise
    finally:
        if hasattr(student.model, "projections"):  # only the loss used them
            del student.model.projections
        if student.sharded is None:
            restore_full_embedding(student.model)
        student.frozen_states = student.recorded = None
    restore_sharded_embedding(student)  # after a failure the other processes would not take part
    return _history(trainer.state.log_history)


def _history(log: list[dict[str, Any]]) -> pd.DataFrame:
    """The history of :func:`train_phase` out of a trainer's log."""
    logged = [entry for entry in log if "loss" in entry]
    history = pd.DataFrame(
        logged, columns=list(dict.fromkeys([*HISTORY_COLUMNS, *(k for entry in logged for k in entry)]))
    )
    terms = [k for k in history if k.startswith("term_")]
    history = history[[*HISTORY_COLUMNS, *terms]].rename(columns=lambda k: k.removeprefix("term_"))
    looks = {entry["step"]: entry for entry in log if "eval_accuracy" in entry}
    for score in VALIDATION_SCORES:
        if not any(f"eval_{score}" in look for look in looks.values()):
            continue
        history[f"validation_{score}"] = [looks.get(step, {}).get(f"eval_{score}") for step in history["step"]]
    return history


def _train_or_restore(trainer: Any, checkpoint: str | None, title: str) -> None:
    """Train on from `checkpoint` (None: from the start), or only load its weights where that run had ended.

    Prints what early stopping will watch, and when it ended the training.
    """
    phase, stopping, steps = trainer.phase, trainer.phase.stopping, trainer.args.max_steps
    if stopping:
        print(f"{title}: {plan_sentence(len(trainer.rows), len(trainer.validation), phase)}", flush=True)
    if had_ended(checkpoint, stopping, steps):
        trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if stopping and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
        else:  # or no score was a number
            trainer._load_from_checkpoint(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    if stopping:
        print(f"{title}: {end_sentence(trainer.state.log_history, steps, phase)}", flush=True)


def run_key(*parts: Any, threads: int | None = None) -> str:
    """A name for a run's checkpoints: a hash of `parts` and of the code and libraries that compute the run.

    threads: in place of the number of torch's threads.
    """
    code = code_digest("config", "losses", "metrics", "models", "tasks", "training")
    return result_key(code, *parts, threads=threads)


def train_phases(
    student: LabelModel,
    frame: pd.DataFrame,
    spec: StudentConfig,
    *,
    folder: Path,
    seed: int,
    validation: pd.DataFrame,
    test: pd.DataFrame,
    scores: dict[str, float] | None = None,
    teachers: dict[str, OpenableTeacher | ServedTeacher] | None = None,
    checkpoint_every: int = 50,
    tracking: Tracking | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train `student` in place through all phases of `spec`, continuing where an earlier, killed run stood.

    frame: the rows of `rows.parquet`. validation: rows (id, text, label) for early stopping, predicted before the
    first phase and after each but the last. test: predicted before the first phase. scores: each teacher's validation
    accuracy. checkpoint_every: optimizer steps between two checkpoints; it changes no weight. tracking: where the steps
    are logged, numbered through all phases.
    Returns the history (phase, and the columns of :func:`train_phase`) and these predictions
    (phase, split, id, label, prediction, probabilities), phase 0 being the untrained student.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tracking = tracking or Tracking([])
    finished_phases = from_first(lambda: count_finished(folder, len(spec.phases)))
    for k in range(len(spec.phases) + 1):
        if k >= finished_phases:
            history, splits = pd.DataFrame(columns=list(HISTORY_COLUMNS)), {"validation": validation, "test": test}
            if k:
                phase = spec.phases[k - 1]
                taught = rows_with_tokens(frame, phase, teachers or {}, student)
                rows = phase_rows(taught, phase, student.task.names, scores)
                checkpoints, title = folder / f"checkpoints-{k}", f"phase {k} of {len(spec.phases)}"
                history = train_phase(
                    student,
                    select_rows(student, rows, phase, checkpoints / "rows.json", title),
                    phase,
                    folder=checkpoints,
                    seed=1000 * seed + k,
                    title=title,
                    checkpoint_every=checkpoint_every,
                    validation=validation_rows(validation, student.task, phase, scores),
                    teachers=teachers,
                    callbacks=tracking.callbacks(_last_step(folder, k)),
                )
                splits = {"validation": validation} if k < len(spec.phases) else {}
            predictions = predict_together(student, splits)
            _save_phase(folder / f"phase-{k}", student, history, predictions)
            if process_rank() == 0:
                shutil.rmtree(folder / f"checkpoints-{k}", ignore_errors=True)
            wait_for_all()
        elif k == finished_phases - 1:
            load_weights(student.model, folder / f"phase-{k}" / "weights.safetensors")
    return _read_phases([folder / f"phase-{k}" for k in range(len(spec.phases) + 1)])


def _last_step(folder: Path, phase: int) -> int:
    """The optimizer steps of the finished phases before `phase`."""
    steps = [pd.read_csv(folder / f"phase-{k}" / "history.csv")["step"] for k in range(1, phase)]
    return sum(int(of_phase.max()) for of_phase in steps if len(of_phase))


def count_finished(folder: Path, phases: int) -> int:
    """How many of phase 0, the untrained student, and the `phases` after it have left their files in `folder`."""
    finished = [(folder / f"phase-{k}" / "history.csv").exists() for k in range(phases + 1)]
    return [*finished, False].index(False)


def validation_rows(
    validation: pd.DataFrame,
    task: Task,
    phase: PhaseConfig | None = None,
    scores: dict[str, float] | None = None,
) -> TrainingRows:
    """`validation` (text, label) as rows that early stopping scores.

    With a `phase` that stops by agreement also its teachers' labels, by the columns `probabilities_<teacher>`. scores:
    see :func:`train_phases`.
    """
    targets = label_targets(validation["label"], task.names)
    answers = validation["answers"].tolist() if task.kind == "qa" else None
    n_options = validation[N_OPTIONS].tolist() if N_OPTIONS in validation else None
    rows = TrainingRows(validation["text"].tolist(), targets, accepted_answers=answers, n_options=n_options)
    if phase is not None and phase.stops_by_agreement:
        rows.teacher_targets = teacher_targets(validation, phase, task.names, scores)
    return rows


def _save_phase(folder: Path, student: LabelModel, history: pd.DataFrame, predictions: pd.DataFrame) -> None:
    """Write what a finished phase leaves behind; its history last, since it marks the phase as finished.

    The first process writes; all of them call this.
    """
    save_weights(student.model, folder / "weights.safetensors")
    if process_rank():
        return
    predictions.to_parquet(folder / "predictions.parquet")
    with atomic_write(folder / "history.csv") as path:
        history.to_csv(path, index=False)


def _read_phases(folders: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The histories and the predictions of finished phases, each with its number in the column `phase`."""
    tables = []
    for name, read in (("history.csv", pd.read_csv), ("predictions.parquet", pd.read_parquet)):
        parts = [read(folder / name).assign(phase=k) for k, folder in enumerate(folders)]
        table = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
        tables.append(table[["phase", *table.columns.drop("phase")]])
    return tables[0], tables[1]
