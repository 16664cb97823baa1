"""One request to an endpoint, in the form of its vendor, and what its failures mean.

`client: openai` serves OpenAI and all compatible endpoints (vLLM, llama.cpp, `transformers serve`), `client: anthropic`
serves Anthropic, each through its vendor's own package. The retries of these packages are off: every call is counted
before it is made, and a ceiling that misses some calls is none.
"""

from __future__ import annotations

import json
import os
import time
from email.utils import parsedate_to_datetime
from typing import Any

from distillery.config.schema import ApiConfig
from distillery.errors import UserError
from distillery.teachers.cache import Answer, Question, canonical_json

DEFAULT_URLS = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com"}
DEFAULT_KEY_VARIABLES = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
UNREADABLE = "an answer that cannot be read"
TOP_LOGPROBS = 20  # the most alternatives per token that endpoints return


class RetryableError(Exception):
    """A failure that may pass.

    outcome: for the record. retry_after: seconds that the server requested. free: whether no tokens were used.
    """

    def __init__(self, outcome: str, retry_after: float | None = None, free: bool = False):
        super().__init__(outcome)
        self.outcome, self.retry_after, self.free = outcome, retry_after, free


class Transport:
    """Sends requests to one model at one endpoint. name: the teacher's, for messages.

    Raises UserError when the API key is not in the environment.
    """

    def __init__(self, name: str, spec: ApiConfig):
        self.name, self.spec = name, spec
        self.base_url = spec.base_url or DEFAULT_URLS[spec.client]
        variable = spec.key or (None if spec.base_url else DEFAULT_KEY_VARIABLES[spec.client])
        self.secret = os.environ.get(variable, "") if variable else ""
        if variable and not self.secret:
            raise UserError(f"params.yaml: teachers.{name}.api.key: set {variable} in the environment")
        # the packages insist on a key, and would send the one in the environment to an endpoint that wants none
        settings = {"api_key": self.secret or "none", "base_url": self.base_url, "timeout": spec.timeout}
        if spec.client == "openai":
            import openai as package

            self.client = package.OpenAI(**settings, max_retries=0)
        else:
            import anthropic as package

            self.client = package.Anthropic(**settings, max_retries=0)
        self.errors = package

    def redact(self, text: str) -> str:
        """`text` without the API key."""
        return text.replace(self.secret, "***") if self.secret else text

    def send(self, question: Question) -> Answer:
        """The answer of one call; `usage` in its metadata: (input, output) tokens, where the endpoint counts them.

        Raises RetryableError when the failure may pass, else UserError; neither message holds the API key.
        """
        errors = self.errors
        try:
            answer = (self._send_openai if self.spec.client == "openai" else self._send_anthropic)(question)
        except errors.APITimeoutError:
            raise RetryableError("timed out") from None
        except errors.APIConnectionError as error:
            cause = error.__cause__ or error
            raise RetryableError(f"connection lost ({type(cause).__name__})") from None
        except errors.APIStatusError as error:
            raise self._status_failure(error) from None
        except (errors.APIResponseValidationError, ValueError):
            raise RetryableError(UNREADABLE) from None
        if self.secret and self.secret in answer.text + canonical_json(answer.metadata):
            answer = Answer(self.redact(answer.text), json.loads(self.redact(canonical_json(answer.metadata))))
        return answer

    def _status_failure(self, error: Any) -> RetryableError | UserError:
        """The exception for an HTTP status other than 200."""
        status = error.status_code
        body = error.body if isinstance(error.body, dict) else {}
        detail = body.get("error") if isinstance(body.get("error"), dict) else body
        message = detail.get("message") or detail.get("detail") or error.response.text[:200]
        message = self.redact(" ".join(str(message).split()))[:200]
        quota_spent = "insufficient_quota" in (detail.get("code"), detail.get("type"))
        if not quota_spent and (status in (408, 409, 425, 429) or status >= 500):
            retry_after = retry_after_seconds(error.response.headers.get("retry-after"))
            return RetryableError(f"HTTP {status}", retry_after, free=True)
        section = f"teachers.{self.name}.api"
        reason = {
            401: f"{section}.key: the endpoint does not accept the key",
            403: f"{section}.key: the key may not do this",
            404: f"{section}.model: the endpoint has no `{self.spec.model}` (or base_url is wrong)",
        }.get(status, section)
        return UserError(f"params.yaml: {reason}: HTTP {status} from {self.base_url}: {message}")

    def _send_openai(self, question: Question) -> Answer:
        settings, spec = question.model_identity, self.spec
        # OpenAI's newer models accept only the new name of this argument, other endpoints often only the old one
        extra: dict[str, Any] = {("max_tokens" if spec.base_url else "max_completion_tokens"): settings["max_tokens"]}
        if settings["temperature"] is not None:
            extra["temperature"] = settings["temperature"]
        if settings.get("logprobs"):
            extra |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if settings.get("schema"):
            schema = {"name": "answer", "strict": True, "schema": settings["schema"]}
            extra["response_format"] = {"type": "json_schema", "json_schema": schema}
        response = self.client.chat.completions.create(model=spec.model, messages=question.prompt, **extra)
        try:  # the package does not validate responses
            choice = response.choices[0]
            metadata: dict[str, Any] = {"finish": choice.finish_reason, "model": response.model}
            if response.usage:
                metadata["usage"] = [response.usage.prompt_tokens, response.usage.completion_tokens]
            if settings.get("logprobs"):
                alternatives = choice.logprobs.content[0].top_logprobs
                metadata["logprobs"] = [[token.token, token.logprob] for token in alternatives]
            return Answer((choice.message.content or "").strip(), metadata)
        except (AttributeError, LookupError, TypeError):
            raise RetryableError(UNREADABLE) from None

    def _send_anthropic(self, question: Question) -> Answer:
        settings = question.model_identity
        system = [turn["content"] for turn in question.prompt if turn["role"] == "system"]
        extra: dict[str, Any] = {"system": "\n\n".join(system)} if system else {}
        if settings["temperature"] is not None:  # the package has no argument for it: newer models take no temperature
            extra["extra_body"] = {"temperature": settings["temperature"]}
        if settings.get("schema"):
            extra["output_config"] = {"format": {"type": "json_schema", "schema": settings["schema"]}}
        turns = [turn for turn in question.prompt if turn["role"] != "system"]
        response = self.client.messages.create(
            model=self.spec.model, messages=turns, max_tokens=settings["max_tokens"], **extra
        )
        try:
            text = "".join(block.text for block in response.content if block.type == "text")
            metadata = {"finish": response.stop_reason, "model": response.model}
            metadata["usage"] = [response.usage.input_tokens, response.usage.output_tokens]
            return Answer(text.strip(), metadata)
        except (AttributeError, LookupError, TypeError):
            raise RetryableError(UNREADABLE) from None


def retry_after_seconds(header: str | None) -> float | None:
    """Seconds that a Retry-After header requests (RFC 9110, 10.2.3: a number, or a date); None without one."""
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
