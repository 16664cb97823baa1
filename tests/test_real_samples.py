"""The samples of public benchmarks as this project's rows, and the experiments on them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import tiny
from distillery.config.load import load_params
from distillery.errors import UserError

SENTENCES = {"cases": "Sarah was a much better surgeon than Maria so _ always got the easier cases."}
SENTENCES["answers"] = "Jo met Ann: she asked for Option 1 and _ nodded."  # a colon, and an option that is none
PRONOUN = "Please choose the correct answer to fill in the blank to complete the given sentence: "
QUESTION = "Please choose the correct answer to the question: Riley was rude. What will Tracy do next?\n\n"
PROBLEM = {"question": "How many are 2 and 3?", "options": ["A)5", "B)6", "C)23", "D)1", "E)0"], "correct": "A"}


@pytest.fixture
def real_samples():
    return tiny.load_benchmark("real_samples")


@pytest.fixture
def data(tmp_path):
    """The folders of the samples, with few rows each."""
    pronouns = [
        {
            "instruction": f"{PRONOUN}{text}\n\nOption1: Sarah Option2: Maria Stone Answer format: option1/option2",
            "output": f"the correct answer is option{number}",
        }
        for number, text in enumerate(SENTENCES.values(), 1)
    ]
    answers = "Answer1: go home Answer2: shout: no! Answer3: cry\n\nAnswer format: answer1/answer2/answer3"
    situation = {"instruction": QUESTION + answers, "output": "the correct answer is answer3"}
    for name, rows in (("winogrande", pronouns), ("socialiqa", [situation])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json").write_text(json.dumps(rows))
    (tmp_path / "aqua-rat").mkdir()
    for name in ("dev", "test"):
        (tmp_path / "aqua-rat" / f"{name}.json").write_text(json.dumps(PROBLEM) + "\n")
    return tmp_path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_questions_options_and_answers_are_found(real_samples, data):
    real_samples.write_samples("commonsense", data, tiny.ROOT, data / "samples")
    rows = rows_of(data / "samples/winogrande.jsonl")
    assert [row["text"] for row in rows] == list(SENTENCES.values())
    assert [row["options"] for row in rows] == [["Sarah", "Maria Stone"]] * 2
    assert [row["answer"] for row in rows] == [1, 2]
    (row,) = rows_of(data / "samples/siqa.jsonl")
    assert row["text"] == "Riley was rude. What will Tracy do next?" and row["group"] == "Riley was rude."
    assert row["options"] == ["go home", "shout: no!", "cry"] and row["answer"] == 3
    (floor,) = rows_of(data / "samples/siqa-options.jsonl")
    assert floor == row | {"text": real_samples.NO_QUESTION}


def test_word_problems_to_train_on_are_no_test_rows(real_samples, data):
    real_samples.write_samples("math", data, tiny.ROOT, data / "samples")
    train, test = (rows_of(data / f"samples/aqua-{part}.jsonl") for part in ("train", "test"))
    assert [row["id"] for row in test] == ["test1"] and train[0]["id"] == "dev1"
    assert len(train) == 1 + len(rows_of(tiny.ROOT / "data/corpora/math.jsonl"))
    assert {row["answer"] for row in train} <= set("ABCDE") and test[0]["answer"] == "A"
    for row in train:
        assert [option[:2] for option in row["options"]] == [f"{letter})" for letter in "ABCDE"[: len(row["options"])]]
    assert rows_of(data / "samples/aqua-options-test.jsonl")[0]["options"] == PROBLEM["options"]


def test_a_row_of_another_form_is_named(real_samples, data):
    path = data / "socialiqa/test.json"
    path.write_text(json.dumps([{"instruction": "What now?", "output": "the correct answer is answer1"}]))
    with pytest.raises(UserError, match=r"test\.json, row 1: not a question with options, but 'What now\?'"):
        list(real_samples.adapter_rows(path, re.compile(".*")))


@pytest.mark.parametrize("domain", ["commonsense", "math"])
def test_the_experiments_are_valid_and_can_be_made_smaller(real_samples, tmp_path, domain):
    for name in ("qwen-1.5b", "qwen-0.5b"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "tasks").symlink_to(tiny.ROOT / "tasks")
    raw = real_samples.experiment(domain, tiny.ROOT, 40, 5)
    with (tmp_path / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(raw, file)
    params = load_params(tmp_path / "params.yaml")
    assert {phase.steps for student in params.students.values() for phase in student.phases} == {5}
    assert all(source.limit == 40 for source in params.data.values())
    floor = params.students["options-alone"].phases[0]
    assert all(reference.split("/")[0].endswith("options") for reference in floor.data)
