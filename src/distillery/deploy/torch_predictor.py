"""A student as torch computes it: of any architecture, and with free answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from distillery.deploy.predictors import BATCH_SIZE, thread_count
from distillery.deploy.settings import InferenceSettings
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.models.windows import stored_windows


def open_label_model(folder: Path, settings: InferenceSettings, model: PreTrainedModel | None = None) -> LabelModel:
    """The student in a model `folder` in float32, as it was scored. model: in place of the one in the folder."""
    if model is None:
        model = load_model(folder, settings.arch, labels=settings.task.names)
    return LabelModel(
        model,
        load_tokenizer(folder),
        settings.task,
        settings.arch,
        prompt=settings.prompt,
        few_shot=settings.few_shot,
        max_length=settings.max_length,
        batch_size=BATCH_SIZE,
        windows=stored_windows(model),
    )


class TorchPredictor:
    """The student in a model folder in float32, as it was scored."""

    engine = "torch"

    def __init__(self, folder: Path, settings: InferenceSettings, threads: int | None = None):
        torch.set_num_threads(threads or thread_count())
        self._model = open_label_model(folder, settings)

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Probabilities of the labels [n, labels], float32, not calibrated."""
        return self._model.predict(texts)

    def answer(self, texts: Sequence[str]) -> list[str]:
        """Free answers of a `qa` task."""
        return self._model.answer_questions(texts)
