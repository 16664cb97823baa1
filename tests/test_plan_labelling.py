"""What labelling would take, by figures computed by hand; no endpoint is called and nothing is written."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

import tiny
from distillery.cli import main
from distillery.config.load import load_params, validate_section
from distillery.config.schema import ApiConfig, Params
from distillery.files import read_yaml
from distillery.pipeline.plan.labelling import plan_labelling, read_rows_to_label
from distillery.tasks.prompts import chat_turns
from distillery.tasks.schema import load_task
from distillery.teachers.api.client import Endpoint
from distillery.teachers.api.teacher import ApiTeacher
from distillery.teachers.cache import STORE_PATH, Answer, AnswerStore
from distillery.teachers.few_shot import GoldExamples

URLS = ["http://127.0.0.1:8/v1", "http://127.0.0.1:9/v1"]
API = {"model": "m", "endpoints": [{"base_url": url} for url in URLS], "concurrency": 6}
API |= {"price": {"input": 2.0, "output": 10.0}, "samples": 2, "temperature": 1.0, "max_tokens": 5}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An experiment with few rows, the endpoint `far`, and the local `lm` without its model."""
    shutil.copytree(tiny.ROOT / "tasks", tmp_path / "tasks")
    (tmp_path / "data/corpora").mkdir(parents=True)
    shutil.copy(tiny.ROOT / "data/corpora/finance.jsonl", tmp_path / "data/corpora/finance.jsonl")
    for kind in ("llama", "bert"):
        (tmp_path / f"models/tiny-{kind}").mkdir(parents=True)
    (tmp_path / "dvc.yaml").touch()
    tree = read_yaml(tiny.ROOT / "tests/smoke.yaml")
    tree["data"]["finance"]["limit"] = 120
    tree["teachers"]["far"] = {"kind": "api", "api": API, "prompts": ["bare"], "few_shot": 1, "rationales": 7}
    tree["teachers"]["files"] = {
        "kind": "answers",
        "answers": {"files": ["a.csv"], "columns": {"id": "id", "text": None, "label": "label"}},
    }
    with (tmp_path / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(tree, file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(params: Params, settings: dict[str, Any]) -> Params:
    """`params` with other `settings` of the endpoint `far`."""
    far = params.teachers["far"].model_copy(update={"api": validate_section(ApiConfig, API | settings, "params.yaml")})
    return params.model_copy(update={"teachers": params.teachers | {"far": far}})


def test_the_plan_of_an_endpoint_is_that_by_hand(root, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    params = changed(load_params(root / "params.yaml"), {"key": "NO_SUCH_KEY"})  # none is needed
    frame, task = read_rows_to_label(root, params, "finance"), load_task("finance-sentiment", root / "tasks")
    plan = plan_labelling(root, params, "far", rate=5.0, workers=3)
    assert plan.rows.value == len(frame) and 100 < len(frame) <= 200
    calls = 2 * len(frame) + 7 + 2 * (frame["split"] == "validation").sum()
    assert plan.calls.value == calls
    turns = [chat_turns(task, text, 1) for text in frame["text"]]
    prompt = np.mean([sum(len(turn["content"].encode()) for turn in one) for one in turns]) / 4
    assert plan.input_tokens.value == pytest.approx(calls * prompt) and "rule of thumb" in plan.input_tokens.origin
    assert plan.output_tokens.value == 5 * calls and "at most" in plan.output_tokens.origin
    assert plan.rate.value == 15 and plan.hours.value == pytest.approx(calls / 15 / 3600)
    assert plan.dollars.value == pytest.approx(calls * (2 * prompt + 10 * 5) / 1e6)
    assert not (root / STORE_PATH).exists()

    million = plan_labelling(root, params, "far", "finance", rows=1_000_000, rate=5.0)
    assert million.calls.value == 2_000_000 + calls - 2 * len(frame) and million.rate.value == 10
    assert million.dollars.value == pytest.approx(million.calls.value * (2 * prompt + 50) / 1e6)
    unknown = plan_labelling(root, params, "far")
    assert unknown.rate.value is None and "give --rate" in unknown.rate.origin and unknown.hours.value is None


@pytest.mark.parametrize("kept_by", ["all", "one of them alone"])
def test_kept_answers_and_their_calls_give_tokens_and_rate(root, kept_by):
    servers = [{"base_url": URLS[0]}, {"base_url": URLS[1], "requests_per_minute": 60.0}]
    params = changed(load_params(root / "params.yaml"), {"endpoints": servers})
    frame, task = read_rows_to_label(root, params, "finance"), load_task("finance-sentiment", root / "tasks")
    store = AnswerStore(root / STORE_PATH)
    before = API if kept_by == "all" else {k: v for k, v in API.items() if k != "endpoints"} | {"base_url": URLS[0]}
    endpoint = Endpoint("far", validate_section(ApiConfig, before, "params.yaml"), store)
    questions = ApiTeacher(endpoint, task, 1).questions(frame["text"][:15].tolist())
    for i, question in enumerate(questions):
        call = store.open_call(question, endpoint.servers[0].identity, 9, 9)
        answered = question, Answer("positive", {"usage": [100 + i % 2, 3]})
        store.close_call(call, "answered", 0.5, (100 + i % 2, 3), answered)
    store.close_call(store.open_call(questions[0], endpoint.servers[0].identity, 1, 1), "timed out", 60.0, (0, 0))
    plan = plan_labelling(root, params, "far")
    calls = 2 * len(frame) + 7 + 2 * (frame["split"] == "validation").sum() - 30
    assert plan.calls.value == calls and "30 answers kept" in plan.calls.origin
    assert plan.input_tokens.value == calls * 100.5 and plan.output_tokens.value == calls * 3
    assert "as the endpoint counted them in 30 kept answers" in plan.input_tokens.origin
    assert plan.rate.value == 6 / 0.5 + 1  # six calls at a time; one a second
    assert plan_labelling(root, params, "far", workers=4).rate.value == 2 * (6 / 0.5 + 1)


@pytest.mark.parametrize("way", ["gold", "similar"])
def test_gold_rows_as_examples_are_counted(root, way):
    params = load_params(root / "params.yaml")
    examples = {"few_shot": 2, "examples_from": way, "embeddings": "tiny-bert" if way == "similar" else None}
    far = params.teachers["far"].model_copy(update=examples)
    params = params.model_copy(update={"teachers": params.teachers | {"far": far}})
    AnswerStore(root / STORE_PATH)
    frame, task = read_rows_to_label(root, params, "finance"), load_task("finance-sentiment", root / "tasks")
    plan = plan_labelling(root, params, "far", rate=1.0)
    chosen = GoldExamples(frame[frame["split"] == "train"], 2, None, far.seed)
    solved = [chosen.at(positions) for positions in chosen.choose(frame["text"].tolist(), frame["group"].tolist())]
    turns = [chat_turns(task, text, shots) for text, shots in zip(frame["text"], solved, strict=True)]
    prompt = np.mean([sum(len(turn["content"].encode()) for turn in one) for one in turns]) / 4
    assert plan.input_tokens.value == pytest.approx(plan.calls.value * prompt)
    assert ("kept answers not looked up" in plan.calls.origin) == (way == "similar")


def test_a_local_teacher_is_timed_and_its_tokens_are_those_of_its_tokenizer(root):
    for kind in ("llama", "bert"):
        (root / f"models/tiny-{kind}").rmdir()
    tiny.build_models(root / "models")
    params = load_params(root / "params.yaml")
    params = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"machine_price_per_hour": 0.5})})
    plan = plan_labelling(root, params, "lm", rows=1_000_000, workers=2)
    assert plan.rate.value > 0 and "measured on 32 rows here" in plan.rate.origin
    assert plan.hours.value == pytest.approx(1e6 / plan.rate.value / 3600)
    assert plan.dollars.value == pytest.approx(plan.hours.value * 2 * 0.5)
    assert "by the tokenizer of `tiny-llama`" in plan.input_tokens.origin and plan.calls.value == 0
    assert plan_labelling(root, params, "encoder", rate=8.0).rate.value == 8


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nobody"], "teacher: `nobody` is not in params.yaml; there are: "),
        (["files"], "params.yaml: teachers.files: its labels are in files; there is nothing to plan"),
        (["far", "--rate", "0"], "--rate: must be above 0, not 0"),
        (["far", "--source", "other"], "source: teacher `far` labels finance, not `other`"),
    ],
)
def test_a_plan_that_cannot_be_made_ends_in_one_line(root, arguments, line):
    with pytest.raises(SystemExit) as raised:
        main(["plan", *arguments])
    assert line in str(raised.value)


def test_the_command_prints_a_line_a_figure_and_where_it_comes_from(root, capsys):
    main(["plan", "far", "--rows", "1000000", "--rate", "40", "--workers", "8"])
    lines = capsys.readouterr().out.splitlines()
    table = pd.Series({line[:14].strip(): line[14:].split() for line in lines[-7:]})
    assert list(table.index) == ["rows", "calls", "input tokens", "output tokens", "rate", "hours", "dollars"]
    assert table["rows"][0] == "1,000,000" and table["rate"][:4] == ["320.00", "8", "×", "40"]
