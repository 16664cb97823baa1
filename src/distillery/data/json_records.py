"""Read JSON: one object a line, a list of objects, or the columns of a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from distillery.data.records import FileFormat, RawRows, value_kind
from distillery.errors import UserError


def read_json(name: str, text: str, is_whole: bool = False, form: FileFormat | None = None) -> RawRows:
    """The records of a JSON file: one object a line, a list of objects, an object that holds one list of objects, or
    an object of columns as pandas writes it.

    is_whole: whether the file may be one object (.json), and not only objects in lines or in a list (.jsonl).
    Raises UserError with the line, or the number of the row in a list.
    """
    lines = [line for line in text.split("\n", 1) if line.strip()]
    is_one_value = text.lstrip()[:1] in ("[{" if is_whole else "[") and not (len(lines) > 1 and _is_object(lines[0]))
    whole = _load(text) if is_one_value else None
    rows, decisions = _rows_of(whole, form.names if form else ())
    if rows is None:
        _raise_if_broken_list(name, text, lines)
        return _read_lines(name, text)
    if "\\u" in text:
        for number, row in enumerate(rows, 1):
            _check_surrogates(f"{name}, row {number}", row)
    return RawRows(name, "row", rows, list(range(1, len(rows) + 1)), decisions=decisions)


def _load(text: str) -> Any:
    """The value in `text`, or None where it is not valid JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_object(line: str) -> bool:
    return isinstance(_load(line), dict)


def _rows_of(value: Any, names: Sequence[str]) -> tuple[list[dict[str, Any]] | None, list[str]]:
    """The rows in the value of a whole file, None if it is no table; and what was decided. names: of columns."""
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return value, []
    if not isinstance(value, dict):
        return None, []
    if {"columns", "data"} <= set(value) <= {"columns", "data", "index"} and _is_split(**value):
        rows = [dict(zip(map(str, value["columns"]), cells, strict=True)) for cells in value["data"]]
        return rows, ["The file holds columns and data apart, and was read as pandas writes them."]
    lists = [key for key, rows in value.items() if isinstance(rows, list) and rows and _all_objects(rows)]
    if len(lists) == 1:
        return value[lists[0]], [f"The rows of the file are the list under its key `{lists[0]}`."]
    columns = list(value.values())
    if columns and _all_objects(columns) and all(list(column) == list(columns[0]) for column in columns):
        if _holds_rows(value, columns[0], names):
            return columns, ["The file holds an object of rows, and was read as pandas writes them."]
        rows = [{key: column[index] for key, column in value.items()} for index in columns[0]]
        return rows, ["The file holds columns, not rows, and was read as pandas writes them."]
    return None, []


def _is_split(columns: Any, data: Any, index: Any = None) -> bool:
    """Whether a file has its columns and rows apart (`orient="split"` of pandas)."""
    if not isinstance(columns, list) or not isinstance(data, list) or not columns or not data:
        return False
    return all(isinstance(cells, list) and len(cells) == len(columns) for cells in data)


def _holds_rows(value: dict[str, Any], first: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether an object of objects holds rows by their index (`orient="index"`), and not columns. first: inner one."""
    if names and ({*names} <= set(value) or {*names} <= set(first)):
        return not {*names} <= set(value)
    return all(key.isdecimal() for key in value) and not all(key.isdecimal() for key in first)


def _all_objects(values: Sequence[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _raise_if_broken_list(name: str, text: str, lines: list[str]) -> None:
    """Raise UserError with the line where a list of rows over several lines is broken."""
    if text.lstrip()[:1] != "[" or not lines or _load(lines[0]) is not None:
        return
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{name}, line {error.lineno}, column {error.colno}"
        raise UserError(f"{place}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        return


def _read_lines(name: str, text: str) -> RawRows:
    rows, numbers, blank = [], [], 0
    # Only "\n" ends a line: str.splitlines also splits at characters that a JSON string may contain.
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            blank += 1
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}, line {number}, column {error.colno}: not valid JSON: {error.msg}") from None
        except (ValueError, RecursionError):
            raise UserError(f"{name}, line {number}: not valid JSON: a number too long or brackets too deep") from None
        if not isinstance(row, dict):
            raise UserError(f'{name}, line {number}: must be a JSON object like {{"text": …}}, not {value_kind(row)}')
        if "\\u" in line:
            _check_surrogates(f"{name}, line {number}", row)
        rows.append(row)
        numbers.append(number)
    return RawRows(name, "line", rows, numbers, blank)


def _check_surrogates(place: str, row: dict[str, Any]) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: half of a surrogate pair (\\ud800 to \\udfff)") from None
