"""From the text of an answer to a label, or to none when there is any doubt."""

from __future__ import annotations

import re

from distillery.tasks.schema import Task

# quotes, brackets, emphasis and a full stop are not part of a label
SURROUNDING_CHARACTERS = " \t\r\n\"'`*_.,:;!()[]{}<>“”‘’«»"
LABEL_END = re.compile(r"[.:](?=\s|$)| [-–—] |\n")  # between a label and its explanation


def parse_explained_label(task: Task, text: str) -> tuple[str | None, str]:
    """The label that the answer `text` gives, or None when there is any doubt; and the explanation after it.

    A label's word must come first, in any case, alone on its line or followed by a full stop, a colon or a dash. The
    last words of the prompt's template ("Sentiment:") may stand before it. There is doubt when another line holds
    another label.
    """
    text = text.strip()
    cue = _trim(task.prompt.template.splitlines()[-1].rpartition("}")[2])
    start = text.lstrip(SURROUNDING_CHARACTERS)
    if cue and start.casefold().startswith(cue.casefold()):
        text = start[len(cue) :].lstrip(SURROUNDING_CHARACTERS + "-–—")
    labels = {_trim(task.word(label)).casefold(): label for label in task.labels}
    end = LABEL_END.search(text)
    first, rest = (text[: end.start()], text[end.end() :]) if end else (text, "")
    label = labels.get(_trim(first).casefold())
    others = {labels.get(_trim(line).casefold(), label) for line in rest.splitlines()}
    return (label if others <= {label} else None), rest.strip()


def parse_label(task: Task, text: str) -> str | None:
    """The label that the answer `text` gives, or None when there is any doubt. See :func:`parse_explained_label`."""
    return parse_explained_label(task, text)[0]


def first_sentence(text: str) -> str:
    """`text` up to the first full stop that ends a sentence (a dot within a number does not)."""
    end = re.search(r"[.!?](?=\s|$)", text)
    return text[: end.end()] if end else text


def _trim(text: str) -> str:
    return text.strip(SURROUNDING_CHARACTERS)
