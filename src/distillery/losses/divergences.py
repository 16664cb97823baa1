"""Divergences of two distributions, in nats, one value per row."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distillery.losses.tensors import any_true, as_float, shape_text

LOG_FLOOR = math.log(torch.finfo(torch.float32).tiny)  # -87.34
IGNORE_INDEX = -100  # the target of a row without a label, as in torch


def kl(student_logits: Tensor, teacher_logprobs: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward Kullback-Leibler divergence KL(p || s) = sum_k p_k (log p_k - log s_k), the classic distillation loss.

    p = softmax(teacher_logprobs / T) and s = softmax(student_logits / T). No T**2: see :func:`temperature_factor`.

    Args:
        student_logits: [n, K], any float dtype, finite.
        teacher_logprobs: [n, K], log-probabilities at T = 1; -inf for a probability of 0. They are renormalised.
        temperature: T > 0 of both sides.
    Returns:
        [n] nats, in [0, inf). Denominator: none, one value per row (see :func:`reduce`).
    Space: labels or vocabulary.
    Raises: ValueError for shapes other than two equal [n, K], or a temperature that is not positive.
    Source: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    return _kl(*temper(student_logits, teacher_logprobs, temperature))


def reverse_kl(student_logits: Tensor, teacher_logprobs: Tensor, temperature: float = 1.0) -> Tensor:
    """Reverse Kullback-Leibler divergence KL(s || p) = sum_k s_k (log s_k - log p_k): mode-seeking.

    Where the teacher's tempered probability is below exp(`LOG_FLOOR`) = 1.2e-38 it counts as that, so one outcome
    costs at most 87.34 nats instead of an infinity.

    Args, Raises: as for :func:`kl`.
    Returns: [n] nats, in [0, 87.34]. Denominator: none, one value per row.
    Space: labels or vocabulary.
    Source: Gu et al. 2024, "MiniLLM: Knowledge Distillation of Large Language Models", eq. 1.
    """
    return _reverse_kl(*temper(student_logits, teacher_logprobs, temperature))


def jsd(
    student_logits: Tensor,
    teacher_logprobs: Tensor,
    temperature: float = 1.0,
    beta: float = 0.5,
    scaled: bool = False,
) -> Tensor:
    """Generalized Jensen-Shannon divergence, beta KL(p || m) + (1 - beta) KL(s || m) with m = beta p + (1 - beta) s.

    `beta` is the teacher's weight in the mixture, as in the paper and in TRL. Near the ends the divergence goes to 0
    in value *and in gradient*, like beta KL(p || s) and (1 - beta) KL(s || p). So its continuous value at an end is 0,
    which trains nothing. TRL returns a KL there, so that its loss jumps by orders of magnitude between 0.01 and 0. A
    user means neither, so the ends are an error, and the message names the term to use instead.

    `scaled=True` divides by beta (1 - beta). That is continuous on the closed interval: exactly KL(p || s) at 0, the
    Jeffreys-like middle, exactly KL(s || p) at 1, and the size of its gradient hardly depends on beta. Use it to sweep
    beta. Its rounding error grows as 1 / (beta (1 - beta)): about 1e-5 at 0.01 in float32.

    Args: as for :func:`kl`, and
        beta: in (0, 1); in [0, 1] when `scaled`.
        scaled: divide by beta (1 - beta).
    Returns: [n] nats, in [0, H(beta)] with H(beta) = -beta log beta - (1 - beta) log(1 - beta), at most log 2;
        [0, inf) when scaled. Symmetric at beta 0.5. Denominator: none, one value per row.
    Space: labels or vocabulary.
    Raises: as :func:`kl`; ValueError for `beta` outside its range.
    Source: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), eq. 1; the limits are given there.
    """
    if not scaled:
        return _jsd(*temper(student_logits, teacher_logprobs, temperature), beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], not {beta}")
    if beta == 0:
        return kl(student_logits, teacher_logprobs, temperature)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logprobs, temperature)
    return _jsd(*temper(student_logits, teacher_logprobs, temperature), beta) / (beta * (1 - beta))


def skew_kl(student_logits: Tensor, teacher_logprobs: Tensor, temperature: float = 1.0, alpha: float = 0.1) -> Tensor:
    """Skew Kullback-Leibler divergence KL(p || alpha p + (1 - alpha) s): forward KL with a bounded gradient.

    Args: as for :func:`kl`, and `alpha` in [0, 1): 0 is :func:`kl`; at 1 the loss would be 0 for any student.
    Returns: [n] nats, in [0, -log alpha]. Denominator: none, one value per row.
    Space: labels or vocabulary.
    Raises: as :func:`kl`; ValueError for `alpha` outside [0, 1).
    Source: Ko et al. 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models", section 3.1 (SKL).
    """
    return _skew_kl(*temper(student_logits, teacher_logprobs, temperature), alpha)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logprobs: Tensor, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """Skew reverse Kullback-Leibler divergence KL(s || (1 - alpha) p + alpha s): reverse KL, bounded where p is 0.

    Args: as for :func:`kl`, and `alpha` in [0, 1): 0 is :func:`reverse_kl`; at 1 the loss would be 0 for any student.
    Returns: [n] nats, in [0, -log alpha]. Denominator: none, one value per row.
    Space: labels or vocabulary.
    Raises: as :func:`kl`; ValueError for `alpha` outside [0, 1).
    Source: Ko et al. 2024, "DistiLLM", section 3.1 (SRKL).
    """
    return _skew_reverse_kl(*temper(student_logits, teacher_logprobs, temperature), alpha)


def tvd(student_logits: Tensor, teacher_logprobs: Tensor, temperature: float = 1.0) -> Tensor:
    """Total variation distance 1/2 sum_k |p_k - s_k|: the share of the mass on which teacher and student differ.

    Args, Raises: as for :func:`kl`.
    Returns: [n], dimensionless, in [0, 1]. Denominator: none, one value per row.
    Space: labels or vocabulary.
    Source: Wen et al. 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation", the TVD
        loss, per step.
    """
    return _tvd(*temper(student_logits, teacher_logprobs, temperature))


def cross_entropy(student_logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy -sum_k y_k log s_k at T = 1, with y a class (then -log s_y) or a distribution.

    Args:
        student_logits: [n, K], any float dtype, finite.
        targets: [n] int64 in 0..K-1, or -100 for a row without a label (value 0); or [n, K] probabilities.
    Returns: [n] nats, in [0, inf). Denominator: none, one value per row; a row of -100 is no supervised position
        and does not count in it.
    Space: labels or vocabulary.
    Raises: ValueError for shapes that do not fit, naming both, or for classes outside 0..K-1.
    """
    logits = as_float(student_logits)
    if logits.dim() != 2 or (targets.shape != logits.shape if targets.is_floating_point() else targets.dim() != 1):
        raise ValueError(
            f"student_logits [n, K] and targets [n] of integers or [n, K] of probabilities, "
            f"not {shape_text(student_logits)} and {shape_text(targets)}"
        )
    if targets.is_floating_point():
        return -(targets.to(logits.dtype) * logits.log_softmax(-1)).sum(-1)
    if len(targets) != len(logits):
        raise ValueError(
            f"one target per row: student_logits {shape_text(student_logits)}, targets {shape_text(targets)}"
        )
    invalid = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= logits.shape[1]))
    if any_true(invalid):
        raise ValueError(
            f"targets must be in 0..{logits.shape[1] - 1} (or {IGNORE_INDEX}), not {int(targets[invalid][0])}"
        )
    return F.cross_entropy(logits, targets.long(), ignore_index=IGNORE_INDEX, reduction="none")


def temperature_factor(term: str, temperature: float) -> float:
    """The factor that keeps the size of the gradient of `term` the same at every high temperature.

    T**2 for the divergences, which are quadratic near agreement (Hinton et al. 2015, section 2); T for `tvd`, which is
    linear there; 1 for `ce`, which has no temperature.

    Raises: ValueError for an unknown term.
    """
    powers = {"ce": 0, "tvd": 1} | {name: 2 for name in DISTRIBUTION_TERMS if name != "tvd"}
    if term not in powers:
        raise ValueError(f"unknown loss term {term!r}; known: {', '.join(powers)}")
    return float(temperature) ** powers[term]


def temper(student_logits: Tensor, teacher_logprobs: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log s, log p (held at `LOG_FLOOR`) and p at the temperature, [n, K] each: what all terms of a sum share.

    Raises: ValueError for shapes other than two equal [n, K], or a temperature that is not positive.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logprobs.shape:
        raise ValueError(
            f"student_logits and teacher_logprobs must be two equal [n, K], "
            f"not {shape_text(student_logits)} and {shape_text(teacher_logprobs)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    student = as_float(student_logits)
    teacher = teacher_logprobs.to(student.dtype)
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    log_p = teacher.log_softmax(-1)
    # p before the floor: an outcome that the teacher excludes has exactly the weight 0
    return student.log_softmax(-1), log_p.clamp_min(LOG_FLOOR), log_p.exp()


def _kl(log_s: Tensor, log_p: Tensor, p: Tensor) -> Tensor:
    return (p * (log_p - log_s)).sum(-1)


def _reverse_kl(log_s: Tensor, log_p: Tensor, p: Tensor) -> Tensor:
    return (log_s.exp() * (log_s - log_p)).sum(-1)


def _jsd(log_s: Tensor, log_p: Tensor, p: Tensor, beta: float) -> Tensor:
    if not 0 < beta < 1:
        raise ValueError(f"jsd needs beta between 0 and 1, both excluded, not {beta}: at 0 use kl, at 1 use reverse_kl")
    log_m = torch.logaddexp(log_p + math.log(beta), log_s + math.log1p(-beta))
    return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (log_s.exp() * (log_s - log_m)).sum(-1)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be in [0, 1), not {alpha}: at 1 the loss is 0 for any student")


def _skew_kl(log_s: Tensor, log_p: Tensor, p: Tensor, alpha: float) -> Tensor:
    _check_alpha(alpha)
    if alpha == 0:
        return _kl(log_s, log_p, p)
    log_m = torch.logaddexp(log_p + math.log(alpha), log_s + math.log1p(-alpha))
    return (p * (log_p - log_m)).sum(-1)


def _skew_reverse_kl(log_s: Tensor, log_p: Tensor, p: Tensor, alpha: float) -> Tensor:
    _check_alpha(alpha)
    if alpha == 0:
        return _reverse_kl(log_s, log_p, p)
    log_m = torch.logaddexp(log_p + math.log1p(-alpha), log_s + math.log(alpha))
    return (log_s.exp() * (log_s - log_m)).sum(-1)


def _tvd(log_s: Tensor, log_p: Tensor, p: Tensor) -> Tensor:
    return (p - log_s.exp()).abs().sum(-1) / 2


# term -> f((log s, log p, p) of `temper`, beta, alpha) -> [n]
DIVERGENCE_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "kl": lambda rows, beta, alpha: _kl(*rows),
    "reverse_kl": lambda rows, beta, alpha: _reverse_kl(*rows),
    "jsd": lambda rows, beta, alpha: _jsd(*rows, beta),
    "skew_kl": lambda rows, beta, alpha: _skew_kl(*rows, alpha),
    "skew_reverse_kl": lambda rows, beta, alpha: _skew_reverse_kl(*rows, alpha),
    "tvd": lambda rows, beta, alpha: _tvd(*rows),
}

# term -> its function of student_logits [n, K], teacher_logprobs [n, K] and temperature -> [n]
DISTRIBUTION_TERMS: dict[str, Callable[..., Tensor]] = {
    term.__name__: term for term in (kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd)
}
