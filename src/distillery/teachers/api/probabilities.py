"""Probabilities of the labels from the log-probabilities of an answer's tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from distillery.tasks.parsing import SURROUNDING_CHARACTERS
from distillery.tasks.schema import Task

MIN_LABEL_MASS = 0.5  # total probability that the labels must have
# White space as tokenizers store it: some servers send the stored form of a token instead of its text.
STORED_WHITE_SPACE = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t"})

Alternatives = Sequence[tuple[str, float]]  # tokens and their log-probabilities


def label_probabilities(
    steps: Sequence[tuple[str | None, Alternatives]], task: Task, finish: str | None = None
) -> np.ndarray:
    """Label probabilities [labels] from the `steps` of an answer; NaN when the labels have less than half of the mass.

    steps: each token of the answer (None: unknown) with its alternatives, itself among them. finish: why the answer
    ended; `length` when it was cut off.

    A token counts, times the probability of those before it, for the label that it completes, or for the one label that
    begins with it. Along the answer itself the next tokens decide: whether `1` stays 1 or becomes 10, and which of two
    labels with the same first token it is. A token that fits no label, or may still become several, counts for none.
    """
    words = [_normalize(word).rstrip(SURROUNDING_CHARACTERS) for word in task.words]
    mass, path, before = np.zeros(len(words)), "", 1.0
    for position, (token, alternatives) in enumerate(steps):
        chosen = None if token is None else _normalize(path + token)
        is_end = position + 1 == len(steps)
        followed = chosen is not None and _is_open(chosen, words) and not (is_end and _may_end(chosen, words, finish))
        following = 0.0
        for other, logprob in alternatives:
            text, probability = _normalize(path + other), before * math.exp(logprob)
            if followed and text == chosen:
                following += probability
            elif (index := _find_label(text, words)) is not None:
                mass[index] += probability
        if not followed:
            break
        path, before = path + str(token), following
    total = mass.sum()
    return mass / total if total >= MIN_LABEL_MASS else np.full(len(words), math.nan)


def _normalize(text: str) -> str:
    return text.translate(STORED_WHITE_SPACE).lstrip(SURROUNDING_CHARACTERS).casefold()


def _is_open(text: str, words: Sequence[str]) -> bool:
    """Whether `text` may still become one of `words`."""
    return any(word.startswith(text) and word != text for word in words)


def _may_end(text: str, words: Sequence[str], finish: str | None) -> bool:
    """Whether an answer that ends with `text` gives a label: it was not cut off, or only one label is possible."""
    return finish != "length" or sum(word.startswith(text) for word in words) == 1


def _find_label(text: str, words: Sequence[str]) -> int | None:
    """The index of the word that `text` is, that alone begins with it, or with which it begins as a whole word.

    The first of these three that holds counts; the longest word of the third. None when no word fits.
    """
    begun = [i for i, word in enumerate(words) if text and word.startswith(text)]
    if begun:
        exact = [i for i in begun if words[i] == text]
        return (exact or begun)[0] if exact or len(begun) == 1 else None
    rests = {i: text[len(word) :] for i, word in enumerate(words) if word and text.startswith(word)}
    whole = [i for i, rest in rests.items() if not rest.lstrip(" ")[:1].isalnum()]  # no further word on the line
    return max(whole, key=lambda i: len(words[i])) if whole else None
