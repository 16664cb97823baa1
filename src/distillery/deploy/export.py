"""Write the exports of a student, ONNX of a classifier and GGUF of a causal model, and compare them with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from distillery import metrics
from distillery.config.schema.evaluate import EvaluateConfig
from distillery.deploy.gguf_file import read_gguf, write_gguf
from distillery.deploy.onnx_file import write_onnx
from distillery.deploy.predictors import EXPORT_FILES, EXPORTS_FILE, WEIGHTS_FILE, OnnxPredictor
from distillery.deploy.settings import InferenceSettings
from distillery.deploy.torch_predictor import open_label_model
from distillery.errors import UserError
from distillery.evaluation.speed import probability_function, throughput
from distillery.files import atomic_write, file_digest, write_json
from distillery.models.series_adapters import stored_adapters

ProbabilityFunction = Callable[[pd.DataFrame], np.ndarray]  # test rows -> probabilities of the labels [rows, labels]


def export_kind(settings: InferenceSettings) -> str:
    """The kind of files that the student is exported to, a key of `EXPORT_FILES`. Raises UserError if there is none."""
    if settings.task.kind == "qa":
        raise UserError(
            f"{settings.student}: exports are compared by the probabilities of labels; a `qa` task has none"
        )
    if settings.arch not in KINDS:
        raise UserError(f"{settings.student} is {settings.arch}; classifiers and causal models are exported")
    return KINDS[settings.arch]


KINDS = {"classifier": "onnx", "causal": "gguf"}  # by architecture


def write_exports(folder: Path, settings: InferenceSettings) -> None:
    """Write the exports of the student in a model `folder` to its folder `onnx` or `gguf`, whole or not at all.

    Raises UserError for another architecture, for a model with series adapters, without the extra `export`, and when
    the model cannot be exported.
    """
    kind = export_kind(settings)
    if stored_adapters(folder):
        raise UserError(f"{settings.student} has series adapters, which no export can hold; train it with `lora`")
    with atomic_write(folder / kind) as scratch:
        scratch.mkdir()
        if kind == "onnx":
            return write_onnx(folder, settings, scratch)
        for name, file in EXPORT_FILES[kind].items():
            write_gguf(folder, settings, scratch / file, name.removeprefix("gguf-"))


def compare_exports(
    folder: Path, settings: InferenceSettings, test: pd.DataFrame, config: EvaluateConfig
) -> dict[str, np.ndarray]:
    """Score the exports in a model `folder` beside the torch student on `test` rows (text, label, group).

    Writes `exports.json` beside them: of each export file, bytes, agreement (share of rows with the student's
    prediction), largest_difference (of a probability), accuracy, its difference from the student's with an interval,
    and whether it is within `config.export_tolerance`; and rows a second, where a program of its own computes it. The
    weights of a GGUF file are read back from it, dequantized, and scored as the student: by torch, with its tokenizer.
    Returns the probabilities [rows, labels] by name.
    """
    kind, threads = export_kind(settings), torch.get_num_threads()
    files = {name: folder / kind / file for name, file in EXPORT_FILES[kind].items()}
    student = probability_function(open_label_model(folder, settings))
    expected, rates = student(test), {}
    if kind == "onnx":
        functions = {name: _onnx_function(folder, settings, name, file) for name, file in files.items()}
        probabilities = {name: predict(test) for name, predict in functions.items()}
        rates = throughput({"torch": student, **functions}, test.head(config.throughput_rows))
    else:
        models = ((name, open_label_model(folder, settings, read_gguf(file))) for name, file in files.items())
        probabilities = {name: probability_function(model)(test) for name, model in models}
    scores = {
        name: {"file": files[name].name, "bytes": files[name].stat().st_size}
        | compare_probabilities(p, expected, test, settings.task.names, config, settings.thresholds)
        | ({"rows_per_second": round(rates[name], 1)} if rates else {})
        for name, p in probabilities.items()
    }
    content = {"weights": file_digest(folder / WEIGHTS_FILE), "threads": threads, "rows": len(test)}
    content |= {"torch_rows_per_second": rates["torch"]} if rates else {}
    write_json(folder / kind / EXPORTS_FILE, content | {"exports": scores})
    return probabilities


def _onnx_function(folder: Path, settings: InferenceSettings, name: str, file: Path) -> ProbabilityFunction:
    predictor = OnnxPredictor(folder, settings, name, file, torch.get_num_threads())
    return lambda rows: predictor.predict(rows["text"].tolist())


def compare_probabilities(
    p: np.ndarray,
    expected: np.ndarray,
    test: pd.DataFrame,
    labels: Sequence[str],
    config: EvaluateConfig,
    thresholds: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The scores of an export's probabilities `p` against the student's, both [rows, labels].

    thresholds: [labels] of label sets.
    """
    label, groups = test["label"].to_numpy(dtype=object), test["group"]
    predictions, students = (metrics.decide(of_one, labels, thresholds) for of_one in (p, expected))
    difference = metrics.paired_difference(
        label, predictions, students, labels, groups, config.bootstrap, config.confidence, config.seed
    )["accuracy"]
    return {
        "agreement": float((predictions == students).mean()),
        "largest_difference": float(np.abs(p - expected).max()),
        "accuracy": float((predictions == label).mean()),
        "difference": difference["mean"],
        "difference_low": difference["low"],
        "difference_high": difference["high"],
        "within_tolerance": bool(-difference["mean"] <= config.export_tolerance),
    }
