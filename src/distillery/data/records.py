"""The records of a source as read, and their values in plain words."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

MAX_TITLE_ROWS = 20  # rows above the header of a table that are left out


@dataclass(frozen=True)
class FileFormat:
    """How a file is written, where `params.yaml` names it; None: as the file shows it. Fields as in `SourceConfig`.

    names: columns that the header must have, where they are known; a lower row may hold them.
    """

    encoding: str | None = None
    delimiter: str | None = None
    quotes: str | None = None
    header: bool = True
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class RawRows:
    """The records of a source, unchanged, and the line or row of each."""

    name: str  # the source as the user wrote it
    unit: str  # "line" or "row"
    rows: list[dict[str, Any]]
    numbers: list[int]  # line or row of each record, from 1
    blank: int = 0  # empty lines, which are skipped
    labels: list[str] | None = None  # the names of integer labels, where a hub data set has them
    splits: list[str] | None = None  # of each record, where the source brings its own
    places: list[str] | None = None  # file and line of each record, where they come from several files
    decisions: list[str] = field(default_factory=list)  # sentences on what reading decided without a key

    def at(self, i: int) -> str:
        """Where record `i` stands, for messages."""
        return self.places[i] if self.places else f"{self.name}, {self.unit} {self.numbers[i]}"

    def position(self, i: int) -> str:
        """Where record `i` stands, inside the one file of the source if it has one file."""
        return self.places[i] if self.places else f"{self.unit} {self.numbers[i]}"

    def take(self, index: Sequence[int]) -> RawRows:
        """The records at the positions `index`."""
        splits = None if self.splits is None else [self.splits[i] for i in index]
        places = None if self.places is None else [self.places[i] for i in index]
        rows, numbers = [self.rows[i] for i in index], [self.numbers[i] for i in index]
        return replace(self, rows=rows, numbers=numbers, splits=splits, places=places)


def header_place(rows: Iterable[Sequence[str | None]], names: Sequence[str]) -> int:
    """How many of the first rows stand above the one that holds all of `names`; 0 where none of the first does."""
    for place, cells in enumerate(islice(rows, MAX_TITLE_ROWS + 1)):
        if names and {*names} <= {(cell or "").strip() for cell in cells}:
            return place
    return 0


def normalize_text(text: str) -> str:
    """`text` in Unicode NFC, with every run of white space folded into one space and none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def without_punctuation(text: str) -> str:
    """`text` with letters, their marks and digits of all scripts; single spaces stand for everything else."""
    return normalize_text("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text))


def value_kind(value: Any) -> str:
    """The type of `value` in plain words, for messages."""
    names = {bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def parquet_values(values: list[Any]) -> list[Any]:
    """A column that Parquet can hold: one plain type, else every value as JSON text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {str} or kinds <= {bool} or kinds <= {float}:
        return values
    if kinds <= {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):
        return values
    return [None if v is None else json.dumps(v, ensure_ascii=False, sort_keys=True, default=str) for v in values]
