"""The trained weights of a model in a file that one process or many, with the model whole or in shards, read alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from distillery.files import atomic_write
from distillery.models.series_adapters import has_series_adapters, trained_alone, trained_weights
from distillery.training.processes import process_rank
from distillery.training.sharding import is_sharded, shard_weights, whole_weights_by_name


def save_weights(model: Any, path: Path) -> None:
    """Write the trained weights of `model` to the file `path`: its adapters, or all where it has none.

    The first process alone writes. All have to call this where the model is in shards.
    """
    weights = whole_weights_by_name(model, trained_alone(model)) if is_sharded(model) else None
    if process_rank():
        return
    with atomic_write(path) as scratch:
        if hasattr(model, "peft_config"):
            weights = get_peft_model_state_dict(model, weights)
            save_file({k: v.contiguous() for k, v in weights.items()}, scratch)
        elif has_series_adapters(model):
            save_file({k: v.contiguous() for k, v in (weights or trained_weights(model)).items()}, scratch)
        elif weights is None:
            safetensors.torch.save_model(model, str(scratch))
        else:
            save_file(_name_once(weights), scratch)


def _name_once(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` with the first name alone of one that has several, as :func:`safetensors.torch.save_model` has it."""
    names: dict[int, str] = {}
    for name in sorted(weights):
        names.setdefault(id(weights[name]), name)
    return {name: weights[name] for name in names.values()}


def load_weights(model: Any, path: Path) -> None:
    """Give `model` the weights that :func:`save_weights` wrote, or those of a checkpoint of the trainer."""
    if hasattr(model, "peft_config"):
        set_peft_model_state_dict(model, _of_shape(model, load_file(path)))
    elif has_series_adapters(model):
        model.load_state_dict(_of_shape(model, load_file(path)), strict=False)
    elif is_sharded(model):
        _load_shards(model, path)
    else:
        safetensors.torch.load_model(model, str(path))


def _load_shards(model: Any, path: Path) -> None:
    """The weights of the file `path` into the shards of `model`; a weight of several names has one of them there."""
    weights = load_file(path)
    loaded = model.load_state_dict(_of_shape(model, weights), strict=False)
    named = dict(model.named_parameters(remove_duplicate=False))
    known = {id(weight) for name, weight in named.items() if name in weights}
    missing = [name for name, weight in named.items() if id(weight) not in known]
    if missing or loaded.unexpected_keys:
        raise RuntimeError(f"{path} is of another model: it lacks {missing}, and has {loaded.unexpected_keys}")


def _of_shape(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` as `model` holds them, whole or in shards."""
    return shard_weights(model, weights) if is_sharded(model) else weights
