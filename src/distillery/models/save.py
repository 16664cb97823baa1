"""Save a model as a plain `transformers` folder, or only its trained weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from distillery.files import atomic_write
from distillery.models.series_adapters import CONFIG_KEY, has_series_adapters, save_with_adapters


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write `model` (adapters merged, 4-bit weights dequantized) and its tokenizer as a plain `transformers` folder.

    Series adapters cannot be merged: a model with them is written as only :func:`load_model` opens it.
    dtype: that of the written weights, their own when not given. Raises UserError when the disk is full.
    """
    if hasattr(model, "merge_and_unload"):
        in_4_bits = getattr(model.get_base_model(), "is_loaded_in_4bit", False)
        model = _merge_dequantized(model) if in_4_bits else model.merge_and_unload()
    if dtype:
        model = model.to(dtype)
    _write_folder(model, tokenizer, Path(folder))


def _merge_dequantized(model: PeftModel) -> nn.Module:
    """`model` dequantized, with its adapters merged after that: merged into 4 bits they would be rounded away."""
    with tempfile.TemporaryDirectory() as adapters:
        model.save_pretrained(adapters)
        return merge_adapters(dequantize(model.unload()), Path(adapters))


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with its 4-bit weights widened to the precision of its products, and layers of the classes they had."""
    convolutions = [name for name, module in model.named_modules() if getattr(module, "source_cls", None) is Conv1D]
    model = model.dequantize()
    for name in convolutions:  # of GPT-2: dequantized they are linear layers, whose weights lie transposed
        linear = model.get_submodule(name)
        layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight, layer.bias = nn.Parameter(linear.weight.T.contiguous()), linear.bias
        model.set_submodule(name, layer)
    return model


def _write_folder(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with atomic_write(folder) as scratch:
        if has_series_adapters(model):
            save_with_adapters(model, scratch)
        else:
            vars(model.config).pop(CONFIG_KEY, None)  # of a model that was cut to layers without adapters
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
