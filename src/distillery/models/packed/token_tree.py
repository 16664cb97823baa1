"""Rows and their completions packed into one sequence of token trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class TokenTree:
    """Rows of one batch as token trees: what all rows begin with, once, then every row's own tokens.

    shared: P, how many tokens all rows begin with. input_ids, position_ids: [1, T], these first, or without them where
    they have been read before: `read` then holds their keys and values, [kv, P, d] a layer. own: [rows, t] where each
    row's own tokens stand (short rows filled up with 0). sees: [rows, t, t] bool, which own tokens an own token may
    attend to (all see the shared ones). back: [T] position of every token in shared + own.flatten(), or in the latter.
    at: [n] positions whose next token is asked for. target: [n] that token. branch: [n] the completion it belongs to,
    counted through the rows in order.
    """

    shared: int
    input_ids: Tensor
    position_ids: Tensor
    own: Tensor
    sees: Tensor
    back: Tensor
    at: Tensor
    target: Tensor
    branch: Tensor
    read: list[tuple[Tensor, Tensor]] | None = None
    mask: Tensor | None = None
    kept: dict[int, tuple[Tensor, Tensor]] | None = None  # if a dict: gets each layer's own keys and values

    def to(self, device: torch.device) -> TokenTree:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return TokenTree(**moved)

    def masked(self, group: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of `group` heads' own tokens for shared + own tokens: [rows, 1, group t, P + t].

        Made at the first layer, for all of them.
        """
        if self.mask is None:
            rows, width = self.own.shape
            own = torch.zeros(rows, width, width, dtype=dtype, device=self.own.device)
            own = own.masked_fill_(~self.sees, torch.finfo(dtype).min)
            self.mask = nn.functional.pad(own, (self.shared, 0)).repeat(1, group, 1)[:, None]
        return self.mask


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all `rows` share, leaving each row at least one token of its own."""
    first, last = min(rows), max(rows)
    n = 0
    while n < min(len(first), len(last)) and first[n] == last[n]:
        n += 1
    return min(n, min(len(row) for row in rows) - 1)


# A library that compiles a kernel for every new shape (oneDNN, for bfloat16 on a CPU) should meet few of them: the
# rows' own lengths and that of the whole are rounded up to these.
LENGTH_MULTIPLES = (8, 32)


def pack_token_tree(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    read: list[tuple[Tensor, Tensor]] | None = None,
) -> TokenTree:
    """Rows (`prompts` [rows][tokens]) with the completions asked about ([rows][branches][tokens]) as token trees.

    The last token of a completion is only predicted, never fed; so labels of one token cost nothing.
    read: see :class:`TokenTree`; all prompts begin with its P tokens.
    """
    shared = common_prefix(prompts) if read is None else read[0][0].shape[1]
    first = shared if read is None else 0
    ids, positions = list(prompts[0][:first]), list(range(first))
    at, target, branch, rows = [], [], [], []
    n_branch = 0
    for prompt, branches in zip(prompts, completions, strict=True):
        start = len(ids)
        ids += prompt[shared:]
        positions += range(shared, len(prompt))
        end = len(ids)
        spans = []
        for completion in branches:
            here = len(ids)
            ids += completion[:-1]
            positions += range(len(prompt), len(prompt) + len(completion) - 1)
            spans.append((here - start, len(ids) - start))
            at += [end - 1, *range(here, len(ids))]
            target += completion
            branch += [n_branch] * len(completion)
            n_branch += 1
        rows.append((start, end - start, len(ids) - start, spans))
    width = -(-max(length for _, _, length, _ in rows) // LENGTH_MULTIPLES[0]) * LENGTH_MULTIPLES[0]
    fill = -len(ids) % LENGTH_MULTIPLES[1]
    own = torch.zeros(len(rows), width, dtype=torch.long)
    sees = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)  # a filler sees itself, or softmax gives NaN
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    back = torch.arange(len(ids) + fill)
    back[len(ids) :] = 0  # a filler gets somebody else's attention; nobody sees it
    for i, (start, stem, length, spans) in enumerate(rows):
        own[i, :length] = torch.arange(start, start + length)
        back[start : start + length] = first + i * width + torch.arange(length)
        sees[i, :stem, :stem] = causal[:stem, :stem]
        for a, b in spans:
            sees[i, a:b, :stem] = True
            sees[i, a:b, a:b] = causal[: b - a, : b - a]
    return TokenTree(
        shared,
        torch.tensor([ids + [0] * fill]),
        torch.tensor([positions + [0] * fill]),
        own,
        sees,
        back,
        torch.tensor(at),
        torch.tensor(target),
        torch.tensor(branch),
        read,
    )
