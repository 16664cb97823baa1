"""Open a teacher of any kind, and gather the rows that it labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from distillery.config.schema import SPLITS, Params
from distillery.data.storage import read_split, read_task
from distillery.errors import UserError
from distillery.files import repository_root
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel
from distillery.tasks.schema import Task
from distillery.teachers.cache import STORE_PATH, AnswerStore
from distillery.teachers.few_shot import GoldExamples
from distillery.teachers.file import FileTeacher, read_answer_files
from distillery.teachers.identity import model_identity
from distillery.teachers.local import AnswerCache
from distillery.training.teacher_models import load_teacher_model, max_prompt_tokens

if TYPE_CHECKING:
    from distillery.teachers.api.teacher import ApiTeacher


def gather_rows(root: Path, params: Params, name: str) -> pd.DataFrame:
    """Every row that teacher `name` labels: source, split, id, text, group, and the gold label (for scoring only; of a
    `qa` task also the accepted answers).

    Of answers from files, the rows that they are about. Raises UserError when there is none.
    """
    parts = []
    for source in params.teacher_sources(name):
        folder = root / "data" / "processed" / source
        for split in SPLITS:
            rows = read_split(folder, split)
            if split == "pool":
                rows = rows.merge(read_split(folder, "pool_labels").drop(columns="rationale"), on="id", validate="1:1")
            columns = ["source", "split", "id", "text", "group", "label"]
            columns += ["answers"] if read_task(folder).kind == "qa" else []
            parts.append(rows.assign(source=source, split=split)[columns])
    out = pd.concat([part for part in parts if len(part)], ignore_index=True)
    if params.teachers[name].kind == "answers":
        task = read_task(root / "data" / "processed" / params.teacher_sources(name)[0])
        out = out[open_teacher(name, params, task).covered(out)].reset_index(drop=True)
        if out.empty:
            raise UserError(f"params.yaml: teachers.{name}.answers: no answer is about a row of its sources")
    return out


def open_teacher(
    name: str, params: Params, task: Task, *, tuned: Path | None = None
) -> LabelModel | ApiTeacher | FileTeacher:
    """The teacher `name` as it was fetched, or `tuned`: as it lies in that folder (whole, or as adapters)."""
    spec = params.teachers[name]
    if spec.kind == "api":
        # imported here, so that teachers of other kinds do not depend on the API client
        from distillery.teachers.api.client import Endpoint
        from distillery.teachers.api.teacher import ApiTeacher

        return ApiTeacher(Endpoint(name, spec.api, AnswerStore(repository_root() / STORE_PATH)), task, spec.few_shot)
    if spec.kind == "answers":
        by = "id" if spec.answers.columns.id else "text"
        return FileTeacher(read_answer_files(spec.answers, task, repository_root()), task, by)
    return load_teacher_model(name, spec, params.models[spec.model], task, tuned=tuned)


def open_prompted_teacher(
    root: Path, name: str, params: Params, task: Task, how: dict[str, Any] | None = None
) -> LabelModel | ApiTeacher | FileTeacher:
    """The teacher `name`, which is only prompted, with its prompt, solved examples and calibration.

    how: `prompt` (a name in the task's `prompts`, None for its `prompt`) and `prior` (:func:`estimate_label_prior`);
    as the teacher's own `prompting.json` says when not given.
    """
    spec = params.teachers[name]
    if how is None:
        path = root / "data" / "teacher" / name / "prompting.json"
        how = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"prompt": None, "prior": None}
    if how["prompt"] is not None:
        task = task.model_copy(update={"prompt": task.prompts[how["prompt"]]})
    teacher = open_teacher(name, params, task)
    if spec.examples_from != "task" and spec.few_shot:
        rows = gather_rows(root, params, name)
        encoder = fetch_model(spec.embeddings, params.models[spec.embeddings]) if spec.embeddings else None
        teacher.shots = GoldExamples(rows[rows["split"] == "train"], spec.few_shot, encoder, spec.seed)
    teacher.prior = None if how["prior"] is None else np.array(how["prior"])
    if isinstance(teacher, LabelModel):
        if teacher.arch != "classifier":  # also one that is yet to be tuned, on shorter prompts
            teacher.max_length = max_prompt_tokens(teacher)
        teacher.memory = AnswerCache(
            AnswerStore(root / STORE_PATH), model_identity(params, spec.model, teacher) | {"seed": spec.seed}
        )
    return teacher
