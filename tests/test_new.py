"""`distillery new`: the drafts for files as people have them, and what it refuses."""

import csv
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from distillery.config.load import load_params
from distillery.data.prepare import prepare_source
from distillery.data.records import RawRows
from distillery.errors import UserError
from distillery.label_sets import split_labels
from distillery.pipeline.draft import MAX_ROWS, draft_files, new_experiment
from distillery.pipeline.guess import LabelGuess, guess_columns
from distillery.pipeline.label_set_checks import check_label_sets
from distillery.tasks.schema import load_task

ROOT = Path(__file__).resolve().parents[1]


def sentence(i: int) -> str:
    """A text of seven words that is unlike the others."""
    rng = np.random.default_rng(i)
    return " ".join("".join(rng.choice(list("abcdefghij"), 6)) for _ in range(7))


def table(root: Path, columns: dict[str, list], file: str = "data/mine.csv") -> str:
    (root / "dvc.yaml").touch()
    (root / file).parent.mkdir(exist_ok=True)
    with (root / file).open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([list(columns), *zip(*columns.values(), strict=True)])
    return str(root / file)


def draft(root: Path, columns: dict[str, list], text=None, label=(), name=None):
    """What `new` says of a table, and the section of its source in the params.yaml that it wrote."""
    lines = new_experiment(root, table(root, columns), name, text, label)
    params = load_params(root / "params.yaml")
    (source,) = params.data
    return lines, params, params.data[source], load_task(source, root / "tasks")


def rows_of(n: int = 40, labels: tuple = ("up", "down")) -> dict[str, list]:
    return {"text": [sentence(i) for i in range(n)], "label": [labels[i % len(labels)] for i in range(n)]}


def test_columns_with_the_usual_names(tmp_path):
    lines, params, source, task = draft(tmp_path, rows_of())
    assert (source.columns.text, source.columns.label, source.source) == ("text", "label", "data/mine.csv")
    assert task.names == ["up", "down"]
    assert lines[0].startswith("text: the column `text`, 7 words a row")
    assert lines[1] == "label: the column `label`, 2 labels: up (20), down (20)"
    assert "train 8, pool 16, validation 4, test 12" in lines[2]
    assert list(params.teachers) == ["smollm2"] and params.evaluate.headline == "small"
    steps = [sum(phase.steps for phase in student.phases) for student in params.students.values()]
    assert steps[0] == steps[1]  # the control trains for as many steps
    assert any(line.startswith("time: about ") for line in lines)


def test_columns_with_other_names_are_guessed_by_their_values(tmp_path):
    columns = rows_of(labels=("very good", "bad: no", "5 stars"))
    columns = {"Notes": columns["text"], "who": [f"p{i}" for i in range(40)], "Kind of it": columns["label"]}
    _, _, source, task = draft(tmp_path, columns)
    assert (source.columns.text, source.columns.label) == ("Notes", "Kind of it")
    assert task.names == ["very good", "bad: no", "5 stars"]


def test_named_columns_come_before_guesses(tmp_path):
    columns = rows_of() | {"body": [sentence(i)[:20] for i in range(40)], "tone": ["a", "b", "c", "d"] * 10}
    _, _, source, task = draft(tmp_path, columns, text="body", label=["tone"])
    assert (source.columns.text, source.columns.label) == ("body", "tone")
    assert task.names == ["a", "b", "c", "d"]


def test_labels_in_numbers_get_a_classifier_as_teacher(tmp_path):
    lines, params, _, task = draft(tmp_path, rows_of(labels=(0, 1)))
    assert task.names == ["0", "1"]
    assert [teacher.kind for teacher in params.teachers.values()] == ["classifier"]
    assert any("numbers, which say nothing" in line for line in lines)


def test_spellings_of_a_label_are_one(tmp_path):
    lines, _, _, task = draft(tmp_path, rows_of(labels=("up", "up", "Up", "down", "yes")))
    assert task.names == ["up", "down", "yes"]
    assert "up (24)" in lines[1]


def test_a_split_column_and_ids_that_repeat(tmp_path):
    part = ["train"] * 24 + ["dev"] * 6 + ["test"] * 10
    lines, params, source, _ = draft(tmp_path, rows_of() | {"id": [1, 2] * 20, "Split": part})
    assert source.split_column == "Split" and source.split is None and source.columns.id is None
    assert params.students["small"].phases[0].data == ["mine/train"]  # there is no pool
    assert "train 24, validation 6, test 10" in lines[2]


SETS = (
    ("up",),
    ("up", "guidance"),
    ("down",),
    (),
    ("guidance",),
    ("down", "guidance"),
    ("up",),
    ("up", "down", "guidance"),
)
WRITTEN = {
    "bar": ("|".join, 'divided by "|", '),
    "semicolon": ("; ".join, 'divided by ";", '),
    "comma": (",".join, 'divided by ",", '),
    "list": (lambda labels: json.dumps(list(labels)), ""),
    "list of Python": (lambda labels: str(list(labels)), ""),
}


def sets_of_rows(n: int = 80) -> list[tuple[str, ...]]:
    return [SETS[i % len(SETS)] for i in range(n)]


@pytest.mark.parametrize("written", WRITTEN)
def test_several_labels_in_a_cell_are_label_sets(tmp_path, monkeypatch, written):
    write, divided = WRITTEN[written]
    columns = {"text": [sentence(i) for i in range(80)], "tags": [write(labels) for labels in sets_of_rows()]}
    lines, params, source, task = draft(tmp_path, columns)
    assert task.kind == "multilabel" and task.names == ["up", "guidance", "down"]
    counts = "up (40), guidance (40), down (30); rows without any: 10 (kind: multilabel)"
    assert lines[1] == f"labels: the column `tags`, {divided}1.4 of 3 labels a row: {counts}"
    assert {teacher.kind for teacher in params.teachers.values()} == {"classifier"}
    rates = {phase.learning_rate for student in params.students.values() for phase in student.phases}
    assert rates == {3.0e-4, 1.0e-4}  # higher than for one label a row
    rows = prepare_source("mine", source, task, tmp_path).rows
    wanted = dict(zip(columns["text"], sets_of_rows(), strict=True))
    assert {row.text: set(split_labels(row.label)) for row in rows.itertuples()} == {t: {*x} for t, x in wanted.items()}
    monkeypatch.chdir(tmp_path)
    check_label_sets(params)


@pytest.mark.parametrize("yes, no", [(1, 0), ("1.0", "0.0"), ("True", "False"), ("yes", "")])
def test_columns_of_1_and_0_are_label_sets(tmp_path, yes, no):
    names = ["up", "down", "good guidance"]
    held = [{"good guidance" if label == "guidance" else label for label in labels} for labels in sets_of_rows()]
    columns = {"url": [f"https://a.b/{sentence(i).replace(' ', '-')}/{sentence(i + 1)[:6]}" for i in range(80)]}
    columns |= {"News": [sentence(i) for i in range(80)], "source": ["a", "b"] * 40, "stars": [1, 2, 3, 4] * 20}
    columns |= {name: [yes if name in labels else no for labels in held] for name in names}
    lines, params, source, task = draft(tmp_path, columns)
    assert source.columns.text == "News" and source.columns.label_columns == names and task.kind == "multilabel"
    assert lines[1].startswith("labels: the columns `up`, `down`, `good guidance` of 1 and 0, 1.4 of 3 labels a row: ")
    rows = prepare_source("mine", source, task, tmp_path).rows
    assert not {*names} & {*rows}  # no column beside the text tells the labels
    wanted = dict(zip(columns["News"], held, strict=True))
    if no == "":  # nothing in any of the columns
        assert lines[1].endswith("rows without any: 10 (kind: multilabel)")
    assert {row.text: set(split_labels(row.label)) for row in rows.itertuples()} == wanted


def guessed(columns: dict[str, list], label=()) -> LabelGuess:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return guess_columns(RawRows("mine.csv", "line", rows, list(range(2, len(rows) + 2))), None, label).gold


@pytest.mark.parametrize(
    "labels",
    [
        ("Food, drink", "Sports", "Arts"),
        ("up; not down", "down; not up"),
        ("a|b", "c|d", "e"),
        ("[sic]", "none"),
        ("very good", "good", "bad"),
    ],
)
def test_a_label_with_a_sign_inside_is_one_label(labels):
    gold = guessed(rows_of(60, labels))
    assert not gold.is_multilabel and set(gold.labels) == set(labels)


def test_texts_with_commas_are_no_label_sets():
    columns = {"body": [sentence(i) for i in range(60)], "note": [sentence(i).replace(" ", ", ") for i in range(60)]}
    assert guessed(columns | {"kind": ["a", "b"] * 30}).columns == ("kind",)


def test_two_columns_of_1_and_0_beside_others_are_labels_only_where_they_are_named():
    columns = rows_of(60) | {"seen": [1, 0] * 30, "read": [1, 0, 0] * 20}
    assert guessed(columns).columns == ("label",)
    del columns["label"]
    assert guessed(columns).columns == ("seen", "read")
    columns["tone"] = ["a", "b", "c"] * 20
    assert len(guessed(columns).columns) == 1
    assert guessed(columns, ["seen", "read"]).columns == ("seen", "read")
    with pytest.raises(UserError, match="mine.csv, line 2: `tone` must be 1 or 0, as it is one of several columns of"):
        guessed(columns, ["seen", "tone"])


def test_of_many_rows_some_are_drawn(tmp_path):
    n = MAX_ROWS + 6
    columns = {"text": [f"text {i}" for i in range(n)], "label": ["a", "b"] * (n // 2)}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    guess = guess_columns(RawRows("mine.csv", "line", rows, list(range(n))))
    _, params, lines = draft_files("mine", "mine.csv", guess)
    assert f"    limit: {MAX_ROWS} " in params
    assert any(line.startswith("limit: 20,000 of the 20,006 rows") for line in lines)


def test_a_name_is_made_from_the_file_or_given(tmp_path):
    file = table(tmp_path, rows_of(), "data/My Data (2).csv")
    new_experiment(tmp_path, file)
    assert (tmp_path / "tasks/my-data-2.yaml").exists()
    assert load_params(tmp_path / "params.yaml").data["my-data-2"].source == "data/My Data (2).csv"


@pytest.mark.parametrize("file", ["2024", "null", "2024-01-31", "on"])
def test_a_file_whose_name_is_no_text_in_yaml_is_drafted(tmp_path, file):
    new_experiment(tmp_path, table(tmp_path, rows_of(), f"data/{file}.csv"))
    params = load_params(tmp_path / "params.yaml")
    assert list(params.data) == [params.data[file].task] == [params.augment.source] == [file]


@pytest.mark.parametrize("name", ["a/b", "../../x", "a.b", "two words", "a\n"])
def test_a_name_that_no_source_can_have_ends_in_one_line(tmp_path, name):
    with pytest.raises(UserError, match="must be a name of letters, digits, `_` and `-`"):
        new_experiment(tmp_path, table(tmp_path, rows_of()), name)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "dvc.yaml"}


def test_models_are_those_of_the_default_experiment(tmp_path):
    _, params, _, _ = draft(tmp_path, rows_of())
    assert params.models == load_params(ROOT / "params.yaml").models


def test_only_what_git_can_bring_back_is_overwritten(tmp_path):
    file = table(tmp_path, rows_of())
    (tmp_path / "params.yaml").write_text("seeds: [0]\n")
    with pytest.raises(UserError, match="params.yaml: has changes that git does not have"):
        new_experiment(tmp_path, file)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *arguments], check=True)
    new_experiment(tmp_path, file)
    with pytest.raises(UserError, match="tasks/mine.yaml: there already"):
        new_experiment(tmp_path, file)
    before = (tmp_path / "params.yaml").read_text()
    with pytest.raises(UserError, match="params.yaml: has changes"):
        new_experiment(tmp_path, file, "other")
    assert (tmp_path / "params.yaml").read_text() == before and not (tmp_path / "tasks/other.yaml").exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [sentence(i) for i in range(40)], "n": range(40)}, "no column looks like a label .* with --label"),
        ({"a": range(40), "b": [1, 2] * 20}, "no column holds text; there are: `a`, `b`"),
        (rows_of() | {"label": ["up", "", "down", "up"] * 10}, "10 rows have no label in the column `label`"),
        (rows_of() | {"label": ["up"] * 39 + ["down"]}, "label `down` has 1 group"),
    ],
)
def test_a_file_that_cannot_be_drafted_ends_in_one_line_and_writes_nothing(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        new_experiment(tmp_path, table(tmp_path, columns))
    assert not (tmp_path / "params.yaml").exists() and not (tmp_path / "tasks").exists()


def test_a_wrong_column_or_place_ends_in_one_line(tmp_path):
    (tmp_path / "repo").mkdir()
    file = table(tmp_path / "repo", rows_of())
    with pytest.raises(UserError, match="no column `tone`; there are: `text`, `label`"):
        new_experiment(tmp_path / "repo", file, label=["tone"])
    outside = tmp_path / "mine.csv"
    outside.write_text("text,label\na,b\n")
    with pytest.raises(UserError, match="outside the repository; copy it into repo/data first"):
        new_experiment(tmp_path / "repo", str(outside))
