"""Generate completions for packed rows, with the shared prefix computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distillery.models.head import output_logits
from distillery.models.layers import transformer_body
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
    top_p: float = 1.0,
    end_token_ids: set[int],
    direct_head: bool = True,
    step_logits: list[Tensor] | None = None,
) -> list[list[int]]:
    """The tokens that a causal `model` generates after each prompt, up to and with one of `end_token_ids`.

    prefix_kv: see :func:`compute_prefix_kv`; all prompts begin with its P tokens. temperature, top_p: see
    :func:`next_tokens`; drawn from torch's random state. direct_head: see :func:`output_logits`.
    step_logits: a list that receives the logits [unfinished rows, vocabulary] of each step.
    """
    body, device = transformer_body(model), next(model.parameters()).device
    hidden, state = _prefill(model, prompts, prefix_kv, max_new_tokens)
    logits = output_logits(model, hidden, direct_head)
    positions = torch.tensor([len(prompt) for prompt in prompts], device=device)
    completions: list[list[int]] = [[] for _ in prompts]
    unfinished = list(range(len(prompts)))
    for step in range(max_new_tokens):
        if step_logits is not None:
            step_logits.append(logits)
        tokens = next_tokens(logits, temperature, top_p)
        for i, token in zip(unfinished, tokens.tolist(), strict=True):
            completions[i].append(token)
        going = [k for k, token in enumerate(tokens.tolist()) if token not in end_token_ids]
        if not going or step + 1 == max_new_tokens:
            break
        if len(going) < len(unfinished):
            rows = torch.tensor(going, device=device)
            unfinished, tokens, positions = [unfinished[k] for k in going], tokens[rows], positions[rows]
            state.select(rows)
        state.add_token()
        with decode_with(state, body.config):
            outputs = body(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        logits, positions = output_logits(model, outputs.last_hidden_state[0], direct_head), positions + 1
    return completions


def next_tokens(logits: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """A token [rows] for each row of `logits` [rows, vocabulary]: the likeliest when `temperature` is 0, else drawn.

    top_p: draw from the likeliest tokens alone whose probabilities sum to this (nucleus sampling, Holtzman et al. 2020,
    section 3.1); 1 draws from all.
    """
    if not temperature:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked  # a token stays while those above it sum to less than `top_p`
        probabilities = torch.zeros_like(ranked).scatter(-1, order, ranked.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(probabilities, 1)[:, 0]


def _prefill(
    model: nn.Module, prompts: Sequence[Sequence[int]], prefix_kv: list[tuple[Tensor, Tensor]], max_new_tokens: int
) -> tuple[Tensor, DecodingState]:
    """Hidden states [rows, d] where the first token after each prompt is predicted, and the state to go on from."""
    body, device = transformer_body(model), next(model.parameters()).device
    tree = pack_token_tree(prompts, [[[0]]] * len(prompts), prefix_kv).to(device)  # token 0 is a placeholder, never fed
    tree.own_kv = {}
    with attend_by_tree(tree, body.config):
        hidden = body(input_ids=tree.input_ids, position_ids=tree.position_ids, use_cache=False).last_hidden_state[0]
    own_kv = [tree.own_kv[layer] for layer in range(len(tree.own_kv))]
    keys, values = ([nn.functional.pad(kv[k], (0, 0, 0, max_new_tokens)) for kv in own_kv] for k in (0, 1))
    prefix_length = prefix_kv[0][0].shape[1]
    lengths = torch.tensor([len(prompt) - prefix_length for prompt in prompts], device=device)
    return hidden[tree.logit_positions], DecodingState(prefix_kv, keys, values, lengths)


def compute_prefix_kv(model: nn.Module, tokens: Sequence[int]) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values [kv heads, P, head size] of each layer for the P `tokens` that many prompts begin with.

    None where there are no tokens, or `model` takes no trees or does not store all of them (sliding windows).
    """
    if not tokens or not supports_token_trees(model):
        return None
    input_ids = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    cache = transformer_body(model)(input_ids=input_ids, use_cache=True).past_key_values
    prefix_kv = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    return prefix_kv if all(key.shape[1] == len(tokens) for key, _ in prefix_kv) else None
