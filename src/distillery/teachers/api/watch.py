"""What the answers of an endpoint hold, looked at while they arrive: a run that gets nothing of use stops early."""

from __future__ import annotations

import threading

from distillery.config.schema import ApiConfig
from distillery.errors import UserError
from distillery.tasks.parsing import without_reasoning
from distillery.teachers.cache import Answer, AnswerStore, Question

# How to turn the reasoning of a model off: at a server of one's own, at the vendor.
NO_REASONING = {
    "server": "`chat_template_kwargs: {enable_thinking: false}` (or what the model's chat template takes)",
    "openai": "`reasoning_effort: none` (or the lowest that the model takes)",
    "anthropic": "`extra_body: {thinking: {type: disabled}}`",
}


class AnswerWatch:
    """Raises UserError when the answers of one endpoint show that the next ones will be of no use; safe across threads.

    name: the teacher's, for messages. store: where all answers are.
    """

    def __init__(self, name: str, spec: ApiConfig, store: AnswerStore):
        self.name, self.spec, self.store = name, spec, store
        self._lock = threading.Lock()

    def check(self, question: Question, answer: Answer) -> None:
        """Look at one answer, which is in the store."""
        with self._lock:
            if answer.metadata.get("reasoning"):
                self._check_reasoning(question, answer)

    def _check_reasoning(self, question: Question, answer: Answer) -> None:
        """Raise UserError if no request with the settings of `question` ever got more than reasoning."""
        if any(without_reasoning(text) for text in self.store.texts(question.model_identity)):
            return
        way = NO_REASONING["server" if self.spec.base_url and self.spec.client == "openai" else self.spec.client]
        limit = question.model_identity["max_tokens"]
        raise UserError(
            f"params.yaml: teachers.{self.name}.api: the model spent its answer on reasoning and gave no label "
            f"({answer.metadata['reasoning']!r}): turn the reasoning off by {way}, or raise `max_tokens` ({limit})"
        )
