"""How many tokens a model can read: those with learned positions fail on a longer text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from distillery.errors import UserError

POSITION_LAYERS = ("position_embeddings", "embed_positions", "wpe")  # their names in transformers


def max_positions(model: nn.Module) -> int | None:
    """The number of tokens for which `model` has positions; None where they are computed and no text is too long."""
    limits = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_LAYERS:
            reserved = getattr(module, "offset", 0)  # OPT, BART
            if module.padding_idx is not None:  # RoBERTa and MPNet count from behind it
                reserved = module.padding_idx + 1
            limits.append(module.num_embeddings - reserved)
    return min(limits, default=None)


def require_positions(place: str, max_length: int, limit: int | None, answer_tokens: int = 0) -> None:
    """Raise UserError, whose line begins with `place`, when texts of `max_length` tokens are too long for a model.

    limit: see :func:`max_positions`. answer_tokens: of an answer that comes behind the text.
    """
    if limit is not None and max_length + answer_tokens > limit:
        beside = f", beside the {answer_tokens} of an answer" if answer_tokens else ""
        raise UserError(
            f"{place}: {max_length} tokens are too many: the model reads {limit - answer_tokens} at most{beside}"
        )


def max_positions_in(folder: Path) -> int | None:
    """:func:`max_positions` of the model in `folder`, from its config alone; None where only its own code knows it."""
    try:
        with torch.device("meta"):  # shapes alone
            return max_positions(AutoModel.from_config(AutoConfig.from_pretrained(folder)))
    except (OSError, ValueError, KeyError, ImportError):
        return None
