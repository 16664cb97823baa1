"""The interface of a teacher, how one is opened, and the rows that it labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from distillery.config.schema import SPLITS, Params
from distillery.data.storage import read_split, read_task
from distillery.errors import UserError
from distillery.files import Paths
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel
from distillery.tasks.chosen_prompt import read_prompting, with_prompt
from distillery.tasks.prompts import label_question
from distillery.tasks.schema import N_OPTIONS, Task
from distillery.teachers.cache import STORE_PATH, AnswerStore
from distillery.teachers.calibration import Calibration, read_calibration
from distillery.teachers.few_shot import GoldExamples
from distillery.teachers.file import FileTeacher, read_answer_files
from distillery.teachers.identity import model_identity
from distillery.teachers.local import AnswerCache, LocalTeacher
from distillery.teachers.yes_no import YesNoTeacher
from distillery.training.teacher_models import load_teacher_model, max_prompt_tokens


class Teacher(Protocol):
    """A source of labels and texts: a local model, an endpoint, or answers from files.

    task: what it predicts. model: its local model, None when there is none on this machine.
    """

    task: Task
    model: LabelModel | None

    def predict(self, rows: pd.DataFrame) -> np.ndarray:
        """Probabilities over the task's labels [n, labels] for `rows` (id, text, group); NaN where no label is read."""

    def answer(self, rows: pd.DataFrame, max_new_tokens: int) -> list[str]:
        """Free answers to `rows` of a `qa` task. Raises UserError when this kind of teacher gives none."""

    def generate(
        self,
        conversations: Sequence[list[dict[str, str]]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        sample: int = 0,
        batch_size: int | None = None,
    ) -> list[str]:
        """The next turn of each conversation. Raises UserError when this kind of teacher generates nothing.

        top_p: draw from the likeliest tokens alone whose probabilities sum to this. sample: number among the answers to
        one conversation. batch_size: of a local model; its own when not given.
        """

    def prompt(self, row: pd.Series) -> str:
        """What the teacher is shown for one row (id, text, group), character for character."""


def gather_rows(root: Path, params: Params, name: str) -> pd.DataFrame:
    """Every row that teacher `name` labels: source, split, id, text, group, and the gold label, which only scores.

    Rows of a `qa` task also have their accepted answers, those of a `choice` task n_options. A teacher of
    `kind: answers` gets the rows that its files answer. Raises UserError when there is none.
    """
    parts = []
    for source in params.teacher_sources(name):
        folder = Paths(root).processed(source)
        for split in SPLITS:
            rows = read_split(folder, split)
            if split == "pool":
                rows = rows.merge(read_split(folder, "pool_labels").drop(columns="rationale"), on="id", validate="1:1")
            columns = ["source", "split", "id", "text", "group", "label"]
            columns += {"qa": ["answers"], "choice": [N_OPTIONS]}.get(read_task(folder).kind, [])
            parts.append(rows.assign(source=source, split=split)[columns])
    rows = pd.concat([part for part in parts if len(part)], ignore_index=True)
    if params.teachers[name].kind == "answers":
        task = read_task(Paths(root).processed(params.teacher_sources(name)[0]))
        rows = rows[open_file_teacher(root, name, params, task).covered(rows)].reset_index(drop=True)
        if rows.empty:
            raise UserError(f"params.yaml: teachers.{name}.answers: no answer is about a row of its sources")
    return rows


def open_teacher(
    root: Path,
    name: str,
    params: Params,
    task: Task,
    *,
    tuned: Path | None = None,
    prompting: dict[str, Any] | None = None,
) -> Teacher:
    """The teacher `name`, ready to predict as it does in the run.

    tuned: folder of its fine-tuned weights (whole, or as adapters); without it the teacher is only prompted.
    prompting: `prompt` (a name in the task's `prompts`, None for its `prompt`) and its calibration (see
    :func:`distillery.teachers.prompt_search.compare_prompts`); None reads them from the teacher's own `prompting.json`,
    if there is one. Raises UserError when a file, a model or an API key is missing.
    """
    spec = params.teachers[name]
    if spec.kind == "answers":
        prompting = prompting or read_prompting(root, name, task)
        return open_file_teacher(root, name, params, task, read_calibration(prompting))
    if tuned is not None:
        return LocalTeacher(load_teacher_model(name, spec, params.models[spec.model], task, tuned=tuned))
    prompting = prompting or read_prompting(root, name, task)
    task = with_prompt(task, prompting["prompt"])
    store = AnswerStore(root / STORE_PATH)
    settings = {
        "examples": _gold_examples(root, name, params),
        "calibration": read_calibration(prompting),
    }
    if spec.kind == "api":
        # imported here, so that teachers of other kinds do not depend on the API client
        from distillery.teachers.api.client import Endpoint
        from distillery.teachers.api.teacher import ApiTeacher

        return ApiTeacher(Endpoint(name, spec.api, store), task, spec.few_shot, **settings)
    origin = params.models[spec.model]
    is_yes_no = task.kind == "multilabel" and spec.kind != "classifier"
    question = label_question(task, task.names[0]) if is_yes_no else task
    model = load_teacher_model(name, spec, origin, question)
    if (
        model.arch != "classifier" and spec.max_length is None
    ):  # also of a teacher that will be fine-tuned on shorter prompts
        model.max_length = max_prompt_tokens(model)
    cache = AnswerCache(store, model_identity(spec.model, origin, model) | {"seed": spec.seed})
    return YesNoTeacher(model, cache, sets=task, **settings) if is_yes_no else LocalTeacher(model, cache, **settings)


def open_file_teacher(
    root: Path, name: str, params: Params, task: Task, calibration: Calibration | None = None
) -> FileTeacher:
    """The teacher `name` of `kind: answers`; the paths of its files are relative to `root`.

    calibration: of its probabilities; None: not at all.
    """
    spec = params.teachers[name].answers
    return FileTeacher(read_answer_files(spec, task, root), task, "id" if spec.columns.id else "text", calibration)


def _gold_examples(root: Path, name: str, params: Params) -> GoldExamples | None:
    """The solved examples that teacher `name` takes from its gold rows; None if it takes those of the task file."""
    spec = params.teachers[name]
    if spec.examples_from == "task" or not spec.few_shot:
        return None
    rows = gather_rows(root, params, name)
    encoder = fetch_model(spec.embeddings, params.models[spec.embeddings]) if spec.embeddings else None
    return GoldExamples(rows[rows["split"] == "train"], spec.few_shot, encoder, spec.seed)
