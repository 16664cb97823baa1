"""Which records of a source are used: values to keep, and answers of annotators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from distillery.config.schema import SourceConfig
from distillery.data.labels import value_text
from distillery.data.records import RawRows
from distillery.errors import UserError

PRODIGY_COLUMN = "answer"  # of an annotator on a row, in exports of Prodigy
PRODIGY_ANSWERS = ("accept", "reject", "ignore")

DuplicateGroup = tuple[int, str]  # a row, and the group of a dropped duplicate: the row belongs to that group too


def select_records(raw: RawRows, spec: SourceConfig) -> tuple[RawRows, list[str]]:
    """The records that `filter.keep` keeps, and what was decided without a key.

    Where no key names the column `answer` and it holds what Prodigy writes there, rows that are not accepted are left
    out. Raises UserError when a column is missing or no record is left.
    """
    keep, decisions = dict(spec.filter.keep) if spec.filter else {}, []
    rejected = PRODIGY_COLUMN not in named_columns(spec) and _has_rejected_rows(raw)
    if rejected:
        keep[PRODIGY_COLUMN] = ["accept"]
    for column, values in keep.items():
        if not any(column in record for record in raw.rows):
            raise UserError(f"{raw.name}: no column `{column}`, which filter.keep names")
        texts = [value_text(value) for value in values]
        selected = [i for i, record in enumerate(raw.rows) if any(t in texts for t in _texts(record.get(column)))]
        all_rows = f"filter: {{keep: {{{PRODIGY_COLUMN}: [{', '.join(PRODIGY_ANSWERS)}]}}}} keeps them"
        hint = f"; {all_rows}" if rejected and column == PRODIGY_COLUMN else ""
        if not selected:
            raise UserError(f"{raw.name}: no row has {' or '.join(map(str, texts))} in the column `{column}`{hint}")
        if hint:
            n_rejected = len(raw.rows) - len(selected)
            decisions.append(f"{n_rejected} rows without `accept` in the column `{column}` were left out{hint}.")
        raw = raw.take(selected)
    return raw, decisions


def _has_rejected_rows(raw: RawRows) -> bool:
    """Whether the column `answer` holds answers of annotators, and not only `accept`."""
    answers = [record.get(PRODIGY_COLUMN) for record in raw.rows]
    return all(answer in PRODIGY_ANSWERS for answer in answers) and any(answer != "accept" for answer in answers)


def named_columns(spec: SourceConfig) -> list[str]:
    """The columns that params.yaml names, or takes by their names."""
    columns, row_filter = spec.columns, spec.filter
    roles = [columns.text, columns.gold, columns.options, columns.id, columns.group, columns.rationale]
    roles += [
        spec.split_column,
        *([*row_filter.keep, row_filter.language, row_filter.theme, row_filter.date] if row_filter else []),
    ]
    return [name for names in roles for name in ([names] if isinstance(names, str) else names or [])]


def _texts(value: Any) -> list[str | None]:
    """`value`, or each value of a list, as text; objects are left out."""
    texts = []
    for item in value if isinstance(value, list) else [value]:
        try:
            texts.append(value_text(item))
        except TypeError:
            continue
    return texts


def take_rows(
    rows: pd.DataFrame, duplicate_groups: list[DuplicateGroup], index: np.ndarray
) -> tuple[pd.DataFrame, list[DuplicateGroup]]:
    """The rows at the positions `index` (ascending), renumbered, and the groups of their dropped duplicates."""
    new_position = {int(old): new for new, old in enumerate(index)}
    taken = [(new_position[i], group) for i, group in duplicate_groups if i in new_position]
    return rows.iloc[index].reset_index(drop=True), taken
