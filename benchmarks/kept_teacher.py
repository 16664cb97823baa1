"""A prompted teacher whose token log-probabilities lie on the disk; its model runs only for answers that do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distillery.config.schema import ModelConfig, TeacherConfig
from distillery.files import atomic_write
from distillery.models.devices import shapes_alone
from distillery.models.encoding import Completion
from distillery.models.label_model import LabelModel
from distillery.models.scoring import ModelOutput
from distillery.tasks.schema import Task
from distillery.training.teacher_models import load_teacher_model

BLOCK = 16  # rows that the model scores together: the solved examples are read once for all of them


class KeptTeacher(LabelModel):
    """A teacher that scores completions of a row once, and then reads their log-probabilities from `folder`.

    It has the shapes of its model alone; :attr:`model_at_work` is loaded when a completion is not there yet. A file
    holds the distributions at the tokens of one completion, [tokens, vocabulary] float16.
    """

    def __init__(self, name: str, spec: TeacherConfig, origin: ModelConfig, task: Task, folder: Path):
        with shapes_alone():
            shapes = load_teacher_model(name, spec.model_copy(update={"quantize": "none"}), origin, task)
        settings = {"prompt": spec.prompt, "few_shot": spec.few_shot, "max_length": shapes.max_length}
        super().__init__(shapes.model, shapes.tokenizer, task, "causal", **settings)
        self.folder, self.computed = folder, 0  # rows that the model has scored
        self._open: Callable[[], LabelModel] = lambda: load_teacher_model(name, spec, origin, task)
        self._model_at_work: LabelModel | None = None

    @property
    def model_at_work(self) -> LabelModel:
        """The teacher with its weights."""
        if self._model_at_work is None:
            self._model_at_work = self._open()
            self._model_at_work.model.eval()
        return self._model_at_work

    def file_of(self, prompt: Sequence[int], completion: Completion) -> Path:
        """Where the log-probabilities of `completion` after the tokens of `prompt` are kept."""
        key = json.dumps([list(prompt), *completion])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"

    def forward(
        self, ids: Sequence[Sequence[int]], completions: Sequence[Sequence[Completion]] | None = None, **_: Any
    ) -> ModelOutput:
        """Log-probabilities of the supervised tokens of `completions` in place of logits, and no label space."""
        rows = list(zip(ids, completions or [], strict=True))
        files = [[self.file_of(prompt, completion) for completion in of_row] for prompt, of_row in rows]
        missing = [i for i, of_row in enumerate(files) if not all(file.exists() for file in of_row)]
        for start in range(0, len(missing), BLOCK):
            self._compute([rows[i] for i in missing[start : start + BLOCK]])
        logprobs = [torch.from_numpy(np.load(file)).float() for of_row in files for file in of_row]
        return ModelOutput(completion_logits=torch.cat(logprobs))

    @torch.no_grad()
    def _compute(self, rows: Sequence[tuple[Sequence[int], Sequence[Completion]]]) -> None:
        """Score the completions of `rows` (prompt, completions) and keep those that are not there.

        Torch's random state stays as it was: a run shall not depend on what is kept.
        """
        self.computed += len(rows)
        prompts, completions = [prompt for prompt, _ in rows], [of_row for _, of_row in rows]
        with torch.random.fork_rng():
            output = self.model_at_work.forward(prompts, completions, label_space=False)
        lengths = [len(tokens) - skip for of_row in completions for tokens, skip in of_row]
        parts = iter(output.completion_logits.log_softmax(-1).half().split(lengths))
        for prompt, of_row in rows:
            for completion, part in zip(of_row, parts, strict=False):
                file = self.file_of(prompt, completion)
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_write(file) as path, open(path, "wb") as new:
                        np.save(new, part.numpy())

    def keep_labels(self, texts: Sequence[str]) -> None:
        """Keep the log-probabilities of every label after each of `texts`, so that no run waits for them."""
        labels = [self.label_completion(label) for label in range(len(self.task.names))]
        ids = self.encode(texts)
        for start in range(0, len(ids), BLOCK):
            before = self.computed
            self.forward(ids[start : start + BLOCK], [labels] * len(ids[start : start + BLOCK]))
            if self.computed > before:
                print(f"teacher: {min(start + BLOCK, len(ids))} of {len(ids)} texts scored", flush=True)
