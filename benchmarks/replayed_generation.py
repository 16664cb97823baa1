"""The operations of generated texts that a finished run has kept: their lengths decide, no token is computed again."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from operations import LinearCount

from distillery.models.packed.token_tree import pack_token_tree

SAMPLES = 24  # small batches that are generated at most until the count of large ones is known


def kept_texts(store: Path) -> dict[str, str]:
    """Conversation (JSON) -> the text that a finished run generated, of the file `store` of its answers."""
    if not store.exists():
        return {}
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT prompt, answer, model_identity FROM answers ORDER BY at").fetchall()
    return {prompt: answer for prompt, answer, identity in rows if "request" not in json.loads(identity)}


def conversation_key(turns: Any) -> str:
    """As the store of answers writes a conversation."""
    return json.dumps(turns, sort_keys=True, ensure_ascii=False)


def generation_numbers(
    prompts: Sequence[Sequence[int]], lengths: Sequence[int], prefix_kv: Any, max_new_tokens: int
) -> list[int]:
    """The numbers whose linear function the operations of a batch are; see :class:`operations.LinearCount`.

    Of the prompts: rows, tokens, pairs of own tokens, pairs with the prefix. Of the steps after them: tokens, pairs
    with own tokens (whose number is rounded up), pairs with the prefix. lengths: generated tokens of each row.
    """
    tree = pack_token_tree(prompts, [[[0]]] * len(prompts), prefix_kv)
    (rows, width), prefix = tree.own_index.shape, tree.prefix_length
    numbers = [rows, tree.input_ids.shape[1], rows * width**2, rows * width * prefix]
    tokens = own_pairs = 0
    for step in range(1, max_new_tokens):
        going = [len(prompt) - prefix + step for prompt, n in zip(prompts, lengths, strict=True) if n > step]
        if going:
            tokens += len(going)
            own_pairs += len(going) * min(-(-max(going) // 16) * 16, width + max_new_tokens)
    return [*numbers, tokens, own_pairs, tokens * prefix]


def learn_generation(
    count: LinearCount, generate: Callable[..., tuple[list[list[int]], int]], prompts: Sequence[Any], prefix_kv: Any
) -> int:
    """Let `count` learn from small batches of `prompts`; returns the operations that this took.

    generate: takes prompts and `max_new_tokens`; returns the generated tokens and the operations.
    """
    rng, total = np.random.default_rng(0), 0
    for sample in range(SAMPLES):
        if count.confirmed >= count.CONFIRMATIONS:
            break
        rows = [prompts[i] for i in rng.choice(len(prompts), min(len(prompts), 1 + sample % 4), replace=False)]
        new = 1 + sample % 5
        tokens, operations = generate(rows, max_new_tokens=new)
        count.add(generation_numbers(rows, list(map(len, tokens)), prefix_kv, new), operations)
        total += operations
    return total
