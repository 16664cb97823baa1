"""Labels, names and answers as files have them: numbers, booleans, lists of one label, names in another case."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distillery.data.records import normalize_text
from distillery.errors import UserError
from distillery.tasks.schema import ANSWER_SEPARATOR

MAX_PROPOSED_VALUES = 12  # unknown values that a message lists; a column with more of them holds no labels
PLAIN_WORD = re.compile(r"[^\W\d_][\w ./+-]*")  # needs no quotes as a key in YAML, unless it is one of these:
YAML_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def value_text(value: Any) -> str | None:
    """A value of the label column as text; None where it is empty.

    Whole numbers lose their decimals (1.0 is 1), true and false are in small letters, and a list of one value is that
    value. Raises TypeError for a list of several values and for an object.
    """
    if isinstance(value, list) and len(value) < 2:
        value = value[0] if value else None
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return normalize_text(value) or None
    if isinstance(value, int | float):
        return whole_number_text(str(value))
    raise TypeError


def whole_number_text(text: str) -> str:
    """`text` without decimals that are all 0 (`1.0` is `1`); other texts unchanged."""
    return re.sub(r"^([+-]?\d+)\.0*$", r"\1", text)


class LabelReader:
    """Finds the label of the task that a value of the file stands for.

    names: the labels of the task. values: `columns.values`, which comes before the names. A value that is none of them
    is compared once more without regard to case, and is read if exactly one label is left.
    """

    def __init__(self, names: Sequence[str], values: Mapping[Any, str] | None = None):
        texts = {normalize_text(name): name for name in names}
        texts |= {value_text(value) or "": label for value, label in (values or {}).items()}
        self.labels = texts
        self.labels_by_folded_text: dict[str, set[str]] = {}
        for text, label in texts.items():
            self.labels_by_folded_text.setdefault(text.casefold(), set()).add(label)
        self.counts: Counter[tuple[str, str]] = Counter()  # rows by value and label, where the two differ

    def find(self, value: Any) -> str | None:
        """The label that `value` stands for, or None. Raises TypeError as :func:`value_text`."""
        text = value_text(value)
        if text is None:
            return None
        for candidate in (text, whole_number_text(text)):
            if candidate in self.labels:
                return self.labels[candidate]
        labels = self.labels_by_folded_text.get(text.casefold(), set())
        return next(iter(labels)) if len(labels) == 1 else None

    def read(self, value: Any) -> str | None:
        """As :meth:`find`, and counts the row where the value is not the label itself."""
        label = self.find(value)
        if label is not None and (text := value_text(value)) != normalize_text(label):
            self.counts[text or "", label] += 1
        return label

    def mapped_values(self) -> list[dict[str, Any]]:
        """The values that were read as a label with another text: value, label, rows; in the order of the file."""
        return [{"value": value, "label": label, "rows": n} for (value, label), n in self.counts.items()]

    def decisions(self) -> list[str]:
        """:meth:`mapped_values` as sentences."""
        return [
            f"The label `{value}` of the file is read as `{label}` ({n} rows)."
            for (value, label), n in self.counts.items()
        ]

    def proposal(self, values: Iterable[Any]) -> str:
        """The end of a message on an unknown label: the yaml that names the unknown ones among `values`.

        values: the whole column.
        """
        unknown: dict[str, None] = {}
        for value in values:
            try:
                if self.find(value) is None and (text := value_text(value)):
                    unknown.setdefault(whole_number_text(text))
            except TypeError:
                continue
        if not unknown:
            return ""
        if len(unknown) > MAX_PROPOSED_VALUES:
            return f" (the column holds {len(unknown)} values that are no label: is it the right one?)"
        section = ", ".join(f"{key}: …" for key in yaml_keys(list(unknown)))
        return f". To name the label that each value stands for, write columns: {{values: {{{section}}}}}"

    def keep_proposal(self, column: str) -> str:
        """The end of a message on an empty label: the yaml that leaves such rows out."""
        names = list(dict.fromkeys(self.labels.values()))
        shown = ", ".join([*names[:MAX_PROPOSED_VALUES], *(["…"] if len(names) > MAX_PROPOSED_VALUES else [])])
        return f"; to leave such rows out, write filter: {{keep: {{{column}: [{shown}]}}}}"


def yaml_keys(texts: Sequence[str]) -> list[str]:
    """`texts` as keys of one YAML section: numbers in their order, and in quotes where some are numbers or YAML's own.

    DVC cannot sort a section whose keys are partly numbers and partly text.
    """
    if all(re.fullmatch(r"-?\d+(\.\d+)?", text) for text in texts):
        return sorted(texts, key=float)
    if all(PLAIN_WORD.fullmatch(text) and text.casefold() not in YAML_WORDS for text in texts):
        return list(texts)
    return [json.dumps(text, ensure_ascii=False) for text in texts]


def name_text(value: Any) -> str | None:
    """An id, group or answer as text: a whole number becomes its digits, an empty text None. TypeError for others."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise TypeError
    name = value_text(value)
    if isinstance(value, float) and not (name is None or value.is_integer()):
        raise TypeError
    return name


def join_answers(at: str, column: str, value: Any) -> str:
    """The accepted answers in one text, each once. `value`: a text, a list, or a dict of `value` and `aliases`."""
    if isinstance(value, dict):
        value = [value.get("value"), *(value.get("aliases") or [])]
    value = [value] if isinstance(value, str | int) else value
    try:
        answers = [name_text(answer) for answer in value or []]
    except TypeError:
        answers = []
    if not answers or None in answers:
        raise UserError(f"{at}: `{column}` must be an answer or a list of accepted answers, not {value!r:.60}")
    return ANSWER_SEPARATOR.join(dict.fromkeys(answer.replace(ANSWER_SEPARATOR, " / ") for answer in answers))
