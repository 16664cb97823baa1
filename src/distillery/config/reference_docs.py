"""The schema as documents: `docs/params.schema.json` for editors and `docs/parameters.md` for readers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, JsonValue
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distillery.config.renamed import LAST_VERSION, RENAMED_KEYS
from distillery.config.schema import NAME, PATTERNS, Params, Section

SCHEMA_FILE = "docs/params.schema.json"
REFERENCE_FILE = "docs/parameters.md"
INTRODUCTION = """# Parameters

Every key of `params.yaml` and of a task file. `distillery schema --write` writes this page and
[params.schema.json](params.schema.json) from the classes in `src/distillery/config/schema` and
`src/distillery/tasks/schema.py`. `distillery check` checks a file against them.

The column `default` shows which keys are required; a key with an empty default may be left out. A `name` has letters,
digits, `_`, `.` and `-`, and starts with a letter or digit.
"""
BASIC_TYPES = {str: "text", float: "number", int: "integer", bool: "boolean", NoneType: "null"}
BASIC_TYPES |= {Any: "any value", JsonValue: "any value"}


def schema_json() -> str:
    """The JSON schema of `params.yaml`."""
    schema = Params.model_json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema, indent=1) + "\n"


def reference_markdown(task: type[Section]) -> str:
    """The reference of all keys: of `params.yaml`, of a task file, whose schema is `task`, and the renamed ones."""
    parts = [INTRODUCTION]
    for file, top in (("params.yaml", Params), ("tasks/<name>.yaml", task)):
        for place, section in sections(top):
            title = f"`{place}`" if place else f"`{file}`"
            parts.append(f"## {title}\n\n{_one_line(section.__doc__)}\n\n{_table(section)}")
    renamed = "".join(f"| `{old}` | `{new}` |\n" for old, new in RENAMED_KEYS.items())
    parts.append(
        f"## Renamed keys\n\nOld names are read until version {LAST_VERSION}.\n\n| old | new |\n|---|---|\n{renamed}"
    )
    return "\n".join(parts)


def sections(top: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """Every section class below `top` with its first place, such as `data.<name>.split`; `top` itself at ''."""
    places: dict[type[BaseModel], str] = {}

    def visit(section: type[BaseModel], place: str) -> None:
        if section not in places:
            places[section] = place
            for key, field in section.model_fields.items():
                for member, below in _section_types(field.annotation, f"{place}.{key}" if place else key):
                    visit(member, below)

    visit(top, "")
    return [(place, section) for section, place in places.items()]


def _section_types(annotation: Any, path: str) -> Iterable[tuple[type[BaseModel], str]]:
    """The section classes in `annotation`, each with its place: `path`, `path.<name>` or `path[i]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, path
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _section_types(members[0], path)
    elif origin is dict:
        yield from _section_types(members[1], f"{path}.<name>")
    elif origin is list:
        yield from _section_types(members[0], f"{path}[i]")
    elif origin in (Union, UnionType):
        for member in members:
            yield from _section_types(member, path)


def _table(section: type[BaseModel]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        cells = (f"`{key}`", _field_type(field), _default(field), _one_line(field.description))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _one_line(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").strip()


def _field_type(field: FieldInfo) -> str:
    return _limited(type_text(field.annotation), field.metadata)


def type_text(annotation: Any) -> str:
    """`annotation` in words: `list of text`, `` `a` or `b` ``, `section`."""
    if annotation in BASIC_TYPES:
        return BASIC_TYPES[annotation]
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _limited(type_text(members[0]), members[1:])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in members)
    if origin in (Union, UnionType):
        return " or ".join(type_text(member) for member in members if member is not NoneType)
    if origin is list:
        item = type_text(members[0])
        return f"list of ({item})" if " or " in item or "," in item else f"list of {item}"
    if origin is dict:
        key, value = map(type_text, members)
        return f"{value} by key ({key})" if " or " in key else f"{value} by name"
    return "section"


def _limited(text: str, metadata: Iterable[Any]) -> str:
    """`text`, the words for a type, with the limits of its value or length."""
    for limit in metadata:
        if isinstance(limit, FieldInfo):
            text = _limited(text, limit.metadata)
            continue
        for attribute, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            if (bound := getattr(limit, attribute, None)) is not None:
                text += f" {sign} {bound}" if " > " not in text and " ≥ " not in text else f" and {sign} {bound}"
        if (shortest := getattr(limit, "min_length", None)) is not None:
            text += ", not empty" if shortest == 1 else f", at least {shortest}"
        pattern = getattr(limit, "pattern", None)
        if pattern == NAME:
            text = "name"
        elif pattern in PATTERNS:
            text = re.split(", (?:without|never)", PATTERNS[pattern])[0]
    return text


def _default(field: FieldInfo) -> str:
    default = field.default
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return ""
    if isinstance(default, BaseModel):
        return "its defaults"
    return f"`{json.dumps(default, ensure_ascii=False)}`" if default != "" else ""
