"""Outputs of the frozen lower layers of a causal model, computed once a row while the layers above differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distillery.models.batches import batches_by_length
from distillery.models.encoding import Completion
from distillery.models.layers import configured_layers, find_layers, transformer_body
from distillery.models.packed.attention import attend_by_tree, supports_token_trees
from distillery.models.packed.token_tree import TokenTree, pack_token_tree

BATCH_SIZE = 32  # rows whose states are computed together
MAX_BYTES = 2**30  # of all states of a training run

RowKey = tuple[int, tuple[int, ...], tuple[tuple[int, ...], ...]]


@dataclass
class FrozenStates:
    """Hidden states below layer `depth` of rows that are computed again and again by the layers above.

    states: for each row (the tokens that it begins after, its prompt and its completions) [tokens, d], of all tokens
    that :func:`pack_token_tree` feeds for this row alone, its prompt first. The prefix is missing where keys and values
    of it were computed before. kept_prompts: a row that is computed whole is kept when its prompt is among these.
    """

    depth: int
    states: dict[RowKey, Tensor] = field(default_factory=dict)
    kept_prompts: set[tuple[int, ...]] = field(default_factory=set)

    def hold(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]) -> bool:
        """Whether the states of all these rows, with their prefix, are known."""
        return all(_row_key(*row) in self.states for row in zip(prompts, completions, strict=True))

    def pack(
        self, tree: TokenTree, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> Tensor | None:
        """States [1, T, d] of the tokens of `tree`, which was packed from these rows; None when one is not known."""
        skipped = _skipped_tokens(tree)
        rows = [self.states.get(_row_key(*row, skipped)) for row in zip(prompts, completions, strict=True)]
        if any(row is None for row in rows):
            return None
        fed_prefix = tree.prefix_length - skipped
        packed = torch.cat([rows[0][:fed_prefix], *(row[fed_prefix:] for row in rows)])
        return nn.functional.pad(packed, (0, 0, 0, tree.input_ids.shape[1] - len(packed)))[None]

    def keep(
        self,
        hidden: Tensor,
        tree: TokenTree,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
    ) -> None:
        """Keep what `hidden` [1, T, d], the states of the tokens of `tree`, holds of the kept prompts.

        Once the states take :data:`MAX_BYTES`, no more are kept.
        """
        rows = zip(prompts, completions, _split_rows(hidden[0], tree, prompts, completions), strict=True)
        held = sum(states.nbytes for states in self.states.values())
        for prompt, row_completions, states in rows:
            if tuple(prompt) in self.kept_prompts and held + states.nbytes <= MAX_BYTES:
                self.states[_row_key(prompt, row_completions, _skipped_tokens(tree))] = states
                held += states.nbytes


class SharedStates:
    """Frozen states for models that differ above the same lower layers alone: a teacher and the copies for its folds.

    depth: how many layers below all adapters the last trained model has. prompts: of the rows that it was trained on.
    Models whose lower layers differ, in number, weights or precision, do not see each other's states.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.prompts: set[tuple[int, ...]] = set()
        self._by_layers: dict[str, FrozenStates] = {}

    def of(self, model: nn.Module, depth: int) -> FrozenStates:
        """The states below layer `depth` of models with the lower layers of `model`, in the context's precision."""
        return self._by_layers.setdefault(_digest_lower_layers(model, depth), FrozenStates(depth))

    def for_prediction(self, model: nn.Module) -> FrozenStates | None:
        """The states from which `model` predicts, and where those of rows that were trained on are kept, if any are."""
        if not self.depth:
            return None
        states = self.of(model, self.depth)
        states.kept_prompts = self.prompts
        return states


def _skipped_tokens(tree: TokenTree) -> int:
    """How many tokens each row of `tree` begins after: those whose keys and values were computed before."""
    return 0 if tree.prefix_kv is None else tree.prefix_length


def _row_key(prompt: Sequence[int], completions: Sequence[Sequence[int]], skipped: int = 0) -> RowKey:
    return skipped, tuple(prompt), tuple(map(tuple, completions))


def _digest_lower_layers(model: nn.Module, depth: int) -> str:
    """A hash of what decides the states below layer `depth` of `model`: its weights there and its precision."""
    body = transformer_body(model)
    parent, attribute = find_layers(body, configured_layers(body.config))
    upper = {id(weight) for layer in getattr(parent, attribute)[depth:] for weight in layer.parameters()}
    device = next(body.parameters()).device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    digest = hashlib.blake2b(f"{type(body.config).__name__} {depth} {device} {precision}".encode())
    for weight in body.parameters():
        if id(weight) not in upper:
            digest.update(f"{weight.dtype} {list(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def count_frozen_layers(model: nn.Module) -> int:
    """How many of the lowest layers of a causal `model` compute the same at every step of its training.

    These are the layers that hold neither a trained weight nor a dropout. 0 when the embeddings are trained.
    """
    body = transformer_body(model)
    if body.get_input_embeddings().weight.requires_grad or getattr(body.config, "attention_dropout", 0):
        return 0
    parent, attribute = find_layers(body, configured_layers(body.config))
    for depth, layer in enumerate(getattr(parent, attribute)):
        trained = any(weight.requires_grad for weight in layer.parameters())
        if trained or any(isinstance(module, nn.Dropout) and module.p for module in layer.modules()):
            return depth
    return 0  # nothing is trained


@contextmanager
def _only_layers(body: nn.Module, layers: slice) -> Iterator[nn.ModuleList]:
    """Let `body` consist of some of its layers, within the context."""
    config = body.config
    parent, attribute = find_layers(body, configured_layers(config))
    stack, types = getattr(parent, attribute), getattr(config, "layer_types", None)
    setattr(parent, attribute, nn.ModuleList(stack[layers]))
    if types:
        config.layer_types = types[layers]
    try:
        yield getattr(parent, attribute)
    finally:
        setattr(parent, attribute, stack)
        if types:
            config.layer_types = types


@contextmanager
def continue_from(body: nn.Module, depth: int, states: Tensor) -> Iterator[None]:
    """Let `body` begin with its layer `depth` and the hidden `states` [1, T, d], within the context."""

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return (states, *args[1:]), kwargs

    with _only_layers(body, slice(depth, None)) as upper:
        hook = upper[0].register_forward_pre_hook(replace, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def above_frozen_layers(
    body: nn.Module,
    frozen: FrozenStates | None,
    tree: TokenTree,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
) -> Iterator[int]:
    """Let `body` begin above the layers of which `frozen` knows the states of all rows of `tree`, within the context.

    Where it does not know all, all layers run, and it keeps the states of the rows that it shall keep. Yields the
    number of layers that run.
    """
    layers = configured_layers(body.config)
    states = frozen.pack(tree, prompts, completions) if frozen else None
    if states is not None:
        with continue_from(body, frozen.depth, states):
            yield layers - frozen.depth
    elif frozen and frozen.kept_prompts.intersection(map(tuple, prompts)):
        parent, attribute = find_layers(body, layers)
        inputs: list[Tensor] = []
        hook = getattr(parent, attribute)[frozen.depth].register_forward_pre_hook(
            lambda _, args: inputs.append(args[0])
        )
        try:
            yield layers
        finally:
            hook.remove()
        frozen.keep(inputs[0].detach(), tree, prompts, completions)
    else:
        yield layers


@torch.no_grad()
def compute_frozen_states(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    scored: Sequence[Sequence[Completion]],
    shared: SharedStates | None = None,
) -> FrozenStates | None:
    """The states of the rows `prompts` [n][tokens] with what is `scored` after them [n][any number].

    Rows are computed in batches of a length, the same ones whatever a training run did before, so that a run that
    continues from a checkpoint sees the same states to the bit. None when no layer is frozen, when activations are
    computed again in the backward pass, when the states need more than :data:`MAX_BYTES`, and when the model computes
    something else from them than from tokens.

    shared: if it holds the states of all rows, these are returned; else the new ones are put there.
    """
    body, device = transformer_body(model), next(model.parameters()).device
    # a backward pass that computes activations again would do so without the states
    usable = supports_token_trees(model) and not body.is_activation_checkpointing
    depth = count_frozen_layers(model) if usable else 0
    completions = [[tokens for tokens, _ in row] for row in scored]
    n_tokens = sum(len(p) + sum(len(c) - 1 for c in row) for p, row in zip(prompts, completions, strict=True))
    if not depth or 4 * n_tokens * body.config.hidden_size > MAX_BYTES:
        return None
    frozen, training = FrozenStates(depth), model.training
    known = FrozenStates(depth) if shared is None else shared.of(model, depth)
    if known.hold(prompts, completions):
        return known
    model.eval()
    for number, batch in enumerate(batches_by_length(prompts, BATCH_SIZE)):
        rows = [prompts[i] for i in batch], [completions[i] for i in batch]
        tree = pack_token_tree(*rows).to(device)
        hidden = _run_lower_layers(body, depth, tree)
        states = _split_rows(hidden[0], tree, *rows)
        frozen.states |= {
            _row_key(*row): row_states for row, row_states in zip(zip(*rows, strict=True), states, strict=True)
        }
        if not number and not torch.equal(run_body(body, tree), run_body(body, tree, frozen.depth, hidden)):
            frozen = None
            break
    model.train(training)
    if frozen:
        known.states |= frozen.states
    if frozen and shared is not None:
        shared.depth = depth
        shared.prompts |= set(map(tuple, prompts))
    return frozen


def run_body(body: nn.Module, tree: TokenTree, depth: int = 0, states: Tensor | None = None) -> Tensor:
    """The last hidden states [1, T, d] of the tokens of `tree`; from `states` below layer `depth` where given."""
    with attend_by_tree(tree, body.config), continue_from(body, depth, states) if depth else nullcontext():
        return body(input_ids=tree.input_ids, position_ids=tree.position_ids, use_cache=False).last_hidden_state


def _run_lower_layers(body: nn.Module, depth: int, tree: TokenTree) -> Tensor:
    """The states [1, T, d] that the lowest `depth` layers give the next layer."""
    outputs = []
    with _only_layers(body, slice(depth)) as lower:
        hook = lower[-1].register_forward_hook(lambda layer, args, output: outputs.append(output))
        try:
            run_body(body, tree)
        finally:
            hook.remove()
    return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


def _split_rows(
    hidden: Tensor, tree: TokenTree, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
) -> list[Tensor]:
    """The states [tokens, d] of each row of `tree`, those of the shared prefix, where it is fed, before its own."""
    start, rows = tree.prefix_length - _skipped_tokens(tree), []
    prefix = hidden[:start]
    for prompt, row_completions in zip(prompts, completions, strict=True):
        end = start + len(prompt) - tree.prefix_length + sum(len(completion) - 1 for completion in row_completions)
        rows.append(torch.cat([prefix, hidden[start:end]]))
        start = end
    return rows
