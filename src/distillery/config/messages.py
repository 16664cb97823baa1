"""pydantic's errors as one line for a person who edits YAML."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from distillery.config.schema import PATTERNS, URL, VARIABLE

MESSAGES = {  # what pydantic's kinds of error mean to somebody who edits YAML
    "model_type": "must be a section of keys and values",
    "model_attributes_type": "must be a section of keys and values",
    "dict_type": "must be a section of keys and values",
    "list_type": "must be a list",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "missing": "missing",
}


def validation_message(error: ValidationError, kind: type[BaseModel], raw: Any, file: str) -> str:
    located = [(_key_path(found, raw), found) for found in error.errors()]
    # An unknown key is nearly always the cause of what else is wrong beside it (its right spelling is "missing").
    top, first = min(located, key=lambda item: item[1]["type"] != "extra_forbidden")
    # A value of several allowed kinds gives an error for each: the one that got furthest says what was meant.
    below = [item for item in located if item[0][: len(top)] == top]
    keys = top
    if first["type"] != "extra_forbidden" and first["loc"][-1:] != ("[key]",):
        keys, first = max(below, key=lambda item: len(item[0]))
    key = ".".join(keys) or "(the whole file)"
    if first["type"] == "extra_forbidden":
        model = _section_at(kind, keys[:-1])
        names = list(model.model_fields) if model else []
        close = difflib.get_close_matches(keys[-1], names, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ";"
        return f"{file}: {key}: unknown key{hint} allowed: {', '.join(names)}"
    here = [found for at, found in below if at == keys]
    said = list(dict.fromkeys(_describe(found) for found in here if found["type"] != "string_type")) or ["must be text"]
    message = " or ".join([said[0], *(more.removeprefix("must be ") for more in said[1:])])
    silent = first["type"] == "missing" or isinstance(first["input"], (dict, list))
    silent |= (first.get("ctx") or {}).get("pattern") in (URL, VARIABLE)  # what stands there may be a secret
    return f"{file}: {key}: {message}" + ("" if silent else f", not {first['input']!r}")


def _key_path(found: Any, raw: Any) -> list[str]:
    """The keys from the top of `raw` to the error; pydantic puts the names of union members among them."""
    keys, node = [], raw
    for part in found["loc"]:
        if isinstance(node, dict) and (part in node or found["type"] in ("missing", "extra_forbidden")):
            keys.append(str(part))
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            keys.append(str(part))
            node = node[part]
    return keys


def _describe(found: Any) -> str:
    if found["type"] == "literal_error":
        return f"must be {found['ctx']['expected']}"
    if found["type"] == "too_short":
        least = found["ctx"]["min_length"]
        return "must not be empty" if least == 1 else f"needs at least {least}"
    if found["type"] == "string_pattern_mismatch":
        return f"must be {PATTERNS[found['ctx']['pattern']]}"
    return MESSAGES.get(found["type"]) or found["msg"].removeprefix("Value error, ").replace(
        "Input should be", "must be"
    )


def _section_at(kind: Any, keys: Iterable[str]) -> type[BaseModel] | None:
    """The section class that sits at `keys` below `kind`."""
    for key in keys:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(key)
            kind = field.annotation if field else None
        else:
            kind = next((a for a in _member_types(kind) if a is not str), None)
        kind = _section_type(kind)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _member_types(kind: Any) -> list[Any]:
    return list(get_args(kind))[::-1]


def _section_type(kind: Any) -> Any:
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        members = [_section_type(a) for a in get_args(kind) if a is not type(None)]
        return next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), members[0])
    return kind
