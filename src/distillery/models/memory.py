"""Parameters, and the bytes that training them takes."""

from __future__ import annotations

import torch
from torch import nn

from distillery.models.layers import transformer_body


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters; a 4-bit weight counts as the numbers it stands for."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
        total += size
        trainable += size if parameter.requires_grad else 0
    return total, trainable


# frozen linear layers, frozen rest, and trained weights with their gradient and AdamW's two states
BYTES_PER_PARAMETER = {
    "full, 32 bits": (0.0, 0.0, {"weights": 4, "gradients": 4, "optimizer": 8, "copies": 0}),
    "full, 16 bits": (0.0, 0.0, {"weights": 2, "gradients": 2, "optimizer": 8, "copies": 0}),
    "full, mixed": (0.0, 0.0, {"weights": 2, "gradients": 2, "optimizer": 8, "copies": 4}),  # weights in 32 bits beside
    "LoRA, 16 bits": (2.0, 2.0, {"weights": 4, "gradients": 4, "optimizer": 8, "copies": 0}),
    # 4 bits, and a scale for each 64 weights that takes 8 bits and 32 / 256 more (Dettmers et al. 2023, section 3)
    "QLoRA, 4 bits": (
        (4 + 8 / 64 + 32 / (64 * 256)) / 8,
        2.0,
        {"weights": 4, "gradients": 4, "optimizer": 8, "copies": 0},
    ),
}


def predicted_memory(model: nn.Module, kind: str, r: int = 16) -> dict[str, float]:
    """Bytes that training `model` holds, without activations: weights, gradients, optimizer, copies and their total.

    kind: of `MEMORY`. r: rank of the adapters in every linear layer but the output head. Only shapes are looked at, so
    a model on the `meta` device will do.
    """
    body = transformer_body(model)
    linear = [module for module in body.modules() if isinstance(module, nn.Linear)]
    within = sum(module.weight.numel() for module in linear)
    rest = sum(parameter.numel() for parameter in model.parameters()) - within
    frozen_linear, frozen_rest, each = BYTES_PER_PARAMETER[kind]
    adapted = not kind.startswith("full")
    trained = sum(r * (m.in_features + m.out_features) for m in linear) if adapted else within + rest
    out = {what: float(size * trained) for what, size in each.items()}
    out["weights"] += frozen_linear * within + frozen_rest * rest
    return out | {"total": sum(out.values())}
