"""Read tables that hold columns of one type each: Parquet, Feather, Arrow, ORC, and data sets saved by `datasets`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distillery.data.records import RawRows
from distillery.errors import UserError


def _read_arrow(source: pa.BufferReader) -> pa.Table:
    """A table of Arrow's file format, which Feather is, or of its stream format."""
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()


def _read_orc(source: pa.BufferReader) -> pa.Table:
    from pyarrow import orc  # missing on some systems

    return orc.read_table(source)


READ_COLUMNAR: dict[str, tuple[str, Callable[[pa.BufferReader], pa.Table]]] = {  # suffix -> name, function
    ".parquet": ("a Parquet file", pq.read_table),
    ".feather": ("a Feather file", _read_arrow),
    ".arrow": ("an Arrow file", _read_arrow),
    ".orc": ("an ORC file", _read_orc),
}


def read_columnar(name: str, suffix: str, content: bytes) -> RawRows:
    """The records of a file with one of the suffixes of `READ_COLUMNAR`. Raises UserError when it is damaged."""
    if not content:
        return RawRows(name, "row", [], [])
    return _records(name, [_read(name, suffix, content)])


def _read(name: str, suffix: str, content: bytes) -> pa.Table:
    kind, read = READ_COLUMNAR[suffix]
    try:
        return read(pa.BufferReader(content))
    except ImportError:
        raise UserError(f"{name}: pyarrow cannot read {kind} on this system; write it as Parquet or CSV") from None
    except (pa.ArrowException, OSError):
        raise UserError(f"{name}: not {kind}, or damaged") from None


def _records(name: str, tables: Iterable[pa.Table]) -> RawRows:
    rows = [row for table in tables for row in table.to_pylist()]
    return RawRows(name, "row", rows, list(range(1, len(rows) + 1)))


def read_dataset_folder(name: str, folder: Path) -> RawRows | None:
    """The records of a folder that `Dataset.save_to_disk` has written; None for another folder.

    Integers that stand for labels become the labels' names. Raises UserError for a folder of several splits, and when
    the folder is damaged.
    """
    splits, state = folder / "dataset_dict.json", folder / "state.json"
    try:
        if splits.exists():
            parts = json.loads(splits.read_text(encoding="utf-8"))["splits"]
            shown = ", ".join(f"{part}: {name}/{part}" for part in parts)
            raise UserError(f"{name}: a data set of several splits; name each in `splits`, such as {{{shown}}}")
        if not state.exists():
            return None
        files = [file["filename"] for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
        tables = [_read(f"{name}/{file}", ".arrow", (folder / file).read_bytes()) for file in files]
        named = _label_names(json.loads((folder / "dataset_info.json").read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise UserError(f"{name}: not a folder that `Dataset.save_to_disk` wrote, or damaged") from None
    raw = _records(name, tables)
    for column, names in named.items():
        for row in raw.rows:
            if isinstance(value := row.get(column), int) and 0 <= value < len(names):
                row[column] = names[value]
        raw.decisions.append(
            f"The numbers of the column `{column}` are read as the names that the data set gives them."
        )
    return raw


def _label_names(info: dict[str, Any]) -> dict[str, list[str]]:
    """The names of the labels by column, in a `dataset_info.json`."""
    features = (info.get("features") or {}).items()
    return {column: f["names"] for column, f in features if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
