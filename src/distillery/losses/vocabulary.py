"""Vocabularies that differ, and teacher distributions stored as their top-k tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distillery.losses.divergences import LOG_FLOOR
from distillery.losses.tensors import as_float, shape_text

MAX_VOCABULARY_PADDING = 512  # see `shared_vocabulary`


def universal_logit_distance(student_logits: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Universal logit distance: sum_i |s_(i) - p_(i)| over probabilities sorted from the largest, zeros appended.

    The closed form of a Wasserstein distance with equal costs. It compares how peaked the two distributions are, not
    on which tokens, so it needs no shared vocabulary.

    Args:
        student_logits: [n, K_s]; teacher_logprobs: [n, K_t], at T = 1; row i of both is the i-th completion position
            (the caller cuts both to the shorter completion).
    Returns: [n], dimensionless, in [0, 2). Denominator: none, one value per row.
    Space: vocabulary; the two may differ.
    Raises: ValueError for other than [n, K_s] and [n, K_t], naming both.
    Source: Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss",
        the closed form of the Wasserstein distance, at one step, without the weight lambda.
    """
    _check_rows(student_logits, teacher_logprobs)
    logits = as_float(student_logits)
    s = logits.softmax(-1).sort(-1, descending=True).values
    p = teacher_logprobs.to(logits.dtype).softmax(-1).sort(-1, descending=True).values
    width = max(s.shape[1], p.shape[1])
    return (F.pad(s, (0, width - s.shape[1])) - F.pad(p, (0, width - p.shape[1]))).abs().sum(-1)


def _check_rows(student_logits: Tensor, teacher_logprobs: Tensor) -> None:
    """Raise ValueError for other than [n, K_s] and [n, K_t], naming both."""
    if student_logits.dim() != 2 or teacher_logprobs.dim() != 2 or len(student_logits) != len(teacher_logprobs):
        raise ValueError(
            f"student_logits [n, K_s] and teacher_logprobs [n, K_t], "
            f"not {shape_text(student_logits)} and {shape_text(teacher_logprobs)}"
        )


def shared_vocabulary(student_logits: Tensor, teacher_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Cut two differently padded vocabularies to the ids they share, the first min(K_s, K_t), and renormalise.

    Models of one family round the same tokenizer's vocabulary up to different multiples (151,936 and 152,064), and the
    ids past the smaller size are padding. This rule separates padding from another tokenizer: the difference is under
    512 and at most a tenth, and the larger size is a multiple of 64. Equal sizes pass. Two *different* tokenizers of
    similar size pass too: the code that loads the models must compare their tokenizers.

    Args: student_logits: [n, K_s]; teacher_logprobs: [n, K_t] at T = 1.
    Returns: (student_logits [n, K], teacher_logprobs [n, K], normalised).
    Space: vocabulary.
    Raises: ValueError for other than [n, K_s] and [n, K_t], or sizes that padding does not explain, naming both.
    """
    _check_rows(student_logits, teacher_logprobs)
    student_size, teacher_size = student_logits.shape[1], teacher_logprobs.shape[1]
    if student_size == teacher_size:
        return student_logits, teacher_logprobs
    small, large = sorted((student_size, teacher_size))
    if large - small >= MAX_VOCABULARY_PADDING or 10 * (large - small) > large or large % 64:
        raise ValueError(
            f"vocabularies of {student_size} (student) and {teacher_size} (teacher) tokens differ by more than "
            f"padding: they may differ by less than {MAX_VOCABULARY_PADDING} and a tenth, the larger being a multiple "
            f"of 64; for another tokenizer use universal_logit_distance"
        )
    return student_logits[:, :small], as_float(teacher_logprobs[:, :small]).log_softmax(-1)


def to_top_k(logprobs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A distribution as its k likeliest outcomes and, in one bucket, the mass of all others (the tail).

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


def merge_rest(student_logits: Tensor, values: Tensor, indices: Tensor, log_tail: Tensor) -> tuple[Tensor, Tensor]:
    """Student and teacher over k + 1 outcomes: the teacher's top k tokens, and all other tokens as one.

    Every divergence of this package but `uld` is an f-divergence. None of them is above that of the whole
    distributions, as merging outcomes loses information (data-processing inequality). At T = 1 only: the mass of the
    tail at another temperature depends on the single tokens in it, which are not stored.

    Args: student_logits: [n, K]; values, indices [n, k] and log_tail [n] from :func:`to_top_k`.
    Returns: (log-probabilities of the student [n, k + 1], of the teacher [n, k + 1]).
    Space: vocabulary.
    Raises: ValueError for shapes that do not fit, naming them.
    Source: Csiszar 1967, "Information-type measures of difference of probability distributions", for the inequality.
    """
    if student_logits.dim() != 2 or values.shape != indices.shape or log_tail.shape != values.shape[:1]:
        raise ValueError(
            f"student_logits [n, K], values and indices [n, k], log_tail [n], not {shape_text(student_logits)}, "
            f"{shape_text(values)}, {shape_text(indices)}, {shape_text(log_tail)}"
        )
    if values.dim() != 2 or len(values) != len(student_logits) or values.shape[1] > student_logits.shape[1]:
        raise ValueError(
            f"student_logits [n, K] and values [n, k], not {shape_text(student_logits)} and {shape_text(values)}"
        )
    log_s = as_float(student_logits).log_softmax(-1)
    # the student's tail is empty when k == K: a finite floor keeps 0 x (-inf - -inf) from being NaN
    tail = _tail(log_s, indices).clamp_min(torch.finfo(log_s.dtype).min)
    log_p = torch.cat([values, log_tail[:, None]], 1).to(log_s.dtype).log_softmax(-1)
    # a teacher that gave fewer than k tokens has the first of them again, with probability 0: it counts once
    repeated = F.pad(indices[:, 1:] == indices[:, :1], (1, 0))
    top = log_s.gather(1, indices).masked_fill(repeated, torch.finfo(log_s.dtype).min)
    return torch.cat([top, tail[:, None]], 1), log_p


def kl_top_k(student_logits: Tensor, values: Tensor, indices: Tensor, log_tail: Tensor) -> Tensor:
    """KL(p || s) over the k + 1 outcomes of :func:`merge_rest`; never above the full KL.

    Args, Raises: as for :func:`merge_rest`.
    Returns: [n] nats, in [0, inf). Denominator: none, one value per row.
    Space: vocabulary.
    """
    log_s, log_p = merge_rest(student_logits, values, indices, log_tail)
    return (log_p.exp() * (log_p.clamp_min(LOG_FLOOR) - log_s)).sum(-1)


def kl_sampled_rest(
    student_logits: Tensor, values: Tensor, indices: Tensor, log_tail: Tensor, samples: Tensor, entropy: Tensor
) -> Tensor:
    """KL(p || s) over all outcomes, from the teacher's top k tokens and tokens drawn from the rest.

    The top counts exactly. Of the rest, sum p log p is known from its mass and entropy, and sum p log s is the mean
    over the drawn tokens. So value and gradient are those of the full KL on average over the draws; one row may be off
    in both directions, and below 0. At T = 1 only.

    Args: as for :func:`merge_rest`, and
        samples: [n, m] int64, tokens drawn from the rest in proportion to the teacher's probability.
        entropy: [n] nats, of the teacher's distribution over the rest.
    Returns: [n] nats. Denominator: none, one value per row.
    Space: vocabulary.
    Raises: as :func:`merge_rest`; ValueError for samples and an entropy that do not fit.
    Source: Anshumann et al. 2025, "Sparse Logit Sampling", for estimates from sampled tokens; here only the rest is
        sampled, and its entropy is exact.
    """
    if samples.dim() != 2 or not samples.shape[1] or not len(samples) == len(entropy) == len(values):
        raise ValueError(
            f"samples [n, m] with m > 0 and entropy [n], not {shape_text(samples)} and {shape_text(entropy)} "
            f"beside values {shape_text(values)}"
        )
    log_s, log_p = merge_rest(student_logits, values, indices, log_tail)
    p, log_p = log_p.exp(), log_p.clamp_min(LOG_FLOOR)
    top = (p[:, :-1] * (log_p[:, :-1] - log_s[:, :-1])).sum(-1)
    drawn = as_float(student_logits).log_softmax(-1).gather(1, samples).mean(-1)
    return top + p[:, -1] * (log_p[:, -1] - entropy.to(log_p.dtype) - drawn)


def _tail(log_p: Tensor, indices: Tensor) -> Tensor:
    # Not log(1 - top): that is -inf, with an infinite gradient, where float32 rounds the mass of the top to 1.
    if indices.shape[1] == log_p.shape[1]:
        return log_p.new_full((len(log_p),), -torch.inf)
    return log_p.scatter(1, indices, -torch.inf).logsumexp(-1)
