"""An endpoint as a teacher: prompts from texts, probabilities from answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from distillery.errors import UserError
from distillery.tasks.parsing import parse_label
from distillery.tasks.prompts import chat_turns
from distillery.tasks.schema import FewShotExample, Task
from distillery.teachers.api.client import Endpoint
from distillery.teachers.cache import Answer, Question
from distillery.teachers.prompted import PromptedTeacher

MIN_LABEL_MASS = 0.5  # total probability that the labels must have among a token's alternatives


@dataclass
class ApiTeacher(PromptedTeacher):
    """An endpoint with a task. few_shot: solved examples from the task file, unless there are `examples`."""

    endpoint: Endpoint
    task: Task
    few_shot: int = 0

    model = None  # it is not on this machine

    @property
    def _identity(self) -> dict[str, Any]:
        spec = self.endpoint.spec
        return {"client": spec.client, "base_url": self.endpoint.base_url, "model": spec.model}

    def _turns(self, text: str, solved: Sequence[FewShotExample] | None) -> list[dict[str, str]]:
        return chat_turns(self.task, text, self.few_shot if solved is None else solved)

    def render(self, text: str, solved: Sequence[FewShotExample] | None) -> str:
        """The turns of the conversation about `text` as one string."""
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in self._turns(text, solved))

    def questions(
        self, texts: Sequence[str], solved: Sequence[Sequence[FewShotExample]] | None = None
    ) -> list[Question]:
        """The requests for the labels of `texts`: `samples` for each text, one text after the other."""
        spec = self.endpoint.spec
        identity = self._identity | {"temperature": spec.temperature, "max_tokens": spec.max_tokens}
        identity |= {"labels": self.task.words, "logprobs": spec.labels == "logprobs"}
        if spec.labels == "structured":
            identity["schema"] = label_schema(self.task)
        return [
            Question(identity, self._turns(text, solved[i] if solved is not None else None), sample)
            for i, text in enumerate(texts)
            for sample in range(spec.samples)
        ]

    def predict_texts(
        self,
        texts: Sequence[str],
        solved: Sequence[Sequence[FewShotExample]] | None = None,
        n_options: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Probabilities over the task's labels [n, labels], float32; NaN where no answer could be read as a label.

        From the endpoint's log-probabilities (`labels: logprobs`), else the share of the samples that gave each label.
        """
        answers = self.endpoint.query(self.questions(texts, solved))
        samples = np.stack([self._read(answer) for answer in answers])
        samples = samples.reshape(len(texts), self.endpoint.spec.samples, -1)
        if n_options is not None:  # an option that a row does not have is no answer to it
            samples = samples * (np.arange(samples.shape[-1]) < np.asarray(n_options)[:, None, None])
            with np.errstate(invalid="ignore"):
                samples = samples / samples.sum(-1, keepdims=True)
        readable = ~np.isnan(samples).any(-1)
        with np.errstate(invalid="ignore"):
            return (np.nan_to_num(samples).sum(1) / readable.sum(1, keepdims=True)).astype(np.float32)

    def _read(self, answer: Answer) -> np.ndarray:
        """Probabilities [labels] from one answer; NaN when it cannot be read."""
        mode, text = self.endpoint.spec.labels, answer.text
        if mode == "logprobs":
            return first_token_probabilities(answer.metadata.get("logprobs", []), self.task)
        if mode == "structured":
            try:
                text = json.loads(text)["label"]
            except (ValueError, LookupError, TypeError):
                text = ""
        label = parse_label(self.task, str(text))
        return np.array([float(name == label) if label else math.nan for name in self.task.names])

    def answer(self, rows: pd.DataFrame, max_new_tokens: int) -> list[str]:
        raise UserError("params.yaml: teachers: free answers come from `kind: lm` and `seq2seq` only, so far")

    def generate(
        self,
        conversations: Sequence[list[dict[str, str]]],
        *,
        max_new_tokens: int,
        temperature: float | None = 0.0,
        seed: int = 0,
        sample: int = 0,
        batch_size: int | None = None,
    ) -> list[str]:
        """The next turn of each conversation. sample: number among the answers to one conversation.

        seed, batch_size: not used; an endpoint has no seed that all vendors know.
        """
        identity = self._identity | {"temperature": temperature, "max_tokens": max_new_tokens}
        answers = self.endpoint.query([Question(identity, turns, sample) for turns in conversations])
        return [" ".join(answer.text.split()) for answer in answers]


def label_schema(task: Task) -> dict[str, Any]:
    """The JSON schema of an answer that can only be a label."""
    label = {"type": "string", "enum": task.words}
    return {"type": "object", "properties": {"label": label}, "required": ["label"], "additionalProperties": False}


def first_token_probabilities(alternatives: Sequence[Sequence[Any]], task: Task) -> np.ndarray:
    """Label probabilities [labels] from the alternatives (token, log-probability) of an answer's first token.

    A token counts for the one label that begins with it, and for none if two labels do. NaN when the labels have less
    than half of the probability. Labels that share a first token need a `verbalizer`.
    """
    words = [word.casefold() for word in task.words]
    mass = np.zeros(len(words))
    for token, logprob in alternatives:
        prefix = token.strip().casefold()
        matches = [i for i, word in enumerate(words) if prefix and word.startswith(prefix)]
        if len(matches) == 1:
            mass[matches[0]] += math.exp(logprob)
    return mass / mass.sum() if mass.sum() >= MIN_LABEL_MASS else np.full(len(words), math.nan)
