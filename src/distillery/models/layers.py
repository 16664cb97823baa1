"""The parts of a model: its layers, of which to keep some, its body, its output head and its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from distillery.errors import UserError

ENCODER_DECODER_DEPTH_KEYS = ("encoder_layers", "decoder_layers")  # in the config of every family but T5


def layer_indices(layers: list[int] | str, depth: int) -> list[int]:
    """The chosen layers of a model `depth` layers deep: a list as it is, `all`, `first-N`, `last-N` or `every-N`.

    Raises UserError when a layer does not exist.
    """
    if layers == "all":
        return list(range(depth))
    if isinstance(layers, str):
        rule, _, n = layers.partition("-")
        indices = {
            "first": list(range(int(n))),
            "last": list(range(depth - int(n), depth)),
            "every": list(range(0, depth, int(n))),
        }[rule]
    else:
        indices = list(layers)
    if not indices or min(indices) < 0 or max(indices) >= depth:
        raise UserError(f"layers: {layers} does not fit a model with layers 0 to {depth - 1}")
    return indices


def count_layers(folder: Path) -> int:
    """The number of layers of the model in `folder` (of its decoder, if it has both)."""
    return configured_layers(AutoConfig.from_pretrained(folder))


def configured_layers(config: Any) -> int:
    """As :func:`count_layers`, of a model with this `config` of `transformers`."""
    return getattr(config, "num_decoder_layers", None) or config.num_hidden_layers


def keep_layers(model: PreTrainedModel, layers: list[int] | str) -> None:
    """Cut `model` in place to some of its transformer layers, and its config with it.

    The rule holds for the encoder and for the decoder of a model that has both. Raises UserError when there is no list
    of layers to choose from, or a layer does not exist.
    """
    for (part, depth), key in zip(stack_depths(model), _depth_keys(model.config), strict=True):
        _cut_stack(part, layers, depth)
        setattr(model.config, key, len(layer_indices(layers, depth)))


def stack_depths(model: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    """The parts of `model` that have a list of layers (encoder and decoder of a model with both), and its length."""
    parts = [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model]
    return [(part, getattr(model.config, key)) for part, key in zip(parts, _depth_keys(model.config), strict=True)]


def _depth_keys(config: Any) -> tuple[str, ...]:
    """The keys of `config` that hold the numbers of layers."""
    if not config.is_encoder_decoder:
        return ("num_hidden_layers",)
    return ("num_layers", "num_decoder_layers") if hasattr(config, "num_decoder_layers") else ENCODER_DECODER_DEPTH_KEYS


def _cut_stack(model: nn.Module, layers: list[int] | str, depth: int) -> None:
    """Cut the list of `depth` layers in `model` to the wanted ones. Raises UserError when there is no such list."""
    parent, attribute = find_layers(model, depth)
    stack, indices = getattr(parent, attribute), layer_indices(layers, depth)
    cut = nn.ModuleList(stack[i] for i in indices)
    setattr(parent, attribute, cut)
    for new_index, layer in enumerate(cut):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the slot of this layer in a key/value cache
                module.layer_idx = new_index
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in indices]
    _keep_relative_positions(stack[0], cut[0])


def find_layers(model: nn.Module, depth: int) -> tuple[nn.Module, str]:
    """The module that holds the list of `depth` layers in `model`, and the name of the list.

    Raises UserError when there is no such list.
    """
    for parent in model.modules():
        for attribute, stack in parent.named_children():
            if isinstance(stack, nn.ModuleList) and len(stack) == depth:
                return parent, attribute
    raise UserError(f"layers: {type(model).__name__} has no list of {depth} layers to choose from")


def chosen_layers(model: PreTrainedModel, layers: list[int] | str) -> list[nn.Module]:
    """The layers of `model` that a rule of :func:`layer_indices` names, of encoder and decoder where it has both.

    Raises UserError when there is no list of layers to choose from, or a layer does not exist.
    """
    stacks = [getattr(*find_layers(part, depth)) for part, depth in stack_depths(model)]
    return [stack[i] for stack in stacks for i in layer_indices(layers, len(stack))]


def freeze_lower_layers(model: PreTrainedModel, number: int) -> None:
    """Train no embedding of `model` and none of its lowest `number` layers, of encoder and decoder where it has both.

    Nor is a head trained that shares the token vectors. Raises UserError when no layer is left to train.
    """
    for part, depth in stack_depths(model):
        if number >= depth:
            raise UserError(f"init.freeze: first-{number} leaves none of the {depth} layers to train")
        upper = {id(weight) for layer in getattr(*find_layers(part, depth))[number:] for weight in layer.parameters()}
        for weight in part.parameters():  # in the order of the forward pass: embeddings, layers, head
            if id(weight) in upper:
                break
            weight.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)


def _keep_relative_positions(old_first: nn.Module, new_first: nn.Module) -> None:
    """Give the new first layer the relative position bias: T5 has it in its first layer alone."""
    for old, new in zip(old_first.modules(), new_first.modules(), strict=False):
        if old_first is not new_first and getattr(old, "has_relative_attention_bias", False):
            new.has_relative_attention_bias = True
            new.relative_attention_bias = old.relative_attention_bias


def transformer_body(model: nn.Module) -> nn.Module:
    """The transformer without its output head, below any adapter wrapper (adapters act inside it)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.base_model


def output_head(model: nn.Module) -> nn.Module:
    """The layer from hidden states to logits over the vocabulary, below any adapter wrapper."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_output_embeddings()


def head_layers(model: PreTrainedModel) -> list[str]:
    """The names of the linear layers above the body of a classifier; the last one gives the label logits."""
    body = f"{model.base_model_prefix}."
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not name.startswith(body)
    ]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters; a weight of 4 or 8 bits counts as the numbers it stands for."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
        total += size
        trainable += size if parameter.requires_grad else 0
    # integers are no parameters of torch
    total += sum(getattr(module, "quantized_parameters", 0) for module in model.modules())
    return total, trainable
