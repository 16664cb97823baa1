"""Errors of pydantic as one line for the author of a YAML file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from distillery.config.schema import PATTERNS, URL, VARIABLE

MESSAGES = {  # type of pydantic's error -> its meaning in YAML
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
    """One line: `file`, the first wrong key of `raw`, and what is allowed there.

    kind: the section class that `raw` does not fit. Values that may be secrets are not shown.
    """
    located = [(_key_path(issue, raw), issue) for issue in error.errors()]
    # An unknown key is nearly always the cause of the other errors beside it (its right spelling is "missing").
    keys, issue = min(located, key=lambda item: item[1]["type"] != "extra_forbidden")
    if issue["type"] == "extra_forbidden":
        return f"{file}: {'.'.join(keys)}: {_unknown_key_message(kind, keys)}"
    # A value that may have several types gives an error for each. The deepest error belongs to the intended type.
    below = [item for item in located if item[0][: len(keys)] == keys]
    if issue["loc"][-1:] != ("[key]",):
        keys, issue = max(below, key=lambda item: len(item[0]))
    texts = [_describe(other) for path, other in below if path == keys and other["type"] != "string_type"]
    first, *others = dict.fromkeys(texts or ["must be text"])
    message = " or ".join([first, *(text.removeprefix("must be ") for text in others)])
    hidden = issue["type"] == "missing" or isinstance(issue["input"], (dict, list))
    hidden |= (issue.get("ctx") or {}).get("pattern") in (URL, VARIABLE)  # the value may be a secret
    key = ".".join(keys) or "(the whole file)"
    return f"{file}: {key}: {message}" + ("" if hidden else f", not {issue['input']!r}")


def _unknown_key_message(kind: type[BaseModel], keys: list[str]) -> str:
    section = _section_at(kind, keys[:-1])
    names = list(section.model_fields) if section else []
    close = difflib.get_close_matches(keys[-1], names, n=1)
    hint = f"; did you mean `{close[0]}`?" if close else ";"
    return f"unknown key{hint} allowed: {', '.join(names)}"


def _key_path(issue: Any, raw: Any) -> list[str]:
    """The keys from the top of `raw` to the error, without pydantic's names of union members among them."""
    keys, node = [], raw
    for part in issue["loc"]:
        if isinstance(node, dict) and (part in node or issue["type"] in ("missing", "extra_forbidden")):
            keys.append(str(part))
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            keys.append(str(part))
            node = node[part]
    return keys


def _describe(issue: Any) -> str:
    if issue["type"] == "literal_error":
        return f"must be {issue['ctx']['expected']}"
    if issue["type"] == "too_short":
        shortest = issue["ctx"]["min_length"]
        return "must not be empty" if shortest == 1 else f"needs at least {shortest}"
    if issue["type"] == "string_pattern_mismatch":
        return f"must be {PATTERNS[issue['ctx']['pattern']]}"
    text = issue["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return MESSAGES.get(issue["type"], text)


def _section_at(kind: Any, keys: Iterable[str]) -> type[BaseModel] | None:
    """The section class at `keys` below the class `kind`."""
    for key in keys:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(key)
            kind = field.annotation if field else None
        else:  # a dictionary or a list: its values
            kind = next((member for member in reversed(get_args(kind)) if member is not str), None)
        kind = _section_type(kind)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _section_type(kind: Any) -> Any:
    """The section class among the members of a union, or `kind` without its limits."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        members = [_section_type(member) for member in get_args(kind) if member is not type(None)]
        return next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), members[0])
    return kind
