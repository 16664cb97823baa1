"""The servers of one model, and the questions that are dealt to whichever of them is free."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

from distillery.config.schema import ApiConfig
from distillery.teachers.api.pacing import Pacer
from distillery.teachers.api.transport import Transport
from distillery.teachers.cache import Question, canonical_json


class Server:
    """One server of the model. name: the teacher's, for messages. spec: its own settings. place: of its key.

    identity: under which the store records its calls. failures: failed calls in a row, of all threads. last_failure:
    of a server that is set aside, else None. Raises UserError when the API key is not in the environment.
    """

    def __init__(self, name: str, spec: ApiConfig, place: str):
        self.spec, self.transport = spec, Transport(name, spec, place)
        self.base_url = self.transport.base_url
        self.identity = canonical_json({"client": spec.client, "base_url": self.base_url, "model": spec.model})
        self.pacer, self.turn = Pacer(spec.requests_per_minute), threading.Lock()
        self.failures, self._lock = 0, threading.Lock()
        self.last_failure: str | None = None

    def count_call(self, failed: bool) -> None:
        """Count a call in `failures`, which an answer sets to 0."""
        with self._lock:
            self.failures = self.failures + 1 if failed else 0

    def set_aside(self, failure: str) -> None:
        """Send no further call; threads that wait for a turn stop waiting. failure: the outcome of the last call."""
        self.last_failure = failure
        self.pacer.stop.set()

    def revive(self) -> None:
        """Permit calls, also after :meth:`set_aside`."""
        self.failures, self.last_failure = 0, None
        self.pacer.stop.clear()


class QuestionQueue:
    """Questions that wait for one of `servers`; safe across threads. A question is open until it is answered."""

    def __init__(self, questions: Iterable[Question], servers: Sequence[Server]):
        self._waiting, self.servers = deque(questions), servers
        self.total = self._open = len(self._waiting)
        self._given_up: defaultdict[str, set[Server]] = defaultdict(set)  # by key of a question
        self._changed = threading.Condition()
        self._stopped = False

    def take(self, server: Server) -> Question | None:
        """The next question, as soon as `server` may be called; None when it gets no more.

        A question that waits for the turn of a server stays in the queue, where another one may take it. It may come
        back, so a server without a question waits until all are answered. A server does not get one that it has given
        up while another one may answer it.
        """
        with server.turn:
            while self._wait(server) and server.pacer.wait_for_turn():
                with self._changed:
                    if (position := self._position(server)) is not None:
                        question = self._waiting[position]
                        del self._waiting[position]
                        return question
            return None

    def _wait(self, server: Server) -> bool:
        """Wait until a question is there; False when `server` gets no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._position(server) is not None or self._is_over(server))
            return not self._is_over(server)

    def _position(self, server: Server) -> int | None:
        """Where the first waiting question is that `server` may get."""
        return next((i for i, question in enumerate(self._waiting) if self._may_get(server, question)), None)

    def _may_get(self, server: Server, question: Question) -> bool:
        if not self._given_up:  # nearly always: no key is computed
            return True
        return server not in self._given_up.get(question.key, ()) or not self._has_other(question)

    def _has_other(self, question: Question) -> bool:
        """Whether a server that is not set aside has not given `question` up."""
        given_up = self._given_up.get(question.key, ())
        return any(server.last_failure is None and server not in given_up for server in self.servers)

    def _is_over(self, server: Server) -> bool:
        return self._stopped or not self._open or server.last_failure is not None

    def put_back(self, question: Question) -> None:
        """Let another server answer `question`, before those that wait."""
        with self._changed:
            self._waiting.appendleft(question)
            self._changed.notify_all()

    def give_up(self, question: Question, server: Server) -> bool:
        """Note that `server` gives `question` up; whether another server is left to answer it."""
        with self._changed:
            self._given_up[question.key].add(server)
            return self._has_other(question)

    def close(self) -> int:
        """Count a question as answered; the number of those that are."""
        with self._changed:
            self._open -= 1
            if not self._open:
                self._changed.notify_all()
            return self.total - self._open

    def stop(self) -> None:
        """Give out no more questions."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
