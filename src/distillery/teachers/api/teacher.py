"""An endpoint as a teacher: questions from texts, probabilities from answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from distillery.tasks.parsing import parse_label
from distillery.tasks.prompts import chat_turns
from distillery.tasks.schema import Task
from distillery.teachers.api.client import Endpoint
from distillery.teachers.cache import Answer, Question

MIN_LABEL_MASS = 0.5  # probability that the labels must have among a token's alternatives


class ApiTeacher:
    """An endpoint with a task: the same two questions as to a :class:`LabelModel`."""

    arch, model = "api", None

    def __init__(self, endpoint: Endpoint, task: Task, few_shot: int = 0):
        self.endpoint, self.task, self.few_shot = endpoint, task, few_shot

    def questions(self, texts: Sequence[str], shots: Sequence[Any] | None = None) -> list[Question]:
        """What is asked about `texts`: `samples` questions each, one text's after the other's."""
        spec, task = self.endpoint.spec, self.task
        asker = {"client": spec.client, "base_url": self.endpoint.base_url, "model": spec.model}
        asker |= {"temperature": spec.temperature, "max_tokens": spec.max_tokens, "labels": task.words}
        if spec.labels == "structured":
            asker["schema"] = label_schema(task)
        asker["logprobs"] = spec.labels == "logprobs"
        return [
            Question(asker, chat_turns(task, text, shots[i] if shots is not None else self.few_shot), n)
            for i, text in enumerate(texts)
            for n in range(spec.samples)
        ]

    def predict(self, texts: Sequence[str], shots: Sequence[Any] | None = None) -> np.ndarray:
        """Probabilities over the task's labels [n, labels], float32; NaN where no answer could be read as a label.

        From the endpoint's log-probabilities (`labels: logprobs`), else the share of the samples that gave each label.
        """
        spec = self.endpoint.spec
        answers = self.endpoint.ask(self.questions(texts, shots))
        each = np.stack([self._read(answer) for answer in answers]).reshape(len(texts), spec.samples, -1)
        known = ~np.isnan(each).any(-1)
        with np.errstate(invalid="ignore"):
            return (np.nan_to_num(each).sum(1) / known.sum(1, keepdims=True)).astype(np.float32)

    def _read(self, answer: Answer) -> np.ndarray:
        """Probabilities [labels] that one answer tells, NaN when it tells none."""
        task, mode = self.task, self.endpoint.spec.labels
        if mode == "logprobs":
            return first_token_probabilities(answer.more.get("logprobs", []), task)
        text = answer.text
        if mode == "structured":
            try:
                text = json.loads(text)["label"]
            except (ValueError, LookupError, TypeError):
                text = ""
        label = parse_label(task, str(text))
        return np.array([float(name == label) if label else math.nan for name in task.names])

    def generate(
        self,
        conversations: Sequence[list[dict[str, str]]],
        *,
        max_new_tokens: int,
        temperature: float | None = 0.0,
        sample: int = 0,
    ) -> list[str]:
        """What the model says next in each conversation; `sample` numbers answers to the same conversation."""
        spec = self.endpoint.spec
        asker = {"client": spec.client, "base_url": self.endpoint.base_url, "model": spec.model}
        asker |= {"temperature": temperature, "max_tokens": max_new_tokens}
        answers = self.endpoint.ask([Question(asker, turns, sample) for turns in conversations])
        return [" ".join(answer.text.split()) for answer in answers]


def label_schema(task: Task) -> dict[str, Any]:
    """The JSON schema of an answer that can only be a label."""
    label = {"type": "string", "enum": task.words}
    return {"type": "object", "properties": {"label": label}, "required": ["label"], "additionalProperties": False}


def first_token_probabilities(alternatives: Sequence[Sequence[Any]], task: Task) -> np.ndarray:
    """Label probabilities [labels] from the alternatives (token, log-probability) of an answer's first token.

    A token counts for the one label that begins with it; one that begins two labels, or none, counts for nobody. NaN
    when the labels have less than half of the probability. Labels that share a first token need a `verbalizer`.
    """
    words = [word.casefold() for word in task.words]
    mass = np.zeros(len(words))
    for token, logprob in alternatives:
        begun = token.strip().casefold()
        fits = [i for i, word in enumerate(words) if begun and word.startswith(begun)]
        if len(fits) == 1:
            mass[fits[0]] += math.exp(logprob)
    return mass / mass.sum() if mass.sum() >= MIN_LABEL_MASS else np.full(len(words), math.nan)
