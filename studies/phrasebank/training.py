"""Train students and cross-fitted teachers; what is finished lies in a cache, and a killed run continues."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.keep import commit
from distillery.config.load import load_params
from distillery.config.schema import ModelConfig, StudentConfig
from distillery.errors import UserError
from distillery.files import atomic_write, write_json
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel
from distillery.models.layers import count_layers, count_parameters
from distillery.models.predictions import predict_splits
from distillery.teachers.finetune import assign_folds
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.run import run_key, train_phases
from distillery.training.student import build_student, load_student
from distillery.training.weights import load_weights
from studies.phrasebank.data import ROOT, sentiment_task
from studies.phrasebank.settings import StudySettings


@dataclass(frozen=True)
class Cost:
    """What one model costs. parameters: of all its parts. minutes: processor time of its training and of the
    predictions before and between its phases; None when that was interrupted. commit: of the code that trained it."""

    parameters: int | None
    minutes: float | None
    commit: str


@dataclass(frozen=True)
class CrossFit:
    """A teacher that is the mean of its folds' models, each tuned on the training rows of the other folds.

    probabilities: [rows, labels]; a training row is labelled by the one model that has not seen it. fold: [rows], the
    fold of a training row, -1 of others. folders: where each fold's model is. cost: of all of them.
    """

    probabilities: np.ndarray
    fold: pd.Series
    folders: list[Path]
    cost: Cost


def stack_probabilities(predictions: pd.DataFrame, split: str) -> np.ndarray:
    """The probabilities of the rows of `split`, in their order [n, labels]."""
    return np.stack(predictions["probabilities"][predictions["split"] == split].to_list())


def train(
    spec: StudentConfig,
    model: ModelConfig,
    rows: pd.DataFrame,
    splits: dict[str, pd.DataFrame],
    *,
    seed: int,
    cache: Path,
    title: str,
    teachers: dict[str, OpenableTeacher] | None = None,
) -> tuple[pd.DataFrame, Cost, Path]:
    """The predictions of a student for the rows of each of `splits`, its cost and folder; read from `cache` if there.

    rows: as of :func:`distillery.training.rows.phase_rows`. splits: name -> rows (id, text, label), `validation` and
    `test` among them. Other splits change nothing in the training: a finished model predicts new ones without it.
    teachers: those whose hidden states the student learns.
    Returns the table of :func:`predict_splits`; the split `untrained` is `test` before the first phase. The folder, in
    `cache`, is named by all that decides the weights, and holds those of the last phase.
    """
    rows = rows[rows["split_ref"].isin([ref for phase in spec.phases for ref in phase.data])]
    settings = spec.model_dump(exclude={"control", "checkpoint_every", "folds"})
    trained_on = [content(part) for part in (rows, splits["validation"], splits["test"])]
    identities = [teacher.identity for teacher in (teachers or {}).values()]
    folder = cache / run_key(settings, model.model_dump(), seed, *trained_on, *identities)
    files = {name: folder / f"predictions-{run_key(content(part))}.parquet" for name, part in splits.items()}
    missing = {name: splits[name] for name, path in files.items() if not path.exists()}
    if missing or not (folder / "cost.json").exists():
        trained, interrupted, started = (folder / "cost.json").exists(), folder.exists(), time.process_time()
        print(f"{title}: {'predicting' if trained else 'training'}", flush=True)
        student = build_student(spec, fetch_model(spec.model, model), sentiment_task(), seed)
        _, between = train_phases(
            student,
            rows,
            spec,
            folder=folder / "phases",
            seed=seed,
            validation=splits["validation"],
            test=splits["test"],
            teachers=teachers,
            checkpoint_every=spec.checkpoint_every,
        )
        if not trained:
            untrained = between[(between["phase"] == 0) & (between["split"] == "test")]
            write_table(untrained.drop(columns="phase"), folder / "untrained.parquet")
            minutes = None if interrupted else (time.process_time() - started) / 60
            for k in range(len(spec.phases)):  # only those of the last phase are read again
                (folder / f"phases/phase-{k}/weights.safetensors").unlink(missing_ok=True)
            write_json(folder / "cost.json", vars(Cost(count_parameters(student.model)[0], minutes, commit(ROOT))))
        for name, part in missing.items():
            write_table(predict_splits(student, {name: part}), files[name])
    cost = Cost(**json.loads((folder / "cost.json").read_text(encoding="utf-8")))
    tables = [pd.read_parquet(folder / "untrained.parquet").assign(split="untrained")]
    tables += [pd.read_parquet(path).assign(split=name) for name, path in files.items()]
    return pd.concat(tables, ignore_index=True), cost, folder


def content(rows: pd.DataFrame) -> str:
    """What `rows` hold, for a key."""
    return rows.to_json(orient="records", double_precision=15)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """`table` as Parquet at `path`, whole or not at all."""
    with atomic_write(path) as scratch:
        table.to_parquet(scratch, index=False)


def cross_fit(name: str, settings: StudySettings, rows: pd.DataFrame, seed: int, cache: Path) -> CrossFit:
    """Teacher `name` of a seed, tuned once without each fold, with its labels for all `rows`."""
    spec = settings.teachers[name]
    train_rows = rows[rows["split_ref"] == "50agree/train"]
    fold = pd.Series(-1, index=rows.index)
    fold[train_rows.index] = assign_folds(train_rows, spec.folds, seed)
    splits = {ref.removeprefix("50agree/"): part for ref, part in rows.groupby("split_ref") if ref != "50agree/train"}
    probabilities, costs, folders = np.zeros((len(rows), len(sentiment_task().names))), [], []
    for k in range(spec.folds):
        all_splits = {"held out": rows[fold == k]} | splits
        model, title = settings.models[spec.model], f"seed {seed}, {name} without fold {k}"
        predictions, cost, folder = train(spec, model, rows[fold != k], all_splits, seed=seed, cache=cache, title=title)
        for split, part in all_splits.items():
            share = 1 if split == "held out" else spec.folds
            probabilities[part.index] += stack_probabilities(predictions, split) / share
        costs.append(cost)
        folders.append(folder)
    minutes = None if any(cost.minutes is None for cost in costs) else sum(cost.minutes for cost in costs)
    commits = " ".join(dict.fromkeys(cost.commit for cost in costs))
    return CrossFit(probabilities, fold, folders, Cost(sum(cost.parameters for cost in costs), minutes, commits))


def openable_teacher(name: str, settings: StudySettings, fitted: CrossFit, seed: int, cache: Path) -> OpenableTeacher:
    """Teacher `name`, for its hidden states. A row that is in no fold has those of the first fold's model."""
    spec = settings.teachers[name]
    source = fetch_model(spec.model, settings.models[spec.model])

    def open_fold(fold: int) -> LabelModel:
        teacher = build_student(spec, source, sentiment_task(), seed)
        weights = fitted.folders[max(fold, 0)] / f"phases/phase-{len(spec.phases)}/weights.safetensors"
        load_weights(teacher.model, weights)
        return teacher

    return OpenableTeacher(
        open_fold, [folder.name for folder in fitted.folders], count_layers(source), cache / "outputs"
    )


def predict_with_run(run: str, rows: pd.DataFrame) -> tuple[pd.DataFrame, Cost]:
    """The predictions of the main experiment's finished student in `runs/<run>` for `rows` (as split `test`), its cost.

    Raises UserError when there is no such student.
    """
    students, folder = load_params(ROOT / "params.yaml").students, ROOT / "runs" / run
    name = run.rpartition("-")[0]
    if name not in students or not (folder / "timing.json").exists():
        raise UserError(f"transfer_runs: no finished student in runs/{run}; run `make repro` or remove it there")
    student = load_student(students[name], folder / "model", sentiment_task())
    student.dtype = getattr(torch, students[name].dtype)  # of products, as the other models have it
    seconds = json.loads((folder / "timing.json").read_text(encoding="utf-8"))["train_seconds"]
    cost = Cost(count_parameters(student.model)[0], seconds / 60, commit(ROOT))
    return predict_splits(student, {"test": rows}), cost
