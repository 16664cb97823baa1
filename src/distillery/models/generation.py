"""Generate completions of padded prompts, and clean generated texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from distillery.tasks.prompts import PLAIN_SEPARATOR


def generate_padded(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    end_token_ids: set[int],
    max_new_tokens: int,
    temperature: float,
) -> list[list[int]]:
    """The tokens that `model` generates after each prompt, up to and with one of `end_token_ids`.

    For models that take no token trees: ALiBi models and encoder-decoders. Greedy when `temperature` is 0.
    """
    seq2seq, width = model.config.is_encoder_decoder, max(map(len, prompts))
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": pad_token_id}
    settings |= {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    rows, masks = [], []
    for prompt in prompts:
        tokens, padding = list(prompt), [pad_token_id] * (width - len(prompt))
        ones, zeros = [1] * len(prompt), [0] * len(padding)
        # an encoder is padded on the right, as in training; generation goes on at the right end of a causal model's row
        rows.append(tokens + padding if seq2seq else padding + tokens)
        masks.append(ones + zeros if seq2seq else zeros + ones)
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
    generated = model.generate(**{name: x.to(model.device) for name, x in inputs.items()}, **settings)
    completions = []
    for row in generated[:, 1 if seq2seq else width :].tolist():
        end = next((k + 1 for k, token in enumerate(row) if token in end_token_ids), len(row))
        completions.append(row[:end])
    return completions


def first_line(text: str) -> str:
    """The first line of a generated answer, without superfluous spaces."""
    return " ".join((text.strip().splitlines() or [""])[0].split())


def one_line(text: str) -> str:
    """A generated text as one line."""
    return " ".join(text.split())


def first_paragraph(text: str) -> str:
    """A generated text up to its first empty line, as one line: where a model without a chat template ends."""
    return one_line(text.split(PLAIN_SEPARATOR)[0])
