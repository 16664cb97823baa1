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


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # with the usual 5, a client of 12 connections waits for a second when the machine is busy
    daemon_threads = True


class Proxy:
    """Stands before the server on `port`, or the function that answers, and breaks a share of the calls, the same ones
    for the same `seed`.

    key: the only API key that it accepts, if any. `calls`: number of calls by outcome. `delivered`: number of whole
    answers by request. `requests`: the bodies of all. `/v1/messages` (Anthropic's form) is translated for the server
    and back. alter: what the client gets instead of the server's answer: (request, status, answer) -> (status,
    answer). Keys of `NOT_SERVED` do not reach the server.
    """

    def __init__(
        self,
        port: int | Callable[[str, dict[str, Any]], tuple[int, Any]],
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

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # tests kill clients
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
        status, answer = self._forward(request.path, to_openai(body) if anthropic else body)
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
        if callable(self.upstream):
            return self.upstream(path, json.loads(body))
        path, body = "/v1/chat/completions", without_unserved_keys(body)
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


class TokenServer:
    """Answers requests as llama-server, vLLM and OpenAI do, with log-probabilities of the causal model in `folder`.

    tokens: how it writes a token: `bytes` (llama.cpp), `text` (vLLM: lossy where a token is no whole character), `ids`
    (vLLM with `return_tokens_as_token_ids`) or `names` (as in the tokenizer's file). with_end: whether the token that
    ends an answer is among its tokens (not at OpenAI).
    """

    def __init__(self, folder: Path, tokens: str = "bytes", with_end: bool = True):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from distillery.models.token_strings import TokenStrings

        self.tokens, self.with_end, self.lock = tokens, with_end, threading.Lock()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.written = {token_id: list(data) for data, token_id in TokenStrings(self.tokenizer).ids.items()}

    def __call__(self, path: str, request: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            return 200, self._chat(request) if path.endswith("/chat/completions") else self._complete(request)

    def logprobs(self, ids: list[int]) -> Any:
        """[tokens, vocabulary]: of the token after each of `ids`."""
        import torch

        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def _chat(self, request: dict[str, Any]) -> dict[str, Any]:
        prompt = self.tokenizer.apply_chat_template(
            request["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        ids, entries, finish = list(prompt), [], "length"
        while len(ids) - len(prompt) < request["max_tokens"] and finish == "length":
            scores = self.logprobs(ids)[-1]
            ids.append(int(scores.argmax()))
            finish = "stop" if ids[-1] == self.tokenizer.eos_token_id else finish
            if finish == "length" or self.with_end:
                best = scores.topk(request.get("top_logprobs", 1))
                others = [self._entry(int(i), float(p)) for p, i in zip(*best, strict=True)]
                entries.append(self._entry(ids[-1], float(scores[ids[-1]])) | {"top_logprobs": others})
        answer = ids[len(prompt) : len(ids) - (finish == "stop")]
        message = {"role": "assistant", "content": self.tokenizer.decode(answer)}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        if request.get("logprobs"):
            choice["logprobs"] = {"content": entries}
        return self._body("chat.completion", choice, len(prompt), len(ids) - len(prompt))

    def _complete(self, request: dict[str, Any]) -> dict[str, Any]:
        ids, k = request["prompt"], request.get("prompt_logprobs") or request["logprobs"]
        scores = self.logprobs(ids)
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length"}
        steps: list[dict[int, float] | None] = [None]
        best, own = scores.topk(k), scores[range(len(ids) - 1), ids[1:]].tolist()
        for token, logprob, *others in zip(ids[1:], own, best.indices.tolist(), best.values.tolist(), strict=False):
            steps.append({token: logprob} | dict(zip(*others, strict=True)))
        if "prompt_logprobs" in request:
            choice["prompt_logprobs"] = [
                step and {i: {"logprob": p, "decoded_token": self.tokenizer.decode([i])} for i, p in step.items()}
                for step in steps
            ]
        else:
            names = [self._entry(i, 0)["token"] for i in [*ids, int(scores[-1].argmax())]]
            own = [step and step[i] for i, step in zip(ids, steps, strict=True)]
            tops = [step and {self._entry(i, 0)["token"]: p for i, p in step.items()} for step in steps]
            choice["logprobs"] = {"tokens": names, "token_logprobs": [*own, -1.0], "top_logprobs": [*tops, {}]}
        return self._body("text_completion", choice, len(ids), 1)

    def _body(self, kind: str, choice: dict[str, Any], prompt: int, completion: int) -> dict[str, Any]:
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return {"id": "1", "object": kind, "created": 0, "model": "m", "choices": [choice], "usage": usage}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, data = self.tokenizer.decode([token_id]), None
        if self.tokens == "bytes":
            data = self.written[token_id]
        elif self.tokens == "ids":
            text = f"token_id:{token_id}"
        elif self.tokens == "names":
            text = self.tokenizer.convert_ids_to_tokens(token_id)
        return {"token": text, "bytes": data, "logprob": logprob}


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
