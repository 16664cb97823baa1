"""Label sets that a file has as a column of 1 and 0 for each label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distillery.data.labels import value_text, whole_number_text
from distillery.data.records import RawRows
from distillery.errors import UserError

MARKS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}  # in any case


def mark(value: Any) -> bool | None:
    """Whether a cell marks its row with the label of the column; None for an empty one.

    Raises ValueError for a value that is neither 1 nor 0, nor one of their other spellings in `MARKS`.
    """
    try:
        text = value_text(value)
    except TypeError:
        raise ValueError from None
    if text is None:
        return None
    text = whole_number_text(text.casefold())
    if text not in MARKS:
        raise ValueError
    return MARKS[text]


def join_label_columns(raw: RawRows, columns: Sequence[str], name: str) -> RawRows:
    """`raw` with the column `name` in place of `columns`: a list of those that hold 1, None where all are empty.

    Raises UserError for a column that the file does not have, and with the row for a value that is neither 1 nor 0.
    """
    file_columns = list(dict.fromkeys(column for record in raw.rows for column in record))
    for column in columns:
        if column not in file_columns:
            shown = ", ".join(f"`{other}`" for other in file_columns)
            raise UserError(f"{raw.name}: no column `{column}` of `label_columns`; there are: {shown}")
    rows = []
    for i, record in enumerate(raw.rows):
        marks = {}
        for column in columns:
            try:
                marks[column] = mark(record.get(column))
            except ValueError:
                raise UserError(f"{raw.at(i)}: `{column}` must be 1 or 0, not {record[column]!r:.60}") from None
        labels = None if set(marks.values()) == {None} else [column for column in columns if marks[column]]
        rows.append({column: value for column, value in record.items() if column not in {*columns, name}})
        rows[-1][name] = labels
    left_out = [f"The column `{name}` is left out: the labels stand in others."] if name in file_columns else []
    return replace(raw, rows=rows, decisions=[*raw.decisions, *left_out])
