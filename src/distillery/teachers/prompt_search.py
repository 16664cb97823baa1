"""Compare prompts and calibrations of a prompted teacher, on validation rows or without any label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.schema import Params
from distillery.errors import UserError
from distillery.label_sets import LabelSets
from distillery.tasks.chosen_prompt import check_prompt
from distillery.tasks.schema import Task
from distillery.teachers.base import Teacher, open_teacher
from distillery.teachers.prompted import divide_by_prior
from distillery.teachers.signals import signal_table

NO_CONTENT = ["N/A", "[MASK]", ""]  # Zhao et al. 2021
CALIBRATIONS = ("none", "contextual", "batch")
PRIOR_ROWS = 128  # rows for the mean of `calibrate: batch` and of mutual information, of a teacher that must label them


def estimate_label_prior(teacher: Teacher, calibration: str, unlabelled: pd.DataFrame) -> np.ndarray | None:
    """The label distribution [labels] that the prompt alone brings about, by which predictions are then divided.

    calibration: `contextual`, the mean over texts without content (Zhao et al. 2021, Calibrate Before Use, section 5);
    `batch`, the mean over the rows `unlabelled` (Zhou et al. 2023, Batch Calibration, eq. 4); `none` returns None.
    """
    if calibration == "none":
        return None
    no_content = pd.DataFrame({"id": "", "text": NO_CONTENT, "group": None})
    return np.nanmean(teacher.predict(no_content if calibration == "contextual" else unlabelled), 0)


def compare_prompts(
    root: Path, name: str, params: Params, task: Task, rows: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The teacher's prompts compared on validation rows, and the best of them, calibrated as params say.

    rows: see :func:`distillery.teachers.base.gather_rows`. Returns one line per prompt and calibration (accuracy, low
    and high of its 95 % interval, macro_f1, unparsable; with `choose_prompt_by: mutual_information` that, too), and the
    best as the `prompting` that :func:`distillery.teachers.base.open_teacher` takes. Without validation rows the table
    is empty: a teacher with one prompt, or one that is chosen by mutual information, needs none. Raises UserError when
    the task has no such prompt, or when there is no row to choose on.
    """
    spec, lines, candidates = params.teachers[name], [], []
    validation = rows[rows["split"] == "validation"].reset_index(drop=True)
    unlabelled, by_information = _unlabelled_rows(name, params, rows), spec.choose_prompt_by == "mutual_information"
    if validation.empty and spec.prompts and not by_information:
        raise UserError(f"params.yaml: teachers.{name}.prompts: no validation row with a label to compare them on")
    calibrations = {"api": ["none", spec.calibrate], "answers": ["none", "batch"]}.get(spec.kind, CALIBRATIONS)
    if isinstance(task.names, LabelSets):  # a prior would divide a distribution over labels
        calibrations = ["none"]
    for prompt in [None, *spec.prompts]:
        check_prompt(task, prompt, f"params.yaml: teachers.{name}.prompts")
        teacher = open_teacher(root, name, params, task, prompting={"prompt": prompt, "prior": None})
        probabilities = teacher.predict(validation) if len(validation) else None
        without_label = teacher.predict(unlabelled) if by_information else None
        for calibration in dict.fromkeys(calibrations if len(validation) else [spec.calibrate]):
            prior, scores = estimate_label_prior(teacher, calibration, unlabelled), {}
            if probabilities is not None:
                scores = _score(validation, divide_by_prior(probabilities, prior), task.names)
            if without_label is not None:
                scores["mutual_information"] = _information(divide_by_prior(without_label, prior), task.names)
            if probabilities is not None:
                lines.append({"prompt": prompt or "prompt", "calibrate": calibration} | scores)
            if calibration == spec.calibrate:
                rounded = None if prior is None else [round(float(share), 6) for share in prior]
                candidates.append((scores.get(spec.choose_prompt_by, 0.0), {"prompt": prompt, "prior": rounded}))
        del teacher  # one is held at a time
    if by_information:
        scored = ", ".join(f"{choice['prompt'] or 'prompt'} {score:.3f}" for score, choice in candidates)
        print(f"{name}: mutual information of {len(unlabelled):,} rows and their predictions, in nats: {scored}")
    return pd.DataFrame(lines), max(candidates, key=lambda candidate: candidate[0])[1]


def _unlabelled_rows(name: str, params: Params, rows: pd.DataFrame) -> pd.DataFrame:
    """The `rows` over which teacher `name` takes means of its predictions; their labels are not looked at.

    Raises UserError when there is none and it needs some.
    """
    spec = params.teachers[name]
    unlabelled = rows[rows["split"] == ("pool" if (rows["split"] == "pool").any() else "train")]
    if spec.kind != "answers":  # whose predictions cost nothing
        unlabelled = unlabelled.head(PRIOR_ROWS)
    key = "calibrate" if spec.calibrate == "batch" else None
    key = "choose_prompt_by" if spec.choose_prompt_by == "mutual_information" else key
    if unlabelled.empty and key:
        raise UserError(f"params.yaml: teachers.{name}.{key}: no row of pool or train to take the mean over")
    return unlabelled.reset_index(drop=True)


def _information(probabilities: np.ndarray, names: list[str]) -> float:
    """Mutual information of rows and predictions [n, labels], in nats; of label sets the sum over the labels.

    Times the share of rows whose answer could be read: few answers that differ tell little about the rows.
    """
    read = probabilities[~np.isnan(probabilities).any(1)]
    if not len(read):
        return 0.0
    share = len(read) / len(probabilities)
    if isinstance(names, LabelSets):
        return share * sum(metrics.mutual_information(np.stack([1 - p, p], axis=1)) for p in read.T)
    return share * metrics.mutual_information(read)


def _score(rows: pd.DataFrame, probabilities: np.ndarray, names: list[str]) -> dict[str, float]:
    """accuracy, low, high, macro_f1 and unparsable of `probabilities` [n, labels] on labelled `rows`."""
    predicted = signal_table(rows, probabilities, names, -1)["label"]
    labels, predictions = rows["label"].tolist(), predicted.tolist()
    resampled = metrics.bootstrap_scores(labels, predictions, names, rows["group"].tolist())
    low, high = metrics.interval(resampled["accuracy"])
    scores = metrics.mean_scores(labels, predictions, names)
    return {
        "accuracy": scores["accuracy"],
        "low": low,
        "high": high,
        "macro_f1": scores["macro_f1"],
        "unparsable": int(predicted.isna().sum()),
    }
