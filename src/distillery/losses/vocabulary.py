"""Vocabularies that differ, and teachers stored as their top-k tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distillery.losses.divergences import LOG_FLOOR, kl
from distillery.losses.tensors import as_float, shape_text

MAX_VOCABULARY_PADDING = 512  # see `shared_vocabulary`


# Other tokenizers, other objectives


def universal_logit_distance(student_logits: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Universal logit distance: sum_i |s_(i) - p_(i)| over probabilities sorted from the largest, zeros appended.

    The closed form of a Wasserstein distance with equal costs: how peaked the two are, not on what. It needs no shared
    vocabulary, which is what it is for.

    Args:
        student_logits: [n, K_s]; teacher_logprobs: [n, K_t], at T = 1; row i of both is the i-th completion position
            (cut to the shorter completion by the caller).
    Returns: [n], dimensionless, in [0, 2). Denominator: none, one value per row.
    Space: vocabulary; the two may differ.
    Raises: ValueError for other than [n, K_s] and [n, K_t], naming both.
    Source: Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss",
        the closed form of the Wasserstein distance, at one step, without the weight lambda.
    """
    if student_logits.dim() != 2 or teacher_logprobs.dim() != 2 or len(student_logits) != len(teacher_logprobs):
        raise ValueError(
            f"student_logits [n, K_s] and teacher_logprobs [n, K_t], "
            f"not {shape_text(student_logits)} and {shape_text(teacher_logprobs)}"
        )
    logits = as_float(student_logits)
    ours = logits.softmax(-1).sort(-1, descending=True).values
    theirs = teacher_logprobs.to(logits.dtype).softmax(-1).sort(-1, descending=True).values
    width = max(ours.shape[1], theirs.shape[1])
    return (F.pad(ours, (0, width - ours.shape[1])) - F.pad(theirs, (0, width - theirs.shape[1]))).abs().sum(-1)


def shared_vocabulary(student_logits: Tensor, teacher_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Cut two differently padded vocabularies to the ids they share, the first min(K_s, K_t), and renormalise.

    Models of one family round the same tokenizer's vocabulary up to different multiples (151,936 and 152,064), and the
    ids past the smaller one are padding. Sizes tell padding from another tokenizer by this rule: the difference is
    under 512 and at most a tenth, and the larger is a multiple of 64. Equal sizes pass. That two *different*
    tokenizers have near sizes cannot be seen here: whoever loads the models compares their tokenizers.

    Args: student_logits: [n, K_s]; teacher_logprobs: [n, K_t] at T = 1.
    Returns: (student_logits [n, K], teacher_logprobs [n, K], normalised).
    Space: vocabulary.
    Raises: ValueError for other than [n, K_s] and [n, K_t], or sizes that padding does not explain, naming both.
    """
    if student_logits.dim() != 2 or teacher_logprobs.dim() != 2 or len(student_logits) != len(teacher_logprobs):
        raise ValueError(
            f"student_logits [n, K_s] and teacher_logprobs [n, K_t], "
            f"not {shape_text(student_logits)} and {shape_text(teacher_logprobs)}"
        )
    ours, theirs = student_logits.shape[1], teacher_logprobs.shape[1]
    if ours == theirs:
        return student_logits, teacher_logprobs
    small, large = sorted((ours, theirs))
    if large - small >= MAX_VOCABULARY_PADDING or 10 * (large - small) > large or large % 64:
        raise ValueError(
            f"vocabularies of {ours} (student) and {theirs} (teacher) tokens differ by more than padding: they may "
            f"differ by less than {MAX_VOCABULARY_PADDING} and a tenth, the larger being a multiple of 64; "
            f"for another tokenizer use universal_logit_distance"
        )
    return student_logits[:, :small], as_float(teacher_logprobs[:, :small]).log_softmax(-1)


# Teachers stored as their top k tokens


def to_top_k(logprobs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A distribution as its k likeliest outcomes and the mass of all others in one bucket.

    Args: logprobs: [n, K], log-probabilities at T = 1; 1 <= k <= K.
    Returns: (values [n, k], indices [n, k] int64, log_tail [n]); log_tail is -inf where nothing is left.
    Space: vocabulary.
    Raises: ValueError for other than [n, K], or k outside 1..K.
    """
    if logprobs.dim() != 2 or not 1 <= k <= logprobs.shape[1]:
        raise ValueError(f"logprobs [n, K] with 1 <= k <= K, not {shape_text(logprobs)} with k = {k}")
    log_p = as_float(logprobs).log_softmax(-1)
    values, indices = log_p.topk(k, dim=-1)
    return values, indices, _tail(log_p, indices)


def kl_top_k(
    student_logits: Tensor, values: Tensor, indices: Tensor, log_tail: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL(p || s) over k + 1 outcomes: the teacher's top k tokens, and all other tokens as one.

    Never above the full KL (merging outcomes loses information); :func:`top_k_error` says by how much.

    Args:
        student_logits: [n, K]; values, indices [n, k] and log_tail [n] from :func:`to_top_k`.
        temperature: 1. The tail's mass at another temperature depends on how it was spread, which is not stored.
    Returns: [n] nats, in [0, inf). Denominator: none, one value per row.
    Space: vocabulary.
    Raises: ValueError for a temperature other than 1, or shapes that do not fit, naming them.
    """
    if temperature != 1:
        raise ValueError(
            f"top-k signals hold at temperature 1 only, not {temperature}: the tail's mass at another temperature is "
            f"not stored; keep full log-probabilities, or set temperature to 1"
        )
    return _bucket_kl(student_logits, values, indices, log_tail, 1.0)


def top_k_error(student_logits: Tensor, teacher_logprobs: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Relative error of the top-k loss against the full one, |KL_k - KL| / KL, per row.

    At another temperature than 1 this measures what :func:`kl_top_k` refuses: stored values and tail divided by the
    temperature and renormalised as k + 1 outcomes.

    Args: student_logits, teacher_logprobs: [n, K]; k: outcomes kept; temperature: > 0.
    Returns: [n], a share (0.08 is 8 %); 0 where both are equal.
    Space: vocabulary.
    Raises: as :func:`kl` and :func:`to_top_k`.
    """
    full = kl(student_logits, teacher_logprobs, temperature)
    part = _bucket_kl(student_logits, *to_top_k(teacher_logprobs, k), temperature)
    return torch.where(full == part, torch.zeros_like(full), (part - full).abs() / full.abs())


def _bucket_kl(student_logits: Tensor, values: Tensor, indices: Tensor, log_tail: Tensor, temperature: float) -> Tensor:
    if student_logits.dim() != 2 or values.shape != indices.shape or log_tail.shape != values.shape[:1]:
        raise ValueError(
            f"student_logits [n, K], values and indices [n, k], log_tail [n], not {shape_text(student_logits)}, "
            f"{shape_text(values)}, {shape_text(indices)}, {shape_text(log_tail)}"
        )
    if values.dim() != 2 or len(values) != len(student_logits) or values.shape[1] > student_logits.shape[1]:
        raise ValueError(
            f"student_logits [n, K] and values [n, k], not {shape_text(student_logits)} and {shape_text(values)}"
        )
    log_s = (as_float(student_logits) / temperature).log_softmax(-1)
    log_s = torch.cat([log_s.gather(1, indices), _tail(log_s, indices)[:, None]], 1)
    log_p = (torch.cat([values, log_tail[:, None]], 1).to(log_s.dtype) / temperature).log_softmax(-1)
    # Both tails are empty when k == K: the floor keeps 0 x (-inf - -inf) from being NaN.
    return (log_p.exp() * (log_p.clamp_min(LOG_FLOOR) - log_s.clamp_min(torch.finfo(log_s.dtype).min))).sum(-1)


def _tail(log_p: Tensor, indices: Tensor) -> Tensor:
    # Summed over the others, not 1 - top: that cancels to nothing (and an infinite gradient) where the top holds all.
    if indices.shape[1] == log_p.shape[1]:
        return log_p.new_full((len(log_p),), -torch.inf)
    return log_p.scatter(1, indices, -torch.inf).logsumexp(-1)
