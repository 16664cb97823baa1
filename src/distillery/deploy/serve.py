"""`distillery serve`: a student over HTTP, with requests that come together predicted in one batch."""

from __future__ import annotations

import json
import queue
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from distillery.data.records import normalize_text
from distillery.deploy.decisions import check_usable, decide
from distillery.deploy.predictors import Predictor, open_predictor
from distillery.deploy.settings import InferenceSettings, is_unicode, model_folder, read_settings
from distillery.errors import UserError

MAX_BODY, MAX_TEXTS = 8_000_000, 1024  # bytes and texts of a request
BATCH_TEXTS, BATCH_SECONDS = 64, 0.005  # texts predicted at a time, and how long the first of them waits for others
REQUEST_SECONDS = 30  # that a client may take to send a request
EXAMPLE = '{"texts": ["…"]}'


@dataclass
class _Request:
    texts: list[str]
    finished: threading.Event = field(default_factory=threading.Event)
    rows: list[dict[str, Any]] | None = None


class RequestError(Exception):
    """A request that cannot be answered: its status and one line."""

    def __init__(self, status: HTTPStatus, line: str):
        super().__init__(line)
        self.status = status


class StudentServer(ThreadingHTTPServer):
    """A student behind HTTP. Each request has a thread that waits; one thread predicts for all of them."""

    daemon_threads = True
    request_queue_size = 128  # connections that wait to be accepted

    def __init__(self, address: tuple[str, int], predictor: Predictor, settings: InferenceSettings, abstain: bool):
        super().__init__(address, _Handler)
        self.predictor, self.settings, self.abstain = predictor, settings, abstain
        self.responses: Counter[int] = Counter()
        self.texts, self.batches, self.seconds = 0, 0, 0.0
        self._lock = threading.Lock()
        self._waiting: queue.Queue[_Request] = queue.Queue()
        threading.Thread(target=self._predict_batches, daemon=True).start()

    def predict(self, texts: list[str]) -> list[dict[str, Any]]:
        """The decision on each text. Raises RequestError when the model fails."""
        request = _Request([normalize_text(text) for text in texts])
        self._waiting.put(request)
        request.finished.wait()
        if request.rows is None:
            raise RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, "the model failed; the server's log has the error")
        return request.rows

    def _predict_batches(self) -> None:
        while True:
            requests, start = self._next_batch(), time.perf_counter()
            texts = [text for request in requests for text in request.texts]
            try:
                rows = decide(self.predictor, self.settings, texts, abstain=self.abstain, probabilities=True)
            except Exception as error:  # the thread serves the requests to come
                print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
                rows = None
            with self._lock:
                self.texts += len(texts)
                self.batches += 1
                self.seconds += time.perf_counter() - start
            for request in requests:
                if rows is not None:
                    request.rows, rows = rows[: len(request.texts)], rows[len(request.texts) :]
                request.finished.set()

    def _next_batch(self) -> list[_Request]:
        """The requests that wait, at least one, with about `BATCH_TEXTS` texts."""
        requests = [self._waiting.get()]
        end = time.monotonic() + BATCH_SECONDS
        while sum(len(request.texts) for request in requests) < BATCH_TEXTS:
            try:
                requests.append(self._waiting.get(timeout=max(0.0, end - time.monotonic())))
            except queue.Empty:
                break
        return requests

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One line for a request that ended in an error, such as a client that has gone."""
        print(f"error: {client_address[0]}: {sys.exception()!r}", file=sys.stderr)

    def count_response(self, status: int) -> None:
        """Count a response for :meth:`metrics`."""
        with self._lock:
            self.responses[status] += 1

    def metrics(self) -> str:
        """The counters in the text format of Prometheus."""
        with self._lock:
            lines = [f'distillery_responses_total{{status="{code}"}} {n}' for code, n in sorted(self.responses.items())]
            lines += [f"distillery_texts_total {self.texts}", f"distillery_batches_total {self.batches}"]
            lines += [f"distillery_predict_seconds_total {self.seconds:.6f}"]
        return "\n".join(lines) + "\n"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = REQUEST_SECONDS
    server: StudentServer

    def log_message(self, format: str, *args: Any) -> None:
        """Log no request: /metrics counts them."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/health":
            self._reply(
                HTTPStatus.OK, {"student": self.server.settings.student, "engine": self.server.predictor.engine}
            )
        elif path == "/metrics":
            self._send(HTTPStatus.OK, self.server.metrics().encode(), "text/plain; version=0.0.4")
        elif path == "/predict":
            self._reply(HTTPStatus.METHOD_NOT_ALLOWED, {"error": f"/predict takes POST with {EXAMPLE}"})
        else:
            self._reply(HTTPStatus.NOT_FOUND, {"error": "unknown path; there are /predict, /health and /metrics"})

    def do_POST(self) -> None:
        try:
            if self.path.partition("?")[0] != "/predict":
                raise RequestError(HTTPStatus.NOT_FOUND, "unknown path; POST goes to /predict")
            predictions = self.server.predict(self._read_texts())
        except RequestError as error:
            self.close_connection = True  # its body may be unread
            self._reply(error.status, {"error": str(error)})
        else:
            self._reply(HTTPStatus.OK, {"predictions": predictions})

    def _read_texts(self) -> list[str]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, "the request needs a Content-Length")
        if int(length) > MAX_BODY:
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request may have {MAX_BODY:,} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise RequestError(HTTPStatus.BAD_REQUEST, f"the body is no JSON; send {EXAMPLE}") from None
        texts = body.get("texts") if isinstance(body, dict) else None
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise RequestError(HTTPStatus.BAD_REQUEST, f"`texts` must be a list of texts, at least one; send {EXAMPLE}")
        if not all(is_unicode(text) for text in texts):
            raise RequestError(HTTPStatus.BAD_REQUEST, "a text holds half of a surrogate pair, which is no character")
        if len(texts) > MAX_TEXTS:
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request may have {MAX_TEXTS} texts")
        return texts

    def _reply(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content, ensure_ascii=False).encode() + b"\n", "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.server.count_response(int(status))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def open_server(
    student: Path, host: str, port: int, *, engine: str = "auto", threads: int | None = None, abstain: bool = False
) -> StudentServer:
    """A server of `student` at `host` and `port`. Raises UserError for a bad folder, engine or address."""
    folder = model_folder(student)
    settings = read_settings(folder)
    check_usable(settings, abstain)
    predictor = open_predictor(folder, settings, engine, threads)
    try:
        return StudentServer((host, port), predictor, settings, abstain)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{host}:{port}: cannot be served: {reason}; --port and --host name another") from None


def run_server(student: Path, host: str, port: int, **options: Any) -> None:
    """Serve `student` until the process is interrupted or terminated."""
    with open_server(student, host, port, **options) as server:
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        address = f"http://{server.server_address[0]}:{server.server_address[1]}"
        engine = server.predictor.engine
        print(
            f"{server.settings.student} ({engine}): {address}/predict, /health, /metrics", file=sys.stderr, flush=True
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
