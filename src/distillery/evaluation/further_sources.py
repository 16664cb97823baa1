"""Students on the test rows of further sources of their task, such as a benchmark that nobody trains on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distillery.evaluation.checks import find_shortcuts
from distillery.evaluation.gather import stack_predictions
from distillery.evaluation.results import ModelResult, Results
from distillery.files import Paths
from distillery.models.predictions import predict_rows
from distillery.tasks.chosen_prompt import student_task
from distillery.training.student import load_student


def add_further_sources(root: Path, results: Results) -> Results:
    """`results` with each student on every further source of its task that has test rows: `<student> on <source>`.

    Its model is the one that 04_distill scored, which was chosen on the validation rows of its own source. All models
    of an experiment with one source are in `results` already: then they are returned as they are.
    """
    params, further = results.params, []
    for name in params.students:
        sources = [source for source in params.other_test_sources(name) if source in results.tests]
        further += _results_of_student(root, results, name, sources) if sources else []
    if not further:
        return results
    checks = [
        check
        for result in further
        if results.tasks[result.source].kind != "qa"
        for check in find_shortcuts(result, results.tests[result.source]["label"], results.labels[result.source])
    ]
    return replace(results, models=[*results.models, *further], checks=[*results.checks, *checks])


def _results_of_student(root: Path, results: Results, name: str, sources: list[str]) -> list[ModelResult]:
    params, own = results.params, results.find(name)
    tables = {source: [] for source in sources}
    for i, seed in enumerate(params.seeds):
        spec = params.students[name]
        task = student_task(root, results.tasks[own.source], spec.prompt_of)
        model = load_student(spec, Paths(root).run(name, seed) / "model", task)
        for source in sources:
            tables[source].append(predict_rows(model, results.tests[source], results.thresholds(own, i)))
    return [
        replace(own, name=f"{name} on {source}", source=source, is_further=True, validation=None,
                **stack_predictions(tables[source]))
        for source in sources
    ]  # fmt: skip
