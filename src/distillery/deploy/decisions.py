"""From probabilities to what a user sees: predictions, confidences, abstentions and prediction sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distillery import metrics
from distillery.deploy.predictors import Predictor
from distillery.deploy.settings import InferenceSettings
from distillery.errors import UserError
from distillery.label_sets import SET_SEPARATOR, LabelSets


def check_usable(settings: InferenceSettings, abstain: bool) -> None:
    """Raise UserError when the student cannot predict new rows, or cannot abstain."""
    if settings.task.kind == "choice":
        raise UserError(
            f"{settings.student}: a `choice` task has options of its own in each row; predict cannot read them"
        )
    if not abstain:
        return
    if settings.abstention is None:
        problem = (
            "label sets have thresholds" if settings.task.kind == "multilabel" else "free answers have no confidence"
        )
        raise UserError(f"{settings.student}: {problem}: it cannot abstain")
    if settings.abstention.threshold is None:
        raise UserError(
            f"{settings.student}: at no confidence were {settings.abstention.accuracy:.0%} of the validation rows "
            "right; lower `evaluate.selective_accuracy`, or leave out --abstain"
        )


def output_columns(settings: InferenceSettings, probabilities: bool) -> list[str]:
    """The names of the columns that :func:`decide` gives."""
    if settings.task.kind == "qa":
        return ["prediction"]
    sets = ["prediction_set"] if settings.prediction_sets else []
    return ["prediction", "confidence", *sets, *(f"p_{name}" for name in settings.task.names if probabilities)]


def decide(
    predictor: Predictor, settings: InferenceSettings, texts: Sequence[str], *, abstain: bool, probabilities: bool
) -> list[dict[str, Any]]:
    """The output columns of each of `texts`; None in all of them for an empty text.

    abstain: leave the prediction out (None) where the calibrated confidence is under the threshold of the settings.
    """
    empty = dict.fromkeys(output_columns(settings, probabilities))
    rows = [dict(empty) for _ in texts]
    filled = [i for i, text in enumerate(texts) if text]
    if not filled:
        return rows
    chosen = [texts[i] for i in filled]
    if settings.task.kind == "qa":
        for i, answer in zip(filled, predictor.answer(chosen), strict=True):
            rows[i]["prediction"] = answer
        return rows
    p, names = np.asarray(predictor.predict(chosen), dtype=np.float64), settings.task.names
    if not isinstance(names, LabelSets):
        p = metrics.apply_temperature(p, settings.temperature)
    predictions = metrics.decide(p, names, settings.thresholds)
    confidence = metrics.confidence(p, predictions, names)
    threshold = settings.abstention.threshold if abstain and settings.abstention else 0.0
    for k, i in enumerate(filled):
        rows[i]["prediction"] = predictions[k] if confidence[k] >= threshold else None
        rows[i]["confidence"] = round(float(confidence[k]), 6)
        if settings.prediction_sets:
            members = [
                name for name, value in zip(names, p[k], strict=True) if value >= settings.prediction_sets.threshold
            ]
            rows[i]["prediction_set"] = SET_SEPARATOR.join(members)
        if probabilities:
            rows[i] |= {f"p_{name}": round(float(value), 6) for name, value in zip(names, p[k], strict=True)}
    return rows
