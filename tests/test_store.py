"""The store: answers are there once, whoever wrote them, and a kill loses none that had come."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

import tiny
from distillery.errors import UserError
from distillery.teachers.cache import Answer, AnswerStore, Question

ASKER = {"model": "m", "temperature": 0.0}


def question(i: int, sample: int = 0, **asker) -> Question:
    return Question(ASKER | asker, [{"role": "user", "content": f"text {i}"}], sample)


def test_an_answer_comes_back_and_is_kept_as_it_came_first(tmp_path):
    store = AnswerStore(tmp_path / "deep" / "answers.sqlite")
    asked = [question(i) for i in range(3)]
    assert store.get(asked) == [None, None, None] and store.get([]) == []
    store.put([(asked[0], Answer("yes", {"usage": [3, 1]})), (asked[2], Answer("nö"))])
    store.put([(asked[0], Answer("another"))])
    assert store.get(asked) == [Answer("yes", {"usage": [3, 1]}), None, Answer("nö")]
    assert AnswerStore(store.path).get(asked[:1]) == [Answer("yes", {"usage": [3, 1]})]
    many = [question(i) for i in range(1200)]
    store.put((q, Answer(str(i))) for i, q in enumerate(many) if i > 2)
    assert [a.text for a in store.get(many)[3:]] == [str(i) for i in range(3, 1200)]


def test_everything_that_decides_an_answer_is_in_its_key():
    base, keys = question(1), {question(1).key}
    for other in (question(2), question(1, sample=1), question(1, model="n"), question(1, dtype="bfloat16")):
        keys.add(other.key)
    assert len(keys) == 5
    assert Question({"temperature": 0.0, "model": "m"}, base.prompt).key == base.key  # the order of names does not


def test_ordinary_tools_can_read_it(tmp_path):
    store = AnswerStore(tmp_path / "answers.sqlite")
    store.put([(question(1), Answer("yes"))])
    with sqlite3.connect(store.path) as other:
        found = other.execute("SELECT json_extract(asker, '$.model'), prompt, sample, answer FROM answers").fetchall()
    assert found == [("m", '[{"content": "text 1", "role": "user"}]', 0, "yes")]


def test_a_call_counts_with_what_it_may_use_until_it_is_closed(tmp_path):
    store = AnswerStore(tmp_path / "answers.sqlite")
    assert store.used("me") == (0, 0)
    call = store.opened(question(1), "me", 100, 10)
    store.opened(question(2), "somebody else", 7, 7)
    assert store.used("me") == (100, 10) and store.outcomes("me") == {"open": 1}
    store.closed(call, "answered", 0.5, (40, 2), (question(1), Answer("yes")))
    assert store.used("me") == (40, 2) and store.outcomes("me") == {"answered": 1}
    assert store.get([question(1)]) == [Answer("yes")]
    store.closed(store.opened(question(3), "me", 5, 5), "timed out", 1.0, None)
    assert store.used("me") == (45, 7)


def test_a_file_that_is_no_store_is_named_in_one_line(tmp_path):
    path = tmp_path / "answers.sqlite"
    path.write_bytes(b"text, not a database" * 100)
    with pytest.raises(UserError, match=r"answers.sqlite: cannot be used as the store of answers: .*not a database"):
        AnswerStore(path)


WRITER = """
import sys
from distillery.teachers.cache import Answer, AnswerStore, Question
store, first, last = AnswerStore(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for i in range(first, last):
    store.put([(Question({"model": "m"}, i, n), Answer(f"{sys.argv[4]} {i} {n}")) for n in range(3)])
    print(i, flush=True)
"""


def writer(path, first: int, last: int, name: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path), str(first), str(last), name]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(tiny.ROOT / "src")}, stdout=subprocess.PIPE)


def test_two_processes_write_at_once_and_each_answer_is_there_once(tmp_path):
    path = tmp_path / "answers.sqlite"
    both = [writer(path, 0, 60, "a"), writer(path, 30, 90, "b")]
    assert [process.wait(60) for process in both] == [0, 0]
    for process in both:
        process.stdout.close()
    asked = [Question({"model": "m"}, i, n) for i in range(90) for n in range(3)]
    assert all(AnswerStore(path).get(asked))
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT COUNT(*), COUNT(DISTINCT key) FROM answers").fetchone() == (270, 270)


def test_a_kill_loses_nothing_that_was_kept_and_leaves_no_half(tmp_path):
    path = tmp_path / "answers.sqlite"
    process = writer(path, 0, 100_000, "a")
    for _ in range(20):
        told = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    time.sleep(0.1)
    store = AnswerStore(path)
    asked = [[Question({"model": "m"}, i, n) for n in range(3)] for i in range(told + 50)]
    found = [[answer is not None for answer in store.get(three)] for three in asked]
    assert all(map(all, found[: told + 1]))
    assert all(all(three) or not any(three) for three in found)
