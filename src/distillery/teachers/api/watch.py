"""What the answers of an endpoint hold, looked at while they arrive: a run that gets nothing of use stops early."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from distillery.config.schema import ApiConfig
from distillery.errors import UserError
from distillery.tasks.parsing import without_reasoning
from distillery.teachers.api.failures import one_line
from distillery.teachers.cache import Answer, AnswerStore, Question

# How to turn the reasoning of a model off: at a server of one's own, at the vendor.
NO_REASONING = {
    "server": "`chat_template_kwargs: {enable_thinking: false}` (or what the model's chat template takes)",
    "openai": "`reasoning_effort: none` (or the lowest that the model takes)",
    "anthropic": "`extra_body: {thinking: {type: disabled}}`",
}
CUT_OFF = ("length", "max_tokens")  # why an answer ended, in OpenAI's form and in Anthropic's
SHOWN_PROMPT = 60  # characters


class AnswerWatch:
    """Raises UserError when the answers of one endpoint show that the next ones will be of no use; safe across threads.

    name: the teacher's, for messages. store: where all answers are.
    """

    def __init__(self, name: str, spec: ApiConfig, store: AnswerStore):
        self.name, self.spec, self.store = name, spec, store
        self._is_readable: Callable[[Answer], bool] | None = None
        self._unreadable = 0  # answers in a row
        self._lock = threading.Lock()

    def start(
        self, questions: Sequence[Question], is_readable: Callable[[Answer], bool] | None, complete: bool
    ) -> None:
        """Look at the answers to `questions` that are in the store. complete: whether each question has one.

        is_readable: whether an answer can be read as a label; None: it need not.
        """
        self._is_readable, self._unreadable = is_readable, 0
        answers = self.store.get(questions)
        stored = [(question, answer) for question, answer in zip(questions, answers, strict=True) if answer]
        for question, answer in stored:
            self._look_at(question, answer)
        if stored and not complete:
            self._check_streak(stored[-1][1])

    def check(self, question: Question, answer: Answer) -> None:
        """Look at a new answer, which is in the store."""
        with self._lock:
            self._look_at(question, answer)
            self._check_streak(answer)

    def _look_at(self, question: Question, answer: Answer) -> None:
        if answer.metadata.get("reasoning"):
            self._check_reasoning(question, answer)
        if self._is_readable:
            self._unreadable = 0 if self._is_readable(answer) else self._unreadable + 1

    def _check_streak(self, answer: Answer) -> None:
        """Raise UserError after `max_unreadable` answers in a row that cannot be read; `answer` is the last one."""
        limit, cut_off = self.spec.max_unreadable, answer.metadata.get("finish") in CUT_OFF
        if limit is None or self._unreadable < limit:
            return
        shown = answer.metadata.get("refused") or repr(one_line(answer.text))
        shown += f", cut off at `max_tokens` ({self.spec.max_tokens})" if cut_off else ""
        raise UserError(
            f"params.yaml: teachers.{self.name}.api.max_unreadable: {self._unreadable} answers in a row cannot be read "
            f"as a label, the last: {shown}; all answers are stored; look at the prompt, `labels` and `max_tokens`, or "
            "set a larger number (or null)"
        )

    def _check_reasoning(self, question: Question, answer: Answer) -> None:
        """Raise UserError if no request with the settings of `question` ever got more than reasoning."""
        if any(without_reasoning(text) for text in self.store.texts(question.model_identity)):
            return
        is_own = self.spec.base_url or self.spec.endpoints
        way = NO_REASONING["server" if is_own and self.spec.client == "openai" else self.spec.client]
        limit = question.model_identity["max_tokens"]
        raise UserError(
            f"params.yaml: teachers.{self.name}.api: the model spent its answer on reasoning and gave no label "
            f"({answer.metadata['reasoning']!r}): turn the reasoning off by {way}, or raise `max_tokens` ({limit})"
        )


def row_name(question: Question) -> str:
    """How messages name the row that `question` is about: by its id, else by the end of the prompt."""
    return f"`{question.row_id}`" if question.row_id else f"…{question.prompt[-1]['content'][-SHOWN_PROMPT:]!r}"
