"""Attention over packed rows: for scoring by trees, and for decoding token by token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from distillery.models.layers import transformer_body
from distillery.models.packed.token_tree import TokenTree

# transformers calls an attention function with its module and tensors alone. The layout of the batch reaches it through
# this: for each of our attention functions, the batch whose forward pass is running, one at a time in a process.
_running: dict[str, Any] = {"token_tree": None, "packed_decoding": None}


FUSED_DEVICES = ("cuda",)  # on which a sequence of up to this many tokens is attended to by one kernel
FUSED_TOKENS = 2048


@dataclass
class DecodingState:
    """Keys and values of rows that are continued by one token a row and forward pass.

    prefix_kv: keys and values [kv heads, P, head size] a layer of the P tokens that all rows begin with, held once.
    keys, values: of each row's own tokens, [rows, kv heads, room, head size] a layer.
    lengths: [rows], the number of own tokens of each row, with the newest. longest: the largest of them, read once a
    forward pass: each reading waits for a GPU.
    """

    prefix_kv: list[tuple[Tensor, Tensor]]
    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    longest: int = 0

    def add_token(self) -> None:
        """Count one more token of each row."""
        self.lengths = self.lengths + 1
        self.longest = int(self.lengths.max())

    def select(self, rows: Tensor) -> None:
        """Drop all but `rows`."""
        self.keys, self.values = ([x[rows] for x in layers] for layers in (self.keys, self.values))
        self.lengths = self.lengths[rows]


def _check_plain_attention(
    length: int, sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **_: Any
) -> None:
    """Raise ValueError for an attention over `length` tokens that is more than a softmax over all ancestors.

    The names are those under which `transformers` passes them: a window of tokens, a cap on scores, attention sinks.
    """
    if sliding_window is not None and length > sliding_window:
        raise ValueError(f"a layer sees {sliding_window} tokens, a row has {length}")
    if softcap is not None or s_aux is not None:
        raise ValueError("its attention caps scores" if s_aux is None else "its attention has sinks")


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention over a :class:`TokenTree`: each token attends to the prefix and to its ancestors in its own row.

    query [1, heads, T, head size], key and value [1, kv heads, T, head size] -> [1, T, heads, head size].
    Raises ValueError for a layer that attends in another way.
    """
    tree: TokenTree = _running["token_tree"]
    _check_plain_attention(tree.row_length, **options)
    tree.attended += 1
    if tree.prefix_kv is None:
        fused = query.device.type in FUSED_DEVICES and query.shape[2] <= FUSED_TOKENS
        attend = _attend_fused if fused else _attend_with_prefix
        return attend(tree, query, key, value, scaling), None
    if tree.own_kv is not None:
        index = tree.own_index
        by_row = (x[0].index_select(1, index.flatten()).unflatten(1, index.shape) for x in (key, value))
        tree.own_kv[module.layer_idx] = tuple(x.transpose(0, 1) for x in by_row)
    return _attend_to_cached_prefix(tree, query, key, value, *tree.prefix_kv[module.layer_idx], scaling), None


def _attend_fused(tree: TokenTree, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """As :func:`_attend_with_prefix`, by one call of torch's kernel with a mask over the whole sequence.

    On a GPU the products of a short sequence cost less than the calls of the operations that save them: 76 a layer,
    those of the backward pass among them.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (key, value))
    mask = tree.sequence_mask(query.dtype)
    return nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling).transpose(1, 2)


def _attend_with_prefix(tree: TokenTree, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """:func:`tree_attention` where the sequence begins with the prefix.

    Rows are unpacked for the attention alone, so that no row is scored against another. On a CPU plain products beat
    the fused kernel's backward pass at these lengths. The softmax is taken in float32.
    """
    prefix, (rows, width) = tree.prefix_length, tree.own_index.shape
    heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[-1]
    group = heads // kv_heads
    scale = size**-0.5 if scaling is None else scaling
    index = tree.own_index.flatten()
    q, k, v = query[0], key[0], value[0]
    own_q = q.index_select(1, index).view(kv_heads, group, rows, width, size)
    own_k = k.index_select(1, index).view(kv_heads, rows, width, size)
    own_v = v.index_select(1, index).view(kv_heads, rows, width, size)
    row_q = own_q.permute(0, 2, 1, 3, 4).reshape(kv_heads, rows, group * width, size)
    own_scores = (row_q @ own_k.transpose(-1, -2)).view(kv_heads, rows, group, width, width)
    own_scores = own_scores.masked_fill(~tree.own_mask[None, :, None], torch.finfo(own_scores.dtype).min)
    flat_q = own_q.permute(0, 2, 1, 3, 4).reshape(kv_heads, rows * group * width, size)
    prefix_scores = (flat_q @ k[:, :prefix].transpose(-1, -2)).view(kv_heads, rows, group, width, prefix)
    scores = torch.cat([prefix_scores, own_scores], -1).float() * scale
    weights = scores.softmax(-1).to(query.dtype)
    from_prefix = weights[..., :prefix].reshape(kv_heads, rows * group * width, prefix) @ v[:, :prefix]
    from_own = weights[..., prefix:].reshape(kv_heads, rows, group * width, width) @ own_v
    output = from_prefix.view(kv_heads, rows, group, width, size) + from_own.view(kv_heads, rows, group, width, size)
    output = output.permute(0, 2, 1, 3, 4).reshape(heads, rows * width, size)
    prefix_output = nn.functional.scaled_dot_product_attention(
        query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], is_causal=True, scale=scale, enable_gqa=True
    )[0]
    output = torch.cat([prefix_output, output], 1).index_select(1, tree.gather_index)
    return output.transpose(0, 1)[None]


def _attend_to_cached_prefix(
    tree: TokenTree,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    scaling: float | None,
) -> Tensor:
    """:func:`tree_attention` where the prefix's keys and values, [kv heads, P, head size] each, were computed before.

    Without a backward pass to serve, and with a long prefix, the fused kernel wins: it writes no [W, P + W] scores.
    """
    rows, width = tree.own_index.shape
    kv_heads, size = key.shape[1], query.shape[-1]
    index, group = tree.own_index.flatten(), query.shape[1] // kv_heads

    def by_row(x: Tensor) -> Tensor:  # [heads, T, size] -> [rows, kv heads, heads / kv heads * width, size]
        own = x[0].index_select(1, index).view(kv_heads, -1, rows, width, size)
        return own.permute(2, 0, 1, 3, 4).reshape(rows, kv_heads, -1, size)

    k = torch.cat([prefix_key.expand(rows, -1, -1, -1), by_row(key)], 2)
    v = torch.cat([prefix_value.expand(rows, -1, -1, -1), by_row(value)], 2)
    mask = tree.attention_mask(group, query.dtype)
    output = nn.functional.scaled_dot_product_attention(by_row(query), k, v, attn_mask=mask, scale=scaling)
    output = output.view(rows, kv_heads, group, width, size).permute(0, 3, 1, 2, 4)
    return output.reshape(1, rows * width, kv_heads * group, size).index_select(1, tree.gather_index)


def decoding_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of each row's newest token to the prefix and to the row's own tokens; see :class:`DecodingState`.

    query [1, heads, rows, head size] -> [1, rows, heads, head size]. The prefix's keys and values are not repeated for
    every row, and no cache is copied from step to step. Raises ValueError for a layer that attends in another way.
    """
    state, layer = _running["packed_decoding"], module.layer_idx
    (heads, rows, size), kv_heads = query.shape[1:], key.shape[1]
    group = heads // kv_heads
    row, newest = torch.arange(rows, device=query.device), state.lengths - 1
    state.keys[layer][row, :, newest] = key[0].transpose(0, 1).to(state.keys[layer].dtype)
    state.values[layer][row, :, newest] = value[0].transpose(0, 1).to(state.values[layer].dtype)
    width = min(-(-state.longest // 16) * 16, state.keys[layer].shape[2])
    own_k, own_v = state.keys[layer][:, :, :width], state.values[layer][:, :, :width]
    prefix_k, prefix_v = state.prefix_kv[layer]
    prefix = prefix_k.shape[1]
    _check_plain_attention(prefix + state.longest, **options)
    q = query[0].unflatten(0, (kv_heads, group))
    prefix_scores = q.flatten(1, 2) @ prefix_k.to(q.dtype).transpose(-1, -2)
    prefix_scores = prefix_scores.unflatten(1, (group, rows)).permute(2, 0, 1, 3)
    own_scores = q.permute(2, 0, 1, 3) @ own_k.to(q.dtype).transpose(-1, -2)
    beyond = torch.arange(width, device=q.device) >= state.lengths[:, None]
    own_scores = own_scores.masked_fill(beyond[:, None, None], torch.finfo(own_scores.dtype).min)
    scores = torch.cat([prefix_scores, own_scores], -1).float() * (size**-0.5 if scaling is None else scaling)
    weights = scores.softmax(-1).to(q.dtype)
    from_own = weights[..., prefix:] @ own_v.to(q.dtype)
    from_prefix = weights[..., :prefix].permute(1, 2, 0, 3).flatten(1, 2) @ prefix_v.to(q.dtype)
    output = from_own + from_prefix.unflatten(1, (group, rows)).permute(2, 0, 1, 3)
    return output.reshape(1, rows, heads, size), None


AttentionInterface.register("token_tree", tree_attention)
AttentionInterface.register("packed_decoding", decoding_attention)


@contextmanager
def _attend_with(attention: str, batch: TokenTree | DecodingState, config: Any) -> Iterator[None]:
    """Let the model of `config` use one of our attention functions on `batch`, within the context."""
    before = config._attn_implementation, _running[attention]
    config._attn_implementation, _running[attention] = attention, batch
    try:
        yield
    finally:
        config._attn_implementation, _running[attention] = before


def attend_by_tree(tree: TokenTree, config: Any) -> AbstractContextManager[None]:
    """Let the model of `config` attend over `tree`, within the context."""
    return _attend_with("token_tree", tree, config)


def decode_with(state: DecodingState, config: Any) -> AbstractContextManager[None]:
    """Let the model of `config` continue the rows of `state`, within the context."""
    return _attend_with("packed_decoding", state, config)


def supports_token_trees(model: nn.Module) -> bool:
    """Whether `model` places tokens by `position_ids` and lets its attention be exchanged (ALiBi models do not)."""
    body = transformer_body(model)
    return "position_ids" in inspect.signature(body.forward).parameters and getattr(
        body, "_supports_attention_backend", False
    )
