"""Check and clean rows: text, labels, ids, groups, options and accepted answers."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from typing import Any

import numpy as np
import pandas as pd

from distillery.config.schema import SourceConfig
from distillery.data.readers import RawRows, value_kind
from distillery.errors import UserError
from distillery.tasks.prompts import with_options
from distillery.tasks.schema import ANSWER_SEPARATOR, Task

ROW_COLUMNS = ("id", "text", "label", "rationale", "group")  # of every split; extra columns of the source come after


HUB_SPLIT_COLUMN = "split of the hub"  # a column between reading and splitting


def normalize_text(text: str) -> str:
    """`text` in Unicode NFC, with every run of white space folded into one space and none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _visible(text: str) -> bool:
    return any(character.isprintable() and character != " " for character in text)


def _to_name(value: Any) -> str | None:
    """A label, id or group as text: integers are spelt out, an empty one is None. TypeError for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError
    return normalize_text(str(value)) or None


def clean_rows(
    raw: RawRows, spec: SourceConfig, task: Task
) -> tuple[pd.DataFrame, list[tuple[int, str]], dict[str, Any]]:
    """Checked and cleaned rows, before any grouping.

    Returns the frame (id, text, label, rationale, group or None, extra columns); pairs (row, group) of the groups
    of dropped duplicates, which the row that stays also belongs to; and the counts of what was left out.
    Raises UserError naming the line or row and what is allowed.
    """
    there = list(dict.fromkeys(column for row in raw.rows for column in row))
    columns = spec.columns
    roles = ("text", "options", "label", "id", "group", "rationale")
    named = {role: getattr(columns, role) for role in roles if role != "options" or task.kind == "choice"}
    named = {role: [name] if isinstance(name, str) else name or [] for role, name in named.items()}
    for role, names in named.items():
        for column in names:
            if column not in there and (role in ("text", "options", "label") or role in columns.model_fields_set):
                shown = ", ".join(f"`{c}`" for c in there)
                raise UserError(f"{raw.name}: no column `{column}` for the {role}; there are: {shown}")
    mapped = {column for names in named.values() for column in names}
    # A second column called `label` beside the one that is used would bring labels into the pool.
    left_out = [column for column in there if column not in mapped and (column in ROW_COLUMNS or not column.strip())]
    if task.kind == "qa" and "answers" in there and "answers" not in mapped:
        left_out.append("answers")  # the accepted ones are called so below
    extras = [column for column in there if column not in mapped and column not in left_out]
    allowed = {normalize_text(label): label for label in task.names}

    kept: dict[str, list[Any]] = {role: [] for role in ROW_COLUMNS}
    origin: list[int] = []  # of each kept row in raw.rows
    told: list[str | None] = []  # accepted answers
    first: dict[tuple[str, str | None], int] = {}  # (text, label or answers) -> kept row
    also: list[tuple[int, str]] = []
    seen: dict[str, int] = {}
    for i, row in enumerate(raw.rows):
        values = {role: row.get(getattr(columns, role)) for role in ROW_COLUMNS if role != "text"}
        for column in (*named["text"], columns.rationale):
            value = row.get(column)
            if value is not None and not isinstance(value, str):
                raise UserError(f"{raw.at(i)}: `{column}` must be text, not {value_kind(value)} ({value!r:.60})")
        text = normalize_text(" ".join(row.get(column) or "" for column in named["text"]))
        if not _visible(text):
            raise UserError(f"{raw.at(i)}: `{'`, `'.join(named['text'])}` is empty; every row needs a text")
        if raw.labels and type(values["label"]) is int and 0 <= values["label"] < len(raw.labels):
            values["label"] = raw.labels[values["label"]]
        answers = None
        if task.kind == "qa" and columns.label is not None:
            answers = _join_answers(raw.at(i), columns.label, values["label"])
            values["label"] = "right"
        for role in ("label", "id", "group"):
            try:
                values[role] = _to_name(values[role])
            except TypeError:
                column, value = getattr(columns, role), values[role]
                raise UserError(
                    f"{raw.at(i)}: `{column}` must be text or a whole number, not {value_kind(value)} ({value!r:.60})"
                ) from None
        if task.kind == "choice":
            text, values["label"] = _shuffle_options(
                raw.at(i), text, row, named["options"], values["label"], spec, task
            )
        if values["label"] not in allowed and columns.label is not None:
            what = f"unknown label {values['label']!r:.60}" if values["label"] else f"`{columns.label}` is empty"
            raise UserError(f"{raw.at(i)}: {what}; allowed: {', '.join(task.names)}")
        label = allowed.get(values["label"])
        same = (text, answers or label)
        if same in first:
            if values["group"]:
                also.append((first[same], values["group"]))
            continue
        identity = values["id"] if columns.id in there else f"r{raw.numbers[i]:06d}"
        if identity is None:
            raise UserError(f"{raw.at(i)}: `{columns.id}` is empty; every row needs an id of its own (or none has one)")
        if identity in seen:
            raise UserError(f"{raw.at(i)}: the id {identity!r:.60} is already that of {raw.unit} {seen[identity]}")
        seen[identity] = raw.numbers[i]
        first[same] = len(origin)
        origin.append(i)
        told.append(answers)
        rationale = normalize_text(values["rationale"] or "") or None
        for role, value in zip(ROW_COLUMNS, (identity, text, label, rationale, values["group"]), strict=True):
            kept[role].append(value)
    frame = pd.DataFrame({role: pd.Series(values, dtype=object) for role, values in kept.items()})
    for column in extras:
        frame[column] = pd.Series(_parquet_values([raw.rows[i].get(column) for i in origin]), dtype=object)
    if task.kind == "qa":
        frame["answers"] = pd.Series(told, dtype=object)
    if raw.splits:
        frame[HUB_SPLIT_COLUMN] = [raw.splits[i] for i in origin]
    counts = {
        "read": len(raw.rows),
        "blank": raw.blank,
        "duplicates": len(raw.rows) - len(frame),
        "columns_left_out": left_out,
    }
    return frame, also, counts


def _join_answers(at: str, column: str, value: Any) -> str:
    """The accepted answers in one text, each once: of one text, of a list, or of a `value` and its `aliases`."""
    if isinstance(value, dict):
        value = [value.get("value"), *(value.get("aliases") or [])]
    value = [value] if isinstance(value, str | int) else value
    try:
        found = [_to_name(one) for one in value or []]
    except TypeError:
        found = []
    if not found or None in found:
        raise UserError(f"{at}: `{column}` must be an answer or a list of accepted answers, not {value!r:.60}")
    return ANSWER_SEPARATOR.join(dict.fromkeys(one.replace(ANSWER_SEPARATOR, " / ") for one in found))


def _shuffle_options(
    at: str, text: str, row: dict[str, Any], columns: list[str], answer: str | None, spec: SourceConfig, task: Task
) -> tuple[str, str | None]:
    """The text with its options in an order of their own, and the label of the right one.

    The order follows from what is asked and offered alone, so that no option's place tells anything and the same
    question twice reads the same. Raises UserError when the options or the answer do not fit the task.
    """
    offered = row.get(columns[0]) if len(columns) == 1 else [row.get(column) for column in columns]
    shown = "`, `".join(columns)
    if not isinstance(offered, list) or not all(
        isinstance(option, str) and normalize_text(option) for option in offered
    ):
        raise UserError(f"{at}: `{shown}` must be a list of texts, none of them empty, not {offered!r:.60}")
    options = [normalize_text(option) for option in offered]
    if spec.columns.first == "A" and all(re.match(rf"\(?{chr(65 + n)}\)", o) for n, o in enumerate(options)):
        options = [re.sub(r"^\(?[A-Z]\)\s*", "", option) for option in options]  # "A)21": the letter is said below
    if not 2 <= len(options) <= len(task.names):
        raise UserError(f"{at}: `{shown}` holds {len(options)} options; allowed: 2 to {len(task.names)}")
    seed = hashlib.sha256("\n".join([text, *sorted(options)]).encode()).digest()
    # equal options keep the order of the file among themselves
    order = np.random.default_rng(list(seed)).permutation(sorted(range(len(options)), key=lambda n: (options[n], n)))
    label = None
    if spec.columns.label is not None:
        called = [
            chr(65 + n) if spec.columns.first == "A" else str(spec.columns.first + n) for n in range(len(options))
        ]
        if answer not in called:
            what = f"unknown answer {answer!r:.60}" if answer else f"`{spec.columns.label}` is empty"
            raise UserError(f"{at}: {what}; allowed: {', '.join(called)}")
        label = task.names[int(np.flatnonzero(order == called.index(answer))[0])]
    return with_options(task, text, [options[n] for n in order]), label


def _parquet_values(values: list[Any]) -> list[Any]:
    """A column that Parquet can hold: one plain type, else every value as JSON text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {str} or kinds <= {bool} or kinds <= {float}:
        return values
    if kinds <= {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):
        return values
    return [None if v is None else json.dumps(v, ensure_ascii=False, sort_keys=True, default=str) for v in values]


def filter_rows(
    raw: RawRows, rows: pd.DataFrame, also: list[tuple[int, str]], spec: SourceConfig
) -> tuple[pd.DataFrame, list[tuple[int, str]], dict[str, int]]:
    """The rows that `spec.filter` lets through, and how many each step took. Raises UserError when none are left."""
    wanted, counts = spec.filter, {}
    if wanted is None:
        return rows, also, counts
    stay = pd.Series(True, index=rows.index)
    if wanted.languages:
        if wanted.language not in rows:
            raise UserError(f"{raw.name}: no column `{wanted.language}` to filter languages by")
        stay &= rows[wanted.language].isin(wanted.languages)
        counts["other_language"] = int((~stay).sum())
    if wanted.keywords:
        words = re.compile("|".join(rf"\b{re.escape(word.casefold())}\b" for word in wanted.keywords))
        found = rows["text"].map(lambda text: len(set(words.findall(text.casefold()))))
        counts["without_keyword"] = int((stay & (found < wanted.least)).sum())
        stay &= found >= wanted.least
    if not stay.any():
        raise UserError(f"{raw.name}: the filter leaves no row: {counts}")
    kept = np.flatnonzero(stay)
    position = {int(old): new for new, old in enumerate(kept)}
    also = [(position[i], group) for i, group in also if i in position]
    return rows.iloc[kept].reset_index(drop=True), also, counts
