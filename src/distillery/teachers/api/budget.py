"""Tokens and money of an endpoint: what was used, what calls in flight may use, and the ceilings on both."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from distillery.config.schema import ApiConfig
from distillery.errors import UserError
from distillery.teachers.cache import Question, canonical_json

TEMPLATE_TOKENS_PER_TURN, TEMPLATE_TOKENS_PER_CALL = 16, 64  # tokens that a chat template may add


def max_call_tokens(question: Question) -> tuple[int, int]:
    """The most (input, output) tokens that one call can use: no tokenizer gives more tokens than there are bytes."""
    schema = question.model_identity.get("schema")
    content = sum(len(turn["content"].encode()) + TEMPLATE_TOKENS_PER_TURN for turn in question.prompt)
    schema_bytes = len(canonical_json(schema)) if schema else 0
    return content + TEMPLATE_TOKENS_PER_CALL + schema_bytes, question.model_identity["max_tokens"]


class Budget:
    """The tokens that one endpoint has used, and its ceilings `max_total_tokens` and `max_cost`; safe across threads.

    name: the teacher's, for messages. used: (input, output) tokens of all earlier calls.
    """

    def __init__(self, name: str, spec: ApiConfig, used: Sequence[int]):
        self.name, self.spec = name, spec
        self.used, self.reserved = list(used), [0, 0]  # input and output tokens
        self._lock = threading.Lock()

    def cost(self, input_tokens: float, output_tokens: float) -> float | None:
        """US dollars, or None without a price."""
        price = self.spec.price
        return None if price is None else (input_tokens * price.input + output_tokens * price.output) / 1e6

    def reserve(self, tokens: tuple[int, int]) -> None:
        """Set aside the (input, output) tokens of a call. Raises UserError when that could pass a ceiling."""
        with self._lock:
            total = [self.used[i] + self.reserved[i] + tokens[i] for i in (0, 1)]
            self._check("max_total_tokens", sum(total), self.spec.max_total_tokens)
            self._check("max_cost", self.cost(*total), self.spec.max_cost)
            self.reserved = [self.reserved[i] + tokens[i] for i in (0, 1)]

    def _check(self, key: str, value: float | None, ceiling: float | None) -> None:
        if ceiling is None or value <= ceiling:
            return
        cost = self.cost(*self.used)
        dollars = "" if cost is None else f", ${cost:.4f}"
        raise UserError(
            f"params.yaml: teachers.{self.name}.api.{key}: the next call might pass {ceiling:g} (used so far: "
            f"{sum(self.used):,} tokens{dollars}); all answers so far are stored, raise it to continue"
        )

    def settle(self, reserved: tuple[int, int], used: tuple[int, int]) -> None:
        """Replace the tokens `reserved` for a call by those that it used."""
        with self._lock:
            for i in (0, 1):
                self.reserved[i] -= reserved[i]
                self.used[i] += used[i]
