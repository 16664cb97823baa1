"""From the answer of a language model to the one text that was requested, or to the reason why it cannot be used."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from distillery.data.near_duplicates import find_near_duplicates, has_near_duplicate
from distillery.tasks.parsing import without_reasoning
from distillery.tasks.schema import Task

MARKS = {"**": "**", "__": "__", '"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "«": "»", "„": "“"}
CUE_WORDS = ("text", "answer", "output", "example", "sentence", "headline", "post", "tweet", "message", "title")
LABEL_CUES = ("label", "explanation", "reason", "note", "topic")
# "Sure! Here is a new sentence about dividends:", in front of the text
PREAMBLE = re.compile(r"(?:sure|certainly|of course|okay|ok)\b[^:]{0,80}:\s+|here(?:'s| is| are)\b[^:]{0,80}:\s+", re.I)
REFUSAL = re.compile(r"(?:i'm|i am) sorry\b|as an ai\b|i can(?:no|')t\b", re.IGNORECASE)
FIRST_OF_LIST = re.compile(r"1[.)]\s+")
SECOND_OF_LIST = re.compile(r"\s+2[.)]\s.*")
WORD_END = re.compile(r"[\w.,;:!?%)\]]$")
BULLET = re.compile(r"[-*•–]\s+")


def clean_text(task: Task, answer: str) -> str:
    """The first text in the model's `answer`, as one line, without what models put around one.

    That is: reasoning between tags, the number or bullet of a list and its further items, a sentence before the text
    ("Here is ..."), a cue ("Sentence:", the words of a label), quotes and emphasis around it, and the label or an
    explanation behind it. A cleaned text is cleaned to itself.
    """
    text = " ".join(without_reasoning(answer).split())
    cues = _cues(task)
    while (shorter := " ".join(_peel(text, *cues).split())) != text:
        text = shorter
    return text


def _cues(task: Task) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What may stand before a text of `task`, and what may stand behind it."""
    before_text, _, after_text = task.prompt.template.rpartition("{text}")
    own_before, own_behind = (
        [re.escape(cue)] if (cue := part.strip(" :\n")) and "{" not in cue else []
        for part in (before_text.rpartition("\n")[2], after_text)
    )
    words = "|".join(re.escape(word) for word in task.words)
    names, ends = "|".join([*own_before, *CUE_WORDS]), "|".join([*own_behind, *LABEL_CUES])
    before = rf"(?:(?:new|the)\s+)?(?:{names})(?:\s+\d+)?\s*:\s*|(?:{words})\s*:\s+|[(\[](?:{words})[)\]]\s*:?\s+"
    behind = rf"\s+[*_(\[]*(?:{ends})\s*:.*|\s*[(\[](?:{words})[)\]]$"
    return re.compile(before, re.IGNORECASE), re.compile(behind, re.IGNORECASE)


def _peel(text: str, before: re.Pattern[str], behind: re.Pattern[str]) -> str:
    """`text` with one layer less of what is around it."""
    opening = text[:2] if text[:2] in MARKS else text[:1]
    if _is_around(text, opening):
        return text[len(opening) : -len(opening)]
    if len(opening) == 2 and opening in MARKS:  # emphasis of a cue
        return text[2:].replace(opening, "", 1)
    if opening in MARKS and opening != "'" and MARKS[opening] not in text[1:]:  # its other end was cut off
        return text[1:]
    if match := FIRST_OF_LIST.match(text):
        return SECOND_OF_LIST.sub("", text[match.end() :])
    for pattern in (BULLET, PREAMBLE, before):
        if match := pattern.match(text):
            return text[match.end() :]
    end = behind.search(text)
    return text[: end.start()] if end else text


def _is_around(text: str, opening: str) -> bool:
    """Whether the mark `opening` and the one that closes it stand around all of `text`."""
    closing, width = MARKS.get(opening), len(opening)
    if closing is None or len(text) < 2 * width or not text.endswith(closing):
        return False
    inner = text[width:-width]
    for i in range(len(inner)):
        between_letters = inner[:i][-1:].isalnum() and inner[i + width :][:1].isalnum()
        if inner[i : i + width] in (opening, closing) and not between_letters:  # an apostrophe is no quote
            # the first mark inside must open another pair, else it closes the one at the start
            return inner.startswith(opening, i) if opening != closing else not WORD_END.search(inner[:i])
    return True


def rejection_reason(text: str, min_words: int, max_words: int) -> str:
    """Why the cleaned `text` cannot be used, or an empty text."""
    words = len(text.split())
    if not words:
        return "empty"
    if REFUSAL.match(text):
        return "refused"
    if words < min_words:
        return "too short"
    return "too long" if words > max_words else ""


def repeat_reasons(texts: Sequence[str], examples: Sequence[str], threshold: float) -> list[str]:
    """For each of `texts` why it is one too many, or an empty text.

    A near-duplicate of one of `examples` goes, and one of an earlier text that stays: similarity at or above
    `threshold`, with digits masked or as written.
    """
    if not texts:
        return []
    reasons = ["repeats an example" if near else "" for near in has_near_duplicate(texts, examples, threshold)]
    near = find_near_duplicates(texts, threshold)
    earlier: dict[int, list[int]] = {}
    for i, j, _ in near.pairs.values():
        for a, b in zip(i.tolist(), j.tolist(), strict=True):
            earlier.setdefault(b, []).append(a)
    for b in sorted(earlier):
        if not reasons[b] and any(not reasons[a] for a in earlier[b]):
            reasons[b] = "repeats another text"
    return reasons


def label_reasons(
    probabilities: np.ndarray, labels: Sequence[str], names: Sequence[str], min_confidence: float
) -> list[str]:
    """For each text why the model's own label for it does not confirm the one that was wanted, or an empty text.

    probabilities: [n, labels], in the order of `names`; NaN where no label could be read. labels: [n], those wanted.
    """
    reasons = []
    for row, label in zip(probabilities, labels, strict=True):
        if np.isnan(row).any():
            reasons.append("no label read")
        elif names[int(row.argmax())] != label:
            reasons.append("another label")
        else:
            reasons.append("low confidence" if row.max() < min_confidence else "")
    return reasons
