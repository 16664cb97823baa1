"""What the columns of a data file are taken for: text, labels, splits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distillery.data.label_columns import mark
from distillery.data.label_sets import NO_LABELS, SEPARATORS, parse_list
from distillery.data.labels import value_text
from distillery.data.records import RawRows
from distillery.data.splits import SPLIT_NAMES
from distillery.errors import UserError

TEXT_NAMES = ("text", "sentence", "message", "review", "content", "body", "comment", "tweet", "utterance", "title")
LABEL_NAMES = ("label", "labels", "category", "class", "sentiment", "intent", "topic", "target", "tag", "rating", "y")
LABEL_NAMES += ("categories", "topics", "tags")
SPLIT_COLUMNS = ("split", "partition", "subset", "part", "set", "fold")
MAX_LABELS = 50
MIN_SHARED = 0.9  # of the labels in a text that is divided: this share of them stands in other texts of the column, too
MIN_LABEL_COLUMNS = 3  # so many columns of 1 and 0 are label sets, whatever other columns there are


@dataclass(frozen=True)
class LabelGuess:
    """Where the labels stand. labels: names and rows, the most frequent first."""

    columns: tuple[str, ...]  # one, or a column of 1 and 0 for each label
    labels: dict[str, int]
    is_multilabel: bool = False
    separator: str | None = None  # between the labels of a text
    n_labels: int = 0  # of all rows together
    n_without: int = 0  # rows without any label


@dataclass(frozen=True)
class Guess:
    """What a file is taken for. split_counts: of own splits."""

    text: str
    gold: LabelGuess
    split_column: str | None
    split_counts: dict[str, int]
    id_is_unique: bool
    has_groups: bool
    n_rows: int
    words: float  # of a row, mean


def guess_columns(raw: RawRows, text: str | None = None, label: Sequence[str] = ()) -> Guess:
    """Text, labels, splits and sizes of the rows of a file. text, label: columns that the user names.

    Raises UserError when a column is missing, or none looks like a text or a label.
    """
    names = dict.fromkeys(column for record in raw.rows for column in record)
    columns: dict[str, list[Any]] = {column: [record.get(column) for record in raw.rows] for column in names}
    for name in filter(None, (text, *label)):
        if name not in columns:
            raise UserError(f"{raw.name}: no column `{name}`; there are: {', '.join(f'`{c}`' for c in columns)}")
    split_column = next((c for c in columns if c.casefold() in SPLIT_COLUMNS and _is_split(columns[c])), None)
    text = text or _text_column(raw.name, {c: v for c, v in columns.items() if c not in (*label, split_column)})
    others = {c: v for c, v in columns.items() if c not in (text, split_column)}
    n_words = [len(value.split()) for value in columns[text] if isinstance(value, str)]
    splits = [SPLIT_NAMES[value.strip().casefold()] for value in columns.get(split_column or "", [])]
    ids = [value for value in columns.get("id", []) if value is not None]
    return Guess(
        text,
        _guess_labels(raw, others, label),
        split_column,
        dict(Counter(splits)),
        "id" not in columns or len(set(map(str, ids))) == len(raw.rows),
        "group" in columns,
        len(raw.rows),
        float(np.mean(n_words)) if n_words else 0.0,
    )


def _is_split(values: list[Any]) -> bool:
    """Whether a column names splits, the test split among them."""
    names = [SPLIT_NAMES.get(v.strip().casefold()) if isinstance(v, str) else None for v in values]
    return None not in names and {"train", "test"} <= set(names)


def _text_column(file: str, columns: dict[str, list[Any]]) -> str:
    """The column with a usual name, else the one with the longest texts, which are addresses only if no other is."""
    lengths, words = {}, {}
    for column, values in columns.items():
        filled = [value for value in values if value is not None and value != ""]
        if filled and all(isinstance(value, str) for value in filled):
            with_letters = [value for value in filled if re.search(r"[^\W\d_]", value)]  # dates and numbers are no text
            if len(with_letters) > len(filled) / 2:
                lengths[column] = float(np.mean([len(value) for value in filled]))
                words[column] = float(np.mean([len(value.split()) for value in filled]))
    texts = list(lengths)
    named = [c for name in TEXT_NAMES for c in texts if c.casefold() == name]
    if not texts:
        raise UserError(f"{file}: no column holds text; there are: {', '.join(f'`{c}`' for c in columns)}")
    return named[0] if named else max(texts, key=lambda c: (words[c] >= 2, lengths[c]))


def _guess_labels(raw: RawRows, columns: Mapping[str, list[Any]], named: Sequence[str]) -> LabelGuess:
    """Where the labels stand among `columns`. named: those that the user names."""
    if len(named) > 1:
        for column in named:
            if (bad := _first_unmarked(columns[column])) is not None:
                raise UserError(
                    f"{raw.at(bad)}: `{column}` must be 1 or 0, as it is one of several columns of labels, "
                    f"not {columns[column][bad]!r:.60}"
                )
        return _marked_labels({column: columns[column] for column in named})
    if named:
        return _label_sets(named[0], columns[named[0]]) or _single_labels(raw, named[0], columns[named[0]])
    sets = {column: guess for column, values in columns.items() if (guess := _label_sets(column, values))}
    single = {column: n for column, values in columns.items() if column not in sets and (n := _n_values(values))}
    marked = [column for column, values in columns.items() if column not in ("id", "group") and _is_marked(values)]
    n_labels = single | {column: len(guess.labels) for column, guess in sets.items()}
    usual = [column for name in LABEL_NAMES for column in n_labels if column.casefold() == name]
    if not usual and len(marked) >= (2 if {*n_labels} <= {*marked} else MIN_LABEL_COLUMNS):
        return _marked_labels({column: columns[column] for column in marked})
    if not n_labels:
        raise UserError(
            f"{raw.name}: no column looks like a label (2 to {MAX_LABELS} different values); name it with --label; "
            f"there are: {', '.join(f'`{c}`' for c in columns)}"
        )
    column = usual[0] if usual else min(n_labels, key=lambda c: n_labels[c])
    return sets.get(column) or _single_labels(raw, column, columns[column])


def _n_values(values: Sequence[Any]) -> int:
    """How many different labels a column may hold, one a row; 0 if it holds none."""
    try:
        texts = {value_text(value) for value in values} - {None}
    except TypeError:  # a list of several values, or an object
        return 0
    return len(texts) if 2 <= len(texts) <= min(MAX_LABELS, max(2, len(values) // 3)) else 0


def _first_unmarked(values: Sequence[Any]) -> int | None:
    """The place of the first value that is neither 1 nor 0; None where all are, or are empty."""
    for i, value in enumerate(values):
        try:
            mark(value)
        except ValueError:
            return i
    return None


def _is_marked(values: Sequence[Any]) -> bool:
    """Whether a column holds 1 in some rows, and 0 or nothing in the others."""
    return _first_unmarked(values) is None and len({bool(mark(value)) for value in values}) == 2


def _marked_labels(columns: Mapping[str, Sequence[Any]]) -> LabelGuess:
    """Labels that have a column of 1 and 0 each."""
    marks = np.array([[bool(mark(value)) for value in values] for values in columns.values()])
    rows = Counter(dict(zip(columns, map(int, marks.sum(1)), strict=True)))
    n_without = int((~marks.any(0)).sum())
    return LabelGuess(tuple(columns), dict(rows.most_common()), True, None, int(marks.sum()), n_without)


def _label_sets(column: str, values: Sequence[Any]) -> LabelGuess | None:
    """The labels of a column with several in a cell, as a list or divided by a sign; None where it is no such column.

    A sign divides labels if what it divides stands in other cells, too: not that of `Food, drink` beside `Sports`.
    """
    lists = [parse_list(value) if isinstance(value, str) else value for value in values]
    if any(isinstance(value, list) and len(value) > 1 for value in lists):
        return _count_sets(column, lists, None)
    if not all(isinstance(value, str | list | None) for value in lists):
        return None
    for separator in SEPARATORS[:-1]:  # a space also stands inside a label
        cells = Counter(
            value for value in lists if isinstance(value, str) and separator in value.strip(separator + " ")
        )
        distinct = {value for value in lists if isinstance(value, str)}
        if not cells or len(distinct) > len(values) / 2:
            continue
        divided = {value: set(_parts(value, separator)) for value in distinct}
        n_cells = Counter(part for parts in divided.values() for part in parts)
        n_shared = sum(n for value, n in cells.items() for part in divided[value] if n_cells[part] > 1)
        if n_shared >= MIN_SHARED * sum(n * len(divided[value]) for value, n in cells.items()):
            guess = _count_sets(column, lists, separator)
            if guess and len(guess.labels) <= len(distinct):
                return guess
    return None


def _parts(text: str, separator: str) -> list[str]:
    return [part.strip() for part in text.split(separator) if part.strip()]


def _count_sets(column: str, values: Iterable[Any], separator: str | None) -> LabelGuess | None:
    """The labels of a column with label sets; None where they are too many or no labels."""
    rows, n_without = Counter[str](), 0
    for value in values:
        if isinstance(value, str):
            value = [] if value.strip() in ("", NO_LABELS) else _parts(value, separator) if separator else [value]
        try:
            labels = [value_text(element) for element in (value if isinstance(value, list) else [value])]
        except TypeError:
            return None
        labels = [label for label in labels if label is not None]
        n_without += not labels
        rows.update(labels)
    n_labels, names = sum(rows.values()), _join_cases(rows)
    if not 2 <= len(names) <= MAX_LABELS:
        return None
    return LabelGuess((column,), names, True, separator, n_labels, n_without)


def _single_labels(raw: RawRows, column: str, values: Sequence[Any]) -> LabelGuess:
    """The labels of a column with one a row."""
    counts: Counter[str] = Counter()
    for i, value in enumerate(values):
        try:
            counts[value_text(value) or ""] += 1
        except TypeError:
            raise UserError(f"{raw.at(i)}: `{column}` must be one label, not {value!r:.60}") from None
    empty = counts.pop("", 0)
    if empty:
        raise UserError(
            f"{raw.name}: {empty} rows have no label in the column `{column}`; put them into a file of their own, "
            "and name both files under `splits` (docs/own-data.md, Own splits)"
        )
    labels = _join_cases(counts)
    if not 2 <= len(labels) <= MAX_LABELS:
        raise UserError(f"{raw.name}: the column `{column}` holds {len(labels)} values; a label has 2 to {MAX_LABELS}")
    return LabelGuess((column,), labels, n_labels=len(values))


def _join_cases(counts: Counter[str]) -> dict[str, int]:
    """Rows by label; spellings that differ in case alone are one, the most frequent of them."""
    names: dict[str, str] = {}
    rows: Counter[str] = Counter()
    for text, n in counts.most_common():
        rows[names.setdefault(text.casefold(), text)] += n
    return dict(rows.most_common())
