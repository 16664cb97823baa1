"""From hidden states to logits, as the whole model computes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distillery.models.layers import output_head, transformer_body


def output_logits(model: nn.Module, hidden: Tensor, direct: bool = True) -> Tensor:
    """Logits [n, vocabulary] of a causal `model` for outputs `hidden` [n, d] of its body.

    direct: whether they are what the output head gives (:func:`head_is_direct`). Where they are not, the model's own
    forward pass makes them: its body reads one token, and `hidden` takes the place of what it returns.
    """
    if direct:
        return output_head(model)(hidden)

    def replace_states(_module: nn.Module, _inputs: Any, outputs: Any) -> Any:
        outputs.last_hidden_state = hidden[None]
        return outputs

    handle = transformer_body(model).register_forward_hook(replace_states)
    try:
        return model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=hidden.device), use_cache=False).logits[0]
    finally:
        handle.remove()


def head_is_direct(model: nn.Module, tokens: list[int]) -> bool:
    """Whether the logits of a causal `model` for the row `tokens` are its output head's outputs for its body's states.

    They are not where a model scales logits (Granite, Cohere) or caps them (Gemma 2), before the head or after it.
    """
    recorded: dict[str, Tensor] = {}

    def keep_states(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
        recorded["states"] = outputs.last_hidden_state.clone()

    def keep_head(_module: nn.Module, inputs: Any, outputs: Any) -> None:
        recorded["head_input"], recorded["head_output"] = inputs[0].clone(), outputs.clone()

    head = output_head(model)
    handles = [transformer_body(model).register_forward_hook(keep_states), head.register_forward_hook(keep_head)]
    try:
        device = next(model.parameters()).device
        logits = model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if "head_output" not in recorded or not torch.equal(recorded["head_output"].float(), logits.float()):
        return False
    # OPT's forward pass calls a part of its body, to which the hook is not attached
    return "states" not in recorded or torch.equal(recorded["states"], recorded["head_input"])
