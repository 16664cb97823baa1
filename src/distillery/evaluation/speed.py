"""Speed, latency and memory of the models, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery.data.storage import read_task
from distillery.evaluation.results import TRAINED_ROLES, ModelResult, Results
from distillery.evaluation.robustness import measure_robustness, paraphrase_test_rows
from distillery.models.label_model import LabelModel
from distillery.teachers.base import open_teacher
from distillery.teachers.local import LocalTeacher
from distillery.training.student import load_student

LATENCY_ROWS = 32  # sentences given to each model one by one


@dataclass(frozen=True)
class Measurements:
    """What only the models themselves can tell.

    timing: name in the leaderboard -> sentences_per_second, latency_p50_ms, latency_p95_ms, memory_mb: another run will
    say otherwise. robustness: model, change, rows, kept, kept_low, kept_high, right_before, right_after (shares);
    examples: change, before, after: the same for the same runs.
    """

    timing: dict[str, dict[str, float]] = field(default_factory=dict)
    robustness: pd.DataFrame = field(default_factory=pd.DataFrame)
    examples: pd.DataFrame = field(default_factory=pd.DataFrame)


def throughput(
    scorers: dict[str, Callable[[list[str]], Any]], texts: list[str], rounds: int = 5, budget: float = 8.0
) -> dict[str, float]:
    """Sentences a second of each scorer on the same texts, side by side: name -> median over its rounds.

    Each is warmed up on a few texts first. Then they take turns, so that whatever else the machine does meets all of
    them; one that has spent its share of `budget` seconds, or had all its rounds, sits out. One round is had by all.
    """
    for score in scorers.values():
        score(texts[:4])
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for _ in range(rounds):
        for name, score in scorers.items():
            if sum(seconds[name]) < budget / len(scorers):
                start = time.perf_counter()
                score(texts)
                seconds[name].append(time.perf_counter() - start)
    return {name: len(texts) / float(np.median(taken)) for name, taken in seconds.items()}


def latency(scorers: dict[str, Callable[[list[str]], Any]], texts: list[str]) -> dict[str, tuple[float, float]]:
    """Milliseconds for one sentence alone, each scorer in turn on each text: name -> 50th and 95th percentile."""
    taken: dict[str, list[float]] = {name: [] for name in scorers}
    for text in texts:
        for name, score in scorers.items():
            start = time.perf_counter()
            score([text])
            taken[name].append(1000 * (time.perf_counter() - start))
    return {name: tuple(float(q) for q in np.quantile(ms, [0.5, 0.95])) for name, ms in taken.items()}


def peak_memory(work: Callable[[], Any]) -> tuple[Any, float | None]:
    """What `work` returns, and the MB of memory that this process held at its peak beyond what it held before.

    None where the system does not tell: it takes Linux.
    """

    def held(what: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark so far
        before = held("VmRSS")
    except (OSError, StopIteration):
        return work(), None
    return work(), max(0.0, held("VmHWM") - before)


def probability_function(model: LabelModel | LocalTeacher) -> Callable[[Sequence[str]], np.ndarray | list[str]]:
    """Texts to probabilities [n, labels], or to answers for a `qa` task, computed anew each time.

    A teacher that is only prompted uses the prompt, solved examples and calibration that it has in the run.
    """
    if model.task.kind == "qa":
        return model.answer_questions if isinstance(model, LabelModel) else model.model.answer_questions
    if isinstance(model, LabelModel):
        return model.predict
    uncached = replace(model, cache=None)
    return lambda texts: uncached.predict(pd.DataFrame({"text": list(texts), "group": None}))


def measure_models(root: Path, results: Results) -> Measurements:
    """Open every trained model that is tested where the headline is, and run it on test rows of that source.

    Students of one shape (a student and its control) are equally fast: the first of them is measured for all. What
    rewritten sentences do is asked of the headline, its control and its teacher.
    """
    params, source = results.params, results.headline.source
    task = read_task(root / f"data/processed/{source}")
    lines = [line for line in results.models if line.source == source and line.role in TRAINED_ROLES]
    # what others have answered is read from a file or a store: there is nothing to run
    far = {name for name, spec in params.teachers.items() if spec.model is None}
    lines = [line for line in lines if line.role != "teacher" or line.key not in far]
    texts = results.tests[source]["text"].head(params.evaluate.throughput_rows).tolist()
    models, memory, shapes = {}, {}, {}

    def opened(line: ModelResult) -> LabelModel | LocalTeacher:
        if line.role == "teacher":
            if not params.teachers[line.key].finetune:
                return open_teacher(root, line.key, params, task)
            return open_teacher(root, line.key, params, task, tuned=root / f"data/teacher/{line.key}/model").model
        spec = params.students[line.key]
        return load_student(spec, root / f"runs/{line.key}-{params.seeds[0]}/model", task, spec.dtype)

    def opened_and_run(line: ModelResult) -> LabelModel | LocalTeacher:
        model = opened(line)
        probability_function(model)(texts[:32])
        return model

    first = opened_and_run(lines[0])  # kept: what libraries take when first used is no model's memory
    for line in lines:
        spec = params.students.get(line.key)
        shapes[line.name] = line.name
        if line.role != "teacher":
            alike = [spec.model, spec.arch, spec.init, spec.prompt, spec.few_shot, spec.dtype, spec.max_length]
            shapes[line.name] = str(alike)
        if shapes[line.name] not in models:
            models[shapes[line.name]], memory[shapes[line.name]] = peak_memory(lambda line=line: opened_and_run(line))
    del first
    scorers = {shape: probability_function(model) for shape, model in models.items()}
    rate, alone = throughput(scorers, texts), latency(scorers, texts[:LATENCY_ROWS])
    timing = {}
    for name, shape in shapes.items():
        timing[name] = {"sentences_per_second": rate[shape]}
        timing[name] |= {"latency_p50_ms": alone[shape][0], "latency_p95_ms": alone[shape][1]}
        timing[name] |= {} if memory[shape] is None else {"memory_mb": memory[shape]}

    scorers = {}
    for line in (line for line in results.compared if line.name in shapes):
        told = [name for name in shapes if shapes[name] == shapes[line.name]]
        scorers[line.name] = models[shapes[line.name]] if line.name == told[0] else opened(line)
    said = {name: probability_function(model) for name, model in scorers.items()}
    return Measurements(timing, *measure_robustness(results, said, paraphrase_test_rows(root, results)))
