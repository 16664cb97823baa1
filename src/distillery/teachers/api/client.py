"""A language model behind HTTP endpoints: many requests at once, none twice, and never past a ceiling."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from distillery.config.schema import ApiConfig
from distillery.errors import UserError
from distillery.teachers.api.budget import Budget, max_call_tokens
from distillery.teachers.api.failures import RetryableError, one_line
from distillery.teachers.api.servers import QuestionQueue, Server
from distillery.teachers.api.watch import AnswerWatch, row_name
from distillery.teachers.cache import Answer, AnswerStore, Question

EMPTY, REFUSED_ROW = "an empty answer", "row refused"
MAX_EMPTY_ANSWERS = 3  # an answer that is empty this many times is accepted as empty
BYTES_PER_TOKEN = 4  # of English text; only the estimate uses it, the ceiling counts a token per byte
ALL_STORED = "all answers so far are stored, run again to continue"


class Endpoint:
    """One model behind one endpoint, or behind several. name: the teacher's, for messages. log: receives progress
    messages.

    base_url: a part of the key of an answer; None of several, whose answers are the same wherever they come from.
    Raises UserError when an API key is not in the environment, and whenever no further call may or can be made; the
    answers until then are in `store`.
    """

    def __init__(self, name: str, spec: ApiConfig, store: AnswerStore, log: Callable[[str], None] = print):
        self.name, self.spec, self.store, self.log = name, spec, store, log
        places = [f"endpoints.{i}.key" if own.key else "key" for i, own in enumerate(spec.endpoints)] or ["key"]
        self.servers = [Server(name, own, place) for own, place in zip(spec.servers, places, strict=True)]
        self.base_url = None if spec.endpoints else self.servers[0].base_url
        if spec.endpoints:  # also those that are no longer in the list
            used = store.used_tokens_of_model(spec.client, spec.model)
        else:
            used = store.used_tokens(self.servers[0].identity)
        self.budget = Budget(name, spec, used)
        self.watch = AnswerWatch(name, spec, store)
        self._lock = threading.Lock()

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
        missing = {q.key: q for q, answer in zip(questions, answers, strict=True) if answer is None}
        for server in self.servers if self.spec.endpoints and missing else []:
            wanted = list(missing.values())  # it may have answered before it was one of several
            alone = [replace(q, model_identity=q.model_identity | {"base_url": server.base_url}) for q in wanted]
            answered = [(q, a) for q, a in zip(wanted, self.store.get(alone), strict=True) if a is not None]
            self.store.put(answered)
            for question, _ in answered:
                del missing[question.key]
        return missing

    def query(self, questions: Sequence[Question], is_readable: Callable[[Answer], bool] | None = None) -> list[Answer]:
        """The answer to each question, from the store or from the endpoint; each is stored on arrival.

        is_readable: whether an answer is of use; None: all are. A row that the endpoint refuses, because of its text or
        its length, has an empty answer, is named in the log, and is not sent again.

        `concurrency` requests run at a time, at most `requests_per_minute`, at each of several endpoints. A request
        whose failure may pass is sent again, `max_attempts` times in all, after a random, growing pause or the one that
        the server requests. One of several endpoints that answered nothing meanwhile is then set aside.
        Raises UserError when a ceiling could be passed, when an endpoint refuses a request, when none answers it, and
        when the answers, also those in the store, are of no use (:class:`AnswerWatch`).
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
        """Let the servers answer `questions`. Those that are set aside stay so, unless all of them are."""
        usable = [server for server in self.servers if server.last_failure is None] or self.servers
        for server in usable:
            server.revive()
        queue, errors = QuestionQueue(questions, self.servers), list[BaseException]()
        lines: SimpleQueue[str | None] = SimpleQueue()

        def work(server: Server) -> None:
            try:
                while (question := queue.take(server)) is not None:
                    self._answer_or_return(server, question, queue, lines.put)
            except BaseException as error:
                errors.append(error)
                self._stop(queue)  # before another thread makes the same mistake
            finally:
                lines.put(None)

        threads = [server for server in usable for _ in range(min(server.spec.concurrency, queue.total))]
        with ThreadPoolExecutor(len(threads)) as pool:
            try:
                for server in threads:
                    pool.submit(work, server)
                while threads:  # each ends with None
                    line = lines.get()
                    if line is None:
                        threads.pop()
                    else:
                        self.log(f"{self.name}: {line}")
            except BaseException:
                self._stop(queue)  # calls in flight are waited for, and their answers stored
                raise
        if errors:
            raise errors[0]

    def _stop(self, queue: QuestionQueue) -> None:
        queue.stop()
        for server in self.servers:
            server.pacer.stop.set()

    def _answer_or_return(
        self, server: Server, question: Question, queue: QuestionQueue, report: Callable[[str], None]
    ) -> None:
        """Get the answer to `question`, or put it back into `queue`: the run stops, or `server` does not answer.

        report: receives a line for each tenth of the answers and for a server that is set aside.
        """
        failure = self._answer(server, question)
        if failure is None:
            count = queue.close()
            if count % max(1, queue.total // 10) == 0:
                report(f"{count}/{queue.total} answers")
            if count == queue.total:  # no server needs to wait for its turn any longer
                self._stop(queue)
            return
        if failure:
            self._give_up(server, question, failure, queue, report)
        queue.put_back(question)

    def _answer(self, server: Server, question: Question) -> str | None:
        """Get and store the answer to `question`. None, or the last failure; it is empty when the run stops."""
        empty, attempts = 0, self.spec.max_attempts
        for attempt in range(1, attempts + 1):
            if attempt > 1 and not server.pacer.wait_for_turn():
                return ""
            try:
                answer = self._call(server, question, accept_empty=empty >= MAX_EMPTY_ANSWERS - 1)
                server.count_call(failed=False)
                self.watch.check(question, answer)
                return None
            except RetryableError as failure:
                server.count_call(failed=True)
                empty += failure.outcome == EMPTY
                if attempt == attempts:
                    return failure.outcome
                server.pacer.pause(attempt, failure.retry_after)
        return ""

    def _give_up(
        self, server: Server, question: Question, failure: str, queue: QuestionQueue, report: Callable[[str], None]
    ) -> None:
        """Set `server` aside when none of its threads got an answer meanwhile. Raises UserError when no other server
        can answer `question`: each one is set aside, or has given this question up."""
        attempts = self.spec.max_attempts
        with self._lock:
            if server.failures >= attempts and server.last_failure is None:
                server.set_aside(failure)
                if len(self.servers) > 1:
                    report(f"{server.base_url} is set aside after {attempts} failed calls, the last: {failure}")
            is_over = all(other.last_failure is not None for other in self.servers)
        if is_over and len(self.servers) > 1:
            reasons = "; ".join(f"{other.base_url}: {other.last_failure}" for other in self.servers)
            raise UserError(
                f"teachers.{self.name}: none of its {len(self.servers)} endpoints answers ({reasons}); {ALL_STORED}"
            )
        if is_over or not queue.give_up(question, server):
            raise UserError(
                f"teachers.{self.name}: no answer from {server.base_url} after {attempts} calls, the last: {failure}; "
                f"{ALL_STORED}"
            )

    def _check_logprobs(self, server: Server, question: Question, answer: Answer) -> None:
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
                f"params.yaml: teachers.{self.name}.api.tokens: {server.base_url} returned no log-probabilities of the "
                f"tokens that it was sent: it has no `{way}`; use `tokens: generated`"
            )
        key, way = ("labels", "`labels: text`") if settings.get("logprobs") else ("tokens", "another server")
        raise UserError(
            f"params.yaml: teachers.{self.name}.api.{key}: {server.base_url} returned no log-probabilities (`logprobs: "
            f"null`) with the answer {one_line(answer.text)!r}; turn them on at the server, or use {way}"
        )

    def _call(self, server: Server, question: Question, accept_empty: bool) -> Answer:
        """The answer of one call to `server`, reserved and recorded before it is made, settled and recorded after it,
        whatever its outcome."""
        reserved = max_call_tokens(question)
        self.budget.reserve(reserved)
        used = reserved  # unless the answer or the failure shows the true number
        try:
            call = self.store.open_call(question, server.identity, *reserved)
            started = time.perf_counter()
            outcome, answer, answered = "failed", None, None
            try:
                answer = server.transport.send(question)
                input_tokens, output_tokens = answer.metadata.get("usage") or reserved
                used = int(input_tokens), int(output_tokens)
                self._check_logprobs(server, question, answer)
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
