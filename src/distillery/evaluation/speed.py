"""Speed, latency and memory of the models, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery.config.schema import Params, StudentConfig
from distillery.evaluation.results import TRAINED_ROLES, ModelResult, Results
from distillery.evaluation.robustness import measure_robustness, paraphrase_test_rows
from distillery.files import Paths
from distillery.models.label_model import LabelModel
from distillery.models.memory import gpu_peak, reset_gpu_peak
from distillery.models.precision import resolve_dtype
from distillery.tasks.chosen_prompt import student_task
from distillery.tasks.schema import N_OPTIONS, Task
from distillery.teachers.base import open_teacher
from distillery.teachers.local import LocalTeacher
from distillery.training.student import load_student

LATENCY_ROWS = 32  # sentences given to each model one by one

WARM_UP_ROWS = 32  # sentences predicted while the memory of a model is measured

Predictor = Callable[[pd.DataFrame], Any]  # rows (text; of a `choice` task n_options) to predictions


@dataclass(frozen=True)
class Measurements:
    """Results that need the models themselves.

    timing: name in the leaderboard -> sentences_per_second, latency_p50_ms, latency_p95_ms, memory_mb, and on a GPU
    gpu_memory_mb; they change from run to run. These do not: robustness: perturbation, model, rows, consistency (share
    of rows with the same prediction before and after), consistency_low, consistency_high, accuracy_before,
    accuracy_after; examples: perturbation, before, after.
    """

    timing: dict[str, dict[str, float]] = field(default_factory=dict)
    robustness: pd.DataFrame = field(default_factory=pd.DataFrame)
    examples: pd.DataFrame = field(default_factory=pd.DataFrame)


def throughput(
    predictors: dict[str, Predictor], rows: pd.DataFrame, rounds: int = 5, budget: float = 8.0
) -> dict[str, float]:
    """Sentences a second of each predictor on the same rows: name -> median over its rounds.

    Each is warmed up on a few rows first. Then they take turns, so that other load of the machine slows all of them.
    Each has one round; then one that has spent its share of `budget` seconds, or had `rounds`, is left out.
    """
    for predict in predictors.values():
        predict(rows[:4])
    seconds: dict[str, list[float]] = {name: [] for name in predictors}
    for _ in range(rounds):
        for name, predict in predictors.items():
            if sum(seconds[name]) < budget / len(predictors):
                start = time.perf_counter()
                predict(rows)
                seconds[name].append(time.perf_counter() - start)
    return {name: len(rows) / float(np.median(values)) for name, values in seconds.items()}


def latency(predictors: dict[str, Predictor], rows: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Milliseconds for one sentence alone, each predictor in turn on each row: name -> 50th and 95th percentile."""
    milliseconds: dict[str, list[float]] = {name: [] for name in predictors}
    for i in range(len(rows)):
        for name, predict in predictors.items():
            start = time.perf_counter()
            predict(rows[i : i + 1])
            milliseconds[name].append(1000 * (time.perf_counter() - start))
    return {name: tuple(float(q) for q in np.quantile(ms, [0.5, 0.95])) for name, ms in milliseconds.items()}


def peak_memory(work: Callable[[], Any]) -> tuple[Any, float | None]:
    """The result of `work`, and this process' peak memory during it beyond its memory before, in MB.

    None for the memory where the system does not show it: it takes Linux.
    """

    def status_mb(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # reset the recorded peak
        before = status_mb("VmRSS")
    except (OSError, StopIteration):
        return work(), None
    return work(), max(0.0, status_mb("VmHWM") - before)


def probability_function(model: LabelModel | LocalTeacher) -> Callable[[pd.DataFrame], np.ndarray | list[str]]:
    """Rows to probabilities [n, labels], or to answers for a `qa` task, computed anew each time.

    A teacher that is only prompted uses the prompt, solved examples and calibration that it has in the run.
    """
    if model.task.kind == "qa":
        answer = model.answer_questions if isinstance(model, LabelModel) else model.model.answer_questions
        return lambda rows: answer(rows["text"].tolist())
    if isinstance(model, LabelModel):
        return lambda rows: model.predict(rows["text"].tolist(), n_options=rows.get(N_OPTIONS))
    uncached = replace(model, cache=None)
    return lambda rows: uncached.predict(rows.assign(group=None))


def measure_models(root: Path, results: Results) -> Measurements:
    """Load every trained model that is tested where the headline is, and run it on test rows of that source.

    Students of one shape (a student and its control) are equally fast: only the first of them is measured. The
    robustness is that of the headline, its control and its teacher.
    """
    params, source = results.params, results.headline.source
    task = results.tasks[source]
    measured = _models_to_run(results)
    rows = results.tests[source].head(params.evaluate.throughput_rows)

    def load_and_predict(result: ModelResult) -> LabelModel | LocalTeacher:
        model = _load_model(root, params, task, result)
        probability_function(model)(rows[:WARM_UP_ROWS])
        return model

    # these stay loaded while memory is measured: the first use of libraries takes memory, too
    first = [load_and_predict(result) for result in _smallest_of_each_architecture(params, measured)]
    shapes = {result.name: _shape(params, result) for result in measured}
    models, memory, names = {}, {}, {}
    for result in measured:
        shape = shapes[result.name]
        if shape not in models:
            held = reset_gpu_peak()
            models[shape], main_memory = peak_memory(lambda result=result: load_and_predict(result))
            on_gpu = gpu_peak()
            both = {"memory_mb": main_memory, "gpu_memory_mb": None if on_gpu is None else (on_gpu - held) / 2**20}
            memory[shape] = {name: megabytes for name, megabytes in both.items() if megabytes is not None}
            names[shape] = result.name
    del first
    timing = _measure_timing(models, memory, rows)
    predictors = {}
    for result in results.compared:
        if result.name in shapes:
            shape = shapes[result.name]
            model = models[shape] if names[shape] == result.name else _load_model(root, params, task, result)
            predictors[result.name] = probability_function(model)
    robustness = measure_robustness(results, predictors, paraphrase_test_rows(root, results))
    return Measurements({name: dict(timing[shape]) for name, shape in shapes.items()}, *robustness)


def _models_to_run(results: Results) -> list[ModelResult]:
    """The trained models of the headline's source that run here; predictions from a file or an API leave no model."""
    local = {name for name, spec in results.params.teachers.items() if spec.model is not None}
    tested = [m for m in results.models if m.source == results.headline.source and m.role in TRAINED_ROLES]
    return [m for m in tested if m.role != "teacher" or m.key in local]


def _smallest_of_each_architecture(params: Params, models: list[ModelResult]) -> list[ModelResult]:
    smallest: dict[str, ModelResult] = {}
    for result in sorted(models, key=lambda result: result.parameters or float("inf")):
        sections, key = (params.teachers, "kind") if result.role == "teacher" else (params.students, "arch")
        architecture = getattr(sections[result.key], key)
        smallest.setdefault({"lm": "causal"}.get(architecture, architecture), result)
    return list(smallest.values())


def _load_model(root: Path, params: Params, task: Task, result: ModelResult) -> LabelModel | LocalTeacher:
    if result.role == "teacher":
        if not params.teachers[result.key].finetune:
            return open_teacher(root, result.key, params, task)
        return open_teacher(root, result.key, params, task, tuned=Paths(root).teacher(result.key) / "model").model
    spec = params.students[result.key]
    dtype = resolve_dtype(spec.dtype, "prediction")
    return load_student(
        spec, Paths(root).run(result.key, params.seeds[0]) / "model", student_task(root, task, spec.prompt_of), dtype
    )


def _shape(params: Params, result: ModelResult) -> str:
    """The key of what is measured once: a teacher, or all students of one shape."""
    if result.role == "teacher":
        return result.name
    return student_shape(params.students[result.key])


def student_shape(spec: StudentConfig) -> str:
    """A text that is equal for students that differ in their weights alone: they are equally large and fast."""
    shape = [spec.model, spec.arch, spec.init.layers, spec.prompt, spec.few_shot, spec.dtype, spec.max_length]
    shape += [spec.long_texts]
    shape += [spec.prompt_of] if spec.prompt_of else []
    shape += [spec.adapter] if spec.adapter.kind == "series" else []  # others are merged
    return str(shape)


def _measure_timing(
    models: dict[str, LabelModel | LocalTeacher], memory: dict[str, dict[str, float]], rows: pd.DataFrame
) -> dict[str, dict[str, float]]:
    """Shape -> the columns of `Measurements.timing`."""
    predictors = {shape: probability_function(model) for shape, model in models.items()}
    rates, delays = throughput(predictors, rows), latency(predictors, rows[:LATENCY_ROWS])
    timing = {}
    for shape, rate in rates.items():
        p50, p95 = delays[shape]
        timing[shape] = {"sentences_per_second": rate, "latency_p50_ms": p50, "latency_p95_ms": p95}
        timing[shape] |= memory[shape]
    return timing
