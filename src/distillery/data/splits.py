"""Splits that a source brings: a file for each, or a column with their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from distillery.config.schema import SourceConfig
from distillery.data.records import RawRows
from distillery.data.splitting import split_groups
from distillery.errors import UserError

SPLIT_NAMES = {  # in a column of the file
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("pool", "unlabelled", "unlabeled"), "pool"),
}


def join_splits(parts: Mapping[str, RawRows], spec: SourceConfig) -> RawRows:
    """The records of the files of all splits, one after the other.

    Raises UserError when a column of the text or the labels is missing in one file. A pool needs no labels.
    """
    _check_columns(parts, spec)
    return RawRows(
        name=", ".join(raw.name for raw in parts.values()),
        unit="row",
        rows=[record for raw in parts.values() for record in raw.rows],
        numbers=[number for raw in parts.values() for number in raw.numbers],
        blank=sum(raw.blank for raw in parts.values()),
        splits=[split for split, raw in parts.items() for _ in raw.rows],
        places=[raw.at(i) for raw in parts.values() for i in range(len(raw.rows))],
        decisions=[f"{raw.name}: {decision}" for raw in parts.values() for decision in raw.decisions],
    )


def join_files(name: str, parts: Sequence[RawRows], spec: SourceConfig) -> RawRows:
    """The records of several files of one kind, one after the other, numbered through. name: how params.yaml has them.

    Raises UserError when a column of the text or the labels is missing in one file.
    """
    _check_columns({raw.name: raw for raw in parts}, spec)
    rows = [record for raw in parts for record in raw.rows]
    return RawRows(
        name=name,
        unit="row",
        rows=rows,
        numbers=list(range(1, len(rows) + 1)),
        blank=sum(raw.blank for raw in parts),
        places=[raw.at(i) for raw in parts for i in range(len(raw.rows))],
        decisions=[
            f"{len(parts)} files were read: {parts[0].name} to {parts[-1].name}.",
            *(f"{raw.name}: {decision}" for raw in parts for decision in raw.decisions),
        ],
    )


def _check_columns(parts: Mapping[str, RawRows], spec: SourceConfig) -> None:
    """Raise UserError when a column of the text or the labels is in some files and missing in another.

    parts: by split or file; one called `pool` needs no labels.
    """
    for split, raw in parts.items():
        text = [spec.columns.text] if isinstance(spec.columns.text, str) else spec.columns.text
        columns = dict.fromkeys(column for record in raw.rows for column in record)  # in the order of the file
        for column in [*text, *(spec.columns.gold if split != "pool" else [])]:
            others = (other.rows for name, other in parts.items() if name != split)
            if column not in columns and any(column in record for rows in others for record in rows):
                shown = ", ".join(f"`{name}`" for name in columns)
                raise UserError(f"{raw.name}: no column `{column}`, which other files have; there are: {shown}")


def split_by_column(raw: RawRows, column: str) -> RawRows:
    """`raw` with the split that `column` names. Raises UserError with the line where it names none."""
    splits = []
    for i, record in enumerate(raw.rows):
        value = record.get(column)
        split = SPLIT_NAMES.get(value.strip().casefold()) if isinstance(value, str) else None
        if split is None:
            raise UserError(f"{raw.at(i)}: `{column}` must be train, validation, test or pool, not {value!r:.60}")
        splits.append(split)
    return replace(raw, splits=splits)


def complete_splits(
    own: pd.Series, rows: pd.DataFrame, names: list[str], validation_share: float, seed: int
) -> tuple[np.ndarray, list[str]]:
    """The split of each row, with validation rows cut from `train` where the source brings none; and a sentence on it.

    Groups stay whole. own: the split of each row in the source. names: labels that validation rows must have. A source
    without `train` needs no validation rows, and one that is all pool no test rows.
    Raises UserError when there are no test rows, or too few rows to cut validation rows from.
    """
    split = own.to_numpy(dtype=object, copy=True)
    if not (split == "test").any() and not (split == "pool").all():
        raise UserError("no row is in the split `test`")
    train = np.flatnonzero(split == "train")
    if (split == "validation").any() or not len(train):
        return split, []
    shares = {"train": 1 - validation_share, "validation": validation_share}
    split[train] = split_groups(rows["group"].iloc[train], rows["label"].iloc[train], names, shares, seed)
    n_cut = int((split == "validation").sum())
    return split, [f"{n_cut} rows of `train` became validation rows, since there are none; see `validation_share`."]
