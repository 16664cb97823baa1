"""Settings of `params.yaml`: old names, differences between a student and its control, settings without effect."""

from __future__ import annotations

import json
import re
import shutil

import pytest

import tiny
from distillery.config.effects import control_differences, unused_settings
from distillery.config.load import validate_section
from distillery.config.renamed import rename_old_keys
from distillery.config.schema import Params
from distillery.errors import UserError
from distillery.files import read_yaml
from distillery.pipeline.task_checks import check_task_kinds
from experiments import changed, load, prepare


@pytest.fixture
def folder(tmp_path):
    return prepare(tmp_path)


# old key, its value, the new key, and its value
RENAMED = [
    ("students.kd.phases.0.take", {"confidence": 0.6}, "students.kd.phases.0.pseudo_labels", {"min_confidence": 0.6}),
    ("students.kd.phases.1.take", {"agree": True}, "students.kd.phases.1.pseudo_labels", {"agreement": True}),
    ("students.gold.phases.0.loss.prior", 0.3, "students.gold.phases.0.loss.label_prior", 0.3),
    ("data.news.filter", {"least": 2}, "data.news.filter", {"min_keywords": 2}),
    (
        "data.bare",
        {"source": "hub:a/b", "task": "mood", "hub_splits": {"train": "train", "validation": "v", "test": "t"}},
        "data.bare",
        {"source": "hub:a/b", "task": "mood", "splits": {"train": "train", "validation": "v", "test": "t"}},
    ),
    (
        "models.encoder.built",
        {"type": "bert", "words": ["x"]},
        "models.encoder.random",
        {"type": "bert", "words": ["x"]},
    ),
    ("search.sets", 7, "search.trials", 7),
    ("search.choose", {"loss": [{"prior": 0.1}]}, "search.choices", {"loss": [{"label_prior": 0.1}]}),
    ("teachers.far.shots", "gold", "teachers.far.examples_from", "gold"),
    ("teachers.far.api.attempts", 3, "teachers.far.api.max_attempts", 3),
]


def with_far_teacher_and_search(key: str, value):
    """BASE with a teacher behind an endpoint and a search, and `value` at `key`."""
    raw = changed("search", {"student": "kd", "learning_rate": [0.1, 0.2]})
    raw["teachers"]["far"] = {"kind": "api", "data": ["news"], "few_shot": 2, "api": {"model": "m"}}
    if key.startswith("models.encoder."):
        del raw["models"]["encoder"]["folder"]
    *path, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    node = raw
    for part in path:
        node = node[part]
    node[last] = value
    return raw


@pytest.mark.parametrize(("old", "old_value", "new", "new_value"), RENAMED, ids=[old for old, *_ in RENAMED])
def test_an_old_key_is_still_read_and_named_on_stderr(folder, capsys, old, old_value, new, new_value):
    expected = load(folder, with_far_teacher_and_search(new, new_value))
    assert capsys.readouterr().err == ""
    assert load(folder, with_far_teacher_and_search(old, old_value)) == expected
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(
        re.fullmatch(r"params\.yaml: \S+: renamed to \w+; the old key is read until version 0\.3", line)
        for line in lines
    )
    if old.rpartition(".")[2] != new.rpartition(".")[2]:
        assert f"params.yaml: {old}: renamed to {new.rpartition('.')[2]}; " in "\n".join(lines)


def test_an_old_key_beside_its_new_one_is_a_mistake(folder):
    raw = with_far_teacher_and_search("search.trials", 7)
    raw["search"]["sets"] = 7
    with pytest.raises(
        UserError, match=r"^params.yaml: search.sets: renamed to `trials`, which stands there too; leave"
    ):
        load(folder, raw)


def test_a_renamed_loss_term_keeps_its_place(folder):
    raw = changed("students.gold.phases.0.loss", {"prior": 0.1, "ce": 1.0})
    renamed = rename_old_keys(raw, "params.yaml")
    assert list(renamed["students"]["gold"]["phases"][0]["loss"]) == ["label_prior", "ce"]
    assert list(raw["students"]["gold"]["phases"][0]["loss"]) == ["prior", "ce"]  # not changed in place


# the key of the student `kd` that differs, its value, and the lines
DIFFERENCES = [
    (None, None, ["init.layers: [0, 2] and all"]),
    ("dtype", "bfloat16", ["init.layers: [0, 2] and all", "dtype: bfloat16 and float32"]),
    ("init", {}, []),
    ("phases.0.learning_rate", 2.0e-3, ["init.layers: [0, 2] and all", "phases.0.learning_rate: 0.002 and 0.0001"]),
    ("phases.0.steps", 3, ["init.layers: [0, 2] and all", "steps: 3 and 4"]),
    (
        "phases.0.steps",
        "auto",
        ["init.layers: [0, 2] and all", "phases.0.schedule: inverse_sqrt and linear", "steps: auto and 4"],
    ),
    ("phases.0.balance", "batches", ["init.layers: [0, 2] and all", "phases.0.balance: batches and none"]),
    (
        "phases.0.early_stopping",
        {"every": 1},
        [
            "init.layers: [0, 2] and all",
            "phases.0.early_stopping: {'metric': 'macro_f1', 'patience': 3, 'every': 1} and none",
        ],
    ),
    (
        "phases.0.early_stopping",
        {"metric": "agreement", "every": 1},
        ["init.layers: [0, 2] and all", "phases.0.early_stopping: {'patience': 3, 'every': 1} and none"],
    ),
    # what a control is to differ in, what changes no result, and settings that the control has no use for
    ("phases.0.data", ["news/train", "bare/train"], ["init.layers: [0, 2] and all"]),
    ("phases.0.temperature", 2.0, ["init.layers: [0, 2] and all"]),
    ("phases.0.pseudo_labels", {"agreement": True}, ["init.layers: [0, 2] and all"]),
    ("checkpoint_every", 7, ["init.layers: [0, 2] and all"]),
    ("phases.0.validate_every", 2, ["init.layers: [0, 2] and all"]),
]


@pytest.mark.parametrize(("key", "value", "lines"), DIFFERENCES, ids=[str(key) for key, *_ in DIFFERENCES])
def test_settings_in_which_a_student_differs_from_its_control(folder, key, value, lines):
    raw = changed("students.kd.phases.1.steps", 4)
    raw["students"]["kd"]["phases"].pop(0)
    node, *path = raw["students"]["kd"], *(key or "").split(".")
    for part in path[:-1]:
        node = node[int(part) if part.isdigit() else part]
    if key:
        node[path[-1]] = value
    params = load(folder, raw)
    assert control_differences(params, "kd") == lines
    assert control_differences(params, "gold") == []


def test_a_student_that_stops_by_agreement_differs_from_its_control_in_no_metric(folder):
    raw = changed("students.kd.phases.1.steps", 4)
    raw["students"]["kd"]["phases"].pop(0)
    raw["students"]["kd"]["phases"][0]["early_stopping"] = {"metric": "agreement", "every": 2}
    raw["students"]["gold"]["phases"][0]["early_stopping"] = {"metric": "loss", "every": 2}
    assert control_differences(load(folder, raw), "kd") == ["init.layers: [0, 2] and all"]


@pytest.mark.parametrize(
    ("keys", "value", "line"),
    [
        (
            ("teachers", "prompted", "calibrate"),
            "clusters",
            "teachers.prompted.calibrate: clusters: the labels of `pronoun`, a task of `kind: choice`, are places of",
        ),
        (
            ("students", "answers", "phases", 0, "early_stopping"),
            {"metric": "agreement"},
            "students.answers.phases.0.early_stopping.metric: agreement: is of one label for a row, and the task is "
            "of `kind: qa`; allowed: accuracy, macro_f1, loss",
        ),
    ],
)
def test_a_setting_that_the_kind_of_a_task_cannot_have_is_refused(tmp_path, monkeypatch, keys, value, line):
    raw = read_yaml(tiny.ROOT / "tests/smoke_tasks.yaml")
    raw["teachers"]["prompted"].pop("prompts")
    raw = json.loads(json.dumps(raw))
    node = raw
    for key in keys[:-1]:
        node = node[key]
    shutil.copytree(tiny.ROOT / "tasks", tmp_path / "tasks")
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    check_task_kinds(validate_section(Params, raw, "params.yaml"))
    node[keys[-1]] = value
    with pytest.raises(UserError) as refused:
        check_task_kinds(validate_section(Params, raw, "params.yaml"))
    assert str(refused.value).startswith(f"params.yaml: {line}")


def test_students_with_other_numbers_of_phases_are_compared_in_all_values_of_a_setting(folder):
    raw = changed("students.kd.init", {})
    assert control_differences(load(folder, raw), "kd") == ["phases: 2 and 1"]  # one phase gives epochs: no total
    raw["students"]["kd"]["phases"][0]["learning_rate"] = 0.5
    raw["students"]["kd"]["phases"][1]["batch_size"] = 8
    assert control_differences(load(folder, raw), "kd") == [
        "phases: 2 and 1",
        "phases.*.learning_rate: 0.5, 0.0001 and 0.0001",
        "phases.*.batch_size: 16, 8 and 16",
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, None),
        ({"temperature": 2.0}, None),
        (
            {"loss": {"ce": 1.0}, "temperature": 1.0},
            "temperature: has no effect in this phase: it needs kl or reverse_",
        ),
        (
            {"loss": {"pkd": 1.0}, "temperature": 1.0},
            "temperature: has no effect in this phase: it needs kl or reverse",
        ),
        ({"beta": 0.5}, "beta: has no effect in this phase: it needs jsd"),
        ({"loss": {"jsd": 1.0}, "beta": 0.5}, None),
        ({"alpha": 0.1}, "alpha: has no effect in this phase: it needs skew_kl or skew_reverse_kl"),
        ({"loss": {"skew_reverse_kl": 1.0}, "alpha": 0.1}, None),
        ({"sampling_temperature": 1.0}, "sampling_temperature: has no effect in this phase: it needs on_policy"),
    ],
)
def test_settings_without_effect(folder, changes, line):
    raw = changed("seeds", [0])
    raw["students"]["kd"]["phases"][0].update(changes)
    lines = unused_settings(load(folder, raw))
    if line is None:
        assert lines == []
    else:
        assert len(lines) == 1 and lines[0].startswith(f"students.kd.phases.0.{line}")
