"""Fit a student's temperature and thresholds on its validation rows, and write them into its model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.schema import Params
from distillery.config.schema.evaluate import EvaluateConfig
from distillery.data.storage import read_task
from distillery.deploy.settings import SETTINGS_FILE, Abstention, InferenceSettings, PredictionSets
from distillery.evaluation.reading import read_result_file
from distillery.files import Paths, write_json
from distillery.models.predictions import validation_thresholds
from distillery.tasks.chosen_prompt import student_task
from distillery.tasks.schema import Task

Z = 1.959964  # of a two-sided interval of 95 %


def wilson_low(right: int, n: int) -> float:
    """Lower end of the 95 % interval of a share, `right` of `n` rows (Wilson 1927), in [0, 1]."""
    center, half = right + Z**2 / 2, Z * np.sqrt(right * (n - right) / n + Z**2 / 4)
    return float(max(0.0, (center - half) / (n + Z**2)))


def fit_abstention(true: np.ndarray, p: np.ndarray, accuracy: float) -> Abstention:
    """The abstention for a wanted `accuracy`. true [n] are positions, p [n, K] calibrated probabilities."""
    threshold = metrics.selective_threshold(true, p, accuracy)
    answered = p.max(1) >= (np.inf if threshold is None else threshold)
    n, right = int(answered.sum()), int((p.argmax(1) == true)[answered].sum())
    return Abstention(
        accuracy=accuracy,
        threshold=threshold,
        answered=n / len(true),
        accuracy_low=wilson_low(right, n) if n else None,
        rows=len(true),
    )


def calibrated(task: Task, validation: pd.DataFrame, config: EvaluateConfig) -> dict[str, object]:
    """The fields temperature, abstention, thresholds and prediction_sets of :class:`InferenceSettings`.

    validation: rows (split, label, probabilities). Free answers have no probabilities to calibrate. Those of a
    `multilabel` task stay as they are: thresholds alone decide.
    """
    if task.kind == "multilabel":
        thresholds = validation_thresholds(validation, task.names)
        chosen = None if thresholds is None else thresholds.tolist()
        return {"temperature": 1.0, "abstention": None, "thresholds": chosen}
    if task.kind == "qa" or not len(validation):
        return {"temperature": 1.0, "abstention": None}
    true = metrics.encode_labels(validation["label"], task.names)
    p = np.stack(validation["probabilities"].to_list())
    temperature = metrics.fit_temperature(true, p)
    scaled = metrics.apply_temperature(p, temperature)
    coverage, sets = config.conformal_coverage, None
    if coverage:
        threshold = metrics.conformal_threshold(true, scaled, coverage)
        sets = PredictionSets(coverage=coverage, threshold=threshold)
    abstention = fit_abstention(true, scaled, config.selective_accuracy)
    return {"temperature": temperature, "abstention": abstention, "prediction_sets": sets}


def write_settings(root: Path, params: Params) -> None:
    """Write `inference.json` into the model folder of every run. DVC ignores it there, as it does the card.

    Raises UserError when a run is missing.
    """
    for name, spec in params.students.items():
        source = params.test_source(name)
        task, columns = read_task(Paths(root).processed(source)), params.data[source].columns.text
        task = student_task(root, task, spec.prompt_of)
        for run in (Paths(root).run(name, seed) for seed in params.seeds):
            rows = read_result_file(run / "predictions.parquet", root)
            settings = InferenceSettings(
                student=name,
                arch=spec.arch,
                task=task,
                text_columns=[columns] if isinstance(columns, str) else list(columns),
                max_length=spec.max_length,
                prompt=spec.prompt,
                few_shot=spec.few_shot,
                **calibrated(task, rows[rows["split"] == "validation"], params.evaluate),
            )
            # a program that predicts does not need the rest of the task
            unused: dict[str, Any] = {"task": {"perturbations", "prompts", "severity"}}
            unused |= {"thresholds": True} if settings.thresholds is None else {}
            content = settings.model_dump(exclude=unused)
            write_json(run / "model" / SETTINGS_FILE, content)
