"""What an endpoint's failures mean: one that may pass, a row that it refuses, or a request that is wrong."""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime
from typing import Any

LONGEST_WORDS = 200  # characters of a server's message that are shown

# What endpoints write when one row is the cause: its text breaks a rule of the vendor, or is too long for the model.
ROW_STATUSES = (400, 403, 413, 422)
REFUSED_ROW = re.compile(
    r"content[_ -]?(filter|policy|management|moderation)|responsible ?ai|data_inspection_failed|inappropriate content"
    r"|flagged|safety (system|reasons|policy)|usage polic"
    r"|context[_ ](length|size|window)|context.*overflow|maximum (context|model|input) length|max_model_len"
    r"|(prompt|input|request|message|text|entity)s?( is| are)? ?too[ _](long|large)|exceed_context_size"
    r"|input token count|longer than the (maximum|model)|must have less than \d+ tokens|tokens \+ .*max_new_tokens",
    re.IGNORECASE,
)
# What they write when the chat template of the model takes no system turn.
NO_SYSTEM_ROLE = re.compile(
    r"system[ _](role|message|prompt|turn)s? (is |are )?(not|un)[ -]?supported"
    r"|(not|n't) support (the |a )?['\"`]?system"
    r"|only user(,| and) (assistant|model)|roles must alternate|(developer|system) instruction is not enabled",
    re.IGNORECASE,
)


class RetryableError(Exception):
    """A failure that may pass.

    outcome: for the record. retry_after: seconds that the server requested. free: whether no tokens were used.
    """

    def __init__(self, outcome: str, retry_after: float | None = None, free: bool = False):
        super().__init__(outcome)
        self.outcome, self.retry_after, self.free = outcome, retry_after, free


def may_pass(status: int) -> bool:
    """Whether the same request may succeed later."""
    return status in (408, 409, 425, 429) or status >= 500


def error_message(body: Any) -> tuple[str, str]:
    """The server's own words in the `body` of an error, and its codes; either may be empty."""
    if not isinstance(body, dict):
        return str(body or ""), ""
    error = body.get("error") or body
    if not isinstance(error, dict):
        return str(error), ""
    words = next((str(error[key]) for key in ("message", "detail", "msg") if error.get(key)), "")
    codes = [str(error[key]) for key in ("code", "type") if isinstance(error.get(key), str)]
    return words, " ".join(codes)


def one_line(text: str) -> str:
    """`text` on one line, its end left out when it is long."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_WORDS else text[: LONGEST_WORDS - 1] + "…"


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
