"""Columns inside objects and lists, as annotation tools export them, named by a path such as `data.text`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from distillery.data.records import RawRows


def open_paths(raw: RawRows, names: Iterable[str]) -> RawRows:
    """`raw` with a column for each of `names` that is a path: a column, then keys of objects or positions of lists.

    A key on a list takes that key of every element. Equal values count once, and one value stands alone, so that
    annotators of one opinion give one label. The columns that hold the paths are left out: they may hold the labels.
    """
    columns = {column for record in raw.rows for column in record}
    paths = [name for name in dict.fromkeys(names) if name not in columns and name.partition(".")[0] in columns]
    values = {path: [_value_at(record, path.split(".")) for record in raw.rows] for path in paths if "." in path}
    values = {path: column for path, column in values.items() if any(value is not None for value in column)}
    if not values:
        return raw
    roots = {path.partition(".")[0] for path in values}
    rows = [
        {column: value for column, value in record.items() if column not in roots}
        | {path: column[i] for path, column in values.items()}
        for i, record in enumerate(raw.rows)
    ]
    shown = ", ".join(f"`{root}`" for root in sorted(roots))
    decision = f"Of {shown} only what params.yaml names is read; the rest is left out."
    return replace(raw, rows=rows, decisions=[*raw.decisions, decision])


def _value_at(record: dict[str, Any], path: list[str]) -> Any:
    values: list[Any] = [record]
    for key in path:
        elements = [value for value in values if isinstance(value, dict)]
        lists = [value for value in values if isinstance(value, list)]
        if key.isdecimal() and lists:
            values = [value[int(key)] for value in lists if int(key) < len(value)]
        else:
            elements += [element for value in lists for element in value if isinstance(element, dict)]
            values = [element[key] for element in elements if key in element]
    leaves = [leaf for value in values for leaf in (value if isinstance(value, list) else [value])]
    distinct = [leaf for i, leaf in enumerate(leaves) if leaf not in leaves[:i]]
    return distinct[0] if len(distinct) == 1 else distinct or None
