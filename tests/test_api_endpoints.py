"""Several servers of one model: whichever is free answers, one that dies is set aside, and nothing is paid twice."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loopback
import tiny
from distillery.config.load import validate_section
from distillery.config.schema import ApiConfig
from distillery.errors import UserError
from distillery.tasks.schema import load_task
from distillery.teachers.api.budget import max_call_tokens
from distillery.teachers.api.client import Endpoint
from distillery.teachers.api.teacher import ApiTeacher
from distillery.teachers.cache import AnswerStore

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
TEXTS = list(dict.fromkeys(tiny.texts()))[:40]
EXPECTED = [text.count("e") % 3 for text in TEXTS]
NOWHERE = "http://127.0.0.1:9/v1"  # the port `discard`, where nothing listens


def completion(text: str) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


class Answers:
    """What a server answers: a label that its text decides. rows: the texts that it got, with their number.

    before: called with the number of calls so far, before each answer.
    """

    def __init__(self, before=lambda calls: None):
        self.rows, self.running, self.most, self.before = Counter(), 0, 0, before
        self.lock = threading.Lock()

    def __call__(self, path: str, request: dict[str, Any]) -> tuple[int, Any]:
        content = request["messages"][-1]["content"]
        text = next(text for text in sorted(TEXTS, key=len, reverse=True) if text in content)
        with self.lock:
            self.rows[text] += 1
            self.running += 1
            self.most = max(self.most, self.running)
            calls = sum(self.rows.values())
        self.before(calls)
        with self.lock:
            self.running -= 1
        return 200, completion(TASK.words[text.count("e") % 3])


def teacher(path: Path, endpoints: list[Any], **settings: Any) -> ApiTeacher:
    endpoints = [{"base_url": one} if isinstance(one, str) else one for one in endpoints]
    base = {"model": "m", "endpoints": endpoints, "timeout": 30.0, "max_attempts": 2}
    spec = validate_section(ApiConfig, base | settings, "params.yaml")
    opened = ApiTeacher(Endpoint("far", spec, AnswerStore(path / "answers.sqlite")), TASK)
    opened.messages = []
    opened.endpoint.log = opened.messages.append
    return opened


def labels(opened: ApiTeacher, texts: list[str] = TEXTS) -> list[int]:
    return np.argmax(opened.predict_texts(texts), -1).tolist()


def set_aside(opened: ApiTeacher) -> list[str]:
    return [line for line in opened.messages if "set aside" in line]


def test_rows_go_to_whichever_is_free_within_the_limits_of_each_and_with_its_own_key(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRST_KEY", "sk-first")
    monkeypatch.setenv("SECOND_KEY", "sk-second")
    both = threading.Barrier(3 + 1)  # no answer before each server has as many calls as it takes
    first, second = (Answers(lambda calls, n=n: both.wait(30) if calls <= n else None) for n in (3, 1))
    with loopback.Proxy(first, key="sk-first") as one, loopback.Proxy(second, key="sk-second") as two:
        limited = {"base_url": two.url, "key": "SECOND_KEY", "concurrency": 1}
        opened = teacher(tmp_path, [{"base_url": one.url}, limited], key="FIRST_KEY", concurrency=3)
        assert labels(opened) == EXPECTED
    assert (first.most, second.most) == (3, 1)
    assert first.rows + second.rows == Counter(TEXTS) and not set_aside(opened)
    counts = [opened.endpoint.store.outcomes(server.identity)["answered"] for server in opened.endpoint.servers]
    assert counts == [sum(first.rows.values()), sum(second.rows.values())]


@pytest.mark.parametrize("fault", ["reset", "500", "429", "truncated", "closed"])
def test_the_rows_of_a_server_that_dies_go_to_the_others(tmp_path, fault):
    def die(calls: int) -> None:
        if calls == 5:
            if fault == "closed":
                dying.server.shutdown()
                dying.server.server_close()
            dying.share = 1.0

    faults = ("reset",) if fault == "closed" else (fault,)
    with loopback.Proxy(Answers(die), faults=faults) as dying, loopback.Proxy(Answers()) as other:
        opened = teacher(tmp_path, [dying.url, other.url], concurrency=3)
        assert labels(opened) == EXPECTED
        (line,) = set_aside(opened)
        assert line.startswith(f"far: {dying.url} is set aside after 2 failed calls, the last: ")
        delivered = dying.delivered + other.delivered
        assert len(delivered) == len(TEXTS) and set(delivered.values()) == {1}
        assert labels(teacher(tmp_path, [other.url])) == EXPECTED  # its answers are those of all
        assert dying.delivered + other.delivered == delivered


def test_an_endpoint_that_was_never_there_costs_a_line(tmp_path):
    with loopback.Proxy(Answers()) as other:
        opened = teacher(tmp_path, [NOWHERE, other.url])
        assert labels(opened) == EXPECTED and len(set_aside(opened)) == 1
        opened.predict_texts([f"{TEXTS[0]} more"])
        assert len(set_aside(opened)) == 1, "it is left alone from then on"


def test_when_all_are_dead_the_run_ends_in_one_line_and_continues_later(tmp_path):
    def die(calls: int) -> None:
        if calls == 8:
            first.share = second.share = 1.0

    answers = Answers(die)
    with loopback.Proxy(answers, faults=("500",)) as first, loopback.Proxy(answers, faults=("reset",)) as second:
        opened = teacher(tmp_path, [first.url, second.url], concurrency=2)
        with pytest.raises(UserError) as raised:
            opened.predict_texts(TEXTS)
        line = str(raised.value)
        assert line.startswith("teachers.far: none of its 2 endpoints answers (") and "\n" not in line
        assert f"{first.url}: HTTP 500" in line and f"{second.url}: connection lost" in line
        assert line.endswith("; all answers so far are stored, run again to continue")
        paid = first.delivered + second.delivered
        assert 8 <= len(paid) < len(TEXTS) and opened.endpoint.budget.reserved == [0, 0]
        first.share = second.share = 0.0
        assert labels(opened) == EXPECTED  # both are tried again
        assert set((first.delivered + second.delivered).values()) == {1}


def test_a_row_that_no_server_can_answer_ends_the_run_in_one_line(tmp_path):
    def fail(request: dict[str, Any], status: int, answer: Any) -> tuple[int, Any]:
        return (500, {"error": "broken"}) if TEXTS[3] in request["messages"][-1]["content"] else (status, answer)

    line = r"^teachers.far: no(ne of its 2 endpoints)? answer.*HTTP 500.*continue$"
    with (
        loopback.Proxy(Answers(), alter=fail) as first,
        loopback.Proxy(Answers(), alter=fail) as second,
        pytest.raises(UserError, match=line),
    ):
        teacher(tmp_path, [first.url, second.url]).predict_texts(TEXTS)


def test_a_row_that_one_server_cannot_answer_goes_to_another_one(tmp_path):
    """Not back to the server that has given it up and answers other rows, however long the other one is busy."""
    lock, again, answered, later = threading.Lock(), threading.Event(), threading.Semaphore(0), threading.Event()
    contents: list[str] = []

    def fail(request: dict[str, Any], status: int, answer: Any) -> tuple[int, Any]:
        content = request["messages"][-1]["content"]
        with lock:
            contents.append(content)
            failures, others = contents.count(contents[0]), sum(one != contents[0] for one in contents)
        if content != contents[0]:
            again.wait(30)
            answered.release()
            if others > 8:  # the row has been back for long
                later.set()
            return status, answer
        if failures == 2:
            again.set()
            for _ in range(2):  # the first of them has arrived, so not all of its calls in a row have failed
                answered.acquire(timeout=30)
        return 500, {"error": "broken"}

    busy = Answers(lambda _: later.wait(30))
    with loopback.Proxy(Answers(), alter=fail) as one, loopback.Proxy(busy) as two:
        opened = teacher(tmp_path, [{"base_url": one.url, "concurrency": 2}, {"base_url": two.url, "concurrency": 1}])
        assert labels(opened) == EXPECTED
    assert contents.count(contents[0]) == 2 and not set_aside(opened)


def test_a_row_does_not_wait_for_the_turn_of_a_slow_server(tmp_path):
    slow, fast = Answers(), Answers()
    with loopback.Proxy(slow) as one, loopback.Proxy(fast) as two:
        limited = {"base_url": one.url, "requests_per_minute": 0.1}  # one call, and the next one in ten minutes
        assert labels(teacher(tmp_path, [limited, two.url])) == EXPECTED
    assert sum(slow.rows.values()) <= 1


def test_a_mistake_in_one_of_them_names_it(tmp_path, monkeypatch):
    keyed = {"base_url": NOWHERE, "key": "SECOND_KEY"}
    with pytest.raises(UserError, match=r"^params.yaml: teachers.far.api.endpoints.1.key: set SECOND_KEY in the env"):
        teacher(tmp_path, ["http://127.0.0.1:8/v1", keyed])
    monkeypatch.setenv("SECOND_KEY", "sk-wrong-one")
    with loopback.Proxy(Answers()) as one, loopback.Proxy(Answers(), key="sk-right") as two:
        opened = teacher(tmp_path, [one.url, {"base_url": two.url, "key": "SECOND_KEY"}])
        line = r"^params.yaml: teachers.far.api.endpoints.1.key: the endpoint does not accept the key: HTTP 401"
        with pytest.raises(UserError, match=line):
            opened.predict_texts(TEXTS)


def test_answers_stay_those_of_the_model_when_its_servers_change(tmp_path):
    with loopback.Proxy(Answers()) as one, loopback.Proxy(Answers()) as two, loopback.Proxy(Answers()) as three:
        alone = teacher(tmp_path, [], base_url=one.url)
        assert labels(alone, TEXTS[:20]) == EXPECTED[:20]
        assert labels(teacher(tmp_path, [one.url, two.url])) == EXPECTED
        for servers in ([two.url, one.url], [three.url], [three.url, one.url]):
            assert labels(teacher(tmp_path, servers)) == EXPECTED
        assert len(one.requests) + len(two.requests) == len(TEXTS) and not three.requests


@pytest.mark.parametrize("ceiling", ["max_total_tokens", "max_cost"])
def test_a_ceiling_is_one_for_all_servers_also_for_those_of_before(tmp_path, ceiling):
    most = max(sum(max_call_tokens(q)) for q in teacher(tmp_path, [NOWHERE]).questions(TEXTS))
    limit = 15 * 11 + 2 * most  # of an answer 11 tokens are counted
    value = {"max_total_tokens": limit} if ceiling == "max_total_tokens" else {"max_cost": limit / 1e6}
    value["price"] = {"input": 1, "output": 1}
    with loopback.Proxy(Answers()) as one, loopback.Proxy(Answers()) as two:
        opened = teacher(tmp_path, [one.url, two.url], concurrency=1, **value)
        with pytest.raises(UserError, match=rf"teachers.far.api.{ceiling}: the next call might pass"):
            opened.predict_texts(TEXTS)
        used = opened.endpoint.budget.used
        assert 15 * 11 <= sum(used) <= limit and sum(used) == 11 * len(one.requests + two.requests)
        assert teacher(tmp_path, [NOWHERE], **value).endpoint.budget.used == used


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"base_url": NOWHERE}, "`endpoints` have a `base_url` each: leave that of the section out"),
        ({"endpoints": [{"base_url": NOWHERE}] * 2}, f"`endpoints` holds {NOWHERE} twice: raise its `concurrency` "),
        ({"endpoints": [{"key": "A"}]}, "endpoints.0.base_url: missing"),
    ],
)
def test_endpoints_that_do_not_fit_are_named(settings, line):
    spec = {"model": "m", "endpoints": [{"base_url": "http://127.0.0.1:8/v1"}]} | settings
    with pytest.raises(UserError) as raised:
        validate_section(ApiConfig, spec, "params.yaml")
    assert line in str(raised.value)
