"""Workbooks as libraries write them, and made by hand: the first sheet, read as a table saved from it would be."""

import io
import zipfile
from pathlib import Path

import pytest

from distillery.data.excel import read_xlsx
from distillery.data.readers import read_rows
from distillery.data.records import FileFormat
from distillery.errors import UserError

CASES = Path(__file__).parent / "cases"
MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


def workbook(*rows: str, shared: str = "", target: str = "worksheets/sheet1.xml") -> bytes:
    """A workbook whose one sheet has these rows as XML."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        sheets = '<sheets><sheet name="a" sheetId="1" r:id="r1"/></sheets>'
        archive.writestr("xl/workbook.xml", f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}">{sheets}</workbook>')
        archive.writestr("xl/_rels/workbook.xml.rels", f'<R><Relationship Id="r1" Target="{target}"/></R>')
        data = "".join(f"<row>{row}</row>" for row in rows)
        sheet = f'<worksheet xmlns="{MAIN}"><sheetData>{data}</sheetData></worksheet>'
        archive.writestr("xl/worksheets/sheet1.xml", sheet)
        if shared:
            archive.writestr("xl/sharedStrings.xml", f'<sst xmlns="{MAIN}">{shared}</sst>')
    return file.getvalue()


def listed(offset: int, value: bytes) -> bytes:
    """A workbook of which each entry in the zip file's list has the bytes `value` at `offset`."""
    entry = b"PK\x01\x02"
    first, *entries = workbook(inline("a"), inline("x")).split(entry)
    return entry.join([first, *(part[: offset - 4] + value + part[offset - 4 + len(value) :] for part in entries)])


def inline(*texts: str) -> str:
    return "".join(f'<c t="inlineStr"><is><t>{text}</t></is></c>' for text in texts)


@pytest.mark.parametrize(
    ("file", "last"), [("openpyxl.xlsx", "He said A twice"), ("xlsxwriter.xlsx", "He said _x0041_ twice")]
)
def test_workbooks_of_two_libraries(file, last):
    """Line breaks, umlauts, an emoji, numbers, truth values, an empty row, cells that are missing, a second sheet."""
    raw = read_rows(file, CASES)
    assert raw.numbers == [2, 3, 5, 6]
    assert raw.rows[0] == {
        "Message": "  Where is it?\nPlease",
        "Topic": "question",
        "stars": "5",
        "ok": "TRUE",
        "when": "45413",
    }
    assert raw.rows[1] == {
        "Message": "Größe 42, „schön“ 😀",
        "Topic": "praise",
        "stars": "4.5",
        "ok": "FALSE",
        "when": None,
    }
    assert raw.rows[2]["Message"] == "=1+1 is a text" and raw.rows[2]["stars"] is None
    assert raw.rows[3]["Message"] == last
    sheets = ["Of 2 sheets of the workbook, the first is read: `messages`."]
    assert raw.decisions == (sheets if file == "openpyxl.xlsx" else [])


def test_runs_reading_aids_errors_and_formulas():
    shared = "<si><r><t>up </t></r><r><t>now</t></r><rPh><t>aid</t></rPh></si>"
    cells = '<c t="s"><v>0</v></c><c t="e"><v>#N/A</v></c><c t="str"><f>A1</f><v>formula</v></c><c><v>1e20</v></c>'
    raw = read_xlsx("a.xlsx", workbook(inline("a", "b", "c", "d"), cells, shared=shared))
    assert raw.rows == [{"a": "up now", "b": None, "c": "formula", "d": "1e+20"}]


def test_cells_stand_where_their_reference_names_and_targets_may_be_absolute():
    row = '<c r="AB7" t="inlineStr"><is><t>far</t></is></c>'
    content = workbook(inline("a", "b"), row, target="/xl/worksheets/sheet1.xml")
    raw = read_xlsx("a.xlsx", content, FileFormat(header=False))
    assert raw.rows[0]["column1"] == "a" and raw.rows[1]["column28"] == "far" and raw.rows[1]["column1"] is None
    assert "column28" in raw.rows[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no zip", "a.xlsx: not an Excel workbook in .xlsx, damaged, or with a password"),
        (b"\xd0\xcf\x11\xe0 a workbook with a password", "not an Excel workbook"),
        (workbook(inline("a"))[:300], "not an Excel workbook"),
        (workbook(inline("a", "a"), inline("x", "y")), "a.xlsx, row 1: the column `a` is there twice"),
        (workbook(), "a.xlsx: empty, there are no rows in it"),
        (workbook(inline("text", "label")), "a.xlsx: empty"),
        (listed(10, b"\x08"), "not an Excel workbook"),  # as if compressed
        (listed(20, b"\xff\xff\x00\x00" * 2), "not an Excel workbook"),  # longer than the file
        (listed(8, b"\x01"), "damaged, or with a password"),
        (workbook(inline("a"), "<c"), "not an Excel workbook"),
        (workbook(inline("a"), '<c t="s"><v>3</v></c>'), "not an Excel workbook"),
    ],
)
def test_what_is_no_workbook_ends_in_one_line(tmp_path, content, message):
    (tmp_path / "a.xlsx").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_rows("a.xlsx", tmp_path, FileFormat())
    assert message in str(caught.value) and "\n" not in str(caught.value)
