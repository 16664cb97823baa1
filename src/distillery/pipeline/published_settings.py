"""The settings that a recipe's source names, beside the recipe's own: ``distillery recipe pkd-albert --settings``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillery.config.load import validate_section
from distillery.config.schema import Params
from distillery.errors import UserError
from distillery.files import atomic_write, repository_root
from distillery.pipeline.published_features import PAGE_FILE, features_page
from distillery.pipeline.recipe import load_recipe
from distillery.tasks.schema import load_task

SETTINGS_FILE = "recipes/SETTINGS.md"
COLUMNS = ("setting", "source", "place in the source", "here", "same, or why not")
HEADING = """# The settings of the sources beside those of the recipes

`make recipe NAME=all SETTINGS=1` wrote this page: the settings that each source names, and what the recipe has there at
full scale. What a source leaves open is under `recipe.guesses` of the recipe.
"""


@dataclass(frozen=True)
class SettingRow:
    """A setting of the source, and the value of the recipe. why: the reason of a difference, or an empty text.

    origin: whether the reason is one of the recipe's `differences` or `guesses`, or neither.
    """

    setting: str
    source: Any
    place: str
    here: Any
    same: bool
    why: str
    origin: str


def settings_at(settings: Mapping[str, Any], path: str) -> list[Any]:
    """The values at the dotted `path` below `settings`; `*` in it is any name or position. Names may hold dots."""
    values: list[Any] = [settings]
    rest = [path]
    while any(rest):
        pairs = [pair for value, left in zip(values, rest, strict=True) for pair in _children(value, left)]
        values, rest = [value for value, _ in pairs], [left for _, left in pairs]
    return values


def _children(value: Any, path: str) -> list[tuple[Any, str]]:
    """The values of `value` that the first step of `path` names, each with the rest of the path."""
    if not path:
        return [(value, "")]
    section = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(section, dict):
        return []
    first, _, rest = path.partition(".")
    return [
        (child, rest if first == "*" else path[len(str(key)) + 1 :])
        for key, child in section.items()
        if first == "*" or path == str(key) or path.startswith(f"{key}.")
    ]


def recipe_settings(root: Path, params: Params) -> dict[str, Any]:
    """All keys of a recipe with their values, and under `tasks` those of its task files."""
    tasks = {source.task for source in params.data.values()}
    return params.model_dump() | {"tasks": {name: load_task(name, root / "tasks").model_dump() for name in tasks}}


def setting_rows(root: Path, name: str) -> list[SettingRow]:
    """The settings that the source of recipe `name` names. Raises UserError for a key that the recipe does not have."""
    params = validate_section(Params, load_recipe(root, name), f"recipes/{name}.yaml")
    settings, rows, recipe = recipe_settings(root, params), [], params.recipe
    for i, named in enumerate(recipe.settings if recipe else []):
        values = settings_at(settings, named.setting)
        if not values:
            raise UserError(f"recipes/{name}.yaml: recipe.settings.{i}: the recipe has no key `{named.setting}`")
        distinct = [value for k, value in enumerate(values) if value not in values[:k]]
        here = distinct[0] if len(distinct) == 1 else distinct
        keys_alone = isinstance(named.source, list) and isinstance(here, dict)
        here = list(here) if keys_alone else here
        same = here == named.source
        notes = {"differences": recipe.differences, "guesses": recipe.guesses} if recipe and not same else {}
        origin = next((kind for kind, texts in notes.items() if named.setting in texts), "")
        why = notes[origin][named.setting] if origin else ""
        rows.append(SettingRow(named.setting, named.source, named.place, here, same, why, origin))
    return rows


def value_text(value: Any) -> str:
    """A value of YAML for readers, in one line: `none`, `yes`, 5e-05, 1,000, a name and its value."""
    if value is None or value in ([], {}, ""):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(value_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {value_text(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def settings_table(rows: list[SettingRow]) -> str:
    """`rows` as a table in Markdown."""
    cells = [
        (f"`{row.setting}`", value_text(row.source), row.place, value_text(row.here), "same" if row.same else row.why)
        for row in rows
    ]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in (COLUMNS, ["---"] * len(COLUMNS), *escaped))


def settings_page(root: Path) -> str:
    """The page of all recipes in Markdown."""
    parts = []
    for path in sorted((root / "recipes").glob("*.yaml")):
        if rows := setting_rows(root, path.stem):
            count = f"{sum(row.same for row in rows)} of {len(rows)} settings are the source's."
            parts.append(f"## {path.stem}\n\n{count}\n\n{settings_table(rows)}\n")
    return "\n".join([HEADING, *parts])


def print_settings(name: str) -> None:
    """Print the settings of recipe `name`, or of `all` write the page, and that of features. Raises UserError."""
    root = repository_root()
    if name != "all":
        print(settings_table(setting_rows(root, name)))
        return
    for file, text in ((SETTINGS_FILE, settings_page(root)), (PAGE_FILE, features_page(root))):
        with atomic_write(root / file) as scratch:
            scratch.write_text(text, encoding="utf-8")
    print(f"all recipes: {SETTINGS_FILE}, {PAGE_FILE}")
