"""Checks of settings that suit some kinds of tasks: before any stage runs, by `distillery check`."""

from __future__ import annotations

from distillery.config.schema import Params
from distillery.errors import UserError
from distillery.pipeline.label_set_checks import check_label_sets
from distillery.tasks.schema import load_task

AGREEMENT_KINDS = ("classification", "choice")


def check_task_kinds(params: Params) -> None:
    """Raise UserError, one line with the key and what is allowed, for a setting that the kind of a task cannot have."""
    check_label_sets(params)
    kinds = {name: load_task(source.task).kind for name, source in params.data.items()}
    for name, teacher in params.teachers.items():
        chosen = [source for source in params.teacher_sources(name) if kinds[source] == "choice"]
        if teacher.calibrate == "clusters" and chosen:
            raise UserError(
                f"params.yaml: teachers.{name}.calibrate: clusters: the labels of `{chosen[0]}`, a task of `kind: "
                "choice`, are places of options, whose rows form no clusters; allowed: none, contextual, batch"
            )
    for name, student in params.students.items():
        kind = kinds[params.test_source(name)]
        for i, phase in enumerate(student.phases):
            if phase.stops_by_agreement and kind not in AGREEMENT_KINDS:
                raise UserError(
                    f"params.yaml: students.{name}.phases.{i}.early_stopping.metric: agreement: is of one label for a "
                    f"row, and the task is of `kind: {kind}`; allowed: accuracy, macro_f1, loss"
                )
