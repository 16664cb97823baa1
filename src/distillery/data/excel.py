"""Read the first sheet of an Excel workbook (.xlsx) as text, as a table saved from it would be."""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from xml.etree import ElementTree

from distillery.data.records import FileFormat, RawRows, header_place
from distillery.errors import UserError

DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    RuntimeError,
    KeyError,
    IndexError,
    ValueError,
    ElementTree.ParseError,
)
MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"


def read_xlsx(name: str, content: bytes, form: FileFormat | None = None) -> RawRows:
    """The records of the first sheet: its first filled row names the columns. Every cell is text or None.

    A lower row names them where it holds all of `form.names`.

    Numbers have their digits without a decimal `.0`, truth values are TRUE and FALSE, dates are Excel's day numbers.
    Raises UserError when the file is no workbook, or a column is there twice.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            sheets = _sheets(archive)
            rows = list(_sheet_rows(archive, sheets[0][1]))
    except DAMAGED:  # a RuntimeError is that of a password, or of a way to compress that Python lacks
        raise UserError(f"{name}: not an Excel workbook in .xlsx, damaged, or with a password") from None
    decisions = []
    if len(sheets) > 1:
        decisions.append(f"Of {len(sheets)} sheets of the workbook, the first is read: `{sheets[0][0]}`.")
    has_header = form is None or form.header
    filled = [(number, cells) for number, cells in rows if any(cells.values())]
    if form and has_header and (title := header_place((list(cells.values()) for _, cells in filled), form.names)):
        decisions.append(f"{title} rows above the header of the table were left out.")
        filled, rows = filled[title:], rows[title:]
    if not filled:
        return RawRows(name, "row", [], [])
    width = 1 + max(max(cells) for _, cells in filled)
    header = [f"column{n + 1}" for n in range(width)]
    if has_header:
        first, filled = filled[0][1], filled[1:]
        header = [(first.get(n) or "").strip() for n in range(width)]
        repeated = [column for column, n in Counter(header).items() if n > 1 and column]
        if repeated:
            raise UserError(f"{name}, row 1: the column `{repeated[0]}` is there twice")
    records = [{column: cells.get(n) for n, column in enumerate(header) if column} for _, cells in filled]
    blank = len(rows) - len(filled) - has_header
    return RawRows(name, "row", records, [number for number, _ in filled], blank, decisions=decisions)


def _sheets(archive: zipfile.ZipFile) -> list[tuple[str, str]]:
    """Name and file of every sheet, in the order of the workbook."""
    root = ElementTree.fromstring(archive.read("xl/workbook.xml"))
    relations = ElementTree.fromstring(archive.read("xl/_rels/workbook.xml.rels"))
    targets = {relation.get("Id"): relation.get("Target", "") for relation in relations}
    sheets = [(sheet.get("name", ""), targets[sheet.get(RELATION)]) for sheet in root.iter(f"{MAIN}sheet")]
    return [(name, posixpath.normpath(posixpath.join("/xl", target)).lstrip("/")) for name, target in sheets]


def _sheet_rows(archive: zipfile.ZipFile, file: str) -> Iterator[tuple[int, dict[int, str | None]]]:
    """The number of each row of a sheet, and its cells by column, from 0."""
    shared = []
    if "xl/sharedStrings.xml" in archive.namelist():
        root = ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))
        shared = [_text_of(item) for item in root.iter(f"{MAIN}si")]
    number = 0
    with archive.open(file) as sheet:
        for _, row in ElementTree.iterparse(sheet):
            if row.tag != f"{MAIN}row":
                continue
            number = int(row.get("r", number + 1))
            cells: dict[int, str | None] = {}
            for place, cell in enumerate(row.iter(f"{MAIN}c")):
                letters = re.match(r"[A-Z]+", cell.get("r", ""))
                cells[_column(letters[0]) if letters else place] = _value(cell, shared)
            yield number, cells
            row.clear()


def _column(letters: str) -> int:
    """The number of a column, from 0, by its letters: A, B, …, Z, AA and so on."""
    number = 0
    for letter in letters:
        number = 26 * number + ord(letter) - ord("A") + 1
    return number - 1


def _value(cell: ElementTree.Element, shared: list[str]) -> str | None:
    kind, value = cell.get("t", "n"), cell.find(f"{MAIN}v")
    if kind == "inlineStr":
        return _text_of(cell) or None
    if value is None or not value.text or kind == "e":  # an error such as #N/A is no value
        return None
    if kind == "s":
        return shared[int(value.text)] or None
    if kind == "b":
        return "TRUE" if value.text == "1" else "FALSE"
    if kind == "n":
        number = float(value.text)
        return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)
    return value.text


def _text_of(item: ElementTree.Element) -> str:
    """The text of a string with all its runs, without the reading aids of East Asian scripts."""
    aids = {part for phonetic in item.iter(f"{MAIN}rPh") for part in phonetic.iter(f"{MAIN}t")}
    text = "".join(part.text or "" for part in item.iter(f"{MAIN}t") if part not in aids)
    return re.sub(r"_x([0-9A-Fa-f]{4})_", lambda match: chr(int(match[1], 16)), text)
