"""The tables behind figures and `dvc plots`."""

from __future__ import annotations

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.schema import Params
from distillery.evaluation.results import ModelResult, Results

RELIABILITY_COLUMNS = ("model", "confidence", "accuracy", "rows")

MIN_BIN_ROWS = 10  # a bin of fewer rows is left out: its accuracy is noise
MIN_SIZES = 3  # sizes from which students make a curve
SIZE_KEYS = {"init": {"layers"}, "control": True}  # the setting that decides the size, and one that changes no training


def score_table(board: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and macro-F1 of every model, a row each: model, role, score, value, and the interval low, high."""
    parts = [
        board[["model", "role"]].assign(score=s, value=board[s], low=board[f"{s}_low"], high=board[f"{s}_high"])
        for s in metrics.SCORES
    ]
    return pd.concat(parts, ignore_index=True)


def cost_shares(results: Results, board: pd.DataFrame) -> dict[str, dict[str, float]]:
    """By model, the shares that it takes: of its teacher's `parameters`, `megabytes` and `memory_mb`, of the memory
    that the training of its control took, `training_mb` and `training_gpu_mb`, and of its own parameters those that
    were trained, `trainable`. A count that is not known on both sides has no share."""
    rows = {row["model"]: row for row in board.to_dict("records")}
    shares: dict[str, dict[str, float]] = {}
    for result in results.models:
        teacher = results.teacher_of(result) if result.role in ("student", "control") else None
        parts = {"trainable": (result.trainable, result.parameters)}
        if teacher is not None:
            own, its_teachers = rows[result.name], rows[teacher.name]
            columns = ("parameters", "megabytes", "memory_mb")
            parts |= {column: (own.get(column), its_teachers.get(column)) for column in columns}
        if (control := results.find(result.control, result.source)) is not None:
            columns = ("training_mb", "training_gpu_mb")
            parts |= {column: (getattr(result, column), getattr(control, column)) for column in columns}
        shares[result.name] = {
            column: float(part) / float(whole)
            for column, (part, whole) in parts.items()
            if pd.notna(part) and pd.notna(whole) and whole
        }
    return shares


def reliability_table(results: Results) -> pd.DataFrame:
    """Model, confidence, accuracy and rows of each bin of predictions: the headline, its control and its teacher.

    Without rows for label sets, which have no likeliest label.
    """
    parts = [pd.DataFrame(columns=list(RELIABILITY_COLUMNS))] if results.are_sets else []
    for result in [] if results.are_sets else results.compared:
        label, p = pooled_predictions(results, result)
        bins = metrics.calibration(label, p, bins=10)
        rows = pd.DataFrame({key: bins[key] for key in ("confidence", "accuracy", "rows")})
        parts.append(rows[rows["rows"] >= MIN_BIN_ROWS].assign(model=result.name))
    return pd.concat(parts, ignore_index=True)[list(RELIABILITY_COLUMNS)]


def pooled_predictions(results: Results, result: ModelResult) -> tuple[np.ndarray, np.ndarray]:
    """The test rows of all seeds of `result` in one: indices of their labels [seeds * rows], probabilities [.., K]."""
    label = metrics.encode_labels(results.tests[result.source]["label"], results.labels[result.source])
    return np.tile(label, len(result.probabilities)), np.concatenate(result.probabilities)


def size_series(params: Params, board: pd.DataFrame) -> list[pd.DataFrame]:
    """The students that were trained alike and differ in size alone: the rows of `board` of each such group, from the
    smallest. A group has `MIN_SIZES` sizes or more.

    board: model, parameters, and whatever else its rows hold.
    """
    rows = board[board["model"].isin(list(params.students)) & board["parameters"].notna()]
    settings = [params.students[name].model_dump_json(exclude=SIZE_KEYS) for name in rows["model"]]
    groups = [group for _, group in rows.groupby(settings, sort=False)]
    sized = [group.sort_values("parameters", kind="stable") for group in groups]
    return [group for group in sized if group["parameters"].nunique() >= MIN_SIZES]
