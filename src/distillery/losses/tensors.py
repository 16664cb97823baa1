"""Helpers of the losses: working precision and shapes in messages."""

from __future__ import annotations

import torch
from torch import Tensor


def as_float(tensor: Tensor) -> Tensor:
    """`tensor` in float32; a float64 tensor stays as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def any_true(condition: Tensor) -> bool:
    """Whether any element of `condition` is true; False unless it lies on the CPU.

    A GPU would have to be waited for at every step, and on the `meta` device no value is known.
    """
    return condition.device.type == "cpu" and bool(condition.any())


def shape_text(tensor: Tensor) -> str:
    """The shape of `tensor` for a message: `[3, 4]`."""
    return str(list(tensor.shape))
