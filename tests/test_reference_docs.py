"""The reference of all keys, and the JSON schema for editors: written from the classes, and up to date."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from distillery.config.reference_docs import REFERENCE_FILE, SCHEMA_FILE, reference_markdown, schema_json, sections
from distillery.config.schema import Params
from distillery.files import read_yaml
from distillery.tasks.schema import Task

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = [*sections(Params), *sections(Task)]


@pytest.mark.parametrize(("file", "text"), [(SCHEMA_FILE, schema_json()), (REFERENCE_FILE, reference_markdown(Task))])
def test_the_committed_documents_are_those_of_the_schema(file, text):
    assert (ROOT / file).read_text(encoding="utf-8") == text, "run `distillery schema --write`"


@pytest.mark.parametrize(
    ("place", "section"), SECTIONS, ids=[f"{place or section.__name__}" for place, section in SECTIONS]
)
def test_every_section_and_every_key_has_a_meaning(place, section):
    assert "__doc__" in vars(section) and section.__doc__, f"{section.__name__} has no docstring"
    missing = [key for key, field in section.model_fields.items() if not field.description]
    assert missing == [], f"{section.__name__}: a string below each of these fields must give its meaning"


def test_sections_are_found_wherever_they_stand():
    places = dict(sections(Params))
    assert {"", "data.<name>", "data.<name>.split", "students.<name>.phases[i].pseudo_labels"} <= set(places)
    assert "teachers.<name>.finetune.early_stopping" in places  # the first place of those that phases have, too
    assert "| `min_confidence` | number ≥ 0 and ≤ 1 | `0.0` |" in reference_markdown(Task)
    assert "| `epochs` | number > 0 or `auto` |  |" in reference_markdown(Task)
    assert "| `model` | name | required |" in reference_markdown(Task)


def test_an_editor_accepts_the_experiments_and_marks_a_slip():
    schema = json.loads(schema_json())
    for path in [ROOT / "params.yaml", ROOT / "tests/smoke.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))]:
        jsonschema.validate(read_yaml(path), schema)
    raw = read_yaml(ROOT / "params.yaml")
    raw["students"]["tiny-kd"]["phases"][0]["temprature"] = 2.0
    with pytest.raises(jsonschema.ValidationError, match="temprature"):
        jsonschema.validate(raw, schema)
