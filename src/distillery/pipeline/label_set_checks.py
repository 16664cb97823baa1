"""Checks of a task whose rows have any number of labels: which teachers, students and settings can take it."""

from __future__ import annotations

from distillery.config.schema import DIVERGENCES, HIDDEN_STATE_TERMS, Params, PhaseConfig, TeacherConfig
from distillery.errors import UserError
from distillery.tasks.parsing import LABEL_DIVIDER
from distillery.tasks.schema import Task, load_task

TERMS = ("ce", *DIVERGENCES, *HIDDEN_STATE_TERMS)  # each of the first in its binary form, the last as for any encoder
SETTING = "in a task of `kind: multilabel`"


def check_label_sets(params: Params) -> None:
    """Raise UserError, one line with the key and what is allowed, for what no `multilabel` task can have."""
    tasks = {name: load_task(source.task) for name, source in params.data.items()}
    sources = {name for name, task in tasks.items() if task.kind == "multilabel"}
    for name, teacher in params.teachers.items():
        labelled = [tasks[source] for source in params.teacher_sources(name) if source in sources]
        if labelled:
            _check_teacher(f"params.yaml: teachers.{name}", teacher, labelled)
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
        raise UserError(f"params.yaml: evaluate.conformal_coverage: is for one label a row; leave it out {SETTING}")
    if params.evaluate.confusion and params.test_source(params.evaluate.headline) in sources:
        raise UserError(f"params.yaml: evaluate.confusion: label sets have no confusion matrix; leave it out {SETTING}")


def _check_teacher(place: str, teacher: TeacherConfig, tasks: list[Task]) -> None:
    """The teacher can label rows of `tasks`, all of them `multilabel`."""
    if teacher.kind in ("lm", "seq2seq"):
        _check_language_model(place, teacher)
    if teacher.api and teacher.api.labels in ("logprobs", "explained"):
        mode = teacher.api.labels
        raise UserError(f"{place}.api.labels: {mode} is for one label a row; {SETTING} write text or structured")
    if teacher.api and teacher.api.labels == "text":
        for task in tasks:
            _check_words(place, task)
    if teacher.calibrate != "none":
        raise UserError(f"{place}.calibrate: corrects a distribution over labels; leave it out {SETTING}")
    if teacher.finetune and teacher.finetune.balance != "none":
        raise UserError(f"{place}.finetune.balance: weighs rows of one label each; leave it out {SETTING}")


def _check_words(place: str, task: Task) -> None:
    """An answer that is a text can be divided into the words of its labels."""
    for word in task.words:
        if LABEL_DIVIDER.search(word):
            text = f"{place}.api.labels: the label {word!r} holds what divides labels in a text; write structured, or "
            raise UserError(f"{text}another word for it under `verbalizer` of the task")


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
