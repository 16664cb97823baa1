"""A real llama-server as a teacher: how near are its labels and tokens to the same GGUF loaded here?

    PYTHONPATH=src python benchmarks/served_teacher.py LLAMA_SERVER [--model MODEL.gguf] [--rows 12]

docs/api-teachers.md shows how to build `llama-server`. Without `--model` it gets Qwen2.5-Coder-0.5B-Instruct, whose
pieces are downloaded as the recipe qwen-gkd names them. It answers on this machine with one thread, for rows of the
finance corpus: one request a row gives the probabilities of the labels and the 20 likeliest tokens at each token of
its answer. The same file, loaded by this package (weights in bfloat16, products in float32), then scores the same
labels and the same tokens with the whole distribution. So the difference between the two computations, and what the 20
tokens leave out, are both measured. The student of the KL is the same model without the solved example in its prompt.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from distillery import losses  # noqa: E402
from distillery.config.load import validate_section  # noqa: E402
from distillery.config.schema import ApiConfig, ModelConfig  # noqa: E402
from distillery.data.readers import read_rows  # noqa: E402
from distillery.errors import UserError  # noqa: E402
from distillery.models.fetch import _convert_gguf  # noqa: E402
from distillery.models.label_model import LabelModel  # noqa: E402
from distillery.models.load import load_model, load_tokenizer  # noqa: E402
from distillery.models.pieces import joined_pieces  # noqa: E402
from distillery.models.token_strings import TokenStrings  # noqa: E402
from distillery.pipeline.recipe import load_recipe  # noqa: E402
from distillery.tasks.schema import load_task  # noqa: E402
from distillery.teachers.api.client import Endpoint  # noqa: E402
from distillery.teachers.api.teacher import ApiTeacher  # noqa: E402
from distillery.teachers.cache import AnswerStore  # noqa: E402
from distillery.training.served_teacher import MappedTokens, map_tokens  # noqa: E402
from loopback import free_port  # noqa: E402

FEW_SHOT, TOP, MAX_TOKENS = 1, 20, 4
TASK = load_task("finance-prompted", ROOT / "tasks")


@contextmanager
def llama_server(program: Path, model: Path) -> Iterator[str]:
    """Run `program` with `model` until the end of the block; gives its address."""
    port = free_port()
    command = [program, "-m", model, "--host", "127.0.0.1", "--port", str(port), "-t", "1", "-tb", "1", "-np", "1"]
    server = subprocess.Popen([*map(str, command), "-c", "4096"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:  # not there yet, or loading
                if server.poll() is not None:
                    raise UserError(f"{program} ended with code {server.returncode} before it answered") from None
                time.sleep(0.5)
        else:
            raise UserError(f"{program} did not answer")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(20)


def ask(url: str, scratch: Path, texts: list[str]) -> tuple[np.ndarray, list, float]:
    """Label probabilities, the tokens of the answers, and seconds, of the server at `url`."""
    settings = {"model": "gguf", "base_url": url, "labels": "logprobs", "tokens": "generated", "top_logprobs": TOP}
    settings |= {"max_tokens": MAX_TOKENS, "concurrency": 1, "timeout": 300.0, "max_unreadable": None}
    spec = validate_section(ApiConfig, settings, "benchmark")
    endpoint = Endpoint("served", spec, AnswerStore(scratch / "answers.sqlite"), log=lambda _: None)
    teacher, started = ApiTeacher(endpoint, TASK, FEW_SHOT), time.perf_counter()
    probabilities = teacher.predict_texts(texts)
    seconds = time.perf_counter() - started
    answers = endpoint.query(teacher.questions(texts))
    calls = sum(endpoint.store.outcomes(endpoint.servers[0].identity).values())
    print(f"calls of the server: {calls} for {len(texts)} rows")
    return probabilities, [answer.metadata["tokens"] for answer in answers], seconds


def open_gguf(file: Path, scratch: Path) -> LabelModel:
    """The model in the GGUF `file`, as `models.<name>.gguf` of params.yaml loads it."""
    (scratch / "model.gguf").symlink_to(file)
    folder = _convert_gguf(scratch / "model.gguf", scratch / "model")
    model, tokenizer = load_model(folder, "causal", dtype="float32").eval(), load_tokenizer(folder)
    return LabelModel(model, tokenizer, TASK, "causal", few_shot=FEW_SHOT, max_length=4096, batch_size=6)


def print_labels(served: np.ndarray, local: np.ndarray, labels: np.ndarray) -> None:
    """Compare the label probabilities of the server with those computed here; `labels` are indices of gold labels."""
    read = ~np.isnan(served).any(1)
    same = (served[read].argmax(1) == local[read].argmax(1)).mean()
    gap = np.abs(served[read] - local[read])
    print(f"label probabilities: {read.sum()} of {len(read)} rows read, {same:.1%} with the same likeliest label")
    print(f"  difference of probabilities: mean {gap.mean():.4f}, largest {gap.max():.4f}")
    accuracy = [(probabilities[read].argmax(1) == labels[read]).mean() for probabilities in (served, local)]
    print(f"  accuracy: {accuracy[0]:.1%} served, {accuracy[1]:.1%} here")


def score_here(model: LabelModel, texts: list[str], answers: list[MappedTokens]) -> tuple[np.ndarray, list, list]:
    """Label probabilities, and at the tokens of `answers` the log-probabilities with and without a solved example."""
    labels, teachers, students = [], [], []
    for text, answer in zip(texts, answers, strict=True):
        for few_shot, scores in ((FEW_SHOT, teachers), (0, students)):
            model.few_shot = few_shot
            with torch.no_grad():
                output = model.forward(model.encode([text]), [[(answer.ids, 0)]], label_space=few_shot > 0)
            scores.append(output.completion_logits.double().log_softmax(-1))
            if few_shot:
                labels.append(output.label_logits[0].softmax(-1).numpy())
    return np.stack(labels), teachers, students


def print_tokens(answers: list[MappedTokens], teachers: list, students: list) -> None:
    """Compare the served log-probabilities with the whole distribution at the same tokens."""
    gaps, tails, lost, same = [], [], 0.0, 0
    for answer, scores in zip(answers, teachers, strict=True):
        for whole, returned, share in zip(scores, answer.alternatives, answer.lost, strict=True):
            ids = list(returned)
            gaps.append((whole[ids].numpy(), np.array([returned[i] for i in ids])))
            tails.append((1 - sum(np.exp(p) for p in returned.values()), 1 - whole.exp().topk(TOP).values.sum().item()))
            lost, same = lost + share, same + (whole.argmax().item() == max(returned, key=returned.get))
    local, served = (np.concatenate([pair[i] for pair in gaps]) for i in (0, 1))
    print(f"tokens: {len(tails)} in {len(answers)} answers; likeliest token the same at {same / len(tails):.1%}")
    for bound in (0.01, 0.0001, 0.0):
        among = np.exp(served) >= bound
        gap, shares = np.abs(local - served)[among], np.abs(np.exp(local) - np.exp(served))[among]
        print(
            f"  difference of log-probabilities, tokens of {bound:g} and more ({among.sum()}): mean {gap.mean():.4f}, "
            f"largest {gap.max():.4f}; of probabilities: largest {shares.max():.4f}"
        )
    tail = np.array(tails)
    for name, column in (("served", tail[:, 0]), ("here", tail[:, 1])):
        print(f"  mass beyond the {TOP} tokens, {name}: mean {column.mean():.5f}, largest {column.max():.5f}")
    print(f"  mass on tokens that the student's vocabulary lacks: {lost:.6f} in all")
    student, teacher = torch.cat(students), torch.cat(teachers)
    whole = losses.kl(student, teacher)
    print(f"KL to the whole distribution, mean over tokens: {whole.mean().item():.5f} nats")
    for k in (1, 5, 10, TOP):
        less = whole - losses.kl_top_k(student, *losses.to_top_k(teacher, k))
        rest = 1 - teacher.exp().topk(k).values.sum(-1)
        print(
            f"  top {k} and the rest as one: {less.mean().item():.5f} nats less, at most {less.max().item():.5f} less "
            f"at a token; mass of the rest {rest.mean().item():.5f}"
        )


def pick_rows(each: int) -> tuple[list[str], np.ndarray]:
    """The texts and the gold labels (indices) of `each` rows of every label."""
    rows, picked = read_rows("data/corpora/finance.jsonl", ROOT).rows, []
    order = np.random.default_rng(0).permutation(len(rows))
    for name in TASK.names:
        picked += [rows[i] for i in order if rows[i]["label"] == name][:each]
    return [row["text"] for row in picked], np.array([TASK.names.index(row["label"]) for row in picked])


def download_gguf(scratch: Path) -> AbstractContextManager[Path]:
    """The GGUF file of the 0.5B for a block; it is gone afterwards."""
    spec = load_recipe(ROOT, "qwen-gkd", "small")["models"]["qwen-0.5b"]
    return joined_pieces("qwen-0.5b", validate_section(ModelConfig, spec, "recipe"), scratch / "qwen-0.5b")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", metavar="LLAMA_SERVER", type=Path)
    parser.add_argument("--model", type=Path, help="a GGUF file; by default that of Qwen2.5-Coder-0.5B-Instruct")
    parser.add_argument("--rows", type=int, default=12, help="rows of each label")
    settings = parser.parse_args(arguments)
    for file in filter(None, (settings.program, settings.model)):
        if not file.exists():
            parser.error(f"{file}: no such file")
    texts, labels = pick_rows(settings.rows)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with nullcontext(settings.model) if settings.model else download_gguf(scratch) as file:
            with llama_server(settings.program.resolve(), file.resolve()) as url:
                served, answers, seconds = ask(url, scratch, texts)
            print(f"llama-server, 1 thread: {len(texts) / seconds:.2f} rows/s")
            model = open_gguf(file.resolve(), scratch)
        mapped = [map_tokens(answer, TokenStrings(model.tokenizer)) for answer in answers]
        local, *scores = score_here(model, texts, mapped)
        print_labels(served, local, labels)
        print_tokens(mapped, *scores)


if __name__ == "__main__":
    main()
