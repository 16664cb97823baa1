"""Compare prompts and calibrations of a prompted teacher, on validation rows or without any label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery import metrics
from distillery.config.schema import Params, TeacherConfig
from distillery.errors import UserError
from distillery.label_sets import LabelSets
from distillery.tasks.chosen_prompt import check_prompt
from distillery.tasks.schema import Task
from distillery.teachers.base import Teacher, open_teacher
from distillery.teachers.calibration import (
    ROWS_PER_LABEL,
    Calibration,
    LabelPrior,
    TooFewRowsError,
    calibrated,
    calibration_record,
    fit_clusters,
)
from distillery.teachers.signals import signal_table

NO_CONTENT = ["N/A", "[MASK]", ""]  # Zhao et al. 2021
CALIBRATIONS = ("none", "contextual", "batch", "clusters")
OF_UNLABELLED = ("batch", "clusters")  # are estimated on rows without a label
PRIOR_ROWS = 128  # without a label, which a teacher labels to be calibrated, and for mutual information


def unlabelled_limit(spec: TeacherConfig, labels: int) -> int:
    """How many rows without a label the teacher labels at most to be calibrated. labels: of its task."""
    return max(PRIOR_ROWS, 2 * ROWS_PER_LABEL * labels) if spec.calibrate == "clusters" else PRIOR_ROWS


def estimate_calibration(
    teacher: Teacher, kind: str, unlabelled: pd.DataFrame, known: np.ndarray | None = None
) -> Calibration | None:
    """The calibration of `teacher`, whose predictions are not calibrated yet.

    kind: `contextual`, division by the mean over texts without content (Zhao et al. 2021, Calibrate Before Use, section
    5); `batch`, by the mean over the rows `unlabelled` (Zhou et al. 2023, Batch Calibration, eq. 4); `clusters`, see
    :func:`fit_clusters`; `none` gives None. known: the predictions for `unlabelled`, where they are known. Raises
    TooFewRowsError when there are too few rows for clusters.
    """
    if kind == "none":
        return None
    if kind == "contextual":
        no_content = pd.DataFrame({"id": "", "text": NO_CONTENT, "group": None})
        return LabelPrior(np.nanmean(teacher.predict(no_content), 0))
    probabilities = teacher.predict(unlabelled) if known is None else known
    return fit_clusters(probabilities) if kind == "clusters" else LabelPrior(np.nanmean(probabilities, 0))


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
    unlabelled, by_information = _unlabelled_rows(name, params, rows, task), _is_by_information(spec)
    if validation.empty and spec.prompts and not by_information:
        raise UserError(f"params.yaml: teachers.{name}.prompts: no validation row with a label to compare them on")
    calibrations = _calibrations(spec, task) if len(validation) else [spec.calibrate]
    for prompt in [None, *spec.prompts]:
        check_prompt(task, prompt, f"params.yaml: teachers.{name}.prompts")
        teacher = open_teacher(root, name, params, task, prompting={"prompt": prompt, "prior": None})
        probabilities = teacher.predict(validation) if len(validation) else None
        without_label = teacher.predict(unlabelled) if by_information or {*OF_UNLABELLED} & {*calibrations} else None
        for kind in calibrations:
            try:
                calibration, scores = estimate_calibration(teacher, kind, unlabelled, without_label), {}
            except TooFewRowsError as error:
                if kind != spec.calibrate:
                    continue  # only compared
                raise UserError(f"params.yaml: teachers.{name}.calibrate: {kind}: {error}") from None
            if probabilities is not None:
                scores = _score(validation, calibrated(probabilities, calibration), task.names)
            if by_information:
                scores["mutual_information"] = _information(calibrated(without_label, calibration), task.names)
            if probabilities is not None:
                lines.append({"prompt": prompt or "prompt", "calibrate": kind} | scores)
            if kind == spec.calibrate:
                best = {"prompt": prompt} | calibration_record(calibration)
                candidates.append((scores.get(spec.choose_prompt_by, 0.0), best))
        del teacher  # one is held at a time
    if by_information:
        scored = ", ".join(f"{choice['prompt'] or 'prompt'} {score:.3f}" for score, choice in candidates)
        print(f"{name}: mutual information of {len(unlabelled):,} rows and their predictions, in nats: {scored}")
    return pd.DataFrame(lines), max(candidates, key=lambda candidate: candidate[0])[1]


def _calibrations(spec: TeacherConfig, task: Task) -> list[str]:
    """The calibrations to compare, the one of `spec` among them."""
    if isinstance(task.names, LabelSets):  # a prior would divide a distribution over labels
        return ["none"]
    compared = {"api": ("none",), "answers": ("none", *OF_UNLABELLED)}.get(spec.kind, CALIBRATIONS)
    if task.kind == "choice":
        compared = [kind for kind in compared if kind != "clusters"]
    return list(dict.fromkeys([*compared, spec.calibrate]))


def _is_by_information(spec: TeacherConfig) -> bool:
    return spec.choose_prompt_by == "mutual_information"


def _unlabelled_rows(name: str, params: Params, rows: pd.DataFrame, task: Task) -> pd.DataFrame:
    """The `rows` on which teacher `name` is calibrated; their labels are not looked at.

    Raises UserError when there is none and it needs some.
    """
    spec = params.teachers[name]
    unlabelled = rows[rows["split"] == ("pool" if (rows["split"] == "pool").any() else "train")]
    if spec.kind != "answers":  # whose predictions cost nothing
        unlabelled = unlabelled.head(unlabelled_limit(spec, len(task.names)))
    key = "calibrate" if spec.calibrate in OF_UNLABELLED else None
    key = "choose_prompt_by" if _is_by_information(spec) else key
    if unlabelled.empty and key:
        raise UserError(f"params.yaml: teachers.{name}.{key}: no row of pool or train to label without calibration")
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
