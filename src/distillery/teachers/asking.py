"""Label probabilities of a prompted model for every row of a file, kept as a file of answers."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from distillery.config.load import validate_section
from distillery.config.schema import ModelConfig, TeacherConfig
from distillery.config.schema.base import Section
from distillery.data.readers import read_rows
from distillery.errors import UserError
from distillery.files import Paths, atomic_write, read_yaml, write_json
from distillery.models.label_model import LabelModel
from distillery.tasks.schema import load_task
from distillery.training.teacher_models import load_teacher_model

DIGITS = 4  # of a probability in the file
BLOCK = 256  # rows that share batches; a stopped run keeps whole blocks of the file, not its short rows
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
    """The model that `request` names, with its task and prompt."""
    name = request.teacher.model
    task = load_task(request.task, Paths(root).tasks)
    return load_teacher_model(name, request.teacher, request.models[name], task)


@dataclass
class Asking:
    """The rows of a request, and the answers that are there: `answers[i]` is None or the probabilities [labels].

    partial: the file in `.cache/answers/` where answers collect, so that a stopped run goes on where it was.
    """

    ids: list[str]
    texts: list[str]
    partial: Path
    answers: list[list[float] | None]

    def ask(self, model: LabelModel, rows: Sequence[int]) -> None:
        """Ask `model` for those of `rows` that have no answer, and keep the answers batch by batch."""
        name, start, printed = self.partial.stem, time.monotonic(), time.monotonic()
        first = len(self.answers) - self.answers.count(None)

        def keep(indices: list[int], probabilities: np.ndarray) -> None:
            nonlocal printed
            with open(self.partial, "a", encoding="utf-8") as file:
                for i, values in zip(indices, probabilities.astype(float).tolist(), strict=True):
                    file.write(json.dumps({"row": block[i], "probabilities": values}) + "\n")
                    self.answers[block[i]] = values
            done, now = len(self.answers) - self.answers.count(None), time.monotonic()
            if now - printed >= SECONDS_BETWEEN_LINES or done == len(self.answers):
                rate, printed = (done - first) / max(now - start, 1e-3), now
                print(f"{name}: {done} of {len(self.answers)} rows, {rate:.2f} rows/s", flush=True)

        for begin in range(0, len(rows), BLOCK):
            block = rows[begin : begin + BLOCK]
            cached = [self.answers[row] for row in block]
            model.predict([self.texts[row] for row in block], cached=cached, on_batch=keep)


def read_asking(root: Path, file: str, request: AnswerRequest) -> Asking:
    """The rows that the request in `file` is about, with the answers that an earlier run left."""
    records = read_rows(request.source, root)
    for column in (request.id, request.text):
        if column not in records.rows[0]:
            raise UserError(f"{file}: {request.source} has no column `{column}`")
    ids, texts = ([str(row[column]) for row in records.rows] for column in (request.id, request.text))
    task = Paths(root).task(request.task).read_bytes()
    key = hashlib.sha256(request.model_dump_json().encode() + task + "\n".join(texts).encode()).hexdigest()[:12]
    partial = Paths(root).cache / "answers" / f"{Path(file).stem}-{key}.jsonl"
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()
    asking = Asking(ids, texts, partial, [None] * len(ids))
    for line in partial.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        asking.answers[answer["row"]] = answer["probabilities"]
    return asking


def write_answers(root: Path, file: str) -> Path:
    """Ask for the label probabilities of all rows that `file` (below `root`) requests; the file that holds them.

    `<name>.jsonl` gets a line {id, probabilities: {label: p}} a row, `<name>.json` the origin of the answers. Raises
    UserError for a wrong request.
    """
    request = read_request(root, file)
    asking, model, started = read_asking(root, file, request), open_requested(root, request), time.monotonic()
    asking.ask(model, range(len(asking.ids)))
    path, seconds = (root / file).with_suffix(".jsonl"), time.monotonic() - started
    with atomic_write(path) as temporary:
        lines = [
            json.dumps({"id": i, "probabilities": _rounded(model.task.names, row)}, ensure_ascii=False)
            for i, row in zip(asking.ids, asking.answers, strict=True)
        ]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(path.with_suffix(".json"), _origin(root, request, model, len(asking.ids), seconds))
    asking.partial.unlink()
    return path


def _rounded(names: list[str], row: list[float]) -> dict[str, float]:
    return {name: round(value, DIGITS) for name, value in zip(names, row, strict=True)}


def _origin(root: Path, request: AnswerRequest, model: LabelModel, rows: int, seconds: float) -> dict[str, Any]:
    """What gave the answers: model, prompt, code, machine and time."""
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = Path("/proc/cpuinfo")
    processor = re.search(r"model name\s*:\s*(.*)", cpu.read_text()) if cpu.exists() else None
    return {
        "request": request.model_dump(exclude_defaults=True),
        "prompt": model.prompt_for("{text}", model.few_shot),
        "labels": model.task.names,
        "rows": rows,
        "commit": head,
        "date": str(date.today()),
        "seconds": round(seconds),
        "machine": f"{processor[1] if processor else platform.processor()}, {torch.get_num_threads()} threads",
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
