"""Read records from CSV, TSV, JSON lines, Parquet and hub data sets, with the line or row of each."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distillery.config.schema import SourceConfig
from distillery.data.records import RawRows, value_kind
from distillery.errors import UserError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


def read_source(spec: SourceConfig, base: Path) -> RawRows:
    """The records of a source; file paths are relative to `base`.

    Raises UserError with the file and the line or row when the file is missing, empty, of another kind,
    not UTF-8 or malformed, or when a hub data set cannot be reached.
    """
    if not spec.source.startswith("hub:"):
        return read_rows(spec.source, base)
    raw = _read_hub(spec)
    if not raw.rows:
        raise UserError(f"{spec.source}: empty, there are no rows in it")
    return raw


def read_rows(name: str, base: Path) -> RawRows:
    """The records of the file `name`, a path relative to `base`. Raises UserError as :func:`read_source`."""
    path = base / name
    readers: dict[str, Callable[[str, bytes], RawRows]] = {
        ".jsonl": _read_jsonl,
        ".csv": lambda name, content: _read_table(name, content, ","),
        ".tsv": lambda name, content: _read_table(name, content, "\t"),
        ".parquet": _read_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{name}: cannot read `{path.suffix or 'a name without suffix'}`; "
            f"allowed: {', '.join(SUFFIXES)}, or hub:owner/name[@revision]"
        )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    raw = reader(name, content)
    if not raw.rows:
        raise UserError(f"{name}: empty, there are no rows in it")
    return raw


def _decode(name: str, content: bytes) -> str:
    mark_length = 3 if content.startswith(b"\xef\xbb\xbf") else 0  # byte order mark
    try:
        return content[mark_length:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + mark_length
        line = content.count(b"\n", 0, offset) + 1
        raise UserError(
            f"{name}, line {line}: byte 0x{content[offset]:02x} at offset {offset} is not UTF-8; save the file as UTF-8"
        ) from None


def _read_jsonl(name: str, content: bytes) -> RawRows:
    rows, numbers, blank = [], [], 0
    # Only "\n" ends a line: str.splitlines also splits at characters that a JSON string may contain.
    lines = _decode(name, content).removesuffix("\n").split("\n") if content else []
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
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise UserError(f"{name}, line {number}: half of a surrogate pair (\\ud800 to \\udfff)") from None
        rows.append(row)
        numbers.append(number)
    return RawRows(name, "line", rows, numbers, blank)


def _read_table(name: str, content: bytes, delimiter: str) -> RawRows:
    reader = csv.reader(io.StringIO(_decode(name, content), newline=""), delimiter=delimiter, strict=True)
    header, rows, numbers, blank, start = None, [], [], 0, 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise UserError(f"{name}, line {start}: not a valid table: {error} (is a quote left open?)") from None
        number, start = start, reader.line_num + 1
        if not any(cell.strip() for cell in cells):
            blank += 1
        elif header is None:
            header = [cell.strip() for cell in cells]
            repeated = [column for column, n in Counter(header).items() if n > 1]
            if repeated:
                raise UserError(f"{name}, line {number}: the column `{repeated[0]}` is there twice")
        elif len(cells) != len(header):
            raise UserError(f"{name}, line {number}: {len(cells)} fields, but the header has {len(header)}")
        else:
            rows.append(dict(zip(header, cells, strict=True)))
            numbers.append(number)
    return RawRows(name, "line", rows, numbers, blank)


def _read_parquet(name: str, content: bytes) -> RawRows:
    if not content:
        return RawRows(name, "row", [], [])
    try:
        rows = pq.read_table(pa.BufferReader(content)).to_pylist()
    except (pa.ArrowException, OSError):
        raise UserError(f"{name}: not a Parquet file, or damaged") from None
    return RawRows(name, "row", rows, list(range(1, len(rows) + 1)))


def _read_hub(spec: SourceConfig) -> RawRows:
    source = spec.source
    match = re.fullmatch(r"hub:(\w[\w.-]*(?:/\w[\w.-]*)?)(?:@([\w./-]+))?", source)
    if not match:
        raise UserError(f"{source}: not a hub data set; write hub:owner/name or hub:owner/name@revision")
    repo, revision = match.groups()
    hub_splits = spec.hub_splits.model_dump() if spec.hub_splits else {}  # split -> split of the hub
    hub_splits = {split: hub_split for split, hub_split in hub_splits.items() if hub_split}
    import datasets  # slow to import, and only needed here

    loggers = [logging.getLogger(n) for n in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    progress_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        for logger in loggers:  # retries and hints of the library would hide the one line that matters
            logger.setLevel(logging.CRITICAL)
        parts = [
            datasets.load_dataset(repo, spec.hub_config, revision=revision, split=hub_split)
            for hub_split in hub_splits.values() or [spec.hub_split]
        ]
    except OSError as error:  # no network, offline mode, unknown and gated data sets differ only in the library's prose
        unreachable = "no network (or HF_HUB_OFFLINE is set), unknown data set or revision, or no right to read it"
        raise UserError(f"{source}: {error.strerror or unreachable}") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source}: cannot be read: {reason[:300]}") from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if progress_bars:
            datasets.enable_progress_bars()
    labels = getattr(parts[0].features.get(spec.columns.label), "names", None)
    rows = [row for part in parts for row in part.to_list()]
    splits = None
    if hub_splits:
        splits = [split for split, part in zip(hub_splits, parts, strict=True) for _ in range(len(part))]
    return RawRows(source, "row", rows, list(range(1, len(rows) + 1)), labels=labels, splits=splits)
