"""Token ids of prompts and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillery.errors import UserError

Completion = tuple[list[int], int]  # tokens, and the number of them before the first supervised one


def tokenize_labels(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    """Token ids of each label's answer; an end token follows where one answer is the beginning of another.

    Raises UserError when two answers are the same tokens.
    """
    tokens = [tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
    nested = any(a is not b and b[: len(a)] == a for a in tokens for b in tokens)
    if len({tuple(t) for t in tokens}) < len(tokens) or not all(tokens):
        raise UserError(
            f"{Path(tokenizer.name_or_path).name}: labels {', '.join(repr(a.strip()) for a in answers)} are not "
            "distinct tokens for its tokenizer; give them other words under `verbalizer` in the task file"
        )
    return [[*t, tokenizer.eos_token_id] for t in tokens] if nested else tokens


def truncate_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, encode: Callable[[str], list[int]], max_length: int
) -> list[int]:
    """`encode(text)`, the ids of a prompt around `text`, of which the text's end is cut to fit `max_length` tokens.

    Raises UserError when the prompt alone is too long.
    """
    ids = encode(text)
    if len(ids) <= max_length:
        return ids
    text_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    length = len(text_ids) - (len(ids) - max_length) - 2  # decoded text may take more tokens at the cut
    if length < 1:
        raise UserError(f"max_length: {max_length} tokens are too few for the prompt of {len(ids)}")
    return encode(tokenizer.decode(text_ids[:length]))


def cut_prompts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    examples: Sequence[Any] | None,
    encode: Callable[[str, Any], list[int]],
    max_length: int,
) -> list[list[int]]:
    """As :func:`truncate_prompt` for each of `texts`, with `encode(text, examples of the text)`; None: with its own."""
    solved = [None] * len(texts) if examples is None else examples
    return [
        truncate_prompt(tokenizer, text, lambda text, shots=shots: encode(text, shots), max_length)
        for text, shots in zip(texts, solved, strict=True)
    ]


def check_token_ids(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise UserError when a token of `rows` has no embedding: the lookup would fail deep within the model."""
    size = model.get_input_embeddings().weight.shape[0]
    highest = max(map(max, filter(None, rows)), default=0)
    if highest >= size:
        raise UserError(
            f"{Path(tokenizer.name_or_path).name}: its tokenizer gives token {highest}, but its weights know "
            f"0 to {size - 1}; tokenizer and weights are of different models"
        )
