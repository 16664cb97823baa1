"""Label sets as files have them: lists, lists in text, and labels in one text with a separator between them."""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import pandas as pd

from distillery.data.labels import LabelReader, value_text
from distillery.data.records import value_kind
from distillery.errors import UserError
from distillery.label_sets import NO_LABELS, LabelSets, join_labels, membership, rows_with

SEPARATORS = (";", "|", ",", "\n", "\t", " ")  # tried in this order
MAX_SHOWN_SETS = 20  # label sets that the audit counts one by one


class LabelSetReader:
    """Finds the label set of each row.

    labels: finds single labels. separator: between the labels of a text; None: the one that fits the `column`, all
    values of which it has to divide into labels.
    """

    def __init__(self, labels: LabelReader, names: Sequence[str], column: Iterable[Any], separator: str | None = None):
        self.labels, self.names = labels, names
        self.column = list(column)
        texts = (value for value in self.column if isinstance(value, str) and not _is_list(value))
        self.texts = list(dict.fromkeys(texts))
        self.separator = separator or self._find_separator()
        self.is_given, self.empty = separator is not None, 0  # empty: rows whose cell is empty

    def read(self, at: str, column: str, value: Any) -> str | None:
        """The label set in `value` as one text; None where it is empty. at: the row, for messages.

        Raises UserError for an unknown label, a label that stands there twice, and a value that holds no labels.
        """
        elements = self._elements(value)
        if elements is None:
            return None
        labels: list[str] = []
        for element in elements:
            label = self._read_element(at, column, element)
            if label in labels:
                raise UserError(f"{at}: `{column}` holds the label `{label}` twice; each label once")
            labels.append(label)
        return join_labels(labels, self.names)

    def _read_element(self, at: str, column: str, element: Any) -> str:
        allowed = ", ".join(self.names)
        try:
            label, text = self.labels.read(element), value_text(element)
        except TypeError:
            label, text = None, None
        if isinstance(element, list | dict) or text is None:
            problem = f"`{column}` must hold labels, not {value_kind(element)} ({element!r:.60})"
            raise UserError(f"{at}: {problem}; allowed: {allowed}")
        if label is None:
            hint = "" if self.separator else self._separator_hint(text)
            hint = hint or self.labels.proposal(chain(*(self._elements(value) or [] for value in self.column)))
            raise UserError(f"{at}: unknown label {text!r:.60}; allowed: {allowed}{hint}")
        return label

    @staticmethod
    def _separator_hint(text: str) -> str:
        """The end of a message on a text that may be several labels."""
        signs = [sign for sign in ("/", "+", "&", ":") if sign in text]
        return f'. If it is several labels, write columns: {{label_separator: "{signs[0]}"}}' if signs else ""

    def _elements(self, value: Any) -> list[Any] | None:
        """The labels in `value`, each as the file has it; None where it is empty."""
        if isinstance(value, list | tuple):
            return list(value)
        if not isinstance(value, str):
            return None if value is None or value != value else [value]
        if _is_list(value):
            elements = parse_list(value)
            return [value] if isinstance(elements, str) else elements
        text = value.strip()
        if not text or text == NO_LABELS:
            return [] if text else None
        return [text] if self.separator is None else self._divide(text, self.separator)

    @staticmethod
    def _divide(text: str, separator: str) -> list[str]:
        return [part.strip() for part in text.split(separator) if part.strip()]

    def _find_separator(self) -> str | None:
        """The first separator that divides all texts into labels, else the one with most of them; None if none occurs.

        A text that is a label as a whole needs no separator.
        """
        texts = [text for text in self.texts if text.strip() != NO_LABELS and self.labels.find(text) is None]
        shares = {}
        for separator in [sign for sign in SEPARATORS if any(sign in text.strip() for text in texts)]:
            parts = [part for text in texts for part in self._divide(text, separator)]
            shares[separator] = sum(self.labels.find(part) is not None for part in parts) / max(1, len(parts))
        best = max(shares, key=shares.__getitem__, default=None)
        return best if best is not None and shares[best] > 0 else None

    def decisions(self) -> list[str]:
        """Sentences on what was decided without a key."""
        sentences = []
        if self.separator and not self.is_given and any(self.separator in text for text in self.texts):
            sentences.append(f"The labels of a row are divided by {json.dumps(self.separator)}; see `label_separator`.")
        if self.empty:
            sentences.append(f"{self.empty} rows with nothing in the column of labels have no label.")
        return sentences


def _is_list(text: str) -> bool:
    return text.strip().startswith("[") and text.strip().endswith("]")


def parse_list(text: str) -> list[Any] | str:
    """The elements of a list as JSON or Python write it; `text` itself where it is none."""
    if not _is_list(text):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        return list(value) if isinstance(value, list | tuple) else text
    return text


def audit_label_sets(rows: pd.DataFrame, names: LabelSets) -> dict[str, Any]:
    """What `audit.json` holds about the label sets of `rows` (label): how many there are, and which labels meet.

    sets: rows of the commonest sets. without_label: rows of the empty set. labels_per_row: mean number.
    co_occurrence: label -> other label -> rows with both, without zeros.
    """
    labels = rows["label"].dropna()
    members = membership(labels, names)
    together = members.T.astype(int) @ members
    return {
        "distinct": int(labels.nunique()),
        "sets": dict(Counter(labels).most_common(MAX_SHOWN_SETS)),
        "without_label": int((labels == NO_LABELS).sum()),
        "labels_per_row": round(float(members.sum(1).mean()), 4) if len(labels) else 0.0,
        "co_occurrence": {
            name: {other: int(together[i, j]) for j, other in enumerate(names) if i != j and together[i, j]}
            for i, name in enumerate(names)
        },
    }


def label_counts(labels: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Rows of each label."""
    return {name: int(rows_with(labels, name, names).sum()) for name in names}
