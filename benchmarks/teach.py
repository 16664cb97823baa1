"""Asking a language model for labels: rows a second and memory beside what one would use instead.

    PYTHONPATH=src python benchmarks/teach.py [rows, 40 by default] [rounds, 2 by default]

The same test rows of the finance corpus, the same prompt with 8 solved examples (gold rows) and the same SmolLM2 go
through (a) a `transformers` text-generation pipeline, which writes the label, (b) a plain forward pass over whole
prompts, padded to batches, with the output head at the last position only, (c) `LabelModel.predict`. The three take
turns in one process; each one's fastest round counts. Labels are compared in bfloat16 and, in float32, those of (c)
with those of (b). Memory is what the process holds at most while the variant runs, beyond what it held before.
The last two lines say how many times more rows a second (c) does than (a) and than (b).
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable

import pandas as pd
import psutil
import torch
from transformers import pipeline

from distillery.config.load import load_params
from distillery.data.prepare import prepare_source
from distillery.files import repository_root
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.models.packed.token_tree import common_prefix
from distillery.tasks.prompts import chat_turns, render_prompt
from distillery.tasks.schema import FewShotExample, Task, load_task

SHOTS, BATCH = 8, 16


def questions(rows: int) -> tuple[Task, list[str]]:
    """The finance task with `SHOTS` gold rows as its solved examples, labels taking turns; and `rows` test texts."""
    params, root = load_params(), repository_root()
    source = params.data["finance"]
    task = load_task(source.task, root / "tasks")
    prepared = prepare_source("finance", source, task, root)
    gold, test = prepared.rows[prepared.split == "train"], prepared.rows[prepared.split == "test"]
    turn = gold.groupby("label").cumcount() * len(task.names) + gold["label"].map(task.names.index)
    shots = gold.loc[turn.sort_values().index[:SHOTS], ["text", "label"]].to_dict("records")
    return task.model_copy(update={"few_shot": [FewShotExample(**shot) for shot in shots]}), test["text"].tolist()[
        :rows
    ]


def by_pipeline(model: LabelModel, texts: list[str]) -> list[str]:
    write = pipeline("text-generation", model=model.model, tokenizer=model.tokenizer, batch_size=BATCH)
    length = max(map(len, model.label_token_ids))
    chats = [chat_turns(model.task, text, SHOTS) for text in texts]
    generated = write(chats, max_new_tokens=length, do_sample=False, return_full_text=False)
    return [answers[0]["generated_text"].strip() for answers in generated]


@torch.inference_mode()
def by_forward(model: LabelModel, texts: list[str]) -> list[str]:
    firsts = [label[0] for label in model.label_token_ids]
    assert all(len(label) == 1 for label in model.label_token_ids), "one forward pass scores labels of one token only"
    predictions = []
    for start in range(0, len(texts), BATCH):
        chats = [chat_turns(model.task, text, SHOTS) for text in texts[start : start + BATCH]]
        prompts = [render_prompt(chat, model.tokenizer) for chat in chats]
        batch = model.tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False)
        logits = model.model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1, firsts]
        predictions += [model.task.names[i] for i in logits.argmax(-1)]
    return predictions


def by_us(model: LabelModel, texts: list[str]) -> list[str]:
    return [model.task.names[i] for i in model.predict(texts).argmax(-1)]


def measured(ask: Callable, *arguments: object) -> tuple[list[str], float, float]:
    """What `ask` answers, the seconds it took and how many MB it held at most."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # memory that the variant before gave back must not hide this one's
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    answers = ask(*arguments)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return answers, seconds, (peak - before) / 1e6


def opened(dtype: str, task: Task) -> LabelModel:
    folder = fetch_model("smollm2", load_params().models["smollm2"])
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"  # as generation wants it
    model = load_model(folder, "causal", dtype=dtype).eval()
    return LabelModel(model, tokenizer, task, "causal", few_shot=SHOTS, max_length=4096, dtype=dtype)


def main(rows: int = 40, rounds: int = 2) -> None:
    task, texts = questions(rows)
    ways = {"a: pipeline": by_pipeline, "b: whole prompts": by_forward, "c: distillery": by_us}
    model = opened("bfloat16", task)
    lengths = [len(ids) for ids in model.encode(texts)]
    shared = common_prefix(model.encode(texts))
    print(
        f"{len(texts)} rows, {SHOTS} solved examples, {sum(lengths) / len(lengths):.0f} tokens a prompt of which "
        f"{shared} are the same in all, {torch.get_num_threads()} threads, torch {torch.__version__}, bfloat16",
        flush=True,
    )
    for ask in ways.values():
        ask(model, texts[:2])  # kernels and buffers are made at the first call
    labels, seconds, memory = {}, {name: [] for name in ways}, {name: [] for name in ways}
    for _ in range(rounds):
        for name, ask in ways.items():
            labels[name], took, held = measured(ask, model, texts)
            seconds[name].append(took)
            memory[name].append(held)
    table = pd.DataFrame(
        {
            "rows/s": {name: len(texts) / min(seconds[name]) for name in ways},
            "slowest round": {name: len(texts) / max(seconds[name]) for name in ways},
            "peak MB": {name: max(memory[name]) for name in ways},
            "no label": {name: sum(label not in task.names for label in labels[name]) for name in ways},
        }
    )
    print(table.round(1).to_string())

    def differ(one: str, other: str) -> int:
        return sum(a != b for a, b in zip(labels[one], labels[other], strict=True))

    a, b, c = ways
    print(f"labels that differ, bfloat16: c from a {differ(c, a)}, c from b {differ(c, b)}, b from a {differ(b, a)}")
    model = opened("float32", task)
    labels = {name: ways[name](model, texts) for name in (b, c)}
    print(f"labels that differ, float32: c from b {differ(c, b)}")
    print(f"ratio_pipeline: {min(seconds[a]) / min(seconds[c]):.2f}")
    print(f"ratio_forward: {min(seconds[b]) / min(seconds[c]):.2f}")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
