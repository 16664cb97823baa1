"""The exports of an experiment: written and scored for every run, as lines of the leaderboard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery.config.load import load_params
from distillery.config.schema import Params
from distillery.deploy.calibrate import write_settings
from distillery.deploy.export import compare_exports, export_kind, write_exports
from distillery.deploy.predictors import EXPORT_FILES, EXPORTS_FILE, read_exports
from distillery.deploy.settings import SETTINGS_FILE, read_settings
from distillery.errors import UserError
from distillery.evaluation.reading import read_result_file
from distillery.evaluation.results import ModelResult, Results
from distillery.evaluation.speed import Measurements
from distillery.files import Paths

SHOWN = {
    "onnx-int8": "ONNX int8",
    "onnx-float32": "ONNX float32",
    "gguf-q8_0": "GGUF Q8_0",
    "gguf-f16": "GGUF float16",
}


def export_run(root: Path, params: Params, student: str, seed: int) -> dict[str, np.ndarray]:
    """Export a run and score its exports on the test rows; their probabilities [rows, labels] by name.

    Exports of the same weights stay as they are. Raises UserError as :func:`write_exports`.
    """
    folder = Paths(root).run(student, seed) / "model"
    settings = read_settings(folder)
    kind = export_kind(settings)
    test = read_result_file(Paths(root).inputs(student) / "test.parquet", root)
    try:
        current = set(read_exports(folder, kind)) == set(EXPORT_FILES[kind])
    except UserError:  # those of other weights
        current = False
    if not current:
        write_exports(folder, settings)
    return compare_exports(folder, settings, test, params.evaluate)


def add_exports(root: Path, results: Results, measured: Measurements) -> tuple[Results, Measurements]:
    """`results` and `measured` with a model for each export of the students under `evaluate.export`.

    Their rows a second are those of the first seed. :func:`distillery.deploy.calibrate.write_settings` comes before.
    """
    params, models, timing = results.params, list(results.models), dict(measured.timing)
    for student in params.evaluate.export:
        runs = [export_run(root, params, student, seed) for seed in params.seeds]
        folder = Paths(root).run(student, params.seeds[0]) / "model"
        for name, scores in read_exports(folder, export_kind(read_settings(folder))).items():
            result = _export_result(results, student, name, [run[name] for run in runs], scores["bytes"])
            models.append(result)
            if "rows_per_second" in scores:
                timing[result.name] = {"sentences_per_second": scores["rows_per_second"]}
    return replace(results, models=models), replace(measured, timing=timing)


def _export_result(
    results: Results, student: str, name: str, probabilities: Sequence[np.ndarray], size: int
) -> ModelResult:
    origin = results.find(student)
    p = np.stack(probabilities).astype(np.float64)
    predictions = np.stack([results.decide(origin, of_seed, seed) for seed, of_seed in enumerate(p)])
    return ModelResult(f"{student}, {SHOWN[name]}", student, "export", origin.source, predictions, p, size_bytes=size)


def export_folder(run: Path) -> pd.DataFrame:
    """Export the run in the folder `run`, such as runs/tiny-kd-0, and score it; a row for each export and for torch.

    Raises UserError when it is no run of the experiment.
    """
    run = run.resolve().parent if run.name == "model" else run.resolve()
    root, (student, _, number) = run.parent.parent, run.name.rpartition("-")
    if not (root / "params.yaml").exists() or not (run / "model").is_dir() or not number.isdecimal():
        raise UserError(f"{run}: no run of an experiment; name one, such as runs/tiny-kd-0")
    params, seed = load_params(root / "params.yaml"), int(number)
    if student not in params.students:
        raise UserError(f"{run}: params.yaml names no student `{student}` any more")
    if not (run / "model" / SETTINGS_FILE).exists():
        write_settings(
            root, params.model_copy(update={"students": {student: params.students[student]}, "seeds": [seed]})
        )
    export_run(root, params, student, seed)
    path = run / "model" / export_kind(read_settings(run / "model")) / EXPORTS_FILE
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rows = [{"engine": name} | scores for name, scores in content["exports"].items()]
    if "torch_rows_per_second" in content:
        rows.append({"engine": "torch", "rows_per_second": content["torch_rows_per_second"]})
    return pd.DataFrame(rows)
