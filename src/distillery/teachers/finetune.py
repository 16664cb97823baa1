"""Fine-tune a teacher on gold rows, and on folds of them for out-of-fold signals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from distillery.config.schema import Params
from distillery.errors import UserError
from distillery.models.label_model import LabelModel
from distillery.tasks.schema import Task
from distillery.teachers.base import open_teacher
from distillery.teachers.signals import label_rows
from distillery.training.rows import gold_rows
from distillery.training.run import run_key, train_phase
from distillery.training.student import attach_adapters


def finetune_teacher(
    name: str, params: Params, task: Task, rows: pd.DataFrame, *, folder: Path, part: str = "all"
) -> tuple[LabelModel, pd.DataFrame]:
    """The teacher fine-tuned on gold `rows` (id, text, label), and its training history.

    Checkpoints lie in `folder` under a key of everything that decides the result; a killed run continues there.
    """
    spec = params.teachers[name]
    teacher = open_teacher(name, params, task)
    teacher.model = attach_adapters(teacher.model, spec.finetune.lora, teacher.arch, spec.seed)
    key = run_key(
        spec.model_dump(),
        params.models[spec.model].model_dump(),
        task.model_dump(),
        part,
        rows[["id", "text", "label", *(["answers"] if task.kind == "qa" else [])]].to_csv(),
    )
    history = train_phase(
        teacher,
        gold_rows(rows, task),
        spec.finetune.as_phase(),
        folder=folder / key,
        seed=spec.seed,
        title=f"{name} on {part}",
    )
    return teacher, history


def assign_folds(rows: pd.DataFrame, k: int, seed: int) -> np.ndarray:
    """Fold of every row [n], 0 to k - 1: whole groups, labels spread evenly; -1, of none, when k is 0.

    Raises UserError when there are fewer groups than folds.
    """
    if not k:
        return np.full(len(rows), -1)
    if rows["group"].nunique() < k:
        raise UserError(f"teachers: finetune.folds: {k} folds need {k} groups, there are {rows['group'].nunique()}")
    splitter = StratifiedGroupKFold(k, shuffle=True, random_state=seed)
    out = np.empty(len(rows), dtype=int)
    for fold, (_, held_out) in enumerate(splitter.split(rows, rows["label"], rows["group"])):
        out[held_out] = fold
    return out


def cross_fit(
    name: str,
    params: Params,
    task: Task,
    gold: pd.DataFrame,
    fold: np.ndarray,
    folder: Path,
    said: pd.DataFrame,
) -> pd.DataFrame:
    """`said`, with the gold rows answered by the fold models in `folder` that were tuned without them; without those of
    no fold.

    gold: rows (source, split, id, text). fold: [len(gold)], see :func:`assign_folds`.
    """
    keys = ["source", "split", "id"]
    said = said.set_index(keys)
    said = said.drop(pd.MultiIndex.from_frame(gold.loc[fold < 0, keys]))
    for k in sorted(set(fold[fold >= 0])):
        rows = gold[fold == k]
        model = open_teacher(name, params, task, tuned=folder / str(k))
        new = label_rows(model, rows, k, params.teachers[name].max_new_tokens).set_index(keys)
        plain = new.columns.drop("probabilities")
        said.loc[new.index, plain] = new[plain]
        for key, value in new["probabilities"].items():
            said.at[key, "probabilities"] = value
    return said.reset_index()
