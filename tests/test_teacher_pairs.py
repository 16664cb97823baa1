"""The paired comparison of a run's teachers."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest

import tiny
from distillery.errors import UserError
from distillery.files import read_yaml
from distillery.tasks.schema import load_task

NAMES = ["positive", "neutral", "negative"]


@pytest.fixture
def teacher_pairs():
    return tiny.load_benchmark("teacher_pairs")


@pytest.fixture
def run(tmp_path):
    """A finished run of two teachers with 20 test rows: `lm` is right on 10 of them, `encoder` on 16."""
    tiny.copy_experiment(tmp_path)
    labels = [NAMES[i % 3] for i in range(20)]
    ids = [f"row-{i}" for i in range(20)]
    folder = tmp_path / "data/processed/finance"
    folder.mkdir(parents=True)
    pd.DataFrame({"id": ids, "label": labels, "group": ids}).to_parquet(folder / "test.parquet")
    (folder / "task.json").write_text(load_task("finance-sentiment", tiny.ROOT / "tasks").model_dump_json())
    for teacher, right in {"lm": 10, "encoder": 16}.items():
        predictions = [label if i < right else NAMES[i % 3 - 1] for i, label in enumerate(labels)]
        signals = pd.DataFrame({"source": "finance", "split": "test", "id": ids, "label": predictions})
        (tmp_path / f"data/teacher/{teacher}").mkdir(parents=True)
        signals.iloc[::-1].to_parquet(tmp_path / f"data/teacher/{teacher}/signals.parquet")
    return tmp_path


def test_gains_are_those_on_the_same_rows(teacher_pairs, run, capsys):
    teacher_pairs.main(str(run))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "finance: 20 test rows; gains over lm in points, with 95 % intervals"
    first, second = (line.split() for line in printed[3:5])
    assert (first[:2], first[3]) == (["lm", "50.0%"], "+0.0")
    assert (second[:2], second[3]) == (["encoder", "80.0%"], "+30.0")
    teacher_pairs.main(str(run), "lm", "encoder")
    printed = capsys.readouterr().out
    assert "+30.0 (" in printed and "-30.0 (" in printed


def test_a_source_that_the_teacher_does_not_label_is_left_out(teacher_pairs, run, capsys):
    params = read_yaml(run / "params.yaml")
    params["data"]["other"] = params["data"]["finance"]
    for teacher in params["teachers"].values():
        teacher["data"] = ["finance"]
    (run / "params.yaml").write_text(json.dumps(params))
    shutil.copytree(run / "data/processed/finance", run / "data/processed/other")
    teacher_pairs.main(str(run))
    assert capsys.readouterr().out.endswith("other: lm does not label it\n\n")


def test_an_unknown_teacher_ends_in_one_line(teacher_pairs, run):
    with pytest.raises(UserError, match="no teacher `gpt`; there are: lm, encoder"):
        teacher_pairs.main(str(run), "gpt")
