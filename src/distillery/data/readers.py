"""Read records from CSV, TSV, JSON, Parquet, Excel and hub data sets, with the line or row of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath

from distillery.config.schema import SourceConfig
from distillery.data.columnar import READ_COLUMNAR, read_columnar, read_dataset_folder
from distillery.data.decoding import decode, decompress
from distillery.data.excel import read_xlsx
from distillery.data.hub import read_hub
from distillery.data.json_records import read_json
from distillery.data.label_columns import join_label_columns
from distillery.data.nested import open_paths
from distillery.data.records import FileFormat, RawRows
from distillery.data.selection import named_columns
from distillery.data.signatures import check_signature, way_out
from distillery.data.splits import join_files, join_splits, split_by_column
from distillery.data.tables import read_table
from distillery.errors import UserError
from distillery.files import matching_files

DEFAULT_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx")  # the usual ones, for messages


def read_source(spec: SourceConfig, base: Path) -> RawRows:
    """The records of a source; file paths are relative to `base`.

    Raises UserError with the file and the line or row when the file is missing, empty, of another kind,
    in an unknown encoding or malformed, or when a hub data set cannot be reached.
    """
    if spec.is_on_hub:
        raw = open_paths(read_hub(spec), named_columns(spec))
        if not raw.rows:
            raise UserError(f"{spec.source}: empty, there are no rows in it")
    else:
        text = spec.columns.text
        names = (*([text] if isinstance(text, str) else text), *spec.columns.gold)
        form = FileFormat(spec.encoding, spec.delimiter, spec.quotes, spec.header, names)
        parts = {split: _read_files(file, spec, base, form) for split, file in spec.files.items()}
        raw = join_splits(parts, spec) if spec.splits else parts["source"]
    if spec.columns.label_columns and spec.columns.label:
        raw = join_label_columns(raw, spec.columns.label_columns, spec.columns.label)
    return split_by_column(raw, spec.split_column) if spec.split_column else raw


def _read_files(name: str, spec: SourceConfig, base: Path, form: FileFormat) -> RawRows:
    """The records of the file `name`, or of all files that fit it, with what nested objects hold at named paths."""
    files = matching_files(base, name)
    parts = [open_paths(read_rows(file, base, form), named_columns(spec)) for file in files]
    return parts[0] if files == [name] else join_files(name, parts, spec)


def read_rows(name: str, base: Path, form: FileFormat | None = None) -> RawRows:
    """The records of the file `name`, a path relative to `base`. Raises UserError as :func:`read_source`."""
    if (base / name).is_dir():
        return _read_folder(name, base / name, form or FileFormat())
    try:
        content = (base / name).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    inner_name, content = decompress(name, content)
    raw = _read_content(name, PurePosixPath(inner_name).suffix.lower(), content, form or FileFormat())
    if not raw.rows:
        raise UserError(f"{name}: empty, there are no rows in it")
    return raw


def _read_content(name: str, suffix: str, content: bytes, form: FileFormat) -> RawRows:
    if suffix in READ_COLUMNAR:
        return read_columnar(name, suffix, content)
    if suffix == ".xlsx":
        return read_xlsx(name, content, form)
    delimiter = form.delimiter if suffix == ".txt" else DEFAULT_DELIMITERS.get(suffix)
    if delimiter is None and suffix not in JSON_SUFFIXES:
        allowed = f"{', '.join(SUFFIXES)}, each also in .gz or .zip, or hub:owner/name[@revision]"
        hint = way_out(suffix)
        raise UserError(f"{name}: cannot read `{suffix or 'a name without suffix'}`; allowed: {allowed}{hint}")
    check_signature(name, suffix, content, form.header)
    text, decision = decode(name, content, form.encoding)
    raw = read_table(name, text, delimiter, form) if delimiter else read_json(name, text, suffix == ".json", form)
    return replace(raw, decisions=[decision, *raw.decisions]) if decision else raw


def _read_folder(name: str, folder: Path, form: FileFormat) -> RawRows:
    """A row for each text file in the folders of `folder`: its text, its folder as label, and its path as id."""
    if (raw := read_dataset_folder(name, folder)) is not None:
        return raw
    files = sorted(path for path in folder.glob("*/*.txt") if not path.name.startswith("."))
    if not files:
        raise UserError(f"{name}: a folder without text files; needs a folder for each label, with its files in .txt")
    rows, decisions = [], {}
    for path in files:
        place = path.relative_to(folder).as_posix()
        text, decision = decode(f"{name}/{place}", path.read_bytes(), form.encoding)
        rows.append({"id": place.removesuffix(".txt"), "text": text, "label": path.parent.name})
        if decision:
            decisions.setdefault(decision, place)
    shown = [f"{place}: {decision}" for decision, place in decisions.items()]
    return RawRows(name, "file", rows, list(range(1, len(rows) + 1)), decisions=shown)
