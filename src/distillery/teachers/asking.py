"""Label probabilities of a prompted model for every row of a file, kept as a file of answers."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from distillery.config.load import load_params, validate_section
from distillery.config.schema import SPLITS, Count, ModelConfig, Positive, SplitRef, TeacherConfig
from distillery.config.schema.base import Section
from distillery.data.overlaps import prepare_without_leaks
from distillery.data.readers import read_rows
from distillery.errors import UserError
from distillery.files import Paths, atomic_write, read_yaml, write_json
from distillery.models.devices import cpu_model
from distillery.models.label_model import LabelModel
from distillery.tasks.parsing import first_sentence
from distillery.tasks.schema import load_task
from distillery.teachers.base import Teacher
from distillery.teachers.cache import STORE_PATH, AnswerStore, Question
from distillery.teachers.identity import model_identity
from distillery.teachers.local import AnswerCache, LocalTeacher
from distillery.teachers.paraphrases import clean_paraphrase, paraphrase_prompts
from distillery.teachers.rationales import rationale_prompts
from distillery.training.teacher_models import load_teacher_model

DIGITS = 4  # of a probability in the file
BLOCK = 256  # rows that share batches; whole blocks, so that no answer depends on where a run stopped
SECONDS_BETWEEN_LINES = 60.0


class AnswerRequest(Section):
    """A file `data/answers/<name>.yaml`: the model and the rows of the answers in `<name>.jsonl`."""

    source: str
    """The file with the rows."""
    id: str = "id"
    """Name of its column with ids."""
    text: str = "text"
    """Name of its column with texts."""
    task: str
    """The task file, with prompt and solved examples; `tasks/<task>.yaml`."""
    models: Annotated[dict[str, ModelConfig], Field(min_length=1, max_length=1)]
    """The model."""
    teacher: TeacherConfig
    """The prompted teacher: its form of the prompt, its number of solved examples, its precision."""
    rows: str | None = None
    """Only the rows of one split of a source of params.yaml, such as `finance/train`; all when not given."""
    rationales: bool = False
    """Also a sentence on why the likeliest label holds, in the column `rationale`."""
    paraphrases: Count = 0
    """Paraphrases of each text, in lines of their own: id `<id>#<n>`, `paraphrase`, and its label probabilities."""
    temperature: Positive = 0.7
    """Sampling temperature of paraphrases."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 80
    """Largest length of a rationale or a paraphrase, in tokens."""


def read_request(root: Path, file: str) -> AnswerRequest:
    """The request in `file`, a path below `root`. Raises UserError naming the key."""
    request = validate_section(AnswerRequest, read_yaml(root / file), file)
    if request.teacher.kind != "lm" or request.teacher.finetune or request.teacher.model not in request.models:
        raise UserError(f"{file}: teacher: must be a `kind: lm` with the `model` of `models`, without `finetune`")
    if request.teacher.prompts or request.teacher.examples_from != "task" or request.teacher.calibrate != "none":
        raise UserError(
            f"{file}: teacher: `prompts`, `examples_from` and `calibrate` need gold rows or a pool: leave out"
        )
    return request


def open_requested(root: Path, request: AnswerRequest) -> LabelModel:
    """The model that `request` names, with its task and prompt. Raises UserError for a task without fixed labels."""
    name = request.teacher.model
    task = load_task(request.task, Paths(root).tasks)
    if task.kind != "classification":
        raise UserError(f"tasks/{request.task}.yaml: `make answers` takes a task of `kind: classification`")
    return load_teacher_model(name, request.teacher, request.models[name], task)


@dataclass
class Progress:
    """How far the answers to `rows` rows are. cached: rows of earlier starts; computed: rows of this one."""

    name: str
    rows: int
    cached: int = 0
    computed: int = 0
    started: float = field(default_factory=time.monotonic)
    printed: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def add_computed(self, rows: int) -> None:
        """Count `rows` more that this start computed; a line is printed once a minute and at the end."""
        self.computed += rows
        done, now = self.cached + self.computed, time.monotonic()
        if now - self.printed >= SECONDS_BETWEEN_LINES or done == self.rows:
            rate, self.printed = self.computed / max(self.seconds, 1e-3), now
            print(f"{self.name}: {done} of {self.rows} rows, {rate:.2f} rows/s", flush=True)


@dataclass(frozen=True)
class CountingCache(AnswerCache):
    """An answer cache that counts in `progress` what it gives and what it gets."""

    progress: Progress

    def texts(self, questions: Sequence[Question]) -> list[str | None]:
        cached = super().texts(questions)
        self.progress.cached += len(cached) - cached.count(None)
        return cached

    def writer(self, questions: Sequence[Question]) -> Callable[[list[int], Sequence[str]], None]:
        write = super().writer(questions)

        def write_and_count(indices: list[int], texts: Sequence[str]) -> None:
            write(indices, texts)
            self.progress.add_computed(len(indices))

        return write_and_count


def counting_teacher(
    model: LabelModel, store: AnswerStore, identity: dict[str, Any], progress: Progress
) -> LocalTeacher:
    """`model`, prompted, which keeps its answers in `store` and counts them in `progress`."""
    return LocalTeacher(model, CountingCache(store, identity, progress))


def predict_in_blocks(teacher: Teacher, rows: pd.DataFrame) -> np.ndarray:
    """Label probabilities [n, labels] in float64 of `rows` (text and what the teacher reads), block by block."""
    blocks = [teacher.predict(rows.iloc[start : start + BLOCK]) for start in range(0, len(rows), BLOCK)]
    return np.concatenate(blocks).astype(float)


@contextmanager
def mistakes_in(file: str, teacher: str) -> Iterator[None]:
    """Let a UserError about params.yaml and its teacher `teacher` name the request in `file` instead."""
    try:
        yield
    except UserError as mistake:
        message = str(mistake).replace(f"params.yaml: teachers.{teacher}", f"{file}: teacher")
        raise UserError(message.replace("params.yaml:", f"{file}:", 1)) from None


def read_columns(root: Path, file: str, request: AnswerRequest) -> tuple[list[str], list[str]]:
    """The ids and the texts of the rows that the request in `file` is about."""
    records = read_rows(request.source, root)
    for column in (request.id, request.text):
        if column not in records.rows[0]:
            raise UserError(f"{file}: {request.source} has no column `{column}`")
    rows = records.rows
    if request.rows:
        wanted = _split_ids(root, file, request.rows)
        rows = [row for row in rows if str(row[request.id]) in wanted]
        if not rows:
            raise UserError(f"{file}: rows: {request.source} has no row of `{request.rows}`")
    ids, texts = ([str(row[column]) for row in rows] for column in (request.id, request.text))
    return ids, texts


def _split_ids(root: Path, file: str, split_ref: str) -> set[str]:
    """The ids of the rows of `source/split` in params.yaml."""
    params = load_params(Paths(root).params)
    try:
        ref = SplitRef.parse(split_ref, SPLITS)
    except ValueError as error:
        raise UserError(f"{file}: rows: {error}") from None
    if ref.source not in params.data:
        raise UserError(f"{file}: rows: unknown source `{ref.source}`; known: {', '.join(params.data)}")
    task = load_task(params.data[ref.source].task, Paths(root).tasks)
    prepared = prepare_without_leaks(ref.source, params, task, root)
    return set(prepared.rows["id"][prepared.split == ref.split])


def write_answers(root: Path, file: str) -> Path:
    """Ask for the label probabilities of all rows that `file` (below `root`) requests; the file that holds them.

    `<name>.jsonl` gets a line {id, probabilities: {label: p}} a row, with its `rationale` if one is wanted, then a
    line {id, paraphrase, probabilities} a paraphrase; `<name>.json` gets their origin. Every batch is kept in the
    answer store of `root`, so a stopped run goes on with the next one. Raises UserError for a wrong request and for a
    full disk.
    """
    request = read_request(root, file)
    ids, texts = read_columns(root, file, request)
    with mistakes_in(file, request.teacher.model):
        return _write(root, (root / file).with_suffix(".jsonl"), request, ids, texts)


def _write(root: Path, path: Path, request: AnswerRequest, ids: list[str], texts: list[str]) -> Path:
    model, name = open_requested(root, request), request.teacher.model
    identity = model_identity(name, request.models[name], model) | {"seed": request.teacher.seed}
    author = Author(model, AnswerStore(root / STORE_PATH), identity, path.stem)
    probabilities, progress = author.label(texts)
    lines = [
        {"id": i, "probabilities": rounded_probabilities(model.task.names, row)}
        for i, row in zip(ids, probabilities, strict=True)
    ]
    if request.rationales:
        labels = [model.task.names[int(np.argmax(row))] for row in probabilities]
        prompts = rationale_prompts(model.task, texts, labels)
        written = author.write("rationales", prompts, max_new_tokens=request.max_new_tokens)
        lines = [line | {"rationale": first_sentence(text)} for line, text in zip(lines, written, strict=True)]
    for sample in range(request.paraphrases):
        sampling = {"max_new_tokens": request.max_new_tokens, "temperature": request.temperature}
        sampling |= {"seed": request.teacher.seed, "sample": sample}
        written = author.write("paraphrases", paraphrase_prompts(model.task, texts), **sampling)
        written = [clean_paraphrase(text) for text in written]
        for i, text, row in zip(ids, written, author.label(written)[0], strict=True):
            probability = rounded_probabilities(model.task.names, row)
            lines.append({"id": f"{i}#{sample}", "paraphrase": text, "probabilities": probability})
    with atomic_write(path) as temporary:
        content = [json.dumps(line, ensure_ascii=False) for line in lines]
        temporary.write_text("\n".join(content) + "\n", encoding="utf-8")
    write_json(path.with_suffix(".json"), _origin(root, request, model, progress))
    return path


@dataclass(frozen=True)
class Author:
    """A prompted model that labels and writes for the file `name`, and keeps every answer in `store`."""

    model: LabelModel
    store: AnswerStore
    identity: dict[str, Any]
    name: str

    def label(self, texts: Sequence[str]) -> tuple[list[list[float]], Progress]:
        """Label probabilities [n, labels] of `texts`, and how many of them were computed."""
        progress = Progress(self.name, len(texts))
        teacher = counting_teacher(self.model, self.store, self.identity, progress)
        return predict_in_blocks(teacher, pd.DataFrame({"text": texts})).tolist(), progress

    def write(self, part: str, prompts: Sequence[list[dict[str, str]]], **settings: Any) -> list[str]:
        """The next turn of each of the conversations `prompts`; see :meth:`LocalTeacher.generate`."""
        progress = Progress(f"{self.name}, {part}", len(prompts))
        return counting_teacher(self.model, self.store, self.identity, progress).generate(prompts, **settings)


def rounded_probabilities(names: Sequence[str], row: Sequence[float]) -> dict[str, float]:
    """The probabilities `row` of the labels `names`, as a file holds them."""
    return {name: round(value, DIGITS) for name, value in zip(names, row, strict=True)}


def _origin(root: Path, request: AnswerRequest, model: LabelModel, progress: Progress) -> dict[str, Any]:
    """What gave the answers: model, prompt, code, machine, and the time for the rows that the last start computed."""
    return {
        "request": request.model_dump(exclude_defaults=True),
        "prompt": model.prompt_for("{text}", model.few_shot),
        "labels": model.task.names,
        "rows": progress.rows,
        "computed_rows": progress.computed,
        **run_record(root, progress.seconds),
    }


def run_record(root: Path, seconds: float) -> dict[str, Any]:
    """When, where and by which code a model answered. seconds: that the last start took."""
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "commit": head,
        "date": str(date.today()),
        "seconds": round(seconds),
        "machine": f"{cpu_model()}, {torch.get_num_threads()} threads",
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
