"""Scores of all models with their intervals, and the gains of students over their controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.schema import StudentConfig
from distillery.files import atomic_write
from studies.phrasebank.data import SUBSETS, sentiment_task
from studies.phrasebank.training import Cost

RESAMPLES = 2000
INTERVALS = [f"{score}{end}" for score in metrics.SCORES for end in ("", "_low", "_high")]
RESULT_COLUMNS = ["subset", "model", "role", "million_parameters", "seeds", *INTERVALS, "minutes", "commit"]
GAIN_COLUMNS = ["subset", "student", "control", "seeds", "score", "difference", "low", "high"]


@dataclass(frozen=True)
class EvaluatedModel:
    """The predictions of one model of one seed. role: teacher, student, control, untrained, majority or transfer.

    rows: its test rows (label, prediction, group, allagree).
    """

    name: str
    role: str
    seed: int
    rows: pd.DataFrame
    cost: Cost

    def columns(self, subset: str) -> list[np.ndarray]:
        """Label, prediction and group of the test rows in `subset`."""
        rows = self.rows if subset == "50agree" else self.rows[self.rows["allagree"]]
        return [rows[column].to_numpy(dtype=object) for column in ("label", "prediction", "group")]


def resample_scores(models: Sequence[EvaluatedModel], subset: str) -> dict[str, tuple[float, np.ndarray]]:
    """Each score's mean over the seeds of a model, and that mean under resamples of groups and of seeds [RESAMPLES].

    A seed's resamples draw the same groups for every model, so the differences of two models' resamples are paired.
    """
    labels = sentiment_task().names
    columns = [model.columns(subset) for model in models]
    means = [metrics.mean_scores(label, prediction, labels) for label, prediction, _ in columns]
    samples = [
        metrics.bootstrap_scores(label, prediction, labels, group, RESAMPLES, model.seed)
        for model, (label, prediction, group) in zip(models, columns, strict=True)
    ]
    n = len(models)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return {
        score: (
            float(np.mean([mean[score] for mean in means])),
            (np.stack([sample[score] for sample in samples], 1) * weights).sum(1) / n,
        )
        for score in metrics.SCORES
    }


def result_table(evaluated: Sequence[EvaluatedModel]) -> pd.DataFrame:
    """One row for each subset and model, `RESULT_COLUMNS`. Minutes are a mean over the seeds that were measured."""
    rows = []
    for subset, (name, role) in product(SUBSETS, dict.fromkeys((model.name, model.role) for model in evaluated)):
        models = [model for model in evaluated if (model.name, model.role) == (name, role)]
        costs = [model.cost for model in models]
        row = {"subset": subset, "model": name, "role": role, "seeds": len(models)}
        row["million_parameters"] = round(costs[0].parameters / 1e6, 1) if costs[0].parameters else None
        for score, (mean, samples) in resample_scores(models, subset).items():
            low, high = metrics.interval(samples)
            row |= {score: mean, f"{score}_low": low, f"{score}_high": high}
        row["minutes"] = round(pd.Series([cost.minutes for cost in costs], dtype=float).mean(), 2)
        row["commit"] = " ".join(dict.fromkeys(cost.commit for cost in costs))
        rows.append(row)
    return pd.DataFrame(rows, columns=RESULT_COLUMNS)


def gain_table(evaluated: Sequence[EvaluatedModel], students: dict[str, StudentConfig]) -> pd.DataFrame:
    """Each student that has a control, minus that control and all students that have none, `GAIN_COLUMNS`.

    Both are scored on the same test rows of the seeds that they share.
    """
    rows, without_control = [], [name for name, spec in students.items() if spec.control is None]
    models = {(model.name, model.seed): model for model in evaluated}
    pairs = [
        (name, control)
        for name, spec in students.items()
        if spec.control is not None
        for control in dict.fromkeys([spec.control, *without_control])
    ]
    for (name, control), subset in product(pairs, SUBSETS):
        seeds = [seed for key, seed in models if key == name and (control, seed) in models]
        if seeds:
            student, other = (resample_scores([models[key, seed] for seed in seeds], subset) for key in (name, control))
            for score in metrics.SCORES:
                low, high = metrics.interval(student[score][1] - other[score][1])
                gain = student[score][0] - other[score][0]
                rows.append([subset, name, control, len(seeds), score, gain, low, high])
    return pd.DataFrame(rows, columns=GAIN_COLUMNS)


def write_results(results: pd.DataFrame, gains: pd.DataFrame, folder: Path) -> None:
    """Write `results.csv` and `gains.csv` into `folder`."""
    for name, table, digits in (("results", results, "%.6g"), ("gains", gains, "%.4f")):
        with atomic_write(folder / f"{name}.csv") as path:
            table.to_csv(path, index=False, float_format=digits)
