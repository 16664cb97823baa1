"""Save a model as a plain `transformers` folder, or only its trained weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from distillery.files import atomic_write


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write `model` (adapters merged, 4-bit weights dequantized) and its tokenizer as a plain `transformers` folder.

    dtype: that of the written weights, their own when not given. Raises UserError when the disk is full.
    """
    if hasattr(model, "merge_and_unload"):
        if getattr(model.get_base_model(), "is_loaded_in_4bit", False):
            model = _dequantize_adapted(model)
        model = model.merge_and_unload()
    if dtype:
        model = model.to(dtype)
    _write_folder(model, tokenizer, Path(folder))


def _dequantize_adapted(model: PeftModel) -> PeftModel:
    """The adapters of `model` on its dequantized weights: merged into 4 bits they would be rounded away."""
    with tempfile.TemporaryDirectory() as adapters:
        model.save_pretrained(adapters)
        return PeftModel.from_pretrained(model.unload().dequantize(), adapters)


def _write_folder(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with atomic_write(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def merge_adapters(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with the adapters that :func:`save_trained_weights` wrote to `folder` merged into it."""
    return PeftModel.from_pretrained(model, folder).merge_and_unload()


def save_trained_weights(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the adapters if there are any, else the whole model, and the tokenizer. Raises UserError on a full disk."""
    if hasattr(model, "peft_config"):
        _write_folder(model, tokenizer, Path(folder))
    else:
        save_model(model, tokenizer, folder)
