"""A small corpus whose rows have any number of labels, of words that decide them; an experiment on it."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = {  # of each label; a row holds one of them for each of its labels
    "price": [
        "costs too much",
        "the price rose again",
        "cheaper elsewhere",
        "a discount of 20 %",
        "the invoice is too high",
    ],
    "delivery": ["the parcel came late", "delivered in two days", "the courier lost it", "still not shipped"],
    "quality": ["it broke after a week", "solid and well made", "the paint comes off", "feels cheap and thin"],
    "service": ["nobody answers the phone", "support was friendly", "the chat closed on me", "a helpful call"],
}
SHARES = {"price": 0.4, "delivery": 0.35, "quality": 0.25, "service": 0.15}
FILLERS = ["Hello", "To whom it may concern", "By the way", "Honestly", "I ordered in May", "My second order", "Thanks"]
TASK = """kind: multilabel
labels:
  price: what it costs
  delivery: when and how it arrives
  quality: what the thing is like
  service: how people were treated
prompt: {instruction: "You read messages to a shop, and answer yes or no."}
"""


def corpus(rows: int, seed: int = 0) -> list[dict]:
    """Rows of a text and the list of its labels, some with none."""
    draw = random.Random(seed)
    records = []
    for i in range(rows):
        labels = [label for label, share in SHARES.items() if draw.random() < share]
        phrases = [draw.choice(WORDS[label]) for label in labels]
        draw.shuffle(phrases)
        text = ". ".join([draw.choice(FILLERS), *phrases, f"My number is {draw.randrange(10_000, 99_999)} {i}"])
        records.append({"id": f"m{i}", "text": text, "label": labels})
    return records


def write_corpus(folder: Path, rows: int, seed: int = 0) -> None:
    """Write `data/shop.jsonl` and `tasks/shop.yaml` below `folder`."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "tasks").mkdir(exist_ok=True)
    lines = [json.dumps(row) for row in corpus(rows, seed)]
    (folder / "data/shop.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tasks/shop.yaml").write_text(TASK, encoding="utf-8")
