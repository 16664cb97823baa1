"""Read a table in windows of rows, and write one in parts: CSV, TSV, JSON lines and Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from distillery.deploy.settings import is_unicode
from distillery.errors import UserError
from distillery.files import atomic_write

STANDARD = "-"  # the name of standard input and output
FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
DELIMITERS = {"csv": ",", "tsv": "\t"}
WINDOW_ROWS, WINDOW_CHARACTERS = 4096, 16_000_000  # a window ends at the first of the two, which bounds the memory


def table_format(name: str, chosen: str | None, default: str = "csv") -> str:
    """The format of a table by the suffix of its `name`, else `chosen`. Raises UserError where neither is known."""
    if name == STANDARD:
        return chosen or default
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    suffix = (suffixes[:-1] if suffixes[-1:] == [".gz"] else suffixes)[-1:]
    kind = FORMATS.get("".join(suffix), chosen)
    if kind is None:
        allowed = ", ".join(FORMATS)
        raise UserError(f"{name}: cannot read or write this suffix; allowed: {allowed}; --format names the format")
    return kind


@dataclass
class Window:
    """Rows that follow each other, with the line or row of each for messages."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    schema: pa.Schema | None = None  # of Parquet


def read_windows(name: str, kind: str, skip: int = 0, encoding: str = "utf-8-sig") -> Iterator[Window]:
    """The rows of the table `name` (`-`: standard input) in windows, without the first `skip`.

    Windows end at the same rows in every run that starts at the end of one. Raises UserError naming the line or row.
    """
    if kind == "parquet":
        yield from _parquet_windows(name, skip)
        return
    window, characters, number = Window(), 0, 0
    with _open_text(name, encoding) as file:
        lines = _decoded(name, file, encoding)
        records = _json_rows(name, lines) if kind == "jsonl" else _csv_rows(name, lines, DELIMITERS[kind])
        for line, row in records:
            number += 1
            if number <= skip:
                continue
            window.rows.append(row)
            window.places.append(f"{name}, line {line}")
            characters += sum(len(value) for value in row.values() if isinstance(value, str))
            if len(window.rows) == WINDOW_ROWS or characters > WINDOW_CHARACTERS:
                yield window
                window, characters = Window(), 0
    if window.rows:
        yield window


def _open_text(name: str, encoding: str) -> IO[str]:
    try:
        if name == STANDARD:
            return io.TextIOWrapper(sys.stdin.buffer, encoding, newline="")
        if name.endswith(".gz"):
            return io.TextIOWrapper(gzip.open(name), encoding, newline="")
        return open(name, encoding=encoding, newline="")
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    except LookupError:
        raise UserError(f"{encoding}: no such encoding; --encoding takes one such as utf-8 or cp1252") from None


def _decoded(name: str, file: IO[str], encoding: str) -> Iterator[str]:
    """The lines of `file`. Raises UserError where it cannot be decoded or unpacked."""
    number = 0
    try:
        for line in file:
            number += 1
            yield line
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        shown = encoding.removesuffix("-sig")
        raise UserError(f"{name}, after line {number}: {byte} is not {shown}; --encoding names another") from None
    except UnicodeError as error:  # of UTF-16 and UTF-32 without the mark at the start
        raise UserError(f"{name}, after line {number}: {error}; --encoding names another") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}, after line {number}: damaged: {error}") from None


def _csv_rows(name: str, lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter=delimiter)
    columns: list[str] | None = None
    try:
        for cells in reader:
            if not cells:  # an empty line
                continue
            if columns is None:
                columns = cells
                if twice := [column for column in columns if columns.count(column) > 1]:
                    raise UserError(f"{name}: two columns have the name `{twice[0]}`; rename one")
                continue
            if len(cells) != len(columns):
                count = f"{len(cells)} cells, but the header has {len(columns)}"
                raise UserError(
                    f"{name}, line {reader.line_num}: {count}; quote cells with a delimiter or a line break"
                )
            yield reader.line_num, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{name}, line {reader.line_num}: {error}") from None


def _json_rows(name: str, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}, line {number}: no JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f'{name}, line {number}: each line must be an object such as {{"text": "…"}}')
        if "\\u" in line and not is_unicode(json.dumps(row, ensure_ascii=False)):
            raise UserError(f"{name}, line {number}: half of a surrogate pair (\\ud800 to \\udfff) is no character")
        yield number, row


def _parquet_windows(name: str, skip: int) -> Iterator[Window]:
    if name == STANDARD:
        raise UserError("standard input: Parquet is read from a file only; give --input a name")
    try:
        file, first = pq.ParquetFile(name), 0
        for batch in file.iter_batches(WINDOW_ROWS):
            # windows are counted from the first row, and so is `skip`: it is the end of one of them
            if first >= skip:
                places = [f"{name}, row {first + i + 1}" for i in range(len(batch))]
                yield Window(batch.to_pylist(), places, batch.schema)
            first += len(batch)
    except FileNotFoundError:
        raise UserError(f"{name}: cannot be read: No such file or directory") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name}: no Parquet file, or damaged: {str(error).splitlines()[0]:.120}") from None


def _cell(value: Any) -> str:
    """A value as a cell of a table: text as it is, nothing for None, anything else as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def write_rows(file: IO[str], kind: str, columns: Sequence[str], window: Window) -> None:
    """Write the rows of a window as text, without a header. Raises UserError for a row with another column."""
    if kind == "jsonl":
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in window.rows)
        return
    _check_keys(columns, window)
    writer = csv.writer(file, delimiter=DELIMITERS[kind], lineterminator="\n")
    writer.writerows([_cell(row.get(column)) for column in columns] for row in window.rows)


def _check_keys(columns: Sequence[str], window: Window) -> None:
    """Raise UserError for a row of `window` with a key that is no column: only JSON lines can hold it."""
    known = set(columns)
    for row, place in zip(window.rows, window.places, strict=True):
        if other := row.keys() - known:
            raise UserError(
                f"{place}: a new key `{min(other)}`, which the first rows do not have; write JSON lines instead"
            )


def write_header(file: IO[str], kind: str, columns: Sequence[str]) -> None:
    """Write the header of a table; JSON lines have none."""
    if kind != "jsonl":
        csv.writer(file, delimiter=DELIMITERS[kind], lineterminator="\n").writerow(columns)


def write_part(path: Path, kind: str, columns: Sequence[str], window: Window) -> None:
    """Write a window to the file `path`, as a whole or not at all. Raises UserError when the disk is full."""
    with atomic_write(path) as scratch:
        if kind == "parquet":
            pq.write_table(_arrow_table(columns, window), scratch)
        else:
            with open(scratch, "w", encoding="utf-8", newline="") as file:
                write_rows(file, kind, columns, window)


def _arrow_table(columns: Sequence[str], window: Window) -> pa.Table:
    _check_keys(columns, window)
    try:
        fields = []
        for column in columns:
            values = [row.get(column) for row in window.rows]
            known = window.schema is not None and column in window.schema.names
            fields.append(pa.array(values, window.schema.field(column).type if known else None))
    except (pa.ArrowException, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{window.places[0]}: column `{column}` has no one type: {reason:.100}; write JSON lines"
        ) from None
    return pa.table(dict(zip(columns, fields, strict=True)))


def join_parts(parts: Sequence[Path], output: Path, kind: str, columns: Sequence[str]) -> None:
    """Join the files `parts`, in their order, to the table `output`, as a whole or not at all."""
    with atomic_write(output) as scratch:
        if kind == "parquet":
            _join_parquet(parts, scratch, columns)
            return
        with open(scratch, "w", encoding="utf-8", newline="") as header:
            write_header(header, kind, columns)
        with open(scratch, "ab") as joined:
            for part in parts:
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, joined)


def _join_parquet(parts: Sequence[Path], scratch: Path, columns: Sequence[str]) -> None:
    try:
        schema = pa.unify_schemas([pq.read_schema(part) for part in parts], promote_options="permissive")
        # a column without any value has the type null, which readers do not expect of texts
        fields = [field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in schema]
        with pq.ParquetWriter(scratch, pa.schema(fields or [(column, pa.string()) for column in columns])) as writer:
            for part in parts:
                writer.write_table(pq.read_table(part).cast(writer.schema))
    except pa.ArrowException as error:
        raise UserError(f"rows of several types: {str(error).splitlines()[0]:.150}; write JSON lines instead") from None
