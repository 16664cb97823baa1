"""The last layer of a model, computed only at the tokens whose output is read."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from distillery.errors import UserError
from distillery.models.layers import configured_layers, find_layers, transformer_body
from distillery.models.undisturbed import undisturbed

# parts of a layer whose output at a token needs that token alone, unlike keys and values; of Llama's and BERT's kind
TOKEN_WISE = ("self_attn.q_proj", "self_attn.o_proj", "mlp") + (
    "attention.self.query",
    "attention.output.dense",
    "intermediate",
    "output.dense",
)

_read_first_token: dict[str, bool] = {}  # by kind, of this process
# the kind and config of a model as text, written once and not at every forward pass
_kinds: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _token_wise_parts(body: nn.Module) -> list[nn.Module]:
    """The parts of the last layer of `body` that compute each token by itself; none of a layer of another kind."""
    try:
        parent, attribute = find_layers(body, configured_layers(body.config))
    except (AttributeError, UserError):  # layers that share their weights are no list
        return []
    named = dict(getattr(parent, attribute)[-1].named_modules())
    parts = [named[name] for name in TOKEN_WISE if name in named]
    return [part for part in parts if _is_token_wise(part)]


def _is_token_wise(part: nn.Module) -> bool:
    """Whether `part` is linear, or linear layers with what has no weights between them: no mixture of experts."""
    if len(inspect.signature(part.forward).parameters) > 1 and not isinstance(part, BaseTunerLayer):
        return False  # BLOOM's also reads the residual
    linear = (nn.Linear, BaseTunerLayer)
    weighted = [child for child in part.children() if next(child.parameters(), None) is not None]
    return isinstance(part, linear) or (bool(weighted) and all(isinstance(child, linear) for child in weighted))


@contextmanager
def read_last_layer_at(body: nn.Module, positions: Tensor) -> Iterator[None]:
    """Let the last layer of `body` compute tokens `positions` [n] alone, within the context.

    positions: distinct, counted through the batch's rows of [rows, tokens]. The output at other tokens is meaningless.
    All tokens are computed where activations are computed again in the backward pass.
    """

    def select(_part: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        shapes.append(args[0].shape[:-1])
        return (args[0].flatten(0, -2)[positions],)

    def spread(_part: nn.Module, _args: Any, output: Tensor) -> Tensor:
        shape = shapes.pop()
        everywhere = output.new_zeros(shape.numel(), output.shape[-1])
        return everywhere.index_copy(0, positions, output).unflatten(0, shape)

    shapes: list[torch.Size] = []
    hooks = []
    for part in [] if getattr(body, "is_activation_checkpointing", False) else _token_wise_parts(body):
        hooks += [part.register_forward_pre_hook(select), part.register_forward_hook(spread)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def classify(model: nn.Module, batch: dict[str, Tensor], whole: bool = False, **options: Any) -> Any:
    """The outputs of a classifier for `batch`, whose last layer computes the rows' first tokens if it reads no others.

    whole: compute all tokens, since the caller reads them.
    """
    reading = nullcontext() if whole or not _reads_first_token(model, batch) else _at_first_tokens(model, batch)
    with reading:
        return model(**batch, **options)


def _at_first_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    rows, tokens = batch["input_ids"].shape
    first = torch.arange(0, rows * tokens, tokens, device=batch["input_ids"].device)
    return read_last_layer_at(transformer_body(model), first)


def _reads_first_token(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    """Whether the logits of a classifier depend on the first token's last state alone, by its first rows of `batch`.

    Compares once a process for models of one kind and config.
    """
    if batch["input_ids"].shape[1] == 1 or batch["input_ids"].is_meta:
        return False  # there is no other token to compare with, or no value
    if model not in _kinds:
        _kinds[model] = f"{type(model).__name__} {model.config.to_json_string()}"
    kind = _kinds[model]
    if kind not in _read_first_token:
        few, dtype = {name: x[:2] for name, x in batch.items()}, next(model.parameters()).dtype
        # the cache of autocast would serve the training
        with undisturbed(model), torch.autocast(batch["input_ids"].device.type, enabled=False):
            whole = model(**few).logits
            with _at_first_tokens(model, few):
                difference = (model(**few).logits - whole).abs().max()
            _read_first_token[kind] = bool(difference <= torch.finfo(dtype).eps ** 0.75 * whole.abs().max())
    return _read_first_token[kind]
