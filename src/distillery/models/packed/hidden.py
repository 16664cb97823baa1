"""Hidden states at the positions where completion tokens are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distillery.errors import UserError
from distillery.models.last_layer import read_last_layer_at
from distillery.models.layers import transformer_body
from distillery.models.packed.attention import attend_by_tree, supports_token_trees
from distillery.models.packed.frozen_layers import FrozenStates, above_frozen_layers
from distillery.models.packed.recorded_passes import TOKENS_MULTIPLE, RecordedPasses
from distillery.models.packed.token_tree import LENGTH_MULTIPLES, TokenTree, pack_token_tree


class CompletionStates(NamedTuple):
    """Hidden states where the n tokens of completions are predicted.

    hidden: [u, d], at the distinct positions. index: [n], the row of `hidden` that predicts each token.
    target_ids: [n], the tokens. completion_index: [n], each token's completion, counted through the rows.
    prompt_states: [rows, layers, d], outputs of the requested layers at each prompt's last token, or None.
    """

    hidden: Tensor
    index: Tensor
    target_ids: Tensor
    completion_index: Tensor
    prompt_states: Tensor | None


def completion_hidden_states(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    layers: Sequence[int] = (),
    prefix_kv: list[tuple[Tensor, Tensor]] | None = None,
    *,
    packed: bool = True,
    frozen: FrozenStates | None = None,
    recorded: RecordedPasses | None = None,
) -> CompletionStates:
    """Hidden states of a causal `model` where the tokens of `completions` [rows][completions][tokens] are predicted.

    The gather comes before the output head, which then gets one contiguous matrix of the wanted positions.
    layers: of which to return the prompts' states (0 the embeddings). prefix_kv: see :func:`compute_prefix_kv`.
    packed: whether rows are token trees, where the model takes them; else a padded batch.
    frozen: states of the frozen lower layers, see :func:`above_frozen_layers`; not with `layers`.
    recorded: passes of the layers as CUDA graphs, taken where they can be; not with `layers`, nor without gradients.
    Raises ValueError where a layer mixes tokens in another way than trees know.
    """
    body, device = transformer_body(model), next(model.parameters()).device
    options = {"use_cache": False, "output_hidden_states": bool(layers)}
    multiple = TOKENS_MULTIPLE if recorded and recorded.usable else LENGTH_MULTIPLES[1]
    tree = pack_token_tree(prompts, completions, prefix_kv, multiple)
    trees = packed and supports_token_trees(model)
    inputs, positions = ({}, tree.logit_positions) if trees else _pad_rows(prompts, completions, device)
    distinct, index = torch.unique(positions, return_inverse=True)  # of numbers that the CPU has
    distinct, tree = distinct.to(device), tree.to(device)
    outputs: Any = None
    last_hidden = None
    if trees and recorded and not layers and recorded.takes(tree):
        last_hidden = recorded.run(tree, frozen.pack(tree, prompts, completions) if frozen else None)
    if last_hidden is None:
        if trees:
            lower = above_frozen_layers(body, None if layers else frozen, tree, prompts, completions)
            outputs = _run_tree(body, tree, distinct, lower, options)
        else:
            with read_last_layer_at(body, distinct):
                outputs = body(**inputs, **options)
        last_hidden = outputs.last_hidden_state
    prompt_states = None
    if layers:
        tokens_per_row = [sum(map(len, row)) for row in completions]
        first = positions[torch.tensor([0, *tokens_per_row[:-1]]).cumsum(0)].to(device)
        prompt_states = torch.stack([x.flatten(0, 1)[first] for x in layer_states(outputs, layers)], 1)
    hidden = last_hidden.flatten(0, 1)[distinct]
    return CompletionStates(hidden, index.to(device), tree.target_ids, tree.completion_index, prompt_states)


def _run_tree(
    body: nn.Module, tree: TokenTree, positions: Tensor, lower: AbstractContextManager[int], options: dict[str, Any]
) -> Any:
    """The outputs of `body` for the tokens of `tree`, at `positions` alone in its last layer.

    lower: the context in which frozen layers are left out; it gives the number of those that run.
    """
    with attend_by_tree(tree, body.config), read_last_layer_at(body, positions), lower as depth:
        outputs = body(input_ids=tree.input_ids, position_ids=tree.position_ids, **options)
    if tree.attended < depth:
        raise ValueError(f"only {tree.attended} of its {depth} layers are attention")
    if outputs.last_hidden_state.requires_grad and body.is_activation_checkpointing:
        _attend_by_tree_in_backward(outputs.last_hidden_state, tree, body.config)
    return outputs


def layer_states(outputs: Any, layers: Sequence[int]) -> list[Tensor]:
    """The hidden states [rows, tokens, d] of `layers` in a model's `outputs`.

    Raises UserError where a layer has several states a token (Gemma 3n).
    """
    states = [outputs.hidden_states[j] for j in layers]
    if any(x.dim() != 3 for x in states):
        raise UserError("phases: loss: this model has several hidden states a token; use terms without hidden states")
    return states


def _attend_by_tree_in_backward(hidden: Tensor, tree: TokenTree, config: Any) -> None:
    """Attend over `tree` again while the backward pass from `hidden` recomputes checkpointed layers."""

    def enter(_: Tensor) -> None:
        recomputing = attend_by_tree(tree, config)
        recomputing.__enter__()
        torch.autograd.Variable._execution_engine.queue_callback(lambda: recomputing.__exit__(None, None, None))

    hidden.register_hook(enter)


def _pad_rows(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Without trees: each completion after its prompt as a padded row of its own.

    Returns the model's inputs on `device`, and the positions in the flattened batch where completion tokens are
    predicted, on the CPU.
    """
    rows = [(list(prompt), c) for prompt, row in zip(prompts, completions, strict=True) for c in row]
    width = max(len(prompt) + len(completion) - 1 for prompt, completion in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    positions: list[int] = []
    for i, (prompt, completion) in enumerate(rows):
        tokens = prompt + list(completion[:-1])
        input_ids[i, : len(tokens)] = torch.tensor(tokens)
        attention_mask[i, : len(tokens)] = 1
        positions += range(i * width + len(prompt) - 1, i * width + len(tokens))
    inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
    return inputs, torch.tensor(positions)
