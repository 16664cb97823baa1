"""Scores of written answers: exact match and token overlap."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence


def normalize_answer(answer: str) -> str:
    """An answer in lower case without punctuation, articles and superfluous white space (SQuAD, Rajpurkar 2016)."""
    answer = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def exact_match(prediction: str | None, aliases: Sequence[str]) -> float:
    """1.0 if the normalized `prediction` is one of the accepted answers, else 0.0; None (no answer) is wrong.

    Raises ValueError when there is no accepted answer.
    """
    if not aliases:
        raise ValueError("an answer needs at least one alias to be compared with")
    return float(
        prediction is not None and normalize_answer(prediction) in {normalize_answer(alias) for alias in aliases}
    )


def token_f1(prediction: str | None, aliases: Sequence[str]) -> float:
    """Best F1, in [0, 1], of the words that `prediction` shares with an accepted answer, both :func:`normalize_answer`.

    Words are counted as often as they occur. Where either side has no words left, 1.0 if neither has, else 0.0; None
    is wrong. Raises ValueError when there is no accepted answer.
    """
    if not aliases:
        raise ValueError("an answer needs at least one alias to be compared with")
    if prediction is None:
        return 0.0
    said, best = normalize_answer(prediction).split(), 0.0
    for alias in aliases:
        meant = normalize_answer(alias).split()
        shared = sum((Counter(said) & Counter(meant)).values())
        best = max(best, 2 * shared / (len(said) + len(meant)) if said and meant else float(said == meant))
    return best


def token_overlap(prediction: str | None, aliases: Sequence[str]) -> tuple[float, float, float]:
    """F1, precision and recall, each in [0, 1], of the words shared with the accepted answer of the best F1.

    As :func:`token_f1`; precision is the share of the prediction's words, recall that of the accepted answer's. Of
    answers of the same F1 the one with the higher recall counts. Raises ValueError when there is no accepted answer.
    """
    if not aliases:
        raise ValueError("an answer needs at least one alias to be compared with")
    if prediction is None:
        return 0.0, 0.0, 0.0
    said, best = normalize_answer(prediction).split(), (0.0, 0.0, 0.0)
    for alias in aliases:
        meant = normalize_answer(alias).split()
        shared = sum((Counter(said) & Counter(meant)).values())
        if said and meant:
            found = 2 * shared / (len(said) + len(meant)), shared / len(said), shared / len(meant)
        else:
            found = (float(said == meant),) * 3
        best = max(best, found, key=lambda scores: (scores[0], scores[2]))
    return best
