"""A language model behind an HTTP endpoint: many requests at once, none twice, and never past a ceiling."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from distillery.config.schema import ApiConfig
from distillery.errors import UserError
from distillery.teachers.api.budget import Budget, max_call_tokens
from distillery.teachers.api.failures import RetryableError, one_line
from distillery.teachers.api.pacing import Pacer
from distillery.teachers.api.transport import Transport
from distillery.teachers.api.watch import AnswerWatch, row_name
from distillery.teachers.cache import Answer, AnswerStore, Question, canonical_json

EMPTY, REFUSED_ROW = "an empty answer", "row refused"
MAX_EMPTY_ANSWERS = 3  # an answer that is empty this many times is accepted as empty
BYTES_PER_TOKEN = 4  # of English text; only the estimate uses it, the ceiling counts a token per byte


class Endpoint:
    """One model behind one endpoint. name: the teacher's, for messages. log: receives progress messages.

    Raises UserError when the API key is not in the environment, and whenever no further call may or can be made; the
    answers until then are in `store`.
    """

    def __init__(self, name: str, spec: ApiConfig, store: AnswerStore, log: Callable[[str], None] = print):
        self.name, self.spec, self.store, self.log = name, spec, store, log
        self.transport = Transport(name, spec)
        self.base_url = self.transport.base_url
        self.identity = canonical_json({"client": spec.client, "base_url": self.base_url, "model": spec.model})
        self.budget = Budget(name, spec, store.used_tokens(self.identity))
        self.pacer = Pacer(spec.requests_per_minute)
        self.watch = AnswerWatch(name, spec, store)

    def estimate(self, questions: Sequence[Question]) -> dict[str, Any]:
        """What :meth:`query` will take: answers wanted, answers in the store, and for the rest the calls, input tokens
        (by a rule of thumb), output tokens (at most) and their cost in US dollars (None without a price)."""
        missing = self._missing(questions)
        tokens = [max_call_tokens(question) for question in missing.values()]
        input_tokens = sum(most // BYTES_PER_TOKEN for most, _ in tokens)
        output_tokens = sum(most for _, most in tokens)
        cost = self.budget.cost(input_tokens, output_tokens)
        wanted = len({question.key for question in questions})
        return {
            "answers": wanted,
            "in the store": wanted - len(missing),
            "calls": len(missing),
            "input tokens": input_tokens,
            "output tokens at most": output_tokens,
            "US dollars": None if cost is None else round(cost, 4),
        }

    def _missing(self, questions: Sequence[Question]) -> dict[str, Question]:
        """The questions that the store has no answer to, by key."""
        answers = self.store.get(questions)
        return {q.key: q for q, answer in zip(questions, answers, strict=True) if answer is None}

    def query(self, questions: Sequence[Question], is_readable: Callable[[Answer], bool] | None = None) -> list[Answer]:
        """The answer to each question, from the store or from the endpoint; each is stored on arrival.

        is_readable: whether an answer is of use; None: all are. A row that the endpoint refuses, because of its text or
        its length, has an empty answer, is named in the log, and is not sent again.

        `concurrency` requests run at a time, at most `requests_per_minute`. A request whose failure may pass is sent
        again, `max_attempts` times in all, after a random, growing pause or the one that the server requests.
        Raises UserError when a ceiling could be passed, when the endpoint refuses or does not answer a request, and
        when its answers, also those in the store, are of no use (:class:`AnswerWatch`).
        """
        missing = self._missing(questions)
        self.watch.start(questions, is_readable, complete=not missing)
        if missing:
            plan = self.estimate(questions)
            self.log(f"{self.name}: " + ", ".join(f"{k}: {v:,}" for k, v in plan.items() if v is not None))
            self._fetch(missing.values())
        answers = self.store.get(questions)
        for question, answer in {q.key: (q, a) for q, a in zip(questions, answers, strict=True)}.values():
            if words := answer.metadata.get("refused"):
                self.log(f"{self.name}: row {row_name(question)} is refused and stays without a label: {words}")
        return answers

    def _fetch(self, questions: Iterable[Question]) -> None:
        self.pacer.stop.clear()
        with ThreadPoolExecutor(self.spec.concurrency) as pool:
            futures = [pool.submit(self._answer, question) for question in questions]
            try:
                for count, future in enumerate(as_completed(futures), 1):
                    future.result()
                    if count % max(1, len(futures) // 10) == 0:
                        self.log(f"{self.name}: {count}/{len(futures)} answers")
            except BaseException:
                self.pacer.stop.set()  # calls in flight are waited for, and their answers stored
                pool.shutdown(cancel_futures=True)
                raise

    def _answer(self, question: Question) -> None:
        """Get and store the answer to `question`, or return early when another thread has failed."""
        empty = 0
        for attempt in range(1, self.spec.max_attempts + 1):
            if not self.pacer.wait_for_turn():
                return
            try:
                answer = self._call(question, accept_empty=empty >= MAX_EMPTY_ANSWERS - 1)
                self.watch.check(question, answer)
                return
            except RetryableError as failure:
                empty += failure.outcome == EMPTY
                if attempt == self.spec.max_attempts:
                    self.pacer.stop.set()
                    raise UserError(
                        f"teachers.{self.name}: no answer from {self.base_url} after {attempt} calls, the last: "
                        f"{failure.outcome}; all answers so far are stored, run again to continue"
                    ) from None
                self.pacer.pause(attempt, failure.retry_after)
            except BaseException:
                self.pacer.stop.set()  # before another thread makes the same mistake
                raise

    def _check_logprobs(self, question: Question, answer: Answer) -> None:
        """Raise UserError when `answer` has no log-probabilities although `question` requests them."""
        settings, returned = question.model_identity, answer.metadata
        if (
            not (settings.get("logprobs") or settings.get("tokens"))
            or returned.get("refused")
            or returned.get("reasoning")
        ):
            return
        is_empty = returned.get("tokens") == [] and not answer.text
        if returned.get("tokens") or "steps" in returned or is_empty:
            return
        if way := settings.get("scores"):
            raise UserError(
                f"params.yaml: teachers.{self.name}.api.tokens: {self.base_url} returned no log-probabilities of the "
                f"tokens that it was sent: it has no `{way}`; use `tokens: generated`"
            )
        key, way = ("labels", "`labels: text`") if settings.get("logprobs") else ("tokens", "another server")
        raise UserError(
            f"params.yaml: teachers.{self.name}.api.{key}: {self.base_url} returned no log-probabilities (`logprobs: "
            f"null`) with the answer {one_line(answer.text)!r}; turn them on at the server, or use {way}"
        )

    def _call(self, question: Question, accept_empty: bool) -> Answer:
        """The answer of one call, reserved and recorded before it is made, settled and recorded after it, whatever its
        outcome."""
        reserved = max_call_tokens(question)
        self.budget.reserve(reserved)
        used = reserved  # unless the answer or the failure shows the true number
        try:
            call = self.store.open_call(question, self.identity, *reserved)
            started = time.perf_counter()
            outcome, answer, answered = "failed", None, None
            try:
                answer = self.transport.send(question)
                input_tokens, output_tokens = answer.metadata.get("usage") or reserved
                used = int(input_tokens), int(output_tokens)
                self._check_logprobs(question, answer)
                explained = answer.metadata.get("refused") or answer.metadata.get("reasoning")
                explained = explained or question.model_identity.get("scores")  # which no text answers
                if not answer.text and not explained and not accept_empty:
                    raise RetryableError(EMPTY)
                outcome = REFUSED_ROW if answer.metadata.get("refused") else "answered"
                answered = question, answer
                return answer
            except RetryableError as failure:
                outcome = failure.outcome
                used = (0, 0) if failure.free else used
                raise
            except UserError:
                outcome, used = "refused", used if answer else (0, 0)
                raise
            finally:
                self.store.close_call(call, outcome, time.perf_counter() - started, used, answered)
        finally:
            self.budget.settle(reserved, used)
