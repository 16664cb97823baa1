"""Labels from 1, 2, 4 and 8 endpoints of one model: rows a second, and what is lost or paid twice when some die.

    PYTHONPATH=src python benchmarks/labelling_at_scale.py [rows, 320 by default] [seconds of an answer, 1]

Each endpoint is a process of its own on this machine that speaks the protocol of OpenAI: it answers four requests at a
time, each after the same time, with a label that the text decides, and keeps a ledger of the requests that it began and
of the answers that it sent whole. So the endpoints compute nothing, and the figures are those of the client: how many
requests it keeps going, and how many answers it can put on the disk. First the same rows are
labelled by more and more endpoints, each time into a new store. Then by eight, of which two are killed (SIGKILL) on the
way. At last by eight, of which two are killed, and so is the client on its way, which then starts again.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import loopback  # noqa: E402

WORKERS, AT_ONCE, KILLED = (1, 2, 4, 8), 4, 2
LABELS = ("positive", "neutral", "negative")


# ------------------------------------------------------------------------------- an endpoint, in a process of its own


class LedgerServer(loopback.Proxy):
    """An endpoint that writes a line to `ledger` for each request that it begins and each answer that it has sent."""

    def __init__(self, seconds: float, ledger: Path):
        super().__init__(self.answer)
        self.seconds, self.ledger, self.slots = seconds, ledger, threading.Semaphore(AT_ONCE)

    def note(self, event: str, key: str) -> None:
        with self.lock, self.ledger.open("a") as file:
            file.write(f"{event} {key}\n")

    def answer(self, path: str, request: dict[str, Any]) -> tuple[int, Any]:
        text = request["messages"][-1]["content"]
        key = hashlib.sha256(text.encode()).hexdigest()
        self.note("begun", key)
        with self.slots:
            time.sleep(self.seconds)
        message = {"role": "assistant", "content": LABELS[int(key, 16) % len(LABELS)]}
        usage = {"prompt_tokens": len(text) // 4, "completion_tokens": 1, "total_tokens": len(text) // 4 + 1}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return 200, {
            "id": key,
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }

    def _send(self, request: Any, status: int, body: Any, headers: dict | None = None) -> None:
        super()._send(request, status, body, headers)
        if status == 200 and not request.close_connection:
            self.note("sent", body["id"])


def serve(seconds: str, ledger: str) -> None:
    """Serve until the process is killed; the first line of the output is the address."""
    with LedgerServer(float(seconds), Path(ledger)) as server:
        print(server.url, flush=True)
        signal.pause()


@contextmanager
def servers(count: int, seconds: float, folder: Path):
    """`count` endpoints as (process, address, ledger)."""
    with ExitStack() as stack:
        running = []
        for i in range(count):
            ledger = folder / f"server-{i}.txt"
            ledger.touch()
            command = [sys.executable, __file__, "--serve", str(seconds), str(ledger)]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            running.append((process, process.stdout.readline().strip(), ledger))
        yield running


# ------------------------------------------------------------------------------- the client


def texts(rows: int) -> list[str]:
    return [f"Row {i}: the profit of the quarter was EUR {i % 97} mn." for i in range(rows)]


def label(addresses: list[str], store: Path, rows: int) -> tuple[float, list[str]]:
    """Label all rows; the seconds that it took, and the lines that the teacher printed."""
    from distillery.config.load import validate_section
    from distillery.config.schema import ApiConfig
    from distillery.tasks.schema import load_task
    from distillery.teachers.api.client import Endpoint
    from distillery.teachers.api.teacher import ApiTeacher
    from distillery.teachers.cache import AnswerStore

    settings = {"model": "m", "endpoints": [{"base_url": url} for url in addresses], "concurrency": AT_ONCE}
    spec = validate_section(ApiConfig, settings | {"max_attempts": 3, "timeout": 60.0}, "benchmark")
    lines: list[str] = []
    endpoint = Endpoint("far", spec, AnswerStore(store), log=lines.append)
    teacher = ApiTeacher(endpoint, load_task("finance-sentiment", ROOT / "tasks"))
    started = time.perf_counter()
    p = teacher.predict_texts(texts(rows))
    seconds = time.perf_counter() - started
    questions = teacher.questions(texts(rows))
    expected = [int(hashlib.sha256(q.prompt[-1]["content"].encode()).hexdigest(), 16) % len(LABELS) for q in questions]
    names = [teacher.task.names[i] for i in p.argmax(-1)]
    if names != [LABELS[i] for i in expected]:
        raise SystemExit("a row has a wrong label")
    return seconds, lines


def label_alone(store: str, rows: str, *addresses: str) -> None:
    """What the process that is killed does."""
    label(list(addresses), Path(store), int(rows))


def events(ledgers: list[Path], event: str) -> Counter[str]:
    return Counter(
        line.split()[1] for path in ledgers for line in path.read_text().splitlines() if line.startswith(event)
    )


def kill_servers(running: list[Any], rows: int) -> threading.Thread:
    """Kill the first `KILLED` endpoints, one after a quarter and one after half of the answers."""

    def kill() -> None:
        for i in range(KILLED):
            while sum(events([ledger for _, _, ledger in running], "sent").values()) < rows * (i + 1) / 4:
                time.sleep(0.02)
            running[i][0].send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def show_ledgers(running: list[Any], rows: int) -> None:
    ledgers = [ledger for _, _, ledger in running]
    print("endpoint  begun  sent  begun and never sent")
    for i, ledger in enumerate(ledgers):
        begun, sent = events([ledger], "begun"), events([ledger], "sent")
        killed = "  killed" if i < KILLED else ""
        print(f"{i:8d}  {begun.total():5d}  {sent.total():4d}  {(begun - sent).total():20d}{killed}")
    sent = events(ledgers, "sent")
    twice = sum(count > 1 for count in sent.values())
    print(f"{rows} rows, {len(sent)} of them answered whole by an endpoint; {twice} answered more than once")


def main(rows: int = 320, seconds: float = 1.0) -> None:
    os.environ |= {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    print(f"{rows} rows; an endpoint answers {AT_ONCE} at a time, each after {seconds:g} s")
    print("\nendpoints  seconds  rows/s  times one  of the most")
    first = None
    for count in WORKERS:
        with tempfile.TemporaryDirectory() as scratch, servers(count, seconds, Path(scratch)) as running:
            taken, _ = label([url for _, url, _ in running], Path(scratch) / "answers.sqlite", rows)
            sent = events([ledger for _, _, ledger in running], "sent")
        if len(sent) != rows or set(sent.values()) != {1}:
            raise SystemExit(f"{len(sent)} rows were answered, {sent.total()} times")
        first = first or taken
        share = rows / taken / (count * AT_ONCE / seconds)
        print(f"{count:9d}  {taken:7.1f}  {rows / taken:6.1f}  {first / taken:9.2f}  {share:11.0%}", flush=True)
    with tempfile.TemporaryDirectory() as scratch, servers(WORKERS[-1], 0.0, Path(scratch)) as running:
        taken, _ = label([url for _, url, _ in running], Path(scratch) / "answers.sqlite", rows)
        print(
            f"{WORKERS[-1]} endpoints that answer at once: {rows / taken:.0f} rows/s, which is the client's own limit"
        )
    print(f"\n## {KILLED} of {WORKERS[-1]} endpoints killed on the way")
    with tempfile.TemporaryDirectory() as scratch, servers(WORKERS[-1], seconds, Path(scratch)) as running:
        killer = kill_servers(running, rows)
        taken, lines = label([url for _, url, _ in running], Path(scratch) / "answers.sqlite", rows)
        killer.join()
        show_ledgers(running, rows)
        print(f"{taken:.1f} s; what the teacher printed of it:")
        print("\n".join(line for line in lines if "set aside" in line))
    print(f"\n## {KILLED} of {WORKERS[-1]} endpoints killed, and the client, too")
    with tempfile.TemporaryDirectory() as scratch, servers(WORKERS[-1], seconds, Path(scratch)) as running:
        ledgers, store = [ledger for _, _, ledger in running], Path(scratch) / "answers.sqlite"
        killer = kill_servers(running, rows)
        command = [sys.executable, __file__, "--label", str(store), str(rows), *(url for _, url, _ in running)]
        process = subprocess.Popen(command)
        while process.poll() is None and events(ledgers, "sent").total() < rows * 2 / 3:
            time.sleep(0.02)
        process.kill()
        process.wait()
        before = events(ledgers, "begun").total()
        label([url for _, url, _ in running], store, rows)
        killer.join()
        show_ledgers(running, rows)
        after = events(ledgers, "begun").total() - before
        on_way = AT_ONCE * WORKERS[-1]
        print(f"killed after {before} requests, at most {on_way} of them on their way; {after} in the second run")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    elif sys.argv[1:2] == ["--label"]:
        label_alone(*sys.argv[2:])
    else:
        main(*(kind(argument) for kind, argument in zip((int, float), sys.argv[1:], strict=False)))
