"""Files that people have, written by the tools that write them: what each becomes, rows or one line.

The files in `tests/cases/tools` come from tools that the tests do not install: openpyxl 3.1, XlsxWriter 3.3, xlwt 1.3,
odfpy 1.4, pyreadstat 1.3, pyreadr 0.5, pyzipper 0.4. Exports of annotation tools and of R follow their documentation.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import shutil
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from distillery.config.load import validate_section
from distillery.config.schema import SourceConfig
from distillery.data.cleaning import clean_rows
from distillery.data.readers import read_source
from distillery.data.records import normalize_text
from distillery.errors import UserError
from distillery.tasks.schema import Task

TOOLS = Path(__file__).parent / "cases/tools"
TASK = Task(kind="classification", labels={"up": "rises", "down": "falls", "flat": "neither"})
SHARES = {"train": 0.4, "pool": 0.2, "validation": 0.2, "test": 0.2}
TABLE = [
    ('Orders rose, and "very" much', "up"),
    ("Größe: sales fell; badly", "down"),
    ("Nothing new\nat 5 €", "flat"),
    ("Profit was up 1,5 %", "up"),
    ("It fell | again", "down"),
    ("Same as ever", "flat"),
]
PLAIN = [("Orders rose", "up"), ("Sales fell", "down"), ("Same as ever", "flat")]
JAPANESE = [("利益が増加した", "up"), ("売上が減少した", "down")]
CHINESE = [("公司利潤增長", "up"), ("銷售下降", "down")]
SIMPLIFIED = [("公司利润增长", "up"), ("销售下降", "down")]
RUSSIAN = [("Прибыль компании выросла", "up"), ("Продажи упали", "down")]
FRENCH = [("L’été fut bon à Orléans", "up"), ("Là-bas, l’économie a reculé", "down")]

Rows = Sequence[tuple[str, str | None]]


@dataclass(frozen=True)
class FieldFile:
    """A file as people have it. write: puts it into a folder. settings: the keys of its source in params.yaml.

    rows: the texts and labels that are read; or else line: the beginning of the one line that is printed.
    """

    kind: str
    tool: str
    name: str
    write: Callable[[Path], Any]
    rows: Rows | None = None
    line: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.kind

    def source(self) -> SourceConfig:
        """The section of params.yaml that names this file."""
        named = {} if "splits" in self.settings else {"source": self.name, "split": SHARES}
        return validate_section(SourceConfig, {"task": "x"} | named | self.settings, "params.yaml")

    def outcome(self, folder: Path) -> tuple[Rows | None, str]:
        """What becomes of the file in `folder`: its rows and what was decided, or the line."""
        spec = self.source()
        try:
            rows, _, counts = clean_rows(read_source(spec, folder), spec, TASK)
        except UserError as error:
            return None, str(error)
        labels = [None if pd.isna(label) else label for label in rows["label"]]
        return list(zip(rows["text"], labels, strict=True)), " ".join(counts["decisions"])


def cleaned(rows: Rows) -> Rows:
    """`rows` with their texts as cleaning leaves them."""
    return [(normalize_text(text), label) for text, label in rows]


def frame(rows: Rows = TABLE, **columns: Any) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["text", "label"]).assign(**columns)


def put(name: str, content: bytes | str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def copied(name: str, target: str | None = None) -> Callable[[Path], Any]:
    return lambda folder: shutil.copy(TOOLS / name, folder / (target or name))


def pandas_csv(name: str, table: pd.DataFrame | None = None, **options: Any) -> Callable[[Path], Any]:
    options = {"index": False} | options
    return lambda folder: (frame() if table is None else table).to_csv(folder / name, **options)


def pandas_json(name: str, table: pd.DataFrame | None = None, **options: Any) -> Callable[[Path], Any]:
    return lambda folder: (frame() if table is None else table).to_json(folder / name, **options)


def written(rows: Rows, header: bool = True, **options: Any) -> str:
    """A table as the module csv writes it."""
    text = io.StringIO(newline="")
    csv.writer(text, **options).writerows([*([["text", "label"]] if header else []), *rows])
    return text.getvalue()


def json_lines(records: Sequence[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def zipped(members: dict[str, str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return content.getvalue()


def tarred(folder: Path) -> None:
    (folder / "a.csv").write_text(written(PLAIN))
    with tarfile.open(folder / "a.tar.gz", "w:gz") as archive:
        archive.add(folder / "a.csv", "a.csv")


def database(folder: Path) -> None:
    connection = sqlite3.connect(folder / "a.sqlite")
    frame().to_sql("rows", connection, index=False)
    connection.close()


def data_set(folder: Path, rows: Rows = TABLE):
    """A data set of the library `datasets` whose labels are numbers with names."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=TASK.names)})
    columns = {"text": [text for text, _ in rows], "label": [TASK.names.index(str(label)) for _, label in rows]}
    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict(columns, features=features)


def saved_splits(folder: Path) -> None:
    import datasets

    parts = {"train": data_set(folder), "test": data_set(folder, [("An unlike text", "up")])}
    datasets.DatasetDict(parts).save_to_disk(folder / "saved")


def folder_per_label(folder: Path) -> None:
    for i, (text, label) in enumerate(PLAIN):
        (folder / "reviews" / label).mkdir(parents=True, exist_ok=True)
        (folder / "reviews" / label / f"{i}.txt").write_text(text)


class Trap:
    """What a pickle may hold: to open it is to run this."""

    def __reduce__(self):
        return (open, ("opened", "w"))


STUDIO = {"columns": {"text": "data.text", "label": "annotations.result.value.choices"}}


def studio(text: str, label: str | None, i: int) -> dict:
    """A task of Label Studio in its export JSON."""
    result = {"from_name": "sentiment", "to_name": "text", "type": "choices", "value": {"choices": [label]}}
    return {"id": i, "data": {"text": text}, "annotations": [{"id": i, "result": [result], "was_cancelled": False}]}


def argilla(text: str, label: str | None, i: int) -> dict:
    answers = [{"value": label, "user_id": "a"}, {"value": label, "user_id": "b"}]
    return {"id": f"u{i}", "fields": {"text": text}, "status": "completed", "responses": {"label": answers}}


def exported(record: Callable[[str, str | None, int], dict]) -> list[dict]:
    return [record(text, label, i) for i, (text, label) in enumerate(TABLE)]


NUMBERS = frame(label=[TASK.names.index(label) for _, label in TABLE])
NAMED = {"columns": {"values": {0: "up", 1: "down", 2: "flat"}}}
PROPOSAL = "unknown label '0'; allowed: up, down, flat. To name the label"
EVERY = cleaned(TABLE)

TABLES = [
    FieldFile("CSV", "pandas", "a.csv", pandas_csv("a.csv"), EVERY),
    FieldFile("CSV with its index", "pandas", "a.csv", pandas_csv("a.csv", index=True), EVERY),
    FieldFile(
        "CSV with a column Unnamed: 0", "pandas", "a.csv",
        pandas_csv("a.csv", frame().rename_axis("Unnamed: 0").reset_index()), EVERY,
    ),
    FieldFile("CSV, all cells in quotes", "csv", "a.csv", put("a.csv", written(TABLE, quoting=csv.QUOTE_ALL)), EVERY),
    FieldFile(
        "CSV, quotes after a backslash", "csv", "a.csv",
        put("a.csv", written(TABLE, quoting=csv.QUOTE_ALL, doublequote=False, escapechar="\\")), EVERY,
    ),
    FieldFile(
        "semicolons and decimal commas", "pandas", "a.csv",
        pandas_csv("a.csv", frame(score=np.arange(6) / 4), sep=";", decimal=","), EVERY,
    ),
    FieldFile("bars", "csv", "a.csv", put("a.csv", written(TABLE, delimiter="|")), EVERY),
    FieldFile("tabs, in a .csv", "pandas", "a.csv", pandas_csv("a.csv", sep="\t"), EVERY),
    FieldFile("TSV", "csv", "a.tsv", put("a.tsv", written(TABLE, dialect="excel-tab")), EVERY),
    FieldFile(
        "TSV without quoting", "a database", "a.tsv",
        put("a.tsv", 'text\tlabel\n"Good news\tup\nit "fell"\tdown\n'), [('"Good news', "up"), ('it "fell"', "down")],
    ),
    FieldFile(
        "the delimiter in the first line", "Excel", "a.csv",
        put("a.csv", "sep=;\r\n" + written(TABLE, delimiter=";")), EVERY,
    ),
    FieldFile(
        "a title above the header", "a report", "a.csv",
        put("a.csv", "Survey of spring\nall rows,\n\n" + written(TABLE)), EVERY,
    ),
    FieldFile(
        "empty columns at the end", "a spreadsheet", "a.csv",
        put("a.csv", "text,label,,\r\nOrders rose,up,,\r\nSales fell,down\r\n"),
        PLAIN[:2],
    ),
    FieldFile(
        "line ends of an old Macintosh", "csv", "a.csv", put("a.csv", written(PLAIN, lineterminator="\r")), PLAIN
    ),
    FieldFile(
        "a cell of a megabyte", "pandas", "a.csv", pandas_csv("a.csv", frame([("word " * 2**18, "up"), *PLAIN])),
        cleaned([("word " * 2**18, "up"), *PLAIN]),
    ),
    FieldFile(
        "a carriage return in a cell", "pandas", "a.csv", pandas_csv("a.csv", frame([("one\rtwo", "up")])),
        [("one two", "up")],
    ),
    FieldFile(
        "CSV of R", "R", "a.csv", put("a.csv", '"","text","label"\n"1","Orders rose","up"\n"2","Sales fell","down"\n'),
        PLAIN[:2],
    ),
    FieldFile(
        "no header", "csv", "a.csv", put("a.csv", written(PLAIN, header=False)),
        line="a.csv: no column `text` for the text; there are: `Orders rose`, `up`. If the file has no header, write",
    ),
    FieldFile(
        "no header, as params.yaml says", "csv", "a.csv", put("a.csv", written(TABLE, header=False)), EVERY,
        settings={"header": False, "columns": {"text": "column1", "label": "column2"}},
    ),
    FieldFile(
        "a quote that is left open", "by hand", "a.csv", put("a.csv", 'text,label\nfine,up\n"left open,down\n'),
        line="a.csv, line 3: not a valid table: unexpected end of data (is a quote left open? `quotes: none` reads",
    ),
    FieldFile(
        "a comma outside of quotes", "by hand", "a.csv", put("a.csv", "text,label\nRose, and much,up\n"),
        line="a.csv, line 2: 3 fields, but the header has 2",
    ),
    FieldFile(
        "a column that is there twice", "by hand", "a.csv", put("a.csv", "text,label,label\none,up,down\n"),
        line="a.csv, line 1: the column `label` is there twice",
    ),
    FieldFile(
        "other names of columns", "pandas", "a.csv",
        pandas_csv("a.csv", frame().set_axis(["message", "topic"], axis=1)),
        line="a.csv: no column `text` for the text; there are: `message`, `topic`; columns: {text: …} names another",
    ),
    FieldFile("a header alone", "pandas", "a.csv", pandas_csv("a.csv", frame([])), line="a.csv: empty, there are no"),
    FieldFile("an empty file", "touch", "a.csv", put("a.csv", ""), line="a.csv: empty, there are no rows in it"),
]  # fmt: skip

ENCODINGS = [
    FieldFile("UTF-8 with a mark", "pandas", "a.csv", pandas_csv("a.csv", encoding="utf-8-sig"), EVERY),
    FieldFile("UTF-16 with a mark and tabs", "Excel", "a.csv", pandas_csv("a.csv", sep="\t", encoding="utf-16"), EVERY),
    FieldFile("cp1252", "pandas", "a.csv", pandas_csv("a.csv", frame(FRENCH), encoding="cp1252"), FRENCH),
    FieldFile(
        "Shift-JIS", "pandas", "a.csv", pandas_csv("a.csv", frame(JAPANESE), encoding="shift_jis"),
        line="a.csv, line 2: byte 0x97 at offset 11 is not UTF-8; save the file as UTF-8, or name its encoding",
    ),
    *(
        FieldFile(
            f"{title}, as params.yaml says", "pandas", "a.csv", pandas_csv("a.csv", frame(rows), encoding=encoding),
            rows, settings={"encoding": encoding},
        )
        for title, encoding, rows in (
            ("Shift-JIS", "shift_jis", JAPANESE),
            ("Big5", "big5", CHINESE),
            ("KOI8-R", "koi8-r", RUSSIAN),
            ("GB18030", "gb18030", SIMPLIFIED),
        )
    ),
    FieldFile(
        "UTF-8 cut inside a letter", "head -c", "a.csv", put("a.csv", written(RUSSIAN).encode()[:-8]),
        line="a.csv, line 3: byte 0xd0 at offset 86 is not UTF-8",
    ),
]  # fmt: skip

LABELS = [
    FieldFile("labels 0, 1, 2", "pandas", "a.csv", pandas_csv("a.csv", NUMBERS), line=f"a.csv, line 2: {PROPOSAL}"),
    FieldFile(
        "labels 0, 1, 2 with their names", "pandas", "a.csv", pandas_csv("a.csv", NUMBERS), EVERY, settings=NAMED
    ),
    FieldFile(
        "labels 0.0, 1.0, 2.0", "pandas", "a.csv", pandas_csv("a.csv", NUMBERS.astype({"label": float})), EVERY,
        settings=NAMED,
    ),
    FieldFile(
        "true and false", "pandas", "a.csv", pandas_csv("a.csv", frame(PLAIN[:2], label=[True, False])), PLAIN[:2],
        settings={"columns": {"values": {True: "up", False: "down"}}},
    ),
    FieldFile(
        "labels in capitals", "pandas", "a.csv", pandas_csv("a.csv", frame(label=frame()["label"].str.upper())), EVERY
    ),
    FieldFile(
        "lists of one label", "json", "a.jsonl",
        put("a.jsonl", json_lines([{"text": text, "label": [label]} for text, label in TABLE])), EVERY,
    ),
    FieldFile(
        "lists as text", "pandas", "a.csv", pandas_csv("a.csv", frame(label=[[label] for _, label in TABLE])),
        line="""a.csv, line 2: unknown label "['up']"; allowed: up, down, flat. To name the label that each value""",
    ),
    FieldFile(
        "an empty label", "pandas", "a.csv", pandas_csv("a.csv", frame([*PLAIN, ("No label", None)])),
        line="a.csv, line 5: `label` is empty; allowed: up, down, flat; to leave such rows out, write filter: {keep:",
    ),
    FieldFile(
        "an empty label, left out", "pandas", "a.csv", pandas_csv("a.csv", frame([*PLAIN, ("No label", None)])), PLAIN,
        settings={"filter": {"keep": {"label": TASK.names}}},
    ),
    FieldFile(
        "NA in place of a label", "R", "a.csv", put("a.csv", 'text,label\n"Orders rose","up"\n"Unknown",NA\n'),
        line="a.csv, line 3: unknown label 'NA'; allowed: up, down, flat. To name",
    ),
    FieldFile(
        "an empty text", "pandas", "a.csv", pandas_csv("a.csv", frame([*PLAIN * 9, (None, "up")])), PLAIN,
    ),
    FieldFile(
        "NaN in place of a text", "json", "a.jsonl",
        put("a.jsonl", json_lines([{"text": text, "label": label} for text, label in PLAIN * 9]
                                  + [{"text": float("nan"), "label": "up"}])), PLAIN,
    ),
]  # fmt: skip

JSON = [
    *(
        FieldFile(f"JSON, orient {orient}", "pandas", "a.json", pandas_json("a.json", orient=orient), EVERY)
        for orient in ("records", "columns", "index", "split", "table")
    ),
    FieldFile(
        "JSON, orient values", "pandas", "a.json", pandas_json("a.json", orient="values"),
        line='a.json, line 1: must be a JSON object like {"text": …}, not a list',
    ),
    FieldFile("JSON lines", "pandas", "a.jsonl", pandas_json("a.jsonl", orient="records", lines=True), EVERY),
    FieldFile(
        "JSON lines with a mark and blank lines", "PowerShell", "a.jsonl",
        put("a.jsonl", ("\ufeff" + json_lines([{"text": t, "label": x} for t, x in TABLE])).replace("\n", "\r\n\r\n")),
        EVERY,
    ),
    FieldFile(
        "a list, in a .jsonl", "json", "a.jsonl",
        put("a.jsonl", json.dumps([{"text": t, "label": x} for t, x in TABLE], indent=2)), EVERY,
    ),
    FieldFile(
        "a list inside an object", "json", "a.json",
        put("a.json", json.dumps({"version": 2, "data": [{"text": t, "label": x} for t, x in TABLE]})), EVERY,
    ),
    FieldFile(
        "objects inside objects", "json", "a.jsonl",
        put("a.jsonl", json_lines([{"in": {"body": t}, "out": {"topic": x}} for t, x in TABLE])), EVERY,
        settings={"columns": {"text": "in.body", "label": "out.topic"}},
    ),
    FieldFile(
        "JSON that was cut", "head -c", "a.json", put("a.json", '[{"text": "one", "label": "up"},\n {"text": "tw'),
        line="a.json, line 2, column 11: not valid JSON: Unterminated string",
    ),
    FieldFile(
        "JSON lines, in a .csv", "json", "a.csv", put("a.csv", json_lines([{"text": t, "label": x} for t, x in PLAIN])),
        line="a.csv: not a .csv file but JSON: name it .jsonl or .json",
    ),
]  # fmt: skip

COLUMNS = [
    FieldFile("Parquet", "pandas", "a.parquet", lambda folder: frame().to_parquet(folder / "a.parquet"), EVERY),
    FieldFile(
        "Parquet with categories", "pandas", "a.parquet",
        lambda folder: frame().astype({"label": "category"}).to_parquet(folder / "a.parquet"), EVERY,
    ),
    FieldFile(
        "Parquet that was cut", "head -c", "a.parquet",
        lambda folder: put("a.parquet", frame().to_parquet()[:900])(folder),
        line="a.parquet: not a Parquet file, or damaged",
    ),
    FieldFile("Feather", "pandas", "a.feather", lambda folder: frame().to_feather(folder / "a.feather"), EVERY),
    FieldFile("ORC", "pandas", "a.orc", lambda folder: frame().to_orc(folder / "a.orc"), EVERY),
    FieldFile(
        "Parquet with numbers for labels", "datasets", "a.parquet",
        lambda folder: data_set(folder).to_parquet(folder / "a.parquet"), line=f"a.parquet, row 1: {PROPOSAL}",
    ),
    FieldFile(
        "a data set on the disk", "datasets", "saved", lambda folder: data_set(folder).save_to_disk(folder / "saved"),
        EVERY,
    ),
    FieldFile(
        "a data set of splits on the disk", "datasets", "saved", saved_splits,
        line="saved: a data set of several splits; name each in `splits`, such as {train: saved/train, test: saved/te",
    ),
    FieldFile(
        "a data set of splits, each named", "datasets", "saved", saved_splits, [*EVERY, ("An unlike text", "up")],
        settings={"splits": {"train": "saved/train", "test": "saved/test"}},
    ),
]  # fmt: skip

SHEETS = [
    FieldFile("Excel", "XlsxWriter", "pandas.xlsx", copied("pandas.xlsx"), EVERY),
    FieldFile("Excel, a title above the header", "openpyxl", "title_rows.xlsx", copied("title_rows.xlsx"), EVERY),
    FieldFile(
        "Excel, several sheets, dates", "openpyxl", "sheets_and_dates.xlsx", copied("sheets_and_dates.xlsx"), EVERY
    ),
    FieldFile(
        "Excel, labels in merged cells", "openpyxl", "merged_labels.xlsx", copied("merged_labels.xlsx"),
        line="merged_labels.xlsx, row 3: `label` is empty; allowed: up, down, flat; to leave such rows out, write",
    ),
    FieldFile(
        "Excel, in a .csv", "openpyxl", "a.csv", copied("title_rows.xlsx", "a.csv"),
        line="a.csv: not a .csv file but a zip file or an Excel workbook: name it .zip or .xlsx",
    ),
    FieldFile("old Excel", "xlwt", "old.xls", copied("old.xls"), line="old.xls: cannot read `.xls`; allowed: .jsonl, "),
    FieldFile("OpenDocument", "odfpy", "office.ods", copied("office.ods"), line="office.ods: cannot read `.ods`; all"),
]  # fmt: skip

PACKED = [
    FieldFile("gzip", "pandas", "a.csv.gz", pandas_csv("a.csv.gz"), EVERY),
    FieldFile("xz", "pandas", "a.csv.xz", pandas_csv("a.csv.xz"), EVERY),
    FieldFile(
        "gzip that was cut", "head -c", "a.csv.gz", put("a.csv.gz", gzip.compress(written(TABLE).encode())[:60]),
        line="a.csv.gz: not a .gz file, or damaged",
    ),
    FieldFile(
        "gzip, named .csv", "gzip", "a.csv", put("a.csv", gzip.compress(written(TABLE).encode())),
        line="a.csv: not a .csv file but a gzip file: end its name in .gz",
    ),
    FieldFile("zip", "pandas", "a.csv.zip", pandas_csv("a.csv.zip"), EVERY),
    FieldFile(
        "zip with a folder", "zipfile", "a.zip", put("a.zip", zipped({"d/": "", "d/a.csv": written(TABLE)})), EVERY
    ),
    FieldFile(
        "zip of macOS", "zipfile", "a.zip",
        put("a.zip", zipped({"a.csv": written(TABLE), "__MACOSX/._a.csv": "x", ".DS_Store": "x"})), EVERY,
    ),
    FieldFile(
        "zip of two files", "zipfile", "a.zip", put("a.zip", zipped({"a.csv": "text\n", "b.csv": "text\n"})),
        line="a.zip: 2 files inside (a.csv, b.csv); needs exactly one: unpack the archive",
    ),
    FieldFile(
        "zip with a password", "pyzipper", "secret.zip", copied("secret.zip"),
        line="secret.zip: needs a password, or is packed in an unknown way: unpack it",
    ),
    FieldFile("tar", "tarfile", "a.tar.gz", tarred, line="a.tar.gz: cannot read `.tar`; allowed: .jsonl, .json, .csv,"),
    FieldFile("a folder for each label", "a file manager", "reviews", folder_per_label,
              sorted(PLAIN, key=lambda row: row[1])),
    FieldFile(
        "an empty folder", "mkdir", "reviews", lambda folder: (folder / "reviews").mkdir(),
        line="reviews: a folder without text files; needs a folder for each label, with its files in .txt",
    ),
    FieldFile("no file", "nobody", "a.csv", lambda folder: None, line="a.csv: no such file"),
]  # fmt: skip

ANNOTATION_TOOLS = [
    FieldFile("JSON", "Label Studio", "a.json", put("a.json", json.dumps(exported(studio))), EVERY, settings=STUDIO),
    FieldFile(
        "JSON-MIN", "Label Studio", "a.json",
        put("a.json", json.dumps(exported(lambda t, x, i: {"id": i, "text": t, "sentiment": x, "annotator": 1}))),
        EVERY,
        settings={"columns": {"label": "sentiment"}},
    ),
    FieldFile(
        "JSON lines", "doccano", "a.jsonl",
        put("a.jsonl", json_lines(exported(lambda t, x, i: {"id": i, "text": t, "label": [x], "Comments": []}))), EVERY,
    ),
    FieldFile(
        "JSON lines of choices", "Prodigy", "a.jsonl",
        put("a.jsonl", json_lines(exported(lambda t, x, i: {"text": t, "accept": [x], "answer": "accept"}))), EVERY,
        settings={"columns": {"label": "accept"}},
    ),
    FieldFile(
        "JSON of records", "Argilla", "a.json", put("a.json", json.dumps(exported(argilla))), EVERY,
        settings={"columns": {"text": "fields.text", "label": "responses.label.value"}},
    ),
]  # fmt: skip


def refused(kind: str, tool: str, name: str, write: Callable[[Path], Any]) -> FieldFile:
    suffix = "." + name.rpartition(".")[2]
    return FieldFile(
        kind, tool, name, write, line=f"{name}: cannot read `{suffix}`; allowed: .jsonl, .json, .csv, .tsv,"
    )


NO_TABLES = [
    refused("pickle", "pickle", "a.pkl", put("a.pkl", pickle.dumps(Trap()))),
    FieldFile(
        "pickle, named .csv", "pickle", "a.csv", put("a.csv", pickle.dumps(Trap())),
        line="a.csv: not a .csv file but a pickle, which is never opened: write it as Parquet or CSV",
    ),
    refused("NumPy", "numpy", "a.npz", lambda folder: np.savez(folder / "a.npz", text=frame()["text"].to_numpy(str))),
    refused("SQLite", "sqlite3", "a.sqlite", database),
    refused("Stata", "pandas", "a.dta", lambda folder: frame(PLAIN).to_stata(folder / "a.dta")),
    refused("SPSS", "pyreadstat", "survey.sav", copied("survey.sav")),
    refused("R", "pyreadr", "frame.rds", copied("frame.rds")),
    refused("HTML", "pandas", "a.html", lambda folder: frame().to_html(folder / "a.html")),
    FieldFile(
        "HTML, named .csv", "a web page", "a.csv", lambda folder: frame().to_html(folder / "a.csv"),
        line="a.csv: not a .csv file but HTML or XML: write a row for each record, as CSV or JSON lines",
    ),
    refused("XML", "by hand", "a.xml", put("a.xml", "<rows><row label='up'>Orders rose</row></rows>")),
    refused("YAML", "by hand", "a.yaml", put("a.yaml", "- {text: Orders rose, label: up}\n")),
    refused("fastText", "by hand", "a.txt", put("a.txt", "__label__up Orders rose\n__label__down Sales fell\n")),
    refused("CoNLL", "by hand", "a.conll", put("a.conll", "Orders NNS O\nrose VBD O\n\n")),
    refused("a document", "Word", "a.docx", put("a.docx", zipped({"word/document.xml": "<w/>"}))),
    refused("an old document", "Word", "a.doc", put("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(64))),
    refused("PDF", "by hand", "a.pdf", put("a.pdf", "%PDF-1.4\n")),
    FieldFile("a name without suffix", "by hand", "rows", put("rows", written(PLAIN)),
              line="rows: cannot read `a name without suffix`; allowed: .jsonl, .json, .csv,"),
]  # fmt: skip

FILES = {
    "tables of text": TABLES,
    "encodings": ENCODINGS,
    "labels and texts": LABELS,
    "JSON": JSON,
    "columns": COLUMNS,
    "workbooks": SHEETS,
    "packed, folders": PACKED,
    "annotation tools": ANNOTATION_TOOLS,
    "no tables": NO_TABLES,
}


def listing(group: str, file: FieldFile, outcome: tuple[Rows | None, str]) -> str:
    """A line of the table that is kept in `benchmarks/results/files_read.txt`."""
    rows, text = outcome
    keys = json.dumps(file.settings, ensure_ascii=False)
    happens = f"error: {text}" if rows is None else f"{len(rows)} rows. {text}".rstrip()
    return " | ".join([group, file.kind, file.tool, file.name, keys if file.settings else "none", happens])


HEADER = "group | file | written by | name | keys of the source | what happens"
