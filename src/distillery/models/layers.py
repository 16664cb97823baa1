"""Choose layers of a model, and find its body and its output head."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import (
    AutoConfig,
    PreTrainedModel,
)

from distillery.errors import UserError


def layer_indices(layers: list[int] | str, depth: int) -> list[int]:
    """The kept layers of a model `depth` layers deep: a list as it is, `all`, `first-N`, `last-N` or `every-N`.

    Raises UserError when a layer does not exist.
    """
    if layers == "all":
        return list(range(depth))
    if isinstance(layers, str):
        rule, _, n = layers.partition("-")
        kept = {
            "first": list(range(int(n))),
            "last": list(range(depth - int(n), depth)),
            "every": list(range(0, depth, int(n))),
        }[rule]
    else:
        kept = list(layers)
    if not kept or min(kept) < 0 or max(kept) >= depth:
        raise UserError(f"init.layers: {layers} does not fit a model with layers 0 to {depth - 1}")
    return kept


def count_layers(folder: Path) -> int:
    """How many layers the model in `folder` has (its decoder, if it has both)."""
    config = AutoConfig.from_pretrained(folder)
    return getattr(config, "num_decoder_layers", None) or config.num_hidden_layers


def keep_layers(model: PreTrainedModel, layers: list[int] | str) -> None:
    """Cut `model` in place to some of its transformer layers, and its config with it.

    The rule holds for the encoder and for the decoder of a model that has both. Raises UserError when there is no list
    of layers to choose from, or a layer does not exist.
    """
    config = model.config
    if not config.is_encoder_decoder:
        _cut_stack(model, layers, config.num_hidden_layers)
        config.num_hidden_layers = len(layer_indices(layers, config.num_hidden_layers))
        return
    names = ("num_layers", "num_decoder_layers") if hasattr(config, "num_decoder_layers") else DEPTH_KEYS
    for part, name in zip((model.get_encoder(), model.get_decoder()), names, strict=True):
        depth = getattr(config, name)
        _cut_stack(part, layers, depth)
        setattr(config, name, len(layer_indices(layers, depth)))


DEPTH_KEYS = ("encoder_layers", "decoder_layers")  # of every family but T5's


def _cut_stack(model: nn.Module, layers: list[int] | str, depth: int) -> None:
    for parent in model.modules():
        for attribute, stack in list(parent.named_children()):
            if isinstance(stack, nn.ModuleList) and len(stack) == depth:
                kept = layer_indices(layers, depth)
                setattr(parent, attribute, nn.ModuleList(stack[i] for i in kept))
                for new, old in enumerate(getattr(parent, attribute)):
                    for module in old.modules():
                        if hasattr(module, "layer_idx"):  # the slot of this layer in a key/value cache
                            module.layer_idx = new
                if getattr(model.config, "layer_types", None):
                    model.config.layer_types = [model.config.layer_types[i] for i in kept]
                _keep_relative_positions(stack[0], getattr(parent, attribute)[0])
                return
    raise UserError(f"init.layers: {type(model).__name__} has no list of {depth} layers to choose from")


def _keep_relative_positions(old: nn.Module, new: nn.Module) -> None:
    """T5's first layer alone knows how far apart tokens are; whichever comes first now must know it."""
    for before, after in zip(old.modules(), new.modules(), strict=False):
        if old is not new and getattr(before, "has_relative_attention_bias", False):
            after.has_relative_attention_bias = True
            after.relative_attention_bias = before.relative_attention_bias


def transformer_body(model: nn.Module) -> nn.Module:
    """The transformer without its output head, below any adapter wrapper (adapters act inside it)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.base_model


def output_head(model: nn.Module) -> nn.Module:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_output_embeddings()
