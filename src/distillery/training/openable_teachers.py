"""Teachers whose token log-probabilities and hidden states a student learns from: opened models, or served tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillery.config.schema import ModelConfig, TeacherConfig
from distillery.files import Paths
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel
from distillery.models.layers import count_layers
from distillery.models.precision import resolve_dtype
from distillery.tasks.schema import Task
from distillery.training.served_teacher import ServedTeacher
from distillery.training.teacher_models import load_teacher_model


@dataclass
class OpenableTeacher:
    """A teacher that can be opened, for its token log-probabilities and hidden states.

    open_fold: returns its model for rows of a fold (-1: tuned on all gold rows). identity: everything that decides its
    outputs. num_layers: its number of layers. cache_dir: the folder in which its outputs are stored.
    """

    open_fold: Callable[[int], LabelModel]
    identity: Any
    num_layers: int
    cache_dir: Path


def openable_teacher(root: Path, name: str, record: dict[str, Any]) -> OpenableTeacher | ServedTeacher:
    """The teacher `name` as `openable_teachers` in `experiment.json` describes it; models in `data/teacher/<name>/`."""
    spec = TeacherConfig.model_validate(record["spec"])
    if spec.api:
        cache, generates = Paths(root).cache / "signals", not spec.api.scores_given_tokens
        return ServedTeacher(name, Paths(root).teacher_tokens(name), record, cache, generates)
    origin = ModelConfig.model_validate({k: v for k, v in record["model"].items() if k != "content"})
    task, folder = Task.model_validate(record["task"]), Paths(root).teacher(name)

    def open_model(fold: int) -> LabelModel:
        tuned = (folder / "model" if fold < 0 else folder / "folds" / str(fold)) if spec.finetune else None
        return load_teacher_model(name, spec, origin, task, tuned=tuned)

    model_folder = folder / "model" if spec.finetune else fetch_model(spec.model, origin)
    identity = record | {"dtype": resolve_dtype(spec.dtype, "prediction")}
    return OpenableTeacher(open_model, identity, count_layers(model_folder), Paths(root).cache / "signals")
