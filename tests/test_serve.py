"""`distillery serve`: a real server on this machine, many clients at once, and requests that cannot be answered."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import tiny
from deployed import TASK, rows, softened, write_student
from distillery.deploy import serve
from distillery.deploy.predictors import open_predictor
from distillery.deploy.serve import MAX_BODY, MAX_TEXTS, open_server
from distillery.errors import UserError


@pytest.fixture(scope="module")
def folder(tiny_models, tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "model"
    write_student(tiny_models / "tiny-bert", path)
    return path


@pytest.fixture(scope="module")
def server(folder):
    """A server that answers until the tests of this module have ended."""
    with open_server(folder, "127.0.0.1", 0, threads=1) as opened:
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        yield opened
        opened.shutdown()


def send(server, method: str, path: str, body=None, **headers) -> tuple[int, str]:
    """The status and text of a response; a body that is no text goes as JSON."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    content = body if isinstance(body, str | bytes | None) else json.dumps(body)
    connection.request(method, path, content, headers)
    response = connection.getresponse()
    status, text = response.status, response.read().decode()
    connection.close()
    return status, text


def counter(server, name: str) -> float:
    """The value of a counter of /metrics."""
    match = re.search(rf"^{re.escape(name)} (\S+)$", send(server, "GET", "/metrics")[1], flags=re.M)
    return float(match[1]) if match else 0.0


def test_requests_that_come_together_are_predicted_together_and_each_gets_its_own(folder, server, monkeypatch):
    monkeypatch.setattr(serve, "BATCH_SECONDS", 0.2)
    texts = rows(41)["text"].tolist()[:40]
    before = counter(server, "distillery_batches_total"), counter(server, "distillery_texts_total")
    with ThreadPoolExecutor(20) as clients:
        parts = [texts[i : i + 2] for i in range(0, 40, 2)]
        replies = list(clients.map(lambda part: send(server, "POST", "/predict", {"texts": part}), parts))
    assert {status for status, _ in replies} == {200}
    given = [entry for _, text in replies for entry in json.loads(text)["predictions"]]
    settings = server.settings
    alone = open_predictor(folder, settings, "torch", 1).predict([" ".join(text.split()) for text in texts])
    p = np.array([[entry[f"p_{name}"] for name in TASK.names] for entry in given])
    assert np.abs(p - softened(alone, settings.temperature)).max() < 2e-6
    assert [entry["prediction"] for entry in given] == [TASK.names[i] for i in alone.argmax(1)]
    assert counter(server, "distillery_texts_total") - before[1] == 40
    assert counter(server, "distillery_batches_total") - before[0] < 20  # fewer than requests
    assert counter(server, 'distillery_responses_total{status="200"}') >= 20


def test_health_names_the_student(server):
    status, text = send(server, "GET", "/health")
    assert status == 200 and json.loads(text) == {"student": "s", "engine": "torch"}


BAD = {
    "no JSON": ("POST", "/predict", "{", 400, "the body is no JSON; send"),
    "no text": ("POST", "/predict", b"\xff", 400, "the body is no JSON; send"),
    "a list": ("POST", "/predict", ["a"], 400, "`texts` must be a list of texts"),
    "one text": ("POST", "/predict", {"texts": "a"}, 400, "`texts` must be a list of texts"),
    "a number": ("POST", "/predict", {"texts": ["a", 1]}, 400, "`texts` must be a list of texts"),
    "none": ("POST", "/predict", {"texts": []}, 400, "at least one"),
    "surrogate": ("POST", "/predict", '{"texts": ["\\ud800"]}', 400, "half of a surrogate pair"),
    "deep": ("POST", "/predict", "[" * 100_000, 400, "the body is no JSON"),
    "many": ("POST", "/predict", {"texts": ["a"] * (MAX_TEXTS + 1)}, 413, f"{MAX_TEXTS} texts"),
    "another path": ("POST", "/", {"texts": ["a"]}, 404, "POST goes to /predict"),
    "unknown path": ("GET", "/", None, 404, "there are /predict, /health and /metrics"),
    "GET": ("GET", "/predict", None, 405, "/predict takes POST"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_gets_one_line_and_the_server_stays(server, case):
    method, path, body, status, line = BAD[case]
    given, text = send(server, method, path, body)
    assert given == status and line in json.loads(text)["error"] and "\n" not in json.loads(text)["error"]
    assert send(server, "POST", "/predict", {"texts": ["Profit rose."]})[0] == 200


@pytest.mark.parametrize("length, status", [(str(MAX_BODY + 1), 413), ("-1", 411), ("x", 411), ("²", 411)])
def test_a_bad_length_is_answered_before_the_body_is_read(server, length, status):
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Length", length)
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == status and response.getheader("Connection") == "close"
    connection.close()


def test_a_model_that_fails_answers_500_and_serves_on(server, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(server.predictor, "predict", lambda texts: 1 / 0)
        status, text = send(server, "POST", "/predict", {"texts": ["a"]})
        assert status == 500 and "the model failed" in json.loads(text)["error"]
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert send(server, "POST", "/predict", {"texts": ["a"]})[0] == 200


def test_a_client_that_has_gone_is_one_line(server, capsys):
    host, port = server.server_address
    with socket.create_connection((host, port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
        client.sendall(b"POST /predict HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.2)
    deadline = time.monotonic() + 30
    while not (printed := capsys.readouterr().err) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert printed.startswith("error: 127.0.0.1: ConnectionReset") and printed.count("\n") == 1
    assert send(server, "GET", "/health")[0] == 200


def test_a_taken_port_is_one_line(folder, server):
    with pytest.raises(UserError, match="cannot be served: .*; --port and --host name another"):
        open_server(folder, *server.server_address)


def test_the_command_serves_until_it_is_terminated(folder):
    command = [sys.executable, "-m", "distillery", "serve", str(folder), "--port", "0", "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT / "src")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/predict", line)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def test_the_dockerfile_names_files_that_exist_and_pins_of_the_lock():
    lines = (tiny.ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in instructions} <= known and instructions[0][0] in ("ARG", "FROM")
    copied = [part for name, rest in instructions if name == "COPY" for part in rest.split()[:-1] if "$" not in part]
    assert copied and [path for path in copied if not (tiny.ROOT / path).exists()] == []
    commands = [json.loads(rest) for name, rest in instructions if name in ("ENTRYPOINT", "CMD")]
    assert "serve" in [part for command in commands for part in command]
    lock = (tiny.ROOT / "requirements.lock").read_text(encoding="utf-8")
    packages = re.search(r"pip install [^#]*?-r pins.txt", (tiny.ROOT / "Dockerfile").read_text().replace("\\\n", " "))
    names = re.search(r"for name in ([^;]+);", (tiny.ROOT / "Dockerfile").read_text().replace("\\\n", " "))[1].split()
    assert packages
    assert [name for name in names if not re.search(rf"^{re.escape(name)}==", lock, flags=re.M)] == []
    assert Path(tiny.ROOT / ".dockerignore").exists()
