"""Helpers of the losses: working precision and shapes in messages."""

from __future__ import annotations

import torch
from torch import Tensor


def as_float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def shape_text(tensor: Tensor) -> str:
    return str(list(tensor.shape))
