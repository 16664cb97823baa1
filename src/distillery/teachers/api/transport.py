"""One request to an endpoint, in the form of its vendor.

`client: openai` serves OpenAI and all compatible endpoints (vLLM, llama.cpp, `transformers serve`), `client: anthropic`
serves Anthropic, each through its vendor's own package. The retries of these packages are off: every call is counted
before it is made, and a ceiling that misses some calls is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from distillery.config.schema import ApiConfig
from distillery.errors import UserError
from distillery.tasks.prompts import without_system_turn
from distillery.teachers.api.connection import http_client
from distillery.teachers.api.failures import (
    NO_SYSTEM_ROLE,
    REFUSED_ROW,
    ROW_STATUSES,
    RetryableError,
    error_message,
    may_pass,
    one_line,
    retry_after_seconds,
)
from distillery.teachers.api.responses import read_completion, read_message, read_scored_tokens
from distillery.teachers.cache import Answer, Question, canonical_json

DEFAULT_URLS = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com"}
DEFAULT_KEY_VARIABLES = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
UNREADABLE = "an answer that cannot be read"
TOP_LOGPROBS = 20  # the most alternatives per token that endpoints return


class Transport:
    """Sends requests to one model at one endpoint. name: the teacher's, for messages. key_place: where the section
    `api` names the variable with the API key.

    Raises UserError when the API key is not in the environment.
    """

    def __init__(self, name: str, spec: ApiConfig, key_place: str = "key"):
        self.name, self.spec, self.key_place = name, spec, key_place
        self.base_url = spec.base_url or DEFAULT_URLS[spec.client]
        variable = spec.key or (None if spec.base_url else DEFAULT_KEY_VARIABLES[spec.client])
        self.secret = os.environ.get(variable, "") if variable else ""
        if variable and not self.secret:
            raise UserError(f"params.yaml: teachers.{name}.api.{key_place}: set {variable} in the environment")
        if self.secret and self.secret in canonical_json(spec.extra_request_keys):
            raise UserError(
                f"params.yaml: teachers.{name}.api: extra_body or a key beside it holds the value of {variable}"
            )
        # the packages insist on a key, and would send the one in the environment to an endpoint that wants none
        settings = {"api_key": self.secret or "none", "base_url": self.base_url, "timeout": spec.timeout}
        if spec.client == "openai":
            import openai as package

            client_class = package.OpenAI
        else:
            import anthropic as package

            client_class = package.Anthropic
        connection = http_client(package, name, self.base_url)
        self.client = client_class(**settings, max_retries=0, http_client=connection)
        self.errors = package
        self.merges_system = False  # whether the text of the system turn goes into the first user turn

    def redact(self, text: str) -> str:
        """`text` without the API key."""
        return text.replace(self.secret, "***") if self.secret else text

    def send(self, question: Question) -> Answer:
        """The answer of one call.

        Its metadata, where the endpoint gives them: `finish`, `model`, `usage` (input and output tokens), `steps` (see
        :func:`distillery.teachers.api.probabilities.label_probabilities`) or `tokens` (see
        :func:`distillery.teachers.api.responses.read_completion`), `reasoning` (its start, of an answer that is
        nothing else) and `refused` (the server's words, of a row that the endpoint refuses).
        Raises RetryableError when the failure may pass, else UserError; neither message holds the API key.
        """
        errors = self.errors
        try:
            send = self._send_openai if self.spec.client == "openai" else self._send_anthropic
            answer = (self._send_given if question.model_identity.get("scores") else send)(question)
        except errors.APITimeoutError:
            raise RetryableError("timed out") from None
        except errors.APIConnectionError as error:
            cause = error.__cause__ or error
            raise RetryableError(f"connection lost ({type(cause).__name__})") from None
        except errors.APIStatusError as error:
            if self._refuses_system_turn(question, error):
                self.merges_system = True  # of this request and of all later ones
                return self.send(question)
            answer = self._read_status(error)
        except (errors.APIResponseValidationError, ValueError):
            raise RetryableError(UNREADABLE) from None
        if self.secret and self.secret in answer.text + canonical_json(answer.metadata):
            answer = Answer(self.redact(answer.text), json.loads(self.redact(canonical_json(answer.metadata))))
        return answer

    def _refuses_system_turn(self, question: Question, error: Any) -> bool:
        """Whether the endpoint failed because the chat template of its model takes no system turn."""
        has_system = self.spec.client == "openai" and question.prompt[0]["role"] == "system"
        return has_system and not self.merges_system and bool(NO_SYSTEM_ROLE.search(error.response.text))

    def _read_status(self, error: Any) -> Answer:
        """See :meth:`_read_failure`, for an HTTP status other than 200."""
        try:
            body = error.response.json()
        except ValueError:
            body = error.response.text
        return self._read_failure(error.status_code, body, error.response.headers.get("retry-after"))

    def _read_failure(self, status: int, body: Any, retry_after: str | None = None) -> Answer:
        """The answer `refused` when only this row is refused; else raises RetryableError or UserError.

        status: of HTTP. body: the decoded response; in one with status 200 an error may have a status as its code.
        """
        words, codes = error_message(body)
        reported = body["error"].get("code") if isinstance(body, dict) and isinstance(body.get("error"), dict) else None
        decisive = reported if status == 200 and isinstance(reported, int) else status
        message = f"HTTP {status} from {self.base_url}: {one_line(self.redact(words or codes))}"
        if decisive in (200, *ROW_STATUSES) and REFUSED_ROW.search(f"{words} {codes}"):
            return Answer("", {"refused": message, "usage": [0, 0]})
        if "insufficient_quota" not in codes and may_pass(decisive):
            raise RetryableError(f"HTTP {decisive}", retry_after_seconds(retry_after), free=True)
        section = f"teachers.{self.name}.api"
        reason = {
            401: f"{section}.{self.key_place}: the endpoint does not accept the key",
            403: f"{section}.{self.key_place}: the key may not do this",
            404: f"{section}.model: the endpoint has no `{self.spec.model}` (or base_url is wrong)",
        }.get(decisive, section)
        raise UserError(f"params.yaml: {reason}: {message}")

    def _send_openai(self, question: Question) -> Answer:
        settings, spec = question.model_identity, self.spec
        # OpenAI's newer models accept only the new name of this argument, other endpoints often only the old one
        extra: dict[str, Any] = {("max_tokens" if spec.base_url else "max_completion_tokens"): settings["max_tokens"]}
        if settings["temperature"] is not None:
            extra["temperature"] = settings["temperature"]
        if "top_p" in settings:
            extra["top_p"] = settings["top_p"]
        top_logprobs = settings.get("tokens") or (TOP_LOGPROBS if settings.get("logprobs") else 0)
        if top_logprobs:
            extra |= {"logprobs": True, "top_logprobs": top_logprobs}
        if settings.get("schema"):
            schema = {"name": "answer", "strict": True, "schema": settings["schema"]}
            extra["response_format"] = {"type": "json_schema", "json_schema": schema}
        if settings.get("extra_body"):
            extra["extra_body"] = settings["extra_body"]
        turns = without_system_turn(question.prompt) if self.merges_system else question.prompt
        response = self.client.chat.completions.create(model=spec.model, messages=turns, **extra)
        return self._read_openai(response, lambda body: read_completion(body, bool(settings.get("tokens"))))

    def _send_given(self, question: Question) -> Answer:
        """The scores of the tokens of a prompt and its completion; the one token that is generated is not used."""
        settings, extra_body = question.model_identity, dict(question.model_identity.get("extra_body", {}))
        prompt, completion = (turn["ids"] for turn in question.prompt)
        extra: dict[str, Any] = {"extra_body": extra_body}
        if settings["scores"] == "echo":
            extra |= {"echo": True, "logprobs": settings["tokens"]}
        else:
            extra_body["prompt_logprobs"] = settings["tokens"]
        response = self.client.completions.create(
            model=self.spec.model, prompt=[*prompt, *completion], max_tokens=1, temperature=0.0, **extra
        )
        return self._read_openai(response, lambda body: read_scored_tokens(body, len(prompt), len(completion)))

    def _read_openai(self, response: Any, read: Callable[[dict[str, Any]], Answer]) -> Answer:
        """The answer that `read` finds in the body of `response`, which may hold an error in its place."""
        try:  # the package does not validate responses
            body = response.to_dict(warnings=False)
            if body.get("error") or body.get("object") == "error":
                return self._read_failure(200, body)
            if body["choices"][0].get("error"):  # of a router, whose provider failed
                return self._read_failure(200, body["choices"][0])
            return read(body)
        except (AttributeError, LookupError, TypeError, ValueError):
            raise RetryableError(UNREADABLE) from None

    def _send_anthropic(self, question: Question) -> Answer:
        settings = question.model_identity
        system = [turn["content"] for turn in question.prompt if turn["role"] == "system"]
        extra: dict[str, Any] = {"system": "\n\n".join(system)} if system else {}
        extra["extra_body"] = settings.get("extra_body", {})
        if settings["temperature"] is not None:  # the package has no argument for it: newer models take no temperature
            extra["extra_body"] = {"temperature": settings["temperature"]} | extra["extra_body"]
        if "top_p" in settings:
            extra["extra_body"] = {"top_p": settings["top_p"]} | extra["extra_body"]
        if settings.get("schema"):
            extra["output_config"] = {"format": {"type": "json_schema", "schema": settings["schema"]}}
        turns = [turn for turn in question.prompt if turn["role"] != "system"]
        response = self.client.messages.create(
            model=self.spec.model, messages=turns, max_tokens=settings["max_tokens"], **extra
        )
        try:
            return read_message(response.to_dict(warnings=False))
        except (AttributeError, LookupError, TypeError):
            raise RetryableError(UNREADABLE) from None
