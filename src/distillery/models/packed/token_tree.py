"""Rows and their completions packed into one sequence: token trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class TokenTree:
    """The rows of a batch as token trees in one sequence: the prefix that all share, then each row's own tokens.

    For P prefix tokens, T tokens in the sequence, R rows of at most W own tokens, and n predicted tokens:

    prefix_length: P.
    input_ids, position_ids: [1, T]; they begin with the prefix, or lack it where `prefix_kv` holds it.
    own_index: [R, W], where each row's own tokens stand in the sequence (short rows are filled up with 0).
    own_mask: [R, W, W] bool, True where an own token attends to an own token (last axis). All attend to the prefix.
    gather_index: [T], where every token of the sequence stands in [prefix, own_index.flatten()], or, without the
    prefix, in own_index.flatten().
    logit_positions: [n], where in the sequence each token is predicted.
    target_ids: [n], the predicted tokens.
    completion_index: [n], which completion each belongs to, counted through the rows in order.
    row_length: tokens of the longest row with a completion.
    prefix_kv: keys and values of the prefix computed before, [kv heads, P, head size] a layer.
    own_kv: a dict that receives each layer's keys and values of the own tokens, [R, kv heads, W, head size].
    attended: how many layers have attended over the tree.
    """

    prefix_length: int
    input_ids: Tensor
    position_ids: Tensor
    own_index: Tensor
    own_mask: Tensor
    gather_index: Tensor
    logit_positions: Tensor
    target_ids: Tensor
    completion_index: Tensor
    row_length: int
    prefix_kv: list[tuple[Tensor, Tensor]] | None = None
    own_kv: dict[int, tuple[Tensor, Tensor]] | None = None
    _attention_mask: Tensor | None = None
    attended: int = 0
    _sequence_mask: Tensor | None = None

    def to(self, device: torch.device) -> TokenTree:
        """The same tree with its tensors on `device`; `prefix_kv` stays where it is."""
        return TokenTree(*(x.to(device) if isinstance(x, Tensor) else x for x in vars(self).values()))

    def attention_mask(self, heads_per_kv: int, dtype: torch.dtype) -> Tensor:
        """The additive mask [R, 1, heads_per_kv · W, P + W] over prefix and own tokens, for the heads of one kv head.

        The first layer computes it, for all of them.
        """
        if self._attention_mask is None:
            rows, width = self.own_index.shape
            mask = torch.zeros(rows, width, width, dtype=dtype, device=self.own_index.device)
            mask = mask.masked_fill_(~self.own_mask, torch.finfo(dtype).min)
            self._attention_mask = nn.functional.pad(mask, (self.prefix_length, 0)).repeat(1, heads_per_kv, 1)[:, None]
        return self._attention_mask

    def sequence_mask(self, dtype: torch.dtype) -> Tensor:
        """The additive mask [1, 1, T, T] over the whole sequence, prefix included; not with `prefix_kv`.

        The first layer computes it, for all of them.
        """
        if self._sequence_mask is None:
            position = torch.arange(len(self.gather_index), device=self.gather_index.device)
            in_prefix, is_filler = position < self.prefix_length, (position > 0) & (self.gather_index == 0)
            own = (self.gather_index - self.prefix_length).clamp_min(0)
            row, at = own // self.own_index.shape[1], own % self.own_index.shape[1]
            attends = (row[:, None] == row) & self.own_mask[row[:, None], at[:, None], at]
            attends &= ~(in_prefix[:, None] | in_prefix)
            attends |= in_prefix & (position[:, None] >= position)
            attends &= ~(is_filler[:, None] | is_filler)
            attends |= position[:, None] == position  # a filler without any would give NaN
            mask = torch.zeros(attends.shape, dtype=dtype, device=attends.device)
            self._sequence_mask = mask.masked_fill_(~attends, torch.finfo(dtype).min)[None, None]
        return self._sequence_mask


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """The number of leading tokens that all `rows` share, leaving each row at least one token of its own."""
    first, last = min(rows), max(rows)
    n = 0
    while n < min(len(first), len(last)) and first[n] == last[n]:
        n += 1
    return min(n, min(len(row) for row in rows) - 1)


# A library that compiles a kernel for every new shape (oneDNN, for bfloat16 on a CPU) should meet few of them: W and T
# are rounded up to multiples of these.
LENGTH_MULTIPLES = (8, 32)


@dataclass
class _RowLayout:
    """Where a row's own tokens stand: `start` in the sequence; the prompt's `prompt_length` tokens come first.

    completions: (start, end) of each completion's tokens, counted from the row's start. length: of all of them.
    """

    start: int
    prompt_length: int
    completions: list[tuple[int, int]] = field(default_factory=list)
    length: int = 0


def pack_token_tree(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    prefix_kv: list[tuple[Tensor, Tensor]] | None = None,
    length_multiple: int = LENGTH_MULTIPLES[1],
) -> TokenTree:
    """Rows (`prompts` [rows][tokens]) with their completions ([rows][completions][tokens]) as token trees.

    The last token of a completion is only predicted, never fed; so labels of one token cost nothing.
    prefix_kv: see :class:`TokenTree`; all prompts begin with its P tokens. length_multiple: T is one of these.
    """
    prefix_length = common_prefix(prompts) if prefix_kv is None else prefix_kv[0][0].shape[1]
    fed_prefix = prefix_length if prefix_kv is None else 0
    ids, positions = list(prompts[0][:fed_prefix]), list(range(fed_prefix))
    logit_positions, target_ids, completion_index, layouts = [], [], [], []
    n_completions = 0
    for prompt, row_completions in zip(prompts, completions, strict=True):
        row = _RowLayout(len(ids), len(prompt) - prefix_length)
        ids += prompt[prefix_length:]
        positions += range(prefix_length, len(prompt))
        prompt_end = len(ids)
        for completion in row_completions:
            start = len(ids)
            ids += completion[:-1]
            positions += range(len(prompt), len(prompt) + len(completion) - 1)
            row.completions.append((start - row.start, len(ids) - row.start))
            logit_positions += [prompt_end - 1, *range(start, len(ids))]
            target_ids += completion
            completion_index += [n_completions] * len(completion)
            n_completions += 1
        row.length = len(ids) - row.start
        layouts.append(row)
    padding = [0] * (-len(ids) % length_multiple)
    return TokenTree(
        prefix_length,
        torch.tensor([ids + padding]),
        torch.tensor([positions + padding]),
        *_index_own_tokens(layouts, fed_prefix, len(ids), len(padding)),
        torch.tensor(logit_positions),
        torch.tensor(target_ids),
        torch.tensor(completion_index),
        max(positions, default=0) + 1,
        prefix_kv,
    )


def _index_own_tokens(
    layouts: Sequence[_RowLayout], fed_prefix: int, n_tokens: int, n_padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """own_index, own_mask and gather_index of a :class:`TokenTree` of `n_tokens` tokens and `n_padding` fillers."""
    width = -(-max(row.length for row in layouts) // LENGTH_MULTIPLES[0]) * LENGTH_MULTIPLES[0]
    own_index = torch.zeros(len(layouts), width, dtype=torch.long)
    own_mask = torch.eye(width, dtype=torch.bool).repeat(len(layouts), 1, 1)  # a filler without any would give NaN
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    gather_index = torch.arange(n_tokens + n_padding)
    gather_index[n_tokens:] = 0  # a filler gets another token's attention; no token attends to it
    for i, row in enumerate(layouts):
        prompt = slice(0, row.prompt_length)
        own_index[i, : row.length] = torch.arange(row.start, row.start + row.length)
        gather_index[row.start : row.start + row.length] = fed_prefix + i * width + torch.arange(row.length)
        own_mask[i, prompt, prompt] = causal[prompt, prompt]
        for start, end in row.completions:
            own_mask[i, start:end, prompt] = True
            own_mask[i, start:end, start:end] = causal[: end - start, : end - start]
    return own_index, own_mask, gather_index
