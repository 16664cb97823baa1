"""A penalty that needs no teacher."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distillery.losses.divergences import LOG_FLOOR
from distillery.losses.tensors import any_true, as_float, shape_text


def shortcut_penalty(student_logits: Tensor, prior: Tensor) -> Tensor:
    """KL(s_mean || prior), s_mean the mean prediction of the rows: keeps a student from predicting one label always.

    Args:
        student_logits: [n, K], n > 0, supervised rows only.
        prior: [K], the expected share of each label (of the gold rows); normalised here, zeros allowed.
    Returns: a scalar in nats, in [0, 87.34]. Denominator: n within the mean. It is a statistic of its rows, not a sum
        over them: the values of micro-batches do not add up to that of the whole batch (by convexity their mean is an
        upper bound). So weigh each by its share of the step's rows, and keep micro-batches large.
    Space: labels.
    Raises: ValueError for shapes that do not fit, naming both; no rows; a negative or all-zero prior.
    """
    if student_logits.dim() != 2 or len(student_logits) == 0 or prior.shape != student_logits.shape[1:]:
        raise ValueError(
            f"student_logits [n > 0, K] and prior [K], not {shape_text(student_logits)} and {shape_text(prior)}"
        )
    if any_true(prior < 0) or any_true(~(prior.sum() > 0)):
        raise ValueError("prior must not be negative and must have a positive sum")
    logits = as_float(student_logits)
    log_mean = torch.logsumexp(logits.log_softmax(-1), 0) - math.log(len(logits))
    prior = prior.to(logits.dtype)
    return (log_mean.exp() * (log_mean - (prior / prior.sum()).log().clamp_min(LOG_FLOOR))).sum()
