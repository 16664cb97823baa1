"""Files as they come: encodings, delimiters, quoting, no header, compression, JSON in its forms, rows to leave out."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillery.config.load import validate_section
from distillery.config.schema import ColumnNames, SourceConfig
from distillery.data.prepare import PreparedSource, prepare_source
from distillery.data.readers import read_rows, read_source
from distillery.data.records import FileFormat, RawRows
from distillery.data.storage import read_split, write_source
from distillery.errors import UserError
from distillery.tasks.schema import Task

CASES = Path(__file__).parent / "cases"
TASK = Task(kind="classification", labels={"up": "rises", "down": "falls", "flat": "neither"})
SHARES = {"train": 0.4, "pool": 0.2, "validation": 0.2, "test": 0.2}


def prepare(path: Path, **settings: Any) -> PreparedSource:
    raw = {"source": path.name, "task": "x", "split": SHARES, "near_duplicate": 1.0} | settings
    return prepare_source("x", validate_section(SourceConfig, raw, "params.yaml"), TASK, path.parent)


def read(folder: Path, name: str, content: bytes | str, **form: Any) -> RawRows:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_rows(name, folder, FileFormat(**form))


def error(folder: Path, name: str, content: bytes | str, **form: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, name, content, **form)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------- files of people


@pytest.mark.parametrize(
    ("file", "settings", "decision"),
    [
        ("semicolon.csv", {}, "The delimiter of the file is `;`; `delimiter:` names another."),
        ("tsv_without_quotes.tsv", {}, None),
        ("empty_row.csv", {}, "1 rows with an empty text were left out, the first is empty_row.csv, line 22."),
        ("answers_column.jsonl", {}, "Columns left out, since their names have another use: `answers`."),
        (
            "arms_in_group.csv",
            {"columns": {"group": None}},
            "Columns left out, since their names have another use: `group`.",
        ),
        ("user_in_id.csv", {"columns": {"id": None}}, "Columns left out, since their names have another use: `id`."),
        (
            "no_header_latin1.csv",
            {"header": False, "columns": {"text": "column2", "label": "column1"}},
            "The encoding of the file is taken for cp1252; `encoding:` names another.",
        ),
        (
            "annotator_rejects.jsonl",
            {},
            "15 rows without `accept` in the column `answer` were left out; filter: {keep: {answer: [accept, reject, ",
        ),
    ],
)
def test_a_file_as_people_have_it_is_read(tmp_path, file, settings, decision):
    prepared = prepare(CASES / file, **settings)
    rejected = 15 if file == "annotator_rejects.jsonl" else 0
    assert len(prepared.rows) == 60 - rejected
    rose = prepared.rows["text"].str.startswith("Orders rose")
    assert set(prepared.rows["label"][rose]) == {"up"} and not prepared.rows["text"].str.contains('^"|"$').any()
    assert [line[: len(decision or "")] for line in prepared.audit["decisions"]] == ([decision] if decision else [])
    write_source(prepared, tmp_path / "out")
    assert sum(len(read_split(tmp_path / "out", split)) for split in SHARES) == len(prepared.rows)


def test_what_was_left_out_is_in_the_audit():
    rejects = prepare(CASES / "annotator_rejects.jsonl").audit
    assert rejects["rows_read"] == 60 and rejects["dropped"]["not_kept"] == 15
    assert prepare(CASES / "empty_row.csv").audit["dropped"]["empty"] == 1
    assert prepare(CASES / "answers_column.jsonl").audit["columns_left_out"] == ["answers"]
    assert prepare(CASES / "arms_in_group.csv", columns={"group": None}).audit["columns_left_out"] == ["group"]


def test_texts_of_a_file_without_header_keep_their_letters():
    columns = {"text": "column2", "label": "column1"}
    prepared = prepare(CASES / "no_header_latin1.csv", header=False, encoding="latin-1", columns=columns)
    assert prepared.rows["text"].str.endswith("à Zürich").all() and prepared.audit["decisions"] == []


def message(file: str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        prepare(CASES / file, **settings)
    return str(caught.value)


def test_the_line_proposes_the_way_out():
    assert message("no_header_latin1.csv").endswith(
        "If the file has no header, write header: false, columns: {text: column2, label: column1}"
    )
    assert message("arms_in_group.csv").endswith(
        " (the column `group` was taken for its name; columns: {group: null} takes none)"
    )
    assert message("user_in_id.csv").endswith(" (a column taken for its name; columns: {id: null} takes none)")
    assert "taken for its name" not in message("arms_in_group.csv", columns={"group": "group"})
    assert message("empty_row.csv", max_empty=0.01).startswith(
        "empty_row.csv, line 22: `text` is empty; every row needs a text, and 1 of 61 have none (max_empty: 0.01 leaves"
    )


def test_columns_taken_by_their_names_are_shown(tmp_path):
    rows = [json.loads(line) for line in (CASES / "answers_column.jsonl").read_text().splitlines()]
    rows = [{"id": i, "text": row["text"], "label": row["label"], "rationale": "so"} for i, row in enumerate(rows)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = "Columns taken for their names: `id`, `rationale`; columns: {id: null, rationale: null} takes none."
    assert prepare(tmp_path / "a.jsonl").audit["decisions"] == [shown]
    assert prepare(tmp_path / "a.jsonl", columns={"id": "id", "rationale": "rationale"}).audit["decisions"] == []


def test_rows_to_keep_are_named_by_a_column_and_its_values(tmp_path):
    every = {"keep": {"answer": ["accept", "reject", "ignore"]}}
    everything = prepare(CASES / "annotator_rejects.jsonl", filter=every)
    assert len(everything.rows) == 60 and everything.audit["decisions"] == []
    rejected = prepare(CASES / "annotator_rejects.jsonl", filter={"keep": {"answer": ["reject"]}})
    assert len(rejected.rows) == 15
    with pytest.raises(UserError, match=r"^annotator_rejects.jsonl: no row has 7 in the column `answer`$"):
        prepare(CASES / "annotator_rejects.jsonl", filter={"keep": {"answer": [7]}})
    with pytest.raises(UserError, match=r"^annotator_rejects.jsonl: no column `status`, which filter.keep names$"):
        prepare(CASES / "annotator_rejects.jsonl", filter={"keep": {"status": ["done"]}})
    rows = [json.loads(line) for line in (CASES / "annotator_rejects.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):  # rows that are left out are not checked either
        row |= {"answer": None, "sure": i % 4 > 0, "states": ["done", "seen"]} | ({} if i % 4 else {"label": "unsure"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(prepare(tmp_path / "a.jsonl", filter={"keep": {"sure": [True], "states": ["done"]}}).rows) == 45


def test_rejected_rows_only_are_no_gold(tmp_path):
    rows = [json.loads(line) | {"answer": "reject"} for line in (CASES / "annotator_rejects.jsonl").open()]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"no row has accept in the column `answer`; filter: {keep: {answer"):
        prepare(tmp_path / "a.jsonl")


@pytest.mark.parametrize("kind", ["classification", "qa"])
@pytest.mark.parametrize("column", ["answers", "n_options", "extra"])
def test_extra_columns_of_mixed_types_are_written(tmp_path, column, kind):
    """`answers` and `n_options` are names that rows of other tasks have: an extra column must not be taken for them."""
    values = [1, "two", None, 2.5, [3], {"four": 4}, True]
    rows = [json.loads(line) for line in (CASES / "answers_column.jsonl").open()]
    rows = [{"text": row["text"], "label": row["label"], column: values[i % 7]} for i, row in enumerate(rows)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TASK if kind == "classification" else Task(kind="qa")
    spec = {"source": "a.jsonl", "task": "x", "split": SHARES, "near_duplicate": 1.0}
    spec = validate_section(SourceConfig, spec, "params.yaml")
    prepared = prepare_source("x", spec, task, tmp_path)
    write_source(prepared, tmp_path / "out")
    train = read_split(tmp_path / "out", "train")
    assert prepared.audit["columns_left_out"] == ([] if column == "extra" else [column])
    assert (column in train) == (column == "extra" or (column, kind) == ("answers", "qa"))


# ------------------------------------------------------------------------------------------------ encoding

WESTERN = {
    "German": "Größe und Übermut führen zu Ärger, sagte „Jürgen“ für 5 €",
    "French": "L’été dernier, l’économie française a créé des emplois à Orléans — où ça? « Là-bas »",
    "Spanish": "¿Dónde está el año? ¡Mañana subirán los precios en España!",
    "Portuguese": "A inflação não caiu; São Paulo terá eleições à tarde",
    "Danish": "Ørsted køber åen på Færøerne",
    "Finnish": "Yhtiön tulos parani selvästi; päätös jäi Jyväskylään",
    "prices": "up 5° at £3 ± 2 § 4 … “quoted” – it’s fine",
}
OTHERS = {
    "Polish": ("cp1250", "Zażółć gęślą jaźń, spółka wzrosła"),
    "Czech": ("cp1250", "Příliš žluťoučký kůň úpěl ďábelské ódy"),
    "Russian": ("cp1251", "Прибыль компании выросла"),
    "Russian for Unix": ("koi8-r", "Прибыль компании выросла"),
    "Greek": ("iso8859-7", "Τα κέρδη αυξήθηκαν"),
    "French of a Macintosh": ("mac_roman", "L'été dernier l'économie française a créé des emplois"),
    "German of DOS": ("cp437", "Größe und Übermut führen zu Ärger"),
    "Japanese": ("shift_jis", "利益が増加した"),
    "Chinese": ("gb18030", "公司利润增长"),
    "Korean": ("euc_kr", "이익이 증가했다"),
}


@pytest.mark.parametrize("language", WESTERN)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_western_texts_that_are_not_utf8_are_read_and_the_encoding_is_shown(tmp_path, language, name):
    text = WESTERN[language]
    content = f'text,label\n"{text}",up\n' if name == "a.csv" else json.dumps({"text": text}, ensure_ascii=False)
    raw = read(tmp_path, name, content.encode("cp1252"))
    assert raw.rows[0]["text"] == text
    assert raw.decisions == ["The encoding of the file is taken for cp1252; `encoding:` names another."]
    assert read(tmp_path, name, content).decisions == []


@pytest.mark.parametrize("language", OTHERS)
def test_other_encodings_are_read_where_params_name_them_and_never_guessed(tmp_path, language):
    encoding, text = OTHERS[language]
    content = f'text,label\n"{text}",up\n'.encode(encoding)
    line = error(tmp_path, "a.csv", content)
    assert line.startswith("a.csv, line 2: byte 0x") and "name its encoding: `encoding:` cp1252" in line
    raw = read(tmp_path, "a.csv", content, encoding=encoding)
    assert raw.rows == [{"text": text, "label": "up"}] and raw.decisions == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_encodings_are_seen_with_and_without_a_mark(tmp_path, encoding):
    raw = read(tmp_path, "a.csv", "text,label\nprofit rose to 5 €,up\n".encode(encoding))
    assert raw.rows == [{"text": "profit rose to 5 €", "label": "up"}]
    assert raw.decisions == [f"The encoding of the file is taken for {encoding}; `encoding:` names another."]


def test_an_encoding_that_does_not_fit_is_one_line(tmp_path):
    line = error(tmp_path, "a.csv", b"text,label\nok,up\ncaf\xe9,up\n", encoding="utf-8")
    assert line == "a.csv, line 3: byte 0xe9 at offset 20 is not utf-8, which `encoding` names"


# -------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.csv", "text;label\nup by 1,5, says it;up\n", [["up by 1,5, says it", "up"]]),
        ("a.csv", "text|label\na, b; c|up\n", [["a, b; c", "up"]]),
        ("a.tsv", "text,label\na,up\n", [["a", "up"]]),
        ("a.tab", "text\tlabel\na\tup\n", [["a", "up"]]),
        ("a.csv", 'text,label\n"he said \\"up\\", twice",up\n', [['he said "up", twice', "up"]]),
        ("a.tsv", 'text\tlabel\n"Up" he said\tup\n', [['"Up" he said', "up"]]),
        ("a.tsv", 'text\tlabel\n"open\tup\nnext\tdown\n', [['"open', "up"], ["next", "down"]]),
        # two stray quotes: read as quoting, the two rows would be one
        ("a.tsv", 'label\ttext\nup\t"Good news\ndown\tit fell"\n', [["up", '"Good news'], ["down", 'it fell"']]),
        ("a.tsv", 'text\tlabel\n"two\nlines"\tup\n', [["two\nlines", "up"]]),
        ("a.csv", "text,label\none\rtwo,up\n", [["one\rtwo", "up"]]),
        ("a.csv", "text,label\r\none\rtwo,up\r\n", [["one\rtwo", "up"]]),
        ("a.csv", "text,label\rone,up\rtwo,down\r", [["one", "up"], ["two", "down"]]),  # an old Macintosh
        ("a.csv", "text,label,,\none,up,,\n", [["one", "up", ""]]),  # the columns without a name are one
        ("a.csv", "text,label\none,up,,\n", [["one", "up"]]),
        ("a.csv", ",text,label\n0,one,up\n", [["0", "one", "up"]]),
    ],
)
def test_tables_as_programs_write_them(tmp_path, name, content, rows):
    assert [list(row.values()) for row in read(tmp_path, name, content).rows] == rows


def test_a_cell_of_a_megabyte_is_read_and_pandas_bare_carriage_return_too(tmp_path):
    texts = ["word " * 200_000, "one\rtwo", "plain"]
    pd.DataFrame({"text": texts, "label": "up"}).to_csv(tmp_path / "a.csv", index=False)
    limit = csv.field_size_limit()
    assert [row["text"] for row in read_rows("a.csv", tmp_path).rows] == texts
    assert csv.field_size_limit() == limit


def test_a_table_without_header_has_numbered_columns(tmp_path):
    raw = read(tmp_path, "a.csv", "up,one\ndown,two\n", header=False)
    assert raw.rows == [{"column1": "up", "column2": "one"}, {"column1": "down", "column2": "two"}]
    assert raw.numbers == [1, 2]
    line = error(tmp_path, "a.csv", "up,one\ndown,two,three\n", header=False)
    assert line == "a.csv, line 2: 3 fields, but the first row has 2 columns"


def test_only_lines_above_the_header_are_left_out_and_lines_keep_their_numbers(tmp_path):
    names = ("text", "label")
    content = 'A survey\n\ntext;label\n"one;\ntwo";up\nthree;down\n'
    raw = read(tmp_path, "a.csv", content, names=names)
    assert raw.rows == [{"text": "one;\ntwo", "label": "up"}, {"text": "three", "label": "down"}]
    assert raw.numbers == [4, 6] and raw.decisions[0] == "2 lines above the header of the table were left out."
    assert error(tmp_path, "a.csv", content + "four\n", names=names).startswith(
        "a.csv, line 7: 1 fields, but the header"
    )
    for content in ("text,label\none,up\ntext,label\n", "text,topic\none,up\ntwo,label\n"):
        raw = read(tmp_path, "a.csv", content, names=names)
        assert len(raw.rows) == 2 and raw.decisions == []
    far = "title\n" * 25 + "text,label\none,up\n"
    assert list(read(tmp_path, "a.csv", far, names=names).rows[0]) == ["title"]


@pytest.mark.parametrize("column", ["ORCID", "PAR1", "ARROW1", "BZh", "<b>", "[1]", "{a}"])
def test_a_header_may_begin_as_a_file_of_another_kind_does(tmp_path, column):
    assert read(tmp_path, "a.csv", f"{column},text\nx,one\n").rows == [{column: "x", "text": "one"}]


@pytest.mark.parametrize("start", ["<html><p>one</p>", '{"a": 1}', '[{"a": 1}]'])
def test_a_table_without_header_may_begin_with_markup_or_json(tmp_path, start):
    raw = read(tmp_path, "a.tsv", f"{start}\tup\n", header=False)
    assert raw.rows == [{"column1": start, "column2": "up"}]


@pytest.mark.parametrize("write", ["to_parquet", "to_feather", "to_orc"])
def test_a_binary_file_with_the_name_of_a_table_is_named(tmp_path, write):
    getattr(pd.DataFrame({"text": ["one"]}), write)(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"^a.csv: not a .csv file but an? (Parquet|Feather|ORC) file: name it"):
        read_rows("a.csv", tmp_path)


def test_the_message_is_that_of_the_delimiter_of_the_header(tmp_path):
    assert error(tmp_path, "a.csv", "text;label\none;up\ntwo\n") == "a.csv, line 3: 1 fields, but the header has 2"
    assert error(tmp_path, "a.csv", 'text,label\n"one"x,up\n').startswith(
        "a.csv, line 2: not a valid table: ',' expected"
    )


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
CELLS |= st.text("ab,;|\t\"'\\\n\r €", max_size=8)
CELLS = CELLS.map(lambda text: text.strip("\r"))  # at the end of a line, nobody can tell it from the line's end


@settings(max_examples=300)
@given(st.data())
def test_every_table_that_is_written_is_read_back_equal(tmp_path_factory, data):
    """Random cells in all delimiters, quotings, line ends, encodings and compressions; most of it is not named."""
    n = data.draw(st.integers(2, 4))
    row = st.lists(CELLS, min_size=n, max_size=n).filter(lambda cells: any(cell.strip() for cell in cells))
    header, rows = ["text", "label", "id", "note"][:n], data.draw(st.lists(row, min_size=1, max_size=4))
    delimiter, line_end = data.draw(st.sampled_from(",\t;|")), data.draw(st.sampled_from(["\n", "\r\n"]))
    quotes = data.draw(st.sampled_from(["doubled", "backslash", "none"]))
    ways = {
        "doubled": {"quoting": data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]))},
        "backslash": {"quoting": csv.QUOTE_ALL, "doublequote": False, "escapechar": "\\"},
        "none": {"quoting": csv.QUOTE_NONE, "quotechar": None},
    }
    if quotes == "none":
        plain = str.maketrans(dict.fromkeys(f"{delimiter}\n\r", " "))
        rows = [[cell.translate(plain) or "x" for cell in cells] for cells in rows]
        rows = [cells for cells in rows if any(cell.strip() for cell in cells)] or [["x"] * n]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=line_end, **ways[quotes]).writerows([header, *rows])
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030"]))
    suffix = data.draw(st.sampled_from([".csv", ".tsv", ".csv.gz", ".tsv.zip"]))
    content, folder = text.getvalue().encode(encoding), tmp_path_factory.getbasetemp()
    content = {".gz": gzip.compress, ".zip": zipped}.get(suffix[4:], bytes)(content)
    named = {"encoding": encoding} if encoding == "gb18030" else {}
    named |= {"quotes": quotes} if quotes != "doubled" or delimiter == "\t" else {}
    raw = read(folder, f"any{suffix}", content, **named)
    assert [list(record.values()) for record in raw.rows] == rows and list(raw.rows[0]) == header


def zipped(content: bytes, name: str = "inner.tsv") -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("__MACOSX/._inner.tsv", b"x")
        file.writestr(name, content)
    return archive.getvalue()


# ---------------------------------------------------------------------------------- compression and JSON


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".zip"])
def test_compressed_files_are_read_and_damaged_ones_are_one_line(tmp_path, suffix):
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    compress[".zip"] = lambda content: zipped(content, "in/a.jsonl")
    content = compress["." + suffix.rpartition(".")[2]](b'{"text": "one"}\n' * 100)
    assert len(read(tmp_path, f"a{suffix}", content).rows) == 100
    line = error(tmp_path, f"a{suffix}", content[: len(content) // 2])
    assert line == f"a{suffix}: not a .{suffix.rpartition('.')[2]} file, or damaged"


def test_an_archive_of_several_files_is_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.csv", b"text\n")
        file.writestr("b.csv", b"text\n")
    with pytest.raises(UserError, match=r"^a.zip: 2 files inside \(a.csv, b.csv\); needs exactly one"):
        read_rows("a.zip", tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"text": "one"}, {"text": "two"}]'),
        ("a.jsonl", '[{"text": "one"},\n {"text": "two"}]\n'),
        ("a.json", '[\n {"text": "one"},\n {"text": "two"}\n]'),
        ("a.json", '{"text": "one"}\n{"text": "two"}\n'),
        ("a.ndjson", '{"text": "one"}\n\n{"text": "two"}'),
        ("a.json", '{"version": 2, "data": [{"text": "one"}, {"text": "two"}]}'),
        ("a.json", '{"text": {"0": "one", "1": "two"}}'),
    ],
)
def test_json_in_its_public_forms(tmp_path, name, content):
    assert read(tmp_path, name, content).rows == [{"text": "one"}, {"text": "two"}]


def test_one_record_with_a_list_of_objects_is_a_record(tmp_path):
    record = {"text": "one", "spans": [{"start": 0}]}
    assert read(tmp_path, "a.jsonl", json.dumps(record)).rows == [record]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[{"text": "one"},\n {"text": ]', "a.json, line 2, column 11: not valid JSON: Expecting value"),
        ('[{"text": "one"}, 3]', "a.json, line 1: must be a JSON object like"),
        ('[{"text": "\\ud83d"}]', "a.json, row 1: half of a surrogate pair"),
        ("[]", "a.json: empty, there are no rows in it"),
        ("3", "a.json, line 1: must be a JSON object like"),
    ],
)
def test_json_that_is_no_table_is_one_line(tmp_path, content, line):
    assert error(tmp_path, "a.json", content).startswith(line)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab"), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150)
@given(
    st.lists(st.dictionaries(st.sampled_from(["text", "label", "x"]), JSON_VALUES, min_size=1), min_size=2, max_size=4),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_every_list_of_records_is_read_back_equal(tmp_path_factory, records, indent, ascii_only):
    folder = tmp_path_factory.getbasetemp()
    whole = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
    lines = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    for name, content in (("any.json", whole), ("any.jsonl", whole), ("any.json", lines), ("any.jsonl", lines)):
        assert read(folder, name, content).rows == records


def test_a_source_reads_with_the_format_that_params_name(tmp_path):
    (tmp_path / "a.csv").write_bytes("up;'Прибыль'\n".encode("cp1251"))
    spec = SourceConfig(source="a.csv", task="x", columns=ColumnNames(label=None), encoding="cp1251", delimiter=";",
                        quotes="none", header=False)  # fmt: skip
    assert read_source(spec, tmp_path).rows == [{"column1": "up", "column2": "'Прибыль'"}]
