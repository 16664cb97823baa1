"""From the text of an answer to a label, or to none when there is any doubt."""

from __future__ import annotations

import json
import re

from distillery.label_sets import NO_LABELS, join_labels
from distillery.tasks.schema import Task

# quotes, brackets, emphasis and a full stop are not part of a label
SURROUNDING_CHARACTERS = " \t\r\n\"'`*_.,:;!()[]{}<>“”‘’«»"
LABEL_END = re.compile(r"[.:](?=\s|$)| [-–—] |\n")  # between a label and its explanation
# how a model names the two parts of an answer that the prompt requests, such as "Class: …" and "**Reason:** …"
LABEL_FIELD = re.compile(r"[\s*_#]*(?:class|classification|label|category)[*_]*\s*:[\s*_]*(?=\S)", re.IGNORECASE)
REASON_FIELD = re.compile(r"[\s*_#]*(?:reason|justification|explanation)[*_]*\s*:[\s*_]*", re.IGNORECASE)
LABEL_DIVIDER = re.compile(r"[,;|\n]")  # between the labels of a set
NO_LABEL_WORDS = ("none", "no label", "no labels", "none of them", "none of these")
# The tags between which open reasoning models write their reasoning. Many chat templates put the first tag into the
# prompt, so an answer may hold the last one alone.
REASONING_TAGS = "think|thinking|thought|reasoning"
REASONING_END = re.compile(rf"</(?:{REASONING_TAGS})>|\[/THINK\]", re.IGNORECASE)
REASONING_START = re.compile(rf"\s*(?:<(?:{REASONING_TAGS})>|\[THINK\])", re.IGNORECASE)
FENCED_BLOCK = re.compile(r"```\w*\s*(.*?)\s*(?:```|\Z)", re.DOTALL)


def without_reasoning(text: str) -> str:
    """The answer after the reasoning `<think>…</think>`; all of `text` when it holds none.

    Empty when the reasoning does not end: its author was cut off before the answer.
    """
    ends = list(REASONING_END.finditer(text))
    answer = text[ends[-1].end() :] if ends else text
    return "" if REASONING_START.match(answer) else answer.strip()


def parse_explained_label(task: Task, text: str) -> tuple[str | None, str]:
    """The label that the answer `text` gives, or None when there is any doubt; and the explanation after it.

    A label's word must come first, in any case, alone on its line or followed by a full stop, a colon or a dash. The
    last words of the prompt's template ("Sentiment:"), "Class:" or the like may stand before it, and reasoning between
    tags; "Reason:" or the like is no part of the explanation. There is doubt when another line holds another label.
    """
    text = _after(LABEL_FIELD, _after_cue(task, without_reasoning(text)))
    labels = {_trim(task.word(label)).casefold(): label for label in task.labels}
    end = LABEL_END.search(text)
    first, rest = (text[: end.start()], text[end.end() :]) if end else (text, "")
    label = labels.get(_trim(first).casefold())
    others = {labels.get(_trim(line).casefold(), label) for line in rest.splitlines()}
    return (label if others <= {label} else None), _after(REASON_FIELD, rest.strip())


def _after(field: re.Pattern[str], text: str) -> str:
    """`text` without the name of the `field` at its start, if it is there."""
    match = field.match(text)
    return text[match.end() :] if match else text


def parse_label(task: Task, text: str) -> str | None:
    """The label that the answer `text` gives, or None when there is any doubt.

    The answer may be JSON, a label or an object with one, and it may lie in a fenced block; else see
    :func:`parse_explained_label`.
    """
    text = without_reasoning(text)
    candidates = {parse_explained_label(task, _label_in_json(part))[0] for part in (text, *FENCED_BLOCK.findall(text))}
    candidates.discard(None)
    return candidates.pop() if len(candidates) == 1 else None


def parse_label_set(task: Task, text: str) -> str | None:
    """The label set that the answer `text` gives, or None when there is any doubt.

    The answer is a list in JSON, or an object with one, which may lie in a fenced block; or labels in one text with
    commas, semicolons, bars or line breaks between them. `none` and an empty list are no label. Reasoning between tags
    and the last words of the prompt's template may stand before it. There is doubt where any part is no label.
    """
    text = without_reasoning(text)
    sets = {_label_set(task, part) for part in (text, *FENCED_BLOCK.findall(text))} - {None}
    return sets.pop() if len(sets) == 1 else None


def _label_set(task: Task, text: str) -> str | None:
    """See :func:`parse_label_set`; `text` without reasoning."""
    parts = _parts_of_set(task, text)
    words = {_trim(task.word(label)).casefold(): label for label in task.labels}
    labels = [words.get(_trim(part.removeprefix("- ")).casefold()) for part in parts or []]
    if parts is None or (labels and None in labels):
        is_empty = parts is not None and len(parts) == 1 and _trim(parts[0]).casefold() in NO_LABEL_WORDS
        return NO_LABELS if is_empty else None
    return join_labels([label for label in labels if label], task.names)


def _parts_of_set(task: Task, text: str) -> list[str] | None:
    """The texts in `text` that should be labels; None where it holds something else, or nothing at all."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        text = _after_cue(task, text).strip()
        return [part for part in LABEL_DIVIDER.split(text) if part.strip()] or None
    if isinstance(content, dict):
        named = [value for key, value in content.items() if key.casefold() in ("labels", "label")]
        named = named or list(content.values())
        content = named[0] if len(named) == 1 else None
    if isinstance(content, str):
        return [part for part in LABEL_DIVIDER.split(content) if part.strip()] or None
    return content if isinstance(content, list) and all(isinstance(part, str) for part in content) else None


def _after_cue(task: Task, text: str) -> str:
    """`text` without the last words of the prompt's template at its start, if they are there."""
    cue = _trim(task.prompt.template.splitlines()[-1].rpartition("}")[2])
    start = text.lstrip(SURROUNDING_CHARACTERS)
    if cue and start.casefold().startswith(cue.casefold()):
        return start[len(cue) :].lstrip(SURROUNDING_CHARACTERS + "-–—")
    return text


def _label_in_json(text: str) -> str:
    """The value of the key `label`, or the only value, of the JSON object `text`; `text` when it is no JSON object.

    Empty when the object has several values and no key `label`.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(content, dict):
        return text
    named = [value for key, value in content.items() if key.casefold() == "label"] or list(content.values())
    if len(named) != 1:
        return ""
    return named[0] if isinstance(named[0], str) else json.dumps(named[0])


def first_sentence(text: str) -> str:
    """`text` up to the first full stop that ends a sentence (a dot within a number does not)."""
    end = re.search(r"[.!?](?=\s|$)", text)
    return text[: end.end()] if end else text


def _trim(text: str) -> str:
    return text.strip(SURROUNDING_CHARACTERS)
