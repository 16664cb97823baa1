"""Attention over packed rows: for scoring by trees, and for decoding token by token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
)

from distillery.models.layers import transformer_body
from distillery.models.packed.token_tree import TokenTree

_current_tree: TokenTree | None = None  # the batch in flight


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over a :class:`TokenTree`: each token sees the shared tokens and its own row's ancestors.

    query [1, h, T, d], key and value [1, h_kv, T, d] -> [1, T, h, d]. Rows are unpacked for the attention alone, so
    that no row is scored against another; on a CPU plain products beat the fused kernel's backward pass at these
    lengths (`benchmarks/step_profile.py` shows both). The softmax is taken in float32.
    """
    tree = _current_tree
    if tree.read is not None:
        if tree.kept is not None:
            by_row = (x[0].index_select(1, tree.own.flatten()).unflatten(1, tree.own.shape) for x in (key, value))
            tree.kept[module.layer_idx] = tuple(x.transpose(0, 1) for x in by_row)
        return _attend_to_prefix(tree, query, key, value, *tree.read[module.layer_idx], scaling), None
    shared, (rows, width) = tree.shared, tree.own.shape
    heads, kv, d = query.shape[1], key.shape[1], query.shape[-1]
    group = heads // kv
    scale = d**-0.5 if scaling is None else scaling
    flat = tree.own.flatten()
    q, k, v = query[0], key[0], value[0]
    own_q = q.index_select(1, flat).view(kv, group, rows, width, d)
    own_k = k.index_select(1, flat).view(kv, rows, width, d)
    own_v = v.index_select(1, flat).view(kv, rows, width, d)
    by_row = own_q.permute(0, 2, 1, 3, 4).reshape(kv, rows, group * width, d)
    within = (by_row @ own_k.transpose(-1, -2)).view(kv, rows, group, width, width)
    within = within.masked_fill(~tree.sees[None, :, None], torch.finfo(within.dtype).min)
    to_shared = own_q.permute(0, 2, 1, 3, 4).reshape(kv, rows * group * width, d) @ k[:, :shared].transpose(-1, -2)
    scores = torch.cat([to_shared.view(kv, rows, group, width, shared), within], -1).float() * scale
    weights = scores.softmax(-1).to(query.dtype)
    out = (weights[..., :shared].reshape(kv, rows * group * width, shared) @ v[:, :shared]).view(
        kv, rows, group, width, d
    ) + (weights[..., shared:].reshape(kv, rows, group * width, width) @ own_v).view(kv, rows, group, width, d)
    out = out.permute(0, 2, 1, 3, 4).reshape(heads, rows * width, d)
    prefix = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, :shared], key[:, :, :shared], value[:, :, :shared], is_causal=True, scale=scale, enable_gqa=True
    )[0]
    out = torch.cat([prefix, out], 1).index_select(1, tree.back)
    return out.transpose(0, 1)[None], None


def _attend_to_prefix(
    tree: TokenTree, query: Tensor, key: Tensor, value: Tensor, read_k: Tensor, read_v: Tensor, scaling: float | None
) -> Tensor:
    """:func:`tree_attention` where the shared tokens' keys and values, [kv, P, d] each, are known already.

    Without a backward pass to serve, and with a long prefix, the fused kernel wins: it writes no [t, P + t] scores.
    """
    rows, width = tree.own.shape
    kv, d = key.shape[1], query.shape[-1]
    flat, group = tree.own.flatten(), query.shape[1] // kv

    def by_row(x: Tensor) -> Tensor:  # [heads, T, d] -> [rows, kv, heads / kv * width, d]
        own = x[0].index_select(1, flat).view(kv, -1, rows, width, d)
        return own.permute(2, 0, 1, 3, 4).reshape(rows, kv, -1, d)

    k = torch.cat([read_k.expand(rows, -1, -1, -1), by_row(key)], 2)
    v = torch.cat([read_v.expand(rows, -1, -1, -1), by_row(value)], 2)
    mask = tree.masked(group, query.dtype)
    out = nn.functional.scaled_dot_product_attention(by_row(query), k, v, attn_mask=mask, scale=scaling)
    out = out.view(rows, kv, group, width, d).permute(0, 3, 1, 2, 4).reshape(1, rows * width, kv * group, d)
    return out.index_select(1, tree.back)


AttentionInterface.register("tree", tree_attention)


@dataclass
class DecodingState:
    """Rows that are being continued, one token a row and pass.

    read: keys and values [kv, P, d] a layer of what all rows begin with, held once. keys, values: of each row's own
    tokens, [rows, kv, room, d] a layer. length: [rows], how many there are, with the one in flight.
    """

    read: list[tuple[Tensor, Tensor]]
    keys: list[Tensor]
    values: list[Tensor]
    length: Tensor

    def pick(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self.keys, self.values = ([x[rows] for x in layers] for layers in (self.keys, self.values))
        self.length = self.length[rows]


_current_decoding: DecodingState | None = None  # the batch in flight


def decoding_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each row's newest token to the shared tokens and its own. query [1, h, rows, d] -> [1, rows, h, d].

    The shared tokens' keys and values are not repeated for every row, nor is anything copied from step to step.
    """
    state, layer = _current_decoding, module.layer_idx
    (heads, rows, d), kv = query.shape[1:], key.shape[1]
    each, at = torch.arange(rows, device=query.device), state.length - 1
    state.keys[layer][each, :, at] = key[0].transpose(0, 1).to(state.keys[layer].dtype)
    state.values[layer][each, :, at] = value[0].transpose(0, 1).to(state.values[layer].dtype)
    width = min(-(-int(state.length.max()) // 16) * 16, state.keys[layer].shape[2])
    own_k, own_v = state.keys[layer][:, :, :width], state.values[layer][:, :, :width]
    read_k, read_v = state.read[layer]
    q = query[0].unflatten(0, (kv, heads // kv))
    to_read = q.flatten(1, 2) @ read_k.to(q.dtype).transpose(-1, -2)
    to_read = to_read.unflatten(1, (heads // kv, rows)).permute(2, 0, 1, 3)
    within = q.permute(2, 0, 1, 3) @ own_k.to(q.dtype).transpose(-1, -2)
    unseen = torch.arange(width, device=q.device) >= state.length[:, None]
    within = within.masked_fill(unseen[:, None, None], torch.finfo(within.dtype).min)
    scores = torch.cat([to_read, within], -1).float() * (d**-0.5 if scaling is None else scaling)
    weights = scores.softmax(-1).to(q.dtype)
    shared = read_k.shape[1]
    out = weights[..., shared:] @ own_v.to(q.dtype)
    from_read = weights[..., :shared].permute(1, 2, 0, 3).flatten(1, 2) @ read_v.to(q.dtype)
    out = out + from_read.unflatten(1, (heads // kv, rows)).permute(2, 0, 1, 3)
    return out.reshape(1, rows, heads, d), None


AttentionInterface.register("writing", decoding_attention)


@contextmanager
def attend_by_tree(tree: TokenTree, config: Any) -> Iterator[None]:
    """Within it the model of `config` attends as `tree` says."""
    global _current_tree
    before = config._attn_implementation, _current_tree
    config._attn_implementation, _current_tree = "tree", tree
    try:
        yield
    finally:
        config._attn_implementation, _current_tree = before


@contextmanager
def decode_with(state: DecodingState, config: Any) -> Iterator[None]:
    """Within it the model of `config` attends from each row's newest token, as `state` says."""
    global _current_decoding
    before = config._attn_implementation, _current_decoding
    config._attn_implementation, _current_decoding = "writing", state
    try:
        yield
    finally:
        config._attn_implementation, _current_decoding = before


def supports_token_trees(model: nn.Module) -> bool:
    """Whether `model` places tokens by `position_ids` and lets its attention be exchanged (ALiBi models do not)."""
    body = transformer_body(model)
    return "position_ids" in inspect.signature(body.forward).parameters and getattr(
        body, "_supports_attention_backend", False
    )
