"""Checks across sections of `params.yaml`: names that point elsewhere exist there, and settings fit together."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from distillery.config.schema import (
    WRITING_KINDS,
    ApiConfig,
    Params,
    PhaseConfig,
    SearchConfig,
    SplitRef,
    StudentConfig,
    TeacherConfig,
)
from distillery.config.schema.compute import FSDP_4_BIT, FSDP_OPTIMIZER, ONE_PROCESS_TERM
from distillery.errors import UserError
from distillery.files import Paths


def check_references(params: Params, file: str, folder: Path) -> None:
    """Check that names which point at other sections, or at task files in `folder`, exist there.

    Raises UserError with one line that starts with `file` and the key.
    """
    _check_data(params, file, Paths(folder))
    _check_models(params, file)
    for name, teacher in params.teachers.items():
        _check_teacher(params, f"{file}: teachers.{name}", name, teacher)
    _check_augment(params, file)
    for name, student in params.students.items():
        _check_student(params, f"{file}: students.{name}", name, student)
    _check_evaluation(params, file)
    if params.compute.strategy == "fsdp":
        _check_shards(params, file)
    if params.compute.config and not (folder / params.compute.config).exists():
        raise UserError(f"{file}: compute.config: {params.compute.config}: no such file")
    if len(set(params.seeds)) != len(params.seeds):
        raise UserError(f"{file}: seeds: each seed once, not {params.seeds}")


def _check_known(place: str, name: str, known: Collection[str], kind: str) -> None:
    """`name` is one of `known`. place: file and key, the start of the message."""
    if name not in known:
        raise UserError(f"{place}: unknown {kind} `{name}`; known: {', '.join(known) or 'none'}")


def _check_split(params: Params, place: str, text: str, splits: Collection[str]) -> SplitRef:
    """The split that `text` names: of a known source, one of `splits`, and not empty."""
    try:
        ref = SplitRef.parse(text, splits)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    _check_known(place, ref.source, params.data, "source")
    if ref.split != "augmented" and not params.data[ref.source].holds(ref.split):
        raise UserError(f"{place}: `{ref}` is empty: {_reason_without_rows(params, ref)}")
    return ref


def _reason_without_rows(params: Params, ref: SplitRef) -> str:
    """Why the source of `ref` holds no row in that split, and what it is for."""
    source = params.data[ref.source]
    if source.held_splits == ["test"]:
        return f"data.{ref.source} holds test rows only; they score every student of its task, and none learns from it"
    if source.held_splits == ["pool"]:
        return f"data.{ref.source} holds rows without labels only: name `{ref.source}/pool`, and teachers for it"
    if source.splits:
        return f"data.{ref.source}.splits has no `{ref.split}`"
    return f"data.{ref.source}.split.{ref.split} is 0"


def _check_data(params: Params, file: str, paths: Paths) -> None:
    for name, source in params.data.items():
        if not paths.task(source.task).exists():
            tasks = sorted(path.stem for path in paths.tasks.glob("*.yaml"))
            _check_known(f"{file}: data.{name}.task", source.task, tasks, "task")
        _check_leaks(params, f"{file}: data.{name}.drop_leaks", name)
        if source.filter and source.filter.embeddings:
            place = f"{file}: data.{name}.filter.embeddings"
            _check_known(place, source.filter.embeddings, params.models, "model")


def _check_leaks(params: Params, place: str, name: str) -> None:
    """What `drop_leaks` compares source `name` with are rows that no `drop_leaks` of their own moves between splits."""
    for other, spec in params.sources_with_held_out_rows(name).items() if params.data[name].drop_leaks else ():
        drawn = not spec.split_column and "validation" not in spec.own_splits and spec.held_splits != ["test"]
        if spec.drop_leaks and drawn:
            raise UserError(
                f"{place}: the splits of `{other}` are drawn after its own `drop_leaks`, so `{name}` cannot be "
                f"compared with them: take it away from one of the two, or give `{other}` its own `splits`"
            )


def _check_models(params: Params, file: str) -> None:
    classifiers = {teacher.model for teacher in params.teachers.values() if teacher.kind == "classifier"}
    classifiers |= {student.model for student in params.students.values() if student.arch == "classifier"}
    for name, model in params.models.items():
        if model.labels and name not in classifiers:
            raise UserError(f"{file}: models.{name}.labels: are for a classifier, and no classifier starts from it")


def _check_teacher(params: Params, place: str, name: str, teacher: TeacherConfig) -> None:
    for key in ("model", "embeddings"):
        if model := getattr(teacher, key):
            _check_known(f"{place}.{key}", model, params.models, "model")
    if teacher.api and teacher.api.tokenizer:
        _check_known(f"{place}.api.tokenizer", teacher.api.tokenizer, params.models, "model")
    if teacher.choose_prompt_by != "macro_f1" and not teacher.prompts:
        raise UserError(f"{place}.choose_prompt_by: has no effect: it needs `prompts`")
    for i, source in enumerate(teacher.data or []):
        _check_known(f"{place}.data.{i}", source, params.data, "source")
    sources = params.teacher_sources(name)
    tasks = {params.data[source].task for source in sources}
    if len(tasks) > 1:
        raise UserError(f"{place}.data: sources of one task only, not {', '.join(sorted(tasks))}")
    if teacher.finetune:
        tuned_on = _check_split(params, f"{place}.finetune.on", teacher.finetune.on, ("train",)).source
        if params.data[tuned_on].task not in tasks:
            raise UserError(f"{place}.finetune.on: `{tuned_on}` has another task than its data")
        if tuned_on not in sources:
            raise UserError(f"{place}.finetune.on: `{tuned_on}` is not among its `data`: add it there")


def _check_shards(params: Params, file: str) -> None:
    """All that is trained can be cut into shards."""
    trainings = {}
    for name, student in params.students.items():
        if student.adapter.kind == "qlora":
            raise UserError(f"{file}: students.{name}.adapter.kind: qlora: {FSDP_4_BIT}")
        trainings |= {f"students.{name}.phases.{i}": phase for i, phase in enumerate(student.phases)}
    for name, teacher in params.teachers.items():
        if teacher.finetune and teacher.quantize != "none":
            raise UserError(f"{file}: teachers.{name}.quantize: {FSDP_4_BIT}")
        trainings |= {f"teachers.{name}.finetune": teacher.finetune} if teacher.finetune else {}
    for place, training in trainings.items():
        if training.optimizer != "adamw":
            raise UserError(f"{file}: {place}.optimizer: {training.optimizer}: {FSDP_OPTIMIZER}")


def _check_augment(params: Params, file: str) -> None:
    source, teacher = params.augment.source, params.augment.teacher
    _check_known(f"{file}: augment.source", source, params.data, "source")
    if not params.augment.per_row:
        return
    _check_split(params, f"{file}: augment.source", f"{source}/train", ("train",))
    _check_known(f"{file}: augment.teacher", teacher, params.teachers, "teacher")
    spec = params.teachers[teacher]
    if spec.kind not in WRITING_KINDS and not (spec.answers and spec.answers.columns.paraphrase):
        way = "`answers.columns.paraphrase`" if spec.answers else f"`kind: {' or '.join(WRITING_KINDS)}`"
        raise UserError(f"{file}: augment.teacher: `{teacher}` cannot write; needs {way}")
    if spec.answers and params.augment.instruction:
        raise UserError(f"{file}: augment.instruction: the paraphrases of `{teacher}` are in files; leave it out")
    if source not in params.teacher_sources(teacher):
        raise UserError(f"{file}: augment.teacher: `{teacher}` does not label that source")


def _check_student(params: Params, place: str, name: str, student: StudentConfig) -> None:
    _check_known(f"{place}.model", student.model, params.models, "model")
    if student.control:
        others = [other for other in params.students if other != name]
        _check_known(f"{place}.control", student.control, others, "other student")
    if student.prompt_of:
        _check_known(f"{place}.prompt_of", student.prompt_of, params.teachers, "teacher")
        if student.arch == "classifier" or not params.teachers[student.prompt_of].prompts:
            raise UserError(
                f"{place}.prompt_of: has no effect: a classifier reads no prompt"
                if student.arch == "classifier"
                else f"{place}.prompt_of: `{student.prompt_of}` chooses no prompt: give it `prompts`"
            )
    if student.adapter.kind == "qlora" and student.arch != "causal":
        raise UserError(f"{place}.adapter.kind: qlora is for `arch: causal`, not {student.arch}")
    tasks = set()
    if student.test_source:
        _check_split(params, f"{place}.test_source", f"{student.test_source}/test", ("test",))
        tasks.add(params.data[student.test_source].task)
    for i, phase in enumerate(student.phases):
        refs = _check_phase_data(params, f"{place}.phases.{i}", phase)
        tasks |= {params.data[ref.source].task for ref in refs}
        _check_terms(params, f"{place}.phases.{i}", student, phase)
        if "label_prior" in phase.loss and params.compute.processes > 1:
            raise UserError(f"{place}.phases.{i}.{ONE_PROCESS_TERM}")
        _check_phase_teachers(params, f"{place}.phases.{i}", phase, refs)
    if len(tasks) > 1:
        raise UserError(f"{place}.phases: one task only, not {', '.join(sorted(tasks))}")


def _check_phase_data(params: Params, place: str, phase: PhaseConfig) -> list[SplitRef]:
    """The splits that `phase` trains on."""
    refs = [_check_split(params, f"{place}.data", text, ("train", "pool", "augmented")) for text in phase.data]
    if "ce" in phase.loss and not phase.teachers and any(ref.split == "pool" for ref in refs):
        raise UserError(f"{place}.loss: `ce` on a pool needs `teachers`: its rows carry no gold label")
    for ref in refs:
        if ref.split == "augmented" and ref.source != params.augment.source:
            raise UserError(f"{place}.data: `{ref}`: only `{params.augment.source}` is augmented")
    return refs


def _check_phase_teachers(params: Params, place: str, phase: PhaseConfig, refs: list[SplitRef]) -> None:
    """Every teacher of `phase` exists and has signals for the rows in `refs`."""
    for name in phase.teachers:
        _check_known(f"{place}.teachers", name, params.teachers, "teacher")
        finetune = params.teachers[name].finetune
        for ref in refs if finetune and not finetune.folds else []:
            if ref.source == SplitRef.parse(finetune.on).source and ref.split != "pool":
                raise UserError(
                    f"{place}.data: `{ref}`: `{name}` was tuned on these rows, or on those they are made of, and has "
                    "no signals for them without folds (finetune.folds: 0)"
                )
        for ref in refs:
            teachers = [other for other in params.teachers if ref.source in params.teacher_sources(other)]
            if not teachers:
                raise UserError(f"{place}.data: `{ref}`: no teacher labels these rows; see teachers.{name}.data")
            _check_known(f"{place}.teachers", name, teachers, f"teacher for `{ref.source}`")


def _check_terms(params: Params, place: str, student: StudentConfig, phase: PhaseConfig) -> None:
    """The loss terms of `phase` can be computed for this student and these teachers."""
    kinds = {name: params.teachers[name].kind for name in phase.teachers if name in params.teachers}
    if student.arch == "classifier":
        tokens = [f"loss.{term}" for term in phase.loss if term in ("uld", "rationale")]
        tokens += ["rationales"] if phase.trains_on_rationales else []
        tokens += ["space"] if phase.space == "vocabulary" else []
        if tokens:
            raise UserError(f"{place}.{tokens[0]}: a classifier writes no tokens; needs `arch: causal` or `seq2seq`")
    if phase.on_policy and student.arch != "causal":
        raise UserError(f"{place}.on_policy: needs `arch: causal`, not {student.arch}")
    if "attention" in phase.loss and {student.arch, *kinds.values()} != {"classifier"}:
        raise UserError(f"{place}.loss.attention: compares the tokens of two classifiers, student and teacher")
    for name, kind in kinds.items():
        api = params.teachers[name].api
        if phase.needs_token_logprobs and api and api.tokens != "none":
            _check_served(place, student, phase, name, api)
        elif phase.needs_token_logprobs and kind not in ("lm", "seq2seq"):
            way = f"set `teachers.{name}.api.tokens`, or " if api else ""
            raise UserError(
                f"{place}.teachers: `{name}` ({kind}) gives no token log-probabilities; {way}use `space: labels`"
            )
        if phase.needs_hidden_states and params.teachers[name].long_texts:
            raise UserError(f"{place}.teachers: `{name}` reads `long_texts` in windows: a text has no hidden state")
        if phase.needs_hidden_states and kind not in ("lm", "seq2seq", "classifier"):
            raise UserError(f"{place}.teachers: `{name}` ({kind}) gives no hidden states")


def _check_served(place: str, student: StudentConfig, phase: PhaseConfig, name: str, api: ApiConfig) -> None:
    """The endpoint `name` gives the log-probabilities of `phase`: of its likeliest tokens, after a chat prompt."""
    section = f"teachers.{name}.api"
    if not phase.top_k or phase.top_k > api.top_logprobs:
        raise UserError(
            f"{place}.top_k: `{name}` (api) gives its {api.top_logprobs} likeliest tokens alone: set `top_k` to "
            f"{api.top_logprobs} or less, or raise `{section}.top_logprobs`"
        )
    if phase.tail_samples:
        raise UserError(f"{place}.tail_samples: `{name}` (api) gives no tokens of the rest; leave it out")
    if student.prompt != "chat":
        raise UserError(f"{place}.teachers: `{name}` (api) answers in a chat: the student needs `prompt: chat`")
    for ref in phase.data:
        if SplitRef.parse(ref).split == "augmented":
            raise UserError(f"{place}.data: `{ref}`: `{name}` (api) gives no token log-probabilities for paraphrases")
    if phase.rationales and not api.scores_given_tokens:
        raise UserError(f"{place}.rationales: needs `{section}.tokens: prompt_logprobs` or `echo`")


def _check_search(params: Params, file: str, search: SearchConfig) -> None:
    """The searched phase exists, and each trial of it is the phase that a run with the same settings would have."""
    _check_known(f"{file}: search.student", search.student, params.students, "student")
    phases = params.students[search.student].phases
    if search.phase > len(phases):
        raise UserError(f"{file}: search.phase: `{search.student}` has no phase {search.phase}")
    phase = phases[search.phase - 1]
    if phase.select:
        raise UserError(
            f"{file}: search.phase: phase {search.phase} chooses its rows by the student that the phases before it "
            "train (`select`), and a search has none"
        )
    length, other = ("epochs", "steps") if phase.epochs else ("steps", "epochs")
    if phase.is_auto:  # its schedule and its upper bound would stay in the trials
        raise UserError(
            f"{file}: search.phase: a search reads no validation rows, which `{length}: auto` needs: give the phase a "
            f"number of {length}, without `max_{length}`; `search.choices.{length}` may list others"
        )
    if other in search.choices:
        raise UserError(f"{file}: search.choices.{other}: the phase has `{length}`: search that, or give it `{other}`")
    if "auto" in search.choices.get(length, []):
        raise UserError(f"{file}: search.choices.{length}: `auto` needs validation rows, and a search reads none")


def _check_evaluation(params: Params, file: str) -> None:
    """The sections `evaluate` and `search`."""
    evaluate, search, writer = params.evaluate, params.search, params.augment.teacher
    if evaluate.paraphrased_rows:
        _check_known(f"{file}: augment.teacher", writer, params.teachers, "teacher")
        spec = params.teachers[writer]
        if spec.kind != "lm" and not (spec.answers and spec.answers.columns.paraphrase):
            raise UserError(f"{file}: evaluate.paraphrased_rows: `{writer}` (augment.teacher) cannot write")
    for name, sources in evaluate.pretrained_on.items():
        models = [*params.models, *params.teachers]
        _check_known(f"{file}: evaluate.pretrained_on", name, models, "model or teacher")
        for source in sources:
            _check_known(f"{file}: evaluate.pretrained_on.{name}", source, params.data, "source")
    if search:
        _check_search(params, file, search)
    _check_known(f"{file}: evaluate.headline", evaluate.headline, params.students, "student")
    for i, name in enumerate(evaluate.confusion):
        known = [*params.students, *params.teachers]
        _check_known(f"{file}: evaluate.confusion.{i}", name, known, "student or teacher")
    for name in params.students:
        source = params.test_source(name)
        missing = [split for split in ("validation", "test") if not params.data[source].holds(split)]
        if missing:
            raise UserError(
                f"{file}: students.{name}: `{source}` has no {' and no '.join(missing)} rows, and no other source of "
                f"the task `{params.data[source].task}` has both validation and test rows to choose and score it on"
            )
    _check_exports(params, file)


def _check_exports(params: Params, file: str) -> None:
    """Each student of `evaluate.export` can be exported."""
    for i, name in enumerate(params.evaluate.export):
        _check_known(f"{file}: evaluate.export.{i}", name, params.students, "student")
        if (arch := params.students[name].arch) == "seq2seq":
            raise UserError(
                f"{file}: evaluate.export.{i}: `{name}` is {arch}; classifiers and causal models are exported"
            )
        if params.students[name].adapter.kind == "series":
            raise UserError(f"{file}: evaluate.export.{i}: `{name}` has series adapters; it is not exported")
        if params.students[name].long_texts:
            raise UserError(f"{file}: evaluate.export.{i}: `{name}` has `long_texts`; it is not exported")
