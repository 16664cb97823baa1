"""Fine-tune a teacher on gold rows, and on folds of them for out-of-fold signals."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import StratifiedGroupKFold

from distillery.config.schema import Params
from distillery.errors import UserError
from distillery.label_sets import LabelSets, rarest_labels
from distillery.models.label_model import LabelModel
from distillery.models.packed.frozen_layers import SharedStates
from distillery.models.precision import resolve_dtype
from distillery.tasks.schema import Task
from distillery.teachers.local import LocalTeacher
from distillery.teachers.signals import KEYS, label_rows
from distillery.training.launch import run_processes
from distillery.training.rows import gold_rows
from distillery.training.run import run_key, train_phase, validation_rows
from distillery.training.student import attach_adapters
from distillery.training.teacher_models import load_teacher_model
from distillery.training.weights import load_weights

TUNING, WEIGHTS, HISTORY = "tuning.pickle", "weights.safetensors", "history.csv"  # files of a training in processes


def finetune_teacher(
    name: str,
    params: Params,
    task: Task,
    rows: pd.DataFrame,
    *,
    folder: Path,
    part: str = "all",
    validation: pd.DataFrame | None = None,
    shared: SharedStates | None = None,
) -> tuple[LabelModel, pd.DataFrame]:
    """The teacher fine-tuned on gold `rows` (id, text, label), and its training history.

    Checkpoints lie in `folder` under a key of everything that decides the result; a killed run continues there.
    part: the name of these rows, for the key and for messages. validation: rows of the same columns, which early
    stopping scores. shared: states of the layers below all adapters, for the next model on some of these rows; give it
    to the model on all gold rows first.
    """
    spec = params.teachers[name]
    columns = ["id", "text", "label", *(["answers"] if task.kind == "qa" else [])]
    watched = validation if spec.finetune.stopping else None
    together = params.compute.processes > 1
    key = run_key(
        spec.model_dump(),
        str(getattr(torch, resolve_dtype(spec.dtype, "training"))),
        params.models[spec.model].model_dump(),
        task.model_dump(),
        part,
        rows[columns].to_csv(),
        *([] if watched is None else [watched[columns].to_csv()]),
        threads=0 if together else None,
    )
    tuning = Tuning(name, part, task, rows, watched)
    if not together:
        teacher = build_teacher(name, params, task)
        return teacher, tuning.train(teacher, params, folder / key, shared)
    finished = tuning.train_in_processes(params, folder / f"together-{key}")
    teacher = build_teacher(name, params, task)
    load_weights(teacher.model, finished / WEIGHTS)
    return teacher, pd.read_csv(finished / HISTORY)


def build_teacher(name: str, params: Params, task: Task) -> LabelModel:
    """The teacher `name` before its first step, with its adapters if it has any."""
    spec = params.teachers[name]
    teacher = load_teacher_model(name, spec, params.models[spec.model], task, use="training")
    teacher.model = attach_adapters(teacher.model, spec.finetune.lora, teacher.arch, spec.seed)
    return teacher


@dataclass
class Tuning:
    """The fine-tuning of teacher `name` on gold `rows`, which messages call `part`. watched: rows of early stopping."""

    name: str
    part: str
    task: Task
    rows: pd.DataFrame
    watched: pd.DataFrame | None

    def train(
        self, teacher: LabelModel, params: Params, folder: Path, shared: SharedStates | None = None
    ) -> pd.DataFrame:
        """Train `teacher` in place, with checkpoints in `folder`; its history."""
        spec = params.teachers[self.name]
        return train_phase(
            teacher,
            gold_rows(self.rows, self.task),
            spec.finetune.as_phase(),
            folder=folder,
            seed=spec.seed,
            title=f"{self.name} on {self.part}",
            validation=None if self.watched is None else validation_rows(self.watched, self.task),
            shared=shared,
        )

    def train_in_processes(self, params: Params, folder: Path) -> Path:
        """Train in the processes of `params.compute`; the folder with the weights and the history that they leave.

        The processes read this object from `folder`, where their checkpoints are, too.
        """
        finished = folder / "finished"
        if not (finished / HISTORY).exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TUNING).write_bytes(pickle.dumps(self))
            run_processes(
                params.compute, "distillery.teachers.worker", ["tune", str(folder)], f"{self.name} on {self.part}"
            )
        return finished


def assign_folds(rows: pd.DataFrame, k: int, seed: int, names: Sequence[str] = ()) -> np.ndarray:
    """Fold of every row [n], 0 to k - 1, with whole groups and labels spread evenly; -1 (no fold) when k is 0.

    names: the labels of the task. A row with a set of them counts for its rarest label.

    Raises UserError when there are fewer groups than folds.
    """
    if not k:
        return np.full(len(rows), -1)
    if rows["group"].nunique() < k:
        raise UserError(f"teachers: finetune.folds: {k} folds need {k} groups, there are {rows['group'].nunique()}")
    splitter = StratifiedGroupKFold(k, shuffle=True, random_state=seed)
    folds = np.empty(len(rows), dtype=int)
    strata = rarest_labels(rows["label"], names) if isinstance(names, LabelSets) else rows["label"]
    for fold, (_, held_out) in enumerate(splitter.split(rows, strata, rows["group"])):
        folds[held_out] = fold
    return folds


def cross_fit(
    name: str,
    params: Params,
    task: Task,
    gold: pd.DataFrame,
    fold: np.ndarray,
    folder: Path,
    signals: pd.DataFrame,
    shared: SharedStates | None = None,
    thresholds: np.ndarray | None = None,
) -> pd.DataFrame:
    """`signals`, with those of the gold rows replaced by the signals of the fold models that were tuned without them.

    Gold rows of no fold lose their signal. gold: rows (source, split, id, text). fold: [len(gold)], see
    :func:`assign_folds`. folder: the model of fold k lies in `folder/k`. shared: as in :func:`finetune_teacher`.
    thresholds: of a `multilabel` task, those of the model on all gold rows, see :func:`signal_thresholds`.
    """
    spec, signals = params.teachers[name], signals.set_index(KEYS)
    signals = signals.drop(pd.MultiIndex.from_frame(gold.loc[fold < 0, KEYS]))
    for k in sorted(set(fold[fold >= 0])):
        model = load_teacher_model(name, spec, params.models[spec.model], task, tuned=folder / str(k))
        teacher = LocalTeacher(model)
        if shared:
            teacher.share_states(shared)
        held_out = label_rows(teacher, gold[fold == k], k, spec.max_new_tokens, thresholds).set_index(KEYS)
        columns = held_out.columns.drop("probabilities")
        signals.loc[held_out.index, columns] = held_out[columns]
        for key, probabilities in held_out["probabilities"].items():
            signals.at[key, "probabilities"] = probabilities  # one by one: an array is no single value for `loc`
        del model, teacher  # one is held at a time
    return signals.reset_index()
