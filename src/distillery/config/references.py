"""Checks across sections: names that point elsewhere exist there, and loss terms fit their models."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from distillery.config.schema import SPLITS, WRITING_KINDS, Params, PhaseConfig, StudentConfig
from distillery.errors import UserError


def check_references(params: Params, file: str, folder: Path) -> None:
    """Names that point at other sections must exist there."""

    def known(key: str, name: str, names: Iterable[str], what: str) -> None:
        if name not in names:
            raise UserError(f"{file}: {key}: unknown {what} `{name}`; known: {', '.join(names) or 'none'}")

    def split_of(key: str, where: str, splits: tuple[str, ...]) -> str:
        source, _, split = where.partition("/")
        known(key, source, params.data, "source")
        if split not in splits:
            raise UserError(f"{file}: {key}: `{where}` must be `source/split` with split one of {', '.join(splits)}")
        if split in SPLITS and not params.data[source].holds(split):
            raise UserError(f"{file}: {key}: `{where}` is empty: data.{source}.split.{split} is 0")
        return source

    for name, source in params.data.items():
        if not (folder / "tasks" / f"{source.task}.yaml").exists():
            here = sorted(p.stem for p in (folder / "tasks").glob("*.yaml"))
            known(f"data.{name}.task", source.task, here, "task")
    for name, teacher in params.teachers.items():
        if teacher.model:
            known(f"teachers.{name}.model", teacher.model, params.models, "model")
        if teacher.embeddings:
            known(f"teachers.{name}.embeddings", teacher.embeddings, params.models, "model")
        for i, source in enumerate(teacher.data or []):
            known(f"teachers.{name}.data.{i}", source, params.data, "source")
        sources = params.teacher_sources(name)
        tasks = {params.data[s].task for s in sources}
        if len(tasks) > 1:
            raise UserError(f"{file}: teachers.{name}.data: sources of one task only, not {', '.join(sorted(tasks))}")
        if teacher.finetune:
            source = split_of(f"teachers.{name}.finetune.on", teacher.finetune.on, ("train",))
            if params.data[source].task not in tasks:
                raise UserError(f"{file}: teachers.{name}.finetune.on: `{source}` has another task than its data")
            if source not in sources:
                raise UserError(
                    f"{file}: teachers.{name}.finetune.on: `{source}` is not among its `data`: add it there"
                )
        elif teacher.kind == "classifier":
            raise UserError(f"{file}: teachers.{name}: a classifier needs `finetune`, its head starts untrained")
    known("augment.source", params.augment.source, params.data, "source")
    if params.augment.per_row:
        split_of("augment.source", f"{params.augment.source}/train", ("train",))
        known("augment.teacher", params.augment.teacher, params.teachers, "teacher")
        if params.teachers[params.augment.teacher].kind not in WRITING_KINDS:
            raise UserError(
                f"{file}: augment.teacher: `{params.augment.teacher}` cannot write; needs `kind: "
                f"{' or '.join(WRITING_KINDS)}`"
            )
        if params.augment.source not in params.teacher_sources(params.augment.teacher):
            raise UserError(f"{file}: augment.teacher: `{params.augment.teacher}` does not label that source")
    for name, student in params.students.items():
        known(f"students.{name}.model", student.model, params.models, "model")
        if student.control:
            known(
                f"students.{name}.control", student.control, [n for n in params.students if n != name], "other student"
            )
        if student.adapter.kind == "qlora" and student.arch != "causal":
            raise UserError(f"{file}: students.{name}.adapter.kind: qlora is for `arch: causal`, not {student.arch}")
        seen = set()
        for i, phase in enumerate(student.phases):
            key = f"students.{name}.phases.{i}"
            sources = [split_of(f"{key}.data", d, ("train", "pool", "augmented")) for d in phase.data]
            seen |= {params.data[s].task for s in sources}
            if "ce" in phase.loss and not phase.teachers and any(d.endswith("/pool") for d in phase.data):
                raise UserError(f"{file}: {key}.loss: `ce` on a pool needs `teachers`: its rows carry no gold label")
            _check_terms(params, f"{file}: {key}", student, phase)
            for where in phase.data:
                if where.endswith("/augmented") and where.split("/")[0] != params.augment.source:
                    raise UserError(f"{file}: {key}.data: `{where}`: only `{params.augment.source}` is augmented")
            for teacher in phase.teachers:
                known(f"{key}.teachers", teacher, params.teachers, "teacher")
                tuned = params.teachers[teacher].finetune
                for where in phase.data if tuned and not tuned.folds else []:
                    source, split = where.split("/")
                    if source == tuned.on.split("/")[0] and split != "pool":
                        raise UserError(
                            f"{file}: {key}.data: `{where}`: `{teacher}` was tuned on these rows, or on those they are "
                            "made of, and says nothing of them without folds (finetune.folds: 0)"
                        )
                for source in sources:
                    known(f"{key}.teachers", teacher, _teachers_of_source(params, source), f"teacher for `{source}`")
        if len(seen) > 1:
            raise UserError(f"{file}: students.{name}.phases: one task only, not {', '.join(sorted(seen))}")
    if params.evaluate.paraphrased_rows:
        known("augment.teacher", params.augment.teacher, params.teachers, "teacher")
        if params.teachers[params.augment.teacher].kind != "lm":
            raise UserError(
                f"{file}: evaluate.paraphrased_rows: `{params.augment.teacher}` (augment.teacher) cannot write"
            )
    for name, sources in params.evaluate.pretrained_on.items():
        known("evaluate.pretrained_on", name, [*params.models, *params.teachers], "model or teacher")
        for source in sources:
            known(f"evaluate.pretrained_on.{name}", source, params.data, "source")
    if params.search:
        known("search.student", params.search.student, params.students, "student")
        if params.search.phase > len(params.students[params.search.student].phases):
            raise UserError(f"{file}: search.phase: `{params.search.student}` has no phase {params.search.phase}")
    known("evaluate.headline", params.evaluate.headline, params.students, "student")
    if len(set(params.seeds)) != len(params.seeds):
        raise UserError(f"{file}: seeds: each seed once, not {params.seeds}")


def _check_terms(params: Params, key: str, student: StudentConfig, phase: PhaseConfig) -> None:
    """The loss terms of `phase` can be computed for this student and these teachers."""
    kinds = {name: params.teachers[name].kind for name in phase.teachers if name in params.teachers}
    if student.arch == "classifier":
        tokens = [term for term in phase.loss if term in ("uld", "rationale")]
        if tokens or phase.space == "vocabulary" or phase.trains_on_rationales:
            what = f"loss.{tokens[0]}" if tokens else "rationales" if phase.trains_on_rationales else "space"
            raise UserError(f"{key}.{what}: a classifier writes no tokens; needs `arch: causal` or `seq2seq`")
    if phase.on_policy and student.arch != "causal":
        raise UserError(f"{key}.on_policy: needs `arch: causal`, not {student.arch}")
    if "attention" in phase.loss and {student.arch, *kinds.values()} != {"classifier"}:
        raise UserError(f"{key}.loss.attention: compares the tokens of two classifiers, student and teacher")
    for name, kind in kinds.items():
        if phase.needs_token_logprobs and kind not in ("lm", "seq2seq"):
            raise UserError(f"{key}.teachers: `{name}` ({kind}) gives no token log-probabilities; use `space: labels`")
        if phase.needs_hidden_states and kind not in ("lm", "seq2seq", "classifier"):
            raise UserError(f"{key}.teachers: `{name}` ({kind}) shows no hidden states")


def _teachers_of_source(params: Params, source: str) -> list[str]:
    return [t for t in params.teachers if source in params.teacher_sources(t)]
