"""Read tables of text: delimiter, quoting, line ends and header as files have them."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from distillery.data.records import MAX_TITLE_ROWS, FileFormat, RawRows, header_place
from distillery.errors import UserError

DELIMITERS = (",", "\t", ";", "|")
DELIMITER_NAMES = {"\t": "a tab"}
SEPARATOR = re.compile(r'"?sep=([,;|\t])"?\r?\n', re.IGNORECASE)
LINE_END = re.compile(r"\r\n|\r|\n")
MAX_TITLE_CHARACTERS = 100_000  # in which the header of a table stands
QUOTES = {  # a quote inside a quoted cell is written twice or after a backslash, or quotes are plain characters
    "doubled": {"doublequote": True, "strict": True},
    "backslash": {"doublequote": False, "escapechar": "\\", "strict": True},
    "none": {"quoting": csv.QUOTE_NONE},
}
MAX_CELL = 2**31 - 1  # characters


class TableError(UserError):
    """A table that cannot be read with one delimiter and quoting. n_fields: in its header."""

    def __init__(self, message: str, n_fields: int):
        super().__init__(message)
        self.n_fields = n_fields


@dataclass(frozen=True)
class Table:
    """A table as read with one delimiter and quoting. n_lines: rows whose cells hold line breaks."""

    header: list[str]
    rows: list[list[str]]
    numbers: list[int]
    blank: int
    n_lines: int


def read_table(name: str, text: str, default: str, form: FileFormat) -> RawRows:
    """The records of a table. default: the delimiter that the suffix of the file stands for.

    What `form` leaves open is tried: the first delimiter and quoting by which the header has several cells and every
    row as many. Raises UserError with the line when there is none.
    """
    delimiters = [form.delimiter] if form.delimiter else [default, *(d for d in DELIMITERS if d != default)]
    text, delimiters, decisions = _without_title(text, delimiters, form)
    pairs = [(delimiter, quotes) for delimiter in delimiters for quotes in _quotes_to_try(text, delimiter, form)]
    tables, errors = [], []
    for delimiter, quotes in pairs:
        try:
            table = _parse(name, text, delimiter, quotes, form.header)
        except TableError as error:
            errors.append(error)
            continue
        tables.append((table, delimiter, quotes))
        if len(table.header) > 1 or len(pairs) == 1:
            break
    several = [candidate for candidate in tables if len(candidate[0].header) > 1]
    if not several and errors and (not tables or max(error.n_fields for error in errors) > 1):
        raise UserError(str(max(errors, key=lambda error: error.n_fields))) from None
    table, delimiter, quotes = (several or tables)[0]
    if delimiter == "\t" and quotes == "doubled" and table.n_lines and not form.quotes:
        table, quotes = _without_quotes(name, text, form.header, table)
    if not form.delimiter and delimiter != default and len(table.header) > 1:
        shown = DELIMITER_NAMES.get(delimiter, f"`{delimiter}`")
        decisions.append(f"The delimiter of the file is {shown}; `delimiter:` names another.")
    if not form.quotes and quotes != "doubled":
        decisions.append(f"The quotes of the file are read as `quotes: {quotes}`; `quotes: doubled` is the usual way.")
    rows = [dict(zip(table.header, cells, strict=True)) for cells in table.rows]
    return RawRows(name, "line", rows, table.numbers, table.blank, decisions=decisions)


def _without_title(text: str, delimiters: list[str], form: FileFormat) -> tuple[str, list[str], list[str]]:
    """`text` with empty lines in place of those above the header, the delimiters to try, and what was decided.

    Excel writes a line such as `sep=;` that names the delimiter; reports have a title above their table.
    """
    named = SEPARATOR.match(text)
    if named:
        delimiters = [form.delimiter or named[1]]
        return "\n" + text[named.end() :], delimiters, []
    if not form.header:
        return text, delimiters, []
    first = re.split(LINE_END, text[:MAX_TITLE_CHARACTERS])[: MAX_TITLE_ROWS + 1]
    for delimiter in delimiters:
        cells = ([cell.strip().strip('"') for cell in line.split(delimiter)] for line in first)
        place = header_place(cells, form.names)
        if place and any(line.strip(f"{delimiter} ") for line in first[:place]):
            below = re.split(LINE_END, text, maxsplit=place)[-1]
            return "\n" * place + below, [delimiter], [f"{place} lines above the header of the table were left out."]
    return text, delimiters, []


def _quotes_to_try(text: str, delimiter: str, form: FileFormat) -> list[str]:
    if form.quotes:
        return [form.quotes]
    # Without quoting, a comma inside a text looks like a delimiter: only tabs are safe to try.
    return ["doubled", *(["backslash"] if '\\"' in text else []), *(["none"] if delimiter == "\t" else [])]


def _without_quotes(name: str, text: str, header: bool, table: Table) -> tuple[Table, str]:
    """`table`, which has cells of several lines, or a file without quoting, if each line has all cells by itself."""
    try:
        return _parse(name, text, "\t", "none", header), "none"
    except TableError:
        return table, "doubled"


def _parse(name: str, text: str, delimiter: str, quotes: str, has_header: bool) -> Table:
    """The table that one delimiter and quoting give. Raises TableError."""
    header: list[str] = []
    rows, numbers, blank, n_lines = [], [], 0, 0
    try:
        for first, last, cells in _records(text, delimiter, quotes):
            if not any(cell.strip() for cell in cells):
                blank += 1
                continue
            if not header:
                header = [c.strip() for c in cells] if has_header else [f"column{n + 1}" for n in range(len(cells))]
                repeated = [column for column, n in Counter(header).items() if n > 1 and column]
                if repeated:
                    message = f"{name}, line {first}: the column `{repeated[0]}` is there twice"
                    raise TableError(message, len(header))
                if has_header:
                    continue
            while len(cells) > len(header) and not cells[-1].strip():
                cells.pop()  # spreadsheets end rows with empty cells
            while len(cells) < len(header) and not header[len(cells)]:
                cells.append("")  # or leave out those below columns without a name
            if len(cells) != len(header):
                width = f"{len(header)}" if has_header else f"{len(header)} columns"
                owner = "the header has" if has_header else "the first row has"
                raise TableError(f"{name}, line {first}: {len(cells)} fields, but {owner} {width}", len(header))
            rows.append(cells)
            numbers.append(first)
            n_lines += last > first
    except csv.Error as error:
        raise TableError(f"{name}, {error}", len(header)) from None
    return Table(header, rows, numbers, blank, n_lines)


def _records(text: str, delimiter: str, quotes: str) -> Iterator[tuple[int, int, list[str]]]:
    """The first and last line of every record, and its cells. Raises csv.Error with the line."""
    mark = ""
    if "\r" in text and "\n" not in text:
        text = text.replace("\r", "\n")  # line ends of old Macintosh files
    elif re.search(r"\r(?!\n)", text):
        # pandas leaves a carriage return in a cell unquoted; the module csv would end the line there
        mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in text)
        text = re.sub(r"\r(?!\n)", mark, text)
    limit = csv.field_size_limit(MAX_CELL)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, **QUOTES[quotes])
        start = 1
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                hint = "is a quote left open? `quotes: none` reads a file without quoting"
                raise csv.Error(f"line {start}: not a valid table: {error} ({hint})") from None
            yield start, reader.line_num, [cell.replace(mark, "\r") for cell in cells] if mark else cells
            start = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)
