"""What each teacher and each student learns from, written out, so that nothing else makes it learn again.

``distillery inputs teachers`` writes ``build/teachers/<teacher>.json``: its section of params.yaml with defaults filled
in, its model, its task, and the sha256 of the data files it reads.

``distillery inputs students`` writes ``data/inputs/<student>/``:
``experiment.json``      student, spec, models, source, task, teachers (validation scores)
``rows.parquet``         where (`source/split`), id, text, label (None in a pool), group, and for every teacher
                         `probabilities_<teacher>`: in the order of the task's labels, None on rows it does not teach,
                         and `fold_<teacher>`: which of its models said so; `rationale`: a teacher's, or the row's own;
                         of a `qa` task the accepted `answers`, and what each teacher said: `answer_<teacher>`
``validation.parquet``, ``test.parquet``   where, id, text, label, group of the source that the student is scored on

The same inputs give the same bytes. An option of params.yaml that decides nothing here (a student's `control`, a
default that is spelt out) changes nothing here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from distillery.config.schema import Params
from distillery.errors import UserError
from distillery.files import atomic_write, file_digest, write_json
from distillery.tasks.schema import Task

INPUT_COLUMNS = ("split_ref", "id", "text", "label", "group")


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise UserError(f"{path}: not there yet; run `dvc repro` first")
    return json.loads(path.read_text(encoding="utf-8"))


def task_of_source(root: Path, source: str, whole: bool) -> dict[str, Any]:
    """The task of `source` as it was prepared; if not `whole`, without meanings and prompts: a classifier sees none.

    The order of `labels` is that of probability vectors. `perturbations` are left out: no model sees them.
    """
    task = Task.model_validate(_read_json(root / f"data/processed/{source}/task.json"))
    return (task if whole else Task(kind=task.kind, labels=dict.fromkeys(task.names, ""))).model_dump(
        exclude={"perturbations"}
    )


def model_record(root: Path, params: Params, name: str) -> dict[str, Any]:
    """Where the model comes from and, if it is a local folder, what that holds."""
    return params.models[name].model_dump() | {"content": _read_json(root / f"build/models/{name}.json")}


# of an endpoint: how fast, how often and for how much it may be asked decides nothing of what it answers
API_KEYS_WITHOUT_EFFECT = {"key", "concurrency", "requests_per_minute", "timeout", "max_attempts"}


API_KEYS_WITHOUT_EFFECT |= {"price", "max_cost", "max_total_tokens"}


def teacher_record(root: Path, params: Params, name: str) -> dict[str, Any]:
    """Everything that decides what teacher `name` learns and says."""
    spec, sources = params.teachers[name], params.teacher_sources(name)
    read = sources if spec.finetune is None else [*sources, spec.finetune.on.split("/")[0]]
    files = sorted({file for source in read for file in (root / f"data/processed/{source}").glob("*.parquet")})
    return {
        "teacher": name,
        "spec": spec.model_dump(exclude={"api": API_KEYS_WITHOUT_EFFECT}) | {"data": sources},
        "model": model_record(root, params, spec.model) if spec.model else None,
        "embeddings": model_record(root, params, spec.embeddings) if spec.embeddings else None,
        "answers": _read_json(root / f"build/answers/{name}.json") if spec.answers else None,
        "task": task_of_source(root, sources[0], whole=spec.kind != "classifier"),
        "files": {file.relative_to(root).as_posix(): file_digest(file) for file in files},
    }


def experiment_record(root: Path, params: Params, name: str) -> dict[str, Any]:
    """Everything but rows that decides what student `name` learns.

    spec: its section of params.yaml with defaults filled in.  model: as :func:`model_record`.  source: what it is
    scored on.  task: a :class:`Task` (with empty meanings and default prompts for a classifier).  teachers: for each
    one that a phase names, accuracy and macro_f1 on validation rows.  open: each teacher whose tokens or hidden states
    a phase wants, with its section, model, task and the digests of its weights.
    """
    spec, source = params.students[name], params.test_source(name)
    scores = {}
    for who in sorted({who for phase in spec.phases for who in phase.teachers}):
        found = _read_json(root / f"data/teacher/{who}/metrics.json").get("validation")
        if found is None and any(phase.mix == "validation" and who in phase.teachers for phase in spec.phases):
            raise UserError(f"students.{name}: `mix: validation`, but `{who}` has no answers to validation rows")
        scores[who] = {key: found[key] for key in ("accuracy", "macro_f1")} if found else {}
    return {
        "student": name,
        "spec": {key: value for key, value in spec.model_dump().items() if key not in ("control", "checkpoint_every")},
        "model": model_record(root, params, spec.model),
        "source": source,
        "task": task_of_source(root, source, whole=spec.arch != "classifier"),
        "teachers": scores,
        "openable_teachers": {
            who: teacher_record(root, params, who)
            | {
                "weights": {
                    file.relative_to(root).as_posix(): file_digest(file)
                    for file in sorted((root / f"data/teacher/{who}").rglob("*.safetensors"))
                }
            }
            for who in sorted(
                {w for p in spec.phases if p.needs_token_logprobs or p.needs_hidden_states for w in p.teachers}
            )
        },
    }


class StageTables:
    """The parquet files of the stages before, each read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.read: dict[str, list[dict[str, Any]]] = {}

    def __call__(self, path: str) -> list[dict[str, Any]]:
        if path not in self.read:
            import pyarrow.parquet

            if not (self.root / path).exists():
                raise UserError(f"{path}: not there yet; run `dvc repro` first")
            self.read[path] = pyarrow.parquet.read_table(self.root / path).to_pylist()
        return self.read[path]

    def rows(self, where: str) -> list[dict[str, Any]]:
        """The rows of `source/split`: where, id, text, label, group, rationale."""
        source, split = where.split("/")
        path = f"data/augmented/{source}/rows" if split == "augmented" else f"data/processed/{source}/{split}"
        return [
            {key: row.get(key) for key in (*INPUT_COLUMNS, "rationale", "answers")} | {"split_ref": where}
            for row in self(f"{path}.parquet")
        ]

    def signals(self, who: str, where: str) -> dict[str, dict[str, Any]]:
        """What teacher `who` says of the rows of `source/split`: id -> probabilities, fold, rationale."""
        source, split = where.split("/")
        if split == "augmented":
            rows = [row for row in self(f"data/augmented/{source}/signals.parquet") if row["teacher"] == who]
        else:
            rows = [row for row in self(f"data/teacher/{who}/signals.parquet") if row["split"] == split]
        # a label of None: the answer could not be read, so there is nothing to learn from it
        unread = {"probabilities": None}
        return {row["id"]: row | (unread if row["label"] is None else {}) for row in rows if row["source"] == source}


def student_rows(tables: StageTables, params: Params, name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows that student `name` learns from, with its teachers' signals, and the names of those teachers.

    A row's rationale is the first that one of its teachers gives; its own, where it has no teacher. Left out are those
    that argue for another label, and of an unlabelled row those of teachers that the others outvote.
    Raises UserError when a teacher has no signal for a row it should teach.
    """
    phases = params.students[name].phases
    reasons = any(phase.trains_on_rationales for phase in phases)
    teachers = sorted({who for phase in phases for who in phase.teachers})
    teaches = {(where, who) for phase in phases for where in phase.data for who in phase.teachers}
    out = []
    for where in dict.fromkeys(where for phase in phases for where in phase.data):
        rows = tables.rows(where)
        taught = [who for who in teachers if (where, who) in teaches]
        told: dict[str, dict[str, str]] = {}
        for row in rows:
            row["rationale"] = row["rationale"] if reasons and not taught else None
        for who in teachers:
            said = tables.signals(who, where) if who in taught else {}
            wanted = who in taught and params.teachers[who].kind != "answers"  # those cover what they cover
            missing = [row["id"] for row in rows if row["id"] not in said] if wanted else []
            if missing:
                raise UserError(
                    f"students.{name}: teacher `{who}` has no signal for {len(missing)} of {len(rows)} rows of "
                    f"{where} (first: {missing[0]})"
                )
            for row in rows:
                signal = said.get(row["id"], {})
                row[f"probabilities_{who}"], row[f"fold_{who}"] = signal.get("probabilities"), signal.get("fold")
                row[f"answer_{who}"] = signal.get("answer")
                if reasons and signal.get("rationale") and not signal.get("contradicts"):
                    told.setdefault(row["id"], {})[who] = signal["rationale"]
        for row in rows:
            if row["id"] in told:
                row["rationale"] = next(iter(_agreeing_rationales(row, taught, told[row["id"]])), None)
        out += rows
    return out, teachers


def _agreeing_rationales(row: dict[str, Any], taught: list[str], told: dict[str, str]) -> list[str]:
    """The reasons in `told` (by teacher) that are for the label which the row is taught with."""
    if row["label"] is not None:
        return list(told.values())
    said = {who: row[f"probabilities_{who}"] for who in taught if row[f"probabilities_{who}"] is not None}
    together = [sum(column) for column in zip(*said.values(), strict=True)]
    top = together.index(max(together))
    return [reason for who, reason in told.items() if said[who].index(max(said[who])) == top]


def write_table(path: Path, rows: list[dict[str, Any]], teachers: list[str] | None = None) -> None:
    """Write `rows` as parquet; with `teachers` also what they say of them. `answers` are those of a `qa` task alone."""
    import pyarrow as pa
    import pyarrow.parquet

    free = ["answers"] if any(row.get("answers") for row in rows) else []
    fields = [
        pa.field(key, pa.string()) for key in (*INPUT_COLUMNS, *free, *(["rationale"] if teachers is not None else []))
    ]
    for who in teachers or []:
        fields += [pa.field(f"probabilities_{who}", pa.list_(pa.float32())), pa.field(f"fold_{who}", pa.int64())]
        fields += [pa.field(f"answer_{who}", pa.string())] if any(row.get(f"answer_{who}") for row in rows) else []
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), file)


def write_teacher_records(root: Path, params: Params) -> None:
    """Write `build/teachers/`. Raises UserError when a file of the stages before is missing."""
    shutil.rmtree(root / "build/teachers", ignore_errors=True)
    (root / "build/teachers").mkdir(parents=True)
    for name in params.teachers:
        write_json(root / f"build/teachers/{name}.json", teacher_record(root, params, name))


def write_student_inputs(root: Path, params: Params) -> None:
    """Write `data/inputs/`. Raises UserError when a file or a teacher's signal is missing."""
    shutil.rmtree(root / "data/inputs", ignore_errors=True)
    tables = StageTables(root)
    for name in params.students:
        folder, source = root / f"data/inputs/{name}", params.test_source(name)
        write_json(folder / "experiment.json", experiment_record(root, params, name))
        write_table(folder / "rows.parquet", *student_rows(tables, params, name))
        for split in ("validation", "test"):
            write_table(folder / f"{split}.parquet", tables.rows(f"{source}/{split}"))
