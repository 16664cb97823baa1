"""Several teachers: the mixture of their distributions, and weights per row."""

from __future__ import annotations

import torch
from torch import Tensor

from distillery.losses.divergences import IGNORE_INDEX, LOG_FLOOR, cross_entropy
from distillery.losses.tensors import any_true, as_float, shape_text


def mix_teachers(logprobs: Tensor, weights: Tensor) -> Tensor:
    """log of the weighted mean of probabilities, log sum_t w_t p_t / sum_t w_t.

    Args:
        logprobs: [t, n, K] log-probabilities of t teachers; -inf allowed.
        weights: [t] (uniform: ones; or each teacher's validation score) or [t, n] (:func:`confidence_weights`);
            not negative, with a positive sum.
    Returns: [n, K], normalised log-probabilities.
    Space: labels or vocabulary.
    Raises: ValueError for shapes that do not fit, naming both, for negative weights or weights that are all 0.
    Source: uniform: Hinton et al. 2015, section 3 (arithmetic mean); per example: Zhang et al. 2022, eq. 3.
    """
    if logprobs.dim() != 3 or weights.shape not in (logprobs.shape[:1], logprobs.shape[:2]):
        raise ValueError(
            f"logprobs [t, n, K] and weights [t] or [t, n], not {shape_text(logprobs)} and {shape_text(weights)}"
        )
    logprobs = as_float(logprobs)
    weights = weights.to(logprobs.dtype)
    if any_true(weights < 0) or any_true(~(weights.sum(0) > 0)):
        raise ValueError("weights must not be negative and must have a positive sum")
    weights = (weights / weights.sum(0)).reshape(len(logprobs), -1, 1)
    return torch.logsumexp(logprobs.log_softmax(-1) + weights.log(), 0)


def confidence_weights(logprobs: Tensor, targets: Tensor | None = None) -> Tensor:
    """Weight of each of t teachers per example, w_k = (1 - softmax_k(u)) / (t - 1), u_k the teacher's uncertainty.

    u_k is the teacher's cross-entropy with the gold label, as in the paper. Where there is no gold label, u_k is the
    entropy of the teacher's distribution, which is the expected cross-entropy of a calibrated teacher.

    Args:
        logprobs: [t, n, K] log-probabilities at T = 1.
        targets: [n] int64 gold classes, -100 where there is none (entropy for that row); or None.
    Returns: [t, n], not negative, sums to 1 over the teachers; ones for a single teacher.
    Space: labels or vocabulary.
    Raises: ValueError for shapes that do not fit, naming both, or for classes outside 0..K-1.
    Source: Zhang, Chen & Wang 2022, "Confidence-Aware Multi-Teacher Knowledge Distillation" (CA-MKD), eq. 1-2.
    """
    if logprobs.dim() != 3 or (targets is not None and targets.shape != logprobs.shape[1:2]):
        shown = "None" if targets is None else shape_text(targets)
        raise ValueError(f"logprobs [t, n, K] and targets [n] or None, not {shape_text(logprobs)} and {shown}")
    log_p = as_float(logprobs).log_softmax(-1)
    uncertainty = -(log_p.exp() * log_p.clamp_min(LOG_FLOOR)).sum(-1)
    if targets is not None:
        nll = torch.stack([cross_entropy(teacher.clamp_min(LOG_FLOOR), targets) for teacher in log_p])
        uncertainty = torch.where(targets == IGNORE_INDEX, uncertainty, nll)
    if len(log_p) == 1:
        return torch.ones_like(uncertainty)
    return (1 - uncertainty.softmax(0)) / (len(log_p) - 1)
