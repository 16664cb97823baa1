"""From the text of an answer to a label; in doubt to none."""

from __future__ import annotations

import re

from distillery.tasks.schema import Task

SURROUNDING_CHARACTERS = (
    " \t\r\n\"'`*_.,:;!()[]{}<>“”‘’«»"  # quotes, brackets, emphasis and a full stop are no part of a label
)


LABEL_END = re.compile(r"[.:](?=\s|$)| [-–—] |\n")  # what may stand between a label and what follows it


def parse_explained_label(task: Task, text: str) -> tuple[str | None, str]:
    """The label that `text` gives as its answer, and what it says after it. The label is None when there is any doubt.

    A label's word must come first, whatever its case, alone on its line or with a full stop, a colon or a dash after
    it; the name that the template gives the answer ("Sentiment: positive") may stand before it. An answer that gives
    another label on a line of its own takes the first one back.
    """
    text = text.strip()
    asked = task.prompt.template.splitlines()[-1].rpartition("}")[2].strip(SURROUNDING_CHARACTERS)
    if asked and text.lstrip(SURROUNDING_CHARACTERS).casefold().startswith(asked.casefold()):
        text = text.lstrip(SURROUNDING_CHARACTERS)[len(asked) :].lstrip(SURROUNDING_CHARACTERS + "-–—")
    words = {task.word(label).strip(SURROUNDING_CHARACTERS).casefold(): label for label in task.labels}
    end = LABEL_END.search(text)
    first, rest = (text[: end.start()], text[end.end() :]) if end else (text, "")
    label = words.get(first.strip(SURROUNDING_CHARACTERS).casefold())
    others = {words.get(line.strip(SURROUNDING_CHARACTERS).casefold(), label) for line in rest.splitlines()}
    return (label if others <= {label} else None), rest.strip()


def parse_label(task: Task, text: str) -> str | None:
    """The label that `text` gives as its answer, or None: nothing is guessed. See :func:`parse_explained_label`."""
    return parse_explained_label(task, text)[0]


def first_sentence(text: str) -> str:
    """`text` up to the first full stop that ends a sentence (a dot within a number does not)."""
    found = re.search(r"[.!?](?=\s|$)", text)
    return text[: found.end()] if found else text
