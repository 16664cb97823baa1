"""Answers that were paid for, in money or in minutes: kept on arrival, never asked for again.

One SQLite file (`.cache/answers/answers.sqlite`) with two tables that any SQLite tool can read:

``answers``  an answer each: `key`, `asker` (JSON: model, revision, adapter, template, dtype, label set, sampling, …),
             `prompt` (JSON), `sample` (number among answers to the same question), `answer` (text), `more` (JSON)
``calls``    a call to a paid endpoint each, whatever came of it: `at`, `asker`, `key`, `outcome`, `seconds`,
             `input_tokens`, `output_tokens`

Every write is a transaction of its own that is on disk before the call returns, so a killed run loses nothing that it
had received; several processes and threads may write at once.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillery.errors import UserError
from distillery.files import raise_if_disk_full

TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, asker TEXT NOT NULL, prompt TEXT NOT NULL, sample INTEGER NOT NULL,
    answer TEXT NOT NULL, more TEXT NOT NULL, at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY, at TEXT NOT NULL, asker TEXT NOT NULL, key TEXT NOT NULL, outcome TEXT NOT NULL,
    seconds REAL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS calls_by_asker ON calls (asker);
"""


WRITE_TIMEOUT = 60  # seconds to wait for another process's write


KEYS_PER_QUERY = 500  # keys in one query


def canonical_json(value: Any) -> str:
    """The same text for the same value, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Question:
    """What is asked. asker: everything but prompt and sample number that decides the answer, as JSON values."""

    asker: dict[str, Any]
    prompt: Any
    sample: int = 0

    @property
    def key(self) -> str:
        return hashlib.sha256(canonical_json([self.asker, self.prompt, self.sample]).encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    text: str
    more: dict[str, Any] = field(default_factory=dict)


class AnswerStore:
    """The answers in the file `path`, which is made when there is none.

    Raises UserError when the file is no store or the disk is full.
    """

    def __init__(self, path: Path | str):
        self.path, self._mine = Path(path), threading.local()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._using() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(TABLES)

    @contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        try:
            if not hasattr(self._mine, "connection"):
                self._mine.connection = sqlite3.connect(self.path, timeout=WRITE_TIMEOUT)
                self._mine.connection.execute("PRAGMA synchronous = FULL")
            with self._mine.connection as connection:  # commits, or rolls back
                yield connection
        except sqlite3.Error as error:
            full = "disk is full" in str(error)
            raise_if_disk_full(OSError(28, "") if full else error, self.path)
            raise UserError(f"{self.path}: cannot be used as the store of answers: {error}") from None

    def get(self, questions: Sequence[Question]) -> list[Answer | None]:
        """The answers to `questions`, in their order; None where there is none yet."""
        keys = [question.key for question in questions]
        found: dict[str, Answer] = {}
        for start in range(0, len(keys), KEYS_PER_QUERY):
            some = keys[start : start + KEYS_PER_QUERY]
            query = f"SELECT key, answer, more FROM answers WHERE key IN ({', '.join('?' * len(some))})"
            with self._using() as connection:
                found |= {key: Answer(text, json.loads(more)) for key, text, more in connection.execute(query, some)}
        return [found.get(key) for key in keys]

    def put(self, answered: Iterable[tuple[Question, Answer]]) -> None:
        """Keep all of `answered` or, if killed, none. An answer that is there already stays as it is."""
        rows = [
            (q.key, canonical_json(q.asker), canonical_json(q.prompt), q.sample, a.text, canonical_json(a.more), _now())
            for q, a in answered
        ]
        with self._using() as connection:
            connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def opened(self, question: Question, asker: str, input_tokens: int, output_tokens: int) -> int:
        """Note that a call is about to be made that may use so many tokens; returns its number.

        The call of a run that is killed before :meth:`closed` stays `open`, and counts with these tokens.
        """
        row = (_now(), asker, question.key, "open", None, input_tokens, output_tokens)
        columns = "at, asker, key, outcome, seconds, input_tokens, output_tokens"
        with self._using() as connection:
            made = connection.execute(f"INSERT INTO calls ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            return made.lastrowid

    def closed(
        self,
        call: int,
        outcome: str,
        seconds: float,
        tokens: tuple[int, int] | None,
        answered: tuple[Question, Answer] | None = None,
    ) -> None:
        """Note what came of a `call`, and keep its answer in the same transaction. tokens None: as it was opened."""
        with self._using() as connection:
            connection.execute("UPDATE calls SET outcome = ?, seconds = ? WHERE id = ?", (outcome, seconds, call))
            if tokens is not None:
                query = "UPDATE calls SET input_tokens = ?, output_tokens = ? WHERE id = ?"
                connection.execute(query, (*tokens, call))
            if answered is not None:
                q, a = answered
                row = (
                    q.key,
                    canonical_json(q.asker),
                    canonical_json(q.prompt),
                    q.sample,
                    a.text,
                    canonical_json(a.more),
                    _now(),
                )
                connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def used(self, asker: str) -> tuple[int, int]:
        """(input, output) tokens of all calls that `asker` has made."""
        query = "SELECT COALESCE(SUM(input_tokens), 0), COALESCE(SUM(output_tokens), 0) FROM calls WHERE asker = ?"
        with self._using() as connection:
            return tuple(connection.execute(query, (asker,)).fetchone())

    def outcomes(self, asker: str) -> dict[str, int]:
        """How many calls of `asker` ended how."""
        query = "SELECT outcome, COUNT(*) FROM calls WHERE asker = ? GROUP BY outcome ORDER BY outcome"
        with self._using() as connection:
            return dict(connection.execute(query, (asker,)))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


STORE_PATH = Path(".cache/answers/answers.sqlite")  # below the root: all that endpoints and prompted models have said
