"""Run the phases of a student, continuing where a killed run stood."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from distillery.config.schema import PhaseConfig, StudentConfig
from distillery.files import atomic_write, raise_if_disk_full
from distillery.fingerprint import code_digest
from distillery.models.fast_cpu import restore_full_embedding
from distillery.models.label_model import LabelModel
from distillery.models.predictions import predict_splits
from distillery.training.rows import TrainingRows, phase_rows
from distillery.training.teacher_models import OpenableTeacher
from distillery.training.trainers import build_trainer

torch.use_deterministic_algorithms(True)  # same inputs, same seed, same machine: same result, to the bit


torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that writes every buffer twice


HISTORY_COLUMNS = ("step", "epoch", "loss", "learning_rate")


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; one that a kill left half-written is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    while found:
        state = found[-1] / "trainer_state.json"  # the trainer writes this file last
        try:
            json.loads(state.read_text())
            return str(found[-1])
        except (OSError, ValueError):
            shutil.rmtree(found.pop())
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
    teachers: dict[str, OpenableTeacher] | None = None,
) -> pd.DataFrame:
    """Train `student` in place on `rows` as `spec` says; continue from the last checkpoint in `folder`, if any.

    Returns the history, a row a logged step: step, epoch, loss, learning_rate and the terms' values.
    Raises UserError when the disk is full.
    """
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
        )
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    except Exception as error:  # torch and safetensors have error classes of their own
        raise_if_disk_full(error, folder)
        raise
    finally:
        if hasattr(student.model, "projections"):  # they have served; the student goes without them
            del student.model.projections
        restore_full_embedding(student.model)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    history = pd.DataFrame(
        logged, columns=list(dict.fromkeys([*HISTORY_COLUMNS, *(k for entry in logged for k in entry)]))
    )
    terms = [k for k in history if k.startswith("term_")]
    return history[[*HISTORY_COLUMNS, *terms]].rename(columns=lambda k: k.removeprefix("term_"))


def run_key(*parts: Any) -> str:
    """A name for a run's checkpoints: a hash of `parts` and of the code and libraries that compute the run."""
    code = code_digest("config", "losses", "metrics", "models", "tasks", "training")
    digest = hashlib.sha256(code.encode())
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")}
    digest.update(json.dumps([versions, torch.get_num_threads()]).encode())
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


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
    teachers: dict[str, OpenableTeacher] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train `student` in place through all phases of `spec`, continuing where an earlier, killed run stood.

    frame: the rows of `rows.parquet`. validation: rows (id, text, label) for early stopping, predicted before the
    first phase and after each but the last. test: predicted before the first phase.
    Returns the history (phase, step, epoch, loss, learning_rate, one column per loss term) and these predictions
    (phase, split, id, label, prediction, probabilities), phase 0 being the untrained student.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = student.task.names
    held_out = TrainingRows(
        validation["text"].tolist(), np.array([names.index(label) for label in validation["label"]])
    )
    if student.task.kind == "qa":
        held_out.accepted_answers = validation["answers"].tolist()
    histories, said = [], []
    for k in range(len(spec.phases) + 1):
        done = folder / f"phase-{k}"
        if not (done / "history.csv").exists():  # written last
            history = pd.DataFrame(columns=list(HISTORY_COLUMNS))
            if k:
                phase = spec.phases[k - 1]
                rows = phase_rows(frame, phase, names, scores)
                history = train_phase(
                    student,
                    rows,
                    phase,
                    folder=folder / f"checkpoints-{k}",
                    seed=1000 * seed + k,
                    title=f"phase {k} of {len(spec.phases)}",
                    checkpoint_every=spec.checkpoint_every,
                    validation=held_out,
                    teachers=teachers,
                )
            _save_phase_weights(student.model, done / "weights.safetensors")
            asked = {"validation": validation, "test": test} if k == 0 else {"validation": validation}
            predict_splits(student, asked if k == 0 or k < len(spec.phases) else {}).to_parquet(
                done / "answers.parquet"
            )
            with atomic_write(done / "history.csv") as path:
                history.to_csv(path, index=False)
            shutil.rmtree(folder / f"checkpoints-{k}", ignore_errors=True)
        elif not (folder / f"phase-{k + 1}" / "history.csv").exists():
            _load_phase_weights(student.model, done / "weights.safetensors")
        histories.append(pd.read_csv(done / "history.csv").assign(phase=k))
        said.append(pd.read_parquet(done / "answers.parquet").assign(phase=k))
    history = pd.concat([h for h in histories if len(h)] or histories, ignore_index=True)
    told = pd.concat([part for part in said if len(part)], ignore_index=True)
    return history[["phase", *history.columns.drop("phase")]], told[["phase", *told.columns.drop("phase")]]


def _save_phase_weights(model: Any, path: Path) -> None:
    with atomic_write(path) as scratch:
        if hasattr(model, "peft_config"):
            save_file({k: v.contiguous() for k, v in get_peft_model_state_dict(model).items()}, scratch)
        else:
            safetensors.torch.save_model(model, str(scratch))


def _load_phase_weights(model: Any, path: Path) -> None:
    if hasattr(model, "peft_config"):
        set_peft_model_state_dict(model, load_file(path))
    else:
        safetensors.torch.load_model(model, str(path))
