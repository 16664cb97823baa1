"""Hidden states at the positions where completion tokens are predicted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distillery.models.layers import transformer_body
from distillery.models.packed.attention import attend_by_tree, supports_token_trees
from distillery.models.packed.token_tree import pack_token_tree


def completion_hidden_states(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    layers: Sequence[int] = (),
    prefix_kv: list[tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Hidden states where the tokens of `completions` are predicted. prefix_kv: see :func:`compute_prefix_kv`.

    Returns hidden [u, d] at the distinct positions, then for each of the n predicted tokens its row in `hidden`, its
    id and its branch (completions counted through the rows). The gather comes before the output head, which then
    sees one contiguous matrix of wanted rows. Last, [rows, layers, d]: the outputs of `layers` (0 the embeddings) at
    each prompt's last token; None without `layers`.
    """
    body = transformer_body(model)
    device = next(model.parameters()).device
    more = {"use_cache": False, "output_hidden_states": bool(layers)}
    tree = pack_token_tree(prompts, completions, prefix_kv).to(device)
    if supports_token_trees(model):
        with attend_by_tree(tree, body.config):
            out = body(input_ids=tree.input_ids, position_ids=tree.position_ids, **more)
        if out.last_hidden_state.requires_grad and body.is_activation_checkpointing:

            def again(_: Tensor) -> None:  # the layers are computed once more during backward
                recomputing = attend_by_tree(tree, body.config)
                recomputing.__enter__()
                torch.autograd.Variable._execution_engine.queue_callback(lambda: recomputing.__exit__(None, None, None))

            out.last_hidden_state.register_hook(again)
        at = tree.at
    else:
        rows = [list(p) + list(c[:-1]) for p, cs in zip(prompts, completions, strict=True) for c in cs]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        seen = torch.zeros_like(ids)
        at = []
        starts = (len(p) for p, cs in zip(prompts, completions, strict=True) for _ in cs)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            seen[i, : len(row)] = 1
            at += range(i * width + start - 1, i * width + len(row))
        out = body(input_ids=ids.to(device), attention_mask=seen.to(device), **more)
        at = torch.tensor(at, device=device)
    at_prompt = None
    if layers:
        per_row = [sum(map(len, branches)) for branches in completions]
        firsts = at[torch.tensor([0, *per_row[:-1]], device=device).cumsum(0)]
        at_prompt = torch.stack([out.hidden_states[j].flatten(0, 1)[firsts] for j in layers], 1)
    distinct, index = torch.unique(at, return_inverse=True)
    return out.last_hidden_state.flatten(0, 1)[distinct], index, tree.target, tree.branch, at_prompt
