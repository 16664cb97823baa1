"""The samples of public benchmarks as this project's rows, and the experiments on them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from ruamel.yaml import YAML

import tiny
from distillery.config.load import load_params
from distillery.errors import UserError

SENTENCES = {"cases": "Sarah was a much better surgeon than Maria so _ always got the easier cases."}
SENTENCES["answers"] = "Jo met Ann: she asked for Option 1 and _ nodded."  # a colon, and an option that is none
DAYS = ("Monday", "Tuesday", "Friday")  # a label needs groups for each split
PRONOUN = "Please choose the correct answer to fill in the blank to complete the given sentence: "
OPTIONS = "Option1: Sarah Option2: Maria Stone Answer format: option1/option2"
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
            "instruction": f"{PRONOUN}{day}, {text}\n\n{OPTIONS}",
            "output": f"the correct answer is option{number}",
        }
        for day in DAYS
        for number, text in enumerate(SENTENCES.values(), 1)
    ]
    answers = "Answer1: go home Answer2: shout: no! Answer3: cry\n\nAnswer format: answer1/answer2/answer3"
    situations = [
        {
            "instruction": QUESTION.replace("Riley", f"Riley {number}") + answers,
            "output": f"the correct answer is answer{1 + number % 3}",
        }
        for number in range(9)
    ]
    for name, rows in (("winogrande", pronouns), ("socialiqa", situations)):
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
    assert [row["text"] for row in rows[:2]] == [f"Monday, {text}" for text in SENTENCES.values()]
    assert [row["options"] for row in rows] == [["Sarah", "Maria Stone"]] * 6
    assert [row["answer"] for row in rows] == [1, 2] * 3
    situations = rows_of(data / "samples/siqa.jsonl")
    first = situations[0]
    assert first["text"] == "Riley 0 was rude. What will Tracy do next?" and first["group"] == "Riley 0 was rude."
    assert first["options"] == ["go home", "shout: no!", "cry"] and first["answer"] == 1
    floors = rows_of(data / "samples/siqa-options.jsonl")
    assert floors == [row | {"text": real_samples.NO_QUESTION} for row in situations]
    assert {row["split"] for row in situations} == set(real_samples.SHARES)


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


def test_a_question_and_its_options_alone_are_in_one_split(real_samples):
    """Groups stay whole, the shares are those of the rows, and a limit takes whole groups away."""
    rows = [{"id": f"r{i}", "group": f"g{i // 3}", "answer": 1 + i % 2} for i in range(300)]
    for limit, n in ((None, 300), (100, 102)):
        table = pd.DataFrame(real_samples.split_rows(rows, limit))
        assert len(table) == n and (table.groupby("group")["split"].nunique() == 1).all()
        assert (table.groupby("group").size() == 3).all()
        counts = table["split"].value_counts()
        for split, share in real_samples.SHARES.items():
            assert abs(counts[split] - share * n) <= 3
    floor = [row | {"text": "other"} for row in rows]
    splits = [{row["id"]: row["split"] for row in real_samples.split_rows(either, 100)} for either in (rows, floor)]
    assert splits[0] == splits[1] and {f"r{i}" for i in range(100)} != set(splits[0])


def test_gains_are_over_the_floor_on_the_same_rows(real_samples, tmp_path, capsys):
    """Eight rows: the student is right on six, the floor on two, which misses one of the rows."""
    params = {
        "data": {"siqa": {}, "siqa-options": {}},
        "teachers": {"large": {"data": ["siqa"]}},
        "students": {
            name: {"phases": [{"data": [f"{source}/train"]}]}
            for name, source in (("taught", "siqa"), ("gold", "siqa"), ("siqa-options", "siqa-options"))
        },
    }
    ids, label = [f"r{i}" for i in range(8)], list("12121212")
    right = {"taught": 6, "gold": 5, "siqa-options": 2}
    for name, n in right.items():
        there = list("21212121") if name == "siqa-options" else label  # its options have another order
        predictions = there[:n] + ["3"] * (8 - n)
        table = pd.DataFrame({"id": ids, "split": "test", "label": there, "prediction": predictions})
        (tmp_path / f"runs/{name}-0").mkdir(parents=True)
        table[: 7 if name == "siqa-options" else 8].to_parquet(tmp_path / f"runs/{name}-0/predictions.parquet")
    (tmp_path / "data/teacher/large").mkdir(parents=True)
    signals = [pd.DataFrame({"source": source, "split": "test", "id": ids, "label": "1"}) for source in params["data"]]
    pd.concat(signals).to_parquet(tmp_path / "data/teacher/large/signals.parquet")
    for source in params["data"]:
        (tmp_path / f"data/processed/{source}").mkdir(parents=True)
        rows = pd.DataFrame({"id": ids, "label": label, "group": ids})
        rows.to_parquet(tmp_path / f"data/processed/{source}/test.parquet")
    real_samples.print_scores(tmp_path, params)
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("siqa ")}
    assert (
        "75.0%" in lines["taught"] and "+57.1 (" in lines["taught"] and "over siqa-options on 7 rows" in lines["taught"]
    )
    assert "+12.5 (" in lines["taught"] and "over gold on 8 rows" in lines["taught"]
    assert "50.0%" in lines["large"] and "100.0%" in lines["large"] and "over gold" not in lines["gold"]


@pytest.mark.parametrize("domain", ["commonsense", "math"])
def test_the_experiments_are_valid_and_can_be_made_smaller(real_samples, tmp_path, domain):
    for name in ("qwen-1.5b", "qwen-0.5b"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "tasks").symlink_to(tiny.ROOT / "tasks")
    without = real_samples.experiment(domain, tiny.ROOT, 5, "large")
    raw = real_samples.experiment(domain, tiny.ROOT, 5)
    assert set(raw["students"]) - set(without["students"]) == {"large"}
    with pytest.raises(UserError, match=f"^--without: no student `huge` in {domain}; there are: taught, gold, "):
        real_samples.experiment(domain, tiny.ROOT, 5, "huge")
    with (tmp_path / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(raw, file)
    params = load_params(tmp_path / "params.yaml")
    assert {phase.steps for student in params.students.values() for phase in student.phases} == {5}
    floors = [name for name in params.students if name.endswith(real_samples.FLOOR)]
    assert floors == [name for name in params.data if name.endswith(real_samples.FLOOR)][::-1]
    assert all(params.students[name].phases[0].data == [f"{name}/train"] for name in floors)
