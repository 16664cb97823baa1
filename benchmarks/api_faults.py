"""Labels from an endpoint that keeps failing: what each fault cost, and that no answer was lost or requested twice.

    PYTHONPATH=src python benchmarks/api_faults.py [rows, 1000 by default] [share of faults, 0.3 by default]

`transformers serve` answers on this machine with a tiny model; a proxy before it breaks a share of the calls. Questions
about as many different texts go through it four times, each time into a new store: undisturbed, with faults, with
faults while the asking process is killed twice on the way, and with faults at an endpoint that refuses every tenth row
and thinks aloud before every second answer. Then one question with a wrong model name and one with a wrong key. At last
every file that was written is searched for the key.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import loopback  # noqa: E402
from distillery.config.load import validate_section  # noqa: E402
from distillery.config.schema import ApiConfig  # noqa: E402
from distillery.errors import UserError  # noqa: E402
from distillery.tasks.schema import Task, load_task  # noqa: E402
from distillery.teachers.api.client import Endpoint  # noqa: E402
from distillery.teachers.api.teacher import ApiTeacher  # noqa: E402
from distillery.teachers.cache import AnswerStore  # noqa: E402

REFUSED_EVERY, THINKING_EVERY = 10, 2
REFUSALS = [
    {"code": "content_filter", "message": "The response was filtered due to the content management policy."},
    {"code": "context_length_exceeded", "message": "This model's maximum context length is 2048 tokens."},
]
VARIABLE = "DISTILLERY_BENCHMARK_KEY"
MODEL = "speaker"


def questions(task: Task, rows: int) -> list[str]:
    import tiny

    texts = list(dict.fromkeys(tiny.texts()))
    return [texts[i % len(texts)] + (f" ({i // len(texts)})" if i >= len(texts) else "") for i in range(rows)]


def teacher(url: str, path: Path, model: str, variable: str = VARIABLE) -> ApiTeacher:
    settings = {"model": model, "base_url": url, "key": variable, "max_tokens": 1, "timeout": 3.0, "max_attempts": 30}
    spec = validate_section(ApiConfig, settings | {"concurrency": 12}, "benchmark")
    task = load_task("finance-sentiment", ROOT / "tasks")
    return ApiTeacher(Endpoint("benchmark", spec, AnswerStore(path)), task)


def answer_plainly(_: dict[str, Any], status: int, answer: Any) -> tuple[int, Any]:
    return status, answer


def refuse_and_think(request: dict[str, Any], status: int, answer: Any) -> tuple[int, Any]:
    """A refusal of every tenth row, reasoning before every second answer; the same rows in every run."""
    number = zlib.crc32(request["messages"][-1]["content"].encode())
    if number % REFUSED_EVERY == 0:
        return 400, {"error": REFUSALS[number // REFUSED_EVERY % len(REFUSALS)]}
    if number % THINKING_EVERY == 0 and status == 200:
        message = answer["choices"][0]["message"]
        message["content"] = f"<think>\nIs it positive?\n</think>\n\n{message['content']}"
    return status, answer


def ask(url: str, path: str, model: str, rows: str) -> None:
    """What the process that may be killed does."""
    endpoint = teacher(url, Path(path), model)
    messages: list[str] = []
    endpoint.endpoint.log = messages.append
    p = endpoint.predict_texts(questions(endpoint.task, int(rows)))
    labels, refusals = (~pd.isna(p[:, 0])).sum(), sum(" is refused " in message for message in messages)
    print(f"labels: {labels} of {len(p)}; {refusals} rows refused and named; the rest cannot be read as a label")


def run(url: str, path: Path, model: str, rows: int, kills: int, log: Path) -> int:
    """Ask in a process of its own, killed `kills` times on the way; returns how often it was killed."""
    command = [sys.executable, __file__, "--ask", url, str(path), model, str(rows)]
    for killed in range(kills + 1):
        with log.open("a") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        while killed < kills and process.poll() is None:
            time.sleep(0.05)
            if stored(path) >= rows * (killed + 1) // (kills + 1):
                process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            return killed
    raise SystemExit(log.read_text())


def stored(path: Path) -> int:
    import sqlite3

    if not path.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
            return connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
    except sqlite3.OperationalError:  # not made yet
        return 0


def refused(url: str, path: Path, model: str, variable: str) -> str:
    try:
        teacher(url, path, model, variable).predict_texts(["Profit rose."])
    except UserError as error:
        return str(error)
    raise SystemExit("was not refused")


def main(rows: int = 1000, share: float = 0.3) -> None:
    secret = "sk-" + secrets.token_hex(16)
    os.environ |= {VARIABLE: secret, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    task = load_task("finance-sentiment", ROOT / "tasks")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        speaker = loopback.build_speaker(folder / MODEL, task.words)
        with loopback.served(speaker) as port:
            runs = [("no faults", 0.0, 0, answer_plainly), ("faults", share, 0, answer_plainly)]
            runs += [
                ("faults, killed twice", share, 2, answer_plainly),
                ("faults and refusals", share, 0, refuse_and_think),
            ]
            for name, part, kills, alter in runs:
                path, log = folder / f"{name}.sqlite", folder / f"{name}.log"
                started = time.perf_counter()
                with loopback.Proxy(port, share=part, key=secret, alter=alter) as proxy:
                    killed = run(proxy.url, path, str(speaker), rows, kills, log)
                    before = sum(proxy.calls.values())
                    run(proxy.url, path, str(speaker), rows, 0, log)  # once more: it must ask nothing
                    again = sum(proxy.calls.values()) - before
                store = AnswerStore(path)
                with store._connection() as connection:
                    (noted,) = connection.execute("SELECT endpoint FROM calls LIMIT 1").fetchone()
                    (twice,) = connection.execute(
                        "SELECT COUNT(*) FROM calls a JOIN calls b ON a.key = b.key AND a.id < b.id "
                        "WHERE a.outcome IN ('answered', 'row refused')"
                    ).fetchone()
                print(f"\n## {name}: {rows} rows, {part:.0%} of the calls broken, killed {killed} times")
                outcomes = pd.Series(store.outcomes(noted), name="calls").rename_axis("what the client saw")
                print(pd.Series(proxy.calls, name="calls").rename_axis("what the proxy did").sort_index().to_string())
                print(outcomes.to_string())
                lost = sum(n - 1 for n in proxy.delivered.values())
                print(
                    f"{stored(path)} answers stored, {sum(proxy.calls.values())} calls, {again} calls in a second run, "
                    f"{time.perf_counter() - started:.0f} s; {twice} calls for an answer that had been received"
                    + (f" ({lost} came when nobody waited any more: killed, or timed out)" if lost else "")
                )
                print(log.read_text().splitlines()[-1])
            with loopback.Proxy(port, key=secret) as proxy:
                print("\n## refused at once")
                print("wrong model name:", refused(proxy.url, folder / "wrong.sqlite", "no-such-model", VARIABLE))
                os.environ["WRONG"] = wrong = "sk-wrong-" + secrets.token_hex(8)
                print("wrong key:", refused(proxy.url, folder / "wrong.sqlite", str(speaker), "WRONG"))
                print(f"calls made: {sum(proxy.calls.values())}")
        files = [file for file in folder.rglob("*") if file.is_file()]
        leaking = [file for file in files if any(word.encode() in file.read_bytes() for word in (secret, wrong))]
        print(f"\n{len(files)} files written; the keys were found in {len(leaking)} of them")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ask"]:
        ask(*sys.argv[2:])
    else:
        main(*(kind(argument) for kind, argument in zip((int, float), sys.argv[1:], strict=False)))
