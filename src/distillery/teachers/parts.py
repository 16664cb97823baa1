"""Labels of a teacher for a folder of Parquet files, a part each: more rows than one table should hold.

A labelled part is written as a whole when it is done, and never again: a killed run continues with the others. Where
Ray is installed, its workers share the parts, on as many machines as it has (:func:`label_with_ray`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from distillery.config.load import load_params
from distillery.config.schema import API_KEYS_WITHOUT_EFFECT, Params
from distillery.errors import UserError
from distillery.files import Paths, atomic_write, file_digest, repository_root, write_json
from distillery.models.folders import model_folder
from distillery.models.runtime import configure_runtime
from distillery.tasks.schema import Task, load_task
from distillery.teachers.base import Teacher, open_teacher
from distillery.teachers.local import LocalTeacher
from distillery.teachers.signals import signal_table

SETTINGS_FILE = "labelling.json"  # in the folder of labelled parts: what decides their labels
INPUT_DIGEST = b"distillery.input"  # in the metadata of a labelled part: sha256 of the part that it labels
ADDED = ["prediction", "probabilities"]


@dataclass(frozen=True)
class PartsLabelling:
    """Teacher `name` of `params` labels the Parquet files of the folder `source` into files of the same name in
    `target`.

    Each has a column `text`, may have `id`, and gets `prediction` (a label of the task; None where no answer could be
    read) and `probabilities` (of the task's labels, in their order).
    """

    root: Path
    params: Params
    name: str
    source: Path
    target: Path

    def prepare(self) -> list[Path]:
        """Check the request, note in `target` what decides the labels, and return the parts that it lacks.

        Raises UserError for a teacher that cannot label parts, when a file cannot be labelled, and when `target` holds
        labels of other settings or of other rows.
        """
        settings = self._settings()
        parts = sorted(self.source.glob("*.parquet"))
        if not parts:
            raise UserError(f"{self.source}: holds no .parquet file")
        if self.source.resolve() == self.target.resolve():
            raise UserError(f"{self.target}: is the folder of the input, too; name another one")
        if self.target.exists() and not self.target.is_dir():
            raise UserError(f"{self.target}: is no folder; name another one")
        path = self.target / SETTINGS_FILE
        if path.exists() and _read_settings(path) != settings:
            raise UserError(
                f"{self.target}: holds labels of another teacher, or of other settings; name another folder"
            )
        for part in parts:
            _check_columns(part)
        missing = [part for part in parts if not self._is_labelled(part)]
        for part in missing:
            _check_texts(part)
        if not path.exists():
            write_json(path, settings)
        return missing

    def _settings(self) -> dict[str, Any]:
        """What decides the labels, as JSON values."""
        spec = self.params.teachers.get(self.name)
        if spec is None:
            known = ", ".join(self.params.teachers)
            raise UserError(f"teacher: `{self.name}` is not in params.yaml; there are: {known}")
        if spec.kind == "answers":
            raise UserError(f"params.yaml: teachers.{self.name}: its labels are in files; it labels no other rows")
        task = self.task
        if task.kind != "classification":
            raise UserError(
                f"teacher: `{self.name}` has a task of `kind: {task.kind}`; parts take `classification` only"
            )
        tuned = self._tuned
        if tuned is not None and not tuned.exists():
            raise UserError(f"{tuned}: not there yet; run `dvc repro` first")
        prompting = Paths(self.root).teacher(self.name) / "prompting.json"
        paths, sources = Paths(self.root), self.params.teacher_sources(self.name)
        gold = [paths.processed(source) / "train.parquet" for source in sources] if spec.examples_from != "task" else []
        settings = {
            "spec": spec.model_dump(exclude={"api": API_KEYS_WITHOUT_EFFECT, "data": True, "rationales": True}),
            "endpoints": bool(spec.api and spec.api.endpoints),  # without them, no `base_url` is the vendor's own
            "models": [self._model(name) for name in (spec.model, spec.embeddings) if name],
            "gold": [file_digest(file) for file in gold if file.exists()],  # solved examples
            "tuned": file_digest(tuned) if tuned else None,
            "prompting": prompting.read_text(encoding="utf-8") if prompting.exists() else None,
            "task": task.model_dump(),
        }
        return json.loads(json.dumps(settings))

    def _model(self, name: str) -> dict[str, Any]:
        """The section of model `name`, and a digest of a local folder, whose content may change."""
        spec = self.params.models[name]
        is_local = spec.folder is not None and spec.wheel is None
        return spec.model_dump() | {"content": file_digest(model_folder(name, spec)) if is_local else None}

    @property
    def task(self) -> Task:
        """The task of the teacher's first source."""
        source = self.params.teacher_sources(self.name)[0]
        return load_task(self.params.data[source].task, Paths(self.root).tasks)

    @property
    def _tuned(self) -> Path | None:
        return Paths(self.root).teacher(self.name) / "model" if self.params.teachers[self.name].finetune else None

    def open(self) -> Teacher:
        """The teacher as it labels in a run. A local model keeps no answers beside the parts."""
        teacher = open_teacher(self.root, self.name, self.params, self.task, tuned=self._tuned)
        if isinstance(teacher, LocalTeacher):
            teacher.cache = None
        return teacher

    def _is_labelled(self, part: Path) -> bool:
        path = self.target / part.name
        if not path.exists():
            return False
        if (_read_schema(path).metadata or {}).get(INPUT_DIGEST) != file_digest(part).encode():
            raise UserError(f"{path}: labels other rows than {part} now holds; delete it to label them")
        return True

    def label(self, teacher: Teacher, part: Path) -> int:
        """Write the labelled `part`; returns the number of its rows."""
        table = pq.read_table(part)
        rows = pd.DataFrame({"text": table["text"].to_pylist(), "group": None, "source": "", "split": "pool"})
        ids = table["id"].to_pylist() if "id" in table.column_names else range(len(rows))
        rows["id"] = [f"{part.stem}/{i}" for i in ids]
        if len(rows):
            signals = signal_table(rows, teacher.predict(rows), teacher.task.names, -1)
            predictions, probabilities = signals["label"].tolist(), [p.tolist() for p in signals["probabilities"]]
        else:
            predictions, probabilities = [], []
        table = table.append_column(ADDED[0], pa.array(predictions, pa.string()))
        table = table.append_column(ADDED[1], pa.array(probabilities, pa.list_(pa.float32())))
        table = table.replace_schema_metadata((table.schema.metadata or {}) | {INPUT_DIGEST: file_digest(part)})
        with atomic_write(self.target / part.name) as temporary:
            pq.write_table(table, temporary)
        return len(rows)


def _read_settings(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: is damaged; name another folder") from None


def _read_schema(part: Path) -> pa.Schema:
    try:
        return pq.read_schema(part)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{part}: cannot be read as Parquet: {' '.join(str(error).split())}") from None


def _check_columns(part: Path) -> None:
    schema = _read_schema(part)
    if schema.names.count("text") != 1:
        several = "several columns" if "text" in schema.names else "no column"
        raise UserError(f"{part}: has {several} `text`; it has: {', '.join(schema.names)}")
    kind = schema.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_text(kind) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
        raise UserError(f"{part}: column `text` is of type {kind}; it has to be text")
    if taken := [name for name in ADDED if name in schema.names]:
        raise UserError(f"{part}: has a column `{taken[0]}` already, which the label goes to; rename it")


def _check_texts(part: Path) -> None:
    texts = pq.read_table(part, columns=["text"])["text"]
    if texts.null_count:
        raise UserError(f"{part}: row {texts.is_null().index(True).as_py()} (from 0) has no text; leave it out")


def label_folder(teacher: str, source: str, target: str, workers: int | None) -> None:
    """Label the parts of the folder `source` into `target`, and print a line for each, or that none was missing.

    workers: of Ray; None: without. Raises UserError; see :meth:`PartsLabelling.prepare` and :func:`label_with_ray`.
    """
    configure_runtime()
    folders = Path(source).resolve(), Path(target).resolve()
    labelling = PartsLabelling(repository_root(), load_params(), teacher, *folders)
    part = None
    for part, rows in label_with_ray(labelling, workers) if workers else label_here(labelling):
        print(f"{part.name}: {rows:,} rows", flush=True)
    if part is None:
        print(f"{target}: every part of {source} is labelled there already")


def label_here(labelling: PartsLabelling) -> Iterator[tuple[Path, int]]:
    """Label the missing parts in this process; each with its number of rows when it is written."""
    teacher = None
    for part in labelling.prepare():
        teacher = teacher or labelling.open()
        yield part, labelling.label(teacher, part)


class PartLabeller:
    """What a worker of Ray runs: it opens the teacher once, and labels a part for each call."""

    def __init__(self, labelling: PartsLabelling):
        self.labelling, self.teacher = labelling, None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Label the part `row["part"]`: its rows, or the user's mistake that prevented it."""
        try:
            self.teacher = self.teacher or self.labelling.open()
            return row | {"rows": self.labelling.label(self.teacher, Path(row["part"])), "mistake": ""}
        except UserError as mistake:
            return row | {"rows": 0, "mistake": str(mistake)}


def gpu_share(gpus: int, workers: int) -> float:
    """The share of a GPU of each of `workers`, so that they take all of `gpus` and fit on them; 0 where there is none.

    Without a share Ray shows a worker no GPU, or the same one to all of them, as its version has it.
    """
    return 1 / math.ceil(workers / gpus) if gpus else 0.0


def label_with_ray(labelling: PartsLabelling, workers: int) -> Iterator[tuple[Path, int]]:
    """As :func:`label_here`, by `workers` workers of Ray Data, each with a model of its own.

    Ray is started on this machine unless it runs, or RAY_ADDRESS names a cluster, whose machines share the folders.
    Each worker has a GPU, or shares one where there are fewer of them (:func:`gpu_share`).
    Raises UserError without Ray, for an endpoint, and for a user's mistake in a worker.
    """
    if labelling.params.teachers[labelling.name].kind == "api":
        raise UserError("ray: an endpoint takes `concurrency` and `endpoints` in params.yaml: leave --ray out")
    try:
        ray_data: Any = import_module("ray.data")
    except ModuleNotFoundError:
        raise UserError("ray: is not installed here; run: pip install 'ray[data]'") from None
    parts = labelling.prepare()
    if not parts:
        return
    items = [{"part": str(part)} for part in parts]
    ray: Any = import_module("ray")
    if not ray.is_initialized():
        ray.init()
    workers, gpus = min(workers, len(items)), ray.cluster_resources().get("GPU", 0)
    dataset = ray_data.from_items(items, override_num_blocks=len(items))
    options = {"concurrency": workers, "num_gpus": gpu_share(int(gpus), workers) or None}
    done = dataset.map(PartLabeller, fn_constructor_args=(labelling,), **options)
    for row in done.iter_rows():
        if row["mistake"]:
            raise UserError(row["mistake"])
        yield Path(row["part"]), row["rows"]
