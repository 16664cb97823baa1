"""The records of a source as read, and their values in plain words."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RawRows:
    """The records of a source, unchanged, and the line or row of each."""

    name: str  # the source as the user wrote it
    unit: str  # "line" or "row"
    rows: list[dict[str, Any]]
    numbers: list[int]  # line or row of each record, from 1
    blank: int = 0  # empty lines, which are skipped
    labels: list[str] | None = None  # the names of integer labels, where a hub data set has them
    splits: list[str] | None = None  # of each record, where the splits of a hub data set are used

    def at(self, i: int) -> str:
        """Where record `i` stands, for messages."""
        return f"{self.name}, {self.unit} {self.numbers[i]}"


def normalize_text(text: str) -> str:
    """`text` in Unicode NFC, with every run of white space folded into one space and none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def value_kind(value: Any) -> str:
    """The type of `value` in plain words, for messages."""
    names = {bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
