"""Compare prompts and calibrations of a prompted teacher on validation rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.schema import Params
from distillery.errors import UserError
from distillery.models.label_model import LabelModel
from distillery.tasks.schema import Task
from distillery.teachers.base import open_prompted_teacher
from distillery.teachers.local import predict_labels
from distillery.teachers.signals import signal_table

if TYPE_CHECKING:
    from distillery.teachers.api.teacher import ApiTeacher


NO_CONTENT = ["N/A", "[MASK]", ""]  # Zhao et al. 2021


CALIBRATIONS = ("none", "contextual", "batch")


PRIOR_ROWS = 128  # rows over which `calibrate: batch` takes its mean


def estimate_label_prior(teacher: LabelModel | ApiTeacher, how: str, unlabelled: pd.DataFrame) -> np.ndarray | None:
    """What `teacher` says of the labels [labels] before it reads anything, to divide its answers by.

    how: `contextual`, the mean over texts without content (Zhao et al. 2021, Calibrate Before Use, section 5); `batch`,
    the mean over the rows `unlabelled` (Zhou et al. 2023, Batch Calibration, eq. 4); `none`.
    """
    if how == "none":
        return None
    empty = pd.DataFrame({"id": "", "text": NO_CONTENT, "group": None})
    said = predict_labels(teacher, empty if how == "contextual" else unlabelled)
    return np.nanmean(said, 0)


def compare_prompts(
    root: Path, name: str, params: Params, task: Task, rows: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The teacher's prompts compared on validation rows, and the best of them: by macro-F1 as `calibrate` says.

    rows: see :func:`gather_rows`. Returns a line for each prompt and calibration (accuracy with its 95 % interval,
    macro_f1, unparsable), and how the teacher is to be asked: see :func:`open_prompted_teacher`.
    """
    spec, lines, hows = params.teachers[name], [], []
    validation = rows[rows["split"] == "validation"].reset_index(drop=True)
    unlabelled = rows[rows["split"] == ("pool" if (rows["split"] == "pool").any() else "train")]
    unlabelled = unlabelled.head(PRIOR_ROWS).reset_index(drop=True)
    for prompt in [None, *spec.prompts]:
        if prompt is not None and prompt not in task.prompts:
            known = ", ".join(task.prompts) or "none"
            raise UserError(f"params.yaml: teachers.{name}.prompts: the task has no `{prompt}`; it has: {known}")
        teacher = open_prompted_teacher(root, name, params, task, {"prompt": prompt, "prior": None})
        plain = predict_labels(teacher, validation)
        for calibrate in dict.fromkeys(["none", spec.calibrate] if spec.kind == "api" else CALIBRATIONS):
            prior = estimate_label_prior(teacher, calibrate, unlabelled)
            p = plain if prior is None else plain / np.maximum(prior, 1e-6)
            said = signal_table(validation, p / p.sum(-1, keepdims=True), task.names, -1)
            gold, answered = validation["label"].tolist(), said["label"].tolist()
            drawn = metrics.bootstrap_scores(gold, answered, task.names, validation["group"].tolist())
            low, high = metrics.interval(drawn["accuracy"])
            scores = metrics.mean_scores(gold, answered, task.names)
            line = {"prompt": prompt or "prompt", "calibrate": calibrate, "accuracy": scores["accuracy"]}
            line |= {"low": low, "high": high, "macro_f1": scores["macro_f1"]}
            lines.append(line | {"unparsable": int(said["label"].isna().sum())})
            if calibrate == spec.calibrate:
                prior = None if prior is None else [round(float(x), 6) for x in prior]
                hows.append((scores["macro_f1"], {"prompt": prompt, "prior": prior}))
    return pd.DataFrame(lines), max(hows, key=lambda pair: pair[0])[1]
