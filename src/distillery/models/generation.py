"""Generate completions of prompts by the method that fits the model, and clean generated texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillery.models.forward_methods import ForwardMethods
from distillery.models.packed.decoding import decode_completions, next_tokens
from distillery.models.scoring import plain_token_logits
from distillery.tasks.prompts import PLAIN_SEPARATOR

# what a model's own generation_config may ask for beside the likeliest tokens, or tokens drawn by their probability
PLAIN_DECODING = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "top_p": 1.0}


def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    prefix_kv: Any,
    methods: ForwardMethods,
    *,
    pad_token_id: int,
    end_token_ids: set[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    step_logits: list[Tensor] | None = None,
) -> list[list[int]]:
    """The tokens that `model` generates after each prompt, up to and with one of `end_token_ids`.

    prefix_kv: of the tokens that all prompts begin with; see :func:`compute_prefix_kv`. temperature, top_p: see
    :func:`next_tokens`.
    step_logits: a list that receives the logits [unfinished rows, vocabulary] of each step, but for `plain`.
    """
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    settings["end_token_ids"] = end_token_ids
    if prefix_kv:
        settings |= {"direct_head": methods.direct_head, "step_logits": step_logits}
        return decode_completions(model, prompts, prefix_kv, **settings)
    if methods.generation == "plain":
        return [generate_plainly(model, prompt, **settings) for prompt in prompts]
    return generate_padded(model, prompts, pad_token_id=pad_token_id, step_logits=step_logits, **settings)


def generate_plainly(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    end_token_ids: set[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
) -> list[int]:
    """As :func:`generate_padded` for one prompt, by a whole forward pass for each token: slow, and right by design."""
    tokens: list[int] = []
    while len(tokens) < max_new_tokens and end_token_ids.isdisjoint(tokens[-1:]):
        logits = plain_token_logits(model, [[*prompt, *tokens]], [[[0]]], ()).logits
        tokens.append(int(next_tokens(logits, temperature, top_p)))
    return tokens


def generate_padded(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    end_token_ids: set[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    step_logits: list[Tensor] | None = None,
) -> list[list[int]]:
    """The tokens that `model` generates after each prompt, up to and with one of `end_token_ids`.

    For models that take no token trees, such as ALiBi models and encoder-decoders. Greedy when `temperature` is 0.
    step_logits: a list that receives the logits [rows, vocabulary] of each step; finished rows count on.
    """
    seq2seq, width = model.config.is_encoder_decoder, max(map(len, prompts))
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": pad_token_id} | PLAIN_DECODING
    if temperature:
        settings |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
    else:
        settings |= {"do_sample": False}
    if step_logits is not None:

        def keep_logits(_tokens: Tensor, logits: Tensor) -> Tensor:
            step_logits.append(logits)
            return logits

        settings["logits_processor"] = [keep_logits]
    rows, masks = [], []
    for prompt in prompts:
        tokens, padding = list(prompt), [pad_token_id] * (width - len(prompt))
        ones, zeros = [1] * len(prompt), [0] * len(padding)
        # an encoder is padded on the right, as in training; generation goes on at the right end of a causal model's row
        rows.append(tokens + padding if seq2seq else padding + tokens)
        masks.append(ones + zeros if seq2seq else zeros + ones)
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
    settings["synced_gpus"] = False  # processes that share a model's weights generate for rows of their own
    generated = model.generate(**{name: x.to(model.device) for name, x in inputs.items()}, **settings)
    completions = []
    for row in generated[:, 1 if seq2seq else width :].tolist():
        end = next((k + 1 for k, token in enumerate(row) if token in end_token_ids), len(row))
        completions.append(row[:end])
    return completions


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokens that fill up and that end a text of `model`, as arguments of :func:`generate_batch`."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    return {"pad_token_id": tokenizer.pad_token_id, "end_token_ids": ends}


def first_line(text: str) -> str:
    """The first line of a generated answer, without superfluous spaces."""
    return " ".join((text.strip().splitlines() or [""])[0].split())


def one_line(text: str) -> str:
    """A generated text as one line."""
    return " ".join(text.split())


def first_paragraph(text: str) -> str:
    """A generated text up to its first empty line, as one line: where a model without a chat template ends."""
    return one_line(text.split(PLAIN_SEPARATOR)[0])
