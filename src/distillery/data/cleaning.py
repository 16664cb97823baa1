"""Check and clean rows: text, labels, ids, groups, options and accepted answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pandas as pd

from distillery.config.schema import SourceConfig
from distillery.data.label_sets import LabelSetReader
from distillery.data.labels import LabelReader, join_answers, name_text, value_text, whole_number_text
from distillery.data.options import order_options, read_options
from distillery.data.records import RawRows, normalize_text, parquet_values, value_kind, without_punctuation
from distillery.data.selection import DuplicateGroup, select_records
from distillery.errors import UserError
from distillery.label_sets import NO_LABELS
from distillery.tasks.prompts import with_options
from distillery.tasks.schema import ANSWER_LABELS, N_OPTIONS, Task

ROW_COLUMNS = ("id", "text", "label", "rationale", "group")  # of every split; extra columns of the source come after


OWN_SPLIT_COLUMN = "split of the source"  # a column between reading and splitting


def _visible(text: str) -> bool:
    return any(character.isprintable() and character != " " for character in text)


@dataclass(slots=True)
class CleanRow:
    """One checked row. answers: accepted ones of a `qa` row, joined to one text. n_options: of a `choice` row."""

    id: str | None
    text: str
    label: str | None
    rationale: str | None
    group: str | None
    answers: str | None
    n_options: int | None


class RowCleaner:
    """Turns the records of `raw` into rows of the task.

    Raises UserError when a column of `spec.columns` is missing from the file, or a label of `columns.values` from the
    task.
    """

    def __init__(self, raw: RawRows, spec: SourceConfig, task: Task):
        self.raw, self.task, self.columns = raw, task, spec.columns
        self.normalize = without_punctuation if spec.remove_punctuation else normalize_text
        self.labels = LabelReader(task.names, self._named_values())
        column = (self._label_value(record) for record in raw.rows)
        is_multilabel = task.kind == "multilabel"
        self.label_sets = (
            LabelSetReader(self.labels, task.names, column, spec.columns.label_separator) if is_multilabel else None
        )
        for key in ("label_separator", "label_columns"):
            if getattr(spec.columns, key) and not is_multilabel:
                raise UserError(f"{raw.name}: `columns.{key}` is for a task of `kind: multilabel`")
        file_columns = list(dict.fromkeys(column for record in raw.rows for column in record))
        if set(raw.splits or ()) == {"pool"} and "label" not in {*file_columns, *spec.columns.model_fields_set}:
            self.columns = spec.columns.model_copy(update={"label": None})  # rows that have no labels at all
        roles = ("text", "options", "label", "id", "group", "rationale")
        mapped = {role: getattr(self.columns, role) for role in roles if role != "options" or task.kind == "choice"}
        mapped = {role: [name] if isinstance(name, str) else name or [] for role, name in mapped.items()}
        for role, names in mapped.items():
            required = role in ("text", "options", "label") or role in self.columns.model_fields_set
            for column in names:
                if column not in file_columns and required:
                    raise UserError(_missing_column_message(raw, column, role, file_columns, self.labels))
        by_name = [role for role in ("id", "group", "rationale") if role in file_columns and mapped[role] == [role]]
        self.columns_by_name = [role for role in by_name if role not in self.columns.model_fields_set]
        self.text_columns, self.option_columns = mapped["text"], mapped.get("options", [])
        self.has_ids = self.columns.id in file_columns
        unmapped = [column for column in file_columns if not any(column in names for names in mapped.values())]
        # A second column with the name `label`, beside the one in use, would bring labels into the pool.
        self.left_out = [column for column in unmapped if column in ROW_COLUMNS or not column.strip()]
        # names of the columns that rows of a `qa` and of a `choice` task have
        self.left_out += [column for column in ("answers", N_OPTIONS) if column in unmapped]
        # an extra column with the name of the split would be taken for the split in the tables of later stages
        self.left_out += [spec.split_column] if spec.split_column in unmapped else []
        self.extra_columns = [column for column in unmapped if column not in self.left_out]

    def clean(self, i: int) -> CleanRow | None:
        """Row `i`; None where its text is empty. Raises UserError naming the line or row, the column, and what is
        allowed.
        """
        record, at, columns = self.raw.rows[i], self.raw.at(i), self.columns
        for column in (*self.text_columns, *filter(None, [columns.rationale])):
            value = record.get(column)
            if value != value:  # NaN, which Python and pandas write for a missing text
                record = record | {column: None}
            elif value is not None and not isinstance(value, str):
                raise UserError(f"{at}: `{column}` must be text, not {value_kind(value)} ({value!r:.60})")
        text = self.normalize(" ".join(record.get(column) or "" for column in self.text_columns))
        if not _visible(text):
            return None
        answers, n_options = None, None
        names = {role: self._name(at, role, record) for role in ("id", "group")}
        if self.task.kind == "choice":
            text, label, n_options = self._add_options(at, text, record)
        elif self.task.kind == "qa" and columns.label is not None:
            answers = join_answers(at, columns.label, record.get(columns.label))
            label, _ = ANSWER_LABELS  # these are the accepted answers
        else:
            label = self._read_label(at, record, may_be_empty=bool(self.raw.splits) and self.raw.splits[i] == "pool")
        rationale = normalize_text(record.get(columns.rationale) or "") or None
        return CleanRow(names["id"], text, label, rationale, names["group"], answers, n_options)

    def _named_values(self) -> dict[Any, str] | None:
        """`columns.values`, each of whose labels is one of the task."""
        values = self.columns.values
        for value, label in (values or {}).items():
            if self.task.kind not in ("classification", "multilabel"):
                raise UserError(
                    f"{self.raw.name}: `columns.values` is for a task of `kind: classification` or `multilabel`"
                )
            if label not in self.task.names:
                allowed = ", ".join(self.task.names)
                raise UserError(f"{self.raw.name}: columns.values.{value}: unknown label {label!r}; allowed: {allowed}")
        return values

    def _name(self, at: str, role: str, record: dict[str, Any]) -> str | None:
        """The id or the group of a record."""
        column = getattr(self.columns, role)
        try:
            return name_text(record.get(column))
        except TypeError:
            value = record[column]
            kind = f"{value_kind(value)} ({value!r:.60})"
            raise UserError(f"{at}: `{column}` must be text or a whole number, not {kind}") from None

    def _label_value(self, record: dict[str, Any]) -> Any:
        """What the label column holds, with the name that a hub data set has for its integer."""
        value = record.get(self.columns.label)
        return [self._named(element) for element in value] if isinstance(value, list) else self._named(value)

    def _named(self, value: Any) -> Any:
        if self.raw.labels and type(value) is int and 0 <= value < len(self.raw.labels):
            return self.raw.labels[value]
        return value

    def _read_label(self, at: str, record: dict[str, Any], may_be_empty: bool) -> str | None:
        """The label of a row; None where the source has no labels, and in a pool."""
        column, value = self.columns.label, self._label_value(record)
        if column is None:
            return None
        if self.label_sets is not None:
            labels = self.label_sets.read(at, column, value)
            if labels is None and not may_be_empty:
                self.label_sets.empty += 1
                return NO_LABELS
            return labels
        try:
            label, text = self.labels.read(value), value_text(value)
        except TypeError:
            problem = f"`{column}` must be one label, not {value_kind(value)} ({value!r:.60})"
            raise UserError(f"{at}: {problem}; allowed: {', '.join(self.task.names)}") from None
        if label is None and not (may_be_empty and text is None):
            problem = f"unknown label {text!r:.60}" if text else f"`{column}` is empty"
            values = map(self._label_value, self.raw.rows)
            proposal = self.labels.proposal(values) if text else self.labels.keep_proposal(column)
            raise UserError(f"{at}: {problem}; allowed: {', '.join(self.task.names)}{proposal}")
        return label

    def _add_options(self, at: str, text: str, record: dict[str, Any]) -> tuple[str, str | None, int]:
        """`text` with its options, the label of the right one, and the number of options: see :func:`order_options`.

        Raises UserError when the options or the answer do not fit the task.
        """
        options, names = read_options(at, record, self.option_columns, self.columns.first), self.task.names
        right = self._right_option(at, record, len(options))
        order = order_options(text, options, right, self.columns)
        if not 2 <= len(order) <= len(names):
            shown = "`, `".join(self.option_columns)
            raise UserError(f"{at}: `{shown}` holds {len(order)} options; allowed: 2 to {len(names)}")
        label = None if right is None else names[order.index(right)]
        return with_options(self.task, text, [options[n] for n in order]), label, len(order)

    def _right_option(self, at: str, record: dict[str, Any], n_options: int) -> int | None:
        """The position of the right option in the file, from 0; None where the source has no labels."""
        if self.columns.label is None:
            return None
        first = self.columns.first
        allowed = [chr(65 + n) if first == "A" else str(first + n) for n in range(n_options)]
        answer = self._answer(at, record)
        if answer not in allowed:
            problem = f"unknown answer {answer!r:.60}" if answer else f"`{self.columns.label}` is empty"
            raise UserError(f"{at}: {problem}; allowed: {', '.join(allowed)}")
        return allowed.index(answer)

    def _answer(self, at: str, record: dict[str, Any]) -> str | None:
        """The number or letter of the right option."""
        value = self._label_value(record)
        try:
            answer = whole_number_text(value_text(value) or "") or None
        except TypeError:
            kind = f"{value_kind(value)} ({value!r:.60})"
            raise UserError(f"{at}: `{self.columns.label}` must be one answer, not {kind}") from None
        return answer.upper() if answer and self.columns.first == "A" else answer


def _missing_column_message(raw: RawRows, column: str, role: str, file_columns: list[str], labels: LabelReader) -> str:
    """One line on a column that the file does not have, and what to write if its first row is no header."""
    message = f"{raw.name}: no column `{column}` for the {role}; there are: {', '.join(f'`{c}`' for c in file_columns)}"
    label = next((n for n, cell in enumerate(file_columns, 1) if labels.find(cell)), None)
    if label is None or len(file_columns) < 2:
        return message + (f"; columns: {{{role}: …}} names another" if column == role else "")
    text = max((n for n in range(1, len(file_columns) + 1) if n != label), key=lambda n: len(file_columns[n - 1]))
    columns = f"{{text: column{text}, label: column{label}}}"
    return f"{message}. If the file has no header, write header: false, columns: {columns}"


def clean_rows(
    raw: RawRows, spec: SourceConfig, task: Task
) -> tuple[pd.DataFrame, list[DuplicateGroup], dict[str, Any]]:
    """Checked and cleaned rows, before any grouping.

    Returns the frame (id, text, label, rationale, group or None, extra columns), the groups of dropped duplicates, and
    the counts of what was left out. Raises UserError naming the line or row and what is allowed.
    """
    n_read = len(raw.rows)
    raw, decisions = select_records(raw, spec)
    cleaner = RowCleaner(raw, spec, task)
    cleaned = [(i, cleaner.clean(i)) for i in range(len(raw.rows))]
    empty = [i for i, row in cleaned if row is None]
    _check_empty(cleaner, empty, spec.max_empty)
    rows, origin, duplicate_groups, repeated = _drop_duplicates(
        cleaner, [(i, row) for i, row in cleaned if row is not None]
    )
    frame = _build_frame(cleaner, rows, origin)
    if cleaner.columns_by_name:
        shown = ", ".join(f"`{column}`" for column in cleaner.columns_by_name)
        switch = ", ".join(f"{column}: null" for column in cleaner.columns_by_name)
        decisions.append(f"Columns taken for their names: {shown}; columns: {{{switch}}} takes none.")
    if shown := ", ".join(f"`{column}`" for column in cleaner.left_out if column.strip()):
        decisions.append(f"Columns left out, since their names have another use: {shown}.")
    decisions += repeated
    if empty:
        decisions.append(f"{len(empty)} rows with an empty text were left out, the first is {raw.at(empty[0])}.")
    set_decisions = cleaner.label_sets.decisions() if cleaner.label_sets else []
    counts = {
        "read": n_read,
        "blank": raw.blank,
        "not_kept": n_read - len(raw.rows),
        "empty": len(empty),
        "duplicates": len(raw.rows) - len(empty) - len(frame),
        "columns_left_out": cleaner.left_out,
        "mapped_labels": cleaner.labels.mapped_values(),
        "decisions": [*raw.decisions, *decisions, *set_decisions, *cleaner.labels.decisions()],
    }
    return frame, duplicate_groups, counts


def _check_empty(cleaner: RowCleaner, empty: list[int], max_share: float) -> None:
    """Raise UserError when more than `max_share` of the rows have an empty text. empty: the positions of these."""
    raw = cleaner.raw
    if len(empty) > max_share * len(raw.rows):
        shown = "`, `".join(cleaner.text_columns)
        raise UserError(
            f"{raw.at(empty[0])}: `{shown}` is empty; every row needs a text, and {len(empty)} of {len(raw.rows)} have "
            f"none (max_empty: {max_share:g} leaves out that share at most)"
        )


def _drop_duplicates(
    cleaner: RowCleaner, rows: list[tuple[int, CleanRow]]
) -> tuple[list[CleanRow], list[int], list[DuplicateGroup], list[str]]:
    """The first row of every text and label, its position in the file, the groups of the others, and what was decided.

    rows: each with its position in the file. Every row that stays has an id afterwards. Raises UserError for an id that
    is empty or stands there twice.
    """
    raw = cleaner.raw
    unique: list[CleanRow] = []
    origin: list[int] = []
    duplicate_groups: list[DuplicateGroup] = []
    first_row: dict[tuple[str, str | None], int] = {}
    position_of_id: dict[str, str] = {}
    decisions = _name_rows(cleaner, rows)
    repeated: Counter[tuple[str, str]] = Counter()
    for i, row in rows:
        content = (row.text, row.answers or row.label)
        if content in first_row:
            if row.group:
                duplicate_groups.append((first_row[content], row.group))
            first = origin[first_row[content]]
            if raw.splits and raw.splits[i] != raw.splits[first]:
                repeated[raw.splits[i], raw.splits[first]] += 1
            continue
        column = cleaner.columns.id
        by_name = " (a column taken for its name; columns: {id: null} takes none)"
        hint = by_name if "id" in cleaner.columns_by_name else ""
        if row.id is None:
            raise UserError(
                f"{raw.at(i)}: `{column}` is empty; every row needs an id of its own (or none has one){hint}"
            )
        if row.id in position_of_id:
            raise UserError(f"{raw.at(i)}: the id {row.id!r:.60} is already that of {position_of_id[row.id]}{hint}")
        position_of_id[row.id] = raw.position(i)
        first_row[content] = len(unique)
        unique.append(row)
        origin.append(i)
    decisions += [
        f"{n} rows of `{split}` repeat rows of `{first}` and were left out of `{split}`."
        for (split, first), n in repeated.items()
    ]
    return unique, origin, duplicate_groups, decisions


def _name_rows(cleaner: RowCleaner, rows: list[tuple[int, CleanRow]]) -> list[str]:
    """Give ids to rows where the file has none, by line or row; and put the split before ids that two splits share.

    Returns a sentence on the second.
    """
    raw = cleaner.raw
    splits_of_id: dict[str, set[str]] = {}
    for i, row in rows:
        if not cleaner.has_ids:
            row.id = f"r{raw.numbers[i]:06d}"
        if raw.splits and row.id is not None:
            splits_of_id.setdefault(row.id, set()).add(raw.splits[i])
    if all(len(splits) == 1 for splits in splits_of_id.values()):
        return []
    for i, row in rows:
        if raw.splits and row.id is not None:
            row.id = f"{raw.splits[i]}-{row.id}"
    return ["Two splits share ids, so each id begins with its split, such as `train-7`."] if cleaner.has_ids else []


def _build_frame(cleaner: RowCleaner, rows: list[CleanRow], origin: list[int]) -> pd.DataFrame:
    raw, kind = cleaner.raw, cleaner.task.kind
    values = {column: [getattr(row, column) for row in rows] for column in ROW_COLUMNS}
    values |= {c: parquet_values([raw.rows[i].get(c) for i in origin]) for c in cleaner.extra_columns}
    values |= {"answers": [row.answers for row in rows]} if kind == "qa" else {}
    values |= {N_OPTIONS: [row.n_options for row in rows]} if kind == "choice" else {}
    frame = pd.DataFrame({column: pd.Series(series, dtype=object) for column, series in values.items()})
    if raw.splits:
        frame[OWN_SPLIT_COLUMN] = [raw.splits[i] for i in origin]
    return frame
