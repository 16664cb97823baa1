"""What each teacher and each student learns from, in files of their own: a change elsewhere reruns none of them.

``distillery inputs teachers`` writes ``build/teachers/<teacher>.json``: its section of params.yaml with defaults filled
in, its model, its task, and the sha256 of the data files it reads.

``distillery inputs students`` writes ``data/inputs/<student>/``:
``experiment.json``      student, spec, models, source, task, teachers (validation scores), openable_teachers
``rows.parquet``         split_ref (`source/split`), id, text, label (None in a pool), group, and for every teacher
                         `probabilities_<teacher>`: in the order of the task's labels, None on rows it does not teach,
                         and `fold_<teacher>`: the fold whose model computed them; `rationale`: a teacher's, or the
                         row's own; of a `qa` task the accepted `answers`, and each teacher's answer: `answer_<teacher>`
``validation.parquet``, ``test.parquet``   split_ref, id, text, label, group of the source that scores the student;
                         for validation rows also the signals of teachers, where a phase stops by agreement

The same inputs give the same bytes. An option of params.yaml that decides nothing here (a student's `control`, a
default that is spelt out) changes nothing here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from distillery.config.schema import API_KEYS_WITHOUT_EFFECT, Params, SplitRef, StudentConfig
from distillery.errors import UserError
from distillery.files import Paths, atomic_write, file_digest, write_json
from distillery.tasks.chosen_prompt import student_task
from distillery.tasks.schema import N_OPTIONS, Task

INPUT_COLUMNS = ("split_ref", "id", "text", "label", "group")

# of a student: these keys change no weight
STUDENT_KEYS_WITHOUT_EFFECT = {"control", "checkpoint_every", "test_source", "prompt_of"}
# of these the record holds the last two as its `source` and `task`

Row = dict[str, Any]


def _require(path: Path, root: Path) -> Path:
    """`path`, if it exists. Raises UserError when the stages before have not written it."""
    if not path.exists():
        raise UserError(f"{path.relative_to(root)}: not there yet; run `dvc repro` first")
    return path


def _read_json(root: Path, name: str) -> Any:
    return json.loads(_require(root / name, root).read_text(encoding="utf-8"))


def task_of_source(root: Path, source: str, whole: bool, prompt_of: str | None = None) -> dict[str, Any]:
    """The task of `source` as it was prepared; if not `whole`, without meanings and prompts: a classifier uses none.

    prompt_of: see :func:`distillery.tasks.chosen_prompt.student_task`. The order of `labels` is that of probability
    vectors. `perturbations` are left out: no model sees them.
    """
    task = student_task(root, Task.model_validate(_read_json(root, f"data/processed/{source}/task.json")), prompt_of)
    task = task if whole else Task(kind=task.kind, labels=dict.fromkeys(task.names, ""))
    return task.model_dump(exclude={"perturbations"})


def model_record(root: Path, params: Params, name: str) -> dict[str, Any]:
    """The section of model `name` and, if it is a local folder, a digest of its content."""
    return params.models[name].model_dump() | {"content": _read_json(root, f"build/models/{name}.json")}


def _file_digests(root: Path, files: set[Path]) -> dict[str, str]:
    return {file.relative_to(root).as_posix(): file_digest(file) for file in sorted(files)}


def teacher_record(root: Path, params: Params, name: str) -> dict[str, Any]:
    """Everything that decides what teacher `name` learns and predicts."""
    spec, sources = params.teachers[name], params.teacher_sources(name)
    read = sources if spec.finetune is None else [*sources, SplitRef.parse(spec.finetune.on).source]
    return {
        "teacher": name,
        "spec": spec.model_dump(exclude={"api": API_KEYS_WITHOUT_EFFECT}) | {"data": sources},
        "model": model_record(root, params, spec.model) if spec.model else None,
        "embeddings": model_record(root, params, spec.embeddings) if spec.embeddings else None,
        "answers": _read_json(root, f"build/answers/{name}.json") if spec.answers else None,
        "task": task_of_source(root, sources[0], whole=spec.kind != "classifier"),
        "files": _file_digests(
            root, {file for source in read for file in Paths(root).processed(source).glob("*.parquet")}
        ),
        **({"tokenizer": model_record(root, params, spec.api.tokenizer)} if spec.api and spec.api.tokenizer else {}),
        # which ones counts nothing, but without a `base_url` the vendor's own endpoint would have the same record
        **({"endpoints": True} if spec.api and spec.api.endpoints else {}),
    }


def experiment_record(root: Path, params: Params, name: str) -> dict[str, Any]:
    """Everything but rows that decides what student `name` learns.

    spec: its section of params.yaml with defaults filled in.  model: as :func:`model_record`.  source: the one on which
    it is scored.  task: a :class:`Task` (with empty meanings and default prompts for a classifier).  teachers: for each
    one that a phase names, accuracy and macro_f1 on validation rows.  openable_teachers: each teacher whose tokens or
    hidden states a phase needs, with its section, model, task and the digests of its weights.
    """
    spec, source = params.students[name], params.test_source(name)
    opened = {
        teacher
        for phase in spec.phases
        if phase.needs_token_logprobs or phase.needs_hidden_states
        for teacher in phase.teachers
    }
    return {
        "student": name,
        "spec": spec.model_dump(exclude=STUDENT_KEYS_WITHOUT_EFFECT),
        "model": model_record(root, params, spec.model),
        "source": source,
        "task": task_of_source(root, source, spec.arch != "classifier", spec.prompt_of),
        "teachers": {teacher: _validation_scores(root, name, spec, teacher) for teacher in teachers_of(spec)},
        "openable_teachers": {teacher: opened_teacher_record(root, params, teacher) for teacher in sorted(opened)},
    }


def opened_teacher_record(root: Path, params: Params, name: str) -> dict[str, Any]:
    """The record of teacher `name` as students open it: with its weights, and the prompt by which it labelled."""
    spec, source = params.teachers[name], params.teacher_sources(name)[0]
    chosen = {"task": task_of_source(root, source, spec.kind != "classifier", name)} if spec.prompts else {}
    weights = {"weights": _file_digests(root, _output_files(root, name))}
    return teacher_record(root, params, name) | chosen | weights


def _output_files(root: Path, teacher: str) -> set[Path]:
    """The files from which a phase reads the tokens or hidden states of `teacher`: its weights, or tokens it served."""
    served = Paths(root).teacher_tokens(teacher)
    return {*Paths(root).teacher(teacher).rglob("*.safetensors"), *([served] if served.exists() else [])}


def teachers_of(spec: StudentConfig) -> list[str]:
    """The names of the teachers of all phases, sorted."""
    return sorted({teacher for phase in spec.phases for teacher in phase.teachers})


def _validation_scores(root: Path, student: str, spec: StudentConfig, teacher: str) -> dict[str, float]:
    """Accuracy and macro_f1 of `teacher`; empty when it has no predictions for validation rows.

    Raises UserError when a phase weights its teachers by these scores and there are none.
    """
    scores = _read_json(root, f"data/teacher/{teacher}/metrics.json").get("validation")
    if scores is None:
        if any(phase.mix == "validation" and teacher in phase.teachers for phase in spec.phases):
            raise UserError(
                f"students.{student}: `mix: validation`, but `{teacher}` has no predictions for validation rows"
            )
        return {}
    return {key: scores[key] for key in ("accuracy", "macro_f1")}


class StageTables:
    """The parquet files of the stages before, each read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tables: dict[str, list[Row]] = {}

    def read(self, path: str) -> list[Row]:
        """The rows of the file `path`, relative to the repository. Raises UserError when it does not exist."""
        if path not in self.tables:
            import pyarrow.parquet

            self.tables[path] = pyarrow.parquet.read_table(_require(self.root / path, self.root)).to_pylist()
        return self.tables[path]

    def rows(self, split_ref: str) -> list[Row]:
        """The rows of `source/split`: split_ref, id, text, label, group, rationale, answers."""
        ref = SplitRef.parse(split_ref)
        augmented = f"data/augmented/{ref.source}/rows"
        path = augmented if ref.split == "augmented" else f"data/processed/{ref.source}/{ref.split}"
        columns = (*INPUT_COLUMNS, "rationale", "answers", N_OPTIONS)
        return [
            {key: row.get(key) for key in columns} | {"split_ref": split_ref} for row in self.read(f"{path}.parquet")
        ]

    def signals(self, teacher: str, split_ref: str) -> dict[str, Row]:
        """The signals of `teacher` for the rows of `source/split`: id -> probabilities, fold, rationale, answer."""
        ref = SplitRef.parse(split_ref)
        if ref.split == "augmented":
            table = self.read(f"data/augmented/{ref.source}/signals.parquet")
            rows = [row for row in table if row["teacher"] == teacher]
        else:
            rows = [row for row in self.read(f"data/teacher/{teacher}/signals.parquet") if row["split"] == ref.split]
        # a label of None: the answer could not be parsed, so there is nothing to learn from it
        unparsed = {"probabilities": None}
        rows = [row for row in rows if row["source"] == ref.source]
        return {row["id"]: row | (unparsed if row["label"] is None else {}) for row in rows}


def student_rows(tables: StageTables, params: Params, name: str) -> tuple[list[Row], list[str]]:
    """The rows that student `name` learns from, with its teachers' signals, and the names of those teachers.

    A row's rationale is the first of its teachers' rationales; its own, where it has no teacher. Left out are those
    for another label than the row's, and in a row without a label those of teachers that the others outvote.
    Raises UserError when a phase names a split without rows, or a teacher has no signal for a row it should teach.
    """
    phases = params.students[name].phases
    with_rationales = any(phase.trains_on_rationales for phase in phases)
    teachers = teachers_of(params.students[name])
    result = []
    for split_ref in dict.fromkeys(split_ref for phase in phases for split_ref in phase.data):
        taught_by = {teacher for phase in phases if split_ref in phase.data for teacher in phase.teachers}
        rows = tables.rows(split_ref)
        if not rows and SplitRef.parse(split_ref).split != "augmented":  # of paraphrases, all may have been dropped
            raise UserError(f"students.{name}: `{split_ref}`, which a phase names, has no rows")
        rationales: dict[str, dict[str, str]] = {row["id"]: {} for row in rows}
        for teacher in teachers:
            signals = tables.signals(teacher, split_ref) if teacher in taught_by else {}
            # files of answers cover what they cover
            if teacher in taught_by and params.teachers[teacher].kind != "answers":
                _check_coverage(name, teacher, split_ref, rows, signals)
            for row in rows:
                signal = signals.get(row["id"], {})
                row[f"probabilities_{teacher}"], row[f"fold_{teacher}"] = (
                    signal.get("probabilities"),
                    signal.get("fold"),
                )
                row[f"answer_{teacher}"] = signal.get("answer")
                if signal.get("rationale") and not signal.get("contradicts"):
                    rationales[row["id"]][teacher] = signal["rationale"]
        for row in rows:
            own = [row["rationale"]]
            agreeing = _agreeing_rationales(row, sorted(taught_by), rationales[row["id"]]) if taught_by else own
            row["rationale"] = next(iter(agreeing), None) if with_rationales else None
        result += rows
    return result, teachers


def agreement_teachers(spec: StudentConfig) -> list[str]:
    """The names of the teachers of phases that stop by agreement, sorted."""
    return sorted({teacher for phase in spec.phases if phase.stops_by_agreement for teacher in phase.teachers})


def add_signals(tables: StageTables, student: str, teacher: str, rows: list[Row]) -> None:
    """Give the validation `rows` the signals of `teacher`. Raises UserError when none of them has one."""
    signals = tables.signals(teacher, rows[0]["split_ref"])
    for row in rows:
        signal = signals.get(row["id"], {})
        row[f"probabilities_{teacher}"], row[f"fold_{teacher}"] = signal.get("probabilities"), signal.get("fold")
    if all(row[f"probabilities_{teacher}"] is None for row in rows):
        raise UserError(
            f"students.{student}: `early_stopping: {{metric: agreement}}`, but `{teacher}` has no distribution over "
            f"labels for rows of {rows[0]['split_ref']}"
        )


def _check_coverage(student: str, teacher: str, split_ref: str, rows: list[Row], signals: dict[str, Row]) -> None:
    missing = [row["id"] for row in rows if row["id"] not in signals]
    if missing:
        raise UserError(
            f"students.{student}: teacher `{teacher}` has no signal for {len(missing)} of {len(rows)} rows of "
            f"{split_ref} (first: {missing[0]})"
        )


def _agreeing_rationales(row: Row, teachers: list[str], rationales: dict[str, str]) -> list[str]:
    """Those of `rationales` (by teacher) that are for the label with which the row is taught."""
    if row["label"] is not None or not rationales:
        return list(rationales.values())
    probabilities = {teacher: row[f"probabilities_{teacher}"] for teacher in teachers}
    probabilities = {teacher: vector for teacher, vector in probabilities.items() if vector is not None}
    sums = [sum(column) for column in zip(*probabilities.values(), strict=True)]
    label = sums.index(max(sums)) if sums else None
    predicted = {teacher: vector.index(max(vector)) for teacher, vector in probabilities.items()}
    return [rationale for teacher, rationale in rationales.items() if predicted.get(teacher, -1) == label]


def write_table(path: Path, rows: list[Row], teachers: list[str] | None = None) -> None:
    """Write `rows` as parquet; with `teachers` also their signals.

    Only rows of a `qa` task have `answers`, only those of a `choice` task `n_options`.
    """
    import pyarrow as pa
    import pyarrow.parquet

    texts = [*INPUT_COLUMNS, *(["answers"] if any(row.get("answers") for row in rows) else [])]
    fields = [pa.field(key, pa.string()) for key in (*texts, *(["rationale"] if teachers is not None else []))]
    fields += [pa.field(N_OPTIONS, pa.int64())] if any(row.get(N_OPTIONS) for row in rows) else []
    for teacher in teachers or []:
        fields.append(pa.field(f"probabilities_{teacher}", pa.list_(pa.float32())))
        fields.append(pa.field(f"fold_{teacher}", pa.int64()))
        if any(row.get(f"answer_{teacher}") for row in rows):
            fields.append(pa.field(f"answer_{teacher}", pa.string()))
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), file)


def write_teacher_records(root: Path, params: Params) -> None:
    """Write `build/teachers/`. Raises UserError when a file is missing, or has no rows to tune on."""
    tables = StageTables(root)
    for name, teacher in params.teachers.items():
        if teacher.finetune and not tables.rows(teacher.finetune.on):
            raise UserError(f"teachers.{name}: `{teacher.finetune.on}`, which finetune.on names, has no rows")
    shutil.rmtree(root / "build/teachers", ignore_errors=True)
    (root / "build/teachers").mkdir(parents=True)
    for name in params.teachers:
        write_json(root / f"build/teachers/{name}.json", teacher_record(root, params, name))


def write_student_inputs(root: Path, params: Params) -> None:
    """Write `data/inputs/`. Raises UserError when a file or a teacher's signal is missing."""
    shutil.rmtree(root / "data/inputs", ignore_errors=True)
    tables = StageTables(root)
    for name in params.students:
        folder, source = Paths(root).inputs(name), params.test_source(name)
        write_json(folder / "experiment.json", experiment_record(root, params, name))
        write_table(folder / "rows.parquet", *student_rows(tables, params, name))
        for split in ("validation", "test"):
            rows = tables.rows(f"{source}/{split}")
            if not rows:
                raise UserError(f"students.{name}: `{source}/{split}`, which it is scored on, has no rows")
            agreeing = agreement_teachers(params.students[name]) if split == "validation" else []
            for teacher in agreeing:
                add_signals(tables, name, teacher, rows)
            write_table(folder / f"{split}.parquet", rows, agreeing or None)
