"""Language models behind an HTTP endpoint: asked many questions at once, none twice, and never past a ceiling.

`client: openai` speaks to OpenAI and whatever speaks like it (vLLM, llama.cpp, `transformers serve`), `client:
anthropic` to Anthropic, each through its vendor's own package. Those packages' own retries are off: every call is
counted here before it is made, because a ceiling that does not see all calls is none.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from typing import Any

from distillery.config.schema import ApiConfig
from distillery.errors import UserError
from distillery.teachers.cache import Answer, AnswerStore, Question, canonical_json

DEFAULT_URLS = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com"}


DEFAULT_KEY_VARIABLES = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}


UNREADABLE, NOTHING = "an answer that cannot be read", "an empty answer"


TOP_LOGPROBS = 20  # the most alternatives a token that endpoints tell


MAX_EMPTY_ANSWERS = 3  # times that the answer to a question must be empty before it is believed to be


FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds; the random pause after the n-th failure is at most first * 2**n


PER_TURN, PER_CALL = 16, 64  # tokens that a chat template may add to a turn, and to a conversation


BYTES_PER_TOKEN = 4  # of English text; only the estimate rests on it, the ceiling counts a token a byte


class RetryableError(Exception):
    """What failed may work the next time. wait: seconds that the server asked for. free: no tokens were used."""

    def __init__(self, outcome: str, wait: float | None = None, free: bool = False):
        super().__init__(outcome)
        self.outcome, self.wait, self.free = outcome, wait, free


class Endpoint:
    """One model behind one endpoint. name: the teacher's, for messages.

    Raises UserError when its key is not in the environment, and whenever no further call may or can be made; what was
    answered before is in `store`. `sleep` and `say` are for tests and notebooks.
    """

    def __init__(self, name: str, spec: ApiConfig, store: AnswerStore, say: Callable[[str], None] = print):
        self.name, self.spec, self.store, self.say = name, spec, store, say
        self.base_url = spec.base_url or DEFAULT_URLS[spec.client]
        variable = spec.key or (None if spec.base_url else DEFAULT_KEY_VARIABLES[spec.client])
        self.secret = os.environ.get(variable, "") if variable else ""
        if variable and not self.secret:
            raise UserError(f"params.yaml: teachers.{name}.api.key: set {variable} in the environment")
        self.asker = canonical_json({"client": spec.client, "base_url": self.base_url, "model": spec.model})
        self.client = self._client()
        self.gate, self.next_call, self.resume = threading.Lock(), 0.0, 0.0
        self.budget, self.reserved = threading.Lock(), [0, 0]
        self.used = list(store.used(self.asker))
        self.stop = threading.Event()

    def _client(self) -> Any:
        # the packages insist on a key, and would take theirs from the environment to an endpoint that wants none
        settings = {"api_key": self.secret or "none", "base_url": self.base_url, "timeout": self.spec.timeout}
        if self.spec.client == "openai":
            import openai

            self.errors = openai
            return openai.OpenAI(**settings, max_retries=0)
        import anthropic

        self.errors = anthropic
        return anthropic.Anthropic(**settings, max_retries=0)

    def clean(self, text: str) -> str:
        """`text` without the key."""
        return text.replace(self.secret, "***") if self.secret else text

    # ---------------------------------------------------------------- what it may cost

    def cost(self, input_tokens: float, output_tokens: float) -> float | None:
        """US dollars, or None without a price."""
        price = self.spec.price
        return None if price is None else (input_tokens * price.input + output_tokens * price.output) / 1e6

    def estimate(self, questions: Sequence[Question]) -> dict[str, Any]:
        """What asking `questions` will take: answers wanted, answers already there, and for the rest calls, input
        tokens (by a rule of thumb), output tokens (at most) and their cost in US dollars (None without a price)."""
        there = self.store.get(questions)
        left = {q.key: q for q, answer in zip(questions, there, strict=True) if answer is None}
        tokens = sum(self._most(q)[0] // BYTES_PER_TOKEN for q in left.values())
        written = sum(self._most(q)[1] for q in left.values())
        cost = self.cost(tokens, written)
        wanted = len({q.key for q in questions})
        return {
            "answers": wanted,
            "in the store": wanted - len(left),
            "calls": len(left),
            "input tokens": tokens,
            "output tokens at most": written,
            "US dollars": None if cost is None else round(cost, 4),
        }

    def _most(self, question: Question) -> tuple[int, int]:
        """The most (input, output) tokens that a call can use: no tokenizer makes more tokens than there are bytes."""
        schema = question.asker.get("schema")
        content = sum(len(turn["content"].encode()) + PER_TURN for turn in question.prompt)
        return content + PER_CALL + (len(canonical_json(schema)) if schema else 0), question.asker["max_tokens"]

    def _reserve(self, question: Question) -> tuple[int, int]:
        most = self._most(question)
        with self.budget:
            total = [self.used[i] + self.reserved[i] + most[i] for i in (0, 1)]
            spec, cost = self.spec, self.cost(*total)
            for key, value, ceiling in (
                ("max_total_tokens", sum(total), spec.max_total_tokens),
                ("max_cost", cost, spec.max_cost),
            ):
                if ceiling is not None and value > ceiling:
                    raise UserError(
                        f"params.yaml: teachers.{self.name}.api.{key}: the next call might pass {ceiling:g} (used so "
                        f"far: {sum(self.used):,} tokens{self._dollars(self.used)}); answers so far are kept, raise "
                        "it to go on"
                    )
            self.reserved = [self.reserved[i] + most[i] for i in (0, 1)]
        return most

    def _dollars(self, tokens: Sequence[int]) -> str:
        cost = self.cost(*tokens)
        return "" if cost is None else f", ${cost:.4f}"

    def _settle(self, most: tuple[int, int], tokens: tuple[int, int]) -> None:
        with self.budget:
            for i in (0, 1):
                self.reserved[i] -= most[i]
                self.used[i] += tokens[i]

    # ---------------------------------------------------------------- asking

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """The answer to each question, from the store or from the endpoint; each is kept on arrival.

        Questions are asked `concurrency` at a time, at most `requests_per_minute`; a question that fails for a reason
        that may pass is asked again, `max_attempts` times in all, after a random, growing time or when the server says.
        Raises UserError when a ceiling would be passed, and when the endpoint refuses or does not answer a question.
        """
        there = self.store.get(questions)
        left = {q.key: q for q, answer in zip(questions, there, strict=True) if answer is None}
        if left:
            plan = self.estimate(questions)
            self.say(f"{self.name}: " + ", ".join(f"{k}: {v:,}" for k, v in plan.items() if v is not None))
            self.stop.clear()
            with ThreadPoolExecutor(self.spec.concurrency) as pool:
                futures = [pool.submit(self._answer, question) for question in left.values()]
                try:
                    for done, future in enumerate(as_completed(futures), 1):
                        future.result()
                        if done % max(1, len(futures) // 10) == 0:
                            self.say(f"{self.name}: {done}/{len(futures)} answers")
                except BaseException:
                    self.stop.set()  # those in flight are waited for and kept
                    pool.shutdown(cancel_futures=True)
                    raise
            there = self.store.get(questions)
        return there

    def _answer(self, question: Question) -> None:
        empty = 0
        for attempt in range(1, self.spec.max_attempts + 1):
            self._wait_for_turn()
            if self.stop.is_set():
                return
            try:
                self._call(question, believe_empty=empty >= MAX_EMPTY_ANSWERS - 1)
                return
            except RetryableError as failure:
                empty += failure.outcome == NOTHING
                if attempt == self.spec.max_attempts:
                    self.stop.set()
                    raise UserError(
                        f"teachers.{self.name}: no answer from {self.base_url} after {attempt} calls, the last: "
                        f"{failure.outcome}; answers so far are kept, run again to go on"
                    ) from None
                self._pause(attempt, failure.wait)
            except BaseException:
                self.stop.set()  # before another thread makes the same mistake
                raise

    def _wait_for_turn(self) -> None:
        """Wait until the rate limit, and a pause that the server asked for, let the next call go."""
        with self.gate:
            turn = max(time.monotonic(), self.next_call)
            if self.spec.requests_per_minute:
                self.next_call = turn + 60 / self.spec.requests_per_minute
        while (wait := max(turn, self.resume) - time.monotonic()) > 0 and not self.stop.is_set():
            self.stop.wait(wait)

    def _pause(self, attempt: int, asked_for: float | None) -> None:
        if asked_for is not None:  # it holds for everybody who calls
            with self.gate:
                self.resume = max(self.resume, time.monotonic() + asked_for)
        else:
            self.stop.wait(random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)))

    def _call(self, question: Question, believe_empty: bool) -> None:
        most = self._reserve(question)
        tokens = most  # unless it is known better
        try:
            call = self.store.opened(question, self.asker, *most)
            started = time.perf_counter()
            outcome, answered = "failed", None
            try:
                answer = self._sent(question)
                tokens = self._counted(answer, most)
                if not answer.text and not believe_empty:
                    raise RetryableError(NOTHING)
                outcome, answered = "answered", (question, answer)
            except RetryableError as failure:
                outcome = failure.outcome
                tokens = (0, 0) if failure.free else tokens
                raise
            except UserError:
                outcome, tokens = "refused", (0, 0)
                raise
            finally:
                self.store.closed(call, outcome, time.perf_counter() - started, tokens, answered)
        finally:
            self._settle(most, tokens)

    @staticmethod
    def _counted(answer: Answer, most: tuple[int, int]) -> tuple[int, int]:
        told = answer.more.get("usage") or most
        return int(told[0]), int(told[1])

    def _sent(self, question: Question) -> Answer:
        """One call. Raises Again or UserError; the messages of both are without the key."""
        errors = self.errors
        try:
            answer = (self._openai if self.spec.client == "openai" else self._anthropic)(question)
        except errors.APITimeoutError:
            raise RetryableError("timed out") from None
        except errors.APIConnectionError as error:
            cause = error.__cause__ or error
            raise RetryableError(f"connection lost ({type(cause).__name__})") from None
        except errors.APIStatusError as error:
            raise self._told(error) from None
        except (errors.APIResponseValidationError, ValueError):
            raise RetryableError(UNREADABLE) from None
        if self.secret and self.secret in answer.text + canonical_json(answer.more):
            answer = Answer(self.clean(answer.text), json.loads(self.clean(canonical_json(answer.more))))
        return answer

    def _told(self, error: Any) -> Exception:
        """What an HTTP status other than 200 means: try again, or leave it."""
        status, headers = error.status_code, error.response.headers
        body = error.body if isinstance(error.body, dict) else {}
        inner = body.get("error") if isinstance(body.get("error"), dict) else body
        said = inner.get("message") or inner.get("detail") or ""
        said = self.clean(" ".join(str(said or error.response.text[:200]).split()))[:200]
        spent = inner.get("code") == "insufficient_quota" or inner.get("type") == "insufficient_quota"
        if not spent and (status in (408, 409, 425, 429) or status >= 500):
            return RetryableError(f"HTTP {status}", retry_after_seconds(headers.get("retry-after")), free=True)
        where = f"teachers.{self.name}.api"
        what = {
            401: f"{where}.key: the endpoint does not accept the key",
            403: f"{where}.key: the key may not do this",
            404: f"{where}.model: the endpoint knows no `{self.spec.model}` (or base_url is wrong)",
        }
        return UserError(f"params.yaml: {what.get(status, where)}: HTTP {status} from {self.base_url}: {said}")

    def _openai(self, question: Question) -> Answer:
        asker, spec = question.asker, self.spec
        # OpenAI's newer models know the new name only, others often the old one only
        extra: dict[str, Any] = {("max_tokens" if spec.base_url else "max_completion_tokens"): asker["max_tokens"]}
        if asker["temperature"] is not None:
            extra["temperature"] = asker["temperature"]
        if asker.get("logprobs"):
            extra |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if asker.get("schema"):
            form = {"name": "answer", "strict": True, "schema": asker["schema"]}
            extra["response_format"] = {"type": "json_schema", "json_schema": form}
        made = self.client.chat.completions.create(model=spec.model, messages=question.prompt, **extra)
        try:  # the package does not check what it was sent
            choice = made.choices[0]
            more: dict[str, Any] = {"finish": choice.finish_reason, "model": made.model}
            if made.usage:
                more["usage"] = [made.usage.prompt_tokens, made.usage.completion_tokens]
            if asker.get("logprobs"):
                first = choice.logprobs.content[0].top_logprobs
                more["logprobs"] = [[top.token, top.logprob] for top in first]
            return Answer((choice.message.content or "").strip(), more)
        except (AttributeError, LookupError, TypeError):
            raise RetryableError(UNREADABLE) from None

    def _anthropic(self, question: Question) -> Answer:
        asker = question.asker
        system = [turn["content"] for turn in question.prompt if turn["role"] == "system"]
        extra: dict[str, Any] = {"system": "\n\n".join(system)} if system else {}
        if asker["temperature"] is not None:  # newer models sample in one way only; the package then has no name for it
            extra["extra_body"] = {"temperature": asker["temperature"]}
        if asker.get("schema"):
            extra["output_config"] = {"format": {"type": "json_schema", "schema": asker["schema"]}}
        turns = [turn for turn in question.prompt if turn["role"] != "system"]
        made = self.client.messages.create(
            model=self.spec.model, messages=turns, max_tokens=asker["max_tokens"], **extra
        )
        try:
            text = "".join(block.text for block in made.content if block.type == "text")
            more = {"finish": made.stop_reason, "model": made.model}
            more["usage"] = [made.usage.input_tokens, made.usage.output_tokens]
            return Answer(text.strip(), more)
        except (AttributeError, LookupError, TypeError):
            raise RetryableError(UNREADABLE) from None


def retry_after_seconds(header: str | None) -> float | None:
    """What a Retry-After header asks for, in seconds (RFC 9110, 10.2.3: a number, or a date); None without one."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
