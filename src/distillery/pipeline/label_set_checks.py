"""Checks of a task whose rows have any number of labels: which teachers, students and settings can take it."""

from __future__ import annotations

from distillery.config.schema import DIVERGENCES, HIDDEN_STATE_TERMS, Params, PhaseConfig, TeacherConfig
from distillery.errors import UserError
from distillery.tasks.schema import load_task

TERMS = ("ce", *DIVERGENCES, *HIDDEN_STATE_TERMS)  # each of the first in its binary form, the last as for any encoder
SETTING = "in a task of `kind: multilabel`"


def check_label_sets(params: Params) -> None:
    """Raise UserError, one line with the key and what is allowed, for what no `multilabel` task can have."""
    sources = {name for name, source in params.data.items() if load_task(source.task).kind == "multilabel"}
    for name, teacher in params.teachers.items():
        if sources.isdisjoint(params.teacher_sources(name)):
            continue
        place = f"params.yaml: teachers.{name}"
        if teacher.kind in ("lm", "seq2seq"):
            _check_language_model(place, teacher)
        if teacher.api and teacher.api.labels in ("logprobs", "explained"):
            mode = teacher.api.labels
            raise UserError(f"{place}.api.labels: {mode} is for one label a row; {SETTING} write text or structured")
        if teacher.calibrate != "none":
            raise UserError(f"{place}.calibrate: divides a distribution over labels; leave it out {SETTING}")
        if teacher.finetune and teacher.finetune.balance != "none":
            raise UserError(f"{place}.finetune.balance: weighs rows of one label each; leave it out {SETTING}")
    for name, student in params.students.items():
        if params.test_source(name) not in sources:
            continue
        place = f"params.yaml: students.{name}"
        if student.arch != "classifier":
            raise UserError(f"{place}.arch: a student {SETTING} is a classifier, not {student.arch}")
        for i, phase in enumerate(student.phases):
            _check_phase(params, f"{place}.phases.{i}", phase)
    _check_evaluation(params, sources)


def _check_evaluation(params: Params, sources: set[str]) -> None:
    """Neither prediction sets nor confusion matrices are wanted where no student can have them."""
    if params.evaluate.conformal_coverage and sources.issuperset(map(params.test_source, params.students)):
        raise UserError(f"params.yaml: evaluate.conformal_coverage: is for one label a row; leave it out {ONLY}")
    if params.evaluate.confusion and params.test_source(params.evaluate.headline) in sources:
        raise UserError(f"params.yaml: evaluate.confusion: label sets have no confusion matrix; leave it out {ONLY}")


def _check_language_model(place: str, teacher: TeacherConfig) -> None:
    """A local language model is only prompted, with a question about each label."""
    if teacher.finetune:
        raise UserError(f"{place}.finetune: a language model is only prompted {SETTING}: tune a `kind: classifier`")
    if teacher.few_shot:
        raise UserError(f"{place}.few_shot: a question about one label has no solved examples; leave it out {SETTING}")


def _check_phase(params: Params, place: str, phase: PhaseConfig) -> None:
    """Every setting of `phase` has a meaning for label sets."""
    for name in phase.teachers if phase.needs_hidden_states else []:
        if (kind := params.teachers[name].kind) != "classifier":
            raise UserError(f"{place}.teachers: `{name}` ({kind}) has no hidden state of a text {SETTING}")
    for term in phase.loss:
        if term not in TERMS:
            raise UserError(f"{place}.loss.{term}: is for one label a row; allowed for label sets: {', '.join(TERMS)}")
    for key in ("balance", "mix", "pseudo_labels"):
        default = PhaseConfig.model_fields[key].default
        if getattr(phase, key) != default:
            allowed = f"leave it out {SETTING}"
            raise UserError(f"{place}.{key}: is decided by the one label of a row; {allowed}")
