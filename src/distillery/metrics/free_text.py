"""Scores of free-text answers: exact match and token overlap."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence


def normalize_answer(answer: str) -> str:
    """`answer` in lower case without punctuation, articles and repeated white space (SQuAD, Rajpurkar et al. 2016)."""
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


def token_overlap(prediction: str | None, aliases: Sequence[str]) -> tuple[float, float, float]:
    """F1, precision and recall, each in [0, 1], of the words shared with the accepted answer of the highest F1.

    Both texts are normalized (:func:`normalize_answer`); a word counts as often as it occurs. Precision is the share of
    the words of the prediction, recall that of the accepted answer. Of several answers with the same F1 the one with
    the highest recall counts. Where either text has no words left, all are 1.0 if neither has, else 0.0; None is wrong.
    Raises ValueError when there is no accepted answer.
    """
    if not aliases:
        raise ValueError("an answer needs at least one alias to be compared with")
    if prediction is None:
        return 0.0, 0.0, 0.0
    predicted, best = normalize_answer(prediction).split(), (0.0, 0.0, 0.0)
    for alias in aliases:
        accepted = normalize_answer(alias).split()
        shared = sum((Counter(predicted) & Counter(accepted)).values())
        if predicted and accepted:
            scores = 2 * shared / (len(predicted) + len(accepted)), shared / len(predicted), shared / len(accepted)
        else:
            scores = (float(predicted == accepted),) * 3
        best = max(best, scores, key=lambda scores: (scores[0], scores[2]))
    return best
