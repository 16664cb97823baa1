"""An endpoint as a teacher: prompts from texts, probabilities from answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from distillery.errors import UserError
from distillery.label_sets import membership
from distillery.tasks.parsing import (
    first_sentence,
    parse_explained_label,
    parse_label,
    parse_label_set,
    without_reasoning,
)
from distillery.tasks.prompts import chat_turns, explained_turns
from distillery.tasks.schema import FewShotExample, Task
from distillery.teachers.api.client import Endpoint
from distillery.teachers.api.probabilities import label_probabilities
from distillery.teachers.api.responses import MAX_STEPS
from distillery.teachers.cache import Answer, Question
from distillery.teachers.prompted import NO_FREE_ANSWERS, PromptedTeacher


class GivenTokens(NamedTuple):
    """A prompt and its completion, as tokens and as texts, about the row `row_id`."""

    row_id: str
    prompt: list[int]
    completion: list[int]
    prompt_text: str
    completion_text: str


@dataclass
class ApiTeacher(PromptedTeacher):
    """An endpoint with a task. few_shot: solved examples from the task file, unless there are `examples`."""

    endpoint: Endpoint
    task: Task
    few_shot: int = 0
    row_ids: dict[str, str] = field(default_factory=dict)  # of texts, for messages
    explained: dict[str, list[tuple[str | None, str]]] = field(default_factory=dict)  # label and reason of each sample
    _usage: list[list[int] | None] = field(default_factory=list)  # tokens of the answers of the last `predict`

    model = None  # it is not on this machine

    @property
    def _identity(self) -> dict[str, Any]:
        spec = self.endpoint.spec
        identity = {"client": spec.client, "base_url": self.endpoint.base_url, "model": spec.model}
        extra = spec.extra_request_keys  # left out when there are none: answers of older versions have no such key
        return identity | {"extra_body": extra} if extra else identity

    def _turns(self, text: str, solved: Sequence[FewShotExample] | None) -> list[dict[str, str]]:
        turns = explained_turns if self.endpoint.spec.labels == "explained" else chat_turns
        return turns(self.task, text, self.few_shot if solved is None else solved)

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
        if spec.tokens == "generated":
            identity["tokens"] = spec.top_logprobs
        return [
            Question(identity, self._turns(text, solved[i] if solved else None), sample, self.row_ids.get(text, ""))
            for i, text in enumerate(texts)
            for sample in range(spec.samples)
        ]

    def predict(self, rows: pd.DataFrame) -> np.ndarray:
        """See :meth:`PromptedTeacher.predict`; messages name rows by their id."""
        self.row_ids |= dict(zip(rows["text"], rows["id"], strict=True))
        self._usage = []
        return super().predict(rows)

    def tokens_per_row(self) -> dict[str, float] | None:
        """Mean `input` and `output` tokens that a row of the last :meth:`predict` took, as the endpoint counted them.

        Stored answers count as on the day they were paid for. None where the endpoint does not count tokens.
        """
        if not self._usage or None in self._usage:
            return None
        means = self.endpoint.spec.samples * np.mean(self._usage, axis=0)
        return {"input": float(means[0]), "output": float(means[1])}

    def predict_texts(
        self,
        texts: Sequence[str],
        solved: Sequence[Sequence[FewShotExample]] | None = None,
        n_options: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Probabilities over the task's labels [n, labels], float32; NaN where no answer could be read as a label.

        From the endpoint's log-probabilities (`labels: logprobs`), else the share of the samples that gave each label,
        which of a `multilabel` task is a share of its own for each.
        """
        answers = self.endpoint.query(self.questions(texts, solved), self._is_readable)
        if self.endpoint.spec.labels == "explained":
            parsed = [parse_explained_label(self.task, answer.text) for answer in answers]
            n = self.endpoint.spec.samples
            self.explained |= {text: parsed[i * n : (i + 1) * n] for i, text in enumerate(texts)}
        free = {True: [0, 0], False: None}  # of a row that is refused, and of an endpoint that does not count
        self._usage += [a.metadata.get("usage") or free["refused" in a.metadata] for a in answers]
        samples = np.stack([self._read(answer) for answer in answers])
        samples = samples.reshape(len(texts), self.endpoint.spec.samples, -1)
        if n_options is not None:  # an option that a row does not have is no answer to it
            samples = samples * (np.arange(samples.shape[-1]) < np.asarray(n_options)[:, None, None])
            with np.errstate(invalid="ignore"):
                samples = samples / samples.sum(-1, keepdims=True)
        readable = ~np.isnan(samples).any(-1)
        with np.errstate(invalid="ignore"):
            return (np.nan_to_num(samples).sum(1) / readable.sum(1, keepdims=True)).astype(np.float32)

    def _is_readable(self, answer: Answer) -> bool:
        return not np.isnan(self._read(answer)).any()

    def _read(self, answer: Answer) -> np.ndarray:
        """Probabilities [labels] from one answer; NaN when it cannot be read."""
        if self.endpoint.spec.labels == "logprobs":
            # answers of older versions have the alternatives of the first token alone
            steps = answer.metadata.get("steps", [[None, answer.metadata.get("logprobs", [])]])
            if "tokens" in answer.metadata:
                steps = [[token, others] for token, _, others in answer.metadata["tokens"][:MAX_STEPS]]
            return label_probabilities(steps, self.task, answer.metadata.get("finish"))
        if self.task.kind == "multilabel":
            labels = parse_label_set(self.task, answer.text)
            held = membership([labels], self.task.names)[0].astype(float)
            return held if labels else np.full_like(held, math.nan)
        label = parse_label(self.task, answer.text)
        return np.array([float(name == label) if label else math.nan for name in self.task.names])

    def explanations(self, rows: pd.DataFrame, labels: Sequence[str]) -> list[str | None]:
        """The first sentence that followed each of `labels` in the answers to `rows` (id, text), one label per row.

        None where they gave another label or no explanation. Answers that are stored are not requested again.
        """
        self.predict(rows)
        given = [
            next((reason for sampled, reason in self.explained[text] if sampled == label and reason), "")
            for text, label in zip(rows["text"], labels, strict=True)
        ]
        return [first_sentence(" ".join(reason.split())) or None for reason in given]

    def own_tokens(self, rows: pd.DataFrame) -> list[list[Any] | None]:
        """The tokens of its own answer to each of `rows` (id, text, group), with their log-probabilities.

        See :func:`distillery.teachers.api.responses.read_completion`; None for a row that the endpoint refuses. With
        `tokens: generated` these are the answers that its labels are read from, so they are in the store.
        """
        self.row_ids |= dict(zip(rows["text"], rows["id"], strict=True))
        texts, solved = rows["text"].tolist(), None
        if self.examples is not None:
            chosen = self.examples.choose(texts, rows["group"].tolist())
            solved = [self.examples.at(positions) for positions in chosen]
        answers = self.endpoint.query(self.questions(texts, solved))
        return [answer.metadata.get("tokens") or None for answer in answers]

    def score_tokens(self, prompts: Sequence[GivenTokens]) -> list[Answer]:
        """The log-probabilities at the tokens of the completions of `prompts`; see
        :func:`distillery.teachers.api.responses.read_scored_tokens`."""
        spec = self.endpoint.spec
        identity = {"client": spec.client, "base_url": self.endpoint.base_url, "model": spec.model}
        identity |= {"scores": spec.tokens, "tokens": spec.top_logprobs, "max_tokens": 1}
        identity |= {"extra_body": spec.extra_body} if spec.extra_body else {}
        questions = [
            Question(
                identity,
                [
                    {"role": "prompt", "content": given.prompt_text, "ids": given.prompt},
                    {"role": "completion", "content": given.completion_text, "ids": given.completion},
                ],
                row_id=given.row_id,
            )
            for given in prompts
        ]
        return self.endpoint.query(questions)

    def answer(self, rows: pd.DataFrame, max_new_tokens: int) -> list[str]:
        raise UserError(NO_FREE_ANSWERS)

    def generate(
        self,
        conversations: Sequence[list[dict[str, str]]],
        *,
        max_new_tokens: int,
        temperature: float | None = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        sample: int = 0,
        batch_size: int | None = None,
    ) -> list[str]:
        """The next turn of each conversation. sample: number among the answers to one conversation.

        seed, batch_size: not used; an endpoint has no seed that all vendors know.
        """
        identity = self._identity | {"temperature": temperature, "max_tokens": max_new_tokens}
        identity |= {"top_p": top_p} if top_p < 1 else {}
        answers = self.endpoint.query([Question(identity, turns, sample) for turns in conversations])
        return [" ".join(without_reasoning(answer.text).split()) for answer in answers]


def label_schema(task: Task) -> dict[str, Any]:
    """The JSON schema of an answer that can only be a label, or of a `multilabel` task a list of labels."""
    label = {"type": "string", "enum": task.words}
    key = "label"
    if task.kind == "multilabel":
        key, label = "labels", {"type": "array", "items": label}
    return {"type": "object", "properties": {key: label}, "required": [key], "additionalProperties": False}
