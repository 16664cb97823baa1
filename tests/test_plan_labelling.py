"""What labelling would take, by figures computed by hand; no endpoint is called and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

import tiny
from distillery.cli import main
from distillery.config.load import load_params, validate_section
from distillery.config.schema import ApiConfig, Params, SourceConfig
from distillery.errors import UserError
from distillery.files import read_yaml
from distillery.pipeline.plan.labelling import CLIENT_RATE, Labelling, plan_labelling, read_rows_to_label
from distillery.pipeline.plan.requests import Figure, RequestedRows, Requests, total_tokens
from distillery.tasks.prompts import chat_turns
from distillery.tasks.schema import Task, load_task
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


def prompt_tokens(task: Task, frame: pd.DataFrame, prompt: str | None = None) -> float:
    """Mean tokens of a label prompt with one solved example, at four bytes a token."""
    task = task.model_copy(update={"prompt": task.prompts[prompt]}) if prompt else task
    turns = [chat_turns(task, text, 1) for text in frame["text"]]
    return float(np.mean([sum(len(turn["content"].encode()) for turn in one) for one in turns])) / 4


def reason_tokens(task: Task, frame: pd.DataFrame) -> float:
    """Mean tokens of a request for a reason, at four bytes a token: the examples of the task file, then the row."""
    request = "{}\n\nWhy is the sentiment {}? Answer in one short sentence."
    before = task.prompt.system
    for example in task.few_shot:
        before += request.format(example.text, example.label) + example.rationale
    rows = frame[frame["split"].isin(["train", "pool"])]
    labels = rows["label"].where(rows["label"].notna(), "positive")
    last = [len(request.format(*row).encode()) for row in zip(rows["text"], labels, strict=True)]
    return (len(before.encode()) + float(np.mean(last))) / 4


def test_the_plan_of_an_endpoint_is_that_by_hand(root, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    params = changed(load_params(root / "params.yaml"), {"key": "NO_SUCH_KEY"})  # none is needed
    frame, task = read_rows_to_label(root, params, "finance"), load_task("finance-sentiment", root / "tasks")
    plan = plan_labelling(root, params, "far", rate=5.0, workers=3)
    assert plan.rows.value == len(frame) and 100 < len(frame) <= 200
    labels, compared = 2 * len(frame), 2 * (frame["split"] == "validation").sum()
    calls = labels + compared + 7
    assert plan.calls.value == calls
    prompt, bare, reason = prompt_tokens(task, frame), prompt_tokens(task, frame, "bare"), reason_tokens(task, frame)
    assert bare < prompt < reason
    tokens = labels * prompt + compared * bare + 7 * reason
    assert plan.input_tokens.value == pytest.approx(tokens) and "rule of thumb" in plan.input_tokens.origin
    written = 5 * (labels + compared) + 7 * 48
    assert plan.output_tokens.value == written and "at most" in plan.output_tokens.origin
    assert plan.rate.value == 15 and plan.hours.value == pytest.approx(calls / 15 / 3600)
    assert plan.dollars.value == pytest.approx((2 * tokens + 10 * written) / 1e6)
    assert not (root / STORE_PATH).exists()

    million = plan_labelling(root, params, "far", "finance", rows=1_000_000, rate=5.0)
    assert million.calls.value == 2_000_000 + calls - labels and million.rate.value == 10
    more = 2_000_000 - labels
    assert million.dollars.value == pytest.approx((2 * (tokens + more * prompt) + 10 * (written + more * 5)) / 1e6)
    unknown = plan_labelling(root, params, "far")
    assert unknown.rate.value is None and "give --rate" in unknown.rate.origin and unknown.hours.value is None


def test_more_endpoints_than_one_client_can_keep_busy_make_a_plan_no_shorter(root):
    plans = [plan_labelling(root, load_params(root / "params.yaml"), "far", rate=40.0, workers=n) for n in (2, 8)]
    assert [plan.rate.value for plan in plans] == [CLIENT_RATE, CLIENT_RATE]
    assert plans[0].hours.value == plans[1].hours.value == plans[0].calls.value / CLIENT_RATE / 3600
    assert "the client's limit" in plans[1].rate.origin and "is below 320.00 (8 × 40 calls/s" in plans[1].rate.origin


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
    labels, compared = 2 * len(frame) - 30, 2 * (frame["split"] == "validation").sum()
    counted = compared * prompt_tokens(task, frame, "bare") + 7 * reason_tokens(task, frame)
    assert plan.input_tokens.value == pytest.approx(labels * 100.5 + counted)
    assert plan.output_tokens.value == (labels + compared) * 3 + 7 * 48
    assert "as the endpoint counted them in 30 kept answers" in plan.input_tokens.origin
    assert plan.rate.value == 6 / 0.5 + 1  # six calls at a time; one a second
    assert plan_labelling(root, params, "far", workers=4).rate.value == 2 * (6 / 0.5 + 1)


ROWS = pd.DataFrame(
    {
        "split": ["train"] * 3 + ["pool"] * 4 + ["validation"] * 5 + ["test"] * 8,
        "text": [f"Sales of {'a' * n} rose." for n in range(20)],
        "label": [*["positive"] * 3, *[None] * 4, *["neutral"] * 13],
        "group": None,
    }
)


def requests_of(root: Path, params: Params, far: dict[str, Any] | None = None) -> dict[str, Requests]:
    """The requests that the labels of `ROWS` take, by their purpose. far: other settings of the endpoint."""
    spec = params.teachers["far"].model_copy(update=far or {})
    task = load_task("finance-sentiment", root / "tasks")
    rows = RequestedRows(root, params, "far", spec, task, ROWS)
    return {request.purpose: request for request in rows.requests(Figure(len(ROWS), ""))[0]}


def test_a_prompt_that_was_chosen_is_that_of_the_labels_and_of_the_answers_that_are_kept(root):
    params = changed(load_params(root / "params.yaml"), {"samples": 1})
    task, store = load_task("finance-sentiment", root / "tasks"), AnswerStore(root / STORE_PATH)
    (root / "data/teacher/far").mkdir(parents=True)
    (root / "data/teacher/far/prompting.json").write_text(json.dumps({"prompt": "bare", "prior": None}))
    endpoint = Endpoint("far", params.teachers["far"].api, store)
    bare, validation = task.model_copy(update={"prompt": task.prompts["bare"]}), ROWS[ROWS["split"] == "validation"]
    for prompted, texts in ((bare, ROWS["text"][:9]), (task, validation["text"][:4])):
        questions = ApiTeacher(endpoint, prompted, 1).questions(texts.tolist())
        store.put((question, Answer("positive")) for question in questions)
    requests = requests_of(root, params)
    labels, compared = requests["for labels"], requests["to compare `prompt`"]
    assert (labels.count, compared.count) == (20 - 9, 5 - 4) and requests["for rationales"].count == 7
    assert labels.input.value == pytest.approx(prompt_tokens(task, ROWS, "bare"))
    assert compared.input.value == pytest.approx(prompt_tokens(task, ROWS))
    assert requests["for rationales"].input.value == pytest.approx(reason_tokens(task, ROWS))
    (root / "data/teacher/far/prompting.json").write_text(json.dumps({"prompt": "other", "prior": None}))
    with pytest.raises(UserError, match="data/teacher/far/prompting.json: the task has no prompt `other`"):
        requests_of(root, params)


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({}, [0, 0]),
        ({"calibrate": "contextual"}, [3, 3]),
        ({"calibrate": "batch"}, [0, 4]),
        ({"calibrate": "clusters"}, [0, 4]),
        ({"choose_prompt_by": "mutual_information"}, [0, 4]),
    ],
)
def test_rows_that_calibrate_are_counted(root, settings, more):
    """Three texts without content by each of two prompts; or the pool, which one of them labels anyway."""
    requests = requests_of(root, load_params(root / "params.yaml"), settings)
    counts = [requests[f"to compare `{prompt}`"].count for prompt in ("prompt", "bare")]
    assert counts == [2 * more[0], 2 * (5 + more[1])]  # two samples of each


def test_what_does_not_grow_with_the_rows_is_no_part_of_the_time_of_a_row(root):
    """Methods are compared for the longest rows, before the clock starts."""
    params, task = load_params(root / "params.yaml"), load_task("finance-sentiment", root / "tasks")
    calls = []
    teacher = SimpleNamespace(predict=lambda rows: calls.append(rows["text"].str.len().tolist()))
    teacher.generate = lambda turns, **_: calls.append([len(one[-1]["content"]) for one in turns])
    labelling = Labelling(root, params, "lm", params.teachers["lm"], task, ROWS)
    labelling._label_rate(teacher), labelling._seconds_of_reason(teacher)
    for first, timed in (calls[:2], calls[2:]):
        assert max(first) == max(timed) and len(timed) > len(first)


def test_an_answer_to_a_question_is_written_and_a_label_is_not(root):
    (root / "models/tiny-llama").rmdir()
    params, task = load_params(root / "params.yaml"), load_task("trivia", root / "tasks")
    spec = params.teachers["lm"].model_copy(update={"finetune": None})  # `max_new_tokens`: 8, `rationales`: 2
    requests, _ = RequestedRows(root, params, "lm", spec, task, ROWS.assign(label=None)).requests(Figure(1000, ""))
    assert [request.count for request in requests] == [1000, 2]
    assert total_tokens(requests, "output").value == 1000 * 8 + 2 * 8
    task = load_task("finance-sentiment", root / "tasks")
    requests, _ = RequestedRows(root, params, "lm", spec, task, ROWS).requests(Figure(1000, ""))
    assert [request.count for request in requests] == [1000, 5 + 3 + 4, 2]  # validation, without content, the pool
    assert total_tokens(requests, "output").value == 2 * 8


def test_an_endpoint_gives_no_free_answers_and_so_has_no_plan(root):
    shutil.copy(tiny.ROOT / "data/corpora/trivia.jsonl", root / "data/corpora")
    source = {
        "source": "data/corpora/trivia.jsonl",
        "task": "trivia",
        "columns": {"text": "question", "label": "answers"},
    }
    source["split"] = {"train": 0.7, "validation": 0.1, "test": 0.2}
    params = load_params(root / "params.yaml")
    far = params.teachers["far"].model_copy(update={"data": ["trivia"], "prompts": []})
    trivia = validate_section(SourceConfig, source, "params.yaml")
    update = {"data": params.data | {"trivia": trivia}, "teachers": params.teachers | {"far": far}}
    with pytest.raises(UserError, match="^params.yaml: teachers: free answers come from `kind: lm` and `seq2seq` only"):
        plan_labelling(root, params.model_copy(update=update), "far", rate=1.0)


def test_tokens_that_an_endpoint_scores_are_counted(root):
    """A call for the label of each row to learn from, and one for each reason; the server writes one token."""
    (root / "models/tiny-llama").rmdir()  # without its tokenizer, four bytes are a token
    params = changed(load_params(root / "params.yaml"), {"tokens": "echo", "tokenizer": "tiny-llama", "samples": 1})
    requests, prompt = requests_of(root, params), prompt_tokens(load_task("finance-sentiment", root / "tasks"), ROWS)
    assert [request.count for request in requests.values()] == [20, 0, 5, 7, 7, 7]
    assert requests["for tokens of labels"].input.value == pytest.approx(prompt)
    assert requests["for tokens of rationales"].input.value == pytest.approx(prompt + 48)
    assert total_tokens(list(requests.values()), "output").value == 25 * 5 + 7 * 48 + 14


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
    assert f"{prompt:,.1f} for labels" in plan.input_tokens.origin
    assert ("kept answers not looked up" in plan.calls.origin) == (way == "similar")


def test_a_local_teacher_is_timed_and_its_tokens_are_those_of_its_tokenizer(root):
    for kind in ("llama", "bert"):
        (root / f"models/tiny-{kind}").rmdir()
    tiny.build_models(root / "models")
    params = load_params(root / "params.yaml")
    params = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"machine_price_per_hour": 0.5})})
    plan = plan_labelling(root, params, "lm", rows=1_000_000, workers=2)
    assert plan.rate.value > 0 and "measured on 32 rows here" in plan.rate.origin
    rationales = float(re.search(r"and ([\d.]+) for rationales", plan.hours.origin)[1])
    assert plan.hours.value == pytest.approx(1e6 / plan.rate.value / 3600 + rationales, abs=0.01)
    assert plan.output_tokens.value == 2 * 8  # of two rationales
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
    main(["plan", "far", "--rows", "1000000", "--rate", "8", "--workers", "8"])
    lines = capsys.readouterr().out.splitlines()
    table = pd.Series({line[:14].strip(): line[14:].split() for line in lines[-7:]})
    assert list(table.index) == ["rows", "calls", "input tokens", "output tokens", "rate", "hours", "dollars"]
    assert table["rows"][0] == "1,000,000" and table["rate"][:4] == ["64.00", "8", "×", "8"]
