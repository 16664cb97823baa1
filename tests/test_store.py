"""The answer store: each answer is there once, and a killed process loses none that it had received."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

import tiny
from distillery.errors import UserError
from distillery.teachers.cache import Answer, AnswerStore, Question

IDENTITY = {"model": "m", "temperature": 0.0}


def question(i: int, sample: int = 0, **settings) -> Question:
    return Question(IDENTITY | settings, [{"role": "user", "content": f"text {i}"}], sample)


def test_an_answer_comes_back_as_it_was_first_stored(tmp_path):
    store = AnswerStore(tmp_path / "deep" / "answers.sqlite")
    questions = [question(i) for i in range(3)]
    assert store.get(questions) == [None, None, None] and store.get([]) == []
    store.put([(questions[0], Answer("yes", {"usage": [3, 1]})), (questions[2], Answer("nö"))])
    store.put([(questions[0], Answer("another"))])
    assert store.get(questions) == [Answer("yes", {"usage": [3, 1]}), None, Answer("nö")]
    assert AnswerStore(store.path).get(questions[:1]) == [Answer("yes", {"usage": [3, 1]})]
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
        rows = other.execute(
            "SELECT json_extract(model_identity, '$.model'), prompt, sample, answer FROM answers"
        ).fetchall()
    assert rows == [("m", '[{"content": "text 1", "role": "user"}]', 0, "yes")]


def test_a_call_counts_with_what_it_may_use_until_it_is_closed(tmp_path):
    store = AnswerStore(tmp_path / "answers.sqlite")
    assert store.used_tokens("endpoint") == (0, 0)
    call = store.open_call(question(1), "endpoint", 100, 10)
    store.open_call(question(2), "another endpoint", 7, 7)
    assert store.used_tokens("endpoint") == (100, 10) and store.outcomes("endpoint") == {"open": 1}
    store.close_call(call, "answered", 0.5, (40, 2), (question(1), Answer("yes")))
    assert store.used_tokens("endpoint") == (40, 2) and store.outcomes("endpoint") == {"answered": 1}
    assert store.get([question(1)]) == [Answer("yes")]
    store.close_call(store.open_call(question(3), "endpoint", 5, 5), "timed out", 1.0, (5, 5))
    assert store.used_tokens("endpoint") == (45, 7)


def test_a_file_that_is_no_store_is_named_in_one_line(tmp_path):
    path = tmp_path / "answers.sqlite"
    path.write_bytes(b"text, not a database" * 100)
    with pytest.raises(UserError, match=r"answers.sqlite: cannot be used as the store of answers: .*not a database"):
        AnswerStore(path)


OLD_TABLES = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY, asker TEXT NOT NULL, prompt TEXT NOT NULL, sample INTEGER NOT NULL,
    answer TEXT NOT NULL, more TEXT NOT NULL, at TEXT NOT NULL
);
CREATE TABLE calls (
    id INTEGER PRIMARY KEY, at TEXT NOT NULL, asker TEXT NOT NULL, key TEXT NOT NULL, outcome TEXT NOT NULL,
    seconds REAL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL
);
CREATE INDEX calls_by_asker ON calls (asker);
"""


def test_answers_in_a_file_with_the_columns_of_an_older_version_are_not_lost(tmp_path):
    path, first = tmp_path / "answers.sqlite", question(1)
    with sqlite3.connect(path) as old:
        old.execute("PRAGMA journal_mode = WAL")
        old.executescript(OLD_TABLES)
        row = (first.key, json.dumps(IDENTITY), json.dumps(first.prompt), 0, "yes", '{"usage": [3, 1]}', "2025-01-01")
        old.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        old.execute("INSERT INTO calls VALUES (1, '2025-01-01', 'endpoint', ?, 'answered', 0.5, 3, 1)", (first.key,))
    old.close()
    for _ in range(2):  # once renamed, the file is one of today's
        store = AnswerStore(path)
        assert store.get([first, question(2)]) == [Answer("yes", {"usage": [3, 1]}), None]
        assert store.used_tokens("endpoint") == (3, 1) and store.outcomes("endpoint") == {"answered": 1}
    store.put([(question(2), Answer("no"))])
    assert store.get([question(2)]) == [Answer("no")]
    with sqlite3.connect(path) as other:
        assert [name for (name,) in other.execute("SELECT name FROM sqlite_master WHERE name LIKE 'calls_by%'")] == [
            "calls_by_endpoint"
        ]


def test_an_older_version_gave_the_same_keys():
    assert question(1).key == "5acf59c4ebbd5a8769873d2f695ee466165e3d53671d86af0dc33cc31fe3290b"


WRITER = r"""
import os, sys, threading
from distillery.teachers.cache import Answer, AnswerStore, Question
store, first, last, threads = AnswerStore(sys.argv[1]), *map(int, sys.argv[2:5])
def write(start):
    for i in range(start, last, threads):
        store.put([(Question({"model": "m"}, i, n), Answer(f"{i} {n}")) for n in range(3)])
        os.write(1, f"{i}\n".encode())
for k in range(threads):
    threading.Thread(target=write, args=(first + k,)).start()
"""


def writer(path, first: int, last: int, threads: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, *map(str, (path, first, last, threads))]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(tiny.ROOT / "src")}, stdout=subprocess.PIPE)


def test_two_processes_write_at_once_and_each_answer_is_there_once(tmp_path):
    path = tmp_path / "answers.sqlite"
    both = [writer(path, 0, 60), writer(path, 30, 90, 4)]
    assert [process.wait(60) for process in both] == [0, 0]
    for process in both:
        process.stdout.close()
    questions = [Question({"model": "m"}, i, n) for i in range(90) for n in range(3)]
    assert all(AnswerStore(path).get(questions))
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT COUNT(*), COUNT(DISTINCT key) FROM answers").fetchone() == (270, 270)


def in_threads(count: int, function: Callable[[int], None], meanwhile: Callable[[], None]) -> list[Exception | None]:
    """What `function` raises in each of `count` threads, None where it raises nothing. meanwhile: runs in this one."""
    raised: list[Exception | None] = [None] * count

    def run(i: int) -> None:
        try:
            function(i)
        except Exception as error:
            raised[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    meanwhile()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("damaged", [None, 5])
def test_threads_that_wait_for_the_disk_are_written_together_and_one_that_is_wrong_alone(tmp_path, damaged):
    """A text that cannot be encoded is the mistake of its own thread; the answers of the others are there."""
    store, commits = AnswerStore(tmp_path / "answers.sqlite"), list[str]()

    def put(i: int) -> None:
        with store._connection() as connection:
            connection.set_trace_callback(commits.append)
        store.put([(question(i), Answer("\ud800" if i == damaged else str(i)))])

    def wait_for_all() -> None:
        while len(store._waiting) < 11:
            time.sleep(0.001)
        commits.clear()
        with store._turn:
            store._is_writing = False
            store._turn.notify_all()

    store._is_writing = True  # as another thread
    raised = in_threads(11, put, wait_for_all)
    assert [i for i, error in enumerate(raised) if error] == ([] if damaged is None else [damaged])
    answers = [None if i == damaged else Answer(str(i)) for i in range(11)]
    assert store.get([question(i) for i in range(11)]) == answers
    assert commits.count("COMMIT") == (1 if damaged is None else 10)


def test_what_an_interrupted_thread_had_taken_is_written_by_another(tmp_path, monkeypatch):
    store, commit, interrupted = AnswerStore(tmp_path / "answers.sqlite"), AnswerStore._commit, []

    def interrupt_once(self, writes) -> None:
        if not interrupted:
            interrupted.append(len(writes))
            raise RuntimeError
        commit(self, writes)

    def wait_for_all() -> None:
        while len(store._waiting) < 5:
            time.sleep(0.001)
        with store._turn:
            store._is_writing = False
            store._turn.notify_all()

    monkeypatch.setattr(AnswerStore, "_commit", interrupt_once)
    store._is_writing = True  # as another thread
    raised = in_threads(5, lambda i: store.put([(question(i), Answer(str(i)))]), wait_for_all)
    assert interrupted == [5] and [type(error) for error in raised].count(RuntimeError) == 1
    assert None not in store.get([question(i) for i in range(5)])


@pytest.mark.parametrize("threads", [1, 8])
def test_a_kill_loses_nothing_that_was_kept_and_leaves_no_half(tmp_path, threads):
    path = tmp_path / "answers.sqlite"
    process = writer(path, 0, 100_000, threads)
    kept = [process.stdout.readline() for _ in range(40)]
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    kept = {int(line) for line in kept + process.stdout.readlines()}
    process.stdout.close()
    store = AnswerStore(path)
    questions = [[Question({"model": "m"}, i, n) for n in range(3)] for i in range(max(kept) + 50)]
    stored = [[answer is not None for answer in store.get(three)] for three in questions]
    assert all(all(stored[i]) for i in kept)
    assert all(all(three) or not any(three) for three in stored)
