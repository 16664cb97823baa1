"""Generate completions for packed rows, with the shared prefix read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distillery.models.layers import output_head, transformer_body
from distillery.models.packed.attention import DecodingState, attend_by_tree, decode_with, supports_token_trees
from distillery.models.packed.token_tree import pack_token_tree


@torch.no_grad()
def decode_completions(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    prefix_kv: list[tuple[Tensor, Tensor]],
    *,
    max_new_tokens: int,
    temperature: float,
    ends: set[int],
) -> list[list[int]]:
    """The tokens that a causal `model` writes after each prompt, up to and with one of `ends`.

    prefix_kv: see :func:`compute_prefix_kv`; all prompts begin with its P tokens. Greedy when `temperature` is 0, else
    drawn from torch's random state.
    """
    body, device = transformer_body(model), next(model.parameters()).device
    tree = pack_token_tree(prompts, [[[0]]] * len(prompts), prefix_kv).to(device)
    tree.kept = {}
    with attend_by_tree(tree, body.config):
        said = body(input_ids=tree.input_ids, position_ids=tree.position_ids, use_cache=False).last_hidden_state[0]
    logits = output_head(model)(said[tree.at])
    room = [tree.kept[layer] for layer in range(len(tree.kept))]
    state = DecodingState(
        prefix_kv,
        *([nn.functional.pad(kept[k], (0, 0, 0, max_new_tokens)) for kept in room] for k in (0, 1)),
        torch.tensor([len(prompt) - prefix_kv[0][0].shape[1] for prompt in prompts], device=device),
    )
    position = torch.tensor([len(prompt) for prompt in prompts], device=device)
    out: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    with decode_with(state, body.config):
        for step in range(max_new_tokens):
            if temperature:
                token = torch.multinomial((logits.float() / temperature).softmax(-1), 1)[:, 0]
            else:
                token = logits.argmax(-1)
            for i, t in zip(alive, token.tolist(), strict=True):
                out[i].append(t)
            going = [k for k, t in enumerate(token.tolist()) if t not in ends]
            if not going or step + 1 == max_new_tokens:
                break
            if len(going) < len(alive):
                rows = torch.tensor(going, device=device)
                alive, token, position = [alive[k] for k in going], token[rows], position[rows]
                state.pick(rows)
            state.length = state.length + 1
            said = body(input_ids=token[None], position_ids=position[None], use_cache=False).last_hidden_state[0]
            logits, position = output_head(model)(said), position + 1
    return out


def compute_prefix_kv(model: nn.Module, tokens: Sequence[int]) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values [kv, P, d] of each layer for the P `tokens` that many prompts begin with.

    None where `model` takes no trees or does not keep all of them (sliding windows).
    """
    if not tokens or not supports_token_trees(model):
        return None
    ids = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    cache = transformer_body(model)(input_ids=ids, use_cache=True).past_key_values
    read = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    return read if all(k.shape[1] == len(tokens) for k, _ in read) else None
