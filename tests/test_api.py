"""Endpoints: a real server on this machine, a proxy that breaks its answers; no answer and no key may get out."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

import loopback
import stages
import test_api_endpoints as served
import tiny
from distillery.config.load import validate_section
from distillery.config.schema import SPLITS, ApiConfig, Params
from distillery.errors import UserError
from distillery.files import read_yaml
from distillery.tasks.chosen_prompt import with_prompt
from distillery.tasks.parsing import parse_label, parse_label_set
from distillery.tasks.prompts import EXPLANATION_REQUEST
from distillery.tasks.schema import Task, load_task
from distillery.teachers.api import pacing
from distillery.teachers.api.budget import max_call_tokens
from distillery.teachers.api.client import MAX_EMPTY_ANSWERS, Endpoint
from distillery.teachers.api.failures import error_message, retry_after_seconds
from distillery.teachers.api.pacing import Pacer
from distillery.teachers.api.probabilities import label_probabilities
from distillery.teachers.api.teacher import ApiTeacher, label_schema
from distillery.teachers.base import open_teacher
from distillery.teachers.cache import Answer, AnswerStore
from distillery.teachers.rationales import add_rationales
from distillery.teachers.signals import signal_table
from forked import fork_context, preloaded_python
from report_project import experiment

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
KEY, SECRET = "DISTILLERY_TEST_KEY", "sk-test-7f3e9a1c5b2d4e6f8a0b"
TEXTS = list(dict.fromkeys(tiny.texts()))[:60]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(port, model folder) of `transformers serve` with a tiny model that mostly answers with a label."""
    folder = loopback.build_speaker(tmp_path_factory.mktemp("served") / "speaker", TASK.words)
    with loopback.served(folder) as port:
        yield port, str(folder)


@pytest.fixture(scope="module")
def reasoning_server(tmp_path_factory):
    """(port, model folder) of a server whose chat template takes no system turn, and reasoning that can be off."""
    folder = tmp_path_factory.mktemp("served") / "reasoner"
    loopback.build_speaker(folder, TASK.words, chat_template=loopback.STRICT_TEMPLATE)
    with loopback.served(folder) as port:
        yield port, str(folder)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)


def teacher(url: str, model: str, path: Path, **settings) -> ApiTeacher:
    base = {"model": model, "base_url": url, "key": KEY, "max_tokens": 1, "timeout": 30.0, "max_attempts": 20}
    spec = validate_section(ApiConfig, base | settings, "params.yaml")
    opened = ApiTeacher(Endpoint("far", spec, AnswerStore(path / "answers.sqlite")), TASK)
    opened.messages = []
    opened.endpoint.log = opened.messages.append
    return opened


def outcomes(opened: ApiTeacher) -> dict[str, int]:
    return opened.endpoint.store.outcomes(opened.endpoint.servers[0].identity)


# ------------------------------------------------------------------------------- labels and texts


def test_labels_of_a_server_are_read_strictly_and_a_second_run_calls_nothing(server, tmp_path):
    port, model = server
    with loopback.Proxy(port, key=SECRET) as proxy:
        opened = teacher(proxy.url, model, tmp_path)
        p = opened.predict_texts(TEXTS[:20])
        assert p.shape == (20, 3) and proxy.calls == {"whole": 20} and outcomes(opened) == {"answered": 20}
        for row, answer in zip(p, opened.endpoint.query(opened.questions(TEXTS[:20])), strict=True):
            label = parse_label(TASK, answer.text)
            assert np.isnan(row).all() if label is None else row[TASK.names.index(label)] == 1
        assert (~np.isnan(p[:, 0])).sum() > 0
        again = teacher(proxy.url, model, tmp_path).predict_texts(
            [*TEXTS[:20], *TEXTS[:5]]
        )  # a text twice: one question
        np.testing.assert_array_equal(again, np.concatenate([p, p[:5]]))
        assert sum(proxy.calls.values()) == 20
    assert opened.messages[0].startswith("far: answers: 20, in the store: 0, calls: 20, input tokens: ")


def test_agreement_over_samples_gives_probabilities(server, tmp_path):
    port, model = server
    with loopback.Proxy(port) as proxy:
        opened = teacher(proxy.url, model, tmp_path, samples=4, temperature=1.5)
        p = opened.predict_texts(TEXTS[:6])
        assert proxy.calls == {"whole": 24}
    answers = opened.endpoint.query(opened.questions(TEXTS[:6]))
    labels = [parse_label(TASK, answer.text) for answer in answers]
    for i, row in enumerate(p):
        read = [label for label in labels[4 * i : 4 * i + 4] if label]
        if read:
            np.testing.assert_allclose(row, [read.count(name) / len(read) for name in TASK.names], rtol=1e-6)
        else:
            assert np.isnan(row).all()


def test_an_answer_that_names_a_missing_option_cannot_be_read(server, tmp_path):
    port, model = server
    with loopback.Proxy(port) as proxy:
        opened = teacher(proxy.url, model, tmp_path, samples=4, temperature=1.5)
        every, two = opened.predict_texts(TEXTS[:20]), opened.predict_texts(TEXTS[:20], n_options=[2] * 20)
    third = np.nan_to_num(every[:, 2])
    assert third.max() > 0 and np.nanmax(two[:, 2]) == 0
    only_third = third == 1
    np.testing.assert_array_equal(np.isnan(two[:, 0]), np.isnan(every[:, 0]) | only_third)
    expected = every[:, :2] / every[:, :2].sum(1, keepdims=True)
    np.testing.assert_allclose(two[~only_third, :2], expected[~only_third], rtol=1e-6)


def test_anthropics_client_gets_requests_in_its_own_form(server, tmp_path):
    port, model = server
    with loopback.Proxy(port, share=0.3, faults=("429", "500", "empty"), key=SECRET) as proxy:
        opened = teacher(proxy.url, model, tmp_path, client="anthropic")
        with_openai = teacher(proxy.url, model, tmp_path)
        np.testing.assert_array_equal(opened.predict_texts(TEXTS[:8]), with_openai.predict_texts(TEXTS[:8]))
    assert outcomes(opened)["answered"] == outcomes(with_openai)["answered"] == 8
    assert opened.endpoint.budget.used[0] > 0 and opened.endpoint.budget.reserved == [0, 0]


def test_rationales_go_through_the_store_too(server, tmp_path):
    port, model = server
    conversations = [[{"role": "user", "content": text}] for text in TEXTS[:3]]
    with loopback.Proxy(port) as proxy:
        opened = teacher(proxy.url, model, tmp_path)
        texts = opened.generate(conversations, max_new_tokens=4)
        assert texts == opened.generate(conversations, max_new_tokens=4) and len(texts) == 3
        assert proxy.calls == {"whole": 3}


# ------------------------------------------------------------------------------- faults


def test_every_fault_is_survived_and_no_answer_is_requested_twice(server, tmp_path):
    port, model = server
    with loopback.Proxy(port, key=SECRET) as proxy:
        expected = teacher(proxy.url, model, tmp_path / "undisturbed").predict_texts(TEXTS)
    with loopback.Proxy(port, share=0.3, seed=1, key=SECRET) as proxy:
        opened = teacher(proxy.url, model, tmp_path, concurrency=12, timeout=3.0)
        np.testing.assert_array_equal(opened.predict_texts(TEXTS), expected)
        assert proxy.calls["whole"] == 60 and set(proxy.delivered.values()) == {1}
        assert set(loopback.FAULTS) <= set(proxy.calls), "with this seed every fault comes up"
        counts = outcomes(opened)
        assert counts["answered"] == 60 and counts["HTTP 429"] == proxy.calls["429"]
        assert counts["timed out"] >= proxy.calls["hang"] > 0  # a busy machine is late, too
        assert counts["HTTP 500"] == proxy.calls["500"]
        assert sum(counts.values()) == sum(proxy.calls.values())
        calls = sum(proxy.calls.values())
        np.testing.assert_array_equal(teacher(proxy.url, model, tmp_path).predict_texts(TEXTS), expected)
        assert sum(proxy.calls.values()) == calls
    leaks = [file for file in tmp_path.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert not leaks and SECRET not in "".join(opened.messages)


def predict(settings: dict[str, Any], path: str) -> None:
    """Query an endpoint for TEXTS; runs in a process of its own."""
    os.environ[KEY] = SECRET
    spec = validate_section(ApiConfig, settings, "params.yaml")
    ApiTeacher(Endpoint("far", spec, AnswerStore(Path(path))), TASK).predict_texts(TEXTS)


def test_killed_twice_it_ends_as_if_it_had_not_been(server, tmp_path):
    port, model = server
    path = tmp_path / "answers.sqlite"
    with loopback.Proxy(port, share=0.3, seed=2, key=SECRET) as proxy:
        settings = {"model": model, "base_url": proxy.url, "key": KEY, "max_tokens": 1, "timeout": 1.0}
        settings |= {"max_attempts": 20, "concurrency": 4}
        for part in (20, 40, None):
            process = fork_context().Process(target=predict, args=(settings, str(path)))
            process.start()
            while part and process.is_alive() and proxy.calls["whole"] < part:
                time.sleep(0.01)
            if part:
                process.kill()
            process.join(60)
        assert process.exitcode == 0
        # an answer that was on its way when the process died was not received: at most one a connection and kill
        assert 60 <= proxy.calls["whole"] <= 60 + 2 * 4
        opened = teacher(proxy.url, model, tmp_path, timeout=1.0)
        calls = sum(proxy.calls.values())
        p = opened.predict_texts(TEXTS)
        assert sum(proxy.calls.values()) == calls and outcomes(opened)["answered"] == 60
    with loopback.Proxy(port, key=SECRET) as proxy:
        np.testing.assert_array_equal(p, teacher(proxy.url, model, tmp_path / "undisturbed").predict_texts(TEXTS))


def label_by_several(endpoints: list[str], path: Path) -> None:
    """Label by several servers; runs in a process of its own."""
    served.labels(served.teacher(path, endpoints, concurrency=2))


def test_killed_while_several_servers_answer_it_pays_for_nothing_twice(tmp_path):
    def slowly(calls: int) -> None:
        time.sleep(0.01)

    with loopback.Proxy(served.Answers(slowly)) as one, loopback.Proxy(served.Answers(slowly)) as two:
        process = fork_context().Process(target=label_by_several, args=([one.url, two.url], tmp_path))
        process.start()
        while process.is_alive() and len(one.requests + two.requests) < 15:
            time.sleep(0.005)
        process.kill()
        process.join(60)
        store = AnswerStore(tmp_path / "answers.sqlite")
        opened = served.teacher(tmp_path, [two.url, one.url], concurrency=2)
        kept = [answer is not None for answer in store.get(opened.questions(served.TEXTS))]
        before = len(one.requests) + len(two.requests)
        assert served.labels(opened) == served.EXPECTED
        assert len(one.requests) + len(two.requests) - before == kept.count(False) and any(kept)
        assert before <= kept.count(True) + 2 * 2  # what was on its way: one a connection


def test_a_pause_that_the_server_requests_is_made(server, tmp_path):
    port, model = server
    with loopback.Proxy(port, share=1.0, faults=("429",)) as proxy:
        opened = teacher(proxy.url, model, tmp_path, max_attempts=3, concurrency=1)
        with pytest.raises(UserError, match=r"teachers.far: no answer from .* after 3 calls, the last: HTTP 429"):
            opened.predict_texts(TEXTS[:1])
        pauses = np.diff(proxy.times)
    assert len(pauses) == 2 and (pauses >= 0.2).all()  # its Retry-After says 0.2
    assert opened.endpoint.budget.used == [0, 0]  # a refusal costs nothing


def test_an_empty_answer_is_accepted_when_it_is_repeated(server, tmp_path):
    port, model = server
    with loopback.Proxy(port, share=1.0, faults=("empty",)) as proxy:
        opened = teacher(proxy.url, model, tmp_path)
        assert np.isnan(opened.predict_texts(TEXTS[:1])).all() and proxy.calls == {"empty": MAX_EMPTY_ANSWERS}
        assert outcomes(opened) == {"an empty answer": MAX_EMPTY_ANSWERS - 1, "answered": 1}


class Clock:
    """A clock that only waiting moves, so that a busy machine changes no interval."""

    def __init__(self):
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("concurrency", [1, 4])
def test_no_more_calls_a_minute_than_allowed(server, tmp_path, monkeypatch, concurrency):
    port, model = server
    clock, starts, wait_for_turn = Clock(), [], Pacer.wait_for_turn

    def record(pacer):
        pacer.stop.wait = clock.wait
        granted = wait_for_turn(pacer)
        starts.append(clock.now - 1_000)
        return granted

    monkeypatch.setattr(pacing, "time", clock)
    monkeypatch.setattr(Pacer, "wait_for_turn", record)
    with loopback.Proxy(port) as proxy:
        teacher(proxy.url, model, tmp_path, requests_per_minute=600.0, concurrency=concurrency).predict_texts(TEXTS[:6])
        assert proxy.calls["whole"] == len(starts) == 6
    assert (np.sort(starts) >= np.arange(6) * 0.1 - 1e-9).all(), "one call each tenth of a second"
    if concurrency == 1:
        np.testing.assert_allclose(starts, np.arange(6) * 0.1, atol=1e-9)


def test_retry_after_is_a_number_or_a_date():
    assert [retry_after_seconds(header) for header in ("3", "0.5", "-1")] == [3, 0.5, 0]
    assert 50 < retry_after_seconds(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert retry_after_seconds(None) is None and retry_after_seconds("soon") is None


def test_a_stage_queries_an_endpoint_once_and_writes_the_key_nowhere(server, tmp_path):
    port, model = server
    repo = tiny.experiment(tmp_path / "repo")
    with loopback.Proxy(port, share=0.1, seed=3, key=SECRET) as proxy:
        tree = read_yaml(repo / "params.yaml")
        far = {"model": model, "base_url": proxy.url, "key": KEY, "max_tokens": 1, "timeout": 1.0, "max_attempts": 20}
        tree["teachers"]["far"] = {"kind": "api", "api": far, "prompts": ["bare"], "few_shot": 1, "rationales": 2}
        tree["data"]["finance"]["limit"] = 48
        with (repo / "params.yaml").open("w", encoding="utf-8") as file:
            YAML().dump(tree, file)
        environment = os.environ | preloaded_python(repo)

        def run(*arguments: str) -> str:
            command = [sys.executable, "-m", *arguments]
            done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout + done.stderr

        tiny.prepare_data(repo)
        printed = run("distillery", "strip") + run("distillery", "inputs", "teachers")
        printed += run("distillery", "run", "02_teach", "-p", "teacher", "far")
        calls, signals = sum(proxy.calls.values()), repo / "data/teacher/far/signals.parquet"
        assert set(proxy.delivered.values()) == {1}
        before = signals.read_bytes()
        signals.unlink()
        stages.run_notebook(repo, "02_teach", teacher="far")
        assert sum(proxy.calls.values()) == calls and signals.read_bytes() == before
    frame = pd.read_parquet(signals)
    known = frame["label"].notna()
    assert 0 < known.sum() < len(frame)
    explained = frame["rationale"].notna()  # of two rows; an answer that could not be read has no rationale
    assert 1 <= explained.sum() <= 2 and (known | frame["split"].eq("train"))[explained].all()
    scores = json.loads((repo / "data/teacher/far/metrics.json").read_text())
    assert sum(scores[split]["unparsable"] for split in SPLITS) == (~known).sum()
    assert json.loads((repo / "data/teacher/far/prompting.json").read_text())["prompt"] in (None, "bare")
    assert "far: answers: " in printed and SECRET not in printed
    leaks = [file for file in repo.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert not leaks, leaks


# ------------------------------------------------------------------------------- contents


def content(text: str | None, **message: Any) -> Callable[[dict, int, dict], tuple[int, dict]]:
    """The answer of the server with another text, in which ANSWER stands for its own, and further keys."""

    def alter(_: dict[str, Any], status: int, answer: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        original = answer["choices"][0]["message"]
        original |= {"content": text and text.replace("ANSWER", original["content"])} | message
        return status, answer

    return alter


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nIt may be neutral.\n</think>\n\nANSWER",
        "It may be neutral.\n</think>\n\nANSWER",
        '{"label": "ANSWER"}',
        '```json\n{"label": "ANSWER"}\n```',
        "**ANSWER**",
    ],
)
@pytest.mark.parametrize("labels", ["text", "structured"])
def test_a_label_is_read_whatever_stands_around_it(server, tmp_path, labels, text):
    port, model = server
    with loopback.Proxy(port) as proxy:
        expected = teacher(proxy.url, model, tmp_path / "plain", labels=labels).predict_texts(TEXTS[:8])
    assert not np.isnan(expected).all()
    with loopback.Proxy(port, alter=content(text)) as proxy:
        opened = teacher(proxy.url, model, tmp_path, labels=labels)
        np.testing.assert_array_equal(opened.predict_texts(TEXTS[:8]), expected)
        assert proxy.calls == {"whole": 8}


def test_reasoning_is_no_part_of_a_rationale(server, tmp_path):
    port, model = server
    conversations = [[{"role": "user", "content": text}] for text in TEXTS[:3]]
    with loopback.Proxy(port, alter=content("<think>Hm.</think>\n\nIt rose by 3 %.")) as proxy:
        texts = teacher(proxy.url, model, tmp_path).generate(conversations, max_new_tokens=4)
    assert texts == ["It rose by 3 %."] * 3


REASONING_ONLY = {
    "null": content(None, reasoning_content="Profit rose, so it may be positive."),
    "vLLM": content("", reasoning="Profit rose, so it may be positive."),
    "cut off": content("<think>\nProfit rose, so it may be positive."),
    "parts": content(None, content=[{"type": "thinking", "thinking": "Profit rose, so it may be positive."}]),
}


@pytest.mark.parametrize("labels", ["text", "logprobs"])
@pytest.mark.parametrize("alter", REASONING_ONLY.values(), ids=REASONING_ONLY)
def test_nothing_but_reasoning_stops_at_the_first_answer_with_the_way_out(server, tmp_path, alter, labels):
    port, model = server
    line = r"^params.yaml: teachers.far.api: the model spent its answer on reasoning .*may be positive\.'\): turn the "
    line += r"reasoning off by `chat_template_kwargs: \{enable_thinking: false\}` .*, or raise `max_tokens` \(1\)$"
    with loopback.Proxy(port, alter=alter) as proxy:
        opened = teacher(proxy.url, model, tmp_path, labels=labels, concurrency=1)
        with pytest.raises(UserError, match=line):
            opened.predict_texts(TEXTS[:8])
        assert proxy.calls == {"whole": 1} and outcomes(opened) == {"answered": 1}
        assert opened.endpoint.budget.used[0] > 0 and opened.endpoint.budget.reserved == [0, 0]
        with pytest.raises(UserError, match=line):  # nothing is paid for twice
            teacher(proxy.url, model, tmp_path, labels=labels, concurrency=1).predict_texts(TEXTS[:8])
        assert proxy.calls == {"whole": 1}


def test_one_answer_that_is_cut_off_does_not_stop_the_others(server, tmp_path):
    port, model = server

    def alter(request: dict[str, Any], status: int, answer: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        cut_off = TEXTS[2] in request["messages"][-1]["content"]
        return content("<think>\nHm." if cut_off else "<think>\nHm.</think>positive")(request, status, answer)

    with loopback.Proxy(port, alter=alter) as proxy:
        opened = teacher(proxy.url, model, tmp_path, concurrency=1)
        p = opened.predict_texts(TEXTS[:8])
        assert np.isnan(p[:, 0]).tolist() == [i == 2 for i in range(8)] and proxy.calls == {"whole": 8}
        np.testing.assert_array_equal(teacher(proxy.url, model, tmp_path).predict_texts(TEXTS[:8]), p)
        assert proxy.calls == {"whole": 8}


# ------------------------------------------------------------------------------- further keys of a request


def strict_template(request: dict[str, Any], status: int, answer: Any) -> tuple[int, Any]:
    """The words with which vLLM passes on that a chat template refuses the system turn; this server answers 500."""
    if status == 500 and request["messages"][0]["role"] == "system":
        return 400, {"object": "error", "message": "System role not supported", "type": "BadRequestError", "code": 400}
    return status, answer


def test_a_server_without_a_system_role_gets_its_text_in_the_first_user_turn(reasoning_server, tmp_path):
    port, model = reasoning_server
    with loopback.Proxy(port, alter=strict_template) as proxy:
        opened = teacher(proxy.url, model, tmp_path, concurrency=1)
        opened.predict_texts(TEXTS[:3])
        assert proxy.calls == {"server returned 400": 1, "whole": 3}
    refused, *merged = proxy.requests
    assert [turn["role"] for turn in refused["messages"]] == ["system", "user"]
    (turn,) = merged[0]["messages"]
    assert turn["content"] == "\n\n".join(turn["content"] for turn in refused["messages"])
    assert outcomes(opened) == {"answered": 3}


def test_further_keys_reach_the_server_and_are_part_of_the_cache_key(reasoning_server, tmp_path):
    port, model = reasoning_server
    sent = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low", "seed": 3}
    extra = {key: value for key, value in sent.items() if key != "seed"} | {"extra_body": {"seed": 3}}
    with loopback.Proxy(port, alter=strict_template) as proxy:
        plain, opened = (teacher(proxy.url, model, tmp_path, concurrency=1, **keys) for keys in ({}, extra))
        plain.predict_texts(TEXTS[:4])
        opened.predict_texts(TEXTS[:4])
        opened.generate([[{"role": "user", "content": "Why?"}]], max_new_tokens=2)
        teacher(proxy.url, model, tmp_path, **extra).predict_texts(TEXTS[:4])
        assert proxy.calls == {"server returned 400": 2, "whole": 9}
    keys = [{key: request[key] for key in sent if key in request} for request in proxy.requests]
    assert keys == [{}] * 5 + [sent] * 6
    # the template of this server writes four tokens more when reasoning is on
    tokens = [[a.metadata["usage"][0] for a in t.endpoint.query(t.questions(TEXTS[:4]))] for t in (plain, opened)]
    assert np.subtract(*tokens).tolist() == [4] * 4


def test_the_tokens_of_a_row_are_those_that_the_server_counted(server, tmp_path):
    port, model = server
    with loopback.Proxy(port) as proxy:
        opened = teacher(proxy.url, model, tmp_path, samples=2, temperature=1.0)
        assert opened.tokens_per_row() is None
        rows = pd.DataFrame({"id": ["1", "2", "3"], "text": TEXTS[:3], "group": ["a", "b", "c"]})
        opened.predict(rows)
        paid = opened.tokens_per_row()
        assert [3 * mean for mean in paid.values()] == pytest.approx(opened.endpoint.budget.used)
        calls = proxy.calls["whole"]
        opened.predict(rows)  # from the store
        assert opened.tokens_per_row() == paid and proxy.calls["whole"] == calls
        opened.predict(rows[:1])
        assert opened.tokens_per_row()["input"] == pytest.approx(
            sum(a.metadata["usage"][0] for a in opened.endpoint.query(opened.questions(TEXTS[:1])))
        )


def test_further_keys_reach_anthropic_and_keep_the_temperature(server, tmp_path):
    port, model = server
    thinking = {"thinking": {"type": "disabled"}}
    with loopback.Proxy(port) as proxy:
        teacher(proxy.url, model, tmp_path, client="anthropic", extra_body=thinking).predict_texts(TEXTS[:1])
    (request,) = proxy.requests
    assert request["thinking"] == thinking["thinking"] and request["temperature"] == 0


def test_the_value_of_the_key_is_refused_among_further_keys(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "plain words")
    with pytest.raises(UserError) as raised:
        teacher("http://127.0.0.1:1", "m", tmp_path, extra_body={"user": ["my plain words"]})
    line = f"params.yaml: teachers.far.api: extra_body or a key beside it holds the value of {KEY}"
    assert str(raised.value) == line


def test_what_only_looks_like_a_secret_is_sent(tmp_path):
    values = {
        "max_thinking_tokens": 0,
        "stop": ["task-oriented-answers"],
        "lora": "a" * 64,
        "top_k": 1,
        "add_eos_token": "x",
    }
    assert teacher("http://127.0.0.1:1", "m", tmp_path, extra_body=values).questions(TEXTS[:1])


# ------------------------------------------------------------------------------- refusals


def test_a_wrong_key_ends_at_once_and_is_not_shown(server, tmp_path, monkeypatch):
    port, model = server
    monkeypatch.setenv(KEY, "sk-wrong-1234567890")
    with loopback.Proxy(port, key=SECRET) as proxy:
        with pytest.raises(UserError) as raised:
            teacher(proxy.url, model, tmp_path, concurrency=1).predict_texts(TEXTS)
        assert proxy.calls == {"invalid key": 1}
    line = str(raised.value)
    assert line.startswith("params.yaml: teachers.far.api.key: the endpoint does not accept the key: HTTP 401")
    assert "sk-wrong" not in line and "***" in line and "\n" not in line
    assert b"sk-wrong" not in (tmp_path / "answers.sqlite").read_bytes()


def test_a_wrong_model_name_ends_at_once(server, tmp_path):
    port, _ = server
    with loopback.Proxy(port) as proxy:
        with pytest.raises(UserError, match=r"^params.yaml: teachers.far.api.*HTTP 4\d\d from http://127"):
            teacher(proxy.url, "no-such-model", tmp_path, concurrency=1).predict_texts(TEXTS)
        assert sum(proxy.calls.values()) == 1


def test_a_missing_key_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY)
    with pytest.raises(UserError, match=f"^params.yaml: teachers.far.api.key: set {KEY} in the environment$"):
        teacher("http://127.0.0.1:1", "m", tmp_path)


def test_a_key_of_the_vendor_goes_to_the_vendor_only(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-real")
    assert teacher("http://127.0.0.1:1", "m", tmp_path, key=None).endpoint.servers[0].transport.client.api_key == "none"
    home = teacher("x", "m", tmp_path, key=None, base_url=None).endpoint
    assert home.servers[0].transport.client.api_key == "sk-real" and str(
        home.servers[0].transport.client.base_url
    ).startswith("https://api.openai.com/")


# ------------------------------------------------------------------------------- rows that the endpoint refuses

ROW_REFUSALS = [  # (status, body) as endpoints send them
    (
        400,
        {
            "error": {
                "message": "The response was filtered due to the prompt triggering Azure OpenAI's content management "
                "policy. Please modify your prompt and retry.",
                "type": None,
                "param": "prompt",
                "code": "content_filter",
                "status": 400,
            }
        },
    ),
    (
        400,
        {
            "error": {
                "message": "This model's maximum context length is 8192 tokens. However, your messages resulted in "
                "9001 tokens. Please reduce the length of the messages.",
                "type": "invalid_request_error",
                "param": "messages",
                "code": "context_length_exceeded",
            }
        },
    ),
    (  # vLLM
        400,
        {
            "object": "error",
            "message": "The decoder prompt (length 9001) is longer than the maximum model length of 8192.",
            "type": "BadRequestError",
            "code": 400,
        },
    ),
    (  # llama.cpp
        400,
        {
            "error": {
                "code": 400,
                "message": "request (9001 tokens) exceeds the available context size (8192 tokens), try increasing it",
                "type": "exceed_context_size_error",
            }
        },
    ),
    (  # TGI
        422,
        {
            "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8192. Given: 9001",
            "error_type": "validation",
        },
    ),
    (
        400,
        {"error": {"type": "invalid_request_error", "message": "prompt is too long: 200001 tokens > 200000 maximum"}},
    ),
    (400, {"error": {"code": "data_inspection_failed", "message": "Input data may contain inappropriate content."}}),
    (403, {"error": {"code": 403, "message": "Your chosen model requires moderation and your input was flagged"}}),
    (413, {"error": {"message": "Request Entity Too Large"}}),
    (200, {"error": {"code": "content_filter", "message": "blocked by the content filter"}}),
]


def text_of(request: dict[str, Any]) -> str:
    return request["messages"][-1]["content"]


def test_a_row_that_the_endpoint_refuses_is_named_and_never_sent_again(server, tmp_path):
    port, model = server
    rows = pd.DataFrame({"id": [f"row-{i}" for i in range(30)], "text": TEXTS[:30], "group": None})
    refusals = dict(zip(TEXTS[0:30:3], ROW_REFUSALS, strict=True))

    def alter(request: dict[str, Any], status: int, answer: Any) -> tuple[int, Any]:
        return next((refusal for text, refusal in refusals.items() if text in text_of(request)), (status, answer))

    with loopback.Proxy(port) as proxy:
        expected = teacher(proxy.url, model, tmp_path / "plain").predict(rows)
    with loopback.Proxy(port, alter=alter) as proxy:
        opened = teacher(proxy.url, model, tmp_path)
        p = opened.predict(rows)
        assert len(proxy.requests) == 30 and outcomes(opened) == {"answered": 20, "row refused": 10}
        again = teacher(proxy.url, model, tmp_path)
        np.testing.assert_array_equal(again.predict(rows), p)
        assert len(proxy.requests) == 30
    assert np.isnan(p[::3]).all()
    others = [i for i in range(30) if i % 3]
    np.testing.assert_array_equal(p[others], expected[others])
    for one in (opened, again):  # a later run names them too
        named = [line for line in one.messages if "is refused" in line]
        assert [line.partition(" is refused")[0] for line in named] == [f"far: row `row-{i}`" for i in range(0, 30, 3)]
        for line, (status, body) in zip(named, ROW_REFUSALS, strict=True):
            words, _ = error_message(body)
            assert f"stays without a label: HTTP {status} from http://127" in line and words[:150] in line
    answers = opened.endpoint.query(opened.questions([TEXTS[i] for i in others]))
    assert opened.endpoint.budget.used[0] == sum(answer.metadata["usage"][0] for answer in answers)  # the rest is free


@pytest.mark.parametrize(
    "change, words",
    [
        ({"finish_reason": "content_filter"}, "the answer ended with `content_filter`"),
        ({"message": {"refusal": "I cannot help with that."}}, "I cannot help with that."),
    ],
)
def test_a_row_that_the_model_refuses_is_paid_for_once(server, tmp_path, change, words):
    port, model = server

    def alter(_: dict[str, Any], status: int, answer: Any) -> tuple[int, Any]:
        message = {"role": "assistant", "content": None} | change.get("message", {})
        answer["choices"][0] |= change | {"message": message}
        return status, answer

    with loopback.Proxy(port, alter=alter) as proxy:
        opened = teacher(proxy.url, model, tmp_path)
        assert np.isnan(opened.predict_texts(TEXTS[:2])).all() and proxy.calls == {"whole": 2}
        assert outcomes(opened) == {"row refused": 2} and opened.endpoint.budget.used[0] > 0
    assert (
        f"…{text_of(proxy.requests[0])[-60:]!r} is refused" in "".join(opened.messages) and words in opened.messages[-1]
    )


@pytest.mark.parametrize(
    "labels, status, body, line",
    [
        (
            "text",
            400,
            {"error": {"message": "Unknown parameter: 'seed'."}},
            "HTTP 400 from http://.*: Unknown parameter: 'se",
        ),
        ("text", 422, {"detail": [{"msg": "extra field"}]}, "HTTP 422 from http://.*extra field"),
        ("text", 400, "no JSON here", "HTTP 400 from http://.*: no JSON here"),
        ("text", 200, {"error": {"message": "No model is loaded."}}, "HTTP 200 from http://.*: No model is loaded\\."),
        ("text", 200, {"error": "No model is loaded."}, "HTTP 200 from http://.*: No model is loaded\\."),
        ("text", 200, {"object": "error", "message": "No model."}, "HTTP 200 from http://.*: No model\\."),
        (
            "text",
            200,
            {"error": {"code": 401, "message": "No key."}},
            ".key: the endpoint does not accept .*: No key\\.",
        ),
        (
            "logprobs",
            200,
            None,
            "labels: http://.* returned no log-probabilities \\(`logprobs: null`\\) with the answer '",
        ),
    ],
)
def test_what_another_attempt_cannot_mend_stops_at_once_with_the_servers_words(
    server, tmp_path, labels, status, body, line
):
    port, model = server
    with loopback.Proxy(port, alter=lambda _, __, answer: (status, body or answer)) as proxy:
        opened = teacher(proxy.url, model, tmp_path, labels=labels, concurrency=1)
        with pytest.raises(UserError, match=rf"^params.yaml: teachers.far.api.*{line}") as raised:
            opened.predict_texts(TEXTS[:4])
        assert len(proxy.requests) == 1 and outcomes(opened) == {"refused": 1} and "\n" not in str(raised.value)
        assert (sum(opened.endpoint.budget.used) > 0) == (labels == "logprobs")  # an answer came, and is paid


def test_an_error_that_may_pass_is_tried_again_whatever_the_status(server, tmp_path):
    port, model = server
    bodies = [{"error": {"code": 429, "message": "slow down"}}]
    bodies += [{"choices": [{"error": {"code": 502, "message": "the provider failed"}, "finish_reason": "error"}]}]

    def alter(_: dict[str, Any], status: int, answer: Any) -> tuple[int, Any]:
        return status, bodies.pop() if bodies else answer

    with loopback.Proxy(port, alter=alter) as proxy:
        opened = teacher(proxy.url, model, tmp_path, concurrency=1)
        opened.predict_texts(TEXTS[:1])
    assert outcomes(opened) == {"HTTP 429": 1, "HTTP 502": 1, "answered": 1}


# ------------------------------------------------------------------------------- answers of no use


def test_the_run_stops_after_unreadable_answers_in_a_row_and_loses_none(server, tmp_path):
    port, model = server

    def alter(request: dict[str, Any], status: int, answer: Any) -> tuple[int, Any]:
        position = next(i for i, text in enumerate(TEXTS) if text in text_of(request))
        return content("positive" if position < 3 else f"I think {position}")(request, status, answer)

    line = r"^params.yaml: teachers.far.api.max_unreadable: 5 answers in a row cannot be read as a label, the last: "
    with loopback.Proxy(port, alter=alter) as proxy:
        opened = teacher(proxy.url, model, tmp_path, concurrency=1, max_unreadable=5)
        with pytest.raises(
            UserError, match=line + r"'I think 7', cut off at `max_tokens` \(1\); all answers are stored;"
        ):
            opened.predict_texts(TEXTS[:40])
        assert proxy.calls == {"whole": 8} and outcomes(opened) == {"answered": 8}
        with pytest.raises(UserError, match=line):  # before another one is paid
            teacher(proxy.url, model, tmp_path, concurrency=1, max_unreadable=5).predict_texts(TEXTS[:40])
        assert proxy.calls == {"whole": 8}
        p = teacher(proxy.url, model, tmp_path, max_unreadable=None).predict_texts(TEXTS[:40])
        assert proxy.calls == {"whole": 40} and np.isnan(p[:, 0]).sum() == 37
        teacher(proxy.url, model, tmp_path, max_unreadable=5).predict_texts(TEXTS[:40])  # all are there


def test_unreadable_answers_between_others_do_not_stop_the_run(server, tmp_path):
    port, model = server

    def alter(request: dict[str, Any], status: int, answer: Any) -> tuple[int, Any]:
        position = next(i for i, text in enumerate(TEXTS) if text in text_of(request))
        return content("I think" if position % 3 else "positive")(request, status, answer)

    with loopback.Proxy(port, alter=alter) as proxy:
        opened = teacher(proxy.url, model, tmp_path, concurrency=1, max_unreadable=3)
        assert np.isnan(opened.predict_texts(TEXTS[:30])[:, 0]).sum() == 20


# ------------------------------------------------------------------------------- proxies


@pytest.fixture
def proxies(monkeypatch):
    """Sets the only proxy in the environment."""
    for name in ("all", "http", "https", "no"):
        for variable in (f"{name}_proxy", f"{name}_proxy".upper()):
            monkeypatch.delenv(variable, raising=False)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize("client", ["openai", "anthropic"])
@pytest.mark.parametrize("proxy_url", ["socks5://127.0.0.1:9", "http://127.0.0.1:9"])
def test_a_server_on_this_machine_is_reached_without_the_proxy(server, tmp_path, proxies, client, proxy_url):
    port, model = server
    proxies(ALL_PROXY=proxy_url, HTTP_PROXY=proxy_url)
    with loopback.Proxy(port) as proxy:
        teacher(proxy.url, model, tmp_path, client=client).predict_texts(TEXTS[:2])
        assert proxy.calls == {"whole": 2}


@pytest.mark.parametrize("client", ["openai", "anthropic"])
@pytest.mark.parametrize(
    "proxy_url, way",
    [("socks5://user:word@127.0.0.1:9", "install the package `socksio`"), ("ftp://x", "give it as http")],
)
def test_a_proxy_that_cannot_be_used_ends_in_one_line(tmp_path, proxies, client, proxy_url, way):
    proxies(ALL_PROXY=proxy_url)
    with pytest.raises(UserError) as raised:
        teacher("http://models.example.org/v1", "m", tmp_path, client=client)
    line = "teachers.far: the proxy in the environment (ALL_PROXY) cannot be used for http://models.example.org/v1: "
    assert str(raised.value).startswith(line + way) and "word" not in str(raised.value)
    proxies(NO_PROXY="example.org")  # the way out that the line names
    assert teacher("http://models.example.org/v1", "m", tmp_path, client=client)


# ------------------------------------------------------------------------------- ceilings


@pytest.mark.parametrize("ceiling", ["max_total_tokens", "max_cost"])
def test_a_ceiling_stops_the_run_before_it_is_passed(server, tmp_path, ceiling):
    port, model = server
    price = {"input": 2.0, "output": 10.0}
    with loopback.Proxy(port) as proxy:
        free = teacher(proxy.url, model, tmp_path / "free", price=price)
        free.predict_texts(TEXTS[:4])
        tokens = sum(free.endpoint.budget.used)
        most = sum(max_call_tokens(free.questions(TEXTS[:1])[0]))
        limit = 2 * tokens + most
        value = (
            limit
            if ceiling == "max_total_tokens"
            else 2 * free.endpoint.budget.cost(*free.endpoint.budget.used) + most * 2e-6
        )
        capped = teacher(proxy.url, model, tmp_path, price=price, concurrency=2, **{ceiling: value})
        with pytest.raises(UserError, match=rf"teachers.far.api.{ceiling}: the next call might pass .*are stored"):
            capped.predict_texts(TEXTS)
        answered = outcomes(capped)["answered"]
        assert 4 <= answered < len(TEXTS) and capped.endpoint.budget.reserved == [0, 0]
        used = capped.endpoint.budget.used
        assert (sum(used) if ceiling == "max_total_tokens" else capped.endpoint.budget.cost(*used)) <= value
        calls = sum(proxy.calls.values())
        with pytest.raises(UserError):  # another run does not begin to count anew
            teacher(proxy.url, model, tmp_path, price=price, concurrency=2, **{ceiling: value}).predict_texts(TEXTS)
        assert sum(proxy.calls.values()) <= calls + 1
        teacher(proxy.url, model, tmp_path, price=price).predict_texts(TEXTS)
        assert outcomes(capped)["answered"] == len(TEXTS)


def test_an_estimate_stands_before_the_first_call(tmp_path):
    opened = teacher("http://127.0.0.1:1", "m", tmp_path, price={"input": 1.0, "output": 2.0}, max_tokens=5)
    questions = opened.questions(["Profit rose."] * 2 + ["Profit fell."])
    plan = opened.endpoint.estimate(questions)
    assert plan["answers"] == plan["calls"] == 2 and plan["output tokens at most"] == 10
    assert plan["US dollars"] == round((plan["input tokens"] + 2 * 10) / 1e6, 4)
    opened.endpoint.store.put([(questions[0], Answer("positive"))])
    assert opened.endpoint.estimate(questions)["calls"] == 1


@pytest.mark.parametrize(
    "labels, digest",
    [
        ("text", "fc1e881174d57f418b55e1bbc73dedc22c92260407f366f98193f08bf6efdcc8"),
        ("structured", "d57d14a37cbc22ff3b969d056b159ff87f5394bf81a21f8ee1bd932839416083"),
        ("logprobs", "dfb436104d365052881465239ef951417a1d43785a5a66eff85f0434347406cf"),
    ],
)
def test_the_keys_of_paid_answers_stay_the_same(tmp_path, labels, digest):
    prompt = {"instruction": "Answer.", "template": "{text}"}
    task = Task(kind="classification", labels={"yes": "good", "no": "bad"}, prompt=prompt)
    endpoint = teacher("http://127.0.0.1:1", "m", tmp_path, labels=labels, max_tokens=16).endpoint
    assert [question.key for question in ApiTeacher(endpoint, task).questions(["Good?"])] == [digest]


# ------------------------------------------------------------------------------- reading answers


@pytest.mark.parametrize(
    "alternatives, expected",
    [
        ([["positive", -0.5], [" negative", -1.5], ["the", -3.0]], [np.exp(-0.5), 0, np.exp(-1.5)]),
        ([["Pos", -0.5], ["neut", -1.0], ["ne", -1.0]], [np.exp(-0.5), np.exp(-1.0), 0]),  # `ne` begins two labels
        ([["the", -0.1], ["positive", -3.0]], None),  # half of the probability is needed
        ([["", -0.1]], None),
        ([], None),
    ],
)
def test_probabilities_from_the_first_token(alternatives, expected):
    probabilities = label_probabilities([[None, alternatives]], TASK)
    if expected is None:
        assert np.isnan(probabilities).all()
    else:
        np.testing.assert_allclose(probabilities, np.array(expected) / np.sum(expected))


DIGITS = Task(kind="classification", labels={str(i): "" for i in range(1, 11)})
PHRASES = Task(kind="classification", labels={"very good": "", "very bad": "", "very": "", "bad": ""})
ln = math.log


@pytest.mark.parametrize("space", ["", " ", "Ġ", "▁", "\n", "Ċ", '"', " **"])
def test_tokens_are_read_however_a_server_writes_white_space(space):
    steps = [[f"{space}positive", [[f"{space}positive", ln(0.6)], [f"{space}Negative", ln(0.3)], ["Ġ", ln(0.1)]]]]
    np.testing.assert_allclose(label_probabilities(steps, TASK, "stop"), [2 / 3, 0, 1 / 3])


@pytest.mark.parametrize(
    "task, steps, finish, expected",
    [
        # one token a number: 1 is 1, whatever may follow elsewhere
        (DIGITS, [["7", [["7", ln(0.5)], ["1", ln(0.3)], ["10", ln(0.2)]]]], "stop", {"7": 0.5, "1": 0.3, "10": 0.2}),
        # one token a digit: the next token divides 1 and 10
        (
            DIGITS,
            [["1", [["1", ln(0.8)], ["2", ln(0.2)]]], ["0", [["0", ln(0.75)], ["</s>", ln(0.2)], ["5", ln(0.05)]]]],
            "stop",
            {"10": 0.6, "1": 0.16, "2": 0.2},
        ),
        (
            DIGITS,
            [["1", [["1", ln(0.8)], [" 1", ln(0.1)]]], ["<|im_end|>", [["<|im_end|>", ln(0.9)], ["0", ln(0.1)]]]],
            "stop",
            {"1": 0.81, "10": 0.09},
        ),
        (DIGITS, [["1", [["1", ln(0.8)], ["2", ln(0.2)]]]], "stop", {"1": 0.8, "2": 0.2}),
        # cut off after 1, which may become 10
        (DIGITS, [["1", [["1", ln(0.8)], ["2", ln(0.2)]]]], "length", None),
        (DIGITS, [["12", [["12", ln(0.9)], ["1", ln(0.1)]]]], "stop", None),
        # labels of several tokens
        (
            PHRASES,
            [["Ġvery", [["Ġvery", ln(0.9)], ["Ġbad", ln(0.1)]]], ["Ġgood", [["Ġgood", ln(0.7)], ["Ġbad", ln(0.3)]]]],
            "stop",
            {"very good": 0.63, "very bad": 0.27, "bad": 0.1},
        ),
        (
            PHRASES,
            [
                ["ver", [["ver", 0.0]]],
                ["y", [["y", 0.0]]],
                [" g", [[" g", ln(0.5)], [".", ln(0.3)], [" b", ln(0.1)], [" nice", ln(0.1)]]],
                ["ood", [["ood", ln(0.9)], ["reat", ln(0.1)]]],
            ],
            "stop",
            {"very good": 0.45, "very": 0.3, "very bad": 0.1},
        ),
        (TASK, [["pos", [["pos", ln(0.9)], ["neg", ln(0.1)]]]], "length", {"positive": 0.9, "negative": 0.1}),
        (TASK, [["pos", [["pos", ln(0.9)]]], ["sible", [["sible", ln(0.9)], ["itive", ln(0.1)]]]], "stop", None),
        # white space first
        (
            TASK,
            [[" ", [[" ", ln(0.8)], ["neg", ln(0.2)]]], ["positive", [["positive", 0.0]]]],
            "stop",
            {"positive": 0.8, "negative": 0.2},
        ),
        (TASK, [], "stop", None),
    ],
)
def test_probabilities_along_the_tokens_of_an_answer(task, steps, finish, expected):
    probabilities = label_probabilities(steps, task, finish)
    if expected is None:
        assert np.isnan(probabilities).all()
    else:
        mass = np.array([expected.get(name, 0) for name in task.names])
        np.testing.assert_allclose(probabilities, mass / mass.sum())


@pytest.mark.parametrize("reasoning", ["", "<think>\nIt may be negative.\n</think>\n\n"])
def test_log_probabilities_of_a_server_are_kept_after_the_reasoning(server, tmp_path, reasoning):
    port, model = server
    tokens = re.findall(r"\s+|\w+|\W", reasoning) + ["Ġpos", "itive"]

    def alter(request: dict[str, Any], status: int, answer: Any) -> tuple[int, Any]:
        assert request["logprobs"] is True and request["top_logprobs"] == 20
        other = {"token": "Ġnegative", "logprob": ln(0.1)}
        entries = [{"token": token, "logprob": ln(0.9), "bytes": None} for token in tokens]
        for entry in entries[:-1]:
            entry["top_logprobs"] = [dict(entry), other]
        entries[-1]["top_logprobs"] = []  # some servers leave the token itself out, or give no other
        answer["choices"][0] |= {"logprobs": {"content": entries}, "finish_reason": "stop"}
        return content(reasoning + " positive")(request, status, answer)

    with loopback.Proxy(port, alter=alter) as proxy:
        opened = teacher(proxy.url, model, tmp_path, labels="logprobs", max_tokens=32)
        p = opened.predict_texts(TEXTS[:2])
        np.testing.assert_array_equal(
            teacher(proxy.url, model, tmp_path, labels="logprobs", max_tokens=32).predict_texts(TEXTS[:2]), p
        )
        assert proxy.calls == {"whole": 2}
    mass = np.array([0.81, 0, 0.1] if not reasoning else [0.9 * 0.81, 0, 0.1 + 0.9 * 0.1])  # `\n\n` comes first
    expected = mass / mass.sum()
    np.testing.assert_allclose(p, [expected] * 2, rtol=1e-6)


REASONS = {
    "profit": "positive\nProfit went up. More follows.",
    "loss": "Negative: The loss grew.",
    "none": "no idea",
}


def test_label_and_reason_come_in_one_answer(server, tmp_path):
    """One request a text, for both; none for a label that another answer gave, nor when the answers are stored."""
    rows = pd.DataFrame({"id": ["a", "b", "c"], "text": ["Up: profit", "Down: loss", "Nothing: none"]})

    def reply(request, status, answer):
        text = request["messages"][-1]["content"]
        answer["choices"][0]["message"]["content"] = next(v for k, v in REASONS.items() if f": {k}" in text)
        return status, answer

    with loopback.Proxy(server[0], alter=reply) as proxy:
        opened = teacher(proxy.url, server[1], tmp_path, labels="explained", max_tokens=48)
        opened.few_shot = 2
        p = opened.predict(rows)
        reasons = opened.explanations(rows, ["positive", "positive", "neutral"])
        reasons_of_own = opened.explanations(rows[:2], ["positive", "negative"])
        sent = proxy.requests
    assert [TASK.names[row.argmax()] for row in p[:2]] == ["positive", "negative"] and np.isnan(p[2]).all()
    assert reasons == ["Profit went up.", None, None] and reasons_of_own == ["Profit went up.", "The loss grew."]
    assert len(sent) == 3
    turns = next(request["messages"] for request in sent if "Up: profit" in request["messages"][-1]["content"])
    solved = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert solved == [f"{TASK.word(shot.label)}\n{shot.rationale}" for shot in TASK.few_shot[:2]]
    assert all(turn["content"].endswith(EXPLANATION_REQUEST) for turn in turns if turn["role"] == "user")


CRISIS_ANSWERS = {  # key of the article -> answer, label, reason
    "dam": ("danger\nPeople have to flee from a failing dam.", "risk and warning", "People have to flee"),
    "strike": ("Class: advice\nReason: It tells how to travel.", "caution and advice", "It tells how to travel."),
    "prize": ("**Classification:** harmless\n\n**Reason:** A prize is good news.", "safe and harmless", "A prize"),
    "smoke": ("Class, then the reason: danger. Smoke spreads.", "risk and warning", "Smoke spreads."),
    "flood": ("Class: danger\nReason: It rains.\nClass: advice\nadvice", None, None),
    "vote": ("It may be danger or advice.", None, None),
}


def test_the_analysts_prompt_brings_a_class_and_its_justification(server, tmp_path):
    """The crisis task as the published prompt has it: title and article in, a class and its reason out, both read."""
    task = with_prompt(load_task("crisis", tiny.ROOT / "tasks"), "analyst")
    rows = pd.DataFrame({"id": list(CRISIS_ANSWERS), "text": [f"News of the {key} - More." for key in CRISIS_ANSWERS]})

    def reply(request, status, answer):
        text = request["messages"][-1]["content"]
        answer["choices"][0]["message"]["content"] = next(
            v[0] for k, v in CRISIS_ANSWERS.items() if f"the {k} -" in text
        )
        return status, answer

    with loopback.Proxy(server[0], alter=reply) as proxy:
        opened = teacher(proxy.url, server[1], tmp_path, labels="explained", max_tokens=48)
        opened.task, opened.few_shot = task, 1
        p = opened.predict(rows)
        given = [label or "risk and warning" for _, label, _ in CRISIS_ANSWERS.values()]
        reasons = opened.explanations(rows, given)
        (request, *_) = proxy.requests
    labels = [None if np.isnan(row).any() else task.names[row.argmax()] for row in p]
    assert labels == [label for _, label, _ in CRISIS_ANSWERS.values()]
    for reason, (_, _, start) in zip(reasons, CRISIS_ANSWERS.values(), strict=True):
        assert reason is None if start is None else reason.startswith(start)
    system, solved, solution, last = (turn["content"] for turn in request["messages"])
    assert system.startswith("You are a news analyst") and last.startswith("Title - Article: News of the")
    assert solved.endswith(EXPLANATION_REQUEST) and solution == f"danger\n{task.few_shot[0].rationale}"


def test_rationales_are_the_reasons_that_came_with_the_labels(server, tmp_path):
    """For the gold label of a training row and the teacher's of a pool row, without another request; none for test."""
    rows = pd.DataFrame({"source": "demo", "split": ["train", "train", "pool", "test"], "id": list("abcd")})
    rows["text"] = ["Up: profit", "Up: profit too", "Down: loss", "Down: loss again"]
    rows["label"] = ["positive", "negative", None, "negative"]

    def reply(request, status, answer):
        text = request["messages"][-1]["content"]
        answer["choices"][0]["message"]["content"] = next(v for k, v in REASONS.items() if f": {k}" in text)
        return status, answer

    with loopback.Proxy(server[0], alter=reply) as proxy:
        api = {"model": server[1], "base_url": proxy.url, "key": KEY, "labels": "explained", "max_tokens": 48}
        far = {"kind": "api", "api": api, "rationales": 9}
        params = validate_section(Params, experiment(teachers={"far": far}), "params.yaml")
        opened = open_teacher(tmp_path, "far", params, TASK)
        signals = signal_table(rows, opened.predict(rows), TASK.names, -1)
        explained = add_rationales(tmp_path, "far", params, TASK, rows, signals)
        assert sum(proxy.calls.values()) == 4
    assert explained["rationale"].where(explained["rationale"].notna(), None).tolist() == [
        "Profit went up.",
        None,
        "The loss grew.",
        None,
    ]


def test_a_reason_needs_room():
    spec = {"model": "m", "labels": "explained", "max_tokens": 16}
    with pytest.raises(UserError, match=r"`labels: explained` needs room for a sentence: `max_tokens` 32 or more"):
        validate_section(ApiConfig, spec, "params.yaml")


def test_a_structured_answer_can_only_be_a_label(tmp_path):
    opened = teacher("http://127.0.0.1:1", "m", tmp_path, labels="structured")
    (question,) = opened.questions(["Profit rose."])
    assert question.model_identity["schema"]["properties"]["label"]["enum"] == TASK.names
    answers = [('{"label": "negative"}', "negative"), ('```json\n{"label": "negative"}\n```', "negative")]
    answers += [("Negative.", "negative"), ('{"label": 3}', None), ("{", None)]
    for text, label in answers:
        row = opened._read(Answer(text))
        assert np.isnan(row).all() if label is None else TASK.names[row.argmax()] == label


# ------------------------------------------------------------------------------- label sets

SETS = Task(
    kind="multilabel", labels={"up": "rises", "down": "falls", "new deal": "a contract"}, verbalizer={"up": "UP!"}
)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ('["UP!", "new deal"]', "up | new deal"),
        ('{"labels": ["down"]}', "down"),
        ('```json\n{"labels": []}\n```', "(none)"),
        ("<think>down?</think>\nnew deal, up!", "up | new deal"),
        ("Label: down; new deal.", "down | new deal"),
        ("- down\n- new deal", "down | new deal"),
        ("down | new deal", "down | new deal"),
        ("(none)", "(none)"),
        ("None.", "(none)"),
        ('{"label": "down, up!"}', "up | down"),
        ("down, down", "down"),
        ("down and perhaps new deal", None),
        ("down, sideways", None),
        ('["down", 1]', None),
        ('{"labels": ["down"], "other": ["up"], "label": "up"}', None),
        ("", None),
        ("...", None),
        ('{"labels": ""}', None),
        ("<think>down", None),
    ],
)
def test_a_label_set_is_read_or_nothing(text, labels):
    assert parse_label_set(SETS, text) == labels


def test_an_endpoint_gives_each_label_its_share_of_the_samples(server, tmp_path):
    """Two readable answers and one that is not to each text."""
    answers, (port, model) = ['{"labels": ["UP!", "down"]}', "UP!", "I do not know"], server
    sent: list[dict[str, Any]] = []

    def alter(request: dict[str, Any], status: int, answer: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        sent.append(request)
        answer["choices"][0]["message"]["content"] = answers[(len(sent) - 1) % 3]
        return status, answer

    with loopback.Proxy(port, alter=alter) as proxy:
        settings = {"samples": 3, "temperature": 1.0, "labels": "structured", "concurrency": 1, "max_tokens": 1}
        spec = validate_section(
            ApiConfig, {"model": model, "base_url": proxy.url, "key": KEY} | settings, "params.yaml"
        )
        opened = ApiTeacher(Endpoint("far", spec, AnswerStore(tmp_path / "answers.sqlite")), SETS)
        opened.endpoint.log = lambda line: None
        p = opened.predict_texts(TEXTS[:1])
    assert p.tolist() == [[1.0, 0.5, 0.0]]
    schema = label_schema(SETS)
    assert schema["properties"] == {"labels": {"type": "array", "items": {"type": "string", "enum": SETS.words}}}
    assert str(schema["properties"]) in str(sent[0])
