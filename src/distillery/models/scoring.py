"""Logits of labels and completions from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillery.models.encoding import Completion
from distillery.models.forward_methods import ForwardMethods
from distillery.models.head import output_logits
from distillery.models.last_layer import classify
from distillery.models.packed.frozen_layers import FrozenStates
from distillery.models.packed.hidden import completion_hidden_states, layer_states
from distillery.models.packed.recorded_passes import RecordedPasses


@dataclass
class ModelOutput:
    """The outputs of a model for n rows, in float32; None for what was not requested.

    label_logits: [n, labels], the label space.
    completion_logits: [m, vocabulary], at the m supervised tokens of the completions, row after row.
    completion_nll: [m], negative log-likelihoods of these tokens, in nats.
    hidden_states: [n, layers, d], of [CLS] (the first token) in an encoder, else where the answer's first token is
    predicted.
    activation_maps: [n, layers, tokens], sums of squares over the channels of a layer, 0 at padding (encoders only).
    """

    label_logits: Tensor | None = None
    completion_logits: Tensor | None = None
    completion_nll: Tensor | None = None
    hidden_states: Tensor | None = None
    activation_maps: Tensor | None = None


class TokenLogits(NamedTuple):
    """Logits of the n tokens of completions.

    logits: [u, vocabulary], float32. index: [n], the row of `logits` that predicts each token. target_ids: [n], the
    tokens. completion_index: [n], each token's completion, counted through the rows.
    prompt_states: [rows, layers, d], outputs of the requested layers where the first token is predicted, or None.
    """

    logits: Tensor
    index: Tensor
    target_ids: Tensor
    completion_index: Tensor
    prompt_states: Tensor | None


def scored_completions(
    n: int,
    labels: Sequence[list[int]],
    completions: Sequence[Sequence[Completion]] | None,
    end_token: int,
) -> list[list[Completion]]:
    """What is scored after each of `n` prompts: the tokens of `labels` first, then the row's `completions`."""
    if not labels and not completions:  # one token that is predicted and never fed costs nothing
        completions = [[([end_token], 1)]] * n
    scored_labels = [(tokens, len(tokens)) for tokens in labels]
    return [[*scored_labels, *(completions[i] if completions else [])] for i in range(n)]


def classifier_output(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    layers: Sequence[int],
    activation_maps: bool,
) -> ModelOutput:
    """Label logits of an encoder with a classification head for rows `ids`, and what is requested of `layers`."""
    batch = tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt").to(model.device)
    encoded = classify(model, batch, whole=activation_maps, output_hidden_states=bool(layers))
    output = ModelOutput(encoded.logits.float())
    if layers:
        hidden = torch.stack([encoded.hidden_states[j] for j in layers], 1).float()
        output.hidden_states = hidden[:, :, 0]
        if activation_maps:
            output.activation_maps = hidden.square().sum(-1) * batch["attention_mask"][:, None]
    return output


def causal_token_logits(
    model: PreTrainedModel,
    ids: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    layers: Sequence[int],
    prefix_kv: Any,
    methods: ForwardMethods,
    frozen: FrozenStates | None = None,
    recorded: RecordedPasses | None = None,
) -> TokenLogits:
    """Logits of a causal model for `completions` [rows][completions][tokens] after the prompts `ids`.

    methods: how to compute them; see :func:`distillery.models.forward_check.check_forward`.
    frozen, recorded: states of the frozen lower layers and recorded passes; see :func:`completion_hidden_states`.
    """
    if methods.scoring == "plain":
        return plain_token_logits(model, ids, completions, layers)
    options = {"packed": methods.scoring == "packed", "frozen": frozen, "recorded": recorded}
    states = completion_hidden_states(model, ids, completions, layers, prefix_kv, **options)
    return TokenLogits(output_logits(model, states.hidden, methods.direct_head).float(), *states[1:])


def plain_token_logits(
    model: PreTrainedModel,
    ids: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    layers: Sequence[int],
) -> TokenLogits:
    """As :func:`causal_token_logits`, by the model's own forward pass of one row at a time: slow, and right by design.

    Completions of a row that are fed the same tokens (all that are one token long) share a pass.
    """
    logits: list[Tensor] = []
    prompt_states: list[Tensor] = []
    for prompt, row in zip(ids, completions, strict=True):
        passes: dict[tuple[int, ...], Any] = {}
        for completion in row:
            fed = tuple(completion[:-1])
            if fed not in passes:
                inputs = torch.tensor([[*prompt, *fed]], device=model.device)
                passes[fed] = model(input_ids=inputs, use_cache=False, output_hidden_states=bool(layers))
            logits.append(passes[fed].logits[0, len(prompt) - 1 :].clone())  # not a view of the whole prompt's
        if layers:
            states = layer_states(next(iter(passes.values())), layers)
            prompt_states.append(torch.stack([x[0, len(prompt) - 1] for x in states]))
    flat = [completion for row in completions for completion in row]
    repeats = torch.tensor([len(completion) for completion in flat], device=model.device)
    target_ids = torch.tensor([token for completion in flat for token in completion], device=model.device)
    return TokenLogits(
        torch.cat(logits).float(),
        torch.arange(len(target_ids), device=model.device),
        target_ids,
        torch.arange(len(flat), device=model.device).repeat_interleave(repeats),
        torch.stack(prompt_states) if layers else None,
    )


def seq2seq_token_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    completions: Sequence[Sequence[list[int]]],
    layers: Sequence[int],
) -> TokenLogits:
    """As :func:`causal_token_logits`, of an encoder-decoder. A text is encoded once, whatever its completions."""
    device = model.device
    batch = tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt").to(device)
    encoded = model.get_encoder()(**batch).last_hidden_state
    flat = [completion for row in completions for completion in row]
    row = torch.tensor([i for i, of_row in enumerate(completions) for _ in of_row], device=device)
    width = max(map(len, flat))
    targets = torch.zeros(len(flat), width, dtype=torch.long)
    mask = torch.zeros(len(flat), width, dtype=torch.bool)
    for i, completion in enumerate(flat):
        targets[i, : len(completion)] = torch.tensor(completion)
        mask[i, : len(completion)] = True
    of_completion, position = (index.to(device) for index in mask.nonzero(as_tuple=True))
    targets = targets.to(device)
    start = torch.full((len(flat), 1), model.config.decoder_start_token_id, device=device)
    outputs = model(
        encoder_outputs=(encoded[row],),
        attention_mask=batch["attention_mask"][row],
        decoder_input_ids=torch.cat([start, targets[:, :-1]], 1),
        use_cache=False,
        output_hidden_states=bool(layers),
    )
    prompt_states = None
    if layers:
        first = torch.tensor([0, *(len(of_row) for of_row in completions[:-1])], device=device).cumsum(0)
        prompt_states = torch.stack([outputs.decoder_hidden_states[j][first, 0] for j in layers], 1)
    target_ids = targets[of_completion, position]
    index = torch.arange(len(target_ids), device=device)
    logits = outputs.logits[of_completion, position].float()
    return TokenLogits(logits, index, target_ids, of_completion, prompt_states)


def completion_output(
    tokens: TokenLogits, scored: Sequence[Sequence[Completion]], n_labels: int | None, supervised: bool
) -> ModelOutput:
    """The output for `scored` [rows][completions], of which a row's first `n_labels` (if not None) are its labels.

    supervised: whether to return the logits of the supervised tokens. A label's logit is its log-likelihood.
    """
    states = tokens.prompt_states
    output = ModelOutput(hidden_states=states.float() if states is not None else None)
    if n_labels is None and not supervised:
        return output
    nll = tokens.logits.logsumexp(-1)[tokens.index] - tokens.logits[tokens.index, tokens.target_ids]
    if n_labels is not None:
        # completions other than labels share one more column, which is cut off
        column = torch.tensor(
            [i * (n_labels + 1) + min(j, n_labels) for i, row in enumerate(scored) for j in range(len(row))]
        )
        scores = torch.zeros(len(scored) * (n_labels + 1), device=nll.device)
        scores = scores.index_add(0, column.to(nll.device)[tokens.completion_index], -nll)
        output.label_logits = scores.view(len(scored), -1)[:, :n_labels]
    if supervised:
        mask = [k >= skip for row in scored for completion, skip in row for k in range(len(completion))]
        mask = torch.tensor(mask).nonzero()[:, 0].to(nll.device)
        output.completion_logits, output.completion_nll = tokens.logits[tokens.index[mask]], nll[mask]
    return output
