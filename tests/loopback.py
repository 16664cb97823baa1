"""A real endpoint on this machine: `transformers serve` with a tiny model, and a proxy that breaks its answers."""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("429", "500", "reset", "hang", "truncated", "empty")
HANG = 30.0  # seconds; longer than any client here waits


# Keys of a request that `transformers serve` refuses.
NOT_SERVED = {"logprobs", "top_logprobs", "response_format", "reasoning_effort"}
# A chat template like Gemma's, without a system role, and like Qwen's, with reasoning that can be turned off.
STRICT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is not defined or enable_thinking %}positive negative positive negative{% endif %}"
)


def build_speaker(folder: Path, words: list[str], chat_template: str | None = None) -> Path:
    """A tiny chat model that mostly answers one of `words`, as a folder for `transformers serve`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import tiny

    tokenizer = tiny.word_tokenizer(tiny.texts(), "llama")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            **shape,
            vocab_size=len(tokenizer),
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            initializer_range=0.5,
        )
        for name, value in ids.items():
            setattr(config, f"{name}_token_id", value)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(words)] *= 12
    model.save_pretrained(folder)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(model: Path) -> Iterator[int]:
    """Run `transformers serve` with `model` until the end of the block; gives its port."""
    port = free_port()
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", str(model), "--port", str(port), "--host", "127.0.0.1"]
    server = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError(server.stderr.read().decode()[-2000:])
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                time.sleep(0.2)
        threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would stop it
        yield port
    finally:
        server.terminate()
        server.wait(10)


class Proxy:
    """Stands before the server on `port` and breaks a share of the calls, the same ones for the same `seed`.

    key: the only API key that it accepts, if any. `calls`: number of calls by outcome. `delivered`: number of whole
    answers by request. `requests`: the bodies of all. `/v1/messages` (Anthropic's form) is translated for the server
    and back. alter: what the client gets instead of the server's answer: (request, status, answer) -> (status,
    answer). Keys of `NOT_SERVED` do not reach the server.
    """

    def __init__(
        self,
        port: int,
        *,
        share: float = 0.0,
        faults=FAULTS,
        seed: int = 0,
        key: str = "",
        alter: Callable[[dict[str, Any], int, Any], tuple[int, Any]] = lambda _, status, answer: (status, answer),
    ):
        self.alter, self.requests = alter, []
        self.upstream, self.share, self.faults, self.key = port, share, faults, key
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.calls: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.times: list[float] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                proxy.handle(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # tests kill clients
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.closing = threading.Event()

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        with self.lock:
            fault = self.random.choice(self.faults) if self.random.random() < self.share else ""
            self.times.append(time.monotonic())
        sent_key = request.headers.get("x-api-key") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.key and sent_key != self.key:
            self._count("invalid key")
            return self._send(request, 401, {"error": {"message": f"Incorrect API key provided: {sent_key}"}})
        if fault == "429":
            self._count(fault)
            return self._send(request, 429, {"error": {"message": "slow down"}}, {"Retry-After": "0.2"})
        if fault == "500":
            self._count(fault)
            return self._send(request, 500, {"error": {"message": "broken"}})
        if fault == "reset":
            self._count(fault)
            linger = struct.pack("ii", 1, 0)  # close with a reset
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            request.close_connection = True
            return request.connection.close()
        if fault == "hang":
            self._count(fault)
            request.close_connection = True
            self.closing.wait(HANG)
            return None
        anthropic = request.path.endswith("/messages")
        with self.lock:
            self.requests.append(json.loads(body))
        status, answer = self._forward(
            "/v1/chat/completions", to_openai(body) if anthropic else without_unserved_keys(body)
        )
        if status == 200 and anthropic:
            answer = to_anthropic(answer)
        status, answer = self.alter(json.loads(body), status, answer)
        if status != 200:
            self._count(f"server returned {status}")
            return self._send(request, status, answer)
        if fault == "empty":
            self._count(fault)
            if anthropic:
                answer["content"] = []
            else:
                answer["choices"][0]["message"]["content"] = ""
            return self._send(request, 200, answer)
        if fault == "truncated":
            self._count(fault)
            text = json.dumps(answer).encode()
            return self._send(request, 200, text[: len(text) // 2])
        self._count("whole")
        with self.lock:
            self.delivered[hashlib.sha256(body).hexdigest()] += 1
        return self._send(request, 200, answer)

    def _count(self, outcome: str) -> None:
        with self.lock:
            self.calls[outcome] += 1

    def _forward(self, path: str, body: bytes) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=120)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, {"error": {"message": text.decode(errors="replace")}}

    def _send(self, request: BaseHTTPRequestHandler, status: int, body: Any, headers: dict | None = None) -> None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            request.send_response(status)
            request.send_header("Content-Type", "application/json")
            request.send_header("Content-Length", str(len(text)))
            for name, value in (headers or {}).items():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(text)
        except OSError:  # the client was killed
            request.close_connection = True


def without_unserved_keys(body: bytes) -> bytes:
    """A request without the keys of `NOT_SERVED`."""
    return json.dumps({key: value for key, value in json.loads(body).items() if key not in NOT_SERVED}).encode()


def to_openai(body: bytes) -> bytes:
    """A request in Anthropic's form as one in OpenAI's."""
    request = json.loads(body)
    system = [{"role": "system", "content": request["system"]}] if request.get("system") else []
    settings = {key: request[key] for key in ("model", "max_tokens", "temperature") if key in request}
    return json.dumps(settings | {"messages": system + request["messages"]}).encode()


def to_anthropic(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer in OpenAI's form as one in Anthropic's."""
    choice, usage = answer["choices"][0], answer["usage"]
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": answer["model"],
        "content": [{"type": "text", "text": choice["message"]["content"]}],
        "stop_reason": "end_turn" if choice["finish_reason"] == "stop" else "max_tokens",
        "stop_sequence": None,
        "usage": {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]},
    }
