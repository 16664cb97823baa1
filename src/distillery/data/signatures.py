"""Files that cannot be read, or are not what their names say: what they are, and the way out."""

from __future__ import annotations

import re

from distillery.errors import UserError

SAVE_AS_TABLE = "save the table as CSV or .xlsx in the program that wrote it"
WAYS_OUT = {
    "save the sheet as CSV or .xlsx": (".xls", ".xlsb", ".xlsm", ".ods", ".numbers"),
    "a pickle can run code, so none is opened: write it as Parquet or CSV where you trust it": (
        *(".pkl", ".pickle", ".p", ".joblib", ".pt", ".pth"),
    ),
    "write the arrays as the columns of a CSV or Parquet file": (".npy", ".npz", ".h5", ".hdf5", ".mat"),
    "export the table as CSV, such as with `sqlite3 -header -csv FILE 'select * from TABLE'`": (
        *(".db", ".sqlite", ".sqlite3", ".mdb", ".accdb", ".sql"),
    ),
    SAVE_AS_TABLE: (".dta", ".sav", ".zsav", ".por", ".sas7bdat", ".xpt", ".rds", ".rdata", ".rda", ".dbf"),
    "write a row for each record, as CSV or JSON lines": (".html", ".htm", ".xml", ".yaml", ".yml", ".toml"),
    "a document has no rows: write a table with a text and a label in each row": (
        *(".doc", ".docx", ".pdf", ".rtf", ".odt", ".pptx", ".md", ".tex", ".epub"),
    ),
    "name the `delimiter` between its columns, or write its lines as a table with a header (.csv, .tsv)": (".txt",),
    "name a table with a header .csv or .tsv, and write lines of another form as one": (
        *(".dat", ".data", ".conll", ".conllu", ".iob", ".ft", ".psv", ".log"),
    ),
    "unpack the archive": (".tar", ".tgz", ".7z", ".rar", ".zst", ".lz4", ".br", ".lzma"),
}
SIGNATURES = {  # first bytes of files that are no text -> what they are
    b"PK\x03\x04": "a zip file or an Excel workbook: name it .zip or .xlsx",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file: save it as CSV or .xlsx",
    b"PAR1": "a Parquet file: name it .parquet",
    b"ARROW1": "a Feather file: name it .feather",
    b"ORC": "an ORC file: name it .orc",
    b"\x1f\x8b": "a gzip file: end its name in .gz",
    b"BZh": "a bzip2 file: end its name in .bz2",
    b"\xfd7zXZ": "an xz file: end its name in .xz",
    b"\x28\xb5\x2f\xfd": "a zstandard file: unpack it",
    b"%PDF": "a PDF document: write a table with a text and a label in each row",
    b"SQLite format 3": "a SQLite database: export the table as CSV",
    **{b"\x80%c" % n: "a pickle, which is never opened: write it as Parquet or CSV" for n in (2, 3, 4, 5)},
}
MARKUP = re.compile(rb"\s*<(!doctype html|html|table|\?xml)", re.IGNORECASE)
JSON_START = re.compile(rb'\s*(\{\s*"|\[\s*\{\s*")')
SAMPLE = 4096  # bytes at the start of a file
TABLES = (".csv", ".tsv", ".tab")


def way_out(suffix: str) -> str:
    """What to do with a file of this suffix, as the end of a message; empty for an unknown suffix."""
    return next((f"; {text}" for text, suffixes in WAYS_OUT.items() if suffix in suffixes), "")


def check_signature(name: str, suffix: str, content: bytes, has_header: bool = True) -> None:
    """Raise UserError when `content`, which its suffix calls text, begins as a file of another kind does.

    A table without header may begin with a text in HTML or JSON.
    """
    content = content.removeprefix(b"\xef\xbb\xbf")
    starts = [start for start in SIGNATURES if content.startswith(start)]
    # letters alone may begin the header of a table, such as `ORCID`; files of these kinds hold zero bytes
    starts = [start for start in starts if not start.isalnum() or b"\0" in content[:SAMPLE]]
    kind = SIGNATURES[starts[0]] if starts else None
    if kind is None and has_header and MARKUP.match(content):
        kind = "HTML or XML: write a row for each record, as CSV or JSON lines"
    if kind is None and has_header and suffix in TABLES and JSON_START.match(content):
        kind = "JSON: name it .jsonl or .json"
    if kind:
        raise UserError(f"{name}: not a {suffix} file but {kind}")
