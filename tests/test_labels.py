"""Labels as files have them: numbers, true and false, lists of one, another case, and names by `columns.values`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from distillery.config.load import validate_section
from distillery.config.schema import ColumnNames, SourceConfig, SplitShares
from distillery.data.labels import LabelReader, value_text, yaml_keys
from distillery.data.prepare import PreparedSource, prepare_source
from distillery.errors import UserError
from distillery.tasks.schema import Task

CASES = Path(__file__).parent / "cases"
UP_DOWN_FLAT = Task(kind="classification", labels={"up": "rises", "down": "falls", "flat": "neither"})
SHARES = SplitShares(train=0.4, validation=0.3, test=0.3)
NUMBERS = {0: "down", 1: "up", 2: "flat"}


def prepare(file: Path, task: Task = UP_DOWN_FLAT, **columns: Any) -> PreparedSource:
    spec = SourceConfig(source=file.name, task="x", split=SHARES, columns=ColumnNames(**columns), near_duplicate=1.0)
    return prepare_source("x", spec, task, file.parent)


def written(folder: Path, labels: list[Any]) -> Path:
    """A file with one row for each of `labels`, whose texts are unlike."""
    rows = [{"text": f"{'abcdefgh'[i % 8] * (i + 3)} row", "label": label} for i, label in enumerate(labels)]
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("file", "columns", "mapped"),
    [
        ("float_labels.csv", {"values": NUMBERS}, [("1.0", "up", 20), ("0.0", "down", 20), ("2.0", "flat", 20)]),
        ("int_labels_need_names.csv", {"values": NUMBERS}, [("1", "up", 20), ("0", "down", 20), ("2", "flat", 20)]),
        ("case_labels.csv", {}, [("Down", "down", 10), ("Up", "up", 10), ("Flat", "flat", 10)]),
        ("list_labels.jsonl", {}, []),
    ],
)
def test_labels_as_people_have_them_are_read_and_counted(file, columns, mapped):
    prepared = prepare(CASES / file, **columns)
    assert prepared.rows["label"].value_counts().to_dict() == {"up": 20, "down": 20, "flat": 20}
    rose = prepared.rows["text"].str.startswith("Orders rose")
    assert set(prepared.rows["label"][rose]) == {"up"}
    assert [tuple(entry.values()) for entry in prepared.audit["mapped_labels"]] == mapped
    lines = [f"The label `{value}` of the file is read as `{label}` ({n} rows)." for value, label, n in mapped]
    assert prepared.audit["decisions"] == lines


@pytest.mark.parametrize("file", ["float_labels.csv", "int_labels_need_names.csv"])
def test_an_unknown_label_proposes_names_for_all_values_of_the_file(file):
    with pytest.raises(UserError) as caught:
        prepare(CASES / file)
    text = str(caught.value)
    assert text.startswith(f"{file}, line 2: unknown label '1")
    assert text.endswith("allowed: up, down, flat. To name the label that each value stands for, write "
                         "columns: {values: {0: …, 1: …, 2: …}}")  # fmt: skip
    proposed = text.rpartition("write ")[2]
    for label in ("down", "up", "flat"):  # the user fills in the labels: that is valid, and reads the file
        proposed = proposed.replace("…", label, 1)
    raw = {"source": file, "task": "x", "split": SHARES.model_dump(), "near_duplicate": 1.0}
    raw |= YAML(typ="safe", pure=True).load(proposed)
    spec = validate_section(SourceConfig, raw, "params.yaml")
    assert set(prepare_source("x", spec, UP_DOWN_FLAT, CASES).rows["label"]) == set(UP_DOWN_FLAT.names)


def test_a_column_of_many_unknown_values_is_no_column_of_labels(tmp_path):
    with pytest.raises(UserError, match=r"\(the column holds 30 values that are no label: is it the right one\?\)$"):
        prepare(written(tmp_path, [f"value {i}" for i in range(30)]))


@pytest.mark.parametrize(
    ("names", "values", "value", "label"),
    [
        (["0", "1"], None, 1, "1"),
        (["0", "1"], None, 1.0, "1"),
        (["0", "1"], None, "1.0", "1"),
        (["0", "1"], None, "1.00", "1"),
        (["0", "1"], None, 1.5, None),
        (["0", "1"], None, True, None),  # 1 for true is a guess
        (["-1", "1"], None, -1.0, "-1"),
        (["true", "false"], None, True, "true"),
        (["True", "False"], None, False, "False"),
        (["up", "down"], {True: "up", False: "down"}, True, "up"),
        (["up", "down"], {True: "up", False: "down"}, "FALSE", "down"),  # as spreadsheets write it
        (["up", "down"], {"1": "up", "0": "down"}, 0.0, "down"),
        (["up", "down"], {1: "up", 0: "down"}, "down", "down"),  # a name beside its number
        (["up", "down"], {0.5: "up", 1: "down"}, 0.5, "up"),
        (["up", "down"], {1: "up", 0: "down"}, [1], "up"),
        (["0", "1"], {0: "1", 1: "0"}, 0, "1"),  # the file's numbers come first
        (["up", "down"], None, " UP ", "up"),
        (["up", "down"], None, ["Up"], "up"),
        (["Straße", "Weg"], None, "STRASSE", "Straße"),
        (["US", "us"], None, "us", "us"),
        (["US", "us"], None, "Us", None),  # two labels without regard to case
        (["very high", "low"], None, "very\u00a0 High", "very high"),
        (["up", "down"], None, "upp", None),
        (["up", "down"], None, None, None),
        (["up", "down"], None, float("nan"), None),
        (["up", "down"], None, [], None),
        (["up", "down"], None, [None], None),
    ],
)
def test_the_label_of_a_value(names, values, value, label):
    assert LabelReader(names, values).read(value) == label


@pytest.mark.parametrize("value", [["up", "down"], {"up": 1}, [["up"]], [{"up": 1}]])
def test_several_labels_are_not_one(value):
    with pytest.raises(TypeError):
        value_text(value)


@given(st.lists(st.text("aAbBß", min_size=1, max_size=3), min_size=2, max_size=5, unique=True), st.data())
def test_a_label_in_another_case_is_read_only_where_one_label_is_left(names, data):
    value = data.draw(st.sampled_from(names)).swapcase()
    candidates = [name for name in names if name.casefold() == value.casefold()]
    expected = value if value in names else candidates[0] if len(candidates) == 1 else None
    assert LabelReader(names).read(value) == expected


PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)


@given(st.lists(PRINTABLE | st.sampled_from(["yes", "No", "null", "1.5"]) | st.integers().map(str), min_size=1))
def test_the_proposed_keys_are_yaml_that_dvc_can_sort(texts):
    texts = list(dict.fromkeys(value_text(text) for text in texts if value_text(text)))
    section = YAML(typ="safe", pure=True).load("{" + ", ".join(f"{key}: x" for key in yaml_keys(texts)) + "}")
    assert {value_text(key) for key in section} >= {text for text in texts if not text.lstrip("-0").isdecimal()}
    assert len({isinstance(key, str) for key in section}) <= 1


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"0": "down", 1: "up"}, "params.yaml: columns: the keys of `values` must be all numbers or all text: write"),
        ({}, "params.yaml: columns.values: must not be empty"),
        ({0: 1}, "params.yaml: columns.values.0: must be text, not 1"),
    ],
)
def test_values_that_params_must_not_hold(values, line):
    with pytest.raises(UserError) as caught:
        validate_section(SourceConfig, {"source": "a", "task": "x", "columns": {"values": values}}, "params.yaml")
    assert str(caught.value).startswith(line)


def test_a_name_that_is_no_label_and_a_task_without_labels(tmp_path):
    path = tmp_path / "float_labels.csv"
    shutil.copyfile(CASES / path.name, path)
    with pytest.raises(UserError, match=r"^float_labels.csv: columns.values.1: unknown label 'dwn'; allowed: up, down"):
        prepare(path, values={0: "up", 1: "dwn"})
    with pytest.raises(UserError, match=r"`columns.values` is for a task of `kind: classification` or `multilabel`$"):
        prepare(path, Task(kind="qa"), values={0: "up"})


def test_answers_of_a_choice_as_floats_and_small_letters(tmp_path):
    task = Task(kind="choice", labels={"A": "", "B": ""})
    rows = [{"text": f"{'ab'[i % 2] * (i + 2)} which", "options": ["no", "yes"], "label": 1.0} for i in range(24)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = prepare(path, task).rows
    path.write_text(path.read_text().replace("1.0", '"b"'))
    pd.testing.assert_frame_equal(numbers, prepare(path, task, first="A").rows)
    assert all(
        text.splitlines()["AB".index(label) + 1].endswith("yes") for text, label in numbers[["text", "label"]].values
    )


def test_whole_numbers_with_a_decimal_point_are_names_and_groups(tmp_path):
    """As pandas writes a column of whole numbers in which one is missing."""
    path = written(tmp_path, ["up", "down", "flat"] * 8)
    rows = [json.loads(line) | {"id": i + 0.0, "group": i // 2 + 0.0} for i, line in enumerate(path.open())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(path)
    assert list(prepared.rows["id"][:2]) == ["0", "1"] and set(prepared.rows["group"][:2]) == {"0"}
