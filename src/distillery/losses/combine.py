"""From values per row to one loss: reduction with one denominator, and weighted sums of terms."""

from __future__ import annotations

import torch
from torch import Tensor

from distillery.losses.divergences import DIVERGENCE_FUNCTIONS, cross_entropy, temper, temperature_factor
from distillery.losses.tensors import shape_text


def reduce(values: Tensor, weights: Tensor | None, denominator: float | Tensor) -> Tensor:
    """sum_i w_i v_i / denominator: the loss of all terms from their values per row.

    Args:
        values: [n], one per row.
        weights: [n] (a mask, or weights per row), or None for ones. A row of weight 0 counts for nothing, even if
            its value is not finite.
        denominator: > 0, the number (or weight) of supervised positions of the whole optimizer step. Every
            accumulated micro-batch passes the same number, and their backward passes add up. So do not divide again
            by the number of micro-batches.
    Returns: a scalar in the units of `values`.
    Raises: ValueError for shapes that differ, naming both, or a denominator that is not above 0.
    """
    if values.dim() != 1 or (weights is not None and weights.shape != values.shape):
        shown = "None" if weights is None else shape_text(weights)
        raise ValueError(f"values [n] and weights [n] or None, not {shape_text(values)} and {shown}")
    if not bool(torch.as_tensor(denominator) > 0):
        raise ValueError(f"denominator must be above 0, not {denominator}: no position of this step is supervised")
    if weights is not None:
        values = values.masked_fill(weights == 0, 0) * weights
    return values.sum() / denominator


def combine_terms(
    loss: dict[str, float],
    student_logits: Tensor,
    *,
    targets: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    beta: float = 0.5,
    alpha: float = 0.1,
    denominator: float | Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A phase's loss: sum over its terms of weight x reduce(term), in one pass over the rows.

    Args:
        loss: term -> weight, e.g. {"ce": 0.5, "kl": 0.5}; terms are "ce" and those of `DISTRIBUTION_TERMS`.
        student_logits: [n, K]. Rows with mask 0 are dropped first, so they may hold anything.
        targets: [n] or [n, K], see :func:`cross_entropy`; needed by "ce".
        teacher_logprobs: [n, K] at T = 1; needed by every other term.
        temperature, beta, alpha: of the distribution terms; "ce" is always at T = 1.
        scale_by_t2: multiply the distribution terms by :func:`temperature_factor`, T**2 (T for "tvd").
        denominator: supervised positions of the whole optimizer step, see :func:`reduce`.
        mask: [n] bool, or weights per row.
    Returns:
        (total, values): a scalar to call `backward` on, and each term's reduced value, detached, without its weight
        but with its temperature factor: total == sum of loss[t] * values[t].
    Space: labels or vocabulary, the same for all terms of one call.
    Raises: ValueError for an unknown or missing term, a term whose `targets` or `teacher_logprobs` are missing, and
        as the terms do.
    """
    divergences = _check_terms(loss, targets, teacher_logprobs)
    if mask is not None:
        student_logits, targets, teacher_logprobs, mask = _drop_masked(student_logits, targets, teacher_logprobs, mask)
    tempered = temper(student_logits, teacher_logprobs, temperature) if divergences else None
    total, values = 0.0, {}
    for term, weight in loss.items():
        if term == "ce":
            row_values = cross_entropy(student_logits, targets)
        else:
            row_values = DIVERGENCE_FUNCTIONS[term](tempered, beta, alpha)
        value = reduce(row_values, mask, denominator)
        if scale_by_t2:
            value = value * temperature_factor(term, temperature)
        total = total + weight * value
        values[term] = value.detach()
    return total, values


def _check_terms(loss: dict[str, float], targets: Tensor | None, teacher_logprobs: Tensor | None) -> list[str]:
    """The divergences among the terms. Raises ValueError as :func:`combine_terms`."""
    unknown = [term for term in loss if term != "ce" and term not in DIVERGENCE_FUNCTIONS]
    if unknown or not loss:
        wrong = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"unknown loss term {wrong}; known: ce, {', '.join(DIVERGENCE_FUNCTIONS)}")
    if "ce" in loss and targets is None:
        raise ValueError("loss term 'ce' needs targets")
    divergences = [term for term in loss if term != "ce"]
    if divergences and teacher_logprobs is None:
        raise ValueError(f"loss term {divergences[0]!r} needs teacher_logprobs")
    return divergences


def _drop_masked(
    student_logits: Tensor, targets: Tensor | None, teacher_logprobs: Tensor | None, mask: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The arguments without the rows of mask 0, which may hold anything, NaN too."""
    if mask.dim() != 1 or len(mask) != len(student_logits):
        raise ValueError(f"mask must be [n]: student_logits {shape_text(student_logits)}, mask {shape_text(mask)}")
    for name, rows in (("targets", targets), ("teacher_logprobs", teacher_logprobs)):
        if rows is not None and len(rows) != len(mask):
            raise ValueError(
                f"{name} {shape_text(rows)} must have the rows of student_logits {shape_text(student_logits)}"
            )
    keep = mask != 0
    if bool(keep.all()):
        return student_logits, targets, teacher_logprobs, mask
    tensors = (student_logits, targets, teacher_logprobs, mask)
    return tuple(None if tensor is None else tensor[keep] for tensor in tensors)
