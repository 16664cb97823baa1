"""A local model as a teacher, with a cache of its answers."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch

from distillery.fingerprint import code_digest
from distillery.models.label_model import LabelModel
from distillery.models.packed.frozen_layers import SharedStates
from distillery.tasks.prompts import render_answer
from distillery.tasks.schema import FewShotExample, Task
from distillery.teachers.cache import Answer, AnswerStore, Question
from distillery.teachers.prompted import PromptedTeacher


@dataclass(frozen=True)
class AnswerCache:
    """The answers of one local model. model_identity: see :func:`distillery.teachers.identity.model_identity`."""

    store: AnswerStore
    model_identity: dict[str, Any]

    def questions(self, model: LabelModel, prompts: Sequence[str], **settings: Any) -> list[Question]:
        """The keys of the answers to `prompts`. settings: all else that decides these answers.

        Rows of one call share batches, and a batch decides the last bits of its answers. So the key also holds the
        other prompts, the batch size, the code and the number of threads.
        """
        windows = {"windows": asdict(model.windows)} if model.windows else {}
        computation = windows | {
            "max_length": model.max_length,
            "weights": str(next(model.model.parameters()).dtype),
            "batch_size": model.batch_size,
            "together": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
            "code": code_digest("models", "tasks"),
            "machine": [version("torch"), torch.get_num_threads(), model.device.type],
        }
        repeats: Counter[str] = Counter()
        questions = []
        for prompt in prompts:
            questions.append(Question(self.model_identity | computation | settings, prompt, repeats[prompt]))
            repeats[prompt] += 1
        return questions

    def texts(self, questions: Sequence[Question]) -> list[str | None]:
        """The cached answers to `questions`, None where there is none."""
        return [answer.text if answer else None for answer in self.store.get(questions)]

    def writer(self, questions: Sequence[Question]) -> Callable[[list[int], Sequence[str]], None]:
        """A function that stores new answers, given the indices of their `questions` and their texts."""

        def write(indices: list[int], texts: Sequence[str]) -> None:
            self.store.put((questions[i], Answer(text)) for i, text in zip(indices, texts, strict=True))

        return write


@dataclass
class LocalTeacher(PromptedTeacher):
    """A model on this machine: fine-tuned (neither examples, calibration nor cache), or only prompted.

    cache: None computes every answer anew.
    """

    model: LabelModel
    cache: AnswerCache | None = None

    @property
    def task(self) -> Task:
        return self.model.task

    def share_states(self, shared: SharedStates) -> None:
        """Predict from the states in `shared`; those of other rows that were trained on go there. Weights must stay."""
        with self.model.autocast():
            self.model.known_states = shared.for_prediction(self.model.model) if self.model.arch == "causal" else None

    def render(self, text: str, solved: Sequence[FewShotExample] | None) -> str:
        """The prompt for `text` as one string; a classifier reads the text alone."""
        if self.model.arch == "classifier":
            return text
        return self.model.prompt_for(text, self.model.few_shot if solved is None else solved)

    def predict_texts(
        self,
        texts: Sequence[str],
        solved: Sequence[Sequence[FewShotExample]] | None = None,
        n_options: Sequence[int] | None = None,
    ) -> np.ndarray:
        """:meth:`LabelModel.predict` with a cache: answers in it are not computed again, new ones are added."""
        if self.cache is None:
            return self.model.predict(texts, shots=solved, n_options=n_options)
        names = self.task.names
        answers = [[name, render_answer(self.task, name, self.model.prompt_style)] for name in names]
        prompts = [self.render(text, solved[i] if solved is not None else None) for i, text in enumerate(texts)]
        questions = self.cache.questions(self.model, prompts, request="label", labels=answers)
        write = self.cache.writer(questions)

        def on_batch(indices: list[int], probabilities: np.ndarray) -> None:
            rows = probabilities.astype(float).tolist()
            write(indices, [json.dumps(dict(zip(names, row, strict=True))) for row in rows])

        stored = self.cache.texts(questions)
        cached = [None if text is None else [json.loads(text)[name] for name in names] for text in stored]
        return self.model.predict(texts, shots=solved, n_options=n_options, cached=cached, on_batch=on_batch)

    def answer(self, rows: pd.DataFrame, max_new_tokens: int) -> list[str]:
        """Free answers to `rows` (text) of a `qa` task, greedily decoded; see :meth:`LabelModel.answer_questions`."""
        texts = rows["text"].tolist()
        if self.cache is None:
            return self.model.answer_questions(texts, max_new_tokens)
        prompts = [self.render(text, None) for text in texts]
        questions = self.cache.questions(self.model, prompts, request="answer", max_new_tokens=max_new_tokens)
        cached, write = self.cache.texts(questions), self.cache.writer(questions)
        return self.model.answer_questions(texts, max_new_tokens, cached=cached, on_batch=write)

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
        """The next turn of each conversation. See :meth:`LabelModel.generate`.

        sample: number among the answers to one conversation. batch_size: conversations decoded at a time; the model's
        when not given.
        """
        cached = write = None
        if self.cache is not None:
            sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature}
            sampling |= {"top_p": top_p} if top_p < 1 else {}  # answers of older versions have no such key
            identity = self.cache.model_identity | sampling | {"seed": seed if temperature else None}
            questions = [Question(identity, turns, sample) for turns in conversations]
            cached, write = self.cache.texts(questions), self.cache.writer(questions)
        return self.model.generate(
            conversations,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=1000 * seed + sample,
            batch_size=batch_size or self.model.batch_size,
            cached=cached,
            on_batch=write,
        )
