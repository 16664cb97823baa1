"""Weights of rows that let rare labels count as much as frequent ones."""

from __future__ import annotations

import torch
from torch import Tensor

from distillery.losses.tensors import shape_text


def balanced_weights(labels: Tensor) -> Tensor:
    """w_i proportional to sum_k q_ik / max(n_k, 1) with n_k = sum_i q_ik, scaled to a mean of 1.

    Rows with one certain label have w_i = n / (K n_k), K the labels that occur: the weights of King and Zeng, which
    scikit-learn calls `balanced`. A row of a distribution gets its expectation of 1 / n_k. A label whose shares add up
    to less than one row counts as one row, or a few traces of probability would outweigh all else.

    Args: labels: [n, K], n > 0: for each row one-hot its label, or a distribution over the labels.
    Returns: [n], above 0, with mean 1: a loss may divide by the number of rows as without weights.
    Raises: ValueError for a shape other than [n > 0, K].
    Source: King and Zeng 2001, "Logistic Regression in Rare Events Data", section 3.2, for rows of one label.
    """
    if labels.dim() != 2 or len(labels) == 0:
        raise ValueError(f"labels must be [n > 0, K], not {shape_text(labels)}")
    labels = labels.double()
    weights = (labels / labels.sum(0).clamp_min(1)).sum(-1)
    return (weights / weights.mean()).to(torch.float32)
