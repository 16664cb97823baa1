"""Penalties that need no teacher."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distillery.losses.divergences import LOG_FLOOR
from distillery.losses.tensors import as_float, shape_text


def shortcut_penalty(student_logits: Tensor, prior: Tensor) -> Tensor:
    """KL(s_mean || prior), s_mean the mean prediction of the rows: holds a student off answering one label always.

    Args:
        student_logits: [n, K], n > 0, supervised rows only.
        prior: [K], share of each label where it matters (the gold rows); normalised here, zeros allowed.
    Returns: a scalar in nats, in [0, 87.34]. Denominator: n within the mean. It is a statistic of the rows it is
        given, not a sum over them: micro-batches do not add up to the big batch's (their mean is an upper bound, by
        convexity), so weigh each by its share of the step's rows and keep micro-batches large.
    Space: labels.
    Raises: ValueError for shapes that do not fit, naming both; no rows; a negative or all-zero prior.
    """
    if student_logits.dim() != 2 or len(student_logits) == 0 or prior.shape != student_logits.shape[1:]:
        raise ValueError(
            f"student_logits [n > 0, K] and prior [K], not {shape_text(student_logits)} and {shape_text(prior)}"
        )
    if bool((prior < 0).any()) or not bool(prior.sum() > 0):
        raise ValueError("prior must not be negative and must have a positive sum")
    logits = as_float(student_logits)
    log_mean = torch.logsumexp(logits.log_softmax(-1), 0) - math.log(len(logits))
    prior = prior.to(logits.dtype)
    return (log_mean.exp() * (log_mean - (prior / prior.sum()).log().clamp_min(LOG_FLOOR))).sum()


def multitask(label_loss: Tensor, rationale_loss: Tensor, weight: float = 1.0) -> Tensor:
    """L_label + weight x L_rationale: the student learns the answer and, as a second task, the reason.

    Args:
        label_loss, rationale_loss: scalars, each the mean over its own task's tokens (its own denominator).
        weight: >= 0; 1 in the paper.
    Returns: a scalar in nats. Space: vocabulary.
    Raises: ValueError for a negative weight, or losses that are not scalars, naming both shapes.
    Source: Hsieh et al. 2023, "Distilling Step-by-Step!", the multi-task objective of section 3.2.
    """
    if label_loss.dim() or rationale_loss.dim():
        raise ValueError(f"two scalars, not {shape_text(label_loss)} and {shape_text(rationale_loss)}")
    if not weight >= 0:
        raise ValueError(f"weight must not be negative, not {weight}")
    return label_loss + weight * rationale_loss
