"""Folders of text files, and exports of annotation tools in the formats that their documentation describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distillery.config.load import validate_section
from distillery.config.schema import SourceConfig
from distillery.data.nested import open_paths
from distillery.data.prepare import PreparedSource, prepare_source
from distillery.data.records import RawRows
from distillery.data.storage import read_split, write_source
from distillery.errors import UserError
from distillery.tasks.schema import Task

TASK = Task(kind="classification", labels={"up": "rises", "down": "falls"})
SHARES = {"train": 0.25, "pool": 0.25, "validation": 0.25, "test": 0.25}
TEXTS = [(f"{letter * 9} {letter * 5} {i}", ("up", "down")[i % 2]) for i, letter in enumerate("abcdefghijklmnopqrst")]


def prepare(folder: Path, name: str, records: list[dict] | None = None, **settings: Any) -> PreparedSource:
    if records is not None:
        content = json.dumps(records) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in records)
        (folder / name).write_text(content)
    raw = {"source": name, "task": "x", "split": SHARES, "near_duplicate": 1.0} | settings
    return prepare_source("x", validate_section(SourceConfig, raw, "params.yaml"), TASK, folder)


def prodigy(text: str, label: str, i: int) -> dict:
    return {"text": text, "meta": {"id": str(i)}, "_input_hash": i, "_task_hash": -i, "label": label, "spans": [],
            "answer": "accept"}  # fmt: skip


def prodigy_choice(text: str, label: str, i: int) -> dict:
    options = [{"id": "up", "text": "up"}, {"id": "down", "text": "down"}]
    return {"text": text, "options": options, "_input_hash": i, "_task_hash": -i, "_view_id": "choice",
            "config": {"choice_style": "single"}, "accept": [label], "answer": "accept"}  # fmt: skip


def doccano(text: str, label: str, i: int) -> dict:
    return {"id": i, "text": text, "label": [label], "Comments": []}


def label_studio_min(text: str, label: str, i: int) -> dict:
    return {"id": i, "text": text, "sentiment": label, "annotator": 1, "annotation_id": i, "lead_time": 4.288}


def label_studio(text: str, label: str, i: int) -> dict:
    result = {"from_name": "sentiment", "id": f"r{i}", "to_name": "text", "type": "choices", "origin": "manual",
              "value": {"choices": [label]}}  # fmt: skip
    annotation = {"id": i, "result": [result], "was_cancelled": False, "ground_truth": False, "completed_by": 10}
    return {"id": i, "project": 83, "data": {"text": text}, "annotations": [annotation], "predictions": []}


def argilla(text: str, label: str, i: int) -> dict:
    return {"id": f"u{i}", "fields": {"text": text}, "metadata": {}, "suggestions": {}, "status": "completed",
            "responses": {"label": [{"value": label, "user_id": "a"}, {"value": label, "user_id": "b"}]}}  # fmt: skip


STUDIO = {"columns": {"text": "data.text", "label": "annotations.result.value.choices"}}
STUDIO |= {"filter": {"keep": {"annotations.was_cancelled": [False]}}}
EXPORTS = [
    (prodigy, "a.jsonl", {}),
    (prodigy_choice, "a.jsonl", {"columns": {"label": "accept"}}),
    (doccano, "a.jsonl", {}),
    (label_studio_min, "a.json", {"columns": {"label": "sentiment"}}),
    (label_studio, "a.json", STUDIO),
    (argilla, "a.json", {"columns": {"text": "fields.text", "label": "responses.label.value"}}),
]


@pytest.mark.parametrize(("export", "name", "settings"), EXPORTS, ids=[export.__name__ for export, *_ in EXPORTS])
def test_the_export_of_a_tool_is_read_and_its_pool_hides_the_labels(tmp_path, export, name, settings):
    records = [export(text, label, i) for i, (text, label) in enumerate(TEXTS)]
    prepared = prepare(tmp_path, name, records, **settings)
    assert list(zip(prepared.rows["text"], prepared.rows["label"], strict=True)) == TEXTS
    write_source(prepared, tmp_path / "out")
    pool = read_split(tmp_path / "out", "pool")
    assert not {"label", "annotations", "responses", "accept", "sentiment"} & set(pool)
    assert len(pool) == prepared.audit["splits"]["pool"]["rows"] > 0


def test_rows_that_annotators_skipped_are_left_out(tmp_path):
    records = [label_studio(text, label, i) for i, (text, label) in enumerate(TEXTS)]
    records[3]["annotations"][0] |= {"was_cancelled": True, "result": []}
    assert len(prepare(tmp_path, "a.json", records, **STUDIO).rows) == 19
    records = [prodigy_choice(text, label, i) for i, (text, label) in enumerate(TEXTS)]
    records[3] |= {"accept": [], "answer": "ignore"}
    assert len(prepare(tmp_path, "a.jsonl", records, columns={"label": "accept"}).rows) == 19


def test_annotators_that_disagree_are_named(tmp_path):
    records = [argilla(text, label, i) for i, (text, label) in enumerate(TEXTS)]
    records[3]["responses"]["label"][1]["value"] = "up"
    line = r"^a.json, row 4: `responses.label.value` must be one label, not a list \(\['down', 'up'\]\); allowed: "
    with pytest.raises(UserError, match=line):
        prepare(tmp_path, "a.json", records, columns={"text": "fields.text", "label": "responses.label.value"})


def test_a_path_that_leads_nowhere_is_one_line(tmp_path):
    records = [argilla(text, label, i) for i, (text, label) in enumerate(TEXTS)]
    with pytest.raises(UserError, match=r"^a.json: no column `fields.txt` for the text; there are: `id`, `fields`, "):
        prepare(tmp_path, "a.json", records, columns={"text": "fields.txt", "label": "responses.label.value"})


@given(st.recursive(st.integers(), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from("ab01"), v)))
def test_any_value_can_be_walked(value):
    raw = RawRows("a", "row", [{"a": value, "a.a": 1}], [1])
    for path in ("a.b", "a.0", "a.b.0", "a.0.1.a"):
        opened = open_paths(raw, [path])
        assert opened is raw or (opened.rows[0].keys() == {"a.a", path} and opened.rows[0][path] is not None)
    assert open_paths(raw, ["a.a"]) is raw  # a column of this name comes first


def test_a_folder_for_each_label(tmp_path):
    for i, (text, label) in enumerate(TEXTS):
        (tmp_path / "mail" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "mail" / label / f"{i:02d}.txt").write_bytes(f"{text}\n café\n".encode("cp1252" if i else "utf-8"))
    (tmp_path / "mail" / "README.txt").write_text("not a row")
    prepared = prepare(tmp_path, "mail")
    assert sorted(prepared.rows["text"]) == [f"{text} café" for text, _ in TEXTS]
    labels = dict(zip(prepared.rows["text"].str.removesuffix(" café"), prepared.rows["label"], strict=True))
    assert labels == dict(TEXTS) and set(prepared.rows["id"]) >= {"up/00", "down/01"}
    assert any("is taken for cp1252" in line for line in prepared.audit["decisions"])
    (tmp_path / "mail" / "up" / "02.txt").write_bytes("Прибыль".encode("cp1251"))
    with pytest.raises(UserError, match=r"^mail/up/02.txt, line 1: byte 0xcf at offset 0 is not UTF-8; save the file"):
        prepare(tmp_path, "mail")
