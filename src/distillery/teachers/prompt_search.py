"""Compare prompts and calibrations of a prompted teacher on validation rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.schema import Params
from distillery.errors import UserError
from distillery.label_sets import LabelSets
from distillery.tasks.schema import Task
from distillery.teachers.base import Teacher, open_teacher
from distillery.teachers.prompted import divide_by_prior
from distillery.teachers.signals import signal_table

NO_CONTENT = ["N/A", "[MASK]", ""]  # Zhao et al. 2021
CALIBRATIONS = ("none", "contextual", "batch")
PRIOR_ROWS = 128  # rows over which `calibrate: batch` takes its mean, of a teacher that must label them for it


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
    """The teacher's prompts compared on validation rows, and the best of them: by macro-F1, calibrated as params say.

    rows: see :func:`distillery.teachers.base.gather_rows`. Returns one line per prompt and calibration (accuracy, low
    and high of its 95 % interval, macro_f1, unparsable), and the best as the `prompting` that
    :func:`distillery.teachers.base.open_teacher` takes. A teacher with one prompt needs no validation rows: without any
    the table is empty. Raises UserError when the task has no such prompt, or when several have no row to be scored on.
    """
    spec, lines, candidates = params.teachers[name], [], []
    validation = rows[rows["split"] == "validation"].reset_index(drop=True)
    unlabelled = rows[rows["split"] == ("pool" if (rows["split"] == "pool").any() else "train")]
    if spec.kind != "answers":  # whose predictions cost nothing
        unlabelled = unlabelled.head(PRIOR_ROWS)
    unlabelled = unlabelled.reset_index(drop=True)
    if unlabelled.empty and spec.calibrate == "batch":
        raise UserError(f"params.yaml: teachers.{name}.calibrate: no row of pool or train to take the mean over")
    if validation.empty and spec.prompts:
        raise UserError(f"params.yaml: teachers.{name}.prompts: no validation row with a label to compare them on")
    calibrations = {"api": ["none", spec.calibrate], "answers": ["none", "batch"]}.get(spec.kind, CALIBRATIONS)
    if isinstance(task.names, LabelSets):  # a prior would divide a distribution over labels
        calibrations = ["none"]
    for prompt in [None, *spec.prompts]:
        if prompt is not None and prompt not in task.prompts:
            known = ", ".join(task.prompts) or "none"
            raise UserError(f"params.yaml: teachers.{name}.prompts: the task has no `{prompt}`; it has: {known}")
        teacher = open_teacher(root, name, params, task, prompting={"prompt": prompt, "prior": None})
        probabilities = teacher.predict(validation) if len(validation) else None
        for calibration in dict.fromkeys(calibrations if len(validation) else [spec.calibrate]):
            prior, macro_f1 = estimate_label_prior(teacher, calibration, unlabelled), 0.0
            if probabilities is not None:
                scores = _score(validation, divide_by_prior(probabilities, prior), task.names)
                lines.append({"prompt": prompt or "prompt", "calibrate": calibration} | scores)
                macro_f1 = scores["macro_f1"]
            if calibration == spec.calibrate:
                rounded = None if prior is None else [round(float(share), 6) for share in prior]
                candidates.append((macro_f1, {"prompt": prompt, "prior": rounded}))
        del teacher  # one is held at a time
    return pd.DataFrame(lines), max(candidates, key=lambda candidate: candidate[0])[1]


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
