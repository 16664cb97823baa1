"""A cache of model answers: an answer that cost money or minutes is stored on arrival and never computed again.

One SQLite file (`.cache/answers/answers.sqlite`) with two tables that any SQLite tool can read:

``answers``  one row per answer: `key`, `model_identity` (JSON: model, revision, adapter, template, dtype, label set,
             sampling, …), `prompt` (JSON), `sample` (number among the answers to one prompt), `answer` (text),
             `metadata` (JSON), `at`
``calls``    one row per call to a paid endpoint, whatever its outcome: `at`, `endpoint` (JSON: client, base_url,
             model), `key`, `outcome`, `seconds`, `input_tokens`, `output_tokens`

Every write is on disk before the method returns, so a killed run loses nothing that it had received. Several processes
and threads may write at once. What threads of one process write while the disk is busy goes into one transaction, for
which the disk is waited for once.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillery.errors import UserError
from distillery.files import raise_if_disk_full

STORE_PATH = Path(".cache/answers/answers.sqlite")  # below the root
WRITE_TIMEOUT = 60  # seconds to wait for another process's write
KEYS_PER_QUERY = 500
TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model_identity TEXT NOT NULL, prompt TEXT NOT NULL, sample INTEGER NOT NULL,
    answer TEXT NOT NULL, metadata TEXT NOT NULL, at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY, at TEXT NOT NULL, endpoint TEXT NOT NULL, key TEXT NOT NULL, outcome TEXT NOT NULL,
    seconds REAL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS calls_by_endpoint ON calls (endpoint);
"""
RENAMED_COLUMNS = {  # (table, column in older files) -> column
    ("answers", "asker"): "model_identity",
    ("answers", "more"): "metadata",
    ("calls", "asker"): "endpoint",
}


def canonical_json(value: Any) -> str:
    """`value` as JSON text that does not depend on the order of its keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Question:
    """A request to a model. model_identity: JSON values of all that decides the answer but `prompt` and `sample`.

    row_id: of the row that it is about, for messages only.
    """

    model_identity: dict[str, Any]
    prompt: Any
    sample: int = 0
    row_id: str = ""

    @property
    def key(self) -> str:
        """sha256 under which the answer is stored."""
        return hashlib.sha256(canonical_json([self.model_identity, self.prompt, self.sample]).encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """What a model returned. metadata: finish reason, token usage and log-probabilities, where there are any."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


class _Write:
    """What one thread wants to write, and what came of it."""

    def __init__(self, action: Callable[[sqlite3.Connection], Any]):
        self.action, self.is_done = action, False
        self.result: Any = None
        self.error: BaseException | None = None


class AnswerStore:
    """The answers in the file `path`, which is created when it does not exist.

    Raises UserError when the file is not an answer store, and when the disk is full.
    """

    def __init__(self, path: Path | str):
        self.path, self._thread = Path(path), threading.local()
        self._waiting, self._is_writing, self._turn = list[_Write](), False, threading.Condition()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connection() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            _rename_old_columns(connection)
            connection.executescript(TABLES)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection; commits at the end of the block, or rolls back."""
        try:
            if not hasattr(self._thread, "connection"):
                self._thread.connection = sqlite3.connect(self.path, timeout=WRITE_TIMEOUT)
                self._thread.connection.execute("PRAGMA synchronous = FULL")
            with self._thread.connection as connection:
                yield connection
        except sqlite3.Error as error:
            full = "disk is full" in str(error)
            raise_if_disk_full(OSError(28, "") if full else error, self.path)
            raise UserError(f"{self.path}: cannot be used as the store of answers: {error}") from None

    def _write(self, action: Callable[[sqlite3.Connection], Any]) -> Any:
        """Run `action` in a transaction and return its result when it is on disk. Raises what `action` raises.

        The first of several threads commits the writes of all that wait (group commit).
        """
        own = _Write(action)
        with self._turn:
            self._waiting.append(own)
            self._turn.wait_for(lambda: own.is_done or not self._is_writing)
            writes = [] if own.is_done else self._waiting
            if writes:
                self._is_writing, self._waiting = True, []
        if writes:
            try:
                self._commit(writes)
            finally:
                with self._turn:
                    self._is_writing = False
                    self._waiting = [write for write in writes if not write.is_done] + self._waiting
                    self._turn.notify_all()
        if own.error is not None:
            raise own.error
        return own.result

    def _commit(self, writes: Sequence[_Write]) -> None:
        """Commit `writes` together; where that fails, each alone, so that one that is wrong takes no other with it."""
        error = None
        try:
            with self._connection() as connection:
                results = [write.action(connection) for write in writes]
            for write, result in zip(writes, results, strict=True):
                write.result = result
        except Exception as raised:
            error = raised
        if error is not None and len(writes) > 1:
            for write in writes:
                self._commit([write])
            return
        for write in writes:
            write.error, write.is_done = error, True

    def get(self, questions: Sequence[Question]) -> list[Answer | None]:
        """The answers to `questions`, in their order; None where there is none yet."""
        keys = [question.key for question in questions]
        stored: dict[str, Answer] = {}
        for start in range(0, len(keys), KEYS_PER_QUERY):
            batch = keys[start : start + KEYS_PER_QUERY]
            query = f"SELECT key, answer, metadata FROM answers WHERE key IN ({', '.join('?' * len(batch))})"
            with self._connection() as connection:
                rows = connection.execute(query, batch)
                stored |= {key: Answer(text, json.loads(metadata)) for key, text, metadata in rows}
        return [stored.get(key) for key in keys]

    def put(self, answered: Iterable[tuple[Question, Answer]]) -> None:
        """Store all of `answered` or, if the process is killed, none. An answer that is already there stays."""
        rows = list(answered)
        self._write(lambda connection: _insert_answers(connection, rows))

    def open_call(self, question: Question, endpoint: str, input_tokens: int, output_tokens: int) -> int:
        """Record that a call is about to be made that may use this many tokens; returns the call's id.

        If the run is killed before :meth:`close_call`, the call stays `open` and counts with these tokens.
        """
        row = (_now(), endpoint, question.key, "open", None, input_tokens, output_tokens)
        columns = "at, endpoint, key, outcome, seconds, input_tokens, output_tokens"
        query = f"INSERT INTO calls ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)"
        return self._write(lambda connection: connection.execute(query, row).lastrowid)

    def close_call(
        self,
        call: int,
        outcome: str,
        seconds: float,
        tokens: tuple[int, int],
        answered: tuple[Question, Answer] | None = None,
    ) -> None:
        """Record the outcome and the (input, output) tokens of a `call`; store its answer in the same transaction."""
        query = "UPDATE calls SET outcome = ?, seconds = ?, input_tokens = ?, output_tokens = ? WHERE id = ?"

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(query, (outcome, seconds, *tokens, call))
            if answered is not None:
                _insert_answers(connection, [answered])

        self._write(write)

    def texts(self, model_identity: dict[str, Any]) -> Iterator[str]:
        """The texts of all answers to questions with this `model_identity`."""
        query = "SELECT answer FROM answers WHERE model_identity = ?"
        with self._connection() as connection:
            for (text,) in connection.execute(query, (canonical_json(model_identity),)):
                yield text

    def used_tokens(self, endpoint: str) -> tuple[int, int]:
        """(input, output) tokens of all calls to `endpoint`."""
        query = "SELECT COALESCE(SUM(input_tokens), 0), COALESCE(SUM(output_tokens), 0) FROM calls WHERE endpoint = ?"
        with self._connection() as connection:
            return tuple(connection.execute(query, (endpoint,)).fetchone())

    def used_tokens_of_model(self, client: str, model: str) -> tuple[int, int]:
        """(input, output) tokens of all calls to `model`, whatever the address of its endpoint."""
        return self._of_model("COALESCE(SUM(input_tokens), 0), COALESCE(SUM(output_tokens), 0)", client, model)

    def call_seconds(self, client: str, model: str) -> tuple[int, float]:
        """Number of answered calls to `model`, whatever the address of its endpoint, and the mean seconds of one."""
        return self._of_model("COUNT(*), COALESCE(AVG(seconds), 0)", client, model, "AND outcome = 'answered'")

    def _of_model(self, columns: str, client: str, model: str, condition: str = "") -> tuple:
        """The one row of aggregate `columns` over the calls to `model`."""
        query = (
            f"SELECT {columns} FROM calls WHERE json_extract(endpoint, '$.client') = ? "
            f"AND json_extract(endpoint, '$.model') = ? {condition}"
        )
        with self._connection() as connection:
            return tuple(connection.execute(query, (client, model)).fetchone())

    def outcomes(self, endpoint: str) -> dict[str, int]:
        """Number of calls to `endpoint` by outcome."""
        query = "SELECT outcome, COUNT(*) FROM calls WHERE endpoint = ? GROUP BY outcome ORDER BY outcome"
        with self._connection() as connection:
            return dict(connection.execute(query, (endpoint,)))


def _rename_old_columns(connection: sqlite3.Connection) -> None:
    """Give the columns of a file from an older version their present names; its answers stay."""
    query = "SELECT t.name, c.name FROM sqlite_master t JOIN pragma_table_info(t.name) c WHERE t.type = 'table'"
    if RENAMED_COLUMNS.keys() & set(connection.execute(query)):
        connection.execute("BEGIN IMMEDIATE")
        # read again: another process may have renamed them before this one had the lock
        for table, column in RENAMED_COLUMNS.keys() & set(connection.execute(query)):
            connection.execute(f"ALTER TABLE {table} RENAME COLUMN {column} TO {RENAMED_COLUMNS[table, column]}")
        connection.execute("DROP INDEX IF EXISTS calls_by_asker")


def _insert_answers(connection: sqlite3.Connection, answered: Sequence[tuple[Question, Answer]]) -> None:
    rows = [
        (
            question.key,
            canonical_json(question.model_identity),
            canonical_json(question.prompt),
            question.sample,
            answer.text,
            canonical_json(answer.metadata),
            _now(),
        )
        for question, answer in answered
    ]
    connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
