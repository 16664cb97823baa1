"""Label sets: every label of a row as a decision of its own between two outcomes, `no` and `yes`."""

from __future__ import annotations

import torch
from torch import Tensor

from distillery.losses.tensors import any_true, as_float, shape_text


def two_outcome_logits(label_logits: Tensor) -> Tensor:
    """Logits [n, K] of labels as logits of `no` and `yes`: [n * K, 2], the labels of a row one after the other.

    With `no` at 0 the softmax of the two is the sigmoid, also at a temperature. So every term over K outcomes becomes
    its binary form: `cross_entropy` is the binary cross-entropy, `kl` the binary divergence. :func:`reduce` with the
    denominator n * K then gives the mean over labels, as `BCEWithLogitsLoss` does.

    Raises: ValueError for a shape other than [n, K].
    """
    if label_logits.dim() != 2:
        raise ValueError(f"label_logits must be [n, K], not {shape_text(label_logits)}")
    yes = as_float(label_logits).reshape(-1)
    return torch.stack([torch.zeros_like(yes), yes], dim=-1)


def two_outcome_probabilities(probabilities: Tensor) -> Tensor:
    """Probabilities [..., K] of labels, or a set as 0 and 1, as distributions over `no` and `yes`: [..., K, 2].

    Raises: ValueError for values outside [0, 1].
    """
    if any_true((probabilities < 0) | (probabilities > 1) | probabilities.isnan()):
        raise ValueError("probabilities of labels must be from 0 to 1")
    return torch.stack([1 - probabilities, probabilities], dim=-1)
